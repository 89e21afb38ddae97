"""CLIP score and directional similarity, by a model whose embeddings are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.alignment import clip_score, directional_similarity

DIRECTIONS = {"red": (1.0, 0, 0), "green": (0, 2.0, 0), "unred": (-1.0, 0, 0)}


class Known:
    """An image's embedding is its mean colour; a text's the direction that it names."""

    name, weights, resolution, resize_filter = "known", "0" * 16, 8, "none"

    def embed_images(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([DIRECTIONS[text] for text in texts])


def plain(*colours: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, -1, 8, 8)


def test_the_score_is_a_hundred_times_the_cosine() -> None:
    images = plain((0.5, 0, 0), (0.3, 0.3, 0), (0.2, 0, 0), (0.4, 0, 0))
    prompts = ["red", "red", "green", "unred"]
    found = clip_score(Known(), images.split(3), prompts)
    cosines = [100.0, 100 * 0.5**0.5, 0.0, 0.0]  # against "unred" it is -100, cut to 0
    assert found.measurement.value == pytest.approx(sum(cosines) / 4, rel=1e-5)
    assert [(one.prompt, one.pictures) for one in found.prompts] == [("green", 1), ("unred", 1), ("red", 2)]
    assert found.prompts[-1].score == pytest.approx(sum(cosines[:2]) / 2, rel=1e-5)
    assert found.measurement.setting.n == 4
    assert "known" in found.measurement.line()


def test_several_pictures_of_a_prompt_are_no_independent_evidence() -> None:
    images = plain((0.5, 0, 0), (0.5, 0.1, 0), (0.1, 0.5, 0), (0.1, 0.4, 0))
    once = clip_score(Known(), [images[::2]], ["red", "green"]).measurement.estimate
    many = clip_score(Known(), [images[::2].repeat(50, 1, 1, 1)], ["red", "green"] * 50).measurement.estimate
    assert (many.low, many.high) == pytest.approx((once.low, once.high))


def test_the_direction_of_an_edit() -> None:
    before, after = plain((0.5, 0, 0), (0.5, 0, 0), (0.5, 0, 0)), plain((0, 0.5, 0), (0.5, 0, 0), (0.3, 0.3, 0))
    found = directional_similarity(Known(), before.split(2), [after], ["red"] * 3, ["green"] * 3)
    text = torch.tensor([-1.0, 1.0, 0]) / 2**0.5
    half = torch.tensor([0.5**0.5 - 1, 0.5**0.5, 0])
    expected = (1 + 0 + (half @ text / half.norm()).item()) / 3
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.name == "directional_similarity"
    opposite = directional_similarity(Known(), [after[:1]], [before[:1]], ["red"], ["green"])
    assert opposite.value == pytest.approx(-1)


def test_numbers_that_differ_are_refused() -> None:
    images = plain((0.5, 0, 0), (0.3, 0.3, 0))
    with pytest.raises(UserError, match="2 pictures and 1 prompts"):
        clip_score(Known(), [images], ["red"])
    with pytest.raises(UserError, match="found 0 images"):
        clip_score(Known(), [], [])
    with pytest.raises(UserError, match="2 and 1 pictures"):
        directional_similarity(Known(), [images], [images[:1]], ["red"] * 2, ["green"] * 2)
    with pytest.raises(UserError, match="'red' before and after"):
        directional_similarity(Known(), [images], [images], ["red"] * 2, ["green", "red"])
