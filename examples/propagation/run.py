"""How sure is a trained network? Mean and covariance of its logits in one pass, beside draws of its weights."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gpseq
from examples.uncertainty.network import train
from gpseq import metrics, plots
from gpseq.datasets import load_images
from gpseq.propagation import (
    WeightPosterior,
    calibrate,
    check,
    fit_curvature,
    propagate,
    sample,
    streamline,
)

#: Parameters that are uncertain: those of the last of four blocks, and of the head.
UNCERTAIN = ("encoder.layers.3.*", "head.*")
PLAIN, TEMPERED, PUBLISHED, MARGINAL, OURS = "as it is", "one temperature", "published rules", "diag", "lowrank"
CALIBRATED = ", calibrated"


@dataclass(frozen=True)
class Data:
    """Images with brightness 0 to 1; pairs are images and labels."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    digits: Tensor


Method = Callable[[Tensor], gpseq.Predictive]


def load(smoke: bool) -> Data:
    """Parts of the shipped subsets, in an order that is the same for every seed."""
    sizes = (300, 60, 60, 40) if smoke else (2000, 300, 600, 300)
    clothes, digits = load_images("fashion_mnist"), load_images("mnist")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(clothes), generator=generator)
    asked = torch.randperm(len(clothes.y_test), generator=generator)[: sizes[2]]
    strange = torch.randperm(len(digits.y_test), generator=generator)[: sizes[3]]
    first, second = order[: sizes[0]], order[sizes[0] : sizes[0] + sizes[1]]
    return Data(
        train=(clothes.x_train[first] / 255, clothes.y_train[first]),
        val=(clothes.x_train[second] / 255, clothes.y_train[second]),
        test=(clothes.x_test[asked] / 255, clothes.y_test[asked]),
        digits=digits.x_test[strange] / 255,
    )


def fit_posterior(model: nn.Module, data: Data, prior_precision: float) -> WeightPosterior:
    """A Kronecker-factored Laplace approximation of the last block and the head, with labels drawn once."""
    x, y = data.train
    curvature = fit_curvature(
        model,
        list(zip(x.split(100), y.split(100), strict=True)),
        structure="kron",
        parameters=UNCERTAIN,
        num_samples=1,
        generator=torch.Generator().manual_seed(0),
    )
    return curvature.posterior(prior_precision)


def certain(model: nn.Module) -> Method:
    """The network's own logits, as a Gaussian without variance."""

    def answer(x: Tensor) -> gpseq.Predictive:
        logits = model(x)
        return gpseq.Predictive.from_moments(logits, variance=torch.zeros_like(logits))

    return answer


def one_pass(model: nn.Module, posterior: WeightPosterior, tangents: int, **options: str) -> Method:
    """The propagation in some form, with the same draws at each call."""

    def answer(x: Tensor) -> gpseq.Predictive:
        g = torch.Generator().manual_seed(0)
        return propagate(model, posterior, x, num_tangents=tangents, generator=g, **options)

    return answer


