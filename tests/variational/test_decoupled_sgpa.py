"""DecoupledSGPAVariationalStrategy against SVGPs on the union of its points, its limits, and in the hands of a user."""

import io
import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, LinearKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean, LinearMean, Mean, ZeroMean
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    DeltaVariationalDistribution,
    MeanFieldVariationalDistribution,
    NaturalVariationalDistribution,
    OrthogonallyDecoupledVariationalStrategy,
    TrilNaturalVariationalDistribution,
    VariationalStrategy,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gpseq.kernels import ExponentialKernel
from gpseq.sgpa import decoupled_posterior
from gpseq.variational import DecoupledSGPAVariationalStrategy, IndependentMultitaskVariationalStrategy
from tests.oracles import close

F64 = torch.float64
Batch = tuple[int, ...]
Array = np.ndarray
FORMS = ["orthogonal", "cheng_boots"]
DISTRIBUTIONS = {
    "cholesky": CholeskyVariationalDistribution,
    "mean field": MeanFieldVariationalDistribution,
    "natural": NaturalVariationalDistribution,
    "tril natural": TrilNaturalVariationalDistribution,
    "delta": DeltaVariationalDistribution,
}
M, N = 3, 4


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_q(size: int = M, batch: Batch = (), kind: str = "cholesky") -> Any:
    q = DISTRIBUTIONS[kind](size, batch_shape=torch.Size(batch), mean_init_std=0.0).double()
    root = 0.4 * draw(*batch, size, size, seed=1) / size**0.5 + 0.5 * torch.eye(size, dtype=F64)
    q.initialize_variational_distribution(MultivariateNormal(draw(*batch, size, seed=2), root @ root.mT))
    return q


def some_kernel(batch: Batch = (), d: int = 2) -> Kernel:
    shape = torch.Size(batch)
    kernel = ScaleKernel(RBFKernel(d, batch_shape=shape), batch_shape=shape).double()
    kernel.base_kernel.raw_lengthscale.data = 0.3 * draw(*batch, 1, d, seed=11)
    kernel.raw_outputscale.data = draw(*batch, seed=12) if batch else torch.tensor(0.7, dtype=F64)
    return kernel


class Model(ApproximateGP):
    """A GP as the documentation of GPyTorch writes it; ``strategy`` makes its strategy."""

    def __init__(self, strategy: Callable[[ApproximateGP], Any], kernel: Kernel, mean: Mean) -> None:
        super().__init__(strategy(self))
        self.mean_module, self.covar_module = mean, kernel

    def forward(self, x: Tensor, shift: float = 0.0) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x + shift), self.covar_module(x + shift))


def some_mean(d: int = 2) -> Mean:
    mean = LinearMean(d).double()
    mean.weights.data, mean.bias.data = draw(d, 1, seed=13), draw(1, seed=14)
    return mean


def make(
    points: Tensor | None = None,
    q: Any = None,
    kernel: Kernel | None = None,
    mean: Mean | None = None,
    jitter: float | None = 0.0,
    **kwargs: Any,
) -> Model:
    """A model in float64 that is ready to be called, on distinct points and without jitter."""
    points = draw(M, 2, seed=9) if points is None else points
    q = some_q(points.shape[-2]) if q is None else q
    strategy = lambda model: DecoupledSGPAVariationalStrategy(model, points, q, jitter=jitter, **kwargs)  # noqa: E731
    model = Model(strategy, kernel or some_kernel(), mean or some_mean())
    model.variational_strategy.variational_params_initialized.fill_(1)
    return model


def own_points(**kwargs: Any) -> dict[str, Any]:
    return {"mean_points": draw(N, 2, seed=7), "mean_coefficients": draw(N, seed=8)} | kwargs


def raw_variance(posterior: MultivariateNormal) -> Tensor:
    """The variance as it was computed; ``posterior.variance`` hides what is very small."""
    return posterior.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)


def assert_same(mine: MultivariateNormal, other: MultivariateNormal, tolerance: float, full: bool = True) -> None:
    close(mine.mean, other.mean, tolerance)
    close(raw_variance(mine), raw_variance(other), tolerance)
    if full:
        close(mine.covariance_matrix, other.covariance_matrix, tolerance)


# The oracle: an SVGP on the union of the points, dense and unwhitened


@dataclass
class Union:
    """q(u) on inducing points and mean points together, and what follows."""

    model: Model
    points: Tensor
    coefficients: Tensor
    form: str

    def __post_init__(self) -> None:
        q = self.model.variational_strategy._variational_distribution()
        m = q.mean.detach().numpy()
        S = q.covariance_matrix.detach().numpy() if isinstance(q, MultivariateNormal) else np.zeros((len(m), len(m)))
        self.inducing = self.model.variational_strategy.inducing_points.detach()
        self.both = torch.cat([self.inducing, self.points])
        size, v = len(self.inducing), self.coefficients.detach().numpy()
        K = self.K = self.k(self.both, self.both)
        L = np.linalg.cholesky(K[:size, :size])
        gain = np.linalg.solve(K[:size, :size], K[:size]).T  # K_ug K_gg^-1
        conditional = K - gain @ K[:size]
        u_mean = L @ m
        if self.form == "cheng_boots":
            u_mean = u_mean + K[:size, size:] @ v
        self.mean = gain @ u_mean + conditional[:, size:] @ v
        self.covariance = conditional + gain @ (L @ S @ L.T) @ gain.T

    def k(self, a: Tensor, b: Tensor) -> Array:
        return self.model.covar_module(a, b).to_dense().detach().numpy()

    def posterior(self, x: Tensor) -> tuple[Array, Array]:
        gain = np.linalg.solve(self.K, self.k(self.both, x)).T
        mean = self.model.mean_module(x).detach().numpy() + gain @ self.mean
        return mean, self.k(x, x) - gain @ (self.K - self.covariance) @ gain.T

    def kl(self) -> float:
        return dense_kl(self.mean, self.covariance, self.K)


