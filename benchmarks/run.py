"""Run the benchmarks: one process a case, one JSON file a case.

python -m benchmarks.run [CASE ...] [--smoke] [--out DIR]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CASES = ("solar", "throughput", "conditioning", "covariance", "stretching", "series")
CASES += ("counts", "moons", "memories", "adaptive", "paths", "learning")
CASES += ("experiments_series", "experiments_tables", "experiments_counts", "experiments_moons")
CASES += ("space_time", "fleet", "digits", "fantasies", "drift", "attention")
CASES += ("fashion", "intents", "agreement", "sentiment")
CASES += ("moments", "minilm")
CASES += ("quality_images", "quality_texts", "quality_vit", "quality_minilm")
CASES += ("director_images", "director_texts", "director_minilm")
CASES += ("generative_digits", "generative_air", "generative_field", "pseudo_videos")
CASES += ("scaling", "fleet_store", "compiling", "importing", "faults", "soak")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Start a process for each case, so that one case's memory and threads do not disturb the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--smoke", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--out", type=Path, help="where the JSON goes (benchmarks/results, or build/ with --smoke)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.case) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    out = args.out or (Path("build/benchmarks") if args.smoke else RESULTS)
    cases = args.case or CASES
    if args.here:
        for case in cases:
            measure(case, args.smoke, out)
        return 0
    # One at a time, so that no case disturbs another's times; a smoke test takes all cores, with a thread for each.
    workers = (os.cpu_count() or 1) if args.smoke else 1
    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(lambda case: start(case, args.smoke, out), cases))
    return int(any(codes))


def start(case: str, smoke: bool, out: Path) -> int:
    """Run one case in a process of its own; its exit status."""
    command = [sys.executable, "-m", "benchmarks.run", case, "--here", "--out", str(out)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if smoke else {})
    begun = time.perf_counter()
    code = subprocess.call(command + ["--smoke"] * smoke, env=environment)
    print(f"{case}: {'failed' if code else 'done'} in {time.perf_counter() - begun:.0f} s", flush=True)
    return code


def measure(case: str, smoke: bool, out: Path) -> None:
    """Run one case in this process and write its JSON."""
    import torch

    begun = time.perf_counter()
    result = importlib.import_module(f"benchmarks.{case}").run(smoke)
    document = {
        "case": case,
        "smoke": smoke,
        "seconds": time.perf_counter() - begun,
        "machine": {
            "device": "cpu",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gpytorch": importlib.import_module("gpytorch").__version__,
        },
        "result": result,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{case}.json").write_text(json.dumps(document, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
