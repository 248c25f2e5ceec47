"""Temperatures: one for all inputs, or one that grows with a score of the input."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def scaled_log_probs(logits: Tensor, spread: Tensor, scale: tuple[float, float]) -> Tensor:
    r"""Log probabilities of :math:`\mathrm{softmax}(z / \tau)`, :math:`\tau^2 = a + b s`, averaged over draws.

    Args:
        logits: ``(n, C)``, or ``(S, n, C)`` with S draws, whose probabilities are averaged.
        spread: s, ``(n,)``, at least 0.
        scale: (a, b).

    Returns:
        ``(n, C)``.
    """
    tau = (scale[0] + scale[1] * spread).sqrt().unsqueeze(-1)
    return _averaged((logits / tau).log_softmax(-1))


def fit_scale(logits: Tensor, labels: Tensor, spread: Tensor | None = None) -> tuple[float, float]:
    r"""The two scalars of :func:`scaled_log_probs` that make labels most probable; without a spread b is 0.

    Args:
        logits: ``(n, C)`` or ``(S, n, C)``.
        labels: ``(n,)``.
        spread: ``(n,)``, at least 0.

    Returns:
        (a, b), both at least 0 and a above it.
    """
    logits = logits.detach().double()
    s = torch.zeros(len(labels), dtype=torch.float64) if spread is None else spread.detach().double()
    unit = max(s.mean().item(), 1e-12)

    def loss(theta: Tensor) -> Tensor:
        a, b = theta.clamp(-15, 15).exp()
        tau = (a + (b / unit if spread is not None else 0.0) * s).sqrt().unsqueeze(-1)
        log_probs = _averaged((logits / tau).log_softmax(-1))
        return -log_probs.gather(-1, labels.unsqueeze(-1)).mean()

    best, best_value = (1.0, 0.0), math.inf
    # The loss is not convex in two scalars: most of the temperature may lie in either at first.
    for start in ((0.0, -6.0), (0.5, -1.0), (-1.0, 0.5)):
        theta = _minimised(loss, torch.tensor(start, dtype=torch.float64))
        value = loss(theta).item()
        if value < best_value - 1e-9:
            a, b = theta.clamp(-15, 15).exp().tolist()
            best, best_value = (a, b / unit if spread is not None else 0.0), value
    return best


def _minimised(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()


def _averaged(log_probs: Tensor) -> Tensor:
    if log_probs.dim() == 2:
        return log_probs
    return log_probs.logsumexp(0) - math.log(len(log_probs))
