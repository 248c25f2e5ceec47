"""HippoFeatures and InducingPoints as objects: what they refuse, keep, restore, need and reconstruct."""

import io
import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator import to_dense
from numpy.polynomial import Polynomial

from gpseq.features import CapacityError, HippoFeatures, InducingFeatures, InducingPoints
from tests import oracles
from tests.oracles import Line, close

F64 = torch.float64
NAN, INF = float("nan"), float("inf")


def kernel_of(kernel: Kernel, lengthscale: float = 1.0) -> Kernel:
    kernel = kernel.double()
    kernel.lengthscale = torch.tensor(lengthscale, dtype=F64)
    return kernel


def same_basis(a: HippoFeatures, b: HippoFeatures) -> bool:
    return torch.equal(a.nodes(), b.nodes()) and torch.equal(to_dense(a.weights()), to_dense(b.weights()))


# The constructor


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, r"num_features: expected at least 1, got 0"),
        ({"num_features": -3}, ValueError, r"num_features: .*-3"),
        ({"num_features": 4.0}, TypeError, r"num_features: expected an integer, got 4\.0"),
        ({"num_features": True}, TypeError, r"num_features: expected an integer, got True"),
        ({"num_features": "4"}, TypeError, r"num_features: expected an integer, got '4'"),
        ({"num_features": None}, TypeError, r"num_features: expected an integer, got None"),
        ({"horizon": 0.0}, ValueError, r"horizon: .*after start=0\.0, got 0\.0"),
        ({"horizon": 1.0, "start": 2.0}, ValueError, r"horizon: .*after start=2\.0, got 1\.0"),
        ({"horizon": INF}, ValueError, r"horizon: .*finite.* got inf"),
        ({"horizon": NAN}, ValueError, r"horizon: .*finite.* got nan"),
        ({"horizon": True}, ValueError, r"horizon: .*finite.* got True"),
        ({"horizon": None}, (TypeError, ValueError), r"horizon: .*number.* got None"),
        ({"horizon": "soon"}, (TypeError, ValueError), r"horizon: .*number.* got 'soon'"),
        ({"horizon": torch.ones(2)}, (TypeError, ValueError), r"horizon: .*number"),
        ({"start": -INF}, ValueError, r"start: .*finite.* got -inf"),
        ({"start": NAN}, ValueError, r"start: .*finite.* got nan"),
        ({"start": None}, (TypeError, ValueError), r"start: .*number.* got None"),
        ({"measure": "leg"}, ValueError, r"measure: .*legs.* got 'leg'"),
        ({"measure": None}, ValueError, r"measure: .*legs.* got None"),
        ({"window": 1.0}, ValueError, r"window: .*'legs'.* got 1\.0"),
        ({"num_nodes": 3}, ValueError, r"num_nodes: expected at least num_features=4, got 3"),
        ({"num_nodes": 30.0}, TypeError, r"num_nodes: expected an integer, got 30\.0"),
        ({"num_nodes": 0}, ValueError, r"num_nodes: .*got 0"),
        ({"time_dim": 1}, ValueError, r"time_dim: .*1 input columns, got 1"),
        ({"time_dim": -2}, ValueError, r"time_dim: .*1 input columns, got -2"),
        ({"time_dim": 0.0}, ValueError, r"time_dim: .*got 0\.0"),
        ({"time_dim": 3, "other_inputs": torch.zeros(2)}, ValueError, r"time_dim: .*3 input columns, got 3"),
        ({"time_dim": -4, "other_inputs": torch.zeros(2)}, ValueError, r"time_dim: .*3 input columns, got -4"),
        ({"other_inputs": [1.0]}, ValueError, r"other_inputs: .*\(d - 1,\).* got list"),
        ({"other_inputs": torch.zeros(1, 2)}, ValueError, r"other_inputs: .*\(d - 1,\).* got \(1, 2\)"),
        ({"other_inputs": torch.tensor(1.0)}, ValueError, r"other_inputs: .*\(d - 1,\).* got \(\)"),
        ({"other_inputs": torch.tensor([0.0, INF])}, ValueError, r"other_inputs: .*finite"),
        ({"other_inputs": torch.tensor([NAN])}, ValueError, r"other_inputs: .*finite"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        HippoFeatures(**({"num_features": 4, "horizon": 1.0} | arguments))


@given(horizon=st.floats(allow_nan=True, allow_infinity=True), start=st.floats(allow_nan=True, allow_infinity=True))
def test_any_interval_is_accepted_or_refused_by_name(horizon: float, start: float) -> None:
    good = math.isfinite(horizon) and math.isfinite(start) and horizon > start
    if good and not math.isfinite(horizon - start):
        return
    if good:
        assert HippoFeatures(2, horizon, start).nodes().isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"^(horizon|start): expected"):
            HippoFeatures(2, horizon, start)


