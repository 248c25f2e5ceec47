"""Several outputs trained chunk by chunk: GPyTorch's wrappers, with a divergence that remembers the past."""

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.models import ApproximateGP
from gpytorch.variational import CholeskyVariationalDistribution, NaturalVariationalDistribution
from torch import Tensor

from gpseq.features import HippoFeatures
from gpseq.mlls import StreamingELBO
from gpseq.variational import (
    IndependentMultitaskVariationalStrategy,
    InterdomainVariationalStrategy,
    LMCVariationalStrategy,
)
from tests.oracles_streaming import F64, assert_close, draw

TASKS = 3
LENGTHSCALES = torch.tensor([0.8, 1.0, 1.3], dtype=F64)
NOISES = torch.tensor([0.1, 0.2, 0.05], dtype=F64)


class Model(ApproximateGP):
    """A batch of GPs, alone or in a wrapper for several outputs."""

    def __init__(self, wrapper: str = "", batch: tuple[int, ...] = (TASKS,), q: type = NaturalVariationalDistribution):
        features = HippoFeatures(6, 3.0)
        distribution = q(6, batch_shape=torch.Size(batch), mean_init_std=0.0)
        base = InterdomainVariationalStrategy(self, features, distribution, jitter=0.0)
        strategy = base
        if wrapper == "independent":
            strategy = IndependentMultitaskVariationalStrategy(base, num_tasks=TASKS)
        elif wrapper == "lmc":
            strategy = LMCVariationalStrategy(base, num_tasks=4, num_latents=TASKS)
        super().__init__(strategy)
        size = torch.Size(batch)
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=size)
        self.covar_module = ScaleKernel(RBFKernel(batch_shape=size), batch_shape=size)
        self.double()
        self.covar_module.base_kernel.lengthscale = LENGTHSCALES[: batch[-1] if batch else 1].reshape(-1, 1, 1)
        self.base.kl_divergence()

    @property
    def base(self) -> InterdomainVariationalStrategy:
        strategy = self.variational_strategy
        return getattr(strategy, "base_variational_strategy", strategy)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def set_some_q(strategy: InterdomainVariationalStrategy, seed: int) -> None:
    q = strategy._variational_distribution
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*q.shape(), dtype=F64, generator=generator)
    root = 0.2 * torch.randn(*q.shape(), 6, dtype=F64, generator=generator)
    covariance = root @ root.mT + 0.1 * torch.eye(6, dtype=F64)
    q.initialize_variational_distribution(MultivariateNormal(mean, covariance))


@pytest.mark.parametrize("wrapper", ["independent", "lmc"])
def test_the_divergence_is_a_sum_that_knows_the_past(wrapper: str) -> None:
    model = Model(wrapper)
    stock = {
        "independent": gpytorch.variational.IndependentMultitaskVariationalStrategy,
        "lmc": gpytorch.variational.LMCVariationalStrategy,
    }[wrapper]
    set_some_q(model.base, 1)
    kl = model.variational_strategy.kl_divergence()
    assert kl.shape == ()
    assert_close(kl, stock.kl_divergence(model.variational_strategy), 1e-12)
    model.base.advance(HippoFeatures(6, 4.0))
    set_some_q(model.base, 2)
    expected = 0.0
    for i in range(TASKS):
        alone = Model(batch=())
        alone.covar_module.base_kernel.lengthscale = LENGTHSCALES[i]
        for seed in (1, 2):
            many = Model()
            set_some_q(many.base, seed)
            q = many.base.variational_distribution
            alone.base._variational_distribution.initialize_variational_distribution(
                MultivariateNormal(q.mean[i], q.covariance_matrix[i])
            )
            if seed == 1:
                alone.base.advance(HippoFeatures(6, 4.0))
        expected = expected + alone.base.kl_divergence()
    kl = model.variational_strategy.kl_divergence()
    assert kl.shape == ()
    assert_close(kl, model.base.kl_divergence().sum(), 1e-12)
    assert_close(kl, expected, 1e-9)
    # GPyTorch's own would have forgotten.
    assert (kl - stock.kl_divergence(model.variational_strategy)).abs() > 0.1


def test_any_batch_dimension_may_be_the_tasks() -> None:
    for dim, batch, left in ((-1, (2, TASKS), 2), (-2, (TASKS, 2), 2)):
        features = HippoFeatures(6, 3.0)
        model = Model(batch=(1,))
        q = CholeskyVariationalDistribution(6, batch_shape=torch.Size(batch)).double()
        base = InterdomainVariationalStrategy(model, features, q)
        strategy = IndependentMultitaskVariationalStrategy(base, num_tasks=TASKS, task_dim=dim)
        set_some_q(base, 1)
        base.advance()
        set_some_q(base, 2)
        kl = strategy.kl_divergence()
        assert kl.shape == (left,)
        assert_close(kl, base.kl_divergence().sum(dim), 1e-12)


