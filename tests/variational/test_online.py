"""The online mathematics as pure functions: chunks, changes of basis and of hyperparameters, against dense oracles."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import HippoFeatures, InducingFeatures, InducingPoints
from gpseq.variational import InterdomainVariationalStrategy, OnlineState, Prior, online
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, DenseStream, assert_close, draw, functionals, gpytorch_kernel

METHODS = ("vfe", "adf")


def constant(value: float) -> tuple[gpytorch.means.Mean, oracle.Mean]:
    module = gpytorch.means.ConstantMean().double()
    module.constant.data.fill_(value)
    return module, lambda x: torch.full_like(x, value)


def linear(slope: float, bias: float) -> tuple[gpytorch.means.Mean, oracle.Mean]:
    module = gpytorch.means.LinearMean(1).double()
    module.weights.data.fill_(slope)
    module.bias.data.fill_(bias)
    return module, lambda x: slope * x + bias


class Wave(gpytorch.means.Mean):
    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.register_parameter("frequency", torch.nn.Parameter(torch.tensor(frequency, dtype=F64)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x[..., 0])


def wave(frequency: float) -> tuple[gpytorch.means.Mean, oracle.Mean]:
    return Wave(frequency), lambda x: torch.sin(frequency * x)


def fresh(features: InducingFeatures, prior: Prior) -> OnlineState:
    return online.initial_state(features, prior, jitter=0.0)


def absorb(
    state: OnlineState, prior: Prior, x: Tensor, y: Tensor, noise: Tensor | float, **options: Any
) -> OnlineState:
    return online.update(state, prior, x, y, torch.as_tensor(noise, dtype=F64), **options)


def predict(state: OnlineState, prior: Prior, at: Tensor) -> oracle.Gaussian:
    """Posterior of f from a state, by the definition of q(v)."""
    mean, scale_tril = online.posterior(state)
    A = online.whiten(state, prior, at)
    covariance = prior.covariance(at, at) - A.mT @ A + A.mT @ scale_tril @ scale_tril.mT @ A
    return oracle.Gaussian((A.mT @ mean.unsqueeze(-1)).squeeze(-1) + prior.mean_at(at), covariance)


def assert_gaussian(actual: oracle.Gaussian, expected: oracle.Gaussian, tolerance: float) -> None:
    assert_close(actual.mean, expected.mean, tolerance)
    assert_close(actual.covariance, expected.covariance, tolerance)


def assert_state(actual: OnlineState, expected: OnlineState, tolerance: float) -> None:
    for name, value in expected.items():
        if value.is_floating_point():
            assert_close(getattr(actual, name), value, tolerance)
        else:
            assert torch.equal(getattr(actual, name), value), name


AT = torch.linspace(-1.0, 13.0, 17, dtype=F64)


# One basis


@given(
    order=st.integers(1, 14),
    num=st.integers(1, 40),
    start=st.sampled_from([0.0, -3.0, 100.0]),
    nu=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 10**6),
    points=st.booleans(),
)
def test_the_first_update_is_the_sparse_gp(
    order: int, num: int, start: float, nu: float | None, seed: int, points: bool
) -> None:
    """Posterior and collapsed bound, per-point noise, a mean function, Legendre features and inducing points."""
    features: InducingFeatures = HippoFeatures(order, start + 10.0, start)
    if points:
        features = InducingPoints(start + torch.linspace(0.0, 10.0, order + 1, dtype=F64)[1:])
    mean, mean_function = linear(0.01, 0.7)
    prior = Prior(gpytorch_kernel(1.3, 1.7, nu), mean)
    kernel = oracle.rbf(1.3, 1.7) if nu is None else oracle.matern32(1.3, 1.7)
    x, y = draw(num, start + 10, start, seed)
    noise = 0.05 + torch.rand(num, dtype=F64)
    state = absorb(fresh(features, prior), prior, x, y, noise)
    q, bound = oracle.sparse_gp(kernel, mean_function, functionals(features), x, y, noise)
    expected = oracle.conditional(kernel, mean_function, functionals(features), q, oracle.at_points(AT + start))
    assert_gaussian(predict(state, prior, AT + start), expected, 1e-7)
    assert_close(online.log_evidence(state), bound, 1e-8)
    assert state.count == num


@given(
    num=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    seed=st.integers(0, 10**6),
    order=st.sampled_from([1, 8, 20]),
)
def test_streaming_is_batch_for_any_chunks_and_order(num: int, cuts: list[int], seed: int, order: int) -> None:
    prior = Prior(gpytorch_kernel(1.0))
    x, y = draw(num, seed=seed)
    noise = 0.02 + torch.rand(num, dtype=F64)
    whole = absorb(fresh(HippoFeatures(order, 10.0), prior), prior, x, y, noise)
    shuffled = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    state = fresh(HippoFeatures(order, 10.0), prior)
    for chunk in shuffled.tensor_split(sorted(cuts)):
        state = absorb(state, prior, x[chunk], y[chunk], noise[chunk])
    assert_state(state, whole, 1e-10)
    assert_close(online.log_evidence(state), online.log_evidence(whole), 1e-9)


def test_repeated_times_are_a_mean_with_less_noise() -> None:
    prior = Prior(gpytorch_kernel(1.0))
    x, y = draw(10)
    thrice = absorb(fresh(HippoFeatures(12, 10.0), prior), prior, x.repeat(3), y.repeat(3), 0.3)
    once = absorb(fresh(HippoFeatures(12, 10.0), prior), prior, x, y, 0.1)
    assert_gaussian(predict(thrice, prior, AT), predict(once, prior, AT), 1e-12)


def test_the_bound_rises_to_the_exact_evidence_from_below() -> None:
    kernel = oracle.rbf(1.0, 1.4)
    prior = Prior(gpytorch_kernel(1.0, 1.4))
    x, y = draw(50)
    noise = torch.full_like(x, 0.2)
    exact = oracle.exact_evidence(kernel, oracle.zero, x, y, noise)
    bounds = []
    for order in (2, 5, 10, 15, 20, 40):
        state = absorb(online.initial_state(HippoFeatures(order, 10.0), prior, 1e-13), prior, x, y, noise)
        bounds.append(online.log_evidence(state).item())
    assert all(low <= high + 1e-8 for low, high in pairwise(bounds))
    assert bounds[0] < exact - 1 and bounds[-1] <= exact + 1e-8
    assert bounds[-1] == pytest.approx(exact.item(), abs=1e-6)
    at_capacity = predict(state, prior, AT[2:-4])
    assert_gaussian(at_capacity, oracle.exact_gp(kernel, oracle.zero, x, y, noise, AT[2:-4]), 1e-5)


def test_evidence_is_the_integral_of_the_factor() -> None:
    """exp(bound) is the likelihood factor integrated over the prior: here one feature, by brute force."""
    prior = Prior(gpytorch_kernel(4.0))
    x, y = draw(7)
    state = absorb(fresh(HippoFeatures(1, 10.0, num_nodes=30), prior), prior, x, y, 0.3)
    v = torch.linspace(-12, 12, 200_001, dtype=F64)
    log_integrand = -0.5 * state.G[0, 0] * v**2 + state.r[0] * v + state.c - 0.5 * v**2 - 0.5 * math.log(2 * math.pi)
    assert_close(online.log_evidence(state), (log_integrand.logsumexp(0) + math.log(24 / 200_000)), 1e-9)


def test_nothing_seen_is_the_prior(dtype: torch.dtype) -> None:
    mean, mean_function = linear(0.2, 1.0)
    prior = Prior(gpytorch_kernel(1.0, 2.0, dtype=dtype), mean)
    state = fresh(HippoFeatures(10, 10.0), prior)
    kernel = oracle.rbf(prior.kernel.base_kernel.lengthscale.item(), prior.kernel.outputscale.item())
    assert_gaussian(predict(state, prior, AT), oracle.Gaussian(mean_function(AT), kernel(AT, AT)), 1e-6)
    assert online.log_evidence(state) == 0 and state.count == 0
    empty = absorb(state, prior, AT[:0], AT[:0], 0.1)
    assert_state(empty, state, 0.0)


def test_missing_targets_are_not_there(dtype: torch.dtype) -> None:
    prior = Prior(gpytorch_kernel(1.0))
    x, y = draw(30, dtype=dtype)
    noise = 0.1 + torch.rand(30, dtype=F64)
    observed = torch.rand(30) < 0.6
    holes, unknown = y.masked_fill(~observed, math.nan), noise.masked_fill(~observed, math.nan)
    state = absorb(fresh(HippoFeatures(12, 10.0), prior), prior, x, holes, unknown, observed=observed)
    dropped = absorb(fresh(HippoFeatures(12, 10.0), prior), prior, x[observed], y[observed], noise[observed])
    assert_state(state, dropped, 1e-12)


def test_inputs_of_either_precision_give_a_state_in_float64(dtype: torch.dtype) -> None:
    prior = Prior(gpytorch_kernel(1.0, dtype=dtype))
    x, y = draw(30, dtype=dtype)
    state = absorb(fresh(HippoFeatures(12, 10.0), prior), prior, x, y, 0.1)
    reference = absorb(
        fresh(HippoFeatures(12, 10.0), Prior(gpytorch_kernel(1.0))), Prior(gpytorch_kernel(1.0)), *draw(30), 0.1
    )
    assert all(value.dtype == F64 for name, value in state.items() if name != "count")
    assert_gaussian(predict(state, prior, AT), predict(reference, prior, AT), 1e-4)


# The same thing by gradients


class Sparse(gpytorch.models.ApproximateGP):
    """An ordinary GPyTorch model with the strategy for features."""

    def __init__(self, features: InducingFeatures, q: type, kernel: gpytorch.kernels.Kernel) -> None:
        distribution = q(features.num_features).double()
        super().__init__(InterdomainVariationalStrategy(self, features, distribution, jitter=0.0))
        self.mean_module, self.covar_module = linear(0.1, 0.5)[0], kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def gaussian_likelihood(noise: float) -> gpytorch.likelihoods.GaussianLikelihood:
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor(noise, dtype=F64)
    return likelihood


def test_the_elbo_is_the_bound_at_the_closed_form_and_nowhere_higher() -> None:
    """GPyTorch's own ELBO, with q(v) of the state: same value, no gradient, and any other q is worse."""
    x, y = draw(25)
    model = Sparse(
        HippoFeatures(8, 10.0), gpytorch.variational.CholeskyVariationalDistribution, gpytorch_kernel(1.0, 1.5)
    )
    prior, likelihood = Prior(model.covar_module, model.mean_module), gaussian_likelihood(0.2)
    state = absorb(fresh(HippoFeatures(8, 10.0), prior), prior, x, y, 0.2)
    elbo = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=25)
    q = model.variational_strategy._variational_distribution
    model.variational_strategy.variational_params_initialized.fill_(1)
    mean, scale_tril = online.posterior(state)
    q.variational_mean.data, q.chol_variational_covar.data = mean.detach().clone(), scale_tril.detach().clone()
    value = 25 * elbo(model(x), y)
    assert_close(value.detach(), online.log_evidence(state).detach(), 1e-8)
    of_mean, of_factor = torch.autograd.grad(value, [q.variational_mean, q.chol_variational_covar])
    assert of_mean.abs().max() < 1e-6 and of_factor.tril().abs().max() < 1e-6
    for _ in range(10):
        q.variational_mean.data = mean.detach() + 0.01 * torch.randn(8, dtype=F64)
        q.chol_variational_covar.data = scale_tril.detach() * torch.exp(0.01 * torch.randn(8, 8, dtype=F64))
        assert 25 * elbo(model(x), y) < value


