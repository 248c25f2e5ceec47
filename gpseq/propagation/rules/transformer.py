"""Rules for torch's transformer encoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpseq.propagation.activations import of_function
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk


@register(nn.TransformerEncoderLayer)
def encoder_layer(
    module: Any,
    state: GaussianState,
    walk: Walk,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> GaussianState:
    """Attention and a perceptron, each beside a residual path, with norms before or after.

    Raises:
        ValueError: a sequence without a batch, whose tokens would be one.
    """
    if len(state.event) != 2:
        raise ValueError(
            f"x: expected sequences (B, T, D) in {walk.path(module)}, got a mean of shape {tuple(state.mean.shape)}; "
            "give a single one a batch of one."
        )

    def attention(x: GaussianState) -> GaussianState:
        out = walk(
            module.self_attn,
            x,
            x,
            x,
            key_padding_mask=src_key_padding_mask,
            need_weights=False,
            attn_mask=src_mask,
            is_causal=is_causal,
        )
        return walk(module.dropout1, out)

    def perceptron(x: GaussianState) -> GaussianState:
        hidden = walk.elementwise(walk(module.linear1, x), of_function(module.activation))
        return walk(module.dropout2, walk(module.linear2, walk(module.dropout, hidden)))

    if module.norm_first:
        state = state.branch(lambda x: attention(walk(module.norm1, x)))
        return state.branch(lambda x: perceptron(walk(module.norm2, x)))
    state = walk(module.norm1, state.branch(attention))
    return walk(module.norm2, state.branch(perceptron))


@register(nn.TransformerEncoder)
def encoder(
    module: Any,
    state: GaussianState,
    walk: Walk,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> GaussianState:
    """One layer after the other."""
    for layer in module.layers:
        state = walk(
            layer,
            state,
            src_mask=mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=bool(is_causal),
        )
    return state if module.norm is None else walk(module.norm, state)
