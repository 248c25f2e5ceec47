"""The online bound for models that are trained by gradients, against four dense terms and against closed forms."""

import io
import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, Likelihood
from gpytorch.means import LinearMean
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    DeltaVariationalDistribution,
    MeanFieldVariationalDistribution,
    NaturalVariationalDistribution,
    TrilNaturalVariationalDistribution,
)
from torch import Tensor

from gpseq.features import HippoFeatures, InducingFeatures, InducingPoints
from gpseq.likelihoods import PoissonLikelihood
from gpseq.mlls import StreamingELBO
from gpseq.models import CapacityWarning, StreamingGP
from gpseq.variational import InterdomainVariationalStrategy
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_close, draw, functionals, gpytorch_kernel

ORDER = 5
DISTRIBUTIONS = {
    "cholesky": CholeskyVariationalDistribution,
    "mean field": MeanFieldVariationalDistribution,
    "natural": NaturalVariationalDistribution,
    "tril natural": TrilNaturalVariationalDistribution,
}

# lengthscale, outputscale, noise, slope and intercept of the mean
BEFORE = (1.1, 0.9, 0.2, 0.3, -0.4)
AFTER = (0.8, 1.6, 0.1, -0.2, 0.5)


class Model(ApproximateGP):
    """A GP as the documentation of GPyTorch writes it."""

    def __init__(
        self, features: InducingFeatures, q: Any, batch: tuple[int, ...] = (), jitter: float | None = 0.0
    ) -> None:
        super().__init__(InterdomainVariationalStrategy(self, features, q, jitter))
        self.mean_module = LinearMean(1)
        self.covar_module = gpytorch_kernel(batch_shape=batch)
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    @property
    def q(self) -> Any:
        return self.variational_strategy._variational_distribution


def a_model(kind: str = "cholesky", horizon: float = 4.0, order: int = ORDER, **options: Any) -> Model:
    """Legendre features on [0, horizon], the hyperparameters of BEFORE, and q(v) = N(0, I)."""
    features = options.pop("features", HippoFeatures(order, horizon))
    q = DISTRIBUTIONS[kind](features.num_features, batch_shape=torch.Size(options.pop("q_batch", ())))
    model = Model(features, q, **options)
    q.mean_init_std = 0.0
    model.variational_strategy.kl_divergence()
    set_hyperparameters(model, None, BEFORE)
    return model


def set_hyperparameters(model: Any, likelihood: Likelihood | None, values: tuple[float, ...]) -> None:
    lengthscale, outputscale, noise, slope, intercept = (torch.tensor(v, dtype=F64) for v in values)
    model.covar_module.base_kernel.lengthscale = lengthscale
    model.covar_module.outputscale = outputscale.expand(model.covar_module.outputscale.shape)
    model.mean_module.weights.data.fill_(slope.item())
    model.mean_module.bias.data.fill_(intercept.item())
    if isinstance(likelihood, GaussianLikelihood):
        likelihood.noise = noise


def gaussian_likelihood(noise: float = BEFORE[2]) -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = torch.tensor(noise, dtype=F64)
    return likelihood


def kernel_and_mean(values: tuple[float, ...]) -> tuple[oracle.Kernel, oracle.Mean]:
    return oracle.rbf(*values[:2]), lambda x: values[3] * x + values[4]


def set_q(model: Model, mean: Tensor, covariance: Tensor) -> None:
    model.q.mean_init_std = 0.0
    dtype = model.q.dtype
    model.q.initialize_variational_distribution(MultivariateNormal(mean.to(dtype), covariance.to(dtype)))