def test_one_natural_gradient_step_is_the_closed_form() -> None:
    x, y = draw(25)
    model = Sparse(
        HippoFeatures(8, 10.0), gpytorch.variational.NaturalVariationalDistribution, gpytorch_kernel(1.0, 1.5)
    )
    prior, likelihood = Prior(model.covar_module, model.mean_module), gaussian_likelihood(0.2)
    model(x)  # initialises q(v)
    elbo = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=25)
    optimizer = gpytorch.optim.NGD(model.variational_parameters(), num_data=25, lr=1.0)
    (-elbo(model(x), y)).backward()
    optimizer.step()
    state = absorb(fresh(HippoFeatures(8, 10.0), prior), prior, x, y, 0.2)
    model.eval()
    with torch.no_grad():
        expected = predict(state, prior, AT)
        assert_close(model(AT).mean, expected.mean, 1e-6)
        assert_close(model(AT).covariance_matrix, expected.covariance, 1e-6)


# Another basis


@pytest.mark.parametrize("method", METHODS)
def test_the_same_basis_computed_anew_changes_nothing(method: str) -> None:
    """B = I without the shortcut; the wrong triangular solve fails here."""
    prior = Prior(gpytorch_kernel(0.5, 1.3))
    state = absorb(fresh(HippoFeatures(12, 10.0), prior), prior, *draw(40), 0.1)
    again = online.transfer(state, fresh(HippoFeatures(12, 10.0), prior), prior, method)
    assert_state(again, state, 1e-9)


