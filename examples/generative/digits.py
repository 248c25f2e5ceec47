"""Digits that turn: sixteen angles of each, one of them unseen, and what a GP-prior VAE makes of it from the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from gpytorch.kernels import ConstantKernel, Kernel, PeriodicKernel, ScaleKernel
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gpseq import metrics, plots
from gpseq.datasets import load_images
from gpseq.datasets.corruptions import rotate
from gpseq.features import InducingPoints
from gpseq.generative import Geco, GPPriorVAE, MarkovPrior

#: Angles of a series, equally spaced over a turn, and pixels along a side.
ANGLES, SIDE = 16, 28
DEGREES = 360 / ANGLES
#: Digits at once where nothing is trained, and draws behind an imputed image.
CHUNK, DRAWS = 50, 16

LINEAR, TURNED = "linear interpolation", "neighbours turned back"
VAE, PERIODIC, MATERN = "VAE, latents interpolated", "GP-VAE, periodic", "GP-VAE, Matérn-3/2"
GECO = "GP-VAE, periodic, GECO"
LEARNED = (VAE, PERIODIC, MATERN, GECO)


# ---- data


@dataclass(frozen=True, eq=False)
class Series:
    """Some digits at all angles, and which angle of each is held out.

    Attributes:
        x: angles in turns, ``(b, 16)``.
        y: brightness from 0 to 1, ``(b, 16, 28, 28)``.
        missing: ``(b, 16)``, ``True`` at one angle of each digit.
    """

    x: Tensor
    y: Tensor
    missing: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, chosen: Tensor | slice) -> Series:
        return Series(self.x[chosen], self.y[chosen], self.missing[chosen])

    @property
    def held(self) -> Tensor:
        """The angle of each digit that is held out, ``(b,)``."""
        return self.missing.long().argmax(-1)

    def beside(self, shift: int) -> Tensor:
        """Images so many angles from the one that is held out, round the circle, ``(b, 28, 28)``; 0 is the target."""
        return self.y[torch.arange(len(self)), (self.held + shift) % ANGLES]


@dataclass(frozen=True, eq=False)
class Data:
    """Series to train on, those that settings are chosen by, and those that are only scored; no digit is in two."""

    train: Series
    val: Series
    test: Series


def turn(images: Tensor, generator: torch.Generator) -> Series:
    """Turn each image through sixteen angles, and draw one of them to be held out.

    Each angle comes from the original, by bilinear interpolation with zeros outside. So those that are multiples of 90
    degrees are as sharp as the original, and the twelve others are smoothed a little.

    Args:
        images: ``(b, 28, 28)``, brightness from 0 to 1.
        generator: of the angles that are held out.
    """
    y = torch.stack([rotate(images, DEGREES * step) for step in range(ANGLES)], 1)
    x = (torch.arange(ANGLES) / ANGLES).expand(len(images), ANGLES)
    held = torch.randint(ANGLES, (len(images),), generator=generator)
    return Series(x, y, one_hot(held, ANGLES).bool())


def load(train: int, val: int, test: int, seed: int, digit: int | None = 3, full: bool = False) -> Data:
    """Digits of MNIST, drawn by a seed; those of the test come from its test images.

    Args:
        train: digits to train on.
        val: digits that settings are chosen by.
        test: digits that are scored.
        seed: of the digits that are drawn, and of the angles that are held out.
        digit: which of the ten classes; ``None`` is all of them.
        full: the whole set, from the folder that ``GPSEQ_DATA`` names, instead of the subset that ships.
    """
    images, generator = load_images("mnist", full), torch.Generator().manual_seed(seed)

    def drawn(x: Tensor, labels: Tensor, count: int) -> Tensor:
        of_class = x if digit is None else x[labels == digit]
        if len(of_class) < count:
            raise ValueError(f"expected at least {count} images, got {len(of_class)}.")
        return of_class[torch.randperm(len(of_class), generator=generator)[:count]] / 255

    known, new = drawn(images.x_train, images.y_train, train + val), drawn(images.x_test, images.y_test, test)
    return Data(*(turn(part, generator) for part in (known[:train], known[train:], new)))


# ---- models


def perceptron(*sizes: int) -> list[nn.Module]:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.GELU()]
    return layers[:-1]


def networks(num_latents: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder, the same for all contenders."""
    pixels = SIDE * SIDE
    encoder = nn.Sequential(nn.Flatten(-2), *perceptron(pixels, 256, 128, 2 * num_latents))
    decoder = nn.Sequential(*perceptron(num_latents, 128, 256, pixels), nn.Unflatten(-1, (SIDE, SIDE)))
    return encoder, decoder


