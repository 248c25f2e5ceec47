"""Temperature over the British Isles and dust in Beijing: a product memory of time and space at real size."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from benchmarks.experiments import draw_past, failures, run_of, scores_table, verdicts
from benchmarks.following import Chunk
from benchmarks.intervals import interval
from benchmarks.rivals import FixedRows, OptimisedRows
from benchmarks.tables import table
from gpseq import datasets, metrics, plots
from gpseq.features import HippoFeatures, InducingPoints
from gpseq.features.selected import select_points
from gpseq.models import SpaceTimeStreamingGP, StreamingGP
from gpseq.variational import Prior, online
from gpseq.variational.kronecker import KroneckerState, grid_inputs
from gpseq.variational.kronecker_posterior import posterior

#: Hours of the first week, from which everything that is fitted comes; sites that the fit sees.
WEEK, FIT_SITES = 168, 120
LEADS = (1, 3, 6, 12, 24)
#: Features of time and of space, and how the horizon grows.
SIZES = ((40, 100, None), (300, 100, None), (40, 400, None), (40, 100, 1.25))
TASK_HOURS, TASKS = 186, 4
NUM_POINTS, STEPS, SAMPLE = 400, 100, 2000
SEEDS = 3
#: Days, and features of time; the second has far too few, to show what that does.
BEIJING = ((20, 240), (60, 150))


def run(smoke: bool) -> dict[str, Any]:
    """Timing and forecasts on ERA5, its four tasks with rivals, and Beijing with its gaps."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # capacity is part of what is measured
        return {
            "forecasts": _forecasts(smoke),
            "tasks": [_tasks(seed, smoke) for seed in range(1 if smoke else SEEDS)],
            "beijing": [
                [_beijing(seed, days, size, smoke) for seed in range(1 if smoke else 5)]
                for days, size in (((6, 40),) if smoke else BEIJING)
            ],
            "steps": STEPS,
            "sample": SAMPLE,
        }


# --- ERA5 -----------------------------------------------------------------------------------------------------------


def _field() -> tuple[Tensor, Tensor, Tensor]:
    """Hours, places in units of 100 km, and temperatures."""
    field = datasets.load_era5_temperature()
    return field.time, _in_100_km(field.locations), field.values


def _in_100_km(locations: Tensor) -> Tensor:
    latitude, longitude = locations.T
    stretch = torch.cos(torch.deg2rad(latitude.mean()))
    return 1.112 * torch.stack([(longitude - longitude.mean()) * stretch, latitude - latitude.mean()], dim=-1)


def _day_waves(hours: Tensor) -> Tensor:
    turns = 2 * math.pi * hours.unsqueeze(-1) * torch.tensor([1.0, 2.0], dtype=torch.float64) / 24
    return torch.cat([turns.cos(), turns.sin()], dim=-1)


