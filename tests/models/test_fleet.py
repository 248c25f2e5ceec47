"""StreamingFleet: S streams at once are S streams one by one, in every way to say what each of them has seen."""

import copy
import io
import math
import re
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    PoissonLikelihood,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpseq
from gpseq.features import HippoFeatures, InducingPoints, PyramidFeatures, SelectedPoints
from gpseq.models import StreamingFleet, StreamingGP
from gpseq.variational import independent
from tests.oracles_streaming import F64, assert_close, assert_identical, gpytorch_kernel, snapshot, variance_of

# Small memories on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

NAN = math.nan
LENGTHSCALES = torch.tensor([0.8, 1.1, 1.5, 2.0, 2.7], dtype=F64)
AT = torch.linspace(0.5, 9.5, 7, dtype=F64)


def make_likelihood(kind: str = "gaussian", batch: tuple[int, ...] = (), dtype: torch.dtype = F64) -> Any:
    if kind == "poisson":
        return PoissonLikelihood().to(dtype)
    if kind == "bernoulli":
        return BernoulliLikelihood().to(dtype)
    if kind == "fixed":
        return FixedNoiseGaussianLikelihood(torch.ones(1, dtype=dtype))
    likelihood = GaussianLikelihood(batch_shape=torch.Size(batch)).to(dtype)
    noise = torch.tensor(0.1, dtype=dtype)
    likelihood.noise = noise * (1 + torch.arange(batch[0], dtype=dtype))[:, None] if batch else noise
    return likelihood


def make_pair(
    num: int = 5,
    features: Any = 12,
    own: bool = False,
    likelihood: str = "gaussian",
    own_noise: bool = False,
    mean: str = "zero",
    dtype: torch.dtype = F64,
    **options: Any,
) -> tuple[StreamingFleet, list[StreamingGP]]:
    """A fleet, and the oracle: ordinary streams, made independently of it."""
    scales = LENGTHSCALES[:num].to(dtype)
    constants = 0.3 * torch.arange(num, dtype=dtype)

    def features_() -> Any:
        return HippoFeatures(features, 10.0) if isinstance(features, int) else copy.deepcopy(features)

    def mean_of(value: Tensor | None) -> Any:
        if mean == "zero":
            return None
        module = gpytorch.means.ConstantMean(batch_shape=() if value is None else value.shape).to(dtype)
        module.constant = torch.tensor(0.7, dtype=dtype) if value is None else value
        return module

    kernel = gpytorch_kernel(scales if own else 1.1, 1.3, dtype=dtype, batch_shape=(num,) if own else ())
    if own:
        kernel.outputscale = scales
    noise = make_likelihood(likelihood, (num,) if own_noise else (), dtype)
    all_in_one = StreamingFleet(
        num, features_(), kernel, noise, mean_of(constants if mean == "own" else None), **options
    ).eval()
    singles = []
    for s in range(num):
        single = gpytorch_kernel(scales[s] if own else 1.1, scales[s] if own else 1.3, dtype=dtype)
        one = make_likelihood(likelihood, dtype=dtype)
        if own_noise:
            one.noise = noise.noise[s].detach()
        value = constants[s] if mean == "own" else None
        singles.append(StreamingGP(features_(), single, one, mean_of(value), **options).eval())
    return all_in_one, singles


def update_singles(singles: list[StreamingGP], x: Tensor, y: Tensor, noise: Any = None, horizon: float = 0.0) -> None:
    """Each stream learns what is its own; all are first taken to the horizon that one of them reaches."""
    for s, (single, target) in enumerate(zip(singles, y, strict=True)):
        seen = ~target.isnan()
        inputs = x[s] if x.dim() == 3 or x.shape == y.shape else x
        if horizon > single.features.horizon:
            single.rebase(single.features.with_horizon(horizon))
        variances = noise[s][seen] if isinstance(noise, Tensor) and noise.dim() == 2 else noise
        single.update(inputs[seen], target[seen], variances)


def assert_same(
    model: StreamingFleet, singles: list[StreamingGP], at: Tensor = AT, tolerance: float = 1e-10, evidence: bool = True
) -> None:
    with torch.no_grad():
        posterior = model(at)
        assert posterior.mean.shape == (len(singles), len(at))
        for s, single in enumerate(singles):
            expected = single(at)
            assert_close(posterior.mean[s], expected.mean, tolerance)
            assert_close(posterior.covariance_matrix[s], expected.covariance_matrix, tolerance)
            if evidence:
                assert_close(model.log_evidence[s], single.log_evidence, tolerance)
            assert model.counts[s] == single.num_observations
    assert model.num_observations == sum(single.num_observations for single in singles)


