"""Task streams: data cut into tasks that are met one after the other, by a key, by time or by class.

What is cut are row numbers. The rows themselves are copied when a task is asked for, so a stream of tasks costs no
second copy of the data, and ``Task.rows`` cuts any further array in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor

from gpseq.checks import check_count, check_number
from gpseq.continual.cuts import as_number, as_text, check_edges, check_keys, interval_of, key_of, last_not_above

ORDERS = ("sorted", "given")
EMPTY = ("error", "keep", "drop")

#: A column of x, ``"norm"``, a function of x, or the keys themselves.
Key = int | str | Callable[[Tensor], Tensor] | Tensor


@dataclass(frozen=True, eq=False)
class Task:
    """One task: rows to learn and rows to be tested on.

    Attributes:
        name: for tables and errors.
        x: inputs to learn, ``(n, ...)``.
        y: targets to learn, ``(n, ...)``.
        x_test: inputs that are held out, ``(m, ...)``.
        y_test: targets that are held out, ``(m, ...)``.
        rows: ``(n,)`` int64, where ``x`` and ``y`` stand in the data that were cut.
        test_rows: ``(m,)`` int64, where ``x_test`` and ``y_test`` stand, in the same data, or in the test set if one
            was given.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    rows: Tensor
    test_rows: Tensor


@dataclass(frozen=True, eq=False)
class TaskStream(Sequence[Task]):
    """Tasks in the order in which they are met; a sequence of :class:`Task`, each made when it is asked for.

    Attributes:
        names: one for each task.
        x: inputs that were cut, ``(n, ...)``.
        y: targets that were cut, ``(n, ...)``.
        x_test: where test rows are taken from, ``(m, ...)``; ``x`` itself if rows were held out.
        y_test: likewise, ``(m, ...)``.
        rows: row numbers of each task in ``x``.
        test_rows: row numbers of each task in ``x_test``.
    """

    names: tuple[str, ...]
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    rows: tuple[Tensor, ...]
    test_rows: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> TaskStream: ...

    def __getitem__(self, index: int | slice) -> Task | TaskStream:
        if isinstance(index, slice):
            parts = self.rows[index], self.test_rows[index]
            return TaskStream(self.names[index], self.x, self.y, self.x_test, self.y_test, *parts)
        rows, test_rows = self.rows[index], self.test_rows[index]
        return Task(
            self.names[index],
            _take(self.x, rows),
            _take(self.y, rows),
            _take(self.x_test, test_rows),
            _take(self.y_test, test_rows),
            rows,
            test_rows,
        )


def tasks_by_key(
    x: Tensor,
    y: Tensor,
    num_tasks: int,
    key: Key = 0,
    held_out: float = 0.0,
    generator: torch.Generator | None = None,
    test: tuple[Tensor, ...] | None = None,
    order: str = "sorted",
) -> TaskStream:
    """Sort the rows by a key and cut them into tasks of equal numbers of rows.

    The first tasks have one row more where the numbers do not divide. Equal keys keep their order, and a cut may
    fall among them.

    Args:
        x: inputs, ``(n, ...)``.
        y: targets, ``(n, ...)``, of any dtype.
        num_tasks: how many tasks.
        key: what to sort by: a column of ``x``; ``"norm"``, the Euclidean norm of each row; a function from ``x`` to
            ``(n,)``; or the keys, ``(n,)``.
        held_out: fraction of the rows of *each* task that are not learnt but tested on, rounded, drawn at random;
            one row at least is left to learn.
        generator: of the draw; ``None`` is torch's default generator.
        test: a test set instead, ``(x_test, y_test)``, or ``(x_test, y_test, key_test)`` if ``key`` is a tensor. A row
            belongs to the last task whose smallest key is not above its own; below all of them, to the first.
        order: how the rows of one task come: ``"sorted"`` by the key, or as ``"given"``.

    Returns:
        The tasks; the smallest keys come first.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: lengths differ, a key is NaN, there are more tasks than rows, or a value out of range.

    Example:
        >>> x = torch.tensor([[3.0], [1.0], [2.0], [0.0]])
        >>> tasks = tasks_by_key(x, x.squeeze(-1).sin(), num_tasks=2)
        >>> [task.rows.tolist() for task in tasks]
        [[3, 1], [2, 0]]
    """
    length = _check_data("x", x, "y", y)
    check_count("num_tasks", num_tasks)
    if num_tasks > length:
        raise ValueError(f"num_tasks: expected at most one for each of {length} rows, got {num_tasks}.")
    values = key_of("key", key, x)
    parts = _stable_argsort(values).tensor_split(num_tasks)
    tests = None
    if test is not None:
        x_test, _, *rest = _check_test(test, with_key=isinstance(key, Tensor), what="key")
        places = key_of("test", rest[0] if rest else key, x_test)
        # Cuts by the first key of each task, so that nothing lies between two tasks.
        smallest = torch.stack([values[part[0]] for part in parts])
        tests = _parts_by_number(last_not_above(smallest, places).clamp(min=0), places, num_tasks)
    names = tuple(f"task {number + 1}" for number in range(num_tasks))
    return _stream(names, x, y, parts, tests, test, held_out, generator, order, "error")


