"""The LegS memory: three routes to the same numbers, held against one another and against oracles."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq import hippo
from tests import oracles_hippo

F64 = torch.float64


def rbf(lengthscale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: torch.exp(-0.5 * ((a[:, None] - b) / lengthscale) ** 2)


def bump(t: Tensor) -> Tensor:
    """The signal of the error table: an RBF kernel, lengthscale 0.2, seen from x = 0.3."""
    return torch.exp(-0.5 * ((t - 0.3) / 0.2) ** 2)


def quadrature_kuu(order: int, kernel: Callable, start: float, horizon: float, num_nodes: int = 200) -> Tensor:
    nodes, weights = hippo.legs_nodes(num_nodes, start, horizon), hippo.legs_weights(order, num_nodes)
    return weights @ kernel(nodes, nodes) @ weights.mT


def coefficients(signal: Callable, order: int, horizon: float = 1.0, num_nodes: int = 300) -> Tensor:
    values = signal(hippo.legs_nodes(num_nodes, 0.0, horizon))
    return torch.tensordot(hippo.legs_weights(order, num_nodes), values.to(F64), dims=1)


def uniform(num_steps: int) -> Tensor:
    return torch.linspace(0, 1, num_steps + 1, dtype=F64)[1:]


def irregular(num_steps: int, seed: int = 0) -> Tensor:
    """Ends of steps on (0, 1] whose lengths differ by a factor of a hundred."""
    draws = torch.rand(num_steps, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return torch.cumsum(torch.softmax(4.6 * draws, 0), 0)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Polynomials, nodes and weights


@given(st.integers(1, 300), st.lists(st.floats(-1, 1), min_size=1, max_size=3))
def test_legendre_agrees_with_mpmath(order: int, points: list[float]) -> None:
    expected = torch.tensor([oracles_hippo.legendre(order, x) for x in points], dtype=F64).mT
    assert_close(hippo.legendre(order, torch.tensor(points, dtype=F64)), expected, 1e-12)


def test_legendre_at_the_ends_and_shapes(dtype: torch.dtype) -> None:
    p = hippo.legendre(256, torch.tensor([[1.0, -1.0]], dtype=dtype))
    assert p.shape == (256, 1, 2) and p.dtype == F64
    assert_close(p[:, 0, 0], torch.ones(256, dtype=F64), 1e-12)
    assert_close(p[:, 0, 1], (-1.0) ** torch.arange(256, dtype=F64), 1e-12)
    assert hippo.legendre(1, torch.zeros(())).shape == (1,)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 20, 127, 2000])
def test_gauss_legendre_agrees_with_mpmath(num_nodes: int) -> None:
    nodes, weights = hippo.gauss_legendre(num_nodes)
    assert (nodes.diff() > 0).all() and (weights > 0).all()
    assert torch.equal(nodes, -nodes.flip(0)) and torch.equal(weights, weights.flip(0))
    for index in {0, 1 % num_nodes, num_nodes // 3, num_nodes - 1}:
        node, weight = oracles_hippo.legendre_rule(num_nodes, nodes[index].item())
        assert abs(nodes[index] - node) < 1e-15
        assert abs(weights[index] - weight) < 1e-15
        assert abs(weights[index] / weight - 1) < 2e-14


@given(st.integers(1, 60))
def test_gauss_legendre_integrates_polynomials(num_nodes: int) -> None:
    nodes, weights = hippo.gauss_legendre(num_nodes)
    integrals = hippo.legendre(2 * num_nodes, nodes) @ weights  # P_0 to P_{2Q-1}: only P_0 has an integral
    assert_close(integrals, 2.0 * torch.eye(2 * num_nodes, dtype=F64)[0], 1e-14)


def test_what_is_cached_is_out_of_reach() -> None:
    for tensor in (*hippo.gauss_legendre(7), hippo.legs_weights(3, 7)):
        tensor.fill_(math.nan)
    assert hippo.gauss_legendre(7)[1].sum() == pytest.approx(2)
    assert hippo.legs_weights(3, 7)[0].sum() == pytest.approx(1)


@given(st.integers(1, 80), st.integers(0, 20), st.floats(-100, 100), st.floats(1e-3, 1e3))
def test_weights_are_dual_to_the_basis(order: int, extra: int, start: float, length: float) -> None:
    nodes = hippo.legs_nodes(order + extra, start, start + length)
    assert ((nodes > start) & (nodes < start + length)).all()
    product = hippo.legs_weights(order, order + extra) @ hippo.legs_basis(order, nodes, start, start + length).mT
    # 100 + 1e-3 is known to 1e-14 only, which is 1e-11 of the interval; slopes of the basis grow like order^2.
    assert_close(product, torch.eye(order, dtype=F64), 1e-12 + 1e-17 * (1 + abs(start) / length) * order**3)


def test_gradients_of_quadrature() -> None:
    start, horizon, lengthscale = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.5, 2.0, 0.7))

    def kuu(start: Tensor, horizon: Tensor, lengthscale: Tensor) -> Tensor:
        nodes, weights = hippo.legs_nodes(12, start, horizon), hippo.legs_weights(3, 12)
        return weights @ rbf(lengthscale)(nodes, nodes) @ weights.mT

    assert torch.autograd.gradcheck(kuu, (start, horizon, lengthscale))
    x = torch.tensor([0.6, 1.0, 1.9], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: hippo.legs_basis(4, *inputs), (x, start, horizon))


# Covariances


def test_reference_values() -> None:
    kuu = quadrature_kuu(4, rbf(0.2), 0.0, 1.0)
    diagonal = [0.421325665646880, 0.274125617945720, 0.159181736244597, 0.0824326832376415]
    expected = torch.diag(torch.tensor(diagonal, dtype=F64))
    expected[0, 2] = expected[2, 0] = -0.0729872895760103
    expected[1, 3] = expected[3, 1] = -0.0737193747529253
    assert_close(kuu, expected, 1e-14)
    assert_close(kuu, oracles_hippo.rbf_kuu(4, "0.2"), 1e-14)
    kfu = torch.tensor([0.467716868070901, -0.279361693821559, -0.143227871161927, 0.169837014739713], dtype=F64)
    assert_close(coefficients(bump, 4), kfu, 1e-14)


@pytest.mark.parametrize("lengthscale", ["0.1", "0.2", "1.5"])
def test_routes_agree_with_the_closed_form(lengthscale: str) -> None:
    expected = oracles_hippo.rbf_kuu(12, lengthscale)
    frequency, weights = hippo.rbf_spectral_quadrature(float(lengthscale), 1.0)
    spectral = hippo.spectral_kuu(hippo.legs_fourier(12, frequency, 0.0, 1.0), weights)
    assert_close(quadrature_kuu(12, rbf(float(lengthscale)), 0.0, 1.0), expected, 1e-14)
    assert_close(spectral, expected, 1e-14)


@settings(max_examples=15)
@given(st.floats(0.05, 30), st.integers(1, 40), st.floats(-5, 5), st.floats(0.1, 10))
def test_quadrature_equals_bessel_equals_recurrence(rho: float, order: int, start: float, length: float) -> None:
    horizon, lengthscale = start + length, length / rho
    nodes, weights = hippo.legs_nodes(150, start, horizon), hippo.legs_weights(order, 150)
    x = torch.linspace(start - length / 2, horizon + length / 2, 9, dtype=F64)
    longer = hippo.legs_nodes(200, start, horizon + length / 2)
    kernel = rbf(lengthscale)

    frequency, spectrum = hippo.rbf_spectral_quadrature(lengthscale, 2 * length)
    z = hippo.legs_fourier(order, frequency, start, horizon)
    z_longer = hippo.legs_fourier(order, frequency, start, horizon + length / 2)
    kuf = weights @ kernel(nodes, x)
    assert_close(hippo.spectral_kuu(z, spectrum), weights @ kernel(nodes, nodes) @ weights.mT, 1e-11)
    assert_close(hippo.spectral_kuf(z, frequency, spectrum, x), kuf, 1e-11)
    cross = weights @ kernel(nodes, longer) @ hippo.legs_weights(order, 200).mT
    assert_close(hippo.spectral_cross(z, z_longer, spectrum), cross, 1e-11)

    recurrence = hippo.legs_recurrence(lambda t: kernel(t + start, x), length * irregular(6), order, num_nodes=80)
    assert_close(recurrence, kuf, 1e-12)


@settings(max_examples=15)
@given(st.floats(0.1, 40), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_structure_of_stationary_kernels(rho: float, length: float, start: float) -> None:
    order = 8
    kuu = quadrature_kuu(order, rbf(1 / rho), 0.0, 1.0)
    # Scaling and shift; where the shift is large against the interval, its last digits are lost.
    shifted = quadrature_kuu(order, rbf(length / rho), start, start + length)
    assert_close(shifted, kuu, 1e-12 + 1e-14 * rho * abs(start) / length)
    parity = torch.arange(order)[:, None] + torch.arange(order)
    assert (kuu[parity % 2 == 1].abs() < 1e-12).all()
    x = torch.linspace(0, 1, 7, dtype=F64)
    nodes, weights = hippo.legs_nodes(200, 0.0, 1.0), hippo.legs_weights(order, 200)
    kuf = weights @ rbf(1 / rho)(nodes, x)
    assert_close(kuf.flip(1), (-1.0) ** torch.arange(order, dtype=F64)[:, None] * kuf, 1e-12)
    first = math.sqrt(math.pi / 2) / rho * math.erf(rho / math.sqrt(2)) + math.expm1(-(rho**2) / 2) / rho**2
    assert_close(kuu[0, 0], torch.tensor(2 * first, dtype=F64), 1e-12)


def test_mean_of_a_kinked_kernel() -> None:
    kuu = quadrature_kuu(1, lambda a, b: torch.exp(-(a[:, None] - b).abs() / 0.2), 0.0, 1.0, num_nodes=400)
    assert kuu.item() == pytest.approx(2 * (0.2 - 0.2**2 * (1 - math.exp(-5))), abs=1e-5)


# The recurrence


@pytest.mark.parametrize("order", [1, 4, 50])
def test_exact_recurrence_equals_quadrature_for_irregular_steps(order: int) -> None:
    assert_close(hippo.legs_recurrence(bump, irregular(40), order), coefficients(bump, order), 1e-13)


def test_recurrence_carries_any_shape_in_any_dtype(dtype: torch.dtype) -> None:
    def signal(t: Tensor) -> Tensor:
        return torch.stack([bump(t), t, t**2, torch.ones_like(t)], -1).reshape(-1, 2, 2).to(dtype)

    for scheme in ("exact", "exact-held", "zoh", "midpoint", "bilinear", "backward"):
        result = hippo.legs_recurrence(signal, uniform(100).to(dtype), 3, scheme)
        assert result.shape == (3, 2, 2) and result.dtype == F64
        assert_close(result, coefficients(signal, 3), 1e-5 if scheme == "exact" else 0.05)


@pytest.mark.parametrize(
    ("scheme", "rate"),
    [("zoh", 2), ("midpoint", 2), ("exact-held", 1), ("bilinear", 1), ("backward", 1), ("euler", 1)],
)
@pytest.mark.filterwarnings("ignore:An Euler step")
def test_order_of_convergence(scheme: str, rate: int) -> None:
    # Halving every step of an irregular grid.
    coarse = torch.cat([torch.zeros(1, dtype=F64), irregular(60)])
    errors = []
    for _ in range(3):
        coarse = torch.cat([coarse, coarse[:-1] + coarse.diff() / 2]).sort().values
        errors.append((hippo.legs_recurrence(bump, coarse[1:], 4, scheme) - coefficients(bump, 4)).abs().max())
    for worse, better in pairwise(errors):
        assert math.log2(worse / better) == pytest.approx(rate, abs=0.2)


@pytest.mark.parametrize(
    ("order", "scheme", "errors"),
    [
        (4, "euler", {50: 2.2e-2, 200: 5.4e-3, 800: 1.3e-3}),
        (4, "backward", {50: 2.1e-2, 200: 5.5e-3, 800: 1.4e-3}),
        (4, "bilinear", {50: 1.1e-2, 200: 2.7e-3, 800: 6.7e-4}),
        (4, "midpoint", {50: 2.5e-4, 200: 1.6e-5, 800: 9.7e-7}),
        (4, "zoh", {50: 3.6e-4, 200: 2.3e-5, 800: 1.4e-6}),
        (20, "backward", {50: 2.2e-2, 200: 7.3e-3}),
        (20, "bilinear", {50: 1.3e-2, 200: 4.2e-3}),
        (20, "midpoint", {50: 3.2e-4, 200: 2.0e-5}),
        (20, "zoh", {50: 3.9e-4, 200: 3.1e-5}),
        (50, "euler", {100: 1.1e-2, 200: 5.4e-3}),
        (50, "midpoint", {50: 3.2e-4, 200: 2.0e-5}),
    ],
)
@pytest.mark.filterwarnings("ignore:An Euler step")
def test_error_table(order: int, scheme: str, errors: dict[int, float]) -> None:
    expected = coefficients(bump, order)
    for num_steps, error in errors.items():
        result = hippo.legs_recurrence(bump, uniform(num_steps), order, scheme)
        assert (result - expected).abs().max().item() == pytest.approx(error, rel=0.2)


def test_euler_needs_many_steps_and_says_so() -> None:
    with pytest.warns(UserWarning, match="Euler step"):
        result = hippo.legs_recurrence(bump, uniform(50), 50, "euler")
    assert result.abs().max() > 1e6
    hippo.legs_step(torch.zeros(4), 9.0, 10.0, torch.tensor(1.0), "euler")  # late enough: no warning


@pytest.mark.parametrize("scheme", ["euler", "backward", "bilinear", "midpoint"])
@pytest.mark.filterwarnings("ignore:An Euler step")
def test_steps_reduce_to_the_published_formulas(scheme: str) -> None:
    n, order = 5, 6
    a, b = hippo.legs_transition(order)
    eye, state, value = torch.eye(order, dtype=F64), torch.randn(order, dtype=F64), torch.tensor(0.7, dtype=F64)
    divisor = n - 0.5 if scheme == "midpoint" else n
    left = {"euler": eye, "backward": eye - a / n}.get(scheme, eye - a / (2 * divisor))
    right = {"euler": eye + a / n, "backward": eye}.get(scheme, eye + a / (2 * divisor))
    expected = torch.linalg.solve(left, right @ state + b / divisor * value)
    # The length of the steps cancels.
    assert_close(hippo.legs_step(state, 0.3 * (n - 1), 0.3 * n, value, scheme), expected, 1e-13)


def test_held_input_is_the_exponential_integrator() -> None:
    order, t1, t2 = 8, 0.7, 1.1
    a, b = hippo.legs_transition(order)
    propagator = torch.linalg.matrix_exp(a * math.log(t2 / t1))
    held = torch.linalg.solve(a, (propagator - torch.eye(order, dtype=F64)) @ b)
    state = torch.randn(order, 3, dtype=F64)
    value = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    for scheme in ("zoh", "exact-held"):
        step = hippo.legs_step(state, t1, t2, value, scheme)
        assert_close(step, propagator @ state + torch.outer(held, value), 1e-13)
    exact = hippo.legs_step(state, t1, t2, value.expand(order, 3), "exact")
    assert_close(exact, step, 1e-13)
    # Nothing of an earlier state is left when a cell begins at 0.
    assert_close(hippo.legs_step(state, 0.0, t2, value)[0], value, 1e-15)
    assert_close(hippo.legs_step(state, 0.0, t2, value)[1:], torch.zeros(order - 1, 3, dtype=F64), 1e-15)


@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 2**31))
def test_cell_weights_equal_the_recurrence(order: int, cells: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = torch.cumsum(torch.rand(cells, dtype=F64, generator=generator) + 1e-3, 0)
    edges = torch.cat([torch.zeros(1, dtype=F64), times])
    values = torch.randn(cells, 2, dtype=F64, generator=generator)
    state = torch.zeros(order, 2, dtype=F64)
    for n in range(cells):
        state = hippo.legs_step(state, edges[n], edges[n + 1], values[n])
    assert_close(hippo.legs_cell_weights(order, edges) @ values, state, 1e-12)
    # In two chunks.
    half = cells // 2
    if half:
        early = hippo.legs_cell_weights(order, edges[: half + 1]) @ values[:half]
        carried = hippo.legs_reprojection(order, edges[half], edges[-1]) @ early
        assert_close(carried + hippo.legs_cell_weights(order, edges[half:]) @ values[half:], state, 1e-12)


@pytest.mark.parametrize(("cells", "defect"), [(60, 3.8e-2), (600, 3.8e-4)])
def test_cell_weights_become_orthonormal(cells: int, defect: float) -> None:
    phi = hippo.legs_cell_weights(8, torch.linspace(0, 1, cells + 1, dtype=F64))
    gram = cells * phi @ phi.mT
    assert (gram - torch.eye(8, dtype=F64)).abs().max().item() == pytest.approx(defect, rel=0.1)
    assert torch.linalg.eigvalsh(gram)[-1] <= 1 + 1e-12


# The propagator


@pytest.mark.parametrize("order", [1, 5, 20])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.99])
def test_reprojection_is_the_matrix_exponential(order: int, ratio: float) -> None:
    a, _ = hippo.legs_transition(order)
    expected = torch.linalg.matrix_exp(a * math.log(1 / ratio))
    assert_close(hippo.legs_reprojection(order, 3 * ratio, 3.0), expected, 1e-12)


@given(st.integers(1, 100), st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_reprojection_is_a_contraction_and_a_semigroup(order: int, times: list[float]) -> None:
    t1, t2, t3 = sorted(times)
    first, second = hippo.legs_reprojection(order, t1, t2), hippo.legs_reprojection(order, t2, t3)
    assert torch.linalg.matrix_norm(first, 2) <= math.sqrt(t1 / t2) + 1e-12
    assert_close(second @ first, hippo.legs_reprojection(order, t1, t3), 1e-12)


def test_reprojection_at_its_limits() -> None:
    assert torch.equal(hippo.legs_reprojection(3, 0.0, 1.0), torch.zeros(3, 3, dtype=F64))
    assert_close(hippo.legs_reprojection(60, 2.0, 2.0), torch.eye(60, dtype=F64), 1e-13)
    # A function on [0, t1] extended by zero, expanded on [0, t2].
    t1, t2 = 0.4, 1.0
    c = torch.randn(5, dtype=F64)
    nodes = hippo.legs_nodes(20, 0.0, t1)
    integrand = hippo.legs_basis(5, nodes, 0.0, t2) * (c @ hippo.legs_basis(5, nodes, 0.0, t1))
    assert_close(hippo.legs_reprojection(5, t1, t2) @ c, t1 / t2 * integrand @ hippo.legs_weights(1, 20)[0], 1e-14)


def test_gradients_of_a_step() -> None:
    state, values = torch.randn(3, dtype=F64, requires_grad=True), torch.randn((), dtype=F64, requires_grad=True)
    times = [torch.tensor(t, dtype=F64, requires_grad=True) for t in (0.5, 0.8)]
    for scheme in ("exact-held", "bilinear"):
        assert torch.autograd.gradcheck(lambda *inputs, s=scheme: hippo.legs_step(*inputs, s), (state, *times, values))


def test_direct_equation_converges_to_kuu_with_b_and_not_with_ones() -> None:
    expected = oracles_hippo.rbf_kuu(4, "0.2")
    assert_close(hippo.legs_kuu_ode(rbf(0.2), 4, 1.0, num_steps=60), expected, 1e-10)
    for num_steps in (20, 60):
        wrong = hippo.legs_kuu_ode(rbf(0.2), 4, 1.0, num_steps=num_steps, boundary=torch.ones(4))
        assert (wrong - expected).abs().max().item() == pytest.approx(8.8e-2, rel=0.01)


# Frequencies


@pytest.mark.parametrize("order", [1, 2, 3, 20, 256])
def test_spherical_bessel_agrees_with_scipy(order: int) -> None:
    near = torch.tensor([0.0, 1e-5, 9.9e-5, 1.01e-4, order - 1e-9, order, order + 1e-9], dtype=F64)
    x = torch.cat([near, torch.logspace(-12, 4, 300, dtype=F64), torch.linspace(0, 400, 401, dtype=F64)])
    expected = torch.as_tensor(scipy.special.spherical_jn(torch.arange(order)[:, None].numpy(), x.numpy()))
    j = hippo.spherical_bessel(order, x)
    assert_close(j, expected, 3e-15)
    signs = (-1.0) ** torch.arange(order, dtype=F64)[:, None]
    assert torch.equal(hippo.spherical_bessel(order, -x), signs * j)
    assert hippo.spherical_bessel(order, x[:6].reshape(2, 3)).shape == (order, 2, 3)


@pytest.mark.parametrize("order", [2, 20, 256])
def test_spherical_bessel_keeps_relative_accuracy_in_its_tails(order: int) -> None:
    for x in (1e-5, 1.1e-4, 1.0, order - 0.5, order + 0.5, 1000.0, 1e4):
        j = hippo.spherical_bessel(order, torch.tensor(x, dtype=F64))
        for m in {0, 1, order // 2, order - 1}:
            expected = oracles_hippo.spherical_jn(m, x)
            tail = abs(expected) < 1e-3 and x < m
            assert j[m].item() == pytest.approx(expected, rel=1e-12 if tail else 0, abs=0 if tail else 3e-15)


@given(st.integers(1, 300), st.floats(-500, 500))
def test_spherical_bessel_sum_rule(order: int, x: float) -> None:
    j = hippo.spherical_bessel(order + 600, torch.tensor(x, dtype=F64))
    n = torch.arange(len(j), dtype=F64)
    assert ((2 * n + 1) * j**2).sum().item() == pytest.approx(1, abs=1e-12)


def test_spherical_bessel_gradients() -> None:
    x = torch.tensor([-7.0, -0.3, -5e-5, 0.0, 5e-5, 2.0, 4.999, 5.001, 40.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hippo.spherical_bessel(5, x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: hippo.spherical_bessel(5, x), (x,))


@given(st.integers(1, 30), st.floats(-40, 40), st.floats(-3, 3), st.floats(0.1, 5))
def test_fourier_transform_of_the_basis(order: int, frequency: float, start: float, length: float) -> None:
    z = hippo.legs_fourier(order, torch.tensor([frequency], dtype=F64), start, start + length)[:, 0]
    nodes = hippo.legs_nodes(200, start, start + length)
    expected = hippo.legs_weights(order, 200).to(torch.complex128) @ torch.exp(1j * frequency * nodes)
    assert z.dtype == torch.complex128
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)


def test_gradients_of_the_spectral_route() -> None:
    start, horizon, lengthscale = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.5, 2.0, 0.7))
    x = torch.tensor([0.1, 1.0], dtype=F64, requires_grad=True)

    def both(start: Tensor, horizon: Tensor, lengthscale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        frequency, weights = hippo.rbf_spectral_quadrature(lengthscale, 3.0)
        z = hippo.legs_fourier(3, frequency, start, horizon)
        return hippo.spectral_kuu(z, weights), hippo.spectral_kuf(z, frequency, weights, x)

    assert torch.autograd.gradcheck(both, (start, horizon, lengthscale, x))


@given(st.floats(0.05, 20), st.floats(0, 50))
def test_spectral_quadrature_is_the_kernel(lengthscale: float, span: float) -> None:
    frequency, weights = hippo.rbf_spectral_quadrature(lengthscale, span)
    assert len(frequency) == len(weights) >= 30 + 2.5 * span / lengthscale
    assert (frequency > 0).all() and weights.sum().item() == pytest.approx(1, abs=1e-13)
    r = torch.linspace(0, span, 20, dtype=F64)
    kernel = torch.cos(r[:, None] * frequency) @ weights
    assert_close(kernel, torch.exp(-0.5 * (r / lengthscale) ** 2), 1e-10)


@pytest.mark.cuda
def test_results_live_where_the_inputs_live() -> None:
    horizon, x = torch.tensor(1.0, device="cuda"), torch.rand(5, device="cuda")
    frequency, weights = hippo.rbf_spectral_quadrature(torch.tensor(0.2, device="cuda"), 1.0)
    z = hippo.legs_fourier(3, frequency, 0.0, horizon)
    results = [
        hippo.legs_nodes(4, 0.0, horizon),
        hippo.legs_nodes(4, horizon, 2.0),
        hippo.legs_basis(3, x, 0.0, 1.0),
        hippo.legs_reprojection(3, horizon / 2, horizon),
        hippo.legs_cell_weights(3, x.sort().values),
        hippo.spectral_kuf(z, frequency, weights, x),
        *(hippo.legs_recurrence(bump, x.sort().values, 3, scheme) for scheme in ("exact", "zoh", "midpoint")),
        hippo.legs_step(x, 1.0, 1.1, x[0]),
    ]
    assert all(result.is_cuda for result in results)


# What is refused

NODES = torch.linspace(0.1, 1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo.legendre(0, NODES), "order must be a positive integer, got 0"),
        (lambda: hippo.legendre(2.0, NODES), "order must be a positive integer, got 2.0"),
        (lambda: hippo.legendre(2, torch.tensor([math.nan])), "x must be finite"),
        (lambda: hippo.gauss_legendre(0), "num_nodes must be a positive integer, got 0"),
        (lambda: hippo.legs_weights(0, 3), "order must be"),
        (lambda: hippo.legs_weights(3, -1), "num_nodes must be"),
        (lambda: hippo.legs_nodes(3, 1.0, 1.0), "horizon must be greater than start, got start 1.0 and horizon 1.0"),
        (lambda: hippo.legs_nodes(3, 0.0, math.inf), "horizon must be finite, got inf"),
        (lambda: hippo.legs_nodes(3, torch.zeros(2), 1.0), r"start must be one number, got shape \(2,\)"),
        (lambda: hippo.legs_basis(3, NODES, 2.0, 1.0), "horizon must be greater"),
        (lambda: hippo.legs_transition(0), "order must be"),
        (lambda: hippo.legs_reprojection(3, 2.0, 1.0), "t1 and t2 must satisfy"),
        (lambda: hippo.legs_reprojection(3, 0.0, 0.0), "t1 and t2 must satisfy"),
        (lambda: hippo.legs_reprojection(3, -1.0, 1.0), "t1 and t2 must satisfy"),
        (lambda: hippo.legs_cell_weights(3, torch.ones(1)), r"edges must be 1-D with at least two .* shape \(1,\)"),
        (lambda: hippo.legs_cell_weights(3, torch.tensor([0.0, 2.0, 2.0])), "edges must increase from 0 or later"),
        (lambda: hippo.legs_cell_weights(3, torch.tensor([-1.0, 2.0])), "edges must increase from 0 or later"),
        (lambda: hippo.legs_step(torch.zeros(3), 1.0, 1.0, torch.ones(())), r"\(t1, t2\) must increase"),
        (
            lambda: hippo.legs_step(torch.zeros(3), 1.0, 2.0, torch.ones(()), "rk4"),
            "scheme must be one of .* got 'rk4'",
        ),
        (lambda: hippo.legs_step(torch.zeros(3, 2), 1.0, 2.0, torch.ones(3)), r"values must have shape \(2,\)"),
        (
            lambda: hippo.legs_step(torch.zeros(3), 1.0, 2.0, torch.ones(()), "exact"),
            r"values must have shape \('K',\)",
        ),
        (lambda: hippo.legs_step(torch.zeros(3), 1.0, 2.0, torch.tensor(math.nan)), "values must be finite"),
        (lambda: hippo.legs_recurrence(bump, torch.tensor([0.0, 1.0]), 3), r"\(0, \*times\) must increase"),
        (lambda: hippo.legs_recurrence(bump, torch.tensor([]), 3), r"\(0, \*times\) must be 1-D with at least two"),
        (lambda: hippo.legs_recurrence(bump, NODES, 0), "order must be"),
        (lambda: hippo.legs_recurrence(bump, NODES, 3, "rk4"), "scheme must be one of"),
        (lambda: hippo.legs_recurrence(bump, NODES, 3, num_nodes=0), "num_nodes must be"),
        (lambda: hippo.legs_kuu_ode(rbf(1.0), 3, -1.0), "horizon must be greater"),
        (lambda: hippo.legs_kuu_ode(rbf(1.0), 3, 1.0, num_steps=0), "num_steps must be"),
        (lambda: hippo.spherical_bessel(0, NODES), "order must be"),
        (lambda: hippo.spherical_bessel(3, torch.tensor([math.inf])), "x must be finite"),
        (lambda: hippo.legs_fourier(3, NODES, 1.0, 0.0), "horizon must be greater"),
        (lambda: hippo.rbf_spectral_quadrature(0.0, 1.0), "lengthscale must be positive, got 0.0"),
        (lambda: hippo.rbf_spectral_quadrature(1.0, -1.0), "span must not be negative, got -1.0"),
        (lambda: hippo.rbf_spectral_quadrature(1.0, 1.0, num_nodes=0), "num_nodes must be"),
    ],
)
def test_bad_input_is_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
