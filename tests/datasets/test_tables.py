"""Rows from CSV text: what is accepted, and that every error points at the cell."""

import gzip
import math
import os
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpseq.datasets.tables import Row, TableError, TimeAxis, read_rows


def rows(text: str | bytes, **options: object) -> list[Row]:
    """The rows of a table given as text, with time in column t and values in column y."""
    data = text if isinstance(text, bytes) else text.encode()
    return list(read_rows(data.splitlines(keepends=True), "t", "y", **options))  # type: ignore[arg-type]


def error(text: str | bytes, **options: object) -> str:
    """The message with which a table is refused: one line."""
    with pytest.raises(TableError) as caught:
        rows(text, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


def test_columns_are_found_by_name() -> None:
    assert rows("id,y,t\nA,2.5,10\nB,3,12\n", group="id") == [
        Row(2, 0.0, 2.5, "10", "2.5", "A"),
        Row(3, 2.0, 3.0, "12", "3", "B"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "t,y\r\n1,2\r\n3,4\r\n",
        "\ufefft,y\n1,2\n3,4",
        '"t","y"\n"1","2"\n"3","4"\n',
        " t , y \n 1 , 2\n3 ,4 \n",
        "\n\nt,y\n\n1,2\n\n\n3,4\n\n",
    ],
    ids=["crlf", "bom", "quoted", "padded", "blank lines"],
)
def test_shapes_of_csv_text(text: str) -> None:
    assert [(row.time, row.target) for row in rows(text)] == [(0.0, 2.0), (2.0, 4.0)]


def test_lines_are_counted_as_in_an_editor() -> None:
    table = 'note,t,y\n"two\nlines",1,2\n\n"one ""quoted"" line",3,4\n'
    assert [row.line for row in rows(table)] == [2, 5]


def test_an_empty_target_is_handed_on() -> None:
    assert [row.target for row in rows("t,y\n1,2\n2,\n3, \n4,5\n")] == [2.0, None, None, 5.0]


def test_numbers_are_shifted_in_float64() -> None:
    start = 1.7e9
    table = "t,y\n" + "".join(f"{start + i / 1024!r},0\n" for i in range(100))
    assert [row.time for row in rows(table)] == [i / 1024 for i in range(100)]


@pytest.mark.parametrize(
    ("first", "then", "days"),
    [
        ("2024-02-28", "2024-03-01", 2.0),
        ("2024-02-28", "2024-02-28T06:00", 0.25),
        ("2024-02-28 12:00:00", "2024-02-28T12:00:00.000001", 1 / 86400e6),
        ("2024-03-01T00:00Z", "2024-03-01T00:00+01:00", -1 / 24),
        ("2023-12", "2024-02", 62.0),
        ("2024-W01-1", "2024-W02-1", 7.0),
    ],
)
def test_dates_become_days(first: str, then: str, days: float) -> None:
    assert [row.time for row in rows(f"t,y\n{first},0\n{then},0\n")] == [0.0, days]


def test_an_axis_may_be_carried_over_to_another_table() -> None:
    assert [row.time for row in rows("t,y\n15,0\n16,0\n", axis=TimeAxis("10"))] == [5.0, 6.0]
    assert "'2024-01-01' is not a number" in error("t,y\n2024-01-01,0\n", axis=TimeAxis("10"))


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_value_undoes_parse(origin: float, time: float) -> None:
    axis = TimeAxis(repr(origin))
    value = axis.value(axis.parse(repr(time)))
    assert isinstance(value, float) and math.isclose(value, time, rel_tol=1e-15, abs_tol=1e-3)


def test_value_of_a_date() -> None:
    axis = TimeAxis("2024-02-28")
    assert axis.is_date and axis.value(axis.parse("2024-03-01T18:00")) == datetime(2024, 3, 1, 18)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty"),
        ("\n\n", "the table is empty"),
        ("t,y\n", "the table has a header and no rows"),
        ("t,x\n1,2\n", "the table has no column 'y'; it has 't', 'x'"),
        ("t;y\n1;2\n", "the table has no column 't'; it has 't;y'"),
        ("t,y,t\n1,2,3\n", "the table has 2 columns 't'"),
        ("t,y\n1,2\n3\n", "the table, row 3: 1 cells, where the header has 2"),
        ("t,y\n1,2\n\n3,4,5\n", "the table, row 4: 3 cells, where the header has 2"),
        ("t,y\n1,2\n3,high\n", "the table, row 3, column 'y': 'high' is not a number"),
        ("t,y\n1,1_000\n", "the table, row 2, column 'y': '1_000' is not a number"),
        ("t,y\n1,inf\n", "the table, row 2, column 'y': 'inf' is not finite"),
        ("t,y\nnan,1\n", "the table, row 2, column 't': 'nan' is not finite"),
        ("t,y\n1,1e999\n", "the table, row 2, column 'y': '1e999' is not finite"),
        ("t,y\n,1\n", "the table, row 2, column 't': the cell is empty"),
        ("t,y\nmonday,1\n", "the table, row 2, column 't': 'monday' is not a number or an ISO date"),
        ("t,y\n2024-13-01,1\n", "the table, row 2, column 't': '2024-13-01' is not an ISO date"),
        ("t,y\n1,1\n2024-01-01,1\n", "'2024-01-01' is not a number, as the first time, '1', is"),
        ("t,y\n2024-01-01,1\n1,1\n", "'1' is not a date, as the first time, '2024-01-01', is"),
        ("t,y\n2024-01-01,1\n2024-01-02T00:00Z,1\n", "must both have a time zone or neither"),
        ("t,y\n-1e308,1\n1e308,1\n", "'1e308' is too far from the first time, '-1e308'"),
        (b"t,y\n1,2\n3,\xe9\n", "the table, row 3: not UTF-8 text (byte 0xe9)"),
        ('t,y\n1,"' + "x" * 200_000, "the table, row 2: not CSV text"),
        ("t,y\n1," + "x" * 10_000, "row 2, column 'y': 'xxxxxxxxxxxx...xxxxxxxxxxxxx' is not a number"),
        (",".join(f"column {i}" for i in range(1000)) + "\n", "the table has no column 't'; it has 'column 0'"),
    ],
)
def test_errors_point_at_the_cell(text: str | bytes, message: str) -> None:
    assert message in error(text)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for table in (data, b"t,y\n" + data):
        try:
            found = rows(table)
        except TableError as caught:
            assert "\n" not in str(caught)
        else:
            assert all(math.isfinite(row.time) and (row.target is None or math.isfinite(row.target)) for row in found)


