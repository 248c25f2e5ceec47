r"""Values of a forward that are uncertain together: their covariances with each other, and where they have the batch.

In the form ``"full"`` values that are used more than once keep their covariances with each other: with what is alive at
a time they are jointly Gaussian, so that sums and concatenations of any of them are right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gpseq.propagation.moments import Blocks, Full, GaussianState, LinearMap, LowRank, sum_crosses
from gpseq.propagation.tracing import CannotFollow
from gpseq.propagation.values import Several, Value, Weight
from gpseq.propagation.walk import Walk


class Joint(ABC):
    """What the rules of operations work on.

    Args:
        walk: of the network.
        batch: B.
        batch_dim: where the forward's arguments have it.
        of_batch: plain tensors that have a batch.
    """

    def __init__(self, walk: Walk, batch: int, batch_dim: int, of_batch: Mapping[Tensor, bool]) -> None:
        self.walk, self.batch, self.batch_dim = walk, batch, batch_dim
        self._of_batch = of_batch
        self._held: list[Any] = []
        self._values: dict[int, Value] = {}
        self._between: dict[tuple[int, int], Tensor] = {}

    @abstractmethod
    def _later(self) -> Iterator[Any]:
        """What the forward uses later."""

    def _alive(self, keep: Iterable[Any] = ()) -> list[Value]:
        """Values that are used yet, and others."""
        found: dict[int, Value] = {}
        for each in (*self._later(), *keep, *self._held):
            each = self._values.get(id(each.parameter)) if isinstance(each, Weight) else each
            if isinstance(each, Value):
                found[each.number] = each
        return list(found.values())

    def _forget(self, keep: Iterable[Any]) -> None:
        """Drop covariances with what is not used any more.

        Args:
            keep: values that are used yet, besides those that the forward uses later.
        """
        alive = {value.number for value in self._alive(keep)}
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
        covariance = Full(total, one.event, sum_crosses(one.crosses, other.crosses))
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
            if isinstance(item.first, Tensor):
                raise CannotFollow(f"{{operation}} gets all that {item.path} returns, of which only a part is known")
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
        rest = None if covariance.entries is None else function(covariance.entries)
        return GaussianState(function(state.mean), LowRank(columns, rest))
    if not isinstance(covariance, Blocks):
        return state.move(function)
    width = state.mean.shape[-1]
    features = torch.arange(width, device=state.mean.device).expand(state.mean.shape)
    found = function(features)
    if found.shape[-1] != width or not bool((found == features.flatten()[:width]).all()):
        raise CannotFollow("{operation} takes features of a token apart, which the form 'blockdiag' cannot carry")
    entries = torch.stack([function(column) for column in covariance.entries.unbind(-1)], -1)
    return GaussianState(function(state.mean), Blocks(entries))
