"""StreamingGP with likelihoods that are not Gaussian: what a user meets."""

import copy
import io
import itertools
import math
import re
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import HippoFeatures
from gpseq.likelihoods import NegativeBinomialLikelihood, PoissonLikelihood
from gpseq.models import ConvergenceWarning, StreamingGP
from gpseq.variational import online, sites
from tests.oracles_sites import LIKELIHOODS, SMOOTH, likelihood_of, targets
from tests.oracles_streaming import F64, assert_close, assert_identical, draw, gpytorch_kernel, snapshot, variance_of

pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

#: Laplace's expected log likelihood has kinks, and its updates often end without having converged.
hasty = pytest.mark.filterwarnings("ignore::gpseq.models.ConvergenceWarning")

AT = torch.linspace(-0.5, 9.0, 9, dtype=F64)
BATCHES = [(), (2,)]
X = torch.linspace(0.5, 5.5, 6, dtype=F64)
GOOD = {name: targets(name, X) for name in LIKELIHOODS}


class MyStream(StreamingGP):
    """Somebody's own."""


def build(
    likelihood: str | Likelihood,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = F64,
    order: int = 9,
    kind: type[StreamingGP] = StreamingGP,
    **options: Any,
) -> StreamingGP:
    if isinstance(likelihood, str):
        likelihood = likelihood_of(likelihood, dtype)
    lengthscale = torch.linspace(0.9, 1.3, batch[-1], dtype=F64) if batch else 1.1
    kernel = gpytorch_kernel(lengthscale, 1.2, dtype=dtype, batch_shape=batch)
    return kind(HippoFeatures(order, 6.0), kernel, likelihood, **options).eval()


