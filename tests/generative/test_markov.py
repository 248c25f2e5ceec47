"""Exact posteriors of Matérn priors, against dense Gaussian processes."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.generative.kalman import METHODS
from gpseq.generative.markov import MarkovPosterior, MarkovPrior
from gpseq.generative.state_space import KERNELS
from tests.oracles_generative_markov import Dense, matern

L = 2
EXACT = {"rtol": 1e-8, "atol": 1e-8}
CASES = [(kernel, method) for kernel in KERNELS for method in METHODS]
every_case = pytest.mark.parametrize(("kernel", "method"), CASES, ids=["-".join(case) for case in CASES])


def prior_of(kernel: str, method: str = "parallel") -> MarkovPrior:
    """Two latents of different lengthscales."""
    return MarkovPrior(kernel, num_latents=L, lengthscale=[0.6, 1.7], method=method, dtype=torch.float64)


def data(n: int, *batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unsorted irregular times with repeats, values, variances of several sizes, and what is missing."""
    x = torch.rand(*batch, n, dtype=dtype) * n / 5
    x[..., -1] = x[..., 0]
    mean = torch.randn(*batch, L, n, dtype=dtype)
    variance = 10 ** (-2.5 * torch.rand(*batch, L, n, dtype=dtype))
    return x, mean, variance, torch.rand(*batch, n) < 0.3


def dense_of(prior: MarkovPrior, latent: int, x: Tensor, mean: Tensor, variance: Tensor, missing: Tensor) -> Dense:
    """One latent of one series, in float64, without what is missing."""
    lengthscale = prior.lengthscale[latent].double()
    there = ~missing
    y, v = (value[latent][there].double() for value in (mean, variance))
    return Dense(prior.kernel, x[there].double(), y, v, lengthscale)


@every_case
def test_posterior_is_that_of_the_dense_process(kernel: str, method: str, dtype: torch.dtype) -> None:
    """Marginals, evidence, divergence and predictions, for all batch shapes, in the caller's order and dtype."""
    prior = prior_of(kernel, method).to(dtype)
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for batch in ((), (3,), (2, 1)):
        x, mean, variance, missing = data(15, *batch, dtype=dtype)
        x_new = torch.cat([x[..., :2], x[..., :2], 8 * torch.rand(*batch, 4, dtype=dtype) - 2], -1)
        posterior = prior.posterior(x, mean, variance, missing)
        at_new = posterior.predict(x_new)
        assert posterior.mean.shape == posterior.variance.shape == (*batch, L, 15)
        assert posterior.kl.shape == posterior.log_evidence.shape == (*batch, L)
        assert at_new[0].shape == at_new[1].shape == (*batch, L, 8)
        values = posterior.mean, posterior.variance, posterior.kl, posterior.log_evidence, *at_new
        assert {value.dtype for value in values} == {dtype}
        for b in itertools.product(*map(range, batch)):
            for latent in range(L):
                dense = dense_of(prior, latent, x[b], mean[b], variance[b], missing[b])
                m, S = dense.predict(x[b].double())
                m_new, S_new = dense.predict(x_new[b].double())
                expected = m, S.diagonal(), dense.kl, dense.log_evidence, m_new, S_new.diagonal()
                for found, wanted in zip(values, expected, strict=True):
                    torch.testing.assert_close(found[b][latent], wanted.to(dtype), **tolerance)


