"""Ordinary softmax attention over heads, under every mask, with rows that see nothing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gpseq.nn.projection import Tokens
from gpseq.sgpa.masks import removes


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of projected heads.

    Args:
        query: ``(B, H, Tq, D)``.
        key: ``(B, H, Tk, D)``.
        value: ``(B, H, Tk, D)``.
        tokens: the call: its masks, and whether weights are asked for.

    Returns:
        Heads ``(B, H, Tq, D)``, zero where a query sees no key, and weights ``(B, H, Tq, Tk)`` or ``None``.
    """
    bias = _bias(tokens, query)
    blind = None if bias is None else (bias == -torch.inf).all(-1, keepdim=True)
    if blind is not None and bias is not None:
        bias = bias.masked_fill(blind, 0.0)  # a softmax over nothing is NaN, and so is its gradient
    if tokens.need_weights:
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if tokens.is_causal:
            length = scores.shape[-1]
            scores = scores.masked_fill(
                torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1), -torch.inf
            )
        weights = (scores if bias is None else scores + bias).softmax(-1)
        weights = weights if blind is None else weights.masked_fill(blind, 0.0)
        return weights @ value, weights
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=tokens.is_causal and bias is None)
    return (out if blind is None else out.masked_fill(blind, 0.0)), None


def _bias(tokens: Tokens, query: Tensor) -> Tensor | None:
    """All masks as one that is added to the scores, ``(B, 1 or H, 1 or Tq, Tk)``; ``None`` if there is none."""
    masks = []
    if tokens.key_padding_mask is not None:
        masks.append(tokens.key_padding_mask[:, None, None, :])
        if tokens.is_causal:
            length = query.shape[-2]
            masks.append(torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1))
    if tokens.attn_mask is not None:
        masks.append(tokens.attn_mask)
    total = None
    for mask in masks:
        # What stands for minus infinity is that, as everywhere else.
        bias = torch.zeros_like(mask, dtype=query.dtype) if mask.dtype == torch.bool else mask.to(query.dtype)
        added = bias.masked_fill(removes(mask), -torch.inf)
        total = added if total is None else total + added
    return total if total is None or total.dim() == 4 else total.expand(query.shape[0], 1, *total.shape[-2:])
