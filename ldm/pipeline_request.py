"""What one call of the pipeline is to draw, an entry an image; everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conditioning.label import LabelEncoder
from conditioning.semantic import SemanticEncoder, read_map
from ldm.canvas import Canvas, InpaintingOptions, prepare_canvas
from ldm.data.images import to_rgb
from ldm.data.sample import UNKNOWN_CLASS, UNKNOWN_LABEL
from ldm.errors import UserError, user_input
from ldm.mask_shaping import window
from ldm.pipeline_inputs import check_clip_skip, check_prompts, check_side, logger
from ldm.pipeline_model import LatentDiffusionModel

ImageInput = Image.Image | Sequence[Image.Image]
MapInput = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]
LabelInput = int | str | Sequence[int | str | None]


@dataclass(frozen=True)
class Request:
    """N images to draw, and the conditions of each; None where a condition is not given at all.

    Attributes:
        height, width: pixels at which the model draws.
        prompt_embeds: [N, L, C], in place of the prompts' encoding.
        maps: int64 [H, W] each, 255 = unknown.
        labels: int64 [N], -1 = unknown.
        images: RGB pictures of that size to start from.
        canvases: for inpainting; each holds its picture, its mask and the way back.
        clip_skip: how many of the text encoder's last blocks the prompts leave out.
    """

    prompts: list[str]
    negatives: list[str]
    height: int
    width: int
    prompt_embeds: Tensor | None = None
    maps: list[Tensor] | None = None
    labels: Tensor | None = None
    images: list[Image.Image] | None = None
    canvases: list[Canvas] | None = None
    clip_skip: int = 0

    _EACH: ClassVar = ("prompts", "negatives", "prompt_embeds", "maps", "labels", "images", "canvases")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> Request:
        """Some of the images."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self._EACH}
        values = {name: None if value is None else value[part] for name, value in values.items()}
        return replace(self, **values)

    @classmethod
    def join(cls, requests: Sequence[Request]) -> Request:
        """All images of requests of one size that are given the same conditions."""

        def joined(values: list[Any]) -> Any:
            if values[0] is None:
                return None
            return torch.cat(values) if isinstance(values[0], Tensor) else [one for value in values for one in value]

        return replace(requests[0], **{name: joined([getattr(one, name) for one in requests]) for name in cls._EACH})

    def given(self) -> set[str]:
        """The names of the conditions that are given. An empty prompt against an empty negative one is none."""
        found = {
            "text": any(self.prompts) or any(self.negatives) or self.prompt_embeds is not None or self.clip_skip > 0,
            "semantic": self.maps is not None,
            "label": self.labels is not None,
            "inpainting": self.canvases is not None,
        }
        return {name for name, there in found.items() if there}


