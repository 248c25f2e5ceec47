"""Hyperparameters of a separable model from a window of complete rows, by exact marginal likelihood."""

from __future__ import annotations

import copy
import math
from typing import cast

import gpytorch
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import Mean
from torch import Tensor

from gpseq.features.base import evaluate
from gpseq.models.search import maximise
from gpseq.variational.kronecker import SpaceTimePrior
from gpseq.variational.prior import Prior


def fit_on_grid(
    times: Tensor,
    locations: Tensor,
    y: Tensor,
    time_kernel: Kernel,
    space_kernel: Kernel,
    likelihood: GaussianLikelihood,
    mean_module: Mean,
    num_starts: int = 1,
    max_iterations: int = 50,
    generator: torch.Generator | None = None,
) -> float:
    r"""Maximise the exact marginal likelihood of a complete grid, in place.

    .. math:: \log N(\operatorname{vec} Y \mid \mu,\; K_t \otimes K_s + \sigma^2 I)

    from two small eigendecompositions, :math:`O(n^3 + s^3)` a step. Priors registered on hyperparameters count. When it
    raises, the modules are as they were.

    Args:
        times: ``(n, 1)``, float64.
        locations: ``(s, d)``, float64.
        y: ``(n, s)``, float64, complete.
        time_kernel: any kernel without batch shape.
        space_kernel: the same.
        likelihood: whose noise is learnt.
        mean_module: any mean of ``(n, 1 + d)`` inputs.
        num_starts: how many starts, the first of them the values that the modules have.
        max_iterations: L-BFGS iterations a start.
        generator: source of the random starts; ``None`` is torch's default.

    Returns:
        The log marginal likelihood reached (plus log priors), in nats.
    """
    originals = torch.nn.ModuleList([time_kernel, space_kernel, likelihood, mean_module])
    fitted = copy.deepcopy(originals).double()
    # Their types are lost in the list.
    kernel_t, kernel_s, noise_of, mean = (cast(gpytorch.Module, module) for module in fitted)
    prior = SpaceTimePrior(Prior(kernel_t), Prior(kernel_s), mean)

    def objective() -> Tensor:
        K_t, K_s = evaluate(kernel_t, times, times), evaluate(kernel_s, locations, locations)
        value = log_marginal(K_t, K_s, noise_of.noise.squeeze(), y - prior.mean_on(times, locations, frozen=False))
        for _, module, log_prior, closure, _ in _priors(fitted):
            value = value + log_prior.log_prob(closure(module)).sum()
        return value

    return maximise(objective, fitted, originals, num_starts, max_iterations, generator)


def _priors(modules: torch.nn.ModuleList) -> list[tuple]:
    """Priors on the hyperparameters of some modules, as GPyTorch lists them."""
    return [found for module in modules for found in cast(gpytorch.Module, module).named_priors()]


def log_marginal(K_t: Tensor, K_s: Tensor, noise: Tensor, error: Tensor) -> Tensor:
    r"""Log density of a grid of errors under :math:`N(0, K_t \otimes K_s + \sigma^2 I)`.

    The derivative is that of the formula,
    :math:`\tfrac12 \alpha^\top dC \alpha - \tfrac12 \operatorname{tr}[C^{-1} dC]`; one through the eigenvectors would
    be infinite where eigenvalues coincide, as they do on regular grids.

    Args:
        K_t: ``(n, n)``.
        K_s: ``(s, s)``.
        noise: :math:`\sigma^2`, ``()``.
        error: ``(n, s)``.

    Returns:
        ``()``, in nats.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> log_marginal(eye, eye, torch.tensor(1.0), torch.zeros(2, 2, dtype=torch.float64))
        tensor(-5.0621, dtype=torch.float64)
    """
    with torch.no_grad():
        values, U = torch.linalg.eigh(K_t)
        others, V = torch.linalg.eigh(K_s)
        values, others = values.clamp_min(0.0), others.clamp_min(0.0)
        spectrum = values.outer(others) + noise
        rotated = U.mT @ error @ V
        alpha = U @ (rotated / spectrum) @ V.mT
        value = -0.5 * (
            (rotated.square() / spectrum).sum() + spectrum.log().sum() + error.numel() * math.log(2 * math.pi)
        )
        by_time = (others / spectrum).sum(1)
        by_space = (values.unsqueeze(-1) / spectrum).sum(0)
        by_noise = spectrum.reciprocal().sum()
    frozen_t, frozen_s = K_t.detach(), K_s.detach()
    fit = (alpha * (K_t @ alpha @ frozen_s)).sum() + (alpha * (frozen_t @ alpha @ K_s)).sum()
    fit = fit + noise * alpha.square().sum() - 2 * (alpha * error).sum()
    width = (by_time * (U * (K_t @ U)).sum(0)).sum() + (by_space * (V * (K_s @ V)).sum(0)).sum() + by_noise * noise
    surrogate = 0.5 * (fit - width)
    return value + surrogate - surrogate.detach()
