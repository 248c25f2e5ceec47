"""What the functions of this package share: checks of their arguments, and the axis of the modes."""

from __future__ import annotations

import torch
from torch import Tensor


def modes(order: int, like: Tensor) -> Tensor:
    """0, ..., order - 1 along a new first axis in front of those of like."""
    return torch.arange(order, dtype=torch.float64, device=like.device).reshape(-1, *[1] * like.ndim)


def check_count(name: str, value: int) -> None:
    """A positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def finite(name: str, value: float | Tensor) -> Tensor:
    """The value as a float64 tensor, on its own device and graph."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got {value}")
    return tensor


def number(name: str, value: float | Tensor) -> Tensor:
    """The value as a float64 tensor without axes, on its own device and graph."""
    tensor = finite(name, value)
    if tensor.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}")
    return tensor.reshape(())


def interval(start: float | Tensor, horizon: float | Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers, the second after the first."""
    start, horizon = number("start", start), number("horizon", horizon)
    if not start < horizon:
        raise ValueError(f"horizon must be greater than start, got start {start.item()} and horizon {horizon.item()}")
    return start, horizon


def sliding(end: float | Tensor, window: float | Tensor) -> tuple[Tensor, Tensor]:
    """A time, and a positive length behind it."""
    end, window = number("end", end), number("window", window)
    if not window > 0:
        raise ValueError(f"window must be positive, got {window.item()}")
    return end, window
