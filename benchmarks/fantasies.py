"""64 x 16 conditioned models in one call: time, and numbers kept, beside a loop and beside BoTorch's exact model."""

from __future__ import annotations

import gc
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from botorch.models import SingleTaskGP
from botorch.models.utils import fantasize
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from benchmarks.tables import table
from gpseq.features import InducingPoints, spread_points
from gpseq.integrations.botorch import StreamingSingleTaskGP

FANTASIES, BATCH, NEW, DIMS = 64, 16, 1, 2
#: Points at which each of the conditioned models is asked for its posterior.
ASKED = 5


def run(smoke: bool) -> dict[str, Any]:
    """Condition on 64 x 16 sets of targets at 16 inputs, and ask all models for their posterior."""
    sizes, fantasies, repeats = ((20,), 4, 2) if smoke else ((50, 100), FANTASIES, 5)
    return {
        "fantasies": fantasies,
        "batch": BATCH,
        "new": NEW,
        "asked": ASKED,
        "rows": [_measure(size, fantasies, repeats) for size in sizes],
    }


def _measure(size: int, fantasies: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    X = spread_points(size - BATCH * NEW, DIMS)
    Y = (6 * X).sin().sum(-1, keepdim=True)
    kernel, likelihood = ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double()
    kernel.base_kernel.lengthscale, likelihood.noise = 0.3, 0.01
    new = torch.rand(BATCH, NEW, DIMS, generator=generator, dtype=torch.float64)
    targets = torch.randn(fantasies, BATCH, NEW, 1, generator=generator, dtype=torch.float64)
    at = torch.rand(ASKED, DIMS, generator=generator, dtype=torch.float64)
    # Features at the data and at what they are conditioned on: there the sparse model is exact.
    features = InducingPoints(torch.cat([X, new.reshape(-1, DIMS)]))
    model = StreamingSingleTaskGP(X, Y, covar_module=kernel, likelihood=likelihood, features=features, warmup_size=0)
    exact = SingleTaskGP(X, Y, covar_module=kernel, likelihood=likelihood, outcome_transform=None).eval()
    with torch.no_grad(), warnings.catch_warnings(), fantasize():
        warnings.simplefilter("ignore", NumericalWarning)
        exact.posterior(at)  # fills the caches that it conditions
        row: dict[str, Any] = {"size": size}
        child, row["condition_ms"] = _timed(lambda: model.condition_on_observations(new, targets), repeats)
        ours, row["ask_ms"] = _timed(lambda: _moments(child, at), repeats)
        peer, row["exact_condition_ms"] = _timed(lambda: exact.condition_on_observations(new, targets), repeats)
        theirs, row["exact_ask_ms"] = _timed(lambda: _moments(peer, at), repeats)
        row["difference"] = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))

        def loop() -> Any:
            for f in range(fantasies):
                for b in range(BATCH):
                    last = model.condition_on_observations(new[b], targets[f, b])
            return last

        _, row["loop_ms"] = _timed(loop, 1)
        shared = {id(t) for t in (*model.buffers(), *model.parameters())}
        state = child.model.state
        row["new_numbers"] = sum(_stored(t) for _, t in state.items() if id(t) not in shared)
        row["expected_numbers"] = expected_numbers(size, fantasies)
        row["naive_numbers"] = fantasies * BATCH * size * (size + 1)
        row["peak_mb"], row["freed_mb"] = _allocated(lambda: model.condition_on_observations(new, targets))
    row["resident_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def expected_numbers(size: int, fantasies: int) -> int:
    """What shapes say: one G for each set of inputs; r and c for each model; one count."""
    return BATCH * size**2 + fantasies * BATCH * (size + 1) + 1


def _moments(model: Any, at: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.posterior(at)
    return posterior.mean, posterior.variance


def _stored(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    result = call() if repeats > 1 else None  # the first call pays for much else
    seconds = []
    for _ in range(repeats):
        gc.collect()
        begun = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begun)
    return result, 1e3 * statistics.median(seconds)


def _allocated(call: Callable[[], Any]) -> tuple[float, float]:
    """Megabytes that torch has allocated at most at one time during a call, and that its result holds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del result
    return peak / 1e6, now / 1e6


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Times and sizes."""
    times, sizes = [], []
    for row in result["rows"]:
        ours, exact = row["condition_ms"] + row["ask_ms"], row["exact_condition_ms"] + row["exact_ask_ms"]
        times.append(
            [
                row["size"],
                f"{row['condition_ms']:.1f}",
                f"{row['ask_ms']:.1f}",
                f"{row['loop_ms']:.0f} ({row['loop_ms'] / row['condition_ms']:.0f} times)",
                f"{row['exact_condition_ms']:.1f}",
                f"{row['exact_ask_ms']:.1f}",
                f"{exact / ours:.1f}",
                f"{row['difference']:.0e}",
            ]
        )
        sizes.append(
            [
                row["size"],
                f"{row['new_numbers']:,}",
                f"{row['expected_numbers']:,}",
                f"{row['naive_numbers']:,}",
                f"{row['new_numbers'] * 8e-6:.2f}",
                f"{row['freed_mb']:.2f}",
                f"{row['peak_mb']:.1f}",
                f"{row['resident_mb']:.0f}",
            ]
        )
    f, b = result["fantasies"], result["batch"]
    return [
        "## Fantasies",
        f"{f} x {b} models in one call: `StreamingSingleTaskGP.condition_on_observations` with X of shape "
        f"({b}, {result['new']}, 2) and Y of shape ({f}, {b}, {result['new']}, 1), then the posterior of all of them "
        f"at {result['asked']} points. The M features are at the M - 16 training inputs and the 16 new ones, where the model is exact, so that BoTorch's "
        "`SingleTaskGP` with the same data and hyperparameters must answer the same. Milliseconds, median.",
        table(
            ["M", "one call", "posterior", "a loop", "exact: call", "exact: posterior", "exact / ours", "difference"],
            times,
        ),
        "What the new models hold beyond what they share with their parent: one G for each set of inputs, r and c for "
        "each model. Counted in their storages, computed from the shapes, and what one G for each model would take. "
        "Then megabytes: of the counted numbers, of what the call has allocated and not freed and at most at one time "
        "(PyTorch's profiler), and the peak of the process.",
        table(
            ["M", "numbers", "from shapes", "one G each", "MB", "held, MB", "peak of call, MB", "process, MB"],
            sizes,
        ),
    ]
