"""How exact the interdomain covariances are, and what structure in them would buy."""

from __future__ import annotations

import statistics
from typing import Any

import gpytorch
import mpmath
import torch

from benchmarks.timing import in_turn
from gpseq import hippo
from gpseq.features import HippoFeatures

LENGTHSCALE, ORDER = 0.2, 12


def run(smoke: bool) -> dict[str, Any]:
    """Kuu against 30 digits, against the frequency route, and the cost of using its parity."""
    return {
        "kuu": _against_high_precision(4 if smoke else ORDER),
        "routes": [_routes(rho, 20 if smoke else 64) for rho in (5.0, 20.0, 50.0)],
        "parity": [_parity(order, 5 if smoke else 20) for order in ((64,) if smoke else (64, 256, 1024))],
    }


def _kernel(lengthscale: float) -> gpytorch.kernels.Kernel:
    kernel = gpytorch.kernels.RBFKernel().double()
    kernel.lengthscale = torch.tensor(lengthscale, dtype=torch.float64)  # a plain number would pass through float32
    return kernel


def _against_high_precision(order: int) -> dict[str, Any]:
    """Lag reduction: Kuu = int k(r) [R(r) + R(r)^T] dr with R a polynomial in r, all in 30-digit arithmetic."""
    with mpmath.workdps(30):
        exact = [[_entry(row, column) for column in range(order)] for row in range(order)]
    reference = torch.tensor([[float(value) for value in row] for row in exact], dtype=torch.float64)
    ours = HippoFeatures(order, horizon=1.0).kuu(_kernel(LENGTHSCALE)).to_dense()
    return {"order": order, "lengthscale": LENGTHSCALE, "max_error": (ours - reference).abs().max().item()}


def _entry(row: int, column: int) -> Any:
    if (row + column) % 2:
        return mpmath.mpf(0)
    scale = mpmath.sqrt((2 * row + 1) * (2 * column + 1))
    left, right = _coefficients(row), _coefficients(column)
    lengthscale = mpmath.mpf(LENGTHSCALE)

    def correlation(r: Any) -> Any:
        # int_r^1 g(x) g'(x - r) dx, exact by Gauss-Legendre of enough nodes
        return mpmath.quad(lambda x: mpmath.polyval(left, x) * mpmath.polyval(right, x - r), [r, 1], maxdegree=4)

    def integrand(r: Any) -> Any:
        return mpmath.exp(-((r / lengthscale) ** 2) / 2) * correlation(r)

    # R(r)_{lm} + R(r)_{ml} has twice this integral, because l + m is even.
    return 2 * scale * mpmath.quad(integrand, [0, 0.25, 0.5, 0.75, 1], maxdegree=6)


def _coefficients(degree: int) -> list[Any]:
    """Shifted Legendre polynomial on [0, 1], highest power first."""
    return [
        (-1) ** (degree + k) * mpmath.binomial(degree, k) * mpmath.binomial(degree + k, k)
        for k in range(degree, -1, -1)
    ]


def _routes(rho: float, order: int) -> dict[str, Any]:
    features, kernel = HippoFeatures(order, horizon=1.0), _kernel(1 / rho)
    frequency, weights = hippo.rbf_spectral_quadrature(1 / rho, 1.0)
    z = hippo.legs_fourier(order, frequency, 0.0, 1.0)
    x = torch.linspace(0, 1, 41, dtype=torch.float64)
    recurrence = hippo.legs_recurrence(
        lambda t: kernel(t.unsqueeze(-1), x.unsqueeze(-1)).to_dense().detach(),
        torch.linspace(0, 1, 41, dtype=torch.float64)[1:].square(),
        order,
    )
    kuf = features.kuf(kernel, x)
    return {
        "rho": rho,
        "order": order,
        "kuu_frequency": (features.kuu(kernel).to_dense() - hippo.spectral_kuu(z, weights)).abs().max().item(),
        "kuf_frequency": (kuf - hippo.spectral_kuf(z, frequency, weights, x)).abs().max().item(),
        "kuf_recurrence": (kuf - recurrence).abs().max().item(),
    }


def _parity(order: int, repetitions: int) -> dict[str, Any]:
    """Modes of unequal parity are uncorrelated under a stationary kernel: two factors of half the size."""
    features, kernel = HippoFeatures(order, horizon=order / 2.0), _kernel(1.0)
    with torch.no_grad():
        kuu = features.kuu(kernel).to_dense() + 1e-8 * torch.eye(order, dtype=torch.float64)
        even, odd = kuu[::2, ::2].contiguous(), kuu[1::2, 1::2].contiguous()
        kff = kernel(features.nodes()).to_dense()
        ways = {
            "build": lambda: features.weights() @ kff @ features.weights().mT,
            "dense": lambda: torch.linalg.cholesky(kuu),
            "parity": lambda: (torch.linalg.cholesky(even), torch.linalg.cholesky(odd)),
        }
        seconds = in_turn(ways, repetitions)
    return {"order": order, **{f"{name}_us": 1e6 * statistics.median(values) for name, values in seconds.items()}}
