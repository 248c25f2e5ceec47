"""How the memory stretches: horizon policies, capacity, order, and what the memory says of itself."""

import math
import re
import warnings
from itertools import pairwise
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import HippoFeatures, InducingPoints
from gpseq.models import CapacityWarning, StreamingGP
from tests import oracles_streaming as oracle
from tests.oracles_streaming import (
    F64,
    assert_close,
    assert_identical,
    draw,
    functionals,
    gpytorch_kernel,
    snapshot,
    stream,
    variance_of,
)

SINGLE = torch.zeros(1, dtype=F64)


def at_time(time: float) -> Tensor:
    return torch.tensor([time], dtype=F64)


def mean_residual(kernel: oracle.Kernel, features: HippoFeatures, num: int = 400) -> float:
    """Mean over the horizon of the prior variance that the features do not explain, by the oracle."""
    at = torch.linspace(features.start, features.horizon, num, dtype=F64)
    return oracle.residual_variance(kernel, functionals(features), at).mean().item()


def capacity_warnings(model: StreamingGP, times: list[float]) -> list[tuple[float, int, int]]:
    """Horizon, features and features needed, as warned while points arrive one by one."""
    found = []
    for time in times:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.update(at_time(time), SINGLE)
        for warning in caught:
            assert warning.category is CapacityWarning
            assert warning.filename == __file__  # the warning points at the user's line
            numbers = re.match(r"(\d+) features leave .*remembered worse\. (\d+) features would", str(warning.message))
            assert numbers, warning.message
            found.append((model.features.horizon, int(numbers[1]), int(numbers[2])))
    return found


# Policies


@given(
    growth=st.sampled_from([1.01, 1.1, 1.25, 1.5, 2.0, 3.0]),
    horizon=st.sampled_from([0.3, 1.0, 7.0, 10.0]),
    start=st.sampled_from([0.0, -5.0, 1e3]),
    steps=st.integers(1, 25),
    off=st.sampled_from([0.0, 1e-6, 0.3, -1e-6]),
)
def test_the_horizon_grows_by_the_factor_and_no_further(
    growth: float, horizon: float, start: float, steps: int, off: float
) -> None:
    """A jump over many steps lands on the first member of the geometric sequence that reaches the data."""
    model = stream(2, start + horizon, start=start, lengthscale=1e20, horizon_growth=growth)
    last = start + horizon * growth ** (steps + off) if off else start + horizon * growth**steps
    model.update(at_time(last), SINGLE)
    now = model.features.horizon
    ratio = math.log((now - start) / horizon) / math.log(growth)
    assert now >= last
    assert ratio == pytest.approx(round(ratio), abs=1e-6)
    if off != 0 or start == 0:  # seen from another start the data end within rounding of a member: either may do
        assert round(ratio) == steps + (off > 0)


@given(times=st.lists(st.floats(0.0, 60.0), min_size=1, max_size=10), growth=st.sampled_from([1.25, 2.0, None]))
def test_the_horizon_never_shrinks_and_covers_the_data(times: list[float], growth: float | None) -> None:
    model = stream(3, 10.0, lengthscale=1e3, horizon_growth=growth)
    horizons = [10.0]
    for time in times:
        model.update(at_time(time), SINGLE)
        horizons.append(model.features.horizon)
    assert all(before <= after for before, after in pairwise(horizons))
    last = max(10.0, *times)
    steps = 0 if growth is None else math.ceil(round(math.log(last / 10, growth), 9))
    assert horizons[-1] == pytest.approx(last if growth is None else 10 * growth**steps)
    assert model.features.start == 0.0


def test_a_fixed_horizon_refuses_what_lies_beyond() -> None:
    model = stream(12, 10.0, horizon_growth="fixed").update(*draw(10))
    model.update(at_time(10.0), SINGLE)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"x: times up to 10\.5 pass the horizon, which is fixed at 10"):
        model.update(torch.tensor([1.0, 10.5, 3.0], dtype=F64), torch.zeros(3, dtype=F64))
    assert_identical(model, before)
    assert model.features.horizon == 10.0


