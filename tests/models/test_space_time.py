"""SpaceTimeStreamingGP: what it says is what the dense model says, whoever reported when, and no cache is stale."""

from __future__ import annotations

import copy
import io
import resource
import warnings
from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.means import ConstantMean, LinearMean
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import CompositeFeatures, HippoFeatures, InducingFeatures, InducingPoints, SelectedPoints
from gpseq.models import CapacityWarning, SpaceTimeStreamingGP, StreamingGP
from gpseq.variational.kronecker import SeparableKernel, grid_inputs
from tests.oracles_streaming import F64, assert_close, assert_identical, snapshot

# Small memories on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

NAN = float("nan")


def places(num: int, seed: int = 1) -> Tensor:
    return 3 * torch.rand(num, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


def readings(num: int, sensors: int, last: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    times = last * torch.rand(num, dtype=F64, generator=generator)
    return times, torch.randn(num, sensors, dtype=F64, generator=generator)


def noise_model(noise: float = 0.125) -> GaussianLikelihood:
    likelihood = GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-12)).double()
    likelihood.noise = noise
    return likelihood


def build(
    time: int | InducingFeatures = 8,
    space: Tensor | None = None,
    sensors: Tensor | None = None,
    jitter: float | None = 0.0,
    **options: Any,
) -> SpaceTimeStreamingGP:
    time_kernel, space_kernel = MaternKernel(1.5).double(), ScaleKernel(MaternKernel(2.5, ard_num_dims=2)).double()
    time_kernel.lengthscale = 1.0
    space_kernel.base_kernel.lengthscale = torch.tensor([[1.0, 2.0]], dtype=F64)
    space_kernel.outputscale = 1.7
    return SpaceTimeStreamingGP(
        HippoFeatures(time, 3.0) if isinstance(time, int) else time,
        places(3) if space is None else space,
        places(5, seed=2) if sensors is None else sensors,
        time_kernel,
        space_kernel,
        options.pop("likelihood", None) or noise_model(),
        jitter=jitter,
        **({"horizon_growth": 1.25} | options),
    )


class Twin:
    """The same stream in a StreamingGP whose memory is the dense product, and which shares all hyperparameters."""

    def __init__(self, model: SpaceTimeStreamingGP) -> None:
        self.model, features = model, model.time_features
        assert isinstance(features, HippoFeatures)
        parts = [
            HippoFeatures(features.num_features, features.horizon, other_inputs=z) for z in model.space_features.nodes()
        ]
        kernel = SeparableKernel(model.time_kernel, model.space_kernel)
        self.dense = StreamingGP(
            CompositeFeatures(parts), kernel, model.likelihood, model.mean_module, model.horizon_growth, jitter=0.0
        )

    def update(self, times: Tensor, y: Tensor, sensors: Tensor | None = None, noise: Any = None) -> None:
        self.model.update(times, y, sensors=sensors, noise=noise, missing="skip")
        where = self.model.sensors if sensors is None else self.model.sensors[sensors]
        if noise is not None:
            noise = torch.as_tensor(noise, dtype=F64).expand(y.shape).reshape(-1)
        self.dense.update(grid_inputs(times.unsqueeze(-1), where), y.reshape(-1), noise=noise, missing="skip")

    @torch.no_grad()
    def check(self, tolerance: float = 1e-9) -> None:
        model, times, where = self.model, torch.linspace(-0.5, 9.0, 5, dtype=F64), places(3, seed=5)
        grid = grid_inputs(times.unsqueeze(-1), where)
        expected, actual = self.dense(grid), model(grid)
        assert_close(actual.mean, expected.mean, tolerance)
        assert_close(actual.covariance_matrix, expected.covariance_matrix, tolerance)
        assert_close(actual.variance, expected.variance, tolerance)
        joint, (mean, variance) = model.grid(times, where), model.marginals(times, where)
        assert_close(joint.covariance_matrix, expected.covariance_matrix, tolerance)
        for m, v in ((mean, variance), (joint.mean, joint.variance)):
            assert_close(m.reshape(-1), expected.mean, tolerance)
            assert_close(v.reshape(-1), expected.variance, tolerance)
        assert_close(model.log_evidence, self.dense.log_evidence, tolerance)
        assert model.num_observations == self.dense.num_observations
        assert_close(model.residual_variance(grid), self.dense.residual_variance(grid), tolerance)


# Equal to the dense model


def test_a_complete_grid_is_one_term_and_the_dense_model() -> None:
    twin = Twin(build())
    twin.check()
    for index, last in enumerate((3.0, 3.0, 5.0, 9.0)):  # the horizon grows twice
        twin.update(*readings(6, 5, last, index))
        assert twin.model.num_terms == 1
        twin.check()
    assert twin.model.time_features.horizon == twin.dense.features.parts[0].horizon > 3 * 1.25**2


