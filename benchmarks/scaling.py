"""One chunk shared by several processes: exact updates under torchrun, against one process that has it all."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpytorch
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.tables import table
from gpseq import plots
from gpseq.distributed import ProcessShards
from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP

PROCESSES = (1, 2, 4)
FEATURES, REACH = 64, 0.5
NOISE = 0.1
#: What comes: observations of a chunk, and how often it is timed.
GAUSSIAN, SITES, SMALL = "Gaussian", "Student-t", "Gaussian, small chunk"
CHUNKS = {GAUSSIAN: (400_000, 7), SITES: (40_000, 3), SMALL: (2_000, 30)}
#: Rounds of all numbers of processes, one after the other, so that drift of the machine shows in the spread.
ROUNDS = 3


def run(smoke: bool) -> dict[str, Any]:
    """Every number of processes in turn, each with one thread a process."""
    processes = PROCESSES[:2] if smoke else PROCESSES
    chunks = {kind: (n // 100, 2) for kind, (n, _) in CHUNKS.items()} if smoke else CHUNKS
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in processes}
    for _ in range(1 if smoke else ROUNDS):
        for size in processes:
            runs[size].append(_torchrun(size, chunks))
    reference = runs[processes[0]][0]["kinds"]
    found: dict[str, Any] = {}
    for kind, (number, _) in chunks.items():
        seconds = {str(size): [t for one in runs[size] for t in one["kinds"][kind]["seconds"]] for size in processes}
        apart = max(
            abs(one["kinds"][kind]["mean"] - reference[kind]["mean"]) for size in processes for one in runs[size]
        )
        found[kind] = {"observations": number, "seconds": seconds, "largest_difference": apart}
    return {"kinds": found, "features": FEATURES, "cores": os.cpu_count(), "processes": list(processes)}


def _torchrun(size: int, chunks: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """One start of so many processes; what the first of them has measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command += ["-m", "benchmarks.scaling", str(out), json.dumps(chunks)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        return json.loads(out.read_text())


def _worker(out: Path, chunks: dict[str, tuple[int, int]]) -> None:
    """A process: its part of each chunk, timed from barrier to barrier."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shards = ProcessShards()
    found: dict[str, Any] = {}
    for kind, (number, repetitions) in chunks.items():
        x, y = _data(number)
        part = torch.arange(number).tensor_split(shards.size)[shards.rank]
        x, y, seconds = x[part], y[part], []
        for _ in range(repetitions + 1):
            model = _model(kind)
            dist.barrier()
            begun = time.perf_counter()
            model.update(x, y, shards=shards)
            dist.barrier()
            seconds.append(time.perf_counter() - begun)
        with torch.no_grad():
            mean = model(torch.tensor([0.3 * REACH * FEATURES], dtype=torch.float64)).mean.item()
        found[kind] = {"seconds": seconds[1:], "mean": mean}
    if shards.rank == 0:
        out.write_text(json.dumps({"kinds": found}))
    dist.barrier()
    dist.destroy_process_group()


def _data(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = REACH * FEATURES * torch.rand(number, generator=generator, dtype=torch.float64)
    return x, x.sin() + NOISE * torch.randn(number, generator=generator, dtype=torch.float64)


def _model(kind: str) -> StreamingGP:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    likelihood: Any = gpytorch.likelihoods.GaussianLikelihood().double()
    if kind == SITES:
        likelihood = gpytorch.likelihoods.StudentTLikelihood().double()
    likelihood.noise = NOISE**2
    return StreamingGP(HippoFeatures(FEATURES, REACH * FEATURES), kernel, likelihood).eval()


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Times, efficiency on the cores that there are, and a figure."""
    cores, sizes = result["cores"], result["processes"]
    rows = []
    figure = plots.new_figure(5, 3.2)
    ax = figure.subplots()
    for (kind, found), colour in zip(result["kinds"].items(), (plots.BLUE, plots.VERMILION, plots.GREEN), strict=True):
        middle = {size: statistics.median(found["seconds"][str(size)]) for size in sizes}
        for size in sizes:
            low, _, high = statistics.quantiles(found["seconds"][str(size)], n=4)
            speed = middle[sizes[0]] / middle[size]
            times = f"{1e3 * middle[size]:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"
            gained = f"{speed:.2f}", f"{speed / min(size, cores):.0%}"
            rows.append([kind, f"{found['observations']:,}", size, times, *gained])
        ax.plot(sizes, [middle[sizes[0]] / middle[size] for size in sizes], "o-", color=colour, label=kind)
    ax.plot(sizes, [min(size, cores) for size in sizes], ":", color="0.5", label=f"ideal on {cores} cores")
    ax.set_xticks(sizes)
    ax.set_ylim(0, None)
    plots.style_axes(ax, "processes", "times as fast as one")
    ax.legend(frameon=False, fontsize=8)
    plots.save_figure(figure, figures / "scaling.png")
    worst = max(found["largest_difference"] for found in result["kinds"].values())
    return [
        "## One stream, several processes",
        f"A chunk whose parts are with 1, 2 and 4 processes (torchrun, gloo, one thread each), {result['features']} features, "
        f"{cores} cores; medians with quartiles from barrier to barrier, of three starts in turn. Efficiency is the gain in "
        f"speed for each core in use. Posterior means differ from those of one process by at most {worst:.0e}.",
        table(["likelihood", "observations", "processes", "ms", "times as fast", "efficiency"], rows),
        "![How much faster several processes are](figures/scaling.png)",
    ]


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), json.loads(sys.argv[2]))
