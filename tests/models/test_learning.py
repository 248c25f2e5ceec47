"""Hyperparameters that follow a stream: the objective against the dense oracle, and what may and may not move."""

import copy
import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    PoissonLikelihood,
)
from gpytorch.means import ConstantMean
from torch import Tensor

from gpseq.features import HippoFeatures, InducingFeatures, PyramidFeatures
from gpseq.features.path import PathFeatures
from gpseq.models import StreamingGP, fit_hyperparameters, learning
from gpseq.models.observations import check_observations
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_identical, draw, gpytorch_kernel, snapshot, stream

# Small memories on purpose; tests/models/test_horizon.py is about capacity.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

START = (1.1, 1.4, 0.3, 0.4)  # lengthscale, outputscale, noise, mean


def constant(value: float) -> oracle.Mean:
    return lambda t: torch.full_like(t, value)


def constant_mean(value: float = 0.0) -> ConstantMean:
    mean = ConstantMean().double()
    mean.constant.data.fill_(value)
    return mean


def begun(values: tuple[float, ...] = START, order: int = 6, **options: Any) -> tuple[StreamingGP, oracle.DenseStream]:
    """A stream that has seen a chunk on [0, 4], and the same by the oracle."""
    lengthscale, outputscale, noise, level = values
    model = stream(
        order,
        4.0,
        lengthscale=lengthscale,
        outputscale=outputscale,
        noise=noise,
        mean_module=constant_mean(level),
        jitter=0.0,
        **options,
    )
    dense = oracle.DenseStream(oracle.rbf(lengthscale, outputscale), oracle.legs(order, 4.0), constant(level))
    x, y = draw(20, 4.0)
    return model.update(x, y), dense.update(x, y, torch.full_like(x, noise))


def learn(model: StreamingGP, x: Tensor, y: Tensor, features: InducingFeatures | None = None, **options: Any) -> float:
    data = check_observations(model.state, 1, model.likelihood, x, y, options.pop("given", None), "error")
    modules = (model.covar_module, model.mean_module, model.likelihood)
    return learning.learn_from(data, model.state, features or model.features, *modules, jitter=0.0, **options)


def values_of(kernel: Any, likelihood: Any, mean: Any) -> tuple[float, ...]:
    noise = likelihood.noise.item() if isinstance(likelihood, GaussianLikelihood) else math.nan
    return kernel.base_kernel.lengthscale.item(), kernel.outputscale.item(), noise, mean.constant.item()


def hyperparameters(model: StreamingGP) -> tuple[float, ...]:
    return values_of(model.covar_module, model.likelihood, model.mean_module)


def gaussian_objective(
    old: oracle.Old, basis: oracle.Functionals, x: Tensor, y: Tensor
) -> Callable[[tuple[float, ...]], float]:
    def value(values: tuple[float, ...]) -> float:
        kernel, mean = oracle.rbf(values[0], values[1]), constant(values[3])
        data = (x, y, torch.full_like(x, values[2]))
        q = oracle.maximiser(kernel, mean, basis, data, old)
        return oracle.objective(kernel, mean, basis, q, data, old).item()

    return value


