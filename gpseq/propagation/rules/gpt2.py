"""Rules for GPT-2 in Hugging Face's transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpseq.propagation.moments import GaussianState, LinearMap
from gpseq.propagation.pooling import select_token
from gpseq.propagation.registry import register
from gpseq.propagation.rules.attention import attend
from gpseq.propagation.rules.huggingface import (
    activate,
    check_attention,
    check_inputs,
    is_class,
    model_mask,
    score_mask,
    through_base,
    through_blocks,
)
from gpseq.propagation.walk import Walk


@register(is_class("GPT2Attention"))
def gpt2_attention(
    module: Any,
    state: GaussianState,
    walk: Walk,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **inputs: Any,
) -> GaussianState:
    """Causal attention and the matrix behind it."""
    check_inputs(module, walk, {"past_key_values": past_key_values, **inputs})
    check_attention(module, walk)
    mask = score_mask(module, attention_mask, state.mean, causal=True)
    scale = getattr(module, "scaling", None)
    if scale is None:  # releases 4 find it in each call
        scale = float(module.head_dim) ** -0.5 if module.scale_attn_weights else 1.0
        if module.scale_attn_by_inverse_layer_idx:
            scale /= module.layer_idx + 1
    projections = [(module.c_attn.weight, module.c_attn.bias)]
    heads = attend(state, walk, projections, module.num_heads, mask, scale, True, dropout=module.attn_dropout.p)
    return walk(module.resid_dropout, walk(module.c_proj, heads))


@register(is_class("GPT2Block"))
def gpt2_block(
    module: Any, state: GaussianState, walk: Walk, attention_mask: Tensor | None = None, **inputs: Any
) -> GaussianState:
    """Causal attention and a perceptron, with norms before them."""
    check_inputs(module, walk, inputs)
    mlp = module.mlp

    def attention(x: GaussianState) -> GaussianState:
        return gpt2_attention(module.attn, walk(module.ln_1, x), walk, attention_mask=attention_mask)

    def perceptron(x: GaussianState) -> GaussianState:
        hidden = activate(mlp.act, walk(mlp.c_fc, walk(module.ln_2, x)), walk)
        return walk(mlp.dropout, walk(mlp.c_proj, hidden))

    return state.branch(attention).branch(perceptron)


@register(is_class("GPT2Model"))
def gpt2_model(
    module: Any,
    state: GaussianState,
    walk: Walk,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    **inputs: Any,
) -> GaussianState:
    """Hidden states of all tokens, ``(B, T, D)``, of ids or of tokens that are embedded."""
    check_inputs(module, walk, inputs)
    batch, length = state.mean.shape[:2]
    if position_ids is None:
        position_ids = torch.arange(length, device=state.mean.device).unsqueeze(0)
    out = state if state.mean.is_floating_point() else walk(module.wte, state)
    out = out.plus(walk(module.wpe, GaussianState(position_ids.expand(batch, length))))
    if token_type_ids is not None:
        out = out.plus(walk(module.wte, GaussianState(token_type_ids)))
    out = walk(module.drop, out)
    mask = model_mask(attention_mask, out.mean, causal=True)
    return walk(module.ln_f, through_blocks(out, walk, module.h, mask))


@register(is_class("GPT2LMHeadModel"))
def gpt2_language_model(
    module: Any,
    state: GaussianState,
    walk: Walk,
    positions: Tensor | None = None,
    outputs: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    **inputs: Any,
) -> GaussianState:
    """Logits of the next token, ``(B, T, K)``, or of some positions and some words.

    Args:
        module: the model.
        state: ids, or tokens that are embedded.
        walk: of the network.
        positions: integers ``(P,)``, of the tokens whose logits are asked for; ``None`` is all.
        outputs: integers ``(J,)``, of the words whose logits are; ``None`` is all.
        logits_to_keep: positions by the name that transformers has for them; a number is that of the last.
        inputs: of the model inside.
    """
    hidden = through_base(module, state, walk, "transformer", **inputs)
    length = hidden.mean.shape[1]
    if positions is None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        last = isinstance(logits_to_keep, int)
        positions = torch.arange(length)[-logits_to_keep:] if last else logits_to_keep  # type: ignore[assignment]
    hidden = hidden if positions is None else _choose(hidden, positions, -2)
    logits = walk(module.lm_head, hidden)
    return logits if outputs is None else _choose(logits, outputs, -1)


def _choose(state: GaussianState, places: Tensor, dim: int) -> GaussianState:
    """Some tokens (-2) of all sequences, or some features (-1) of all tokens."""
    places = torch.as_tensor(places, device=state.mean.device)

    def pick(x: Tensor) -> Tensor:
        return x.index_select(dim, places)

    def pick_block(x: Tensor) -> Tensor:
        return x.index_select(1, places) if dim == -2 else x.index_select(-1, places).index_select(-2, places)

    return state.apply(pick(state.mean), LinearMap(pick, pick, pick_block, mixes=dim == -2))


@register(is_class("GPT2ForSequenceClassification"))
def gpt2_classifier(module: Any, state: GaussianState, walk: Walk, **inputs: Any) -> GaussianState:
    """A head on the last token that is no padding: logits ``(B, K)``."""
    ids, padding = state.mean, module.config.pad_token_id
    if padding is None and len(ids) > 1:
        raise ValueError("model: expected config.pad_token_id for more than one sequence, got None.")
    place: int | Tensor = ids.shape[1] - 1
    if padding is not None and not ids.is_floating_point():
        place = (torch.arange(ids.shape[1], device=ids.device) * (ids != padding)).argmax(-1)
    hidden = through_base(module, state, walk, "transformer", **inputs)
    return walk(module.score, select_token(hidden, place))


@register(is_class("GPT2ForTokenClassification"))
def gpt2_token_classifier(module: Any, state: GaussianState, walk: Walk, **inputs: Any) -> GaussianState:
    """A head on each token: logits ``(B, T, K)``."""
    return walk(module.classifier, walk(module.dropout, through_base(module, state, walk, "transformer", **inputs)))
