"""The loop of all drawing commands: batches, a progress bar, and what the model cannot do refused before it."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.cli.memory import opening_device, save_memory
from ldm.cli.options import DrawingOptions
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.pipeline_request import Request


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to draw.

    Attributes:
        inputs: makes what the pipeline is given for it besides prompt and seed: its image, mask, map, label, generator
            or, without the batch dimension, latents and prompt_embeds. With the latter the prompt is for the file only.
        facts: what its file says besides what all files say.
    """

    prompt: str
    seed: int
    inputs: Callable[[], Mapping[str, Any]] = dict
    facts: Mapping[str, object] = field(default_factory=dict)


class _Batch(NamedTuple):
    indices: list[int]
    """Which of the pictures."""
    request: Request
    begins: dict[str, Any]
    """Seeds, generators, noise, as `LatentDiffusionPipeline.draw` takes them."""


def open_model(arguments: argparse.Namespace) -> LatentDiffusionPipeline:
    """The pipeline that `--model`, `--dtype`, `--device` and the options of memory name. Raises UserError."""
    from transformers.utils.logging import disable_progress_bar

    from ldm.interchange.opening import open_pipeline

    disable_progress_bar()  # of loading weights: the bar that people wait for is ours
    loras = [parse_lora(text) for text in arguments.lora]
    device, dtype = opening_device(arguments)
    pipeline = open_pipeline(
        arguments.model,
        dtype=dtype,
        device=device,
        allow_pickle=arguments.allow_pickle,
        variant=arguments.variant,
        vae=arguments.vae,
        loras=loras,
        embeddings=[parse_embedding(text) for text in arguments.embedding],
    )
    save_memory(pipeline, arguments)
    return pipeline


def parse_lora(text: str) -> tuple[Path, float]:
    """`--lora PATH` or `PATH=WEIGHT`, of a file or a run. Raises UserError for what is missing or no number."""
    path, _, weight = text.rpartition("=") if not Path(text).exists() else (text, "", "1")
    if not path or not Path(path).exists():
        raise UserError(f"--lora {text}: found no such file; allowed is PATH or PATH=WEIGHT; check the path")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--lora {text}: found the weight {weight!r}; allowed is a number, such as 0.8")
    return Path(path), number


def parse_embedding(text: str) -> tuple[Path, str | None]:
    """`--embedding PATH` or `PATH=WORD`, of a file or a run. Raises UserError for what is missing."""
    path, _, word = text.rpartition("=") if not Path(text).exists() else (text, "", "")
    if not path or not Path(path).exists():
        raise UserError(f"--embedding {text}: found no such file; allowed is PATH or PATH=WORD; check the path")
    return Path(path), word or None


def noise_of(pipeline: LatentDiffusionPipeline, seed: int, options: DrawingOptions) -> tuple[Tensor, torch.Generator]:
    """The noise [C, h, w] from which `seed` is drawn, and the generator as it then is, for stochastic schedulers."""
    import torch

    from autoencoder.model import latent_channels

    height, width = pipeline.resolve_size(options.height, options.width)
    generator = torch.Generator().manual_seed(seed)
    shape = (latent_channels(pipeline.vae), height // pipeline.factor, width // pipeline.factor)
    return torch.randn(*shape, generator=generator), generator


def draw(
    pipeline: LatentDiffusionPipeline,
    pictures: Sequence[Picture],
    options: DrawingOptions,
    finished: Callable[[int, Image.Image], None],
) -> None:
    """Draw all pictures batch by batch; `finished` gets each with its index as soon as its batch is done.

    What the model cannot do is refused before the progress bar appears. Raises UserError.
    """
    import torch
    from tqdm import tqdm

    scheduler = pipeline.make_scheduler(options.scheduler)
    batches = _batches(pipeline, pictures, options)
    told = False
    with _tidy_warnings():
        first = next(batches)
        steps = _steps(scheduler, options)
        _check_guidance(pipeline, first.request, options)
        with tqdm(total=len(pictures) * steps, unit="step", desc="drawing") as bar:
            for indices, request, begins in chain([first], batches):

                def advance(*_: object, count: int = len(indices)) -> None:
                    bar.update(count)

                try:
                    result = pipeline.draw(
                        request,
                        **begins,
                        scheduler=scheduler,
                        callback_on_step_end=advance,
                        **_sampling(options),
                    )
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of memory with --batch {options.batch}; give a smaller --batch or --size, or "
                        "--vae-slicing, --vae-tiling or --offload"
                    ) from error
                if result.inpainting is not None and not told:
                    bar.write(f"inpainting by {result.inpainting}", file=sys.stderr)
                    told = True
                for index, image in zip(indices, result.images, strict=True):
                    finished(index, image)


