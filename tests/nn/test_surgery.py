"""replace_attention on torch's attention: the same function at the start, everywhere, and never half done."""

import copy
import re
from itertools import product

import pytest
import torch
from torch import nn

from gpseq.nn import RFFAttention, SGPAttention, kl_divergence, replace_attention
from gpseq.nn.conversion import ConversionWarning
from gpseq.nn.surgery import Host, is_replaced, register_host, swap
from tests.layers import trained_attention

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
FUTURE = torch.ones(5, 5).triu(1).bool()


def float_mask(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def masks(dtype):
    """Every kind of mask that leaves each query a key."""
    any_pairs = torch.rand(6, 5, 5).lt(0.4) & ~torch.eye(5).bool()
    yield {}
    yield {"key_padding_mask": PADDING}
    yield {"key_padding_mask": float_mask(PADDING, dtype)}
    yield {"attn_mask": FUTURE}
    yield {"attn_mask": float_mask(FUTURE, dtype), "is_causal": True}
    yield {"attn_mask": float_mask(FUTURE, dtype), "key_padding_mask": float_mask(PADDING, dtype)}
    yield {"attn_mask": any_pairs}
    yield {"attn_mask": torch.randn(5, 5, dtype=dtype)}
    yield {"attn_mask": torch.randn(6, 5, 5, dtype=dtype), "key_padding_mask": float_mask(PADDING, dtype)}


def stack(depth=2, dtype=torch.float32, norm_first=False, batch_first=True):
    layer = nn.TransformerEncoderLayer(
        8, 2, dim_feedforward=8, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=dtype
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=batch_first and not norm_first)


def decoder(depth=2):
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, dim_feedforward=8, dropout=0.0), depth)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 7}, {"kdim": 8, "vdim": 3}], ids=str)
def test_one_attention_is_the_same_function_under_every_mask(options, dtype):
    old = trained_attention(dtype, **options)
    new = replace_attention(copy.deepcopy(old), num_inducing=3, sampling="mean")
    assert isinstance(new, SGPAttention)
    x = torch.randn(3, 5, 8, dtype=dtype)
    key = torch.randn(3, 5, old.kdim, dtype=dtype) if "kdim" in options else x
    value = torch.randn(3, 5, old.vdim, dtype=dtype) if "vdim" in options else x
    for mask in masks(dtype):
        want, weights = old(x, key, value, **mask)
        got, mine = new(x, key, value, **mask)
        kept = ~PADDING if "key_padding_mask" in mask and key is x else torch.ones(3, 5).bool()
        torch.testing.assert_close(got[kept], want[kept], rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(mine[kept], weights[kept], rtol=0, atol=TOLERANCE[dtype])
        fast = new(x, key, value, need_weights=False, **mask)[0]
        torch.testing.assert_close(fast[kept], want[kept], rtol=0, atol=TOLERANCE[dtype])
    assert new.kl_divergence() == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_is_the_same_function(dtype, norm_first, batch_first):
    old = stack(2, dtype, norm_first, batch_first).eval()
    x = torch.randn(3, 5, 8, dtype=dtype) if batch_first else torch.randn(5, 3, 8, dtype=dtype)
    cases = list(product((None, FUTURE), (None, PADDING)))
    kept = ~PADDING if batch_first else ~PADDING.mT
    with torch.no_grad():
        want = [old(x, mask, padding) for mask, padding in cases]
        new = replace_attention(old, num_inducing=3, sampling="mean")
        assert new is old
        assert not old.use_nested_tensor
        for (mask, padding), result in zip(cases, want, strict=True):
            torch.testing.assert_close(new(x, mask, padding)[kept], result[kept], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_a_whole_transformer_is_the_same_function(dtype):
    model = nn.Transformer(8, 2, 2, 2, 8, dropout=0.0, batch_first=True, dtype=dtype).eval()
    source, target = torch.randn(3, 5, 8, dtype=dtype), torch.randn(3, 5, 8, dtype=dtype)

    def run():
        with torch.no_grad():
            return model(source, target, None, FUTURE, None, PADDING, PADDING, PADDING)[~PADDING]

    want = run()
    replace_attention(model, num_inducing=3, sampling="mean")
    assert sum(isinstance(module, SGPAttention) for module in model.modules()) == 6
    torch.testing.assert_close(run(), want, rtol=0, atol=TOLERANCE[dtype])


def test_every_layer_is_called_and_draws_in_train_and_eval():
    model = replace_attention(stack(), num_inducing=3)
    calls = []
    for layer in model.layers:
        attend = layer.self_attn.attend
        layer.self_attn.attend = lambda tokens, attend=attend: calls.append(1) or attend(tokens)
    x = torch.randn(3, 5, 8)
    for training, grad, padding in product((True, False), (True, False), (None, PADDING)):
        model.train(training)
        calls.clear()
        with torch.set_grad_enabled(grad):
            first, second = (model(x, src_key_padding_mask=padding) for _ in range(2))
        assert len(calls) == 4
        assert first[~PADDING].ne(second[~PADDING]).any(-1).all()
        assert (first - second).abs().max() < 0.5  # the noise is small at the start
    assert kl_divergence(model, num_data=10) == 0


def test_what_is_kept():
    model = stack(3, torch.float64)
    model.layers[1].self_attn.in_proj_weight.requires_grad_(False)
    model.layers[1].eval()
    model.layers[2].self_attn.in_proj_bias.requires_grad_(False)
    model.layers[2].self_attn.dropout = 0.25
    outs = [layer.self_attn.out_proj for layer in model.layers]
    replace_attention(model)
    new = [layer.self_attn for layer in model.layers]
    assert all(layer.out_proj is out for layer, out in zip(new, outs, strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert [layer.training for layer in new] == [True, False, True]
    assert new[0].query_weight.requires_grad
    assert not any(weight.requires_grad for weight in (new[1].query_weight, new[1].key_weight, new[1].value_weight))
    assert new[1].query_bias.requires_grad
    assert not any(bias.requires_grad for bias in (new[2].query_bias, new[2].key_bias, new[2].value_bias))
    assert all(p.requires_grad for layer in new for p in layer.inducing.parameters())
    assert [layer.dropout for layer in new] == [0.0, 0.0, 0.25]
    assert not new[0].inducing.location.equal(new[1].inducing.location)
    separate = nn.MultiheadAttention(8, 2, kdim=6, vdim=7)
    separate.k_proj_weight.requires_grad_(False)
    layer = replace_attention(separate)
    flags = [weight.requires_grad for weight in (layer.query_weight, layer.key_weight, layer.value_weight)]
    assert flags == [True, False, True]


def test_on_the_meta_device():
    with torch.device("meta"):
        model = stack(1)
    replace_attention(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_frozen_backbone_trains_its_gaussian_processes():
    model = stack().requires_grad_(False)
    replace_attention(model, num_inducing=3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".inducing." in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    x, y = torch.randn(8, 5, 8), torch.randn(8, 5, 8)
    for _ in range(3):
        loss = (model(x) - y).square().mean() + kl_divergence(model, num_data=8) / 8
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert changed == trained
    assert kl_divergence(model, num_data=8) > 0


CHOICES = {
    "all": [0, 1, 2],
    "last": [2],
    "layers.1.*": [1],
    "*.[02].*": [0, 2],
    "layers.?.self_attn": [0, 1, 2],
    re.compile(r"[12]\.self"): [1, 2],
    ("*.0.self_attn", "*.2.*"): [0, 2],
}


@pytest.mark.parametrize(("layers", "chosen"), CHOICES.items(), ids=map(str, CHOICES))
def test_which_layers(layers, chosen):
    model = replace_attention(stack(3), layers)
    assert [i for i, layer in enumerate(model.layers) if isinstance(layer.self_attn, SGPAttention)] == chosen
    assert model(torch.randn(3, 5, 8), src_key_padding_mask=PADDING).isfinite().all()


def test_the_last_layer_of_a_decoder_is_its_last_attention():
    model = replace_attention(decoder(), "last")
    replaced = [name for name, module in model.named_modules() if is_replaced(module)]
    assert replaced == ["layers.1.multihead_attn"]
    replace_attention(model, "*self_attn")
    replaced = [name for name, module in model.named_modules() if is_replaced(module)]
    assert replaced == ["layers.0.self_attn", "layers.1.self_attn", "layers.1.multihead_attn"]


def test_a_layer_that_stands_in_two_places_stays_one():
    shared = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8)
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": attention, "d": attention})
    replace_attention(model)
    assert model["a"].self_attn is model["b"][0].self_attn
    assert isinstance(model["d"], SGPAttention)
    assert model["c"] is model["d"]


@pytest.mark.parametrize("mode", ["sgpa", "softmax_kernel"])
def test_the_modes_that_convert_say_what_is_lost(mode):
    model = stack()
    with pytest.warns(ConversionWarning, match="of their Frobenius norm .* is discarded"):
        replace_attention(model, mode=mode, num_inducing=3)
    x = torch.randn(3, 5, 8)
    loss = model(x, src_key_padding_mask=PADDING).square().mean() + kl_divergence(model, num_data=9) / 9
    loss.backward()
    assert all(layer.self_attn.query_weight.grad.isfinite().all() for layer in model.layers)


def state(model):
    return {name: (type(module), id(module)) for name, module in model.named_modules()}


class Attention(nn.Module):
    """Of a kind that nobody knows."""


class Twice(nn.MultiheadAttention):
    """A subclass may do anything."""


REFUSED = {
    "no attention": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        {},
        "model: expected attention to replace.* got none among modules of types Linear, ReLU, Sequential",
    ),
    "unknown kinds only": (lambda: nn.Sequential(Attention(), Twice(8, 2)), {}, r"got 0 \(Attention\), 1 \(Twice\)"),
    "one unknown kind": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2), Attention()),
        {},
        r"'all' expects attention of known kinds only, got 1 \(Attention\); give a pattern for .* of '0'",
    ),
    "pattern without a match": (stack, {"layers": "*.7.*"}, "got '\\*.7.\\*', which matches nothing"),
    "pattern for something else": (
        stack,
        {"layers": "layers.1"},
        r"of 'layers.0.self_attn', 'layers.1.self_attn', got 'layers.1', "
        r"which matches layers.1 \(TransformerEncoderLayer\) only",
    ),
    "one of the patterns": (stack, {"layers": ["*.0.*", "*linear3"]}, "got '\\*linear3', which matches nothing"),
    "regular expression": (stack, {"layers": re.compile("norm")}, "which matches layers.0.norm1 .LayerNorm."),
    "bias of keys": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, add_bias_kv=True)),
        {},
        "1: attention: expected one without keys that have no token, got add_bias_kv=True",
    ),
    "zero key": (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), {}, "model: .* got add_zero_attn=True"),
    "unknown mode": (stack, {"mode": "posterior"}, "mode: expected one of 'sgpa', 'residual', 'softmax_kernel'"),
    "unknown kernel": (stack, {"kernel": "matern"}, "kernel: expected one of"),
    "width by hand": (stack, {"embed_dim": 8}, "embed_dim: expected what the trained attention has, got 8"),
    "no inducing keys": (stack, {"num_inducing": 0}, "num_inducing: expected at least 1"),
}


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_call_changes_nothing(make, options, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        replace_attention(model, **options)
    assert state(model) == before


def test_bad_types():
    with pytest.raises(TypeError, match="model: expected a torch module, got int"):
        replace_attention(3)
    for layers in (1, [], [1], None):
        with pytest.raises(TypeError, match="layers: expected 'all', 'last', a pattern"):
            replace_attention(stack(), layers)
    with pytest.raises(TypeError, match="colour"):
        replace_attention(stack(), colour="red")


def test_a_second_replacement_of_the_same_layer():
    model = replace_attention(stack(3), "*.1.*")
    before = state(model)
    for layers in ("all", "*", "layers.1.self_attn"):
        with pytest.raises(ValueError, match=r"were not replaced before, got 'layers.1.self_attn'; a pattern names"):
            replace_attention(model, layers)
    assert state(model) == before
    replace_attention(model, "*.[02].*")
    with pytest.raises(ValueError, match=r"got none .* 'layers.0.self_attn', .* replaced before"):
        replace_attention(model)
    with pytest.raises(ValueError, match="the model itself replaced before"):
        replace_attention(RFFAttention(8, 2))


def test_a_pattern_takes_what_is_known_beside_what_is_not():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), Attention())
    assert isinstance(replace_attention(model, "*")[0], SGPAttention)
    wrapped = nn.Sequential(Attention())
    wrapped[0].inner = nn.MultiheadAttention(8, 2)
    replace_attention(wrapped)  # a wrapper of what is known is no unknown kind
    assert isinstance(wrapped[0].inner, SGPAttention)


