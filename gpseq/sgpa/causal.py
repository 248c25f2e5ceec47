r"""Causal forms: token t has the posterior of the prefix that ends with it.

The part that inducing keys explain is linear attention with whitened features as queries and keys,
:math:`\sum_{s \le t} (V_t \cdot V_s)\, v_s`, so a running state of ``M x D`` numbers holds the whole past.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_CHUNK = 64


def causal_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    r"""Linear attention over prefixes, :math:`\sum_{s \le t} (q_t \cdot k_s)\, v_s`, in chunks.

    Within a chunk the products are formed and masked, across chunks the state :math:`\sum_s k_s v_s^\top` is carried:
    no ``(T, M, D)`` tensor of running sums, and no loop.

    Args:
        query: ``(*batch, T, M)``.
        key: ``(*batch, T, M)``.
        value: ``(*batch, T, D)``.

    Returns:
        ``(*batch, T, D)``.

    Example:
        >>> import torch
        >>> ones = torch.ones(4, 1)
        >>> causal_linear_attention(ones, ones, ones).squeeze(-1)
        tensor([1., 2., 3., 4.])
    """
    length = query.shape[-2]
    if length <= 2 * _CHUNK:
        return (query @ key.mT).tril() @ value
    missing = -length % _CHUNK
    q, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(-2, (-1, _CHUNK)) for t in (query, key, value))
    # The sum over the chunks before, without the own one: taking that off again would leave rounding of the future.
    before = F.pad((k.mT @ v)[..., :-1, :, :].cumsum(-3), (0, 0, 0, 0, 1, 0))
    out = (q @ k.mT).tril() @ v + q @ before
    return out.flatten(-3, -2)[..., :length, :]


def prefix_kl(value: Tensor, residual_mean: Tensor, residual_variance: Tensor) -> Tensor:
    r"""Amortised divergence of every prefix of a sequence.

    .. math:: \mathrm{KL}(t) = \sum_{s \le t} v_s \, \bigl( m(s) - \tfrac12 C_{ss} v_s \bigr)

    where :math:`m(s) = \sum_{r \le s} C(s, r)\, v_r` is the masked residual mean. The coefficients are the same in
    every prefix, so the numbers need not grow with t.

    Args:
        value: v, ``(*batch, T, D)``.
        residual_mean: m, ``(*batch, T, D)``.
        residual_variance: the diagonal of C, ``(*batch, T)``.

    Returns:
        ``(*batch, D, T)``, in nats.
    """
    terms = value * (residual_mean - 0.5 * residual_variance.unsqueeze(-1) * value)
    return terms.cumsum(-2).mT


def mean_over_tokens(values: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over the last axis of ``(*batch, H, D, T)``, over the tokens that there are, ``(*batch, 1, T)``."""
    if keep is None:
        return values.mean(-1)
    weight = keep.unsqueeze(-2).to(values.dtype)
    return (values * weight).sum(-1) / weight.sum(-1).clamp_min(1.0)
