"""A vision transformer of six blocks distilled into one probabilistic step, beside its teacher: clothes, and digits."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gpseq
from examples.reconfiguration.idea import draw_idea
from examples.uncertainty.network import BATCH, SmallViT, train
from gpseq import metrics, plots
from gpseq.datasets import load_images
from gpseq.nn.calibration import fit_temperature
from gpseq.reconfiguration import Distiller, calibrate_spread, path_nll

#: Blocks of the teacher, images in a step of the student's training, and draws of a prediction.
DEPTH, STEP, DRAWS = 6, 50, 10
TEACHER, TEMPERED, MEANS, OURS = "teacher", "one temperature", "student, means alone", f"student, {DRAWS} draws"
SCALED = "the same, calibrated"


@dataclass(frozen=True)
class Data:
    """Images with brightness 0 to 1; pairs are images and labels."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    digits: Tensor


def load(smoke: bool) -> Data:
    """The shipped subsets, in an order that is the same for every seed."""
    train, val, test, strange = (200, 50, 50, 25) if smoke else (4000, 500, 1000, 500)
    clothes, digits = load_images("fashion_mnist"), load_images("mnist")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(clothes), generator=generator)
    asked = torch.randperm(len(clothes.y_test), generator=generator)[:test]
    chosen = torch.randperm(len(digits.y_test), generator=generator)[:strange]
    x, y = clothes.x_train[order] / 255, clothes.y_train[order]
    return Data(
        train=(x[:train], y[:train]),
        val=(x[train : train + val], y[train : train + val]),
        test=(clothes.x_test[asked] / 255, clothes.y_test[asked]),
        digits=digits.x_test[chosen] / 255,
    )


@dataclass(frozen=True)
class Result:
    """What a model says of clothes and of digits, and how many parameters it has."""

    clothes: gpseq.Predictive
    digits: gpseq.Predictive
    parameters: int

    def row(self, name: str, y: Tensor) -> str:
        """A line of the table."""
        probs = self.clothes.probs()
        outside = metrics.ood_auroc(self.clothes.entropy(), self.digits.entropy()).item()
        return (
            f"{name:>20}  {metrics.accuracy(probs.argmax(-1), y).item():8.1%}"
            f"  {-self.clothes.log_prob(y).mean().item():6.3f}  {metrics.top_label_ece(probs, y).item():6.1%}"
            f"  {100 * outside:8.1f}  {self.parameters:10,}"
        )