def data(num: int, n: int, seed: int = 0, low: float = 0.0, high: float = 10.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(num, n, dtype=F64, generator=generator)
    phase = torch.arange(num, dtype=F64)[:, None]
    return x, torch.sin(1.3 * x + phase) + 0.2 * torch.randn(num, n, dtype=F64, generator=generator)


# Against a loop


@pytest.mark.parametrize("own_noise", [False, True])
@pytest.mark.parametrize("mean", ["zero", "shared", "own"])
@pytest.mark.parametrize("own", [False, True])
def test_a_fleet_is_a_loop_over_streams(own: bool, mean: str, own_noise: bool) -> None:
    """Own times, shared times, missing targets, some streams, and a horizon that grows twice."""
    model, singles = make_pair(own=own, mean=mean, own_noise=own_noise)
    x, y = data(5, 6)
    update_singles(singles, x, y)
    model.update(x, y)
    y = data(5, 4, seed=1)[1]
    update_singles(singles, x[0, :4], y)
    model.update(x[0, :4], y)
    x, y = data(5, 5, seed=2)
    y[1], y[3, :2] = NAN, NAN
    update_singles(singles, x, y)
    model.update(x, y)
    x, y = data(5, 3, seed=3, high=16.0)
    y[0] = NAN
    model.update(x, y)
    assert model.features.horizon > 10.0
    update_singles(singles, x, y, horizon=model.features.horizon)
    x, y = data(2, 3, seed=4, high=30.0)
    model.update(x, y, streams=[3, 1])
    assert model.features.horizon > 16.0
    for single in singles:
        single.rebase(single.features.with_horizon(model.features.horizon))
    singles[3].update(x[0], y[0])
    singles[1].update(x[1], y[1])
    assert_same(model, singles)


@given(
    num=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    own=st.booleans(),
    shared_times=st.booleans(),
    masked=st.floats(0.0, 1.0),
    seed=st.integers(0, 10**6),
    high=st.sampled_from([10.0, 14.0]),
)
@settings(max_examples=15)
def test_any_chunks_and_masks(
    num: int, lengths: list[int], own: bool, shared_times: bool, masked: float, seed: int, high: float
) -> None:
    model, singles = make_pair(num, 8, own=own)
    for step, n in enumerate(lengths):
        x, y = data(num, n, seed + step, high=high)
        hidden = torch.rand(num, n, generator=torch.Generator().manual_seed(seed + step)) < masked
        y = torch.where(hidden, NAN, y)
        if shared_times:
            x = x[0].unsqueeze(-1)
        model.update(x.unsqueeze(-1) if x.dim() == 2 and not shared_times else x, y)
        update_singles(singles, x, y, horizon=model.features.horizon)
    assert_same(model, singles)


@given(seed=st.integers(0, 10**6), n=st.integers(0, 3), own=st.booleans(), chosen=st.permutations(range(5)))
@settings(max_examples=10)
def test_any_choice_of_streams(seed: int, n: int, own: bool, chosen: list[int]) -> None:
    model, singles = make_pair(own=own, features=8)
    chosen = chosen[: seed % 6]
    x, y = data(5, 2, seed)
    model.update(x, y)
    update_singles(singles, x, y)
    before = snapshot(model)
    x, y = data(len(chosen), n, seed + 1)
    y = torch.where(torch.rand(y.shape) < 0.3, NAN, y)
    model.update(x.unsqueeze(-1), y, streams=torch.tensor(chosen, dtype=torch.int32))
    others = [s for s in range(5) if s not in chosen]
    for name in independent.OWN:
        key = f"variational_strategy.belief.{name}"
        assert torch.equal(model.state_dict()[key][others], before[key][others])
    for row, s in enumerate(chosen):
        update_singles([singles[s]], x[row : row + 1].unsqueeze(-1), y[row : row + 1])
    assert_same(model, singles)


def test_several_input_columns() -> None:
    points = torch.rand(10, 2, dtype=F64)
    model, singles = make_pair(3, InducingPoints(points))
    x, y = torch.rand(3, 4, 2, dtype=F64), torch.randn(3, 4, dtype=F64)
    model.update(x, y)
    model.update(x[0], y)
    for s, single in enumerate(singles):
        single.update(x[s], y[s]).update(x[0], y[s])
    with torch.no_grad():
        for s, single in enumerate(singles):
            assert_close(model(x[1]).mean[s], single(x[1]).mean, 1e-10)
            assert_close(variance_of(model(x))[s], variance_of(single(x[s])), 1e-10)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["poisson", "bernoulli"])
