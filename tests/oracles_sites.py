"""Oracles for updates by sites: the online objective of any likelihood, dense, and its maximum by brute force."""

from __future__ import annotations

from collections.abc import Callable

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import BernoulliLikelihood, BetaLikelihood, LaplaceLikelihood, Likelihood, StudentTLikelihood
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from gpseq.likelihoods import NegativeBinomialLikelihood, PoissonLikelihood
from tests.oracles_streaming import F64, Functionals, Gaussian, Kernel, Mean, Old, at_points, conditional, kl

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "poisson": PoissonLikelihood,
    "negative binomial": NegativeBinomialLikelihood,
    "bernoulli": BernoulliLikelihood,
    "student t": StudentTLikelihood,
    "laplace": LaplaceLikelihood,
    "beta": BetaLikelihood,
    "softplus poisson": gpytorch.likelihoods.PoissonLikelihood,
}

#: Those whose optimal sites are never clamped and whose expected log likelihoods are smooth.
SMOOTH = ("poisson", "negative binomial", "bernoulli", "beta")


def likelihood_of(name: str, dtype: torch.dtype = F64) -> Likelihood:
    """A likelihood with its first hyperparameters."""
    return LIKELIHOODS[name]().to(dtype)


def targets(name: str, x: Tensor, seed: int = 0, level: float = 0.3) -> Tensor:
    """Targets that suit a likelihood, of a smooth function of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    f = level + 1.2 * torch.sin(1.3 * x.double())
    noise = 0.4 * torch.randn(f.shape, dtype=F64, generator=generator)
    if name in ("poisson", "negative binomial", "softplus poisson"):
        y = torch.poisson((f + noise).exp(), generator=generator)
    elif name == "bernoulli":
        y = (f + 2 * noise > 0).double()
    elif name == "beta":
        y = torch.sigmoid(f + noise)
    else:
        y = f + noise
    return y.to(x.dtype)


def objective(
    kernel: Kernel,
    mean: Mean,
    basis: Functionals,
    q: Gaussian,
    data: tuple[Tensor, Tensor, Likelihood],
    old: Old | None,
) -> Tensor:
    """The four terms."""
    x, y, likelihood = data
    f = conditional(kernel, mean, basis, q, at_points(x))
    marginals = MultivariateNormal(f.mean, DiagLinearOperator(f.variance))
    value = likelihood.expected_log_prob(y, marginals).sum() - kl(q, basis.prior(kernel, mean))
    if old is not None:
        q_tilde = conditional(kernel, mean, basis, q, old.basis)
        value = value + kl(q_tilde, old.prior) - kl(q_tilde, old.q)
    return value


def around(start: Gaussian, mean: Tensor, root: Tensor) -> Gaussian:
    """A Gaussian in coordinates in which ``start`` is the standard normal; the diagonal of the root is a logarithm."""
    factor = torch.linalg.cholesky(start.covariance)
    spread = factor @ (root.tril(-1) + torch.diag(root.diagonal().exp()))
    return Gaussian(start.mean + factor @ mean, spread @ spread.mT)


def slope(value: Callable[[Gaussian], Tensor], at: Gaussian) -> tuple[Tensor, Tensor]:
    """Derivatives of a function of a Gaussian in its mean and root, in units of its own standard deviations."""
    order = len(at.mean)
    mean, root = torch.zeros(order, dtype=F64).requires_grad_(), torch.zeros(order, order, dtype=F64).requires_grad_()
    by_mean, by_root = torch.autograd.grad(value(around(at, mean, root)), (mean, root))
    return by_mean, by_root.tril()


def maximum(value: Callable[[Gaussian], Tensor], start: Gaussian, rounds: int = 2) -> tuple[Gaussian, Tensor]:
    """Brute force: all means and covariances by L-BFGS, each round in the coordinates that the last one found."""
    order = len(start.mean)
    for _ in range(rounds):
        mean = torch.zeros(order, dtype=F64).requires_grad_()
        root = torch.zeros(order, order, dtype=F64).requires_grad_()
        search = torch.optim.LBFGS(
            [mean, root], max_iter=300, history_size=50, tolerance_grad=1e-9, tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss(
            search: torch.optim.LBFGS = search, mean: Tensor = mean, root: Tensor = root, start: Gaussian = start
        ) -> Tensor:
            search.zero_grad()
            result = -value(around(start, mean, root))
            result.backward()
            return result

        search.step(loss)
        start = around(start, mean.detach(), root.detach())
    return start, value(start).detach()
