"""Covariances of Gaussians in the cheapest form that holds them: what a prediction draws from and is judged by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from linear_operator import to_linear_operator
from linear_operator.operators import (
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from gpseq.checks import stacklevel_outside
from gpseq.linalg import cholesky, default_jitter


@dataclass(frozen=True, eq=False)
class Spread:
    r"""A covariance: :math:`\operatorname{diag}(d) + R R^\top` with either part, or any other matrix.

    Attributes:
        diagonal: d, ``(*batch, E)``, or ``None``.
        root: R, ``(*batch, E, r)``, or ``None``.
        matrix: ``(*batch, E, E)``, dense or lazy; then the others are ``None``.

    Example:
        >>> spread = Spread.of(DiagLinearOperator(torch.tensor([1.0, 4.0])))
        >>> spread.variance, spread.colour(torch.ones(1, 2))
        (tensor([1., 4.]), tensor([[1., 2.]]))
    """

    diagonal: Tensor | None = None
    root: Tensor | None = None
    matrix: Tensor | LinearOperator | None = None

    @classmethod
    def of(cls, covariance: Tensor | LinearOperator) -> Spread:
        """The form that a covariance has.

        Args:
            covariance: ``(*batch, E, E)``. Diagonals, roots and sums of them are taken apart; all else stays as it is.

        Returns:
            The spread.

        Raises:
            ValueError: a diagonal has NaN, or numbers that are clearly negative.
        """
        if isinstance(covariance, Tensor):
            return cls(matrix=covariance)
        if isinstance(covariance, DenseLinearOperator):
            return cls(matrix=covariance.tensor)
        parts = _parts(covariance)
        if parts is None:
            return cls(matrix=covariance)
        diagonals, roots = parts
        batch = covariance.batch_shape
        size = covariance.shape[-1]
        diagonal = torch.stack([d.expand(*batch, size) for d in diagonals]).sum(0) if diagonals else None
        root = torch.cat([r.expand(*batch, *r.shape[-2:]) for r in roots], dim=-1) if roots else None
        if diagonal is not None:
            if diagonal.isnan().any():
                raise ValueError("covariance: expected numbers on its diagonal, got NaN.")
            try:
                diagonal = not_negative(diagonal)
            except NotPSDError as error:
                if root is not None:  # what a root is reduced by; only the whole can say whether it is a covariance
                    return cls(matrix=covariance)
                raise ValueError(str(error)) from error
        return cls(diagonal, root)

    @property
    def variance(self) -> Tensor:
        """Its diagonal, ``(*batch, E)``; numbers that rounding has made negative are 0.

        Raises:
            NotPSDError: some are clearly negative.
        """
        if self.matrix is not None:
            return not_negative(self.matrix.diagonal(dim1=-1, dim2=-2))
        parts = [] if self.diagonal is None else [self.diagonal]
        if self.root is not None:
            parts.append(self.root.square().sum(-1))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @property
    def operator(self) -> LinearOperator:
        """The covariance as a LinearOperator, ``(*batch, E, E)``."""
        if self.matrix is not None:
            return to_linear_operator(self.matrix)
        if self.root is None:
            return DiagLinearOperator(self.diagonal)
        low_rank = LowRankRootLinearOperator(self.root)
        if self.diagonal is None:
            return low_rank
        return LowRankRootAddedDiagLinearOperator(low_rank, DiagLinearOperator(self.diagonal))

    @property
    def dense(self) -> Tensor:
        """The covariance as a tensor, ``(*batch, E, E)``."""
        if isinstance(self.matrix, LinearOperator):
            return self.matrix.to_dense()
        if self.matrix is not None:
            return self.matrix
        diagonal = None if self.diagonal is None else torch.diag_embed(self.diagonal)
        if self.root is None:
            assert diagonal is not None
            return diagonal
        return self.root @ self.root.mT if diagonal is None else self.root @ self.root.mT + diagonal

    @property
    def width(self) -> int:
        """How many standard normal numbers a draw takes."""
        if self.matrix is not None:
            return self.matrix.shape[-1]
        return (0 if self.diagonal is None else self.diagonal.shape[-1]) + (
            0 if self.root is None else self.root.shape[-1]
        )

    def colour(self, normals: Tensor) -> Tensor:
        """Give standard normal draws this covariance.

        Args:
            normals: ``(S, *batch, width)``; batch dimensions of size 1 are shared.

        Returns:
            ``(S, *batch, E)``, in the dtype of the covariance.

        Raises:
            NotPSDError: it is no covariance.
        """
        if self.matrix is not None:
            matrix = self.dense
            return _times(_root_of(matrix), normals.double()).to(matrix.dtype)
        if self.root is None:
            assert self.diagonal is not None
            return normals * _square_root(self.diagonal)
        low_rank = _times(self.root, normals[..., : self.root.shape[-1]])
        if self.diagonal is None:
            return low_rank
        return low_rank + normals[..., self.root.shape[-1] :] * _square_root(self.diagonal)

    def log_density(self, residual: Tensor, noise: Tensor | None = None) -> Tensor:
        r"""Log density of a Gaussian at its mean plus a residual, in float64 inside.

        .. math:: \log N(e \mid 0, C + \operatorname{diag}(\text{noise}))

        A diagonal costs O(E), low rank plus a positive diagonal O(E r^2), anything else O(E^3).

        Args:
            residual: ``(*batch, E)``.
            noise: variances to be added, ``(*batch, E)``.

        Returns:
            ``(*batch)``, in nats, in the dtype of the residual.

        Raises:
            ValueError: the covariance is singular.
        """
        e = residual.double()
        white = None if noise is None else noise.double()
        diagonal = white
        if self.diagonal is not None:
            diagonal = self.diagonal.double() if white is None else self.diagonal.double() + white
        if self.matrix is None and self.root is None:
            assert diagonal is not None
            if not (diagonal > 0).all():
                raise ValueError(_SINGULAR)
            quadratic, log_determinant = (e.square() / diagonal).sum(-1), diagonal.log().sum(-1)
        elif (
            self.root is not None
            and self.root.shape[-1] < e.shape[-1]
            and diagonal is not None
            and bool((diagonal > 0).all())
        ):
            # Woodbury's identity and the determinant lemma, scaled by the diagonal.
            scale = diagonal.sqrt()
            W = self.root.double() / scale.unsqueeze(-1)
            inner = W.mT @ W + torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
            L, _ = cholesky(inner, jitter=0.0)
            z = (e / scale).unsqueeze(-1)
            explained = torch.linalg.solve_triangular(L, W.mT @ z, upper=False)
            quadratic = z.square().sum((-2, -1)) - explained.square().sum((-2, -1))
            log_determinant = diagonal.log().sum(-1) + 2 * L.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        else:
            covariance = self.dense.double()
            if white is not None:
                covariance = covariance + torch.diag_embed(white)
            try:
                L, _ = cholesky(covariance, jitter=0.0)
            except NotPSDError as error:
                raise ValueError(_SINGULAR) from error
            z = torch.linalg.solve_triangular(L, e.unsqueeze(-1), upper=False)
            quadratic = z.square().sum((-2, -1))
            log_determinant = 2 * L.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        density = -0.5 * (quadratic + log_determinant + e.shape[-1] * math.log(2 * math.pi))
        return density.to(residual.dtype)

    def expand(self, batch: torch.Size) -> Spread:
        """The same covariance for a larger batch shape."""
        if isinstance(self.matrix, LinearOperator):
            same = self.matrix.batch_shape == batch
            return self if same else Spread(matrix=self.matrix.expand(*batch, *self.matrix.matrix_shape))
        return self.map(lambda t, events: t.expand(*batch, *t.shape[t.dim() - events :]))

    def take(self, index: tuple[Any, ...], basic: bool) -> Spread:
        """The covariances at an index into the batch dimensions.

        Args:
            index: one entry for each of them.
            basic: it has integers and slices only; then a lazy matrix stays lazy.
        """
        if basic and isinstance(self.matrix, LinearOperator):
            if not index:
                return self
            if torch.empty(self.matrix.batch_shape, device="meta")[index].numel():  # some operators cannot be empty
                return Spread.of(self.matrix[(*index, slice(None), slice(None))])
        return self.map(lambda t, events: t[index])

    def permuted(self, order: Tensor) -> Spread:
        """The covariance of the same numbers in another order, ``(E,)``; a lazy matrix is evaluated."""
        return Spread(
            None if self.diagonal is None else self.diagonal[..., order],
            None if self.root is None else self.root[..., order, :],
            None if self.matrix is None else self.dense[..., order, :][..., order],
        )

    def blocks(self, points: int, tasks: int, interleaved: bool) -> Spread:
        """The covariances of the tasks at each point, without those across points; a lazy matrix is evaluated.

        Args:
            points: n.
            tasks: t; the event has ``n t`` numbers.
            interleaved: whether they are counted tasks before points.

        Returns:
            Batch ``(*batch, n)`` and t numbers.
        """

        def split(value: Tensor, dim: int) -> Tensor:
            if interleaved:
                return value.unflatten(dim, (points, tasks))
            return value.unflatten(dim, (tasks, points)).transpose(dim - 1, dim)

        if self.matrix is None:
            diagonal = None if self.diagonal is None else split(self.diagonal, -1)
            return Spread(diagonal, None if self.root is None else split(self.root.mT, -1).movedim(-3, -1))
        place = split(torch.arange(points * tasks, device=self.matrix.device), -1)
        # Lazy operators take tensors of indices through sparse matrices, some of them with warnings.
        return Spread(matrix=self.dense[..., place.unsqueeze(-1), place.unsqueeze(-2)])

    def map(self, function: Callable[[Tensor, int], Tensor]) -> Spread:
        """Apply a function to the tensors; a lazy matrix is evaluated first.

        Args:
            function: takes a tensor and the number of its dimensions that are not of the batch.
        """
        return Spread(
            None if self.diagonal is None else function(self.diagonal, 1),
            None if self.root is None else function(self.root, 2),
            None if self.matrix is None else function(self.dense, 2),
        )

    @staticmethod
    def cat(spreads: Sequence[Spread], dim: int) -> Spread:
        """Several behind one another along a batch dimension, counted from the front.

        Roots of fewer columns get columns of zeros; dense matrices come out where one of them has no other form.
        """
        if any(spread.matrix is not None for spread in spreads):
            return Spread(matrix=torch.cat([spread.dense for spread in spreads], dim))
        columns = max(0 if spread.root is None else spread.root.shape[-1] for spread in spreads)
        diagonals, roots = [], []
        for spread in spreads:
            like = spread.variance
            diagonals.append(torch.zeros_like(like) if spread.diagonal is None else spread.diagonal)
            root = like.new_zeros(*like.shape, 0) if spread.root is None else spread.root
            roots.append(torch.nn.functional.pad(root, (0, columns - root.shape[-1])))
        has_diagonal = any(spread.diagonal is not None for spread in spreads)
        return Spread(torch.cat(diagonals, dim) if has_diagonal else None, torch.cat(roots, dim) if columns else None)


_SINGULAR = "covariance: there is no density where it is singular; expected noise, or positive variances."


def _times(root: Tensor, normals: Tensor) -> Tensor:
    """``(*batch, E, r)`` times each of ``(S, *batch, r)``."""
    return (root @ normals.movedim(0, -1)).movedim(-1, 0)


def not_negative(variance: Tensor) -> Tensor:
    """Variances, with 0 in place of those that rounding has made negative; NaN stays.

    Raises:
        NotPSDError: some are clearly negative.
    """
    negative = variance < 0
    if not negative.any():
        return variance
    least = variance[negative].min()
    if least < -_rounding(variance.dtype, variance[~variance.isnan()].max()):
        raise NotPSDError(f"covariance: expected variances that are not negative, got {float(least):.3g}.")
    return variance.clamp_min(0)


def _rounding(dtype: torch.dtype, top: Tensor) -> Tensor:
    """How far below 0 rounding may bring what should not be negative, beside a largest value.

    A posterior is a difference of numbers on the scale of the prior, so its rounding knows nothing of its own scale:
    the absolute bound is the largest jitter with which GPyTorch as installed would factor it: 1e-6 in float64, 1e-4 in
    anything shorter. (Its settings are no guide: importing BoTorch changes them for the whole process.)
    """
    return (_relative(dtype) * top).clamp_min(1e-6 if dtype == torch.float64 else 1e-4)


def _relative(dtype: torch.dtype) -> float:
    """What is negligible beside the largest value."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def _square_root(variance: Tensor) -> Tensor:
    """A root whose gradient is 0, and not NaN, where the variance is 0; of NaN it is NaN."""
    zero = variance <= 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, variance).sqrt())


