"""Oracles for streams: dense, slow, in the unwhitened and uncentred coordinates of the textbooks.

Nothing here comes from gpseq but the model that `stream` builds. Inputs are times, ``(n,)``, float64. A kernel is a
function of two such tensors, a mean of one; an inducing vector is u = W f(nodes) with the mean left in it.

Sources: Titsias (2009) for the collapsed bound; Bui, Nguyen and Turner (2017), equations 5 to 7, for the stream;
Hartikainen and Särkkä (2010) for the state-space form of Matern-3/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gpytorch
import numpy as np
import torch
from torch import Tensor

from gpseq.features import HippoFeatures, InducingFeatures, InducingPoints
from gpseq.models import StreamingGP

F64 = torch.float64

Kernel = Callable[[Tensor, Tensor], Tensor]
Mean = Callable[[Tensor], Tensor]


def rbf(lengthscale: float = 1.0, outputscale: float = 1.0) -> Kernel:
    return lambda a, b: outputscale * torch.exp(-0.5 * ((a[:, None] - b) / lengthscale) ** 2)


def matern32(lengthscale: float = 1.0, outputscale: float = 1.0) -> Kernel:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        scaled = math.sqrt(3) * (a[:, None] - b).abs() / lengthscale
        return outputscale * (1 + scaled) * torch.exp(-scaled)

    return kernel


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


# Gaussians


@dataclass(frozen=True)
class Gaussian:
    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        return self.covariance.diagonal()

    def log_density(self, value: Tensor) -> Tensor:
        error = value - self.mean
        quadratic = error @ torch.linalg.solve(self.covariance, error)
        return -0.5 * (len(value) * math.log(2 * math.pi) + torch.logdet(self.covariance) + quadratic)


def kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL[q || p] as it is written in every textbook."""
    error = p.mean - q.mean
    trace = torch.linalg.solve(p.covariance, q.covariance).trace()
    logdets = torch.logdet(p.covariance) - torch.logdet(q.covariance)
    return 0.5 * (trace + error @ torch.linalg.solve(p.covariance, error) - len(error) + logdets)


def exact_gp(kernel: Kernel, mean: Mean, x: Tensor, y: Tensor, noise: Tensor, at: Tensor) -> Gaussian:
    gain = torch.linalg.solve(kernel(x, x) + torch.diag(noise), kernel(x, at)).mT
    return Gaussian(mean(at) + gain @ (y - mean(x)), kernel(at, at) - gain @ kernel(x, at))


