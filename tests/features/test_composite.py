"""CompositeFeatures and PyramidFeatures: several kinds of features of the same f, nothing counted twice."""

import io
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.kernels import IndexKernel, Kernel, MaternKernel, RBFKernel, ScaleKernel
from hypothesis import given
from hypothesis import strategies as st
from linear_operator import to_dense
from torch import Tensor

from gpseq.features import (
    CompositeFeatures,
    HippoFeatures,
    InducingFeatures,
    InducingPoints,
    PyramidFeatures,
    SelectedPoints,
)
from gpseq.models import StreamingGP
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, Functionals, assert_close, draw, gpytorch_kernel, variance_of


def stream(features: InducingFeatures, **options: Any) -> StreamingGP:
    """As the oracles', but what leaves a window is let go of by matching moments."""
    return oracle.stream(features, **({"transfer": "adf"} | options))


def legs_and_window(horizon: float = 4.0, window: float = 1.5) -> CompositeFeatures:
    return CompositeFeatures([HippoFeatures(6, horizon), HippoFeatures(4, horizon, measure="legt", window=window)])


def functionals(features: InducingFeatures) -> Functionals:
    """Made anew from what defines the features; parts one below the other."""
    if isinstance(features, CompositeFeatures):
        parts = [functionals(part) for part in features.parts]
        return Functionals(
            torch.cat([part.nodes for part in parts]), torch.block_diag(*(part.weights for part in parts))
        )
    if isinstance(features, HippoFeatures):
        assert features.measure in ("legs", "legt")
        start = features.start if features.window is None else features.horizon - features.window
        return oracle.legs(features.num_features, features.horizon, start, features.num_nodes)
    assert isinstance(features, InducingPoints)
    return oracle.at_points(features.points[:, 0])


COMPOSITES = {
    "memory and window": legs_and_window,
    "memory and points": lambda: CompositeFeatures(
        [HippoFeatures(5, 4.0), InducingPoints(torch.tensor([0.5, 2.0, 6.0], dtype=F64))]
    ),
    "nested": lambda: CompositeFeatures([legs_and_window(), InducingPoints(torch.tensor([5.0], dtype=F64))]),
    "one part": lambda: CompositeFeatures([HippoFeatures(5, 4.0)]),
    "pyramid": lambda: PyramidFeatures(9, 4.0),
}


def mutual(features: InducingFeatures) -> Tensor:
    return functionals(features).covariance(oracle.rbf(0.8, 1.3))


# Covariances


@pytest.mark.parametrize("name", COMPOSITES)
def test_equals_a_dense_oracle(name: str) -> None:
    features, kernel, dense = COMPOSITES[name](), gpytorch_kernel(0.8, 1.3), oracle.rbf(0.8, 1.3)
    ours, x = functionals(features), torch.linspace(-1, 6, 9, dtype=F64)
    assert features.num_features == len(ours.weights)
    assert features.nodes().shape == (len(ours.nodes), 1) and features.nodes().dtype == F64
    with torch.no_grad():
        kuu = features.kuu(kernel).to_dense()
        assert_close(kuu, ours.covariance(dense), 1e-12)
        assert torch.equal(kuu, kuu.mT)
        assert_close(features.kuf(kernel, x), ours.cross(dense, oracle.at_points(x)), 1e-12)
        for other in COMPOSITES.values():
            made = other()
            expected = ours.cross(dense, functionals(made))
            assert_close(features.cross(kernel, made), expected, 1e-12)
            assert_close(made.cross(kernel, features), expected.mT, 1e-12)
        joint = torch.cat([torch.cat([kuu, features.kuf(kernel, x)], 1), torch.cat(
            [features.kuf(kernel, x).mT, dense(x, x)], 1)])  # fmt: skip
        assert torch.linalg.eigvalsh(joint)[0] > -1e-12


def test_batches_of_kernels() -> None:
    features, kernel = legs_and_window(), gpytorch_kernel(torch.tensor([0.5, 1.0]), batch_shape=(2,))
    with torch.no_grad():
        kuu = features.kuu(kernel).to_dense()
        assert kuu.shape == (2, 10, 10)
        for i, lengthscale in enumerate((0.5, 1.0)):
            assert_close(kuu[i], functionals(features).covariance(oracle.rbf(lengthscale)), 1e-7)


