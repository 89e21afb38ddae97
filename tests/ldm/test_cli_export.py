"""`ldm export` and `--lora`: what they refuse, in one line. What they write is shown in tests/end_to_end."""

from __future__ import annotations

import pytest
import torch

from ldm.adapters import LoraConfig, add_lora, lora_state
from ldm.cli.drawing import parse_lora
from ldm.cli.main import main
from ldm.errors import UserError
from ldm.lora_files import save_lora
from ldm.noise import NoiseConfig


@pytest.fixture(scope="module")
def model(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    make_pipeline(NoiseConfig(schedule="scaled_linear"), "ddim").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(make_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "mine.safetensors"
    pipeline = make_pipeline(NoiseConfig(schedule="scaled_linear"), "ddim")
    torch.manual_seed(0)
    add_lora(pipeline.unet, None, LoraConfig(rank=2))
    save_lora(path, lora_state(pipeline.unet, None))
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "fp8"], "--dtype: found 'fp8'; allowed is fp32"),
        (["--prediction", "noise"], "prediction: found 'noise'; allowed is epsilon"),
        (["--to", "lora"], "found no config.yaml that names the model"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(model, tmp_path, capsys, words, message):
    out = tmp_path / "out.safetensors"
    assert main(["export", str(model), "--to", "single-file", "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_lora_file_needs_its_base_and_survives_both_layouts(model, lora, tmp_path, capsys):
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    assert main(["export", str(lora), "--to", "kohya-lora", "--out", str(kohya)]) == 2
    assert "--base MODEL" in capsys.readouterr().err
    assert main(["export", str(lora), "--to", "kohya-lora", "--base", str(model), "--out", str(kohya)]) == 0
    assert main(["export", str(kohya), "--to", "lora", "--base", str(model), "--out", str(back)]) == 0
    from safetensors.torch import load_file

    first, last = load_file(lora), load_file(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_the_weight_of_a_lora(lora):
    assert parse_lora(str(lora)) == (lora, 1.0)
    assert parse_lora(f"{lora}=0.5") == (lora, 0.5)
    for text in ("nowhere.safetensors", f"{lora}=much"):
        with pytest.raises(UserError, match="--lora"):
            parse_lora(text)
