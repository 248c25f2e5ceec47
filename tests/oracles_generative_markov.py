"""Oracles for Markov priors that share nothing with gpseq: Matérn kernels written out, dense Gaussian processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NU = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}
POLYNOMIAL = {"matern12": (1.0,), "matern32": (1.0, 1.0), "matern52": (1.0, 1.0, 1 / 3)}


def matern(kernel: str, a: Tensor, b: Tensor, lengthscale: Tensor) -> Tensor:
    """Covariances ``(n, m)`` of times ``(n,)`` and ``(m,)``."""
    r = math.sqrt(2 * NU[kernel]) * (a.unsqueeze(-1) - b).abs() / lengthscale
    polynomial = sum((c * r**i for i, c in enumerate(POLYNOMIAL[kernel])), torch.zeros(()))
    return (-r).exp() * polynomial


@dataclass
class Dense:
    """One latent of one series, by Cholesky of the covariance of its pseudo-observations."""

    kernel: str
    x: Tensor  # (n,) times of what was observed
    y: Tensor  # (n,)
    v: Tensor  # (n,)
    lengthscale: Tensor

    @property
    def prior(self) -> Tensor:
        """Covariance of the latents at the observed times."""
        return matern(self.kernel, self.x, self.x, self.lengthscale)

    @property
    def factor(self) -> Tensor:
        """Of the covariance of the pseudo-observations."""
        return torch.linalg.cholesky(self.prior + torch.diag_embed(self.v))

    @property
    def weights(self) -> Tensor:
        """The pseudo-observations, solved."""
        return torch.cholesky_solve(self.y.unsqueeze(-1), self.factor).squeeze(-1)

    @property
    def log_evidence(self) -> Tensor:
        """Log density of the pseudo-observations."""
        half_log_det = self.factor.diagonal().log().sum()
        return -0.5 * self.y @ self.weights - half_log_det - 0.5 * len(self.y) * math.log(2 * math.pi)

    @property
    def kl(self) -> Tensor:
        """Between Gaussians on the latents, in the form that needs no inverse of a prior that repeats make singular."""
        K, a = self.prior, self.weights
        log_dets = 2 * self.factor.diagonal().log().sum() - self.v.log().sum()
        return 0.5 * (log_dets - torch.cholesky_solve(K, self.factor).trace() + a @ K @ a)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(m,)`` and covariance ``(m, m)``."""
        cross = matern(self.kernel, x, self.x, self.lengthscale)
        explained = cross @ torch.cholesky_solve(cross.mT, self.factor)
        return cross @ self.weights, matern(self.kernel, x, x, self.lengthscale) - explained
