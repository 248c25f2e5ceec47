"""Pictures of streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gpseq.plots.style import BAND, BLUE, GREY, ORANGE, date_axis, legend_above, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_data(ax: Axes, time: ArrayLike, target: ArrayLike, held_out: ArrayLike | None = None) -> None:
    """Draw what was observed: dots for rows that were learnt, open circles for rows that were held out.

    Args:
        ax: where to draw.
        time: ``(n,)``, numbers or datetimes.
        target: ``(n,)``.
        held_out: ``(n,)`` bool; ``None`` means that all were learnt.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_data(ax, [0.0, 1.0, 2.0], [5.0, 6.0, 7.0], held_out=[False, True, False])
        >>> [(line.get_label(), len(line.get_xdata())) for line in ax.lines]
        [('learnt', 2), ('held out', 1)]
    """
    time, target = np.asarray(time), np.asarray(target)
    held = np.zeros(len(time), bool) if held_out is None else np.asarray(held_out, bool)
    size = 4.0 if len(time) <= 1000 else 2.5
    learnt = {"marker": "o", "markersize": 0.7 * size, "color": GREY, "alpha": 0.8, "markeredgewidth": 0}
    circle = {"marker": "o", "markersize": size, "markerfacecolor": "white", "markeredgecolor": ORANGE}
    if (~held).any():
        ax.plot(time[~held], target[~held], linestyle="", label="learnt", zorder=2, **learnt)  # type: ignore[arg-type]
    if held.any():
        ax.plot(time[held], target[held], linestyle="", label="held out", zorder=2.5, **circle)  # type: ignore[arg-type]


def plot_posterior(
    ax: Axes,
    time: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike | None = None,
    label: str = "posterior",
    color: str = BLUE,
) -> None:
    """Draw a posterior mean and, where a standard deviation is given, its 95 % band.

    Args:
        ax: where to draw.
        time: ``(n,)``, increasing numbers or datetimes.
        mean: ``(n,)``.
        std: ``(n,)``, of the function or of new observations, as the caller wants the band to be read.
        label: the method's name in the legend.
        color: of the line and the band.
    """
    mean = np.asarray(mean)
    if std is None:
        ax.plot(np.asarray(time), mean, color=color, linewidth=2.0, label=label, zorder=3)
    else:
        width = BAND * np.asarray(std)
        plot_band(ax, time, mean, mean - width, mean + width, label, color)


def plot_band(
    ax: Axes,
    time: ArrayLike,
    middle: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    label: str = "posterior",
    color: str = BLUE,
) -> None:
    """Draw a line in its band, of any shape: quantiles of counts, say.

    Args:
        ax: where to draw.
        time: ``(n,)``, increasing numbers or datetimes.
        middle: ``(n,)``, the line.
        lower: ``(n,)``, the lower edge of the band.
        upper: ``(n,)``, the upper one.
        label: the method's name in the legend.
        color: of the line and the band.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_band(ax, [0, 1], middle=[2, 3], lower=[1, 1], upper=[4, 6], label="median, 95 % band")
        >>> ax.lines[0].get_ydata().tolist()
        [2, 3]
    """
    time = np.asarray(time)
    ax.fill_between(time, np.asarray(lower), np.asarray(upper), color=color, alpha=0.2, linewidth=0, zorder=1)
    ax.plot(time, np.asarray(middle), color=color, linewidth=2.0, label=label, zorder=3)


def plot_exact(ax: Axes, time: ArrayLike, mean: ArrayLike, std: ArrayLike | None = None) -> None:
    """Draw the exact posterior beneath an approximate one: a thin dashed mean and, with ``std``, dashed 95 % limits.

    Args:
        ax: where to draw.
        time: ``(n,)``, increasing numbers or datetimes.
        mean: ``(n,)``.
        std: ``(n,)``.
    """
    time, mean = np.asarray(time), np.asarray(mean)
    style: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 2)), "zorder": 3.5}
    ax.plot(time, mean, linewidth=0.8, label="exact GP", **style)
    if std is not None:
        for side in (-BAND, BAND):
            ax.plot(time, mean + side * np.asarray(std), linewidth=0.5, **style)


def plot_borders(ax: Axes, borders: ArrayLike) -> None:
    """Mark where a chunk ends and the next begins: thin lines behind everything.

    Args:
        ax: where to draw.
        borders: times, ``(n,)`` numbers or datetimes.
    """
    for border in np.asarray(borders):
        ax.axvline(border, color="0.8", linewidth=0.7, zorder=0)


def plot_stream(
    ax: Axes,
    time: ArrayLike,
    target: ArrayLike,
    grid: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    held_out: ArrayLike | None = None,
    borders: ArrayLike = (),
    exact_mean: ArrayLike | None = None,
    exact_std: ArrayLike | None = None,
    label: str = "stream",
    time_label: str = "time",
    target_label: str = "target",
) -> None:
    """Draw a stream: the data, the posterior with its 95 % band, the chunk borders, and the exact GP for comparison.

    Args:
        ax: where to draw.
        time: ``(n,)`` times of the data, numbers or datetimes.
        target: ``(n,)``.
        grid: ``(g,)`` increasing times at which the posteriors are given.
        mean: ``(g,)`` posterior mean of the stream.
        std: ``(g,)`` its standard deviation.
        held_out: ``(n,)`` bool, rows that were not learnt.
        borders: ``(c,)`` times at which a new chunk begins.
        exact_mean: ``(g,)`` posterior mean of the exact GP.
        exact_std: ``(g,)`` its standard deviation.
        label: name of the method, for the legend.
        time_label: label of the time axis, with its unit.
        target_label: label of the other axis, with its unit.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_stream(ax, [0, 1], [3.0, 4.0], grid=[0, 0.5, 1], mean=[3, 3.5, 4], std=[1, 1, 1], time_label="year")
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['learnt', 'stream, 95 % band']
    """
    plot_borders(ax, borders)
    plot_data(ax, time, target, held_out)
    plot_posterior(ax, grid, mean, std, label=f"{label}, 95 % band")
    if exact_mean is not None:
        plot_exact(ax, grid, exact_mean, exact_std)
    style_axes(ax, time_label, target_label)
    date_axis(ax, time)
    ax.set_xlim(np.asarray(grid)[0], np.asarray(grid)[-1])
    legend_above(ax)
