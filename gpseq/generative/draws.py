"""Random numbers from a generator on any device, for tensors on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw_normals(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent standard normal numbers.

    Args:
        shape: of the result.
        like: gives the dtype and the device.
        generator: where they come from, on any device; ``None`` is torch's default generator.

    Returns:
        The numbers.
    """
    device = like.device if generator is None else generator.device
    return torch.randn(*shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def drawn(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws in the shape, dtype and place of a tensor.

    They are drawn in float32 where the generator lives, or where the tensor does without one: the same for every dtype
    and, with a generator, for every device.

    Args:
        draw: ``torch.randn`` or ``torch.rand``.
        like: any floating tensor.
        generator: ``None`` is torch's default.

    Returns:
        As ``like``.

    Example:
        >>> drawn(torch.randn, torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    place = like.device if generator is None else generator.device
    return draw(like.shape, generator=generator, dtype=torch.float32, device=place).to(like)
