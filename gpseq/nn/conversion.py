"""From the weights of trained softmax attention to those of a layer of this package."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import stacklevel_outside
from gpseq.nn.attention import SGPAttention


class ConversionWarning(UserWarning):
    """A part of trained attention has no place in a symmetric kernel, and is gone."""


def symmetric_projection(query_weight: Tensor, key_weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""The one projection whose scores are nearest to those of two.

    Scores are :math:`x^\top A\, y` with :math:`A = W_q^\top W_k`. Of the symmetric part of A the greatest positive
    eigenvalues stay, as many as a head is wide:

    .. math:: \tfrac12 (A + A^\top) = U \Lambda U^\top, \qquad W = \Lambda_+^{1/2} U_+^\top .

    Args:
        query_weight: of each head, ``(H, D, embed_dim)``.
        key_weight: likewise.

    Returns:
        W, ``(H, D, embed_dim)``, and how much of A is lost, :math:`\|A - W^\top W\|_F / \|A\|_F`, ``(H,)``.

    Source:
        The nearest positive semi-definite matrix of given rank in the Frobenius norm, of the symmetric part.

    Example:
        >>> w = torch.randn(2, 3, 8)
        >>> one, lost = symmetric_projection(w, w)  # tied already: scores stay
        >>> bool((one.mT @ one - w.mT @ w).abs().max() < 1e-4), bool(lost.max() < 1e-4)
        (True, True)
    """
    q, k = query_weight.double(), key_weight.double()
    width = q.shape[-2]
    # All of it happens in the span of both: at most 2 D columns, whatever embed_dim is.
    basis, root = torch.linalg.qr(torch.cat([q, k], -2).mT)
    q, k = root.mT[..., :width, :], root.mT[..., width:, :]
    scores = q.mT @ k
    values, vectors = torch.linalg.eigh(0.5 * (scores + scores.mT))
    kept, directions = values[..., -width:].clamp_min(0.0), vectors[..., -width:]
    small = kept.sqrt().unsqueeze(-1) * directions.mT
    rows = small.shape[-2]
    norm = torch.linalg.matrix_norm(scores)
    lost = torch.linalg.matrix_norm(scores - small.mT @ small) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    weight = small @ basis.mT
    if rows < width:  # a head wider than the tokens: there are no more directions
        weight = torch.cat([weight, weight.new_zeros(*weight.shape[:-2], width - rows, weight.shape[-1])], -2)
    return weight.to(query_weight.dtype), lost


def convert_attention(attention: nn.MultiheadAttention, mode: str = "residual", **options: Any) -> SGPAttention:
    r"""A layer with the weights of torch's attention, which stays as it is; both share the output map.

    In mode ``"residual"`` nothing is lost: with ``sampling="mean"`` the layer starts as the same function. In modes
    ``"sgpa"`` and ``"softmax_kernel"`` queries and keys get one map, see
    :func:`~gpseq.nn.conversion.symmetric_projection`, the length-scale is that of softmax attention, :math:`D^{1/4}`,
    and biases of queries and keys are gone; values and output carry over.

    Args:
        attention: exactly ``nn.MultiheadAttention``, without ``add_bias_kv`` and ``add_zero_attn``.
        mode: as in :class:`~gpseq.nn.SGPAttention`.
        options: further arguments of :class:`~gpseq.nn.SGPAttention`.

    Returns:
        The layer, with dtype, device, training flag, dropout and ``requires_grad`` of the old one.

    Raises:
        TypeError: it is something else.
        ValueError: there is a key without a token, or an option does not fit.

    Example:
        >>> trained = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> layer = convert_attention(trained, sampling="mean")
        >>> torch.allclose(layer(x, x, x)[0], trained(x, x, x)[0], atol=1e-5)
        True
    """
    if type(attention) is not nn.MultiheadAttention:
        raise TypeError(f"attention: expected nn.MultiheadAttention itself, got {type(attention).__name__}.")
    if attention.bias_k is not None or attention.add_zero_attn:
        name = "add_bias_kv" if attention.bias_k is not None else "add_zero_attn"
        raise ValueError(f"attention: expected one without keys that have no token, got {name}=True.")
    for name in ("embed_dim", "num_heads", "dropout", "bias", "kdim", "vdim", "batch_first", "device", "dtype"):
        if name in options:
            raise ValueError(f"{name}: expected what the trained attention has, got {options[name]!r}.")
    fused, bias = attention.in_proj_weight, attention.in_proj_bias
    weights = _three(attention)
    layer = SGPAttention(
        attention.embed_dim,
        attention.num_heads,
        mode=mode,
        dropout=attention.dropout,
        bias=bias is not None,
        kdim=attention.kdim,
        vdim=attention.vdim,
        batch_first=attention.batch_first,
        device=weights[0].device,
        dtype=weights[0].dtype,
        **options,
    )
    query, key, value = (weight.detach() for weight in weights)
    lost = None
    if layer.tied and layer.key_weight is None:
        heads = (layer.num_heads, layer.head_dim)
        one, lost = symmetric_projection(query.unflatten(0, heads), key.unflatten(0, heads))
        query = one.flatten(0, 1)
    with torch.no_grad():
        layer.query_weight.copy_(query)
        layer.value_weight.copy_(value)
        if layer.key_weight is not None:
            layer.key_weight.copy_(key)
        if bias is not None:
            for mine, theirs in zip(_biases(layer), bias.detach().chunk(3), strict=True):
                if mine is not None:
                    mine.copy_(theirs)
        if layer.tied:
            # Scores are divided by the square root of the width, wherever they come from.
            layer.inducing.log_lengthscale.fill_(0.25 * math.log(layer.head_dim))
    if fused is not None:
        trained = (fused.requires_grad,) * 3
    else:
        trained = (weights[0].requires_grad, weights[1].requires_grad, weights[2].requires_grad)
    # One map for both is trained if one of them was.
    layer.query_weight.requires_grad_(trained[0] or (layer.key_weight is None and trained[1]))
    layer.value_weight.requires_grad_(trained[2])
    if layer.key_weight is not None:
        layer.key_weight.requires_grad_(trained[1])
    if bias is not None:
        for mine in _biases(layer):
            if mine is not None:
                mine.requires_grad_(bias.requires_grad)
    layer.out_proj = attention.out_proj
    if lost is not None:
        _warn(lost, bias)
    return layer.train(attention.training)


def _three(attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of queries, keys and values."""
    if attention.in_proj_weight is None:
        return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    query, key, value = attention.in_proj_weight.chunk(3)
    return query, key, value


def _biases(layer: SGPAttention) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return layer.query_bias, layer.key_bias, layer.value_bias


def _warn(lost: Tensor, bias: Tensor | None) -> None:
    """Say how much of the scores is gone, if any is."""
    size = 0 if bias is None else bias.shape[0] // 3
    shift = bias is not None and bool(bias.detach()[:size].any())  # a bias of the keys cancels in softmax
    if lost.max() <= 1e-4 and not shift:
        return
    also = "; the bias of the queries is dropped too" if shift else ""
    warnings.warn(
        f"one map for queries and keys keeps the trained scores in part: of their Frobenius norm {lost.mean():.0%} is "
        f"discarded (heads: {lost.min():.0%} to {lost.max():.0%}){also}. Only mode 'residual' keeps all.",
        ConversionWarning,
        stacklevel=stacklevel_outside(),
    )
