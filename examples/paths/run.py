"""A path through four dimensions in an ordinary GPyTorch model, and one through two moons."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from gpytorch.variational import NaturalVariationalDistribution
from torch import Tensor

from examples.stream.methods import Exact
from gpseq import datasets, metrics, plots
from gpseq.features import InducingFeatures, PathFeatures, SelectedPoints
from gpseq.mlls import StreamingELBO
from gpseq.models import StreamingGP, fit_hyperparameters
from gpseq.variational import InterdomainVariationalStrategy

NUM_TASKS = 10
HELD_OUT = 0.2
SIZE = 12
#: The sizes of which the error at the end is drawn.
SIZES = (6, 8, 12, 16, 24)
MOON_SIZE = 10


class PathGP(gpytorch.models.ApproximateGP):
    """An ordinary GPyTorch model; only its strategy knows that the inducing variables are features of a path."""

    def __init__(self, features: InducingFeatures, kernel: Kernel) -> None:
        q = NaturalVariationalDistribution(features.num_features)
        super().__init__(InterdomainVariationalStrategy(self, features, q))
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at ``x``."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class OrdinaryPath:
    """The path by the online bound and one natural-gradient step a task."""

    def __init__(self, features: PathFeatures, kernel: Kernel, likelihood: GaussianLikelihood) -> None:
        self.features, self.kernel, self.likelihood = features, kernel, likelihood
        self.model: PathGP | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """Let the path go on through ``x``, then learn ``y``."""
        self.features = self.features.following(x, self.kernel)
        if self.model is None:
            self.model = PathGP(self.features, self.kernel)
            self.mll = StreamingELBO(self.likelihood, self.model)
        else:
            # What q says now becomes the past; from here on u is of the longer path.
            self.model.variational_strategy.advance(self.features)
        self.model.train()
        optimiser = gpytorch.optim.NGD(self.model.variational_parameters(), num_data=len(y), lr=1.0)
        (-self.mll(self.model(x), y)).backward()
        optimiser.step()
        optimiser.zero_grad()
        self.model.eval()

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        assert self.model is not None
        prediction = self.likelihood(self.model(x))
        return prediction.mean, prediction.variance


class Streamed:
    """``StreamingGP``, whose updates have a closed form here."""

    def __init__(self, features: InducingFeatures, kernel: Kernel, likelihood: GaussianLikelihood) -> None:
        self.model = StreamingGP(features, kernel, likelihood).eval()

    def update(self, x: Tensor, y: Tensor) -> None:
        """Learn a task."""
        self.model.update(x, y)

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        prediction = self.model.likelihood(self.model(x))
        return prediction.mean, prediction.variance


Method = OrdinaryPath | Streamed | Exact


@dataclass(frozen=True)
class PowerPlant:
    """Ten tasks from cold hours to hot ones, standardised, with kernel and noise learnt on the first."""

    x: Tensor  # (n, 4)
    y: Tensor  # (n,)
    held_out: Tensor  # (n,) bool
    unit: float  # MW
    kernel: Kernel
    likelihood: GaussianLikelihood

    @property
    def tasks(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Inputs and targets to learn, inputs and targets that are held out, of each task."""
        rows = torch.arange(len(self.y)).tensor_split(NUM_TASKS)
        parts = [(part[~self.held_out[part]], part[self.held_out[part]]) for part in rows]
        return [(self.x[learn], self.y[learn], self.x[test], self.y[test]) for learn, test in parts]

    @classmethod
    def draw(cls, num: int, seed: int, num_starts: int) -> PowerPlant:
        """Some rows of the table; kernel and noise by exact marginal likelihood, then frozen."""
        table = datasets.load_powerplant()
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(table), generator=generator)[:num]
        rows = rows[table.X[rows, 0].argsort()]
        x, y = (table.X[rows] - table.X.mean(0)) / table.X.std(0), (table.y[rows] - table.y.mean()) / table.y.std()
        held_out = torch.rand(num, generator=generator) < HELD_OUT
        kernel, likelihood = ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double().eval()
        kernel.base_kernel.lengthscale, likelihood.noise = 2.0, 0.06
        plant = cls(x, y, held_out, table.y.std().item(), kernel, likelihood)
        x0, y0, _, _ = plant.tasks[0]
        fit_hyperparameters(x0, y0, kernel, likelihood, num_starts=num_starts, generator=generator)
        kernel.requires_grad_(False)
        likelihood.requires_grad_(False)
        return plant

    def error(self, method: Method) -> float:
        """RMSE on all held-out rows in MW."""
        return self.unit * metrics.rmse(method.predict(self.x[self.held_out])[0], self.y[self.held_out]).item()


