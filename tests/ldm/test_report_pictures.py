"""The pictures of a report: drawn once, gone on with, shared out; other settings are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from PIL import Image

from ldm.data.share import Share
from ldm.errors import UserError
from ldm.evaluation.report_data import Told
from ldm.evaluation.report_pictures import PictureFolder
from ldm.picture import read_parameters

SETTINGS = {"model": "abc", "steps": 2, "guidance": 4.0, "scheduler": "ddim"}
TOLD = [Told(prompt=f"prompt {i % 3}", seed=i) for i in range(7)]


class Drawer:
    """Draws a picture of a colour that is the seed, and remembers what it was asked for."""

    def __init__(self, stop_after: int = 100) -> None:
        self.seeds: list[int] = []
        self._left = stop_after

    def __call__(self, told: Sequence[Told]) -> list[Image.Image]:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        self.seeds += [one.seed for one in told]
        return [Image.new("RGB", (4, 4), (one.seed, 0, 0)) for one in told]


def draw(folder: Path, drawer: Drawer, told: Sequence[Told] = TOLD, share: Share | None = None) -> PictureFolder:
    pictures = PictureFolder(folder)
    pictures.claim(SETTINGS)
    pictures.draw(told, drawer, 2, share or Share(), SETTINGS)
    return pictures


def test_a_second_start_draws_only_what_is_missing(tmp_path: Path) -> None:
    killed = Drawer(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "images", killed)
    assert killed.seeds == [0, 1, 2, 3]
    again = Drawer()
    pictures = draw(tmp_path / "images", again)
    assert again.seeds == [4, 5, 6]
    assert [pictures.picture(one).getpixel((0, 0)) for one in TOLD] == [(i, 0, 0) for i in range(7)]
    none = Drawer()
    draw(tmp_path / "images", none)
    assert none.seeds == []
    more = Drawer()
    draw(tmp_path / "images", more, [*TOLD, Told(prompt="new", seed=7)])
    assert more.seeds == [7]


def test_a_picture_is_drawn_anew_when_it_is_told_something_else(tmp_path: Path) -> None:
    draw(tmp_path / "images", Drawer())
    changed = [Told(prompt="another", seed=2), Told(prompt="prompt 0", seed=3, label=1)]
    again = Drawer()
    draw(tmp_path / "images", again, [*changed, TOLD[0]])
    assert again.seeds == [2, 3]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_other_settings_are_refused_by_name(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "images", Drawer())
    with pytest.raises(UserError, match=rf"^{name}: found other, .* drawn with {SETTINGS[name]}; "):
        PictureFolder(tmp_path / "images").claim({**SETTINGS, name: "other"})


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="none of ours"):
        PictureFolder(tmp_path).claim(SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]


def test_processes_share_the_pictures_out_and_draw_each_once(tmp_path: Path) -> None:
    pictures = PictureFolder(tmp_path / "images")
    pictures.claim(SETTINGS)
    drawers, barrier = [Drawer(), Drawer()], Barrier(2, timeout=30)

    def process(rank: int) -> int:
        return pictures.draw(TOLD, drawers[rank], 2, Share(rank, 2, lambda: barrier.wait() and None), SETTINGS)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(process, range(2))) == [4, 3]
    assert [drawer.seeds for drawer in drawers] == [[0, 2, 4, 6], [1, 3, 5]]
    assert pictures.missing(TOLD) == []


def test_pictures_are_read_as_images_and_say_how_they_were_made(tmp_path: Path) -> None:
    pictures = draw(tmp_path / "images", Drawer())
    batches = list(pictures.batches(TOLD, 4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 4, 4), (3, 3, 4, 4)]
    torch.testing.assert_close(torch.cat(batches)[:, 0, 0, 0], torch.arange(7) / 127.5 - 1)
    words = str(read_parameters(pictures.path(TOLD[5])))
    assert words.startswith("prompt 2\n") and "Seed: 5" in words and "CFG scale: 4" in words


def test_removing_takes_our_files_alone(tmp_path: Path) -> None:
    pictures = draw(tmp_path / "images" / "guidance-4", Drawer())
    (tmp_path / "images" / "guidance-4" / "note.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "images" / "guidance-4" / ".000001-0123456789.png.77.part").write_text("", encoding="utf-8")
    pictures.remove()
    assert [path.name for path in (tmp_path / "images" / "guidance-4").iterdir()] == ["note.txt"]
    (tmp_path / "images" / "guidance-4" / "note.txt").unlink()
    draw(tmp_path / "images" / "guidance-4", Drawer()).remove()
    assert not (tmp_path / "images").exists()
