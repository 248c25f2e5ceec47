"""Rules for what changes the positions of maps ``(B, C, *positions)``: pools, padding and resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpseq.propagation.moments import GaussianState, LinearMap
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk


def _each(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of ``(N, C, *positions)`` for many batches, ``(R, B, C, *positions)``."""
    return lambda columns: function(columns.flatten(0, 1)).unflatten(0, columns.shape[:2])


@register(nn.AvgPool1d, nn.AvgPool2d)
def average_pool(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """A linear map: exact, with what positions have in common."""
    flat = isinstance(module, nn.AvgPool1d)

    def pool(x: Tensor, divisor: int | None = None) -> Tensor:
        def pair(value: Any, other: int) -> tuple[int, int]:
            # in two dimensions, where torch can be told what to divide by
            value = value if isinstance(value, tuple) else (value,) * (1 if flat else 2)
            return (other, value[0]) if flat else value

        found = F.avg_pool2d(
            x.unsqueeze(-2) if flat else x,
            pair(module.kernel_size, 1),
            pair(module.stride, 1),
            pair(module.padding, 0),
            module.ceil_mode,
            module.count_include_pad,
            getattr(module, "divisor_override", None) if divisor is None else divisor,
        )
        return found.squeeze(-2) if flat else found

    # Inputs of one output have the same weight, so that squares are those of the sum.
    one = torch.ones_like(state.mean[:1])
    weight = pool(one) / pool(one, 1)
    linear = LinearMap(_each(pool), lambda v: pool(v, 1) * weight.square(), mixes=True)
    return state.apply(module(state.mean), linear)


@register(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
def adaptive_average_pool(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """A linear map: exact, with what positions have in common."""
    mean = module(state.mean)
    weight = mean.new_ones(())
    for dim in range(2, mean.dim()):
        before, after = state.mean.shape[dim], mean.shape[dim]
        places = torch.arange(after, device=mean.device)
        # torch's windows: from the floor of i n / m to the ceiling of (i + 1) n / m
        lengths = ((places + 1) * before + after - 1) // after - places * before // after
        weight = weight / lengths.to(mean).view(-1, *[1] * (mean.dim() - 1 - dim))
    return state.apply(mean, LinearMap(_each(module), lambda v: module(v) * weight, mixes=True))


@register(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
def max_pool(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """The tangent at the mean: each output is the input that is largest on average.

    What is of second order is left out: the maximum of inputs that are nearly alike has a larger mean, and less
    variance.
    """
    flat = isinstance(module, nn.MaxPool1d | nn.AdaptiveMaxPool1d)
    function: Any
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d):
        function = F.max_pool1d if flat else F.max_pool2d
        mean, places = function(
            state.mean,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            ceil_mode=module.ceil_mode,
            return_indices=True,
        )
    else:
        function = F.adaptive_max_pool1d if flat else F.adaptive_max_pool2d
        mean, places = function(state.mean, module.output_size, return_indices=True)
    shape, index = mean.shape[2:], places.flatten(2)

    def choose(x: Tensor) -> Tensor:
        seen = x.flatten(-len(shape))
        return seen.gather(-1, index.expand(*seen.shape[:-1], -1)).unflatten(-1, shape)

    return state.apply(mean, LinearMap(choose, choose, mixes=True))


@register(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def constant_pad(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Certain entries at the borders."""

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, module.padding)

    return state.apply(module(state.mean), LinearMap(_each(pad), pad, mixes=True))


@register(
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.CircularPad1d,
    nn.CircularPad2d,
)
def repeating_pad(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Entries that are repeated at the borders; marginal forms forget that they are the same."""
    return _moved(module, state)


@register(nn.Upsample)
def upsample(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """The nearest entry; other modes have no rule."""
    if not module.mode.startswith("nearest"):
        return walk.unknown(module, state)
    return _moved(module, state)


def _moved(module: Any, state: GaussianState) -> GaussianState:
    def move(x: Tensor) -> Tensor:
        # which torch has for floating-point numbers only; places are integers, and exact in double precision
        return module(x) if x.is_floating_point() else module(x.double()).to(x.dtype)

    return state.move(move)
