"""How layers draw, set for a while."""

import pytest
import torch
from torch import nn

from gpseq.nn import KEPAttention, RFFAttention, SGPAttention, use_sampling
from gpseq.nn.residual import ResidualGP


def test_every_layer_is_set_and_comes_back():
    layers = [SGPAttention(8, 2, num_inducing=4, sampling="joint"), ResidualGP(2, 4), RFFAttention(8, 2)]
    model = nn.ModuleList([*layers, nn.Linear(2, 2)])
    with use_sampling(model, "mean"):
        assert [layer.sampling for layer in layers] == ["mean"] * 3
    assert [layer.sampling for layer in layers] == ["joint", "marginal", "marginal"]


def test_after_an_exception_it_comes_back():
    layer = SGPAttention(8, 2, num_inducing=4)
    with pytest.raises(RuntimeError), use_sampling(layer, "mean"):
        raise RuntimeError
    assert layer.sampling == "marginal"


def test_what_a_layer_does_not_know_sets_none():
    model = nn.ModuleList([SGPAttention(8, 2, num_inducing=4), KEPAttention(8, 2, rank=2)])
    with pytest.raises(ValueError, match="sampling: expected one of"), use_sampling(model, "pathwise"):
        pass
    assert model[0].sampling == "marginal"


def test_without_draws_two_passes_are_the_same():
    layer, x = SGPAttention(8, 2, num_inducing=4, batch_first=True), torch.randn(3, 5, 8)
    with use_sampling(layer, "mean"):
        one, two = layer(x, x, x)[0], layer(x, x, x)[0]
    assert one.equal(two)
    assert not one.equal(layer(x, x, x)[0])
