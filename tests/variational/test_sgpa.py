"""SGPAVariationalStrategy against stock GPyTorch at the keys, and in the hands of a user."""

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean, LinearMean, Mean, ZeroMean
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    DeltaVariationalDistribution,
    MeanFieldVariationalDistribution,
    NaturalVariationalDistribution,
    TrilNaturalVariationalDistribution,
    UnwhitenedVariationalStrategy,
    VariationalStrategy,
)
from torch import Tensor

from gpseq.prediction import predict
from gpseq.sgpa import standard_posterior
from gpseq.variational import IndependentMultitaskVariationalStrategy, SGPAVariationalStrategy
from tests.oracles import close

F64 = torch.float64
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
        self, strategy: Callable[[ApproximateGP], Any], mean: Mean | None = None, batch: Batch = (), d: int = 2
    ) -> None:
        super().__init__(strategy(self))
        self.mean_module = LinearMean(d) if mean is None else mean
        shape = torch.Size(batch)
        self.covar_module = ScaleKernel(RBFKernel(d, batch_shape=shape), batch_shape=shape)
        self.double()
        with torch.no_grad():
            spread = torch.rand(self.covar_module.base_kernel.raw_lengthscale.shape, dtype=F64)
            self.covar_module.base_kernel.raw_lengthscale.copy_(spread)
            self.covar_module.raw_outputscale.copy_(torch.rand(batch, dtype=F64))

    def forward(self, x: Tensor, shift: float = 0.0) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x + shift), self.covar_module(x + shift))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_q(size: int, batch: Batch = (), kind: str = "cholesky") -> Any:
    q = DISTRIBUTIONS[kind](size, batch_shape=torch.Size(batch), mean_init_std=0.0).double()
    root = 0.4 * draw(*batch, size, size, seed=1) / size**0.5 + 0.5 * torch.eye(size, dtype=F64)
    q.initialize_variational_distribution(MultivariateNormal(draw(*batch, size, seed=2), root @ root.mT))
    return q


def ready(model: Model) -> Model:
    """Keep the first call from replacing q by the prior."""
    model.variational_strategy.variational_params_initialized.fill_(1)
    return model


def sgpa(points: Tensor, q: Any, jitter: float | None = 0.0, **kwargs: Any) -> Callable:
    return lambda model: SGPAVariationalStrategy(model, points, q, jitter=jitter, **kwargs)


def make(size: int = 5, q_batch: Batch = (), kind: str = "cholesky", **kwargs: Any) -> Model:
    return ready(Model(sgpa(draw(size, 2, seed=9), some_q(size, q_batch, kind)), **kwargs))


def raw_variance(posterior: MultivariateNormal) -> Tensor:
    """The variance as it was computed; ``posterior.variance`` hides what is very small."""
    return posterior.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)


def assert_same(mine: MultivariateNormal, other: MultivariateNormal, tolerance: float, full: bool = True) -> None:
    close(mine.mean, other.mean.expand(mine.mean.shape), tolerance)
    close(raw_variance(mine), raw_variance(other).expand(mine.mean.shape), tolerance)
    if full:
        close(mine.covariance_matrix, other.covariance_matrix.expand(mine.covariance_matrix.shape), tolerance)


# Against stock GPyTorch


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [1, 6])
def test_equals_the_whitened_strategy_at_the_keys(kind: str, size: int) -> None:
    """Whitened mean L'v and the same covariance: stock GPyTorch to 1e-12 in mean, covariance and KL."""
    key, value, x = draw(size, 2), draw(size, seed=1), draw(7, 2, seed=3)
    ours = make(size, kind=kind)
    with torch.no_grad():
        factor = torch.linalg.cholesky(ours.covar_module(key).to_dense())
    q = deepcopy(ours.variational_strategy._variational_distribution)
    if kind == "delta":
        q.variational_mean.data = factor.mT @ value
    else:
        with gpytorch.settings.min_variance(0.0, 0.0, 0.0):
            q.initialize_variational_distribution(MultivariateNormal(factor.mT @ value, q().covariance_matrix.detach()))
    theirs = Model(lambda m: VariationalStrategy(m, key, q, learn_inducing_locations=False, jitter_val=1e-14))
    theirs.mean_module, theirs.covar_module = ours.mean_module, ours.covar_module
    ready(theirs)
    for mode in (True, False):
        mine, other = ours.train(mode)(x, key=key, value=value), theirs.train(mode)(x)
        assert_same(mine, other, 1e-12, full=not mode)
        close(ours.variational_strategy.kl_divergence(), theirs.variational_strategy.kl_divergence(), 1e-12)


