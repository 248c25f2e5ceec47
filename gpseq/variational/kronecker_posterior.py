r"""What a belief over space and time says of f, in whichever of two forms is the cheaper one.

Whitened features of n times and s locations are two matrices, :math:`A_t` of shape ``(M_t, n)`` and :math:`A_s` of
shape ``(M_s, s)``. "On" a grid means at all pairs, ``(n, s)``; "at" points means at n pairs, with n columns in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from linear_operator import LinearOperator, to_linear_operator
from linear_operator.operators import (
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    MatmulLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from gpseq.variational.kronecker import KroneckerState

#: Columns of whitened features that are solved for at once where P is dense.
_SOLVED_AT_ONCE = 4096

#: Eigenvalues of a P that has to be repaired are cut off here before it is factored.
_LARGEST_PRECISION = 1e14


@dataclass(frozen=True)
class Moments:
    r"""What both forms share.

    Attributes:
        mean: of the whitened inducing matrix, ``(M_t, M_s)``.
        log_det: :math:`\log |P|`, ``()``.
    """

    mean: Tensor
    log_det: Tensor

    def mean_on(self, A_t: Tensor, A_s: Tensor) -> Tensor:
        """Mean of f minus its prior mean on a grid, ``(n, s)``."""
        return A_t.mT @ self.mean @ A_s

    def mean_at(self, A_t: Tensor, A_s: Tensor) -> Tensor:
        """The same at points, ``(n,)``."""
        return (A_s * (self.mean.mT @ A_t)).sum(0)


@dataclass(frozen=True)
class ProductPosterior(Moments):
    r"""One term: :math:`P = I + \Gamma \otimes H`, which two small eigendecompositions diagonalise.

    Attributes:
        time: eigenvectors of :math:`\Gamma`, ``(M_t, M_t)``.
        space: eigenvectors of H, ``(M_s, M_s)``.
        shrinkage: eigenvalues of :math:`P^{-1}`, ``(M_t, M_s)``.
    """

    time: Tensor
    space: Tensor
    shrinkage: Tensor

    def variance_on(self, A_t: Tensor, A_s: Tensor) -> Tensor:
        r"""Variance of :math:`A^\top v` on a grid, ``(n, s)``."""
        return (self.time.mT @ A_t).square().mT @ self.shrinkage @ (self.space.mT @ A_s).square()

    def change_at(self, A_t: Tensor, A_s: Tensor) -> LinearOperator:
        """By how much the covariance at points differs from the prior's, ``(n, n)``, lazy."""
        columns = _products(self.time.mT @ A_t, self.space.mT @ A_s)
        return MatmulLinearOperator(columns.mT, (self.shrinkage.reshape(-1, 1) - 1) * columns)

    def change_on(self, A_t: Tensor, A_s: Tensor) -> LinearOperator:
        """By how much the covariance on a grid differs from the prior's, ``(n s, n s)``, location fastest."""
        root = _kronecker(A_t.mT @ self.time, A_s.mT @ self.space)
        change = DiagLinearOperator(self.shrinkage.reshape(-1) - 1)
        return MatmulLinearOperator(MatmulLinearOperator(root, change), root.mT)


