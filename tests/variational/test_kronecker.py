"""The pure functions of a belief over space and time, against the same belief with dense matrices."""

from __future__ import annotations

from dataclasses import replace

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import HippoFeatures, InducingPoints
from gpseq.variational import Prior, kronecker, online
from gpseq.variational.kronecker import KroneckerInformation, KroneckerState, SeparableKernel, SpaceTimePrior
from gpseq.variational.kronecker_posterior import (
    DensePosterior,
    GridCovariance,
    ProductPosterior,
    log_evidence,
    posterior,
)
from gpseq.variational.lazy import Float64Kernel
from tests.oracles_streaming import F64, assert_close


def semidefinite(num: int, size: int, rank: int) -> Tensor:
    root = torch.randn(num, size, rank, dtype=F64)
    return root @ root.mT


def information(rows: int, columns: int, terms: int, rest: bool = False) -> KroneckerInformation:
    size = rows * columns
    return KroneckerInformation(
        temporal=semidefinite(terms, rows, max(1, rows - 1)),
        spatial=semidefinite(terms, columns, max(1, columns - 1)),
        weights=torch.rand(terms, 3, dtype=F64),
        rest=semidefinite(1, size, 2)[0] if rest else torch.zeros(0, 0, dtype=F64),
        r=torch.randn(rows, columns, dtype=F64),
        c=torch.randn((), dtype=F64),
        count=torch.tensor(7),
        sensors=torch.rand(3, 2, dtype=F64),
        whitened_mean=torch.zeros(rows, columns, dtype=F64),
        mean_parameters=torch.zeros(0, dtype=F64),
    )


def summed(value: KroneckerInformation) -> Tensor:
    """G, entry by entry."""
    total = sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(value.temporal, value.spatial, strict=True))
    size = value.r.numel()
    total = torch.zeros(size, size, dtype=F64) + total
    return total + value.rest if value.rest.numel() else total


def matern(lengthscale: float) -> Kernel:
    kernel = MaternKernel(1.5).double()
    kernel.lengthscale = lengthscale
    return kernel


def prior_with(time: float = 1.0, space: float = 1.0, mean: float | None = None) -> SpaceTimePrior:
    module = None
    if mean is not None:
        module = gpytorch.means.ConstantMean().double()
        module.initialize(constant=mean)
    return SpaceTimePrior(Prior(matern(time)), Prior(matern(space)), module)


def state_on(prior: SpaceTimePrior, rows: int, columns: int, terms: int, rest: bool = False) -> KroneckerState:
    times, places = torch.linspace(0, 3, rows, dtype=F64), torch.rand(columns, 2, dtype=F64) * 3
    time = online.initial_state(InducingPoints(times), prior.time, 0.0)
    space = online.initial_state(InducingPoints(places), prior.space, 0.0)
    empty = kronecker.initial_state(time, space, prior, torch.rand(3, 2, dtype=F64))
    full = replace(
        information(rows, columns, terms, rest),
        whitened_mean=empty.information.whitened_mean,
        mean_parameters=empty.information.mean_parameters,
        sensors=empty.information.sensors,
    )
    return KroneckerState(time, space, full)


sizes = st.integers(1, 5)


# G as a sum of products


@given(rows=sizes, columns=sizes, terms=st.integers(0, 4), rest=st.booleans(), seed=st.integers(0, 10**6))
def test_the_sum_of_products(rows: int, columns: int, terms: int, rest: bool, seed: int) -> None:
    torch.manual_seed(seed)
    value = information(rows, columns, terms, rest)
    G, v = summed(value), torch.randn(rows, columns, dtype=F64)
    assert value.num_terms == terms
    assert_close(value.dense(), G, 1e-12)
    assert_close(value.times(v), (G @ v.reshape(-1)).reshape(v.shape), 1e-12)


# Posteriors


