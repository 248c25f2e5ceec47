"""Memories of time at points in space."""

from __future__ import annotations

from torch import Tensor

from gpseq.checks import check_floating
from gpseq.features.composite import CompositeFeatures
from gpseq.features.hippo import HippoFeatures


def space_time_features(
    num_features: int,
    points: Tensor,
    window: float | None = None,
    start: float = 0.0,
    horizon: float | None = None,
    time_dim: int = 0,
) -> CompositeFeatures:
    r"""A memory of time at each of a set of points: the Kronecker product of temporal features and points.

    .. math:: u_{mj} = \int f(t, z_j)\, g_m(t)\, \mu(t)\, dt

    Args:
        num_features: m runs over so many at each point.
        points: :math:`z_j`, ``(P, d - 1)``, the columns other than time in their order.
        window: how far back each memory reaches (measure ``"legt"``), in the unit of the time column; ``None`` keeps
            the whole past (``"legs"``).
        start: the beginning of time.
        horizon: where the memories end at first; ``None`` is one window, or one unit of time, after ``start``.
        time_dim: the column of time.

    Returns:
        ``num_features * P`` features.

    Example:
        >>> from gpseq.features import spread_points
        >>> space_time_features(6, spread_points(4, 1), window=20.0, time_dim=1).num_features
        24
    """
    check_floating("points", points)
    if points.dim() != 2 or len(points) == 0:
        raise ValueError(f"points: expected shape (P, d - 1) with P at least 1, got {tuple(points.shape)}.")
    end = start + (window or 1.0) if horizon is None else horizon
    measure = "legs" if window is None else "legt"
    return CompositeFeatures(
        [HippoFeatures(num_features, end, start, measure, window, time_dim=time_dim, other_inputs=z) for z in points]
    )