def test_likelihoods_that_are_not_gaussian(kind: str, own: bool) -> None:
    """To the tolerance of the search, whose steps end when the last stream has converged."""
    model, singles = make_pair(own=own, likelihood=kind, features=8)
    for seed in range(2):
        x, y = data(5, 8, seed)
        y = (y > 0).to(F64) if kind == "bernoulli" else (2 * y.exp()).round()
        y[2] = NAN if seed else y[2]
        before = snapshot(model)
        model.update(x, y)
        if seed:
            for name in independent.OWN:
                key = f"variational_strategy.belief.{name}"
                assert torch.equal(model.state_dict()[key][2], before[key][2])
        update_singles(singles, x, y)
    x, y = x[:2, :3], y[:2, :3]
    model.update(x, y, streams=[4, 0])
    singles[4].update(x[0], y[0])
    singles[0].update(x[1], y[1])
    assert model.convergence.all_converged
    assert_same(model, singles, tolerance=1e-5)


def test_counts_may_be_integers() -> None:
    model, singles = make_pair(3, likelihood="poisson")
    x, counts = torch.rand(3, 4, dtype=F64), torch.randint(0, 5, (3, 4))
    model.update(x, counts)
    update_singles(singles, x, counts.double())
    assert_same(model, singles, tolerance=1e-5)


def test_noise_that_is_given() -> None:
    model, singles = make_pair(likelihood="fixed")
    x, y = data(5, 4)
    noise = 0.05 + torch.rand(5, 4, dtype=F64)
    y[1, 2], noise[1, 2] = NAN, NAN
    model.update(x, y, noise)
    update_singles(singles, x, y, noise)
    model.update(x[:2], y[:2], noise[:2], streams=[0, 2])
    update_singles([singles[0], singles[2]], x[:2], y[:2], noise[:2])
    model.update(x, y, 0.3)
    update_singles(singles, x, y, torch.tensor(0.3, dtype=F64))
    assert_same(model, singles)
    with pytest.raises(ValueError, match="needs the noise variance"):
        model.update(x, y)


@pytest.mark.parametrize("own_noise", [False, True])
def test_noise_given_for_some_streams(own_noise: bool) -> None:
    """Also where the likelihood has a noise for each stream, and hyperparameters are therefore not gathered."""
    model, singles = make_pair(own_noise=own_noise)
    x, y = data(2, 3)
    noise = 0.05 + torch.rand(2, 3, dtype=F64)
    model.update(x, y, noise, streams=[4, 1]).update(x, y, streams=[1, 0])
    update_singles([singles[4], singles[1]], x, y, noise)
    update_singles([singles[1], singles[0]], x, y)
    assert_same(model, singles)


@pytest.mark.parametrize(
    "features",
    [
        HippoFeatures(10, 4.0, measure="legt", window=4.0),
        PyramidFeatures(12, 4.0),
        SelectedPoints(9),
    ],
    ids=["window", "pyramid", "selected"],
)
def test_features_that_follow_in_other_ways(features: Any) -> None:
    """With all streams at the same times every stream moves as it would alone."""
    model, singles = make_pair(3, features, mean="shared")
    for seed, low in enumerate((0.0, 3.0, 5.0)):
        x = low + 2 * torch.rand(6, dtype=F64)
        y = data(3, 6, seed)[1]
        model.update(x, y)
        for single, target in zip(singles, y, strict=True):
            single.update(x, target)
    assert_same(model, singles, tolerance=1e-8)


def test_transfer_by_moments() -> None:
    model, singles = make_pair(own=False, transfer="adf")
    for seed, high in enumerate((10.0, 15.0)):
        x, y = data(5, 6, seed, high=high)
        model.update(x, y)
        update_singles(singles, x, y, horizon=model.features.horizon)
    assert_same(model, singles, tolerance=1e-9)


