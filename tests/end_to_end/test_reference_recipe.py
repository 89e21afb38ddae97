"""The four parts of `make reference`, in its order and from nothing, with few steps each."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image
from scene_pictures import needs_font
from small import ROOT, Commands, losses

STEPS = 3
SHORT = (
    "data.scenes.count=64",
    "validation_data.scenes.count=8",
    f"training.steps={STEPS}",
    "training.batch_size=4",
    "training.log_every=1",
)
DRAWN = ("preview.count=2", "preview.num_inference_steps=2")


def recipe() -> list[tuple[str, Path]]:
    """Stage and config of each command of the Makefile's recipe."""
    _, _, rest = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nreference:")
    lines = [shlex.split(line) for line in rest.split("\n\n")[0].splitlines()[1:]]
    assert [words[0] for words in lines] == ["$(BIN)/python"] * 4
    return [(words[1].removeprefix("train_").removesuffix(".py"), ROOT / words[2]) for words in lines]


@pytest.mark.slow
@needs_font
def test_make_reference_goes_from_nothing_to_a_model_of_text_maps_and_masks(commands: Commands) -> None:
    runs = commands.folder / "runs/reference"
    for stage, config in recipe():
        commands.train(stage, config, *SHORT, *(DRAWN if stage == "ldm" else ()))
    for part in ("vae", "ldm", "relations", "finish"):
        trained = [row["loss"] for row in losses(runs / part) if "loss" in row]
        assert len(trained) == STEPS, part
    model = runs / "finish/pipeline"
    shipped = json.loads((ROOT / "models/emoji-scenes/model_index.json").read_text(encoding="utf-8"))
    made = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    assert {name for name in made if not name.startswith("_")} == {name for name in shipped if not name.startswith("_")}
    examples = ROOT / "models/emoji-scenes/examples"
    drawing = ("--model", model, "--steps", 2, "--scheduler", "ddpm", "--prompt", "a large lion on a navy background")
    commands.ldm("generate", *drawing, "--semantic-map", examples / "map.png", "--out", "map")
    masked = ("--image", examples / "scene.png", "--mask", examples / "mask.png")
    commands.ldm("inpaint", *drawing, *masked, "--out", "inpainted")
    for folder in ("map", "inpainted"):
        (picture,) = (path for path in (commands.folder / folder).glob("0*.png"))
        assert Image.open(picture).size == (64, 64)