def some_moments(seed: int, order: int = ORDER, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Mean and covariance (below the identity) of a whitened q, symmetric in nothing."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*batch, order, dtype=F64, generator=generator)
    root = torch.randn(*batch, order, order, dtype=F64, generator=generator) / (3 * math.sqrt(order))
    return mean, root @ root.mT + 0.1 * torch.eye(order, dtype=F64)


def believed(model: Model, values: tuple[float, ...]) -> oracle.Gaussian:
    """q(u) in plain coordinates, with the mean function in it."""
    kernel, mean = kernel_and_mean(values)
    basis, q = functionals(model.variational_strategy.features), model.variational_strategy.variational_distribution
    factor = torch.linalg.cholesky(basis.covariance(kernel))
    covariance = q.covariance_matrix.detach().double()
    return oracle.Gaussian(basis.mean(mean) + factor @ q.mean.detach().double(), factor @ covariance @ factor.mT)


def as_old(model: Model, values: tuple[float, ...]) -> oracle.Old:
    basis = functionals(model.variational_strategy.features)
    return oracle.Old(basis, believed(model, values), basis.prior(*kernel_and_mean(values)))


def online_bound(model: Model, likelihood: Likelihood, x: Tensor, y: Tensor) -> Tensor:
    return len(y) * StreamingELBO(likelihood, model)(model.train()(x), y)


def a_twin(model: Model, likelihood: Likelihood, **options: Any) -> StreamingGP:
    features, modules = model.variational_strategy.features, (model.covar_module, likelihood, model.mean_module)
    jitter = model.variational_strategy.jitter_val
    return StreamingGP(features, *modules, jitter=jitter, **options).eval()


def adopt(model: Model, stream: StreamingGP) -> None:
    q = stream.variational_strategy.variational_distribution
    set_q(model, q.mean, q.covariance_matrix)


# Four terms


STEPS = {
    "same basis": (4.0, BEFORE),
    "stretched": (5.5, BEFORE),
    "other hyperparameters": (4.0, AFTER),
    "stretched, other hyperparameters": (5.5, AFTER),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_the_bound_has_four_terms(kind: str, step: str) -> None:
    horizon, values = STEPS[step]
    model, likelihood = a_model(kind), gaussian_likelihood()
    set_q(model, *some_moments(1))
    old = as_old(model, BEFORE)
    model.variational_strategy.advance(None if horizon == 4.0 else HippoFeatures(ORDER, horizon))
    set_hyperparameters(model, likelihood, values)
    set_q(model, *some_moments(2))
    x, y = draw(12, horizon)
    expected = oracle.objective(
        *kernel_and_mean(values),
        functionals(model.variational_strategy.features),
        believed(model, values),
        (x, y, torch.full_like(x, values[2])),
        old,
    )
    torch.testing.assert_close(online_bound(model, likelihood, x, y), expected, rtol=1e-8, atol=0)


def test_three_chunks_have_four_terms() -> None:
    """Only the last posterior counts as the past: it holds what came before."""
    model, likelihood = a_model(), gaussian_likelihood()
    set_q(model, *some_moments(1))
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.0))
    set_hyperparameters(model, likelihood, AFTER)
    set_q(model, *some_moments(2))
    old = as_old(model, AFTER)
    model.variational_strategy.advance(HippoFeatures(ORDER, 6.0))
    x, y = draw(12, 6.0)
    set_q(model, *some_moments(3))
    basis, noise = functionals(model.variational_strategy.features), torch.full_like(x, AFTER[2])
    expected = oracle.objective(*kernel_and_mean(AFTER), basis, believed(model, AFTER), (x, y, noise), old)
    torch.testing.assert_close(online_bound(model, likelihood, x, y), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_gradients_of_hyperparameters_are_differences(kind: str) -> None:
    model, likelihood = a_model(kind), gaussian_likelihood()
    set_q(model, *some_moments(1))
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.5))
    set_hyperparameters(model, likelihood, AFTER)
    set_q(model, *some_moments(2))
    x, y = draw(12, 5.5)
    online_bound(model, likelihood, x, y).backward()
    parameters = [*model.hyperparameters(), *likelihood.parameters()]
    assert len(parameters) == 5
    for parameter in parameters:
        gradient, value, ends = parameter.grad.clone(), parameter.detach().clone(), []
        for step in (1e-5, -1e-5):
            parameter.data.copy_(value + step)
            ends.append(online_bound(model, likelihood, x, y).item())
        parameter.data.copy_(value)
        assert gradient.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6)


