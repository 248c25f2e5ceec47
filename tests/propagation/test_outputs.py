"""What users do with a propagation: densities, intervals and probabilities, against dense algebra and Monte Carlo."""

import math

import pytest
import torch
from torch import nn

from gpseq.metrics import interval_coverage
from gpseq.predictive import PROBS_METHODS
from gpseq.propagation import calibrate, from_covariance, from_variances, propagate, streamline
from tests.oracles_propagation import monte_carlo, relative_variances


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(outputs, dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, outputs)).to(dtype).eval()


X = torch.randn(5, 2, generator=seeded(4)).double()


# Regression


def last_layer(outputs, seed=0):
    """A posterior of the last layer with every covariance, which is exact: the model is linear in it."""
    model = network(outputs)
    size = outputs * 9
    root = 0.1 * torch.randn(size, size, generator=seeded(seed)).double()
    covariance = root @ root.mT
    hidden = model[1](model[0](X))
    features = torch.cat([hidden, torch.ones(5, 1).double()], -1)  # (5, 9)
    # Weights row by row, then biases.
    jacobian = torch.zeros(5, outputs, size).double()
    for k in range(outputs):
        jacobian[:, k, k * 8 : (k + 1) * 8] = features[:, :8]
        jacobian[:, k, outputs * 8 + k] = 1.0
    return model, from_covariance(["2.weight", "2.bias"], covariance), (jacobian @ covariance @ jacobian.mT).detach()


@pytest.mark.parametrize("outputs", [1, 3])
def test_several_outputs_have_their_full_covariance(outputs):
    model, posterior, expected = last_layer(outputs)
    p = propagate(model, posterior, X)
    assert p.batch_shape == (5,) and p.event_shape == (outputs,)
    torch.testing.assert_close(p.covariance.to_dense(), expected)
    torch.testing.assert_close(p.mean, model(X))


