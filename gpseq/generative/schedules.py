"""Schedules of corruptions: one number for each distance from the image, or one for every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from gpseq.checks import check_count, check_number

Number = TypeVar("Number", int, float)


def schedule(
    name: str, value: Any, first: float = 0.0, below: float = math.inf, rising: bool = True
) -> float | tuple[float, ...]:
    """A number for all steps, or one for each distance from the image.

    Args:
        name: of the argument.
        value: what came; lists, arrays and tensors of one dimension are sequences.
        first: what the number at distance 0 must be; none is smaller.
        below: what all numbers must stay below.
        rising: whether a number may not be smaller than the one before it.

    Returns:
        A float, or a tuple of floats.

    Raises:
        ValueError: another schedule.

    Example:
        >>> schedule("sigmas", [0, 1, 2]), schedule("sigmas", 1)
        ((0.0, 1.0, 2.0), 1.0)
    """
    expected = f"finite numbers from {first:g}" + (f" to below {below:g}" if below < math.inf else "")
    listed = _listed(value)
    numbers = tuple(check_number(name, item, expected=expected) for item in ([value] if listed is None else listed))
    if not all(first <= number < below for number in numbers):
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    if listed is None:
        return numbers[0]
    if not numbers or numbers[0] != first:
        raise ValueError(f"{name}: expected {first:g} at distance 0, where the frame is the image, got {value!r}.")
    if rising and any(later < earlier for earlier, later in pairwise(numbers)):
        raise ValueError(f"{name}: expected numbers that do not decrease with the distance, got {value!r}.")
    return numbers


def whole_schedule(name: str, value: Any, first: int) -> int | tuple[int, ...]:
    """As :func:`schedule`, of whole numbers.

    Args:
        name: of the argument.
        value: what came.
        first: what the number at distance 0 must be; none is smaller.

    Returns:
        An integer, or a tuple of integers.

    Raises:
        TypeError: a number is not whole.
        ValueError: another schedule.
    """
    listed = _listed(value)
    if listed is None:
        return check_count(name, value, least=first)
    numbers = tuple(check_count(name, item, least=first) for item in listed)
    schedule(name, numbers, first=first)
    return numbers


def level(name: str, levels: Sequence[Number], distance: int) -> Number:
    """The number at one distance.

    Args:
        name: of the argument.
        levels: by the distance.
        distance: i.

    Returns:
        It.

    Raises:
        ValueError: the schedule does not reach so far.
    """
    if distance >= len(levels):
        raise ValueError(f"{name}: expected a number for distance {distance}, got {len(levels)} numbers, from 0.")
    return levels[distance]


def check_length(name: str, levels: Any, num_frames: int) -> None:
    """Refuse a sequence that is not one number for each frame; single numbers fit all videos.

    Args:
        name: of the argument.
        levels: a number or a tuple.
        num_frames: T.

    Raises:
        ValueError: another length.
    """
    if isinstance(levels, tuple) and len(levels) != num_frames:
        raise ValueError(f"{name}: expected one number for each of {num_frames} frames, got {len(levels)}.")


def ordered(distance: int, start: int) -> tuple[int, int]:
    """Both, if ``0 <= start <= distance``.

    Args:
        distance: i, where a corruption leads.
        start: where it comes from.

    Returns:
        ``distance, start``.

    Raises:
        TypeError: one is no integer.
        ValueError: they are in another order.
    """
    check_count("distance", distance, least=check_count("start", start, least=0))
    return distance, start


def _listed(value: Any) -> list[Any] | None:
    """The items of a sequence, as Python has them; ``None`` for a single number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        return list(value)
    except TypeError:
        return None
