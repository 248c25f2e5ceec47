"""Colours, axes and files that all pictures share."""

from __future__ import annotations

import io
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

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
