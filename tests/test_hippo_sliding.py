"""Measures that slide: Laguerre rules, and LegT, LagT and FouT against brute-force integrals and their equations."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from gpseq import hippo

F64 = torch.float64
NAMES = ("legt", "lagt", "fout")

orders = st.integers(1, 40)
ends = st.floats(-50, 50)
windows = st.floats(0.01, 100)


def of(name: str, what: str) -> Callable:
    return getattr(hippo, f"{name}_{what}")


def assert_close(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=tolerance)


def signal(x: np.ndarray) -> np.ndarray:
    return np.sin(2 * x) + 0.5 * np.cos(3 * x)


def functions(name: str, order: int, lag: np.ndarray) -> np.ndarray:
    """The basis at lags in windows, ``(order, n)``."""
    if name == "legt":
        return np.stack([math.sqrt(2 * m + 1) * scipy.special.eval_legendre(m, 1 - 2 * lag) for m in range(order)])
    if name == "lagt":
        return np.stack([scipy.special.eval_laguerre(m, lag) for m in range(order)])
    waves = [np.ones_like(lag)]
    for j in range(1, order // 2 + 1):
        waves += [math.sqrt(2) * np.cos(2 * math.pi * j * lag), math.sqrt(2) * np.sin(2 * math.pi * j * lag)]
    return np.stack(waves[:order])


def integrals(name: str, order: int, signal: Callable, end: float, window: float) -> np.ndarray:
    """Coefficients by Simpson's rule on a fine grid."""
    lag = np.linspace(0, 80 if name == "lagt" else 1, 200_001)
    weight = np.exp(-lag) if name == "lagt" else 1.0
    return scipy.integrate.simpson(functions(name, order, lag) * weight * signal(end - window * lag), x=lag)


def coefficients(name: str, order: int, signal: Callable, end: float, window: float, num_nodes: int) -> Tensor:
    nodes = of(name, "nodes")(num_nodes, end, window)
    return of(name, "weights")(order, num_nodes) @ torch.as_tensor(signal(nodes.numpy()))


# Laguerre polynomials and rules


@given(st.integers(1, 60), st.lists(st.floats(-3, 60), min_size=1, max_size=3))
def test_laguerre_agrees_with_mpmath(order: int, points: list[float]) -> None:
    with mpmath.workdps(60):
        x, rows = np.array([mpmath.mpf(point) for point in points]), [np.array([mpmath.mpf(1)] * len(points))]
        for m in range(order - 1):
            rows.append(((2 * m + 1 - x) * rows[m] - (m * rows[m - 1] if m else 0)) / (m + 1))
        expected = np.array(rows).astype(float)
    # The size that the polynomials have around x; a single one may be close to a zero.
    size = np.maximum(np.abs(expected).max(0), np.exp(np.maximum(points, 0) / 2))
    assert_close(
        hippo.laguerre(order, torch.tensor(points, dtype=F64)) / torch.from_numpy(size), expected / size, 1e-12
    )


@pytest.mark.parametrize("x", [0.0, 1e-3, 1.0, 17.0, 400.0, 1199.0, 1600.0, 2400.0])
def test_laguerre_functions_agree_with_mpmath_where_both_factors_overflow(x: float) -> None:
    ours = hippo.laguerre_functions(621, torch.tensor([[x]], dtype=F64))
    assert ours.shape == (621, 1, 1) and ours.abs().max() <= 1
    with mpmath.workdps(60):
        before, value, half = mpmath.mpf(0), mpmath.mpf(1), mpmath.exp(-mpmath.mpf(x) / 2)
        for m in range(621):
            assert abs(ours[m].item() - float(half * value)) < 1e-12
            before, value = value, ((2 * m + 1 - mpmath.mpf(x)) * value - m * before) / (m + 1)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 10, 30, 100, 180])
