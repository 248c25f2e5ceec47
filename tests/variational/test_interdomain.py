"""InterdomainVariationalStrategy against stock GPyTorch, against dense oracles, and in the hands of a user."""

import io
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise, product
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.distributions import Delta, MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean, LinearMean, Mean, ZeroMean
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    DeltaVariationalDistribution,
    IndependentMultitaskVariationalStrategy,
    LMCVariationalStrategy,
    MeanFieldVariationalDistribution,
    NaturalVariationalDistribution,
    TrilNaturalVariationalDistribution,
    VariationalStrategy,
)
from linear_operator.operators import DiagLinearOperator, MatmulLinearOperator
from linear_operator.utils.errors import NotPSDError
from torch import Tensor, nn

from gpseq.features import HippoFeatures, InducingFeatures, InducingPoints
from gpseq.variational import InterdomainVariationalStrategy
from tests import oracles
from tests.oracles import Line, close

F64 = torch.float64
BATCHES = [(), (3,), (3, 1)]
Batch = tuple[int, ...]

DISTRIBUTIONS = {
    "cholesky": CholeskyVariationalDistribution,
    "mean field": MeanFieldVariationalDistribution,
    "natural": NaturalVariationalDistribution,
    "tril natural": TrilNaturalVariationalDistribution,
    "delta": DeltaVariationalDistribution,
}


class Model(ApproximateGP):
    """A GP as the documentation of GPyTorch writes it; ``strategy`` makes its strategy."""

    def __init__(
        self, strategy: Callable[[ApproximateGP], Any], kernel: Kernel | None = None, mean: Mean | None = None
    ) -> None:
        super().__init__(strategy(self))
        self.mean_module = ConstantMean() if mean is None else mean
        self.covar_module = ScaleKernel(RBFKernel()) if kernel is None else kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def interdomain(features: InducingFeatures, q: Any, jitter: float | None = None) -> Callable:
    return lambda model: InterdomainVariationalStrategy(model, features, q, jitter)


def stock(points: Tensor, q: Any, jitter: float) -> Callable:
    return lambda model: VariationalStrategy(model, points, q, learn_inducing_locations=False, jitter_val=jitter)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def some_q(kind: str, size: int, batch: Batch = (), dtype: torch.dtype = F64, spread: float = 0.5) -> Any:
    """A q(v) of this kind that is neither the prior nor symmetric in anything."""
    q = DISTRIBUTIONS[kind](size, batch_shape=torch.Size(batch), mean_init_std=0.0).to(dtype)
    root = spread * (draw(*batch, size, size, seed=1) / math.sqrt(size) + torch.eye(size, dtype=F64))
    moments = MultivariateNormal(draw(*batch, size, seed=2).to(dtype), (root @ root.mT).to(dtype))
    q.initialize_variational_distribution(moments)
    return q


