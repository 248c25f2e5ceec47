"""Losses of a transition, against torch's distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

from gpseq.reconfiguration import gaussian_kl
from gpseq.reconfiguration.objectives import (
    PATH_LOSSES,
    distillation,
    mean_over_seen,
    negative_log_density,
    transition_loss,
)

numbers = st.floats(-5, 5)
scales = st.floats(1e-3, 1e3)


@given(numbers, scales, numbers, scales)
def test_the_divergence_is_that_of_torch(mean, deviation, other_mean, other_deviation):
    values = [torch.tensor(value, dtype=torch.float64) for value in (mean, deviation, other_mean, other_deviation)]
    want = kl_divergence(Normal(values[0], values[1]), Normal(values[2], values[3]))
    found = gaussian_kl(values[0], values[1].square(), values[2], values[3].square())
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    assert found >= 0


@given(numbers, scales, st.floats(-1e-3, 1e-3))
def test_the_divergence_is_not_negative_and_zero_where_moments_agree(mean, deviation, nudge):
    for dtype in (torch.float32, torch.float64):
        m, v = torch.tensor(mean, dtype=dtype), torch.tensor(deviation**2, dtype=dtype)
        assert gaussian_kl(m, v, m, v) == 0
        assert gaussian_kl(m, v * (1 + nudge), m, v) >= 0
        assert gaussian_kl(m, v, m + 1, v) > 0


def test_where_a_variance_is_zero():
    zero, one = torch.zeros(1), torch.ones(1)
    assert gaussian_kl(zero, zero, zero, one) == math.inf
    floor = torch.tensor([0.01])
    assert gaussian_kl(zero, floor, one, one).isfinite()


@given(numbers, numbers, scales)
def test_the_density_is_that_of_torch(x, mean, deviation):
    values = [torch.tensor(value, dtype=torch.float64) for value in (x, mean, deviation)]
    want = -Normal(values[1], values[2]).log_prob(values[0])
    torch.testing.assert_close(negative_log_density(values[0], values[1], values[2].square()), want, rtol=1e-9, atol=0)


def moments():
    return torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64) + 0.1


def test_losses_of_a_transition():
    state, target, found = moments()[0], moments(), moments()
    assert transition_loss("kl", state, target, found).equal(gaussian_kl(*target, *found))
    assert transition_loss("reverse_kl", state, target, found).equal(gaussian_kl(*found, *target))
    assert transition_loss("nll", state, target, found).equal(negative_log_density(state, *found))
    error, spread = (target[0] - found[0]).square(), (target[1].sqrt() - found[1].sqrt()).square()
    torch.testing.assert_close(transition_loss("mse", state, target, found, 2.0), error / 4)
    torch.testing.assert_close(
        transition_loss("mse", state, target, found, 2.0, 0.3, 0.7), 0.3 * error / 4 + 0.7 * spread / 4
    )
    with pytest.raises(ValueError, match="path_loss: expected one of kl, nll, mse, reverse_kl, got 'other'"):
        transition_loss("other", state, target, found)
    assert set(PATH_LOSSES) == {"kl", "nll", "mse", "reverse_kl"}


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
def test_divergences_do_not_depend_on_the_scale(kind):
    state, target, found = moments()[0], moments(), moments()
    scaled = [(100 * mean, 1e4 * variance) for mean, variance in (target, found)]
    torch.testing.assert_close(transition_loss(kind, state, target, found), transition_loss(kind, state, *scaled))


def test_what_the_average_negative_log_density_is():
    """Over draws of the teacher's transition it is the divergence, but for the teacher's entropy."""
    torch.manual_seed(1)
    (mean, variance), found = moments(), moments()
    draws = mean + variance.sqrt() * torch.randn(40_000, *mean.shape, dtype=mean.dtype)
    nll = negative_log_density(draws, *found).mean(0)
    entropy = Normal(mean, variance.sqrt()).entropy()
    torch.testing.assert_close(nll - entropy, gaussian_kl(mean, variance, *found), rtol=0, atol=0.15)


@given(st.floats(0.3, 5))
def test_distillation_is_a_divergence_of_probabilities(temperature):
    logits, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    want = kl_divergence(Categorical(logits=teacher / temperature), Categorical(logits=logits / temperature))
    torch.testing.assert_close(distillation(logits, teacher, temperature), temperature**2 * want)
    torch.testing.assert_close(distillation(teacher + 3, teacher, temperature), torch.zeros(2, 3, dtype=torch.float64))


def test_means_over_tokens_that_are_seen():
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, math.nan]])
    padding = torch.tensor([[False, False, True], [False, True, True]])
    assert mean_over_seen(values, padding) == 2
    assert mean_over_seen(values[:, :1], None) == 2
    assert mean_over_seen(values, torch.ones(2, 3).bool()) == 0
