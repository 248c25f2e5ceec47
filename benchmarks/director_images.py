"""A vision transformer of seven blocks distilled into one probabilistic transition, beside its teacher and other ways to calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.distillation.reporting import report_case


def run(smoke: bool) -> dict[str, Any]:
    """Train and distil, or take from the cache what was made, and judge."""
    from benchmarks.distillation.cases import run_case

    return run_case("fashion", smoke)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores, goals, parameters, drift, spread along the depth, merged steps and cost."""
    return report_case(result, figures)
