"""Whether probabilities are as often right as they say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gpseq.checks import check_count
from gpseq.metrics.arguments import check_probability
from gpseq.metrics.ties import cumulative_sum

#: Which pairs of a probability and an outcome are binned.
KINDS = ("top_label", "class_pooled")


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Pairs of a probability and an outcome, in bins: what a reliability diagram shows.

    Made by :func:`reliability_bins`. All in float64.

    Attributes:
        edges: of the bins, ``(B + 1,)``, or ``(*batch, B + 1)`` where they follow the data; a pair at an inner edge is
            in the bin below it.
        count: number of pairs in each bin, ``(*batch, B)``.
        confidence: mean probability of each bin, ``(*batch, B)``; NaN where it is empty.
        accuracy: how often the outcome was true, ``(*batch, B)``; NaN where the bin is empty.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def gap(self) -> Tensor:
        """``|accuracy - confidence|``, 0 in empty bins, ``(*batch, B)``."""
        return torch.where(self.count > 0, (self.accuracy - self.confidence).abs(), 0.0)

    @property
    def expected(self) -> Tensor:
        """Expected calibration error, the mean gap of the pairs, ``(*batch)``."""
        return (self.gap * self.count).sum(-1) / self.count.sum(-1)

    @property
    def maximum(self) -> Tensor:
        """Maximum calibration error, the largest gap, ``(*batch)``."""
        return self.gap.amax(-1)


def reliability_bins(
    probability: Tensor, target: Tensor, num_bins: int = 15, kind: str = "top_label", equal_mass: bool = False
) -> ReliabilityBins:
    r"""Mean probability and frequency of the outcome in bins of the probability.

    Args:
        probability: of each class, ``(*batch, n, C)``, rows summing to one; no logits.
        target: the true classes, ``(*batch, n)``, integers from 0 to C - 1, or bool where C is 2.
        num_bins: B.
        kind: ``"top_label"`` bins n pairs, the largest probability of a row and whether its class was the true one (of
            several largest ones the first). ``"class_pooled"`` bins all n C pairs of the probability of a class and
            whether it was the true one.
        equal_mass: false for bins ``(k / B, (k + 1) / B]``, the first one with 0; true for bins of equal counts, up to
            one, of the sorted probabilities. Equal probabilities that a border of these would part are shared out
            evenly, so that the order of the rows does not matter.

    Returns:
        The bins.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, nothing to score, NaN, rows that do not sum to one, or an unknown kind.

    Source:
        Guo et al. (2017), On calibration of modern neural networks, section 2; DeGroot and Fienberg (1983).

    Example:
        >>> probability = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.3, 0.7]])
        >>> bins = reliability_bins(probability, torch.tensor([0, 1, 1, 1]), num_bins=5)
        >>> bins.count.tolist(), bins.accuracy[3:]
        ([0.0, 0.0, 0.0, 3.0, 1.0], tensor([0.6667, 1.0000], dtype=torch.float64))
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}.")
    check_count("num_bins", num_bins)
    p, label = check_probability(probability, target)
    given, outcome = _top_label(p, label) if kind == "top_label" else _class_pooled(p, label)
    return _equal_mass(given, outcome, num_bins) if equal_mass else _equal_width(given, outcome, num_bins)


def top_label_ece(probability: Tensor, target: Tensor, num_bins: int = 15) -> Tensor:
    r"""Expected calibration error of the predicted class: the common ECE.

    .. math:: \sum_b \frac{n_b}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    over bins of equal width of the largest probability of each row. Never compare it with :func:`class_pooled_ece` or
    :func:`class_averaged_ece`, nor ECEs with other numbers of bins.

    Args:
        probability: of each class, ``(*batch, n, C)``, rows summing to one; no logits.
        target: the true classes, ``(*batch, n)``.
        num_bins: number of bins; a confidence at an inner edge is in the bin below it.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the probability.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, nothing to score, NaN, or rows that do not sum to one.

    Source:
        Naeini et al. (2015), Obtaining well calibrated probabilities using Bayesian binning; Guo et al. (2017), On
        calibration of modern neural networks, equation 3.

    Example:
        >>> top_label_ece(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 1, 1]))
        tensor(0.3333)
    """
    check_count("num_bins", num_bins)
    p, label = check_probability(probability, target)
    return _equal_width(*_top_label(p, label), num_bins).expected.to(p.dtype)


def class_pooled_ece(probability: Tensor, target: Tensor, num_bins: int = 15) -> Tensor:
    r"""Expected calibration error of all classes in one set of bins, as reported for SGPA.

    .. math:: \sum_b \frac{n_b}{n C} \left| \mathrm{freq}_b - \mathrm{conf}_b \right|

    over the n C pairs :math:`(p_{ic}, [y_i = c])`. With many classes most pairs have a probability and a frequency of
    nearly 0, so this number is far smaller than :func:`top_label_ece`; never compare the two.

    Args:
        probability: of each class, ``(*batch, n, C)``, rows summing to one; no logits.
        target: the true classes, ``(*batch, n)``.
        num_bins: number of bins of equal width.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the probability.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, nothing to score, NaN, or rows that do not sum to one.

    Source:
        Chen and Li (2023), Calibrating transformers via sparse Gaussian processes, its experiments.

    Example:
        >>> class_pooled_ece(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 1, 1]))
        tensor(0.3333)
    """
    check_count("num_bins", num_bins)
    p, label = check_probability(probability, target)
    return _equal_width(*_class_pooled(p, label), num_bins).expected.to(p.dtype)