def _batches(
    pipeline: LatentDiffusionPipeline, pictures: Sequence[Picture], options: DrawingOptions
) -> Iterator[_Batch]:
    """The pictures in order; among `--batch` of them those of one size are drawn together."""
    from ldm.pipeline_request import Request

    for start in range(0, len(pictures), options.batch):
        some = pictures[start : start + options.batch]
        inputs = [picture.inputs() for picture in some]
        requests = [_request(pipeline, *one, options) for one in zip(some, inputs, strict=True)]
        sizes = [(request.height, request.width) for request in requests]
        for size in dict.fromkeys(sizes):
            chosen = [number for number, other in enumerate(sizes) if other == size]
            begins = _begins([some[number] for number in chosen], [inputs[number] for number in chosen])
            request = Request.join([requests[number] for number in chosen])
            yield _Batch([start + number for number in chosen], request, begins)


def _request(
    pipeline: LatentDiffusionPipeline, picture: Picture, inputs: Mapping[str, Any], options: DrawingOptions
) -> Request:
    """One picture with its size and conditions. Raises UserError for what the model cannot draw."""
    from ldm.canvas import InpaintingOptions
    from ldm.pipeline_request import make_request

    embeds = inputs.get("prompt_embeds")
    given: dict[str, Any] = {name: inputs.get(name) for name in ("image", "mask_image", "semantic_map", "label")}
    return make_request(
        pipeline,
        prompt=picture.prompt if embeds is None else "",
        negative_prompt=options.negative_prompt,
        prompt_embeds=None if embeds is None else embeds[None],
        clip_skip=options.clip_skip if embeds is None else None,
        inpainting=options.inpainting or InpaintingOptions(),
        height=options.height,
        width=options.width,
        repeats=1,
        **given,
    )


def _begins(pictures: Sequence[Picture], inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the pictures are drawn from: their seeds, or generators, and the noise where it is given."""
    import torch

    found: dict[str, Any] = {"seed": [picture.seed for picture in pictures]}
    if "generator" in inputs[0]:
        found = {"generator": [one["generator"] for one in inputs]}
    if "latents" in inputs[0]:
        found["latents"] = torch.stack([one["latents"] for one in inputs])  # [N, C, h, w]
    return found


def _sampling(options: DrawingOptions) -> dict[str, Any]:
    names = ("num_inference_steps", "guidance_scale", "guidance", "strength")
    return {name: getattr(options, name) for name in names}


def _steps(scheduler: Any, options: DrawingOptions) -> int:
    """How often the scheduler steps for each picture."""
    from ldm.sampling import set_timesteps, starting_step

    steps = len(set_timesteps(scheduler, options.num_inference_steps))
    left_out = starting_step(options.num_inference_steps, 1.0 if options.strength is None else options.strength)
    return steps - left_out * getattr(scheduler, "order", 1)


def _check_guidance(pipeline: LatentDiffusionPipeline, request: Request, options: DrawingOptions) -> None:
    """Refuse scales of conditions that are not given; with `--verbose` print the scales and what they cost."""
    from ldm.guidance import needed_predictions, resolve_scales

    scales = resolve_scales(options.guidance_scale, request.given() & set(pipeline.conditions))
    if not options.verbose:
        return
    low, high = options.guidance.interval
    outside = "" if (low, high) == (0, 1) else f" for noise levels of {low:g} to {high:g}, 1 elsewhere"
    evaluations = len(needed_predictions(list(scales.values()), options.guidance))
    named = ", ".join(f"{name} {scale:g}" for name, scale in scales.items()) or "none, as no condition is given"
    print(f"guidance scales: {named}", file=sys.stderr)
    print(f"evaluations of the network per step: {evaluations}{outside}", file=sys.stderr)


class _Once(logging.Filter):
    """Lets each message pass once: a prompt that is cut is cut in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        if message in self.seen:
            return False
        self.seen.add(message)
        return True


@contextmanager
def _tidy_warnings() -> Iterator[None]:
    """Inside, the pipeline's warnings appear above the bar, and each once."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ldm.pipeline_inputs import logger

    once = _Once()
    logger.addFilter(once)
    try:
        with logging_redirect_tqdm([logging.getLogger("ldm")]):
            yield
    finally:
        logger.removeFilter(once)
