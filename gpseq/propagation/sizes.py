"""How large the states of a propagation are, and how much memory there is for them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gpseq.propagation.call import Call
from gpseq.propagation.switches import as_found, exact_kernels, same_draws

#: How torch says that numbers are of the wrong kind.
_KINDS = re.compile(r"dtype|scalar type|input type", re.IGNORECASE)


def largest_state(model: nn.Module, call: Call) -> int:
    """Entries of the largest output of all modules, for one element; of what is chosen from the last, only that.

    The model runs once, on one element, or on a batch that stays whole; neither it nor any generator of random numbers
    notices.

    Args:
        model: any module.
        call: its arguments.

    Raises:
        TypeError: the model does not take the dtype of x.
    """
    one = next(call.chunks(1))
    shapes: list[torch.Size] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, Tensor):
            shapes.append(output.shape)

    args, named = one.arguments()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(exact_kernels())
        stack.enter_context(as_found(model))
        stack.enter_context(same_draws(model))
        for module in model.modules():
            stack.callback(module.register_forward_hook(note).remove)
        try:
            model(*args, **named)
        except RuntimeError as error:
            if call.first.is_floating_point() or not _KINDS.search(str(error)):
                raise
            raise TypeError(
                f"x: expected a dtype that the model takes, such as float32, got {call.first.dtype}."
            ) from error
    last = shapes[-1] if shapes else None
    positions, outputs = (call.named.get(name) for name in ("positions", "outputs"))
    sizes = [1]
    for shape in shapes:
        size = -(-shape.numel() // len(one.first))
        if shape == last and len(shape) > 1:
            size = size if positions is None else size // shape[-2] * len(positions)
            size = size if outputs is None else size // shape[-1] * len(outputs)
        sizes.append(size)
    return max(sizes)


@contextmanager
def noticing_hooks(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose hooks change what these get or return, which rules do not see.

    Args:
        model: any module, which is called inside.
    """
    found: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            before, after = _comparison(name, found)
            if module._forward_pre_hooks:
                for hook, first in ((before, True), (after, False)):
                    stack.callback(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True).remove)
            before, after = _comparison(name, found)
            if module._forward_hooks:
                for hook, first in ((before, True), (after, False)):
                    stack.callback(module.register_forward_hook(hook, prepend=first).remove)
        yield found


def _comparison(name: str, found: list[str]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks for before and after all others, which note the name where these two get different tensors."""
    seen: list[list[tuple[int, int]]] = []

    def before(module: nn.Module, *given: Any) -> None:
        seen.append(_marks(given))

    def after(module: nn.Module, *given: Any) -> None:
        if seen.pop() != _marks(given) and name not in found:
            found.append(name)

    return before, after


def _marks(given: Any) -> list[tuple[int, int]]:
    """Which tensors there are, and how often they were changed in place."""
    tensors = [value for value in tree_leaves(given) if isinstance(value, Tensor)]
    return [(id(value), 0 if value.is_inference() else value._version) for value in tensors]


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free.

    Args:
        device: whose memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:  # what caches of files take is free as well
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system says
        return 8 * 2**30