def test_everything_at_once_is_the_dense_model() -> None:
    """Gaps, sensors that come and go, every kind of noise, growth, and hyperparameters that change."""
    mean = LinearMean(3).double()
    twin = Twin(build(mean_module=mean))
    model = twin.model
    twin.update(*readings(5, 5))
    times, y = readings(5, 5, 5.0, seed=1)
    y[1, 2], y[3] = NAN, NAN
    twin.update(times, y)
    twin.update(*readings(3, 2, 5.0, seed=2), sensors=torch.tensor([4, 1]))
    twin.check()
    twin.update(*readings(3, 2, 5.0, seed=3), sensors=torch.tensor([1, 4]), noise=0.3)
    twin.update(*readings(3, 5, 6.0, seed=4), noise=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=F64))
    twin.update(*readings(3, 5, 6.0, seed=5), noise=torch.tensor([[0.1], [0.2], [0.1]], dtype=F64))
    twin.update(*readings(3, 5, 6.0, seed=6), noise=torch.rand(3, 5, dtype=F64) + 0.1)
    twin.check()
    assert torch.equal(model.declare(places(2, seed=9)), torch.tensor([5, 6]))
    twin.update(*readings(3, 7, 7.0, seed=7))
    twin.check()
    model.space_kernel.base_kernel.lengthscale = torch.tensor([[1.2, 1.9]], dtype=F64)
    twin.check()
    twin.update(*readings(3, 7, 9.0, seed=8))
    model.time_kernel.lengthscale = 0.8
    with torch.no_grad():
        mean.bias += 0.3
    twin.check()
    twin.update(*readings(3, 7, 9.0, seed=10))
    model.likelihood.noise = 0.05
    twin.update(*readings(3, 7, 9.0, seed=11))
    twin.check()
    for index in range(12):  # spills into the dense rest
        times, y = readings(2, 7, 12.0, seed=20 + index)
        y[torch.rand(2, 7, generator=torch.Generator().manual_seed(index)) < 0.4] = NAN
        twin.update(times, y)
    assert model.information.state.rest.numel()
    model.space_kernel.outputscale = 2.0
    model.time_kernel.lengthscale = 0.9
    twin.check(1e-8)
    twin.update(*readings(2, 7, 20.0, seed=50))
    twin.check(1e-8)


@given(
    seed=st.integers(0, 10**6), gaps=st.floats(0, 0.9), chunk=st.integers(1, 8), growth=st.sampled_from([1.25, None])
)
@settings(max_examples=10)
def test_any_gaps_in_any_chunks_are_the_dense_model(seed: int, gaps: float, chunk: int, growth: float | None) -> None:
    torch.manual_seed(seed)
    twin = Twin(build(5, horizon_growth=growth))
    times, y = readings(8, 5, 6.0, seed)
    y[torch.rand(8, 5) < gaps] = NAN
    for rows in torch.arange(8).split(chunk):
        twin.update(times[rows], y[rows])
    twin.check()


@given(seed=st.integers(0, 10**6), gaps=st.floats(0, 0.9), chunk=st.integers(1, 8))
@settings(max_examples=15)
def test_on_one_basis_neither_chunks_nor_orders_matter(seed: int, gaps: float, chunk: int) -> None:
    torch.manual_seed(seed)
    times, y = readings(10, 5, 3.0, seed)
    y[torch.rand(10, 5) < gaps] = NAN
    whole, parts, shuffled = (build(5, horizon_growth="fixed") for _ in range(3))
    whole.update(times, y, missing="skip")
    for rows in torch.arange(10).split(chunk):
        parts.update(times[rows], y[rows], missing="skip")
    rows, columns = torch.randperm(10), torch.randperm(5)
    shuffled.update(times[rows], y[rows][:, columns], sensors=columns, missing="skip")
    at = torch.linspace(0, 3, 4, dtype=F64)
    for other in (parts, shuffled):
        for a, b in zip(other.marginals(at), whole.marginals(at), strict=True):
            assert_close(a, b, 1e-9)
        assert_close(other.log_evidence, whole.log_evidence, 1e-9)
        assert other.num_observations == whole.num_observations


def test_declaring_sensors_in_another_order_changes_nothing() -> None:
    order, sensors = torch.randperm(5), places(5, seed=2)
    times, y = readings(6, 5)
    one, other = build(sensors=sensors), build(sensors=sensors[order])
    one.update(times, y)
    other.update(times, y[:, order])
    at = torch.linspace(0, 3, 4, dtype=F64)
    for a, b in zip(one.marginals(at, places(2)), other.marginals(at, places(2)), strict=True):
        assert_close(a, b, 1e-10)


def test_ample_memory_is_the_exact_gp() -> None:
    """Points at every time and place: nothing is lost, in one term and in many."""
    sensors, times = places(4, seed=2), torch.linspace(0, 3, 6, dtype=F64)
    y = torch.randn(6, 4, dtype=F64)
    for gaps in (False, True):
        if gaps:
            y[0, 1], y[2], y[4, 2:] = NAN, NAN, NAN
        model = build(InducingPoints(times), sensors, sensors, mean_module=ConstantMean().double())
        for rows in torch.arange(6).split(2):
            model.update(times[rows], y[rows], missing="skip")
        x, flat = grid_inputs(times.unsqueeze(-1), sensors), y.reshape(-1)
        seen = ~flat.isnan()
        K = SeparableKernel(model.time_kernel, model.space_kernel)
        with torch.no_grad():
            C = K(x[seen], x[seen]).to_dense() + 0.125 * torch.eye(int(seen.sum()), dtype=F64)
            at = torch.cat([3 * torch.rand(7, 1, dtype=F64), places(7, seed=8)], dim=-1)
            # Only what lies between the points could be lost, so look at the points.
            cross = K(x, x[seen]).to_dense()
            mean = cross @ torch.linalg.solve(C, flat[seen])
            covariance = K(x, x).to_dense() - cross @ torch.linalg.solve(C, cross.mT)
            posterior = model(x)
            assert_close(posterior.mean, mean, 1e-8)
            assert_close(posterior.covariance_matrix, covariance, 1e-8)
            elsewhere = K(at, x[seen]).to_dense()
            assert_close(model(at).mean, elsewhere @ torch.linalg.solve(C, flat[seen]), 1e-8)
        exact = torch.distributions.MultivariateNormal(torch.zeros(len(C), dtype=F64), C).log_prob(flat[seen])
        assert_close(model.log_evidence, exact, 1e-8)