@pytest.mark.parametrize("own", [False, True])
def test_hyperparameters_that_change(own: bool) -> None:
    model, singles = make_pair(own=own, mean="shared")
    x, y = data(5, 6)
    model.update(x, y)
    update_singles(singles, x, y)
    for each in (model, *singles):
        each.covar_module.outputscale = 2.2
        each.mean_module.constant = -0.4
    assert_same(model, singles)
    model.update(x[:1], y[:1], streams=[2])
    singles[2].update(x[0], y[0])
    for single in singles[:2] + singles[3:]:
        single.rebase(single.features)  # others of the fleet are carried over along with it
    assert_same(model, singles)


# Learning


def test_learning_pools_the_streams() -> None:
    """Many short streams of one kernel say together what none says alone; the exact fit would mix them up."""
    truth = gpytorch_kernel(2.0, 1.5)
    x = torch.linspace(0, 8, 9, dtype=F64)
    covariance = truth(x[:, None]).to_dense().detach() + 0.01 * torch.eye(9, dtype=F64)
    y = torch.randn(60, 9, dtype=F64) @ torch.linalg.cholesky(covariance).mT
    y[5, 3] = NAN
    learnt = []
    for learn in ("never", "warmup"):
        likelihood = make_likelihood()
        model = StreamingFleet(60, HippoFeatures(16, 8.0), gpytorch_kernel(1.0, 1.0), likelihood, learn=learn)
        if learn == "never":
            assert model.fit_hyperparameters(x, y, steps=80) > 10
            assert model.num_observations == 0
        else:
            model.update(x, y)
        assert 1.6 < model.covar_module.base_kernel.lengthscale.item() < 2.5
        assert 0.005 < likelihood.noise.item() < 0.02
        learnt.append(model.covar_module.base_kernel.lengthscale.item())
    assert learnt[0] == pytest.approx(learnt[1], rel=0.05)
    with pytest.raises(TypeError, match="num_starts: "):
        model.fit_hyperparameters(x, y, num_starts=3)
    with pytest.raises(ValueError, match="y: expected at least one"):
        model.fit_hyperparameters(x, torch.full_like(y, NAN))


def test_learning_at_a_basis_change_with_some_streams() -> None:
    model, _ = make_pair(3, own=False, learn="basis_change")
    x, y = data(3, 10)
    model.update(x, y)
    before = model.covar_module.base_kernel.lengthscale.item()
    x, y = data(2, 10, seed=1, low=10.0, high=12.0)
    model.update(x, y, streams=[0, 2])
    assert model.covar_module.base_kernel.lengthscale.item() != before
    assert model.counts.tolist() == [20, 10, 20]


# What is predicted


def test_predictions_with_own_inputs_and_of_some_streams() -> None:
    for own in (False, True):
        for mean in ("zero", "own"):
            model, singles = make_pair(own=own, mean=mean)
            x, y = data(5, 6)
            model.update(x, y)
            update_singles(singles, x, y)
            where = data(5, 3, seed=9)[0].unsqueeze(-1)
            with torch.no_grad():
                posterior, some = model(where), model.predict(where[:2], streams=torch.tensor([4, 1]))
                shared = model.predict(AT, streams=[2])
                assert_close(model.predict(AT).mean, model(AT).mean, 0.0)
                for s, single in enumerate(singles):
                    assert_close(posterior.mean[s], single(where[s]).mean, 1e-10)
                    assert_close(posterior.covariance_matrix[s], single(where[s]).covariance_matrix, 1e-10)
                for row, s in enumerate((4, 1)):
                    assert_close(some.mean[row], singles[s](where[row]).mean, 1e-10)
                    assert_close(some.covariance_matrix[row], singles[s](where[row]).covariance_matrix, 1e-10)
                assert shared.mean.shape == (1, len(AT))
                assert_close(shared.covariance_matrix[0], singles[2](AT).covariance_matrix, 1e-10)
                assert_close(
                    model.likelihood(model(AT)).variance[3], singles[3].likelihood(singles[3](AT)).variance, 1e-10
                )
                assert_close(model.residual_variance(AT).expand(5, -1)[1], singles[1].residual_variance(AT), 1e-10)
                assert_close(model.reconstruct(AT)[4], singles[4].reconstruct(AT), 1e-10)


