"""Moments of the GELU of a Gaussian, without cancellation: pure functions on tensors."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

#: Variances up to which the series is shorter than the integral.
_SMALL = 0.5
#: What is left out of it, relative to its first term.
_ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}


def gelu_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean, gain and remainder of g(h) = h Φ(h), h ~ N(m, v).

    .. math:: r = \sqrt{1 + v}, \quad E g = m \Phi(m/r) + \frac vr \phi(m/r), \quad
        \gamma = \Phi(m/r) + \frac m{r^3} \phi(m/r)

    The second moment less its main part would lose all digits of a small remainder. With K(ρ) the covariance of g(h)
    and g(h') for h and h' of correlation ρ, and K'' = v^2 E g''(h) g''(h') (Price's theorem),

    .. math:: \operatorname{Var} g - \gamma^2 v = K(1) - K(0) - K'(0)
        = v^2 \int_0^1 (1 - \rho) \, E[g''(h) g''(h')] \, d\rho

    where g'' = (2 - h^2) φ(h) makes the expectation elementary and positive; see :func:`_curvature`. For small
    variances on a CPU Mehler's series of K is shorter; see :func:`_series`.

    Args:
        mean: m, any shape.
        variance: v, of the same shape.

    Returns:
        The mean, the gain and the remainder, all of the shape of m. For v up to 25 and \|m\| up to 3 r the remainder is
        good to 1e-4 in float32 and 1e-8 in float64, for v below 1 far better; to 2e-3 in float32 beyond.

    Source:
        Price (1958), A useful theorem for nonlinear devices having Gaussian inputs; Mehler (1866) for the series.

    Example:
        >>> mean, gain, remainder = gelu_moments(torch.tensor([0.5]), torch.tensor([0.25]))
        >>> mean, gain, remainder
        (tensor([0.4170]), tensor([0.8018]), tensor([0.0093]))
    """
    spread = 1 + variance
    root = spread.sqrt()
    standardised = mean / root
    density = torch.exp(-0.5 * standardised.square()) * (1 / math.sqrt(2 * math.pi))
    below = 0.5 * torch.erfc(standardised * -math.sqrt(0.5))  # Φ, in the far tail too
    average = torch.addcmul(mean * below, variance / root, density)
    inverse = spread.reciprocal()
    gain = torch.addcmul(below, standardised * inverse, density)
    terms = _terms(variance)
    if terms is not None:
        return average, gain, _series(standardised, variance, inverse, density, terms)
    return average, gain, _remainder(mean, variance, spread, root)


def _terms(variance: Tensor) -> int | None:
    """How many terms of the series are enough, ``None`` where the integral is shorter or a look would stop a device."""
    if (
        variance.device.type != "cpu"
        or not variance.numel()
        or torch._C._functorch.is_functorch_wrapped_tensor(variance)
    ):
        return None
    largest = variance.detach().max().item()
    if not 0 < largest <= _SMALL:
        return None if largest else 2
    # Each term is smaller than the one before by more than v / (1 + v).
    return 2 + math.ceil(math.log(_ROUNDING[variance.dtype]) / math.log(largest / (1 + largest)))


def _series(standardised: Tensor, variance: Tensor, inverse: Tensor, density: Tensor, terms: int) -> Tensor:
    r"""The remainder by the derivatives of E g, all terms of which are positive.

    .. math:: \sum_{k \ge 2} \frac{v^k}{k!} \bigl( E g^{(k)}(h) \bigr)^2
        = r^2 \phi(z)^2 \sum_{k \ge 2} \frac{q^k}{k!} \Bigl( He_{k-2}(z) - \frac{He_k(z)}{r^2} \Bigr)^2,
        \qquad z = m/r, \quad q = v/r^2

    Args:
        standardised: z.
        variance: v.
        inverse: one by r^2.
        density: φ(z).
        terms: the last k.
    """
    share = variance * inverse
    point = standardised.clamp(-15, 15)  # where φ(z) is zero the polynomials shall stay finite
    # He_k times q^(k // 2): a root of q would have no slope at zero.
    even, odd = torch.ones_like(point), point
    evens = odds = torch.zeros_like(point)
    for k in range(2, terms + 1):
        weight = 1 / math.factorial(k)
        if k % 2 == 0:
            lower, raised = share * even, share * odd
            even = torch.add(point * raised, lower, alpha=1 - k)
            slope = torch.addcmul(lower, inverse, even, value=-1)
            evens = torch.addcmul(evens, slope, slope, value=weight)
        else:
            odd = torch.add(point * even, raised, alpha=1 - k)
            slope = torch.addcmul(raised, inverse, odd, value=-1)
            odds = torch.addcmul(odds, slope, slope, value=weight)
    total = torch.addcmul(evens, share, odds)
    return total * density.square() / inverse


