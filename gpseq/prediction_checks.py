"""Checks of what a prediction is made of, cut and joined: the message names the argument."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor


def check_event_dim(event_dim: Any) -> int:
    """The number of dimensions of an event.

    Raises:
        ValueError: it is neither 1 nor 2.
    """
    if isinstance(event_dim, bool) or not isinstance(event_dim, int) or event_dim not in (1, 2):
        raise ValueError(f"event_dim: expected 1 or 2, got {event_dim!r}.")
    return event_dim


def check_generator(generator: Any) -> None:
    """A generator of torch, or ``None``.

    Raises:
        TypeError: it is something else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}.")


def broadcast(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A tensor in a shape.

    Raises:
        ValueError: it does not broadcast.
    """
    try:
        return value.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(value.shape)}."
        ) from error


def check_like(name: str, value: Tensor | LinearOperator, mean: Tensor) -> None:
    """The dtype and the device of the mean.

    Raises:
        TypeError: of another dtype.
        ValueError: on another device.
    """
    if value.dtype != mean.dtype:
        raise TypeError(f"{name}: expected {mean.dtype}, as the mean has, got {value.dtype}.")
    if value.device != mean.device:
        raise ValueError(f"{name}: expected it on {mean.device}, where the mean is, got {value.device}.")


def check_noise(noise: Any, like: Tensor) -> Tensor | None:
    """Noise variances in the shape, dtype and place of a tensor.

    Raises:
        TypeError: they are no numbers.
        ValueError: some are negative or NaN, or the shape does not fit.
    """
    if noise is None:
        return None
    try:
        given = torch.as_tensor(noise)
    except (TypeError, ValueError, RuntimeError):
        given = None
    if given is None or given.is_complex() or given.dtype == torch.bool:
        got = type(noise).__name__ if given is None else given.dtype
        raise TypeError(f"noise: expected a real number or a tensor of them, got {got}.")
    value = given.to(dtype=like.dtype, device=like.device)
    if not (value >= 0).all():
        raise ValueError("noise: expected variances that are not negative, got some that are, or NaN.")
    return broadcast("noise", value, like.shape)


def check_scores(scores: Any, batch: torch.Size) -> Mapping[str, Tensor]:
    """Named tensors over a batch.

    Raises:
        TypeError: it is no mapping.
        ValueError: one is no tensor, or has another batch shape.
    """
    if scores is None:
        return MappingProxyType({})
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores: expected a mapping of names to tensors, got {type(scores).__name__}.")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or score.shape[: len(batch)] != batch:
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"scores[{name!r}]: expected a tensor of shape {(*batch, ...)}, got {got}.")
    return MappingProxyType(dict(scores))


def check_index(index: Any, batch: torch.Size) -> tuple[tuple[Any, ...], bool]:
    """One entry for each batch dimension (masks take several), and whether all are integers or slices.

    Args:
        index: integers, slices, ``...``, masks, and tensors, arrays or lists of integers.
        batch: sizes of the batch.

    Raises:
        IndexError: it is no index into such a batch.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    dots = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    if len(dots) > 1:
        raise IndexError("index: expected at most one '...', got several.")
    entries = [entry if entry is Ellipsis else _entry(entry) for entry in entries]
    used = sum(
        entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1
        for entry in entries
        if entry is not Ellipsis
    )
    if used > len(batch):
        raise IndexError(f"index: a batch of shape {tuple(batch)} takes at most {len(batch)}, got {used}.")
    filling = [slice(None)] * (len(batch) - used)
    place = dots[0] if dots else len(entries)
    entries = [*entries[:place], *filling, *entries[place + 1 :]]
    return tuple(entries), not any(isinstance(entry, Tensor) for entry in entries)


def _entry(entry: Any) -> int | slice | Tensor:
    """One entry of an index in torch's kinds."""
    error = IndexError(f"index: expected integers, slices, tensors, masks or '...', got {entry!r}.")
    if isinstance(entry, slice):
        return entry
    if isinstance(entry, list | np.ndarray):
        try:
            given = torch.as_tensor(np.asarray(entry))
        except (TypeError, ValueError):
            raise error from None
        entry = given.long() if isinstance(entry, list) and given.numel() == 0 else given
    if isinstance(entry, Tensor):
        if entry.is_floating_point() or entry.is_complex() or (entry.dtype == torch.bool and entry.dim() == 0):
            raise error
        return entry
    if isinstance(entry, int | np.integer) and not isinstance(entry, bool):
        return int(entry)
    raise error


def check_parts(predictions: Any, kind: type) -> list[Any]:
    """At least one prediction.

    Raises:
        TypeError: no sequence, or one of something else.
        ValueError: it is empty.
    """
    try:
        parts = list(predictions)
    except TypeError as error:
        raise TypeError(
            f"predictions: expected several of them in a sequence, got {type(predictions).__name__}."
        ) from error
    if not parts:
        raise ValueError("predictions: expected at least one, got none.")
    for number, part in enumerate(parts):
        if not isinstance(part, kind):
            raise TypeError(f"predictions: expected {kind.__name__}, got {type(part).__name__} in number {number}.")
    return parts


def check_dim(dim: Any, rank: int) -> int:
    """A batch dimension, counted from the first.

    Raises:
        TypeError: it is no integer.
        IndexError: there is no such dimension.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an integer, got {dim!r}.")
    if not -rank <= dim < rank:
        raise IndexError(f"dim: expected one of {rank} batch dimensions, got {dim}.")
    return dim % rank