def turning_kernel(num_latents: int) -> Kernel:
    """For each latent path: what comes back after a turn, and a constant for what does not turn."""
    batch_shape = torch.Size([num_latents])
    periodic = PeriodicKernel(batch_shape=batch_shape)
    periodic.period_length = 1.0
    periodic.raw_period_length.requires_grad_(False)  # a turn is a turn
    return ScaleKernel(periodic, batch_shape=batch_shape) + ConstantKernel(batch_shape=batch_shape)


def circle_weights(missing: Tensor) -> Tensor:
    """Linear interpolation round a circle of equally spaced angles.

    Args:
        missing: ``(*b, n)``, bool.

    Returns:
        ``(*b, n, n)``; rows sum to one. What is seen has itself, what is missing its nearest seen angles on both sides.
    """
    n = missing.shape[-1]
    step = torch.arange(n)
    ahead = (step - step[:, None]) % n  # from row to column
    away = [torch.where(missing[..., None, :], n, distance) for distance in (ahead, ahead.T)]
    (right, next_), (left, last) = (distance.min(-1) for distance in away)
    share = torch.where(left + right > 0, left / (left + right).clamp_min(1), 0.5)[..., None]
    return share * one_hot(next_, n) + (1 - share) * one_hot(last, n)


@dataclass(frozen=True, eq=False)
class IndependentPosterior:
    """Latents that know nothing of each other; where nothing was seen they are interpolated between seen angles.

    Attributes:
        mean: ``(*b, L, n)``.
        variance: likewise.
        kl: from N(0, 1), summed over angles that were seen, ``(*b, L)``.
        moments: mean and variance of the latents by themselves.
        weights: of :func:`circle_weights`, with an axis for latents.
    """

    mean: Tensor
    variance: Tensor
    kl: Tensor
    moments: tuple[Tensor, Tensor]
    weights: Tensor

    def rsample(self, x: Tensor, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draws at the angles of the series, which are all that there are here."""
        mean, variance = self.moments
        normals = torch.randn(*sample_shape, *mean.shape, generator=generator, dtype=mean.dtype)
        return (self.weights @ (mean + variance.sqrt() * normals).unsqueeze(-1)).squeeze(-1)


class IndependentPrior(nn.Module):
    """The prior of an ordinary VAE, N(0, 1) for each angle by itself, in the place of Gaussian processes.

    All else of :class:`~gpseq.generative.GPPriorVAE` stays as it is: networks, evidence, noise and loss.

    Args:
        num_latents: L.
    """

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.num_latents = num_latents

    def posterior(self, x: Tensor, mean: Tensor, variance: Tensor, missing: Tensor) -> IndependentPosterior:
        """What the encoder saw times the prior, angle by angle."""
        seen = ~missing[..., None, :]
        precision = torch.where(seen, variance.reciprocal(), 0.0)
        s2 = 1 / (1 + precision)
        m = s2 * precision * torch.where(seen, mean, 0.0)
        kl = 0.5 * (s2 + m.square() - 1 - s2.log()).sum(-1)
        weights = circle_weights(missing).to(m)[..., None, :, :]
        between = (weights @ m.unsqueeze(-1)).squeeze(-1), (weights.square() @ s2.unsqueeze(-1)).squeeze(-1)
        return IndependentPosterior(*between, kl, (m, s2), weights)

    def rsample(self, x: Tensor, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draws, each angle by itself."""
        return torch.randn(*sample_shape, *x.shape[:-1], self.num_latents, x.shape[-1], generator=generator)


@dataclass(frozen=True)
class Settings:
    """Of the training of a contender.

    Attributes:
        num_latents: L.
        steps: of Adam.
        batch: digits in a step.
        rate: of Adam at the start; it falls to zero along a cosine.
        noise: variance of a pixel at the start, trained.
        beta: weight of the divergence.
        tolerance: with GECO instead of beta, the mean squared error that is good enough; the default is that of the
            released code of sparse GP-VAEs.
    """

    num_latents: int = 16
    steps: int = 1000
    batch: int = 16
    rate: float = 2e-3
    noise: float = 0.02
    beta: float = 1.0
    tolerance: float = 0.02


def make(name: str, settings: Settings) -> GPPriorVAE:
    """One of the contenders that learn, untrained."""
    L, noise, beta = settings.num_latents, settings.noise, settings.beta
    encoder, decoder = networks(L)
    if name == VAE:
        return GPPriorVAE(encoder, decoder, prior=IndependentPrior(L), num_latents=L, noise=noise, beta=beta)
    if name == MATERN:
        prior = MarkovPrior("matern32", L, lengthscale=0.5)
        return GPPriorVAE(encoder, decoder, prior=prior, num_latents=L, noise=noise, beta=beta)
    geco = None
    if name == GECO:  # the variance of the noise is not in that loss, so it is the error that is asked for
        noise, geco = settings.tolerance, Geco(settings.tolerance, start=settings.batch * ANGLES * SIDE**2 / noise)
    points = InducingPoints(torch.arange(ANGLES) / ANGLES)
    return GPPriorVAE(encoder, decoder, points, turning_kernel(L), L, noise=noise, beta=beta, geco=geco)


def fit(name: str, data: Series, settings: Settings, seed: int) -> GPPriorVAE:
    """Train a contender on series, without their held-out angles.

    Args:
        name: one of ``LEARNED``.
        data: series.
        settings: of the training.
        seed: of networks, batches and draws.
    """
    torch.manual_seed(seed)
    vae = make(name, settings)
    optimiser = torch.optim.Adam(vae.parameters(), settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    for _ in range(settings.steps):
        batch = data[torch.randperm(len(data))[: settings.batch]]
        optimiser.zero_grad()
        vae(batch.x, batch.y, batch.missing).loss.backward()
        optimiser.step()
        schedule.step()
    return vae.eval()


# ---- what they say of the images that are held out


@dataclass(frozen=True, eq=False)
class Forecast:
    """Images that are held out.

    Attributes:
        mean: ``(b, 28, 28)``.
        spread: variance of what a contender holds possible, without noise, likewise.
        noise: variance of the noise that it has learnt; 0 for those that learn nothing.
    """

    mean: Tensor
    spread: Tensor
    noise: float = 0.0


def between(images: Sequence[Tensor]) -> Forecast:
    """The mean of two images, and how far they are from it."""
    pair = torch.stack(list(images))
    return Forecast(pair.mean(0), pair.var(0, correction=0))


def interpolate(series: Series) -> Forecast:
    """Each pixel half-way between the neighbouring angles."""
    return between([series.beside(-1), series.beside(1)])


def turn_back(series: Series) -> Forecast:
    """Both neighbouring images turned onto the angle: what is possible where the operation is known."""
    return between([rotate(series.beside(shift), -shift * DEGREES) for shift in (-1, 1)])


@torch.no_grad()
def impute(vae: GPPriorVAE, series: Series, seed: int = 0) -> Forecast:
    """Held-out images from draws of the latents given all other angles.

    Args:
        vae: a contender.
        series: some digits; the held-out images are not looked at.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    means, spreads = [], []
    for start in range(0, len(series), CHUNK):
        part = series[slice(start, start + CHUNK)]
        p = vae.impute(part.x, part.y, part.missing, DRAWS, generator)  # angles that were seen are as they were
        means.append(p.mean[part.missing])
        spreads.append(p.variance[part.missing])
    shape = (len(series), SIDE, SIDE)
    return Forecast(torch.cat(means).view(shape), torch.cat(spreads).view(shape), vae.likelihood.noise.item())


@torch.no_grad()
def bound(vae: GPPriorVAE, series: Series, seed: int = 0) -> float:
    """ELBO of the seen angles of a digit, in nats, with beta one; one draw."""
    generator = torch.Generator().manual_seed(seed)
    parts = [series[slice(start, start + CHUNK)] for start in range(0, len(series), CHUNK)]
    return sum(vae(p.x, p.y, p.missing, generator=generator).elbo.item() for p in parts) / len(series)


def forecast(name: str, series: Series, vae: GPPriorVAE | None) -> Forecast:
    """What a contender says.

    Args:
        name: of it.
        series: some digits.
        vae: it, if it is one that learns.
    """
    if vae is not None:
        return impute(vae, series)
    return {LINEAR: interpolate, TURNED: turn_back}[name](series)


def calibrate(found: Forecast, target: Tensor, steps: int = 50) -> float:
    """The variance of noise beside its spread for which a contender's Gaussian pixels are most likely.

    All contenders get theirs from validation digits, so that those that learn no noise have one too.

    Args:
        found: what a contender said of validation digits.
        target: them.
        steps: of L-BFGS.
    """
    spread, error = found.spread.double(), (target - found.mean).double().square()
    log = error.mean().log().requires_grad_()
    optimiser = torch.optim.LBFGS([log], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        variance = spread + log.exp()
        loss = (variance.log() + error / variance).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return log.detach().exp().item()


def score(found: Forecast, target: Tensor, noise: float) -> dict[str, float]:
    """Of held-out images, for a pixel.

    Args:
        found: what a contender said.
        target: ``(b, 28, 28)``.
        noise: of :func:`calibrate`.

    Returns:
        Mean squared error; NLPD with the noise that validation digits gave; and, for those that learn, with their
        own.
    """
    mean, truth = found.mean.double(), target.double()
    scores = {
        "mse": (mean - truth).square().mean().item(),
        "nlpd": metrics.nlpd(mean, found.spread.double() + noise, truth).mean().item(),
    }
    if found.noise:
        scores["own nlpd"] = metrics.nlpd(mean, found.spread.double() + found.noise, truth).mean().item()
    return scores


def judge(name: str, data: Data, vae: GPPriorVAE | None = None) -> dict[str, dict[str, float]]:
    """Scores on validation digits, on digits that were trained on, and on new ones.

    Args:
        name: of the contender.
        data: all digits.
        vae: the contender, if it learns.
    """
    held_out = forecast(name, data.val, vae)
    noise = calibrate(held_out, data.val.beside(0))
    result = {"val": score(held_out, data.val.beside(0), noise)}
    for part, series in (("trained", data.train), ("new", data.test)):
        result[part] = score(forecast(name, series, vae), series.beside(0), noise)
    result["val"]["noise"] = noise
    if vae is not None:
        result["new"]["elbo"] = bound(vae, data.test)
    return result


# ---- figures


def mosaic(rows: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Rows of images ``(n, 28, 28)`` as one picture, NaN between them."""
    padded = [nn.functional.pad(row.clamp(0, 1), (0, gap, 0, gap), value=torch.nan) for row in rows]
    return torch.cat([torch.cat(list(row), 1) for row in padded])


def draw_mosaic(path: Path, rows: Sequence[Tensor], columns: Sequence[str], names: Sequence[str] = ()) -> None:
    """Images side by side, with what is above the columns and beside the rows.

    Args:
        path: of the figure.
        rows: ``(n, 28, 28)`` each; an image of NaN stays empty.
        columns: above them; long ones are turned.
        names: of the rows.
    """
    picture, cell = mosaic(rows), SIDE + 2
    height, width = picture.shape
    long, wide = max(map(len, columns)), max(map(len, names), default=0)
    left = 0.3 + 0.08 * wide
    figure = plots.new_figure(left + (0.07 * long if long > 4 else 0) + width / 68, 0.3 + 0.05 * long + height / 68)
    ax = figure.subplots()
    ax.set_anchor("E" if names else "W")  # what is left of the width is for the words
    ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    for row, images in enumerate(rows):
        for column in images.isnan().flatten(1).all(-1).nonzero()[:, 0].tolist():
            xs, ys = [column * cell - 0.5 + edge for edge in (0, SIDE)], [row * cell - 0.5 + edge for edge in (0, SIDE)]
            ax.plot([*xs, *xs[::-1], xs[0]], [ys[0], ys[0], ys[1], ys[1], ys[0]], color=plots.VERMILION, linewidth=1.2)
    middle = (SIDE - 1) / 2
    turned = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if long > 4 else {}
    ax.xaxis.tick_top()
    ax.set_xticks([cell * place + middle for place in range(len(columns))], columns, fontsize=8, **turned)
    ax.set_yticks([cell * place + middle for place in range(len(names))], names, fontsize=8)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    plots.save_figure(figure, path)


def angle_names() -> list[str]:
    """Degrees at every fourth angle."""
    return [f"{step * DEGREES:.0f}°" if step % (ANGLES // 4) == 0 else "" for step in range(ANGLES)]


def draw_imputed(path: Path, series: Series, forecasts: dict[str, Forecast]) -> None:
    """All angles of some digits, a frame where one is held out, and behind them what it is and what was said of it."""
    hidden = torch.where(series.missing[..., None, None], torch.nan, series.y)
    gap = torch.zeros(1, SIDE, SIDE)
    rows = [
        torch.cat(
            [hidden[row], gap, series.beside(0)[row, None], *(found.mean[row, None] for found in forecasts.values())]
        )
        for row in range(len(series))
    ]
    draw_mosaic(path, rows, [*angle_names(), "", "held out", *forecasts])


def draw_prior(path: Path, vaes: dict[str, GPPriorVAE], n: int = 3) -> None:
    """Draws from the prior of each contender, through the angles."""
    x, rows, names = torch.arange(ANGLES) / ANGLES, [], []
    for name, vae in vaes.items():
        rows += list(vae.sample(x, n, torch.Generator().manual_seed(0)))
        names += [name, *[""] * (n - 1)]
    draw_mosaic(path, rows, angle_names(), names)


# ---- the example


def row(name: str, found: dict[str, dict[str, float]], seconds: float) -> str:
    """A line of the table."""
    trained, new = found["trained"], found["new"]
    scores = [(trained["mse"], 4), (new["mse"], 4), (trained["nlpd"], 3), (new["nlpd"], 3)]
    scores += [(new.get("own nlpd"), 3), (new.get("elbo"), 0)]
    return f"{name:>24}" + "".join(
        " " * 10 if v is None else f"  {v:8.{digits}f}" for v, digits in [*scores, (seconds, 0)]
    )


def main(out: Path, smoke: bool) -> None:
    """Train the contenders on the threes that ship, compare them, draw the figures.

    Args:
        out: folder of the figures.
        smoke: a few digits, and a few steps.
    """
    data = load(20, 10, 10, seed=0) if smoke else load(300, 50, 150, seed=0)
    settings = Settings(steps=3) if smoke else Settings(steps=800)
    print(f"{len(data.train)} threes to train on, {len(data.test)} new ones; one of {ANGLES} angles held out of each")
    print(f"{'':>24}  MSE of a pixel      NLPD of a pixel     own NLPD     ELBO  train")
    print(f"{'':>24}   trained       new   trained       new       new       new    [s]")
    vaes: dict[str, GPPriorVAE] = {}
    for name in (LINEAR, TURNED, *LEARNED):
        begun = time.perf_counter()
        vae = fit(name, data.train, settings, seed=0) if name in LEARNED else None
        seconds = time.perf_counter() - begun
        if vae is not None:
            vaes[name] = vae
        print(row(name, judge(name, data, vae), seconds), flush=True)
    shown = data.test[slice(0, 6)]
    draw_imputed(
        out / "digits.png", shown, {name: forecast(name, shown, vaes.get(name)) for name in (LINEAR, TURNED, *LEARNED)}
    )
    draw_prior(out / "digits_prior.png", {name: vaes[name] for name in (PERIODIC, MATERN, VAE)})
    print(f"figures: {out / 'digits.png'}, {out / 'digits_prior.png'}")
