"""Streams whose memory is of the recent past, and memories that grow as they are asked for more."""

import warnings
from itertools import pairwise
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, RBFKernel

from gpseq.features import HippoFeatures
from gpseq.models import CapacityWarning, StreamingGP
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_close, draw, gpytorch_kernel, variance_of

#: Features and window with which each measure holds an RBF kernel of lengthscale 1 on [0, 4].
ENOUGH = {"legt": (20, 5.0), "lagt": (40, 1.5), "fout": (61, 8.0)}
SLIDING = tuple(ENOUGH)


def sliding(measure: str, horizon: float, **options: float) -> HippoFeatures:
    order, window = ENOUGH[measure]
    return HippoFeatures(
        int(options.get("order", order)), horizon, measure=measure, window=options.get("window", window)
    )


def stream(features: HippoFeatures | int, *place: float, **options: Any) -> StreamingGP:
    """As the oracles', but what leaves a window is let go of by matching moments."""
    if isinstance(features, HippoFeatures) and features.window is not None:
        options.setdefault("transfer", "adf")
    return oracle.stream(features, *place, **options)


# Inside the window


@pytest.mark.parametrize("measure", SLIDING)
def test_a_window_that_holds_everything_is_the_exact_gp(measure: str) -> None:
    model, xs, ys = stream(sliding(measure, 1.0)), [], []
    for i in range(4):
        x, y = draw(10, i + 1.0, float(i), seed=i)
        model.update(x, y)
        assert model.features.horizon == max(torch.cat([*xs, x]).max().item(), 1.0)
        xs.append(x)
        ys.append(y)
    x, y = torch.cat(xs), torch.cat(ys)
    at = torch.linspace(0.5, 4, 15, dtype=F64)
    expected = oracle.exact_gp(oracle.rbf(), oracle.zero, x, y, torch.full_like(x, 0.1), at)
    oracle.assert_posterior(model, expected, at, {"legt": 1e-5, "lagt": 3e-2, "fout": 3e-2}[measure])


#: What leaves a window takes its old factor with it: "vfe" lets that factor speak of what is still inside instead.


