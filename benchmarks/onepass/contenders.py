"""Predictions from one weight posterior: by draws, by the network's tangent, by one pass, and by laplace-torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.onepass.tasks import Data, Inputs, Problem
from benchmarks.uncertainty.scaling import fit_scale
from gpseq import Predictive
from gpseq.logits import network_output
from gpseq.propagation import (
    Calibration,
    Curvature,
    WeightPosterior,
    calibrate,
    fit_curvature,
    linearised,
    propagate,
    sample,
)

#: Prior precisions that are tried.
GRID = tuple(10 ** (power / 2) for power in range(11))
#: Classes up to which laplace-torch's Jacobians of the head are within reach.
FEW_CLASSES = 10
#: Inputs at a time, so that memory stays small.
CHUNK = 100


@dataclass(frozen=True)
class Answer:
    """What a contender says of inputs.

    Attributes:
        probs: ``(n, C)`` in float64.
        information: mutual information of label and weights, ``(n,)``; ``None`` for a contender without draws.
    """

    probs: Tensor
    information: Tensor | None = None

    @property
    def log_probs(self) -> Tensor:
        """``(n, C)``, finite."""
        return self.probs.clamp_min(1e-300).log()

    @property
    def entropy(self) -> Tensor:
        """Of the predicted classes, ``(n,)``, in nats."""
        return -(self.probs * self.log_probs).sum(-1)


@dataclass(frozen=True)
class Found:
    """A contender on one problem.

    Attributes:
        test: what it says of the test part.
        ood: of the parts out of distribution.
        seconds: process time of the test part, without what is fitted once.
        fitted: scalars that were fitted on the validation part, and other remarks.
    """

    test: Answer
    ood: dict[str, Answer]
    seconds: float
    fitted: dict[str, Any]


@dataclass(frozen=True)
class Belief:
    """The posterior that all contenders share.

    Attributes:
        posterior: of the weights.
        prior_precision: the one that was best for Monte Carlo.
        tried: negative log probability of validation labels, by prior precision.
        seconds: process time of the curvature.
    """

    posterior: WeightPosterior
    prior_precision: float
    tried: dict[float, float]
    seconds: float


def choose_posterior(problem: Problem, seed: int, grid: Sequence[float] = GRID) -> Belief:
    """The Kronecker-factored Laplace approximation whose prior precision suits Monte Carlo on the validation part.

    Args:
        problem: a trained network and its data.
        seed: of the draws.
        grid: prior precisions that are tried.
    """
    begun = time.process_time()
    curvature = problem_curvature(problem, seed)
    seconds = time.process_time() - begun
    factor = problem.num_train / len(problem.train)
    assert problem.val.labels is not None
    tried = {}
    for precision in grid:
        drawn = draw(problem, curvature.posterior(precision, factor), problem.val.inputs, problem.samples[0], seed)
        tried[precision] = negative_log(averaged(drawn), problem.val.labels).mean().item()
    best = min(tried, key=tried.__getitem__)
    return Belief(curvature.posterior(best, factor), best, tried, seconds)


def problem_curvature(problem: Problem, seed: int) -> Curvature:
    """The generalised Gauss-Newton matrix over the training part."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for part in problem.train.batches(CHUNK):
        if isinstance(part.inputs, Tensor):
            batches.append((part.inputs, part.labels))
        else:
            batches.append({**part.inputs, "labels": part.labels})
    # Weights that are certain would have a graph, which grows with the data.
    with _gradients(problem.network, False):
        return fit_curvature(
            problem.network, batches, structure="kron", parameters=list(problem.uncertain), generator=generator
        )


def negative_log(answer: Answer, labels: Tensor) -> Tensor:
    """Negative log probability of each label, ``(n,)``."""
    return -answer.log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


# --- without a posterior, and by draws ---------------------------------------------------------------------------------


@torch.no_grad()
def logits(network: nn.Module, inputs: Inputs) -> Tensor:
    """Of a network with its trained weights, ``(n, C)``."""
    parts = [
        network(part.inputs) if isinstance(part.inputs, Tensor) else network(**part.inputs)
        for part in Data(inputs).batches(CHUNK)
    ]
    return torch.cat([network_output(part)[0] for part in parts])


@torch.no_grad()
def draw(problem: Problem, posterior: WeightPosterior, inputs: Inputs, number: int, seed: int) -> Tensor:
    """Logits under drawn weights, ``(S, n, C)``; the draws are the same for all inputs."""
    generator = torch.Generator().manual_seed(1000 + seed)
    found = sample(problem.network, posterior, inputs, number, generator, chunk_size=CHUNK)
    assert found.samples is not None
    return found.samples


