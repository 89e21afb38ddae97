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

from ldm.cli.options import DrawingOptions
from ldm.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.pipeline_request import Request

STACKED = ("latents", "prompt_embeds")
"""What the pipeline takes as one tensor for all pictures; of all else it takes a list."""


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
    call: dict[str, Any]
    """What the pipeline is called with."""


def open_model(arguments: argparse.Namespace) -> LatentDiffusionPipeline:
    """The pipeline that `--model`, `--dtype` and `--device` name. Raises UserError."""
    from transformers.utils.logging import disable_progress_bar

    from ldm.interchange.opening import open_pipeline

    disable_progress_bar()  # of loading weights: the bar that people wait for is ours
    loras = [parse_lora(text) for text in arguments.lora]
    return open_pipeline(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        allow_pickle=arguments.allow_pickle,
        loras=loras,
    )


def parse_lora(text: str) -> tuple[Path, float]:
    """`--lora FILE` or `FILE=WEIGHT`. Raises UserError for a file that is missing and a weight that is no number."""
    path, _, weight = text.rpartition("=") if not Path(text).is_file() else (text, "", "1")
    if not Path(path).is_file():
        raise UserError(f"--lora {text}: found no such file; allowed is FILE or FILE=WEIGHT; check the path")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--lora {text}: found the weight {weight!r}; allowed is a number, such as 0.8")
    return Path(path), number


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
        _check_guidance(pipeline, _request(pipeline, first.call), options)
        with tqdm(total=len(pictures) * steps, unit="step", desc="drawing") as bar:
            for indices, call in chain([first], batches):

                def advance(*_: object, count: int = len(indices)) -> None:
                    bar.update(count)

                try:
                    result = pipeline(**call, scheduler=scheduler, callback_on_step_end=advance, **_sampling(options))
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of memory with --batch {options.batch}; give a smaller --batch or --size"
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
    for start in range(0, len(pictures), options.batch):
        groups: dict[tuple[int, int], list[tuple[int, Mapping[str, Any]]]] = {}
        for index in range(start, min(start + options.batch, len(pictures))):
            inputs = pictures[index].inputs()
            request = _request(pipeline, _call([pictures[index]], [inputs], options))
            groups.setdefault((request.height, request.width), []).append((index, inputs))
        for group in groups.values():
            indices = [index for index, _ in group]
            call = _call([pictures[index] for index in indices], [inputs for _, inputs in group], options)
            yield _Batch(indices, call)


def _call(pictures: Sequence[Picture], inputs: Sequence[Mapping[str, Any]], options: DrawingOptions) -> dict[str, Any]:
    """What the pipeline is called with for these pictures, all of which are given the same kinds of inputs."""
    import torch

    from ldm.canvas import InpaintingOptions

    call: dict[str, Any] = {}
    for name in inputs[0]:
        values = [one[name] for one in inputs]
        call[name] = torch.stack(values) if name in STACKED else values
    if "prompt_embeds" not in call:
        call["prompt"] = [picture.prompt for picture in pictures]
    if "generator" not in call:
        call["seed"] = [picture.seed for picture in pictures]
    call["negative_prompt"] = options.negative_prompt
    call["inpainting"] = options.inpainting or InpaintingOptions()
    return call | {"height": options.height, "width": options.width}


def _request(pipeline: LatentDiffusionPipeline, call: Mapping[str, Any]) -> Request:
    """What the pipeline makes of a call: its size and conditions. Raises UserError for what it cannot draw."""
    from ldm.pipeline_request import make_request

    names = ("prompt_embeds", "image", "mask_image", "semantic_map", "label")
    given: dict[str, Any] = {name: call.get(name) for name in names}
    given |= {name: call[name] for name in ("negative_prompt", "inpainting", "height", "width")}
    return make_request(pipeline, prompt=call.get("prompt", ""), repeats=1, **given)


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