def test_gauss_laguerre_agrees_with_numpy_where_that_works(num_nodes: int) -> None:
    nodes, weights = hippo.gauss_laguerre(num_nodes)
    expected, usual = np.polynomial.laguerre.laggauss(num_nodes)
    assert_close(nodes, expected, 1e-12 * num_nodes)
    assert_close(weights * torch.exp(-nodes), usual, 1e-11)  # numpy's error: there is a better oracle below


@pytest.mark.parametrize("num_nodes", [5, 84, 620])
def test_gauss_laguerre_agrees_with_mpmath(num_nodes: int) -> None:
    n = num_nodes
    nodes, weights = hippo.gauss_laguerre(n)
    for index in {0, 1, n // 3, n - 2, n - 1}:
        with mpmath.workdps(50):
            x = mpmath.mpf(nodes[index].item())
            for _ in range(3):
                before, value = mpmath.mpf(0), mpmath.mpf(1)
                for k in range(n):
                    before, value = value, ((2 * k + 1 - x) * value - k * before) / (k + 1)
                x -= value * x / (n * (value - before))
            weight = mpmath.exp(x) * x / (n * before) ** 2
            assert abs(nodes[index] / float(x) - 1) < 1e-14
            assert abs(weights[index] / float(weight) - 1) < 2e-12


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 40, 200, 620, 1300])
def test_gauss_laguerre_is_a_rule(num_nodes: int) -> None:
    nodes, weights = hippo.gauss_laguerre(num_nodes)
    assert nodes.shape == weights.shape == (num_nodes,) and nodes.dtype == weights.dtype == F64
    assert (nodes > 0).all() and (nodes.diff() > 0).all() and (weights > 0).all()
    # Every Q Laguerre functions are orthonormal on Q nodes.
    functions = hippo.laguerre_functions(num_nodes, nodes)
    assert_close((functions * weights) @ functions.mT, np.eye(num_nodes), 1e-12)


def test_nothing_that_is_cached_can_be_changed() -> None:
    for make in (hippo.gauss_laguerre, lambda n: (hippo.lagt_weights(3, n),), lambda n: (hippo.fout_weights(3, n),)):
        before = [tensor.clone() for tensor in make(30)]
        for tensor in make(30):
            tensor.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, make(30), strict=True))


# Bases, nodes and weights


