"""Models of images beside models of pseudo-videos whose last frame is the image, with all controls, three seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pseudo_video.reporting import report_all
from benchmarks.pseudo_video.run import CACHE, experiment
from benchmarks.pseudo_video.settings import SIZES


def run(smoke: bool) -> dict[str, Any]:
    """The size for one core; a smoke test has tiny networks, one seed and one data set, and keeps nothing."""
    name = "smoke" if smoke else "small"
    sets = ("mnist",) if smoke else ("mnist", "fashion_mnist")
    *_, result = experiment(SIZES[name], 1 if smoke else 3, sets, folder=None if smoke else CACHE)
    return {"size": name, **result}


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """Information, a table a family and data set, pictures, and the outcome."""
    return report_all(result, figures)
