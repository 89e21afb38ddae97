"""Single sections on known pictures: copies beside what they copy, prompts by their score, codebooks by their use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.data.scenes import ScenesConfig, is_held_out
from ldm.data.sources import DataConfig
from ldm.errors import UserError
from ldm.evaluation.copying import LEAST_HELD_OUT
from ldm.evaluation.features import Features
from ldm.evaluation.report_alignment import alignment_section
from ldm.evaluation.report_copying import (
    CopySearch,
    copying_section,
    search_copies,
    through_autoencoder,
    unseen_images,
)
from ldm.evaluation.report_data import ReportData, numbered_images, open_data, picture_at, told_samples, told_scenes
from ldm.evaluation.report_reconstruction import reconstruction_section
from ldm.evaluation.report_scenes import combinations_section, scene_figures
from ldm.evaluation.scenes import SceneScore
from ldm.noise import NoiseConfig
from ldm.picture import to_pil
from ldm.pipeline import LatentDiffusionPipeline

SCENES = ScenesConfig(max_objects=2, count=150)
TRAINING = DataConfig(source="scenes", resolution=32, scenes=SCENES)
HELD_OUT = DataConfig(source="scenes", resolution=32, scenes=replace(SCENES, split="held_out"))
DATA = ReportData(name="held-out scenes", config=HELD_OUT, vocabulary=SCENES, training=TRAINING)


class Corner:
    """An extractor of 48 numbers: the picture at 4 x 4 pixels."""

    name, weights, resolution, resize_filter = "corner", "0" * 16, 4, "area"

    def extract(self, images: Tensor) -> Features:
        return Features(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))


class Words:
    """A joint space in which a picture's red says whether it shows the prompt."""

    name, weights, resolution, resize_filter = "words", "0" * 16, 8, "none"

    def embed_images(self, images: Tensor) -> Tensor:
        red = images[:, 0].mean((1, 2)) / 2 + 0.5
        return torch.stack([red, (1 - red**2).sqrt()], dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(texts), 2)