@pytest.mark.parametrize("twice", [0, 1])
def test_identical_parts_count_once(twice: int) -> None:
    """The same memory named twice says what it says once."""
    part = [lambda: HippoFeatures(8, 6.0), lambda: InducingPoints(torch.linspace(0, 6, 8, dtype=F64))][twice]
    x, y = draw(40, 6.0)
    at = torch.linspace(-1, 8, 15, dtype=F64)
    one, two = (
        stream(part(), jitter=1e-8, transfer="vfe"),
        stream(CompositeFeatures([part(), part()]), jitter=1e-8, transfer="vfe"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (one, two):
            model.update(x[:20], y[:20]).update(x[20:], y[20:])
    assert two.state.num_features == 16
    assert_close(two(at).mean, one(at).mean, 1e-4)
    assert_close(two(at).covariance_matrix, one(at).covariance_matrix, 1e-4)
    assert_close(two.log_evidence, one.log_evidence, 1e-3)


def test_more_parts_never_know_less() -> None:
    x = torch.linspace(0, 4, 30, dtype=F64)
    alone, more = stream(HippoFeatures(6, 4.0), lengthscale=0.5), stream(legs_and_window(), lengthscale=0.5)
    assert (more.residual_variance(x) <= alone.residual_variance(x) + 1e-9).all()
    recent = x > 2.5
    assert more.residual_variance(x)[recent].mean() < 0.1 * alone.residual_variance(x)[recent].mean()


# How they follow a stream


def test_following() -> None:
    kernel, points = RBFKernel().double(), InducingPoints(torch.tensor([0.5, 2.0], dtype=F64))
    features = CompositeFeatures([HippoFeatures(6, 4.0), HippoFeatures(4, 4.0, measure="legt", window=1.0), points])
    inside = torch.tensor([[0.1], [4.0]], dtype=F64)
    assert features.following(inside, kernel) is features
    assert features.following(torch.zeros(0, 1, dtype=F64), kernel) is features
    for growth, ends in ((1.25, (5.0, 4.5)), (None, (4.5, 4.5))):
        moved = features.following(torch.tensor([[4.5]], dtype=F64), kernel, growth)
        assert type(moved) is CompositeFeatures and moved is not features
        assert (moved.parts[0].horizon, moved.parts[1].horizon) == ends
        assert moved.parts[2] is points
        assert moved.parts[1].window == 1.0
    assert features.parts[0].horizon == 4.0
    with pytest.raises(ValueError, match="fixed at 4"):
        features.following(torch.tensor([[4.5]], dtype=F64), kernel, "fixed")
    nested = CompositeFeatures([features, points])
    assert nested.following(inside, kernel) is nested
    assert nested.following(torch.tensor([[4.5]], dtype=F64), kernel).interval == (0.0, 5.0)
    selected = CompositeFeatures([HippoFeatures(6, 4.0), SelectedPoints(2)])
    now = selected.following(inside, kernel)
    assert now.parts[0] is selected.parts[0] and now.parts[1].num_features == 2
    assert now.following(inside, kernel) is now


def test_intervals_and_probes() -> None:
    features = CompositeFeatures([legs_and_window(), InducingPoints(torch.tensor([9.0], dtype=F64))])
    assert features.interval == (0.0, 4.0)
    assert torch.equal(features.probes(10), HippoFeatures(1, 4.0).probes(10))
    points = CompositeFeatures([InducingPoints(torch.zeros(1, dtype=F64))])
    assert points.interval is None and points.probes() is None
    outputs = CompositeFeatures([HippoFeatures(3, 4.0, other_inputs=torch.tensor([float(k)])) for k in range(3)])
    probes = outputs.probes(12)
    assert probes.shape == (12, 2)
    assert [int((probes[:, 1] == k).sum()) for k in range(3)] == [4, 4, 4]
    assert outputs.probes(1).shape == (3, 2)


def test_with_horizon() -> None:
    points = InducingPoints(torch.tensor([9.0], dtype=F64))
    features = CompositeFeatures([legs_and_window(), points]).with_horizon(8.0)
    assert features.parts[0].parts[0].interval == (0.0, 8.0)
    assert features.parts[0].parts[1].interval == (6.5, 8.0)
    assert features.parts[1] is points


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_stream_is_the_dense_stream(name: str) -> None:
    """Three chunks, the last two beyond the horizon, against Bui et al. with the parts that the stream has chosen."""
    features, noise = COMPOSITES[name](), 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stream(features, lengthscale=0.5, jitter=1e-14, transfer="vfe")
        dense = oracle.DenseStream(oracle.rbf(0.5), functionals(features))
        for i, horizon in enumerate((4.0, 4.6, 7.0)):
            x, y = draw(14, horizon, horizon - 2.5, seed=i)
            model.update(x, y)
            dense.update(x, y, torch.full_like(x, noise), basis=functionals(model.features))
    at = torch.linspace(0, 8, 13, dtype=F64)
    expected = dense.predict(at)
    assert_close(model(at).mean, expected.mean, 1e-3)
    assert_close(model(at).covariance_matrix, expected.covariance, 1e-3)


def test_a_window_sharpens_the_recent_past() -> None:
    """A rough series that the long memory alone blurs: near the end the composite is as good as the exact GP."""
    x = torch.linspace(0, 8, 160, dtype=F64)
    y = (6 * x).sin()
    noise = torch.full_like(x, 0.01)
    window = HippoFeatures(20, 4.0, measure="legt", window=1.0)
    errors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, features in {
            "long": HippoFeatures(12, 4.0),
            "both": CompositeFeatures([HippoFeatures(12, 4.0), window]),
        }.items():
            model = stream(features, lengthscale=0.25, noise=0.01, transfer="adf")
            for a, b in zip(x.split(20), y.split(20), strict=True):
                model.update(a, b)
            at = torch.linspace(7.1, 7.9, 9, dtype=F64)
            expected = oracle.exact_gp(oracle.rbf(0.25), oracle.zero, x, y, noise, at)
            errors[name] = (model(at).mean - expected.mean).abs().max().item()
    assert errors["both"] < 0.05 and errors["both"] < 0.2 * errors["long"]


def test_capacity_is_judged_on_the_longest_memory() -> None:
    model = stream(CompositeFeatures([HippoFeatures(3, 10.0), HippoFeatures(4, 10.0, measure="legt", window=1.0)]))
    with pytest.warns(UserWarning, match=r"7 features leave .* More features would"):
        model.update(*draw(5))
    with pytest.raises(ValueError, match="max_features: only HippoFeatures"):
        stream(legs_and_window(), max_features=30)


# As modules


def reload(model: torch.nn.Module, into: torch.nn.Module) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    into.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("name", COMPOSITES)
def test_save_load_and_copy_in_mid_stream(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, fresh = (stream(COMPOSITES[name](), lengthscale=1.2, jitter=1e-8) for _ in range(2))
        model.update(*draw(20, 7.0))
        reload(model, fresh)
        copy = deepcopy(model)
        oracle.assert_identical(fresh, oracle.snapshot(model))
        before = oracle.snapshot(model)
        x, y = draw(10, 9.0, 7.0)
        for other in (fresh, copy):
            other.update(x, y)
        oracle.assert_identical(model, before)
        model.update(x, y)
    at = torch.linspace(0, 10, 11, dtype=F64)
    for other in (fresh, copy):
        assert other.features.interval == model.features.interval
        assert_close(other(at).mean, model(at).mean, 1e-9)
        assert_close(other.log_evidence, model.log_evidence, 1e-9)


def test_dtypes() -> None:
    features = COMPOSITES["nested"]()
    nodes, weights = features.nodes(), features.weights()
    for other in (deepcopy(features).float(), deepcopy(features).half().to(torch.float32)):
        assert other.nodes().dtype == other.weights().dtype == F64
        assert torch.equal(other.nodes(), nodes) and torch.equal(other.weights(), weights)
    model = stream(legs_and_window(), dtype=torch.float32)
    x, y = draw(20, 4.0, dtype=torch.float32)
    exact = stream(legs_and_window()).update(x.double(), y.double())
    assert model.update(x, y)(x).mean.dtype == torch.float32
    assert_close(model(x).mean.double(), exact(x.double()).mean, 1e-4)


def test_bad_parts() -> None:
    good = HippoFeatures(3, 1.0)
    batched = InducingPoints(torch.zeros(2, 3, 1))
    two = InducingPoints(torch.zeros(3, 2))
    for parts, error, message in (
        ([], ValueError, "at least one"),
        ([good, torch.zeros(3, 1)], TypeError, "got Tensor"),
        ([good, HippoFeatures], TypeError, "got type"),
        ([good, batched], ValueError, r"\(Q, d\), got \(2, 3, 1\)"),
        ([good, two], ValueError, r"same number of input columns, got \[1, 2\]"),
    ):
        with pytest.raises(error, match=f"parts: .*{message}"):
            CompositeFeatures(parts)
    with pytest.raises(TypeError):
        CompositeFeatures(good)
    assert CompositeFeatures(iter([good, good])).num_features == 6


# Several outputs through latent functions


def coregionalised(tasks: int) -> Kernel:
    kernel = ScaleKernel(RBFKernel(active_dims=[0])) * IndexKernel(tasks, rank=2, active_dims=[1])
    kernel = kernel.double()
    kernel.kernels[0].base_kernel.lengthscale = torch.tensor(1.0, dtype=F64)
    generator = torch.Generator().manual_seed(3)
    kernel.kernels[1].covar_factor.data = torch.randn(tasks, 2, dtype=F64, generator=generator)
    kernel.kernels[1].var = torch.linspace(0.2, 0.5, tasks, dtype=F64)
    return kernel


def outputs(orders: Sequence[int], horizon: float) -> CompositeFeatures:
    return CompositeFeatures(
        [HippoFeatures(m, horizon, other_inputs=torch.tensor([float(k)])) for k, m in enumerate(orders)]
    )


def exact(kernel: Kernel, x: Tensor, y: Tensor, at: Tensor, noise: float) -> oracle.Gaussian:
    with torch.no_grad():
        dense = lambda a, b: to_dense(kernel(a, b))  # noqa: E731
        gain = torch.linalg.solve(dense(x, x) + noise * torch.eye(len(x), dtype=F64), dense(x, at)).mT
        return oracle.Gaussian(gain @ y, dense(at, at) - gain @ dense(x, at))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, of index kernels
@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("missing", [False, True])
def test_outputs_that_share_latent_functions(tasks: int, missing: bool) -> None:
    """A memory of each output: with enough features it is the exact GP over (time, output)."""
    kernel, noise = coregionalised(tasks), 0.05
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor(noise, dtype=F64)
    model = StreamingGP(outputs([16] * tasks, 4.0), kernel, likelihood).eval()
    xs, ys = [], []
    for chunk in range(4):
        times = draw(8, 1.5 * (chunk + 1), 1.5 * chunk, seed=chunk)[0]
        x = torch.cartesian_prod(times, torch.arange(tasks, dtype=F64))
        y = (x[:, 0] + x[:, 1]).sin()
        if missing:  # the last output is silent for two chunks, and others here and there
            gone = ((x[:, 1] == tasks - 1) & (chunk in (1, 2))) | (torch.arange(len(x)) % 5 == 0)
            y = torch.where(gone, torch.nan, y)
        model.update(x, y, missing="skip" if missing else "error")
        xs.append(x[~y.isnan()])
        ys.append(y[~y.isnan()])
    assert {part.horizon for part in model.features.parts} == {6.25}
    assert model.num_observations == sum(len(y) for y in ys)
    at = torch.cartesian_prod(torch.linspace(0, 6, 9, dtype=F64), torch.arange(tasks, dtype=F64))
    expected = exact(kernel, torch.cat(xs), torch.cat(ys), at, noise)
    assert_close(model(at).mean, expected.mean, 1e-5)
    assert_close(model(at).covariance_matrix, expected.covariance, 1e-5)
    assert model.residual_variance().item() < 1e-6


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_an_output_may_be_remembered_better_than_another() -> None:
    kernel = coregionalised(2)
    model = StreamingGP(outputs([16, 4], 4.0), kernel, gpytorch.likelihoods.GaussianLikelihood().double())
    times = torch.linspace(0, 4, 9, dtype=F64)
    left = [model.residual_variance(torch.stack([times, torch.full_like(times, k)], -1)).mean() for k in (0.0, 1.0)]
    assert left[0] < 1e-6 < 1e-3 < left[1]


# Pyramids


@given(
    levels=st.integers(1, 4),
    more=st.integers(0, 9),
    ratio=st.sampled_from([1.5, 2.0, 4.0]),
    start=st.sampled_from([0.0, -3.0, 100.0]),
    length=st.sampled_from([0.5, 16.0]),
)
def test_windows_and_shares(levels: int, more: int, ratio: float, start: float, length: float) -> None:
    features = PyramidFeatures(levels + more, start + length, start, levels, ratio)
    assert features.num_features == levels + more
    shares = [part.num_features for part in features.parts]
    assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)
    for later in (features, features.with_horizon(start + 3 * length)):
        end = later.parts[0].horizon
        assert isinstance(later, PyramidFeatures) and later.ratio == ratio
        assert [part.num_features for part in later.parts] == shares
        for level, part in enumerate(later.parts):
            a, b = part.interval
            assert b == end and a == pytest.approx(end - (end - start) / ratio**level, rel=1e-12, abs=1e-12)
    assert features.interval is None


def test_pyramids_follow_the_last_time() -> None:
    features, kernel = PyramidFeatures(9, 4.0), MaternKernel().double()
    x = torch.tensor([[3.0], [4.5], [1.0]], dtype=F64)
    assert features.following(x[:1], kernel) is features
    for growth in (1.25, 3.0, None):
        moved = features.following(x, kernel, growth)
        assert isinstance(moved, PyramidFeatures) and moved.parts[0].horizon == 4.5
        assert moved.parts[2].window == 4.5 / 16
    with pytest.raises(ValueError, match="fixed"):
        features.following(x, kernel, "fixed")
    assert features.following(x[:1], kernel, "fixed") is features


def test_pyramids_with_other_columns() -> None:
    features = PyramidFeatures(6, 4.0, 1.0, 2, time_dim=1, other_inputs=torch.tensor([7.0])).with_horizon(5.0)
    assert features.num_dims == 2 and (features.nodes()[:, 0] == 7.0).all()
    assert [part.interval for part in features.parts] == [(1.0, 5.0), (4.0, 5.0)]
    outer = CompositeFeatures([features, HippoFeatures(3, 4.0, time_dim=1, other_inputs=torch.tensor([8.0]))])
    moved = outer.following(torch.tensor([[7.0, 6.0]], dtype=F64), RBFKernel())
    assert isinstance(moved.parts[0], PyramidFeatures) and moved.interval == (0.0, 6.25)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"num_features": 2}, ValueError, "num_features"),
        ({"num_features": 4.0}, TypeError, "num_features"),
        ({"levels": 0}, ValueError, "levels"),
        ({"levels": 1.5}, TypeError, "levels"),
        ({"ratio": 1.0}, ValueError, "ratio"),
        ({"ratio": float("nan")}, ValueError, "ratio"),
        ({"horizon": -1.0}, ValueError, "horizon"),
        ({"horizon": float("inf")}, ValueError, "horizon"),
        ({"time_dim": 3}, ValueError, "time_dim"),
    ],
)
def test_bad_pyramids(arguments: dict, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"{name}: "):
        PyramidFeatures(**({"num_features": 6, "horizon": 4.0} | arguments))


