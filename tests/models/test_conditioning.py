"""condition_on_observations and fantasies: a new model, the old one untouched, batches, gradients."""

import copy
from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import HippoFeatures, InducingPoints
from gpseq.models import StreamingGP
from tests import oracles_streaming as oracle
from tests.oracles_streaming import (
    F64,
    assert_close,
    assert_identical,
    assert_posterior,
    draw,
    functionals,
    gpytorch_kernel,
    snapshot,
    stream,
    variance_of,
)

# Small memories on purpose; tests/models/test_horizon.py is about capacity.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

AT = torch.linspace(0.0, 11.0, 9, dtype=F64)


class Named(StreamingGP):
    """A subclass with its own constructor and its own attributes."""

    def __init__(self, name: str, *, lengthscale: float) -> None:
        super().__init__(
            HippoFeatures(12, 10.0), gpytorch_kernel(lengthscale), gpytorch.likelihoods.GaussianLikelihood()
        )
        self.name = name
        self.register_buffer("extra", torch.ones(2))


def assert_same_posterior(actual: StreamingGP, expected: StreamingGP, tolerance: float, index: Any = ()) -> None:
    """Posterior at AT and evidence; ``index`` selects one model of a batch on the left."""
    with torch.no_grad():
        a, b = actual(AT), expected(AT)
        assert_close(a.mean[index], b.mean, tolerance)
        assert_close(a.covariance_matrix[index], b.covariance_matrix, tolerance)
        assert_close(actual.log_evidence.expand(a.batch_shape)[index], expected.log_evidence, tolerance)


# The new model and the old one


@pytest.mark.parametrize("seen", [0, 20])
@pytest.mark.parametrize("call", ["condition_on_observations", "get_fantasy_model"])
def test_the_new_model_has_seen_everything(seen: int, call: str, dtype: torch.dtype) -> None:
    x, y = draw(30, dtype=dtype)
    parent = stream(12, dtype=dtype).update(x[:seen], y[:seen])
    child = getattr(parent, call)(x[seen:], y[seen:])
    basis, noise = functionals(parent.features), torch.full((30,), 0.1, dtype=F64)
    q, bound = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, basis, *draw(30), noise)
    expected = oracle.conditional(oracle.rbf(1.0), oracle.zero, basis, q, oracle.at_points(AT))
    assert_posterior(child, expected, AT.to(dtype), 1e-6 if dtype == F64 else 1e-4)
    assert_close(child.log_evidence, bound, 1e-7 if dtype == F64 else 1e-4)
    assert type(child) is StreamingGP and child.num_observations == 30 and not child.training


def test_the_parent_is_untouched() -> None:
    parent = stream(24).update(*draw(20))
    before, state = snapshot(parent), parent.state
    with torch.no_grad():
        predicted = parent(AT).mean
    child = parent.condition_on_observations(*draw(5, seed=1))
    child.update(*draw(5, 14.0, seed=2))
    child.covar_module.base_kernel.lengthscale = 3.0
    child.likelihood.noise = 7.0
    child.train()
    assert_identical(parent, before)
    assert not parent.training and parent.features.horizon == 10.0 and parent.num_observations == 20
    assert all(value is getattr(parent.state, name) for name, value in state.items())
    with torch.no_grad():
        assert torch.equal(parent(AT).mean, predicted)
    assert child.features.horizon > 10 and child.num_observations == 30


def test_loading_another_state_into_the_child_leaves_the_parent_alone() -> None:
    """load_state_dict writes into tensors in place; those of the parent must not be among them."""
    parent = stream(12).update(*draw(20))
    before = snapshot(parent)
    child = parent.condition_on_observations(*draw(5, seed=1))
    other = stream(12, lengthscale=0.5).update(*draw(20, seed=3))
    child.load_state_dict(other.state_dict())
    assert_identical(parent, before)