@given(
    orders=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    lengthscale=st.floats(0.3, 5.0),
    stretch=st.floats(1.0, 6.0),
    rough=st.booleans(),
)
def test_transfer_is_a_contraction(orders: tuple[int, int], lengthscale: float, stretch: float, rough: bool) -> None:
    """B B' is what a unit of information on every old feature becomes; no direction may gain."""
    prior = Prior(gpytorch_kernel(lengthscale, nu=1.5 if rough else None))
    old = online.initial_state(HippoFeatures(orders[0], 10.0), prior)
    new = online.initial_state(HippoFeatures(orders[1], 10.0 * stretch), prior)
    unit = dataclasses.replace(old, G=torch.eye(orders[0], dtype=F64))
    carried = online.transfer(unit, new, prior, "vfe").G
    assert torch.linalg.matrix_norm(carried, 2) <= (1 + 1e-10) ** 2
    assert torch.linalg.eigvalsh(carried).min() >= -1e-12


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10**6), growth=st.floats(1.01, 2.0), order=st.integers(2, 30))
@settings(max_examples=10)
def test_information_stays_positive_and_variance_below_the_prior(
    method: str, seed: int, growth: float, order: int
) -> None:
    """Over six stretchings, above capacity and below it."""
    prior = Prior(gpytorch_kernel(0.7, 1.3))
    horizon, features = 4.0, HippoFeatures(order, 4.0)
    state = online.initial_state(features, prior)
    for step in range(6):
        state = absorb(state, prior, *draw(15, horizon, seed=seed + step), 1e-3)
        assert torch.equal(state.G, state.G.mT)
        assert torch.linalg.eigvalsh(state.G).min() >= -1e-9 * state.G.diagonal().max()
        posterior = predict(state, prior, torch.linspace(-2, 2 * horizon, 50, dtype=F64))
        assert (posterior.variance <= 1.3 * (1 + 1e-9)).all()
        assert posterior.variance.min() >= -1e-9
        horizon *= growth
        features = features.with_horizon(horizon)
        state = online.transfer(state, online.initial_state(features, prior), prior, method)
        assert torch.equal(state.G, state.G.mT)
        assert torch.linalg.eigvalsh(state.G).min() >= -1e-9 * state.G.diagonal().max().clamp_min(1)


