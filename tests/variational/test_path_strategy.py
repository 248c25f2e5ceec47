"""Ordinary GPyTorch models on features along a path: chunk by chunk, against the closed form of a stream."""

import copy
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from gpytorch.variational import CholeskyVariationalDistribution, NaturalVariationalDistribution
from torch import Tensor

from gpseq.features.path import PathFeatures
from gpseq.mlls import StreamingELBO
from gpseq.models import StreamingGP
from gpseq.variational import InterdomainVariationalStrategy
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_close

JITTER = 1e-12
modes = pytest.mark.parametrize("mode", ["keep", "rff"])


def kernel_of(lengthscale: float = 1.2) -> Kernel:
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.outputscale = torch.tensor(1.6, dtype=F64)
    kernel.base_kernel.lengthscale = torch.tensor(lengthscale, dtype=F64)
    return kernel


def gaussian() -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = torch.tensor(0.1, dtype=F64)
    return likelihood


def mean_of(kind: str) -> gpytorch.means.Mean:
    if kind == "linear":
        mean = gpytorch.means.LinearMean(2).double()
        mean.weights.data.copy_(torch.tensor([[0.3], [-0.2]]))
        mean.bias.data.fill_(0.4)
        return mean
    mean = gpytorch.means.ConstantMean().double()
    mean.constant.data.fill_(0.7)
    return mean


def path(mode: str, M: int = 8, **options: Any) -> PathFeatures:
    if mode == "keep":
        return PathFeatures(M, 2, **options)
    generator = torch.Generator().manual_seed(0)
    return PathFeatures(M, 2, mode="rff", kernel=kernel_of(), num_frequencies=30, generator=generator, **options)


class Model(gpytorch.models.ApproximateGP):
    def __init__(self, features: PathFeatures, q: Any, mean: gpytorch.means.Mean) -> None:
        strategy = InterdomainVariationalStrategy(self, features, q(features.num_features).double(), jitter=JITTER)
        super().__init__(strategy)
        self.mean_module, self.covar_module = mean, kernel_of()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def data(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, generator=generator, dtype=F64) * 3 - 1.5
    return x, (1.5 * x).sin().sum(-1) + 0.3 * torch.randn(n, generator=generator, dtype=F64)


AT = torch.rand(9, 2, generator=torch.Generator().manual_seed(9), dtype=F64) * 4 - 2


def natural_step(model: Model, likelihood: GaussianLikelihood, x: Tensor, y: Tensor) -> float:
    """One natural-gradient step of length one; the bound of the chunk before it."""
    model.train()
    optimiser = gpytorch.optim.NGD(model.variational_parameters(), num_data=len(x), lr=1.0)
    optimiser.zero_grad()
    bound = StreamingELBO(likelihood, model)(model(x), y)
    (-bound).backward()
    optimiser.step()
    return len(x) * bound.item()