def test_loading_another_state_into_the_parent_leaves_the_child_alone() -> None:
    parent = stream(12).update(*draw(20))
    child = parent.condition_on_observations(*draw(5, seed=1))
    before = snapshot(child)
    parent.load_state_dict(stream(12, lengthscale=0.5).update(*draw(20, seed=3)).state_dict())
    assert_identical(child, before)


@pytest.mark.parametrize("kind", [StreamingGP, Named])
def test_a_subclass_stays_what_it_is(kind: type[StreamingGP]) -> None:
    if kind is Named:
        parent: StreamingGP = Named("seven", lengthscale=1.0).double().eval()
    else:
        parent = stream(12)
    child = parent.condition_on_observations(*draw(10))
    assert type(child) is kind
    if isinstance(child, Named) and isinstance(parent, Named):
        assert child.name == "seven" and torch.equal(child.extra, parent.extra) and child.extra is not parent.extra
    assert type(child.condition_on_observations(*draw(3))) is kind
    assert child.num_observations == 10 and parent.num_observations == 0


@given(cut=st.integers(0, 20), seed=st.integers(0, 10**6), transfer=st.sampled_from(["vfe", "adf"]))
@settings(max_examples=10)
def test_sequential_is_joint_is_update(cut: int, seed: int, transfer: str) -> None:
    parent = stream(14, transfer=transfer).update(*draw(10, seed=seed))
    x, y = draw(20, seed=seed + 1)
    joint = parent.condition_on_observations(x, y)
    sequential = parent.condition_on_observations(x[:cut], y[:cut]).condition_on_observations(x[cut:], y[cut:])
    assert_same_posterior(sequential, joint, 1e-9)
    assert_same_posterior(copy.deepcopy(parent).update(x, y), joint, 1e-9)


def test_conditioning_on_nothing_is_a_copy() -> None:
    parent = stream(12).update(*draw(20))
    child = parent.condition_on_observations(AT[:0], AT[:0])
    assert_identical(child, snapshot(parent))
    assert_same_posterior(child, parent, 0.0)


def test_noise_and_missing_targets_as_in_an_update() -> None:
    x, y = draw(12)
    noise, gone = 0.1 + torch.rand(12, dtype=F64), torch.arange(12) % 3 == 0
    parent = stream(12).update(*draw(10, seed=1))
    child = parent.condition_on_observations(x, y.masked_fill(gone, torch.nan), noise=noise, missing="skip")
    assert_same_posterior(child, copy.deepcopy(parent).update(x[~gone], y[~gone], noise=noise[~gone]), 1e-9)
    with pytest.raises(ValueError, match="y: expected finite targets"):
        parent.condition_on_observations(x, y.masked_fill(gone, torch.nan))
    fixed = StreamingGP(HippoFeatures(12, 10.0), gpytorch_kernel(), FixedNoiseGaussianLikelihood(noise[:2])).eval()
    with pytest.raises(ValueError, match="noise: a FixedNoiseGaussianLikelihood needs"):
        fixed.condition_on_observations(x, y)
    assert fixed.condition_on_observations(x, y, noise=noise).num_observations == 12


def test_hyperparameters_changed_before_conditioning_are_honoured() -> None:
    parent = stream(12).update(*draw(20))
    parent.covar_module.base_kernel.lengthscale = 1.7
    x, y = draw(8, seed=1)
    child = parent.condition_on_observations(x, y)
    assert_same_posterior(child, copy.deepcopy(parent).update(x, y), 1e-9)


# The horizon


def test_the_horizon_is_extended_only_when_asked() -> None:
    parent = stream(20, 10.0).update(*draw(20))
    x, y = torch.tensor([9.0, 11.0], dtype=F64), torch.ones(2, dtype=F64)
    child = parent.condition_on_observations(x, y)
    assert child.features.horizon == parent.features.horizon == 10.0
    basis, noise = functionals(parent.features), torch.full((22,), 0.1, dtype=F64)
    past = draw(20)
    q, _ = oracle.sparse_gp(
        oracle.rbf(1.0), oracle.zero, basis, torch.cat([past[0], x]), torch.cat([past[1], y]), noise
    )
    inside = AT[:-2]
    expected = oracle.conditional(oracle.rbf(1.0), oracle.zero, basis, q, oracle.at_points(inside))
    assert_posterior(child, expected, inside, 1e-4)

    before = snapshot(parent)
    extended = parent.condition_on_observations(x, y, extend_horizon=True)
    assert extended.features.horizon == 12.5 and parent.features.horizon == 10.0
    assert_identical(parent, before)
    assert_same_posterior(extended, copy.deepcopy(parent).update(x, y), 1e-9)


