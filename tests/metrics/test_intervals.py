"""Intervals and quantiles against torch's distributions, scikit-learn, and by hand."""

import math

import pytest
import torch

from gpseq import metrics


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_gaussian_intervals_hold_their_probability(level: float, dtype: torch.dtype) -> None:
    mean, variance = torch.randn(2, 5, dtype=dtype), torch.rand(2, 5, dtype=dtype) + 0.1
    lower, upper = metrics.gaussian_interval(mean, variance, level)
    law = torch.distributions.Normal(mean, variance.sqrt())
    torch.testing.assert_close(law.cdf(upper) - law.cdf(lower), torch.full_like(mean, level), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lower + upper, 2 * mean, rtol=1e-4, atol=1e-5)
    draws = mean[:, :1] + variance[:, :1].sqrt() * torch.randn(2, 50_000, dtype=dtype)
    ends = (end[:, :1].expand(-1, 50_000) for end in (lower, upper))
    torch.testing.assert_close(
        metrics.interval_coverage(*ends, draws), torch.full((2,), level, dtype=dtype), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_coverage_and_width_by_loops(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    lower, target = torch.randn(2, *batch, 9, dtype=dtype)
    upper = lower + torch.rand(*batch, 9, dtype=dtype)
    covered, width = metrics.interval_coverage(lower, upper, target), metrics.interval_width(lower, upper)
    assert covered.dtype == width.dtype == dtype
    rows = zip(*(value.reshape(-1, 9).tolist() for value in (lower, upper, target)), strict=True)
    expected = [sum(a <= y <= b for a, b, y in zip(*row, strict=True)) / 9 for row in rows]
    torch.testing.assert_close(covered, torch.tensor(expected, dtype=dtype).reshape(batch))
    torch.testing.assert_close(width, (upper - lower).mean(-1))


def test_ends_belong_to_the_interval_and_may_be_infinite() -> None:
    point = torch.tensor([1.0, 2.0])
    assert metrics.interval_coverage(point, point, point) == 1 and metrics.interval_width(point, point) == 0
    everything = torch.full((2,), math.inf)
    assert metrics.interval_coverage(-everything, everything, point) == 1
    assert metrics.interval_width(-everything, everything) == math.inf


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9])
def test_pinball_loss_is_that_of_scikit_learn(level: float, dtype: torch.dtype) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    quantile, target = torch.randn(2, 3, 40, dtype=dtype)
    found = metrics.pinball_loss(quantile, target, level)
    assert found.dtype == dtype
    for row in range(3):
        expected = sklearn.mean_pinball_loss(target[row].numpy(), quantile[row].numpy(), alpha=level)
        assert found[row].item() == pytest.approx(expected, rel=1e-5)
    if level == 0.5:
        torch.testing.assert_close(found, (quantile - target).abs().mean(-1) / 2)


def test_several_levels_at_once() -> None:
    levels = torch.tensor([[0.1], [0.5], [0.8]])
    quantile, target = torch.randn(3, 6), torch.randn(6)
    found = metrics.pinball_loss(quantile, target, levels)
    for row, level in enumerate((0.1, 0.5, 0.8)):
        torch.testing.assert_close(found[row], metrics.pinball_loss(quantile[row], target, level))


def test_the_true_quantile_has_the_least_pinball_loss() -> None:
    target = torch.randn(20_000, dtype=torch.float64)
    guesses = torch.linspace(-2, 2, 81, dtype=torch.float64)
    loss = metrics.pinball_loss(guesses.unsqueeze(-1).expand(-1, 20_000), target, 0.8)
    assert guesses[loss.argmin()].item() == pytest.approx(0.8416, abs=0.06)


def test_the_mean_pinball_loss_over_levels_is_half_the_crps() -> None:
    mean, variance, target = torch.zeros(1).double(), torch.ones(1).double(), torch.tensor([0.4]).double()
    levels = (torch.arange(2000).double() + 0.5).div(2000).unsqueeze(-1)
    quantile = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    loss = metrics.pinball_loss(quantile, target, levels).mean()
    assert 2 * loss.item() == pytest.approx(metrics.crps_gaussian(mean, variance, target).item(), abs=1e-5)


def test_bad_arguments_are_named() -> None:
    one = torch.ones(3)
    nan = torch.tensor([1.0, math.nan, 1.0])
    for score in (metrics.interval_width, lambda a, b: metrics.interval_coverage(a, b, one)):
        with pytest.raises(ValueError, match="upper: expected ends not below the lower ones, got 3 that are"):
            score(one, one - 1)
        with pytest.raises(ValueError, match="lower: expected no NaN, got 1 among 3"):
            score(nan, one)
        with pytest.raises(ValueError, match=r"upper: expected shape \(3,\), as lower has, got \(3, 1\)"):
            score(one, one.unsqueeze(-1))
        with pytest.raises(ValueError, match=r"lower: expected shape \(\*batch, n\) with n at least 1, got \(0,\)"):
            score(one[:0], one[:0])
        with pytest.raises(TypeError, match="upper: expected a floating-point tensor, got float"):
            score(one, 2.0)
    with pytest.raises(ValueError, match="target: expected no NaN, got 1 among 3"):
        metrics.interval_coverage(one, one, nan)
    with pytest.raises(ValueError, match=r"target: expected shape \(3,\), as lower has, got \(2,\)"):
        metrics.interval_coverage(one, one, one[:2])
    with pytest.raises(ValueError, match="variance: expected no number below 0, got -1"):
        metrics.gaussian_interval(one, -one)
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match="level: expected a probability between 0 and 1, got"):
            metrics.gaussian_interval(one, one, level)
        with pytest.raises(ValueError, match="level: expected a level between 0 and 1, got"):
            metrics.pinball_loss(one, one, level)
    with pytest.raises(ValueError, match="level: expected levels between 0 and 1, got 1"):
        metrics.pinball_loss(one, one, one)
    with pytest.raises(ValueError, match=r"level: expected a shape that broadcasts to \(3,\), .* got \(2,\)"):
        metrics.pinball_loss(one, one, one[:2] / 2)
    with pytest.raises(ValueError, match=r"level: expected a shape that broadcasts to \(3,\), .* got \(2, 1\)"):
        metrics.pinball_loss(one, one, one[:2].unsqueeze(-1) / 2)
    with pytest.raises(ValueError, match=r"target: expected shape \(3,\), as quantile has, .* got \(3, 1\)"):
        metrics.pinball_loss(one, one.unsqueeze(-1), 0.5)
    with pytest.raises(ValueError, match="quantile: expected finite numbers, got 3 of 3"):
        metrics.pinball_loss(one / 0, one, 0.5)
