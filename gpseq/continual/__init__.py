"""Continual learning: streams of tasks, scores on every task after every task, and EWC for networks."""

from gpseq.continual.ewc import EWC, EWCState, consolidate, penalty
from gpseq.continual.fisher import Family, bernoulli, categorical, fisher_diagonal, gaussian
from gpseq.continual.scores import Evaluation, ScoreMatrix, evaluate
from gpseq.continual.tasks import Task, TaskStream, tasks_by_class, tasks_by_key, tasks_by_time

__all__ = [
    "EWC",
    "EWCState",
    "Evaluation",
    "Family",
    "ScoreMatrix",
    "Task",
    "TaskStream",
    "bernoulli",
    "categorical",
    "consolidate",
    "evaluate",
    "fisher_diagonal",
    "gaussian",
    "penalty",
    "tasks_by_class",
    "tasks_by_key",
    "tasks_by_time",
]
