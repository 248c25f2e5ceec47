"""Modules with a forward of their own and no rule: each of their operations is a rule's."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from gpseq.propagation.joint import Joint
from gpseq.propagation.moments import Full, GaussianState
from gpseq.propagation.tracing import CannotFollow, check_output, trace
from gpseq.propagation.values import Operation, Several, Value, Weight
from gpseq.propagation.walk import Walk, is_time_first


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

    given: dict[Any, Any] = {walk.leading_argument(module): state, **dict(enumerate(args, start=1)), **inputs}
    batch_dim, batch = walk.batch_dim, len(state.mean)
    for key, value in given.items():
        if isinstance(value, GaussianState) and value.is_certain:
            given[key] = value.mean.movedim(0, batch_dim) if value.mean.dim() > 2 else value.mean
    traced = trace(module, walk, given)
    found = Interpreter(walk, batch, batch_dim, OPERATIONS, traced.of_batch).run(traced.graph)
    for parameter in _idle(traced.graph):  # no output depends on it
        if walk.posterior.name(parameter) in walk.unused(module):
            walk.use(parameter)
    lost = walk.unused(module)
    if lost:
        raise CannotFollow(
            f"it uses {', '.join(lost)} in a way that is not seen, or not at all; a posterior without them says so"
        )
    check_output(module, walk, given, traced.graph, batch)
    if isinstance(found, Tensor):
        return GaussianState(found.movedim(batch_dim, 0) if found.dim() > 2 else found)
    walk.batch_dim = batch_dim if found.batch is None else found.batch
    return found.state


class Interpreter(Joint):
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
        super().__init__(walk, batch, batch_dim, of_batch)
        self.operations = operations
        self.node: fx.Node  # the present one
        self._layout = batch_dim
        self._env: dict[fx.Node, Any] = {}
        self._last: dict[fx.Node, int] = {}
        self._uses: Counter[fx.Node] = Counter()
        self._now = self._until = 0

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
            self._leave(node)
        found: Any = nodes[-1].args[0]
        found = self._env[found] if isinstance(found, fx.Node) else found
        found = found.first if isinstance(found, Several) else found
        if isinstance(found, Weight):
            found = self.value(found)
        if isinstance(found, Value) and found.batch is None:
            try:
                found = self.expand(found, found.shape, self.batch_dim if found.dim > 2 else 0)
            except CannotFollow as error:
                raise CannotFollow("its output does not depend on its input, or in a way that is not seen") from error
        if not isinstance(found, Value | Tensor):
            raise CannotFollow(f"it returns a {type(found).__name__}")
        return found

    def _later(self) -> Iterator[Any]:
        for node, value in self._env.items():
            if self._last.get(node, -1) > self._until:
                yield from _flat(value)

    def _leave(self, present: fx.Node) -> None:
        """Drop what is not used any more."""
        for node in [node for node in self._env if self._last.get(node, -1) <= self._now and node is not present]:
            del self._env[node]
        self._until = self._now
        self._forget(_flat(self._env.get(present)))

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
        first = self.before(leading, module)

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

    def before(self, value: Any, module: nn.Module) -> Value:
        """What a module gets first, as a state.

        Args:
            value: uncertain or not.
            module: that gets it.

        Raises:
            CannotFollow: the batch is not where the module has it.
        """
        if isinstance(value, Tensor):
            layout = 1 if is_time_first(module) or (self.batch_dim == 1 and value.dim() > 2) else 0
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
