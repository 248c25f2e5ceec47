"""Streams that go on for long: a thousand changes of basis, and the state-space form of Matern-3/2 as judge."""

import math

import pytest
import torch

from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, draw, functionals, stream, variance_of


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["vfe", "adf"])
def test_a_thousand_stretchings_in_float32(transfer: str) -> None:
    """Every update stretches the basis. float32 inputs and hyperparameters end within 1e-3 of float64."""
    steps = 1000
    times = 0.5 + 14.5 * (1 + torch.arange(steps)) / steps
    targets = torch.sin(1.3 * times) + 0.3 * torch.randn(steps)
    at = torch.linspace(0, 15, 101)
    posteriors = []
    for dtype in (torch.float32, F64):
        model = stream(30, 0.5, horizon_growth=None, transfer=transfer, dtype=dtype)
        for time, target in zip(times.to(dtype).split(1), targets.to(dtype).split(1), strict=True):
            model.update(time, target)
        assert model.features.horizon == 15.0 and model.num_observations == steps
        for name, value in model.state.items():
            assert name == "hyperparameters" or value.isfinite().all(), name  # those may hold infinite bounds
        with torch.no_grad():
            posterior = model(at.to(dtype))
            posteriors.append((posterior.mean.double(), variance_of(posterior).double()))
        assert posteriors[-1][0].isfinite().all() and posteriors[-1][1].min() > 0
    torch.testing.assert_close(*(mean for mean, _ in posteriors), rtol=0, atol=1e-3)
    torch.testing.assert_close(*(variance for _, variance in posteriors), rtol=0, atol=1e-3)
    exact = oracle.exact_gp(
        oracle.rbf(1.0),
        oracle.zero,
        times.double(),
        targets.double(),
        torch.full((steps,), 0.1, dtype=F64),
        at.double(),
    )
    assert (posteriors[1][0] - exact.mean).square().mean().sqrt() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("growth", [1.25, None])
def test_the_error_on_the_past_does_not_grow(growth: float | None) -> None:
    """Above capacity, 300 updates: the first hundred points are remembered at the end as well as at first."""
    model = stream(50, 2.0, horizon_growth=growth)
    x, y = draw(1200, 25.0, seed=1)
    x, order = x.sort()
    y = y[order]
    truth = torch.sin(1.3 * x) + 0.5 * torch.cos(0.4 * x + 1)
    errors = []
    for index, (part_x, part_y) in enumerate(zip(x.split(4), y.split(4), strict=True)):
        model.update(part_x, part_y)
        if index in (49, 299):
            with torch.no_grad():
                errors.append((model(x[:100]).mean - truth[:100]).square().mean().sqrt().item())
    assert errors[1] < 1.05 * errors[0] + 1e-3
    exact = oracle.exact_gp(oracle.rbf(1.0), oracle.zero, x, y, torch.full_like(x, 0.1), x[:100])
    with torch.no_grad():
        assert (model(x[:100]).mean - exact.mean).abs().max() < 0.02


@pytest.mark.parametrize("growth", ["fixed", 1.25])
@pytest.mark.parametrize("order", [60, 150])
def test_matern_agrees_with_the_kalman_smoother(growth: float | str, order: int) -> None:
    """Over the whole past; what the memory cannot hold bounds the difference, and more features make it smaller."""
    horizon = 10.0 if growth == "fixed" else 4.0
    model = stream(order, horizon, lengthscale=1.5, outputscale=2.0, nu=1.5, horizon_growth=growth, noise=0.2)
    x, y = draw(150, 9.7)
    x, indices = x.sort()
    y, noise = y[indices], torch.full((150,), 0.2, dtype=F64)
    for part_x, part_y in zip(x.split(15), y.split(15), strict=True):
        model.update(part_x, part_y)
    at = torch.linspace(0.05, 9.6, 60, dtype=F64)
    mean, variance = oracle.matern32_smoother(1.5, 2.0, x, y, noise, at)
    residual = 2.0 * oracle.residual_variance(oracle.matern32(1.5, 2.0), functionals(model.features), at).max().item()
    assert residual < (0.02 if order == 60 else 0.004)
    with torch.no_grad():
        posterior = model(at)
        assert (posterior.mean - mean).abs().max() < math.sqrt(residual)
        assert (variance_of(posterior) - variance).abs().max() < 2 * residual
        forecast_at = torch.tensor([9.7, 10.5, 12.0], dtype=F64)
        forecast = model(forecast_at)
    expected, spread = oracle.matern32_smoother(1.5, 2.0, x, y, noise, forecast_at)
    assert (forecast.mean - expected).abs().max() < 3 * math.sqrt(residual)
    assert (variance_of(forecast) - spread).abs().max() < 3 * math.sqrt(residual)


def test_the_smoother_is_the_exact_gp() -> None:
    """Two oracles that share nothing."""
    x, y = draw(40)
    noise = 0.1 + torch.rand(40, dtype=F64)
    at = torch.linspace(-1, 12, 30, dtype=F64)
    mean, variance = oracle.matern32_smoother(0.8, 1.4, x, y, noise, at)
    exact = oracle.exact_gp(oracle.matern32(0.8, 1.4), oracle.zero, x, y, noise, at)
    torch.testing.assert_close(mean, exact.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(variance, exact.variance, rtol=0, atol=1e-9)
