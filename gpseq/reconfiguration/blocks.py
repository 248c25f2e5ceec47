r"""What a block of a transformer is made of: attention beside a residual path, then a perceptron beside another.

With ``points="attention"`` a path is cut in the middle of each block: a transition is the perceptron of one block and
the attention of the next. So a kind of block says where that middle is, and how either half is computed from the
block's own modules, in plain code: what a hook sees there is what ``attend`` gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.reconfiguration.masks import Masks, additive_to_keys, ignored, only_hides

#: Arguments of blocks that hold the keys and values of earlier tokens.
CACHES = ("past_key_values", "past_key_value", "layer_past")
#: Masks that blocks of any kind may be called with.
MASKS = (
    *("attention_mask", "attn_mask", "src_mask", "tgt_mask", "mask"),
    *("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask"),
)


@dataclass(frozen=True, eq=False)
class Call:
    """What a block was called with, beside the tokens.

    Attributes:
        args: positional.
        kwargs: by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    @classmethod
    def split(cls, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Call]:
        """Tokens, which come first in a block's forward, and all else.

        Args:
            block: that is called, or what stands in its place.
            args: positional.
            kwargs: by name.

        Returns:
            Tokens, ``None`` where there are none, and the rest of the call.
        """
        if args:
            return args[0], cls(tuple(args[1:]), dict(kwargs))
        others = dict(kwargs)
        return others.pop(next(iter(_arguments(block)), ""), None), cls((), others)

    def named(self, block: nn.Module) -> dict[str, Any]:
        """By the names of the block's forward; what is ``None`` is left out.

        Args:
            block: that was called, or what stands in its place.

        Raises:
            TypeError: the arguments are not those of the block.
        """
        bound = inspect.signature(_class_of(block).forward).bind(block, None, *self.args, **(self.kwargs or {}))
        found: dict[str, Any] = {}
        for number, (name, value) in enumerate(bound.arguments.items()):
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found.update(value)
            elif number > 1:
                found[name] = value
        return {name: value for name, value in found.items() if value is not None}

    def without_cache(self, block: nn.Module) -> Call:
        """The same without keys and values of earlier tokens, which a second call would add to.

        Args:
            block: that was called.
        """
        names = _arguments(block)[1:]
        args = tuple(None if name in CACHES else value for name, value in zip_longest(names, self.args))
        kwargs = {name: value for name, value in (self.kwargs or {}).items() if name not in CACHES}
        return Call(args[: len(self.args)], kwargs)


def _class_of(block: nn.Module) -> Any:
    """The class of a block, or of the blocks that a module stands in the place of."""
    return getattr(block, "class_of_blocks", type(block))


def _arguments(block: nn.Module) -> list[str]:
    """Names of the arguments of a block's forward."""
    return list(inspect.signature(_class_of(block).forward).parameters)[1:]


def _batch_first(block: nn.Module) -> int:
    return 0


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one kind.

    Attributes:
        name: for messages.
        matches: whether a module is such a block.
        point: of a block: the name of one of its modules, and whether its ``"input"`` or ``"output"`` is the state
            after attention.
        attend: the first half, from the block, the state before it and its call: attention beside the residual path.
        finish: the second half, from the block and that state: the perceptron beside another.
        masks: what a call says about masks.
        tail: names of those of its modules, and other attributes, that ``finish`` needs.
        parts: of a block, the matrices by name, to start a kernel from: ``"in"``, queries before keys before values,
            ``(3 D, D)``, ``"out"``, ``(D, D)``, ``"up"``, ``(F, D)``, ``"down"``, ``(D, F)``, and with ``".bias"``
            their offsets.
        batch_dim: of a block: where its tokens have the batch, 0 or 1.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    point: Callable[[nn.Module], tuple[str, str]]
    attend: Callable[[Any, Tensor, Call], Tensor]
    finish: Callable[[Any, Tensor], Tensor]
    masks: Callable[[Any, Call], Masks]
    tail: Callable[[nn.Module], tuple[str, ...]]
    parts: Callable[[Any], dict[str, Tensor]] | None = None
    batch_dim: Callable[[Any], int] = _batch_first

    def __reduce__(self) -> tuple[Callable[[str], BlockKind], tuple[str]]:
        return _named_kind, (self.name,)  # functions may be closures; a file keeps the name


def _named_kind(name: str) -> BlockKind:
    if name not in _KINDS:
        raise LookupError(f"name: expected a kind of block that is registered, of {', '.join(_KINDS)}, got {name!r}.")
    return _KINDS[name]


