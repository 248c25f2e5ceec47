r"""Matérn processes in time as stationary Gauss-Markov chains: how the state moves over a gap, and what it loses.

A process of smoothness :math:`\nu = S - \tfrac12` is the first entry of a state of its first S derivatives, in units of
:math:`1 / \lambda`, :math:`\lambda = \sqrt{2 \nu} / \ell`:

.. math:: z(t) = (f, f' / \lambda, f'' / \lambda^2), \qquad z(t + d) = A(s)\, z(t) + e, \quad e \sim N(0, Q(s)), \quad
    s = \lambda d .

In these units A, Q and the stationary covariance depend on s alone, and all numbers are of order one, whatever the unit
of time. Variances are one; scale f to change that.

Source:
    Hartikainen and Särkkä (2010), Kalman filtering and smoothing solutions to temporal Gaussian process regression
    models. The process noise in terms of gamma distributions is derived here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpseq.checks import check_floating

# A(s) = exp(-s) sum_k s^k N^k / k!, with N = F + I nilpotent: the powers N^k / k!, (S, S, S).
_POWERS = {
    "matern12": (((1,),),),
    "matern32": (((1, 0), (0, 1)), ((1, 1), (-1, -1))),
    "matern52": (
        ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((1, 1, 0), (0, 1, 1), (-1, -3, -2)),
        ((0.5, 1, 0.5), (-0.5, -1, -0.5), (0.5, 1, 0.5)),
    ),
}
# Q(s) = sum_k C_k P(k, 2s), k = 1..2S-1, with P(k, .) the distribution function of a gamma variable of shape k. Each
# C_k collects the terms of power k - 1 in the products of derivatives of the impulse response, (2S-1, S, S).
_NOISES = {
    "matern12": (((1,),),),
    "matern32": (((0, 0), (0, 2)), ((0, 1), (1, -2)), ((1, -1), (-1, 1))),
    "matern52": (
        ((0, 0, 0), (0, 0, 0), (0, 0, 8 / 3)),
        ((0, 0, 0), (0, 0, 4 / 3), (0, 4 / 3, -16 / 3)),
        ((0, 0, 2 / 3), (0, 4 / 3, -10 / 3), (2 / 3, -10 / 3, 20 / 3)),
        ((0, 1, -2), (1, -2, 3), (-2, 3, -4)),
        ((1, -1, 1), (-1, 1, -1), (1, -1, 1)),
    ),
}
_STATIONARY = {
    "matern12": ((1,),),
    "matern32": ((1, 0), (0, 1)),
    "matern52": ((1, 0, -1 / 3), (0, 1 / 3, 0), (-1 / 3, 0, 1)),
}
#: Kernels that have a state space here.
KERNELS = tuple(_POWERS)
#: Beyond so many units nothing is left of a state: exp(-1000) is zero in float64.
_FORGOTTEN = 1e3


def state_dimension(kernel: str) -> int:
    """S, the number of entries of the state.

    Args:
        kernel: ``"matern12"``, ``"matern32"`` or ``"matern52"``.

    Raises:
        ValueError: another kernel.

    Example:
        >>> state_dimension("matern32")
        2
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}.")
    return len(_STATIONARY[kernel])