@pytest.mark.parametrize("own", [False, True])
def test_one_of_the_fleet_is_an_ordinary_stream(own: bool) -> None:
    model, singles = make_pair(own=own, mean="own", own_noise=True)
    x, y = data(5, 6)
    model.update(x, y)
    update_singles(singles, x, y)
    assert len(model) == model.num_streams == 5
    before = snapshot(model)
    for s, one in enumerate(model):
        assert type(one) is StreamingGP and not one.training
        one.update(x[0] + 5, y[0])  # past the horizon
        singles[s].update(x[0] + 5, y[0])
        with torch.no_grad():
            assert_close(one(AT).mean, singles[s](AT).mean, 1e-10)
            assert_close(one.likelihood(one(AT)).variance, singles[s].likelihood(singles[s](AT)).variance, 1e-10)
        assert_close(one.log_evidence, singles[s].log_evidence, 1e-10)
    assert_identical(model, before)
    assert model[-1].num_observations == 6
    part = model[1:4:2]
    assert type(part) is StreamingFleet and len(part) == 2
    x, y = data(2, 2, seed=5)
    part.update(x, y)
    ordinary = model[torch.tensor([1, 3])].update(x, y)
    assert_close(part(AT).mean, ordinary(AT).mean, 1e-12)
    assert_identical(model, before)


def test_a_kernel_on_chosen_columns_can_be_taken_apart() -> None:
    points = torch.rand(8, 2, dtype=F64)
    base = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([3]), active_dims=(1,)).double()
    base.lengthscale = torch.tensor([0.5, 1.0, 2.0], dtype=F64)[:, None, None]
    model = StreamingFleet(3, InducingPoints(points), base, make_likelihood()).eval()
    x, y = torch.rand(3, 5, 2, dtype=F64), torch.randn(3, 5, dtype=F64)
    model.update(x, y)
    with torch.no_grad():
        for s in range(3):
            assert_close(model[s](x[0]).mean, model(x[0]).mean[s], 1e-12)


def test_conditioning_leaves_the_fleet_and_has_gradients() -> None:
    model, singles = make_pair()
    x, y = data(5, 4)
    model.update(x, y)
    update_singles(singles, x, y)
    before = snapshot(model)
    x, y = data(5, 3, seed=1)
    new = model.condition_on_observations(x, y)
    assert type(new) is StreamingFleet
    for single, inputs, target in zip(singles, x, y, strict=True):
        single.update(inputs, target)
    assert_same(new, singles)
    assert_identical(model, before)
    with_graph = x.clone().requires_grad_()
    one = y.clone()
    one[3] = NAN
    conditioned = model.condition_on_observations(with_graph, one)
    conditioned(AT).mean.sum().backward()
    assert with_graph.grad[:3].abs().min() > 0 and (with_graph.grad[3] == 0).all()
    held = conditioned.state
    conditioned.update(x[:1], y[:1], streams=[0])
    assert held.G.requires_grad and not torch.equal(conditioned.state.G, held.G)


def test_fantasies_predict_and_do_nothing_else() -> None:
    model, _ = make_pair(3)
    x, y = data(3, 2)
    model.update(x, y)
    fantasies = model.condition_on_observations(x[0], torch.randn(4, 3, 2, dtype=F64))
    assert fantasies(AT).mean.shape == (4, 3, len(AT))
    for act in (
        lambda: fantasies.update(x, y),
        lambda: fantasies[0],
        lambda: fantasies.predict(AT, streams=[0]),
        lambda: fantasies.condition_on_observations(x, y),
    ):
        with pytest.raises(ValueError, match="can only predict"):
            act()


# A value, and where it lives


def test_states_that_are_held_do_not_change() -> None:
    """What is given out is a value, by whatever way."""
    model, _ = make_pair()
    x, y = data(5, 4)
    model.update(x, y)
    strategy = model.variational_strategy
    ways = (lambda: strategy.state, strategy.current_state, lambda: strategy.belief.state, lambda: model.state)
    for way in ways:
        value = way()
        before = {name: tensor.clone() for name, tensor in value.items()}
        model.update(x[:2], y[:2], streams=[0, 3])
        assert all(torch.equal(tensor, before[name]) for name, tensor in value.items())
        assert not torch.equal(model.state.G, value.G)
    model, _ = make_pair()
    model.update(x, y)
    held, saved, twin = model.state, model.state_dict(), copy.deepcopy(model)
    copies = {name: tensor.clone() for name, tensor in held.items()}
    saved_copies = {name: tensor.clone() for name, tensor in saved.items()}
    model.update(x[:2], y[:2], streams=[0, 1])
    model.rebase(model.features.with_horizon(11.0)).update(x[:2], y[:2], streams=[1, 2])
    conditioned = model.condition_on_observations(x, y)
    kept = snapshot(conditioned)
    model.update(x[:2], y[:2], streams=[0, 4])
    assert_identical(conditioned, kept)
    for name, tensor in held.items():
        assert torch.equal(tensor, copies[name])
    for name, tensor in saved.items():
        assert torch.equal(tensor, saved_copies[name])
    assert twin.counts.tolist() == [4] * 5
    assert model.counts.tolist() == [12, 12, 8, 4, 8]


