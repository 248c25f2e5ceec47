"""The frequency route: Fourier transforms of the LegS functionals, and covariances from a kernel's spectrum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpseq.hippo.arguments import check_count, finite, interval, modes, number
from gpseq.hippo.legs import legs_nodes, legs_weights

#: The RBF spectrum is cut at this many inverse lengthscales; 2e-19 of its mass lies beyond.
_RBF_CUTOFF = 9.0


def spherical_bessel(order: int, x: Tensor) -> Tensor:
    r"""Spherical Bessel functions of the first kind :math:`j_0, \dots, j_{M-1}`, differentiable in x.

    .. math:: j_{m+1}(x) = \frac{2m + 1}{x} j_m(x) - j_{m-1}(x), \qquad
        j_m'(x) = \frac{m \, j_{m-1}(x) - (m + 1) \, j_{m+1}(x)}{2m + 1}, \qquad j_m(-x) = (-1)^m j_m(x)

    The recurrence runs upward where it is stable, for :math:`|x| \ge M`, and downward from far above elsewhere.

    Args:
        order: number of functions M.
        x: where to evaluate, any shape and sign.

    Returns:
        ``(M, *x.shape)``, float64.

    Raises:
        ValueError: ``order < 1``, or x is not finite.

    Source:
        DLMF 10.51; downward recurrence: DLMF 3.6(iii), Miller's algorithm.

    Example:
        >>> spherical_bessel(3, torch.tensor([0.0, 1.0])).mT
        tensor([[1.0000, 0.0000, 0.0000],
                [0.8415, 0.3012, 0.0620]], dtype=torch.float64)
    """
    check_count("order", order)
    return _SphericalBessel.apply(order, finite("x", x))


class _SphericalBessel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: int, x: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(x)
        size = x.abs().flatten()
        small, large = size < 1e-4, size >= order
        result = size.new_empty(order, len(size))
        result[:, small] = _bessel_series(order, size[small])
        result[:, large] = _bessel_upward(order, size[large])
        result[:, ~(small | large)] = _bessel_downward(order, size[~(small | large)])
        result[1::2] *= torch.sign(x.flatten())
        return result.reshape(order, *x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        j = spherical_bessel(ctx.order + 1, x)
        m = modes(ctx.order, x)
        # For m = 0 roll brings in a row that does not belong there, and m annihilates it.
        derivative = (m * j.roll(1, 0)[:-1] - (m + 1) * j[1:]) / (2 * m + 1)
        return None, (grad * derivative).sum(0)


def _bessel_series(order: int, x: Tensor) -> Tensor:
    """Two terms of the power series: the next is of order x^4."""
    odd = 2 * modes(order, x) + 1
    leading = torch.cumprod(torch.cat([torch.ones_like(x)[None], x / odd[1:]]), dim=0)
    return leading * (1 - x**2 / (2 * (odd + 2)))


def _bessel_upward(order: int, x: Tensor) -> Tensor:
    j = [torch.sin(x) / x]
    j.append((j[0] - torch.cos(x)) / x)
    for m in range(1, order - 1):
        j.append((2 * m + 1) / x * j[m] - j[m - 1])
    return torch.stack(j[:order])


def _bessel_downward(order: int, x: Tensor) -> Tensor:
    """Any solution of the recurrence, started where j is negligible, turns into a multiple of j on its way down."""
    # The way must lead through the zone around m = |x| <= order, which is order^(1/3) wide, before it reaches order.
    first = order + 30 + int(9 * order ** (1 / 3))
    above, here, rescalings = torch.zeros_like(x), torch.ones_like(x), torch.zeros_like(x)
    rows: list[tuple[Tensor, Tensor]] = []
    for m in range(first, 0, -1):
        above, here = here, (2 * m + 1) / x * here - above
        large = here.abs() > 1e150
        above, here = (torch.where(large, value * 1e-150, value) for value in (above, here))
        rescalings = rescalings + large
        if m <= order:
            rows.insert(0, (here, rescalings))
    solution = torch.stack([row * 1e-150 ** (rescalings - before) for row, before in rows])
    # The factor is read off at j_0 or j_1: they have no zero in common.
    j = _bessel_upward(2, x)
    return solution * torch.where(j[0].abs() > j[1].abs(), j[0] / here, j[1] / above)


def legs_fourier(order: int, frequency: Tensor, start: float | Tensor, horizon: float | Tensor) -> Tensor:
    r"""Fourier transform of the LegS functionals, differentiable in frequency and in both ends.

    .. math:: z_m(\omega) = \int e^{i \omega x} \phi_m(x) \, dx
        = \sqrt{2m + 1} \; i^m \, e^{i \omega (t_0 + T) / 2} \, j_m\bigl(\omega (T - t_0) / 2\bigr)

    Args:
        order: number of modes M.
        frequency: angular frequencies, any shape, in radians per unit of time.
        start: where the interval begins, a number.
        horizon: where it ends, a number.

    Returns:
        ``(M, *frequency.shape)``, complex128.

    Raises:
        ValueError: ``order < 1``, ``horizon <= start``, or something is not finite.

    Source:
        DLMF 10.54.2.

    Example:
        >>> legs_fourier(2, torch.tensor([0.0, math.pi]), start=-1.0, horizon=1.0).abs()
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5513]], dtype=torch.float64)
    """
    start, horizon = interval(start, horizon)
    frequency = finite("frequency", frequency)
    j = spherical_bessel(order, frequency * (horizon - start) / 2)
    m = modes(order, frequency)
    turn = torch.tensor([1, 1j, -1, -1j], device=frequency.device, dtype=torch.complex128)[m.long() % 4]
    return torch.sqrt(2 * m + 1) * turn * torch.exp(1j * frequency * (start + horizon) / 2) * j


def rbf_spectral_quadrature(
    lengthscale: float | Tensor, span: float | Tensor, num_nodes: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Frequencies and weights that integrate the spectrum of the RBF kernel with unit variance.

    .. math:: k(r) = e^{-r^2 / 2 \ell^2} = \int_0^\infty 2 S(\omega) \cos(\omega r) \, d\omega
        \approx \sum_j s_j \cos(\omega_j r), \qquad S(\omega) = \frac{\ell}{\sqrt{2 \pi}} e^{-\omega^2 \ell^2 / 2}

    Args:
        lengthscale: a positive number; the frequencies are differentiable in it.
        span: the largest distance r to be represented, a number, not negative: the length of the interval or, for
            covariances with points beyond it, of what holds them all.
        num_nodes: number of frequencies J; None means 30 + 2.5 span / lengthscale, which is exact to about 1e-11.

    Returns:
        Frequencies ``(J,)``, positive, and weights ``(J,)``, which sum to 1 and stand for both half-lines; float64.

    Raises:
        ValueError: lengthscale not positive, span negative, ``num_nodes < 1``, or something is not finite.

    Example:
        >>> frequency, weights = rbf_spectral_quadrature(lengthscale=0.5, span=1.0)
        >>> weights @ torch.cos(frequency * 1.0) - math.exp(-2.0) < 1e-12
        tensor(True)
    """
    lengthscale, span = number("lengthscale", lengthscale), number("span", span)
    if not lengthscale > 0:
        raise ValueError(f"lengthscale must be positive, got {lengthscale.item()}")
    if not span >= 0:
        raise ValueError(f"span must not be negative, got {span.item()}")
    if num_nodes is None:
        num_nodes = math.ceil(30 + 2.5 * (span / lengthscale).item())
    scaled = legs_nodes(num_nodes, 0.0, _RBF_CUTOFF).to(lengthscale.device)  # frequency times lengthscale
    weights = legs_weights(1, num_nodes)[0].to(scaled.device)
    return scaled / lengthscale, 2 * _RBF_CUTOFF * weights * torch.exp(-(scaled**2) / 2) / math.sqrt(2 * math.pi)


