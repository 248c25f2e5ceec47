"""What a prediction costs beside one of the teacher: time and memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpseq
from benchmarks.distillation.contenders import DRAWS
from benchmarks.distillation.students import Distilled, distilled
from benchmarks.distillation.tasks import SETTINGS

#: Inputs of a prediction, and how often each is timed.
BATCH, REPETITIONS = 32, 5
#: Ways whose memory is measured.
WEIGHED = ("teacher", "student, noise-free", "student, 1 draw", "student, 10 draws", "student, moments")


def ways(found: Distilled, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Every way to a prediction, by its name.

    Args:
        found: a student and its teacher.
        x: inputs.
    """
    return {
        "teacher": lambda: found.teacher(x),
        "teacher, 10 passes": lambda: [found.teacher(x) for _ in range(DRAWS)],
        "student, noise-free": lambda: found.student(x),
        "student, 1 draw": lambda: gpseq.predict(found.student, x, num_samples=1),
        "student, 10 draws": lambda: gpseq.predict(found.student, x, num_samples=DRAWS),
        "student, moments": lambda: gpseq.predict(found.student, x, method="moments"),
    }


@torch.no_grad()
def times(found: Distilled, x: Tensor, repetitions: int = REPETITIONS) -> dict[str, dict[str, float]]:
    """Process time of each way, in turns: medians of the seconds, and of the ratio to the teacher in the same turn.

    Args:
        found: a student and its teacher.
        x: inputs.
        repetitions: turns.
    """
    seconds: dict[str, list[float]] = {}
    for turn in range(-1, repetitions):  # the first is for warmth
        for name, way in ways(found, x).items():
            if repetitions == 1 and name == "student, moments":
                continue  # a smoke test has no time for it
            begun = time.process_time()
            way()
            if turn >= 0:
                seconds.setdefault(name, []).append(time.process_time() - begun)
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, seconds["teacher"], strict=True)),
        }
        for name, values in seconds.items()
    }


def memory(setting: str, smoke: bool, cache: Path) -> dict[str, int]:
    """Peak memory of each way beyond that of the networks and the inputs, each in a process of its own.

    Args:
        setting: its name.
        smoke: with the small network, and of the teacher alone.
        cache: where the student and its teacher are.
    """
    # What was freed goes back to the system at once (glibc), so that memory which is used again counts again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for name in WEIGHED[: 1 if smoke else None]:
        code = f"from benchmarks.distillation.costs import peak; peak({setting!r}, {name!r}, {smoke}, {str(cache)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        found[name] = int(json.loads(done.stdout.splitlines()[-1]))
    return found


@torch.no_grad()
def peak(setting: str, name: str, smoke: bool, cache: str) -> None:
    """Print the bytes that a way needs at most; run in a process of its own.

    Args:
        setting: its name.
        name: of the way.
        smoke: with the small network.
        cache: a folder.
    """
    torch.set_num_threads(1)
    task = SETTINGS[setting].make(smoke)
    found = distilled(SETTINGS[setting], task, "student", 0, Path(cache), smoke=smoke)
    x = task.test.inputs[:BATCH]
    ways(found, x[:2])[name]()  # what is loaded at the first call is no part of it
    way = ways(found, x)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of this process starts anew (Linux)
    before = _high_water()
    way()
    print(_high_water() - before)


def _high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
