"""Judge contenders of the uncertainty benchmarks in advance, seed by seed; what is there is left alone.

python -m benchmarks.uncertainty.judge TASK SEED [SEED ...] [--only CONTENDER ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.uncertainty.cases import fitting, judge_seed
from benchmarks.uncertainty.contenders import CONTENDERS
from benchmarks.uncertainty.train import TASKS, make_task
from benchmarks.uncertainty.training import CACHE


def main() -> None:
    """Print what is measured on the test part, on average under shift, and of the scores out of distribution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("seed", nargs="+", type=int)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=tuple(CONTENDERS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    task = make_task(args.task)
    for seed in args.seed:
        for name, judged in judge_seed(task, seed, args.cache, fitting(task, tuple(args.only)))["contenders"].items():
            shift = judged["shifted_mean"]
            cells = [f"{key} {100 * judged['test'][key]:.1f}" for key in ("accuracy", "nll", "ece", "aurc")]
            cells += [f"shifted {key} {100 * shift[key]:.1f}" for key in ("accuracy", "ece") if shift]
            for part, scores in judged["ood"].items():
                cells += [f"{part} {score} {100 * found['auroc']:.1f}" for score, found in scores.items()]
            print(f"{seed} {name}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
