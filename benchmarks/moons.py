"""Two moons, met one third at a time: accuracy on all past thirds, and what the ordering of the path does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood

from examples.paths.run import two_moons
from gpseq.features import InducingFeatures, PathFeatures, SelectedPoints
from gpseq.features.orderings import kernel_greedy
from gpseq.models import StreamingGP

SIZES = (8, 20)
TASKS = 3


def run(smoke: bool) -> dict[str, Any]:
    """Three tasks by the first coordinate; half of each task is held out."""
    rows = []
    for seed in range(1 if smoke else 5):
        for size in SIZES:
            for name, (features, farthest) in METHODS.items():
                accuracy = _learn(features(size), farthest, seed)
                rows.append({"seed": seed, "size": size, "method": name, "accuracy": accuracy})
    return {"rows": rows}


#: Features, and whether each task is first put in the order in which every step goes to the farthest point.
METHODS: dict[str, tuple[Callable[[int], InducingFeatures], bool]] = {
    "path, by the key of the tasks": (lambda size: PathFeatures(size, 2, ordering="oracle", key=0), False),
    "path, kernel-greedy": (lambda size: PathFeatures(size, 2, ordering="kernel"), False),
    "path, random": (lambda size: PathFeatures(size, 2, ordering="random"), False),
    "path, kernel-farthest": (lambda size: PathFeatures(size, 2), True),
    "points, re-selected": (lambda size: SelectedPoints(size, 2), False),
}


def _learn(features: InducingFeatures, farthest: bool, seed: int) -> list[list[float]]:
    """Accuracy on every past task (column) after every task (row)."""
    torch.manual_seed(seed)
    x, label = two_moons(600, 0.1, seed)
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.4, 10.0
    tasks = x[:, 0].argsort().tensor_split(TASKS)
    model = StreamingGP(features, kernel, BernoulliLikelihood()).eval()
    rows = []
    for number, task in enumerate(tasks, start=1):
        train = task[::2]
        if farthest:
            train = train[kernel_greedy(x[train], kernel, farthest=True)]
        model.update(x[train], label[train])
        held_out = [t[1::2] for t in tasks[:number]]
        rows.append([((model(x[t]).mean > 0) == (label[t] > 0.5)).double().mean().item() for t in held_out])
    return rows
