"""What can be done at the head of a trained network: a Laplace approximation, and distances to the classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LaplaceHead:
    r"""A Gaussian over the weights of a linear softmax head, with a Kronecker-factored precision.

    .. math::
        P = N A \otimes B + \delta I, \quad A = \tfrac1N \sum_i h_i h_i^\top, \quad
        B = \tfrac1N \sum_i \mathrm{diag}(p_i) - p_i p_i^\top

    with 1 appended to the features h, so that the bias is among the weights.

    Attributes:
        weight: the mode, ``(C, width + 1)``.
        values_in: eigenvalues of A, ``(width + 1,)``; ``vectors_in`` its eigenvectors in columns.
        values_out: eigenvalues of B, ``(C,)``; ``vectors_out`` its eigenvectors in columns.
        num_data: N.

    Source:
        Ritter, Botev and Barber (2018), A scalable Laplace approximation for neural networks, section 3; Kristiadi,
        Hein and Hennig (2020), Being Bayesian, even just a bit, fixes overconfidence in ReLU networks.
    """

    weight: Tensor
    values_in: Tensor
    vectors_in: Tensor
    values_out: Tensor
    vectors_out: Tensor
    num_data: int

    @classmethod
    def fit(cls, features: Tensor, weight: Tensor, bias: Tensor) -> LaplaceHead:
        """From the training part's features ``(N, width)`` and the head ``(C, width)``, ``(C,)``."""
        mode = torch.cat([weight, bias.unsqueeze(-1)], -1).detach().double()
        h = _with_one(features)
        p = (h @ mode.mT).softmax(-1)
        curvature = torch.diag(p.mean(0)) - p.mT @ p / len(p)
        into, out = torch.linalg.eigh(h.mT @ h / len(h)), torch.linalg.eigh(curvature)
        return cls(
            mode,
            into.eigenvalues.clamp_min(0),
            into.eigenvectors,
            out.eigenvalues.clamp_min(0),
            out.eigenvectors,
            len(h),
        )

    def logit_covariance(self, features: Tensor, precision: float) -> Tensor:
        """Covariance ``(n, C, C)`` of the logits at features ``(n, width)``, with prior precision delta."""
        shrunk = 1 / (self.num_data * self.values_in * self.values_out.unsqueeze(-1) + precision)  # (C, width + 1)
        rotated = (_with_one(features) @ self.vectors_in).square() @ shrunk.mT  # (n, C)
        return torch.einsum("cj,nj,dj->ncd", self.vectors_out, rotated, self.vectors_out)

    def draw_logits(self, features: Tensor, precision: float, num_samples: int, seed: int) -> Tensor:
        """Logits ``(S, n, C)`` of S heads, the same for all inputs and calls with one seed."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_samples, *self.weight.shape, dtype=torch.float64, generator=generator)
        scale = (self.num_data * self.values_in * self.values_out.unsqueeze(-1) + precision).rsqrt()
        weights = self.weight + self.vectors_out @ (noise * scale) @ self.vectors_in.mT
        return _with_one(features) @ weights.mT


def fit_prior_precision(
    head: LaplaceHead, features: Tensor, labels: Tensor, num_samples: int = 50, seed: int = 0
) -> float:
    """The prior precision, of a grid from 1e-3 to 1e5, whose averaged probabilities make labels most probable."""

    def loss(precision: float) -> float:
        draws = head.draw_logits(features, precision, num_samples, seed).log_softmax(-1)
        picked = draws.gather(-1, labels.expand(num_samples, -1).unsqueeze(-1)).squeeze(-1)
        return -(picked.logsumexp(0) - math.log(num_samples)).mean().item()

    return min((10**power for power in torch.linspace(-3, 5, 25, dtype=torch.float64).tolist()), key=loss)


@dataclass(frozen=True)
class ClassDistance:
    """Mahalanobis distance of features to the nearest class mean, under one covariance within classes.

    Attributes:
        means: ``(C, width)``.
        factor: lower Cholesky factor of the covariance, ``(width, width)``.

    Source:
        Lee et al. (2018), A simple unified framework for detecting out-of-distribution samples and adversarial
        attacks, section 2.1.
    """

    means: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor) -> ClassDistance:
        """From the training part's features ``(N, width)`` and labels ``(N,)``; each class has to be there."""
        h = features.double()
        means = torch.stack([h[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
        centred = h - means[labels]
        covariance = centred.mT @ centred / len(h)
        # Features of a trained network may not fill their space.
        jitter = 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        return cls(means, torch.linalg.cholesky(covariance + jitter))

    def squared(self, features: Tensor) -> Tensor:
        """Squared distances ``(n,)``."""
        rows = torch.linalg.solve_triangular(self.factor, features.double().mT, upper=False).mT
        means = torch.linalg.solve_triangular(self.factor, self.means.mT, upper=False).mT
        return torch.cdist(rows, means).square().amin(-1)


def _with_one(features: Tensor) -> Tensor:
    h = features.detach().double()
    return torch.cat([h, torch.ones_like(h[:, :1])], -1)