def _remainder(mean: Tensor, variance: Tensor, spread: Tensor, root: Tensor) -> Tensor:
    r"""The integral of the curvature's covariance.

    With b = v (1 - ρ), towards ρ = 1 the integrand changes on the scale of 1 + b, from 1 to 1 + v. In x, with
    1 + b = (1 + x)^4, it is smooth enough for a handful of nodes whatever v.
    """
    top = variance / ((root + 1) * (root.sqrt() + 1))  # (1 + v)^(1/4) - 1
    minus_square = -mean.square()
    total = torch.zeros_like(mean)
    for location, weight in _radau(13 if mean.dtype == torch.float64 else 6):
        x = top * location
        fourth_root = 1 + x
        square_root = fourth_root.square()
        linear = torch.addcmul(x, x, fourth_root)
        b = torch.addcmul(linear, linear, square_root)  # (1 + x)^4 - 1, without the difference
        curvature = _curvature(minus_square, variance - b, spread, square_root.square())
        total = torch.addcmul(total, b * fourth_root, curvature, value=weight)
    # db = 4 (1 + x)^3 dx, of which (1 + x)^2 goes with the root of 1 + b.
    return (top * total * (2 / math.pi)).clamp_min(0)


def _curvature(minus_square: Tensor, shared: Tensor, spread: Tensor, apart: Tensor) -> Tensor:
    r"""E[(2 - h^2)(2 - h'^2) exp(-(h^2 + h'^2)/2)] times the root of 1 + b, h and h' of mean m and covariance v ρ.

    The exponential turns their joint Gaussian into another one, of mean μ = m / (1 + a), variance
    1 - (1/(1 + a) + 1/(1 + b))/2 and covariance c = v ρ / ((1 + a)(1 + b)), where a = v (1 + ρ) and b = v (1 - ρ);
    under that one the expectation is (2 - μ^2 - variance)^2 + 2 c^2 + 4 μ^2 c, all terms of which are positive.

    Args:
        minus_square: -m^2.
        shared: v ρ.
        spread: 1 + v.
        apart: 1 + b.
    """
    together = spread + shared  # 1 + a
    both = (together * apart).reciprocal()
    inverse = apart * both
    exponent = minus_square * inverse
    minus_centre = exponent * inverse  # -μ^2
    covariance = shared * both
    level = torch.addcmul(minus_centre + 1, spread, both)  # 2 - μ^2 - variance
    polynomial = torch.addcmul(level.square(), covariance, torch.sub(covariance, minus_centre, alpha=2), value=2)
    return exponent.exp() * inverse.sqrt() * polynomial


@lru_cache(maxsize=4)
def _radau(num_nodes: int) -> tuple[tuple[float, float], ...]:
    """Locations and weights of Gauss-Radau quadrature on [0, 1], without its node at 0: there the integrand is 0."""
    before, last = np.eye(num_nodes + 1)[num_nodes - 1 : num_nodes + 1]  # Legendre polynomials
    locations = np.sort(np.polynomial.legendre.legroots(before + last))[1:]
    weights = (1 - locations) / (num_nodes * np.polynomial.legendre.legval(locations, before)) ** 2
    return tuple(zip((0.5 + 0.5 * locations).tolist(), (0.5 * weights).tolist(), strict=True))
