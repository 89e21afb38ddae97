"""The three networks of a model beside their places in a checkpoint of the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.interchange import keys_text, keys_unet, keys_vae
from ldm.interchange.architecture import text_config, unet_config, vae_config
from ldm.interchange.hints import Hints
from ldm.interchange.keys import Place, Shape, stored_shapes
from ldm.interchange.keys_text import OPENCLIP_PREFIX, TRANSFORMERS_PREFIXES, TextLayout, text_places
from ldm.interchange.keys_unet import unet_places
from ldm.interchange.keys_vae import vae_places


@dataclass(frozen=True)
class Part:
    """A network and the place of each of its weights in a checkpoint."""

    network: Any
    places: Mapping[str, Place]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the network's weights, by their names in it."""
        return {name: tuple(weight.shape) for name, weight in self.network.state_dict().items()}

    @property
    def stored(self) -> dict[str, Shape]:
        """Of the checkpoint's tensors, by key."""
        return stored_shapes(self.places, self.shapes)

    def load(self, weights: Mapping[str, Tensor]) -> Any:
        """The network with these weights, which become its own, ready to draw."""
        self.network.load_state_dict(weights, assign=True)
        return self.network.eval()


def unet_part(unet: UNet2DConditionModel) -> Part:
    """Raises ValueError for a U-Net that the layout has no place for."""
    attends = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        raise ValueError(f"unet: found layers_per_block {layers}; allowed in this layout is one number for all levels")
    return Part(unet, unet_places(unet.state_dict(), layers, attends))


def vae_part(vae: AutoencoderKL) -> Part:
    """Raises ValueError for an autoencoder that the layout has no place for."""
    return Part(vae, vae_places(vae.state_dict(), len(vae.config.block_out_channels)))


def text_part(model: CLIPTextModel, layout: TextLayout, prefix: str | None = None) -> Part:
    """Raises ValueError for a text tower that the layout has no place for."""
    usual = OPENCLIP_PREFIX if layout == "openclip" else TRANSFORMERS_PREFIXES[0]
    return Part(model, text_places(model.state_dict(), layout, prefix or usual))


def empty_unet(shapes: Mapping[str, Shape], hints: Hints) -> UNet2DConditionModel:
    """The U-Net of a checkpoint, without its weights. Raises ValueError."""
    with init_empty_weights(include_buffers=False):
        return UNet2DConditionModel(**unet_config(within(shapes, keys_unet.PREFIX), hints))


def empty_vae(shapes: Mapping[str, Shape], hints: Hints, scaling_factor: float | None = None) -> AutoencoderKL:
    """The autoencoder of a checkpoint, without its weights. Raises ValueError."""
    with init_empty_weights(include_buffers=False):
        return AutoencoderKL(**vae_config(within(shapes, keys_vae.PREFIX), hints, scaling_factor))


def empty_text_model(shapes: Mapping[str, Shape], hints: Hints, layout: TextLayout, prefix: str) -> CLIPTextModel:
    """The text tower of a checkpoint, without its weights. Raises ValueError."""
    with init_empty_weights(include_buffers=False):
        return CLIPTextModel(CLIPTextConfig(**text_config(within(shapes, prefix), hints, layout)))


def text_layout_of(shapes: Mapping[str, Shape]) -> tuple[TextLayout, str]:
    """(layout, prefix) of a checkpoint's text tower. Raises ValueError for none of Stable Diffusion 1 or 2."""
    layouts: tuple[tuple[TextLayout, str], ...] = (
        ("transformers", TRANSFORMERS_PREFIXES[0]),
        ("openclip", OPENCLIP_PREFIX),
        ("transformers", TRANSFORMERS_PREFIXES[1]),
    )
    for layout, prefix in layouts:
        if any(key.startswith(prefix) for key in shapes):
            return layout, prefix
    raise ValueError(f"text_encoder: found no {keys_text.PREFIX} keys of Stable Diffusion 1 or 2; check the file")


def within(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    """The part below `prefix`, which is cut off the keys."""
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
