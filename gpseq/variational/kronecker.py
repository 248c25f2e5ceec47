r"""The belief of a stream over space and time, and the pure functions that carry it forward.

With a separable kernel :math:`k_t k_s` and features that are products of one of time and one of space, the whitened
inducing vector is a matrix v of shape :math:`M_t \times M_s` with independent standard normal entries, and a grid of
readings has the whitened features :math:`A_t \otimes A_s`. Old readings enter as the factor

.. math:: \exp(-\tfrac12 v^\top G v + \langle R, v \rangle + c), \qquad G = \sum_j \Gamma_j \otimes H_j + \bar G,

with one term for each set of sensors that ever reported together (and each way their noise varied). A single term is
enough only while the same sensors report with the same noise: to let the newest :math:`H` stand for all of the past
would count old readings as if they had been taken by today's sensors. When the terms need more memory than the matrix
that they stand for, they are summed up in the dense rest :math:`\bar G`. Everything is float64.

Source:
    Derived here from the streaming update of :mod:`gpseq.variational.online`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean, ZeroMean
from linear_operator import to_dense
from torch import Tensor

from gpseq.features.base import dense
from gpseq.precision import floating_tensors, in_float64
from gpseq.variational import online
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import Prior


@dataclass(frozen=True)
class SpaceTimePrior:
    """A separable prior: kernels of time and of space, and a mean of both.

    Attributes:
        time: kernel of time, without mean.
        space: kernel of space, without mean.
        mean: of inputs ``(n, 1 + d)``, time first; ``None`` is zero.
    """

    time: Prior
    space: Prior
    mean: Mean | None = None

    def mean_at(self, x: Tensor, frozen: bool = True) -> Tensor:
        """Mean at inputs ``(n, 1 + d)``, ``(n,)``, float64; ``frozen`` keeps gradients away from its parameters."""
        if self.mean is None or isinstance(self.mean, ZeroMean):
            return x.new_zeros(x.shape[:-1], dtype=torch.float64)
        return in_float64(self.mean, (self.mean,), x.double(), frozen=frozen).double()

    def mean_on(self, times: Tensor, locations: Tensor, frozen: bool = True) -> Tensor:
        """Mean on the grid of times ``(n, 1)`` and locations ``(s, d)``, ``(n, s)``, float64."""
        shape = len(times), len(locations)
        if self.mean is None or isinstance(self.mean, ZeroMean):
            return times.new_zeros(shape, dtype=torch.float64)
        return self.mean_at(grid_inputs(times, locations), frozen).reshape(shape)

    @torch.no_grad()
    def mean_parameters(self) -> Tensor:
        """Values of all floating parameters and buffers of the mean in one vector, ``(p,)``, float64."""
        values = [] if self.mean is None else [t.reshape(-1).double() for t in floating_tensors(self.mean)]
        return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def grid_inputs(times: Tensor, locations: Tensor) -> Tensor:
    """All pairs of times ``(n, 1)`` and locations ``(s, d)``, location fastest, ``(n s, 1 + d)``."""
    n, s = len(times), len(locations)
    return torch.cat([times.repeat_interleave(s, dim=0), locations.repeat(n, 1)], dim=-1)


class SeparableKernel(Kernel):
    r"""The product of a kernel of time, column 0, and one of space, the columns after it.

    GPyTorch's lazy product of two covariances would factor both, which takes :math:`n \times n` numbers for a diagonal.

    Args:
        time: kernel of one column.
        space: kernel of the others.

    Example:
        >>> import gpytorch
        >>> kernel = SeparableKernel(gpytorch.kernels.RBFKernel(), gpytorch.kernels.RBFKernel())
        >>> kernel(torch.zeros(2, 3), torch.zeros(4, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(self, time: Kernel, space: Kernel) -> None:
        super().__init__()
        self.time, self.space = time, space

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Dense values, or their diagonal."""
        return _values(self.time, x1[..., :1], x2[..., :1], diag) * _values(self.space, x1[..., 1:], x2[..., 1:], diag)


def _values(kernel: Kernel, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
    return to_dense(kernel(x1, x2, diag=True)) if diag else dense(kernel, x1, x2)


@dataclass(frozen=True)
class KroneckerInformation:
    r"""What all readings so far say of the whitened inducing matrix.

    J terms, S declared sensors.

    Attributes:
        temporal: :math:`\Gamma_j`, ``(J, M_t, M_t)``, positive semi-definite.
        spatial: :math:`H_j`, ``(J, M_s, M_s)``, positive semi-definite.
        weights: 1 / noise of each sensor in :math:`H_j`, 0 where it was silent, ``(J, S)``; NaN where a term can take
            no more readings, because the kernel of space has changed since.
        rest: :math:`\bar G`, ``(M_t M_s, M_t M_s)``, or ``(0, 0)`` where there is none.
        r: R, ``(M_t, M_s)``.
        c: log scale, ``()``.
        count: readings absorbed, ``()``, int64.
        sensors: where the declared sensors are, ``(S, d)``.
        whitened_mean: whitened projection of the mean function, ``(M_t, M_s)``.
        mean_parameters: the values that it was computed with, ``(p,)``.
    """

    temporal: Tensor
    spatial: Tensor
    weights: Tensor
    rest: Tensor
    r: Tensor
    c: Tensor
    count: Tensor
    sensors: Tensor
    whitened_mean: Tensor
    mean_parameters: Tensor

    @property
    def num_terms(self) -> int:
        """J."""
        return self.temporal.shape[0]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all fields."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    def times(self, v: Tensor) -> Tensor:
        """G v for a matrix ``(M_t, M_s)``."""
        product = (self.temporal @ v @ self.spatial.mT).sum(0)
        if self.rest.numel():
            product = product + (self.rest @ v.reshape(-1)).reshape(v.shape)
        return product

    def dense(self) -> Tensor:
        """G as one matrix, ``(M_t M_s, M_t M_s)``."""
        rows, columns = self.r.shape
        total = torch.einsum("jab,jcd->acbd", self.temporal, self.spatial).reshape(rows * columns, rows * columns)
        return total + self.rest if self.rest.numel() else total


@dataclass(frozen=True)
class KroneckerState:
    """The belief: two bases and the information that refers to them.

    Attributes:
        time: basis of time; its own information is empty.
        space: basis of space; its own information is empty.
        information: what the readings say.
    """

    time: OnlineState
    space: OnlineState
    information: KroneckerInformation


def initial_state(time: OnlineState, space: OnlineState, prior: SpaceTimePrior, sensors: Tensor) -> KroneckerState:
    """A state that has seen nothing.

    Args:
        time: a state on the features of time that has seen nothing, see :func:`gpseq.variational.online.initial_state`.
        space: the same for space.
        prior: kernels and mean.
        sensors: where they are, ``(S, d)``.

    Returns:
        The state; its posterior is the prior.
    """
    rows, columns = time.num_features, space.num_features
    zeros = time.G.new_zeros
    information = KroneckerInformation(
        temporal=zeros(0, rows, rows),
        spatial=zeros(0, columns, columns),
        weights=zeros(0, len(sensors)),
        rest=zeros(0, 0),
        r=zeros(rows, columns),
        c=zeros(()),
        count=torch.zeros((), dtype=torch.int64, device=time.G.device),
        sensors=sensors.double().clone(),  # the caller may go on to change theirs
        whitened_mean=_whitened_mean(time, space, prior),
        mean_parameters=prior.mean_parameters().to(time.G.device),
    )
    return KroneckerState(time, space, information)


def declare(state: KroneckerState, sensors: Tensor) -> KroneckerState:
    """The same belief with more sensors ``(S', d)``, all of which have been silent so far."""
    before = state.information
    weights = torch.cat([before.weights, before.weights.new_zeros(before.num_terms, len(sensors))], dim=-1)
    information = replace(before, weights=weights, sensors=torch.cat([before.sensors, sensors.double()]))
    return replace(state, information=information)


def update(state: KroneckerState, prior: SpaceTimePrior, times: Tensor, y: Tensor, weights: Tensor) -> KroneckerState:
    r"""Absorb readings with Gaussian noise, exactly within the sparse model.

    Rows in which the same sensors report with the same noise join one term: for a complete row
    :math:`\Gamma \leftarrow \Gamma + A_t A_t^\top`, with :math:`H = A_s D A_s^\top`, :math:`D` the weights of the row.

    Args:
        state: on bases of the same hyperparameters as ``prior``.
        prior: kernels and mean.
        times: ``(n, 1)``.
        y: readings of all declared sensors, ``(n, S)``; anything where the weight is 0.
        weights: 1 / noise, ``(n, S)``; 0 where there is no reading.

    Returns:
        The new state.
    """
    before = state.information
    kuf, time_variance, _ = prior.time.at(state.time.nodes, times)
    A_t = state.time.whitened_weights @ kuf
    kuf, space_variance, _ = prior.space.at(state.space.nodes, before.sensors)
    A_s = state.space.whitened_weights @ kuf

    observed = weights > 0
    error = torch.where(observed, y.double() - prior.mean_on(times, before.sensors), 0.0)
    log_scale = torch.where(observed, 2 * math.pi / weights, 1.0).log()
    explained = A_t.square().sum(0).outer(A_s.square().sum(0))
    residual = (weights * (time_variance.outer(space_variance) - explained)).sum()
    information = replace(
        before,
        r=before.r + A_t @ (weights * error) @ A_s.mT,
        c=before.c - 0.5 * (log_scale.sum() + (weights * error.square()).sum() + residual),
        count=before.count + observed.sum(),
    )
    for patterns, temporal in _terms(weights, A_t, most=_most_terms(information)):
        information = _spill(_add_terms(information, patterns, temporal, A_s))
    return replace(state, information=information)


def _terms(weights: Tensor, A_t: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each set of weights that occurs, ``(k, S)``, and what its rows say of time, ``(k, M_t, M_t)``, k <= most.

    Rows without a reading are left out.
    """
    if not len(weights):
        return
    if (weights == weights[0]).all():  # one look at the device where all is complete
        if weights[0].any():
            yield weights[:1], _gram(A_t).unsqueeze(0)
        return
    patterns, which = weights.unique(dim=0, return_inverse=True)
    spoken = patterns.any(-1).nonzero().squeeze(-1)
    for numbers in spoken.split(most):
        yield patterns[numbers], torch.stack([_gram(A_t[:, which == number]) for number in numbers])


def _gram(A: Tensor) -> Tensor:
    product = A @ A.mT
    return 0.5 * (product + product.mT)


def _add_terms(
    information: KroneckerInformation, patterns: Tensor, temporal: Tensor, A_s: Tensor
) -> KroneckerInformation:
    """Sets of weights that have a term join it, the others make their own."""
    # Pattern by pattern: all at once would take as much memory as all sensors times all terms.
    known = torch.stack([(pattern == information.weights).all(-1) for pattern in patterns])
    new = ~known.any(-1)
    joined = information.temporal + torch.einsum("kj,kab->jab", known.to(temporal.dtype), temporal)
    patterns, temporal = patterns[new], temporal[new]
    spatial = [_gram(A_s * pattern.sqrt()).unsqueeze(0) for pattern in patterns]
    return replace(
        information,
        temporal=torch.cat([joined, temporal]),
        spatial=torch.cat([information.spatial, *spatial]),
        weights=torch.cat([information.weights, patterns]),
    )


def _most_terms(information: KroneckerInformation) -> int:
    """How many terms take no more numbers than the matrix that they stand for, at least one."""
    rows, columns = information.r.shape
    return max(1, (rows * columns) ** 2 // (rows**2 + columns**2 + information.weights.shape[-1]))


def _spill(information: KroneckerInformation) -> KroneckerInformation:
    """Sum the terms up where they take more numbers than the matrix that they stand for."""
    if information.num_terms <= _most_terms(information):
        return information
    return replace(
        information,
        rest=information.dense(),
        temporal=information.temporal[:0],
        spatial=information.spatial[:0],
        weights=information.weights[:0],
    )


def is_finite(information: KroneckerInformation) -> bool:
    """Whether the information is small enough for float64, its dense form included."""
    largest = (_traces(information.temporal) * _traces(information.spatial)).sum() + information.rest.diagonal().sum()
    return bool((largest + information.r.abs().sum() + information.c).isfinite())


def transfer(state: KroneckerState, time: OnlineState, space: OnlineState, prior: SpaceTimePrior) -> KroneckerState:
    r"""Carry the information to other bases, other hyperparameters, or another mean.

    As :func:`gpseq.variational.online.transfer` by ``"vfe"`` with :math:`B = B_t \otimes B_s`: every term goes its own
    way, :math:`\Gamma_j \leftarrow B_t \Gamma_j B_t^\top`, :math:`H_j \leftarrow B_s H_j B_s^\top`, and

    .. math:: c \leftarrow c - \tfrac12 \operatorname{tr}[G (C_t \otimes C_s - B^\top B)].

    Args:
        state: the old belief.
        time: the new basis of time, which may have another number of features; that of ``state`` where it stays.
        space: the same for space.
        prior: current kernels and mean.

    Returns:
        The state on the new bases.
    """
    # Where a basis stays, B is the identity but for the jitter in its factor, and every pass would lose a little.
    stays = None, None
    B_t, C_t = stays if time is state.time else online.bridge(state.time, time, prior.time)
    B_s, C_s = stays if space is state.space else online.bridge(state.space, space, prior.space)
    old = _shift_mean(state, prior)
    temporal, spatial = _carried(B_t, old.temporal), _carried(B_s, old.spatial)
    r = old.r if B_t is None else B_t @ old.r
    r = r if B_s is None else r @ B_s.mT
    lost = _traces(old.temporal, C_t) * _traces(old.spatial, C_s) - _traces(temporal) * _traces(spatial)
    c = old.c - 0.5 * lost.sum()
    rest = old.rest
    if rest.numel() and not (B_t is None and B_s is None):
        rest = _carried_rest(old.rest, old.r.shape, B_t, B_s)
        c = c - 0.5 * (_trace_with(old.rest, old.r.shape, C_t, C_s) - _traces(rest))
    information = replace(
        old,
        temporal=temporal,
        spatial=spatial,
        # What sensors would add under another kernel of space is not what they added then.
        weights=old.weights if B_s is None else torch.full_like(old.weights, torch.nan),
        rest=rest,
        r=r,
        c=c,
        whitened_mean=_whitened_mean(time, space, prior),
        mean_parameters=prior.mean_parameters().to(r.device),
    )
    return KroneckerState(time, space, _spill(information))


def _whitened_mean(time: OnlineState, space: OnlineState, prior: SpaceTimePrior) -> Tensor:
    return time.whitened_weights @ prior.mean_on(time.nodes, space.nodes) @ space.whitened_weights.mT


def _shift_mean(state: KroneckerState, prior: SpaceTimePrior) -> KroneckerInformation:
    """The same factor, with v measured from the prior's present mean."""
    old = state.information
    d = _whitened_mean(state.time, state.space, prior) - old.whitened_mean
    Gd = old.times(d)
    return replace(old, r=old.r - Gd, c=old.c + (old.r * d).sum() - 0.5 * (d * Gd).sum())


def _carried(B: Tensor | None, matrices: Tensor) -> Tensor:
    """B G B' of each, symmetric to the last bit; ``None`` is the identity."""
    if B is None:
        return matrices
    product = B @ matrices @ B.mT
    return 0.5 * (product + product.mT)


def _carried_rest(rest: Tensor, shape: torch.Size, B_t: Tensor | None, B_s: Tensor | None) -> Tensor:
    """The dense rest under ``B_t (x) B_s``, one axis at a time; the product is never formed."""
    blocks = rest.reshape(*shape, *shape)
    if B_t is not None:
        blocks = torch.einsum("ia,abcd,jc->ibjd", B_t, blocks, B_t)
    if B_s is not None:
        blocks = torch.einsum("ib,abcd,jd->aicj", B_s, blocks, B_s)
    size = blocks.shape[0] * blocks.shape[1]
    carried = blocks.reshape(size, size)
    return 0.5 * (carried + carried.mT)


def _trace_with(rest: Tensor, shape: torch.Size, C_t: Tensor | None, C_s: Tensor | None) -> Tensor:
    """Trace of the dense rest times ``C_t (x) C_s``."""
    blocks = rest.reshape(*shape, *shape)
    partial = blocks.diagonal(dim1=0, dim2=2).sum(-1) if C_t is None else torch.einsum("abcd,ac->bd", blocks, C_t)
    return _traces(partial, C_s)


def _traces(matrices: Tensor, other: Tensor | None = None) -> Tensor:
    if other is None:
        return matrices.diagonal(dim1=-1, dim2=-2).sum(-1)
    return (matrices * other).sum((-2, -1))
