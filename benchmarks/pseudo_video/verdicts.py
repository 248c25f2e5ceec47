"""What the numbers say, and no more: differences between contenders over seeds, in words that are computed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pseudo_video.families import ALONE, FEW, MANY, TWINS
from examples.generative.frames import COPIES, FIRST, MATCHED, ONE_LATENT, STAR, UNTOLD

#: Contenders with corrupted frames; copies and images are controls.
TOLD = (FIRST, MATCHED, STAR)
#: Two-sided 97.5 % points of Student's t, by degrees of freedom.
T_POINTS = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
#: Accuracies that the classifier must reach for its features to be worth something.
ACCURACIES = {"mnist": 0.97, "fashion_mnist": 0.87}
#: Information, in nats, that counts as none.
NOTHING = 1e-8
#: The controls that a comparison must have, by family.
CONTROLS = {
    "hvae": (COPIES, ONE_LATENT, UNTOLD, MATCHED),
    "vq": (COPIES, FEW, MANY, MATCHED),
    "diffusion": (COPIES, ALONE, MATCHED),
}

Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Of the Fréchet distances of two contenders; positive where the first is farther from real images.

    Attributes:
        mean: of the first minus that of the second.
        half: of a 95 % interval by Welch's t; ``None`` for one seed.
    """

    mean: float
    half: float | None

    @property
    def word(self) -> str:
        """Better, worse, or neither, by whether the interval holds 0."""
        if self.half is None:
            return "one seed, no verdict"
        if abs(self.mean) <= self.half:
            return "no clear difference"
        return "worse" if self.mean > 0 else "better"

    def __str__(self) -> str:
        half = "" if self.half is None else f" ± {self.half:.1f}"
        return f"{self.mean:+.1f}{half} ({self.word})"


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two contenders over seeds.

    Args:
        first: scores.
        second: scores.
    """
    mean = statistics.fmean(first) - statistics.fmean(second)
    if min(len(first), len(second)) < 2:
        return Difference(mean, None)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Difference(mean, 0.0)
    # Welch and Satterthwaite; rounded down, so that the interval is rather too wide.
    freedom = error**4 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return Difference(mean, T_POINTS[max(1, min(10, math.floor(freedom + 1e-9)))] * error)


def distances(runs: Runs) -> list[float]:
    """Of all seeds."""
    return [run["frechet"] for run in runs]


def comparisons(family: str, found: Mapping[str, Runs]) -> list[tuple[str, str, Difference]]:
    """Contenders with frames, and copies, against each image model; then the chain against its matched star.

    Args:
        family: of the contenders.
        found: runs of each.
    """
    rows = [
        (name, twin, difference(distances(found[name]), distances(found[twin])))
        for twin in TWINS[family]
        for name in (*TOLD, COPIES)
        if found.get(name) and found.get(twin)
    ]
    if found.get(FIRST) and found.get(MATCHED):
        rows.append((FIRST, MATCHED, difference(distances(found[FIRST]), distances(found[MATCHED]))))
    return rows


def outcome(datasets: Mapping[str, Any]) -> str:
    """What came of the hypothesis, counted.

    Args:
        datasets: of the result.
    """
    words = [
        gap.word
        for part in datasets.values()
        for family, found in part["families"].items()
        for name, twin, gap in comparisons(family, found)
        if name in TOLD and twin in TWINS[family]
    ]
    total = len(words)
    counted = {word: words.count(word) for word in ("better", "worse", "no clear difference")}
    if not sum(counted.values()):
        return f"**Outcome.** {total} comparisons of one seed each: no verdict."
    text = (
        f"**Outcome.** Corrupted frames against an image model of the same family, {total} comparisons: better in "
        f"{counted['better']}, worse in {counted['worse']}, no clear difference in {counted['no clear difference']}. "
    )
    if not counted["better"]:
        text += "At this size no gain from pseudo-videos was found"
        text += f", and in {counted['worse']} of {total} they cost quality." if counted["worse"] else "."
    elif counted["worse"]:
        text += "The sign depends on the family, the data and the frames, so no general gain is shown."
    else:
        text += "Where there is a difference, it is a gain."
    every = [gap for part in datasets.values() for family, found in part["families"].items()
             for name, twin, gap in comparisons(family, found) if (name, twin) == (FIRST, MATCHED)]  # fmt: skip
    told = ", ".join(
        f"{sum(gap.word == word for gap in every)} {text_}"
        for word, text_ in (
            ("better", "better"),
            ("worse", "worse"),
            ("no clear difference", "without clear difference"),
        )
    )
    return text + (f" First order against its matched star: {told}." if every else "")


def goals(result: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """What the experiment asks of itself: goal, what was reached, and whether it was met.

    Args:
        result: of the experiment.
    """
    rows = []
    for dataset, part in result["datasets"].items():
        title, accuracy = part["title"], part["classifier"]["accuracy"]
        needed = ACCURACIES[dataset]
        rows.append((f"{title}: classifier above {needed:.0%}", f"{accuracy:.1%}", accuracy > needed))
        information = part["information"]
        gain = information["markov"]["gain"]
        rows.append((f"{title}: first order gains no information", f"{gain:.1e} nats", abs(gain) < NOTHING))
        for order, words in (("star", "star"), ("matched", "matched star")):
            gain = information[order]["gain"]
            rows.append((f"{title}: {words} gains information", f"{gain:.2f} nats", gain > NOTHING))
        for family, found in part["families"].items():
            least = min(len(found.get(name, ())) for name in CONTROLS[family])
            rows.append((f"{title}, {family}: all controls, three seeds", f"{least}", least >= 3))
            sizes = {runs[0]["parameters"] for name, runs in found.items() if runs and name != ONE_LATENT}
            spread = max(sizes) / min(sizes) - 1 if sizes else math.inf
            rows.append((f"{title}, {family}: parameters within 10 %", f"{spread:.1%} apart", spread < 0.1))
            best = [gap for name, twin, gap in comparisons(family, found) if name in TOLD and twin in TWINS[family]]
            gained = [gap.word for gap in best].count("better")
            rows.append(
                (f"{title}, {family}: frames beat every image model", f"{gained} of {len(best)} better",
                 bool(best) and gained == len(best))
            )  # fmt: skip
    return rows
