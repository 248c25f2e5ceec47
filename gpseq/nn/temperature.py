"""From the variances of a network's Gaussian processes to the temperature of its logits, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpseq.nn.capture import Layer, Seen, called, layers_with_keys, mean_over_tokens, watching
from gpseq.nn.sampling import use_sampling

#: A relative variance above this counts as this; its eighth power is a number in float32 still.
MOST = 3e4


class VarianceRecord:
    """Relative variances of the layers of a model in one pass.

    Args:
        layers: by name.
    """

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, seen: Seen) -> None:
        """Take in a call, for :func:`gpseq.nn.capture.watching`."""
        variance = seen.variance()
        relative = variance / self.layers[name].inducing.typical_variance.to(variance.dtype).unsqueeze(-1)
        self._calls.setdefault(name, []).append((relative, seen.present))

    def scores(self, per_token: bool = False) -> dict[str, Tensor]:
        """How far from its data each head is, 1 on average over those that its covariance was fitted to.

        Args:
            per_token: whether to keep the tokens, or average over those that are no padding. A sequence of nothing else
                counts as typical.

        Returns:
            ``(B, H)`` by name, or ``(B, T, H)``; a layer that is called several times gives the mean.

        Raises:
            RuntimeError: a layer was not called.
            ValueError: a layer was called with sequences of several lengths, and tokens are asked for.
        """
        silent = [called(name) for name in self.layers if name not in self._calls]
        if silent:
            raise RuntimeError(f"model: expected every layer to be called, {', '.join(silent)} was not.")
        found = {}
        for name, calls in self._calls.items():
            if per_token:
                values = [v.mT for v, _ in calls]
            else:
                values = [
                    torch.where(present.any(-1, keepdim=True), mean_over_tokens(v, present), 1.0)
                    for v, present in calls
                ]
            if len({v.shape for v in values}) > 1:
                raise ValueError(
                    f"model: expected calls of {name or 'the model itself'} with sequences of one length, got "
                    f"{', '.join(str(v.shape[1]) for v in values)}."
                )
            found[name] = values[0] if len(values) == 1 else torch.stack(values).mean(0)
        return found


@contextmanager
def recording(model: nn.Module) -> Iterator[VarianceRecord]:
    """Record the variances of one pass, in which nothing draws.

    Args:
        model: whose covariances were fitted.

    Raises:
        RuntimeError: they were not.
        ValueError: there is no layer with inducing keys.
    """
    layers = fitted_layers(model)
    record = VarianceRecord(layers)
    with use_sampling(model, "mean"), watching(layers, record.add):
        yield record


def fitted_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers of a model that have inducing keys, by name.

    Raises:
        RuntimeError: a covariance was not fitted.
        ValueError: there is no such layer.
    """
    layers = layers_with_keys(model)
    # One question to the device for all layers.
    fitted = torch.stack([layer.inducing.typical_variance.any() for layer in layers.values()]).tolist()
    blank = [called(name) for name, known in zip(layers, fitted, strict=True) if not known]
    if blank:
        raise RuntimeError(
            f"model: expected covariances that were fitted to data, {', '.join(blank)} was not; call "
            "gpseq.nn.fit_covariance first."
        )
    return layers


def variance_level(variances: Tensor, power: float) -> Tensor:
    r"""What a squared temperature grows with, :math:`\tfrac1L \sum_l v_l^p`.

    Args:
        variances: relative ones, ``(..., L)``.
        power: p.

    Returns:
        ``(...)``.
    """
    return variances.clamp_max(MOST).pow(power).mean(-1)


def temperature(model: nn.Module, scores: dict[str, Tensor]) -> Tensor:
    r"""Temperature that the variances of an input ask for.

    .. math:: \tau^2 = a + \frac{b}{L} \sum_l v_l^p, \qquad v_l = \frac1H \sum_h v_{lh}

    over the L layers that :func:`gpseq.nn.calibrate` was told to use.

    Args:
        model: that was calibrated.
        scores: of each layer, ``(..., H)``, see :meth:`VarianceRecord.scores`; of those that are not used their shape
            does not matter.

    Returns:
        ``(...)``.

    Raises:
        RuntimeError: the model was not calibrated.
        ValueError: layers that are used see sequences of several lengths.
    """
    layers = layers_with_keys(model)
    parts = torch.stack([layers[name].inducing.temperature for name in scores]).tolist()
    kept = dict(zip(scores, parts, strict=True))
    used = [name for name, (a, _, _) in kept.items() if a > 0]
    if not used:
        raise RuntimeError("model: expected one whose temperature was calibrated; call gpseq.nn.calibrate first.")
    levels = [scores[name].mean(-1) for name in used]
    if len({level.shape for level in levels}) > 1:
        raise ValueError(
            "model: expected layers whose tokens are those of the logits; calibrate with layers= that name the others."
        )
    a, b = (sum(kept[name][index] for name in used) for index in (0, 1))
    # A b of zero means that variances do not count, however large.
    return (a + b * variance_level(torch.stack(levels, -1), kept[used[0]][2])).sqrt()
