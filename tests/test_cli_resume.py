"""kill -9 at any moment, and the same command goes on with the result of an uninterrupted run, bit for bit."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

NUM_KILLS = 50


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

    def run(self, argv: list[str], **when: Any) -> dict[str, Any]:
        """Run ``gpseq`` once and say how it ended."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"argv": argv, **when}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Let the server end."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "table.csv"
    rows = (f"{i / 4},{'' if i % 17 == 5 else math.sin(i / 5) + math.cos(i / 3)}\n" for i in range(120))
    path.write_text("t,y\n" + "".join(rows))
    return path


def command(table: Path, directory: Path, chunk: int) -> list[str]:
    """A run that keeps its files in a directory."""
    files = ["--state", str(directory / "state"), "--out", str(directory / "out.csv")]
    return ["stream", str(table), "--time", "t", "--target", "y", "--chunk", str(chunk), "--warmup", "30", *files]


def result(directory: Path) -> tuple[bytes, bytes]:
    """What a run has written."""
    return (directory / "state").read_bytes(), (directory / "out.csv").read_bytes()


def test_fifty_kills_at_random_moments(server: ForkServer, table: Path, tmp_path: Path) -> None:
    seconds = math.inf
    for name in ("again", "reference"):  # twice, because the first child pays for caches
        (tmp_path / name).mkdir()
        whole = server.run(command(table, tmp_path / name, chunk=5))
        assert whole["status"] == 0
        seconds = min(seconds, whole["seconds"])
    reference = result(tmp_path / "reference")
    assert result(tmp_path / "again") == reference

    moments = random.Random(0)
    kills = killed_within = runs = 0
    while kills < NUM_KILLS:
        runs += 1
        directory = tmp_path / str(runs)
        directory.mkdir()
        argv = command(table, directory, chunk=5)
        # Early moments more often, because a run that goes on has less to do; and all of them later with every kill, so
        # that a machine that has become slower gets there, too.
        patience = seconds
        while server.run(argv, kill_after=patience * moments.random() ** 2)["killed"]:
            patience *= 1.05
            kills += 1
            killed_within += (directory / "state").exists()
        assert result(directory) == reference
        assert sorted(p.name for p in directory.iterdir() if not p.name.endswith(".part")) == ["out.csv", "state"]
    assert killed_within >= NUM_KILLS // 4  # the others died before the first chunk was learnt


def test_a_kill_before_each_durable_step(server: ForkServer, table: Path, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    assert server.run(command(table, tmp_path / "reference", chunk=30))["status"] == 0
    reference = result(tmp_path / "reference")

    step, killed = 0, True
    while killed:
        step += 1
        directory = tmp_path / str(step)
        directory.mkdir()
        argv = command(table, directory, chunk=30)
        killed = server.run(argv, kill_at=step)["killed"]
        if killed:
            assert server.run(argv)["status"] == 0
        assert result(directory) == reference
    # Four chunks: two or three steps for the predictions (begun, appended to), three for the state.
    assert step - 1 == (3 + 3) + 3 * (1 + 3)