def _spread(places: Tensor, count: int) -> Tensor:
    """Places far from each other, greedily, ``(count, 2)``."""
    chosen, distance = [len(places) // 2], torch.full((len(places),), math.inf, dtype=torch.float64)
    while len(chosen) < count:
        distance = torch.minimum(distance, (places - places[chosen[-1]]).square().sum(-1))
        chosen.append(int(distance.argmax()))
    return places[chosen]


def _parts(nu: float = 0.5) -> tuple[Kernel, Kernel, GaussianLikelihood]:
    time_kernel, space_kernel = MaternKernel(nu).double(), ScaleKernel(MaternKernel(1.5)).double()
    time_kernel.lengthscale, space_kernel.base_kernel.lengthscale = 10.0, 2.0
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.05
    return time_kernel, space_kernel, likelihood


def _forecasts(smoke: bool) -> dict[str, Any]:
    """Hour by hour through the month; forecasts every seventh hour of its second half."""
    hours, places, values = _field()
    site = values[:WEEK].mean(0)
    waves = _day_waves(hours)
    usual = site + waves @ torch.linalg.lstsq(waves[:WEEK], values[:WEEK] - site).solution
    scale = (values - usual)[:WEEK].std()
    anomaly = (values - usual) / scale
    sub = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:FIT_SITES]
    kernels = _parts()
    fitted = SpaceTimeStreamingGP(HippoFeatures(4, 1.0), places[:1], places, *kernels)
    begun = time.process_time()
    fitted.fit_hyperparameters(hours[:WEEK], anomaly[:WEEK][:, sub], sensors=sub, max_iterations=5 if smoke else 60)
    fit_seconds = time.process_time() - begun
    end = 260 if smoke else len(hours)
    origins = [o for o in range(end // 2, end - max(LEADS)) if o % 7 == 0]
    reference = {
        "persistence": lambda o, k: values[o] - values[o + k],
        "persistence of the anomaly": lambda o, k: scale * (anomaly[o] - anomaly[o + k]),
        "the same hour of the day before": lambda o, k: values[o + k - 24] - values[o + k],
        "mean cycle of the first week": lambda o, k: scale * anomaly[o + k],
    }
    errors = {name: [_rms([way(o, lead) for o in origins]) for lead in LEADS] for name, way in reference.items()}
    sizes = []
    for M_t, M_s, growth in SIZES[:1] if smoke else SIZES:
        model = SpaceTimeStreamingGP(
            HippoFeatures(M_t, float(WEEK)), _spread(places, M_s), places, *kernels, horizon_growth=growth
        )
        model.update(hours[:WEEK], anomaly[:WEEK])
        updates, reads, misses = [], [], []
        for hour in range(WEEK, end):
            begun = time.process_time()
            model.update(hours[hour : hour + 1], anomaly[hour : hour + 1])
            updates.append(1000 * (time.process_time() - begun))
            if hour in origins:
                begun = time.process_time()
                mean, _ = model.marginals(hours[hour] + torch.tensor(LEADS, dtype=torch.float64))
                reads.append(1000 * (time.process_time() - begun))
                misses.append([scale * (mean[j] - anomaly[hour + lead]) for j, lead in enumerate(LEADS)])
        sizes.append(
            {
                "size": [M_t, M_s],
                "growth": growth,
                "rmse": [_rms([miss[j] for miss in misses]) for j in range(len(LEADS))],
                "update_ms": _quartiles(updates),
                "update_ms_worst": max(updates),
                "forecast_ms": _quartiles(reads),
                "residual": model.residual_variance().item(),
                "numbers": sum(t.numel() for _, t in model.state.information.items()),
            }
        )
    time_kernel, space_kernel, likelihood = kernels
    return {
        "references": errors,
        "sizes": sizes,
        "origins": len(origins),
        "fit_seconds": fit_seconds,
        "hours": time_kernel.lengthscale.item(),
        "km": 100 * space_kernel.base_kernel.lengthscale.item(),
        "noise": likelihood.noise.item(),
    }


def _rms(errors: list[Tensor]) -> float:
    return torch.stack(errors).square().mean().sqrt().item()


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def _with_noise(likelihood: GaussianLikelihood, factor: float) -> GaussianLikelihood:
    """The likelihood with so many times its noise."""
    new = GaussianLikelihood(noise_constraint=GreaterThan(1e-12)).double()
    new.noise = factor * likelihood.noise.detach()
    return new


def _noisier(likelihood: GaussianLikelihood, evidence: Callable[[GaussianLikelihood], float]) -> GaussianLikelihood:
    """The likelihood with the multiple of its noise that gives the largest bound on the first task.

    To a sparse model, what it cannot hold is noise too.
    """
    return max((_with_noise(likelihood, 4.0**power) for power in range(6)), key=evidence)


class _Product:
    """Our stream behind the seam of the experiments: rows of a grid, place fastest."""

    def __init__(self, M_t: int, space: Tensor, sensors: Tensor, kernels: tuple[Any, ...]) -> None:
        self.M_t, self.space, self.sensors, self.kernels = M_t, space, sensors, kernels
        self.model: SpaceTimeStreamingGP | None = None

    def _learnt(self, likelihood: GaussianLikelihood, x: Tensor, y: Tensor) -> SpaceTimeStreamingGP:
        features = HippoFeatures(self.M_t, float(TASK_HOURS))
        return self._add(SpaceTimeStreamingGP(features, self.space, self.sensors, *self.kernels[:2], likelihood), x, y)

    def _add(self, model: SpaceTimeStreamingGP, x: Tensor, y: Tensor) -> SpaceTimeStreamingGP:
        hours = x[:: len(self.sensors), 0]
        return model.update(hours, y.reshape(len(hours), -1))

    def update(self, x: Tensor, y: Tensor) -> None:
        """Choose the noise on the first task; learn."""
        if self.model is not None:
            self._add(self.model, x, y)
            return
        likelihood = _noisier(self.kernels[2], lambda candidate: self._learnt(candidate, x, y).log_evidence.item())
        self.model, self.noise = self._learnt(likelihood, x, y), likelihood.noise.item()

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """At rows of a grid of other places."""
        hours = x[:, 0].unique()
        mean, variance = self.model.marginals(hours, x[: len(x) // len(hours), 1:])
        return mean.reshape(-1), variance.reshape(-1) + self.noise


class _Exact:
    """The exact GP on the whole grid, by two eigendecompositions."""

    only_at_end = True

    def __init__(self, sensors: Tensor, kernels: tuple[Any, ...]) -> None:
        self.sensors, self.kernels, self.data = sensors, kernels, []

    def update(self, x: Tensor, y: Tensor) -> None:
        self.data.append((x[:: len(self.sensors), 0], y.reshape(-1, len(self.sensors))))

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """At rows of a grid of other places."""
        time_kernel, space_kernel, likelihood = self.kernels
        hours, y = (torch.cat(parts) for parts in zip(*self.data, strict=True))
        new = x[:, 0].unique()
        places = x[: len(x) // len(new), 1:]
        values, U = torch.linalg.eigh(time_kernel(hours.unsqueeze(-1)).to_dense())
        others, V = torch.linalg.eigh(space_kernel(self.sensors).to_dense())
        spectrum = values.clamp_min(0).outer(others.clamp_min(0)) + likelihood.noise
        left = time_kernel(new.unsqueeze(-1), hours.unsqueeze(-1)).to_dense() @ U
        right = space_kernel(places, self.sensors).to_dense() @ V
        mean = left @ ((U.mT @ y @ V) / spectrum) @ right.mT
        known = left.square() @ spectrum.reciprocal() @ right.square().mT
        prior = space_kernel(places, diag=True)
        return mean.reshape(-1), (prior - known + likelihood.noise).reshape(-1)


def _sample(x: Tensor, generator: torch.Generator) -> Tensor:
    """Some row numbers of a task."""
    return torch.randperm(len(x), generator=generator)[:SAMPLE]


def _noise_for(
    points: Tensor, kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, y: Tensor
) -> GaussianLikelihood:
    """:func:`_noisier` for inducing points, on a sample of rows."""
    return _noisier(
        likelihood,
        lambda candidate: StreamingGP(InducingPoints(points), kernel, candidate).update(x, y).log_evidence.item(),
    )


class _Points(OptimisedRows):
    """Points optimised on a sample of a task's rows; all rows are learnt."""

    def __init__(self, kernel: Kernel, unit: Tensor, likelihood: GaussianLikelihood, steps: int, seed: int) -> None:
        self.num_points, self.kernel, self.likelihood = NUM_POINTS, kernel, likelihood
        self.steps, self.rate, self.unit, self.seen, self.warnings = steps, 0.02, unit, 0, []
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Choose the noise on the first task; place the points; learn."""
        if not self.seen:
            rows = _sample(x, self.generator)
            self.likelihood = _noise_for(x[rows[: self.num_points]], self.kernel, self.likelihood, x[rows], y[rows])
        super().update(x, y)

    def _climb(self, points: Tensor, x: Tensor, y: Tensor) -> Tensor:
        rows = _sample(x, self.generator)
        # The bound of the sample counts each of its rows as often as it stands for one of the task.
        exact, self.likelihood = self.likelihood, _with_noise(self.likelihood, len(rows) / len(x))
        try:
            return super()._climb(points, x[rows], y[rows])
        finally:
            self.likelihood = exact


class _Fixed(FixedRows):
    """Points chosen greedily from a sample of the first task's rows, and kept."""

    def __init__(self, kernel: Kernel, likelihood: GaussianLikelihood, seed: int) -> None:
        super().__init__(NUM_POINTS, kernel, likelihood)
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Choose points and noise at the first task; learn."""
        if not hasattr(self, "model"):
            kernel, likelihood, _ = self.parts
            rows = _sample(x, self.generator)
            points = x[rows][select_points(kernel, x[rows], NUM_POINTS)]
            likelihood = _noise_for(points, kernel, likelihood, x[rows], y[rows])
            self.model = StreamingGP(InducingPoints(points), kernel, likelihood).eval()
        self.model.update(x, y)


def _tasks(seed: int, smoke: bool) -> dict[str, Any]:
    hours, places, values = _field()
    if smoke:
        hours, places, values = hours[: 2 * 24], places[::20], values[: 2 * 24, ::20]
    per_task, count = (24, 2) if smoke else (TASK_HOURS, TASKS)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=generator)
    out, kept = order[: len(places) // 5].sort().values, order[len(places) // 5 :].sort().values
    waves = torch.cat([torch.ones(len(hours), 1, dtype=torch.float64), _day_waves(hours)], dim=-1)
    usual = waves @ torch.linalg.lstsq(waves[:per_task], values[:per_task, kept].mean(1, keepdim=True)).solution
    error = values - usual
    error = error / error[:per_task, kept].std()
    tasks = []
    for number in range(count):
        part = slice(number * per_task, (number + 1) * per_task)
        grids = [(grid_inputs(hours[part, None], places[s]), error[part][:, s].reshape(-1)) for s in (kept, out)]
        tasks.append(Chunk(*grids[0], *grids[1]))
    kernels = _parts()
    sub = kept[torch.randperm(len(kept), generator=generator)[:FIT_SITES]]
    SpaceTimeStreamingGP(HippoFeatures(4, 1.0), places[:1], places, *kernels).fit_hyperparameters(
        hours[:per_task], error[:per_task, sub], sensors=sub, max_iterations=5 if smoke else 60
    )
    time_kernel, space_kernel, likelihood = kernels
    over_time, over_space = MaternKernel(0.5, active_dims=(0,)), ScaleKernel(MaternKernel(1.5, active_dims=(1, 2)))
    over_time.lengthscale, over_space.outputscale = time_kernel.lengthscale.item(), space_kernel.outputscale.item()
    over_space.base_kernel.lengthscale = space_kernel.base_kernel.lengthscale.item()
    product = (over_time * over_space).double()
    unit = torch.tensor([over_time.lengthscale.item()] + 2 * [over_space.base_kernel.lengthscale.item()]).double()
    space = _spread(places[kept], min(100, len(kept)))
    steps = 5 if smoke else STEPS
    methods: dict[str, Callable[[], Any]] = {
        "product 40 × 100": lambda: _Product(40, space, places[kept], kernels),
        "product 300 × 100": lambda: _Product(300, space, places[kept], kernels),
        "OSVGP, points optimised": lambda: _Points(product, unit, likelihood, steps, seed),
        "points of task 1, fixed": lambda: _Fixed(product, likelihood, seed),
        "exact GP": lambda: _Exact(places[kept], kernels),
    }
    return run_of(tasks, methods, seed=seed, places=len(kept))


class _Fixed(FixedRows):
    """Points chosen greedily from a sample of the first task's rows, and kept."""

    def __init__(self, kernel: Kernel, likelihood: GaussianLikelihood, seed: int) -> None:
        super().__init__(NUM_POINTS, kernel, likelihood)
        self.seed = seed

    def update(self, x: Tensor, y: Tensor) -> None:
        """Choose the points at the first task; learn."""
        if not hasattr(self, "model"):
            sample = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:SAMPLE]]
            points = InducingPoints(sample[select_points(self.parts[0], sample, NUM_POINTS)])
            self.model = self.model_of(points, *self.parts).eval()
        self.model.update(x, y)


# --- Beijing --------------------------------------------------------------------------------------------------------


def _beijing(seed: int, days: int, M_t: int, smoke: bool) -> dict[str, Any]:
    """Weeks of hourly PM2.5 with its real gaps; one station joins half-way, another leaves."""
    field = datasets.load_beijing_air("PM2.5")
    hours = 24 * days
    begin = 24 * 300  # the winter of 2013
    y = field.values[begin : begin + hours].log()
    places, t = _in_100_km(field.locations), torch.arange(hours, dtype=torch.float64)
    warm = 24 * (3 if smoke else 14)
    y = (y - y[:warm].nanmean()) / y[:warm][~y[:warm].isnan()].std()
    late, gone, joins = 6, 3, hours // 48 * 24
    generator = torch.Generator().manual_seed(seed)
    block = (torch.rand(hours // 12, len(places), generator=generator) < 0.1).repeat_interleave(12, dim=0)
    out = block & ~y.isnan()
    seen = y.clone()
    seen[out] = torch.nan
    seen[:joins, late] = torch.nan
    seen[joins:, gone] = torch.nan
    kernels = _parts(1.5)
    kernels[1].base_kernel.lengthscale = 0.3
    first = [s for s in range(len(places)) if s != late]
    model = SpaceTimeStreamingGP(HippoFeatures(M_t, float(warm)), places, places[first], *kernels, horizon_growth=None)
    model.fit_hyperparameters(t[:warm], seen[:warm, first], max_iterations=10 if smoke else 60)
    index = torch.empty(len(places), dtype=torch.long)
    index[first] = torch.arange(len(first))
    updates, terms = [], []
    for day in range(0, hours, 24):
        if day == joins:
            index[late] = model.declare(places[late : late + 1])
        now = torch.arange(len(places)) if day >= joins else torch.tensor(first)
        rows = slice(day, day + 24)
        begun = time.process_time()
        model.update(t[rows], seen[rows][:, now], sensors=index[now], missing="skip")
        updates.append(1000 * (time.process_time() - begun))
        terms.append(model.num_terms)
    begun = time.process_time()
    mean, variance = (part for part in model.marginals(t, places))
    read_ms = 1000 * (time.process_time() - begun)
    noise = kernels[2].noise.item()
    result = {
        "hours": hours,
        "size": M_t,
        "missing": y.isnan().double().mean().item(),
        "patterns": len(seen.isnan().unique(dim=0)),
        "terms": terms,
        "update_ms": _quartiles(updates),
        "read_ms": read_ms,
        "residual": model.residual_variance().item(),
        "numbers": sum(x.numel() for _, x in model.state.information.items()),
        "methods": {"sum of terms": _scores(mean[out], variance[out] + noise, y[out])},
    }
    wrong = _one_term(model.state, t, places, kernels)
    result["methods"]["one term, the newest sensors"] = _scores(wrong[0][out], wrong[1][out] + noise, y[out])
    nearby = seen.nanmean(1, keepdim=True).expand_as(y).nan_to_num(0.0)
    result["methods"]["mean of the other stations"] = {"rmse": metrics.rmse(nearby[out], y[out]).item(), "nlpd": None}
    last = _last(seen)
    result["methods"]["last reading of the station"] = {"rmse": metrics.rmse(last[out], y[out]).item(), "nlpd": None}
    return result


@torch.no_grad()
def _one_term(state: KroneckerState, t: Tensor, places: Tensor, kernels: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What the wrong shortcut makes of the same readings: all of time in one matrix, times the newest sensors."""
    terms = state.information
    shortcut = replace(
        terms, temporal=terms.temporal.sum(0, keepdim=True), spatial=terms.spatial[-1:], weights=terms.weights[-1:]
    )
    belief = posterior(KroneckerState(state.time, state.space, shortcut))
    time_kernel, space_kernel, _ = kernels
    A_t = online.whiten(state.time, Prior(time_kernel), t)
    A_s = online.whiten(state.space, Prior(space_kernel), places)
    residual = space_kernel.outputscale - A_t.square().sum(0).outer(A_s.square().sum(0))
    return belief.mean_on(A_t, A_s), residual + belief.variance_on(A_t, A_s)


def _last(seen: Tensor) -> Tensor:
    """The last reading before each hour, zero before the first."""
    out, last = torch.zeros_like(seen), torch.zeros_like(seen[0])
    for hour, row in enumerate(seen):
        out[hour] = last
        last = torch.where(row.isnan(), last, row)
    return out


def _scores(mean: Tensor, variance: Tensor, y: Tensor) -> dict[str, float]:
    return {"rmse": metrics.rmse(mean, y).item(), "nlpd": metrics.nlpd(mean, variance, y).item()}


# --- report ---------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Forecasts and times on ERA5, its tasks, and Beijing."""
    forecasts, tasks, beijing = result["forecasts"], result["tasks"], result["beijing"]
    persistence = forecasts["references"]["persistence"]
    rows = [[name, *(f"{e:.2f}" for e in errors)] for name, errors in forecasts["references"].items()]
    for size in forecasts["sizes"]:
        skill = [f"{e:.2f} ({1 - e / p:+.0%})" for e, p in zip(size["rmse"], persistence, strict=True)]
        rows.append([f"product {_times(size)}", *skill])
    speed = [
        [
            _times(s),
            f"{s['update_ms'][1]:.1f} ({s['update_ms'][0]:.1f} to {s['update_ms'][2]:.1f})",
            f"{s['update_ms_worst']:.0f}",
            f"{s['forecast_ms'][1]:.1f}",
            f"{s['numbers']:,}",
            f"{s['residual']:.0%}",
        ]
        for s in forecasts["sizes"]
    ]
    asked = forecasts["sizes"][0]
    figure = plots.new_figure(5.5, 3.4)
    ax = figure.subplots()
    for name, errors in forecasts["references"].items():
        ax.plot(LEADS, errors, color="0.6", linewidth=1.0, linestyle={"persistence": "-"}.get(name, ":"), label=name)
    shown = [size for size in forecasts["sizes"] if not size["growth"]]
    for size, colour in zip(shown, (plots.BLUE, plots.ORANGE, plots.GREEN), strict=False):
        ax.plot(LEADS, size["rmse"], color=colour, marker="o", markersize=3, label=f"product {_times(size)}")
    plots.style_axes(ax, "hours ahead", "RMSE [K]")
    ax.legend(fontsize=7, frameon=False)
    plots.save_figure(figure, figures / "space_time_forecast.png")
    text, facts = verdicts(
        tasks,
        ["product 40 × 100", "product 300 × 100"],
        ["OSVGP, points optimised", "points of task 1, fixed"],
        "OSVGP, points optimised",
    )
    draw_past(
        tasks,
        ["product 40 × 100", "product 300 × 100", "OSVGP, points optimised", "points of task 1, fixed"],
        figures / "space_time_tasks.png",
    )
    good = beijing[0]
    first = good[0]

    def of(runs: list[dict[str, Any]], name: str, score: str) -> str:
        values = [run["methods"][name][score] for run in runs]
        return "" if values[0] is None else str(interval(values))

    return [
        "## Space and time",
        "### Temperature over the British Isles, hour by hour",
        "ERA5, 2 m temperature, 33 × 49 places, 744 hours of March 2019 (a stand-in: one variable, where the paper has 17 "
        "and a VAE). Site means and a daily cycle come from the first week, as do the hyperparameters (Matern 1/2 in time, "
        f"{forecasts['hours']:.0f} h; Matern 3/2 in space, {forecasts['km']:.0f} km; {FIT_SITES} places, exact marginal "
        f"likelihood by Kronecker algebra, {forecasts['fit_seconds']:.0f} s). The stream takes one hour at a time, its "
        f"basis ends at the last hour (padded horizon: it grows by a quarter when hours pass it), and forecasts are made at {forecasts['origins']} hours of the second half of the "
        "month. RMSE in kelvin over all places; in brackets the skill against persistence, 1 − RMSE / RMSE of persistence:",
        table(["method", *(f"{lead} h ahead" for lead in LEADS)], rows),
        "![RMSE by hours ahead](figures/space_time_forecast.png)",
        _skill(asked["rmse"], persistence),
        table(
            [
                "M_t × M_s",
                "update of one hour [ms], median (quartiles)",
                "worst",
                "forecast of 5 hours [ms]",
                "numbers kept",
                "residual variance",
            ],
            speed,
        ),
        f"An update of one hour at M = 40 × 100 takes {asked['update_ms'][1]:.1f} ms in the median with a "
        "change of basis in each. The residual variance says how far these memories are from holding the month at this "
        "roughness: what they know is the recent past and the large scale.",
        "### Four tasks of 186 hours",
        f"A fifth of the places held out at random, {len(tasks)} seeds; one daily cycle for all places. `product` is ours; "
        f"`OSVGP` optimises {NUM_POINTS} points in (time, space) by {result['steps']} steps of Adam a task on a sample of "
        f"{result['sample']:,} rows and then learns all of them ({TASK_HOURS * tasks[0]['places']:,} a task) in closed form; "
        "`points of task 1, fixed` is conditioning in bounded memory; GPyTorch's own OVC would have to store every row. "
        "Kernels are shared; the noise of each sparse method is the multiple (1, 4, 16, ...) of the exact fit's that gives it the "
        "largest bound on the first task, since what it cannot hold is noise to it. The exact GP takes the whole grid at once, "
        "when it predicts. Times are those of the processor, in one thread.",
        scores_table(tasks),
        text,
        failures({"ERA5": facts}, "product 40 × 100"),
        failures({"ERA5": facts}, "product 300 × 100"),
        _moved(tasks),
        "![RMSE of past tasks, held-out places](figures/space_time_tasks.png)",
        "### Dust in Beijing, with the gaps as they are",
        f"PM2.5 (logarithm, standardised) at twelve stations, {first['hours']:,} hours of winter, {first['missing']:.1%} of the "
        "readings missing as they are; one station joins half-way and is declared then, another leaves. A tenth of all "
        f"half-days of a station held out, five seeds. Matern 3/2 in time and space, hyperparameters from the first two weeks; {first['size']} features of time for each station, a day at a time: "
        f"{first['patterns']} different sets of sensors report, {first['terms'][-1]} terms at the end, "
        f"{first['update_ms'][1]:.0f} ms an update (median), {first['read_ms']:.0f} ms for the whole field with the factor of "
        f"{first['size'] * 12:,} × {first['size'] * 12:,} that several terms need. Residual variance {first['residual']:.1%}.",
        table(
            ["method", "RMSE", "NLPD"],
            [[name, of(good, name, "rmse"), of(good, name, "nlpd")] for name in first["methods"]],
        ),
        "`one term` multiplies all of the past by the newest set of sensors, the shortcut that a single Kronecker product "
        "invites; its row is why there is a sum.",
        *(
            f"With {runs[0]['size']} features for {runs[0]['hours']:,} hours the residual variance is {runs[0]['residual']:.0%}, the "
            f"stream warns, and the sum of terms ends at RMSE {of(runs, 'sum of terms', 'rmse')} and NLPD "
            f"{of(runs, 'sum of terms', 'nlpd')}, worse than the mean of the other stations "
            f"({of(runs, 'mean of the other stations', 'rmse')}): what a memory cannot hold it takes for something else."
            for runs in beijing[1:]
        ),
    ]


def _times(size: dict[str, Any]) -> str:
    padded = ", padded horizon" if size["growth"] else ""
    return f"{size['size'][0]} × {size['size'][1]}{padded}"


def _moved(tasks: list[dict[str, Any]]) -> str:
    """What became of the oldest task under points that move."""
    oldest, newest = (
        interval([run["methods"]["OSVGP, points optimised"]["error"][-1][task] ** 0.5 for run in tasks])
        for task in (0, -1)
    )
    text = (
        f"At the end OSVGP has RMSE {newest} on the newest task and {oldest} on the oldest (targets are standardised)."
    )
    if oldest.mean > 1:
        text += (
            " That is worse than knowing nothing: its points follow the newest task, and what the old readings said of "
            "points that have left is forced on those that remain."
        )
    return text


def _skill(errors: list[float], persistence: list[float]) -> str:
    good = [str(lead) for lead, e, p in zip(LEADS, errors, persistence, strict=True) if e < p]
    bad = [str(lead) for lead, e, p in zip(LEADS, errors, persistence, strict=True) if e >= p]
    said = f"At M = 40 × 100 the forecast beats persistence {', '.join(good)} hours ahead" if good else "No skill"
    return said + (f" and loses {', '.join(bad)} hours ahead." if bad else ".")
