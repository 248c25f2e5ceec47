r"""Covariances of scaled tokens under the RBF kernel, explicit and inside stock fused attention.

Tokens here are divided by their length-scales already, :math:`\tilde x = x / \ell`. With two more columns the squared
distance is an inner product,

.. math::
    [\tilde q,\; 1,\; -\tfrac12 |\tilde q|^2] \cdot [\tilde k,\; -\tfrac12 |\tilde k|^2,\; 1]
    = -\tfrac12 |\tilde q - \tilde k|^2 .
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many score entries a head, forming the matrix beats the fused kernel on a CPU, and memory is no concern.
_EXPLICIT_ENTRIES = 192 * 192


def half_norms(tokens: Tensor) -> Tensor:
    r""":math:`-\tfrac12 |\tilde x|^2`, ``(*batch, T, 1)`` for tokens ``(*batch, T, dq)``."""
    return -0.5 * tokens.square().sum(-1, keepdim=True)


def as_queries(tokens: Tensor) -> Tensor:
    """Tokens ``(*batch, T, dq)`` with the two columns of a query; four in a dtype shorter than float32."""
    norms = _norm_columns(tokens)
    return torch.cat([tokens, torch.ones_like(norms), norms], -1)


def as_keys(tokens: Tensor) -> Tensor:
    """Tokens ``(*batch, T, dq)`` with the columns of a key, as many as those of a query."""
    norms = _norm_columns(tokens)
    return torch.cat([tokens, norms, torch.ones_like(norms)], -1)


def _norm_columns(tokens: Tensor) -> Tensor:
    """Half the squared norms, in columns that sum to them.

    A distance is a small difference of large norms: rounded to 8 or 11 bits they would drown it. So what rounding takes
    off goes into a second column.
    """
    if torch.finfo(tokens.dtype).bits > 16:
        return half_norms(tokens)
    norms = half_norms(tokens.float())
    rounded = norms.to(tokens.dtype)
    return torch.cat([rounded, (norms - rounded).to(tokens.dtype)], -1)


def rbf_covariance(query: Tensor, key: Tensor, log_variance: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""The matrix :math:`s^2 \exp(-\tfrac12 |\tilde q - \tilde k|^2 + b)`.

    Args:
        query: scaled, ``(*batch, H, Tq, dq)``.
        key: scaled, ``(*batch, H, Tk, dq)``.
        log_variance: ``(H, 1, 1)``.
        bias: added to the log kernel, broadcast to ``(*batch, H, Tq, Tk)``.

    Returns:
        ``(*batch, H, Tq, Tk)``.
    """
    scores = as_queries(query) @ as_keys(key).mT
    # A squared distance is not negative, whatever rounding says.
    scores = scores.clamp_max(0.0) + log_variance
    return (scores if bias is None else scores + bias.to(scores.dtype)).exp()


def rbf_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    fused: bool | None = None,
) -> Tensor:
    r"""Unnormalised attention :math:`\sum_s k(\tilde q_t, \tilde k_s)\, v_s`, :math:`k = \exp(-\tfrac12 |\cdot|^2)`.

    For long sequences it runs through ``scaled_dot_product_attention``: a sink key whose score is 0 with every query
    joins the keys, and a last column of the values is 1 at the sink and 0 elsewhere. The output is then
    :math:`[\sum_s k v_s / Z_t,\; 1 / Z_t]` with :math:`Z_t = 1 + \sum_s k(\tilde q_t, \tilde k_s)`, and one division
    gives the sum: exact, in memory linear in the length, on whatever backend. Forward derivatives and ``vmap`` at full
    speed need ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, which forms the matrix.

    Args:
        query: scaled, ``(*batch, H, Tq, dq)``.
        key: scaled, ``(*batch, H, Tk, dq)``.
        value: ``(*batch, H, Tk, D)``.
        bias: added to the log kernel, ``-inf`` removes; broadcast to ``(*batch, H, Tq, Tk)``.
        is_causal: token t sees tokens 1 to t; ``Tq == Tk``.
        fused: whether to use fused attention; ``None`` does for long sequences.

    Returns:
        ``(*batch, H, Tq, D)``.

    Example:
        >>> q = torch.zeros(1, 2, 3)  # one head, two equal tokens
        >>> rbf_product(q, q, torch.tensor([[[1.0], [2.0]]]))
        tensor([[[3.],
                 [3.]]])
    """
    if fused is None:
        fused = query.shape[-2] * key.shape[-2] > _EXPLICIT_ENTRIES
    if not fused:
        scores = (as_queries(query) @ as_keys(key).mT).clamp_max(0.0)
        scores = scores if bias is None else scores + bias
        kernel = scores.exp()
        return (kernel.tril() if is_causal else kernel) @ value
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    queries, keys, dims = as_queries(query), as_keys(key), value.shape[-1]
    width = max(queries.shape[-1], dims + 1)
    if query.device.type != "cpu":
        width = -(-width // 8) * 8  # what fused kernels on accelerators ask for
    queries = _widen(queries, width, lead)
    keys = F.pad(_widen(keys, width, lead), (0, 0, 1, 0))  # the sink comes first, all zeros
    sink = F.pad(value.new_ones(1, 1), (dims, width - dims - 1))
    values = torch.cat([sink.expand(*lead, 1, width), _widen(value, width, lead)], -2)
    if is_causal:
        # A dummy query in front keeps the diagonal where it was: query t sees the sink and keys 1 to t.
        queries = F.pad(queries, (0, 0, 1, 0))
    if bias is not None:
        bias = F.pad(bias.expand(*lead, query.shape[-2], key.shape[-2]), (1, 0)).to(queries.dtype)
    if len(lead) != 2:  # one batch and one head dimension is what fused kernels know
        queries, keys, values = (t.reshape(-1, *t.shape[-3:]) for t in (queries, keys, values))
        bias = None if bias is None else bias.reshape(-1, *bias.shape[-3:])
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, is_causal=is_causal, scale=1.0)
    out = out.reshape(*lead, *out.shape[-2:])
    out = out[..., 1:, :] if is_causal else out
    return out[..., :dims] / out[..., dims : dims + 1]


def _widen(tokens: Tensor, width: int, lead: tuple[int, ...]) -> Tensor:
    """Tokens with zero columns up to ``width`` and leading dimensions ``lead``."""
    return F.pad(tokens, (0, width - tokens.shape[-1])).expand(*lead, tokens.shape[-2], width)
