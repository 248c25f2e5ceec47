"""Which rule carries moments through which module."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gpseq.propagation.moments import GaussianState

#: From a module, the state before it and the walk to the state after it; further arguments as the module's own.
Rule = Callable[..., GaussianState]
Predicate = Callable[[nn.Module], bool]

_by_type: dict[type[nn.Module], Rule] = {}
_by_predicate: list[tuple[Predicate, Rule]] = []
#: Methods that have no part in what a module computes.
_ASIDE = {"extra_repr", "reset_parameters", "_reset_parameters", "_check_input_dim"}


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
    whose methods it still has; the latest registered function that says yes. A module whose ``forward`` was replaced
    has none but its own. What is uncertain behind a weight, as with ``torch.nn.utils.parametrize``, is left to what
    happens to unknown modules.

    Args:
        module: any module.
    """
    own: Any = getattr(module, "propagate_moments", None)
    if callable(own):
        return lambda _, state, walk, *args, **inputs: own(state, walk, *args, **inputs)
    if "forward" in vars(module):
        return None
    rule = _of_type(type(module)) or next((rule for predicate, rule in _by_predicate if predicate(module)), None)
    return _of_plain_weights(rule) if rule is not None and is_parametrized(module) else rule


def _of_type(kind: type[nn.Module]) -> Rule | None:
    for base in kind.__mro__:
        if base in _by_type and (base is kind or (kind.forward is base.forward and _keeps_methods(kind, base))):
            return _by_type[base]
    return None


def _keeps_methods(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class has all methods of a base that ``forward`` may call."""
    return all(
        getattr(kind, name) is value
        for name, value in vars(base).items()
        if isinstance(value, FunctionType) and not name.startswith("__") and name not in _ASIDE
    )


def _of_plain_weights(rule: Rule) -> Rule:
    """A rule that takes weights for parameters, for a module some of whose weights are computed."""

    def run(module: nn.Module, state: GaussianState, walk: Any, *args: Any, **inputs: Any) -> GaussianState:
        if walk.is_uncertain(module.parametrizations):
            found: GaussianState = walk.unknown(module, state, *args, **inputs)
            return found
        return rule(module, state, walk, *args, **inputs)

    return run
