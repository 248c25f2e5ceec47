"""What a run of ``gpseq stream`` begins with: options, hyperparameters from the warm-up rows, and the memory's size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, RQKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from gpseq.features import CapacityError, HippoFeatures
from gpseq.models import StreamingGP, fit_hyperparameters

KERNELS: dict[str, Callable[[], Kernel]] = {
    "rbf": RBFKernel,
    "matern12": lambda: MaternKernel(nu=0.5),
    "matern32": lambda: MaternKernel(nu=1.5),
    "matern52": lambda: MaternKernel(nu=2.5),
    "rq": RQKernel,
}

#: Lengthscales from which the fit starts, as fractions of the time that the warm-up rows span.
LENGTHSCALE_STARTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: Noise variance from which it starts, as a fraction of the variance of the targets.
NOISE_START = 0.1
#: Rows on which hyperparameters are fitted, at most, unless more are asked for: the fit costs their cube.
MAX_WARMUP = 500
#: Rows on which hyperparameters are fitted, at least.
MIN_WARMUP = 10
#: Features that ``auto`` takes, at most: an update costs their square for each row, a change of the basis their cube.
MAX_AUTO = 1000


class RunError(ValueError):
    """A run cannot begin or go on; the message is for the person at the terminal."""


@dataclass(frozen=True)
class Options:
    """Everything that decides the result of a run, named as on the command line.

    Attributes:
        time: column of times.
        target: column of values.
        chunk: rows that are learnt together.
        chunk_by: column whose every new value begins a chunk, in place of ``chunk``.
        kernel: a key of :data:`KERNELS`.
        features: number of features; ``None`` takes what the kernel needs (:func:`auto_features`).
        horizon: where the memory's basis ends at first, counted from the first row, in the unit of the time column;
            ``None`` ends it with the first chunk.
        warmup: rows on which hyperparameters are fitted; ``None`` means the first chunk, at most ``MAX_WARMUP``.
        holdout: fraction of the rows that are not learnt.
        seed: of the choice of these rows.
        horizon_growth: as in :class:`gpseq.models.StreamingGP`.
    """

    time: str
    target: str
    chunk: int = 100
    chunk_by: str | None = None
    kernel: str = "rbf"
    features: int | None = None
    horizon: float | None = None
    warmup: int | None = None
    holdout: float = 0.2
    seed: int = 0
    horizon_growth: float | str | None = 1.25


@dataclass(frozen=True)
class Span:
    """What one reading of a whole file tells in advance: its number of rows, its first and its last time."""

    rows: int
    start: float
    end: float


def check_feed(options: Options) -> None:
    """Refuse options that must know where a series ends, when it is a feed and nobody says.

    Raises:
        RunError: says which option is missing.
    """
    if options.horizon is None and options.features is None:
        raise RunError("--features auto must know how long the feed will be: give --horizon, or --features N")
    if options.horizon is None and options.horizon_growth == "fixed":
        raise RunError("--horizon-growth fixed must know how long the feed will be: give --horizon")


def fit(kernel: str, x: Tensor, y: Tensor) -> tuple[Kernel, GaussianLikelihood]:
    """Maximise the exact marginal likelihood from several lengthscales, relative to the span of the times.

    Args:
        kernel: a key of :data:`KERNELS`.
        x: ``(n,)`` times, not all equal.
        y: ``(n,)`` standardised targets.

    Returns:
        The best kernel and its likelihood.

    Raises:
        RunError: no start leads anywhere.
    """
    span = (x.max() - x.min()).item()
    best, best_value = None, -math.inf
    for fraction in LENGTHSCALE_STARTS:
        # Each start counts time in lengthscales of its own, which are 1 then: GPyTorch's unconstrained parameters are
        # well scaled there, and the result does not depend on the unit of the column.
        unit = fraction * span
        covar_module, likelihood = new_modules(kernel)
        covar_module.base_kernel.lengthscale, likelihood.noise = 1.0, NOISE_START
        try:
            value = fit_hyperparameters(x / unit, y, covar_module, likelihood, num_starts=1)
        except RuntimeError:  # the marginal likelihood broke down on the way from this start
            continue
        if value > best_value:
            covar_module.base_kernel.lengthscale = unit * covar_module.base_kernel.lengthscale.detach()
            best, best_value = (covar_module, likelihood), value
    if best is None:
        raise RunError(f"--kernel {kernel} cannot be fitted to the warm-up rows: try another one, or a larger --warmup")
    return best


def new_modules(kernel: str) -> tuple[Kernel, GaussianLikelihood]:
    """A kernel of the given name with an outputscale, and a Gaussian likelihood, both in float64."""
    return ScaleKernel(KERNELS[kernel]()).double(), GaussianLikelihood().double()


def new_model(
    features: HippoFeatures, kernel: Kernel, likelihood: GaussianLikelihood, horizon_growth: float | str | None
) -> StreamingGP:
    """A stream in float64, ready to predict."""
    return StreamingGP(features, kernel, likelihood, horizon_growth=horizon_growth).double().eval()


def make_features(
    options: Options, kernel: Kernel, noise: float, times: list[float], span: Span | None
) -> HippoFeatures:
    """The memory with which a run begins.

    Args:
        options: of the run.
        kernel: with its hyperparameters.
        noise: noise variance of the data.
        times: of the first chunk.
        span: of the file; ``None`` for a feed, which :func:`check_feed` has passed.

    Returns:
        Features whose number suffices until the data end, on a basis that ends where the options say.

    Raises:
        RunError: no admissible number suffices.
    """
    start = span.start if span else min(times)
    end = span.end if span else options.horizon
    if options.horizon is not None:
        horizon = options.horizon
        if options.horizon_growth == "fixed" and span and span.end > horizon:
            raise RunError(
                f"--horizon-growth fixed: the file ends at {span.end:g}, after --horizon {horizon:g}; give a later one"
            )
    elif options.horizon_growth == "fixed" and span:
        horizon = span.end
    else:
        horizon = max(times)
    num_features = options.features
    if num_features is None:
        assert end is not None
        reach = max(horizon, padded(start, end, options.horizon_growth))
        num_features = auto_features(kernel, noise, start, reach)
    return HippoFeatures(num_features, horizon, start=start)


def padded(start: float, end: float, growth: float | str | None) -> float:
    """As far as a basis may reach when the data end, under the growth rule of :class:`gpseq.models.StreamingGP`.

    Args:
        start: of the basis.
        end: of the data.
        growth: the rule.

    Example:
        >>> padded(0.0, end=80.0, growth=1.25)
        100.0
    """
    return start + growth * (end - start) if isinstance(growth, float | int) else end


def auto_features(kernel: Kernel, noise: float, start: float, horizon: float) -> int:
    """How many features ``--features auto`` takes: enough that a run ends where the exact GP ends.

    What the memory loses is held under 0.1 % of the prior variance and of the noise variance.

    Args:
        kernel: with its hyperparameters.
        noise: noise variance of the data.
        start: of the memory.
        horizon: as far as its basis may reach when the data end.

    Returns:
        The number, ``MAX_AUTO`` at most: there 0.1 % of the prior variance must do.

    Raises:
        RunError: ``MAX_AUTO`` features do not suffice for 0.1 % of the prior variance.
    """
    try:
        return HippoFeatures.required(kernel, horizon, start=start, max_features=MAX_AUTO, noise=noise)
    except CapacityError:
        pass
    try:
        HippoFeatures.required(kernel, horizon, start=start, max_features=MAX_AUTO)
    except CapacityError as error:
        raise RunError(f"--features auto: {error} Or choose --features N") from None
    return MAX_AUTO


@torch.no_grad()
def exact_posterior(model: StreamingGP, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of the exact GP with a stream's kernel, mean and noise, by one dense Cholesky factor.

    Args:
        model: gives the hyperparameters.
        x: ``(n,)`` times of the data.
        y: ``(n,)`` targets.
        at: ``(m,)`` times.

    Returns:
        Predictive means ``(m,)`` and variances ``(m,)`` of observations, noise included.
    """
    kernel, noise, prior_mean = model.covar_module, model.likelihood.noise, model.mean_module
    x, at = x.unsqueeze(-1), at.unsqueeze(-1)
    factor = torch.linalg.cholesky(kernel(x).to_dense() + noise * torch.eye(len(x), dtype=x.dtype))
    whitened = torch.linalg.solve_triangular(factor, kernel(x, at).to_dense(), upper=False)
    residual = torch.linalg.solve_triangular(factor, (y - prior_mean(x)).unsqueeze(-1), upper=False)
    mean = prior_mean(at) + (whitened.mT @ residual).squeeze(-1)
    return mean, kernel(at, diag=True) - whitened.square().sum(0) + noise
