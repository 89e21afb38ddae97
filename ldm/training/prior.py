"""Prior preservation (DreamBooth, Ruiz et al. 2023, arXiv 2208.12242): class images beside one's own.

A model that is trained on a few images of one thing forgets its class, and the rest. So it first draws images of the
class itself; they come as often as one's own, with their own weight in the loss (equation 2 of the paper).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.data.combined import CombinedSource, Part
from ldm.data.folder import FolderSource
from ldm.data.sample import Source
from ldm.errors import UserError, user_input
from ldm.files import write_text
from ldm.picture import parameters_text, save_png
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_inputs import batches
from ldm.randomness import derive_seed
from ldm.training.run import Run

HEADER = "prior.json"
"""How a folder's images were drawn. A folder without it holds images of one's own."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Images of the class, which the model itself draws before it is trained.

    `prompts` is a list or a text file with one a line; image i is of prompt i modulo their number. `weight` is the
    factor of the loss of class images, lambda in the paper. `folder` null is `prior/` in the run folder; a folder that
    holds other images is taken as it is, and nothing is drawn. `scheduler` null is that of the previews.
    """

    prompts: tuple[str, ...] | str = ()
    count: int = 200
    weight: float = 1.0
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    scheduler: str | None = None
    batch_size: int = 4  # images drawn at once
    folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("count", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}; allowed is 1 or more; raise it")
        if not self.weight > 0:
            raise ValueError(f"weight: found {self.weight}; allowed is above 0; leave prior out to do without")


@dataclass(frozen=True)
class Artist:
    """What draws the class images: the model as it was before training.

    Attributes:
        pipeline: gives that model; called only if there is something to draw.
        model, weights: its name, and a hash of its weights.
        scheduler: the one to draw with if the config names none.
        side: pixels.
    """

    pipeline: Callable[[], LatentDiffusionPipeline]
    model: str
    weights: str
    scheduler: str
    side: int


def with_prior(source: Source, config: PriorConfig, artist: Artist, run: Run) -> Source:
    """`source` and the class images as one, the smaller of them repeated so that both come about equally often.

    Images that are not there yet are drawn first, by all processes together; call it on all. Raises `UserError` for a
    folder whose images were drawn otherwise.
    """
    folder = Path(config.folder) if config.folder else run.folder / "prior"
    own = folder.is_dir() and any(folder.iterdir()) and not (folder / HEADER).exists()
    drawn = 0 if own else draw_missing(folder, config, artist, run)
    images = FolderSource(folder)
    often, prior_often = even_repeats(len(source), len(images))
    run.say(
        f"prior: {len(images)} class images in {folder}, {'your own' if own else f'{drawn} of them drawn now'}; "
        f"in an epoch they come {prior_often} x, the data's {len(source)} images {often} x"
    )
    return CombinedSource([Part(source, often), Part(images, prior_often, config.weight)])


def even_repeats(count: int, prior: int) -> tuple[int, int]:
    """How often `count` images and `prior` class images come in an epoch, to be about half of it each."""
    return max(1, round(prior / count)), max(1, round(count / prior))


def draw_missing(folder: Path, config: PriorConfig, artist: Artist, run: Run) -> int:
    """Draw those of the class images that are not in `folder`; returns how many. Each depends on (seed, index) alone.

    A picture's name appears when it is whole, so drawing goes on where it was stopped.
    """
    accelerator = run.accelerator
    prompts = read_prompts(config)
    header: dict[str, Any] = {
        "prompts": list(prompts),
        "weights": artist.weights,
        "seed": run.seed,
        "resolution": artist.side,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "scheduler": config.scheduler or artist.scheduler,
    }
    _check_header(folder, header)
    missing = [index for index in range(config.count) if not (folder / _name(index)).is_file()]
    accelerator.wait_for_everyone()  # until all have looked, nobody writes
    if accelerator.is_main_process and not (folder / HEADER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / HEADER, json.dumps({"model": artist.model, **header}, indent=2, ensure_ascii=False) + "\n")
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        _draw(folder, mine, prompts, config, header["scheduler"], artist, run)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_metadata(folder, [prompts[index % len(prompts)] for index in range(config.count)])
    accelerator.wait_for_everyone()
    return len(missing)


def read_prompts(config: PriorConfig) -> tuple[str, ...]:
    """The prompts of the config or its file. Raises `UserError` if there are none."""
    prompts = config.prompts
    if isinstance(prompts, str):
        file = Path(prompts)
        if not file.is_file():
            raise UserError(
                f"prior.prompts: found no file {prompts!r}; allowed is a file with one prompt a line, or a list; "
                f"to mean a prompt, write [{prompts}]"
            )
        with user_input(f"prior.prompts {file}"):
            prompts = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not prompts:
        raise UserError(
            "prior.prompts: found none; allowed are one or more, such as [a photo of a dog]; give them, or a "
            "prior.folder that holds images of your own"
        )
    return prompts


def _check_header(folder: Path, header: dict[str, Any]) -> None:
    path = folder / HEADER
    if not path.exists():
        return
    with user_input(str(path)):
        found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in header.items():
        if found.get(name) != value:
            old = f"the weights of {found.get('model')}" if name == "weights" else f"{name} = {found.get(name)}"
            new = "others" if name == "weights" else value
            raise UserError(
                f"prior.folder {folder}: its images were drawn with {old}, this run has {new}; delete the folder to "
                f"draw them anew, name another one, or delete {HEADER} in it to take them as they are"
            )


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _draw(
    folder: Path,
    indices: Sequence[int],
    prompts: Sequence[str],
    config: PriorConfig,
    scheduler: str,
    artist: Artist,
    run: Run,
) -> None:
    """Draw this process's share."""
    pipeline = artist.pipeline()
    bar = tqdm(total=len(indices), desc="class images", unit="image", disable=not run.accelerator.is_main_process)
    with bar, run.accelerator.autocast():
        for part in batches(len(indices), config.batch_size):
            places = indices[part]
            texts = [prompts[index % len(prompts)] for index in places]
            seeds = [derive_seed(run.seed, "prior", index) for index in places]
            images = pipeline(
                texts,
                seed=seeds,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                scheduler=scheduler,
                height=artist.side,
                width=artist.side,
            ).images
            for index, text, seed, image in zip(places, texts, seeds, images, strict=True):
                made = parameters_text(
                    text,
                    "",
                    steps=config.num_inference_steps,
                    sampler=scheduler,
                    guidance_scale=config.guidance_scale,
                    seed=seed,
                    size=image.size,
                    model=artist.model,
                )
                save_png(image, folder / _name(index), made)
            bar.update(len(places))


def _write_metadata(folder: Path, captions: Sequence[str]) -> None:
    """List the images with their captions. A list that is right already is left alone: its date tells the data's."""
    rows = [{"file_name": _name(index), "text": caption} for index, caption in enumerate(captions)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = folder / "metadata.jsonl"
    with user_input(str(path)):
        same = path.is_file() and path.read_text(encoding="utf-8") == text
    if not same:
        write_text(path, text)
