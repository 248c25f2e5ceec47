"""Few numbers fitted to held-out labels: how much the variances of a network say about its logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.logits import log_mean_exp, log_softmax, network_output
from gpseq.nn.capture import Forward, call, evaluating, layers_with_keys
from gpseq.nn.generator import undisturbed, use_generator
from gpseq.nn.sampling import use_sampling
from gpseq.nn.surgery import Layers, matching
from gpseq.nn.temperature import recording

#: Labels that do not count, as in torch's cross-entropy.
IGNORED = -100
#: Squared temperatures stay between these; a set without an error asks for none, and would get 0.
LEAST, MOST = 1e-4, 1e4
#: Powers of the variance that are tried.
POWERS = (2, 4)


@dataclass(frozen=True)
class Calibration:
    r"""A temperature of logits, :math:`\tau^2 = a + b\, \overline{v_l^p}`, and what it brought on the data of the fit.

    Attributes:
        a: what every input gets.
        b: what it gets for its variances; 0 if they say nothing about errors.
        power: p, 2 or 4.
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
    batch_dim: int = 0,
) -> Calibration:
    r"""Fit the two scalars of ``gpseq.predict(model, x, method="variance_temperature")`` to held-out labels.

    .. math:: P(y \mid x) = \mathrm{softmax}(z / \tau), \qquad \tau^2 = a + \frac{b}{L} \sum_{l=1}^L v_l(x)^p

    where :math:`v_l` is the variance of layer l, the mean over tokens and heads, relative to its mean on the data that
    :func:`gpseq.nn.fit_covariance` saw. a and b minimise the negative log likelihood, for the p of 2 and 4 that does
    it better; b is 0 if that is no worse. One pass over the data gives logits and variances; classes with the highest
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
        batch_dim: batch dimension of the logits of a model that labels tokens: 1 for ``(T, B, classes)``.

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
    named = layers_with_keys(model)
    chosen = matching(layers, list(named))
    logits, labels, variances = [], [], []
    with evaluating(model), undisturbed(model), torch.no_grad():
        for batch in loader:
            with recording(model) as record:
                z = _logits(call(model, batch, forward), batch_dim)
            y = _labels(batch, batch_dim).to(z.device)
            if y.shape != z.shape[:-1] or z.dim() not in (2, 3):
                raise ValueError(f"loader: expected labels for logits of shape {tuple(z.shape)}, got {tuple(y.shape)}.")
            scores = record.scores(per_token=z.dim() == 3)
            variance = torch.stack([scores[name].mean(-1) for name in chosen], -1)
            if variance.shape[:-1] != y.shape:
                raise ValueError(f"model: expected logits of the {variance.shape[1]} tokens, got {z.shape[1]}.")
            counts = y != IGNORED
            logits.append(z[counts].double())
            labels.append(y[counts])
            variances.append(variance[counts].double())
    if not labels:
        raise ValueError("loader: expected at least one batch, got none.")
    fitted = fit_temperature(torch.cat(logits), torch.cat(labels), torch.cat(variances))
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
    # What is forbidden stays so at every temperature, but minus infinity has no derivative.
    logits = logits.detach().double().clamp_min(-1e30)

    def nlpd(a: Tensor, b: Tensor | float, level: Tensor) -> Tensor:
        tau = (a + b * level).clamp(LEAST, MOST).sqrt()
        return F.cross_entropy(logits / tau.unsqueeze(-1), labels)

    nothing = logits.new_zeros(len(logits))
    before = nlpd(logits.new_ones(()), 0.0, nothing).item()
    (single,) = _minimise(lambda t: nlpd(t[0].exp(), 0.0, nothing), logits.new_zeros(1)).exp()
    plain = nlpd(single, 0.0, nothing).item()
    found = [(plain, float(single), 0.0, POWERS[0])]
    for power in POWERS if variances.any() else ():
        level = variances.detach().double().pow(power).mean(-1)
        # Starts: half of the squared temperature for everybody, half for the variances; and mostly the latter.
        for share in (0.5, 0.9):
            start = torch.stack([single * (1 - share), single * share / level.mean()]).log()
            a, b = _minimise(lambda t, s=level: nlpd(t[0].exp(), t[1].exp(), s), start).exp()  # type: ignore[misc]
            found.append((nlpd(a, b, level).item(), float(a), float(b), power))
    # Of minima that are equal but for rounding, the simpler one.
    best = min(found, key=lambda f: (round(f[0], 9), f[3], f[2]))
    return Calibration(best[1], best[2], best[3], best[0], plain, before, len(labels))


def calibrate_noise(
    model: nn.Module,
    loader: Iterable[Any],
    num_samples: int = 10,
    sampling: str = "marginal",
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
) -> float:
    r"""Fit one factor of all prior variances to held-out labels, for predictions by draws.

    The factor minimises the negative log likelihood of the averaged probabilities, over a grid of powers of two and
    then between its best neighbours, with the same noise at every trial. Means stay: only layers whose mean does not
    depend on the variance are taken, mode ``"residual"`` with inducing values of zero.

    Args:
        model: whose covariances were fitted.
        loader: labelled batches, as for :func:`calibrate`; it is gone through once.
        num_samples: S, draws at each trial.
        sampling: how layers draw meanwhile.
        forward: called as ``forward(model, batch)``.
        generator: of the noise, on the model's device; ``None`` is torch's default generator.

    Returns:
        The factor. It multiplies the variances, in place; what :func:`calibrate` found stays true.

    Raises:
        TypeError: a batch has no labels, or the model does not return logits.
        ValueError: there is no batch or no label that counts, shapes do not fit, or a mean depends on the variance. The
            model is as it was.

    Example:
        >>> from gpseq.nn import fit_covariance
        >>> _ = torch.manual_seed(0)
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> model = nn.Sequential(model, nn.Flatten(), nn.Linear(40, 3))
        >>> x, y = torch.randn(64, 5, 8), torch.randint(3, (64,))
        >>> calibrate_noise(fit_covariance(model, [x], num_inducing=8), [(x, y)]) > 0
        True
    """
    check_count("num_samples", num_samples)
    layers = layers_with_keys(model)
    for name, layer in layers.items():
        if getattr(layer, "mode", "residual") != "residual" or layer.inducing.value.detach().any():
            raise ValueError(
                f"model: expected layers whose mean does not depend on the variance, {name or 'it'} has another."
            )
    batches = list(loader)
    if not batches:
        raise ValueError("loader: expected at least one batch, got none.")
    device = next(model.parameters()).device
    seed = int(torch.randint(2**62, (1,), generator=generator, device=device if generator is not None else None))
    before = {name: layer.inducing.log_variance.detach().clone() for name, layer in layers.items()}

    def nlpd(log_factor: float) -> float:
        for name, layer in layers.items():
            layer.inducing.log_variance.copy_(before[name] + log_factor)
        noise = torch.Generator(device).manual_seed(seed)
        total, count = 0.0, 0
        with use_generator(model, noise), use_sampling(model, sampling):
            for batch in batches:
                draws = [log_softmax(_logits(call(model, batch, forward), 0)) for _ in range(num_samples)]
                y = _labels(batch, 0).to(draws[0].device)
                loss = F.nll_loss(log_mean_exp(torch.stack(draws)).flatten(0, -2), y.flatten(), reduction="sum")
                total, count = total + float(loss), count + int((y != IGNORED).sum())
        if not count:
            raise ValueError("labels: expected at least one that counts, got none.")
        return total / count

    try:
        with evaluating(model), undisturbed(model), torch.no_grad():
            step = math.log(4.0)
            trials = {k: nlpd(k * step) for k in range(-3, 5)}
            while (best := min(trials, key=lambda k: trials[k])) in (max(trials), min(trials)) and abs(best) < 8:
                further = best + (1 if best > 0 else -1)
                trials[further] = nlpd(further * step)
            fine = {best * step: trials[best]}
            for width in (step / 2, step / 4):
                centre = min(fine, key=lambda t: fine[t])
                fine.update({t: nlpd(t) for t in (centre - width, centre + width)})
            chosen = min(fine, key=lambda t: fine[t])
    except BaseException:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.inducing.log_variance.copy_(before[name])
        raise
    with torch.no_grad():
        for name, layer in layers.items():
            layer.inducing.log_variance.copy_(before[name] + chosen)
            layer.inducing.typical_variance.mul_(math.exp(chosen))
    return math.exp(chosen)


def _minimise(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A minimum near a start."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], max_iter=100, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = function(point)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(closure)
    return point.detach()


def _logits(output: Any, batch_dim: int) -> Tensor:
    """Logits of at least two classes, batch first."""
    values, noise = network_output(output)
    if noise is not None:
        raise TypeError("model: expected logits, got a Normal.")
    values = values.unsqueeze(-1) if values.dim() == 1 else values
    values = values.transpose(0, batch_dim) if values.dim() == 3 else values
    return torch.cat([torch.zeros_like(values), values], -1) if values.shape[-1] == 1 else values


def _labels(batch: Any, batch_dim: int) -> Tensor:
    """Labels of a batch, batch first."""
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    else:
        found = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not isinstance(found, Tensor):
        raise TypeError("loader: expected batches (x, labels), or mappings with 'labels'.")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"loader: expected integer labels, got {found.dtype}.")
    return found.transpose(0, batch_dim) if found.dim() == 2 else found