@pytest.mark.parametrize("growth", [1.25, None])
def test_a_jump_is_as_good_as_many_steps(growth: float | None) -> None:
    """Above capacity, it does not matter by how many changes of basis the horizon got there."""
    x, y = draw(20, 2.0)
    jumped, walked = (stream(40, 2.0, horizon_growth=growth).update(x, y) for _ in range(2))
    jumped.update(at_time(18.0), SINGLE)
    for time in (3.0, 5.0, 8.0, 14.0):
        walked.update(at_time(time), SINGLE, noise=1e12)
    walked.update(at_time(18.0), SINGLE)
    at = torch.linspace(0, 18, 40, dtype=F64)
    with torch.no_grad():
        assert_close(jumped(at).mean, walked(at).mean, 1e-4)
        assert_close(jumped(at).covariance_matrix, walked(at).covariance_matrix, 1e-4)


@pytest.mark.parametrize("transfer", ["vfe", "adf"])
def test_stretching_the_horizon_without_information_keeps_the_past(transfer: str) -> None:
    """One point of infinite noise at a distant time: nothing is learnt, and nothing is forgotten."""
    model = stream(36, 10.0, transfer=transfer).update(*draw(30))
    at = torch.linspace(0, 10, 30, dtype=F64)
    with torch.no_grad():
        before = model(at)
        model.update(at_time(15.0), SINGLE, noise=1e15)
        after = model(at)
    residual = oracle.residual_variance(oracle.rbf(1.0), functionals(model.features), at).max().item()
    assert model.features.horizon == 15.625 and residual < 1e-3
    assert (before.mean - after.mean).abs().max() <= 10 * math.sqrt(residual)
    assert (variance_of(before) - variance_of(after)).abs().max() <= 10 * residual + 1e-6


def test_no_end_to_the_stream() -> None:
    """No maximum length: a thousand doublings of the horizon, and the state has the size that it had."""
    model = stream(3, 1.0, lengthscale=1e300, horizon_growth=2.0)
    size = sum(value.numel() for _, value in model.state.items())
    for exponent in range(0, 900, 60):
        model.update(at_time(2.0**exponent), SINGLE)
        assert model.features.horizon == 2.0**exponent
    assert sum(value.numel() for _, value in model.state.items()) == size
    assert model.state.G.isfinite().all()


def test_times_before_the_start_warn_and_are_used() -> None:
    model = stream(20, 10.0)
    with pytest.warns(UserWarning, match=r"x: times from -0\.5 lie before the start of the memory, 0") as caught:
        model.update(torch.tensor([-0.5, 3.0], dtype=F64), torch.ones(2, dtype=F64))
    assert [warning.filename for warning in caught] == [__file__]  # it points at the user's line
    noise = torch.full((2,), 0.1, dtype=F64)
    data = (torch.tensor([-0.5, 3.0], dtype=F64), torch.ones(2, dtype=F64), noise)
    q, _ = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, functionals(model.features), *data)
    at = torch.tensor([-1.0, -0.2, 3.0], dtype=F64)
    expected = oracle.conditional(oracle.rbf(1.0), oracle.zero, functionals(model.features), q, oracle.at_points(at))
    with torch.no_grad():
        assert_close(model(at).mean, expected.mean, 1e-4)
    assert expected.mean[1] > 0.3
    assert model.features.start == 0.0


# Capacity


def test_a_memory_that_is_large_enough_does_not_warn() -> None:
    model = stream(40, 1.0)
    assert capacity_warnings(model, torch.linspace(0.5, 20.0, 40).tolist()) == []
    assert model.features.horizon >= 20


