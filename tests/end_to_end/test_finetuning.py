"""DreamBooth and textual inversion by the real entry points, most of them called in this process."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from small import LDM, SCENES, Commands, checkpoint_tensors, losses

import train_ldm
from conditioning.embeddings import word_vectors
from ldm import LatentDiffusionPipeline
from ldm.cli.main import main
from ldm.data.scenes import ScenesConfig, ScenesSource
from ldm.errors import UserError
from ldm.randomness import derive_seed

PROMPTS = ["a red circle on a white background", "a blue square on a black background"]
PRIOR = {"prompts": PROMPTS, "count": 5, "num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 2}
WORD = {"token": "<mine>", "initial": "circle", "vectors": 2}
PROMPT, NEGATIVE = "a <mine> on a white background", "a red circle"


@pytest.fixture
def base(small_run):
    return small_run / "pipeline"


def write_images(folder):
    """Three images of one's own, captioned with a new word."""
    folder.mkdir()
    scenes = {key: tuple(value) if isinstance(value, list) else value for key, value in SCENES["scenes"].items()}
    source = ScenesSource(ScenesConfig(**scenes), 16)
    for index in range(3):
        source.read(index).image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a picture of <mine>\n")
    return folder


@pytest.fixture
def images(commands):
    return write_images(commands.folder / "images")


def config_of(commands, base, images, **changes):
    values = {
        **LDM,
        "runtime": {"precision": "fp32"},  # where auto is bf16, what is drawn here and there differs by rounding
        "model": str(base),
        "data": {"root": str(images), "resolution": 16},
        "conditions": {"text": {"encoder": "model"}},
        "unet": {},
        "optimiser": {"lr": 1.0e-2},
        "ema_decay": 0,
        "out": "run",
        **changes,
    }
    return commands.write_config("finetune.yaml", values)


def train(commands, base, images, out, steps=2, **changes):
    run = commands.folder / out
    training = {**LDM["training"], "steps": steps, **changes.pop("training", {})}
    train_ldm.train_diffusion(config_of(commands, base, images, out=str(run), training=training, **changes), [])
    return run


def draw(pipeline, prompt=PROMPT):
    """A picture as numbers, with what diffusers calls the same settings."""
    latents = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", "latents": latents}
    return torch.as_tensor(pipeline(prompt, negative_prompt=NEGATIVE, **settings).images)


# --- Prior preservation ----------------------------------------------------------------------------------------------


def test_class_images_are_what_the_untrained_model_draws_and_serve_every_run(commands, base, images, capsys):
    prior = commands.folder / "classes"
    train(commands, base, images, "full", prior={**PRIOR, "folder": str(prior)})
    rows = [json.loads(line) for line in (prior / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": f"{i:06d}.png", "text": PROMPTS[i % 2]} for i in range(5)]
    pipeline = LatentDiffusionPipeline.from_pretrained(base, dtype="fp32")
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "scheduler": "ddim"}
    for index in range(5):
        drawn = pipeline(PROMPTS[index % 2], seed=derive_seed(0, "prior", index), **settings).images[0]
        found = np.asarray(Image.open(prior / f"{index:06d}.png")).astype(int)
        assert abs(found - np.asarray(drawn)).max() <= 1
    assert "5 of them drawn now; in an epoch they come 1 x, the data's 3 images 2 x" in capsys.readouterr().err

    before = {path.name: path.read_bytes() for path in prior.glob("*.png")}
    (prior / "000003.png").unlink()
    lora = {"rank": 2, "text_encoder": True}
    run = train(commands, base, images, "lora", lora=lora, prior={**PRIOR, "folder": str(prior)})
    assert "1 of them drawn now" in capsys.readouterr().err  # by a U-Net with a LoRA in it that says nothing yet
    assert {path.name: path.read_bytes() for path in prior.glob("*.png")} == before
    assert (run / "lora.safetensors").exists()


def test_the_weight_of_class_images_reaches_the_loss(commands, base, images):
    prior = {**PRIOR, "folder": str(commands.folder / "classes")}
    curves = []
    for weight in (1.0, 1e-6):
        run = train(commands, base, images, f"weight {weight}", steps=1, prior={**prior, "weight": weight})
        curves.append([row["loss"] for row in losses(run) if "loss" in row])
    (with_them,), (without,) = curves
    assert 0 < without < with_them


def test_the_text_encoder_is_trained_when_asked(commands, base, images):
    run = train(commands, base, images, "both", conditions={"text": {"encoder": "model", "finetune": True}})
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, run / "pipeline"))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert not {name for name in unchanged if not name.endswith("k_proj.bias")}  # its gradient is 0 up to rounding
    with pytest.raises(UserError, match=r"conditions.text.finetune: found true beside lora.*set lora.text_encoder"):
        text = {"encoder": "model", "finetune": True}
        train(commands, base, images, "refused", conditions={"text": text}, lora={"rank": 2})


