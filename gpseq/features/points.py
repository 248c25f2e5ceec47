"""Ordinary inducing points through the same door."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import IdentityLinearOperator, LinearOperator
from torch import Tensor

from gpseq.checks import check_count, check_floating
from gpseq.features.base import InducingFeatures, as_inputs


class InducingPoints(InducingFeatures):
    """Function values at chosen inputs: ``u = f(points)``, weights the identity.

    Everything that works for interdomain features works for these, so every result can be compared with stock
    GPyTorch, and a streaming sparse GP with inducing points is the same code.

    Args:
        points: ``(*batch, M, d)``, or ``(M,)`` for one-dimensional inputs. Kept in float64.
        learn: make the points a parameter (float64) instead of a buffer.

    Raises:
        TypeError: ``points`` is not a floating-point tensor.
        ValueError: it has no rows, or values that are not finite.

    Example:
        >>> InducingPoints(torch.zeros(3, 2)).nodes().shape
        torch.Size([3, 2])
    """

    def __init__(self, points: Tensor, learn: bool = False) -> None:
        super().__init__()
        points = as_inputs(check_floating("points", points).detach())
        if points.dim() < 2 or points.shape[-2] == 0 or points.shape[-1] == 0:
            raise ValueError(
                f"points: expected shape (*batch, M, d) with M and d at least 1, got {tuple(points.shape)}."
            )
        if not points.isfinite().all():
            raise ValueError("points: expected finite values, got NaN or infinity.")
        points = points.double().clone()
        if learn:
            self.points = torch.nn.Parameter(points)
        else:
            self.register_buffer("points", points)

    @property
    def num_features(self) -> int:
        """M, the number of points."""
        return self.points.shape[-2]

    def nodes(self) -> Tensor:
        """The points, ``(*batch, M, d)``, float64."""
        return self.points.double()

    def weights(self) -> LinearOperator:
        """The identity, ``(M, M)``."""
        return IdentityLinearOperator(self.num_features, dtype=torch.float64, device=self.points.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A stream may have been moved to another number of points; the saved ones decide.
        saved = state_dict.get(f"{prefix}points")
        if isinstance(saved, Tensor) and saved.shape != self.points.shape:
            self.points.data = self.points.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Shape of the points."""
        return f"points={tuple(self.points.shape)}"


def spread_points(num_points: int, num_dims: int) -> Tensor:
    """Points that fill the unit cube: evenly spaced in one dimension, a scrambled Sobol sequence in more.

    Args:
        num_points: how many.
        num_dims: d.

    Returns:
        ``(num_points, d)``, float64; always the same.

    Example:
        >>> spread_points(3, 1).squeeze(-1)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_count("num_points", num_points)
    check_count("num_dims", num_dims)
    if num_dims == 1:
        return torch.linspace(0.0, 1.0, num_points, dtype=torch.float64).unsqueeze(-1)
    return torch.quasirandom.SobolEngine(num_dims, scramble=True, seed=0).draw(num_points, dtype=torch.float64)
