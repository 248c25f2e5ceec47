"""Oracles that share nothing with gpseq: numpy, composite quadrature, dense linear algebra in the unwhitened form.

A kernel is a function ``k(a, b)`` of rows ``(..., d)`` that broadcasts, as in :func:`rbf`. Integrals are taken panel by
panel, with panels that end where a kernel may have a kink, so that rough kernels are integrated to rounding as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Kernel = Callable[[Array, Array], Array]

# Kernels, written out


def _distance(a: Array, b: Array, lengthscale: float | Array) -> Array:
    return np.sqrt((((a - b) / lengthscale) ** 2).sum(-1))


def rbf(lengthscale: float | Array, scale: float = 1.0) -> Kernel:
    return lambda a, b: scale * np.exp(-0.5 * _distance(a, b, lengthscale) ** 2)


def matern(nu: float, lengthscale: float | Array, scale: float = 1.0) -> Kernel:
    polynomials = {0.5: (1.0,), 1.5: (1.0, 1.0), 2.5: (1.0, 1.0, 1 / 3)}

    def k(a: Array, b: Array) -> Array:
        r = np.sqrt(2 * nu) * _distance(a, b, lengthscale)
        return scale * np.exp(-r) * sum(c * r**i for i, c in enumerate(polynomials[nu]))

    return k


def periodic(lengthscale: float, period: float) -> Kernel:
    """GPyTorch's form: the lengthscale is not squared."""
    return lambda a, b: np.exp(-2 * (np.sin(np.pi * (a - b) / period) ** 2).sum(-1) / lengthscale)


def brownian() -> Kernel:
    """The Wiener process on the first column: not stationary, with a kink on the diagonal."""
    return lambda a, b: np.minimum(a[..., 0], b[..., 0])


def add(*kernels: Kernel) -> Kernel:
    return lambda a, b: sum(k(a, b) for k in kernels)


def multiply(left: Kernel, right: Kernel) -> Kernel:
    return lambda a, b: left(a, b) * right(a, b)


# Integrals against the Legendre basis


@dataclass(frozen=True)
class Line:
    """Where a LegS basis lives: its interval, its order, and the line of inputs that time moves along."""

    order: int
    horizon: float
    start: float = 0.0
    time_dim: int = 0
    other: tuple[float, ...] = ()

    def rows(self, times: Array) -> Array:
        """Inputs ``(..., d)`` at times ``(...)``."""
        columns = [np.full_like(times, value) for value in self.other]
        columns.insert(self.time_dim % (len(self.other) + 1), times)
        return np.stack(columns, -1)

    def basis(self, times: Array) -> Array:
        """g_m / (horizon - start), ``(order, n)``."""
        length = self.horizon - self.start
        values = legendre.legvander(2 * (times - self.start) / length - 1, self.order - 1)
        return (np.sqrt(2 * np.arange(self.order) + 1) * values / length).T


def panels(ends: list[float], num_panels: int, num_nodes: int = 22) -> tuple[Array, Array]:
    """Nodes and weights of a composite rule: ``num_panels`` equal panels between any two neighbouring ends."""
    edges = np.unique(np.concatenate([np.linspace(a, b, num_panels + 1) for a, b in pairwise(ends)]))
    nodes, weights = legendre.leggauss(num_nodes)
    half = 0.5 * np.diff(edges)[:, None]
    return (edges[:-1, None] + half * (1 + nodes)).ravel(), (half * weights).ravel()


def legs_kuf(kernel: Kernel, line: Line, x: Array, num_panels: int = 3) -> Array:
    """Cov(u, f(x)), ``(order, n)``, for inputs ``(n, d)``; the integral is broken where time passes x."""
    columns = []
    for row in np.asarray(x, dtype=np.float64):
        time = row[line.time_dim]
        middle = [time] if line.start < time < line.horizon else []
        times, weights = panels([line.start, *middle, line.horizon], num_panels)
        columns.append(line.basis(times) @ (weights * kernel(line.rows(times), row)))
    return np.stack(columns, -1)


