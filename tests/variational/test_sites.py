"""Updates by sites, against the four-term objective maximised by brute force."""

import itertools
import math

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import LaplaceLikelihood
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from gpseq.features import HippoFeatures
from gpseq.models import ConvergenceWarning, StreamingGP
from gpseq.variational import Prior, online, sites
from gpseq.variational.sites import Convergence, Expectation
from tests import oracles_streaming as oracle
from tests.oracles_sites import LIKELIHOODS, SMOOTH, likelihood_of, maximum, objective, slope, targets
from tests.oracles_streaming import F64, Gaussian, Old, assert_close, draw, functionals, gpytorch_kernel

pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

AT = torch.linspace(-0.5, 8.0, 9, dtype=F64)
COUNTS = ("poisson", "negative binomial")


def expectation_of(name: str, y: Tensor) -> Expectation:
    likelihood = likelihood_of(name)

    def expectation(mean: Tensor, variance: Tensor) -> Tensor:
        return likelihood.expected_log_prob(y, MultivariateNormal(mean, DiagLinearOperator(variance)))

    return expectation


def gaussian(y: Tensor, noise: Tensor) -> Expectation:
    """Analytic, per target."""

    def expectation(mean: Tensor, variance: Tensor) -> Tensor:
        return -0.5 * (torch.log(2 * math.pi * noise) + ((y - mean).square() + variance) / noise)

    return expectation


def fresh(
    order: int = 8, batch: tuple[int, ...] = (), mean: gpytorch.means.Mean | None = None
) -> tuple[online.OnlineState, Prior]:
    lengthscale = torch.linspace(0.9, 1.3, batch[-1], dtype=F64) if batch else 1.1
    prior = Prior(gpytorch_kernel(lengthscale, 1.2, batch_shape=batch), mean)
    with torch.no_grad():
        return online.initial_state(HippoFeatures(order, 6.0), prior), prior


def q_of(model: StreamingGP) -> Gaussian:
    """q(u), the mean included."""
    state = model.state
    m, scale_tril = online.posterior(state)
    root = state.factor @ scale_tril
    return Gaussian(state.factor @ (m + state.whitened_mean), root @ root.mT)


def affine(slope: float, bias: float) -> gpytorch.means.Mean:
    mean = gpytorch.means.LinearMean(1).double()
    mean.initialize(weights=torch.tensor([[slope]], dtype=F64), bias=torch.tensor([bias], dtype=F64))
    return mean


# The maximum of the bound


@pytest.mark.parametrize("with_mean", [False, True], ids=["zero", "mean"])
@pytest.mark.parametrize("name", [*SMOOTH, "student t", "softplus poisson"])
def test_a_stream_of_two_chunks_is_brute_force(name: str, with_mean: bool) -> None:
    """The second chunk passes the horizon, so that the old factor is carried to another basis first.

    Sites reach the maximum within what the float32 quadrature of GPyTorch's likelihoods allows, a slope of 1e-6 in
    units of posterior deviations. The Student t's targets have no outliers; the next tests have.
    """
    likelihood = likelihood_of(name)
    model = StreamingGP(
        HippoFeatures(7, 5.0),
        gpytorch_kernel(1.1, 1.3),
        likelihood,
        affine(0.3, -0.4) if with_mean else None,
        jitter=0.0,
    ).eval()
    kernel, mean = oracle.rbf(1.1, 1.3), (lambda x: 0.3 * x - 0.4) if with_mean else oracle.zero
    old, evidence = None, torch.zeros((), dtype=F64)
    for seed, (start, end) in enumerate([(0.0, 5.0), (4.0, 7.5)]):
        x = draw(15, end, start, seed=seed)[0]
        y = targets(name, x, seed)
        before = model.features.horizon
        model.update(x, y)
        assert model.features.horizon == before or seed == 1
        basis = functionals(model.features)
        prior = basis.prior(kernel, mean)

        def value(q: Gaussian, basis=basis, x=x, y=y, old=old) -> Tensor:
            return objective(kernel, mean, basis, q, (x, y, likelihood), old)

        q, increment = maximum(value, Gaussian(prior.mean, prior.covariance))
        evidence = evidence + increment
        assert model.convergence is not None and model.convergence.all_converged
        oracle.assert_posterior(model, oracle.conditional(kernel, mean, basis, q, oracle.at_points(AT)), AT, 3e-5)
        assert_close(model.log_evidence, evidence, 1e-7)
        for part in slope(value, q_of(model)):
            assert part.abs().max() < 3e-5
        old = Old(basis, q, prior)
    assert model.features.horizon > 5.0


