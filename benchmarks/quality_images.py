"""How good are predictions from one weight posterior? Perceptrons on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.onepass.reporting import report_settings


def run(smoke: bool) -> dict[str, Any]:
    """Train, or take from the cache what was trained, and judge."""
    from benchmarks.onepass.judging import run_settings

    return run_settings(("mnist",) if smoke else ("mnist", "fashion_mnist"), smoke)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores of all contenders, and verdicts."""
    return report_settings(result, "## Predictions from one weight posterior: perceptrons on images")
