"""How good predictions of numbers are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpseq.metrics.arguments import check_like, check_scores, finite, refuse
from gpseq.metrics.intervals import check_moments

#: Ways to estimate the spread of a distribution from its draws.
ESTIMATORS = ("fair", "standard")


def rmse(mean: Tensor, target: Tensor) -> Tensor:
    r"""Root mean squared error, :math:`\sqrt{\tfrac1n \sum_i (y_i - m_i)^2}`.

    Args:
        mean: predictions, ``(*batch, n)``.
        target: what was observed, ``(*batch, n)``.

    Returns:
        ``(*batch)``, in the unit of the target; NaN where ``n`` is 0.

    Example:
        >>> rmse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(1.4142)
    """
    return (target - mean).square().mean(-1).sqrt()


def nlpd(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""Negative log predictive density of single observations, averaged.

    .. math:: -\tfrac1n \sum_i \log N(y_i \mid m_i, v_i)

    Each observation is judged by its own marginal. GPyTorch's ``negative_log_predictive_density`` judges all of them
    jointly, which needs their covariance and answers another question.

    Args:
        mean: predictive means, ``(*batch, n)``.
        variance: predictive variances of the observations, noise included, ``(*batch, n)``.
        target: what was observed, ``(*batch, n)``.

    Returns:
        ``(*batch)``, in nats; NaN where ``n`` is 0.

    Example:
        >>> nlpd(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]))
        tensor(1.1689)
    """
    squared = (target - mean).square() / variance
    return 0.5 * (math.log(2 * math.pi) + torch.log(variance) + squared).mean(-1)


def crps_gaussian(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""Continuous ranked probability score of normal distributions, averaged.

    .. math:: \sqrt{v} \left( z (2 \Phi(z) - 1) + 2 \varphi(z) - 1 / \sqrt{\pi} \right), \qquad z = (y - m) / \sqrt{v}

    Lower is better. Where the variance is 0 it is the absolute error, and it grows no faster than that for outliers.

    Args:
        mean: predictive means, ``(*batch, n)``.
        variance: predictive variances of the observations, noise included, ``(*batch, n)``.
        target: what was observed, ``(*batch, n)``.

    Returns:
        ``(*batch)``, in the unit of the target and the dtype of the mean.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a wrong shape, nothing to score, NaN, infinite numbers, or a negative variance.

    Source:
        Gneiting et al. (2005), Calibrated probabilistic forecasting using ensemble model output statistics, equation 5.

    Example:
        >>> crps_gaussian(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]))
        tensor(0.4181)
    """
    centre, spread = check_moments(mean, variance)
    observed = check_like("target", check_scores("target", target), "mean", centre)
    refuse(finite("target", observed))
    # In float64, since the terms cancel where the spread is wide beside the error.
    error, std = (observed.double() - centre.double()), spread.double().sqrt()
    certain = std == 0
    scale = torch.where(certain, 1.0, std)
    z = error / scale
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    score = scale * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return torch.where(certain, error.abs(), score).mean(-1).to(centre.dtype)


def crps_samples(samples: Tensor, target: Tensor, estimator: str = "fair") -> Tensor:
    r"""Continuous ranked probability score from draws, averaged.

    .. math:: \tfrac1S \sum_s |x_s - y| - \tfrac1{2 c} \sum_{s, t} |x_s - x_t|

    with :math:`c = S (S - 1)` for the fair estimator and :math:`c = S^2` for the standard one. The fair one is an
    unbiased estimate of the score of the distribution that the draws come from, whatever S, and may be negative. The
    standard one is the score of the draws themselves as a distribution of S atoms; it is larger, and favours models
    with more draws. Never compare the two.

    Args:
        samples: draws of observations, noise included, ``(S, *batch, n)``; S at least 2 for the fair estimator.
        target: what was observed, ``(*batch, n)``.
        estimator: ``"fair"`` or ``"standard"``.

    Returns:
        ``(*batch)``, in the unit of the target and the dtype of the draws. O(S log S) for each target.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a wrong shape, too few draws, nothing to score, NaN, infinite numbers, or an unknown estimator.

    Source:
        Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, equation 21; fair:
        Ferro (2014), Fair scores for ensemble forecasts.

    Example:
        >>> draws = torch.tensor([[0.0], [2.0]])
        >>> crps_samples(draws, torch.tensor([1.0])), crps_samples(draws, torch.tensor([1.0]), estimator="standard")
        (tensor(0.), tensor(0.5000))
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
    draws, least = check_scores("samples", samples), 2 if estimator == "fair" else 1
    if draws.dim() < 2 or len(draws) < least:
        raise ValueError(f"samples: expected shape (S, *batch, n) with S at least {least}, got {tuple(draws.shape)}.")
    observed = check_like("target", check_scores("target", target), "each draw", draws[0])
    refuse(finite("samples", draws), finite("target", observed))
    number = len(draws)
    error = draws.double() - observed.double()
    # Sorted, each gap between neighbours is crossed by the pairs that lie on both sides of it.
    below = torch.arange(1, number, dtype=error.dtype, device=error.device).reshape(-1, *[1] * observed.dim())
    spread = (error.sort(0).values.diff(dim=0) * below * (number - below)).sum(0)
    pairs = number * (number - 1) if estimator == "fair" else number**2
    return (error.abs().mean(0) - spread / pairs).mean(-1).to(draws.dtype)
