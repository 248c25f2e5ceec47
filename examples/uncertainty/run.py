"""A trained transformer learns where its training data were: clothes, worse and worse pictures of them, and digits."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gpseq
from examples.uncertainty.network import BATCH, train
from gpseq import metrics, plots
from gpseq.datasets import CORRUPTIONS, corrupt, load_images
from gpseq.nn.calibration import fit_temperature

#: Severities of corruption, 0 being none, and passes with dropout on.
SEVERITIES, PASSES = (0, 1, 3, 5), 10
PLAIN, SCALED, DROPOUT, OURS = "as it is", "one temperature", "MC dropout, 10 passes", "variance temperature"
COLOURS = {PLAIN: plots.VERMILION, SCALED: plots.ORANGE, DROPOUT: plots.GREEN, OURS: plots.BLUE}


@dataclass(frozen=True)
class Answer:
    """What a method says of n images.

    Attributes:
        prediction: logits, one draw or several.
        score: ``(n,)``, another score than the entropy for how strange an image is; ``None`` where there is none.
        score_name: what it is.
    """

    prediction: gpseq.Predictive
    score: Tensor | None = None
    score_name: str = ""


Method = Callable[[Tensor], Answer]


@dataclass(frozen=True)
class Data:
    """Images with brightness 0 to 1; pairs are images and labels."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    some: tuple[Tensor, Tensor]  # of the test images, those that are corrupted
    digits: Tensor
    classes: tuple[str, ...]


