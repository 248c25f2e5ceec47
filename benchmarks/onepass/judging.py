"""Scores of the contenders, and by how much one of them beats the others."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpseq
from benchmarks.onepass.contenders import (
    GRID,
    Answer,
    Found,
    choose_posterior,
    generalised_linear,
    main_form,
    monte_carlo,
    negative_log,
    point_estimates,
    propagations,
)
from benchmarks.onepass.tasks import SETTINGS, Data, Problem
from benchmarks.uncertainty.training import CACHE
from gpseq import metrics
from gpseq.storage import replace_file

#: Resamples of the inputs for the error of a difference of AUROC.
RESAMPLES = 200
#: Prior precisions of a smoke test.
SMOKE_GRID = (1e2, 1e3)
#: Contenders that the main form is compared with.
RIVALS = (
    "MAP",
    "MAP + temperature",
    "Monte Carlo, 10",
    "Monte Carlo, 100",
    "GLM (laplace-torch), probit",
    "GLM (laplace-torch) + scale",
    "GLM (linearised draws) + scale",
    "GLM of the head (laplace-torch) + scale",
    "streamlined",
    "streamlined + scale",
    "diagonal + scale",
)


def run_settings(names: tuple[str, ...], smoke: bool, cache: Path = CACHE) -> dict[str, Any]:
    """Judge all contenders on some settings, at all their seeds.

    Args:
        names: of the settings.
        smoke: small parts and one seed; trained networks are thrown away.
        cache: folder of trained networks.
    """
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            setting = SETTINGS[name]
            seeds = []
            for seed in range(1 if smoke else setting.seeds):
                seeds.append(_kept(name, seed, smoke, Path(folder) if smoke else cache))
            made[name] = {"title": setting.title, "about": setting.about, "seeds": seeds}
    return made


def _kept(name: str, seed: int, smoke: bool, cache: Path) -> dict[str, Any]:
    """What is measured at a seed, from the cache if the code has not changed since."""
    file = cache / f"onepass-{name}-{seed}-{_code()}.json"
    if not file.exists():
        begun = time.perf_counter()
        problem = SETTINGS[name].make(seed, smoke, cache)
        if smoke:
            problem = replace(problem, tangents=8, columns=(2, 4), draws=16, samples=(2, 4))
        judged = judge_seed(problem, seed, SMOKE_GRID if smoke else GRID)
        replace_file(file, json.dumps(judged).encode())
        print(f"{name}, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    return json.loads(file.read_text())


def _code() -> str:
    """A hash of the code that judgements depend on, but for the words of the report."""
    package = Path(gpseq.__file__).parent
    files = [Path(__file__).parent / f"{name}.py" for name in ("contenders", "judging", "tasks")]
    digest = hashlib.sha256()
    for path in sorted([*files, *package.glob("metrics/*.py"), *package.glob("propagation/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def judge_seed(problem: Problem, seed: int, grid: Sequence[float] = GRID) -> dict[str, Any]:
    """All contenders on one problem.

    Args:
        problem: a trained network and its data.
        seed: of draws.
        grid: prior precisions that are tried.
    """
    belief = choose_posterior(problem, seed, grid)
    found: dict[str, Found] = {}
    for name, one in _contenders(problem, belief, seed):
        found[name] = one
    truth = found[f"Monte Carlo, {problem.samples[-1]}"].test
    main = f"{main_form(problem)} + scale"
    ours = (main, f"{main}, temperature")
    return {
        "seed": seed,
        "sizes": {
            "train": problem.num_train,
            "curvature": len(problem.train),
            "val": len(problem.val),
            "test": len(problem.test),
            "ood": {name: len(part) for name, part in problem.ood.items()},
        },
        "weights": sum(
            p.numel() for name, p in problem.network.named_parameters() if name in set(belief.posterior.names)
        ),
        "prior_precision": belief.prior_precision,
        "tried": {f"{precision:g}": loss for precision, loss in belief.tried.items()},
        "curvature_seconds": belief.seconds,
        "main": main,
        "contenders": {
            name: {
                **labelled(one.test, problem.test),
                "ood": {part: detected(one.test, outside) for part, outside in one.ood.items()},
                "divergence": divergence(truth, one.test),
                "seconds": one.seconds,
                "fitted": one.fitted,
            }
            for name, one in found.items()
        },
        "against": {
            our: {name: compared(found[our], found[name], problem) for name in found if name in RIVALS} for our in ours
        },
    }


def _contenders(problem: Problem, belief: Any, seed: int) -> Iterator[tuple[str, Found]]:
    yield from point_estimates(problem)
    yield from monte_carlo(problem, belief.posterior, seed)
    yield from generalised_linear(problem, belief, seed)
    yield from propagations(problem, belief.posterior, seed)


def labelled(answer: Answer, part: Data) -> dict[str, float]:
    """Accuracy, NLL, ECE of the top label in 15 bins, and AURC."""
    assert part.labels is not None
    confidence, predicted = answer.probs.max(-1)
    return {
        "accuracy": metrics.accuracy(predicted, part.labels).item(),
        "nll": negative_log(answer, part.labels).mean().item(),
        "ece": metrics.top_label_ece(answer.probs, part.labels, 15).item(),
        "aurc": metrics.aurc(-confidence, predicted != part.labels).item(),
    }


def detected(inside: Answer, outside: Answer) -> dict[str, float]:
    """AUROC of entropy, and of mutual information where there is some."""
    found = {"entropy": metrics.ood_auroc(inside.entropy, outside.entropy).item()}
    if inside.information is not None and outside.information is not None:
        found["information"] = metrics.ood_auroc(inside.information, outside.information).item()
    return found


def divergence(truth: Answer, answer: Answer) -> float:
    """Mean Kullback-Leibler divergence from a prediction to another, in nats."""
    return (truth.probs * (truth.log_probs - answer.log_probs)).sum(-1).mean().item()


def compared(ours: Found, rival: Found, problem: Problem) -> dict[str, list[float]]:
    """Differences of NLL and of the AUROC of entropy, ours minus theirs, each with its error from the choice of inputs.

    Args:
        ours: answers of our contender.
        rival: of another.
        problem: with the labels.
    """
    assert problem.test.labels is not None
    gap = negative_log(ours.test, problem.test.labels) - negative_log(rival.test, problem.test.labels)
    found = {"nll": [gap.mean().item(), (gap.std() / math.sqrt(len(gap))).item()]}
    for name in ours.ood:
        inside = (ours.test.entropy, rival.test.entropy)
        found[f"auroc {name}"] = _auroc_gap(inside, (ours.ood[name].entropy, rival.ood[name].entropy))
    return found


def _auroc_gap(inside: tuple[Tensor, Tensor], outside: tuple[Tensor, Tensor]) -> list[float]:
    def gap(rows: Tensor, far: Tensor) -> float:
        first, second = (metrics.ood_auroc(x[rows], y[far]).item() for x, y in zip(inside, outside, strict=True))
        return first - second

    generator = torch.Generator().manual_seed(0)
    sizes = len(inside[0]), len(outside[0])
    drawn = [gap(*(torch.randint(size, (size,), generator=generator) for size in sizes)) for _ in range(RESAMPLES)]
    return [gap(*(torch.arange(size) for size in sizes)), torch.tensor(drawn).std().item()]


def together(gaps: list[list[float]]) -> tuple[float, float]:
    """Mean of differences over seeds and its standard error, from the choice of inputs and from the seeds.

    Args:
        gaps: of each seed, the difference and its standard error.
    """
    values = torch.tensor([gap[0] for gap in gaps], dtype=torch.float64)
    errors = torch.tensor([gap[1] for gap in gaps], dtype=torch.float64)
    # The seeds share their test inputs, so that the error of these does not fall with their number.
    square = errors.square().mean()
    if len(values) > 1:
        square = square + values.var() / len(values)
    return values.mean().item(), square.sqrt().item()
