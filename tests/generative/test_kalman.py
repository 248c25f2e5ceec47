"""Filter, smoother and draws on chains of small states."""

import pytest
import torch
from torch import Tensor

from gpseq.generative.kalman import (
    METHODS,
    chain_draw,
    chain_marginals,
    kalman_filter,
    posterior_chain,
    prior_chain,
    rts_smoother,
)
from gpseq.generative.small_matrices import congruence, invert, lower_root, multiply
from gpseq.generative.state_space import KERNELS, process_noise, stationary_covariance, transition
from tests.oracles_generative_markov import Dense, matern


def chain(kernel: str, times: Tensor, lengthscale: Tensor) -> tuple[Tensor, Tensor]:
    """Transitions and noises of sorted times ``(*b, n)``."""
    P = stationary_covariance(kernel).expand(*times.shape[:-1], 1, -1, -1)
    A, Q = (f(kernel, times.diff(), lengthscale) for f in (transition, process_noise))
    return torch.cat([torch.zeros_like(P), A], -3), torch.cat([P, Q], -3)


def data(n: int, *batch: int, shortest: float = 1e-9) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted irregular times with a repeat and a short gap, values, and precisions of which some are zero."""
    times = (torch.rand(*batch, n, dtype=torch.float64) * n / 8).sort(-1).values
    if n > 4:
        times[..., 3] = times[..., 2]
        times[..., 4] = times[..., 2] + shortest
    precisions = 10 ** (3 * torch.rand(*batch, n, dtype=torch.float64))
    precisions[..., 1::5] = 0
    return times, torch.randn(*batch, n, dtype=torch.float64), precisions


ONE = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_parallel_is_sequential(kernel: str, batch: tuple[int, ...]) -> None:
    """For every length up to a few rounds of the scan, in values and gradients."""
    for n in (1, 2, 3, 4, 5, 8, 13, 16, 33):
        # Over shorter gaps, rounding chooses between roots of the tiny covariance from which derivatives are drawn.
        times, y, w = data(n, *batch, shortest=1e-4)
        lengthscale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        A, Q = chain(kernel, times, lengthscale)
        found = []
        for method in METHODS:
            filtered = kalman_filter(A, Q, y, w, method)
            smoothed = rts_smoother(A, Q, filtered, method)
            draws = chain_draw(posterior_chain(A, Q, filtered), y.unsqueeze(-1).expand(A.shape[:-1]), method)
            values = (*vars(filtered).values(), *smoothed, draws)
            assert values[0].shape == (*batch, n, A.shape[-1]) and values[4].shape == batch
            (gradient,) = torch.autograd.grad(sum(v.square().sum() for v in values), lengthscale, retain_graph=True)
            found.append((*values, gradient))
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", METHODS)
def test_long_series(kernel: str, method: str) -> None:
    """Two thousand steps leave no drift: the two methods agree, and covariances stay symmetric and positive."""
    times, y, w = data(2000 if method == "parallel" else 500)
    A, Q = chain(kernel, times, ONE)
    filtered = kalman_filter(A, Q, y, w, method)
    mean, covariance = rts_smoother(A, Q, filtered, method)
    assert mean.isfinite().all()
    torch.testing.assert_close(covariance, covariance.mT, rtol=0, atol=1e-12)
    assert (torch.linalg.eigvalsh(covariance) > -1e-12).all()
    observed = w > 0
    window = slice(200, 260)
    near = (times > times[200] - 12) & (times < times[260] + 12)
    dense = Dense(kernel, times[near & observed], y[near & observed], 1 / w[near & observed], ONE)
    expected, spread = dense.predict(times[window])
    torch.testing.assert_close(mean[window, 0], expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(covariance[window, 0, 0], spread.diagonal(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", METHODS)
def test_draws_have_the_joint_covariance(kernel: str, method: str) -> None:
    """Exactly, with unit vectors in place of normal numbers: the map from them to the path is a root of it."""
    times, y, w = data(17)
    A, Q = chain(kernel, times, ONE)
    S, observed = A.shape[-1], w > 0
    units = torch.eye(17 * S, dtype=torch.float64).reshape(17 * S, 17, S)
    posterior = posterior_chain(A, Q, kalman_filter(A, Q, y, w, method))
    dense = Dense(kernel, times[observed], y[observed], 1 / w[observed], ONE)
    expectations = dense.predict(times)
    prior = torch.zeros(17, dtype=torch.float64), matern(kernel, times, times, ONE)
    for steps, (mean, covariance) in ((posterior, expectations), (prior_chain(A, Q), prior)):
        centre = chain_draw(steps, torch.zeros(17, S, dtype=torch.float64), method)[..., 0]
        root = chain_draw(steps, units, method)[..., 0] - centre
        torch.testing.assert_close(centre, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(root.mT @ root, covariance, rtol=0, atol=1e-10)
        assert torch.equal(root[:, 2], root[:, 3])  # the same time, the same value


@pytest.mark.parametrize("method", METHODS)
def test_prior_marginals_are_stationary(method: str) -> None:
    """Before any observation."""
    A, Q = chain("matern52", data(20)[0], ONE)
    mean, covariance = chain_marginals(prior_chain(A, Q), method)
    assert not mean.any()
    torch.testing.assert_close(covariance, stationary_covariance("matern52").expand(20, 3, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", METHODS)
def test_almost_exact_observations(kernel: str, method: str) -> None:
    """Variances of f far below rounding keep their digits, over a gap of zero and one of 1e-9."""
    times, _, _ = data(40)
    y = times.sin()
    for variance in (1e-12, 1e-30):
        w = torch.full((40,), 1 / variance, dtype=torch.float64)
        A, Q = chain(kernel, times, ONE)
        filtered = kalman_filter(A, Q, y, w, method)
        P = filtered.covariance[:2, 0, 0]
        torch.testing.assert_close(P, torch.full_like(P, variance), rtol=1e-3, atol=0)
        mean, covariance = rts_smoother(A, Q, filtered, method)
        assert mean.isfinite().all() and (covariance[:, 0, 0] > 0).all()
        assert variance < 1e-20 or (covariance.diagonal(dim1=-2, dim2=-1) > 0).all()  # derivatives of f, too
        torch.testing.assert_close(mean[:, 0], y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients(kernel: str, method: str) -> None:
    """Of everything by everything, against finite differences."""
    times, y, w = data(4)

    def outputs(lengthscale: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        A, Q = chain(kernel, times, lengthscale)
        filtered = kalman_filter(A, Q, y, w, method)
        return (filtered.log_evidence, *rts_smoother(A, Q, filtered, method))

    inputs = [value.clone().requires_grad_() for value in (ONE, y, w.clamp_min(0.5))]
    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-4)


def test_small_matrices() -> None:
    """Against the batched algebra of torch."""
    for size in (1, 2, 3):
        a, b = torch.randn(2, 7, size, size, dtype=torch.float64)
        first = [m.movedim((-2, -1), (0, 1)) for m in (a, b, a @ a.mT)]
        for found, expected in (
            (multiply(first[0], first[1]), a @ b),
            (invert(first[0]), torch.linalg.inv(a)),
            (congruence(first[0], first[2], first[1]), a @ (a @ a.mT) @ a.mT + b),
            (lower_root(first[2]), torch.linalg.cholesky(a @ a.mT)),
        ):
            torch.testing.assert_close(found.movedim((0, 1), (-2, -1)), expected, rtol=1e-7, atol=1e-9)
    zero = torch.zeros(3, 3, 2, dtype=torch.float64, requires_grad=True)
    root = lower_root(zero)
    assert not root.any() and torch.autograd.grad(root.sum(), zero)[0].isfinite().all()


def test_errors() -> None:
    """Unknown methods, and states that are too large."""
    times, y, w = data(3)
    A, Q = chain("matern12", times, ONE)
    filtered = kalman_filter(A, Q, y, w)
    steps = posterior_chain(A, Q, filtered)
    for call in (
        lambda: kalman_filter(A, Q, y, w, "fast"),
        lambda: rts_smoother(A, Q, filtered, "fast"),
        lambda: chain_draw(steps, y.unsqueeze(-1), "fast"),
    ):
        with pytest.raises(ValueError, match="method: expected one of sequential, parallel, got 'fast'"):
            call()
    with pytest.raises(ValueError, match="matrix: expected at most 3 rows, got 4"):
        invert(torch.eye(4))
