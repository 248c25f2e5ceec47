"""Covariances in their forms against dense algebra."""

import copy
import math
import pickle
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.propagation.moments import FORMS, Blocks, Diagonal, Full, GaussianState, LinearMap, LowRank
from tests.oracles_states import dense, keep, random_covariance, random_state, seeded

events = st.sampled_from([(1,), (3,), (2, 3), (3, 1), (2, 2, 2)])
batches = st.integers(1, 3)
seeds = st.integers(0, 1000)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def dense_map(matrix, event, new_event):
    """A matrix ``(B, N', N)`` as a map between events."""

    def push(columns):
        return torch.einsum("bmn,rbn->rbm", matrix, columns.flatten(2)).unflatten(-1, new_event)

    def squared(variance):
        return torch.einsum("bmn,bn->bm", matrix.square(), variance.flatten(1)).unflatten(-1, new_event)

    return LinearMap(push, squared, mixes=True)


def feature_map(matrix):
    """A matrix ``(D', D)`` for the features of each token."""
    return LinearMap(lambda u: u @ matrix.mT, lambda v: v @ matrix.square().mT)


def expected_map(state, matrix, form, width):
    """Dense algebra of a map, with what the form keeps."""
    if form == "lowrank":
        columns = matrix @ state.covariance.columns.flatten(2).permute(1, 2, 0)
        variance = (matrix.square() @ state.covariance.entries.flatten(1).unsqueeze(-1)).squeeze(-1)
        return columns @ columns.mT + torch.diag_embed(variance)
    return keep(form, matrix @ dense(state) @ matrix.mT, width)


@pytest.mark.parametrize("form", FORMS)
@given(event=events, batch=batches, seed=seeds)
def test_operators_have_the_variance_on_their_diagonal(form, event, batch, seed):
    covariance = random_covariance(form, batch, event, seeded(seed))
    size = math.prod(event)
    found = covariance.operator()
    assert found.shape == (batch, size, size)
    assert covariance.variance.shape == (batch, *event)
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), covariance.variance.flatten(1))
    matrix = found.to_dense()
    torch.testing.assert_close(matrix, matrix.mT)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.abs().max()


@pytest.mark.parametrize("form", ["diag", "lowrank", "full"])
@given(event=events, new=events, batch=batches, seed=seeds)
def test_maps_between_events(form, event, new, batch, seed):
    state = random_state(form, batch, event, seeded(seed))
    matrix = normal(batch, math.prod(new), math.prod(event), seed=seed)
    found = state.apply(normal(batch, *new), dense_map(matrix, event, new))
    assert found.event == new
    torch.testing.assert_close(dense(found), expected_map(state, matrix, form, None))


@pytest.mark.parametrize("form", FORMS)
@given(event=events, width=st.integers(1, 4), seed=seeds)
def test_maps_of_features(form, event, width, seed):
    state = random_state(form, 2, event, seeded(seed))
    matrix = normal(width, event[-1], seed=seed)
    found = state.apply(state.mean @ matrix.mT, feature_map(matrix))
    tokens = math.prod(event[:-1])
    whole = torch.kron(torch.eye(tokens, dtype=torch.float64), matrix).expand(2, -1, -1)
    torch.testing.assert_close(dense(found), expected_map(state, whole, form, width))
    assert found.covariance.variance.shape == found.mean.shape


def test_blocks_follow_maps_of_tokens_that_say_how():
    state = random_state("blockdiag", 2, (3, 2), seeded())
    weights = normal(3)
    linear = LinearMap(
        push=lambda u: torch.einsum("t,...td->...d", weights, u),
        squared=lambda v: torch.einsum("t,btd->bd", weights.square(), v),
        blocks=lambda c: torch.einsum("t,btij->bij", weights.square(), c),
        mixes=True,
    )
    found = state.apply(linear.push(state.mean), linear)
    whole = torch.kron(weights.unsqueeze(0), torch.eye(2, dtype=torch.float64)).expand(2, -1, -1)
    torch.testing.assert_close(dense(found), whole @ dense(state) @ whole.mT)
    with pytest.raises(ValueError, match="covariance: blocks of tokens cannot follow this map"):
        state.apply(state.mean, replace(linear, blocks=None))


@pytest.mark.parametrize("form", FORMS)
@given(event=events, batch=batches, seed=seeds, plain=st.booleans())
def test_scales(form, event, batch, seed, plain):
    state = random_state(form, batch, event, seeded(seed))
    gain, remainder = normal(batch, *event, seed=seed), normal(batch, *event, seed=seed + 1).square()
    found = state.scale(gain) if plain else state.scale(gain, 7 * gain, remainder)
    torch.testing.assert_close(found.mean, state.mean * gain if plain else 7 * gain)
    flat = gain.flatten(1)
    expected = flat.unsqueeze(-1) * dense(state) * flat.unsqueeze(-2)
    if not plain:
        expected = expected + torch.diag_embed(remainder.flatten(1))
    torch.testing.assert_close(dense(found), expected)


