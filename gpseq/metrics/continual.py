"""Scores on every task after every task: how well past ones are kept, and how later ones are helped."""

from __future__ import annotations

import torch
from torch import Tensor


def average_score(matrix: Tensor, tested: Tensor | None = None) -> Tensor:
    r"""Mean score over the tasks seen so far, after each task.

    .. math:: A_k = \tfrac1{k + 1} \sum_{j \le k} R_{kj}

    Args:
        matrix: ``(*batch, S, T)``, ``S <= T``; entry ``[k, j]`` is the score on task j after task k was learnt. Future
            tasks, ``j > k``, are not looked at. NaN is for a task without test rows, which is left out, see ``tested``.
            Any other NaN makes the result NaN: a method that broke down must not look better for it.
        tested: ``(T,)`` bool, which tasks have test rows; only they count, and NaN in one of them makes the mean NaN.
            ``None`` takes a task whose scores are NaN in every row from its own on for one without test rows, and so
            cannot tell it from one on which the method broke down at once.

    Returns:
        ``(*batch, S)``, in the unit of the score; NaN where no task that was seen has been scored.

    Raises:
        TypeError: the matrix is no tensor.
        ValueError: the matrix, or ``tested``, has another shape.

    Source:
        Lopez-Paz and Ranzato (2017), Gradient episodic memory for continual learning, ACC; Chaudhry et al. (2018),
        Riemannian walk for incremental learning, section 3.

    Example:
        >>> average_score(torch.tensor([[0.9, torch.nan], [0.5, 0.7]]))
        tensor([0.9000, 0.6000])
    """
    row, column = _check_matrix(matrix)
    return _mean(matrix, (column <= row) & _counted(matrix, tested).unsqueeze(-2))


def forgetting(matrix: Tensor, higher_is_better: bool = True) -> Tensor:
    r"""How much worse each past task is known than it once was, after each later task.

    .. math:: F_{kj} = \max_{j \le l < k} R_{lj} - R_{kj}, \qquad j < k,

    and :math:`R_{kj} - \min_l R_{lj}` for scores of which lower ones are better. Positive means worse; negative values
    are possible and mean that the task is known better than ever before. Scores from before a task was learnt do not
    count: there was nothing to forget.

    Args:
        matrix: ``(*batch, S, T)``, ``S <= T``; entry ``[k, j]`` is the score on task j after task k was learnt. Future
            tasks are not looked at; NaN anywhere from ``[j, j]`` to ``[k, j]`` gives NaN.
        higher_is_better: true of accuracies, false of errors and negative log densities.

    Returns:
        ``(*batch, S, T)``, in the unit of the score; NaN where ``j >= k``.

    Raises:
        ValueError: the matrix has another shape.

    Source:
        Chaudhry et al. (2018), Riemannian walk for incremental learning, section 3, where the maximum is over all
        l < k.

    Example:
        >>> matrix = torch.tensor([[0.9, torch.nan, torch.nan], [0.95, 0.8, torch.nan], [0.6, 0.9, 0.7]])
        >>> forgetting(matrix)[-1]
        tensor([ 0.3500, -0.1000,     nan])
    """
    row, column = _check_matrix(matrix)
    score = matrix if higher_is_better else -matrix
    learnt = torch.where(column > row, -torch.inf, score)
    best = learnt.cummax(-2).values  # goes on being NaN below a NaN
    before = torch.cat([torch.full_like(best[..., :1, :], torch.nan), best[..., :-1, :]], dim=-2)
    return torch.where(column < row, before - score, torch.nan)


def average_forgetting(matrix: Tensor, higher_is_better: bool = True, tested: Tensor | None = None) -> Tensor:
    r"""Mean of :func:`forgetting` over the past tasks, after each task, :math:`\tfrac1k \sum_{j<k} F_{kj}`.

    Args:
        matrix: as for :func:`forgetting`; NaN as for :func:`average_score`.
        higher_is_better: as for :func:`forgetting`.
        tested: as for :func:`average_score`.

    Returns:
        ``(*batch, S)``, in the unit of the score; NaN after the first task, which has no past.

    Raises:
        ValueError: the matrix has another shape.

    Source:
        Chaudhry et al. (2018), section 3.

    Example:
        >>> average_forgetting(torch.tensor([[0.9, torch.nan], [0.6, 0.8]]))
        tensor([   nan, 0.3000])
    """
    row, column = _check_matrix(matrix)
    return _mean(forgetting(matrix, higher_is_better), (column < row) & _counted(matrix, tested).unsqueeze(-2))