def tasks_by_time(
    t: Tensor,
    x: Tensor,
    y: Tensor,
    num_tasks: int | None = None,
    edges: Tensor | Sequence[float] | None = None,
    held_out: float = 0.0,
    generator: torch.Generator | None = None,
    test: tuple[Tensor, ...] | None = None,
    order: str = "sorted",
    empty: str = "error",
) -> TaskStream:
    """Cut the rows into tasks by intervals of time.

    For tasks of equal numbers of rows use :func:`tasks_by_key` with the times as the key.

    Args:
        t: times, ``(n,)``, in any order.
        x: inputs, ``(n, ...)``; may be ``t`` itself.
        y: targets, ``(n, ...)``, of any dtype.
        num_tasks: so many intervals of equal length from the first to the last time.
        edges: increasing times instead, ``(num_tasks + 1,)``; infinite ones may stand at the ends. A task begins with
            its first edge and ends before its second; the last one includes it. Numbers are rounded to the dtype of
            the times, so that 0.7 is the 0.7 of ``float32`` times; a tensor is taken as it is.
        held_out: fraction of the rows of each task that are tested on, see :func:`tasks_by_key`.
        generator: of the draw; ``None`` is torch's default generator.
        test: a test set instead, ``(x_test, y_test, t_test)``, cut at the same times; those before the first or after
            the last edge that ``num_tasks`` makes belong to the first or last task.
        order: how the rows of one task come: ``"sorted"`` by time, or as ``"given"``.
        empty: an interval with nothing to learn is an ``"error"``; or ``"keep"`` it, as a task of no rows, so that
            tasks and intervals have the same numbers; or ``"drop"`` it, along with its test rows.

    Returns:
        The tasks, the earliest first.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: lengths differ, a time is NaN or outside the edges, edges do not increase, a task has no data, or
            a value out of range.

    Example:
        >>> t = torch.tensor([0.0, 1.0, 7.0, 8.0, 9.0])
        >>> tasks = tasks_by_time(t, t, t.cos(), edges=[0.0, 5.0, 10.0])
        >>> [(task.name, len(task.y)) for task in tasks]
        [('0 to 5', 2), ('5 to 10', 3)]
    """
    length = _check_data("x", x, "y", y)
    times = check_keys("t", t, length)
    if (num_tasks is None) == (edges is None):
        raise ValueError("edges: expected either num_tasks or edges, got " + ("none." if edges is None else "both."))
    if num_tasks is not None:
        check_count("num_tasks", num_tasks)
        if num_tasks > length:
            raise ValueError(f"num_tasks: expected at most one for each of {length} rows, got {num_tasks}.")
        if not times.isfinite().all():
            raise ValueError("t: expected finite times for intervals of equal length, got infinity.")
        low, high = times.min().item(), times.max().item()
        # Exactly, for nanoseconds and because a time on a cut must not fall on its other side by rounding.
        first, span = Fraction(low), Fraction(high) - Fraction(low)
        cuts: Sequence[float | Fraction] = [first + span * k / num_tasks for k in range(num_tasks + 1)]
        named = [float(cut) for cut in cuts]
    else:
        cuts = named = check_edges(edges)
        num_tasks = len(cuts) - 1
    round_to = t.dtype if edges is not None and not isinstance(edges, Tensor) else None
    parts = _parts_by_number(interval_of("t", times, cuts, round_to), times, num_tasks)
    tests = None
    if test is not None:
        x_test, _, t_test = _check_test(test, with_key=True, what="t")
        places = check_keys("test", t_test, len(x_test))
        inside = places if edges is not None else places.clamp(times.min().item(), times.max().item())
        round_to = None if round_to is None else t_test.dtype
        tests = _parts_by_number(interval_of("test", inside, cuts, round_to), places, num_tasks)
    names = tuple(f"{as_text(low)} to {as_text(high)}" for low, high in pairwise(named))
    return _stream(names, x, y, parts, tests, test, held_out, generator, order, empty)