def dense_kl(mean: Array, covariance: Array, prior: Array) -> float:
    trace = np.trace(np.linalg.solve(prior, covariance)) + mean @ np.linalg.solve(prior, mean) - len(mean)
    return 0.5 * (trace + np.linalg.slogdet(prior)[1] - np.linalg.slogdet(covariance)[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("sizes", [(M, N), (1, 1), (1, 6), (5, 1)], ids=str)
def test_equals_the_svgp_on_the_union(form: str, kind: str, sizes: tuple[int, int]) -> None:
    num, many = sizes
    x = draw(7, 2, seed=3)
    points, coefficients = draw(many, 2, seed=7), draw(many, seed=8)
    q = some_q(num, kind=kind)
    own = make(draw(num, 2, seed=9), q, mean_points=points, mean_coefficients=coefficients, form=form)
    per_call = make(draw(num, 2, seed=9), q, form=form)
    oracle = Union(own, points, coefficients, form)
    mean, covariance = oracle.posterior(x)
    for model, arguments in (
        (own, {}),
        (per_call, {"mean_points": points, "mean_coefficients": coefficients}),
        (own, {"mean_coefficients": coefficients}),
    ):
        strategy = model.variational_strategy
        for mode in (True, False):
            posterior = model.train(mode)(x, **arguments)
            close(posterior.mean, mean, 1e-10)
            close(raw_variance(posterior), covariance.diagonal(), 1e-10)
            close(model(x, diag=False, **arguments).covariance_matrix, covariance, 1e-10)
            if kind != "delta":
                assert strategy.kl_divergence().item() == pytest.approx(oracle.kl(), abs=1e-10, rel=1e-10)
            close(strategy.kl_divergence(), strategy.kl_global() + strategy.kl_amortised(), 1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_equals_stock_on_the_union(form: str) -> None:
    """The same with GPyTorch's whitened strategy as the judge."""
    model = make(**own_points(form=form))
    union = Union(model, draw(N, 2, seed=7), draw(N, seed=8), form)
    L = np.linalg.cholesky(union.K)
    whitened = np.linalg.solve(L, np.linalg.solve(L, union.covariance).T)
    q = CholeskyVariationalDistribution(M + N).double()
    q.variational_mean.data = torch.from_numpy(np.linalg.solve(L, union.mean))
    q.chol_variational_covar.data = torch.linalg.cholesky(torch.from_numpy(whitened))
    stock = Model(
        lambda m: VariationalStrategy(m, union.both, q, jitter_val=1e-14), model.covar_module, model.mean_module
    )
    stock.variational_strategy.variational_params_initialized.fill_(1)
    x = draw(20, 2, seed=3)
    for mode in (True, False):
        assert_same(model.train(mode)(x), stock.train(mode)(x), 1e-10, full=not mode)
        close(model.variational_strategy.kl_divergence(), stock.variational_strategy.kl_divergence(), 1e-10)


@given(st.integers(0, 10**6), st.sampled_from(FORMS))
def test_any_points_and_coefficients(seed: int, form: str) -> None:
    """Close points and large coefficients too; the jitter is one noise in every formula, so the KL stays one."""
    model = make(draw(M, 2, seed=seed), jitter=None, form=form)
    points, values = draw(N, 2, seed=seed + 1), 3 * draw(N, seed=seed + 2)
    x = draw(5, 2, seed=seed + 3)
    posterior = model.eval()(x, mean_points=points, mean_coefficients=values)
    strategy = model.variational_strategy
    kl, own, amortised = strategy.kl_divergence(), strategy.kl_global(), strategy.kl_amortised()
    assert own >= 0 and kl >= 0 and torch.equal(kl, own + amortised)
    assert form == "cheng_boots" or amortised >= -1e-9 * (1 + kl)
    assert torch.linalg.eigvalsh(posterior.covariance_matrix).min() > -1e-8
    # q is a distribution over functions: its divergence seen at any inputs is below that of the whole.
    prior = model(x, prior=True)
    seen = torch.distributions.kl_divergence(
        *(
            torch.distributions.MultivariateNormal(p.mean, p.covariance_matrix + 1e-9 * torch.eye(5, dtype=F64))
            for p in (posterior, prior)
        )
    )
    assert seen <= kl * (1 + 1e-4) + 1e-4


# Limit cases


@pytest.mark.parametrize("form", FORMS)
def test_nothing_learnt_is_the_prior(form: str) -> None:
    q = CholeskyVariationalDistribution(M, mean_init_std=0.0).double()
    model = make(q=q, mean_points=draw(N, 2, seed=7), form=form).eval()
    x = draw(7, 2, seed=3)
    assert_same(model(x), model(x, prior=True), 1e-12)
    assert model.variational_strategy.kl_divergence().abs() < 1e-15


def test_mean_points_at_the_inducing_points_drop_out() -> None:
    """C vanishes there: what is left is standard SGPA on the inducing points."""
    model, x = make().eval(), draw(7, 2, seed=3)
    plain = model(x)
    points = model.variational_strategy.inducing_points.detach()
    assert_same(model(x, mean_points=points, mean_coefficients=draw(M, seed=5)), plain, 1e-12)
    assert model.variational_strategy.kl_amortised().abs() < 1e-12


def test_a_point_mass_has_no_variance_at_the_inducing_points() -> None:
    q = CholeskyVariationalDistribution(M).double()
    q.chol_variational_covar.data.mul_(1e-9)
    model = make(q=q, **own_points()).eval()
    assert raw_variance(model(model.variational_strategy.inducing_points)).abs().max() < 1e-12


def test_at_the_inducing_points_the_mean_is_their_own() -> None:
    """K_gg v_g plus the mean function, whatever the mean points say."""
    model, v_g = make(**own_points()).eval(), draw(M, seed=5)
    points = model.variational_strategy.inducing_points
    gram = model.covar_module(points).to_dense()
    q = model.variational_strategy._variational_distribution
    q.variational_mean.data = (torch.linalg.cholesky(gram).mT @ v_g).detach()
    close(model(points).mean, gram @ v_g + model.mean_module(points), 1e-12)


def test_without_inducing_mean_the_cheng_boots_form_is_kernel_attention() -> None:
    model, x, keys, values = make(form="cheng_boots").eval(), draw(7, 2, seed=3), draw(6, 2), draw(6, seed=1)
    model.variational_strategy._variational_distribution.variational_mean.data.zero_()
    posterior = model(x, mean_points=keys, mean_coefficients=values)
    close(posterior.mean, model.mean_module(x) + model.covar_module(x, keys).to_dense() @ values, 1e-13)
    norm = 0.5 * values @ model.covar_module(keys).to_dense() @ values
    close(model.variational_strategy.kl_amortised(), norm, 1e-13)


def test_far_inducing_points_leave_plain_kernel_attention() -> None:
    """What M = 0 would be: mean K_xa v_a, prior variance, half the squared RKHS norm."""
    q = CholeskyVariationalDistribution(1, mean_init_std=0.0).double()
    model = make(torch.full((1, 2), 1e3, dtype=F64), q, **own_points()).eval()
    x, keys, values = draw(7, 2, seed=3), draw(N, 2, seed=7), draw(N, seed=8)
    close(model(x).mean, model.mean_module(x) + model.covar_module(x, keys).to_dense() @ values, 1e-13)
    close(model(x).covariance_matrix, model.covar_module(x).to_dense(), 1e-13)
    norm = 0.5 * values @ model.covar_module(keys).to_dense() @ values
    close(model.variational_strategy.kl_divergence(), norm, 1e-13)


@dataclass
class Regression:
    """Data of a GP with known hyperparameters, and what exact algebra says of them."""

    x: Tensor
    y: Tensor
    kernel: Kernel
    noise: float = 0.3

    def __post_init__(self) -> None:
        self.gram = self.kernel(self.x).to_dense().detach()
        self.noisy = self.gram + self.noise * torch.eye(len(self.x), dtype=F64)
        self.weights = torch.linalg.solve(self.noisy, self.y)

    def evidence(self) -> float:
        zeros = torch.zeros(len(self.y), dtype=F64)
        return torch.distributions.MultivariateNormal(zeros, self.noisy).log_prob(self.y).item()

    def titsias(self, points: Tensor) -> float:
        """The collapsed bound."""
        low = self.low_rank(points)
        zeros, eye = torch.zeros(len(self.y), dtype=F64), torch.eye(len(self.y), dtype=F64)
        fit = torch.distributions.MultivariateNormal(zeros, low + self.noise * eye).log_prob(self.y)
        return (fit - 0.5 * (self.gram - low).trace() / self.noise).item()

    def features(self, points: Tensor) -> Tensor:
        gram = self.kernel(points).to_dense().detach()
        return torch.linalg.solve(torch.linalg.cholesky(gram), self.kernel(points, self.x).to_dense().detach())

    def low_rank(self, points: Tensor) -> Tensor:
        A = self.features(points)
        return A.mT @ A

    def optimal_covariance(self, points: Tensor) -> Tensor:
        A = self.features(points)
        return torch.linalg.inv(torch.eye(len(points), dtype=F64) + A @ A.mT / self.noise)

    def bound(self, model: Model, **arguments: Any) -> float:
        likelihood = GaussianLikelihood().double()
        likelihood.noise = torch.tensor(self.noise, dtype=F64)
        mll = VariationalELBO(likelihood, model.train(), num_data=len(self.y))
        return len(self.y) * mll(model(self.x, **arguments), self.y).item()


def regression(seed: int = 0) -> Regression:
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.5, 1.5
    x = 4 * torch.rand(15, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return Regression(x, torch.sin(3 * x).squeeze(-1) + 0.4 * draw(15, seed=seed), kernel)


@pytest.mark.parametrize("form", FORMS)
def test_all_inputs_as_mean_points_give_the_exact_mean(form: str) -> None:
    """v_a = (K + noise I)^-1 y and the optimal covariance: Titsias' bound < ELBO < log p(y)."""
    data, points = regression(), torch.tensor([[0.5], [1.5], [2.8]], dtype=F64)
    q = CholeskyVariationalDistribution(3).double()
    whitened = data.features(points) @ data.weights  # L' v_g with v_g = K_gg^-1 K_ga v_a
    q.variational_mean.data = whitened if form == "orthogonal" else torch.zeros(3, dtype=F64)
    q.chol_variational_covar.data = torch.linalg.cholesky(data.optimal_covariance(points))
    model = make(points, q, data.kernel, ZeroMean(), mean_points=data.x, mean_coefficients=data.weights, form=form)
    bound = data.bound(model)
    x = torch.linspace(-1, 5, 9, dtype=F64)[:, None]
    close(model.eval()(x).mean, data.kernel(x, data.x).to_dense() @ data.weights, 1e-10)
    assert data.titsias(points) + 0.1 < bound < data.evidence() - 0.1


def test_without_mean_points_the_optimum_is_titsias() -> None:
    data, points = regression(), torch.tensor([[0.5], [1.5], [2.8]], dtype=F64)
    q = CholeskyVariationalDistribution(3).double()
    S = data.optimal_covariance(points)
    q.variational_mean.data = S @ data.features(points) @ data.y / data.noise
    q.chol_variational_covar.data = torch.linalg.cholesky(S)
    model = make(points, q, data.kernel, ZeroMean())
    assert data.bound(model) == pytest.approx(data.titsias(points), abs=1e-10)


def test_inducing_points_at_all_inputs_give_the_evidence() -> None:
    data = regression()
    data.x = 0.4 * torch.arange(15, dtype=F64)[:, None]
    data.__post_init__()
    q = CholeskyVariationalDistribution(15).double()
    S = data.optimal_covariance(data.x)
    q.variational_mean.data = S @ data.features(data.x) @ data.y / data.noise
    q.chol_variational_covar.data = torch.linalg.cholesky(S)
    model = make(data.x, q, data.kernel, ZeroMean(), mean_points=data.x, mean_coefficients=draw(15))
    assert data.bound(model) == pytest.approx(data.evidence(), abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(8))
def test_the_bound_never_exceeds_the_evidence(form: str, seed: int) -> None:
    """Everything is optimised, hyperparameters and both sets of points; the evidence is that of the same moment."""
    data = regression(seed)
    torch.manual_seed(seed)
    q = CholeskyVariationalDistribution(3).double()
    model = make(data.x[:3], q, deepcopy(data.kernel), ZeroMean(), None, mean_points=data.x[3:9], form=form).double()
    likelihood = GaussianLikelihood().double()
    mll = VariationalELBO(likelihood, model.train(), num_data=15)
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.1)
    gaps = []
    for step in range(41):
        optimizer.zero_grad()
        elbo = mll(model(data.x), data.y)
        if step % 8 == 0:
            with torch.no_grad():
                evidence = likelihood(model.forward(data.x)).log_prob(data.y).item()
            gaps.append(evidence - 15 * elbo.item())
        (-elbo).backward()
        optimizer.step()
    assert min(gaps) > 0 and gaps[-1] < 0.5 * gaps[0]


# What is wrong with the strategy of GPyTorch


def stock_and_ours(
    inducing: Tensor, q: Any, kernel: Kernel, points: Tensor, coefficients: Tensor
) -> tuple[Model, Model]:
    """The same points, coefficients and q(u) in GPyTorch's orthogonally decoupled strategy and in this one."""
    mean_q = DeltaVariationalDistribution(len(points)).double()
    mean_q.variational_mean.data = coefficients

    def wrapped(model: ApproximateGP) -> OrthogonallyDecoupledVariationalStrategy:
        base = VariationalStrategy(model, inducing, q, jitter_val=1e-12)
        base.variational_params_initialized.fill_(1)
        return OrthogonallyDecoupledVariationalStrategy(base, points, mean_q, jitter_val=1e-12)

    stock = Model(wrapped, kernel, ZeroMean())
    stock.variational_strategy.variational_params_initialized.fill_(1)
    return stock, make(inducing, q, kernel, ZeroMean(), mean_points=points, mean_coefficients=coefficients)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)[:, None]


def toy_q(mean: list[float], scale_tril: list[list[float]]) -> CholeskyVariationalDistribution:
    q = CholeskyVariationalDistribution(len(mean)).double()
    q.variational_mean.data = torch.tensor(mean, dtype=F64)
    q.chol_variational_covar.data = torch.tensor(scale_tril, dtype=F64)
    return q


# Upstream, in the sparse algebra of stock's predictions.
@pytest.mark.filterwarnings("ignore:TypedStorage is", "ignore:torch.sparse.SparseTensor", "ignore:Sparse inv")
def test_the_divergence_of_the_stock_strategy_is_not_that_of_its_q() -> None:
    """Seen at all points that either family lives on, which is the divergence of the whole process."""
    inducing, points, coefficients = column(0.0, 1.0), column(0.4, 1.7, 2.3), torch.tensor([1.0, -0.7, 0.9]).double()
    kernel, q, both = RBFKernel().double(), toy_q([0.5, -0.4], [[0.9, 0.0], [-0.5, 0.7]]), torch.cat([inducing, points])
    gram = kernel(both).to_dense().detach().numpy()
    means, reported, true = [], [], []
    for model in stock_and_ours(inducing, q, kernel, points, coefficients):
        with torch.no_grad():
            model.train()(both)
            reported.append(model.variational_strategy.kl_divergence().item())
            posterior = model.eval()(both)
            means.append(posterior.mean.numpy())
            true.append(dense_kl(means[-1], posterior.covariance_matrix.numpy(), gram))
    # Stock, then ours.
    assert reported == pytest.approx([0.9408, 0.7164], abs=1e-4)
    assert true == pytest.approx([1.3307, 0.7164], abs=1e-4)
    assert reported[1] == pytest.approx(true[1], abs=1e-9)
    # The mean that the method has: the coefficients meet the prior conditional covariance.
    gain = np.linalg.solve(gram[:2, :2], gram[:2]).T
    u = np.linalg.cholesky(gram[:2, :2]) @ q.variational_mean.detach().numpy()
    expected = gain @ u + (gram - gain @ gram[:2])[:, 2:] @ coefficients.numpy()
    close(means[1], expected, 1e-10)
    assert np.abs(means[0] - expected).max() > 0.1


def test_the_bound_of_the_stock_strategy_exceeds_the_evidence() -> None:
    """One observation, and parameters that the stock bound was maximised to."""
    x, kernel = column(0.0), RBFKernel().double()
    data = Regression(x, torch.tensor([2.5], dtype=F64), kernel, noise=0.4)
    q = toy_q([1.1935, -0.1443], [[0.7803, 0.0], [0.0606, 0.9953]])
    stock, ours = stock_and_ours(column(0.3, 1.5), q, kernel, x, torch.tensor([1.3107], dtype=F64))
    assert data.evidence() == pytest.approx(-3.3193, abs=1e-4)
    assert data.bound(stock) == pytest.approx(-2.9862, abs=1e-4)
    assert data.bound(ours) < data.evidence()


# Shapes


@pytest.mark.parametrize("form", FORMS)
def test_batch_and_head(form: str) -> None:
    """x (B, H, 1, T, d), kernel (H, 1), inducing points (H, 1, M, d), q (H, D): one kernel for all D outputs."""
    B, H, D, T = 2, 2, 3, 5
    inducing, x, points = draw(H, 1, M, 2, seed=9), draw(B, H, 1, T, 2, seed=3), draw(B, H, 1, N, 2, seed=7)
    values = draw(B, H, D, N, seed=8)
    mask = torch.zeros(B, 1, 1, N, dtype=torch.bool)
    mask[1, ..., 2:] = True
    q = some_q(batch=(H, D))
    model = make(inducing, q, some_kernel((H, 1)), form=form)
    arguments = {"mean_points": points, "mean_coefficients": values, "mean_mask": mask}
    for mode in (True, False):
        posterior = model.train(mode)(x, **arguments)
        kl, amortised = model.variational_strategy.kl_divergence(), model.variational_strategy.kl_amortised()
        assert posterior.batch_shape == kl.shape == amortised.shape == (B, H, D)
        assert model.variational_strategy.kl_global().shape == (H, D)
        if not mode:
            samples = posterior.rsample(torch.Size([2]))
            assert samples.shape == (2, B, H, D, T) and posterior.covariance_matrix.shape == (B, H, D, T, T)
        for b, h, d in product(range(B), range(H), range(D)):
            single = some_q()
            single.variational_mean.data = q.variational_mean[h, d].detach()
            single.chol_variational_covar.data = q.chol_variational_covar[h, d].detach()
            kernel = some_kernel()
            kernel.base_kernel.raw_lengthscale.data = model.covar_module.base_kernel.raw_lengthscale[h, 0].detach()
            kernel.raw_outputscale.data = model.covar_module.raw_outputscale[h, 0].detach()
            one = make(inducing[h, 0], single, kernel, form=form).train(mode)
            keep = ~mask[b, 0, 0]
            other = one(x[b, h, 0], mean_points=points[b, h, 0][keep], mean_coefficients=values[b, h, d][keep])
            close(posterior.mean[b, h, d], other.mean, 1e-11)
            close(raw_variance(posterior)[b, h, d], raw_variance(other), 1e-11)
            if not mode:
                close(posterior.covariance_matrix[b, h, d], other.covariance_matrix, 1e-11)
            close(kl[b, h, d], one.variational_strategy.kl_divergence(), 1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rbf", "exponential"])
def test_equals_the_pure_function(form: str, name: str) -> None:
    """One mathematics: `gpseq.sgpa.decoupled_posterior` with v_g = L^-T m, padding included."""
    B, H, D, T = 2, 2, 3, 5
    inducing, tokens = draw(H, M, 2, seed=9), draw(B, H, T, 2, seed=3)
    values, padding = draw(B, H, T, D, seed=8), torch.zeros(B, T, dtype=torch.bool)
    padding[1, 3:] = True
    q, shape = some_q(batch=(H, D)), torch.Size([H, 1])
    base = (RBFKernel if name == "rbf" else ExponentialKernel)(2, batch_shape=shape)
    kernel = ScaleKernel(base, batch_shape=shape).double()
    model = make(inducing[:, None], q, kernel, ZeroMean(), form=form).eval()
    x = tokens[:, :, None]
    arguments = {"mean_coefficients": values.mT, "mean_mask": padding[:, None, None]}
    with torch.no_grad():
        posterior = model(x, mean_points=x, **arguments)
        factor = torch.linalg.cholesky(kernel(inducing[:, None]).to_dense())
        v_g = torch.linalg.solve_triangular(factor.mT, q.variational_mean.unsqueeze(-1), upper=True).squeeze(-1).mT
        expected = decoupled_posterior(
            tokens.clone(),  # a query that is the key would be masked as well
            tokens,
            values,
            inducing,
            v_g,
            q.chol_variational_covar.tril(),
            base.lengthscale[:, 0, 0],
            kernel.outputscale[:, 0],
            kernel=name,
            key_padding_mask=padding,
            form=form,
            jitter=0.0,
            output="full",
        )
        close(posterior.mean.mT, expected.mean, 1e-11)
        close(posterior.covariance_matrix, expected.covariance, 1e-11)
        strategy = model.variational_strategy
        close(strategy.kl_global(), expected.kl_global, 1e-11)
        close(strategy.kl_amortised(), expected.kl_amortised, 1e-11)


BATCHES = [(), (3,), (3, 1)]


@pytest.mark.parametrize(("q_batch", "point_batch", "value_batch"), list(product(BATCHES, BATCHES, BATCHES)), ids=str)
def test_every_batch_shape_is_a_loop(q_batch: Batch, point_batch: Batch, value_batch: Batch) -> None:
    q, x = some_q(batch=q_batch), draw(3, 5, 2, seed=3)
    points, values = draw(*point_batch, N, 2, seed=7), draw(*value_batch, N, seed=8)
    model = make(q=q, mean_points=points, mean_coefficients=values)
    batch = torch.broadcast_shapes(q_batch, point_batch, value_batch)
    for mode in (True, False):
        posterior, kl = model.train(mode)(x), model.variational_strategy.kl_divergence()
        full = torch.broadcast_shapes(batch, (3,))
        assert posterior.batch_shape == full and kl.shape == batch
        covariance = posterior.covariance_matrix
        for index in np.ndindex(*full):
            one = make(
                mean_points=points.expand(*full, N, 2)[index], mean_coefficients=values.expand(*full, N)[index]
            ).train(mode)
            own = one.variational_strategy._variational_distribution
            own.variational_mean.data = q.variational_mean.expand(*full, M)[index].detach()
            own.chol_variational_covar.data = q.chol_variational_covar.expand(*full, M, M)[index].detach()
            other = one(x.expand(*full, 5, 2)[index])
            close(posterior.mean[index], other.mean, 1e-11)
            close(covariance[index], other.covariance_matrix, 1e-11)
            close(kl.expand(full)[index], one.variational_strategy.kl_divergence(), 1e-11)


def test_several_outputs(dtype: torch.dtype) -> None:
    """[batch, head] of attention as one multitask distribution a head, trained by VariationalELBO."""
    B, H, D, T = 2, 2, 3, 6

    def wrapped(model: ApproximateGP) -> IndependentMultitaskVariationalStrategy:
        q = CholeskyVariationalDistribution(M, batch_shape=torch.Size([H, D]))
        base = DecoupledSGPAVariationalStrategy(model, draw(H, 1, M, 2, seed=9), q)
        return IndependentMultitaskVariationalStrategy(base, num_tasks=D)

    model = Model(wrapped, some_kernel((H, 1)), ConstantMean(batch_shape=torch.Size([H, D]))).to(dtype)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=D).to(dtype)
    net = nn.Linear(2, H * D).to(dtype)
    tokens, targets = draw(B, 1, 1, T, 2, seed=3, dtype=dtype), draw(B, H, T, D, seed=4, dtype=dtype)
    mll = VariationalELBO(likelihood, model, num_data=T)
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters(), *net.parameters()], lr=0.05)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        values = net(tokens.squeeze(-3)).mT.reshape(B, H, D, T)
        posterior = model.train()(tokens, mean_points=tokens, mean_coefficients=values)
        assert isinstance(posterior, MultitaskMultivariateNormal)
        assert posterior.batch_shape == (B, H) and posterior.event_shape == (T, D)
        elbo = mll(posterior, targets)
        assert elbo.shape == (B, H) and elbo.dtype == dtype
        (-elbo.sum()).backward()
        optimizer.step()
        history.append(elbo.sum().item())
    assert history[-1] > history[0] + 1
    base = model.variational_strategy.base_variational_strategy
    with torch.no_grad():
        posterior = model.eval()(tokens, mean_points=tokens, mean_coefficients=values)
        alone = base(tokens, mean_points=tokens, mean_coefficients=values)
        close(posterior.mean, alone.mean.mT, 1e-6)
        close(posterior.variance, alone.variance.mT, 1e-6)
        kl = model.variational_strategy.kl_divergence()
        close(kl, base.kl_global().sum(-1) + base.kl_amortised().sum(-1), 1e-6)
    assert likelihood(posterior).log_prob(targets).shape == (B, H)


