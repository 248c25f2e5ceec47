"""Hyperparameters from a warm-up window, by exact marginal likelihood."""

from __future__ import annotations

import copy

import gpytorch
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, Likelihood
from gpytorch.means import Mean, ZeroMean
from torch import Tensor

from gpseq.checks import check_floating
from gpseq.features.base import as_inputs
from gpseq.models.search import maximise


class _Window(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: Likelihood, mean_module: Mean, covar_module: Kernel) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean_module, covar_module

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def fit_hyperparameters(
    x: Tensor,
    y: Tensor,
    covar_module: Kernel,
    likelihood: Likelihood,
    mean_module: Mean | None = None,
    num_starts: int = 4,
    max_iterations: int = 100,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Maximise the exact marginal likelihood of a window, in place, from several starts.

    The first start is the values that the modules have; the others are random around them, scales by a factor.
    L-BFGS in float64; the modules keep their dtype. Priors registered on hyperparameters count. The cost
    is cubic in the window. When it raises, the modules are as they were.

    Args:
        x: inputs, ``(n,)`` or ``(n, d)``.
        y: targets, ``(n,)``.
        covar_module: any kernel without batch shape.
        likelihood: ``GaussianLikelihood``; any where ``noise`` is given.
        mean_module: any mean; ``None`` is zero.
        num_starts: how many starts.
        max_iterations: L-BFGS iterations a start.
        noise: known noise variances, broadcastable to ``y``; then the likelihood is left alone.
        generator: source of the random starts; ``None`` is torch's default.

    Returns:
        The log marginal likelihood reached (plus log priors), in nats.

    Raises:
        TypeError: x or y is not a floating-point tensor.
        ValueError: shapes do not fit, there are no data, or values are not finite.
        RuntimeError: no start gave a finite value.

    Example:
        >>> kernel, likelihood = gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood()
        >>> x = torch.linspace(0, 6, 30)
        >>> before = kernel.lengthscale.item()
        >>> value = fit_hyperparameters(x, x.sin(), kernel, likelihood, num_starts=1)
        >>> kernel.lengthscale.item() > before
        True
    """
    x, y = _check_window(x, y)
    if not isinstance(covar_module, Kernel):
        raise TypeError(f"covar_module: expected Kernel, got {type(covar_module).__name__}.")
    if noise is not None:
        window_likelihood: Likelihood = FixedNoiseGaussianLikelihood(_check_noise(noise, y))
    elif isinstance(likelihood, GaussianLikelihood):
        window_likelihood = likelihood
    else:
        got = type(likelihood).__name__
        raise TypeError(f"likelihood: expected GaussianLikelihood where no noise is given, got {got}.")
    mean_module = ZeroMean() if mean_module is None else mean_module
    # A copy is fitted, so that a failure leaves the caller's modules, dtypes and gradients alone.
    originals = torch.nn.ModuleList([covar_module, mean_module, window_likelihood])
    fitted = copy.deepcopy(originals).double()
    window = _Window(x, y, fitted[2], fitted[1], fitted[0]).train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(window.likelihood, window)
    # Above max_cholesky_size GPyTorch would answer with a stochastic estimate, which a line search cannot use.
    with gpytorch.settings.max_cholesky_size(len(y) + 1):
        return maximise(
            lambda: objective(window(x), y) * len(y), fitted, originals, num_starts, max_iterations, generator
        )


def _check_window(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    check_floating("x", x)
    check_floating("y", y)
    inputs = as_inputs(x)
    if inputs.dim() != 2 or y.dim() != 1 or len(y) != len(inputs) or len(y) == 0:
        shapes = f"{tuple(y.shape)} for x of shape {tuple(x.shape)}"
        raise ValueError(f"y: expected (n,) targets for n >= 1 inputs of shape (n,) or (n, d), got {shapes}.")
    for name, value in (("x", x), ("y", y)):
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity.")
    return inputs.detach().double(), y.detach().double()


def _check_noise(noise: Tensor, y: Tensor) -> Tensor:
    noise = check_floating("noise", noise).detach().double()
    if noise.dim() > 1 or noise.numel() not in (1, len(y)):
        raise ValueError(f"noise: expected a scalar or shape ({len(y)},), as y has, got {tuple(noise.shape)}.")
    if not (noise.isfinite() & (noise > 0)).all():
        raise ValueError("noise: expected finite positive variances.")
    return noise.expand(y.shape)
