"""Transforms of inputs and outcomes that a stream can live with: fixed ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform, Standardize
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior
from botorch.posteriors.transformed import TransformedPosterior
from torch import Tensor

from gpseq.precision import Float64Buffers


class FixedStandardize(Float64Buffers, Standardize):
    """Standardisation with a mean and a standard deviation that are given and stay: ``(Y - mean) / std``.

    BoTorch's ``Standardize`` learns both from the data that it meets in training mode; a stream would change its
    units behind its own back. The numbers stay in float64 whatever the model is cast to; what is transformed keeps its
    own dtype.

    Args:
        mean: a number, or one for each output.
        std: the same, positive.

    Raises:
        ValueError: values that are not finite, a standard deviation that is not positive, or different numbers of both.

    Example:
        >>> transform = FixedStandardize(mean=3.0, std=2.0)
        >>> transform(torch.tensor([[5.0]]))[0]
        tensor([[1.]])
    """

    def __init__(self, mean: float | Tensor, std: float | Tensor) -> None:
        means, stdvs = (torch.as_tensor(value, dtype=torch.float64).reshape(1, -1) for value in (mean, std))
        if means.shape != stdvs.shape or not means.isfinite().all():
            raise ValueError(f"mean: expected a finite number for each of {stdvs.numel()} outputs, got {mean!r}.")
        if not (stdvs.isfinite() & (stdvs > 0)).all():
            raise ValueError(f"std: expected finite positive numbers, got {std!r}.")
        super().__init__(m=means.numel())
        self.means, self.stdvs, self._stdvs_sq = means, stdvs, stdvs.square()
        self._is_trained = torch.tensor(True)
        self.eval()

    def forward(self, Y: Tensor, Yvar: Tensor | None = None, X: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Standardise; the dtype of ``Y`` stays."""
        scaled, variances = super().forward(Y, Yvar, X)
        return scaled.to(Y), None if Yvar is None or variances is None else variances.to(Yvar)

    def untransform(
        self, Y: Tensor, Yvar: Tensor | None = None, X: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Back to the units of the data; the dtype of ``Y`` stays."""
        scaled, variances = super().untransform(Y, Yvar, X)
        return scaled.to(Y), None if Yvar is None or variances is None else variances.to(Yvar)

    def untransform_posterior(
        self, posterior: Posterior, X: Tensor | None = None
    ) -> GPyTorchPosterior | TransformedPosterior:
        """A posterior in the units of the data and in its own dtype."""
        rounded = copy.copy(self)
        rounded._buffers = {
            name: value.to(posterior.dtype) if value is not None and value.is_floating_point() else value
            for name, value in self._buffers.items()
        }
        return Standardize.untransform_posterior(rounded, posterior, X)

    def train(self, mode: bool = True) -> FixedStandardize:
        """Of no effect: there is nothing to learn."""
        super().train(False)
        return self

    def subset_output(self, idcs: list[int]) -> FixedStandardize:
        """The transform of some of the outputs."""
        return FixedStandardize(self.means[0, idcs], self.stdvs[0, idcs])


def check_transforms(input_transform: Any, outcome_transform: Any) -> None:
    """Refuse transforms whose output for the same input may change as data arrive.

    Args:
        input_transform: ``None`` or a BoTorch transform of inputs.
        outcome_transform: ``None`` or one of outcomes.

    Raises:
        TypeError: something else.
        ValueError: a transform that learns.
    """
    why = "a stream keeps no data to recompute its belief in other units"
    for name, transform, kind in (
        ("input_transform", input_transform, InputTransform),
        ("outcome_transform", outcome_transform, OutcomeTransform),
    ):
        if transform is None:
            continue
        if not isinstance(transform, kind):
            raise TypeError(f"{name}: expected {kind.__name__} or None, got {type(transform).__name__}.")
        for module in transform.modules():
            got = type(module).__name__
            if getattr(module, "learn_coefficients", False):
                raise ValueError(
                    f"{name}: {got} learns its coefficients from the data, but {why}. Give it bounds, or coefficients, "
                    "and learn_bounds=False."
                )
            if hasattr(module, "_is_trained") and not isinstance(module, FixedStandardize):
                raise ValueError(
                    f"{name}: {got} learns its statistics from the data, but {why}. FixedStandardize(mean, std) has "
                    "fixed ones."
                )
        if any(parameter.requires_grad for parameter in transform.parameters()):
            raise ValueError(
                f"{name}: {type(transform).__name__} has parameters that are learnt, but {why}. Fix them with "
                "requires_grad_(False)."
            )
