"""LegS, the uniform measure on all of an interval: quadrature, and the recurrence that follows a growing horizon."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from gpseq.hippo.arguments import check_count, finite, interval, modes, number
from gpseq.hippo.polynomials import gauss_legendre, legendre, orthonormal_legendre

#: Where in a cell a scheme of the recurrence reads the signal, 0 its start and 1 its end; "exact" reads it at nodes.
_READ_AT = {"exact-held": 1.0, "zoh": 0.5, "midpoint": 0.5, "bilinear": 1.0, "backward": 1.0, "euler": 1.0}

#: What share of A c a scheme takes at the end of the step; the schemes that are not here use the exact propagator.
_IMPLICIT = {"midpoint": 0.5, "bilinear": 0.5, "backward": 1.0, "euler": 0.0}


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
    start, horizon = interval(start, horizon)
    return orthonormal_legendre(order, 2 * (finite("x", x) - start) / (horizon - start) - 1)


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
    start, horizon = interval(start, horizon)
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
    check_count("order", order)
    check_count("num_nodes", num_nodes)
    return _legs_weights(order, num_nodes).clone()


@lru_cache(maxsize=64)
def _legs_weights(order: int, num_nodes: int) -> Tensor:
    nodes, weights = gauss_legendre(num_nodes)
    return orthonormal_legendre(order, nodes) * weights / 2


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
    check_count("order", order)
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
    check_count("order", order)
    t1, t2 = number("t1", t1), number("t2", t2)
    if not (0 <= t1 <= t2 and t2 > 0):
        raise ValueError(f"t1 and t2 must satisfy 0 <= t1 <= t2 > 0, got t1 = {t1.item()} and t2 = {t2.item()}")
    ratio = t1 / t2
    nodes, _ = gauss_legendre(order)
    later = orthonormal_legendre(order, ratio * (1 + nodes.to(ratio.device)) - 1)
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
    check_count("order", order)
    edges = _increasing("edges", edges)
    p = legendre(order + 1, 2 * edges / edges[-1] - 1)
    odd = 2 * modes(order, edges) + 1
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
    state, values = finite("state", state), finite("values", values)
    t1, t2 = number("t1", t1).to(state.device), number("t2", t2).to(state.device)
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
    check_count("order", order)
    _check_scheme(scheme)
    num_nodes = order + 20 if num_nodes is None else num_nodes
    times = finite("times", times)
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
    check_count("order", order)
    check_count("num_steps", num_steps)
    num_nodes = 2 * order + 20 if num_nodes is None else num_nodes
    boundary = legs_transition(order)[1] if boundary is None else finite("boundary", boundary)
    weights = legs_weights(order, num_nodes)
    average = legs_weights(1, 3)[0]  # over the nodes of a cell

    edges = torch.linspace(0, 1, num_steps + 1, dtype=weights.dtype) * interval(0.0, horizon)[1]
    covariance = torch.zeros(order, order, dtype=weights.dtype)
    for t1, t2 in pairwise(edges):
        propagator = legs_reprojection(order, t1, t2)
        covariance = propagator @ covariance @ propagator.mT
        for t, w in zip(legs_nodes(3, t1, t2), average, strict=True):
            propagator = legs_reprojection(order, t, t2)
            c = weights @ finite("kernel", kernel(legs_nodes(num_nodes, 0.0, t), t.reshape(1)))[:, 0]
            change = torch.outer(propagator @ boundary, propagator @ c) * w * (t2 - t1) / t
            covariance = covariance + change + change.mT
    return covariance


def _check_scheme(scheme: str) -> None:
    if scheme not in ("exact", *_READ_AT):
        raise ValueError(f"scheme must be one of {['exact', *_READ_AT]}, got {scheme!r}")


def _increasing(name: str, times: Tensor) -> Tensor:
    times = finite(name, times)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"{name} must be 1-D with at least two entries, got shape {tuple(times.shape)}")
    if times[0] < 0 or not (times.diff() > 0).all():
        raise ValueError(f"{name} must increase from 0 or later, got {times.tolist()}")
    return times