# Masks


@pytest.mark.parametrize("form", FORMS)
def test_masked_mean_points_are_removed(form: str) -> None:
    mask = torch.tensor([False, True, False, True, False])
    points, values, x = draw(5, 2, seed=7), draw(5, seed=8), draw(7, 2, seed=3)
    model = make(form=form)
    for mode in (True, False):
        expected = model.train(mode)(x, mean_points=points[~mask], mean_coefficients=values[~mask])
        kl = model.variational_strategy.kl_divergence()
        dirty, rubbish = points.clone(), values.clone()
        dirty[mask], rubbish[mask] = torch.nan, torch.inf
        dirty.requires_grad_()
        got = model(x, mean_points=dirty, mean_coefficients=rubbish, mean_mask=mask)
        assert_same(got, expected, 1e-13, full=not mode)
        close(model.variational_strategy.kl_divergence(), kl, 1e-13)
        (got.mean.sum() + model.variational_strategy.kl_divergence()).backward()
        assert dirty.grad.isfinite().all() and (dirty.grad[mask] == 0).all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("form", FORMS)
def test_all_masked_is_no_mean_points_at_all(form: str) -> None:
    model, x = make(form=form).eval(), draw(7, 2, seed=3)
    plain = model(x)
    kl = model.variational_strategy.kl_divergence()
    nothing = torch.full((N, 2), torch.nan, dtype=F64)
    masked = model(x, mean_points=nothing, mean_coefficients=nothing[:, 0], mean_mask=torch.ones(N, dtype=torch.bool))
    assert_same(masked, plain, 1e-14)
    close(model.variational_strategy.kl_divergence(), kl, 1e-14)


