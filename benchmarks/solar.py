"""Solar irradiance in ten chunks: does the stream end where the exact GP ends?"""

from __future__ import annotations

from typing import Any

import gpytorch

from benchmarks.baselines import Exact, OnlineVariationalConditioning, RefitSVGP, Stream, StreamingPoints
from benchmarks.following import follow, learn, split
from gpseq import datasets
from gpseq.features import HippoFeatures

GROWTH = 1.25


def run(smoke: bool) -> dict[str, Any]:
    """Five seeds of held-out rows; hyperparameters from the first chunk of each."""
    series = datasets.load_solar()
    x = series.time - series.time[0]
    y = (series.target - series.target.mean()) / series.target.std()
    rows = []
    for seed in range(1 if smoke else 5):
        chunks = split(x, y, num_chunks=10, held_out=0.2, seed=seed)
        kernel, likelihood = learn(gpytorch.kernels.RBFKernel(), chunks[0], seed, num_starts=1 if smoke else 4)
        horizon = chunks[0].x.max().item()
        enough = HippoFeatures.required(kernel, GROWTH * x.max().item(), noise=likelihood.noise.item())

        def stream(num_features: int, kernel=kernel, likelihood=likelihood, horizon=horizon):
            return lambda: Stream(num_features, horizon, kernel, likelihood, growth=GROWTH)

        def points(num_points: int, kernel=kernel, likelihood=likelihood):
            return lambda: StreamingPoints(num_points, kernel, likelihood)

        methods = {
            "LegS auto": stream(enough),
            "LegS 50": stream(50),
            "LegS 150": stream(150),
            "points 50": points(50),
            "points 150": points(150),
            "points auto": points(enough),
            "OVC 12": lambda k=kernel, n=likelihood: OnlineVariationalConditioning(12, k, n),
            "OVC 50": lambda k=kernel, n=likelihood: OnlineVariationalConditioning(50, k, n),
            "SVGP refit 50": lambda k=kernel, n=likelihood: RefitSVGP(50, k, n),
            "SVGP refit 150": lambda k=kernel, n=likelihood: RefitSVGP(150, k, n),
            "exact": lambda k=kernel, n=likelihood: Exact(k, n),
        }
        rows.append(
            {
                "seed": seed,
                "auto": enough,
                "lengthscale": kernel.base_kernel.lengthscale.item(),
                "outputscale": kernel.outputscale.item(),
                "noise": likelihood.noise.item(),
                "methods": follow(chunks, methods),
            }
        )
    return {"series": series.name, "rows": len(x), "seeds": rows}