def test_a_word_without_a_model_or_beside_other_ways_is_refused(commands, base, images):
    for changes, message in (
        ({"model": None, "autoencoder": "A"}, "textual_inversion: found without model"),
        ({"lora": {"rank": 2}}, "lora: found beside textual_inversion"),
        ({"prior": PRIOR}, "prior: found beside textual_inversion"),
        ({"conditions": {"text": {"encoder": "none"}}}, "textual_inversion: found with conditions.text.encoder none"),
        ({"conditions": {"text": {"encoder": "model"}, "label": {"width": 4}}}, "label"),
        ({"textual_inversion": {**WORD, "token": "circle"}}, "textual_inversion: found 'circle', which is a word"),
        ({"textual_inversion": {**WORD, "initial": "a b c"}}, "textual_inversion: found initial 'a b c', which is 3"),
        ({"textual_inversion": {**WORD, "token": "<his>"}}, "textual_inversion.token: found <his> in none of the"),
    ):
        with pytest.raises(UserError) as error:
            train(commands, base, images, "refused", **{"textual_inversion": WORD, **changes})
        assert message in str(error.value)
        assert not (commands.folder / "refused" / "config.yaml").exists()


# --- Textual inversion -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inverted(tmp_path_factory, small_run):
    """A run that has learned <mine>. Shared: do not change it."""
    commands = Commands(tmp_path_factory.mktemp("inverted"))
    changes = {"ema_decay": 0.9, "preview": {**LDM["preview"], "prompts": [PROMPT, "a red circle"]}}
    training = {"validate_first": True}
    images = write_images(commands.folder / "images")
    return train(
        commands, small_run / "pipeline", images, "run", 4, textual_inversion=WORD, training=training, **changes
    )


def test_nothing_but_the_word_is_learned(inverted, base):
    before, after = (
        LatentDiffusionPipeline.from_pretrained(base),
        LatentDiffusionPipeline.from_pretrained(inverted / "pipeline"),
    )
    table = "model.embeddings.token_embedding.weight"
    for part in ("unet", "vae", "text_encoder"):
        old, new = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        assert old.keys() == new.keys()
        assert [name for name in old if name != table and not torch.equal(old[name], new[name])] == []
    old, new = (pipeline.text_encoder.state_dict()[table] for pipeline in (before, after))
    assert torch.equal(new[: len(old)], old)
    assert len(new) == len(old) + 2
    start = old[before.text_encoder.tokenizer("circle", add_special_tokens=False).input_ids[0]]
    assert not any(torch.equal(row, start) for row in new[len(old) :])
    # Nor does a checkpoint hold more: the rows, their average and their optimiser.
    tensors = checkpoint_tensors(inverted, 4)
    assert {name.rsplit("/")[0] for _, name in tensors} == {
        "encoders.text.model.embeddings.token_embedding.rows",
        "optimization_step",
    }
    assert {path.name for path in (inverted / "samples").iterdir()} == {"step-0.png", "step-4.png"}


def test_the_file_is_diffusers_and_draws_the_same_there(inverted, base):
    ours = LatentDiffusionPipeline.from_pretrained(inverted / "pipeline", dtype="fp32")
    wanted = draw(ours)
    (found,) = load_file(inverted / "learned_embeds.safetensors").items()
    assert found[0] == "<mine>"
    assert torch.equal(found[1], word_vectors(ours.text_encoder, "<mine>"))
    whole = StableDiffusionPipeline.from_pretrained(inverted / "pipeline")
    assert (draw(whole) - wanted).abs().max() <= 1e-5
    theirs = StableDiffusionPipeline.from_pretrained(base)
    without = draw(theirs)
    theirs.load_textual_inversion(str(inverted))
    assert (draw(theirs) - wanted).abs().max() <= 1e-5
    assert (without - wanted).abs().max() > 1e-3
    # In a negative prompt too.
    assert (draw(theirs, "a red circle") - draw(ours, "a red circle")).abs().max() <= 1e-5


