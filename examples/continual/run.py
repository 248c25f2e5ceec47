"""Classes that come two at a time: what a streamed GP and a trained head still know of the first ones at the end."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, FixedNoiseGaussianLikelihood
from gpytorch.means import ConstantMean
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from examples.paths.run import two_moons
from gpseq import datasets, metrics, plots
from gpseq.continual import EWC, Evaluation, Task, TaskStream, evaluate, tasks_by_class, tasks_by_key
from gpseq.features import InducingPoints, PathFeatures
from gpseq.features.selected import select_points
from gpseq.models import StreamingGP

CLASSES = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
NUM_CLASSES = 10
NUM_FEATURES = 32
#: Inducing points of the GP, and examples that a replay buffer may keep.
SIZE = 200
#: In median distances within the first task; chosen on the stream of the *source* images (benchmarks/digits.py).
LENGTHSCALE = 1.0
#: Of EWC; the best of a coarse grid on the very stream that is scored, which favours it.
STRENGTHS = {"separate": 1000.0, "online": 1000.0}
#: Dirichlet classification: what is added to each count of a label, and the variance of each log count.
ALPHA, VARIANCE = 0.01, 10.0

MOON_SIZE, MOON_TASKS = 20, 3


# ---- frozen features


def frozen_features(source: datasets.Images, seed: int, epochs: int) -> Callable[[Tensor], Tensor]:
    """A small convolutional network trained on other images, then frozen.

    Its convolutions are trained with a linear classifier of the source's classes on top; what is kept of their output
    are the leading principal components over the source images.

    Returns:
        A function from images ``(n, 28, 28)`` uint8 to features ``(n, 32)`` float64.
    """
    generator = torch.Generator().manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    head = nn.Sequential(nn.Linear(32 * 49, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES))
    network = nn.Sequential(body, head)
    initialise(network, generator)
    x, y = _brightness(source.x_train), source.y_train
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad()
            cross_entropy(network(x[batch]), y[batch]).backward()
            optimiser.step()
    body.requires_grad_(False).eval()
    outputs = body(x).double()
    center = outputs.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(outputs.T))
    directions = vectors[:, -NUM_FEATURES:].flip(-1)
    scale = values[-NUM_FEATURES:].mean().sqrt()  # one for all, or small directions would count like large ones
    return lambda images: (body(_brightness(images)).double() - center) @ directions / scale


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """torch's own initialisation draws from the global generator only."""
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
        nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)


def _brightness(images: Tensor) -> Tensor:
    return images.unsqueeze(-3).float() / 255


def split(images: datasets.Images, features: Callable[[Tensor], Tensor]) -> TaskStream:
    """Five tasks of two classes each, in the feature space."""
    test = features(images.x_test), images.y_test
    return tasks_by_class(features(images.x_train), images.y_train, CLASSES, test=test)


# ---- learners: each has learn(task) and probabilities(x)


class StreamedGP:
    """Ten GPs side by side, one a class, over one memory: Dirichlet classification in closed form.

    The label of an example becomes ten noisy observations of log counts, with the noise that matches their moments.
    The inducing points are chosen anew at each task, from the old ones and the new inputs.
    """

    def __init__(self, size: int = SIZE, lengthscale: float = LENGTHSCALE, seed: int = 0) -> None:
        self.size, self.lengthscale, self.seed = size, lengthscale, seed
        self.model: StreamingGP | None = None

    def learn(self, task: Task) -> None:
        """One update: no passes over the data, no learning rate."""
        if self.model is None:
            self._begin(task.x)
        else:
            points = torch.cat([self.model.features.points, task.x])
            self.model.rebase(InducingPoints(points[select_points(self.one, points, self.size)]))
        counts = one_hot(task.y, NUM_CLASSES).T + ALPHA
        noise = (1 / counts + 1).log()
        self.model.update(task.x, counts.log() - noise / 2, noise=noise)

    def _begin(self, x: Tensor) -> None:
        # In units of the median distance between inputs of the first task, all that is known by then.
        batch = torch.Size([NUM_CLASSES])
        lengthscale = self.lengthscale * torch.pdist(x[:1000]).median().item()
        self.one = RBFKernel().double()  # the ten kernels are alike, so that one chooses points for all
        kernel = ScaleKernel(RBFKernel(batch_shape=batch), batch_shape=batch).double()
        self.one.lengthscale = kernel.base_kernel.lengthscale = lengthscale
        kernel.outputscale = VARIANCE
        mean = ConstantMean(batch_shape=batch).double()
        mean.constant = torch.full(batch, math.log(ALPHA) - 0.5 * math.log(1 / ALPHA + 1))  # no label seen
        likelihood = FixedNoiseGaussianLikelihood(torch.ones(1).double())
        points = x[select_points(self.one, x, self.size)]
        self.model = StreamingGP(InducingPoints(points), kernel, likelihood, mean, transfer="vfe").eval()

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """``(n, 10)``, from samples of the log counts."""
        assert self.model is not None
        f = self.model(x)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(200, *f.mean.shape, generator=generator, dtype=f.mean.dtype)
        return (f.mean + f.variance.sqrt() * noise).softmax(-2).mean(0).T


