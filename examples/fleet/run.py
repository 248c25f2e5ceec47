"""A hundred thousand streams in files, learnt by the workers of a local cluster, who are killed once."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import gpytorch
import torch
from torch import Tensor

from gpseq import plots
from gpseq.features import HippoFeatures
from gpseq.models import FleetStore, StreamingFleet

NUM_STREAMS, SHARD_SIZE, NUM_FEATURES = 100_000, 1000, 16
#: An hour is a chunk; lengthscales are about an hour.
NUM_HOURS, READINGS = 8, 4
NOISE, MISSING = 0.1, 0.1
#: Streams whose forecasts are scored, and streams that are drawn.
SCORED, DRAWN = 500, (3, 17, 42)


def truth(streams: Tensor, t: Tensor) -> Tensor:
    """What each sensor measures, ``(k, n)``: the same kind of signal, at phases of their own."""
    at = t + 0.37 * streams.double().unsqueeze(-1)
    return (1.3 * at).sin() + 0.5 * (0.61 * at + 1).sin()


def times(hour: int) -> Tensor:
    """When they are read in an hour, ``(n,)``."""
    return hour + (torch.arange(READINGS, dtype=torch.float64) + 0.5) / READINGS


def readings(streams: Tensor, hour: int, num_streams: int) -> Tensor:
    """A feed, ``(k, n)``: the same numbers whenever it is asked for the same hour. A tenth is missing."""
    generator = torch.Generator().manual_seed(hour)
    noise = NOISE * torch.randn(num_streams, READINGS, generator=generator, dtype=torch.float64)
    noise[torch.rand(num_streams, READINGS, generator=generator) < MISSING] = torch.nan
    return truth(streams, times(hour)) + noise[streams]


def prototype(shard_size: int) -> StreamingFleet:
    """What all shards are."""
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = NOISE**2
    return StreamingFleet(shard_size, HippoFeatures(NUM_FEATURES, float(NUM_HOURS)), kernel, likelihood)


@functools.cache
def opened(folder: str, shard_size: int, rank: int, size: int) -> FleetStore:
    """A worker's part of the fleet, opened once."""
    torch.set_num_threads(1)  # workers share the cores among themselves
    return FleetStore(folder, prototype(shard_size)).part(rank, size)