def test_an_update_of_some_streams_copies_the_others_only_if_somebody_holds_them() -> None:
    model, _ = make_pair()
    x, y = data(5, 4)
    model.update(x, y)

    def copies() -> bool:
        place = model._now.G.data_ptr()
        model.update(x[:2], y[:2], streams=[3, 0])
        return model._now.G.data_ptr() != place

    assert copies()  # the state of an update of all may have been put there by anybody
    assert not copies() and not copies()
    with torch.no_grad():
        posterior = model(AT), model.predict(AT, streams=[3])
        means = [p.mean.clone() for p in posterior]
    gradient = AT.clone().requires_grad_()
    value = model(gradient).variance.sum()
    assert model.counts.tolist() == [16, 4, 4, 16, 4]
    assert not copies()  # predictions and counts keep nothing of it
    assert all(torch.equal(p.mean, mean) for p, mean in zip(posterior, means, strict=True))
    value.backward()
    reads = (
        lambda: model.state,
        lambda: model.variational_strategy.state,
        lambda: model.variational_strategy.belief.state,
        model.variational_strategy.current_state,
        model.state_dict,
        lambda: model.condition_on_observations(x, y),
        lambda: model.load_state_dict(model.state_dict(), assign=True),
        lambda: setattr(model.variational_strategy, "state", model.state),
    )
    for read in reads:
        held = read()
        assert copies() and not copies(), held


@pytest.mark.parametrize("own", [False, True])
def test_a_saved_fleet_goes_on_exactly(own: bool) -> None:
    model, _ = make_pair(own=own)
    x, y = data(5, 4, high=17.0)
    model.update(x, y)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = make_pair(own=own)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (model, other):
        each.update(x[:3] + 5, y[:3], streams=[0, 1, 4])
    assert_identical(other, snapshot(model))
    if not own:
        grown, _ = make_pair(3)
        grown.load_state_dict(model.state_dict())
        assert len(grown) == 5


def test_precision(dtype: torch.dtype) -> None:
    model, _ = make_pair(dtype=dtype)
    reference, _ = make_pair()
    x, y = data(5, 6)
    y[2, :3] = NAN
    for each, kind in ((model, dtype), (reference, F64)):
        each.update(x.to(kind), y.to(kind)).update(x[:2].to(kind) + 2, y[:2].to(kind), streams=[0, 3])
    posterior = model(AT.to(dtype))
    assert posterior.mean.dtype == dtype and model.state.G.dtype == F64
    assert_close(posterior.mean.double(), reference(AT).mean, 1e-12 if dtype == F64 else 1e-4)
    model = model.to(torch.float32)
    assert model.state.G.dtype == F64
    model.update(x.float(), y.float())
    assert model.counts.tolist() == [18, 12, 6, 18, 12]


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    model, singles = make_pair()
    model = model.to("cuda")
    x, y = data(5, 6)
    y[1] = NAN
    model.update(x.cuda(), y.cuda())
    model.update(x[:2].cuda(), y[2:4].cuda(), streams=torch.tensor([0, 3]))
    update_singles(singles, x, y)
    update_singles([singles[0], singles[3]], x[:2], y[2:4])
    assert_close(model(AT.cuda()).mean.cpu(), torch.stack([single(AT).mean for single in singles]), 1e-9)


def test_memory_is_what_the_shapes_say() -> None:
    """A state is S (M^2 + M + 2) numbers and one basis, however much has been seen."""
    num, order = 50, 8
    model, _ = make_pair(3, order)
    model = StreamingFleet(num, HippoFeatures(order, 10.0), gpytorch_kernel(), make_likelihood())
    sizes = []
    for _ in range(3):
        model.update(10 * torch.rand(num, 20, dtype=F64), torch.randn(num, 20, dtype=F64))
        state = model.state
        sizes.append(sum(tensor.numel() for _, tensor in state.items()))
        for name in independent.OWN:
            tensor = getattr(state, name)
            assert tensor.untyped_storage().nbytes() == 8 * tensor.numel()
    nodes = HippoFeatures(order, 10.0).num_nodes
    basis = nodes + order * order + 1 + order * nodes + order + state.hyperparameters.numel()
    assert sizes == [num * (order**2 + order + 2) + basis] * 3