def test_a_mask_with_more_rows_than_the_points(dtype: torch.dtype) -> None:
    """Own points serve all rows of a mask; each row leaves out its own."""
    model, x = make(**own_points()).to(dtype).eval(), draw(7, 2, seed=3, dtype=dtype)
    mask = torch.tensor([[True, False, False, True], [False, False, False, False]])
    both = model(x, mean_mask=mask)
    kl = model.variational_strategy.kl_divergence()
    assert both.batch_shape == kl.shape == (2,)
    for row in range(2):
        one = model(x, mean_mask=mask[row])
        close(both.mean[row], one.mean, 1e-6)
        close(kl[row], model.variational_strategy.kl_divergence(), 1e-6)


# In the hands of a user


def test_deep_kernels_and_keywords(dtype: torch.dtype) -> None:
    """A network inside forward: all points pass through it, gradients reach it, keywords arrive."""
    torch.manual_seed(0)

    class Deep(Model):
        def __init__(self) -> None:
            strategy = lambda m: DecoupledSGPAVariationalStrategy(m, draw(M, 2), some_q(), draw(N, 2, seed=1))  # noqa: E731
            super().__init__(strategy, some_kernel(d=3), some_mean(3))
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x: Tensor, shift: float = 0.0) -> MultivariateNormal:
            return super().forward(self.net(x + shift))

    model = Deep().to(dtype)
    model.variational_strategy.mean_coefficients.data = draw(N, seed=8, dtype=dtype)
    exact, x = deepcopy(model).double(), draw(7, 2, seed=3, dtype=dtype)
    for mode in (True, False):
        for m, inputs in ((model.train(mode), x), (exact.train(mode), x.double())):
            m.zero_grad()
            posterior = m(inputs, shift=0.3)
            (posterior.mean.sum() + raw_variance(posterior).sum() + m.variational_strategy.kl_divergence()).backward()
        mine, other = model(x, shift=0.3), exact(x.double(), shift=0.3)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert_same(mine, other, tolerance, full=not mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(model(x, shift=0.3), other, tolerance, full=not mode)
            close(model.variational_strategy.kl_divergence(), exact.variational_strategy.kl_divergence(), tolerance)
        for p, expected in zip(model.parameters(), exact.parameters(), strict=True):
            assert p.grad.dtype == dtype
            close(p.grad, expected.grad, 10 * tolerance)
        assert not torch.allclose(mine.mean, model(x).mean)
    close(model(x, prior=True, shift=0.3, mean_mask=None).mean, model.forward(x, shift=0.3).mean, 1e-7)


@pytest.mark.parametrize("many", [N, M + N, 7, 8])
@pytest.mark.parametrize(
    "kernel",
    [
        lambda: ExponentialKernel(2),
        lambda: ScaleKernel(LinearKernel()) + RBFKernel(),
        lambda: LinearKernel() * RBFKernel(),
    ],
    ids=["exponential", "sum", "product"],
)
def test_any_kernel_in_self_attention(kernel: Callable[[], Kernel], many: int) -> None:
    """The inputs are the mean points, where some lazy kernels factor the matrix if they may."""
    x, values = draw(many, 2, seed=3), draw(many, seed=8)
    model = make(kernel=kernel().double(), jitter=0.0)
    union = Union(model, x, values, "orthogonal")
    L = np.linalg.cholesky(union.K[:M, :M])
    A = np.linalg.solve(L, union.K[:M, M:])
    q = model.variational_strategy._variational_distribution()
    conditional = union.K[M:, M:] - A.T @ A
    mean = model.mean_module(x).detach().numpy() + conditional @ values.numpy() + A.T @ q.mean.detach().numpy()
    covariance = conditional + A.T @ q.covariance_matrix.detach().numpy() @ A
    for mode in (True, False):
        posterior = model.train(mode)(x, mean_points=x, mean_coefficients=values)
        close(posterior.mean, mean, 1e-9)
        close(raw_variance(posterior), covariance.diagonal(), 1e-9)
        kl = 0.5 * values.numpy() @ conditional @ values.numpy()
        close(model.variational_strategy.kl_amortised(), kl, 1e-9)


def test_learns(dtype: torch.dtype) -> None:
    """In float32 as in float64; more mean points than the covariance has."""
    x = torch.linspace(0, 6, 60, dtype=dtype)
    y = torch.sin(2 * x) + 0.1 * draw(60, dtype=dtype)
    for form in FORMS:
        q = CholeskyVariationalDistribution(4)
        strategy = lambda m: DecoupledSGPAVariationalStrategy(m, x[7::15], q, mean_points=x[::4], form=form)  # noqa: B023, E731
        model = Model(strategy, ScaleKernel(RBFKernel()), ConstantMean()).to(dtype)
        likelihood = GaussianLikelihood().to(dtype)
        mll = VariationalELBO(likelihood, model.train(), num_data=60)
        optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.1)
        for _ in range(70):
            optimizer.zero_grad()
            loss = -mll(model(x), y)
            loss.backward()
            optimizer.step()
        assert (model.eval()(x).mean - torch.sin(2 * x)).square().mean().sqrt() < 0.15


