"""The loss of what a student answers, beside that of its path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from gpseq.reconfiguration.batches import logits_of
from gpseq.reconfiguration.objectives import distillation, mean_over_seen
from gpseq.reconfiguration.options import Options
from gpseq.reconfiguration.path import Path

#: Label of what is left out of a task's loss.
IGNORED = -100

Task = str | Callable[[Tensor, Tensor], Tensor]


def choose_task(options: Options, teacher: nn.Module, x: Any, y: Tensor | None) -> Task | None:
    """Which loss of logits is meant.

    Args:
        options: of the distillation.
        teacher: whose forward may know labels.
        x: inputs.
        y: labels, or ``None``.

    Returns:
        ``"kd"``, ``"ce"``, ``"own"``, the host's own loss of labels, a function, or ``None``.

    Raises:
        ValueError: labels are asked for, and there are none.
    """
    task = options.task_loss
    if task is None or not options.weight("task"):
        return None
    if not isinstance(task, str):
        return task
    if task == "kd" or (task == "auto" and y is None):
        return "kd"
    if y is None:
        raise ValueError("y: expected labels with task_loss='ce', got none; 'kd' takes the teacher's probabilities.")
    named = isinstance(x, Mapping) and "labels" in inspect.signature(teacher.forward).parameters
    return "own" if named else "ce"


def loss_of_output(task: Task, output: Any, path: Path, y: Any, temperature: float) -> Tensor:
    """The loss of a student's output.

    Args:
        task: from :func:`choose_task`.
        output: of the student.
        path: of the teacher, with its output.
        y: labels.
        temperature: of ``"kd"``.
    """
    if task == "own" and isinstance(getattr(output, "loss", None), Tensor):
        return output.loss
    logits = logits_of(output)
    if not isinstance(task, str):
        return task(logits, y)
    padding = path.padding
    if padding is not None and path.stack.batch_dim == 1:
        padding = padding.mT
    of_tokens = padding is not None and logits.dim() == 3 and logits.shape[:2] == padding.shape
    if task == "kd":
        values = distillation(logits, logits_of(path.output), temperature)
        return mean_over_seen(values, padding) if of_tokens else values.mean()
    return _cross_entropy(logits, y, padding if of_tokens else None)


def _cross_entropy(logits: Tensor, labels: Any, padding: Tensor | None) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"y: expected whole numbers of shape {tuple(logits.shape[:-1])}, got {got}.")
    labels = labels if padding is None else labels.masked_fill(padding, IGNORED)
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
