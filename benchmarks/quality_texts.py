"""How good are predictions from one weight posterior? A small GPT-2 on intents."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.onepass.reporting import report_settings


def run(smoke: bool) -> dict[str, Any]:
    """Train, or take from the cache what was trained, and judge."""
    from benchmarks.onepass.judging import run_settings

    if smoke and importlib.util.find_spec("transformers") is None:
        return {"skipped": "transformers is not installed"}
    return run_settings(("gpt2",), smoke)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores of all contenders, and verdicts."""
    return report_settings(result, "## Predictions from one weight posterior: a small GPT-2")
