"""Checks of what is scored, and the dtype of what is returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_floating

#: How far a row of probabilities may be from summing to one: in float32 and float64, and in half precision.
SUM_TOLERANCE, HALF_SUM_TOLERANCE = 1e-3, 1e-2


def refuse(*problems: tuple[Tensor, Callable[[], str]]) -> None:
    """Raise the message of the first problem that is there, with one look at the device if none is.

    Args:
        problems: where each would be, a bool tensor of any shape, and what to say then.

    Raises:
        ValueError: there is one.
    """
    if bool(torch.stack([where.any() for where, _ in problems]).any()):
        for where, message in problems:
            if bool(where.any()):
                raise ValueError(message())


def check_scores(name: str, value: Any) -> Tensor:
    """Floating-point numbers ``(*batch, n)`` with n at least 1; their values are not looked at.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        The tensor, in float32 where it was in half precision.

    Raises:
        TypeError: it is no floating-point tensor.
        ValueError: it has no element, or no dimension.
    """
    scores = at_least_float32(check_floating(name, value))
    if scores.dim() == 0 or scores.numel() == 0:
        raise ValueError(f"{name}: expected shape (*batch, n) with n at least 1, got {tuple(scores.shape)}.")
    return scores


def check_like(name: str, value: Any, like_name: str, like: Tensor) -> Tensor:
    """A tensor of the shape and on the device of another.

    Args:
        name: of the argument.
        value: what came.
        like_name: name of the other.
        like: the other.

    Returns:
        The tensor.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape, or is elsewhere.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}.")
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, as {like_name} has, got {tuple(value.shape)}.")
    if value.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device}, where {like_name} is, got {value.device}.")
    return value


def no_nan(name: str, value: Tensor) -> tuple[Tensor, Callable[[], str]]:
    """For :func:`refuse`: NaN.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        Where it is, and what to say.
    """
    found = value.isnan()
    return found, lambda: f"{name}: expected no NaN, got {int(found.sum())} among {found.numel()} numbers."


def finite(name: str, value: Tensor) -> tuple[Tensor, Callable[[], str]]:
    """For :func:`refuse`: NaN and infinity.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        Where they are, and what to say.
    """
    found = ~value.isfinite()

    def message() -> str:
        return f"{name}: expected finite numbers, got {int(found.sum())} of {found.numel()} that are infinite or NaN."

    return found, message


def check_probability(probability: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Probabilities of classes and the classes that came true.

    Args:
        probability: ``(*batch, n, C)``, n at least 1 and C at least 2; no logits: rows sum to one up to
            ``SUM_TOLERANCE``.
        target: ``(*batch, n)``, integers from 0 to C - 1, or bool where C is 2.

    Returns:
        Probabilities, in float32 where they were in half precision, and the classes as int64.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, NaN, a number below 0, a row that does not sum to one, a class that is not there.

    Example:
        >>> check_probability(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
        Traceback (most recent call last):
        ...
        ValueError: probability: expected rows that sum to 1 up to 0.001, got a sum of 3; take softmax of logits.
    """
    given = check_floating("probability", probability)
    if given.dim() < 2 or given.shape[-1] < 2 or given.numel() == 0:
        raise ValueError(
            "probability: expected shape (*batch, n, C) with n at least 1 and C at least 2 (of one number p for class "
            f"1, stack 1 - p and p), got {tuple(given.shape)}."
        )
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: expected a tensor of integers or bool, got {got}.")
    check_like("target", target, "probability without its last dimension", given[..., 0])
    classes = given.shape[-1]
    tolerance = HALF_SUM_TOLERANCE if given.dtype in (torch.float16, torch.bfloat16) else SUM_TOLERANCE
    p, label = at_least_float32(given), target.long()
    total = p.sum(-1)
    away = (total - 1).abs()
    outside = (label < 0) | (label >= classes)
    refuse(
        no_nan("probability", p),
        (p < 0, lambda: f"probability: expected no number below 0, got {float(p.min()):.4g}; take softmax of logits."),
        (
            ~(away <= tolerance),
            lambda: (
                f"probability: expected rows that sum to 1 up to {tolerance:g}, got a sum of "
                f"{float(total.flatten()[away.flatten().argmax()]):.4g}; take softmax of logits."
            ),
        ),
        (
            outside,
            lambda: (
                f"target: expected classes from 0 to {classes - 1}, got from {int(label.min())} to {int(label.max())}."
            ),
        ),
    )
    return p, label


def at_least_float32(value: Tensor) -> Tensor:
    """A tensor in its own dtype, or in float32 where that is half precision."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