class Unit(Kernel):
    """k = 1."""

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return x1.new_ones(x1.shape[0] if diag else (x1.shape[-2], x2.shape[-2]))


class Product(Kernel):
    """k(a, b) = a b."""

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return (x1 * x2).sum(-1) if diag else x1 @ x2.mT


def test_two_sensors_of_different_loading_are_two_terms() -> None:
    """Loadings 1 and 2, readings 1 and 1: (1 + 2) / (1 + 1 + 4). The newest H for all of the past says 3 / 9."""
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, 1, dtype=F64)
    where = torch.tensor([[1.0], [2.0]], dtype=F64)
    model, first, second = (
        SpaceTimeStreamingGP(InducingPoints(zero), one, where, Unit(), Product(), noise_model(1.0), jitter=0.0)
        for _ in range(3)
    )
    for sensor, alone in ((0, first), (1, second)):
        for each in (model, alone):
            each.update(zero, one, sensors=torch.tensor([sensor]), noise=1.0)
    mean, variance = model.marginals(zero, one)
    assert mean.item() == pytest.approx(0.5, abs=1e-15)
    assert variance.item() == pytest.approx(1 / 6, abs=1e-15)
    old, new, r = first.information.state, second.information.state, model.information.state.r
    shortcut = (old.temporal[0] + new.temporal[0]) * new.spatial[0]  # accumulated in time, times the newest of space
    assert (r / (1 + shortcut)).item() == pytest.approx(1 / 3, abs=1e-15)


# Odd but allowed data


def test_empty_chunks_and_chunks_without_a_reading_change_nothing() -> None:
    model = build().update(*readings(4, 5))
    before, posterior = snapshot(model), model._known_posterior
    model.update(torch.zeros(0, dtype=F64), torch.zeros(0, 5, dtype=F64))
    far = torch.full((3,), 100.0, dtype=F64)
    model.update(far, torch.full((3, 5), NAN, dtype=F64), missing="skip")
    none = torch.zeros(0, dtype=torch.int64)
    model.update(far, torch.zeros(3, 0, dtype=F64), sensors=none)
    assert_identical(model, before)
    assert model._known_posterior is posterior


def test_rows_without_a_reading_do_not_move_the_horizon() -> None:
    times, y = readings(3, 5)
    one, other = build().update(times, y), build()
    far = torch.cat([times, torch.tensor([50.0], dtype=F64)])
    noise = torch.full((4, 5), 0.125, dtype=F64)
    noise[3] = NAN  # of readings that do not exist
    other.update(far, torch.cat([y, torch.full((1, 5), NAN, dtype=F64)]), noise=noise, missing="skip")
    assert other.time_features.horizon == 3.0 and other.num_terms == 1 and other.num_observations == 15
    assert_close(other.log_evidence, one.log_evidence, 1e-12)


def test_repeated_times_and_repeated_sensors() -> None:
    """Two sensors at one place are two readings of the same value."""
    sensors = places(3, seed=2)[[0, 0, 1]]
    twin = Twin(build(sensors=sensors))
    times = torch.tensor([2.0, 1.0, 2.0, 2.0], dtype=F64)
    twin.update(times, torch.randn(4, 3, dtype=F64))
    twin.check()
    one = build(sensors=sensors)
    one.update(times[:1], torch.ones(1, 2, dtype=F64), sensors=torch.tensor([0, 1]), noise=0.2)
    halved = build(sensors=sensors).update(times[:1], torch.ones(1, 1, dtype=F64), sensors=torch.tensor([0]), noise=0.1)
    for a, b in zip(one.marginals(times), halved.marginals(times), strict=True):
        assert_close(a, b, 1e-12)


def test_repeated_inducing_points_need_jitter() -> None:
    space = places(3)[[0, 1, 1, 2]]
    model = build(space=space, jitter=None).update(*readings(6, 5))
    plain = build(space=places(3), jitter=None).update(*readings(6, 5))
    at = torch.linspace(0, 3, 4, dtype=F64)
    for a, b in zip(model.marginals(at), plain.marginals(at), strict=True):
        assert_close(a, b, 1e-6)


def test_times_before_the_start_are_used_with_a_warning() -> None:
    model = build()
    with pytest.warns(UserWarning, match="before the start"):
        model.update(torch.tensor([-0.5], dtype=F64), torch.ones(1, 5, dtype=F64))
    assert model.num_observations == 5


@pytest.mark.parametrize("sensors, space", [(1, 3), (5, 1), (1, 1)])
def test_one_sensor_or_one_inducing_point(sensors: int, space: int) -> None:
    twin = Twin(build(space=places(space), sensors=places(sensors, seed=2)))
    for index, last in enumerate((3.0, 5.0)):
        twin.update(*readings(4, sensors, last, index))
    assert twin.model.num_terms == 1 and not twin.model.information.state.rest.numel()
    twin.check()
    twin.update(*readings(1, 1), sensors=torch.tensor([0]), noise=0.7)
    twin.check()


