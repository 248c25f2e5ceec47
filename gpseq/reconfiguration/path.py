r"""The chain that a transformer is read as, and its states on some inputs.

.. math:: X_0 \to X_1 \to \dots \to X_L,

L transitions between tokens of one shape. With ``points="attention"`` transition l is the perceptron of block l - 1 and
the attention of block l, so the state is the one just after attention, and the last perceptron belongs to the head;
with ``points="block"`` it is block l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.reconfiguration.blocks import find_kind
from gpseq.reconfiguration.calls import Call, masks_by_name
from gpseq.reconfiguration.masks import Masks
from gpseq.reconfiguration.stack import Stack, find_stack


@dataclass(frozen=True, eq=False)
class Path:
    """States of a chain.

    Attributes:
        states: X_0 to X_L, each ``(B, T, D)``.
        calls: what each replaced block was called with.
        masks: of the first of them.
        stack: the blocks.
        output: of the model.
        means: mu_1 to mu_L, where the teacher's spread was asked for; see :func:`teacher_moments`.
        variances: of each, likewise.
    """

    states: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    masks: Masks
    stack: Stack
    output: Any
    means: tuple[Tensor, ...] | None = None
    variances: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.states) - 1

    @property
    def padding(self) -> Tensor | None:
        """Tokens that nobody sees, ``(B, T)``; ``None`` where there is no mask."""
        found = self.masks.padding()
        return None if found is None else found.expand(self.states[0].shape[:2])


class Transition(nn.Module):
    """The teacher's own step from one state to the next, as a module that shares its parameters.

    Args:
        stack: the blocks.
        number: l, from 1.
        call: what block l was called with.

    Shape:
        ``(B, T, D)`` to the same, batch first whatever the blocks take.
    """

    def __init__(self, stack: Stack, number: int, call: Call) -> None:
        super().__init__()
        self.stack, self.block = stack, stack.blocks[number - 1]
        self.previous = stack.blocks[number - 2] if number > 1 and stack.kind is not None else None
        self.kind, self.call, self.number, self._batch_dim = stack.kind, call, number, stack.batch_dim
        self.training = self.block.training

    def before(self, x: Tensor) -> Tensor:
        """What the block gets, for a state: with ``points="attention"`` the perceptron comes first."""
        if self.kind is None or self.previous is None:
            return x
        return _swapped(self.kind.finish(self.previous, _swapped(x, self._batch_dim)), self._batch_dim)

    def forward(self, x: Tensor) -> Tensor:
        """The next state."""
        x = _swapped(self.before(x), self._batch_dim)
        if self.kind is None:
            out = self.block(x, *self.call.args, **(self.call.kwargs or {}))
        else:
            out = self.kind.attend(self.block, x, self.call)
        return _swapped(out, self._batch_dim)


def capture(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    points: str | Sequence[str] | Stack = "attention",
    first_block: int = 0,
    **named: Any,
) -> Path:
    """Run a model and note the states of its chain.

    Hooks are there only meanwhile; outputs, random states and modes of the model are as without them. Torch's fused
    path through encoder layers, which has no states in between, is off.

    Args:
        model: in eval mode.
        inputs: a tensor, or a mapping of arguments.
        points: see :func:`~gpseq.reconfiguration.find_stack`; or a stack that it found.
        first_block: how many blocks come before the chain.
        named: further arguments of the model.

    Returns:
        The path.

    Raises:
        RuntimeError: a block was not called exactly once.
        ValueError: the model trains, there is no such stack, or the states differ in shape; the message names the
            module.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True, norm_first=True)
        >>> model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        >>> path = capture(model, torch.randn(5, 4, 8))
        >>> len(path), path.states[-1].shape
        (3, torch.Size([5, 4, 8]))
    """
    check_eval(model)
    stack = points if isinstance(points, Stack) else find_stack(model, points, first_block)
    seen = _Seen(stack)
    with unfused(), seen.watching():
        output = model(**inputs, **named) if isinstance(inputs, Mapping) else model(inputs, **named)
    return seen.path(output)


def transitions(path: Path) -> list[Transition]:
    """The teacher's own steps, at the masks of a path.

    Args:
        path: that was captured.
    """
    return [Transition(path.stack, number, path.calls[number - 1]) for number in range(1, len(path) + 1)]


def check_eval(model: nn.Module) -> None:
    """A model in eval mode.

    Raises:
        TypeError: it is no module.
        ValueError: a part of it trains.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"teacher: expected a torch module, got {type(model).__name__}.")
    training = [name or "the model itself" for name, part in model.named_modules() if part.training]
    if training:
        raise ValueError(f"teacher: expected a model in eval mode, got {training[0]} in train mode; call eval().")