def load(smoke: bool) -> Data:
    """The shipped subsets, in an order that is the same for every seed."""
    sizes = (400, 100, 100, 20, 50) if smoke else (5000, 1000, 2000, 400, 1000)
    clothes, digits = load_images("fashion_mnist"), load_images("mnist")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(clothes), generator=generator)
    asked = torch.randperm(len(clothes.y_test), generator=generator)
    strange = torch.randperm(len(digits.y_test), generator=generator)[: sizes[4]]

    def rows(x: Tensor, y: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return x[chosen] / 255, y[chosen]

    return Data(
        train=rows(clothes.x_train, clothes.y_train, order[: sizes[0]]),
        val=rows(clothes.x_train, clothes.y_train, order[sizes[0] : sizes[0] + sizes[1]]),
        test=rows(clothes.x_test, clothes.y_test, asked[: sizes[2]]),
        some=rows(clothes.x_test, clothes.y_test, asked[: sizes[3]]),
        digits=digits.x_test[strange] / 255,
        classes=clothes.classes,
    )


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches."""
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits ``(n, 10)``, some images at a time."""
    return torch.cat([model(part) for part in x.split(BATCH)])


def as_it_is(model: nn.Module) -> Method:
    """The network's own probabilities, and the energy of its logits."""

    def answer(x: Tensor) -> Answer:
        logits = logits_of(model, x)
        return Answer(gpseq.Predictive.from_samples(logits[None]), -logits.logsumexp(-1), "energy")

    return answer


def one_temperature(model: nn.Module, data: Data) -> Method:
    """Logits over one number, fitted on the validation images: b = 0, as there is no variance to say anything."""
    x, y = data.val
    tau = fit_temperature(logits_of(model, x), y, torch.zeros(len(y), 1)).a ** 0.5
    print(f"one temperature: {tau:.2f}")
    return lambda x: Answer(gpseq.Predictive.from_samples(logits_of(model, x)[None] / tau))


def mc_dropout(model: nn.Module) -> Method:
    """Passes with dropout on, probabilities averaged."""

    def answer(x: Tensor) -> Answer:
        model.train()
        p = gpseq.Predictive.from_samples(torch.stack([logits_of(model, x) for _ in range(PASSES)]))
        model.eval()
        return Answer(p, p.mutual_information(), "mutual information")

    return answer


def variance_temperature(model: nn.Module, data: Data) -> Method:
    """Gaussian processes in a copy of the network, which is given what it needs to know; then one pass."""
    model = copy.deepcopy(model)
    begun = time.perf_counter()
    gpseq.nn.fit_covariance(model, data.train[0][:2000].split(BATCH))
    found = gpseq.nn.calibrate(model, batches(*data.val))
    print(f"covariances and scalars: {time.perf_counter() - begun:.1f} s")
    print(f"tau^2 = {found.a:.3f} + {found.b:.3f} mean v^{found.power}; NLL of {found.num_labels} validation labels")
    print(
        f"  {found.nlpd_before:.3f} before, {found.nlpd_temperature:.3f} with one temperature, {found.nlpd:.3f} with it"
    )
    gpseq.nn.diagnose(model, [data.val[0][:200]])

    @torch.no_grad()
    def answer(x: Tensor) -> Answer:
        p = gpseq.predict(model, x, method="variance_temperature", batch_size=BATCH)
        return Answer(p, p.scores["variance"], "variance")

    return answer


def scores(p: gpseq.Predictive, y: Tensor) -> tuple[float, float, float]:
    """Accuracy, negative log likelihood in nats, expected calibration error."""
    probs = p.probs()
    return (
        metrics.accuracy(probs.argmax(-1), y).item(),
        -p.log_prob(y).mean().item(),
        metrics.top_label_ece(probs, y).item(),
    )


def corrupted(data: Data, kind: str, severity: int) -> Tensor:
    """The same images, worse."""
    return corrupt(data.some[0], kind, severity, torch.Generator().manual_seed(1))


def main() -> None:
    """Train, fit, compare four ways to be unsure, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/uncertainty"), help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="one epoch, few images")
    parser.add_argument("--epochs", type=int, help="of the training (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the network; images are the same for all")
    parser.add_argument("--checkpoint", type=Path, help="file from which a run that was stopped goes on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.checkpoint is not None:
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    data = load(args.smoke)

    begun = time.perf_counter()
    model = train(*data.train, args.epochs or (1 if args.smoke else 20), args.seed, args.checkpoint)
    print(f"training: {time.perf_counter() - begun:.0f} s")
    methods = {
        PLAIN: as_it_is(model),
        SCALED: one_temperature(model, data),
        DROPOUT: mc_dropout(model),
        OURS: variance_temperature(model, data),
    }

    print(f"\n{'':>22}  {'test':^24}  {'corrupted':^15}  AUROC of digits by")
    print(f"{'':>22}  accuracy     NLL     ECE  accuracy    ECE  entropy")
    clothes, digits, by_severity = {}, {}, {}
    for name, method in methods.items():
        clothes[name], digits[name] = method(data.test[0]), method(data.digits)
        # Where nothing is done to the images, all kinds are the same.
        found = {
            severity: [
                scores(method(corrupted(data, kind, severity)).prediction, data.some[1])
                for kind in (CORRUPTIONS if severity else ["noise"])
            ]
            for severity in SEVERITIES
        }
        by_severity[name] = [sum(ece for _, _, ece in found[s]) / len(found[s]) for s in SEVERITIES]
        worse = [score for severity in SEVERITIES[1:] for score in found[severity]]
        right, _, off = (sum(column) / len(worse) for column in zip(*worse, strict=True))
        accuracy, nll, ece = scores(clothes[name].prediction, data.test[1])
        inside, outside = clothes[name], digits[name]
        detected = metrics.ood_auroc(inside.prediction.entropy(), outside.prediction.entropy())
        line = f"{name:>22}  {accuracy:8.1%}  {nll:6.3f}  {ece:6.1%}  {right:8.1%}  {off:5.1%}  {100 * detected:7.1f}"
        if inside.score is not None and outside.score is not None:
            line += f", {inside.score_name} {100 * metrics.ood_auroc(inside.score, outside.score):.1f}"
        print(line)

    path = args.out / "uncertainty.png"
    draw(path, data, methods[OURS], clothes, digits, by_severity)
    print(f"figure: {path}")


def draw(
    path: Path,
    data: Data,
    ours: Method,
    clothes: dict[str, Answer],
    digits: dict[str, Answer],
    by_severity: dict[str, list[float]],
) -> None:
    """Entropies before and after, calibration as images get worse, and what the variance says of six images."""
    figure = plots.new_figure(11, 4.6)
    panels = figure.subplot_mosaic("ACDE;ACDE;ACFG;BCFG;BCHI;BCHI", width_ratios=[3.4, 3.4, 1.2, 1.2])
    edges = torch.linspace(0, math.log(10), 24)
    for panel, name in (("A", PLAIN), ("B", OURS)):
        ax = panels[panel]
        for answers, label, color in ((clothes, "clothes", plots.BLUE), (digits, "digits", plots.VERMILION)):
            entropy = answers[name].prediction.entropy()
            weights = torch.full_like(entropy, 100 / len(entropy))
            ax.hist(entropy, edges, weights=weights, color=color, alpha=0.55, label=label)
        plots.style_axes(ax, "entropy [nats]" if panel == "B" else "", "images [%]")
        ax.set_title(name, loc="left", fontsize=9)
        ax.set_xlim(0, edges[-1])
        ax.tick_params(labelbottom=panel == "B")
    panels["B"].sharey(panels["A"])
    plots.legend_above(panels["A"])

    ax = panels["C"]
    for name, eces in by_severity.items():
        ax.plot(SEVERITIES, [100 * ece for ece in eces], color=COLOURS[name], marker=".", label=name)
    plots.style_axes(ax, "severity of the corruption", "ECE, mean of four kinds [%]")
    ax.set_xticks(SEVERITIES)
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper left", frameon=False, fontsize=8)

    # The first images there are, and no better ones.
    (x, y), some = data.some, slice(0, 2)
    shown = torch.cat([x[some], corrupted(data, "noise", 3)[some], data.digits[some]])
    names = [data.classes[label] for label in y[some]]
    names += [f"{name}, noise" for name in names] + ["digit", "digit"]
    said = ours(shown).score
    assert said is not None
    for panel, image, name, variance in zip("DEFGHI", shown, names, said.tolist(), strict=True):
        ax = panels[panel]
        ax.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        ax.set_title(f"{name}\nvariance {variance:.2f}", fontsize=8)
        ax.set_axis_off()
    plots.save_figure(figure, path)


if __name__ == "__main__":
    main()
