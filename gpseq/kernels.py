"""Kernels for GPyTorch that it does not have."""

from __future__ import annotations

from typing import Any

from gpytorch.kernels import Kernel
from torch import Tensor


class ExponentialKernel(Kernel):
    r"""The unnormalised weight of softmax attention as a kernel.

    .. math:: k(x, y) = \exp(\tilde x^\top \tilde y), \qquad \tilde x = x / \ell

    It is positive definite and not stationary: the prior variance :math:`\exp(|\tilde x|^2)` grows without bound away
    from the origin, and overflows where :math:`|\tilde x|^2` exceeds about 88 in float32 and 709 in float64. The scale
    :math:`1 / \sqrt d` of softmax attention is a lengthscale of :math:`d^{1/4}`. Normalised to unit variance it is the
    RBF kernel of the same lengthscale,

    .. math:: k(x, y) = e^{|\tilde x|^2 / 2}\, k_{rbf}(x, y)\, e^{|\tilde y|^2 / 2} .

    Args:
        ard_num_dims: number of input columns for a lengthscale each; ``None`` means one for all.
        batch_shape: batch shape of the lengthscales.
        active_dims: the columns to look at.
        lengthscale_prior: a GPyTorch prior.
        lengthscale_constraint: a GPyTorch constraint; ``None`` means positive.

    Source:
        Chen and Li (2023), Calibrating Transformers via Sparse Gaussian Processes, section 3.

    Example:
        >>> import torch
        >>> kernel = ExponentialKernel()
        >>> kernel.lengthscale = 2.0
        >>> kernel(torch.tensor([[2.0], [0.0]])).to_dense()
        tensor([[2.7183, 1.0000],
                [1.0000, 1.0000]], grad_fn=<ExpBackward0>)
    """

    has_lengthscale = True

    @property
    def is_stationary(self) -> bool:
        """No."""
        return False

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """Values of the kernel.

        Args:
            x1: ``(*batch, n, d)``.
            x2: ``(*batch, m, d)``.
            diag: the diagonal only; needs n = m.
            last_dim_is_batch: one kernel a column, as a batch dimension.
            params: ignored.

        Returns:
            ``(*batch, n, m)``, or ``(*batch, n)`` with ``diag``; with ``last_dim_is_batch`` the columns come before.
        """
        x1, x2 = x1 / self.lengthscale, x2 / self.lengthscale
        if last_dim_is_batch:
            x1, x2 = x1.mT.unsqueeze(-1), x2.mT.unsqueeze(-1)
        return (x1 * x2).sum(-1).exp() if diag else (x1 @ x2.mT).exp()
