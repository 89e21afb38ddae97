"""A CLIP-like model of open_clip: images and texts in one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError, user_input
from ldm.evaluation.features import RESIZE_FILTER, Features, module_hash, resized
from ldm.evaluation.weight_files import find_weights

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


class ClipModel:
    """Embeds images and texts; also a `FeatureExtractor`, whose features are the image embeddings, not normalised."""

    resize_filter = RESIZE_FILTER

    def __init__(self, model: Any, tokenizer: Any, name: str, device: torch.device | str = "cpu") -> None:
        """`model` and `tokenizer` as open_clip makes them."""
        self.name = name
        self.weights = module_hash(model)
        self._model, self._tokenizer, self._device = model.to(device).eval(), tokenizer, torch.device(device)
        side = model.visual.image_size
        self.resolution = int(side[0] if isinstance(side, tuple | list) else side)
        self._mean = torch.tensor(model.visual.image_mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(model.visual.image_std, device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, D], float32 on the CPU, not normalised."""
        pixels = (resized(images.to(self._device), self.resolution) - self._mean) / self._std
        return self._model.encode_image(pixels).float().cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), D], float32 on the CPU, not normalised; a long text is cut as in training."""
        return self._model.encode_text(self._tokenizer(list(texts)).to(self._device)).float().cpu()

    def extract(self, images: Tensor) -> Features:
        """`embed_images`."""
        return Features(self.embed_images(images))


def open_clip_model(
    architecture: str,
    weights: str | None,
    *,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> ClipModel:
    """open_clip's `architecture` with the weights in a local .safetensors file or folder.

    With `download`, `weights` may be one of open_clip's pretrained tags, which is then fetched. OpenAI's weights need
    an architecture whose name ends in -quickgelu. Raises `UserError`.
    """
    import open_clip

    name = f"openclip {architecture}"
    if open_clip.get_model_config(architecture) is None:
        raise UserError(f"{name}: no such architecture; allowed is a name of open_clip.list_models(), such as ViT-B-32")
    if download and weights in open_clip.list_pretrained_tags_by_model(architecture):
        pretrained = str(weights)
    else:
        path = find_weights(name, weights, WEIGHTS)
        if path.suffix != ".safetensors":
            raise UserError(f"{name}: found {path}; allowed is a .safetensors file; convert it")
        pretrained = str(path)
    with user_input(f"{name}: {pretrained} does not load", OSError, ValueError, RuntimeError, KeyError):
        model = open_clip.create_model(architecture, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(architecture)
    return ClipModel(model, tokenizer, name, device)
