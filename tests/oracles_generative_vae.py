"""Sparse posteriors of pseudo-observations by their unwhitened moments, with every inverse written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence


def sparse_posterior(kuu: Tensor, kuf: Tensor, mean: Tensor, variance: Tensor, scale: float = 1.0):
    """Mean and covariance of u for one channel.

    Args:
        kuu: (M, M).
        kuf: (M, n).
        mean: pseudo-observations, (n,).
        variance: theirs, (n,).
        scale: how often each counts.
    """
    sigma = kuu + scale * kuf @ torch.diag(1 / variance) @ kuf.T
    inverse = torch.linalg.inv(sigma)
    return scale * kuu @ inverse @ kuf @ (mean / variance), kuu @ inverse @ kuu


def marginals(kuu: Tensor, kuf: Tensor, kff: Tensor, m: Tensor, S: Tensor):
    """Moments of f from those of u."""
    W = torch.linalg.solve(kuu, kuf).T
    return W @ m, kff - (W @ kuf).diagonal() + (W @ S @ W.T).diagonal()


def divergence(m: Tensor, S: Tensor, kuu: Tensor) -> Tensor:
    """KL of N(m, S) from N(0, kuu)."""
    return kl_divergence(
        MultivariateNormal(m, 0.5 * (S + S.T)), MultivariateNormal(torch.zeros_like(m), 0.5 * (kuu + kuu.T))
    )


def expected_log_density(y: Tensor, variance: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Sum of E log N(y | f, variance) under f ~ N(mean, spread), independently."""
    return -0.5 * (torch.log(2 * math.pi * variance) + ((y - mean) ** 2 + spread) / variance).sum()


def published_bound(recon: Tensor, y: Tensor, variance: Tensor, mean: Tensor, spread: Tensor, kl: Tensor, scale: float):
    """Reconstruction, minus the cross-entropy of the evidence, plus the inner bound of the process on it."""
    cross = scale * expected_log_density(y, variance, mean, spread)
    inner = scale * expected_log_density(y, variance, mean, spread) - kl
    return recon - cross + inner


def dense_posterior(K: Tensor, cross: Tensor, prior: Tensor, y: Tensor, variance: Tensor):
    """A Gaussian process on pseudo-data: K of the data, cross with new inputs, their prior variances."""
    C = K + torch.diag(variance)
    mean = cross.T @ torch.linalg.solve(C, y)
    return mean, prior - (cross * torch.linalg.solve(C, cross)).sum(0)


def old_factor(m: Tensor, S: Tensor, mean: Tensor, covariance: Tensor, old: Tensor) -> Tensor:
    """E[log q_a(a) - log p_a(a)] for a ~ N(mean, covariance), q_a = N(m, S) and p_a = N(0, old)."""

    def expected(centre: Tensor, spread: Tensor) -> Tensor:
        gap = mean - centre
        inverse = torch.linalg.inv(spread)
        quadratic = (inverse * covariance).sum() + gap @ inverse @ gap
        return -0.5 * (len(gap) * math.log(2 * math.pi) + torch.logdet(spread) + quadratic)

    return expected(m, S) - expected(torch.zeros_like(m), old)