def test_gradients_equal_those_of_the_union() -> None:
    """Autograd through the dense formula is the oracle; inputs, points, coefficients, kernel and q."""
    for form in FORMS:
        model, x = make(**own_points(form=form)), draw(5, 2, seed=3).requires_grad_()
        strategy = model.variational_strategy
        posterior = model.train()(x)
        (posterior.mean.sin().sum() + raw_variance(posterior).sin().sum() + strategy.kl_divergence()).backward()
        got = {name: p.grad.clone() for name, p in model.named_parameters()} | {"x": x.grad.clone()}
        model.zero_grad()
        x.grad = None
        g, a, v = strategy.inducing_points, strategy.mean_points, strategy.mean_coefficients
        q = strategy._variational_distribution
        m, R = q.variational_mean, q.chol_variational_covar.tril()
        k = lambda p, r: model.covar_module(p, r).to_dense()  # noqa: E731, B023
        L = torch.linalg.cholesky(k(g, g))
        v_g = torch.linalg.solve(L.mT, m) - (0 if form == "orthogonal" else -torch.linalg.solve(k(g, g), k(g, a) @ v))
        C = lambda p, r: k(p, r) - k(p, g) @ torch.linalg.solve(k(g, g), k(g, r))  # noqa: E731, B023
        mean = model.mean_module(x) + C(x, a) @ v + k(x, g) @ v_g
        A = torch.linalg.solve(L, k(g, x))
        variance = (C(x, x) + A.mT @ R @ R.mT @ A).diagonal()
        kl = 0.5 * (R.square().sum() + v_g @ k(g, g) @ v_g - M) - R.diagonal().abs().log().sum() + 0.5 * v @ C(a, a) @ v
        (mean.sin().sum() + variance.sin().sum() + kl).backward()
        for name, gradient in got.items():
            close(gradient, x.grad if name == "x" else dict(model.named_parameters())[name].grad, 1e-9)


