"""The order of the samples: each epoch visits every sample once, and any step can be computed alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ldm.data.order import replacement_for, sample_at


@given(length=st.integers(1, 300), batch_size=st.integers(1, 64), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation(length: int, batch_size: int, seed: int, epoch: int) -> None:
    counters = range(epoch * length, (epoch + 1) * length)
    found = [sample_at(*divmod(counter, batch_size), batch_size, length, seed) for counter in counters]
    assert {at for at, _ in found} == {epoch}
    assert sorted(index for _, index in found) == list(range(length))


@given(length=st.integers(1, 50), split=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 99))
def test_the_order_of_samples_does_not_depend_on_the_batch_size(length: int, split: int, seed: int) -> None:
    whole = [sample_at(0, position, 12, length, seed) for position in range(12)]
    parts = [sample_at(counter // split, counter % split, split, length, seed) for counter in range(12)]
    assert whole == parts


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        (seed, epoch): tuple(sample_at(epoch, position, 50, 50, seed)[1] for position in range(50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16


def test_replacements_vary_and_stay_in_range() -> None:
    found = [replacement_for(index, 0, attempt, 100, seed=0) for index in range(20) for attempt in range(20)]
    assert all(0 <= index < 100 for index in found)
    assert len(set(found)) > 90
    assert replacement_for(3, 1, 2, 10**7, seed=5) == replacement_for(3, 1, 2, 10**7, seed=5)