def test_far_away_and_beyond_the_horizon_is_the_prior() -> None:
    model = build(sensors=torch.cat([places(4), torch.full((1, 2), 1e6, dtype=F64)])).update(*readings(6, 5))
    for times, where in ((torch.tensor([1.0]), torch.tensor([[1e5, 1e5]])), (torch.tensor([1e4]), torch.ones(1, 2))):
        mean, variance = model.marginals(times, where)
        assert mean.abs().item() < 1e-8
        assert variance.item() == pytest.approx(1.7)


@pytest.mark.parametrize("scale", [1e-8, 1e8, 1e100])
def test_any_unit_of_the_readings(scale: float) -> None:
    times, y = readings(6, 5)
    y[2, 3] = NAN
    plain, scaled = (build().update(times, factor * y, missing="skip") for factor in (1.0, scale))
    at = torch.linspace(0, 3, 4, dtype=F64)
    assert_close(scaled.marginals(at)[0] / scale, plain.marginals(at)[0], 1e-10)


@pytest.mark.parametrize("noise", [1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize("repeated", [False, True])
def test_next_to_no_noise(noise: float, repeated: bool) -> None:
    """One term or several; sensors in one place make everything singular."""
    sensors = places(5, seed=2)[:1].repeat(5, 1) if repeated else places(5, seed=2)
    model = build(sensors=sensors, jitter=None)
    for index in range(3):
        times, y = readings(8, 1, seed=index)
        y = times.sin().unsqueeze(-1).repeat(1, 5)
        y[0, index] = NAN
        model.update(times, y, noise=noise, missing="skip")
        mean, variance = model.marginals(torch.linspace(0, 3, 5, dtype=F64), places(4))
        assert mean.abs().max() < 100 and variance.min() >= 0 and variance.max() <= 1.7 + 1e-9
        posterior = model(grid_inputs(times.unsqueeze(-1), sensors))
        assert posterior.variance.min() > -1e-12 and posterior.mean.isfinite().all()
        assert model.log_evidence.isfinite()


def test_fixed_noise() -> None:
    likelihood = FixedNoiseGaussianLikelihood(torch.full((1,), 0.3, dtype=F64))
    times, y = readings(4, 5)
    noise = torch.rand(4, 5, dtype=F64) + 0.1
    one, other = build(likelihood=likelihood).update(times, y, noise=noise), build().update(times, y, noise=noise)
    assert torch.equal(one.log_evidence, other.log_evidence)
    with pytest.raises(ValueError, match=r"^noise: .*needs the noise variance"):
        one.update(times, y)


# Predictions


def test_variances_of_many_points_take_little_memory() -> None:
    model = build().update(*readings(4, 5))
    x = torch.cat([3 * torch.rand(20_000, 1, dtype=F64), 3 * torch.rand(20_000, 2, dtype=F64)], dim=-1)
    with torch.no_grad():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        posterior = model(x)
        variance = posterior.variance
        noisy = model.likelihood(posterior).variance
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400_000  # kB; n x n numbers are 3 GB
    assert_close(noisy, variance + 0.125, 1e-12)
    assert_close(model(x[:50]).covariance_matrix.diagonal(), variance[:50], 1e-12)
    assert_close(model(x, prior=True).variance, model.space_kernel.outputscale.detach().expand(20_000), 1e-12)


def test_likelihoods_samples_and_slices_of_predictions() -> None:
    model = build().update(*readings(4, 5))
    joint = model.grid(torch.linspace(0, 3, 6, dtype=F64), places(2))
    assert joint.rsample(torch.Size([4])).shape == (4, 6, 2)
    assert joint.log_prob(joint.mean).isfinite()
    noise = MultitaskGaussianLikelihood(2, has_task_noise=False).double()
    noise.noise = 0.125
    assert_close(noise(joint).variance, joint.variance + 0.125, 1e-10)
    assert_close(joint[2:4].mean, joint.mean[2:4], 1e-12)
    assert joint.expand(torch.Size([3])).variance.shape == (3, 6, 2)
    x = torch.cat([torch.rand(6, 1, dtype=F64), places(6)], dim=-1)
    assert model(x).rsample(torch.Size([4])).shape == (4, 6)
    assert model.likelihood(model(x)).log_prob(torch.zeros(6, dtype=F64)).isfinite()
    assert model(x).expand(torch.Size([2])).covariance_matrix.shape == (2, 6, 6)
    draws = joint.rsample(torch.Size([20_000])).reshape(20_000, -1)
    assert_close(draws.mT.cov(), joint.covariance_matrix, 0.08)


@pytest.mark.parametrize("terms", [1, 2])
def test_gradients_reach_the_inputs(terms: int) -> None:
    model = build().update(*readings(4, 5))
    if terms > 1:
        model.update(*readings(1, 2), sensors=torch.tensor([0, 3]))
    x = torch.cat([3 * torch.rand(3, 1, dtype=F64), places(3)], dim=-1).requires_grad_()
    with torch.no_grad():
        model(x.detach())  # a cache without a graph must not take it away

    assert torch.autograd.gradcheck(lambda x: model(x).mean, (x,))
    assert torch.autograd.gradcheck(lambda x: model(x).variance, (x,))
    t, s = torch.rand(2, dtype=F64, requires_grad=True), places(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, s: model.marginals(t, s), (t, s))
    assert all(p.grad is None for p in model.parameters())


def test_float32_is_rounded_once() -> None:
    times, y = readings(8, 5, 5.0)
    y[2, 1] = NAN
    exact, single = build(jitter=None), build(jitter=None).float()
    exact.load_state_dict(single.state_dict())
    exact.update(times, y, missing="skip")
    single.update(times.float(), y.float(), missing="skip")
    at = torch.linspace(0, 5, 6, dtype=F64)
    for a, b in zip(single.marginals(at.float(), places(2).float()), exact.marginals(at, places(2)), strict=True):
        assert a.dtype == torch.float32
        assert_close(a.double(), b, 1e-4)
    x = torch.cat([at.unsqueeze(-1), places(6)], dim=-1)
    posterior = single(x.float())
    assert posterior.mean.dtype == posterior.covariance_matrix.dtype == posterior.variance.dtype == torch.float32
    assert_close(posterior.covariance_matrix.double(), exact(x).covariance_matrix, 1e-4)
    assert_close(single.log_evidence, exact.log_evidence, 1e-3)


@pytest.mark.parametrize("cast", ["float", "double", "half", "to", "cpu"])
def test_casts_leave_the_state_in_float64(cast: str) -> None:
    model = build().update(*readings(4, 5))
    before = {name: value.clone() for part in ("time_basis", "space_basis", "information")
              for name, value in getattr(model, part).state_dict(prefix=part).items()}  # fmt: skip
    cast_model = model.to(torch.float32) if cast == "to" else getattr(model, cast)()
    now = {name: value for part in ("time_basis", "space_basis", "information")
           for name, value in getattr(cast_model, part).state_dict(prefix=part).items()}  # fmt: skip
    assert before.keys() == now.keys()
    assert all(now[name].dtype == value.dtype and torch.equal(now[name], value) for name, value in before.items())


def test_training_mode_makes_no_difference() -> None:
    model, at = build(), torch.linspace(0, 3, 4, dtype=F64)
    x = grid_inputs(at.unsqueeze(-1), model.sensors)
    for mode in (True, False):
        model.train(mode)
        model.update(*readings(4, 5))
        assert_close(model(x).mean, model.marginals(at)[0].reshape(-1), 1e-12)
    assert model.num_observations == 40


# No stale cache


def fresh(model: SpaceTimeStreamingGP) -> tuple[Tensor, Tensor]:
    """What a copy that has never predicted says."""
    twin = copy.deepcopy(model)
    twin._known_posterior = None
    return twin.marginals(torch.linspace(0, 3, 4, dtype=F64), places(2))


def swap_mean(model: SpaceTimeStreamingGP) -> None:
    model.mean_module = LinearMean(3).double()


def swap_kernel(model: SpaceTimeStreamingGP) -> None:
    kernel = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
    kernel.load_state_dict(model.space_kernel.state_dict())
    model.space_kernel = kernel


def in_place(model: SpaceTimeStreamingGP) -> None:
    with torch.no_grad():
        model.time_kernel.raw_lengthscale += 0.5


CHANGES: dict[str, Callable[[SpaceTimeStreamingGP], Any]] = {
    "update": lambda m: m.update(*readings(2, 5, seed=7)),
    "growth": lambda m: m.update(*readings(2, 5, 9.0, seed=7)),
    "subset": lambda m: m.update(*readings(2, 2, seed=7), sensors=torch.tensor([1, 3])),
    "load": lambda m: m.load_state_dict(build().update(*readings(6, 5, seed=8)).state_dict()),
    "time": lambda m: setattr(m.time_kernel, "lengthscale", 0.5),
    "in place": in_place,
    "space": lambda m: setattr(m.space_kernel, "outputscale", 0.5),
    "mean": lambda m: m.mean_module.initialize(constant=3.0),
    "other mean": swap_mean,
    "other kernel": swap_kernel,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_prediction_is_never_stale(change: Callable[[SpaceTimeStreamingGP], Any]) -> None:
    model = build(mean_module=ConstantMean().double()).update(*readings(4, 5))
    at = torch.linspace(0, 3, 4, dtype=F64), places(2)
    if change is CHANGES["load"]:
        model.load_state_dict(snapshot(model))
        other = build(mean_module=ConstantMean().double()).update(*readings(6, 5, seed=8))
        before = model.marginals(*at)[0]
        model.load_state_dict(other.state_dict())
    else:
        before = model.marginals(*at)[0]
        change(model)
    after = model.marginals(*at)
    assert (after[0] - before).abs().max() > 1e-4
    for a, b in zip(after, fresh(model), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.grid(*at).mean, after[0])


def test_a_kernel_without_parameters_may_be_replaced() -> None:
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, 1, dtype=F64)
    where = torch.tensor([[1.0], [2.0]], dtype=F64)
    model = SpaceTimeStreamingGP(InducingPoints(zero), one, where, Unit(), Product(), noise_model(1.0), jitter=0.0)
    model.update(zero, torch.ones(1, 2, dtype=F64))
    model.space_kernel = Unit()
    # The old information, 3 v - 5 v^2 / 2, is now one of a function that is the same everywhere.
    mean, variance = model.marginals(zero, 7 * one)
    assert mean.item() == pytest.approx(0.5) and variance.item() == pytest.approx(1 / 6)


def test_the_posterior_is_computed_once_for_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, at = build().update(*readings(4, 5)), torch.zeros(1, dtype=F64)
    model.marginals(at)
    monkeypatch.setattr("gpseq.models.space_time.posterior", lambda state: pytest.fail("computed again"))
    model.grid(at)
    model.declare(places(1))
    assert model.marginals(at)[0].shape == (1, 6)
    assert model.log_evidence.isfinite()


def test_inference_mode_leaves_a_model_that_can_be_used() -> None:
    times, y = readings(4, 5)
    with torch.inference_mode():
        sensors = places(5, seed=2).clone()
        late_times, late_y = times.clone(), y.clone()
    model = build(sensors=sensors)
    with torch.inference_mode():
        model.update(late_times, late_y)
        model.declare(places(1))
        model.marginals(late_times)
    assert not any(value.is_inference() for value in model.state_dict().values())
    model.load_state_dict(snapshot(model))
    x = grid_inputs(times.unsqueeze(-1), places(1)).requires_grad_()
    model(x).mean.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_the_callers_tensors_are_copied() -> None:
    sensors, space = places(5, seed=2), places(3)
    features = HippoFeatures(8, 3.0)
    model = build(features, space, sensors)
    before = snapshot(model)
    for tensor in (sensors, space):
        tensor.zero_()
    assert_identical(model, before)
    model.update(*readings(3, 5, 9.0))
    assert features.horizon == 3.0


# Saving, copying


def filled(spilled: bool = False) -> SpaceTimeStreamingGP:
    model = build().update(*readings(4, 5, 5.0))
    model.declare(places(2, seed=4))
    model.update(*readings(2, 2, 6.0, seed=1), sensors=torch.tensor([6, 0]))
    if spilled:
        for index in range(12):
            model.update(*readings(1, 7, 6.0, seed=index), noise=0.1 + 0.01 * index)
        assert model.information.state.rest.numel()
    return model


@pytest.mark.parametrize("spilled", [False, True])
def test_a_fresh_model_resumes_where_a_saved_one_stopped(spilled: bool) -> None:
    model, resumed, buffer = filled(spilled), build(6, places(2)), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert_identical(resumed, snapshot(model))
    at = torch.linspace(0, 9, 5, dtype=F64)
    for step in range(2):
        for a, b in zip(resumed.marginals(at), model.marginals(at), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(resumed.log_evidence, model.log_evidence)
        assert resumed.num_terms == model.num_terms and resumed.num_observations == model.num_observations
        for each in (resumed, model):
            each.update(*readings(3, 7, 9.0, seed=30 + step))


def test_conditioning_and_copies_leave_the_model_as_it_was() -> None:
    model = filled()
    before, state = snapshot(model), model.state
    values = {name: value.clone() for name, value in state.information.items()}
    model.marginals(torch.zeros(1, dtype=F64))
    new = model.condition_on_observations(*readings(3, 7, 12.0, seed=9))
    assert type(new) is type(model) and new.num_observations == model.num_observations + 21
    twin = copy.deepcopy(model)
    twin.update(*readings(3, 7, 12.0, seed=9))
    twin.space_kernel.outputscale = 9.0
    twin.declare(places(1))
    assert_identical(model, before)
    assert all(torch.equal(getattr(state.information, name), value) for name, value in values.items())
    model.update(*readings(3, 7, 12.0, seed=9))
    assert_identical(model, snapshot(new))


# Memory


def test_memory_is_bounded_whatever_the_patterns() -> None:
    model, generator = build(6, places(4), places(12, seed=2)), torch.Generator().manual_seed(0)
    size = (6 * 4) ** 2
    most = 0
    for index in range(200):
        times, y = readings(1 + index % 3, 12, 3.0 + index / 20, seed=index)
        y[torch.rand(y.shape, generator=generator) < 0.4] = NAN
        model.update(times, y, missing="skip")
        value = model.information.state
        most = max(most, value.temporal.numel() + value.spatial.numel() + value.rest.numel())
    assert size < most <= 2 * size
    assert model.information.state.weights.numel() <= 12 * model.num_terms


def test_the_capacity_warning_comes_once() -> None:
    model = build(3)
    with pytest.warns(CapacityWarning, match="3 features leave"):
        model.update(*readings(4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.update(*readings(4, 5, 4.0))
        resumed = build(3)
        resumed.load_state_dict(model.state_dict())
        resumed.update(*readings(4, 5, 4.0))
    with pytest.warns(CapacityWarning):
        model.update(torch.full((1,), 20.0, dtype=F64), torch.zeros(1, 5, dtype=F64))


def test_residual_variance_over_the_horizon() -> None:
    coarse, fine = build(3).update(*readings(3, 5)), build(40).update(*readings(3, 5))
    assert 0 < fine.residual_variance() < coarse.residual_variance() < 1
    with pytest.raises(ValueError, match=r"^x: .*no horizon"):
        build(InducingPoints(torch.zeros(1, dtype=F64))).residual_variance()


# Errors: the message names the argument, and nothing has changed

ROW = torch.zeros(1, dtype=F64), torch.zeros(1, 5, dtype=F64)

BAD_UPDATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "never declared": (
        {"sensors": torch.tensor([0, 1, 2, 3, 5])},
        ValueError,
        r"^sensors: .*5 declared.*got 5.*declare",
    ),
    "negative": ({"sensors": torch.tensor([0, 1, 2, 3, -1])}, ValueError, r"^sensors: .*got -1"),
    "twice": ({"sensors": torch.tensor([0, 1, 2, 3, 3])}, ValueError, "^sensors: .*distinct"),
    "a mask": ({"sensors": torch.ones(5, dtype=torch.bool)}, TypeError, r"^sensors: .*torch\.bool"),
    "floats": ({"sensors": torch.arange(5.0)}, TypeError, "^sensors: "),
    "a list of names": ({"sensors": ["a", "b"]}, TypeError, r"^sensors: expected indices, got \['a', 'b'\]"),
    "a NaN among the times": ({"times": torch.tensor([NAN])}, ValueError, "^times: expected finite"),
    "a matrix of indices": ({"sensors": torch.arange(5).unsqueeze(0)}, ValueError, r"^sensors: .*\(1, 5\)"),
    "too few": ({"sensors": torch.arange(4)}, ValueError, r"^y: expected shape \(1, 4\).*\(1, 5\)"),
    "columns": ({"y": torch.zeros(1, 4, dtype=F64)}, ValueError, r"^y: expected shape \(1, 5\)"),
    "rows": ({"y": torch.zeros(2, 5, dtype=F64)}, ValueError, r"^y: expected shape \(1, 5\)"),
    "a vector": ({"y": torch.zeros(5, dtype=F64)}, ValueError, "^y: "),
    "integers": ({"y": torch.zeros(1, 5, dtype=torch.int64)}, TypeError, "^y: "),
    "NaN": ({"y": torch.full((1, 5), NAN)}, ValueError, "^y: .*missing='skip'"),
    "infinite": ({"y": torch.full((1, 5), torch.inf), "missing": "skip"}, ValueError, "^y: "),
    "too large": ({"y": torch.full((1, 5), 1e200, dtype=F64)}, ValueError, "^y: .*too large"),
    "missing": ({"missing": "drop"}, ValueError, "^missing: "),
    "two columns of time": ({"times": torch.zeros(1, 2)}, ValueError, r"^times: .*\(1, 2\)"),
    "one time": ({"times": torch.tensor(0.0)}, ValueError, "^times: "),
    "whole times": ({"times": torch.zeros(1, dtype=torch.int64)}, TypeError, "^times: "),
    "NaN time": ({"times": torch.tensor([NAN])}, ValueError, "^times: "),
    "past the end": ({"times": torch.tensor([3.5])}, ValueError, "pass the horizon"),
    "no noise": ({"noise": 0.0}, ValueError, "^noise: "),
    "negative noise": ({"noise": -0.1}, ValueError, "^noise: "),
    "NaN noise": ({"noise": torch.full((1, 5), NAN)}, ValueError, "^noise: "),
    "noise for others": ({"noise": torch.ones(4)}, ValueError, "^noise: "),
    "more noise": ({"noise": torch.ones(3, 5)}, ValueError, r"^noise: .*\(3, 5\)"),
    "noise in three dimensions": ({"noise": torch.ones(2, 1, 5)}, ValueError, r"^noise: .*\(2, 1, 5\)"),
    "noise that float64 cannot bear": ({"noise": 1e-308}, ValueError, "noise"),
}


@pytest.mark.parametrize("bad, error, message", BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
def test_an_update_that_raises_changes_nothing(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build(horizon_growth="fixed").update(*readings(3, 5))
    before, modules = snapshot(model), model._modules_of_basis
    with pytest.raises(error, match=message):
        model.update(**{"times": ROW[0], "y": ROW[1], **bad})
    assert_identical(model, before)
    assert model._modules_of_basis is modules
    assert model.update(*ROW).num_observations == 20


@pytest.mark.parametrize(
    "bad, error",
    [
        (torch.zeros(2, 3, dtype=F64), ValueError),
        (torch.zeros(2, dtype=F64), ValueError),
        (torch.full((1, 2), NAN), ValueError),
        (torch.zeros(1, 2, dtype=torch.int64), TypeError),
        ([[0.0, 0.0]], TypeError),
    ],
)
def test_bad_places(bad: Any, error: type[Exception]) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=r"^sensors: "):
        model.declare(bad)
    with pytest.raises(error, match=r"^locations: "):
        model.marginals(torch.zeros(1), bad)
    with pytest.raises(error, match=r"^sensors: "):
        build(sensors=bad)
    assert_identical(model, before)


BAD_MODELS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "forgets": (
        {"time": HippoFeatures(8, 3.0, measure="legt", window=1.0)},
        ValueError,
        "^time_features: .*couple time and space",
    ),
    "selects": ({"time": SelectedPoints(8, num_dims=1)}, ValueError, "^time_features: "),
    "two columns": ({"time": InducingPoints(torch.zeros(3, 2))}, ValueError, "^time_features: .*one column, got 2"),
    "a number": ({"space": 3}, TypeError, "^space_features: .*int"),
    "batch of points": ({"space": torch.rand(2, 3, 2)}, ValueError, r"^space_features: .*batch of \(2,\)"),
    "batch of times": ({"time": InducingPoints(torch.rand(2, 3, 1))}, ValueError, "^time_features: .*batch"),
    "no sensors": ({"sensors": torch.zeros(0, 2)}, ValueError, "^sensors: .*at least one"),
    "Poisson": ({"likelihood": gpytorch.likelihoods.BernoulliLikelihood()}, TypeError, "^likelihood: .*Gaussian"),
    "tasks": ({"likelihood": MultitaskGaussianLikelihood(2)}, TypeError, "^likelihood: "),
    "batch of noise": ({"likelihood": GaussianLikelihood(batch_shape=torch.Size([5]))}, ValueError, "^likelihood: "),
    "batch of means": ({"mean_module": ConstantMean(batch_shape=torch.Size([2]))}, ValueError, "^mean_module: "),
    "no mean": ({"mean_module": RBFKernel()}, TypeError, "^mean_module: "),
    "growth": ({"horizon_growth": 0.9}, ValueError, "^horizon_growth: "),
    "jitter": ({"jitter": -1.0}, ValueError, "^jitter: "),
}


@pytest.mark.parametrize("bad, error, message", BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_model_that_cannot_be(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**bad)


@pytest.mark.parametrize("name", ["time_kernel", "space_kernel"])
def test_kernels_of_the_wrong_kind(name: str) -> None:
    kernels: dict[str, Any] = {"time_kernel": RBFKernel(), "space_kernel": RBFKernel()}
    for bad, error in ((RBFKernel(batch_shape=torch.Size([2])), ValueError), (ConstantMean(), TypeError)):
        arguments = kernels | {name: bad}
        with pytest.raises(error, match=rf"^{name}: "):
            SpaceTimeStreamingGP(HippoFeatures(4, 1.0), places(2), places(2), likelihood=noise_model(), **arguments)


def test_bad_inputs_of_predictions() -> None:
    model = build()
    for bad in (torch.zeros(3), torch.zeros(3, 2), torch.zeros(2, 3, 3)):
        with pytest.raises(ValueError, match=r"^x: "):
            model(bad)
        with pytest.raises(ValueError, match=r"^x: "):
            model.residual_variance(bad)
    for bad in (torch.zeros(3, 2), torch.tensor(0.0)):
        for method in (model.marginals, model.grid):
            with pytest.raises(ValueError, match=r"^times: "):
                method(bad)
    with pytest.raises(TypeError, match=r"^times: "):
        model.marginals([0.0])


# What a review found


def test_indices_of_sensors_may_be_a_list() -> None:
    times, y = readings(4, 2)
    listed, tensor = build().update(times, y, sensors=[3, 1]), build().update(times, y, sensors=torch.tensor([3, 1]))
    assert_identical(listed, snapshot(tensor))


def test_features_of_space_that_follow_a_stream_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^space_features: SelectedPoints .*select_points"):
        build(space=SelectedPoints(5, 2))
    with pytest.raises(ValueError, match=r"^sensors: expected 2 columns, as space_features have, got shape \(5, 3\)"):
        build(sensors=torch.zeros(5, 3))


@pytest.mark.filterwarnings("default::gpseq.models.CapacityWarning")
def test_capacity_is_judged_in_space_and_after_a_change_of_hyperparameters() -> None:
    with pytest.warns(CapacityWarning, match="3 features of space leave [0-9.]+% of the prior variance at the sensors"):
        build(time=20).update(*readings(3, 5))
    everywhere = places(5, seed=2)
    model = build(time=24, space=everywhere, jitter=None)
    model.time_kernel.lengthscale = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", CapacityWarning)
        model.update(*readings(3, 5))
        model.update(*readings(3, 5))
    model.time_kernel.lengthscale = 0.05
    with pytest.warns(CapacityWarning, match="24 features leave"):
        model.update(*readings(3, 5))


def test_many_sensors_count_as_memory() -> None:
    model = build(time=4, space=places(4), sensors=places(3000))
    bound = 2 * (4 * 4) ** 2 + 3000 * 2  # and where they are
    for seed in range(12):
        times, y = readings(1, 3000, seed=seed)
        y[0, torch.randperm(3000)[:40]] = NAN
        model.update(times, y, missing="skip")
        numbers = sum(tensor.numel() for _, tensor in model.state.information.items())
        assert numbers < bound + 3000 + 100  # and at least one set of sensors


def test_changed_hyperparameters_are_carried_and_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpseq.models import space_time

    model, calls = build().update(*readings(5, 5)), []
    posterior, transfer = space_time.posterior, space_time.kronecker.transfer
    monkeypatch.setattr(space_time, "posterior", lambda state: calls.append("factor") or posterior(state))
    monkeypatch.setattr(space_time.kronecker, "transfer", lambda *a: calls.append("carry") or transfer(*a))
    model.time_kernel.lengthscale = 0.7
    at = torch.tensor([1.0, 2.0], dtype=F64)
    first = model.marginals(at)
    for _ in range(3):
        assert torch.equal(model.marginals(at)[0], first[0])
    assert calls == ["carry", "factor"]
    model.time_kernel.lengthscale = 0.8  # never stale
    assert not torch.equal(model.marginals(at)[0], first[0])
    model.update(*readings(2, 5, seed=4))
    calls.clear()
    assert not torch.equal(model.marginals(at)[0], first[0])
    assert calls == ["factor"]
    model.time_kernel = RBFKernel().double()
    model.time_kernel.lengthscale = 0.8
    assert calls == ["factor"] and not torch.equal(model.marginals(at)[1], first[1])
    assert calls == ["factor", "carry", "factor"]
    before = model.marginals(at)[1]
    model.mean_module.add_module("more", torch.nn.Identity())  # the same modules and one more
    assert torch.equal(model.marginals(at)[1], before)


def test_conditioning_shares_what_it_does_not_change() -> None:
    model = build().update(*readings(5, 5))
    model.marginals(torch.tensor([1.0], dtype=F64))
    new = model.condition_on_observations(torch.zeros(0, dtype=F64), torch.zeros(0, 5, dtype=F64))
    assert all(
        mine is theirs
        for (_, mine), (_, theirs) in zip(model.state.information.items(), new.state.information.items(), strict=True)
    )
    before = snapshot(model)
    new.update(*readings(2, 5, seed=3)).time_kernel.lengthscale = 3.0
    assert_identical(model, before)


@pytest.mark.parametrize("name", ["num_starts", "max_iterations"])
def test_a_search_needs_a_start_and_a_step(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        build().fit_hyperparameters(*readings(5, 5), **{name: 0})
