"""Every config that we ship is valid, and the networks of the full ones are what their names say (on meta)."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from autoencoder.latents import decode, encode
from autoencoder.model import Autoencoder, build_autoencoder, downsampling_factor, latent_channels
from conditioning.conditions import Conditions
from conditioning.text import TextConfig
from ldm.config import dump, load
from ldm.data.scene_rendering import PHRASINGS
from ldm.data.scenes import held_out_pairs, held_out_singles
from ldm.growing import grow
from ldm.training.stage1 import Stage1Config
from ldm.training.stage2_config import Stage2Config
from ldm.unet import build_unet, denoise

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.y*ml"))
VAES = [path for path in FILES if path.name.startswith("vae")]
LDMS = [path for path in FILES if path.name.startswith("ldm")]
FINETUNING = [path for path in FILES if path.parent.name == "finetune"]
DECODERS = [path for path in FINETUNING if path.stem == "decoder"]  # the one way that is stage 1
FULL_VAES = [path for path in VAES if path.parent.name == "full"]
FULL_LDMS = [path for path in LDMS if path.parent.name == "full"]
PARAMETERS = {"vae-kl-f8-256": 83_653_863, "ldm-sd15-256": 859_520_964, "ldm-sd15-512": 859_520_964}
"""Of Stable Diffusion 1.5's own `vae` and `unet`."""
GPUS = 8


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@cache
def config_of(path: Path) -> Stage1Config | Stage2Config:
    return load(Stage1Config if path in VAES + DECODERS else Stage2Config, path)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def autoencoder_for(path: Path) -> Autoencoder:
    """The autoencoder that a stage 2 config names, from the stage 1 config that makes it, on the meta device."""
    wanted = config_of(path).autoencoder
    makers = [vae for vae in VAES if wanted == f"{config_of(vae).out}/autoencoder"]
    assert len(makers) == 1, f"{name_of(path)}: autoencoder {wanted} is made by {makers or 'no config'}"
    with torch.device("meta"):
        return build_autoencoder(config_of(makers[0]).autoencoder)


OWN = {f"{config_of(path).out}/pipeline": config_of(path) for path in LDMS}
"""What the configs make, by the path under which others go on from it."""


def text_width(config: TextConfig) -> int | None:
    if config.encoder == "none":
        return None
    if config.encoder == "trained":
        return config.width
    if config.pretrained in OWN:
        return text_width(OWN[config.pretrained].conditions.text)
    assert (config.encoder, config.pretrained) == ("clip", "openai/clip-vit-large-patch14")
    with torch.device("meta"):
        vit_l = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
        return CLIPTextModel(vit_l).config.hidden_size


def test_there_are_configs_of_both_stages_and_no_others():
    assert {name_of(path) for path in FULL_VAES + FULL_LDMS} == {f"full/{name}" for name in PARAMETERS}
    assert {"demo/vae", "demo/ldm"} <= {name_of(path) for path in FILES}
    assert [path for path in FILES if path not in VAES + LDMS + FINETUNING] == []


def test_the_plain_recipe_differs_from_the_reference_only_in_what_it_is_there_to_compare():
    mine, plain = (config_of(CONFIGS / f"{folder}.yaml") for folder in ("reference/vae", "baseline/vae-emoji"))
    names = ("data", "validation_data", "autoencoder", "loss", "discriminator", "optimiser", "training", "ema_decay")
    assert [name for name in names if getattr(mine, name) != getattr(plain, name)] == []
    mine, plain = (config_of(CONFIGS / f"{folder}.yaml") for folder in ("reference/ldm", "baseline/ldm-emoji"))
    names = ("data", "validation_data", "conditions", "unet", "optimiser", "training", "ema_decay")
    assert [name for name in names if getattr(mine, name) != getattr(plain, name)] == []


def test_what_goes_on_from_a_model_of_ours_holds_the_same_combinations_out():
    further = [path for path in LDMS if config_of(path).model is not None]
    assert [name_of(path) for path in further] == ["reference/ldm-finish", "reference/ldm-relations"]
    for path in further:
        now, first = (config.data.scenes for config in (config_of(path), OWN[config_of(path).model]))
        free = {"count": 1, "min_objects": 1, "max_objects": 3, "phrasings": PHRASINGS}
        free |= {"sizes": ("small", "large"), "size_words": "if_both"}
        assert dataclasses.replace(now, **free) == dataclasses.replace(first, **free)
        assert held_out_pairs(now) == held_out_pairs(first)
        assert held_out_singles(now) == held_out_singles(first)
    first, last = (config_of(CONFIGS / f"reference/{name}.yaml") for name in ("ldm", "ldm-finish"))
    assert last.data == first.data
    assert last.cache.folder == f"{first.out}/latents"


