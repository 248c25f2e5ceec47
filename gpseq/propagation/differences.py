r"""Directions in the weights pushed through a network by difference quotients, and what they leave alone computed once.

.. math:: J \delta \approx \frac{f(\bar\theta + h \delta) - f(\bar\theta)}{h}.

A quotient takes a plain pass, with all of torch's fused kernels. Where only the last layers are uncertain, the pass
begins there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]

#: The change of the weights relative to their size. Rounding errors of a pass, over this number, and curvature, times
#: it, are alike where it is the root of the former.
RELATIVE_STEP = {torch.float32: 3e-3, torch.float64: 1e-6}


def step_size(means: Weights, direction: Weights) -> Tensor:
    r"""How far to go along a direction for a difference quotient.

    .. math:: h = r \, \lVert \bar\theta \rVert / \lVert \delta \rVert,

    so that all weights together change by a small part r of themselves.

    Args:
        means: of the weights.
        direction: delta, a change of each.

    Returns:
        h, a number.
    """
    relative = max(RELATIVE_STEP.get(value.dtype, 3e-3) for value in means.values())
    size, length = (torch.stack([v.detach().norm() for v in nest.values()]).norm() for nest in (means, direction))
    size = torch.where(size > 0, size, 1.0)
    return torch.where(length > 0, relative * size / length, 1.0)


class Prefix:
    """Runs a function of some weights again and again, and computes once what the changed weights have not touched.

    A module without such weights remembers the arguments and the outputs of its calls in the first run. As long as all
    such modules get the same arguments in a later run, number by number, they are not called. Modules with hooks inside
    are left alone.

    Args:
        model: that the function runs.
        names: of the weights that change.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> prefix = Prefix(model, ["1.weight"])
        >>> x, run = torch.ones(1, 2), torch.func.functional_call
        >>> first = prefix(lambda weights: run(model, weights, x), {"1.weight": torch.zeros(1, 2)})
        >>> bool((first == model[1].bias).all()), prefix.num_calls
        (True, 1)
        >>> second = prefix(lambda weights: run(model, weights, x), {"1.weight": torch.ones(1, 2)})
        >>> prefix.num_calls  # the first layer was not called again
        1
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        changed = {id(model.get_parameter(name)) for name in names}
        self._modules = list(_untouched(model, changed))
        self._seen: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._calls: Counter[int] = Counter()
        self._is_first, self._is_apart = True, False
        self.num_calls = 0  # of modules that remember

    def __call__(self, function: Callable[[Any], Tensor], weights: Any) -> Tensor:
        """The function of some weights.

        Args:
            function: of the model's weights.
            weights: its argument.
        """
        self._calls.clear()
        self._is_apart = False
        with self._remembering():
            found = function(weights)
        self._is_first = False
        return found

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        before = [(module, module.__dict__.get("forward")) for module in self._modules]
        try:
            for number, (module, _) in enumerate(before):
                module.forward = self._forward(number, module.forward)
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward

    def _forward(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **inputs: Any) -> Any:
            key = (number, self._calls[number])
            self._calls[number] += 1
            if self._is_first:
                given = _copied((args, inputs))  # before the call: what it changes in place is no argument
                output = forward(*args, **inputs)
                self.num_calls += 1
                if _is_plain(output):
                    self._seen[key] = given, _copied(output)
                return output
            if not self._is_apart and key in self._seen and _same(self._seen[key][0], (args, inputs)):
                return _copied(self._seen[key][1])  # who gets it may change it in place
            self._is_apart = True
            self.num_calls += 1
            return forward(*args, **inputs)

        return run


def _untouched(module: nn.Module, changed: set[int]) -> Iterator[nn.Module]:
    """The largest parts that have parameters, and none of those that change."""
    own = {id(parameter) for parameter in module.parameters()}
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    if own and not own & changed and not hooked and type(module).forward is not nn.Module.forward:
        yield module
        return
    for child in module.children():
        yield from _untouched(child, changed)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_copied(part) for part in value)
    if type(value) in (list, dict):
        return [_copied(part) for part in value] if type(value) is list else {k: _copied(v) for k, v in value.items()}
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is a nest that :func:`_copied` copies all of."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return isinstance(value, Tensor) or value is None


def _same(first: Any, second: Any) -> bool:
    """Whether two nests of arguments are equal; of objects that are not known, whether they are one."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first is second or (isinstance(first, bool | int | float | str) and first == second)
