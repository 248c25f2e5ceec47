"""BLiMP: every contender of the uncertainty benchmarks, five seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.uncertainty.cases import run_case
from benchmarks.uncertainty.reporting import report_case


def run(smoke: bool) -> dict[str, Any]:
    """Train, or take from the cache what was trained, and judge."""
    from benchmarks.uncertainty.texts import agreement

    return run_case(agreement, smoke)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores, detection, cost and goals."""
    return report_case(result, figures, ["## BLiMP: agreement in constructions that were not learnt"])
