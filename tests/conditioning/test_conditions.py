"""Conditions as one value: selecting, joining and dropping rows keeps the parts together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conditioning.conditions import Conditions, choose, dropped

PARTS = ("context", "spatial", "class_embedding")


def numbered(batch: int, *, start: int = 0, parts: tuple[str, ...] = PARTS) -> Conditions:
    """Row i of every part is filled with `start + i`."""
    rows = torch.arange(start, start + batch, dtype=torch.float32)
    shapes = {"context": (5, 3), "spatial": (2, 4, 4), "class_embedding": (6,)}
    made = {name: rows.view(-1, *[1] * len(shapes[name])).repeat(1, *shapes[name]) for name in parts}
    return Conditions(**made)


def rows(conditions: Conditions) -> list[float]:
    """The numbers of the rows; fails when the parts disagree."""
    found = {
        tuple(part.flatten(1).mean(1).tolist())
        for part in (getattr(conditions, name) for name in PARTS)
        if part is not None
    }
    assert len(found) == 1
    return list(found.pop())


def test_the_length_is_the_batch_size() -> None:
    assert len(numbered(3)) == 3
    assert len(numbered(2, parts=("class_embedding",))) == 2
    with pytest.raises(ValueError, match="no part set"):
        len(Conditions())


def test_no_condition_is_still_a_value() -> None:
    empty = Conditions()
    assert bool(empty)
    for derived in (empty[:2], empty.to("cpu"), empty.repeat_interleave(2), Conditions.cat([empty, empty])):
        assert (derived.context, derived.spatial, derived.class_embedding) == (None, None, None)


@pytest.mark.parametrize("parts", [PARTS, ("context",), ("spatial", "class_embedding")])
def test_rows_are_selected_together(parts: tuple[str, ...]) -> None:
    conditions = numbered(4, parts=parts)
    assert rows(conditions[1:3]) == [1, 2]
    assert rows(conditions[2]) == [2]
    assert rows(conditions[-1]) == [3]
    assert rows(conditions[[3, 0, 0]]) == [3, 0, 0]
    assert rows(conditions[torch.tensor([True, False, True, False])]) == [0, 2]
    assert all((getattr(conditions[1:], name) is None) == (name not in parts) for name in PARTS)


def test_repeating_and_joining() -> None:
    assert rows(numbered(2).repeat_interleave(3)) == [0, 0, 0, 1, 1, 1]
    assert rows(Conditions.cat([numbered(2), numbered(1, start=7), numbered(2)])) == [0, 1, 7, 0, 1]


@given(keep=st.lists(st.booleans(), min_size=1, max_size=8), one=st.booleans())
def test_choosing_row_by_row_from_as_many_or_one(keep: list[bool], one: bool) -> None:
    kept, other = torch.arange(len(keep))[:, None], 100 + torch.arange(1 if one else len(keep))[:, None]
    expected = [index if flag else 100 + (0 if one else index) for index, flag in enumerate(keep)]
    assert choose(torch.tensor(keep), kept, other)[:, 0].tolist() == expected


def test_choosing_lets_gradients_flow_to_what_was_chosen_only() -> None:
    kept, other = torch.ones(2, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    choose(torch.tensor([True, False]), kept, other).sum().backward()
    assert kept.grad.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert other.grad.tolist() == [[1, 1, 1]]


def test_parts_must_agree() -> None:
    both, one = numbered(2), numbered(2, parts=("context",))
    with pytest.raises(ValueError, match=r"^spatial: found in some"):
        Conditions.cat([both, one])
    with pytest.raises(ValueError, match=r"batch sizes \[2, 3\]"):
        Conditions(context=torch.zeros(2, 5, 3), class_embedding=torch.zeros(3, 6))


@pytest.mark.parametrize(("part", "shape"), [("context", (2, 3)), ("spatial", (2, 3)), ("class_embedding", (2, 3, 4))])
def test_shapes_are_checked(part: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{part}: found shape"):
        Conditions(**{part: torch.zeros(shape)})


def test_conditions_move_and_cannot_be_changed() -> None:
    conditions = numbered(2, parts=("context", "spatial"))
    moved = conditions.to("meta", torch.float16)
    assert moved.context.device.type == moved.spatial.device.type == "meta"
    assert moved.context.dtype == torch.float16 and conditions.context.dtype == torch.float32
    with pytest.raises(dataclasses.FrozenInstanceError):
        conditions.context = None


def test_dropping_follows_the_uniforms() -> None:
    uniforms = torch.tensor([0.0, 0.05, 0.1, 0.5, 0.999])
    assert dropped(0.1, uniforms).tolist() == [True, True, False, False, False]
    assert not dropped(0.0, uniforms).any()
    assert dropped(1.0, uniforms).all()


def test_conditions_drop_at_their_rate_and_independently() -> None:
    text, semantic = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0))
    first, second = dropped(0.1, text).float(), dropped(0.3, semantic).float()
    assert first.mean().item() == pytest.approx(0.1, abs=0.01)
    assert second.mean().item() == pytest.approx(0.3, abs=0.015)
    assert (first * second).mean().item() == pytest.approx(0.03, abs=0.005)