@every_case
def test_gradients_are_those_of_the_dense_process(kernel: str, method: str) -> None:
    """By the lengthscale, the pseudo-observations and their variances, through everything that comes out."""
    prior = prior_of(kernel, method)
    x, mean, variance, missing = data(12)
    x_new = torch.tensor([0.3, 1.9, -0.5], dtype=torch.float64)
    inputs = prior.raw_lengthscale, mean.requires_grad_(), variance.requires_grad_()
    weights = torch.randn(L, 15, dtype=torch.float64)

    def total(m: Tensor, s2: Tensor, latent: int) -> Tensor:
        return (weights[latent, : len(m)] * (m + 2 * s2)).sum()

    posterior = prior.posterior(x, mean, variance, missing)
    m_new, s2_new = posterior.predict(x_new)
    found = posterior.kl.sum() + 0.3 * posterior.log_evidence.sum()
    expected = torch.zeros((), dtype=torch.float64)
    for latent in range(L):
        found = found + total(posterior.mean[latent], posterior.variance[latent], latent)
        found = found + total(m_new[latent], s2_new[latent], latent)
        dense = dense_of(prior, latent, x, mean, variance, missing)
        expected = expected + dense.kl + 0.3 * dense.log_evidence
        for times in (x, x_new):
            m, S = dense.predict(times)
            expected = expected + total(m, S.diagonal(), latent)
    gradients = [torch.autograd.grad(value, inputs) for value in (found, expected)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, **EXACT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_methods_agree(kernel: str) -> None:
    """To 1e-10, on a series of some length, draws included."""
    x, mean, variance, missing = data(300)
    found = []
    for method in METHODS:
        posterior = prior_of(kernel, method).posterior(x, mean, variance, missing)
        draws = posterior.rsample(x[:50] + 0.01, (3,), torch.Generator().manual_seed(1))
        found.append((posterior.mean, posterior.variance, posterior.kl, posterior.log_evidence, draws))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@every_case
def test_missing_is_leaving_out(kernel: str, method: str) -> None:
    """Whatever stands in the place of what is missing, with gradients that are numbers."""
    prior = prior_of(kernel, method)
    x, mean, variance, missing = data(20)
    wild = mean.clone(), variance.clone()
    wild[0][:, missing], wild[1][:, missing] = torch.nan, -torch.inf
    values = [value.requires_grad_() for value in wild]
    full, short = (
        prior.posterior(x, *values, missing),
        prior.posterior(x[~missing], mean[:, ~missing], variance[:, ~missing]),
    )
    for one, two in (
        (full.mean[:, ~missing], short.mean),
        (full.variance[:, ~missing], short.variance),
        (full.kl, short.kl),
        (full.log_evidence, short.log_evidence),
        (full.mean[:, missing], short.predict(x[missing])[0]),
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    for gradient in torch.autograd.grad(full.kl.sum() + full.mean.sum() + full.log_evidence.sum(), values):
        assert gradient.isfinite().all() and not gradient[:, missing].any()


@every_case
def test_nothing_observed_is_the_prior(kernel: str, method: str) -> None:
    """With a divergence and a log evidence of exactly zero."""
    x, mean, variance, _ = data(9, 2)
    posterior = prior_of(kernel, method).posterior(x, mean, variance, torch.ones(2, 9, dtype=torch.bool))
    assert not posterior.kl.any() and not posterior.log_evidence.any() and not posterior.mean.any()
    torch.testing.assert_close(posterior.variance, torch.ones_like(posterior.variance), **EXACT)
    torch.testing.assert_close(posterior.predict(x)[1], torch.ones_like(posterior.variance), **EXACT)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(
    times=st.lists(st.floats(min_value=-50, max_value=50), min_size=1, max_size=12),
    scale=st.floats(min_value=-6, max_value=6),
    lengthscale=st.floats(min_value=0.01, max_value=100),
)
def test_laws(kernel: str, times: list[float], scale: float, lengthscale: float) -> None:
    """Order does not matter, the divergence is not negative, and nothing is learned that raises a variance."""
    prior = MarkovPrior(kernel, lengthscale=lengthscale, dtype=torch.float64)
    x = torch.tensor(times, dtype=torch.float64)
    mean, variance = x.sin().unsqueeze(0), torch.full((1, len(x)), 10.0**scale, dtype=torch.float64)
    posterior = prior.posterior(x, mean, variance)
    swapped = prior.posterior(x.flip(-1), mean.flip(-1), variance)
    size = len(x) * max(1.0, 10.0**-scale) * 1e-10  # of what rounding may do
    assert (posterior.kl > -size).all() and (posterior.variance > 0).all() and (posterior.variance < 1 + 1e-12).all()
    torch.testing.assert_close(posterior.mean, swapped.mean.flip(-1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(posterior.kl, swapped.kl, rtol=1e-7, atol=size)
    again = posterior.predict(x)
    torch.testing.assert_close(again[0], posterior.mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(again[1], posterior.variance, rtol=1e-8, atol=1e-8)


def test_divergence_is_expected_log_likelihood_minus_log_evidence() -> None:
    """The identity that the bound uses."""
    x, mean, variance, missing = data(25)
    posterior = prior_of("matern32").posterior(x, mean, variance, missing)
    density = torch.distributions.Normal(posterior.mean, variance.sqrt()).log_prob(mean)
    expected = (density - 0.5 * posterior.variance / variance)[:, ~missing].sum(-1)
    torch.testing.assert_close(posterior.kl, expected - posterior.log_evidence, rtol=1e-11, atol=1e-11)


def test_every_series_has_its_own_times() -> None:
    """A batch is its series one by one; times that all share may be given once."""
    prior = prior_of("matern52")
    x, mean, variance, missing = data(14, 3)
    together = prior.posterior(x, mean, variance, missing)
    for b in range(3):
        alone = prior.posterior(x[b], mean[b], variance[b], missing[b])
        torch.testing.assert_close(together.mean[b], alone.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.kl[b], alone.kl, rtol=1e-12, atol=1e-12)
    shared = prior.posterior(x[0], mean, variance, missing[0])
    spread = prior.posterior(x[0].expand(3, -1), mean, variance, missing[0].expand(3, -1))
    assert torch.equal(shared.mean, spread.mean)
    assert torch.equal(shared.predict(x[1])[0], spread.predict(x[1].expand(3, -1))[0])


@every_case
def test_draws(kernel: str, method: str) -> None:
    """Means and joint covariances of many draws, equal values at equal times, and gradients."""
    prior = prior_of(kernel, method)
    x, mean, variance, missing = data(10)
    x_new = torch.tensor([0.9, 0.2, 1.4, 0.2], dtype=torch.float64)
    posterior = prior.posterior(x, mean, variance, missing)
    draws = posterior.rsample(x_new, (100, 200), torch.Generator().manual_seed(3))
    before = prior.rsample(x_new, (20_000,), torch.Generator().manual_seed(3))
    assert draws.shape == (100, 200, L, 4) and before.shape == (20_000, L, 4)
    assert torch.equal(draws[..., 1], draws[..., 3]) and torch.equal(before[..., 1], before[..., 3])
    for latent in range(L):
        dense = dense_of(prior, latent, x, mean, variance, missing)
        m, S = dense.predict(x_new)
        paths = draws.reshape(-1, L, 4)[:, latent]
        torch.testing.assert_close(paths.mean(0), m, rtol=0, atol=0.03)
        torch.testing.assert_close(paths.mT.cov(), S, rtol=0, atol=0.04)
        K = matern(kernel, x_new, x_new, prior.lengthscale[latent])
        torch.testing.assert_close(before[:, latent].mT.cov(), K, rtol=0, atol=0.04)
    (gradient,) = torch.autograd.grad(draws.square().mean() + before.square().mean(), prior.raw_lengthscale)
    assert gradient.isfinite().all() and gradient.any()


def test_randomness_and_dtypes(dtype: torch.dtype) -> None:
    """The same generator draws the same paths, the default one is torch's, and draws have the dtype of the input."""
    prior = MarkovPrior(num_latents=L)
    x, mean, variance, _ = data(7, 2, dtype=dtype)
    posterior = prior.posterior(x, mean, variance)
    for draw, shape in (
        (lambda g=None: posterior.rsample(generator=g), (2, L, 7)),
        (lambda g=None: posterior.rsample(x[:, :3], (4,), g), (4, 2, L, 3)),
        (lambda g=None: prior.rsample(x, (4,), g), (4, 2, L, 7)),
    ):
        one, two = (draw(torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(one, two) and one.shape == shape and one.dtype == dtype
        torch.manual_seed(5)
        assert torch.equal(draw(), one)
    assert posterior.rsample(x, (0,)).shape == (0, 2, L, 7)
    assert posterior.predict(x[:, :0])[0].shape == (2, L, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_five_thousand_irregular_times(kernel: str) -> None:
    """Finite, and right: on a window, far from whose surroundings a dense process needs to know nothing."""
    prior = prior_of(kernel)
    gaps = torch.empty(5000, dtype=torch.float64).exponential_(8.0).pow(1.5)
    x = gaps.cumsum(-1)[torch.randperm(5000)] + 1e6
    mean = torch.sin(x) + 0.1 * torch.randn(L, 5000, dtype=torch.float64)
    variance = 0.01 + torch.rand(L, 5000, dtype=torch.float64)
    missing = torch.rand(5000) < 0.2
    posterior = prior.posterior(x, mean, variance, missing)
    values = posterior.mean, posterior.variance, posterior.kl, posterior.log_evidence
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in values), prior.raw_lengthscale)
    assert all(value.isfinite().all() for value in (*values, gradient))
    middle = x.median()
    window, near = (x - middle).abs() < 1.0, (x - middle).abs() < 25.0
    for latent in range(L):
        dense = dense_of(prior, latent, x[near], mean[:, near], variance[:, near], missing[near])
        m, S = dense.predict(x[window])
        torch.testing.assert_close(posterior.mean[latent, window], m, **EXACT)
        torch.testing.assert_close(posterior.variance[latent, window], S.diagonal(), **EXACT)


def test_lengthscale_is_learned() -> None:
    """By ascent on the log evidence of a path that was drawn from the prior."""
    torch.manual_seed(2)
    x = torch.linspace(0, 40, 120, dtype=torch.float64)
    path = MarkovPrior("matern32", lengthscale=2.0, dtype=torch.float64).rsample(x).detach()
    prior = MarkovPrior("matern32", lengthscale=0.5)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.2)
    variance = torch.full_like(path, 0.01)
    observed = path + 0.1 * torch.randn_like(path)
    for _ in range(15):
        optimizer.zero_grad()
        (-prior.posterior(x, observed, variance).log_evidence.sum() / 120).backward()
        optimizer.step()
    assert 1.4 < prior.lengthscale.item() < 2.8


def test_a_posterior_is_a_value() -> None:
    """Neither a step of training nor new times in the caller's tensor change it; a prior resumes from its state."""
    prior = prior_of("matern32")
    x, mean, variance, missing = data(8)
    x_new = x + 0.1
    posterior = prior.posterior(x, mean, variance, missing)
    expected = posterior.predict(x_new)[0]
    with torch.no_grad():
        prior.raw_lengthscale.add_(1.0)
        x.zero_()
    assert torch.equal(posterior.predict(x_new)[0], expected)
    other = MarkovPrior("matern32", num_latents=L, dtype=torch.float64)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.lengthscale, prior.lengthscale)
    assert repr(other) == "MarkovPrior('matern32', num_latents=2, method='parallel')"


def _posterior() -> MarkovPosterior:
    return prior_of("matern32").posterior(torch.arange(3.0), torch.zeros(L, 3), torch.ones(L, 3))


def _observe(**changes: Tensor) -> Callable[[], object]:
    arguments = {"x": torch.arange(3.0), "mean": torch.zeros(L, 3), "variance": torch.ones(L, 3)} | changes
    return lambda: prior_of("matern32").posterior(**arguments)


NAN = torch.tensor([0.0, torch.nan, 1.0])
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "kernel": (lambda: MarkovPrior("rbf"), ValueError, "kernel: expected one of matern12"),
    "latents": (lambda: MarkovPrior(num_latents=0), ValueError, "num_latents: expected at least 1"),
    "lengthscale": (lambda: MarkovPrior(lengthscale=-1.0), ValueError, "lengthscale: expected a positive number"),
    "lengthscales": (lambda: MarkovPrior(num_latents=2, lengthscale=[1.0] * 3), ValueError, "or 2 of them"),
    "no-lengthscale": (lambda: MarkovPrior(lengthscale="long"), ValueError, "lengthscale: expected a positive"),
    "method": (lambda: MarkovPrior(method="fast"), ValueError, "method: expected one of sequential, parallel"),
    "integer-times": (_observe(x=torch.arange(3)), TypeError, "x: expected a floating-point tensor"),
    "times": (_observe(x=NAN), ValueError, "x: expected finite times"),
    "number-of-times": (_observe(x=torch.arange(4.0)), ValueError, r"x: expected shape \(3,\), got \(4,\)"),
    "series": (_observe(x=torch.zeros(2, 3)), ValueError, r"x: expected shape \(3,\), got \(2, 3\)"),
    "no-times": (_observe(mean=torch.zeros(L, 0)), ValueError, r"mean: expected shape \(\*b, 2, n\)"),
    "number-of-latents": (_observe(mean=torch.zeros(3, 3)), ValueError, r"mean: expected shape \(\*b, 2, n\)"),
    "scalar-mean": (_observe(mean=torch.zeros(())), ValueError, r"mean: expected shape \(\*b, 2, n\)"),
    "mean": (_observe(mean=NAN.expand(L, 3)), ValueError, "mean: expected finite"),
    "variance-shape": (_observe(variance=torch.ones(3)), ValueError, "variance"),
    "variance": (_observe(variance=torch.tensor([1.0, 0.0, 1.0]).expand(L, 3)), ValueError, "variance: expected pos"),
    "missing-dtype": (_observe(missing=torch.zeros(3)), TypeError, "missing: expected a bool"),
    "missing-shape": (_observe(missing=torch.ones(2).bool()), ValueError, r"missing: expected shape \(3,\)"),
    "new-times": (lambda: _posterior().predict(NAN), ValueError, "x_new: expected finite times"),
    "new-integers": (lambda: _posterior().predict(torch.arange(3)), TypeError, "x_new: expected a floating-point"),
    "new-scalar": (lambda: _posterior().predict(torch.tensor(1.0)), ValueError, "x_new: expected times of shape"),
    "new-shape": (lambda: _posterior().rsample(torch.zeros(2, 3)), ValueError, "x_new: expected shape"),
    "generator": (lambda: _posterior().rsample(generator=0), TypeError, "generator"),
    "prior-times": (lambda: prior_of("matern12").rsample(NAN), ValueError, "x: expected finite times"),
    "prior-no-times": (lambda: prior_of("matern12").rsample(NAN[:0]), ValueError, "x: expected at least one time"),
    "prior-generator": (lambda: prior_of("matern12").rsample(NAN[:1], (), 0), TypeError, "generator"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    """What is wrong is named."""
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
