"""Where a layer's draws come from: a generator that reaches layers inside models that know nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Draws(nn.Module):
    """A layer that draws.

    Attributes:
        generator: where its draws come from; ``None`` is torch's default generator, advanced as dropout does.
            :func:`gpseq.nn.use_generator` sets it for a while. It is no part of the layer's state, and activation
            checkpointing, which brings torch's default generator back for the second forward pass, does not know of it.
    """

    generator: torch.Generator | None = None
    _transient: frozenset[str] = frozenset({"generator"})  # attributes that a copy or a file leaves out


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model forget what is asked of them meanwhile: their divergence stays that of the call before.

    Args:
        model: any module; the layers of ``gpseq.nn`` inside are found at any depth.
    """
    before = [
        (layer, {name: layer.__dict__.get(name) for name in layer._transient})
        for layer in model.modules()
        if isinstance(layer, Draws)
    ]
    try:
        yield
    finally:
        for layer, attributes in before:
            for name, value in attributes.items():
                setattr(layer, name, value)


@contextmanager
def use_generator(model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
    """Let every layer of a model that draws, draw from one generator.

    Layers in the order of ``model.modules()`` share it, and what was set before comes back at the end.

    Args:
        model: any module; the layers of ``gpseq.nn`` inside are found at any depth.
        generator: a ``torch.Generator`` on the model's device; ``None`` is torch's default generator.

    Raises:
        TypeError: it is no generator.

    Example:
        >>> layer = Draws()
        >>> with use_generator(nn.Sequential(layer), torch.Generator().manual_seed(1)):
        ...     layer.generator is None
        False
        >>> layer.generator is None
        True
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}.")
    with setting([module for module in model.modules() if isinstance(module, Draws)], "generator", generator):
        yield


@contextmanager
def setting(layers: Sequence[Draws], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of some layers for a while.

    Args:
        layers: that have it.
        name: of the attribute.
        value: for all of them.
    """
    before = [getattr(layer, name) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, name, value)
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            setattr(layer, name, former)