def _root_of(matrix: Tensor) -> Tensor:
    """A root in float64 of a covariance that may be singular, or negative by the rounding of its own dtype."""
    covariance = matrix.double()
    scale = covariance.diagonal(dim1=-1, dim2=-2).mean(-1)
    raised = covariance + torch.diag_embed(
        (default_jitter(matrix.dtype) * scale).unsqueeze(-1).expand(matrix.shape[:-1])
    )
    factor, info = torch.linalg.cholesky_ex(raised)
    if not info.any() and factor.isfinite().all():
        return factor
    if not covariance.isfinite().all():
        raise ValueError(f"covariance: expected finite numbers, got some that are not, in shape {tuple(matrix.shape)}.")
    values, vectors = torch.linalg.eigh(covariance.detach())
    least, top = values[..., 0], values[..., -1].clamp_min(0)
    if (least < -_rounding(matrix.dtype, top)).any():
        raise NotPSDError(
            f"covariance of shape {tuple(matrix.shape)} has eigenvalues that are clearly negative, down to "
            f"{float(least.min()):.3g}."
        )
    if (least < -_relative(matrix.dtype) * top).any():
        warnings.warn(
            f"covariance of shape {tuple(matrix.shape)} has negative eigenvalues down to {float(least.min()):.1g}, by "
            f"rounding in {matrix.dtype}; draws are from the nearest covariance.",
            NumericalWarning,
            stacklevel=stacklevel_outside(),
        )
    if not covariance.requires_grad:
        return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    # Eigenvectors of repeated eigenvalues have no gradient: they only mend what the Cholesky factor is made of.
    nothing = top <= 0  # a covariance of zeros has a root of zeros, and no gradient, as a variance has
    floor = torch.where(nothing, 1.0, default_jitter(matrix.dtype) * torch.maximum(scale.detach(), top)).unsqueeze(-1)
    missing = (floor - values).clamp_min(0)
    mended = covariance + (vectors * missing.unsqueeze(-2)) @ vectors.mT
    return cholesky(mended, jitter=0.0)[0].masked_fill(nothing[..., None, None], 0.0)


def _parts(operator: LinearOperator) -> tuple[list[Tensor], list[Tensor]] | None:
    """Diagonals and roots whose sum an operator is, or ``None``."""
    if isinstance(operator, DiagLinearOperator):
        return [operator.diagonal(dim1=-1, dim2=-2)], []
    if isinstance(operator, RootLinearOperator):
        return [], [operator.root.to_dense()]
    if not isinstance(operator, SumLinearOperator):
        return None
    diagonals: list[Tensor] = []
    roots: list[Tensor] = []
    for summand in operator.linear_ops:
        parts = _parts(summand)
        if parts is None:
            return None
        diagonals += parts[0]
        roots += parts[1]
    return diagonals, roots
