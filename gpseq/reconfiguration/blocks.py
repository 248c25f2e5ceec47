r"""What a block of a transformer is made of: attention beside a residual path, then a perceptron beside another.

With ``points="attention"`` a path is cut in the middle of each block: a transition is the perceptron of one block and
the attention of the next. So a kind of block says where that middle is, and how either half is computed from the
block's own modules, in plain code: what a hook sees there is what ``attend`` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.reconfiguration.calls import Call, is_causal, masks_of_timm, masks_of_torch, masks_of_transformers
from gpseq.reconfiguration.masks import Masks


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
    return masks_of_torch(block, call.named(block))


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


def _mask_alone(block: nn.Module, call: Call) -> dict[str, Any]:
    """The mask of a call; what else transformers hand to blocks changes nothing here, or is refused."""
    named = call.named(block)
    for name in ("encoder_hidden_states", "head_mask"):
        if name in named:
            raise NotImplementedError(f"{name}: expected none in a {type(block).__name__}, got some.")
    return {"attention_mask": named.get("attention_mask")}


def _transformers_masks(block: nn.Module, call: Call) -> Masks:
    return masks_of_transformers(_mask_alone(block, call)["attention_mask"], is_causal(block))


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
    return masks_of_transformers(_mask_alone(block, call)["attention_mask"], causal=True)


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


def _timm_masks(block: nn.Module, call: Call) -> Masks:
    named = call.named(block)
    return masks_of_timm(named.get("attn_mask"), bool(named.get("is_causal", False)))


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