def draw_past(axes, plant: PowerPlant) -> None:
    """Errors on every past task after every task, in three ways; and that the two routes to a path agree."""
    unit, kernel, likelihood = plant.unit, plant.kernel, plant.likelihood
    print(
        f"learnt on task 1: lengthscale {kernel.base_kernel.lengthscale.item():.2f}, outputscale "
        f"{kernel.outputscale.item():.2f}, noise {unit * likelihood.noise.sqrt().item():.2f} MW"
    )
    path = PathFeatures(SIZE, 4)
    closed_form = Streamed(path, kernel, likelihood)
    methods = {
        f"path, {SIZE} features": OrdinaryPath(path, kernel, likelihood),
        f"points, {SIZE} re-selected": Streamed(SelectedPoints(SIZE, 4), kernel, likelihood),
        "exact GP, all data": Exact(kernel, likelihood),
    }
    errors, difference = {}, 0.0
    x_test, y_test = plant.x[plant.held_out], plant.y[plant.held_out]
    for name, method in methods.items():
        matrix, seconds = torch.full((NUM_TASKS, NUM_TASKS), math.nan), 0.0
        for step, (x, y, _, _) in enumerate(plant.tasks):
            begun = time.perf_counter()
            method.update(x, y)
            seconds += time.perf_counter() - begun
            for past, (_, _, x_past, y_past) in enumerate(plant.tasks[: step + 1]):
                matrix[step, past] = unit * metrics.rmse(method.predict(x_past)[0], y_past)
            if isinstance(method, OrdinaryPath):
                closed_form.update(x, y)
                pairs = zip(method.predict(x_test), closed_form.predict(x_test), strict=True)
                difference = max([difference, *((one - two).abs().max().item() for one, two in pairs)])
        nlpd = metrics.nlpd(*method.predict(x_test), y_test)
        print(f"{name:>22}: RMSE {plant.error(method):.2f} MW at the end, NLPD {nlpd:.3f}, updates {seconds:.2f} s")
        print(" " * 24 + "past tasks " + " ".join(f"{value:.1f}" for value in matrix[-1]) + " MW")
        errors[name] = matrix.numpy()
    print(f"largest difference of natural gradient and closed form, in standard deviations of y: {difference:.1e}")
    plots.plot_past_errors(axes, errors, "RMSE [MW]")
    axes[0].set_ylabel("past task", fontsize=9)
    for ax in axes:
        ax.set_xlabel("tasks learnt, cold to hot", fontsize=9)


