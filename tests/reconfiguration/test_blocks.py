"""Halves of blocks: attention, then the perceptron, are the whole block."""

import pytest
import torch
from torch import nn

from gpseq.nn import SGPATransformerEncoderLayer
from gpseq.reconfiguration import capture
from gpseq.reconfiguration.blocks import find_kind
from gpseq.reconfiguration.calls import Call
from gpseq.reconfiguration.rollout import Finish
from tests.oracles_reconfiguration import HOSTS, LENGTH, WIDTH, Block


@pytest.mark.parametrize("name", list(HOSTS))
def test_both_halves_are_the_block(name, dtype):
    host = HOSTS[name](dtype)
    path = capture(host.model, host.inputs, "block")
    time_first = path.stack.batch_dim == 1
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for block, call, x, want in zip(path.stack.blocks, path.calls, path.states[:-1], path.states[1:], strict=True):
        kind = find_kind(block)
        x, want = (value.transpose(0, 1) if time_first else value for value in (x, want))
        middle = kind.attend(block, x, call)
        for finish in (lambda v: kind.finish(block, v), Finish(block, kind)):  # noqa: B023
            torch.testing.assert_close(finish(middle), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["torch pre", "torch post", "vit", "bert", "gpt2", "timm"])
def test_the_second_half_keeps_nothing_of_the_first(name):
    host = HOSTS[name](torch.float32)
    block = capture(host.model, host.inputs, "block").stack.blocks[-1]
    kind = find_kind(block)
    made = Finish(block, kind)
    names = {name for name, _ in made.block.named_modules()}
    assert not names & {"attention", "attn", "self_attn"}
    assert 0 < sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in block.parameters())
    assert find_kind(made.block) is None  # nobody takes it for a whole block


def test_layers_without_bias_have_parts():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, bias=False, batch_first=True)
    assert set(find_kind(layer).parts(layer)) == {"in", "out", "up", "down"}
    block = Block()
    block.attn.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
    assert "in.bias" not in find_kind(block).parts(block)
    block.attn.qkv = nn.Identity()
    assert find_kind(block).parts(block) == {}
    sgpa = SGPATransformerEncoderLayer(WIDTH, 2, 12, batch_first=True)
    assert find_kind(sgpa).name == "torch"


def test_modules_of_no_kind():
    assert find_kind(nn.Linear(2, 2)) is None
    assert find_kind(nn.TransformerDecoderLayer(8, 2)) is None
    odd = Block()
    odd.extra = nn.Linear(2, 2)
    assert find_kind(odd) is None


def test_calls():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, batch_first=True)
    x, mask = torch.randn(2, LENGTH, WIDTH), torch.zeros(LENGTH, LENGTH).bool()
    tokens, call = Call.split(layer, (x, mask), {"is_causal": True})
    assert tokens is x and call.named(layer) == {"src_mask": mask, "is_causal": True}
    tokens, call = Call.split(layer, (), {"src_mask": None, "src": x})
    assert tokens is x and call.named(layer) == {}
    assert Call.split(layer, (), {})[0] is None
    with pytest.raises(TypeError, match="unexpected keyword"):
        Call((), {"odd": 1}).named(layer)


class Cached(nn.Module):
    def forward(self, x, past_key_values=None, scale=1.0):
        return x * scale


def test_calls_without_a_cache():
    for call in (Call(([1], 2.0)), Call((), {"past_key_values": [1], "scale": 2.0}), Call(([1],), {"scale": 2.0})):
        assert call.without_cache(Cached()).named(Cached()) == {"scale": 2.0}
        assert call.named(Cached()) == {"past_key_values": [1], "scale": 2.0}