@given(rows=sizes, columns=sizes, terms=st.integers(0, 3), rest=st.booleans(), seed=st.integers(0, 10**6))
def test_posterior_and_evidence_are_those_of_the_dense_matrix(
    rows: int, columns: int, terms: int, rest: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    state = state_on(prior_with(), rows, columns, terms, rest)
    value, belief = state.information, posterior(state)
    assert isinstance(belief, ProductPosterior) == (terms <= 1 and not rest)
    P = torch.eye(rows * columns, dtype=F64) + summed(value)
    r = value.r.reshape(-1)
    mean = torch.linalg.solve(P, r)
    assert_close(belief.mean.reshape(-1), mean, 1e-9)
    assert_close(belief.log_det, P.logdet(), 1e-9)
    assert_close(log_evidence(state, belief), value.c - 0.5 * P.logdet() + 0.5 * r @ mean, 1e-9)

    A_t, A_s = torch.randn(rows, 4, dtype=F64), torch.randn(columns, 3, dtype=F64)
    A = torch.kron(A_t, A_s)
    spread = A.mT @ torch.linalg.solve(P, A)
    assert_close(belief.variance_on(A_t, A_s).reshape(-1), spread.diagonal(), 1e-9)
    assert_close(belief.change_on(A_t, A_s).to_dense(), spread - A.mT @ A, 1e-9)
    assert_close(belief.mean_on(A_t, A_s).reshape(-1), A.mT @ mean, 1e-9)
    B_t, B_s = A_t[:, [0, 2, 2, 3, 1]], A_s[:, [1, 1, 0, 2, 2]]
    at = torch.tensor([1, 7, 6, 11, 5])
    assert_close(belief.change_at(B_t, B_s).to_dense(), (spread - A.mT @ A)[at][:, at], 1e-9)
    assert_close(belief.mean_at(B_t, B_s), (A.mT @ mean)[at], 1e-9)


@given(seed=st.integers(0, 10**6), rows=sizes, columns=sizes)
def test_one_term_written_as_two_is_the_same_belief(seed: int, rows: int, columns: int) -> None:
    torch.manual_seed(seed)
    one = state_on(prior_with(), rows, columns, 1)
    value = one.information
    halves = replace(
        value,
        temporal=torch.cat([0.25 * value.temporal, 0.75 * value.temporal]),
        spatial=value.spatial.repeat(2, 1, 1),
        weights=value.weights.repeat(2, 1),
    )
    two = replace(one, information=halves)
    a, b = posterior(one), posterior(two)
    assert isinstance(a, ProductPosterior) and isinstance(b, DensePosterior)
    A_t, A_s = torch.randn(rows, 6, dtype=F64), torch.randn(columns, 2, dtype=F64)
    assert_close(a.mean, b.mean, 1e-10)
    assert_close(a.variance_on(A_t, A_s), b.variance_on(A_t, A_s), 1e-10)
    assert_close(a.change_on(A_t, A_s).to_dense(), b.change_on(A_t, A_s).to_dense(), 1e-10)
    assert_close(log_evidence(one, a), log_evidence(two, b), 1e-10)


def test_variances_of_many_columns_are_solved_for_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    belief = posterior(state_on(prior_with(), 3, 3, 2))
    A_t, A_s = torch.randn(3, 7, dtype=F64), torch.randn(3, 5, dtype=F64)
    expected = belief.variance_on(A_t, A_s)
    for at_once in (1, 11):
        monkeypatch.setattr("gpseq.variational.kronecker_posterior._SOLVED_AT_ONCE", at_once)
        assert_close(belief.variance_on(A_t, A_s), expected, 1e-13)


def test_a_precision_that_rounding_made_indefinite_keeps_the_prior_where_nothing_is_known() -> None:
    """Noise of 1e-30 through features of low rank; P has eigenvalues 1 that float64 cannot see beside 1e30."""
    state = state_on(prior_with(), 4, 3, 0)
    root, others = torch.randn(2, 4, 1, dtype=F64), torch.randn(2, 3, 2, dtype=F64)
    truth = torch.randn(12, dtype=F64)
    value = replace(
        state.information,
        temporal=root @ root.mT,
        spatial=1e30 * others @ others.mT,
        weights=torch.rand(2, 3, dtype=F64),
    )
    value = replace(value, r=(summed(value) @ truth).reshape(4, 3))
    belief = posterior(replace(state, information=value))
    known = torch.cat([torch.kron(root[j], others[j]) for j in range(2)], dim=1)
    basis = torch.linalg.qr(known).Q
    projector = basis @ basis.mT
    assert_close(belief.mean.reshape(-1), projector @ truth, 1e-6)
    variance = belief.variance_on(torch.eye(4, dtype=F64), torch.eye(3, dtype=F64)).reshape(-1)
    assert_close(variance, 1 - projector.diagonal(), 1e-6)


# Updates


def spill_free(state: KroneckerState) -> KroneckerState:
    value = state.information
    return replace(
        state,
        information=replace(
            value, temporal=value.temporal[:0], spatial=value.spatial[:0], weights=value.weights[:0], rest=value.dense()
        ),
    )


@given(
    seed=st.integers(0, 10**6), chunk=st.integers(1, 9), columns=st.integers(1, 3), mean=st.sampled_from([None, 0.5])
)
def test_an_update_adds_what_dense_rows_add(seed: int, chunk: int, columns: int, mean: float | None) -> None:
    """In any chunks; the oracle takes each reading by itself."""
    torch.manual_seed(seed)
    prior = prior_with(mean=mean)
    empty = state_on(prior, 4, columns, 0)
    empty = replace(empty, information=replace(empty.information, r=torch.zeros(4, columns, dtype=F64)))
    times, y = torch.rand(9, 1, dtype=F64) * 3, torch.randn(9, 3, dtype=F64)
    weights = torch.tensor([0.0, 1.0, 4.0], dtype=F64)[torch.randint(0, 3, (9, 3))]
    y[weights == 0] = torch.nan
    state = empty
    for rows in torch.randperm(9).split(chunk):
        state = kronecker.update(state, prior, times[rows], y[rows], weights[rows])

    A = torch.kron(
        online.whiten(empty.time, prior.time, times), online.whiten(empty.space, prior.space, empty.information.sensors)
    )
    flat, targets = weights.reshape(-1), (y - (mean or 0.0)).nan_to_num().reshape(-1)
    G = (A * flat) @ A.mT
    assert_close(state.information.dense(), G, 1e-10)
    assert_close(state.information.r.reshape(-1), A @ (flat * targets), 1e-10)
    residual = (flat * (1 - A.square().sum(0))).sum()
    logs = torch.where(flat > 0, 2 * torch.pi / flat, 1.0).log().sum()
    c = empty.information.c - 0.5 * (logs + (flat * targets.square()).sum() + residual)
    assert_close(state.information.c, c, 1e-10)
    assert state.information.count == 7 + (weights > 0).sum()
    limit = (4 * columns) ** 2
    terms = state.information.num_terms
    assert terms <= max(1, limit // (16 + columns**2))
    assert state.information.rest.numel() in (0, limit)


def test_equal_patterns_share_a_term_and_silent_rows_make_none() -> None:
    prior = prior_with()
    state = state_on(prior, 5, 4, 0)
    times, y = torch.rand(4, 1, dtype=F64), torch.randn(4, 3, dtype=F64)
    weights = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=F64)
    state = kronecker.update(state, prior, times, y, weights)
    assert state.information.num_terms == 2
    state = kronecker.update(state, prior, times, y, weights)
    assert state.information.num_terms == 2
    before = state
    state = kronecker.update(state, prior, times, y, torch.zeros_like(weights))
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(before.information.items(), state.information.items(), strict=True)
    )
    assert kronecker.update(state, prior, times[:0], y[:0], weights[:0]).information.num_terms == 2
    state = kronecker.declare(state, torch.rand(2, 2, dtype=F64))
    assert state.information.weights.shape == (2, 5)
    more = torch.cat([weights, torch.zeros(4, 2, dtype=F64)], dim=1)
    state = kronecker.update(state, prior, times, torch.randn(4, 5, dtype=F64), more)
    assert state.information.num_terms == 2  # declared but silent: the same set of sensors


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_spilling_changes_nothing_but_the_form(columns: int) -> None:
    prior = prior_with()
    one = state_on(prior, 5, columns, 3)
    other = spill_free(one)
    times, y, weights = torch.rand(6, 1, dtype=F64), torch.randn(6, 3, dtype=F64), torch.rand(6, 3, dtype=F64)
    time = online.initial_state(HippoFeatures(4, 4.0), prior.time, 0.0)
    results = []
    for state in (one, other):
        state = kronecker.update(state, prior, times, y, weights)
        state = kronecker.transfer(state, time, state.space, prior)
        results.append((state.information.dense(), state.information.c, posterior(state).mean))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-9)


