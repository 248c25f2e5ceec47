"""Holes in a record of air quality, filled by a VAE whose latent paths are Gaussian processes, and by its rivals."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import torch
from torch import Tensor, nn

import gpseq
from gpseq import metrics, plots
from gpseq.datasets import load_beijing_air
from gpseq.generative import GaussianObservations, GPPriorVAE, MarkovPrior

#: Variables that ship with the package.
SHIPPED = ("PM2.5", "O3", "TEMP", "DEWP", "WSPM")
#: Those whose logarithm is modelled: concentrations, and rain, are positive with long tails.
LOGARITHMIC = ("PM2.5", "PM10", "SO2", "NO2", "CO", "O3", "RAIN")
DAY, YEAR = 24, 365 * 24
#: Hours of a window, and hours at both of its ends where nothing is hidden: a hole in a long record has two sides.
WINDOW, MARGIN = 96, 12
#: A pattern of holes that is laid over a window hides at least so many numbers where it comes from.
LEAST = 12
#: Lengths of holes in hours that are scored apart.
LENGTHS = {"1-2 h": (1, 2), "3-12 h": (3, 12), "13 h and more": (13, WINDOW)}
#: Draws behind a prediction, and windows that are predicted at once.
DRAWS, CHUNK = 64, 16
LINEAR, EXACT, PLAIN = "linear interpolation", "GP of each channel", "VAE of each hour"
MARKOV, HIPPO = "GP-VAE, Matérn-3/2", "GP-VAE, HiPPO"
CONTENDERS = (LINEAR, EXACT, PLAIN, MARKOV, HIPPO)


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Record:
    """Stations over one stretch of time, standardised; NaN where a number is missing."""

    values: Tensor  # (S, T, C)
    variables: tuple[str, ...]
    stations: tuple[str, ...]

    @property
    def missing(self) -> Tensor:
        """What was never measured, ``(S, T, C)``."""
        return self.values.isnan()


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows with holes laid over them; what the holes cover is known, and is to be told from the rest."""

    y: Tensor  # (K, n, C), 0 where never measured
    missing: Tensor  # (K, n, C), what a contender does not get: never measured, or hidden
    hidden: Tensor  # (K, n, C), what is scored
    length: Tensor  # (K, n, C), hours of the hole that an entry lies in, 0 outside

    @property
    def times(self) -> Tensor:
        """Hours, ``(K, n)``."""
        return torch.arange(self.y.shape[1], dtype=self.y.dtype).expand(self.y.shape[:2])


def shipped() -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """The five variables that ship, all twelve stations: values ``(S, T, 5)``, their names, and those of stations."""
    fields = [load_beijing_air(name) for name in SHIPPED]
    return torch.stack([field.values.T for field in fields], -1), SHIPPED, fields[0].names


def split(
    values: Tensor, variables: Sequence[str], stations: Sequence[str], train: int = 2 * YEAR, val: int = YEAR
) -> tuple[Record, Record, Record]:
    """Training, validation and test records, one after another in time, in the scale of the first.

    Args:
        values: ``(S, T, C)`` as measured, NaN where missing.
        variables: names of the C.
        stations: names of the S.
        train: hours of the first part.
        val: hours of the second; the rest is the third.
    """
    logarithmic = torch.tensor([name in LOGARITHMIC for name in variables])
    values = torch.where(logarithmic, values.clamp_min(0).log1p(), values.double())
    first = values[:, :train].flatten(0, 1)
    centre = first.nanmean(0)
    scale = (first - centre).square().nanmean(0).sqrt()
    standard = ((values - centre) / scale).float()
    parts = standard.split([train, val, values.shape[1] - train - val], 1)
    first_part, second, third = (Record(part, tuple(variables), tuple(stations)) for part in parts)
    return first_part, second, third


def hole_patterns(record: Record, least: int = LEAST) -> tuple[Tensor, Tensor]:
    """Holes as they occur, all channels together: patterns ``(P, WINDOW, C)``, and station and day of each, ``(P, 2)``.

    They begin at midnight, because stations are serviced at certain hours, and leave the margins of a window alone.

    Args:
        record: where the holes are taken from.
        least: numbers that a pattern hides.
    """
    missing = record.missing.unfold(1, WINDOW, DAY).mT.clone()  # (S, days, WINDOW, C)
    missing[:, :, :MARGIN] = False
    missing[:, :, -MARGIN:] = False
    enough = missing.sum((-2, -1)) >= least
    return missing[enough], enough.nonzero()