def test_the_first_chunk_is_the_ordinary_bound() -> None:
    model, likelihood = a_model(), gaussian_likelihood()
    moments = some_moments(1)
    set_q(model, *moments)
    prior = oracle.Gaussian(torch.zeros(ORDER, dtype=F64), torch.eye(ORDER, dtype=F64))
    assert_close(model.variational_strategy.kl_divergence(), oracle.kl(oracle.Gaussian(*moments), prior), 1e-12)
    x, y = draw(9, 4.0)
    stock = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=9)(model.train()(x), y)
    assert_close(StreamingELBO(likelihood, model)(model(x), y), stock, 1e-14)


def test_a_past_that_taught_nothing_changes_nothing() -> None:
    model = a_model()
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.0))
    moments = some_moments(1)
    set_q(model, *moments)
    prior = oracle.Gaussian(torch.zeros(ORDER, dtype=F64), torch.eye(ORDER, dtype=F64))
    assert_close(model.variational_strategy.kl_divergence(), oracle.kl(oracle.Gaussian(*moments), prior), 1e-9)


def test_the_old_posterior_costs_nothing() -> None:
    """Without news the bound is zero at the old posterior, and nowhere larger."""
    model = a_model()
    set_q(model, *some_moments(1))
    model.variational_strategy.advance()
    assert model.variational_strategy.kl_divergence().item() == pytest.approx(0.0, abs=1e-10)
    for seed in range(2, 8):
        set_q(model, *some_moments(seed))
        assert model.variational_strategy.kl_divergence() > 0


def test_it_can_be_negative() -> None:
    """Under hyperparameters that suit the past better, the past is evidence for them."""
    model, likelihood = a_model(order=12), gaussian_likelihood(0.01)
    x = torch.linspace(0, 4, 30, dtype=F64)
    stream = a_twin(model, likelihood).update(x, 3 + x)
    adopt(model, stream)
    model.variational_strategy.advance()
    model.mean_module.weights.data.fill_(1.0)
    model.mean_module.bias.data.fill_(3.0)
    adopt(model, stream)  # carried over to the new mean
    assert model.variational_strategy.kl_divergence() < -1


# The closed form is where training ends


def two_chunks(
    values: tuple[float, ...], likelihood: Likelihood, kind: str = "cholesky", targets: Callable | None = None
) -> tuple[Model, StreamingGP, Tensor, Tensor, float]:
    """A model that has closed a chunk, a stream that has also learnt the next one, and by how much its bound rose."""
    model = a_model(kind)
    stream = a_twin(model, likelihood)
    x, y = draw(20, 3.9)
    y = y if targets is None else targets(y)
    stream.update(x, y)
    adopt(model, stream)
    before = stream.log_evidence.item()
    x, y = draw(15, 5.0, 3.0, seed=1)
    y = y if targets is None else targets(y)
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.0))
    set_hyperparameters(model, likelihood, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)  # few features keep the dense oracles exact
        stream.update(x, y)
    assert stream.features.horizon == model.variational_strategy.features.horizon == 5.0
    return model, stream, x, y, stream.log_evidence.item() - before


@pytest.mark.parametrize("kind", ["cholesky", "natural", "tril natural"])
@pytest.mark.parametrize("values", [BEFORE, AFTER], ids=["same", "changed"])
def test_the_closed_form_is_stationary(kind: str, values: tuple[float, ...]) -> None:
    likelihood = gaussian_likelihood()
    model, stream, x, y, increment = two_chunks(values, likelihood, kind)
    adopt(model, stream)
    bound = online_bound(model, likelihood, x, y)
    assert bound.item() == pytest.approx(increment, rel=1e-8)
    bound.backward()
    for parameter in model.variational_parameters():
        assert parameter.grad.abs().max() < 1e-8
    q = stream.variational_strategy.variational_distribution
    for seed in range(4):
        mean, covariance = some_moments(seed)
        shake = torch.eye(ORDER, dtype=F64) + 0.02 * covariance
        set_q(model, q.mean + 0.02 * mean, shake @ q.covariance_matrix @ shake.mT)
        assert online_bound(model, likelihood, x, y) < bound - 1e-7


