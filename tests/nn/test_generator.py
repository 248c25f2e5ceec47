"""One generator for every layer of a model that draws."""

import pytest
import torch
from torch import nn

from gpseq.nn import use_generator
from gpseq.nn.generator import Draws
from tests.layers import small


def model() -> nn.Module:
    """Two layers, one of them deep inside a foreign module."""
    host = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    host.self_attn = small(torch.float32)
    return nn.ModuleDict({"a": small(torch.float32), "b": nn.Sequential(nn.Linear(8, 8), host)})


def run(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layers["b"](layers["a"](x, x, x)[0])


def test_reproduces_and_leaves_the_default_generator_alone():
    layers, x = model(), torch.randn(2, 5, 8)
    state = torch.get_rng_state()
    with use_generator(layers, torch.Generator().manual_seed(1)):
        first = run(layers, x)
    assert torch.get_rng_state().equal(state)
    with use_generator(layers, torch.Generator().manual_seed(1)):
        again = run(layers, x)
        more = run(layers, x)
    assert again.equal(first)
    assert not more.equal(first)
    assert not run(layers, x).equal(first)
    assert not torch.get_rng_state().equal(state)


def test_what_was_set_before_comes_back():
    layers, mine = model(), torch.Generator()
    layers["a"].generator = mine
    one, two = torch.Generator(), torch.Generator()
    inside = layers["b"][1].self_attn
    with pytest.raises(KeyError), use_generator(layers, one):
        with use_generator(layers["b"], two):
            assert (layers["a"].generator, inside.generator) == (one, two)
        assert inside.generator is one
        with use_generator(layers, None):
            assert inside.generator is None
        raise KeyError
    assert layers["a"].generator is mine
    assert inside.generator is None


def test_models_without_layers_that_draw_and_bad_generators():
    with use_generator(nn.Linear(2, 2), torch.Generator()):
        pass
    with (
        pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or None, got int"),
        use_generator(model(), 1),
    ):
        pass


def test_a_generator_is_no_state():
    layer = Draws()
    layer.generator = torch.Generator()
    assert layer.state_dict() == {}
    assert Draws().generator is None
