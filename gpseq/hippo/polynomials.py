"""Classical polynomials and the Gauss rules that belong to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from gpseq.hippo.arguments import check_count, finite, modes

#: The recurrence of Laguerre polynomials is scaled down by this number whenever it passes it.
_LARGE = 1e100


def legendre(order: int, x: Tensor) -> Tensor:
    r"""Legendre polynomials :math:`P_0, \dots, P_{M-1}`, differentiable in x.

    .. math:: (m + 1) P_{m+1}(x) = (2m + 1) \, x \, P_m(x) - m \, P_{m-1}(x), \qquad P_0 = 1, \quad P_1 = x

    Args:
        order: number of polynomials M.
        x: where to evaluate, any shape; stable on [-1, 1], growing like :math:`|2x|^m` outside.

    Returns:
        ``(M, *x.shape)``, float64.

    Raises:
        ValueError: ``order < 1``, or x is not finite.

    Source:
        DLMF 18.9.1.

    Example:
        >>> legendre(3, torch.tensor([-1.0, 0.0, 0.5])).tolist()
        [[1.0, 1.0, 1.0], [-1.0, 0.0, 0.5], [1.0, -0.5, -0.125]]
    """
    check_count("order", order)
    x = finite("x", x)
    polynomials = [torch.ones_like(x), x]
    for m in range(1, order - 1):
        polynomials.append(((2 * m + 1) * x * polynomials[m] - m * polynomials[m - 1]) / (m + 1))
    return torch.stack(polynomials[:order])


def gauss_legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    r"""Nodes and weights of Gauss-Legendre quadrature on [-1, 1].

    .. math:: \int_{-1}^{1} p(x) \, dx = \sum_{q=1}^{Q} w_q \, p(\xi_q) \quad \text{for every polynomial of degree} < 2Q

    Args:
        num_nodes: number of nodes Q.

    Returns:
        Nodes ``(Q,)``, increasing, and weights ``(Q,)``, which sum to 2; float64 on the CPU. They are computed once for
        each Q, and handed out as copies.

    Raises:
        ValueError: ``num_nodes < 1``.

    Source:
        DLMF 3.5(v) and 18.16 (first guess of the nodes).

    Example:
        >>> nodes, weights = gauss_legendre(5)
        >>> weights @ nodes**8 - 2 / 9 < 1e-15
        tensor(True)
    """
    check_count("num_nodes", num_nodes)
    nodes, weights = _gauss_legendre(num_nodes)
    return nodes.clone(), weights.clone()


@lru_cache(maxsize=64)
def _gauss_legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    n = num_nodes
    # Newton's method for the nodes in [0, 1), in theta = arccos(x): there the nodes are evenly spread, and a node close
    # to 1 keeps its relative accuracy. For the same reason the recurrence runs on 1 - x and on P_k - P_{k-1}.
    theta = math.pi * (torch.arange(1, (n + 1) // 2 + 1, dtype=torch.float64) - 0.25) / (n + 0.5)
    slope = torch.ones_like(theta)
    for _ in range(5):  # the first guess is within 2%, and each round squares the error
        gap = 2 * torch.sin(theta / 2) ** 2  # 1 - x
        value, difference = torch.ones_like(theta), torch.zeros_like(theta)
        for k in range(n):
            difference = (k * difference - (2 * k + 1) * gap * value) / (k + 1)
            value = value + difference
        slope = n * (gap * value - difference) / torch.sin(theta)  # -dP_n / dtheta
        theta = theta + value / slope
    nodes, weights = torch.cos(theta), 2 / slope**2
    nodes[n // 2 :] = 0.0  # the middle of an odd rule
    return torch.cat([-nodes[: n // 2], nodes.flip(0)]), torch.cat([weights[: n // 2], weights.flip(0)])


def orthonormal_legendre(order: int, s: Tensor) -> Tensor:
    """sqrt(2 m + 1) P_m(s): orthonormal under the uniform probability on [-1, 1]."""
    return torch.sqrt(2 * modes(order, s) + 1) * legendre(order, s)


def laguerre(order: int, x: Tensor) -> Tensor:
    r"""Laguerre polynomials :math:`L_0, \dots, L_{M-1}`, differentiable in x.

    .. math:: (m + 1) \bigl[ L_{m+1}(x) - L_m(x) \bigr] = m \bigl[ L_m(x) - L_{m-1}(x) \bigr] - x \, L_m(x),
        \qquad L_0 = 1

    Args:
        order: number of polynomials M.
        x: where to evaluate, any shape; up to :math:`e^{x/2}` in size for positive x, without bound for negative x.

    Returns:
        ``(M, *x.shape)``, float64.

    Raises:
        ValueError: ``order < 1``, or x is not finite.

    Source:
        DLMF 18.9.1.

    Example:
        >>> laguerre(3, torch.tensor([0.0, 1.0, 2.0])).tolist()
        [[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -0.5, -1.0]]
    """
    check_count("order", order)
    x = finite("x", x)
    value, difference = torch.ones_like(x), torch.zeros_like(x)
    polynomials = [value]
    for m in range(order - 1):
        difference = (m * difference - x * value) / (m + 1)
        value = value + difference
        polynomials.append(value)
    return torch.stack(polynomials)


def laguerre_functions(order: int, x: Tensor) -> Tensor:
    r"""Laguerre functions :math:`l_m(x) = e^{-x/2} L_m(x)`, orthonormal on the half-line and at most 1 in size.

    Both factors leave the range of float64 where the product is harmless; this never forms them.

    Args:
        order: number of functions M.
        x: where to evaluate, any shape, not negative.

    Returns:
        ``(M, *x.shape)``, float64; not differentiable.

    Raises:
        ValueError: ``order < 1``, or x is negative or not finite.

    Example:
        >>> laguerre_functions(3, torch.tensor([0.0, 2.0, 2000.0]))
        tensor([[ 1.0000,  0.3679,  0.0000],
                [ 1.0000, -0.3679, -0.0000],
                [ 1.0000, -0.3679,  0.0000]], dtype=torch.float64)
    """
    check_count("order", order)
    x = finite("x", x)
    if (x < 0).any():
        raise ValueError(f"x must not be negative, got {x.min().item()}")
    return torch.stack([value * factor for value, _, factor in _laguerre(order, x.detach())])


def _laguerre(order: int, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each m < order: L_m and L_m - L_{m-1}, both divided by a scale that keeps them small, and e^(-x/2) scale."""
    value, difference, rescalings = torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x)
    factor = torch.exp(-x / 2)
    for m in range(order):
        yield value, difference, factor
        difference = (m * difference - x * value) / (m + 1)
        value = value + difference
        large = value.abs() > _LARGE
        if large.any():
            value, difference = (torch.where(large, v / _LARGE, v) for v in (value, difference))
            rescalings = rescalings + large
            factor = torch.exp(rescalings * math.log(_LARGE) - x / 2)


