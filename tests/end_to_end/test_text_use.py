"""benchmarks/text_use.py: the wrong captions are wrong in one thing, and what words are worth is measured exactly."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from small import LDM, ROOT, Commands

from autoencoder import AutoencoderConfig, build_autoencoder
from conditioning.text import TextConfig, build_text_encoder
from ldm.data.scene_rendering import RELATIONS, caption
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import make_scheduler
from ldm.unet import UNetConfig, build_unet

SCRIPT = ROOT / "benchmarks" / "text_use.py"
SCENES = ScenesConfig(objects=("circle", "square", "triangle"), min_objects=2, max_objects=2)


@pytest.fixture(scope="module")
def text_use():
    sys.path.insert(0, str(SCRIPT.parent))  # it imports its neighbour learning_curve
    try:
        spec = importlib.util.spec_from_file_location("text_use", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    small = AutoencoderConfig(
        latent_channels=2, channels=(8, 8), layers_per_block=1, mid_attention=False, norm_groups=4
    )
    text = build_text_encoder(TextConfig(encoder="trained", length=24, width=8, layers=1, heads=2))
    network = UNetConfig(channels=(8, 8), layers_per_block=1, attention=(True, True), heads=2, norm_groups=4)
    unet = build_unet(network, latent_channels=2, context_width=8, sample_size=8)
    noise = NoiseConfig(prediction="sample", zero_terminal_snr=True)
    return LatentDiffusionPipeline(build_autoencoder(small), text, unet, make_scheduler("ddim", noise))


def test_wrong_captions_are_wrong_in_one_thing(text_use):
    for index in range(50):
        scene = scene_at(SCENES, index)
        turned, renamed = (change(scene, SCENES) for change in text_use.WRONG.values())
        assert caption(turned) == caption(scene).replace(scene.relation, RELATIONS[scene.relation])
        names = [thing.name for thing in renamed.objects]
        assert len({*names, scene.objects[0].name}) == 3 and names[1] == scene.objects[1].name
        assert caption(renamed) == caption(scene).replace(scene.objects[0].name, names[0], 1)


def test_words_that_reach_nothing_are_worth_nothing(text_use, model):
    def growth(phrasing: int = 0) -> list[float]:
        found = text_use.measure(model, SCENES, 16, count=8, phrasing=phrasing)
        return found["opposite relation"] + found["another object"]

    assert max(map(abs, growth())) > 1e-6  # an untrained network, too, draws otherwise for other words
    assert growth(phrasing=4) != growth()
    for name, module in model.unet.named_modules():
        if name.endswith("attn2"):
            torch.nn.init.zeros_(module.to_v.weight)
    assert max(map(abs, growth())) < 1e-6


def test_the_command_measures_checkpoints_and_refuses_other_folders(small_run, tmp_path):
    data = {**LDM["data"], "scenes": {**LDM["data"]["scenes"], "objects": ["circle", "square", "triangle"]}}
    config = Commands(tmp_path).write_config(
        "three.yaml", {**LDM, "data": data, "autoencoder": "nothing", "out": "run"}
    )
    checkpoint = max((small_run / "checkpoints").glob("step-*"))

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *map(str, arguments), "--count", "4"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    told = call(config, checkpoint)
    assert told.returncode == 0, told.stderr
    rows = [line.split(" | ") for line in told.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[1:]] == ["true captions", "opposite relation", "another object"]
    assert all(0 < float(value.strip("| ")) < 100 for value in rows[1][1:])
    two = small_run / "config.yaml"
    for arguments, found in (
        ((config, tmp_path), "allowed is a pipeline's folder"),
        ((two, checkpoint), "a third is needed"),
        ((tmp_path / "none.yaml", checkpoint), "No such file"),
    ):
        refused = call(*arguments)
        assert refused.returncode == 2 and found in refused.stderr and "Traceback" not in refused.stderr
