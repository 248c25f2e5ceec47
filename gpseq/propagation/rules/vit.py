"""Rules for ViT in Hugging Face's transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpseq.propagation.moments import GaussianState
from gpseq.propagation.pooling import concatenate, select_token
from gpseq.propagation.registry import register
from gpseq.propagation.rules.attention import attend
from gpseq.propagation.rules.huggingface import (
    activate,
    check_attention,
    check_inputs,
    find_part,
    is_class,
    model_mask,
    score_mask,
    through_base,
    through_blocks,
)
from gpseq.propagation.walk import Walk


@register(is_class("ViTAttention"))
def vit_attention(
    module: Any, state: GaussianState, walk: Walk, attention_mask: Tensor | None = None, **inputs: Any
) -> GaussianState:
    """Attention and the matrix behind it."""
    check_inputs(module, walk, inputs)
    inner = getattr(module, "attention", module)  # one inside the other in releases 4
    check_attention(inner, walk)
    mask = score_mask(inner, attention_mask, state.mean)
    names = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    parts = [find_part(inner, walk, *name) for name in names]
    projections = [(part.weight, part.bias) for part in parts]
    out_proj = find_part(module, walk, "o_proj", "output.dense")
    scale, rate = getattr(inner, "scaling", None), getattr(inner, "attention_dropout", 0.0)
    out = walk(out_proj, attend(state, walk, projections, inner.num_attention_heads, mask, scale, dropout=rate))
    dropout = getattr(getattr(module, "output", None), "dropout", None)  # beside the matrix in releases 4
    return out if dropout is None else walk(dropout, out)


@register(is_class("ViTLayer"))
def vit_layer(
    module: Any, state: GaussianState, walk: Walk, attention_mask: Tensor | None = None, **inputs: Any
) -> GaussianState:
    """Attention and a perceptron, with norms before them."""
    check_inputs(module, walk, inputs)
    first = find_part(module, walk, "mlp.fc1", "intermediate.dense")
    second = find_part(module, walk, "mlp.fc2", "output.dense")
    function = find_part(module, walk, "mlp.activation_fn", "intermediate.intermediate_act_fn")
    # One dropout for both; in releases 4 one each, beside the matrices.
    shared = getattr(module, "dropout", None) or nn.Identity()
    own = getattr(getattr(module, "output", None), "dropout", None) or shared

    def attention(x: GaussianState) -> GaussianState:
        return walk(shared, vit_attention(module.attention, walk(module.layernorm_before, x), walk, attention_mask))

    def perceptron(x: GaussianState) -> GaussianState:
        hidden = activate(function, walk(first, walk(module.layernorm_after, x)), walk)
        return walk(own, walk(second, hidden))

    return state.branch(attention).branch(perceptron)


@register(is_class("ViTEmbeddings"))
def vit_embeddings(
    module: Any,
    state: GaussianState,
    walk: Walk,
    bool_masked_pos: Tensor | None = None,
    interpolate_pos_encoding: bool | None = None,
) -> GaussianState:
    """Patches behind a class token, and a table of positions."""
    if bool_masked_pos is not None or interpolate_pos_encoding:
        return walk.unknown(
            module, state, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=bool(interpolate_pos_encoding)
        )
    patches = walk(module.patch_embeddings.projection, state).move(lambda x: x.flatten(2).transpose(1, 2))
    width = module.cls_token.shape[-1]
    places = torch.arange(width, device=state.mean.device).expand(len(state.mean), 1, width)
    tokens = concatenate([walk.entries(module.cls_token, places), patches])
    return walk(module.dropout, walk.add_parameter(tokens, module.position_embeddings, shape=tokens.event))


@register(is_class("ViTModel"))
def vit_model(
    module: Any,
    state: GaussianState,
    walk: Walk,
    attention_mask: Tensor | None = None,
    bool_masked_pos: Tensor | None = None,
    interpolate_pos_encoding: bool | None = None,
    **inputs: Any,
) -> GaussianState:
    """Hidden states of the class token and all patches, ``(B, 1 + P, D)``, of pixels ``(B, C, H, W)``."""
    check_inputs(module, walk, inputs)
    given = {"bool_masked_pos": bool_masked_pos, "interpolate_pos_encoding": interpolate_pos_encoding}
    state = walk(module.embeddings, state, **{name: value for name, value in given.items() if value is not None})
    mask = model_mask(attention_mask, state.mean)
    state = through_blocks(state, walk, find_part(module, walk, "layers", "encoder.layer", "encoder.layers"), mask)
    return walk(module.layernorm, state)


@register(is_class("ViTForImageClassification"))
def vit_classifier(module: Any, state: GaussianState, walk: Walk, **inputs: Any) -> GaussianState:
    """A head on the class token: logits ``(B, K)``."""
    return walk(module.classifier, select_token(through_base(module, state, walk, "vit", **inputs), 0))
