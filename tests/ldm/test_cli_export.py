"""`ldm export` and `--lora`: what they write, and what they refuse in one line."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.adapter_layers import lora_layers
from ldm.adapters import LoraConfig, add_lora, lora_state
from ldm.cli.drawing import parse_lora
from ldm.cli.main import main
from ldm.errors import UserError
from ldm.interchange.opening import open_pipeline
from ldm.lora_files import LoraInfo, save_lora
from ldm.noise import NoiseConfig


@pytest.fixture(scope="module")
def model(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    make_pipeline(NoiseConfig(schedule="scaled_linear"), "ddim").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(make_pipeline, model, tmp_path_factory):
    """The folder of a run that trained a LoRA, as it is left behind."""
    folder = tmp_path_factory.mktemp("lora") / "mine"
    folder.mkdir()
    pipeline = make_pipeline(NoiseConfig(schedule="scaled_linear"), "ddim")
    torch.manual_seed(0)
    add_lora(pipeline.unet, None, LoraConfig(rank=2))
    for layer in lora_layers(pipeline.unet).values():
        layer.lora_B["default"].weight.data.normal_(std=0.2)
    info = LoraInfo(title="mine", base_model=str(model), trigger_words=("glimmer",))
    save_lora(folder / "lora.safetensors", lora_state(pipeline.unet, None, info=info))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": str(model), "training": {}}))
    return folder


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_tensors(one, two):
    first, last = load_file(one), load_file(two)
    return first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "fp8"], "dtype: found fp8; allowed is fp32"),
        (["--prediction", "noise"], "prediction: found 'noise'; allowed is epsilon"),
        (["--to", "lora"], "found no lora.safetensors in it"),
        (["--base", "x"], "--base: found with --to single-file; it goes with lora and kohya-lora"),
        (["--to", "lora", "--standard-scale"], "--standard-scale: found with --to lora; it goes with diffusers and"),
        (["--lora", "nowhere"], "--lora nowhere: found no such file"),
        (["--vae", "nowhere"], "vae: nowhere: no such folder"),
        (["--variant", "fp16"], "found no variant 'fp16'; allowed is none"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(model, tmp_path, capfd, words, message):
    out = tmp_path / "out.safetensors"
    assert main(["export", str(model), "--to", "single-file", "--out", str(out), *words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["diffusers", "single-file", "lora", "kohya-lora"])
def test_no_kind_overwrites_unasked(model, run, tmp_path, capfd, kind):
    out = tmp_path / ("folder" if kind == "diffusers" else "file.safetensors")
    if kind == "diffusers":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.write_text("mine")
    words = ["export", str(run if "lora" in kind else model), "--to", kind, "--out", str(out)]
    assert main(words) == 2
    error = capfd.readouterr().err
    assert "found something there already" in error and "--overwrite" in error
    assert error.count("\n") == 1
    assert (out / "mine.txt" if kind == "diffusers" else out).read_text() == "mine"
    if kind == "kohya-lora":
        assert main([*words, "--overwrite"]) == 0
        assert load_file(out)


def test_a_lora_survives_both_layouts(model, run, tmp_path, capsys):
    """Its base is named by --base, by the run's config, or by its own header."""
    kohya, back, alone = (tmp_path / f"{name}.safetensors" for name in ("kohya", "back", "alone"))
    assert main(["export", str(run), "--to", "kohya-lora", "--out", str(kohya)]) == 0
    assert "ldm export: ComfyUI and A1111 know Stable Diffusion 1 and 2 in their own sizes" in capsys.readouterr().err
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in load_file(kohya)
    assert main(["export", str(kohya), "--to", "lora", "--base", str(model), "--out", str(back)]) == 0
    assert same_tensors(run / "lora.safetensors", back)
    shutil.copy(run / "lora.safetensors", alone)
    assert main(["export", str(alone), "--to", "lora", "--out", str(tmp_path / "again.safetensors")]) == 0
    assert same_tensors(alone, tmp_path / "again.safetensors")
    capsys.readouterr()
    assert main(["export", str(kohya), "--to", "lora", "--out", str(tmp_path / "not.safetensors")]) == 2
    assert "its header names model, which is not here; give it with --base MODEL" in capsys.readouterr().err


def test_the_header_of_an_exported_lora_follows_modelspec_and_tells_no_paths(run, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--to", "kohya-lora", "--title", "Glimmer", "--license", "mit", "--dtype", "fp16", "--out", str(out)]
    assert main(["export", str(run / "lora.safetensors"), *words]) == 0
    found = header(out)
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.architecture"] == "latent-diffusion/lora"
    assert found["modelspec.implementation"] == "https://github.com/huggingface/diffusers"
    assert found["modelspec.title"] == "Glimmer"
    assert found["modelspec.license"] == "mit"
    assert found["modelspec.trigger_phrase"] == "glimmer"
    assert found["base_model"] == "model"
    assert not any(str(run.parent) in value for value in found.values())
    kinds = {tensor.dtype for key, tensor in load_file(out).items() if not key.endswith(".alpha")}
    assert kinds == {torch.float16}


def test_a_lora_is_merged_into_an_exported_model(model, run, tmp_path, capfd):
    out = tmp_path / "merged"
    assert main(["export", str(model), "--to", "diffusers", "--lora", f"{run}=0.5", "--out", str(out)]) == 0
    assert capfd.readouterr() == (f"{out}\n", "")
    settings = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    merged, applied, plain = (
        open_pipeline(path, loras=loras, dtype="fp32", device="cpu")("a cat", **settings).images
        for path, loras in ((out, []), (model, [(run, 0.5)]), (model, []))
    )
    assert torch.equal(merged, applied)
    assert (merged - plain).abs().max() > 0.01


def test_the_weight_of_a_lora(run):
    file = run / "lora.safetensors"
    assert parse_lora(str(file)) == (file, 1.0)
    assert parse_lora(f"{file}=0.5") == (file, 0.5)
    assert parse_lora(str(run)) == (run, 1.0)
    assert parse_lora(f"{run}=-1") == (run, -1.0)
    for text in ("nowhere.safetensors", f"{file}=much", "=1"):
        with pytest.raises(UserError, match="--lora"):
            parse_lora(text)
