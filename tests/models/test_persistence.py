"""A stream that is saved, copied, cast or interrupted goes on exactly as if nothing had happened."""

import copy
import gc
import io
import warnings
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpseq.features import HippoFeatures, InducingPoints
from gpseq.models import CapacityWarning, StreamingGP
from tests.oracles_streaming import F64, assert_identical, draw, gpytorch_kernel, snapshot, stream, variance_of

AT = torch.linspace(-1.0, 16.0, 11, dtype=F64)
LASTS = (6.0, 9.0, 9.5, 13.0, 16.0)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adf": {"transfer": "adf"},
    "none": {"horizon_growth": None},
    "growing order": {"max_features": 60, "tolerance": 1e-6},
    "start": {"start": -2.0},
    "float32": {"dtype": torch.float32},
    "matern": {"nu": 1.5, "max_features": 90},
    "batch": {"lengthscale": torch.tensor([0.9, 1.4]), "batch_shape": (2,)},
    "mean": {"mean_module": gpytorch.means.LinearMean(1)},
}


def build(**options: Any) -> StreamingGP:
    """A fresh model with other values of its hyperparameters each time it is built with a mean."""
    return stream(26, 6.0, **copy.deepcopy(options))


def feed(model: StreamingGP, chunks: range) -> StreamingGP:
    for index in chunks:
        x, y = draw(12, LASTS[index], seed=index)
        x[0] = LASTS[index]
        model.update(x, y)
    return model


def assert_same_stream(actual: StreamingGP, expected: StreamingGP) -> None:
    """Bit for bit: what is saved, what is predicted, what is said of the memory."""
    assert_identical(actual, snapshot(expected))
    assert actual.features.horizon == expected.features.horizon
    with torch.no_grad():
        a, b = actual(AT), expected(AT)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.covariance_matrix, b.covariance_matrix)
    assert torch.equal(actual.log_evidence, expected.log_evidence)
    assert torch.equal(actual.residual_variance(), expected.residual_variance())


