"""A field of temperature in four tasks: what a sequence VAE still knows of the first, and who forgot the rest."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, RBFKernel, ScaleKernel
from torch import Tensor, nn

import gpseq
from gpseq import metrics, plots
from gpseq.continual import EWC, gaussian
from gpseq.datasets import load_era5_temperature
from gpseq.features import HippoFeatures, InducingFeatures, InducingPoints, SelectedPoints
from gpseq.generative import GPPriorVAE
from gpseq.variational import online

NUM_TASKS, HOURS, DAY = 4, 186, 24
#: Shares of a task's hours that are never learnt: to score, and to choose the strength of EWC.
TEST, VAL = 0.2, 0.1
HIPPO, SELECTED, MOVED = "HiPPO", "re-selected points", "moved points"
KINDS = (HIPPO, SELECTED, MOVED)
FREE, HELD, FROZEN = "free", "EWC", "frozen"
TREATMENTS = (FREE, HELD, FROZEN)
#: Of EWC, chosen by ``tune`` in the benchmark.
STRENGTH = 100.0
LEVEL = 0.95
SCORES = ("rmse", "nlpd", "coverage")
#: Least standard deviation of the noise in kelvin, below which no temperature of a whole map is known.
LEAST_NOISE = 0.05
#: Features for each lengthscale of an RBF kernel on the horizon.
CAPACITY = 1.5


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """Some days of maps. ``y`` is NaN wherever it must not be learnt; ``truth`` is only for scores."""

    x: Tensor  # (n,), days
    y: Tensor  # (n, S), standardised
    truth: Tensor  # (n, S), likewise
    val: Tensor  # (n,), bool
    test: Tensor  # (n,), bool

    @property
    def missing(self) -> Tensor:
        """Hours that are held out, ``(n,)``."""
        return self.val | self.test

    @property
    def end(self) -> float:
        """When it is over, in days: an hour after its last map."""
        return self.x[-1].item() + 1 / DAY


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks, standardised by what was learnt from in the first one."""

    tasks: tuple[Task, ...]
    mean: Tensor  # (S,), kelvin
    scale: float  # kelvin
    shape: tuple[int, int]


def load(seed: int, hours: int = HOURS) -> Stream:
    """Four tasks of the month; hours to test and to validate are drawn anew for each seed.

    Args:
        seed: of the hours that are held out.
        hours: of each task.
    """
    field = load_era5_temperature()
    assert field.shape is not None
    generator = torch.Generator().manual_seed(seed)
    held = [hold_out(hours, generator) for _ in range(NUM_TASKS)]
    seen = field.values[:hours][~(held[0][0] | held[0][1])]
    mean = seen.mean(0)
    # One scale for all places, so that one noise, and one error in kelvin, fits them all.
    scale = (seen - mean).square().mean().sqrt().item()
    tasks = []
    for number, (val, test) in enumerate(held):
        rows = slice(number * hours, (number + 1) * hours)
        truth = ((field.values[rows] - mean) / scale).float()
        y = truth.masked_fill((val | test).unsqueeze(-1), math.nan)
        tasks.append(Task(field.time[rows] / DAY, y, truth, val, test))
    return Stream(tuple(tasks), mean, scale, field.shape)


