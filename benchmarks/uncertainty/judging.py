"""What is measured of a contender, and which of the goals it meets."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.uncertainty.tasks import Part, Task
from gpseq import metrics

#: Test inputs that are predicted once more, for the time.
TIMED = 1_000


@dataclass(frozen=True)
class Answer:
    """What a contender says of inputs.

    Attributes:
        log_probs: ``(n, C)``.
        scores: ``(n,)`` each, higher for inputs that look less like those of training.
    """

    log_probs: Tensor
    scores: dict[str, Tensor]


Predictor = Callable[[Tensor], Answer]


def judge(task: Task, predict: Predictor) -> dict[str, Any]:
    """All scores of one contender on one task.

    Returns:
        ``test``: scores of labels; ``shifted``: the same of each part; ``shifted_mean``: over the parts; ``ood``: for
        each part and score AUROC, AUPR of the outsiders and FPR95; ``bins``: reliability on the test part;
        ``seconds_per_item``: process time of predicting test inputs once more.
    """
    answer = predict(task.test.inputs)
    timed = task.test.inputs[:TIMED].clone()  # so that nothing that is kept of the inputs serves
    begun = time.process_time()
    predict(timed)
    seconds = (time.process_time() - begun) / len(timed)
    shifted = {name: labelled(predict(part.inputs), part) for name, part in task.shifted.items()}
    outside = {name: predict(part.inputs) for name, part in task.ood.items()}
    return {
        "test": labelled(answer, task.test),
        "shifted": shifted,
        "shifted_mean": {
            key: statistics.fmean(part[key] for part in shifted.values())
            for key in (next(iter(shifted.values())) if shifted else ())
        },
        "ood": {
            part: {score: detected(answer.scores[score], other.scores[score]) for score in answer.scores}
            for part, other in outside.items()
        },
        "bins": _bins(answer, task.test),
        "seconds_per_item": seconds,
    }


def labelled(answer: Answer, part: Part) -> dict[str, float]:
    """Scores on a labelled part: accuracy, nll, brier, ece (top label), class_ece (mean over the classes), aurc."""
    assert part.labels is not None
    p, y = _probability(answer), part.labels
    confidence, predicted = p.max(-1)
    return {
        "accuracy": metrics.accuracy(predicted, y).item(),
        "nll": -answer.log_probs.double().gather(-1, y.unsqueeze(-1)).mean().item(),
        "brier": metrics.brier_score(p, y).item(),
        "ece": metrics.top_label_ece(p, y, 15).item(),
        "class_ece": metrics.class_averaged_ece(p, y, 15).item(),
        "aurc": metrics.aurc(-confidence, predicted != y).item(),
    }


def detected(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """How well a score tells outsiders: AUROC, AUPR (outsiders positive) and FPR95."""
    inside, outside = inside.double(), outside.double()
    return {
        "auroc": metrics.ood_auroc(inside, outside).item(),
        "aupr": metrics.ood_aupr(inside, outside).item(),
        "fpr95": metrics.ood_fpr(inside, outside).item(),
    }


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of the predicted classes, ``(n,)``, in nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


def averaged(log_probs: Tensor, **scores: Tensor) -> Answer:
    """The answer of draws ``(S, n, C)``, whose probabilities are averaged; with entropy and mutual information."""
    mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    total = entropy(mean)
    information = total - entropy(log_probs).mean(0)
    return Answer(mean, {"entropy": total, "mutual information": information, **scores})


def plain(log_probs: Tensor, **scores: Tensor) -> Answer:
    """The answer of one pass, with its entropy."""
    return Answer(log_probs, {"entropy": entropy(log_probs), **scores})


# --- goals ------------------------------------------------------------------------------------------------------------

#: Results of one seed: what :func:`judge` says of each contender.
Judged = Mapping[str, Mapping[str, Any]]


def auroc(judged: Mapping[str, Any], score: str = "entropy") -> float:
    """AUROC of a score, averaged over the parts out of distribution; of several kinds of draws' scores take one."""
    return statistics.fmean(part[score]["auroc"] for part in judged["ood"].values())


@dataclass(frozen=True)
class Goal:
    """Something to be better at.

    Attributes:
        text: what is asked.
        margin: from the results of a seed and the names of our one-pass, sampled and mean-only contenders to by how much the goal
            is exceeded; negative where it is missed.
        needs: ``"shifted"`` or ``"ood"`` where the task has to have such parts.
    """

    text: str
    margin: Callable[[Judged, str, str, str], float]
    needs: str | None = None