def test_equals_the_unwhitened_strategy_with_mean_gram_times_value() -> None:
    key, value, x = draw(5, 2), draw(5, seed=1), draw(7, 2, seed=3)
    ours = make().eval()
    root = ours.variational_strategy._variational_distribution.chol_variational_covar.detach().tril()
    with torch.no_grad():
        gram, offset = ours.covar_module(key).to_dense(), ours.mean_module(key)
    q = CholeskyVariationalDistribution(5).double()
    q.variational_mean.data = gram @ value + offset  # stock's u carries the mean function
    q.chol_variational_covar.data = torch.linalg.cholesky(gram) @ root
    theirs = Model(lambda m: UnwhitenedVariationalStrategy(m, key, q, learn_inducing_locations=False, jitter_val=1e-14))
    theirs.mean_module, theirs.covar_module = ours.mean_module, ours.covar_module
    assert_same(ours(x, key=key, value=value), ready(theirs).eval()(x), 1e-12)
    # Stock adds 1e-3 to the diagonal of this prior, so its q is compared with the prior that it means.
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(q.variational_mean, scale_tril=q.chol_variational_covar),
        torch.distributions.MultivariateNormal(offset, gram),
    )
    close(ours.variational_strategy.kl_divergence(), kl, 1e-12)


def test_without_a_value_it_is_an_ordinary_svgp() -> None:
    """State dicts of the stock strategy load, and the posteriors are the same."""
    points, x = draw(5, 2), draw(7, 2, seed=3)
    theirs = ready(Model(lambda m: VariationalStrategy(m, points, some_q(5), jitter_val=1e-14)))
    ours = Model(sgpa(draw(5, 2, seed=7), CholeskyVariationalDistribution(5).double()))
    ours.load_state_dict(theirs.state_dict())
    for mode in (True, False):
        assert_same(ours.train(mode)(x), theirs.train(mode)(x), 1e-12, full=not mode)
        close(ours.variational_strategy.kl_divergence(), theirs.variational_strategy.kl_divergence(), 1e-12)
    with_value = ours(x, value=draw(5, seed=4))
    close(raw_variance(with_value), raw_variance(ours(x)), 1e-12)


