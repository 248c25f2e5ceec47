"""Switches of torch and of models, which are where they were afterwards, also after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Without torch's fused encoder layers, which hide what is inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def forward_mode(model: nn.Module) -> Iterator[None]:
    """What forward-mode derivatives ask for: attention without fused kernels, and no caches of keys and values.

    Args:
        model: whose configurations ask for caches, as those of Hugging Face's decoders do.
    """
    configs = {id(config): config for module in model.modules() if (config := _cached(module)) is not None}
    with exact_kernels(), sdpa_kernel(SDPBackend.MATH), as_found(model):
        try:
            for config in configs.values():
                config.use_cache = False
            yield
        finally:
            for config in configs.values():
                config.use_cache = True


def _cached(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if getattr(config, "use_cache", None) is True else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and kernels that have all derivatives; afterwards each module's own mode again.

    Args:
        model: any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with exact_kernels(), sdpa_kernel(SDPBackend.MATH), as_found(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


#: Attributes that every module has, which are torch's.
_OF_TORCH = frozenset(vars(nn.Module()))


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """What modules note when they are called, such as the divergence of the last call, is what it was before.

    A call with drawn weights, or inside of ``vmap``, would leave there what nobody can use.

    Args:
        model: any module; tensors that are changed in place are not looked after.
    """
    found = [(module, _notes(module), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, notes, buffers in found:
            now = _notes(module)
            for name in now.keys() - notes.keys():
                del vars(module)[name]
            vars(module).update(notes)
            module._buffers.update(buffers)


def _notes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """What is drawn inside is drawn again afterwards, from torch's generators and from those that modules hold.

    The one place where states of generators are put back. A user's forward takes no generator, and it runs more often
    than it is asked to: for the sizes of states, at the mean to be followed, and once more to be compared with that.
    The comparison is right only with the same draws, and a seed of the user's gives the numbers that it would without
    such passes.

    Args:
        model: any module.
    """
    held = {id(value): value for module in model.modules() for value in vars(module).values()}
    generators = [value for value in held.values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
