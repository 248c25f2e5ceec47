"""The contenders: each is made from a task and trained networks, and then says what it thinks of inputs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpseq
from benchmarks.uncertainty.heads import ClassDistance, LaplaceHead, fit_prior_precision
from benchmarks.uncertainty.judging import Answer, Predictor, averaged, plain
from benchmarks.uncertainty.scaling import fit_scale, scaled_log_probs
from benchmarks.uncertainty.tasks import Part, Task
from benchmarks.uncertainty.training import CACHE, Trained, in_batches, trained
from gpseq.nn.capture import layers_with_keys

#: Passes of contenders that draw, heads drawn by Laplace's, members of the ensemble.
PASSES, HEADS, MEMBERS = 10, 50, 5
#: Training inputs that covariances are fitted on.
FITTED = 2_000
#: Validation inputs that the scale of draws is fitted on: each of a dozen trials takes ten passes.
NOISE_FITTED = 500


@dataclass
class Source:
    """Trained networks of one seed, and what several contenders make of them.

    Args:
        task: what they were trained on.
        seed: of the networks; the ensemble takes those of the next four seeds, too, in a circle of two more than are
            judged.
        cache: where finished ones are.
    """

    task: Task
    seed: int
    cache: Path = CACHE
    made: dict[Any, Any] = field(default_factory=dict)

    def trained(self, kind: str = "softmax", offset: int = 0) -> Trained:
        """A network and how long a step of its training took."""
        seed = (self.seed + offset) % (self.task.seeds + 2)
        if (kind, seed) not in self.made:
            self.made[kind, seed] = trained(self.task, kind, seed, self.cache)
        return self.made[kind, seed]

    def network(self, kind: str = "softmax", offset: int = 0) -> nn.Module:
        """A network in eval mode, which nobody may change."""
        return self.trained(kind, offset).network

    def val_logits(self, kind: str = "softmax") -> Tensor:
        """Logits of a network on the validation part."""
        if ("val", kind) not in self.made:
            self.made["val", kind] = in_batches(self.network(kind), self.task.val.inputs)
        return self.made["val", kind]

    def train_features(self) -> Tensor:
        """What the head of the plain network sees of the training part."""
        if "features" not in self.made:
            self.made["features"] = in_batches(self.network().features, self.task.train.inputs)  # type: ignore[arg-type]
        return self.made["features"]

    def process(self, kind: str = "softmax") -> nn.Module:
        """A network with Gaussian processes in its attention, covariances fitted; its mean is untouched."""
        if ("process", kind) not in self.made:
            part = self.task.train
            loader = batched(Part(part.inputs[:FITTED], _labels(part)[:FITTED]))
            with seeded(self.seed):
                self.made["process", kind] = gpseq.nn.fit_covariance(copy.deepcopy(self.network(kind)), loader).eval()
        return self.made["process", kind]

    def calibrated(self, kind: str = "softmax") -> nn.Module:
        """The same with a temperature from the variances of all layers."""
        if ("calibrated", kind) not in self.made:
            network = copy.deepcopy(self.process(kind))
            gpseq.nn.calibrate(network, batched(self.task.val))
            self.made["calibrated", kind] = network
        return self.made["calibrated", kind]

    def noisy(self, kind: str = "softmax") -> nn.Module:
        """The same with the scale of the draws fitted on a part of the validation part."""
        if ("noisy", kind) not in self.made:
            network, val = copy.deepcopy(self.process(kind)), self.task.val
            part = Part(val.inputs[:NOISE_FITTED], _labels(val)[:NOISE_FITTED])
            with seeded(self.seed):
                gpseq.nn.calibrate_noise(network, batched(part), PASSES)
            self.made["noisy", kind] = network
        return self.made["noisy", kind]

    def once(self, what: str, x: Tensor, make: Callable[[], Any]) -> Any:
        """What several contenders compute of the same inputs, computed once."""
        key = (what, x.data_ptr(), tuple(x.shape))
        if key not in self.made:
            self.made[key] = x, make()  # with x, which stays where it is for as long as its address is a key
        return self.made[key][1]

    def attentions(self) -> tuple[str, ...]:
        """Names of the Gaussian processes in the attention of :meth:`process`, in their order."""
        return tuple(layers_with_keys(self.process()))


Contender = Callable[[Source], Predictor]


def fitted(contender: Contender, source: Source) -> tuple[Predictor, float]:
    """A contender ready to predict, and the process time that fitting it took once its networks were there."""
    begun = time.process_time()
    return contender(source), time.process_time() - begun


# --- peers ------------------------------------------------------------------------------------------------------------


def mle(source: Source, kind: str = "softmax") -> Predictor:
    """The network as it is; ``energy`` is minus the log of the sum of the exponentials of the logits."""
    network = source.network(kind)

    def predict(x: Tensor) -> Answer:
        logits = in_batches(network, x)
        return plain(logits.log_softmax(-1), energy=-logits.logsumexp(-1))

    return predict


def temperature(source: Source, kind: str = "softmax") -> Predictor:
    """The logits divided by one scalar, fitted on the validation part."""
    scale = fit_scale(source.val_logits(kind), _labels(source.task.val))
    network = source.network(kind)

    def predict(x: Tensor) -> Answer:
        logits = in_batches(network, x)
        return plain(scaled_log_probs(logits, logits.new_zeros(len(logits)), scale), energy=-logits.logsumexp(-1))

    return predict


def mc_dropout(source: Source) -> Predictor:
    """Ten passes with dropout on, probabilities averaged."""
    return lambda x: averaged(_dropout_logits(source, x).log_softmax(-1))


def sngp(source: Source) -> Predictor:
    """Bounded hidden maps and a Gaussian process as head; mean-field logits."""
    network = source.network("sngp")

    def predict(x: Tensor) -> Answer:
        features = in_batches(network.features, x)  # type: ignore[arg-type]
        variance = in_batches(network.head.variance, features)  # type: ignore[union-attr, arg-type]
        logits = in_batches(network.head, features)  # type: ignore[arg-type]
        return plain(scaled_log_probs(logits, variance, (1.0, math.pi / 8)), variance=variance)

    return predict


def laplace(source: Source) -> Predictor:
    """Kronecker-factored Laplace approximation of the head, 50 heads drawn, prior precision by validation NLL."""
    network, task = source.network(), source.task
    head = LaplaceHead.fit(source.train_features(), network.head.weight, network.head.bias)  # type: ignore[union-attr, arg-type]
    features = in_batches(network.features, task.val.inputs)  # type: ignore[arg-type]
    precision = fit_prior_precision(head, features, _labels(task.val), HEADS, source.seed)

    def predict(x: Tensor) -> Answer:
        features = in_batches(network.features, x)  # type: ignore[arg-type]
        parts = [
            head.draw_logits(part, precision, HEADS, source.seed).log_softmax(-1).float()
            for part in features.split(1000)
        ]
        return averaged(torch.cat(parts, 1))

    return predict


def ensemble(source: Source) -> Predictor:
    """Probabilities of five networks, averaged."""
    networks = [source.network(offset=offset) for offset in range(MEMBERS)]
    return lambda x: averaged(torch.stack([in_batches(network, x) for network in networks]).log_softmax(-1))


# --- ours -------------------------------------------------------------------------------------------------------------


def gp(source: Source, first: int = 0, kind: str = "softmax") -> Predictor:
    """Gaussian processes in all attentions, one pass: the variance of those from a layer on sets the temperature."""
    network = copy.deepcopy(source.process(kind))
    found = gpseq.nn.calibrate(network, batched(source.task.val), source.attentions()[first:])

    def predict(x: Tensor) -> Answer:
        logits, variances = _one_pass(source, x, kind)
        chosen = variances[:, first:]
        level = chosen.pow(found.power).mean(-1)
        return plain(scaled_log_probs(logits, level, (found.a, found.b)), variance=chosen.mean(-1))

    return predict


def gp_sampled(source: Source, kind: str = "softmax") -> Predictor:
    """The same processes, ten passes with draws of a fitted scale, probabilities averaged."""
    network = source.noisy(kind)

    def draw(part: Tensor) -> Tensor:
        with gpseq.nn.use_sampling(network, "marginal"):
            drawn = gpseq.predict(network, part, method="sample", num_samples=PASSES)
        assert drawn.samples is not None
        return drawn.samples.log_softmax(-1).transpose(0, 1)

    def predict(x: Tensor) -> Answer:
        with seeded(source.seed):
            return averaged(in_batches(draw, x, 100).transpose(0, 1))

    return predict


def gp_mean(source: Source, kind: str = "softmax") -> Predictor:
    """Control: the mean of the same processes alone, neither draws nor temperature."""
    network = source.process(kind)

    def predict(x: Tensor) -> Answer:
        with gpseq.nn.use_sampling(network, "mean"):
            return plain(in_batches(network, x).log_softmax(-1))

    return predict


def gp_dropout(source: Source) -> Predictor:
    """Ten passes with dropout on, the logits of each divided by the temperature of the processes' variance.

    The two scalars are fitted for such passes, with the power that was the likelier one for a single pass.
    """
    val = source.task.val
    power = next(iter(layers_with_keys(source.calibrated()).values())).inducing.temperature[2]

    def level(x: Tensor) -> Tensor:
        return _one_pass(source, x)[1].pow(power).mean(-1)

    scale = fit_scale(_dropout_logits(source, val.inputs), _labels(val), level(val.inputs))

    def predict(x: Tensor) -> Answer:
        tau = (scale[0] + scale[1] * level(x)).sqrt().unsqueeze(-1)
        return averaged((_dropout_logits(source, x) / tau).log_softmax(-1), variance=_one_pass(source, x)[1].mean(-1))

    return predict


# --- controls ---------------------------------------------------------------------------------------------------------


def constant_noise(source: Source) -> Predictor:
    """Control: ten passes with noise that does not depend on the input.

    At each attention's output it has the covariance that the processes' draws have there on the validation part, over
    all tokens and inputs, with the layers below at their mean.
    """
    network = copy.deepcopy(source.process())
    with seeded(source.seed):
        factors = _noise_factors(source.noisy(), source.task.val.inputs[:500])
    for name, factor in factors.items():

        def add(module: nn.Module, inputs: Any, output: Any, factor: Tensor = factor) -> Any:
            rows = _rows(output)
            rows = rows + torch.randn_like(rows) @ factor.mT
            if isinstance(output, tuple):
                return (rows, *output[1:])
            return rows.unflatten(-1, (output.shape[1], output.shape[-1])).transpose(1, 2)

        network.get_submodule(name).register_forward_hook(add)

    def draw(part: Tensor) -> Tensor:
        return torch.stack([network(part) for _ in range(PASSES)], 1)

    def predict(x: Tensor) -> Answer:
        with seeded(source.seed):
            return averaged(in_batches(draw, x).transpose(0, 1).log_softmax(-1))

    return predict


def no_attention(source: Source) -> Predictor:
    """Control: a network without attention, as it is."""
    return mle(source, "none")


def class_distance(source: Source) -> Predictor:
    """Control: the temperature grows with the Mahalanobis distance d of the head's features to the nearest class.

    Its spread is d^2 or d^4, what makes the validation part more probable.
    """
    network, task = source.network(), source.task
    distance = ClassDistance.fit(source.train_features(), _labels(task.train))
    typical = distance.squared(source.train_features()).mean()

    def squared(x: Tensor) -> tuple[Tensor, Tensor]:
        features = in_batches(network.features, x)  # type: ignore[arg-type]
        return in_batches(network.head, features), distance.squared(features) / typical  # type: ignore[arg-type]

    logits, ratio = squared(task.val.inputs)
    best = None
    for power in (1, 2):
        scale = fit_scale(logits, _labels(task.val), ratio**power)
        log_probs = scaled_log_probs(logits, ratio**power, scale)
        loss = -log_probs.gather(-1, _labels(task.val).unsqueeze(-1)).mean().item()
        if best is None or loss < best[0]:
            best = loss, power, scale
    assert best is not None
    _, power, scale = best

    def predict(x: Tensor) -> Answer:
        logits, ratio = squared(x)
        return plain(scaled_log_probs(logits, ratio**power, scale).float(), distance=ratio)

    return predict


CONTENDERS: dict[str, Contender] = {
    "MLE": mle,
    "MLE + temperature": temperature,
    "MC dropout": mc_dropout,
    "SNGP": sngp,
    "last-layer Laplace": laplace,
    "ensemble of 5": ensemble,
    "GP": gp,
    "GP, layers 2 on": lambda source: gp(source, 1),
    "GP, sampled": gp_sampled,
    "GP, mean only": gp_mean,
    "GP + MC dropout": gp_dropout,
    "GP from scratch": lambda source: gp(source, kind="gp"),
    "GP from scratch, sampled": lambda source: gp_sampled(source, "gp"),
    "GP from scratch, mean only": lambda source: gp_mean(source, "gp"),
    "GP from scratch, no dropout": lambda source: gp(source, kind="gp without dropout"),
    "constant noise": constant_noise,
    "class distance": class_distance,
    "no attention": no_attention,
}
#: Those that depend on the package's attention.
OURS = tuple(name for name in CONTENDERS if name.startswith("GP") or name == "constant noise")
#: What is trained for a contender, in units of ordinary networks, by kind.
TRAINED: dict[str, tuple[str, int]] = {
    **{name: ("gp", 1) for name in CONTENDERS if "from scratch" in name},
    "GP from scratch, no dropout": ("gp without dropout", 1),
    "SNGP": ("sngp", 1),
    "no attention": ("none", 1),
    "ensemble of 5": ("softmax", 5),
}


# --- parts ------------------------------------------------------------------------------------------------------------


def batched(part: Part, batch_size: int = 100) -> list[tuple[Tensor, Tensor]]:
    """A labelled part as batches, in its order."""
    return list(zip(part.inputs.split(batch_size), _labels(part).split(batch_size), strict=True))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from a seed inside, and torch's default generator as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _dropout_logits(source: Source, x: Tensor) -> Tensor:
    """Logits ``(S, n, C)`` of passes with dropout."""

    def draw() -> Tensor:
        network = copy.deepcopy(source.network()).train()
        with seeded(source.seed):
            return torch.stack([in_batches(network, x) for _ in range(PASSES)])

    return source.once("dropout", x, draw)


def _one_pass(source: Source, x: Tensor, kind: str = "softmax") -> tuple[Tensor, Tensor]:
    """Logits ``(n, C)``, and the variance of each layer relative to that on training data, ``(n, L)``."""
    network = source.calibrated(kind)

    def look() -> tuple[Tensor, Tensor]:
        logits, variances = [], []
        with torch.no_grad():
            for part in x.split(250):
                made = gpseq.predict(network, part, method="variance_temperature")
                assert made.samples is not None
                logits.append(made.samples[0] * made.scores["temperature"].unsqueeze(-1))
                layers = [score.mean(-1) for name, score in made.scores.items() if name.startswith("variance.")]
                variances.append(torch.stack(layers, -1))
        return torch.cat(logits), torch.cat(variances)

    return source.once(f"process {kind}", x, look)


def _noise_factors(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Cholesky factors of the covariance of the draws at each attention's output, layers below at their mean."""
    seen: dict[str, list[Tensor]] = {}
    layers = layers_with_keys(network)
    busy = False

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                with gpseq.nn.use_sampling(module, "marginal"):
                    drawn = _rows(module(*inputs, **keywords))
            finally:
                busy = False
            seen.setdefault(name, []).append((drawn - _rows(output)).flatten(0, -2))

        return look

    hooks = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in layers.items()]
    try:
        with gpseq.nn.use_sampling(network, "mean"):
            in_batches(network, x, 100)
    finally:
        for hook in hooks:
            hook.remove()
    factors = {}
    for name, parts in seen.items():
        rows = torch.cat(parts).double()
        rows = rows[rows.abs().sum(-1) > 0]  # padding gets no noise
        covariance = rows.mT @ rows / len(rows)
        jitter = 1e-8 * covariance.diagonal().mean() + 1e-30
        factors[name] = torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance))).float()
    return factors


def _rows(output: Any) -> Tensor:
    """Output of an attention, or heads ``(B, H, T, D)``, as ``(B, T, width)``."""
    return output[0] if isinstance(output, tuple) else output.transpose(1, 2).flatten(-2)


def _labels(part: Part) -> Tensor:
    assert part.labels is not None
    return part.labels
