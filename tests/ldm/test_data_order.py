"""The order of the samples: each epoch visits every sample once, and any step can be computed alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ldm.data.order import SquareOrder


@given(length=st.integers(1, 300), batch_size=st.integers(1, 64), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation(length: int, batch_size: int, seed: int, epoch: int) -> None:
    counters = range(epoch * length, (epoch + 1) * length)
    order = SquareOrder(length, batch_size, seed, 8)
    found = [order.sample_at(*divmod(counter, batch_size)) for counter in counters]
    assert {at for at, _ in found} == {epoch}
    assert sorted(index for _, index in found) == list(range(length))


@given(length=st.integers(1, 50), split=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 99))
def test_the_order_of_samples_does_not_depend_on_the_batch_size(length: int, split: int, seed: int) -> None:
    whole = [SquareOrder(length, 12, seed, 8).sample_at(0, position) for position in range(12)]
    parts = [SquareOrder(length, split, seed, 8).sample_at(*divmod(counter, split)) for counter in range(12)]
    assert whole == parts


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        (seed, epoch): tuple(SquareOrder(50, 50, seed, 8).sample_at(epoch, position)[1] for position in range(50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16


def test_replacements_vary_and_stay_in_range() -> None:
    order = SquareOrder(100, 4, 0, 8)
    found = [order.replacement_for(0, index, 0, attempt) for index in range(20) for attempt in range(20)]
    assert all(0 <= index < 100 for index in found)
    assert len(set(found)) > 90
    many = SquareOrder(10**7, 4, 5, 8)
    assert many.replacement_for(0, 3, 1, 2) == many.replacement_for(0, 3, 1, 2)
