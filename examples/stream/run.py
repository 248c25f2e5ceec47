"""Follow four centuries of solar irradiance in ten chunks, and see what is left of each chunk at the end."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gpytorch
import torch
from torch import Tensor

from examples.stream.methods import Exact, OnlineVariationalConditioning, Stream
from gpseq import datasets, metrics, plots
from gpseq.features import HippoFeatures
from gpseq.models import fit_hyperparameters

NUM_CHUNKS = 10
HELD_OUT = 0.2
GROWTH = 1.25
NUM_INDUCING = 12  # of the first chunk, for OVC: with more of them its pseudo-data lose accuracy


def main() -> None:
    """Run the stream, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/stream"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are held out")
    parser.add_argument("--smoke", action="store_true", help="two starts and a coarse figure")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    series = datasets.load_solar()
    t = series.time - series.time[0]  # years since the first one
    y = (series.target - series.target.mean()) / series.target.std()
    held_out = torch.zeros(len(t), dtype=torch.bool)
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(args.seed))
    held_out[order[: int(HELD_OUT * len(t))]] = True
    chunks = [(t[rows], y[rows], held_out[rows]) for rows in torch.arange(len(t)).tensor_split(NUM_CHUNKS)]

    # Kernel and noise from the first chunk alone, by exact marginal likelihood; then they stay.
    x0, y0, out0 = chunks[0]
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale = (x0[-1].item() - x0[0].item()) / 5
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double().eval()
    generator = torch.Generator().manual_seed(0)
    fit_hyperparameters(
        x0[~out0], y0[~out0], kernel, likelihood, num_starts=2 if args.smoke else 8, generator=generator
    )
    horizon, noise = x0[-1].item(), likelihood.noise.item()
    enough = HippoFeatures.required(kernel, GROWTH * t[-1].item(), noise=noise)
    print(
        f"lengthscale {kernel.base_kernel.lengthscale.item():.1f} years; {enough} features hold all {t[-1]:.0f} years"
    )

    methods = {
        f"{enough} features": Stream(enough, horizon, kernel, likelihood),
        "50 features": Stream(50, horizon, kernel, likelihood),
        "OVC": OnlineVariationalConditioning(NUM_INDUCING, kernel, likelihood),
    }
    errors = {name: torch.full((NUM_CHUNKS, NUM_CHUNKS), torch.nan) for name in methods}
    for name, method in methods.items():
        seconds = 0.0
        for step, (x, target, out) in enumerate(chunks):
            begun = time.perf_counter()
            method.update(x[~out], target[~out])
            seconds += time.perf_counter() - begun
            for past, (x_past, y_past, out_past) in enumerate(chunks[: step + 1]):
                errors[name][step, past] = metrics.rmse(method.predict(x_past[out_past])[0], y_past[out_past])
        for message in getattr(method, "warnings", []):
            print(f"  capacity: {message}")
        mean, variance = method.predict(t[held_out])
        scores = metrics.rmse(mean, y[held_out]), metrics.nlpd(mean, variance, y[held_out])
        print(f"{name:>14}: RMSE {scores[0]:.4f}  NLPD {scores[1]:.4f}  updates {seconds:.2f} s")
    exact = Exact(kernel, likelihood)
    exact.update(t[~held_out], y[~held_out])
    mean, variance = exact.predict(t[held_out])
    scores = metrics.rmse(mean, y[held_out]), metrics.nlpd(mean, variance, y[held_out])
    print(f"{'exact GP':>14}: RMSE {scores[0]:.4f}  NLPD {scores[1]:.4f}")

    figure = plots.new_figure(10, 8)
    panels = figure.subplot_mosaic("AAA;BBB;CDE", height_ratios=[3, 3, 3])
    year, scale = series.time, series.target.std()
    grid = torch.linspace(0, t[-1].item(), 400 if args.smoke else 1500, dtype=torch.float64)

    def in_units(prediction: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return series.target.mean() + scale * prediction[0], scale * prediction[1].sqrt()

    exact_mean, _ = in_units(exact.predict(grid))
    for panel, name in zip("AB", list(methods)[:2], strict=True):
        mean, std = in_units(methods[name].predict(grid))
        plots.plot_stream(
            panels[panel],
            year,
            series.target,
            grid + year[0],
            mean,
            std,
            held_out=held_out,
            borders=[x[0].item() + year[0].item() for x, _, _ in chunks[1:]],
            exact_mean=exact_mean,
            label=name,
            time_label="" if panel == "A" else "year",
            target_label=f"irradiance [{series.target_unit}]",
        )
    names = {name: matrix.numpy() for name, matrix in errors.items()}
    plots.plot_past_errors([panels[p] for p in "CDE"], names, "RMSE, held-out years (standardised)")
    path = args.out / "stream.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
