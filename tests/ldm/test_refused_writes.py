"""A full or read-only disk at every write: one line and exit code 2, the state before whole, and the next try works.

The first file operation of a write is refused, then the second, and so on until it comes through; and no file may grow
beyond some size, a real limit of the system (setrlimit(2)), for every size until it fits.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from autoencoder.model import AutoencoderConfig, build_autoencoder
from ldm import files
from ldm.cli.entry import run_command
from ldm.data.latent_cache import cached_latents
from ldm.data.latent_encoding import CacheConfig
from ldm.data.scenes import ScenesConfig
from ldm.data.share import Share
from ldm.data.sources import DataConfig, open_source
from ldm.interchange.embedding_file import Embedding, read_embedding, save_embedding
from ldm.interchange.model_card import write_model_card
from ldm.interchange.single_file_writer import write_single_file
from ldm.lora_files import Lora, LoraInfo, LoraLayer, save_lora
from ldm.noise import NoiseConfig
from ldm.picture import save_png
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components, new_pipeline, write_parts
from ldm.training.checkpoint import CheckpointFolder
from ldm.training.tracking import Tracking
from ldm.training.watch import Watch

REFUSED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Refuses file operations through Python's audit events (PEP 578); a hook cannot be taken away, so it sleeps."""

    def __init__(self) -> None:
        self.place = ""
        self.left: int | None = None
        self.error, self.forever = errno.ENOSPC, False
        sys.addaudithook(self._hook)

    def operation(self, path: object) -> None:
        """Count one, and raise if it is the one to refuse or comes after it."""
        if self.left is None or self.place not in str(path):
            return
        if self.left == 0:
            if not self.forever:
                self.left = None
            raise OSError(self.error, os.strerror(self.error), str(path))
        self.left -= 1

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.left is None or event not in REFUSED:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        self.operation(arguments[0])

    @contextmanager
    def refusing(self, number: int, place: Path, *, read_only: bool) -> Iterator[None]:
        """Inside, operation `number` (from 0) below `place` fails; with `read_only` all after it too."""
        self.place, self.left, self.forever = str(place), number, read_only
        self.error = errno.EROFS if read_only else errno.ENOSPC
        try:
            yield
        finally:
            self.left = None


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    disk, patch = Disk(), pytest.MonkeyPatch()
    sync, exchange = files.sync, files._exchange
    patch.setattr(files, "sync", lambda path: (disk.operation(path), sync(path))[1])
    patch.setattr(files, "_exchange", lambda one, other: (disk.operation(one), exchange(one, other))[1])
    yield disk
    patch.undo()


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Case:
    """Something that is written over an older state; `write` and `read` know the states "old" and "new"."""

    write: Callable[[str], object]
    read: Callable[[], str]


def marked(state: str) -> float:
    return float(state == "new")


def checkpoint(folder: Path) -> Case:
    place = CheckpointFolder(folder, keep=1)

    def write(state: str) -> None:
        place.save(2 if state == "new" else 1, {"unet": {"weight": torch.full((500,), marked(state))}}, {})

    def read() -> str:
        found = place.latest()
        assert found is not None and found.tensors["unet"]["weight"].mean() == found.step - 1
        return "new" if found.step == 2 else "old"

    return Case(write, read)


def best_checkpoint(folder: Path) -> Case:
    def watch() -> Watch:
        return Watch(folder, every=1, metric="psnr")

    def write(state: str) -> None:
        one = watch()
        one._numbers = {"psnr": 10 + marked(state)}
        one.keep(2 if state == "new" else 1, {"unet": {"weight": torch.full((500,), marked(state))}}, {})

    def read() -> str:
        best = watch().best()
        assert best is not None
        return "new" if best.step == 2 else "old"

    return Case(write, read)


