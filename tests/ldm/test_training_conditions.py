"""Conditions in training: dropout per sample and condition, masks and maps from the loader, networks that grow."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from conditioning.conditions import CONDITIONS
from conditioning.encoders import CONDITION_PARTS, ConditionEncoders
from conditioning.inpainting import InpaintingConfig
from conditioning.label import LabelConfig
from conditioning.semantic import SemanticConfig, SemanticEncoder
from conditioning.text import TextConfig
from ldm.data.fixed_batches import fixed_batches
from ldm.data.loader import TrainingBatches, Wanted
from ldm.data.sample import Batch, Sample
from ldm.data.sources import DataConfig
from ldm.errors import UserError
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_conditions import _nothing
from ldm.pipeline_request import Request
from ldm.training.conditions import ConditionsConfig, condition_inputs, draw_losing, wanted_of
from ldm.training.networks import build_conditioned_unet, build_encoders, encoders_beside
from ldm.unet import UNetConfig

ALL = ConditionsConfig(
    text=TextConfig(length=16, width=16, layers=1, heads=2, dropout=0.1),
    semantic=SemanticConfig(channels=5, dropout=0.3),
    inpainting=InpaintingConfig(full_mask=0.25, dropout=0.2),
    label=LabelConfig(width=6, dropout=0.5),
)
NEW = ConditionEncoders()
DATA = DataConfig(source="folder", root="unused", resolution=32)


class Pictures:
    """Samples with parts of each kind, made up on the spot; `lacking` names samples without map and label."""

    classes = ("cat", "dog")
    semantic_classes = ("background", "circle", "square")
    fingerprint = "made up"

    def __init__(self, count: int = 12, lacking: tuple[int, ...] = (), bad_class: int | None = None) -> None:
        self.count, self.lacking, self.bad_class = count, lacking, bad_class

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, *, with_image: bool = True) -> Sample:
        numbers = np.random.RandomState(index)
        image = Image.fromarray(numbers.randint(0, 256, (32, 32, 3), dtype=np.uint8))
        semantic = np.full((32, 32), index % 3, dtype=np.uint8)
        if index == self.bad_class:
            semantic[3, 4] = 7
        has = index not in self.lacking
        return Sample(
            key=f"{index}.png",
            image=image if with_image else None,
            captions=(f"picture {index}",),
            semantic=Image.fromarray(semantic) if has else None,
            label=index % 2 if has else None,
        )


def encoders():
    torch.manual_seed(0)
    return build_encoders(ALL, Pictures(), NEW)


def batches(source: Pictures, steps: int = 3, **options: object) -> list[Batch]:
    wanted = wanted_of(ALL, encoders())
    given = {"batch_size": 4, "seed": 1, "start_step": 0, "end_step": steps, "wanted": wanted} | options
    return list(TrainingBatches(source, DATA, **given))  # type: ignore[arg-type]


def test_guidance_and_encoders_agree_on_the_conditions():
    assert tuple(CONDITION_PARTS) == CONDITIONS
    assert tuple(name for name in CONDITIONS if name in ALL.dropouts()) == CONDITIONS


def test_each_condition_is_dropped_at_its_own_rate_and_independently_of_the_others():
    draws, size = 100, 100
    lost: dict[str, list[torch.Tensor]] = {name: [] for name in ALL.dropouts()}
    for step in range(draws):
        batch = Batch(keys=("",) * size, positions=tuple(range(size)), captions=("",) * size)
        for name, flags in draw_losing(ALL.dropouts(), batch, seed=3, step=step).items():
            lost[name].append(flags)
    drawn = {name: torch.cat(flags).double() for name, flags in lost.items()}
    total = draws * size
    for name, rate in ALL.dropouts().items():
        assert abs(drawn[name].mean().item() - rate) < 4 * (rate * (1 - rate) / total) ** 0.5
    for one, other in itertools.combinations(drawn, 2):  # correlation of independent draws: 0 +- 1 / sqrt(n)
        assert abs(torch.corrcoef(torch.stack([drawn[one], drawn[other]]))[0, 1].item()) < 4 / total**0.5


def test_dropout_depends_on_seed_step_and_position_alone():
    def draw(positions: tuple[int, ...], step: int) -> dict[str, list[bool]]:
        batch = Batch(keys=("",) * len(positions), positions=positions, captions=("",) * len(positions))
        return {name: flags.tolist() for name, flags in draw_losing(ALL.dropouts(), batch, 5, step).items()}

    whole, part = draw(tuple(range(64)), 7), draw(tuple(range(32, 64)), 7)
    assert {name: flags[32:] for name, flags in whole.items()} == part
    assert draw(tuple(range(64)), 8) != whole


def test_what_is_dropped_is_what_the_pipeline_tells_when_it_is_left_out(conditioned_pipeline):
    pipeline: LatentDiffusionPipeline = conditioned_pipeline
    (batch,) = batches(Pictures(), steps=1)
    everything = {name: torch.ones(4, dtype=torch.bool) for name in CONDITIONS}
    told = condition_inputs(pipeline.encoders, batch, pipeline.encode_images, everything)
    nothing = _nothing(pipeline, Request([""] * 4, [""] * 4, 32, 32))
    for part in ("tokens", "mask", "semantic", "labels"):
        assert torch.equal(getattr(told, part), getattr(nothing, part)), part
    # One grey picture, or four of them: convolutions round otherwise in a batch of another size.
    assert torch.allclose(told.masked_latents, nothing.masked_latents, atol=2e-3)


@pytest.mark.parametrize("dropped", CONDITIONS)
def test_only_what_is_dropped_changes_and_only_in_its_samples(conditioned_pipeline, dropped):
    pipeline: LatentDiffusionPipeline = conditioned_pipeline
    (batch,) = batches(Pictures(), steps=1)
    none = {name: torch.zeros(4, dtype=torch.bool) for name in CONDITIONS}
    some = none | {dropped: torch.tensor([True, False, False, True])}
    full = condition_inputs(pipeline.encoders, batch, pipeline.encode_images, none)
    told = condition_inputs(pipeline.encoders, batch, pipeline.encode_images, some)
    for name, parts in CONDITION_PARTS.items():
        for part in parts:
            before, after = getattr(full, part), getattr(told, part)
            if before is None:
                continue
            same = [torch.allclose(a.double(), b.double(), atol=1e-5) for a, b in zip(before, after, strict=True)]
            expected = [False, True, True, False] if name == dropped else [True] * 4
            if part == "mask" and name == dropped:  # a full mask may have been drawn anyway
                expected = [bool((mask == 1).all()) or kept for mask, kept in zip(before, expected, strict=True)]
            if part == "masked_latents" and name == dropped:
                continue
            assert same == expected, part


def test_the_loader_fills_in_what_samples_lack():
    (batch, *_) = batches(Pictures(count=4, lacking=(0, 2)))
    for key, semantic, label in zip(batch.keys, batch.semantic, batch.labels, strict=True):  # type: ignore[arg-type]
        index = int(key.removesuffix(".png"))
        lacks = index in (0, 2)
        assert (semantic == (255 if lacks else index % 3)).all()
        assert label == (-1 if lacks else index % 2)


def test_a_map_with_a_class_out_of_range_makes_its_sample_unusable():
    found = [pair for batch in batches(Pictures(count=4, bad_class=1)) for pair in batch.bad]
    assert set(found) == {("1.png", "semantic map with class 7; allowed is 0 to 2")}


def test_masks_depend_on_seed_epoch_and_sample_alone():
    first = batches(Pictures(), steps=6)
    again = batches(Pictures(), steps=6)
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(first, again, strict=True))  # type: ignore[arg-type]
    resumed = batches(Pictures(), steps=6, start_step=4)
    assert torch.equal(resumed[0].masks, first[4].masks)  # type: ignore[arg-type]
    epochs = [
        {key: mask for batch in part for key, mask in zip(batch.keys, batch.masks, strict=True)}  # type: ignore[arg-type]
        for part in (first[:3], first[3:])
    ]
    one_epoch, next_epoch = epochs
    assert any(not torch.equal(one_epoch[key], next_epoch[key]) for key in one_epoch)


def test_a_samples_own_mask_is_used():
    class Masked(Pictures):
        def read(self, index: int, *, with_image: bool = True) -> Sample:
            mask = Image.new("L", (32, 32), 0)
            mask.paste(255, (8, 8, 16, 24))
            return dataclasses.replace(super().read(index, with_image=with_image), mask=mask)

    (batch, *_) = batches(Masked())
    assert batch.masks is not None
    assert batch.masks.sum(dim=(1, 2, 3)).tolist() == [8 * 16] * 4


def test_cached_latents_are_read_beside_images_only_where_masks_need_them():
    class Reader:
        supports_flip = False

        def read(self, index: int, flipped: bool) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((4, 2, 2), float(index)), torch.zeros(4, 2, 2)

    (with_masks, *_) = batches(Pictures(), reader=Reader())
    assert with_masks.images is not None and with_masks.moments is not None
    (without, *_) = batches(Pictures(), reader=Reader(), wanted=Wanted(semantic_classes=3))
    assert without.images is None and without.semantic is not None


def test_fixed_batches_number_labels_by_name():
    class Other(Pictures):
        classes = ("dog", "owl")

    (batch,) = fixed_batches(Other(4), DATA, 4, 4, Wanted(label_classes=2), 0, ("cat", "dog"))
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, -1, 1, -1]  # dog is the training's class 1, owls it does not know


class Unnamed(Pictures):
    semantic_classes = ()


def test_classes_come_from_the_data_or_a_file(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    config = ConditionsConfig(
        text=TextConfig(encoder="none"),
        semantic=SemanticConfig(classes=str(tmp_path / "classes.txt")),
        label=LabelConfig(classes=4),
    )
    with pytest.raises(UserError, match="the data says background, circle, square"):
        build_encoders(config, Pictures(), NEW)
    built = build_encoders(config, Unnamed(), NEW)
    assert built.semantic.classes == ("sky", "road")
    assert built.label.classes == ("cat", "dog", "2", "3")
    assert set(config.dropouts()) == {"semantic", "label"}


class Nameless(Pictures):
    classes = ()
    semantic_classes = ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"semantic": SemanticConfig()}, "conditions.semantic.classes: found null"),
        ({"label": LabelConfig()}, "conditions.label.classes: found 0"),
        ({"semantic": SemanticConfig(classes="nowhere.txt")}, "nowhere.txt"),
    ],
)
def test_missing_classes_are_named(config, message):
    with pytest.raises(UserError) as error:
        build_encoders(ConditionsConfig(text=TextConfig(encoder="none"), **config), Nameless(), NEW)
    assert message in str(error.value)


GROWN = [
    {"semantic": SemanticConfig(channels=5)},
    {"inpainting": InpaintingConfig()},
    {"label": LabelConfig(width=6)},
    {"semantic": SemanticConfig(channels=5), "inpainting": InpaintingConfig(), "label": LabelConfig(width=6)},
]


@pytest.mark.parametrize("new", GROWN, ids=lambda new: "+".join(new))
def test_a_grown_model_draws_what_it_drew(make_pipeline, tmp_path, new):
    plain = make_pipeline(NoiseConfig())
    plain.save_pretrained(tmp_path / "plain")
    text = TextConfig(encoder="clip", pretrained=str(tmp_path / "plain"), length=16)
    config = ConditionsConfig(text=text, **new)
    torch.manual_seed(1)
    own = encoders_beside(str(tmp_path / "plain"))
    built = build_encoders(config, Pictures(), own)
    unet = build_conditioned_unet(
        UNetConfig(pretrained=str(tmp_path / "plain")), config, built, own, latent_channels=4, sample_size=16
    )
    grown = LatentDiffusionPipeline(
        plain.vae,
        built.text,
        unet,
        plain.noise_scheduler,
        semantic_encoder=built.semantic,
        label_encoder=built.label,
    )
    assert set(grown.conditions) == {"text", *new}
    given: dict[str, object] = {}
    if "semantic" in new:
        given["semantic_map"] = torch.ones(32, 32).long()
    if "label" in new:
        given["label"] = "dog"
    settings = {"num_inference_steps": 3, "scheduler": "ddim", "seed": 0, "output_type": "latent"}
    before = plain("a circle", guidance_scale=3, **settings).images
    assert torch.allclose(grown("a circle", guidance_scale=3, **settings).images, before, atol=1e-5)
    assert torch.allclose(grown("a circle", guidance_scale={"text": 3}, **given, **settings).images, before, atol=1e-5)


def test_a_model_with_maps_takes_on_masks_and_keeps_its_map_encoder(make_pipeline, tmp_path):
    old = make_pipeline(NoiseConfig(), semantic=True)
    old.save_pretrained(tmp_path / "old")
    text = TextConfig(encoder="clip", pretrained=str(tmp_path / "old"), length=16)
    config = ConditionsConfig(text=text, semantic=SemanticConfig(channels=5), inpainting=InpaintingConfig())
    own = encoders_beside(str(tmp_path / "old"))
    built = build_encoders(config, Pictures(), own)
    unet = build_conditioned_unet(
        UNetConfig(pretrained=str(tmp_path / "old")), config, built, own, latent_channels=4, sample_size=16
    )
    grown = LatentDiffusionPipeline(old.vae, built.text, unet, old.noise_scheduler, semantic_encoder=built.semantic)
    given = {"semantic_map": torch.ones(32, 32).long(), "num_inference_steps": 3, "scheduler": "ddim", "seed": 0}
    given["output_type"] = "latent"
    assert torch.allclose(grown("a", **given).images, old("a", **given).images, atol=1e-4)


def test_another_vocabulary_than_the_pretrained_one_is_refused(tmp_path):
    SemanticEncoder(("sky", "road"), 5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained with 2"):
        build_encoders(
            ConditionsConfig(text=TextConfig(encoder="none"), semantic=SemanticConfig(channels=5)),
            Pictures(),
            encoders_beside(str(tmp_path)),
        )
