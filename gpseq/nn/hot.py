"""The common kind of call of an attention layer, whose derivatives are written out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpseq.nn.inducing import InducingKeys
from gpseq.nn.projection import ProjectedAttention, Tokens
from gpseq.sgpa.draws import standard_normal
from gpseq.sgpa.fast import attend, prepare


class HotDraw(NamedTuple):
    """What a call leaves behind.

    Attributes:
        heads: ``(B, H, T, D)``.
        kl_amortised: divergence of each sequence's own keys, ``(B,)``.
        kl_global: that of the inducing keys, a scalar.
    """

    heads: Tensor
    kl_amortised: Tensor
    kl_global: Tensor


def is_hot(layer: ProjectedAttention, tokens: Tokens) -> bool:
    """Whether a call can go this way, for a layer of the right kind: self-attention under masks of padding.

    Compilers, ``torch.func``, forward mode and autocast want plain operations.
    """
    query, weight = tokens.query, layer.query_weight
    return (
        tokens.is_self
        and tokens.attn_mask is None
        and not (tokens.is_causal or tokens.need_weights)
        and weight.dtype in (torch.float32, torch.float64)
        and query.dtype == tokens.value.dtype == weight.dtype
        and not (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None)
        and not torch.is_autocast_enabled(query.device.type)
        and torch.autograd.forward_ad._current_level < 0
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (query, weight))
    )


def hot_draw(
    layer: ProjectedAttention,
    inducing: InducingKeys,
    tokens: Tokens,
    value_scale: str | None,
    jitter: float | None,
    noisy: bool,
) -> HotDraw:
    """A draw of the heads under the RBF kernel in the orthogonal form, or their mean.

    Args:
        layer: its projections, and where its draws come from.
        inducing: with a full factor, in the space of the layer's input.
        tokens: of the call, see :func:`is_hot`.
        value_scale: ``"length"`` or ``None``.
        jitter: relative; ``None`` fits the dtype.
        noisy: whether to draw.
    """
    assert inducing.lower is not None
    prepared = prepare(
        layer.query_weight,
        inducing.location,
        inducing.value,
        inducing.log_lengthscale,
        inducing.log_variance,
        inducing.lower,
        inducing.log_diagonal,
        jitter,
    )
    query = layer.split(F.linear(tokens.query, prepared.weight, prepared.shift))
    value, removed, mask = layer.project_value(tokens.value), tokens.removed, tokens.key_padding_mask
    share: Tensor | float = 1.0 / query.shape[-2] if value_scale == "length" else 1.0
    if removed is not None and mask is not None:
        value = value.masked_fill(removed[:, None, :, None], 0.0)
        if mask.dtype != torch.bool:
            value = value * mask.masked_fill(removed, 0.0).exp()[:, None, :, None].to(value.dtype)
        if value_scale == "length":
            share = (~removed).sum(-1).clamp_min(1).to(value.dtype).reciprocal()[:, None, None]
    noise = None
    if noisy:
        noise = standard_normal(value.shape, layer.generator, value.dtype, value.device)
    heads, amortised = attend(query, value, prepared, inducing.log_variance, share, noise)
    # tr(S) - M is the trace of S - I, and the mean's cost is that of the whitened one.
    spread = 0.5 * prepared.excess.diagonal(dim1=-2, dim2=-1).sum() - inducing.log_diagonal.sum()
    shared_by = layer.head_dim // prepared.excess.shape[1]
    return HotDraw(heads, amortised, shared_by * spread + 0.5 * prepared.value.square().sum())