class _Seen:
    """What hooks on a stack have seen."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.calls: list[list[Call]] = [[] for _ in stack.blocks]
        self.points: list[list[Any]] = [[] for _ in stack.blocks]
        self.first: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for number, block in enumerate(self.stack.blocks):
                handles.append(block.register_forward_pre_hook(self._called(number), with_kwargs=True))
                handles.append(block.register_forward_hook(self._returned(number)))
                if self.stack.kind is None:
                    handles.append(block.register_forward_hook(self._left(number)))
                    continue
                name, side = self.stack.kind.point(block)
                part = block.get_submodule(name)
                if side == "input":
                    handles.append(part.register_forward_pre_hook(self._entered(number)))
                else:
                    handles.append(part.register_forward_hook(self._left(number)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, number: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens, call = Call.split(block, args, kwargs)
            if number == 0:
                self.first = _kept(tokens)
            self.calls[number].append(call.without_cache(block))

        return hook

    def _entered(self, number: int) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple[Any, ...]) -> None:
            self.points[number].append(_kept(args[0]))

        return hook

    def _returned(self, number: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                name = self.stack.names[number]
                raise ValueError(f"teacher: expected {name} to return a tensor, got {type(output).__name__}.")

        return hook

    def _left(self, number: int) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.points[number].append(_kept(output[0] if isinstance(output, tuple) else output))

        return hook

    def path(self, output: Any) -> Path:
        names = self.stack.names
        for number, name in enumerate(names):
            if len(self.calls[number]) != 1 or len(self.points[number]) != 1:
                raise RuntimeError(
                    f"teacher: expected {name} to be called once, got {len(self.calls[number])} calls and "
                    f"{len(self.points[number])} states."
                )
        states = [self.first, *(found[0] for found in self.points)]
        for name, state in zip(("the input of " + names[0], *names), states, strict=True):
            if not isinstance(state, Tensor) or not state.is_floating_point() or state.dim() != 3:
                got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise ValueError(f"teacher: expected tokens (B, T, D) at {name}, got {got}.")
            if state.shape != states[0].shape:
                raise ValueError(
                    f"teacher: expected states of one shape, got {tuple(state.shape)} at {name} after "
                    f"{tuple(states[0].shape)}; choose a first_block behind the change, or other points."
                )
        block, call = self.stack.blocks[0], self.calls[0][0]
        kind = self.stack.kind or find_kind(block)
        masks = masks_by_name(block, call) if kind is None else kind.masks(block, call)
        batch_dim = self.stack.batch_dim
        return Path(
            tuple(_swapped(state, batch_dim) for state in states),
            tuple(found[0] for found in self.calls),
            masks,
            self.stack,
            output,
        )


def _kept(state: Any) -> Any:
    """A state as it is now: blocks may add to it in place."""
    return state.clone() if isinstance(state, Tensor) else state


@contextmanager
def unfused() -> Iterator[None]:
    """Torch's fused path off: in it, hooks see nested tensors, or nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _swapped(x: Tensor, batch_dim: int) -> Tensor:
    return x if batch_dim == 0 else x.transpose(0, 1)
