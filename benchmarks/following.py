"""Follow a series chunk by chunk with several methods, and score every past chunk after every later one."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gpytorch
import torch
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from benchmarks.baselines import Method
from gpseq import metrics
from gpseq.models import fit_hyperparameters


@dataclass(frozen=True)
class Chunk:
    """Training and held-out rows of one chunk, ``(n,)`` each."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def split(x: Tensor, y: Tensor, num_chunks: int, held_out: float, seed: int) -> list[Chunk]:
    """Cut a series into sequential chunks and hold rows out at random."""
    out = torch.zeros(len(x), dtype=torch.bool)
    out[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: round(held_out * len(x))]] = True
    parts = torch.arange(len(x)).tensor_split(num_chunks)
    return [Chunk(x[p][~out[p]], y[p][~out[p]], x[p][out[p]], y[p][out[p]]) for p in parts]


def join(chunks: list[Chunk]) -> Chunk:
    """Several chunks as one."""
    return Chunk(*(torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("x", "y", "x_test", "y_test")))


def learn(base: Kernel, chunk: Chunk, seed: int, num_starts: int) -> tuple[Kernel, GaussianLikelihood]:
    """Kernel and noise by maximum likelihood on one chunk, from several lengthscales and random starts around each."""
    span = (chunk.x.max() - chunk.x.min()).item()
    generator = torch.Generator().manual_seed(seed)
    best = None
    for fraction in (0.03, 0.1, 0.3):
        kernel, likelihood = ScaleKernel(copy.deepcopy(base)).double(), GaussianLikelihood().double()
        kernel.base_kernel.lengthscale = fraction * span
        likelihood.noise = 0.05
        try:
            value = fit_hyperparameters(
                chunk.x, chunk.y, kernel, likelihood, num_starts=num_starts, generator=generator
            )
        except RuntimeError:
            continue
        if best is None or value > best[0]:
            best = value, kernel, likelihood
    if best is None:
        raise RuntimeError("no start gave a finite marginal likelihood")
    return best[1], best[2].eval()


def follow(chunks: list[Chunk], methods: Mapping[str, Method]) -> dict[str, Any]:
    """Run every method over the chunks.

    Returns:
        Per method: RMSE and NLPD matrices (row: chunks learnt, column: past chunk), scores on all held-out rows at
        the end, seconds of each update.
    """
    x_all, y_all = torch.cat([c.x_test for c in chunks]), torch.cat([c.y_test for c in chunks])
    results = {}
    for name, make in methods.items():
        method = make()
        seconds, errors, densities = [], [], []
        for step, chunk in enumerate(chunks):
            with warnings.catch_warnings():
                # GPyTorch's own jitter notices about the peers.
                warnings.simplefilter("ignore", NumericalWarning)
                warnings.simplefilter("ignore", gpytorch.utils.warnings.GPInputWarning)
                begun = time.perf_counter()
                method.update(chunk.x, chunk.y)
                seconds.append(time.perf_counter() - begun)
                past = [_score(method, c.x_test, c.y_test) for c in chunks[: step + 1]]
            errors.append([e for e, _ in past])
            densities.append([d for _, d in past])
        rmse, nlpd = _score(method, x_all, y_all)
        results[name] = {
            "rmse": rmse,
            "nlpd": nlpd,
            "seconds": seconds,
            "rmse_by_chunk": errors,
            "nlpd_by_chunk": densities,
            "warnings": getattr(method, "warnings", []),
        }
    return results


def _score(method: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
    mean, variance = method.predict(x)
    return metrics.rmse(mean, y).item(), metrics.nlpd(mean, variance, y).item()
