"""Held-out rows and samples depend on nothing but row numbers and the seed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.sampling import Sample, is_held_out, row_key


def test_keys_are_the_published_splitmix64() -> None:
    """The first outputs of the reference implementation, seeded with 0."""
    expected = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert [row_key(number, seed=0) + (1 << 63) for number in range(3)] == list(expected)


@given(st.integers(-(10**30), 10**30))
def test_keys_fit_int64_and_differ(seed: int) -> None:
    keys = [row_key(number, seed) for number in range(100)]
    assert len(set(keys)) == 100 and torch.tensor(keys).dtype == torch.int64


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_the_fraction_is_kept(fraction: float) -> None:
    held = [is_held_out(row_key(number, seed=7), fraction) for number in range(10_000)]
    assert abs(sum(held) / len(held) - fraction) < 3 * (fraction * (1 - fraction) / len(held)) ** 0.5 + 1e-12


def test_neighbouring_seeds_choose_independently() -> None:
    held = torch.tensor([[is_held_out(row_key(n, seed), 0.5) for n in range(10_000)] for seed in range(3)]).double()
    assert torch.corrcoef(held).fill_diagonal_(0).abs().max() < 0.03


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 30))
def test_a_sample_is_that_of_the_whole_however_it_was_cut(sizes: list[int], capacity: int) -> None:
    total = sum(sizes)
    key = torch.tensor([row_key(n, seed=1) for n in range(total)], dtype=torch.int64)
    time = torch.arange(total).double()
    sample = Sample.empty(capacity)
    for chunk, part in enumerate(torch.arange(total).split(sizes)):
        sample = sample.add(key[part], time[part], -time[part], chunk)
    expected = key.argsort()[:capacity].sort().values
    assert torch.equal(sample.time, time[expected]) and torch.equal(sample.target, -time[expected])
    assert torch.equal(sample.key, key[expected])
    chunk_of = [chunk for chunk, size in enumerate(sizes) for _ in range(size)]
    assert sample.chunk.tolist() == [chunk_of[n] for n in expected.tolist()]
    assert sample.seen == total and sample.is_complete == (total <= capacity)
