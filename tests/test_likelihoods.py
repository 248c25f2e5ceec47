"""Count likelihoods against dense sums over f with scipy's distributions."""

import pickle
from copy import deepcopy

import gpytorch
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from gpseq.likelihoods import NegativeBinomialLikelihood, PoissonLikelihood

BATCHES = [(), (3,), (2, 3)]
DISPERSIONS = [None, 0.5, 10.0, 1e4]  # None: Poisson
Z = np.arange(-600_000, 600_001) * 1e-4
LOG_GAUSS = -0.5 * Z**2 - 0.5 * np.log(2 * np.pi) + np.log(1e-4)


def build(dispersion: float | None) -> PoissonLikelihood | NegativeBinomialLikelihood:
    if dispersion is None:
        return PoissonLikelihood()
    likelihood = NegativeBinomialLikelihood().double()
    likelihood.dispersion = dispersion
    return likelihood


def gaussian(mean: Tensor, variance: Tensor) -> MultivariateNormal:
    return MultivariateNormal(mean, DiagLinearOperator(variance))


def single(mean: float, variance: float) -> MultivariateNormal:
    return gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([variance], dtype=torch.float64))


def scipy_log_prob(y: float, f: np.ndarray, dispersion: float | None) -> np.ndarray:
    if dispersion is None:
        return y * f - np.exp(f) - scipy.special.gammaln(y + 1)
    a = f - np.log(dispersion)
    constant = scipy.special.gammaln([y + dispersion, dispersion, y + 1]) @ [1, -1, -1]
    return constant + y * a - (y + dispersion) * np.logaddexp(0, a)


def scipy_cdf(k: np.ndarray, f: np.ndarray, dispersion: float | None) -> np.ndarray:
    if dispersion is None:
        return scipy.stats.poisson.cdf(k, np.exp(f))
    return scipy.stats.nbinom.cdf(k, dispersion, dispersion / (dispersion + np.exp(f)))


