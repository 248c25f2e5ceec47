"""The table of results that README and guide show, from the JSON of the cases."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import table

#: Rows: contender, and how the table calls it.
ROWS = {
    "MLE": "as it is",
    "MLE + temperature": "temperature scaling",
    "MC dropout": "MC dropout, 10 passes",
    "SNGP": "SNGP",
    "last-layer Laplace": "last-layer Laplace",
    "ensemble of 5": "ensemble of 5",
    "class distance": "class distance, two scalars (control)",
    "GP": "**`fit_covariance`, one pass**",
    "GP, sampled": "`fit_covariance`, 10 draws",
    "GP from scratch": "`CovarianceRefit` in training, one pass",
    "GP from scratch, no dropout": "the same, noise in the place of dropout",
    "no attention": "without attention (control)",
}
TITLES = {
    "fashion": "Fashion-MNIST, small ViT",
    "agreement": "BLiMP agreement, small text transformer",
    "intents": "CLINC150, small text transformer",
    "sentiment": "UCI sentiment, MiniLM",
}


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One table a task: means over seeds, in hundredths; costs relative to the plain network's.

    Args:
        results: of each case, what its ``run`` returned.
    """
    return "\n\n".join(_one(name, result) for name, result in results.items())


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between two comments of a page.

    Args:
        page: a Markdown file with ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
        name: of the comments.
        text: what is to stand there.

    Raises:
        ValueError: the page has no such comments.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = page.read_text()
    if begin not in content or end not in content:
        raise ValueError(f"{page}: expected the comments {begin} and {end}")
    page.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", content, flags=re.DOTALL))


def _one(name: str, result: Mapping[str, Any]) -> str:
    seeds: Sequence[Any] = result["seeds"]
    parts = list(seeds[0]["contenders"]["MLE"]["ood"])
    header = [
        f"{TITLES[name]} ({len(seeds)} seeds)",
        "accuracy",
        "NLL",
        "ECE",
        "shifted: accuracy",
        "ECE",
        f"OOD AUROC, {parts[0]}",
        "training",
        "prediction",
    ]
    rows = []
    for contender, title in ROWS.items():
        if contender not in seeds[0]["contenders"]:
            continue

        def mean(value: Callable[[Any], float], contender: str = contender) -> str:
            return f"{statistics.fmean(100 * value(seed['contenders'][contender]) for seed in seeds):.1f}"

        def median(key: str, contender: str = contender) -> str:
            ratios = [seed["contenders"][contender][key] / seed["contenders"]["MLE"][key] for seed in seeds]
            return f"{statistics.median(ratios):.1f}"

        rows.append(
            [
                title,
                *(mean(lambda c, k=key: c["test"][k]) for key in ("accuracy", "nll", "ece")),  # type: ignore[misc]
                *(mean(lambda c, k=key: c["shifted_mean"][k]) for key in ("accuracy", "ece")),  # type: ignore[misc]
                mean(lambda c: c["ood"][parts[0]]["entropy"]["auroc"]),
                median("training_step"),
                median("seconds_per_item"),
            ]
        )
    return table(header, rows)
