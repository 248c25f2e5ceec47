"""Which rule carries moments through which module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gpseq.propagation.moments import GaussianState

#: From a module, the state before it and the walk to the state after it; further arguments as the module's own.
Rule = Callable[..., GaussianState]
Predicate = Callable[[nn.Module], bool]

_by_type: dict[type[nn.Module], Rule] = {}
_by_predicate: list[tuple[Predicate, Rule]] = []


def register(*what: type[nn.Module] | Predicate) -> Callable[[Rule], Rule]:
    """Make a function the rule of some modules.

    A rule takes the module, the state before it and the walk, and returns the state after it. The walk takes parts of a
    module to their rules, ``walk(module.part, state)``, and carries a state through matrices of weights and elementwise
    functions, ``walk.linear(state, module.weight, module.bias)`` and ``walk.elementwise(state, function)``.

    Args:
        what: types of modules; or functions that say of a module whether the rule is for it, for libraries that may be
            absent. The last rule that is registered for a type is taken, and types go before functions.

    Returns:
        A decorator, which returns the rule as it was.

    Raises:
        TypeError: it is neither a type of modules nor a function.

    Example:
        >>> class Doubled(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> @register(Doubled)
        ... def doubled(module, state, walk):
        ...     return state.scale(2 * state.mean.new_ones(()))
        >>> find(Doubled()) is doubled
        True
    """
    for item in what:
        if not callable(item) or (isinstance(item, type) and not issubclass(item, nn.Module)):
            raise TypeError(f"register: expected types of modules or functions of one, got {item!r}.")

    def decorate(rule: Rule) -> Rule:
        for item in what:
            if isinstance(item, type):
                _by_type[item] = rule
            else:
                _by_predicate.insert(0, (item, rule))
        return rule

    return decorate


def find(module: nn.Module) -> Rule | None:
    """The rule for a module, or ``None``.

    In this order: the module's own ``propagate_moments(state, walk)``; the rule of its type; that of the nearest base
    whose ``forward`` it still has; the latest registered function that says yes.

    Args:
        module: any module.
    """
    own: Any = getattr(module, "propagate_moments", None)
    if callable(own):
        return lambda _, state, walk, *args, **inputs: own(state, walk, *args, **inputs)
    kind = type(module)
    for base in kind.__mro__:
        if base in _by_type and (base is kind or kind.forward is base.forward):
            return _by_type[base]
    for predicate, rule in _by_predicate:
        if predicate(module):
            return rule
    return None
