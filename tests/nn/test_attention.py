"""SGPAttention: the contract of ``nn.MultiheadAttention``, and what is refused."""

import inspect
import re
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from gpseq.nn import SGPAttention
from tests.layers import COVARIANCES, EVERY_MEAN, KERNELS, MODES, SAMPLING, mean_of, name_of, small

every_mean = pytest.mark.parametrize("options", EVERY_MEAN, ids=name_of)


def test_every_argument_of_the_stock_layer_keeps_its_name_order_and_default():
    ours, stock = (inspect.signature(c.forward).parameters for c in (SGPAttention, nn.MultiheadAttention))
    assert list(ours) == list(stock)
    assert [p.default for p in ours.values()] == [p.default for p in stock.values()]
    ours, stock = (inspect.signature(c).parameters for c in (SGPAttention, nn.MultiheadAttention))
    assert all(name in ours and ours[name].default == stock[name].default for name in stock)
    assert list(ours)[:2] == list(stock)[:2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_every_combination_puts_out_and_learns(mode, sampling, dtype):
    for kernel, covariance in product(KERNELS, COVARIANCES):
        layer = small(dtype, mode=mode, kernel=kernel, covariance=covariance, sampling=sampling)
        x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
        out, weights = layer(x, x, x)
        assert out.shape == (3, 5, 8)
        assert out.dtype == dtype
        assert weights.shape == (3, 5, 5)
        (out.square().sum() + layer.kl_divergence()).backward()
        assert x.grad.isfinite().all()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.ne(0).any(), (kernel, covariance, name)


@every_mean
def test_layouts_agree(options):
    torch.manual_seed(1)
    first = small(**options, sampling="mean")
    last = small(**options, sampling="mean", batch_first=False)
    last.load_state_dict(first.state_dict())
    x, y = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.3
    out, weights = first(x, y, y, mask)
    swapped, same = last(*(t.transpose(0, 1) for t in (x, y, y)), mask)
    torch.testing.assert_close(swapped.transpose(0, 1), out)
    torch.testing.assert_close(same, weights)
    alone, one = first(x[1], y[1], y[1], mask[1])
    torch.testing.assert_close(alone, out[1])
    torch.testing.assert_close(one, weights[1])
    assert alone.shape == (5, 8)
    assert one.shape == (5, 4)
    _, heads = first(x[1], y[1], y[1], mask[1], average_attn_weights=False)
    assert heads.shape == (2, 5, 4)
    torch.testing.assert_close(heads.mean(0), one)
    assert first(x, y, y, mask, average_attn_weights=False)[1].shape == (3, 2, 5, 4)
    assert first(x, y, y, mask, need_weights=False)[1] is None


@pytest.mark.parametrize("mode", MODES)
def test_keys_and_values_of_other_widths(mode):
    layer = small(mode=mode, kdim=6, vdim=7)
    inputs = [torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 8), (4, 6), (4, 7))]
    out, weights = layer(*inputs)
    assert out.shape == (2, 5, 8)
    assert weights.shape == (2, 5, 4)
    assert (layer.key_weight.shape, layer.value_weight.shape) == ((8, 6), (8, 7))


def test_one_projection_for_queries_and_keys_of_one_space():
    x, y = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    for mode in ("sgpa", "softmax_kernel"):
        layer = small(mode=mode)
        assert layer.key_weight is None
        assert layer.query_bias is None
        torch.testing.assert_close(layer.project_query(x), layer.project_key(x))
        # The same tensors, or equal ones.
        torch.testing.assert_close(mean_of(layer, x, x, x), mean_of(layer, x, x.clone(), x.clone()))
        torch.testing.assert_close(mean_of(layer, x, y, y), mean_of(layer, x, y, y.clone()))
    assert small(mode="residual").key_weight is not None


def test_without_biases():
    for mode in MODES:
        layer = small(mode=mode, bias=False)
        assert not [name for name, _ in layer.named_parameters() if "bias" in name]
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        assert layer(x, x, x)[0].isfinite().all()


