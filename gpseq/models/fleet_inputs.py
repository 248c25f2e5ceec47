"""What is brought to a fleet: inputs that streams share or have of their own, targets with gaps, choices of streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_floating
from gpseq.features.base import as_inputs


def arranged(
    x: Tensor, y: Tensor, num: int, dims: int, missing: str, batches: bool = False, integers: bool = False
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of streams in one form, where missing targets have any finite inputs.

    Args:
        x: inputs ``(n,)``, ``(n, d)`` or ``(num, n, d)``; with d = 1 also ``(num, n)``, of the shape of ``y``.
        y: targets ``(num, n)``; NaN where there is none.
        num: how many streams it is about.
        dims: d.
        missing: what a NaN in ``y`` means, ``"skip"`` or ``"error"``.
        batches: targets may be ``(*f, num, n)``.
        integers: targets may be integers: counts and labels.

    Returns:
        Inputs ``(n, d)`` or ``(num, n, d)``, and the targets.

    Raises:
        TypeError: something is not a floating-point tensor.
        ValueError: shapes that do not fit, or another way to miss.

    Example:
        >>> nan = float("nan")
        >>> arranged(torch.tensor([[1.0], [nan]]), torch.tensor([[0.5], [nan]]), 2, 1, "skip")[0].flatten()
        tensor([1., 1.])
    """
    if integers and isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex():
        y = y.double()
    check_floating("x", x)
    check_floating("y", y)
    if y.dim() < 2 or (y.dim() > 2 and not batches) or y.shape[-2] != num:
        raise ValueError(f"y: expected targets of shape ({num}, n), a row for each stream, got {tuple(y.shape)}.")
    n = y.shape[-1]
    if dims == 1 and (x.dim() == 1 or (x.dim() == 2 and x.shape == y.shape[-2:])):
        inputs = x.unsqueeze(-1)  # times: of all streams, or of each
    else:
        inputs = x
    if inputs.shape not in ((n, dims), (num, n, dims)):
        own = f" or ({num}, {n})" if dims == 1 else ""
        raise ValueError(
            f"x: expected inputs ({n}, {dims}) for all streams, or ({num}, {n}, {dims}){own} for each, with y of "
            f"shape {tuple(y.shape)}; got shape {tuple(x.shape)}."
        )
    if missing not in ("error", "skip"):
        raise ValueError(f"missing: expected 'error' or 'skip', got {missing!r}.")
    if missing == "error":
        return inputs, y
    absent = y.isnan()
    while absent.dim() >= inputs.dim():
        absent = absent.all(0)  # in all that share the input
    if bool((absent & ~inputs.isfinite().all(-1)).any()):
        present = inputs.detach()[~absent]
        filler = present[0] if len(present) else inputs.new_zeros(dims)  # any admissible input will do
        inputs = torch.where(absent.unsqueeze(-1), filler, inputs)
    return inputs, y


def check_places(x: Any, dims: int, batch: tuple[int, ...]) -> Tensor:
    """Inputs to predict at, which streams share or have of their own.

    Args:
        x: ``(n,)`` or ``(n, d)``, or of the streams ``(*batch, n, d)``.
        dims: d.
        batch: of the streams, ``(S,)`` or of fantasies ``(*f, S)``.

    Returns:
        The inputs.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: shapes that do not fit.
    """
    x, streams = check_floating("x", x), ", ".join(str(size) for size in batch)
    expected = f"expected inputs (n, {dims}) for all streams, or ({streams}, n, {dims}) for each stream"
    if x.dim() == 0 or as_inputs(x).shape[-1] != dims:
        raise ValueError(f"x: {expected}; got shape {tuple(x.shape)}.")
    try:
        torch.broadcast_shapes(x.shape[:-2], batch)
    except RuntimeError:
        raise ValueError(f"x: {expected}; got shape {tuple(x.shape)}.") from None
    return x


def check_streams(streams: Any, num: int, device: torch.device, name: str = "streams") -> Tensor:
    """A choice of different streams.

    Args:
        streams: their indices, ``(k,)``.
        num: how many there are.
        device: where the indices are needed.
        name: of the argument.

    Returns:
        The indices, int64.

    Raises:
        TypeError: other things than integers.
        ValueError: streams that do not exist or are named twice.

    Example:
        >>> check_streams([2, 0], 3, torch.device("cpu"))
        tensor([2, 0])
    """
    if not isinstance(streams, Tensor):
        try:
            streams = torch.tensor(list(streams)) if len(streams) else torch.zeros(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected a list or 1-D tensor of integers, got {streams!r}.") from None
    if streams.is_floating_point() or streams.is_complex() or streams.dtype == torch.bool:
        raise TypeError(f"{name}: expected a list or 1-D tensor of integers, got {streams.dtype}.")
    if streams.dim() != 1:
        raise ValueError(f"{name}: expected a list or 1-D tensor of integers, got shape {tuple(streams.shape)}.")
    index = streams.to(device, torch.int64)
    if not len(index):
        return index
    ordered = index.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    for wrong in (ordered[0], ordered[-1]):
        if not 0 <= wrong < num:
            raise ValueError(f"{name}: expected indices from 0 to {num - 1}, got {int(wrong)}.")
    if len(twice):
        raise ValueError(f"{name}: expected each stream once, got {int(twice[0])} more often.")
    return index
