"""Logits in logarithms against torch.distributions; more by way of Predictive, in test_predictive.py."""

import math

import pytest
import torch

from gpseq import logits


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_probabilities_and_entropies_are_those_of_torch(batch, dtype):
    values = 3 * torch.randn(*batch, 4, dtype=dtype)
    categorical = torch.distributions.Categorical(logits=values)
    torch.testing.assert_close(logits.log_softmax(values), categorical.logits)
    torch.testing.assert_close(logits.entropy(logits.log_softmax(values)), categorical.entropy())
    one = torch.distributions.Bernoulli(logits=values[..., 0])
    pair = logits.log_softmax(values[..., :1])
    torch.testing.assert_close(pair.exp(), torch.stack([1 - one.probs, one.probs], dim=-1))
    torch.testing.assert_close(logits.entropy(pair), one.entropy())
    several = torch.randn(5, *batch, 4, dtype=dtype).log_softmax(-1)
    torch.testing.assert_close(logits.log_mean_exp(several), several.exp().mean(0).log())


def test_one_logit_keeps_its_digits_where_it_is_large():
    torch.testing.assert_close(logits.log_softmax(torch.tensor([-80.0])), torch.tensor([0.0, -80.0]))
    torch.testing.assert_close(logits.log_softmax(torch.tensor([80.0])), torch.tensor([-80.0, 0.0]))


def test_pairs_of_independent_logits_by_hand():
    value = logits.probit_pairs(torch.tensor([1.0, 0.0]), torch.eye(2)).softmax(-1)[0]
    torch.testing.assert_close(value, torch.tensor(1 / math.sqrt(1 + math.pi / 4)).sigmoid())


def test_without_variance_nothing_is_tempered(dtype):
    mean = torch.randn(3, 4, dtype=dtype)
    torch.testing.assert_close(logits.probit(mean, torch.zeros(3, 4, dtype=dtype)), mean)
    pairs = logits.probit_pairs(mean, torch.zeros(3, 4, 4, dtype=dtype))
    torch.testing.assert_close(pairs.softmax(-1), mean.softmax(-1))


def test_what_has_no_probabilities_is_refused():
    for bad in ([math.nan, 0.0], [math.inf, 0.0], [0.0, math.inf], [-math.inf, -math.inf], [math.nan]):
        values = torch.tensor([[0.0] * len(bad), bad])
        with pytest.raises(ValueError, match=r"logits: expected numbers, .* in 1 of 2 elements"):
            logits.log_softmax(values)
    torch.testing.assert_close(logits.log_softmax(torch.tensor([-math.inf, 0.0])).exp(), torch.tensor([0.0, 1.0]))


def test_a_forbidden_class_is_as_if_it_were_not_there(dtype):
    mean, root = torch.randn(5, 4, dtype=dtype), torch.randn(5, 4, 4, dtype=dtype)
    covariance = root @ root.mT
    kept = torch.tensor([0, 1, 3])
    mean[:, 2] = -math.inf
    mean.requires_grad_()
    pairs = logits.probit_pairs(mean, covariance)
    assert (pairs[:, 2] == -math.inf).all()
    expected = logits.probit_pairs(mean[:, kept], covariance[:, kept][:, :, kept])
    torch.testing.assert_close(pairs[:, kept], expected)
    pairs[:, kept].square().sum().backward()
    assert mean.grad.isfinite().all() and (mean.grad[:, 2] == 0).all()
    for allowed in ([1], []):  # one class alone, and none
        alone = torch.full((4,), -math.inf, dtype=dtype)
        alone[allowed] = 0.3
        value = logits.probit_pairs(alone, covariance[0])
        assert (value == -math.inf).sum() == 4 - len(allowed) and not value.isnan().any()
