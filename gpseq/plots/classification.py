"""Pictures of classes and their probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from gpseq.plots.style import BLUE, ORANGE, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_decision(
    ax: Axes, x: ArrayLike, label: ArrayLike, grid: tuple[ArrayLike, ArrayLike], probability: ArrayLike
) -> None:
    """Draw two classes in the plane, the probability of the second one, and where it is one half.

    Args:
        ax: where to draw.
        x: ``(n, 2)``, what was learnt.
        label: ``(n,)``, 0 or 1.
        grid: coordinates ``(a,)`` of the columns and ``(b,)`` of the rows of ``probability``.
        probability: ``(b, a)``, of class 1.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_decision(ax, [[0, 0], [1, 1]], [0, 1], ([0, 1], [0, 1]), [[0.1, 0.4], [0.6, 0.9]])
        >>> [line.get_label() for line in ax.lines]
        ['class 0', 'class 1']
    """
    from matplotlib.colors import LinearSegmentedColormap

    x, label = np.asarray(x), np.asarray(label)
    columns, rows, probability = np.asarray(grid[0]), np.asarray(grid[1]), np.asarray(probability)
    shades = LinearSegmentedColormap.from_list("classes", [BLUE, "white", ORANGE])
    ax.pcolormesh(
        columns, rows, probability, cmap=shades, vmin=0, vmax=1, alpha=0.35, shading="nearest", rasterized=True
    )
    ax.contour(columns, rows, probability, levels=[0.5], colors="black", linewidths=1.5, zorder=3)
    for value, marker, color in ((0, "o", BLUE), (1, "s", ORANGE)):
        members = x[label == value]
        ax.plot(
            members[:, 0], members[:, 1], marker, color=color, markersize=3, markeredgewidth=0, label=f"class {value}"
        )


def plot_reliability(
    ax: Axes,
    confidence: ArrayLike,
    accuracy: ArrayLike,
    count: ArrayLike | None = None,
    edges: ArrayLike | None = None,
    label: str = "model",
    color: str = BLUE,
) -> None:
    """Draw a reliability diagram: how often what was said with some confidence was right.

    Points below the dashed diagonal are too sure of themselves, points above it not sure enough. Call it once for each
    method on the same axes.

    Args:
        ax: where to draw.
        confidence: ``(B,)``, mean confidence of each bin, as in :class:`gpseq.metrics.ReliabilityBins`; NaN where the
            bin is empty.
        accuracy: ``(B,)``.
        count: ``(B,)``, number of predictions in each bin: points get larger with it. ``None`` makes all the same.
        edges: ``(B + 1,)``, edges of the bins; with them, and ``count``, bars at the bottom show the share of each bin.
            One method in a picture can have them.
        label: the method's name in the legend.
        color: of the points and bars.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_reliability(ax, [0.4, 0.9], [0.5, 0.7], count=[10, 30])
        >>> [line.get_label() for line in ax.lines]
        ['calibrated', 'model']
    """
    said, right = np.asarray(confidence, float), np.asarray(accuracy, float)
    if said.ndim != 1 or right.shape != said.shape:
        raise ValueError(f"accuracy: expected shape (B,), as confidence has, got {right.shape} beside {said.shape}.")
    number = np.ones(len(said)) if count is None else np.asarray(count, float)
    if number.shape != said.shape:
        raise ValueError(f"count: expected shape {said.shape}, as confidence has, got {number.shape}.")
    share = number / max(number.sum(), 1)
    if edges is not None:
        borders = np.asarray(edges, float)
        if borders.shape != (len(said) + 1,):
            raise ValueError(f"edges: expected shape ({len(said) + 1},), got {borders.shape}.")
        if count is not None:
            # Less than a third of the height, so that the bars stay under the points.
            height = 0.3 * share
            ax.bar(borders[:-1], height, np.diff(borders), align="edge", color=color, alpha=0.2, linewidth=0, zorder=1)
    if not any(line.get_label() == "calibrated" for line in ax.lines):
        ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=(0, (4, 2)), label="calibrated", zorder=2)
    seen = np.isfinite(said) & np.isfinite(right) & (number > 0)
    ax.plot(said[seen], right[seen], color=color, linewidth=1.5, label=label, zorder=3)
    size = 25.0 if count is None else 8 + 150 * share[seen]
    dots = ax.scatter(said[seen], right[seen], size, color=color, edgecolors="white", linewidths=0.7, zorder=3.5)
    dots.set_clip_on(False)  # points at 0 and 1 are shown whole
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    style_axes(ax, "confidence", "accuracy")


def plot_risk_coverage(
    ax: Axes,
    coverage: ArrayLike,
    risk: ArrayLike,
    best: ArrayLike | None = None,
    label: str = "model",
    color: str = BLUE,
    risk_label: str = "error on what is kept",
) -> None:
    """Draw the mean loss on the most certain part of the data against the size of that part.

    Args:
        ax: where to draw.
        coverage: ``(n,)``, increasing, up to 1, as :func:`gpseq.metrics.risk_coverage_curve` returns it.
        risk: ``(n,)``.
        best: ``(n,)``, the risk if the order were that of the losses themselves; dotted.
        label: the method's name in the legend.
        color: of the lines.
        risk_label: label of the vertical axis, with the unit of the loss.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_risk_coverage(ax, [0.5, 1.0], [0.0, 0.2], label="entropy")
        >>> ax.lines[0].get_ydata().tolist()
        [0.0, 0.2]
    """
    kept, loss = np.asarray(coverage, float), np.asarray(risk, float)
    curves = [("risk", loss, "-", label)] + ([] if best is None else [("best", np.asarray(best, float), ":", "_best")])
    for name, values, linestyle, shown in curves:
        if kept.ndim != 1 or values.shape != kept.shape:
            raise ValueError(f"{name}: expected shape (n,), as coverage has, got {values.shape} beside {kept.shape}.")
        ax.plot(kept, values, color=color, linewidth=1.8, linestyle=linestyle, label=shown, zorder=3)
    ax.set_xlim(0, 1)
    if all(np.min(np.asarray(line.get_ydata())) >= 0 for line in ax.lines):
        ax.set_ylim(bottom=0)
    style_axes(ax, "coverage", risk_label)
