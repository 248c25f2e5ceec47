"""Transitions and process noises of Matérn state spaces."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.generative.state_space import KERNELS, process_noise, state_dimension, stationary_covariance, transition
from tests.oracles_generative_markov import NU, matern

GAPS = st.floats(min_value=0.0, max_value=20.0)


def double(*values: float) -> torch.Tensor:
    """Numbers as float64."""
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


@pytest.mark.parametrize("kernel", KERNELS)
def test_transition_is_the_exponential_of_the_companion_matrix(kernel: str) -> None:
    """In units of time: the matrix of f, f', f'' whose characteristic polynomial is (s + lambda)^S."""
    S, lengthscale, gap = state_dimension(kernel), 0.7, 0.43
    rate = math.sqrt(2 * NU[kernel]) / lengthscale
    F = torch.diag(torch.ones(S - 1, dtype=torch.float64), 1)
    F[-1] = double(*[-math.comb(S, i) * rate ** (S - i) for i in range(S)])
    units = torch.diag(rate ** torch.arange(S, dtype=torch.float64))
    expected = torch.linalg.inv(units) @ torch.matrix_exp(F * gap) @ units
    torch.testing.assert_close(transition(kernel, double(gap), double(lengthscale)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_covariance_of_two_times_is_the_kernel(kernel: str) -> None:
    """The first entry of A P is k(d)."""
    gaps, lengthscale = torch.linspace(0, 5, 40, dtype=torch.float64), double(0.9)
    found = (transition(kernel, gaps, lengthscale) @ stationary_covariance(kernel))[:, 0, 0]
    torch.testing.assert_close(found, matern(kernel, gaps, double(0.0).view(1), lengthscale)[:, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_noise_keeps_the_process_stationary(kernel: str) -> None:
    """Q = P - A P A', to rounding of the difference."""
    gaps = torch.logspace(-3, 2, 30, dtype=torch.float64)
    A, Q = transition(kernel, gaps, double(1.3)), process_noise(kernel, gaps, double(1.3))
    P = stationary_covariance(kernel)
    torch.testing.assert_close(Q, P - A @ P @ A.mT, rtol=0, atol=2e-15)
    torch.testing.assert_close(Q, Q.mT, rtol=0, atol=0)
    assert torch.linalg.eigvalsh(Q).amin() > -1e-16


@pytest.mark.parametrize("kernel", KERNELS)
def test_noise_over_short_gaps_keeps_its_digits(kernel: str) -> None:
    """Leading term of each diagonal entry, where the difference would have no digit left."""
    S, gap = state_dimension(kernel), 1e-9
    s = math.sqrt(2 * NU[kernel]) * gap
    density = {"matern12": 2.0, "matern32": 4.0, "matern52": 16 / 3}[kernel]
    powers = [S - 1 - i for i in range(S)]
    expected = double(*[density * s ** (2 * k + 1) / (math.factorial(k) ** 2 * (2 * k + 1)) for k in powers])
    found = process_noise(kernel, double(gap), double(1.0)).diagonal()
    torch.testing.assert_close(found, expected.view(S), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@given(one=GAPS, two=GAPS)
def test_two_gaps_are_one(kernel: str, one: float, two: float) -> None:
    """The semigroup: a step over both gaps is a step over each."""
    ell = double(1.1)
    A, Q = transition(kernel, double(two), ell), process_noise(kernel, double(two), ell)
    both = double(one + two)
    torch.testing.assert_close(
        transition(kernel, both, ell), A @ transition(kernel, double(one), ell), rtol=0, atol=1e-13
    )
    expected = A @ process_noise(kernel, double(one), ell) @ A.mT + Q
    torch.testing.assert_close(process_noise(kernel, both, ell), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ends(kernel: str, dtype: torch.dtype) -> None:
    """No gap changes nothing, exactly; after a very long one nothing is left; gradients are numbers at both."""
    S = state_dimension(kernel)
    gap = torch.tensor([0.0, 1e30], dtype=dtype, requires_grad=True)
    lengthscale = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    A, Q = transition(kernel, gap, lengthscale), process_noise(kernel, gap, lengthscale)
    assert A.dtype == Q.dtype == dtype
    assert torch.equal(A[0], torch.eye(S, dtype=dtype)) and not Q[0].any() and not A[1].any()
    torch.testing.assert_close(Q[1], stationary_covariance(kernel, dtype))
    for found in torch.autograd.grad(A.sum() + Q.sum(), (gap, lengthscale)):
        assert found.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients(kernel: str) -> None:
    """Against finite differences."""
    gap = torch.tensor([0.05, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    lengthscale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    for function in (transition, process_noise):
        assert torch.autograd.gradcheck(lambda g, l, f=function: f(kernel, g, l), (gap, lengthscale))


@pytest.mark.parametrize("kernel", KERNELS)
def test_batches(kernel: str) -> None:
    """Gaps of series against lengthscales of latents."""
    gap, lengthscale = torch.rand(3, 1, 5).double(), torch.rand(2, 1).double() + 0.5
    for function in (transition, process_noise):
        found = function(kernel, gap, lengthscale)
        assert found.shape == (3, 2, 5, *stationary_covariance(kernel).shape)
        torch.testing.assert_close(found[2, 1, 4], function(kernel, gap[2, 0, 4], lengthscale[1, 0]))


def test_errors() -> None:
    """Kernels without a state space, and integers."""
    with pytest.raises(ValueError, match="kernel: expected one of matern12, matern32, matern52, got 'rbf'"):
        state_dimension("rbf")
    with pytest.raises(ValueError, match="kernel"):
        stationary_covariance("rbf")
    with pytest.raises(TypeError, match="gap: expected a floating-point tensor"):
        transition("matern32", torch.tensor([1]), torch.tensor(1.0))
    with pytest.raises(TypeError, match="lengthscale: expected a floating-point tensor"):
        process_noise("matern32", torch.tensor([1.0]), torch.tensor(1))