def bound_of(model: Model, likelihood: Any, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return len(x) * StreamingELBO(likelihood, model.train())(model(x), y).item()


@modes
@pytest.mark.parametrize("mean", ["constant", "linear"])
@pytest.mark.parametrize("options", [{}, {"ordering": "kernel"}, {"every": 2}], ids=["given", "kernel", "every"])
def test_natural_steps_are_the_closed_form(mode: str, mean: str, options: dict[str, Any]) -> None:
    """Three chunks, the path going on with each: posterior and increment of the bound are those of a stream."""
    x, y = data()
    likelihood = gaussian()
    first = path(mode, **options).following(x[:20], kernel_of())
    model = Model(first, NaturalVariationalDistribution, mean_of(mean))
    stream = StreamingGP(path(mode, **options), kernel_of(), gaussian(), mean_of(mean), jitter=JITTER).eval()
    evidence = 0.0
    for i, (a, b) in enumerate(zip(x.split(20), y.split(20), strict=True)):
        if i:
            strategy = model.variational_strategy
            strategy.advance(strategy.features.following(a, model.covar_module))
        natural_step(model, likelihood, a, b)
        stream.update(a, b)
        evidence, before = stream.log_evidence.item(), evidence
        assert bound_of(model, likelihood, a, b) == pytest.approx(evidence - before, abs=1e-5)
        with torch.no_grad():
            expected, actual = stream(AT), model.eval()(AT)
            assert_close(actual.mean, expected.mean, 1e-5)
            assert_close(actual.covariance_matrix, expected.covariance_matrix, 1e-5)


@modes
def test_the_closed_form_has_no_gradient_and_the_highest_bound(mode: str) -> None:
    x, y = data()
    model = Model(path(mode).following(x[:30], kernel_of()), NaturalVariationalDistribution, mean_of("constant"))
    natural_step(model, gaussian(), x[:30], y[:30])
    strategy = model.variational_strategy
    strategy.advance(strategy.features.following(x[30:], model.covar_module))
    natural_step(model, gaussian(), x[30:], y[30:])
    best = bound_of(model, gaussian(), x[30:], y[30:])
    for _ in range(5):
        other = copy.deepcopy(model)
        other.variational_strategy._variational_distribution.natural_vec.data += 0.1 * torch.randn(8, dtype=F64)
        assert bound_of(other, gaussian(), x[30:], y[30:]) < best
    natural_step(model, gaussian(), x[30:], y[30:])
    assert bound_of(model, gaussian(), x[30:], y[30:]) == pytest.approx(best, abs=1e-6)


@modes
def test_adam_on_two_chunks_of_labels(mode: str) -> None:
    x, _ = data(80)
    labels = (x[:, 0] > 0).double()
    kernel = kernel_of()
    features = path(mode, 12, ordering="kernel")
    model = Model(features.following(x[:40], kernel), CholeskyVariationalDistribution, mean_of("constant"))
    likelihood = BernoulliLikelihood()
    for i, (a, b) in enumerate(zip(x.split(40), labels.split(40), strict=True)):
        if i:
            strategy = model.variational_strategy
            strategy.advance(strategy.features.following(a, model.covar_module))
        model.train()
        optimiser = torch.optim.Adam(model.variational_parameters(), lr=0.05)
        objective, values = StreamingELBO(likelihood, model), []
        for _ in range(60):
            optimiser.zero_grad()
            loss = -objective(model(a), b)
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        assert values[-1] < values[0]
    with torch.no_grad():
        predicted = (model.eval()(x).mean > 0).double()
    assert (predicted == labels).double().mean() > 0.9


@modes
def test_before_training_there_is_the_prior(mode: str) -> None:
    x, _ = data()
    model = Model(path(mode).following(x, kernel_of()), CholeskyVariationalDistribution, mean_of("linear")).eval()
    with torch.no_grad():
        assert_close(model(AT).mean, mean_of("linear")(AT).detach(), 0.05)  # q starts at the prior plus a little noise
        assert_close(model(AT).variance, torch.full((9,), 1.6, dtype=F64), 0.05)


def test_hyperparameters_learn_on_a_kept_path() -> None:
    """The gradient of the bound in the lengthscale across a change of path, against differences of the oracle."""
    x, y = data(40)
    model = Model(path("keep", 6).following(x[:20], kernel_of()), NaturalVariationalDistribution, mean_of("constant"))
    likelihood = gaussian()
    natural_step(model, likelihood, x[:20], y[:20])
    first = model.variational_strategy.features
    second = first.following(x[20:], model.covar_module)
    model.variational_strategy.advance(second)
    natural_step(model, likelihood, x[20:], y[20:])

    def kernel(lengthscale: float) -> oracle.Kernel:
        return lambda a, b: 1.6 * torch.exp(-0.5 * ((a[:, None] - b) / lengthscale).square().sum(-1))

    def mean(t: Tensor) -> Tensor:
        return torch.full((len(t),), 0.7, dtype=F64)

    noise = torch.full((20,), 0.1, dtype=F64)
    bases = [oracle.Functionals(f.nodes(), f.weights()) for f in (first, second)]
    dense = oracle.DenseStream(kernel(1.2), bases[0], mean).update(x[:20], y[:20], noise)
    assert dense.old is not None

    def best(lengthscale: float) -> float:
        chunk = (x[20:], y[20:], noise)
        q = oracle.maximiser(kernel(lengthscale), mean, bases[1], chunk, dense.old)
        return oracle.objective(kernel(lengthscale), mean, bases[1], q, chunk, dense.old).item()

    model.train()
    value = 20 * StreamingELBO(likelihood, model)(model(x[20:]), y[20:])
    raw = model.covar_module.base_kernel.raw_lengthscale
    slope = torch.autograd.grad(value, raw)[0].item() / torch.sigmoid(raw).item()
    assert value.item() == pytest.approx(best(1.2), abs=1e-5)
    # The whitened q moves with the lengthscale, but at its best that makes no difference.
    assert slope == pytest.approx((best(1.2001) - best(1.1999)) / 2e-4, abs=1e-2)


@pytest.mark.parametrize("mode", ["keep", "rff"])
def test_a_path_of_another_kind_is_refused(mode: str) -> None:
    x, y = data(20)
    model = Model(path("keep").following(x, kernel_of()), NaturalVariationalDistribution, mean_of("constant"))
    natural_step(model, gaussian(), x, y)
    before = oracle.snapshot(model)
    with pytest.raises(TypeError, match=r"^features: "):
        model.variational_strategy.advance(None.__class__)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^features: expected 8"):
        model.variational_strategy.advance(path("keep", 9).following(x, kernel_of()))
    oracle.assert_identical(model, before)


@pytest.mark.parametrize(("first", "second"), [("keep", "rff"), ("rff", "keep")])
def test_random_features_and_others_do_not_mix(first: str, second: str) -> None:
    x, y = data(20)
    model = Model(path(first).following(x, kernel_of()), NaturalVariationalDistribution, mean_of("constant"))
    natural_step(model, gaussian(), x, y)
    with pytest.raises(ValueError, match=r"^features: "):
        model.variational_strategy.advance(path(second).following(x, kernel_of()))
