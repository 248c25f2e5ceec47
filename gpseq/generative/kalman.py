r"""Kalman filter and Rauch-Tung-Striebel smoother of scalar observations, in a loop or as parallel scans.

The states of a time series are a chain of small Gaussian steps, and one entry of each is observed:

.. math:: z_k = A_k z_{k-1} + e_k, \quad e_k \sim N(0, Q_k), \qquad y_k \sim N(z_{k,0}, 1 / w_k) .

The first step starts at nothing: :math:`A_1 = 0` and :math:`Q_1` is the covariance of the first state. A missing
observation has precision :math:`w_k = 0`. Both methods, ``"sequential"`` with n dependent steps and ``"parallel"`` with
2 log n of them, compute the same numbers and have gradients. Use float64.

Small matrices are last in what goes in and comes out, and first inside, see
:mod:`gpseq.generative.small_matrices`.

Source:
    Särkkä and García-Fernández (2021), Temporal parallelization of Bayesian smoothers, for the scans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpseq.generative.small_matrices import congruence, invert, lower_root, multiply

METHODS = ("sequential", "parallel")

_Elements = tuple[Tensor, ...]


@dataclass(frozen=True)
class Filtered:
    """What is known of every state from the observations up to its own.

    Attributes:
        mean: ``(*b, n, S)``.
        covariance: ``(*b, n, S, S)``.
        predicted_mean: from the observations before its own, ``(*b, n, S)``.
        predicted_covariance: the same, ``(*b, n, S, S)``.
        log_evidence: log density of all observations, ``(*b)``.
    """

    mean: Tensor
    covariance: Tensor
    predicted_mean: Tensor
    predicted_covariance: Tensor
    log_evidence: Tensor


@dataclass(frozen=True)
class Chain:
    r"""A Gauss-Markov chain: :math:`z_k = F_k z_{k-1} + g_k + e_k`, :math:`e_k \sim N(0, L_k)`, with :math:`z_0 = 0`.

    Attributes:
        gain: F, ``(*b, n, S, S)``.
        shift: g, ``(*b, n, S)``.
        covariance: L, ``(*b, n, S, S)``.
        backward: whether it runs from the last state to the first.
    """

    gain: Tensor
    shift: Tensor
    covariance: Tensor
    backward: bool = False


def kalman_filter(
    transition: Tensor, noise: Tensor, values: Tensor, precisions: Tensor, method: str = "sequential"
) -> Filtered:
    r"""Take in observations of the first entry of the state, one after another.

    .. math:: P^-_k = A_k P_{k-1} A_k^\top + Q_k, \quad K_k = \frac{w_k P^-_{k,:0}}{1 + w_k P^-_{k,00}}, \quad
        m_k = m^-_k + K_k (y_k - m^-_{k,0}), \quad P_k = P^-_k - K_k P^-_{k,0:} .

    Args:
        transition: A, ``(*b, n, S, S)``, S at most 3.
        noise: Q, ``(*b, n, S, S)``.
        values: y, ``(*b, n)``, finite also where missing.
        precisions: w, ``(*b, n)``; 0 where missing.
        method: ``"sequential"`` or ``"parallel"``.

    Returns:
        The filtered states.

    Raises:
        ValueError: an unknown method.

    Example:
        >>> A, Q = torch.tensor([0.0, 1.0]).view(2, 1, 1), torch.tensor([1.0, 0.0]).view(2, 1, 1)  # one number, twice
        >>> kalman_filter(A, Q, torch.tensor([1.0, 2.0]), torch.ones(2)).mean.flatten()
        tensor([0.5000, 1.0000])
    """
    _check_method(method)
    shape = torch.broadcast_shapes(transition.shape[:-2], noise.shape[:-2], values.shape, precisions.shape)
    A, Q = (_first(matrix.expand(*shape, *matrix.shape[-2:])) for matrix in (transition, noise))
    y, w = values.expand(shape), precisions.expand(shape)
    if method == "sequential":
        predicted = _predict_in_turn(A, Q, w)
    else:
        before = torch.nn.functional.pad(_filter_by_scan(A, Q, w)[..., :-1], (1, 0))
        predicted = congruence(A, before, Q)
    gain, covariance = _update(predicted, w)
    kept = A - gain * A[:1]
    mean = _affine(kept, gain * y, method)
    expected = multiply(A, torch.nn.functional.pad(mean[..., :-1], (1, 0)))
    odds = w * predicted[0, 0]
    error = w * (y - expected[0, 0]).square() / (1 + odds)
    log_precision = torch.where(w > 0, w, 2 * math.pi).log() - math.log(2 * math.pi)
    log_evidence = 0.5 * (log_precision - odds.log1p() - error).sum(-1)
    return Filtered(_vectors(mean), _last(covariance), _vectors(expected), _last(predicted), log_evidence)


def prior_chain(transition: Tensor, noise: Tensor) -> Chain:
    """The chain before any observation, forward in time.

    Args:
        transition: A, ``(*b, n, S, S)``.
        noise: Q, ``(*b, n, S, S)``.
    """
    return Chain(transition, torch.zeros_like(transition[..., 0]), noise)


def posterior_chain(transition: Tensor, noise: Tensor, filtered: Filtered) -> Chain:
    r"""The chain given all observations, backward in time.

    .. math:: F_k = P_k A_{k+1}^\top (P^-_{k+1})^{-1}, \quad g_k = m_k - F_k m^-_{k+1}, \quad
        L_k = (I - F_k A_{k+1}) P_k (I - F_k A_{k+1})^\top + F_k Q_{k+1} F_k^\top,

    and from nothing to the last state :math:`N(m_n, P_n)`. Written so, L is a sum of covariances. A state behind a gap
    of zero is the state before it.

    Args:
        transition: A, ``(*b, n, S, S)``.
        noise: Q, ``(*b, n, S, S)``.
        filtered: of the same chain.

    Returns:
        The chain; its marginals are the smoothed states.

    Source:
        Rauch, Tung and Striebel (1965), Maximum likelihood estimates of linear dynamic systems.
    """
    shape = filtered.covariance.shape
    A, Q = (_first(matrix.expand(shape))[..., 1:] for matrix in (transition, noise))
    P = _first(filtered.covariance)[..., :-1]
    predicted = _first(filtered.predicted_covariance)[..., 1:]
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device).reshape(len(P), len(P), *[1] * (P.dim() - 2))
    still = (Q == 0).flatten(0, 1).all(0)
    F = multiply(multiply(P, A.transpose(0, 1)), invert(torch.where(still, eye, predicted)))
    F = torch.where(still, eye, F)
    lost = torch.where(still, 0.0, eye - multiply(F, A))
    L = congruence(lost, P, congruence(F, Q))
    g = multiply(lost, _columns(filtered.mean)[..., :-1])
    end_mean, end_covariance = _columns(filtered.mean)[..., -1:], _first(filtered.covariance)[..., -1:]
    return Chain(
        _last(torch.nn.functional.pad(F, (0, 1))),
        _vectors(torch.cat([g, end_mean], -1)),
        _last(torch.cat([L, end_covariance], -1)),
        backward=True,
    )


def rts_smoother(
    transition: Tensor, noise: Tensor, filtered: Filtered, method: str = "sequential"
) -> tuple[Tensor, Tensor]:
    """What is known of every state from all observations.

    Args:
        transition: A, ``(*b, n, S, S)``.
        noise: Q, ``(*b, n, S, S)``.
        filtered: of the same chain.
        method: ``"sequential"`` or ``"parallel"``.

    Returns:
        Mean ``(*b, n, S)`` and covariance ``(*b, n, S, S)``.

    Raises:
        ValueError: an unknown method.
    """
    return chain_marginals(posterior_chain(transition, noise, filtered), method)


def chain_marginals(chain: Chain, method: str = "sequential") -> tuple[Tensor, Tensor]:
    r"""Moments of every state, :math:`m_k = F_k m_{k-1} + g_k` and :math:`P_k = F_k P_{k-1} F_k^\top + L_k`.

    Args:
        chain: forward or backward.
        method: ``"sequential"`` or ``"parallel"``.

    Returns:
        Mean ``(*b, n, S)`` and covariance ``(*b, n, S, S)``.

    Raises:
        ValueError: an unknown method.
    """
    _check_method(method)
    F, g, L = _first(chain.gain), _columns(chain.shift), _first(chain.covariance)
    if method == "parallel":

        def then(one: _Elements, two: _Elements) -> _Elements:
            return multiply(two[0], one[0]), multiply(two[0], one[1]) + two[1], congruence(two[0], one[2], two[2])

        _, mean, covariance = _scan(then, (F, g, L), chain.backward)
        return _vectors(mean), _last(covariance)
    gains, covariances = _steps(F), _steps(L)
    P = torch.zeros_like(covariances[0])
    found = []
    for k in _order(len(gains), chain.backward):
        P = torch.baddbmm(covariances[k], torch.bmm(gains[k], P), gains[k].mT)
        found.append(P)
    return _vectors(_affine(F, g, method, chain.backward)), _last(_from_steps(found, L, chain.backward))


def chain_draw(chain: Chain, normals: Tensor, method: str = "sequential") -> Tensor:
    """Paths of a chain from standard normal numbers.

    Args:
        chain: forward or backward.
        normals: ``(*s, *b, n, S)``.
        method: ``"sequential"`` or ``"parallel"``.

    Returns:
        ``(*s, *b, n, S)``, joint over the n states.

    Raises:
        ValueError: an unknown method.
    """
    _check_method(method)
    F, g, root = _first(chain.gain), _columns(chain.shift), lower_root(_first(chain.covariance))
    count = math.prod(normals.shape[: normals.dim() - chain.shift.dim()])
    draws = normals.reshape(count, *chain.shift.shape).movedim(-1, 0)
    paths = _affine(F, g + multiply(root, draws), method, chain.backward)
    return paths.movedim(0, -1).reshape(normals.shape)


# --- recursions, with (S, S, *b, n) inside -------------------------------------------------------------------------


def _predict_in_turn(A: Tensor, Q: Tensor, w: Tensor) -> Tensor:
    """Predicted covariances, one after another: ten small operations a step, none of which copies the series."""
    transitions, noises, weights = _steps(A), _steps(Q), _steps(w.reshape(1, 1, *w.shape))
    P = torch.zeros_like(noises[0])
    found = []
    for A_k, Q_k, w_k in zip(transitions, noises, weights, strict=True):
        P = torch.baddbmm(Q_k, torch.bmm(A_k, P), A_k.mT)
        found.append(P)
        row = P[:, :1]
        corner = row[:, :, :1]
        rest = torch.baddbmm(P, (row / corner).mT, row, alpha=-1)  # as in _update, with small matrices last
        P = torch.lerp(rest, P, (1 + w_k * corner).reciprocal())
    return _from_steps(found, A)


def _filter_by_scan(A: Tensor, Q: Tensor, w: Tensor) -> Tensor:
    """Filtered covariances.

    Over a stretch of the series, the last state given the one before the first has gain A and covariance C, and the
    observations within tell of that one before with precision J.
    """
    gain, C = _update(Q, w)
    kept = A - gain * A[:1]
    J = A[:1].transpose(0, 1) * (w / (1 + w * Q[0, 0])) * A[:1]
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)

    def then(one: _Elements, two: _Elements) -> _Elements:
        (A_1, C_1, J_1), (A_2, C_2, J_2) = one, two
        inverse = invert(eye.reshape(*eye.shape, *[1] * (A_1.dim() - 2)) + multiply(C_1, J_2))
        through = multiply(A_2, inverse)
        told = multiply(J_2, multiply(inverse, A_1))
        return (
            multiply(through, A_1),
            multiply(multiply(through, C_1), A_2.transpose(0, 1)) + C_2,
            multiply(A_1.transpose(0, 1), told) + J_1,
        )

    return _scan(then, (kept, C, J))[1]


def _update(P: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gain ``(S, 1, *b, n)`` and covariance after an observation.

    The covariance is taken between that before and that after an exact observation, whose first row is exactly zero:
    small variances keep all their digits.
    """
    row, corner = P[:1], P[:1, :1]
    left = (1 + w * corner).reciprocal()
    rest = P - (row / torch.where(corner > 0, corner, 1.0)).transpose(0, 1) * row
    return (w * left * row).transpose(0, 1), torch.lerp(rest, P, left)


