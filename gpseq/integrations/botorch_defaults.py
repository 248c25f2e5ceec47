"""What a streaming BoTorch model takes where nothing is given: features in the unit cube, and a kernel."""

from __future__ import annotations

from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.kernels import Kernel, ScaleKernel
from torch import Tensor

from gpseq.features import InducingFeatures, InducingPoints, space_time_features, spread_points

# Points in the unit cube; times of a memory, and points at which it is kept.
NUM_POINTS, NUM_TIMES, NUM_PLACES = 100, 12, 16

#: How far beyond the unit cube inputs may lie; its corners are rounded in float32.
MARGIN = 0.01


def default_features(x: Tensor, time_dim: int | None, window: float | None) -> InducingFeatures:
    """Points of the unit cube, or a memory of time at each of some points of the other columns' unit cube.

    Args:
        x: first inputs, ``(n, d)``; with ``time_dim`` their times are where the memory begins.
        time_dim: the column of time, or ``None``.
        window: how far back the memory reaches; ``None`` keeps all.

    Returns:
        The features.

    Raises:
        ValueError: a column of time without inputs.
    """
    num_dims = x.shape[-1]
    if time_dim is None:
        return InducingPoints(spread_points(NUM_POINTS, num_dims))
    if not len(x):
        raise ValueError(
            f"train_X: expected at least one row with time_dim={time_dim}, got shape {tuple(x.shape)}: nothing says "
            "when time begins. Give features=space_time_features(...)."
        )
    times = x[:, time_dim].double()
    start, last = times.min().item(), times.max().item()
    horizon = last if last > start else start + (window or 1.0)
    places = x.new_zeros(1, 0) if num_dims == 1 else spread_points(NUM_PLACES, num_dims - 1)
    return space_time_features(NUM_TIMES, places, window, start, horizon, time_dim)


def default_kernel(num_dims: int, time_dim: int | None) -> Kernel:
    """A scaled RBF kernel with BoTorch's prior on the lengthscales; one of time times one of the rest.

    Args:
        num_dims: d.
        time_dim: the column of time, or ``None``.

    Returns:
        The kernel.
    """
    groups = [[time_dim], [c for c in range(num_dims) if c != time_dim]] if time_dim is not None else [None]
    kernel: Kernel | None = None
    for columns in groups:
        if columns == []:
            continue
        size = num_dims if columns is None else len(columns)
        part = get_covar_module_with_dim_scaled_prior(ard_num_dims=size, active_dims=columns)
        kernel = part if kernel is None else kernel * part
    return ScaleKernel(kernel)


def check_in_unit_cube(name: str, x: Tensor, columns: Tensor) -> None:
    """Inputs where the default features are; further away everything is the prior, whatever is observed.

    Args:
        name: of the argument.
        x: inputs after the input transform, ``(*b, n, d)``.
        columns: which columns must lie in the unit interval, bool, ``(d,)``.

    Raises:
        ValueError: a column that leaves it.
    """
    for column in columns.nonzero().flatten().tolist() if x.numel() else ():
        low, high = (value.item() for value in x[..., column].aminmax())
        if low < -MARGIN or high > 1 + MARGIN:
            raise ValueError(
                f"{name}: expected inputs in [0, 1] after the input transform, where the default features are; column "
                f"{column} goes from {low:g} to {high:g}. Give input_transform=Normalize({x.shape[-1]}, bounds=...), "
                "or features=... of your own."
            )
