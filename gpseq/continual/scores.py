"""Scores on every task after every task, and the driver that collects them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpseq import metrics
from gpseq.continual.tasks import Task

#: Scores whose direction is known by their name.
HIGHER_IS_BETTER = {"accuracy": True, "rmse": False, "nlpd": False, "mae": False, "error": False, "loss": False}


@dataclass(frozen=True, eq=False)
class ScoreMatrix:
    """One score on every task after every task.

    Attributes:
        values: ``(S, T)`` float64; entry ``[k, j]`` is the score on task j after task k was learnt; NaN where it was
            not scored. ``S < T`` while the stream is under way.
        higher_is_better: true of accuracies, false of errors and negative log densities.
        tested: ``(T,)`` bool, which tasks have test rows, see :func:`gpseq.metrics.average_score`; ``None`` infers it
            from the values.

    Raises:
        TypeError: the values are no tensor.
        ValueError: another shape.

    Example:
        >>> matrix = ScoreMatrix(torch.tensor([[0.9, torch.nan], [0.6, 0.8]], dtype=torch.float64))
        >>> matrix.average[-1].item(), matrix.backward_transfer
        (0.7, -0.3)
    """

    values: Tensor
    higher_is_better: bool = True
    tested: Tensor | None = None

    def __post_init__(self) -> None:
        metrics.average_score(self.values, self.tested)  # checks the shapes

    @property
    def average(self) -> Tensor:
        """Mean over the tasks seen, after each task, ``(S,)``, see :func:`gpseq.metrics.average_score`."""
        return metrics.average_score(self.values, self.tested)

    @property
    def forgetting(self) -> Tensor:
        """Loss of each past task after each task, ``(S, T)``, see :func:`gpseq.metrics.forgetting`."""
        return metrics.forgetting(self.values, self.higher_is_better)

    @property
    def average_forgetting(self) -> Tensor:
        """Mean over the past tasks, after each task, ``(S,)``, see :func:`gpseq.metrics.average_forgetting`."""
        return metrics.average_forgetting(self.values, self.higher_is_better, self.tested)

    @property
    def backward_transfer(self) -> float:
        """What later tasks did to past ones on average, see :func:`gpseq.metrics.backward_transfer`."""
        return metrics.backward_transfer(self.values, self.higher_is_better, self.tested).item()

    def forward_transfer(self, baseline: Tensor) -> float:
        """What earlier tasks did for later ones on average, see :func:`gpseq.metrics.forward_transfer`.

        Args:
            baseline: ``(T,)``, the score of each task by a learner that has seen nothing.
        """
        return metrics.forward_transfer(self.values, baseline, self.higher_is_better, self.tested).item()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        names: of the tasks, T of them.
        scores: name of the score -> matrix.
        seconds: ``(T,)`` float64, time of each call of ``learn``; 0 for tasks with nothing to learn.
    """

    names: tuple[str, ...]
    scores: Mapping[str, ScoreMatrix]
    seconds: Tensor

    def to_dict(self) -> dict[str, Any]:
        """As what JSON holds: lists, ``None`` for NaN, ``"inf"`` and ``"-inf"``; read again by :meth:`from_dict`."""
        return {
            "names": list(self.names),
            "scores": {
                name: {
                    "values": _lists(matrix.values),
                    "higher_is_better": matrix.higher_is_better,
                    "tested": None if matrix.tested is None else matrix.tested.tolist(),
                }
                for name, matrix in self.scores.items()
            },
            "seconds": self.seconds.tolist(),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Evaluation:
        """The evaluation that :meth:`to_dict` wrote."""
        scores = {
            name: ScoreMatrix(_tensor(entry["values"]), entry["higher_is_better"], _mask(entry.get("tested")))
            for name, entry in document["scores"].items()
        }
        return cls(tuple(document["names"]), scores, torch.tensor(document["seconds"], dtype=torch.float64))


def evaluate(
    tasks: Iterable[Task],
    learn: Callable[[Task], Any],
    score: Callable[[Task], Mapping[str, float]],
    future: bool = False,
    higher_is_better: Mapping[str, bool] | None = None,
) -> Evaluation:
    """Learn tasks one after the other, and score every past task after each.

    The learner is whatever the two functions close over. Tasks may come from a generator; each is kept from when it is
    learnt, because it is scored again. A task without rows to learn is not handed to ``learn``, one without test rows
    not to ``score``; its scores are NaN.

    Args:
        tasks: in the order in which they are met.
        learn: learns ``task.x`` and ``task.y``; the only call that is timed.
        score: one or more scores on ``task.x_test`` and ``task.y_test``, as numbers by name, the same names for all.
        future: score tasks that are still to come too; the tasks must then be finite, and are listed first.
        higher_is_better: name of a score -> its direction. Known without it: accuracy (higher), and rmse, nlpd, mae,
            error and loss (lower). That the direction of a score is not known is found out when ``score`` is called
            for the first time, after a task was learnt: its names are not known before.

    Returns:
        The matrices and the times.

    Raises:
        TypeError: ``score`` gives no numbers by name, or ``higher_is_better`` is no mapping.
        ValueError: there are no tasks, no task could be scored, scores change their names, or the direction of one is
            not known.

    Example:
        >>> from gpseq.continual import tasks_by_key
        >>> x = torch.linspace(0.0, 1.0, 20, dtype=torch.float64)
        >>> seen = []
        >>> found = evaluate(
        ...     tasks_by_key(x, 3 * x, num_tasks=2, held_out=0.5),
        ...     learn=lambda task: seen.append(task.y),
        ...     score=lambda task: {"rmse": metrics.rmse(torch.cat(seen).mean(), task.y_test)},
        ... )
        >>> found.scores["rmse"].values.shape, bool(found.scores["rmse"].average_forgetting[-1] > 0)
        (torch.Size([2, 2]), True)
    """
    if higher_is_better is not None and not isinstance(higher_is_better, Mapping):
        raise TypeError(f"higher_is_better: expected a mapping from names to bools, got {higher_is_better!r}.")
    directions = HIGHER_IS_BETTER | dict(higher_is_better or {})
    coming = list(tasks) if future else tasks
    seen: list[Task] = list(coming) if future else []
    names: tuple[str, ...] | None = None
    rows, seconds = [], []
    for number, task in enumerate(coming):
        if not future:
            seen.append(task)
        begun = time.perf_counter()
        if len(task.y):
            learn(task)
        seconds.append(time.perf_counter() - begun if len(task.y) else 0.0)
        row: list[dict[str, float] | None] = []
        for other in seen if future else seen[: number + 1]:
            found = _numbers(score(other), other) if len(other.y_test) else None
            if found is not None:
                if names is None:
                    names = tuple(found)
                    if unknown := [name for name in names if name not in directions]:
                        raise ValueError(
                            f"higher_is_better: expected a direction for score {unknown[0]!r}, got none; known are "
                            f"{', '.join(directions)}."
                        )
                if set(found) != set(names):
                    raise ValueError(f"score: expected the scores {names}, got {tuple(found)} for task {other.name!r}.")
            row.append(found)
        rows.append(row)
    if not seconds:
        raise ValueError("tasks: expected at least one task, got none.")
    if not names:
        raise ValueError("tasks: expected at least one task with test rows and scores, got none.")
    scores = {}
    tested = torch.tensor([len(task.y_test) > 0 for task in seen])
    for name in names:
        values = torch.full((len(rows), len(seen)), math.nan, dtype=torch.float64)
        for k, row in enumerate(rows):
            for j, found in enumerate(row):
                if found is not None:
                    values[k, j] = found[name]
        scores[name] = ScoreMatrix(values, directions[name], tested)
    return Evaluation(tuple(task.name for task in seen), scores, torch.tensor(seconds, dtype=torch.float64))


def _numbers(found: Any, task: Task) -> dict[str, float]:
    """Scores as floats, by name."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"score: expected numbers by name, such as {{'rmse': 0.1}}, got {type(found).__name__} for task "
            f"{task.name!r}."
        )
    numbers = {}
    for name, value in found.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"score: expected one number for {name!r}, got {value!r} for task {task.name!r}.") from None
    return numbers


def _lists(values: Tensor) -> list[list[float | str | None]]:
    def entry(value: float) -> float | str | None:
        return None if math.isnan(value) else str(value) if math.isinf(value) else value

    return [[entry(value) for value in row] for row in values.tolist()]


def _tensor(rows: list[list[float | str | None]]) -> Tensor:
    numbers = [[math.nan if value is None else float(value) for value in row] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64)


def _mask(tested: list[bool] | None) -> Tensor | None:
    return None if tested is None else torch.tensor(tested, dtype=torch.bool)
