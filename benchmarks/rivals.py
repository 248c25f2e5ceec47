"""Peers for inputs of several columns and for likelihoods that are not Gaussian, by the same seam.

``update(x, y)`` and ``predict(x)``, mean and variance of new observations; where these are not Gaussian also
``log_density(x, y)``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, Likelihood
from gpytorch.means import Mean, ZeroMean
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from torch import Tensor

from benchmarks.baselines import Streamed
from gpseq.features import InducingFeatures, InducingPoints
from gpseq.features.selected import select_points
from gpseq.mlls import StreamingELBO
from gpseq.models import StreamingGP
from gpseq.variational import InterdomainVariationalStrategy, Prior, online

JITTER = gpytorch.settings.variational_cholesky_jitter.value(torch.float64)


class MovingPoints(InducingPoints):
    """Points whose positions are learnt, in units in which a step of an optimiser means the same in every column."""

    def __init__(self, points: Tensor, unit: Tensor) -> None:
        super().__init__(points / unit, learn=True)
        self.register_buffer("unit", unit)

    def nodes(self) -> Tensor:
        """The points in the units of the inputs."""
        return self.points * self.unit


def starting_points(old: Tensor | None, x: Tensor, num_points: int, seen: int, generator: torch.Generator) -> Tensor:
    """A random choice of old points and new inputs, in proportion to the data behind them, ``(M, d)``."""
    new = num_points if old is None else max(1, round(num_points * len(x) / (seen + len(x))))
    new = min(len(x), new)
    points = x[torch.randperm(len(x), generator=generator)[:new]].double()
    if old is None:
        return points
    return torch.cat([old[torch.randperm(len(old), generator=generator)[: num_points - new]], points])


class OptimisedRows(Streamed):
    """Streaming sparse GP of Bui et al. (2017): points by Adam on the collapsed online bound, kernel frozen.

    Steps are in units of the lengthscales.
    """

    def __init__(
        self,
        num_points: int,
        kernel: Kernel,
        likelihood: GaussianLikelihood,
        steps: int,
        seed: int = 0,
        rate: float = 0.02,
    ) -> None:
        self.num_points, self.kernel, self.likelihood = num_points, kernel, likelihood
        self.steps, self.rate = steps, rate
        self.unit = kernel.base_kernel.lengthscale.detach().squeeze()
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = 0
        self.warnings: list[str] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Place the points for the task, carry the belief over, learn it."""
        old = self.model.features.nodes() if self.seen else None
        points = starting_points(old, x, self.num_points, self.seen, self.generator)
        self.seen += len(x)
        if old is None:
            self.model = StreamingGP(InducingPoints(points), self.kernel, self.likelihood).eval()
        self.model.rebase(InducingPoints(self._climb(points, x, y))).update(x, y)

    def _climb(self, points: Tensor, x: Tensor, y: Tensor) -> Tensor:
        prior = Prior(self.kernel, frozen=True)
        state, noise = self.model.state, self.likelihood.noise.detach()
        features = MovingPoints(points, self.unit)
        optimiser = torch.optim.Adam(features.parameters(), lr=self.rate)
        best, best_value = points, -math.inf
        for _ in range(self.steps):
            basis = online.initial_state(features, prior)
            value = online.log_evidence(online.update(online.transfer(state, basis, prior), prior, x, y, noise))
            if value.item() > best_value:
                best, best_value = features.nodes().detach().clone(), value.item()
            optimiser.zero_grad()
            (-value).backward()
            optimiser.step()
        return best


