"""Softmax attention as a map of moments, against derivatives of attention itself."""

import pytest
import torch
from torch.func import jacrev, jvp

from gpseq.propagation.attention import EXACT, Heads, heads_map, separable
from gpseq.propagation.laws import Diagonal, Kronecker

BATCH, HEADS, TOKENS, KEYS, WIDTH = 2, 3, 4, 5, 2


def inputs(dtype=torch.float64):
    shapes = [(TOKENS, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH)]
    return tuple(torch.randn(BATCH, HEADS, *shape, dtype=dtype) for shape in shapes)


def masks():
    yield None
    yield torch.zeros(TOKENS, KEYS).masked_fill(torch.ones(TOKENS, KEYS).triu(1).bool(), -torch.inf)
    padding = torch.zeros(BATCH, 1, 1, KEYS)
    padding[1, ..., 2:] = -torch.inf
    yield padding
    yield torch.randn(BATCH, HEADS, TOKENS, KEYS)


def attention(query, key, value, mask=None, scale=WIDTH**-0.5):
    scores = query @ key.mT * scale
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_tangent_is_the_derivative(number, scale, dtype):
    mask = list(masks())[number]
    mask = None if mask is None else mask.to(dtype)
    parts = inputs(dtype)
    heads = Heads.of(*parts, mask, scale)
    used = WIDTH**-0.5 if scale is None else scale
    torch.testing.assert_close(heads.output, attention(*parts, mask, used))
    changes = [torch.randn(6, *part.shape, dtype=dtype) for part in parts]
    want = torch.stack(
        [jvp(lambda q, k, v: attention(q, k, v, mask, used), parts, change)[1] for change in zip(*changes, strict=True)]
    )
    torch.testing.assert_close(heads.tangent(*changes), want)
    frozen = torch.stack([heads.weights @ change for change in changes[2]])
    torch.testing.assert_close(heads.tangent(None, None, changes[2]), frozen)


def jacobians(parts, mask):
    """Of one element's and head's output in its queries, keys and values: ``(B, H, T, D, tokens, D)`` each."""
    total = []
    for b in range(BATCH):
        for h in range(HEADS):
            own = mask if mask is None or mask.dim() < 4 else mask.expand(BATCH, HEADS, TOKENS, KEYS)[b, h]
            one = tuple(part[b, h] for part in parts)
            total.append(jacrev(lambda q, k, v, own=own: attention(q, k, v, own), argnums=(0, 1, 2))(*one))
    return [torch.stack(found).unflatten(0, (BATCH, HEADS)) for found in zip(*total, strict=True)]


@pytest.mark.parametrize("number", range(4))
def test_variances_of_independent_entries_are_those_of_the_dense_jacobian(number):
    mask = list(masks())[number]
    mask = None if mask is None else mask.double()
    parts = inputs()
    heads = Heads.of(*parts, mask)
    variances = [torch.rand_like(part) for part in parts]
    want = [
        torch.einsum("bhtisj,bhsj->bhti", jacobian.square(), variance)
        for jacobian, variance in zip(jacobians(parts, mask), variances, strict=True)
    ]
    torch.testing.assert_close(heads.from_query(variances[0]), want[0])
    torch.testing.assert_close(heads.from_key(variances[1]), want[1])
    torch.testing.assert_close(heads.squared(*variances), sum(want))
    torch.testing.assert_close(heads.squared(None, None, variances[2]), want[2])


