"""Hyperparameters by their logarithms, so that the units of data do not matter to a search."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import gpytorch
import torch
from gpytorch.constraints import GreaterThan, Interval
from torch import Tensor


class Scale:
    """A parameter by its logarithm, measured from its lower bound, so that its unit does not matter to a search.

    Parameters without a lower bound are taken as they are.
    """

    def __init__(self, parameter: torch.nn.Parameter, constraint: Interval | None) -> None:
        self.parameter = parameter
        self.constraint = constraint if isinstance(constraint, GreaterThan) else None

    @property
    def is_logarithmic(self) -> bool:
        """Whether the parameter is positive, so that it has a logarithm."""
        return self.constraint is not None

    def read(self) -> Tensor:
        """The logarithm of the present value."""
        value = self.parameter.detach().double()
        if self.constraint is None:
            return value.clone()
        above = self.constraint.transform(value) - self.constraint.lower_bound.double()
        return above.clamp_min(torch.finfo(torch.float64).tiny).log()

    def raw(self, theta: Tensor) -> Tensor:
        """GPyTorch's unconstrained value."""
        if self.constraint is None:
            return theta.clone()
        return self.constraint.inverse_transform(self.constraint.lower_bound.double() + theta.exp())

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        """Set the parameter."""
        self.parameter.copy_(self.raw(theta))


def scales_of(modules: torch.nn.ModuleList) -> list[Scale]:
    """All learnable hyperparameters of some modules."""
    return [
        Scale(parameter, constraint)
        for module in cast(Iterable[gpytorch.Module], modules)
        for _, parameter, constraint in module.named_parameters_and_constraints()
        if parameter.requires_grad
    ]


def chain_gradients(scales: list[Scale], theta: list[Tensor], raw: list[Tensor]) -> None:
    """Set the gradients of the logarithms from those of the parameters; ``raw`` is ``scale.raw(theta)``."""
    for t, r, scale in zip(theta, raw, scales, strict=True):
        gradient = scale.parameter.grad
        t.grad = None if gradient is None else torch.autograd.grad(r, t, gradient.to(r.dtype))[0]
