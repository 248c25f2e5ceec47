"""One row at a time: weekly CO2, predicted before it is learnt, by a regressor with `predict_one` and `learn_one`."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gpytorch.kernels import Kernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from gpseq import datasets, plots
from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP, fit_hyperparameters

#: Weeks that are kept until hyperparameters are learnt from them.
WARM_UP = 260
#: Years that the memory covers, and how far ahead of the data it is moved whenever they reach its end.
WINDOW, AHEAD = 3.0, 0.25
NUM_FEATURES = 40
#: Weeks that an error is averaged over in the figure.
RUNNING = 104


class OnlineRegressor:
    """A streaming GP behind the interface that online learners have: dictionaries in, one row at a time.

    The first rows go to a buffer. When it is full the hyperparameters are learnt from it, the buffer is learnt as one
    chunk and dropped, and from then on each row costs the same and nothing is kept but the state.

    Args:
        kernel: of the standardised target over time that begins at zero; its values are where learning starts.
        time: the entry of a row that holds its time.
        num_features: size of the memory.
        window: length of the interval that it covers, in the unit of time.
        ahead: how far past the data the interval is moved when they reach its end: moving costs more than a row.
        warm_up: rows in the buffer.
        max_iterations: of the fit.
    """

    def __init__(
        self,
        kernel: Kernel,
        time: str = "time",
        num_features: int = NUM_FEATURES,
        window: float = WINDOW,
        ahead: float = AHEAD,
        warm_up: int = WARM_UP,
        max_iterations: int = 50,
    ) -> None:
        self.kernel, self.likelihood = kernel.double(), GaussianLikelihood().double()
        self.likelihood.noise = 0.01
        self.time, self.num_features, self.window, self.ahead = time, num_features, window, ahead
        self.warm_up, self.max_iterations = warm_up, max_iterations
        self.model: StreamingGP | None = None
        self._buffer: list[tuple[float, float]] = []
        self._start = self._centre = 0.0
        self._scale = 1.0

    def predict_one(self, x: Mapping[str, float]) -> float:
        """The expected target of a row that has not been learnt."""
        return self.predict_one_with_std(x)[0]

    @torch.no_grad()
    def predict_one_with_std(self, x: Mapping[str, float]) -> tuple[float, float]:
        """Mean and standard deviation of the target; in the warm-up those of the buffer, or 0 and infinity."""
        if self.model is None:
            values = [y for _, y in self._buffer]
            mean = statistics.fmean(values) if values else 0.0
            return mean, statistics.stdev(values) if len(values) > 1 else math.inf
        f = self.model(self._inputs([x[self.time]]))
        variance = f.variance + self.likelihood.noise
        return self._centre + self._scale * f.mean.item(), self._scale * variance.sqrt().item()

    def learn_one(self, x: Mapping[str, float], y: float) -> OnlineRegressor:
        """Learn a row; returns the regressor itself."""
        if self.model is not None:
            inputs = self._inputs([x[self.time]])
            if inputs.item() > self.model.features.horizon:
                self.model.rebase(self.model.features.with_horizon(inputs.item() + self.ahead))
            self.model.update(inputs, self._targets([y]))
            return self
        self._buffer.append((float(x[self.time]), float(y)))
        if len(self._buffer) >= self.warm_up:
            self._begin()
        return self

    def _begin(self) -> None:
        times, values = zip(*self._buffer, strict=True)
        self._start, self._centre = times[0], statistics.fmean(values)
        self._scale = statistics.stdev(values) or 1.0
        inputs, targets = self._inputs(times), self._targets(values)
        fit_hyperparameters(
            inputs, targets, self.kernel, self.likelihood, num_starts=1, max_iterations=self.max_iterations
        )
        horizon = inputs.max().item() + self.ahead
        features = HippoFeatures(self.num_features, horizon, measure="legt", window=self.window)
        self.model = StreamingGP(features, self.kernel, self.likelihood.eval()).eval()
        self.model.update(inputs, targets)
        self._buffer = []

    def _inputs(self, times: Any) -> Tensor:
        return torch.tensor(times, dtype=torch.float64) - self._start

    def _targets(self, values: Any) -> Tensor:
        return (torch.tensor(values, dtype=torch.float64) - self._centre) / self._scale


class LastValue:
    """Persistence: the next target is the last one."""

    def __init__(self) -> None:
        self._last = 0.0

    def predict_one(self, x: Mapping[str, float]) -> float:
        """The last target, or zero."""
        return self._last

    def learn_one(self, x: Mapping[str, float], y: float) -> LastValue:
        """Remember it."""
        self._last = y
        return self


def make_kernel() -> Kernel:
    """A trend of years, a season that changes slowly, and weather of weeks."""
    season = PeriodicKernel() * RBFKernel()
    season.kernels[0].period_length, season.kernels[0].lengthscale = 1.0, 1.0
    season.kernels[0].raw_period_length.requires_grad_(False)  # a year is a year
    season.kernels[1].lengthscale = 10.0
    trend, weather = ScaleKernel(RBFKernel()), ScaleKernel(MaternKernel(nu=1.5))
    trend.base_kernel.lengthscale, weather.base_kernel.lengthscale = 5.0, 0.2
    season = ScaleKernel(season)
    trend.outputscale, season.outputscale, weather.outputscale = 4.0, 1.0, 0.05
    return trend + season + weather


def prequential(rows: list[tuple[dict[str, float], float]], learners: Mapping[str, Any]) -> dict[str, Any]:
    """Test, then learn, row by row: predictions and errors of every learner."""
    errors: dict[str, list[float]] = {name: [] for name in learners}
    means: dict[str, list[float]] = {name: [] for name in learners}
    stds: list[float] = []
    seconds = dict.fromkeys(learners, 0.0)
    for x, y in rows:
        for name, learner in learners.items():
            begun = time.perf_counter()
            if isinstance(learner, OnlineRegressor):
                mean, std = learner.predict_one_with_std(x)
                stds.append(std)
            else:
                mean = learner.predict_one(x)
            learner.learn_one(x, y)
            seconds[name] += time.perf_counter() - begun
            means[name].append(mean)
            errors[name].append(y - mean)
    return {"errors": errors, "means": means, "stds": stds, "seconds": seconds}


def running_rmse(errors: list[float], width: int) -> list[float]:
    """RMSE of the last ``width`` rows, or of as many as there have been."""
    squares = torch.tensor(errors, dtype=torch.float64).square()
    sums = torch.cat([torch.zeros(1, dtype=squares.dtype), squares.cumsum(0)])
    ends = torch.arange(1, len(errors) + 1)
    starts = (ends - width).clamp_min(0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).sqrt().tolist()


def main() -> None:
    """Run both learners over the series, print the errors, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/stream"), help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="the first years only, and a short fit")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    series = datasets.load_co2()
    num, warm_up = (200, 104) if args.smoke else (len(series), WARM_UP)
    times, targets = series.time[:num].tolist(), series.target[:num].tolist()
    rows = [({"year": t}, y) for t, y in zip(times, targets, strict=True)]
    regressor = OnlineRegressor(make_kernel(), time="year", warm_up=warm_up, max_iterations=8 if args.smoke else 50)
    learners = {"streaming GP": regressor, "last value": LastValue()}
    outcome = prequential(rows, learners)

    means, stds = outcome["means"]["streaming GP"], outcome["stds"]
    print(f"{num} weeks, of which the first {warm_up} warm up; one week ahead after that:")
    for name in learners:
        tested = torch.tensor(outcome["errors"][name][warm_up:])
        milliseconds = 1e3 * outcome["seconds"][name] / num
        print(f"{name:>14}: RMSE {tested.square().mean().sqrt():.3f} ppm  {milliseconds:.1f} ms a week, fit included")
    inside = [abs(y - m) < plots.BAND * s for y, m, s in zip(targets, means, stds, strict=True)][warm_up:]
    print(f"{'':>14}  {sum(inside) / len(inside):.1%} of the weeks in the 95 % band")

    figure = plots.new_figure(10, 6)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    shown = slice(max(num - 208, warm_up), num)  # the last four years
    plots.plot_data(top, times[shown], targets[shown])
    plots.plot_posterior(top, times[shown], means[shown], stds[shown], label="a week ahead, 95 % band")
    plots.style_axes(top, "", f"CO2 [{series.target_unit}]")
    plots.legend_above(top)
    for (name, errors), colour in zip(outcome["errors"].items(), (plots.BLUE, plots.ORANGE), strict=True):
        bottom.plot(times[warm_up:], running_rmse(errors[warm_up:], RUNNING), color=colour, label=name)
    plots.style_axes(bottom, "year", f"RMSE, last {RUNNING} weeks [{series.target_unit}]")
    bottom.set_ylim(bottom=0.0)
    plots.legend_above(bottom)
    path = args.out / "learn_one.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
