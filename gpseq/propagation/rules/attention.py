"""The rule of multi-head attention, from its own weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.propagation.attention import Heads, heads_map, separable
from gpseq.propagation.laws import Law
from gpseq.propagation.moments import Blocks, Diagonal, GaussianState, LinearMap
from gpseq.propagation.noise import augment
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk

#: What happens to queries, keys and values side by side, ``(B, T, 3 H D)``, before they meet: where they go, and the
#: tangent there, which leaves values alone.
Between = Callable[[Tensor], tuple[Tensor, LinearMap]]


def attend(
    state: GaussianState,
    walk: Walk,
    projections: Sequence[tuple[Tensor, Tensor | None]],
    num_heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    transposed: bool = False,
    between: Between | None = None,
    dropout: float = 0.0,
) -> GaussianState:
    r"""Self-attention without its output projection.

    With every form but the marginal ones, noise of the weights of queries, keys and values is shared by all tokens and
    goes through the attention's tangent. Marginal forms take the noise of value weights at the averaged input
    :math:`\sum_s A_{ts} a_s`, which is exact for certain tokens, and that of key weights as a product of rows and
    columns.

    Args:
        state: ``(B, T, E)``.
        walk: of the network.
        projections: weights and biases of queries, keys and values, or one of all three, packed.
        num_heads: H.
        mask: added to the scores, broadcastable to ``(B, H, T, T)``.
        scale: of the scores; ``None`` is one by the root of a head's width.
        transposed: weights are ``(E, 3 E)``.
        between: norms of queries and keys, or ``None``. Marginal forms then take the noise of key weights to be
            independent between tokens.
        dropout: probability with which weights of attention are dropped, where that is a source of variance.

    Returns:
        ``(B, T, H D)``.
    """
    parameters = [parameter for pair in projections for parameter in pair]
    certain = state.is_certain and all(walk.posterior.name(parameter) is None for parameter in parameters)
    if certain or walk.options.form in ("full", "lowrank"):
        packed = walk.linears(state, projections, transposed)
        if between is not None:
            packed = packed.apply(*between(packed.mean))
        heads = _heads(packed.mean, num_heads, mask, scale)
        mean = heads.output.transpose(1, 2).flatten(2)
        out = packed.apply(mean, heads_map(heads, frozen=walk.options.scores == "frozen"))
    else:
        out, heads = _marginal(state, walk, projections, num_heads, mask, scale, transposed, between)
    if walk.options.dropout == "variance" and dropout > 0:
        dropped = heads.weights.square() @ heads.value.square() * (dropout / (1 - dropout))
        out = walk.independent(out, dropped.transpose(1, 2).flatten(2))
    return out


def _heads(packed: Tensor, num_heads: int, mask: Tensor | None, scale: float | None) -> Heads:
    query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
    return Heads.of(query, key, value, mask, scale)


def _marginal(
    state: GaussianState,
    walk: Walk,
    projections: Sequence[tuple[Tensor, Tensor | None]],
    num_heads: int,
    mask: Tensor | None,
    scale: float | None,
    transposed: bool,
    between: Between | None,
) -> tuple[GaussianState, Heads]:
    """Tokens that are independent but for the weights that they share."""
    matrices = [walk.matrix(weight, transposed) for weight, _ in projections]
    biases = [walk.mean(bias) for _, bias in projections]
    packed = torch.cat([nn.functional.linear(state.mean, w, b) for w, b in zip(matrices, biases, strict=True)], -1)
    linear: LinearMap | None = None
    if between is not None:
        packed, linear = between(packed)
    heads = _heads(packed, num_heads, mask, scale)
    matrix = torch.cat(matrices)
    width = len(matrix) // 3
    laws = _parts([walk.laws(w, b, state.mean, transposed) for w, b in projections], width)
    mean = heads.output.transpose(1, 2).flatten(2)
    if isinstance(state.covariance, Blocks) or walk.options.form == "blockdiag":
        found = _block_values(state, heads, matrix[2 * width :], laws[2])
    else:
        found = _values(state, walk, heads, matrix[2 * width :], laws[2])
    variance = None if state.covariance is None else state.variance
    scores: Tensor | None = None
    if walk.options.scores != "frozen":
        scores = _scores(state.mean, variance, heads, matrix, laws, linear)
    if walk.options.form == "blockdiag":
        covariance: Blocks | Diagonal = Blocks(found if scores is None else found + torch.diag_embed(scores))
    else:
        covariance = Diagonal(found if scores is None else found + scores)
    return GaussianState(mean, covariance), heads


def _parts(laws: Sequence[Sequence[tuple[Law, str]]], width: int) -> list[list[tuple[Law, str]]]:
    """Laws of queries, keys and values."""
    if len(laws) == 3:
        return [list(part) for part in laws]
    return [[(law.rows(i * width, (i + 1) * width), part) for law, part in laws[0]] for i in range(3)]


def _join(x: Tensor) -> Tensor:
    """``(B, H, T, D)`` to ``(B, T, H D)``."""
    return x.transpose(1, 2).flatten(2)


def _averaged(weights: Tensor, tokens: Tensor) -> Tensor:
    """Weighted sums of tokens ``(B, T, E)`` for each head, ``(B, H, T, E)``, without a copy of the tokens for each."""
    return (weights.flatten(1, 2) @ tokens).unflatten(1, weights.shape[1:3])


def _values(state: GaussianState, walk: Walk, heads: Heads, matrix: Tensor, laws: Sequence[tuple[Law, str]]) -> Tensor:
    """Variances of the output that come from values, ``(B, T, H D)``."""
    weights, number = heads.weights, heads.weights.shape[1]
    width = len(matrix) // number

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (number, -1)).transpose(1, 2)

    # Independent between tokens: what comes with them, and what the weights' noise makes of that.
    apart = None if state.covariance is None else state.variance @ matrix.square().mT
    shared: list[Tensor] = []
    for law, part in laws:
        mean, variance = augment(state, part)
        if walk.options.values == "independent":
            noise = law.variance(mean, variance)
            apart = noise if apart is None else apart + noise
            continue
        if variance is not None and walk.options.products:
            assert apart is not None
            apart = apart + law.variance(torch.zeros_like(mean), variance)
        mean = _averaged(weights, mean)
        rows = [law.rows(h * width, (h + 1) * width).variance(mean[:, h]) for h in range(number)]
        shared.append(torch.cat(rows, -1))
    total = torch.zeros_like(_join(heads.output)) if apart is None else _join(weights.square() @ split(apart))
    return sum(shared, total)


def _block_values(state: GaussianState, heads: Heads, matrix: Tensor, laws: Sequence[tuple[Law, str]]) -> Tensor:
    """Covariances of each token's output that come from values, ``(B, T, H D, H D)``.

    Between heads they are kept for what comes with the tokens, and left out for the noise of the weights.
    """
    weights, number = heads.weights, heads.weights.shape[1]
    width = len(matrix) // number
    total = heads.output.new_zeros(*_join(heads.output).shape, len(matrix))
    blocks = state.covariance.entries if isinstance(state.covariance, Blocks) else None
    if blocks is not None:
        value = (matrix @ blocks @ matrix.mT).unflatten(-1, (number, width)).unflatten(-3, (number, width))
        both = torch.einsum("bhts,bgts,bshigj->bthigj", weights, weights, value)
        total = total + both.flatten(4, 5).flatten(2, 3)
    for law, part in laws:
        mean = _averaged(weights, augment(state, part)[0])
        spread = None
        if blocks is not None and part != "bias":
            spread = torch.einsum("bhts,bsij->bhtij", weights.square(), blocks)
            if part == "both":
                spread = nn.functional.pad(spread, (0, 1, 0, 1))
        for h in range(number):
            rows = slice(h * width, (h + 1) * width)
            noise = law.rows(rows.start, rows.stop).blocks(mean[:, h], None if spread is None else spread[:, h])
            total[..., rows, rows] = total[..., rows, rows] + noise
    return total


def _scores(
    tokens: Tensor,
    variance: Tensor | None,
    heads: Heads,
    matrix: Tensor,
    laws: Sequence[Sequence[tuple[Law, str]]],
    linear: LinearMap | None,
) -> Tensor:
    """Variances of the output that come from queries and keys, ``(B, T, H D)``."""
    number = heads.weights.shape[1]
    width = len(matrix) // 3
    square = matrix.square()
    total = torch.zeros_like(heads.output)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (number, -1)).transpose(1, 2)

    query = torch.zeros_like(tokens[..., :1]).expand(*tokens.shape[:-1], width)
    key = None
    if variance is not None:
        query = query + variance @ square[:width].mT
        key = variance @ square[width : 2 * width].mT
    one = tokens.new_ones(*tokens.shape[:-1], 1)
    inputs = {"weight": tokens, "bias": one, "both": torch.cat([tokens, one], -1)}
    for law, part in laws[0]:
        spread = None if variance is None else nn.functional.pad(variance, (0, 1)) if part == "both" else variance
        query = query + law.variance(inputs[part], None if part == "bias" else spread)
    for law, part in laws[1]:
        spread = None if variance is None else nn.functional.pad(variance, (0, 1)) if part == "both" else variance
        if linear is not None:
            noise = law.variance(inputs[part], None if part == "bias" else spread)
            key = noise if key is None else key + noise
            continue
        if part == "bias":
            continue  # one shift for all keys, which the softmax does not see
        rows, columns = separable(law, heads.query.shape[-1], tokens)
        total = total + heads.from_key_weights(rows, columns, inputs[part])
        if spread is not None:  # what the noise makes of the tokens' own, independent between tokens
            product = law.variance(torch.zeros_like(inputs[part]), spread)
            key = product if key is None else key + product
    some = variance is not None or bool(laws[0])
    if linear is not None:
        packed = torch.cat([query, torch.zeros_like(query) if key is None else key, torch.zeros_like(query)], -1)
        query, keys, _ = linear.squared(packed).chunk(3, -1)
        key = None if key is None else keys
    if some:
        total = total + heads.from_query(split(query))
    if key is not None:
        total = total + heads.from_key(split(key))
    return _join(total)


@register(nn.MultiheadAttention)
def multihead_attention(
    module: Any,
    state: GaussianState,
    walk: Walk,
    key: GaussianState | None = None,
    value: GaussianState | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = False,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> GaussianState:
    """Self-attention, whose projections are packed then, and masks as torch has them."""
    if any(other is not None and other is not state for other in (key, value)):
        raise NotImplementedError(
            f"model: attention between two sequences, {walk.path(module)}, has no rule; take on_unknown='linearise' "
            "for the layer that it is in."
        )
    if module.bias_k is not None or module.add_zero_attn:
        raise NotImplementedError(f"model: {walk.path(module)} adds keys of its own, for which there is no rule.")
    if state.mean.dim() != 3:
        raise ValueError(f"x: expected tokens (B, T, E) for {walk.path(module)}, got {tuple(state.mean.shape)}.")
    batch, length = state.mean.shape[:2]
    mask = additive_mask(state.mean, module.num_heads, key_padding_mask, attn_mask, is_causal, batch, length)
    out = attend(
        state, walk, [(module.in_proj_weight, module.in_proj_bias)], module.num_heads, mask, dropout=module.dropout
    )
    return walk(module.out_proj, out)


def additive_mask(
    like: Tensor,
    num_heads: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    batch: int,
    length: int,
) -> Tensor | None:
    """Masks of torch's attention as one that is added to scores ``(B, H, T, T)``; ``None`` if there is none."""
    total: Tensor | None = None
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)
    if attn_mask is not None:
        mask = _additive(attn_mask, like)
        if mask.dim() == 3:
            mask = mask.unflatten(0, (batch, num_heads))
        total = mask
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, like)[:, None, None, :]
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -torch.inf)
    return mask.to(like)
