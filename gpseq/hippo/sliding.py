r"""Measures that move along with time and forget on purpose: LegT, LagT and FouT.

Each is at rest in the lag :math:`s = (t - x) / \theta`, where t is the end of the measure and :math:`\theta` its
window: a length for LegT and FouT, a time constant for LagT. So its weights do not depend on either, and its
differential equation has constant coefficients, :math:`dc/dt = (A c + B f(t)) / \theta`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from gpseq.hippo.arguments import check_count, finite, sliding
from gpseq.hippo.legs import legs_transition, legs_weights
from gpseq.hippo.polynomials import (
    gauss_laguerre,
    gauss_legendre,
    laguerre,
    laguerre_functions,
    orthonormal_legendre,
)


def legt_basis(order: int, x: Tensor, end: float | Tensor, window: float | Tensor) -> Tensor:
    r"""The orthonormal Legendre basis on [end - window, end], differentiable in x, end and window.

    .. math:: g_m(x) = \sqrt{2m + 1} \; P_m\!\left(2 \, \frac{x - t}{\theta} + 1\right)

    Args:
        order: number of modes M.
        x: times, any shape, in the unit of end and window.
        end: where the window ends, t, a number.
        window: its length :math:`\theta`, a positive number.

    Returns:
        ``(M, *x.shape)``, float64.

    Raises:
        ValueError: ``order < 1``, ``window <= 0``, or something is not finite.

    Source:
        HiPPO (Gu et al., 2020), LegT.

    Example:
        >>> legt_basis(2, torch.tensor([6.0, 8.0, 10.0]), end=10.0, window=4.0)
        tensor([[ 1.0000,  1.0000,  1.0000],
                [-1.7321,  0.0000,  1.7321]], dtype=torch.float64)
    """
    end, window = sliding(end, window)
    return orthonormal_legendre(order, 2 * (finite("x", x) - end) / window + 1)


def legt_nodes(num_nodes: int, end: float | Tensor, window: float | Tensor) -> Tensor:
    r"""Gauss-Legendre nodes on [end - window, end], differentiable in both.

    .. math:: x_q = t - \theta \, \frac{1 - \xi_q}{2}

    Args:
        num_nodes: number of nodes Q.
        end: where the window ends, t, a number.
        window: its length :math:`\theta`, a positive number.

    Returns:
        ``(Q,)``, increasing, float64, on the device of the window.

    Raises:
        ValueError: ``num_nodes < 1``, ``window <= 0``, or something is not finite.

    Example:
        >>> legt_nodes(3, end=10.0, window=2.0)
        tensor([8.2254, 9.0000, 9.7746], dtype=torch.float64)
    """
    end, window = sliding(end, window)
    nodes, _ = gauss_legendre(num_nodes)
    return end - window * (1 - nodes.to(window.device)) / 2


def legt_weights(order: int, num_nodes: int) -> Tensor:
    r"""Weights W of the LegT functionals, ``u = W @ f(nodes)``, whatever the window and the function.

    .. math:: u_m \approx \frac{1}{\theta} \int_{t - \theta}^{t} f(x) \, g_m(x) \, dx

    They are those of :func:`~gpseq.hippo.legs_weights`: at every moment LegT is LegS on the window.

    Args:
        order: number of modes M.
        num_nodes: number of nodes Q; the nodes are ``legt_nodes(Q, end, window)``.

    Returns:
        ``(M, Q)``, float64 on the CPU.

    Raises:
        ValueError: ``order < 1`` or ``num_nodes < 1``.

    Example:
        >>> legt_weights(2, 20) @ legt_nodes(20, end=10.0, window=1.0)  # f(x) = x
        tensor([9.5000, 0.2887], dtype=torch.float64)
    """
    return legs_weights(order, num_nodes)


def legt_transition(order: int) -> tuple[Tensor, Tensor]:
    r"""Matrices of the LegT equation, :math:`dc/dt = (A c + B f(t)) / \theta`.

    .. math:: A_{nk} = -\sqrt{(2n+1)(2k+1)} \begin{cases} 1 & n \ge k \\ (-1)^{n-k} & n < k \end{cases}
        \qquad B_n = \sqrt{2n + 1}

    An approximation, however small the steps: the exact equation asks for :math:`f(t - \theta)`, which leaves the
    window, and its reconstruction from c stands in. The quadrature weights have no such error.

    Args:
        order: number of modes M.

    Returns:
        A ``(M, M)`` and B ``(M,)``; float64 on the CPU.

    Raises:
        ValueError: ``order < 1``.

    Source:
        HiPPO (Gu et al., 2020), theorem 1, for the orthonormal basis.

    Example:
        >>> legt_transition(2)[0]
        tensor([[-1.0000,  1.7321],
                [-1.7321, -3.0000]], dtype=torch.float64)
    """
    _, b = legs_transition(order)
    n = torch.arange(order)
    alternating = 1.0 - 2.0 * ((n[:, None] - n) % 2)
    return -torch.outer(b, b) * torch.where(n[:, None] >= n, 1.0, alternating), b


def lagt_basis(order: int, x: Tensor, end: float | Tensor, window: float | Tensor) -> Tensor:
    r"""The Laguerre basis behind a time, differentiable in x, end and window.

    .. math:: g_m(x) = L_m\!\left(\frac{t - x}{\tau}\right), \qquad \phi_m(x) = g_m(x) \, \frac{e^{-(t - x)/\tau}}{\tau}
        \quad \text{for } x \le t

    Args:
        order: number of modes M.
        x: times, any shape, in the unit of end and window.
        end: t, the present, a number.
        window: the time constant :math:`\tau`, a positive number.

    Returns:
        ``(M, *x.shape)``, float64. It grows like :math:`e^{(t - x) / 2 \tau}` into the past, which the measure forgets.

    Raises:
        ValueError: ``order < 1``, ``window <= 0``, or something is not finite.

    Source:
        HiPPO (Gu et al., 2020), LagT.

    Example:
        >>> lagt_basis(2, torch.tensor([6.0, 8.0, 10.0]), end=10.0, window=4.0)
        tensor([[1.0000, 1.0000, 1.0000],
                [0.0000, 0.5000, 1.0000]], dtype=torch.float64)
    """
    end, window = sliding(end, window)
    return laguerre(order, (end - finite("x", x)) / window)


def lagt_nodes(num_nodes: int, end: float | Tensor, window: float | Tensor) -> Tensor:
    r"""Gauss-Laguerre nodes behind a time, differentiable in both arguments.

    .. math:: x_q = t - \tau \, \xi_q

    Args:
        num_nodes: number of nodes Q. The furthest is almost 4 Q time constants back, where the weights are nil.
        end: t, the present, a number.
        window: the time constant :math:`\tau`, a positive number.

    Returns:
        ``(Q,)``, increasing, float64, on the device of the window.

    Raises:
        ValueError: ``num_nodes < 1``, ``window <= 0``, or something is not finite.

    Example:
        >>> lagt_nodes(3, end=10.0, window=2.0)
        tensor([-2.5799,  5.4114,  9.1684], dtype=torch.float64)
    """
    end, window = sliding(end, window)
    nodes, _ = gauss_laguerre(num_nodes)
    return end - window * nodes.flip(0).to(window.device)


def lagt_weights(order: int, num_nodes: int) -> Tensor:
    r"""Weights W of the LagT functionals, ``u = W @ f(nodes)``, whatever the time constant and the function.

    .. math:: W_{mq} = v_q \, l_m(\xi_q) \, e^{-\xi_q / 2},
        \qquad u_m \approx \frac{1}{\tau} \int_{-\infty}^{t} e^{-(t - x)/\tau} f(x) \, g_m(x) \, dx

    with v from :func:`~gpseq.hippo.gauss_laguerre` and l from :func:`~gpseq.hippo.laguerre_functions`.

    Args:
        order: number of modes M.
        num_nodes: number of nodes Q; the nodes are ``lagt_nodes(Q, end, window)``. From Q = M on, the weights are
            exactly dual to the basis.

    Returns:
        ``(M, Q)``, float64 on the CPU. Computed once, handed out as a copy.

    Raises:
        ValueError: ``order < 1`` or ``num_nodes < 1``.

    Example:
        >>> lagt_weights(2, 20) @ lagt_nodes(20, end=10.0, window=1.0)  # f(x) = x
        tensor([9.0000, 1.0000], dtype=torch.float64)
    """
    check_count("order", order)
    check_count("num_nodes", num_nodes)
    return _lagt_weights(order, num_nodes).clone()


@lru_cache(maxsize=64)
def _lagt_weights(order: int, num_nodes: int) -> Tensor:
    nodes, weights = gauss_laguerre(num_nodes)
    return (laguerre_functions(order, nodes) * weights * torch.exp(-nodes / 2)).flip(1)


def lagt_transition(order: int) -> tuple[Tensor, Tensor]:
    r"""Matrices of the LagT equation, :math:`dc/dt = (A c + B f(t)) / \tau`, which is exact.

    .. math:: A_{nk} = \begin{cases} -1 & n \ge k \\ 0 & n < k \end{cases} \qquad B_n = 1

    Args:
        order: number of modes M.

    Returns:
        A ``(M, M)``, lower triangular, and B ``(M,)``; float64 on the CPU.

    Raises:
        ValueError: ``order < 1``.

    Source:
        HiPPO (Gu et al., 2020), theorem 1.

    Example:
        >>> lagt_transition(2)[0]
        tensor([[-1.,  0.],
                [-1., -1.]], dtype=torch.float64)
    """
    check_count("order", order)
    return -torch.ones(order, order, dtype=torch.float64).tril(), torch.ones(order, dtype=torch.float64)


def fout_basis(order: int, x: Tensor, end: float | Tensor, window: float | Tensor) -> Tensor:
    r"""The orthonormal Fourier basis on [end - window, end], differentiable in x, end and window.

    .. math:: 1, \; \sqrt 2 \cos(2 \pi s), \; \sqrt 2 \sin(2 \pi s), \; \sqrt 2 \cos(4 \pi s), \; \dots,
        \qquad s = \frac{t - x}{\theta}

    Args:
        order: number of modes M; if it is even, the last wave is a cosine without its sine.
        x: times, any shape, in the unit of end and window.
        end: where the window ends, t, a number.
        window: its length :math:`\theta`, a positive number.

    Returns:
        ``(M, *x.shape)``, float64; outside the window it repeats itself.

    Raises:
        ValueError: ``order < 1``, ``window <= 0``, or something is not finite.

    Source:
        HiPPO (Gu et al., 2020), FouT, here with real waves.

    Example:
        >>> fout_basis(3, torch.tensor([8.5, 9.5]), end=10.0, window=4.0)
        tensor([[ 1.0000,  1.0000],
                [-1.0000,  1.0000],
                [ 1.0000,  1.0000]], dtype=torch.float64)
    """
    end, window = sliding(end, window)
    return _waves(order, (end - finite("x", x)) / window)


def fout_nodes(num_nodes: int, end: float | Tensor, window: float | Tensor) -> Tensor:
    r"""Gauss-Legendre nodes on [end - window, end]: what is integrated need not be periodic.

    Args:
        num_nodes: number of nodes Q.
        end: where the window ends, t, a number.
        window: its length :math:`\theta`, a positive number.

    Returns:
        ``(Q,)``, increasing, float64, on the device of the window; as :func:`~gpseq.hippo.legt_nodes`.

    Raises:
        ValueError: ``num_nodes < 1``, ``window <= 0``, or something is not finite.

    Example:
        >>> fout_nodes(3, end=10.0, window=2.0)
        tensor([8.2254, 9.0000, 9.7746], dtype=torch.float64)
    """
    return legt_nodes(num_nodes, end, window)


def fout_weights(order: int, num_nodes: int) -> Tensor:
    r"""Weights W of the FouT functionals, ``u = W @ f(nodes)``, whatever the window and the function.

    .. math:: W_{mq} = g_m(x_q) \, \frac{w_q}{2},
        \qquad u_m \approx \frac{1}{\theta} \int_{t - \theta}^{t} f(x) \, g_m(x) \, dx

    Args:
        order: number of modes M.
        num_nodes: number of nodes Q; the nodes are ``fout_nodes(Q, end, window)``. From Q = 2 M + 20 on, the
            weights are dual to the basis to rounding; below :math:`\pi M / 2` they do not see the fastest waves.

    Returns:
        ``(M, Q)``, float64 on the CPU. Computed once, handed out as a copy.

    Raises:
        ValueError: ``order < 1`` or ``num_nodes < 1``.

    Example:
        >>> (fout_weights(3, 26) @ fout_nodes(26, end=10.0, window=1.0))[[0, 2]]  # f(x) = x
        tensor([9.5000, 0.2251], dtype=torch.float64)
    """
    check_count("order", order)
    check_count("num_nodes", num_nodes)
    return _fout_weights(order, num_nodes).clone()


@lru_cache(maxsize=64)
def _fout_weights(order: int, num_nodes: int) -> Tensor:
    nodes, weights = gauss_legendre(num_nodes)
    return _waves(order, (1 - nodes) / 2) * weights / 2


def fout_transition(order: int) -> tuple[Tensor, Tensor]:
    r"""Matrices of the FouT equation, :math:`dc/dt = (A c + B f(t)) / \theta`.

    .. math:: A = D - 2 \, g(t) \, g(t)^\top, \qquad B = 2 \, g(t)

    where D turns each wave, :math:`D_{\cos_j, \sin_j} = -2 \pi j = -D_{\sin_j, \cos_j}`, and :math:`g(t)` holds the
    basis at the end of the window, 1 or :math:`\sqrt 2` for cosines and 0 for sines.

    An approximation, however small the steps, as for :func:`~gpseq.hippo.legt_transition`; and a worse one, because the
    waves see the two ends of the window as one point.

    Args:
        order: number of modes M.

    Returns:
        A ``(M, M)`` and B ``(M,)``; float64 on the CPU.

    Raises:
        ValueError: ``order < 1``.

    Source:
        HiPPO (Gu et al., 2020), theorem 6, here with real waves.

    Example:
        >>> fout_transition(3)[0]
        tensor([[-2.0000, -2.8284,  0.0000],
                [-2.8284, -4.0000, -6.2832],
                [ 0.0000,  6.2832,  0.0000]], dtype=torch.float64)
    """
    now = _waves(order, torch.zeros((), dtype=torch.float64))
    cosine = torch.arange(1, max(order - 1, 1), 2)  # of the waves whose sine is there too
    speed = math.pi * (cosine + 1).double()
    turn = torch.zeros(order, order, dtype=torch.float64)
    turn[cosine, cosine + 1], turn[cosine + 1, cosine] = -speed, speed
    return turn - 2 * torch.outer(now, now), 2 * now


def _waves(order: int, lag: Tensor) -> Tensor:
    """1, sqrt2 cos(2 pi s), sqrt2 sin(2 pi s), sqrt2 cos(4 pi s), ... at lags s."""
    check_count("order", order)
    angles = [2 * math.pi * ((m + 1) // 2) * lag for m in range(order)]
    waves = [math.sqrt(2) * (torch.cos(angle) if m % 2 else torch.sin(angle)) for m, angle in enumerate(angles)]
    return torch.stack([torch.ones_like(lag), *waves[1:]])
