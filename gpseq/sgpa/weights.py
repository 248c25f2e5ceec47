"""The matrix that multiplies the values of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from gpseq.sgpa.arguments import check_choice, check_kernel, check_tokens
from gpseq.sgpa.basis import inducing_basis, without_autocast
from gpseq.sgpa.decoupled import _normaliser, _scaled_tokens, _seen, _shared
from gpseq.sgpa.masks import row_mask
from gpseq.sgpa.rbf import rbf_covariance


def attention_weights(
    query: Tensor,
    key: Tensor,
    inducing_key: Tensor,
    lengthscale: Tensor,
    variance: Tensor,
    kernel: str = "rbf",
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    form: str = "orthogonal",
    jitter: float | None = None,
    normalise: bool = False,
    value_scale: str | None = None,
) -> Tensor:
    r"""Weights of the values in the mean of :func:`decoupled_posterior`: :math:`C(q, a)` under its masks and scalings.

    Unlike softmax weights they do not sum to 1, and some may be negative: what the inducing keys explain is taken out.
    In the Cheng-Boots form it is not, and the weights are those of kernel attention.

    Args:
        query: ``(*batch, H, Tq, dq)``.
        key: ``(*batch, H, Tk, dq)``.
        inducing_key: ``(H, M, dq)``.
        lengthscale: ``(H, dq)``.
        variance: ``(H,)``.
        kernel: as in :func:`decoupled_posterior`, likewise all others.
        key_padding_mask: of keys.
        attn_mask: of single scores.
        is_causal: query t sees keys 1 to t.
        form: ``"orthogonal"`` or ``"cheng_boots"``.
        jitter: relative.
        normalise: divide the kernel by its mean over the keys.
        value_scale: ``"length"`` or ``None``.

    Returns:
        ``(*batch, H, Tq, Tk)``.

    Raises:
        TypeError: a mask is neither boolean nor floating.
        ValueError: shapes do not fit each other, or an option is unknown.

    Example:
        >>> x, g = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
        >>> attention_weights(x, x, g, torch.ones(2, 3), torch.ones(2)).shape
        torch.Size([2, 5, 5])
    """
    check_choice("form", form, ("orthogonal", "cheng_boots"))
    check_choice("kernel", kernel, ("rbf", "exponential"))
    check_choice("value_scale", value_scale, ("length", None))
    ones = torch.ones_like(key[..., :1])
    check_tokens(query, key, ones)
    check_kernel(query, lengthscale, variance)
    rows = row_mask(attn_mask, (*query.shape[:-1], key.shape[-2]))
    with without_autocast(query):
        amplitude = variance if normalise else None
        tokens = _scaled_tokens(query, key, ones, lengthscale, kernel, key_padding_mask, rows, is_causal, amplitude)
        basis = inducing_basis(inducing_key, lengthscale, variance, query, jitter)
        basis, (q, k) = basis.around(tokens.query, tokens.key)
        tokens = tokens._replace(query=q, key=k)
        dtype = basis.key.dtype
        bias = None if rows is None else rows.bias
        matrix = rbf_covariance(tokens.query.to(dtype), tokens.key.to(dtype), basis.log_variance, bias)
        seen = None if rows is None else rows.attend
        if is_causal:
            seen = torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).tril()
        matrix = matrix if seen is None else matrix * seen
        total = matrix @ tokens.mass.to(dtype) / basis.variance if normalise else None
        if form == "orthogonal":
            inducing = _shared(tokens, basis, basis.key[..., :0], None)
            explained = inducing.features @ inducing.key_features.mT
            matrix = matrix - (explained if seen is None else explained * seen)
        # What a value of one is under this kernel: zero in padding, with the factor that the kernel gives its key.
        matrix = matrix * tokens.value.to(dtype).mT
        count = _seen(tokens).to(dtype) if normalise or value_scale == "length" else None
        matrix = matrix if count is None else matrix / count.clamp_min(1.0)
        if total is not None and count is not None:
            matrix = matrix / _normaliser(total, count, tokens.shift)
        elif tokens.factor is not None:
            matrix = matrix * tokens.factor.to(dtype)
    return matrix.to(query.dtype)