@pytest.mark.parametrize("values", [BEFORE, AFTER], ids=["same", "changed"])
def test_one_natural_step_goes_there(values: tuple[float, ...]) -> None:
    likelihood = gaussian_likelihood()
    model, stream, x, y, _ = two_chunks(values, likelihood, "natural")
    set_q(model, *some_moments(3))
    optimiser = gpytorch.optim.NGD(model.variational_parameters(), num_data=len(y), lr=1.0)
    (-StreamingELBO(likelihood, model)(model.train()(x), y)).backward()
    optimiser.step()
    q, expected = model.variational_strategy.variational_distribution, stream.variational_strategy
    assert_close(q.mean, expected.variational_distribution.mean, 1e-8)
    assert_close(q.covariance_matrix, expected.variational_distribution.covariance_matrix, 1e-8)


def test_gradient_ascent_approaches_it() -> None:
    likelihood = gaussian_likelihood()
    model, _, x, y, increment = two_chunks(AFTER, likelihood)
    optimiser, elbo = torch.optim.Adam(model.variational_parameters(), lr=0.1), StreamingELBO(likelihood, model)
    first = online_bound(model, likelihood, x, y).item()
    for _ in range(120):
        optimiser.zero_grad()
        (-elbo(model(x), y)).backward()
        optimiser.step()
    last = online_bound(model, likelihood, x, y).item()
    assert first < last < increment
    assert last > increment - 0.05


def test_minibatches_of_a_chunk() -> None:
    likelihood = gaussian_likelihood()
    model, _, _, _, _ = two_chunks(AFTER, likelihood)
    x, y = draw(40, 5.0, seed=4)
    part, whole = StreamingELBO(likelihood, model, num_data=40), StreamingELBO(likelihood, model)
    model.train()
    batches = [part(model(a), b) for a, b in zip(x.split(10), y.split(10), strict=True)]
    assert_close(torch.stack(batches).mean(), whole(model(x), y), 1e-12)
    # Without it each batch counts as a chunk, and so does the next one of another size.
    for size in (10, 25):
        expected = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=size)(model(x[:size]), y[:size])
        assert_close(whole(model(x[:size]), y[:size]), expected, 1e-14)


def test_beta_and_separate_terms() -> None:
    likelihood = gaussian_likelihood()
    model, _, x, y, _ = two_chunks(AFTER, likelihood)
    kl = model.variational_strategy.kl_divergence()
    data, weighted, *_ = StreamingELBO(likelihood, model, beta=0.5, combine_terms=False)(model(x), y)
    assert_close(weighted, 0.5 * kl / len(y), 1e-12)
    assert_close(data - 0.5 * weighted, StreamingELBO(likelihood, model, beta=0.25)(model(x), y), 1e-12)


@pytest.mark.parametrize("name", ["bernoulli", "poisson"])
def test_sites_are_stationary(name: str) -> None:
    likelihood, targets = {
        "bernoulli": (BernoulliLikelihood().double(), lambda y: (y > 0).double()),
        "poisson": (PoissonLikelihood().double(), lambda y: y.exp().round()),
    }[name]
    model, stream, x, y, increment = two_chunks(AFTER, likelihood, targets=targets)
    assert stream.convergence is not None and stream.convergence.all_converged
    adopt(model, stream)
    bound = online_bound(model, likelihood, x, y)
    bound.backward()
    for parameter in model.variational_parameters():
        assert parameter.grad.abs().max() < 1e-5
    assert bound.item() == pytest.approx(increment, rel=1e-6)
    set_q(model, *some_moments(3))
    assert online_bound(model, likelihood, x, y) < bound


