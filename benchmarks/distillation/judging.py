"""What is measured of every contender, of the path of a student, and which of the goals it meets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gpseq
from benchmarks.distillation.contenders import CHUNK, DRAWS
from benchmarks.distillation.students import Distilled
from benchmarks.uncertainty.judging import Predictor, detected, labelled
from benchmarks.uncertainty.tasks import Part, Task
from benchmarks.uncertainty.training import in_batches
from gpseq import metrics
from gpseq.reconfiguration import capture, recording_steps, with_steps
from gpseq.reconfiguration.rollout import find_rollout

#: Test inputs, and inputs from outside, along whose path drift and spread are looked at; test inputs of merged steps.
LOOKED_AT, MERGED = 500, 1_000


def judge(task: Task, predict: Predictor) -> dict[str, Any]:
    """Scores of one contender: of labels on the test part, and of each of its scores on the parts outside."""
    answer = predict(task.test.inputs)
    outside = {name: predict(part.inputs) for name, part in task.ood.items()}
    return {
        **labelled(answer, task.test),
        "ood": {
            name: {score: detected(answer.scores[score], other.scores[score])["auroc"] for score in answer.scores}
            for name, other in outside.items()
        },
    }


# --- along the depth --------------------------------------------------------------------------------------------------


@torch.no_grad()
def drift(found: Distilled, x: Tensor, first_block: int = 0) -> dict[str, list[float]]:
    """How far a student's states are from its teacher's, relative to their norm, at each depth.

    Args:
        found: the student and its teacher.
        x: inputs.
        first_block: blocks that the student keeps.

    Returns:
        ``rollout``: on the student's own noise-free path; ``step``: after one step from the teacher's state.
    """
    gaps: dict[str, list[Tensor]] = {"rollout": [], "step": []}
    norms = []
    rollout = find_rollout(found.student)
    for part in x.split(CHUNK):
        path = capture(found.teacher, part, first_block=first_block)
        with recording_steps(rollout) as records:
            found.student(part)
        seen = torch.ones(path.states[0].shape[:2]) if path.padding is None else (~path.padding).float()
        seen = seen.expand(path.states[0].shape[:2])
        times = [number / len(path) for number in range(len(path) + 1)]
        steps = [rollout.step(state, t, path.masks)[0] for state, t in zip(path.states[:-1], times[1:], strict=True)]
        norms.append(torch.stack([_square(state, seen) for state in path.states[1:]]))
        for name, states in (("rollout", records[0].states[1:]), ("step", steps)):
            gaps[name].append(torch.stack([_square(a - b, seen) for a, b in zip(states, path.states[1:], strict=True)]))
    whole = sum(norms)
    return {name: (sum(parts) / whole).sqrt().tolist() for name, parts in gaps.items()}  # type: ignore[operator, union-attr]


def _square(x: Tensor, seen: Tensor) -> Tensor:
    return (x.square().sum(-1) * seen).sum()


@torch.no_grad()
def depth_spread(student: nn.Module, x: Tensor, seed: int) -> dict[str, list[float]]:
    """Mean and deviation over inputs of the spread at each depth, averaged over draws.

    Args:
        student: that draws.
        x: inputs.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    parts = [
        gpseq.predict(student, part, num_samples=DRAWS, generator=generator).scores["spread.depth"]
        for part in x.split(CHUNK)
    ]
    found = torch.cat(parts)
    return {"mean": found.mean(0).tolist(), "deviation": found.std(0).tolist()}


@torch.no_grad()
def merged(student: nn.Module, part: Part, blocks: int, force: bool, seed: int) -> list[dict[str, Any]]:
    """Accuracy and NLL with fewer steps: L, half and a quarter of them, rounded up.

    Args:
        student: that draws.
        part: with labels.
        blocks: L.
        force: whether the student has to be talked into it, as it was trained for L steps alone.
        seed: of the draws.
    """
    assert part.labels is not None
    part = Part(part.inputs[:MERGED], part.labels[:MERGED])
    found = []
    for steps in sorted({blocks, math.ceil(blocks / 2), math.ceil(blocks / 4)}, reverse=True):
        fewer = with_steps(student, steps, force=force)
        logits = in_batches(fewer, part.inputs)
        generator = torch.Generator().manual_seed(1000 + seed)
        draws = [
            gpseq.predict(fewer, x, num_samples=DRAWS, generator=generator).probs() for x in part.inputs.split(CHUNK)
        ]
        p = torch.cat(draws).double()
        found.append(
            {
                "steps": steps,
                "noise-free": metrics.accuracy(logits.argmax(-1), part.labels).item(),
                "drawn": metrics.accuracy(p.argmax(-1), part.labels).item(),
                "nll": -p.gather(-1, part.labels.unsqueeze(-1)).clamp_min(1e-30).log().mean().item(),
            }
        )
    return found


# --- goals ------------------------------------------------------------------------------------------------------------


def auroc(judged: Mapping[str, Any], score: str = "entropy") -> float:
    """AUROC of a score, averaged over the parts outside."""
    return statistics.fmean(part[score] for part in judged["ood"].values())


def verdicts(seeds: Sequence[Mapping[str, Any]], ours: str, student: str) -> list[dict[str, Any]]:
    """Each number that was asked for: what was reached, on average over the seeds, and whether that is enough.

    Args:
        seeds: results, of which those without the contender are left out.
        ours: name of the contender.
        student: name of its recipe.

    Returns:
        For each goal ``goal``, ``reached``, ``needed``, ``margin``, positive where it is exceeded, with its
        standard ``error`` over the seeds (``None`` for one), and ``met``.
    """
    seeds = [seed for seed in seeds if ours in seed["contenders"]]
    found = []

    def add(goal: str, values: Sequence[tuple[float, float]], sign: int) -> None:
        margins = [sign * (reached - needed) for reached, needed in values]
        mean = statistics.fmean(margins)
        error = statistics.stdev(margins) / math.sqrt(len(margins)) if len(margins) > 1 else None
        reached, needed = (statistics.fmean(value) for value in zip(*values, strict=True))
        found.append(
            {"goal": goal, "reached": reached, "needed": needed, "margin": mean, "error": error, "met": mean >= 0}
        )

    def pairs(key: str) -> list[tuple[float, float]]:
        return [(seed["contenders"][ours][key], seed["contenders"]["teacher"][key]) for seed in seeds]

    sizes = [seed["sizes"][student] for seed in seeds]
    add(
        "kernel and kept perceptron, share of the replaced blocks",
        [(s["kernel"] / s["replaced"], 0.6) for s in sizes],
        -1,
    )
    add("accuracy, teacher's less 1 point", [(a, b - 0.01) for a, b in pairs("accuracy")], 1)
    add("accuracy, teacher's less 0.5 points (the aim)", [(a, b - 0.005) for a, b in pairs("accuracy")], 1)
    add("ECE, a third of the teacher's or 0.015", [(a, max(b / 3, 0.015)) for a, b in pairs("ece")], -1)
    add("NLL, teacher's", pairs("nll"), -1)
    add("AURC, teacher's", pairs("aurc"), -1)
    detection = [(auroc(seed["contenders"][ours]), auroc(seed["contenders"]["teacher"])) for seed in seeds]
    add("OOD AUROC of entropy, teacher's", detection, 1)
    return found
