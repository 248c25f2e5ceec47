"""The Gaussian-process prior as the streaming mathematics sees it: a kernel and a mean, evaluated in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from torch import Tensor

from gpseq.features.base import align, as_inputs, evaluate, evaluate_diagonal, unchecked
from gpseq.precision import floating_tensors, in_float64


@dataclass(frozen=True)
class Prior:
    """A kernel and a mean function, both black boxes.

    Attributes:
        kernel: any GPyTorch kernel.
        mean: any GPyTorch mean; ``None`` is the zero function.
        frozen: keep gradients away from the hyperparameters; they still reach the inputs.

    Example:
        >>> import gpytorch
        >>> prior = Prior(gpytorch.kernels.RBFKernel())
        >>> prior.covariance(torch.zeros(2), torch.zeros(3)).shape
        torch.Size([2, 3])
    """

    kernel: Kernel
    mean: Mean | None = None
    frozen: bool = False

    def at(self, nodes: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``k(nodes, x)``, the diagonal of ``k(x, x)`` and the mean at ``x``; what an update needs, promoted once."""

        def blocks(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean = x.new_zeros(x.shape[:-1]) if self.mean is None else self.mean(x)
            return unchecked(self.kernel, z, x), unchecked(self.kernel, x, x, diag=True), mean

        modules = (self.kernel,) if self.mean is None else (self.kernel, self.mean)
        covariance, variance, mean = in_float64(blocks, modules, *align(nodes, as_inputs(x)), frozen=self.frozen)
        return covariance.double(), variance.double(), mean.double()

    def covariance(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Dense ``k(x1, x2)``, ``(*batch, n, m)``, from inputs ``(*batch, n, d)`` and ``(*batch, m, d)``."""
        return evaluate(self.kernel, as_inputs(x1), as_inputs(x2), frozen=self.frozen)

    def variance(self, x: Tensor) -> Tensor:
        """Diagonal of ``k(x, x)``, ``(*batch, n)``."""
        return evaluate_diagonal(self.kernel, as_inputs(x), frozen=self.frozen)

    def mean_at(self, x: Tensor) -> Tensor:
        """Mean function at ``x``, ``(*batch, n)``."""
        x = as_inputs(x).double()
        if self.mean is None:
            return x.new_zeros(x.shape[:-1])
        return in_float64(self.mean, (self.mean,), x, frozen=self.frozen).double()

    @torch.no_grad()
    def hyperparameters(self) -> Tensor:
        """Values of all floating parameters and buffers of kernel and mean in one vector, ``(p,)``, float64.

        What was computed from them is keyed on this vector, because GPyTorch sets hyperparameters through ``.data``,
        which no version counter sees.
        """
        modules = (self.kernel,) if self.mean is None else (self.kernel, self.mean)
        values = [tensor.reshape(-1).double() for module in modules for tensor in floating_tensors(module)]
        return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
