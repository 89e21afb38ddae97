"""Any of timm's image networks as an extractor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError, user_input
from ldm.evaluation.features import RESIZE_FILTER, Features, module_hash, resized
from ldm.evaluation.weight_files import find_weights, read_weights

WEIGHTS = ("model.safetensors",)


class TimmExtractor:
    """The pooled features of a timm network, before its classifier. A `FeatureExtractor`."""

    resize_filter = RESIZE_FILTER

    def __init__(self, network: Any, name: str, device: torch.device | str = "cpu") -> None:
        """`network` as `timm.create_model(..., num_classes=0)` makes it."""
        from timm.data import resolve_model_data_config

        self.name, self.weights = name, module_hash(network)
        self._network, self._device = network.to(device).eval(), torch.device(device)
        data = resolve_model_data_config(network)
        self.resolution = int(data["input_size"][-1])
        self._mean = torch.tensor(data["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(data["std"], device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        """Images [B, 3, H, W] in [-1, 1] -> pooled features [B, D]."""
        pixels = (resized(images.to(self._device), self.resolution) - self._mean) / self._std
        return Features(self._network(pixels).float().cpu())


def open_timm(
    architecture: str, weights: str | None, *, download: bool = False, device: torch.device | str = "cpu"
) -> TimmExtractor:
    """timm's `architecture` with the weights in a local .safetensors file or folder, or, with `download`, timm's own.

    Raises `UserError`.
    """
    import timm

    name = f"timm {architecture}"
    if not timm.is_model(architecture):
        raise UserError(f"{name}: no such architecture; allowed is a name of timm.list_models(), such as resnet50")
    source: dict[str, Any] = {}
    if weights is not None or not download:
        path = find_weights(name, weights, WEIGHTS)
        source = {"pretrained_cfg_overlay": {"state_dict": read_weights(name, path, allow_pickle=False)}}
    with user_input(f"{name}: {weights or 'the download'} does not load", OSError, ValueError, RuntimeError, KeyError):
        network = timm.create_model(architecture, pretrained=True, num_classes=0, **source)
    return TimmExtractor(network, name, device)