def stationary_covariance(
    kernel: str, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    r"""Covariance of the state at any time, in units in which it does not depend on the lengthscale.

    Args:
        kernel: ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        dtype: of the answer.
        device: of the answer.

    Returns:
        :math:`P_\infty`, ``(S, S)``; its first entry, the variance of f, is 1.

    Raises:
        ValueError: another kernel.

    Example:
        >>> stationary_covariance("matern52")
        tensor([[ 1.0000,  0.0000, -0.3333],
                [ 0.0000,  0.3333,  0.0000],
                [-0.3333,  0.0000,  1.0000]], dtype=torch.float64)
    """
    state_dimension(kernel)
    return torch.tensor(_STATIONARY[kernel], dtype=dtype, device=device)


def transition(kernel: str, gap: Tensor, lengthscale: Tensor) -> Tensor:
    r"""What the state at the end of a gap is expected to be, as a matrix on the state at its start.

    .. math:: A(s) = e^{F s} = e^{-s} \sum_{k < S} \frac{s^k}{k!} (F + I)^k, \qquad s = \sqrt{2 \nu}\, d / \ell,

    with F the companion matrix of :math:`(D + 1)^S`, of which :math:`F + I` is nilpotent.

    Args:
        kernel: ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        gap: d, ``(*shape)``, not negative, in the unit of the lengthscale.
        lengthscale: positive; broadcasts with ``gap``.

    Returns:
        A, ``(*shape, S, S)``; the identity where the gap is zero.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: another kernel.

    Example:
        >>> transition("matern12", torch.tensor([0.0, 2.0]), torch.tensor(1.0)).flatten()
        tensor([1.0000, 0.1353])
    """
    s = _units(kernel, gap, lengthscale)
    powers = torch.tensor(_POWERS[kernel], dtype=s.dtype, device=s.device)
    weight, out = (-s).exp(), torch.zeros((), dtype=s.dtype, device=s.device)
    for power in powers:
        out = out + _outside(power, s) * weight
        weight = weight * s
    return _matrices_last(out)


def process_noise(kernel: str, gap: Tensor, lengthscale: Tensor) -> Tensor:
    r"""Covariance of what is new in the state at the end of a gap.

    .. math:: Q(s) = P_\infty - A P_\infty A^\top = \sum_{k=1}^{2S-1} C_k P(k, 2s), \qquad
        P(k, y) = 1 - e^{-y} \sum_{i < k} \frac{y^i}{i!} .

    The difference loses all digits over short gaps, over which the first entry of Q shrinks as the power 2S - 1 of the
    gap. The sum loses none: of the P(k, .), the last is an incomplete gamma function, and each of the others is its
    successor plus a positive term.

    Args:
        kernel: ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        gap: d, ``(*shape)``, not negative, in the unit of the lengthscale.
        lengthscale: positive; broadcasts with ``gap``.

    Returns:
        Q, ``(*shape, S, S)``; zero where the gap is zero.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: another kernel.

    Example:
        >>> gap, lengthscale = torch.tensor(1e-3).double(), torch.tensor(1.0).double()
        >>> process_noise("matern32", gap, lengthscale)  # the first entry is about 4 s^3 / 3
        tensor([[6.9102e-09, 5.9793e-06],
                [5.9793e-06, 6.9043e-03]], dtype=torch.float64)
    """
    y = 2 * _units(kernel, gap, lengthscale)
    coefficients = torch.tensor(_NOISES[kernel], dtype=y.dtype, device=y.device)
    last = len(coefficients)
    if last == 1:  # the gradient of the incomplete gamma function is not a number for shape 1 at zero
        tail = -torch.expm1(-y)
    else:
        tail = torch.special.gammainc(torch.full((), last, dtype=y.dtype, device=y.device), y)
    out = _outside(coefficients[-1], y) * tail
    for k in range(last - 1, 0, -1):
        tail = tail + (-y).exp() * y**k / math.factorial(k)
        out = out + _outside(coefficients[k - 1], y) * tail
    return _matrices_last(out)


def _units(kernel: str, gap: Tensor, lengthscale: Tensor) -> Tensor:
    """S, the gap in units of the process."""
    nu = state_dimension(kernel) - 0.5
    check_floating("gap", gap)
    check_floating("lengthscale", lengthscale)
    return (math.sqrt(2 * nu) * gap / lengthscale).clamp(max=_FORGOTTEN)


def _outside(matrix: Tensor, like: Tensor) -> Tensor:
    """``(S, S)`` as ``(S, S, 1, ...)``: small axes first, so that sums over them run along long vectors."""
    return matrix.reshape(*matrix.shape, *[1] * like.dim())


def _matrices_last(value: Tensor) -> Tensor:
    """``(S, S, *shape)`` as ``(*shape, S, S)``, without moving it in memory."""
    return value.movedim((0, 1), (-2, -1))