# Closing a chunk


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("horizon", [4.0, 5.5])
def test_q_starts_as_the_marginal_of_the_old_posterior(kind: str, horizon: float) -> None:
    model = a_model(kind)
    set_q(model, *some_moments(1))
    old, features = as_old(model, BEFORE), HippoFeatures(ORDER, horizon)
    model.variational_strategy.advance(features)
    kernel, mean = kernel_and_mean(BEFORE)
    basis = functionals(features)
    expected = oracle.conditional(kernel, mean, old.basis, old.q, basis)
    now = believed(model, BEFORE)
    assert_close(now.mean, expected.mean, 1e-9)
    if kind == "mean field":  # the variances of the whitened features
        inverse = torch.linalg.inv(torch.linalg.cholesky(basis.covariance(kernel)))
        diagonal = (inverse @ expected.covariance @ inverse.mT).diagonal()
        assert_close(model.variational_strategy.variational_distribution.variance, diagonal, 1e-9)
    else:
        assert_close(now.covariance, expected.covariance, 1e-9)


def test_a_q_that_is_wider_than_the_prior_starts_as_its_marginal() -> None:
    model = a_model()
    set_q(model, torch.zeros(ORDER, dtype=F64), 2.0 * torch.eye(ORDER, dtype=F64))
    x = torch.linspace(0, 4, 5, dtype=F64)
    before = model.eval()(x).covariance_matrix.detach()
    model.variational_strategy.advance(HippoFeatures(ORDER, 4.0))
    assert_close(model(x).covariance_matrix, before, 1e-8)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_without_features_q_stays_as_it_is(kind: str) -> None:
    model = a_model(kind)
    set_q(model, *some_moments(1))
    before = [p.detach().clone() for p in model.variational_parameters()]
    features = model.variational_strategy.features
    model.variational_strategy.advance()
    assert model.variational_strategy.features is features
    assert all(torch.equal(p, b) for p, b in zip(model.variational_parameters(), before, strict=True))


def test_parameters_stay_the_objects_that_optimisers_hold() -> None:
    model = a_model("natural")
    before = list(model.parameters())
    set_q(model, *some_moments(1))
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.0))
    assert all(p is b for p, b in zip(model.parameters(), before, strict=True))
    assert model.q.mean_init_std == 0.0


def test_features_that_are_handed_in_stay_the_callers() -> None:
    model, features = a_model(features=InducingPoints(torch.linspace(0, 4, ORDER, dtype=F64))), None
    features = InducingPoints(torch.linspace(0, 5, ORDER, dtype=F64))
    model.variational_strategy.advance(features)
    features.points.add_(1.0)
    assert_close(model.variational_strategy.inducing_points[0], torch.zeros(1, dtype=F64), 1e-15)


def test_features_of_another_kind() -> None:
    """From Legendre coefficients to points and back; other kinds are functionals of the same f."""
    model = a_model()
    set_q(model, *some_moments(1))
    old = as_old(model, BEFORE)
    points = InducingPoints(torch.linspace(0.3, 3.7, ORDER, dtype=F64))
    model.variational_strategy.advance(points)
    expected = oracle.conditional(*kernel_and_mean(BEFORE), old.basis, old.q, functionals(points))
    assert_close(believed(model, BEFORE).mean, expected.mean, 1e-8)
    assert_close(believed(model, BEFORE).covariance, expected.covariance, 1e-8)


def test_the_past_does_not_move_with_points_that_are_learnt() -> None:
    model = a_model(features=InducingPoints(torch.linspace(0, 4, ORDER, dtype=F64), learn=True))
    set_q(model, *some_moments(1))
    strategy = model.variational_strategy
    strategy.advance()
    before = strategy.past.state.nodes.clone()
    optimiser = torch.optim.SGD([strategy.features.points], lr=1.0)
    set_q(model, *some_moments(2))
    strategy.kl_divergence().backward()
    optimiser.step()
    assert torch.equal(strategy.past.state.nodes, before)