# Inputs


def test_missing_entries_need_no_time() -> None:
    model, singles = make_pair(3)
    x, y = data(3, 4)
    y[0, 1:], y[2] = NAN, NAN
    where = x.clone()
    where[y.isnan()] = NAN
    where[2, 0] = math.inf
    model.update(where, y)
    update_singles(singles, x, y)
    shared, targets = torch.tensor([1.0, NAN, 3.0], dtype=F64), torch.randn(3, 3, dtype=F64)
    targets[:, 1], targets[0, 0] = NAN, NAN
    model.update(shared, targets)
    update_singles(singles, torch.tensor([1.0, 2.0, 3.0], dtype=F64), targets)
    assert_same(model, singles)
    before = snapshot(model)
    model.update(torch.full((3, 2), NAN), torch.full((3, 2), NAN))
    model.update(torch.zeros(0), torch.zeros(3, 0))
    model.update(torch.zeros(0, 2), torch.zeros(0, 2), streams=[])
    model.update(torch.zeros(2, 1), torch.full((2, 1), NAN), streams=[0, 2])
    assert_identical(model, before)
    targets[:, 1] = torch.tensor([NAN, NAN, 1.0])
    with pytest.raises(ValueError, match="x: expected finite"):
        model.update(shared, targets)


def test_a_log_of_time_at_missing_entries() -> None:
    """What stands in for a missing input is one that was observed: zero might be none for this kernel."""

    class Logarithmic(gpytorch.kernels.RBFKernel):
        def forward(self, x1: Tensor, x2: Tensor, **params: Any) -> Tensor:
            return super().forward(x1.log(), x2.log(), **params)

    features = InducingPoints(torch.linspace(1, 5, 6, dtype=F64)[:, None])
    model = StreamingFleet(2, features, Logarithmic().double(), make_likelihood())
    model.update(torch.tensor([[2.0], [NAN]], dtype=F64), torch.tensor([[1.0], [NAN]], dtype=F64))
    assert model.state.G.isfinite().all() and model.counts.tolist() == [1, 0]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_bad_input_is_named_and_changes_nothing(some: bool, own: bool) -> None:
    model, _ = make_pair(own=own, horizon_growth="fixed")
    x, y = data(5, 3)
    model.update(x, y)
    before = snapshot(model)
    streams = torch.tensor([4, 0]) if some else None
    num = 2 if some else 5
    x, y = x[:num], y[:num]
    nan, inf = y.clone(), y.clone()
    nan[1, 1], inf[0, 0] = NAN, math.inf
    integers = "streams: expected a list or 1-D tensor of integers"
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "y: expected targets of shape", {"y": y[0]}),
        (ValueError, "y: expected targets of shape", {"y": y[:1]}),
        (ValueError, "y: expected targets of shape", {"y": y[None]}),
        (TypeError, "y: expected a floating", {"y": y.long()}),
        (TypeError, "y: expected a floating", {"y": y.tolist()}),
        (TypeError, "x: expected a floating", {"x": x.long()}),
        (ValueError, "x: expected inputs", {"x": x[:, :2]}),
        (ValueError, "x: expected inputs", {"x": x[None, None]}),
        (ValueError, "x: expected inputs", {"x": x[0, :2]}),
        (ValueError, "x: expected inputs", {"x": torch.zeros(3, 2)}),
        (ValueError, "x: expected finite", {"x": nan}),
        (ValueError, "x: .*pass the horizon", {"x": x + 8}),
        (ValueError, "y: expected finite", {"y": inf}),
        (ValueError, "y: expected finite", {"y": nan, "missing": "error"}),
        (ValueError, "missing: ", {"missing": "drop"}),
        (ValueError, "noise: expected finite positive", {"noise": torch.tensor(-1.0)}),
        (ValueError, "noise: expected finite positive", {"noise": -torch.ones(num, 3)}),
        (ValueError, "noise: ", {"noise": torch.ones(num + 1, 3)}),
        (ValueError, "noise: ", {"noise": torch.ones(2, num, 3)}),
        (ValueError, "y: the targets are too large", {"y": 1e200 * y}),
        (ValueError, "steps: ", {"steps": 0}),
        (ValueError, "streams: expected indices from 0 to 4, got 5", {"streams": [5, 0][:num]}),
        (ValueError, "streams: expected indices from 0 to 4, got -1", {"streams": [-1, 0]}),
        (ValueError, "streams: expected each stream once, got 3", {"streams": [3, 3]}),
        (ValueError, f"{integers}, got shape", {"streams": torch.zeros(2, 1, dtype=torch.int64)}),
        (ValueError, f"{integers}, got shape", {"streams": torch.tensor(2)}),
        (TypeError, f"{integers}, got torch.bool", {"streams": torch.tensor([True, False])}),
        (TypeError, f"{integers}, got torch.float32", {"streams": [0.5]}),
        (TypeError, f"{integers}, got 'ab'", {"streams": "ab"}),
        (TypeError, f"{integers}, got 2", {"streams": 2}),
    ]
    for error, match, change in bad:
        with pytest.raises(error, match=match):
            model.update(**{"x": x, "y": y, "streams": streams} | change)
            pytest.fail(f"accepted: {match} {change}")
        assert_identical(model, before)