def test_two_chunks_equal_independent_models() -> None:
    together, alone = Model("independent"), [Model(batch=()) for _ in range(TASKS)]
    likelihood = MultitaskGaussianLikelihood(num_tasks=TASKS, has_global_noise=False).double()
    likelihood.task_noises = NOISES
    likelihoods = []
    for i, model in enumerate(alone):
        model.covar_module.base_kernel.lengthscale = LENGTHSCALES[i]
        likelihoods.append(GaussianLikelihood().double())
        likelihoods[i].noise = NOISES[i]
    optimiser = gpytorch.optim.NGD(together.variational_parameters(), num_data=15, lr=1.0)
    for chunk, horizon in enumerate((3.0, 4.0)):
        x = draw(15, horizon, seed=chunk)[0]
        y = torch.stack([draw(15, horizon, seed=10 * chunk + i)[1] for i in range(TASKS)], -1)
        if chunk:
            together.base.advance(HippoFeatures(6, horizon))
            for model in alone:
                model.base.advance(HippoFeatures(6, horizon))
        for _ in range(2):  # the second finds nothing left to do
            optimiser.zero_grad()
            posterior = together.train()(x)
            assert isinstance(posterior, MultitaskMultivariateNormal) and posterior.event_shape == (15, TASKS)
            bound = StreamingELBO(likelihood, together)(posterior, y)
            (-bound).backward()
            optimiser.step()
        assert all(p.grad.abs().max() < 1e-6 for p in together.variational_parameters())
        bounds = []
        for i, model in enumerate(alone):
            step = gpytorch.optim.NGD(model.variational_parameters(), num_data=15, lr=1.0)
            step.zero_grad()
            (-StreamingELBO(likelihoods[i], model)(model.train()(x), y[:, i])).backward()
            step.step()
            bounds.append(StreamingELBO(likelihoods[i], model)(model(x), y[:, i]))
        assert_close(bound, torch.stack(bounds).sum(), 1e-9)
        at = torch.linspace(0, horizon, 9, dtype=F64)
        posterior = together.eval()(at)
        for i, model in enumerate(alone):
            expected = model.eval()(at)
            assert_close(posterior.mean[:, i], expected.mean, 1e-8)
            assert_close(posterior.variance[:, i], expected.variance, 1e-8)


def test_linear_coregionalisation_learns_two_chunks() -> None:
    """Four outputs of three latent functions: the shapes are right, and the first chunk is not forgotten."""
    model = Model("lmc", q=CholeskyVariationalDistribution)
    likelihood = MultitaskGaussianLikelihood(num_tasks=4, has_global_noise=False).double()
    likelihood.task_noises = torch.full((4,), 0.01, dtype=F64)
    strategy = model.variational_strategy
    mixing = torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4).flip(0) + torch.eye(3, 4, dtype=F64)
    strategy.lmc_coefficients.data.copy_(mixing)

    def truth(x: Tensor) -> Tensor:
        return torch.stack([x.sin(), (1.3 * x).cos(), 0.3 * x], -1) @ mixing

    elbo = StreamingELBO(likelihood, model)
    for chunk, horizon in enumerate((3.0, 4.0)):
        if chunk:
            model.base.advance(HippoFeatures(6, horizon))
        x = torch.linspace(3.0 * chunk, horizon, 20, dtype=F64)
        # Mixing and kernels stay: what the past says of the latent functions is said under them.
        optimiser, bounds = torch.optim.Adam(model.variational_parameters(), lr=0.1), []
        for _ in range(60):
            optimiser.zero_grad()
            posterior = model.train()(x)
            assert posterior.event_shape == (20, 4) and posterior.batch_shape == ()
            bound = elbo(posterior, truth(x))
            assert bound.shape == ()
            (-bound).backward()
            optimiser.step()
            bounds.append(bound.item())
        assert bounds[-1] > bounds[0]
    assert_close(strategy.kl_divergence(), model.base.kl_divergence().sum(-1), 1e-12)
    at = torch.linspace(0.2, 3.8, 12, dtype=F64)
    assert (model.eval()(at).mean - truth(at)).abs().max() < 0.2
    one = model(at, task_indices=torch.zeros(12, dtype=torch.long))
    assert one.event_shape == (12,)
    assert_close(one.mean, model(at).mean[:, 0], 1e-10)


def test_saved_with_the_wrapper() -> None:
    model = Model("independent")
    set_some_q(model.base, 1)
    model.base.advance(HippoFeatures(6, 4.0))
    set_some_q(model.base, 2)
    other = Model("independent")
    other.load_state_dict(model.state_dict())
    assert_close(other.variational_strategy.kl_divergence(), model.variational_strategy.kl_divergence(), 1e-12)
    assert other.base.features.horizon == 4.0


def test_bad_arguments_are_named() -> None:
    for build, error, message in (
        (lambda b: IndependentMultitaskVariationalStrategy("b", 3), TypeError, "base_variational_strategy: .* got str"),
        (lambda b: IndependentMultitaskVariationalStrategy(b, 4), ValueError, "num_tasks: expected 3, .* got 4"),
        (lambda b: IndependentMultitaskVariationalStrategy(b, 3.0), TypeError, "num_tasks: expected an integer"),
        (lambda b: IndependentMultitaskVariationalStrategy(b, 3, "last"), TypeError, "task_dim: expected an integer"),
    ):
        with pytest.raises(error, match=message):
            build(Model().base)