def hold_out(hours: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which hours validate and which test, two masks ``(hours,)`` that never meet."""
    order = torch.randperm(hours, generator=generator)
    test, val = torch.zeros(2, hours, dtype=torch.bool)
    tested, validated = round(TEST * hours), round(VAL * hours)
    test[order[:tested]] = True
    val[order[tested : tested + validated]] = True
    return val, test


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    num_features: int = 80
    steps: int = 200
    rate: float = 0.01
    latents: int = 8
    width: int = 64
    lengthscale: float = 0.5  # days, where each channel begins
    noise: float = 0.05  # variance, likewise
    draws: int = 64
    seed: int = 0


class Reconstruction(nn.Module):
    """Maps from themselves, without their neighbours in time: what EWC holds."""

    def __init__(self, vae: GPPriorVAE) -> None:
        super().__init__()
        self.encoder, self.decoder = vae.encoder, vae.decoder

    def forward(self, y: Tensor) -> Tensor:
        """``(n, S)`` to ``(n, S)``."""
        return self.decoder(self.encoder(y).chunk(2, -1)[0])


class Learner:
    """A VAE that meets tasks in turn, and the place of its features in each of them.

    Args:
        kind: of features.
        setting: what all have in common. Networks of one seed begin alike, whatever the kind.
        num_places: S.
        scale: kelvin of one unit.
    """

    def __init__(self, kind: str, setting: Setting, num_places: int, scale: float) -> None:
        self.kind, self.setting, self.scale = kind, setting, scale
        self.tasks = 0
        self.ewc: EWC | None = None
        self.frozen = False
        torch.manual_seed(setting.seed)
        latents, width = setting.latents, setting.width
        encoder = nn.Sequential(nn.Linear(num_places, width), nn.Tanh(), nn.Linear(width, 2 * latents))
        decoder = nn.Sequential(nn.Linear(latents, width), nn.Tanh(), nn.Linear(width, num_places))
        kernel = RBFKernel(batch_shape=torch.Size([latents]))
        kernel.lengthscale = setting.lengthscale
        features = InducingPoints(torch.zeros(1, 1))  # until the first task says when it is
        self.vae = GPPriorVAE(encoder, decoder, features, kernel, num_latents=latents, noise=setting.noise)

    def treated(self, treatment: str, strength: float, first: Task) -> Learner:
        """A copy that goes on in one of three ways; to be asked for after the first task."""
        new = copy.deepcopy(self)
        if treatment == HELD:
            # The noise of now is the unit of the curvature, for all tasks.
            family = gaussian(noise=new.vae.likelihood.noise.item())
            new.ewc = EWC(Reconstruction(new.vae), strength, family=family, empirical=True)
            new._consolidate(first)
        new.frozen = treatment == FROZEN
        for part in (new.vae.encoder, new.vae.decoder, new.vae.likelihood):
            part.requires_grad_(not new.frozen)
        return new

    def learn(self, task: Task) -> None:
        """Place the features, train, fold the task into what is known. The kernel is learnt on the first one."""
        vae, setting = self.vae, self.setting
        torch.manual_seed(1000 * setting.seed + self.tasks)  # the same draws for all contenders
        vae.prior.features = self._placed(task)
        vae.prior.covar_module.requires_grad_(self.tasks == 0)
        least = 2 * math.log(LEAST_NOISE / self.scale)
        parameters = [p for p in vae.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, setting.rate) if parameters else None
        for _ in range(setting.steps if parameters else 0):
            assert optimiser is not None
            optimiser.zero_grad()
            loss = vae(task.x, task.y, task.missing).loss
            if self.ewc is not None:
                loss = loss + self.ewc.penalty()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                vae.likelihood.log_noise.clamp_(min=least)
        vae.update(task.x, task.y, task.missing)
        self.tasks += 1
        if self.ewc is not None:
            self._consolidate(task)

    def _consolidate(self, task: Task) -> None:
        assert self.ewc is not None
        seen = task.y[~task.missing]
        self.ewc.consolidate([(seen, seen)])

    def _placed(self, task: Task) -> InducingFeatures:
        number, old = self.setting.num_features, self.vae.prior.features
        if self.kind == HIPPO:
            return old.with_horizon(task.end) if self.tasks else HippoFeatures(number, task.end)
        seen = task.x[~task.missing].double()
        if self.kind == MOVED:
            generator = torch.Generator().manual_seed(1000 * self.setting.seed + self.tasks)
            points = None if self.tasks == 0 else old.nodes().detach().flatten()
            # A new parameter for each task: what was gathered stands on the old points, which must stay.
            return InducingPoints(mixed_points(points, seen, number, self.tasks, generator), learn=True)
        begun = SelectedPoints(number, points=old.nodes() if self.tasks else None)
        chosen = begun.following(seen.unsqueeze(-1), mean_kernel(self.vae.prior.covar_module))
        return InducingPoints(chosen.nodes())

    def predict(self, x: Tensor, networks: Learner | None = None) -> gpseq.Predictive:
        """Maps at some times.

        Args:
            x: days ``(m,)``.
            networks: who decodes what is remembered; ``None`` is this learner as it is now.
        """
        asked = self.vae
        if networks is not None:
            asked = copy.deepcopy(networks.vae)
            asked.belief.state = self.vae.state
        generator = torch.Generator().manual_seed(self.setting.seed)
        return asked.predict(x, num_samples=self.setting.draws, generator=generator)


def mixed_points(old: Tensor | None, new: Tensor, number: int, tasks: int, generator: torch.Generator) -> Tensor:
    """Where moved points begin: a random choice of old ones and new times, in proportion to the tasks behind them.

    Args:
        old: points so far ``(m,)``; ``None`` in the first task.
        new: times of the new task ``(n,)``.
        number: M, at most.
        tasks: that have been learnt.
        generator: of the choice.

    Returns:
        ``(M, 1)``.
    """
    fresh = min(len(new), number if old is None else max(1, round(number / (tasks + 1))))
    points = new[torch.randperm(len(new), generator=generator)[:fresh]]
    if old is not None:
        kept = torch.randperm(len(old), generator=generator)[: number - fresh]
        points = torch.cat([old[kept], points])
    return points.unsqueeze(-1)


def mean_kernel(kernel: Kernel) -> Kernel:
    """The mean of the channels' RBF kernels: one choice of points serves them all."""
    parts = []
    lengthscales = kernel.lengthscale.detach().flatten()
    for lengthscale in lengthscales:
        part = ScaleKernel(RBFKernel())
        part.base_kernel.lengthscale, part.outputscale = lengthscale, 1 / len(lengthscales)
        parts.append(part)
    return AdditiveKernel(*parts)


# --- scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(prediction: gpseq.Predictive, truth: Tensor) -> dict[str, float]:
    """RMSE in the stream's unit, NLPD of a pixel in nats, coverage of the central 95 % band; all pixels alike."""
    assert prediction.noise is not None
    mean, variance = prediction.mean.flatten(), (prediction.variance + prediction.noise[0]).flatten()
    target = truth.flatten()
    return {
        "rmse": metrics.rmse(mean, target).item(),
        "nlpd": metrics.nlpd(mean, variance, target).item(),
        "coverage": metrics.interval_coverage(*metrics.gaussian_interval(mean, variance, LEVEL), target).item(),
    }


@dataclass
class Followed:
    """One contender along the stream; rows of a triangle are stages, and its columns the tasks so far.

    Attributes:
        now: score -> triangle, with the networks as they are at the stage.
        memory: likewise, with those that a task was learnt with, which leaves what the processes have lost.
        noise: standard deviation of the noise after each task.
        seconds: of learning each task.
        residual: share of the prior variance that the features do not see after each task, mean of the channels.
        lengthscales: of the channels, in days.
        maps: name -> ``(S,)`` of the hour that is drawn, standardised.
    """

    now: dict[str, list[list[float]]]
    memory: dict[str, list[list[float]]]
    noise: list[float]
    seconds: list[float]
    residual: list[float]
    lengthscales: list[float]
    maps: dict[str, list[float]]

    def end(self, name: str = "rmse", which: str = "now") -> float:
        """Mean over the tasks after the last."""
        row = getattr(self, which)[name][-1]
        return sum(row) / len(row)

    def at_once(self, name: str = "rmse") -> float:
        """Mean over the tasks, each right after it was learnt."""
        return sum(row[-1] for row in self.now[name]) / len(self.now[name])


def matrix(triangle: Sequence[Sequence[float]]) -> np.ndarray:
    """A triangle as a square with NaN above the diagonal."""
    square = np.full((len(triangle), len(triangle)), np.nan)
    for row, values in zip(square, triangle, strict=True):
        row[: len(values)] = values
    return square


def drawn_hour(task: Task) -> int:
    """The held-out hour in the middle of a task."""
    rows = task.test.nonzero().flatten()
    return int(rows[(rows - len(task.x) // 2).abs().argmin()])


def follow(stream: Stream, learner: Learner, seconds: float) -> Followed:
    """Go on from a learner that has learnt the first task, and score all tasks so far after each."""
    found = Followed({name: [] for name in SCORES}, {name: [] for name in SCORES}, [], [seconds], [], [], {})
    then: list[Learner] = []
    first = stream.tasks[0]
    shown = first.x[drawn_hour(first)].unsqueeze(0)
    for stage, task in enumerate(stream.tasks):
        if stage:
            begun = time.process_time()
            learner.learn(task)
            found.seconds.append(time.process_time() - begun)
        then.append(copy.deepcopy(learner))
        rows: dict[str, list[dict[str, float]]] = {"now": [], "memory": []}
        for past, networks in zip(stream.tasks, then, strict=False):
            x, truth = past.x[past.test], past.truth[past.test]
            rows["now"].append(score(learner.predict(x), truth))
            new = past is task  # its networks are those of now
            rows["memory"].append(rows["now"][-1] if new else score(learner.predict(x, networks), truth))
        for which, told in rows.items():
            for name in SCORES:
                getattr(found, which)[name].append([one[name] for one in told])
        found.noise.append(learner.vae.likelihood.noise.sqrt().item())
        found.residual.append(residual(learner, task.end).mean().item())
        if stage == 0:
            found.maps["at once"] = learner.predict(shown).mean.flatten().tolist()
    found.lengthscales = learner.vae.prior.covar_module.lengthscale.detach().flatten().tolist()
    found.maps["end"] = learner.predict(shown).mean.flatten().tolist()
    found.maps["memory"] = learner.predict(shown, then[0]).mean.flatten().tolist()
    return found


def residual(learner: Learner, end: float) -> Tensor:
    """Share of each channel's prior variance that the features do not see, over all time until the end, ``(L,)``."""
    x = torch.linspace(0, end, 512, dtype=torch.float64)[None, :, None]
    with torch.no_grad():
        return online.mean_residual_variance(learner.vae.state, learner.vae.prior.kernel_prior(frozen=True), x)


# --- comparison -------------------------------------------------------------------------------------------------------


def begun(stream: Stream, kind: str, setting: Setting) -> tuple[Learner, float]:
    """A learner after the first task, and the seconds that it took."""
    learner = Learner(kind, setting, stream.mean.numel(), stream.scale)
    started = time.process_time()
    learner.learn(stream.tasks[0])
    return learner, time.process_time() - started


def compare(stream: Stream, kind: str, setting: Setting, strength: float = STRENGTH) -> dict[str, Followed]:
    """One kind of features; networks go on learning, are held by EWC, or stay. The first task is common to all."""
    first, seconds = begun(stream, kind, setting)
    return {
        treatment: follow(stream, first.treated(treatment, strength, stream.tasks[0]), seconds)
        for treatment in TREATMENTS
    }


def tune(stream: Stream, setting: Setting, strengths: Sequence[float]) -> dict[float, float]:
    """RMSE on validation hours of the first two tasks after the second, mean of all kinds, for strengths of EWC.

    The hours of the second task alone would ask for no springs at all.
    """
    errors = dict.fromkeys(strengths, 0.0)
    for kind in KINDS:
        first, _ = begun(stream, kind, setting)
        for strength in strengths:
            learner = first.treated(HELD, strength, stream.tasks[0])
            learner.learn(stream.tasks[1])
            for task in stream.tasks[:2]:
                found = score(learner.predict(task.x[task.val]), task.truth[task.val])
                errors[strength] += found["rmse"] / (2 * len(KINDS))
    return errors


def references(stream: Stream) -> dict[str, list[float]]:
    """RMSE of each task without a model: the mean map of the first, and lines in time between hours that were kept."""
    found: dict[str, list[float]] = {"mean map of task 1": [], "lines between kept hours": []}
    for task in stream.tasks:
        truth, kept = task.truth[task.test], ~task.missing
        at = torch.searchsorted(task.x[kept], task.x[task.test]).clamp(1, int(kept.sum()) - 1)
        left, right = task.x[kept][at - 1], task.x[kept][at]
        share = ((task.x[task.test] - left) / (right - left)).clamp(0, 1).float().unsqueeze(-1)
        line = torch.lerp(task.y[kept][at - 1], task.y[kept][at], share)
        found["mean map of task 1"].append(truth.square().mean().sqrt().item())
        found["lines between kept hours"].append((line - truth).square().mean().sqrt().item())
    return found


def capacity(lengthscales: Sequence[float], days: float) -> tuple[float, float]:
    """Features that the rule asks for on so many days: for the median channel, and for the one that varies fastest."""
    ordered = torch.tensor(lengthscales)
    return CAPACITY * days / ordered.median().item(), CAPACITY * days / ordered.min().item()


def main(out: Path, smoke: bool) -> None:
    """All contenders on one seed, with fewer features than the rule asks for; a table and two figures."""
    hours = 24 if smoke else HOURS
    setting = Setting(num_features=12, steps=3, width=16, latents=4, draws=8) if smoke else Setting()
    stream = load(setting.seed, hours)
    found = {kind: compare(stream, kind, setting) for kind in KINDS}

    days = NUM_TASKS * hours / DAY
    median, most = capacity(found[HIPPO][FREE].lengthscales, days)
    print(
        f"{NUM_TASKS} tasks of {hours} hours, {setting.num_features} features; the rule asks for {median:.0f} (median"
    )
    print(f"channel) to {most:.0f} (fastest). RMSE in units of {stream.scale:.2f} K, means over the tasks")
    print(f"{'':>28}  at once     end  memory   drift   NLPD at once, end   coverage at once, end   task 1 at the end")
    for kind in KINDS:
        for treatment, one in found[kind].items():
            drift = one.end() - one.end(which="memory")
            print(
                f"{kind + ', ' + treatment:>28}  {one.at_once():7.3f} {one.end():7.3f} {one.end(which='memory'):7.3f}"
                f" {drift:7.3f}   {one.at_once('nlpd'):12.2f} {one.end('nlpd'):6.2f}"
                f"   {one.at_once('coverage'):16.1%} {one.end('coverage'):6.1%}"
                f"   {one.now['rmse'][-1][0]:.3f}, {one.now['coverage'][-1][0]:.0%} covered"
            )
    for name, errors in references(stream).items():
        print(f"{name:>28}  {sum(errors) / len(errors):7.3f}")

    draw_errors(out / "field.png", {kind: {t: one.now["rmse"] for t, one in found[kind].items()} for kind in KINDS})
    shown = {f"{kind}, {FREE}": found[kind][FREE].maps for kind in (HIPPO, MOVED)}
    first = stream.tasks[0]
    draw_maps(out / "field_maps.png", first.truth[drawn_hour(first)].tolist(), shown, stream)
    print(f"figures: {out / 'field.png'}, {out / 'field_maps.png'}")


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_errors(path: Path, errors: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> None:
    """Errors of each task after each later one: a row of panels a kind, a column a treatment."""
    figure = plots.new_figure(9.0, 7.0)
    panels = {f"{kind}, {name}": matrix(one) for kind, parts in errors.items() for name, one in parts.items()}
    axes = figure.subplots(len(errors), len(panels) // len(errors))
    plots.plot_past_errors(list(axes.flat), panels, "RMSE, held-out hours (standardised)", "task")
    plots.save_figure(figure, path)


def draw_maps(
    path: Path, truth: Sequence[float], maps: Mapping[str, Mapping[str, Sequence[float]]], stream: Stream
) -> None:
    """A held-out hour of task 1: as it was, right after its task, at the end, and there by the networks of then."""
    titles = {"at once": "right after task 1", "end": "after task 4", "memory": "networks of then"}
    kelvin = stream.mean.reshape(stream.shape)
    shown = {name: [truth, *(parts[key] for key in titles)] for name, parts in maps.items()}
    pictures = {
        name: [torch.tensor(values).reshape(stream.shape) * stream.scale + kelvin - 273.15 for values in rows]
        for name, rows in shown.items()
    }
    every = torch.stack([one for rows in pictures.values() for one in rows])
    figure = plots.new_figure(11.0, 0.4 + 2.5 * len(maps))
    axes = figure.subplots(len(maps), len(titles) + 1, squeeze=False)
    for row, (name, parts) in zip(axes, pictures.items(), strict=True):
        for ax, picture, title in zip(row, parts, ("as it was", *titles.values()), strict=True):
            image = ax.imshow(picture, cmap="viridis", vmin=every.min(), vmax=every.max(), extent=(-10, 2, 50, 58))
            ax.set_aspect(1.7)  # degrees of longitude are shorter here
            ax.set_xticks([])
            ax.set_yticks([])
            error = (picture - parts[0]).square().mean().sqrt().item()
            ax.set_title(title + (f": {error:.2f} K" if error else ""), loc="left", fontsize=9)
        row[0].set_ylabel(name, fontsize=9)
    bar = figure.colorbar(image, ax=list(axes.flat), pad=0.01, aspect=20)
    bar.set_label("temperature [°C]", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    plots.save_figure(figure, path)