def test_a_fixed_horizon_takes_fantasies_beyond_it_but_is_not_extended() -> None:
    parent = stream(20, 10.0, horizon_growth="fixed").update(*draw(20))
    beyond = torch.tensor([10.5], dtype=F64)
    child = parent.condition_on_observations(beyond, beyond)
    assert child.features.horizon == 10.0 and child.num_observations == 21
    with pytest.raises(ValueError, match=r"x: times up to 10\.5 pass the horizon"):
        parent.condition_on_observations(beyond, beyond, extend_horizon=True)


# Batches


@pytest.mark.parametrize("fantasies", [(4,), (2, 3)])
def test_fantasies_of_targets_share_the_information(fantasies: tuple[int, ...], dtype: torch.dtype) -> None:
    """y is (*f, n) and x is (n,): one G, many shifts."""
    parent = stream(12, dtype=dtype).update(*draw(15, dtype=dtype))
    x, _ = draw(6, seed=1, dtype=dtype)
    y = torch.randn(*fantasies, 6, dtype=dtype)
    child = parent.condition_on_observations(x, y)
    assert child.state.G.shape == (12, 12) and child.state.r.shape == (*fantasies, 12)
    at = AT.to(dtype)
    posterior = child(at)
    assert posterior.batch_shape == fantasies and posterior.mean.shape == (*fantasies, 9)
    assert posterior.variance.shape == (*fantasies, 9) and variance_of(posterior).shape == (*fantasies, 9)
    assert posterior.covariance_matrix.shape == (*fantasies, 9, 9)
    assert posterior.rsample(torch.Size([5])).shape == (5, *fantasies, 9)
    assert child.likelihood(posterior).variance.shape == (*fantasies, 9)
    assert child.log_evidence.shape == fantasies
    for index in torch.cartesian_prod(*map(torch.arange, fantasies)).reshape(-1, len(fantasies)).tolist():
        alone = parent.condition_on_observations(x, y[tuple(index)])
        assert_same_posterior(child, alone, 1e-9 if dtype == F64 else 1e-4, tuple(index))


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
@pytest.mark.parametrize("fantasies", [(), (4,)])
def test_a_batch_of_inputs(batch: tuple[int, ...], fantasies: tuple[int, ...]) -> None:
    """x is (*b, n, d), y is (*f, *b, n): G has shape b, shifts (*f, *b); then a second conditioning on the result."""
    parent = stream(12).update(*draw(15))
    x = 10 * torch.rand(*batch, 6, 1, dtype=F64)
    y = torch.randn(*fantasies, *batch, 6, dtype=F64)
    child = parent.condition_on_observations(x, y)
    assert child.state.G.shape == (*batch, 12, 12) and child.state.r.shape == (*fantasies, *batch, 12)
    with torch.no_grad():
        posterior = child(AT)
        assert posterior.mean.shape == (*fantasies, *batch, 9)
        assert posterior.covariance_matrix.shape == (*fantasies, *batch, 9, 9)
        assert posterior.rsample().shape == (*fantasies, *batch, 9)
        own = child(AT.reshape(-1, 1).expand(*batch, 9, 1))  # inputs with the batch of the model
        assert_close(own.mean, posterior.mean, 1e-10)
        assert_close(own.covariance_matrix, posterior.covariance_matrix, 1e-10)

    again_x, again_y = 10 * torch.rand(*batch, 2, 1, dtype=F64), torch.randn(*batch, 2, dtype=F64)
    again = child.condition_on_observations(again_x, again_y)
    shared = child.condition_on_observations(AT[:3], torch.zeros(3, dtype=F64))
    assert again.state.r.shape == shared.state.r.shape == (*fantasies, *batch, 12)
    shape = (*fantasies, *batch)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        f, b = tuple(index), tuple(index[len(fantasies) :])
        alone = parent.condition_on_observations(x[b], y[f])
        assert_same_posterior(child, alone, 1e-8, f)
        assert_same_posterior(again, alone.condition_on_observations(again_x[b], again_y[b]), 1e-8, f)
        assert_same_posterior(shared, alone.condition_on_observations(AT[:3], torch.zeros(3, dtype=F64)), 1e-8, f)