class FixedRows(Streamed):
    """Points chosen from the first task by greedy conditional variance, and kept: conditioning in bounded memory."""

    def __init__(
        self,
        num_points: int,
        kernel: Kernel,
        likelihood: Likelihood,
        mean: Mean | None = None,
        model_of: Callable[..., StreamingGP] = StreamingGP,
    ) -> None:
        self.num_points, self.parts, self.model_of = num_points, (kernel, likelihood, mean), model_of
        self.warnings: list[str] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Choose the points at the first task; learn."""
        if not hasattr(self, "model"):
            inputs = x if x.dim() > 1 else x.unsqueeze(-1)
            points = inputs[select_points(self.parts[0], inputs, self.num_points)]
            self.model = self.model_of(InducingPoints(points), *self.parts).eval()
        self.model.update(x, y)


class BatchRows(Streamed):
    """All data kept, and a sparse GP fitted to all of them anew at each task: the ceiling of sparse methods.

    Args:
        features: makes the inducing variables for all inputs so far, ``(n, d)``.
        kernel: frozen.
        likelihood: any; updates are exact in the sparse model for Gaussian ones and converge for others.
        mean: frozen.
    """

    def __init__(
        self,
        features: Callable[[Tensor], InducingFeatures],
        kernel: Kernel,
        likelihood: Likelihood,
        mean: Mean | None = None,
    ) -> None:
        self.features, self.parts = features, (kernel, likelihood, mean)
        self.data: list[tuple[Tensor, Tensor]] = []
        self.warnings: list[str] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Fit to all data so far."""
        self.data.append((x, y))
        x, y = (torch.cat(parts) for parts in zip(*self.data, strict=True))
        self.model = StreamingGP(self.features(x), *self.parts).eval()
        self.model.update(x, y)


def random_rows(num_points: int, seed: int) -> Callable[[Tensor], InducingPoints]:
    """As many rows of all inputs, drawn at random."""

    def features(x: Tensor) -> InducingPoints:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num_points]
        return InducingPoints(x[rows])

    return features


class ExactRows:
    """The exact GP on all data; rows are appended to its Cholesky factor, so that all tasks cost one factorisation."""

    def __init__(self, kernel: Kernel, likelihood: GaussianLikelihood, only_at_end: bool = False) -> None:
        self.kernel, self.noise, self.only_at_end = kernel, likelihood.noise.detach(), only_at_end
        self.x = self.y = self.factor = None

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Append rows to the factor."""
        block = self.kernel(x).to_dense() + self.noise * torch.eye(len(y), dtype=torch.float64)
        if self.factor is None:
            self.x, self.y, self.factor = x, y, torch.linalg.cholesky(block)
        else:
            cross = torch.linalg.solve_triangular(self.factor, self.kernel(self.x, x).to_dense(), upper=False)
            corner = torch.linalg.cholesky(block - cross.mT @ cross)
            old, new = len(self.y), len(y)
            factor = self.factor.new_zeros(old + new, old + new)
            factor[:old, :old], factor[old:, :old], factor[old:, old:] = self.factor, cross.mT, corner
            self.x, self.y, self.factor = torch.cat([self.x, x]), torch.cat([self.y, y]), factor
        self.weights = torch.cholesky_solve(self.y.unsqueeze(-1), self.factor).squeeze(-1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        cross = self.kernel(self.x, x).to_dense()
        known = torch.linalg.solve_triangular(self.factor, cross, upper=False).square().sum(0)
        return cross.mT @ self.weights, self.kernel(x, diag=True) - known + self.noise


class ConditioningRows:
    """OVC of Maddox et al. (2021) by GPyTorch's ``get_fantasy_model``: points from the first task, then every row kept."""

    def __init__(self, num_points: int, kernel: Kernel, likelihood: GaussianLikelihood) -> None:
        self.num_points, self.kernel, self.likelihood = num_points, kernel, likelihood
        self.model: gpytorch.models.GP | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """Learn a task."""
        with torch.no_grad():
            if self.model is None:
                points = x[select_points(self.kernel, x, self.num_points)]
                self.model = _OptimalSVGP(x, y, points, self.kernel, self.likelihood)
            else:
                self.model = self.model.get_fantasy_model(x, y)

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        prediction = self.likelihood(self.model(x))
        return prediction.mean, prediction.variance


