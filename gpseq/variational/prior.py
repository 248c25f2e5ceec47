"""The Gaussian-process prior as the streaming mathematics sees it: a kernel and a mean, evaluated in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from linear_operator import to_dense
from torch import Tensor

from gpseq.features.base import Embedding, align, as_inputs, evaluate, evaluate_diagonal, project, unchecked
from gpseq.precision import floating_tensors, in_float64


@dataclass(frozen=True)
class Prior:
    """A kernel and a mean function, both black boxes.

    Attributes:
        kernel: any GPyTorch kernel.
        mean: any GPyTorch mean; ``None`` is the zero function.
        frozen: keep gradients away from the hyperparameters; they still reach the inputs.
        embedding: replaces the kernel where f is a linear model in given features of its inputs, see
            ``InducingFeatures.embedding``.

    Example:
        >>> import gpytorch
        >>> prior = Prior(gpytorch.kernels.RBFKernel())
        >>> prior.covariance(torch.zeros(2), torch.zeros(3)).shape
        torch.Size([2, 3])
    """

    kernel: Kernel
    mean: Mean | None = None
    frozen: bool = False
    embedding: Embedding | None = None

    def at(self, nodes: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``k(nodes, x)``, the diagonal of ``k(x, x)`` and the mean at ``x``; what an update needs, promoted once."""
        if self.embedding is not None:
            return self.covariance(nodes, x), self.variance(x), self.mean_at(x)

        def blocks(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean = x.new_zeros(x.shape[:-1]) if self.mean is None else self.mean(x)
            return unchecked(self.kernel, z, x), unchecked(self.kernel, x, x, diag=True), mean

        modules = (self.kernel,) if self.mean is None else (self.kernel, self.mean)
        covariance, variance, mean = in_float64(blocks, modules, *align(nodes, as_inputs(x)), frozen=self.frozen)
        return covariance.double(), variance.double(), mean.double()

    def covariance(self, nodes: Tensor, x: Tensor) -> Tensor:
        """Dense ``k(nodes, x)``, ``(*batch, n, m)``, from inputs ``(*batch, n, d)`` and ``(*batch, m, d)``."""
        if self.embedding is not None:
            return self.embedding(as_inputs(x)).mT
        return evaluate(self.kernel, as_inputs(nodes), as_inputs(x), frozen=self.frozen)

    def between(self, left: Tensor, nodes: Tensor, right: Tensor, other: Tensor) -> Tensor:
        """Covariance of two sets of functionals, ``left k(nodes, other) right'``, ``(*batch, M, M')``."""
        if self.embedding is not None:  # the nodes are the independent weights of a linear model
            return left @ right.mT
        return project(left, self.covariance(nodes, other), right)

    def variance(self, x: Tensor) -> Tensor:
        """Diagonal of ``k(x, x)``, ``(*batch, n)``."""
        if self.embedding is not None:
            return self.embedding(as_inputs(x)).square().sum(-1)
        return evaluate_diagonal(self.kernel, as_inputs(x), frozen=self.frozen)

    def mean_at(self, x: Tensor) -> Tensor:
        """Mean function at ``x``, ``(*batch, n)``; zero for nodes that are weights of a linear model."""
        x = as_inputs(x).double()
        if self.mean is None or x.shape[-1] == 0:
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


@dataclass(frozen=True)
class ModelPrior(Prior):
    """The prior of a GPyTorch model with any ``forward``: deep kernels, custom forwards, any mean.

    Attributes:
        kernel: the model; asked as ``model.forward(x)``.
    """

    def covariance(self, nodes: Tensor, x: Tensor) -> Tensor:
        """As :meth:`Prior.covariance`."""
        if self.embedding is not None:
            return super().covariance(nodes, x)
        nodes, x = align(as_inputs(nodes), as_inputs(x))
        split = nodes.shape[-2]

        def block(inputs: Tensor) -> Tensor:
            joint = self.kernel.forward(inputs).lazy_covariance_matrix
            # A rectangular block: a square one might be factored on the way, see `gpseq.features.base.dense`.
            return to_dense(joint[..., :split, :])[..., split:]

        return in_float64(block, (self.kernel,), torch.cat([nodes, x], dim=-2)).double()

    def at(self, nodes: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Prior.at`."""
        return self.covariance(nodes, x), self.variance(x), self.mean_at(x)

    def variance(self, x: Tensor) -> Tensor:
        """As :meth:`Prior.variance`."""
        if self.embedding is not None:
            return super().variance(x)

        def diagonal(inputs: Tensor) -> Tensor:
            return self.kernel.forward(inputs).lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)

        return in_float64(diagonal, (self.kernel,), as_inputs(x).double()).double()

    def mean_at(self, x: Tensor) -> Tensor:
        """As :meth:`Prior.mean_at`."""
        x = as_inputs(x).double()
        if x.shape[-1] == 0:
            return x.new_zeros(x.shape[:-1])
        return in_float64(lambda inputs: self.kernel.forward(inputs).mean, (self.kernel,), x).double()

    def hyperparameters(self) -> Tensor:
        """A value that equals nothing, because a forward may depend on anything."""
        return torch.full((1,), torch.nan, dtype=torch.float64)
