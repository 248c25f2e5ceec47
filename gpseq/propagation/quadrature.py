"""Moments of any elementwise function of a Gaussian, by quadrature: pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def quadrature_moments(
    function: Callable[[Tensor], Tensor],
    mean: Tensor,
    variance: Tensor,
    kinks: Sequence[float] = (),
    num_nodes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean, gain and remainder of g(h), h ~ N(m, v), at nodes that follow the variance.

    What is summed up is the distance e of g from a line through (m, g(m)) that lies close to it,

    .. math:: e(z) = g(m + s z) - g(m) - c s z, \quad
        E g = g(m) + E e, \quad \gamma = c + \frac{E e z}{s}, \quad
        \operatorname{Var} g - \gamma^2 v = E e^2 - (E e)^2 - (E e z)^2

    so that no term is much larger than the remainder, and one pass over the nodes is enough.

    Args:
        function: g, elementwise; must not write into its input.
        mean: m, any shape.
        variance: v, of the same shape.
        kinks: where g is not smooth, in ascending order.
        num_nodes: nodes of each smooth piece; by default 97 in float32 and 161 in float64, and 32 and 56 between kinks.
            Fewer are enough where the standard deviation is small beside the scale on which g bends.

    Returns:
        The mean, the gain and the remainder, all of the shape of m. Where the variance is 0 they are g(m), g'(m) and 0,
        and their gradient in v is 0.

    Example:
        >>> mean, gain, remainder = quadrature_moments(torch.tanh, torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
        >>> gain
        tensor([0.7864, 0.5620])
    """
    positive = variance > 0
    # Two steps, so that the gradient of the root at 0 is 0 and not NaN.
    scale = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
    value, tangent = value_and_slope(function, mean)
    # A difference of values over a smaller step than this is mostly rounding, and the tangent is closer to the gain.
    smallest = (torch.finfo(mean.dtype).eps * (1 + mean.abs())) ** (1 / 3)
    coarse = scale > smallest
    step = torch.maximum(scale, smallest)
    slope = torch.where(coarse, (function(mean + step) - function(mean - step)) / (2 * step), tangent)

    first = torch.zeros_like(mean)
    second = torch.zeros_like(mean)
    slant = torch.zeros_like(mean)
    for z, weight in _nodes(mean, variance, kinks, num_nodes):
        x = mean + scale * z
        # Over the distance as rounded: x - m is exact, and large means do not turn rounding into variance.
        distance = function(x) - torch.addcmul(value, slope, x - mean)
        weighted = distance * weight
        first = first + weighted
        slant = slant + weighted * z
        second = torch.addcmul(second, weighted, distance)
    gain = slope + torch.where(coarse, slant / step, 0.0)
    remainder = second - first.square() - slant.square()
    return value + first, gain, remainder.clamp_min(0)


def value_and_slope(function: Callable[[Tensor], Tensor], mean: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative, both differentiable.

    Args:
        function: g, elementwise.
        mean: where, any shape.

    Returns:
        g(m) and g'(m), of the shape of m.

    Raises:
        ValueError: the function changes the shape.

    Example:
        >>> value_and_slope(torch.square, torch.tensor([3.0]))
        (tensor([9.]), tensor([6.]))
    """
    mean = mean.contiguous()  # an expanded tensor cannot carry a tangent
    value, slope = torch.func.jvp(function, (mean,), (torch.ones_like(mean),))[:2]
    if value.shape != mean.shape:
        raise ValueError(
            f"activation: expected an elementwise function, got {tuple(value.shape)} for an input of shape "
            f"{tuple(mean.shape)}."
        )
    return value, slope


def _nodes(
    mean: Tensor, variance: Tensor, kinks: Sequence[float], num_nodes: int | None
) -> Iterator[tuple[float | Tensor, float | Tensor]]:
    """Nodes z in standard deviations, and their weights: numbers, or tensors where kinks lie elsewhere for each."""
    # Farther than the mass beyond would ask for: what remains of a flat function lives in its tail.
    double = mean.dtype == torch.float64
    if not kinks:
        number = num_nodes or (161 if double else 97)
        # Where nodes are few, what lies between them is worse than what lies beyond them.
        yield from _trapezoid(number, min(8.5 if double else 7.0, math.sqrt(math.pi * number)))
        return
    reach = 8.5
    positive = variance > 0
    scale = torch.where(positive, variance, 1.0).sqrt()
    bounds = [((kink - mean) / scale).clamp(-reach, reach) for kink in kinks]
    bounds = [torch.full_like(mean, -reach), *bounds, torch.full_like(mean, reach)]
    for left, right in pairwise(bounds):
        half = (right - left) / 2
        middle = (right + left) / 2
        for location, weight in legendre(num_nodes or (56 if double else 32)):
            z = middle + half * location
            yield z, (half * (weight / math.sqrt(2 * math.pi))) * torch.exp(-0.5 * z.square())


@lru_cache(maxsize=32)
def _trapezoid(num_nodes: int, reach: float) -> tuple[tuple[float, float], ...]:
    """The trapezoidal rule for a standard normal: exponentially accurate for analytic functions."""
    nodes = np.linspace(-reach, reach, num_nodes)
    weights = np.exp(-0.5 * nodes**2)
    return tuple(zip(nodes.tolist(), (weights / weights.sum()).tolist(), strict=True))


@lru_cache(maxsize=32)
def legendre(num_nodes: int) -> tuple[tuple[float, float], ...]:
    """Locations and weights of Gauss-Legendre quadrature on [-1, 1]."""
    locations, weights = np.polynomial.legendre.leggauss(num_nodes)
    return tuple(zip(locations.tolist(), weights.tolist(), strict=True))