class _OptimalSVGP(gpytorch.models.ApproximateGP):
    """Stock SVGP with q(u) at its optimum for the data that it is made with."""

    def __init__(self, x: Tensor, y: Tensor, points: Tensor, kernel: Kernel, likelihood: GaussianLikelihood) -> None:
        q = CholeskyVariationalDistribution(len(points))
        super().__init__(VariationalStrategy(self, points, q, learn_inducing_locations=False, jitter_val=JITTER))
        self.mean_module = ZeroMean()
        self.covar_module, self.likelihood = copy.deepcopy(kernel), copy.deepcopy(likelihood)
        self.double().eval()
        eye = torch.eye(len(points), dtype=torch.float64)
        factor = torch.linalg.cholesky(kernel(points).to_dense() + JITTER * eye)
        A = torch.linalg.solve_triangular(factor, kernel(points, x).to_dense(), upper=False)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(eye + A @ A.mT / likelihood.noise))
        q.variational_mean.data = covariance @ A @ y / likelihood.noise
        q.chol_variational_covar.data = torch.linalg.cholesky(covariance)
        self.variational_strategy.variational_params_initialized.fill_(1)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class Scored:
    """Scores of a model of f whose observations are counts or labels."""

    model: Any
    likelihood: Likelihood

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        f = self.model(x)
        if isinstance(self.likelihood, BernoulliLikelihood):
            probability = self.likelihood(f).mean
            return probability, probability * (1 - probability)
        return self.likelihood.predictive_moments(f)

    @torch.no_grad()
    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Log predictive density of each observation."""
        if isinstance(self.likelihood, BernoulliLikelihood):
            probability = self.predict(x)[0]
            return torch.where(y > 0.5, probability, 1 - probability).clamp_min(1e-12).log()
        return self.likelihood.log_marginal(y, self.model(x))


class Labels:
    """The score beside the density of methods for labels: wrong ones."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """One where the likelier label is not the observed one."""
        return ((self.predict(x)[0] > 0.5) != (y > 0.5)).double()  # type: ignore[attr-defined]


class Sited(Scored):
    """A stream, ours or a peer's, whose likelihood is not Gaussian: updates by natural-gradient steps on sites."""

    def __init__(self, method: Streamed, likelihood: Likelihood) -> None:
        self.method, self.likelihood = method, likelihood

    @property
    def model(self) -> StreamingGP:
        """Where predictions come from."""
        return self.method.model

    def update(self, x: Tensor, y: Tensor) -> None:
        """Learn a task."""
        self.method.update(x, y)


class GradientPoints(Scored):
    """OSVGP for any likelihood: q(u) and the points by Adam on the online bound, everything else frozen.

    Args:
        num_points: M.
        kernel: ``ScaleKernel`` of a kernel with lengthscales, whose units the positions are learnt in.
        likelihood: any with ``expected_log_prob``.
        mean: of f.
        steps: of Adam, a task.
        seed: of the points that the task begins with.
        rate: of Adam.
    """

    def __init__(
        self,
        num_points: int,
        kernel: Kernel,
        likelihood: Likelihood,
        mean: Mean | None,
        steps: int,
        seed: int = 0,
        rate: float = 0.01,
    ) -> None:
        self.num_points, self.steps, self.rate = num_points, steps, rate
        self.kernel = copy.deepcopy(kernel).requires_grad_(False)
        self.mean = copy.deepcopy(mean or ZeroMean()).requires_grad_(False)
        self.likelihood = copy.deepcopy(likelihood).requires_grad_(False)
        self.unit = self.kernel.base_kernel.lengthscale.detach().reshape(-1)
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Learn a task."""
        inputs = (x if x.dim() > 1 else x.unsqueeze(-1)).double()
        old = self.model.variational_strategy.features.nodes().detach() if self.seen else None
        points = MovingPoints(starting_points(old, inputs, self.num_points, self.seen, self.generator), self.unit)
        self.seen += len(y)
        if old is None:
            self.model = _PointsGP(points, self.kernel, self.mean)
            self.bound = StreamingELBO(self.likelihood, self.model)
        else:
            self.model.variational_strategy.advance(points)
        self.model.train()
        optimiser = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=self.rate)
        for _ in range(self.steps):
            optimiser.zero_grad()
            (-self.bound(self.model(inputs), y)).backward()
            optimiser.step()
        self.model.eval()


class _PointsGP(gpytorch.models.ApproximateGP):
    def __init__(self, features: InducingFeatures, kernel: Kernel, mean: Mean) -> None:
        q = CholeskyVariationalDistribution(features.num_features)
        super().__init__(InterdomainVariationalStrategy(self, features, q))
        self.mean_module, self.covar_module = mean, kernel
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))
