"""Metrics against torch's own distributions, and by hand."""

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
