"""Tables and figures of a case, from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import table
from gpseq import plots
from gpseq.plots import style

#: Contenders that the figures show.
SHOWN = {
    "MLE": (style.GREY, "--"),
    "MLE + temperature": (style.ORANGE, "--"),
    "MC dropout": (style.PINK, "-"),
    "ensemble of 5": (style.GREEN, "-"),
    "class distance": (style.VERMILION, ":"),
    "GP": (style.BLUE, "-"),
}
#: Columns of the first table: heading, key, in hundredths.
SCORES = (
    ("accuracy", "accuracy"),
    ("NLL", "nll"),
    ("Brier", "brier"),
    ("ECE, top label", "ece"),
    ("ECE, mean over classes", "class_ece"),
    ("AURC", "aurc"),
)


def report_case(result: Mapping[str, Any], figures: Path, introduction: Sequence[str] = ()) -> list[str]:
    """All parts of a case: scores, scores under shift, OOD detection, cost, goals, figures."""
    seeds, name = result["seeds"], result["task"]
    parts = [*introduction, _about(result), _labelled(seeds)]
    shift = _shifted(seeds)
    if shift is not None:
        parts += [shift]
    parts += [_detection(seeds, part) for part in seeds[0]["contenders"]["MLE"]["ood"]]
    parts += [_cost(seeds), *_goals(result)]
    parts += [_reliability(seeds[0], figures / f"{name}_reliability.png", name)]
    if _severities(seeds):
        parts += [_severity(seeds, figures / f"{name}_shift.png", name)]
    return parts


def _about(result: Mapping[str, Any]) -> str:
    sizes, settings = result["sizes"], result["settings"]
    return (
        f"{sizes['train']} training, {sizes['val']} validation and {sizes['test']} test inputs in {result['classes']} "
        f"classes; {settings['epochs']} epochs with batches of {settings['batch_size']}, AdamW up to "
        f"{settings['learning_rate']:g}, the same for all. Mean ± standard deviation over {len(result['seeds'])} seeds, "
        "in hundredths. The ensembles of two seeds share members (each takes five of "
        f"{len(result['seeds']) + 2} networks), so they differ less than independent ones would."
    )


def _labelled(seeds: Sequence[Mapping[str, Any]]) -> str:
    names = seeds[0]["contenders"]
    rows = [
        [name, *(_spread(seeds, lambda c, k=key: c["test"][k], name) for _, key in SCORES)]  # type: ignore[misc]
        for name in names
    ]
    return table(["test part", *(heading for heading, _ in SCORES)], rows)


def _shifted(seeds: Sequence[Mapping[str, Any]]) -> str | None:
    names = seeds[0]["contenders"]
    if not seeds[0]["contenders"]["MLE"]["shifted_mean"]:
        return None
    rows = [
        [name, *(_spread(seeds, lambda c, k=key: c["shifted_mean"][k], name) for _, key in SCORES)]  # type: ignore[misc]
        for name in names
    ]
    return table(["mean over shifted parts", *(heading for heading, _ in SCORES)], rows)


def _detection(seeds: Sequence[Mapping[str, Any]], part: str) -> str:
    rows = []
    for name, judged in seeds[0]["contenders"].items():
        for score in judged["ood"][part]:
            cells = [
                _spread(seeds, lambda c, s=score, m=measure: c["ood"][part][s][m], name)  # type: ignore[misc]
                for measure in ("auroc", "aupr", "fpr95")
            ]
            rows.append([name, score, *cells])
    return table([f"out of distribution: {part}", "score", "AUROC", "AUPR", "FPR95"], rows)


def _cost(seeds: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name in seeds[0]["contenders"]:
        ratios = [s["contenders"][name]["seconds_per_item"] / s["contenders"]["MLE"]["seconds_per_item"] for s in seeds]
        steps = [s["contenders"][name]["training_step"] for s in seeds]
        fits = [s["contenders"][name]["fit_seconds"] for s in seeds]
        rows.append([name, *(f"{statistics.median(values):.2f}" for values in (steps, fits, ratios))])
    item = 1000 * statistics.median(s["contenders"]["MLE"]["seconds_per_item"] for s in seeds)
    step = 1000 * statistics.median(s["seconds_per_step"] for s in seeds)
    return (
        table(["medians over seeds", "training step / MLE's", "fit after training [s]", "prediction / MLE's"], rows)
        + f"\n\nProcess time on one thread. A step of MLE takes {step:.0f} ms, a prediction {item:.2f} ms. What several "
        "contenders share, such as features of the training part, is counted for the first that asks for it."
    )


def _goals(result: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, found in result["verdicts"].items():
        rows = [
            [v["goal"], f"{100 * v['difference']:+.2f}", f"{100 * v['low']:+.2f} to {100 * v['high']:+.2f}", v["met"]]
            for v in found
        ]
        parts.append(table([f"{name}: goal", "by how much, × 100", "95 % interval", "met"], rows))
    parts.append(
        "Positive differences exceed the goal. They are paired over the seeds; a goal is met if the whole t interval of "
        "the mean is at 0 or above, missed if it is below, and open if it has 0 inside."
    )
    return parts


def _reliability(seed: Mapping[str, Any], path: Path, name: str) -> str:
    shown = [contender for contender in SHOWN if contender in seed["contenders"]]
    figure = plots.new_figure(2.6 * len(shown), 2.9)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, contender in zip(axes, shown, strict=True):
        bins = seed["contenders"][contender]["bins"]
        plots.plot_reliability(
            ax,
            [_number(value) for value in bins["confidence"]],
            [_number(value) for value in bins["accuracy"]],
            bins["count"],
            bins["edges"],
            label=contender,
            color=SHOWN[contender][0],
        )
        ax.set_title(contender, fontsize=9)
    for ax in axes[1:]:
        ax.set_ylabel("")
    plots.save_figure(figure, path)
    return f"![Reliability on the test part, first seed](figures/{path.name})"


def _severity(seeds: Sequence[Mapping[str, Any]], path: Path, name: str) -> str:
    figure = plots.new_figure(9.0, 3.4)
    severities = _severities(seeds)
    for ax, (key, label) in zip(
        figure.subplots(1, 2), (("accuracy", "accuracy [%]"), ("ece", "ECE, top label × 100")), strict=True
    ):
        for contender, (color, line) in SHOWN.items():
            if contender not in seeds[0]["contenders"]:
                continue
            values = [
                statistics.fmean(
                    100 * (c["test"][key] if level == 0 else statistics.fmean(_at(c, level, key)))
                    for c in (seed["contenders"][contender] for seed in seeds)
                )
                for level in severities
            ]
            ax.plot(severities, values, line, color=color, label=contender, linewidth=1.6, marker="o", markersize=3)
        plots.style_axes(ax, "severity (0: as it was)", label)
        ax.set_xticks(severities)
    ax.legend(frameon=False, fontsize=8)
    plots.save_figure(figure, path)
    return f"![Accuracy and calibration against the severity of the shift, means over kinds and seeds](figures/{path.name})"


def _severities(seeds: Sequence[Mapping[str, Any]]) -> list[int]:
    """0 and the severities at the end of the names of shifted parts; none where the names have none."""
    ends = [name.rsplit(" ", 1)[-1] for name in seeds[0]["contenders"]["MLE"]["shifted"]]
    found = sorted({int(end) for end in ends if end.isdigit()})
    return [0, *found] if len(found) > 1 and all(end.isdigit() for end in ends) else []


def _at(contender: Mapping[str, Any], severity: int, key: str) -> list[float]:
    return [part[key] for name, part in contender["shifted"].items() if name.rsplit(" ", 1)[-1] == str(severity)]


def _spread(seeds: Sequence[Mapping[str, Any]], value: Callable[[Any], float], name: str) -> str:
    values = [100 * value(seed["contenders"][name]) for seed in seeds]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.1f} ± {deviation:.1f}"


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