@pytest.mark.parametrize("name", NAMES)
@given(order=orders, end=ends, window=windows, lags=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_bases_are_what_they_are_named_after(
    name: str, order: int, end: float, window: float, lags: list[float]
) -> None:
    lag = np.array(lags) * (20 if name == "lagt" else 1)
    basis = of(name, "basis")(order, torch.from_numpy(end - window * lag), end, window)
    # end - window * lag is rounded; slopes of the basis grow with the order.
    rounding = 1e-15 * (1 + abs(end) / window) * order**2.5
    expected = functions(name, order, lag)
    assert_close(basis, expected, (1e-12 + rounding) * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("name", NAMES)
@given(order=orders, end=ends, window=windows)
def test_weights_are_dual_to_the_basis(name: str, order: int, end: float, window: float) -> None:
    nodes = of(name, "nodes")(2 * order + 20, 0.0, window)
    product = of(name, "weights")(order, 2 * order + 20) @ of(name, "basis")(order, nodes, 0.0, window).mT
    assert_close(product, np.eye(order), 1e-11)
    shifted = of(name, "nodes")(2 * order + 20, end, window)
    assert_close(shifted - end, nodes, 1e-13 * (abs(end) + window * order))
    assert (nodes.diff() > 0).all() and nodes[-1] < 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [1, 2, 7, 8, 30])
def test_coefficients_are_the_integrals(name: str, order: int) -> None:
    window = 0.5 if name == "lagt" else 1.7  # the nodes of lagt lie less dense
    ours = coefficients(name, order, signal, 3.0, window, 2 * order + 40)
    assert_close(ours, integrals(name, order, signal, 3.0, window), 1e-9)


@pytest.mark.parametrize("num_nodes", [3, 30])
def test_legt_is_legs_on_the_window(num_nodes: int) -> None:
    x = torch.linspace(1.0, 3.0, 9, dtype=F64)
    assert_close(hippo.legt_nodes(num_nodes, 3.0, 2.0), hippo.legs_nodes(num_nodes, 1.0, 3.0), 1e-15)
    assert_close(hippo.legt_basis(6, x, 3.0, 2.0), hippo.legs_basis(6, x, 1.0, 3.0), 1e-14)
    assert torch.equal(hippo.legt_weights(3, num_nodes), hippo.legs_weights(3, num_nodes))
    assert torch.equal(hippo.fout_nodes(num_nodes, 3.0, 2.0), hippo.legt_nodes(num_nodes, 3.0, 2.0))


@pytest.mark.parametrize("order", [64, 300])
def test_lagt_weights_are_finite_for_many_modes(order: int) -> None:
    weights = hippo.lagt_weights(order, 2 * order + 20)
    assert weights.isfinite().all() and weights.abs().sum(1).max() <= 1 + 1e-12
    # exp(z s) at lags s has the coefficients (-z)^m / (1 - z)^(m + 1).
    z = -0.3 + 1.5j
    lag = -hippo.lagt_nodes(2 * order + 20, 0.0, 1.0)
    m = torch.arange(order, dtype=F64)
    expected = (-z / (1 - z)) ** m / (1 - z)
    ours = weights.to(torch.complex128) @ torch.exp(z * lag)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    end, window = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (2.0, 0.7))
    x = torch.tensor([1.4, 1.7, 1.95], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: of(name, "basis")(5, *inputs), (x, end, window))
    assert torch.autograd.gradcheck(lambda *inputs: of(name, "nodes")(6, *inputs), (end, window))


@pytest.mark.parametrize("name", NAMES)
def test_any_floating_dtype_and_shape_comes_in(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(0, 1, 6, dtype=dtype).reshape(2, 1, 3)
    basis = of(name, "basis")(4, x, torch.tensor(1.0, dtype=dtype), torch.tensor([2.0], dtype=dtype))
    assert basis.shape == (4, 2, 1, 3) and basis.dtype == F64
    assert_close(basis, of(name, "basis")(4, x.double(), 1.0, 2.0), 1e-15)
    assert of(name, "nodes")(4, torch.tensor(1, dtype=dtype), 2).dtype == F64


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_results_live_where_the_inputs_live(name: str) -> None:
    end, x = torch.tensor(1.0, device="cuda"), torch.rand(5, device="cuda")
    assert of(name, "basis")(3, x, 1.0, 2.0).is_cuda
    assert of(name, "nodes")(3, end, end).is_cuda


# Differential equations


def drift(name: str, order: int) -> float:
    """Error of the equation after two windows that began with the right coefficients."""
    window, begin = 0.5 if name == "lagt" else 2.5, 1.0
    a, b = (matrix.numpy() for matrix in of(name, "transition")(order))
    num_nodes = 2 * order + 60
    state = coefficients(name, order, signal, begin, window, num_nodes).numpy()
    until = begin + 2 * window
    solution = solve_ivp(
        lambda t, c: (a @ c + b * signal(t)) / window, (begin, until), state, method="DOP853", rtol=1e-12, atol=1e-13
    )
    expected = coefficients(name, order, signal, until, window, num_nodes).numpy()
    return np.abs(solution.y[:, -1] - expected).max().item()


@pytest.mark.parametrize("order", [1, 2, 5, 16])
def test_the_equation_of_lagt_is_exact(order: int) -> None:
    assert drift("lagt", order) < 1e-10


def test_the_equations_of_windows_are_as_good_as_their_pictures() -> None:
    """What leaves the window is reconstructed: well by many polynomials, poorly by waves."""
    legt = [drift("legt", order) for order in (4, 8, 16)]
    assert 1e-2 < legt[0] < 1 and legt[1] < 0.1 * legt[0] and legt[2] < 1e-6
    fout = [drift("fout", order) for order in (9, 33)]
    assert 1e-3 < fout[1] < fout[0] < 0.5
    # A wave that fits is carried exactly.
    a, b = hippo.fout_transition(5)
    c = torch.tensor([0.0, 0.0, 0.0, math.sqrt(0.5), 0.0], dtype=F64)  # cos(4 pi s) at s = 0
    change = a @ c + b * 1.0
    assert_close(change, np.array([0.0, 0.0, 0.0, 0.0, 4 * math.pi * math.sqrt(0.5)]), 1e-13)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 9])
