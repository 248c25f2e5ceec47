"""After 10,000 points in chunks of 100: what one more chunk costs, beside GPyTorch's online conditioning."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from torch import Tensor

from benchmarks.baselines import OnlineVariationalConditioning, Stream

CHUNK = 100
HORIZON = 20.0
TIMED = 3  # chunks


def run(smoke: bool) -> dict[str, Any]:
    """The cost of three more chunks at a few lengths, and the numbers that are kept.

    Times come in any order, so that the peer's first chunk covers them all and its pseudo-data are well conditioned.
    The stream learns every chunk of 100. The peer is given all but the last chunks at once, which leaves it in the
    same state: chunk by chunk, its copies of growing matrices do not fit in 24 GB at 10,000 points.
    """
    lengths = (1_000, 2_000) if smoke else (1_000, 2_000, 5_000, 10_000)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(max(lengths), generator=generator, dtype=torch.float64) * HORIZON
    y = torch.sin(3 * x) + 0.1 * torch.randn(len(x), generator=generator, dtype=torch.float64)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double().eval()
    likelihood.noise = 0.01
    rows = []
    for length in lengths:
        stream, ours = Stream(64, HORIZON, kernel, likelihood), []
        for x_chunk, y_chunk in zip(x[:length].split(CHUNK), y[:length].split(CHUNK), strict=True):
            ours.append(_seconds(stream.update, x_chunk, y_chunk))
        peer, theirs = OnlineVariationalConditioning(12, kernel, likelihood), []
        before = length - TIMED * CHUNK
        _seconds(peer.update, x[:CHUNK], y[:CHUNK])
        _seconds(peer.update, x[CHUNK:before], y[CHUNK:before])
        for x_chunk, y_chunk in zip(x[before:length].split(CHUNK), y[before:length].split(CHUNK), strict=True):
            theirs.append(_seconds(peer.update, x_chunk, y_chunk))
        update = statistics.median(theirs)
        rows.append(
            {
                "points": length,
                "stream_us": 1e6 * statistics.median(ours[-TIMED:]),
                "ovc_us": 1e6 * update,
                "ratio": update / statistics.median(ours[-TIMED:]),
                "stream_numbers": sum(t.numel() for _, t in stream.model.state.items()),
                "ovc_points": peer.stored,
                "ovc_numbers": _numbers(peer.model),
            }
        )
        del peer
        gc.collect()
    return {"chunk": CHUNK, "timed": TIMED, "rows": rows}


def _seconds(update: Callable[[Tensor, Tensor], None], x: Tensor, y: Tensor) -> float:
    # Above 800 points GPyTorch turns to iterative methods, with which the peer breaks down here.
    with gpytorch.settings.max_cholesky_size(100_000):
        begun = time.perf_counter()
        update(x, y)
    return time.perf_counter() - begun


def _numbers(model: Any) -> int:
    """Numbers that a fantasy model keeps: its data and the caches of its prediction strategy."""
    seen: dict[int, int] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes() // value.element_size()
        elif depth and isinstance(value, dict):
            for item in value.values():
                visit(item, depth - 1)
        elif depth and isinstance(value, (list, tuple)):
            for item in value:
                visit(item, depth - 1)
        elif depth and hasattr(value, "_args"):
            visit(value._args, depth - 1)
            visit(getattr(value, "_memoize_cache", {}), depth - 1)

    visit(getattr(model, "train_inputs", ()), 2)
    visit(getattr(model, "train_targets", ()), 2)
    strategy = getattr(model, "prediction_strategy", None)
    if strategy is not None:
        visit(dict(vars(strategy)), 6)
    return sum(seen.values())
