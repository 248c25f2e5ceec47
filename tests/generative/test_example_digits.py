"""examples/generative/digits.py: what is held out stays unseen, a circle is closed, and splits are apart."""

import pytest
import torch

from examples.generative import digits
from gpseq.datasets import load_images


@pytest.fixture(scope="module")
def series():
    return digits.turn(load_images("mnist").x_train[:6] / 255, torch.Generator().manual_seed(0))


def test_a_series_is_a_digit_turned(series):
    assert series.y.shape == (6, 16, 28, 28) and (series.missing.sum(-1) == 1).all()
    torch.testing.assert_close(series.y[:, 0], load_images("mnist").x_train[:6] / 255)
    # Quarters of a turn move pixels onto pixels.
    torch.testing.assert_close(series.y[:, 4], torch.rot90(series.y[:, 0], dims=(-2, -1)), atol=1e-4, rtol=0)
    torch.testing.assert_close(series.beside(0), series.y[series.missing])
    # To turn the neighbours onto an angle, the right way round, comes nearer than their mean.
    mixed, turned = digits.interpolate(series), digits.turn_back(series)
    errors = [(found.mean - series.beside(0)).square().mean() for found in (mixed, turned)]
    assert errors[1] < 0.2 * errors[0]


def test_splits_share_no_digit():
    data = digits.load(20, 10, 10, seed=1)
    originals = torch.cat([part.y[:, 0] for part in (data.train, data.val, data.test)]).flatten(1)
    assert len(originals.unique(dim=0)) == 40
    again, other = digits.load(20, 10, 10, seed=1), digits.load(20, 10, 10, seed=2)
    assert torch.equal(again.train.missing, data.train.missing) and torch.equal(again.test.y, data.test.y)
    assert not torch.equal(other.train.y, data.train.y)
    assert len(digits.load(2, 2, 2, seed=0, digit=None).test) == 2
    with pytest.raises(ValueError, match="expected at least"):
        digits.load(600, 1, 1, seed=0)


def test_weights_go_round_the_circle():
    missing = torch.zeros(3, 8, dtype=torch.bool)
    missing[0, 0] = True  # neighbours 7 and 1
    missing[1, 6:] = True  # a third of the way from 5 to 0, and two thirds
    weights = digits.circle_weights(missing)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8))
    torch.testing.assert_close(weights[2], torch.eye(8))
    assert weights[0, 0, 7] == weights[0, 0, 1] == 0.5
    torch.testing.assert_close(weights[1, 6, [5, 0]], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(weights[1, 7, [5, 0]], torch.tensor([1 / 3, 2 / 3]))


def test_independent_latents_are_those_of_conjugate_normals():
    prior, generator = digits.IndependentPrior(2), torch.Generator().manual_seed(0)
    mean, variance = torch.randn(3, 2, 8, generator=generator), torch.rand(3, 2, 8, generator=generator) + 0.1
    missing = torch.zeros(3, 8, dtype=torch.bool)
    missing[:, 3] = True
    x = torch.arange(8).expand(3, 8) / 8
    found = prior.posterior(x, mean, variance, missing)
    q = torch.distributions.Normal(mean / (1 + variance), (variance / (1 + variance)).sqrt())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).masked_fill(missing[:, None], 0.0)
    torch.testing.assert_close(found.kl, kl.sum(-1))
    torch.testing.assert_close(found.mean[..., 3], q.mean[..., [2, 4]].mean(-1))
    draws = found.rsample(x, (4000,), generator)
    torch.testing.assert_close(draws.mean(0), found.mean, atol=0.06, rtol=0)
    torch.testing.assert_close(draws.var(0), found.variance, atol=0.06, rtol=0)


@pytest.mark.parametrize("name", digits.LEARNED)
def test_what_is_held_out_is_not_looked_at(series, name):
    torch.manual_seed(0)
    vae = digits.make(name, digits.Settings(num_latents=3))
    hidden = digits.Series(series.x, torch.where(series.missing[..., None, None], 0.7, series.y), series.missing)
    one, other = digits.impute(vae, series), digits.impute(vae, hidden)
    assert torch.equal(one.mean, other.mean) and torch.equal(one.spread, other.spread)
    assert digits.bound(vae, series) == digits.bound(vae, hidden)
    shown = torch.where(series.missing.roll(1, -1)[..., None, None], 0.7, series.y)  # a neighbour is looked at
    assert not torch.equal(digits.impute(vae, digits.Series(series.x, shown, series.missing)).mean, one.mean)


def test_noise_is_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(40, 28, 28, generator=generator)
    target = (spread + 0.3).sqrt() * torch.randn(40, 28, 28, generator=generator)
    found = digits.Forecast(torch.zeros(40, 28, 28), spread)
    assert digits.calibrate(found, target) == pytest.approx(0.3, rel=0.05)
