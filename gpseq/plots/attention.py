"""Pictures of attention as a sum of kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gpseq.plots.style import BLUE, GREY, ORANGE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
