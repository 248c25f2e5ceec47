"""Observations that have been checked: what an update accepts, and the errors for what it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Tensor

from gpseq.checks import check_floating, check_inputs
from gpseq.variational import OnlineState


@dataclass(frozen=True)
class Observations:
    """A chunk in float64.

    Attributes:
        x: inputs, ``(*batch, n, d)``.
        y: targets, ``(*batch, n)``.
        noise: noise variances, broadcastable to ``y``.
        observed: which targets exist, like ``y``; ``None`` means all.
    """

    x: Tensor
    y: Tensor
    noise: Tensor
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
        shapes = {"x": self.x.shape[:-2], "y": self.y.shape[:-1], "noise": self.noise.shape[:-1]}
        for name, shape in shapes.items():
            if _broadcast(shape, batch) != batch:
                raise ValueError(
                    f"{name}: this model has batch shape {tuple(batch)}, which an update cannot change; got {name} of "
                    f"shape {tuple(getattr(self, name).shape)}. condition_on_observations gives a batch of models."
                )

    def span(self, column: int) -> tuple[float, float]:
        """Smallest and largest value of an input column, over the observed rows."""
        values = self.x.detach()[..., column]
        if self.observed is not None:
            values = values.expand(torch.broadcast_shapes(values.shape, self.observed.shape))
            values = values[self.observed.expand(values.shape)]
        low, high = torch.stack(values.aminmax()).tolist()
        return low, high


def check_observations(
    state: OnlineState, likelihood: Likelihood, x: Tensor, y: Tensor, noise: Tensor | float | None, missing: str
) -> Observations:
    """Check a chunk against what is to learn it and return it in float64.

    Args:
        state: whose shapes and device decide.
        likelihood: where noise comes from that is not given.
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
    nodes = state.nodes
    for name, value in (("x", x), ("y", y)):
        _check_tensor(name, value, nodes.device)
    if x.dim() == 0 or y.dim() == 0:
        name = "x" if x.dim() == 0 else "y"
        raise ValueError(f"{name}: expected at least one dimension, got a scalar.")
    inputs = check_inputs(x, nodes.shape[-1])
    if y.shape[-1] != inputs.shape[-2]:
        expected = f"{inputs.shape[-2]} targets for x of shape {tuple(x.shape)}"
        raise ValueError(f"y: expected {expected}, got shape {tuple(y.shape)}.")
    _check_broadcast("x", inputs.shape[:-2], batch := state.r.shape[:-1])
    _check_broadcast("y", y.shape[:-1], _broadcast(inputs.shape[:-2], batch))
    noise = _noise(likelihood, noise, y)
    _check_broadcast("noise", noise.shape[:-1], _broadcast(y.shape[:-1], batch))

    finite_y = y.isfinite()
    observed = None
    if missing == "skip":
        observed = ~y.isnan()
        finite_y = finite_y | ~observed
        usable = (noise.isfinite() & (noise > 0)) | ~observed
    else:
        usable = noise.isfinite() & (noise > 0)
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
    if not noise_good:
        raise ValueError(f"noise: expected finite positive variances, got shape {tuple(noise.shape)} with others.")
    return Observations(inputs.double(), y.double(), noise.double(), observed)


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


def _noise(likelihood: Likelihood, noise: Tensor | float | None, y: Tensor) -> Tensor:
    """Noise variances that broadcast to ``y``."""
    if noise is None:
        if isinstance(likelihood, FixedNoiseGaussianLikelihood):
            raise ValueError("noise: a FixedNoiseGaussianLikelihood needs the noise variance of each target, got None.")
        return likelihood.noise.detach()
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
        return noise + likelihood.second_noise.detach()
    return noise
