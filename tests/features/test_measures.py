"""HippoFeatures of all four measures: covariances against brute-force integrals, and what a stream asks of them."""

import io
import math
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from torch import Tensor

from gpseq.features import CapacityError, HippoFeatures, InducingPoints
from gpseq.features.hippo import MEASURES
from tests.oracles import close, panels

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
SLIDING = MEASURES[1:]


def make(measure: str, num_features: int = 6, horizon: float = 5.0, window: float | None = 1.5, **kwargs: Any) -> Any:
    window = None if measure == "legs" else window
    return HippoFeatures(num_features, horizon, measure=measure, window=window, **kwargs)


def rbf(lengthscale: float = 1.0) -> Kernel:
    kernel = RBFKernel().double()
    kernel.lengthscale = torch.tensor(lengthscale, dtype=F64)
    return kernel


def same(a: HippoFeatures, b: HippoFeatures) -> bool:
    assert (a.measure, a.window, a.start, a.horizon) == (b.measure, b.window, b.start, b.horizon)
    return torch.equal(a.nodes(), b.nodes()) and torch.equal(a.weights(), b.weights())


def functions(features: HippoFeatures, times: np.ndarray) -> np.ndarray:
    """g at times, ``(M, n)``."""
    order = features.num_features
    if features.measure in ("legs", "legt"):
        length = features.window or features.horizon - features.start
        s = 2 * (times - features.horizon) / length + 1
        return np.stack([math.sqrt(2 * m + 1) * scipy.special.eval_legendre(m, s) for m in range(order)])
    lag = (features.horizon - times) / features.window
    if features.measure == "lagt":
        return np.stack([scipy.special.eval_laguerre(m, lag) for m in range(order)])
    waves = [np.ones_like(lag)]
    for j in range(1, order // 2 + 1):
        waves += [math.sqrt(2) * np.cos(2 * math.pi * j * lag), math.sqrt(2) * np.sin(2 * math.pi * j * lag)]
    return np.stack(waves[:order])


def functionals(features: HippoFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Times and weights ``(M, n)`` of the integrals against the measure, by a composite rule."""
    length = features.window or features.horizon - features.start
    reach = 60 * length if features.measure == "lagt" else length
    times, weights = panels([features.horizon - reach, features.horizon], 60 if features.measure == "lagt" else 8)
    density = np.exp((times - features.horizon) / length) if features.measure == "lagt" else 1.0
    return times, functions(features, times) * density * weights / length


def gram(a: np.ndarray, b: np.ndarray, lengthscale: float) -> np.ndarray:
    return np.exp(-0.5 * ((a[:, None] - b) / lengthscale) ** 2)


def least_eigenvalue(matrix: Tensor) -> float:
    return torch.linalg.eigvalsh(0.5 * (matrix + matrix.mT)).min().item()


# Covariances


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("order", "horizon", "window"), [(1, 5.0, 1.5), (6, 5.0, 1.0), (7, -2.0, 0.4), (12, 3.0, 0.7)])
def test_covariances_are_the_integrals(measure: str, order: int, horizon: float, window: float) -> None:
    features = make(measure, order, horizon, window, start=-5.0, num_nodes=400)
    later = features.with_horizon(horizon + 0.6)
    x = np.array([horizon - 9.0, horizon - window, horizon - 0.2, horizon, horizon + 0.5])
    (t, w), (s, v) = functionals(features), functionals(later)
    kernel = rbf(0.8)
    close(features.kuu(kernel).to_dense(), torch.from_numpy(w @ gram(t, t, 0.8) @ w.T), 1e-9)
    close(features.kuf(kernel, torch.from_numpy(x)), torch.from_numpy(w @ gram(t, x, 0.8)), 1e-9)
    close(features.cross(kernel, later), torch.from_numpy(w @ gram(t, s, 0.8) @ v.T), 1e-9)
    close(later.cross(kernel, features), features.cross(kernel, later).mT, 1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_default_number_of_nodes_is_enough_where_the_order_is(measure: str) -> None:
    """A few features more than the kernel asks for: twice as many nodes change nothing."""
    kernel = rbf(1.0)
    for window in (0.5, 1.0, 2.0):
        order = make(measure, 2, 5.0, window).required_order(kernel) + 2
        features, fine = make(measure, order, 5.0, window), make(measure, order, 5.0, window, num_nodes=4 * order + 200)
        close(features.kuu(kernel).to_dense(), fine.kuu(kernel).to_dense(), 1e-5)


def test_nodes_without_weight_are_left_out() -> None:
    """Gauss-Laguerre nodes reach thousands of time constants back, where they would only cost digits and time."""
    features = make("lagt", 300, 5.0, 1.0)
    assert features.num_nodes == len(features.nodes()) == features.weights().shape[1] < 200
    assert features.nodes().min() > 5.0 - 150
    assert 1 - 1e-12 < features.weights()[0].sum() < 1 + 1e-12
    features.residual_curve(rbf())  # factored without any warning
    for measure in ("legs", "legt", "fout"):
        assert make(measure, 300).num_nodes == 620


@pytest.mark.parametrize("measure", MEASURES)
@settings(max_examples=15)
@given(
    order=st.integers(1, 30),
    window=st.floats(0.05, 20),
    lengthscale=st.floats(0.1, 10),
    move=st.floats(0.01, 10),
    rough=st.booleans(),
)
def test_everything_is_jointly_positive_semi_definite(
    measure: str, order: int, window: float, lengthscale: float, move: float, rough: bool
) -> None:
    kernel = (MaternKernel(0.5) if rough else RBFKernel()).double()
    kernel.lengthscale = torch.tensor(lengthscale, dtype=F64)
    old = make(measure, order, 3.0, window)
    parts = [old, old.with_horizon(3.0 + move), InducingPoints(torch.linspace(-3, 15, 7, dtype=F64))]
    rows = [torch.cat([a.cross(kernel, b) for b in parts], dim=1) for a in parts]
    joint = torch.cat(rows)
    close(joint[:order, :order], old.kuu(kernel).to_dense(), 1e-12)
    close(joint[:order, 2 * order :], old.kuf(kernel, torch.linspace(-3, 15, 7, dtype=F64)), 1e-12)
    assert least_eigenvalue(joint) > -1e-12 * len(joint)


@pytest.mark.parametrize("measure", SLIDING)
@given(shift=st.floats(-100, 100), factor=st.floats(0.01, 10))  # GPyTorch rounds lengthscales around 20
def test_a_sliding_memory_is_at_rest_in_its_own_time(measure: str, shift: float, factor: float) -> None:
    """Stationary kernels see the window in lengthscales, whatever the clock says and wherever time began."""
    here = make(measure, 8, 4.0, 1.5)
    there = make(measure, 8, 4.0 * factor + shift, 1.5 * factor, start=shift)
    tolerance = 1e-11 * (1 + abs(shift) / factor)
    close(there.kuu(rbf(factor)).to_dense(), here.kuu(rbf()).to_dense(), tolerance)
    x = torch.linspace(2, 5, 5, dtype=F64)
    close(there.kuf(rbf(factor), x * factor + shift), here.kuf(rbf(), x), tolerance)
    assert torch.equal(make(measure, 8, 4.0, 1.5, start=-7.0).nodes(), here.nodes())


@pytest.mark.parametrize("measure", SLIDING)
def test_what_lies_behind_the_window_is_forgotten(measure: str) -> None:
    kernel, features = rbf(0.2), make(measure, 20, 10.0, 0.5)
    past = 10.0 - (40.0 if measure == "lagt" else 2.0)
    assert features.kuf(kernel, torch.tensor([past], dtype=F64)).abs().max() < 1e-7
    assert features.kuf(kernel, torch.tensor([9.9], dtype=F64)).abs().max() > 0.1


def test_legt_is_legs_on_its_window() -> None:
    legt, legs = make("legt", 7, 5.0, 1.5), HippoFeatures(7, 5.0, 3.5)
    close(legt.nodes(), legs.nodes(), 1e-14)
    assert torch.equal(legt.weights(), legs.weights())
    assert legt.required_order(rbf(0.2)) == legs.required_order(rbf(0.2))
    close(legt.residual_curve(rbf(0.2)), legs.residual_curve(rbf(0.2)), 1e-9)


@pytest.mark.parametrize("measure", SLIDING)
def test_a_window_may_be_longer_than_time(measure: str) -> None:
    features = make(measure, 6, 1.0, 10.0, start=0.5)
    assert features.nodes().min() < 0.5 and features.nodes().max() < 1.0
    assert torch.isfinite(features.kuu(rbf()).to_dense()).all()
    probes = features.probes()
    assert 0.5 < probes.min() and probes.max() < 1.0


@pytest.mark.parametrize("measure", MEASURES)
def test_inputs_in_other_dtypes_and_columns(measure: str, dtype: torch.dtype) -> None:
    other = torch.tensor([0.3, -1.0], dtype=dtype)
    features = make(measure, 6, 2.0, 0.5, time_dim=1, other_inputs=other)
    assert features.nodes().shape == (features.num_nodes, 3) and features.nodes().dtype == F64
    assert (features.nodes()[:, [0, 2]] == other.double()).all()
    kernel = ScaleKernel(RBFKernel(ard_num_dims=3)).to(dtype)
    x = torch.randn(4, 3).to(dtype)
    kuf = features.kuf(kernel, x)
    assert kuf.dtype == F64 and kuf.shape == (6, 4)
    close(kuf, features.kuf(deepcopy(kernel).double(), x.double()), 1e-6)
    assert features.kuf(kernel, x.expand(2, 4, 3)).shape == (2, 6, 4)


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_reach_the_kernel(measure: str) -> None:
    kernel, features = rbf(0.5), make(measure)
    (features.kuu(kernel).to_dense().sum() + features.kuf(kernel, torch.ones(2, dtype=F64)).sum()).backward()
    assert kernel.raw_lengthscale.grad is not None and kernel.raw_lengthscale.grad.isfinite().all()


# Pictures


def coefficients(features: HippoFeatures, signal: Callable) -> Tensor:
    return features.weights() @ torch.as_tensor(signal(features.nodes()[:, 0].numpy()))


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@given(
    values=st.lists(st.floats(-3, 3), min_size=1, max_size=8),
    horizon=st.floats(0.5, 20),
    window=st.floats(0.1, 20),
    extra=st.integers(0, 5),
)
def test_polynomials_are_reconstructed_exactly(
    measure: str, values: list[float], horizon: float, window: float, extra: int
) -> None:
    features = make(measure, len(values) + extra, horizon, window)
    begin = horizon - (features.window or horizon)
    polynomial = Polynomial(values, domain=[begin, horizon])
    times = np.linspace(begin, horizon, 9)
    expected = torch.from_numpy(polynomial(times))
    picture = features.reconstruct(coefficients(features, polynomial), torch.from_numpy(times))
    # Laguerre weights take a polynomial of the degree m to numbers of the size 2^m m!, and back.
    size = sum(abs(value) * (2.0**m * math.factorial(m) if measure == "lagt" else 1) for m, value in enumerate(values))
    assert ((picture - expected).abs() <= 1e-11 * (1 + size)).all()


@given(
    waves=st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), max_size=5),
    mean=st.floats(-2, 2),
    extra=st.integers(0, 3),
    window=st.floats(0.1, 10),
)
def test_waves_are_reconstructed_exactly(
    waves: list[tuple[float, float]], mean: float, extra: int, window: float
) -> None:
    def signal(t: np.ndarray) -> np.ndarray:
        phase = 2 * np.pi * t / window
        return mean * np.ones_like(t) + sum(
            a * np.cos((j + 1) * phase) + b * np.sin((j + 1) * phase) for j, (a, b) in enumerate(waves)
        )

    features = make("fout", 2 * len(waves) + 1 + extra, 4.0, window)
    times = np.linspace(4.0 - window, 4.0, 9)
    picture = features.reconstruct(coefficients(features, signal), torch.from_numpy(times))
    close(picture, torch.from_numpy(signal(times)), 1e-11)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_best_picture_under_the_measure(measure: str) -> None:
    """What is missing of a function that does not fit is orthogonal to the basis."""
    features = make(measure, 6, 2.0, 0.3, start=0.5, num_nodes=200)
    signal = lambda t: np.sin(2 * t) + np.exp(0.3 * t)  # noqa: E731
    u = coefficients(features, signal)
    times, weights = functionals(features)
    missing = signal(times) - features.reconstruct(u, torch.from_numpy(times)).numpy()
    assert np.abs(weights @ missing).max() < 1e-10


@pytest.mark.parametrize("measure", SLIDING)
def test_reconstruct_takes_times_or_inputs(measure: str, dtype: torch.dtype) -> None:
    features = make(measure, time_dim=1, other_inputs=torch.zeros(1))
    times = torch.linspace(4, 5, 5).to(dtype)
    u = torch.randn(3, 6, dtype=F64)
    expected = u @ torch.from_numpy(functions(features, times.double().numpy()))
    close(features.reconstruct(u, times), expected, 1e-12)
    close(features.reconstruct(u, torch.stack([torch.zeros_like(times), times], -1)), expected, 1e-12)


# Where a memory is judged, and what it needs


@pytest.mark.parametrize(
    ("measure", "window", "begin"),
    [
        ("legs", None, 1.0),
        ("legt", 2.0, 3.0),
        ("fout", 2.0, 3.0),
        ("lagt", 0.5, 3.5),
        ("legt", 9.0, 1.0),
        ("fout", 9.0, 1.0),
        ("lagt", 2.0, 1.0),
    ],
)
def test_probes(measure: str, window: float | None, begin: float) -> None:
    features = make(measure, 4, 5.0, window, start=1.0, time_dim=1, other_inputs=torch.tensor([2.0]))
    edges = torch.linspace(begin, 5.0, 11, dtype=F64)
    probes = features.probes(10)
    close(probes[:, 1], 0.5 * (edges[1:] + edges[:-1]), 1e-14)
    assert (probes[:, 0] == 2.0).all() and probes.dtype == F64
    assert features.probes().shape == (256, 2)


@pytest.mark.parametrize("measure", MEASURES)
def test_required_order_is_the_smallest(measure: str) -> None:
    kernel, features = rbf(0.7), make(measure, 1, 5.0, 0.9)
    needed = features.required_order(kernel)
    enough, less = features.with_order(needed), features.with_order(needed - 2)
    assert enough.measure == measure and enough.window == features.window
    assert enough.residual_curve(kernel)[-1] <= 1e-3 < less.residual_curve(kernel)[-1]
    curve = enough.residual_curve(kernel)
    assert curve.shape == (needed,) and (curve.diff() <= 1e-12).all()


@pytest.mark.parametrize("measure", SLIDING)
def test_the_need_of_a_window_does_not_grow_with_the_stream(measure: str) -> None:
    needs = {make(measure, 1, horizon, 1.0).required_order(rbf()) for horizon in (5.0, 50.0, 500.0)}
    assert max(needs) - min(needs) <= 1 and max(needs) < 20


def test_laguerre_polynomials_are_spread_thin() -> None:
    needs = [make("lagt", 1, 100.0, constant).required_order(rbf()) for constant in (1.0, 2.0, 4.0)]
    assert 3 < needs[1] / needs[0] < 6 and 3 < needs[2] / needs[1] < 6


def test_too_much_is_refused_in_words_that_fit() -> None:
    for measure, where in (("legs", "horizon"), ("legt", "window"), ("fout", "window")):
        with pytest.raises(CapacityError, match=rf"^8 features leave .* on the {where}, .* a shorter {where} or"):
            make(measure, 1, 100.0, 50.0).required_order(rbf(), max_features=8)


def test_required_is_that_of_legs() -> None:
    assert HippoFeatures.required(rbf(), 10.0) == make("legs", 1, 10.0).required_order(rbf())
    assert make("legt", 1, 10.0, 2.0).required(rbf(), 10.0) == HippoFeatures.required(rbf(), 10.0)


# The constructor


@pytest.mark.parametrize("measure", SLIDING)
@pytest.mark.parametrize("window", [None, 0, 0.0, -1.0, NAN, INF, -INF, True, "long", torch.ones(2)])
def test_bad_windows_are_named(measure: str, window: Any) -> None:
    role = "time constant" if measure == "lagt" else "length"
    with pytest.raises(ValueError, match=rf"^window: expected a positive {role} for measure '{measure}', got "):
        HippoFeatures(4, 5.0, measure=measure, window=window)


@pytest.mark.parametrize("window", [1.0, 0, False, NAN, "long"])
def test_legs_takes_no_window(window: Any) -> None:
    with pytest.raises(ValueError, match=r"^window: measure 'legs' covers the whole interval; expected None, got "):
        HippoFeatures(4, 5.0, window=window)


@pytest.mark.parametrize("measure", SLIDING)
def test_time_begins_before_it_ends(measure: str) -> None:
    for start in (5.0, 6.0):
        with pytest.raises(ValueError, match=rf"^horizon: expected a time after start={start}"):
            make(measure, start=start)
    with pytest.raises(ValueError, match=r"^measure: expected one of \('legs', 'legt', 'lagt', 'fout'\), got 'legz'"):
        HippoFeatures(4, 5.0, measure="legz", window=1.0)


@pytest.mark.parametrize(("measure", "fewest"), [("legt", 18), ("lagt", 18), ("fout", 33)])
def test_few_nodes_are_warned_about_at_the_caller(measure: str, fewest: int) -> None:
    with pytest.warns(UserWarning, match=f"num_nodes: {fewest - 1} quadrature nodes for 8 features.*{fewest}") as seen:
        make(measure, 8, num_nodes=fewest - 1)
    assert seen[0].filename == __file__
    kept = make(measure, 8, num_nodes=fewest)
    assert same(kept.with_order(2), make(measure, 2, num_nodes=fewest))  # still enough
    assert same(kept.with_order(20), make(measure, 20, num_nodes=52 if measure == "fout" else 30))
    with pytest.raises(ValueError, match="num_features"):
        kept.with_order(0)


def test_a_representation_shows_the_window_where_there_is_one() -> None:
    assert repr(make("lagt")) == "HippoFeatures(num_features=6, start=0, horizon=5, measure='lagt', window=1.5)"
    assert "window" not in repr(make("legs"))


# Copies, casts and saved states


@pytest.mark.parametrize("measure", SLIDING)
def test_with_horizon_moves_the_window_and_keeps_its_length(measure: str) -> None:
    features = make(measure, 6, 5.0, 1.5, start=-1.0, num_nodes=40)
    later = features.with_horizon(9.0)
    assert same(later, make(measure, 6, 9.0, 1.5, start=-1.0, num_nodes=40))
    assert (features.horizon, later.window, later.num_features) == (5.0, 1.5, 6)
    close(later.nodes() - 4.0, features.nodes(), 1e-12 * features.nodes().abs().max().item())
    with pytest.raises(ValueError, match=r"horizon: expected a time after start=-1\.0"):
        features.with_horizon(-1.0)


@pytest.mark.parametrize("measure", MEASURES)
def test_nodes_and_weights_stay_in_float64(measure: str) -> None:
    features = make(measure)
    expected = deepcopy(features)
    for cast in (features.to(torch.float32), features.half(), features.double()):
        assert same(cast, expected) and cast.nodes().dtype == F64
    assert same(torch.nn.ModuleList([features]).float()[0].with_horizon(7.0), expected.with_horizon(7.0))


@pytest.mark.cuda
@pytest.mark.parametrize("measure", MEASURES)
def test_features_move_to_another_device(measure: str) -> None:
    features = make(measure).to("cuda")
    moved = features.with_horizon(7.0).with_order(9)
    assert moved.nodes().is_cuda and moved.weights().is_cuda and moved.probes().is_cuda
    x = torch.linspace(6, 9, 4, device="cuda", dtype=F64)
    assert moved.following(x[:, None], rbf()).nodes().is_cuda
    assert moved.reconstruct(torch.ones(9, device="cuda"), x).is_cuda
    features.set_extra_state(make("lagt" if measure != "lagt" else "fout").get_extra_state())
    assert features.nodes().is_cuda and features.weights().is_cuda


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("other", MEASURES)
@pytest.mark.parametrize("num_nodes", [None, 45])
def test_a_saved_state_restores_any_measure_into_any(measure: str, other: str, num_nodes: int | None) -> None:
    kept = {"time_dim": 1, "other_inputs": torch.tensor([0.1], dtype=F64)}
    features = make(measure, 6, math.pi, 1 / 3, start=-1 / 7, num_nodes=num_nodes, **kept)
    file = io.BytesIO()
    torch.save(features.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for restored in (make(other, 6, 1.0, 2.0, **kept), make(other, 9, 4.0, 0.5, num_nodes=60)):
        restored.float().load_state_dict(state)
        assert same(restored, features)
        assert repr(restored) == repr(features)
        assert torch.equal(restored.get_extra_state(), features.get_extra_state())
        # What is derived later is derived from the same numbers.
        assert same(restored.with_order(20), features.with_order(20))
        assert same(restored.with_horizon(7.0), features.with_horizon(7.0))
        assert torch.equal(restored.probes(), features.probes())
        u, x = torch.ones(6, dtype=F64), torch.linspace(2, 3, 4, dtype=F64)
        assert torch.equal(restored.reconstruct(u, x), features.reconstruct(u, x))


def test_deepcopy_is_independent() -> None:
    features = make("lagt")
    copy = deepcopy(features)
    copy.set_extra_state(make("legs").get_extra_state())
    assert copy.measure == "legs" and copy.window is None
    assert same(features, make("lagt"))


# Streams


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).reshape(-1, 1)


def lengths(growth: float, steps: int, length: float = 2.0) -> float:
    return length * growth**steps


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("growth", [1.25, 2, None, "fixed"])
def test_features_that_reach_the_data_stay(measure: str, growth: Any) -> None:
    features = make(measure)
    for x in (times(), times(0.0, 3.0), times(5.0), torch.zeros(0, 1)):
        assert features.following(x, rbf(), growth) is features


@pytest.mark.parametrize("measure", MEASURES)
def test_a_fixed_horizon_is_the_end(measure: str) -> None:
    features = make(measure)
    with pytest.raises(ValueError, match=re.escape("x: times up to 5.5 pass the horizon, which is fixed at 5.")):
        features.following(times(1.0, 5.5, 2.0), rbf(), "fixed")
    assert features.horizon == 5.0


@pytest.mark.parametrize("growth", [1.25, 2, 1.01, None])
@given(last=st.floats(3.0001, 1e6))
def test_legs_stretches_by_the_factor_as_often_as_needed(growth: float | None, last: float) -> None:
    features = make("legs", 4, 3.0, start=1.0)
    moved = features.following(times(2.0, last, 1.5), rbf(), growth)
    assert (moved.start, moved.measure, moved.num_features) == (1.0, "legs", 4) and features.horizon == 3.0
    if growth is None:
        assert moved.horizon == last
    else:
        steps = round(math.log((moved.horizon - 1) / 2) / math.log(growth))
        assert last <= moved.horizon * (1 + 1e-9)
        assert moved.horizon == pytest.approx(1 + lengths(growth, steps), rel=1e-9)
        assert 1 + lengths(growth, steps - 1) < last


@given(steps=st.integers(1, 60), growth=st.floats(1.05, 3))
def test_a_time_within_rounding_of_a_horizon_of_the_sequence_is_that_horizon(steps: int, growth: float) -> None:
    features, member = make("legs", 2, 2.0), lengths(growth, steps)
    for last in (member, member * (1 - 1e-15), member * (1 + 1e-15)):
        moved = features.following(times(last), rbf(), growth)
        assert last <= moved.horizon <= member * (1 + 1e-14)


@pytest.mark.parametrize("measure", SLIDING)
@pytest.mark.parametrize("growth", [1.25, 3, None])
@given(last=st.floats(5.0001, 1e6))
def test_a_window_slides_to_the_last_time(measure: str, growth: float | None, last: float) -> None:
    features = make(measure, num_nodes=40)
    moved = features.following(times(last, 2.0), rbf(), growth)
    assert same(moved, make(measure, horizon=last, num_nodes=40)) and features.horizon == 5.0


@pytest.mark.parametrize("growth", [0, 0.5, 1.0, NAN, INF, True, "free"])
def test_bad_growth_is_named(growth: Any) -> None:
    for measure in MEASURES:
        with pytest.raises(ValueError, match=r"^growth: expected a factor above 1, None or 'fixed', got "):
            make(measure).following(times(6.0), rbf(), growth)


@pytest.mark.parametrize("last", [2.0, 9.0])
def test_times_before_the_start_are_warned_about_where_the_basis_begins_there(last: float) -> None:
    x = times(-0.5, last)
    with pytest.warns(UserWarning, match=r"x: times from -0\.5 lie before the start of the memory, 0; they") as seen:
        moved = make("legs").following(x, rbf(), None)
    assert seen[0].filename == __file__ and moved.horizon == max(last, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for measure in SLIDING:
            make(measure).following(x, rbf())


@pytest.mark.parametrize("measure", MEASURES)
def test_following_reads_the_column_of_time(measure: str, dtype: torch.dtype) -> None:
    features = make(measure, time_dim=1, other_inputs=torch.zeros(1))
    x = torch.tensor([[99.0, 6.0], [-99.0, 4.0]], dtype=dtype)
    assert features.following(x, LinearKernel(), None).horizon == 6.0
    assert make(measure).following(torch.tensor([6.0, 4.0], dtype=dtype), LinearKernel(), None).horizon == 6.0
