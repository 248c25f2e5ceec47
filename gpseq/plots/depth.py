"""Pictures of what happens along the depth of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gpseq.plots.style import BLUE, GREEN, ORANGE, PINK, VERMILION, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: In the order in which they are taken.
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PINK)


def plot_depth_spread(
    ax: Axes,
    predictions: Any,
    labels: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
    quantiles: tuple[float, float] = (0.1, 0.9),
    sizes: ArrayLike | None = None,
) -> None:
    """Draw how far a student of :class:`gpseq.reconfiguration.Distiller` spreads at each of its steps.

    A line is the median over the inputs, the band around it holds those between two quantiles. Of a model that answers
    token by token each token counts as an input.

    Args:
        ax: where to draw.
        predictions: by draws, ``gpseq.predict(student, x)``, with ``scores["spread.depth"]``; or such a score itself,
            ``(B, L)``; or several of these in a list or a tuple.
        labels: names in the legend, one for each; ``None`` names none.
        colors: one for each; ``None`` takes them in turn.
        quantiles: lower and upper edge of the band, from 0 to 1.
        sizes: ``(L,)``, positive: what spreads are relative to, such as the teacher's increments,
            ``distiller.rollout.increments``; ``None`` draws them in the unit of the states.

    Raises:
        ValueError: a prediction has no such score, or the shapes, labels, colours or quantiles do not fit.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_depth_spread(ax, [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]], labels=["known", "strange"])
        >>> [(line.get_label(), line.get_ydata().tolist()) for line in ax.lines]
        [('known', [2.0, 3.0]), ('strange', [5.0, 6.0])]
    """
    from matplotlib.ticker import MaxNLocator

    spreads = [_depth(value) for value in _several(predictions)]
    if not spreads:
        raise ValueError("predictions: expected at least one, got none.")
    low, high = quantiles
    if not 0 <= low <= high <= 1:
        raise ValueError(f"quantiles: expected two numbers from 0 to 1 that do not decrease, got {quantiles}.")
    for name, given in (("labels", labels), ("colors", colors)):
        if given is not None and (isinstance(given, str) or len(given) != len(spreads)):
            raise ValueError(f"{name}: expected {len(spreads)}, one for each prediction, got {given!r}.")
    relative = None if sizes is None else _array(sizes)
    if relative is not None:
        for spread in spreads:
            if relative.shape != spread.shape[1:] or not (relative > 0).all():
                raise ValueError(
                    f"sizes: expected {spread.shape[1]} positive numbers, one for each step, got {relative.tolist()}."
                )
        spreads = [spread / relative for spread in spreads]
    for number, spread in enumerate(spreads):
        color = COLOURS[number % len(COLOURS)] if colors is None else colors[number]
        name = f"_spread {number}" if labels is None else labels[number]  # what begins so stays out of the legend
        steps = np.arange(1, spread.shape[1] + 1)
        lower, middle, upper = np.quantile(spread, [low, 0.5, high], axis=0)
        ax.fill_between(steps, lower, upper, color=color, alpha=0.18, linewidth=0, zorder=2)
        ax.plot(steps, middle, color=color, linewidth=1.8, marker="o", markersize=4, label=name, zorder=3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    style_axes(ax, "step", "spread" if relative is None else "spread, relative to the increment")
    ax.set_ylim(bottom=0)


def _several(predictions: Any) -> list[Any]:
    """A list of predictions, whether there is one or there are more."""
    if hasattr(predictions, "scores") or isinstance(predictions, np.ndarray) or hasattr(predictions, "detach"):
        return [predictions]
    given = list(predictions)
    if given and all(isinstance(value, Sequence) and np.ndim(value) == 1 for value in given):
        return [predictions]  # the rows of one
    return given


def _depth(prediction: Any) -> np.ndarray:
    """Spreads ``(n, L)`` of a prediction."""
    if hasattr(prediction, "scores"):
        scores = prediction.scores
        if not isinstance(scores, Mapping) or "spread.depth" not in scores:
            raise ValueError(
                "predictions: expected scores with 'spread.depth', as gpseq.predict(student, x) gives by draws, got "
                f"{', '.join(scores or ()) or 'none'}."
            )
        prediction = scores["spread.depth"]
    spread = _array(prediction)
    if spread.ndim < 2 or not spread.size:
        raise ValueError(f"predictions: expected spreads (B, L), got shape {spread.shape}.")
    return spread.reshape(-1, spread.shape[-1])


def _array(values: Any) -> np.ndarray:
    """As numbers of numpy, without a graph and from any device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, float)