def register_block(kind: BlockKind) -> None:
    """Teach reconfiguration another kind of block; one of the same name is replaced, and later ones come first.

    Args:
        kind: how its halves are found.
    """
    _KINDS.pop(kind.name, None)
    _KINDS[kind.name] = kind


def find_kind(module: nn.Module) -> BlockKind | None:
    """The kind of a block, or ``None``.

    Args:
        module: any.

    Example:
        >>> find_kind(nn.TransformerEncoderLayer(8, 2)).name
        'torch'
    """
    return next((kind for kind in reversed(_KINDS.values()) if kind.matches(module)), None)


def known_kinds() -> tuple[str, ...]:
    """Names of all kinds."""
    return tuple(_KINDS)


def masks_by_name(block: nn.Module, call: Call) -> Masks:
    """Masks of a block of any kind, from arguments with the names that torch, transformers and timm use.

    Args:
        block: that was called.
        call: with what.

    Raises:
        NotImplementedError: it has a mask of another name, or a second sequence that it attends to.
        ValueError: a mask has a shape that none of them gives.
    """
    named = call.named(block)
    if other := sorted(set(named) & {"memory", "encoder_hidden_states"}):
        raise NotImplementedError(
            f"teacher: expected blocks that see their own tokens only at {_class_of(block).__name__}, got {other[0]}, "
            "which a kernel would not see; keep such blocks with first_block, or give another stack."
        )
    if unknown := sorted(name for name in named if name.endswith("mask") and name not in MASKS):
        raise NotImplementedError(
            f"teacher: expected masks of the names {', '.join(MASKS)} at {_class_of(block).__name__}, got "
            f"{', '.join(unknown)}; teach gpseq.reconfiguration.register_block what they say."
        )
    if "attention_mask" in named:
        return _of_transformers(named["attention_mask"], _is_causal(block))
    if "attn_mask" in named:
        return _of_timm(named["attn_mask"], bool(named.get("is_causal", False)))
    masks = _of_torch(block, named)
    return replace(masks, causal=True) if masks.pairs is None and _is_causal(block) else masks


def _is_causal(block: nn.Module) -> bool:
    """Whether attention of a block hides later tokens without being told, as its attribute says in transformers."""
    return any(getattr(part, "is_causal", False) is True for part in block.modules())


# --- torch ------------------------------------------------------------------------------------------------------------


def _torch_attend(block: Any, x: Tensor, call: Call) -> Tensor:
    named = call.named(block)

    def attention(n: Tensor) -> Tensor:
        out = block.self_attn(
            n,
            n,
            n,
            attn_mask=named.get("src_mask"),
            key_padding_mask=named.get("src_key_padding_mask"),
            need_weights=False,
            is_causal=bool(named.get("is_causal", False)),
        )[0]
        return block.dropout1(out)

    if block.norm_first:
        return x + attention(block.norm1(x))
    return block.norm1(x + attention(x))


def _torch_finish(block: Any, x: Tensor) -> Tensor:
    def perceptron(n: Tensor) -> Tensor:
        return block.dropout2(block.linear2(block.dropout(block.activation(block.linear1(n)))))

    if block.norm_first:
        return x + perceptron(block.norm2(x))
    return block.norm2(x + perceptron(x))


def _torch_point(block: Any) -> tuple[str, str]:
    return ("norm2", "input") if block.norm_first else ("norm1", "output")


def _torch_masks(block: Any, call: Call) -> Masks:
    return _of_torch(block, call.named(block))