def spectral_kuu(z: Tensor, weights: Tensor) -> Tensor:
    r"""Covariance of the coefficients with one another, from the spectrum of a stationary kernel.

    .. math:: K_{lm} = \int S(\omega) \, \mathrm{Re}[z_l \bar z_m] \, d\omega

    Args:
        z: transforms at J frequencies, ``(M, J)``, from :func:`legs_fourier`.
        weights: spectral weights of the same frequencies, ``(J,)``, from :func:`rbf_spectral_quadrature`.

    Returns:
        ``(M, M)``, symmetric, positive semi-definite.

    Example:
        >>> frequency, weights = rbf_spectral_quadrature(lengthscale=0.2, span=1.0)
        >>> spectral_kuu(legs_fourier(2, frequency, 0.0, 1.0), weights).diagonal()
        tensor([0.4213, 0.2741], dtype=torch.float64)
    """
    return spectral_cross(z, z, weights)


def spectral_kuf(z: Tensor, frequency: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    r"""Covariance of the coefficients with the function at points, from the spectrum of a stationary kernel.

    .. math:: K_m(x) = \int S(\omega) \, \mathrm{Re}[e^{-i \omega x} z_m(\omega)] \, d\omega

    Args:
        z: transforms at J frequencies, ``(M, J)``.
        frequency: the frequencies, ``(J,)``.
        weights: their spectral weights, ``(J,)``.
        x: times, ``(n,)``, inside or outside the interval.

    Returns:
        ``(M, n)``, float64.

    Example:
        >>> frequency, weights = rbf_spectral_quadrature(lengthscale=0.2, span=1.0)
        >>> spectral_kuf(legs_fourier(2, frequency, 0.0, 1.0), frequency, weights, torch.tensor([0.3])).mT
        tensor([[ 0.4677, -0.2794]], dtype=torch.float64)
    """
    return ((z * weights) @ torch.exp(-1j * torch.outer(frequency, finite("x", x)))).real


def spectral_cross(z_a: Tensor, z_b: Tensor, weights: Tensor) -> Tensor:
    r"""Covariance between coefficients in two bases, from the spectrum of a stationary kernel.

    .. math:: K_{lm} = \int S(\omega) \, \mathrm{Re}[z^{(a)}_l \bar z^{(b)}_m] \, d\omega

    Args:
        z_a: transforms of one basis at J frequencies, ``(M_a, J)``.
        z_b: transforms of the other at the same frequencies, ``(M_b, J)``.
        weights: spectral weights, ``(J,)``.

    Returns:
        ``(M_a, M_b)``, float64.

    Example:
        >>> frequency, weights = rbf_spectral_quadrature(lengthscale=0.2, span=2.0)
        >>> old, new = (legs_fourier(2, frequency, 0.0, horizon) for horizon in (1.0, 2.0))
        >>> spectral_cross(old, new, weights).shape
        torch.Size([2, 2])
    """
    return ((z_a * weights) @ z_b.mH).real
