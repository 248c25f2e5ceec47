"""Train networks of the uncertainty benchmarks in advance; those that are there are left alone.

python -m benchmarks.uncertainty.train TASK KIND SEED [SEED ...] [--smoke]
"""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

from benchmarks.uncertainty.tasks import Task
from benchmarks.uncertainty.training import CACHE, KINDS, trained

#: Where the tasks are made, imported when one is asked for.
TASKS = {"fashion": "images", "intents": "texts", "agreement": "texts", "sentiment": "sentiment"}


def make_task(name: str, smoke: bool = False) -> Task:
    """The task of a name."""
    return getattr(importlib.import_module(f"benchmarks.uncertainty.{TASKS[name]}"), name)(smoke)


def main() -> None:
    """One network after the other, so that two processes fill two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seed", nargs="+", type=int)
    parser.add_argument("--smoke", action="store_true", help="small parts, one epoch")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    task = make_task(args.task, args.smoke)
    for seed in args.seed:
        result = trained(task, args.kind, seed, args.cache)
        last = result.history["epochs"][-1]
        print(
            f"{task.name} {args.kind} {seed}: loss {last['loss']:.4f}, {1000 * result.seconds_per_step:.1f} ms a step",
            flush=True,
        )


if __name__ == "__main__":
    main()
