"""How well scores tell inputs of another kind from those of the training data.

Scores are higher for what looks more out of distribution: entropy, mutual information, or a negated confidence. Scores
that are equal are counted exactly: they are above and below each other half of the time, or on the same side of a
threshold, as the definition has it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_number
from gpseq.metrics.arguments import check_scores, no_nan, refuse

#: Which of the two kinds is the one to be found.
POSITIVES = ("in", "out")


def ood_auroc(scores_in: Tensor, scores_out: Tensor) -> Tensor:
    r"""Area under the ROC curve: the probability that an input from outside has the higher score.

    .. math:: P(s_\mathrm{out} > s_\mathrm{in}) + \tfrac12 P(s_\mathrm{out} = s_\mathrm{in})

    It is the same whichever kind is called positive, and does not depend on how many inputs there are of each.

    Args:
        scores_in: of inputs like those of training, ``(*batch, n)``; higher means more out of distribution.
        scores_out: of the others, ``(*batch, m)``.

    Returns:
        ``(*batch)``, from 0 to 1, 0.5 by chance; counted exactly, in the dtype of the scores.

    Raises:
        TypeError: the scores are no floating-point tensors.
        ValueError: a wrong shape, NaN, or no score of one of the two kinds.

    Source:
        Hendrycks and Gimpel (2017), A baseline for detecting misclassified and out-of-distribution examples in neural
        networks; as a probability, Mann and Whitney (1947).

    Example:
        >>> ood_auroc(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.4]))
        tensor(0.7500)
    """
    inside, outside = _check(scores_in, scores_out)
    pairs = inside.shape[-1] * outside.shape[-1]
    ordered = inside.sort(-1).values
    twice = torch.searchsorted(ordered, outside) + torch.searchsorted(ordered, outside, right=True)
    return (twice.sum(-1).double() / (2 * pairs)).to(inside.dtype)


def ood_aupr(scores_in: Tensor, scores_out: Tensor, positive: str = "out") -> Tensor:
    r"""Area under the precision-recall curve, as average precision.

    .. math:: \sum_k (R_k - R_{k-1}) P_k

    over all thresholds, without interpolation: the mean, over the positive inputs, of the precision at their own
    scores. It depends on how many inputs there are of each kind; by chance it is the fraction of positives.

    Args:
        scores_in: of inputs like those of training, ``(*batch, n)``; higher means more out of distribution.
        scores_out: of the others, ``(*batch, m)``.
        positive: ``"out"`` asks how well those from outside are found (AUPR-out), ``"in"`` the others (AUPR-in).

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the scores.

    Raises:
        TypeError: the scores are no floating-point tensors.
        ValueError: a wrong shape, NaN, no score of one of the two kinds, or another ``positive``.

    Source:
        Hendrycks and Gimpel (2017), A baseline for detecting misclassified and out-of-distribution examples in neural
        networks.

    Example:
        >>> ood_aupr(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.4]))
        tensor(0.5833)
    """
    found, others = _sides(scores_in, scores_out, positive)
    found = found.sort(-1).values
    true, false = _at_least(found, found), _at_least(others.sort(-1).values, found)
    return (true.double() / (true + false)).mean(-1).to(found.dtype)


def ood_fpr(scores_in: Tensor, scores_out: Tensor, tpr: float = 0.95, positive: str = "in") -> Tensor:
    r"""False positive rate at a true positive rate, FPR95.

    The threshold is the strictest one that accepts at least the fraction ``tpr`` of the positives; the result is the
    fraction of the others that it accepts, those with the score of the threshold among them. Lower is better.

    Args:
        scores_in: of inputs like those of training, ``(*batch, n)``; higher means more out of distribution.
        scores_out: of the others, ``(*batch, m)``.
        tpr: above 0 and at most 1.
        positive: ``"in"``, as in the literature on OOD: how many from outside pass as known when that many known ones
            do. ``"out"``: how many known ones raise an alarm when that many from outside do.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the scores.

    Raises:
        TypeError: the scores are no floating-point tensors.
        ValueError: a wrong shape, NaN, no score of one of the two kinds, or another ``tpr`` or ``positive``.

    Source:
        Liang, Li and Srikant (2018), Enhancing the reliability of out-of-distribution image detection in neural
        networks, FPR at 95 % TPR.

    Example:
        >>> ood_fpr(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.4]))
        tensor(1.)
        >>> ood_fpr(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.4]), positive="out")
        tensor(0.3333)
    """
    expected = "a rate above 0 and at most 1"
    rate = check_number("tpr", tpr, above=0.0, expected=expected)
    if rate > 1:
        raise ValueError(f"tpr: expected {expected}, got {tpr!r}.")
    found, others = _sides(scores_in, scores_out, positive)
    needed = max(math.ceil(round(rate * found.shape[-1], 6)), 1)  # 0.07 times 100 is a little more than 7 in binary
    threshold = found.sort(-1, descending=True).values[..., needed - 1 : needed]
    return ((others >= threshold).double().mean(-1)).to(found.dtype)


def _check(scores_in: Any, scores_out: Any) -> tuple[Tensor, Tensor]:
    """Both in one dtype."""
    inside, outside = check_scores("scores_in", scores_in), check_scores("scores_out", scores_out)
    if inside.shape[:-1] != outside.shape[:-1]:
        raise ValueError(
            f"scores_out: expected batch dimensions {tuple(inside.shape[:-1])}, as scores_in has, got "
            f"{tuple(outside.shape[:-1])}."
        )
    if inside.device != outside.device:
        raise ValueError(f"scores_out: expected it on {inside.device}, where scores_in is, got {outside.device}.")
    refuse(no_nan("scores_in", inside), no_nan("scores_out", outside))
    dtype = torch.promote_types(inside.dtype, outside.dtype)
    return inside.to(dtype).contiguous(), outside.to(dtype).contiguous()


def _sides(scores_in: Any, scores_out: Any, positive: Any) -> tuple[Tensor, Tensor]:
    """Scores of the positives and of the others, higher for what looks more positive."""
    if positive not in POSITIVES:
        raise ValueError(f"positive: expected 'in' or 'out', got {positive!r}.")
    inside, outside = _check(scores_in, scores_out)
    return (outside, inside) if positive == "out" else (-inside, -outside)


def _at_least(ordered: Tensor, threshold: Tensor) -> Tensor:
    """How many scores reach each threshold."""
    return ordered.shape[-1] - torch.searchsorted(ordered, threshold)
