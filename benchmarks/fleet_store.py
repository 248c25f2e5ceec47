"""A hundred thousand streams in files: throughput by workers and by size of shards, memory, and a plan for more."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import table
from examples.fleet.run import NUM_FEATURES, coverage, learn, opened, prototype, readings, same_bytes, times
from gpseq import plots
from gpseq.models import FleetStore

STREAMS, SHARD, HOURS = 100_000, 1000, 5
WORKERS = (1, 2, 4)
#: Sizes of shards that are compared with one worker, on fewer streams.
SHARDS, FEWER = (100, 1000, 10_000), 20_000
#: Streams with news in a chunk, where few have any; spread over all shards, or all in one.
FEW = 100
#: What the plan is for: streams, and the times within which each has news once, in seconds.
PLANNED, PERIODS = 10**8, {"each hour": 3600.0, "each minute": 60.0}


def run(smoke: bool) -> dict[str, Any]:
    """Workers, shards, and what an update consists of."""
    streams, shard, hours = (200, 50, 2) if smoke else (STREAMS, SHARD, HOURS)
    workers = WORKERS[:2] if smoke else WORKERS
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    try:
        by_workers = {str(size): _by_workers(folder / str(size), streams, shard, hours, size) for size in workers}
        same = all(same_bytes(folder / str(workers[0]), folder / str(size)) for size in workers)
        covered = coverage(folder / str(workers[0]), shard, hours)
        disk = sum(file.stat().st_size for file in (folder / str(workers[0])).iterdir())
        few = _few(folder / str(workers[0]), shard, streams, hours)
        fewer, sizes = (200, (50, 100)) if smoke else (FEWER, SHARDS)
        by_shard = {str(size): _by_workers(folder / f"shard-{size}", fewer, size, hours, 1) for size in sizes}
    finally:
        shutil.rmtree(folder)
    return {
        "streams": streams,
        "shard": shard,
        "hours": hours,
        "features": NUM_FEATURES,
        "cores": os.cpu_count(),
        "workers": by_workers,
        "same_bytes": same,
        "coverage": covered,
        "bytes": disk,
        "few": few,
        "fewer": fewer,
        "shards": by_shard,
    }


def _by_workers(folder: Path, streams: int, shard: int, hours: int, size: int) -> dict[str, Any]:
    """Seconds of each chunk, and of the processor, of so many processes with one thread each."""
    FleetStore(folder, prototype(shard), streams)
    seconds, busy, memory = [], [], []
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
        for hour in range(-1, hours):  # the first time opens the store, imports and all
            begun = time.perf_counter()
            tasks = [pool.submit(_hour, str(folder), shard, rank, size, hour) for rank in range(size)]
            found = [task.result() for task in tasks]
            if hour >= 0:
                seconds.append(time.perf_counter() - begun)
                busy.append(sum(cpu for cpu, _ in found))
            memory.append(max(mb for _, mb in found))
    return {"seconds": seconds, "cpu": busy, "mb": memory}


def _hour(folder: str, shard: int, rank: int, size: int, hour: int) -> tuple[float, float]:
    """What a worker does: processor time, and the most memory that it ever had, in MB."""
    begun = time.process_time()
    if hour < 0:
        opened(folder, shard, rank, size)
        time.sleep(0.5)  # so that the next worker takes the next rank
    else:
        learn(folder, shard, rank, size, hour)
    return time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _few(folder: Path, shard: int, streams: int, hour: int) -> dict[str, list[float]]:
    """Seconds of an update of few streams, in as many shards as possible or in one."""
    store, few = FleetStore(folder, prototype(shard)), min(FEW, shard)
    spread = torch.arange(0, streams, max(streams // few, 1))[:few]
    found: dict[str, list[float]] = {"spread": [], "together": []}
    for turn in range(4):
        for name, which in (("spread", spread), ("together", torch.arange(few))):
            y = readings(which, hour + turn, streams)
            begun = time.perf_counter()
            store.update(times(hour - 1), y, streams=which)
            found[name].append(time.perf_counter() - begun)
    return found


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Tables, a figure, and the plan from the measured constants."""
    streams, cores = result["streams"], result["cores"]
    one = statistics.median(result["workers"]["1"]["seconds"])
    rows = []
    for size, found in result["workers"].items():
        middle, cpu = statistics.median(found["seconds"]), statistics.median(found["cpu"])
        low, high = min(found["seconds"]), max(found["seconds"])
        times_as_fast = f"{one / middle:.2f}", f"{one / middle / min(int(size), cores):.0%}"
        costs = f"{1e6 * cpu / streams:.1f}", f"{max(found['mb']):.0f}"
        span = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append([size, span, f"{streams / middle:,.0f}", *times_as_fast, *costs])
    by_shard = []
    for size, found in result["shards"].items():
        middle = statistics.median(found["seconds"])
        by_shard.append([f"{int(size):,}", f"{result['fewer'] / middle:,.0f}", f"{max(found['mb']):.0f}"])
    figure = plots.new_figure(4.5, 3.0)
    ax = figure.subplots()
    rates = [streams / statistics.median(found["seconds"]) for found in result["workers"].values()]
    ax.bar(range(len(rates)), rates, 0.6, color=plots.BLUE)
    ax.set_xticks(range(len(rates)), list(result["workers"]))
    plots.style_axes(ax, "workers", "streams a second")
    plots.save_figure(figure, figures / "fleet_store.png")
    few = {name: statistics.median(seconds) for name, seconds in result["few"].items()}
    same = "Files are the same bytes for all." if result["same_bytes"] else "**Files differ between them.**"
    return [
        "## A fleet in files",
        f"`FleetStore`: {streams:,} streams of {result['features']} features in shards of {result['shard']:,}, four readings "
        f"each in a chunk, a tenth of them missing; {result['hours']} chunks of all streams, written to the disk before the "
        f"next. One thread a worker, {cores} cores; medians with the range. {same} Coverage of 95 % intervals of new "
        f"readings: {result['coverage']:.1%}. On the disk {result['bytes'] / 1e6:.0f} MB.",
        table(
            [
                "workers",
                "s a chunk",
                "streams a second",
                "times as fast",
                "efficiency",
                "CPU µs a stream",
                "MB a worker",
            ],
            rows,
        ),
        "![Throughput by workers](figures/fleet_store.png)",
        f"One worker, {result['fewer']:,} streams, by the size of shards:",
        table(["streams a shard", "streams a second", "MB a worker"], by_shard),
        f"News of {min(FEW, result['shard'])} streams alone: {1e3 * few['together']:.0f} ms in one shard, "
        f"{1e3 * few['spread']:.0f} ms spread over all, because the file of each shard with news is written anew. Put "
        "streams that report together into the same shard.",
        *_plan(result),
    ]