def draw_sizes(ax, plants: list[PowerPlant], sizes: tuple[int, ...]) -> None:
    """How far memories of several sizes end above the exact GP, for each draw of the rows and on average."""
    floor = torch.tensor([_final_error(None, plant) for plant in plants])
    print(f"RMSE at the end, draws of the rows averaged: {len(plants)}; exact GP {floor.mean():.2f} MW; above that")
    makers = {"path": PathFeatures, "points": SelectedPoints}
    for (name, make), marker, color in zip(makers.items(), "os", (plots.BLUE, plots.VERMILION), strict=True):
        table = torch.tensor([[_final_error(make(size, 4), plant) for size in sizes] for plant in plants])
        above = table - floor.unsqueeze(-1)
        means = zip(sizes, above.mean(0), strict=True)
        print(f"{name:>8}: " + ", ".join(f"{mean:+.2f} MW ({size})" for size, mean in means))
        ax.plot(sizes, above.T, marker, color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        ax.plot(sizes, above.mean(0), color=color, linewidth=2.0, label=name)
    ax.axhline(0.0, color="black", linewidth=0.8, linestyle=(0, (4, 2)), label="exact GP")
    ax.set_xticks(sizes)
    plots.style_axes(ax, "features or points", "RMSE at the end, above exact [MW]")
    plots.legend_above(ax)


def _final_error(features: InducingFeatures | None, plant: PowerPlant) -> float:
    method: Method = (
        Exact(plant.kernel, plant.likelihood)
        if features is None
        else Streamed(features, plant.kernel, plant.likelihood)
    )
    for x, y, _, _ in plant.tasks:
        method.update(x, y)
    return plant.error(method)


def draw_moons(axes, num: int, seed: int, resolution: int) -> None:
    """Two moons, one third at a time: a path that goes on to the point most alike, and one that jumps about."""
    x, label = two_moons(num, 0.15, seed)
    x_test, label_test = two_moons(2000, 0.15, seed + 1)
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.4, 10.0
    columns, rows = (torch.linspace(*ends, resolution, dtype=torch.float64) for ends in ((-1.5, 2.5), (-1.2, 1.7)))
    grid = torch.cartesian_prod(rows, columns).flip(-1)
    generator = torch.Generator().manual_seed(seed)
    memories = {
        "kernel order": PathFeatures(MOON_SIZE, 2, ordering="kernel"),
        "random order": PathFeatures(MOON_SIZE, 2, ordering="random", generator=generator),
        "points": SelectedPoints(MOON_SIZE, 2),
    }
    for (name, features), ax in zip(memories.items(), (*axes, None), strict=True):
        model = StreamingGP(features, kernel, BernoulliLikelihood()).eval()
        for task in x[:, 0].argsort().tensor_split(3):
            model.update(x[task], label[task])
        with torch.no_grad():
            right = ((model(x_test).mean > 0) == (label_test > 0.5)).double().mean().item()
            probability = model.likelihood(model(grid)).mean.reshape(resolution, resolution)
        print(f"two moons, {MOON_SIZE} features, {name}: {right:.1%} of {len(x_test)} new points right")
        if ax is not None:
            plots.plot_decision(ax, x, label, (columns, rows), probability)
            path = model.features.nodes()
            ax.plot(path[:, 0], path[:, 1], color=plots.GREY, linewidth=0.5, zorder=1.5, label=f"path, {name}")
            plots.style_axes(ax, "$x_1$", "$x_2$")
            plots.legend_above(ax)


def two_moons(num: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into each other: inputs ``(num, 2)``, labels ``(num,)``."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num) % 2
    angle = math.pi * torch.rand(num, generator=generator, dtype=torch.float64)
    sign = 1.0 - 2.0 * label
    x = torch.stack([angle.cos() * sign + label, angle.sin() * sign + 0.5 * label], dim=-1)
    return x + noise * torch.randn(num, 2, generator=generator, dtype=torch.float64), label.double()


def main() -> None:
    """Run both streams, print the errors, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/paths"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the rows, and of those that are held out")
    parser.add_argument("--smoke", action="store_true", help="fewer rows and a coarse figure")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    num, num_seeds, starts = (300, 1, 1) if args.smoke else (1000, 3, 2)
    plants = [PowerPlant.draw(num, args.seed + number, starts) for number in range(num_seeds)]
    figure = plots.new_figure(10, 6.2)
    above, below = figure.subfigures(2, 1)
    draw_past(list(above.subplots(1, 3)), plants[0])
    *moons, last = below.subplots(1, 3, width_ratios=[5, 5, 4])
    draw_moons(moons, 120 if args.smoke else 180, args.seed, 30 if args.smoke else 120)
    draw_sizes(last, plants, SIZES[1:2] if args.smoke else SIZES)
    path = args.out / "paths.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