def _of_torch(block: Any, named: Mapping[str, Any]) -> Masks:
    pairs = _first(named, "src_mask", "tgt_mask", "mask")
    keys = _first(named, "src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
    if pairs is not None and pairs.dim() == 3:
        heads = getattr(getattr(block, "self_attn", None), "num_heads", 1)
        pairs = pairs.unflatten(0, (-1, heads))
    if keys is not None and not only_hides(keys):
        added = keys[:, None, None, :].expand(-1, 1, keys.shape[-1], -1)
        if pairs is not None and pairs.dtype == torch.bool:
            pairs = torch.zeros_like(pairs, dtype=keys.dtype).masked_fill(pairs, float("-inf"))
        pairs, keys = added if pairs is None else pairs + added, None
    return Masks(pairs, None if keys is None else ignored(keys), bool(named.get("is_causal", False)))


def _first(named: Mapping[str, Any], *names: str) -> Any:
    """The first of some arguments that was given."""
    return next((named[name] for name in names if name in named), None)


def _torch_parts(block: Any) -> dict[str, Tensor]:
    attention = block.self_attn
    if getattr(attention, "in_proj_weight", None) is None:
        return {}
    found = {"in": attention.in_proj_weight, "in.bias": attention.in_proj_bias}
    return _given(found | _linears(out=attention.out_proj, up=block.linear1, down=block.linear2))


def _torch_batch_dim(block: Any) -> int:
    return 0 if block.self_attn.batch_first else 1


def _torch_tail(block: Any) -> tuple[str, ...]:
    return ("norm_first", "norm2", "linear1", "dropout", "linear2", "dropout2", "activation")


def _is_torch(module: nn.Module) -> bool:
    return isinstance(module, nn.TransformerEncoderLayer)


# --- transformers -----------------------------------------------------------------------------------------------------


def _of_transformers(mask: Tensor | None, causal: bool = False) -> Masks:
    """From ``(B, 1, T, T)``: bools of keys that are seen, or floats that are added; it says all, if it is there."""
    if mask is None:
        return Masks(causal=causal)
    if not isinstance(mask, Tensor):
        raise NotImplementedError(f"attention_mask: expected a tensor, got {type(mask).__name__}.")
    if mask.dim() == 2 and not mask.is_floating_point():  # (B, T), 1 for what is seen
        return Masks(keys=mask == 0, causal=causal)
    if mask.dim() != 4:
        raise ValueError(f"attention_mask: expected (B, 1, T, T) in a block, got shape {tuple(mask.shape)}.")
    return Masks(*additive_to_keys(mask, seen=True))


def _mask_alone(block: nn.Module, call: Call) -> dict[str, Any]:
    """The mask of a call; what else transformers hand to blocks changes nothing here, or is refused."""
    named = call.named(block)
    for name in ("encoder_hidden_states", "head_mask"):
        if name in named:
            raise NotImplementedError(f"{name}: expected none in a {type(block).__name__}, got some.")
    return {"attention_mask": named.get("attention_mask")}


def _transformers_masks(block: nn.Module, call: Call) -> Masks:
    return _of_transformers(_mask_alone(block, call)["attention_mask"], _is_causal(block))


def _is_class(*names: str, parts: tuple[str, ...]) -> Callable[[nn.Module], bool]:
    """Whether a module is of a class of one of these names, or derived from it, and has some parts."""

    def matches(module: nn.Module) -> bool:
        named = any(kind.__name__ in names for kind in type(module).__mro__)
        return named and all(isinstance(getattr(module, part, None), nn.Module) for part in parts)

    return matches


def _vit_attend(block: Any, x: Tensor, call: Call) -> Tensor:
    out = block.attention(block.layernorm_before(x), **_mask_alone(block, call))[0]
    return block.dropout(out) + x


def _vit_finish(block: Any, x: Tensor) -> Tensor:
    return block.dropout(block.mlp(block.layernorm_after(x))) + x


def _vit_parts(block: Any) -> dict[str, Tensor]:
    a = block.attention
    return _joined(a.q_proj, a.k_proj, a.v_proj) | _linears(out=a.o_proj, up=block.mlp.fc1, down=block.mlp.fc2)


def _bert_attend(block: Any, x: Tensor, call: Call) -> Tensor:
    return block.attention(x, **_mask_alone(block, call))[0]


def _bert_finish(block: Any, x: Tensor) -> Tensor:
    return block.output(block.intermediate(x), x)


def _bert_parts(block: Any) -> dict[str, Tensor]:
    a = block.attention.self
    linears = _linears(out=block.attention.output.dense, up=block.intermediate.dense, down=block.output.dense)
    return _joined(a.query, a.key, a.value) | linears


def _gpt2_attend(block: Any, x: Tensor, call: Call) -> Tensor:
    return block.attn(block.ln_1(x), **_mask_alone(block, call))[0] + x


def _gpt2_finish(block: Any, x: Tensor) -> Tensor:
    return x + block.mlp(block.ln_2(x))


def _gpt2_masks(block: nn.Module, call: Call) -> Masks:
    return _of_transformers(_mask_alone(block, call)["attention_mask"], causal=True)


def _gpt2_parts(block: Any) -> dict[str, Tensor]:
    found = {}  # its matrices have inputs before outputs
    for name, layer in (
        ("in", block.attn.c_attn),
        ("out", block.attn.c_proj),
        ("up", block.mlp.c_fc),
        ("down", block.mlp.c_proj),
    ):
        found[name], found[f"{name}.bias"] = layer.weight.mT, layer.bias
    return found


# --- timm -------------------------------------------------------------------------------------------------------------

_TIMM = ("norm1", "attn", "norm2", "mlp")


def _is_timm(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return all(name in children for name in _TIMM) and set(children) <= {
        *_TIMM,
        *(f"{part}{number}" for part in ("ls", "drop_path", "drop") for number in (1, 2)),
    }


def _of_timm(mask: Tensor | None, causal: bool) -> Masks:
    """From what ``scaled_dot_product_attention`` takes: bools of what is seen, or floats."""
    if mask is None:
        return Masks(causal=causal)
    return Masks(*additive_to_keys(mask.unsqueeze(1) if mask.dim() == 3 else mask, seen=True), causal)


def _timm_masks(block: nn.Module, call: Call) -> Masks:
    named = call.named(block)
    return _of_timm(named.get("attn_mask"), bool(named.get("is_causal", False)))


def _side(block: Any, number: int, x: Tensor) -> Tensor:
    """What timm puts behind either half: a scale of the layer, and dropping of the path."""
    for part in ("ls", "drop_path"):
        layer = getattr(block, f"{part}{number}", None)
        x = x if layer is None else layer(x)
    return x


def _timm_attend(block: Any, x: Tensor, call: Call) -> Tensor:
    return x + _side(block, 1, block.attn(block.norm1(x), **call.named(block)))


def _timm_finish(block: Any, x: Tensor) -> Tensor:
    return x + _side(block, 2, block.mlp(block.norm2(x)))


def _timm_parts(block: Any) -> dict[str, Tensor]:
    if not isinstance(getattr(block.attn, "qkv", None), nn.Linear):
        return {}
    found = {"in": block.attn.qkv.weight, "in.bias": block.attn.qkv.bias}
    return _given(found | _linears(out=block.attn.proj, up=block.mlp.fc1, down=block.mlp.fc2))


# --- all --------------------------------------------------------------------------------------------------------------


def _linears(**layers: Any) -> dict[str, Tensor]:
    found = {name: layer.weight for name, layer in layers.items()}
    return _given(found | {f"{name}.bias": layer.bias for name, layer in layers.items()})


def _joined(*layers: Any) -> dict[str, Tensor]:
    """Queries, keys and values behind one another."""
    found = {"in": torch.cat([layer.weight for layer in layers])}
    if all(layer.bias is not None for layer in layers):
        found["in.bias"] = torch.cat([layer.bias for layer in layers])
    return found


def _given(found: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if value is not None}


def _fixed_point(name: str, side: str) -> Callable[[nn.Module], tuple[str, str]]:
    return lambda block: (name, side)


def _fixed_tail(*names: str) -> Callable[[nn.Module], tuple[str, ...]]:
    return lambda block: names


_KINDS: dict[str, BlockKind] = {
    kind.name: kind
    for kind in (
        BlockKind(
            "timm",
            _is_timm,
            _fixed_point("norm2", "input"),
            _timm_attend,
            _timm_finish,
            _timm_masks,
            _fixed_tail("norm2", "mlp", "ls2", "drop_path2"),
            _timm_parts,
        ),
        BlockKind(
            "GPT-2",
            _is_class("GPT2Block", parts=("ln_1", "attn", "ln_2", "mlp")),
            _fixed_point("ln_2", "input"),
            _gpt2_attend,
            _gpt2_finish,
            _gpt2_masks,
            _fixed_tail("ln_2", "mlp"),
            _gpt2_parts,
        ),
        BlockKind(
            "BERT",
            _is_class("BertLayer", "RobertaLayer", parts=("attention", "intermediate", "output")),
            _fixed_point("attention", "output"),
            _bert_attend,
            _bert_finish,
            _transformers_masks,
            _fixed_tail("intermediate", "output"),
            _bert_parts,
        ),
        BlockKind(
            "ViT",
            _is_class("ViTLayer", parts=("layernorm_before", "attention", "layernorm_after", "mlp")),
            _fixed_point("layernorm_after", "input"),
            _vit_attend,
            _vit_finish,
            _transformers_masks,
            _fixed_tail("layernorm_after", "mlp", "dropout"),
            _vit_parts,
        ),
        BlockKind(
            "torch",
            _is_torch,
            _torch_point,
            _torch_attend,
            _torch_finish,
            _torch_masks,
            _torch_tail,
            _torch_parts,
            _torch_batch_dim,
        ),
    )
}
