from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.randomness import derive_seed, normal_for_each, permuted_index, uniform_for_each


@given(st.integers(1, 3000), st.integers(0, 100))
def test_permuted_index_is_a_permutation(length, seed):
    assert sorted(permuted_index(i, length, seed) for i in range(length)) == list(range(length))


def test_permutations_of_two_epochs_have_nothing_in_common():
    first, second = ([permuted_index(i, 10_000, 0, epoch) for i in range(10_000)] for epoch in (0, 1))
    # Two random permutations agree in one place on average; 10 is far out in the Poisson tail.
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(first))
    assert neighbours < 12


@given(st.lists(st.integers(0, 10**9) | st.text(max_size=5), min_size=1, max_size=4))
def test_seeds_are_63_bit_and_repeatable(parts):
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) == derive_seed(*parts)


def test_a_text_and_a_number_that_look_alike_give_different_seeds():
    assert derive_seed(1, "2") != derive_seed(1, 2)
    assert derive_seed("a", "b") != derive_seed("ab")


def test_noise_belongs_to_its_position_alone():
    together = normal_for_each(range(8), (4, 3, 3), 7, "noise", 11)
    apart = torch.cat([normal_for_each([i], (4, 3, 3), 7, "noise", 11) for i in range(8)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, normal_for_each(range(8), (4, 3, 3), 7, "noise", 12))


def test_noise_is_standard_normal_and_uniforms_are_uniform():
    noise = normal_for_each(range(200), (4, 8, 8), 0, "noise", 0)
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    # The first number of each position, over positions: seeds that are neighbours must not give like numbers.
    first = noise[:, 0, 0, 0]
    assert abs(first.mean().item()) < 0.25
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1].item()) < 0.25
    uniforms = uniform_for_each(range(4000), 0, "t", 0)
    counts = torch.histc(uniforms, bins=10, min=0, max=1)
    assert (counts - 400).abs().max() < 100
