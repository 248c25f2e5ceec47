"""Rules for the vision transformers of timm.

Modules are known by the names of their classes and of their parts; timm itself is not imported. A block or an attention
with a part or a parameter that is not known here has no rule: many of timm's models have blocks of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.propagation.moments import GaussianState, LinearMap
from gpseq.propagation.pooling import concatenate, mean_tokens, select_token
from gpseq.propagation.registry import register
from gpseq.propagation.rules.attention import Between, attend
from gpseq.propagation.rules.basic import is_linear
from gpseq.propagation.rules.norms import affine, layer_norm, norm_map
from gpseq.propagation.walk import Walk

_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2", "drop_path"}
_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
_POOLS = ("", "token", "avg")


def _is_class(*names: str) -> Callable[[nn.Module], bool]:
    def predicate(module: nn.Module) -> bool:
        kind = type(module)
        return kind.__name__ in names and kind.__module__.partition(".")[0] == "timm"

    return predicate


def _has_only(module: nn.Module, parts: Iterable[str]) -> bool:
    """Whether a module's own parts are all known, and it has no parameters of its own."""
    own = dict(module.named_parameters(recurse=False))
    return not own and all(name in parts for name, _ in module.named_children())


def is_attention(module: nn.Module) -> bool:
    """Whether a module is timm's plain attention, with one matrix for queries, keys and values."""
    found = _is_class("Attention")(module) and _has_only(module, _ATTENTION)
    return found and is_linear(getattr(module, "qkv", module)) and hasattr(module, "proj")


def is_block(module: nn.Module) -> bool:
    """Whether a module is a block of timm's plain vision transformer, with norms before its branches."""
    return _is_class("Block")(module) and _has_only(module, _BLOCK) and is_attention(getattr(module, "attn", module))


# timm's norm is that of torch with a forward of its own.
register(_is_class("LayerNorm", "LayerNormFp32"))(layer_norm)