@pytest.mark.parametrize("growth", [1.25, 1.05, None])
@pytest.mark.parametrize("nu", [None, 1.5])
def test_too_small_a_memory_warns_once_a_doubling(growth: float | None, nu: float | None) -> None:
    """And names a number of features that keeps the residual variance under the tolerance."""
    tolerance = 5e-3
    model = stream(6, 1.0, nu=nu, horizon_growth=growth, tolerance=tolerance)
    found = capacity_warnings(model, torch.linspace(0.5, 20.0, 40).tolist())
    kernel = oracle.rbf(1.0) if nu is None else oracle.matern32(1.0)
    assert 2 <= len(found) <= 5
    assert all(later >= 2 * earlier for (earlier, *_), (later, *_) in pairwise(found))
    assert model.features.horizon < 2 * found[-1][0]
    first = next(h for h in (found[0][0], 1.0) if mean_residual(kernel, HippoFeatures(6, h)) > 0.01)
    assert first == found[0][0]
    for horizon, have, needed in found:
        assert have == 6
        assert mean_residual(kernel, HippoFeatures(needed, horizon)) <= 1.02 * tolerance
        smaller = HippoFeatures(needed - 2, horizon)
        assert mean_residual(kernel, smaller) > tolerance  # and it is not twice what is needed


def test_the_warning_is_not_repeated_by_the_same_horizon() -> None:
    model = stream(4, 4.0, lengthscale=0.5)
    assert len(capacity_warnings(model, [5.0])) == 1
    assert capacity_warnings(model, [4.5, 4.9, 5.0, 0.1]) == []


def test_an_update_that_fails_does_not_use_up_the_warning() -> None:
    """A failed update leaves the model as it was; the next one meets the same small memory."""
    model = stream(4, 4.0, lengthscale=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)
        with pytest.raises(ValueError, match="too large"):
            model.update(at_time(6.0), torch.full((1,), 1e200, dtype=F64))
    assert len(capacity_warnings(model, [6.0])) == 1


def test_fantasies_do_not_use_up_the_warning() -> None:
    model = stream(4, 4.0, lengthscale=0.5)
    with pytest.warns(CapacityWarning):
        model.condition_on_observations(at_time(6.0), SINGLE, extend_horizon=True)
    assert len(capacity_warnings(model, [6.0])) == 1


def test_a_kernel_that_asks_for_more_than_can_be_had() -> None:
    """White-noise-like roughness: there is no number to name, and the message says so."""
    model = stream(8, 1.0, nu=0.5, lengthscale=1e-3, tolerance=1e-6)
    with pytest.warns(CapacityWarning, match=r"More than \d+ features would keep it under"):
        model.update(at_time(1.1), SINGLE)


@pytest.mark.parametrize("nu", [None, 1.5])
def test_max_features_lets_the_memory_grow(nu: float | None) -> None:
    """The order rises with the horizon so that the residual variance stays under the tolerance; no warning, no loss."""
    model = stream(8, 2.0, nu=nu, max_features=200, tolerance=2e-3)
    kernel = oracle.rbf(1.0) if nu is None else oracle.matern32(1.0)
    x, y = draw(60, 12.0)
    x, order = x.sort()
    y = y[order]
    orders = [8]
    for part_x, part_y in zip(x.split(6), y.split(6), strict=True):
        model.update(part_x, part_y)
        orders.append(model.features.num_features)
        if model.features.horizon > 2.0:
            assert mean_residual(kernel, model.features) <= 1.02 * 2e-3
    assert all(before <= after for before, after in pairwise(orders)) and 8 < orders[-1] < 120
    assert model.state.G.shape == (orders[-1], orders[-1])
    at = torch.linspace(0, 12, 40, dtype=F64)
    exact = oracle.exact_gp(kernel, oracle.zero, x, y, torch.full_like(x, 0.1), at)
    with torch.no_grad():
        assert (model(at).mean - exact.mean).abs().max() < 0.1
        assert (variance_of(model(at)) - exact.variance).abs().max() < 0.02


def test_max_features_is_a_maximum() -> None:
    model = stream(4, 2.0, lengthscale=0.3, max_features=7)
    with pytest.warns(CapacityWarning, match="^7 features leave"):
        model.update(at_time(9.0), SINGLE)
    assert model.features.num_features == 7


def test_the_order_is_never_lowered() -> None:
    model = stream(30, 2.0, lengthscale=1.0, max_features=60)
    model.update(at_time(3.0), SINGLE)
    assert model.features.num_features == 30
    model.update(at_time(40.0), SINGLE)
    assert model.features.num_features > 30


