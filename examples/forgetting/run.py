"""Four memories of equal size follow the same series: what each remembers of it at the end, and how well."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from gpseq import plots
from gpseq.features import CompositeFeatures, HippoFeatures, InducingFeatures, PyramidFeatures
from gpseq.models import CapacityWarning, StreamingGP

SIZE = 50
#: Features of the composite that cover the whole past; the others cover the recent window.
LONG = 16
#: The recent windows, as a fraction of the whole series.
RECENT = 1 / 8
NUM_CHUNKS = 10
TOLERANCE = 1e-3
COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.VERMILION)


def make_series(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """100 s of a slow trend, and fast detail that sets in with the last eighth: times, f, f with noise of 0.1."""
    x = torch.arange(num, dtype=torch.float64) * 100 / num
    trend = torch.sin(x / 12) + 0.5 * torch.sin(x / 7 + 1)
    detail = 0.4 * (torch.sin(2.5 * x) + torch.sin(1.8 * x + 2)) * (x > (1 - RECENT) * x.max())
    noise = 0.1 * torch.randn(num, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return x, trend + detail, trend + detail + noise


def make_kernel() -> tuple[Kernel, GaussianLikelihood]:
    """A slow part and a fast part, with hyperparameters that suit the series."""
    slow, fast = ScaleKernel(RBFKernel()).double(), ScaleKernel(RBFKernel()).double()
    for part, lengthscale, variance in ((slow, 10.0, 1.0), (fast, 0.6, 0.2)):
        part.base_kernel.lengthscale, part.outputscale = lengthscale, variance
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.01
    return slow + fast, likelihood


def make_memories(horizon: float, length: float) -> dict[str, InducingFeatures]:
    """All of `SIZE` features."""

    def window(size: int) -> HippoFeatures:
        return HippoFeatures(size, horizon, measure="legt", window=RECENT * length)

    return {
        "LegS, the whole past": HippoFeatures(SIZE, horizon),
        "LegT, the last eighth": window(SIZE),
        f"LegS ({LONG}) and LegT ({SIZE - LONG})": CompositeFeatures(
            [HippoFeatures(LONG, horizon), window(SIZE - LONG)]
        ),
        "pyramid of 3 windows": PyramidFeatures(SIZE, horizon),
    }


def follow(model: StreamingGP, x: Tensor, y: Tensor, num_chunks: int) -> tuple[list[tuple[int, float]], list[str]]:
    """Learn all chunks; features and residual variance after each of them, and the capacity warnings."""
    sizes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CapacityWarning)
        for x_chunk, y_chunk in zip(x.tensor_split(num_chunks), y.tensor_split(num_chunks), strict=True):
            model.update(x_chunk, y_chunk)
            if model.features.interval is not None:
                sizes.append((model.features.num_features, model.residual_variance().item()))
    return sizes, [str(w.message) for w in caught]


def error_by_age(age: Tensor, error: Tensor, edges: Tensor) -> Tensor:
    """RMSE in each interval of ages, ``(len(edges) - 1,)``."""
    inside = (age >= edges[:-1, None]) & (age < edges[1:, None])
    return ((inside * error.square()).sum(-1) / inside.sum(-1)).sqrt()


def main() -> None:
    """Run the four memories and the one that grows, print the errors, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/forgetting"), help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="fewer observations and updates")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    x, f, y = make_series(500 if args.smoke else 2000)
    length, horizon = x[-1].item(), x[len(x) // NUM_CHUNKS - 1].item()
    kernel, likelihood = make_kernel()
    figure = plots.new_figure(10, 11)
    panels = figure.subplot_mosaic("AA;BB;CC;DD;EF;EG", height_ratios=[3, 3, 3, 3, 2.2, 2.2])
    # Ages from now back to the beginning, finer where less time has passed.
    edges = torch.linspace(0, length**0.5, 21, dtype=torch.float64) ** 2 + 1e-9
    edges[0] = 0.0
    for (name, features), colour, panel in zip(make_memories(horizon, length).items(), COLOURS, "ABCD", strict=True):
        # Windows end where the data end; so does the horizon.
        model = StreamingGP(features, kernel, likelihood, horizon_growth=None).eval()
        begun = time.perf_counter()
        _, messages = follow(model, x, y, NUM_CHUNKS)
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            q = model(x)
            mean, std = q.mean, q.variance.sqrt()
        recent = x > (1 - RECENT) * length
        print(
            f"{name:>24}: RMSE of f {error(mean, f, recent):.3f} in the last eighth, {error(mean, f, ~recent):.3f} "
            f"before; updates {seconds:.2f} s"
        )
        for message in messages:
            print(f"  capacity: {message}")
        ax = panels[panel]
        plots.plot_data(ax, x, y)
        plots.plot_posterior(ax, x, mean, std, label=f"{name}, 95 % band of f", color=colour)
        ax.axvline((1 - RECENT) * length, color="0.6", linewidth=0.8, linestyle=(0, (4, 2)))
        plots.style_axes(ax, "time [s]" if panel == "D" else "", "signal")
        ax.tick_params(labelbottom=panel == "D")
        ax.set_xlim(0, length)
        ax.set_ylim(-4, 4)
        plots.legend_above(ax)
        by_age = error_by_age(length - x, mean - f, edges)
        panels["E"].plot(0.5 * (edges[1:] + edges[:-1]), by_age, color=colour, marker=".", label=name)
    ax = panels["E"]
    ax.set_xscale("function", functions=(lambda a: abs(a) ** 0.5, lambda a: a**2))
    ages = [0, 1, 4, 12.5, 25, 50, 75, 100]
    ax.set_xticks(ages, [f"{age:g}" for age in ages])
    ax.set_yscale("log")
    ax.axvline(RECENT * length, color="0.6", linewidth=0.8, linestyle=(0, (4, 2)))
    plots.style_axes(ax, "age at the end [s]", "RMSE of f")
    ax.set_xlim(0, length)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False, borderaxespad=0.2)

    growing = StreamingGP(
        HippoFeatures(8, horizon / 4), kernel, likelihood, max_features=1000, tolerance=TOLERANCE
    ).eval()
    num_chunks = 10 if args.smoke else 4 * NUM_CHUNKS
    sizes, _ = follow(growing, x, y, num_chunks)
    ends = [part[-1].item() for part in x.tensor_split(num_chunks)]
    print(f"adaptive order: {sizes[-1][0]} features at the end, residual variance {sizes[-1][1]:.1e}")
    with torch.no_grad():
        mean = growing(x).mean
    print(f"  RMSE of f {error(mean, f, recent):.3f} in the last eighth, {error(mean, f, ~recent):.3f} before")
    panels["F"].step(ends, [size for size, _ in sizes], color=plots.BLUE, where="post")
    plots.style_axes(panels["F"], "", "features")
    panels["F"].set_ylim(bottom=0)
    panels["F"].set_title("LegS that grows as it has to", loc="left", fontsize=9)
    panels["F"].tick_params(labelbottom=False)
    panels["G"].semilogy(ends, [residual for _, residual in sizes], color=plots.BLUE, marker=".")
    panels["G"].axhline(TOLERANCE, color="black", linewidth=0.8, linestyle=(0, (4, 2)))
    panels["G"].text(length, TOLERANCE / 1.5, "tolerance", fontsize=8, ha="right", va="top")
    for panel in "FG":
        panels[panel].set_xlim(0, length)
    plots.style_axes(panels["G"], "time [s]", "residual variance")
    path = args.out / "forgetting.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


def error(mean: Tensor, f: Tensor, rows: Tensor) -> float:
    """RMSE on some rows."""
    return (mean - f)[rows].square().mean().sqrt().item()


if __name__ == "__main__":
    main()
