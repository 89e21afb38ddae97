"""Extractors and the statistics kept of a reference: what they see, what they refuse, what stays the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from autoencoder import Autoencoder, AutoencoderConfig, build_autoencoder, encode, to_unet
from ldm.data.images import to_tensor
from ldm.data.scene_rendering import render_image
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.errors import UserError
from ldm.evaluation.extractors import ExtractorConfig, open_extractor
from ldm.evaluation.features import FeatureSet, extract_features, resized
from ldm.evaluation.image_metrics import measure_images
from ldm.evaluation.inception import WEIGHTS as INCEPTION_FILES
from ldm.evaluation.latent_features import LatentExtractor
from ldm.evaluation.reference import cached_reference, load_reference, make_reference, provenance_of, save_reference
from ldm.evaluation.scene_features import SceneExtractor

SCENES = ScenesConfig()


def scenes(first: int, count: int, side: int = 32) -> Tensor:
    return torch.stack([to_tensor(render_image(scene_at(SCENES, first + i), side)) for i in range(count)])


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        latent_channels=3, channels=(8, 8), layers_per_block=1, mid_attention=False, norm_groups=4
    )
    return build_autoencoder(config).eval()


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    """Random weights of the right names and shapes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    patch.setattr(torch, "load", lambda *_, **__: {})
    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3("tiny", ["2048"], feature_extractor_weights_path="none")
    patch.undo()
    return network.state_dict()


# --- Resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "target"), [(64, 32), (48, 32), (32, 75)])
def test_the_resize_filter_is_pillows_but_for_rounding(side: int, target: int) -> None:
    image = render_image(scene_at(SCENES, 3), side)
    pillow = to_tensor(image.resize((target, target), Image.Resampling.BICUBIC)) / 2 + 0.5
    found = resized(to_tensor(image)[None], target)[0]
    assert (found - pillow).abs().max() <= 1.6 / 255
    assert found.min() >= 0 and found.max() <= 1


def test_images_are_seen_as_they_would_be_saved() -> None:
    images = torch.rand(2, 3, 16, 16) * 2.4 - 1.2
    seen = resized(images, 16)
    assert torch.equal(seen, (images.clamp(-1, 1) * 127.5 + 127.5).round() / 255)


# --- Extractors ------------------------------------------------------------------------------------------------------


def test_latents_are_features(autoencoder: Autoencoder) -> None:
    images = scenes(0, 3)
    extractor = open_extractor(ExtractorConfig(kind="autoencoder"), resolution=32, autoencoder=autoencoder)
    with torch.no_grad():
        expected = to_unet(autoencoder, encode(autoencoder, resized(images, 32) * 2 - 1).mean).flatten(1)
    assert torch.allclose(extractor.extract(images).pooled, expected, atol=1e-6)
    assert extractor.extract(scenes(0, 2, 64)).pooled.shape == expected[:2].shape
    large = LatentExtractor(autoencoder, 256).extract(torch.zeros(1, 3, 256, 256)).pooled
    assert 0 < large.shape[1] <= 1024


def test_scene_attributes_are_features() -> None:
    one = ScenesConfig(objects=("circle", "square"), colours=("red", "blue"), backgrounds=("white", "black"))
    extractor = open_extractor(ExtractorConfig(kind="scenes"), resolution=32, scenes=one)
    assert isinstance(extractor, SceneExtractor)
    features = torch.cat([extractor.extract(scene_image(one, i)).pooled for i in range(8)])
    for row, scene in zip(features, (scene_at(one, i) for i in range(8)), strict=True):
        (thing,) = scene.objects
        named = [scene.background == "white", scene.background == "black", thing.name == "circle"]
        named += [thing.name == "square", thing.colour == "red", thing.colour == "blue"]
        assert row[:6].tolist() == [float(each) for each in named]
        assert row[-1] == 1
    assert extractor.weights != SceneExtractor(SCENES, 32).weights


def scene_image(config: ScenesConfig, index: int) -> Tensor:
    return to_tensor(render_image(scene_at(config, index), 32))[None]


