"""Pictures of what later data do to what was learnt before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from gpseq.plots.style import style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_past_errors(
    axes: Axes | Sequence[Axes],
    errors: Mapping[str, ArrayLike],
    error_label: str = "RMSE on held-out rows",
    unit: str = "chunk",
) -> None:
    """Draw how well each past chunk is still known as the stream goes on: one heat map a method, one colour scale.

    A row is a chunk; read along it to the right to see what later chunks do to the memory of it.

    Args:
        axes: one axes for each method.
        errors: name of the method -> ``(S, S)``; entry ``[s, c]`` is the error on the held-out rows of chunk ``c``
            after chunk ``s`` was learnt, NaN where there is none (``c > s``, or nothing held out).
        error_label: label of the colour bar, with the unit.
        unit: what the stream consists of, such as ``"task"``, for the labels of the axes.

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
        style_axes(ax, f"{unit}s learnt", f"past {unit}" if index == 0 else "")
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