def test_a_value_is_not_changed_by_what_follows() -> None:
    prior = prior_with()
    state = state_on(prior, 4, 3, 2)
    kept = {name: tensor.clone() for name, tensor in state.information.items()}
    data = torch.rand(2, 1, dtype=F64), torch.randn(2, 3, dtype=F64), state.information.weights[:2].clone()
    kronecker.transfer(kronecker.update(state, prior, *data), state.time, state.space, prior)
    kronecker.declare(state, torch.rand(1, 2, dtype=F64))
    assert all(torch.equal(getattr(state.information, name), value) for name, value in kept.items())


# Transfers


@given(
    seed=st.integers(0, 10**6),
    terms=st.integers(0, 3),
    rest=st.booleans(),
    order=st.integers(1, 6),
    moves=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=20)
def test_transfer_is_the_dense_formula(
    seed: int, terms: int, rest: bool, order: int, moves: tuple[bool, bool, bool]
) -> None:
    """Another basis of time, other hyperparameters of time, of space, and another mean."""
    torch.manual_seed(seed)
    change_time, change_space, change_mean = moves
    old_prior = prior_with(mean=0.25)
    state = state_on(old_prior, 4, 3, terms, rest)
    prior = prior_with(0.8 if change_time else 1.0, 1.3 if change_space else 1.0, 0.75 if change_mean else 0.25)
    time = online.initial_state(HippoFeatures(order, 4.0), prior.time, 0.0)
    space = state.space
    if change_space:
        space = online.initial_state(InducingPoints(state.space.nodes), prior.space, 0.0)
    new = kronecker.transfer(state, time, space, prior)

    B_t, C_t = online.bridge(state.time, time, prior.time)
    B_s, C_s = online.bridge(state.space, space, prior.space)
    assert (C_t is not None) == change_time and (C_s is not None) == change_space
    B = torch.kron(B_t.contiguous(), B_s.contiguous() if change_space else torch.eye(3, dtype=F64))
    C = torch.kron(
        *(
            eye if C is None else C.contiguous()
            for C, eye in ((C_t, torch.eye(4, dtype=F64)), (C_s, torch.eye(3, dtype=F64)))
        )
    )
    G, r = summed(state.information), state.information.r.reshape(-1)
    shift = torch.full((12,), 0.5 if change_mean else 0.0, dtype=F64)
    d = torch.kron(state.time.whitened_weights, state.space.whitened_weights) @ shift
    c = state.information.c + r @ d - 0.5 * d @ G @ d
    moved = B @ G @ B.mT
    assert_close(new.information.dense(), moved, 1e-9)
    assert_close(new.information.r.reshape(-1), B @ (r - G @ d), 1e-9)
    assert_close(new.information.c, c - 0.5 * ((G * C).sum() - moved.trace()), 1e-9)
    assert new.information.weights.isnan().all() == (change_space or terms == 0) or new.information.num_terms == 0
    assert torch.equal(new.information.count, state.information.count)


