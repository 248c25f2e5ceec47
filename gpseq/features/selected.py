"""Inducing points that are chosen anew from what is at hand, at each update."""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from linear_operator import to_linear_operator
from torch import Tensor

from gpseq.checks import check_count, check_number
from gpseq.features.base import evaluate
from gpseq.features.points import InducingPoints


class SelectedPoints(InducingPoints):
    r"""Inducing points re-selected at each update: M of the old points and the new inputs, greedily.

    Each choice is the candidate with the largest prior variance given those chosen before,

    .. math:: i = \arg\max_j \; k(x_j, x_j) - k(x_j, z) k(z, z)^{-1} k(z, x_j) ,

    which is the pivoting of a Cholesky factorisation, :math:`O((n + M) M^2)`. No gradients, no addresses to learn, any
    number of input columns: the plain alternative to HiPPO memories through the same seam. Like them it knows nothing
    of the targets, and once M points do not resolve the past, detail is given up wherever points are not chosen
    again.

    Args:
        num_points: M, reached as soon as there have been so many inputs that differ for the kernel.
        num_dims: d.
        points: where to begin, ``(m, d)``, at most M; by default one point at zero, which the first update replaces.
        tolerance: no more points are chosen when the conditional variances of all candidates together are below this
            multiple of the largest prior variance.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a value out of range, or more points than M.

    Source:
        Burt, Rasmussen and van der Wilk (2020), Convergence of sparse variational inference, for greedy variance
        selection.

    Example:
        >>> import gpytorch
        >>> features = SelectedPoints(3).following(torch.linspace(0, 4, 9).unsqueeze(-1), gpytorch.kernels.RBFKernel())
        >>> features.nodes().squeeze(-1).sort().values
        tensor([0., 2., 4.], dtype=torch.float64)
    """

    def __init__(
        self, num_points: int, num_dims: int = 1, points: Tensor | None = None, tolerance: float = 1e-8
    ) -> None:
        check_count("num_points", num_points)
        check_count("num_dims", num_dims)
        self._placeholder = points is None
        super().__init__(torch.zeros(1, num_dims) if points is None else points)
        if self.points.dim() != 2 or self.points.shape[0] > num_points or self.points.shape[1] != num_dims:
            expected = f"at most {num_points} points of shape (m, {num_dims})"
            raise ValueError(f"points: expected {expected}, got {tuple(self.points.shape)}.")
        self.num_points = num_points
        self.tolerance = check_number("tolerance", tolerance, above=0.0, expected="a positive fraction")

    @property
    def forgets(self) -> bool:
        """True, because a point that is not chosen again takes with it what was known there."""
        return True

    def following(self, x: Tensor, kernel: Kernel, growth: float | str | None = 1.25) -> SelectedPoints:
        """M points chosen from the present ones and ``x``."""
        if kernel.batch_shape:
            raise ValueError(
                f"kernel: points are selected by one kernel, got one of batch shape {tuple(kernel.batch_shape)}."
            )
        if x.shape[0] == 0:
            return self
        x = x.to(self.points)
        candidates = x if self._placeholder else torch.cat([self.points, x])
        chosen = candidates[select_points(kernel, candidates, self.num_points, self.tolerance)]
        if not self._placeholder and chosen.shape == self.points.shape and torch.equal(chosen, self.points):
            return self
        return SelectedPoints(self.num_points, self.num_dims, chosen, self.tolerance)

    def get_extra_state(self) -> Tensor:
        """Whether the points are only a placeholder."""
        return torch.tensor(float(self._placeholder))

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        self._placeholder = bool(state)


@torch.no_grad()
def select_points(kernel: Kernel, candidates: Tensor, num_points: int, tolerance: float = 1e-8) -> Tensor:
    """Indices of candidates chosen by greedy conditional variance.

    Args:
        kernel: any kernel without batch shape.
        candidates: ``(n, d)``.
        num_points: how many at most.
        tolerance: stop when what is left of all prior variances is below this multiple of the largest.

    Returns:
        ``(m,)`` with m at most ``num_points``, in the order of choice.
    """
    covariance = to_linear_operator(evaluate(kernel, candidates, candidates))
    rank = min(num_points, len(candidates))
    factor, pivots = covariance.pivoted_cholesky(rank, error_tol=tolerance, return_pivots=True)
    return pivots[: factor.shape[-1]]
