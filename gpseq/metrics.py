"""How good a prediction is: pure functions on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
