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
    for rule in (logits.probit_pairs, logits.laplace_bridge):
        for covariance in (torch.zeros(3, 4, 4, dtype=dtype), 9 * torch.ones(3, 4, 4, dtype=dtype)):
            torch.testing.assert_close(rule(mean, covariance).softmax(-1), mean.softmax(-1))


def test_what_has_no_probabilities_is_refused():
    for bad in ([math.nan, 0.0], [math.inf, 0.0], [0.0, math.inf], [-math.inf, -math.inf], [math.nan]):
        values = torch.tensor([[0.0] * len(bad), bad])
        with pytest.raises(ValueError, match=r"logits: expected numbers, .* in 1 of 2 elements"):
            logits.log_softmax(values)
    torch.testing.assert_close(logits.log_softmax(torch.tensor([-math.inf, 0.0])).exp(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("rule", [logits.probit_pairs, logits.laplace_bridge])
def test_a_forbidden_class_is_as_if_it_were_not_there(rule, dtype):
    mean, root = torch.randn(5, 4, dtype=dtype), torch.randn(5, 4, 4, dtype=dtype)
    covariance = root @ root.mT
    kept = torch.tensor([0, 1, 3])
    mean[:, 2] = -math.inf
    mean.requires_grad_()
    found = rule(mean, covariance)
    assert (found[:, 2] == -math.inf).all()
    expected = rule(mean[:, kept], covariance[:, kept][:, :, kept])
    torch.testing.assert_close(found[:, kept], expected)
    found[:, kept].square().sum().backward()
    assert mean.grad.isfinite().all() and (mean.grad[:, 2] == 0).all()
    for allowed in ([1], []):  # one class alone, and none
        alone = torch.full((4,), -math.inf, dtype=dtype)
        alone[allowed] = 0.3
        value = rule(alone, covariance[0])
        assert (value == -math.inf).sum() == 4 - len(allowed) and not value.isnan().any()


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_bridge_leads_from_a_dirichlet_to_a_gaussian_and_back(size, dtype):
    """The Gaussian about the mode of a Dirichlet over logits, which is not tempered as its variances are small."""
    alpha = 1.5 + 6 * torch.rand(4, size, dtype=dtype)
    project = torch.eye(size, dtype=dtype) - 1 / size
    mean, covariance = alpha.log() @ project, project @ torch.diag_embed(1 / alpha) @ project
    torch.testing.assert_close(logits.laplace_bridge(mean, covariance).exp(), alpha)
    # A shift of all logits, and noise that they share, change no probability.
    shift, shared = 3 * torch.randn(4, 1, dtype=dtype), torch.randn(4, size, 1, dtype=dtype)
    moved = covariance + 5 + shared + shared.mT  # whatever they have in common with each
    torch.testing.assert_close(logits.laplace_bridge(mean + shift, moved).exp(), alpha, rtol=1e-4, atol=1e-4)


def test_the_bridge_by_hand():
    mean, root = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, 5, dtype=torch.float64)
    for scale in (0.3, 3.0):  # without and with large variances
        for m, C in zip(mean, scale * root @ root.mT, strict=True):
            mu = [float(m[k] - m.mean()) for k in range(5)]
            v = [float(C[k, k] - 2 * C[k].mean() + C.mean()) for k in range(5)]
            c = max(1.0, sum(v) / 5 / math.sqrt(5 / 2))
            mu, v = [u / math.sqrt(c) for u in mu], [s / c for s in v]
            expected = [(1 - 2 / 5 + math.exp(mu[k]) / 25 * sum(math.exp(-u) for u in mu)) / v[k] for k in range(5)]
            torch.testing.assert_close(logits.laplace_bridge(m, C).exp(), torch.tensor(expected).double())


def test_how_near_the_bridge_is_to_monte_carlo():
    """Near it for two classes and for Gaussians that stand for a Dirichlet, and far off for many classes."""
    generator = torch.Generator().manual_seed(0)

    def error(mean, covariance):
        root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(mean.shape[-1]))
        noise = torch.randn(4000, *mean.shape, 1, dtype=torch.float64, generator=generator)
        many = (mean + (root @ noise).squeeze(-1)).softmax(-1).mean(0)
        return (logits.laplace_bridge(mean, covariance).softmax(-1) - many).abs().sum(-1).mean()

    mean = 1.5 * torch.randn(100, 2, dtype=torch.float64, generator=generator)
    eye = torch.eye(2, dtype=torch.float64).expand(100, 2, 2)
    assert error(mean, 0.1 * eye) < 0.02 and error(mean, eye) < 0.12 and error(mean, 16 * eye) < 0.12
    alpha = 1.5 + 6 * torch.rand(100, 5, dtype=torch.float64, generator=generator)
    assert error(alpha.log(), torch.diag_embed(1 / alpha)) < 0.1
    mean = 1.5 * torch.randn(100, 20, dtype=torch.float64, generator=generator)
    assert error(mean, 0.01 * torch.eye(20).double().expand(100, 20, 20)) > 0.3


def test_gradients_of_the_bridge():
    mean, root = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    for scale in (0.2, 4.0):
        assert torch.autograd.gradcheck(
            lambda m, r, scale=scale: logits.laplace_bridge(m, scale * r @ r.mT),
            (mean.requires_grad_(), root.requires_grad_()),
        )