MOVES = {
    "flatten": lambda x: x.flatten(1),
    "turn": lambda x: x.transpose(1, 2),
    "choose": lambda x: x[:, 1:, [0, 2]],
    "reverse": lambda x: x.flip(1, 2),
}


@pytest.mark.parametrize("form", ["diag", "lowrank", "full"])
@pytest.mark.parametrize("name", MOVES)
def test_moves(name, form):
    state = random_state(form, 2, (2, 3), seeded())
    found = state.move(MOVES[name])
    torch.testing.assert_close(found.mean, MOVES[name](state.mean))
    index = MOVES[name](torch.arange(6).view(1, 2, 3)).flatten()
    torch.testing.assert_close(dense(found), dense(state)[:, index][..., index])
    assert found.covariance.variance.shape == found.mean.shape


def test_entries_that_are_repeated_are_the_same():
    for form in ("lowrank", "full"):
        state = random_state(form, 2, (3,), seeded())
        found = dense(state.move(lambda x: x[:, [0, 0, 2]]))
        whole = dense(
            state if form == "full" else replace(state, covariance=replace(state.covariance, entries=0 * state.mean))
        )
        torch.testing.assert_close(found[:, 0, 1], whole[:, 0, 0])
    # marginals forget that; blocks refuse
    marginal = random_state("diag", 2, (3,), seeded())
    assert (dense(marginal.move(lambda x: x[:, [0, 0, 2]]))[:, 0, 1] == 0).all()
    with pytest.raises(ValueError, match="covariance: blocks of tokens cannot follow entries that are put elsewhere"):
        random_state("blockdiag", 2, (3,), seeded()).move(lambda x: x)


@pytest.mark.parametrize("form", FORMS)
@given(event=events, batch=batches, seed=seeds)
def test_sums(form, event, batch, seed):
    first, second = (random_state(form, batch, event, seeded(seed + number)) for number in (0, 1))
    found = first.plus(second)
    torch.testing.assert_close(found.mean, first.mean + second.mean)
    if form == "lowrank":  # a column is one direction in both
        columns = first.covariance.columns + second.covariance.columns
        torch.testing.assert_close(found.covariance.columns, columns)
        torch.testing.assert_close(found.covariance.entries, first.covariance.entries + second.covariance.entries)
    else:
        torch.testing.assert_close(dense(found), dense(first) + dense(second))
    certain = GaussianState(second.mean)
    for one in (first.plus(certain), certain.plus(first)):
        torch.testing.assert_close(dense(one), dense(first))
    assert certain.plus(certain).is_certain


def test_sums_of_other_forms_are_errors():
    states = {form: random_state(form, 2, (3,), seeded()) for form in FORMS}
    for form, kind in (("blockdiag", "Blocks"), ("lowrank", "LowRank"), ("full", "Full")):
        with pytest.raises(TypeError, match=f"other: expected {kind}, got Diagonal"):
            states[form].plus(states["diag"])
    with pytest.raises(TypeError, match="branch: expected Full, got Diagonal"):
        states["full"].covariance.join(states["diag"].covariance, 0)


@pytest.mark.parametrize("form", FORMS)
@given(event=st.sampled_from([(3,), (2, 3)]), batch=batches, seed=seeds)
def test_branches(form, event, batch, seed):
    """x + J x + noise, with the cross-covariance where the form knows it."""
    state = random_state(form, batch, event, seeded(seed))
    matrix = normal(event[-1], event[-1], seed=seed)
    noise = random_covariance(form, batch, event, seeded(seed + 1))
    before = dense(state)

    def function(x):
        out = x.apply(x.mean @ matrix.mT, feature_map(matrix))
        return out.plus(GaussianState(torch.zeros_like(out.mean), noise))

    found = state.branch(function)
    torch.testing.assert_close(found.mean, state.mean + state.mean @ matrix.mT)
    tokens = math.prod(event[:-1])
    whole = torch.kron(torch.eye(tokens, dtype=torch.float64), matrix).expand(batch, -1, -1)
    one = torch.eye(whole.shape[-1], dtype=torch.float64)
    if form == "full":
        torch.testing.assert_close(dense(found), (one + whole) @ before @ (one + whole).mT + dense(noise))
        assert not found.covariance.crosses
    elif form == "lowrank":
        columns = (one + whole) @ state.covariance.columns.flatten(2).permute(1, 2, 0)
        columns = columns + noise.columns.flatten(2).permute(1, 2, 0)
        torch.testing.assert_close(found.covariance.columns.flatten(2).permute(1, 2, 0), columns)
    else:  # the cross term is dropped
        torch.testing.assert_close(
            dense(found), before + keep(form, whole @ before @ whole.mT, event[-1]) + dense(noise)
        )


