"""In which order the points of a chunk join a path: pure functions that return a permutation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from gpseq.features.base import evaluate, unchecked
from gpseq.precision import in_float64

ORDERINGS = ("given", "oracle", "kernel", "random")

#: Up to so many points the greedy order takes one dense matrix; beyond, one row of it at a time.
_DENSE = 4096


def oracle(x: Tensor, key: int | Callable[[Tensor], Tensor]) -> Tensor:
    """By rising value of a key, for those who know what the stream was sorted or split by.

    Args:
        x: ``(n, d)``.
        key: a column, or a function from ``(n, d)`` to ``(n,)``, such as the norm.

    Returns:
        A permutation ``(n,)``, int64; equal keys stay in the order in which they came.

    Raises:
        ValueError: there is no such column, or the function returns another shape, or NaN.
        TypeError: ``key`` is neither.

    Example:
        >>> oracle(torch.tensor([[3.0, 0.0], [1.0, 5.0], [2.0, 0.0]]), key=0)
        tensor([1, 2, 0])
    """
    if callable(key):
        values = key(x)
        if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"key: expected a function that returns shape {tuple(x.shape[:1])}, got {got}.")
    else:
        values = x[:, check_column("key", key, x.shape[-1])]
    if values.isnan().any():
        raise ValueError("key: expected values that can be sorted, got NaN.")
    return values.argsort(stable=True)


@torch.no_grad()
def kernel_greedy(x: Tensor, kernel: Kernel, last: Tensor | None = None, farthest: bool = False) -> Tensor:
    r"""From each point to the remaining one that is most alike it.

    .. math:: i_1 = \arg\max_i k(x_i, x_0), \qquad i_{j+1} = \arg\max_{i \notin \{i_1, \dots, i_j\}} k(x_i, x_{i_j})

    with :math:`x_0` the last point of the path so far, or the origin. The time is O(n^2), the memory O(n) where n is
    large.

    Args:
        x: ``(n, d)``.
        kernel: any GPyTorch kernel without a batch shape.
        last: the point to go on from, ``(d,)``; ``None`` begins at the point most alike the origin.
        farthest: take the least alike instead, throughout. Only of use to show how much the order matters.

    Returns:
        A permutation ``(n,)``, int64; of points that are equally alike the first.

    Raises:
        ValueError: the kernel has a batch shape, or its values are NaN.

    Source:
        The OHSVGP paper, on orderings, for the rule within a chunk; how a later chunk begins is not said there.

    Example:
        >>> import gpytorch
        >>> x = torch.tensor([[2.0], [0.1], [-0.5], [1.0]])
        >>> kernel_greedy(x, gpytorch.kernels.RBFKernel())
        tensor([1, 2, 3, 0])
    """
    x = x.double()
    here = x.new_zeros(x.shape[-1]) if last is None else last.double()
    first = _checked(evaluate(kernel, x, here[None]))[:, 0]
    if len(x) <= _DENSE:
        matrix = _checked(evaluate(kernel, x, x))
        return _greedy(first, lambda i: matrix[:, i], farthest)
    return in_float64(
        lambda x: _greedy(first, lambda i: unchecked(kernel, x, x[i : i + 1])[:, 0], farthest), (kernel,), x
    )


def _greedy(alike: Tensor, row: Callable[[int], Tensor], farthest: bool) -> Tensor:
    sign = -1.0 if farthest else 1.0
    excluded = torch.zeros_like(alike)
    order = []
    for _ in range(len(alike)):
        best = int(torch.add(excluded, alike, alpha=sign).argmax())
        order.append(best)
        excluded[best] = -torch.inf
        alike = row(best)
    return torch.tensor(order, dtype=torch.int64, device=alike.device)


def random(n: int, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random order.

    Args:
        n: number of points.
        generator: draws it; ``None`` is torch's default generator.

    Returns:
        A permutation ``(n,)``, int64.

    Example:
        >>> random(4).sort().values
        tensor([0, 1, 2, 3])
    """
    return torch.randperm(n, generator=generator, device=None if generator is None else generator.device)


def check_column(name: str, column: object, columns: int) -> int:
    """A column of the inputs, counted from the front; negative ones count from the back.

    Args:
        name: of the argument.
        column: what came.
        columns: how many there are.

    Raises:
        TypeError: it is no integer.
        ValueError: there is no such column.
    """
    if isinstance(column, bool) or not isinstance(column, int):
        raise TypeError(f"{name}: expected the number of a column, got {column!r}.")
    if not -columns <= column < columns:
        raise ValueError(f"{name}: expected one of {columns} input columns, got {column}.")
    return column % columns


def _checked(values: Tensor) -> Tensor:
    if values.dim() != 2:
        raise ValueError(f"kernel: an order needs one without a batch shape, got {tuple(values.shape[:-2])}.")
    if values.isnan().any():
        raise ValueError("kernel: expected values that can be compared, got NaN.")
    return values
