"""The uncertainty benchmarks' own mathematics, and their smallest runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import gpseq
from benchmarks.uncertainty import contenders, judging, networks, training
from benchmarks.uncertainty.cases import run_case
from benchmarks.uncertainty.heads import ClassDistance, LaplaceHead, fit_prior_precision
from benchmarks.uncertainty.reporting import report_case
from benchmarks.uncertainty.scaling import fit_scale, scaled_log_probs
from benchmarks.uncertainty.tasks import Part, Task


def tiny(name: str = "tiny", epochs: int = 2) -> Task:
    """Blobs of light in one of three places, and noise as outsiders."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int, noise: float = 0.1) -> Part:
        labels = torch.arange(count) % 3
        images = noise * torch.rand(count, 28, 28, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[9 * label : 9 * label + 9] += 0.5
        return Part(images, labels)

    return Task(
        name,
        train=part(60),
        val=part(30),
        test=part(30),
        shifted={f"noise {severity}": part(12, 0.2 * severity) for severity in (1, 5)},
        ood={"noise": Part(torch.rand(20, 28, 28, generator=generator))},
        make=lambda attention: networks.VisionTransformer(3, attention, width=16, heads=2, depth=2, mlp_width=16),
        epochs=epochs,
        batch_size=20,
    )


# --- temperatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [(4.0, 0.0), (1.0, 2.0), (0.25, 1.0)])
def test_scale_is_recovered(truth: tuple[float, float]) -> None:
    spread = torch.rand(5_000).mul(3)
    logits = 4 * torch.randn(5_000, 5)
    labels = torch.distributions.Categorical(logits=scaled_log_probs(logits, spread, truth)).sample()
    found = fit_scale(logits, labels, spread)
    assert found[0] + found[1] * 1.5 == pytest.approx(truth[0] + truth[1] * 1.5, rel=0.1)
    assert found == pytest.approx(truth, abs=0.25 * sum(truth))


def test_scale_without_spread_is_the_best_temperature() -> None:
    logits = 3 * torch.randn(3_000, 4, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits / 2).sample()
    a, b = fit_scale(logits, labels)

    def loss(a: float) -> float:
        return nn.functional.cross_entropy(logits / math.sqrt(a), labels).item()

    assert b == 0
    assert loss(a) == pytest.approx(min(loss(float(grid)) for grid in torch.linspace(1, 9, 801)), abs=1e-6)


def test_scale_of_draws_averages_probabilities() -> None:
    logits, spread = torch.randn(6, 8, 3, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    expected = torch.stack([(z / (0.5 + 2 * spread).sqrt()[:, None]).softmax(-1) for z in logits]).mean(0)
    assert torch.allclose(scaled_log_probs(logits, spread, (0.5, 2.0)).exp(), expected)


# --- heads ------------------------------------------------------------------------------------------------------------


def test_laplace_covariance_is_that_of_the_dense_precision() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        features, weight, bias = torch.randn(50, 3), torch.randn(4, 3), torch.randn(4)
        head = LaplaceHead.fit(features, weight, bias)
        h = torch.cat([features, torch.ones(50, 1)], 1)
        p = (features @ weight.mT + bias).softmax(-1)
        curvature = sum(torch.diag(row) - torch.outer(row, row) for row in p) / 50
        second = sum(torch.outer(row, row) for row in h) / 50
        dense = torch.linalg.inv(50 * torch.kron(curvature, second) + 0.7 * torch.eye(16))
        jacobian = [torch.kron(torch.eye(4), row[None]) for row in h[:5]]
        expected = torch.stack([j @ dense @ j.mT for j in jacobian])
        assert torch.allclose(head.logit_covariance(features[:5], 0.7), expected, atol=1e-10)
        draws = head.draw_logits(features[:5], 0.7, 20_000, seed=1)
        assert torch.allclose(draws.mean(0), features[:5] @ weight.mT + bias, atol=0.1)
        covariance = torch.stack([torch.cov(draws[:, row].mT) for row in range(5)])
        assert torch.allclose(covariance, expected, rtol=0.1, atol=0.05)
    finally:
        torch.set_default_dtype(torch.float32)


def test_laplace_of_one_class_pair_is_the_exact_curvature() -> None:
    """With all features alike the Kronecker factors are exact: the average of products is a product."""
    features = torch.ones(30, 2, dtype=torch.float64)
    weight = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64)
    head = LaplaceHead.fit(features, weight, torch.zeros(2, dtype=torch.float64))

    def energy(flat: torch.Tensor) -> torch.Tensor:
        w = flat.view(2, 3)
        logits = features @ w[:, :2].mT + w[:, 2]
        return nn.functional.cross_entropy(logits, torch.zeros(30, dtype=torch.long), reduction="sum") + flat @ flat / 2

    hessian = torch.autograd.functional.hessian(energy, head.weight.flatten())
    jacobian = torch.kron(torch.eye(2, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64))
    expected = jacobian @ torch.linalg.inv(hessian) @ jacobian.mT
    assert torch.allclose(head.logit_covariance(features[:1], 1.0)[0], expected, atol=1e-8)


def test_prior_precision_is_small_where_the_head_is_too_sure() -> None:
    features = torch.randn(400, 4)
    weight = torch.randn(3, 4)
    labels = torch.distributions.Categorical(logits=features @ weight.mT).sample()
    right = LaplaceHead.fit(features, weight, torch.zeros(3))
    sure = LaplaceHead.fit(features, 6 * weight, torch.zeros(3))
    assert fit_prior_precision(sure, features, labels) < fit_prior_precision(right, features, labels)


def test_class_distance_is_mahalanobis() -> None:
    features, labels = torch.randn(90, 3) @ torch.randn(3, 3) + torch.arange(90)[:, None] % 3, torch.arange(90) % 3
    distance = ClassDistance.fit(features, labels)
    h = features.double()
    means = torch.stack([h[labels == label].mean(0) for label in range(3)])
    covariance = sum(torch.outer(row, row) for row in h - means[labels]) / 90
    new = torch.randn(7, 3)
    expected = torch.stack(
        [((row - mean) @ torch.linalg.inv(covariance) @ (row - mean)) for row in new.double() for mean in means]
    )
    assert torch.allclose(distance.squared(new), expected.view(7, 3).amin(1), rtol=1e-3)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_networks_keep_their_contract() -> None:
    x = torch.rand(5, 28, 28)
    for network in (networks.VisionTransformer(), networks.VisionTransformer(attention=False)):
        network.eval()
        assert torch.allclose(network(x), network.head(network.features(x)))
        assert network(x).shape == (5, 10)
    sizes = [sum(p.numel() for p in networks.VisionTransformer(10, flag).parameters()) for flag in (True, False)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_tokens_of_the_control_do_not_see_each_other() -> None:
    layers = networks.encoder_layers(8, 2, 16, 2, attention=False).eval()
    x = torch.randn(1, 4, 8)
    changed = x.clone()
    changed[0, 0] += 1
    one, other = x, changed
    for layer in layers:
        one, other = layer(one), layer(other)
    assert torch.equal(one[0, 1:], other[0, 1:])
    assert not torch.allclose(one[0, 0], other[0, 0])


def test_sngp_bounds_its_maps_and_knows_its_variance() -> None:
    network = networks.make_sngp(networks.VisionTransformer(3, width=16, heads=2, depth=1, mlp_width=16))
    with torch.no_grad():
        network.layers[0].linear1.parametrizations.weight.original.mul_(20)
    for _ in range(50):
        network(torch.rand(2, 28, 28))
    network.eval()
    layer = network.layers[0]
    for weight in (layer.linear1.weight, layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight):
        assert torch.linalg.matrix_norm(weight, ord=2) < 1.0
    features = torch.randn(40, 16)
    network.head.fit(features)
    phi = network.head.basis(features).double()
    p = network.head(features).softmax(-1).amax(-1).double()
    precision = torch.eye(phi.shape[1], dtype=torch.float64) + (phi.mT * (p * (1 - p))) @ phi
    expected = (phi @ torch.linalg.inv(precision) * phi).sum(-1)
    assert torch.allclose(network.head.variance(features).double(), expected, atol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


def test_finished_networks_come_from_the_cache(tmp_path: Path) -> None:
    task = tiny(epochs=1)
    state = torch.random.get_rng_state()
    first = training.trained(task, "sngp", 3, tmp_path, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = training.trained(task, "sngp", 3, tmp_path, progress=False)
    x = task.test.inputs
    assert torch.equal(first.network(x), again.network(x))
    assert torch.equal(
        first.network.head.variance(first.network.features(x)), again.network.head.variance(again.network.features(x))
    )
    assert again.seconds_per_step == first.seconds_per_step > 0
    assert [file.suffix for file in (tmp_path / "tiny").iterdir()] == [".pt"]
    other = training.trained(tiny(epochs=2), "sngp", 3, tmp_path, progress=False)
    assert not torch.equal(other.network(x), first.network(x))


def test_stopped_training_goes_on(tmp_path: Path) -> None:
    whole = training.trained(tiny(), "softmax", 0, tmp_path / "whole", progress=False)
    task, seen = tiny(), 0
    kind = training.KINDS["softmax"]

    def stops(network: nn.Module, x: torch.Tensor, y: torch.Tensor, done: float, num_data: int) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt
        return kind.loss(network, x, y, done, num_data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.KINDS, "softmax", training.Kind(kind.make, stops))
        with pytest.raises(KeyboardInterrupt):
            training.trained(task, "softmax", 0, tmp_path / "parts", progress=False)
    resumed = training.trained(task, "softmax", 0, tmp_path / "parts", progress=False)
    assert torch.equal(resumed.network(task.test.inputs), whole.network(task.test.inputs))


# --- judging ----------------------------------------------------------------------------------------------------------


def test_averaged_draws() -> None:
    log_probs = torch.randn(4, 6, 3, dtype=torch.float64).log_softmax(-1)
    answer = judging.averaged(log_probs)
    p = log_probs.exp().mean(0)
    assert torch.allclose(answer.log_probs.exp(), p)
    total = torch.distributions.Categorical(probs=p).entropy()
    each = torch.distributions.Categorical(logits=log_probs).entropy().mean(0)
    assert torch.allclose(answer.scores["entropy"], total)
    assert torch.allclose(answer.scores["mutual information"], total - each)


def judged(accuracy: float, nll: float, ece: float, shift: tuple[float, float], areas: dict[str, float]) -> dict:
    """What :func:`judging.judge` returns, as far as the goals look at it."""
    return {
        "test": {"accuracy": accuracy, "nll": nll, "ece": ece},
        "shifted": {"noise 1": {}},
        "shifted_mean": {"accuracy": shift[0], "ece": shift[1]},
        "ood": {"digits": {score: {"auroc": area} for score, area in areas.items()}},
    }


def test_verdicts() -> None:
    seeds = []
    for step in (-0.002, 0.0, 0.002):
        seeds.append(
            {
                "MLE": judged(0.85, 0.44, 0.04, (0.67, 0.15), {"entropy": 0.70, "energy": 0.80}),
                "MLE + temperature": judged(0.85, 0.43, 0.02, (0.67, 0.12), {"entropy": 0.75}),
                "MC dropout": judged(0.85, 0.42, 0.010, (0.66, 0.12), {"entropy": 0.75}),
                "last-layer Laplace": judged(0.85, 0.43, 0.02, (0.67, 0.13), {"entropy": 0.81}),
                "ensemble of 5": judged(0.86, 0.39, 0.012, (0.68, 0.10), {"entropy": 0.86}),
                "GP": judged(0.85, 0.43 + step, 0.030, (0.655, 0.09 + step), {"entropy": 0.83}),
                "GP, mean only": judged(0.85, 0.44, 0.04, (0.67, 0.15), {"entropy": 0.70}),
                "GP, sampled": judged(0.85, 0.435 + step, 0.02, (0.66, 0.12), {"entropy": 0.78}),
            }
        )
    found = {verdict["goal"]: verdict for verdict in judging.verdicts(seeds)}
    assert len(found) == len(judging.GOALS)
    differences = [0.003, 0.0, -0.015, 0.01, -0.005, 0.13, 0.03, 0.08, 0.02, 0.05, 0.005]
    assert [v["difference"] for v in found.values()] == pytest.approx(differences)
    met = ["yes", "open", "no", "yes", "no", "yes", "yes", "yes", "yes", "yes", "yes"]
    assert [v["met"] for v in found.values()] == met
    # Half the width of the interval for -.002, 0, .002: t(.975, 2) times .002 over the root of 3.
    assert found["NLL at most that of MLE with a temperature"]["high"] == pytest.approx(4.302653 * 0.002 / 3**0.5)


def test_verdicts_leave_out_what_was_not_measured() -> None:
    seed = {"GP": judged(0.8, 1.0, 0.1, (0.5, 0.1), {}), "MLE": judged(0.8, 1.0, 0.1, (0.5, 0.1), {})}
    for contender in seed.values():
        contender.update(shifted={}, shifted_mean={}, ood={})
    found = judging.verdicts([seed])
    assert [v["goal"] for v in found] == ["accuracy at least MLE's less 0.3 points"]
    assert found[0]["low"] == -math.inf and found[0]["met"] == "open"


def test_one_pass_is_that_of_the_package(tmp_path: Path) -> None:
    task = tiny(epochs=1)
    source = contenders.Source(task, 0, tmp_path)
    x = task.test.inputs
    answer = contenders.gp(source)(x)
    expected = gpseq.predict(source.calibrated(), x, method="variance_temperature")
    assert expected.samples is not None
    assert torch.allclose(answer.log_probs, expected.samples[0].log_softmax(-1), atol=1e-5)
    assert torch.allclose(answer.scores["variance"], expected.scores["variance"])
    assert torch.allclose(source.process()(x), source.network()(x), atol=1e-5)


@pytest.mark.slow
def test_contenders_run(tmp_path: Path) -> None:
    result = json.loads(json.dumps(run_case(lambda smoke: tiny(epochs=1), True, tmp_path)))
    for seed in result["seeds"]:
        for contender in seed["contenders"].values():
            assert 0 <= contender["test"]["accuracy"] <= 1
            assert all(0 <= area["auroc"] <= 1 for area in contender["ood"]["noise"].values())
            assert contender["seconds_per_item"] > 0
        first, second = (seed["contenders"][name] for name in ("MLE", "MLE + temperature"))
        assert first["test"]["accuracy"] == second["test"]["accuracy"]
        gp, mean = (seed["contenders"][name] for name in ("GP", "GP, mean only"))
        assert gp["test"]["accuracy"] == mean["test"]["accuracy"] == first["test"]["accuracy"]
        assert mean["test"]["nll"] == pytest.approx(first["test"]["nll"], abs=1e-5)
    text = "\n\n".join(report_case(result, tmp_path, ["## Tiny"]))
    assert "| last-layer Laplace | mutual information |" in text and "| GP: goal |" in text
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["tiny_reliability.png", "tiny_shift.png"]
