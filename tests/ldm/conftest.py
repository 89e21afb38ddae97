"""Tiny random pipelines: every part real, 2 seconds to build, milliseconds to run."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import UNet2DConditionModel

from autoencoder.model import Autoencoder, AutoencoderConfig, build_autoencoder
from conditioning.label import LabelEncoder
from conditioning.semantic import SemanticEncoder
from conditioning.text import TextConfig, build_text_encoder
from ldm.cli.main import main
from ldm.growing import SpatialLayout
from ldm.interchange.opening import open_pipeline
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import make_scheduler
from ldm.unet import UNetConfig, build_unet

LimitFiles = Callable[[int], AbstractContextManager[None]]


@contextmanager
def _files_limited_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def files_limited_to() -> LimitFiles:
    """In `files_limited_to(size)` no file may grow beyond so many bytes: writing fails midway, as on a full disk."""
    return _files_limited_to


def build_pipeline(
    noise_config: NoiseConfig,
    scheduler: str = "dpm++",
    *,
    kind: Literal["kl", "vq"] = "kl",
    text: bool = True,
    inpainting: bool = False,
    semantic: bool = False,
    label: bool = False,
) -> LatentDiffusionPipeline:
    """16 x 16 latents of 32 px images (downsampling 2), a one-layer text tower, a two-level U-Net.

    Further conditions on wish: three classes of maps, two labels.

    Fresh networks give tiny outputs and hardly read the text, so the last layers are scaled to predictions of standard
    deviation 1 and images of 0.5, about what trained ones give, and cross-attention is made to count.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder_config = AutoencoderConfig(
            kind=kind, channels=(8, 16), latent_channels=4, norm_groups=4, layers_per_block=1, codebook_size=32
        )
        vae = build_autoencoder(autoencoder_config)
        text_config = TextConfig(encoder="trained", width=16, layers=1, heads=2, length=16)
        encoder = build_text_encoder(text_config) if text else None
        unet = build_unet(
            UNetConfig(channels=(16, 32), layers_per_block=1, attention=(False, True), heads=2, norm_groups=8),
            latent_channels=4,
            spatial_channels=SpatialLayout(inpainting, 5 if semantic else 0).channels(4),
            context_width=16 if text else None,
            sample_size=16,
            class_embedding_width=6 if label else None,
        )
        semantic_encoder = SemanticEncoder(("background", "circle", "square"), 5) if semantic else None
        label_encoder = LabelEncoder(("cat", "dog"), 6) if label else None
        _scale(vae, unet, 16 if text else None)
    pipeline = LatentDiffusionPipeline(
        vae,
        encoder,
        unet,
        make_scheduler(scheduler, noise_config),
        semantic_encoder=semantic_encoder,
        label_encoder=label_encoder,
        name="tiny",
    )
    return pipeline.to("cpu", torch.float32)


@torch.no_grad()
def _scale(vae: Autoencoder, unet: UNet2DConditionModel, width: int | None) -> None:
    for name, parameter in unet.named_parameters():
        if "attn2.to_out.0.weight" in name:
            parameter *= 5
    latents, timesteps = torch.randn(8, unet.config.in_channels, 16, 16), torch.arange(8) * 125
    context = None if width is None else torch.randn(8, 16, width)
    labels = torch.randn(8, 6) if unet.config.class_embed_type else None
    for last, outputs, wanted in (
        (unet.conv_out, unet(latents, timesteps, context, class_labels=labels).sample, 1.0),
        (vae.decoder.conv_out, vae.decode(latents[:, :4]).sample, 0.5),
    ):
        last.weight *= wanted / outputs.std()
        last.bias *= wanted / outputs.std()


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., LatentDiffusionPipeline]:
    """The function above, for tests that need a pipeline of their own."""
    return build_pipeline


@pytest.fixture(scope="session")
def tiny_pipeline() -> LatentDiffusionPipeline:
    """A v-prediction model with the cosine schedule. Shared: do not change it."""
    return build_pipeline(NoiseConfig())


@pytest.fixture(scope="session")
def conditioned_pipeline() -> LatentDiffusionPipeline:
    """The same with masks, maps and labels too. Shared: do not change it."""
    return build_pipeline(NoiseConfig(), inpainting=True, semantic=True, label=True)


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pipeline` as it is saved."""
    folder = tmp_path_factory.mktemp("models") / "shapes"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conditioned_folder(conditioned_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`conditioned_pipeline` as it is saved."""
    folder = tmp_path_factory.mktemp("models") / "conditioned"
    conditioned_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _opened() -> Callable[..., LatentDiffusionPipeline]:
    cached = functools.cache(open_pipeline)

    def opened(path: str | Path, **options: Any) -> LatentDiffusionPipeline:
        hashable = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return cached(str(path), **hashable)

    return opened


@pytest.fixture
def models_open_once(_opened: Callable[..., LatentDiffusionPipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the whole session open each model once."""
    monkeypatch.setattr("ldm.interchange.opening.open_pipeline", _opened)


@pytest.fixture
def drawing_command(
    models_open_once: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """`ldm NAME --model MODEL WORDS`, from tmp_path to tmp_path/out; returns what stderr says.

    A command that fails says one line (no bar, no traceback) and writes nothing.
    """
    monkeypatch.chdir(tmp_path)

    def call(name: str, model: Path, *words: str, steps: int = 2, code: int = 0) -> str:
        shared = ["--model", str(model), "--out", "out", "--dtype", "fp32", "--device", "cpu", "--steps", str(steps)]
        assert main([name, *shared, *words]) == code
        error = capsys.readouterr().err
        if code:
            assert error.startswith(f"ldm {name}: ") and error.count("\n") == 1
            assert not (tmp_path / "out").exists()
        return error

    return call
