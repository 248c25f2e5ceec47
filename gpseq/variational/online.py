r"""The belief of a stream as one frozen value, and the pure functions that carry it forward.

The old data enter as a Gaussian factor in the whitened inducing vector :math:`v = L^{-1} u`,

.. math:: \exp(-\tfrac12 v^\top G v + r^\top v + c),

so that with the prior :math:`v \sim N(0, I)` the posterior is :math:`q(v) = N(P^{-1} r, P^{-1})`, :math:`P = I + G`.
New observations only add to (G, r, c); a new basis maps them by one matrix B whose norm is at most one. Nothing is
ever inverted, and G is accumulated, never recovered by subtraction. Everything is float64.

Source:
    Bui, Nguyen and Turner (2017), Streaming sparse Gaussian process approximations, for the objective; the whitened
    information form is derived from it here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from linear_operator import to_dense
from torch import Tensor

from gpseq.features.base import InducingFeatures, as_inputs
from gpseq.linalg import cholesky, natural_to_moments
from gpseq.variational.prior import Prior
from gpseq.variational.shards import Shards

TRANSFERS = ("vfe", "adf")

#: Eigenvalues of a transferred covariance are kept above this ("adf"); below it G would overflow its own precision.
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class OnlineState:
    r"""What a stream knows: the information of all past data, and the basis it refers to.

    M features, Q nodes, d input columns, p hyperparameters; batch shapes of the fields broadcast.

    Attributes:
        G: precision of the likelihood factor, ``(*batch, M, M)``, positive semi-definite.
        r: its shift, ``(*batch, M)``.
        c: its log scale, ``(*batch)``.
        count: observations absorbed by each model of the batch, ``(*batch)``, int64.
        nodes: quadrature nodes of the basis, ``(*batch, Q, d)``.
        factor: L, lower factor of :math:`K_{uu} + \epsilon I`, ``(*batch, M, M)``.
        jitter: :math:`\epsilon`, ``(*batch)``.
        whitened_weights: :math:`V = L^{-1} W`, ``(*batch, M, Q)``; an update costs one product with them.
        whitened_mean: :math:`V \mu(z)`, the whitened projection of the mean function, ``(*batch, M)``.
        hyperparameters: the values that the basis was computed with, ``(p,)``.
    """

    G: Tensor
    r: Tensor
    c: Tensor
    count: Tensor
    nodes: Tensor
    factor: Tensor
    jitter: Tensor
    whitened_weights: Tensor
    whitened_mean: Tensor
    hyperparameters: Tensor

    @property
    def num_features(self) -> int:
        """M."""
        return self.G.shape[-1]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all fields."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    def detach(self) -> OnlineState:
        """The same value without a graph."""
        return OnlineState(**{name: tensor.detach() for name, tensor in self.items()})


def initial_state(features: InducingFeatures, prior: Prior, jitter: float | None = None) -> OnlineState:
    """A state that has seen nothing: zero information on the basis of ``features``.

    Args:
        features: what u is.
        prior: kernel and mean.
        jitter: relative jitter of the factorisation, see :func:`gpseq.linalg.cholesky`.

    Returns:
        The state; its posterior is the prior.

    Example:
        >>> import gpytorch, gpseq
        >>> prior = Prior(gpytorch.kernels.RBFKernel())
        >>> state = initial_state(gpseq.features.HippoFeatures(8, horizon=5.0), prior)
        >>> state = update(state, prior, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.7]), torch.tensor(0.01))
        >>> state.count.item(), log_evidence(state).item() < 0
        (2, True)
    """
    nodes, weights = features.nodes(), features.weights()
    covariance = prior.between(weights, nodes, weights, nodes)
    factor, epsilon = cholesky(0.5 * (covariance + covariance.mT), jitter)
    whitened_weights = torch.linalg.solve_triangular(factor, to_dense(weights), upper=False)
    whitened_mean = _apply(whitened_weights, prior.mean_at(nodes))
    batch, order = whitened_mean.shape[:-1], factor.shape[-1]
    return OnlineState(
        G=factor.new_zeros(*factor.shape[:-2], order, order),
        r=factor.new_zeros(*batch, order),
        c=factor.new_zeros(batch),
        count=torch.zeros(batch, dtype=torch.int64, device=factor.device),
        nodes=nodes.clone(),  # they may be the features' own parameter, and a state is a value
        factor=factor,
        jitter=epsilon,
        whitened_weights=whitened_weights,
        whitened_mean=whitened_mean,
        hyperparameters=prior.hyperparameters().to(factor.device),
    )


def whiten(state: OnlineState, prior: Prior, x: Tensor) -> Tensor:
    """Whitened features of inputs, :math:`A = V k(z, x)`.

    Args:
        state: its basis must belong to the hyperparameters of ``prior``.
        prior: kernel and mean.
        x: ``(*batch, n, d)`` or ``(n,)``.

    Returns:
        ``(*batch, M, n)``.
    """
    x = as_inputs(x)
    return state.whitened_weights @ prior.covariance(state.nodes, x)


def update(
    state: OnlineState,
    prior: Prior,
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    observed: Tensor | None = None,
    shards: Shards | None = None,
) -> OnlineState:
    r"""Absorb observations with Gaussian noise, exactly within the sparse model.

    .. math::
        G \leftarrow G + A D A^\top, \quad r \leftarrow r + A D (y - \mu(x)), \quad D = \operatorname{diag}(1 / s)

    and c takes the constants of the collapsed bound, among them :math:`-\tfrac12 \sum_i (k_{ii} - |A_i|^2) / s_i`.

    Args:
        state: on a basis of the same hyperparameters as ``prior``; see :func:`transfer`.
        prior: kernel and mean.
        x: inputs, ``(*batch, n, d)`` or ``(n,)``.
        y: targets, ``(*batch, n)``; leading batch dimensions beyond those of x share G.
        noise: noise variances s, broadcastable to ``(*batch, n)``.
        observed: which targets exist, bool, broadcastable to ``(*batch, n)``; ``None`` means all.
        shards: the other parts of the chunk; what all of them add is summed in one exchange.

    Returns:
        The new state.
    """
    x = as_inputs(x)
    covariance, variance, mean = prior.at(state.nodes, x)
    A = state.whitened_weights @ covariance
    y, noise = y.double(), noise.double().expand(*noise.shape[:-1], x.shape[-2])
    error = y - mean
    if observed is None:
        weight, log_scale = noise.reciprocal(), torch.log(2 * math.pi * noise)
        count: Tensor | int = error.shape[-1]
    else:
        # A missing target may be NaN, and so may its noise: replace, do not multiply.
        weight = torch.where(observed, noise, math.inf).reciprocal()
        log_scale = torch.where(observed, torch.log(2 * math.pi * noise), 0.0)
        error = torch.where(observed, error, 0.0)
        count = observed.sum(-1)
    weighted = A * weight.unsqueeze(-2)
    information = weighted @ A.mT
    residual = (weight * variance).sum(-1) - _trace(information)
    shift = _apply(weighted, error)
    constant = -0.5 * (log_scale.sum(-1) + (weight * error.square()).sum(-1) + residual)
    if shards is not None:
        count = torch.as_tensor(count, device=shift.device).double().expand(shift.shape[:-1])
        constant = constant.expand(shift.shape[:-1])
        information, shift, constant, count = shards.total(information, shift, constant, count)
        count = count.round().long()
    return replace(
        state,
        G=state.G + 0.5 * (information + information.mT),
        r=state.r + shift,
        c=state.c + constant,
        count=state.count + count,
    )


def transfer(state: OnlineState, basis: OnlineState, prior: Prior, method: str = "vfe") -> OnlineState:
    r"""Carry the information to another basis, other hyperparameters, or another mean.

    With :math:`B = L_b^{-1} K_{ba} L_a^{-\top}` and :math:`C = L_a^{-1} (K_{aa} + \epsilon_a I) L_a^{-\top}`
    (the identity when the hyperparameters are those of the old basis), both under the current hyperparameters,

    - ``"vfe"``: the old factor is kept as a likelihood of u_a:
      :math:`G_b = B G B^\top,\; r_b = B r,\; c_b = c - \tfrac12 \operatorname{tr}[G (C - B^\top B)]`.
    - ``"adf"``: the new belief is the marginal of the old posterior process on the new functionals; the evidence
      becomes a sum of predictive terms instead of a bound.

    Args:
        state: the old belief.
        basis: where to; any state on the new basis made with ``prior`` (:func:`initial_state`). Only its basis is
            used. M may differ.
        prior: current kernel and mean.
        method: ``"vfe"`` or ``"adf"``.

    Returns:
        A state on the new basis with the same ``count``.

    Raises:
        ValueError: an unknown method.
    """
    if method not in TRANSFERS:
        raise ValueError(f"method: expected one of {TRANSFERS}, got {method!r}.")
    B, C = bridge(state, basis, prior)
    if C is not None:
        state = _shift_mean(state, prior)
    G, r, c = (_transfer_vfe if method == "vfe" else _transfer_adf)(state, B, C)
    return replace(basis, G=0.5 * (G + G.mT), r=r, c=c, count=state.count)


def bridge(state: OnlineState, basis: OnlineState, prior: Prior) -> tuple[Tensor, Tensor | None]:
    r"""Whitened covariances that lead from one basis to another, under the current hyperparameters.

    Args:
        state: on the old basis.
        basis: the new one.
        prior: current kernel and mean.

    Returns:
        B, ``(*batch, M_b, M_a)``, and C, ``(*batch, M_a, M_a)``, or ``None`` where it is the identity because the
        hyperparameters are those of the old basis; see :func:`transfer`.
    """
    B = prior.between(basis.whitened_weights, basis.nodes, state.whitened_weights, state.nodes)
    if torch.equal(state.hyperparameters, basis.hyperparameters):
        return B, None
    return B, _old_basis_covariance(state, prior)


def _shift_mean(state: OnlineState, prior: Prior) -> OnlineState:
    """The same factor, with v measured from the prior's present mean: a function of v + d becomes one of v."""
    d = _apply(state.whitened_weights, prior.mean_at(state.nodes)) - state.whitened_mean
    Gd = _apply(state.G, d)
    return replace(state, r=state.r - Gd, c=state.c + (state.r * d).sum(-1) - 0.5 * (d * Gd).sum(-1))


