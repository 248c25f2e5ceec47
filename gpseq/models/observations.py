"""Observations that have been checked: what an update accepts, and the errors for what it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    DirichletClassificationLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    HadamardGaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    LikelihoodList,
    MultitaskGaussianLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
)
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from gpseq.checks import check_floating, check_inputs
from gpseq.precision import in_float64
from gpseq.variational import OnlineState
from gpseq.variational.sites import Expectation

_GAUSSIAN = (GaussianLikelihood, FixedNoiseGaussianLikelihood)
_SEVERAL_OUTPUTS = (
    DirichletClassificationLikelihood,
    HadamardGaussianLikelihood,
    LikelihoodList,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
_LOG_CONCAVE = (BernoulliLikelihood, LaplaceLikelihood)


def check_likelihood(likelihood: object) -> Likelihood:
    """A likelihood of one number given one function value.

    Raises:
        TypeError: it is none, it belongs to several outputs, or it has only a random expected log likelihood.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"likelihood: expected Likelihood, got {type(likelihood).__name__}.")
    name = type(likelihood).__name__
    if isinstance(likelihood, _SEVERAL_OUTPUTS):
        raise TypeError(f"likelihood: expected one of a single output, got {name}.")
    if not is_gaussian(likelihood) and type(likelihood).expected_log_prob is Likelihood.expected_log_prob:
        raise TypeError(f"likelihood: expected one with expected_log_prob; that of {name} draws samples.")
    return likelihood


def is_gaussian(likelihood: Likelihood) -> bool:
    """Whether an update has a closed form."""
    return isinstance(likelihood, _GAUSSIAN)


def longest_step(likelihood: Likelihood) -> float:
    """Longest natural-gradient step: full ones are safe where the log likelihood is known to be concave in f."""
    concave = isinstance(likelihood, _LOG_CONCAVE) or getattr(likelihood, "log_concave", False)
    return 1.0 if concave else 0.5


