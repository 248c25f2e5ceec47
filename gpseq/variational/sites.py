r"""Updates for any likelihood: Gaussian sites, found by natural-gradient steps on the bound.

Each observation of a chunk acts on its function value as :math:`\exp(\lambda_1 f - \tfrac12 \lambda_2 f^2)` on
:math:`f - \mu(x)`. With the information (G, r, c) of the past on the present basis and the whitened features A,

.. math::
    P &= I + G + A \Lambda_2 A^\top, \qquad q(v) = N(m, S) = N\bigl(P^{-1} (r + A \lambda_1),\, P^{-1}\bigr), \\
    \mathcal L &= \sum_i E_i - \mathrm{KL}[q \,\|\, N(0, I)] + c + r^\top m
    - \tfrac12 \operatorname{tr}[G (S + m m^\top)],

where :math:`E_i = E_q \log p(y_i \mid f_i)`. A natural-gradient step of length s on the bound is

.. math::
    \lambda_2 \leftarrow (1 - s) \lambda_2 + s \beta, \quad
    \lambda_1 \leftarrow (1 - s) \lambda_1 + s (\alpha + \beta (m_f - \mu)), \quad
    \alpha = \partial E / \partial m_f, \; \beta = \max(-2\, \partial E / \partial v_f, 0) .

After convergence the sites are added to (G, r, c) and forgotten: the state is as small as for Gaussian noise, where
one full step is the closed form.

Source:
    Khan and Lin (2017), Conjugate-computation variational inference; the online bound is that of Bui, Nguyen and
    Turner (2017), in the whitened form of :mod:`gpseq.variational.online`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpseq.features.base import as_inputs
from gpseq.linalg import gaussian_kl
from gpseq.variational import online
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import Prior
from gpseq.variational.shards import Shards

#: Expected log likelihood of each observation, ``(*batch, n)``, from means and variances of f, ``(*batch, n)``.
Expectation = Callable[[Tensor, Tensor], Tensor]

#: Full steps where the caller names no number; a log-concave likelihood takes about ten.
MOST_STEPS = 100

#: Marginals that move by less than this (means in standard deviations, variances as a fraction) have converged.
TOLERANCE = 1e-7

#: A bound that has not risen by this much (nats, and as a fraction) in so many steps has stalled at its top.
LEAST_GAIN, PATIENCE = 1e-8, 10

#: Falls of the bound below this fraction are taken for rounding: derivatives of library likelihoods are that exact.
ROUNDING = 1e-8

#: Likelihoods see no variances of f below this.
SMALLEST_VARIANCE = 1e-10


@dataclass(frozen=True)
class Sites:
    r"""What each target of a chunk says of its own function value, :math:`\exp(\lambda_1 f - \tfrac12 \lambda_2 f^2)`.

    Attributes:
        shift: :math:`\lambda_1`, ``(*batch, n)``.
        precision: :math:`\lambda_2`, ``(*batch, n)``, not negative.
    """

    shift: Tensor
    precision: Tensor


@dataclass(frozen=True, eq=False)
class Convergence:
    """How a site update went.

    Attributes:
        steps: steps tried, those that were halved included.
        step_size: length of the last step, ``(*batch)``.
        movement: how far a full step would move the marginals of f, from the last accepted one, ``(*batch)``: the
            largest change of a mean in standard deviations, or of a variance as a fraction; infinite if none was.
        converged: whether that is below :data:`TOLERANCE`, or no step raises the bound any more, as at the top of an
            expected log likelihood with kinks (that of a Laplace distribution by quadrature), ``(*batch)``.
    """

    steps: int
    step_size: Tensor
    movement: Tensor
    converged: Tensor

    @property
    def all_converged(self) -> bool:
        """Whether every model of the batch has converged."""
        return bool(self.converged.all())


@dataclass(frozen=True)
class _Chunk:
    """What a chunk is to the belief: features of its inputs, prior moments, and what its targets say."""

    A: Tensor  # (*batch, M, n)
    mean: Tensor  # (*batch, n)
    variance: Tensor  # (*batch, n), of f under the prior, without what u explains
    expectation: Expectation

    def marginals(self, m: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean + (self.A.mT @ m.unsqueeze(-1)).squeeze(-1)
        variance = self.variance + (scale_tril.mT @ self.A).square().sum(-2)
        return mean, variance.clamp_min(SMALLEST_VARIANCE)


def _chunk(state: OnlineState, prior: Prior, x: Tensor, expectation: Expectation) -> _Chunk:
    covariance, variance, mean = prior.at(state.nodes, as_inputs(x))
    A = state.whitened_weights @ covariance
    return _Chunk(A, mean, (variance - A.square().sum(-2)).clamp_min(0.0), expectation)


def past_bound(state: OnlineState, m: Tensor, scale_tril: Tensor) -> Tensor:
    r"""What the past contributes to the bound of :math:`q(v) = N(m, S)`, the prior included, ``(*batch)``, in nats.

    .. math:: c + r^\top m - \tfrac12 \operatorname{tr}[G (S + m m^\top)] - \mathrm{KL}[N(m, S) \,\|\, N(0, I)]

    Args:
        state: information of the past, on the basis of v.
        m: ``(*batch, M)``.
        scale_tril: lower factor of S, ``(*batch, M, M)``.
    """
    second_moment = (scale_tril * (state.G @ scale_tril)).sum((-2, -1)) + (m * _apply(state.G, m)).sum(-1)
    return state.c + (state.r * m).sum(-1) - 0.5 * second_moment - gaussian_kl(m, scale_tril)


def bound(
    state: OnlineState, prior: Prior, x: Tensor, expectation: Expectation, m: Tensor, scale_tril: Tensor
) -> Tensor:
    """The bound of a given q(v) = N(m, S) on one more chunk, differentiable in everything, ``(*batch)``, in nats.

    Args:
        state: information of the past, on the basis of v.
        prior: kernel and mean.
        x: inputs of the chunk, ``(*batch, n, d)``.
        expectation: expected log likelihood of its targets.
        m: ``(*batch, M)``.
        scale_tril: lower factor of S, ``(*batch, M, M)``.
    """
    chunk = _chunk(state, prior, x, expectation)
    return expectation(*chunk.marginals(m, scale_tril)).sum(-1) + past_bound(state, m, scale_tril)


def update(
    state: OnlineState,
    prior: Prior,
    x: Tensor,
    expectation: Expectation,
    count: Tensor | int,
    steps: int | None = None,
    first_step: float = 0.5,
    longest_step: float = 1.0,
    shards: Shards | None = None,
) -> tuple[OnlineState, Convergence]:
    """Absorb observations whose likelihood is not Gaussian.

    A step that lowers the bound, or leads to something that is not finite, is halved, and so is one that goes back on
    the one before it; another may be followed by one of twice its length. G stays positive semi-definite, because the
    precision of a site is never negative. For a likelihood that is not log-concave that can stop short of a stationary
    point; the bound still never falls.

    Args:
        state: on a basis of the same hyperparameters as ``prior``.
        prior: kernel and mean.
        x: inputs, ``(*batch, n, d)`` or ``(n,)``.
        expectation: expected log likelihood of each target; a missing one contributes zero.
        count: observations in the chunk, for the books.
        steps: at most so many steps; ``None`` means until convergence, or :data:`MOST_STEPS`.
        first_step: length of the first step.
        longest_step: bound on the length of the others.
        shards: the other parts of the chunk; all take the same steps, with three exchanges each.

    Returns:
        The new state and how it went. Gradients flow to ``x`` and ``state`` with the sites as constants.

    Raises:
        ValueError: the first bound is not finite: the targets do not suit the likelihood or the prior.
    """
    chunk = _chunk(state, prior, x, expectation)
    sites, convergence = _search(state, chunk, steps, first_step, longest_step, None, shards)
    G, r = _with_sites(state, chunk.A, sites, shards)
    m, scale_tril = online.posterior(replace(state, G=G, r=r))
    value = expectation(*chunk.marginals(m, scale_tril)).sum(-1)
    if shards is not None:
        number = torch.as_tensor(count, device=r.device).double().expand(r.shape[:-1])
        value, number = shards.total(value.expand(r.shape[:-1]), number)
        count = number.round().long()
    value = value + past_bound(state, m, scale_tril)
    # As `online.log_evidence` reads it: the evidence of the new state is the value of the bound.
    c = value - scale_tril.diagonal(dim1=-1, dim2=-2).log().sum(-1) - 0.5 * (r * m).sum(-1)
    return replace(state, G=G, r=r, c=c, count=state.count + count), convergence


@torch.no_grad()
def find(
    state: OnlineState,
    prior: Prior,
    x: Tensor,
    expectation: Expectation,
    steps: int | None = None,
    first_step: float = 0.5,
    longest_step: float = 1.0,
    start: Sites | None = None,
) -> tuple[Sites, Convergence]:
    """The sites of a chunk, as :func:`update` finds them.

    Args:
        state: as in :func:`update`.
        prior: likewise.
        x: likewise.
        expectation: likewise.
        steps: likewise.
        first_step: likewise.
        longest_step: likewise.
        start: sites to start from; ``None`` means none.

    Returns:
        The sites and how it went.

    Raises:
        ValueError: the first bound is not finite.
    """
    return _search(state, _chunk(state, prior, x, expectation), steps, first_step, longest_step, start)


@torch.no_grad()
def _search(
    state: OnlineState,
    chunk: _Chunk,
    steps: int | None,
    first_step: float,
    longest_step: float,
    start: Sites | None,
    shards: Shards | None = None,
) -> tuple[Sites, Convergence]:
    sites = start
    if sites is None:
        nothing = torch.zeros_like(chunk.mean).expand(
            torch.broadcast_shapes(chunk.mean.shape, (*state.r.shape[:-1], 1))
        )
        sites = Sites(nothing, nothing)
    G, r = _with_sites(state, chunk.A, sites, shards)
    m, scale_tril = online.posterior(replace(state, G=G, r=r))
    mean, variance = chunk.marginals(m, scale_tril)
    value, alpha, beta = _expected(chunk.expectation, mean, variance)
    if shards is not None:
        (value,) = shards.total(value)
    value = value + past_bound(state, m, scale_tril)
    if not value.isfinite().all():
        raise ValueError("y: the expected log likelihood of the targets under the present belief is not finite.")
    step = torch.full_like(value, first_step)
    movement = torch.full_like(step, math.inf)
    best, idle, move = value, torch.zeros_like(step), torch.zeros_like(mean)
    tried = 0
    most = math.ceil(MOST_STEPS / longest_step) if steps is None else steps
    while tried < most:
        tried += 1
        s = step.unsqueeze(-1)
        target = Sites(alpha + beta * (mean - chunk.mean), beta)
        finite = (target.shift + target.precision).isfinite().all(-1)
        new = _where(finite, _between(sites, target, s), sites)
        G, r = _with_sites(state, chunk.A, new, shards)
        m, scale_tril = online.posterior(replace(state, G=G, r=r))
        new_mean, new_variance = chunk.marginals(m, scale_tril)
        new_value, new_alpha, new_beta = _expected(chunk.expectation, new_mean, new_variance)
        usable = finite & (new_alpha + new_beta).isfinite().all(-1)
        moved = _largest(((new_mean - mean).abs() / variance.sqrt()).maximum((new_variance / variance - 1).abs()))
        turn = (move * (new_mean - mean) / variance).sum(-1)
        if shards is not None:
            new_value, turn, unusable = shards.total(new_value, turn, (~usable).double())
            usable, moved = unusable == 0, shards.largest(moved)
        new_value = new_value + past_bound(state, m, scale_tril)
        rises = (new_value >= value - ROUNDING * (1 + value.abs())) & usable
        movement = torch.where(rises, moved / step, movement)
        # A step back on the one before it means that both were too long, even where the bound rises.
        turns = turn < 0
        move = torch.where(rises.unsqueeze(-1), new_mean - mean, move)
        sites = _where(rises, new, sites)
        take = rises.unsqueeze(-1)
        mean, variance = torch.where(take, new_mean, mean), torch.where(take, new_variance, variance)
        alpha, beta = torch.where(take, new_alpha, alpha), torch.where(take, new_beta, beta)
        value = torch.where(rises, new_value, value)
        gained = value > best + LEAST_GAIN * (1 + value.abs())
        best, idle = torch.where(gained, value, best), torch.where(gained, 0, idle + 1)
        converged = (movement < TOLERANCE) | ((idle >= PATIENCE) & movement.isfinite())
        tried_step, step = step, torch.where(rises & ~turns, (2 * step).clamp_max(longest_step), step / 2)
        if bool(converged.all()):
            break
    return sites, Convergence(tried, tried_step, movement, converged)


@torch.no_grad()
def posterior(state: OnlineState, prior: Prior, x: Tensor, sites: Sites) -> tuple[Tensor, Tensor]:
    """Mean ``(*batch, M)`` and lower covariance factor ``(*batch, M, M)`` of q(v) with the sites of a chunk."""
    A = state.whitened_weights @ prior.covariance(state.nodes, as_inputs(x))
    G, r = _with_sites(state, A, sites)
    return online.posterior(replace(state, G=G, r=r))


def _between(a: Sites, b: Sites, weight: Tensor) -> Sites:
    return Sites(torch.lerp(a.shift, b.shift, weight), torch.lerp(a.precision, b.precision, weight))


def _where(condition: Tensor, a: Sites, b: Sites) -> Sites:
    condition = condition.unsqueeze(-1)
    return Sites(torch.where(condition, a.shift, b.shift), torch.where(condition, a.precision, b.precision))


def _with_sites(state: OnlineState, A: Tensor, sites: Sites, shards: Shards | None = None) -> tuple[Tensor, Tensor]:
    """G and r of past and chunk together, the chunk's other parts included."""
    information, shift = (A * sites.precision.unsqueeze(-2)) @ A.mT, _apply(A, sites.shift)
    if shards is not None:
        information, shift = shards.total(information, shift)
    return state.G + 0.5 * (information + information.mT), state.r + shift


def _largest(values: Tensor) -> Tensor:
    """Of the last axis; zero where it is empty, as a part of a chunk may be."""
    return values.amax(-1) if values.shape[-1] else values.sum(-1)


def _expected(expectation: Expectation, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the expected log likelihoods, their derivatives alpha, and the precisions beta, not negative."""
    with torch.inference_mode(False), torch.enable_grad():
        mean, variance = mean.detach().clone().requires_grad_(), variance.detach().clone().requires_grad_()
        values = expectation(mean, variance)
        if values.shape != mean.shape:  # several targets share a marginal, and each has its own derivatives
            return _expected(expectation, mean.expand(values.shape), variance.expand(values.shape))
        alpha, slope = torch.autograd.grad(values.sum(), (mean, variance), materialize_grads=True)
    return values.detach().sum(-1), alpha, (-2 * slope).clamp_min(0.0)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
