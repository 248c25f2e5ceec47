"""The scale of the noise of a network's Gaussian processes, fitted to held-out labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpseq.checks import check_count, stacklevel_outside
from gpseq.logits import log_mean_exp, log_softmax
from gpseq.nn.capture import Forward, called, evaluating, mean_depends_on_keys
from gpseq.nn.generator import undisturbed, use_generator
from gpseq.nn.labelled import Labels, batches_of, run
from gpseq.nn.sampling import use_sampling
from gpseq.nn.temperature import fitted_layers
from gpseq.sgpa.arguments import check_choice

#: Powers of four, up or down, after which a search ends.
LIMIT = 8


def calibrate_noise(
    model: nn.Module,
    loader: Iterable[Any],
    num_samples: int = 10,
    sampling: str = "marginal",
    forward: Forward | None = None,
    labels: Labels | None = None,
    batch_dim: int = 0,
    shift: bool = False,
    generator: torch.Generator | None = None,
) -> float:
    r"""Fit one factor of all prior variances to held-out labels, for predictions by draws.

    The factor minimises the negative log likelihood of the averaged probabilities, over a grid of powers of
    four and then between its best neighbours, with the same noise at every trial. Means stay: only layers whose mean
    does not depend on the variance are taken, mode ``"residual"`` with inducing values of zero.

    Args:
        model: whose covariances were fitted.
        loader: labelled batches, as for :func:`gpseq.nn.calibrate`; it is gone through once.
        num_samples: S, draws at each trial.
        sampling: how layers draw meanwhile: ``"marginal"``, ``"joint"`` or ``"pathwise"``.
        forward: called as ``forward(model, batch)``.
        labels: as for :func:`gpseq.nn.calibrate`.
        batch_dim: as for :func:`gpseq.nn.calibrate`.
        shift: as for :func:`gpseq.nn.calibrate`.
        generator: of the noise, on the model's device; ``None`` is torch's default generator.

    Returns:
        The factor, far below 1 where noise only hurts. It multiplies the variances, in place; what
        :func:`gpseq.nn.calibrate` found stays true.

    Raises:
        RuntimeError: covariances were not fitted before.
        TypeError: a batch has no labels, or the model does not return logits.
        ValueError: there is no batch or no label that counts, shapes do not fit, or a mean depends on the variance. The
            model is as it was.

    Example:
        >>> from gpseq.nn import fit_covariance
        >>> _ = torch.manual_seed(0)
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> model = nn.Sequential(model, nn.Flatten(), nn.Linear(40, 3))
        >>> _ = model[-1].weight.data.mul_(10)  # far too sure of itself
        >>> x = torch.randn(64, 5, 8)
        >>> model = fit_covariance(model, [x], num_inducing=8).eval()
        >>> y = torch.where(torch.rand(64) < 0.8, model(x).argmax(-1), torch.randint(3, (64,)))
        >>> calibrate_noise(model, [(x, y)]) > 1
        True
    """
    check_count("num_samples", num_samples)
    check_choice("sampling", sampling, ("marginal", "joint", "pathwise"))
    layers = fitted_layers(model)
    for name, layer in layers.items():
        if mean_depends_on_keys(layer):
            raise ValueError(
                f"model: expected layers whose mean does not depend on the variance, {called(name)} has another."
            )
    batches = list(batches_of(loader))
    device = next(model.parameters()).device
    seed = int(torch.randint(2**62, (1,), generator=generator, device=None if generator is None else generator.device))
    before = {name: layer.inducing.log_variance.detach().clone() for name, layer in layers.items()}

    def nlpd(log_factor: float) -> float:
        for name, layer in layers.items():
            layer.inducing.log_variance.copy_(before[name] + log_factor)
        noise = torch.Generator(device).manual_seed(seed)
        total, count = 0.0, 0
        with use_generator(model, noise), use_sampling(model, sampling):
            for batch in batches:
                drawn = [run(model, batch, forward, labels, batch_dim, shift) for _ in range(num_samples)]
                log_probs = log_mean_exp(torch.stack([log_softmax(part.logits) for part in drawn]))
                counts = drawn[0].counts
                total += float(F.nll_loss(log_probs[counts], drawn[0].labels[counts], reduction="sum"))
                count += int(counts.sum())
        if not count:
            raise ValueError("labels: expected at least one that counts, got none.")
        return total / count

    try:
        with evaluating(model), undisturbed(model), torch.no_grad():
            log_factor = _search(nlpd)
    except BaseException:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.inducing.log_variance.copy_(before[name])
        raise
    with torch.no_grad():
        for name, layer in layers.items():
            layer.inducing.log_variance.copy_(before[name] + log_factor)
            layer.inducing.typical_variance.mul_(math.exp(log_factor))
    return math.exp(log_factor)


def _search(function: Callable[[float], float]) -> float:
    """The best of a grid of powers of four that grows while its end is best, then between its neighbours."""
    step = math.log(4.0)
    trials = {k: function(k * step) for k in range(-3, 5)}

    def best() -> int:
        return min(trials, key=lambda k: (round(trials[k], 9), abs(k)))  # of equal ones, the least change

    while (k := best()) in (max(trials), min(trials)) and abs(k) < LIMIT:
        further = k + (1 if k > 0 else -1)
        trials[further] = function(further * step)
    if best() == LIMIT:
        warnings.warn(
            f"loader: labels ask for more than 4^{LIMIT} times the present variance, where the search ends.",
            UserWarning,
            stacklevel=stacklevel_outside(),
        )
    fine = {best() * step: trials[best()]}
    for width in (step / 2, step / 4):
        centre = min(fine, key=lambda t: fine[t])
        fine.update({t: function(t) for t in (centre - width, centre + width)})
    return min(fine, key=lambda t: fine[t])
