"""A maximum that moves, and five ways to run after it; one evaluation a step, the same acquisition function for all."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from botorch.acquisition import UpperConfidenceBound
from botorch.exceptions.warnings import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.models.transforms.input import Normalize
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from gpseq.features import InducingPoints, space_time_features, spread_points
from gpseq.integrations.botorch import StreamingSingleTaskGP
from gpseq.models import CapacityWarning

WARM_UP = 20
#: Every so many steps all methods learn their hyperparameters anew, by BoTorch's `fit_gpytorch_mll`.
REFIT_EVERY = 25
#: Features of each streaming model with a time column: times and places. One without has as many points.
NUM_TIMES, NUM_PLACES = 7, 10
#: Steps in a unit of time, for kernels; how far back a window reaches in steps; observations kept for fitting.
UNIT, WINDOW, KEPT = 50.0, 30.0, 60
#: Weight of the variance in the upper confidence bound.
BETA = 2.0
NOISE = 0.1
GRID = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)


@dataclass(frozen=True)
class Task:
    """An objective on [0, 1] whose peak swings, faster in the second half, above a lower peak that stays.

    Attributes:
        num_steps: how many evaluations.
        phase: where the peak begins.
        periods: steps of a swing, in the first half and in the second.
        still: where the lower peak is.
    """

    num_steps: int
    phase: float
    periods: tuple[float, float]
    still: float

    @staticmethod
    def draw(num_steps: int, seed: int) -> Task:
        """Another phase, other paces and another place of the lower peak for each seed."""
        u = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
        return Task(num_steps, 2 * math.pi * u[0], (180 + 60 * u[1], 90 + 30 * u[2]), 0.2 + 0.6 * u[3])

    def best(self, step: Tensor) -> Tensor:
        """Centre of the moving peak."""
        half = self.num_steps / 2
        turns = step.clamp(max=half) / self.periods[0] + (step - half).clamp(min=0) / self.periods[1]
        return 0.5 + 0.4 * torch.sin(self.phase + 2 * math.pi * turns)

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        """The objective without noise."""
        moving = torch.exp(-0.5 * ((x - self.best(step)) / 0.15) ** 2)
        return moving + 0.5 * torch.exp(-0.5 * ((x - self.still) / 0.12) ** 2)


def quietly(run: Callable[[], object]) -> None:
    """What is too small on purpose says so, and the optimiser of hyperparameters where it stops."""
    with warnings.catch_warnings():
        for kind in (CapacityWarning, OptimizationWarning, NumericalWarning):
            warnings.simplefilter("ignore", kind)
        run()


def fit(model: Model) -> None:
    """BoTorch's way to learn hyperparameters."""
    quietly(lambda: fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model)))


class Streaming:
    """A StreamingSingleTaskGP: each observation is learnt and dropped; the last 60 are kept for hyperparameters.

    Args:
        window: steps that the memory reaches back; ``None`` is the whole past.
        with_time: whether time is an input.
    """

    def __init__(self, window: float | None, with_time: bool = True) -> None:
        self.window, self.with_time = window, with_time
        self.model: StreamingSingleTaskGP | None = None

    def inputs(self, x: Tensor, step: Tensor) -> Tensor:
        """``(n, 2)`` or ``(n, 1)``."""
        return torch.stack([x, step / UNIT], -1) if self.with_time else x.unsqueeze(-1)

    def learn(self, x: Tensor, step: Tensor, y: Tensor, refit: bool) -> None:
        """Observations ``(n,)`` of some steps."""
        X, Y = self.inputs(x, step), y.unsqueeze(-1)
        if self.model is None:
            features = InducingPoints(spread_points(NUM_TIMES * NUM_PLACES, 1))
            if self.with_time:
                window = None if self.window is None else self.window / UNIT
                places = spread_points(NUM_PLACES, 1)
                features = space_time_features(NUM_TIMES, places, window, horizon=X[-1, 1].item(), time_dim=1)
            time_dim = 1 if self.with_time else None
            self.model = StreamingSingleTaskGP(X[:0], Y[:0], features=features, time_dim=time_dim, warmup_size=KEPT)
        model = self.model
        quietly(lambda: model.update(X, Y))
        if refit:
            fit(model)

    @property
    def numbers(self) -> int:
        """All that is kept."""
        return sum(t.numel() for t in (*self.model.parameters(), *self.model.buffers()))


class Refitted:
    """BoTorch's SingleTaskGP on all data with its defaults, built anew at each step.

    Args:
        with_time: whether time is an input.
    """

    def __init__(self, with_time: bool) -> None:
        self.with_time = with_time
        self.X: Tensor | None = None

    def inputs(self, x: Tensor, step: Tensor) -> Tensor:
        """``(n, 2)`` or ``(n, 1)``."""
        return torch.stack([x, step / UNIT], -1) if self.with_time else x.unsqueeze(-1)

    def learn(self, x: Tensor, step: Tensor, y: Tensor, refit: bool) -> None:
        """Observations ``(n,)`` of some steps."""
        X, Y = self.inputs(x, step), y.unsqueeze(-1)
        if self.X is None:
            self.X, self.Y = X, Y
        else:
            self.X, self.Y = torch.cat([self.X, X]), torch.cat([self.Y, Y])
            modules = {name: getattr(self.model, name) for name in ("covar_module", "mean_module", "likelihood")}
        same = {} if refit else modules
        self.model = SingleTaskGP(self.X, self.Y, input_transform=Normalize(X.shape[-1]), **same).eval()
        if refit:
            fit(self.model)

    @property
    def numbers(self) -> int:
        """The data and the Cholesky factor of their covariance."""
        return self.X.numel() + self.Y.numel() + len(self.X) ** 2


Method = Streaming | Refitted
METHODS: dict[str, Callable[[], Method]] = {
    "forgetting": lambda: Streaming(WINDOW),
    "never forgetting": lambda: Streaming(None),
    "never forgetting, no time": lambda: Streaming(None, with_time=False),
    "refitting": lambda: Refitted(with_time=False),
    "refitting with time": lambda: Refitted(with_time=True),
}


@dataclass(frozen=True)
class Trace:
    """What a method did: choices and regrets of each step after the warm-up, seconds of the processor, numbers kept."""

    x: list[float]
    regret: list[float]
    seconds: list[float]
    numbers: list[int]


def follow(task: Task, make: Callable[[], Method], seed: int) -> Trace:
    """Learn the same random evaluations as every method, then choose one point a step."""
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = NOISE * torch.randn(task.num_steps, generator=generator, dtype=torch.float64)
    steps = torch.arange(task.num_steps, dtype=torch.float64)
    x = torch.rand(WARM_UP, generator=generator, dtype=torch.float64)
    method, trace = make(), Trace([], [], [], [])
    begun = time.process_time()
    method.learn(x, steps[:WARM_UP], task(x, steps[:WARM_UP]) + noise[:WARM_UP], refit=True)
    for index in range(WARM_UP, task.num_steps):
        step = steps[index : index + 1]
        with torch.no_grad():
            acquisition = UpperConfidenceBound(method.model, beta=BETA)
            values = acquisition(method.inputs(GRID, step.expand(len(GRID))).unsqueeze(-2))
        x = GRID[values.argmax()].unsqueeze(0)
        f = task(x, step)
        trace.x.append(x.item())
        trace.regret.append((task(GRID, step).max() - f).item())
        method.learn(x, step, f + noise[index : index + 1], refit=index % REFIT_EVERY == 0)
        trace.seconds.append(time.process_time() - begun)
        trace.numbers.append(method.numbers)
        begun = time.process_time()
    return trace
