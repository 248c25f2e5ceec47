"""StreamingEnsemble: weights and mixtures by hand, failures that change nothing, members that must match."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, PoissonLikelihood
from torch import Tensor

from gpseq.features import HippoFeatures, InducingFeatures, InducingPoints, SelectedPoints
from gpseq.features.path import PathFeatures
from gpseq.models import StreamingGP
from gpseq.models.ensemble import StreamingEnsemble
from tests.oracles_streaming import F64, assert_close, assert_identical, draw, gpytorch_kernel, snapshot, stream

# Small memories on purpose; tests/models/test_horizon.py is about capacity.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

LENGTHSCALES = (0.3, 1.0, 3.0)


def members(dtype: torch.dtype = F64, **options: Any) -> list[StreamingGP]:
    return [stream(16, 6.0, lengthscale=l, dtype=dtype, **options) for l in LENGTHSCALES]


def chunks(n: int = 60, seed: int = 0, dtype: torch.dtype = F64) -> list[tuple[Tensor, Tensor]]:
    x, y = draw(n, 9.0, seed=seed, dtype=dtype)
    x, order = x.sort()
    return list(zip(x.split(n // 3), y[order].split(n // 3), strict=True))


def test_without_a_discount_weights_are_those_of_the_evidence() -> None:
    ensemble, plain = StreamingEnsemble(members()), members()
    assert_close(ensemble.weights, torch.full((3,), 1 / 3, dtype=F64), 1e-7)
    for x, y in chunks():
        ensemble = ensemble.update(x, y)
        evidences = torch.stack([model.update(x, y).log_evidence for model in plain])
        assert_close(ensemble.weights, evidences.softmax(0), 1e-7)
    for member, alone in zip(ensemble.members, plain, strict=True):
        assert_identical(member, snapshot(alone))


@pytest.mark.parametrize("discount", [0.5, 0.9, 1])
def test_a_discount_by_hand(discount: float) -> None:
    ensemble, plain = StreamingEnsemble(members(), discount), members()
    weights, before = [1 / 3] * 3, [0.0] * 3
    for x, y in chunks():
        ensemble.update(x, y)
        now = [model.update(x, y).log_evidence.item() for model in plain]
        best = max(a - b for a, b in zip(now, before, strict=True))
        new = [w**discount * math.exp(a - b - best) for w, a, b in zip(weights, now, before, strict=True)]
        weights, before = [w / sum(new) for w in new], now
        assert ensemble.weights.tolist() == pytest.approx(weights, rel=1e-5, abs=1e-12)
        assert ensemble.weights.dtype == F64


def test_a_mixture_by_hand(dtype: torch.dtype) -> None:
    ensemble = StreamingEnsemble(members(dtype), discount=0.3)
    for x, y in chunks(dtype=dtype):
        ensemble.update(x, y)
    at = torch.linspace(0.1, 8.9, 7, dtype=dtype)
    mixture = ensemble.predict(at)
    w = ensemble.weights.to(dtype)
    with torch.no_grad():
        single = [model.likelihood(model(at)) for model in ensemble.members]
    means = torch.stack([s.mean for s in single])
    variances = torch.stack([s.variance for s in single])
    mean = (w[:, None] * means).sum(0)
    second = (w[:, None] * (variances + means.square())).sum(0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert mixture.mean.dtype == dtype and mixture.mean.shape == (7,)
    assert_close(mixture.mean.detach(), mean, tolerance)
    assert_close(mixture.variance.detach(), second - mean.square(), tolerance)
    value = torch.linspace(-1, 1, 7, dtype=dtype)
    density = torch.exp(-0.5 * (value - means).square() / variances) / (2 * math.pi * variances).sqrt()
    assert_close(mixture.log_prob(value).detach(), (w[:, None] * density).sum(0).log(), tolerance)


def test_weights_find_the_true_lengthscale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.05, 12.0, 150, dtype=F64)
    for truth in range(3):
        models = [stream(60, 12.0, lengthscale=l, noise=0.05) for l in LENGTHSCALES]
        kernel = gpytorch_kernel(LENGTHSCALES[truth])
        with torch.no_grad():
            root = torch.linalg.cholesky(kernel(x).to_dense() + 0.05 * torch.eye(150, dtype=F64))
        y = root @ torch.randn(150, dtype=F64, generator=generator)
        ensemble = StreamingEnsemble(models)
        for a, b in zip(x.split(30), y.split(30), strict=True):
            ensemble.update(a, b)
        assert ensemble.weights[truth] > 0.9


def test_with_a_discount_another_member_takes_over() -> None:
    x = torch.linspace(0.05, 12.0, 240, dtype=F64)
    y = torch.where(x < 6, (0.4 * x).sin(), (7 * x).sin())
    weights = []
    for discount in (1.0, 0.5):
        ensemble = StreamingEnsemble([stream(60, 12.0, lengthscale=l) for l in (0.25, 2.5)], discount)
        for a, b in zip(x[:120].split(30), y[:120].split(30), strict=True):
            ensemble.update(a, b)
        assert ensemble.weights[1] > 0.9
        ensemble.update(x[120:130], y[120:130])
        weights.append(ensemble.weights[0].item())
    assert weights[1] > weights[0]


# What changes nothing


def test_an_empty_chunk_moves_no_weights_without_a_discount() -> None:
    ensemble = StreamingEnsemble(members())
    ensemble.update(*chunks()[0])
    before = ensemble.weights
    ensemble.update(torch.zeros(0, dtype=F64), torch.zeros(0, dtype=F64))
    assert_close(ensemble.weights, before, 1e-12)


@pytest.mark.parametrize("which", ["y", "x", "argument"])
def test_a_failing_update_changes_nothing(which: str) -> None:
    ensemble = StreamingEnsemble(members())
    ensemble.update(*chunks()[0])
    before, objects = snapshot(ensemble), ensemble.members
    x, y = chunks()[1]
    arguments = {"y": (x, y * math.nan), "x": (x * math.inf, y), "argument": (x, y)}[which]
    with pytest.raises(ValueError, match=r"^(y|x|missing): "):
        ensemble.update(*arguments, **({"missing": "sometimes"} if which == "argument" else {}))
    assert_identical(ensemble, before)
    assert all(a is b for a, b in zip(ensemble.members, objects, strict=True))


def test_when_the_last_member_fails_the_others_have_not_moved() -> None:
    class Broken(gpytorch.kernels.RBFKernel):
        broken = False

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * (math.nan if self.broken else 1.0)

    models = members()
    models[-1].covar_module = Broken().double()
    ensemble = StreamingEnsemble(models)
    first, second, _ = chunks()
    ensemble.update(*first)
    before = snapshot(ensemble)
    ensemble.members[-1].covar_module.broken = True
    with pytest.raises((ValueError, RuntimeError)):
        ensemble.update(*second)
    assert_identical(ensemble, before)


def test_predictions_change_no_mode_and_no_state() -> None:
    ensemble = StreamingEnsemble(members())
    ensemble.update(*chunks()[0])
    before = snapshot(ensemble)
    ensemble.predict(torch.tensor([1.0], dtype=F64))
    assert_identical(ensemble, before)


def test_predictions_leave_the_mode_alone() -> None:
    ensemble = StreamingEnsemble(members()).train()
    ensemble.predict(torch.tensor([1.0], dtype=F64))
    assert ensemble.members[0].training and ensemble.members[0].likelihood.training


def test_updates_are_in_place_for_those_who_hold_the_members() -> None:
    models = members()
    parameters = {id(p) for model in models for p in model.parameters()}
    ensemble = StreamingEnsemble(models)
    ensemble.update(*chunks()[0])
    assert {id(p) for p in ensemble.parameters()} == parameters
    assert models[0].num_observations == 20


# Persistence


@pytest.mark.parametrize("how", ["saved", "copied"])
def test_it_goes_on_identically(how: str) -> None:
    first, second, third = chunks()
    ensemble = StreamingEnsemble(members(), 0.8).update(*first).update(*second)
    if how == "saved":
        buffer = io.BytesIO()
        torch.save(ensemble.state_dict(), buffer)
        buffer.seek(0)
        other = StreamingEnsemble(members(), 0.8)
        other.load_state_dict(torch.load(buffer))
    else:
        other = copy.deepcopy(ensemble)
    before = snapshot(other)
    ensemble.update(*third)
    assert_identical(other, before)
    other.update(*third)
    assert_identical(other, snapshot(ensemble))


def test_float32_is_rounded_float64() -> None:
    ensembles = [StreamingEnsemble(members(dtype)) for dtype in (torch.float32, F64)]
    for x, y in chunks():
        ensembles[0].update(x.float(), y.float())
        ensembles[1].update(x.float().double(), y.float().double())
    assert ensembles[0].weights.dtype == F64
    assert_close(ensembles[0].weights, ensembles[1].weights, 1e-3)


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16"])
def test_casts_keep_the_weights_in_float64(cast: str) -> None:
    ensemble = StreamingEnsemble(members())
    ensemble.update(*chunks()[0])
    before = ensemble.weights
    getattr(ensemble, cast)()
    assert ensemble.weights.dtype == F64
    assert torch.equal(ensemble.weights, before)


def test_noise_goes_to_every_member() -> None:
    x, y = chunks()[0]
    noise = torch.full_like(x, 0.2)
    models = [
        StreamingGP(HippoFeatures(12, 9.0), gpytorch_kernel(l), FixedNoiseGaussianLikelihood(torch.ones(2, dtype=F64)))
        for l in LENGTHSCALES
    ]
    ensemble = StreamingEnsemble(models)
    ensemble.update(x, y, noise=noise)
    at = torch.linspace(0.5, 2.5, 4, dtype=F64)
    small = ensemble.predict(at, noise=torch.full((4,), 0.01, dtype=F64)).variance
    large = ensemble.predict(at, noise=torch.full((4,), 0.51, dtype=F64)).variance
    assert_close((large - small).detach(), torch.full((4,), 0.5, dtype=F64), 1e-6)


# Arguments


@pytest.mark.parametrize("discount", [0.0, -1.0, 1.01, math.nan, math.inf])
def test_bad_discounts(discount: Any) -> None:
    with pytest.raises(ValueError, match=r"^discount: "):
        StreamingEnsemble(members(), discount)


def test_members_must_match() -> None:
    good = members()
    batch = stream(16, 6.0, batch_shape=(2,), lengthscale=torch.ones(2))
    for bad, message in (
        ([], r"at least two, got 0"),
        (good[:1], r"at least two, got 1"),
        ([good[0], stream(17, 6.0)], r"same features"),
        ([good[0], stream(16, 7.0)], r"same features"),
        ([good[0], stream(16, 6.0, start=1.0)], r"same features"),
        ([good[0], stream(16, 6.0, horizon_growth=None)], r"horizon_growth"),
        ([good[0], stream(16, 6.0, learn="warmup")], r"learn='never'"),
        ([good[0], stream(16, 6.0, max_features=20)], r"max_features=None"),
        ([batch, copy.deepcopy(batch)], r"batch shape"),
    ):
        with pytest.raises(ValueError, match=rf"^models: .*{message}"):
            StreamingEnsemble(bad)
    for wrong in (None, gpytorch_kernel()):
        with pytest.raises(TypeError, match=r"^models: expected StreamingGP, got"):
            StreamingEnsemble([good[0], wrong])


def on(features: Any) -> StreamingGP:
    return StreamingGP(features, gpytorch_kernel(), gpytorch.likelihoods.GaussianLikelihood().double())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: InducingPoints(torch.linspace(0, 9, 8)), lambda: InducingPoints(torch.linspace(0, 1, 8))),
        (lambda: HippoFeatures(8, 10.0), lambda: HippoFeatures(8, 10.0000001)),
        (lambda: PathFeatures(8, 2, every=3), lambda: PathFeatures(8, 2, time_dim=0)),
    ],
    ids=["points", "horizons", "paths"],
)
def test_members_with_different_bases_are_refused(first: Any, second: Any) -> None:
    with pytest.raises(ValueError, match=r"^models: "):
        StreamingEnsemble([on(first()), on(second())])


def test_members_with_different_pasts_are_refused() -> None:
    models = members()
    models[0].update(*chunks()[0])
    with pytest.raises(ValueError, match=r"^models: "):
        StreamingEnsemble(models)


def test_predictions_of_counts_are_refused_or_right() -> None:
    models = [StreamingGP(HippoFeatures(8, 9.0), gpytorch_kernel(l), PoissonLikelihood()) for l in LENGTHSCALES]
    try:
        ensemble = StreamingEnsemble(models)
        ensemble.update(chunks()[0][0], torch.ones(20, dtype=F64))
        shape = ensemble.predict(torch.ones(3, dtype=F64)).mean.shape
    except (TypeError, ValueError) as error:
        assert str(error).split(":")[0] in ("models", "likelihood")
    else:
        assert shape == (3,)


def test_a_stream_may_be_a_member_once() -> None:
    model = StreamingGP(HippoFeatures(12, 4.0), gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood())
    with pytest.raises(ValueError, match=r"^models: expected different streams"):
        StreamingEnsemble([model, model])


def _members(make: Callable[[], InducingFeatures]) -> list[StreamingGP]:
    members = []
    for lengthscale in (0.3, 2.0):
        kernel = gpytorch.kernels.RBFKernel()
        kernel.lengthscale = lengthscale
        members.append(StreamingGP(make(), kernel, gpytorch.likelihoods.GaussianLikelihood()).eval())
    return members


def test_an_empty_chunk_leaves_the_weights_alone() -> None:
    ensemble = StreamingEnsemble(_members(lambda: HippoFeatures(30, 6.0)), discount=0.5)
    x = torch.linspace(0.0, 6.0, 40)
    before = ensemble.update(x, x.sin()).weights
    assert torch.equal(ensemble.update(x[:0], x[:0]).weights, before)
    assert torch.equal(ensemble.update(x, torch.full_like(x, torch.nan), missing="skip").weights, before)


def test_members_that_come_to_different_bases_are_refused_and_go_back() -> None:
    ensemble = StreamingEnsemble(_members(lambda: SelectedPoints(8)))
    x = torch.linspace(0.0, 6.0, 40)
    with pytest.raises(ValueError, match="different bases"):
        ensemble.update(x, x.sin())
    assert [model.num_observations for model in ensemble.members] == [0, 0]
