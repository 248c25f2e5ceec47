"""Tokens that are chosen, averaged and put together; products of states: exact in what a form knows."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gpseq.propagation import from_variances, propagate, register
from gpseq.propagation.moments import FORMS, GaussianState
from gpseq.propagation.pooling import concatenate, mean_tokens, select_token
from gpseq.propagation.products import gated, product
from tests.oracles_propagation import monte_carlo
from tests.oracles_states import carried, dense, keep, random_state, seeded, walk_of


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", [0, 2, -1, torch.tensor([1, 2])])
def test_a_token_keeps_its_covariance(index, form):
    state = random_state(form, 2, (3, 4), seeded())
    found = select_token(state, index)
    rows = torch.full((2,), index) if isinstance(index, int) else index
    torch.testing.assert_close(found.mean, state.mean[torch.arange(2), rows])
    whole = dense(state).unflatten(2, (3, 4)).unflatten(1, (3, 4))
    expected = torch.stack([whole[b, row, :, row] for b, row in enumerate(rows)])
    torch.testing.assert_close(dense(found), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, [[1, 1, 1], [1, 1, 0]], [[0, 1, 0], [0, 1, 1]]])
def test_a_mean_has_what_tokens_have_in_common(mask, form):
    state = random_state(form, 2, (3, 4), seeded())
    mask = None if mask is None else torch.tensor(mask)
    weights = torch.ones(2, 3) if mask is None else mask
    weights = (weights / weights.sum(1, keepdim=True)).double()
    found = mean_tokens(state, mask)
    torch.testing.assert_close(found.mean, (weights.unsqueeze(-1) * state.mean).sum(1))
    whole = dense(state).unflatten(2, (3, 4)).unflatten(1, (3, 4))
    expected = torch.einsum("bt,bs,btisj->bij", weights, weights, whole)
    if form == "lowrank":  # its independent part has no covariance between features
        columns = torch.einsum("bt,rbti->bir", weights, state.covariance.columns)
        variance = torch.einsum("bt,bti->bi", weights.square(), state.covariance.entries)
        torch.testing.assert_close(dense(found), columns @ columns.mT + torch.diag_embed(variance))
    torch.testing.assert_close(dense(found), keep(form, expected, 4))


def test_padding_is_nothing_to_a_mean():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    state = random_state("full", 2, (3, 4), seeded())
    shifted = GaussianState(
        torch.where(mask.unsqueeze(-1), state.mean, 1e6), state.covariance.scale(1 + 1e3 * (~mask.unsqueeze(-1)))
    )
    one, other = mean_tokens(state, mask), mean_tokens(shifted, mask)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(dense(one), dense(other))
    assert (one.mean[1] == 0).all() and (dense(one)[1] == 0).all()  # where there is no token at all


@pytest.mark.parametrize("form", [*FORMS, "certain"])
@pytest.mark.parametrize("dim", [-1, -2])
def test_states_side_by_side(dim, form):
    shapes = [(1, 4), (3, 4)] if dim == -2 else [(2, 1), (2, 3)]
    first, second = (random_state(form, 2, shape, seeded(number)) for number, shape in enumerate(shapes))
    found = concatenate([first, second], dim)
    torch.testing.assert_close(found.mean, torch.cat([first.mean, second.mean], dim))
    if form == "certain":
        assert found.is_certain
        return
    torch.testing.assert_close(found.variance, torch.cat([first.variance, second.variance], dim))
    if form == "lowrank":
        columns = torch.cat([first.covariance.columns, second.covariance.columns], dim)
        torch.testing.assert_close(found.covariance.columns, columns)
        return
    whole = dense(found).unflatten(2, found.event).unflatten(1, found.event)
    size = shapes[0][dim]
    parts = [slice(0, size), slice(size, None)]
    for rows, state in zip(parts, (first, second), strict=True):
        block = whole[:, rows, :, rows] if dim == -2 else whole[:, :, rows][..., rows]
        torch.testing.assert_close(block.flatten(3).flatten(1, 2), dense(state))
    between = whole[:, parts[0], :, parts[1]] if dim == -2 else whole[:, :, parts[0]][..., parts[1]]
    assert (between == 0).all()


def test_a_certain_token_before_uncertain_ones():
    tokens = random_state("full", 2, (2, 3), seeded())
    found = concatenate([GaussianState(torch.ones(2, 1, 3, dtype=torch.float64)), tokens])
    torch.testing.assert_close(dense(found)[:, 3:, 3:], dense(tokens))
    assert (dense(found)[:, :3] == 0).all()


def test_what_pooling_refuses():
    tokens, vector = random_state("diag", 2, (3, 4), seeded()), random_state("diag", 2, (4,), seeded())
    with pytest.raises(ValueError, match=r"state: expected tokens, \(B, T, D\), got a mean of shape \(2, 4\)"):
        select_token(vector, 0)
    with pytest.raises(ValueError, match="index: expected one for each of 2 sequences, got"):
        select_token(tokens, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\), got \(3,\)"):
        mean_tokens(tokens, torch.ones(3))
    with pytest.raises(ValueError, match="states: expected at least one"):
        concatenate([])
    with pytest.raises(ValueError, match="dim: expected a negative one of an event"):
        concatenate([tokens], 1)


def polynomial_moments(function, mean, covariance):
    """Mean and covariance of polynomials of degree two of a Gaussian vector, on a grid that is exact for them."""
    size = len(mean)
    nodes = torch.tensor(list(itertools.product((-math.sqrt(3), 0.0, math.sqrt(3)), repeat=size)), dtype=mean.dtype)
    weights = torch.where(nodes == 0, nodes.new_tensor(2 / 3), nodes.new_tensor(1 / 6)).prod(-1)
    values, vectors = torch.linalg.eigh(covariance)
    drawn = function(mean + nodes @ (vectors * values.clamp_min(0).sqrt()).mT)
    average = weights @ drawn
    centred = drawn - average
    return average, (weights.unsqueeze(-1) * centred).mT @ centred


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("event", "dim"), [((2, 4), -1), ((2, 4), 1), ((6,), -1), ((6,), 1)])
def test_products_of_halves_are_exact(event, dim, form):
    state = random_state(form, 2, event, seeded())
    walk = walk_of(nn.Identity(), form)
    found = gated(state, walk, None, dim=dim)

    def halves(x):
        one, other = x.unflatten(-1, event).chunk(2, dim)
        return (one * other).flatten(1)

    for element in range(2):
        mean, covariance = polynomial_moments(halves, state.mean[element].flatten(), dense(state)[element])
        torch.testing.assert_close(found.mean[element].flatten(), mean)
        torch.testing.assert_close(found.variance[element].flatten(), covariance.diagonal())
        if form in ("blockdiag", "full"):
            kept = keep(form, covariance.unsqueeze(0), event[-1] // 2 if dim == -1 else event[-1])[0]
            torch.testing.assert_close(dense(found)[element], kept)


@pytest.mark.parametrize("form", FORMS)
def test_products_of_first_order_are_tangents(form):
    state = random_state(form, 2, (2, 4), seeded())

    def halves(x):
        one, other = x.chunk(2, -1)
        return one * other

    found = gated(state, walk_of(nn.Identity(), form, activations="tangent"), None)
    torch.testing.assert_close(found.mean, halves(state.mean))
    torch.testing.assert_close(dense(found), carried(state, halves, form, 2))


@pytest.mark.parametrize("form", ["diag", "blockdiag", "lowrank"])
def test_products_of_two_states(form):
    first, second = random_state(form, 2, (2, 3), seeded(0)), random_state(form, 2, (2, 3), seeded(1))
    joint = gated(concatenate([first, second], -1), walk_of(nn.Identity(), form), None)
    found = product(first, second)
    torch.testing.assert_close(found.mean, joint.mean)
    torch.testing.assert_close(dense(found), dense(joint))


@pytest.mark.parametrize("form", FORMS)
def test_products_with_what_is_certain_are_scales(form):
    state, factor = random_state(form, 2, (2, 3), seeded()), random_state("certain", 2, (2, 3), seeded(1))
    for found in (product(state, factor), product(factor, state)):
        torch.testing.assert_close(found.mean, state.mean * factor.mean)
        torch.testing.assert_close(dense(found), dense(state.scale(factor.mean)))
    assert product(factor, factor).is_certain


def test_a_gated_branch_knows_where_it_began():
    matrix = torch.randn(6, 3, generator=seeded(1), dtype=torch.float64)
    state = random_state("full", 1, (3,), seeded())
    layer = nn.Linear(3, 6, bias=False).double()
    layer.weight.data.copy_(matrix)
    walk = walk_of(layer, "full")
    found = state.branch(lambda x: gated(walk(layer, x), walk, None))

    def whole(x):
        one, other = (x @ matrix.mT).chunk(2, -1)
        return x + one * other

    mean, covariance = polynomial_moments(whole, state.mean[0], dense(state)[0])
    torch.testing.assert_close(found.mean[0].detach(), mean)
    torch.testing.assert_close(dense(found)[0].detach(), covariance)


def test_the_mean_of_a_gated_linear_unit_is_exact():
    state = random_state("full", 3, (2,), seeded(), scale=0.25)
    found = walk_of(nn.GLU(), "full")(nn.GLU(), state)
    draws = torch.randn(3, 400_000, 2, generator=seeded(2), dtype=torch.float64)
    root = torch.linalg.cholesky(dense(state))
    sampled = nn.functional.glu(state.mean.unsqueeze(1) + draws @ root.mT)
    error = sampled.std(1) / math.sqrt(400_000)
    assert ((found.mean - sampled.mean(1)).abs() < 4 * error).all()
    torch.testing.assert_close(found.variance.sqrt(), sampled.std(1), rtol=0.06, atol=0.0)


class Gated(nn.Module):
    """A perceptron with a gate, as language models have it."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(6, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@register(Gated)
