"""Sequence models on real data: rotated digits, air quality with holes, a field of weather in tasks, pseudo-videos."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

PARTS = ("digits", "air", "field", "pseudo_videos")


def main() -> None:
    """Run the parts that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--out", type=Path, default=Path("build/examples/generative"), help="folder of the figures")
    parser.add_argument("--smoke", action="store_true", help="small sizes: does it run?")
    args = parser.parse_args()
    unknown = set(args.part) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.part or PARTS:
        begun = time.perf_counter()
        print(f"--- {part}")
        importlib.import_module(f"examples.generative.{part}").main(args.out, args.smoke)
        print(f"--- {part}: {time.perf_counter() - begun:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
