"""What the mean of SGPAttention is: its weights, the attention that it starts as, and what masks mean for it."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpseq.nn import SGPAttention
from tests.layers import EVERY_MEAN, mean_of, move, name_of, small, take_weights, trained_attention

every_mean = pytest.mark.parametrize("options", EVERY_MEAN, ids=name_of)
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 1]]).bool()
FUTURE = torch.ones(5, 5).triu(1).bool()


def masks(batch: int = 3, heads: int = 2):
    """Every kind of mask that leaves each query a key."""
    rows = torch.rand(5, 5) < 0.4
    rows.fill_diagonal_(False)
    each = torch.rand(batch * heads, 5, 5) < 0.4
    each[:, torch.arange(5), torch.arange(5)] = False
    yield {}
    yield {"key_padding_mask": PADDING}
    yield {"is_causal": True, "attn_mask": FUTURE}
    yield {"key_padding_mask": PADDING & ~torch.eye(3, 5).bool(), "is_causal": True, "attn_mask": FUTURE}
    yield {"attn_mask": rows}
    yield {"attn_mask": each}
    yield {"attn_mask": each, "key_padding_mask": PADDING & False}
    yield {"attn_mask": torch.zeros(5, 5).double().masked_fill(rows, -torch.inf)}


@every_mean
@pytest.mark.parametrize("value_scale", ["default", None])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_weights_times_values_are_the_amortised_mean(options, value_scale, cross):
    layer = small(**options, value_scale=value_scale)
    with torch.no_grad():
        layer.inducing.value.zero_()
        layer.out_proj.weight.copy_(torch.eye(8))
        layer.out_proj.bias.zero_()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = torch.randn(3, 5, 8, dtype=torch.float64) if cross else x
    layer.sampling = "mean"
    for given in masks():
        out, weights = layer(x, y, y, average_attn_weights=False, **given)
        heads = weights @ layer.project_value(y)
        want = heads.transpose(1, 2).flatten(-2)
        padding = given.get("key_padding_mask")
        if padding is not None and not cross:
            want = want.masked_fill(padding.unsqueeze(-1), 0.0)
        torch.testing.assert_close(out, want)
        alone, _ = layer(x, y, y, need_weights=False, **given)
        torch.testing.assert_close(alone, out)


def test_softmax_kernel_starts_as_softmax_attention_with_tied_projections():
    layer = small(mode="softmax_kernel", kernel="exponential", moved=False, sampling="mean")
    assert layer.form == "cheng_boots"
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    query, value = layer.project_query(x), layer.project_value(x)
    tied = trained_attention()
    with torch.no_grad():
        tied.in_proj_weight.copy_(torch.cat([layer.query_weight, layer.query_weight, layer.value_weight]))
        tied.in_proj_bias.zero_()
        tied.out_proj.load_state_dict(layer.out_proj.state_dict())
    for given in masks():
        mask = given.get("attn_mask")
        out, weights = layer(x, x, x, average_attn_weights=False, **given)
        want, theirs = tied(x, x, x, average_attn_weights=False, **{"attn_mask": mask, **given})
        padding = given.get("key_padding_mask")
        if padding is not None:
            assert out[padding].eq(0).all()
            want, theirs = want.masked_fill(padding.unsqueeze(-1), 0.0), theirs.clone()
        torch.testing.assert_close(out, want)
        kept = slice(None) if padding is None else (~padding).nonzero(as_tuple=True)
        rows, other = weights.transpose(1, 2)[kept], theirs.transpose(1, 2)[kept]
        torch.testing.assert_close(rows, other)
        torch.testing.assert_close(rows.sum(-1), torch.ones(()).double().expand(rows.shape[:-1]))
    fused = F.scaled_dot_product_attention(query, query, value)
    torch.testing.assert_close(mean_of(layer, x, x, x), layer.out_proj(fused.transpose(1, 2).flatten(-2)))


def test_length_scales_of_softmax_and_of_other_temperatures():
    layer = small(mode="softmax_kernel", kernel="exponential", moved=False, sampling="mean")
    with torch.no_grad():
        layer.inducing.log_lengthscale.normal_()
        layer.inducing.log_variance.fill_(3.0)  # does not touch the mean
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    scaled = layer.project_query(x) / layer.inducing.log_lengthscale.exp().unsqueeze(-2)
    heads = (scaled @ scaled.mT).softmax(-1) @ layer.project_value(x)
    torch.testing.assert_close(mean_of(layer, x, x, x), layer.out_proj(heads.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 7}], ids=["self", "cross"])
def test_residual_starts_as_stock_attention_under_every_mask(kernel, widths):
    trained = trained_attention(**widths)
    layer = take_weights(small(mode="residual", kernel=kernel, moved=False, sampling="mean", **widths), trained)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y, z = (torch.randn(3, 5, widths.get(name, 8), dtype=torch.float64) for name in ("kdim", "vdim"))
    inputs = (x, y, z) if widths else (x, x, x)
    bias = {"attn_mask": torch.randn(6, 5, 5).double(), "key_padding_mask": torch.randn(3, 5).double()}
    for given in (*masks(), bias):
        out, weights = layer(*inputs, **given)
        want, theirs = trained(*inputs, **{"attn_mask": given.get("attn_mask"), **given})
        padding = given.get("key_padding_mask")
        if padding is not None and padding.dtype == torch.bool and not widths:
            want = want.masked_fill(padding.unsqueeze(-1), 0.0)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(*inputs, need_weights=False, **given)[0], out)
        if padding is not None and padding.dtype == torch.bool and not widths:
            weights, theirs = weights[~padding], theirs[~padding]  # rows of padding are nobody's
        torch.testing.assert_close(weights, theirs, rtol=0, atol=1e-12)
        assert layer.kl_divergence().abs() < 1e-12


def test_residual_in_single_precision():
    trained = trained_attention(torch.float32)
    layer = take_weights(small(torch.float32, mode="residual", moved=False, sampling="mean"), trained)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x, x, x)[0], trained(x, x, x)[0], rtol=0, atol=1e-6)


@every_mean
def test_padding_is_deletion(options):
    layer = small(**options)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    out = mean_of(layer, x, x, x, PADDING)
    cost, parts = layer.kl_divergence(convention="per_sequence"), []
    assert out[PADDING].eq(0).all()
    for sequence, removed, row in zip(x, PADDING, out, strict=True):
        short = sequence[~removed].unsqueeze(0)
        torch.testing.assert_close(mean_of(layer, short, short, short)[0], row[~removed])
        parts.append(layer.kl_divergence(convention="per_sequence"))
    torch.testing.assert_close(cost, sum(parts))
    y = torch.randn(3, 4, 8, dtype=torch.float64)
    out = mean_of(layer, y, x, x, PADDING)
    for query, sequence, removed, row in zip(y, x, PADDING, out, strict=True):
        torch.testing.assert_close(mean_of(layer, query, sequence[~removed], sequence[~removed]), row)
    # With a causal mask on top.
    left = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    out = mean_of(layer, x, x, x, left, is_causal=True)
    for sequence, removed, row in zip(x, left, out, strict=True):
        short = sequence[~removed]
        torch.testing.assert_close(mean_of(layer, short, short, short, is_causal=True), row[~removed])


@every_mean
@pytest.mark.parametrize("sampling", ["marginal", "joint", "pathwise", "mean"])
def test_what_stands_in_padding_does_not_matter(options, sampling):
    layer = small(**options, sampling=sampling)
    clean = torch.randn(3, 5, 8, dtype=torch.float64)
    clean[PADDING] = 0.0
    for cross in (False, True):
        results = []
        for fill in (0.0, 1e30, torch.nan, torch.inf):
            x = clean.masked_fill(PADDING.unsqueeze(-1), fill).requires_grad_()
            torch.manual_seed(3)
            query = torch.ones(3, 2, 8, dtype=torch.float64) if cross else x
            out, weights = layer(query, x, x, PADDING)
            loss = out.square().sum() + weights.square().sum() + layer.kl_divergence()
            results.append([loss, *torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)])
        for result in results[1:]:
            for got, want in zip(result, results[0], strict=True):
                if want is not None:
                    assert got.equal(want)
                    assert got.isfinite().all()


@every_mean
@pytest.mark.parametrize("value_scale", ["default", None])
def test_causal_attention_is_that_of_each_prefix(options, value_scale):
    layer = small(**options, value_scale=value_scale)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    for given in ({"is_causal": True}, {"attn_mask": FUTURE}, {"attn_mask": FUTURE, "is_causal": True}):
        out = mean_of(layer, x, x, x, **given)
        for t in range(5):
            prefix = x[:, : t + 1]
            torch.testing.assert_close(mean_of(layer, prefix, prefix, prefix)[:, t], out[:, t])
            (grad,) = torch.autograd.grad(out[:, t].square().sum(), x, retain_graph=True)
            assert grad[:, t + 1 :].eq(0).all()
            assert grad[:, : t + 1].ne(0).any()
        # The divergence is the mean of those of the prefixes.
        costs = []
        for t in range(5):
            prefix = x[:, : t + 1]
            mean_of(layer, prefix, prefix, prefix)
            costs.append(layer.kl_divergence(convention="per_sequence"))
        mean_of(layer, x, x, x, **given)
        torch.testing.assert_close(layer.kl_divergence(convention="per_sequence"), sum(costs) / 5)


@every_mean
def test_order_of_tokens_and_of_sequences(options):
    layer = small(**options)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    out, order = mean_of(layer, x, x, x), torch.tensor([3, 0, 4, 1, 2])
    shuffled = x[:, order]
    torch.testing.assert_close(mean_of(layer, shuffled, shuffled, shuffled), out[:, order])
    apart = torch.stack([mean_of(layer, s, s, s) for s in x])
    torch.testing.assert_close(apart, out)


@hypothesis.given(
    options=st.sampled_from(EVERY_MEAN),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    heads=st.sampled_from([1, 2, 4]),
    inducing=st.integers(1, 6),
    causal=st.booleans(),
    cross=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_padded_batch_is_its_sequences(options, lengths, heads, inducing, causal, cross, seed):
    torch.manual_seed(seed)
    layer = move(SGPAttention(8, heads, inducing, sampling="mean", batch_first=True, dtype=torch.float64, **options))
    pieces = [torch.randn(length, 8, dtype=torch.float64) for length in lengths]
    x = nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=torch.nan)
    mask = torch.arange(x.shape[1]) >= torch.tensor(lengths).unsqueeze(-1)
    query = torch.randn(x.shape, dtype=torch.float64) if cross else x
    out, weights = layer(query, x, x, mask, is_causal=causal)
    cost = layer.kl_divergence(convention="per_sequence")
    total = torch.zeros((), dtype=torch.float64)
    for b, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
        asked = query[b, :length] if cross else piece
        one, rows = layer(asked, piece, piece, is_causal=causal)
        torch.testing.assert_close(out[b, :length], one)
        torch.testing.assert_close(weights[b, :length, :length], rows)
        assert weights[b, :, length:].eq(0).all()
        total = total + layer.kl_divergence(convention="per_sequence")
    if not (cross and causal):  # there the queries of padding are counted too, as nothing says that they are padding
        torch.testing.assert_close(cost, total)


def test_long_sequences_take_the_fused_form():
    for options in EVERY_MEAN:
        layer = small(**options)
        x = torch.randn(1, 300, 8, dtype=torch.float64)
        padding = torch.arange(300).unsqueeze(0) > 250
        for given in ({}, {"is_causal": True}, {"key_padding_mask": padding, "is_causal": True}):
            layer.sampling = "mean"
            out, _ = layer(x, x, x, need_weights=False, **given)
            short = x[:, :100]
            if given:
                short = mean_of(layer, short, short, short, is_causal=True)
                torch.testing.assert_close(out[:, :100], short, rtol=1e-8, atol=1e-8)
            else:
                _, weights = layer(x, x, x, average_attn_weights=False)
                heads = weights @ layer.project_value(x)
                with torch.no_grad():
                    layer.value_weight.zero_()
                    if layer.value_bias is not None:
                        layer.value_bias.zero_()
                rest, _ = layer(x, x, x, need_weights=False)
                explained = F.linear(heads.transpose(1, 2).flatten(-2), layer.out_proj.weight)
                torch.testing.assert_close(out, rest + explained, rtol=1e-8, atol=1e-8)


def test_rbf_heads_against_the_formula():
    layer = small(mode="sgpa", jitter=0.0, value_scale=None)
    x = torch.randn(5, 8, dtype=torch.float64)
    heads = []
    for h in range(2):
        rows = slice(4 * h, 4 * h + 4)
        scale = layer.inducing.log_lengthscale[h].exp()
        tokens = x @ layer.query_weight[rows].mT / scale
        keys = layer.inducing.location[h] @ layer.query_weight[rows].mT / scale
        values = x @ layer.value_weight[rows].mT + layer.value_bias[rows]

        def kernel(a, b, h=h):
            return layer.inducing.log_variance[h].exp() * torch.exp(-0.5 * torch.cdist(a, b).square())

        cross, gram = kernel(tokens, keys), kernel(keys, keys)
        residual = kernel(tokens, tokens) - cross @ torch.linalg.solve(gram, cross.mT)
        heads.append(residual @ values + cross @ layer.inducing.value[h])
    torch.testing.assert_close(mean_of(layer, x, x, x), layer.out_proj(torch.cat(heads, -1)))


def test_scale_of_the_exponential_kernel_at_the_start():
    layer = small(kernel="exponential", mode="softmax_kernel", moved=False)
    assert layer.inducing.log_lengthscale.allclose(torch.tensor(0.25 * math.log(4)).double())


def test_without_a_projection_of_the_inducing_keys():
    layer = small(inducing_space="projected")
    assert layer.inducing.location.shape == (2, 3, 4)
    free = small()
    free.load_state_dict({**layer.state_dict(), "inducing.location": free.inducing.location.detach()})
    keys = free.inducing.key(free.query_weight, None)
    with torch.no_grad():
        layer.inducing.location.copy_(keys)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(mean_of(layer, x, x, x), mean_of(free, x, x, x))
    torch.testing.assert_close(layer.kl_divergence(), free.kl_divergence())


def test_tied_layers_have_a_second_map_where_keys_are_of_another_width():
    layer = small(kdim=6)
    assert isinstance(layer.key_weight, nn.Parameter)
    x, y = torch.randn(2, 5, 8).double(), torch.randn(2, 4, 6).double()
    value = torch.randn(2, 4, 8).double()
    assert layer(x, y, value)[0].shape == (2, 5, 8)
