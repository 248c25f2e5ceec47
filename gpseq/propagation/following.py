r"""Modules with a forward of their own and no rule: each of their operations is a rule's.

In the form ``"full"`` values that are used more than once keep their covariances with each other: with what is alive at
a time they are jointly Gaussian, so that sums and concatenations of any of them are right.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from gpseq.propagation.moments import Blocks, Full, GaussianState, LinearMap, LowRank, _sum
from gpseq.propagation.tracing import CannotFollow, check_output, trace
from gpseq.propagation.values import Operation, Several, Value, Weight
from gpseq.propagation.walk import Walk, _is_time_first


def follow(module: nn.Module, state: GaussianState, walk: Walk, *args: Any, **inputs: Any) -> GaussianState:
    """The state after a module, by the operations of its forward.

    Args:
        module: with a forward in Python.
        state: before it.
        walk: of the network.
        args: further arguments of the module's call; states among them may be uncertain.
        inputs: likewise.

    Returns:
        The state after it, of the first of several outputs.

    Raises:
        CannotFollow: there is an operation without a rule, or control flow that looks at uncertain numbers.
    """
    from gpseq.propagation.operations import OPERATIONS

    first: int | str = walk.lead if walk.lead is not None and module is walk._model else 0
    given: dict[Any, Any] = {first: state, **dict(enumerate(args, start=1)), **inputs}
    batch_dim, batch = walk.batch_dim, len(state.mean)
    for key, value in given.items():
        if isinstance(value, GaussianState) and value.is_certain:
            given[key] = value.mean.movedim(0, batch_dim) if value.mean.dim() > 2 else value.mean
    traced = trace(module, walk, given)
    expected = walk.posterior.uncertain(module)
    found = Interpreter(walk, batch, batch_dim, OPERATIONS, traced.of_batch).run(traced.graph)
    for parameter in _idle(traced.graph):  # no output depends on it
        if walk.posterior.name(parameter) in set(expected) - set(walk._used):
            walk.use(parameter)
    lost = [name for name in expected if name not in walk._used]
    if lost:
        raise CannotFollow(f"it uses {', '.join(lost)} in a way that is not seen")
    check_output(module, walk, given, traced.graph)
    if isinstance(found, Tensor):
        return GaussianState(found.movedim(batch_dim, 0) if found.dim() > 2 else found)
    walk.batch_dim = batch_dim if found.batch is None else found.batch
    return found.state


class Interpreter:
    """Carries states through the operations of one forward.

    Args:
        walk: of the network.
        batch: B.
        batch_dim: where the forward's arguments have it.
        operations: by functions, and by names of methods.
        of_batch: plain tensors that have a batch.
    """

    def __init__(
        self,
        walk: Walk,
        batch: int,
        batch_dim: int,
        operations: dict[Any, Operation],
        of_batch: Mapping[Tensor, bool],
    ) -> None:
        self.walk, self.batch, self.batch_dim, self.operations = walk, batch, batch_dim, operations
        self._of_batch = of_batch
        self.node: fx.Node  # the present one
        self._layout = batch_dim
        self._env: dict[fx.Node, Any] = {}
        self._last: dict[fx.Node, int] = {}
        self._uses: Counter[fx.Node] = Counter()
        self._now = self._until = 0
        self._held: list[Any] = []
        self._values: dict[int, Value] = {}
        self._between: dict[tuple[int, int], Tensor] = {}

    def run(self, graph: fx.Graph) -> Value | Tensor:
        """The output of a graph.

        Args:
            graph: from :func:`gpseq.propagation.tracing.trace`.
        """
        nodes = _needed(graph)
        for number, node in enumerate(nodes):
            for used in node.all_input_nodes:
                self._last[used] = number
                self._uses[used] += 1
        for number, node in enumerate(nodes):
            self._now, self.node = number, node
            if node.op == "output":
                break
            try:
                self._env[node] = self._evaluate(node)
                self._change(node, nodes[:number])
            except CannotFollow as error:
                raise CannotFollow(str(error).replace("{operation}", _label(node))) from error
            self._forget()
        found: Any = nodes[-1].args[0]
        found = self._env[found] if isinstance(found, fx.Node) else found
        found = found.first if isinstance(found, Several) else found
        if isinstance(found, Weight):
            found = self.value(found)
        if isinstance(found, Value) and found.batch is None:
            found = self.expand(found, found.shape, self.batch_dim if found.dim > 2 else 0)
        if not isinstance(found, Value | Tensor):
            raise CannotFollow(f"it returns a {type(found).__name__}")
        return found

    # Nodes

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            state = node.meta["state"]
            return Value(state, self.batch_dim if state.mean.dim() > 2 else 0)
        if node.op == "get_attr":
            return Weight(node.meta["parameter"], self._uses[node])
        args, kwargs = self._filled(node.args), self._filled(node.kwargs)
        # Where several meet, what becomes of one has to know the others to the end.
        inputs = [each for used in node.all_input_nodes for each in _flat(self._env[used])]
        self._until = self._now - (len(inputs) > 1)
        if node.op == "call_module":
            return self._module(node, node.meta["module"], args, kwargs)
        operation = self.operations.get(node.target)
        if not _has_values((args, kwargs)):
            return _plainly(node, args, kwargs)
        if operation is None:
            raise CannotFollow("{operation} has no rule for uncertain numbers")
        try:
            return operation(self, *args, **{name: value for name, value in kwargs.items() if value is not None})
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise CannotFollow(f"{{operation}} is called in a way that has no rule ({error})") from error

    def _filled(self, arguments: Any) -> Any:
        return map_aggregate(arguments, lambda item: self._env[item] if isinstance(item, fx.Node) else item)

    def _module(self, node: fx.Node, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        args, kwargs = list(args), dict(kwargs)
        if not args:  # a state comes first, whatever its name is
            name = next(iter(inspect.signature(module.forward).parameters), "")
            if name not in kwargs:
                raise CannotFollow("{operation} gets nothing to begin with")
            args = [kwargs.pop(name)]
        path = f"{self.walk.path(module)}, a {type(module).__name__}"
        leading = args[0]
        first = self._before(leading, module)

        def beside(value: Any) -> Any:
            return first if value is leading else self._beside(value, first, path)

        others = [beside(value) for value in args[1:]]
        named = {name: beside(value) for name, value in kwargs.items()}
        before = self.walk.batch_dim

        def call(state: GaussianState) -> GaussianState:
            def given(value: Any) -> Any:
                return state if isinstance(value, Value) and value.number == first.number else _state(value)

            self.walk.batch_dim = 0 if first.batch is None else first.batch
            found = self.walk(
                module, state, *map(given, others), **{name: given(value) for name, value in named.items()}
            )
            self._layout = self.walk.batch_dim
            return found

        try:
            out = self.apply(first, call)
        finally:
            self.walk.batch_dim = before
        layout = None if first.batch is None else min(self._layout, out.state.mean.dim() - 1)
        found: Any = replace(out, batch=layout) if layout != out.batch else out
        if out.state.is_certain:
            found = out.state.mean[0] if layout is None else out.state.mean.movedim(0, layout)
        outputs = node.meta["value"]
        return found if isinstance(outputs, Tensor) else Several(found, outputs, path)

    def _before(self, value: Any, module: nn.Module) -> Value:
        """What a module gets first, as a state."""
        if isinstance(value, Tensor):
            layout = 1 if _is_time_first(module) or (self.batch_dim == 1 and value.dim() > 2) else 0
            if value not in self._of_batch:
                if value.dim() > 1 and len(value) == 1:
                    return Value(GaussianState(value.expand(self.batch, *value.shape[1:])), 0)
                return Value(GaussianState(value.expand(self.batch, *value.shape)), None)
            if value.dim() <= layout or value.shape[layout] != self.batch:
                raise CannotFollow("{operation} gets the batch together with other dimensions")
            return Value(GaussianState(value.movedim(layout, 0)), layout)
        value = self.value(value)
        if value.batch is None and value.shape and value.shape[0] == 1:
            value = self.expand(value, (self.batch, *value.shape[1:]), 0)
        return value

    def _beside(self, value: Any, first: Value, path: str) -> Any:
        """What a module gets besides."""
        if isinstance(value, tuple | list):
            if _has_values(value):
                raise CannotFollow(f"{path}, gets several uncertain tensors in one argument")
            return value
        if not isinstance(value, Value | Weight | Several):
            return value
        value = self.value(value)
        same = value.number == first.number
        if not same and isinstance(value.state.covariance, Full) and not first.state.is_certain:
            raise CannotFollow(f"{path}, gets two uncertain tensors, which only the form 'lowrank' can carry together")
        if value.batch is None and value.shape and value.shape[0] == 1:
            value = self.expand(value, (self.batch, *value.shape[1:]), 0)
        return value

    def _change(self, node: fx.Node, earlier: Sequence[fx.Node]) -> None:
        """What is done in place is done to all names of a tensor; of what else looks into it nothing is known."""
        target = _in_place(node)
        if target is None:
            return
        changed = target.meta["value"]
        for other in earlier:
            value = other.meta["value"]
            if not isinstance(value, Tensor) or not _share(value, changed):
                continue
            if other.op == "placeholder":
                raise CannotFollow("{operation} changes the module's input in place")
            if self._last.get(other, -1) > self._now:
                if not _same(value, changed):
                    raise CannotFollow("{operation} works in place, and a view of the tensor is used later")
                self._env[other] = self._env[node]

    # Joint Gaussians

    def _alive(self, keep: Iterable[Any] = ()) -> list[Value]:
        """Values that are used yet, and others."""
        found: dict[int, Value] = {}
        for node, value in self._env.items():
            if self._last.get(node, -1) > self._until:
                for each in _flat(value):
                    each = self._values.get(id(each.parameter)) if isinstance(each, Weight) else each
                    if isinstance(each, Value):
                        found[each.number] = each
        for each in (*keep, *self._held):
            if isinstance(each, Value):
                found[each.number] = each
        return list(found.values())

    def _forget(self) -> None:
        """Drop what is not used any more."""
        for node in [node for node in self._env if self._last.get(node, -1) <= self._now and node is not self.node]:
            del self._env[node]
        self._until = self._now
        alive = {value.number for value in self._alive(_flat(self._env.get(self.node)))}
        self._between = {pair: cross for pair, cross in self._between.items() if set(pair) <= alive}

    @contextmanager
    def holding(self, *values: Any) -> Iterator[None]:
        """What is done meanwhile keeps its covariance with these values, too.

        Args:
            values: which are used yet.
        """
        self._held.extend(values)
        try:
            yield
        finally:
            del self._held[len(self._held) - len(values) :]

    def between(self, first: Value, second: Value) -> Tensor | None:
        """Covariance of two values, ``(B, N, N')``; ``None`` is zero.

        Args:
            first: N numbers.
            second: others.
        """
        if first.number == second.number:
            assert isinstance(first.state.covariance, Full)
            return first.state.covariance.entries
        found = self._between.get((first.number, second.number))
        if found is None and (second.number, first.number) in self._between:
            found = self._between[second.number, first.number].mT
        return found

    def apply(
        self,
        value: Value,
        operation: Callable[[GaussianState], GaussianState],
        batch: int | str | None = "same",
        keep: Iterable[Any] = (),
    ) -> Value:
        """An operation on a single state, with what it leaves between it and other values.

        Args:
            value: before it.
            operation: from state to state.
            batch: where the forward has the batch afterwards; ``"same"``, where it was.
            keep: values that are used yet, besides those that the forward uses later.
        """
        layout = value.batch if batch == "same" else batch
        assert layout is None or isinstance(layout, int)
        covariance = value.state.covariance
        alive = self._alive(keep) if isinstance(covariance, Full) else []
        if not isinstance(covariance, Full) or not alive:
            return Value(operation(value.state), layout)
        crosses, known = dict(covariance.crosses), []
        for other in alive:
            cross = self.between(other, value)
            if cross is not None:
                crosses[other.number] = cross
                known.append(other.number)
        started = replace(covariance, crosses=MappingProxyType(crosses))
        out = operation(replace(value.state, covariance=started))
        found = out.covariance
        if not isinstance(found, Full):
            return Value(out, layout)
        missing = [number for number in crosses if number not in found.crosses]
        if missing:
            raise CannotFollow("the rule for {operation} does not keep the covariance with what is used later")
        own = {number: cross for number, cross in found.crosses.items() if number not in known}
        made = Value(replace(out, covariance=replace(found, crosses=MappingProxyType(own))), layout)
        for number in known:
            self._between[number, made.number] = found.crosses[number]
        return made

    def add(self, first: Value, second: Value, keep: Iterable[Any] = ()) -> Value:
        """The sum of two values in one layout.

        Args:
            first: one of them.
            second: the other.
            keep: as for :meth:`apply`.
        """
        if first.number == second.number:
            return self.apply(first, lambda state: state.scale(2 * torch.ones_like(state.mean)), keep=keep)
        one, other = first.state.covariance, second.state.covariance
        if not isinstance(one, Full) or not isinstance(other, Full):
            return Value(first.state.plus(second.state), first.batch)
        cross = self.between(first, second)
        total = one.entries + other.entries
        total = total if cross is None else total + cross + cross.mT
        covariance = Full(total, one.event, _sum(one.crosses, other.crosses))
        made = Value(GaussianState(first.state.mean + second.state.mean, covariance), first.batch)
        for value in self._alive(keep):
            crosses = [c for c in (self.between(value, first), self.between(value, second)) if c is not None]
            if crosses:
                self._between[value.number, made.number] = sum(crosses[1:], crosses[0])
        return made

    # Layouts

    def value(self, item: Any) -> Value:
        """What is uncertain, as a value: a parameter becomes one where it is used first.

        Args:
            item: a value, a parameter, or what a module returned.
        """
        if isinstance(item, Several):
            item = item.first
        if isinstance(item, Value):
            return item
        if not isinstance(item, Weight):
            raise CannotFollow(f"{{operation}} gets a {type(item).__name__}")
        parameter = item.parameter
        if id(parameter) not in self._values:
            # A single number is as good with a dimension.
            places = torch.arange(parameter.numel(), device=parameter.device).view(1, *(parameter.shape or (1,)))
            self._values[id(parameter)] = Value(self.walk.entries(parameter, places, batch=self.batch), None)
        found = self._values[id(parameter)]
        return self.move(found, lambda x: x.mT, None) if item.transposed else found

    def move(
        self, value: Value, function: Callable[[Tensor], Tensor], batch: int | None, keep: Iterable[Any] = ()
    ) -> Value:
        """Entries that are chosen, put elsewhere or repeated.

        Args:
            value: before it.
            function: of tensors in the forward's layout; of one element of the batch, where that has no place in it.
            batch: where the batch is afterwards.
            keep: as for :meth:`apply`.
        """
        moved = _batched(function, value.batch, batch, self.batch)
        return self.apply(value, lambda state: _moved(state, moved), batch, keep)

    def map(
        self,
        value: Value,
        push: Callable[[Tensor], Tensor],
        squared: Callable[[Tensor], Tensor],
        batch: int | None,
        blocks: Callable[[Tensor], Tensor] | None = None,
        mixes: bool = False,
    ) -> Value:
        """A linear map.

        Args:
            value: before it.
            push: of ``(B, *event)``.
            squared: the same with squared coefficients.
            batch: where the forward has the batch afterwards.
            blocks: of ``(B, *tokens, D, D)``.
            mixes: whether tokens meet.
        """
        linear = LinearMap(torch.func.vmap(push), squared, blocks, mixes)
        return self.apply(value, lambda state: state.apply(push(state.mean), linear), batch)

    def expand(self, value: Value, shape: Sequence[int], batch: int | None, keep: Iterable[Any] = ()) -> Value:
        """A value repeated to a larger shape.

        Args:
            value: before it.
            shape: in the forward.
            batch: where that has the batch.
            keep: as for :meth:`apply`.

        Raises:
            CannotFollow: the batch would be repeated, or is elsewhere.
        """
        shape = tuple(shape)
        if value.batch is not None:
            if batch != value.batch + len(shape) - value.dim or shape[batch] != self.batch:
                raise CannotFollow("{operation} puts the batch where something else is")
            if shape == value.shape:
                return value
            return self.move(value, lambda x: x.expand(shape), batch, keep)
        if batch is None:
            return value if shape == value.shape else self.move(value, lambda x: x.expand(shape), None, keep)
        inner = [*shape[:batch], 1, *shape[batch + 1 :]]
        place = batch - len(shape)
        if value.dim >= -place and value.shape[place] != 1:
            raise CannotFollow("{operation} needs a parameter for each element of the batch")
        return self.move(value, lambda x: x.expand(inner).squeeze(batch), batch, keep)

    def common(self, items: Sequence[Any], shapes: Sequence[Sequence[int]] | None = None) -> tuple[Any, int | None]:
        """Shape and place of the batch that some values and plain tensors have together.

        Args:
            items: values, tensors and numbers.
            shapes: theirs, where they are not to be broadcast.
        """
        known = [item.shape if isinstance(item, Value) else getattr(item, "shape", ()) for item in items]
        try:
            shape = torch.broadcast_shapes(*(known if shapes is None else shapes))
        except RuntimeError as error:
            raise CannotFollow(f"{{operation}}: {error}") from error
        places = {
            item.batch + len(shape) - item.dim for item in items if isinstance(item, Value) and item.batch is not None
        }
        if len(places) > 1:
            raise CannotFollow("{operation} puts the batch where something else is")
        if places:
            return shape, places.pop()
        # Parameters beside plain tensors that may have the batch.
        plain = [item for item in items if isinstance(item, Tensor) and item in self._of_batch]
        place = self.batch_dim if len(shape) > 2 else 0
        has = any(len(item.shape) == len(shape) and item.shape[place] == self.batch for item in plain)
        parameters = [item for item in items if isinstance(item, Value)]
        free = all(item.dim < len(shape) - place or item.shape[place - len(shape)] == 1 for item in parameters)
        return shape, place if has and free and len(shape) > 0 else None

    def constant(self, item: Any, shape: Sequence[int], batch: int | None, like: Tensor) -> Tensor:
        """A plain tensor or number, ``(B, *event)`` or what broadcasts to it.

        Args:
            item: in the forward's layout.
            shape: to which it is broadcast.
            batch: where that has the batch.
            like: gives dtype and device of numbers.
        """
        if not isinstance(item, Tensor):
            return like.new_tensor(item)
        item = item.expand(tuple(shape))
        return item.unsqueeze(0) if batch is None else item.movedim(batch, 0)


def _batched(
    function: Callable[[Tensor], Tensor], before: int | None, after: int | None, batch: int
) -> Callable[[Tensor], Tensor]:
    """A function of the forward's layout as one of ``(n, *event)``, n being the batch or one."""
    if before is None:
        return torch.func.vmap(function)
    assert after is not None

    def run(x: Tensor) -> Tensor:
        whole = x if len(x) == batch else x.expand(batch, *x.shape[1:])
        return function(whole.movedim(0, before)).movedim(after, 0)[: len(x)]

    return run


def _moved(state: GaussianState, function: Callable[[Tensor], Tensor]) -> GaussianState:
    """Entries that are moved; blocks follow where all features of a token go together."""
    covariance = state.covariance
    if isinstance(covariance, LowRank):
        columns = torch.func.vmap(function)(covariance.columns)
        return GaussianState(function(state.mean), LowRank(columns, function(covariance.entries)))
    if not isinstance(covariance, Blocks):
        return state.move(function)
    width = state.mean.shape[-1]
    features = torch.arange(width, device=state.mean.device).expand(state.mean.shape)
    found = function(features)
    if found.shape[-1] != width or not bool((found == features.flatten()[:width]).all()):
        raise CannotFollow("{operation} takes features of a token apart, which the form 'blockdiag' cannot carry")
    entries = torch.stack([function(column) for column in covariance.entries.unbind(-1)], -1)
    return GaussianState(function(state.mean), Blocks(entries))


def _state(value: Any) -> Any:
    return value.state if isinstance(value, Value) else value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, Several):
        yield value.first
    elif value is not None:
        yield value


