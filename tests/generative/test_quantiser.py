"""The quantiser: nearest codes, its gradient, codebooks that learn, dead codes, and a complete state."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.generative.quantiser import (
    Codebook,
    VectorQuantiser,
    averaged,
    codebook_use,
    nearest_codes,
    revived,
)
from tests.oracles_generative_tokens import averages_by_hand, nearest_by_hand

BATCHES = [(12,), (3, 4), (2, 3, 2)]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_codes_are_the_nearest(dtype, batch):
    quantiser = VectorQuantiser(5, 3, dtype=dtype).eval()
    z = torch.randn(*batch, 3, dtype=dtype)
    out = quantiser(z)
    assert out.tokens.equal(nearest_by_hand(z, quantiser.codes))
    assert out.tokens.equal(quantiser.tokens(z))
    assert out.codes.dtype == dtype
    torch.testing.assert_close(out.codes, quantiser.lookup(out.tokens))
    torch.testing.assert_close(out.loss, 0.25 * (z - out.codes).square().mean())


def test_a_common_offset_does_not_eat_the_digits():
    codes = torch.tensor([[0.0, 0.0], [0.01, 0.0], [0.0, 0.01]]) + 1000
    z = codes + torch.tensor([0.002, 0.001])
    assert nearest_codes(z, codes).tolist() == [0, 1, 2]


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_the_gradient_goes_straight_through(codebook):
    quantiser = VectorQuantiser(4, 3, codebook, beta=0.0, dtype=torch.float64).eval()
    z, direction = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, 3).double()
    ((quantiser(z).codes * direction).sum()).backward()
    assert z.grad.equal(direction.expand_as(z))


def test_who_pulls_whom():
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    quantiser = VectorQuantiser(4, 3, "gradient", beta=0.5, dtype=torch.float64).eval()
    out = quantiser(z)
    out.loss.backward()
    error = z.detach() - quantiser.codes.detach()[out.tokens]
    torch.testing.assert_close(z.grad, 0.5 * 2 * error / z.numel())
    pull = torch.zeros_like(quantiser.codes).index_add_(0, out.tokens, -2 * error / z.numel())
    torch.testing.assert_close(quantiser.codes.grad, pull)
    assert not list(VectorQuantiser(4, 3).parameters())


def test_averages(dtype):
    codes, counts, z = torch.randn(5, 3, dtype=dtype), torch.rand(5, dtype=dtype) + 0.1, torch.randn(20, 3, dtype=dtype)
    tokens = torch.randint(4, (20,))  # the last code has none
    book = averaged(Codebook(codes, counts), z, tokens, decay=0.9)
    want = averages_by_hand(codes, counts, z, tokens, 0.9)
    torch.testing.assert_close(book.codes, want[0])
    torch.testing.assert_close(book.counts, want[1])
    assert book.codes[4].equal(codes[4])
    still = averaged(Codebook(codes, counts), z, tokens, decay=0.9, move=False)
    assert still.codes is codes
    assert still.counts.equal(book.counts)


def test_averages_find_the_means_of_clusters():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    quantiser = VectorQuantiser(3, 2, decay=0.8, dtype=torch.float64)
    for _ in range(200):
        quantiser(centres.repeat(20, 1) + 0.1 * torch.randn(60, 2, dtype=torch.float64))
    assert torch.cdist(centres, quantiser.codes).amin(1).max() < 0.1


def test_averages_survive_a_code_that_is_never_used():
    quantiser = VectorQuantiser(2, 1, decay=0.5, revive_below=0.0)
    quantiser.initialise(torch.tensor([[0.0], [10.0]]))
    for _ in range(300):  # its count underflows
        quantiser(torch.full((4, 1), 10.0))
    assert sorted(quantiser.codes.flatten().tolist()) == [0.0, 10.0]
    quantiser(torch.full((4, 1), 1.0))
    assert quantiser.codes.min() == pytest.approx(1.0)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_dead_codes_come_back_at_current_encodings(codebook):
    quantiser = VectorQuantiser(4, 2, codebook, decay=0.5)
    z = torch.randn(32, 2)
    quantiser.initialise(z)
    with torch.no_grad():
        quantiser.codes[2:] = 100.0
    used = [codebook_use(quantiser(z + 0.01 * torch.randn_like(z)).tokens, 4).used for _ in range(12)]
    assert used[0] <= 2
    assert used[-1] == 4
    asleep = VectorQuantiser(4, 2, codebook, decay=0.5, revive_below=0.0)
    asleep.load_state_dict(quantiser.state_dict())
    with torch.no_grad():
        asleep.codes[2:] = 100.0
    assert max(codebook_use(asleep(z).tokens, 4).used for _ in range(12)) <= 2


def test_the_dead_alone_are_replaced():
    book = Codebook(torch.randn(4, 2), torch.tensor([3.0, 0.01, 5.0, 0.0]))
    z = torch.randn(9, 2)
    new = revived(book, z, 0.05, torch.Generator().manual_seed(0))
    assert new.codes[[0, 2]].equal(book.codes[[0, 2]])
    rows = [int((z == code).all(1).nonzero()) for code in new.codes[[1, 3]]]
    assert rows[0] != rows[1]
    assert new.counts.tolist() == [3.0, pytest.approx(2.0025), 5.0, pytest.approx(2.0025)]
    again = revived(book, z, 0.05, torch.Generator().manual_seed(0))
    assert again.codes.equal(new.codes)
    assert revived(book, z[:1], 0.05).codes[1].equal(z[0])  # fewer encodings than codes


def test_it_starts_at_data_without_repeats():
    quantiser, z = VectorQuantiser(6, 2), torch.randn(2, 3, 2)
    assert not quantiser.is_initialised
    quantiser.eval()(z)
    assert not quantiser.is_initialised
    quantiser.initialise(z, torch.Generator().manual_seed(0))
    assert quantiser.is_initialised
    assert quantiser.codes.unique(dim=0).equal(z.flatten(0, 1).unique(dim=0))


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_codebook_larger_than_the_data_changes_nothing(codebook):
    quantiser = VectorQuantiser(8, 2, codebook)
    before = copy.deepcopy(quantiser.state_dict())
    for call in (quantiser, quantiser.initialise):
        with pytest.raises(
            ValueError, match=r"num_codes: the codebook of 8 codes is larger than the data.* 7 encodings"
        ):
            call(torch.randn(7, 2))
    assert all(value.equal(before[name]) for name, value in quantiser.state_dict().items())
    quantiser(torch.randn(8, 2))
    quantiser(torch.randn(7, 2))  # later batches may be small


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_the_state_is_complete(codebook):
    first, batches = VectorQuantiser(4, 2, codebook), torch.randn(10, 32, 2)
    for z in batches[:5]:
        first(z)
    second = VectorQuantiser(4, 2, codebook)
    second.load_state_dict(first.state_dict())
    assert second.is_initialised
    for z in batches[5:]:
        outs = [made(z, torch.Generator().manual_seed(1)) for made in (first, second)]
        assert outs[0].tokens.equal(outs[1].tokens)
        assert outs[0].loss.equal(outs[1].loss)
    assert first.codes.equal(second.codes)
    assert set(first.state_dict()) == {"codes", "counts", "initialised"}


def test_evaluation_learns_nothing():
    quantiser = VectorQuantiser(4, 2)
    quantiser(torch.randn(20, 2))
    before = copy.deepcopy(quantiser.state_dict())
    quantiser.eval()(torch.randn(20, 2))
    quantiser.train().tokens(torch.randn(20, 2))
    assert all(value.equal(before[name]) for name, value in quantiser.state_dict().items())


def test_half_precision_encodings():
    quantiser = VectorQuantiser(4, 2)
    out = quantiser(torch.randn(20, 2, dtype=torch.bfloat16))
    assert out.codes.dtype == torch.bfloat16
    assert quantiser.codes.dtype == out.loss.dtype == torch.float32


@given(st.lists(st.integers(0, 6), min_size=1, max_size=50))
def test_perplexity_lies_between_one_and_the_codes_in_use(tokens):
    use = codebook_use(torch.tensor(tokens), 7)
    assert use.counts.sum() == len(tokens)
    assert use.used == len(set(tokens))
    assert 1 - 1e-12 <= use.perplexity <= use.used + 1e-9


def test_perplexity_by_hand():
    use = codebook_use(torch.tensor([0, 0, 1, 3]), 4)
    assert use.perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert str(use) == "3 of 4 codes in use, perplexity 2.8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes"),
        ({"dim": 0}, "dim"),
        ({"codebook": "k-means"}, "codebook: expected one of ema, gradient, got 'k-means'"),
        ({"decay": 1.0}, "decay"),
        ({"decay": math.nan}, "decay"),
        ({"revive_below": -0.1}, "revive_below"),
        ({"beta": -1.0}, "beta"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantiser(**{"num_codes": 4, "dim": 2, **options})


def test_bad_input():
    quantiser = VectorQuantiser(4, 2)
    with pytest.raises(ValueError, match=r"z: expected encodings \(\*batch, 2\), got shape \(5, 3\)"):
        quantiser(torch.randn(5, 3))
    with pytest.raises(TypeError, match="z: expected a floating-point tensor"):
        quantiser(torch.zeros(5, 2, dtype=torch.int64))
    for bad in (torch.tensor([-1]), torch.tensor([4])):
        with pytest.raises(ValueError, match="tokens: expected integers from 0 to 3"):
            quantiser.lookup(bad)
    with pytest.raises(TypeError, match=r"tokens: expected a tensor of integers, got torch\.bool"):
        quantiser.lookup(torch.tensor([True]))
    with pytest.raises(ValueError, match="tokens: expected at least one"):
        codebook_use(torch.zeros(0, dtype=torch.int64), 4)