def test_what_is_refused() -> None:
    delta = Model(HippoFeatures(ORDER, 4.0), DeltaVariationalDistribution(ORDER))
    with pytest.raises(TypeError, match=r"variational distribution: expected a Gaussian, got Delta"):
        delta.variational_strategy.advance()
    model = a_model()
    set_q(model, *some_moments(1))
    before = oracle.snapshot(model)
    for features, error, message in (
        (HippoFeatures(ORDER + 1, 4.0), ValueError, rf"features: expected {ORDER}, as before, got {ORDER + 1}"),
        (HippoFeatures, TypeError, r"features: expected InducingFeatures, got type"),
        (torch.zeros(ORDER, 1), TypeError, r"features: expected InducingFeatures, got Tensor"),
    ):
        with pytest.raises(error, match=message):
            model.variational_strategy.advance(features)
    oracle.assert_identical(model, before)
    assert model.variational_strategy.past is None
    for num_data, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), ("ten", TypeError)):
        with pytest.raises(error, match="num_data: "):
            StreamingELBO(gaussian_likelihood(), model, num_data=num_data)


@pytest.mark.parametrize(
    "points", [torch.randn(ORDER, 2, dtype=F64), torch.randn(3, ORDER, 1, dtype=F64)], ids=["columns", "batch"]
)
def test_features_that_do_not_fit_are_named(points: Tensor) -> None:
    with pytest.raises(ValueError, match="features: "):
        a_model().variational_strategy.advance(InducingPoints(points))


def test_the_strategy_of_a_stream_refuses_to_advance() -> None:
    stream = oracle.stream(4)
    with pytest.raises(TypeError, match="update"):
        stream.variational_strategy.advance()


@pytest.mark.parametrize("moved", [False, True])
def test_training_goes_on_after_inference_mode(moved: bool) -> None:
    """Whoever wraps a whole serving loop in inference mode may still train later."""
    model, likelihood = a_model(), gaussian_likelihood()
    set_q(model, *some_moments(1))
    features = HippoFeatures(ORDER, 5.0) if moved else None
    with torch.inference_mode():
        model.variational_strategy.advance(features)
    x, y = draw(10, 5.0)
    online_bound(model, likelihood, x, y).backward()
    assert all(p.grad is not None for p in model.variational_parameters())


# As a module


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_float32(kind: str) -> None:
    exact, likelihood = a_model(kind, jitter=1e-8), gaussian_likelihood()
    set_q(exact, *some_moments(1))
    single = deepcopy(exact).float()
    for model in (exact, single):
        model.variational_strategy.advance(HippoFeatures(ORDER, 5.5))
        set_hyperparameters(model, None, AFTER)
    assert single.variational_strategy.past.state.G.dtype == F64
    x, y = draw(12, 5.5)
    kl = single.variational_strategy.kl_divergence()
    assert kl.dtype == torch.float32
    assert_close(kl.double(), exact.variational_strategy.kl_divergence(), 1e-4)
    bound = online_bound(single, deepcopy(likelihood).float(), x.float(), y.float())
    bound.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in single.variational_parameters())
    assert bound.item() == pytest.approx(online_bound(exact, likelihood, x, y).item(), rel=1e-4)
    # Moving the whole model keeps the past exact.
    back = exact.variational_strategy.past.state.G.clone()
    assert torch.equal(exact.float().double().variational_strategy.past.state.G, back)


def test_float32_mean_field_that_is_confident() -> None:
    """Whitened variances below a millionth come from small noise; nothing is rounded up or warned about."""
    x, y = draw(2000, 4.0)
    model, likelihood = a_model("mean field", order=7), gaussian_likelihood(1e-4)
    stream = a_twin(model, likelihood).update(x, y)
    adopt(model, stream)
    model.float()
    assert model.q.variational_stddev.min() < 1e-3
    model.variational_strategy.advance(HippoFeatures(7, 4.0))
    now, then = (
        model.variational_strategy.variational_distribution,
        stream.variational_strategy.variational_distribution,
    )
    assert_close(now.mean.double(), then.mean, 1e-4)


