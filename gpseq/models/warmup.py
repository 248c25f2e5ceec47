"""Hyperparameters from a warm-up window, by exact marginal likelihood."""

from __future__ import annotations

import copy
import math

import gpytorch
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, Likelihood
from gpytorch.means import Mean, ZeroMean
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from gpseq.checks import check_count, check_floating
from gpseq.features.base import as_inputs
from gpseq.models.scales import Scale, chain_gradients, scales_of

#: Standard deviation of the random starts in the logarithm of a scale: a factor of ten each way is common.
_START_SPREAD = 2.0


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
    check_count("num_starts", num_starts)
    check_count("max_iterations", max_iterations)
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
    originals = torch.nn.ModuleList([covar_module, mean_module, window_likelihood])
    # A copy is fitted, so that a failure leaves the caller's modules, dtypes and gradients alone.
    fitted = copy.deepcopy(originals).double()
    window = _Window(x, y, fitted[2], fitted[1], fitted[0]).train()
    scales = scales_of(fitted)
    first = [scale.read() for scale in scales]
    best, best_value = first, -math.inf
    for start in range(num_starts):
        theta = [value.clone() for value in first]
        if start > 0:
            for value in theta:
                value += _START_SPREAD * torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value)
        reached, where = _maximise(window, scales, theta, max_iterations)
        if reached > best_value:
            best_value, best = reached, where
    if best_value == -math.inf:
        raise RuntimeError(f"The marginal likelihood was not finite from any of {num_starts} starts.")
    for scale, value in zip(scales_of(originals), best, strict=True):
        scale.write(value)
    return best_value


def _maximise(
    window: _Window, scales: list[Scale], theta: list[Tensor], max_iterations: int
) -> tuple[float, list[Tensor]]:
    """L-BFGS from ``theta``: the best value met on the way, minus infinity if none was finite, and where."""
    x, y = window.train_inputs[0], window.train_targets
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(window.likelihood, window)
    best_value, best = -math.inf, theta
    theta = [value.requires_grad_() for value in theta]

    def loss() -> Tensor:
        nonlocal best_value, best
        raw = [scale.raw(value) for scale, value in zip(scales, theta, strict=True)]
        for scale, value in zip(scales, theta, strict=True):
            scale.write(value)
        window.zero_grad()
        value = objective(window(x), y) * len(y)
        if value.item() > best_value:
            best_value, best = value.item(), [t.detach().clone() for t in theta]
        if value.requires_grad:
            (-value).backward()
        chain_gradients(scales, theta, raw)
        return -value.detach()

    # Above max_cholesky_size GPyTorch would answer with a stochastic estimate, which a line search cannot use.
    with gpytorch.settings.max_cholesky_size(len(y) + 1), torch.enable_grad():
        try:
            if theta:
                torch.optim.LBFGS(theta, max_iter=max_iterations, line_search_fn="strong_wolfe").step(loss)
            else:
                loss()
        except (NanError, NotPSDError):
            pass  # a step too far; what was met before it counts
    return best_value if math.isfinite(best_value) else -math.inf, best


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