def _test(seed: Judged, name: str, key: str) -> float:
    return float(seed[name]["test"][key])


def _beats(rival: str, score: str = "entropy") -> Callable[[Judged, str, str, str], float]:
    return lambda s, ours, drawn, mean: auroc(s[ours]) - auroc(s[rival], score)


GOALS = (
    Goal(
        "accuracy at least MLE's less 0.3 points",
        lambda s, ours, drawn, mean: _test(s, ours, "accuracy") - _test(s, "MLE", "accuracy") + 0.003,
    ),
    Goal(
        "NLL at most that of MLE with a temperature",
        lambda s, ours, drawn, mean: _test(s, "MLE + temperature", "nll") - _test(s, ours, "nll"),
    ),
    Goal(
        "ECE at most MC dropout's plus 0.5 points",
        lambda s, ours, drawn, mean: _test(s, "MC dropout", "ece") + 0.005 - _test(s, ours, "ece"),
    ),
    Goal(
        "mean ECE under shift at most the ensemble's",
        lambda s, ours, drawn, mean: s["ensemble of 5"]["shifted_mean"]["ece"] - s[ours]["shifted_mean"]["ece"],
        "shifted",
    ),
    Goal(
        "mean accuracy under shift at least MLE's less 1 point",
        lambda s, ours, drawn, mean: s[ours]["shifted_mean"]["accuracy"] - s["MLE"]["shifted_mean"]["accuracy"] + 0.01,
        "shifted",
    ),
    Goal("OOD AUROC by entropy above MLE's by entropy", _beats("MLE"), "ood"),
    Goal("OOD AUROC by entropy above MLE's by energy", _beats("MLE", "energy"), "ood"),
    Goal("OOD AUROC by entropy above MC dropout's", _beats("MC dropout"), "ood"),
    Goal("OOD AUROC by entropy above last-layer Laplace's", _beats("last-layer Laplace"), "ood"),
    Goal(
        "OOD AUROC by entropy at least half-way from MLE to the ensemble",
        lambda s, ours, drawn, mean: auroc(s[ours]) - (auroc(s["MLE"]) + auroc(s["ensemble of 5"])) / 2,
        "ood",
    ),
    Goal(
        "NLL of sampled passes below that of the mean alone",
        lambda s, ours, drawn, mean: _test(s, mean, "nll") - _test(s, drawn, "nll"),
    ),
)


def verdicts(
    seeds: Sequence[Judged], ours: str = "GP", drawn: str = "GP, sampled", mean: str = "GP, mean only"
) -> list[dict[str, Any]]:
    """By how much each goal is exceeded, paired over the seeds, with a 95 % t interval of the mean.

    Args:
        seeds: results of each seed.
        ours: the contender that is judged.
        drawn: the one whose sampled passes are judged.
        mean: its mean alone.

    Returns:
        For each goal ``goal``, ``difference`` (positive where it is exceeded), ``low``, ``high``, ``seeds``, and
        ``met``: ``"yes"`` where the whole interval is at 0 or above, ``"no"`` where it is below, ``"open"`` where it
        has 0 inside. Goals that need parts which the task lacks, or contenders that were not run, are left out.
    """
    made = []
    for goal in GOALS:
        if goal.needs is not None and not seeds[0][ours][goal.needs]:
            continue
        try:
            margins = [goal.margin(seed, ours, drawn, mean) for seed in seeds]
        except KeyError:  # of a contender that was not run
            continue
        middle, low, high = interval(margins)
        met = "yes" if low >= 0 else "no" if high < 0 else "open"
        made.append(
            {"goal": goal.text, "difference": middle, "low": low, "high": high, "seeds": len(margins), "met": met}
        )
    return made


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its t interval; all the line for one value."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _probability(answer: Answer) -> Tensor:
    p = answer.log_probs.double().exp()
    return p / p.sum(-1, keepdim=True)


def _bins(answer: Answer, part: Part) -> dict[str, list[float | None]]:
    assert part.labels is not None
    bins = metrics.reliability_bins(_probability(answer), part.labels, 15)
    return {
        name: [value if math.isfinite(value) else None for value in getattr(bins, name).tolist()]
        for name in ("confidence", "accuracy", "count", "edges")
    }
