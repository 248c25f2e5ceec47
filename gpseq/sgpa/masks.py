"""Masks as torch's attention takes them, and what they mean for a Gaussian process.

Boolean masks say what to ignore, floating ones are added to the log kernel, and ``-inf`` or less than -1000 removes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowMask(NamedTuple):
    """Which keys each query sees: every row is a posterior of its own, with its own keys.

    Attributes:
        attend: boolean, ``(Tq, Tk)`` or with leading dimensions that broadcast to ``(*batch, H)``.
        bias: added to the log kernel, of the same shape, 0 where ``attend`` is not; ``None`` adds nothing.
    """

    attend: Tensor
    bias: Tensor | None


def removes(mask: Tensor) -> Tensor:
    """Which entries of a mask take a key away: ``True``, ``-inf``, and what stands for it.

    Masks are written with -1e4, -1e9 or the least number of a dtype too. Below -1000 the exponential is zero in every
    dtype, and a key that it multiplies has to be gone: counted as there, it would leave what inducing keys explain of
    it.

    Args:
        mask: boolean or floating.

    Example:
        >>> removes(torch.tensor([0.0, -5.0, -torch.inf, torch.finfo(torch.float32).min]))
        tensor([False, False,  True,  True])
    """
    return mask if mask.dtype == torch.bool else mask < -1e3


def row_mask(attn_mask: Tensor | None, shape: tuple[int, ...]) -> RowMask | None:
    """The mask of single scores.

    Args:
        attn_mask: boolean, True = ignore; or floating, added to the log kernel.
        shape: ``(*batch, H, Tq, Tk)``, what it has to broadcast to.

    Raises:
        TypeError: it is neither boolean nor floating.
        ValueError: its shape does not broadcast.
    """
    if attn_mask is None:
        return None
    check_mask("attn_mask", attn_mask, shape)
    attn_mask = attn_mask.expand(*attn_mask.shape[:-2], *shape[-2:])
    if attn_mask.dtype == torch.bool:
        return RowMask(~attn_mask, None)
    attend = ~removes(attn_mask)
    return RowMask(attend, torch.where(attend, attn_mask, 0.0))


def mask_keys(key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values without what padding holds, be it NaN: a value of zero is a key that is not there.

    Args:
        key: ``(*batch, H, Tk, dq)``.
        value: ``(*batch, H, Tk, D)``.
        key_padding_mask: ``(*batch, Tk)``; boolean, True = ignore, or floating, added to the log kernel: a bias that
            depends on the key alone is a factor of its value.

    Returns:
        Keys, values, and which keys there are, ``(*batch, 1, Tk)``; ``None`` if all.

    Raises:
        TypeError: the mask is neither boolean nor floating.
        ValueError: its shape does not fit.
    """
    if key_padding_mask is None:
        return key, value, None
    check_mask("key_padding_mask", key_padding_mask, (*value.shape[:-3], value.shape[-2]))
    mask = key_padding_mask.unsqueeze(-2)
    removed = removes(mask)
    key, value = key.masked_fill(removed.unsqueeze(-1), 0.0), value.masked_fill(removed.unsqueeze(-1), 0.0)
    if mask.dtype != torch.bool:
        value = value * torch.where(removed, 0.0, mask).exp().unsqueeze(-1).to(value.dtype)
    return key, value, ~removed


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """That a mask is one, and that it broadcasts to a shape.

    Args:
        name: of the argument.
        mask: what came.
        shape: what it has to broadcast to.

    Raises:
        TypeError: it is neither boolean nor floating.
        ValueError: its shape does not broadcast.
    """
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a boolean or floating-point tensor, got {got}.")
    check_broadcast(name, mask, shape)


def check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """That a tensor broadcasts to a shape.

    Raises:
        ValueError: it does not.
    """
    missing = len(shape) - tensor.dim()
    # Not "m in (1, n)": compiled with dynamic shapes, sizes are symbols, and those compare but are not found.
    if missing < 0 or any(m != 1 and m != n for m, n in zip(tensor.shape, shape[missing:], strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {tuple(tensor.shape)}.")


def query_weights(mask: RowMask, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights of the queries in a mean over them: equal, and zero for padding.

    Args:
        mask: of ``Tq`` queries.
        keep: which queries there are, ``(*batch, 1, Tq)``; ``None`` is all.
        dtype: of the weights.

    Returns:
        ``(Tq, 1)`` or ``(*batch, 1, Tq, 1)``, of sum 1, or of sum 0 where there is no query.
    """
    length = mask.attend.shape[-2]
    if keep is None:
        return torch.full((length, 1), 1.0 / length, dtype=dtype, device=mask.attend.device)
    weight = keep.unsqueeze(-1).to(dtype)
    return weight / weight.sum(-2, keepdim=True).clamp_min(1.0)
