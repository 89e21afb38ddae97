"""Watching a training: the best checkpoint is kept, and nothing that is trained changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from conditioning.encoders import ConditionEncoders
from conditioning.text import TextConfig
from ldm.data.scenes import ScenesConfig
from ldm.data.sources import DataConfig, open_source
from ldm.errors import UserError
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.conditions import ConditionsConfig
from ldm.training.loop import TrainingConfig, open_quarantine, train, training_batches
from ldm.training.preview import PreviewConfig
from ldm.training.run import RuntimeConfig, open_run
from ldm.training.stage1 import Stage1Config
from ldm.training.stage2 import DiffusionStage
from ldm.training.stage2_config import Stage2Config
from ldm.training.watch import Watch, WatchConfig, watched
from ldm.training.watch_pictures import PictureWatch, watch_of

SCENES = ScenesConfig(objects=("circle", "square"), colours=("red", "blue", "green"), sizes=("large",), count=24)
WATCH = WatchConfig(every=2, count=8, reference=12, num_inference_steps=2, batch_size=4)


class Log:
    """What a tracker is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def numbers(self, step: int, values: dict) -> None:
        self.rows.append((step, values))


ONE_PROCESS = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True, num_processes=1))


def looks(folder: Path, metric: str, values: list[float], first: int = 1) -> Watch:
    """A watch that has seen these values, one a step, and kept what it wanted to keep."""
    remaining = list(values)
    watch = Watch(folder, every=1, metric=metric, measure=lambda: {metric: remaining.pop(0)})
    for step in range(first, first + len(values)):
        if watch.look(step - 1, {}, ONE_PROCESS, Log()):  # type: ignore[arg-type]
            watch.keep(step, {"unet": {"w": torch.tensor([float(step)])}}, {"seed": 0})
    return watch


@pytest.mark.parametrize(("metric", "best"), [("fid", 3), ("everything", 2), ("psnr", 2)])
def test_the_best_is_kept_and_only_that(tmp_path: Path, metric: str, best: int) -> None:
    kept = looks(tmp_path, metric, [5.0, 7.0, 4.0, 4.0, math.nan, 6.0]).best()
    assert kept is not None and kept.step == best and kept.tensors["unet"]["w"].item() == best
    assert [path.name for path in (tmp_path / "checkpoints" / "best").iterdir()] == [f"step-{best}"]
    value = {3: 4.0, 2: 7.0}[best]
    assert kept.state["watch"] == {"metric": metric, "value": value, "numbers": {metric: value}}
    assert watched(kept) == f"{metric} {value:g} at step {best}"


def test_a_run_that_goes_on_remembers_what_was_best(tmp_path: Path) -> None:
    looks(tmp_path, "fid", [5.0, 4.0])
    assert looks(tmp_path, "fid", [4.5, 4.2], first=3).best().step == 2  # type: ignore[union-attr]
    assert looks(tmp_path, "fid", [3.0], first=1).best().step == 1  # type: ignore[union-attr] # another way from step 0
    assert looks(tmp_path, "kid", [9.0], first=6).best().step == 6  # type: ignore[union-attr] # by another metric
    assert Watch(tmp_path / "new", every=1, metric="fid").best() is None


def test_a_metric_that_is_not_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found colours, which is not measured here; allowed is fid"):
        Watch(tmp_path, every=1, metric="colours", measure=lambda: {"fid": 1.0}).look(0, {}, ONE_PROCESS, Log())  # type: ignore[arg-type]