def tasks_by_class(
    x: Tensor,
    y: Tensor,
    classes: Sequence[Sequence[float]],
    held_out: float = 0.0,
    generator: torch.Generator | None = None,
    test: tuple[Tensor, Tensor] | None = None,
) -> TaskStream:
    """Tasks of a few classes each; rows keep their order, and labels their values.

    Args:
        x: inputs, ``(n, ...)``.
        y: labels, ``(n,)``, of any dtype without NaN.
        classes: the labels of each task, such as ``((0, 1), (2, 3))``. Rows of other classes are left out.
        held_out: fraction of the rows of each task that are tested on, see :func:`tasks_by_key`.
        generator: of the draw; ``None`` is torch's default generator.
        test: a test set instead, ``(x_test, y_test)``.

    Returns:
        The tasks, in the order of ``classes``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: lengths differ, a class has no rows or is in two tasks, a task has no classes, or a value out of
            range.

    Example:
        >>> label = torch.tensor([2, 0, 1, 3, 0])
        >>> tasks = tasks_by_class(label.double(), label, classes=((0, 1), (2, 3)))
        >>> [(task.name, task.rows.tolist()) for task in tasks]
        [('0, 1', [1, 2, 4]), ('2, 3', [0, 3])]
    """
    length = _check_data("x", x, "y", y)
    labels = check_keys("y", y, length)
    try:
        groups = [[as_number(label) for label in group] for group in classes]
    except TypeError:
        raise TypeError(f"classes: expected the labels of each task, such as ((0,), (1,)), got {classes!r}.") from None
    flat = [label for group in groups for label in group]
    if not groups or not all(groups):
        raise ValueError(f"classes: expected one class or more for each task, got {classes!r}.")
    if twice := sorted({label for label in flat if flat.count(label) > 1}):
        raise ValueError(f"classes: expected each class in one task, got class {as_text(twice[0])} twice.")
    there = set(labels.unique().tolist())
    if unknown := sorted(set(flat) - there):
        known = ", ".join(as_text(label) for label in sorted(there)[:20])
        raise ValueError(f"classes: no row of y has class {as_text(unknown[0])}; there are {known}.")

    def members(labels: Tensor) -> list[Tensor]:
        return [torch.isin(labels, labels.new_tensor(group)).nonzero().squeeze(-1) for group in groups]

    tests = None
    if test is not None:
        x_test, y_test = _check_test(test, with_key=False, what="y")
        test_labels = check_keys("test", y_test, len(x_test))
        tests = members(test_labels.double() if labels.is_floating_point() else test_labels)
    names = tuple(", ".join(as_text(label) for label in group) for group in groups)
    return _stream(names, x, y, members(labels), tests, test, held_out, generator, "given", "error")