def exact_evidence(kernel: Kernel, mean: Mean, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    return Gaussian(mean(x), kernel(x, x) + torch.diag(noise)).log_density(y)


# Inducing variables


@dataclass(frozen=True)
class Functionals:
    """u = W f(nodes)."""

    nodes: Tensor
    weights: Tensor

    def mean(self, mean: Mean) -> Tensor:
        return self.weights @ mean(self.nodes)

    def covariance(self, kernel: Kernel) -> Tensor:
        return self.cross(kernel, self)

    def cross(self, kernel: Kernel, other: Functionals) -> Tensor:
        return self.weights @ kernel(self.nodes, other.nodes) @ other.weights.mT

    def prior(self, kernel: Kernel, mean: Mean) -> Gaussian:
        return Gaussian(self.mean(mean), self.covariance(kernel))


def at_points(points: Tensor) -> Functionals:
    return Functionals(points, torch.eye(len(points), dtype=F64))


def legs(order: int, horizon: float, start: float = 0.0, num_nodes: int | None = None) -> Functionals:
    """Legendre coefficients by numpy's Gauss-Legendre rule."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes or 2 * order + 20)
    values = [np.sqrt(2 * m + 1) * np.polynomial.legendre.Legendre.basis(m)(nodes) * weights / 2 for m in range(order)]
    times = start + (horizon - start) * (1 + nodes) / 2
    return Functionals(torch.from_numpy(times), torch.from_numpy(np.array(values)))


def conditional(kernel: Kernel, mean: Mean, basis: Functionals, q: Gaussian, of: Functionals) -> Gaussian:
    """Marginal of other functionals under the process p(f | u) q(u)."""
    prior, wanted = basis.prior(kernel, mean), of.prior(kernel, mean)
    gain = torch.linalg.solve(prior.covariance, basis.cross(kernel, of)).mT
    return Gaussian(
        wanted.mean + gain @ (q.mean - prior.mean),
        wanted.covariance + gain @ (q.covariance - prior.covariance) @ gain.mT,
    )


def residual_variance(kernel: Kernel, basis: Functionals, at: Tensor) -> Tensor:
    """Prior variance that u does not explain, as a fraction, by least squares (Kuu may be singular)."""
    kuf, kuu = basis.cross(kernel, at_points(at)), basis.covariance(kernel)
    values, vectors = torch.linalg.eigh(kuu)
    projected = vectors.mT @ kuf / values.clamp_min(1e-12 * values[-1]).sqrt()[:, None]
    return 1 - projected.square().sum(0) / kernel(at, at).diagonal()


def sparse_gp(
    kernel: Kernel, mean: Mean, basis: Functionals, x: Tensor, y: Tensor, noise: Tensor
) -> tuple[Gaussian, Tensor]:
    """Optimal q(u) and the collapsed bound of Titsias."""
    prior, kuf = basis.prior(kernel, mean), basis.cross(kernel, at_points(x))
    inner = prior.covariance + kuf @ torch.diag(1 / noise) @ kuf.mT
    solved = torch.linalg.solve(inner, prior.covariance).mT
    q = Gaussian(prior.mean + solved @ kuf @ ((y - mean(x)) / noise), solved @ prior.covariance)
    qff = kuf.mT @ torch.linalg.solve(prior.covariance, kuf)
    slack = 0.5 * ((kernel(x, x) - qff).diagonal() / noise).sum()
    return q, Gaussian(mean(x), qff + torch.diag(noise)).log_density(y) - slack


# The stream


@dataclass(frozen=True)
class Old:
    """What the previous update left: q(a), and the prior of a under the hyperparameters of that time."""

    basis: Functionals
    q: Gaussian
    prior: Gaussian


def objective(
    kernel: Kernel, mean: Mean, basis: Functionals, q: Gaussian, data: tuple[Tensor, ...], old: Old | None
) -> Tensor:
    """The online objective with its four terms; x, y and noise in ``data`` may be empty."""
    x, y, noise = data
    f = conditional(kernel, mean, basis, q, at_points(x))
    log_density = -0.5 * (torch.log(2 * math.pi * noise) + ((y - f.mean) ** 2 + f.variance) / noise)
    value = log_density.sum() - kl(q, basis.prior(kernel, mean))
    if old is not None:
        q_tilde = conditional(kernel, mean, basis, q, old.basis)
        value = value + kl(q_tilde, old.prior) - kl(q_tilde, old.q)
    return value


def maximiser(kernel: Kernel, mean: Mean, basis: Functionals, data: tuple[Tensor, ...], old: Old | None) -> Gaussian:
    """The q(b) that maximises the objective: p(b) times the expected logarithms of both likelihoods."""
    x, y, noise = data
    prior = basis.prior(kernel, mean)
    inverse = torch.linalg.inv(prior.covariance)
    precision, shift = inverse, inverse @ prior.mean
    to_data = basis.cross(kernel, at_points(x)).mT @ inverse
    precision = precision + to_data.mT @ torch.diag(1 / noise) @ to_data
    shift = shift + to_data.mT @ ((y - mean(x) + to_data @ prior.mean) / noise)
    if old is not None:
        to_old = basis.cross(kernel, old.basis).mT @ inverse
        offset = to_old @ prior.mean - old.basis.mean(mean)
        for sign, part in ((1, old.q), (-1, old.prior)):
            part_precision = sign * torch.linalg.inv(part.covariance)
            precision = precision + to_old.mT @ part_precision @ to_old
            shift = shift + to_old.mT @ part_precision @ (part.mean + offset)
    covariance = torch.linalg.inv(precision)
    return Gaussian(covariance @ shift, 0.5 * (covariance + covariance.mT))


@dataclass
class DenseStream:
    """Bui et al.'s stream, one dense update after another; `evidence` sums the increments."""

    kernel: Kernel
    basis: Functionals
    mean: Mean = zero
    old: Old | None = None
    evidence: Tensor = field(default_factory=lambda: torch.zeros((), dtype=F64))

    def update(self, x: Tensor, y: Tensor, noise: Tensor, **now: Any) -> DenseStream:
        """Learn a chunk, with another ``kernel``, ``mean`` or ``basis`` from now on if given."""
        for name, value in now.items():
            setattr(self, name, value)
        q = maximiser(self.kernel, self.mean, self.basis, (x, y, noise), self.old)
        self.evidence = self.evidence + objective(self.kernel, self.mean, self.basis, q, (x, y, noise), self.old)
        self.old = Old(self.basis, q, self.basis.prior(self.kernel, self.mean))
        return self

    def predict(self, at: Tensor) -> Gaussian:
        assert self.old is not None
        return conditional(self.kernel, self.mean, self.basis, self.old.q, at_points(at))


def moment_matching(
    kernel: Kernel, mean: Mean, old: Old, basis: Functionals, data: tuple[Tensor, ...]
) -> tuple[Gaussian, Tensor]:
    """Marginal of the old posterior process on the new functionals, then one sparse update; the increment of evidence.

    The old factor q(a) / p_old(a) meets today's prior of a first, so the hyperparameters may have changed.
    """
    x, y, noise = data
    now = old.basis.prior(kernel, mean)
    parts = [(1, old.q), (-1, old.prior), (1, now)]
    precision = sum(sign * torch.linalg.inv(part.covariance) for sign, part in parts)
    shift = sum(sign * torch.linalg.solve(part.covariance, part.mean) for sign, part in parts)
    q_old = Gaussian(torch.linalg.solve(precision, shift), torch.linalg.inv(precision))
    # The integral of N(a; q) N(a; now) / N(a; p_old) over a, read off at a = 0.
    origin = torch.zeros_like(now.mean)
    increment = sum(sign * part.log_density(origin) for sign, part in parts) - q_old.log_density(origin)

    transferred = conditional(kernel, mean, old.basis, q_old, basis)
    prior = basis.prior(kernel, mean)
    kuf = basis.cross(kernel, at_points(x))
    to_data = torch.linalg.solve(prior.covariance, kuf).mT
    predicted = Gaussian(
        mean(x) + to_data @ (transferred.mean - prior.mean),
        to_data @ transferred.covariance @ to_data.mT + torch.diag(noise),
    )
    slack = 0.5 * ((kernel(x, x) - to_data @ kuf).diagonal() / noise).sum()
    gain = torch.linalg.solve(predicted.covariance, to_data @ transferred.covariance).mT
    q = Gaussian(
        transferred.mean + gain @ (y - predicted.mean),
        transferred.covariance - gain @ to_data @ transferred.covariance,
    )
    return q, increment + predicted.log_density(y) - slack


# State space


def matern32_smoother(
    lengthscale: float, outputscale: float, x: Tensor, y: Tensor, noise: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior mean and variance of f under a Matern-3/2 prior: Kalman filter and Rauch-Tung-Striebel smoother."""
    rate = math.sqrt(3) / lengthscale
    drift = torch.tensor([[0.0, 1.0], [-(rate**2), -2 * rate]], dtype=F64)
    stationary = outputscale * torch.diag(torch.tensor([1.0, rate**2], dtype=F64))
    times, order = torch.cat([x, at]).sort()
    targets = torch.cat([y, torch.full_like(at, math.nan)])[order]
    noises = torch.cat([noise, torch.ones_like(at)])[order]

    filtered, predicted, steps = [], [], []
    mean, covariance, before = torch.zeros(2, dtype=F64), stationary, times[0]
    for time, target, variance in zip(times, targets, noises, strict=True):
        step = torch.matrix_exp(drift * (time - before))
        mean, covariance = step @ mean, step @ covariance @ step.mT + stationary - step @ stationary @ step.mT
        steps.append(step)
        predicted.append((mean, covariance))
        if not target.isnan():
            gain = covariance[:, 0] / (covariance[0, 0] + variance)
            mean, covariance = mean + gain * (target - mean[0]), covariance - gain[:, None] * covariance[0]
        filtered.append((mean, covariance))
        before = time
    smoothed = [filtered[-1]]
    for i in range(len(times) - 2, -1, -1):
        (mean, covariance), (mean_next, covariance_next) = filtered[i], predicted[i + 1]
        gain = torch.linalg.solve(covariance_next, steps[i + 1] @ covariance).mT
        ahead = smoothed[-1]
        smoothed.append(
            (mean + gain @ (ahead[0] - mean_next), covariance + gain @ (ahead[1] - covariance_next) @ gain.mT)
        )
    smoothed.reverse()
    result = torch.tensor([[m[0], c[0, 0]] for m, c in smoothed], dtype=F64)[order.argsort()][len(x) :]
    return result[:, 0], result[:, 1]


# The models under test, and what they are compared by


def gpytorch_kernel(
    lengthscale: float | Tensor = 1.0,
    outputscale: float | Tensor = 1.0,
    nu: float | None = None,
    dtype: torch.dtype = F64,
    batch_shape: tuple[int, ...] = (),
) -> gpytorch.kernels.Kernel:
    """RBF, or Matern where ``nu`` is given, scaled; lengthscales and outputscales have the batch shape."""
    batch = torch.Size(batch_shape)
    base = (
        gpytorch.kernels.RBFKernel(batch_shape=batch)
        if nu is None
        else gpytorch.kernels.MaternKernel(nu, batch_shape=batch)
    )
    kernel = gpytorch.kernels.ScaleKernel(base, batch_shape=batch).to(dtype)
    lengthscale = torch.as_tensor(lengthscale, dtype=dtype)
    kernel.base_kernel.lengthscale = lengthscale[..., None, None] if batch else lengthscale
    kernel.outputscale = torch.as_tensor(outputscale, dtype=dtype)
    return kernel


def stream(
    features: InducingFeatures | int = 12,
    horizon: float = 10.0,
    *,
    start: float = 0.0,
    lengthscale: float | Tensor = 1.0,
    outputscale: float | Tensor = 1.0,
    noise: float = 0.1,
    nu: float | None = None,
    dtype: torch.dtype = F64,
    batch_shape: tuple[int, ...] = (),
    kind: type[StreamingGP] = StreamingGP,
    **options: Any,
) -> StreamingGP:
    """A stream in eval mode; ``features`` may be a number of Legendre coefficients on [start, horizon]."""
    kernel = gpytorch_kernel(lengthscale, outputscale, nu, dtype, batch_shape)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(dtype)
    likelihood.noise = torch.tensor(noise, dtype=dtype)  # a bare number would pass through float32
    if isinstance(features, int):
        features = HippoFeatures(features, horizon, start)
    return kind(features, kernel, likelihood, **options).eval()


def functionals(features: InducingFeatures) -> Functionals:
    """The oracle's counterpart of one-dimensional features, made anew from what defines them."""
    if isinstance(features, InducingPoints):
        return at_points(features.points.detach()[:, 0])
    assert isinstance(features, HippoFeatures)
    return legs(features.num_features, features.horizon, features.start, features.num_nodes)


def variance_of(posterior: gpytorch.distributions.MultivariateNormal) -> Tensor:
    """Variances as they are: `posterior.variance` rounds small ones up to GPyTorch's floor, with a warning."""
    diagonal = posterior.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)
    return diagonal.expand(posterior.mean.shape)


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """Everything that a model would save, bit by bit."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_identical(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name].dtype == value.dtype and torch.equal(now[name], value), f"{name} has changed"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_posterior(model: StreamingGP, expected: Gaussian, at: Tensor, tolerance: float) -> None:
    """Mean and full covariance of the model at ``at`` are those of the oracle."""
    with torch.no_grad():
        posterior = model(at)
        assert_close(posterior.mean.double(), expected.mean, tolerance)
        assert_close(posterior.covariance_matrix.double(), expected.covariance, tolerance)


def draw(
    n: int, horizon: float = 10.0, start: float = 0.0, seed: int = 0, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor]:
    """Irregular, unsorted times on [start, horizon] and noisy values of a smooth function."""
    generator = torch.Generator().manual_seed(seed)
    x = start + (horizon - start) * torch.rand(n, dtype=F64, generator=generator)
    y = torch.sin(1.3 * x) + 0.5 * torch.cos(0.4 * x + 1) + 0.3 * torch.randn(n, dtype=F64, generator=generator)
    return x.to(dtype), y.to(dtype)
