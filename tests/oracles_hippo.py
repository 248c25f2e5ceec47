"""Oracles for gpseq.hippo that share nothing with it: rational polynomials and mpmath at 40 digits."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import comb

import mpmath
import torch
from torch import Tensor

DIGITS = 40


def shifted_legendre(m: int) -> list[int]:
    """Coefficients of P_m(2 x - 1), by rising powers of x."""
    return [(-1) ** (m + k) * comb(m, k) * comb(m + k, k) for k in range(m + 1)]


def autocorrelation(l: int, m: int) -> list[Fraction]:
    """Coefficients, by rising powers of r, of integral_r^1 P_l(2 x - 1) P_m(2 (x - r) - 1) dx."""
    result = [Fraction(0)] * (l + m + 2)
    for j, a in enumerate(shifted_legendre(l)):
        for k, b in enumerate(shifted_legendre(m)):
            for i in range(k + 1):  # x^(i + j) (-r)^(k - i), integrated over x from r to 1
                term = Fraction(a * b * comb(k, i) * (-1) ** (k - i), i + j + 1)
                result[k - i] += term
                result[k + j + 1] -= term
    return result


@cache
def _kuu(order: int, lengthscale: str) -> tuple[tuple[float, ...], ...]:
    with mpmath.workdps(DIGITS):
        scale = mpmath.mpf(lengthscale)

        def moment(p: int) -> mpmath.mpf:
            """integral_0^1 r^p exp(-r^2 / 2 scale^2) dr"""
            half = mpmath.mpf(p + 1) / 2
            return (2 * scale**2) ** half * mpmath.gammainc(half, 0, 1 / (2 * scale**2)) / 2

        moments = [moment(p) for p in range(2 * order)]

        def entry(l: int, m: int) -> float:
            both = zip(autocorrelation(l, m), autocorrelation(m, l), moments, strict=False)
            total = mpmath.fsum(mpmath.mpf((a + b).numerator) / (a + b).denominator * value for a, b, value in both)
            return float(mpmath.sqrt((2 * l + 1) * (2 * m + 1)) * total)

        return tuple(tuple(entry(l, m) for m in range(order)) for l in range(order))


def rbf_kuu(order: int, lengthscale: str) -> Tensor:
    """Covariance of the LegS coefficients on [0, 1] under an RBF kernel, in closed form.

    The lag r is integrated against the autocorrelation of the basis, a polynomial with rational coefficients, so that
    only incomplete gamma functions remain. The lengthscale is a string: "0.2" is meant to all digits.
    """
    return torch.tensor(_kuu(order, lengthscale), dtype=torch.float64)


def legendre(order: int, x: float) -> list[float]:
    """P_0(x), ..., P_{order-1}(x)."""
    with mpmath.workdps(DIGITS):
        values = [mpmath.mpf(1), mpmath.mpf(x)]
        for k in range(1, order):
            values.append(((2 * k + 1) * values[1] * values[k] - k * values[k - 1]) / (k + 1))
        return [float(value) for value in values[:order]]


def legendre_rule(num_nodes: int, guess: float) -> tuple[float, float]:
    """The Gauss-Legendre node next to a guess, and its weight."""
    n = num_nodes
    with mpmath.workdps(DIGITS):
        x = mpmath.mpf(guess)
        for _ in range(4):
            before, value = mpmath.mpf(1), x
            for k in range(1, n):
                before, value = value, ((2 * k + 1) * x * value - k * before) / (k + 1)
            slope = n * (before - x * value) / (1 - x * x)
            x -= value / slope
        return float(x), float(2 / ((1 - x * x) * slope**2))


def spherical_jn(m: int, x: float) -> float:
    """Spherical Bessel function of the first kind."""
    with mpmath.workdps(DIGITS):
        z = mpmath.mpf(x)
        return float(mpmath.sqrt(mpmath.pi / (2 * z)) * mpmath.besselj(m + mpmath.mpf(1) / 2, z))