@given(seed=seeds)
def test_branches_in_branches(seed):
    """A residual path within another, with maps, scales and moves on the way."""
    state = random_state("full", 2, (3,), seeded(seed))
    first, second, gain = normal(3, 3, seed=seed), normal(3, 3, seed=seed + 1), normal(2, 3, seed=seed + 2)
    noise = random_covariance("full", 2, (3,), seeded(seed + 3))
    order = [2, 0, 1]

    def inner(x):
        return x.apply(x.mean @ second.mT, feature_map(second)).move(lambda value: value[:, order])

    def outer(x):
        out = x.apply(x.mean @ first.mT, feature_map(first)).branch(inner)
        return out.plus(GaussianState(torch.zeros_like(out.mean), noise)).scale(gain).branch(inner)

    found = state.branch(outer)
    one = torch.eye(3, dtype=torch.float64)
    inside = one + second[order]
    after = inside @ torch.diag_embed(gain)
    whole = one + after @ inside @ first
    expected = whole @ dense(state) @ whole.mT + after @ dense(noise) @ after.mT
    torch.testing.assert_close(dense(found), expected)
    torch.testing.assert_close(found.mean, (whole @ state.mean.unsqueeze(-1)).squeeze(-1))
    assert not found.covariance.crosses


def test_branches_of_what_is_certain():
    certain, uncertain = random_state("certain", 2, (3,), seeded()), random_state("full", 2, (3,), seeded())
    assert certain.branch(lambda x: x.shift(1.0)).is_certain
    torch.testing.assert_close(dense(certain.branch(lambda x: x.plus(uncertain))), dense(uncertain))
    # a branch that forgets its input is certain, and adds nothing
    torch.testing.assert_close(dense(uncertain.branch(lambda x: certain)), dense(uncertain))


def test_states_say_what_they_are():
    state = random_state("full", 2, (3, 4), seeded())
    assert not state.is_certain and state.event == (3, 4)
    certain = GaussianState(state.mean)
    assert certain.is_certain and certain.variance.abs().sum() == 0
    torch.testing.assert_close(state.shift(2.0).mean, state.mean + 2)
    torch.testing.assert_close(dense(state.shift(2.0)), dense(state))
    assert certain.scale(state.mean).is_certain and certain.move(lambda x: x.flatten(1)).is_certain
    with pytest.raises(TypeError, match="a state has no items"):
        state[0]
    with pytest.raises(AttributeError):
        state.mean = state.mean


def test_dtypes_are_kept(dtype):
    for form in FORMS:
        state = random_state(form, 2, (2, 3), seeded(), dtype)
        gain = torch.full_like(state.mean, 0.5)
        found = state.branch(lambda x, gain=gain: x.scale(gain, x.mean, gain))
        assert found.mean.dtype == found.variance.dtype == dense(found).dtype == dtype
    exact = {form: random_state(form, 2, (2, 3), seeded()) for form in FORMS}
    low = {
        "diag": Diagonal(exact["diag"].covariance.entries.float()),
        "blockdiag": Blocks(exact["blockdiag"].covariance.entries.float()),
        "lowrank": LowRank(*(value.float() for value in vars(exact["lowrank"].covariance).values())),
        "full": Full(exact["full"].covariance.entries.float(), (2, 3)),
    }
    matrix = normal(4, 3)
    for form, state in exact.items():
        single = low[form].apply(feature_map(matrix.float()))
        double = state.covariance.apply(feature_map(matrix))
        torch.testing.assert_close(dense(single).double(), dense(double), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_states_can_be_pickled_and_copied(form):
    state = random_state(form, 2, (2, 3), seeded())
    state = replace(state, covariance=state.covariance.fork()[0])
    for found in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert type(found.covariance) is type(state.covariance)
        torch.testing.assert_close(found.mean, state.mean, rtol=0, atol=0)
        torch.testing.assert_close(dense(found), dense(state), rtol=0, atol=0)
        if form == "full":
            assert isinstance(found.covariance.crosses, MappingProxyType)
            assert found.covariance.event == (2, 3)
            torch.testing.assert_close(dict(found.covariance.crosses), dict(state.covariance.crosses), rtol=0, atol=0)