@pytest.mark.parametrize("number", range(4))
def test_noise_of_key_weights_is_exact_where_variances_are_products(number):
    mask = list(masks())[number]
    mask = None if mask is None else mask.double()
    tokens = torch.randn(BATCH, KEYS, 6, dtype=torch.float64)
    query, _, value = inputs()
    weight = torch.randn(HEADS * WIDTH, 6, dtype=torch.float64)
    key = (tokens @ weight.mT).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    heads = Heads.of(query, key, value, mask)
    rows, columns = torch.rand(HEADS, WIDTH, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    (_, jacobian, _) = jacobians((query, key, value), mask)
    # dk_sj = sum_i dW_(hj)i a_si, and the entries of dW are independent.
    through = torch.einsum("bhtisj,bse->bhtije", jacobian, tokens)
    want = torch.einsum("bhtije,hj,e->bhti", through.square(), rows, columns)
    torch.testing.assert_close(heads.from_key_weights(rows, columns, tokens), want)


def test_variances_as_products_have_the_sums_of_those_that_are_not():
    like = torch.zeros((), dtype=torch.float64)
    rows, columns = torch.rand(6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    found = separable(Diagonal(rows.unsqueeze(-1) * columns), 2, like)
    torch.testing.assert_close(found[0].unsqueeze(-1) * found[1], (rows.unsqueeze(-1) * columns).unflatten(0, (3, 2)))
    entries = torch.rand(6, 5, dtype=torch.float64)
    found = separable(Diagonal(entries), 2, like)
    product = found[0].flatten().unsqueeze(-1) * found[1]
    torch.testing.assert_close(product.sum(0), entries.sum(0))
    torch.testing.assert_close(product.sum(1), entries.sum(1))
    factors = [torch.randn(n, n, dtype=torch.float64) for n in (6, 5)]
    law = Kronecker(*(factor @ factor.mT for factor in factors))
    found = separable(law, 3, like)
    want = law.outputs.diagonal().unsqueeze(-1) * law.inputs.diagonal()
    torch.testing.assert_close(found[0].flatten().unsqueeze(-1) * found[1], want)
    assert all(part.isfinite().all() for part in separable(Diagonal(torch.zeros(6, 5, dtype=torch.float64)), 2, like))


def test_a_row_without_keys_is_zero_in_value_and_tangent():
    parts = inputs()
    mask = torch.zeros(TOKENS, KEYS, dtype=torch.float64)
    mask[1] = -torch.inf
    heads = Heads.of(*parts, mask)
    changes = [torch.randn(2, *part.shape, dtype=torch.float64) for part in parts]
    for result in (heads.output, heads.tangent(*changes), heads.squared(*(part.square() for part in parts))):
        assert result.isfinite().all()
        assert result[..., 1, :].eq(0).all()
        assert result[..., 0, :].ne(0).any()
    value = parts[2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(Heads.of(*parts[:2], value, mask).output.sum(), value)
    assert grad.isfinite().all()


@pytest.mark.parametrize("frozen", [False, True])
def test_heads_side_by_side(frozen):
    packed = torch.randn(BATCH, TOKENS, 3 * HEADS * WIDTH, dtype=torch.float64)

    def split(x):
        return tuple(part.unflatten(-1, (HEADS, WIDTH)).transpose(-3, -2) for part in x.chunk(3, -1))

    def whole(x):
        query, key, value = split(x)
        weights = (split(packed)[0] @ split(packed)[1].mT * WIDTH**-0.5).softmax(-1)
        out = weights @ value if frozen else attention(query, key, value)
        return out.transpose(-3, -2).flatten(-2)

    linear = heads_map(Heads.of(*split(packed)), frozen)
    assert linear.mixes
    columns = torch.randn(4, *packed.shape, dtype=torch.float64)
    want = torch.stack([jvp(whole, (packed,), (column,))[1] for column in columns])
    torch.testing.assert_close(linear.push(columns), want)
    jacobian = jacrev(whole)(packed)  # (B, T, H D, B, T, 3 H D)
    squares = torch.einsum("btibsj->btisj", jacobian.square())
    variance = torch.rand_like(packed)
    torch.testing.assert_close(linear.squared(variance), torch.einsum("btisj,bsj->bti", squares, variance))


def test_many_tokens_are_sketched_without_bias():
    """Random directions for features of queries and keys: right on average, and the same at each call."""
    torch.manual_seed(0)
    shape = (4, 4, EXACT + 8, 16)
    query, key, value = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    heads = Heads.of(query, key, value)
    spread = 0.5 + torch.rand(shape, dtype=torch.float64)
    exact = sum_of_queries(heads, spread)
    found = heads.from_query(spread)
    assert (found / exact).mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(heads.from_query(spread), found, rtol=0, atol=0)
    rows, columns = torch.rand(4, 16).double(), torch.rand(24).double()
    tokens = torch.randn(4, EXACT + 8, 24, dtype=torch.float64)
    both = torch.einsum("bsi,i,bui->bsu", tokens, columns, tokens)
    pull = heads.weights.unsqueeze(-1) * (value.unsqueeze(2) - heads.output.unsqueeze(3))  # (B, H, Tq, Tk, D)
    wanted = torch.einsum("bhtsi,bsu,bhtui->bhti", pull, both, pull)
    wanted = wanted * heads.scale**2 * (query.square() * rows.unsqueeze(-2)).sum(-1, keepdim=True)
    assert (heads.from_key_weights(rows, columns, tokens) / wanted).mean().item() == pytest.approx(1, abs=0.1)


def sum_of_queries(heads, spread):
    pull = heads.weights.unsqueeze(-1) * (heads.value.unsqueeze(2) - heads.output.unsqueeze(3))
    slopes = heads.scale * torch.einsum("bhtsi,bhsj->bhtij", pull, heads.key)
    return torch.einsum("bhtij,bhtj->bhti", slopes.square(), spread)


def test_sketches_that_were_made_in_inference_mode_can_be_in_a_graph():
    def run():
        query, key, value = (torch.randn(1, 2, EXACT + 1, 20, requires_grad=True) for _ in range(3))
        heads = Heads.of(query, key, value)
        found = heads.from_query(torch.rand_like(query))
        return found + heads.from_key_weights(torch.rand(2, 20), torch.rand(28), torch.rand(1, EXACT + 1, 28)), key

    with torch.inference_mode():
        run()
    found, key = run()
    assert torch.autograd.grad(found.sum(), key)[0].isfinite().all()