@pytest.mark.parametrize("num_nodes", [8, 17])
def test_few_nodes_are_warned_about(num_nodes: int) -> None:
    with pytest.warns(UserWarning, match=f"num_nodes: {num_nodes} quadrature nodes for 8 features.*18"):
        HippoFeatures(8, 1.0, num_nodes=num_nodes)
    HippoFeatures(8, 1.0, num_nodes=18)


def test_defaults() -> None:
    features = HippoFeatures(7, horizon=3)
    assert (features.num_features, features.num_nodes, features.start, features.horizon) == (7, 34, 0.0, 3.0)
    assert features.nodes().shape == (34, 1) and features.weights().shape == (7, 34)
    assert features.nodes().min() > 0 and features.nodes().max() < 3
    assert "num_features=7" in repr(features) and "horizon=3" in repr(features)
    assert not list(features.parameters())


# Dtypes and copies


def test_nodes_and_weights_stay_in_float64() -> None:
    features = HippoFeatures(4, 1.7, other_inputs=torch.tensor([0.1], dtype=F64))
    expected = deepcopy(features)
    for cast in (features.to(torch.float32), features.half(), features.bfloat16(), features.float(), features.double()):
        assert same_basis(cast, expected)
        assert cast.nodes().dtype == F64
    # And inside a model that is cast.
    assert same_basis(torch.nn.ModuleList([features]).half()[0], expected)


def test_points_stay_in_float64() -> None:
    exact = torch.tensor([0.1, 1 / 3, 0.7], dtype=F64)
    points = InducingPoints(exact).to(torch.float32)
    assert torch.equal(points.nodes()[:, 0], exact)
    learned = InducingPoints(exact, learn=True)
    assert learned.nodes().dtype == learned.float().nodes().dtype == F64


def test_with_horizon_moves_the_end_and_nothing_else(dtype: torch.dtype) -> None:
    features = HippoFeatures(5, 2.0, 0.5, num_nodes=40, time_dim=1, other_inputs=torch.tensor([3.0])).to(dtype)
    before = features.nodes().clone()
    longer = features.with_horizon(4.0)
    assert same_basis(longer, HippoFeatures(5, 4.0, 0.5, num_nodes=40, time_dim=1, other_inputs=torch.tensor([3.0])))
    assert torch.equal(features.nodes(), before) and features.horizon == 2.0
    longer.nodes().zero_()
    longer._weights.zero_()
    assert features.weights().abs().max() > 0
    for horizon in (0.5, 0.1, NAN, INF):
        with pytest.raises(ValueError, match="horizon"):
            features.with_horizon(horizon)
    assert features.horizon == 2.0 and torch.equal(features.nodes(), before)


def test_with_order_changes_the_order_and_nothing_else() -> None:
    features = HippoFeatures(5, 2.0, 0.5)
    assert same_basis(features.with_order(9), HippoFeatures(9, 2.0, 0.5))
    assert features.num_features == 5
    given_nodes = HippoFeatures(5, 2.0, num_nodes=40)
    assert given_nodes.with_order(20).num_nodes == 40  # still enough
    assert given_nodes.with_order(60).num_nodes == 70
    with pytest.raises(ValueError, match="num_features"):
        features.with_order(0)


def test_first_weights_do_not_depend_on_the_order() -> None:
    small, large = HippoFeatures(5, 2.0, num_nodes=40), HippoFeatures(20, 2.0, num_nodes=40)
    close(small.weights(), large.weights()[:5], 1e-14)


