"""The kernel that a student has if nobody says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gpseq.reconfiguration.blocks import find_kind
from gpseq.reconfiguration.kernel import TransitionKernel
from gpseq.reconfiguration.stack import Stack

#: Share of the replaced parameters that the kernel and the kept half of a block may have.
BUDGET = 0.6
#: Dropout in such a kernel; that of the published settings for images.
DROPOUT = 0.1


def make_kernel(stack: Stack, options: Mapping[str, Any]) -> TransitionKernel:
    """A kernel for some blocks: of their width and heads, with perceptrons as wide as the budget leaves.

    Args:
        stack: the blocks.
        options: of the kernel, which stand before what is read from the blocks.

    Returns:
        The kernel.

    Raises:
        ValueError: the width of the blocks is not known.
    """
    block: Any = stack.blocks[0]
    kind = stack.kind or find_kind(block)
    parts = kind.parts(block) if kind is not None and kind.parts is not None else {}
    if "out" in parts:
        dim, hidden = parts["out"].shape[0], parts["up"].shape[0]
    else:
        norms = [part for part in block.modules() if isinstance(part, nn.LayerNorm)]
        if not norms:
            raise ValueError(
                f"kernel: expected one for blocks of type {type(block).__name__}, whose width is not known, got None."
            )
        dim = norms[0].normalized_shape[-1]
        hidden = 4 * dim
    settings = dict(options)
    settings.setdefault("num_steps", len(stack))
    settings.setdefault("num_heads", _heads(block, dim))
    settings.setdefault("causal", False)
    settings.setdefault("dropout", DROPOUT)
    like = next((value for value in block.parameters() if value.is_floating_point()), None)
    if like is not None:
        settings.setdefault("dtype", like.dtype)
        settings.setdefault("device", like.device)
    if "mlp_ratio" in settings:
        return TransitionKernel(dim, **settings)
    room = BUDGET * sum(value.numel() for part in stack.blocks for value in part.parameters())
    if stack.kind is not None:
        room -= sum(
            value.numel() for name in stack.kind.tail(block)
            for value in getattr(getattr(block, name, None), "parameters", list)()
        )  # fmt: skip
    depth = settings.get("depth", 1)
    least = TransitionKernel(dim, **{**settings, "mlp_ratio": 1 / dim, "device": "meta"})
    spare = (room - sum(value.numel() for value in least.parameters())) / (depth * (2 * dim + 1))
    hidden = int(min(max(spare // 8 * 8, dim // 2), hidden))
    return TransitionKernel(dim, **settings, mlp_ratio=hidden / dim)


def _heads(block: Any, dim: int) -> int:
    """Heads of a block's attention, where some part of it says so."""
    for part in block.modules():
        for name in ("num_heads", "num_attention_heads"):
            heads = getattr(part, name, None)
            if isinstance(heads, int) and heads > 0 and dim % heads == 0:
                return heads
    return max(dim // 64, 1) if dim % max(dim // 64, 1) == 0 else 1