def _affine(F: Tensor, g: Tensor, method: str, backward: bool = False) -> Tensor:
    """The vectors z_k = F_k z_{k-1} + g_k, ``(S, R, *b, n)``."""
    if method == "parallel":

        def then(one: _Elements, two: _Elements) -> _Elements:
            return multiply(two[0], one[0]), multiply(two[0], one[1]) + two[1]

        return _scan(then, (F, g), backward)[1]
    gains, shifts = _steps(F), _steps(g)
    z = torch.zeros_like(shifts[0])
    found = []
    for k in _order(len(gains), backward):
        z = torch.baddbmm(shifts[k], gains[k], z)
        found.append(z)
    return _from_steps(found, g, backward)


def _scan(
    combine: Callable[[_Elements, _Elements], _Elements], elements: _Elements, backward: bool = False
) -> _Elements:
    """All the running combinations along the last axis, in 2 log n rounds: neighbours first, then what is between."""
    if backward:
        flipped = _scan(combine, tuple(element.flip(-1) for element in elements))
        return tuple(element.flip(-1) for element in flipped)
    n = elements[0].shape[-1]
    if n == 1:
        return elements
    pairs = combine(
        tuple(element[..., : n - 1 : 2] for element in elements), tuple(element[..., 1::2] for element in elements)
    )
    odd = _scan(combine, pairs)
    first = tuple(element[..., :1] for element in elements)
    if n == 2:
        return tuple(torch.cat(pair, -1) for pair in zip(first, odd, strict=True))
    between = combine(
        tuple(element[..., : (n - 1) // 2] for element in odd), tuple(element[..., 2::2] for element in elements)
    )
    even = tuple(torch.cat(pair, -1) for pair in zip(first, between, strict=True))
    return tuple(_interleave(*pair) for pair in zip(even, odd, strict=True))


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    m = odd.shape[-1]
    woven = torch.stack([even[..., :m], odd], -1).flatten(-2)
    return torch.cat([woven, even[..., m:]], -1)


# --- layouts -------------------------------------------------------------------------------------------------------


def _first(matrices: Tensor) -> Tensor:
    """``(*b, n, S, S)`` as ``(S, S, *b, n)``."""
    return matrices.movedim((-2, -1), (0, 1))


def _last(matrices: Tensor) -> Tensor:
    return matrices.movedim((0, 1), (-2, -1))


def _columns(vectors: Tensor) -> Tensor:
    """``(*b, n, S)`` as ``(S, 1, *b, n)``."""
    return vectors.movedim(-1, 0).unsqueeze(1)


def _vectors(columns: Tensor) -> Tensor:
    return columns.squeeze(1).movedim(0, -1)


def _steps(matrices: Tensor) -> tuple[Tensor, ...]:
    """``(S, R, *b, n)`` as n matrices ``(B, S, R)``; unbound at once, because a slice a step is quadratic backward."""
    flat = matrices.reshape(*matrices.shape[:2], -1, matrices.shape[-1])
    return flat.permute(3, 2, 0, 1).contiguous().unbind(0)


def _from_steps(steps: list[Tensor], like: Tensor, backward: bool = False) -> Tensor:
    """The inverse; steps of a backward recursion come last first."""
    stacked = torch.stack(steps[::-1] if backward else steps)
    return stacked.permute(2, 3, 1, 0).contiguous().reshape(*stacked.shape[2:], *like.shape[2:])


def _order(n: int, backward: bool) -> range:
    return range(n - 1, -1, -1) if backward else range(n)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