def test_inception_gives_pooled_spatial_and_logits(inception_state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(inception_state, tmp_path / INCEPTION_FILES[0])
    extractor = open_extractor(ExtractorConfig(kind="inception", weights=str(tmp_path)), resolution=32)
    images = scenes(0, 1)
    features = extractor.extract(images)
    assert features.pooled.shape == (1, 2048)
    assert features.spatial is not None and features.spatial.shape == (1, 7 * 17 * 17)
    assert features.logits is not None and features.logits.shape == (1, 1008)
    torch.save(inception_state, tmp_path / "own.pth")
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "own.pth"))
    pixels = (resized(images, 299) * 255).round().to(torch.uint8)
    assert torch.equal(features.pooled, theirs(pixels)[0])
    assert extractor.weights != ""


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Iterator[Path]:
    """An open_clip architecture of our own, and a folder with random weights for it."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    yield tmp_path
    open_clip.factory._MODEL_CONFIG_PATHS.pop()
    open_clip.factory._MODEL_CONFIGS.pop("tiny-test")


def test_open_clip_features_are_the_image_embeddings(tiny_clip: Path) -> None:
    config = ExtractorConfig(kind="openclip", architecture="tiny-test", weights=str(tiny_clip))
    extractor = open_extractor(config, resolution=32)
    model, preprocess = open_clip.create_model_from_pretrained("tiny-test", str(tiny_clip / "model.safetensors"))
    picture = render_image(scene_at(SCENES, 1), 32)  # of the model's size: nothing is resized
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(picture)[None])
    assert extractor.resolution == 32
    assert torch.allclose(extractor.extract(to_tensor(picture)[None]).pooled, expected, atol=1e-5)


def test_timm_features_are_those_before_the_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    config = ExtractorConfig(kind="timm", architecture="test_resnet", weights=str(tmp_path / "w.safetensors"))
    extractor = open_extractor(config, resolution=32)
    data = timm.data.resolve_model_data_config(network)
    images = scenes(0, 2)
    pixels = resized(images, data["input_size"][-1])
    mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        plain = network.eval().forward_head(network.forward_features((pixels - mean) / std), pre_logits=True)
    assert torch.allclose(extractor.extract(images).pooled, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExtractorConfig(kind="inception"), r"weights-inception-2015-12-05-6726825d\.safetensors.*folder"),
        (ExtractorConfig(kind="inception", weights="nowhere"), r"found no file nowhere; put weights-inception"),
        (ExtractorConfig(kind="openclip", architecture="ViT-B-32"), r"open_clip_model\.safetensors"),
        (ExtractorConfig(kind="openclip", architecture="ViT-B-32", weights="laion2b_s34b_b79k"), "found no file"),
        (ExtractorConfig(kind="openclip", architecture="nonsense"), "no such architecture"),
        (ExtractorConfig(kind="timm", architecture="resnet50"), r"model\.safetensors"),
        (ExtractorConfig(kind="timm", architecture="nonsense"), "no such architecture"),
        (ExtractorConfig(kind="autoencoder"), "no autoencoder"),
        (ExtractorConfig(kind="scenes"), "built-in scenes"),
    ],
)
def test_missing_weights_are_one_line_that_says_what_to_put_where(config: ExtractorConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_extractor(config, resolution=32)
    assert "\n" not in str(error.value)


def test_weights_that_are_pickles_or_do_not_fit_are_refused(inception_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"some": torch.zeros(1)}, tmp_path / INCEPTION_FILES[1])
    with pytest.raises(UserError, match="allow_pickle"):
        open_extractor(ExtractorConfig(kind="inception", weights=str(tmp_path)), resolution=32)
    with pytest.raises(UserError, match="do not fit"):
        open_extractor(ExtractorConfig(kind="inception", weights=str(tmp_path), allow_pickle=True), resolution=32)
    torch.save(Path("dangerous"), tmp_path / INCEPTION_FILES[1])
    with pytest.raises(UserError, match="inception"):
        open_extractor(ExtractorConfig(kind="inception", weights=str(tmp_path), allow_pickle=True), resolution=32)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"kind": "vgg"}, "kind"), ({"kind": "timm"}, "architecture"), ({"architecture": "x"}, "architecture")],
)
def test_a_config_checks_itself(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: found"):
        ExtractorConfig(**values)


# --- Sets of features and references ---------------------------------------------------------------------------------


def test_the_features_of_a_set_do_not_depend_on_its_batches(autoencoder: Autoencoder) -> None:
    extractor, images = LatentExtractor(autoencoder, 32), scenes(0, 7)
    whole, parts = extract_features(extractor, [images]), extract_features(extractor, images.split(3))
    assert len(whole) == 7 and whole.resolution == 32
    assert torch.allclose(whole.features.pooled, parts.features.pooled, atol=1e-6)


def test_no_images_and_images_of_two_sizes_are_refused(autoencoder: Autoencoder) -> None:
    extractor = LatentExtractor(autoencoder, 32)
    with pytest.raises(UserError, match="found 0 images"):
        extract_features(extractor, [])
    with pytest.raises(UserError, match="32 x 32, 64 x 64"):
        extract_features(extractor, [scenes(0, 1), scenes(0, 1, 64)])


@pytest.fixture(scope="module")
def seen(autoencoder: Autoencoder) -> FeatureSet:
    return extract_features(LatentExtractor(autoencoder, 16), [scenes(0, 12, 16)])


def test_a_reference_survives_its_file(seen: FeatureSet, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    reference = make_reference(seen, "scenes", "fingerprint")
    save_reference(path, reference)
    found = load_reference(path, reference.provenance)
    assert (found.name, found.provenance, len(found)) == ("scenes", reference.provenance, 12)
    assert torch.equal(found.rows, reference.rows)
    assert torch.equal(found.pooled.covariance(), reference.pooled.covariance())
    assert list(tmp_path.iterdir()) == [path]


def test_a_reference_of_something_else_is_refused_by_name(
    seen: FeatureSet, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    path = tmp_path / "reference.safetensors"
    reference = make_reference(seen, "scenes", "fingerprint")
    save_reference(path, reference)
    expected = provenance_of(LatentExtractor(autoencoder, 16), "fingerprint", 12, 16)
    assert expected == reference.provenance
    others: dict[str, Any] = {"data": "another", "count": 11, "resolution": 32, "extractor": "x", "weights": "y"}
    others |= {"extractor_resolution": 8, "resize_filter": "lanczos"}
    assert set(others) == set(vars(expected))
    for field, value in others.items():
        with pytest.raises(UserError, match=f"made with {field} = "):
            load_reference(path, replace(expected, **{field: value}))
    calls: list[int] = []

    def make() -> Any:
        calls.append(1)
        return reference

    assert len(cached_reference(path, expected, make)) == 12 and not calls
    assert len(cached_reference(tmp_path / "new.safetensors", expected, make)) == 12 and calls == [1]
    with pytest.raises(UserError, match="expected"):
        cached_reference(tmp_path / "third.safetensors", replace(expected, count=13), make)
    assert not (tmp_path / "third.safetensors").exists()


def test_a_broken_reference_is_one_line(seen: FeatureSet, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    reference = make_reference(seen, "scenes", "fingerprint")
    save_reference(path, reference)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="reference statistics"):
        load_reference(path, reference.provenance)
    save_file({"rows": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="made with format = None"):
        load_reference(path, reference.provenance)


def test_all_figures_of_a_set_of_images(seen: FeatureSet) -> None:
    reference = make_reference(seen, "scenes", "fingerprint")
    found = {one.name: one for one in measure_images(seen, reference, replicates=3)}
    assert set(found) == {"fid", "kid", "precision", "recall", "density", "coverage"}  # no classifier, no spatial layer
    assert found["fid"].value == pytest.approx(0, abs=1e-6)
    assert found["precision"].value == 1
    for one in found.values():
        assert one.setting.n == one.setting.reference_n == 12
        assert all(
            word in one.line() for word in ("n = 12", "16 px", "scenes (12 images)", "autoencoder latents", "bicubic")
        )
    features = replace(seen.features, spatial=seen.features.pooled, logits=seen.features.pooled)
    full = replace(seen, features=features)
    found = {one.name: one for one in measure_images(full, make_reference(full, "scenes", "f"), replicates=3)}
    assert found["sfid"].value == pytest.approx(0, abs=1e-6)
    assert found["inception_score"].setting.reference is None

    moved = replace(full, features=replace(features, spatial=2 * seen.features.pooled + 1))
    found = {one.name: one for one in measure_images(moved, make_reference(full, "scenes", "f"), replicates=3)}
    stats = [fid_features_to_statistics(one.features.spatial.double()) for one in (moved, full)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert found["sfid"].value == pytest.approx(theirs, rel=1e-4)
    assert found["fid"].value == pytest.approx(0, abs=1e-6)


def test_samples_seen_otherwise_than_the_reference_are_refused(seen: FeatureSet) -> None:
    reference = make_reference(seen, "scenes", "fingerprint")
    for field, value in {"resolution": 99, "weights": "other", "resize_filter": "x", "extractor": "y"}.items():
        with pytest.raises(UserError, match=f"^{field}: found"):
            measure_images(replace(seen, **{field: value}), reference)
