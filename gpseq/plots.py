"""Pictures of streams. Every function draws on axes that it is given; nothing touches pyplot or global settings.

matplotlib is imported when a picture is drawn: it comes with ``pip install 'gpseq[cli]'``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gpseq.storage import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which readers with any kind of colour vision tell apart.
BLUE, ORANGE, GREEN, VERMILION, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7F7F7F"

#: Half the width of a central 95 % interval, in standard deviations.
BAND = 1.96


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


def plot_past_errors(
    axes: Axes | Sequence[Axes], errors: Mapping[str, ArrayLike], error_label: str = "RMSE on held-out rows"
) -> None:
    """Draw how well each past chunk is still known as the stream goes on: one heat map a method, one colour scale.

    A row is a chunk; read along it to the right to see what later chunks do to the memory of it.

    Args:
        axes: one axes for each method.
        errors: name of the method -> ``(S, S)``; entry ``[s, c]`` is the error on the held-out rows of chunk ``c``
            after chunk ``s`` was learnt, NaN where there is none (``c > s``, or nothing held out).
        error_label: label of the colour bar, with the unit.

    Raises:
        ValueError: the number of axes is not that of the methods, or a matrix is not square.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes = [axes] if not isinstance(axes, Sequence | np.ndarray) else list(axes)
    matrices = {name: np.asarray(matrix, float) for name, matrix in errors.items()}
    if len(axes) != len(matrices):
        raise ValueError(f"axes: one for each of {len(matrices)} methods, got {len(axes)}.")
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"errors[{name!r}] must have shape (S, S), got {matrix.shape}.")
    known = np.concatenate([matrix[matrix > 0] for matrix in matrices.values()])
    norm = LogNorm(known.min(), max(known.max(), 1.01 * known.min())) if len(known) else None

    for index, (ax, (name, matrix)) in enumerate(zip(axes, matrices.items(), strict=True)):
        edges = np.arange(len(matrix) + 1) + 0.5
        mesh = ax.pcolormesh(edges, edges, np.ma.masked_invalid(matrix.T), cmap="viridis_r", norm=norm)
        mesh.set_edgecolor("white")
        mesh.set_linewidth(0.5 if len(matrix) <= 20 else 0)
        style_axes(ax, "chunks learnt", "past chunk" if index == 0 else "")
        ax.grid(False)
        ax.set_title(name, loc="left", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        ax.set_aspect("auto")
    bar = axes[0].figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12)
    if norm is not None:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label(error_label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def plot_task_scores(
    axes: Axes | Sequence[Axes], scores: Mapping[str, ArrayLike], names: Sequence[str], score_label: str = "accuracy"
) -> None:
    """Draw a score between 0 and 1 on every past task after every later one, with its numbers in per cent.

    Args:
        axes: one axes for each method.
        scores: name of the method -> ``(T, T)``; entry ``[k, j]`` is the score on task ``j`` after task ``k`` was
            learnt, NaN where there is none.
        names: of the tasks, T.
        score_label: label of the colour bar.

    Raises:
        ValueError: the number of axes is not that of the methods, or a matrix has not the shape of the names.
    """
    axes = [axes] if not isinstance(axes, Sequence | np.ndarray) else list(axes)
    if len(axes) != len(scores):
        raise ValueError(f"axes: one for each of {len(scores)} methods, got {len(axes)}.")
    ticks = np.arange(len(names)) + 1
    edges = np.arange(len(names) + 1) + 0.5
    for index, (ax, (name, given)) in enumerate(zip(axes, scores.items(), strict=True)):
        matrix = np.asarray(given, float)
        if matrix.shape != (len(names), len(names)):
            raise ValueError(f"scores[{name!r}] must have shape {(len(names), len(names))}, got {matrix.shape}.")
        mesh = ax.pcolormesh(edges, edges, np.ma.masked_invalid(matrix.T), cmap="viridis", vmin=0, vmax=1)
        mesh.set_edgecolor("white")
        for (k, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                color = "white" if value < 0.6 else "black"
                ax.text(k + 1, j + 1, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
        style_axes(ax, "tasks learnt", "task" if index == 0 else "")
        ax.grid(False)
        ax.set_title(f"{name}: {100 * matrix[-1].mean():.0f} % at the end", loc="left", fontsize=9)
        ax.set_xticks(ticks)
        ax.set_yticks(ticks, names if index == 0 else [""] * len(names))
    bar = axes[0].figure.colorbar(mesh, ax=axes, pad=0.01, aspect=14)
    bar.set_label(score_label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def plot_inducing(ax: Axes, location: ArrayLike, label: str = "inducing keys") -> None:
    """Mark where inducing points or keys are: triangles at the lower edge of the axes.

    Args:
        ax: where to draw; the range of its values stays as it is.
        location: ``(M,)``.
        label: name in the legend.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_inducing(ax, [0.0, 2.0])
        >>> ax.lines[0].get_xdata().tolist()
        [0.0, 2.0]
    """
    location = np.asarray(location)
    edge: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 4}
    height = np.full(location.shape, 0.02)
    ax.plot(location, height, "^", color=VERMILION, markersize=5, markeredgewidth=0, label=label, **edge)


def plot_kernel_sum(ax: Axes, query: ArrayLike, parts: ArrayLike, label: str = "sum", color: str = BLUE) -> None:
    """Draw what each token adds to the output of attention, and the sum.

    Args:
        ax: where to draw.
        query: ``(n,)``, increasing.
        parts: ``(n, T)``, a column a token: its weight times its value.
        label: name of the sum in the legend.
        color: of the sum.

    Raises:
        ValueError: the parts have not one row a query.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_kernel_sum(ax, [0, 1], [[1.0, 2.0], [3.0, 4.0]])
        >>> [(line.get_label(), line.get_ydata().tolist()) for line in ax.lines][::2]
        [('tokens', [1.0, 3.0]), ('sum', [3.0, 7.0])]
    """
    query, parts = np.asarray(query), np.asarray(parts)
    if parts.ndim != 2 or len(parts) != len(query):
        raise ValueError(f"parts: expected shape ({len(query)}, T), a row for each query, got {parts.shape}.")
    for index, part in enumerate(parts.T):
        # A label that begins with an underscore stays out of the legend.
        name = "tokens" if index == 0 else "_token"
        ax.plot(query, part, color=GREY, linewidth=0.8, label=name, zorder=2)
    ax.plot(query, parts.sum(-1), color=color, linewidth=2.0, label=label, zorder=3)


def plot_attention_weights(
    ax: Axes, weights: ArrayLike, query: ArrayLike | None = None, label: str = "weight of the value"
) -> None:
    """Draw the matrix that multiplies the values, one column a token; white is zero.

    Args:
        ax: where to draw.
        weights: ``(n, T)``; negative entries have a colour of their own.
        query: ``(n,)`` increasing, what stands along the vertical axis; ``None`` counts the queries.
        label: of the colour bar.

    Raises:
        ValueError: the weights are no matrix, or have not one row a query.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_attention_weights(ax, [[1.0, 0.5], [0.5, 1.0]])
        >>> ax.collections[0].get_array().shape
        (2, 2)
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    matrix = np.asarray(weights, float)
    if matrix.ndim != 2:
        raise ValueError(f"weights: expected shape (n, T), got {matrix.shape}.")
    rows = np.arange(len(matrix)) + 1 if query is None else np.asarray(query)
    if rows.shape != (len(matrix),):
        raise ValueError(f"query: expected shape ({len(matrix)},), one for each row of weights, got {rows.shape}.")
    shades = LinearSegmentedColormap.from_list("weights", [ORANGE, "white", BLUE])
    most = max(np.abs(matrix).max(initial=0.0), np.finfo(float).tiny)
    columns = np.arange(matrix.shape[1]) + 1
    mesh = ax.pcolormesh(columns, rows, matrix, cmap=shades, vmin=-most, vmax=most, shading="nearest", rasterized=True)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, aspect=25)
    if matrix.any():  # colours that nothing has are left out
        bar.ax.set_ylim(matrix.min(initial=0.0), matrix.max(initial=0.0))
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def style_axes(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Give axes the look of every picture here: no box, a faint grid, small labels.

    Args:
        ax: the axes.
        xlabel: label of the horizontal axis, with its unit.
        ylabel: label of the vertical axis, with its unit.
    """
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.6")
    ax.grid(axis="y", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, color="0.6")
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)


def date_axis(ax: Axes, time: ArrayLike) -> None:
    """Short labels for dates, which matplotlib would otherwise write out in full at every tick.

    Args:
        ax: the axes; they stay as they are where times are numbers.
        time: what is drawn against, numbers or datetimes.
    """
    first = np.asarray(time).ravel()[:1]
    if first.dtype.kind == "M" or (first.size and isinstance(first[0], datetime)):
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator()
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def legend_above(ax: Axes) -> None:
    """A legend in one line above the axes, where it covers nothing.

    Args:
        ax: the axes.
    """
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=8, frameon=False, fontsize=8, borderaxespad=0.2)


def new_figure(width: float = 9.0, height: float = 6.5) -> Figure:
    """An empty figure that fits its labels and needs no display.

    Args:
        width: in inches.
        height: in inches.

    Example:
        >>> figure = new_figure()
        >>> top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need the package matplotlib: pip install 'gpseq[cli]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, atomically: an error leaves the old picture.

    Args:
        figure: the picture.
        path: its name says the format: .png, .pdf, .svg, ...

    Raises:
        ValueError: matplotlib does not know the format.
        OSError: the file cannot be written.
    """
    data = io.BytesIO()
    figure.savefig(data, format=Path(path).suffix.lstrip(".").lower() or "png", dpi=150)
    replace_file(path, data.getvalue())