def test_fantasies_of_fantasies() -> None:
    """A second level of targets: (f2, f1, n) on a model of batch shape (f1,)."""
    parent = stream(12).update(*draw(15))
    x, y = draw(4, seed=1)[0], torch.randn(3, 4, dtype=F64)
    x2, y2 = draw(2, seed=2)[0], torch.randn(5, 3, 2, dtype=F64)
    child = parent.condition_on_observations(x, y).condition_on_observations(x2, y2)
    assert child.state.r.shape == (5, 3, 12) and child.state.G.shape == (12, 12)
    for i in range(5):
        for j in range(3):
            alone = parent.condition_on_observations(torch.cat([x, x2]), torch.cat([y[j], y2[i, j]]))
            assert_same_posterior(child, alone, 1e-9, (i, j))


def test_a_batch_of_kernels_with_fantasies() -> None:
    lengthscales = torch.tensor([0.8, 1.3])
    parent = stream(12, lengthscale=lengthscales, batch_shape=(2,)).update(*draw(15))
    x, y = draw(4, seed=1)[0], torch.randn(3, 2, 4, dtype=F64)
    child = parent.condition_on_observations(x, y)
    assert child.state.G.shape == (2, 12, 12) and child.state.r.shape == (3, 2, 12)
    for j, lengthscale in enumerate(lengthscales.tolist()):
        single = stream(12, lengthscale=lengthscale).update(*draw(15))
        for i in range(3):
            assert_same_posterior(child, single.condition_on_observations(x, y[i, j]), 1e-7, (i, j))


def test_a_fantasy_model_goes_on_as_a_stream() -> None:
    """A batch of models is updated, stretched, saved and loaded like any other."""
    parent = stream(20).update(*draw(15))
    child = parent.condition_on_observations(draw(4)[0], torch.randn(3, 4, dtype=F64))
    x, y = torch.linspace(8, 11, 6, dtype=F64), torch.randn(3, 6, dtype=F64)
    child.update(x, y)
    assert child.features.horizon == 12.5 and child.state.r.shape == (3, 20)
    loaded = stream(20)
    loaded.load_state_dict(child.state_dict())
    assert_identical(loaded, snapshot(child))
    with torch.no_grad():
        assert torch.equal(loaded(AT).mean, child(AT).mean)


