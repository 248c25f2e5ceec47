"""Hyperparameters that maximise an objective: L-BFGS from several starts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from gpseq.checks import check_count
from gpseq.models.scales import Scale, chain_gradients, scales_of

#: Standard deviation of the random starts in the logarithm of a scale: a factor of ten each way is common.
_START_SPREAD = 2.0


def maximise(
    objective: Callable[[], Tensor],
    fitted: torch.nn.ModuleList,
    originals: torch.nn.ModuleList,
    num_starts: int,
    max_iterations: int,
    generator: torch.Generator | None = None,
) -> float:
    """Set the hyperparameters of some modules to the best values that a search met.

    The first start is the values that the modules have; the others are random around them, scales by a factor.

    Args:
        objective: the value at the present hyperparameters of ``fitted``, in nats, ``()``.
        fitted: float64 copies, which the search moves.
        originals: what is set in the end, if the search has found anything.
        num_starts: how many starts.
        max_iterations: L-BFGS iterations a start.
        generator: source of the random starts; ``None`` is torch's default.

    Returns:
        The largest value met.

    Raises:
        RuntimeError: no start gave a finite value; then ``originals`` are as they were.
    """
    check_count("num_starts", num_starts)
    check_count("max_iterations", max_iterations)
    scales = scales_of(fitted)
    first = [scale.read() for scale in scales]
    best, best_value = first, -math.inf
    for start in range(num_starts):
        theta = [value.clone() for value in first]
        if start > 0:
            for value in theta:
                value += _START_SPREAD * torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value)
        reached, where = _climb(objective, fitted, scales, theta, max_iterations)
        if reached > best_value:
            best_value, best = reached, where
    if best_value == -math.inf:
        raise RuntimeError(f"The marginal likelihood was not finite from any of {num_starts} starts.")
    for scale, value in zip(scales_of(originals), best, strict=True):
        scale.write(value)
    return best_value


def _climb(
    objective: Callable[[], Tensor],
    modules: torch.nn.ModuleList,
    scales: list[Scale],
    theta: list[Tensor],
    max_iterations: int,
) -> tuple[float, list[Tensor]]:
    """L-BFGS from ``theta``: the best value met on the way, minus infinity if none was finite, and where."""
    best_value, best = -math.inf, theta
    theta = [value.requires_grad_() for value in theta]

    def loss() -> Tensor:
        nonlocal best_value, best
        raw = [scale.raw(value) for scale, value in zip(scales, theta, strict=True)]
        for scale, value in zip(scales, theta, strict=True):
            scale.write(value)
        modules.zero_grad()
        value = objective()
        if value.item() > best_value:
            best_value, best = value.item(), [t.detach().clone() for t in theta]
        if value.requires_grad:
            (-value).backward()
        chain_gradients(scales, theta, raw)
        return -value.detach()

    with torch.enable_grad():
        try:
            if theta:
                torch.optim.LBFGS(theta, max_iter=max_iterations, line_search_fn="strong_wolfe").step(loss)
            else:
                loss()
        except (NanError, NotPSDError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            pass  # a step too far; what was met before it counts
    return best_value if math.isfinite(best_value) else -math.inf, best
