"""What an uncertainty is worth to one who may decline: risk on what is kept.

Elements are kept in the order of their uncertainty, the most certain first. Those with the same uncertainty have no
order; each risk is the expected one over all their orders, so the order in which elements come does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_number
from gpseq.metrics.arguments import check_like, check_scores, finite, no_nan, refuse
from gpseq.metrics.ties import cumulative_sum

#: A risk counts as reached if it is above the wanted one by no more than sums in float64 are wrong.
ROUNDING = 1e-12


def risk_coverage_curve(uncertainty: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean loss of the k most certain elements, for each k.

    .. math:: r_k = \tfrac1k \sum_{i \le k} \ell_{(i)}, \qquad k = 1, \dots, n

    Args:
        uncertainty: ``(*batch, n)``; higher means less certain. Of a confidence take its negative.
        loss: ``(*batch, n)``, bool (true where wrong) or finite numbers.

    Returns:
        The coverages ``k / n``, ``(n,)``, and the risks, ``(*batch, n)``, in the dtype of the uncertainty.

    Raises:
        TypeError: the uncertainty is no floating-point tensor, or the loss is no tensor.
        ValueError: a wrong shape, nothing to score, NaN, or an infinite loss.

    Source:
        Geifman and El-Yaniv (2017), Selective classification for deep neural networks.

    Example:
        >>> risk_coverage_curve(torch.tensor([0.1, 0.2, 0.2, 0.9]), torch.tensor([False, True, False, True]))
        (tensor([0.2500, 0.5000, 0.7500, 1.0000]), tensor([0.0000, 0.2500, 0.3333, 0.5000]))
    """
    score, losses = _check(uncertainty, loss)
    risk = _risks(score, losses)
    return _counts(score).div(score.shape[-1]).to(score.dtype), risk.to(score.dtype)


def aurc(uncertainty: Tensor, loss: Tensor) -> Tensor:
    r"""Area under the risk-coverage curve: mean of the risks over the n coverages, :math:`\tfrac1n \sum_k r_k`.

    Lower is better. It falls with the loss itself, too; :func:`excess_aurc` looks at the order alone.

    Args:
        uncertainty: ``(*batch, n)``; higher means less certain.
        loss: ``(*batch, n)``, bool (true where wrong) or finite numbers.

    Returns:
        ``(*batch)``, in the unit of the loss and the dtype of the uncertainty.

    Raises:
        TypeError: the uncertainty is no floating-point tensor, or the loss is no tensor.
        ValueError: a wrong shape, nothing to score, NaN, or an infinite loss.

    Source:
        Geifman, Uziel and El-Yaniv (2019), Bias-reduced uncertainty estimation for deep neural classifiers.

    Example:
        >>> aurc(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([False, True, False, True]))
        tensor(0.3333)
    """
    score, losses = _check(uncertainty, loss)
    return _risks(score, losses).mean(-1).to(score.dtype)


def excess_aurc(uncertainty: Tensor, loss: Tensor) -> Tensor:
    r"""Area under the risk-coverage curve above that of the best order, E-AURC.

    The best order is that of the losses themselves; its area is computed exactly, without the integral that replaces
    it in the paper.

    Args:
        uncertainty: ``(*batch, n)``; higher means less certain.
        loss: ``(*batch, n)``, bool (true where wrong) or finite numbers.

    Returns:
        ``(*batch)``, at least 0, in the unit of the loss and the dtype of the uncertainty.

    Raises:
        TypeError: the uncertainty is no floating-point tensor, or the loss is no tensor.
        ValueError: a wrong shape, nothing to score, NaN, or an infinite loss.

    Source:
        Geifman, Uziel and El-Yaniv (2019), Bias-reduced uncertainty estimation for deep neural classifiers.

    Example:
        >>> excess_aurc(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([False, True, False, True]))
        tensor(0.1250)
    """
    score, losses = _check(uncertainty, loss)
    excess = _risks(score, losses).mean(-1) - _risks(losses, losses).mean(-1)
    return excess.clamp(min=0).to(score.dtype)


