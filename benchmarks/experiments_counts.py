"""Daily deaths in five tasks, negative binomial: a memory beside points that are learnt by gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Streamed
from benchmarks.counts import DAYS, PRIORS, TASKS, model_of
from benchmarks.experiments import draw_past, failures, over_seeds, run_of, scores_table, verdicts
from benchmarks.following import Chunk
from benchmarks.rivals import BatchRows, FixedRows, GradientPoints, Sited
from gpseq import datasets
from gpseq.features import HippoFeatures, InducingPoints, SelectedPoints
from gpseq.models import StreamingGP

SIZES = (15, 30)
#: Adam steps of OSVGP at each task, for q and the points; the paper takes 5,000.
STEPS, RATE = 1000, 0.01

OURS = ("LegS", "points, re-selected")
RIVALS = ("OSVGP, points optimised", "points of task 1, fixed")
SHOWN = ("LegS", "points, re-selected", "OSVGP, points optimised", "SVGP, all data")


def run(smoke: bool) -> dict[str, Any]:
    """Seeds of held-out days and initialisations; hyperparameters by the bound on the first task, then frozen."""
    series = datasets.load_covid_deaths()
    y = series.target.double()[:DAYS]
    cases = []
    for size in SIZES[:1] if smoke else SIZES:
        runs = []
        for seed in range(1 if smoke else 5):
            tasks = _tasks(y, seed)
            fitted = model_of(size, DAYS / TASKS)
            fitted.fit_hyperparameters(tasks[0].x, tasks[0].y)
            about = {
                "seed": seed,
                "lengthscale": fitted.covar_module.base_kernel.lengthscale.item(),
                "outputscale": fitted.covar_module.outputscale.item(),
                "mean": fitted.mean_module.constant.item(),
                "dispersion": fitted.likelihood.dispersion.item(),
            }
            runs.append(run_of(tasks, _methods(size, fitted, seed, 10 if smoke else STEPS), **about))
            print(f"M = {size}, seed {seed}: done", flush=True)
        cases.append({"size": size, "seeds": runs})
    return {"series": series.name, "days": DAYS, "steps": 10 if smoke else STEPS, "rate": RATE, "cases": cases}


def _tasks(y: Tensor, seed: int) -> list[Chunk]:
    days = torch.arange(DAYS, dtype=torch.float64)
    out = torch.zeros(DAYS, dtype=torch.bool)
    out[torch.randperm(DAYS, generator=torch.Generator().manual_seed(seed))[: DAYS // 5]] = True
    parts = torch.arange(DAYS).tensor_split(TASKS)
    return [Chunk(days[p[~out[p]]], y[p[~out[p]]], days[p[out[p]]], y[p[out[p]]]) for p in parts]


def _methods(size: int, fitted: StreamingGP, seed: int, steps: int) -> dict[str, Callable[[], Any]]:
    kernel, likelihood, mean = fitted.covar_module, fitted.likelihood, fitted.mean_module

    def sited(method: Callable[[], Any]) -> Callable[[], Sited]:
        return lambda: Sited(method(), likelihood)

    def stream(features: Callable[[], Any]) -> Callable[[], Sited]:
        # The horizon ends at the data and is stretched at every task, as in the paper.
        return sited(lambda: Streamed(features(), kernel, likelihood, mean_module=mean, horizon_growth=None))

    def grid(x: Tensor) -> InducingPoints:
        return InducingPoints(torch.linspace(0.0, x.max().item(), size, dtype=torch.float64))

    return {
        "LegS": stream(lambda: HippoFeatures(size, DAYS / TASKS)),
        "points, re-selected": stream(lambda: SelectedPoints(size)),
        "OSVGP, points optimised": lambda: GradientPoints(size, kernel, likelihood, mean, steps, seed, RATE),
        "points of task 1, fixed": sited(lambda: FixedRows(size, kernel, likelihood, mean)),
        "SVGP, all data": sited(lambda: BatchRows(grid, kernel, likelihood, mean)),
    }


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """One part a size; the verdicts follow from the numbers."""
    medians = ", ".join(f"{name} {median:g}" for name, (median, _) in PRIORS.items())
    parts = [
        "## Daily deaths in five tasks",
        f"Deaths by day of death in all of Brazil in the first {result['days']} days, a stand-in for the paper's Santa "
        "Catarina. Negative binomial with log link, Matern 5/2, five tasks, 20 % of the days held out at random, five seeds "
        "of held-out days and initialisations, means and 95 % t-intervals. Hyperparameters by the bound on the first task "
        f"under log-normal priors (medians: {medians}), then frozen and shared by all; the case before lets them follow the "
        "stream instead. Ours and the fixed points update by natural-gradient steps on sites until convergence, `OSVGP` by "
        f"{result['steps']} steps of Adam (rate {result['rate']}) a task on q and the positions together, the bound being "
        "the same; the paper takes 5,000. GPyTorch's online conditioning is for Gaussian likelihoods only, so OVC is "
        "represented by the points of the first task, kept. `SVGP, all data` is fitted anew to all days so far on a grid of "
        "as many points. The RMSE is that of the predictive mean, in deaths; an error of the log rate is multiplied by "
        "thousands there. Times are those of the processor, in one thread. "
        "In the verdicts `level` says that the interval of the paired difference holds zero, not that there is none.",
    ]
    facts = {}
    for case in result["cases"]:
        runs, name = case["seeds"], f"daily deaths, M = {case['size']}"
        text, facts[name] = verdicts(runs, OURS, RIVALS, RIVALS[0])
        file = f"experiment_deaths_{case['size']}.png"
        draw_past(runs, SHOWN, figures / file)
        parts += [
            f"### Daily deaths, M = {case['size']}",
            scores_table(runs),
            text,
            _why(runs),
            f"![RMSE of past tasks as the stream goes on, means over seeds, {name}](figures/{file})",
        ]
    parts += ["**In short.** " + " ".join(failures(facts, ours) for ours in OURS)]
    return parts


def _why(runs: list[dict[str, Any]]) -> str:
    names = ("LegS", RIVALS[0], "SVGP, all data")
    nlpd = {name: over_seeds(runs, name, "nlpd", "end") for name in names}
    lengthscales = sorted(run["lengthscale"] for run in runs)
    return (
        f"NLPD at the end: LegS {nlpd['LegS']}, OSVGP {nlpd[RIVALS[0]]}, the batch fit {nlpd['SVGP, all data']}. The first "
        f"task sets the lengthscale at {lengthscales[0]:.0f} to {lengthscales[-1]:.0f} days."
    )
