"""How the layers of a model draw, set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gpseq.nn.generator import Draws


@contextmanager
def use_sampling(model: nn.Module, sampling: str) -> Iterator[None]:
    """Let every layer of a model that draws do so in one way; what was set before comes back at the end.

    With ``"mean"`` nothing draws: the mean-only pass of a model, which every claim about its noise is to be held
    against.

    Args:
        model: any module; the layers of ``gpseq.nn`` inside are found at any depth.
        sampling: ``"marginal"``, ``"joint"``, ``"pathwise"`` or ``"mean"``, as far as all layers know it.

    Raises:
        ValueError: a layer does not know it. All layers are as they were.

    Example:
        >>> from gpseq.nn import SGPAttention
        >>> layer = SGPAttention(8, 2, num_inducing=4)
        >>> with use_sampling(layer, "mean"):
        ...     layer.sampling
        'mean'
        >>> layer.sampling
        'marginal'
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, Draws) and hasattr(layer, "sampling")]
    before = [layer.sampling for layer in layers]
    try:
        for layer in layers:
            layer.sampling = sampling
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer.sampling = former
