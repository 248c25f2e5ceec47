"""Algebra in float64 whatever the dtype of the user's modules: promotion on the way in, buffers that stay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from gpytorch.constraints import Interval
from torch import Tensor, nn

Result = TypeVar("Result")


# Stand-ins take the place of a module's own tensors for a moment; a second thread must neither see nor keep them.
_ONE_AT_A_TIME = threading.RLock()


def in_float64(
    function: Callable[..., Result], modules: tuple[nn.Module, ...], *args: Any, frozen: bool = False
) -> Result:
    """Call ``function(*args)`` while every floating parameter and buffer of ``modules`` appears in float64.

    The promotion is differentiable (gradients arrive at the original parameters in their own dtype), touches nothing
    permanently, and costs nothing when the modules are in float64 already. What ``function`` returns must be
    evaluated: a lazy object would look up the parameters later, in their own dtype. Autocast is off inside. Threads
    take turns.

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
    with _ONE_AT_A_TIME, torch.autocast(device_type, enabled=False):
        if not frozen and all(t.dtype == torch.float64 for m in modules for t in floating_tensors(m)):
            return function(*args)
        with _promoted(modules, frozen):
            return function(*args)


@contextmanager
def _promoted(modules: tuple[nn.Module, ...], frozen: bool) -> Iterator[None]:
    """Float64 stand-ins in place of the modules' tensors, each tensor once however many names it has.

    `torch.func.functional_call` does the same for one tree of modules, but leaves stand-ins behind where a tensor
    can be reached by two names, as in a kernel that two others share.
    """
    places: list[tuple[dict[str, Any], str, Tensor, bool]] = []
    stand_ins: dict[int, Tensor] = {}
    for part in {id(part): part for module in modules for part in module.modules()}.values():
        # Running statistics move on in training; they are buffers, and bounds of constraints are not among them.
        moves = part.training and not isinstance(part, Interval)
        tables: tuple[tuple[dict[str, Any], bool, bool], ...] = (
            (part._parameters, frozen, False),
            (part._buffers, False, moves),
        )
        for table, detach, write_back in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.is_floating_point() and (tensor.dtype != torch.float64 or detach):
                    places.append((table, name, tensor, write_back))
                    stand_ins.setdefault(id(tensor), (tensor.detach() if detach else tensor).double())
    try:
        for table, name, tensor, _ in places:
            table[name] = stand_ins[id(tensor)]
        yield
    finally:
        for table, name, tensor, write_back in places:
            now, table[name] = table[name], tensor
            if write_back:
                with torch.no_grad():
                    tensor.copy_(now)


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