def cache(folder: Path) -> Case:
    config = DataConfig(source="scenes", resolution=16, scenes=ScenesConfig(count=4, objects=("circle",)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_autoencoder(AutoencoderConfig(channels=(4, 4), layers_per_block=1, norm_groups=2))

    def of(state: str) -> DataConfig:
        return replace(config, flip=state == "new")

    def write(state: str) -> None:
        build, source = CacheConfig(workers=0), open_source(of(state))
        cached_latents(folder / state, source, of(state), network, build, Share())

    def read() -> str:
        for state in ("new", "old"):
            if (folder / state).exists():
                assert cached_latents(
                    folder / state, open_source(of(state)), of(state), network, CacheConfig(workers=0), Share()
                ).read(3, False)[0].isfinite().all()  # fmt: skip
                return state
        raise AssertionError("the old cache has gone")

    return Case(write, read)


def sample(folder: Path) -> Case:
    def write(state: str) -> None:
        save_png(Image.new("RGB", (40, 40), (round(marked(state)), 0, 0)), folder / "step-1.png", f"made {state}")

    def read() -> str:
        with Image.open(folder / "step-1.png") as image:
            assert image.getpixel((39, 39)) == (round(marked(image.info["parameters"][5:])), 0, 0)
            return image.info["parameters"][5:]

    return Case(write, read)


def log(folder: Path) -> Case:
    """metrics.jsonl and TensorBoard, closed as the loop closes them."""
    path = folder / "metrics.jsonl"

    def write(state: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=str(folder))
        start = 3 if state == "new" else 0
        with Tracking(accelerator, folder, start) as tracking:
            for step in range(start, start + 3):
                tracking.numbers(step, {"loss": 1.0})
            tracking.picture(start, "samples", torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())

    def read() -> str:
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        steps = [json.loads(line)["step"] for line in whole]
        assert steps[:3] == [0, 1, 2] and steps == list(range(len(steps)))
        return "new" if len(steps) == 6 else "old"

    return Case(write, read)


@pytest.fixture(scope="module")
def parts(make_pipeline: Callable[..., LatentDiffusionPipeline]) -> Components:
    pipe = make_pipeline(NoiseConfig(schedule="scaled_linear"), "ddim")
    return Components(pipe.vae, pipe.unet, pipe.noise_scheduler, pipe.text_encoder)


def weight_of(parts: Components, state: str) -> Components:
    with torch.no_grad():
        parts.unet.conv_in.bias.fill_(marked(state))
    return parts


def exported_folder(folder: Path, parts: Components) -> Case:
    place = folder / "model"

    def write(state: str) -> None:
        with new_pipeline(place) as partial:
            write_parts(replace(weight_of(parts, state), text_encoder=None), partial)
            write_model_card(partial, name="model", title=state, run=folder)

    def read() -> str:
        state = "new" if load_file(place / "unet/diffusion_pytorch_model.safetensors")["conv_in.bias"].any() else "old"
        assert f"# {state}\n" in (place / "README.md").read_text()
        assert {path.name for path in place.iterdir()} == {"unet", "vae", "scheduler", "model_index.json", "README.md"}
        return state

    return Case(write, read)


def exported_file(folder: Path, parts: Components) -> Case:
    path = folder / "model.safetensors"

    def read() -> str:
        return "new" if load_file(path)["model.diffusion_model.input_blocks.0.0.bias"].any() else "old"

    return Case(lambda state: write_single_file(weight_of(parts, state), path), read)


def lora(folder: Path) -> Case:
    def write(state: str) -> None:
        layer = LoraLayer(torch.full((2, 4), marked(state)), torch.zeros(4, 2), 2.0, "")
        save_lora(folder / "lora.safetensors", Lora({"conv": layer}, {}, LoraInfo(title=state)))

    def read() -> str:
        return "new" if load_file(folder / "lora.safetensors")["unet.conv.lora_A.weight"].any() else "old"

    return Case(write, read)


def word(folder: Path) -> Case:
    path = folder / "word.safetensors"

    def read() -> str:
        return "new" if read_embedding(path).vectors.any() else "old"

    return Case(lambda state: save_embedding(path, Embedding("<w>", torch.full((1, 8), marked(state)))), read)


SMALL = {one.__name__: one for one in (checkpoint, best_checkpoint, cache, sample, log, lora, word)}
MODELS = {one.__name__: one for one in (exported_folder, exported_file)}


def case_of(name: str, folder: Path, parts: Components) -> Case:
    folder.mkdir()
    return SMALL[name](folder) if name in SMALL else MODELS[name](folder, parts)


def refused(write: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether `write` ends as a command does that meets a disk that refuses: code 2 and one line."""
    capsys.readouterr()
    code = run_command("ldm", lambda: (write(), 0)[1])
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line and "image" not in line]  # but for the cache's bar
    if code == 0:
        assert not lines
        return False
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("ldm: "), lines
    assert any(reason in lines[0] for reason in ("No space left", "Read-only file system", "File too large")), lines
    return True


@pytest.mark.parametrize("read_only", [False, True], ids=["full", "read-only"])
@pytest.mark.parametrize(
    ("name", "each"),
    [
        *((name, 1) for name in SMALL),
        ("exported_folder", 11),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in MODELS),
    ],
)
def test_every_file_operation_refused(
    name: str,
    each: int,
    read_only: bool,
    disk: Disk,
    parts: Components,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hook, tried = threading.excepthook, 0
    for number in count(step=each):
        place = tmp_path / str(number)
        case = case_of(name, place, parts)
        case.write("old")
        with disk.refusing(number, place, read_only=read_only):
            stopped = refused(lambda case=case: case.write("new"), capsys)
            reached = disk.left is None or disk.left == 0
        found = case.read()
        if not reached:
            assert found == "new"
            break
        tried += 1
        if not stopped:  # what is removed at the end may stay: nobody sees it
            assert found == "new"
        case.write("new")
        assert case.read() == "new"
    assert tried > 1
    assert threading.excepthook is hook
    print(f"{name}: {tried} file operations refused")


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS)])
def test_a_file_that_may_not_grow(
    name: str,
    parts: Components,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files_limited_to: Callable[[int], AbstractContextManager[None]],
) -> None:
    tried = 0
    for number in count():
        size = round(40 * (3 if name in SMALL else 40) ** number)
        case = case_of(name, tmp_path / str(number), parts)
        case.write("old")

        def write(case: Case = case, size: int = size) -> None:
            with files_limited_to(size):
                case.write("new")

        stopped = refused(write, capsys)
        found = case.read()
        if name != "log":  # which has whole rows, and as many as went in
            assert found == ("old" if stopped else "new")
        if not stopped:
            break
        tried += 1
        case.write("new")
        assert case.read() == "new"
    assert tried > 1
    print(f"{name}: {tried} limits")