def test_stage_1_takes_the_numbers_of_validation(tmp_path: Path) -> None:
    log = Log()
    watch = Watch(tmp_path, every=5, metric="psnr")
    assert [watch.due(done, 12) for done in (4, 5, 10, 11, 12)] == [False, True, True, False, True]
    assert watch.look(4, {"psnr": 20.0}, ONE_PROCESS, log)  # type: ignore[arg-type]
    assert log.rows == []  # validation has told them already


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"metric": "fidd"}, "metric: found 'fidd'"),
        ({"count": 4}, "count: found 4; allowed is 8 or more"),
        ({"every": 0}, "every: found 0"),
        ({"metric": "sfid"}, "metric: found sfid, which only inception has"),
    ],
)
def test_settings_that_cannot_be(values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WatchConfig(**values)


def test_the_exact_scorer_needs_scenes_and_lpips_its_weights() -> None:
    training = TrainingConfig(steps=1, batch_size=4)
    with pytest.raises(ValueError, match=r"watch.metric: found objects with data.source folder"):
        Stage2Config(
            out="x", data=DataConfig(root="r"), training=training, autoencoder="a", watch=WatchConfig(metric="objects")
        )
    with pytest.raises(ValueError, match=r"keep_best: found lpips with loss.perceptual"):
        Stage1Config(out="x", data=DataConfig(root="r", resolution=64), training=training, keep_best="lpips")


# --- Trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def trained(make_pipeline: Callable[..., LatentDiffusionPipeline]) -> Callable[..., DiffusionStage]:
    """Trains a tiny model in `folder` up to `steps`, going on from what is there."""

    def run_training(folder: Path, steps: int, watch: WatchConfig | None) -> DiffusionStage:
        config = Stage2Config(
            out=str(folder),
            data=DataConfig(source="scenes", resolution=16, scenes=SCENES),
            training=TrainingConfig(steps=steps, batch_size=4, workers=0, log_every=1, checkpoint_every=2),
            autoencoder="unused",
            conditions=ConditionsConfig(text=TextConfig(dropout=0.5)),
            preview=PreviewConfig(count=1, num_inference_steps=1, loss_images=4),
            runtime=RuntimeConfig(precision="fp32", trackers=()),
            ema_decay=0.5,
            watch=watch,
        )
        pipeline = make_pipeline(NoiseConfig())
        source = open_source(config.data)
        run = open_run(folder, 0, config.runtime, 1)
        encoders = ConditionEncoders(pipeline.text_encoder)
        stage = DiffusionStage(config, run, pipeline.vae, encoders, pipeline.unet, NoiseConfig(), source)
        batches = training_batches(source, config.data, config.training, run)
        quarantine = open_quarantine(source, config.data, run)
        train(stage, batches, config.training, run, quarantine, watch_of(stage, source))
        return stage

    return run_training


def rows(folder: Path, *, watched: bool) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]
    return [row for row in found if watched or not any(key.startswith("watch/") for key in row)]


def weights(stage: DiffusionStage) -> dict[str, torch.Tensor]:
    files = stage.learner.tensors()
    return {f"{file}/{name}": tensor.clone() for file, named in files.items() for name, tensor in named.items()}


def differing(one: DiffusionStage, other: DiffusionStage) -> list[str]:
    """Names of weights, averages and optimiser states that are not equal bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_watching_changes_nothing_and_survives_a_restart(
    trained: Callable[..., DiffusionStage], tmp_path: Path
) -> None:
    plain = trained(tmp_path / "plain", 4, None)
    watching = trained(tmp_path / "watched", 4, WATCH)
    assert rows(tmp_path / "watched", watched=False) == rows(tmp_path / "plain", watched=False)
    assert differing(plain, watching) == []
    trained(tmp_path / "restarted", 2, WATCH)
    again = trained(tmp_path / "restarted", 4, WATCH)
    looked = [row for row in rows(tmp_path / "watched", watched=True) if "watch/fid" in row]
    assert [row["step"] for row in looked] == [1, 3]
    assert {"watch/kid", "watch/precision", "watch/objects", "watch/everything"} <= set(looked[0])
    assert [row for row in rows(tmp_path / "restarted", watched=True) if "watch/fid" in row] == looked
    assert differing(watching, again) == []
    best = watch_of(watching, open_source(watching.config.data)).best()  # type: ignore[union-attr]
    values = {row["step"] + 1: row["watch/fid"] for row in looked}
    assert best is not None and best.step == min(values, key=values.__getitem__)
    assert (tmp_path / "watched" / "checkpoints" / "step-4").is_dir()


def test_looking_leaves_random_numbers_weights_and_modes_alone(
    trained: Callable[..., DiffusionStage], tmp_path: Path
) -> None:
    stage = trained(tmp_path, 1, None)
    look = PictureWatch(stage, WATCH, open_source(stage.config.data))
    stage.unet.train()
    before, state = weights(stage), torch.get_rng_state()
    first = look()
    assert torch.equal(torch.get_rng_state(), state) and stage.unet.training
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(stage).items())
    assert look() == first  # the same prompts, seeds and reference each time
    with pytest.raises(UserError, match=r"watch.metric: found sizes, of which the prompts"):
        PictureWatch(stage, replace(WATCH, metric="sizes"), open_source(stage.config.data))
