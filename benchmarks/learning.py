"""Hyperparameters that move: a series that changes half-way, frozen, learnt at basis changes, and an ensemble."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from gpseq import metrics
from gpseq.features import HippoFeatures
from gpseq.models import StreamingEnsemble, StreamingGP, fit_hyperparameters

LENGTH = 40.0
SIZE = 80
#: What changes half-way: lengthscale and noise standard deviation before and after.
CHANGES = {
    "nothing changes": ((1.0, 0.2), (1.0, 0.2)),
    "noise, 0.1 to 0.4": ((1.0, 0.1), (1.0, 0.4)),
    "lengthscale, 2 to 0.7": ((2.0, 0.2), (0.7, 0.2)),
}
#: Members of the ensemble: factors of the lengthscale and of the noise variance that were learnt first.
FACTORS = [(scale, noise) for scale in (0.35, 0.6, 1.0) for noise in (1.0, 4.0, 16.0)]


def run(smoke: bool) -> dict[str, Any]:
    """Seeds of each series in 50 chunks, and 200 updates that each change the basis."""
    rows = []
    for change in CHANGES:
        for seed in range(1 if smoke else 5):
            rows.append({"change": change, "seed": seed, "methods": _follow(change, seed, 10 if smoke else 50)})
    return {"size": SIZE, "series": rows, "endurance": _endurance(20 if smoke else 200)}


def series(change: str, seed: int, num: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Times, targets, and which rows are held out; f is drawn from one prior before and another after the middle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0.0, LENGTH, num, dtype=torch.float64)
    (scale_a, noise_a), (scale_b, noise_b) = CHANGES[change]
    # The same lengthscale in another unit of time: a clock that goes faster from the middle on.
    clock = torch.where(x < LENGTH / 2, x / scale_a, LENGTH / 2 / scale_a + (x - LENGTH / 2) / scale_b)
    kernel = RBFKernel().double()
    kernel.lengthscale = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        covariance = kernel(clock.unsqueeze(-1)).to_dense() + 1e-8 * torch.eye(num, dtype=x.dtype)
        f = torch.linalg.cholesky(covariance) @ torch.randn(num, generator=generator, dtype=x.dtype)
    noise = torch.where(x < LENGTH / 2, noise_a, noise_b)
    y = f + noise * torch.randn(num, generator=generator, dtype=x.dtype)
    return x, y, torch.rand(num, generator=generator) < 0.2


def _follow(change: str, seed: int, num_chunks: int) -> dict[str, Any]:
    """NLPD of each chunk's held-out rows, when the chunk has just been learnt, and of all rows at the end."""
    x, y, out = series(change, seed)
    parts = torch.arange(len(x)).tensor_split(num_chunks)
    kernel, likelihood = ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double()
    first = torch.cat(parts[: max(1, num_chunks // 5)])
    first = first[~out[first]]
    fit_hyperparameters(x[first], y[first], kernel, likelihood, generator=torch.Generator().manual_seed(seed))

    def stream(learn: str) -> StreamingGP:
        modules = copy.deepcopy((kernel, likelihood))
        return StreamingGP(HippoFeatures(SIZE, 4.0), *modules, horizon_growth=1.05, learn=learn).eval()

    def member(scale: float, noise: float) -> StreamingGP:
        model = stream("never")
        model.covar_module.base_kernel.lengthscale = scale * kernel.base_kernel.lengthscale.detach()
        model.likelihood.noise = noise * likelihood.noise.detach()
        return StreamingGP(HippoFeatures(SIZE, 4.0), model.covar_module, model.likelihood, horizon_growth=1.05).eval()

    methods: dict[str, StreamingGP | StreamingEnsemble] = {
        "frozen": stream("never"),
        "basis_change": stream("basis_change"),
        "ensemble": StreamingEnsemble([member(*factors) for factors in FACTORS], discount=0.9).eval(),
    }
    results = {}
    for name, model in methods.items():
        begun, scores = time.perf_counter(), []
        for part in parts:
            train, test = part[~out[part]], part[out[part]]
            model.update(x[train], y[train])
            scores.append([_nlpd(model, x[test], y[test]) * len(test), len(test)])
        results[name] = {
            "nlpd_sum_and_count": scores,
            "nlpd_at_end": _nlpd(model, x[out], y[out]),
            "seconds": time.perf_counter() - begun,
        }
        if isinstance(model, StreamingGP):
            results[name]["lengthscale"] = model.covar_module.base_kernel.lengthscale.item()
            results[name]["noise"] = math.sqrt(model.likelihood.noise.item())
    return results


@torch.no_grad()
def _nlpd(model: StreamingGP | StreamingEnsemble, x: Tensor, y: Tensor) -> float:
    if len(x) == 0:
        return 0.0
    if isinstance(model, StreamingEnsemble):
        return -model.predict(x).log_prob(y).mean().item()
    prediction = model.likelihood(model(x))
    return metrics.nlpd(prediction.mean, prediction.variance, y).item()


def _endurance(num_updates: int) -> dict[str, Any]:
    """Every update changes the basis and learns: anything that is not finite, and anything that raises, would show."""
    x, y, _ = series("noise, 0.1 to 0.4", seed=99, num=1000)
    kernel, likelihood = ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double()
    likelihood.noise = 0.01
    features = HippoFeatures(SIZE, 1.0)
    model = StreamingGP(features, kernel, likelihood, horizon_growth=None, learn="basis_change").eval()
    noises, finite = [], True
    for chunk_x, chunk_y in zip(x.tensor_split(num_updates), y.tensor_split(num_updates), strict=True):
        model.update(chunk_x, chunk_y)
        noises.append(math.sqrt(likelihood.noise.item()))
        finite = finite and all(bool(t.isfinite().all()) for t in (model.state.G, model.state.r, model.log_evidence))
    return {"updates": num_updates, "finite": finite, "noise": noises}
