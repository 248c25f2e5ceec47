"""Predictive against torch's own distributions, explicit loops and dense Gaussians."""

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from linear_operator import to_linear_operator
from linear_operator.operators import (
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    LowRankRootLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from linear_operator.utils.errors import NotPSDError

from gpseq.predictive import NUM_DRAWS, PROBS_METHODS, Predictive
from gpseq.spread import Spread

BATCHES = [(), (3,), (2, 3)]
E, R, S = 4, 2, 6
FORMS = ["diagonal", "root", "root and diagonal", "sum of roots", "dense", "lazy"]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def covariance(form: str, batch: tuple[int, ...], dtype: torch.dtype = torch.float64, size: int = E) -> LinearOperator:
    root, diagonal = random(*batch, size, R, dtype=dtype), torch.rand(*batch, size, dtype=dtype) + 0.5
    if form == "diagonal":
        return DiagLinearOperator(diagonal)
    if form == "root":
        return RootLinearOperator(root)
    if form == "root and diagonal":
        return LowRankRootLinearOperator(root) + DiagLinearOperator(diagonal)
    if form == "sum of roots":
        # `+` of two roots would factor them; a sum by name does not.
        parts = RootLinearOperator(root), DiagLinearOperator(diagonal), RootLinearOperator(root[..., :1])
        return SumLinearOperator(SumLinearOperator(*parts[:2]), parts[2])
    if form == "dense":
        return to_linear_operator(root @ root.mT + torch.diag_embed(diagonal))
    half = RBFKernel().to(dtype)(random(*batch, 2, 1, dtype=dtype))
    return KroneckerProductLinearOperator(half, DiagLinearOperator(diagonal[..., : size // 2]))


def gaussian(form: str, batch: tuple[int, ...], dtype: torch.dtype = torch.float64, **kwargs) -> Predictive:
    return Predictive.from_moments(random(*batch, E, dtype=dtype), covariance(form, batch, dtype), **kwargs)


def draws(batch: tuple[int, ...], dtype: torch.dtype = torch.float64, size: int = E, **kwargs) -> Predictive:
    return Predictive.from_samples(random(S, *batch, size, dtype=dtype), **kwargs)


def same(one: Predictive, other: Predictive) -> None:
    """Everything that two predictions say is equal."""
    assert repr(one) == repr(other)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.covariance.to_dense(), other.covariance.to_dense())
    assert (one.noise is None) == (other.noise is None)
    if one.noise is not None:
        torch.testing.assert_close(one.noise, other.noise)
    assert dict(one.scores).keys() == dict(other.scores).keys()
    for name, score in one.scores.items():
        torch.testing.assert_close(score, other.scores[name])
    if one.samples is not None:
        torch.testing.assert_close(one.samples, other.samples)


# Moments


@pytest.mark.parametrize("batch", BATCHES)
def test_moments_of_draws(batch, dtype):
    p = draws(batch, dtype)
    assert p.num_samples == S and p.batch_shape == batch and p.event_shape == (E,) and p.dtype == dtype
    values = p.samples.double().reshape(S, -1, E)
    for number in range(values.shape[1]):
        rows = values[:, number]
        mean = sum(rows) / S
        dense = sum(torch.outer(row - mean, row - mean) for row in rows) / S
        torch.testing.assert_close(p.mean.reshape(-1, E)[number].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            p.covariance.to_dense().reshape(-1, E, E)[number].double(), dense, rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(p.variance, p.covariance.diagonal(dim1=-1, dim2=-2))


def test_the_covariance_of_draws_is_never_dense():
    p = Predictive.from_samples(torch.randn(3, 2, 50_000))  # dense: 20 GB
    assert isinstance(p.covariance, RootLinearOperator) and p.covariance.root.shape == (2, 50_000, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
def test_moments_of_a_gaussian_are_those_that_were_given(form, batch, dtype):
    mean, operator = random(*batch, E, dtype=dtype), covariance(form, batch, dtype)
    p = Predictive.from_moments(mean, operator)
    dense = operator.to_dense()
    assert p.num_samples is None and p.samples is None and p.batch_shape == batch and p.event_shape == (E,)
    torch.testing.assert_close(p.mean, mean)
    torch.testing.assert_close(p.covariance.to_dense(), dense)
    torch.testing.assert_close(p.variance, dense.diagonal(dim1=-1, dim2=-2))
    torch.testing.assert_close(Predictive.from_moments(mean, dense).covariance.to_dense(), dense)


def test_variances_alone_are_a_diagonal_and_broadcast():
    p = Predictive.from_moments(torch.zeros(5, 3), variance=torch.tensor([1.0, 2.0, 3.0]))
    assert isinstance(p.covariance, DiagLinearOperator) and p.covariance.shape == (5, 3, 3)
    wide = Predictive.from_moments(torch.zeros(3), covariance("root and diagonal", (5,), torch.float32, 3))
    assert wide.mean.shape == (5, 3)
    wide = Predictive.from_moments(torch.zeros(2, 3), RBFKernel()(torch.randn(3, 1)))
    assert wide.covariance.shape == (2, 3, 3) and wide.rsample(4).shape == (4, 2, 3)
    events = Predictive.from_moments(torch.zeros(2, 5, 3), variance=torch.ones(3), event_dim=2)
    assert events.event_shape == (5, 3) and events.variance.shape == (2, 5, 3)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gpytorch_distributions(batch, interleaved):
    n, t = 3, 2
    root = random(*batch, n * t, n * t)
    for operator in (to_linear_operator(root @ root.mT), RootLinearOperator(root[..., :2]).add_jitter(0.3)):
        q = MultitaskMultivariateNormal(random(*batch, n, t), operator, interleaved=interleaved)
        p = Predictive.from_distribution(q, noise=0.2)
        assert p.event_shape == (n, t) and p.batch_shape == batch
        torch.testing.assert_close(p.mean, q.mean)
        torch.testing.assert_close(p.variance, q.variance)
        # In the order of memory entry (i, a) stands at i t + a, whatever order GPyTorch keeps.
        place = [i * t + a if interleaved else a * n + i for i in range(n) for a in range(t)]
        dense = operator.to_dense()[..., place, :][..., :, place]
        torch.testing.assert_close(p.covariance.to_dense(), dense)
        y = random(*batch, n, t)
        noisy = dense + 0.2 * torch.eye(n * t).double()
        expected = torch.distributions.MultivariateNormal(q.mean.flatten(-2), noisy).log_prob(y.flatten(-2))
        torch.testing.assert_close(p.log_prob(y), expected)
        many = p.rsample(40_000, torch.Generator().manual_seed(1)).flatten(-2)
        centred = many - many.mean(0)
        measured = torch.einsum("s...i,s...j->...ij", centred, centred) / len(many)
        assert (measured - dense).abs().max() < 0.05 * dense.abs().max()
        points = p.pointwise()
        assert points.batch_shape == (*batch, n) and points.event_shape == (t,)
        for i in range(n):
            block = dense[..., i * t : (i + 1) * t, i * t : (i + 1) * t]
            torch.testing.assert_close(points[..., i].covariance.to_dense(), block)
        torch.testing.assert_close(points.mean, q.mean)
        if batch:
            torch.testing.assert_close(p[1].covariance.to_dense(), dense[1])
            same(Predictive.cat([p[:1], p[1:]]), Predictive.cat([p]))
    q = MultivariateNormal(random(*batch, n), RBFKernel().double()(random(*batch, n, 1)))
    p = Predictive.from_distribution(q)
    assert p.event_shape == (n,)
    torch.testing.assert_close(p.covariance.to_dense(), q.covariance_matrix)
    points = p.pointwise()
    torch.testing.assert_close(points.variance.squeeze(-1), q.variance)
    noisy = Predictive.from_samples(random(S, *batch, n), noise=0.3, scores={"a": random(*batch, 5)}).pointwise()
    assert noisy.noise.shape == noisy.samples.shape == (S, *batch, n, 1) and noisy.scores["a"].shape == (*batch, n, 5)
    assert points.event_shape == (1,) and points.batch_shape == (*batch, n)


def test_a_lazy_covariance_is_not_evaluated_before_it_is_asked_for():
    calls = []

    class Counting(RBFKernel):
        def forward(self, x1, x2, diag=False, **params):
            calls.append(diag)
            return super().forward(x1, x2, diag=diag, **params)

    p = Predictive.from_distribution(MultivariateNormal(torch.zeros(2, 30), Counting()(torch.randn(2, 30, 1))))
    first = p[0]
    assert not calls and first.event_shape == (30,)
    assert p.variance.shape == (2, 30) and calls == [True]
    assert first.covariance.to_dense().shape == (30, 30)


# Draws


@pytest.mark.parametrize("form", FORMS)
def test_draws_have_the_moments(form):
    p = gaussian(form, (2,))
    many = p.rsample(40_000, torch.Generator().manual_seed(0))
    assert many.shape == (40_000, 2, E) and many.dtype == torch.float64
    scale = p.variance.max().sqrt()
    assert (many.mean(0) - p.mean).abs().max() < 0.03 * scale
    centred = many - many.mean(0)
    measured = torch.einsum("sbi,sbj->bij", centred, centred) / len(many)
    assert (measured - p.covariance.to_dense()).abs().max() < 0.04 * scale**2
    across = torch.einsum("si,sj->ij", centred[:, 0], centred[:, 1]) / len(many)
    assert across.abs().max() < 0.04 * scale**2  # elements of the batch are independent


def test_a_generator_decides_and_torchs_own_is_left_alone(dtype):
    for p in (gaussian("dense", (3,), dtype), draws((3,), dtype)):
        before = torch.get_rng_state()
        one, two, three = (p.rsample(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(one, two) and not torch.equal(one, three) and one.dtype == dtype
        torch.manual_seed(3)
        first = p.rsample(4)
        torch.manual_seed(3)
        assert torch.equal(first, p.rsample(4))


def test_given_draws_are_drawn_whole():
    """What is joint over the batch stays so: every draw is one of those given, for all of the batch."""
    p = draws((3,))
    chosen = p.rsample(50)
    assert chosen.shape == (50, 3, E)
    which = [[bool((draw == given_one).all()) for given_one in p.samples] for draw in chosen]
    assert all(sum(row) == 1 for row in which)
    assert all(any(column) for column in zip(*which, strict=True))


def test_singular_covariances_are_drawn_and_what_is_none_is_refused(dtype):
    ones = torch.ones(3, 3, dtype=dtype)
    values = Predictive.from_moments(torch.zeros(3, dtype=dtype), ones).rsample(100)
    assert (values - values[:, :1]).abs().max() < 1e-2 and values.std() > 0.5
    assert Predictive.from_moments(torch.zeros(3, dtype=dtype), 0 * ones).rsample(2).abs().max() == 0
    assert Predictive.from_moments(torch.zeros(3), variance=torch.zeros(3)).rsample(2).abs().max() == 0
    with pytest.raises(NotPSDError, match="clearly negative"):
        Predictive.from_moments(torch.zeros(3, dtype=dtype), -ones).rsample(2)
    with pytest.raises(ValueError, match="covariance: expected finite"):
        Predictive.from_moments(torch.zeros(3, dtype=dtype), torch.nan * ones).rsample(2)


# Densities


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("noisy", [True, False])
def test_density_of_a_gaussian(form, batch, noisy, dtype):
    if form == "root" and not noisy:
        pytest.skip("singular")
    noise = torch.rand(*batch, E, dtype=dtype) + 0.1 if noisy else None
    p = gaussian(form, batch, dtype, noise=noise)
    y = random(*batch, E, dtype=dtype)
    dense = p.covariance.to_dense().double()
    if noisy:
        dense = dense + torch.diag_embed(noise.double())
    expected = torch.distributions.MultivariateNormal(p.mean.double(), dense).log_prob(y.double())
    torch.testing.assert_close(p.log_prob(y), expected.to(dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_densities_in_half_precision_are_exact(dtype):
    """Neither are the observations rounded to half precision, nor is anything added up in it."""
    size = 300
    mean = (10 * torch.randn(3, size)).to(dtype)
    y = mean.float() + 0.3 * torch.randn(3, size)
    variance = (torch.rand(3, size) + 0.5).to(dtype)
    samples = (mean + torch.randn(5, 3, size)).to(dtype)
    few = (mean[:, :2] + torch.randn(9, 3, 2)).to(dtype)
    wide = torch.distributions.Normal
    g = Predictive.from_moments(mean, variance=variance)
    mixture = Predictive.from_samples(samples, noise=0.5)
    draws = Predictive.from_samples(few)
    exact = few.double()
    covariance = torch.einsum("sbi,sbj->bij", exact - exact.mean(0), exact - exact.mean(0)) / 9
    for p, at, expected in (
        (g, y, wide(mean.double(), variance.double().sqrt()).log_prob(y.double()).sum(-1)),
        (
            mixture,
            y,
            wide(samples.double(), math.sqrt(0.5)).log_prob(y.double()).sum(-1).logsumexp(0) - math.log(5),
        ),
        (
            draws,
            y[:, :2],
            torch.distributions.MultivariateNormal(exact.mean(0), covariance).log_prob(y[:, :2].double()),
        ),
    ):
        value = p.log_prob(at)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_density_of_draws(batch, dtype):
    y = random(*batch, E, dtype=dtype)
    each = torch.rand(S, *batch, E, dtype=dtype) + 0.1
    for noise in (0.3, np.float32(0.3), torch.rand(E, dtype=dtype) + 0.1, each):
        p = draws(batch, dtype, noise=noise)
        std = torch.as_tensor(noise, dtype=dtype).expand(S, *batch, E).sqrt()
        densities = [
            torch.distributions.Normal(f, s).log_prob(y).sum(-1).exp() for f, s in zip(p.samples, std, strict=True)
        ]
        torch.testing.assert_close(p.log_prob(y), (sum(densities) / S).log(), rtol=1e-4, atol=1e-4)
    p = draws(batch, dtype)
    normal = torch.distributions.MultivariateNormal(p.mean.double(), p.covariance.to_dense().double())
    torch.testing.assert_close(p.log_prob(y), normal.log_prob(y.double()).to(dtype), rtol=1e-3, atol=1e-3)


def test_density_of_draws_far_away_does_not_underflow():
    p = Predictive.from_samples(torch.tensor([[0.0], [1.0]]), noise=1e-4)
    expected = torch.distributions.Normal(1.0, 0.01).log_prob(torch.tensor(30.0)) - math.log(2)
    torch.testing.assert_close(p.log_prob(torch.tensor([30.0])), expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_intervals_of_a_gaussian(batch, dtype):
    mean, noise = random(*batch, E, dtype=dtype), torch.rand(E, dtype=dtype)
    covariance = random(*batch, E, E, dtype=dtype)
    p = Predictive.from_moments(mean, covariance @ covariance.mT, noise=noise)
    for level in (0.1, 0.5, 0.99):
        lower, upper = p.interval(level)
        normal = torch.distributions.Normal(p.mean, (p.variance + noise).sqrt())
        torch.testing.assert_close(normal.cdf(upper) - normal.cdf(lower), torch.full_like(mean, level))
        torch.testing.assert_close((lower + upper) / 2, mean)
    lower, upper = Predictive.from_moments(mean, covariance @ covariance.mT).interval(0.5)
    torch.testing.assert_close((upper - lower) / (2 * 0.6744897501960817), p.variance.sqrt())


@pytest.mark.parametrize("batch", BATCHES)
def test_intervals_of_draws_are_those_of_the_mixture(batch, dtype):
    noise = torch.rand(S, *batch, E, dtype=dtype) + 0.1
    p = draws(batch, dtype, noise=noise)
    lower, upper = p.interval(0.9)
    normal = torch.distributions.Normal(p.samples, noise.sqrt())
    for end, below in ((lower, 0.05), (upper, 0.95)):
        torch.testing.assert_close(normal.cdf(end).mean(0), torch.full_like(end, below), atol=1e-5, rtol=0)
    # Without noise: as many draws outside as the level leaves.
    plain = Predictive.from_samples(random(1000, *batch, E, dtype=dtype))
    lower, upper = plain.interval(0.9)
    inside = ((plain.samples >= lower) & (plain.samples <= upper)).double().mean(0)
    assert ((inside - 0.9).abs() <= 0.003).all()
    assert lower.dtype == dtype and lower.shape == p.mean.shape
    one = Predictive.from_samples(torch.ones(1, 3)).interval()
    torch.testing.assert_close(torch.stack(one), torch.ones(2, 3))


def test_intervals_of_tasks_and_bad_levels():
    p = Predictive.from_moments(torch.zeros(4, 3), variance=torch.ones(3), event_dim=2)
    assert p.interval()[0].shape == (4, 3)
    for level in (0, 1, -0.5, 1.5, math.nan, True, "most"):
        with pytest.raises(ValueError, match="level: expected a probability between 0 and 1"):
            p.interval(level)


def test_a_low_rank_density_needs_no_dense_matrix():
    size = 40_000  # dense: 13 GB in float64
    root = torch.randn(size, 2, dtype=torch.float64)
    operator = LowRankRootLinearOperator(root).add_diagonal(torch.full((size,), 0.5, dtype=torch.float64))
    p = Predictive.from_moments(torch.zeros(size, dtype=torch.float64), operator)
    y = p.rsample(1)[0]
    inner = torch.linalg.qr(root).R
    values = torch.linalg.svdvals(inner).square()
    log_determinant = (values + 0.5).log().sum() + (size - 2) * math.log(0.5)
    u = torch.linalg.svd(root, full_matrices=False).U
    quadratic = (y.square().sum() - (u.T @ y).square().sum()) / 0.5 + ((u.T @ y).square() / (values + 0.5)).sum()
    torch.testing.assert_close(p.log_prob(y), -0.5 * (quadratic + log_determinant + size * math.log(2 * math.pi)))


def test_where_there_is_no_density():
    y = torch.zeros(2, E)
    for p in (
        Predictive.from_moments(y, variance=torch.zeros(E)),
        Predictive.from_moments(y, torch.zeros(E, E)),
    ):
        with pytest.raises(ValueError, match="no density where it is singular"):
            p.log_prob(y)
    with pytest.raises(ValueError, match=r"samples: .* more draws than the 4 numbers of an event, got 3"):
        Predictive.from_samples(torch.randn(3, 2, E)).log_prob(y)
    with pytest.raises(ValueError, match=r"noise: .* positive"):
        Predictive.from_samples(torch.randn(3, 2, E), noise=0.0).log_prob(y)


# Classes


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", [1, 2, E])
def test_probabilities_of_draws_are_those_of_a_mixture(batch, size, dtype):
    p = draws(batch, dtype, size)
    if size == 1:
        one = torch.stack([f.squeeze(-1).sigmoid() for f in p.samples])
        each = torch.stack([1 - one, one], dim=-1)
    else:
        each = torch.stack([torch.distributions.Categorical(logits=f).probs for f in p.samples])
    mixture = torch.distributions.Categorical(probs=each.mean(0))
    torch.testing.assert_close(p.probs(), mixture.probs)
    torch.testing.assert_close(p.entropy(), mixture.entropy())
    inside = torch.distributions.Categorical(probs=each).entropy().mean(0)
    torch.testing.assert_close(p.expected_entropy(), inside)
    torch.testing.assert_close(p.mutual_information(), mixture.entropy() - inside, atol=1e-5, rtol=1e-4)
    labels = torch.randint(max(size, 2), batch)
    torch.testing.assert_close(p.log_prob(labels), mixture.log_prob(labels))
    torch.testing.assert_close(p.log_prob(labels.int()), mixture.log_prob(labels))
    if max(size, 2) == 2:
        torch.testing.assert_close(p.log_prob(labels.bool()), mixture.log_prob(labels))


def test_probabilities_are_averaged_and_logits_are_not():
    p = Predictive.from_samples(torch.tensor([[9.0, 0.0], [-1.0, 0.0]]))
    expected = (torch.tensor(9.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2
    torch.testing.assert_close(p.probs()[0], expected)
    assert p.mean.softmax(-1)[0] > 0.98 and p.probs()[0] < 0.65


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_of_a_gaussian(form):
    p = gaussian(form, (3,)).detach()
    many = p.rsample(100_000, torch.Generator().manual_seed(1)).softmax(-1).mean(0)
    measured = p.probs(num_samples=20_001, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(measured, many, atol=1e-2, rtol=0)
    expected = (p.mean / (1 + math.pi / 8 * p.variance).sqrt()).softmax(-1)
    torch.testing.assert_close(p.probs("probit"), expected)
    torch.testing.assert_close(p.entropy("probit"), torch.distributions.Categorical(probs=expected).entropy())
    pairs = p.probs("probit_pairs")
    dense = p.covariance.to_dense()
    for b in range(3):
        weight = []
        for k in range(E):
            total = 0.0
            for j in range(E):
                gap = dense[b, k, k] + dense[b, j, j] - 2 * dense[b, k, j]
                total += math.exp(-(p.mean[b, k] - p.mean[b, j]) / math.sqrt(1 + math.pi / 8 * gap))
            weight.append(1 / total)
        torch.testing.assert_close(pairs[b], torch.tensor(weight).double() / sum(weight))
    assert (p.probs("probit_pairs") - many).abs().max() < 0.1


def test_noise_that_all_logits_share_changes_no_probability():
    p = Predictive.from_moments(random(5, E), RootLinearOperator(4 * torch.ones(5, E, 1, dtype=torch.float64)))
    for method in ("sample", "probit_pairs", "laplace_bridge"):
        torch.testing.assert_close(p.probs(method), p.mean.softmax(-1))
    torch.testing.assert_close(p.mutual_information(), torch.zeros(5).double(), atol=1e-12, rtol=0)
    assert (p.probs("probit") - p.mean.softmax(-1)).abs().max() > 0.05


def test_pairs_are_flattened_one_by_one_and_are_for_few_classes():
    generator = torch.Generator().manual_seed(0)
    misplaced = {}
    for classes in (2, 10, 100):
        mean = 2 * torch.randn(100, classes, generator=generator, dtype=torch.float64)
        p = Predictive.from_moments(mean, variance=torch.ones_like(mean))
        right, pairs = p.probs(num_samples=2000, generator=generator), p.probs("probit_pairs")
        misplaced[classes] = (pairs - right).abs().sum(-1).mean() / 2
        assert classes == 2 or pairs.amax(-1).mean() < right.amax(-1).mean()
    assert misplaced[2] < 0.01 and 0.03 < misplaced[10] < 0.07 and misplaced[100] > 0.1


def test_one_logit_of_a_gaussian():
    p = Predictive.from_moments(random(5, 1), variance=torch.rand(5, 1).double())
    expected = (p.mean / (1 + math.pi / 8 * p.variance).sqrt()).sigmoid().squeeze(-1)
    for method in ("probit", "probit_pairs"):
        torch.testing.assert_close(p.probs(method), torch.stack([1 - expected, expected], -1))
    torch.testing.assert_close(p.log_prob(torch.ones(5).long(), "probit"), expected.log())
    pair = torch.stack([torch.zeros(5).double(), p.mean.squeeze(-1)], -1)
    two = Predictive.from_moments(pair, variance=torch.stack([torch.zeros(5).double(), p.variance.squeeze(-1)], -1))
    torch.testing.assert_close(p.probs("laplace_bridge"), two.probs("laplace_bridge"))
    assert p.probs().shape == (5, 2)
    torch.testing.assert_close(p.probs(num_samples=20_000)[:, 1], expected, atol=1e-2, rtol=0)


def test_all_elements_of_the_batch_see_the_same_noise():
    """So rows can be compared, and a part of the batch gets the probabilities that it has in the whole."""
    p = gaussian("dense", (6,))

    def seeded():
        return torch.Generator().manual_seed(4)

    torch.testing.assert_close(p.probs(generator=seeded())[2:4], p[2:4].probs(generator=seeded()))
    torch.testing.assert_close(
        p.entropy(generator=seeded()) - p.expected_entropy(generator=seeded()),
        p.mutual_information(generator=seeded()),
    )
    p = Predictive.from_moments(torch.zeros(1000, 3), variance=torch.ones(3), event_dim=1)
    assert (p.probs() == p.probs(generator=None)).float().mean() < 0.5  # new noise at each call
    row = p.probs()
    torch.testing.assert_close(row, row[:1].expand(1000, 3), rtol=1e-6, atol=0)  # summed in another order
    mean = Predictive.from_moments(random(1), variance=torch.ones(1).double())._log_probs_of_draws(NUM_DRAWS, None)
    assert mean.shape == (NUM_DRAWS, 2)


def test_classes_at_points():
    """Events (n, K): every point has its classes."""
    n, K = 3, 4
    p = Predictive.from_samples(random(S, 2, n, K), event_dim=2)
    torch.testing.assert_close(p.probs(), p.samples.softmax(-1).mean(0))
    labels = torch.randint(K, (2, n))
    expected = torch.distributions.Categorical(probs=p.probs()).log_prob(labels)
    torch.testing.assert_close(p.log_prob(labels), expected)
    torch.testing.assert_close(p.pointwise().log_prob(labels), expected)
    assert p.entropy().shape == p.mutual_information().shape == (2, n)
    root = random(n * K, n * K)
    for interleaved in (True, False):
        q = MultitaskMultivariateNormal(random(n, K), to_linear_operator(root @ root.mT), interleaved=interleaved)
        g = Predictive.from_distribution(q)
        for method in PROBS_METHODS:
            torch.testing.assert_close(g.probs(method).sum(-1), torch.ones(n).double())
        for method in ("probit_pairs", "laplace_bridge"):
            torch.testing.assert_close(g.probs(method), g.pointwise().probs(method))
        many = g.rsample(50_000).softmax(-1).mean(0)
        torch.testing.assert_close(g.probs(num_samples=20_000), many, atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_probabilities_in_every_precision(dtype):
    values = torch.randn(S, 5, 100, dtype=torch.float64).to(dtype)
    wide = values.double().softmax(-1).mean(0)
    p = Predictive.from_samples(values)
    probs = p.probs()
    assert p.dtype == dtype and p.mean.dtype == dtype
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(probs.double(), wide, rtol=1e-5, atol=1e-7)
    g = Predictive.from_moments(values[0], variance=values[1].square())
    for method in PROBS_METHODS:
        torch.testing.assert_close(g.probs(method).sum(-1), torch.ones(5, dtype=probs.dtype))
    assert g.rsample(2).dtype == dtype and p.covariance.dtype == dtype
    assert p.mutual_information().dtype == probs.dtype


def test_impossible_classes_are_harmless():
    values = torch.tensor([[0.0, -1e30, -math.inf], [200.0, 0.0, -math.inf]], requires_grad=True)
    p = Predictive.from_samples(values.unsqueeze(1))
    torch.testing.assert_close(p.probs(), torch.tensor([[1.0, 0.0, 0.0]]))
    assert p.log_prob(torch.tensor([2])) == -math.inf
    for score in (p.entropy(), p.expected_entropy(), p.mutual_information()):
        assert score.abs().max() == 0
    (p.entropy() + p.expected_entropy() + p.probs().square().sum(-1)).sum().backward()
    assert values.grad.isfinite().all()


logits = st.lists(
    st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=5
)  # (S, K), with ties and logits far apart


@given(logits)
def test_probabilities_sum_to_one_and_information_is_bounded(values):
    p = Predictive.from_samples(torch.tensor(values))
    entropy, information = p.entropy(), p.mutual_information()
    torch.testing.assert_close(p.probs().sum(), torch.tensor(1.0))
    assert 0 <= information <= entropy + 1e-6
    assert -1e-6 <= entropy <= math.log(3) + 1e-6
    assert information <= math.log(len(values)) + 1e-5  # it cannot tell more than which draw it was
    by_label = torch.stack([p.log_prob(torch.tensor(k)) for k in range(3)])
    torch.testing.assert_close(by_label.exp(), p.probs())


@given(logits, st.sampled_from(["diagonal", "root", "dense"]))
def test_so_it_is_for_gaussians(values, form):
    p = Predictive.from_moments(torch.tensor(values).double(), covariance(form, (len(values),), size=3))
    generator = torch.Generator().manual_seed(0)
    for method in PROBS_METHODS:
        torch.testing.assert_close(p.probs(method, generator=generator).sum(-1), torch.ones(len(values)).double())
    information = p.mutual_information(generator=torch.Generator().manual_seed(1))
    assert (information >= 0).all() and (
        information <= p.entropy(generator=torch.Generator().manual_seed(1)) + 1e-9
    ).all()


# Gradients


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_gaussian(form):
    mean, root = random(2, E).requires_grad_(), random(2, E, R).requires_grad_()
    diagonal = (torch.rand(2, E).double() + 0.5).requires_grad_()
    y, labels = random(2, E), torch.tensor([1, 3])

    def build(mean, root, diagonal):
        low = RootLinearOperator(root)
        operator = {
            "diagonal": DiagLinearOperator(diagonal),
            "root": low,
            "root and diagonal": low.add_diagonal(diagonal),
            "sum of roots": SumLinearOperator(low, DiagLinearOperator(diagonal), low),
            "dense": to_linear_operator(root @ root.mT + torch.diag_embed(diagonal)),
            "lazy": KroneckerProductLinearOperator(
                to_linear_operator(root[..., :2, :] @ root[..., :2, :].mT).add_jitter(1.0),
                DiagLinearOperator(diagonal[..., :2]),
            ),
        }[form]
        return Predictive.from_moments(mean, operator, noise=0.1)

    for ask in (
        lambda p: p.variance,
        lambda p: p.rsample(3, torch.Generator().manual_seed(0)),
        lambda p: p.log_prob(y),
        lambda p: p.probs(num_samples=4, generator=torch.Generator().manual_seed(0)),
        lambda p: p.probs("probit_pairs"),
        lambda p: p.probs("laplace_bridge"),
        lambda p: p.log_prob(labels, "probit"),
        lambda p: p[0].rsample(2, torch.Generator().manual_seed(0)),
    ):
        assert torch.autograd.gradcheck(lambda *a, ask=ask: ask(build(*a)), (mean, root, diagonal))


def test_gradients_of_draws():
    values, noise = random(S, 2, E).requires_grad_(), (torch.rand(E).double() + 0.1).requires_grad_()
    y = random(2, E)
    for ask in (
        lambda p: (p.mean, p.variance, p.probs(), p.entropy(), p.mutual_information()),
        lambda p: p.log_prob(y),
        lambda p: p.log_prob(torch.tensor([0, 1])),
        lambda p: p.rsample(3, torch.Generator().manual_seed(0)),
    ):
        assert torch.autograd.gradcheck(lambda f, v, ask=ask: ask(Predictive.from_samples(f, noise=v)), (values, noise))
    assert torch.autograd.gradcheck(lambda f: Predictive.from_samples(f).log_prob(y), (values,))


def test_the_gradient_at_variance_zero_is_finite():
    variance = torch.zeros(3, requires_grad=True)
    Predictive.from_moments(torch.zeros(3), variance=variance).rsample(2).sum().backward()
    assert variance.grad.abs().max() == 0


# Batches


INDICES = [
    0,
    -1,
    slice(1, None),
    slice(None, None, 2),
    (0, 2),
    (slice(None), 1),
    (1, slice(0, 2)),
    ...,
    (..., 0),
    (0, ...),
    (0, ..., 1),
    torch.tensor([2, 0, 2]),
    torch.tensor(1),
    [1, 0],
    [],
    np.int64(1),
    (np.int64(0), slice(1)),
    np.array([2, 0]),
    np.array([True, False, True]),
    (slice(None), torch.tensor([0, 1])),
    (torch.tensor([0, 1]), torch.tensor([1, 2])),
    (slice(1, 3), slice(None), torch.tensor([1, 0])),
    (torch.tensor([0, 1]), slice(None), torch.tensor([1, 0])),
    (torch.tensor([0, 1]), ..., 1),
    torch.tensor([True, False, True]),
    (slice(None), torch.tensor([True, False, True])),
    torch.tensor([[True, False, True], [False, False, False], [True, True, False]]),
]


@pytest.mark.parametrize("kind", [*FORMS, "draws"])
def test_slices_are_those_of_tensors(kind):
    batch = (3, 3, 2)
    scores = {"spread": random(*batch, 5), "label": torch.randint(9, batch)}
    noise = torch.rand(*batch, E).double()
    p = (
        draws(batch, noise=noise, scores=scores)
        if kind == "draws"
        else gaussian(kind, batch, noise=noise, scores=scores)
    )
    dense = p.covariance.to_dense()
    for index in INDICES:
        part, entries = p[index], part_entries(index)
        assert part.batch_shape == scores["label"][index].shape
        torch.testing.assert_close(part.scores["label"], scores["label"][index])
        torch.testing.assert_close(part.scores["spread"], scores["spread"][entries])
        torch.testing.assert_close(part.mean, p.mean[entries])
        torch.testing.assert_close(part.covariance.to_dense(), dense[entries])
        if kind == "draws":
            for number in range(S):
                torch.testing.assert_close(part.samples[number], p.samples[number][entries])
                torch.testing.assert_close(part.noise[number], noise[entries])
        else:
            torch.testing.assert_close(part.noise, noise[entries])
    assert len(p) == 3 and len(list(p)) == 3


def part_entries(index):
    """An index into the batch with full slices in place of dots."""
    entries = list(index) if isinstance(index, tuple) else [index]
    used = sum(i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1 for i in entries if i is not ...)
    if not any(i is ... for i in entries):
        entries.append(...)
    place = next(k for k, i in enumerate(entries) if i is ...)
    return (*entries[:place], *[slice(None)] * (3 - used), *entries[place + 1 :])


@given(st.sampled_from([*FORMS, "draws"]), basic_indices((4, 3, 2), allow_newaxis=False))
def test_the_mean_of_a_slice_is_a_slice_of_the_mean(kind, index):
    p = draws((4, 3, 2)) if kind == "draws" else gaussian(kind, (4, 3, 2))
    entries = part_entries(index)
    assume(all(i.step is None or i.step > 0 for i in entries if isinstance(i, slice)))  # torch has no others
    torch.testing.assert_close(p[index].mean, p.mean[entries])
    torch.testing.assert_close(p[index].variance, p.variance[entries])


@pytest.mark.parametrize("kind", [*FORMS, "draws"])
@given(data=st.data())
def test_cat_of_slices_is_the_whole(kind, data):
    batch = (4, 3)
    scores = {"spread": random(*batch)}
    p = draws(batch, noise=0.1, scores=scores) if kind == "draws" else gaussian(kind, batch, noise=0.1, scores=scores)
    dim = data.draw(st.sampled_from([0, 1, -1, -2]))
    cuts = sorted(data.draw(st.sets(st.integers(1, batch[dim] - 1))))
    edges = [0, *cuts, batch[dim]]
    lead = (slice(None),) * (dim % 2)
    parts = [p[(*lead, slice(a, b))] for a, b in pairwise(edges)]
    same(Predictive.cat(parts, dim), p)


def test_cat_of_different_forms_keeps_what_it_can():
    parts = [gaussian(form, (2,)) for form in FORMS]
    whole = Predictive.cat(parts)
    torch.testing.assert_close(whole.covariance.to_dense(), torch.cat([p.covariance.to_dense() for p in parts]))
    low = Predictive.cat(parts[:4])
    assert low._spread.matrix is None and low._spread.root.shape[-1] == R + 1
    torch.testing.assert_close(low.covariance.to_dense(), torch.cat([p.covariance.to_dense() for p in parts[:4]]))
    assert Predictive.cat(parts[1:2] * 2)._spread.diagonal is None


def test_what_does_not_fit_together_is_not_put_together():
    p, g = draws((2,)), gaussian("dense", (2,))
    for other, message in (
        (g, "the same kind everywhere, got 6 draws in number 0 and a Gaussian in number 1"),
        (Predictive.from_samples(random(S - 1, 2, E)), "kind everywhere, got 6 draws in number 0 and 5 draws"),
        (Predictive.from_samples(random(S, 2, E + 1)), "event shape"),
        (Predictive.from_samples(random(S, 3, 2, E)), "batch shape elsewhere"),
        (Predictive.from_samples(random(S, 2, E).float()), "dtype"),
        (draws((2,), noise=0.1), "noise"),
        (draws((2,), scores={"a": torch.zeros(2)}), "scores"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictive.cat([p, other])
    with pytest.raises(ValueError, match="predictions: expected at least one"):
        Predictive.cat([])
    for dim in (1, -2):
        with pytest.raises(IndexError, match="dim: expected one of 1"):
            Predictive.cat([p, p], dim)
    with pytest.raises(IndexError, match="dim: expected one of 0"):
        Predictive.cat([draws(()), draws(())])


# Copies


@pytest.mark.parametrize("kind", [*FORMS, "draws"])
def test_it_moves_copies_and_travels(kind, tmp_path):
    scores = {"spread": torch.rand(2), "label": torch.tensor([1, 2])}
    p = draws((2,), noise=0.1, scores=scores) if kind == "draws" else gaussian(kind, (2,), noise=0.1, scores=scores)
    assert p.to("cpu") is p and p.cpu() is p and p.to(torch.float64) is p
    short = p.to(torch.float32)
    assert short.dtype == short.covariance.dtype == short.noise.dtype == short.scores["spread"].dtype == torch.float32
    assert short.scores["label"].dtype == torch.int64
    torch.testing.assert_close(short.covariance.to_dense().double(), p.covariance.to_dense(), rtol=1e-5, atol=1e-5)
    torch.save(p, tmp_path / "p.pt")
    for other in (
        copy.deepcopy(p),
        copy.copy(p),
        pickle.loads(pickle.dumps(p)),
        torch.load(tmp_path / "p.pt", weights_only=False),
        p.detach(),
    ):
        same(other, p)
    clone = copy.deepcopy(p)
    clone.mean.zero_() if clone.samples is None else clone.samples.zero_()
    assert p.mean.abs().max() > 0
    with pytest.raises(TypeError, match="dtype: expected a floating-point one"):
        p.to(torch.int64)


def test_detached_it_does_not_look_at_its_model_any_more():
    kernel, x = RBFKernel(), torch.randn(3, 1)
    p = Predictive.from_distribution(MultivariateNormal(torch.zeros(3), kernel(x)))
    assert p.rsample(1).requires_grad
    free, copied = p.detach(), copy.deepcopy(p)
    before = free.covariance.to_dense()
    p = Predictive.from_distribution(MultivariateNormal(torch.zeros(3), kernel(x)))
    assert not free.rsample(1).requires_grad
    kernel.lengthscale = 9.0
    torch.testing.assert_close(free.covariance.to_dense(), before)
    torch.testing.assert_close(copied.covariance.to_dense(), before)
    assert not torch.allclose(p.covariance.to_dense(), before)
    assert copied.rsample(1).requires_grad


def test_it_is_a_value():
    p = draws((2,), scores={"a": torch.zeros(2)})
    with pytest.raises(AttributeError):
        p.noise = torch.ones(1)
    with pytest.raises(TypeError):
        p.scores["b"] = torch.ones(2)
    given_scores = {"a": torch.zeros(2)}
    q = draws((2,), scores=given_scores)
    given_scores["b"] = torch.ones(2)
    assert list(q.scores) == ["a"]


def test_notes_travel_along(tmp_path):
    for p in (gaussian("dense", (6,)), draws((6,)), gaussian("root", (6,), noise=0.1)):
        assert dict(p.notes) == {}
        noted = p.noted(covariance="full").noted(columns=3)
        same(noted, p)  # nothing else is changed
        expected = {"covariance": "full", "columns": 3}
        parts = [noted[1:4], noted[torch.tensor([0, 2])], noted[0], noted.pointwise(), noted.detach(), noted.to("cpu")]
        parts += [noted.to(torch.float32), copy.copy(noted), copy.deepcopy(noted), pickle.loads(pickle.dumps(noted))]
        parts += [Predictive.cat([noted[:2], noted[2:]])]
        for part in parts:
            assert dict(part.notes) == expected
        assert dict(Predictive.cat([noted, noted.noted(columns=4)]).notes) == {"covariance": "full"}
        assert dict(Predictive.cat([noted, p]).notes) == dict(Predictive.cat([p, noted]).notes) == {}
        with pytest.raises(TypeError):
            noted.notes["covariance"] = "diag"
    before = {name: value for name, value in p.__getstate__().items() if name != "notes"}  # a file from before notes
    old = Predictive.__new__(Predictive)
    old.__setstate__(before)
    assert dict(old.notes) == {}
    same(old, p)


def test_repr():
    p = draws((2, 3), torch.float32, scores={"b": torch.zeros(2, 3), "a": torch.zeros(2, 3, 7)})
    assert repr(p) == (
        "Predictive(samples=6, batch_shape=(2, 3), event_shape=(4,), dtype=float32, device=cpu, scores=['a', 'b'])"
    )
    assert repr(gaussian("dense", ())).startswith("Predictive(Gaussian, batch_shape=()")


@pytest.mark.cuda
def test_on_a_gpu():
    p = draws((2,), torch.float32, noise=0.1, scores={"a": torch.zeros(2)}).to("cuda")
    assert p.device.type == p.scores["a"].device.type == p.probs().device.type == "cuda"
    g = gaussian("root and diagonal", (2,), torch.float32).to("cuda")
    assert g.rsample(2, torch.Generator("cuda")).device.type == "cuda"
    same(p.cpu().to("cuda"), p)


# Bad input

MANY = torch.zeros(6, 2, 4)
ONES = torch.ones(4)
NAN = torch.tensor([1.0, math.nan, 1.0, 1.0])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Predictive.from_samples([1.0]), TypeError, "samples: expected a floating-point tensor, got list"),
        (lambda: Predictive.from_samples(torch.zeros(2, 3).long()), TypeError, "samples: .* got torch.int64"),
        (lambda: Predictive.from_samples(torch.zeros(3)), ValueError, r"samples: expected shape \(S, \*batch, E\)"),
        (lambda: Predictive.from_samples(torch.zeros(0, 3)), ValueError, "S at least 1"),
        (lambda: Predictive.from_samples(torch.zeros(5, 3), event_dim=2), ValueError, r"\(S, \*batch, n, t\)"),
        (lambda: Predictive.from_samples(MANY, event_dim=3), ValueError, "event_dim: expected 1 or 2, got 3"),
        (lambda: Predictive.from_samples(MANY, noise=-1.0), ValueError, "noise: .* not negative"),
        (lambda: Predictive.from_samples(MANY, noise=math.nan), ValueError, "noise: .* NaN"),
        (lambda: Predictive.from_samples(MANY, noise=torch.ones(3)), ValueError, r"noise: .* \(6, 2, 4\), got \(3,\)"),
        (lambda: Predictive.from_samples(MANY, scores={"a": torch.zeros(3)}), ValueError, r"scores\['a'\]: expected"),
        (lambda: Predictive.from_samples(MANY, scores={"a": 1.0}), ValueError, "got float"),
        (lambda: Predictive.from_samples(MANY, scores=[1]), TypeError, "scores: expected a mapping .* got list"),
        (lambda: Predictive.from_samples(MANY, noise="a"), TypeError, "noise: expected a real number .* got str"),
        (lambda: Predictive.from_samples(MANY, noise=True), TypeError, "noise: expected a real number .* torch.bool"),
        (
            lambda: Predictive.from_samples(MANY, noise=1j),
            TypeError,
            "noise: expected a real number .* got torch.complex64",
        ),
        (lambda: Predictive.from_samples(MANY, event_dim=True), ValueError, "event_dim: expected 1 or 2, got True"),
        (lambda: Predictive.from_moments(MANY, variance=NAN), ValueError, "variance: .* not negative, got nan"),
        (lambda: Predictive.from_moments(MANY, DiagLinearOperator(NAN)), ValueError, "covariance: .* got NaN"),
        (lambda: Predictive.from_moments(MANY, DiagLinearOperator(-ONES)), ValueError, "covariance: .* got -1"),
        (lambda: Predictive.from_moments(MANY, variance=ONES.double()), TypeError, "variance: expected torch.float32"),
        (
            lambda: Predictive.from_moments(MANY, DiagLinearOperator(ONES.double())),
            TypeError,
            "covariance: expected torch.float32, as the mean has, got torch.float64",
        ),
        (lambda: Predictive.from_moments(MANY, variance=ONES.to("meta")), ValueError, "variance: expected it on cpu"),
        (lambda: Predictive.from_moments(MANY), ValueError, "covariance: expected either it or variance, got none"),
        (lambda: Predictive.from_moments(MANY, torch.eye(4), torch.ones(4)), ValueError, "got both"),
        (lambda: Predictive.from_moments(MANY, torch.eye(3)), ValueError, r"shape \(\*batch, 4, 4\) .* got \(3, 3\)"),
        (lambda: Predictive.from_moments(MANY, torch.eye(4).double()), TypeError, "covariance: expected torch.float32"),
        (lambda: Predictive.from_moments(MANY, torch.zeros(3, 4, 4)), ValueError, "do not broadcast"),
        (lambda: Predictive.from_moments(MANY, variance=-torch.ones(4)), ValueError, "variance: .* not negative"),
        (lambda: Predictive.from_moments(MANY, variance=torch.ones(3)), ValueError, "variance: expected a shape that"),
        (lambda: Predictive.from_moments(torch.tensor(1.0), torch.eye(1)), ValueError, "mean: expected at least 1"),
        (
            lambda: Predictive.from_distribution(torch.distributions.Normal(0.0, 1.0)),
            TypeError,
            "distribution: expected a gpytorch .* got Normal",
        ),
    ],
)
def test_bad_values_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda p: p.log_prob(1), TypeError, "y: expected a tensor, got int"),
        (
            lambda p: p.log_prob(torch.zeros(2, 4, dtype=torch.complex64)),
            TypeError,
            "y: expected labels or real numbers, got torch.complex64",
        ),
        (lambda p: p.log_prob(torch.zeros(2)), ValueError, r"y: expected real numbers of shape \(2, 4\), or labels"),
        (lambda p: p.log_prob(torch.full((2, 4), math.nan)), ValueError, "y: expected numbers, got NaN in 8 of 8"),
        (lambda p: p.log_prob(torch.tensor([0, 4])), ValueError, "y: expected labels from 0 to 3, got from 0 to 4"),
        (lambda p: p.log_prob(torch.tensor([-1, 2])), ValueError, "got from -1 to 2"),
        (
            lambda p: p.log_prob(torch.tensor([[0], [1]])),
            ValueError,
            r"y: expected labels of shape \(2,\), got \(2, 1\)",
        ),
        (lambda p: p.probs("mean"), ValueError, "method: expected one of sample, probit, probit_pairs, l"),
        (lambda p: p.probs(num_samples=0), ValueError, "num_samples: "),
        (lambda p: p.rsample(0), ValueError, "n: expected at least 1"),
        (lambda p: p.rsample(2.0), TypeError, "n: expected an integer"),
        (lambda p: p[None], IndexError, "index: expected integers, slices"),
        (lambda p: p[1.0], IndexError, "index: expected integers, slices"),
        (lambda p: p[[0.5]], IndexError, r"index: expected integers, slices, .* got \[0.5\]"),
        (lambda p: p[[[0], [0, 1]]], IndexError, "index: expected integers, slices"),
        (lambda p: p[torch.tensor([0.0])], IndexError, "index: expected integers, slices"),
        (lambda p: p[np.array([0.0])], IndexError, "index: expected integers, slices"),
        (lambda p: p[np.array(["a"])], IndexError, "index: expected integers, slices"),
        (lambda p: p[torch.tensor(True)], IndexError, "index: expected integers, slices"),
        (lambda p: p.rsample(2, generator=3), TypeError, "generator: expected a torch.Generator or None, got int"),
        (lambda p: Predictive.cat([p, None]), TypeError, "predictions: expected Predictive, got NoneType in number 1"),
        (lambda p: Predictive.cat([p.mean]), TypeError, "predictions: expected Predictive, got Tensor in number 0"),
        (lambda p: Predictive.cat(3), TypeError, "predictions: expected several of them in a sequence, got int"),
        (lambda p: Predictive.cat([p], dim=1.0), TypeError, "dim: expected an integer, got 1.0"),
        (
            lambda p: Predictive.cat([p, p._map(lambda t: t.to("meta"))]),
            ValueError,
            "predictions: expected the same device everywhere, got cpu in number 0 and meta in number 1",
        ),
        (lambda p: p[True], IndexError, "index: expected integers, slices"),
        (lambda p: p[0, 0], IndexError, r"index: a batch of shape \(2,\) takes at most 1, got 2"),
        (lambda p: p[..., 0, ...], IndexError, "at most one '...'"),
        (lambda p: p[2], IndexError, "out of"),
        (lambda p: p[0][0], IndexError, "takes at most 0"),
        (lambda p: len(p[0]), TypeError, "no length"),
    ],
)
def test_bad_questions_are_named(ask, error, message):
    for p in (Predictive.from_samples(MANY), Predictive.from_moments(MANY[0], torch.eye(4))):
        with pytest.raises(error, match=message):
            ask(p)


def test_other_bad_questions():
    with pytest.raises(ValueError, match="method: draws are averaged by 'sample', got 'probit'"):
        Predictive.from_samples(MANY).probs("probit")
    with pytest.raises(ValueError, match="num_samples: the 6 draws are given, got 5"):
        Predictive.from_samples(MANY).entropy(num_samples=5)
    for p in (Predictive.from_samples(MANY * math.nan), Predictive.from_moments(MANY[0] * math.nan, torch.eye(4))):
        for ask in (p.probs, p.entropy, p.mutual_information):
            with pytest.raises(ValueError, match=r"logits: expected numbers, .* got NaN"):
                ask()
    one = Predictive.from_samples(torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="y: expected labels from 0 to 1, got from 0 to 2"):
        one.log_prob(torch.tensor([0, 1, 2]))


def test_a_dtype_that_a_lazy_kernel_has_not_is_that_of_its_values():
    """A lazy kernel says that its dtype is that of its parameters, whatever its inputs."""
    q = MultivariateNormal(random(3), RBFKernel()(random(3, 1)))
    p = Predictive.from_distribution(q)
    assert p.covariance.dtype == p.variance.dtype == p.rsample(2).dtype == torch.float64
    torch.testing.assert_close(p.covariance.to_dense(), q.covariance_matrix)
    short = p.to(torch.float32)
    assert short.mean.dtype == short.covariance.dtype == short.covariance.to_dense().dtype == torch.float32


def test_forbidden_classes():
    mean = torch.tensor([[1.0, -math.inf, 0.0]])
    g, two = Predictive.from_moments(mean, torch.eye(3)), Predictive.from_moments(mean[:, ::2], torch.eye(2))
    for method in ("probit", "probit_pairs", "laplace_bridge"):
        torch.testing.assert_close(g.probs(method)[:, ::2], two.probs(method))
    for probs in (g.probs(), *(g.probs(method) for method in PROBS_METHODS)):
        assert probs[0, 1] == 0 and not probs.isnan().any()
    p = Predictive.from_samples(mean.expand(4, 1, 3))
    assert p.mean[0, 1] == -math.inf and p.variance[0].isnan().tolist() == [False, True, False]
    assert p.probs()[0, 1] == 0 and p.mutual_information().abs().max() < 1e-6


def test_an_empty_batch_is_legal():
    p = draws((3,))[:0]
    assert p.batch_shape == (0,) and len(p) == 0 and p.probs().shape == (0, E) and p.mean.shape == (0, E)
    assert p.log_prob(torch.zeros(0).long()).shape == (0,)
    same(Predictive.cat([p, p]), p)
    for form in FORMS:
        assert gaussian(form, (3,))[torch.zeros(3).bool()].rsample(2).shape == (2, 0, E)


def test_a_spread_takes_as_many_normals_as_its_form_needs():
    assert [Spread.of(covariance(form, ())).width for form in FORMS] == [E, R, R + E, R + 1 + E, E, E]