def backward_transfer(matrix: Tensor, higher_is_better: bool = True, tested: Tensor | None = None) -> Tensor:
    r"""What later tasks did to earlier ones: mean gain from when a task was just learnt to the end.

    .. math:: \mathrm{BWT} = \tfrac1{S - 1} \sum_{j < S - 1} \left( R_{S-1, j} - R_{jj} \right)

    with the sign turned for scores of which lower ones are better, so that negative always means forgetting.

    Args:
        matrix: as for :func:`forgetting`; NaN as for :func:`average_score`.
        higher_is_better: as for :func:`forgetting`.
        tested: as for :func:`average_score`.

    Returns:
        ``(*batch)``, in the unit of the score; NaN after one task only.

    Raises:
        ValueError: the matrix has another shape.

    Source:
        Lopez-Paz and Ranzato (2017), Gradient episodic memory for continual learning, BWT.

    Example:
        >>> backward_transfer(torch.tensor([[0.9, torch.nan], [0.6, 0.8]]))
        tensor(-0.3000)
    """
    _check_matrix(matrix)
    seen = matrix.shape[-2]
    gain = matrix[..., -1, : seen - 1] - matrix.diagonal(dim1=-2, dim2=-1)[..., : seen - 1]
    return _mean(gain if higher_is_better else -gain, _counted(matrix, tested)[..., : seen - 1])


def forward_transfer(
    matrix: Tensor, baseline: Tensor, higher_is_better: bool = True, tested: Tensor | None = None
) -> Tensor:
    r"""What earlier tasks did for later ones: mean gain over a baseline just before a task is learnt.

    .. math:: \mathrm{FWT} = \tfrac1{S - 1} \sum_{j = 1}^{S - 1} \left( R_{j-1, j} - b_j \right)

    with the sign turned for scores of which lower ones are better, so that positive always means help.

    Args:
        matrix: ``(*batch, S, T)`` with the entries right of the diagonal, see ``future`` of
            :func:`gpseq.continual.evaluate`; NaN among the entries used gives NaN, unless the task has no test rows.
        baseline: ``(*batch, T)``, the score of each task by a learner that has seen nothing.
        higher_is_better: as for :func:`forgetting`.
        tested: as for :func:`average_score`.

    Returns:
        ``(*batch)``, in the unit of the score; NaN after one task only.

    Raises:
        ValueError: the matrix or the baseline has another shape.

    Source:
        Lopez-Paz and Ranzato (2017), Gradient episodic memory for continual learning, FWT.

    Example:
        >>> forward_transfer(torch.tensor([[0.9, 0.6], [0.6, 0.8]]), torch.tensor([0.5, 0.5]))
        tensor(0.1000)
    """
    _check_matrix(matrix)
    if baseline.shape[-1:] != matrix.shape[-1:]:
        raise ValueError(f"baseline: expected {matrix.shape[-1]} tasks, got shape {tuple(baseline.shape)}.")
    seen = matrix.shape[-2]
    before = matrix[..., : seen - 1, 1:].diagonal(dim1=-2, dim2=-1)
    gain = before - baseline[..., 1:seen]
    return _mean(gain if higher_is_better else -gain, _counted(matrix, tested)[..., 1:seen])


def _check_matrix(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows ``(S, 1)`` and of the columns ``(T,)``."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix: expected a tensor, got {type(matrix).__name__}.")
    if not matrix.is_floating_point() or matrix.dim() < 2 or not 1 <= matrix.shape[-2] <= matrix.shape[-1]:
        raise ValueError(
            "matrix: expected floating-point scores of shape (*batch, S, T) with 1 <= S <= T, got "
            f"{matrix.dtype} of shape {tuple(matrix.shape)}."
        )
    row, column = (torch.arange(size, device=matrix.device) for size in matrix.shape[-2:])
    return row.unsqueeze(-1), column


def _counted(matrix: Tensor, tested: Tensor | None) -> Tensor:
    """Which tasks count, ``(T,)``; if not told, those with a score in their own row or below, ``(*batch, T)``."""
    row, column = _check_matrix(matrix)
    if tested is None:
        return (~matrix.isnan() & (column <= row)).any(-2)
    if not isinstance(tested, Tensor) or tested.dtype != torch.bool or tested.shape != matrix.shape[-1:]:
        got = f"{tested.dtype} of shape {tuple(tested.shape)}" if isinstance(tested, Tensor) else type(tested).__name__
        raise ValueError(f"tested: expected a bool tensor of shape ({matrix.shape[-1]},), got {got}.")
    return tested.to(matrix.device)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of those that count over the last axis; NaN where none does."""
    return torch.where(counted, values, 0.0).sum(-1) / counted.sum(-1)