def draws(model: nn.Module, posterior: WeightPosterior, number: int) -> Method:
    """Monte Carlo: as many passes as draws of the weights."""
    return lambda x: sample(model, posterior, x, number, torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Result:
    """What a method says of clothes and of digits, and in how many seconds."""

    clothes: gpseq.Predictive
    digits: gpseq.Predictive
    seconds: float = math.nan

    def row(self, name: str, y: Tensor) -> str:
        """A line of the table."""
        probs = self.clothes.probs()
        entropy = metrics.ood_auroc(self.clothes.entropy(), self.digits.entropy()).item()
        # Where nothing is drawn nobody disagrees.
        some = self.clothes.samples is not None or bool(self.clothes.variance.any())
        known = metrics.ood_auroc(self.clothes.mutual_information(), self.digits.mutual_information()).item()
        return (
            f"{name:>26}  {metrics.accuracy(probs.argmax(-1), y).item():8.1%}"
            f"  {-self.clothes.log_prob(y).mean().item():6.3f}  {metrics.top_label_ece(probs, y).item():6.1%}"
            f"  {100 * entropy:7.1f}  {f'{100 * known:6.1f}' if some else '':>6}"
            + ("" if math.isnan(self.seconds) else f"  {self.seconds:8.1f} s")
        )


@torch.no_grad()
def compare(
    model: nn.Module, posterior: WeightPosterior, data: Data, tangents: int, numbers: tuple[int, ...]
) -> dict[str, Result]:
    """All methods on clothes and digits; what has a variance or a temperature is also fitted to validation labels."""
    methods: dict[str, tuple[Method, bool]] = {PLAIN: (certain(model), True)}
    methods[PUBLISHED] = one_pass(model, posterior, tangents, preset="streamlined"), True
    methods[MARGINAL] = one_pass(model, posterior, tangents, covariance="diag"), True
    methods[OURS] = one_pass(model, posterior, tangents, covariance="lowrank"), True
    for number in numbers:
        methods[f"Monte Carlo, {number}"] = draws(model, posterior, number), False
    results = {}
    for name, (method, is_gaussian) in methods.items():
        begun = time.perf_counter()
        clothes, digits = method(data.test[0]), method(data.digits)
        results[name] = Result(clothes, digits, time.perf_counter() - begun)
        if is_gaussian:
            alone = name == PLAIN
            generator = torch.Generator().manual_seed(2)
            found = calibrate(method(data.val[0]), data.val[1], not alone, alone, generator=generator)
            better = TEMPERED if alone else name + CALIBRATED
            results[better] = Result(found.apply(clothes), found.apply(digits))
            number = f"temperature {found.temperature:.2f}" if alone else f"covariances times {found.scale:.2f}"
            print(f"  {name}: {number}")
    return results


def main() -> None:
    """Train, find a posterior, propagate, check, calibrate, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/propagation"), help="folder of the figure")
    parser.add_argument("--smoke", action="store_true", help="one epoch, few images")
    parser.add_argument("--epochs", type=int, help="of the training (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the network; images are the same for all")
    parser.add_argument("--prior", type=float, default=100.0, help="prior precision of the weights (default 100)")
    parser.add_argument("--tangents", type=int, default=16, help="columns of the low rank (default 16)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = load(args.smoke)

    begun = time.perf_counter()
    model = train(*data.train, args.epochs or (1 if args.smoke else 20), args.seed, None)
    print(f"training: {time.perf_counter() - begun:.0f} s")
    begun = time.perf_counter()
    posterior = fit_posterior(model, data, args.prior)
    print(f"posterior of {len(posterior.names)} parameters: {time.perf_counter() - begun:.0f} s\n")

    # Against the truth, on a few images.
    some, num_samples = data.test[0][: 4 if args.smoke else 16], 100 if args.smoke else 1000
    checks = {}
    for name, options in ((PUBLISHED, {"preset": "streamlined"}), (OURS, {"covariance": "lowrank"})):
        g = torch.Generator().manual_seed(3)
        checks[name] = check(
            model, posterior, some, num_samples, generator=g, num_tangents=64, quiet=name != OURS, **options
        )
    for name, found in checks.items():
        print(f"{name}: ratio of standard deviations {found.ratio.mean():.3f} +- {found.ratio.std():.3f}")

    print("\nfitted to validation labels")
    results = compare(model, posterior, data, args.tangents, (10,) if args.smoke else (10, 50))
    print(f"\n{'':>26}  {'test':^24}  AUROC of digits by")
    print(f"{'':>26}  accuracy     NLL     ECE  entropy  mutual i.      time")
    for name, result in results.items():
        print(result.row(name, data.test[1]))

    # The network and what is known of its weights, as one file.
    path = args.out / "network.safetensors"
    module = streamline(model, posterior, covariance="lowrank", num_tangents=args.tangents)
    module.save(path)
    print(f"\nnetwork and posterior: {path}, {path.stat().st_size / 2**20:.1f} MiB")

    path = args.out / "propagation.png"
    draw(path, checks, results, data.test[1])
    print(f"figure: {path}")


def draw(path: Path, checks: dict[str, gpseq.propagation.Comparison], results: dict[str, Result], y: Tensor) -> None:
    """Deviations against Monte Carlo, reliability before and after, and what clothes and digits leave open."""
    figure = plots.new_figure(11, 3.6)
    left, middle, right = figure.subplots(1, 3)
    for (name, found), color in zip(checks.items(), (plots.VERMILION, plots.BLUE), strict=True):
        propagated = found.propagated.variance.sqrt()
        plots.plot_deviations(
            left,
            propagated / found.ratio,
            propagated,
            name,
            color,
            "deviation of a logit, Monte Carlo",
            "the same in one pass",
        )
    left.legend(loc="upper left", frameon=False, fontsize=8)

    for name, color in ((PLAIN, plots.VERMILION), (OURS + CALIBRATED, plots.BLUE)):
        bins = metrics.reliability_bins(results[name].clothes.probs(), y, num_bins=8)
        plots.plot_reliability(middle, bins.confidence, bins.accuracy, bins.count, label=name, color=color)
    middle.legend(loc="upper left", frameon=False, fontsize=8)

    ours = results[OURS + CALIBRATED]
    pairs = [("clothes", ours.clothes, plots.BLUE), ("digits", ours.digits, plots.VERMILION)]
    known = [p.mutual_information() for _, p, _ in pairs]
    edges = torch.linspace(0, torch.cat(known).quantile(0.99).item(), 24)
    for (label, _, color), values in zip(pairs, known, strict=True):
        weights = torch.full_like(values, 100 / len(values))
        right.hist(values.clamp(max=edges[-1]), edges, weights=weights, color=color, alpha=0.55, label=label)
    plots.style_axes(right, "mutual information [nats]", "images [%]")
    right.set_xlim(0, edges[-1])
    right.legend(frameon=False, fontsize=8)
    plots.save_figure(figure, path)


if __name__ == "__main__":
    main()