@given(st.lists(st.tuples(st.floats(-1e100, 1e100), st.floats(allow_nan=False, allow_infinity=False)), min_size=1))
def test_written_numbers_are_read_exactly(pairs: list[tuple[float, float]]) -> None:
    found = rows("t,y\n" + "".join(f"{t!r},{y!r}\n" for t, y in pairs))
    assert [(row.time, row.target) for row in found] == [(t - pairs[0][0], y) for t, y in pairs]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table.csv{suffix}"
    data = b"t,y\n1,2\n3,bad\n"
    path.write_bytes(gzip.compress(data) if suffix else data)
    reader = read_rows(path, "t", "y")
    assert next(reader) == Row(2, 0.0, 2.0, "1", "2", None)
    with pytest.raises(TableError, match=rf"table.csv{suffix}, row 3, column 'y'"):
        next(reader)


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv.gz"
    whole = gzip.compress(b"t,y\n" + b"1,2\n" * 1000)
    damaged = bytearray(whole)
    damaged[20] ^= 0xFF
    for data in (whole[: len(whole) // 2], b"t,y\n1,2\n", bytes(damaged)):
        path.write_bytes(data)
        with pytest.raises(TableError, match="not a complete gzip file"):
            list(read_rows(path, "t", "y"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        list(read_rows(tmp_path / "absent", "t", "y"))


def test_a_feed_is_read_line_by_line() -> None:
    """Each row is there as soon as its line is: nothing is read ahead."""
    sent = []

    def feed() -> Iterator[bytes]:
        for line in (b"t,y\n", b"1,2\n", b"2,3\n"):
            sent.append(line)
            yield line

    reader = read_rows(feed(), "t", "y")
    assert (next(reader).time_text, len(sent)) == ("1", 2)
    assert (next(reader).time_text, len(sent)) == ("2", 3)


def test_a_pipe_is_read_line_by_line() -> None:
    incoming, outgoing = os.pipe()
    with open(incoming, "rb") as source, open(outgoing, "wb", buffering=0) as feed:
        reader = read_rows(source, "t", "y")
        feed.write(b"t,y\n1,2\n")
        assert next(reader).time_text == "1"
        feed.write(b"2,")
        feed.write(b"3\n4,5\n")
        assert [next(reader).target, next(reader).target] == [3.0, 5.0]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="tracemalloc")
def test_memory_does_not_grow_with_the_table() -> None:
    lines = (b"t,y\n" if i == 0 else b"%d,%d\n" % (i, i % 7) for i in range(20_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(lines, "t", "y")) == 19_999
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
