"""What a module's forward does with what is uncertain, as a graph; all else it does is simply done."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gpseq.propagation.call import rows_of
from gpseq.propagation.linearisation import main_output
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.registry import find
from gpseq.propagation.switches import as_found, same_draws
from gpseq.propagation.walk import Walk, is_source

#: Numbers out of tensors: what follows them may depend on them.
_NUMBERS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
#: Tensors that take nothing but their shape from another.
_SHAPED = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
#: What a tensor says of itself besides its numbers.
_FACTS = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "itemsize"}


class CannotFollow(NotImplementedError):
    """A forward does something with what is uncertain for which there is no rule; the message says what."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What a forward does.

    Attributes:
        graph: its operations on what is uncertain. Each node has its value at the mean in its ``meta["value"]``, with
            ``meta["module"]``, ``meta["parameter"]`` or ``meta["state"]`` where it is about one. The output is a node,
            or a tensor if that is certain.
        of_batch: tensors that are certain and come from the module's arguments, which have a batch.
    """

    graph: fx.Graph
    of_batch: Mapping[Tensor, bool]


def trace(module: nn.Module, walk: Walk, arguments: Mapping[int | str, Any]) -> Trace:
    """The operations of a module's forward on uncertain tensors, its own uncertain parameters included.

    The forward runs at the mean. Tensors that are certain are what they are, so that it may look at them; of uncertain
    ones it may look at shapes. Submodules are not entered; but in the form ``"full"`` those are that have no rule and
    get several uncertain tensors.

    Args:
        module: its ``forward`` is followed.
        walk: of the network.
        arguments: of the call, by position or name, with the batch where the module has it; uncertain ones as states.

    Raises:
        CannotFollow: the forward is none of Python, or looks at numbers that are uncertain.
    """
    if not _is_python(module):
        raise CannotFollow("its forward is not a method that Python can look into")
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        raise CannotFollow("it is compiled")
    # What is done in place is done to copies.
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    marks = _Marks()
    marks.mark(list(copies.values()))
    try:
        with marks, as_found(module), same_draws(module):
            graph = _Tracer(walk, copies).trace(module)
    except CannotFollow:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a forward does with something that is no tensor
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise CannotFollow(f"{type(error).__name__}: {reason.strip()}") from error
    return Trace(graph, marks.known)


def check_output(
    module: nn.Module, walk: Walk, arguments: Mapping[int | str, Any], graph: fx.Graph, batch: int
) -> None:
    """That the operations that were seen are all there are: a forward may ask for types, and have hooks.

    The module runs once more, as it is: on the first element, and on the whole batch where that says otherwise.

    Args:
        module: that was traced.
        walk: of the network.
        arguments: of the call.
        graph: what was seen.
        batch: number of elements.

    Raises:
        CannotFollow: its output is another one.
    """
    if is_source(module):  # which may draw
        return
    (output,) = next(node for node in reversed(graph.nodes) if node.op == "output").args
    found = output.meta["value"] if isinstance(output, fx.Node) else output
    found = found if isinstance(found, Tensor) else _main(found)

    def run(one: bool) -> Tensor:
        given: dict[Any, Any] = {key: _copy(value, walk.batch_dim) for key, value in arguments.items()}
        if one:
            given = {key: rows_of(str(key), value, slice(0, 1), batch) for key, value in given.items()}
        args = [given.pop(key) for key in sorted(key for key in given if isinstance(key, int))]
        with torch.no_grad(), same_draws(module):
            return main_output(walk.run(module, *args, **given))

    if walk.batch_dim == 0 and batch > 1 and found.dim() and len(found) == batch:
        try:
            if _agree(found[:1], run(one=True)):
                return
        except Exception:  # whatever a forward does that wants the whole batch
            pass
    if not _agree(found, run(one=False)):
        raise CannotFollow("its output is another one when it is traced")


def _agree(found: Tensor, expected: Tensor) -> bool:
    size = expected.nan_to_num(0.0, 0.0, 0.0).abs().amax().item() if expected.numel() else 0.0
    return found.shape == expected.shape and torch.allclose(
        found.to(expected.dtype), expected, rtol=1e-3, atol=1e-4 * size, equal_nan=True
    )


def _copy(value: Any, batch_dim: int) -> Any:
    if isinstance(value, GaussianState):
        value = value.mean.movedim(0, batch_dim) if value.mean.dim() > 2 else value.mean
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Marks(TorchFunctionMode):
    """Follows tensors from where they come from: two sizes may be equal, and only one of them the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Any = WeakIdKeyDictionary()

    def mark(self, value: Any) -> None:
        """Mark all tensors in something.

        Args:
            value: tensors, or containers of them.
        """
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.known[leaf] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Mark what is made from what is marked."""
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _SHAPED:
            if any(isinstance(leaf, Tensor) and leaf in self.known for leaf in tree_leaves((args, kwargs))):
                self.mark(out)
        return out


@contextmanager
def _unwritten(label: str, arguments: Any) -> Iterator[None]:
    """Check that an operation on uncertain tensors leaves those that are certain as they are.

    What is written into one would be known by its mean only, whatever other names it has.

    Args:
        label: what messages call the operation.
        arguments: of it.

    Raises:
        CannotFollow: it writes into one.
    """
    plain = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and not isinstance(leaf, fx.Proxy)]
    # Tensors of the inference mode do not count their changes.
    before = [leaf.clone() if leaf.is_inference() else leaf._version for leaf in plain]
    yield
    for leaf, known in zip(plain, before, strict=True):
        same = torch.equal(leaf, known) if isinstance(known, Tensor) else leaf._version == known
        if not same:
            raise CannotFollow(f"{label} writes what is uncertain into a tensor that is certain")


def _augmented(name: str) -> Callable[..., Any]:
    operation = getattr(operator, name)

    def run(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return run


class _Known(fx.Proxy):
    """A proxy that knows its value at the mean."""

    def __init__(self, node: fx.Node, tracer: _Tracer, value: Any) -> None:
        self.value = value  # first: all that is not found is looked for in it
        super().__init__(node, tracer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.value, name)
        if name in _FACTS:
            return found
        if callable(found):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        numbers = range(len(self))
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (self, n), {}) for n in numbers])

    def __len__(self) -> int:
        return len(self.value)

    def __bool__(self) -> bool:
        if isinstance(self.value, Tensor):
            raise CannotFollow("its control flow looks at uncertain numbers")
        return bool(self.value)

    def _number(self) -> Any:
        raise CannotFollow("it makes Python numbers of uncertain ones")

    # Without these Python takes x += y for x = x + y, which leaves other names of the tensor alone.
    __iadd__, __isub__, __imul__, __itruediv__ = map(_augmented, ("iadd", "isub", "imul", "itruediv"))
    __ipow__, __imatmul__, __ifloordiv__, __imod__ = map(_augmented, ("ipow", "imatmul", "ifloordiv", "imod"))

    __int__ = __float__ = __index__ = __complex__ = _number


class _Tracer(fx.Tracer):
    """Records what happens to proxies, and lets everything else happen."""

    def __init__(self, walk: Walk, arguments: Mapping[int | str, Any]) -> None:
        super().__init__()
        self.walk, self.arguments = walk, arguments
        self._running = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Calls of modules and parameters are left alone."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """A call of the forward with proxies for uncertain arguments."""
        given: dict[Any, Any] = {}
        proxies: list[tuple[GaussianState, _Known]] = []
        for key, value in self.arguments.items():
            if not isinstance(value, GaussianState):
                given[key] = value
                continue
            known = next((proxy for state, proxy in proxies if state is value), None)
            if known is None:
                mean = _copy(value, self.walk.batch_dim)
                known = self._new("placeholder", f"input_{len(proxies)}", (), {}, mean)
                known.node.meta["state"] = value
                proxies.append((value, known))
            given[key] = known
        args = [given.pop(key) for key in sorted(key for key in given if isinstance(key, int))]

        def run(root: nn.Module) -> Any:
            found = root_fn(root, *args, **given)
            return found if isinstance(found, _Known) else _main(found)

        return run, [self.root]

    def create_arg(self, a: Any) -> Any:
        """Nodes for proxies; all else as it is, and nothing is stowed away in the module."""
        return map_aggregate(a, lambda item: item.node if isinstance(item, fx.Proxy) else item)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Uncertain parameters are proxies, and others their means."""
        if self._running or not isinstance(attr_val, nn.Parameter):
            return attr_val
        name = self.walk.posterior.name(attr_val)
        if name is None:
            return self.walk.posterior.mean(attr_val)
        if name not in parameter_proxy_cache:
            mean = self.walk.posterior.mean(attr_val).detach()
            parameter_proxy_cache[name] = self._new("get_attr", attr, (), {}, mean)
            parameter_proxy_cache[name].node.meta["parameter"] = attr_val
        return parameter_proxy_cache[name]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A node where something is uncertain; a call where nothing is."""
        if self._running:
            return forward(*args, **kwargs)
        if self.walk.is_silent(m) and not _has_proxies((args, kwargs)):
            with self.running():
                return self.walk.run(m, *args, **kwargs)
        if self.walk.options.form == "full" and _is_entered(m) and _num_proxies((args, kwargs)) > 1:
            # Only operations, one after the other, keep what several states have in common.
            return forward(*args, **kwargs)
        with torch.no_grad(), self.running(), _unwritten(type(m).__name__, (args, kwargs)):
            value = self.walk.run(m, *_values(args), **_values(kwargs))
        found = self._new("call_module", type(m).__name__, args, kwargs, value)
        found.node.meta["module"] = m
        return found

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """A node of the graph; or what it says, if that is nothing uncertain."""
        label = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if label in _NUMBERS:
            raise CannotFollow(f"it makes Python numbers of uncertain ones, by {label}")
        plain_args, plain_kwargs = _values(args), _values(kwargs)
        with torch.no_grad(), self.running(), _unwritten(label, (args, kwargs)):
            if kind == "call_method":
                value = getattr(plain_args[0], target)(*plain_args[1:], **plain_kwargs)
            else:
                value = target(*plain_args, **plain_kwargs)
        if label in _SHAPED:
            return value
        if value is None and label not in ("getitem", "getattr"):
            raise CannotFollow(f"{label} writes into a tensor")
        if not _has_tensors(value):
            return value
        return self._new(kind, target, args, kwargs, value)

    def _new(self, kind: str, target: Any, args: Any, kwargs: Any, value: Any) -> _Known:
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        node.meta["value"] = value
        return _Known(node, self, value)


def _main(output: Any) -> Any:
    """What stands first in what a forward returned, if that may hold proxies."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values())))
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, fx.Proxy) else main_output(output)


def _values(arguments: Any) -> Any:
    return map_aggregate(arguments, lambda item: item.value if isinstance(item, _Known) else item)


def _has_proxies(arguments: Any) -> bool:
    return _num_proxies(arguments) > 0


def _num_proxies(arguments: Any) -> int:
    """How many different ones there are."""
    found: set[fx.Node] = set()
    map_aggregate(arguments, lambda item: found.add(item.node) if isinstance(item, fx.Proxy) else None)
    return len(found)


def _is_entered(module: nn.Module) -> bool:
    """Whether a module has no rule, and a forward in Python instead."""
    return find(module) is None and _is_python(module)


def _is_python(module: nn.Module) -> bool:
    return "forward" not in vars(module) and isinstance(type(module).forward, FunctionType)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(part) for part in value.values())
    if isinstance(value, tuple | list):
        return any(_has_tensors(part) for part in value)
    return isinstance(value, Tensor)
