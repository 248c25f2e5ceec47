"""Slow and obviously right: attention as a sparse GP, one row, head and dimension at a time, with dense covariances."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpseq.sgpa import DiagonalScale, LowRankScale


class Problem(NamedTuple):
    """Arguments of ``decoupled_posterior`` in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    inducing_key: Tensor
    inducing_value: Tensor
    inducing_scale_tril: Any
    lengthscale: Tensor
    variance: Tensor


def problem(
    batch: tuple[int, ...] = (2,),
    tokens: int = 4,
    queries: int | None = None,
    inducing: int = 3,
    heads: int = 2,
    dims: int = 2,
    width: int = 2,
    scale: str = "per_dim",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Problem:
    """Random tokens; self-attention unless ``queries`` are given."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)

    key = 1.3 * draw(*batch, heads, tokens, width)
    query = key if queries is None else 1.3 * draw(*batch, heads, queries, width)
    return Problem(
        query,
        key,
        draw(*batch, heads, tokens, dims),
        1.3 * draw(heads, inducing, width),
        draw(heads, inducing, dims),
        make_scale(scale, heads, dims, inducing, dtype, device),
        0.8 + 0.4 * torch.rand(heads, width, dtype=torch.float64).to(device=device, dtype=dtype),
        0.5 + torch.rand(heads, dtype=torch.float64).to(device=device, dtype=dtype),
    )


def make_scale(kind: str, heads: int, dims: int, size: int, dtype=torch.float64, device: str = "cpu", rank: int = 2):
    """Random whitened covariances of every form."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)

    if kind == "diagonal":
        return DiagonalScale(0.5 + draw(heads, dims, size).abs())
    if kind == "low_rank":
        return LowRankScale(0.5 + draw(heads, dims, size).abs(), 0.5 * draw(heads, dims, size, rank))
    strict = 0.4 * draw(heads, 1 if kind == "shared" else dims, size, size).tril(-1)
    return strict + torch.diag_embed((0.3 * draw(*strict.shape[:-1])).exp())


def covariance(scale: Any) -> Tensor:
    """S itself, ``(H, D or 1, M, M)``."""
    if isinstance(scale, DiagonalScale):
        return torch.diag_embed(scale.std.square())
    if isinstance(scale, LowRankScale):
        return torch.diag_embed(scale.std.square()) + scale.root @ scale.root.mT
    return scale @ scale.mT


def base_kernel(kernel: str, x: Tensor, y: Tensor, lengthscale: Tensor, variance: Tensor) -> Tensor:
    """One head's kernel matrix, by its formula."""
    x, y = x / lengthscale, y / lengthscale
    if kernel == "exponential":
        return variance * (x @ y.mT).exp()
    return variance * (-0.5 * (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)).exp()


def gaussian_divergence(mean: Tensor, cov: Tensor, prior: Tensor) -> Tensor:
    """KL of two Gaussians, the second of mean zero."""
    solve = torch.linalg.solve(prior, torch.cat([cov, mean.unsqueeze(-1)], -1))
    trace = solve[..., :-1].diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + mean @ solve[..., -1] - len(mean) - torch.logdet(cov) + torch.logdet(prior))


