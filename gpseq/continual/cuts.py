"""Where a stream is cut into tasks: keys of rows, edges of intervals. Integers are never rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def interval_of(name: str, times: Tensor, cuts: Sequence[float | Fraction], round_to: torch.dtype | None) -> Tensor:
    """Number of the interval that each time lies in."""
    if times.is_floating_point():
        bounds = torch.tensor([float(cut) for cut in cuts], dtype=torch.float64)
        if round_to is not None and round_to.is_floating_point:
            bounds = bounds.to(round_to).double()
    else:
        # An integer is not below a number if it is not below the next integer, and not above it likewise.
        whole = [_whole(cut, math.ceil) for cut in cuts[:-1]] + [_whole(cuts[-1], math.floor)]
        bounds = torch.tensor(whole, dtype=torch.int64)
    outside = (times < bounds[0]) | (times > bounds[-1])
    if bool(outside.any()):
        raise ValueError(
            f"{name}: expected times between the edges {as_text(cuts[0])} and {as_text(cuts[-1])}, got "
            f"{as_text(times[outside][0].item())}; {int(outside.sum())} of {len(times)} rows lie outside."
        )
    return last_not_above(bounds[:-1], times)


def last_not_above(bounds: Tensor, values: Tensor) -> Tensor:
    """Number of the last bound that is not above each value, -1 where all are."""
    if bounds.dtype != values.dtype:
        bounds, values = bounds.double(), values.double()
    return torch.searchsorted(bounds, values, right=True) - 1


def check_edges(edges: Any) -> list[float]:
    """As Python's numbers, which hold large integers."""
    try:
        numbers = [as_number(edge) for edge in edges]
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if getattr(edges, "ndim", 1) != 1 or len(numbers) < 2 or not all(low < high for low, high in pairwise(numbers)):
        raise ValueError(f"edges: expected at least two increasing times, got {edges!r}.")
    return numbers


def as_number(value: Any) -> float:
    """A Python integer or float."""
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, str):
        raise TypeError(f"expected a number, got {number!r}.")
    return int(number) if isinstance(number, int) else float(number)


def _whole(number: float | Fraction, rounded: Callable[[Any], int]) -> int:
    limits = torch.iinfo(torch.int64)
    if math.isinf(number):
        return limits.max if number > 0 else limits.min
    return min(max(rounded(number), limits.min), limits.max)


def as_text(number: float | Fraction) -> str:
    """A number for a name or a message; integers in full."""
    return str(number) if isinstance(number, int) else f"{float(number):g}"


def key_of(name: str, key: Any, x: Tensor) -> Tensor:
    """The key of each row, ``(n,)`` float64 or int64 on the CPU."""
    if isinstance(key, bool):
        raise TypeError(f"{name}: expected a column, 'norm', a function or a tensor, got {key!r}.")
    if isinstance(key, int):
        columns = x.unsqueeze(-1) if x.dim() == 1 else x
        if columns.dim() != 2 or not -columns.shape[-1] <= key < columns.shape[-1]:
            raise ValueError(f"{name}: expected a column of x of shape {tuple(x.shape)}, got {key}.")
        key = columns[:, key]
    elif isinstance(key, str):
        if key != "norm":
            raise ValueError(f"{name}: expected a column, 'norm', a function or a tensor, got {key!r}.")
        key = x.detach().double().flatten(1).norm(dim=-1) if x.dim() > 1 else x.abs()
    elif callable(key):
        key = key(x)
    return check_keys(name, key, len(x))


def check_keys(name: str, key: Any, length: int) -> Tensor:
    """One real number for each row, ``(n,)`` float64 or int64 on the CPU."""
    if not isinstance(key, Tensor) or key.is_complex():
        raise TypeError(f"{name}: expected a tensor of real numbers, got {type(key).__name__}.")
    if key.shape != (length,):
        raise ValueError(f"{name}: expected one number for each of {length} rows, got shape {tuple(key.shape)}.")
    values = key.detach().cpu()
    if not values.is_floating_point():
        whole = values.long()  # float64 has no room for integers above 2^53, such as nanoseconds since 1970
        if values.dtype == torch.uint64 and bool((whole < 0).any()):
            raise ValueError(f"{name}: expected integers below 2^63, got a larger one.")
        return whole
    values = values.double()
    if missing := int(values.isnan().sum()):
        raise ValueError(f"{name}: expected numbers, got NaN in {missing} of {length} rows.")
    return values