def poisson_objective(
    old: oracle.Old, basis: oracle.Functionals, x: Tensor, y: Tensor
) -> Callable[[tuple[float, ...]], float]:
    """The four terms for counts with GPyTorch's link, the softplus, maximised over all Gaussian q."""
    nothing = torch.zeros(0, dtype=F64)
    nodes, hermite = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(24))
    hermite = hermite / hermite.sum()

    size = len(basis.weights)
    # Each search begins where the last one ended.
    m, T = torch.zeros(size, dtype=F64, requires_grad=True), torch.zeros(size, size, dtype=F64, requires_grad=True)

    def value(values: tuple[float, ...]) -> float:
        kernel, mean = oracle.rbf(values[0], values[1]), constant(values[3])
        prior = basis.prior(kernel, mean)
        root = torch.linalg.cholesky(prior.covariance)

        def loss() -> Tensor:
            spread = root @ (T.tril(-1) + T.diagonal().exp().diag())
            q = oracle.Gaussian(prior.mean + root @ m, spread @ spread.mT)
            f = oracle.conditional(kernel, mean, basis, q, oracle.at_points(x))
            rates = torch.nn.functional.softplus(f.mean + f.variance.sqrt() * nodes[:, None])
            counts = hermite @ (y * rates.log() - rates) - torch.lgamma(y + 1)
            rest = oracle.objective(kernel, mean, basis, q, (nothing, nothing, nothing), old)
            return -(counts.sum() + rest)

        optimiser = torch.optim.LBFGS(
            [m, T], max_iter=150, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            result = loss()
            result.backward()
            return result

        optimiser.step(closure)
        return -loss().item()

    return value


def of_old(dense: oracle.DenseStream) -> oracle.Old:
    assert dense.old is not None
    return dense.old


def slopes(value: Callable[[tuple[float, ...]], float], at: tuple[float, ...], which: list[int]) -> list[float]:
    step, result = 1e-4, []
    for i in which:
        up, down = list(at), list(at)
        up[i], down[i] = up[i] + step, down[i] - step
        result.append((value(tuple(up)) - value(tuple(down))) / (2 * step))
    return result


def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The objective and the modules that `learn_from` hands to its search."""
    seen: list[Any] = []

    def instead(
        objective: Any, modules: Any, steps: int, rate: float, unit: float, drift: Any
    ) -> tuple[float, list[Tensor]]:
        seen.extend([objective, modules])
        return 0.0, [scale.read() for scale in learning.scales_of(modules)]

    monkeypatch.setattr(learning, "_ascend", instead)
    return seen


BASES = {"same": (6, 4.0), "stretched": (6, 7.0), "other order": (4, 5.0)}
COUNTS = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 0.0, 1.0, 1.0, 4.0, 2.0, 0.0, 1.0], dtype=F64)


@pytest.mark.parametrize(
    ("name", "counts", "moved"),
    [(name, False, moved) for name in BASES for moved in (False, True)]
    # One search over q for each kind of basis is enough.
    + [(name, True, name == "stretched") for name in BASES],
)
def test_the_objective_is_the_best_of_the_four_terms(
    name: str, counts: bool, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value up to the evidence of the past, and slope in every hyperparameter, wherever the search may be."""
    model, dense = begun()
    order, horizon = BASES[name]
    x = draw(12, horizon, seed=3)[0]
    y = COUNTS if counts else draw(12, horizon, seed=3)[1]
    if counts:
        model.likelihood = PoissonLikelihood()
    seen = captured(monkeypatch)
    learn(model, x, y, HippoFeatures(order, horizon))
    objective, (kernel, mean, likelihood) = seen
    here = START
    if moved:
        here = (1.25, 1.2, 0.36, 0.1)
        mean.constant.data.fill_(here[3])
        kernel.base_kernel.lengthscale = torch.tensor(here[0], dtype=F64)
        kernel.outputscale = torch.tensor(here[1], dtype=F64)
        if not counts:
            likelihood.noise = torch.tensor(here[2], dtype=F64)
    value = (poisson_objective if counts else gaussian_objective)(of_old(dense), oracle.legs(order, horizon), x, y)
    parameters = {
        0: kernel.base_kernel.raw_lengthscale,
        1: kernel.raw_outputscale,
        2: None if counts else likelihood.noise_covar.raw_noise,
        3: mean.raw_constant if hasattr(mean, "raw_constant") else mean.constant,
    }
    which = [0, 1, 3] if counts else [0, 1, 2, 3]
    result = objective()
    assert result.item() - dense.evidence.item() == pytest.approx(value(here), abs=2e-6)
    gradients = torch.autograd.grad(result, [parameters[i] for i in which])
    constraints = {
        0: kernel.base_kernel.raw_lengthscale_constraint,
        1: kernel.raw_outputscale_constraint,
        2: None if counts else likelihood.noise_covar.raw_noise_constraint,
    }
    for i, gradient, slope in zip(which, gradients, slopes(value, here, which), strict=True):
        raw = parameters[i].detach().clone().requires_grad_()
        actual = constraints[i].transform(raw) if constraints.get(i) is not None else raw
        scale = torch.autograd.grad(actual.sum(), raw)[0].item()
        assert gradient.item() / scale == pytest.approx(slope, rel=2e-4, abs=2e-4), f"hyperparameter {i}"


@pytest.mark.parametrize("name", BASES)
def test_the_gain_is_that_of_the_oracle_and_never_negative(name: str) -> None:
    for rate in (0.01, 0.1):
        model, dense = begun()
        order, horizon = BASES[name]
        x, y = draw(15, horizon, seed=5)
        value = gaussian_objective(of_old(dense), oracle.legs(order, horizon), x, y)
        before = hyperparameters(model)
        gain = learn(model, x, y, HippoFeatures(order, horizon), rate=rate)
        assert gain >= 0.0
        assert value(hyperparameters(model)) - value(before) == pytest.approx(gain, abs=5e-6)
        if rate == 0.01:
            assert gain > 0.01


@pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.NumericalWarning")
def test_steps_that_are_far_too_long_lose_nothing() -> None:
    for rate in (1.0, 30.0):
        model, dense = begun()
        x, y = draw(15, 7.0, seed=5)
        value = gaussian_objective(of_old(dense), oracle.legs(6, 7.0), x, y)
        assert learn(model, x, y, HippoFeatures(6, 7.0), rate=rate) >= 0.0
        assert value(hyperparameters(model)) > value(START) - 1e-4


def test_a_bernoulli_bound_rises_across_a_change_of_basis() -> None:
    model = stream(10, 4.0, mean_module=constant_mean())
    model.likelihood = BernoulliLikelihood()
    x = draw(40, 8.0)[0].sort().values
    y = (x.sin() > 0).double()
    model.update(x[:20], y[:20])
    before = hyperparameters(model)
    assert learn(model, x[20:], y[20:], HippoFeatures(10, 8.0)) > 0.01
    assert hyperparameters(model)[:2] != before[:2]


def test_priors_on_hyperparameters_count() -> None:
    model, _ = begun()
    model.covar_module.base_kernel.register_prior("tight", gpytorch.priors.NormalPrior(3.0, 0.01), "lengthscale")
    model.double()
    x, y = draw(15, 4.0, seed=5)
    twin, dense = begun()
    assert learn(model, x, y, steps=60, rate=0.1) > 1000
    assert model.covar_module.base_kernel.lengthscale.item() == pytest.approx(3.0, abs=0.05)
    learn(twin, x, y, steps=60, rate=0.1)
    assert twin.covar_module.base_kernel.lengthscale.item() < 2.5
    assert dense.old is not None


def test_what_requires_no_gradient_stays_and_the_rest_moves() -> None:
    model, _ = begun()
    model.covar_module.raw_outputscale.requires_grad_(False)
    model.likelihood.raw_noise.requires_grad_(False)
    before = snapshot(model)
    learn(model, *draw(15, 4.0, seed=5))
    now = snapshot(model)
    assert torch.equal(now["covar_module.raw_outputscale"], before["covar_module.raw_outputscale"])
    assert torch.equal(now["likelihood.noise_covar.raw_noise"], before["likelihood.noise_covar.raw_noise"])
    assert not torch.equal(
        now["covar_module.base_kernel.raw_lengthscale"], before["covar_module.base_kernel.raw_lengthscale"]
    )


def test_nothing_to_learn_is_no_gain() -> None:
    model, _ = begun()
    model.requires_grad_(False)
    before = snapshot(model)
    assert learn(model, *draw(15, 4.0, seed=5)) == 0.0
    assert_identical(model, before)


def test_modules_keep_their_dtype_and_gradients(dtype: torch.dtype) -> None:
    model = stream(10, 4.0, dtype=dtype, mean_module=constant_mean().to(dtype), learn="basis_change")
    x, y = draw(60, 8.0, dtype=dtype)
    x, order = x.sort()
    y = y[order]
    model.update(x[:20], y[:20])
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = None if i == 0 else torch.full_like(parameter, float(i))
    before = snapshot(model)
    model.update(x[20:], y[20:])
    for i, parameter in enumerate(model.parameters()):
        assert parameter.dtype == dtype and parameter.requires_grad
        assert parameter.grad is None if i == 0 else bool((parameter.grad == float(i)).all())
    changed = [name for name, value in snapshot(model).items() if value.shape == before[name].shape]
    assert any("raw_lengthscale" in name and not torch.equal(before[name], snapshot(model)[name]) for name in changed)


# Through the model


def parameters(model: StreamingGP) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def unchanged(model: StreamingGP, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_the_warm_up_is_fit_hyperparameters_and_happens_once() -> None:
    x, y = draw(80, 10.0)
    model = stream(20, 10.0, mean_module=constant_mean(), learn="warmup")
    kernel, likelihood, mean = gpytorch_kernel(), GaussianLikelihood().double(), constant_mean()
    likelihood.noise = torch.tensor(0.1, dtype=F64)
    torch.manual_seed(3)
    model.update(x[:50], y[:50])
    torch.manual_seed(3)
    fit_hyperparameters(x[:50], y[:50], kernel, likelihood, mean)
    assert hyperparameters(model) == values_of(kernel, likelihood, mean)
    before = parameters(model)
    model.update(x[50:], 5 * y[50:])
    model.update(x[50:] + 10.0, y[50:])
    assert unchanged(model, before)
    # The first chunk, too, is seen with what was learnt from it.
    frozen = StreamingGP(HippoFeatures(20, 10.0), kernel, likelihood, mean)
    frozen.update(x[:50], y[:50]).update(x[50:], 5 * y[50:]).update(x[50:] + 10.0, y[50:])
    oracle.assert_close(frozen.log_evidence, model.log_evidence, 1e-9)


def test_an_empty_chunk_is_no_warm_up() -> None:
    x, y = draw(40, 10.0)
    model = stream(20, 10.0, learn="warmup")
    before = parameters(model)
    model.update(x[:0], y[:0])
    model.update(x[:3], y[:3] * math.nan, missing="skip")
    assert unchanged(model, before)
    model.update(x, y)
    assert not unchanged(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PoissonLikelihood, BernoulliLikelihood])
def test_a_warm_up_by_the_bound_raises_the_bound(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamingGP._warm_up_by_bound, "__defaults__", (8, 0.2))  # steps and rate; 400 take long
    x = draw(40, 10.0)[0]
    rate = torch.exp(1.5 * x.sin())
    y = torch.poisson(rate) if kind is PoissonLikelihood else (rate > 1).double()
    models = [
        StreamingGP(HippoFeatures(12, 10.0), gpytorch_kernel(4.0, 0.3), kind(), constant_mean(), learn=learn)
        for learn in ("never", "warmup")
    ]
    values = [model.update(x, y).log_evidence.item() for model in models]
    assert values[1] > values[0] + 0.5
    before = parameters(models[1])
    models[1].update(x + 8.0, y)
    assert unchanged(models[1], before)
    fitted = StreamingGP(HippoFeatures(12, 10.0), gpytorch_kernel(4.0, 0.3), kind(), constant_mean())
    gain = fitted.fit_hyperparameters(x, y)
    assert all(torch.equal(value, before[name]) for name, value in fitted.named_parameters())
    assert gain == pytest.approx(values[1] - values[0], abs=1e-3)


@pytest.mark.parametrize("growth", [1.25, None])
def test_hyperparameters_move_at_basis_changes_only_and_a_little(growth: float | None) -> None:
    x, y = draw(120, 12.0)
    x, order = x.sort()
    y = 3 * y[order]  # so that there is something to learn
    model = stream(30, 6.0, learn="basis_change", horizon_growth=growth, mean_module=constant_mean())
    model.update(x[:40], y[:40])
    moved = []
    for a, b in zip(x[40:].split(10), y[40:].split(10), strict=True):
        basis, before, values = model.features, parameters(model), hyperparameters(model)
        model.update(a, b)
        changed = model.features is not basis
        assert changed != unchanged(model, before)
        moved.append(changed)
        for now, then in zip(hyperparameters(model)[:3], values[:3], strict=True):
            assert abs(math.log(now / then)) < 0.25
    assert any(moved) and (growth is None or not all(moved))


def test_the_belief_is_carried_to_what_was_learnt() -> None:
    """After a learning update the stream is the four-term oracle under the values learnt."""
    model, dense = begun(learn="never")
    model.learn = "basis_change"
    x, y = draw(20, 8.0, seed=7)
    model.horizon_growth = None
    model.update(x, y)
    lengthscale, outputscale, noise, level = hyperparameters(model)
    assert lengthscale != START[0]
    dense.update(
        x,
        y,
        torch.full_like(x, noise),
        kernel=oracle.rbf(lengthscale, outputscale),
        mean=constant(level),
        basis=oracle.legs(6, model.features.horizon),
    )
    at = torch.linspace(0.0, 8.0, 9, dtype=F64)
    oracle.assert_posterior(model, dense.predict(at), at, 1e-6)
    oracle.assert_close(model.log_evidence, dense.evidence, 1e-5)


# Failures


class Broken(gpytorch.kernels.RBFKernel):
    """NaN where told, or wherever the lengthscale is not what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.broken, self.only = False, None

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        covariance = super().forward(x1, x2, diag=diag, **params)
        away = self.only is not None and abs(self.lengthscale.item() - self.only) > 1e-4
        return covariance * math.nan if self.broken or away else covariance


def breakable(**options: Any) -> StreamingGP:
    likelihood = GaussianLikelihood().double()
    return StreamingGP(HippoFeatures(10, 4.0), Broken().double(), likelihood, constant_mean(), **options)


@pytest.mark.parametrize("learn", ["warmup", "basis_change"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("failure", ["huge", "nan", "fixed", "kernel"])
def test_a_failing_update_restores_everything(learn: str, first: bool, failure: str) -> None:
    x, y = draw(20, 4.0)
    model = breakable(learn=learn, horizon_growth="fixed" if failure == "fixed" else None)
    if not first:
        model.update(x, y)
    else:
        y = y + 1.0
    before, features = snapshot(model), model.features
    twin = copy.deepcopy(model)
    later, error = x + 3.0, (ValueError, RuntimeError)
    targets = {"huge": y * 1e200, "nan": torch.where(x > 2, y, math.nan)}.get(failure, y)
    model.covar_module.broken = failure == "kernel"
    with pytest.raises(error):
        model.update(later, targets)
    model.covar_module.broken = False
    assert_identical(model, before)
    assert model.features is features
    torch.manual_seed(1)
    inside = x if failure == "fixed" else later
    model.update(inside, y)
    torch.manual_seed(1)
    twin.update(inside, y)
    assert_identical(model, snapshot(twin))


def test_a_failure_after_learning_restores_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hyperparameters have moved by then."""
    x, y = draw(20, 4.0)
    model = breakable(learn="basis_change", horizon_growth=None).update(x, y)
    before, moved = snapshot(model), []

    def absorb(*_: Any) -> Any:
        moved.append(model.covar_module.lengthscale.item())
        raise ArithmeticError("no more")

    here = model.covar_module.lengthscale.item()
    monkeypatch.setattr(model, "_absorb", absorb)
    with pytest.raises(ArithmeticError, match="no more"):
        model.update(x + 3.0, y)
    assert moved[0] != here
    assert_identical(model, before)


def test_an_interrupted_update_restores_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(20, 4.0)
    model = breakable(learn="basis_change", horizon_growth=None).update(x, y)
    before = snapshot(model)

    def absorb(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_absorb", absorb)
    with pytest.raises(KeyboardInterrupt):
        model.update(x + 3.0, y)
    assert_identical(model, before)


def test_a_search_that_breaks_down_at_once_learns_nothing(dtype: torch.dtype) -> None:
    """The objective is NaN but where the search begins; the chunk is absorbed all the same."""
    x, y = draw(20, 4.0, dtype=dtype)
    model = breakable(learn="basis_change", horizon_growth=None).to(dtype)
    model.update(x, y)
    model.covar_module.only = model.covar_module.lengthscale.item()
    before = hyperparameters_of(model)
    model.update(x + 3.0, y)
    assert model.num_observations == 40
    assert hyperparameters_of(model) == pytest.approx(before, rel=1e-6 if dtype == torch.float32 else 1e-12)


def hyperparameters_of(model: StreamingGP) -> list[float]:
    return [p.item() for p in model.parameters()]


@pytest.mark.parametrize("learn", ["warmup", "basis_change"])
def test_random_features_and_unknown_words_are_refused(learn: str) -> None:
    kernel = gpytorch_kernel()
    features = PathFeatures(5, 2, mode="rff", kernel=kernel, num_frequencies=10)
    with pytest.raises(ValueError, match=r"^learn: random features are frozen"):
        StreamingGP(features, kernel, GaussianLikelihood(), learn=learn)
    with pytest.raises(ValueError, match=r"^learn: expected one of .*got 'always'"):
        stream(5, learn="always")


# Long streams, other likelihoods, batches, persistence


@pytest.mark.slow
def test_many_updates_with_a_noise_that_doubles() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.05, 100.0, 800, dtype=F64)
    noise = torch.where(x < 50, 0.2, 0.4)
    y = (0.25 * x).sin() + noise * torch.randn(800, dtype=F64, generator=generator)
    model = stream(
        24, 0.5, lengthscale=6.0, noise=0.04, learn="basis_change", horizon_growth=None, mean_module=constant_mean()
    )
    seen = []
    for a, b in zip(x.split(10), y.split(10), strict=True):  # 80 updates
        model.update(a, b)
        seen.append(model.likelihood.noise.item())
        assert all(math.isfinite(value) for value in hyperparameters(model))
        assert bool(model.log_evidence.isfinite())
    assert seen[39] == pytest.approx(0.04, rel=0.7)
    assert seen[-1] > 1.3 * seen[39]
    with torch.no_grad():
        late = x[-200:]
        assert (model(late).mean - (0.25 * late).sin()).square().mean().sqrt() < 0.3


@pytest.mark.parametrize("extra", [False, True])
def test_known_noise(extra: bool) -> None:
    x, y = draw(60, 8.0)
    x, order = x.sort()
    y, noise = y[order], torch.full_like(x, 0.09)
    likelihood = FixedNoiseGaussianLikelihood(torch.ones(3, dtype=F64), learn_additional_noise=extra).double()
    model = StreamingGP(
        HippoFeatures(20, 4.0), gpytorch_kernel(), likelihood, learn="basis_change", horizon_growth=None
    )
    model.update(x[:30], y[:30], noise[:30])
    first = parameters(model)
    model.update(x[30:], y[30:], noise[30:])
    raw = "covar_module.base_kernel.raw_lengthscale"
    assert not torch.equal(first[raw], parameters(model)[raw])
    if extra:
        name = next(name for name in first if "raw_noise" in name)
        assert not torch.equal(first[name], parameters(model)[name])
    assert bool(model.log_evidence.isfinite()) and model.num_observations == 60


def batch_of_two(learn: str = "basis_change") -> StreamingGP:
    batch = torch.Size([2])
    likelihood = GaussianLikelihood(batch_shape=batch).double()
    return StreamingGP(
        HippoFeatures(12, 4.0), gpytorch_kernel(batch_shape=(2,)), likelihood, learn=learn, horizon_growth=None
    )


@pytest.mark.parametrize("learn", ["warmup", "basis_change"])
def test_a_batch_of_kernels_learns_or_says_at_once_that_it_cannot(learn: str) -> None:
    x, y = draw(20, 4.0)
    try:
        model = batch_of_two(learn)
    except ValueError as error:
        assert str(error).startswith("learn: ")
    else:
        model.update(x, torch.stack([y, 2 * y]))


def test_a_batch_that_has_begun_learns_as_a_loop() -> None:
    """Adam goes by each parameter alone, so that a sum of bounds is learnt as each of them is."""
    x, y = draw(20, 4.0)
    model = batch_of_two("never").update(x, torch.stack([y, 2 * y]))
    model.learn = "basis_change"
    model.update(x + 3.0, torch.stack([y, -y]))
    for i, (first, second) in enumerate(((y, y), (2 * y, -y))):
        alone = StreamingGP(HippoFeatures(12, 4.0), gpytorch_kernel(), GaussianLikelihood().double(), learn="never")
        alone.horizon_growth = None
        alone.update(x, first)
        alone.learn = "basis_change"
        alone.update(x + 3.0, second)
        actual = model.covar_module.base_kernel.lengthscale[i].item()
        assert actual == pytest.approx(alone.covar_module.base_kernel.lengthscale.item(), rel=5e-3)


@pytest.mark.parametrize("learn", ["warmup", "basis_change"])
@pytest.mark.parametrize("how", ["saved", "copied"])
def test_a_stream_goes_on_identically(learn: str, how: str) -> None:
    x, y = draw(90, 9.0)
    x, order = x.sort()
    y = y[order]

    def fresh() -> StreamingGP:
        return stream(20, 3.0, learn=learn, horizon_growth=None, mean_module=constant_mean())

    model = fresh().update(x[:30], y[:30]).update(x[30:60], y[30:60])
    if how == "saved":
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = fresh()
        other.load_state_dict(torch.load(buffer))
    else:
        other = copy.deepcopy(model)
    model.update(x[60:], y[60:])
    other.update(x[60:], y[60:])
    # A loaded matrix may lie otherwise in memory, hence no equality.
    assert hyperparameters(other) == pytest.approx(hyperparameters(model), rel=1e-8)
    at = torch.linspace(0.0, 9.0, 10, dtype=F64)
    with torch.no_grad():
        oracle.assert_close(other(at).mean, model(at).mean, 1e-6)


@pytest.mark.parametrize("learn", ["warmup", "basis_change"])
@pytest.mark.parametrize("extend", [False, True])
def test_conditioning_learns_nothing(learn: str, extend: bool) -> None:
    x, y = draw(30, 4.0)
    model = stream(12, 4.0, learn=learn, horizon_growth=None)
    for _ in range(2):  # before anything was seen, and after
        before, values = snapshot(model), parameters(model)
        new = model.condition_on_observations(x + 2.0, y, extend_horizon=extend)
        assert_identical(model, before)
        assert unchanged(new, values)
        model.update(x, y)


def test_learning_follows_a_path_too() -> None:
    x = torch.randn(60, 2, dtype=F64)
    y = x.sum(-1).sin()
    model = StreamingGP(
        PathFeatures(15, 2), gpytorch_kernel(1.0), GaussianLikelihood().double(), learn="basis_change", jitter=1e-10
    )
    seen = []
    for a, b in zip(x.split(20), y.split(20), strict=True):
        model.update(a, b)
        seen.append(model.covar_module.base_kernel.lengthscale.item())
    assert len(set(seen)) == 3
    assert all(abs(math.log(b / a)) < 0.25 for a, b in pairwise(seen))


def test_the_unit_of_a_mean_does_not_matter() -> None:
    """A level in units of a thousandth does not jump by ten standard deviations of the targets."""
    x, y = draw(40, 8.0)
    levels = []
    for unit in (1.0, 1e-3):
        kernel, likelihood = gpytorch_kernel(), GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive())
        kernel.outputscale = torch.tensor(unit**2, dtype=F64)
        likelihood.double().noise = torch.tensor(0.1 * unit**2, dtype=F64)
        model = StreamingGP(HippoFeatures(12, 4.0), kernel, likelihood, constant_mean(), horizon_growth=None)
        model.update(x[x < 4], unit * (y[x < 4] + 0.5))
        model.learn = "basis_change"
        model.update(x[x >= 4], unit * (y[x >= 4] + 0.5))
        levels.append(model.mean_module.constant.item() / unit)
    assert levels[1] == pytest.approx(levels[0], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["window", "pyramid"])
