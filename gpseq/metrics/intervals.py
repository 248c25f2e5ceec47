"""How good intervals and quantiles are."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from gpseq.checks import check_number
from gpseq.metrics.arguments import check_like, check_scores, finite, no_nan, refuse


def gaussian_interval(mean: Tensor, variance: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Central interval of normal distributions, :math:`m \mp z \sqrt v` with :math:`\Phi(z) = (1 + \text{level}) / 2`.

    Args:
        mean: ``(*batch, n)``.
        variance: ``(*batch, n)``, not negative; of observations, with the noise.
        level: probability of the interval, between 0 and 1.

    Returns:
        Lower and upper ends, ``(*batch, n)`` each, in the dtype of the mean.

    Raises:
        TypeError: mean or variance is no floating-point tensor.
        ValueError: a wrong shape, nothing there, NaN, a negative variance, or another level.

    Example:
        >>> gaussian_interval(torch.tensor([1.0]), torch.tensor([4.0]))
        (tensor([-2.9199]), tensor([4.9199]))
    """
    centre, spread = check_moments(mean, variance)
    expected = "a probability between 0 and 1"
    probability = check_number("level", level, above=0.0, expected=expected)
    if probability >= 1:
        raise ValueError(f"level: expected {expected}, got {level!r}.")
    width = NormalDist().inv_cdf((1 + probability) / 2) * spread.sqrt()
    return centre - width, centre + width


def interval_coverage(lower: Tensor, upper: Tensor, target: Tensor) -> Tensor:
    r"""Fraction of targets in their intervals, ends included, :math:`\tfrac1n \sum_i [l_i \le y_i \le u_i]`.

    It should be near the level of the intervals; wide ones are no better for covering more. Read it beside
    :func:`interval_width`.

    Args:
        lower: ``(*batch, n)``; may be infinite.
        upper: ``(*batch, n)``, not below the lower end; may be infinite.
        target: what was observed, ``(*batch, n)``.

    Returns:
        ``(*batch)``, from 0 to 1, in the dtype of the lower end.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a wrong shape, nothing to score, NaN, or an upper end below the lower one.

    Source:
        Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, section 6.2.

    Example:
        >>> interval_coverage(torch.zeros(4), torch.ones(4), torch.tensor([0.5, 1.0, 1.5, -2.0]))
        tensor(0.5000)
    """
    low, high = _check_ends(lower, upper)
    observed = check_like("target", check_scores("target", target), "lower", low)
    refuse(no_nan("target", observed))
    return ((low <= observed) & (observed <= high)).double().mean(-1).to(low.dtype)


def interval_width(lower: Tensor, upper: Tensor) -> Tensor:
    r"""Mean width of intervals, :math:`\tfrac1n \sum_i (u_i - l_i)`.

    Args:
        lower: ``(*batch, n)``.
        upper: ``(*batch, n)``, not below the lower end.

    Returns:
        ``(*batch)``, in the unit of the target and the dtype of the lower end.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a wrong shape, nothing to score, NaN, or an upper end below the lower one.

    Example:
        >>> interval_width(torch.zeros(2), torch.tensor([1.0, 2.0]))
        tensor(1.5000)
    """
    low, high = _check_ends(lower, upper)
    return (high - low).double().mean(-1).to(low.dtype)


def pinball_loss(quantile: Tensor, target: Tensor, level: float | Tensor) -> Tensor:
    r"""Mean loss of predicted quantiles, which the true quantile of that level minimises.

    .. math:: \tfrac1n \sum_i \max\bigl( \alpha (y_i - q_i),\; (\alpha - 1) (y_i - q_i) \bigr)

    At level 0.5 it is half the mean absolute error.

    Args:
        quantile: predicted quantiles, ``(*batch, n)``.
        target: what was observed, ``(*batch, n)``, or its last dimensions only, where several levels are predicted.
        level: of the quantiles, between 0 and 1; a tensor broadcasts to the quantiles, as ``(Q, 1)`` beside ``(Q, n)``.

    Returns:
        ``(*batch)``, in the unit of the target and the dtype of the quantile.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes that do not fit, nothing to score, NaN, infinite numbers, or levels outside.

    Source:
        Koenker and Bassett (1978), Regression quantiles.

    Example:
        >>> pinball_loss(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), level=0.9)
        tensor(0.5000)
    """
    predicted, observed = check_scores("quantile", quantile), check_scores("target", target)
    rank = observed.dim()
    if observed.shape != predicted.shape[-rank:]:
        raise ValueError(
            f"target: expected shape {tuple(predicted.shape)}, as quantile has, or its last dimensions, got "
            f"{tuple(observed.shape)}."
        )
    if observed.device != predicted.device:
        raise ValueError(f"target: expected it on {predicted.device}, where quantile is, got {observed.device}.")
    expected = "between 0 and 1"
    if isinstance(level, Tensor):
        alpha = level.to(predicted)
        try:
            fits = torch.broadcast_shapes(alpha.shape, predicted.shape) == predicted.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"level: expected a shape that broadcasts to {tuple(predicted.shape)}, as quantile has, got "
                f"{tuple(alpha.shape)}."
            )
        within = (alpha > 0) & (alpha < 1)
        refuse((~within, lambda: f"level: expected levels {expected}, got {float(alpha[~within][0]):.4g}."))
    else:
        number = check_number("level", level, above=0.0, expected=f"a level {expected}")
        if number >= 1:
            raise ValueError(f"level: expected a level {expected}, got {level!r}.")
        alpha = torch.full((), number, dtype=predicted.dtype, device=predicted.device)
    refuse(finite("quantile", predicted), finite("target", observed))
    error = observed - predicted
    return torch.maximum(alpha * error, (alpha - 1) * error).double().mean(-1).to(predicted.dtype)


def check_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Finite means and finite variances that are not negative, ``(*batch, n)`` each.

    Args:
        mean: what came.
        variance: what came.

    Returns:
        Both, in float32 where they were in half precision.

    Raises:
        TypeError: one is no floating-point tensor.
        ValueError: a wrong shape, nothing there, NaN, infinity, or a negative variance.
    """
    centre = check_scores("mean", mean)
    spread = check_like("variance", check_scores("variance", variance), "mean", centre)
    refuse(
        finite("mean", centre),
        finite("variance", spread),
        (spread < 0, lambda: f"variance: expected no number below 0, got {float(spread.min()):.4g}."),
    )
    return centre, spread


def _check_ends(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    low = check_scores("lower", lower)
    high = check_like("upper", check_scores("upper", upper), "lower", low)
    crossed = high < low
    refuse(
        no_nan("lower", low),
        no_nan("upper", high),
        (crossed, lambda: f"upper: expected ends not below the lower ones, got {int(crossed.sum())} that are."),
    )
    return low, high
