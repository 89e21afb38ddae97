"""What a caller of the pipeline may pass: checked before any work, refused with `UserError`."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence

import torch

from conditioning.text import TextEncoder
from ldm.errors import UserError

logger = logging.getLogger(__name__)


def check_prompts(
    text_encoder: TextEncoder | None,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    repeats: int,
) -> tuple[list[str], list[str]]:
    """The prompt and the negative prompt of every image; logs a warning for one that the text window cuts."""
    if repeats < 1:
        raise UserError(f"num_images_per_prompt: found {repeats}; allowed is 1 or more")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("prompt: found none; allowed is one or more")
    negative_prompt = "" if negative_prompt is None else negative_prompt
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(negatives) != len(prompts):
        found = f"found {len(negatives)} for {len(prompts)} prompts"
        raise UserError(f"negative_prompt: {found}; allowed is one for all or one for each")
    for text in dict.fromkeys([*prompts, *negatives]):
        _check_text(text_encoder, text)
    return [text for text in prompts for _ in range(repeats)], [text for text in negatives for _ in range(repeats)]


def _check_text(text_encoder: TextEncoder | None, text: str) -> None:
    if text_encoder is None:
        if text:
            raise UserError(f"prompt: found {text!r}; this model has no text encoder; allowed is the empty prompt")
        return
    cut = text_encoder.truncated(text)
    if cut:
        logger.warning("prompt longer than the text window of %d tokens; cut off: %r", text_encoder.length, cut)


def check_clip_skip(text_encoder: TextEncoder | None, clip_skip: int | None) -> int:
    """How many blocks the prompt leaves out. Raises UserError for more than the text encoder can spare."""
    if not clip_skip:
        return 0
    most = 0 if text_encoder is None else text_encoder.blocks - 1
    if not 0 < clip_skip <= most:
        reason = "no text encoder" if text_encoder is None else f"a text encoder of {most + 1} blocks"
        raise UserError(f"clip_skip: found {clip_skip}; allowed is 0 to {most}, as the model has {reason}")
    return clip_skip


def check_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | Sequence[int] | None, count: int
) -> tuple[tuple[int, ...] | None, torch.Generator | list[torch.Generator]]:
    """The seeds, None when the caller brought generators, and the generators: one an image or one for all."""
    if generator is None:
        seeds = seeds_from(seed, count)
        return seeds, [torch.Generator().manual_seed(number) for number in seeds]
    if seed is not None:
        raise UserError("seed: found together with generator; allowed is one of them")
    if isinstance(generator, torch.Generator):
        return None, generator
    if len(generator) != count:
        raise UserError(f"generator: found {len(generator)} for {count} images; allowed is one, or one for each image")
    return None, list(generator)


def seeds_from(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The seed of each of `count` images: counted up from `seed`, from a random number if None, or those given."""
    first = secrets.randbelow(2**32) if seed is None else seed
    seeds = tuple(first) if isinstance(first, Sequence) else tuple(range(int(first), int(first) + count))
    if len(seeds) != count:
        raise UserError(f"seed: found {len(seeds)} for {count} images; allowed is one, or one for each image")
    wrong = [number for number in seeds if not 0 <= number < 2**63]
    if wrong:
        raise UserError(f"seed: found {wrong[0]}; allowed is 0 to {2**63 - 1}")
    return seeds


def check_side(what: str, pixels: int, factor: int) -> int:
    """Return `pixels` if it is a positive multiple of `factor`; otherwise the error names the nearest that are."""
    if pixels >= factor and pixels % factor == 0:
        return pixels
    below = max(factor, pixels // factor * factor)
    raise UserError(
        f"{what}: found {pixels}; allowed is a multiple of {factor}; the nearest are {below} and {below + factor}"
    )


def batches(count: int, batch_size: int | None) -> Iterator[slice]:
    """Slices of at most `batch_size` that cover `count`; None means one slice for all."""
    size = count if batch_size is None else batch_size
    if size < 1:
        raise UserError(f"batch_size: found {size}; allowed is 1 or more")
    return (slice(first, min(first + size, count)) for first in range(0, count, size))
