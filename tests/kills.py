"""Killing a job at random moments, again and again, until it has come to its end."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ForkServer:
    """Talks to ``fork_server.py``."""

    def __init__(self) -> None:
        root = Path(__file__).parent.parent
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def run(self, **request: Any) -> dict[str, Any]:
        """Run a job once and say how it ended."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Let the server end."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def kill_at_random(
    server: ForkServer,
    folder: Path,
    kills: int,
    request: Callable[[Path], dict[str, Any]],
    files: list[str],
    seed: int = 0,
) -> dict[str, int]:
    """Kill a job that many times, begin it again each time, and compare what it ends with, byte for byte.

    Args:
        server: that runs it.
        folder: an empty one.
        kills: how many at least.
        request: of the job in a folder.
        files: that it leaves there; the last one is its checkpoint, which is not compared unless it is the only one.
        seed: of the moments.

    Returns:
        How many kills there were, and how many of them after the first checkpoint was written.
    """
    seconds, reference = math.inf, []
    for name in ("again", "reference"):  # twice, because the first child pays for caches
        (folder / name).mkdir()
        whole = server.run(**request(folder / name))
        assert whole["status"] == 0, whole
        seconds = min(seconds, whole["seconds"])
        reference.append(_result(folder / name, files))
    assert reference[0] == reference[1], "two runs that were left alone differ"

    moments, found = random.Random(seed), {"kills": 0, "within": 0, "runs": 0}
    while found["kills"] < kills:
        found["runs"] += 1
        directory = folder / str(found["runs"])
        directory.mkdir()
        # Early moments more often, because a run that goes on has less to do; and all of them later with every kill, so
        # that a machine that has become slower gets there, too.
        patience = seconds
        while (answer := server.run(kill_after=patience * moments.random() ** 2, **request(directory)))["killed"]:
            patience *= 1.05
            found["kills"] += 1
            found["within"] += (directory / files[-1]).exists()
        assert answer["status"] == 0, answer
        assert _result(directory, files) == reference[0], "a run that was killed ends otherwise"
        assert sorted(p.name for p in directory.iterdir() if not p.name.endswith(".part")) == sorted(files)
    assert found["within"] >= kills // 4, "most were killed before anything was learnt"
    return found


def _result(directory: Path, files: list[str]) -> list[bytes]:
    # A checkpoint knows how long epochs took, so of those with a result of their own the result counts; and of a
    # folder, which is a checkpoint, too.
    return [(directory / name).read_bytes() for name in files if name not in ("checkpoint", "fleet")]
