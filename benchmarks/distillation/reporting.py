"""Tables, figures and verdicts of a case about distillation, from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import table
from gpseq import plots

Seeds = Sequence[Mapping[str, Any]]
#: Columns of the scores: heading, key, factor, digits.
SCORES = (
    ("accuracy", "accuracy", 100, 1),
    ("NLL", "nll", 1, 3),
    ("ECE", "ece", 100, 1),
    ("Brier", "brier", 100, 1),
    ("AURC", "aurc", 100, 2),
)
#: Scores of what is outside, in the order of the columns.
DETECTION = ("entropy", "mutual information", "spread", "path NLL")
#: Students whose drift is drawn, with colour.
DRIFT = {
    "forced, no labels": plots.VERMILION,
    "forced": plots.ORANGE,
    "published": plots.PINK,
    "rollout, no labels": plots.GREEN,
    "plain distillation": plots.GREY,
    "student": plots.BLUE,
}


def report_case(result: Mapping[str, Any], figures: Path) -> list[str]:
    """All parts of a case."""
    title = f"## One transition in the place of {result.get('blocks', 'many')} blocks: {result.get('title', 'MiniLM')}"
    if "skipped" in result:
        return [f"{title}: not run, {result['skipped']}"]
    seeds = result["seeds"]
    return [
        title,
        _about(result),
        _scores(seeds),
        _recipes(result),
        *_verdicts(result),
        _sizes(seeds),
        *_drift(result, figures),
        *_depth(result, figures),
        *_merged(seeds),
        _cost(result),
    ]


def _about(result: Mapping[str, Any]) -> str:
    sizes, settings = result["sizes"], result["settings"]
    outside = ", ".join(f"{count:,} {name}" for name, count in sizes["ood"].items())
    teacher, student = settings["teacher"], settings["student"]
    return (
        f"The teacher: {result['about']}. {sizes['train']:,} training, {sizes['val']:,} validation and {sizes['test']:,} "
        f"test inputs; out of distribution: {outside}. Teachers are trained for {teacher['epochs']} epochs, students for "
        f"{student['epochs']} on the same inputs, with batches of {student['batch_size']} and AdamW up to "
        f"{student['learning_rate']:g}. Accuracy, ECE (15 bins), Brier, AURC and AUROC in hundredths; mean ± standard "
        "deviation over the seeds, the number of which is in the second column. Draws are ten for inputs from inside and "
        "outside alike, their probabilities averaged."
    )


def _scores(seeds: Seeds) -> str:
    outside = list(_of(seeds, "teacher")[0]["ood"])
    known = [
        (part, score)
        for part in outside
        for score in DETECTION
        if any(score in found["ood"][part] for seed in seeds for found in seed["contenders"].values())
    ]
    header = ["contender", "seeds", *(heading for heading, *_ in SCORES)]
    header += [f"AUROC {part}, {score}" for part, score in known]
    rows = []
    for name in _names(seeds):
        found = _of(seeds, name)
        row = [f"**{name}**" if name == "student, 10 draws" else name, len(found)]
        for _, key, factor, digits in SCORES:
            row.append(spread([factor * one[key] for one in found], digits))
        for part, score in known:
            values = [100 * one["ood"][part][score] for one in found if score in one["ood"][part]]
            row.append(spread(values, 1) if values else "")
        rows.append(row)
    return table(header, rows)


def _recipes(result: Mapping[str, Any]) -> str:
    told = "; ".join(f"*{name}*: {about}" for name, about in result["recipes"].items())
    return (
        f"Students: {told}. Noise-free is the mean path, one pass without draws; *spread calibrated* has one factor on all "
        "deviations, fitted on validation labels, as the teacher's temperature is. *SGPA, fitted to the teacher* has sparse "
        "Gaussian processes in the place of the teacher's attention, covariances fitted in closed form, one pass; "
        "*SGPA, trained* is trained with them from the start."
    )


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, found in result["verdicts"].items():
        rows = []
        for one in found:
            error = "" if one["error"] is None else f" ± {one['error']:.4f}"
            verdict = "met" if one["met"] else f"missed by {-one['margin']:.4f}"
            rows.append(
                [one["goal"], f"{one['reached']:.4f}", f"{one['needed']:.4f}", f"{one['margin']:+.4f}{error}", verdict]
            )
        parts.append(table([f"{name}: asked for", "reached", "needed", "margin", "verdict"], rows))
    count = len(result["seeds"])
    parts.append(
        f"Means over the seeds at which each was judged ({count} at most); a margin is positive where more was reached than "
        "needed, and ± is its standard error over the seeds."
    )
    return parts


def _sizes(seeds: Seeds) -> str:
    rows = []
    for name, size in seeds[0]["sizes"].items():
        if name in ("student", "later blocks"):
            rows.append(
                [
                    name,
                    size["blocks"],
                    f"{size['replaced']:,}",
                    f"{size['kernel']:,}",
                    f"{100 * size['kernel'] / size['replaced']:.0f} %",
                    f"{size['teacher']:,}",
                    f"{size['student']:,}",
                    f"{100 * size['student'] / size['teacher']:.0f} %",
                ]
            )
    header = ["parameters", "blocks", "of the blocks", "kernel and kept perceptron", "share"]
    return table([*header, "teacher", "student", "share"], rows)


def _drift(result: Mapping[str, Any], figures: Path) -> list[str]:
    seeds = result["seeds"]
    names = [name for name in DRIFT if any(name in seed["drift"] for seed in seeds)]
    depth = result["blocks"]
    rows = []
    for name in names:
        for kind, words in (("rollout", "own path"), ("step", "one step")):
            values = _averaged([seed["drift"][name][kind] for seed in seeds if name in seed["drift"]])
            rows.append([name, words, *(f"{value:.3f}" for value in values)])
    parts = [
        table(["distance from the teacher's states", "", *(f"l = {number}" for number in range(1, depth + 1))], rows),
        "Norm of the difference over that of the teacher's state, test inputs, noise-free: on the student's own path from "
        "the first state, and after one step from the teacher's own state before.",
    ]
    if {"forced, no labels", "rollout, no labels"} <= set(names):
        forced, free = (
            _averaged([seed["drift"][name]["rollout"] for seed in seeds if name in seed["drift"]])[-1]
            for name in ("forced, no labels", "rollout, no labels")
        )
        lost, kept = (
            100 * statistics.fmean(one["accuracy"] for one in _of(seeds, name))
            for name in ("forced, no labels", "rollout, no labels")
        )
        parts.append(
            f"Matched one step at a time without labels, the student ends {forced:.2f} of the teacher's norm away, with an "
            f"accuracy of {lost:.1f}; matched on its own path, {free:.2f}, with {kept:.1f}."
        )
    path = figures / f"director_{result['setting']}_drift.png"
    figure = plots.new_figure(9.0, 3.2)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, kind, words in ((axes[0], "rollout", "on its own path"), (axes[1], "step", "one step from the teacher")):
        for name in names:
            values = _averaged([seed["drift"][name][kind] for seed in seeds if name in seed["drift"]])
            ax.plot(range(1, len(values) + 1), values, "o-", color=DRIFT[name], label=name, markersize=3, linewidth=1.5)
        plots.style_axes(ax, "transition", "distance / norm" if ax is axes[0] else "")
        ax.set_xticks(range(1, depth + 1))
        ax.set_title(words, loc="left", fontsize=9)
        ax.set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize=7)
    plots.save_figure(figure, path)
    parts.append(f"![Distance of students from their teacher's states along the depth](figures/{path.name})")
    return parts


def _depth(result: Mapping[str, Any], figures: Path) -> list[str]:
    seeds = result["seeds"]
    found = [seed["depth"]["student"] for seed in seeds if "student" in seed.get("depth", {})]
    path = figures / f"director_{result['setting']}_depth.png"
    figure = plots.new_figure(4.8, 3.2)
    ax = figure.subplots()
    for part, color in zip(found[0], (plots.BLUE, plots.VERMILION, plots.ORANGE), strict=False):
        mean = _averaged([one[part]["mean"] for one in found])
        deviation = _averaged([one[part]["deviation"] for one in found])
        numbers = range(1, len(mean) + 1)
        ax.plot(numbers, mean, "o-", color=color, label=part, markersize=3, linewidth=1.5)
        low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
        ax.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
    plots.style_axes(ax, "transition", "mean deviation s")
    ax.set_xticks(range(1, result["blocks"] + 1))
    ax.legend(frameon=False, fontsize=8)
    plots.save_figure(figure, path)
    return [
        f"![Spread of the student along the depth, inside and outside; bands are ± one deviation over inputs](figures/{path.name})"
    ]


def _merged(seeds: Seeds) -> list[str]:
    found = {
        name: [seed["merged"][name] for seed in seeds if name in seed.get("merged", {})]
        for name in ("random steps", "student")
    }
    rows = []
    for name, runs in found.items():
        for number, row in enumerate(runs[0] if runs else ()):
            at = [run[number] for run in runs]
            rows.append(
                [
                    name if name != "student" else "student, not trained for it",
                    row["steps"],
                    spread([100 * one["noise-free"] for one in at], 1),
                    spread([100 * one["drawn"] for one in at], 1),
                    spread([one["nll"] for one in at], 3),
                ]
            )
    return (
        [table(["merged steps", "steps", "accuracy, noise-free", "accuracy, 10 draws", "NLL, 10 draws"], rows)]
        if rows
        else []
    )


def _cost(result: Mapping[str, Any]) -> str:
    cost = result["cost"]
    rows = [
        [
            name,
            f"{1000 * one['seconds']:.1f}",
            f"{one['ratio']:.2f}",
            f"{cost['bytes'][name] / 1e6:.1f}" if name in cost["bytes"] else "",
        ]
        for name, one in cost["times"].items()
    ]
    steps = result["seeds"][0]["training"]
    return (
        table(["prediction of 32 inputs", "ms", "teacher's", "memory [MB]"], rows)
        + "\n\nProcess time on one thread, medians; ratios to the teacher in the same turn. Memory is the peak beyond the "
        f"networks and the inputs. A step of training takes {1000 * steps['student']:.0f} ms, one of the teacher "
        f"{1000 * steps['teacher']:.0f} ms."
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, or the one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _names(seeds: Seeds) -> list[str]:
    """Contenders in the order in which they come, those of some seeds too."""
    return list(dict.fromkeys(name for seed in seeds for name in seed["contenders"]))


def _of(seeds: Seeds, name: str) -> list[Mapping[str, Any]]:
    return [seed["contenders"][name] for seed in seeds if name in seed["contenders"]]


def _averaged(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]
