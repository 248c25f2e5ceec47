"""Averages of weights by a loop over their formula."""

import copy

import pytest
import torch
from torch import nn

from gpseq.generative.averaging import average_weights
from gpseq.generative.diffusion import VideoDiffusion
from gpseq.generative.hvae import HVAE


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_an_average_by_its_formula(decay: float, dtype: torch.dtype) -> None:
    model = nn.Linear(2, 3, dtype=dtype)
    average = average_weights(model, decay)
    expected = None
    for n in range(30):
        with torch.no_grad():
            model.weight.normal_()
        average.update_parameters(model)
        kept = min(decay, (1 + n) / (10 + n))
        expected = model.weight.clone() if expected is None else kept * expected + (1 - kept) * model.weight
    assert average.module.weight.dtype == dtype
    torch.testing.assert_close(average.module.weight, expected)


def test_buffers_are_copied_and_the_state_goes_on() -> None:
    model = nn.BatchNorm1d(2)
    average = average_weights(model)
    for _ in range(3):
        model(torch.randn(5, 2))
        average.update_parameters(model)
    assert torch.equal(average.module.running_mean, model.running_mean)
    other = average_weights(model)
    other.load_state_dict(average.state_dict())
    with torch.no_grad():
        model.weight.add_(1)
    for each in (average, other, clone := copy.deepcopy(average)):
        each.update_parameters(model)
    assert torch.equal(average.module.weight, other.module.weight) and clone.n_averaged == 4


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="decay: expected a number from 0 to below 1"):
        average_weights(nn.Linear(1, 1), decay)


def test_generative_models_draw_from_their_average() -> None:
    """The copy has all that drawing needs."""
    for model in (
        HVAE(2, (1, 4, 4), latent_dim=2, hidden=4, width=2),
        VideoDiffusion(2, (1, 4, 4), num_steps=3, channels=(4,)),
    ):
        average = average_weights(model)
        average.update_parameters(model)
        draws = [m.sample(2, generator=torch.Generator().manual_seed(0)) for m in (model, average.module)]
        assert torch.equal(*draws)
