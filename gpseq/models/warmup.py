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

from gpseq.features.base import as_inputs

#: Standard deviation of the random starts in GPyTorch's unconstrained parameters: a factor of a few each way.
_START_SPREAD = 1.5


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

    The first start is the values that the modules have; the others are random around them, in the unconstrained
    parameters. L-BFGS in float64; the modules keep their dtype. Priors registered on hyperparameters count. The cost
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
    if num_starts < 1:
        raise ValueError(f"num_starts: expected at least 1, got {num_starts}.")
    if noise is not None:
        window_likelihood: Likelihood = FixedNoiseGaussianLikelihood(noise.double().expand(y.shape))
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
    parameters = [parameter for parameter in fitted.parameters() if parameter.requires_grad]
    first = [parameter.detach().clone() for parameter in parameters]
    best, best_value = None, -math.inf
    for start in range(num_starts):
        for parameter, value in zip(parameters, first, strict=True):
            offset = torch.randn(value.shape, generator=generator, dtype=torch.float64) if start else torch.zeros(())
            parameter.data = value + _START_SPREAD * offset.to(value)
        reached = _maximise(window, parameters, max_iterations)
        if reached > best_value:
            best, best_value = copy.deepcopy(fitted.state_dict()), reached
    if best is None:
        raise RuntimeError(f"The marginal likelihood was not finite from any of {num_starts} starts.")
    originals.load_state_dict(best)
    return best_value


def _maximise(window: _Window, parameters: list[torch.nn.Parameter], max_iterations: int) -> float:
    """L-BFGS from the present values; the value reached, or minus infinity where the covariance broke down."""
    x, y = window.train_inputs[0], window.train_targets
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(window.likelihood, window)
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -objective(window(x), y) * len(y)
        if value.requires_grad:
            value.backward()
        return value

    # Above max_cholesky_size GPyTorch would answer with a stochastic estimate, which a line search cannot use.
    with gpytorch.settings.max_cholesky_size(len(y) + 1), torch.enable_grad():
        try:
            if parameters:
                optimizer.step(loss)
            reached = -loss().item()
        except (NanError, NotPSDError):
            return -math.inf
    return reached if math.isfinite(reached) else -math.inf


def _check_window(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}.")
    inputs = as_inputs(x)
    if inputs.dim() != 2 or y.dim() != 1 or len(y) != len(inputs) or len(y) == 0:
        shapes = f"{tuple(y.shape)} for x of shape {tuple(x.shape)}"
        raise ValueError(f"y: expected (n,) targets for n >= 1 inputs of shape (n,) or (n, d), got {shapes}.")
    for name, value in (("x", x), ("y", y)):
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity.")
    return inputs.detach().double(), y.detach().double()