@given(order=st.integers(1, 60), start=st.floats(-5, 5), length=st.floats(0.01, 100))
def test_weights_are_dual_to_the_basis(order: int, start: float, length: float) -> None:
    features = HippoFeatures(order, start + length, start)
    values = Line(order, start + length, start).basis(features.nodes()[:, 0].numpy()) * length
    close(features.weights() @ torch.from_numpy(values).mT, torch.eye(order), 1e-11)


# Saving and loading


@pytest.mark.parametrize("num_nodes", [None, 37])
def test_state_dict_restores_the_basis_exactly(num_nodes: int | None) -> None:
    features = HippoFeatures(5, math.pi, -1 / 3, num_nodes=num_nodes)
    file = io.BytesIO()
    torch.save(features.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for other in (HippoFeatures(5, 1.0), HippoFeatures(12, 9.0, 3.0), HippoFeatures(5, 1.0, num_nodes=50)):
        other.to(torch.float32).load_state_dict(state)
        assert same_basis(other, features)
        assert (other.num_features, other.start, other.horizon) == (5, -1 / 3, math.pi)
        # What is derived later is derived from the same numbers.
        assert same_basis(other.with_order(20), features.with_order(20))
        assert same_basis(other.with_horizon(7.0), features.with_horizon(7.0))


def test_state_dict_is_a_copy() -> None:
    features = HippoFeatures(5, 1.0)
    state = features.state_dict()
    features.set_extra_state(HippoFeatures(3, 2.0).get_extra_state())
    assert features.num_features == 3
    features.load_state_dict(state)
    assert same_basis(features, HippoFeatures(5, 1.0))


def test_points_round_trip(dtype: torch.dtype) -> None:
    for learn in (False, True):
        points = InducingPoints(torch.randn(3, 4, 2).to(dtype), learn=learn)
        for shape in ((3, 4, 2), (7, 2)):  # a stream may have moved to another number of points
            other = InducingPoints(torch.zeros(shape), learn=learn)
            other.load_state_dict(points.state_dict())
            assert torch.equal(other.nodes(), points.nodes()) and other.num_features == 4
            assert other.nodes().data_ptr() != points.nodes().data_ptr()
            assert isinstance(other.points, torch.nn.Parameter) == learn


def test_deepcopy_is_independent() -> None:
    features = HippoFeatures(5, 1.0)
    copy = deepcopy(features)
    assert same_basis(copy, features)
    copy.set_extra_state(HippoFeatures(8, 3.0).get_extra_state())
    assert same_basis(features, HippoFeatures(5, 1.0))


def test_features_made_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        HippoFeatures(11, 1.0)  # fills caches
    kernel = RBFKernel()
    HippoFeatures(11, 1.0).kuu(kernel).to_dense().sum().backward()
    assert kernel.raw_lengthscale.grad is not None


# Points


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        (torch.arange(3), TypeError, r"points: .*floating.* got torch\.int64"),
        ([0.0, 1.0], TypeError, r"points: .*floating.* got list"),
        (torch.tensor(1.0), ValueError, r"points: .*\(\*batch, M, d\).* got \(\)"),
        (torch.zeros(0), ValueError, r"points: .*got \(0, 1\)"),
        (torch.zeros(3, 0), ValueError, r"points: .*got \(3, 0\)"),
        (torch.tensor([0.0, NAN]), ValueError, r"points: .*finite"),
        (torch.tensor([[0.0], [INF]]), ValueError, r"points: .*finite"),
    ],
)
def test_bad_points_are_named(points: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InducingPoints(points)


def test_points_are_copied() -> None:
    given_points = torch.zeros(3, 1, dtype=F64)
    points = InducingPoints(given_points)
    given_points.fill_(7.0)
    assert not points.nodes().any()
    assert points.num_features == 3 and "(3, 1)" in repr(points)
    assert torch.equal(to_dense(points.weights()), torch.eye(3, dtype=F64))


def test_features_without_a_definition_say_so() -> None:
    for member in (lambda f: f.num_features, lambda f: f.nodes(), lambda f: f.weights()):
        with pytest.raises(NotImplementedError, match="InducingFeatures must define"):
            member(InducingFeatures())


# Probes and reconstruction


@given(num_probes=st.integers(1, 300), start=st.floats(-10, 10), length=st.floats(0.01, 50))
def test_probes_are_midpoints_of_equal_cells(num_probes: int, start: float, length: float) -> None:
    probes = HippoFeatures(2, start + length, start, time_dim=-1, other_inputs=torch.tensor([5.0])).probes(num_probes)
    edges = np.linspace(start, start + length, num_probes + 1)
    assert probes.dtype == F64
    close(probes[:, 1], torch.from_numpy(0.5 * (edges[1:] + edges[:-1])), 1e-12)
    assert (probes[:, 0] == 5.0).all()


def test_default_number_of_probes() -> None:
    assert HippoFeatures(2, 1.0).probes().shape == (256, 1)


@given(
    coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=8),
    start=st.floats(-5, 5),
    length=st.floats(0.1, 20),
    extra=st.integers(0, 5),
)
def test_polynomials_are_reconstructed_exactly(
    coefficients: list[float], start: float, length: float, extra: int
) -> None:
    polynomial = Polynomial(coefficients, domain=[start, start + length])
    features = HippoFeatures(len(coefficients) + extra, start + length, start)
    u = features.weights() @ torch.from_numpy(polynomial(features.nodes()[:, 0].numpy()))
    times = np.linspace(start, start + length, 9)
    picture = features.reconstruct(u, torch.from_numpy(times))
    expected = torch.from_numpy(polynomial(times))
    assert ((picture - expected).abs() <= 1e-11 * (1 + expected.abs().max())).all()


