"""Moments of piecewise linear functions of a Gaussian, in closed form: pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

_FAR = 40.0  # standard deviations: no mass beyond, in any dtype


def piecewise_linear_moments(
    mean: Tensor,
    variance: Tensor,
    slope: float | Tensor,
    offset: float,
    kinks: Sequence[float],
    jumps: Sequence[float | Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean, gain and remainder of a continuous piecewise linear function of h ~ N(m, v).

    .. math:: g(h) = c + b h + \sum_i d_i (h - k_i)_+

    A hinge :math:`(h - k)_+` and its mirror image :math:`(k - h)_+` differ by a line, which adds nothing to the
    remainder. So each hinge opens away from the mean, with its corner at :math:`u = |m - k| / s`, and everything
    follows from its moments :math:`T_n(u) = E (z - u)_+^n`, none of which comes from cancellation; a single hinge has
    the remainder :math:`v (T_2 - T_1^2 - T_0^2)`.

    Args:
        mean: m, any shape.
        variance: v, of the same shape.
        slope: b, the slope left of all kinks.
        offset: c.
        kinks: k, ascending.
        jumps: d, by how much the slope grows at each kink.

    Returns:
        The mean, the gain and the remainder, all of the shape of m. Where the variance is 0 they are g(m), g'(m) (at a
        kink the slope left of it) and 0.

    Example:
        >>> relu = dict(slope=0.0, offset=0.0, kinks=[0.0], jumps=[1.0])
        >>> mean, gain, remainder = piecewise_linear_moments(torch.tensor([0.5]), torch.tensor([0.25]), **relu)
        >>> mean, gain, gain.square() * 0.25 + remainder
        (tensor([0.5417]), tensor([0.8413]), tensor([0.1878]))
    """
    positive = variance > 0
    scale = torch.where(positive, variance, 1.0).sqrt()
    hinges = [_hinge(mean - kink, scale, positive) for kink in kinks]
    average = offset + slope * mean
    here = slope + torch.zeros_like(mean)  # slopes where the mean is, which are exact, before the tails
    beyond = torch.zeros_like(mean)
    remainder = torch.zeros_like(mean)
    for kink, jump, hinge in zip(kinks, jumps, hinges, strict=True):
        average = average + jump * ((mean - kink).relu() + scale * hinge.mean)
        here = here + jump * (~hinge.below).to(mean.dtype)
        beyond = beyond + jump * torch.where(hinge.below, hinge.probability, -hinge.probability)
        remainder = remainder + jump * jump * (hinge.square - hinge.mean.square() - hinge.probability.square())
    for (left, left_jump), (right, right_jump) in combinations(zip(hinges, jumps, strict=True), 2):
        remainder = remainder + 2 * left_jump * right_jump * _cross(left, right)
    return average, here + beyond, (variance * remainder).clamp_min(0)


class _Hinge(NamedTuple):
    """A hinge that opens away from the mean, in standard deviations.

    Attributes:
        below: the mean lies at or left of the corner.
        corner: u, how far away.
        probability: T_0.
        mean: T_1.
        square: T_2.
    """

    below: Tensor
    corner: Tensor
    probability: Tensor
    mean: Tensor
    square: Tensor


def _hinge(excess: Tensor, scale: Tensor, positive: Tensor) -> _Hinge:
    """The hinge whose corner is ``excess`` left of the mean."""
    below = excess <= 0
    # Not abs(), whose gradient at 0 belongs to neither side.
    corner = (torch.where(below, -excess, excess) / scale).clamp_max(_FAR)
    corner = torch.where(positive, corner, _FAR)  # no variance: no mass beyond
    return _Hinge(below, corner, *_tail_moments(corner))


def _tail_moments(corner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T_0, T_1 and T_2 at u >= 0, each good relative to itself.

    They obey T_{n+1} = n T_{n-1} - u T_n, a difference of ever closer numbers as u grows; there the ratios
    T_n / T_{n-1} = n / (u + T_{n+1} / T_n) are taken backwards, as a continued fraction of positive terms.
    """
    probability = 0.5 * torch.erfc(corner * math.sqrt(0.5))
    density = torch.exp(-0.5 * corner.square()) * (1 / math.sqrt(2 * math.pi))
    mean = density - corner * probability
    square = probability - corner * mean
    depth = 28 if corner.dtype == torch.float64 else 10
    ratio = 0.5 * ((corner.square() + (4 * depth - 2)).sqrt() - corner)  # the fixed point, about
    for n in range(depth - 1, 1, -1):
        ratio = n / (corner + ratio)
    far_mean = probability / (corner + ratio)
    far = corner > 3
    return probability, torch.where(far, far_mean, mean), torch.where(far, far_mean * ratio, square)


def _cross(left: _Hinge, right: _Hinge) -> Tensor:
    """What two hinges have in common, less what they have in common with a constant and a line."""
    same_side = left.below == right.below
    # Opposite ways they are never positive together. The same way, the farther one is positive inside the other.
    far_mean = torch.where(right.below, right.mean, left.mean)
    far_square = torch.where(right.below, right.square, left.square)
    product = far_square + (left.corner - right.corner).abs() * far_mean
    lines = left.probability * right.probability
    return torch.where(same_side, product - lines, lines) - left.mean * right.mean
