"""GPyTorch's wrappers for several outputs, with the KL divergence of the strategy that they wrap."""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.variational._variational_strategy import _VariationalStrategy
from torch import Tensor

from gpseq.checks import check_count
from gpseq.features.base import InducingFeatures


class IndependentMultitaskVariationalStrategy(gpytorch.variational.IndependentMultitaskVariationalStrategy):
    """Independent outputs: one batch dimension of the wrapped strategy becomes the task dimension.

    GPyTorch's own wrapper computes the divergence from q to the prior by itself, so it would forget the past that
    ``InterdomainVariationalStrategy.advance`` has laid down. Everything else is inherited.

    Args:
        base_variational_strategy: over a batch of GPs.
        num_tasks: size of the task dimension.
        task_dim: which batch dimension that is.

    Raises:
        TypeError: no variational strategy, or a number of tasks or a dimension that is no integer.
        ValueError: the wrapped strategy has another number of tasks.
    """

    def __init__(self, base_variational_strategy: _VariationalStrategy, num_tasks: int, task_dim: int = -1) -> None:
        if not isinstance(base_variational_strategy, _VariationalStrategy):
            got = type(base_variational_strategy).__name__
            raise TypeError(f"base_variational_strategy: expected a GPyTorch variational strategy, got {got}.")
        check_count("num_tasks", num_tasks)
        if isinstance(task_dim, bool) or not isinstance(task_dim, int):
            raise TypeError(f"task_dim: expected an integer, got {task_dim!r}.")
        q = getattr(base_variational_strategy, "_variational_distribution", None)
        batch = torch.Size() if q is None else q.batch_shape
        # Tasks may also come from the points or the kernel alone; what q says is known before any call.
        if -len(batch) <= task_dim < len(batch) and batch[task_dim] not in (1, num_tasks):
            raise ValueError(
                f"num_tasks: expected {batch[task_dim]}, as the variational distribution has along batch dimension "
                f"{task_dim}, got {num_tasks}."
            )
        super().__init__(base_variational_strategy, num_tasks, task_dim)

    def kl_divergence(self) -> Tensor:
        """Sum over the tasks of the wrapped strategy's divergence, ``(*batch)``, in nats."""
        return self.base_variational_strategy.kl_divergence().sum(dim=self.task_dim)

    def advance(self, features: InducingFeatures | None = None, transfer: str | None = None) -> None:
        """As ``InterdomainVariationalStrategy.advance``, for all tasks."""
        self.base_variational_strategy.advance(features, transfer)


class LMCVariationalStrategy(gpytorch.variational.LMCVariationalStrategy):
    """Outputs that are linear combinations of latent GPs (linear model of coregionalisation).

    As GPyTorch's, but with the divergence of the wrapped strategy, see
    :class:`IndependentMultitaskVariationalStrategy`.

    Args:
        base_variational_strategy: over a batch of latent GPs.
        num_tasks: number of outputs.
        num_latents: number of latent GPs.
        latent_dim: which batch dimension they are.
        jitter_val: added by GPyTorch to the covariance of the outputs.
    """

    def kl_divergence(self) -> Tensor:
        """Sum over the latent GPs of the wrapped strategy's divergence, ``(*batch)``, in nats."""
        return self.base_variational_strategy.kl_divergence().sum(dim=self.latent_dim)

    def advance(self, features: InducingFeatures | None = None, transfer: str | None = None) -> None:
        """As ``InterdomainVariationalStrategy.advance``, for all latent GPs."""
        self.base_variational_strategy.advance(features, transfer)