@pytest.mark.parametrize("form", ["inputs", "times"])
@pytest.mark.parametrize("time_dim", [0, 1, 2, -1])
def test_reconstruct_takes_times_or_inputs(time_dim: int, form: str, dtype: torch.dtype) -> None:
    line = Line(6, 2.0, 0.5, time_dim, (1.0, -1.0))
    features = HippoFeatures(6, 2.0, 0.5, time_dim=time_dim, other_inputs=torch.tensor([1.0, -1.0]))
    times = torch.linspace(0.5, 2.0, 5).to(dtype)
    basis = torch.from_numpy(line.basis(times.double().numpy())) * 1.5
    x = times if form == "times" else torch.from_numpy(line.rows(times.double().numpy())).to(dtype)
    for batch in ((), (3,), (3, 1)):
        u = torch.randn(*batch, 6).to(dtype)
        picture = features.reconstruct(u, x)
        assert picture.dtype == F64
        close(picture, u.double() @ basis, 1e-12)


def test_reconstruction_is_the_best_one() -> None:
    """The residual of a function that is no polynomial is orthogonal to the basis."""
    features = HippoFeatures(6, 2.0, 0.5, num_nodes=60)
    f = lambda t: torch.sin(5 * t) + 1 / (1 + t)  # noqa: E731
    u = features.weights() @ f(features.nodes()[:, 0])
    times, weights = oracles.panels([0.5, 2.0], 6)
    residual = f(torch.from_numpy(times)) - features.reconstruct(u, torch.from_numpy(times))
    assert residual.abs().max() > 1e-3
    projections = Line(6, 2.0, 0.5).basis(times) @ (weights * residual.numpy())
    assert np.abs(projections).max() < 1e-12


# Capacity

# Features in units of horizon / lengthscale for a mean residual of 1 % and of 0.1 %: section 6.1 of the specification,
# which allows 1 to 3 modes more at short horizons.
LAW = [
    ("rbf", 1e-2, 1.0, 1.2, (5, 20, 60, 200)),
    ("rbf", 1e-3, 1.3, 1.5, (5, 20, 60, 100, 200)),
    ("matern52", 1e-2, 1.65, 1.75, (10, 40)),
    ("matern52", 1e-3, 2.85, 2.95, (10, 40, 100)),
    ("matern32", 1e-2, 2.35, 2.45, (10, 30)),
    ("matern32", 1e-3, 5.35, 5.45, (10, 30, 50)),
]
KERNELS = {
    "rbf": RBFKernel,
    "matern52": lambda: MaternKernel(2.5),
    "matern32": lambda: MaternKernel(1.5),
}


