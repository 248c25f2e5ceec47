"""Independent beliefs on one basis, one a stream, as one batched state."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gpseq.variational.online import OnlineState
from gpseq.variational.prior import Prior

#: What each stream has of its own; the rest of a state is the basis.
OWN = ("G", "r", "c", "count")

#: Most kernel values of a block of streams that are updated together, so that they stay in the processor's cache.
BLOCK = 2**19


def rows(state: OnlineState, index: Tensor | slice | int) -> OnlineState:
    """What some streams of a fleet know, on the same basis.

    Args:
        state: of S streams; G, r, c and count have batch shape ``(S,)``.
        index: which of them, ``(k,)``, or one.

    Returns:
        A state of batch shape ``(k,)``. The basis is taken along too where every stream has its own.
    """
    own = {name: getattr(state, name)[index] for name in OWN}
    if state.factor.dim() > 2:
        own |= {name: getattr(state, name)[index] for name in ("factor", "jitter", "whitened_weights")}
    if state.whitened_mean.dim() > 1:
        own["whitened_mean"] = state.whitened_mean[index]
    return replace(state, **own)


def update_each(
    state: OnlineState, prior: Prior, x: Tensor, y: Tensor, noise: Tensor, observed: Tensor | None = None
) -> OnlineState:
    r"""Absorb observations in each of S independent beliefs: `gpseq.variational.online.update`, in few passes.

    With :math:`A_s = V k(z, x_s)` and :math:`B_s = A_s D_s^{1/2}`,

    .. math:: G_s \leftarrow G_s + B_s B_s^\top, \qquad r_s \leftarrow r_s + B_s D_s^{1/2} (y_s - \mu(x_s)) .

    Where all streams share a kernel, the inputs of all streams meet the nodes as one flat matrix. The S x M x M numbers
    of G, which are most of the work, are read once and written once.

    Args:
        state: G, r, c and count of batch shape ``(S,)``; its basis has none, or the same.
        prior: kernel and mean, likewise.
        x: inputs, ``(n, d)`` shared by all streams, or ``(S, n, d)``.
        y: targets, ``(S, n)``.
        noise: noise variances, broadcastable to ``(S, n)``.
        observed: which targets exist, ``(S, n)``; ``None`` means all. A stream without any keeps its state bit for bit.

    Returns:
        The new state.
    """
    streams, n, num_nodes = len(state.r), x.shape[-2], state.nodes.shape[-2]
    shared = state.factor.dim() == 2
    size = max(BLOCK // max(n * (num_nodes if x.dim() > 2 else state.num_features), 1), 1)
    # One new observation each is bound by G, not by kernel values, and so are streams with kernels of their own.
    if shared and n > 1 and size < streams and state.whitened_mean.dim() == 1:
        blocks = [slice(start, start + size) for start in range(0, streams, size)]
        noise = noise.expand(streams, n)
        parts = [
            update_each(
                rows(state, block),
                prior,
                x[block] if x.dim() > 2 else x,
                y[block],
                noise[block],
                None if observed is None else observed[block],
            )
            for block in blocks
        ]
        return replace(state, **{name: torch.cat([getattr(part, name) for part in parts]) for name in OWN})

    inputs = x.reshape(-1, x.shape[-1]) if shared else x
    # The mean may belong to one stream each where the kernel is shared.
    covariance, variance, _ = replace(prior, mean=None).at(state.nodes, inputs)
    A = covariance.mT @ state.whitened_weights.mT
    residual = variance - A.square().sum(-1)
    if shared and x.dim() > 2:
        A, residual = A.reshape(streams, n, -1), residual.reshape(streams, n)
    error = y - prior.mean_at(x)
    noise = noise.expand(*noise.shape[:-1], n)
    log_scale = torch.log(2 * math.pi * noise)
    count: Tensor | int = n
    if observed is not None:
        # A missing target may be NaN, and so may its noise: replace, do not multiply.
        noise = torch.where(observed, noise, math.inf)
        log_scale = torch.where(observed, log_scale, 0.0)
        error = torch.where(observed, error, 0.0)
        count = observed.sum(-1)
    root = noise.rsqrt()
    scaled = error * root
    B = A * root.unsqueeze(-1)
    if B.dim() == 2:  # the same for all streams
        information = B.mT @ B
        G = state.G + 0.5 * (information + information.mT)
        r = state.r + scaled @ B
    else:
        B = B.expand(streams, -1, -1)
        # The products of one observation need no matrix multiplication, which would be slower.
        G = torch.addcmul(state.G, B.mT, B) if n == 1 else torch.baddbmm(state.G, B.mT, B)
        r = state.r + (scaled.unsqueeze(-2) @ B).squeeze(-2)
    constants = log_scale.sum(-1) + scaled.square().sum(-1) + (residual / noise).sum(-1)
    return replace(state, G=G, r=r, c=state.c - 0.5 * constants, count=state.count + count)
