"""A maximum that moves: where five methods look for it, and what that costs them."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from examples.bayesopt.methods import GRID, METHODS, WARM_UP, Task, follow
from gpseq import plots

COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.VERMILION, plots.PINK)


def main() -> None:
    """Run all methods on one task, print their regret and cost, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/bayesopt"), help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="fewer steps")
    parser.add_argument("--seed", type=int, default=10, help="which task; the setting was chosen on 0 to 3")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    task = Task.draw(WARM_UP + 10 if args.smoke else 400, args.seed)
    steps = torch.arange(task.num_steps, dtype=torch.float64)
    objective = task(GRID.unsqueeze(-1), steps)  # (grid, steps)
    figure = plots.new_figure(10, 7.5)
    panels = figure.subplot_mosaic("ABC;DEF")
    for (name, make), colour, panel in zip(METHODS.items(), COLOURS, "ABCDE", strict=True):
        trace = follow(task, make, args.seed)
        print(
            f"{name:>25}: mean regret {statistics.mean(trace.regret):.3f}; "
            f"{1e3 * statistics.median(trace.seconds):.0f} CPU ms a step, {trace.numbers[-1]:,} numbers at the end"
        )
        ax = panels[panel]
        extent = (-0.5, task.num_steps - 0.5, 0.0, 1.0)
        ax.imshow(objective, origin="lower", aspect="auto", extent=extent, cmap="Greys", vmin=0, vmax=1.8)
        best = GRID[objective.argmax(0)]
        best[1:][(best[1:] - best[:-1]).abs() > 0.1] = torch.nan  # from one peak to the other
        ax.plot(steps, best, color="black", linewidth=1.0, label="maximum")
        ax.plot(steps[WARM_UP:], trace.x, ".", color=colour, markersize=4, label="chosen")
        ax.axvline(WARM_UP - 0.5, color="0.6", linewidth=0.8, linestyle=(0, (4, 2)))
        ax.set_title(name, loc="left", fontsize=9)
        plots.style_axes(ax, "step" if panel in "DE" else "", "x" if panel in "AD" else "")
        panels["F"].plot(steps[WARM_UP:], torch.tensor(trace.regret).cumsum(0), color=colour, label=name)
    plots.style_axes(panels["F"], "step", "")
    panels["F"].set_title("cumulative regret", loc="left", fontsize=9)
    panels["F"].legend(fontsize=8, frameon=False, loc="upper left")
    path = args.out / "bayesopt.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