@pytest.mark.parametrize("nu", [0.5, 1.5])
def test_a_pyramid_on_a_rough_series_stays_finite(nu: float) -> None:
    """Two hundred updates without a warning, sharp at the end and never more certain than the exact GP allows."""
    model = stream(PyramidFeatures(36, 0.5), lengthscale=0.5, noise=0.05, nu=nu)
    x = 0.1 * torch.arange(800, dtype=F64)
    y = torch.sin(3 * x) + 0.5 * torch.sin(0.2 * x)
    for a, b in zip(x.split(4), y.split(4), strict=True):
        model.update(a, b)
        assert model.features.parts[0].horizon == max(a[-1].item(), 0.5)
    at = torch.linspace(0, 79.9, 200, dtype=F64)
    mean, variance = model(at).mean, variance_of(model(at))
    assert mean.isfinite().all() and (variance > 0).all() and (variance <= 1 + 1e-8).all()
    recent = at > 79
    truth = torch.sin(3 * at) + 0.5 * torch.sin(0.2 * at)
    assert (mean - truth)[recent].abs().max() < 0.25
    assert variance[recent].mean() < 0.5 * variance[at < 40].mean()


def test_a_saved_pyramid_restores_its_ratio() -> None:
    saved, fresh = PyramidFeatures(9, 8.0, ratio=4.0), PyramidFeatures(9, 8.0, ratio=2.0)
    reload(saved, fresh)
    assert [part.interval for part in fresh.parts] == [part.interval for part in saved.parts]
    moved = fresh.with_horizon(16.0)
    assert [part.interval for part in moved.parts] == [part.interval for part in saved.with_horizon(16.0).parts]