def gap(name: str, x: Tensor, y: Tensor) -> tuple[float, Convergence, tuple[Tensor, Tensor]]:
    """How far below brute force a first update ends, in nats, how it went, and the slope where it ended."""
    likelihood = likelihood_of(name)
    model = StreamingGP(HippoFeatures(7, 5.0), gpytorch_kernel(1.1, 1.3), likelihood, jitter=0.0).eval()
    model.update(x, y)
    basis, kernel = functionals(model.features), oracle.rbf(1.1, 1.3)

    def value(q: Gaussian) -> Tensor:
        return objective(kernel, oracle.zero, basis, q, (x, y, likelihood), None)

    best = maximum(value, q_of(model))[1]
    assert model.convergence is not None
    return (best - model.log_evidence).item(), model.convergence, slope(value, q_of(model))


def test_outliers_of_a_student_t() -> None:
    """The maximum wants sites of negative precision at outliers; without them the bound loses little.

    The update stops where no step raises the bound, a little short of a stationary mean.
    """
    x = torch.linspace(0.2, 4.8, 20, dtype=F64)
    y = targets("student t", x, 3)
    y[[4, 11]] = torch.tensor([9.0, -12.0], dtype=F64)
    short, convergence, (by_mean, by_root) = gap("student t", x, y)
    assert convergence.all_converged
    assert -1e-9 < short < 1e-3
    assert by_mean.abs().max() < 0.01 and by_root.abs().max() < 0.02


@pytest.mark.filterwarnings("ignore::gpseq.models.ConvergenceWarning")
@pytest.mark.parametrize("num", [10, 30])
def test_kinks_of_a_laplace(num: int) -> None:
    """Its expected log likelihood by quadrature has kinks; the bound ends a little below its maximum."""
    x = torch.linspace(0.2, 4.8, num, dtype=F64)
    short, _, _ = gap("laplace", x, targets("laplace", x, 1))
    assert -1e-9 < short < 5e-3


# Gaussian


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("mean", [None, 0.7])
def test_one_full_step_on_gaussian_targets_is_the_closed_form(
    batch: tuple[int, ...], mean: float | None, dtype: torch.dtype
) -> None:
    constant = gpytorch.means.ConstantMean().double()
    constant.constant = mean or 0.0
    state, prior = fresh(batch=batch, mean=constant if mean else None)
    by_sites, closed = state, state
    with torch.no_grad():
        for seed in range(3):
            x, y = (part.to(dtype) for part in draw(12, 6.0, seed=seed))
            noise = 0.05 + torch.rand(12, dtype=F64)
            closed = online.update(closed, prior, x, y, noise)
            by_sites, how = sites.update(by_sites, prior, x, gaussian(y.double(), noise), 12, steps=1, first_step=1.0)
            assert how.steps == 1
            for name, value in closed.items():
                torch.testing.assert_close(getattr(by_sites, name), value, rtol=1e-9, atol=1e-9, msg=name)