@pytest.mark.parametrize("q_batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("kernel_batch", [(), (3,), (2, 1)], ids=str)
def test_a_batch_is_a_loop(q_batch: Batch, kernel_batch: Batch) -> None:
    """Keys, values and queries have batch shapes of their own; every posterior is that of one model alone."""
    model = make(4, q_batch, batch=kernel_batch).eval()
    key, value, x = draw(2, 1, 4, 2), draw(2, 3, 4, seed=1), draw(2, 1, 5, 2, seed=2)
    mask = torch.tensor([[[False] * 4], [[False, True, False, True]]])
    posterior = model(x, key=key, value=value, key_padding_mask=mask)
    kl = model.variational_strategy.kl_divergence()
    assert posterior.batch_shape == (2, 3) and kl.shape == (2, 3)
    full = torch.Size([2, 3])
    covar = model.covar_module
    for b, d in product(range(2), range(3)):
        single = make(4)
        q, own = single.variational_strategy._variational_distribution, model.variational_strategy
        batched = own._variational_distribution
        q.chol_variational_covar.data = batched.chol_variational_covar.expand(*full, 4, 4)[b, d].detach()
        single.mean_module = model.mean_module
        single.covar_module.raw_outputscale.data = covar.raw_outputscale.expand(full)[b, d].detach()
        raw = covar.base_kernel.raw_lengthscale.expand(*full, 1, 2)
        single.covar_module.base_kernel.raw_lengthscale.data = raw[b, d].detach()
        one = single.eval()(x[b, 0], key=key[b, 0], value=value[b, d], key_padding_mask=mask[b, 0])
        close(posterior.mean[b, d], one.mean, 1e-12)
        close(posterior.covariance_matrix[b, d], one.covariance_matrix, 1e-12)
        close(kl[b, d], single.variational_strategy.kl_divergence(), 1e-12)


def test_equals_the_pure_function() -> None:
    """One mathematics: `gpseq.sgpa.standard_posterior`, with heads and output dimensions, padding included."""
    B, H, D, T = 2, 2, 3, 4
    tokens, values = draw(B, H, T, 2, seed=3), draw(B, H, T, D, seed=8)
    padding = torch.tensor([[False] * 4, [False, False, True, False]])
    model = make(T, (H, D), batch=(H, 1), mean=ZeroMean()).eval()
    x, kernel = tokens[:, :, None], model.covar_module
    q = model.variational_strategy._variational_distribution
    with torch.no_grad():
        posterior = model(x, key=x, value=values.mT, key_padding_mask=padding[:, None, None])
        expected = standard_posterior(
            tokens.clone(),  # a query that is the key would be masked as well
            tokens,
            values,
            q.chol_variational_covar.tril(),
            kernel.base_kernel.lengthscale[:, 0, 0],
            kernel.outputscale[:, 0],
            key_padding_mask=padding,
            jitter=0.0,
            output="full",
        )
        close(posterior.mean.mT, expected.mean, 1e-11)
        close(posterior.covariance_matrix, expected.covariance, 1e-11)
        kl = model.variational_strategy.kl_divergence()
        close(kl, (expected.kl_global + expected.kl_amortised).expand(kl.shape), 1e-11)


# Masks


@pytest.mark.parametrize("kind", ["cholesky", "delta"])
def test_masked_keys_are_removed(kind: str) -> None:
    """NaN in the padding, in values and gradients, does not leak; what is left is the strategy on fewer keys."""
    mask = torch.tensor([False, True, False, False, True])
    key, value, x = draw(5, 2), draw(5, seed=1), draw(7, 2, seed=3)
    key[mask], value[mask] = torch.nan, torch.inf
    model = Model(sgpa(draw(5, 2, seed=9), some_q(5, kind=kind), jitter=1e-3))
    small = make(3, kind=kind)
    q, own = small.variational_strategy._variational_distribution, model.variational_strategy._variational_distribution
    if kind == "cholesky":
        q.chol_variational_covar.data = own.chol_variational_covar.detach().tril()[~mask][:, ~mask]
    small.variational_strategy._jitter_val = 1e-3
    small.mean_module, small.covar_module = model.mean_module, model.covar_module
    ready(model)
    for mode in (True, False):
        posterior = model.train(mode)(x, key=key, value=value, key_padding_mask=mask)
        expected = small.train(mode)(x, key=key[~mask], value=value[~mask])
        assert_same(posterior, expected, 1e-12, full=not mode)
        close(model.variational_strategy.kl_divergence(), small.variational_strategy.kl_divergence(), 1e-12)
    (posterior.mean.sum() + model.variational_strategy.kl_divergence()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_all_keys_masked_is_the_prior() -> None:
    model, x = make().eval(), draw(7, 2, seed=3)
    nothing = torch.full((5, 2), torch.nan, dtype=F64)
    posterior = model(x, key=nothing, value=nothing[:, 0], key_padding_mask=torch.ones(5, dtype=torch.bool))
    assert_same(posterior, model(x, prior=True), 1e-12)
    assert model.variational_strategy.kl_divergence().abs() < 1e-14


def test_a_mask_without_a_key_or_value() -> None:
    model, x, mask = make().eval(), draw(7, 2, seed=3), torch.tensor([True, False, False, False, False])
    masked = model(x, key_padding_mask=mask)
    kl = model.variational_strategy.kl_divergence()
    assert kl < (model(x), model.variational_strategy.kl_divergence())[1]
    assert not torch.allclose(masked.mean, model(x).mean)


# In the hands of a user


def test_learns_an_amortised_posterior(dtype: torch.dtype) -> None:
    """The value comes from a network, the bound from VariationalELBO, and it stays below the evidence."""
    x = torch.linspace(-2, 2, 12, dtype=dtype)[:, None]
    y = torch.sin(2 * x).squeeze(-1)
    q = CholeskyVariationalDistribution(12)
    strategy = sgpa(torch.zeros(12, 1), q, jitter=None, learn_inducing_locations=False)
    model = Model(strategy, ConstantMean(), d=1).to(dtype)
    net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(dtype)
    likelihood = GaussianLikelihood().to(dtype)
    mll = VariationalELBO(likelihood, model, num_data=12)
    optimizer = torch.optim.Adam([*model.parameters(), *net.parameters(), *likelihood.parameters()], lr=0.05)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        output = model.train()(x, key=x, value=net(x).squeeze(-1))
        assert output.mean.dtype == dtype
        elbo = mll(output, y)
        (-elbo).backward()
        optimizer.step()
        history.append(12 * elbo.item())
        with torch.no_grad():
            evidence = likelihood(model.forward(x.double())).log_prob(y.double()).item() if dtype == F64 else 1e9
        if dtype == F64:
            with torch.no_grad():
                bound = 12 * mll(model(x, key=x, value=net(x).squeeze(-1)), y).item()
            assert bound <= evidence + 1e-9
    assert history[-1] > history[0] + 2


def test_several_outputs() -> None:
    """x (B, 1, T, d), q (D): one kernel for D outputs, as a multitask distribution."""
    q = some_q(4, (3,))
    model = ready_wrapped(Model(lambda m: IndependentMultitaskVariationalStrategy(sgpa(draw(4, 2), q)(m), num_tasks=3)))
    x, value = draw(2, 1, 4, 2, seed=5), draw(2, 3, 4, seed=6)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=3).double()
    base = model.variational_strategy.base_variational_strategy
    for mode in (True, False):
        posterior = model.train(mode)(x, key=x, value=value)
        assert isinstance(posterior, MultitaskMultivariateNormal)
        assert posterior.batch_shape == (2,) and posterior.event_shape == (4, 3)
        alone = base(x, key=x, value=value, diag=False)
        close(posterior.mean, alone.mean.mT, 1e-12)
        close(posterior.variance, alone.variance.mT, 1e-12)
        kl = model.variational_strategy.kl_divergence()
        assert kl.shape == (2,)
        close(kl, base.kl_divergence().sum(-1), 1e-12)
    elbo = VariationalELBO(likelihood, model.train(), num_data=4)(model(x, key=x, value=value), draw(2, 4, 3))
    assert elbo.shape == (2,)
    elbo.sum().backward()


def ready_wrapped(model: Model) -> Model:
    model.variational_strategy.base_variational_strategy.variational_params_initialized.fill_(1)
    return model


def test_float32_is_rounded_float64() -> None:
    model = make(5)
    low = deepcopy(model).float()
    exact = deepcopy(low).double()
    arguments = {"key": draw(5, 2, dtype=torch.float32), "value": draw(5, seed=1, dtype=torch.float32)}
    x = draw(7, 2, seed=3, dtype=torch.float32)
    for mode in (True, False):
        mine = low.train(mode)(x, **arguments)
        kl = low.variational_strategy.kl_divergence()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = low(x, **arguments)
            close(low.variational_strategy.kl_divergence(), kl, 1e-7)
        other = exact.train(mode)(x.double(), **{name: v.double() for name, v in arguments.items()})
        assert mine.mean.dtype == raw_variance(mine).dtype == kl.dtype == torch.float32
        assert_same(mine, other, 1e-6)
        assert_same(cast, other, 1e-6)
        close(kl, exact.variational_strategy.kl_divergence(), 1e-6)


def test_nothing_is_cached() -> None:
    model, x = make().eval(), draw(7, 2, seed=3)
    arguments = {"key": draw(5, 2), "value": draw(5, seed=1)}
    strategy = model.variational_strategy
    gradients = []
    for _ in range(2):
        model.zero_grad()
        posterior = model(x, **arguments)
        for _ in range(2):
            strategy.kl_divergence().backward()
        (posterior.mean.sum() + posterior.covariance_matrix.sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
    before, kl = model(x, **arguments), strategy.kl_divergence()
    model.covar_module.base_kernel.lengthscale = 0.3
    now = model(x, **arguments)
    assert not torch.allclose(now.mean, before.mean) and not torch.allclose(strategy.kl_divergence(), kl)
    fresh = deepcopy(model)
    assert_same(now, fresh(x, **arguments), 1e-15)


def test_copies_and_files() -> None:
    model, x = make().eval(), draw(7, 2, seed=3)
    value = draw(5, seed=1).requires_grad_().sin()  # hangs on a graph
    arguments = {"key": draw(5, 2), "value": value}
    expected = model(x, **arguments)
    kl = model.variational_strategy.kl_divergence()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = Model(sgpa(torch.zeros(5, 2), CholeskyVariationalDistribution(5))).eval()
    loaded.load_state_dict(torch.load(buffer))
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert other.variational_strategy.model is other
        assert_same(other(x, **arguments), expected, 1e-14)
        close(other.variational_strategy.kl_divergence(), kl, 1e-14)
    # A copy does not know the arguments of the call, and has no other divergence to offer; nor has what was loaded.
    model.load_state_dict(model.state_dict())
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with pytest.raises(RuntimeError, match="last call brought arguments of its own, and they are forgotten"):
            other.variational_strategy.kl_divergence()


def test_prior_keywords_and_the_kl_of_the_last_call() -> None:
    model, x = make().eval(), draw(7, 2, seed=3)
    arguments = {"key": draw(5, 2), "value": draw(5, seed=1)}
    prior = model(x, prior=True, shift=0.5, **arguments)
    close(prior.mean, model.forward(x, shift=0.5).mean, 1e-15)
    strategy = model.variational_strategy
    own = strategy.kl_divergence()
    model(x, **arguments)
    called = strategy.kl_divergence()
    assert not torch.allclose(own, called)
    model(x, shift=3.0, **arguments)
    close(strategy.kl_divergence(), called, 1e-12)  # a stationary kernel
    model(x)
    close(strategy.kl_divergence(), own, 1e-15)
    for change in (model.train, model.eval):
        model(x, **arguments)
        change()
        with pytest.raises(RuntimeError, match="last call brought arguments of its own, and they are forgotten"):
            strategy.kl_divergence()
    model(x)
    model.train()
    close(strategy.kl_divergence(), own, 1e-15)  # that call brought none


@pytest.mark.parametrize("training", [True, False])
def test_a_prediction_leaves_the_kl_as_it_was(training: bool) -> None:
    model, x = make().train(training), draw(7, 2, seed=3)
    strategy = model.variational_strategy
    model(x, key=draw(5, 2), value=draw(5, seed=1))
    kl = strategy.kl_divergence()
    predict(model, x, "moments", key=draw(5, 2, seed=4), value=draw(5, seed=5))
    predict(model, x, num_samples=2)
    assert torch.equal(strategy.kl_divergence(), kl)


def test_the_first_call_sets_q_to_the_prior() -> None:
    model = Model(sgpa(draw(5, 2), CholeskyVariationalDistribution(5, mean_init_std=0.0).double())).eval()
    x = draw(7, 2, seed=3)
    q = model.variational_strategy._variational_distribution
    q.chol_variational_covar.data.mul_(3.0)
    assert_same(model(x), model(x, prior=True), 1e-9)
    assert model.variational_strategy.kl_divergence() == 0
    assert model.variational_strategy.variational_params_initialized == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(4, 3)}, ValueError, r"x: expected at least one point, .*2\), got shape \(4, 3\)"),
        ({"x": torch.zeros(0, 2)}, ValueError, r"x: expected at least one point"),
        ({"x": torch.arange(4)}, TypeError, r"x: expected a floating-point tensor, got torch.int64"),
        ({"x": torch.full((4, 2), torch.nan)}, ValueError, r"x: expected finite numbers"),
        ({"x": torch.zeros(2, 4, 2)}, ValueError, r"x: expected batch shapes that broadcast, got x \(2,\)"),
        ({"value": None}, ValueError, r"value: expected coefficients for the given key, got None"),
        ({"key": torch.zeros(4, 2)}, ValueError, r"key: expected 5, as there are inducing points.*\(4, 2\)"),
        ({"key": torch.zeros(5, 3)}, ValueError, r"key: expected .*2\), got shape \(5, 3\)"),
        ({"key": torch.full((5, 2), torch.inf)}, ValueError, r"key: expected finite numbers"),
        ({"key": 3}, TypeError, r"key: expected a floating-point tensor, got int"),
        ({"value": torch.zeros(4)}, ValueError, r"value: expected \(\*batch, 5\), one a point, got shape \(4,\)"),
        ({"value": torch.zeros(7, 5)}, ValueError, r"expected batch shapes that broadcast.*value \(7,\)"),
        ({"value": torch.full((5,), torch.nan)}, ValueError, r"value: expected finite numbers"),
        ({"key_padding_mask": torch.zeros(5)}, TypeError, r"key_padding_mask: expected a boolean.*float32"),
        ({"key_padding_mask": [True]}, TypeError, r"key_padding_mask: expected a boolean.*list"),
        ({"key_padding_mask": torch.zeros(4, dtype=torch.bool)}, ValueError, r"key_padding_mask: .*got shape \(4,\)"),
    ],
)
def test_bad_calls_are_named_and_change_nothing(arguments: dict, error: type[Exception], message: str) -> None:
    model = make(5, (3,))
    good = {"x": draw(4, 2), "key": draw(5, 2), "value": draw(5)}
    model(**{"inputs" if name == "x" else name: v for name, v in good.items()})
    kl, state = model.variational_strategy.kl_divergence(), deepcopy(model.state_dict())
    bad = {"inputs" if name == "x" else name: v for name, v in (good | arguments).items()}
    if bad["inputs"].dim() == 1:
        bad["inputs"] = bad["inputs"][:, None].expand(-1, 2)
    with pytest.raises(error, match=message):
        model(**bad)
    assert torch.equal(model.variational_strategy.kl_divergence(), kl)
    assert all(torch.equal(v, state[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inducing_points": torch.zeros(0, 2)}, ValueError, r"inducing_points: expected at least one point"),
        ({"inducing_points": [1.0]}, TypeError, r"inducing_points: expected a floating-point tensor, got list"),
        ({"inducing_points": torch.full((4, 1), torch.nan)}, ValueError, r"inducing_points: expected finite"),
        ({"variational_distribution": 4}, TypeError, r"variational_distribution: expected .*got int"),
        (
            {"variational_distribution": CholeskyVariationalDistribution(5)},
            ValueError,
            r"variational_distribution: expected one over 4 numbers.*got 5",
        ),
        ({"jitter": -1.0}, ValueError, r"jitter: "),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    good = {"inducing_points": torch.zeros(4, 1), "variational_distribution": CholeskyVariationalDistribution(4)}
    with pytest.raises(error, match=message):
        Model(lambda m: SGPAVariationalStrategy(m, **(good | arguments)))


@pytest.mark.cuda
def test_on_a_gpu(dtype: torch.dtype) -> None:
    model = make().to(dtype).eval()
    x, arguments = draw(7, 2, dtype=dtype), {"key": draw(5, 2, dtype=dtype), "value": draw(5, dtype=dtype)}
    expected, kl = model(x, **arguments), model.variational_strategy.kl_divergence()
    other = deepcopy(model).cuda()
    mine = other(x.cuda(), **{name: v.cuda() for name, v in arguments.items()})
    tolerance = 1e-10 if dtype == F64 else 1e-5
    close(mine.mean.cpu(), expected.mean, tolerance)
    close(mine.covariance_matrix.cpu(), expected.covariance_matrix, tolerance)
    close(other.variational_strategy.kl_divergence().cpu(), kl, tolerance)
