"""`ldm evaluate`: one page and metrics.json, whatever is missing; the library's figures; pictures drawn once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.latents import decode, encode
from autoencoder.model import load_autoencoder
from ldm.cli.evaluate import parse_sweep
from ldm.cli.main import main
from ldm.cli.reporting import find_data, parse_extractor
from ldm.data.fixed_batches import fixed_images
from ldm.data.images import to_tensor
from ldm.data.sources import DataConfig, open_source
from ldm.errors import UserError
from ldm.evaluation.drawing import PipelineDrawer
from ldm.evaluation.features import extract_features
from ldm.evaluation.frechet import fid
from ldm.evaluation.latent_features import LatentExtractor
from ldm.evaluation.manifold import manifold
from ldm.evaluation.statistics import Moments
from ldm.interchange.opening import open_pipeline
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline

COUNT = 10
HOSTILE = "<script>alert('a photo')</script>"


def save_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Smooth random pictures with captions; the first caption is hostile."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(HOSTILE if i == 0 else f"picture number {i}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("data") / "photos", COUNT)


@pytest.fixture(scope="module")
def small_folder(
    make_pipeline: Callable[..., LatentDiffusionPipeline], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of 16 px: its 256 features cost a hundredth of the 1,024 of the shared one."""
    pipeline = make_pipeline(NoiseConfig())
    pipeline.unet.register_to_config(sample_size=8)
    folder = tmp_path_factory.mktemp("models") / "small"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(
    models_open_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`ldm evaluate WORDS` into tmp_path/out with few steps; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, code: int = 0) -> str:
        shared = ["--out", "out", "--dtype", "fp32", "--device", "cpu", "--steps", "2", "--guidance", "1"]
        assert main(["evaluate", *map(str, words), *shared]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out + captured.err

    return call


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that are drawn from."""
    seeds: list[int] = []
    draw = PipelineDrawer.batch

    def counted(self: PipelineDrawer, told: Sequence) -> list[Image.Image]:
        seeds.extend(one.seed for one in told)
        return draw(self, told)

    monkeypatch.setattr(PipelineDrawer, "batch", counted)
    return seeds


def pictures(folder: Path) -> torch.Tensor:
    return torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in sorted(folder.glob("0*.png"))])


def test_a_report_without_any_weights_has_a_line_for_each_and_everything_else(
    evaluate: Callable[..., str], small_folder: Path, photos: Path, tmp_path: Path
) -> None:
    said = evaluate(
        small_folder, "--data", photos, "--count", COUNT, "--keep-images", "--sweep", "1,3", "--likelihood", 4
    )
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["missing"]) == {"image_metrics_inception", "alignment", "copying"}
    for line in metrics["missing"].values():
        assert line in said and "\n" not in line
    assert "weights-inception-2015-12-05-6726825d.safetensors" in metrics["missing"]["image_metrics_inception"]
    assert "--extractor inception=FILE" in metrics["missing"]["image_metrics_inception"]
    sections = {figure["section"] for figure in metrics["figures"]}
    assert sections == {"image_metrics_autoencoder", "reconstruction", "likelihood"}
    assert {"guidance_sweep", "likelihood", "reconstruction"} <= set(metrics)
    assert [point["guidance"] for point in metrics["guidance_sweep"]["points"]] == [1, 3]
    for figure in metrics["figures"]:
        assert {"n", "reference", "resolution", "resize_filter", "extractor", "interval"} <= set(figure)
    check_library_figures(metrics, small_folder, photos, out / "images" / "guidance-1")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert" in page
    assert page.index("no weights") < page.index("The autoencoder</h2>")
    assert "fewer than 10000" in page and "do not compare its FID with published ones" in page
    assert (out / "grid.png").is_file()


def test_trained_combinations_are_drawn_beside_held_out_ones(
    evaluate: Callable[..., str], small_folder: Path, photos: Path, tmp_path: Path
) -> None:
    scenes = tmp_path / "scenes.yaml"
    scenes.write_text("data: {source: scenes, resolution: 16, scenes: {count: 40, objects: [circle, square, star]}}\n")
    words = (small_folder, "--data", scenes, "--extractor", "autoencoder", "--count", 4, "--keep-images")
    said = evaluate(*words, "--trained", 3)
    assert "points behind trained ones" in said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    counted = {f["name"]: f["n"] for f in metrics["figures"] if f["name"] in ("objects", "trained_objects")}
    assert counted == {"objects": 4, "trained_objects": 3}
    assert set(metrics["combinations"]["points_behind"]) >= {"background", "objects", "colours", "everything"}
    assert len(list((tmp_path / "out" / "images" / "guidance-1").glob("*.png"))) == 7
    assert "--trained: found data.source folder" in evaluate(small_folder, "--data", photos, "--trained", code=2)
    assert "--trained: found -1" in evaluate(*words, "--trained", -1, code=2)


def check_library_figures(metrics: dict, model: Path, photos: Path, images: Path) -> None:
    """The figures in metrics.json are those of the library on the kept pictures."""
    pipeline = open_pipeline(model, dtype="fp32", device="cpu")
    extractor = LatentExtractor(pipeline.vae, 16)
    samples = extract_features(extractor, [pictures(images)]).features.pooled
    data = DataConfig(root=str(photos), resolution=16)
    real = extract_features(extractor, fixed_images(open_source(data), data, COUNT)).features.pooled
    found = {figure["name"]: figure for figure in metrics["figures"]}
    assert found["fid"]["value"] == pytest.approx(fid(samples, Moments.of(real), replicates=2).value, rel=1e-5)
    assert found["precision"]["value"] == manifold(samples, real).precision.value
    images = torch.cat(list(fixed_images(open_source(data), data, COUNT)))
    back = decode(pipeline.vae, encode(pipeline.vae, images).mean)
    rounded = [((each.clamp(-1, 1) + 1) * 127.5).round() / 255 for each in (images, back)]
    mse = (rounded[0] - rounded[1]).square().flatten(1).mean(1)  # [n]
    assert found["psnr"]["value"] == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-4)


def test_pictures_are_drawn_once_and_removed_unless_kept(
    evaluate: Callable[..., str], small_folder: Path, photos: Path, tmp_path: Path, drawn: list[int]
) -> None:
    words = (small_folder, "--data", photos, "--extractor", "autoencoder", "--keep-images")
    evaluate(*words, "--count", 8)
    assert drawn == list(range(8))
    before = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    evaluate(*words, "--count", 8)
    assert drawn == list(range(8))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8")) == before
    next((tmp_path / "out" / "images" / "guidance-1").glob("000003-*.png")).unlink()
    evaluate(*words[:-1], "--count", 8)
    assert drawn == [*range(8), 3]
    assert not (tmp_path / "out" / "images").exists()


def test_other_settings_are_refused_by_name(
    evaluate: Callable[..., str], small_folder: Path, photos: Path, tmp_path: Path
) -> None:
    words = (small_folder, "--data", photos, "--extractor", "autoencoder", "--keep-images", "--count", 6)
    evaluate(*words)
    said = evaluate(*words, "--scheduler", "euler", code=2)
    assert "scheduler: found euler, but the pictures in" in said and "were drawn with ddim" in said


def test_an_autoencoder_is_measured_too(
    evaluate: Callable[..., str], small_folder: Path, photos: Path, tmp_path: Path
) -> None:
    said = evaluate(small_folder / "vae", "--data", photos, "--resolution", 16, "--count", 6)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["kind"] == "autoencoder" and metrics["reconstruction"]["n"] == 6
    assert len(metrics["reconstruction"]["worst"]) == 6
    assert {figure["name"] for figure in metrics["figures"]} == {"psnr", "ssim"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "PSNR" in said and "LPIPS left out" in page and "rFID left out" in page
    assert (
        load_autoencoder(small_folder / "vae").config.latent_channels
        == metrics["reconstruction"]["latents"]["shape"][0]
    )
    assert "--sweep" in evaluate(small_folder / "vae", "--data", photos, "--sweep", "1,2", code=2)
    assert "--trained are for models" in evaluate(small_folder / "vae", "--data", photos, "--trained", code=2)


# --- Words of the command line ---------------------------------------------------------------------------------------


def test_extractors_are_named_by_kind_architecture_and_file() -> None:
    config = parse_extractor("openclip:ViT-B-32=/a/b=c")
    assert (config.kind, config.architecture, config.weights, config.download) == (
        "openclip",
        "ViT-B-32",
        "/a/b=c",
        False,
    )
    assert parse_extractor("autoencoder").weights is None
    with pytest.raises(UserError, match="kind: found 'inceptoin'"):
        parse_extractor("inceptoin=/x")
    with pytest.raises(UserError, match="architecture: found none for kind openclip"):
        parse_extractor("openclip=/x")


def test_sweeps_are_numbers() -> None:
    assert parse_sweep(None) == () and parse_sweep("1,2.5,1") == (1.0, 2.5)
    for text in ("", "1,,2", "a", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="--sweep: found"):
            parse_sweep(text)


def test_which_data_are_compared_with(tmp_path: Path) -> None:
    scenes = "{source: scenes, resolution: 32, scenes: {objects: [circle, square], held_out: 0.2%s}}"
    run = tmp_path / "run"
    run.mkdir()
    config = f"data: {scenes % ''}\nvalidation_data: {scenes % ', split: held_out'}\n"
    (run / "config.yaml").write_text(config, encoding="utf-8")
    own = find_data(None, run)
    assert own.name.startswith("validation_data of") and own.held_out
    assert own.config.scenes.split == "held_out" and own.training is not None and own.training.scenes.split == "train"
    assert own.vocabulary == own.training.scenes
    (run / "config.yaml").write_text(f"data: {scenes % ''}\nvalidation_data: null\n", encoding="utf-8")
    trained = find_data(None, run)
    assert trained.name.startswith("data of") and trained.name.endswith("(training images)") and not trained.held_out
    (tmp_path / "photos").mkdir()
    folder = find_data(tmp_path / "photos", run)
    assert folder.config.root == str(tmp_path / "photos") and folder.vocabulary is None and folder.held_out
    assert folder.training == trained.config
    assert find_data(run, tmp_path / "model").name == trained.name  # a run is as good as its config
    with pytest.raises(UserError, match="no such config"):
        find_data(None, tmp_path / "model")
    (run / "config.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="found no section 'data'"):
        find_data(None, run)
