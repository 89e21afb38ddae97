"""What the two stages promise, by their real entry points called in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import LDM, ROOT, SCENES, VAE, checkpoint_tensors, losses

import train_ldm
import train_vae
from autoencoder import decode, encode, load_autoencoder
from ldm import LatentDiffusionPipeline
from ldm.adapters import load_lora
from ldm.data.fixed_batches import fixed_images
from ldm.data.scenes import ScenesConfig
from ldm.data.scenes_folder import write_scenes
from ldm.data.sources import DataConfig, open_source
from ldm.errors import UserError


def train_stage_1(commands, *overrides, **changes):
    config = commands.write_config("vae.yaml", {**VAE, "out": str(commands.folder / "vae"), **changes})
    train_vae.train_autoencoder(config, list(overrides))
    return commands.folder / "vae"


def train_stage_2(commands, autoencoder, *overrides, out="ldm", **changes):
    autoencoder = autoencoder and str(autoencoder)
    values = {**LDM, "out": str(commands.folder / out), "autoencoder": autoencoder, **changes}
    train_ldm.train_diffusion(commands.write_config("ldm.yaml", values), list(overrides))
    return commands.folder / out


def scene_images(count=24):
    data = DataConfig(source="scenes", resolution=16, scenes=ScenesConfig(**_tuples(SCENES["scenes"])))
    return torch.cat(list(fixed_images(open_source(data), data, count)))


def _tuples(values):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_saved_autoencoder_has_unit_latents_and_the_reconstructions_of_the_report(commands, kind):
    vq = {"kind": "vq", "codebook_size": 16} if kind == "vq" else {}
    run = train_stage_1(commands, autoencoder={**VAE["autoencoder"], **vq}, statistics_images=24, report_images=24)
    autoencoder = load_autoencoder(run / "autoencoder").eval()
    images = scene_images()
    with torch.no_grad():
        moments = encode(autoencoder, images)
        reconstructions = decode(autoencoder, moments.mean)
    variance = moments.mean.var(dim=(0, 2, 3)) + moments.logvar.exp().mean(dim=(0, 2, 3))
    assert moments.mean.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (variance.sqrt() - 1).abs().max() < 0.05
    assert autoencoder.config.scaling_factor == 1.0
    report = json.loads((run / "report.json").read_text())
    error = ((reconstructions.clamp(-1, 1) - images) / 2).square().mean(dim=(1, 2, 3))
    assert report["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=0.05)
    assert report["measured_on"].startswith("training images")
    assert (run / "report.png").stat().st_size > 1000


def test_folding_leaves_the_trained_weights_alone(commands):
    run = train_stage_1(commands)
    before = checkpoint_tensors(run, 8)
    train_stage_1(commands, "training.steps=9")
    again = commands.folder / "again"
    config = commands.write_config("vae.yaml", {**VAE, "out": str(again), "training": {**VAE["training"], "steps": 8}})
    train_vae.train_autoencoder(config, [])
    after = checkpoint_tensors(again, 8)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_decoder_only_training_leaves_the_latents_alone(commands, small_autoencoder):
    run = train_stage_1(commands, train="decoder", autoencoder={"pretrained": str(small_autoencoder)})
    old, new = load_autoencoder(small_autoencoder), load_autoencoder(run / "autoencoder")
    images = scene_images(4)
    with torch.no_grad():
        assert torch.equal(encode(old.eval(), images).mean, encode(new.eval(), images).mean)
    assert not torch.equal(old.decoder.conv_out.weight, new.decoder.conv_out.weight)
    assert new.config.scaling_factor == old.config.scaling_factor


@pytest.mark.parametrize(
    "noise",
    [
        {"schedule": "linear", "prediction": "epsilon"},
        {"schedule": "scaled_linear", "prediction": "sample"},
        {"schedule": "cosine", "prediction": "v_prediction", "zero_terminal_snr": True},
        {"schedule": "flow", "prediction": "flow"},
    ],
)
def test_every_prediction_trains_and_draws(commands, small_autoencoder, noise):
    sampling = {"timestep_sampling": "logit_normal" if noise["schedule"] == "flow" else "uniform"}
    run = train_stage_2(commands, small_autoencoder, noise=noise, objective=sampling)
    pipeline = LatentDiffusionPipeline.from_pretrained(run / "pipeline")
    images = pipeline("a red circle on a white background", num_inference_steps=3, seed=1, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    assert images.isfinite().all()
    assert (run / "samples" / "step-8.png").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] > 0 for row in rows if "loss" in row)
    assert any("validation/loss" in row for row in rows)


def test_a_vq_model_and_a_model_without_text(commands):
    autoencoder = train_stage_1(commands, autoencoder={**VAE["autoencoder"], "kind": "vq", "codebook_size": 16})
    run = train_stage_2(commands, autoencoder / "autoencoder", conditions={"text": {"encoder": "none"}})
    pipeline = LatentDiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipeline("", num_inference_steps=2, seed=0).images[0].size == (16, 16)
    with pytest.raises(UserError, match="no text encoder"):
        pipeline("a circle", num_inference_steps=2)


def test_diffusers_alone_draws_the_same_image(commands, small_run):
    latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    save_file({"latents": latents}, commands.folder / "latents.safetensors")
    script = commands.folder / "alone.py"
    script.write_text(
        f"""
