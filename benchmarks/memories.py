"""What kind of memory of equal size keeps what: errors by age of the past, on four series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from benchmarks.baselines import Exact, Method, OptimisedPoints, Streamed
from benchmarks.following import follow, join, learn, split
from gpseq import datasets
from gpseq.features import CompositeFeatures, HippoFeatures, PyramidFeatures, SelectedPoints

SIZE = 50
#: Features of the composite that cover the whole past; the others cover the recent window.
LONG = 16
#: The recent window of the composite, as a fraction of the whole series.
RECENT = 1 / 8


def run(smoke: bool) -> dict[str, Any]:
    """Seeds of held-out rows; kernel and noise shared by all methods, learnt on the first chunk but for the last."""
    results = []
    for name, (x, y, base) in _series(smoke).items():
        seeds = []
        for seed in range(1 if smoke else 5):
            chunks = split(x, y, num_chunks=10, held_out=0.2, seed=seed)
            if isinstance(base, Kernel):
                # The speech begins with silence, which says little of what comes.
                warmup = join(chunks[:3]) if name == "speech envelope" else chunks[0]
                kernel, likelihood = learn(base, warmup, seed, num_starts=1 if smoke else 4)
            else:
                kernel, likelihood = base()
            seeds.append(follow(chunks, _methods(kernel, likelihood, x, chunks[0].x.max().item(), smoke)))
        results.append({"series": name, "rows": len(x), "size": SIZE, "seeds": seeds})
    return {"series": results, "long": LONG, "recent": RECENT}


def _methods(
    kernel: Kernel, likelihood: GaussianLikelihood, x: Tensor, horizon: float, smoke: bool
) -> dict[str, Method]:
    window = RECENT * (x.max() - x.min()).item()

    def legt(size: int) -> HippoFeatures:
        return HippoFeatures(size, horizon, measure="legt", window=window)

    def composite() -> CompositeFeatures:
        return CompositeFeatures([HippoFeatures(LONG, horizon), legt(SIZE - LONG)])

    def streamed(features: Callable[[], Any], transfer: str | None = None) -> Method:
        # The horizon ends at the data, as the windows do: nothing is reserved for times to come.
        return lambda: Streamed(features(), kernel, likelihood, horizon_growth=None, transfer=transfer)

    return {
        "LegS": streamed(lambda: HippoFeatures(SIZE, horizon)),
        "LegS, adf": streamed(lambda: HippoFeatures(SIZE, horizon), "adf"),
        "LegT window": streamed(lambda: legt(SIZE)),
        "LegS + LegT": streamed(composite),
        "LegS + LegT, vfe": streamed(composite, "vfe"),
        "pyramid": streamed(lambda: PyramidFeatures(SIZE, horizon)),
        "points, re-selected": streamed(lambda: SelectedPoints(SIZE)),
        "points, optimised": lambda: OptimisedPoints(SIZE, kernel, likelihood, steps=10 if smoke else 300),
        "exact": lambda: Exact(kernel, likelihood),
    }


def _series(smoke: bool) -> dict[str, tuple[Tensor, Tensor, Kernel | Callable[[], Any]]]:
    step = 4 if smoke else 1
    solar, co2, speech = datasets.load_solar(), datasets.load_co2(), datasets.load_speech_envelope()
    raw = {
        "Solar": (solar.time, solar.target),
        "CO2": (co2.time[::step], co2.target[::step]),
        "speech envelope": (speech.time[::step], speech.target[::step]),
    }
    series: dict[str, Any] = {
        name: (x - x[0], (y - y.mean()) / y.std(), MaternKernel(1.5) if name == "speech envelope" else RBFKernel())
        for name, (x, y) in raw.items()
    }
    series["trend and detail"] = _trend_and_detail(step)
    return series


def _trend_and_detail(step: int) -> tuple[Tensor, Tensor, Callable[[], tuple[Kernel, GaussianLikelihood]]]:
    """A slow trend, and fast detail that sets in with the last eighth: two sines each, and noise of 0.1.

    The kernel is given: one part for each, the variance of the fast one that of the detail averaged over the series.
    """
    x = torch.arange(0, 2000, step, dtype=torch.float64) / 20
    trend = torch.sin(x / 12) + 0.5 * torch.sin(x / 7 + 1)
    detail = 0.4 * (torch.sin(2.5 * x) + torch.sin(1.8 * x + 2)) * (x > 7 / 8 * x.max())
    noise = 0.1 * torch.randn(len(x), generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def kernel() -> tuple[Kernel, GaussianLikelihood]:
        slow, fast = ScaleKernel(RBFKernel()).double(), ScaleKernel(RBFKernel()).double()
        for part, lengthscale, variance in ((slow, 10.0, 1.0), (fast, 0.6, 0.02)):
            part.base_kernel.lengthscale = torch.tensor(lengthscale, dtype=torch.float64)
            part.outputscale = torch.tensor(variance, dtype=torch.float64)
        likelihood = GaussianLikelihood().double()
        likelihood.noise = torch.tensor(0.01, dtype=torch.float64)
        return slow + fast, likelihood.eval()

    return x, trend + detail + noise, kernel