def _plan(result: dict[str, Any]) -> list[str]:
    """How many machines so many streams would take; arithmetic, not a measurement."""
    streams = result["streams"]
    size = result["bytes"] / streams
    cpu = statistics.median(result["workers"]["1"]["cpu"]) / streams
    wall = statistics.median(result["workers"]["1"]["seconds"]) / streams
    rows = [["files", *[f"{PLANNED * size / 1e9:,.0f} GB in {PLANNED // result['shard']:,} shards"] * len(PERIODS)]]
    workers = {name: math.ceil(PLANNED * wall / seconds) for name, seconds in PERIODS.items()}
    rows.append(["workers that keep up, no reserve", *workers.values()])
    rows.append(["with half of their time idle", *(2 * number for number in workers.values())])
    written = {name: PLANNED * size / seconds / 1e6 for name, seconds in PERIODS.items()}
    rows.append(["written [MB/s]", *(f"{rate:,.0f}" for rate in written.values())])
    rows.append(["by each of these workers [MB/s]", *(f"{written[name] / workers[name] / 2:,.0f}" for name in PERIODS)])
    return [
        f"**{PLANNED:,} streams, on paper.** With the constants of this run, of one worker ({size:,.0f} bytes on the disk, "
        f"{1e6 * cpu:.0f} µs of a processor and {1e6 * wall:.0f} µs of time for a stream and chunk, "
        f"{1e3 * wall * result['shard']:.0f} ms for a shard, {max(result['workers']['1']['mb']):.0f} MB of memory whatever the "
        "number of streams), if every stream has news once",
        table(["", *PERIODS], rows),
        "Nothing is exchanged between workers, so the plan is linear by construction. It leaves out the feed, which has to "
        "bring each worker its streams, and a shared file system, which was not measured; disks of the workers' own need "
        "copies elsewhere against their loss.",
    ]