def moments(q: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a variational distribution, float64."""
    distribution = q()
    mean = distribution.mean.detach().double().numpy()
    if isinstance(distribution, Delta):
        return mean, np.zeros((*mean.shape, mean.shape[-1]))
    return mean, distribution.covariance_matrix.detach().double().numpy()


def use_as_it_is(model: Model) -> Model:
    """Keep the first call from replacing q(v) by the prior."""
    strategy = model.variational_strategy
    getattr(strategy, "base_variational_strategy", strategy).variational_params_initialized.fill_(1)
    return model


def make_kernel(batch: Batch = (), dtype: torch.dtype = F64, columns: int | None = None) -> Kernel:
    kernel = ScaleKernel(RBFKernel(columns, batch_shape=torch.Size(batch)), batch_shape=torch.Size(batch)).to(F64)
    count = math.prod(batch)
    kernel.outputscale = torch.linspace(0.8, 1.5, count, dtype=F64).reshape(batch)
    kernel.base_kernel.lengthscale = torch.linspace(0.4, 0.7, count, dtype=F64).reshape(*batch, 1, 1)
    return kernel.to(dtype)


def make_mean(batch: Batch = (), dtype: torch.dtype = F64) -> Mean:
    mean = LinearMean(1, batch_shape=torch.Size(batch)).to(dtype)
    mean.weights.data = draw(*batch, 1, 1, seed=5).to(dtype)
    mean.bias.data = draw(*batch, 1, seed=6).to(dtype)
    return mean


def hippo_model(
    kind: str = "cholesky", dtype: torch.dtype = F64, order: int = 6, horizon: float = 2.0, **parts: Any
) -> Model:
    """A model with LegS features and a q(v) of its own, ready to be called."""
    q = some_q(kind, order, dtype=dtype)
    model = Model(interdomain(HippoFeatures(order, horizon), q), parts.pop("kernel", make_kernel(dtype=dtype)), **parts)
    return use_as_it_is(model.to(dtype))


def raw_variance(posterior: MultivariateNormal) -> Tensor:
    """The variance as it was computed; ``posterior.variance`` hides what is below 1e-9 or 1e-6."""
    return posterior.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)


def values(posterior: MultivariateNormal) -> tuple[Tensor, Tensor]:
    return posterior.mean, posterior.covariance_matrix


# Against stock GPyTorch


def twins(
    kind: str, points: Tensor, q_batch: Batch = (), kernel_batch: Batch = (), mean: Mean | None = None
) -> tuple[Model, Model]:
    q = some_q(kind, points.shape[-2], q_batch)
    kernel, mean = make_kernel(kernel_batch), ConstantMean().double() if mean is None else mean
    ours = Model(interdomain(InducingPoints(points), q, jitter=0.0), kernel, mean)
    theirs = Model(stock(points, deepcopy(q), jitter=1e-13), deepcopy(kernel), deepcopy(mean))
    return use_as_it_is(ours), use_as_it_is(theirs)


def assert_twins(ours: Model, theirs: Model, x: Tensor, tolerance: float = 1e-9) -> None:
    for mode in (True, False):
        mine, other = ours.train(mode)(x), theirs.train(mode)(x)
        assert mine.mean.shape == other.mean.shape and mine.batch_shape == other.batch_shape
        close(mine.mean, other.mean, tolerance)
        close(mine.variance, other.variance.expand(mine.mean.shape), tolerance)
        if not mode:
            close(mine.covariance_matrix, other.covariance_matrix.expand(mine.covariance_matrix.shape), tolerance)
    close(ours.variational_strategy.kl_divergence(), theirs.variational_strategy.kl_divergence(), 1e-9)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_equals_stock_for_every_distribution(kind: str) -> None:
    for points, n in product((torch.linspace(0, 3, 6, dtype=F64)[:, None], draw(5, 2)), (4, 20)):
        mean = LinearMean(points.shape[-1]).double()
        for q_batch in ((), (3,)):
            ours, theirs = twins(kind, points, q_batch, mean=mean)
            assert_twins(ours, theirs, draw(n, points.shape[-1], seed=3))


@pytest.mark.parametrize(("q_batch", "kernel_batch", "x_batch"), list(product(BATCHES, BATCHES, BATCHES)), ids=str)
def test_equals_stock_for_every_batch_shape(q_batch: Batch, kernel_batch: Batch, x_batch: Batch) -> None:
    for mean_batch in {(), kernel_batch}:
        ours, theirs = twins(
            "cholesky", torch.linspace(0, 3, 5, dtype=F64)[:, None], q_batch, kernel_batch, make_mean(mean_batch)
        )
        assert_twins(ours, theirs, draw(*x_batch, 7, 1, seed=3))


@pytest.mark.parametrize("points_batch", BATCHES, ids=str)
@pytest.mark.parametrize("x_batch", BATCHES, ids=str)
def test_equals_stock_with_batches_of_points(points_batch: Batch, x_batch: Batch) -> None:
    points = torch.linspace(0, 3, 5, dtype=F64)[:, None] + 0.1 * draw(*points_batch, 5, 1)
    ours, theirs = twins("cholesky", points, points_batch)
    assert_twins(ours, theirs, draw(*x_batch, 7, 1, seed=3))


def test_equals_stock_with_the_same_large_jitter() -> None:
    """Relative jitter times the outputscale is stock's absolute one; stock puts it on the data as well."""
    points, jitter, scale = torch.linspace(0, 3, 30, dtype=F64)[:, None], 1e-4, 2.5
    kernel, q = make_kernel(), some_q("cholesky", 30)
    kernel.outputscale = torch.tensor(scale, dtype=F64)
    ours = use_as_it_is(Model(interdomain(InducingPoints(points), q, jitter), kernel))
    theirs = use_as_it_is(Model(stock(points, q, jitter * scale), kernel))
    x = draw(9, 1)
    mine, other = ours.double().eval()(x), theirs.double().eval()(x)
    close(mine.mean, other.mean, 1e-9)
    close(mine.covariance_matrix + jitter * scale * torch.eye(9), other.covariance_matrix, 1e-9)


def test_equals_stock_within_default_jitters(dtype: torch.dtype) -> None:
    """What a user sees who changes nothing but the strategy."""
    points = torch.linspace(0, 3, 7, dtype=dtype)[:, None]
    q, kernel = some_q("cholesky", 7, dtype=dtype), make_kernel(dtype=dtype)
    ours = use_as_it_is(Model(interdomain(InducingPoints(points), q), kernel).to(dtype))
    theirs = use_as_it_is(Model(lambda model: VariationalStrategy(model, points, q), kernel).to(dtype))
    x = draw(9, 1).to(dtype)
    tolerance = 1e-4 if dtype == F64 else 1e-2
    close(ours.eval()(x).mean, theirs.eval()(x).mean, tolerance)
    close(ours.eval()(x).covariance_matrix, theirs.eval()(x).covariance_matrix, tolerance)


def test_gradients_equal_stock() -> None:
    points, x, y = torch.linspace(0, 3, 6, dtype=F64)[:, None], draw(20, 1), draw(20)
    for kind in DISTRIBUTIONS:
        gradients = []
        for model in twins(kind, points, mean=make_mean()):
            likelihood = GaussianLikelihood().double()
            inputs = x.clone().requires_grad_()
            model.zero_grad()
            (-VariationalELBO(likelihood, model.train(), num_data=20)(model(inputs), y)).backward()
            gradients.append([inputs.grad, *(p.grad for p in model.parameters())])
        for mine, other in zip(*gradients, strict=True):
            close(mine, other, 1e-8)


def test_batches_that_only_the_mean_has(dtype: torch.dtype) -> None:
    """A delta q(v), or a batch of mean functions, leaves the covariance without the batch; the posterior has it."""
    x = torch.linspace(0, 2, 4, dtype=dtype)
    delta, one = some_q("delta", 5, (3,), dtype), some_q("cholesky", 5, dtype=dtype)
    for q, mean in ((delta, ZeroMean()), (one, make_mean((3,), dtype))):
        model = use_as_it_is(Model(interdomain(HippoFeatures(5, 4.0), q), make_kernel(dtype=dtype), mean))
        for mode in (True, False):
            posterior = model.train(mode)(x)
            assert posterior.batch_shape == (3,) and posterior.covariance_matrix.shape == (3, 4, 4)
            assert posterior.rsample(torch.Size([2])).shape == (2, 3, 4)
            close(posterior[1].mean, posterior.mean[1], 1e-7)
            close(posterior[1].variance, posterior.variance[1], 1e-7)


# Against dense oracles, with HiPPO features


def dense_posterior(model: Model, x: Tensor, line: Line, index: Batch = ()) -> tuple[np.ndarray, np.ndarray]:
    """q(f(x)) of one element of a batch, from integrals by brute force and unwhitened dense algebra."""
    exact = deepcopy(model).double()
    kernel, inputs = exact.covar_module, x.detach().double().numpy()
    oracle = oracles.rbf(
        kernel.base_kernel.lengthscale[index].reshape(-1).detach().numpy(), kernel.outputscale[index].item()
    )
    kuu, kuf = oracles.legs_kuu(oracle, line), oracles.legs_kuf(oracle, line, inputs)
    jitter = exact.variational_strategy.jitter_val
    epsilon = (1e-10 if jitter is None else jitter) * kuu.diagonal().mean()
    m, s = moments(model.variational_strategy._variational_distribution)
    prior_mean = exact.mean_module(x.double()).detach().numpy()
    return oracles.sparse_posterior(kuu, kuf, oracles.gram(oracle, inputs, inputs), prior_mean, m, s, epsilon)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_equals_the_dense_oracle(kind: str, dtype: torch.dtype) -> None:
    model = hippo_model(kind, dtype, mean=make_mean(dtype=dtype))
    x = torch.linspace(-0.3, 2.6, 8).to(dtype)[:, None]
    mean, covariance = dense_posterior(model, x, Line(6, 2.0))
    tolerance = 1e-8 if dtype == F64 else 1e-6
    for mode in (True, False):
        posterior = model.train(mode)(x)
        assert posterior.mean.dtype == posterior.variance.dtype == dtype
        close(posterior.mean, mean, tolerance)
        close(raw_variance(posterior), covariance.diagonal(), tolerance)
    close(posterior.covariance_matrix, covariance, tolerance)
    # In training mode too, for those who say that they need the whole of it.
    close(model.train().variational_strategy(x, diag=False).covariance_matrix, covariance, tolerance)


@pytest.mark.parametrize(("q_batch", "kernel_batch", "x_batch"), list(product(BATCHES, BATCHES, BATCHES)), ids=str)
def test_every_batch_shape_is_a_loop(q_batch: Batch, kernel_batch: Batch, x_batch: Batch, dtype: torch.dtype) -> None:
    features, out = HippoFeatures(4, 2.0), torch.broadcast_shapes(q_batch, kernel_batch, x_batch)
    q, kernel, mean = some_q("cholesky", 4, q_batch, dtype), make_kernel(kernel_batch, dtype), make_mean((), dtype)
    x = draw(*x_batch, 5, 1, seed=3).to(dtype)
    model = use_as_it_is(Model(interdomain(features, q), kernel, mean))
    diagonal, full = model.train()(x), model.eval()(x)
    assert diagonal.batch_shape == full.batch_shape == out
    assert diagonal.mean.shape == diagonal.variance.shape == full.mean.shape == full.variance.shape == (*out, 5)
    assert full.covariance_matrix.shape == (*out, 5, 5)

    alone = hippo_model("cholesky", dtype, order=4, mean=mean).eval()
    single = alone.variational_strategy._variational_distribution
    tolerance = 1e-10 if dtype == F64 else 2e-5
    for index in np.ndindex(*out):
        single.variational_mean.data = q.variational_mean.data.expand(*out, 4)[index]
        single.chol_variational_covar.data = q.chol_variational_covar.data.expand(*out, 4, 4)[index]
        alone.covar_module.raw_outputscale.data = kernel.raw_outputscale.data.expand(out)[index]
        base = kernel.base_kernel.raw_lengthscale.data.expand(*out, 1, 1)[index]
        alone.covar_module.base_kernel.raw_lengthscale.data = base
        expected = alone(x.expand(*out, 5, 1)[index])
        close(full.mean[index], expected.mean, tolerance)
        close(full.covariance_matrix[index], expected.covariance_matrix, tolerance)
        close(diagonal.mean[index], expected.mean, tolerance)
        close(diagonal.variance[index], expected.variance, tolerance)


KERNELS = {
    "matern": lambda: MaternKernel(1.5),
    "periodic": lambda: ScaleKernel(PeriodicKernel()),
    "sum": lambda: RBFKernel() + ScaleKernel(MaternKernel(2.5)),
    "product": lambda: RBFKernel() * PeriodicKernel(),
    "trend and rbf": lambda: LinearKernel() + RBFKernel(),
    "rbf and trend": lambda: RBFKernel() + LinearKernel(),
}


@pytest.mark.parametrize("name", KERNELS)
def test_any_kernel(name: str, dtype: torch.dtype) -> None:
    """What the strategy makes of the model's prior is what the features make of the kernel."""
    model = hippo_model("cholesky", dtype, kernel=KERNELS[name]().to(dtype))
    x = torch.linspace(0, 2.4, 40).to(dtype)[:, None]
    kernel, features = deepcopy(model.covar_module).double(), model.variational_strategy.features
    kuu, kuf = features.kuu(kernel).to_dense().detach().numpy(), features.kuf(kernel, x).detach().numpy()
    # One column too many: for equal inputs GPyTorch factors a sum with a linear kernel, and warns.
    kff = kernel(x.double(), torch.cat([x, x[:1]]).double()).to_dense().detach().numpy()[:, :-1]
    m, s = moments(model.variational_strategy._variational_distribution)
    mean, covariance = oracles.sparse_posterior(kuu, kuf, kff, np.zeros(40), m, s, 1e-10 * kuu.diagonal().mean())
    posterior = model.eval()(x)
    tolerance = 1e-8 if dtype == F64 else 1e-6
    close(posterior.mean, mean, tolerance)
    close(posterior.covariance_matrix, covariance, tolerance)
    close(raw_variance(model.train()(x)), covariance.diagonal(), tolerance)


def test_the_unit_of_f_does_not_matter(dtype: torch.dtype) -> None:
    """The same belief in whitened coordinates about the same series in other units."""
    posteriors = []
    for unit in (1.0, 1e5):
        rbf, linear = make_kernel(), LinearKernel().double()
        linear.variance = torch.tensor(0.1 * unit**2, dtype=F64)
        rbf.outputscale = torch.tensor(unit**2, dtype=F64)
        model = hippo_model("cholesky", dtype, kernel=rbf + linear, mean=ZeroMean()).eval()
        posteriors.append(model(torch.linspace(0, 2.4, 30, dtype=dtype)))
    close(posteriors[1].mean / 1e5, posteriors[0].mean, 1e-8 if dtype == F64 else 1e-4)
    covariances = [p.covariance_matrix for p in posteriors]
    close(covariances[1] / 1e10, covariances[0], 1e-8 if dtype == F64 else 1e-4)


FORWARDS: dict[str, Callable[[Kernel, Kernel, Tensor], Any]] = {
    "sum": lambda a, b, x: a(x) + b(x),
    "product": lambda a, b, x: a(x) * b(x),
    "scaled": lambda a, b, x: a(x) * 0.5 + b(x) * 2.0,
    "jitter": lambda a, b, x: a(x).add_jitter(0.1),
    "warped": lambda a, b, x: a(x.pow(2)) + b(x.sin()),
    "dense": lambda a, b, x: a(x).to_dense() + b(x).to_dense(),
    "modulated": lambda a, b, x: MatmulLinearOperator(x * a(x).to_dense(), torch.diag(x[:, 0])),
}


class Custom(ApproximateGP):
    """A model whose prior is computed in some way of its own."""

    def __init__(
        self, strategy: Callable[[ApproximateGP], Any], combine: Callable[[Kernel, Kernel, Tensor], Any]
    ) -> None:
        super().__init__(strategy(self))
        self.first, self.second, self.combine = make_kernel(), ScaleKernel(MaternKernel(1.5)), combine

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(x[..., 0].sin(), self.combine(self.first, self.second, x))


# A slice of a diagonal makes torch remark on sparse tensors, once in a process.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", FORWARDS)
def test_any_forward(name: str, dtype: torch.dtype) -> None:
    """Whatever the model says of f at the nodes and at the inputs together is what the posterior is made of."""
    features = HippoFeatures(6, 2.0)
    model = use_as_it_is(Custom(interdomain(features, some_q("cholesky", 6, dtype=dtype)), FORWARDS[name]).to(dtype))
    x = torch.linspace(0.1, 2.4, 6).to(dtype)[:, None]
    prior = deepcopy(model).double().forward(torch.cat([features.nodes(), x.double()]))
    joint, num_nodes, w = prior.covariance_matrix.detach().numpy(), features.num_nodes, features.weights().numpy()
    kuu, kuf = w @ joint[:num_nodes, :num_nodes] @ w.T, w @ joint[:num_nodes, num_nodes:]
    m, s = moments(model.variational_strategy._variational_distribution)
    mean, covariance = oracles.sparse_posterior(
        kuu, kuf, joint[num_nodes:, num_nodes:], x[:, 0].double().sin().numpy(), m, s, 1e-10 * kuu.diagonal().mean()
    )
    tolerance = 1e-8 if dtype == F64 else 1e-6
    for mode in (True, False):
        posterior = model.train(mode)(x)
        close(posterior.mean, mean, tolerance)
        close(raw_variance(posterior), covariance.diagonal(), tolerance)
    close(posterior.covariance_matrix, covariance, tolerance)
    assert posterior.covariance_matrix.dtype == dtype


def test_time_among_several_columns(dtype: torch.dtype) -> None:
    line = Line(5, 1.5, 0.1, 1, (0.4, -1.1))
    features = HippoFeatures(5, 1.5, 0.1, time_dim=1, other_inputs=torch.tensor([0.4, -1.1], dtype=F64))
    kernel = make_kernel(dtype=dtype, columns=3)
    kernel.base_kernel.lengthscale = torch.tensor([0.9, 0.5, 1.4])
    model = use_as_it_is(Model(interdomain(features, some_q("cholesky", 5, dtype=dtype)), kernel, ZeroMean()))
    x = draw(6, 3).to(dtype)
    mean, covariance = dense_posterior(model, x, line)
    close(model.eval()(x).mean, mean, 1e-6)
    close(model.eval()(x).covariance_matrix, covariance, 1e-6)


class Averages(InducingFeatures):
    """A batch of three sets of averages of f over neighbouring nodes: weights and nodes with a batch shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(3, 4, 9, dtype=F64) + 4 * torch.eye(4, 9, dtype=F64))

    @property
    def num_features(self) -> int:
        return 4

    def nodes(self) -> Tensor:
        return torch.linspace(0, 3, 9, dtype=F64)[:, None]

    def weights(self) -> Tensor:
        return self.weight


def test_features_of_ones_own() -> None:
    features = Averages()
    model = use_as_it_is(
        Model(interdomain(features, some_q("cholesky", 4, (3,)), jitter=0.0), make_kernel(), ZeroMean())
    )
    x, posterior = draw(5, 1), None
    posterior = model.eval()(x)
    m, s = moments(model.variational_strategy._variational_distribution)
    oracle = oracles.rbf(0.4, 0.8)
    z, inputs = features.nodes().numpy(), x.numpy()
    for i, w in enumerate(features.weight.numpy()):
        kuu, kuf = w @ oracles.gram(oracle, z, z) @ w.T, w @ oracles.gram(oracle, z, inputs)
        kff = oracles.gram(oracle, inputs, inputs)
        mean, covariance = oracles.sparse_posterior(kuu, kuf, kff, np.zeros(5), m[i], s[i])
        close(posterior.mean[i], mean, 1e-9)
        close(posterior.covariance_matrix[i], covariance, 1e-9)


# KL


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_kl(kind: str, batch: Batch, dtype: torch.dtype) -> None:
    q = some_q(kind, 5, batch, dtype)
    model = use_as_it_is(Model(interdomain(HippoFeatures(5, 1.0), q)))
    kl = model.variational_strategy.kl_divergence()
    assert kl.shape == batch and kl.dtype == dtype
    mean, covariance = moments(q)
    for index in np.ndindex(*batch):
        if kind == "delta":  # the negative log density of the prior
            expected = 0.5 * (mean[index] ** 2).sum() + 2.5 * math.log(2 * math.pi)
        else:
            expected = oracles.gaussian_kl(mean[index], covariance[index])
        assert kl[index].item() == pytest.approx(expected, rel=1e-10 if dtype == F64 else 1e-4)


def test_kl_of_many_features_is_exact() -> None:
    """GPyTorch's own becomes a random number above 800."""
    q = some_q("cholesky", 850)
    model = use_as_it_is(Model(interdomain(InducingPoints(torch.linspace(0, 1, 850)), q)))
    kl = model.variational_strategy.kl_divergence()
    assert kl.item() == pytest.approx(oracles.gaussian_kl(*moments(q)), rel=1e-10)
    assert kl.item() == model.variational_strategy.kl_divergence().item()
    kl.backward()
    close(q.variational_mean.grad, q.variational_mean, 1e-12)


def test_kl_before_any_call_is_that_of_the_prior() -> None:
    q = CholeskyVariationalDistribution(4, mean_init_std=0.0)
    model = Model(interdomain(HippoFeatures(4, 1.0), q))
    q.variational_mean.data.fill_(3.0)  # not called yet: the first use starts from the prior
    assert model.variational_strategy.kl_divergence().item() == pytest.approx(0.0, abs=1e-6)


# Learning


def some_data(n: int = 40, dtype: torch.dtype = F64, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    x = 3 * torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(4))
    return x.to(dtype), (torch.sin(4 * x) + 0.5 * x + noise * draw(n, seed=7)).to(dtype)


def total_elbo(model: Model, likelihood: GaussianLikelihood, x: Tensor, y: Tensor) -> Tensor:
    return len(y) * VariationalELBO(likelihood, model.train(), num_data=len(y))(model(x), y)


def exact_evidence(model: Model, likelihood: GaussianLikelihood, x: Tensor, y: Tensor) -> float:
    inputs = x.double()[:, None]
    with torch.no_grad():
        covariance = model.covar_module(inputs).to_dense() + likelihood.noise * torch.eye(len(y), dtype=F64)
        return oracles.gaussian_log_prob(y.numpy(), model.mean_module(inputs).numpy(), covariance.numpy())


def test_learns_with_elbo_and_adam(dtype: torch.dtype) -> None:
    x, y = some_data(dtype=dtype)
    likelihood = GaussianLikelihood().to(dtype)
    model = Model(interdomain(HippoFeatures(14, 3.0), CholeskyVariationalDistribution(14))).to(dtype)
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    history = []
    for step in range(150):
        optimizer.zero_grad()
        elbo = total_elbo(model, likelihood, x, y)
        (-elbo / len(y)).backward()
        history.append(elbo.item())
        if dtype == F64 and step % 10 == 0:
            assert elbo.item() <= exact_evidence(model, likelihood, x, y) + 1e-6
        optimizer.step()
    assert history[-1] > history[0] + 40
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {dtype} and all(p.is_leaf for p in model.parameters())
    if dtype == F64:  # close to the best that a GP with these hyperparameters can be
        assert history[-1] > exact_evidence(model, likelihood, x, y) - 5
    posterior = likelihood(model.eval()(x))
    assert posterior.mean.dtype == dtype
    assert (posterior.mean - y).square().mean().sqrt() < 0.15
    assert 0.7 < ((posterior.mean - y).abs() < 2 * posterior.stddev).double().mean() <= 1


@pytest.mark.parametrize("kind", ["natural", "tril natural"])
def test_one_natural_step_is_the_closed_form(kind: str) -> None:
    """With a Gaussian likelihood, NGD with lr = 1 lands on the collapsed bound of Titsias."""
    x, y = some_data()
    features, kernel, mean = HippoFeatures(7, 3.0), make_kernel(), make_mean()
    q = DISTRIBUTIONS[kind](7).double()
    model, likelihood = Model(interdomain(features, q, jitter=0.0), kernel, mean), GaussianLikelihood().double()
    likelihood.noise = torch.tensor(0.04, dtype=F64)
    optimizer = gpytorch.optim.NGD(model.variational_parameters(), num_data=len(y), lr=1.0)
    with torch.no_grad():
        kuu, kuf = features.kuu(kernel).to_dense(), features.kuf(kernel, x)
        bound = oracles.collapsed_bound(
            kuu.numpy(), kuf.numpy(), np.full(len(y), 0.8), mean(x[:, None]).numpy(), y.numpy(), 0.04
        )
    before = total_elbo(model, likelihood, x, y)
    assert before.item() < bound - 10
    (-before / len(y)).backward()
    optimizer.step()
    # The triangular form takes a step in other coordinates, and arrives in a few.
    for _ in range(0 if kind == "natural" else 40):
        optimizer.zero_grad()
        (-total_elbo(model, likelihood, x, y) / len(y)).backward()
        optimizer.step()
    assert total_elbo(model, likelihood, x, y).item() == pytest.approx(bound, abs=1e-7)
    a = np.linalg.solve(np.linalg.cholesky(kuu.numpy()), kuf.numpy())
    precision = np.eye(7) + a @ a.T / 0.04
    residual = (y - mean(x[:, None]).detach()).numpy()
    close(q().mean, np.linalg.solve(precision, a @ residual) / 0.04, 1e-7)
    close(q().covariance_matrix, np.linalg.inv(precision), 1e-7)


def test_bound_rises_to_the_exact_evidence() -> None:
    x, y = some_data()
    likelihood, gaps = GaussianLikelihood().double(), []
    likelihood.noise = torch.tensor(0.04, dtype=F64)
    for order in (4, 8, 12, 16, 24):
        q = NaturalVariationalDistribution(order).double()
        model = Model(interdomain(HippoFeatures(order, 3.0), q), make_kernel(), make_mean())
        optimizer = gpytorch.optim.NGD(model.variational_parameters(), num_data=len(y), lr=1.0)
        (-total_elbo(model, likelihood, x, y) / len(y)).backward()
        optimizer.step()
        gaps.append(exact_evidence(model, likelihood, x, y) - total_elbo(model, likelihood, x, y).item())
    assert all(gap > -1e-6 for gap in gaps)
    assert all(b < a for a, b in pairwise(gaps))
    assert gaps[0] > 10 and gaps[-1] < 1e-5
    # And the posterior is the exact one.
    at = torch.linspace(-0.3, 3.3, 9, dtype=F64)
    inputs, offset = x[:, None].numpy(), model.mean_module(x[:, None]).detach()
    mean, covariance = oracles.exact_posterior(
        oracles.rbf(0.4, 0.8), inputs, (y - offset).numpy(), 0.04, at[:, None].numpy()
    )
    posterior = model.eval()(at)
    inside = (at >= 0) & (at <= 3)
    expected = torch.from_numpy(mean) + model.mean_module(at[:, None]).detach()
    close(posterior.mean[inside], expected[inside], 1e-5)
    close(posterior.covariance_matrix[inside][:, inside], torch.from_numpy(covariance)[inside][:, inside], 1e-4)


@pytest.mark.parametrize("kind", ["natural", "tril natural"])
def test_natural_gradients_beside_adam(kind: str) -> None:
    x, y = some_data(dtype=torch.float32)
    likelihood, model = GaussianLikelihood(), Model(interdomain(HippoFeatures(14, 3.0), DISTRIBUTIONS[kind](14)))
    natural = gpytorch.optim.NGD(model.variational_parameters(), num_data=len(y), lr=0.1)
    adam = torch.optim.Adam([*model.hyperparameters(), *likelihood.parameters()], lr=0.05)
    history = []
    for _ in range(80):
        natural.zero_grad()
        adam.zero_grad()
        elbo = total_elbo(model, likelihood, x, y)
        (-elbo / len(y)).backward()
        natural.step()
        adam.step()
        history.append(elbo.item())
    assert history[-1] > history[0] + 40
    assert (model.eval()(x).mean - y).square().mean().sqrt() < 0.15


def test_minibatches_are_unbiased() -> None:
    x, y = some_data()
    model, likelihood = hippo_model(order=8, horizon=3.0), GaussianLikelihood().double()
    mll = VariationalELBO(likelihood, model.train(), num_data=len(y))
    parts = [mll(model(x[i::4]), y[i::4]) for i in range(4)]
    close(torch.stack(parts).mean(), mll(model(x), y), 1e-12)


# Several outputs


def multitask_twins(wrap: Callable[[Any], Any], kernel_batch: Batch) -> tuple[Model, Model]:
    points, kernel = torch.linspace(0, 3, 6, dtype=F64)[:, None], make_kernel(kernel_batch)
    q, mean = some_q("cholesky", 6, (2,)), make_mean(kernel_batch)
    models = []
    for inner in (interdomain(InducingPoints(points), q, jitter=0.0), stock(points, deepcopy(q), 1e-13)):
        torch.manual_seed(3)  # the coefficients of LMC are random
        models.append(use_as_it_is(Model(lambda m, f=inner: wrap(f(m)), deepcopy(kernel), deepcopy(mean)).double()))
    return models[0], models[1]


WRAPPERS = {
    "independent": lambda base: IndependentMultitaskVariationalStrategy(base, num_tasks=2),
    "lmc": lambda base: LMCVariationalStrategy(base, num_tasks=3, num_latents=2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kernel_batch", [(), (2,)], ids=str)
def test_multitask_wrappers(wrapper: str, kernel_batch: Batch) -> None:
    ours, theirs = multitask_twins(WRAPPERS[wrapper], kernel_batch)
    x, tasks = draw(8, 1, seed=3), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    for mode in (True, False):
        mine, other = ours.train(mode)(x), theirs.train(mode)(x)
        assert isinstance(mine, MultitaskMultivariateNormal) and mine.mean.shape == other.mean.shape
        close(mine.mean, other.mean, 1e-8)
        close(mine.covariance_matrix, other.covariance_matrix, 1e-8)
        mine, other = ours(x, task_indices=tasks), theirs(x, task_indices=tasks)
        close(mine.mean, other.mean, 1e-8)
        close(mine.covariance_matrix, other.covariance_matrix, 1e-8)
    close(ours.variational_strategy.kl_divergence(), theirs.variational_strategy.kl_divergence(), 1e-9)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_multitask_models_learn(wrapper: str, dtype: torch.dtype) -> None:
    num_tasks = 2 if wrapper == "independent" else 3
    x, y = some_data(dtype=dtype)
    targets = torch.stack([y, -2 * y, y.square()][:num_tasks], -1)
    q = CholeskyVariationalDistribution(10, batch_shape=torch.Size([2]))
    model = Model(lambda m: WRAPPERS[wrapper](interdomain(HippoFeatures(10, 3.0), q)(m))).to(dtype)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=num_tasks).to(dtype)
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.1)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        elbo = VariationalELBO(likelihood, model.train(), num_data=len(y))(model(x), targets)
        (-elbo).backward()
        optimizer.step()
        history.append(elbo.item())
    assert history[-1] > history[0] + 0.5
    posterior = likelihood(model.eval()(x))
    assert posterior.mean.shape == targets.shape and posterior.mean.dtype == dtype
    assert (posterior.mean - targets).abs().mean() < (targets - targets.mean(0)).abs().mean()


# Dtypes


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_float32_is_rounded_float64(kind: str) -> None:
    model = hippo_model(kind, torch.float32, order=20, horizon=4.0, mean=make_mean(dtype=torch.float32))
    exact = deepcopy(model).double()
    x = torch.linspace(-0.5, 4.5, 50)[:, None]
    for mode in (True, False):
        mine, other = model.train(mode)(x), exact.train(mode)(x.double())
        assert mine.mean.dtype == raw_variance(mine).dtype == torch.float32
        assert other.mean.dtype == raw_variance(other).dtype == F64
        close(mine.mean, other.mean, 1e-5)
        close(raw_variance(mine), raw_variance(other), 1e-5)
    assert mine.covariance_matrix.dtype == torch.float32
    close(mine.covariance_matrix, other.covariance_matrix, 1e-5)


def test_inputs_decide_about_the_dtype() -> None:
    for model_dtype, dtype in product((torch.float32, F64), (torch.float32, F64)):
        model = hippo_model(dtype=model_dtype)
        for mode in (True, False):
            posterior = model.train(mode)(torch.linspace(0, 2, 5, dtype=dtype))
            assert posterior.mean.dtype == posterior.variance.dtype == dtype
        assert posterior.covariance_matrix.dtype == posterior.rsample().dtype == dtype


def test_integer_inputs_are_refused() -> None:
    """Rounding a posterior to whole numbers helps nobody."""
    model = hippo_model()
    for mode in (True, False):
        with pytest.raises((TypeError, ValueError), match=r"x: .*floating.*int64"):
            model.train(mode)(torch.arange(3))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, F64), (F64, F64)], ids=str)
