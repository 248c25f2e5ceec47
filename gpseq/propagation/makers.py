"""Posteriors of weights from what people have: variances, factors, a covariance, columns."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpseq.propagation.laws import Diagonal, Kronecker, Law
from gpseq.propagation.posteriors import Joint, WeightPosterior, matrix_shape

#: What of a covariance may be rounding, relative to its largest variance.
_TOLERANCE = 1e-3
#: Rows up to which a covariance is factored to see whether it is one: larger ones would take seconds.
_FACTORED = 4096


def from_variances(variances: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None) -> WeightPosterior:
    """Weights that are independent of each other: mean-field, or a diagonal Laplace approximation.

    Args:
        variances: by names of parameters, in their shapes.
        means: where they are not the model's values.

    Returns:
        The posterior.

    Raises:
        TypeError: one is no floating-point tensor.
        ValueError: one is negative or NaN.

    Example:
        >>> from_variances({"0.weight": torch.full((4, 3), 0.01)}).names
        ('0.weight',)
    """
    laws: dict[str, Law] = {}
    for name, value in _named("variances", variances):
        _check_variances(f"variances[{name!r}]", value)
        laws[name] = Diagonal(value.reshape(matrix_shape(value)))
    return WeightPosterior(laws, means=_checked_means(means))


def from_factors(
    factors: Mapping[str, tuple[Tensor, Tensor]], means: Mapping[str, Tensor] | None = None
) -> WeightPosterior:
    r"""Kronecker-factored covariances, :math:`\operatorname{Cov}(W_{ki}, W_{lj}) = B_{kl} A_{ij}`.

    Args:
        factors: by names of parameters, (B, A); for a vector A is ``(1, 1)``.
        means: where they are not the model's values.

    Returns:
        The posterior.

    Raises:
        TypeError: one is no floating-point tensor.
        ValueError: one is not square, not symmetric or not positive semidefinite.
    """
    laws: dict[str, Law] = {}
    for name, pair in _named("factors", factors):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"factors[{name!r}]: expected a pair (B, A), got {type(pair).__name__}.")
        outputs, inputs = pair
        for part, value in (("B", outputs), ("A", inputs)):
            _check_covariance(f"factors[{name!r}], {part}", value)
        laws[name] = Kronecker(outputs, inputs)
    return WeightPosterior(laws, means=_checked_means(means))


def from_covariance(
    names: str | Sequence[str], covariance: Tensor, means: Mapping[str, Tensor] | None = None
) -> WeightPosterior:
    """Any covariance of all entries of some parameters, one after the other.

    Args:
        names: of the parameters, or of a single one.
        covariance: ``(n, n)``.
        means: where they are not the model's values.

    Returns:
        The posterior.

    Raises:
        TypeError: it is no floating-point tensor.
        ValueError: it is not square, not symmetric or not positive semidefinite.
    """
    _check_covariance("covariance", covariance)
    listed = (names,) if isinstance(names, str) else tuple(names)
    return WeightPosterior(joints=(Joint(listed, covariance=covariance),), means=_checked_means(means))


def from_columns(
    columns: Mapping[str, Tensor],
    variances: Mapping[str, Tensor] | None = None,
    means: Mapping[str, Tensor] | None = None,
) -> WeightPosterior:
    r""":math:`\sum_r c_r c_r^\top + \operatorname{diag}(s)` over all of the named parameters: SWAG and its like.

    Args:
        columns: by names of parameters, ``(R, *shape)``; the r-th of all names belong together.
        variances: by the same names, in their shapes; ``None`` is zero.
        means: where they are not the model's values.

    Returns:
        The posterior.

    Raises:
        TypeError: one is no floating-point tensor.
        ValueError: names, shapes or numbers of columns that differ, or negative variances.
    """
    columns = dict(_named("columns", columns))
    if variances is not None and set(variances) != set(columns):
        raise ValueError(f"variances: expected the names of columns, {sorted(columns)}, got {sorted(variances)}.")
    for name, value in columns.items():
        _check_numbers(f"columns[{name!r}]", value)
    numbers = [len(value) if value.dim() else 0 for value in columns.values()]
    if len(set(numbers)) != 1 or not numbers[0]:
        raise ValueError(f"columns: expected as many for each, at least one, got {numbers}.")
    for name, value in (variances or {}).items():
        _check_variances(f"variances[{name!r}]", value)
        if value.shape != columns[name].shape[1:]:
            expected = tuple(columns[name].shape[1:])
            raise ValueError(f"variances[{name!r}]: expected shape {expected}, as columns, got {tuple(value.shape)}.")
    flat = torch.cat([value.reshape(len(value), -1) for value in columns.values()], 1)
    own = None if variances is None else torch.cat([variances[name].flatten() for name in columns])
    shapes = tuple(tuple(value.shape[1:]) for value in columns.values())
    joint = Joint(tuple(columns), columns=flat, variances=own, shapes=shapes)
    return WeightPosterior(joints=(joint,), means=_checked_means(means))


def _named(name: str, values: Any) -> ItemsView[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a mapping from names of parameters, got {type(values).__name__}.")
    return values.items()


def _check_numbers(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}.")
    if not value.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got {int((~value.isfinite()).sum())} that are not.")


def _check_variances(name: str, value: Any) -> None:
    _check_numbers(name, value)
    if not (value >= 0).all():
        raise ValueError(f"{name}: expected numbers that are not negative, got {float(value.min())}.")


def _check_covariance(name: str, given: Any) -> None:
    _check_numbers(name, given)
    value = given.detach()
    if value.dim() != 2 or value.shape[0] != value.shape[1]:
        raise ValueError(f"{name}: expected a square matrix, got {tuple(value.shape)}.")
    if not value.numel():
        return
    variances = value.diagonal()
    if not (variances >= 0).all():
        raise ValueError(f"{name}: expected variances that are not negative, got {float(variances.min())}.")
    tolerance = _TOLERANCE * float(variances.max())
    skew = float((value - value.mT).abs().max())
    if skew > tolerance:
        raise ValueError(f"{name}: expected a symmetric matrix, got entries that differ by {skew:.2g}.")
    if not tolerance or len(value) > _FACTORED:
        return
    lifted = value.double() + tolerance * torch.eye(len(value), dtype=torch.float64, device=value.device)
    if int(torch.linalg.cholesky_ex(lifted).info):
        raise ValueError(f"{name}: expected a covariance, got a matrix with an eigenvalue below {-tolerance:.2g}.")


def _checked_means(means: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    found = {} if means is None else dict(_named("means", means))
    for name, value in found.items():
        _check_numbers(f"means[{name!r}]", value)
    return found