@pytest.mark.parametrize("q_batch", [(), (3,), (2, 1)], ids=str)
@pytest.mark.parametrize("kernel_batch", [(), (3,)], ids=str)
def test_batches_are_loops(q_batch: tuple[int, ...], kernel_batch: tuple[int, ...]) -> None:
    out = torch.broadcast_shapes(q_batch, kernel_batch)
    model = a_model(q_batch=q_batch, batch=kernel_batch)
    scales = torch.linspace(0.7, 1.4, math.prod(kernel_batch), dtype=F64).reshape(kernel_batch)
    moments, later = some_moments(1, batch=q_batch), some_moments(2, batch=q_batch)
    set_q(model, *moments)
    strategy = model.variational_strategy
    strategy.advance()
    model.covar_module.outputscale = scales
    set_q(model, *later)
    kl = strategy.kl_divergence()
    assert kl.shape == out
    for index in np.ndindex(*out):
        pick = lambda tensor, trailing: tensor.expand((*out, *trailing))[index]  # noqa: E731, B023
        alone = a_model()
        set_q(alone, pick(moments[0], (ORDER,)), pick(moments[1], (ORDER, ORDER)))
        alone.variational_strategy.advance()
        alone.covar_module.outputscale = pick(scales, ())
        set_q(alone, pick(later[0], (ORDER,)), pick(later[1], (ORDER, ORDER)))
        assert_close(kl[index], alone.variational_strategy.kl_divergence(), 1e-9)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_batch_moves_together(kind: str) -> None:
    model, moments = a_model(kind, q_batch=(3,), batch=(3,)), some_moments(1, batch=(3,))
    set_q(model, *moments)
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.5))
    now = model.variational_strategy.variational_distribution
    for i in range(3):
        alone = a_model(kind)
        set_q(alone, moments[0][i], moments[1][i])
        alone.variational_strategy.advance(HippoFeatures(ORDER, 5.5))
        expected = alone.variational_strategy.variational_distribution
        assert_close(now.mean[i], expected.mean, 1e-9)
        assert_close(now.covariance_matrix[i], expected.covariance_matrix, 1e-9)


def advanced(kind: str = "cholesky") -> Model:
    model = a_model(kind)
    set_q(model, *some_moments(1))
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.5))
    set_q(model, *some_moments(2))
    return model


def saved(model: Model) -> dict[str, Tensor]:
    """All that is saved, but the key that equals nothing because a forward may depend on anything."""
    return {name: value for name, value in oracle.snapshot(model).items() if not name.endswith("past.hyperparameters")}


def assert_saved(model: Model, before: dict[str, Tensor]) -> None:
    now = saved(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())


def reloaded(model: Model, into: Model) -> Model:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    into.load_state_dict(torch.load(file, weights_only=True))
    return into


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_save_and_load_in_mid_stream(kind: str) -> None:
    model, likelihood = advanced(kind), gaussian_likelihood()
    other = reloaded(model, a_model(kind, horizon=1.0))
    assert_saved(other, saved(model))
    x, y = draw(10, 5.5)
    results = []
    for m in (model, other):
        bound = online_bound(m, likelihood, x, y)
        m.variational_strategy.advance(HippoFeatures(ORDER, 6.0))
        set_hyperparameters(m, None, AFTER)
        results.append((bound, m.variational_strategy.kl_divergence(), m.eval()(x).mean))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-12)


def test_a_fresh_state_into_an_advanced_model() -> None:
    fresh, model = a_model(), advanced()
    reloaded(fresh, model)
    assert model.variational_strategy.past is None
    assert model.variational_strategy.kl_divergence() == fresh.variational_strategy.kl_divergence()
    assert model.variational_strategy.features.horizon == 4.0
    oracle.assert_identical(model, oracle.snapshot(fresh))