def test_bad_places_to_predict_at_are_named() -> None:
    model, _ = make_pair()
    each = r"x: expected inputs \(n, 1\) for all streams, or \(5, n, 1\) for each stream; got shape "
    for shape in ((4, 3, 1), (5, 3), (5, 3, 2), (2, 3, 1, 1), ()):
        with pytest.raises(ValueError, match=each + re.escape(str(shape))):
            model(torch.zeros(shape))
        with pytest.raises(ValueError, match=each + re.escape(str(shape))):
            model.predict(torch.zeros(shape))
    for shape in ((5, 3, 1), (2, 3)):
        with pytest.raises(ValueError, match=r"or \(2, n, 1\) for each stream; got shape"):
            model.predict(torch.zeros(shape), streams=[0, 3])
    with pytest.raises(TypeError, match="x: expected a floating"):
        model([1.0])
    x, y = data(5, 2)
    fantasies = model.condition_on_observations(x, y.expand(3, 5, 2))
    assert fantasies(torch.zeros(5, 4, 1)).mean.shape == (3, 5, 4)
    with pytest.raises(ValueError, match=r"or \(3, 5, n, 1\) for each stream; got shape \(3, 4, 1\)"):
        fantasies(torch.zeros(3, 4, 1))


def test_other_bad_arguments() -> None:
    kernel, likelihood, features = gpytorch_kernel(), make_likelihood(), HippoFeatures(4, 1.0)
    with pytest.raises(ValueError, match="num_streams: "):
        StreamingFleet(0, features, kernel, likelihood)
    with pytest.raises(TypeError, match="num_streams: "):
        StreamingFleet(2.0, features, kernel, likelihood)
    with pytest.raises(ValueError, match=r"covar_module: expected batch shape \(\) or \(2,\), got \(3,\)"):
        StreamingFleet(2, features, gpytorch_kernel(torch.ones(3), batch_shape=(3,)), likelihood)
    with pytest.raises(ValueError, match=r"mean_module: expected batch shape"):
        mean = gpytorch.means.ConstantMean(batch_shape=torch.Size([3]))
        StreamingFleet(2, features, kernel, likelihood, mean)
    with pytest.raises(ValueError, match="features: expected nodes"):
        StreamingFleet(2, InducingPoints(torch.rand(2, 3, 1)), kernel, likelihood)
    model = StreamingFleet(2, features, kernel, likelihood)
    for index in (2, -3):
        with pytest.raises(IndexError, match="index: "):
            model[index]
    with pytest.raises(IndexError, match="index: "):
        model[2:]
    with pytest.raises(ValueError, match="index: expected each"):
        model[[1, 1]]
    with pytest.raises(ValueError, match="streams: "):
        model.predict(AT, streams=[2])
    assert gpseq.models.StreamingFleet is StreamingFleet


def test_inference_mode_does_no_harm() -> None:
    model, singles = make_pair(3)
    x, y = data(3, 4)
    with torch.inference_mode():
        model.update(x, y).update(x[:1], y[:1], streams=[1])
    update_singles(singles, x, y)
    singles[1].update(x[0], y[0])
    assert_same(model, singles)
    assert not model.state.G.is_inference()
