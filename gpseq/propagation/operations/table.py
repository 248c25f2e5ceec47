"""Which operation of a forward has which rule, and what the rules have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpseq.propagation.following import Interpreter
from gpseq.propagation.tracing import CannotFollow
from gpseq.propagation.values import Operation, Several, Value, Weight

#: Rules by functions, and by names of methods.
OPERATIONS: dict[Any, Operation] = {}


def handles(*targets: Any) -> Callable[[Operation], Operation]:
    """Make a function the rule of some operations.

    Args:
        targets: functions, and names of methods.
    """

    def decorate(rule: Operation) -> Operation:
        for target in targets:
            OPERATIONS[target] = rule
        return rule

    return decorate


def known(run: Interpreter, item: Any) -> Any:
    """What is uncertain as a value, and all else as it is.

    Args:
        run: the interpreter.
        item: any argument.
    """
    return run.value(item) if isinstance(item, Value | Weight | Several) else item


def elementwise(run: Interpreter, value: Any, function: Any) -> Value:
    """An elementwise function of a value.

    Args:
        run: the interpreter.
        value: before it.
        function: what :func:`gpseq.propagation.activations.activation_moments` takes.
    """
    return run.apply(run.value(value), lambda state: run.walk.elementwise(state, function))


def sizes_of(args: Sequence[Any]) -> tuple[int, ...]:
    """Sizes or dimensions, given one by one or as a sequence."""
    if len(args) == 1 and isinstance(args[0], tuple | list | torch.Size):
        return tuple(args[0])
    return tuple(args)


def positive(value: Value, dim: int, extra: int = 0) -> int:
    """A dimension of a value, counted from the front.

    Args:
        value: in the forward's layout.
        dim: which may be negative.
        extra: dimensions that are added to it.
    """
    return dim + value.dim + extra if dim < 0 else dim


def not_the_batch(value: Value, *dims: int) -> None:
    """Check that dimensions are others than that of the batch.

    Args:
        value: in the forward's layout.
        dims: which may be negative.

    Raises:
        CannotFollow: one is that of the batch.
    """
    if value.batch is not None and any(positive(value, dim) == value.batch for dim in dims):
        raise CannotFollow("{operation} goes over the batch")
