"""Ten classes that come two at a time, in a feature space learnt on other images: streamed GPs beside trained heads."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import table
from examples.continual.run import (
    CLASSES,
    LENGTHSCALE,
    NUM_FEATURES,
    SIZE,
    STRENGTHS,
    StreamedGP,
    TrainedHead,
    follow,
    frozen_features,
    jointly,
    learners,
    split,
)
from gpseq import datasets, plots
from gpseq.continual import Evaluation, TaskStream

#: Images that are streamed, and those that the features are learnt on.
STREAMS = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}
LENGTHSCALES = (0.5, 1.0, 2.0)
GRID = (100.0, 300.0, 1000.0, 3000.0, 10000.0)
EPOCHS = 3
SIZES = (50, 100)


def run(smoke: bool) -> dict[str, Any]:
    """Five seeds of the network and the heads for each stream."""
    streams = {}
    for target, source in list(STREAMS.items())[: 1 if smoke else 2]:
        images, others = datasets.load_images(target), datasets.load_images(source)
        seeds, tuning, strengths = [], {}, STRENGTHS
        for seed in range(1 if smoke else 5):
            features = frozen_features(others, seed, 1 if smoke else EPOCHS)
            tasks = split(images, features)
            if seed == 0 and not smoke:
                tuning = tune(tasks, split(others, features))
                strengths = {mode: max(tuning[mode], key=lambda pair: pair[1])[0] for mode in STRENGTHS}
            seeds.append(follow_seed(tasks, seed, strengths, smoke))
        streams[target] = {
            "source": source,
            "title": images.name,
            "seeds": seeds,
            "tuning": tuning,
            "strengths": strengths,
        }
    return {"streams": streams, "classes": [list(group) for group in CLASSES]}


def tune(tasks: TaskStream, source: TaskStream) -> dict[str, Any]:
    """Accuracy at the end for each setting: of the GP on the source images, of EWC on the stream that is scored."""

    def accuracy(stream: TaskStream, learner: StreamedGP | TrainedHead) -> float:
        return follow(stream, learner).scores["accuracy"].average[-1].item()

    tuning = {"lengthscale": [[value, accuracy(source, StreamedGP(lengthscale=value))] for value in LENGTHSCALES]}
    for mode in STRENGTHS:
        tuning[mode] = [[value, accuracy(tasks, TrainedHead(0, mode, value))] for value in GRID]
    return tuning


def follow_seed(tasks: TaskStream, seed: int, strengths: dict[str, float], smoke: bool) -> dict[str, Any]:
    """Every method over one stream, and the ceilings."""
    methods = learners(seed, strengths)
    if smoke:
        methods = {name: methods[name] for name in ("streamed GP", "head, plain", "head, EWC")}
    else:
        methods |= {f"streamed GP, {size} points": StreamedGP(size, seed=seed) for size in SIZES}
    found = {name: follow(tasks, learner).to_dict() for name, learner in methods.items()}
    ceilings = {"GP, all at once": StreamedGP(seed=seed), "head, all at once": TrainedHead(seed)}
    return {"methods": found, "ceilings": {name: jointly(tasks, learner) for name, learner in ceilings.items()}}


# Two-sided 97.5 % points of Student's t, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def interval(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and 95 % interval over seeds."""
    mean = scale * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = scale * _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """One table a stream, and the matrices of the first."""
    number = max(len(stream["seeds"]) for stream in result["streams"].values())
    parts = [
        "## Classes that come two at a time",
        "Five tasks of two classes each, 1,200 images to learn and 400 held out in each task. A small convolutional "
        "network is trained on *other* images (clothes for digits, digits for clothes) and frozen; "
        f"{NUM_FEATURES} principal components of what it says are the inputs of all methods. `streamed GP` is ten GPs side by "
        f"side over one memory of {SIZE} inducing points that are chosen anew at each task, with Dirichlet classification, updated "
        "in closed form. The heads are one linear softmax layer trained by Adam, 20 passes a task. `replay` keeps "
        f"{SIZE} examples, as many as the GP has points. `all at once` meets all tasks together: the ceilings. "
        "*Class-incremental*: one of ten classes, the task is not told; *task known*: one of its two. "
        f"Accuracies in per cent and NLPD in nats on held-out images, mean over the five tasks after the last; {number} seed{'s' * (number > 1)} of the network and the heads, "
        "mean and 95 % interval (Student's t).",
    ]
    for stream in result["streams"].values():
        seeds = stream["seeds"]
        rows = []
        for name in seeds[0]["methods"]:
            runs = [Evaluation.from_dict(seed["methods"][name]) for seed in seeds]
            last = {key: [r.scores[key].average[-1].item() for r in runs] for key in runs[0].scores}
            lost = [r.scores["accuracy"].average_forgetting[-1].item() for r in runs]
            back = [r.scores["accuracy"].backward_transfer for r in runs]
            rows.append(
                [
                    name,
                    interval(last["accuracy"], 100),
                    interval(last["accuracy, task known"], 100),
                    interval(last["nlpd"], digits=2),
                    interval(lost, 100),
                    interval(back, 100),
                    f"{statistics.median(r.seconds.sum().item() for r in runs):.1f}",
                ]
            )
        for name in seeds[0]["ceilings"]:
            runs = [seed["ceilings"][name] for seed in seeds]
            rows.append(
                [
                    name,
                    *(interval([r[key] for r in runs], 100) for key in ("accuracy", "accuracy, task known")),
                    interval([r["nlpd"] for r in runs], digits=2),
                    *["–"] * 3,
                ]
            )
        parts += [
            f"{stream['title']}, features from {stream['source']}:",
            table(
                ["method", "accuracy", "task known", "NLPD", "forgetting", "backward transfer", "learning [s], median"],
                rows,
            ),
        ]
    first = result["streams"]["mnist"]["seeds"]
    shown = [name for name in first[0]["methods"] if not name.endswith("points")]
    matrices = {
        name: torch.stack(
            [Evaluation.from_dict(seed["methods"][name]).scores["accuracy"].values for seed in first]
        ).mean(0)
        for name in shown
    }
    figure = plots.new_figure(13, 3.0)
    names = Evaluation.from_dict(first[0]["methods"][shown[0]]).names
    plots.plot_task_scores(list(figure.subplots(1, len(shown))), matrices, names)
    plots.save_figure(figure, figures / "digits.png")
    parts.append("![Accuracy on every past task after every later one, digits, mean of the seeds](figures/digits.png)")
    for stream in result["streams"].values():
        if stream["tuning"]:
            grids = {
                name: ", ".join(f"{100 * score:.1f} at {value:g}" for value, score in grid)
                for name, grid in stream["tuning"].items()
            }
            parts.append(
                f"Settings for {stream['title']}, first seed, accuracy at the end. The lengthscale of the GP, in median "
                f"distances within the first task, on the stream of the *source* images: {grids['lengthscale']}; "
                f"{LENGTHSCALE:g} is used. The strength of EWC on the stream that is scored itself, which favours it: "
                f"{grids['separate']}; online {grids['online']}. The best of each is used for all seeds."
            )
    return parts
