"""A million updates of one stream, and a day of a fleet: do memory and time stay flat, and the posterior honest?"""

from __future__ import annotations

import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch import Tensor

from benchmarks.tables import table
from gpseq import plots
from gpseq.features import HippoFeatures
from gpseq.models import StreamingFleet, StreamingGP

UPDATES, BLOCKS = 1_000_000, 50
STREAMS, MINUTES = 1_000, 1_440
#: Time between observations, and length of the window that is remembered, in lengthscales.
STEP, WINDOW, FEATURES = 0.05, 8.0, 16
#: How far the window slides at once: a change of basis costs as much as many updates.
AHEAD = 1.0
NOISE = 0.1
#: Growth of the memory that counts as none, in MB.
FLAT = 5.0
#: One forecast in so many updates is scored.
SCORED = 20


def run(smoke: bool) -> dict[str, Any]:
    """One stream, then the fleet."""
    return {
        "stream": one_stream(2_000 if smoke else UPDATES, 10 if smoke else BLOCKS),
        "fleet": fleet(50 if smoke else STREAMS, 60 if smoke else MINUTES),
        "step": STEP,
        "ahead": AHEAD,
        "window": WINDOW,
        "features": FEATURES,
        "threads": torch.get_num_threads(),
    }


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def truth(t: Tensor) -> Tensor:
    """A signal whose lengthscale is about one."""
    return (1.3 * t).sin() + 0.5 * (0.61 * t + 1).sin()


def modules() -> tuple[Any, Any, Any]:
    """Features that slide, kernel and likelihood."""
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = NOISE**2
    return HippoFeatures(FEATURES, AHEAD, measure="legt", window=WINDOW), kernel, likelihood


def slide(model: StreamingGP, time: float) -> None:
    """Move the window on where a time has come to its end."""
    features: Any = model.features
    if time > features.horizon:
        model.rebase(features.with_horizon(time + AHEAD))


def one_stream(updates: int, blocks: int) -> dict[str, Any]:
    """Single rows; some forecasts of the next one are scored before it is learnt."""
    model = StreamingGP(*modules()).eval()
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"mb": [], "ms": [], "rmse": [], "coverage": []}
    size, number = updates // blocks, 0
    for _ in range(blocks):
        seconds, errors, inside = [], [], []
        noise = NOISE * torch.randn(size, generator=generator, dtype=torch.float64)
        for shift in noise:
            t = torch.tensor([STEP * number], dtype=torch.float64)
            f = truth(t)
            if number % SCORED == 0 and number > WINDOW / STEP:
                with torch.no_grad():
                    p = model.likelihood(model(t))
                errors.append((p.mean - f).square().item())
                inside.append(float((p.mean - f - shift).abs() < 1.96 * p.stddev))
            begun = time.process_time()
            slide(model, t.item())
            model.update(t, f + shift)
            seconds.append(time.process_time() - begun)
            number += 1
        found["mb"].append(resident())
        found["ms"].append(1e3 * statistics.fmean(seconds))
        found["rmse"].append(math.sqrt(statistics.fmean(errors)) if errors else math.nan)
        found["coverage"].append(statistics.fmean(inside) if inside else math.nan)
    finite = all(bool(value.isfinite().all()) for name, value in model.state.items() if name != "hyperparameters")
    return {"updates": updates, "blocks": found, "finite": finite}


def fleet(streams: int, minutes: int) -> dict[str, Any]:
    """A reading of each stream a minute; a tenth of them is missing, and now and then a burst of NaN."""
    model = StreamingFleet(streams, *modules()).eval()
    generator = torch.Generator().manual_seed(1)
    phase = torch.arange(streams, dtype=torch.float64)
    found: dict[str, list[float]] = {"mb": [], "ms": [], "coverage": []}
    for minute in range(minutes):
        t = torch.tensor([STEP * minute], dtype=torch.float64)
        f = truth(t + phase).unsqueeze(-1)
        y = f + NOISE * torch.randn(streams, 1, generator=generator, dtype=torch.float64)
        y[torch.rand(streams, generator=generator) < (1.0 if minute % 240 == 239 else 0.1)] = math.nan
        if minute % 30 == 29 and minute * STEP > WINDOW:
            with torch.no_grad():
                p = model.likelihood(model(t))
            inside = ((p.mean - y).abs() < 1.96 * p.stddev)[~y.isnan()]
            if len(inside):
                found["coverage"].append(inside.double().mean().item())
        begun = time.process_time()
        slide(model, t.item())
        model.update(t, y)
        found["ms"].append(1e3 * (time.process_time() - begun))
        found["mb"].append(resident())
    finite = bool(model.state.G.isfinite().all() and model.state.r.isfinite().all())
    size = sum(value[0].numel() for value in (model.state.G, model.state.r, model.state.c, model.state.count))
    return {"streams": streams, "minutes": minutes, "series": found, "finite": finite, "numbers": size}


def flatness(values: list[float]) -> tuple[float, float]:
    """Medians of the second tenth and of the last: what comes before is warm-up."""
    tenth = max(len(values) // 10, 1)
    return statistics.median(values[tenth : 2 * tenth]), statistics.median(values[-tenth:])


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Memory, time and coverage from beginning to end."""
    stream, day = result["stream"], result["fleet"]
    rows = []
    for name, parts in (("one stream", stream["blocks"]), ("fleet", day["series"])):
        (mb, mb_end), (ms, ms_end) = flatness(parts["mb"]), flatness(parts["ms"])
        seen = [value for value in parts["coverage"] if not math.isnan(value)]
        later = parts["mb"][len(parts["mb"]) // 10 :]
        near = statistics.fmean(value - mb < FLAT for value in later)
        rows.append(
            [
                name,
                f"{mb:.0f}",
                f"{mb_end:.0f}",
                f"{max(later) - mb:+.1f}",
                f"{100 * near:.1f} %",
                f"{ms:.2f}",
                f"{ms_end:.2f}",
                f"{100 * statistics.fmean(seen):.1f} %" if seen else "–",
            ]
        )
    figure = plots.new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    done = [(i + 1) * stream["updates"] / len(stream["blocks"]["mb"]) for i in range(len(stream["blocks"]["mb"]))]
    left.plot(done, stream["blocks"]["mb"], color=plots.BLUE)
    left.set_ylim(0, 1.2 * max(stream["blocks"]["mb"]))
    plots.style_axes(left, "updates", "resident memory [MB]")
    right.plot(done, stream["blocks"]["ms"], color=plots.VERMILION)
    right.set_ylim(0, 1.5 * max(stream["blocks"]["ms"]))
    plots.style_axes(right, "updates", "mean time of an update [ms]")
    plots.save_figure(figure, figures / "soak.png")
    finite = "All states are finite at the end." if stream["finite"] and day["finite"] else "**A state is not finite.**"
    return [
        "## A long run",
        f"{stream['updates']:,} updates of one stream with one row each, and {day['minutes']:,} minutes of "
        f"{day['streams']:,} streams with a tenth of the readings missing and bursts in which all are; "
        f"{result['features']} features on a window of {result['window']:g} lengthscales that slides by {result['ahead']:g} at a time. "
        f"Coverage is of 95 % intervals of readings that were not learnt yet; times are those of the processor. {finite}",
        table(
            [
                "",
                "MB after warm-up",
                "MB at the end",
                "largest excess [MB]",
                f"below {FLAT:g} MB",
                "ms",
                "ms at the end",
                "coverage",
            ],
            rows,
        ),
        "![Memory and time of a million updates](figures/soak.png)",
    ]