def class_averaged_ece(probability: Tensor, target: Tensor, num_bins: int = 15) -> Tensor:
    r"""Expected calibration error of each class in bins of its own, averaged over the classes.

    .. math:: \frac1C \sum_c \sum_b \frac{n_{bc}}{n} \left| \mathrm{freq}_{bc} - \mathrm{conf}_{bc} \right|

    At least :func:`class_pooled_ece`, in which errors of opposite sign of two classes cancel. Classes that no target
    has count too.

    Args:
        probability: of each class, ``(*batch, n, C)``, rows summing to one; no logits.
        target: the true classes, ``(*batch, n)``.
        num_bins: number of bins of equal width.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the probability.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, nothing to score, NaN, or rows that do not sum to one.

    Source:
        Kull et al. (2019), Beyond temperature scaling, classwise-ECE; Nixon et al. (2019), Measuring calibration in
        deep learning, static calibration error.

    Example:
        >>> class_averaged_ece(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 1, 1]))
        tensor(0.3333)
    """
    check_count("num_bins", num_bins)
    p, label = check_probability(probability, target)
    return _equal_width(p.mT, _is_class(p, label).mT, num_bins).expected.mean(-1).to(p.dtype)


def adaptive_ece(probability: Tensor, target: Tensor, num_bins: int = 15) -> Tensor:
    r"""Expected calibration error of the predicted class over bins of equal counts.

    The formula of :func:`top_label_ece`; the bins hold as many rows as each other, up to one, so that none is nearly
    empty. Where a border parts equal confidences, their outcomes are shared out evenly.

    Args:
        probability: of each class, ``(*batch, n, C)``, rows summing to one; no logits.
        target: the true classes, ``(*batch, n)``.
        num_bins: number of bins; with fewer rows each has a bin of its own.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the probability.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, nothing to score, NaN, or rows that do not sum to one.

    Source:
        Nguyen and O'Connor (2015), Posterior calibration and exploratory analysis for natural language processing
        models; top-label as in Mukhoti et al. (2020), Calibrating deep neural networks using focal loss.

    Example:
        >>> adaptive_ece(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 1, 1]), num_bins=1)
        tensor(0.1333)
    """
    check_count("num_bins", num_bins)
    p, label = check_probability(probability, target)
    return _equal_mass(*_top_label(p, label), num_bins).expected.to(p.dtype)


def mce(probability: Tensor, target: Tensor, num_bins: int = 15) -> Tensor:
    r"""Maximum calibration error of the predicted class, :math:`\max_b |\mathrm{acc}_b - \mathrm{conf}_b|`.

    The bins are those of :func:`top_label_ece`. A bin with a single row is often the one: read it with its count.

    Args:
        probability: of each class, ``(*batch, n, C)``, rows summing to one; no logits.
        target: the true classes, ``(*batch, n)``.
        num_bins: number of bins of equal width.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the probability.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, nothing to score, NaN, or rows that do not sum to one.

    Source:
        Naeini et al. (2015), Obtaining well calibrated probabilities using Bayesian binning.

    Example:
        >>> mce(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 1, 1]))
        tensor(0.7000)
    """
    check_count("num_bins", num_bins)
    p, label = check_probability(probability, target)
    return _equal_width(*_top_label(p, label), num_bins).maximum.to(p.dtype)


def _top_label(p: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    predicted = p.argmax(-1)
    return p.gather(-1, predicted.unsqueeze(-1)).squeeze(-1), predicted == label


def _is_class(p: Tensor, label: Tensor) -> Tensor:
    """``[y_i = c]``, ``(*batch, n, C)``."""
    return label.unsqueeze(-1) == torch.arange(p.shape[-1], device=p.device)


def _class_pooled(p: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return p.flatten(-2), _is_class(p, label).flatten(-2)


def _equal_width(given: Tensor, outcome: Tensor, num_bins: int) -> ReliabilityBins:
    """Bins of equal width of the pairs ``(*batch, n)``."""
    # Edges are rounded as a probability of k / B is in the same dtype, so that it falls on its edge and not beside it.
    edges = torch.arange(num_bins + 1, dtype=given.dtype, device=given.device) / num_bins
    index = torch.bucketize(given.contiguous(), edges[1:-1])
    batch = given.shape[:-1]
    rows = torch.arange(batch.numel(), device=given.device).unsqueeze(-1)
    flat = (index.reshape(batch.numel(), -1) + num_bins * rows).flatten()

    def total(values: Tensor) -> Tensor:
        sums = torch.zeros(batch.numel() * num_bins, dtype=torch.float64, device=given.device)
        return sums.scatter_add_(0, flat, values.double().reshape(-1)).reshape(*batch, num_bins)

    return _bins(edges.double(), total(torch.ones_like(given)), total(given), total(outcome))


def _equal_mass(given: Tensor, outcome: Tensor, num_bins: int) -> ReliabilityBins:
    """Bins of equal counts of the pairs ``(*batch, n)``."""
    n = given.shape[-1]
    border = torch.arange(num_bins + 1, device=given.device) * n // num_bins
    count = border.diff().double().expand(*given.shape[:-1], -1)
    ordered = given.sort(-1).values
    last = ordered[..., (border[1:] - 1).clamp(min=0)]
    edges = torch.cat([ordered[..., :1], last], dim=-1).double()
    probabilities, outcomes = (
        total.index_select(-1, border).diff(dim=-1)
        for total in (pad(ordered.double().cumsum(-1), (1, 0)), cumulative_sum(given, outcome))
    )
    return _bins(edges, count, probabilities, outcomes)


def _bins(edges: Tensor, count: Tensor, probabilities: Tensor, outcomes: Tensor) -> ReliabilityBins:
    return ReliabilityBins(edges, count, probabilities / count, outcomes / count)
