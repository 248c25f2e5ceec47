"""Paths through many dimensions: exactness, constant memory, and how far the published route is from exact features."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from gpseq import datasets, hippo, metrics
from gpseq.features import InducingFeatures, PathFeatures, SelectedPoints
from gpseq.features.path import path_step
from gpseq.models import StreamingGP

SIZE = 50


def run(smoke: bool) -> dict[str, Any]:
    """Three questions, one answer each."""
    return {
        "size": SIZE,
        "recurrence": _recurrence(),
        "memory": _memory(20_000 if smoke else 100_000),
        "routes": [_routes(seed, 300 if smoke else 1500) for seed in range(1 if smoke else 5)],
    }


def _recurrence() -> list[dict[str, Any]]:
    """Largest difference between the recurrence, step by step, and the explicit cell weights, for irregular steps."""
    rows = []
    for order in (8, 32, 64):
        generator = torch.Generator().manual_seed(order)
        edges = torch.cat([torch.zeros(1), torch.rand(200, generator=generator).double().exp()]).double().cumsum(0)
        state = torch.zeros(order, 200, dtype=torch.float64)
        for n in range(200):
            transition, weights = path_step(order, edges[n : n + 2])
            state = transition @ state
            state[:, n : n + 1] += weights
        rows.append({"order": order, "difference": (state - hippo.legs_cell_weights(order, edges)).abs().max().item()})
    return rows


def _memory(num: int) -> dict[str, Any]:
    """Numbers in the state dict of a constant-memory path, and the time of each tenth of the stream."""
    kernel = ScaleKernel(RBFKernel()).double()
    likelihood = GaussianLikelihood().double()
    features = PathFeatures(
        SIZE, 4, mode="rff", kernel=kernel, num_frequencies=500, generator=torch.Generator().manual_seed(0)
    )
    model = StreamingGP(features, kernel, likelihood).eval()
    generator = torch.Generator().manual_seed(1)
    sizes, seconds = [], []
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(num // 10_000):
            x = torch.randn(1000, 4, generator=generator, dtype=torch.float64)
            model.update(x, torch.sin(x.sum(-1)))
        seconds.append(time.perf_counter() - begun)
        sizes.append(sum(v.numel() for v in model.state_dict().values() if isinstance(v, Tensor)))
    return {"points": num, "numbers": sizes, "seconds": seconds}


def _routes(seed: int, num: int) -> dict[str, Any]:
    """Power plant of UCI, sorted by temperature, in ten tasks: predictions of every route beside the exact path's."""
    table = datasets.load_powerplant()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(table.y), generator=generator)[:num]
    rows = rows[table.X[rows, 0].argsort()]
    x = (table.X[rows] - table.X.mean(0)) / table.X.std(0)
    y = (table.y[rows] - table.y.mean()) / table.y.std()
    held_out = torch.rand(num, generator=generator) < 0.2
    kernel, likelihood = ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double()
    kernel.base_kernel.lengthscale, likelihood.noise = 2.0, 0.06
    paths = {
        "exact kernel, exact weights": PathFeatures(SIZE, 4),
        "exact kernel, bilinear": PathFeatures(SIZE, 4, scheme="bilinear"),
        "1,000 random features, exact weights": _random_path("exact", kernel, seed, 1000),
        "1,000 random features, bilinear": _random_path("bilinear", kernel, seed, 1000),
        "100 random features, bilinear": _random_path("bilinear", kernel, seed, 100),
        "points, re-selected": SelectedPoints(SIZE, 4),
    }
    scores: dict[str, Any] = {}
    reference = None
    for name, features in paths.items():
        model = StreamingGP(features, kernel, likelihood).eval()
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jitter of paths that are short at first
            for part in torch.arange(num).tensor_split(10):
                part = part[~held_out[part]]
                model.update(x[part], y[part])
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            prediction = likelihood(model(x[held_out]))
            kuu = _kuu(model.features, kernel)
        mean, variance = prediction.mean, prediction.variance
        if reference is None:
            reference = (mean, kuu)
        scores[name] = {
            "rmse": metrics.rmse(mean, y[held_out]).item(),
            "nlpd": metrics.nlpd(mean, variance, y[held_out]).item(),
            "mean_distance": metrics.rmse(mean, reference[0]).item(),
            "kuu_distance": None
            if kuu.shape != reference[1].shape or name.startswith("points")
            else ((kuu - reference[1]).norm() / reference[1].norm()).item(),
            "seconds": seconds,
        }
    return {"seed": seed, "rows": num, "routes": scores}


def _random_path(scheme: str, kernel: Kernel, seed: int, num_frequencies: int) -> PathFeatures:
    return PathFeatures(
        SIZE,
        4,
        mode="rff",
        scheme=scheme,
        kernel=kernel,
        num_frequencies=num_frequencies,
        generator=torch.Generator().manual_seed(seed),
    )


def _kuu(features: InducingFeatures, kernel: Kernel) -> Tensor:
    return features.kuu(kernel).to_dense()
