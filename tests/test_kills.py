"""kill -9 of trainings, distillations and fleets: what is begun again ends as if nothing had happened."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kills import ForkServer, kill_at_random

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.mark.parametrize("job", ["train", "distil", "fleet"])
def test_kills_at_random_moments(server: ForkServer, tmp_path: Path, job: str) -> None:
    files = ["result", "fleet" if job == "fleet" else "checkpoint"]
    found = kill_at_random(server, tmp_path, 10, lambda at: {"job": job, "directory": str(at)}, files)
    assert found["kills"] >= 10
