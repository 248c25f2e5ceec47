"""What an encoder says about latent paths: a Gaussian pseudo-observation for each time and channel."""

from __future__ import annotations

import torch
from torch import Tensor


def check_evidence(x: Tensor, mean: Tensor, variance: Tensor, missing: Tensor | None) -> None:
    """Check pseudo-observations before anything is computed from them.

    Args:
        x: times ``(*b, n)``, or inputs ``(*b, n, d)``.
        mean: ``(*b, L, n)``.
        variance: likewise, positive.
        missing: ``(*b, n)``, bool; what is missing may be NaN.

    Raises:
        TypeError: ``missing`` is not bool.
        ValueError: shapes that do not fit, times or evidence that are not finite, variances that are not positive.
    """
    if mean.dim() < 2 or mean.shape != variance.shape:
        raise ValueError(
            f"mean: expected the shape (*b, L, n) of variance, got {tuple(mean.shape)} and {tuple(variance.shape)}."
        )
    times = mean.shape[-1]
    if times not in (x.shape[-1:] + x.shape[-2:-1] if x.dim() > 1 else x.shape[-1:]):
        raise ValueError(f"x: expected {times} times, as there is evidence for so many, got shape {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite times, got some that are not.")
    seen = torch.ones((), dtype=torch.bool, device=mean.device)
    if missing is not None:
        if missing.dtype != torch.bool:
            raise TypeError(f"missing: expected a bool tensor, True for what was not observed, got {missing.dtype}.")
        if missing.shape[-1:] != mean.shape[-1:]:
            raise ValueError(f"missing: expected {times} times, got shape {tuple(missing.shape)}.")
        seen = ~missing.unsqueeze(-2)
    if not bool((mean.isfinite() & variance.isfinite() | ~seen).all()):
        raise ValueError("mean: expected finite pseudo-observations, got some that are not.")
    if not bool(((variance > 0) | ~seen).all()):
        raise ValueError("variance: expected positive numbers, got some that are not.")
