"""Rules for BERT and its relatives in Hugging Face's transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpseq.propagation.moments import GaussianState
from gpseq.propagation.pooling import select_token
from gpseq.propagation.registry import register
from gpseq.propagation.rules.attention import attend
from gpseq.propagation.rules.huggingface import (
    activate,
    additive,
    check_attention,
    check_inputs,
    find_part,
    is_class,
    model_mask,
    of_family,
    score_mask,
    through_base,
    through_blocks,
)
from gpseq.propagation.walk import Walk


@register(of_family("Attention"))
def bert_attention(
    module: Any, state: GaussianState, walk: Walk, attention_mask: Tensor | None = None, **inputs: Any
) -> GaussianState:
    """Attention beside its residual path, and the norm of their sum."""
    check_inputs(module, walk, inputs)
    inner, outer = module.self, module.output
    check_attention(inner, walk)
    mask = score_mask(inner, attention_mask, state.mean, causal=bool(getattr(inner, "is_decoder", False)))
    heads = find_part(inner, walk, "num_attention_heads")
    projections = [(part.weight, part.bias) for part in (inner.query, inner.key, inner.value)]

    def attention(x: GaussianState) -> GaussianState:
        out = attend(x, walk, projections, heads, mask, getattr(inner, "scaling", None), dropout=inner.dropout.p)
        return walk(outer.dropout, walk(outer.dense, out))

    return walk(outer.LayerNorm, state.branch(attention))


@register(of_family("Layer"))
def bert_layer(
    module: Any, state: GaussianState, walk: Walk, attention_mask: Tensor | None = None, **inputs: Any
) -> GaussianState:
    """Attention and a perceptron, with norms after their residual paths."""
    check_inputs(module, walk, inputs)

    def perceptron(x: GaussianState) -> GaussianState:
        hidden = activate(module.intermediate.intermediate_act_fn, walk(module.intermediate.dense, x), walk)
        return walk(module.output.dropout, walk(module.output.dense, hidden))

    state = bert_attention(module.attention, state, walk, attention_mask)
    return walk(module.output.LayerNorm, state.branch(perceptron))


@register(is_class("TransformerBlock"))
def distilbert_layer(
    module: Any, state: GaussianState, walk: Walk, attention_mask: Tensor | None = None, **inputs: Any
) -> GaussianState:
    """The same in DistilBERT."""
    check_inputs(module, walk, inputs)
    inner, ffn = module.attention, module.ffn
    check_attention(inner, walk)
    mask = None if attention_mask is None else additive(attention_mask, state.mean)
    projections = [(part.weight, part.bias) for part in (inner.q_lin, inner.k_lin, inner.v_lin)]

    def attention(x: GaussianState) -> GaussianState:
        return walk(inner.out_lin, attend(x, walk, projections, inner.n_heads, mask, dropout=inner.dropout.p))

    def perceptron(x: GaussianState) -> GaussianState:
        hidden = activate(ffn.activation, walk(ffn.lin1, x), walk)
        return walk(ffn.dropout, walk(ffn.lin2, hidden))

    state = walk(module.sa_layer_norm, state.branch(attention))
    return walk(module.output_layer_norm, state.branch(perceptron))


def embed_words(
    module: Any,
    state: GaussianState,
    walk: Walk,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> GaussianState:
    """Tables of words, kinds and positions, and the norm of their sum.

    Args:
        module: embeddings of BERT or a relative.
        state: ids ``(B, T)``, or tokens that are embedded, ``(B, T, D)``.
        walk: of the network.
        token_type_ids: ``(B, T)``.
        position_ids: ``(B, T)`` or ``(1, T)``.
    """
    embedded = state.mean.is_floating_point()
    if state.is_certain and walk.is_plain(module):
        inputs = {"inputs_embeds": state.mean, "input_ids": None} if embedded else {"input_ids": state.mean}
        given = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs.update({name: value for name, value in given.items() if value is not None})
        return GaussianState(module(**inputs))
    batch, length = state.mean.shape[:2]
    device = state.mean.device
    if position_ids is None:
        position_ids = torch.arange(length, device=device).unsqueeze(0)
        # RoBERTa counts tokens that are no padding, from the place of padding on.
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            kept = torch.ones_like(position_ids) if embedded else state.mean.ne(padding).long()
            position_ids = kept.cumsum(1) * kept + padding
    out = state if embedded else walk(module.word_embeddings, state)
    if hasattr(module, "token_type_embeddings"):
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, length, dtype=torch.long, device=device)
        out = out.plus(walk(module.token_type_embeddings, GaussianState(token_type_ids.expand(batch, length))))
    out = out.plus(walk(module.position_embeddings, GaussianState(position_ids.expand(batch, length))))
    return walk(module.dropout, walk(module.LayerNorm, out))


@register(of_family("Model"), is_class("DistilBertModel"))
def bert_model(
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
    state = embed_words(module.embeddings, state, walk, token_type_ids, position_ids)
    if hasattr(module, "embeddings_project"):
        state = walk(module.embeddings_project, state)
    causal = bool(getattr(module.config, "is_decoder", False))
    mask = model_mask(attention_mask, state.mean, causal)
    return through_blocks(state, walk, find_part(module, walk, "encoder.layer", "transformer.layer"), mask)


@register(of_family("ForSequenceClassification"))
def bert_classifier(module: Any, state: GaussianState, walk: Walk, **inputs: Any) -> GaussianState:
    """A head on the pooled first token: logits ``(B, K)``."""
    base = find_part(module, walk, module.base_model_prefix)
    state = through_base(module, state, walk, module.base_model_prefix, **inputs)
    if getattr(base, "pooler", None) is not None:
        return walk(module.classifier, walk(module.dropout, walk(base.pooler, state)))
    return walk(module.classifier, state)  # which takes the first token itself


@register(is_class("RobertaClassificationHead", "XLMRobertaClassificationHead", "CamembertClassificationHead"))
def roberta_head(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """The first token, through a perceptron with tanh."""
    hidden = walk(module.dense, walk(module.dropout, select_token(state, 0)))
    return walk(module.out_proj, walk(module.dropout, walk.elementwise(hidden, "tanh")))


@register(is_class("ElectraClassificationHead"))
def electra_head(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """The same with the activation that ELECTRA has."""
    hidden = walk(module.dense, walk(module.dropout, select_token(state, 0)))
    return walk(module.out_proj, walk(module.dropout, activate(module.activation, hidden, walk)))


@register(is_class("DistilBertForSequenceClassification"))
def distilbert_classifier(module: Any, state: GaussianState, walk: Walk, **inputs: Any) -> GaussianState:
    """A perceptron on the first token: logits ``(B, K)``."""
    state = select_token(through_base(module, state, walk, "distilbert", **inputs), 0)
    hidden = walk.elementwise(walk(module.pre_classifier, state), "relu")
    return walk(module.classifier, walk(module.dropout, hidden))


@register(of_family("ForTokenClassification"), is_class("DistilBertForTokenClassification"))
def token_classifier(module: Any, state: GaussianState, walk: Walk, **inputs: Any) -> GaussianState:
    """A head on each token: logits ``(B, T, K)``."""
    state = through_base(module, state, walk, module.base_model_prefix, **inputs)
    return walk(module.classifier, walk(module.dropout, state))