class TrainedHead:
    """A linear softmax head on the same features, trained by Adam task after task.

    Args:
        seed: of the initialisation, the batches and the Fisher information.
        mode: ``None``, or that of EWC.
        strength: of EWC.
        replay: examples that are kept, as many of each class seen, and trained on along with every later task.
        epochs: passes over each task.
    """

    def __init__(
        self, seed: int = 0, mode: str | None = None, strength: float = 0.0, replay: int = 0, epochs: int = 20
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES).double()
        initialise(self.head, self.generator)
        self.ewc = EWC(self.head, strength, mode, num_samples=None, chunk_size=600) if mode is not None else None
        self.replay, self.epochs = replay, epochs
        self.kept: tuple[Tensor, Tensor] | None = None

    def learn(self, task: Task) -> None:
        """Gradient steps on this task, then consolidation or a choice of what to keep."""
        x, y = task.x, task.y
        optimiser = torch.optim.Adam(self.head.parameters(), lr=1e-2)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(x), generator=self.generator).split(64):
                optimiser.zero_grad()
                loss = cross_entropy(self.head(x[batch]), y[batch])
                if self.kept is not None:
                    loss = loss + cross_entropy(self.head(self.kept[0]), self.kept[1])
                if self.ewc is not None:
                    loss = loss + self.ewc.penalty()
                loss.backward()
                optimiser.step()
        if self.ewc is not None:
            self.ewc.consolidate([x])
        if self.replay:
            both = (x, y) if self.kept is None else (torch.cat([self.kept[0], x]), torch.cat([self.kept[1], y]))
            rows = torch.randperm(len(both[1]), generator=self.generator)
            share = self.replay // len(both[1].unique())
            rows = torch.cat([rows[both[1][rows] == label][:share] for label in both[1].unique()])
            self.kept = both[0][rows], both[1][rows]

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """``(n, 10)``."""
        return self.head(x).softmax(-1)


Learner = StreamedGP | TrainedHead


def learners(
    seed: int, strengths: dict[str, float] = STRENGTHS, lengthscale: float = LENGTHSCALE
) -> dict[str, Learner]:
    """The methods of the comparison."""
    return {
        "streamed GP": StreamedGP(seed=seed, lengthscale=lengthscale),
        "head, plain": TrainedHead(seed),
        "head, EWC": TrainedHead(seed, "separate", strengths["separate"]),
        "head, online EWC": TrainedHead(seed, "online", strengths["online"]),
        "head, replay": TrainedHead(seed, replay=SIZE),
    }


def score(learner: Learner, task: Task) -> dict[str, float]:
    """Among all ten classes (class-incremental), and among the two of the task (task-incremental)."""
    probability = learner.probabilities(task.x_test)
    labels = task.y.unique()
    told = labels[probability[:, labels].argmax(-1)]
    return {
        "accuracy": metrics.accuracy(probability.argmax(-1), task.y_test).item(),
        "accuracy, task known": metrics.accuracy(told, task.y_test).item(),
        "nlpd": metrics.categorical_nlpd(probability, task.y_test).item(),
    }


def follow(tasks: Sequence[Task], learner: Learner) -> Evaluation:
    """Learn the tasks in turn and score all that were learnt after each."""
    return evaluate(
        tasks,
        learn=learner.learn,
        score=lambda task: score(learner, task),
        higher_is_better={"accuracy, task known": True},
    )


