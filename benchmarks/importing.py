"""How long it takes to import the package, beside GPyTorch, on which it stands."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import table
from benchmarks.timing import in_turn

TURNS = 9
WAYS = {
    "`import gpytorch`": "import gpytorch",
    "`import gpseq`": "import gpseq",
    "the same, and every room of it": "import gpseq; [getattr(gpseq, name) for name in gpseq.__all__]",
}


def run(smoke: bool) -> dict[str, Any]:
    """A new interpreter for each."""
    ways = {name: partial(_python, code) for name, code in WAYS.items()}
    ways = {"an empty interpreter": partial(_python, "pass"), **ways}
    in_turn(ways, 1)  # files come into the cache
    return {"seconds": in_turn(ways, 1 if smoke else TURNS)}


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Medians, and what the package adds to GPyTorch."""
    seconds = result["seconds"]
    gpytorch = "`import gpytorch`"
    rows = []
    for name, found in seconds.items():
        ratios = [one / other for one, other in zip(found, seconds[gpytorch], strict=True)]
        rows.append([name, f"{statistics.median(found):.2f}", f"{statistics.median(ratios):.2f}"])
    return [
        "## Importing",
        f"A new interpreter each, {len(seconds[gpytorch])} turns, medians. Rooms are imported when they are asked for, "
        "integrations when they are used.",
        table(["", "s", "times `import gpytorch`"], rows),
    ]
