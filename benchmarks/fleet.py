"""A thousand streams at once: one batched update against a Python loop over as many models."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch import Tensor

from benchmarks.tables import table
from benchmarks.timing import in_turn
from gpseq import plots
from gpseq.features import HippoFeatures
from gpseq.models import CapacityWarning, StreamingFleet, StreamingGP

ORDERS = (16, 32, 64)
#: Observations that each stream has seen before anything is timed, and the fraction that is active where some are idle.
SEEN, ACTIVE = 32, 0.1
#: Lengthscales of the horizon for each feature: within capacity.
REACH = 0.5
CHUNK = 256
WARM_UP = 1

ONE = "one new point each"
OWN = "one new point each, own hyperparameters"
NAN = "a tenth of the streams, the others NaN"
SOME = "a tenth of the streams, by streams="
MANY = f"{CHUNK} new points each"
MANY_SHARED = f"{CHUNK} new points each at shared times"


def run(smoke: bool) -> dict[str, Any]:
    """Every way of bringing new points to the streams, each in turn with the loop that does the same."""
    num = 50 if smoke else 1000
    # A loop over a thousand models with 256 points each takes seconds: a few turns are enough there.
    turns = {ONE: 8, NAN: 20, SOME: 20, OWN: 5, MANY: 2, MANY_SHARED: 2}
    results = {}
    for order in ORDERS[:1] if smoke else ORDERS:
        few = {what: 2 if smoke else n for what, n in turns.items()}
        results[str(order)] = _shared(order, num, few) | {"own": _own(order, num, few[OWN])}
    return {
        "streams": num,
        "threads": torch.get_num_threads(),
        "seen": SEEN,
        "orders": results,
    }


def _shared(order: int, num: int, turns: dict[str, int]) -> dict[str, Any]:
    """One kernel for all streams."""
    horizon = REACH * order
    fleet, loop = _fleet(order, num, horizon, own=False), _loop(order, num, horizon)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = horizon * torch.rand(num, n, generator=generator, dtype=torch.float64)
        y = torch.sin(x + torch.arange(num)[:, None]) + 0.1 * torch.randn(num, n, generator=generator, dtype=x.dtype)
        return x, y

    seen = draw(SEEN)
    fleet.update(*seen)
    for model, x, y in zip(loop, *seen, strict=True):
        model.update(x, y)
    x, y = draw(1)
    active = torch.randperm(num, generator=generator)[: round(ACTIVE * num)]
    sparse = torch.full_like(y, torch.nan)
    sparse[active] = y[active]
    chosen = active.tolist()
    x_many, y_many = draw(CHUNK)
    x_shared = x_many[0]

    def loop_over(which: Any, x: Tensor, y: Tensor) -> None:
        for s in which:
            loop[s].update(x[s], y[s])

    everyone = range(num)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        ONE: (lambda: fleet.update(x, y), lambda: loop_over(everyone, x, y)),
        NAN: (lambda: fleet.update(x, sparse), lambda: loop_over(chosen, x, y)),
        SOME: (lambda: fleet.update(x[active], y[active], streams=active), lambda: loop_over(chosen, x, y)),
        MANY: (lambda: fleet.update(x_many, y_many), lambda: loop_over(everyone, x_many, y_many)),
        MANY_SHARED: (
            lambda: fleet.update(x_shared, y_many),
            lambda: loop_over(everyone, x_shared.expand(num, -1), y_many),
        ),
    }
    rows = {what: _compare(*pair, turns[what]) for what, pair in pairs.items()}
    return {
        "ways": rows,
        "state": _sizes(fleet),
        "largest_difference": _disagreement(fleet, loop, horizon),
    }


def _own(order: int, num: int, turns: int) -> dict[str, Any]:
    """A kernel, and so a basis, for each stream; to time them their values may be the same."""
    horizon = REACH * order
    fleet, loop = _fleet(order, num, horizon, own=True), _loop(order, num, horizon)
    generator = torch.Generator().manual_seed(0)
    x = horizon * torch.rand(num, 1, generator=generator, dtype=torch.float64)
    y = torch.randn(num, 1, generator=generator, dtype=torch.float64)

    def loop_over() -> None:
        for model, inputs, target in zip(loop, x, y, strict=True):
            model.update(inputs, target)

    return {"way": _compare(lambda: fleet.update(x, y), loop_over, turns), "state": _sizes(fleet)}


def _compare(ours: Callable[[], Any], loop: Callable[[], Any], turns: int) -> dict[str, Any]:
    """Medians, and the quartiles of the ratios of neighbours."""
    ways = {"fleet": ours, "loop": loop}
    in_turn(ways, WARM_UP)
    seconds = in_turn(ways, turns)
    ratios = [slow / fast for slow, fast in zip(seconds["loop"], seconds["fleet"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "turns": turns,
        "fleet_ms": 1e3 * statistics.median(seconds["fleet"]),
        "loop_ms": 1e3 * statistics.median(seconds["loop"]),
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def _modules(batch: tuple[int, ...]) -> tuple[Any, Any]:
    shape = torch.Size(batch)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(batch_shape=shape), batch_shape=shape).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.01
    return kernel, likelihood


def _fleet(order: int, num: int, horizon: float, own: bool) -> StreamingFleet:
    kernel, likelihood = _modules((num,) if own else ())
    return StreamingFleet(num, HippoFeatures(order, horizon), kernel, likelihood).eval()


def _loop(order: int, num: int, horizon: float) -> list[StreamingGP]:
    """Models of their own; copies, because building a thousand bases takes longer than anything that is timed."""
    kernel, likelihood = _modules(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CapacityWarning)
        model = StreamingGP(HippoFeatures(order, horizon), kernel, likelihood).eval()
    return [copy.deepcopy(model) for _ in range(num)]


def _disagreement(fleet: StreamingFleet, loop: list[StreamingGP], horizon: float) -> float:
    """Largest difference of posterior means and standard deviations after everything that both have learnt."""
    at = torch.linspace(0.0, horizon, 9, dtype=torch.float64)
    with torch.no_grad():
        posterior = fleet(at)
        mean, std = posterior.mean, posterior.variance.sqrt()
        worst = 0.0
        for s in range(0, len(loop), max(len(loop) // 20, 1)):
            one = loop[s](at)
            worst = max(
                worst, (mean[s] - one.mean).abs().max().item(), (std[s] - one.variance.sqrt()).abs().max().item()
            )
    return worst


def _sizes(fleet: StreamingFleet) -> dict[str, int]:
    """Numbers in the state: those of each stream, and those of the basis."""
    of = {name: tensor.numel() for name, tensor in fleet.state.items()}
    own = sum(of.pop(name) for name in ("G", "r", "c", "count"))
    return {"streams": own, "basis": sum(of.values())}


def _ways(entry: dict[str, Any]) -> dict[str, Any]:
    return entry["ways"] | {OWN: entry["own"]["way"]}


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Speed beside the loop, and what the state holds."""
    orders = result["orders"]
    rows = []
    for order, entry in orders.items():
        for what, way in _ways(entry).items():
            low, high = way["ratio_quartiles"]
            times = f"{way['fleet_ms']:.2f}", f"{way['loop_ms']:.0f}"
            rows.append([order, what, *times, f"{way['ratio']:.0f} ({low:.0f} to {high:.0f})"])
    sizes = []
    for order, entry in orders.items():
        shared, own = entry["state"], entry["own"]["state"]
        sizes.append(
            [
                order,
                f"{shared['streams']:,}",
                f"{shared['basis']:,}",
                f"{own['basis']:,}",
                f"{8e-6 * sum(shared.values()):.1f}",
                f"{8e-6 * sum(own.values()):.1f}",
            ]
        )
    worst = max(entry["largest_difference"] for entry in orders.values())
    figure = plots.new_figure(8, 3.6)
    ax = figure.subplots()
    positions = range(len(orders))
    shown = ((ONE, plots.BLUE), (OWN, plots.ORANGE), (SOME, plots.GREEN), (NAN, plots.VERMILION), (MANY, plots.GREY))
    for offset, (what, colour) in enumerate(shown):
        ways = [_ways(entry)[what] for entry in orders.values()]
        ratios = [way["ratio"] for way in ways]
        spread = [
            [r - way["ratio_quartiles"][0] for r, way in zip(ratios, ways, strict=True)],
            [way["ratio_quartiles"][1] - r for r, way in zip(ratios, ways, strict=True)],
        ]
        places = [p + 0.17 * (offset - 2) for p in positions]
        ax.bar(places, ratios, 0.15, color=colour, label=what, yerr=spread, error_kw={"lw": 0.8, "ecolor": "0.3"})
    ax.set_yscale("log")
    ax.axhline(1.0, color="0.5", linewidth=0.8)
    ax.set_xticks(list(positions), [f"M = {order}" for order in orders])
    plots.style_axes(ax, "", "times faster than the loop")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    plots.save_figure(figure, figures / "fleet.png")
    return [
        "## A fleet of streams",
        f"{result['streams']:,} independent streams that have seen {result['seen']} observations each, with an RBF "
        f"kernel on {REACH:g} M lengthscales, {result['threads']} thread. The fleet is one `StreamingFleet`; the loop "
        "calls `update` of as many `StreamingGP`, of the active ones only where a tenth is. Both are timed in turn in "
        "one process; medians, with the quartiles of the ratios of neighbours. Afterwards posterior means and standard "
        f"deviations of 20 of the streams differ by at most {worst:.0e}.",
        table(["M", "what comes", "fleet [ms]", "loop [ms]", "times faster"], rows),
        "![How many times faster a fleet is than a loop](figures/fleet.png)",
        "With one new point each the loop pays for a call each and the fleet for one; what remains is to read and write "
        "the information matrices once. With many points a call the arithmetic counts, which both have to do. "
        "`streams=` touches the active streams only; with NaN the whole state is passed over.",
        table(
            [
                "M",
                "numbers of the streams",
                "basis, shared",
                "bases, own hyperparameters",
                "MB, shared",
                "MB, own",
            ],
            sizes,
        ),
    ]
