"""Scales of a covariance fitted to held-out data: known ones come back, and closed forms are met."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import DiagLinearOperator, LowRankRootLinearOperator, RootLinearOperator
from torch import nn

import gpseq.propagation.calibration as fitting
from gpseq.predictive import Predictive
from gpseq.propagation import (
    Calibration,
    calibrate,
    calibrate_layers,
    from_columns,
    from_variances,
    layer_contributions,
    propagate,
)
from gpseq.propagation.contributions import restricted


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n, size, seed=0, rank=None, spread=1.0, dtype=torch.float64):
    generator = seeded(seed)
    mean = torch.randn(n, size, generator=generator, dtype=dtype)
    root = spread * torch.randn(n, size, rank or size, generator=generator, dtype=dtype) / math.sqrt(rank or size)
    return mean, root


def labels(mean, covariance, scale=1.0, temperature=1.0, seed=1):
    """Drawn as the model says."""
    generator = seeded(seed)
    root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(mean.shape[-1], dtype=mean.dtype))
    noise = torch.randn(*mean.shape, 1, generator=generator, dtype=mean.dtype)
    logits = (mean + math.sqrt(scale) * (root @ noise).squeeze(-1)) / temperature
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def nlpd(predictive, y, method="sample", num_samples=None):
    return -predictive.log_prob(y, method, num_samples, seeded(3)).mean()


# One scale


@pytest.mark.parametrize("form", ["dense", "root and diagonal", "diagonal"])
def test_the_scale_of_a_regression_has_a_closed_form(form, dtype):
    mean, root = gaussian(200, 3, rank=2, dtype=dtype)
    diagonal = 0.1 + torch.rand(200, 3, dtype=dtype)
    operator = {
        "dense": root @ root.mT + torch.diag_embed(diagonal),
        "root and diagonal": LowRankRootLinearOperator(root) + DiagLinearOperator(diagonal),
        "diagonal": DiagLinearOperator(diagonal),
    }[form]
    p = Predictive.from_moments(mean, operator)
    y = mean + 3 * torch.randn(200, 3, dtype=dtype)
    found = calibrate(p, y)
    residual = (y - mean).double().unsqueeze(-1)
    expected = (residual.mT @ torch.linalg.solve(p.covariance.to_dense().double(), residual)).mean() / 3
    assert found.scale == pytest.approx(float(expected), rel=1e-5)
    assert found.temperature == 1 and found.noise is None and found.num_targets == 200
    made = found.apply(p)
    torch.testing.assert_close(made.covariance.to_dense(), p.covariance.to_dense() * found.scale)
    assert found.nlpd == pytest.approx(float(-made.log_prob(y).mean()), rel=1e-5)
    assert found.nlpd_before == pytest.approx(float(-p.log_prob(y).mean()), rel=1e-5) and found.nlpd < found.nlpd_before


@pytest.mark.parametrize("method", ["sample", "probit_pairs"])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_a_known_scale_of_logits_comes_back(method, scale):
    n, size, generator = (3000, 3, seeded()) if method == "sample" else (20_000, 2, seeded())
    mean = 3 * torch.randn(n, size, generator=generator, dtype=torch.float64)
    variance = 0.5 + 8 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    covariance = torch.diag_embed(variance.expand(n, size)) + 2 * torch.ones(size, size).double()
    p = Predictive.from_moments(mean, covariance)
    found = calibrate(p, labels(mean, covariance, scale), method=method, num_samples=64, generator=generator)
    # The draws of a fit are finitely many, and the rule for pairs is an approximation.
    assert found.scale == pytest.approx(scale, rel=0.25)
    assert found.method == method and found.nlpd < found.nlpd_before


def test_a_known_temperature_comes_back():
    mean, _ = gaussian(6000, 4)
    mean = 2 * mean
    zero = torch.zeros(4, 4, dtype=torch.float64)
    p = Predictive.from_moments(mean, variance=torch.zeros(4).double())
    y = labels(mean, zero, temperature=2.5)
    found = calibrate(p, y, scale=False, temperature=True, method="probit")
    assert found.temperature == pytest.approx(2.5, rel=0.1) and found.scale == 1
    torch.testing.assert_close(found.apply(p).probs("probit"), (mean / found.temperature).softmax(-1))
    # The classical optimum: the mean of the true logit equals that expected.
    logits = mean / found.temperature
    expected = (logits.softmax(-1) * mean).sum(-1).mean()
    torch.testing.assert_close(mean.gather(-1, y.unsqueeze(-1)).mean(), expected, rtol=1e-5, atol=1e-6)


def test_scale_and_temperature_together():
    mean, root = gaussian(8000, 2, spread=1.0)
    # Rows with much and with little variance, else the two say the same.
    factor = torch.linspace(0.01, 25.0, 8000, dtype=torch.float64)[torch.randperm(8000, generator=seeded())]
    covariance = factor[:, None, None] * (root @ root.mT + 0.1 * torch.eye(2))
    mean = 2 * mean
    y = labels(mean, covariance, scale=2.0, temperature=1.5)
    found = calibrate(
        Predictive.from_moments(mean, covariance), y, temperature=True, method="probit_pairs", generator=seeded()
    )
    assert found.temperature == pytest.approx(1.5, rel=0.15) and found.scale == pytest.approx(2.0, rel=0.35)


def test_noise_of_observations():
    mean, root = gaussian(20_000, 2)
    covariance = root @ root.mT
    white = torch.tensor([0.5, 4.0], dtype=torch.float64)
    total = 3 * covariance + torch.diag(white)
    y = mean + (torch.linalg.cholesky(total) @ torch.randn(20_000, 2, 1, generator=seeded(5)).double()).squeeze(-1)
    found = calibrate(Predictive.from_moments(mean, covariance), y, noise=True)
    torch.testing.assert_close(found.noise, white, rtol=0.12, atol=0)
    assert found.scale == pytest.approx(3, rel=0.1)
    made = found.apply(Predictive.from_moments(mean.float(), covariance.float(), noise=7.0))
    torch.testing.assert_close(made.noise[0], found.noise.float())
    # A certain network: the noise is the mean squared residual.
    certain = Predictive.from_moments(mean, variance=torch.zeros(2).double())
    found = calibrate(certain, y, scale=False, noise=True)
    torch.testing.assert_close(found.noise, (y - mean).square().mean(0), rtol=1e-5, atol=0)
    assert found.nlpd_before == math.inf
    # Noise that is given stays, and counts.
    given = calibrate(Predictive.from_moments(mean, covariance, noise=white), y)
    assert given.noise is None and given.scale == pytest.approx(3, rel=0.05)


@given(st.integers(0, 10_000), st.sampled_from(["sample", "probit_pairs", "probit", "laplace_bridge"]), st.booleans())
@settings(max_examples=8)
def test_nothing_near_the_optimum_is_better(seed, method, temperature):
    mean, root = gaussian(60, 3, seed=seed, spread=1.5)
    covariance = root @ root.mT
    p = Predictive.from_moments(mean, covariance)
    y = labels(mean, covariance, scale=2.0, seed=seed + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sixty labels may ask for no variance
        found = calibrate(p, y, temperature=temperature, method=method, num_samples=32, generator=seeded(seed))
    assert found.scale > 0 and found.temperature > 0 and found.nlpd <= found.nlpd_before + 1e-9
    again = calibrate_silently(p, y, temperature, method, seed)
    assert (again.scale, again.temperature, again.nlpd) == (found.scale, found.temperature, found.nlpd)
    if method != "sample":  # whose draws only the fit knows
        for step in (0.9, 1.1):
            other = Calibration(found.scale * step, found.temperature)
            assert nlpd(other.apply(p), y, method) >= found.nlpd - 1e-7
            if temperature:
                other = Calibration(found.scale, found.temperature * step)
                assert nlpd(other.apply(p), y, method) >= found.nlpd - 1e-7


def calibrate_silently(p, y, temperature, method, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return calibrate(p, y, temperature=temperature, method=method, num_samples=32, generator=seeded(seed))


def test_pieces_of_the_batch_change_nothing(monkeypatch):
    mean, root = gaussian(50, 3)
    p = Predictive.from_moments(mean, RootLinearOperator(root))
    y = labels(mean, root @ root.mT, 4.0)
    whole = calibrate(p, y, method="probit_pairs")
    monkeypatch.setattr(fitting, "_NUMBERS", 8 * 9 * 7)
    parts = calibrate(p, y, method="probit_pairs")
    assert parts.scale == pytest.approx(whole.scale, rel=1e-6) and parts.nlpd == pytest.approx(whole.nlpd, rel=1e-9)


def test_the_draws_of_a_fit_come_from_the_generator():
    mean, root = gaussian(300, 3)
    p, y = Predictive.from_moments(mean, root @ root.mT), labels(mean, root @ root.mT, 5.0)
    torch.manual_seed(3)
    one, after = calibrate(p, y, num_samples=8), torch.rand(())
    torch.manual_seed(3)
    other = calibrate(p, y, num_samples=8)
    assert one.scale == other.scale and torch.rand(()) == after
    assert calibrate(p, y, num_samples=8, generator=seeded(1)).scale != one.scale


def test_a_matrix_is_factored_once(monkeypatch):
    mean, root = gaussian(60, 4)
    covariance = root @ root.mT
    y = labels(mean, covariance, 4.0)
    factored = RootLinearOperator(torch.linalg.cholesky(covariance))
    expected = calibrate(Predictive.from_moments(mean, factored), y, num_samples=32, generator=seeded())
    calls, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(matrix.shape) or cholesky(matrix))
    p = Predictive.from_moments(mean, covariance)
    found = calibrate(p, y, num_samples=32, generator=seeded())
    assert calls == [(60, 4, 4)]
    assert found.scale == pytest.approx(expected.scale, rel=1e-6)
    assert found.nlpd == pytest.approx(expected.nlpd, rel=1e-8)
    assert found.nlpd_before == pytest.approx(expected.nlpd_before, rel=1e-8)


@pytest.mark.filterwarnings("ignore:calibration")
def test_draws_beside_a_scale_are_no_votes():
    """Labels that are the largest of noisy logits ask for no temperature at all."""
    mean, root = gaussian(300, 3, spread=2.0)
    noise = torch.randn(300, 3, 1, generator=seeded(1), dtype=torch.float64)
    p, y = Predictive.from_moments(mean, root @ root.mT), (mean + (root @ noise).squeeze(-1)).argmax(-1)
    found = calibrate(p, y, temperature=True, num_samples=64, generator=seeded())
    assert found.temperature == pytest.approx(0.25, rel=1e-6) and found.temperature >= 0.25
    assert found.apply(p).probs("sample", 64, seeded(2)).min() > 0
    pairs = calibrate(p, y, temperature=True, method="probit_pairs")  # no draws, no votes
    assert pairs.temperature < 0.25


def test_labels_of_tokens():
    generator = seeded()
    root = torch.randn(30, 4 * 3, 4 * 3, generator=generator, dtype=torch.float64)
    p = Predictive.from_moments(torch.randn(30, 4, 3, generator=generator).double(), root @ root.mT, event_dim=2)
    flat = p.pointwise()
    covariance = flat.covariance.to_dense()
    y = labels(flat.mean.reshape(-1, 3), covariance.reshape(-1, 3, 3)).view(30, 4)
    found = calibrate(p, y, method="probit_pairs")
    assert found.num_targets == 120
    same = calibrate(flat, y, method="probit_pairs")
    assert found.scale == pytest.approx(same.scale, rel=1e-6)
    made = found.apply(p)
    assert made.event_dim == 2
    torch.testing.assert_close(made.covariance.to_dense(), p.covariance.to_dense() * found.scale)
    assert calibrate(p, torch.randn(30, 4, 3, generator=generator).double()).num_targets == 30  # events


def test_what_travels_along():
    mean, root = gaussian(5, 4, rank=1)
    operator = LowRankRootLinearOperator(root) + DiagLinearOperator(torch.ones(5, 4).double())
    p = Predictive.from_moments(mean, operator, noise=0.5, scores={"a": torch.ones(5)}).noted(covariance="lowrank")
    made = Calibration(scale=4.0, temperature=2.0).apply(p)
    assert made.scores["a"].shape == (5,) and made.notes["covariance"] == "lowrank" and made.noise[0, 0] == 0.5
    torch.testing.assert_close(made.mean, mean / 2)
    torch.testing.assert_close(made.variance, p.variance)
    assert type(made.covariance) is type(p.covariance)  # low rank stays so
    mean.requires_grad_()
    Calibration(scale=4.0).apply(Predictive.from_moments(mean, operator)).log_prob(mean.detach() + 1).sum().backward()
    assert mean.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:calibration")
@pytest.mark.parametrize("targets", ["labels", "numbers"])
def test_predictions_of_the_inference_mode(targets, dtype):
    """A fit has gradients, whatever the mode in which its moments were found and it is asked for."""
    model = network(dtype)
    x = torch.randn(40, 3, generator=seeded(), dtype=dtype)
    variances = {name: torch.full_like(p, 0.1).detach() for name, p in model.named_parameters()}
    drawn = torch.randn(40, 2, generator=seeded(1), dtype=dtype)
    with torch.no_grad():
        y = (3 * model(x) + drawn).argmax(-1) if targets == "labels" else 3 * drawn

    def fits(p, contributions):
        return tuple(
            fit(moments, y, method="probit") for fit, moments in ((calibrate, p), (calibrate_layers, contributions))
        )

    posterior = from_variances(variances)
    expected, layers = fits(propagate(model, posterior, x), layer_contributions(model, posterior, x))
    with torch.inference_mode():
        p, contributions = propagate(model, posterior, x), layer_contributions(model, posterior, x)
        inside = fits(p, contributions)
    for one, other in (inside, fits(p, contributions)):
        assert one.nlpd == pytest.approx(expected.nlpd, rel=1e-3)
        assert other.output.nlpd == pytest.approx(layers.output.nlpd, rel=1e-3)


def test_contributions_and_calibrations_are_copied_and_pickled():
    model = network()
    x = torch.randn(20, 3, generator=seeded()).double()
    contributions = layer_contributions(model, from_variances({"0.bias": torch.ones(6).double()}), x)
    found = calibrate_layers(contributions, 9 * torch.randn(20, 2, generator=seeded()).double())
    for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        other = again(found).apply(again(contributions))
        torch.testing.assert_close(other.variance, found.apply(contributions).variance)


def test_a_variance_that_only_hurts_is_reported():
    mean = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).repeat(50, 1)
    p = Predictive.from_moments(mean, variance=torch.full((2,), 5.0))
    with pytest.warns(UserWarning, match=r"calibration: the targets ask for as little or as much scale as"):
        found = calibrate(p, mean.argmax(-1), method="probit_pairs")
    assert 0 < found.scale < 1e-3
    with pytest.warns(UserWarning, match="as much temperature as there can be"):
        found = calibrate(p, mean.argmax(-1), scale=False, temperature=True, method="probit_pairs")
    assert 0 < found.temperature < 0.3 and found.nlpd < found.nlpd_before


LOGITS = Predictive.from_moments(torch.zeros(4, 3), torch.eye(3))


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: calibrate(LOGITS.mean, torch.zeros(4).long()), TypeError, "predictive: expected a Predictive, got T"),
        (
            lambda: calibrate(Predictive.from_samples(torch.zeros(2, 4, 3)), torch.zeros(4).long()),
            TypeError,
            "predictive: expected a Gaussian, whose covariance can be scaled",
        ),
        (lambda: calibrate(LOGITS, [0, 1, 2, 0]), TypeError, "y: expected a tensor, got list"),
        (
            lambda: calibrate(LOGITS, torch.zeros(4, 1).long()),
            ValueError,
            r"y: expected labels of shape \(4,\), got \(4, 1\)",
        ),
        (lambda: calibrate(LOGITS, torch.tensor([0, 1, 2, 3])), ValueError, "y: expected labels from 0 to 2, got"),
        (lambda: calibrate(LOGITS, torch.tensor([0, 1, 2, -1])), ValueError, "y: expected labels from 0 to 2, got"),
        (
            lambda: calibrate(LOGITS, torch.zeros(4)),
            ValueError,
            r"y: expected real numbers of shape \(4, 3\), or labels in an integer dtype, got shape \(4,\)",
        ),
        (lambda: calibrate(LOGITS, torch.full((4, 3), math.nan)), ValueError, "y: expected numbers, got NaN in 12"),
        (
            lambda: calibrate(LOGITS[:0], torch.zeros(0).long()),
            ValueError,
            r"y: expected targets for a batch, got shape \(0,\)",
        ),
        (lambda: calibrate(LOGITS[0], torch.tensor(0)), ValueError, "y: expected targets for a batch"),
        (lambda: calibrate(LOGITS, torch.zeros(4, 3), temperature=True), ValueError, "temperature: it is for labels"),
        (lambda: calibrate(LOGITS, torch.zeros(4).long(), noise=True), ValueError, "noise: it is for real numbers"),
        (
            lambda: calibrate(LOGITS, torch.zeros(4).long(), scale=False),
            ValueError,
            "scale: expected something to fit",
        ),
        (lambda: calibrate(LOGITS, torch.zeros(4).long(), method="map"), ValueError, "method: expected one of sample"),
        (
            lambda: calibrate(LOGITS, torch.zeros(4).long(), num_samples=0),
            ValueError,
            "num_samples: expected at least 1",
        ),
        (lambda: calibrate(LOGITS, torch.zeros(4).long(), generator=3), TypeError, "generator: expected a torch.Gen"),
        (
            lambda: calibrate(Predictive.from_moments(torch.zeros(4, 3), variance=torch.zeros(3)), torch.ones(4, 3)),
            ValueError,
            "covariance: there is no density where it is singular; expected noise",
        ),
        (lambda: Calibration().apply(LOGITS.mean), TypeError, "predictive: expected a Predictive, got Tensor"),
        (lambda: calibrate_layers(LOGITS, torch.zeros(4).long()), TypeError, "contributions: expected those of layer_"),
    ],
)
def test_bad_questions_are_named(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


# One scale for each group of weights


def network(dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype).eval()


def test_contributions_are_propagations_of_one_group_each():
    model = network()
    variances = {name: torch.full_like(p, 1e-4) for name, p in model.named_parameters()}
    posterior = from_variances(variances)
    x = torch.randn(7, 3).double()
    found = layer_contributions(model, posterior, x)
    assert dict(found.groups) == {"0": ("0.weight", "0.bias"), "2": ("2.weight", "2.bias")}
    assert found.covariances.shape == (2, 7, 2, 2)
    first = propagate(model, from_variances({name: variances[name] for name in found.groups["0"]}), x)
    torch.testing.assert_close(found.covariances[0], first.covariance.to_dense())
    total = propagate(model, posterior, x)
    torch.testing.assert_close(found.mean, total.mean)
    # First order: what is missing is of the square of the variances.
    torch.testing.assert_close(found.covariances.sum(0), total.covariance.to_dense(), rtol=5e-3, atol=1e-7)
    weighted = found.weighted({"0": 3.0})
    expected = 3 * found.covariances[0] + found.covariances[1]
    torch.testing.assert_close(weighted.covariance.to_dense(), expected)
    assert weighted.notes["covariance"] == "full"
    lowrank = layer_contributions(model, posterior, x, covariance="lowrank", num_tangents=8, generator=seeded())
    dense = 2 * lowrank.covariances[0] + 0.5 * lowrank.covariances[1]
    torch.testing.assert_close(lowrank.weighted({"0": 2.0, "2": 0.5}).covariance.to_dense(), dense)
    named = layer_contributions(
        model, posterior, x, groups={"weights": ["0.weight", "2.weight"], "b": ["0.bias", "2.bias"]}
    )
    torch.testing.assert_close(named.covariances.sum(0), found.covariances.sum(0), rtol=5e-3, atol=1e-7)
    with pytest.raises(ValueError, match=r"scales: expected names of groups \(0, 2\), got 1"):
        found.weighted({"1": 2.0})


def test_known_scales_of_groups_come_back():
    model = network()
    posterior = from_variances({name: torch.full_like(p, 0.01) for name, p in model.named_parameters()})
    x = 2 * torch.randn(4000, 3, generator=seeded()).double()
    contributions = layer_contributions(model, posterior, x)
    known = {"0": 4.0, "2": 1.0}
    made = contributions.weighted(known)
    noise = 0.02
    total = made.covariance.to_dense() + noise * torch.eye(2)
    y = made.mean + (torch.linalg.cholesky(total) @ torch.randn(4000, 2, 1, generator=seeded(1)).double()).squeeze(-1)
    found = calibrate_layers(contributions, y, noise=True)
    assert found.scales["0"] == pytest.approx(4.0, rel=0.12) and found.scales["2"] == pytest.approx(1.0, rel=0.35)
    assert found.output.scale == 1 and found.output.nlpd < found.output.nlpd_before
    torch.testing.assert_close(found.output.noise, torch.full((2,), noise).double(), rtol=0.5, atol=0)
    applied = found.apply(contributions)
    assert found.output.nlpd == pytest.approx(float(-applied.log_prob(y).mean().detach()), rel=1e-6)
    # On new inputs, by way of the posterior: the same to first order.
    new = torch.randn(5, 3, generator=seeded(2)).double()
    direct = propagate(model, found.scaled(posterior), new)
    torch.testing.assert_close(
        direct.variance, found.apply(layer_contributions(model, posterior, new)).variance, rtol=0.1, atol=0
    )


def test_groups_of_logits():
    model = network()
    posterior = from_variances({name: torch.full_like(p, 0.3) for name, p in model.named_parameters()})
    x = 2 * torch.randn(1500, 3, generator=seeded()).double()
    contributions = layer_contributions(model, posterior, x)
    y = labels(contributions.mean, contributions.weighted({"0": 1e-3, "2": 8.0}).covariance.to_dense())
    found = calibrate_layers(contributions, y, method="probit_pairs")
    single = calibrate(contributions.weighted(), y, method="probit_pairs")
    assert all(scale > 0 for scale in found.scales.values())
    assert found.output.nlpd <= single.nlpd + 1e-9
    sampled = calibrate_layers(contributions, y, num_samples=16, generator=seeded())
    assert sampled.output.nlpd < sampled.output.nlpd_before


def test_the_last_layer_alone_is_scaled_exactly():
    model = network()
    posterior = from_variances({"2.weight": torch.full((2, 6), 0.1).double()})
    x = torch.randn(30, 3).double()
    contributions = layer_contributions(model, posterior, x)
    found = calibrate_layers(contributions, contributions.mean + torch.randn(30, 2).double())
    direct = propagate(model, found.scaled(posterior), x)
    torch.testing.assert_close(direct.covariance.to_dense(), found.apply(contributions).covariance.to_dense())


def test_a_joint_law_is_one_group():
    model = network()
    columns = {
        name: 0.1 * torch.randn(2, *model.get_parameter(name).shape).double() for name in ("0.weight", "2.weight")
    }
    posterior = from_columns(columns) | from_variances({"2.bias": torch.full((2,), 0.1).double()})
    x = torch.randn(4, 3).double()
    found = layer_contributions(model, posterior, x, covariance="lowrank", num_tangents=2)
    assert dict(found.groups) == {"0": ("2.bias", "0.weight", "2.weight")}
    assert restricted(posterior, ["0.weight"]).names == ()
    with pytest.raises(ValueError, match=r"groups: expected 0.weight, 2.weight, which have a joint law, in one group"):
        layer_contributions(model, posterior, x, groups={"a": ["0.weight"], "b": ["2.weight", "2.bias"]})
    for groups in ({"a": ["0.weight", "2.weight"]}, {"a": ["0.weight", "2.weight", "2.bias"], "b": ["2.bias"]}):
        with pytest.raises(ValueError, match=r"groups: expected each uncertain parameter once, got 2.bias"):
            layer_contributions(model, posterior, x, groups=groups)
