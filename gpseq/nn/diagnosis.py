"""Whether the Gaussian processes of a network still say something: noise, divergence and variance of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.logits import class_logits, log_softmax
from gpseq.nn.capture import Forward, Layer, Seen, call, evaluating, look_through, quiet
from gpseq.nn.generator import undisturbed, use_generator
from gpseq.nn.labelled import batches_of

#: Below and above this ratio of noise to signal a layer is no mixture of both.
SILENT, DROWNED = 0.05, 5.0
#: Above this share of the prior variance on real tokens, inducing keys are not where the data are.
LOST = 0.9
#: Two predictions whose probabilities differ by less than this (total variation, mean) are the same.
SAME = 1e-3


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer on real tokens.

    Attributes:
        name: in ``model.named_modules()``.
        sampling: how it draws.
        noise_to_signal: standard deviation of a draw, relative to that of the mean over tokens; roots of means of
            squares over heads and dimensions. For ``sampling="mean"`` that of the draws it would make.
        kl: what one sequence pays: the divergence of q(u), plus the mean of what is each sequence's own, in nats.
        variance_left: variance of the process at real tokens, as a share of the prior's: low where inducing keys are
            near and have seen data.
        effect: how far class probabilities move when the layer's mean is left out (total variation, mean).
    """

    name: str
    sampling: str
    noise_to_signal: float
    kl: float
    variance_left: float
    effect: float

    @property
    def words(self) -> str:
        """What that means; begins with "collapsed" where the layer has lost its noise, its mean or its data."""
        if self.noise_to_signal > DROWNED:
            return f"collapsed: noise drowns the mean {self.noise_to_signal:.0f} times, attention is switched off"
        if self.effect < SAME:
            return "collapsed: predictions are the same without this layer's mean"
        if self.variance_left > LOST:
            return f"collapsed: {self.variance_left:.0%} of the prior variance is left, it does not know its data"
        if self.sampling == "mean":
            return "does not draw; its variance tells data from the rest"
        if self.noise_to_signal < SILENT:
            return f"collapsed: noise is {self.noise_to_signal:.1%} of the mean, draws are the mean"
        return "healthy"


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; as a string, a table.

    Attributes:
        layers: one by one.
        shift: how far the probabilities of sampled predictions are from those of the mean-only pass (total variation,
            mean); ``None`` where no layer draws.
    """

    layers: tuple[LayerDiagnosis, ...]
    shift: float | None

    @property
    def collapsed(self) -> bool:
        """Whether a layer has, or draws change nothing."""
        return any(layer.words.startswith("collapsed") for layer in self.layers) or (
            self.shift is not None and self.shift < SAME
        )

    def __str__(self) -> str:
        width = max(5, *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':{width}}  noise/signal  KL (nats)  variance left  effect  verdict"]
        lines += [
            f"{layer.name:{width}}  {layer.noise_to_signal:12.3g}  {layer.kl:9.3g}  {layer.variance_left:13.1%}  "
            f"{layer.effect:6.3f}  {layer.words}"
            for layer in self.layers
        ]
        if self.shift is None:
            lines.append("No layer draws: predictions are the mean-only pass.")
        else:
            word = "collapsed: draws change nothing" if self.shift < SAME else "draws matter"
            lines.append(f"Sampled predictions differ from the mean-only pass by {self.shift:.4f}: {word}.")
        return "\n".join(lines)


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    num_batches: int = 4,
    num_samples: int = 10,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    show: bool = True,
) -> Diagnosis:
    """Look whether a model with Gaussian processes has collapsed, and print a table.

    Trained naively, it does so in one of three ways: the noise vanishes, and the model is an ordinary one; the noise
    drowns attention, and the model is one without; or queries drift away from the inducing keys, and the variance is
    the prior's everywhere. Accuracy and calibration alone show none of them.

    The model is in evaluation mode meanwhile, and afterwards as it was, but no layer remembers an earlier call. Numbers
    of a layer are those of the mean-only pass, without padding; where a model labels tokens, how far predictions move
    is averaged over all of them, padding included.

    Args:
        model: any module with layers that have inducing keys, which returns logits.
        loader: batches, with or without labels: tensors; tuples or lists, whose first element goes to the model; or
            mappings, ``model(**batch)``.
        num_batches: how many are used at most.
        num_samples: S, passes with draws.
        forward: called as ``forward(model, batch)`` in place of the above.
        generator: of the draws of all layers, on the model's device; ``None`` is torch's default generator.
        show: whether to print the table.

    Returns:
        The numbers, and the table as ``str``.

    Raises:
        RuntimeError: a layer was not called.
        TypeError: a batch is of another kind, or the model does not return logits.
        ValueError: there is no such layer or no batch.

    Example:
        >>> from gpseq.nn import replace_attention
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> model = replace_attention(nn.Sequential(model, nn.Linear(8, 3)), num_inducing=4)
        >>> report = diagnose(model, [torch.randn(16, 5, 8)], show=False)
        >>> report.collapsed, report.layers[0].words[:18]
        (True, 'collapsed: 100% of')
    """
    check_count("num_samples", num_samples)
    batches = list(islice(batches_of(loader), check_count("num_batches", num_batches)))
    tallies: dict[str, list[_Tally]] = {}
    layers = look_through(
        model, batches, lambda name, seen: tallies.setdefault(name, []).append(_Tally.of(seen)), None, forward
    )

    def probs() -> Tensor:
        found = [log_softmax(class_logits(call(model, batch, forward))).exp() for batch in batches]
        return torch.cat([p.flatten(0, -2) for p in found])

    draws = any(layer.sampling != "mean" for layer in layers.values())
    effects, shift = {}, None
    with quiet(model), torch.no_grad():
        plain = probs()
        for name, layer in layers.items():
            with _without_mean(layer):
                effects[name] = _distance(plain, probs())
    if draws:
        with evaluating(model), undisturbed(model), use_generator(model, generator), torch.no_grad():
            shift = _distance(plain, torch.stack([probs() for _ in range(num_samples)]).mean(0))
    report = Diagnosis(
        tuple(_judge(name, layer, tallies[name], effects[name]) for name, layer in layers.items()), shift
    )
    if show:
        print(report)  # noqa: T201 - it is what the function is called for
    return report


class _Tally(NamedTuple):
    """Sums over the tokens of one call."""

    noise: Tensor  # variance of draws, over heads and dimensions
    total: Tensor  # of the mean, (H, D)
    squares: Tensor
    left: Tensor  # variance over the prior's, over heads
    kl: Tensor  # over sequences
    tokens: int
    sequences: int

    @classmethod
    def of(cls, seen: Seen) -> _Tally:
        post = seen.moments()
        assert post.variance is not None
        heads, dims = post.mean.shape[1], post.mean.shape[-1]
        batch, token = seen.present.nonzero().unbind(-1)
        mean = post.mean[batch, :, token].double()
        prior = seen.prior_variance()
        kl = post.kl_global.expand(heads, dims).sum() + post.kl_amortised.expand(-1, heads, dims).sum((-2, -1))
        return cls(
            post.variance.mean(-2)[batch, :, token].double().mean(-1).sum(),
            mean.sum(0),
            mean.square().sum(0),
            (seen.variance() / prior)[batch, :, token].double().mean(-1).sum(),
            kl.double().sum(),
            len(batch),
            len(post.mean),
        )


def _judge(name: str, layer: Layer, tallies: list[_Tally], effect: float) -> LayerDiagnosis:
    """Numbers of a layer from those of its calls."""
    tokens, sequences = sum(t.tokens for t in tallies), sum(t.sequences for t in tallies)
    mean = torch.stack([t.total for t in tallies]).sum(0) / tokens
    signal = (torch.stack([t.squares for t in tallies]).sum(0) / tokens - mean.square()).mean().clamp_min(0.0)
    noise = torch.stack([t.noise for t in tallies]).sum() / tokens
    return LayerDiagnosis(
        name,
        layer.sampling,
        float((noise / signal).sqrt()),
        float(torch.stack([t.kl for t in tallies]).sum()) / sequences,
        float(torch.stack([t.left for t in tallies]).sum()) / tokens,
        effect,
    )


def _distance(one: Tensor, other: Tensor) -> float:
    """Mean total variation of probabilities ``(n, classes)``."""
    return float(0.5 * (one - other).abs().sum(-1).mean())


@contextmanager
def _without_mean(layer: Layer) -> Iterator[None]:
    """Let the heads of a layer be zero."""

    def silence(layer: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return torch.zeros_like(output)
        bias = layer.out_proj.bias
        # Times zero and not zeros, which nested tensors cannot be added to.
        return (output[0] * 0 if bias is None else output[0] * 0 + bias, *output[1:])

    handle = layer.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()
