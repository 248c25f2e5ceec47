"""A streaming GP as a BoTorch model: equal to the dense model where it is exact, conditioned, saved, fitted."""

import copy
import io
import subprocess
import sys
import warnings
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("botorch")

from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.exceptions.warnings import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms.input import ChainedInputTransform, InputStandardize, Normalize, Warp
from botorch.models.transforms.outcome import ChainedOutcomeTransform, Log, Standardize
from botorch.posteriors import GPyTorchPosterior
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.pathwise import draw_matheron_paths
from botorch.utils.datasets import SupervisedDataset

from gpseq.features import HippoFeatures, InducingPoints, SelectedPoints, space_time_features, spread_points
from gpseq.integrations.botorch import FixedStandardize, StreamingSingleTaskGP
from gpseq.integrations.botorch_defaults import default_kernel
from gpseq.models import StreamingGP
from gpseq.variational import online

pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

F64 = torch.float64
UNIT = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=F64)
BOUNDS = torch.tensor([[-1.0, 2.0], [3.0, 6.0]], dtype=F64)


def data(num: int = 12, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Inputs within BOUNDS, targets of mean 4 or so."""
    generator = torch.Generator().manual_seed(seed)
    X = BOUNDS[0] + (BOUNDS[1] - BOUNDS[0]) * torch.rand(num, 2, generator=generator, dtype=F64)
    Y = 4.0 + 2.0 * torch.sin(X.sum(-1, keepdim=True)) + 0.1 * torch.randn(num, 1, generator=generator, dtype=F64)
    return X.to(dtype), Y.to(dtype)


def modules(noise: float = 0.01) -> dict[str, Any]:
    """Kernel, mean and likelihood with values of their own."""
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=2)).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = torch.tensor([[0.4, 0.6]]), 1.7
    mean = gpytorch.means.ConstantMean().double()
    mean.constant = 0.3
    likelihood = GaussianLikelihood().double()
    likelihood.noise = noise
    return {"covar_module": kernel, "mean_module": mean, "likelihood": likelihood}


def transforms() -> dict[str, Any]:
    return {"input_transform": Normalize(2, bounds=BOUNDS), "outcome_transform": FixedStandardize(4.0, 1.6)}


def streaming(X: Tensor, Y: Tensor, points: Tensor, Yvar: Tensor | None = None) -> StreamingSingleTaskGP:
    """Inducing points at ``points``, so that whatever lies there is exact."""
    transform = transforms()
    parts = modules()
    if Yvar is not None:
        del parts["likelihood"]
    features = InducingPoints(transform["input_transform"](points))
    return StreamingSingleTaskGP(X, Y, Yvar, features=features, jitter=1e-12, **transform, **parts)


def dense(X: Tensor, Y: Tensor, Yvar: Tensor | None = None) -> SingleTaskGP:
    """The oracle: BoTorch's own exact model with all the data."""
    parts = modules()
    if Yvar is not None:
        del parts["likelihood"]
    return SingleTaskGP(X, Y, Yvar, **transforms(), **parts).eval()


def numbers(model: StreamingSingleTaskGP) -> int:
    """All numbers that a model keeps."""
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def snapshot(model: StreamingSingleTaskGP) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(before: dict[str, Tensor], model: StreamingSingleTaskGP) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def assert_posteriors(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Mean, variance and full covariance."""
    assert actual.mean.shape == expected.mean.shape and actual.variance.shape == expected.variance.shape
    assert (actual.mean - expected.mean).abs().max() < tolerance
    assert (actual.variance - expected.variance).abs().max() < tolerance
    covariances = [p.distribution.covariance_matrix for p in (actual, expected)]
    assert (covariances[0] - covariances[1]).abs().max() < tolerance


# Against the dense model


@pytest.mark.parametrize("known", [False, True], ids=["inferred noise", "known noise"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("noisy", [False, True])
def test_the_posterior_is_that_of_the_dense_model(batch: tuple[int, ...], noisy: bool, known: bool) -> None:
    X, Y = data()
    Yvar = torch.rand(len(Y), 1, dtype=F64) / 10 + 0.01 if known else None
    model = streaming(X[:5], Y[:5], X, None if Yvar is None else Yvar[:5])
    model.update(X[5:], Y[5:], None if Yvar is None else Yvar[5:])
    at = data(7 * max(1, torch.Size(batch).numel()), seed=1)[0].view(*batch, 7, 2)
    with torch.no_grad():
        actual, expected = (m.posterior(at, observation_noise=noisy) for m in (model, dense(X, Y, Yvar)))
    assert isinstance(actual, GPyTorchPosterior)
    assert actual.mean.shape == (*batch, 7, 1)
    assert_posteriors(actual, expected)


def test_noise_as_a_tensor_and_a_posterior_transform() -> None:
    X, Y = data()
    model, oracle = streaming(X, Y, X), dense(X, Y)
    noise = torch.rand(5, 1, dtype=F64)
    transform = ScalarizedPosteriorTransform(torch.tensor([2.0], dtype=F64), offset=1.0)
    for kwargs in ({"observation_noise": noise}, {"posterior_transform": transform}, {"output_indices": [0]}):
        expected = oracle.posterior(X[:5] + 0.1, **kwargs)
        assert_posteriors(model.posterior(X[:5] + 0.1, **kwargs), expected)
    assert_posteriors(
        model.posterior(X[:5] + 0.1, observation_noise=noise[:1]),
        oracle.posterior(X[:5] + 0.1, observation_noise=noise[:1].expand(5, 1)),
    )


@pytest.mark.parametrize("known", [False, True], ids=["inferred noise", "known noise"])
def test_conditioning_and_fantasies_are_those_of_the_dense_model(known: bool) -> None:
    X, Y = data(16)
    Yvar = torch.full_like(Y, 0.02) if known else None
    new, targets = X[12:], Y[12:] + 1.0
    noise = torch.full_like(targets, 0.02 / 1.6**2) if known else None  # after the outcome transform, as in BoTorch
    model = streaming(X[:12], Y[:12], X, None if Yvar is None else Yvar[:12])
    oracle = dense(X[:12], Y[:12], None if Yvar is None else Yvar[:12])
    at = data(6, seed=3)[0]
    with torch.no_grad():
        oracle.posterior(at)  # BoTorch conditions its caches
        actual = model.condition_on_observations(new, targets, noise)
        expected = oracle.condition_on_observations(new, targets, noise=noise)
        assert type(actual) is StreamingSingleTaskGP and actual.batch_shape == ()
        assert_posteriors(actual.posterior(at), expected.posterior(at))
        sampler = SobolQMCNormalSampler(torch.Size([5]), seed=2)
        actual, expected = (m.fantasize(new.view(2, 2, 2), sampler) for m in (model, oracle))
        assert actual.batch_shape == expected.batch_shape == (5, 2)
        assert_posteriors(actual.posterior(at), expected.posterior(at), 1e-5)


def test_fantasies_64_x_16_in_one_call_equal_a_loop() -> None:
    X, Y = data(20)
    model = streaming(X, Y, X)
    new = data(16 * 3, seed=1)[0].view(16, 3, 2)
    targets = 4 + torch.randn(64, 16, 3, 1, dtype=F64)
    at = data(5, seed=2)[0]
    with torch.no_grad():
        batch = model.condition_on_observations(new, targets)
        state = batch.model.state
        assert batch.batch_shape == (64, 16)
        assert state.G.shape == (16, 20, 20) and state.r.shape == (64, 16, 20)
        together = batch.posterior(at)
        assert together.mean.shape == (64, 16, 5, 1)
        for f, b in ((0, 0), (63, 15), (17, 4)):
            one = model.condition_on_observations(new[b], targets[f, b]).posterior(at)
            assert torch.allclose(together.mean[f, b], one.mean, atol=1e-9)
            covariance = together.distribution.covariance_matrix[f, b]
            assert torch.allclose(covariance, one.distribution.covariance_matrix, atol=1e-9)


@settings(max_examples=15)
@given(st.integers(0, 8), st.integers(0, 10**6))
def test_sequential_conditioning_is_joint_conditioning(split: int, seed: int) -> None:
    X, Y = data(12)
    new, targets = data(8, seed=seed)
    model = streaming(X, Y, X)
    at = data(5, seed=seed + 1)[0]
    with torch.no_grad():
        joint = model.condition_on_observations(new, targets).posterior(at)
        first = model.condition_on_observations(new[:split], targets[:split])
        assert_posteriors(first.condition_on_observations(new[split:], targets[split:]).posterior(at), joint, 1e-8)
        assert_posteriors(copy.deepcopy(model).update(new, targets).posterior(at), joint, 1e-8)


def test_fantasies_of_fantasies() -> None:
    """As a multi-step lookahead makes them."""
    X, Y = data(12)
    model = streaming(X, Y, X)
    new = data(4, seed=1)[0]
    sampler = SobolQMCNormalSampler(torch.Size([3]), seed=0)
    first = model.fantasize(new.view(4, 1, 2), sampler)
    second = first.fantasize(new.view(4, 1, 2) + 0.1, SobolQMCNormalSampler(torch.Size([2]), seed=1))
    assert second.batch_shape == (2, 3, 4)
    assert second.posterior(X[:5].view(1, 5, 2)).mean.shape == (2, 3, 4, 5, 1)
    assert second.fantasize(new[:0], sampler).batch_shape == (3, 2, 3, 4)


# What the old model and the new one share


def test_the_parent_is_untouched_and_a_single_child_is_its_own() -> None:
    X, Y = data()
    for Yvar in (None, torch.full_like(Y, 0.1)):
        model = streaming(X, Y, X, Yvar)
        before, noise = snapshot(model), model.likelihood.noise.clone()
        child = model.condition_on_observations(X[:4], Y[:4] + 1, None if Yvar is None else Yvar[:4])
        child.update(X[4:8], Y[4:8] + 1, None if Yvar is None else Yvar[4:8] * 3)
        child.posterior(X)
        assert_same(before, model)
        assert torch.equal(model.likelihood.noise, noise)
        assert len(model.train_targets) == len(X) and len(child.train_targets) == len(X) + 4
        if Yvar is not None:  # the mean noise belongs to what each has seen
            assert child.likelihood.noise > model.likelihood.noise == 0.1 / 1.6**2
        # Whatever is done to the hyperparameters of the child stays there.
        fit_gpytorch_mll(ExactMarginalLogLikelihood(child.likelihood, child))
        assert_same(before, model)
        assert not torch.equal(child.covar_module.outputscale, model.covar_module.outputscale)
        other = streaming(X[:4], Y[:4], X[:6], None if Yvar is None else Yvar[:4])
        other.covar_module.outputscale = 9.0
        other.outcome_transform.means.fill_(7.0)
        child.load_state_dict(other.state_dict())
        assert_same(before, model)
        assert child.covar_module.outputscale == 9.0 and len(child.features.points) == 6


def test_a_batch_of_fantasies_shares_hyperparameters_and_changes_none() -> None:
    X, Y = data()
    for Yvar in (None, torch.full_like(Y, 0.1)):
        model = streaming(X, Y, X, Yvar)
        noise = None if Yvar is None else Yvar[:4]
        before = snapshot(model)
        for new, targets in ((X[:4], Y[:4].expand(3, 4, 1)), (X[:4].view(2, 2, 2), Y[:4].view(2, 2, 1))):
            batch = model.condition_on_observations(new, targets, None if noise is None else noise[: new.shape[-2]])
            assert batch.covar_module is model.covar_module and batch.mean_module is model.mean_module
            assert batch.input_transform is model.input_transform
            assert (batch.likelihood is model.likelihood) is (Yvar is None)
            grandchild = batch.condition_on_observations(X[4:6], Y[4:6], None if noise is None else noise[:2])
            assert grandchild.covar_module is model.covar_module
            other = streaming(X[:4], Y[:4] + 1, X, noise)
            other.covar_module.outputscale = 9.0
            for each in (batch, grandchild):
                with pytest.raises(ValueError, match=r"state_dict: a batch of models .* is not loaded into"):
                    each.load_state_dict(other.state_dict())
            assert_same(before, model)


def test_a_stream_that_learns_does_not_learn_in_a_batch() -> None:
    """A batch shares the hyperparameters; a change of basis would move those of the model that it is of."""
    X, Y = data(20)
    for learn in ("warmup", "basis_change"):
        stream = StreamingGP(HippoFeatures(8, 1.0), RBFKernel().double(), GaussianLikelihood().double(), learn=learn)
        model = StreamingSingleTaskGP.from_stream(stream)
        if learn == "basis_change":
            model.update(X[:, :1].abs() / 4, Y)
        before = snapshot(model)
        batch = model.condition_on_observations(X[:2, :1].abs() / 4, torch.zeros(3, 2, 1, dtype=F64))
        batch.update(X[:, :1].abs() + 2, Y.expand(3, 20, 1))
        assert_same(before, model)


def test_conditioning_keeps_no_data() -> None:
    X, Y = data()
    model = streaming(X, Y, X)
    child = model.condition_on_observations(X, Y)
    grandchild = child.condition_on_observations(X + 0.1, Y)
    assert numbers(model) == numbers(child) == numbers(grandchild)
    assert all(getattr(child, name) is getattr(model, name) for name in ("_window_X", "_window_Y"))


def test_memory_is_flat_over_many_updates() -> None:
    model = StreamingSingleTaskGP(*data(0), warmup_size=20, **transforms())
    sizes = []
    for step in range(50):
        model.update(*data(5, seed=step))
        sizes.append(numbers(model))
    assert sizes[4] == sizes[49]
    assert model.model.num_observations == 250 and len(model.train_targets) == 20
    assert torch.equal(model.train_inputs[0][-5:], data(5, seed=49)[0])


# Gradients and modes


def test_gradients_through_conditioning_in_x_and_y() -> None:
    X, Y = data(8)
    model = streaming(X, Y, X)

    def value(new: Tensor, targets: Tensor, at: Tensor) -> Tensor:
        posterior = model.condition_on_observations(new, targets).posterior(at)
        return posterior.mean.sum() + posterior.variance.sum()

    new, targets = data(3, seed=1)
    inputs = (new.requires_grad_(), targets.requires_grad_(), data(2, seed=2)[0].requires_grad_())
    assert torch.autograd.gradcheck(value, inputs, atol=1e-6)


def test_gradients_reach_x_through_fantasies() -> None:
    X, Y = data(8)
    model = streaming(X, Y, X)
    sampler = SobolQMCNormalSampler(torch.Size([2]), seed=0)

    def value(new: Tensor) -> Tensor:
        return model.fantasize(new, sampler).posterior(X[:3]).mean.square().mean()

    assert torch.autograd.gradcheck(value, (data(2, seed=1)[0].requires_grad_(),), atol=1e-6)


def test_modes_and_grad_modes_leave_nothing_stale() -> None:
    X, Y = data()
    model = streaming(X, Y, X)
    with torch.no_grad():
        before = model.posterior(X).mean
    at = X.clone().requires_grad_()
    model.train()
    (gradient,) = torch.autograd.grad(model.posterior(at).mean.sum(), at)
    assert gradient.abs().max() > 0 and not model.training
    with torch.inference_mode():
        model.posterior(X)
    (again,) = torch.autograd.grad(model.posterior(at).mean.sum(), at)
    assert torch.equal(gradient, again)
    model.train()
    prior = model(X)
    assert torch.allclose(prior.mean, torch.full_like(prior.mean, 0.3))
    assert torch.equal(model.eval().posterior(X).mean.detach(), before)
    # A hyperparameter that changes takes effect at once.
    model.covar_module.base_kernel.lengthscale = 2.0
    assert not torch.allclose(model.posterior(X).mean, before)


def test_the_factor_is_computed_once_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y = data()
    model = streaming(X[:6], Y[:6], X)
    calls = []
    compute = online.posterior
    monkeypatch.setattr(online, "posterior", lambda state: calls.append(1) or compute(state))

    def fresh(target: StreamingSingleTaskGP) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            f = target.model(target.transform_inputs(X))
            transform = target.outcome_transform
            return f.mean * transform.stdvs[0] + transform.means[0], f.variance * transform.stdvs[0] ** 2

    def check(target: StreamingSingleTaskGP) -> None:
        for _ in range(2):
            posterior = target.posterior(X)
            for actual, expected in zip((posterior.mean, posterior.variance), fresh(target), strict=True):
                assert torch.allclose(actual.squeeze(-1), expected, atol=1e-9)

    with torch.inference_mode():
        model.posterior(X)
    assert len(calls) == 1
    at = X.clone().requires_grad_()
    model.posterior(at).mean.sum().backward()
    model.posterior(X)
    assert len(calls) == 1 and at.grad is not None
    check(model)
    model.update(X[6:9], Y[6:9])
    check(model)
    twin = copy.deepcopy(model)
    twin.update(X[9:], Y[9:])
    check(twin)
    check(model)
    child = model.condition_on_observations(X[9:], Y[9:] + 1)
    check(child)
    check(model)
    model.load_state_dict(twin.state_dict())
    check(model)
    model.covar_module.outputscale = 3.0
    check(model)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    check(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    check(torch.load(file, weights_only=False))
    # A graph is not kept: a second backward pass would meet freed tensors.
    new = X[:2].clone().requires_grad_()
    child = model.condition_on_observations(new, Y[:2])
    before = len(calls)
    for _ in range(2):
        child = model.condition_on_observations(new, Y[:2])
        torch.autograd.grad(child.posterior(X).variance.sum(), new)
        with torch.no_grad():
            child.posterior(X)
    assert len(calls) == before + 4


# Fitting


@pytest.mark.parametrize("known", [False, True], ids=["inferred noise", "known noise"])
def test_fit_gpytorch_mll_raises_the_marginal_likelihood(known: bool) -> None:
    X, Y = data(30)
    Yvar = torch.full_like(Y, 0.01) if known else None
    model = StreamingSingleTaskGP(X, Y, Yvar, **transforms())
    if Yvar is None:
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
    else:
        mll = ExactMarginalLogLikelihood(FixedNoiseGaussianLikelihood(Yvar.squeeze(-1) / 1.6**2), model)

    def value() -> float:
        mll.train()
        found = mll(model(*model.train_inputs), model.train_targets).item()
        mll.eval()
        return found

    before, evidence = value(), model.model.log_evidence.item()
    assert fit_gpytorch_mll(mll) is mll and not mll.training
    assert value() > before + 0.05
    assert model.model.log_evidence.item() > evidence + 1.5
    # The same values as BoTorch finds with its own model.
    oracle = SingleTaskGP(X, Y, Yvar, covar_module=default_kernel(2, None).to(X), **transforms())
    fit_gpytorch_mll(ExactMarginalLogLikelihood(oracle.likelihood, oracle))
    assert torch.allclose(model.covar_module.outputscale, oracle.covar_module.outputscale, rtol=1e-3)


def test_after_a_fit_the_belief_is_that_of_the_new_values() -> None:
    X, Y = data(30)
    fitted = StreamingSingleTaskGP(X, Y, features=SelectedPoints(40, 2), **transforms())
    fit_gpytorch_mll(ExactMarginalLogLikelihood(fitted.likelihood, fitted))
    # Nothing is left to be carried at each prediction.
    assert fitted.model.variational_strategy.current_state().G is fitted.model.state.G
    # All was in the window: as if the values had been known from the start.
    parts = {name: copy.deepcopy(getattr(fitted, name)) for name in ("covar_module", "mean_module", "likelihood")}
    fresh = StreamingSingleTaskGP(X, Y, features=SelectedPoints(40, 2), **transforms(), **parts)
    assert_posteriors(fitted.posterior(X), fresh.posterior(X), 1e-8)
    assert fitted.model.num_observations == 30


def test_a_fit_on_a_part_carries_the_belief() -> None:
    X, Y = data(60)
    model = StreamingSingleTaskGP(X, Y, warmup_size=20, **transforms())
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs={"options": {"maxiter": 50}})
    assert model.model.num_observations == 60
    assert model.model.variational_strategy.current_state().G is model.model.state.G
    parts = {name: copy.deepcopy(getattr(model, name)) for name in ("covar_module", "mean_module", "likelihood")}
    fresh = StreamingSingleTaskGP(X, Y, **transforms(), **parts)
    with torch.no_grad():
        gap = (model.posterior(X).mean - fresh.posterior(X).mean).square().mean().sqrt()
        assert gap < 0.1 * Y.std()


def test_a_failing_fit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streaming(*data(), data()[0])
    before = snapshot(model)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(StreamingGP, "update", refuse)
    with pytest.raises(RuntimeError, match="no luck"):
        model._follow_hyperparameters()
    assert_same(before, model)


def rebuilt_on(model: StreamingSingleTaskGP) -> Tensor:
    """The nodes of the features after a fit; all data are in the window."""
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs={"options": {"maxiter": 2}})
    assert model.model.num_observations == len(model.train_targets)
    assert_posteriors(copy.deepcopy(model).posterior(data(4)[0]), model.posterior(data(4)[0]), 1e-12)
    return model.features.nodes()


def test_a_fit_keeps_features_that_were_loaded() -> None:
    X, Y = data()
    large = streaming(X, Y, data(30, seed=2)[0])
    small = streaming(X, Y, data(10, seed=3)[0])
    small.load_state_dict(large.state_dict())
    assert torch.equal(rebuilt_on(small), large.features.nodes())
    for twin in (copy.deepcopy(large), large.subset_output([0])):
        assert torch.equal(rebuilt_on(twin), large.features.nodes())


@pytest.mark.parametrize("then", ["fit", "save", "copy"])
def test_a_fit_keeps_features_that_were_rebased_on(then: str) -> None:
    X, Y = data()
    points = Normalize(2, bounds=BOUNDS)(data(40, seed=2)[0])
    model = streaming(X, Y, data(10, seed=3)[0])
    model.model.rebase(InducingPoints(points))
    if then == "save":
        state = model.state_dict()
        model = streaming(X, Y, data(10, seed=3)[0])
        model.load_state_dict(state)
    elif then == "copy":
        model = copy.deepcopy(model)
    assert torch.equal(rebuilt_on(model), points)


def test_a_fit_begins_where_features_that_move_began() -> None:
    X, Y = data(30)
    X = X[:, :1].sort(0).values + 1

    def make(order: int) -> StreamingSingleTaskGP:
        features = HippoFeatures(order, 1.0, measure="legt", window=1.0)
        return StreamingSingleTaskGP(X[:0], Y[:0], features=features, horizon_growth=None)

    model, other = make(12), make(9)
    for start in range(0, 30, 10):
        model.update(X[start : start + 10], Y[start : start + 10])
    other.load_state_dict(model.state_dict())
    for each in (model, other, copy.deepcopy(model)):
        assert each.features.num_features == 12 and each.features.interval[0] > 1
        begun_on = copy.deepcopy(each._features_to_begin_with())
        assert begun_on.interval == (0.0, 1.0) and begun_on.num_features == 12
        fit_gpytorch_mll(ExactMarginalLogLikelihood(each.likelihood, each))
        assert each._features_to_begin_with().interval == (0.0, 1.0)
    assert_posteriors(model.posterior(X), other.posterior(X), 1e-6)
    # Of a larger memory that was asked for meanwhile more is kept than where the stream once began.
    model.model.rebase(HippoFeatures(20, 4.0))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    assert model.features.num_features == 20 and model.features.measure == "legs"


# Saving and copying


def make(kind: str) -> StreamingSingleTaskGP:
    """Models whose state changes its size as it learns."""
    X, Y = data(0)
    if kind == "selected points":
        return StreamingSingleTaskGP(X, Y, features=SelectedPoints(25, 2), warmup_size=10, **transforms())
    if kind == "adaptive order":
        features = HippoFeatures(4, horizon=1.0)
        return StreamingSingleTaskGP(X[:, :1], Y, features=features, max_features=60, tolerance=1e-2)
    if kind == "time":
        features = space_time_features(6, spread_points(5, 1), window=2.0, horizon=1.0)
        return StreamingSingleTaskGP(X, Y, features=features, time_dim=0)
    return StreamingSingleTaskGP(X, Y, Y, **transforms())


@pytest.mark.parametrize("kind", ["selected points", "adaptive order", "time", "known noise"])
def test_a_saved_model_goes_on_where_it_was(kind: str) -> None:
    model, chunks = make(kind), [data(15, seed=seed) for seed in range(3)]

    def learn(target: StreamingSingleTaskGP, index: int) -> None:
        X, Y = chunks[index]
        X = X[:, :1] if kind == "adaptive order" else X
        X = X if kind == "known noise" else X + 2  # the default features are where the transform leads
        target.update(X, Y, torch.full_like(Y, 0.1 + index) if kind == "known noise" else None)

    learn(model, 0)
    learn(model, 1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = make(kind)
    loaded.load_state_dict(torch.load(file))
    twin = copy.deepcopy(model)
    at = data(4, seed=9)[0][:, : loaded.train_inputs[0].shape[-1]]
    for other in (loaded, twin):
        assert_same(snapshot(model), other)
        expected = model.posterior(at, observation_noise=True)
        assert_posteriors(other.posterior(at, observation_noise=True), expected, 1e-12)
    before = snapshot(model)
    learn(loaded, 2)
    assert_same(before, model)
    learn(model, 2)
    learn(twin, 2)
    assert_posteriors(loaded.posterior(at), model.posterior(at), 1e-9)
    assert_posteriors(twin.posterior(at), model.posterior(at), 1e-12)


def test_loading_into_a_fantasy_leaves_the_belief_and_window_of_the_parent() -> None:
    X, Y = data()
    model = streaming(X, Y, X)
    window = model.train_inputs[0].clone()
    state = {name: value.clone() for name, value in model.model.state.items()}
    other = streaming(X[:4], Y[:4], X)
    model.condition_on_observations(X, Y).load_state_dict(other.state_dict())
    assert torch.equal(model.train_inputs[0], window)
    assert all(torch.equal(value, getattr(model.model.state, name)) for name, value in state.items())


# Construction


def test_beginning_without_data_is_the_prior() -> None:
    X, Y = data()
    for Yvar in (None, Y[:0]):
        model = StreamingSingleTaskGP(X[:0], Y[:0], Yvar)
        posterior = model.posterior(X)
        assert torch.allclose(posterior.mean, torch.zeros_like(Y)) and posterior.variance.isfinite().all()
        assert model.fantasize(X[:2], SobolQMCNormalSampler(torch.Size([3]))).batch_shape == (3,)
        with pytest.raises(ValueError, match="no observations in a window"):
            fit_gpytorch_mll(ExactMarginalLogLikelihood(GaussianLikelihood(), model))


def test_a_time_column_makes_a_product_kernel_and_a_window() -> None:
    t = torch.arange(40, dtype=F64)
    X = torch.stack([torch.rand(40, dtype=F64), t], -1)
    Y = torch.sin(6 * X[:, :1] + t.unsqueeze(-1) / 10)
    model = StreamingSingleTaskGP(X[:20], Y[:20], time_dim=-1, window=15.0)
    assert [part.time_dim for part in model.features.parts] == [1] * 16
    assert model.features.num_features == 16 * 12
    assert model.features.parts[3].interval == (4.0, 19.0)
    time, other = model.covar_module.base_kernel.kernels
    assert time.active_dims.tolist() == [1] and other.active_dims.tolist() == [0]
    model.update(X[20:], Y[20:])
    assert model.features.parts[0].interval == (24.0, 39.0)
    only_time = StreamingSingleTaskGP(X[:, 1:], Y, time_dim=0)
    assert only_time.features.num_features == 12 and only_time.features.parts[0].interval == (0.0, 39.0)


def test_space_time_features_are_a_kronecker_product() -> None:
    points = spread_points(5, 2)
    features = space_time_features(4, points, window=3.0, horizon=7.0, time_dim=1)
    time, space = RBFKernel(active_dims=[1]).double(), RBFKernel(active_dims=[0, 2]).double()
    memory = HippoFeatures(4, 7.0, measure="legt", window=3.0)
    temporal = memory.kuu(RBFKernel().double()).to_dense()
    full = torch.cat([points[:, :1], torch.zeros(5, 1, dtype=F64), points[:, 1:]], -1)
    expected = torch.kron(space(full).to_dense().contiguous(), temporal.contiguous())
    assert torch.allclose(features.kuu(time * space).to_dense(), expected, atol=1e-12)


def test_a_stream_is_wrapped_and_goes_on_living() -> None:
    parts = modules()
    stream = StreamingGP(InducingPoints(spread_points(30, 2)), *(parts[k] for k in ("covar_module", "likelihood")))
    X, Y = torch.rand(9, 2, dtype=F64), torch.rand(9, 1, dtype=F64)
    stream.update(X, Y.squeeze(-1))
    model = StreamingSingleTaskGP.from_stream(stream, outcome_transform=FixedStandardize(1.0, 2.0))
    assert model.model is stream
    with torch.no_grad():
        assert torch.allclose(model.posterior(X).mean.squeeze(-1), 1 + 2 * stream(X).mean)
        model.update(X, 1 + 2 * Y)
    assert stream.num_observations == 18 and len(model.train_targets) == 9
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    assert stream.num_observations == 18
    with pytest.raises(TypeError, match="stream: expected StreamingGP"):
        StreamingSingleTaskGP.from_stream(model)  # type: ignore[arg-type]


def test_construct_inputs_and_subset_output() -> None:
    X, Y = data()
    X = Normalize(2, bounds=BOUNDS)(X)
    model = StreamingSingleTaskGP(
        **StreamingSingleTaskGP.construct_inputs(SupervisedDataset(X, Y, feature_names=["a", "b"], outcome_names=["y"]))
    )
    assert model.num_outputs == 1 and model.batch_shape == ()
    for index in ([0], [-1]):
        assert_posteriors(model.subset_output(index).posterior(X), model.posterior(X), 1e-12)
        assert_posteriors(model.posterior(X, output_indices=index), model.posterior(X), 1e-15)
    for wrong in ([0, 1], [1], [-2], [7], []):
        with pytest.raises(NotImplementedError, match="this model has one output"):
            model.subset_output(wrong)
        with pytest.raises(ValueError, match="output_indices: "):
            model.posterior(X, output_indices=wrong)


def test_float32_is_warned_of_and_works() -> None:
    X, Y = data(dtype=torch.float32)
    with pytest.warns(InputDataWarning):
        model = StreamingSingleTaskGP(X, Y, **transforms())
    double = StreamingSingleTaskGP(X.double(), Y.double(), **transforms())
    with torch.no_grad():
        posterior = model.posterior(X)
        assert posterior.mean.dtype == torch.float32
        assert torch.allclose(posterior.mean.double(), double.posterior(X.double()).mean, atol=1e-3)
    assert model.model.state.G.dtype == F64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_parts_of_another_dtype_are_cast_before_anything_is_learnt(dtype: torch.dtype) -> None:
    """Otherwise the belief would belong to values that were rounded afterwards, and be carried at each prediction."""
    X, Y = (value.to(dtype) for value in data())
    kernel = ScaleKernel(RBFKernel()).to(torch.float32 if dtype == F64 else F64)
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.37, 1.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputDataWarning)
        model = StreamingSingleTaskGP(X, Y, covar_module=kernel, **transforms())
    assert model.covar_module.outputscale.dtype == dtype
    assert model.model.variational_strategy.current_state().G is model.model.state.G


def test_fixed_statistics_keep_their_precision() -> None:
    mean, std = 1.0 + 1e-10, 2.0 + 1e-10
    for transform in (FixedStandardize(mean, std).float(), FixedStandardize(mean, std).to(torch.float16)):
        assert transform.means.item() == mean and transform.stdvs.item() == std
        Y, Yvar = torch.ones(3, 1), torch.ones(3, 1)
        for back in (transform(Y, Yvar), transform.untransform(Y, Yvar)):
            assert all(value.dtype == torch.float32 for value in back)
        posterior = GPyTorchPosterior(gpytorch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3)))
        scaled = transform.untransform_posterior(posterior)
        assert scaled.mean.dtype == scaled.variance.dtype == scaled.rsample().dtype == torch.float32
        assert torch.allclose(scaled.variance, torch.full((3, 1), 4.0))
        assert transform.means.dtype == F64


# Refusals


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        ({"input_transform": Normalize(2)}, "Normalize learns its coefficients.*keeps no data"),
        ({"input_transform": InputStandardize(2)}, "InputStandardize learns"),
        ({"input_transform": Warp(2, indices=[0], bounds=BOUNDS)}, "Warp has parameters that are learnt"),
        ({"input_transform": ChainedInputTransform(a=Normalize(2, bounds=BOUNDS), b=Normalize(2))}, "Normalize learns"),
        ({"outcome_transform": Standardize(1)}, "Standardize learns its statistics.*FixedStandardize"),
        ({"outcome_transform": ChainedOutcomeTransform(a=Log(), b=Standardize(1))}, "Standardize learns"),
    ],
)
def test_transforms_that_learn_are_refused(transform: dict[str, Any], match: str) -> None:
    stream = StreamingGP(InducingPoints(spread_points(4, 2)), RBFKernel(), GaussianLikelihood())
    with pytest.raises(ValueError, match=match):
        StreamingSingleTaskGP(*data(), **transform)
    with pytest.raises(ValueError, match=match):
        StreamingSingleTaskGP.from_stream(stream, **transform)


def test_fixed_transforms_that_are_not_affine_work() -> None:
    X, Y = data()
    warp = Warp(2, indices=[0, 1], bounds=UNIT).requires_grad_(False)
    chained = ChainedInputTransform(a=Normalize(2, bounds=BOUNDS), b=warp)
    log = ChainedOutcomeTransform(a=Log(), b=FixedStandardize(1.3, 0.5))
    model = StreamingSingleTaskGP(X, Y, input_transform=chained, outcome_transform=log)
    posterior = model.posterior(X)
    samples = posterior.rsample(torch.Size([64]))
    assert (samples > 0).all() and (samples.mean(0) - Y).abs().mean() < 0.5
    assert model.fantasize(X[:2], SobolQMCNormalSampler(torch.Size([3]))).batch_shape == (3,)


def test_fixed_standardisation_never_learns() -> None:
    transform = FixedStandardize(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).train()
    Y = torch.randn(6, 2, dtype=F64)
    scaled, variances = transform(Y, Y.square())
    assert torch.equal(scaled, (Y - transform.means) / transform.stdvs)
    assert torch.equal(transform.means, torch.tensor([[1.0, 2.0]], dtype=F64))
    back, back_variances = transform.untransform(scaled, variances)
    assert torch.allclose(back, Y) and torch.allclose(back_variances, Y.square())
    assert torch.equal(transform.subset_output([1])(Y[:, 1:])[0], scaled[:, 1:])
    loaded = FixedStandardize([0.0, 0.0], [1.0, 1.0])
    loaded.load_state_dict(transform.state_dict())
    assert torch.equal(loaded(Y)[0], scaled)
    for bad in ((float("nan"), 1.0), ([1.0, 2.0], 1.0)):
        with pytest.raises(ValueError, match="mean: expected a finite number"):
            FixedStandardize(*bad)
    for std in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="std: expected finite positive"):
            FixedStandardize(0.0, std)


NAN = torch.full((3, 1), float("nan"), dtype=F64)


@pytest.mark.parametrize(
    ("X", "Y", "Yvar", "match"),
    [
        (torch.rand(3, 3, dtype=F64), torch.rand(3, 1, dtype=F64), None, "X: expected 2 input columns"),
        (torch.rand(3, 2, dtype=F64), torch.rand(3, 2, dtype=F64), None, "Y: expected one output column"),
        (torch.rand(3, 2, dtype=F64), torch.rand(4, 1, dtype=F64), None, "Y: expected 3 rows"),
        (torch.rand(3, 2, dtype=F64), torch.rand(3, dtype=F64), None, "Y: expected at least two dimensions"),
        (torch.rand(3, 2, dtype=F64), NAN, None, "[yY]: expected finite targets"),
        (NAN.expand(3, 2), torch.rand(3, 1, dtype=F64), None, "x: expected finite inputs"),
        (torch.rand(3, 2, dtype=F64), torch.rand(3, 1, dtype=F64), torch.rand(3, 1, dtype=F64), "noise is inferred"),
    ],
)
def test_bad_observations_change_nothing(X: Tensor, Y: Tensor, Yvar: Tensor | None, match: str) -> None:
    model = streaming(*data(), data()[0])
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        model.update(X, Y, Yvar)
    if Yvar is None:
        with pytest.raises(ValueError, match=match):
            model.condition_on_observations(X, Y)
    assert_same(before, model)


def test_data_beyond_the_default_features_are_refused() -> None:
    """Far from the points everything is the prior, and nothing would say so."""
    X, Y = 10 * torch.rand(8, 2, dtype=F64), torch.rand(8, 1, dtype=F64)
    where = r"expected inputs in \[0, 1\].*column 1 goes from .* to .*Normalize\(2, bounds.*features"
    for bad in (X * torch.tensor([0.1, 1.0]), X * torch.tensor([0.1, -0.01])):
        with pytest.raises(ValueError, match="train_X: " + where):
            StreamingSingleTaskGP(bad, Y)
        for begun in (8, 0):
            model = StreamingSingleTaskGP(X[:begun] / 10, Y[:begun])
            before = snapshot(model)
            with pytest.raises(ValueError, match="^X: " + where):
                model.update(bad, Y)
            assert_same(before, model)
    timed = StreamingSingleTaskGP(X * torch.tensor([0.1, 1.0]), Y, time_dim=1)
    timed.update(X * torch.tensor([0.1, 1.0]) + torch.tensor([0.0, 20.0]), Y)
    with pytest.raises(ValueError, match=r"X: expected inputs in .*column 0 goes from"):
        timed.update(X, Y)
    bounds = torch.tensor([[0.0, 0.0], [10.0, 10.0]], dtype=F64)
    StreamingSingleTaskGP(X, Y, input_transform=Normalize(2, bounds=bounds)).update(X + 0.05, Y)
    StreamingSingleTaskGP(X, Y, features=InducingPoints(X)).update(10 * X, Y)
    model = StreamingSingleTaskGP(X / 10, Y)
    model.model.rebase(InducingPoints(X))
    assert model.update(X, Y).model.num_observations == 16
    loaded = StreamingSingleTaskGP(X / 10, Y)
    loaded.load_state_dict(model.state_dict())
    loaded.update(X, Y)


def test_time_that_begins_nowhere_is_refused() -> None:
    X, Y = data(0)
    for window in (None, 2.0):
        with pytest.raises(ValueError, match=r"train_X: expected at least one row with time_dim=0.*when time begins"):
            StreamingSingleTaskGP(X, Y, time_dim=0, window=window)


def test_bad_targets_are_named_and_no_other_model_is_advised() -> None:
    X, Y = data()
    model = streaming(X, Y, X)
    log = StreamingSingleTaskGP(X, Y, features=InducingPoints(X), outcome_transform=Log())
    for each, bad, match in (
        (model, torch.full_like(Y, float("nan")), "Y: expected finite targets, got NaN"),
        (log, -Y, "Y: expected finite targets after the outcome transform, got"),
    ):
        before = snapshot(each)
        with pytest.raises(ValueError, match=match) as caught:
            each.update(X, bad)
        assert "missing" not in str(caught.value)
        assert_same(before, each)


def test_batches_that_do_not_broadcast_are_named() -> None:
    X, Y = data()
    model = streaming(X, Y, X)
    batch = model.condition_on_observations(X[:2], Y[:2].expand(3, 2, 1))
    with pytest.raises(ValueError, match=r"X: shape \(2, 12, 2\) does not broadcast .* batch shape \(3,\)"):
        batch.posterior(X.expand(2, 12, 2))
    assert batch.posterior(X.expand(2, 1, 12, 2)).mean.shape == (2, 3, 12, 1)


@pytest.mark.parametrize("shape", [(64, 15, 3, 1), (16, 64, 3, 1), (5, 3, 1)])
def test_fantasies_that_do_not_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    model = streaming(*data(), data()[0])
    with pytest.raises(ValueError, match=r"y: batch shape .* does not broadcast with"):
        model.condition_on_observations(torch.rand(16, 3, 2, dtype=F64), torch.zeros(shape, dtype=F64))
    batch = model.condition_on_observations(torch.rand(16, 3, 2, dtype=F64), torch.zeros(16, 3, 1, dtype=F64))
    with pytest.raises(ValueError, match=r"x: batch shape .* does not broadcast with"):
        batch.condition_on_observations(torch.rand(5, 3, 2, dtype=F64), torch.zeros(5, 3, 1, dtype=F64))


def test_other_misuse_is_named() -> None:
    X, Y = data()
    model = streaming(X, Y, X)
    known = streaming(X, Y, X, torch.full_like(Y, 0.1))
    with pytest.raises(ValueError, match="Yvar: expected variances"):
        known.update(X, Y)
    with pytest.raises(ValueError, match="noise: a FixedNoiseGaussianLikelihood needs"):
        known.condition_on_observations(X, Y)
    with pytest.raises(ValueError, match="noise: expected variances"):
        model.condition_on_observations(X, Y, torch.ones(len(X), 2, dtype=F64))
    with pytest.raises(ValueError, match="output_indices"):
        model.posterior(X, output_indices=[0, 0])
    with pytest.raises(ValueError, match="X: expected 2 input columns"):
        model.posterior(X[:, :1])
    with pytest.raises(ValueError, match=r"X: expected shape \(\*b, q, d\)"):
        model.posterior(X[0])
    with pytest.raises(ValueError, match="observation_noise"):
        model.posterior(X, observation_noise=torch.ones(3, 1, dtype=F64))
    with pytest.raises(ValueError, match="train_X: expected shape"):
        StreamingSingleTaskGP(X.unsqueeze(0), Y.unsqueeze(0))
    with pytest.raises(ValueError, match="time_dim: expected a column of 2"):
        StreamingSingleTaskGP(X, Y, time_dim=2)
    with pytest.raises(ValueError, match="window: only a time column"):
        StreamingSingleTaskGP(X, Y, window=1.0)
    with pytest.raises(ValueError, match="window: features that are given"):
        StreamingSingleTaskGP(X, Y, time_dim=0, window=1.0, features=InducingPoints(X))
    with pytest.raises(TypeError, match="likelihood: expected GaussianLikelihood"):
        StreamingSingleTaskGP(X, Y, likelihood=gpytorch.likelihoods.LaplaceLikelihood())
    with pytest.raises(ValueError, match="likelihood: expected None or FixedNoise"):
        StreamingSingleTaskGP(X, Y, Y.square(), likelihood=GaussianLikelihood())
    with pytest.raises(TypeError, match="input_transform: expected InputTransform"):
        StreamingSingleTaskGP(X, Y, input_transform=torch.nn.Identity())  # type: ignore[arg-type]
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    with pytest.raises(ValueError, match="closure"):
        fit_gpytorch_mll(mll, closure=lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="mll: expected ExactMarginalLogLikelihood"):
        fit_gpytorch_mll(gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data=12))
    fantasies = model.condition_on_observations(X[:1], Y[:4].view(4, 1, 1))
    with pytest.raises(ValueError, match="a batch of models"):
        fit_gpytorch_mll(ExactMarginalLogLikelihood(fantasies.likelihood, fantasies))


def test_pathwise_samples_are_not_offered() -> None:
    model = streaming(*data(), data()[0])
    with pytest.raises(NotImplementedError):
        draw_matheron_paths(model, torch.Size([2]))


def test_without_botorch_the_error_names_the_extra() -> None:
    script = """
import sys
sys.modules["botorch"] = None
import gpseq.integrations
try:
    import gpseq.integrations.botorch
except ImportError as error:
    assert "gpseq[botorch]" in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
