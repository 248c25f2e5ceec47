"""One million points: rate, growth of time and memory, and the distance to a bare loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch import Tensor

from benchmarks.timing import in_turn
from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP
from gpseq.variational import Prior, online

NUM_FEATURES = 64
HORIZON = 20.0  # in lengthscales
FIRST_HORIZON = 1.0


def run(smoke: bool) -> dict[str, Any]:
    """The whole stream in chunks of 1,000, then shorter streams in chunks of 100 and 1."""
    total = 100_000 if smoke else 1_000_000
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(total, generator=generator, dtype=torch.float64) * HORIZON).sort().values
    y = torch.sin(3 * x) + 0.1 * torch.randn(total, generator=generator, dtype=torch.float64)
    streams = {}
    for dtype in (torch.float64, torch.float32):
        streams[str(dtype).removeprefix("torch.")] = _stream(x.to(dtype), y.to(dtype), 1000)
    for size in (100, 1):
        count = 1000 * size if size > 1 else (500 if smoke else 3000)
        stride = total // count
        streams[f"chunks of {size}"] = _stream(x[::stride][:count], y[::stride][:count], size)
    return {
        "num_features": NUM_FEATURES,
        "num_nodes": HippoFeatures(NUM_FEATURES, 1.0).num_nodes,
        "points": total,
        "threads": torch.get_num_threads(),
        "streams": streams,
        "floor": _floor(x, y, repetitions=20 if smoke else 200),
    }


def _model(dtype: torch.dtype, horizon: float = FIRST_HORIZON) -> StreamingGP:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).to(dtype)
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(dtype)
    likelihood.noise = 0.01
    return StreamingGP(HippoFeatures(NUM_FEATURES, horizon), kernel, likelihood).eval()


def _stream(x: Tensor, y: Tensor, size: int) -> dict[str, Any]:
    model = _model(x.dtype)
    seconds, changes, memory = [], [], {}
    for index, (x_chunk, y_chunk) in enumerate(zip(x.split(size), y.split(size), strict=True), start=1):
        features = model.features
        begun = time.perf_counter()
        model.update(x_chunk, y_chunk)
        elapsed = time.perf_counter() - begun
        (seconds if model.features is features else changes).append(elapsed)
        if index in (10, 1000):
            memory[index] = _resident()
    total = sum(seconds) + sum(changes)
    return {
        "chunk": size,
        "dtype": str(x.dtype).removeprefix("torch."),
        "points": len(x),
        "points_per_second": len(x) / total,
        "update_median_us": 1e6 * statistics.median(seconds),
        "update_quartiles_us": [1e6 * q for q in statistics.quantiles(seconds, n=4)],
        "last_over_first": statistics.median(seconds[-100:]) / statistics.median(seconds[:100]),
        "basis_changes": len(changes),
        "basis_change_median_us": 1e6 * statistics.median(changes) if changes else None,
        "resident_growth_mb": (memory[1000] - memory[10]) / 2**20 if len(memory) == 2 else None,
    }


def _floor(x: Tensor, y: Tensor, repetitions: int) -> dict[str, Any]:
    """An update beside the least that any update must do, in turn, so that drift of the machine cancels."""
    model = _model(torch.float64, HORIZON)
    stride = len(x) // 1000
    x, y = x[::stride][:1000].clone(), y[::stride][:1000].clone()
    prior = Prior(model.covar_module)
    state = online.initial_state(model.features, prior).detach()
    V, nodes, column = state.whitened_weights, state.nodes, x.unsqueeze(-1)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    G, r = torch.zeros_like(state.G), torch.zeros_like(state.r)

    @torch.no_grad()
    def update() -> None:
        model.update(x, y)

    @torch.no_grad()
    def bare(covariance: Tensor) -> None:
        A = V @ covariance
        G.add_(A @ A.mT)
        r.add_(A @ y)

    def bare_gpytorch() -> None:
        with torch.no_grad():
            bare(kernel(nodes, column).to_dense())

    def bare_written_out() -> None:
        bare((nodes - x).square_().mul_(-0.5).exp_())

    ways: dict[str, Callable[[], None]] = {
        "update": update,
        "bare loop, GPyTorch's kernel": bare_gpytorch,
        "bare loop, kernel written out": bare_written_out,
    }
    seconds = in_turn(ways, repetitions)
    M, Q, n = NUM_FEATURES, len(nodes), len(x)
    return {
        "median_us": {name: 1e6 * statistics.median(values) for name, values in seconds.items()},
        "points_per_second": {name: n / statistics.median(values) for name, values in seconds.items()},
        "update_over": {
            name: statistics.median([u / v for u, v in zip(seconds["update"], values, strict=True)])
            for name, values in seconds.items()
            if name != "update"
        },
        "flops_per_point": 2 * M * Q + 2 * M * M + 4 * M,
        "kernel_evaluations_per_point": Q + 1,
    }


def _resident() -> float:
    """Resident memory in bytes; NaN where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else float("nan")
