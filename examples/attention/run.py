"""Attention that does Gaussian process regression, beside the exact posterior: where they agree, and how nearly."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.attention.networks import AttentionGP, SoftmaxNetwork, known_layer
from gpseq import plots
from gpseq.metrics import nlpd, rmse
from gpseq.prediction import predict
from gpseq.predictive import Predictive

#: The prior, known to everybody: an RBF kernel of variance 1, and the variance of the noise.
LENGTHSCALE, NOISE = 0.8, 0.0625
#: Where every sequence is observed, with a gap in the middle, and where it is asked about.
TIMES = torch.cat([torch.linspace(0.0, 3.25, 8), torch.linspace(5.75, 9.0, 8)])
GRID = torch.linspace(-2.5, 11.5, 141)
#: Training and test sequences; sequences of a batch.
NUM_TRAIN, NUM_TEST, BATCH = 2000, 1000, 50


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Prior covariance of f at two sets of times, in float64."""
    return torch.exp(-0.5 * ((a.double()[:, None] - b.double()) / LENGTHSCALE) ** 2)


def draw_sequences(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy observations at the times, ``(num, T)``, and the function itself on the grid, ``(num, n)``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([TIMES, GRID])
    root = torch.linalg.cholesky(kernel(x, x) + 1e-8 * torch.eye(len(x), dtype=torch.float64))
    f = (torch.randn(num, len(x), generator=generator, dtype=torch.float64) @ root.mT).float()
    y = f[:, : len(TIMES)] + NOISE**0.5 * torch.randn(num, len(TIMES), generator=generator)
    return y, f[:, len(TIMES) :]


def exact_posterior(y: Tensor, query: Tensor, times: Tensor = TIMES) -> Predictive:
    """The posterior of f that all others are held against."""
    gram = kernel(times, times) + NOISE * torch.eye(len(times), dtype=torch.float64)
    cross = kernel(times, query)
    weights = torch.linalg.solve(gram, cross)
    variance = 1.0 - (cross * weights).sum(0)
    mean = y.double() @ weights
    return Predictive.from_moments(mean.float(), variance=variance.float(), noise=NOISE)


def limit_case(y: Tensor) -> tuple[float, float, float]:
    """Give a layer the optimal values and covariance, and compare it with the exact posterior of one sequence.

    With an inducing key at every observation, values ``(K + noise I)^-1 y`` and whitened covariance
    ``(I + L' L / noise)^-1``, the layer is the exact GP.

    Returns:
        Largest errors of mean and variance on the grid, and the evidence lower bound minus the log evidence.
    """
    y, times, size = y.double(), TIMES.double(), len(TIMES)
    eye = torch.eye(size, dtype=torch.float64)
    gram = kernel(times, times)
    layer = known_layer(times, LENGTHSCALE, width=1, jitter=0.0, sampling="mean")
    L = torch.linalg.cholesky(gram)
    root = torch.linalg.cholesky(torch.linalg.inv(eye + L.mT @ L / NOISE))
    with torch.no_grad():
        layer.value_weight.fill_(1.0)
        layer.inducing.lower.copy_(root)
        layer.inducing.log_diagonal.copy_(root.diagonal().log())
        value = torch.linalg.solve(gram + NOISE * eye, y)[:, None]
        tokens = {"key": times[:, None], "value": value}
        mean, spread = layer.conditional(GRID.double()[:, None], **tokens)
        fitted, variance = layer.conditional(times[:, None], **tokens)
        layer(times[:, None], times[:, None], value)
        squares = (y - fitted.flatten()).square() + variance.to_dense().flatten()
        bound = -0.5 * (size * math.log(2 * math.pi * NOISE) + squares.sum() / NOISE) - layer.kl_divergence()
        evidence = torch.distributions.MultivariateNormal(torch.zeros(size).double(), gram + NOISE * eye).log_prob(y)
    cross = kernel(times, GRID)
    weights = torch.linalg.solve(gram + NOISE * eye, cross)
    mean_error = (mean.flatten() - y @ weights).abs().max()
    variance_error = (spread.to_dense().flatten() - (1.0 - (cross * weights).sum(0))).abs().max()
    return mean_error.item(), variance_error.item(), (bound - evidence).item()


def train_gp(net: AttentionGP, y: Tensor, num_steps: int) -> float:
    """Minimise a draw's negative log likelihood plus divergence; returns the divergence of a sequence at the end."""
    slow = [p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("last.inducing")]
    groups = [{"params": slow}, {"params": [p for p in net.last.inducing.parameters() if p.requires_grad]}]
    optimiser = torch.optim.Adam(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [1e-2, 2e-2], num_steps, pct_start=0.1)
    divergence = torch.zeros(())
    for _ in range(num_steps):
        batch = y[torch.randint(len(y), (BATCH,))]
        misfit = (batch - net(batch)).square().sum(-1).mean() / (2 * NOISE)
        # Every sequence is a function of its own and pays all of its divergence.
        divergence = net.last.kl_divergence(num_data=len(y), convention="per_sequence") / len(y)
        optimiser.zero_grad()
        (misfit + divergence).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimiser.step()
        schedule.step()
    return divergence.item()


def train_softmax(net: SoftmaxNetwork, y: Tensor, num_steps: int) -> None:
    """Maximum likelihood: predict the observations that are hidden, a quarter of each sequence."""
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, num_steps, pct_start=0.1)
    for _ in range(num_steps):
        batch = y[torch.randint(len(y), (BATCH,))]
        hidden = torch.rand(batch.shape).argsort(-1) < batch.shape[-1] // 4
        mean, covariance = net.conditional(batch, TIMES, hidden)
        variance = covariance.diagonal(dim1=-1, dim2=-2)
        terms = 0.5 * ((batch - mean).square() / variance + variance.log())
        optimiser.zero_grad()
        terms[hidden].mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def regions() -> dict[str, Tensor]:
    """Which part of the grid is where, as masks ``(n,)``."""
    gap = (GRID > TIMES[7]) & (GRID < TIMES[8])
    outside = (GRID < TIMES[0]) | (GRID > TIMES[-1])
    return {"among the data": ~gap & ~outside, "gap": gap, "outside": outside}


