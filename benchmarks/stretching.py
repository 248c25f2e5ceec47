"""A thousand re-stretchings: does float32 data keep up with float64, and does anything break?"""

from __future__ import annotations

import warnings
from typing import Any

import gpytorch
import torch

from gpseq.features import HippoFeatures
from gpseq.models import CapacityWarning, StreamingGP


def run(smoke: bool) -> dict[str, Any]:
    """Every update passes the horizon (growth ``None``); both transfers; the same data in two dtypes."""
    updates = 100 if smoke else 1000
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.1, 40.0, 10 * updates, dtype=torch.float64)
    y = torch.sin(x) + 0.1 * torch.randn(len(x), generator=generator, dtype=torch.float64)
    grid = torch.linspace(0.0, 42.0, 500, dtype=torch.float64)
    rows = []
    for transfer in ("vfe", "adf"):
        for num_features in (50, 80):
            predictions = {}
            for dtype in (torch.float64, torch.float32):
                model = _model(num_features, transfer, dtype)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CapacityWarning)
                    for x_chunk, y_chunk in zip(x.to(dtype).split(10), y.to(dtype).split(10), strict=True):
                        model.update(x_chunk, y_chunk)
                with torch.no_grad():
                    posterior = model(grid.to(dtype))
                    variance = posterior.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)
                predictions[dtype] = posterior.mean.double(), variance.double()
            (mean, variance), (mean32, variance32) = predictions[torch.float64], predictions[torch.float32]
            rows.append(
                {
                    "transfer": transfer,
                    "num_features": num_features,
                    "updates": updates,
                    "mean_difference": (mean - mean32).abs().max().item(),
                    "std_difference": (variance.clamp_min(0).sqrt() - variance32.clamp_min(0).sqrt())
                    .abs()
                    .max()
                    .item(),
                    "smallest_variance": min(variance.min().item(), variance32.min().item()),
                    "finite": bool(torch.stack([mean32, variance32]).isfinite().all()),
                    "rmse_of_signal": (mean - grid.sin())[grid <= 40].square().mean().sqrt().item(),
                }
            )
    return {"horizon": 40.0, "rows": rows}


def _model(num_features: int, transfer: str, dtype: torch.dtype) -> StreamingGP:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).to(dtype)
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.5, 1.0
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(dtype)
    likelihood.noise = 0.01
    features = HippoFeatures(num_features, horizon=0.1)
    return StreamingGP(features, kernel, likelihood, horizon_growth=None, transfer=transfer).eval()
