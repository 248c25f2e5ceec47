"""Checks of arguments: the message names the argument, what came, and what was expected."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor


def check_number(name: str, value: Any, above: float = -math.inf, expected: str = "a finite number") -> float:
    """A finite real number greater than a bound.

    Args:
        name: of the argument.
        value: what came; tensors of one element are numbers too.
        above: the bound.
        expected: how the message says it.

    Returns:
        The number.

    Raises:
        ValueError: it is none.

    Example:
        >>> check_number("horizon", 3)
        3.0
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and number > above):
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    return number


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number, not less than a bound.

    Args:
        name: of the argument.
        value: what came.
        least: the bound.

    Returns:
        The number.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.

    Example:
        >>> check_count("num_features", 3)
        3
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}.")
    return value


def check_jitter(value: Any) -> float | None:
    """A relative jitter, from 0 to below 1, or ``None``."""
    if value is None:
        return None
    expected = "a relative number in [0, 1)"
    number = check_number("jitter", value, above=-1.0, expected=expected)
    if not 0 <= number < 1:
        raise ValueError(f"jitter: expected {expected}, got {value!r}.")
    return number


def check_growth(growth: Any) -> float | str | None:
    """Check how a horizon grows.

    Args:
        growth: a factor above 1, ``None`` or ``"fixed"``, see ``StreamingGP``.

    Returns:
        It.

    Raises:
        ValueError: it is something else.
    """
    if growth is None or growth == "fixed":
        return growth
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 1 < growth < math.inf:
        raise ValueError(f"horizon_growth: expected a factor above 1, None or 'fixed', got {growth!r}.")
    return float(growth)


def check_floating(name: str, value: Any) -> Tensor:
    """A tensor of floating-point numbers.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        The tensor.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}.")
    return value


def check_inputs(x: Any, columns: int) -> Tensor:
    """Inputs with a column axis.

    Args:
        x: what came; ``(n,)`` or ``(*batch, n, d)``.
        columns: d.

    Returns:
        The inputs, ``(*batch, n, d)``.

    Raises:
        TypeError: it is no floating-point tensor.
        ValueError: it has another number of columns.
    """
    inputs = check_floating("x", x)
    inputs = inputs.unsqueeze(-1) if inputs.dim() == 1 else inputs
    if inputs.dim() < 2 or inputs.shape[-1] != columns:
        raise ValueError(f"x: expected {columns} input columns, as the features have, got shape {tuple(x.shape)}.")
    return inputs


def stacklevel_outside() -> int:
    """The ``stacklevel`` of a warning that points at the first caller outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "gpseq":
        level, frame = level + 1, frame.f_back
    return level
