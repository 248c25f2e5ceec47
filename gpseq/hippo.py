r"""HiPPO-LegS: a function on an interval held in its first Legendre coefficients.

.. math:: c_m = \int f(x) \phi_m(x) \, dx, \qquad \phi_m(x) = \frac{g_m(x)}{T - t_0}, \qquad m = 0, \dots, M - 1

with :math:`g_m` the Legendre polynomials on :math:`[t_0, T]` (start and horizon), orthonormal under the uniform
probability. Three routes lead to the same numbers: quadrature (nodes and weights), a recurrence that follows a growing
horizon step by step (there time is measured from the start), and a closed form in the frequency domain.

Pure functions on tensors. Two conventions serve throughout: any floating dtype may come in, float64 comes out; and
axis 0 of a result counts the modes m, whatever shape the rest has.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: Where in a cell a scheme of the recurrence reads the signal, 0 its start and 1 its end; "exact" reads it at nodes.
_READ_AT = {"exact-held": 1.0, "zoh": 0.5, "midpoint": 0.5, "bilinear": 1.0, "backward": 1.0, "euler": 1.0}

#: What share of A c a scheme takes at the end of the step; the schemes that are not here use the exact propagator.
_IMPLICIT = {"midpoint": 0.5, "bilinear": 0.5, "backward": 1.0, "euler": 0.0}

#: The RBF spectrum is cut at this many inverse lengthscales; 2e-19 of its mass lies beyond.
_RBF_CUTOFF = 9.0


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
    _check_count("order", order)
    x = _finite("x", x)
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
    _check_count("num_nodes", num_nodes)
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


def legs_basis(order: int, x: Tensor, start: float | Tensor, horizon: float | Tensor) -> Tensor:
    r"""The orthonormal Legendre basis on [start, horizon], differentiable in x and in both ends.

    .. math:: g_m(x) = \sqrt{2m + 1} \; P_m\!\left(2 \, \frac{x - t_0}{T - t_0} - 1\right)

    Given coefficients u ``(M,)``, ``u @ legs_basis(M, x, start, horizon)`` is the function that they stand for.

    Args:
        order: number of modes M.
        x: times, any shape, in the unit of start and horizon.
        start: where the interval begins, a number.
        horizon: where it ends, a number.

    Returns:
        ``(M, *x.shape)``, float64.

    Raises:
        ValueError: ``order < 1``, ``horizon <= start``, or something is not finite.

    Source:
        HiPPO (Gu et al., 2020), LegS.

    Example:
        >>> legs_basis(2, torch.tensor([0.0, 2.0, 4.0]), start=0.0, horizon=4.0)
        tensor([[ 1.0000,  1.0000,  1.0000],
                [-1.7321,  0.0000,  1.7321]], dtype=torch.float64)
    """
    start, horizon = _interval(start, horizon)
    return _orthonormal(order, 2 * (_finite("x", x) - start) / (horizon - start) - 1)


def legs_nodes(num_nodes: int, start: float | Tensor, horizon: float | Tensor) -> Tensor:
    r"""Gauss-Legendre nodes on [start, horizon], differentiable in both ends.

    .. math:: x_q = t_0 + (T - t_0) \, \frac{1 + \xi_q}{2}

    Args:
        num_nodes: number of nodes Q.
        start: where the interval begins, a number.
        horizon: where it ends, a number.

    Returns:
        ``(Q,)``, increasing, float64, on the device of the ends.

    Raises:
        ValueError: ``num_nodes < 1``, ``horizon <= start``, or something is not finite.

    Example:
        >>> legs_nodes(3, start=0.0, horizon=2.0)
        tensor([0.2254, 1.0000, 1.7746], dtype=torch.float64)
    """
    start, horizon = _interval(start, horizon)
    length = horizon - start
    nodes, _ = gauss_legendre(num_nodes)
    return start + length * (1 + nodes.to(length.device)) / 2


def legs_weights(order: int, num_nodes: int) -> Tensor:
    r"""Weights W of the LegS functionals, ``u = W @ f(nodes)``, whatever the interval and the function.

    .. math:: W_{mq} = \sqrt{2m + 1} \, P_m(\xi_q) \, \frac{w_q}{2},
        \qquad u_m \approx \frac{1}{T - t_0} \int_{t_0}^{T} f(x) \, g_m(x) \, dx

    Args:
        order: number of modes M.
        num_nodes: number of nodes Q; the nodes are ``legs_nodes(Q, start, horizon)``. From Q = M on, the weights are
            exactly dual to the basis: ``W @ legs_basis(M, nodes, start, horizon).T`` is the identity.

    Returns:
        ``(M, Q)``, float64 on the CPU. Computed once, handed out as a copy.

    Raises:
        ValueError: ``order < 1`` or ``num_nodes < 1``.

    Example:
        >>> legs_weights(2, 20) @ legs_nodes(20, start=0.0, horizon=1.0)  # f(x) = x
        tensor([0.5000, 0.2887], dtype=torch.float64)
    """
    _check_count("order", order)
    _check_count("num_nodes", num_nodes)
    return _legs_weights(order, num_nodes).clone()


@lru_cache(maxsize=64)
def _legs_weights(order: int, num_nodes: int) -> Tensor:
    nodes, weights = _gauss_legendre(num_nodes)
    return _orthonormal(order, nodes) * weights / 2


def legs_transition(order: int) -> tuple[Tensor, Tensor]:
    r"""Matrices of the LegS equation, in time t since the start: :math:`dc/dt = (A c + B f(t)) / t`.

    .. math:: A_{nk} = \begin{cases} -\sqrt{(2n+1)(2k+1)} & n > k \\ -(n+1) & n = k \\ 0 & n < k \end{cases}
        \qquad B_n = \sqrt{2n + 1}

    Args:
        order: number of modes M.

    Returns:
        A ``(M, M)``, lower triangular, and B ``(M,)``; float64 on the CPU.

    Raises:
        ValueError: ``order < 1``.

    Source:
        HiPPO (Gu et al., 2020), theorem 2.

    Example:
        >>> legs_transition(2)[0]
        tensor([[-1.0000,  0.0000],
                [-1.7321, -2.0000]], dtype=torch.float64)
    """
    _check_count("order", order)
    n = torch.arange(order, dtype=torch.float64)
    b = torch.sqrt(2 * n + 1)
    return -torch.outer(b, b).tril(-1) - torch.diag(n + 1), b


def legs_reprojection(order: int, t1: float | Tensor, t2: float | Tensor) -> Tensor:
    r"""The propagator E of the LegS equation: the basis of t1, extended by zero to t2, in the basis of t2.

    .. math:: E_{mn} = \frac{1}{t_2} \int_0^{t_1} g^{(t_2)}_m(y) \, g^{(t_1)}_n(y) \, dy = \exp(A \log(t_2 / t_1))_{mn}

    Exact, because M Gauss-Legendre nodes integrate the polynomials exactly; and a contraction,
    :math:`\|E\|_2 \le \sqrt{t_1 / t_2}`.

    Args:
        order: number of modes M.
        t1: time since the start, a number; 0 gives E = 0.
        t2: a time not before t1, a number.

    Returns:
        ``(M, M)``, lower triangular, float64.

    Raises:
        ValueError: ``order < 1``, not ``0 <= t1 <= t2 > 0``, or something is not finite.

    Example:
        >>> legs_reprojection(2, t1=1.0, t2=2.0)
        tensor([[ 0.5000,  0.0000],
                [-0.4330,  0.2500]], dtype=torch.float64)
    """
    _check_count("order", order)
    t1, t2 = _number("t1", t1), _number("t2", t2)
    if not (0 <= t1 <= t2 and t2 > 0):
        raise ValueError(f"t1 and t2 must satisfy 0 <= t1 <= t2 > 0, got t1 = {t1.item()} and t2 = {t2.item()}")
    ratio = t1 / t2
    nodes, _ = gauss_legendre(order)
    later = _orthonormal(order, ratio * (1 + nodes.to(ratio.device)) - 1)
    return (ratio * later @ legs_weights(order, order).to(ratio.device).mT).tril()


def legs_cell_weights(order: int, edges: Tensor) -> Tensor:
    r"""What a signal that is constant on each of N adjoining cells adds to the coefficients at the last edge T.

    .. math:: \Phi_{mn} = \frac{1}{T} \int_{t_{n-1}}^{t_n} g^{(T)}_m(x) \, dx
        = \frac{\sqrt{2m+1}}{2} \bigl[ Q_m(2 t_n / T - 1) - Q_m(2 t_{n-1} / T - 1) \bigr],
        \qquad Q_m' = P_m

    With edges from 0 on, the coefficients are ``legs_cell_weights(M, edges) @ values``. With edges from t on, a state
    at time t moves on by many cells at once:
    ``legs_reprojection(M, t, edges[-1]) @ state + legs_cell_weights(M, edges) @ values``.

    Args:
        order: number of modes M.
        edges: times since the start, ``(N + 1,)``, increasing, the first not negative.

    Returns:
        ``(M, N)``, float64.

    Raises:
        ValueError: ``order < 1``; edges not 1-D, fewer than two, not finite, or not increasing from 0 or later.

    Example:
        >>> legs_cell_weights(2, torch.tensor([0.0, 1.0, 4.0]))
        tensor([[ 0.2500,  0.7500],
                [-0.3248,  0.3248]], dtype=torch.float64)
    """
    _check_count("order", order)
    edges = _increasing("edges", edges)
    p = legendre(order + 1, 2 * edges / edges[-1] - 1)
    odd = 2 * _modes(order, edges) + 1
    antiderivative = torch.cat([p[1:2], p[2:] - p[:-2]]) / odd
    return torch.sqrt(odd) / 2 * antiderivative.diff(dim=1)


def legs_step(
    state: Tensor, t1: float | Tensor, t2: float | Tensor, values: Tensor, scheme: str = "exact-held"
) -> Tensor:
    r"""One step of the LegS recurrence: the coefficients at t2 from those at t1 and the signal between.

    .. math:: c(t_2) = E \, c(t_1) + \frac{1}{t_2} \int_{t_1}^{t_2} g^{(t_2)}(x) \, f(x) \, dx,
        \qquad E = \exp(A \log(t_2 / t_1))

    ============  =======================  =================================================================
    scheme        values are f at          the step, with h = t2 - t1
    ============  =======================  =================================================================
    exact         K Gauss-Legendre nodes   as above, the integral by quadrature on ``legs_nodes(K, t1, t2)``
    exact-held    t2                       as above, f held constant
    zoh           (t1 + t2) / 2            as above, f held constant; order 2
    midpoint      (t1 + t2) / 2 = s        (I - h/2s A) c(t2) = (I + h/2s A) c(t1) + h/s B f; order 2
    bilinear      t2                       (I - h/2t2 A) c(t2) = (I + h/2t2 A) c(t1) + h/t2 B f; order 1
    backward      t2                       (I - h/t2 A) c(t2) = c(t1) + h/t2 B f; order 1
    euler         t2                       c(t2) = (I + h/t2 A) c(t1) + h/t2 B f; order 1, unstable early
    ============  =======================  =================================================================

    Args:
        state: coefficients at t1, ``(M, *shape)``. At t1 = 0 the exact schemes and zoh ignore it, midpoint needs f(0)
            in mode 0 and zeros elsewhere, and the others as published begin with zeros.
        t1: time since the start, a number, not negative.
        t2: a later time, a number.
        values: the signal where the scheme reads it, ``(*shape)``; for "exact" at the K nodes, ``(K, *shape)``.
        scheme: one of the table.

    Returns:
        Coefficients at t2, ``(M, *shape)``, float64.

    Raises:
        ValueError: unknown scheme, not ``0 <= t1 < t2``, values of the wrong shape, or something is not finite.

    Source:
        HiPPO (Gu et al., 2020), on discretization, for bilinear, backward and euler.

    Example:
        >>> legs_step(torch.tensor([1.0, 0.0]), t1=1.0, t2=2.0, values=torch.tensor(3.0))
        tensor([2.0000, 0.8660], dtype=torch.float64)
    """
    _check_scheme(scheme)
    state, values = _finite("state", state), _finite("values", values)
    t1, t2 = _number("t1", t1).to(state.device), _number("t2", t2).to(state.device)
    edges = _increasing("(t1, t2)", torch.stack([t1, t2]))
    order, shape = state.shape[0], state.shape[1:]
    expected = ("K", *shape) if scheme == "exact" else tuple(shape)
    if values.ndim != len(expected) or values.shape[values.ndim - len(shape) :] != shape:
        raise ValueError(f"values must have shape {expected} for scheme {scheme!r}, got {tuple(values.shape)}")

    if scheme not in _IMPLICIT:
        if scheme == "exact":
            average = legs_weights(1, len(values)).to(state.device)  # over the nodes
            weights = (t2 - t1) / t2 * average * legs_basis(order, legs_nodes(len(values), t1, t2), 0.0, t2)
        else:
            weights, values = legs_cell_weights(order, edges), values.unsqueeze(0)
        propagator = legs_reprojection(order, t1, t2)
        return torch.tensordot(propagator, state, dims=1) + torch.tensordot(weights, values, dims=1)

    implicit = _IMPLICIT[scheme]
    a, b = (matrix.to(state.device) for matrix in legs_transition(order))
    rate = (t2 - t1) / torch.lerp(t1, t2, _READ_AT[scheme])
    if scheme == "euler" and order * rate > 2:
        warnings.warn(
            f"An Euler step with (t2 - t1) / t2 = {rate.item():.2g} amplifies the modes m > {2 / rate.item() - 1:.3g} "
            f"of {order}; scheme 'exact-held' reads the same values and is a contraction.",
            stacklevel=2,
        )
    explicit = state + (1 - implicit) * rate * torch.tensordot(a, state, dims=1) + rate * torch.tensordot(b, values, 0)
    matrix = torch.eye(order, dtype=a.dtype, device=a.device) - implicit * rate * a
    return torch.linalg.solve_triangular(matrix, explicit.reshape(order, -1), upper=False).reshape(state.shape)


def legs_recurrence(
    signal: Callable[[Tensor], Tensor],
    times: Tensor,
    order: int,
    scheme: str = "exact",
    num_nodes: int | None = None,
) -> Tensor:
    r"""Coefficients of a signal on [0, times[-1]], by the LegS recurrence with one step from each time to the next.

    .. math:: c_m = \frac{1}{T} \int_0^T f(x) \, g^{(T)}_m(x) \, dx

    Times are physical and may be irregular: what is uniform over the past is time, not the count of the steps.

    Args:
        signal: takes times since the start ``(k,)`` to values ``(k, *shape)``.
        times: ends of the steps since the start, ``(L,)``, increasing, the first positive. The first step begins at 0.
        order: number of modes M.
        scheme: see :func:`legs_step`. "exact" is as good as its nodes: with K of them, exact for signals that are
            polynomials of degree < 2K - M + 1 on each cell.
        num_nodes: nodes K in each cell for "exact"; None means M + 20.

    Returns:
        ``(M, *shape)``, float64.

    Raises:
        ValueError: ``order < 1``, ``num_nodes < 1``, unknown scheme, times that do not increase from above 0, or a
            signal that is not finite.

    Example:
        >>> times = torch.tensor([0.1, 0.5, 2.0])
        >>> legs_recurrence(torch.square, times, order=3)  # x^2 on [0, 2]
        tensor([1.3333, 1.1547, 0.2981], dtype=torch.float64)
    """
    _check_count("order", order)
    _check_scheme(scheme)
    num_nodes = order + 20 if num_nodes is None else num_nodes
    times = _finite("times", times)
    edges = _increasing("(0, *times)", torch.cat([times.new_zeros(1), times]))
    state = None
    for t1, t2 in pairwise(edges):
        at = legs_nodes(num_nodes, t1, t2) if scheme == "exact" else torch.lerp(t1, t2, _READ_AT[scheme]).reshape(1)
        values = signal(at)
        if state is None:
            state = torch.zeros(order, *values.shape[1:], dtype=edges.dtype, device=edges.device)
            if scheme == "midpoint":
                state[0] = signal(edges[:1])[0]
        state = legs_step(state, t1, t2, values if scheme == "exact" else values[0], scheme)
    assert state is not None  # there is at least one step
    return state


def legs_kuu_ode(
    kernel: Callable[[Tensor, Tensor], Tensor],
    order: int,
    horizon: float,
    num_steps: int = 1000,
    num_nodes: int | None = None,
    boundary: Tensor | None = None,
) -> Tensor:
    r"""Covariance of the LegS coefficients by its own differential equation: a diagnostic, not the way to compute it.

    .. math:: \frac{dK}{dt} = \frac{1}{t} \bigl[ A K + K A^\top + B c(t)^\top + c(t) B^\top \bigr],
        \qquad c_m(t) = \int k(t, x) \, \phi^{(t)}_m(x) \, dx

    Solved by variation of constants on equal steps, each with its exact propagator and three Gauss-Legendre nodes.
    Unlike W K W^T on quadrature nodes, the result need not be positive semi-definite.

    Args:
        kernel: takes times since the start ``(n,)`` and ``(k,)`` to their covariance ``(n, k)``.
        order: number of modes M.
        horizon: where the interval, which starts at 0, ends; a number.
        num_steps: number of equal steps.
        num_nodes: quadrature nodes of c(t); None means 2 M + 20.
        boundary: ``(M,)``, put in the place of B. The paper prints a vector of ones, which does not solve the equation.

    Returns:
        ``(M, M)``, symmetric, float64.

    Raises:
        ValueError: ``order < 1``, ``num_steps < 1``, ``num_nodes < 1``, or a horizon that is not positive and finite.

    Source:
        OHSVGP, the direct evolution of Kuu; boundary term corrected: d phi/dt = (A phi + B delta_t) / t gives B.

    Example:
        >>> linear = lambda a, b: torch.outer(a, b)  # f(x) = w x with w ~ N(0, 1)
        >>> legs_kuu_ode(linear, order=2, horizon=1.0, num_steps=10)
        tensor([[0.2500, 0.1443],
                [0.1443, 0.0833]], dtype=torch.float64)
    """
    _check_count("order", order)
    _check_count("num_steps", num_steps)
    num_nodes = 2 * order + 20 if num_nodes is None else num_nodes
    boundary = legs_transition(order)[1] if boundary is None else _finite("boundary", boundary)
    weights = legs_weights(order, num_nodes)
    average = legs_weights(1, 3)[0]  # over the nodes of a cell

    edges = torch.linspace(0, 1, num_steps + 1, dtype=weights.dtype) * _interval(0.0, horizon)[1]
    covariance = torch.zeros(order, order, dtype=weights.dtype)
    for t1, t2 in pairwise(edges):
        propagator = legs_reprojection(order, t1, t2)
        covariance = propagator @ covariance @ propagator.mT
        for t, w in zip(legs_nodes(3, t1, t2), average, strict=True):
            propagator = legs_reprojection(order, t, t2)
            c = weights @ _finite("kernel", kernel(legs_nodes(num_nodes, 0.0, t), t.reshape(1)))[:, 0]
            change = torch.outer(propagator @ boundary, propagator @ c) * w * (t2 - t1) / t
            covariance = covariance + change + change.mT
    return covariance


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
    _check_count("order", order)
    return _SphericalBessel.apply(order, _finite("x", x))


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
        m = _modes(ctx.order, x)
        # For m = 0 roll brings in a row that does not belong there, and m annihilates it.
        derivative = (m * j.roll(1, 0)[:-1] - (m + 1) * j[1:]) / (2 * m + 1)
        return None, (grad * derivative).sum(0)


def _bessel_series(order: int, x: Tensor) -> Tensor:
    """Two terms of the power series: the next is of order x^4."""
    odd = 2 * _modes(order, x) + 1
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
    start, horizon = _interval(start, horizon)
    frequency = _finite("frequency", frequency)
    j = spherical_bessel(order, frequency * (horizon - start) / 2)
    m = _modes(order, frequency)
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
    lengthscale, span = _number("lengthscale", lengthscale), _number("span", span)
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
    return ((z * weights) @ torch.exp(-1j * torch.outer(frequency, _finite("x", x)))).real


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


def _orthonormal(order: int, s: Tensor) -> Tensor:
    """sqrt(2 m + 1) P_m(s): orthonormal under the uniform probability on [-1, 1]."""
    return torch.sqrt(2 * _modes(order, s) + 1) * legendre(order, s)


def _modes(order: int, like: Tensor) -> Tensor:
    """0, ..., order - 1 along a new first axis in front of those of like."""
    return torch.arange(order, dtype=torch.float64, device=like.device).reshape(-1, *[1] * like.ndim)


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_scheme(scheme: str) -> None:
    if scheme not in ("exact", *_READ_AT):
        raise ValueError(f"scheme must be one of {['exact', *_READ_AT]}, got {scheme!r}")


def _finite(name: str, value: float | Tensor) -> Tensor:
    """The value as a float64 tensor, on its own device and graph."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got {value}")
    return tensor


def _number(name: str, value: float | Tensor) -> Tensor:
    tensor = _finite(name, value)
    if tensor.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}")
    return tensor.reshape(())


def _interval(start: float | Tensor, horizon: float | Tensor) -> tuple[Tensor, Tensor]:
    start, horizon = _number("start", start), _number("horizon", horizon)
    if not start < horizon:
        raise ValueError(f"horizon must be greater than start, got start {start.item()} and horizon {horizon.item()}")
    return start, horizon


def _increasing(name: str, times: Tensor) -> Tensor:
    times = _finite(name, times)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"{name} must be 1-D with at least two entries, got shape {tuple(times.shape)}")
    if times[0] < 0 or not (times.diff() > 0).all():
        raise ValueError(f"{name} must increase from 0 or later, got {times.tolist()}")
    return times
