"""Rows of a time series from CSV text: one at a time, checked, with errors that point at the cell.

Nothing is kept: a file of any size, or a feed that never ends, is read in constant memory.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple


class TableError(ValueError):
    """A table cannot be read; the message names the row, counted as in an editor, and the column."""


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        line: the line of the file on which the row begins; the header stands on line 1.
        time: time since the first row, in the unit of the column, or in days if the column holds dates.
        target: the value, or ``None`` where the cell is empty or NaN.
        time_text: the time as it stands in the file.
        target_text: the value as it stands in the file.
        group: the cell of the ``group`` column, or ``None`` if none was asked for.
    """

    line: int
    time: float
    target: float | None
    time_text: str
    target_text: str
    group: str | None


class TimeAxis:
    """Times on the scale of one column: shifted to an origin, dates in days.

    The shift happens in float64, before anything can cast the times to a shorter type: 1.7e9 seconds since 1970 have
    a resolution of two minutes in float32, and the seconds since the first row have not.

    Args:
        origin: the time that becomes 0, as text: a number, or a date or date and time of ISO 8601 (``2024-03``,
            ``2024-03-01``, ``2024-03-01T12:30:00+01:00``). All times of one axis are numbers, or all are dates.

    Raises:
        ValueError: the text is neither.

    Attributes:
        origin: the origin, as it was given.
        is_date: whether the axis counts days.

    Example:
        >>> TimeAxis("1610.5").parse("2000.5")
        390.0
        >>> TimeAxis("2024-02-28").parse("2024-03-01T12:00")
        2.5
        >>> TimeAxis("2024-02-28").value(2.5)
        datetime.datetime(2024, 3, 1, 12, 0)
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self._origin = _moment(origin)
        self.is_date = isinstance(self._origin, datetime)

    def parse(self, text: str) -> float:
        """Time since the origin.

        Args:
            text: as for ``origin``.

        Returns:
            The difference, in the unit of the numbers, or in days.

        Raises:
            ValueError: the text is not a time of this axis.
        """
        moment = _moment(text)
        if isinstance(moment, datetime) and isinstance(self._origin, datetime):
            if (moment.tzinfo is None) != (self._origin.tzinfo is None):
                raise ValueError(
                    f"{reprlib.repr(text)} and the first time, {self.origin!r}, must both have a time zone or neither"
                )
            return (moment - self._origin) / timedelta(days=1)
        if isinstance(moment, datetime) or isinstance(self._origin, datetime):
            kind = "a date" if self.is_date else "a number"
            raise ValueError(f"{reprlib.repr(text)} is not {kind}, as the first time, {self.origin!r}, is")
        if not math.isfinite(moment - self._origin):
            raise ValueError(f"{reprlib.repr(text)} is too far from the first time, {self.origin!r}")
        return moment - self._origin

    def value(self, time: float) -> float | datetime:
        """The number, or the date and time, that lies ``time`` after the origin: the inverse of :meth:`parse`."""
        if isinstance(self._origin, datetime):
            return self._origin + timedelta(days=time)
        return self._origin + time


def read_rows(
    source: str | os.PathLike[str] | Iterable[bytes],
    time: str,
    target: str,
    group: str | None = None,
    axis: TimeAxis | None = None,
    name: str | None = None,
) -> Iterator[Row]:
    """Read the rows of a CSV table one at a time.

    The first line is the header. Cells are separated by commas and may be quoted; a byte order mark, either kind of
    line ending and blank lines are accepted. Every row has as many cells as the header. A row whose target
    is empty, or ``NaN`` in upper or lower case, is yielded with ``target=None``, so that who wants to can count it;
    every other cell must hold what it should.

    Args:
        source: a file, compressed if its name ends in ``.gz``, or any iterable of lines, such as
            ``sys.stdin.buffer``: each row is yielded as soon as its line has come.
        time: the column of times: numbers, or dates of ISO 8601.
        target: the column of values.
        group: a column whose cells are handed on as they are.
        axis: the axis on which times are measured; ``None`` makes one that begins at the first row.
        name: what error messages call the source; ``None`` takes the file's name.

    Yields:
        The rows, in the order of the file.

    Raises:
        TableError: the source is not such a table.
        OSError: the file cannot be read.

    Example:
        >>> rows = read_rows([b"day,level", b"2024-02-28,3.5", b"2024-03-01,"], time="day", target="level")
        >>> [(row.line, row.time, row.target) for row in rows]
        [(2, 0.0, 3.5), (3, 2.0, None)]
    """
    if not isinstance(source, str | os.PathLike):
        yield from _rows(source, time, target, group, axis, name or "the table")
        return
    with _open(Path(source)) as file:
        yield from _rows(file, time, target, group, axis, name or os.fspath(source))


def _rows(
    lines: Iterable[bytes], time: str, target: str, group: str | None, axis: TimeAxis | None, name: str
) -> Iterator[Row]:
    records = _records(lines, name)
    _, header = next(records, (0, None))
    if header is None:
        raise TableError(f"{name} is empty")
    columns = [column.strip() for column in header]
    at_time, at_target = _index(columns, time, name), _index(columns, target, name)
    at_group = None if group is None else _index(columns, group, name)

    line = 0
    for line, cells in records:
        if len(cells) != len(columns):
            raise TableError(f"{name}, row {line}: {len(cells)} cells, where the header has {len(columns)}")
        time_text, target_text = cells[at_time].strip(), cells[at_target].strip()
        try:
            axis = axis or TimeAxis(time_text)
            elapsed = axis.parse(time_text)
        except ValueError as error:
            raise TableError(f"{name}, row {line}, column {time!r}: {error}") from None
        try:
            value = None if target_text.lower() in ("", "nan") else _number(target_text)
        except ValueError as error:
            raise TableError(f"{name}, row {line}, column {target!r}: {error}") from None
        yield Row(line, elapsed, value, time_text, target_text, None if at_group is None else cells[at_group].strip())
    if not line:
        raise TableError(f"{name} has a header and no rows")


def _records(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, list[str]]]:
    """The records of CSV text that are not blank, each with the line on which it begins."""
    reader = csv.reader(_text(lines, name))
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise TableError(f"{name}, row {line}: not CSV text ({error})") from None
        if cells:
            yield line, cells


def _text(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Lines as text. They are decoded one by one, so that an error knows its line and no row waits for the next."""
    line = 0
    try:
        for line, raw in enumerate(lines, start=1):
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise TableError(f"{name}, row {line}: not UTF-8 text (byte {error.object[error.start]:#04x})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TableError(f"{name} is not a complete gzip file, after row {line} ({error})") from None


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _index(columns: list[str], column: str, name: str) -> int:
    if column not in columns:
        shown = ", ".join(map(reprlib.repr, columns[:20])) + (", ..." if len(columns) > 20 else "")
        raise TableError(f"{name} has no column {column!r}; it has {shown}")
    if columns.count(column) > 1:
        raise TableError(f"{name} has {columns.count(column)} columns {column!r}")
    return columns.index(column)


def _number(text: str, expected: str = "a number") -> float:
    if not text:
        raise ValueError("the cell is empty")
    try:
        value = float(text.replace("_", "?"))  # "1_000" is a number to Python alone
    except ValueError:
        raise ValueError(f"{reprlib.repr(text)} is not {expected}") from None
    if not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(text)} is not finite")
    return value


def _moment(text: str) -> float | datetime:
    """A date or a number, whichever the text is."""
    if re.match(r"\d{4}-", text) is None:
        return _number(text, "a number or an ISO date")
    try:
        return datetime.fromisoformat(f"{text}-01" if len(text) == len("2024-03") else text)
    except ValueError:
        raise ValueError(f"{reprlib.repr(text)} is not an ISO date") from None
