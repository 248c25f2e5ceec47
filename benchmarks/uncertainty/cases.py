"""A case of the uncertainty benchmarks: all contenders on one task, over several seeds."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpseq
from benchmarks.uncertainty.contenders import CONTENDERS, OURS, TRAINED, Source, fitted
from benchmarks.uncertainty.judging import judge, verdicts
from benchmarks.uncertainty.tasks import Task
from benchmarks.uncertainty.training import CACHE, key
from gpseq.storage import replace_file

SMOKE_SEEDS = 2
#: Contenders of ours that are judged by the goals.
JUDGED = ("GP", "GP, layers 2 on", "GP + MC dropout", "GP from scratch")


def run_case(
    make: Callable[[bool], Task], smoke: bool, cache: Path = CACHE, names: tuple[str, ...] = tuple(CONTENDERS)
) -> dict[str, Any]:
    """Train what is not in the cache, judge every contender at every seed, and compare.

    A case that was stopped goes on: judgements are kept beside the networks, for as long as neither the code that made
    them nor the data change. A smoke test keeps nothing.

    Args:
        make: of the task, from whether it is a smoke test.
        smoke: small parts, two seeds.
        cache: a folder.
        names: of the contenders.
    """
    task = make(smoke)
    names = fitting(task, names)
    with tempfile.TemporaryDirectory() as folder:
        seeds = [
            judge_seed(task, seed, Path(folder) if smoke else cache, names)
            for seed in range(SMOKE_SEEDS if smoke else task.seeds)
        ]
    return {
        "task": task.name,
        "sizes": {
            "train": len(task.train),
            "val": len(task.val),
            "test": len(task.test),
            "shifted": {name: len(part) for name, part in task.shifted.items()},
            "ood": {name: len(part) for name, part in task.ood.items()},
        },
        "classes": task.num_classes,
        "settings": {
            name: getattr(task, name) for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup")
        },
        "seeds": seeds,
        "verdicts": {
            name: verdicts([seed["contenders"] for seed in seeds], name, *_drawn(name))
            for name in JUDGED
            if name in names
        },
    }


def _drawn(name: str) -> tuple[str, str]:
    """Names of the draws and of the mean that go with a contender."""
    stem = name if name == "GP from scratch" else "GP"
    return f"{stem}, sampled", f"{stem}, mean only"


def fitting(task: Task, names: tuple[str, ...] = tuple(CONTENDERS)) -> tuple[str, ...]:
    """Those contenders whose networks make sense for a task."""
    return tuple(name for name in names if TRAINED.get(name, ("softmax", 1))[0] in task.kinds)


def judge_seed(task: Task, seed: int, cache: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """What is measured of every contender at one seed."""
    folder = cache / task.name
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(task, seed, cache)
    step = source.trained().seconds_per_step
    codes = {ours: _code(task, ours) for ours in (False, True)}
    found = {}
    for name in names:
        label = "".join(letter if letter.isalnum() else "_" for letter in name)
        file = folder / f"judged-{seed}-{label}-{codes[name in OURS]}.json"
        if not file.exists():
            kind, count = TRAINED.get(name, ("softmax", 1))
            for offset in range(count):  # trained before the clock of the fit runs
                source.trained(kind, offset)
            predict, seconds = fitted(CONTENDERS[name], source)
            judged = {
                **judge(task, predict),
                "fit_seconds": seconds,
                "training_step": count * source.trained(kind).seconds_per_step / step,
            }
            replace_file(file, json.dumps(judged).encode())
            print(f"{task.name}, seed {seed}: {name}", flush=True)
        found[name] = json.loads(file.read_text())
    return {"seed": seed, "seconds_per_step": step, "contenders": found}


def _code(task: Task, ours: bool) -> str:
    """A hash of the data and of the code that judgements of peers, or of our contenders, depend on."""
    digest = hashlib.sha256(key(task).encode())
    for part in (task.val, task.test, *task.shifted.values(), *task.ood.values()):
        digest.update(part.inputs.contiguous().numpy().tobytes())
    folder, package = Path(__file__).parent, Path(gpseq.__file__).parent
    names = ("contenders", "heads", "judging", "networks", "scaling", "training")
    files = [*(folder / f"{name}.py" for name in names), *package.glob("metrics/*.py")]
    if ours:
        files += [*package.glob("nn/*.py"), *package.glob("sgpa/*.py"), package / "prediction.py"]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]