def test_transitions_are_the_derivatives_of_the_basis(order: int) -> None:
    """d/dt of the integral: what enters, less what leaves as the basis sees it, and how the basis moves."""
    step = 1e-5
    for name in NAMES:
        a, b = of(name, "transition")(order)
        assert a.shape == (order, order) and b.shape == (order,) and a.dtype == b.dtype == F64
        # The change of the basis itself, expanded in the basis, by central differences.
        nodes = of(name, "nodes")(2 * order + 20, 0.0, 1.0)
        later, sooner = (of(name, "basis")(order + 1, nodes, t, 1.0) for t in (step, -step))
        slope = (later - sooner) / (2 * step)
        expansion = (of(name, "weights")(order + 1, 2 * order + 20) @ slope.mT).mT[:order, :order]
        ends = of(name, "basis")(order, torch.tensor([0.0, -1.0], dtype=F64), 0.0, 1.0)
        now, gone = ends[:, 0], ends[:, 1]
        if name == "lagt":
            expected, enters = expansion - torch.eye(order), now
        elif name == "legt":
            expected, enters = expansion - torch.outer(gone, gone), now
        else:
            expected, enters = expansion - 2 * torch.outer(now, now), 2 * now
        assert_close(a, expected, 1e-5 * order**4)
        assert_close(b, enters, 1e-13)


# What is refused

X = torch.zeros(2)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name: str) -> None:
    basis, nodes, weights, transition = (of(name, what) for what in ("basis", "nodes", "weights", "transition"))
    for call, message in [
        (lambda: basis(0, X, 0.0, 1.0), "order must be a positive integer, got 0"),
        (lambda: basis(2.0, X, 0.0, 1.0), r"order must be a positive integer, got 2\.0"),
        (lambda: basis(2, X, 0.0, 0.0), r"window must be positive, got 0\.0"),
        (lambda: basis(2, X, 0.0, -1.0), r"window must be positive, got -1\.0"),
        (lambda: basis(2, X, 0.0, math.nan), "window must be finite, got nan"),
        (lambda: basis(2, X, math.inf, 1.0), "end must be finite, got inf"),
        (lambda: basis(2, X, torch.zeros(2), 1.0), r"end must be one number, got shape \(2,\)"),
        (lambda: basis(2, X * math.nan, 0.0, 1.0), "x must be finite"),
        (lambda: nodes(0, 0.0, 1.0), "num_nodes must be a positive integer, got 0"),
        (lambda: nodes(3, 0.0, 0.0), "window must be positive"),
        (lambda: weights(0, 3), "order must be"),
        (lambda: weights(3, 0), "num_nodes must be"),
        (lambda: transition(0), "order must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo.laguerre(0, X), "order must be"),
        (lambda: hippo.laguerre(2, X * math.inf), "x must be finite"),
        (lambda: hippo.laguerre_functions(0, X), "order must be"),
        (lambda: hippo.laguerre_functions(2, X - 1), r"x must not be negative, got -1\.0"),
        (lambda: hippo.gauss_laguerre(0), "num_nodes must be"),
    ],
)
def test_bad_input_of_laguerre_is_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