@settings(max_examples=15)
@given(num=st.integers(1, 30), size=st.integers(1, 30), seed=st.integers(0, 10**6), halves=st.booleans())
def test_gaussian_chunks_add_up_to_the_batch(num: int, size: int, seed: int, halves: bool) -> None:
    """On one basis: information, shift and evidence, however the steps were taken."""
    state, prior = fresh()
    x, y = draw(num, 6.0, seed=seed)
    noise = torch.full_like(y, 0.3)
    with torch.no_grad():
        chunked = state
        for part in range(0, num, size):
            of = slice(part, part + size)
            chunked, how = sites.update(
                chunked, prior, x[of], gaussian(y[of], noise[of]), len(x[of]), longest_step=0.5 if halves else 1.0
            )
            assert how.all_converged
        whole = online.update(state, prior, x, y, noise)
    tolerance = 1e-5 if halves else 1e-8
    assert_close(chunked.G, whole.G, tolerance)
    assert_close(chunked.r, whole.r, tolerance)
    assert_close(online.log_evidence(chunked), online.log_evidence(whole), 1e-6 if halves else 1e-8)
    assert chunked.count == num


# The running evidence


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_evidence_is_the_bound_at_q(name: str, batch: tuple[int, ...]) -> None:
    """After each of several chunks on one basis, also where steps end early; the increment is the four terms."""
    state, prior = fresh(batch=batch)
    with torch.no_grad():
        for seed, steps in enumerate([None, 1, 3, None]):
            x = draw(9, 6.0, seed=seed)[0]
            expectation = expectation_of(name, targets(name, x, seed))
            new, _ = sites.update(state, prior, x, expectation, 9, steps)
            m, scale_tril = online.posterior(new)
            evidence = online.log_evidence(new)
            assert evidence.shape == batch
            assert_close(sites.bound(state, prior, x, expectation, m, scale_tril), evidence, 1e-9)
            # The increment form has the old evidence where the running one has the constant c.
            offset = state.c - online.log_evidence(state)
            past = sites.past_bound(state, m, scale_tril) - state.c + offset
            A = online.whiten(state, prior, x)
            mean = (A.mT @ m.unsqueeze(-1)).squeeze(-1)
            variance = prior.variance(x) - A.square().sum(-2) + (scale_tril.mT @ A).square().sum(-2)
            increment = expectation(mean, variance).sum(-1) + past
            assert_close(evidence - online.log_evidence(state), increment, 1e-9)
            state = new


@pytest.mark.parametrize("name", SMOOTH)
def test_evidence_of_all_sites_at_once(name: str) -> None:
    """Chunks on one basis leave G, r and c as the sites of all chunks, kept, would."""
    state, prior = fresh()
    first = state
    G, r, logs = state.G, state.r, 0.0
    with torch.no_grad():
        for seed in range(3):
            x = draw(8, 6.0, seed=seed)[0]
            expectation = expectation_of(name, targets(name, x, seed))
            found, _ = sites.find(state, prior, x, expectation)
            A = online.whiten(first, prior, x)
            G, r = G + (A * found.precision) @ A.mT, r + A @ found.shift
            before = state
            state, _ = sites.update(state, prior, x, expectation, 8)
            m, scale_tril = online.posterior(state)
            # What a chunk adds to c: expected log likelihood less that of its sites.
            mean = A.mT @ m
            variance = prior.variance(x) - A.square().sum(-2) + (scale_tril.mT @ A).square().sum(-2)
            explained = (scale_tril.mT @ A).square().sum(-2) + mean.square()
            logs = logs + expectation(mean, variance).sum()
            logs = logs - (found.shift * mean - 0.5 * found.precision * explained).sum()
            assert state.count == before.count + 8
    assert_close(state.G, G, 1e-9)
    assert_close(state.r, r, 1e-9)
    assert_close(state.c, logs, 1e-8)


def test_any_other_q_has_a_lower_bound() -> None:
    state, prior = fresh()
    x = draw(20, 6.0)[0]
    expectation = expectation_of("poisson", targets("poisson", x))
    with torch.no_grad():
        new, _ = sites.update(state, prior, x, expectation, 20)
        m, scale_tril = online.posterior(new)
        best = online.log_evidence(new)
        for size in (1e-3, 1e-2, 0.1):
            for _ in range(5):
                other = sites.bound(state, prior, x, expectation, m + size * torch.randn_like(m), scale_tril)
                assert other < best
                wider = scale_tril @ (torch.eye(8, dtype=F64) + size * torch.randn(8, 8, dtype=F64).tril())
                assert sites.bound(state, prior, x, expectation, m, wider) < best


