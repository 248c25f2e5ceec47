"""Torch's encoder with GP attention built in."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpseq.nn import SGPATransformerEncoder, SGPATransformerEncoderLayer, SGPAttention, kl_divergence, use_generator
from tests.layers import MODES

PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
FUTURE = torch.ones(5, 5).triu(1).bool()


def layer(**options) -> SGPATransformerEncoderLayer:
    return SGPATransformerEncoderLayer(8, 2, **{"dim_feedforward": 8, "dropout": 0.0, "num_inducing": 3, **options})


def test_it_is_torchs_layer_with_another_attention(dtype):
    for batch_first, norm_first, bias in product((True, False), (True, False), (True, False)):
        mine = layer(
            batch_first=batch_first, norm_first=norm_first, bias=bias, dtype=dtype, sampling="mean", activation=F.gelu
        )
        stock = nn.TransformerEncoderLayer(
            8, 2, 8, 0.0, F.gelu, batch_first=batch_first, norm_first=norm_first, bias=bias, dtype=dtype
        )
        stock.self_attn = copy.deepcopy(mine.self_attn)
        stock.load_state_dict(mine.state_dict())
        x = torch.randn(3, 5, 8, dtype=dtype) if batch_first else torch.randn(5, 3, 8, dtype=dtype)
        for training, mask, padding in product((True, False), (None, FUTURE), (None, PADDING)):
            got, want = (host.train(training)(x, mask, padding) for host in (mine, stock))
            assert got.equal(want)
        assert mine.kl_divergence().equal(mine.self_attn.kl_divergence())


def test_options_reach_the_attention():
    attention = layer(kernel="exponential", covariance="diagonal", mode="residual", bias=False, dropout=0.2).self_attn
    assert isinstance(attention, SGPAttention)
    assert (attention.kernel, attention.covariance, attention.mode) == ("exponential", "diagonal", "residual")
    assert attention.out_proj.bias is None
    assert attention.dropout == 0.2
    assert attention.inducing.location.shape == (2, 3, 8)
    with pytest.raises(ValueError, match="kernel: expected one of"):
        layer(kernel="matern")


@pytest.mark.parametrize("mode", MODES)
def test_a_stack_draws_and_leaks_nothing(mode):
    model = SGPATransformerEncoder(layer(mode=mode, batch_first=True), 2, norm=nn.LayerNorm(8))
    x = torch.randn(3, 5, 8)
    for training, grad in product((True, False), (True, False)):
        model.train(training)
        with torch.set_grad_enabled(grad):
            with use_generator(model, torch.Generator().manual_seed(3)):
                first = model(x, src_key_padding_mask=PADDING)
            assert first[~PADDING].ne(model(x, src_key_padding_mask=PADDING)[~PADDING]).any(-1).all()
            with use_generator(model, torch.Generator().manual_seed(3)):
                assert model(x, src_key_padding_mask=PADDING).equal(first)
    assert kl_divergence(model, num_data=7).isfinite()
    for block in model.layers:
        block.self_attn.sampling = "mean"
    changed = x.masked_fill(PADDING.unsqueeze(-1), 9.0)
    out, again = (model(value, src_key_padding_mask=PADDING)[~PADDING] for value in (x, changed))
    torch.testing.assert_close(out, again)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, FUTURE, is_causal=True)[:, 2].square().sum(), x)
    assert grad[:, 3:].eq(0).all()
    assert grad[:, :3].ne(0).any(-1).all()


def test_layers_of_a_stack_start_apart():
    template = layer()
    model = SGPATransformerEncoder(template, 3)
    first, second, third = model.layers
    for name, parameter in first.named_parameters():
        if parameter.dim() > 1 and parameter.std() > 0:
            assert not parameter.equal(second.get_parameter(name)), name
            assert not second.get_parameter(name).equal(third.get_parameter(name)), name
    assert not model.use_nested_tensor
    assert first.self_attn.out_proj.bias.eq(0).all()  # drawn as a fresh layer is
    assert not any(block is template for block in model.layers)
    with pytest.raises(TypeError, match="encoder_layer: expected an SGPATransformerEncoderLayer, got TransformerE"):
        SGPATransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2)


def test_it_learns():
    torch.manual_seed(1)
    model, readout = SGPATransformerEncoder(layer(batch_first=True), 2), nn.Linear(8, 1)
    x = torch.randn(32, 5, 8)
    y = x.mean((1, 2), keepdim=True).squeeze(-1).mul(5).tanh()
    optimiser = torch.optim.Adam([*model.parameters(), *readout.parameters()], 1e-2)
    losses = []
    for _ in range(60):
        error = (readout(model(x).mean(1)) - y).square().mean()
        loss = error + 1e-2 * kl_divergence(model, num_data=32) / 32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(error.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
