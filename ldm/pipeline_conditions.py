"""From a request to what the U-Net is told and what the sampler starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conditioning.conditions import Conditions
from conditioning.encoders import ConditionInputs
from conditioning.inpainting import mask_to_latents, masked_image
from ldm.canvas import Canvas
from ldm.data.images import to_tensor
from ldm.pipeline_model import LatentDiffusionModel
from ldm.pipeline_request import Request, stacked_maps
from ldm.sampling import Known, initial_latents


def tell(model: LatentDiffusionModel, request: Request, chain: Sequence[str]) -> list[Conditions]:
    """What the U-Net is told: nothing, then with the first of `chain`, the first two, ..., all of them."""
    height, width = request.height // model.factor, request.width // model.factor
    absent = _nothing(model, request)
    both = [absent, absent.replaced(chain, _inputs(model, request))]
    nothing, full = [model.encoders(inputs, height, width).to(model.device, model.dtype) for inputs in both]
    between = [model.encoders.combined(nothing, full, chain[:number]) for number in range(1, len(chain))]
    return [nothing, *between, full] if chain else [nothing]


def _inputs(model: LatentDiffusionModel, request: Request) -> ConditionInputs:
    """The conditions that the request gives."""
    tokens = mask = masked_latents = semantic = None
    context = request.prompt_embeds
    if model.text_encoder is not None:
        tokens = model.text_encoder.tokenize(request.prompts).to(model.device)
        if request.clip_skip:
            context = model.text_encoder(tokens, request.clip_skip)  # [B, L, C]
    if request.canvases is not None:
        images = torch.stack([to_tensor(canvas.image) for canvas in request.canvases])  # [B, 3, H, W]
        masks = _masks(request.canvases)  # [B, 1, H, W]
        masked_latents = model.encode_images(masked_image(images, masks))
        mask = mask_to_latents(masks.to(model.device), *masked_latents.shape[-2:])  # [B, 1, h, w]
    if request.maps is not None:
        semantic = stacked_maps(request).to(model.device)  # [B, H, W]
    labels = None if request.labels is None else request.labels.to(model.device)
    return ConditionInputs(tokens, mask, masked_latents, semantic, labels, context)


def _nothing(model: LatentDiffusionModel, request: Request) -> ConditionInputs:
    """The same conditions left out, text as the negative prompt."""
    tokens = mask = masked_latents = semantic = labels = None
    count, size = len(request), (request.height, request.width)
    if model.text_encoder is not None:
        tokens = model.text_encoder.tokenize(request.negatives).to(model.device)
    if "inpainting" in model.conditions:
        grey = model.encode_images(torch.zeros(1, 3, *size))  # [1, C, h, w]
        masked_latents = grey.expand(count, -1, -1, -1)
        mask = torch.ones_like(masked_latents[:, :1])
    if model.semantic_encoder is not None:
        semantic = model.semantic_encoder.unknown_map(count, *size)
    if model.label_encoder is not None:
        labels = model.label_encoder.unknown_labels(count)
    return ConditionInputs(tokens, mask, masked_latents, semantic, labels)


def known_of(
    model: LatentDiffusionModel,
    request: Request,
    strength: float,
    generators: torch.Generator | Sequence[torch.Generator],
) -> Known | None:
    """What the result starts from and, where the network knows no masks, is held to."""
    blends = blends_latents(model, request)
    if not blends and (strength == 1 or (request.images is None and request.canvases is None)):
        return None
    pictures = request.images or [canvas.image for canvas in request.canvases or ()]
    latents = model.encode_images(torch.stack([to_tensor(picture) for picture in pictures]))  # [B, C, h, w]
    if request.canvases is None:
        return Known(latents, strength)
    masks = _masks(request.canvases)
    mask = mask_to_latents(masks.to(model.device), *latents.shape[-2:])  # [B, 1, h, w]
    if request.canvases[0].fill == "noise":
        noise = draw_noise(generators, latents.shape).to(latents)
        latents = torch.where(mask > 0, noise, latents)
    return Known(latents, strength, mask if blends else None)


def blends_latents(model: LatentDiffusionModel, request: Request) -> bool:
    """Whether each step ends at the known latents outside the mask."""
    if request.canvases is None:
        return False
    return request.canvases[0].blend or "inpainting" not in model.conditions


def draw_noise(generators: torch.Generator | Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise of `shape` [N, C, h, w]: each image from its own generator, or all from a single one."""
    if isinstance(generators, torch.Generator):
        return torch.randn(*shape, generator=generators, device=generators.device)
    return initial_latents(generators, shape[1:])


def _masks(canvases: Sequence[Canvas]) -> Tensor:
    return torch.stack([torch.from_numpy(canvas.mask)[None] for canvas in canvases])  # [B, 1, H, W]