def pictures(commands, model, *words, out):
    prompts = ("--prompt", PROMPT, "--negative", "a <mine>", "--steps", "3", "--seed", "0", "--dtype", "fp32")
    assert (
        main(["generate", "--model", str(model), *map(str, words), *prompts, "--out", str(commands.folder / out)]) == 0
    )
    (path,) = (commands.folder / out).glob("0*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_the_command_reads_files_of_diffusers_and_of_a1111(commands, inverted, base):
    wanted = pictures(commands, inverted, out="run")
    file = inverted / "learned_embeds.safetensors"
    vectors = load_file(file)["<mine>"]
    save_file({"emb_params": vectors}, commands.folder / "<mine>.safetensors")
    save_file({"<other>": vectors[:1]}, commands.folder / "other.safetensors")
    for number, words in enumerate(
        (
            ("--embedding", inverted),
            ("--embedding", file, "--embedding", commands.folder / "other.safetensors"),
            ("--embedding", commands.folder / "<mine>.safetensors"),
        )
    ):
        assert abs(pictures(commands, base, *words, out=f"{number}") - wanted).max() <= 1
    other = pictures(commands, base, "--embedding", f"{commands.folder / 'other.safetensors'}=<mine>", out="renamed")
    assert abs(other - wanted).max() > 1  # one of its two vectors


def test_files_that_do_not_fit_are_one_line(commands, inverted, base, capsys):
    (commands.folder / "junk.safetensors").write_bytes(b"junk" * 10)
    (commands.folder / "old.pt").write_bytes(b"PK" + b"junk" * 10)
    for name, tensors in {
        "wide": {"<wide>": torch.zeros(1, 9)},
        "cat": {"emb_params": torch.zeros(1, 8)},
        "sdxl": {"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(1, 12)},
        "nan": {"<nan>": torch.full((1, 8), torch.nan)},
    }.items():
        save_file(tensors, commands.folder / f"{name}.safetensors")
    for name, message in {
        "wide.safetensors": "found vectors of shape [1, 9]; allowed is [n, 8]",
        "cat.safetensors": "found 'cat', which is a word already",
        "sdxl.safetensors": "allowed is one tensor [vectors, width]",
        "nan.safetensors": "NaN or Inf",
        "junk.safetensors": "no whole safetensors file",
        "old.pt": "found a pickle",
        "none.safetensors": "found no such file",
    }.items():
        out = commands.folder / "out"
        words = ["generate", "--model", str(base), "--embedding", str(commands.folder / name), "--prompt", "a"]
        assert main([*words, "--out", str(out)]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
        assert not out.exists()


@pytest.mark.slow
def test_a_killed_inversion_goes_on_bit_for_bit(commands, base, images):
    preview = {**LDM["preview"], "prompts": [PROMPT]}
    config = config_of(commands, base, images, textual_inversion=WORD, ema_decay=0.9, preview=preview)
    commands.train("ldm", config, "out=straight")
    killed = commands.folder / "killed"
    until = killed / "checkpoints" / "step-3"
    assert commands.train_and_interrupt("ldm", config, "out=killed", until=until, how=signal.SIGKILL) == -signal.SIGKILL
    assert "going on from step" in commands.train("ldm", config, "out=killed").stderr
    first, second = checkpoint_tensors(commands.folder / "straight", 8), checkpoint_tensors(killed, 8)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(commands.folder / "straight") == losses(killed)


@pytest.mark.slow
def test_processes_share_class_images_and_train_as_one(commands, base, images):
    config = config_of(commands, base, images, prior=PRIOR)
    commands.train("ldm", config, "out=one", "training.steps=2")
    commands.train_with_processes(2, "ldm", config, "out=two", "training.steps=2")
    one, two = (
        {
            path.name: np.asarray(Image.open(path)).astype(int)
            for path in (commands.folder / run / "prior").glob("*.png")
        }
        for run in ("one", "two")
    )
    assert len(one) == 5
    assert one.keys() == two.keys()
    assert all(abs(one[name] - two[name]).max() <= 1 for name in one)
    first, second = ([row["loss"] for row in losses(commands.folder / run) if "loss" in row] for run in ("one", "two"))
    assert second == pytest.approx(first, rel=1e-4)