def legs_cross(kernel: Kernel, a: Line, b: Line, num_panels: int = 3) -> Array:
    """Cov(u_a, u_b), ``(order_a, order_b)``; the outer integral is broken at the ends of b."""
    middle = sorted({end for end in (b.start, b.horizon) if a.start < end < a.horizon})
    times, weights = panels([a.start, *middle, a.horizon], num_panels)
    inner = legs_kuf(kernel, b, a.rows(times), num_panels)
    return (a.basis(times) * weights) @ inner.T


def legs_kuu(kernel: Kernel, line: Line, num_panels: int = 3) -> Array:
    return legs_cross(kernel, line, line, num_panels)


# Sparse posteriors, unwhitened and dense


def _solve(a: Array, b: Array) -> Array:
    return np.linalg.solve(a, b)


def sparse_posterior(
    kuu: Array, kuf: Array, kff: Array, prior_mean: Array, m: Array, s: Array, jitter: float = 0.0
) -> tuple[Array, Array]:
    """Mean and covariance of f when v = L^-1 u is N(m, s), L the Cholesky factor of kuu + jitter.

    Written in u: ``u ~ N(L m, L s L')``, then ``f | u``.
    """
    kuu = kuu + jitter * np.eye(len(kuu))
    lower = np.linalg.cholesky(kuu)
    gain = _solve(kuu, kuf).T
    covariance_u = lower @ s @ lower.T
    return prior_mean + gain @ (lower @ m), kff - gain @ kuf + gain @ covariance_u @ gain.T


def gaussian_log_prob(y: Array, mean: Array, covariance: Array) -> float:
    residual = y - mean
    _, logdet = np.linalg.slogdet(covariance)
    return float(-0.5 * (residual @ _solve(covariance, residual) + logdet + len(y) * np.log(2 * np.pi)))


def collapsed_bound(
    kuu: Array, kuf: Array, kff_diagonal: Array, prior_mean: Array, y: Array, noise: float | Array
) -> float:
    """Titsias' bound: log N(y; mean, Qff + noise) minus half the residual variances over the noise."""
    qff = kuf.T @ _solve(kuu, kuf)
    noise = np.broadcast_to(noise, y.shape)
    trace = ((kff_diagonal - np.diag(qff)) / noise).sum()
    return gaussian_log_prob(y, prior_mean, qff + np.diag(noise)) - 0.5 * float(trace)


def exact_posterior(
    kernel: Kernel, x: Array, y: Array, noise: float | Array, x_new: Array, prior_mean: float = 0.0
) -> tuple[Array, Array]:
    """Mean and covariance of f at new inputs under the exact GP."""
    noise = np.diag(np.broadcast_to(noise, y.shape))
    gain = _solve(gram(kernel, x, x) + noise, gram(kernel, x, x_new)).T
    return prior_mean + gain @ (y - prior_mean), gram(kernel, x_new, x_new) - gain @ gram(kernel, x, x_new)


def gram(kernel: Kernel, a: Array, b: Array) -> Array:
    return kernel(a[:, None, :], b[None, :, :])


def gaussian_kl(m: Array, s: Array) -> float:
    """KL[N(m, s) || N(0, I)]."""
    _, logdet = np.linalg.slogdet(s)
    return float(0.5 * (np.trace(s) + m @ m - len(m) - logdet))


# Comparing


def close(actual: Tensor | Array, expected: Tensor | Array, tolerance: float) -> None:
    """Assert equal shapes, and that no entry differs by more than ``tolerance`` times the largest expected one."""
    actual, expected = (
        (v.detach() if isinstance(v, Tensor) else torch.from_numpy(np.array(v))).double() for v in (actual, expected)
    )
    scale = max(expected.abs().max().item(), 1e-300) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
