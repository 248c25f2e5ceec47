"""A memory that sizes itself: residual variance at every time, and how many features that takes."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel
from gpytorch.likelihoods import GaussianLikelihood

from benchmarks.following import learn, split
from gpseq import datasets
from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP

TOLERANCES = (1e-2, 1e-3)
FIRST_ORDER = 8


def run(smoke: bool) -> dict[str, Any]:
    """Solar with its maximum-likelihood kernel, and a synthetic clock with a rougher one; many small chunks."""
    solar = datasets.load_solar()
    x = solar.time - solar.time[0]
    y = (solar.target - solar.target.mean()) / solar.target.std()
    rows = []
    for seed in range(1 if smoke else 5):
        chunk = split(x, y, num_chunks=10, held_out=0.2, seed=seed)[0]
        kernel, likelihood = learn(RBFKernel(), chunk, seed, num_starts=1 if smoke else 4)
        for tolerance in TOLERANCES:
            rows.append({"series": "Solar, RBF", "seed": seed} | _grow(kernel, likelihood, x, y, 10.0, tolerance))
    clock = torch.linspace(0, 60, 200 if smoke else 2000, dtype=torch.float64)
    rough = MaternKernel(2.5).double()
    likelihood = GaussianLikelihood().double()
    for tolerance in TOLERANCES:
        row = _grow(rough, likelihood, clock, torch.sin(clock), 1.0, tolerance)
        rows.append({"series": "60 lengthscales, Matern 5/2", "seed": 0} | row)
    return {"first_order": FIRST_ORDER, "streams": rows}


def _grow(
    kernel: Kernel, likelihood: GaussianLikelihood, x: torch.Tensor, y: torch.Tensor, horizon: float, tolerance: float
) -> dict[str, Any]:
    features = HippoFeatures(FIRST_ORDER, horizon)
    model = StreamingGP(features, kernel, likelihood, max_features=2000, tolerance=tolerance).eval()
    times, orders, residuals = [], [], []
    for chunk_x, chunk_y in zip(x.split(10), y.split(10), strict=True):
        model.update(chunk_x, chunk_y)
        times.append(chunk_x.max().item())
        orders.append(model.features.num_features)
        residuals.append(model.residual_variance().item())
    return {"tolerance": tolerance, "times": times, "orders": orders, "residuals": residuals}