@dataclass(frozen=True)
class Joint:
    """All tasks at once, in random order."""

    x: Tensor
    y: Tensor


def jointly(tasks: Sequence[Task], learner: Learner) -> dict[str, float]:
    """Mean scores over the tasks of a learner that meets all data at once: the ceiling."""
    learner.learn(Joint(torch.cat([task.x for task in tasks]), torch.cat([task.y for task in tasks])))  # type: ignore
    scores = [score(learner, task) for task in tasks]
    return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


# ---- two moons


def follow_moons(ax: Any, num: int, seed: int, resolution: int) -> Evaluation:
    """Three tasks by the first coordinate, half of each held out; the decision at the end."""
    x, label = two_moons(num, 0.15, seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = tasks_by_key(x, label, MOON_TASKS, key=0, held_out=0.5, generator=generator, order="given")
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.4, 10.0
    model = StreamingGP(PathFeatures(MOON_SIZE, 2), kernel, BernoulliLikelihood()).eval()

    def score(task: Task) -> dict[str, float]:
        with torch.no_grad():
            probability = model.likelihood(model(task.x_test)).mean
        return {
            "accuracy": metrics.accuracy((probability > 0.5).double(), task.y_test).item(),
            "nlpd": metrics.bernoulli_nlpd(probability, task.y_test).item(),
        }

    found = evaluate(tasks, learn=lambda task: model.update(task.x, task.y), score=score)
    columns, rows = (torch.linspace(*ends, resolution, dtype=torch.float64) for ends in ((-1.6, 2.6), (-1.2, 1.7)))
    with torch.no_grad():
        probability = model.likelihood(model(torch.cartesian_prod(rows, columns).flip(-1))).mean
    learnt = torch.cat([task.rows for task in tasks])
    plots.plot_decision(ax, x[learnt], label[learnt], (columns, rows), probability.reshape(resolution, resolution))
    for task in tasks[1:]:
        ax.axvline(task.x[:, 0].min(), color="0.4", linewidth=0.8, linestyle=(0, (4, 2)))
    plots.style_axes(ax, "$x_1$", "$x_2$")
    plots.legend_above(ax)
    return found


def main() -> None:
    """Run both streams, print the scores, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/continual"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the network, the heads and the moons")
    parser.add_argument("--smoke", action="store_true", help="fewer tasks and epochs, and a coarse figure")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    features = frozen_features(datasets.load_images("fashion_mnist"), args.seed, epochs=1 if args.smoke else 3)
    tasks = split(datasets.load_images("mnist"), features)[: 2 if args.smoke else None]
    matrices = {}
    print(f"{len(tasks)} tasks of digits, {sum(len(task.y) for task in tasks)} images; means over tasks at the end")
    for name, learner in learners(args.seed).items():
        found = follow(tasks, learner)
        matrices[name] = found.scores["accuracy"].values
        line = ", ".join(f"{key} {matrix.average[-1]:.3f}" for key, matrix in found.scores.items())
        forgotten = found.scores["accuracy"].average_forgetting[-1]
        print(f"{name:>18}: {line}; forgotten {forgotten:.3f}; learning took {found.seconds.sum():.1f} s")
    for name, learner in {"GP": StreamedGP(seed=args.seed), "head": TrainedHead(args.seed)}.items():
        ceiling = jointly(tasks, learner)
        print(f"{name + ', all at once':>18}: " + ", ".join(f"{key} {value:.3f}" for key, value in ceiling.items()))

    figure = plots.new_figure(11, 6.0)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    axes = list(above.subplots(1, 3)) + list(below.subplots(1, 3, width_ratios=[1, 1, 1.2]))
    moons = axes.pop()
    plots.plot_task_scores(axes[:3], dict(list(matrices.items())[:3]), tasks.names)
    plots.plot_task_scores(axes[3:], dict(list(matrices.items())[3:]), tasks.names)
    found = follow_moons(moons, 200 if args.smoke else 600, args.seed, 30 if args.smoke else 120)
    print(f"two moons, accuracy on each task after the last: {found.scores['accuracy'].values[-1].tolist()}")
    path = args.out / "continual.png"
    plots.save_figure(figure, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
