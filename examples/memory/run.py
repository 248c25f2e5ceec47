"""Draw how the memory works: the basis that stretches, and how much of a kernel a given number of features holds."""

from __future__ import annotations

import argparse
from pathlib import Path

import gpytorch
import torch

from gpseq import hippo, plots
from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP

COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.VERMILION)
KERNELS = {
    "RBF": gpytorch.kernels.RBFKernel(),
    "Matern 5/2": gpytorch.kernels.MaternKernel(nu=2.5),
    "Matern 3/2": gpytorch.kernels.MaternKernel(nu=1.5),
    "Matern 1/2": gpytorch.kernels.MaternKernel(nu=0.5),
}


def draw_basis(axes, num_shown: int = 4) -> None:
    """The first polynomials on a short horizon and on a longer one."""
    for ax, horizon in zip(axes, (4.0, 10.0), strict=True):
        t = torch.linspace(0.0, horizon, 300, dtype=torch.float64)
        for degree, values in enumerate(hippo.legs_basis(num_shown, t, 0.0, horizon)):
            ax.plot(t, values, color=COLOURS[degree], linewidth=1.5, label=f"$g_{degree}$")
        ax.axvline(horizon, color="0.6", linewidth=0.8)
        ax.set_xlim(0, 10.5)
        plots.style_axes(ax, "time" if horizon == 10.0 else "", f"basis, horizon {horizon:g}")
    axes[0].legend(ncols=num_shown, fontsize=8, frameon=False, loc="upper right")


def draw_memory(ax, orders: tuple[int, ...] = (8, 16, 32)) -> None:
    """What memories of a few sizes keep of the same data."""
    t = torch.linspace(0.0, 10.0, 120, dtype=torch.float64)
    y = torch.sin(2 * t) + 0.5 * torch.sin(5 * t) * (t > 5)
    ax.plot(t, y, ".", color=plots.GREY, markersize=3, label="data")
    for order, colour in zip(orders, COLOURS, strict=False):
        kernel = gpytorch.kernels.RBFKernel().double()
        kernel.lengthscale = 0.5
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = 0.01
        model = StreamingGP(HippoFeatures(order, 10.0), kernel, likelihood).eval()
        for x_chunk, y_chunk in zip(t.split(20), y.split(20), strict=True):
            model.update(x_chunk, y_chunk)
        residual = model.residual_variance().item()
        ax.plot(t, model.reconstruct(t), color=colour, linewidth=1.2, label=f"M = {order}, residual {residual:.2%}")
    ax.set_xlim(0, 10.5)
    ax.legend(ncols=2, fontsize=8, frameon=False, loc="upper left")
    ax.set_ylim(-1.8, 3.0)
    plots.style_axes(ax, "time", "what is remembered")


def draw_capacity(ax, rho: float, order: int) -> None:
    """Residual prior variance against features per lengthscale of horizon."""
    features = HippoFeatures(order, horizon=rho)
    per_lengthscale = torch.arange(1, order + 1) / rho
    for (name, kernel), colour in zip(KERNELS.items(), COLOURS, strict=True):
        kernel.lengthscale = 1.0
        ax.semilogy(per_lengthscale, features.residual_curve(kernel), color=colour, linewidth=1.5, label=name)
    for level in (0.01, 0.001):
        ax.axhline(level, color="0.6", linewidth=0.8, linestyle=(0, (4, 2)))
    ax.set_ylim(1e-6, 1.5)
    ax.legend(fontsize=8, frameon=False)
    plots.style_axes(ax, "features per lengthscale of horizon", "residual prior variance")


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/memory"), help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="a short horizon")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figure = plots.new_figure(10, 6)
    panels = figure.subplot_mosaic("AC;BC;DC", width_ratios=[3, 2])
    draw_basis([panels["A"], panels["B"]])
    draw_memory(panels["D"])
    draw_capacity(panels["C"], rho=10.0 if args.smoke else 50.0, order=60 if args.smoke else 350)
    path = args.out / "memory.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