def union_posterior(
    k_qq: Tensor, k_qu: Tensor, k_uu: Tensor, value: Tensor, inducing_value: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An ordinary SVGP with the inducing inputs u = (g, a), whose joint q(u_g, u_a) is written out.

    Args:
        k_qq: (q, q), prior of the queries; k_qu: (q, M + T); k_uu: (M + T, M + T), inducing keys first.
        value: (T,), v_a.
        inducing_value: (M,), v_g.
        s: (M, M), whitened covariance.
    """
    size = len(inducing_value)
    k_gg, k_ag, k_aa = k_uu[:size, :size], k_uu[size:, :size], k_uu[size:, size:]
    projection = torch.linalg.solve(k_gg, k_ag.mT).mT
    residual = k_aa - projection @ k_ag.mT
    tril = torch.linalg.cholesky(k_gg)
    s_gg = tril @ s @ tril.mT
    mean = torch.cat([k_gg @ inducing_value, k_ag @ inducing_value + residual @ value])
    top = torch.cat([s_gg, s_gg @ projection.mT], 1)
    bottom = torch.cat([projection @ s_gg, projection @ s_gg @ projection.mT + residual], 1)
    cov = torch.cat([top, bottom])
    weights = torch.linalg.solve(k_uu, k_qu.mT).mT
    posterior = k_qq - weights @ k_qu.mT + weights @ cov @ weights.mT
    return weights @ mean, posterior, gaussian_divergence(mean, cov, k_uu)


def row_posterior(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    v_g: Tensor,
    s: Tensor,
    lengthscale: Tensor,
    variance: Tensor,
    kernel: str = "rbf",
    form: str = "orthogonal",
    normalise: bool = False,
    value_scale: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (q, dq) that all see the same keys (T, dq): one head, one output dimension."""

    def k(x: Tensor, y: Tensor) -> Tensor:
        return base_kernel(kernel, x, y, lengthscale, variance)

    def z(x: Tensor) -> Tensor:
        if not normalise or len(key) == 0:
            return torch.ones(len(x), dtype=x.dtype)
        return k(x, key).mean(-1) / variance

    def prior(x: Tensor, y: Tensor) -> Tensor:
        return k(x, y) / (z(x).unsqueeze(-1) * z(y))

    count = max(len(key), 1)
    v_g, value = v_g * z(g), value * z(key) / (variance * count if normalise else 1.0)
    value = value / count if value_scale == "length" and not normalise else value
    if form == "cheng_boots":
        v_g = v_g + torch.linalg.solve(prior(g, g), prior(g, key) @ value)
    u = torch.cat([g, key])
    return union_posterior(prior(query, query), prior(query, u), prior(u, u), value, v_g, s)


def dense_posterior(
    p: Problem, attend: Tensor | None = None, keep: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row by itself.

    Args:
        p: the problem; float64.
        attend: (Tq, Tk) boolean; keep: (*batch, Tk) boolean.

    Returns:
        Mean (*b, H, Tq, D), variance (*b, H, D, Tq), divergence of every row (*b, H, D, Tq).
    """
    batch = p.query.shape[:-3]
    heads, rows, length, dims = p.query.shape[-3], p.query.shape[-2], p.key.shape[-2], p.value.shape[-1]
    flat = [t.reshape(-1, *t.shape[-3:]) for t in (p.query, p.key, p.value)]
    attend = torch.ones(rows, length, dtype=torch.bool) if attend is None else attend
    keep = torch.ones(len(flat[0]), length, dtype=torch.bool) if keep is None else keep.reshape(-1, length)
    s = covariance(p.inducing_scale_tril).expand(-1, dims, -1, -1)
    mean = torch.zeros(len(flat[0]), heads, rows, dims, dtype=torch.float64)
    variance, divergence = torch.zeros_like(mean).mT.contiguous(), torch.zeros_like(mean).mT.contiguous()
    for b, (query, key, value) in enumerate(zip(*flat, strict=True)):
        for h in range(heads):
            for t in range(rows):
                seen = attend[t] & keep[b]
                for d in range(dims):
                    m, c, kl = row_posterior(
                        query[h, t : t + 1],
                        key[h, seen],
                        value[h, seen, d],
                        p.inducing_key[h],
                        p.inducing_value[h, :, d],
                        s[h, d],
                        p.lengthscale[h],
                        p.variance[h],
                        **options,
                    )
                    mean[b, h, t, d], variance[b, h, d, t], divergence[b, h, d, t] = m[0], c[0, 0], kl
    return tuple(t.reshape(*batch, *t.shape[1:]) for t in (mean, variance, divergence))