def test_another_past_into_an_advanced_model() -> None:
    """Loading replaces the past as a value: whoever holds the old one keeps it."""
    model, other = advanced(), advanced()
    held = other.variational_strategy.past.state
    value = held.G.clone()
    set_q(model, *some_moments(5))
    model.variational_strategy.advance(HippoFeatures(ORDER, 7.0))
    reloaded(model, other)
    assert torch.equal(held.G, value)
    assert_close(other.variational_strategy.kl_divergence(), model.variational_strategy.kl_divergence(), 1e-12)
    assert_saved(other, saved(model))


def test_copies_go_their_own_way() -> None:
    model = advanced()
    before, kl = saved(model), model.variational_strategy.kl_divergence()
    other = deepcopy(model)
    assert other.variational_strategy.model is other
    assert other.variational_strategy.kl_divergence() == kl
    set_hyperparameters(other, None, AFTER)
    other.variational_strategy.advance(HippoFeatures(ORDER, 9.0))
    assert_saved(model, before)
    assert model.variational_strategy.kl_divergence() == kl


def test_eval_mode_needs_no_switch() -> None:
    model = a_model().eval()
    set_q(model, *some_moments(1))
    x = torch.linspace(0, 5, 7, dtype=F64)
    model(x)
    old = as_old(model, BEFORE)
    model.variational_strategy.advance(HippoFeatures(ORDER, 5.5))
    kernel, mean = kernel_and_mean(BEFORE)
    basis = functionals(model.variational_strategy.features)
    moved = oracle.conditional(kernel, mean, old.basis, old.q, basis)
    expected = oracle.conditional(kernel, mean, basis, moved, oracle.at_points(x))
    assert_close(model(x).mean, expected.mean, 1e-8)
    assert_close(model(x).covariance_matrix, expected.covariance, 1e-8)
    # And hyperparameters that are set now take effect, in predictions and in the divergence.
    q, kl = model.variational_strategy.variational_distribution, model.variational_strategy.kl_divergence()
    set_hyperparameters(model, None, AFTER)
    kernel, mean = kernel_and_mean(AFTER)
    expected = oracle.conditional(kernel, mean, basis, believed(model, AFTER), oracle.at_points(x))
    assert_close(model(x).mean, expected.mean, 1e-8)
    assert_close(model(x).covariance_matrix, expected.covariance, 1e-8)
    assert torch.equal(q.mean, model.variational_strategy.variational_distribution.mean)
    assert model.variational_strategy.kl_divergence() != kl


def test_backward_twice_and_autocast() -> None:
    model, likelihood = advanced(), gaussian_likelihood()
    x, y = draw(10, 5.5)
    kl = model.variational_strategy.kl_divergence()
    for _ in range(2):
        online_bound(model, likelihood, x, y).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model.variational_strategy.kl_divergence(), kl, 1e-12)
        deepcopy(model).variational_strategy.advance()


def test_a_whole_stream_ends_where_the_closed_form_does() -> None:
    """Ten chunks, each closed by one natural step, with the features that follow the data."""
    likelihood = gaussian_likelihood()
    model = a_model("natural", horizon=1.0, order=12, jitter=None)
    stream = a_twin(model, likelihood)
    optimiser = gpytorch.optim.NGD(model.variational_parameters(), num_data=8, lr=1.0)
    strategy, elbo = model.variational_strategy, StreamingELBO(likelihood, model)
    for i in range(10):
        x, y = draw(8, i + 1.0, float(i), seed=i)
        features = strategy.features.following(x[:, None], model.covar_module)
        strategy.advance(features)
        optimiser.zero_grad()
        (-elbo(model(x), y)).backward()
        optimiser.step()
        stream.update(x, y)
        assert strategy.features.horizon == stream.features.horizon
    at = torch.linspace(0, 10, 21, dtype=F64)
    ours, expected = model.eval()(at), stream(at)
    assert_close(ours.mean, expected.mean, 1e-6)
    assert_close(ours.covariance_matrix, expected.covariance_matrix, 1e-6)