def risk_at_coverage(uncertainty: Tensor, loss: Tensor, coverage: float) -> Tensor:
    r"""Mean loss of the most certain fraction of the elements, :math:`r_k` with :math:`k = \lceil c n \rceil`.

    Args:
        uncertainty: ``(*batch, n)``; higher means less certain.
        loss: ``(*batch, n)``, bool (true where wrong) or finite numbers.
        coverage: the fraction c, above 0 and at most 1.

    Returns:
        ``(*batch)``, in the unit of the loss and the dtype of the uncertainty.

    Raises:
        TypeError: the uncertainty is no floating-point tensor, or the loss is no tensor.
        ValueError: a wrong shape, nothing to score, NaN, an infinite loss, or a coverage that is no fraction.

    Example:
        >>> risk_at_coverage(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0.0, 1.0, 0.0, 1.0]), coverage=0.5)
        tensor(0.5000)
    """
    expected = "a fraction above 0 and at most 1"
    fraction = check_number("coverage", coverage, above=0.0, expected=expected)
    if fraction > 1:
        raise ValueError(f"coverage: expected {expected}, got {coverage!r}.")
    score, losses = _check(uncertainty, loss)
    n = score.shape[-1]
    kept = max(math.ceil(round(fraction * n, 6)), 1)  # 0.07 times 100 is a little more than 7 in binary
    return _risks(score, losses)[..., kept - 1].to(score.dtype)


def coverage_at_risk(uncertainty: Tensor, loss: Tensor, risk: float) -> Tensor:
    r"""Largest fraction that can be kept at a mean loss of at most ``risk``, :math:`\max\{k/n : r_k \le r\}`.

    Args:
        uncertainty: ``(*batch, n)``; higher means less certain.
        loss: ``(*batch, n)``, bool (true where wrong) or finite numbers.
        risk: the mean loss r that is tolerated.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the uncertainty; 0 where no coverage has so small a risk.

    Raises:
        TypeError: the uncertainty is no floating-point tensor, or the loss is no tensor.
        ValueError: a wrong shape, nothing to score, NaN, an infinite loss, or a risk that is no finite number.

    Example:
        >>> coverage_at_risk(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0.0, 1.0, 0.0, 1.0]), risk=0.4)
        tensor(0.7500)
    """
    bound = check_number("risk", risk)
    score, losses = _check(uncertainty, loss)
    reached = _risks(score, losses) <= bound + ROUNDING * max(abs(bound), 1.0)
    kept = torch.where(reached, _counts(score), 0).amax(-1)
    return (kept.double() / score.shape[-1]).to(score.dtype)


def accuracy_rejection_curve(uncertainty: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    r"""Accuracy on what is kept when the j least certain elements are rejected, :math:`j = 0, \dots, n - 1`.

    The curve of :func:`risk_coverage_curve` with both axes turned round.

    Args:
        uncertainty: ``(*batch, n)``; higher means less certain.
        correct: ``(*batch, n)``, bool (true where right) or finite numbers.

    Returns:
        The rejected fractions ``j / n``, ``(n,)``, and the accuracies, ``(*batch, n)``, in the dtype of the
        uncertainty.

    Raises:
        TypeError: the uncertainty is no floating-point tensor, or ``correct`` is no tensor.
        ValueError: a wrong shape, nothing to score, NaN, or infinite numbers.

    Source:
        Nadeem, Zucker and Hanczar (2009), Accuracy-rejection curves for comparing classification methods with a reject
        option.

    Example:
        >>> accuracy_rejection_curve(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([True, True, False]))
        (tensor([0.0000, 0.3333, 0.6667]), tensor([0.6667, 1.0000, 1.0000]))
    """
    score, right = _check(uncertainty, correct, "correct")
    rejected = (_counts(score) - 1).double() / score.shape[-1]
    return rejected.to(score.dtype), _risks(score, right).flip(-1).to(score.dtype)


def _check(uncertainty: Any, loss: Any, name: str = "loss") -> tuple[Tensor, Tensor]:
    """The uncertainties, and the losses in float64."""
    score = check_scores("uncertainty", uncertainty)
    losses = check_like(name, loss, "uncertainty", score).double()
    refuse(no_nan("uncertainty", score), finite(name, losses))
    return score, losses


def _counts(score: Tensor) -> Tensor:
    """1, ..., n."""
    return torch.arange(1, score.shape[-1] + 1, device=score.device)


def _risks(score: Tensor, losses: Tensor) -> Tensor:
    """``(*batch, n)``, float64."""
    return cumulative_sum(score, losses)[..., 1:] / _counts(score)
