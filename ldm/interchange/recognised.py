"""Whether ComfyUI and A1111 will know a single file: they go by sizes, and by nothing that its header says."""

from __future__ import annotations

from typing import Any

from ldm.interchange.architecture import STANDARD_SCALING_FACTOR
from ldm.interchange.keys_text import TextLayout
from ldm.noise import NoiseConfig

_SHARED: dict[str, Any] = {
    "channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention": (True, True, True, False),
    "transformer depth": 1,
    "norm groups": 32,
    "output channels": 4,
    "autoencoder channels": (128, 256, 512, 512),
    "autoencoder layers_per_block": 2,
    "autoencoder attention": True,
    "autoencoder norm groups": 32,
    "latent channels": 4,
    "text length": 77,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "1": _SHARED
    | {
        "context": 768,
        "linear projections": False,
        "heads": (8, 8, 8, 8),
        "text blocks": 12,
        "text heads": 12,
        "text activation": "quick_gelu",
        "text layout": "transformers",
    },
    "2": _SHARED
    | {
        "context": 1024,
        "linear projections": True,
        "heads": (5, 10, 20, 20),
        "text blocks": 23,
        "text heads": 16,
        "text activation": "gelu",
        "text layout": "openclip",
    },
}
_OTHERS = "this toolkit reads the file, they will not"


def sizes_of(unet: Any, vae: Any, text: Any, layout: TextLayout, length: int) -> dict[str, Any]:
    """What FAMILIES lists, of these networks."""
    config, levels = unet.config, len(unet.config.block_out_channels)
    return {
        "channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "attention": tuple(kind.startswith("CrossAttn") for kind in config.down_block_types),
        "transformer depth": _common(config.transformer_layers_per_block),
        "norm groups": config.norm_num_groups,
        "output channels": config.out_channels,
        "autoencoder channels": tuple(vae.config.block_out_channels),
        "autoencoder layers_per_block": vae.config.layers_per_block,
        "autoencoder attention": vae.config.mid_block_add_attention,
        "autoencoder norm groups": vae.config.norm_num_groups,
        "latent channels": vae.config.latent_channels,
        "text length": length,
        "context": _common(config.cross_attention_dim),
        "linear projections": config.use_linear_projection,
        "heads": per_level(config.num_attention_heads or config.attention_head_dim, levels),
        "text blocks": text.config.num_hidden_layers,
        "text heads": text.config.num_attention_heads,
        "text activation": text.config.hidden_act,
        "text layout": layout,
    }


def family_of(sizes: dict[str, Any]) -> str | None:
    """ "1" or "2" when all sizes are those of that Stable Diffusion."""
    return next((name for name, family in FAMILIES.items() if family == sizes), None)


def warnings_for(sizes: dict[str, Any], noise: NoiseConfig, scaling_factor: float, v_guess: bool) -> list[str]:
    """One line for each thing that ComfyUI and A1111 would take for another; `v_guess` is what ComfyUI's rule says."""
    family = {family["context"]: name for name, family in FAMILIES.items()}.get(sizes["context"])
    if family is None:
        return [f"ComfyUI and A1111 know Stable Diffusion 1 and 2, found text of width {sizes['context']}: {_OTHERS}"]
    wanted = FAMILIES[family]
    wrong = [f"{name} {sizes[name]} (theirs {wanted[name]})" for name in wanted if sizes[name] != wanted[name]]
    if wrong:
        return [
            f"ComfyUI and A1111 know Stable Diffusion {family} in its own sizes, found {', '.join(wrong)}: {_OTHERS}"
        ]
    warnings = []
    if abs(scaling_factor - STANDARD_SCALING_FACTOR) > 1e-6:
        warnings.append(
            f"ComfyUI and A1111 scale latents by {STANDARD_SCALING_FACTOR}, found {scaling_factor:g}: their images "
            "will be wrong; export with standard_scale, which puts the difference into the autoencoder's weights"
        )
    if (noise.schedule, noise.beta_start, noise.beta_end, noise.timesteps) != ("scaled_linear", 0.00085, 0.012, 1000):
        warnings.append(
            f"ComfyUI and A1111 use the schedule scaled_linear, 0.00085 to 0.012, found {noise.schedule}: their images "
            "will be wrong"
        )
    if (noise.prediction == "v_prediction") != v_guess or noise.prediction not in ("epsilon", "v_prediction"):
        warnings.append(
            f"ComfyUI takes the file to predict {'v' if v_guess else 'epsilon'}, found {noise.prediction}: set it "
            "there by ModelSamplingDiscrete, in A1111 by a .yaml beside the file"
        )
    if noise.zero_terminal_snr:
        warnings.append("ComfyUI and A1111 do not know of zero terminal SNR: switch it on there")
    return warnings


def architecture_id(sizes: dict[str, Any], noise: NoiseConfig, *, inpainting: bool) -> str:
    """ModelSpec's name of the architecture; it lists none for inpainting nor for other sizes, so these are ours."""
    family = family_of(sizes)
    if family is None:
        return "latent-diffusion-inpainting" if inpainting else "latent-diffusion"
    if inpainting:
        return f"stable-diffusion-v{family}-inpainting"
    if family == "1":
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if noise.prediction == "v_prediction" else "stable-diffusion-v2-512"


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
    """One value for each level, where diffusers allows a single one for all."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def _common(value: Any) -> Any:
    """The value that all levels have, else all of them."""
    values = per_level(value, 1)
    return values[0] if len(set(values)) == 1 else tuple(values)