def learn(folder: str, shard_size: int, rank: int, size: int, hour: int) -> None:
    """What a worker does in an hour. Done twice, it changes nothing: each shard knows the last hour that it took in."""
    store = opened(folder, shard_size, rank, size)
    streams = torch.arange(len(store))
    mine = streams[(streams // shard_size) % size == rank]
    store.update(times(hour), readings(mine, hour, len(store)), streams=mine, position=hour)


def by_one(folder: Path, num_streams: int, shard_size: int, num_hours: int) -> list[float]:
    """One process, no cluster: seconds of each hour."""
    FleetStore(folder, prototype(shard_size), num_streams)
    seconds = []
    for hour in range(num_hours):
        begun = time.perf_counter()
        learn(str(folder), shard_size, 0, 1, hour)
        seconds.append(time.perf_counter() - begun)
    return seconds


def by_cluster(
    folder: Path, num_streams: int, shard_size: int, num_hours: int, workers: int, kill_in: int | None = None
) -> list[float]:
    """The same over a local Dask cluster: a task for each worker and hour.

    Args:
        folder: of the fleet.
        num_streams: S.
        shard_size: streams of a shard.
        num_hours: how many chunks.
        workers: processes.
        kill_in: an hour in which all are killed as soon as one of them has written a file; the cluster starts others,
            and gives them the tasks again.

    Returns:
        Seconds of each hour.
    """
    from dask.distributed import Client, LocalCluster

    FleetStore(folder, prototype(shard_size), num_streams)
    seconds = []
    with (
        LocalCluster(workers, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(workers)
        for hour in range(num_hours):
            begun = time.perf_counter()
            pids = client.run(os.getpid)
            tasks = [
                client.submit(learn, str(folder), shard_size, rank, workers, hour, pure=False)
                for rank in range(workers)
            ]
            if hour == kill_in:
                while not list(folder.glob(".shard-*.part")):  # nobody has written anything
                    assert not any(task.done() for task in tasks), "too quick to be killed"
                    time.sleep(1e-4)
                for pid in pids.values():
                    os.kill(pid, signal.SIGKILL)
            client.gather(tasks)
            seconds.append(time.perf_counter() - begun)
    return seconds


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders hold the same fleet."""
    names = sorted(file.name for file in one.glob("*.safetensors"))
    return names == sorted(file.name for file in other.glob("*.safetensors")) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@torch.no_grad()
def coverage(folder: Path, shard_size: int, num_hours: int) -> float:
    """Share of new readings, just before the end, that lie in their 95 % intervals."""
    store = FleetStore(folder, prototype(shard_size))
    generator = torch.Generator().manual_seed(99)
    streams = torch.randperm(len(store), generator=generator)[:SCORED]
    at = times(num_hours - 1)[-1:] + 0.1
    found = store.predict(at, streams)
    y = truth(streams, at) + NOISE * torch.randn(len(streams), 1, generator=generator, dtype=torch.float64)
    return ((y - found.mean).abs() < 1.96 * (found.variance + NOISE**2).sqrt()).double().mean().item()


@torch.no_grad()
def draw(folder: Path, shard_size: int, num_hours: int, rates: dict[str, float], out: Path) -> None:
    """Three streams out of all, and how fast they were learnt."""
    store = FleetStore(folder, prototype(shard_size))
    figure = plots.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1.2])
    at = torch.linspace(0, num_hours, 200, dtype=torch.float64)
    colours = (plots.BLUE, plots.VERMILION, plots.GREEN)
    for number, (stream, colour) in enumerate(zip(DRAWN, colours, strict=True)):
        found, which = store.predict(at, [stream]), torch.tensor([stream])
        mean, width, shift = found.mean[0], 1.96 * found.variance[0].sqrt(), 3.5 * number
        left.fill_between(at, mean - width - shift, mean + width - shift, color=colour, alpha=0.25, linewidth=0)
        left.plot(at, mean - shift, color=colour, linewidth=1.2)
        for hour in range(num_hours):
            y = readings(which, hour, len(store))[0]
            left.plot(times(hour), y - shift, ".", color="0.3", markersize=3)
        left.text(0.0, 1.6 - shift, f"stream {stream}", fontsize=8, va="bottom")
    plots.style_axes(left, "hours", "readings, shifted")
    left.set_yticks([])
    right.bar(range(len(rates)), list(rates.values()), color=plots.BLUE, width=0.6)
    right.set_xticks(range(len(rates)), list(rates))
    plots.style_axes(right, "", "streams a second")
    plots.save_figure(figure, out / "fleet.png")


def main() -> None:
    """Learn with one process and with a cluster, kill its workers, and compare the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/fleet"), help="folder of the figure")
    parser.add_argument("--streams", type=int, default=NUM_STREAMS, help="how many")
    parser.add_argument("--shard", type=int, default=SHARD_SIZE, help="streams of a file")
    parser.add_argument("--workers", type=int, default=2, help="of the cluster")
    parser.add_argument("--keep", action="store_true", help="keep the files of the fleet, in the same folder")
    parser.add_argument("--smoke", action="store_true", help="some hundred streams")
    args = parser.parse_args()
    torch.set_num_threads(1)
    num, shard, hours = (300, 50, 3) if args.smoke else (args.streams, args.shard, NUM_HOURS)
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out / "files" if args.keep else Path(tempfile.mkdtemp(prefix="fleet-"))
    try:
        shutil.rmtree(work, ignore_errors=True)
        runs = {"one process": by_one(work / "one", num, shard, hours)}
        runs[f"{args.workers} workers"] = by_cluster(work / "cluster", num, shard, hours, args.workers)
        killed = by_cluster(work / "killed", num, shard, hours, args.workers, kill_in=hours // 2)

        print(f"{num:,} streams in {-(-num // shard)} files, {READINGS} readings each an hour, {hours} hours")
        rates = {}
        for name, seconds in runs.items():
            middle = statistics.median(seconds)
            rates[name] = num / middle
            print(f"{name:12} {middle:7.2f} s for an hour of the feed, {rates[name]:9,.0f} streams a second")
        size = sum(file.stat().st_size for file in (work / "one").iterdir())
        print(f"on disk      {size / 1e6:7.1f} MB, {size / num:,.0f} bytes a stream")
        print(f"coverage of 95 % intervals of new readings: {coverage(work / 'one', shard, hours):.1%}")
        for name in ("cluster", "killed"):
            same = same_bytes(work / "one", work / name)
            print(f"files of {name!r}: {'the same bytes as those of one process' if same else 'DIFFERENT'}")
            if not same:
                raise SystemExit(1)
        print(f"the hour in which all workers were killed took {killed[hours // 2]:.1f} s")
        draw(work / "one", shard, hours, rates, args.out)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    print(args.out / "fleet.png")


if __name__ == "__main__":
    main()