def distil(teacher: nn.Module, data: Data, epochs: int, seed: int) -> Distiller:
    """A student that sees no labels: the divergence along its own path, and that of the teacher's probabilities."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    distiller = Distiller(teacher, task_loss="kd", weights={"path": 0.3})
    distiller.fit(DataLoader(TensorDataset(data.train[0]), STEP, shuffle=True, generator=order), epochs)
    return distiller


def parameters(*models: nn.Module) -> int:
    """How many there are."""
    return sum(value.numel() for model in models for value in model.parameters())


@torch.no_grad()
def compare(distiller: Distiller, data: Data) -> dict[str, Result]:
    """Teacher and student, before and after held-out labels: those give a temperature, and a factor of spreads."""
    teacher, student = distiller.teacher, distiller.student

    def certain(model: nn.Module, x: Tensor, tau: float = 1.0) -> gpseq.Predictive:
        return gpseq.Predictive.from_samples(torch.cat([model(part) for part in x.split(BATCH)])[None] / tau)

    def drawn(x: Tensor) -> gpseq.Predictive:
        generator = torch.Generator().manual_seed(1)
        return gpseq.predict(student, x, num_samples=DRAWS, batch_size=BATCH, generator=generator)

    held = certain(teacher, data.val[0]).samples
    assert held is not None
    tau = fit_temperature(held[0], data.val[1], torch.zeros(len(data.val[1]), 1)).a ** 0.5
    x = data.test[0]
    found = {
        TEACHER: Result(certain(teacher, x), certain(teacher, data.digits), parameters(teacher)),
        TEMPERED: Result(certain(teacher, x, tau), certain(teacher, data.digits, tau), parameters(teacher)),
        MEANS: Result(certain(student, x), certain(student, data.digits), parameters(student)),
        OURS: Result(drawn(x), drawn(data.digits), parameters(student)),
    }
    held_out = list(zip(data.val[0].split(BATCH), data.val[1].split(BATCH), strict=True))
    scale = calibrate_spread(student, held_out, DRAWS, torch.Generator().manual_seed(2))
    print(f"temperature of the teacher {tau:.2f}, spreads of the student times {scale:.2f}\n")
    return found | {SCALED: Result(drawn(x), drawn(data.digits), parameters(student))}


def main() -> None:
    """Train a teacher, distil it, compare both, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("build/examples/reconfiguration"), help="folder of the figures"
    )
    parser.add_argument("--smoke", action="store_true", help="one epoch, few images")
    parser.add_argument("--epochs", type=int, help="of the teacher, and of the student (default 15 and 10)")
    parser.add_argument("--seed", type=int, default=0, help="of both networks; images are the same for all")
    parser.add_argument("--checkpoint", type=Path, help="file from which the teacher's training goes on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.checkpoint is not None:
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    draw_idea(args.out / "idea.png")
    data = load(args.smoke)

    begun = time.perf_counter()
    teacher: SmallViT = train(*data.train, args.epochs or (1 if args.smoke else 15), args.seed, args.checkpoint, DEPTH)
    print(f"teacher: {time.perf_counter() - begun:.0f} s")
    begun = time.perf_counter()
    distiller = distil(teacher, data, args.epochs or (1 if args.smoke else 10), args.seed)
    print(f"student: {time.perf_counter() - begun:.0f} s")
    blocks, chain = parameters(*distiller.stack.blocks), parameters(distiller.rollout)
    print(f"blocks: {blocks:,} parameters; kernel and the last perceptron: {chain:,}, {chain / blocks:.0%} of them")

    with torch.no_grad():  # by the spread that was learnt, before it is scaled
        surprise = [
            torch.cat([path_nll(teacher, distiller.student, part).mean(-1) for part in x.split(BATCH)])
            for x in (data.test[0], data.digits)
        ]
    results = compare(distiller, data)
    print(f"{'':>20}  accuracy     NLL     ECE  OOD AUROC  parameters")
    for name, result in results.items():
        print(result.row(name, data.test[1]))

    print("\nAUROC of digits by other scores of the student")
    ours = results[OURS]
    scores = {
        "mutual information": (ours.clothes.mutual_information(), ours.digits.mutual_information()),
        "expected spread": (ours.clothes.scores["spread"], ours.digits.scores["spread"]),
        "path NLL": (surprise[0], surprise[1]),
    }
    for name, (inside, outside) in scores.items():
        print(f"{name:>20}  {100 * metrics.ood_auroc(inside, outside).item():.1f}")

    draw(args.out / "reconfiguration.png", results, scores["path NLL"], distiller.rollout.increments, data.test[1])
    print(f"figures: {args.out / 'reconfiguration.png'}, {args.out / 'idea.png'}")


def draw(path: Path, results: dict[str, Result], surprise: tuple[Tensor, Tensor], sizes: Tensor, y: Tensor) -> None:
    """The spread along the depth, how surprising the teacher's path is, and the reliability of both."""
    figure = plots.new_figure(11, 3.6)
    left, middle, right = figure.subplots(1, 3)
    ours = results[OURS]
    parts, colors = ["clothes", "digits"], [plots.BLUE, plots.VERMILION]
    plots.plot_depth_spread(left, [ours.clothes, ours.digits], parts, colors, sizes=sizes)
    left.legend(loc="upper left", frameon=False, fontsize=8)

    both = torch.cat(surprise)
    edges = torch.linspace(both.min().item(), both.max().item(), 32)
    for values, name, color in zip(surprise, parts, colors, strict=True):
        weights = torch.full_like(values, 100 / len(values))
        middle.hist(values, edges, weights=weights, color=color, alpha=0.55, label=name)
    plots.style_axes(middle, "path NLL [nats for a feature]", "images [%]")
    middle.legend(loc="upper left", frameon=False, fontsize=8)

    names = {TEACHER: "teacher", TEMPERED: "teacher, one temperature", SCALED: "student, calibrated"}
    for name, color in ((TEACHER, plots.ORANGE), (TEMPERED, plots.PINK), (SCALED, plots.GREEN)):
        bins = metrics.reliability_bins(results[name].clothes.probs(), y, num_bins=5)
        plots.plot_reliability(right, bins.confidence, bins.accuracy, bins.count, label=names[name], color=color)
    right.legend(loc="upper left", frameon=False, fontsize=8)
    plots.save_figure(figure, path)


if __name__ == "__main__":
    main()
