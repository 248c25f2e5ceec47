"""Scores of numbers against torch's own distributions, integrals and double loops."""

import math

import pytest
import torch

from gpseq import metrics


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_nlpd_is_the_mean_of_normal_log_densities(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    mean, target = torch.randn(2, *batch, 7, dtype=dtype)
    variance = torch.rand(*batch, 7, dtype=dtype) + 0.1
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(target).mean(-1)
    torch.testing.assert_close(metrics.nlpd(mean, variance, target), expected)


def test_nlpd_moves_with_the_unit() -> None:
    """In a unit a thousand times smaller all densities are a thousand times smaller."""
    mean, target, variance = torch.randn(5), torch.randn(5), torch.rand(5) + 0.1
    shifted = metrics.nlpd(1000 * mean, 1e6 * variance, 1000 * target) - metrics.nlpd(mean, variance, target)
    assert shifted.item() == pytest.approx(math.log(1000), rel=1e-5)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_rmse(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    mean, target = torch.randn(2, *batch, 7, dtype=dtype)
    torch.testing.assert_close(metrics.rmse(mean, target), (mean - target).norm(dim=-1) / math.sqrt(7))


def test_nothing_to_score_is_nan() -> None:
    assert metrics.rmse(torch.zeros(0), torch.zeros(0)).isnan()
    assert metrics.nlpd(torch.zeros(0), torch.ones(0), torch.zeros(0)).isnan()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_crps_of_a_normal_distribution_is_the_integral_that_defines_it(
    batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    mean, target = torch.randn(2, *batch, 7, dtype=dtype)
    variance = torch.rand(*batch, 7, dtype=dtype) + 0.1
    grid = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    law = torch.distributions.Normal(mean.double().unsqueeze(-1), variance.double().sqrt().unsqueeze(-1))
    jump = (grid >= target.double().unsqueeze(-1)).double()
    expected = torch.trapezoid((law.cdf(grid) - jump).square(), grid).mean(-1)
    found = metrics.crps_gaussian(mean, variance, target)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


def test_crps_without_spread_is_the_absolute_error_and_comes_near_it() -> None:
    mean, target = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.0, 3.0, -5.0])
    assert metrics.crps_gaussian(mean, torch.zeros(3), target).item() == pytest.approx(5 / 3)
    assert metrics.crps_gaussian(mean, torch.full((3,), 1e-12), target).item() == pytest.approx(5 / 3, rel=1e-5)
    wide = metrics.crps_gaussian(torch.zeros(1), torch.full((1,), 1e8), torch.zeros(1))
    assert wide.item() == pytest.approx(1e4 * (math.sqrt(2) - 1) / math.sqrt(math.pi), rel=1e-6)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("number", [2, 5, 10])
def test_crps_of_draws_by_a_double_loop(batch: tuple[int, ...], number: int, dtype: torch.dtype) -> None:
    samples = torch.randn(number, *batch, 4, dtype=dtype).mul(2).round()  # with ties
    target = torch.randn(*batch, 4, dtype=dtype)
    first = sum((samples[s] - target).abs() for s in range(number)) / number
    pairs = sum((samples[s] - samples[t]).abs() for s in range(number) for t in range(number))
    for estimator, divisor in (("fair", number * (number - 1)), ("standard", number**2)):
        expected = (first - 0.5 * pairs / divisor).mean(-1)
        torch.testing.assert_close(metrics.crps_samples(samples, target, estimator), expected)


def test_the_fair_estimator_is_unbiased_with_three_draws_and_the_standard_one_is_not() -> None:
    draws, target = torch.randn(3, 200_000, dtype=torch.float64), torch.full((200_000,), 0.7, dtype=torch.float64)
    exact = metrics.crps_gaussian(torch.zeros(1), torch.ones(1), torch.tensor([0.7])).item()
    assert metrics.crps_samples(draws, target).item() == pytest.approx(exact, abs=0.005)
    # The standard one is too large by the Gini mean difference over 2 S.
    excess = 2 / math.sqrt(math.pi) / (2 * 3)
    assert metrics.crps_samples(draws, target, estimator="standard").item() == pytest.approx(exact + excess, abs=0.005)


def test_crps_far_from_zero_keeps_its_digits() -> None:
    samples, target = torch.randn(50, 8).add(1e6), torch.randn(8).add(1e6)
    expected = metrics.crps_samples(samples.double() - 1e6, target.double() - 1e6).item()
    assert metrics.crps_samples(samples, target).item() == pytest.approx(expected, rel=1e-6)


def test_one_draw_is_a_point_forecast() -> None:
    samples, target = torch.randn(1, 6), torch.randn(6)
    expected = (samples[0] - target).abs().mean()
    torch.testing.assert_close(metrics.crps_samples(samples, target, estimator="standard"), expected)
    with pytest.raises(ValueError, match=r"samples: expected shape \(S, \*batch, n\) with S at least 2, got \(1, 6\)"):
        metrics.crps_samples(samples, target)
    with pytest.raises(ValueError, match="estimator: expected one of fair, standard, got 'best'"):
        metrics.crps_samples(samples, target, estimator="best")
    with pytest.raises(ValueError, match=r"target: expected shape \(6,\), as each draw has, got \(1, 6\)"):
        metrics.crps_samples(torch.randn(2, 6), target.unsqueeze(0))


def test_what_crps_cannot_score_is_refused() -> None:
    one = torch.ones(3)
    with pytest.raises(ValueError, match="variance: expected no number below 0, got -1"):
        metrics.crps_gaussian(one, -one, one)
    with pytest.raises(ValueError, match="target: expected finite numbers, got 1 of 3 that are infinite or NaN"):
        metrics.crps_gaussian(one, one, torch.tensor([1.0, math.inf, 1.0]))
    with pytest.raises(ValueError, match=r"variance: expected shape \(3,\), as mean has, got \(1,\)"):
        metrics.crps_gaussian(one, one[:1], one)
    with pytest.raises(ValueError, match="samples: expected finite numbers, got 3 of 6"):
        metrics.crps_samples(torch.stack([one, one / 0]), one)