@pytest.mark.parametrize("noise", [0.3, [0.1, 0.2, 0.4], "each"])
def test_densities_of_observations(noise):
    model, posterior, covariance = last_layer(3)
    given = noise if isinstance(noise, float) else torch.tensor(noise).double() if isinstance(noise, list) else None
    given = 0.1 + torch.rand(5, 3, generator=seeded()).double() if given is None else given
    p = propagate(model, posterior, X, noise=given)
    y = p.mean.detach() + torch.randn(5, 3, generator=seeded(1)).double()
    white = torch.diag_embed(torch.as_tensor(given, dtype=torch.float64).expand(5, 3))
    expected = torch.distributions.MultivariateNormal(model(X), covariance + white).log_prob(y)
    torch.testing.assert_close(p.log_prob(y), expected)
    torch.testing.assert_close(p.noise, white.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(p.variance + p.noise, (covariance + white).diagonal(dim1=-2, dim2=-1))


def test_without_noise_a_certain_network_has_no_density():
    model = network(2)
    p = propagate(model, from_variances({"0.bias": torch.zeros(8).double()}), X)
    with pytest.raises(ValueError, match="covariance: there is no density where it is singular; expected noise"):
        p.log_prob(p.mean.detach())


def test_intervals_cover_as_often_as_they_say():
    """Weights and noise drawn from what was propagated: the observations are in the intervals at their level."""
    model = network(2)
    variances = relative_variances(model, 0.2)
    p = propagate(model, from_variances(variances), X, noise=torch.tensor([0.01, 0.05]).double()).detach()
    outputs = []
    generator = seeded(9)
    for _ in range(3000):
        weights = {
            name: model.get_parameter(name) + v.sqrt() * torch.randn(v.shape, generator=generator).double()
            for name, v in variances.items()
        }
        outputs.append(torch.func.functional_call(model, weights, (X,)).detach())
    y = torch.stack(outputs, -1)
    y = y + p.noise.sqrt().unsqueeze(-1) * torch.randn(y.shape, generator=generator).double()
    for level in (0.5, 0.9):
        lower, upper = p.interval(level)
        shape = y.shape
        covered = interval_coverage(lower.unsqueeze(-1).expand(shape), upper.unsqueeze(-1).expand(shape), y)
        assert (covered - level).abs().max() < 0.04


# Classification


@pytest.mark.parametrize("method", PROBS_METHODS)
def test_probabilities_are_near_those_of_drawn_weights(method):
    model = network(3)
    for scale in (1, 3):
        model[2].weight.data *= scale
    variances = relative_variances(model, 0.4)
    p = propagate(model, from_variances(variances), X)
    mean, _ = monte_carlo(
        nn.Sequential(model, nn.Softmax(-1)), {f"0.{k}": v for k, v in variances.items()}, X, 20_000, seeded()
    )
    found = p.probs(method, generator=seeded(1))
    torch.testing.assert_close(found.sum(-1), torch.ones(5).double())
    limit = {"sample": 0.03, "probit": 0.15, "probit_pairs": 0.06, "laplace_bridge": 0.3}[method]
    assert (found - mean).abs().max() < limit
    assert (found - mean).abs().max() <= (p.mean.softmax(-1) - mean).abs().max() or method == "laplace_bridge"


def test_a_common_shift_of_all_logits_changes_no_probability():
    """An output bias that all classes share, uncertain as it may be."""
    model = network(3)
    shared = 25 * torch.ones(3, 3, dtype=torch.float64)
    p = propagate(model, from_covariance(["2.bias"], shared), X)
    for method in ("sample", "probit_pairs", "laplace_bridge"):
        torch.testing.assert_close(p.probs(method), model(X).softmax(-1))
    assert (p.probs("probit") - model(X).softmax(-1)).abs().max() > 0.02
    assert p.mutual_information(generator=seeded()).abs().max() < 1e-9


def test_entropies_of_a_propagation():
    model = network(3)
    p = propagate(model, from_variances(relative_variances(model, 0.3)), X)
    information = p.mutual_information(generator=seeded())
    assert (information > 0).all()
    entropy = p.entropy(generator=seeded())
    torch.testing.assert_close(information, entropy - p.expected_entropy(generator=seeded()))
    labels = torch.tensor([0, 1, 2, 0, 1])
    expected = p.probs(generator=seeded()).log().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(p.log_prob(labels, generator=seeded()), expected)


@pytest.mark.parametrize("form", ["full", "lowrank", "blockdiag", "diag"])
def test_tokens_have_labels(form):
    """Outputs (B, T, K) in every form, as tagging and language models have them."""
    model = network(3)
    x = torch.randn(2, 4, 2, generator=seeded(6)).double()
    p = propagate(model, from_variances(relative_variances(model, 0.3)), x, form, num_tangents=16, generator=seeded())
    assert p.event_dim == 2 and p.probs("probit_pairs").shape == (2, 4, 3)
    labels = torch.randint(3, (2, 4), generator=seeded())
    assert p.log_prob(labels, "probit_pairs").shape == (2, 4)
    assert p[0].notes["covariance"] == form and p.pointwise().batch_shape == (2, 4)
    assert p.rsample(7, seeded()).shape == (7, 2, 4, 3)
    across = p.covariance.to_dense().view(2, 4, 3, 4, 3)[:, 0, :, 1]
    assert (across.abs().max() > 0) == (form in ("full", "lowrank"))


# All of it in one go


def test_from_a_network_to_a_calibrated_module():
    """Held-out targets of a regression whose posterior is four times too narrow and whose noise nobody knew."""
    model = network(2)
    variances = relative_variances(model, 0.2)
    posterior = from_variances(variances)
    generator = seeded(8)
    x = 2 * torch.randn(3000, 2, generator=generator).double()
    wide = propagate(model, posterior.scaled(4.0), x).detach()
    y = wide.rsample(1, generator)[0] + 0.3 * torch.randn(3000, 2, generator=generator).double()
    calibration = calibrate(propagate(model, posterior, x), y, noise=True)
    assert calibration.scale == pytest.approx(4.0, rel=0.2)
    torch.testing.assert_close(calibration.noise.sqrt(), torch.full((2,), 0.3).double(), rtol=0.2, atol=0)
    module = streamline(model, posterior, calibration)
    p = module(X)
    torch.testing.assert_close(p.variance, calibration.scale * propagate(model, posterior, X).variance)
    lower, upper = p.detach().interval()
    assert math.isfinite(float((upper - lower).sum()))
