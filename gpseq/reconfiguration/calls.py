"""What a block was called with, and what that says about which tokens may see which."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
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
        return masks_of_transformers(named["attention_mask"], is_causal(block))
    if "attn_mask" in named:
        return masks_of_timm(named["attn_mask"], bool(named.get("is_causal", False)))
    masks = masks_of_torch(block, named)
    return replace(masks, causal=True) if masks.pairs is None and is_causal(block) else masks


def is_causal(block: nn.Module) -> bool:
    """Whether attention of a block hides later tokens without being told, as its attribute says in transformers."""
    return any(getattr(part, "is_causal", False) is True for part in block.modules())


def masks_of_torch(block: Any, named: Mapping[str, Any]) -> Masks:
    """From torch's masks of pairs, ``(T, T)`` or ``(B H, T, T)``, and keys, ``(B, T)``; bools hide, floats are added.

    Args:
        block: that was called, which knows the number of heads.
        named: its arguments.
    """
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


def masks_of_transformers(mask: Tensor | None, causal: bool = False) -> Masks:
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


def masks_of_timm(mask: Tensor | None, causal: bool) -> Masks:
    """From what ``scaled_dot_product_attention`` takes: bools of what is seen, or floats."""
    if mask is None:
        return Masks(causal=causal)
    return Masks(*additive_to_keys(mask.unsqueeze(1) if mask.dim() == 3 else mask, seen=True), causal)
