"""Two moons, met one third at a time: accuracy on all past thirds, and what the ordering of the path does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood
from torch import Tensor

from gpseq.features import InducingFeatures, PathFeatures, SelectedPoints
from gpseq.features.orderings import kernel_greedy
from gpseq.models import StreamingGP

SIZE = 20
TASKS = 3


def run(smoke: bool) -> dict[str, Any]:
    """Three tasks by the first coordinate; half of each task is held out."""
    rows = []
    for seed in range(1 if smoke else 5):
        for name, (features, farthest) in METHODS.items():
            rows.append({"seed": seed, "method": name, "accuracy": _learn(features, farthest, seed)})
    return {"size": SIZE, "rows": rows}


#: Features, and whether each task is first put in the order in which every step goes to the farthest point.
METHODS: dict[str, tuple[Callable[[Tensor], InducingFeatures], bool]] = {
    "path, by the key of the tasks": (lambda x: PathFeatures(SIZE, 2, ordering="oracle", key=0), False),
    "path, kernel-greedy": (lambda x: PathFeatures(SIZE, 2, ordering="kernel"), False),
    "path, random": (lambda x: PathFeatures(SIZE, 2, ordering="random"), False),
    "path, kernel-farthest": (lambda x: PathFeatures(SIZE, 2), True),
    "points, re-selected": (lambda x: SelectedPoints(SIZE, 2), False),
}


def two_moons(num: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into each other: inputs ``(num, 2)``, labels ``(num,)``."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num) % 2
    angle = math.pi * torch.rand(num, generator=generator, dtype=torch.float64)
    sign = 1.0 - 2.0 * label
    x = torch.stack([angle.cos() * sign + label, angle.sin() * sign + 0.5 * label], dim=-1)
    return x + noise * torch.randn(num, 2, generator=generator, dtype=torch.float64), label.double()


def _learn(make: Callable[[Tensor], InducingFeatures], farthest: bool, seed: int) -> list[list[float]]:
    """Accuracy on every past task (column) after every task (row)."""
    torch.manual_seed(seed)
    x, label = two_moons(600, 0.1, seed)
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.4, 10.0
    tasks = x[:, 0].argsort().tensor_split(TASKS)
    model = StreamingGP(make(x), kernel, BernoulliLikelihood()).eval()
    rows = []
    for number, task in enumerate(tasks, start=1):
        train = task[::2]
        if farthest:
            train = train[kernel_greedy(x[train], kernel, farthest=True)]
        model.update(x[train], label[train])
        held_out = [t[1::2] for t in tasks[:number]]
        rows.append([((model(x[t]).mean > 0) == (label[t] > 0.5)).double().mean().item() for t in held_out])
    return rows