def averaged(drawn: Tensor) -> Answer:
    """The answer of draws ``(S, n, C)``."""
    probs = drawn.double().softmax(-1)
    mean = Answer(probs.mean(0))
    each = -(probs * probs.clamp_min(1e-300).log()).sum(-1)
    return Answer(mean.probs, (mean.entropy - each.mean(0)).clamp_min(0))


def point_estimates(problem: Problem) -> Iterator[tuple[str, Found]]:
    """The network as it is, and with a temperature."""
    assert problem.val.labels is not None
    begun = time.process_time()
    test = logits(problem.network, problem.test.inputs)
    seconds = time.process_time() - begun
    outside = {name: logits(problem.network, part.inputs) for name, part in problem.ood.items()}
    square, _ = fit_scale(logits(problem.network, problem.val.inputs), problem.val.labels)
    for name, tau in (("MAP", 1.0), ("MAP + temperature", square**0.5)):
        fitted = {"temperature": tau} if tau != 1.0 else {}
        yield (
            name,
            Found(
                Answer((test.double() / tau).softmax(-1)),
                {part: Answer((value.double() / tau).softmax(-1)) for part, value in outside.items()},
                seconds,
                fitted,
            ),
        )


def monte_carlo(problem: Problem, posterior: WeightPosterior, seed: int) -> Iterator[tuple[str, Found]]:
    """Few draws of the weights, and many."""
    for number in problem.samples:
        begun = time.process_time()
        test = averaged(draw(problem, posterior, problem.test.inputs, number, seed))
        seconds = time.process_time() - begun
        outside = {
            name: averaged(draw(problem, posterior, part.inputs, number, seed)) for name, part in problem.ood.items()
        }
        yield f"Monte Carlo, {number}", Found(test, outside, seconds, {})


# --- Gaussians over logits --------------------------------------------------------------------------------------------

Moments = Callable[[Inputs], Predictive]


def gaussian(
    name: str, moments: Moments, problem: Problem, seed: int, probit: bool = False
) -> Iterator[tuple[str, Found]]:
    """A contender that answers with a Gaussian: as it is, with a scale, and with a scale and a temperature.

    The two are fitted on the validation part. Probabilities are averages over draws from the Gaussian, the same for all.

    Args:
        name: of the contender.
        moments: from inputs to the Gaussian.
        problem: what it is judged on.
        seed: of draws.
        probit: whether the first answer is by the probit rule on marginal variances, too, as laplace-torch has it.
    """
    assert problem.val.labels is not None
    begun = time.process_time()
    test = moments(problem.test.inputs)
    seconds = time.process_time() - begun
    val = moments(problem.val.inputs)
    outside = {part: moments(data.inputs) for part, data in problem.ood.items()}
    calibrations: Mapping[str, Calibration | None] = {
        "": None,
        " + scale": quietly_calibrated(val, problem.val.labels, seed, problem.draws),
        " + scale, temperature": quietly_calibrated(val, problem.val.labels, seed, problem.draws, temperature=True),
    }
    if probit:
        yield f"{name}, probit", Found(_by_rule(test), {n: _by_rule(x) for n, x in outside.items()}, seconds, {})
    for suffix, calibration in calibrations.items():
        numbers = {} if calibration is None else {"scale": calibration.scale, "temperature": calibration.temperature}
        begun = time.process_time()
        answer = averaged_gaussian(test, calibration, seed, problem.draws)
        link = time.process_time() - begun
        far = {part: averaged_gaussian(value, calibration, seed, problem.draws) for part, value in outside.items()}
        yield name + suffix, Found(answer, far, seconds + link, numbers)


def _by_rule(predictive: Predictive) -> Answer:
    return Answer(predictive.to(torch.float64).probs("probit"))


