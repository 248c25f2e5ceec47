"""Rules of what chooses entries, puts them elsewhere or repeats them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpseq.propagation.following import Interpreter
from gpseq.propagation.moments import LinearMap
from gpseq.propagation.operations.table import handles, known, not_the_batch, positive, sizes_of
from gpseq.propagation.tracing import CannotFollow
from gpseq.propagation.values import Several, Value, Weight


@handles("reshape", "view", torch.reshape)
def reshape(run: Interpreter, value: Any, *sizes: Any) -> Value:
    """Another shape, in which the batch stays where it is."""
    value = run.value(value)
    wanted = sizes_of(sizes)
    probe = torch.empty(value.shape, device="meta").reshape(wanted).shape
    if value.batch is not None and tuple(probe[: value.batch + 1]) != value.shape[: value.batch + 1]:
        raise CannotFollow("{operation} puts the batch together with other dimensions")
    return run.move(value, lambda x: x.reshape(wanted), value.batch)


@handles("view_as", "reshape_as")
def reshape_as(run: Interpreter, value: Any, other: Any) -> Value:
    """The shape of another tensor."""
    return reshape(run, value, known(run, other).shape)


@handles("flatten", torch.flatten)
def flatten(run: Interpreter, value: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    """Some dimensions as one."""
    value = run.value(value)
    start, end = positive(value, start_dim), positive(value, end_dim)
    batch = value.batch
    if batch is not None and start <= batch <= end and start != end:
        raise CannotFollow("{operation} puts the batch together with other dimensions")
    after = batch if batch is None or batch < start else batch - (end - start)
    return run.move(value, lambda x: x.flatten(start, end), after)


@handles("unflatten", torch.unflatten)
def unflatten(run: Interpreter, value: Any, dim: int, sizes: Any) -> Value:
    """One dimension as several."""
    value = run.value(value)
    place = positive(value, dim)
    not_the_batch(value, place)
    more = len(sizes) - 1 if value.batch is not None and value.batch > place else 0
    return run.move(value, lambda x: x.unflatten(place, sizes), None if value.batch is None else value.batch + more)


@handles("permute", torch.permute)
def permute(run: Interpreter, value: Any, *dims: Any) -> Value:
    """Dimensions in another order."""
    value = run.value(value)
    order = [positive(value, dim) for dim in sizes_of(dims)]
    after = None if value.batch is None else order.index(value.batch)
    return run.move(value, lambda x: x.permute(order), after)


@handles("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
def transpose(run: Interpreter, value: Any, dim0: int, dim1: int) -> Any:
    """Two dimensions change places."""
    if isinstance(value, Weight) and value.parameter.dim() == 2 and {dim0 % 2, dim1 % 2} == {0, 1}:
        return Weight(value.parameter, value.uses, not value.transposed)
    value = run.value(value)
    order = list(range(value.dim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(run, value, order)


@handles("t", torch.t)
def turned(run: Interpreter, value: Any) -> Any:
    """A matrix, transposed."""
    return transpose(run, value, 0, 1)


@handles("movedim", "moveaxis", torch.movedim, torch.moveaxis)
def movedim(run: Interpreter, value: Any, source: Any, destination: Any) -> Value:
    """Dimensions elsewhere."""
    value = run.value(value)
    order = torch.empty(range(2, 2 + value.dim), device="meta").movedim(source, destination).shape
    return permute(run, value, [size - 2 for size in order])


@handles("unsqueeze", torch.unsqueeze)
def unsqueeze(run: Interpreter, value: Any, dim: int) -> Value:
    """A dimension of size one."""
    value = run.value(value)
    place = positive(value, dim, extra=1)
    after = value.batch + (place <= value.batch) if value.batch is not None else None
    return run.move(value, lambda x: x.unsqueeze(place), after)


@handles("squeeze", torch.squeeze)
def squeeze(run: Interpreter, value: Any, dim: Any = None) -> Value:
    """Without dimensions of size one."""
    value = run.value(value)
    dims = range(value.dim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {positive(value, d) for d in dims if value.shape[d] == 1}
    if value.batch in gone:
        raise CannotFollow("{operation} takes the batch away where it has a single element; give it a dimension")
    kept = [d for d in range(value.dim) if d not in gone]
    return run.move(value, lambda x: x.squeeze(tuple(gone)), None if value.batch is None else kept.index(value.batch))


@handles("expand", "broadcast_to", torch.broadcast_to)
def expand(run: Interpreter, value: Any, *sizes: Any) -> Value:
    """Repeated along some dimensions."""
    value = run.value(value)
    wanted = list(sizes_of(sizes))
    known = [1] * (len(wanted) - value.dim) + list(value.shape)
    shape = [k if size == -1 else size for size, k in zip(wanted, known, strict=True)]
    if value.batch is not None:
        return run.expand(value, shape, value.batch + len(shape) - value.dim)
    place = run.batch_dim if len(shape) > 2 else 0
    return run.expand(value, shape, place if shape and shape[place] == run.batch and known[place] == 1 else None)


@handles("expand_as")
def expand_as(run: Interpreter, value: Any, other: Any) -> Value:
    """Repeated to the shape of another tensor."""
    return expand(run, value, known(run, other).shape)


@handles("repeat", torch.tile, "tile")
def repeat(run: Interpreter, value: Any, *times: Any) -> Value:
    """Copies side by side."""
    value = run.value(value)
    counts = list(sizes_of(times))
    counts = [1] * (value.dim - len(counts)) + counts
    extra = len(counts) - value.dim
    if value.batch is not None:
        after = value.batch + extra
        if counts[after] != 1:
            raise CannotFollow("{operation} repeats the batch")
        return run.move(value, lambda x: x.repeat(counts), after)
    place = run.batch_dim if len(counts) > 2 else 0
    known = [1] * extra + list(value.shape)
    if counts and counts[place] == run.batch and known[place] == 1:
        rest = [1 if number == place else count for number, count in enumerate(counts)]
        shape = [run.batch if n == place else k * c for n, (k, c) in enumerate(zip(known, counts, strict=True))]
        return run.expand(run.move(value, lambda x: x.repeat(rest), None), shape, place)
    return run.move(value, lambda x: x.repeat(counts), None)


@handles("flip", torch.flip)
def flip(run: Interpreter, value: Any, *dims: Any) -> Value:
    """In reverse order."""
    value = run.value(value)
    chosen = sizes_of(dims)
    not_the_batch(value, *chosen)
    return run.move(value, lambda x: x.flip(chosen), value.batch)


@handles("roll", torch.roll)
def roll(run: Interpreter, value: Any, shifts: Any, dims: Any = None) -> Value:
    """Shifted around."""
    value = run.value(value)
    if dims is None:
        raise CannotFollow("{operation} needs dims")
    chosen = (dims,) if isinstance(dims, int) else tuple(dims)
    not_the_batch(value, *chosen)
    return run.move(value, lambda x: x.roll(shifts, dims), value.batch)


@handles("select", torch.select)
def select(run: Interpreter, value: Any, dim: int, index: int) -> Value:
    """One along a dimension."""
    value = run.value(value)
    return _index(run, value, (*[slice(None)] * positive(value, dim), index))


@handles("narrow", torch.narrow)
def narrow(run: Interpreter, value: Any, dim: int, start: int, length: int) -> Value:
    """Some along a dimension, one after the other."""
    value = run.value(value)
    return _index(run, value, (*[slice(None)] * positive(value, dim), slice(start, start + length)))


@handles("index_select", torch.index_select)
def index_select(run: Interpreter, value: Any, dim: int, index: Tensor) -> Value:
    """Some along a dimension."""
    value = run.value(value)
    return _index(run, value, (*[slice(None)] * positive(value, dim), index))


@handles(operator.getitem)
def getitem(run: Interpreter, value: Any, index: Any) -> Any:
    """A part of a tensor, or of what a function returned."""
    if isinstance(value, Several):
        return value.take(run.node.meta["value"])
    if isinstance(value, tuple | list):
        return value[index]
    return _index(run, run.value(value), index if isinstance(index, tuple) else (index,))


@handles(getattr)
def attribute(run: Interpreter, value: Any, name: str) -> Any:
    """Another view of a tensor, or a part of what a module returned."""
    if isinstance(value, Several):
        return value.take(run.node.meta["value"])
    if name in ("T", "mT") and (name == "mT" or isinstance(value, Weight) or run.value(value).dim == 2):
        return transpose(run, value, -2, -1)
    if name == "data":
        return run.value(value)
    raise CannotFollow(f"the attribute {name} has no rule for uncertain numbers")


def _index(run: Interpreter, value: Value, index: tuple[Any, ...]) -> Value:
    given = [item for item in index if item is not None and not isinstance(item, EllipsisType)]
    missing = value.dim - len(given)
    full: list[Any] = []
    for item in index:
        full.extend([slice(None)] * missing if isinstance(item, EllipsisType) else [item])
    if not any(isinstance(item, EllipsisType) for item in index):
        full.extend([slice(None)] * missing)
    after: int | None = None
    old = new = 0
    lists = 0
    for item in full:
        if item is None:
            new += 1
            continue
        if old == value.batch:
            if item != slice(None):
                raise CannotFollow("{operation} chooses from the batch")
            after = new
        if isinstance(item, Tensor | list):
            chosen = torch.as_tensor(item)
            lists += 1
            if chosen.dim() != 1 or lists > 1:
                raise CannotFollow("{operation} chooses with several lists of places")
        elif not isinstance(item, int | slice):
            raise CannotFollow(f"{{operation}} chooses with a {type(item).__name__}")
        new += not isinstance(item, int)
        old += 1
    # A list and an integer together would put the list's dimension first.
    if lists and any(isinstance(item, int) for item in full):
        raise CannotFollow("{operation} chooses with a list and a single place; choose one after the other")
    if new == (after is not None):
        raise CannotFollow("{operation} leaves a single number")
    chosen_items = tuple(full)
    return run.move(value, lambda x: x[chosen_items], after)


def _pieces(run: Interpreter, value: Value, slices: Sequence[slice], dim: int) -> tuple[Value, ...]:
    not_the_batch(value, dim)
    place = positive(value, dim)
    pieces: list[Value] = []
    for number, part in enumerate(slices):
        keep = [*pieces, *([value] if number + 1 < len(slices) else [])]
        chosen = (*[slice(None)] * place, part)
        pieces.append(run.move(value, lambda x, c=chosen: x[c], value.batch, keep))  # type: ignore[misc]
    return tuple(pieces)


def _slices(sizes: Sequence[int]) -> list[slice]:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


@handles("chunk", torch.chunk)
def chunk(run: Interpreter, value: Any, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    """As many parts."""
    value = run.value(value)
    sizes = [len(part) for part in torch.arange(value.shape[dim]).chunk(chunks)]
    return _pieces(run, value, _slices(sizes), dim)


@handles("split", torch.split, "split_with_sizes", torch.split_with_sizes)
def split(run: Interpreter, value: Any, split_size: Any, dim: int = 0) -> tuple[Value, ...]:
    """Parts of some sizes."""
    value = run.value(value)
    sizes = [len(part) for part in torch.arange(value.shape[dim]).split(split_size)]
    return _pieces(run, value, _slices(sizes), dim)


@handles("unbind", torch.unbind)
def unbind(run: Interpreter, value: Any, dim: int = 0) -> tuple[Value, ...]:
    """All along a dimension."""
    value = run.value(value)
    not_the_batch(value, dim)
    place = positive(value, dim)
    pieces = _pieces(run, value, _slices([1] * value.shape[place]), place)
    out: list[Value] = []
    for number, piece in enumerate(pieces):
        chosen = (*[slice(None)] * place, 0)
        after = piece.batch if piece.batch is None or piece.batch < place else piece.batch - 1
        keep = [*out, *pieces[number + 1 :]]
        out.append(run.move(piece, lambda x, c=chosen: x[c], after, keep))  # type: ignore[misc]
    return tuple(out)


@handles(torch.cat, torch.concat, torch.concatenate)
def cat(run: Interpreter, tensors: Any, dim: int = 0) -> Value:
    """One after the other, with the covariance between them."""
    return join(run, list(tensors), dim)


@handles(torch.stack)
def stack(run: Interpreter, tensors: Any, dim: int = 0) -> Value:
    """Side by side along a new dimension."""
    items = [known(run, item) for item in tensors]
    done: list[Any] = []
    for number, item in enumerate(items):
        if isinstance(item, Value):
            place = positive(item, dim, extra=1)
            after = item.batch + (place <= item.batch) if item.batch is not None else None
            keep = [*done, *items[number + 1 :]]
            done.append(run.move(item, lambda x, p=place: x.unsqueeze(p), after, keep))  # type: ignore[misc]
        else:
            done.append(item.unsqueeze(dim))
    return join(run, done, dim)


def join(run: Interpreter, items: Sequence[Any], dim: int) -> Value:
    """Values and plain tensors one after the other.

    Args:
        run: the interpreter.
        items: in order.
        dim: along which.
    """
    items = [known(run, item) for item in items]
    place = dim % len(items[0].shape)
    sizes = [item.shape[place] for item in items]
    single = [[*item.shape[:place], 1, *item.shape[place + 1 :]] for item in items]
    shape, batch = run.common(items, single)
    if batch == place:
        raise CannotFollow("{operation} goes over the batch")
    total: Value | None = None
    offset: Tensor | None = None
    for number, (item, size) in enumerate(zip(items, sizes, strict=True)):
        padding = sum(sizes[:number]), sum(sizes[number + 1 :])
        wide = [*shape[:place], size, *shape[place + 1 :]]
        if not isinstance(item, Value):
            plain = item.expand(wide)
            plain = F.pad(plain, [0, 0] * (plain.dim() - 1 - place) + list(padding))
            offset = plain if offset is None else offset + plain
            continue
        rest = items[number + 1 :]
        item = run.expand(item, wide, batch, keep=[total, *rest])
        wider = _padded(run, item, item.axis(place), padding, keep=[total, *rest])
        total = wider if total is None else run.add(total, wider, keep=rest)
    assert total is not None
    if offset is None:
        return total
    added = offset.unsqueeze(0) if batch is None else offset.movedim(batch, 0)
    return run.apply(total, lambda state: state.shift(added))


def _padded(run: Interpreter, value: Value, axis: int, padding: tuple[int, int], keep: Sequence[Any]) -> Value:
    """Zeros around a value along a negative dimension of events."""

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, [0, 0] * (-axis - 1) + list(padding))

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, [*padding, *padding] if axis == -1 else [0, 0] * -axis + list(padding))

    return run.apply(value, lambda state: state.apply(pad(state.mean), LinearMap(pad, pad, blocks)), keep=keep)
