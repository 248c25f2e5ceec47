"""Rough and noisy series: what a stream does with them, and what happens when the capacity law is violated."""

from __future__ import annotations

from typing import Any

import gpytorch
from torch import Tensor

from benchmarks.baselines import Exact, Stream
from benchmarks.following import follow, learn, split
from gpseq import datasets
from gpseq.features import CapacityError, HippoFeatures

GROWTH = 1.25
#: Where "auto" stops growing: beyond this the exact GP is the cheaper model of these series.
MOST = 600


def run(smoke: bool) -> dict[str, Any]:
    """Weekly CO2, a speech envelope, and power output sorted by temperature; a smooth and a rough kernel each."""
    results = []
    for name, (x, y) in _series(smoke).items():
        chunks = split(x, y, num_chunks=10, held_out=0.2, seed=0)
        for label, base in (("RBF", gpytorch.kernels.RBFKernel()), ("Matern 3/2", gpytorch.kernels.MaternKernel(1.5))):
            kernel, likelihood = learn(base, chunks[0], seed=0, num_starts=1 if smoke else 2)
            horizon, noise = chunks[0].x.max().item(), likelihood.noise.item()
            try:
                enough = HippoFeatures.required(kernel, GROWTH * x.max().item(), noise=noise, max_features=MOST)
                holds = True
            except CapacityError:
                enough, holds = MOST, False
            orders = sorted({20, 50, 100, enough})
            methods = {
                f"LegS {order}": lambda m=order, h=horizon, k=kernel, n=likelihood: Stream(m, h, k, n, growth=GROWTH)
                for order in orders
            }
            methods["exact"] = lambda k=kernel, n=likelihood: Exact(k, n)
            outcome = follow(chunks, methods)
            for order in orders:
                padded = HippoFeatures(order, GROWTH * x.max().item())
                outcome[f"LegS {order}"]["residual"] = padded.residual_curve(kernel)[-1].item()
            results.append(
                {
                    "series": name,
                    "rows": len(x),
                    "kernel": label,
                    "lengthscale": kernel.base_kernel.lengthscale.item(),
                    "noise": noise,
                    "auto": enough,
                    "auto_holds": holds,
                    "methods": outcome,
                }
            )
    return {"series": results}


def _series(smoke: bool) -> dict[str, tuple[Tensor, Tensor]]:
    step = 4 if smoke else 1
    co2, speech, power = datasets.load_co2(), datasets.load_speech_envelope(), datasets.load_powerplant()
    # The UCI table as a stream: sorted by its first column, ambient temperature, which serves as time.
    order = power.X[:, 0].argsort(stable=True)[:: 4 * step]
    raw = {
        "CO2": (co2.time[::step], co2.target[::step]),
        "speech envelope": (speech.time[::step], speech.target[::step]),
        "power plant": (power.X[order, 0], power.y[order]),
    }
    return {name: (x - x[0], (y - y.mean()) / y.std()) for name, (x, y) in raw.items()}