@pytest.mark.parametrize(
    ("x", "y"),
    [((2, 5, 1), (3, 5)), ((5, 1), (5, 2)), ((2, 5, 1), (2, 4)), ((4, 2, 5, 1), (3, 5))],
)
def test_batches_that_do_not_broadcast(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    parent = stream(12).update(*draw(5))
    before = snapshot(parent)
    with pytest.raises(ValueError, match=r"^y: "):
        parent.condition_on_observations(torch.ones(x, dtype=F64), torch.ones(y, dtype=F64))
    assert_identical(parent, before)


def test_points_as_features() -> None:
    parent = stream(InducingPoints(AT)).update(*draw(15))
    x, y = draw(6, seed=1)
    child = parent.condition_on_observations(x, y)
    assert_same_posterior(child, copy.deepcopy(parent).update(x, y), 1e-10)
    assert child.features.points is not parent.features.points


# Gradients


def finite_difference(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-5) -> Tensor:
    columns = []
    for i in range(at.numel()):
        step = torch.zeros_like(at).reshape(-1)
        step[i] = h
        step = step.reshape(at.shape)
        columns.append((function(at + step) - function(at - step)) / (2 * h))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("quantity", ["mean", "variance"])
@pytest.mark.parametrize("argument", ["x", "y"])
def test_conditioning_is_differentiable(quantity: str, argument: str) -> None:
    """Gradients of the new posterior with respect to the fantasy, against finite differences of the dense oracle."""
    past, new, at = draw(15), draw(3, seed=1), AT[::3]
    parent = stream(9, jitter=0.0).update(*past)
    basis, noise = functionals(parent.features), torch.full((18,), 0.1, dtype=F64)

    def reference(x: Tensor, y: Tensor) -> Tensor:
        data = torch.cat([past[0], x]), torch.cat([past[1], y])
        q, _ = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, basis, *data, noise)
        return getattr(oracle.conditional(oracle.rbf(1.0), oracle.zero, basis, q, oracle.at_points(at)), quantity)

    def model(x: Tensor, y: Tensor) -> Tensor:
        return getattr(parent.condition_on_observations(x, y)(at), quantity)

    def in_argument(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return (lambda v: function(v, new[1])) if argument == "x" else (lambda v: function(new[0], v))

    where = new[0] if argument == "x" else new[1]
    jacobian = torch.autograd.functional.jacobian(in_argument(model), where)
    assert_close(jacobian, finite_difference(in_argument(reference), where), 1e-6)
    if quantity == "mean" or argument == "x":
        assert jacobian.abs().max() > 1e-2


def test_gradients_pass_through_two_conditionings_and_the_evidence() -> None:
    parent = stream(9).update(*draw(10))

    def value(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
        child = parent.condition_on_observations(x1, y1).get_fantasy_model(x2, y2)
        return child(AT[2:4]).mean.sum() + child(AT[2:4]).covariance_matrix.sum()

    arguments = [part.requires_grad_() for seed in (1, 2) for part in draw(2, seed=seed)]
    assert torch.autograd.gradcheck(value, arguments)


@pytest.mark.parametrize("extend", [False, True])
def test_gradients_in_batches_and_beyond_the_horizon(extend: bool) -> None:
    """As a knowledge gradient needs them: x (b, n, d), y (f, b, n)."""
    parent = stream(16).update(*draw(10))
    x = torch.tensor([[[3.0], [9.0]], [[11.0], [1.0]]], dtype=F64).requires_grad_()
    y = torch.randn(3, 2, 2, dtype=F64).requires_grad_()

    def value(x: Tensor, y: Tensor) -> Tensor:
        child = parent.condition_on_observations(x, y, extend_horizon=extend)
        return child(AT[:3]).mean.sum(-1) + child(AT[:3]).covariance_matrix.sum((-1, -2))

    assert torch.autograd.gradcheck(value, (x, y), atol=1e-4)
    assert parent.state.G.grad_fn is None


def test_no_gradient_reaches_the_parent() -> None:
    parent = stream(12).update(*draw(10))
    x, y = draw(4, seed=1)
    child = parent.condition_on_observations(x.requires_grad_(), y.requires_grad_())
    child(AT).mean.sum().backward()
    assert x.grad is not None and y.grad is not None and x.grad.abs().max() > 0
    for model in (parent, child):
        assert {name: p.grad for name, p in model.named_parameters() if p.grad is not None} == {}
    assert not any(value.requires_grad for _, value in parent.state.items())


def test_an_update_of_the_child_cuts_the_graph() -> None:
    x, y = draw(4)
    child = stream(12).condition_on_observations(x.requires_grad_(), y)
    assert child.state.G.requires_grad
    child.update(*draw(4, seed=1))
    assert not any(value.requires_grad for _, value in child.state.items())


def test_a_child_with_a_graph_is_saved_without_it() -> None:
    x, y = draw(4)
    child = stream(12).condition_on_observations(x, y.requires_grad_())
    assert child.state.r.requires_grad
    assert not any(value.requires_grad for value in child.state_dict().values())
