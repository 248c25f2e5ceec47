"""SGPAttention inside torch's own transformers: never skipped, and as right as alone."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import nn

from gpseq.nn import SGPAttention, kl_divergence, use_generator
from tests.layers import MODES, move, small

PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
FUTURE = nn.Transformer.generate_square_subsequent_mask(5)
WIDTHS = {"dim_feedforward": 8, "dropout": 0.0}


def encoder_layer(batch_first: bool = True, norm_first: bool = False, **options) -> nn.TransformerEncoderLayer:
    host = nn.TransformerEncoderLayer(8, 2, batch_first=batch_first, norm_first=norm_first, **WIDTHS)
    host.self_attn = small(torch.float32, batch_first=batch_first, **options)
    return host


def decoder_layer(batch_first: bool = True, **options) -> nn.TransformerDecoderLayer:
    host = nn.TransformerDecoderLayer(8, 2, batch_first=batch_first, **WIDTHS)
    host.self_attn = small(torch.float32, batch_first=batch_first, **options)
    host.multihead_attn = small(torch.float32, batch_first=batch_first, **options)
    return host


def encoder(depth: int = 2, **options) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(encoder_layer(**options), depth, enable_nested_tensor=False)


def count_calls(model: nn.Module) -> list[int]:
    """One number for each layer, which goes up at each call."""
    layers = [m for m in model.modules() if isinstance(m, SGPAttention)]
    counts = [0] * len(layers)
    for index, layer in enumerate(layers):
        # On the instance, where no code of the host can see it: hooks would switch its short cuts off.
        layer.attend = _counted(layer.attend, counts, index)
    return counts


def _counted(method, counts, index):
    def call(*inputs):
        counts[index] += 1
        return method(*inputs)

    return call


HOSTS = {
    "encoder layer": lambda **o: encoder_layer(**o),
    "encoder layer, norm first": lambda **o: encoder_layer(norm_first=True, **o),
    "encoder layer, batch second": lambda **o: encoder_layer(batch_first=False, **o),
    "encoder": lambda **o: encoder(**o),
    "decoder layer": lambda **o: decoder_layer(**o),
    "decoder": lambda **o: nn.TransformerDecoder(decoder_layer(**o), 2),
    "transformer": lambda **o: nn.Transformer(
        8,
        2,
        batch_first=True,
        custom_encoder=encoder(**o),
        custom_decoder=nn.TransformerDecoder(decoder_layer(**o), 2),
    ),
}


def call(name: str, host: nn.Module, x: torch.Tensor, padding: bool, causal: bool) -> torch.Tensor:
    """Run any of the hosts, on the same sequence in every place."""
    mask, keys = FUTURE if causal else None, PADDING if padding else None
    if name == "transformer":
        return host(x, x, mask, mask, None, keys, keys, keys, src_is_causal=causal, tgt_is_causal=causal)
    if name.startswith("decoder"):
        return host(x, x, mask, None, keys, keys, tgt_is_causal=causal)
    if name == "encoder":
        return host(x, mask, keys, is_causal=causal)
    return host(x, mask, keys, is_causal=causal)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("name", HOSTS)
def test_never_skipped_and_draws_anew(name):
    for mode, padding, causal in product(MODES, (False, True), (False, True)):
        if mode != "sgpa" and not (padding and causal):
            continue
        host = HOSTS[name](mode=mode)
        counts = count_calls(host)
        x = torch.randn(5, 3, 8) if name.endswith("second") else torch.randn(3, 5, 8)
        calls = 0
        for train, grad in product((True, False), (True, False)):
            host.train(train)
            with nullcontext() if grad else torch.no_grad():
                first, second = call(name, host, x, padding, causal), call(name, host, x, padding, causal)
                calls += 2
                assert counts == [calls] * len(counts)
                kept = ~PADDING if padding else torch.ones(3, 5).bool()
                kept = kept.mT if name.endswith("second") else kept
                assert first.isfinite().all()
                assert first[kept].ne(second[kept]).any(-1).all()
                torch.manual_seed(7)
                one = call(name, host, x, padding, causal)
                torch.manual_seed(7)
                assert call(name, host, x, padding, causal).equal(one)
                with use_generator(host, torch.Generator().manual_seed(3)):
                    one = call(name, host, x, padding, causal)
                with use_generator(host, torch.Generator().manual_seed(3)):
                    assert call(name, host, x, padding, causal).equal(one)
                calls += 4
                assert first.requires_grad == grad
        assert kl_divergence(host, num_data=10).isfinite()


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("name", HOSTS)
def test_padding_and_the_future_do_not_leak(name):
    for mode in MODES:
        host = HOSTS[name](mode=mode, sampling="mean").eval()
        second = name.endswith("second")
        x = torch.randn(3, 5, 8)
        layout = x.transpose(0, 1) if second else x
        with torch.no_grad():
            out = call(name, host, layout, True, False)
            out = out.transpose(0, 1) if second else out
            changed = x.masked_fill(PADDING.unsqueeze(-1), 9.0)
            again = call(name, host, changed.transpose(0, 1) if second else changed, True, False)
            again = again.transpose(0, 1) if second else again
            torch.testing.assert_close(again[~PADDING], out[~PADDING])
        if "decoder" in name or name == "transformer":
            continue  # their memory is the whole sequence
        x.requires_grad_()
        out = call(name, host, x.transpose(0, 1) if second else x, False, True)
        out = out.transpose(0, 1) if second else out
        (grad,) = torch.autograd.grad(out[:, 2].square().sum(), x)
        assert grad[:, 3:].eq(0).all()
        assert grad[:, :3].ne(0).any(-1).all()


def test_the_target_of_a_decoder_does_not_see_its_future():
    for mode in MODES:
        host = nn.TransformerDecoder(decoder_layer(mode=mode, sampling="mean"), 2)
        target, memory = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 4, 8)
        padding = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
        out = host(target, memory, FUTURE, memory_key_padding_mask=padding)
        (grad,) = torch.autograd.grad(out[:, 2].square().sum(), target)
        assert grad[:, 3:].eq(0).all()
        changed = memory.masked_fill(padding.unsqueeze(-1), 9.0)
        assert host(target, changed, FUTURE, memory_key_padding_mask=padding).equal(out)
        short = host(target[:1, :3], memory[:1, :3], FUTURE[:3, :3])
        torch.testing.assert_close(short, out[:1, :3])


def test_an_encoder_with_nested_tensors_asked_for_says_that_it_has_none():
    with pytest.warns(UserWarning, match="use_nested_tensor is False because .*_qkv_same_embed_dim"):
        host = nn.TransformerEncoder(encoder_layer(), 1)
    counts = count_calls(host.eval())
    with torch.no_grad():
        host(torch.randn(3, 5, 8), src_key_padding_mask=PADDING)
    assert counts == [1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("replaced", [(0,), (1,), (0, 1)], ids=str)
def test_an_encoder_that_was_built_for_nested_tensors(replaced):
    stock = nn.TransformerEncoderLayer(8, 2, batch_first=True, **WIDTHS)
    host = nn.TransformerEncoder(stock, 2)
    assert host.use_nested_tensor
    for index in replaced:
        host.layers[index].self_attn = small(torch.float32, sampling="mean")
    counts = count_calls(host.eval())
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        out = host(x, src_key_padding_mask=PADDING)
        assert counts == [1] * len(replaced)
        nested = kl_divergence(host)
        host.use_nested_tensor = False
        want = host(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(nested, kl_divergence(host))
    torch.testing.assert_close(out[~PADDING], want[~PADDING])
    host.use_nested_tensor = True
    torch.testing.assert_close(host(x, src_key_padding_mask=PADDING)[~PADDING], want[~PADDING])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_in_self_attention_only():
    layer = small(torch.float32)
    pieces = [torch.randn(4, 8), torch.randn(2, 8)]
    x = torch.nested.nested_tensor(pieces, requires_grad=True)
    layer.sampling = "mean"
    out, weights = layer(x, x, x, need_weights=False)
    assert weights is None
    for got, piece in zip(out.unbind(), pieces, strict=True):
        torch.testing.assert_close(got, layer(piece, piece, piece)[0])
    out.to_padded_tensor(0.0).square().sum().backward()
    assert layer.query_weight.grad.ne(0).any()
    with pytest.raises(ValueError, match="query: expected a padded tensor"):
        layer(x, x, x)
    with pytest.raises(ValueError, match="query: expected a padded tensor"):
        layer(x, torch.nested.nested_tensor(pieces), x, need_weights=False)
    with pytest.raises(ValueError, match="query: expected a padded tensor with a mask, got a nested one"):
        layer(x, x, x, torch.zeros(2, 4).bool(), need_weights=False)


def test_copies_of_a_stack_can_be_drawn_anew():
    host = encoder(depth=2)
    first, second = (layer.self_attn for layer in host.layers)
    assert first.inducing.location.equal(second.inducing.location)
    second.reset_parameters()
    assert not first.inducing.location.equal(second.inducing.location)
    move(second)
    assert kl_divergence(host.train()(torch.randn(3, 5, 8)) is not None and host).isfinite()


def test_a_stack_learns():
    host, readout = encoder(depth=2, moved=False), nn.Linear(8, 1)
    x = torch.randn(32, 5, 8)
    y = x.mean((1, 2), keepdim=True).squeeze(-1).mul(5).tanh()
    optimiser = torch.optim.Adam([*host.parameters(), *readout.parameters()], 1e-2)
    losses = []
    for _ in range(60):
        error = (readout(host(x).mean(1)) - y).square().mean()
        loss = error + 1e-2 * kl_divergence(host, num_data=32) / 32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(error.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
