"""GPyTorch's wrappers for several outputs, with the KL divergence of the strategy that they wrap."""

from __future__ import annotations

import gpytorch
from torch import Tensor

from gpseq.features.base import InducingFeatures


class IndependentMultitaskVariationalStrategy(gpytorch.variational.IndependentMultitaskVariationalStrategy):
    """Independent outputs: one batch dimension of the wrapped strategy becomes the task dimension.

    GPyTorch's own wrapper computes the divergence from q to the prior by itself, so it would forget the past that
    ``InterdomainVariationalStrategy.advance`` has laid down. Everything else is inherited.

    Args:
        base_variational_strategy: over a batch of GPs.
        num_tasks: size of the task dimension.
        task_dim: which batch dimension that is.
    """

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