def test_functional_call_and_grad() -> None:
    x, y = draw(6, 2, seed=3), draw(6, seed=4)
    # GPyTorch's RBF kernel uses a function of its own, which functorch refuses; this one does not.
    model = make(kernel=ScaleKernel(ExponentialKernel(2)).double(), **own_points()).train()
    mll = VariationalELBO(GaussianLikelihood().double(), model, num_data=6)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return -mll(self.model(x), y)

    loss = Loss()
    parameters = {name: p.detach().clone() for name, p in loss.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(loss, p, ()))(parameters)
    loss().backward()
    for name, parameter in loss.named_parameters():
        close(gradients[name], parameter.grad, 1e-11)


def test_float32_is_rounded_float64() -> None:
    low = make(**own_points()).float()
    exact, x = deepcopy(low).double(), draw(7, 2, seed=3, dtype=torch.float32)
    for mode in (True, False):
        mine, kl = low.train(mode)(x), low.variational_strategy.kl_divergence()
        assert mine.mean.dtype == raw_variance(mine).dtype == kl.dtype == torch.float32
        assert_same(mine, exact.train(mode)(x.double()), 1e-6)
        close(kl, exact.variational_strategy.kl_divergence(), 1e-6)
    assert low(x.double()).covariance_matrix.dtype == F64


