"""Students of the benchmark: how each is distilled, with a cache of those that are finished."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpseq
from benchmarks.distillation.tasks import Setting
from benchmarks.uncertainty.tasks import Part, Task
from benchmarks.uncertainty.training import Batches, key, trained
from gpseq.datasets.text import PADDING
from gpseq.reconfiguration import Distiller, drawing
from gpseq.storage import replace_file

#: Modules of the package that change what is learnt; the others only read what was learnt.
LEARNING = (
    "batches",
    "blocks",
    "calls",
    "defaults",
    "distiller",
    "kernel",
    "masks",
    "objectives",
    "options",
    "path",
    "rollout",
    "spread",
    "stack",
    "student",
    "tasks",
)


@dataclass(frozen=True)
class Recipe:
    """A way to distil.

    Attributes:
        about: in a few words, for the report.
        options: of the distiller, beside the defaults and what the setting says.
        labels: whether it is given the labels.
        noisy: whether it draws, in training and afterwards; the others have their noise-free path alone.
        later: whether the first blocks of the teacher are kept.
        more: whether it is given further inputs without labels, in one pass.
    """

    about: str
    options: dict[str, Any] = field(default_factory=dict)
    labels: bool = True
    noisy: bool = True
    later: bool = False
    more: bool = False


RECIPES: dict[str, Recipe] = {
    "student": Recipe("the shipped defaults: KL of the path on its own rollout, and cross-entropy"),
    "plain distillation": Recipe(
        "the same student without spread: squared errors on its own rollout, and cross-entropy",
        {"path_loss": "mse"},
        noisy=False,
    ),
    "no labels": Recipe("KL of the path and of the teacher's probabilities", labels=False),
    "forced": Recipe(
        "KL of the path one step at a time, from the teacher's states, and cross-entropy", {"forcing": "teacher"}
    ),
    "forced, no labels": Recipe(
        "squared errors one step at a time, from the teacher's states, and nothing else",
        {"forcing": "teacher", "path_loss": "mse", "task_loss": None},
        labels=False,
        noisy=False,
    ),
    "rollout, no labels": Recipe(
        "squared errors on its own rollout, and nothing else",
        {"path_loss": "mse", "task_loss": None},
        labels=False,
        noisy=False,
    ),
    "published": Recipe('`preset="director"`: the losses and weights of the published code', {"preset": "director"}),
    "random steps": Recipe('`steps="random"`: trained on steps of random length', {"steps": "random"}),
    "later blocks": Recipe("the shipped defaults behind the first blocks of the teacher", later=True),
    "more text": Recipe(
        "without labels, KL of the path and of the teacher's probabilities, in one pass over the training part, eight "
        "times, and 16,000 sentences about other things",
        labels=False,
        more=True,
    ),
}


@dataclass(frozen=True)
class Distilled:
    """A finished student.

    Attributes:
        student: in eval mode.
        teacher: whose student it is.
        seconds_per_step: process time of a training step.
        history: what :func:`gpseq.training.fit` recorded, as a dict.
    """

    student: nn.Module
    teacher: nn.Module
    seconds_per_step: float
    history: dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """The inputs of batches, without their labels.

    Attributes:
        batches: with labels.
    """

    batches: Batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return ((x,) for x, _ in self.batches)

    @property
    def generator(self) -> torch.Generator:
        """Of the order."""
        return self.batches.generator


def distilled(
    setting: Setting, task: Task, name: str, seed: int, cache: Path, smoke: bool = False, progress: bool | None = None
) -> Distilled:
    """A student of the teacher of a seed, from the cache if it was finished before.

    A run that was stopped goes on from its last whole epoch. Finished students lie beside their teachers under the
    name, the seed and a hash of the code that trains, of all settings and of the training part.

    Args:
        setting: with the options that all students share.
        task: of the setting.
        name: of the recipe.
        seed: of the teacher, of the student at the start, the order of the data and the draws.
        cache: a folder.
        smoke: one epoch.
        progress: as in :func:`gpseq.training.fit`.
    """
    recipe, teacher = RECIPES[name], trained(task, "softmax", seed, cache).network
    teacher.requires_grad_(False)
    file = student_file(setting, task, name, seed, cache, smoke)
    checkpoint, epochs = file.with_suffix(".run"), 1 if smoke else setting.epochs
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        distiller = Distiller(teacher, **_options(setting, name))
        if file.exists():
            found = torch.load(file, weights_only=True)
            distiller.student.load_state_dict(found["state"])
            return Distilled(distiller.student.eval(), teacher, found["seconds_per_step"], json.loads(found["history"]))
        part = _with_more(setting, task, smoke) if recipe.more else task.train
        epochs = 1 if recipe.more else epochs
        batches: Any = Batches(part, setting.batch_size, torch.Generator().manual_seed(seed))
        begun = time.process_time()
        with nullcontext() if recipe.noisy else drawing(distiller.student, draws=False):
            history = distiller.fit(
                batches if recipe.labels else Inputs(batches),
                epochs,
                learning_rate=setting.learning_rate,
                checkpoint=checkpoint,
                progress=progress,
            )
        seconds = (time.process_time() - begun) / (epochs * len(batches))
    finally:
        torch.random.set_rng_state(state)
    content = {
        "state": distiller.student.state_dict(),
        "seconds_per_step": seconds,
        "history": json.dumps(history.as_dict()),
    }
    data = io.BytesIO()
    torch.save(content, data)
    replace_file(file, data.getvalue())
    checkpoint.unlink(missing_ok=True)
    return Distilled(distiller.student.eval(), teacher, seconds, history.as_dict())


def _with_more(setting: Setting, task: Task, smoke: bool) -> Part:
    """The training part, several times, and further inputs; the labels are those of nothing."""
    assert setting.more is not None
    own = task.train.inputs
    width = max(own.shape[1], (further := setting.more(smoke)).shape[1])
    rows = [nn.functional.pad(x, (0, width - x.shape[1]), value=PADDING) for x in [own] * setting.again + [further]]
    inputs = torch.cat(rows)
    return Part(inputs, torch.zeros(len(inputs), dtype=torch.long))


def student_file(setting: Setting, task: Task, name: str, seed: int, cache: Path, smoke: bool = False) -> Path:
    """Where a student is kept; its name changes with all that the student depends on.

    Args:
        setting: with the options that all students share.
        task: of the setting.
        name: of the recipe.
        seed: of the teacher.
        cache: a folder.
        smoke: one epoch.
    """
    package = Path(gpseq.__file__).parent / "reconfiguration"
    epochs = 1 if smoke else setting.epochs
    settings: list[Any] = [epochs, setting.batch_size, setting.learning_rate, RECIPES[name].labels]
    settings.append(_options(setting, name))
    if RECIPES[name].more:
        settings.append(setting.again)
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
    digest.update(key(task, "softmax", trained(task, "softmax", seed, cache).network).encode())
    digest.update(code_hash(package / f"{module}.py" for module in LEARNING).encode())
    return cache / task.name / f"{name.replace(', ', ' ').replace(' ', '-')}-{seed}-{digest.hexdigest()[:10]}.pt"


def _options(setting: Setting, name: str) -> dict[str, Any]:
    recipe = RECIPES[name]
    later = {"first_block": setting.later, **setting.later_options} if recipe.later else {}
    return {**setting.options, **recipe.options, **later}


def code_hash(files: Iterable[Path]) -> str:
    """A hash of what some modules do: of their code without comments and docstrings. Missing ones are left out.

    Args:
        files: the modules.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        if not file.exists():
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    node.body = node.body[1:]
        digest.update(f"{file.stem} {ast.dump(tree)}".encode())
    return digest.hexdigest()