def test_where_nothing_moves_a_transfer_is_the_identity_bit_for_bit() -> None:
    """A factor contains jitter; a thousand passes through it would wear the information down."""
    prior = prior_with(mean=0.3)
    state = state_on(prior, 4, 3, 2)
    new = kronecker.transfer(state, state.time, state.space, prior)
    for name, value in state.information.items():
        assert torch.equal(getattr(new.information, name), value), name


# What can be said of size


def test_information_beyond_float64_is_noticed() -> None:
    value = information(2, 2, 1)
    assert kronecker.is_finite(value)
    huge = 1e200 * torch.eye(2, dtype=F64).unsqueeze(0)
    assert not kronecker.is_finite(replace(value, temporal=huge, spatial=huge))
    assert not kronecker.is_finite(replace(value, r=value.r * torch.inf))
    assert not kronecker.is_finite(replace(value, c=value.c * torch.nan))


# The product kernel and the covariance of a grid


def test_the_separable_kernel_is_the_product() -> None:
    kernel = SeparableKernel(matern(0.7), ScaleKernel(RBFKernel(ard_num_dims=2)).double())
    a, b = torch.rand(5, 3, dtype=F64), torch.rand(4, 3, dtype=F64)
    for x1, x2 in ((a, b), (a, a)):
        expected = kernel.time(x1[:, :1], x2[:, :1]).to_dense() * kernel.space(x1[:, 1:], x2[:, 1:]).to_dense()
        assert_close(kernel(x1, x2).to_dense(), expected, 1e-13)
    lazy = Float64Kernel(kernel)(a)
    assert_close(lazy.diagonal(), lazy.to_dense().diagonal(), 1e-13)
    assert_close(lazy[:2, 1:4].to_dense(), lazy.to_dense()[:2, 1:4], 1e-13)


