"""The methods that follow a series, with one interface: ``update(x, y)``, ``predict(x) -> mean, variance``."""

from __future__ import annotations

import copy
import warnings

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from torch import Tensor

from gpseq.features import HippoFeatures
from gpseq.models import CapacityWarning, StreamingGP

#: GPyTorch's default for float64.
JITTER = gpytorch.settings.variational_cholesky_jitter.value(torch.float64)


class SparseGP(gpytorch.models.ApproximateGP):
    """An ordinary SVGP on given inducing points, with q(u) at its optimum for the data that it is made with."""

    def __init__(
        self, x: Tensor, y: Tensor, inducing_points: Tensor, kernel: Kernel, likelihood: GaussianLikelihood
    ) -> None:
        q = CholeskyVariationalDistribution(len(inducing_points))
        strategy = VariationalStrategy(self, inducing_points, q, learn_inducing_locations=False, jitter_val=JITTER)
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = copy.deepcopy(kernel)
        self.likelihood = copy.deepcopy(likelihood)
        self.double().eval()
        with torch.no_grad():
            z = strategy.inducing_points
            factor = torch.linalg.cholesky(kernel(z).to_dense() + JITTER * torch.eye(len(z), dtype=x.dtype))
            A = torch.linalg.solve_triangular(factor, kernel(z, x.unsqueeze(-1)).to_dense(), upper=False)
            precision = torch.eye(len(z), dtype=x.dtype) + A @ A.mT / likelihood.noise
            covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
            q.variational_mean.copy_(covariance @ A @ y / likelihood.noise)
            q.chol_variational_covar.copy_(torch.linalg.cholesky(covariance))
            strategy.variational_params_initialized.fill_(1)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at ``x``."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class OnlineVariationalConditioning:
    """Maddox, Stanton and Wilson (2021), through ``get_fantasy_model``.

    The first chunk becomes pseudo-data at the inducing points; every later chunk is appended as it is. So it forgets
    nothing, and it grows with the stream.
    """

    def __init__(self, num_inducing: int, kernel: Kernel, likelihood: GaussianLikelihood) -> None:
        self.num_inducing, self.kernel, self.likelihood = num_inducing, kernel, likelihood
        self.model: gpytorch.models.GP | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """Learn a chunk, ``x`` and ``y`` of shape ``(n,)``."""
        if self.model is None:
            z = torch.linspace(x.min().item(), x.max().item(), min(self.num_inducing, len(x)), dtype=x.dtype)
            self.model = SparseGP(x, y, z.unsqueeze(-1), self.kernel, self.likelihood)
        else:
            with torch.no_grad():
                self.model = self.model.get_fantasy_model(x.unsqueeze(-1), y)

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations at ``x``, ``(n,)`` each."""
        prediction = self.likelihood(self.model(x.unsqueeze(-1)))
        return prediction.mean, prediction.variance

    @property
    def stored(self) -> int:
        """Points that the model holds."""
        inputs = getattr(self.model, "train_inputs", None)
        return self.num_inducing if inputs is None else inputs[0].shape[-2]


class Stream:
    """``StreamingGP`` on a Legendre memory."""

    def __init__(
        self,
        num_features: int,
        horizon: float,
        kernel: Kernel,
        likelihood: GaussianLikelihood,
        start: float = 0.0,
        growth: float | str | None = 1.25,
    ) -> None:
        features = HippoFeatures(num_features, horizon, start=start)
        self.model = StreamingGP(features, kernel, likelihood, horizon_growth=growth).eval()
        self.warnings: list[str] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Learn a chunk; capacity warnings are collected."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CapacityWarning)
            self.model.update(x, y)
        self.warnings += [str(w.message) for w in caught]

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        prediction = self.model.likelihood(self.model(x))
        return prediction.mean, prediction.variance


class Exact:
    """The exact GP on all data, by one dense factor: the ceiling."""

    def __init__(self, kernel: Kernel, likelihood: GaussianLikelihood) -> None:
        self.kernel, self.likelihood = kernel, likelihood
        self.data: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the chunk and factor anew."""
        self.data.append((x, y))
        self.x, y = (torch.cat(parts) for parts in zip(*self.data, strict=True))
        noisy = self.kernel(self.x).to_dense() + self.likelihood.noise * torch.eye(len(y), dtype=torch.float64)
        self.factor = torch.linalg.cholesky(noisy)
        self.weights = torch.cholesky_solve(y.unsqueeze(-1), self.factor).squeeze(-1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        cross = self.kernel(x, self.x).to_dense()
        explained = torch.linalg.solve_triangular(self.factor, cross.mT, upper=False).square().sum(0)
        return cross @ self.weights, self.kernel(x, diag=True) - explained + self.likelihood.noise
