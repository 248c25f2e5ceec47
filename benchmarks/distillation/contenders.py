"""Who is judged: teachers with and without help, and students by one draw, ten draws, none, and moments."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import gpseq
from benchmarks.distillation.students import RECIPES, Distilled
from benchmarks.uncertainty import contenders as peers
from benchmarks.uncertainty.judging import Answer, Predictor, averaged, plain
from benchmarks.uncertainty.tasks import Part
from benchmarks.uncertainty.training import in_batches
from gpseq.reconfiguration import calibrate_spread, path_nll

#: Draws of a student, and passes of dropout.
DRAWS = 10
#: Draws of logits from the Gaussian of moments.
LOGITS = 256
#: Inputs at a time.
CHUNK = 100
#: What is made of the teacher, by name.
TEACHERS: dict[str, peers.Contender] = {
    "teacher": peers.mle,
    "teacher + temperature": peers.temperature,
    "teacher, MC dropout": peers.mc_dropout,
    "teacher, last-layer Laplace": peers.laplace,
    "SGPA, fitted to the teacher": peers.gp,
}
#: A model that is trained with processes in its attention, of so many seeds.
PROCESS, PROCESS_SEEDS = "SGPA, trained", 1
#: The contender that is judged by the goals.
OURS = "student, 10 draws"
#: The same with a factor on its spread, as a temperature is for a teacher.
CALIBRATED = "student, 10 draws, spread calibrated"
#: Validation inputs that the factor is fitted on: each of a dozen trials draws ten times.
FITTED = 300


def drawn(found: Distilled, number: int, seed: int, scores: bool = True) -> Predictor:
    """Probabilities of some draws, averaged; the noise is the same for all calls.

    Args:
        found: the student and its teacher.
        number: of draws.
        seed: of them.
        scores: with the expected spread, and the path's negative log density, which needs the teacher.
    """

    def predict(x: Tensor) -> Answer:
        generator = torch.Generator().manual_seed(1000 + seed)
        logits, spread, nll = [], [], []
        for part in x.split(CHUNK):
            with torch.no_grad():
                p = gpseq.predict(found.student, part, num_samples=number, generator=generator)
                assert p.samples is not None
                logits.append(p.samples)
                spread.append(p.scores["spread"])
                if scores:
                    nll.append(path_nll(found.teacher, found.student, part).mean(-1))
        more = {"path NLL": torch.cat(nll)} if scores else {}
        return averaged(torch.cat(logits, 1).log_softmax(-1), spread=torch.cat(spread), **more)

    return predict


def noise_free(found: Distilled) -> Predictor:
    """The mean path alone.

    Args:
        found: the student.
    """
    return lambda x: plain(in_batches(found.student, x).log_softmax(-1))


def moments(found: Distilled, seed: int) -> Predictor:
    """One pass with mean and variance; probabilities are averages over draws of the logits.

    Args:
        found: the student.
        seed: of the draws.
    """

    def predict(x: Tensor) -> Answer:
        logits = []
        for part in x.split(CHUNK):
            with torch.no_grad():
                p = gpseq.predict(found.student, part, method="moments").to(torch.float64)
                logits.append(p.rsample(LOGITS, torch.Generator().manual_seed(1000 + seed)).float())
        return averaged(torch.cat(logits, 1).log_softmax(-1))

    return predict


def calibrated(found: Distilled, val: Part, seed: int) -> Distilled:
    """The same with one factor on all of its spread, fitted on validation labels.

    Args:
        found: the student.
        val: the validation part.
        seed: of the draws.
    """
    student = copy.deepcopy(found.student)
    assert val.labels is not None
    batches = peers.batched(Part(val.inputs[:FITTED], val.labels[:FITTED]))
    calibrate_spread(student, batches, DRAWS, torch.Generator().manual_seed(3000 + seed))
    return replace(found, student=student)


def of_student(name: str, found: Distilled, val: Part, seed: int) -> Iterator[tuple[str, Predictor]]:
    """Everyone that is judged of a student, by name.

    Args:
        name: of its recipe.
        found: the student.
        val: the validation part.
        seed: of draws.
    """
    if name == "student":
        yield OURS, drawn(found, DRAWS, seed)
        yield CALIBRATED, drawn(calibrated(found, val, seed), DRAWS, seed, scores=False)
        yield "student, 1 draw", drawn(found, 1, seed, scores=False)
        yield "student, noise-free", noise_free(found)
    elif RECIPES[name].noisy:
        yield f"{name}, 10 draws", drawn(found, DRAWS, seed, scores=False)
        yield f"{name}, noise-free", noise_free(found)
    else:
        yield name, noise_free(found)


def parameters(network: nn.Module) -> int:
    """How many there are."""
    return sum(value.numel() for value in network.parameters())


def sizes(found: Distilled, first_block: int) -> dict[str, Any]:
    """Parameters of the blocks that a student replaces, of what stands in their place, and of both networks.

    Args:
        found: the student and its teacher.
        first_block: how many blocks it keeps.
    """
    from gpseq.reconfiguration import find_stack

    blocks = find_stack(found.teacher, first_block=first_block).blocks
    replaced = sum(parameters(block) for block in blocks)
    teacher, student = parameters(found.teacher), parameters(found.student)
    return {
        "blocks": len(blocks),
        "replaced": replaced,
        "kernel": student - (teacher - replaced),
        "teacher": teacher,
        "student": student,
    }
