"""Class images of prior preservation: drawn once, by whom, refused when drawn otherwise, joined with the data."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.folder import FolderSource
from ldm.errors import UserError
from ldm.picture import read_parameters
from ldm.randomness import derive_seed
from ldm.training.prior import Artist, PriorConfig, draw_missing, even_repeats, with_prior
from ldm.training.run import Run

CONFIG = PriorConfig(prompts=("a dog", "a cat"), count=5, batch_size=2, num_inference_steps=7)


class StopHereError(Exception):
    """Stands for a kill."""


@dataclass
class Painter:
    """Stands for the pipeline: the picture's colour is the seed's. Stops after `last` pictures."""

    last: int = 1000
    drawn: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, prompts: list[str], *, seed: list[int], height: int, width: int, **settings: Any) -> Any:
        assert settings == {"num_inference_steps": 7, "guidance_scale": 5.0, "scheduler": "ddim"}
        self.drawn += zip(prompts, seed, strict=True)
        if len(self.drawn) > self.last:
            raise StopHereError
        return SimpleNamespace(images=[Image.new("RGB", (width, height), colour(number)) for number in seed])


def colour(seed: int) -> tuple[int, int, int]:
    return seed % 251, seed % 241, seed % 239


def artist(painter: Painter, weights: str = "w") -> Artist:
    return Artist(lambda: painter, model="runs/base", weights=weights, scheduler="ddim", side=8)  # type: ignore[arg-type, return-value]


def run_in(
    folder: Path, rank: int = 0, processes: int = 1, seed: int = 3, wait: Callable[[], object] = lambda: None
) -> Run:
    accelerator = SimpleNamespace(
        process_index=rank,
        num_processes=processes,
        is_main_process=rank == 0,
        wait_for_everyone=wait,
        autocast=nullcontext,
    )
    return Run(folder, seed, accelerator, None)  # type: ignore[arg-type]


def draw(folder: Path, config: PriorConfig = CONFIG, painter: Painter | None = None, **of_run: Any) -> int:
    return draw_missing(folder, config, artist(painter or Painter()), run_in(folder.parent, **of_run))


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_the_images_depend_on_seed_and_index_and_are_an_ordinary_folder(tmp_path: Path) -> None:
    assert draw(tmp_path / "prior") == 5
    source = FolderSource(tmp_path / "prior")
    captions = ["a dog", "a cat", "a dog", "a cat", "a dog"]
    assert [source.read(index).captions for index in range(len(source))] == [(caption,) for caption in captions]
    for index in range(5):
        seed = derive_seed(3, "prior", index)
        assert np.asarray(source.read(index).image)[0, 0].tolist() == list(colour(seed))
        made = str(read_parameters(tmp_path / "prior" / f"{index:06d}.png"))
        assert made.startswith(captions[index])
        assert f"Seed: {seed}" in made


def test_drawing_goes_on_where_it_was_stopped_and_happens_once(tmp_path: Path) -> None:
    draw(tmp_path / "straight")
    with pytest.raises(StopHereError):
        draw(tmp_path / "stopped", painter=Painter(last=3))
    assert sorted(pictures(tmp_path / "stopped")) == ["000000.png", "000001.png"]
    rest = Painter()
    assert draw(tmp_path / "stopped", replace(CONFIG, batch_size=3), rest) == 3
    assert [seed for _, seed in rest.drawn] == [derive_seed(3, "prior", index) for index in (2, 3, 4)]
    assert pictures(tmp_path / "stopped") == pictures(tmp_path / "straight")
    fingerprint = FolderSource(tmp_path / "stopped").fingerprint
    assert draw(tmp_path / "stopped", painter=Painter(last=0)) == 0
    assert FolderSource(tmp_path / "stopped").fingerprint == fingerprint  # untouched, so cached latents still hold
    (tmp_path / "stopped" / "000001.png").unlink()
    assert draw(tmp_path / "stopped") == 1
    assert draw(tmp_path / "stopped", replace(CONFIG, count=7)) == 2
    assert len(FolderSource(tmp_path / "stopped")) == 7


def test_processes_share_the_drawing_and_draw_the_same(tmp_path: Path) -> None:
    draw(tmp_path / "alone")
    painters, wait = [Painter(), Painter()], threading.Barrier(2).wait
    with ThreadPoolExecutor(2) as pool:  # threads in place of processes: they really wait for each other
        both = [
            pool.submit(draw, tmp_path / "shared", CONFIG, painters[i], rank=i, processes=2, wait=wait) for i in (0, 1)
        ]
        assert [one.result(timeout=60) for one in both] == [5, 5]
    assert [len(painter.drawn) for painter in painters] == [3, 2]
    assert pictures(tmp_path / "shared") == pictures(tmp_path / "alone")


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"prompts": ("a dog",)}, "w", "were drawn with prompts = ['a dog', 'a cat'], this run has ['a dog']"),
        ({"num_inference_steps": 8}, "w", "were drawn with num_inference_steps = 7, this run has 8"),
        ({"guidance_scale": 1.0}, "w", "were drawn with guidance_scale = 5.0, this run has 1.0"),
        ({"scheduler": "euler"}, "w", "were drawn with scheduler = ddim, this run has euler"),
        ({}, "v", "were drawn with the weights of runs/base, this run has others"),
        ({"prompts": ()}, "w", "prior.prompts: found none"),
        ({"prompts": "a dog"}, "w", "prior.prompts: found no file 'a dog'; allowed is a file with one prompt a line"),
    ],
)
def test_images_that_were_drawn_otherwise_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], weights: str, message: str
) -> None:
    draw(tmp_path / "prior")
    before = pictures(tmp_path / "prior")
    with pytest.raises(UserError) as error:
        draw_missing(tmp_path / "prior", replace(CONFIG, **changes), artist(Painter(), weights), run_in(tmp_path))
    assert message in str(error.value)
    assert pictures(tmp_path / "prior") == before


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    draw(tmp_path / "prior")
    with pytest.raises(UserError, match="drawn with seed = 3, this run has 4"):
        draw(tmp_path / "prior", seed=4)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n  a cat  \n", encoding="utf-8")
    draw(tmp_path / "list")
    draw(tmp_path / "file", replace(CONFIG, prompts=str(tmp_path / "prompts.txt")))
    assert pictures(tmp_path / "file") == pictures(tmp_path / "list")


def test_images_of_ones_own_are_taken_as_they_are_and_joined(tmp_path: Path) -> None:
    for name, count in (("data", 2), ("dogs", 7)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    config = PriorConfig(folder=str(tmp_path / "dogs"), weight=0.5)
    joined = with_prior(FolderSource(tmp_path / "data"), config, artist(Painter(last=0)), run_in(tmp_path))
    assert len(joined) == 4 * 2 + 7
    weights = [joined.read(index).weight for index in range(len(joined))]
    assert weights == [1.0] * 8 + [0.5] * 7
    assert not (tmp_path / "dogs" / "prior.json").exists()


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_both_parts_are_about_half(count: int, prior: int) -> None:
    often, prior_often = even_repeats(count, prior)
    share = count * often / (count * often + prior * prior_often)
    assert 0.4 - 1e-9 <= share <= 0.6 + 1e-9
    assert 1 in (often, prior_often)
    if prior % count == 0:
        assert share == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"weight": 0}, "weight: found 0"), ({"count": 0}, "count: found 0"), ({"batch_size": 0}, "batch_size: found 0")],
)
def test_the_config_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**changes)


def test_the_header_says_what_drew_them(tmp_path: Path) -> None:
    draw(tmp_path / "prior")
    header = json.loads((tmp_path / "prior" / "prior.json").read_text(encoding="utf-8"))
    assert (header["model"], header["weights"], header["resolution"]) == ("runs/base", "w", 8)