def test_another_host_can_be_taught(monkeypatch):
    from gpseq.nn import surgery

    monkeypatch.setattr(surgery, "_HOSTS", dict(surgery._HOSTS))
    made = SGPAttention(8, 2)
    asked = {}

    def prepare(model, found, options):
        asked.update(options)
        return lambda root: swap(root, dict.fromkeys(found.values(), made))

    register_host(Host("mine", lambda module: type(module) is Attention, prepare))
    model = nn.Sequential(Attention(), nn.MultiheadAttention(8, 2))
    assert replace_attention(model, num_inducing=5)[0] is made
    assert asked == {"mode": "residual", "num_inducing": 5}
    assert isinstance(model[1], SGPAttention)


def test_models_whose_door_is_closed_say_which(monkeypatch):
    from gpseq.nn import surgery

    monkeypatch.setattr(surgery, "_HOSTS", {"torch": surgery._HOSTS["torch"]})
    for home, door in (("transformers.models.bert", "huggingface"), ("timm.layers", "timm")):
        kind = type("SelfAttention", (nn.Module,), {"__module__": home})
        with pytest.raises(ValueError, match=f"Did you import gpseq.integrations.{door}"):
            replace_attention(nn.Sequential(kind()))


def test_replaced_models_are_saved_copied_and_loaded():
    model = replace_attention(stack(), num_inducing=3, sampling="mean")
    x = torch.randn(3, 5, 8)
    out = model(x)
    assert copy.deepcopy(model)(x).equal(out)
    other = replace_attention(stack(), num_inducing=3, sampling="mean")
    other.load_state_dict(model.state_dict())
    assert other(x).equal(out)
