"""Which kernel computes the U-Net's attention: chosen, tried by a real call, and told as it really ran."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.errors import UserError, user_input

AttentionBackend = Literal["auto", "sdpa", "math", "xformers"]
_PROCESSORS = {
    AttnProcessor: "math",
    AttnProcessor2_0: "sdpa",
    XFormersAttnProcessor: "xformers",
    SlicedAttnProcessor: "slices",
}
_RAN = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
    "aten::_softmax": "explicit products",
    "aten::_safe_softmax": "explicit products",
}
"""What is executed below torch's `scaled_dot_product_attention`, and where there is no fused kernel."""


def set_attention(unet: UNet2DConditionModel, backend: AttentionBackend) -> None:
    """Choose the attention kernel: `auto` is `sdpa`, torch's fused ones. Raises UserError if xformers does not work."""
    if backend == "math":
        unet.set_attn_processor(AttnProcessor())
    elif backend == "xformers":
        _check_xformers()
        with _refused():
            unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0())


def attention_kernel(unet: UNet2DConditionModel) -> str:
    """What is set, read from the layers: sdpa, math, xformers, slices, none, or several with +."""
    processors = {type(processor) for processor in unet.attn_processors.values()}
    names = sorted(_PROCESSORS.get(processor, processor.__name__) for processor in processors)
    return "+".join(names) or "none"


def attention_that_ran(unet: UNet2DConditionModel) -> str:
    """What is set and, in brackets, what torch really executed for it: `sdpa (flash)`.

    Found by a call of the network on small latents with zeros for conditions, in the type, mode and autocast of the
    caller: torch chooses by device, type, width of the heads, masks and gradients, not by how many pixels there are.
    Raises UserError when the kernel does not work here.
    """
    side = 2 ** len(unet.config.block_out_channels)
    like = next(unet.parameters())
    inputs: dict[str, Any] = {"sample": like.new_zeros(1, unet.config.in_channels, side, side), "timestep": 0}
    width = unet.config.cross_attention_dim
    inputs["encoder_hidden_states"] = like.new_zeros(1, 8, width if isinstance(width, int) else width[0])
    if unet.config.class_embed_type:
        inputs["class_labels"] = like.new_zeros(1, unet.config.projection_class_embeddings_input_dim)
    with _refused(), _Executed() as executed:
        unet.forward(**inputs)  # past a compiled call, which would be compiled for this size
    ran = sorted({_RAN[name] for name in executed.names if name in _RAN})
    ran += sorted({name.split("::")[0] for name in executed.names if name.startswith("xformers")})
    return f"{attention_kernel(unet)} ({' + '.join(ran) or 'no attention'})"


def _check_xformers() -> None:
    if importlib.util.find_spec("xformers") is None:
        raise UserError(
            "unet.attention_backend: found xformers, which is not installed; allowed is auto, sdpa or math here; "
            "pip install 'ldm[xformers]' or choose another"
        )


def _refused() -> Any:
    """Turns what xformers raises where it is built for other GPUs, another torch, or head widths it does not take."""
    return user_input(
        "unet.attention_backend: this kernel does not work here; choose sdpa or math",
        ImportError,
        OSError,
        ValueError,
        NotImplementedError,
    )


class _Executed(TorchDispatchMode):
    """Notes the names of all operations, as they are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do it and note its name."""
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))
