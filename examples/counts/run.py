"""Follow a year of daily deaths, which are counts, in five chunks."""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timedelta
from pathlib import Path

import gpytorch
import torch
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from gpseq import datasets, plots
from gpseq.features import HippoFeatures
from gpseq.likelihoods import NegativeBinomialLikelihood
from gpseq.models import StreamingGP

NUM_DAYS = 365
NUM_CHUNKS = 5
NUM_FEATURES = 30
HELD_OUT = 0.2
LEVELS = (0.025, 0.5, 0.975)
#: The chunks after which the stream is drawn, and how many days of forecast with it.
SHOWN, AHEAD = (1, 2, 3, 5), 14

# Where the hyperparameters begin, and the medians of their priors: (value, standard deviation of the logarithm).
LENGTHSCALE = (60.0, 0.5)  # days
OUTPUTSCALE = (2.0, 0.5)  # of the logarithm of the counts
DISPERSION = (200.0, 1.0)


def log_normal(median: float, spread: float) -> LogNormalPrior:
    """A prior of a positive number, by its median and the standard deviation of its logarithm."""
    return LogNormalPrior(torch.tensor(median, dtype=torch.float64).log(), spread)


def make_model(num_features: int, horizon: float, learn: str) -> StreamingGP:
    """A stream of counts; with ``learn="warmup"`` its first update learns the hyperparameters."""
    kernel = gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.MaternKernel(nu=2.5, lengthscale_prior=log_normal(*LENGTHSCALE)),
        outputscale_prior=log_normal(*OUTPUTSCALE),
    ).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = LENGTHSCALE[0], OUTPUTSCALE[0]
    likelihood = NegativeBinomialLikelihood(dispersion_prior=log_normal(*DISPERSION)).double()
    likelihood.dispersion = DISPERSION[0]
    mean = gpytorch.means.ConstantMean().double()
    mean.constant = 5.0  # about 150 deaths a day
    features = HippoFeatures(num_features, horizon)
    return StreamingGP(features, kernel, likelihood, mean, horizon_growth=1.25, learn=learn).eval()


@torch.no_grad()
def quantiles(model: StreamingGP, x: Tensor) -> Tensor:
    """Lower edge, median and upper edge of new counts, ``(3, n)``."""
    levels = torch.tensor(LEVELS, dtype=torch.float64).unsqueeze(-1)
    return model.likelihood.quantile(model(x), levels)


@torch.no_grad()
def scores(model: StreamingGP, x: Tensor, y: Tensor) -> Tensor:
    """Of each count whether it lies in the 95 % band, and its negative log predictive density in nats, ``(2, n)``."""
    low, _, high = quantiles(model, x)
    return torch.stack([((y >= low) & (y <= high)).double(), -model.likelihood.log_marginal(y, model(x))])


def main() -> None:
    """Run the stream, print the scores, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/counts"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the days that are held out")
    parser.add_argument("--features", type=int, default=NUM_FEATURES, help="numbers in the memory")
    parser.add_argument("--smoke", action="store_true", help="a few steps of learning and a coarse figure")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    series = datasets.load_covid_deaths()
    t, y = series.time[:NUM_DAYS], series.target[:NUM_DAYS]
    held_out = torch.zeros(NUM_DAYS, dtype=torch.bool)
    order = torch.randperm(NUM_DAYS, generator=torch.Generator().manual_seed(args.seed))
    held_out[order[: int(HELD_OUT * NUM_DAYS)]] = True
    chunks = torch.arange(NUM_DAYS).tensor_split(NUM_CHUNKS)
    dates = [datetime(2020, 3, 1) + timedelta(days=day) for day in range(NUM_DAYS + AHEAD)]

    figure = plots.new_figure(10, 7)
    panels = dict(zip(SHOWN, figure.subplots(2, 2, sharex=True, sharey=True).flat, strict=True))
    model = make_model(args.features, t[chunks[0][-1]].item(), "never" if args.smoke else "warmup")
    if args.smoke:
        first = chunks[0][~held_out[chunks[0]]]
        model.fit_hyperparameters(t[first], y[first], steps=10)
    at_once = []
    for number, rows in enumerate(chunks, start=1):
        learnt = rows[~held_out[rows]]
        begun = time.perf_counter()
        model.update(t[learnt], y[learnt])
        seconds = time.perf_counter() - begun
        if number == 1:
            kernel = model.covar_module
            print(
                f"learnt on chunk 1: lengthscale {kernel.base_kernel.lengthscale.item():.1f} days, "
                f"outputscale {kernel.outputscale.item():.2f}, dispersion {model.likelihood.dispersion.item():.1f}, "
                f"mean {model.mean_module.constant.item():.2f}"
            )
        learning = " with the learning" if number == 1 and not args.smoke else ""
        print(
            f"chunk {number}: {len(learnt)} days, {model.convergence.steps} steps, {seconds:.2f} s{learning}; "
            f"horizon day {model.features.horizon:.0f}, {model.residual_variance().item():.2%} of the prior variance "
            "not held"
        )
        test = rows[held_out[rows]]
        at_once.append(scores(model, t[test], y[test]))
        if number in panels:
            draw(panels[number], model, rows[-1].item() + 1, t, y, held_out, dates, 6 if args.smoke else 1)
            panels[number].set_title(f"after chunk {number}", loc="left", fontsize=9)
            plots.plot_borders(panels[number], [dates[part[0]] for part in chunks[1:]])

    print("held-out days: in the 95 % band and NLPD, after their own chunk and at the end")
    days, at_end = held_out.nonzero().squeeze(-1), scores(model, t[held_out], y[held_out])
    for number, rows in enumerate(chunks, start=1):
        of_chunk = at_end[:, (days >= rows[0]) & (days <= rows[-1])]
        (before, density_before), (inside, density) = at_once[number - 1].mean(-1), of_chunk.mean(-1)
        size = of_chunk.shape[-1]
        print(f"  chunk {number}: {size} days, {before:4.0%} {density_before:.2f}, {inside:4.0%} {density:.2f}")
    inside, density = at_end.mean(-1)
    print(f"  all:     {len(days)} days,            {inside:4.0%} {density:.2f}")
    enough = model.features.required_order(model.covar_module)
    print(f"{enough} features would hold 99.9 % of the prior variance up to day {model.features.horizon:.0f}")

    ax = panels[SHOWN[0]]
    ax.set_xlim(dates[0], dates[-1])
    ax.set_ylim(0, 1.35 * y.max().item())
    handles = {
        handle.get_label(): handle for panel in panels.values() for handle in panel.get_legend_handles_labels()[0]
    }
    figure.legend(handles=list(handles.values()), loc="outside upper right", ncols=5, frameon=False, fontsize=8)
    path = args.out / "counts.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


def draw(
    ax, model: StreamingGP, known: int, t: Tensor, y: Tensor, held_out: Tensor, dates: list[datetime], every: int
) -> None:
    """The days up to ``known``, those to come, and the band with its forecast."""
    ax.plot(dates[known : len(y)], y[known:], ".", color="0.8", markersize=2.5, label="still to come", zorder=0.5)
    plots.plot_data(ax, dates[:known], y[:known], held_out[:known])
    days = torch.arange(0, known + AHEAD, every, dtype=torch.float64)
    low, median, high = quantiles(model, days)
    grid = [dates[int(day)] for day in days]
    plots.plot_band(ax, grid, median, low, high, label=f"median and 95 % band of new counts, to {AHEAD} days ahead")
    plots.style_axes(ax, "", "deaths per day")
    plots.date_axis(ax, dates)


if __name__ == "__main__":
    main()