# What the memory says of itself


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
@pytest.mark.parametrize("nu", [None, 1.5])
def test_residual_variance(nu: float | None, dtype: torch.dtype) -> None:
    model = stream(9, 10.0, lengthscale=0.7, outputscale=3.0, nu=nu, dtype=dtype)
    kernel = oracle.rbf(0.7, 3.0) if nu is None else oracle.matern32(0.7, 3.0)
    at = torch.linspace(-2, 14, 33, dtype=F64)
    expected = oracle.residual_variance(kernel, functionals(model.features), at)
    assert_close(model.residual_variance(at.to(dtype)), expected, 1e-5)
    assert_close(model.residual_variance(at.to(dtype).unsqueeze(-1)), expected, 1e-5)
    average = model.residual_variance()
    assert average.shape == () and average.dtype == F64
    assert average.item() == pytest.approx(mean_residual(kernel, model.features), rel=0.02)
    before = average.item()
    model.update(*draw(20, dtype=dtype))
    assert model.residual_variance().item() == pytest.approx(before)  # what can be held, not what is known
    model.covar_module.base_kernel.lengthscale = 3.0
    assert model.residual_variance() < 0.1 * before


def test_residual_variance_of_inducing_points_needs_inputs() -> None:
    points = torch.linspace(0, 10, 8, dtype=F64)
    model = stream(InducingPoints(points))
    assert_close(model.residual_variance(points), torch.zeros(8, dtype=F64), 1e-6)
    with pytest.raises(ValueError, match="x: InducingPoints have no horizon to average over"):
        model.residual_variance()
    with pytest.raises(ValueError, match="features: only HippoFeatures have a polynomial picture"):
        model.reconstruct(points)


def test_reconstruction_is_the_posterior_mean_above_capacity() -> None:
    mean = gpytorch.means.LinearMean(1).double()
    mean.weights.data.fill_(0.3)
    model = stream(40, 8.0, mean_module=mean)
    for seed, last in enumerate((8.0, 11.0)):
        model.update(*draw(30, last, seed=seed))
    at = torch.linspace(0.1, 0.95 * model.features.horizon, 50, dtype=F64)
    with torch.no_grad():
        posterior = model(at).mean
    assert posterior.std() > 0.5
    assert (model.reconstruct(at) - posterior).abs().max() < 1e-2
    assert_close(model.reconstruct(at.unsqueeze(-1)), model.reconstruct(at), 1e-12)


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
def test_reconstruction_below_capacity_is_the_projection() -> None:
    """Exactly sum_m E[u_m] g_m(x), with E[u] from the oracle."""
    model = stream(7, 10.0, jitter=0.0)
    x, y = draw(30)
    model.update(x, y)
    noise = torch.full_like(x, 0.1)
    q, _ = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, functionals(model.features), x, y, noise)
    at = torch.linspace(0, 10, 21, dtype=F64)
    basis = np.polynomial.legendre.legvander(2 * at.numpy() / 10 - 1, 6) * np.sqrt(2 * np.arange(7) + 1)
    assert_close(model.reconstruct(at), torch.from_numpy(basis) @ q.mean, 1e-8)


@pytest.mark.parametrize("kind", ["fixed", "growing"])
def test_points_have_no_horizon_to_pass(kind: str) -> None:
    """Inducing points take data anywhere, whatever the policy."""
    options: dict[str, Any] = {"horizon_growth": "fixed"} if kind == "fixed" else {}
    model = stream(InducingPoints(torch.linspace(0, 10, 8, dtype=F64)), **options)
    model.update(*draw(10, 50.0))
    assert model.num_observations == 10


def test_capacity_of_a_batch_is_that_of_its_most_demanding_kernel() -> None:
    model = stream(8, 4.0, lengthscale=torch.tensor([2.0, 0.5]), batch_shape=(2,))
    rough = gpytorch_kernel(0.5)
    found = capacity_warnings(model, [5.0])
    assert len(found) == 1
    assert found[0][2] == HippoFeatures.required(rough, horizon=5.0)