def _gated(module, state, walk):
    both = walk.linears(state, [(module.gate.weight, None), (module.up.weight, None)])
    return walk(module.down, gated(both, walk, "silu", gate=0))


def test_a_gated_perceptron_is_that_of_its_weights():
    model = Gated().double()
    variances = {name: torch.full_like(value, 0.004) for name, value in model.named_parameters()}
    x = torch.randn(4, 6, generator=seeded(), dtype=torch.float64)
    mean, covariance = monte_carlo(model, variances, x, 40_000, seeded(1))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    for form, tolerance in (("full", 0.03), ("lowrank", 0.2), ("diag", 0.1), ("blockdiag", 0.03)):
        found = propagate(model, from_variances(variances), x, covariance=form, generator=seeded(3), num_tangents=64)
        assert ((found.mean - mean).abs() / variance.sqrt()).max() < 0.15
        ratio = (found.variance / variance).sqrt()
        assert (ratio - 1).abs().max() < tolerance, (form, ratio)


def test_what_products_refuse():
    one, other = random_state("full", 2, (3,), seeded(0)), random_state("full", 2, (3,), seeded(1))
    with pytest.raises(NotImplementedError, match="expected the halves of one state"):
        product(one, other)
    walk = walk_of(nn.Identity(), "full")
    for dim in (-1, 0, 3):
        with pytest.raises(ValueError, match="dim: expected an even dimension of an event"):
            gated(one, walk, dim=dim)
    with pytest.raises(ValueError, match="gate: expected 0 or 1, got 2"):
        gated(random_state("full", 2, (4,), seeded()), walk, gate=2)


@pytest.mark.parametrize("form", FORMS)
def test_dtypes_agree(form):
    high = random_state(form, 2, (3, 4), seeded())
    covariance = high.covariance
    tensors = {name: value.float() for name, value in vars(covariance).items() if isinstance(value, torch.Tensor)}
    low = GaussianState(high.mean.float(), replace(covariance, **tensors))
    walk = walk_of(nn.Identity(), form)
    for function in (mean_tokens, lambda s: select_token(s, 1), lambda s: gated(s, walk)):
        single, double = function(low), function(high)
        assert single.mean.dtype == dense(single).dtype == torch.float32
        torch.testing.assert_close(dense(single).double(), dense(double), rtol=1e-4, atol=1e-4)
