"""The loss of a model with Gaussian processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpseq.nn import kl_divergence, linear_annealing, variational_loss
from tests.layers import small


def test_the_loss_is_the_one_liner():
    for mode, convention in (("sgpa", None), ("sgpa", "per_sequence"), ("residual", "global")):
        layer = small(mode=mode)
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        error = layer(x, x, x)[0].square().mean()
        want = error + 0.3 * kl_divergence(layer, num_data=50, convention=convention) / 50
        torch.testing.assert_close(variational_loss(layer, error, 50, 0.3, convention), want)
        assert variational_loss(layer, error, 50, 0.0, convention).equal(error)
    assert variational_loss(layer, error.float(), 50).dtype == torch.float32
    variational_loss(layer, error, 50).backward()
    assert layer.inducing.value.grad.ne(0).any()


@given(st.integers(0, 300), st.integers(1, 200), st.floats(0.01, 1.0))
def test_annealing_grows_to_one(step, num_steps, share):
    weight = linear_annealing(step, num_steps, share)
    assert 0.0 <= weight <= 1.0
    assert weight <= linear_annealing(step + 1, num_steps, share)
    assert linear_annealing(0, num_steps, share) == 0.0
    assert linear_annealing(num_steps, num_steps, share) == 1.0


def test_bad_input():
    layer, loss = small(mode="residual"), torch.tensor(1.0)
    with pytest.raises(TypeError, match="loss: expected a floating-point tensor, got float"):
        variational_loss(layer, 1.0, 10)
    with pytest.raises(ValueError, match=r"loss: expected a scalar, the mean over a batch, got shape \(3,\)"):
        variational_loss(layer, torch.ones(3), 10)
    with pytest.raises(ValueError, match="num_data: expected at least 1, got 0"):
        variational_loss(layer, loss, 0)
    with pytest.raises(ValueError, match=r"beta: expected a number of at least 0, got -0.5"):
        variational_loss(layer, loss, 10, -0.5)
    with pytest.raises(ValueError, match=r"model: expected a layer of gpseq.nn"):
        variational_loss(nn.Linear(2, 2), loss, 10)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"share: expected a number in \(0, 1\]"):
            linear_annealing(1, 10, share)
    with pytest.raises(ValueError, match="step: expected at least 0"):
        linear_annealing(-1, 10)
