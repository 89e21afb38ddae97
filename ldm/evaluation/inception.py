"""Inception-v3 of 2015, which FID, sFID, KID and IS are defined by, through torch-fidelity's port."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError, user_input
from ldm.evaluation.features import RESIZE_FILTER, Features, module_hash, resized
from ldm.evaluation.weight_files import find_weights, read_weights

WEIGHTS = ("weights-inception-2015-12-05-6726825d.safetensors", "weights-inception-2015-12-05-6726825d.pth")
"""torch-fidelity's release v0.2.0 has the second; the first is the same tensors as safetensors."""
SPATIAL_CHANNELS = 7
"""sFID takes the first 7 channels of 17 x 17 of the sixth mixed block's 1x1 branch (arXiv 2103.03841 and its authors'
successors' evaluator)."""


class InceptionExtractor:
    """2,048 pooled, 2,023 spatial features and 1,008 logits without bias. A `FeatureExtractor`."""

    name = "inception-v3"
    resolution = 299
    resize_filter = RESIZE_FILTER

    def __init__(self, network: Any, device: torch.device | str = "cpu") -> None:
        """`network` is torch-fidelity's `FeatureExtractorInceptionV3` with the layers 2048 and logits_unbiased."""
        self._network = network.to(device)
        self._device = torch.device(device)
        self.weights = module_hash(network)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        """Images [B, 3, H, W] in [-1, 1] -> features; they are resized to 299 pixels and rounded to 8 bits again."""
        pixels = (resized(images.to(self._device), self.resolution) * 255).round().to(torch.uint8)
        spatial: list[Tensor] = []
        hook = self._network.Mixed_6d.branch1x1.register_forward_hook(
            lambda _module, _inputs, output: spatial.append(output[:, :SPATIAL_CHANNELS].flatten(1).clone())
        )
        try:
            pooled, logits = self._network(pixels)
        finally:
            hook.remove()
        return Features(pooled.cpu(), spatial[0].float().cpu(), logits.cpu())


def open_inception(
    weights: str | None,
    *,
    allow_pickle: bool = False,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> InceptionExtractor:
    """Inception with torch-fidelity's weights from the file or folder `weights`, downloaded only if `download` says so.

    Raises `UserError` if torch-fidelity or the weights are missing, or the weights do not fit.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except ImportError as error:
        raise UserError("inception: torch-fidelity is not installed; install it: pip install 'ldm[eval]'") from error
    if weights is None and download:
        with user_input("inception: the download failed", OSError, RuntimeError):
            state = torch.hub.load_state_dict_from_url(
                theirs.URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
    else:
        path = find_weights("inception", weights, WEIGHTS)
        state = read_weights("inception", path, allow_pickle=allow_pickle)
    # The class opens what it is given as a pickle without weights_only, so it gets a buffer that we have written.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with user_input("inception: the weights do not fit; give torch-fidelity's of 2015-12-05", RuntimeError):
        network = theirs.FeatureExtractorInceptionV3(
            "inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
        )
    return InceptionExtractor(network, device)
