"""The peers, all with one interface: ``update(x, y)``, ``predict(x) -> mean, variance`` of new observations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.variational import NaturalVariationalDistribution, VariationalStrategy
from torch import Tensor

from examples.stream.methods import Exact, OnlineVariationalConditioning, Stream
from gpseq.features import InducingFeatures, InducingPoints
from gpseq.models import StreamingGP
from gpseq.variational import Prior, online

__all__ = [
    "Exact",
    "OnlineVariationalConditioning",
    "OptimisedPoints",
    "RefitSVGP",
    "Stream",
    "Streamed",
    "StreamingPoints",
]


class StreamingPoints(Stream):
    """The same update with inducing points: an even grid over what has been seen, laid anew at each chunk."""

    def __init__(self, num_points: int, kernel: Kernel, likelihood: GaussianLikelihood, start: float = 0.0) -> None:
        self.num_points, self.start = num_points, start
        self.make = lambda points: StreamingGP(InducingPoints(points), kernel, likelihood).eval()
        self.warnings: list[str] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Lay the grid over [start, last time], carry the belief over, learn the chunk."""
        last = x.max().item()
        if hasattr(self, "model"):
            last = max(last, self.model.features.nodes().max().item())
        grid = torch.linspace(self.start, last, self.num_points, dtype=torch.float64)
        if hasattr(self, "model"):
            self.model.rebase(InducingPoints(grid))
        else:
            self.model = self.make(grid)
        self.model.update(x, y)


class Streamed(Stream):
    """A stream over any features that follow the data by themselves."""

    def __init__(
        self, features: InducingFeatures, kernel: Kernel, likelihood: GaussianLikelihood, **kwargs: Any
    ) -> None:
        self.model = StreamingGP(features, kernel, likelihood, **kwargs).eval()
        self.warnings: list[str] = []


class OptimisedPoints(Stream):
    """Inducing points learnt by gradient at each chunk (streaming sparse GP of Bui et al., 2017), kernel frozen.

    They start as a random choice of old points and new inputs, in proportion to the data behind them, and climb the
    online bound by Adam.
    """

    def __init__(
        self, num_points: int, kernel: Kernel, likelihood: GaussianLikelihood, steps: int = 300, seed: int = 0
    ) -> None:
        self.num_points, self.kernel, self.likelihood, self.steps = num_points, kernel, likelihood, steps
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = 0
        self.warnings: list[str] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Place the points for the chunk, carry the belief over, learn it."""
        new = min(len(x), max(1, round(self.num_points * len(x) / (self.seen + len(x)))))
        points = x[torch.randperm(len(x), generator=self.generator)[:new]].double()
        if self.seen:
            old = self.model.features.nodes().squeeze(-1)
            kept = old[torch.randperm(len(old), generator=self.generator)[: self.num_points - new]]
            points = torch.cat([kept, points])
        self.seen += len(x)
        if not hasattr(self, "model"):
            self.model = StreamingGP(InducingPoints(points), self.kernel, self.likelihood).eval()
        self.model.rebase(InducingPoints(self._climb(points, x, y))).update(x, y)

    def _climb(self, points: Tensor, x: Tensor, y: Tensor) -> Tensor:
        prior = Prior(self.kernel, frozen=True)
        state, noise = self.model.state, self.likelihood.noise.detach()
        # In units of the typical distance between points, whatever the unit of time.
        unit = (torch.cat([points, x]).max() - torch.cat([points, x]).min()) / self.num_points
        theta = (points / unit).requires_grad_()
        optimiser = torch.optim.Adam([theta], lr=0.02)
        best, best_value = points, -math.inf
        for _ in range(self.steps):
            basis = online.initial_state(_At(theta * unit), prior)
            value = online.log_evidence(online.update(online.transfer(state, basis, prior), prior, x, y, noise))
            if value.item() > best_value:
                best, best_value = (theta * unit).detach().clone(), value.item()
            optimiser.zero_grad()
            (-value).backward()
            optimiser.step()
        return best


class _At(InducingPoints):
    """Inducing points that keep the graph of their positions."""

    def __init__(self, points: Tensor) -> None:
        super().__init__(points)
        self.points = points.unsqueeze(-1)


class RefitSVGP:
    """Stock SVGP that keeps all data and is fitted anew at each chunk: the batch ceiling of sparse methods.

    Points on a grid over what has been seen; one natural-gradient step of length one is the exact optimum here.
    """

    def __init__(self, num_points: int, kernel: Kernel, likelihood: GaussianLikelihood) -> None:
        self.num_points, self.kernel, self.likelihood = num_points, kernel, likelihood
        self.data: list[tuple[Tensor, Tensor]] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the chunk to the data and fit to all of them."""
        self.data.append((x, y))
        x, y = (torch.cat(parts) for parts in zip(*self.data, strict=True))
        grid = torch.linspace(x.min().item(), x.max().item(), self.num_points, dtype=torch.float64).unsqueeze(-1)
        self.model = _SVGP(grid, self.kernel).double()
        optimizer = gpytorch.optim.NGD(self.model.variational_parameters(), num_data=len(y), lr=1.0)
        objective = gpytorch.mlls.VariationalELBO(self.likelihood, self.model, num_data=len(y))
        self.model.train()
        optimizer.zero_grad()
        (-objective(self.model(x.unsqueeze(-1)), y)).backward()
        optimizer.step()
        self.model.eval()

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        prediction = self.likelihood(self.model(x.unsqueeze(-1)))
        return prediction.mean, prediction.variance


class _SVGP(gpytorch.models.ApproximateGP):
    def __init__(self, inducing_points: Tensor, kernel: Kernel) -> None:
        q = NaturalVariationalDistribution(len(inducing_points))
        super().__init__(VariationalStrategy(self, inducing_points, q, learn_inducing_locations=False))
        self.covar_module = copy.deepcopy(kernel).requires_grad_(False)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros_like(x[..., 0]), self.covar_module(x))


Method = Callable[[], Stream | RefitSVGP | Exact | OnlineVariationalConditioning]