@dataclass(frozen=True)
class DensePosterior(Moments):
    """Several terms: P as it is.

    Attributes:
        factor: lower factor of P, ``(M_t M_s, M_t M_s)``.
    """

    factor: Tensor

    def variance_on(self, A_t: Tensor, A_s: Tensor) -> Tensor:
        """As :meth:`ProductPosterior.variance_on`, some thousand columns at a time."""
        s = A_s.shape[-1]
        times_at_once = max(1, _SOLVED_AT_ONCE // max(1, s))
        parts = [self._solve(_grid(block, A_s)).square().sum(0) for block in A_t.split(times_at_once, dim=-1)]
        return torch.cat(parts).reshape(A_t.shape[-1], s)

    def change_at(self, A_t: Tensor, A_s: Tensor) -> LinearOperator:
        """As :meth:`ProductPosterior.change_at`."""
        columns = _products(A_t, A_s)
        return MatmulLinearOperator(columns.mT, torch.cholesky_solve(columns, self.factor) - columns)

    def change_on(self, A_t: Tensor, A_s: Tensor) -> LinearOperator:
        """As :meth:`ProductPosterior.change_on`."""
        root = _kronecker(A_t.mT, A_s.mT)
        eye = torch.eye(len(self.factor), dtype=root.dtype, device=root.device)
        return MatmulLinearOperator(
            MatmulLinearOperator(root, DenseLinearOperator(torch.cholesky_inverse(self.factor) - eye)), root.mT
        )

    def _solve(self, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, columns, upper=False)


class GridCovariance(SumLinearOperator):
    """Posterior covariance on a grid of times and locations, location fastest, which knows its diagonal.

    The prior's Kronecker product and what the readings have changed of it are kept apart and never multiplied out,
    except where somebody asks for all entries.

    Args:
        linear_ops: the two parts, ``(n s, n s)``.
        variance: the diagonal, ``(n s,)``; ``None`` computes it from the parts.
    """

    def __init__(self, *linear_ops: LinearOperator, variance: Tensor | None = None) -> None:
        super().__init__(*linear_ops, variance=variance)
        self.variance = variance

    def _diagonal(self) -> Tensor:
        return super()._diagonal() if self.variance is None else self.variance


KroneckerPosterior = ProductPosterior | DensePosterior


def posterior(state: KroneckerState) -> KroneckerPosterior:
    """q(v) of a state."""
    information = state.information
    r = information.r
    if information.num_terms == 0 and not information.rest.numel():
        time, space = (torch.eye(m, dtype=r.dtype, device=r.device) for m in r.shape)
        return ProductPosterior(r, r.new_zeros(()), time, space, torch.ones_like(r))
    if information.num_terms == 1 and not information.rest.numel():
        values, time = torch.linalg.eigh(information.temporal[0])
        others, space = torch.linalg.eigh(information.spatial[0])
        # Both are positive semi-definite, whatever rounding says.
        precision = 1 + values.clamp_min(0.0).outer(others.clamp_min(0.0))
        mean = time @ ((time.mT @ r @ space) / precision) @ space.mT
        return ProductPosterior(mean, precision.log().sum(), time, space, precision.reciprocal())
    precision = information.dense()
    precision.diagonal().add_(1.0)
    factor, info = torch.linalg.cholesky_ex(precision)
    if info.any():
        return _repaired(precision, r)
    mean = torch.cholesky_solve(r.reshape(-1, 1), factor)
    return DensePosterior(mean.reshape(r.shape), 2 * factor.diagonal().log().sum(), factor)


def _repaired(precision: Tensor, r: Tensor) -> DensePosterior:
    """q(v) where rounding has made P = I + G indefinite.

    G is positive semi-definite, so no eigenvalue of P is below one. In directions in which nothing but rounding can
    be seen, the prior is kept.
    """
    values, vectors = torch.linalg.eigh(precision)
    lost = values < len(values) * torch.finfo(values.dtype).eps * values[-1]
    values = torch.where(lost, 1.0, values.clamp_min(1.0))
    mean = vectors @ torch.where(lost, 0.0, (vectors.mT @ r.reshape(-1)) / values)
    # A variance below this is zero beside the prior's 1; the factor of larger numbers would drown that 1 in rounding.
    upper = torch.linalg.qr((vectors * values.clamp_max(_LARGEST_PRECISION).sqrt()).mT, mode="r").R
    factor = (upper * upper.diagonal().sign().unsqueeze(-1)).mT
    return DensePosterior(mean.reshape(r.shape), values.log().sum(), factor)


def log_evidence(state: KroneckerState, belief: KroneckerPosterior) -> Tensor:
    """The running bound of all readings, ``()``, in nats; see :func:`gpseq.variational.online.log_evidence`.

    Args:
        state: the state.
        belief: its :func:`posterior`.
    """
    information = state.information
    return information.c - 0.5 * belief.log_det + 0.5 * (information.r * belief.mean).sum()


def _kronecker(time: Tensor, space: Tensor) -> KroneckerProductLinearOperator:
    return KroneckerProductLinearOperator(to_linear_operator(time), to_linear_operator(space))


def _products(A_t: Tensor, A_s: Tensor) -> Tensor:
    """Whitened features at points, ``(M_t M_s, n)``."""
    return torch.einsum("an,bn->abn", A_t, A_s).reshape(-1, A_t.shape[-1])


def _grid(A_t: Tensor, A_s: Tensor) -> Tensor:
    """Whitened features on a grid, ``(M_t M_s, n s)``."""
    return torch.einsum("an,bs->abns", A_t, A_s).reshape(A_t.shape[0] * A_s.shape[0], -1)
