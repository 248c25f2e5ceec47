"""How good predictions of labels are."""

from __future__ import annotations

import torch
from torch import Tensor

from gpseq.metrics.arguments import check_like, check_probability, no_nan, refuse


def accuracy(predicted: Tensor, target: Tensor) -> Tensor:
    r"""Fraction of labels that are right, :math:`\tfrac1n \sum_i [\hat y_i = y_i]`.

    Args:
        predicted: labels, ``(*batch, n)``; of probabilities ``p`` take ``p.argmax(-1)`` or ``p > 0.5``.
        target: the true labels, ``(*batch, n)``.

    Returns:
        ``(*batch)``, float64, from 0 to 1; NaN where ``n`` is 0.

    Raises:
        ValueError: the shapes differ; ``(n, 1)`` beside ``(n,)`` would compare every label with every other.

    Example:
        >>> accuracy(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))
        tensor(0.7500, dtype=torch.float64)
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"target: expected shape {tuple(predicted.shape)}, as predicted has, got {tuple(target.shape)}."
        )
    return (predicted == target).double().mean(-1)


def bernoulli_nlpd(probability: Tensor, target: Tensor) -> Tensor:
    r"""Negative log probability of labels 0 or 1, averaged.

    .. math:: -\tfrac1n \sum_i \left( y_i \log p_i + (1 - y_i) \log(1 - p_i) \right)

    Args:
        probability: of label 1, ``(*batch, n)``.
        target: the true labels, ``(*batch, n)``, 0 or 1 in any dtype.

    Returns:
        ``(*batch)``, in nats; infinite where something was held for impossible and happened, NaN where ``n`` is 0.

    Example:
        >>> bernoulli_nlpd(torch.tensor([0.5, 0.9]), torch.tensor([0, 1]))
        tensor(0.3993)
    """
    one = target.to(probability.dtype)
    return -(torch.xlogy(one, probability) + torch.xlogy(1 - one, 1 - probability)).mean(-1)


def categorical_nlpd(probability: Tensor, target: Tensor) -> Tensor:
    r"""Negative log probability of the true classes, averaged, :math:`-\tfrac1n \sum_i \log p_{i, y_i}`.

    For logits, ``torch.nn.functional.cross_entropy`` is the same without a loss of digits.

    Args:
        probability: of each class, ``(*batch, n, C)``, summing to one over ``C``.
        target: the true classes, ``(*batch, n)``, integers from 0 to C - 1.

    Returns:
        ``(*batch)``, in nats; infinite where something was held for impossible and happened, NaN where ``n`` is 0.

    Example:
        >>> categorical_nlpd(torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.1, 0.8]]), torch.tensor([0, 2]))
        tensor(0.4581)
    """
    index = target.unsqueeze(-1).expand(*probability.shape[:-1], 1)
    return -probability.gather(-1, index).squeeze(-1).log().mean(-1)


def brier_score(probability: Tensor, target: Tensor) -> Tensor:
    r"""Squared distance of the probabilities from the truth, summed over the classes and averaged.

    .. math:: \tfrac1n \sum_i \sum_c \left( p_{ic} - [y_i = c] \right)^2

    This is Brier's own convention: from 0 to 2, and with two classes twice the squared error of the probability of
    class 1. Others divide by the number of classes, or by two.

    Args:
        probability: of each class, ``(*batch, n, C)``, rows summing to one; no logits.
        target: the true classes, ``(*batch, n)``, integers from 0 to C - 1, or bool where C is 2.

    Returns:
        ``(*batch)``, in the dtype of the probability.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, nothing to score, NaN, or rows that do not sum to one.

    Source:
        Brier (1950), Verification of forecasts expressed in terms of probability.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.1, 0.8]]), torch.tensor([0, 2]))
        tensor(0.2800)
    """
    p, label = check_probability(probability, target)
    truth = label.unsqueeze(-1) == torch.arange(p.shape[-1], device=p.device)
    return (p - truth.to(p.dtype)).square().sum(-1).double().mean(-1).to(p.dtype)


def matthews_correlation(predicted: Tensor, target: Tensor) -> Tensor:
    r"""Correlation of predicted and true labels, of any number of classes.

    .. math::

        \frac{n \sum_i [\hat y_i = y_i] - \sum_c \hat n_c n_c}
        {\sqrt{n^2 - \sum_c \hat n_c^2} \; \sqrt{n^2 - \sum_c n_c^2}}

    with :math:`\hat n_c` and :math:`n_c` the numbers of predictions and of targets of class c. Unlike accuracy it does
    not reward naming the most frequent class.

    Args:
        predicted: labels, ``(*batch, n)``, of any dtype; of probabilities ``p`` take ``p.argmax(-1)``.
        target: the true labels, ``(*batch, n)``.

    Returns:
        ``(*batch)``, float64, at most 1, and 0 by chance. Also 0 where all predictions or all targets are the same,
        which leaves the ratio undefined.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: the shapes differ, nothing to score, or NaN.

    Source:
        Matthews (1975), Comparison of the predicted and observed secondary structure of T4 phage lysozyme; several
        classes: Gorodkin (2004), Comparing two K-category assignments by a K-category correlation coefficient.

    Example:
        >>> matthews_correlation(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))
        tensor(0.5774, dtype=torch.float64)
    """
    if not isinstance(predicted, Tensor):
        raise TypeError(f"predicted: expected a tensor, got {type(predicted).__name__}.")
    if predicted.dim() == 0 or predicted.numel() == 0:
        raise ValueError(f"predicted: expected shape (*batch, n) with n at least 1, got {tuple(predicted.shape)}.")
    check_like("target", target, "predicted", predicted)
    refuse(no_nan("predicted", predicted), no_nan("target", target))
    one, other = (value.long() if value.dtype == torch.bool else value for value in (predicted, target))
    dtype = torch.promote_types(one.dtype, other.dtype)
    one, other = one.to(dtype).contiguous(), other.to(dtype).contiguous()
    n, right = one.shape[-1], (one == other).sum(-1)
    # Pairs of elements with the same label are counted, so that the number of classes need not be known: all in int64.
    both, of_one, of_other = _equal_pairs(one, other), _equal_pairs(one, one), _equal_pairs(other, other)
    scale = ((n * n - of_one).double() * (n * n - of_other).double()).sqrt()
    return torch.where(scale > 0, (n * right - both).double() / scale, 0.0)


def _equal_pairs(one: Tensor, other: Tensor) -> Tensor:
    """Number of pairs (i, j) with ``one[i] == other[j]``."""
    ordered = other.sort(-1).values
    return (torch.searchsorted(ordered, one, right=True) - torch.searchsorted(ordered, one)).sum(-1)
