"""Two moons, met one third at a time: paths beside inducing points, labels and their probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood
from torch import Tensor

from benchmarks.baselines import Streamed
from benchmarks.experiments import difference, draw_past, failures, over_seeds, run_of, scores_table, verdicts
from benchmarks.following import Chunk
from benchmarks.rivals import BatchRows, FixedRows, GradientPoints, Labels, Sited, random_rows
from examples.paths.run import two_moons
from gpseq.features import PathFeatures, SelectedPoints

SIZE, TASKS = 20, 3
STEPS, RATE = 1000, 0.01
#: Of the kernel, given: lengthscale and variance.
LENGTHSCALE, VARIANCE = 0.4, 10.0

OURS = ("path, by the key of the tasks", "path, kernel-greedy", "points, re-selected")
RIVALS = ("OSVGP, points optimised", "points of task 1, fixed")
SHOWN = ("path, by the key of the tasks", "points, re-selected", "OSVGP, points optimised", "points of task 1, fixed")


class _Sited(Labels, Sited):
    pass


class _Gradient(Labels, GradientPoints):
    pass


def run(smoke: bool) -> dict[str, Any]:
    """Three tasks by the first coordinate, half of each held out; the seed draws the moons and the initialisations."""
    steps = 10 if smoke else STEPS
    runs = []
    for seed in range(1 if smoke else 5):
        runs.append(run_of(_tasks(seed), _methods(seed, steps), seed=seed))
        print(f"seed {seed}: done", flush=True)
    return {"size": SIZE, "steps": steps, "rate": RATE, "seeds": runs}


def _tasks(seed: int) -> list[Chunk]:
    x, label = two_moons(600, 0.1, seed)
    parts = x[:, 0].argsort().tensor_split(TASKS)
    return [Chunk(x[p[::2]], label[p[::2]], x[p[1::2]], label[p[1::2]]) for p in parts]


def _methods(seed: int, steps: int) -> dict[str, Callable[[], Any]]:
    kernel, likelihood = ScaleKernel(RBFKernel()).double(), BernoulliLikelihood()
    kernel.base_kernel.lengthscale, kernel.outputscale = LENGTHSCALE, VARIANCE

    def sited(method: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: _Sited(method(), likelihood)

    def stream(features: Callable[[], Any]) -> Callable[[], Any]:
        return sited(lambda: Streamed(features(), kernel, likelihood))

    def batch(x: Tensor) -> Any:
        return random_rows(SIZE, seed)(x)

    return {
        "path, by the key of the tasks": stream(lambda: PathFeatures(SIZE, 2, ordering="oracle", key=0)),
        "path, kernel-greedy": stream(lambda: PathFeatures(SIZE, 2, ordering="kernel")),
        "points, re-selected": stream(lambda: SelectedPoints(SIZE, 2)),
        "OSVGP, points optimised": lambda: _Gradient(SIZE, kernel, likelihood, None, steps, seed, RATE),
        "points of task 1, fixed": sited(lambda: FixedRows(SIZE, kernel, likelihood)),
        "SVGP, all data": sited(lambda: BatchRows(batch, kernel, likelihood)),
    }


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """One table; the verdicts follow from the numbers."""
    runs = result["seeds"]
    text, facts = verdicts(runs, OURS, RIVALS, RIVALS[0], "accuracy")
    draw_past(runs, SHOWN, figures / "experiment_moons.png", "nlpd", "NLPD, held out")
    order = difference(runs, "path, by the key of the tasks", "path, kernel-greedy", "nlpd")
    selected = difference(runs, "points, re-selected", RIVALS[0], "nlpd")
    why = ""
    if order.verdict == "worse":
        why += (
            " By the key neighbours on the path lie on either moon in turn, so that f along it goes up and down and some of "
            "it is lost; the greedy path runs along one moon and then the other."
        )
    if selected.verdict == "worse":
        why += (
            " Re-selected points know nothing of the labels and spread out, where those of OSVGP move towards "
            f"the border between them (NLPD {selected.signed})."
        )
    fixed, batch = (over_seeds(runs, name, "accuracy", "end").mean for name in (RIVALS[1], "SVGP, all data"))
    return [
        "## Two moons in three tasks: labels and their probabilities",
        f"Synthetic, as in the paper: 600 points, three tasks by the first coordinate, every second point held out, M = "
        f"{result['size']}, five seeds of the moons and of the initialisations, means and 95 % t-intervals. Probit link, RBF "
        f"kernel (lengthscale {LENGTHSCALE}, variance {VARIANCE:g}, given) for all. Ours, the fixed points and the batch "
        f"fit update by natural-gradient steps on sites, `OSVGP` by {result['steps']} steps of Adam (rate "
        f"{result['rate']}) a task on q and the positions. GPyTorch's online conditioning is for Gaussian likelihoods only, "
        "so OVC is represented by the points of the first task, kept. `SVGP, all data` is fitted anew to all data so far "
        "on as many random rows. Times are those of the processor, in one thread.",
        scores_table(runs, "accuracy"),
        text,
        f"The key's order beside the greedy one: NLPD {order.signed} ({order.verdict}).{why} Points that stay where the first "
        f"third was end at an accuracy of {fixed:.3f}, the batch fit at {batch:.3f}.",
        "![NLPD of past tasks as the stream goes on, means over seeds, two moons](figures/experiment_moons.png)",
        "**In short.** " + " ".join(failures({"two moons": facts}, ours, "accuracy") for ours in OURS),
    ]
