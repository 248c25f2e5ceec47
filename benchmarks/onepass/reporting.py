"""Tables and verdicts of the cases about quality, from their JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.onepass.judging import together
from benchmarks.tables import table

#: Standard errors that a difference has to exceed to be called one.
CLEAR = 2.0
#: Differences of NLL in nats, and of AUROC, that are called none however sure they are.
SMALL = {"nll": 0.002, "auroc": 0.002}

Seeds = Sequence[Mapping[str, Any]]


def report_settings(result: Mapping[str, Any], title: str) -> list[str]:
    """All parts of a case."""
    if "skipped" in result:
        return [f"{title}: not run, {result['skipped']}"]
    parts = [title, _introduction()]
    for setting in result.values():
        parts += [f"### {setting['title']}", _about(setting), _scores(setting["seeds"]), _against(setting["seeds"])]
        parts += [" ".join(_sentences(setting["seeds"]))]
    return parts


def _introduction() -> str:
    return (
        "All contenders share one posterior: a Laplace approximation with the generalised Gauss-Newton matrix, Kronecker "
        "factors where a layer has them and its diagonal elsewhere. Its prior precision is the one of eleven between 1 "
        "and 1e5 with which ten draws of Monte Carlo make the validation labels most probable, so it suits Monte Carlo. "
        "Every contender that answers with a Gaussian over logits is judged as it is, with one scale of its covariance, "
        "and with a scale and a temperature, both fitted to the validation labels; MAP has a temperature for comparison. "
        "`streamlined` are the published rules. `GLM of the head` has a posterior of the head alone, with the prior "
        "precision of the highest marginal likelihood. Probabilities of Gaussians are averages over draws from them, "
        "but for `probit`, which is laplace-torch's default. KL is the divergence from the prediction of 100 draws. "
        "Seconds are process time for the test part on one thread, without what is done once. Mean ± standard deviation "
        "over seeds, accuracy, ECE, AURC and AUROC in hundredths."
    )


def _about(setting: Mapping[str, Any]) -> str:
    seeds = setting["seeds"]
    sizes = seeds[0]["sizes"]
    outside = ", ".join(f"{size} of {name}" for name, size in sizes["ood"].items())
    precisions = ", ".join(f"{seed['prior_precision']:g}" for seed in seeds)
    return (
        f"{setting['about']}: {seeds[0]['weights']:,} weights. {sizes['train']:,} training inputs, of which "
        f"{sizes['curvature']:,} are in the curvature, {sizes['val']} to validate, {sizes['test']} to test; out of "
        f"distribution: {outside}. {_count(len(seeds), 'seed')}; prior precision {precisions}."
    )


def _scores(seeds: Seeds) -> str:
    outside = list(seeds[0]["sizes"]["ood"])
    header = ["contender", "accuracy", "NLL", "ECE", "AURC"]
    header += [f"AUROC {name}, {score}" for name in outside for score in ("entropy", "mutual information")]
    header += ["KL", "scale", "temperature", "seconds"]
    rows = []
    for name in seeds[0]["contenders"]:
        found = [seed["contenders"][name] for seed in seeds]
        row = [
            name,
            _spread(found, lambda c: 100 * c["accuracy"], 1),
            _spread(found, lambda c: c["nll"], 3),
            _spread(found, lambda c: 100 * c["ece"], 1),
            _spread(found, lambda c: 100 * c["aurc"], 2),
        ]
        for part in outside:
            for score in ("entropy", "information"):
                known = score in found[0]["ood"][part]
                row.append(_spread(found, lambda c, p=part, s=score: 100 * c["ood"][p][s], 1) if known else "")
        row.append(_spread(found, lambda c: c["divergence"], 4))
        for number in ("scale", "temperature"):
            values = [one["fitted"][number] for one in found if number in one["fitted"]]
            row.append(f"{statistics.median(values):.2g}" if values else "")
        row.append(f"{statistics.median(one['seconds'] for one in found):.2f}")
        rows.append(row)
    return table(header, rows)


def _against(seeds: Seeds) -> str:
    rows = []
    outside = list(seeds[0]["sizes"]["ood"])
    scaled, tempered = seeds[0]["against"]
    draws = _draws(seeds)[-1]
    for ours, rivals in ((scaled, list(seeds[0]["against"][scaled])), (tempered, ["MAP + temperature", draws])):
        for rival in rivals:
            if rival not in seeds[0]["against"][ours]:
                continue
            row = [ours, rival]
            for score in _scores_compared(seeds):
                mean, error, word = compare(seeds, ours, rival, score)
                row.append(f"{mean:+.4f} ± {error:.4f}, {word}")
            rows.append(row)
    header = ["ours", "minus", "NLL", *(f"AUROC {name}, entropy" for name in outside)]
    return table(header, rows) + (
        "\n\nDifferences are paired over the test inputs and the seeds; ± is the standard error, of inputs and seeds. "
        f"Better and worse are beyond {CLEAR:g} of them and beyond {SMALL['nll']:g}; all else is level."
    )


def compare(seeds: Seeds, ours: str, rival: str, score: str) -> tuple[float, float, str]:
    """A difference, its standard error, and what to call it: ``"better"``, ``"level"`` or ``"worse"``.

    Args:
        seeds: results of each seed.
        ours: one of our contenders.
        rival: what it is compared with.
        score: ``"nll"``, or ``"auroc"`` and the name of a part out of distribution.
    """
    mean, error = together([seed["against"][ours][rival][score] for seed in seeds])
    kind = score.split(" ")[0]
    if abs(mean) <= max(CLEAR * error, SMALL[kind]):
        return mean, error, "level"
    return mean, error, "better" if (mean < 0) == (kind == "nll") else "worse"


def _sentences(seeds: Seeds) -> list[str]:
    """What the numbers say, in words that are chosen by them."""
    scaled, tempered = seeds[0]["against"]
    main = scaled.removesuffix(" + scale")
    words = {score: _words(seeds, scaled, score) for score in _scores_compared(seeds)}
    found = [
        f"By {'NLL' if score == 'nll' else score.replace('auroc', 'AUROC')}, `{scaled}` is {_said(said)}."
        for score, said in words.items()
    ]
    scale = statistics.median(seed["contenders"][scaled]["fitted"]["scale"] for seed in seeds)
    wide = "about right" if 0.8 <= scale <= 1.25 else "too wide" if scale < 0.8 else "too narrow"
    before, after = (statistics.fmean(seed["contenders"][name]["nll"] for seed in seeds) for name in (main, scaled))
    found.append(
        f"Its fitted scale is {scale:.2g}: by the validation labels the covariance of `{main}` is {wide}, and the scale "
        f"takes its NLL from {before:.3f} to {after:.3f}."
    )
    word = compare(seeds, tempered, "MAP + temperature", "nll")[2]
    than = "level with" if word == "level" else f"{word} than"
    found.append(f"Given a temperature as well, it is {than} MAP with a temperature.")
    forms = [
        name
        for name in seeds[0]["contenders"]
        if name in ("streamlined", "diagonal", "full") or (name.startswith(("low rank", "GLM (")) and "+" not in name)
    ]
    near = {name: statistics.fmean(seed["contenders"][name]["divergence"] for seed in seeds) for name in forms}
    few = statistics.fmean(seed["contenders"][_draws(seeds)[0]]["divergence"] for seed in seeds)
    order = sorted(near, key=near.__getitem__)
    found.append(
        f"As they are, the nearest to 100 draws is `{order[0]}` (KL {near[order[0]]:.4f}), the farthest `{order[-1]}` "
        f"({near[order[-1]]:.4f}); ten draws are {few:.4f} away."
    )
    found += _detection(seeds, main)
    found += _harder(seeds)
    found += _unwanted(seeds)
    if "MAP + temperature" in words["nll"].get("worse", ()):
        found.append(_why_worse(seeds, main, scaled, wide))
    return found


def _scores_compared(seeds: Seeds) -> tuple[str, ...]:
    return "nll", *(f"auroc {name}" for name in seeds[0]["sizes"]["ood"])


def _words(seeds: Seeds, ours: str, score: str) -> dict[str, list[str]]:
    """Rivals by what ours is beside them."""
    found: dict[str, list[str]] = {}
    for rival in seeds[0]["against"][ours]:
        found.setdefault(compare(seeds, ours, rival, score)[2], []).append(rival)
    return found


def _said(words: Mapping[str, Sequence[str]]) -> str:
    said = [f"{word} than {_listed(words[word])}" for word in ("better", "worse") if word in words]
    if "level" in words:
        said.append(f"level with {_listed(words['level'])}")
    return "; ".join(said)


def _draws(seeds: Seeds) -> list[str]:
    return [name for name in seeds[0]["contenders"] if name.startswith("Monte Carlo")]


def _detection(seeds: Seeds, main: str) -> list[str]:
    """Mutual information as a score of what is out of distribution."""
    found = []
    for part in seeds[0]["sizes"]["ood"]:
        names = [main, _draws(seeds)[-1], "streamlined", "diagonal"]
        names += [name for name in ("GLM (laplace-torch)", "GLM (linearised draws)") if name in seeds[0]["contenders"]]
        values = {
            name: 100 * statistics.fmean(seed["contenders"][name]["ood"][part]["information"] for seed in seeds)
            for name in names
        }
        said = ", ".join(f"{value:.1f} of `{name}`" for name, value in values.items())
        found.append(f"AUROC {part} by mutual information, without a scale: {said}.")
    return found


def _harder(seeds: Seeds) -> list[str]:
    """Whether validation and test part are alike."""
    # With the largest prior precision Monte Carlo is as good as MAP.
    val = statistics.fmean(list(seed["tried"].values())[-1] for seed in seeds)
    test = statistics.fmean(seed["contenders"]["MAP"]["nll"] for seed in seeds)
    if abs(val / test - 1) < 0.15:
        return []
    return [
        f"The validation part is {'harder' if val > test else 'easier'} than the test part (NLL of MAP about {val:.2f} "
        f"and {test:.2f}), so that what is fitted to it is too {'wide' if val > test else 'narrow'} for the test part."
    ]


def _unwanted(seeds: Seeds) -> list[str]:
    """Whether Monte Carlo would have no posterior at all."""
    edges = [seed for seed in seeds if seed["prior_precision"] >= max(float(precision) for precision in seed["tried"])]
    if not edges:
        return []
    tau = statistics.median(seed["contenders"]["MAP + temperature"]["fitted"]["temperature"] for seed in seeds)
    return [
        f"For {_count(len(edges), 'seed')} the largest prior precision is the best for Monte Carlo, which is as good as no "
        f"posterior: this network is hardly too sure (temperature {tau:.2f}), and there is little to win by one."
    ]


def _why_worse(seeds: Seeds, main: str, scaled: str, wide: str) -> str:
    """Why a scale is not enough against a temperature."""
    tempers = [seed["contenders"]["MAP + temperature"]["fitted"]["temperature"] for seed in seeds]
    tau = statistics.median(tempers)
    drawn = statistics.fmean(seed["contenders"][_draws(seeds)[-1]]["nll"] for seed in seeds)
    plain = statistics.fmean(seed["contenders"]["MAP + temperature"]["nll"] for seed in seeds)
    if tau < 1:
        return (
            f"This network is not sure enough (temperature {tau:.2f}): more variance can only make that worse, and a "
            "temperature is all that helps."
        )
    also = "so are 100 draws" if drawn > plain + SMALL["nll"] else "100 draws are not"
    return f"A temperature of {tau:.2f} alone does more for this network than the posterior does, and {also}: " + (
        "the fault is the posterior's shape, not the way of propagation."
        if drawn > plain + SMALL["nll"]
        else "that is the price of one Gaussian over logits for the draws."
    )


def _spread(found: Sequence[Mapping[str, Any]], value: Callable[[Any], float], digits: int) -> str:
    values = [value(one) for one in found]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
