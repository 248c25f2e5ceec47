"""kill -9 at any moment, and the same command goes on with the result of an uninterrupted run, bit for bit."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kills import ForkServer, kill_at_random

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

NUM_KILLS = 20


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


def test_kills_at_random_moments(server: ForkServer, table: Path, tmp_path: Path) -> None:
    kill_at_random(server, tmp_path, NUM_KILLS, lambda at: {"argv": command(table, at, chunk=5)}, ["out.csv", "state"])


def test_a_kill_before_each_durable_step(server: ForkServer, table: Path, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    assert server.run(argv=command(table, tmp_path / "reference", chunk=30))["status"] == 0
    reference = result(tmp_path / "reference")

    step, killed = 0, True
    while killed:
        step += 1
        directory = tmp_path / str(step)
        directory.mkdir()
        argv = command(table, directory, chunk=30)
        killed = server.run(argv=argv, kill_at=step)["killed"]
        if killed:
            assert server.run(argv=argv)["status"] == 0
        assert result(directory) == reference
    # Four chunks: two or three steps for the predictions (begun, appended to), three for the state.
    assert step - 1 == (3 + 3) + 3 * (1 + 3)