def score(mean: Tensor, variance: Tensor, f: Tensor) -> dict[str, tuple[float, float, float]]:
    """RMSE of f, NLPD and coverage of the 95 % band for new observations, region by region."""
    y = f + NOISE**0.5 * torch.randn(f.shape, generator=torch.Generator().manual_seed(3))
    inside = (y - mean).abs() < plots.BAND * variance.sqrt()
    variance = variance.expand_as(mean)
    return {
        name: (
            rmse(mean[:, rows], f[:, rows]).square().mean().sqrt().item(),
            nlpd(mean[:, rows], variance[:, rows], y[:, rows]).mean().item(),
            inside[:, rows].float().mean().item(),
        )
        for name, rows in regions().items()
    }


def print_scores(name: str, scores: dict[str, tuple[float, float, float]]) -> None:
    """One line a method: RMSE, NLPD and coverage in each region."""
    cells = "".join(f"  {e:7.3f} {d:7.2f} {100 * c:5.1f} %" for e, d, c in scores.values())
    print(f"{name:>22}{cells}")


def main() -> None:
    """Check the limit case, train both networks, print how they compare, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples/attention"), help="folder of the figures")
    parser.add_argument("--smoke", action="store_true", help="a few steps of training")
    parser.add_argument("--seed", type=int, default=0, help="of the training; data are the same for all")
    parser.add_argument("--form", default="cheng_boots", choices=("cheng_boots", "orthogonal"), help="of the mean")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    y_train, _ = draw_sequences(NUM_TRAIN, seed=1)
    y, f = draw_sequences(NUM_TEST, seed=2)

    mean_error, variance_error, gap = limit_case(y[0])
    print(
        f"optimal values and covariance: mean within {mean_error:.0e} of the exact GP, variance within "
        f"{variance_error:.0e}, bound minus log evidence {gap:.0e}"
    )
    num_steps = 20 if args.smoke else 1200
    net, other = AttentionGP(TIMES, LENGTHSCALE, form=args.form), SoftmaxNetwork(TIMES)
    begun = time.perf_counter()
    divergence = train_gp(net, y_train, num_steps)
    middle = time.perf_counter()
    train_softmax(other, y_train, num_steps if args.smoke else 2400)
    print(
        f"training: {middle - begun:.0f} s for sparse-GP attention, {time.perf_counter() - middle:.0f} s for softmax; "
        f"divergence of a sequence {divergence:.1f} nats"
    )

    exact = exact_posterior(y, GRID)
    with torch.no_grad():
        ours = predict(net, y, method="moments", query=GRID, shared=("query",))
        theirs = predict(other, y, method="moments", query=GRID, shared=("query",))
    print(f"\n{'':>22}" + "".join(f"  {name:^23}" for name in regions()))
    print(f"{'':>22}" + 3 * "     RMSE    NLPD   cover")
    print_scores("exact GP", score(exact.mean, exact.variance + NOISE, f))
    print_scores("sparse-GP attention", score(ours.mean, ours.variance + NOISE, f))
    print_scores("softmax, ML", score(theirs.mean, theirs.variance, f))
    deviation = exact.variance.sqrt()
    off = ((ours.mean - exact.mean) / deviation).square().mean().sqrt()
    ratio = ours.variance.sqrt() / deviation
    print(
        f"\nsparse-GP attention against the exact GP: mean off by {off:.2f} standard deviations (RMS), "
        f"standard deviation {ratio.min():.2f} to {ratio.max():.2f} times the exact one"
    )
    # What the decoupled covariance cannot know: that this sequence has fewer observations.
    kept = torch.arange(len(TIMES)) % 2 == 0
    fewer = exact_posterior(y[:, kept], GRID, TIMES[kept])
    with torch.no_grad():
        masked = predict(net, y, method="moments", query=GRID, removed=(~kept).expand(len(y), -1), shared=("query",))
    print("every second observation taken away:")
    print_scores("exact GP", score(fewer.mean, fewer.variance + NOISE, f))
    print_scores("sparse-GP attention", score(masked.mean, masked.variance + NOISE, f))
    draw_comparison(args.out / "attention.png", net, y[0], f[0], exact[0], ours[0], theirs[0])
    draw_idea(args.out / "idea.png", y[0])
    print(f"figures: {args.out / 'attention.png'}, {args.out / 'idea.png'}")


def draw_comparison(
    path: Path, net: AttentionGP, y: Tensor, f: Tensor, exact: Predictive, ours: Predictive, theirs: Predictive
) -> None:
    """One test sequence under both networks, and the standard deviations along time."""
    figure = plots.new_figure(9, 8)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    total = (exact.variance + NOISE).sqrt()
    for ax, name, color, mean, std in (
        (panels[0], "sparse-GP attention", plots.BLUE, ours.mean, (ours.variance + NOISE).sqrt()),
        (panels[1], "softmax attention, maximum likelihood", plots.ORANGE, theirs.mean, theirs.variance.sqrt()),
    ):
        plots.plot_data(ax, TIMES, y)
        ax.plot(GRID, f, color=plots.GREEN, linewidth=1.0, label="the function", zorder=2)
        plots.plot_posterior(ax, GRID, mean, std, label=f"{name}, 95 % band", color=color)
        plots.plot_exact(ax, GRID, exact.mean, total)
        plots.style_axes(ax, "", "observation")
        ax.set_ylim(-3.6, 3.6)
        plots.legend_above(ax)
    ax = panels[2]
    ax.plot(GRID, (ours.variance + NOISE).sqrt(), color=plots.BLUE, linewidth=2, label="sparse-GP attention")
    ax.plot(GRID, theirs.variance.sqrt(), color=plots.ORANGE, linewidth=2, label="softmax attention")
    plots.plot_exact(ax, GRID, total)
    plots.plot_inducing(ax, net.last.inducing.location.detach().flatten())
    plots.style_axes(ax, "time", "standard deviation")
    ax.set_ylim(bottom=0)
    ax.set_xlim(GRID[0], GRID[-1])
    plots.legend_above(ax)
    plots.save_figure(figure, path)


def draw_idea(path: Path, y: Tensor) -> None:
    """Attention as a sum of kernels over tokens, the same sum with a band, and the weights as a matrix."""
    tokens, y = TIMES[::2], y[::2]
    inducing = torch.cat([torch.linspace(0.0, 2.8, 3), torch.linspace(5.8, 8.6, 3)])
    gram = kernel(tokens, tokens) + NOISE * torch.eye(len(tokens), dtype=torch.float64)
    weights = kernel(GRID, tokens)
    parts = weights * torch.linalg.solve(gram, y.double())
    # The best covariance with these inducing keys, as for any sparse GP.
    L = torch.linalg.cholesky(kernel(inducing, inducing))
    V = torch.linalg.solve_triangular(L, kernel(inducing, GRID), upper=False).mT
    A = torch.linalg.solve_triangular(L, kernel(inducing, tokens), upper=False)
    S = torch.linalg.inv(torch.eye(len(inducing), dtype=torch.float64) + A @ A.mT / NOISE)
    std = (1.0 - V.square().sum(-1) + ((V @ S) * V).sum(-1)).sqrt()
    figure = plots.new_figure(10, 5.6)
    panels = figure.subplot_mosaic("AC;BC", width_ratios=[3, 2])
    plots.plot_kernel_sum(panels["A"], GRID, parts, label="their sum: attention")
    plots.style_axes(panels["A"], "", "value times kernel")
    panels["A"].tick_params(labelbottom=False)
    plots.plot_data(panels["B"], tokens, y)
    plots.plot_posterior(panels["B"], GRID, parts.sum(-1), std, label="the same, with a 95 % band")
    plots.plot_inducing(panels["B"], inducing)
    plots.style_axes(panels["B"], "query", "output")
    for panel in "AB":
        panels[panel].set_xlim(GRID[0], GRID[-1])
        plots.legend_above(panels[panel])
    plots.plot_attention_weights(panels["C"], weights, GRID, label="kernel of query and key")
    plots.style_axes(panels["C"], "token", "query")
    panels["C"].grid(False)
    plots.save_figure(figure, path)


if __name__ == "__main__":
    main()
