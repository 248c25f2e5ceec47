r"""How far a student's transitions are from the teacher's: pure functions on means and variances.

The divergence of two chains with the same first state is the sum of those of their transitions, along the first chain:

.. math::
    \operatorname{KL}(q \,\|\, p) = \sum_{l=1}^L \mathrm E_{X_{l-1} \sim q}
    \operatorname{KL}\bigl(q(X_l \mid X_{l-1}) \,\|\, p(X_l \mid X_{l-1})\bigr).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

#: Losses of a transition.
PATH_LOSSES = ("kl", "nll", "mse", "reverse_kl")


def gaussian_kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    r"""Divergence of independent Gaussians, entry by entry.

    .. math::
        \operatorname{KL}\bigl(N(\mu, \sigma^2) \,\|\, N(m, s^2)\bigr)
        = \log \frac{s}{\sigma} + \frac{\sigma^2 + (\mu - m)^2}{2 s^2} - \frac12.

    Args:
        mean: mu.
        variance: sigma squared.
        other_mean: m.
        other_variance: s squared.

    Returns:
        Of the shape in which all broadcast; infinite where sigma alone is zero.

    Example:
        >>> gaussian_kl(torch.zeros(1), torch.ones(1), torch.ones(1), torch.ones(1))
        tensor([0.5000])
    """
    ratio = variance / other_variance
    excess = (variance - other_variance) / other_variance  # has digits left where the ratio is close to one
    spread = torch.where(excess.abs() < 0.5, excess - excess.log1p(), ratio - 1 - ratio.log())
    return 0.5 * (spread + (mean - other_mean).square() / other_variance)


def negative_log_density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Of independent Gaussians at some values, entry by entry, in nats.

    Args:
        x: values.
        mean: of the Gaussians.
        variance: likewise.
    """
    return 0.5 * (math.log(2 * math.pi) + variance.log() + (x - mean).square() / variance)


def transition_loss(
    kind: str,
    state: Tensor,
    target: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    size: Tensor | float = 1.0,
    mean_weight: float = 1.0,
    spread_weight: float = 0.0,
) -> Tensor:
    r"""What is to be small for a transition, entry by entry.

    ``"kl"`` is the divergence of the teacher's from the student's, ``"reverse_kl"`` the other way round, ``"nll"``
    minus the log density of the teacher's state under the student's, and ``"mse"``

    .. math:: \lambda_\mu (\mu - m)^2 / r^2 + \lambda_\sigma (\sigma - s)^2 / r^2,

    which alone depends on the size r: the others do not change with the scale of the states, but for a constant.

    Args:
        kind: one of ``PATH_LOSSES``.
        state: of the teacher, where the transition ends.
        target: mean and variance of the teacher.
        found: those of the student.
        size: r.
        mean_weight: of the means, for ``"mse"``.
        spread_weight: of the deviations, for ``"mse"``.

    Returns:
        Like the state.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "kl":
        return gaussian_kl(*target, *found)
    if kind == "reverse_kl":
        return gaussian_kl(*found, *target)
    if kind == "nll":
        return negative_log_density(state, *found)
    if kind != "mse":
        raise ValueError(f"path_loss: expected one of {', '.join(PATH_LOSSES)}, got {kind!r}.")
    loss = mean_weight * (target[0] - found[0]).square()
    if spread_weight:
        loss = loss + spread_weight * (target[1].sqrt() - found[1].sqrt()).square()
    return loss / size**2


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Divergence of the teacher's probabilities from the student's.

    .. math:: \tau^2 \operatorname{KL}(p_\tau \,\|\, q_\tau).

    Args:
        logits: of the student, ``(..., C)``.
        teacher: logits, likewise.
        temperature: tau, which both are divided by.

    Returns:
        ``(...)``.

    Source:
        Hinton, Vinyals and Dean (2015), Distilling the knowledge in a neural network, section 2.
    """
    p = functional.log_softmax(teacher / temperature, -1)
    q = functional.log_softmax(logits / temperature, -1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def mean_over_seen(values: Tensor, padding: Tensor | None) -> Tensor:
    """Mean over the batch and the tokens that are seen, a number.

    Args:
        values: ``(B, T)``.
        padding: ``(B, T)``, ``True`` for what is left out; ``None``: nothing is.
    """
    if padding is None:
        return values.mean()
    return torch.where(padding, 0.0, values).sum() / (~padding).sum().clamp(min=1)
