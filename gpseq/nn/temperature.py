"""From the variances of a network's Gaussian processes to the temperature of its logits, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpseq.nn.capture import Layer, Seen, layers_with_keys, mean_over_tokens, watching
from gpseq.nn.sampling import use_sampling


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
        relative = seen.variance() / self.layers[name].inducing.typical_variance.unsqueeze(-1)
        self._calls.setdefault(name, []).append((relative, seen.present))

    def scores(self, per_token: bool = False) -> dict[str, Tensor]:
        """How far from its data each head is, 1 on average over those that its covariance was fitted to.

        Args:
            per_token: whether to keep the tokens, or average over those that are no padding.

        Returns:
            ``(B, H)`` by name, or ``(B, T, H)``; a layer that is called several times gives the mean.

        Raises:
            RuntimeError: a layer was not called.
        """
        silent = [name or "the model itself" for name in self.layers if name not in self._calls]
        if silent:
            raise RuntimeError(f"model: expected every layer to be called, {', '.join(silent)} was not.")
        found = {}
        for name, calls in self._calls.items():
            values = [v.mT if per_token else mean_over_tokens(v, present) for v, present in calls]
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
    layers = layers_with_keys(model)
    blank = [name or "the model itself" for name, layer in layers.items() if not layer.inducing.typical_variance.any()]
    if blank:
        raise RuntimeError(
            f"model: expected covariances that were fitted to data, {', '.join(blank)} was not; call "
            "gpseq.nn.fit_covariance first."
        )
    record = VarianceRecord(layers)
    with use_sampling(model, "mean"), watching(layers, record.add):
        yield record


def temperature(model: nn.Module, scores: dict[str, Tensor]) -> Tensor:
    r"""Temperature that the variances of an input ask for.

    .. math:: \tau = \sqrt{\sum_l a_l + b_l v_l^p}, \qquad v_l = \frac1H \sum_h v_{lh}

    With a and b divided among L layers that is :math:`a + b\, \overline{v_l^p}`.

    Args:
        model: that was calibrated.
        scores: of each layer, ``(..., H)``, see :meth:`VarianceRecord.scores`.

    Returns:
        ``(...)``.

    Raises:
        RuntimeError: the model was not calibrated.
    """
    layers = layers_with_keys(model)
    parts = torch.stack([layers[name].inducing.temperature for name in scores])  # (L, 3)
    levels = torch.stack([score.mean(-1) for score in scores.values()], -1)  # (..., L)
    if not (parts[:, 0] > 0).any():
        raise RuntimeError("model: expected one whose temperature was calibrated; call gpseq.nn.calibrate first.")
    return (parts[:, 0].sum() + levels.pow(parts[:, 2]) @ parts[:, 1]).sqrt()