@dataclass(frozen=True)
class Observations:
    """A chunk in float64.

    Attributes:
        x: inputs, ``(*batch, n, d)``.
        y: targets, ``(*batch, n)``.
        noise: noise variances, broadcastable to ``y``; ``None`` where the likelihood is not Gaussian.
        given_noise: what the caller named, in the caller's dtype.
        observed: which targets exist, like ``y``; ``None`` means all.
    """

    x: Tensor
    y: Tensor
    noise: Tensor | None
    given_noise: Tensor | float | None
    observed: Tensor | None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to learn."""
        return self.y.numel() == 0 or (self.observed is not None and not bool(self.observed.any()))

    def check_fits(self, batch: torch.Size) -> None:
        """Check that learning this chunk leaves a model of batch shape ``batch`` as it is.

        Raises:
            ValueError: it would become a larger batch.
        """
        shapes = {"x": self.x.shape[:-2], "y": self.y.shape[:-1]}
        if self.noise is not None:
            shapes["noise"] = self.noise.shape[:-1]
        for name, shape in shapes.items():
            if _broadcast(shape, batch) != batch:
                raise ValueError(
                    f"{name}: this model has batch shape {tuple(batch)}, which an update cannot change; got {name} of "
                    f"shape {tuple(getattr(self, name).shape)}. condition_on_observations gives a batch of models."
                )

    @property
    def count(self) -> Tensor | int:
        """How many targets there are, for each model of the batch if they differ."""
        return self.y.shape[-1] if self.observed is None else self.observed.sum(-1)

    @property
    def inputs(self) -> Tensor:
        """Inputs of the observed targets of all models of the batch, ``(n, d)``."""
        x = self.x.detach()
        if self.observed is None:
            return x.reshape(-1, x.shape[-1])
        shape = torch.broadcast_shapes(x.shape[:-1], self.observed.shape)
        return x.expand(*shape, x.shape[-1])[self.observed.expand(shape)]

    def of_inputs(self, values: Tensor) -> Tensor:
        """Targets or noise variances in the order of :attr:`inputs`, ``(n,)``."""
        shape = torch.broadcast_shapes(self.x.shape[:-1], self.y.shape)
        values = values.expand(shape)
        return values.reshape(-1) if self.observed is None else values[self.observed.expand(shape)]


def check_observations(
    state: OnlineState,
    num_dims: int,
    likelihood: Likelihood,
    x: Tensor,
    y: Tensor,
    noise: Tensor | float | None,
    missing: str,
) -> Observations:
    """Check a chunk against what is to learn it and return it in float64.

    Args:
        state: whose batch shape and device decide.
        num_dims: input columns.
        likelihood: where noise comes from that is not given, and what targets may be.
        x: inputs, ``(n,)`` or ``(*batch, n, d)``.
        y: targets, ``(*batch, n)``.
        noise: noise variances or ``None``, see ``StreamingGP.update``.
        missing: ``"error"`` or ``"skip"``.

    Returns:
        The chunk.

    Raises:
        TypeError: something is not a floating-point tensor.
        ValueError: the message names the argument, what came and what was expected.
    """
    if missing not in ("error", "skip"):
        raise ValueError(f"missing: expected 'error' or 'skip', got {missing!r}.")
    if not is_gaussian(likelihood) and isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex():
        y = y.double()  # counts and labels
    for name, value in (("x", x), ("y", y)):
        _check_tensor(name, value, state.r.device)
    if x.dim() == 0 or y.dim() == 0:
        name = "x" if x.dim() == 0 else "y"
        raise ValueError(f"{name}: expected at least one dimension, got a scalar.")
    inputs = check_inputs(x, num_dims)
    if y.shape[-1] != inputs.shape[-2]:
        expected = f"{inputs.shape[-2]} targets for x of shape {tuple(x.shape)}"
        raise ValueError(f"y: expected {expected}, got shape {tuple(y.shape)}.")
    _check_broadcast("x", inputs.shape[:-2], batch := state.r.shape[:-1])
    _check_broadcast("y", y.shape[:-1], _broadcast(inputs.shape[:-2], batch))
    given_noise, noise = noise, None
    if is_gaussian(likelihood):
        noise = noise_of(likelihood, given_noise, y).detach()
        _check_broadcast("noise", noise.shape[:-1], _broadcast(y.shape[:-1], batch))
    elif given_noise is not None:
        raise ValueError(f"noise: a {type(likelihood).__name__} has no noise variance; expected None.")

    finite_y = y.isfinite()
    observed = None
    if missing == "skip":
        observed = ~y.isnan()
        finite_y = finite_y | ~observed
    usable = finite_y if noise is None else noise.isfinite() & (noise > 0)
    if observed is not None:
        usable = usable | ~observed
    # One transfer from the device for all questions.
    answers = [inputs.isfinite().all(), finite_y.all(), usable.all()]
    x_good, y_good, noise_good = torch.stack(answers).tolist()
    if not x_good:
        raise ValueError(f"x: expected finite inputs, got NaN or infinity in a tensor of shape {tuple(x.shape)}.")
    if not y_good:
        hint = "" if missing == "skip" else " (missing='skip' passes over NaN)"
        raise ValueError(
            f"y: expected finite targets, got NaN or infinity in a tensor of shape {tuple(y.shape)}{hint}."
        )
    if noise is not None and not noise_good:
        raise ValueError(f"noise: expected finite positive variances, got shape {tuple(noise.shape)} with others.")
    if noise is None:
        _check_targets(likelihood, y if observed is None else y[observed])
    return Observations(inputs.double(), y.double(), None if noise is None else noise.double(), given_noise, observed)


def expectation_of(likelihood: Likelihood, data: Observations, frozen: bool = False) -> Expectation:
    """Expected log likelihood of each target of a chunk, as a function of means and variances of f.

    Args:
        likelihood: that is not Gaussian.
        data: the chunk; a missing target contributes zero.
        frozen: keep gradients away from the likelihood's hyperparameters.

    Returns:
        A function from ``(*batch, n)`` and ``(*batch, n)`` to ``(*batch, n)``, float64.
    """
    y, observed = data.y, data.observed
    if observed is not None:
        y = torch.where(observed, y, y[observed][0])  # any admissible target will do

    if y.is_inference():
        with torch.inference_mode(False):  # or it could not take part in a graph
            y = y.clone()

    def expectation(mean: Tensor, variance: Tensor) -> Tensor:
        # Quadratures of GPyTorch put their nodes in front: all must have the same batch shape.
        shape = torch.broadcast_shapes(mean.shape, y.shape)
        f = MultivariateNormal(mean.expand(shape), DiagLinearOperator(variance.expand(shape)))
        values = in_float64(lambda: likelihood.expected_log_prob(y.expand(shape), f), (likelihood,), frozen=frozen)
        if values.shape != shape:
            raise ValueError(
                f"likelihood: expected_log_prob of {type(likelihood).__name__} gave shape {tuple(values.shape)} for "
                f"{tuple(shape)} targets; expected a number for each."
            )
        return values if observed is None else torch.where(observed, values, 0.0)

    return expectation


def _check_targets(likelihood: Likelihood, y: Tensor) -> None:
    """Labels, fractions and counts are what they must be; our own likelihoods know by themselves."""
    if hasattr(likelihood, "check_targets"):
        likelihood.check_targets(y)
        return
    name = type(likelihood).__name__
    if isinstance(likelihood, BernoulliLikelihood):
        good, expected = (y == 0) | (y == 1), "labels 0 or 1"
    elif isinstance(likelihood, BetaLikelihood):
        good, expected = (y > 0) & (y < 1), "fractions above 0 and below 1"
    elif isinstance(likelihood, (PoissonLikelihood, NegativeBinomialLikelihood)):
        good, expected = (y >= 0) & (y == y.round()), "counts 0, 1, 2, ..."
    else:
        return
    if not bool(good.all()):
        raise ValueError(f"y: a {name} expects {expected}, got {y[~good][0].item():g} among the targets.")


def _check_tensor(name: str, value: Tensor, device: torch.device) -> None:
    check_floating(name, value)
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where the model is, got one on {value.device}.")


def _broadcast(first: torch.Size, second: torch.Size) -> torch.Size:
    """`torch.broadcast_shapes`, which takes longer than a small update does, only where it is needed."""
    return first if first == second else torch.broadcast_shapes(first, second)


def _check_broadcast(name: str, shape: torch.Size, batch: torch.Size) -> None:
    if shape == batch:
        return
    try:
        torch.broadcast_shapes(shape, batch)
    except RuntimeError:
        raise ValueError(f"{name}: batch shape {tuple(shape)} does not broadcast with {tuple(batch)}.") from None


def noise_of(likelihood: Likelihood, noise: Tensor | float | None, y: Tensor) -> Tensor:
    """Noise variances that broadcast to ``y``, of a Gaussian likelihood.

    Args:
        likelihood: whose own noise counts where none is given.
        noise: what the caller named.
        y: the targets.
    """
    if noise is None:
        if isinstance(likelihood, FixedNoiseGaussianLikelihood):
            raise ValueError("noise: a FixedNoiseGaussianLikelihood needs the noise variance of each target, got None.")
        return likelihood.noise
    if isinstance(noise, (int, float)):
        noise = torch.as_tensor(noise, dtype=torch.float64, device=y.device)
    _check_tensor("noise", noise, y.device)
    try:
        fits = torch.broadcast_shapes(noise.shape, y.shape)[-1] == y.shape[-1]
    except RuntimeError:
        fits = False
    if not fits:
        shape = tuple(y.shape)
        raise ValueError(
            f"noise: expected a scalar or variances for y of shape {shape}, got shape {tuple(noise.shape)}."
        )
    if isinstance(likelihood, FixedNoiseGaussianLikelihood) and likelihood.second_noise_covar is not None:
        return noise + likelihood.second_noise
    return noise