@pytest.mark.parametrize("path", FINETUNING, ids=name_of)
def test_finetuning_is_a_dozen_lines_and_is_started_as_its_first_line_says(path):
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    command = first.split(": ", 1)[1]
    script, model = ("train_vae", "autoencoder.pretrained") if path in DECODERS else ("train_ldm", "model")
    value = "PATH/vae" if path in DECODERS else "PATH"
    assert command == f"python {script}.py configs/finetune/{path.name} {model}={value} data.root=DIR"
    assert len(lines) <= 13
    config = load(type(config_of(path)), path, command.split()[3:])
    assert (config.autoencoder.pretrained if path in DECODERS else config.model, config.data.root) == (value, "DIR")
    assert config.training.validate_first  # to compare with


def test_there_is_a_config_for_every_way_of_finetuning():
    configs = {path.stem: config_of(path) for path in FINETUNING}
    trained = {
        name: {part for part in ("lora", "prior", "textual_inversion") if getattr(config, part, None) is not None}
        for name, config in configs.items()
    }
    assert trained == {
        "conditions": {"lora"},
        "decoder": set(),
        "dreambooth": {"prior"},
        "full": set(),
        "lora": {"lora"},
        "textual_inversion": {"textual_inversion"},
    }
    assert configs["decoder"].train == "decoder"
    prior = configs["dreambooth"].prior
    assert (prior.count, prior.weight) == (200, 1.0)  # the paper's, and what diffusers' script is run with


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_loads_strictly_and_survives_being_written_down(path, tmp_path):
    config = config_of(path)
    again = tmp_path / "config.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load(type(config), again) == config


@pytest.mark.parametrize("path", FULL_VAES + FULL_LDMS, ids=name_of)
def test_full_configs_fit_eight_gpus(path):
    config, first = config_of(path), path.read_text(encoding="utf-8").splitlines()[0]
    script = "train_vae.py" if path in VAES else "train_ldm.py"
    assert f"--num_processes {GPUS} {script} configs/full/{path.name}" in first
    assert config.training.batch_size % (config.training.accumulation * GPUS) == 0
    assert config.runtime.precision == "auto"


@pytest.mark.parametrize("path", VAES, ids=name_of)
def test_autoencoders(path):
    config = config_of(path)
    if config.autoencoder.pretrained is not None:
        pytest.skip("continues from weights that are not here")
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.autoencoder)
        side = config.data.resolution
        moments = encode(autoencoder, torch.empty(2, 3, side, side))
        images = decode(autoencoder, moments.mean)
    factor = downsampling_factor(autoencoder)
    assert moments.mean.shape == (2, config.autoencoder.latent_channels, side // factor, side // factor)
    assert images.shape == (2, 3, side, side)
    if path.parent.name == "full":
        assert count(autoencoder) == PARAMETERS[path.stem]


@pytest.mark.parametrize("path", [path for path in LDMS if config_of(path).model is None], ids=name_of)
def test_unets_fit_the_autoencoders_that_they_name(path):
    config, autoencoder = config_of(path), autoencoder_for(path)
    assert config.data.resolution % downsampling_factor(autoencoder) == 0
    channels, side = latent_channels(autoencoder), config.data.resolution // downsampling_factor(autoencoder)
    width = text_width(config.conditions.text)
    layout = config.conditions.layout
    with torch.device("meta"):
        first = config if config.unet.pretrained is None else OWN[config.unet.pretrained]
        unet = build_unet(
            first.unet,
            latent_channels=channels,
            spatial_channels=first.conditions.layout.channels(channels),
            context_width=width,
            sample_size=side,
        )
        if first is not config:
            unet = grow(unet, old=first.conditions.layout, new=layout, class_embedding_width=None)
        context = None if width is None else torch.empty(2, config.conditions.text.length, width)
        further = layout.channels(channels)
        spatial = torch.empty(2, further, side, side) if further else None
        latents, timesteps = torch.empty(2, channels, side, side), torch.zeros(2, dtype=torch.long)
        output = denoise(unet, latents, timesteps, Conditions(context=context, spatial=spatial))
    assert output.shape == latents.shape
    if path.parent.name == "full":
        assert width == 768
        assert count(unet) == PARAMETERS[path.stem]


def test_the_kl_weight_is_latent_diffusions_in_means():
    config = config_of(CONFIGS / "full" / "vae-kl-f8-256.yaml")
    size, channels = config.data.resolution, config.autoencoder.latent_channels
    side = size // 2 ** (len(config.autoencoder.channels) - 1)
    assert config.loss.kl_weight == pytest.approx(1e-6 * channels * side**2 / (3 * size**2), rel=1e-3)
    # Adam's step does not see the scale of the loss, so only the balance with the reconstruction matters.
    assert (config.loss.reconstruction_weight, config.loss.perceptual_weight) == (1, 1)


def test_the_second_phase_goes_on_from_the_first():
    first, second = (config_of(CONFIGS / "full" / f"ldm-sd15-{size}.yaml") for size in (256, 512))
    changed = ("out", "data", "validation_data", "training")
    assert [name for name in vars(first) if getattr(first, name) != getattr(second, name)] == [
        name for name in vars(first) if name in changed
    ]