import sys
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
pipeline = StableDiffusionPipeline.from_pretrained({str(small_run / "pipeline")!r})
latents = load_file("latents.safetensors")["latents"]
prompts = ["a red circle on a white background", "a blue square on a black background"]
images = pipeline(prompts, latents=latents, num_inference_steps=5, guidance_scale=4.0, output_type="pt").images
assert not {{"ldm", "autoencoder", "conditioning"}} & sys.modules.keys()
save_file({{"images": images.contiguous()}}, "images.safetensors")
"""
    )
    commands.run(sys.executable, script)
    prompts = ["a red circle on a white background", "a blue square on a black background"]
    pipeline = LatentDiffusionPipeline.from_pretrained(small_run / "pipeline", dtype="fp32")
    ours = pipeline(prompts, latents=latents, num_inference_steps=5, guidance_scale=4.0, output_type="pt").images
    theirs = load_file(commands.folder / "images.safetensors")["images"]
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.fixture
def folder_of_scenes(commands):
    write_scenes(ScenesConfig(**_tuples(SCENES["scenes"])), 16, commands.folder / "scenes", 24, progress=False)
    return commands.folder / "scenes"


def test_bad_files_are_quarantined_and_too_many_stop_the_run(commands, folder_of_scenes):
    for name in ("000003.png", "000007.png"):
        (folder_of_scenes / "images" / name).write_bytes(b"not an image")
    data = {"source": "folder", "root": str(folder_of_scenes), "resolution": 16, "max_bad_share": 0.1}
    run = train_stage_1(commands, data=data)
    quarantined = [json.loads(line)["key"] for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(key).name for key in quarantined) == ["000003.png", "000007.png"]
    autoencoder = str(run / "autoencoder")
    second = train_stage_2(commands, autoencoder, data=data)  # with the cache, which has recorded them
    assert len((second / "quarantine.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"more than data\.max_bad_share 0\.05 allows"):
        train_stage_1(commands, f"out={commands.folder / 'strict'}", data={**data, "max_bad_share": 0.05})


def test_a_loss_that_is_not_finite_stops_before_the_update(commands):
    with pytest.raises(UserError, match=r"step \d: .*; stopped before the update"):
        train_stage_1(commands, "optimiser.lr=1e30", "optimiser.clip=0", "training.checkpoint_every=1")
    saved = sorted((commands.folder / "vae" / "checkpoints").iterdir())[-1]
    weights = load_file(saved / "autoencoder.safetensors")
    assert saved.name != "step-8"
    assert all(weight.isfinite().all() for weight in weights.values())


def test_checkpoints_are_safetensors_only(small_run):
    files = {file.suffix for file in (small_run / "checkpoints").rglob("*") if file.is_file()}
    assert files == {".safetensors", ".json"}
    assert not list(small_run.rglob("*.bin"))
    assert ROOT not in small_run.parents


def test_tensorboard_shows_losses_and_pictures(small_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(small_run / "logs"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "gradient_norm/unet", "images_per_second", "validation/loss"} <= set(tags["scalars"])
    assert tags["images"] == ["samples"]
    assert [event.step for event in events.Scalars("loss")] == list(range(8))


def test_bf16_keeps_weights_and_optimiser_in_fp32(commands):
    config = commands.write_config("vae.yaml", {**VAE, "out": "run"})
    result = commands.train("vae", config, "runtime.precision=bf16", "training.steps=3")
    assert "bf16" in result.stderr
    tensors = checkpoint_tensors(commands.folder / "run", 3)
    assert {t.dtype for (file, _), t in tensors.items() if file.endswith(("autoencoder", "discriminator", "ema"))} <= {
        torch.float32,
        torch.int64,  # the average's own counter
    }
    assert {t.dtype for (file, _), t in tensors.items() if file.endswith("optimiser")} == {torch.float32}


def test_gradient_checkpointing_changes_memory_not_the_loss(commands, small_autoencoder):
    plain = train_stage_2(commands, small_autoencoder, out="plain")
    spared = train_stage_2(commands, small_autoencoder, "unet.gradient_checkpointing=true", out="spared")
    curves = [[row["loss"] for row in losses(run) if "loss" in row] for run in (plain, spared)]
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_lpips_from_a_local_file_trains_and_is_reported(commands):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    trunk = {f"features.{name}": value for name, value in alexnet(weights=None).features.state_dict().items()}
    save_file(trunk, commands.folder / "alexnet.safetensors")
    lpips = {
        "perceptual": "lpips",
        "lpips_network": "alex",
        "lpips_weights": str(commands.folder / "alexnet.safetensors"),
    }
    data = {**SCENES, "resolution": 64}
    run = train_stage_1(commands, "training.steps=2", data=data, loss=lpips, discriminator={"weight": 0})
    assert json.loads((run / "report.json").read_text())["lpips"] > 0
    assert all(row["perceptual"] > 0 for row in losses(run) if "perceptual" in row)


@pytest.mark.slow
def test_a_compiled_unet_has_the_same_loss(commands, small_autoencoder):
    plain = train_stage_2(commands, small_autoencoder, out="plain")
    compiled = train_stage_2(commands, small_autoencoder, "compile=true", out="compiled")
    curves = [[row["loss"] for row in losses(run) if "loss" in row] for run in (plain, compiled)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_labels_alone_from_class_folders_and_then_text_free_drawing(commands, small_autoencoder):
    source = open_source(DataConfig(source="scenes", resolution=16, scenes=ScenesConfig(**_tuples(SCENES["scenes"]))))
    for index in range(12):
        sample = source.read(index)
        folder = commands.folder / "data" / ("even" if index % 2 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        sample.image.save(folder / f"{index}.png")
    run = train_stage_2(
        commands,
        small_autoencoder,
        data={"source": "folder", "root": str(commands.folder / "data"), "resolution": 16},
        conditions={"text": {"encoder": "none"}, "label": {"width": 8, "dropout": 0.2}},
    )
    pipeline = LatentDiffusionPipeline.from_pretrained(run / "pipeline")
    assert pipeline.conditions == ("label",)
    assert pipeline.label_encoder.classes == ("even", "odd")
    settings = {"num_inference_steps": 2, "seed": 0, "output_type": "latent", "scheduler": "ddim"}
    even, odd, none = (pipeline(label=label, **settings).images for label in ("even", 1, None))
    assert not torch.equal(even, odd)
    assert not torch.equal(even, none)


def test_a_model_grows_by_the_config_and_starts_where_it_was(commands, small_autoencoder, small_run):
    grown = train_stage_2(
        commands,
        small_autoencoder,
        "training.steps=1",
        "optimiser.lr=1e-30",  # one step that moves nothing
        conditions={
            "text": {"encoder": "clip", "pretrained": str(small_run / "pipeline"), "length": 12},
            "semantic": {"channels": 3},
            "inpainting": {"masks": "boxes"},
            "label": {"width": 8},
        },
        unet={"pretrained": str(small_run / "pipeline")},
        ema_decay=0,
    )
    before, after = (LatentDiffusionPipeline.from_pretrained(run / "pipeline") for run in (small_run, grown))
    assert before.conditions == ("text",)
    assert after.conditions == ("inpainting", "semantic", "label", "text")
    settings = {"num_inference_steps": 3, "seed": 0, "output_type": "latent", "scheduler": "ddim"}
    drawn = after("a red circle", label=1, semantic_map=torch.ones(16, 16).long(), guidance_scale=1, **settings).images
    assert torch.allclose(drawn, before("a red circle", guidance_scale=1, **settings).images, atol=1e-5)


def test_a_model_is_trained_further_with_all_its_own_parts(commands, small_run):
    start = small_run / "pipeline"
    further = train_stage_2(
        commands,
        None,
        "training.steps=2",
        model=str(start),
        conditions={"text": {"encoder": "model"}, "semantic": {"channels": 3}},
        unet={},
    )
    before, after = (LatentDiffusionPipeline.from_pretrained(folder) for folder in (start, further / "pipeline"))
    assert after.conditions == ("semantic", "text")
    for name in ("vae", "text_encoder"):
        old, new = (getattr(pipeline, name).state_dict() for pipeline in (before, after))
        assert all(torch.equal(old[key], new[key]) for key in old), name
    assert not torch.equal(before.unet.conv_out.weight, after.unet.conv_out.weight)
    noise = ("prediction_type", "beta_schedule", "num_train_timesteps", "rescale_betas_zero_snr")
    assert all(before.noise_scheduler.config[key] == after.noise_scheduler.config[key] for key in noise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": None}, "autoencoder: found nothing"),
        ({"model": "M"}, "conditions.text.encoder: found trained; allowed is model or none"),
        ({"conditions": {"text": {"encoder": "model"}}}, "conditions.text.encoder: found model; allowed is clip"),
        ({"model": "M", "unet": {"pretrained": "M"}}, "unet.pretrained: found beside model"),
    ],
)
def test_a_base_model_and_new_parts_exclude_each_other(commands, changes, message):
    with pytest.raises(UserError) as error:
        train_stage_2(commands, *(() if "autoencoder" in changes else ("A",)), **changes)
    assert message in str(error.value)


def test_a_lora_is_trained_saved_loaded_and_exported(commands, small_run, capsys):
    from ldm.cli.main import main

    start = small_run / "pipeline"
    run = train_stage_2(
        commands,
        None,
        "training.steps=3",
        model=str(start),
        conditions={"text": {"encoder": "model"}},
        unet={},
        lora={"rank": 2, "text_encoder": True},
        ema_decay=0,
        training={**LDM["training"], "validate_first": True},
    )
    assert {path.name for path in (run / "samples").iterdir()} == {"step-0.png", "step-3.png"}
    checkpoint = {name for _, name in checkpoint_tensors(run, 3)}
    assert all("lora_" in name for name in checkpoint if "optimization_step" not in name)
    base, merged = (LatentDiffusionPipeline.from_pretrained(at, dtype="fp32") for at in (start, run / "pipeline"))
    settings = {"num_inference_steps": 3, "seed": 0, "output_type": "latent", "scheduler": "ddim"}
    wanted = merged("a red circle", **settings).images
    assert not torch.allclose(base("a red circle", **settings).images, wanted, atol=1e-4)
    load_lora(base.unet, base.text_encoder.model, run / "lora.safetensors")
    assert torch.allclose(base("a red circle", **settings).images, wanted, atol=1e-4)

    kohya = commands.folder / "kohya.safetensors"
    assert main(["export", str(run), "--to", "kohya-lora", "--out", str(kohya)]) == 0
    assert {key.split("_")[1] for key in load_file(kohya)} == {"unet", "te"}
    single = commands.folder / "model.safetensors"
    assert main(["export", str(run), "--to", "single-file", "--out", str(single)]) == 0
    words = ("--prompt", "a red circle", "--steps", "3", "--seed", "0", "--scheduler", "ddim", "--out")
    pictures = []
    for name, model in (
        ("merged", [str(run)]),
        ("single", [str(single)]),
        ("lora", [str(start), "--lora", f"{kohya}=1"]),
    ):
        assert main(["generate", "--model", *model, *words, str(commands.folder / name)]) == 0, capsys.readouterr().err
        (path,) = (commands.folder / name).glob("0*.png")
        pictures.append(np.asarray(Image.open(path)).astype(int))
    merged_picture, single_picture, lora_picture = pictures
    assert abs(single_picture - merged_picture).max() <= 1
    assert abs(lora_picture - merged_picture).max() <= 1


def test_a_lora_beside_new_conditions_trains_the_new_channels_too(commands, small_run):
    start = small_run / "pipeline"
    run = train_stage_2(
        commands,
        None,
        "training.steps=3",
        model=str(start),
        conditions={"text": {"encoder": "model"}, "semantic": {"channels": 3}},
        unet={},
        lora={"rank": 2},
        ema_decay=0,
    )
    grown = LatentDiffusionPipeline.from_pretrained(run / "pipeline")
    assert grown.conditions == ("semantic", "text")
    assert grown.unet.conv_in.weight[:, 2:].abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 2}}, "lora: found without model"),
        ({"model": "M", "lora": {"dropout": 0.1}}, "lora.dropout: found 0.1; allowed is 0"),
    ],
)
def test_loras_that_cannot_be_trained_are_refused(commands, changes, message):
    with pytest.raises(UserError) as error:
        train_stage_2(commands, "A", **changes)
    assert message in str(error.value)