def saved_and_loaded(model: StreamingGP, how: str, tmp_path: Path) -> dict[str, Any]:
    if how == "plain":
        return {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("how", ["plain", "torch.save"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("stop", range(6))
def test_save_and_load_in_mid_stream(options: dict[str, Any], how: str, stop: int, tmp_path: Path) -> None:
    """A fresh model, loaded at any chunk, continues bit for bit like the uninterrupted stream."""
    uninterrupted = feed(build(**options), range(5))
    first = feed(build(**options), range(stop))
    second = build(**options)
    second.covar_module.outputscale = 5.0  # the saved values decide
    second.load_state_dict(saved_and_loaded(first, how, tmp_path))
    assert_same_stream(second, first)
    assert_same_stream(feed(second, range(stop, 5)), uninterrupted)


@given(stop=st.integers(0, 5), transfer=st.sampled_from(["vfe", "adf"]))
@settings(max_examples=6)
def test_a_deep_copy_is_independent(stop: int, transfer: str) -> None:
    model = feed(build(transfer=transfer), range(stop))
    before, twin = snapshot(model), copy.deepcopy(model)
    assert_same_stream(twin, model)
    feed(twin, range(stop, 5))
    twin.covar_module.outputscale = 3.0
    assert_identical(model, before)
    assert_same_stream(feed(model, range(stop, 5)), feed(build(transfer=transfer), range(5)))


def test_a_whole_model_goes_through_torch_save() -> None:
    model = feed(build(), range(2))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same_stream(loaded, model)
    assert_same_stream(feed(loaded, range(2, 5)), feed(model, range(2, 5)))


def test_load_into_a_model_that_has_moved_on() -> None:
    """Back to an earlier time: the horizon and the order of the saved stream come back too."""
    options = OPTIONS["growing order"]
    model = feed(build(**options), range(1))
    early = {name: value.clone() for name, value in model.state_dict().items()}
    feed(model, range(1, 5))
    assert model.features.num_features > 26
    model.load_state_dict(early)
    assert model.features.num_features == 26
    assert_same_stream(feed(model, range(1, 5)), feed(build(**options), range(5)))


def test_a_snapshot_is_not_changed_by_later_updates() -> None:
    """State is a value: what was read of it yesterday stays what it was."""
    model = feed(build(), range(1))
    state, saved = model.state, model.state_dict()
    kept = {name: value.clone() for name, value in saved.items()}
    values = {name: value.clone() for name, value in state.items()}
    feed(model, range(1, 5))
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    assert all(torch.equal(getattr(state, name), value) for name, value in values.items())


def test_a_frozen_state_is_not_changed_by_loading() -> None:
    model = feed(build(), range(1))
    state = model.state
    values = {name: value.clone() for name, value in state.items()}
    model.load_state_dict(feed(build(lengthscale=1.3), range(1)).state_dict())
    for name, value in values.items():
        assert torch.equal(getattr(state, name), value), name


def test_two_models_from_the_same_features_are_independent() -> None:
    """As one writes them to compare two kernels: loading one must not move the basis of the other."""
    features = HippoFeatures(26, 6.0)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    a, b = (StreamingGP(features, gpytorch_kernel(l), likelihood).eval() for l in (1.0, 1.5))
    feed(a, range(1))
    before = snapshot(a)
    other = StreamingGP(HippoFeatures(26, 6.0), gpytorch_kernel(), likelihood).eval()
    b.load_state_dict(feed(other, range(4)).state_dict())
    assert_identical(a, before)
    assert a.features.horizon == 6.0 and features.horizon == 6.0


@pytest.mark.parametrize("num", [8, 12])
def test_inducing_points_are_saved_too(num: int) -> None:
    """Also when the stream has since been laid on another number of points."""

    def points(num: int) -> InducingPoints:
        return InducingPoints(torch.linspace(0, 10, num, dtype=F64))

    model = stream(points(8)).update(*draw(20))
    model.rebase(points(num))
    loaded = stream(points(8))
    loaded.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert_identical(loaded, snapshot(model))
    x, y = draw(10, seed=1)
    assert torch.equal(loaded.update(x, y).log_evidence, model.update(x, y).log_evidence)


def test_a_resumed_stream_does_not_repeat_the_capacity_warning() -> None:
    """Once a doubling, whether or not the process was restarted in between."""
    model = stream(8, 6.0)
    point = torch.zeros(1, dtype=F64)
    with pytest.warns(CapacityWarning):
        model.update(point + 16.0, point)
    resumed = stream(8, 6.0)
    resumed.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.update(point + 20.0, point)
        resumed.update(point + 20.0, point)


@pytest.mark.parametrize("broken", ["missing", "unexpected"])
def test_a_foreign_state_dict_is_refused(broken: str) -> None:
    model = stream(12)
    saved = model.state_dict()
    if broken == "missing":
        del saved["variational_strategy.belief.G"]
    else:
        saved["variational_strategy.belief.X"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"belief\.G|belief\.X"):
        model.load_state_dict(saved)


@pytest.mark.cuda
def test_a_stream_moves_to_a_gpu_and_back() -> None:
    """The same numbers there, up to rounding; data left behind on the CPU are refused by name."""
    here, there = (feed(build(), range(2)) for _ in range(2))
    there.cuda()
    x, y = draw(12, LASTS[2], seed=2)
    with pytest.raises(ValueError, match=r"^x: expected a tensor on cuda"):
        there.update(x, y)
    there.update(x.cuda(), y.cuda())
    here.update(x, y)
    with torch.no_grad():
        torch.testing.assert_close(there(AT.cuda()).mean.cpu(), here(AT).mean, rtol=1e-7, atol=1e-7)
    loaded = build()
    loaded.load_state_dict(there.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(AT).mean, here(AT).mean, rtol=1e-7, atol=1e-7)
        back = there.cpu()(AT)
    torch.testing.assert_close(back.mean, here(AT).mean.detach(), rtol=1e-7, atol=1e-7)


# Memory and grad modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_updates_under_no_grad_and_inference_mode(mode: Any) -> None:
    """The stream may then be differentiated, conditioned, updated and loaded outside, like any other."""
    expected = feed(build(), range(3))
    model = build()
    with mode():
        feed(model, range(2))
    feed(model, range(2, 3))
    assert_same_stream(model, expected)

    model = build()
    with mode():
        feed(model, range(3))
    assert_same_stream(model, expected)
    at = AT.clone().requires_grad_()
    (model(at).mean.sum() + variance_of(model(at)).sum()).backward()
    x, y = draw(3, seed=9)
    child = model.condition_on_observations(x.requires_grad_(), y.requires_grad_())
    child(AT).mean.sum().backward()
    assert at.grad.abs().max() > 0 and x.grad.abs().max() > 0 and y.grad.abs().max() > 0
    model.load_state_dict(feed(build(lengthscale=1.2), range(3)).state_dict())
    assert model.covar_module.base_kernel.lengthscale.item() == pytest.approx(1.2)


def test_data_made_under_inference_mode() -> None:
    model = build()
    with torch.inference_mode():
        x, y = draw(12, 7.0)
    model.update(x, y)
    at = AT.clone().requires_grad_()
    model(at).mean.sum().backward()
    assert at.grad.abs().max() > 0


def test_a_model_built_under_inference_mode() -> None:
    with torch.inference_mode():
        HippoFeatures(27, 3.0, num_nodes=91)  # no cache may keep its tensors
    model = stream(HippoFeatures(27, 3.0, num_nodes=91)).update(*draw(12, 3.0))
    at = AT.clone().requires_grad_()
    model(at).mean.sum().backward()
    assert at.grad.abs().max() > 0


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("grad", ["inputs", "noise", "nothing"])
def test_memory_is_flat(grad: str) -> None:
    """No graph is kept of inputs that require one, and nothing piles up."""
    model = build(horizon_growth=None)
    counts = []
    for index in range(60):
        x, y = draw(5, 6.0 + 0.1 * index, seed=index)
        noise = torch.full_like(y, 0.1)
        if grad == "inputs":
            x, y = x.requires_grad_(), y.requires_grad_()
        elif grad == "noise":
            noise = noise.requires_grad_()
        model.update(x, y, noise=noise)
        model(AT), model.log_evidence
        if index in (9, 59):
            counts.append(num_tensors())
    assert counts[1] <= counts[0]
    for name, value in model.state.items():
        assert not value.requires_grad and value.grad_fn is None, name


def test_the_state_has_the_same_size_for_ever() -> None:
    model = build(lengthscale=1e3)
    size = sum(value.numel() for value in model.state_dict().values())
    for index in range(30):
        model.update(*draw(50, 6.0 * 1.2**index, seed=index))
    assert model.features.horizon > 1000
    assert sum(value.numel() for value in model.state_dict().values()) == size