def hole_lengths(missing: Tensor) -> Tensor:
    """Hours of the run of missing entries that each entry lies in, 0 where it is there.

    Args:
        missing: bool, ``(..., n, C)``.
    """
    runs = missing.mT.long()  # time last
    forward, backward = torch.zeros_like(runs), torch.zeros_like(runs)
    n = runs.shape[-1]
    for t in range(n):
        before = forward[..., t - 1] if t else 0
        behind = backward[..., n - t] if t else 0
        forward[..., t] = (before + 1) * runs[..., t]
        backward[..., n - 1 - t] = (behind + 1) * runs[..., n - 1 - t]
    return ((forward + backward - 1) * runs).mT


def lay_holes(record: Record, count: int, generator: torch.Generator, least: int = LEAST) -> Windows:
    """Windows of a record, each under the holes of another station and another day of the same record.

    Args:
        record: both the windows and the holes come from it.
        count: K.
        generator: of the choices.
        least: numbers that a pattern hides where it comes from.
    """
    patterns, origin = hole_patterns(record, least)
    stations, hours, _ = record.values.shape
    ys, holes = [], []
    while len(ys) < count:
        pattern = int(torch.randint(len(patterns), (), generator=generator))
        station = int(torch.randint(stations, (), generator=generator))
        day = int(torch.randint((hours - WINDOW) // DAY + 1, (), generator=generator))
        y = record.values[station, DAY * day : DAY * day + WINDOW]
        hidden = patterns[pattern] & ~y.isnan()
        elsewhere = bool((origin[pattern] != torch.tensor([station, day])).all())
        if elsewhere and hidden.any() and not (y.isnan() | hidden).all():  # some of each window has to be there
            ys.append(y)
            holes.append(hidden)
    values, hidden = torch.stack(ys), torch.stack(holes)
    missing = values.isnan() | hidden
    return Windows(values.nan_to_num(), missing, hidden, hole_lengths(missing))


# --- networks, and the VAE --------------------------------------------------------------------------------------------


class HoleDropout(nn.Module):
    """Dropout whose holes are real ones: in training, what an encoder sees is less than what is to be told.

    The loss of the VAE asks for every number that was measured. That the encoder has to tell some of them from the
    rest is what teaches it to impute; the bound stays a bound, of a posterior that has seen less.

    Args:
        patterns: ``(P, n, C)``, from which each series gets the union of two.
    """

    def __init__(self, patterns: Tensor) -> None:
        super().__init__()
        self.register_buffer("patterns", patterns, persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        if not self.training:
            return y
        chosen = self.patterns[torch.randint(len(self.patterns), (2, *y.shape[:-2]))]
        return y.masked_fill(chosen.any(0), 0.0)


class Encoder(nn.Module):
    """Evidence from the channels of one hour, and from which of them are there: a line plus a perceptron.

    The VAE puts zeros where numbers are missing; a measured one is never exactly zero once it is standardised. At the
    start path l sees channel l, so that the VAE begins as a process of each channel and learns to mix them.
    """

    def __init__(self, channels: int, latents: int, width: int, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout, self.latents = dropout, latents
        self.line = nn.Linear(2 * channels, 2 * latents)
        self.net = perceptron(2 * channels, width, 2 * latents)
        own = torch.eye(latents, channels)
        with torch.no_grad():
            self.line.weight.mul_(0.1)
            self.line.bias.zero_()
            self.line.weight[:latents, :channels] += own
            # Sure of what is there, with a variance of 0.03, and not at all of what is not.
            self.line.weight[latents:, channels:] -= 9.5 * own
            self.line.bias[latents:] += 6.0

    def forward(self, y: Tensor) -> Tensor:
        y = self.dropout(y)
        seen = torch.cat([y, (y != 0).to(y)], -1)
        return self.line(seen) + self.net(seen)


class Decoder(nn.Module):
    """Channels from latents: a line plus a perceptron; at the start channel l is path l."""

    def __init__(self, channels: int, latents: int, width: int) -> None:
        super().__init__()
        self.line = nn.Linear(latents, channels)
        self.net = perceptron(latents, width, channels)
        with torch.no_grad():
            self.line.weight.mul_(0.1).add_(torch.eye(channels, latents))
            self.line.bias.zero_()

    def forward(self, latents: Tensor) -> Tensor:
        return self.line(latents) + self.net(latents)


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers; what comes out is small at first."""
    last = nn.Linear(width, outputs)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)


class ChannelNoise(GaussianObservations):
    """Gaussian observations with a noise of each channel."""

    def __init__(self, channels: int, noise: float) -> None:
        super().__init__(noise)
        self.log_noise = nn.Parameter(torch.full((channels,), math.log(noise)))


@dataclass(frozen=True)
class Settings:
    """How a VAE is trained: the same for every prior."""

    steps: int = 2000
    batch: int = 8  # windows in a step
    latents: int = 12
    width: int = 128  # of both hidden layers, of encoder and decoder
    rate: float = 8e-3  # of AdamW at its height
    faster: float = 5.0  # times the rate for lengthscales and noises, which are few and have far to go
    decay: float = 1e-4
    noise: float = 0.03
    lengthscales: tuple[float, float] = (6.0, 12.0)  # hours, from the first path to the last at the start
    features: int = 64  # of HiPPO
    every: int = 250  # steps between looks at the validation holes
    gp_windows: int = 32  # that a GP of each channel is fitted on
    gp_steps: int = 50  # of Adam, for that


#: Windows of validation and of test, in the example and in full.
VAL, TEST = 96, 250
EXAMPLE = Settings(steps=800, latents=6, width=64, features=48, every=200)
SMOKE = Settings(steps=4, batch=2, latents=6, width=16, features=12, every=4, gp_windows=2, gp_steps=4)


def make_vae(name: str, channels: int, patterns: Tensor, settings: Settings) -> GPPriorVAE:
    """A VAE with one of three priors, and else the same.

    Args:
        name: ``PLAIN``, ``MARKOV`` or ``HIPPO``.
        channels: C.
        patterns: holes of the training record, laid over what the encoder sees.
        settings: of the networks.
    """
    L = settings.latents
    encoder = Encoder(channels, L, settings.width, HoleDropout(patterns))
    decoder = Decoder(channels, L, settings.width)
    noise = ChannelNoise(channels, settings.noise)
    lengthscales = torch.logspace(*(math.log10(hours) for hours in settings.lengthscales), L)
    if name == HIPPO:
        kernel = gpytorch.kernels.MaternKernel(1.5, batch_shape=torch.Size([L]))
        kernel.initialize(lengthscale=lengthscales.view(L, 1, 1))
        features = gpseq.features.HippoFeatures(settings.features, horizon=WINDOW - 1.0)
        return GPPriorVAE(encoder, decoder, features, kernel, L, noise)
    if name == MARKOV:
        return GPPriorVAE(
            encoder, decoder, num_latents=L, likelihood=noise, prior=MarkovPrior("matern32", L, lengthscales)
        )
    # A path that has forgotten everything within an hour is a standard normal number of each hour: a VAE.
    prior = MarkovPrior("matern12", L, 0.01).requires_grad_(False)
    return GPPriorVAE(encoder, decoder, num_latents=L, likelihood=noise, prior=prior)


@dataclass(frozen=True, eq=False)
class Trained:
    """A VAE as it was best on validation holes, and what was seen on the way."""

    vae: GPPriorVAE
    curve: list[tuple[int, float, float]]  # step, and RMSE and NLPD of validation holes
    seconds: float


def train(name: str, record: Record, val: Windows, settings: Settings, seed: int) -> Trained:
    """Random windows of the training record; the best of some looks at the validation holes, by NLPD.

    Args:
        name: of the prior, as for :func:`make_vae`.
        record: for training.
        val: what training stops by.
        settings: of the networks and of their training.
        seed: of everything that is drawn.
    """
    begun = time.process_time()
    torch.manual_seed(seed)
    stations, hours, channels = record.values.shape
    vae = make_vae(name, channels, hole_patterns(record)[0], settings)
    networks = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    few = [value for part in (vae.prior, vae.likelihood) for value in part.parameters() if value.requires_grad]
    groups = [{"params": networks}, {"params": few, "weight_decay": 0.0}]
    rates = [settings.rate, settings.faster * settings.rate]
    optimiser = torch.optim.AdamW(groups, settings.rate, weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, settings.steps, pct_start=0.1)
    times = torch.arange(WINDOW, dtype=torch.float32).expand(settings.batch, WINDOW)
    best, state, curve = math.inf, vae.state_dict(), []
    for step in range(1, settings.steps + 1):
        where = torch.randint(stations, (settings.batch,)).tolist()
        when = torch.randint(hours - WINDOW, (settings.batch,)).tolist()
        y = torch.stack([record.values[s, t : t + WINDOW] for s, t in zip(where, when, strict=True)])
        seen = ~y.isnan()
        optimiser.zero_grad()
        (vae(times, y, ~seen).loss / seen.sum()).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % settings.every == 0 or step == settings.steps:
            vae.eval()
            found = score(impute_vae(vae, val, draws=16), val)
            vae.train()
            curve.append((step, found["rmse"], found["nlpd"]))
            if found["nlpd"] < best:
                best, state = found["nlpd"], copy.deepcopy(vae.state_dict())
    vae.load_state_dict(state)
    return Trained(vae.eval(), curve, time.process_time() - begun)


# --- what contenders say of hidden entries, each by itself: batch (hidden,), event (1,) -------------------------------


def impute_vae(vae: GPPriorVAE, windows: Windows, draws: int = DRAWS, seed: int = 0) -> gpseq.Predictive:
    """By draws of the latent paths, and the noise of the channel."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in torch.arange(len(windows.y)).split(CHUNK):
        p = vae.impute(windows.times[part], windows.y[part], windows.missing[part], draws, generator)
        found.append(p.pointwise()[windows.hidden[part]])
    return gpseq.Predictive.cat(found)


def interpolate(windows: Windows) -> Tensor:
    """Straight lines between the neighbours of a hole, in each channel; level at the ends, 0 where nothing is known."""
    filled = windows.y.double().numpy().copy()
    gone = windows.missing.numpy()
    hours = np.arange(filled.shape[1])
    for k, c in np.argwhere(gone.any(1)):
        there = ~gone[k, :, c]
        known = np.interp(hours, hours[there], filled[k, there, c]) if there.any() else 0.0
        filled[k, :, c] = np.where(there, filled[k, :, c], known)
    return torch.from_numpy(filled)


def impute_linear(windows: Windows, val: Windows) -> gpseq.Predictive:
    """Lines, and about them a Gaussian whose spread in each channel is that of its errors on validation holes."""
    lines, trial = interpolate(windows), interpolate(val)
    errors = (trial - val.y).square()[val.hidden]
    channel = val.hidden.nonzero()[:, -1]
    counts = torch.bincount(channel, minlength=val.y.shape[-1])
    sums = torch.zeros(val.y.shape[-1], dtype=errors.dtype).index_add(0, channel, errors)
    # As if ten more errors of each channel were those of all: some channels hardly ever have holes.
    variances = (sums + 10 * errors.mean()) / (counts + 10)
    of_entries = variances[windows.hidden.nonzero()[:, -1]].unsqueeze(-1)
    return gpseq.Predictive.from_moments(lines[windows.hidden].unsqueeze(-1), variance=of_entries)


@dataclass(frozen=True, eq=False)
class ChannelGP:
    """A Matérn-3/2 process of one channel, with its noise; exact, by a Kalman filter."""

    prior: MarkovPrior
    log_scale: Tensor  # of the process, a logarithm of a standard deviation
    log_noise: Tensor  # logarithm of a variance

    def posterior(self, y: Tensor, missing: Tensor) -> gpseq.generative.MarkovPosterior:
        """Given ``y`` and ``missing``, ``(K, n)`` each; in units of the process."""
        scale, times = self.log_scale.exp(), torch.arange(y.shape[-1], dtype=torch.float64)
        variance = (self.log_noise.exp() / scale.square()).expand(y.shape)
        return self.prior.posterior(times, (y / scale).unsqueeze(-2), variance.unsqueeze(-2), missing)

    def log_evidence(self, y: Tensor, missing: Tensor) -> Tensor:
        """Log density of what is there, summed over windows."""
        return self.posterior(y, missing).log_evidence.sum() - (~missing).sum() * self.log_scale


def fit_gps(record: Record, count: int, steps: int, generator: torch.Generator) -> list[ChannelGP]:
    """One process a channel, by marginal likelihood of random training windows.

    Args:
        record: for training.
        count: windows.
        steps: of Adam.
        generator: of the windows.
    """
    stations, hours, channels = record.values.shape
    where = torch.randint(stations, (count,), generator=generator).tolist()
    when = torch.randint(hours - WINDOW, (count,), generator=generator).tolist()
    windows = torch.stack([record.values[s, t : t + WINDOW] for s, t in zip(where, when, strict=True)]).double()
    found = []
    for c in range(channels):
        y, missing = windows[..., c].nan_to_num(), windows[..., c].isnan()
        gp = ChannelGP(
            MarkovPrior("matern32", 1, 10.0, dtype=torch.float64),
            torch.zeros((), dtype=torch.float64, requires_grad=True),
            torch.tensor(math.log(0.05), dtype=torch.float64, requires_grad=True),
        )
        optimiser = torch.optim.Adam([*gp.prior.parameters(), gp.log_scale, gp.log_noise], 0.1)
        for _ in range(steps):
            optimiser.zero_grad()
            (-gp.log_evidence(y, missing) / (~missing).sum()).backward()
            optimiser.step()
        found.append(gp)
    return found


@torch.no_grad()
def impute_gps(gps: Sequence[ChannelGP], windows: Windows) -> gpseq.Predictive:
    """The exact posterior of each channel by itself."""
    means, variances = [], []
    for c, gp in enumerate(gps):
        posterior = gp.posterior(windows.y[..., c].double(), windows.missing[..., c])
        scale = gp.log_scale.exp()
        means.append(scale * posterior.mean[:, 0])
        variances.append(scale.square() * posterior.variance[:, 0] + gp.log_noise.exp())
    mean, variance = (torch.stack(part, -1)[windows.hidden].unsqueeze(-1) for part in (means, variances))
    return gpseq.Predictive.from_moments(mean, variance=variance)


# --- scores -----------------------------------------------------------------------------------------------------------


def score(p: gpseq.Predictive, windows: Windows) -> dict[str, float]:
    """RMSE, NLPD of each hidden entry, and coverage of the central 95 % interval; RMSE and NLPD by length of hole too.

    Args:
        p: of the hidden entries, in the order of ``windows.hidden``.
        windows: what is true.
    """
    y = windows.y[windows.hidden].unsqueeze(-1).to(p.dtype)
    squares = (p.mean - y).square().squeeze(-1).double()
    nlpd = -p.log_prob(y).double()
    found = {
        "rmse": squares.mean().sqrt().item(),
        "nlpd": nlpd.mean().item(),
        "coverage": metrics.interval_coverage(*p.interval(0.95), y).double().mean().item(),
    }
    length = windows.length[windows.hidden]
    for name, (low, high) in LENGTHS.items():
        part = (length >= low) & (length <= high)
        found[f"rmse, {name}"] = squares[part].mean().sqrt().item()
        found[f"nlpd, {name}"] = nlpd[part].mean().item()
    return found


def contend(
    record: Record, val: Windows, test: Windows, settings: Settings, seed: int, name: str
) -> tuple[gpseq.Predictive, GPPriorVAE | None, float]:
    """What a contender says of the hidden entries of test windows, its VAE if it is one, and its CPU seconds.

    Args:
        record: for training.
        val: what training stops by, and what the spread about lines is fitted on.
        test: to be imputed.
        settings: of VAEs.
        seed: of training.
        name: one of ``CONTENDERS``.
    """
    begun = time.process_time()
    vae = None
    if name == LINEAR:
        p = impute_linear(test, val)
    elif name == EXACT:
        generator = torch.Generator().manual_seed(seed)
        p = impute_gps(fit_gps(record, settings.gp_windows, settings.gp_steps, generator), test)
    else:
        vae = train(name, record, val, settings, seed).vae
        p = impute_vae(vae, test)
    return p, vae, time.process_time() - begun


# --- the example ------------------------------------------------------------------------------------------------------


def main(out: Path, smoke: bool) -> None:
    """Five variables that ship: every contender fills the same holes; one table, one figure.

    Args:
        out: folder of the figure.
        smoke: few steps, few windows.
    """
    settings = SMOKE if smoke else EXAMPLE
    values, variables, stations = shipped()
    record, val_record, test_record = split(values, variables, stations)
    generator = torch.Generator().manual_seed(0)
    val = lay_holes(val_record, 8 if smoke else VAL, generator)
    test = lay_holes(test_record, 8 if smoke else TEST, generator)
    print(f"air: {int(test.hidden.sum()):,} numbers hidden in {len(test.y)} windows of {WINDOW} hours")
    columns = ["rmse", "nlpd", "coverage", *(f"rmse, {name}" for name in LENGTHS)]
    print(f"{'':>22}  " + "  ".join(f"{column:>20}" for column in columns) + f"  {'CPU s':>6}")
    found: dict[str, tuple[gpseq.Predictive, GPPriorVAE | None]] = {}
    for name in CONTENDERS:
        p, vae, seconds = contend(record, val, test, settings, 0, name)
        scores = score(p, test)
        print(f"{name:>22}  " + "  ".join(f"{scores[column]:20.3f}" for column in columns) + f"  {seconds:6.0f}")
        found[name] = p, vae
    draw(out / "air.png", test, {name: p for name, (p, _) in found.items()}, variables)
    print(f"figure: {out / 'air.png'}")


def longest_hole(windows: Windows, low: int, high: int, channel: int | None = None) -> tuple[int, int]:
    """Window and channel with the most hidden entries in holes of some lengths.

    Args:
        windows: to be searched.
        low: hours.
        high: hours.
        channel: only this one.
    """
    counts = (windows.hidden & (windows.length >= low) & (windows.length <= high)).sum(1)
    if channel is not None:
        counts[:, :channel] = counts[:, channel + 1 :] = 0
    best = int(counts.argmax())
    return best // counts.shape[1], best % counts.shape[1]


def draw(path: Path, test: Windows, found: Mapping[str, gpseq.Predictive], variables: Sequence[str]) -> None:
    """Two windows with holes, and what three contenders say of one channel; RMSE by length of hole.

    Args:
        path: of the figure.
        test: the windows.
        found: what contenders say of all hidden entries.
        variables: names of channels.
    """
    figure = plots.new_figure(11, 6.0)
    grid = figure.add_gridspec(2, 3)
    place = torch.full(test.hidden.shape, -1)
    place[test.hidden] = torch.arange(int(test.hidden.sum()))  # where an entry is among the predictions
    for row, (low, high) in enumerate(((3, 12), (13, WINDOW))):
        ax = figure.add_subplot(grid[row, :2])
        k, c = longest_hole(test, low, high)
        hours = torch.arange(WINDOW)
        there, hidden = ~test.missing[k, :, c], test.hidden[k, :, c]
        ax.plot(hours[there], test.y[k, there, c], "o", color=plots.GREY, markersize=3, label="observed")
        ax.plot(hours[hidden], test.y[k, hidden, c], "o", color="black", markersize=3, fillstyle="none", label="hidden")
        for name, color in ((LINEAR, plots.ORANGE), (PLAIN, plots.PINK), (MARKOV, plots.BLUE)):
            p = found[name][place[k, hidden, c]]
            gaps = (hours[hidden].diff() > 1).nonzero().flatten() + 1  # a line ends where its hole does
            parts = torch.tensor_split(torch.arange(int(hidden.sum())), gaps)
            lower, upper = p.interval(0.95)
            for number, part in enumerate(parts):
                where = hours[hidden][part]
                label = name if number == 0 else None
                ax.plot(where, p.mean[part, 0], ".-", color=color, linewidth=1.3, markersize=3, label=label)
                if name == MARKOV:
                    ax.fill_between(where, lower[part, 0], upper[part, 0], color=color, alpha=0.2, linewidth=0)
        ax.set_title(f"{variables[c]}, holes of {low} to {high} hours", loc="left", fontsize=9)
        plots.style_axes(ax, "hour", "standardised")
        if row == 0:
            ax.legend(frameon=False, fontsize=7, ncols=3)
    ax = figure.add_subplot(grid[:, 2])
    draw_by_length(ax, {name: [score(p, test)] for name, p in found.items()}, "rmse", "RMSE, standardised")
    plots.save_figure(figure, path)


def draw_by_length(ax: Any, scores: Mapping[str, Sequence[Mapping[str, float]]], key: str, label: str) -> None:
    """A score by length of hole: means over seeds, and a bar of one standard deviation each way.

    Args:
        ax: where to draw.
        scores: of each contender, one for each seed.
        key: ``"rmse"`` or ``"nlpd"``.
        label: of the vertical axis.
    """
    colors = dict(zip(CONTENDERS, (plots.ORANGE, plots.GREY, plots.PINK, plots.BLUE, plots.GREEN), strict=True))
    for number, (name, runs) in enumerate(scores.items()):
        table = torch.tensor([[run[f"{key}, {length}"] for length in LENGTHS] for run in runs])
        spread = table.std(0) if len(table) > 1 else torch.zeros(len(LENGTHS))
        at = torch.arange(len(LENGTHS)) + 0.1 * (number - 2)
        ax.errorbar(at, table.mean(0), spread, fmt="o", color=colors[name], label=name, markersize=5)
    plots.style_axes(ax, "length of hole", label)
    ax.set_xticks(range(len(LENGTHS)), list(LENGTHS))
    ax.set_ylim(bottom=0 if key == "rmse" else None)
    ax.legend(frameon=False, fontsize=8)
