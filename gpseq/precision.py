"""Algebra in float64 whatever the dtype of the user's modules: promotion on the way in, buffers that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


class _Call(nn.Module):
    """Gives `functional_call` a module whose forward is an arbitrary function that uses other modules."""

    def __init__(self, modules: tuple[nn.Module, ...], function: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def in_float64(
    function: Callable[..., Result], modules: tuple[nn.Module, ...], *args: Any, frozen: bool = False
) -> Result:
    """Call ``function(*args)`` while every floating parameter and buffer of ``modules`` appears in float64.

    The promotion is differentiable (gradients arrive at the original parameters in their own dtype), touches nothing
    permanently, and costs nothing when the modules are in float64 already. What ``function`` returns must be
    evaluated: a lazy object would look up the parameters later, in their own dtype. Autocast is off inside.

    Args:
        function: uses ``modules``; receives ``args``.
        modules: the modules to promote.
        args: handed on, not changed.
        frozen: detach the parameters, so that gradients reach ``args`` and nothing else.

    Returns:
        What ``function`` returns.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> in_float64(layer, (layer,), torch.ones(1, 1, dtype=torch.float64)).dtype
        torch.float64
    """
    frozen = frozen and torch.is_grad_enabled()
    device_type = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
    with torch.autocast(device_type, enabled=False):
        if not frozen and all(t.dtype == torch.float64 for m in modules for t in floating_tensors(m)):
            return function(*args)
        swapped = {
            f"parts.{index}.{name}": tensor.detach().double() if frozen else tensor.double()
            for index, module in enumerate(modules)
            for name, tensor in chain(module.named_parameters(), module.named_buffers())
            if tensor.is_floating_point()
        }
        return torch.func.functional_call(_Call(modules, function), swapped, args)


def floating_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Floating parameters and buffers of a module and its children, many times faster than by name."""
    for part in module.modules():
        for tensor in chain(part._parameters.values(), part._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                yield tensor


class Float64Buffers(nn.Module):
    """A module whose float64 buffers stay float64 under ``.to(dtype)``, ``.float()`` and ``.half()``.

    Devices are followed as usual. A state that is updated a million times cannot afford to be rounded once because
    somebody cast the model.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float64Buffers:
        kept = {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.float64}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != torch.float64:
                self._buffers[name] = buffer.to(moved.device)
        return self
