"""The scale of noise, fitted to labels."""

import copy

import pytest
import torch

from gpseq import predict
from gpseq.nn import calibrate, calibrate_noise, fit_covariance, replace_attention, use_sampling
from gpseq.nn.capture import layers_with_keys
from gpseq.nn.noise import _search
from tests.layers import small
from tests.nn.test_calibration import Model


def sure_of_wrong_things(n=400):
    """A model that is far too sure: only noise can help."""
    x = torch.randn(n, 6, 8, dtype=torch.float64)
    model = fit_covariance(Model(), [x], num_inducing=16)
    with torch.no_grad():
        model.head.weight.mul_(10)
        y = torch.where(torch.rand(n) < 0.8, model.eval()(x).argmax(-1), torch.randint(3, (n,)))
    return model, x, y


def sampled_nlpd(model, x, y):
    with use_sampling(model, "marginal"), torch.no_grad():
        return -predict(model, x, num_samples=20, generator=torch.Generator().manual_seed(5)).log_prob(y).mean().item()


def test_noise_that_helps_is_found():
    model, x, y = sure_of_wrong_things()
    before = copy.deepcopy(model)
    factor = calibrate_noise(model, [(x, y)], generator=torch.Generator().manual_seed(0))
    assert factor > 4
    best = sampled_nlpd(model, x, y)
    assert best < sampled_nlpd(before, x, y)
    for other in (1 / 16, 16.0):
        changed = copy.deepcopy(model)
        for layer in layers_with_keys(changed).values():
            layer.inducing.log_variance.data.add_(torch.tensor(other).log())
        assert best < sampled_nlpd(changed, x, y)


def test_noise_changes_neither_means_nor_scores():
    model, x, y = sure_of_wrong_things(100)
    calibrate(model, [(x, y)])
    before = predict(model, x, "variance_temperature")
    factor = calibrate_noise(model, [(x, y)])
    after = predict(model, x, "variance_temperature")
    torch.testing.assert_close(before.probs(), after.probs(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(before.scores["variance"], after.scores["variance"], rtol=1e-6, atol=1e-8)
    assert factor > 0


def test_the_same_generator_gives_the_same_factor():
    model, x, y = sure_of_wrong_things(60)
    factors = [
        calibrate_noise(copy.deepcopy(model), [(x, y)], generator=torch.Generator().manual_seed(7)) for _ in range(2)
    ]
    assert factors[0] == factors[1]


def test_means_that_depend_on_the_variance_are_refused():
    layer, x = small(mode="sgpa"), torch.randn(4, 5, 8, dtype=torch.float64)
    fit_covariance(layer, [x], forward=lambda m, x: m(x, x, x))
    with pytest.raises(ValueError, match="mean does not depend on the variance"):
        calibrate_noise(layer, [(x, torch.zeros(4, dtype=torch.long))])


def test_what_cannot_be_fitted():
    x, y = torch.randn(10, 6, 8, dtype=torch.float64), torch.randint(3, (10,))
    with pytest.raises(RuntimeError, match="fit_covariance first"):
        calibrate_noise(replace_attention(Model(), num_inducing=4), [(x, y)])
    model = fit_covariance(Model(), [x], num_inducing=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="sampling: expected one of 'marginal', 'joint', 'pathwise'"):
        calibrate_noise(model, [(x, y)], sampling="mean")
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_search_that_does_not_end_warns():
    with pytest.warns(UserWarning, match="where the search ends"):
        assert _search(lambda t: -t) > 10


def test_noise_that_only_hurts_goes_away():
    assert _search(lambda t: t) < -10


def test_noise_that_changes_nothing_stays():
    assert _search(lambda t: 1.0) == 0.0


@pytest.mark.parametrize("truth", [-3.3, 0.4, 4.0])
def test_the_search_finds_a_minimum(truth):
    assert _search(lambda t: (t - truth) ** 2) == pytest.approx(truth, abs=0.36)
