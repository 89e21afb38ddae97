"""Drawing with less memory, by diffusers' and accelerate's own means and under diffusers' names."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderKL, UNet2DConditionModel

from autoencoder.model import Autoencoder, downsampling_factor
from conditioning.encoders import ConditionEncoders
from ldm.device import choose_device
from ldm.errors import UserError


class MemorySavers:
    """What a `LatentDiffusionModel` can do without memory; each costs some time.

    Slicing gives the same images up to rounding. Tiling does not: the normalisation of a tile knows nothing of the
    others, so colours may shift a little from tile to tile.
    """

    vae: Autoencoder
    unet: UNet2DConditionModel
    encoders: ConditionEncoders
    execution_device: torch.device | None = None
    """Where it computes while its parts are kept elsewhere; None: where they are."""

    def enable_vae_slicing(self) -> None:
        """Decode and encode the pictures of a batch one after the other. Raises UserError for a VQ autoencoder."""
        self._kl("slices").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode and encode all pictures of a batch at once."""
        self._kl("slices").disable_slicing()

    def enable_vae_tiling(self, tile: int | None = None) -> None:
        """Decode and encode pictures larger than `tile` pixels a side in tiles that overlap by a quarter.

        None is the autoencoder's `sample_size`, as in diffusers. Raises UserError for a VQ autoencoder and a tile that
        is too small.
        """
        vae = self._kl("tiles")
        factor = downsampling_factor(vae)
        tile = vae.config.sample_size if tile is None else tile
        if tile < 8 * factor or tile % (4 * factor):  # a quarter has to be whole in latents
            raise UserError(f"tile: found {tile}; allowed is {8 * factor} or more, in steps of {4 * factor}")
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
        vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode and encode whole pictures."""
        self._kl("tiles").disable_tiling()

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        """Compute attention for some heads at a time, by explicit products: half of them with auto, one with max.

        For devices without fused kernels only: where these run, they take less memory and less time. Raises UserError.
        """
        try:
            self.unet.set_attention_slice(slice_size)
        except ValueError as error:
            raise UserError(f"slice_size: found {slice_size!r} ({error}); allowed is auto, max or a number") from error

    def disable_attention_slicing(self) -> None:
        """The kernel that diffusers chooses by itself."""
        self.unet.set_attention_slice(None)

    def enable_model_cpu_offload(self, device: str | torch.device = "auto") -> None:
        """Keep text encoder, U-Net and autoencoder in main memory, and each on `device` only while it works.

        Open the model on the CPU first (`device="cpu"`), else all of it has been on the device once. Raises UserError
        for a device that is not here.
        """
        target = choose_device(device)
        parts: list[Any] = [part for part in (self.encoders.text, self.unet, self.vae) if part is not None]
        hooks: list[Any] = []
        for part in parts:
            remove_hook_from_module(part.to("cpu"))
            _, hook = cpu_offload_with_hook(part, target, prev_module_hook=hooks[-1] if hooks else None)
            hooks.append(hook)
        # The first part of the next batch sends the last one of this batch back.
        hooks[0].hook.prev_module_hook = hooks[-1]
        for encoder in (self.encoders.semantic, self.encoders.label):
            if encoder is not None:
                encoder.to(target)  # a few kilobytes
        self.execution_device = target

    def _kl(self, what: str) -> AutoencoderKL:
        if not isinstance(self.vae, AutoencoderKL):
            raise UserError(
                f"vae: found a {type(self.vae).__name__}, which diffusers cannot run in {what}; allowed is an "
                "AutoencoderKL; draw fewer pictures at once"
            )
        return self.vae
