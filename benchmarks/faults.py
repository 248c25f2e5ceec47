"""kill -9 at random moments: streams, fleets, trainings and distillations, begun again until they come to their end."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tables import table

#: Kills of each job.
KILLS = 60
JOBS = {
    "stream": "`gpseq stream`, chunks of 5 rows",
    "train": "`gpseq.training.fit`, a transformer with processes for attention, draws and dropout",
    "distil": "`Distiller.fit`, on its own rollout, with draws",
    "fleet": "`FleetStore`, 30 chunks, brought again from the first one",
}
#: What a job leaves in its folder, the checkpoint last.
FILES = {"stream": ["out.csv", "state"], "fleet": ["result", "fleet"]}


def run(smoke: bool) -> dict[str, Any]:
    """Kill each job, and compare the bytes that it ends with to those of a run that was left alone."""
    from tests.kills import ForkServer, kill_at_random

    server, found = ForkServer(), {}
    try:
        for job in JOBS:
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "rows.csv"
                made = (f"{i / 4},{'' if i % 17 == 5 else math.sin(i / 5) + math.cos(i / 3)}\n" for i in range(120))
                rows.write_text("t,y\n" + "".join(made))

                def request(at: Path, job: str = job, rows: Path = rows) -> dict[str, Any]:
                    if job != "stream":
                        return {"job": job, "directory": str(at)}
                    files = ["--state", str(at / "state"), "--out", str(at / "out.csv")]
                    options = ["--time", "t", "--target", "y", "--chunk", "5", "--warmup", "30"]
                    return {"argv": ["stream", str(rows), *options, *files]}

                where = Path(folder) / "runs"
                where.mkdir()
                begun = time.perf_counter()
                files = FILES.get(job, ["result", "checkpoint"])
                found[job] = kill_at_random(server, where, 3 if smoke else KILLS, request, files)
                found[job]["seconds"] = time.perf_counter() - begun
    finally:
        server.close()
    return {"jobs": found}


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """How often each was killed."""
    rows = [
        [JOBS[job], found["kills"], found["within"], found["runs"], f"{found['seconds']:.0f}"]
        for job, found in result["jobs"].items()
    ]
    total = sum(found["kills"] for found in result["jobs"].values())
    return [
        "## Killed, and begun again",
        f"{total} processes were killed by SIGKILL at random moments and begun again with the same command. Every run ended "
        "with the same bytes as one that was left alone: predictions and state of the stream, weights of the others. The "
        "case fails otherwise.",
        table(["job", "kills", "after the first file was written", "runs that came to their end", "seconds"], rows),
    ]