@every_mean
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_boolean_and_floating_masks_are_the_same(options, cross):
    layer = small(**options)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = torch.randn(3, 5, 8, dtype=torch.float64) if cross else x
    padding = torch.tensor([[0, 0, 0, 0, 1], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()

    def floating(mask):
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)

    future = torch.ones(5, 5).triu(1).bool()
    for rows in (None, future, torch.rand(5, 5) < 0.4, torch.rand(6, 5, 5) < 0.4):
        for keys in (None, padding):
            want = mean_of(layer, x, y, y, keys, attn_mask=rows)
            cost = layer.kl_divergence()
            rows_f, keys_f = (None if m is None else floating(m) for m in (rows, keys))
            torch.testing.assert_close(mean_of(layer, x, y, y, keys_f, attn_mask=rows_f), want, rtol=0, atol=0)
            torch.testing.assert_close(layer.kl_divergence(), cost, rtol=0, atol=0)
            for kind in (torch.float32, torch.float16):
                half = mean_of(layer, x, y, y, None if keys is None else keys_f.to(kind), attn_mask=rows_f)
                torch.testing.assert_close(half, want, rtol=0, atol=0)


@every_mean
def test_masks_of_heads_and_of_sequences(options):
    layer = small(**options)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    rows = torch.rand(5, 5) < 0.4
    one, each = mean_of(layer, x, x, x, attn_mask=rows), mean_of(layer, x, x, x, attn_mask=rows.expand(6, 5, 5))
    torch.testing.assert_close(each, one)
    masks = torch.rand(3, 2, 5, 5) < 0.4
    together = mean_of(layer, x, x, x, attn_mask=masks.flatten(0, 1))
    apart = torch.cat([mean_of(layer, s, s, s, attn_mask=m) for s, m in zip(x.split(1), masks, strict=True)])
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(mean_of(layer, x[1], x[1], x[1], attn_mask=masks[1]), together[1])


@every_mean
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_is_causal_is_the_causal_mask(options, cross):
    layer = small(**options)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = torch.randn(3, 5, 8, dtype=torch.float64) if cross else x
    future = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    for keys in (None, padding):
        for given in (None, future, future.bool()):
            for is_causal in (True, False):
                if given is None and not is_causal:
                    continue
                layer.sampling = "mean"
                out, weights = layer(x, y, y, keys, attn_mask=given, is_causal=is_causal)
                cost = layer.kl_divergence()
                want = layer(x, y, y, keys, attn_mask=future)
                torch.testing.assert_close(out, want[0])
                torch.testing.assert_close(weights, want[1])
                torch.testing.assert_close(cost, layer.kl_divergence())
                assert weights.triu(1).eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add_bias_kv": True}, "add_bias_kv: expected False"),
        ({"add_zero_attn": True}, "add_zero_attn: expected False"),
        ({"embed_dim": 9}, "embed_dim: expected a multiple of num_heads = 2, got 9"),
        ({"embed_dim": 0}, "embed_dim: expected at least 1"),
        ({"num_heads": 0}, "num_heads: expected at least 1"),
        ({"num_inducing": 0}, "num_inducing: expected at least 1"),
        ({"rank": 0}, "rank: expected at least 1"),
        ({"dropout": 1.0}, r"dropout: expected a number in [0, 1), got 1.0"),
        ({"dropout": -0.1}, r"dropout: expected a number in [0, 1), got -0.1"),
        ({"dropout": float("nan")}, r"dropout: expected a number in [0, 1), got nan"),
        ({"kdim": 0}, "kdim: expected at least 1"),
        ({"vdim": 0}, "vdim: expected at least 1"),
        ({"kernel": "matern"}, "kernel: expected one of 'rbf', 'exponential', got 'matern'"),
        ({"mode": "softmax"}, "mode: expected one of"),
        ({"covariance": "full"}, "covariance: expected one of"),
        ({"sampling": "none"}, "sampling: expected one of"),
        ({"form": "dual"}, "form: expected one of"),
        ({"inducing_space": "latent"}, "inducing_space: expected one of"),
        ({"value_scale": "sqrt"}, "value_scale: expected one of"),
        ({"mode": "residual", "form": "orthogonal"}, "form: expected None in mode 'residual'"),
        ({"mode": "residual", "value_scale": "length"}, "value_scale: expected None in mode 'residual'"),
        ({"mode": "softmax_kernel", "value_scale": "length"}, "value_scale: expected None in mode 'softmax_kernel'"),
        ({"jitter": -1.0}, "jitter: expected a relative number in [0, 1)"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SGPAttention(**{"embed_dim": 8, "num_heads": 2, **options})


def test_counts_are_integers():
    for name in ("embed_dim", "num_heads", "num_inducing", "rank", "kdim", "vdim"):
        with pytest.raises(TypeError, match=f"{name}: expected an integer, got 4.0"):
            SGPAttention(**{"embed_dim": 8, "num_heads": 2, name: 4.0})
    layer = small()
    with pytest.raises(TypeError, match="num_samples: expected an integer"):
        layer.num_samples = 1.5
    with pytest.raises(ValueError, match="sampling: expected one of"):
        layer.sampling = "Marginal"
    assert (layer.num_samples, layer.sampling) == (1, "marginal")


def _inputs(**changes: Any) -> dict[str, Any]:
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    inputs = {"query": x, "key": x, "value": x, **changes}
    return inputs


NAN = torch.full((3, 5, 8), torch.nan, dtype=torch.float64)
BAD_CALLS = [
    (
        {"query": torch.randn(3, 5, 7)},
        TypeError,
        "query: expected the dtype of the layer, torch.float64",
    ),
    ({"query": torch.randn(3, 5, 7).double()}, ValueError, "query: expected shape (tokens, 8)"),
    ({"query": torch.randn(8).double()}, ValueError, "query: expected shape (tokens, 8)"),
    ({"query": torch.ones(3, 5, 8).long()}, TypeError, "query: expected a floating-point tensor, got torch.int64"),
    ({"query": [[1.0]]}, TypeError, "query: expected a floating-point tensor, got list"),
    ({"key": torch.randn(3, 5, 6).double()}, ValueError, "key: expected shape (tokens, 8)"),
    ({"key": torch.randn(5, 8).double()}, ValueError, "key: expected 3 dimensions as query has"),
    ({"key": torch.randn(2, 5, 8).double()}, ValueError, "key: expected a batch of 3 as query has, got 2"),
    (
        {"value": torch.randn(3, 4, 8).double()},
        ValueError,
        "value: expected batch and tokens (3, 5) of key",
    ),
    ({"value": NAN}, ValueError, "value: expected finite numbers, got NaN or infinity in shape (3, 5, 8)"),
    ({"key": NAN}, ValueError, "key: expected finite numbers"),
    ({"query": NAN}, ValueError, "query: expected finite numbers"),
    ({"query": -torch.inf * torch.ones(3, 5, 8).double()}, ValueError, "query: expected finite numbers"),
    ({"query": torch.randn(3, 0, 8).double()}, ValueError, "query: expected at least one token, got none"),
    (
        {"key": torch.randn(3, 0, 8).double(), "value": torch.randn(3, 0, 8).double()},
        ValueError,
        "key: expected at least one token, got none",
    ),
    ({"key_padding_mask": torch.zeros(3, 4).bool()}, ValueError, "key_padding_mask: expected a shape"),
    ({"key_padding_mask": torch.zeros(5).bool()}, ValueError, "key_padding_mask: expected shape (3, 5), got (5,)"),
    ({"key_padding_mask": torch.zeros(5, 3).bool()}, ValueError, "key_padding_mask: expected a shape"),
    ({"key_padding_mask": torch.zeros(3, 5).long()}, TypeError, "key_padding_mask: expected a boolean or floating"),
    (
        {"key_padding_mask": [True]},
        TypeError,
        "key_padding_mask: expected a boolean or floating",
    ),
    (
        {"key_padding_mask": torch.full((3, 5), torch.nan)},
        ValueError,
        "key_padding_mask: expected finite numbers",
    ),
    (
        {"key_padding_mask": torch.full((3, 5), torch.inf)},
        ValueError,
        "key_padding_mask: expected finite numbers",
    ),
    ({"attn_mask": torch.zeros(5, 4).bool()}, ValueError, "attn_mask: expected shape (5, 5) or (6, 5, 5), got (5, 4)"),
    ({"attn_mask": torch.zeros(3, 5, 5).bool()}, ValueError, "attn_mask: expected shape (5, 5) or (6, 5, 5)"),
    ({"attn_mask": torch.zeros(5).bool()}, ValueError, "attn_mask: expected shape (5, 5) or (6, 5, 5), got (5,)"),
    ({"attn_mask": torch.zeros(5, 5).int()}, TypeError, "attn_mask: expected a boolean or floating-point tensor"),
    ({"attn_mask": "causal"}, TypeError, "attn_mask: expected a boolean or floating-point tensor, got str"),
    ({"attn_mask": torch.full((5, 5), torch.nan)}, ValueError, "attn_mask: expected finite numbers or -inf"),
    ({"attn_mask": torch.full((5, 5), torch.inf)}, ValueError, "attn_mask: expected finite numbers or -inf"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS)
def test_bad_calls_name_the_argument_and_change_nothing(changes, error, message):
    layer = small(dropout=0.1)
    layer(**_inputs())
    before, inputs, state = layer.kl_divergence(), _inputs(**changes), torch.get_rng_state()
    for call in (layer, layer.posterior, layer.conditional):
        with pytest.raises(error, match=re.escape(message)):
            call(**inputs)
    assert layer.kl_divergence().equal(before)
    assert torch.get_rng_state().equal(state)


def test_bad_calls_without_a_batch_and_across():
    layer = small()
    x, y = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="key_padding_mask: expected one dimension for inputs without a batch"):
        layer(x, x, x, torch.zeros(1, 5).bool())
    with pytest.raises(ValueError, match="is_causal: expected as many queries as keys without an attn_mask"):
        layer(x.expand(3, 5, 8), y, y, is_causal=True)
    out, _ = layer(x.expand(3, 5, 8), y, y, attn_mask=torch.ones(5, 4).triu(1).bool(), is_causal=True)
    assert out.shape == (3, 5, 8)


def test_a_floating_mask_need_not_leave_a_posterior():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    bias = torch.randn(5, 5, dtype=torch.float64)
    for mode in ("sgpa", "softmax_kernel"):
        with pytest.raises(ValueError, match="attn_mask: expected 0 and -inf only in a floating mask"):
            small(mode=mode)(x, x, x, attn_mask=bias)
        layer = small(mode=mode, allow_indefinite=True)
        plain = mean_of(layer, x, x, x)
        assert (mean_of(layer, x, x, x, attn_mask=bias) - plain).abs().max() > 1e-3
        # A bias on a key alone is a factor of its value.
        assert small(mode=mode)(x, x, x, torch.randn(2, 5))[0].isfinite().all()
    assert small(mode="residual")(x, x, x, attn_mask=bias)[0].isfinite().all()


@every_mean
@pytest.mark.parametrize("sampling", SAMPLING)
def test_legal_edges(options, sampling):
    layer = small(**options, sampling=sampling)
    for batch, length in ((1, 1), (2, 1), (1, 2), (0, 4), (3, 4)):
        x = torch.randn(batch, length, 8, dtype=torch.float64, requires_grad=True)
        for mask in (None, torch.ones(batch, length).bool()):
            out, weights = layer(x, x, x, mask)
            assert out.shape == (batch, length, 8)
            assert weights.shape == (batch, length, length)
            (out.sum() + weights.sum() + layer.kl_divergence(num_data=10)).backward()
            assert out.isfinite().all()
            assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
            assert x.grad.isfinite().all()


@every_mean
def test_a_sequence_without_keys_has_the_mean_of_the_inducing_keys(options):
    layer = small(**options)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    y = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [False] * 6])
    out = mean_of(layer, x, y, y, mask)
    with torch.no_grad():
        layer.value_weight.normal_()
        layer.value_bias.normal_()
    again = mean_of(layer, x, y, y, mask)
    torch.testing.assert_close(out[0], again[0])
    assert (out[1] - again[1]).abs().max() > 1e-3
    for rows in (torch.ones(4, 6).bool(), torch.zeros(4, 6).masked_fill(torch.ones(4, 6).bool(), -torch.inf)):
        torch.testing.assert_close(mean_of(layer, x, y, y, attn_mask=rows)[0], out[0])


def test_attributes_and_repr():
    layer = small(mode="residual")
    assert isinstance(layer, nn.Module)
    assert not isinstance(layer, nn.MultiheadAttention)
    assert (layer.embed_dim, layer.num_heads, layer.head_dim, layer.kdim, layer.vdim) == (8, 2, 4, 8, 8)
    assert "mode='residual'" in repr(layer)
    assert "embed_dim=8, num_heads=2" in repr(layer)
    assert all(parameter.dim() > 0 for parameter in layer.parameters())


def test_dropout_drops_keys_in_training_only():
    layer = small(dropout=0.5, sampling="mean", value_scale=None)
    x = torch.randn(1, 2000, 8, dtype=torch.float64)
    value = layer.project_value(x)
    dropped = value.eq(0).all(-1)
    assert 0.45 < dropped.double().mean() < 0.55
    torch.testing.assert_close(value[~dropped], 2 * layer.eval().project_value(x)[~dropped])
    short = x[:, :5]
    assert layer(short, short, short)[0].equal(layer(short, short, short)[0])
    layer.train()
    assert not layer(short, short, short)[0].equal(layer(short, short, short)[0])