# Steps


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_bound_never_falls(name: str) -> None:
    """Beyond rounding (1e-8 of it), whatever the number of steps; G has no negative eigenvalue."""
    state, prior = fresh()
    x = torch.linspace(0.0, 6.0, 15, dtype=F64)
    y = targets(name, x, 5)
    if name in ("student t", "laplace"):
        y[[3, 9]] = torch.tensor([15.0, -40.0], dtype=F64)
    expectation = expectation_of(name, y)
    with torch.no_grad():
        values = [sites.bound(state, prior, x, expectation, *online.posterior(state))]
        for steps in range(1, 16):
            new, how = sites.update(state, prior, x, expectation, 15, steps)
            assert how.steps == steps or (how.steps < steps and how.all_converged)
            values.append(online.log_evidence(new))
            assert torch.linalg.eigvalsh(new.G).min() > -1e-12 * torch.linalg.matrix_norm(new.G)
            assert torch.equal(new.G, new.G.mT)
    for before, after in itertools.pairwise(values):
        assert after >= before - sites.ROUNDING * (1 + before.abs())
    assert values[-1] > values[0]


@pytest.mark.parametrize(
    ("name", "level"),
    [("poisson", 3000.0), ("poisson", 0.0), ("poisson", 1e6), ("softplus poisson", 0.0), ("softplus poisson", 3000.0),
     ("negative binomial", 3000.0), ("negative binomial", 0.0), ("bernoulli", 0.0), ("bernoulli", 1.0),
     ("beta", 1e-6), ("beta", 1 - 1e-6), ("student t", 100.0)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["all", "one", "alternating"])
def test_extreme_targets_converge(name: str, level: float, kind: str) -> None:
    """All of them, a single one, or every other against a prior with mean zero."""
    state, prior = fresh()
    x = torch.linspace(0.0, 6.0, 20, dtype=F64)
    y = torch.full_like(x, 0.5 if name == "beta" else 1.0)
    chosen = {"all": slice(None), "one": slice(7, 8), "alternating": slice(0, None, 2)}[kind]
    y[chosen] = level
    with torch.no_grad():
        new, how = sites.update(state, prior, x, expectation_of(name, y), 20)
    assert how.all_converged and how.steps < sites.MOST_STEPS
    for value in (new.G, new.r, new.c):
        assert value.isfinite().all()
    m, scale_tril = online.posterior(new)
    m, scale_tril = m.requires_grad_(), scale_tril.requires_grad_()
    value = sites.bound(state, prior, x, expectation_of(name, y), m, scale_tril)
    (by_mean,) = torch.autograd.grad(value, m)
    # In standard deviations. A Beta likelihood is not log-concave and stops a little short, as a Student t does.
    assert (scale_tril.detach().mT @ by_mean).abs().max() < (5e-3 if name == "beta" else 1e-3)


@pytest.mark.parametrize("order", [4, 8, 14])
def test_separable_labels_converge(order: int) -> None:
    state, prior = fresh(order)
    x = torch.linspace(0.0, 6.0, 40, dtype=F64)
    with torch.no_grad():
        new, how = sites.update(state, prior, x, expectation_of("bernoulli", (x > 3).double()), 40)
    assert how.all_converged
    assert new.r.isfinite().all() and online.log_evidence(new) > 40 * math.log(0.5)


def test_steps_end_at_convergence_or_at_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    state, prior = fresh()
    x = draw(10, 6.0)[0]
    expectation = expectation_of("poisson", targets("poisson", x))
    _, how = sites.update(state, prior, x, expectation, 10)
    assert how.all_converged and 3 < how.steps < 20 and how.movement < sites.TOLERANCE
    _, early = sites.update(state, prior, x, expectation, 10, 2)
    assert early.steps == 2 and not early.all_converged
    monkeypatch.setattr(sites, "MOST_STEPS", 3)
    _, few = sites.update(state, prior, x, expectation, 10)
    assert few.steps == 3 and not few.all_converged and few.movement > sites.TOLERANCE


def test_shorter_steps_take_longer_and_end_in_the_same_place() -> None:
    state, prior = fresh()
    x = draw(10, 6.0)[0]
    expectation = expectation_of("poisson", targets("poisson", x))
    results = [sites.update(state, prior, x, expectation, 10, None, min(0.5, s), s) for s in (1.0, 0.5, 0.25)]
    numbers = [how.steps for _, how in results]
    assert numbers == sorted(numbers) and numbers[0] < numbers[2]
    for new, how in results:
        assert how.all_converged
        assert_close(online.log_evidence(new), online.log_evidence(results[0][0]), 1e-8)
    assert [how.step_size.item() for _, how in results] == [1.0, 0.5, 0.25]


def test_the_length_of_the_last_step_is_reported() -> None:
    state, prior = fresh()
    x = draw(10, 6.0)[0]
    expectation = expectation_of("poisson", targets("poisson", x))
    _, how = sites.update(state, prior, x, expectation, 10, steps=1, first_step=0.5)
    assert how.step_size == 0.5


def test_targets_without_a_finite_bound_are_refused() -> None:
    state, prior = fresh()
    x = draw(4, 6.0)[0]
    with pytest.raises(ValueError, match=r"^y: the expected log likelihood .* is not finite"):
        sites.update(state, prior, x, expectation_of("student t", torch.full_like(x, 1e200)), 4)


# Batches


@settings(max_examples=10)
@given(name=st.sampled_from(SMOOTH), seed=st.integers(0, 10**6), own_targets=st.booleans(), own_inputs=st.booleans())
def test_a_batch_is_a_loop(name: str, seed: int, own_targets: bool, own_inputs: bool) -> None:
    state, prior = fresh(batch=(3,))
    x = torch.stack([draw(8, 6.0, seed=seed + (i if own_inputs else 0))[0] for i in range(3)])
    y = torch.stack([targets(name, x[0], seed + (i if own_targets else 0)) for i in range(3)])
    inputs = x.unsqueeze(-1) if own_inputs else x[0]
    with torch.no_grad():
        new, how = sites.update(state, prior, inputs, expectation_of(name, y if own_targets else y[0]), 8)
        assert how.converged.shape == how.movement.shape == how.step_size.shape == (3,)
        for i, lengthscale in enumerate((0.9, 1.1, 1.3)):
            alone = Prior(gpytorch_kernel(lengthscale, 1.2))
            start = online.initial_state(HippoFeatures(8, 6.0), alone)
            single, _ = sites.update(start, alone, x[i], expectation_of(name, y[i]), 8)
            assert_close(new.G[i], single.G, 3e-5)
            assert_close(new.r[i], single.r, 3e-5)
            assert_close(online.log_evidence(new)[i], online.log_evidence(single), 1e-7)


@pytest.mark.parametrize("steps", [1, 3, None])
def test_targets_may_have_a_batch_of_their_own(steps: int | None) -> None:
    state, prior = fresh()
    x = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    y = torch.tensor([[0.0, 0.0, 0.0], [40.0, 1.0, 3.0], [3.0, 300.0, 20.0], [1.0, 1.0, 1.0]], dtype=F64)
    with torch.no_grad():
        new, _ = sites.update(state, prior, x, expectation_of("poisson", y), 3, steps)
        for i in range(4):
            single, _ = sites.update(state, prior, x, expectation_of("poisson", y[i]), 3, steps)
            assert_close(new.r[i], single.r, 1e-5)
            assert_close(online.log_evidence(new)[i], online.log_evidence(single), 1e-6)


def test_a_likelihood_with_kinks_says_when_it_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamingGP(HippoFeatures(8, 5.0), gpytorch_kernel(), LaplaceLikelihood()).eval()
    monkeypatch.setattr(sites, "MOST_STEPS", 5)
    x = torch.linspace(0, 4, 30, dtype=F64)
    with pytest.warns(ConvergenceWarning, match=r"^y: the update has not converged after 5 steps"):
        model.update(x, x.sin())