def residual(features: HippoFeatures, kernel: Kernel) -> float:
    return features.residual_curve(kernel)[-1].item()


@pytest.mark.parametrize(
    ("name", "tolerance", "low", "high", "rho"),
    [(name, tolerance, low, high, rho) for name, tolerance, low, high, rhos in LAW for rho in rhos],
)
def test_capacity_law(name: str, tolerance: float, low: float, high: float, rho: float) -> None:
    kernel = kernel_of(KERNELS[name]())
    needed = HippoFeatures.required(kernel, float(rho), tolerance)
    assert low * rho - 1 <= needed <= high * rho + 3
    # The smallest: enough at M, too few at M - 2 (even and odd orders gain by turns).
    assert residual(HippoFeatures(needed, rho), kernel) <= tolerance
    assert residual(HippoFeatures(needed - 2, rho), kernel) > tolerance


def test_capacity_of_the_roughest_kernel() -> None:
    """25 features a lengthscale hold all but 1 % of a Matern-1/2, if the nodes are many; 0.1 % is out of reach."""
    kernel = kernel_of(MaternKernel(0.5))
    assert residual(HippoFeatures(125, 5.0, num_nodes=1000), kernel) == pytest.approx(0.01, rel=0.05)
    needed = HippoFeatures.required(kernel, 5.0, 1e-2)
    assert 120 <= needed <= 155  # at the default number of nodes
    with pytest.raises(CapacityError, match=r"^100 features leave 1\.\d+% of the prior variance.* 0\.10% was asked"):
        HippoFeatures.required(kernel, 5.0, 1e-3, max_features=100)


def test_working_rules_are_enough() -> None:
    for name, slope in (("rbf", 1.5), ("matern52", 3.0), ("matern32", 5.5)):
        for rho in (3, 10, 30):
            features = HippoFeatures(math.ceil(slope * rho) + 3, float(rho))
            assert residual(features, kernel_of(KERNELS[name]())) <= 1e-3


@settings(max_examples=20)
@given(lengthscale=st.floats(0.1, 10), factor=st.floats(0.01, 100), start=st.floats(-20, 20), scale=st.floats(0.01, 50))
def test_required_knows_only_the_horizon_in_lengthscales(
    lengthscale: float, factor: float, start: float, scale: float
) -> None:
    expected = HippoFeatures.required(kernel_of(RBFKernel(), lengthscale), 10.0)
    moved = ScaleKernel(kernel_of(RBFKernel(), lengthscale * factor)).double()
    moved.outputscale = torch.tensor(scale, dtype=F64)
    found = HippoFeatures.required(moved, start + 10.0 * factor, start=start)
    assert abs(found - expected) <= 1  # rounding may decide a tie


def test_required_takes_any_kernel() -> None:
    rbf = kernel_of(RBFKernel(), 0.5)
    assert HippoFeatures.required(LinearKernel(), 3.0) == 1  # straight lines through the origin
    assert HippoFeatures.required(kernel_of(PeriodicKernel()), 4.0) > 2
    product = rbf * kernel_of(RBFKernel(), 0.5)  # the lengthscale of a product of equals is sqrt(2) shorter
    assert HippoFeatures.required(product, 5.0) == HippoFeatures.required(kernel_of(RBFKernel(), 0.5**1.5), 5.0)
    # Of several columns only time is followed.
    both = RBFKernel(ard_num_dims=2).double()
    both.lengthscale = torch.tensor([0.01, 0.5], dtype=F64)
    found = HippoFeatures.required(both, 5.0, time_dim=1, other_inputs=torch.tensor([2.0]))
    assert found == HippoFeatures.required(rbf, 5.0)
    on_interval = HippoFeatures(3, 5.0, time_dim=-1, other_inputs=torch.tensor([2.0])).required_order(both)
    assert on_interval == found