@pytest.mark.parametrize("per_call", [False, True])
def test_nothing_is_cached(per_call: bool) -> None:
    arguments = {"mean_points": draw(N, 2, seed=7), "mean_coefficients": draw(N, seed=8)}
    model, x = make(**({} if per_call else arguments)).eval(), draw(7, 2, seed=3)
    arguments = arguments if per_call else {}
    strategy, kernel = model.variational_strategy, model.covar_module
    gradients = []
    for _ in range(2):
        model.zero_grad()
        posterior = model(x, **arguments)
        for _ in range(2):
            strategy.kl_divergence().backward()
        (posterior.mean.sum() + posterior.covariance_matrix.sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
    changes = [
        lambda: setattr(kernel.base_kernel, "lengthscale", 0.4),
        lambda: strategy._variational_distribution.variational_mean.data.add_(1.0),
        lambda: strategy._variational_distribution.chol_variational_covar.data.mul_(0.5),
        lambda: strategy.inducing_points.data.add_(0.3),
    ]
    for change in changes:
        before, kl = model(x, **arguments), strategy.kl_divergence()
        change()
        after_change = strategy.kl_divergence()
        now = model(x, **arguments)
        assert not torch.allclose(now.covariance_matrix + now.mean, before.covariance_matrix + before.mean)
        assert not torch.allclose(after_change, kl) and torch.equal(strategy.kl_divergence(), after_change)
        assert_same(now, deepcopy(model)(x, **arguments), 1e-15)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_gradients_after_a_call_without(guard: Callable) -> None:
    model, x = make(**own_points()).eval(), draw(7, 2, seed=3)
    with guard():
        assert not model(x).mean.requires_grad and not model.variational_strategy.kl_divergence().requires_grad
    model(x).mean.sum().backward()
    model.variational_strategy.kl_divergence().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_kl_is_that_of_the_last_call() -> None:
    model, x = make(), draw(7, 2, seed=3)
    strategy = model.variational_strategy
    with pytest.raises(RuntimeError, match=r"mean points come with each call, and there was none"):
        strategy.kl_divergence()
    assert strategy.kl_global() > 0
    kls = []
    for seed in range(2):
        model(x, mean_points=draw(N, 2, seed=7), mean_coefficients=draw(N, seed=seed))
        kls.append(strategy.kl_divergence())
    assert not torch.allclose(*kls)
    model(x)
    close(strategy.kl_divergence(), strategy.kl_global(), 1e-15)
    strategy._clear_cache()
    with pytest.raises(RuntimeError, match="there was none"):
        strategy.kl_amortised()
    # A strategy with points of its own does not fall back to them.
    for brought in (
        {"mean_points": draw(N, 2, seed=7), "mean_coefficients": draw(N)},
        {"mean_coefficients": draw(N, seed=5)},
        {"mean_mask": torch.arange(N) == 0},
        {"shift": 0.5},
    ):
        model = make(**own_points()).train()
        strategy = model.variational_strategy
        own = strategy.kl_divergence()
        model(x, **brought)
        strategy.kl_divergence()
        model.eval()
        for ask in (strategy.kl_divergence, strategy.kl_amortised):
            with pytest.raises(RuntimeError, match="last call brought arguments of its own, and they are forgotten"):
                ask()
        model(x)
        model.train()
        close(strategy.kl_divergence(), own, 1e-15)
    # Points of its own need no call.
    own = make(**own_points()).variational_strategy
    assert own.kl_amortised() > 0


def test_amortised_points_train_their_encoder() -> None:
    """The divergence sends gradients through the points and coefficients of the call."""
    model, x = make(), draw(7, 2, seed=3)
    encoder = nn.Linear(2, 3).double()
    hidden = encoder(draw(N, 2, seed=5))
    model(x, mean_points=hidden[:, :2], mean_coefficients=hidden[:, 2])
    model.variational_strategy.kl_divergence().backward()
    assert (encoder.weight.grad != 0).all() and model.variational_strategy.inducing_points.grad.abs().max() > 0


def test_copies_and_files() -> None:
    model, x = make(**own_points()).eval(), draw(7, 2, seed=3)
    model(x, mean_coefficients=draw(N, seed=1).requires_grad_().sin())  # hangs on a graph
    copies = [deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected, kl = model(x), model.variational_strategy.kl_divergence()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    zeros = {"mean_points": torch.zeros(N, 2), "mean_coefficients": torch.zeros(N)}
    loaded = make(
        torch.zeros(M, 2), CholeskyVariationalDistribution(M), ScaleKernel(RBFKernel(2)), LinearMean(2), **zeros
    )
    loaded.double().load_state_dict(torch.load(buffer))
    names = set(model.variational_strategy.state_dict())
    assert names == {
        "inducing_points",
        "mean_points",
        "mean_coefficients",
        "variational_params_initialized",
        "_variational_distribution.variational_mean",
        "_variational_distribution.chol_variational_covar",
    }
    for other in (*copies, loaded.eval()):
        assert other.variational_strategy.model is other
        assert_same(other(x), expected, 1e-14)
        close(other.variational_strategy.kl_divergence(), kl, 1e-14)
        with torch.no_grad():
            other.variational_strategy.mean_coefficients.zero_()
        assert not torch.allclose(other(x).mean, model(x).mean)


def test_a_stock_state_dict_loads() -> None:
    """Inducing points and q have GPyTorch's names; the mean points start from nothing."""
    x = draw(7, 2, seed=3)
    stock = Model(lambda m: VariationalStrategy(m, draw(M, 2), some_q(), jitter_val=1e-14), some_kernel(), some_mean())
    stock.variational_strategy.variational_params_initialized.fill_(1)
    ours = make()
    ours.load_state_dict(stock.state_dict())
    assert_same(ours.eval()(x), stock.eval()(x), 1e-12)


def test_the_first_call_sets_q_to_the_prior_and_never_again() -> None:
    q = CholeskyVariationalDistribution(M, mean_init_std=0.0).double()
    model, x = make(q=q), draw(7, 2, seed=3)
    model.variational_strategy.variational_params_initialized.fill_(0)
    q.chol_variational_covar.data.mul_(3.0)
    assert_same(model.eval()(x), model(x, prior=True), 1e-12)
    q.variational_mean.data.fill_(1.0)
    assert not torch.allclose(model(x).mean, model(x, prior=True).mean)
    model.variational_strategy.variational_params_initialized.fill_(0)  # not read again, which would cost a device sync
    assert not torch.allclose(model(x).mean, model(x, prior=True).mean)


def test_fixed_locations_are_buffers() -> None:
    strategy = make(**own_points(learn_inducing_locations=False)).variational_strategy
    names = {name for name, _ in strategy.named_parameters() if not name.startswith("_")}
    assert names == {"mean_coefficients"}
    assert {"inducing_points", "mean_points"} <= {name for name, _ in strategy.named_buffers()}


def test_variances_of_many_points_never_need_all_pairs() -> None:
    """30,000 inputs: their covariance matrix would take 7 GB."""
    model = make(**own_points())
    x = draw(30_000, 2, seed=3)
    with torch.no_grad():
        for mode in (True, False):
            posterior = model.train(mode)(x)
            close(raw_variance(posterior)[:5], raw_variance(model(x[:5])), 1e-10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": torch.zeros(4, 3)}, ValueError, r"x: expected at least one point.*2\), got shape \(4, 3\)"),
        ({"inputs": torch.zeros(0, 2)}, ValueError, r"x: expected at least one point"),
        ({"inputs": torch.zeros(4, 2).long()}, TypeError, r"x: expected a floating-point tensor, got torch.int64"),
        ({"inputs": torch.full((4, 2), torch.nan)}, ValueError, r"x: expected finite numbers"),
        ({"inputs": torch.zeros(2, 4, 2)}, ValueError, r"x: expected batch shapes that broadcast, got x \(2,\)"),
        ({"mean_coefficients": None}, ValueError, r"mean_coefficients: expected those of the given mean_points"),
        ({"mean_points": None}, ValueError, r"mean_points: expected points for the given mean_coefficients"),
        ({"mean_points": None, "mean_coefficients": None, "mean_mask": torch.ones(N) > 0}, ValueError, r"mean_mask"),
        ({"mean_points": torch.zeros(N, 3)}, ValueError, r"mean_points: expected .*2\), got shape \(4, 3\)"),
        ({"mean_points": torch.zeros(0, 2)}, ValueError, r"mean_points: expected at least one point"),
        ({"mean_points": torch.full((N, 2), torch.nan)}, ValueError, r"mean_points: expected finite numbers"),
        ({"mean_points": "all"}, TypeError, r"mean_points: expected a floating-point tensor, got str"),
        ({"mean_coefficients": torch.zeros(5)}, ValueError, r"mean_coefficients: .*4\), one a point, got shape \(5,\)"),
        ({"mean_coefficients": torch.tensor(1.0)}, ValueError, r"mean_coefficients: .*got shape \(\)"),
        ({"mean_coefficients": torch.zeros(7, N)}, ValueError, r"mean_coefficients \(7,\)"),
        ({"mean_coefficients": torch.full((N,), torch.inf)}, ValueError, r"mean_coefficients: expected finite"),
        ({"mean_mask": torch.zeros(N)}, TypeError, r"mean_mask: expected a boolean tensor.*got torch.float32"),
        ({"mean_mask": torch.zeros(3, dtype=torch.bool)}, ValueError, r"mean_mask: .*got shape \(3,\)"),
        ({"mean_mask": torch.zeros(7, N, dtype=torch.bool)}, ValueError, r"mean_mask|mean_coefficients \(7,\)"),
    ],
)
def test_bad_calls_are_named_and_change_nothing(arguments: dict, error: type[Exception], message: str) -> None:
    model = make(q=some_q(batch=(3,)))
    good = {"inputs": draw(4, 2), "mean_points": draw(N, 2), "mean_coefficients": draw(N)}
    model(**good)
    kl, state = model.variational_strategy.kl_divergence(), deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model(**(good | arguments))
    assert torch.equal(model.variational_strategy.kl_divergence(), kl)
    assert all(torch.equal(v, state[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"points": torch.zeros(0, 2)}, ValueError, r"inducing_points: expected at least one point"),
        ({"q": CholeskyVariationalDistribution(5)}, ValueError, r"variational_distribution: .*3 numbers.*got 5"),
        ({"q": "cholesky"}, TypeError, r"variational_distribution: expected"),
        ({"learn_inducing_locations": "no"}, TypeError, r"learn_inducing_locations: expected True or False, got 'no'"),
        ({"form": "both"}, ValueError, r"form: expected one of .*got 'both'"),
        ({"jitter": 2.0}, ValueError, r"jitter: "),
        ({"mean_coefficients": torch.zeros(N)}, ValueError, r"mean_points: expected the points of the given"),
        ({"mean_points": torch.zeros(N, 3)}, ValueError, r"mean_points: expected .*2\), got shape \(4, 3\)"),
        (own_points(mean_coefficients=torch.zeros(3)), ValueError, r"mean_coefficients: .*4\).*got shape \(3,\)"),
        (own_points(mean_points=torch.full((N, 2), torch.nan)), ValueError, r"mean_points: expected finite"),
        (
            {"q": some_q(batch=(2,)), "mean_points": torch.zeros(3, N, 2)},
            ValueError,
            r"mean_points: expected batch shapes that broadcast, got mean_points \(3,\)",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**arguments)


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a GPyTorch model, got str"):
        DecoupledSGPAVariationalStrategy("m", draw(M, 2), some_q())


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form: str, dtype: torch.dtype) -> None:
    model, x = make(**own_points(form=form)).to(dtype), draw(7, 2, seed=3, dtype=dtype)
    other, mask = deepcopy(model).cuda(), torch.tensor([False, True, False, False])
    tolerance = 1e-10 if dtype == F64 else 1e-5
    for mode in (True, False):
        expected, kl = model.train(mode)(x, mean_mask=mask), model.variational_strategy.kl_divergence()
        mine = other.train(mode)(x.cuda(), mean_mask=mask.cuda())
        close(mine.mean.cpu(), expected.mean, tolerance)
        close(raw_variance(mine).cpu(), raw_variance(expected), tolerance)
        close(other.variational_strategy.kl_divergence().cpu(), kl, tolerance)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            close(other(x.cuda(), mean_mask=mask.cuda()).mean.cpu(), expected.mean, tolerance)
    assert math.isfinite(other.variational_strategy.kl_divergence().item())
