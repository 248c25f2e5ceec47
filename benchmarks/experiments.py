"""What the paper's experiments share: every task scored after every later one, and the section that says who won."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpytorch
import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from benchmarks.following import Chunk
from benchmarks.intervals import Interval, interval, paired
from benchmarks.tables import table
from gpseq import plots

#: What is reported of a run, as the report calls it.
SUMMARIES = {
    "end": "all tasks at the end",
    "oldest": "oldest task at the end",
    "mean": "mean over all tasks and times",
}
DIGITS = 6


def follow(tasks: Sequence[Chunk], methods: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run every method over the tasks, and score every past task after every later one.

    A method has ``update(x, y)`` and ``predict(x)``, mean and variance of new observations; where these are not
    Gaussian it also has ``log_density(x, y)`` of each observation, and ``loss(x, y)`` where the score beside the density
    is not the squared error. One with ``only_at_end = True`` is scored after the last task only.

    Returns:
        Per method the matrices ``error`` and ``nlpd`` (row: tasks learnt, column: task; empty rows where nothing was
        scored) of means over the held-out rows of the task, and ``seconds`` of every update. ``error`` is a mean of
        squares or of the method's own loss. Seconds are those of the processor, in one thread, so that they do not
        depend on what else the machine does.
    """
    torch.set_num_threads(1)
    return {name: _follow(tasks, make()) for name, make in methods.items()}


def _follow(tasks: Sequence[Chunk], method: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"seconds": [], "error": [], "nlpd": []}
    with warnings.catch_warnings():
        # GPyTorch's notices about the jitter of peers, and advice about capacity, which is fixed here by the paper.
        warnings.simplefilter("ignore", NumericalWarning)
        warnings.simplefilter("ignore", gpytorch.utils.warnings.GPInputWarning)
        warnings.filterwarnings("ignore", module="gpseq")
        warnings.filterwarnings("ignore", category=UserWarning)
        for step, task in enumerate(tasks, start=1):
            begun = time.process_time()
            method.update(task.x, task.y)
            result["seconds"].append(round(time.process_time() - begun, DIGITS))
            if step < len(tasks) and getattr(method, "only_at_end", False):
                losses, densities = [], []
            else:
                losses, densities = _score(method, tasks[:step])
            result["error"].append(losses)
            result["nlpd"].append(densities)
    return result


@torch.no_grad()
def _score(method: Any, tasks: Sequence[Chunk]) -> tuple[list[float], list[float]]:
    x, y = torch.cat([t.x_test for t in tasks]), torch.cat([t.y_test for t in tasks])
    sizes = [len(t.y_test) for t in tasks]
    if hasattr(method, "log_density"):
        density = -method.log_density(x, y)
        loss = method.loss(x, y) if hasattr(method, "loss") else (method.predict(x)[0] - y).square()
    else:
        mean, variance = method.predict(x)
        density = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y)
        loss = (mean - y).square()
    return _means(loss, sizes), _means(density, sizes)


def _means(values: Tensor, sizes: list[int]) -> list[float]:
    return [round(part.mean().item(), DIGITS) for part in values.split(sizes)]


def run_of(tasks: Sequence[Chunk], methods: Mapping[str, Callable[[], Any]], **about: Any) -> dict[str, Any]:
    """One seed: what :func:`follow` returns, the held-out rows of the tasks, and whatever else is worth keeping."""
    return about | {"test_rows": [len(t.y_test) for t in tasks], "methods": follow(tasks, methods)}


def summary(run: dict[str, Any], name: str, score: str, kind: str) -> float | None:
    """One number of one seed.

    Args:
        run: of :func:`run_of`.
        name: of the method.
        score: ``"rmse"``, ``"nlpd"`` or ``"accuracy"``.
        kind: a key of ``SUMMARIES``.

    Returns:
        ``None`` where it was not measured.
    """
    method = run["methods"].get(name)
    if method is None:
        return None
    matrix = [[_shown(value, score) for value in row] for row in method["nlpd" if score == "nlpd" else "error"]]
    if kind == "mean":
        return statistics.fmean(v for row in matrix for v in row) if all(matrix) else None
    if kind == "oldest":
        return matrix[-1][0]
    rows = method["nlpd" if score == "nlpd" else "error"][-1]
    pooled = sum(n * value for n, value in zip(run["test_rows"], rows, strict=True)) / sum(run["test_rows"])
    return _shown(pooled, score)


def _shown(value: float, score: str) -> float:
    if score == "rmse":
        return value**0.5
    return 1 - value if score == "accuracy" else value


def over_seeds(runs: Sequence[dict[str, Any]], name: str, score: str, kind: str) -> Interval:
    """Mean and interval over the seeds for which it was measured."""
    values = [summary(run, name, score, kind) for run in runs]
    return interval([v for v in values if v is not None])


def difference(runs: Sequence[dict[str, Any]], ours: str, theirs: str, score: str, kind: str = "end") -> Interval:
    """Paired over the seeds for which both were measured; a positive one means that ours is worse."""
    pairs = [(summary(run, ours, score, kind), summary(run, theirs, score, kind)) for run in runs]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    sign = -1 if score == "accuracy" else 1
    return paired([sign * a for a, _ in pairs], [sign * b for _, b in pairs])


