"""A temperature from variances, fitted to held-out labels by two scalars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.logits import log_softmax
from gpseq.nn.capture import Forward, evaluating
from gpseq.nn.generator import undisturbed
from gpseq.nn.labelled import Labels, batches_of, run
from gpseq.nn.surgery import Layers, matching
from gpseq.nn.temperature import fitted_layers, recording, variance_level

#: Powers of the variance that are tried.
POWERS = (2, 4, 8)
#: Temperatures stay within this factor of the spread of the logits, to either side: labels without an error among them
#: ask for none at all, and random ones for an infinite one.
FACTOR = 100.0
#: Labels that a grid of starts is tried on.
GRID_LABELS = 1000


@dataclass(frozen=True)
class Calibration:
    r"""A temperature of logits, :math:`\tau^2 = a + b\, \overline{v_l^p}`, and what it brought on the data of the fit.

    Attributes:
        a: what every input gets.
        b: what it gets for its variances; 0 if they say nothing about errors.
        power: p; 2, 4 or 8.
        nlpd: negative log likelihood of a label, in nats.
        nlpd_temperature: with the best single temperature.
        nlpd_before: without any.
        num_labels: how many there were.
    """

    a: float
    b: float
    power: int
    nlpd: float
    nlpd_temperature: float
    nlpd_before: float
    num_labels: int


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Layers = "all",
    forward: Forward | None = None,
    labels: Labels | None = None,
    batch_dim: int = 0,
    shift: bool = False,
) -> Calibration:
    r"""Fit the two scalars of ``gpseq.predict(model, x, method="variance_temperature")`` to held-out labels.

    .. math:: P(y \mid x) = \mathrm{softmax}(z / \tau), \qquad \tau^2 = a + \frac{b}{L} \sum_{l=1}^L v_l(x)^p

    where :math:`v_l` is the variance of layer l, the mean over tokens and heads, relative to its mean on the data that
    :func:`gpseq.nn.fit_covariance` saw. a and b minimise the negative log likelihood, for the p of 2, 4 and 8 that does
    it best; b is 0 if that is no worse. One pass over the data gives logits and variances; classes with the highest
    probability stay the same.

    The numbers are kept in the layers, and so in the ``state_dict``. The data have to be others than those of the
    training, on which a network is too sure. What they do not show, such as how wrong the model is far away from them,
    two numbers cannot know.

    Args:
        model: whose covariances were fitted.
        loader: labelled batches: ``(x, labels)``, of which x goes to the model, or mappings with ``"labels"``,
            ``model(**batch)``. Labels are integers, one for each event of the logits; -100 does not count.
        layers: whose variance counts: ``"all"``, ``"last"``, or a pattern as in :func:`gpseq.nn.replace_attention`, on
            the names of the layers with inducing keys. The first layer sees corruptions best, the later ones data of
            another kind.
        forward: called as ``forward(model, batch)`` in place of the above.
        labels: from a batch to its labels, for batches of another kind.
        batch_dim: batch dimension of the logits and labels of a model that labels tokens: 1 for ``(T, B, classes)``.
        shift: whether labels are the tokens themselves and logits are for the next one, as in causal language models.

    Returns:
        The scalars, and the likelihoods with and without them.

    Raises:
        RuntimeError: covariances were not fitted before.
        TypeError: a batch has no labels, or the model does not return logits.
        ValueError: there is no batch or no label that counts, shapes do not fit, or a pattern matches no layer. The
            model is as it was.

    Source:
        Derived in the guide "A trained model's uncertainty"; with b = 0 it is temperature scaling of Guo et al. (2017),
        On calibration of modern neural networks.

    Example:
        >>> from gpseq.nn import fit_covariance
        >>> _ = torch.manual_seed(0)
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> model = nn.Sequential(model, nn.Flatten(), nn.Linear(40, 3))
        >>> x, y = torch.randn(64, 5, 8), torch.randint(3, (64,))
        >>> fitted = calibrate(fit_covariance(model, [x], num_inducing=8), [(x, y)])
        >>> fitted.nlpd <= fitted.nlpd_temperature <= fitted.nlpd_before
        True
    """
    named = fitted_layers(model)
    chosen = matching(layers, list(named))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model), undisturbed(model), torch.no_grad():
        for batch in batches_of(loader):
            with recording(model) as record:
                z, y, counts = run(model, batch, forward, labels, batch_dim, shift)
            scores = record.scores(per_token=z.dim() == 3)
            shapes = {tuple(scores[name].shape[:-1]) for name in chosen}
            if shapes != {tuple(y.shape)}:
                raise ValueError(
                    f"model: expected logits of the tokens that its layers see, {', '.join(map(str, shapes))}, got "
                    f"{tuple(y.shape)}; see layers and batch_dim."
                )
            variance = torch.stack([scores[name].mean(-1) for name in chosen], -1)
            found.append((z[counts].double(), y[counts], variance[counts].double()))
    fitted = fit_temperature(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    with torch.no_grad():
        for name, layer in named.items():
            share = 1 / len(chosen) if name in chosen else 0.0
            layer.inducing.temperature.copy_(torch.tensor([fitted.a * share, fitted.b * share, fitted.power]))
    return fitted


def fit_temperature(logits: Tensor, labels: Tensor, variances: Tensor) -> Calibration:
    r"""The a > 0, b >= 0 and p for which :math:`\mathrm{softmax}(z / \sqrt{a + b\, \overline{v_l^p}})` is likeliest.

    Args:
        logits: z, ``(n, classes)``.
        labels: ``(n,)``.
        variances: v, ``(n, L)``.

    Returns:
        Scalars and likelihoods.

    Raises:
        ValueError: there is nothing to fit to, a label is out of range, or a number is not finite.

    Example:
        >>> z = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> fit_temperature(z, torch.tensor([0, 0, 1, 1]), torch.zeros(4, 1)).b  # nothing to learn
        0.0
    """
    if not len(labels):
        raise ValueError("labels: expected at least one that counts, got none.")
    if labels.min() < 0 or labels.max() >= logits.shape[-1]:
        raise ValueError(
            f"labels: expected 0 to {logits.shape[-1] - 1}, got {int(labels.min())} to {int(labels.max())}."
        )
    if not variances.isfinite().all():
        raise ValueError("variances: expected finite numbers, got others.")
    log_softmax(logits)  # refuses NaN and infinity
    # Outside of inference mode, where the caller may be, derivatives exist.
    with torch.inference_mode(False), torch.enable_grad():
        return _fit(logits.detach().double().clone(), labels.clone(), variances.detach().double().clone())


def _fit(logits: Tensor, labels: Tensor, variances: Tensor) -> Calibration:
    allowed = logits.isfinite()
    middle = torch.where(allowed, logits, 0.0).sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True)
    spread = torch.where(allowed, logits - middle, 0.0).square().mean().sqrt().clamp_min(1e-30)
    # What is forbidden stays so at every temperature, but minus infinity has no derivative.
    scaled = torch.where(allowed, logits / spread, -1e30)
    bound = 2 * math.log(FACTOR)

    def within(t: Tensor) -> Tensor:
        """A squared temperature of scaled logits, between its bounds."""
        return (bound * torch.tanh(t / bound)).exp()

    def nlpd(a: Tensor, b: Tensor | float, level: Tensor) -> Tensor:
        return F.cross_entropy(scaled / (a + b * level).sqrt().unsqueeze(-1), labels)

    nothing = logits.new_zeros(len(logits))
    (single,) = within(_minimise(lambda t: nlpd(within(t[0]), 0.0, nothing), logits.new_zeros(1)))
    plain = nlpd(single, 0.0, nothing).item()
    found = [(plain, single, 0.0, POWERS[0])]
    for power in POWERS if variances.any() else ():
        level = variance_level(variances, power)
        typical = level.mean()
        relative = level / typical
        # Starts: half of the squared temperature for everybody, half for the variances; mostly the latter; and the best
        # of a grid, as few labels can have several minima.
        starts = [torch.stack([single * (1 - share), single * share]) for share in (0.5, 0.9)]
        starts.append(_best_of_grid(scaled, labels, relative))
        for ends in starts:
            start = bound * torch.atanh((ends.log() / bound).clamp(-0.99, 0.99))
            a, b = within(_minimise(lambda t, s=relative: nlpd(within(t[0]), within(t[1]), s), start))  # type: ignore[misc]
            found.append((nlpd(a, b, relative).item(), a, float(b / typical), power))
    # Of minima that are equal but for rounding, the simpler one.
    best = min(found, key=lambda f: (round(f[0], 9), f[3], f[2]))
    size = spread.square()
    before = F.cross_entropy(logits.clamp_min(-1e30), labels).item()
    return Calibration(float(best[1] * size), float(best[2] * size), best[3], best[0], plain, before, len(labels))


@torch.no_grad()
def _best_of_grid(scaled: Tensor, labels: Tensor, level: Tensor) -> Tensor:
    """The best pair of a and b of a coarse grid, on some of the labels."""
    step = -(-len(labels) // GRID_LABELS)
    scaled, labels, level = scaled[::step], labels[::step], level.expand(len(labels))[::step]
    values = torch.logspace(-2, 2, 9, dtype=scaled.dtype, device=scaled.device)
    pairs = torch.cartesian_prod(values, values)
    losses = [F.cross_entropy(scaled / (a + b * level).sqrt().unsqueeze(-1), labels) for a, b in pairs]
    return pairs[torch.stack(losses).argmin()]


def _minimise(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A minimum near a start."""
    point = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], max_iter=100, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = function(point)
        value.backward()
        return value

    optimiser.step(closure)
    return point.detach()
