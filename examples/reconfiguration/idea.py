"""The picture of the idea: a teacher's blocks as transitions, and one kernel with the time in their place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gpseq import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Blocks of the teacher, and as many steps of the student; the last state stands for all behind it.
STEPS = 3
#: Where states stand, from the first one on, and the heights of both rows.
PLACES, TEACHER, STUDENT = (1.55, 3.85, 6.15, 8.45), 1.75, 0.0
HEIGHT, RADIUS = 0.52, 0.25


def draw_idea(path: Path) -> None:
    """Two chains through the same states, the teacher's above the student's.

    Args:
        path: of the picture.
    """
    figure = plots.new_figure(10, 3.6)
    ax = figure.subplots()
    blocks = (plots.BLUE, plots.GREEN, plots.VERMILION)
    halves = [(("attention 1", blocks[0]),)]
    halves += [((f"MLP {n}", blocks[n - 1]), (f"attention {n + 1}", blocks[n])) for n in range(1, STEPS)]
    _row(ax, TEACHER, "teacher")
    _row(ax, STUDENT, "student")
    for number, parts in enumerate(halves):
        begin, end = PLACES[number] + RADIUS + 0.13, PLACES[number + 1] - RADIUS - 0.13
        share = (1.0,) if len(parts) == 1 else (0.4, 0.6)  # the longer word needs more room
        left = begin
        for part, (name, color) in zip(share, parts, strict=True):
            _box(ax, left, TEACHER, part * (end - begin), name, color)
            left += part * (end - begin)
        time = f"{number + 1}/{STEPS}" if number + 1 < STEPS else "1"
        _box(ax, begin, STUDENT, end - begin, f"kernel, $t = {time}$", plots.PINK)
        ax.text((begin + end) / 2, TEACHER + 0.43, f"$q(X_{number + 1} \\mid X_{number})$", ha="center", fontsize=9)
        ax.annotate(
            "",
            (PLACES[number + 1], STUDENT - RADIUS),
            (PLACES[number + 1], STUDENT - 0.58),
            arrowprops={"arrowstyle": "->", "color": plots.GREY, "linewidth": 1.0},
        )
        ax.text(PLACES[number + 1], STUDENT - 0.76, f"$s\\,\\epsilon_{number + 1}$", ha="center", fontsize=9)
        ax.annotate(
            "",
            (PLACES[number + 1], STUDENT + RADIUS + 0.06),
            (PLACES[number + 1], TEACHER - RADIUS - 0.06),
            arrowprops={"arrowstyle": "<->", "color": plots.GREY, "linewidth": 1.0, "linestyle": ":"},
        )
    ax.text(PLACES[1] + 0.1, 0.87, "KL", va="center", fontsize=9, color="0.35")
    begin, end = PLACES[0] + RADIUS + 0.13, PLACES[-1] - RADIUS - 0.13
    # One bracket below all kernels, beside the noise.
    ax.plot([begin, begin, end, end], [-0.9, -1.0, -1.0, -0.9], color="0.35", linewidth=1.0)
    ax.text((begin + end) / 2, -1.08, "one set of weights", ha="center", va="top", fontsize=9, color="0.25")
    _box(ax, 0.15, TEACHER, 0.95, "embedding", plots.GREY)
    _box(ax, 0.15, STUDENT, 0.95, "the same", plots.GREY)
    last = PLACES[-1] + RADIUS + 0.13
    _box(ax, last, TEACHER, 0.8, f"MLP {STEPS}", blocks[-1])
    _box(ax, last + 0.8, TEACHER, 0.8, "head", plots.GREY)
    _box(ax, last, STUDENT, 1.6, "the same", plots.GREY)
    ax.set_xlim(-0.65, last + 1.75)
    ax.set_ylim(-1.35, 2.4)
    ax.set_aspect("equal")
    ax.set_axis_off()
    plots.save_figure(figure, path)


def _row(ax: Axes, height: float, name: str) -> None:
    """A line with its states, on which the boxes lie."""
    from matplotlib.patches import Circle

    ax.text(-0.6, height, name, va="center", fontsize=10, fontweight="bold", rotation=90, color="0.25")
    ax.annotate(
        "",
        (PLACES[-1] + 2.1, height),
        (0.05, height),
        arrowprops={"arrowstyle": "->", "color": "0.35", "linewidth": 1.2},
        zorder=1,
    )
    for number, place in enumerate(PLACES):
        ax.add_patch(Circle((place, height), RADIUS, facecolor="white", edgecolor="0.25", linewidth=1.2, zorder=3))
        ax.text(place, height, f"$X_{number}$", ha="center", va="center", fontsize=10, zorder=4)


def _box(ax: Axes, left: float, height: float, width: float, name: str, color: str) -> None:
    """Something with weights."""
    from matplotlib.patches import FancyBboxPatch

    shapes = (("white", 1.0, 2.0), (color, 0.28, 2.5))  # white first: the line below must not shine through
    for shade, alpha, order in shapes:
        box = FancyBboxPatch(
            (left + 0.03, height - HEIGHT / 2),
            width - 0.06,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=shade,
            edgecolor=color,
            alpha=alpha,
            linewidth=1.0,
            zorder=order,
        )
        ax.add_patch(box)
    ax.text(left + width / 2, height, name, ha="center", va="center", fontsize=8.5, zorder=4)
