"""Products, inverses and roots of many matrices of at most three rows, with the small axes first.

A matrix is ``(S, R, ...)``. Each of its entries is then one long vector, and a product is a few products of vectors. On
a CPU that is many times as fast as a batched product of ``(..., S, R)``, whose calls cost more than their arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product.

    Args:
        left: ``(S, K, ...)``.
        right: ``(K, R, ...)``; what follows broadcasts.

    Returns:
        ``(S, R, ...)``.

    Example:
        >>> multiply(torch.eye(2).unsqueeze(-1), torch.ones(2, 1, 5)).shape
        torch.Size([2, 1, 5])
    """
    out: Tensor | None = None
    for column, row in zip(left.unbind(1), right.unbind(0), strict=True):
        column, row = column.unsqueeze(1), row.unsqueeze(0)
        out = column * row if out is None else torch.addcmul(out, column, row)
    if out is None:
        raise ValueError(f"left: expected at least one column, got shape {tuple(left.shape)}.")
    return out


def congruence(outer: Tensor, inner: Tensor, plus: Tensor | None = None) -> Tensor:
    r"""Covariance of a linear map and something independent, :math:`F P F^\top + L`.

    Args:
        outer: F, ``(S, K, ...)``.
        inner: P, ``(K, K, ...)``.
        plus: L, ``(S, S, ...)``; ``None`` is zero.
    """
    out = multiply(multiply(outer, inner), outer.transpose(0, 1))
    return out if plus is None else out + plus


def invert(matrix: Tensor) -> Tensor:
    """Inverse by cofactors. Its relative errors do not depend on the units of the entries.

    Args:
        matrix: ``(S, S, ...)``, S at most 3, regular.

    Raises:
        ValueError: a larger matrix.

    Example:
        >>> invert(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    size = len(matrix)
    if size == 1:
        return matrix.reciprocal()
    if size == 2:
        (a, b), (c, d) = (row.unbind(0) for row in matrix.unbind(0))
        return torch.stack([torch.stack([d, -b]), torch.stack([-c, a])]) / (a * d - b * c)
    if size > 3:
        raise ValueError(f"matrix: expected at most 3 rows, got {size}.")
    one, two, three = matrix.unbind(0)
    columns = [torch.linalg.cross(a, b, dim=0) for a, b in ((two, three), (three, one), (one, two))]
    return torch.stack(columns, 1) / (one * columns[0]).sum(0)


def lower_root(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor. Where rounding leaves a direction no variance, the factor has none either.

    Args:
        covariance: ``(S, S, ...)``, positive semi-definite; only its lower half is read.

    Example:
        >>> lower_root(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))  # singular
        tensor([[2., 0.],
                [1., 0.]])
    """
    columns: list[Tensor] = []
    for j in range(len(covariance)):
        column = covariance[j:, j]
        for earlier in columns:
            column = column - earlier[j:] * earlier[j]
        positive = column[0] > 4 * torch.finfo(covariance.dtype).eps * covariance[j, j]
        column = torch.where(positive, column * torch.where(positive, column[0], 1.0).rsqrt(), 0.0)
        columns.append(torch.cat([torch.zeros_like(covariance[:j, j]), column]))
    return torch.stack(columns, 1)
