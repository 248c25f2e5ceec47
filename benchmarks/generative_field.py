"""A field of temperature in four tasks: HiPPO features, moved and re-selected points, and what holds the networks."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpseq
from benchmarks.distillation.reporting import spread
from benchmarks.distillation.students import code_hash
from benchmarks.tables import table
from examples.generative import field
from examples.generative.field import (
    DAY,
    FREE,
    FROZEN,
    HELD,
    HIPPO,
    HOURS,
    KINDS,
    LEVEL,
    MOVED,
    NUM_TASKS,
    SELECTED,
    TREATMENTS,
    Setting,
    Stream,
)
from gpseq import plots
from gpseq.storage import replace_file

SETTING = Setting(steps=200)
#: Features: fewer than the rule asks for on all days (115 to 121), and enough of them.
SIZES = (48, 128)
SEEDS = 3
STRENGTHS = (10.0, 100.0, 1000.0, 10000.0)
#: No worse: at most this factor. Clearly better: at least so much less, and by more than twice the deviation over seeds.
NO_WORSE, CLEARLY = 1.05, 0.9
#: Coverage of an old task that counts as over-confident.
OVERCONFIDENT = LEVEL - 0.05
CACHE = Path("build/generative")
#: Code that a result depends on.
FILES = (
    *(f"generative/{name}.py" for name in ("gp_vae", "sparse", "evidence", "observations", "draws")),
    *(f"features/{name}.py" for name in ("base", "hippo", "points", "selected")),
    *(f"variational/{name}.py" for name in ("online", "prior", "belief")),
    *(f"continual/{name}.py" for name in ("ewc", "fisher")),
    *(f"metrics/{name}.py" for name in ("regression", "intervals")),
    *("linalg.py", "datasets/fields.py"),
)


def run(smoke: bool) -> dict[str, Any]:
    """The strength of EWC from validation hours of the first seed, then all contenders for each size and seed."""
    hours = 12 if smoke else HOURS
    setting = Setting(steps=2, width=8, latents=2, draws=4) if smoke else SETTING
    sizes, strengths = ((4, 6), STRENGTHS[1:3]) if smoke else (SIZES, STRENGTHS)
    small = replace(setting, num_features=sizes[0])
    tuned = _kept(
        "tuning",
        [asdict(small), strengths, hours],
        smoke,
        lambda: list(field.tune(field.load(0, hours), small, strengths).items()),
    )
    strength = min(tuned, key=lambda pair: pair[1])[0]
    seeds = []
    for seed in range(1 if smoke else SEEDS):
        stream = field.load(seed, hours)
        found: dict[str, Any] = {}
        for size in sizes:
            one = replace(setting, num_features=size, seed=seed)
            found[str(size)] = {
                kind: _kept(
                    f"{KINDS.index(kind)}-{size}-{seed}",
                    [asdict(one), strength, hours],
                    smoke,
                    lambda kind=kind, one=one, stream=stream: _compared(stream, kind, one, strength),
                )
                for kind in KINDS
            }
        seeds.append({"sizes": found, "references": field.references(stream), "scale": stream.scale})
    stream = field.load(0, hours)
    truth = stream.tasks[0].truth[field.drawn_hour(stream.tasks[0])]
    return {
        "seeds": seeds,
        "hours": hours,
        "setting": asdict(setting),
        "sizes": list(sizes),
        "tuning": tuned,
        "strength": strength,
        "truth": _packed(truth.tolist()),
    }


def _compared(stream: Stream, kind: str, setting: Setting, strength: float) -> dict[str, Any]:
    """All treatments of one kind as JSON; maps of the first seed only."""
    made = {}
    for treatment, found in field.compare(stream, kind, setting, strength).items():
        told = asdict(found)
        told["maps"] = {name: _packed(values) for name, values in found.maps.items()} if setting.seed == 0 else {}
        made[treatment] = told
    return made


def _kept(name: str, key: Any, smoke: bool, make: Callable[[], Any]) -> Any:
    """What was measured before, if neither settings nor code have changed since."""
    package = Path(gpseq.__file__).parent
    code = code_hash([package / file for file in FILES] + [Path(field.__file__)])
    digest = hashlib.sha256((json.dumps([key, torch.__version__]) + code).encode()).hexdigest()[:10]
    file = CACHE / f"field-{name}-{digest}.json"
    if not smoke and file.exists():
        return json.loads(file.read_text())
    made = json.loads(json.dumps(make()))
    if not smoke:
        CACHE.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(made).encode())
        print(f"field: {name}", flush=True)
    return made


def _packed(values: Sequence[float]) -> str:
    """Numbers in thousandths, as text."""
    return base64.b64encode(np.round(1000 * np.asarray(values)).astype("<i2").tobytes()).decode()


def _unpacked(text: str) -> list[float]:
    return (np.frombuffer(base64.b64decode(text), "<i2") / 1000).tolist()


# --- report -----------------------------------------------------------------------------------------------------------


def report(result: Mapping[str, Any], figures: Path) -> list[str]:
    """What was done, tables for both sizes, goals, figures."""
    largest = max(result["sizes"])
    return [
        "## A field of temperature in four tasks",
        _about(result),
        _capacity(result),
        *(part for size in result["sizes"] for part in _size(result, size)),
        *_goals(result),
        _confidence(result),
        *_triangles(result, largest),
        *_figures(result, largest, figures),
    ]


def _found(result: Mapping[str, Any], size: int, kind: str, treatment: str) -> list[Mapping[str, Any]]:
    """What the seeds have."""
    return [seed["sizes"][str(size)][kind][treatment] for seed in result["seeds"]]


def _contenders() -> list[tuple[str, str]]:
    return [(kind, treatment) for treatment in TREATMENTS for kind in KINDS]


def _end(found: Mapping[str, Any], score: str = "rmse", which: str = "now") -> float:
    return statistics.fmean(found[which][score][-1])


def _at_once(found: Mapping[str, Any], score: str = "rmse") -> float:
    return statistics.fmean(row[-1] for row in found["now"][score])


def _about(result: Mapping[str, Any]) -> str:
    setting, count = result["setting"], len(result["seeds"])
    tuned = ", ".join(f"{value:.3f} at {strength:g}" for strength, value in result["tuning"])
    scales = [seed["scale"] for seed in result["seeds"]]
    references = "; ".join(
        f"{name} {spread([statistics.fmean(seed['references'][name]) for seed in result['seeds']], 3)}"
        for name in result["seeds"][0]["references"]
    )
    return (
        f"Hourly maps of air temperature over the British Isles (33 x 49 pixels, March 2019), {NUM_TASKS} tasks of "
        f"{result['hours']} hours in a stream. In each task {100 * field.TEST:.0f} % of the hours, whole maps, are held out to "
        f"score and {100 * field.VAL:.0f} % to validate. Pixels are standardised by their means in the training hours of task 1 "
        f"and one scale, {spread(scales, 2)} K. `GPPriorVAE` with {setting['latents']} latent paths, RBF kernels with a "
        f"lengthscale each that are learnt in task 1 and then stay, two-layer networks of width {setting['width']} and one "
        f"noise that is learnt; {setting['steps']} steps of Adam a task at {setting['rate']:g}, not tuned. *{HIPPO}*: LegS "
        f"features whose horizon moves to the end of each task. *{SELECTED}*: chosen greedily by variance, from the old points "
        f"and the new task's hours, at each task. *{MOVED}*: begin as a random choice of old points and new hours, in "
        "proportion to the tasks behind them, and move by gradient along with everything else. *free*: networks and noise go "
        f"on learning; *EWC*: encoder and decoder are held by springs; *frozen*: networks and noise stay as they were after "
        "task 1. Seeds differ in held-out hours, networks and draws; the first task is learnt once for the three ways to treat "
        f"networks. The strength of EWC is one for all: RMSE on validation hours of tasks 1 and 2 after task 2, first seed, "
        f"{min(result['sizes'])} features, mean of the three kinds: {tuned}; {result['strength']:g} is used. "
        f"Mean ± standard deviation over {count} seed{'s' * (count > 1)}. RMSE without a model, mean of the tasks: {references}; the "
        "latter keeps all data."
    )


def _capacity(result: Mapping[str, Any]) -> str:
    days, parts = NUM_TASKS * result["hours"] / DAY, []
    for size in result["sizes"]:
        asked = [field.capacity(one["lengthscales"], days) for one in _found(result, size, HIPPO, FREE)]
        median, most = (statistics.fmean(column) for column in zip(*asked, strict=True))
        shares = ", ".join(
            f"{kind} {100 * statistics.fmean(one['residual'][-1] for one in _found(result, size, kind, FREE)):.1f} %"
            for kind in KINDS
        )
        where = "below the rule" if size < 0.75 * median else "near the rule" if size < most else "above the rule"
        parts.append(
            f"{size} features are {where}, which asks for {median:.0f} for the median channel and {most:.0f} for the fastest; at "
            f"the end they do not see this share of the paths' prior variance: {shares}"
        )
    return f"Capacity, {field.CAPACITY:g} features for each lengthscale on {days:g} days: {'; '.join(parts)}."


def _size(result: Mapping[str, Any], size: int) -> list[str]:
    rows, tasks = [], []
    for kind, treatment in _contenders():
        found, name = _found(result, size, kind, treatment), f"{kind}, {treatment}"
        scales = [seed["scale"] for seed in result["seeds"]]
        # What is lost since a task was learnt, in two parts that add up.
        memory = [_end(one, which="memory") - _at_once(one) for one in found]
        drift = [_end(one) - _end(one, which="memory") for one in found]
        rows.append(
            [
                name,
                spread([_at_once(one) for one in found], 3),
                spread([_end(one) for one in found], 3),
                spread([scale * _end(one) for scale, one in zip(scales, found, strict=True)], 2),
                spread(memory, 3),
                spread(drift, 3),
                spread([_end(one, "nlpd") for one in found], 2),
                spread([_end(one, "nlpd", "memory") for one in found], 2),
                f"{statistics.median(sum(one['seconds']) for one in found):.0f}",
            ]
        )
        cells = []
        for task in range(NUM_TASKS):
            once, end = (
                [[one["now"][score][stage][task] for one in found] for score in ("coverage", "nlpd")]
                for stage in (task, NUM_TASKS - 1)
            )
            cells.append(
                f"{100 * statistics.fmean(once[0]):.0f} → {100 * statistics.fmean(end[0]):.0f} %; "
                f"{statistics.fmean(once[1]):.2f} → {statistics.fmean(end[1]):.2f}"
            )
        tasks.append([name, *cells])
    head = [
        f"{size} features",
        "RMSE at once",
        "RMSE at the end",
        "the same [K]",
        "lost by the memory",
        "lost by drift",
    ]
    return [
        table([*head, "NLPD at the end", "NLPD, networks of then", "learning [s]"], rows),
        table([f"{size} features: coverage; NLPD", *(f"task {number + 1}" for number in range(NUM_TASKS))], tasks),
    ]


def _goals(result: Mapping[str, Any]) -> list[str]:
    rows, met = [], {SELECTED: 0, MOVED: 0}
    for size in result["sizes"]:
        for treatment in TREATMENTS:
            ours = [_end(one) for one in _found(result, size, HIPPO, treatment)]
            for kind in (SELECTED, MOVED):
                theirs = [_end(one) for one in _found(result, size, kind, treatment)]
                ratio = statistics.fmean(ours) / statistics.fmean(theirs)
                gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
                deviation = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
                if kind == SELECTED:
                    good = ratio <= NO_WORSE
                else:
                    good = ratio <= CLEARLY and statistics.fmean(gaps) > 2 * deviation
                met[kind] += good
                goal = "no worse than" if kind == SELECTED else "clearly better than"
                verdict = "met" if good else "missed"
                rows.append([f"{size}, {treatment}", f"{goal} {kind}", f"{ratio:.3f}", spread(gaps, 3), verdict])
    total = len(rows) // 2
    return [
        table(["features, networks", f"goal for {HIPPO}: RMSE at the end", "ratio", "less by", "verdict"], rows),
        f"No worse is a ratio of at most {NO_WORSE:g}; clearly better is one of at most {CLEARLY:g}, and a gain of more than twice "
        f"its standard deviation over the seeds. No worse than {SELECTED}: {_goal(met[SELECTED], total)}. Clearly better than "
        f"{MOVED}: {_goal(met[MOVED], total)}.",
    ]


def _goal(met: int, total: int) -> str:
    return f"{'met' if met == total else 'missed' if met == 0 else 'met in part'} ({met} of {total})"


def _confidence(result: Mapping[str, Any]) -> str:
    """Old tasks whose bands hold too little at the end."""
    named, fine, since = [], [], 0
    for size in result["sizes"]:
        for kind, treatment in _contenders():
            found = _found(result, size, kind, treatment)
            bad = []
            for task in range(NUM_TASKS - 1):
                once, end = (
                    statistics.fmean(one["now"]["coverage"][stage][task] for one in found)
                    for stage in (task, NUM_TASKS - 1)
                )
                if end < OVERCONFIDENT:
                    bad.append(f"{task + 1} ({100 * end:.0f} %)")
                    since += once >= OVERCONFIDENT
            name = f"{kind}, {treatment}, {size}"
            named += [f"{name}: task{'s' * (len(bad) > 1)} {', '.join(bad)}"] if bad else []
            fine += [] if bad else [name]
    count = sum(one.count("%") for one in named)
    if not named:
        return f"No contender's {100 * LEVEL:.0f} % bands hold less than {100 * OVERCONFIDENT:.0f} % of an old task at the end."
    return (
        f"**Over-confidence.** {100 * LEVEL:.0f} % bands that hold less than {100 * OVERCONFIDENT:.0f} % of an old task at the end: "
        f"{'; '.join(named)}. {since} of these {count} were not over-confident right after the task. "
        + (f"Without any: {'; '.join(fine)}." if fine else "No contender is without.")
    )


def _triangles(result: Mapping[str, Any], size: int) -> list[str]:
    parts = []
    for score, words, factor, digits in (
        ("rmse", "RMSE", 1, 2),
        ("nlpd", "NLPD of a pixel [nats]", 1, 2),
        ("coverage", f"coverage of {100 * LEVEL:.0f} % bands [%]", 100, 0),
    ):
        cells = [(task, stage) for task in range(NUM_TASKS) for stage in range(task, NUM_TASKS)]
        rows = []
        for kind, treatment in _contenders():
            for which, words_of in (("now", ""), ("memory", ", networks of then")):
                if which == "memory" and treatment == FROZEN:
                    continue  # they are those of now
                found = _found(result, size, kind, treatment)
                values = [statistics.fmean(one[which][score][stage][task] for one in found) for task, stage in cells]
                rows.append([f"{kind}, {treatment}{words_of}", *(f"{factor * value:.{digits}f}" for value in values)])
        header = [f"{words}, {size} features", *(f"{task + 1} after {stage + 1}" for task, stage in cells)]
        parts.append(table(header, rows))
    return parts


def _figures(result: Mapping[str, Any], size: int, figures: Path) -> list[str]:
    def mean(kind: str, treatment: str, score: str) -> list[list[float]]:
        found = _found(result, size, kind, treatment)
        rows = zip(*(one["now"][score] for one in found), strict=True)
        return [[statistics.fmean(values) for values in zip(*row, strict=True)] for row in rows]

    errors = {kind: {treatment: mean(kind, treatment, "rmse") for treatment in TREATMENTS} for kind in KINDS}
    field.draw_errors(figures / "generative_field_errors.png", errors)
    coverage = {
        f"{kind}, {treatment}": field.matrix(mean(kind, treatment, "coverage"))
        for kind in KINDS
        for treatment in (FREE, HELD)
    }
    figure = plots.new_figure(8.0, 7.5)
    axes = figure.subplots(len(KINDS), 2)
    names = [str(number + 1) for number in range(NUM_TASKS)]
    plots.plot_task_scores(list(axes.flat), coverage, names, f"coverage of {100 * LEVEL:.0f} % bands")
    plots.save_figure(figure, figures / "generative_field_coverage.png")

    parts = [
        f"![RMSE of each task after each later one, {size} features, mean of the seeds](figures/generative_field_errors.png)",
        "![Coverage of each task after each later one, mean of the seeds](figures/generative_field_coverage.png)",
    ]
    maps = {
        f"{kind}, {treatment}": {
            name: _unpacked(text) for name, text in _found(result, size, kind, treatment)[0]["maps"].items()
        }
        for kind, treatment in ((HIPPO, FREE), (HIPPO, HELD), (MOVED, FREE))
    }
    stream = field.load(0, result["hours"])
    field.draw_maps(figures / "generative_field_maps.png", _unpacked(result["truth"]), maps, stream)
    parts.append(
        "![A held-out hour of task 1 as it was, right after the task, and at the end; first seed](figures/generative_field_maps.png)"
    )
    return parts
