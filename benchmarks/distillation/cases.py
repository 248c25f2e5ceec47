"""A case about distillation: teachers, students and peers on one task, over several seeds."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpseq
from benchmarks.distillation.contenders import (
    CALIBRATED,
    DRAWS,
    OURS,
    PROCESS,
    PROCESS_SEEDS,
    TEACHERS,
    drawn,
    moments,
    of_student,
    sizes,
)
from benchmarks.distillation.costs import BATCH, REPETITIONS, memory, times
from benchmarks.distillation.judging import LOOKED_AT, depth_spread, drift, judge, merged, verdicts
from benchmarks.distillation.students import RECIPES, code_hash, distilled, student_file
from benchmarks.distillation.tasks import SETTINGS, Setting
from benchmarks.uncertainty import contenders as peers
from benchmarks.uncertainty.tasks import Part, Task
from benchmarks.uncertainty.training import CACHE, key
from gpseq.storage import replace_file

#: Contenders that are judged by the goals, and the students that they are.
JUDGED = {
    OURS: "student",
    CALIBRATED: "student",
    "later blocks, 10 draws": "later blocks",
    "more text, 10 draws": "more text",
}


def run_case(name: str, smoke: bool, cache: Path = CACHE) -> dict[str, Any]:
    """Train what is not in the cache, judge everyone at every seed, and compare.

    A case that was stopped goes on: networks, students and what was measured of each are kept for as long as neither
    the code that made them nor the data change. A smoke test has one seed and keeps nothing.

    Args:
        name: of the setting.
        smoke: small parts and small networks.
        cache: a folder.
    """
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) if smoke else cache
        task = setting.make(smoke)
        seeds = [judge_seed(setting, task, seed, smoke, where) for seed in range(1 if smoke else task.seeds)]
        label = student_file(setting, task, "student", 0, where, smoke).stem
        cost = _kept(task, f"cost of {label}", 0, where, lambda: _cost(setting, name, task, smoke, where), True)
    return {
        "setting": name,
        "title": setting.title,
        "about": setting.about,
        "blocks": setting.blocks,
        "later": setting.later,
        "sizes": {
            "train": len(task.train),
            "val": len(task.val),
            "test": len(task.test),
            "ood": {part: len(value) for part, value in task.ood.items()},
        },
        "settings": {
            "teacher": {"epochs": task.epochs, "batch_size": task.batch_size, "learning_rate": task.learning_rate},
            "student": {
                "epochs": setting.epochs,
                "batch_size": setting.batch_size,
                "learning_rate": setting.learning_rate,
                "options": setting.options,
                "later": setting.later_options,
            },
        },
        "recipes": {recipe: RECIPES[recipe].about for recipe in setting.recipes},
        "seeds": seeds,
        "cost": cost,
        "verdicts": {
            ours: verdicts(seeds, ours, student)
            for ours, student in JUDGED.items()
            if any(ours in seed["contenders"] for seed in seeds)
        },
    }


def judge_seed(setting: Setting, task: Task, seed: int, smoke: bool, cache: Path) -> dict[str, Any]:
    """Everyone at one seed.

    Args:
        setting: what is distilled.
        task: of the setting.
        seed: of the teacher.
        smoke: with few students.
        cache: a folder.
    """
    made: dict[str, Any] = {"seed": seed, "contenders": {}, "sizes": {}, "drift": {}, "training": {}}
    source = peers.Source(task, seed, cache)
    made["training"]["teacher"] = source.trained().seconds_per_step
    for name, contender in TEACHERS.items():
        if smoke and name.startswith("SGPA"):  # the cases about uncertainty run them
            continue
        made["contenders"][name] = _kept(
            task, name, seed, cache, lambda contender=contender: judge(task, contender(source))
        )
    if "gp" in task.kinds and seed < PROCESS_SEEDS and not smoke:
        made["training"][PROCESS] = source.trained("gp").seconds_per_step
        made["contenders"][PROCESS] = _kept(
            task, PROCESS, seed, cache, lambda: judge(task, peers.gp(source, kind="gp"))
        )
    for name, count in (dict.fromkeys(setting.quick, 1) if smoke else setting.recipes).items():
        if seed < count:
            label = student_file(setting, task, name, seed, cache, smoke).stem
            found = _kept(
                task, label, seed, cache, lambda name=name: _student(setting, task, name, seed, smoke, cache), True
            )
            made["contenders"] |= found.pop("contenders")
            for part, value in found.items():
                made.setdefault(part, {})[name] = value
    return made


def _student(setting: Setting, task: Task, name: str, seed: int, smoke: bool, cache: Path) -> dict[str, Any]:
    """All that is measured of one student."""
    found = distilled(setting, task, name, seed, cache, smoke=smoke)
    first = setting.later if RECIPES[name].later else 0
    inputs, val = task.test.inputs[:LOOKED_AT], task.val
    if smoke:
        assert val.labels is not None
        val = Part(val.inputs[:6], val.labels[:6])
    made: dict[str, Any] = {
        "contenders": {title: judge(task, predict) for title, predict in of_student(name, found, val, seed)},
        "sizes": sizes(found, first),
        "drift": drift(found, inputs, first),
        "training": found.seconds_per_step,
    }
    if name == "student" and seed == 0 and not (smoke and setting.few < 300):
        few = _fewer(task, 10 if smoke else setting.few)
        for title, predict in (
            ("10 draws", drawn(found, DRAWS, seed, scores=False)),
            ("moments", moments(found, seed)),
        ):
            made["contenders"][f"student, {title}, {len(few.test)} inputs"] = judge(few, predict)
    if RECIPES[name].noisy:
        made["depth"] = {
            part: depth_spread(found.student, x, seed)
            for part, x in (("test", inputs), *((title, other.inputs[:LOOKED_AT]) for title, other in task.ood.items()))
        }
    if name in ("student", "random steps"):
        made["merged"] = merged(found.student, task.test, setting.blocks, name == "student", seed)
    return made


def _fewer(task: Task, count: int) -> Task:
    """The first test inputs, and the first of those outside."""
    test, outside = task.test, {name: Part(part.inputs[:count]) for name, part in task.ood.items()}
    assert test.labels is not None
    return replace(task, test=Part(test.inputs[:count], test.labels[:count]), ood=outside)


def _cost(setting: Setting, name: str, task: Task, smoke: bool, cache: Path) -> dict[str, Any]:
    found = distilled(setting, task, "student", 0, cache, smoke=smoke)
    return {
        "times": times(found, task.test.inputs[: 4 if smoke else BATCH], 1 if smoke else REPETITIONS),
        "bytes": {} if smoke and name != "fashion" else memory(name, smoke, cache),
    }


def _kept(task: Task, name: str, seed: int, cache: Path, make: Callable[[], Any], ours: bool = False) -> dict[str, Any]:
    """What was measured before, if neither code nor data have changed since."""
    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    file = cache / task.name / f"measured-{label}-{seed}-{_code(task, ours)}.json"
    if not file.exists():
        begun = time.perf_counter()
        made = make()
        replace_file(file, json.dumps(made).encode())
        print(f"{task.name}, seed {seed}: {name}, {time.perf_counter() - begun:.0f} s", flush=True)
    return json.loads(file.read_text())


def _code(task: Task, ours: bool) -> str:
    """A hash of the data, and of the code that measurements of peers, or of students, depend on."""
    digest = hashlib.sha256(key(task).encode())
    for part in (task.val, task.test, *task.ood.values()):
        digest.update(part.inputs.contiguous().numpy().tobytes())
    here, package = Path(__file__).parent, Path(gpseq.__file__).parent
    files = [here.parent / "uncertainty" / f"{name}.py" for name in ("contenders", "heads", "judging", "scaling")]
    files += package.glob("metrics/*.py")
    if ours:
        files += [here / f"{name}.py" for name in ("contenders", "judging")]
        files += package.glob("reconfiguration/*.py")
    digest.update(code_hash(files).encode())
    return digest.hexdigest()[:10]