def test_the_most_demanding_of_a_batch_decides() -> None:
    batch = RBFKernel(batch_shape=torch.Size([3])).double()
    batch.lengthscale = torch.tensor([2.0, 0.3, 1.0], dtype=F64).reshape(3, 1, 1)
    shortest = HippoFeatures.required(kernel_of(RBFKernel(), 0.3), 5.0)
    assert HippoFeatures.required(batch, 5.0) == shortest
    features = HippoFeatures(10, 5.0)
    curves = torch.stack([features.residual_curve(kernel_of(RBFKernel(), l)) for l in (2.0, 0.3, 1.0)])
    close(features.residual_curve(batch), curves.amax(0), 1e-12)


def test_required_counts_noise_against_the_prior() -> None:
    kernel = ScaleKernel(kernel_of(RBFKernel())).double()
    kernel.outputscale = torch.tensor(4.0, dtype=F64)
    plain = HippoFeatures.required(kernel, 20.0)
    assert HippoFeatures.required(kernel, 20.0, noise=4.0) == plain == HippoFeatures.required(kernel, 20.0, noise=40.0)
    assert HippoFeatures.required(kernel, 20.0, noise=0.04) == HippoFeatures.required(kernel, 20.0, tolerance=1e-5)


def test_required_counts_noise_against_each_kernel_of_a_batch() -> None:
    """One stream whose prior is 100 times its noise needs as many features in a batch as it needs alone."""
    batch = ScaleKernel(kernel_of(RBFKernel()), batch_shape=torch.Size([4])).double()
    batch.outputscale = torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=F64)
    alone = ScaleKernel(kernel_of(RBFKernel())).double()
    alone.outputscale = torch.tensor(100.0, dtype=F64)
    assert HippoFeatures.required(batch, 20.0, noise=1.0) == HippoFeatures.required(alone, 20.0, noise=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, r"tolerance: .*positive.* got 0\.0"),
        ({"tolerance": -1.0}, r"tolerance: .*positive.* got -1\.0"),
        ({"tolerance": NAN}, r"tolerance: .*positive.* got nan"),
        ({"max_features": 0}, r"max_features: .*at least 1.* got 0"),
        ({"noise": 0.0}, r"noise: .*positive.* got 0\.0"),
        ({"noise": -1.0}, r"noise: .*positive.* got -1\.0"),
        ({"noise": NAN}, r"noise: .*positive.* got nan"),
        ({"horizon": -1.0}, r"horizon: .*after start"),
    ],
)
def test_required_names_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HippoFeatures.required(RBFKernel(), **({"horizon": 5.0} | arguments))


@pytest.mark.parametrize("make", [RBFKernel, MaternKernel, PeriodicKernel], ids=lambda c: c.__name__)
def test_residual_curve_is_what_the_first_features_leave(make: type[Kernel], dtype: torch.dtype) -> None:
    kernel = ScaleKernel(kernel_of(make(), 0.7)).to(dtype)
    features = HippoFeatures(12, 5.0, 1.0)
    curve = features.residual_curve(kernel)
    exact = deepcopy(kernel).double()
    probes = features.probes()
    kff = exact(probes, diag=True).mean().item()
    kuu, kuf = features.kuu(exact).to_dense().detach().numpy(), features.kuf(exact, probes).detach().numpy()
    kuu += 1e-10 * kuu.diagonal().mean() * np.eye(12)
    expected = [1 - np.mean(np.sum(kuf[:m] * np.linalg.solve(kuu[:m, :m], kuf[:m]), 0)) / kff for m in range(1, 13)]
    assert curve.shape == (12,) and curve.dtype == F64 and not curve.requires_grad
    torch.testing.assert_close(curve, torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-8)
    assert (curve.diff() <= 0).all()
    # It is a property of the features and the kernel, not of anything that is left behind.
    assert torch.equal(curve, features.residual_curve(kernel))
    assert all(parameter.grad is None for parameter in kernel.parameters())


def test_residual_variance_is_relative(dtype: torch.dtype) -> None:
    plain, scaled = RBFKernel().to(dtype), ScaleKernel(RBFKernel()).to(dtype)
    scaled.outputscale = 37.0
    features = HippoFeatures(5, 5.0)
    close(features.residual_curve(scaled), features.residual_curve(plain), 1e-10)