def grid_covariance(variance: bool) -> tuple[GridCovariance, Tensor]:
    time, space = (torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q for n in (3, 2))
    from linear_operator import to_linear_operator
    from linear_operator.operators import DiagLinearOperator, KroneckerProductLinearOperator

    K_t, K_s = (q @ torch.diag(torch.rand(len(q), dtype=F64) + 1) @ q.mT for q in (time, space))
    before = KroneckerProductLinearOperator(to_linear_operator(K_t), to_linear_operator(K_s))
    change = DiagLinearOperator(-0.5 * torch.rand(6, dtype=F64))
    dense = torch.kron(K_t.contiguous(), K_s.contiguous()) + change.to_dense()
    known = dense.diagonal().clone() if variance else None
    return GridCovariance(before, change, variance=known), dense


# Slices of Kronecker products are interpolations inside, with sparse tensors.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("variance", [True, False])
def test_the_covariance_of_a_grid_as_a_linear_operator(variance: bool) -> None:
    operator, dense = grid_covariance(variance)
    v = torch.randn(6, 2, dtype=F64)
    assert operator.shape == (6, 6)
    assert_close(operator.to_dense(), dense, 1e-13)
    assert_close(operator.diagonal(), dense.diagonal(), 1e-13)
    assert_close(operator @ v, dense @ v, 1e-13)
    assert_close(operator.mT.to_dense(), dense.mT, 1e-13)
    assert_close(operator[1:4, 2:].to_dense(), dense[1:4, 2:], 1e-13)
    assert_close(operator[2], dense[2], 1e-13)
    assert_close(operator.add_jitter(0.5).to_dense(), dense + 0.5 * torch.eye(6, dtype=F64), 1e-13)
    assert_close(operator.add_diagonal(torch.full((6,), 0.5, dtype=F64)).diagonal(), dense.diagonal() + 0.5, 1e-13)
    assert_close((2.0 * operator).diagonal(), 2 * dense.diagonal(), 1e-13)
    expanded = operator.expand(4, 6, 6)
    assert expanded.shape == (4, 6, 6)
    assert_close(expanded.diagonal(dim1=-1, dim2=-2), dense.diagonal().expand(4, 6), 1e-13)
    assert_close(expanded.to_dense(), dense.expand(4, 6, 6), 1e-13)
    assert_close(operator.solve(v), torch.linalg.solve(dense, v), 1e-9)
    assert_close(operator.logdet(), dense.logdet(), 1e-9)
    assert operator.detach().to_dense().equal(operator.to_dense())
    assert operator.float().diagonal().dtype == torch.float32
    assert operator.clone().to_dense().equal(operator.to_dense())