def test_copies_are_shown_beside_what_they_copy(
    make_pipeline: Callable[..., LatentDiffusionPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.evaluation.report_copying.HELD_OUT", LEAST_HELD_OUT)
    autoencoder = make_pipeline(NoiseConfig()).vae
    source = open_data(TRAINING)
    ((numbers, images),) = numbered_images(source, TRAINING, [7, 149, 33], 8)
    assert numbers == [7, 149, 33]
    assert picture_at(source, TRAINING, 33).tobytes() == to_pil(images)[2].tobytes()
    with torch.no_grad():
        copies = through_autoencoder(autoencoder)(images)

    def search(data: ReportData, most: int) -> CopySearch:
        return search_copies(Corner(), [copies], data, autoencoder=autoencoder, most=most, seed=0)

    made = copying_section(search(DATA, 10_000), lambda i: to_pil(copies)[i], 32)
    assert made.values["copies"] is True and made.values["n"] == 3 and made.values["training"] == 150
    assert made.figures[0].value == 1.0 and made.verdict.startswith("COPIES")
    for sample, training in enumerate(numbers):
        assert f"sample {sample} | training {training}: 0.0/255 apart" in made.content
    assert made.content.count('<figure class="shown"') == 3
    partly = copying_section(search(DATA, 30), lambda i: to_pil(copies)[i], 32)
    assert "Only 30 of 150 training images were compared" in partly.verdict
    with pytest.raises(UserError, match="found no training images apart from held-out ones"):
        search(replace(DATA, training=None), 9)


def test_images_that_the_model_has_not_seen_are_of_the_training_sets_kind() -> None:
    fresh = unseen_images(DATA)
    assert fresh is not None and fresh.scenes.split == "train" and fresh.scenes.seed != SCENES.seed
    seen, unseen = open_data(TRAINING), open_data(fresh)
    assert len(unseen) >= 100
    assert sum(seen.read(i).image == unseen.read(i).image for i in range(20)) == 0
    photos = DataConfig(root="photos")
    assert unseen_images(replace(DATA, config=photos, training=replace(photos, root="others"))) == photos
    assert unseen_images(replace(DATA, config=photos, training=photos, held_out=False)) is None


def test_prompts_are_listed_the_worst_first() -> None:
    images = torch.full((3, 3, 8, 8), -1.0)
    images[0, 0], images[1, 0], images[2, 0] = 1.0, 0.0, -1.0
    prompts = ["red", "half red", "<b>not red</b>"]
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
    made = alignment_section(Words(), [images], prompts, lambda i: pictures[i], seed=0)
    rows = made.values["prompts"]
    assert [row["prompt"] for row in rows] == ["<b>not red</b>", "half red", "red"]
    assert [row["clip_score"] for row in rows] == pytest.approx([0, 50, 100], abs=1e-4)
    assert made.figures[0].value == pytest.approx(50, abs=1e-4)
    assert "&lt;b&gt;not red" in made.content and "<b>not" not in made.content


def test_the_codebook_of_a_vq_autoencoder_is_told(make_pipeline: Callable[..., LatentDiffusionPipeline]) -> None:
    autoencoder = make_pipeline(NoiseConfig(), kind="vq").vae
    made = reconstruction_section(autoencoder, DATA, open_data(HELD_OUT), 6, {}, None, 0)
    use = made.values["codebook"]
    assert use["codes"] == 32 and 1 <= use["perplexity"] <= use["used"] <= 32
    assert f"{use['used']} of 32 codes" in made.verdict and "perplexity" in made.content
    assert "rFID left out" in made.content and "LPIPS left out" in made.content
    assert made.content.count('<figure class="shown"') == 12 + 6  # a few, and the worst of six


def test_each_prompt_has_its_seed_and_scene() -> None:
    told = told_scenes(SCENES, 5, seed=3)
    assert [one.seed for one in told] == [3, 4, 5, 6, 7]
    assert all(one.scene is not None and one.scene.background in one.prompt for one in told)


def test_trained_prompts_name_as_many_objects_as_the_held_out_ones_that_they_are_compared_with() -> None:
    scenes = replace(SCENES, max_objects=3)
    held_out, trained = told_scenes(scenes, 60, seed=1), told_scenes(scenes, 60, seed=1, trained=True)
    numbers = [len(one.scene.objects) for one in held_out if one.scene is not None]
    assert [len(one.scene.objects) for one in trained if one.scene is not None] == numbers
    assert set(numbers) == {1, 2, 3} and [one.seed for one in trained] == [one.seed for one in held_out]
    assert len({one.prompt for one in trained}) == 60
    assert all(one.scene is not None and not is_held_out(scenes, one.scene) for one in trained)


def test_one_trained_prompt_can_be_asked_for_however_many_objects_it_must_name() -> None:
    for seed in range(12):
        pair = [told_scenes(replace(SCENES, max_objects=3), 1, seed, trained=trained)[0] for trained in (False, True)]
        assert len({len(one.scene.objects) for one in pair if one.scene is not None}) == 1


def scored(objects: tuple[bool, ...], relation: bool | None = None) -> SceneScore:
    """A picture whose prompt names as many objects, of which those that are true are there."""
    found = tuple((f"thing {i}", f"thing {i}" if there else "nothing") for i, there in enumerate(objects))
    return SceneScore(True, all(objects), None, None, relation, found)


def test_objects_are_also_told_by_their_number_and_relations_where_they_can_be_seen() -> None:
    scores = [scored((True,)), scored((True, True), True), scored((True, True), False), scored((True, False), False)]
    figures = {one.name: (one.value, one.setting.n) for one in scene_figures(scores, 32)}
    assert figures["objects"] == (0.75, 4) and figures["objects_of_1"] == (1.0, 1)
    assert figures["objects_of_2"] == (pytest.approx(2 / 3), 3)
    assert figures["relation"] == (pytest.approx(1 / 3), 3) and figures["relation_of_found"] == (0.5, 2)
    assert list(figures)[-1] == "everything" and figures["everything"] == (0.5, 4)
    assert not any(one.name.startswith("objects_of") for one in scene_figures(scores[1:], 32))  # all name two


def test_held_out_combinations_are_compared_with_trained_ones() -> None:
    held_out, trained = [scored((True,)), scored((False,))], [scored((True,))] * 4
    made = combinations_section(held_out, trained, 32)
    assert made.values["points_behind"]["objects"] == 50 and "50.0 points behind" in made.verdict
    assert {one.name: one.value for one in made.figures}["trained_objects"] == 1.0
    assert "-50.0" in made.content


def test_captions_are_told_in_turn_and_not_sorted(tiny_pipeline: LatentDiffusionPipeline) -> None:
    config = replace(TRAINING, scenes=replace(SCENES, count=12))
    source = open_data(config)
    told = [one.prompt for one in told_samples(tiny_pipeline, source, config, 30, seed=3)]
    captions = [source.read(i).captions[0] for i in range(12)]
    assert sorted(told[:12]) == sorted(captions) and told[:12] != captions
    assert told == (told[:12] * 3)[:30]
    assert [one.seed for one in told_samples(tiny_pipeline, source, config, 5, seed=3)] == [3, 4, 5, 6, 7]