def _has_values(arguments: Any) -> bool:
    found: list[bool] = []
    kinds = Value | Weight | Several
    map_aggregate(arguments, lambda item: found.append(True) if isinstance(item, kinds) else None)
    return bool(found)


def _plainly(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target = getattr(args[0], node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
    return target(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)  # type: ignore[operator]


def _label(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _in_place(node: fx.Node) -> fx.Node | None:
    """Which node's tensor an operation changes."""
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    label = _label(node)
    if node.op == "call_module":
        return first if getattr(node.meta["module"], "inplace", False) is True else None
    if node.op == "call_method":
        return first if label.endswith("_") and not label.endswith("__") else None
    augmented = getattr(node.target, "__module__", "") == "_operator" and label.startswith("i") and label in _AUGMENTED
    named = label.endswith("_") and not label.endswith("__")
    asked = label in _ASKED and (node.kwargs.get("inplace") is True or any(arg is True for arg in node.args[1:]))
    return first if augmented or named or asked else None


#: Functions with a flag for it.
_ASKED = {"relu", "relu6", "leaky_relu", "silu", "mish", "elu", "celu", "selu", "hardswish", "hardsigmoid", "hardtanh"}
_ASKED |= {"dropout", "rrelu", "threshold", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d"}
_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "ifloordiv", "imod"}


def _idle(graph: fx.Graph) -> Iterator[Tensor]:
    """Parameters of operations that the output does not depend on."""
    needed = set(_needed(graph))
    for node in graph.nodes:
        if node not in needed:
            if "parameter" in node.meta:
                yield node.meta["parameter"]
            if "module" in node.meta:
                yield from node.meta["module"].parameters()


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.numel() > 0


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that the output depends on, and those that change something in place."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in wanted or _in_place(node) is not None:
            wanted.add(node)
            wanted.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in wanted]