def chunk(name: str, seed: int, n: int = 10, end: float = 6.0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Irregular, unsorted inputs."""
    x = draw(n, end, seed=seed)[0]
    return x.to(dtype), targets(name, x, seed).to(dtype)


def feed(model: StreamingGP, name: str, seeds: range, **options: Any) -> StreamingGP:
    """Chunks of which the third passes the horizon."""
    for seed in seeds:
        model.update(*chunk(name, seed, end=6.0 if seed < 2 else 8.0), **options)
    return model


def assert_same_belief(actual: StreamingGP, expected: StreamingGP, tolerance: float, at: Tensor = AT) -> None:
    with torch.no_grad():
        a, b = actual(at), expected(at)
        assert_close(a.mean.double(), b.mean.double(), tolerance)
        assert_close(a.covariance_matrix.double(), b.covariance_matrix.double(), tolerance)
    assert_close(actual.log_evidence, expected.log_evidence, tolerance)
    assert actual.num_observations == expected.num_observations


# Streams


@hasty
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "laplace" else name for name in LIKELIHOODS]
)
def test_updates_and_predictions(name: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """Without a word of train or eval; dtypes and shapes are those of GPyTorch; float32 is float64 within 1e-4."""
    model, reference = build(name, batch, dtype), build(name, batch)
    before = [variance_of(model(AT.to(dtype))).detach().double()]
    for seed in range(3):
        x, y = chunk(name, seed, end=6.0 if seed < 2 else 8.0, dtype=torch.float32)
        assert model.update(x.to(dtype), y.to(dtype)) is model
        reference.update(x.double(), y.double())
        posterior = model(AT.to(dtype))
        assert posterior.mean.shape == (*batch, 9) and posterior.mean.dtype == dtype
        before.append(variance_of(posterior).detach().double())
        assert (before[-1] <= before[0] + 1e-5).all()
    assert model.features.horizon > 6.0
    assert model.num_observations == 30 * max(1, math.prod(batch))
    assert model.log_evidence.shape == batch and model.log_evidence.dtype == F64
    assert model.convergence is not None and model.convergence.converged.shape == batch
    with gpytorch.settings.num_likelihood_samples(3):
        predicted = model.likelihood(model(AT.to(dtype)))
    assert predicted.mean.isfinite().all()
    # Where kinks stop an update early, one bit of a parameter decides where.
    assert_same_belief(model, reference, 0.05 if name == "laplace" else 1e-4)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("modules", [torch.float32, F64])
def test_mixed_precision(name: str, modules: torch.dtype, dtype: torch.dtype) -> None:
    model, reference = build(name, dtype=modules), build(name)
    for seed in range(2):
        x, y = chunk(name, seed, dtype=torch.float32)
        model.update(x.to(dtype), y.to(dtype))
        reference.update(x.double(), y.double())
    assert_same_belief(model, reference, 1e-4)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_batch_of_kernels_is_a_loop(name: str) -> None:
    model = feed(build(name, (2,)), name, range(3))
    for i, lengthscale in enumerate((0.9, 1.3)):
        single = StreamingGP(HippoFeatures(9, 6.0), gpytorch_kernel(lengthscale, 1.2), likelihood_of(name)).eval()
        feed(single, name, range(3))
        with torch.no_grad():
            assert_close(model(AT).mean[i], single(AT).mean, 1e-5)
            assert_close(model(AT).covariance_matrix[i], single(AT).covariance_matrix, 1e-5)
        assert_close(model.log_evidence[i], single.log_evidence, 1e-6)


@settings(max_examples=15)
@given(
    name=st.sampled_from([*SMOOTH, "student t"]),
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, F64]),
    batch=st.sampled_from(BATCHES),
    steps=st.sampled_from([None, 1, 4]),
    transfer=st.sampled_from(["vfe", "adf"]),
)
def test_any_chunks(
    name: str, sizes: list[int], seed: int, dtype: torch.dtype, batch: tuple[int, ...], steps: int | None, transfer: str
) -> None:
    model = build(name, batch, dtype, transfer=transfer)
    x = draw(sum(sizes), 9.0, seed=seed)[0]
    y = targets(name, x, seed)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        model.update(a.to(dtype), b.to(dtype), steps=steps)
        state = model.state
        assert torch.equal(state.G, state.G.mT)
        # As for Gaussian noise, a transfer rounds.
        assert (torch.linalg.eigvalsh(state.G)[..., 0] > -1e-9 * (1 + torch.linalg.matrix_norm(state.G))).all()
        assert model.log_evidence.isfinite().all()
    assert model.num_observations == sum(sizes) * max(1, math.prod(batch))
    with torch.no_grad():
        assert (variance_of(model(AT.to(dtype))) > 0).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_order_within_a_chunk_does_not_matter(name: str) -> None:
    """Times may be repeated and unsorted."""
    x, y = chunk(name, 0)
    x = torch.cat([x, x[:4], x[:1], x[:1]])
    y = torch.cat([y, y[1:5], y[:2]])
    order = torch.randperm(len(x))
    assert_same_belief(build(name).update(x, y), build(name).update(x[order], y[order]), 1e-6)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", ["poisson", "bernoulli"])
def test_an_empty_chunk_changes_nothing(name: str, batch: tuple[int, ...]) -> None:
    model = feed(build(name, batch), name, range(1))
    before, how = snapshot(model), model.convergence
    model.update(torch.zeros(0, dtype=F64), torch.zeros(0, dtype=F64))
    model.update(torch.ones(3, dtype=F64), torch.full((3,), math.nan, dtype=F64), missing="skip")
    assert_identical(model, before)
    assert model.convergence is how
    child = model.condition_on_observations(torch.zeros(0, dtype=F64), torch.zeros(0, dtype=F64))
    assert child.convergence is not None and how is not None and child.convergence.steps == how.steps


@pytest.mark.parametrize("name", [*SMOOTH, "student t"])
def test_missing_targets_are_dropped_rows(name: str, dtype: torch.dtype) -> None:
    x, y = chunk(name, 0, n=14, dtype=dtype)
    gone = torch.tensor([0, 3, 9, 13])
    kept = torch.ones(14, dtype=torch.bool)
    kept[gone] = False
    holes = y.clone()
    holes[gone] = math.nan
    skipped = build(name, dtype=dtype).update(x, holes, missing="skip")
    dropped = build(name, dtype=dtype).update(x[kept], y[kept])
    assert_same_belief(skipped, dropped, 1e-6, AT.to(dtype))
    assert skipped.num_observations == 10


@pytest.mark.parametrize("name", SMOOTH)
def test_each_model_of_a_batch_misses_its_own(name: str) -> None:
    """The last one misses everything and keeps its prior."""
    x = draw(10, 6.0)[0]
    y = torch.stack([targets(name, x, seed) for seed in range(3)])
    holes = y.clone()
    holes[0, [1, 4]] = holes[1, [0, 1, 9]] = holes[2] = math.nan
    model = build(name, (3,)).update(x, holes, missing="skip")
    assert model.state.count.tolist() == [8, 7, 0]
    for i, lengthscale in enumerate((0.9, 1.1, 1.3)):
        single = StreamingGP(HippoFeatures(9, 6.0), gpytorch_kernel(lengthscale, 1.2), likelihood_of(name)).eval()
        kept = ~holes[i].isnan()
        single.update(x[kept], y[i, kept])
        assert_close(model.state.G[i], single.state.G, 1e-5)
        assert_close(model.state.r[i], single.state.r, 1e-5)
        assert_close(model.log_evidence[i], single.log_evidence, 1e-6)


@pytest.mark.parametrize("dispersions", [(1.0, 30.0), (4.0, 4.0)])
def test_a_batch_of_dispersions(dispersions: tuple[float, float]) -> None:
    likelihood = NegativeBinomialLikelihood(batch_shape=torch.Size([2])).double()
    likelihood.dispersion = torch.tensor(dispersions, dtype=F64).unsqueeze(-1)
    model = feed(build(likelihood, (2,)), "poisson", range(2))
    for i, (lengthscale, r) in enumerate(zip((0.9, 1.3), dispersions, strict=True)):
        alone = NegativeBinomialLikelihood().double()
        alone.dispersion = r
        single = StreamingGP(HippoFeatures(9, 6.0), gpytorch_kernel(lengthscale, 1.2), alone).eval()
        feed(single, "poisson", range(2))
        assert_close(model.log_evidence[i], single.log_evidence, 1e-6)


# What lasts


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", ["poisson", "bernoulli", "student t"])
def test_saved_and_loaded_or_copied_in_mid_stream(name: str, batch: tuple[int, ...]) -> None:
    whole = feed(build(name, batch), name, range(4))
    half = feed(build(name, batch), name, range(3))
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    loaded = build(name, batch)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(half)
    assert copied.convergence is not None and half.convergence is not None
    assert torch.equal(copied.convergence.movement, half.convergence.movement)
    for model in (loaded, copied):
        feed(model, name, range(3, 4))
        assert_identical(model, snapshot(whole))
        with torch.no_grad():
            assert torch.equal(model(AT).mean, whole(AT).mean)
    assert half.num_observations < whole.num_observations


def test_a_loaded_state_forgets_how_an_earlier_update_went() -> None:
    model = feed(build("poisson"), "poisson", range(1))
    model.load_state_dict(build("poisson").state_dict())
    assert model.num_observations == 0
    assert model.convergence is None


def test_hyperparameters_changed_between_updates() -> None:
    """The kernel's carry the belief over; the likelihood's matter for what comes, not for what has been."""
    model = feed(build("negative binomial"), "poisson", range(2))
    evidence = model.log_evidence
    model.likelihood.dispersion = 0.5
    assert torch.equal(model.log_evidence, evidence)
    with torch.no_grad():
        known = model(AT).mean
    tight = copy.deepcopy(model)
    tight.likelihood.dispersion = 100.0
    x, y = chunk("poisson", 5)
    with torch.no_grad():
        assert torch.equal(tight(AT).mean, known)
        assert variance_of(tight.update(x, y)(AT)).sum() < variance_of(model.update(x, y)(AT)).sum()
    model.covar_module.base_kernel.lengthscale = 2.0
    moved = copy.deepcopy(model)
    moved.rebase(moved.features)  # carries the belief over now
    x, y = chunk("poisson", 6)
    assert_same_belief(model.update(x, y), moved.update(x, y), 1e-7)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *itertools.product(["gaussian", "poisson", "bernoulli"], ["outside"]),
        ("gaussian", "inside"),
        ("bernoulli", "inside"),
        ("poisson", "inside"),
    ],
)
def test_an_update_in_inference_mode(name: str, where: str) -> None:
    """With data made outside of it, or within, as a loop over a stream would; the model can differentiate later."""
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double() if name == "gaussian" else likelihood_of(name)
    plain = build(copy.deepcopy(likelihood)).update(X, GOOD["bernoulli"])
    model = build(likelihood)
    with torch.inference_mode():
        model.update(*(X, GOOD["bernoulli"]) if where == "outside" else (X + 0, GOOD["bernoulli"] + 0))
    assert_identical(model, snapshot(plain))
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    model(x).mean.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["poisson", "bernoulli"])
def test_conditioning_without_gradients(name: str, mode: Any) -> None:
    model = build(name).update(X, GOOD[name])
    expected = model.condition_on_observations(X, GOOD[name]).log_evidence
    with mode():
        child = model.condition_on_observations(X, GOOD[name])
        assert_close(child.log_evidence, expected, 1e-12)


# Steps


def test_steps_and_step_size_are_honoured() -> None:
    x, y = chunk("poisson", 0)
    done = build("poisson").update(x, y).convergence
    assert done is not None and done.all_converged and done.movement < sites.TOLERANCE
    before = -math.inf
    for steps in (1, 2, 3):
        model = build("poisson").update(x, y, steps=steps)
        assert model.convergence is not None and model.convergence.steps == steps
        assert model.log_evidence > before
        before = model.log_evidence.item()
    slow = build("poisson").update(x, y, step_size=0.25).convergence
    assert slow is not None and slow.steps > done.steps and slow.step_size == 0.25
    small = build("poisson").update(x, y, steps=1, step_size=1e-3)
    assert small.log_evidence < build("poisson").update(x, y, steps=1).log_evidence
    # Likelihoods that are not known to be log-concave take half steps.
    for name, size in (("poisson", 1.0), ("bernoulli", 1.0), ("negative binomial", 1.0), ("student t", 0.5)):
        how = build(name).update(*chunk(name, 0)).convergence
        assert how is not None and how.step_size == size


def test_a_gaussian_likelihood_takes_no_steps() -> None:
    model = build(gpytorch.likelihoods.GaussianLikelihood())
    model.update(*draw(5, 6.0), steps=3, step_size=0.2)
    assert model.convergence is None


def test_a_warning_names_an_update_that_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "MOST_STEPS", 2)
    model = build("poisson")
    x, y = chunk("poisson", 0)
    pattern = (
        r"^y: the update has not converged after 2 steps; the marginals of f still move by \d\.\de[-+]\d\d a step\.$"
    )
    with pytest.warns(ConvergenceWarning, match=pattern) as caught:
        model.update(x, y)
    assert caught[0].filename == __file__
    assert model.convergence is not None and not model.convergence.all_converged and model.num_observations == 10


def test_a_number_of_steps_is_no_reason_to_warn() -> None:
    model = build("poisson").update(*chunk("poisson", 0), steps=1)
    assert model.convergence is not None and not model.convergence.all_converged


@pytest.mark.parametrize(
    "learn",
    [
        "never",
        "warmup",
    ],
)
def test_a_warning_that_is_an_error_changes_nothing(learn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("poisson", learn=learn)
    before = snapshot(model)
    absorb = model._absorb

    def hasty(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sites, "MOST_STEPS", 1)
            return absorb(*args)

    monkeypatch.setattr(model, "_absorb", hasty)
    with pytest.raises(ConvergenceWarning):
        model.update(*chunk("poisson", 0))
    assert_identical(model, before)


def test_conditioning_warns_as_an_update_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "MOST_STEPS", 2)
    with pytest.warns(ConvergenceWarning):
        build("poisson").condition_on_observations(*chunk("poisson", 0))


# Conditioning


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", [*SMOOTH, "student t"])
def test_conditioning_is_an_update_of_a_copy(name: str, batch: tuple[int, ...]) -> None:
    """The same type; the parent is untouched; GPyTorch's name for it too."""
    parent = feed(build(name, batch, kind=MyStream), name, range(1))
    before, how = snapshot(parent), parent.convergence
    x, y = chunk(name, 7)
    child = parent.condition_on_observations(x, y)
    fantasy = parent.get_fantasy_model(x, y, steps=2)
    assert type(child) is type(fantasy) is MyStream
    assert_identical(parent, before)
    assert parent.convergence is how and child.convergence is not how
    assert fantasy.convergence is not None and fantasy.convergence.steps == 2
    assert_same_belief(child, copy.deepcopy(parent).update(x, y), 1e-9)
    child.update(x, y, steps=1)
    assert_identical(parent, before)


def test_conditioning_may_extend_the_horizon() -> None:
    parent = feed(build("poisson"), "poisson", range(1))
    x, y = torch.tensor([7.0, 8.0], dtype=F64), torch.tensor([1.0, 4.0], dtype=F64)
    assert parent.condition_on_observations(x, y).features.horizon == 6.0
    child = parent.condition_on_observations(x, y, extend_horizon=True)
    assert child.features.horizon > 8.0 and parent.features.horizon == 6.0
    assert_same_belief(child, copy.deepcopy(parent).update(x, y), 1e-9)


@pytest.mark.parametrize("steps", [1, None])
@pytest.mark.parametrize("name", SMOOTH)
def test_fantasies_are_a_loop(name: str, steps: int | None) -> None:
    parent = feed(build(name), name, range(1))
    x = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    y = torch.stack([targets(name, x, seed, level=1.0 - seed) for seed in range(4)])
    child = parent.condition_on_observations(x, y, steps=steps)
    assert child.state.r.shape == (4, 9)
    for i in range(4):
        single = parent.condition_on_observations(x, y[i], steps=steps)
        assert_close(child.log_evidence[i], single.log_evidence, 1e-6)
        assert_close(child.state.r[i], single.state.r, 1e-5)


def test_fantasies_of_a_batch_of_inputs() -> None:
    """As many inputs as targets, as in an acquisition function."""
    parent = feed(build("poisson"), "poisson", range(1))
    x = torch.tensor([[1.0, 2.0], [0.5, 4.0], [3.0, 3.0]], dtype=F64).unsqueeze(-1)
    y = torch.tensor([[0.0, 1.0], [7.0, 3.0], [30.0, 2.0]], dtype=F64)
    child = parent.condition_on_observations(x, y)
    for i in range(3):
        single = parent.condition_on_observations(x[i], y[i])
        assert_close(child.log_evidence[i], single.log_evidence, 1e-7)
        assert_close(child.state.r[i], single.state.r, 1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_reach_inputs_with_the_sites_held(name: str) -> None:
    """Of predictions as if the sites stood still; of the evidence, at its maximum over them, in full."""
    parent = feed(build(name), name, range(1))
    x = torch.tensor([1.5, 3.2, 4.4], dtype=F64)
    y = targets(name, x, 2)
    state, prior = parent.variational_strategy.current_state(), parent.variational_strategy.prior

    moving = x.clone().requires_grad_()
    child = parent.condition_on_observations(moving, y)
    mean = child(AT).mean.sum()
    (by_mean,) = torch.autograd.grad(mean, moving, retain_graph=True)
    assert by_mean.isfinite().all() and by_mean.abs().max() > 0
    assert all(p.grad is None for p in parent.parameters())

    (by_evidence,) = torch.autograd.grad(online.log_evidence(child.state), moving)
    found = None
    for i in range(3):
        ends, held = [], []
        for sign in (1, -1):
            shifted = x.clone()
            shifted[i] += sign * 1e-4
            ends.append(parent.condition_on_observations(shifted, y).log_evidence)
            if found is None:
                found, _ = sites.find(state, prior, x, expectation_for(parent, y))
            with torch.no_grad():
                A = online.whiten(state, prior, shifted)
                G, r = state.G + (A * found.precision) @ A.mT, state.r + A @ found.shift
                there = online.whiten(state, prior, AT)
                held.append((there.mT @ torch.linalg.solve(torch.eye(9, dtype=F64) + G, r)).sum())
        assert_close(by_evidence[i], (ends[0] - ends[1]) / 2e-4, 1e-4)
        assert_close(by_mean[i], (held[0] - held[1]) / 2e-4, 1e-4)


def expectation_for(model: StreamingGP, y: Tensor) -> sites.Expectation:
    def expectation(mean: Tensor, variance: Tensor) -> Tensor:
        f = gpytorch.distributions.MultivariateNormal(mean, torch.diag_embed(variance))
        return model.likelihood.expected_log_prob(y, f)

    return expectation


# Bad input


class Sampled(Likelihood):
    """Knows nothing of its expected log likelihood."""

    def forward(self, function_samples: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Normal(function_samples, 1.0)


@pytest.mark.parametrize(
    ("likelihood", "pattern"),
    [
        (gpytorch.likelihoods.SoftmaxLikelihood(2, 3), "expected one of a single output, got SoftmaxLikelihood"),
        (gpytorch.likelihoods.MultitaskGaussianLikelihood(2), "expected one of a single output, got Multitask"),
        (gpytorch.likelihoods.LikelihoodList(PoissonLikelihood()), "expected one of a single output"),
        (Sampled(), "expected one with expected_log_prob; that of Sampled draws samples"),
        (PoissonLikelihood, "expected Likelihood, got ABCMeta"),
        (None, "expected Likelihood, got NoneType"),
    ],
)
def test_unsuitable_likelihoods(likelihood: Any, pattern: str) -> None:
    with pytest.raises(TypeError, match=f"^likelihood: {pattern}"):
        StreamingGP(HippoFeatures(4, 6.0), gpytorch_kernel(), likelihood)


INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
FAULTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *((name, {"y": value}, ValueError, r"^y: .*counts 0, 1, 2, \.\.\., got " + re.escape(f"{value:g}"))
      for name in ("poisson", "negative binomial", "softplus poisson") for value in (-1.0, 0.5, -0.25, 1e3 + 0.5)),
    *(("bernoulli", {"y": value}, ValueError, f"^y: .*labels 0 or 1, got {re.escape(f'{value:g}')}")
      for value in (2.0, -1.0, 0.5, 1e-12)),
    *(("beta", {"y": value}, ValueError, f"^y: .*fractions above 0 and below 1, got {re.escape(f'{value:g}')}")
      for value in (0.0, 1.0, 1.5, -0.1)),
    *((name, {"y": value}, ValueError, "^y: expected finite targets, got NaN or infinity")
      for name in LIKELIHOODS for value in (math.nan, math.inf, -math.inf)),
    *(("poisson", {"y": value, "missing": "skip"}, ValueError, "^y: expected finite targets") for value in (math.inf,)),
    ("student t", {"y": 1e200}, ValueError, "^y: the expected log likelihood"),
    ("poisson", {"y": 1e300}, ValueError, "^y: the targets are too large"),
    *((name, {"noise": noise}, ValueError, "^noise: a .*Likelihood has no noise variance; expected None")
      for name in ("poisson", "bernoulli") for noise in (0.1, torch.tensor(0.1), torch.full_like(X, 0.1))),
    *(("poisson", {"steps": steps}, kind, "^steps: expected ")
      for steps, kind in ((0, ValueError), (-3, ValueError), (True, TypeError), (1.5, TypeError), ("2", TypeError))),
    *(("bernoulli", {"step_size": size}, ValueError, r"^step_size: expected a number in \(0, 1\], got ")
      for size in (0, 0.0, -1, 2, 1.0001, math.nan, math.inf, True, "a", torch.ones(2))),
]  # fmt: skip


def refused(model: StreamingGP, kind: type[Exception], pattern: str, *args: Any, **kwargs: Any) -> None:
    before, how = snapshot(model), model.convergence
    messages = []
    for call in ("update", "condition_on_observations"):
        with pytest.raises(kind, match=pattern) as caught:
            getattr(model, call)(*args, **kwargs)
        assert type(caught.value) is kind
        messages.append(str(caught.value))
        assert_identical(model, before)
        assert model.convergence is how
    assert messages[0] == messages[1]


@hasty
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_faults_are_named_and_change_nothing(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    taught = {name: build(name, batch, dtype).update(X.to(dtype), GOOD[name].to(dtype)) for name in LIKELIHOODS}
    for name, given_arguments, kind, pattern in FAULTS:
        arguments = dict(given_arguments)
        y = GOOD[name].clone()
        value = arguments.pop("y", None)
        if value is not None:
            y[3] = value
            if dtype == torch.float32 and not math.isfinite(y.to(dtype)[3]) and math.isfinite(value):
                continue  # there is no such number
        refused(taught[name], kind, pattern, X.to(dtype), y.to(dtype), **arguments)


@pytest.mark.parametrize("wrong", INTEGERS, ids=str)
@pytest.mark.parametrize("name", ["poisson", "bernoulli"])
def test_counts_and_labels_may_be_whole_numbers(name: str, wrong: torch.dtype) -> None:
    y = GOOD[name].clamp(0, 1)
    assert torch.equal(build(name).update(X, y.to(wrong)).state.r, build(name).update(X, y).state.r)


def test_a_fault_in_one_model_of_a_batch() -> None:
    y = torch.stack([GOOD["poisson"], GOOD["poisson"]])
    y[1, 2] = 0.5
    refused(build("poisson", (2,)), ValueError, r"^y: .*counts", X, y)
    y[1, 2] = math.nan
    y[0, 0] = -1.0
    refused(build("poisson", (2,)), ValueError, r"^y: .*counts .* got -1", X, y, missing="skip")


def test_a_likelihood_of_another_shape_is_named() -> None:
    """Several dispersions for a single stream."""
    likelihood = NegativeBinomialLikelihood(batch_shape=torch.Size([2])).double()
    pattern = r"^likelihood: expected_log_prob of NegativeBinomialLikelihood gave shape \(2, 6\) for \(6,\) targets"
    refused(build(likelihood), ValueError, pattern, X, GOOD["poisson"])


@hasty
@settings(max_examples=20)
@given(
    name=st.sampled_from(["poisson", "bernoulli", "beta"]),
    value=st.floats(-2.0, 2.0**20, width=32)
    | st.integers(-1, 10**5).map(float)
    | st.sampled_from([math.nan, math.inf]),
    index=st.integers(0, 5),
)
def test_whatever_the_target_the_model_is_whole(name: str, value: float, index: int) -> None:
    """Either it is learnt and the belief is finite, or it is named and nothing has changed."""
    model = build(name, order=5)
    y = GOOD[name].clone()
    y[index] = value
    before = snapshot(model)
    admissible = {
        "poisson": value >= 0 and math.isfinite(value) and value == math.floor(value),
        "bernoulli": value in (0, 1),
        "beta": 0 < value < 1,
    }[name]
    try:
        model.update(X, y)
    except ValueError as error:
        assert str(error).startswith("y: ")
        assert not admissible
        assert_identical(model, before)
    else:
        assert admissible
        with torch.no_grad():
            assert model(AT).mean.isfinite().all() and model.log_evidence.isfinite().all()


def test_a_likelihood_with_labels_keeps_its_own_warning_to_itself() -> None:
    model = build(BernoulliLikelihood().double())
    model.update(X, (X > 3).double())
    assert model.likelihood(model(AT)).probs.isfinite().all()