# Name, kernel of the chunk, its mean, its features, noise: all change from chunk to chunk.
SCHEDULES: dict[str, list[tuple[Any, ...]]] = {
    "horizon": [(1.0, 1.0, constant(0.0), HippoFeatures(9, h), 0.1) for h in (8.0, 10.0, 14.0)],
    "order": [(1.0, 1.0, constant(0.3), HippoFeatures(m, 10.0), 0.1) for m in (7, 11, 5)],
    "lengthscale": [(l, 1.0, constant(0.0), HippoFeatures(9, 10.0), 0.1) for l in (1.0, 1.4, 0.8)],
    "outputscale": [(1.0, s, constant(0.0), HippoFeatures(9, 10.0), 0.1) for s in (1.0, 2.5, 0.4)],
    "noise": [(1.0, 1.0, constant(0.0), HippoFeatures(9, 10.0), s) for s in (0.1, 0.4, 0.02)],
    "constant mean": [(1.0, 1.0, constant(m), HippoFeatures(9, 10.0), 0.1) for m in (0.0, 1.5, -2.0)],
    "linear mean": [(1.0, 1.0, linear(m, 0.5), HippoFeatures(9, 10.0), 0.1) for m in (0.1, -0.2, 0.3)],
    "nonlinear mean": [(1.0, 1.0, wave(m), HippoFeatures(9, 10.0), 0.1) for m in (1.0, 0.3, 2.0)],
    "kind of mean": [(1.0, 1.0, m, HippoFeatures(9, 10.0), 0.1) for m in (constant(1.0), linear(0.2, 0.1), wave(0.9))],
    "start": [(1.0, 1.0, constant(0.0), HippoFeatures(9, 10.0, s), 0.1) for s in (0.0, -2.0, 1.0)],
    "points": [(1.0, 1.0, constant(0.0), InducingPoints(p), 0.1) for p in (AT[1::2], AT[::2], AT[2::3])],
    "kind of features": [
        (1.0, 1.0, constant(0.0), f, 0.1)
        for f in (InducingPoints(AT[::2]), HippoFeatures(9, 12.0), InducingPoints(AT[1::2]))
    ],
    "everything": [
        (1.0, 1.0, constant(0.5), HippoFeatures(8, 9.0), 0.1),
        (1.3, 2.0, linear(0.1, -0.4), HippoFeatures(10, 11.0), 0.3),
        (0.9, 0.7, wave(1.2), HippoFeatures(9, 15.0, -1.0), 0.05),
    ],
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("rough", [False, True], ids=["rbf", "matern32"])
def test_vfe_is_the_four_term_objective(schedule: list[tuple[Any, ...]], rough: bool) -> None:
    """Posterior and increment of evidence of Bui et al., with explicit KL terms, whatever has changed in between."""
    family, nu = (oracle.matern32, 1.5) if rough else (oracle.rbf, None)
    state, dense = None, None
    for index, (lengthscale, outputscale, (mean, mean_function), features, noise) in enumerate(schedule):
        kernel, prior = family(lengthscale, outputscale), Prior(gpytorch_kernel(lengthscale, outputscale, nu), mean)
        x, y = draw(12, 9.0, seed=index)
        noises = noise * (0.5 + torch.rand(12, dtype=F64))
        basis = fresh(features, prior)
        state = basis if state is None else online.transfer(state, basis, prior, "vfe")
        state = absorb(state, prior, x, y, noises)
        dense = dense or DenseStream(kernel, functionals(features), mean_function)
        dense.update(x, y, noises, kernel=kernel, basis=functionals(features), mean=mean_function)
        assert_gaussian(predict(state, prior, AT), dense.predict(AT), 1e-7)
        assert_close(online.log_evidence(state), dense.evidence, 1e-8)


@given(
    hyperparameters=st.lists(
        st.tuples(
            st.floats(0.7, 1.6),  # lengthscale
            st.floats(0.3, 3.0),  # outputscale
            st.floats(-2.0, 2.0),  # mean
            st.floats(0.02, 1.0),  # noise
            st.floats(8.0, 16.0),  # horizon
            st.integers(1, 10),  # order
            st.integers(0, 8),  # size of the chunk
        ),
        min_size=2,
        max_size=4,
    )
)
def test_vfe_is_the_four_term_objective_for_any_changes(hyperparameters: list[tuple[Any, ...]]) -> None:
    """Increment + previous bound = cumulative bound, empty chunks included."""
    state, dense, at = None, None, torch.linspace(0, 8, 9, dtype=F64)
    for index, (lengthscale, outputscale, level, noise, horizon, order, num) in enumerate(hyperparameters):
        mean, mean_function = constant(level)
        kernel, prior = oracle.rbf(lengthscale, outputscale), Prior(gpytorch_kernel(lengthscale, outputscale), mean)
        basis = fresh(HippoFeatures(order, horizon, num_nodes=40), prior)
        x, y = draw(num, 8.0, seed=index)
        state = basis if state is None else online.transfer(state, basis, prior, "vfe")
        state = absorb(state, prior, x, y, noise)
        u = oracle.legs(order, horizon, num_nodes=40)
        dense = dense or DenseStream(kernel, u, mean_function)
        dense.update(x, y, torch.full_like(x, noise), kernel=kernel, basis=u, mean=mean_function)
    assert state is not None and dense is not None
    assert_gaussian(predict(state, prior, at), dense.predict(at), 1e-6)
    assert_close(online.log_evidence(state), dense.evidence, 1e-7)


def test_the_oracle_objective_has_its_maximum_where_the_state_is() -> None:
    """No perturbation of q(b) raises the four-term objective: the closed form is its maximum, not only its value."""
    kernel, other = oracle.rbf(1.0), oracle.rbf(1.3, 2.0)
    first, second = functionals(HippoFeatures(7, 9.0)), functionals(HippoFeatures(8, 12.0))
    data = [(*draw(12, 9.0, seed=s), torch.full((12,), 0.1, dtype=F64)) for s in range(2)]
    dense = DenseStream(kernel, first).update(*data[0])
    old = dense.old
    dense.update(*data[1], kernel=other, basis=second)
    best = oracle.objective(other, oracle.zero, second, dense.old.q, data[1], old)
    for _ in range(20):
        nudge = 1e-2 * torch.randn(8, 8, dtype=F64)
        twist = torch.eye(8, dtype=F64) + nudge
        moved = oracle.Gaussian(dense.old.q.mean + nudge[0], twist @ dense.old.q.covariance @ twist.mT)
        assert oracle.objective(other, oracle.zero, second, moved, data[1], old) < best


@pytest.mark.parametrize("name", ["horizon", "order", "start", "points", "lengthscale", "linear mean", "everything"])
def test_adf_is_the_marginal_of_the_old_process(name: str) -> None:
    """And its evidence is a sum of predictive log densities (less the residual terms)."""
    state, old, evidence = None, None, torch.zeros((), dtype=F64)
    for index, (lengthscale, outputscale, (mean, mean_function), features, noise) in enumerate(SCHEDULES[name]):
        kernel, prior = oracle.rbf(lengthscale, outputscale), Prior(gpytorch_kernel(lengthscale, outputscale), mean)
        x, y = draw(12, 9.0, seed=index)
        noises, basis = torch.full_like(x, noise), functionals(features)
        if state is None:
            state, nothing = fresh(features, prior), basis.prior(kernel, mean_function)
            old = oracle.Old(basis, nothing, nothing)
        else:
            state = online.transfer(state, fresh(features, prior), prior, "adf")
        state = absorb(state, prior, x, y, noises)
        q, increment = oracle.moment_matching(kernel, mean_function, old, basis, (x, y, noises))
        old = oracle.Old(basis, q, basis.prior(kernel, mean_function))
        evidence = evidence + increment
        expected = oracle.conditional(kernel, mean_function, basis, q, oracle.at_points(AT))
        assert_gaussian(predict(state, prior, AT), expected, 1e-7)
        assert_close(online.log_evidence(state), evidence, 1e-7)


def test_both_transfers_agree_above_capacity() -> None:
    prior = Prior(gpytorch_kernel(2.0))
    states = {}
    for method in METHODS:
        state = online.initial_state(HippoFeatures(24, 8.0), prior)
        for step, horizon in enumerate((8.0, 9.0, 11.0, 14.0)):
            basis = online.initial_state(HippoFeatures(24, horizon), prior)
            state = absorb(online.transfer(state, basis, prior, method), prior, *draw(30, horizon, seed=step), 0.1)
        states[method] = state
    at = torch.linspace(0, 14, 30, dtype=F64)
    assert_gaussian(predict(states["vfe"], prior, at), predict(states["adf"], prior, at), 1e-6)
    assert_close(online.log_evidence(states["vfe"]), online.log_evidence(states["adf"]), 1e-5)


def test_both_transfers_differ_below_capacity() -> None:
    """Otherwise the agreement above would show nothing."""
    prior = Prior(gpytorch_kernel(0.5))
    old = absorb(fresh(HippoFeatures(8, 10.0), prior), prior, *draw(40), 0.05)
    new = fresh(HippoFeatures(8, 14.0), prior)
    vfe, adf = (predict(online.transfer(old, new, prior, method), prior, AT) for method in METHODS)
    assert (vfe.mean - adf.mean).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
@given(stretch=st.floats(1.0, 1.6), seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_a_longer_horizon_without_data_leaves_the_past_alone(method: str, stretch: float, seed: int) -> None:
    """Up to the variance that the longer basis cannot hold."""
    kernel, prior = oracle.rbf(1.0), Prior(gpytorch_kernel(1.0))
    state = absorb(online.initial_state(HippoFeatures(30, 10.0), prior), prior, *draw(40, seed=seed), 0.1)
    longer = HippoFeatures(30, 10.0 * stretch)
    carried = online.transfer(state, online.initial_state(longer, prior), prior, method)
    at = torch.linspace(0, 10, 40, dtype=F64)
    residual = oracle.residual_variance(
        kernel, functionals(longer), torch.linspace(0, 10 * stretch, 100, dtype=F64)
    ).max()
    before, after = predict(state, prior, at), predict(carried, prior, at)
    assert (before.mean - after.mean).abs().max() <= 1e-6 + 10 * residual.sqrt()
    assert (before.variance - after.variance).abs().max() <= 1e-6 + 10 * residual
    assert carried.count == state.count
    assert online.log_evidence(carried) <= online.log_evidence(state) + 1e-7


def test_an_empty_transfer_maps_the_information_by_b() -> None:
    """G_b = B G B', r_b = B r, with B written out in the unwhitened coordinates of the oracle."""
    kernel, prior = oracle.rbf(1.0, 1.5), Prior(gpytorch_kernel(1.0, 1.5))
    old, new = HippoFeatures(9, 10.0), HippoFeatures(11, 13.0)
    state = absorb(fresh(old, prior), prior, *draw(30), 0.1)
    carried = online.transfer(state, fresh(new, prior), prior, "vfe")
    a, b = functionals(old), functionals(new)
    L_a, L_b = (torch.linalg.cholesky(u.covariance(kernel)) for u in (a, b))
    B = torch.linalg.inv(L_b) @ b.cross(kernel, a) @ torch.linalg.inv(L_a).mT
    assert_close(carried.G, B @ state.G @ B.mT, 1e-9)
    assert_close(carried.r, B @ state.r, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_change_of_nothing_is_no_change(method: str) -> None:
    """Where jitter matters: hyperparameters that differ in the last digit take the general route to the same place."""
    prior, almost = Prior(gpytorch_kernel(1.0)), Prior(gpytorch_kernel(1.0, 1.0 + 1e-14))
    assert not torch.equal(prior.hyperparameters(), almost.hyperparameters())
    features, x = HippoFeatures(24, 3.0), torch.linspace(0, 3, 500, dtype=F64)
    state = absorb(online.initial_state(features, prior), prior, x, x.sin(), 1e-8)
    basis = online.initial_state(features.with_horizon(3.3), prior)
    expected = online.transfer(state, basis, prior, method)
    almost_basis = online.initial_state(features.with_horizon(3.3), almost)
    actual = online.transfer(state, almost_basis, almost, method)
    assert_close(online.log_evidence(actual), online.log_evidence(expected), 1e-5)
    assert_gaussian(predict(actual, almost, AT[1:5]), predict(expected, prior, AT[1:5]), 1e-5)


@pytest.mark.parametrize("noise", [1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("method", METHODS)
def test_nearly_noiseless_data_survive_a_stretching(method: str, noise: float) -> None:
    """Posterior variances of the features far below rounding error of their prior variances."""
    prior = Prior(gpytorch_kernel(1.0))
    features, x = HippoFeatures(30, 8.0), torch.linspace(0, 8, 1000, dtype=F64)
    state = absorb(online.initial_state(features, prior), prior, x, x.sin(), noise)
    for horizon in (8.0, 9.0, 10.0, 12.0):
        state = online.transfer(state, online.initial_state(features.with_horizon(horizon), prior), prior, method)
        assert state.G.isfinite().all() and torch.linalg.eigvalsh(state.G).min() > -1e-9 * state.G.diagonal().max()
        assert online.log_evidence(state).isfinite()
    posterior = predict(state, prior, x[::50])
    assert posterior.variance.min() > -1e-9
    assert (posterior.mean - x[::50].sin()).abs().max() < 1e-2


def test_adf_knows_no_more_than_float64_can_say() -> None:
    """Without jitter, on the same basis, all that is left of S is rounding, of either sign."""
    prior = Prior(gpytorch_kernel(1.0))
    x = torch.linspace(0, 10, 400, dtype=F64)
    state = absorb(fresh(HippoFeatures(14, 10.0), prior), prior, x, x.sin(), 1e-18)
    for _ in range(5):
        state = online.transfer(state, fresh(HippoFeatures(14, 10.0), prior), prior, "adf")
        assert torch.linalg.eigvalsh(state.G).min() > -1e-9 * state.G.diagonal().max()
        assert online.log_evidence(state).isfinite() and predict(state, prior, x).mean.isfinite().all()


# Batches, values, errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(3,), (2, 3), (3, 1)])
def test_a_batch_is_a_loop(batch: tuple[int, ...], method: str, dtype: torch.dtype) -> None:
    """A batch of kernels, of inputs, of targets and of noises, through an update, a transfer and an update."""
    lengthscales = 0.8 + torch.rand(batch)
    prior = Prior(gpytorch_kernel(lengthscales, batch_shape=batch, dtype=dtype))
    x = 10 * torch.rand(2, *batch, 15, 1, dtype=dtype)
    y = torch.randn(2, *batch, 15, dtype=dtype)
    noise = 0.1 + torch.rand(2, *batch, 15, dtype=dtype)
    first, second = HippoFeatures(8, 10.0), HippoFeatures(9, 13.0)

    def run(prior: Prior, x: Tensor, y: Tensor, noise: Tensor) -> OnlineState:
        state = online.update(fresh(first, prior), prior, x[0], y[0], noise[0])
        state = online.transfer(state, fresh(second, prior), prior, method)
        return online.update(state, prior, x[1], y[1], noise[1])

    together = run(prior, x, y, noise)
    assert together.G.shape == (*batch, 9, 9) and together.r.shape == (*batch, 9)
    evidence = online.log_evidence(together)
    assert evidence.shape == batch
    for index in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)).tolist():
        at = (slice(None), *index)
        alone = run(Prior(gpytorch_kernel(lengthscales[tuple(index)], dtype=dtype)), x[at], y[at], noise[at])
        assert_close(together.G[tuple(index)], alone.G, 1e-7)
        assert_close(together.r[tuple(index)], alone.r, 1e-7)
        assert_close(evidence[tuple(index)], online.log_evidence(alone), 1e-7)


def test_targets_of_a_batch_share_the_information() -> None:
    """Fantasies: one G, many shifts."""
    prior = Prior(gpytorch_kernel(1.0))
    x, _ = draw(10)
    y = torch.randn(4, 10, dtype=F64)
    state = absorb(fresh(HippoFeatures(8, 10.0), prior), prior, x, y, 0.1)
    assert state.G.shape == (8, 8) and state.r.shape == (4, 8) and online.log_evidence(state).shape == (4,)
    for index in range(4):
        alone = absorb(fresh(HippoFeatures(8, 10.0), prior), prior, x, y[index], 0.1)
        assert_close(state.r[index], alone.r, 1e-12)
        assert_close(online.log_evidence(state)[index], online.log_evidence(alone), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_functions_leave_their_arguments_alone(method: str) -> None:
    prior = Prior(gpytorch_kernel(1.0))
    state = absorb(fresh(HippoFeatures(8, 10.0), prior), prior, *draw(10), 0.1)
    basis = fresh(HippoFeatures(8, 12.0), prior)
    kept = {name: value.clone() for name, value in (*state.items(), *((f"basis {n}", v) for n, v in basis.items()))}
    absorb(online.transfer(state, basis, prior, method), prior, *draw(10, seed=1), 0.1)
    for name, value in (*state.items(), *((f"basis {n}", v) for n, v in basis.items())):
        assert torch.equal(value, kept[name]), name
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.G = state.G  # type: ignore[misc]


def test_residual_variance_is_what_the_features_do_not_explain() -> None:
    kernel, features = oracle.rbf(0.6, 2.0), HippoFeatures(9, 10.0)
    prior = Prior(gpytorch_kernel(0.6, 2.0))
    residual = online.residual_variance(fresh(features, prior), prior, AT)
    expected = oracle.residual_variance(kernel, functionals(features), AT)
    assert_close(residual, expected, 1e-9)
    assert expected.min() < 0.6 and residual.max() > 0.9


def test_detach_cuts_the_graph() -> None:
    prior = Prior(gpytorch_kernel(1.0))
    x, y = draw(5)
    state = absorb(fresh(HippoFeatures(4, 10.0), prior), prior, x, y.requires_grad_(), 0.1)
    assert state.r.requires_grad
    detached = state.detach()
    assert not any(value.requires_grad for _, value in detached.items())
    assert torch.equal(detached.r, state.r)


def test_an_unknown_transfer_is_named() -> None:
    prior = Prior(gpytorch_kernel(1.0))
    state = fresh(HippoFeatures(4, 10.0), prior)
    with pytest.raises(ValueError, match=r"method: expected one of \('vfe', 'adf'\), got 'ep'"):
        online.transfer(state, state, prior, "ep")


def test_a_state_does_not_move_with_the_points_that_are_learnt() -> None:
    features = InducingPoints(torch.linspace(0, 5, 6, dtype=torch.float64).unsqueeze(-1), learn=True)
    state = online.initial_state(features, Prior(gpytorch.kernels.RBFKernel().double()))
    before = state.nodes.detach().clone()
    with torch.no_grad():
        features.points.add_(0.7)
    assert torch.equal(state.nodes, before)
