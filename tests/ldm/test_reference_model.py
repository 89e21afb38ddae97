"""models/emoji-scenes: what is shipped opens, fits, draws what it is told, and `make demo` draws with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import load
from ldm.data.scene_rendering import EMOJI_FONT
from ldm.data.scenes import ScenesConfig, trained_prompts
from ldm.evaluation.maps import mean_iou, recover_map
from ldm.evaluation.scene_holes import same_outside
from ldm.evaluation.scenes import rates, score_each
from ldm.interchange.opening import open_pipeline
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.stage2_config import Stage2Config

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "emoji-scenes"
EXAMPLES = MODEL / "examples"
DRAWN = {"num_inference_steps": 20, "guidance_scale": 5.0, "scheduler": "ddpm"}

needs_font = pytest.mark.skipif(
    not EMOJI_FONT.is_file(), reason="needs the emoji font: apt-get install fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def pipeline() -> LatentDiffusionPipeline:
    return open_pipeline(MODEL, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def vocabulary() -> ScenesConfig:
    return load(Stage2Config, ROOT / "configs" / "reference" / "ldm-finish.yaml").data.scenes


def test_it_is_small_and_holds_no_pickle() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 48_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png", ".txt"}
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for part in ("license:", "## Data", "## Recipe", "## Measured", "## Limits"):
        assert part in card


def test_it_takes_text_maps_and_masks(pipeline: LatentDiffusionPipeline, vocabulary: ScenesConfig) -> None:
    assert set(pipeline.conditions) == {"text", "semantic", "inpainting"}
    assert len(pipeline.semantic_encoder.classes) == 1 + len(vocabulary.object_names) == 49
    assert pipeline.default_size == (64, 64)


@needs_font
def test_it_draws_what_a_prompt_says(pipeline: LatentDiffusionPipeline, vocabulary: ScenesConfig) -> None:
    """Far above chance (1 in 12 backgrounds, 1 in 48 objects); the figures themselves are in the model's card."""
    told = [pair for pair in trained_prompts(vocabulary, 60) if len(pair[1].objects) == 1][:12]
    drawn = pipeline([text for text, _ in told], seed=0, **DRAWN).images
    found = rates(score_each(drawn, [scene for _, scene in told], vocabulary))
    assert found["background"] >= 10 / 12 and found["objects"] >= 6 / 12


def test_inpainting_keeps_the_rest(pipeline: LatentDiffusionPipeline) -> None:
    scene, mask = Image.open(EXAMPLES / "scene.png").convert("RGB"), Image.open(EXAMPLES / "mask.png").convert("L")
    prompt = (EXAMPLES / "inpaint.txt").read_text(encoding="utf-8").strip()
    drawn = pipeline(prompt, image=scene, mask_image=mask, seed=0, **DRAWN).images[0]
    assert same_outside(drawn, scene, mask)
    hole = np.asarray(mask) > 0
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(scene, dtype=int))[hole].mean() > 10


@needs_font
def test_a_map_is_followed(pipeline: LatentDiffusionPipeline, vocabulary: ScenesConfig) -> None:
    wanted = np.asarray(Image.open(EXAMPLES / "map.png"))
    prompt = (EXAMPLES / "map-prompts.txt").read_text(encoding="utf-8").splitlines()[0]
    drawn = pipeline(prompt, semantic_map=torch.from_numpy(wanted.astype(np.int64)), seed=0, **DRAWN).images[0]
    classes = len(vocabulary.object_names) + 1
    found = mean_iou(wanted, recover_map(drawn, vocabulary), classes)
    assert found > 0.4 > mean_iou(wanted, np.zeros_like(wanted), classes)


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    """The commands of `make demo` as they stand in the Makefile, with words from the command line."""
    words = [
        f"BIN={Path(sys.executable).parent}",
        f"DRAWN={tmp_path}",
        'PROMPT=a large dog "here" on a navy background',
    ]
    call = ["make", "-o", ".venv/installed", "demo", *words]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=600)
    assert done.returncode == 0, done.stderr
    pictures = [tmp_path / name / "grid.png" for name in ("prompts", "inpainting", "map")]
    pictures += list((tmp_path / "interpolation").glob("*.png"))
    assert len(pictures) == 4
    for path in pictures:
        assert path.is_file() and str(path) in done.stdout
    assert len(list((tmp_path / "prompts").glob("0*.png"))) == 8