def _take(data: Tensor, rows: Tensor) -> Tensor:
    return data[rows.to(data.device)]


def _stream(
    names: tuple[str, ...],
    x: Tensor,
    y: Tensor,
    parts: Sequence[Tensor],
    tests: Sequence[Tensor] | None,
    test: tuple[Tensor, ...] | None,
    held_out: float,
    generator: torch.Generator | None,
    order: str,
    empty: str,
) -> TaskStream:
    """Hold rows out, bring what remains into its order, and see that there is something to learn."""
    check_generator(generator)
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}.")
    if empty not in EMPTY:
        raise ValueError(f"empty: expected one of {EMPTY}, got {empty!r}.")
    fraction = check_number("held_out", held_out, above=-1.0, expected="a fraction in [0, 1)")
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out: expected a fraction in [0, 1), got {held_out!r}.")
    if fraction and tests is not None:
        raise ValueError("held_out: expected 0 with a test set that is given, got both.")
    if bare := [name for name, part in zip(names, parts, strict=True) if len(part) == 0]:
        if empty == "error":
            raise ValueError(f"tasks: {', '.join(map(repr, bare))} of {len(names)} tasks have no data to learn.")
        if empty == "drop":
            kept = [number for number, part in enumerate(parts) if len(part)]
            names, parts = tuple(names[number] for number in kept), [parts[number] for number in kept]
            tests = None if tests is None else [tests[number] for number in kept]
    rows = list(parts)
    if tests is None:
        halves = [_held_out(part, fraction, generator) for part in parts]
        rows, tests = [learn for learn, _ in halves], [out for _, out in halves]
    if order == "given":
        rows, tests = [part.sort().values for part in rows], [part.sort().values for part in tests]
    x_test, y_test = (x, y) if test is None else test[:2]
    return TaskStream(names, x, y, x_test, y_test, tuple(rows), tuple(tests))


def _held_out(part: Tensor, fraction: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Rows to learn and rows that are held out, both in the order in which they stand in ``part``."""
    if not fraction:
        return part, part[:0]
    device = "cpu" if generator is None else generator.device
    chosen = torch.randperm(len(part), generator=generator, device=device)
    chosen = chosen[: max(min(round(fraction * len(part)), len(part) - 1), 0)].cpu()
    out = torch.zeros(len(part), dtype=torch.bool)
    out[chosen] = True
    return part[~out], part[out]


def _parts_by_number(number: Tensor, key: Tensor, num_tasks: int) -> list[Tensor]:
    """Rows of each task, sorted by their keys."""
    order = _stable_argsort(key)
    return [order[number[order] == task] for task in range(num_tasks)]


def _stable_argsort(key: Tensor) -> Tensor:
    return key.argsort(stable=True)


def check_generator(generator: Any) -> None:
    """``None`` or a generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {generator!r}.")


def _check_data(name_x: str, x: Any, name_y: str, y: Any) -> int:
    """The number of rows that inputs and targets have in common."""
    for name, value in ((name_x, x), (name_y, y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}.")
        if value.dim() == 0:
            raise ValueError(f"{name}: expected at least one dimension, got a scalar.")
    if len(x) != len(y):
        raise ValueError(f"{name_y}: expected {len(x)} rows, as {name_x} has, got {len(y)}.")
    if len(x) == 0:
        raise ValueError(f"{name_x}: expected at least one row, got shape {tuple(x.shape)}.")
    return len(x)


def _check_test(test: Any, with_key: bool, what: str) -> tuple[Tensor, ...]:
    size = 3 if with_key else 2
    if not isinstance(test, tuple | list) or len(test) != size:
        expected = f"(x_test, y_test, {what} of the test rows)" if with_key else "(x_test, y_test)"
        got = f"{len(test)} parts" if isinstance(test, tuple | list) else type(test).__name__
        raise ValueError(f"test: expected {expected}, got {got}.")
    _check_data("x_test", test[0], "y_test", test[1])
    return tuple(test)