def seconds(runs: Sequence[dict[str, Any]], name: str) -> Interval:
    """Of all updates together."""
    return interval([sum(run["methods"][name]["seconds"]) for run in runs if name in run["methods"]])


def time_ratio(runs: Sequence[dict[str, Any]], slow: str, fast: str) -> float:
    """Median over seeds of how many times longer one method's updates took."""
    both = [run["methods"] for run in runs if slow in run["methods"] and fast in run["methods"]]
    return statistics.median(sum(m[slow]["seconds"]) / sum(m[fast]["seconds"]) for m in both)


def scores_table(runs: Sequence[dict[str, Any]], score: str = "rmse") -> str:
    """Method by method: both scores at the end, of the oldest task, and over the whole triangle; accumulated time."""
    names = list(dict.fromkeys(name for run in runs for name in run["methods"]))
    header = ["method"]
    for label in (LABELS[score], "NLPD"):
        header += [f"{label}, {text}" for text in SUMMARIES.values()]
    rows = []
    for name in names:
        cells = [str(over_seeds(runs, name, s, kind)) for s in (score, "nlpd") for kind in SUMMARIES]
        count = sum(name in run["methods"] for run in runs)
        rows.append(
            [name + (f" ({count} seeds)" if count < len(runs) else ""), *cells, f"{seconds(runs, name).mean:.2f}"]
        )
    return table([*header, "all updates [CPU s]"], rows)


LABELS = {"rmse": "RMSE", "accuracy": "accuracy"}


def verdicts(
    runs: Sequence[dict[str, Any]], ours: Sequence[str], theirs: Sequence[str], slow: str, score: str = "rmse"
) -> tuple[str, list[dict[str, Any]]]:
    """Is ours at least as good, and at a tenth of the time of the method that optimises its points?

    At least as good means that the 95 % interval of the paired difference at the end does not lie above zero.

    Args:
        runs: the seeds.
        ours: names of our methods.
        theirs: names of the rivals.
        slow: which of the rivals the time is compared with.
        score: ``"rmse"`` or ``"accuracy"``, beside the NLPD.

    Returns:
        The table, and what it says as values: ``ours``, ``theirs``, ``holds`` (both scores), ``differences``, ``ratio``.
    """
    rows, facts = [], []
    for mine in ours:
        for other in theirs:
            first, second = (difference(runs, mine, other, s) for s in (score, "nlpd"))
            holds = all(d.verdict in ("better", "level") for d in (first, second))
            ratio = time_ratio(runs, other, mine)
            facts.append(
                {"ours": mine, "theirs": other, "holds": holds, "differences": (first, second), "ratio": ratio}
            )
            timed = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
            if other == slow:
                timed += ", within a tenth" if ratio >= 10 else ", **not a tenth**"
            sense = [f"{d.signed} ({d.verdict})" for d in (first, second)]
            rows.append([mine, other, *sense, "yes" if holds else "**no**", timed])
    loss = "lost accuracy" if score == "accuracy" else LABELS[score]
    header = ["ours", "rival", f"{loss}, ours − rival", "NLPD, ours − rival", "at least as good", "time, rival / ours"]
    return table(header, rows), facts


def failures(named: Mapping[str, list[dict[str, Any]]], ours: str, score: str = "rmse") -> str:
    """What the verdicts of several data sets come to for one of our methods, in a few sentences."""
    facts = [(data, fact) for data, all_facts in named.items() for fact in all_facts if fact["ours"] == ours]
    bad = [(data, fact) for data, fact in facts if not fact["holds"]]
    if not bad:
        return f"`{ours}` is at least as good as every rival within the interval in all {len(facts)} comparisons."
    first = "lost accuracy" if score == "accuracy" else LABELS[score]
    worse = "; ".join(
        f"{data}, against {fact['theirs']} ({first} {fact['differences'][0].signed}, NLPD {fact['differences'][1].signed})"
        for data, fact in bad
    )
    return f"`{ours}` is at least as good in {len(facts) - len(bad)} of {len(facts)} comparisons. It fails: {worse}."


def draw_past(
    runs: Sequence[dict[str, Any]], shown: Sequence[str], path: Path, score: str = "rmse", label: str = "RMSE, held out"
) -> None:
    """Means over seeds of the error on every past task as the stream goes on, one heat map a method."""
    matrices, kind = {}, "nlpd" if score == "nlpd" else "error"
    for name in shown:
        seeds = [run["methods"][name][kind] for run in runs if name in run["methods"]]
        seeds = [seed for seed in seeds if all(seed)]
        num = len(seeds[0])
        matrices[name] = [
            [
                statistics.fmean(_drawn(seed[row][column], score) for seed in seeds) if column <= row else float("nan")
                for column in range(num)
            ]
            for row in range(num)
        ]
    figure = plots.new_figure(2.75 * len(shown), 3.4)
    plots.plot_past_errors(list(figure.subplots(1, len(shown))), matrices, label)
    plots.save_figure(figure, path)


def _drawn(error: float, score: str) -> float:
    """An error of the matrices as it is drawn: the root of a mean square, the share of wrong labels, the NLPD."""
    return error**0.5 if score == "rmse" else error