def test_what_is_forgotten_does_not_count_against_the_hyperparameters(kind: str) -> None:
    """From the true values learning must not run away, however much detail each move gives up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.0, 30.0, 300, dtype=F64)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, 1.0
    with torch.no_grad():
        covariance = kernel(x.unsqueeze(-1)).to_dense() + 0.01 * torch.eye(300, dtype=F64)
        y = torch.linalg.cholesky(covariance) @ torch.randn(300, generator=generator, dtype=F64)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.01
    features = (
        HippoFeatures(14, 5.0, measure="legt", window=5.0) if kind == "window" else PyramidFeatures(24, horizon=5.0)
    )
    model = StreamingGP(features, kernel, likelihood, learn="basis_change").eval()
    for chunk in torch.arange(300).split(15):
        model.update(x[chunk], y[chunk])
    assert 0.7 < kernel.base_kernel.lengthscale.item() < 1.3
    assert 0.005 < likelihood.noise.item() < 0.02


def test_a_warm_up_on_a_handful_of_observations_warns() -> None:
    kernel, likelihood = gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood()
    model = StreamingGP(HippoFeatures(8, 1.0), kernel, likelihood, learn="warmup").eval()
    with pytest.warns(UserWarning, match="3 observations in the first chunk are few for 2 hyperparameters"):
        model.update(torch.tensor([0.1, 0.4, 0.8]), torch.tensor([0.0, 0.3, 0.1]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": -3}, ValueError, "^steps"),
        ({"steps": 1.5}, TypeError, "^steps"),
        ({"rate": math.nan}, ValueError, "^rate"),
        ({"num_starts": 2}, TypeError, "^num_starts"),
    ],
)
def test_a_fit_by_the_bound_checks_its_arguments(arguments: dict[str, Any], error: type, message: str) -> None:
    model = StreamingGP(HippoFeatures(8, 4.0), gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood())
    x = torch.linspace(0.0, 4.0, 10)
    with pytest.raises(error, match=message):
        model.fit_hyperparameters(x, (x > 2).float(), **arguments)
    with pytest.raises(ValueError, match=r"^y: expected at least one target"):
        model.fit_hyperparameters(x[:0], x[:0])