@register(_is_class("LayerScale"))
def layer_scale(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """A factor for each feature."""
    return affine(state, walk, module.gamma, None)


@register(_is_class("DropPath"))
def drop_path(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Nothing in eval mode."""
    if module.training and module.drop_prob:
        raise ValueError(f"model: expected it in eval mode, but {walk.path(module)} (DropPath) trains.")
    return state


@register(_is_class("Mlp"))
def mlp(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """A perceptron with one hidden layer."""
    for name in ("fc1", "act", "drop1", "norm", "fc2", "drop2"):
        part = getattr(module, name, None)
        state = state if part is None else walk(part, state)
    return state


@register(is_attention)
def attention(
    module: Any, state: GaussianState, walk: Walk, attn_mask: Tensor | None = None, is_causal: bool = False
) -> GaussianState:
    """Self-attention with packed weights, masks where True is attend, and norms of queries and keys."""
    length = state.mean.shape[1]
    mask = None
    if is_causal:  # then timm does not look at the other one
        attn_mask = torch.ones(length, length, dtype=torch.bool, device=state.mean.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = torch.zeros(attn_mask.shape, dtype=state.mean.dtype, device=state.mean.device)
        mask = mask.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        mask = attn_mask.to(state.mean)
    projections = [(module.qkv.weight, module.qkv.bias)]
    rate = getattr(getattr(module, "attn_drop", None), "p", 0.0)
    out = attend(state, walk, projections, module.num_heads, mask, module.scale, False, _norms(module, walk), rate)
    for name in ("norm", "proj", "proj_drop"):
        part = getattr(module, name, None)
        out = out if part is None else walk(part, out)
    return out


def _norms(module: Any, walk: Walk) -> Between | None:
    """Norms of each head's queries and keys."""
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
        return None

    def between(packed: Tensor) -> tuple[Tensor, LinearMap]:
        parts = [part.unflatten(-1, (module.num_heads, -1)) for part in packed.chunk(3, -1)]
        means, maps, gains = [], [], []
        for norm, part in zip(norms, parts[:2], strict=True):
            mean, linear, gain = _norm(norm, part, walk)
            means.append(mean.flatten(-2))
            maps.append(linear)
            gains.append(gain)

        def split(x: Tensor) -> list[Tensor]:
            return [part.unflatten(-1, (module.num_heads, -1)) for part in x.chunk(3, -1)]

        def push(columns: Tensor) -> Tensor:
            query, key, value = split(columns)
            query, key = maps[0].push(query) * gains[0], maps[1].push(key) * gains[1]
            return torch.cat([query.flatten(-2), key.flatten(-2), value.flatten(-2)], -1)

        def squared(variance: Tensor) -> Tensor:
            query, key, value = split(variance)
            query = maps[0].squared(query) * gains[0].square()
            key = maps[1].squared(key) * gains[1].square()
            return torch.cat([query.flatten(-2), key.flatten(-2), value.flatten(-2)], -1)

        return torch.cat([*means, parts[2].flatten(-2)], -1), LinearMap(push, squared, mixes=True)

    return between


def _norm(norm: Any, x: Tensor, walk: Walk) -> tuple[Tensor, LinearMap, Tensor]:
    """A norm over the last dimension: its value, its tangent without weights, and the weights.

    Raises:
        NotImplementedError: it is another norm, or an uncertain one.
    """
    one = x.new_ones(())
    if norm is None or isinstance(norm, nn.Identity):
        return x, LinearMap(lambda u: u, lambda v: v), one
    name = type(norm).__name__
    centred = isinstance(norm, nn.LayerNorm)
    if not (centred or name.lower().startswith("rmsnorm")) or walk.is_uncertain(norm):
        what = "uncertain weights" if walk.is_uncertain(norm) else f"a {name}"
        raise NotImplementedError(
            f"model: expected {walk.path(norm)}, between queries and keys, to be a LayerNorm or an RMSNorm without "
            f"uncertainty, got {what}."
        )
    eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
    shifted = x - x.mean(-1, keepdim=True) if centred else x
    inverse = (shifted.square().mean(-1, keepdim=True) + eps).rsqrt()
    frozen = walk.options.layer_norm == "frozen"
    weight = getattr(norm, "weight", None)
    linear = norm_map(shifted * inverse, inverse, (-1,), centred, frozen)
    return norm(x), linear, one if weight is None else weight


@register(is_block)
def block(
    module: Any, state: GaussianState, walk: Walk, attn_mask: Tensor | None = None, is_causal: bool = False
) -> GaussianState:
    """Attention and a perceptron, with norms before them and a scale for each feature behind."""
    inputs: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    if is_causal:
        inputs["is_causal"] = True

    def parts(x: GaussianState, *names: str) -> GaussianState:
        for name in names:
            part = getattr(module, name, None)
            x = x if part is None else walk(part, x)
        return x

    state = state.branch(lambda x: parts(walk(module.attn, walk(module.norm1, x), **inputs), "ls1", "drop_path1"))
    last = "drop_path2" if hasattr(module, "drop_path2") else "drop_path"
    return state.branch(lambda x: parts(x, "norm2", "mlp", "ls2", last))


@register(_is_class("PatchEmbed"))
def patch_embed(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """A convolution, its positions as tokens."""
    if not module.flatten:
        raise NotImplementedError(f"model: expected {walk.path(module)} to put patches one after the other.")
    state = walk(module.proj, state).move(lambda x: x.flatten(2).transpose(1, 2))
    return walk(module.norm, state)


def _embed(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Patches behind the tokens that are learnt, and a table of positions."""
    tokens = [part for part in (module.cls_token, getattr(module, "reg_token", None)) if part is not None]
    learnt = [part for part in (*tokens, module.pos_embed) if part is not None]
    plain = walk.is_plain(module.patch_embed) and walk.is_plain(module.pos_drop)
    if state.is_certain and plain and all(walk.posterior.name(part) is None for part in learnt):
        return GaussianState(module._pos_embed(module.patch_embed(state.mean)))
    if getattr(module, "dynamic_img_size", False):
        raise NotImplementedError("model: expected images of one size, with uncertain patches or positions.")
    state = walk(module.patch_embed, state)
    batch, device = len(state.mean), state.mean.device
    first = [
        walk.entries(part, torch.arange(part.numel(), device=device).view(part.shape).expand(batch, -1, -1))
        for part in tokens
    ]
    # Some have no positions for the tokens that are learnt.
    early = module.pos_embed is not None and bool(getattr(module, "no_embed_class", False))
    if early:
        state = walk.add_parameter(state, module.pos_embed, shape=state.event)
    state = concatenate([*first, state])
    if module.pos_embed is not None and not early:
        state = walk.add_parameter(state, module.pos_embed, shape=state.event)
    return walk(module.pos_drop, state)


@register(_is_class("VisionTransformer"))
def vision_transformer(
    module: Any, state: GaussianState, walk: Walk, attn_mask: Tensor | None = None, is_causal: bool = False
) -> GaussianState:
    """Patches, blocks and a head: logits ``(B, K)`` of pixels ``(B, C, H, W)``; tokens ``(B, T, K)`` without a pool."""
    pool = module.global_pool
    if pool not in _POOLS or getattr(module, "attn_pool", None) is not None:
        raise NotImplementedError(f"model: expected global_pool to be one of {_POOLS}, got {pool!r}.")
    state = _embed(module, state, walk)
    for name in ("patch_drop", "norm_pre"):
        part = getattr(module, name, None)
        state = state if part is None else walk(part, state)
    inputs: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    if is_causal:
        inputs["is_causal"] = True
    for part in module.blocks:
        state = walk(part, state, **inputs)
    state = walk(module.norm, state)
    if pool == "token":
        state = select_token(state, 0)
    elif pool == "avg":
        first = 0 if getattr(module, "pool_include_prefix", False) else module.num_prefix_tokens
        counts = torch.arange(state.mean.shape[1], device=state.mean.device) >= first
        state = mean_tokens(state, counts.expand(state.mean.shape[:2]))
    for name in ("fc_norm", "head_drop", "head"):
        part = getattr(module, name, None)
        state = state if part is None else walk(part, state)
    return state
