"""Lazy covariances that keep the promise of float64 until they are evaluated."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator import LinearOperator, to_dense
from torch import Tensor

from gpseq.features.base import dense
from gpseq.precision import in_float64


class Float64Kernel(Kernel):
    """A kernel seen in float64 at every evaluation, however late that comes.

    A lazy covariance looks up the hyperparameters when it is evaluated. Evaluated in their own dtype, the prior
    variance would differ in the eighth digit from the one that the rest of a posterior was computed with.

    Args:
        kernel: any GPyTorch kernel.
        frozen: keep gradients away from its hyperparameters; they still reach the inputs.

    Example:
        >>> import gpytorch
        >>> kernel = Float64Kernel(gpytorch.kernels.RBFKernel())
        >>> kernel(torch.zeros(2, 1, dtype=torch.float64)).to_dense().dtype
        torch.float64
    """

    def __init__(self, kernel: Kernel, frozen: bool = False) -> None:
        super().__init__()
        self.kernel, self.frozen = kernel, frozen

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the kernel."""
        return self.kernel.batch_shape

    @property
    def is_stationary(self) -> bool:
        """Whether the kernel is."""
        return self.kernel.is_stationary

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed, not of the hyperparameters."""
        return torch.float64

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int | tuple[int, int]:
        """As the kernel's."""
        return self.kernel.num_outputs_per_input(x1, x2)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Dense values, or their diagonal."""

        def values(x1: Tensor, x2: Tensor) -> Tensor:
            if diag:
                return to_dense(self.kernel(x1, x2, diag=True, **params))
            return dense(self.kernel, x1, x2, **params)

        return in_float64(values, (self.kernel,), x1, x2, frozen=self.frozen)

    def __getitem__(self, index: Any) -> Float64Kernel:
        return Float64Kernel(self.kernel[index], self.frozen)

    def expand_batch(self, *sizes: Any) -> Float64Kernel:
        """The kernel with an expanded batch shape."""
        return Float64Kernel(self.kernel.expand_batch(*sizes), self.frozen)


def promote(operator: Any) -> Any:
    """The same operator with every kernel in it seen in float64; anything that is no operator is returned as it is."""
    if isinstance(operator, LazyEvaluatedKernelTensor):
        return LazyEvaluatedKernelTensor(
            operator.x1.double(),
            operator.x2.double(),
            kernel=Float64Kernel(operator.kernel),
            last_dim_is_batch=operator.last_dim_is_batch,
            **operator.params,
        )
    if isinstance(operator, LinearOperator):
        return type(operator)(*(promote(arg) for arg in operator._args), **operator._kwargs)
    return operator