def gauss_laguerre(num_nodes: int) -> tuple[Tensor, Tensor]:
    r"""Nodes and scaled weights of Gauss-Laguerre quadrature on the half-line.

    .. math:: \int_0^\infty e^{-x} p(x) \, dx = \sum_{q=1}^{Q} v_q \, e^{-\xi_q} p(\xi_q)
        \quad \text{for every polynomial of degree} < 2Q,
        \qquad v_q = w_q \, e^{\xi_q} = \frac{\xi_q}{(Q + 1)^2 \, l_{Q+1}(\xi_q)^2}

    The usual weights :math:`w_q` leave the range of float64 from about 200 nodes on; v is of the size of the gaps
    between the nodes, which reach up to 4 Q.

    Args:
        num_nodes: number of nodes Q.

    Returns:
        Nodes ``(Q,)``, increasing, and v ``(Q,)``; float64 on the CPU. They are computed once for each Q, and handed
        out as copies.

    Raises:
        ValueError: ``num_nodes < 1``.

    Source:
        DLMF 3.5(v); Tricomi's approximation for the first guess of the nodes, DLMF 18.16(iv).

    Example:
        >>> nodes, v = gauss_laguerre(5)
        >>> round((v @ (torch.exp(-nodes) * nodes**8)).item())  # 8!
        40320
    """
    check_count("num_nodes", num_nodes)
    nodes, weights = _gauss_laguerre(num_nodes)
    return nodes.clone(), weights.clone()


@lru_cache(maxsize=64)
def _gauss_laguerre(num_nodes: int) -> tuple[Tensor, Tensor]:
    n = num_nodes
    # The first guess: x = (4 n + 2) cos(theta / 2)^2 with theta - sin(theta) evenly spread; it is convex in theta, so
    # Newton's method comes down to the solution from pi.
    phase = math.pi * (4 * torch.arange(n, 0, -1, dtype=torch.float64) - 1) / (4 * n + 2)
    theta = torch.full_like(phase, math.pi)
    for _ in range(20):
        theta = theta - (theta - torch.sin(theta) - phase) / (1 - torch.cos(theta))
    x = (4 * n + 2) * torch.cos(theta / 2) ** 2
    # Newton's method for l_n, which swings evenly where L_n grows; x L_n' = n (L_n - L_{n-1}).
    for _ in range(5):  # the first guess is within 4%, and each round squares the error
        *_, (value, difference, _) = _laguerre(n + 1, x)
        x = x - value / (n * difference / x - value / 2)
    *_, (value, _, factor) = _laguerre(n + 2, x)
    return x, x / ((n + 1) * value * factor) ** 2