def make_request(
    model: LatentDiffusionModel,
    *,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | None,
    image: ImageInput | None,
    mask_image: ImageInput | None,
    semantic_map: MapInput | None,
    label: LabelInput | None,
    inpainting: InpaintingOptions,
    height: int | None,
    width: int | None,
    repeats: int,
    clip_skip: int | None = None,
) -> Request:
    """Check and complete what the pipeline's call was given. Raises UserError."""
    if prompt_embeds is not None:
        if clip_skip:
            raise UserError(f"clip_skip: found {clip_skip} together with prompt_embeds; allowed is one of them")
        prompt = _stand_in_prompts(model, prompt, prompt_embeds)
    count = max(_length(value) for value in (prompt, image, mask_image, semantic_map, label))
    if isinstance(prompt, str) or len(prompt) == 1:
        prompt = [prompt if isinstance(prompt, str) else prompt[0]] * count
    prompts, negatives = check_prompts(model.text_encoder, prompt, negative_prompt, repeats)

    def each(name: str, value: Any) -> list[Any] | None:
        return None if value is None else _for_each(name, value, len(prompts) // repeats, repeats)

    images, masks = each("image", image), each("mask_image", mask_image)
    images = None if images is None else [_rgb(picture) for picture in images]
    maps = each("semantic_map", semantic_map)
    labels = each("label", label)
    request = Request(prompts, negatives, 0, 0, clip_skip=check_clip_skip(model.text_encoder, clip_skip))
    if prompt_embeds is not None:
        embeds = prompt_embeds.expand(len(prompts) // repeats, -1, -1)
        request = replace(request, prompt_embeds=embeds.repeat_interleave(repeats, dim=0))
    if masks is not None:
        request = _with_canvases(request, model, images, masks, inpainting, height, width)
    else:
        request = _with_size(request, model, images, height, width)
    if maps is not None:
        request = replace(request, maps=_maps(model.semantic_encoder, maps, request, images))
    if labels is not None:
        request = replace(request, labels=_labels(model.label_encoder, labels))
    return request


def _length(value: Any) -> int:
    """How many there are of what a caller gave; 1 for a single one, which serves for all."""
    return len(value) if isinstance(value, list | tuple) else 1


def _for_each(name: str, value: Any, count: int, repeats: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    values = values * count if len(values) == 1 else values
    if len(values) != count:
        raise UserError(f"{name}: found {len(values)} for {count} prompts; allowed is one for all or one for each")
    return [one for one in values for _ in range(repeats)]


def _rgb(picture: object) -> Image.Image:
    """The picture as it is read from a file: transparency on white, 16 bits as 8."""
    if not isinstance(picture, Image.Image):
        raise UserError(f"image: found a {type(picture).__name__}; allowed is a PIL picture, or several in a list")
    with user_input("image"):
        return to_rgb(picture)


def _stand_in_prompts(model: LatentDiffusionModel, prompt: str | Sequence[str], prompt_embeds: Tensor) -> list[str]:
    text = model.text_encoder
    if text is None:
        raise UserError("prompt_embeds: found some; this model has no text encoder; leave them out")
    if prompt_embeds.ndim != 3 or tuple(prompt_embeds.shape[1:]) != (text.length, text.width):
        allowed = f"[prompts, {text.length}, {text.width}]"
        raise UserError(f"prompt_embeds: found shape {list(prompt_embeds.shape)}; allowed is {allowed}")
    if prompt not in ("", [], ()):
        raise UserError("prompt: found together with prompt_embeds; allowed is one of them")
    return [""] * len(prompt_embeds)


def _with_size(
    request: Request,
    model: LatentDiffusionModel,
    images: list[Image.Image] | None,
    height: int | None,
    width: int | None,
) -> Request:
    """The size asked for; else the nearest one to the images' own that the model can draw; else the model's."""
    if images is None:
        height, width = model.resolve_size(height, width)
        return replace(request, height=height, width=width)
    sizes = {one.size for one in images}
    if len(sizes) > 1 and (height is None or width is None):
        raise UserError(f"image: found sizes {sorted(sizes)} in one call; allowed is one; give height and width too")
    own = [nearest_side(side, model.factor) for side in images[0].size[::-1]]
    height, width = model.resolve_size(own[0] if height is None else height, own[1] if width is None else width)
    size = (width, height)
    resized = [one if one.size == size else one.resize(size, Image.Resampling.LANCZOS) for one in images]
    return replace(request, height=height, width=width, images=resized)


def nearest_side(side: int, factor: int) -> int:
    """The nearest number of pixels that the model can draw."""
    return max(1, round(side / factor)) * factor


def _with_canvases(
    request: Request,
    model: LatentDiffusionModel,
    images: list[Image.Image] | None,
    masks: list[Any],
    options: InpaintingOptions,
    height: int | None,
    width: int | None,
) -> Request:
    if images is None:
        raise UserError("mask_image: found a mask without an image; give the image that it belongs to")
    if options.crop_padding is None and (height, width) != (None, None):
        raise UserError(
            "height, width: found a size with a mask, where the picture keeps its own; "
            "leave it out, or set crop_padding to work on the masked region at that size"
        )
    model_size = model.resolve_size(height, width)
    canvases = [
        prepare_canvas(image, mask, options, factor=model.factor, model_size=model_size)
        for image, mask in zip(images, masks, strict=True)
    ]
    for canvas in canvases:
        if canvas.empty:
            logger.warning("mask_image: all black, so the picture comes back as it is; white is repainted")
    sizes = {canvas.image.size for canvas in canvases}
    if len(sizes) > 1:
        raise UserError(f"image: found sizes {sorted(sizes)} in one call; allowed is one size; draw them one by one")
    width, height = canvases[0].image.size
    check_side("height", height, model.factor)
    return replace(request, height=height, width=width, canvases=canvases)


def _maps(
    encoder: SemanticEncoder | None, maps: list[Any], request: Request, images: list[Image.Image] | None
) -> list[Tensor]:
    """Index maps as tensors of the picture's shape; with a picture they are cropped, padded or resized as it is."""
    if encoder is None:
        raise UserError("semantic_map: found a map; this model takes none; use one that was trained with maps")
    result: list[Tensor] = []
    for number, given in enumerate(maps):
        with user_input("semantic_map"):
            arrays = isinstance(given, Tensor | np.ndarray)
            found = torch.as_tensor(given).long() if arrays else read_map(given)  # [H, W]
            if found.ndim != 2:
                raise ValueError(f"found shape {list(found.shape)}; allowed is [height, width]")
            encoder.check(found)
        if request.canvases is not None:
            found = _map_on_canvas(found, request.canvases[number])
        elif images is not None and tuple(found.shape[::-1]) == images[number].size:
            found = _resized_map(found, request)
        elif found.shape[0] * request.width != found.shape[1] * request.height:
            raise UserError(
                f"semantic_map: found {found.shape[1]} x {found.shape[0]} pixels for a picture of {request.width} x "
                f"{request.height}; allowed is the same shape at any size; give --size or crop the map"
            )
        result.append(found)
    return result


def stacked_maps(request: Request) -> Tensor:
    """The maps as one tensor, int64 [N, H, W]; of several sizes they are resized to the picture's."""
    maps = request.maps or []
    alike = len({tuple(one.shape) for one in maps}) == 1
    return torch.stack(maps if alike else [_resized_map(one, request) for one in maps])


def _resized_map(found: Tensor, request: Request) -> Tensor:
    """The nearest pixel's class at the size that is drawn."""
    size = (request.height, request.width)
    return torch.nn.functional.interpolate(found[None, None].double(), size, mode="nearest-exact")[0, 0].long()


def _map_on_canvas(found: Tensor, canvas: Canvas) -> Tensor:
    if tuple(found.shape[::-1]) != canvas.original.size:
        raise UserError(
            f"semantic_map: found {found.shape[1]} x {found.shape[0]} pixels for a picture of "
            f"{canvas.original.width} x {canvas.original.height}; allowed is the picture's size; resize the map"
        )
    part = Image.fromarray(found[window(canvas.box)].numpy().astype(np.uint8))
    part = part.resize(canvas.inner_size, Image.Resampling.NEAREST)
    result = torch.full((canvas.image.height, canvas.image.width), UNKNOWN_CLASS)
    result[: part.height, : part.width] = torch.from_numpy(np.array(part)).long()
    return result


def _labels(encoder: LabelEncoder | None, labels: list[int | str | None]) -> Tensor:
    if encoder is None:
        raise UserError("label: found one; this model takes none; use one that was trained with labels")
    with user_input("label", ValueError, TypeError):
        return torch.tensor([UNKNOWN_LABEL if label is None else encoder.index_of(label) for label in labels])
