"""After 10,000 points in chunks of 100: what one more chunk costs, beside GPyTorch's online conditioning."""

from __future__ import annotations

import statistics
import time
from typing import Any

import gpytorch
import torch

from benchmarks.baselines import OnlineVariationalConditioning, Stream

CHUNK = 100
HORIZON = 20.0


def run(smoke: bool) -> dict[str, Any]:
    """Both learn the same chunks in turn; the cost and the stored numbers at a few lengths."""
    total = 2_000 if smoke else 10_000
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(total, generator=generator, dtype=torch.float64) * HORIZON).sort().values
    y = torch.sin(3 * x) + 0.1 * torch.randn(total, generator=generator, dtype=torch.float64)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double().eval()
    likelihood.noise = 0.01
    stream = Stream(64, HORIZON / 20, kernel, likelihood)
    peer = OnlineVariationalConditioning(12, kernel, likelihood)
    probe = torch.linspace(0, HORIZON, 50, dtype=torch.float64)
    rows, ours, theirs = [], [], []
    for index, (x_chunk, y_chunk) in enumerate(zip(x.split(CHUNK), y.split(CHUNK), strict=True), start=1):
        begun = time.perf_counter()
        stream.update(x_chunk, y_chunk)
        ours.append(time.perf_counter() - begun)
        # The peer's work is partly done when it predicts: an update without a prediction would flatter it.
        begun = time.perf_counter()
        peer.update(x_chunk, y_chunk)
        updated = time.perf_counter()
        peer.predict(probe)
        theirs.append((updated - begun, time.perf_counter() - begun))
        if index * CHUNK in (1_000, 2_000, 5_000, 10_000):
            recent = slice(-5, None)
            update = statistics.median(t[0] for t in theirs[recent])
            rows.append(
                {
                    "points": index * CHUNK,
                    "stream_us": 1e6 * statistics.median(ours[recent]),
                    "ovc_us": 1e6 * update,
                    "ovc_with_prediction_us": 1e6 * statistics.median(t[1] for t in theirs[recent]),
                    "ratio": update / statistics.median(ours[recent]),
                    "stream_numbers": sum(t.numel() for _, t in stream.model.state.items()),
                    "ovc_points": peer.stored,
                    "ovc_numbers": _numbers(peer.model),
                }
            )
    return {"chunk": CHUNK, "rows": rows}


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