def test_no_variance_below_zero(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Far above capacity and very sure of itself: all that is left is rounding, in either mode."""
    model_dtype, dtype = dtypes
    model = hippo_model(dtype=model_dtype, order=24)
    q = model.variational_strategy._variational_distribution
    q.chol_variational_covar.data = 1e-8 * torch.eye(24, dtype=model_dtype)
    x = torch.linspace(0.05, 1.95, 40, dtype=dtype)
    for scale, lengthscale in product((0.3, 0.9, 1.7, 3.3, 612.0), (0.7, 0.9, 1.3)):
        model.covar_module.outputscale, model.covar_module.base_kernel.lengthscale = scale, lengthscale
        training, evaluating = raw_variance(model.train()(x)), raw_variance(model.eval()(x))
        assert (training >= 0).all() and (evaluating >= 0).all()
        # Both modes see the same prior: what they say is of the order of the jitter, and the same.
        assert (evaluating <= 1e-7 * scale).all()
        torch.testing.assert_close(evaluating, training, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_autocast_around_it(kind: str) -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))
    plain = hippo_model(kind, torch.float32, order=8, horizon=6.0)  # below capacity: no variance is close to zero
    deep = DeepModel(interdomain(HippoFeatures(8, 6.0), some_q(kind, 8, dtype=torch.float32)), net)
    for model in (plain, use_as_it_is(deep)):
        x, y = torch.linspace(0, 6, 30), torch.sin(torch.linspace(0, 6, 30))
        for mode in (True, False):
            mean, variance = model.train(mode)(x).mean, raw_variance(model(x))
            kl = model.variational_strategy.kl_divergence()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = model(x)
                close(inside.mean, mean, 1e-6)
                close(raw_variance(inside), variance, 1e-6)
                close(model.variational_strategy.kl_divergence(), kl, 1e-6)
                assert inside.mean.dtype == torch.float32
        close(inside.covariance_matrix, model(x).covariance_matrix, 1e-6)
        gradients = []
        for enabled in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                posterior = model(x)
                loss = (posterior.mean - y).square().sum() + raw_variance(posterior).sum()
                loss = loss + model.variational_strategy.kl_divergence()
            loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for with_autocast, without in zip(*reversed(gradients), strict=True):
            close(with_autocast, without, 1e-4)


# Nothing is cached


def test_backward_twice_in_eval_mode(dtype: torch.dtype) -> None:
    for kind in DISTRIBUTIONS:
        model, x = hippo_model(kind, dtype).eval(), torch.linspace(0, 2, 6, dtype=dtype)
        gradients = []
        for _ in range(3):
            model.zero_grad()
            posterior = model(x)
            (posterior.mean.sum() + posterior.variance.sum() + posterior.covariance_matrix.sum()).backward()
            model.variational_strategy.kl_divergence().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(g.abs().max() > 0 for g in gradients[0])
        for again in gradients[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, gradients[0], strict=True))


def test_changes_in_eval_mode_take_effect_at_once(dtype: torch.dtype) -> None:
    model, x = hippo_model(dtype=dtype).eval(), torch.linspace(0, 2, 6, dtype=dtype)
    q = model.variational_strategy._variational_distribution

    def set_features() -> None:
        model.variational_strategy.features = HippoFeatures(6, 3.0)

    def stretch() -> None:
        model.variational_strategy.features.set_extra_state(HippoFeatures(6, 5.0).get_extra_state())

    kernel, mean = model.covar_module, model.mean_module
    # Which of mean, covariance and KL change.
    changes: list[tuple[Callable[[], object], tuple[bool, bool, bool]]] = [
        (lambda: setattr(kernel.base_kernel, "lengthscale", 0.9), (True, True, False)),
        (lambda: kernel.raw_outputscale.data.add_(0.5), (True, True, False)),
        (lambda: mean.raw_constant.data.fill_(2.0), (True, False, False)),
        (lambda: q.variational_mean.data.mul_(2.0), (True, False, True)),
        (lambda: q.chol_variational_covar.data.mul_(0.5), (False, True, True)),
        (set_features, (True, True, False)),
        (stretch, (True, True, False)),
    ]
    for change, moved in changes:
        before = (*values(model(x)), model.variational_strategy.kl_divergence())
        change()
        now = (*values(model(x)), model.variational_strategy.kl_divergence())
        fresh = deepcopy(model).train().eval()
        expected = (*values(fresh(x)), fresh.variational_strategy.kl_divergence())
        for a, b, c, moves in zip(now, expected, before, moved, strict=True):
            close(a, b, 1e-12)
            assert torch.equal(a, c) != moves


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", [True, False])
def test_gradients_after_a_call_without(guard: Callable, mode: bool, dtype: torch.dtype) -> None:
    x = torch.linspace(0, 2, 6, dtype=dtype)
    for kind in DISTRIBUTIONS:
        q = DISTRIBUTIONS[kind](6)
        model = Model(interdomain(HippoFeatures(6, 2.0), q), make_kernel()).to(dtype).train(mode)
        with guard():  # the first call, which also initialises q(v)
            before = model(x)
            assert not before.mean.requires_grad and not raw_variance(before).requires_grad
            model.variational_strategy.kl_divergence()
        posterior = model(x)
        (posterior.mean.sum() + raw_variance(posterior).sum()).backward()
        model.variational_strategy.kl_divergence().backward()
        expected = deepcopy(model)
        expected.zero_grad()
        posterior = expected(x)
        (posterior.mean.sum() + raw_variance(posterior).sum()).backward()
        expected.variational_strategy.kl_divergence().backward()
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad)


def test_gradients_reach_the_inputs_in_either_mode(dtype: torch.dtype) -> None:
    model = hippo_model(dtype=dtype)
    found = []
    for mode in (True, False):
        x = torch.linspace(0.1, 1.9, 5, dtype=dtype).requires_grad_()
        posterior = model.train(mode)(x)
        (posterior.mean.sum() + posterior.variance.sum()).backward()
        found.append(x.grad)
    close(found[0], found[1], 1e-8 if dtype == F64 else 1e-4)
    exact = deepcopy(model).double().eval()
    assert torch.autograd.gradcheck(lambda x: values(exact(x)), (torch.linspace(0, 2, 4, dtype=F64).requires_grad_(),))


# Saving and copying


def test_state_dict_round_trip(dtype: torch.dtype) -> None:
    for kind in DISTRIBUTIONS:
        model, file = hippo_model(kind, dtype, horizon=math.pi).eval(), io.BytesIO()
        x = torch.linspace(0, 3, 6, dtype=dtype)
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = Model(interdomain(HippoFeatures(6, 1.0), DISTRIBUTIONS[kind](6))).to(dtype).eval()
        other(x)  # used before, with a basis and a q(v) of its own
        other.load_state_dict(torch.load(file, weights_only=True))
        mine, theirs = values(model(x)), values(other(x))
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
        assert torch.equal(model.variational_strategy.kl_divergence(), other.variational_strategy.kl_divergence())


def test_a_state_that_was_never_used_starts_from_the_prior() -> None:
    fresh = Model(interdomain(HippoFeatures(6, 1.0), CholeskyVariationalDistribution(6, mean_init_std=0.0)))
    state = fresh.state_dict()
    used = hippo_model(dtype=torch.float32, kernel=ScaleKernel(RBFKernel()), horizon=1.0)
    x = torch.linspace(0, 1, 4)
    used(x)
    state["variational_strategy._variational_distribution.variational_mean"] = torch.ones(6)
    used.load_state_dict(state)
    used(x)
    assert not used.variational_strategy._variational_distribution.variational_mean.any()


def test_deepcopy_is_independent(dtype: torch.dtype) -> None:
    model, x = hippo_model(dtype=dtype).eval(), torch.linspace(0, 2, 5, dtype=dtype)
    before = values(model(x))
    copy = deepcopy(model)
    assert copy.variational_strategy.model is copy
    assert all(torch.equal(a, b) for a, b in zip(values(copy(x)), before, strict=True))
    copy.covar_module.base_kernel.lengthscale = 2.0
    copy.variational_strategy._variational_distribution.variational_mean.data.zero_()
    copy.variational_strategy.features.set_extra_state(HippoFeatures(6, 9.0).get_extra_state())
    assert all(torch.equal(a, b) for a, b in zip(values(model(x)), before, strict=True))
    assert not torch.equal(copy(x).mean, before[0])


def test_casting_a_model_leaves_its_basis_alone() -> None:
    model = hippo_model()
    nodes = model.variational_strategy.features.nodes()
    x = torch.linspace(0, 2, 5, dtype=F64)
    model.eval()(x)
    model.float()(x.float())
    model.double()(x)
    assert torch.equal(model.variational_strategy.features.nodes(), nodes)


def test_the_parameters_survive_a_call(dtype: torch.dtype) -> None:
    """Float64 algebra must not leave anything behind in a float32 model."""
    base = RBFKernel()
    kernel = (ScaleKernel(base) + PeriodicKernel() * base).to(dtype)
    model = hippo_model(dtype=dtype, kernel=kernel, mean=make_mean(dtype=dtype))
    model.base = base  # a module with a second name
    before = [(name, id(p), p.dtype) for name, p in (*model.named_parameters(), *model.named_buffers())]
    for mode in (True, False):
        model.train(mode)(torch.linspace(0, 2, 5, dtype=dtype)).covariance_matrix  # noqa: B018
        after = [(name, id(p), p.dtype) for name, p in (*model.named_parameters(), *model.named_buffers())]
        assert after == before
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


# Large inputs


class Counting(RBFKernel):
    """An RBF kernel that remembers the largest block that it was asked for."""

    largest = 0

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        count = x1.shape[-2] * (1 if diag else x2.shape[-2])
        self.largest = max(self.largest, count)
        return super().forward(x1, x2, diag=diag, **params)


@pytest.mark.parametrize(
    "outer", [lambda k: k, ScaleKernel, lambda k: k + MaternKernel()], ids=["bare", "scaled", "sum"]
)
def test_variances_of_many_points_never_need_all_pairs(outer: Callable[[Kernel], Kernel], dtype: torch.dtype) -> None:
    n, counting = 20_000, Counting()
    model = hippo_model(dtype=dtype, kernel=outer(counting).to(dtype))
    likelihood = GaussianLikelihood().to(dtype)
    x, y = torch.linspace(0, 2, n, dtype=dtype), torch.zeros(n, dtype=dtype)
    bound = 2 * (n + model.variational_strategy.features.num_nodes) * model.variational_strategy.features.num_nodes
    with torch.no_grad():
        for mode in (True, False):
            posterior = model.train(mode)(x)
            assert posterior.variance.shape == (n,)
            assert posterior.confidence_region()[0].shape == (n,)
            assert likelihood(posterior).variance.shape == (n,)
            assert likelihood.expected_log_prob(y, posterior).shape == (n,)
    assert 0 < counting.largest <= bound


# What a posterior is good for


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_posteriors_are_ordinary_distributions(batch: Batch, dtype: torch.dtype) -> None:
    q = some_q("cholesky", 6, batch, dtype)
    model = use_as_it_is(Model(interdomain(HippoFeatures(6, 2.0), q), make_kernel(batch, dtype))).to(dtype).eval()
    x = torch.linspace(0, 4, 7, dtype=dtype)
    posterior = model(x)
    mean, covariance = values(posterior)
    assert torch.equal(covariance, covariance.mT) or (covariance - covariance.mT).abs().max() < 1e-6
    # Slices.
    for index in (slice(2, 5), torch.tensor([0, 3, 6]), slice(None, None, 2)):
        part = posterior[..., index]
        close(part.mean, mean[..., index], 1e-7)
        close(part.covariance_matrix, covariance[..., index, :][..., index], 1e-6)
        close(part.variance, posterior.variance[..., index], 1e-6)
    if batch:
        close(posterior[1].mean, mean[1], 1e-7)
        close(posterior[1].covariance_matrix, covariance[1], 1e-6)
    # Densities and noise.
    likelihood = GaussianLikelihood().to(dtype)
    noisy = likelihood(posterior)
    eye = torch.eye(7, dtype=dtype)
    dense = torch.distributions.MultivariateNormal(mean, covariance + likelihood.noise * eye)
    y = draw(*batch, 7).to(dtype)
    close(noisy.log_prob(y), dense.log_prob(y), 1e-5)
    close(noisy.covariance_matrix, dense.covariance_matrix, 1e-6)
    assert likelihood.expected_log_prob(y, posterior).shape == (*batch, 7)
    assert likelihood.log_marginal(y, posterior).shape == (*batch, 7)
    # Sums and scales.
    close((posterior * 2.0 + 1.0).mean, 2 * mean + 1, 1e-6)
    close((posterior + posterior).covariance_matrix, 2 * covariance, 1e-6)
    close(posterior.expand((2, *batch)).covariance_matrix[1], covariance, 1e-6)


def test_samples(dtype: torch.dtype) -> None:
    model = hippo_model(dtype=dtype).eval()
    posterior = model(torch.linspace(0.0, 4.0, 3, dtype=dtype))
    for shape in ((), (4,), (2, 4)):
        assert posterior.rsample(torch.Size(shape)).shape == (*shape, 3)
    samples = posterior.rsample(torch.Size([20_000]))
    close(samples.mean(0), posterior.mean, 0.03)
    close(samples.mT.cov(), posterior.covariance_matrix, 0.05)
    samples.sum().backward()
    assert model.covar_module.raw_outputscale.grad is not None
    base = torch.zeros(5, 3, dtype=dtype)
    close(posterior.rsample(torch.Size([5]), base_samples=base), posterior.mean.expand(5, 3), 1e-6)


def test_samples_of_a_smooth_posterior(dtype: torch.dtype) -> None:
    """Twenty close points make a covariance that float64 still factors; showing it in float32 must not undo that."""
    model = hippo_model(dtype=dtype, order=12).eval()
    posterior = model(torch.linspace(0, 2, 20, dtype=dtype))
    samples = posterior.rsample(torch.Size([2000]))  # a NumericalWarning about added jitter would be an error here
    assert samples.dtype == dtype
    close(samples.var(0), raw_variance(posterior), 0.2)


def test_prior(dtype: torch.dtype) -> None:
    model = hippo_model(dtype=dtype, mean=make_mean(dtype=dtype))
    x = torch.linspace(0, 2, 5, dtype=dtype)
    for mode in (True, False):
        prior, expected = model.train(mode)(x, prior=True), model.forward(x[:, None])
        assert torch.equal(prior.mean, expected.mean)
        assert torch.equal(prior.covariance_matrix, expected.covariance_matrix)


def test_the_prior_is_what_q_starts_from(dtype: torch.dtype) -> None:
    """The first call, in eval mode too, sets q(v) = N(0, I): the posterior is the prior."""
    q = CholeskyVariationalDistribution(8, mean_init_std=0.0)
    model = Model(interdomain(HippoFeatures(8, 2.0), q), mean=make_mean()).to(dtype).eval()
    x = torch.linspace(-1, 4, 6, dtype=dtype)
    close(model(x).mean, model(x, prior=True).mean, 1e-6)
    close(model(x).covariance_matrix, model(x, prior=True).covariance_matrix, 1e-6)
    # And never again.
    q.variational_mean.data.fill_(1.0)
    assert not torch.allclose(model(x).mean, model(x, prior=True).mean)


def test_what_gpytorch_reads_off_a_strategy() -> None:
    model = hippo_model()
    strategy = model.variational_strategy
    assert isinstance(strategy.prior_distribution, MultivariateNormal)
    assert isinstance(strategy.prior_distribution.lazy_covariance_matrix, DiagLinearOperator)
    close(strategy.prior_distribution.covariance_matrix, torch.eye(6), 1e-15)
    assert strategy.variational_distribution.mean.shape == (6,)
    assert strategy.inducing_points.shape == (32, 1)
    assert strategy.jitter_val is None
    with pytest.raises(NotImplementedError, match="fantasy"):
        model.get_fantasy_model(torch.zeros(1, 1), torch.zeros(1))


# Deep models


class DeepModel(ApproximateGP):
    """A GP on the outputs of a network, with the features on the time axis before it."""

    def __init__(self, strategy: Callable[[ApproximateGP], Any], net: nn.Module) -> None:
        super().__init__(strategy(self))
        self.net = net
        self.mean_module = ConstantMean()
        self.covar_module = ScaleKernel(RBFKernel(ard_num_dims=2))

    def forward(self, x: Tensor, shift: float = 0.0) -> MultivariateNormal:
        hidden = self.net(x + shift)
        return MultivariateNormal(self.mean_module(hidden), self.covar_module(hidden))


class DeepKernel(Kernel):
    """The network inside the kernel."""

    has_lengthscale = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.base = net, RBFKernel()

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return self.base.forward(self.net(x1), self.net(x2), diag=diag, **params)


def deep_models(dtype: torch.dtype) -> Iterator[Model | DeepModel]:
    for inside in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        q, features = some_q("cholesky", 6, dtype=dtype), HippoFeatures(6, 2.0)
        yield use_as_it_is(
            Model(interdomain(features, q), DeepKernel(net)) if inside else DeepModel(interdomain(features, q), net)
        ).to(dtype)


@pytest.mark.parametrize("inside", [False, True], ids=["in forward", "in the kernel"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_deep_kernels(inside: bool, mode: bool, dtype: torch.dtype) -> None:
    model = list(deep_models(dtype))[inside].train(mode)
    exact = deepcopy(model).double()
    x = torch.linspace(0, 2, 5, dtype=dtype)
    for m, inputs in ((model, x), (exact, x.double())):
        m.zero_grad()
        posterior = m(inputs)
        (posterior.mean.sum() + raw_variance(posterior).sum()).backward()
    close(model(x).mean, exact(x.double()).mean, 1e-5)
    close(raw_variance(model(x)), raw_variance(exact(x.double())), 1e-5)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.dtype == dtype
        close(ours.grad, theirs.grad, 1e-4 if dtype == torch.float32 else 1e-12)
    if not mode:
        close(model(x).covariance_matrix, exact(x.double()).covariance_matrix, 1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(model(x).covariance_matrix, exact(x.double()).covariance_matrix, 1e-5)


def test_keywords_reach_forward() -> None:
    model = next(deep_models(torch.float32)).eval()
    x = torch.linspace(0, 2, 5)
    moved, prior = model(x, shift=1.0), model(x, prior=True, shift=1.0)
    assert not torch.allclose(moved.mean, model(x).mean)
    close(prior.mean, model.forward(x[:, None], shift=1.0).mean, 1e-7)


# torch.func


def test_functional_call_and_grad(dtype: torch.dtype) -> None:
    x, y = some_data(12, dtype)
    # GPyTorch's RBF and Matern kernels use functions of their own, which functorch refuses; this one does not.
    model, likelihood = (
        hippo_model(dtype=dtype, horizon=3.0, kernel=ScaleKernel(PeriodicKernel())),
        GaussianLikelihood(),
    )
    likelihood.to(dtype)
    mll = VariationalELBO(likelihood, model.train(), num_data=len(y))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return -mll(self.model(x), y)

    loss = Loss()
    parameters = {name: (1.1 * p).detach() for name, p in loss.named_parameters()}
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    f = lambda p: torch.func.functional_call(loss, p, (x, y))  # noqa: E731
    value, gradients = f(parameters), torch.func.grad(f)(parameters)
    assert all(torch.equal(p, before[name]) for name, p in loss.named_parameters())
    loss.load_state_dict(parameters, strict=False)
    expected = loss(x, y)
    expected.backward()
    close(value, expected, 1e-12 if dtype == F64 else 1e-6)
    for name, parameter in loss.named_parameters():
        close(gradients[name], parameter.grad, 1e-10 if dtype == F64 else 1e-5)


# What is refused


def test_wrong_inputs_are_named() -> None:
    model = hippo_model()
    for mode in (True, False):
        for x in (torch.zeros(5, 2), torch.zeros(3, 5, 2), torch.zeros(5, 0)):
            with pytest.raises(ValueError, match=rf"x: expected 1 input columns.*{x.shape[-1]}\)"):
                model.train(mode)(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.zeros(4, 1)}, TypeError, r"features: expected InducingFeatures, got Tensor"),
        ({"features": HippoFeatures}, TypeError, r"features: expected InducingFeatures, got type"),
        ({"q": torch.zeros(4)}, TypeError, r"variational_distribution: expected .* got Tensor"),
        ({"q": CholeskyVariationalDistribution(5)}, ValueError, r"variational_distribution: .*num_features=4.* got 5"),
        ({"jitter": -1e-6}, ValueError, r"jitter: .* got -1e-06"),
        ({"jitter": 1.0}, ValueError, r"jitter: .* got 1\.0"),
        ({"jitter": float("nan")}, ValueError, r"jitter: .* got nan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"features": HippoFeatures(4, 1.0), "q": CholeskyVariationalDistribution(4), "jitter": None}
    with pytest.raises(error, match=message):
        Model(interdomain(**(good | arguments)))


def test_a_prior_that_is_none() -> None:
    """A kernel that is not positive definite is refused rather than repaired."""
    model = hippo_model()
    model.covar_module.raw_outputscale_constraint = gpytorch.constraints.Interval(-3.0, -1.0)
    with pytest.raises(NotPSDError):
        model(torch.linspace(0, 1, 3, dtype=F64))