def test_the_oracle_is_scipys_distribution() -> None:
    f = np.array([-2.0, 0.3, 4.0])
    np.testing.assert_allclose(scipy_log_prob(7, f, None), scipy.stats.poisson.logpmf(7, np.exp(f)))
    np.testing.assert_allclose(scipy_log_prob(7, f, 2.5), scipy.stats.nbinom.logpmf(7, 2.5, 2.5 / (2.5 + np.exp(f))))


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_conditional_is_scipys_distribution(dispersion: float | None, dtype: torch.dtype) -> None:
    """Its dtype is that of f, whatever the parameter's is."""
    f = torch.tensor([-3.0, 0.0, 2.0], dtype=dtype)
    conditional = build(dispersion)(f)
    assert conditional.mean.dtype == dtype
    torch.testing.assert_close(conditional.mean, f.exp())
    variance = f.exp() + (0 if dispersion is None else (2 * f).exp() / dispersion)
    torch.testing.assert_close(conditional.variance, variance)
    expected = torch.tensor(scipy_log_prob(3, f.double().numpy(), dispersion), dtype=dtype)
    rtol = 1e-10 if dtype == torch.float64 else 1e-3 if dispersion != 1e4 else 1  # torch's own cancels there
    torch.testing.assert_close(conditional.log_prob(torch.tensor(3.0, dtype=dtype)), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("variance", [1e-3, 1.0, 4.0, 16.0])
def test_expected_log_prob_is_the_dense_sum(dispersion: float | None, variance: float) -> None:
    inner = np.abs(Z) < 30
    for y in (0.0, 1.0, 3000.0):
        for mean in (-5.0, 0.0, 8.0):
            f = mean + np.sqrt(variance) * Z[inner]
            expected = scipy_log_prob(y, f, dispersion) @ np.exp(LOG_GAUSS[inner])
            actual = build(dispersion).expected_log_prob(torch.tensor([y]), single(mean, variance)).item()
            assert actual == pytest.approx(expected, abs=1e-8, rel=1e-12)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("variance", [1e-3, 1.0, 4.0, 16.0, 100.0])
def test_log_marginal_is_the_dense_sum(dispersion: float | None, variance: float) -> None:
    """Prior and likelihood far apart, either the wider."""
    for y in (0.0, 1.0, 3000.0):
        for mean in (-5.0, 2.0, 8.0):
            stretch = 3 if variance < 0.1 else 1  # the mode may be 95 standard deviations away
            f = mean + np.sqrt(variance) * Z * stretch
            log_gauss = LOG_GAUSS + 0.5 * Z**2 * (1 - stretch**2) + np.log(stretch)
            with np.errstate(over="ignore"):
                expected = scipy.special.logsumexp(scipy_log_prob(y, f, dispersion) + log_gauss)
            actual = build(dispersion).log_marginal(torch.tensor([y]), single(mean, variance)).item()
            assert actual == pytest.approx(expected, abs=1e-6 if variance > 16 else 1e-9, rel=1e-12)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_the_marginal_sums_to_one(dispersion: float | None) -> None:
    q = single(1.0, 0.25)
    y = torch.arange(3000.0)
    total = build(dispersion).log_marginal(y, q).logsumexp(0).exp().item()
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("dispersion", [None, 0.05, 0.5, 10.0, 1e4])
@pytest.mark.parametrize("variance", [1e-12, 1e-3, 1.0, 16.0])
def test_cdf_is_the_dense_sum(dispersion: float | None, variance: float) -> None:
    z = np.linspace(-9, 9, 40_001)
    weight = np.exp(-0.5 * z**2) / np.exp(-0.5 * z**2).sum()
    scale = torch.tensor([variance], dtype=torch.float64).sqrt()
    for k in (0.0, 7.0, 3000.0):
        for mean in (-5.0, 2.0, 8.0):
            expected = scipy_cdf(np.array(k), mean + np.sqrt(variance) * z, dispersion) @ weight
            k_, mean_ = torch.tensor([[k], [mean]], dtype=torch.float64)
            actual = build(dispersion)._cdf(k_, mean_, scale, 48).item()
            assert actual == pytest.approx(expected, abs=1e-6 if dispersion == 0.05 else 1e-9)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("variance", [1e-10, 0.3, 2.0])
def test_quantile_is_the_first_to_reach_the_level(dispersion: float | None, variance: float) -> None:
    z = np.linspace(-9, 9, 3_001)
    weight = np.exp(-0.5 * z**2) / np.exp(-0.5 * z**2).sum()
    k = np.arange(4000)
    levels = torch.tensor([[0.05], [0.5], [0.9]], dtype=torch.float64)
    for mean in (-4.0, 1.0, 3.0):
        cdf = np.zeros(len(k))
        for f, w in zip(mean + np.sqrt(variance) * z[::10], weight[::10] * 10, strict=True):
            cdf += w * scipy_cdf(k, f, dispersion)
        expected = np.searchsorted(cdf, levels.numpy())
        actual = build(dispersion).quantile(single(mean, variance), levels)
        assert actual.tolist() == expected.tolist()


def test_quantiles_cover_large_counts() -> None:
    """Against samples; beyond 2^53 they are infinite, and unknown f gives NaN."""
    likelihood = build(10.0)
    q = single(8.0, 1.0)
    f = 8.0 + torch.randn(100_000, 1, dtype=torch.float64)
    y = likelihood(f).sample()
    levels = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    torch.testing.assert_close(likelihood.quantile(q, levels), y.quantile(levels[:, 0], dim=0), rtol=0.03, atol=0)
    assert likelihood.quantile(single(100.0, 1.0), 0.5).item() == float("inf")
    assert PoissonLikelihood().quantile(single(-1000.0, 1.0), 0.99).item() == 0
    assert PoissonLikelihood().quantile(single(float("nan"), 1.0), 0.5).isnan()


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, float("nan")])
def test_levels_are_checked(level: float) -> None:
    with pytest.raises(ValueError, match="q: expected levels between 0 and 1"):
        PoissonLikelihood().quantile(single(0.0, 1.0), level)
    with pytest.raises(TypeError, match="num_nodes"):
        PoissonLikelihood().quantile(single(0.0, 1.0), 0.5, num_nodes=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_predictive_moments_are_the_marginals(dispersion: float | None) -> None:
    likelihood, q = build(dispersion), single(1.0, 0.25)
    y = torch.arange(5000.0, dtype=torch.float64)
    p = likelihood.log_marginal(y, q).exp()
    mean, variance = likelihood.predictive_moments(q)
    torch.testing.assert_close(mean[0], (p * y).sum())
    torch.testing.assert_close(variance[0], (p * (y - mean).square()).sum())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dispersion_batch", [(), (3,)])
def test_batches_are_stacked_single_answers(
    batch: tuple[int, ...], dispersion_batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    n = 5
    mean, variance = torch.randn(*batch, n, dtype=dtype), torch.rand(*batch, n, dtype=dtype)
    y = torch.poisson(mean.exp())
    q = gaussian(mean, variance)
    shape = torch.broadcast_shapes((*batch, n), (*dispersion_batch, n))
    negative_binomial = NegativeBinomialLikelihood(batch_shape=torch.Size(dispersion_batch))
    negative_binomial.dispersion = torch.rand(*dispersion_batch, 1) + 0.5
    assert negative_binomial.dispersion.shape == (*dispersion_batch, 1)
    for likelihood in [negative_binomial] if dispersion_batch else [negative_binomial, PoissonLikelihood()]:
        answers = {
            "expected_log_prob": likelihood.expected_log_prob(y, q),
            "log_marginal": likelihood.log_marginal(y, q),
            "mean": likelihood.predictive_moments(q)[0],
            "variance": likelihood.predictive_moments(q)[1],
            "quantile": likelihood.quantile(q, 0.9),
        }
        assert likelihood.quantile(q, torch.full((4, *[1] * len(shape)), 0.5)).shape == (4, *shape)
        index = (*[0] * (len(shape) - 1), slice(None))
        alone = deepcopy(likelihood)
        if dispersion_batch:
            alone = NegativeBinomialLikelihood()
            alone.dispersion = negative_binomial.dispersion[0]
        first = gaussian(mean.expand(shape)[index], variance.expand(shape)[index])
        first_y = y.expand(shape)[index]
        expected = {
            "expected_log_prob": alone.expected_log_prob(first_y, first),
            "log_marginal": alone.log_marginal(first_y, first),
            "mean": alone.predictive_moments(first)[0],
            "variance": alone.predictive_moments(first)[1],
            "quantile": alone.quantile(first, 0.9),
        }
        for name, answer in answers.items():
            assert answer.shape == shape, name
            assert answer.dtype == dtype, name
            torch.testing.assert_close(answer[index], expected[name])
        for training in (True, False):
            with gpytorch.settings.num_likelihood_samples(7):
                marginal = likelihood.train(training)(q)
            assert marginal.batch_shape == (7, *shape)


def test_float32_answers_are_float64_answers() -> None:
    """Also where terms of size y log y cancel."""
    mean, variance = torch.tensor([-2.0, 0.5, 8.0]), torch.tensor([0.1, 2.0, 0.01])
    y = torch.tensor([0.0, 3.0, 3000.0])
    low, high = gaussian(mean, variance), gaussian(mean.double(), variance.double())
    for likelihood in (PoissonLikelihood(), NegativeBinomialLikelihood()):
        for name in ("expected_log_prob", "log_marginal"):
            expected = getattr(likelihood, name)(y, high).float()
            torch.testing.assert_close(getattr(likelihood, name)(y, low), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(likelihood.quantile(low, 0.9), likelihood.quantile(high, 0.9).float())


@pytest.mark.parametrize("name", ["expected_log_prob", "log_marginal"])
def test_gradients(name: str) -> None:
    mean = torch.tensor([-2.0, 0.5, 7.0], dtype=torch.float64, requires_grad=True)
    variance = torch.tensor([0.1, 3.0, 0.5], dtype=torch.float64, requires_grad=True)
    raw = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.0, 3.0, 1000.0], dtype=torch.float64)

    def of_poisson(mean: Tensor, variance: Tensor) -> Tensor:
        return getattr(PoissonLikelihood(), name)(y, gaussian(mean, variance))

    def of_negative_binomial(mean: Tensor, variance: Tensor, raw: Tensor) -> Tensor:
        # A plain attribute in the parameter's place.
        likelihood = NegativeBinomialLikelihood()
        del likelihood.raw_dispersion
        likelihood.raw_dispersion = raw
        return getattr(likelihood, name)(y, gaussian(mean, variance))

    assert torch.autograd.gradcheck(of_poisson, (mean, variance))
    assert torch.autograd.gradcheck(of_negative_binomial, (mean, variance, raw))


@pytest.mark.parametrize("name", ["expected_log_prob", "log_marginal"])
@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_gradient_at_little_variance_is_half_the_curvature(name: str, dispersion: float | None) -> None:
    """In v near 0: d/dv E g = g'' / 2, and (g'' + g'^2) / 2 inside the logarithm."""
    mean = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    variance = torch.tensor([1e-9], dtype=torch.float64, requires_grad=True)  # GPyTorch allows no less than 1e-10
    y = torch.tensor([2.0], dtype=torch.float64)
    likelihood = build(dispersion)
    (actual,) = torch.autograd.grad(getattr(likelihood, name)(y, gaussian(mean, variance)).sum(), variance)
    log_prob = likelihood(mean).log_prob(y)
    (first,) = torch.autograd.grad(log_prob.sum(), mean, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), mean)
    expected = 0.5 * (second + (first.square() if name == "log_marginal" else 0))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["expected_log_prob", "log_marginal"])
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("mean", [-1000.0, -50.0, 50.0, 300.0])
@pytest.mark.parametrize("y", [0.0, 3000.0])
def test_far_away_functions_give_finite_answers(name: str, dispersion: float | None, mean: float, y: float) -> None:
    mean_ = torch.tensor([mean], dtype=torch.float64, requires_grad=True)
    variance = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    likelihood = build(dispersion)
    value = getattr(likelihood, name)(torch.tensor([y]), gaussian(mean_, variance))
    value.sum().backward()
    assert value.isfinite().all()
    for parameter in (mean_, variance, *likelihood.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("bad", [-1.0, 0.5, float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [PoissonLikelihood, NegativeBinomialLikelihood])
def test_what_is_no_count_is_refused(kind: type, bad: float) -> None:
    q = gaussian(torch.zeros(3), torch.ones(3))
    y = torch.tensor([1.0, bad, float("nan")])
    likelihood = kind()
    for call in (likelihood.check_targets, lambda y: likelihood.expected_log_prob(y, q)):
        with pytest.raises(ValueError, match=r"y: expected counts .*1 of 3"):
            call(y)
    with pytest.raises(ValueError, match="y: expected counts"):
        likelihood.log_marginal(y, q)
    assert kind(validate_args=False).expected_log_prob(y, q).shape == (3,)


@pytest.mark.parametrize("kind", [PoissonLikelihood, NegativeBinomialLikelihood])
def test_missing_counts_are_nan_alone(kind: type) -> None:
    q = gaussian(torch.zeros(3), torch.ones(3))
    y = torch.tensor([1.0, float("nan"), 2.0])
    for answer in (kind().expected_log_prob(y, q), kind().log_marginal(y, q)):
        assert answer.isnan().tolist() == [False, True, False]
    kind().check_targets(torch.tensor([0, 5]))


class Model(gpytorch.models.ApproximateGP):
    def __init__(self, points: Tensor) -> None:
        q = gpytorch.variational.CholeskyVariationalDistribution(len(points))
        super().__init__(gpytorch.variational.VariationalStrategy(self, points, q))
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("kind", [PoissonLikelihood, NegativeBinomialLikelihood])
@pytest.mark.parametrize("objective", [gpytorch.mlls.VariationalELBO, gpytorch.mlls.PredictiveLogLikelihood])
def test_stock_objectives_train_it(kind: type, objective: type) -> None:
    x = torch.linspace(0, 1, 40).unsqueeze(-1)
    y = torch.poisson(torch.exp(1 + torch.sin(6 * x.squeeze(-1))))
    model, likelihood = Model(x[::5].clone()), kind()
    mll = objective(likelihood, model, num_data=len(y))
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.05)
    model.train(), likelihood.train()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -mll(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.1
    model.eval(), likelihood.eval()
    q = model(x)
    low, high = likelihood.quantile(q, torch.tensor([[0.025], [0.975]]))
    assert ((y >= low) & (y <= high)).float().mean() > 0.85


def test_the_priors_density_is_part_of_the_objective() -> None:
    x, y = torch.linspace(0, 1, 10).unsqueeze(-1), torch.ones(10)
    prior = gpytorch.priors.GammaPrior(2.0, 0.5)
    model = Model(x[::3].clone())
    model(x)  # the first call of the model initialises q
    plain, informed = NegativeBinomialLikelihood(), NegativeBinomialLikelihood(dispersion_prior=prior)
    without, with_prior = (gpytorch.mlls.VariationalELBO(lik, model, 10)(model(x), y) for lik in (plain, informed))
    torch.testing.assert_close(with_prior - without, prior.log_prob(torch.tensor(10.0)) / 10)
    informed.sample_from_prior("dispersion_prior")
    assert informed.dispersion.item() != 10


def test_dispersion_obeys_its_constraint() -> None:
    likelihood = NegativeBinomialLikelihood()
    torch.testing.assert_close(likelihood.dispersion, torch.tensor([10.0]))
    likelihood.initialize(dispersion=3.0)
    torch.testing.assert_close(likelihood.dispersion, torch.tensor([3.0]))
    bounded = NegativeBinomialLikelihood(dispersion_constraint=gpytorch.constraints.Interval(1.0, 5.0))
    assert 1 < bounded.dispersion.item() < 5
    begun = NegativeBinomialLikelihood(dispersion_constraint=gpytorch.constraints.Positive(initial_value=2.0))
    assert begun.dispersion.item() == pytest.approx(2)


def test_copies_and_saved_states_are_complete() -> None:
    likelihood = NegativeBinomialLikelihood(dispersion_prior=gpytorch.priors.GammaPrior(2.0, 0.5))
    likelihood.dispersion = 2.5
    loaded = NegativeBinomialLikelihood(dispersion_prior=gpytorch.priors.GammaPrior(1.0, 1.0))
    loaded.load_state_dict(likelihood.state_dict())
    for other in (loaded, deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        torch.testing.assert_close(other.dispersion, likelihood.dispersion)
        other.sample_from_prior("dispersion_prior")
        torch.testing.assert_close(likelihood.dispersion, torch.tensor([2.5]))
    assert pickle.loads(pickle.dumps(PoissonLikelihood(validate_args=False))).validate_args is False


def test_both_are_log_concave() -> None:
    f = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for dispersion in DISPERSIONS:
        likelihood = build(dispersion)
        assert likelihood.log_concave
        for y in (0.0, 5.0, 3000.0):
            _, information = likelihood._derivatives(torch.tensor(y), f)
            assert (information >= 0).all()