@pytest.mark.parametrize("transfer", [None, "adf"])
@pytest.mark.parametrize("measure", SLIDING)
def test_forecasts_need_the_recent_past_only(measure: str, transfer: str) -> None:
    """After many windows a forecast is that of the exact GP on all data: what was forgotten did not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stream(sliding(measure, 1.0), transfer=transfer)
    x, y = draw(300, 30.0)
    x, order = x.sort()
    y = y[order]
    for a, b in zip(x.split(6), y.split(6), strict=True):
        model.update(a, b)
    at = x[-1] + torch.linspace(0, 2, 9, dtype=F64)
    expected = oracle.exact_gp(oracle.rbf(), oracle.zero, x, y, torch.full_like(x, 0.1), at)
    oracle.assert_posterior(model, expected, at, {"legt": 2e-2, "lagt": 6e-2, "fout": 2e-2}[measure])


@pytest.mark.parametrize("measure", SLIDING)
def test_what_the_window_leaves_is_forgotten(measure: str) -> None:
    """At a time long gone the variance returns to that of the prior, and the mean to nothing."""
    model = stream(sliding(measure, 2.0, window=2.0 if measure != "lagt" else 0.7))
    x = torch.linspace(0, 2, 20, dtype=F64)
    at = torch.tensor([1.0], dtype=F64)
    model.update(x, 2.0 + x.sin())
    known = [variance_of(model(at)).item()]
    for i in range(30):
        later = 2.0 + i + torch.linspace(0.1, 1, 10, dtype=F64)
        model.update(later, 2.0 + later.sin())
        known.append(variance_of(model(at)).item())
    assert known[0] < 0.05 and known[-1] > 0.95
    assert model(at).mean.abs().item() < 0.2
    assert all(0 <= v <= 1 + 1e-9 for v in known)
    # Close by nothing is lost.
    assert variance_of(model(torch.tensor([31.0], dtype=F64))).item() < 0.05


@pytest.mark.parametrize("measure", SLIDING)
@pytest.mark.parametrize("growth", [1.25, None, 3.0])
def test_every_update_moves_the_window(measure: str, growth: float | None) -> None:
    model = stream(sliding(measure, 0.5), horizon_growth=growth)
    window = model.features.window
    for time in (0.7, 0.75, 2.0, 1.0, 2.0, 9.0):
        before = model.features
        model.update(torch.tensor([time], dtype=F64), torch.zeros(1, dtype=F64))
        assert model.features.horizon == max(before.horizon, time)
        assert (model.features is before) == (time <= before.horizon)
        assert model.features.window == window and model.features.measure == measure
        assert torch.equal(model.state.nodes, model.features.nodes())


@pytest.mark.parametrize("measure", SLIDING)
def test_fixed_refuses(measure: str) -> None:
    model = stream(sliding(measure, 2.0), horizon_growth="fixed")
    model.update(*draw(5, 2.0))
    before = oracle.snapshot(model)
    with pytest.raises(ValueError, match=r"x: times up to 2\.5 pass the horizon, which is fixed at 2"):
        model.update(torch.tensor([2.5], dtype=F64), torch.zeros(1, dtype=F64))
    oracle.assert_identical(model, before)
    model.update(torch.tensor([2.0, -1.0], dtype=F64), torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("measure", SLIDING)
def test_late_data_count_inside_the_window(measure: str) -> None:
    """Old observations that arrive late are used, as far as the window still sees their time."""
    x, y = draw(24, 4.0)
    at = torch.linspace(0.5, 4, 9, dtype=F64)
    one, other = stream(sliding(measure, 4.0)), stream(sliding(measure, 4.0))
    one.update(x, y)
    for part in (x > 2, x <= 2):
        other.update(x[part], y[part])
    assert_close(other(at).mean, one(at).mean, 1e-8)
    assert_close(other(at).covariance_matrix, one(at).covariance_matrix, 1e-8)


@pytest.mark.parametrize("measure", SLIDING)
def test_two_hundred_updates(measure: str) -> None:
    model = stream(sliding(measure, 0.5), noise=0.05)
    size = sum(tensor.numel() for _, tensor in model.state.items())
    errors = []
    for i in range(200):
        x = 0.5 * i + torch.linspace(0.1, 0.5, 5, dtype=F64)
        y = (1.1 * x).sin()
        if i % 3 == 0:
            errors.append((model(x[:1]).mean - y[0]).abs().item())
        model.update(x, y)
    assert model.features.horizon == 100.0 and model.num_observations == 1000
    assert sum(tensor.numel() for _, tensor in model.state.items()) == size
    assert all(tensor.isfinite().all() for name, tensor in model.state.items() if name != "hyperparameters")
    assert model.log_evidence.isfinite()
    at = torch.linspace(98, 100, 9, dtype=F64)
    variance = variance_of(model(at))
    assert (variance > 0).all() and (variance < 0.1).all()
    assert (model(at).mean - (1.1 * at).sin()).abs().max() < 0.15
    # Forecasts of half a lengthscale are as good at the end as they were after a few windows.
    assert max(errors[50:]) < 1.5 * max(errors[10:20]) + 0.02


# Capacity


@pytest.mark.parametrize("measure", SLIDING)
def test_a_window_that_is_too_rough_is_said_once(measure: str) -> None:
    """The covered part grows to the window and then stays: a warning at most each time that it has doubled."""
    window, lengthscale = (4.0, 0.1) if measure != "lagt" else (4 / 3, 0.4)
    model = stream(sliding(measure, 0.5, order=6, window=window), lengthscale=lengthscale)
    lengths = []
    for i in range(60):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.update(torch.tensor([0.5 * (i + 1)], dtype=F64), torch.zeros(1, dtype=F64))
        for warning in caught:
            assert warning.category is CapacityWarning and warning.filename == __file__
            start, end = model.features.interval
            lengths.append(end - start)
    assert 1 <= len(lengths) <= 4
    assert all(b >= 2 * a for a, b in pairwise(lengths))


@pytest.mark.parametrize("measure", SLIDING)
def test_a_window_that_is_large_enough_is_not_judged_by_its_age(measure: str) -> None:
    model = stream(sliding(measure, 0.5))  # warnings are errors
    for i in range(40):
        model.update(torch.tensor([0.5 * (i + 1)], dtype=F64), torch.zeros(1, dtype=F64))
        assert model.residual_variance() < 0.01


# Orders that grow


def growing(kernel: Kernel, features: HippoFeatures, tolerance: float, **options: Any) -> StreamingGP:
    options.setdefault("transfer", "vfe" if features.window is None else "adf")
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    return StreamingGP(features, kernel, likelihood, max_features=400, tolerance=tolerance, **options)


KERNELS = {"rbf": (lambda: gpytorch_kernel(0.7, 2.0), 1e-3), "matern": (lambda: gpytorch_kernel(1.0, nu=1.5), 1e-2)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("start", [0.0, -4.0])
def test_the_order_grows_with_the_horizon(kernel: str, start: float) -> None:
    """From far too few features, at the first update already, and never above what was asked for."""
    made, tolerance = KERNELS[kernel]
    model = growing(made(), HippoFeatures(2, start + 3.0, start), tolerance)
    assert model.residual_variance() > tolerance
    orders = []
    for i in range(40):
        x, y = draw(4, start + i + 1.0, start + i, seed=i)
        model.update(x, y)
        assert model.residual_variance() <= tolerance
        orders.append(model.features.num_features)
        assert model.state.num_features == orders[-1]
    assert orders[0] > 2 and orders == sorted(orders) and orders[-1] > 2 * orders[0]
    # Not many more than needed: the horizon has been reserved up to the growth factor.
    assert orders[-1] <= 1.05 * HippoFeatures.required(made(), model.features.horizon, tolerance, start) + 1


@pytest.mark.parametrize("measure", SLIDING)
def test_the_order_of_a_window_grows_until_it_is_full(measure: str) -> None:
    tolerance = 1e-2
    features = HippoFeatures(3, 0.5, measure=measure, window=3.0 if measure != "lagt" else 1.0)
    model = growing(RBFKernel().double(), features, tolerance)
    orders = []
    for i in range(30):
        model.update(*draw(3, 0.5 * (i + 1), 0.5 * i, seed=i))
        assert model.residual_variance() <= tolerance
        orders.append(model.features.num_features)
    assert orders == sorted(orders) and orders[-1] == orders[15] > 3


def test_a_grown_stream_is_the_exact_gp() -> None:
    model = growing(RBFKernel().double(), HippoFeatures(2, 1.0), 1e-7)
    model.likelihood.noise = torch.tensor(0.1, dtype=F64)
    x, y = draw(60)
    x, order = x.sort()
    y = y[order]
    model.covar_module.lengthscale = torch.tensor(1.0, dtype=F64)
    for a, b in zip(x.split(6), y.split(6), strict=True):
        model.update(a, b)
    at = torch.linspace(0, 11, 23, dtype=F64)
    expected = oracle.exact_gp(oracle.rbf(), oracle.zero, x, y, torch.full_like(x, 0.1), at)
    oracle.assert_posterior(model.eval(), expected, at, 1e-4)


def test_the_order_grows_when_the_kernel_was_set_after_the_model_was_built() -> None:
    model = growing(RBFKernel().double(), HippoFeatures(8, 4.0), 1e-3)
    model.covar_module.lengthscale = torch.tensor(0.1, dtype=F64)
    model.update(*draw(5, 1.0))
    assert model.residual_variance() <= 1e-3 and model.features.num_features > 40
    # A rougher kernel in mid-stream is met at the next change of the basis.
    model.covar_module.lengthscale = torch.tensor(0.05, dtype=F64)
    model.update(*draw(5, 5.0, 4.5))
    assert model.residual_variance() <= 1e-3


def test_where_growth_ends() -> None:
    model = stream(3, 2.0, lengthscale=0.1, max_features=10)
    with pytest.warns(CapacityWarning, match="10 features leave"):
        model.update(*draw(5, 1.0))
    assert model.features.num_features == 10
    for bad, error in ((2, ValueError), (5.5, TypeError), (0, ValueError)):
        with pytest.raises(error, match="max_features: "):
            stream(3, 2.0, max_features=bad)


@pytest.mark.parametrize("batch", [(2,)])
def test_the_most_demanding_kernel_of_a_batch_decides(batch: tuple[int, ...]) -> None:
    scales = torch.tensor([1.0, 0.3], dtype=F64)
    model = stream(2, 2.0, lengthscale=scales, batch_shape=batch, max_features=100)
    alone = stream(2, 2.0, lengthscale=0.3, max_features=100)
    for i in range(6):
        x, y = draw(4, i + 1.0, float(i), seed=i)
        model.update(x, y)
        alone.update(x, y)
        assert (model.residual_variance() <= 1e-3).all()
    assert model.features.num_features == alone.features.num_features


@pytest.mark.parametrize("name", ["sum", "product"])
def test_the_order_grows_with_kernels_that_are_not_stationary(name: str) -> None:
    kernel = LinearKernel() + RBFKernel() if name == "sum" else LinearKernel() * RBFKernel()
    model = growing(kernel.double(), HippoFeatures(2, 1.0), 1e-3)
    for i in range(20):
        model.update(*draw(5, i + 1.0, float(i), seed=i))
        assert model.residual_variance() <= 1e-3


@pytest.mark.parametrize("jitter", [1e-12, 1e-6])
def test_the_order_grows_under_other_jitters(jitter: float) -> None:
    model = growing(MaternKernel(1.5).double(), HippoFeatures(2, 1.0), 1e-2, jitter=jitter)
    for i in range(15):
        model.update(*draw(5, i + 1.0, float(i), seed=i))
        assert model.residual_variance() <= 1e-2