def quietly_calibrated(
    val: Predictive, labels: Tensor, seed: int, draws: int, temperature: bool = False
) -> Calibration:
    """A scale, or a scale and a temperature; what runs away is seen in the numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        generator = torch.Generator().manual_seed(seed)
        return calibrate(val, labels, temperature=temperature, num_samples=draws, generator=generator)


def averaged_gaussian(predictive: Predictive, calibration: Calibration | None, seed: int, draws: int) -> Answer:
    """The answer of a Gaussian over logits."""
    made = predictive if calibration is None else calibration.apply(predictive)
    parts = [
        averaged(made[start : start + CHUNK].to(torch.float64).rsample(draws, torch.Generator().manual_seed(seed)))
        for start in range(0, len(made), CHUNK)
    ]
    information = torch.cat([part.information for part in parts if part.information is not None])
    return Answer(torch.cat([part.probs for part in parts]), information)


def in_chunks(moments: Moments) -> Moments:
    """The same, some inputs at a time; only the covariance of the logits is kept."""

    def run(inputs: Inputs) -> Predictive:
        found = []
        for part in Data(inputs).batches(CHUNK):
            with torch.no_grad():
                made = moments(part.inputs)
            found.append(Predictive.from_moments(made.mean.detach(), made.covariance.to_dense().detach()))
        return Predictive.cat(found)

    return run


def one_pass(problem: Problem, posterior: WeightPosterior, seed: int, **options: Any) -> Moments:
    """Moments by propagation; the directions of low rank are the same for all inputs."""

    def run(inputs: Inputs) -> Predictive:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            found = propagate(problem.network, posterior, inputs, generator=generator, chunk_size=CHUNK // 2, **options)
        return found.detach()

    return run


def tangent(problem: Problem, posterior: WeightPosterior, seed: int) -> Moments:
    """Moments by the network's tangent in its weights: the GLM predictive, by draws of tangents."""

    def run(inputs: Inputs) -> Predictive:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            found = linearised(problem.network, posterior, inputs, problem.tangents, CHUNK // 2, generator)
        return found.detach()

    return run


def propagations(problem: Problem, posterior: WeightPosterior, seed: int) -> Iterator[tuple[str, Found]]:
    """The published rules, and those of this package in several forms."""
    yield from gaussian("streamlined", one_pass(problem, posterior, seed, preset="streamlined"), problem, seed)
    forms: dict[str, dict[str, Any]] = {"diagonal": {"covariance": "diag"}}
    for columns in problem.columns:
        forms[f"low rank, {columns}"] = {"covariance": "lowrank", "num_tangents": columns}
    if problem.full:
        forms["full"] = {"covariance": "full"}
    for name, options in forms.items():
        yield from gaussian(name, one_pass(problem, posterior, seed, **options), problem, seed)


def main_form(problem: Problem) -> str:
    """The form that the verdicts are about."""
    return "full" if problem.full else f"low rank, {problem.columns[-1]}"


# --- laplace-torch ----------------------------------------------------------------------------------------------------


def generalised_linear(problem: Problem, belief: Belief, seed: int) -> Iterator[tuple[str, Found]]:
    """The GLM predictive of laplace-torch where its Jacobians are within reach, and that of tangents elsewhere."""
    if problem.rival:
        rival = fit_rival(problem.network, problem.train, belief.prior_precision)
        yield from gaussian("GLM (laplace-torch)", _rival_moments(rival), problem, seed, probit=True)
    else:
        yield from gaussian("GLM (linearised draws)", tangent(problem, belief.posterior, seed), problem, seed)
    if problem.features is not None and problem.features[1].out_features <= FEW_CLASSES:
        features, head = problem.features

        def seen(data: Data) -> Data:
            with torch.no_grad():
                parts = [features(part.inputs) for part in data.batches(CHUNK)]
            return Data(torch.cat(parts), data.labels)

        begun = time.process_time()
        test = seen(problem.test)
        seconds = time.process_time() - begun
        ood = {name: seen(part) for name, part in problem.ood.items()}
        alone = Problem(head, ("*",), seen(problem.train), problem.num_train, seen(problem.val), test, ood)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rival = fit_rival(head, alone.train, None)
        for name, found in gaussian("GLM of the head (laplace-torch)", _rival_moments(rival), alone, seed):
            yield name, Found(found.test, found.ood, found.seconds + seconds, found.fitted)


def fit_rival(network: nn.Module, train: Data, prior_precision: float | None) -> Any:
    """A Kronecker-factored Laplace approximation of laplace-torch.

    Args:
        network: all of its weights are uncertain.
        train: its training data.
        prior_precision: ``None`` is that of the highest marginal likelihood.
    """
    from laplace import Laplace

    assert isinstance(train.inputs, Tensor) and train.labels is not None
    data = torch.utils.data.TensorDataset(train.inputs, train.labels)
    with _gradients(network, True):
        made = Laplace(network, "classification", subset_of_weights="all", hessian_structure="kron")
        made.fit(torch.utils.data.DataLoader(data, batch_size=500))
        if prior_precision is None:
            made.optimize_prior_precision(method="marglik")
        else:
            made.prior_precision = prior_precision
    return made


def _rival_moments(rival: Any) -> Moments:
    def run(inputs: Inputs) -> Predictive:
        with torch.enable_grad():
            mean, covariance = rival._glm_predictive_distribution(inputs)
        return Predictive.from_moments(mean.detach(), (covariance.detach() + covariance.detach().mT) / 2)

    return in_chunks(run)


@contextmanager
def _gradients(network: nn.Module, wanted: bool) -> Iterator[None]:
    """With gradients of all weights, or of none."""
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    network.requires_grad_(wanted)
    try:
        yield
    finally:
        for name, p in network.named_parameters():
            p.requires_grad_(before[name])
