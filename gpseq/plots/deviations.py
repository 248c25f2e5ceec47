"""Pictures of standard deviations that were found in two ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from gpseq.plots.style import BLUE, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_deviations(
    ax: Axes,
    reference: ArrayLike,
    found: ArrayLike,
    label: str = "model",
    color: str = BLUE,
    reference_label: str = "standard deviation by Monte Carlo",
    found_label: str = "standard deviation that was found",
) -> None:
    """Draw standard deviations against those that they should be.

    Points below the dashed diagonal are too small. Both axes are logarithmic and have the same limits, which grow with
    every call: call it once for each method on the same axes.

    Args:
        ax: where to draw.
        reference: ``(n,)`` or any other shape, positive; what is true, or nearly so.
        found: of the same shape, positive.
        label: the method's name in the legend.
        color: of the points.
        reference_label: label of the horizontal axis, with its unit.
        found_label: label of the vertical axis, with its unit.

    Raises:
        ValueError: the shapes do not fit, or a number is not positive.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_deviations(ax, [1.0, 2.0], [0.9, 1.5], label="marginal")
        >>> [line.get_label() for line in ax.lines]
        ['equal', 'marginal']
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    true, seen = np.asarray(reference, float).ravel(), np.asarray(found, float).ravel()
    if np.shape(reference) != np.shape(found):
        raise ValueError(f"found: expected shape {np.shape(reference)}, as reference has, got {np.shape(found)}.")
    for name, values in (("reference", true), ("found", seen)):
        if not (values > 0).all():
            raise ValueError(f"{name}: expected positive numbers, got {values.min() if len(values) else 'none'}.")
    if not len(true):
        raise ValueError("reference: expected at least one number, got none.")
    first = not any(line.get_label() == "equal" for line in ax.lines)
    low, high = min(true.min(), seen.min()) / 1.15, max(true.max(), seen.max()) * 1.15
    if not first:
        low, high = min(low, ax.get_xlim()[0]), max(high, ax.get_xlim()[1])
    ax.set_xscale("log")
    ax.set_yscale("log")
    if first:
        ax.axline((1, 1), (2, 2), color="black", linewidth=0.8, linestyle=(0, (4, 2)), label="equal", zorder=2)
    ax.plot(true, seen, "o", color=color, markersize=3, markeredgewidth=0, alpha=0.6, label=label, zorder=3)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    for axis in (ax.xaxis, ax.yaxis):  # 0.5 in place of 5 x 10^-1, also where the limits span less than a decade
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 4 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    style_axes(ax, reference_label, found_label)