def _old_basis_covariance(state: OnlineState, prior: Prior) -> Tensor:
    """C: covariance of the old whitened vector under the current hyperparameters, ``(*batch, M, M)``."""
    V = state.whitened_weights
    eye = torch.eye(state.num_features, dtype=V.dtype, device=V.device)
    inverse = torch.linalg.solve_triangular(state.factor, eye, upper=False)
    covariance = prior.between(V, state.nodes, V, state.nodes)
    C = covariance + state.jitter[..., None, None] * (inverse @ inverse.mT)
    return 0.5 * (C + C.mT)


def _transfer_vfe(state: OnlineState, B: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    G = B @ state.G @ B.mT
    prior_trace = _trace(state.G) if C is None else (state.G * C).sum((-2, -1))
    return G, _apply(B, state.r), state.c - 0.5 * (prior_trace - _trace(G))


def _transfer_adf(state: OnlineState, B: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if C is not None:
        # The old functionals under the current hyperparameters, whitened anew by the factor of C: nothing is lost.
        root, _ = cholesky(C)
        state = replace(state, G=root.mT @ state.G @ root, r=_apply(root.mT, state.r))
        B = torch.linalg.solve_triangular(root, B.mT, upper=False).mT
    mean, scale_tril = posterior(state)
    spread = B @ scale_tril
    eye = torch.eye(B.shape[-2], dtype=B.dtype, device=B.device)
    S = eye - B @ B.mT + spread @ spread.mT
    values, vectors = torch.linalg.eigh(0.5 * (S + S.mT))
    # No direction may know less than the prior (G stays positive semi-definite) nor more than float64 can say.
    values = values.clamp(_SMALLEST_VARIANCE, 1.0)
    G = (vectors * (values.reciprocal() - 1).unsqueeze(-2)) @ vectors.mT
    m = _apply(B, mean)
    r = m + _apply(G, m)
    return G, r, log_evidence(state) - 0.5 * values.log().sum(-1) - 0.5 * (m * r).sum(-1)


def marginal(mean: Tensor, scale_tril: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    r"""A belief N(m, S) of the old whitened vector, seen on a new basis: :math:`N(B m,\; I - B B^\top + B S B^\top)`.

    Args:
        mean: m, ``(*batch, M)``.
        scale_tril: lower factor of S, ``(*batch, M, M)``.
        B: whitened transfer under unchanged hyperparameters, ``(*batch, M', M)``.

    Returns:
        Mean ``(*batch, M')`` and lower factor of the covariance ``(*batch, M', M')``.
    """
    spread = B @ scale_tril
    eye = torch.eye(B.shape[-2], dtype=B.dtype, device=B.device)
    values, vectors = torch.linalg.eigh(eye - B @ B.mT + spread @ spread.mT)
    root = vectors * values.clamp_min(_SMALLEST_VARIANCE).sqrt().unsqueeze(-2)
    upper = torch.linalg.qr(root.mT, mode="r").R
    return _apply(B, mean), (upper * upper.diagonal(dim1=-1, dim2=-2).sign().unsqueeze(-1)).mT


def posterior(state: OnlineState) -> tuple[Tensor, Tensor]:
    """Mean ``(*batch, M)`` and lower covariance factor ``(*batch, M, M)`` of the whitened inducing vector, q(v)."""
    eye = torch.eye(state.num_features, dtype=state.G.dtype, device=state.G.device)
    # G is positive semi-definite, so P = I + G has no eigenvalue below one, whatever rounding says.
    return natural_to_moments(state.r, eye + state.G, smallest=1.0)


def log_evidence(state: OnlineState) -> Tensor:
    r"""The running bound :math:`c - \tfrac12 \log|P| + \tfrac12 r^\top P^{-1} r`, ``(*batch)``, in nats.

    On one fixed basis it is the collapsed bound of the sparse GP on all data, whatever the chunks. Once a factor has
    been carried through a basis change it is no longer a bound on the evidence of all data, and it is not comparable
    between chunk sizes: never choose M or the chunk size by it. Kernels may be compared at identical chunks and bases.
    """
    mean, scale_tril = posterior(state)
    half_log_det = scale_tril.diagonal(dim1=-1, dim2=-2).log().sum(-1)
    return state.c + half_log_det + 0.5 * (state.r * mean).sum(-1)


def residual_variance(state: OnlineState, prior: Prior, x: Tensor) -> Tensor:
    """Prior variance at ``x`` that the basis cannot represent, ``(*batch, n)``, as a fraction of the prior variance."""
    variance = prior.variance(as_inputs(x))
    return (1 - whiten(state, prior, x).square().sum(-2) / variance).clamp_min(0.0)


def mean_residual_variance(state: OnlineState, prior: Prior, x: Tensor) -> Tensor:
    """What capacity is judged by: the mean over ``x`` of what the basis cannot represent, ``(*batch)``.

    As a fraction of the mean prior variance, so that times at which the prior is certain do not count.
    """
    variance = prior.variance(as_inputs(x)).mean(-1)
    explained = whiten(state, prior, x).square().sum(-2).mean(-1)
    return (1 - explained / variance).clamp_min(0.0)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-1, dim2=-2).sum(-1)
