"""The command: what it writes and prints, what it refuses, and that it leaves everything alone when it does."""

import csv
import gzip
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpseq
from gpseq import cli, metrics, storage, stream_run, stream_setup
from gpseq.datasets import path as bundled
from gpseq.stream_run import StreamRun

SOLAR = str(bundled("solar_lean2004.csv"))
NUM_ROWS = 80

# Of the processes started here: they find this gpseq wherever they run.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gpseq.__file__).parent.parent)}


@pytest.fixture(autouse=True)
def _one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit from all lengthscales is tested once, on the solar series."""
    monkeypatch.setattr(stream_setup, "LENGTHSCALE_STARTS", (0.1,))


def series(times: Any = None, values: Any = None, num_rows: int = NUM_ROWS) -> str:
    """A table of a wave with a little noise, around 1000."""
    noise = torch.randn(num_rows, generator=torch.Generator().manual_seed(1)).tolist()
    times = [i / 4 for i in range(num_rows)] if times is None else times
    values = [1000 + 50 * math.sin(i / 6) + noise[i] for i in range(num_rows)] if values is None else values
    return "t,y\n" + "".join(f"{t},{y}\n" for t, y in zip(times, values, strict=True))


class Command:
    """Runs ``gpseq stream`` in a directory of its own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self.monkeypatch, self.capsys = directory, monkeypatch, capsys
        monkeypatch.chdir(directory)
        self.write("table.csv", series())

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def __call__(self, *options: str, data: str = "table.csv", feed: str | None = None, chunk: str = "20") -> int:
        """Run with the usual options and more; the status. ``feed`` is the text on standard input."""
        if feed is not None:
            self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(feed.encode())))
            data = "-"
        chunks = [] if "--chunk-by" in options else ["--chunk", chunk]
        status = cli.main(["stream", data, "--time", "t", "--target", "y", *chunks, "--features", "24", *options])
        self.out, self.err = self.capsys.readouterr()
        return status

    def refused(self, *options: str, **how: Any) -> str:
        """Run what must fail; the one line of the error. No file may change or appear."""
        before = {path.name: path.read_bytes() for path in self.directory.iterdir() if path.is_file()}
        assert self(*options, **how) == 2
        assert {path.name: path.read_bytes() for path in self.directory.iterdir() if path.is_file()} == before
        assert self.out == "" and self.err.startswith("gpseq: error: ") and self.err.count("\n") == 1
        return self.err.removeprefix("gpseq: error: ").rstrip("\n")


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def predictions(path: str = "out.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> torch.Tensor:
    return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)


# What it does


def test_the_solar_series_ends_where_the_exact_gp_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    argv = ["stream", SOLAR, "--time", "year", "--target", "tsi_11yr_bkgrnd", "--chunk", "40", "--plot", "solar.png"]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    chunks = [line.split() for line in lines if re.match(r" +\d+ +\d+-\d+ ", line)]
    assert [chunk[:3] for chunk in chunks[::9]] == [["1", "1-40", "1649.5"], ["10", "361-391", "2000.5"]]
    assert len(chunks) == 10
    (difference,) = (line.split()[1:] for line in lines if line.strip().startswith("difference"))
    assert all(abs(float(number)) < 1e-3 for number in difference)
    assert (tmp_path / "solar.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_what_the_file_of_predictions_says(stream: Command) -> None:
    assert stream("--out", "out.csv") == 0
    rows = predictions()
    lines = [line.split() for line in stream.out.splitlines() if re.match(r" +\d+ +\d+-\d+ ", line)]
    assert [line[1:3] for line in lines] == [
        ["1-20", "4.75"],
        ["21-40", "9.75"],
        ["41-60", "14.75"],
        ["61-80", "19.75"],
    ]
    assert lines[0][3:5] == ["-", "-"]
    second = [row for row in rows if row["chunk"] == "2"]
    mean, std, target = (column(second, name) for name in ("forecast_mean", "forecast_std", "target"))
    assert lines[1][3:5] == [f"{metrics.rmse(mean, target):.4f}", f"{metrics.nlpd(mean, std**2, target):.4f}"]
    # Of the first chunk, the whole past is the chunk itself.
    held = [row for row in rows if row["chunk"] == "1" and row["role"] == "held out"]
    mean, std, target = (column(held, name) for name in ("mean", "std", "target"))
    assert lines[0][5:7] == [f"{metrics.rmse(mean, target):.4f}", f"{metrics.nlpd(mean, std**2, target):.4f}"]


def test_predictions_are_in_the_units_of_the_file(stream: Command) -> None:
    assert stream("--out", "out.csv") == 0
    rows = predictions()
    given = series().splitlines()[1:]
    assert [f"{row['time']},{row['target']}" for row in rows] == given
    learnt = [row for row in rows if row["role"] == "learnt"]
    assert 0.6 * NUM_ROWS < len(learnt) < NUM_ROWS
    residual = (column(learnt, "mean") - column(learnt, "target")) / column(learnt, "std")
    assert residual.abs().max() < 4 and 0.5 < column(learnt, "std").median() < 2
    assert all(row["forecast_mean"] == "" for row in rows if row["chunk"] == "1")


def test_nothing_leaks_from_held_out_rows_or_the_future(stream: Command) -> None:
    assert stream("--out", "out.csv") == 0
    before = predictions()
    held = {i for i, row in enumerate(before) if row["role"] == "held out"}
    values = [float(row["target"]) for row in before]
    stream.write("table.csv", series(values=[0 if i in held else y for i, y in enumerate(values)]))
    assert stream("--out", "out.csv") == 0
    computed = ("role", "forecast_mean", "forecast_std", "mean", "std")
    assert [[row[name] for name in computed] for row in predictions()] == [[r[n] for n in computed] for r in before]

    stream.write("table.csv", series(values=[-y if i >= 60 else y for i, y in enumerate(values)]))
    assert stream("--out", "out.csv") == 0
    after = predictions()
    assert after[:60] == before[:60]
    assert [row["forecast_mean"] for row in after] == [row["forecast_mean"] for row in before]
    assert all(new["mean"] != old["mean"] for new, old in zip(after[60:], before[60:], strict=True))


def test_the_exact_gp_has_the_same_hyperparameters_and_rows(stream: Command) -> None:
    assert stream("--state", "state") == 0
    scores = StreamRun.load("state").compare()
    assert scores["stream"] == pytest.approx(scores["exact GP"], abs=1e-3)
    assert f"{scores['exact GP'][0]:.6g}" in stream.out and f"{scores['exact GP'][1]:.5f}" in stream.out


def test_above_the_limit_there_is_no_exact_gp(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_run, "MAX_EXACT", 10)
    monkeypatch.setattr(stream_run, "MAX_HELD_OUT", 5)
    assert stream("--state", "state", "--plot", "picture.svg") == 0
    assert "no exact GP: more than 10 rows were learnt" in stream.out and "5 held-out rows" in stream.out
    tensors, _ = storage.load("state")
    assert tensors["learnt.time"].shape == (10,) and tensors["held_out.time"].shape == (5,)


def test_without_holdout_there_is_nothing_to_compare(stream: Command) -> None:
    assert stream("--holdout", "0", "--plot", "picture.png", "--out", "out.csv") == 0
    assert "held-out" not in stream.out and "nan" not in stream.out
    assert {row["role"] for row in predictions()} == {"learnt"}


def test_the_seed_chooses_other_rows(stream: Command) -> None:
    roles = []
    for seed in ("0", "0", "1"):
        assert stream("--out", "out.csv", "--seed", seed) == 0
        roles.append([row["role"] for row in predictions()])
    assert roles[0] == roles[1] != roles[2]


def test_rows_without_a_value_are_predicted(stream: Command) -> None:
    lines = series().splitlines()
    for i in (5, 37, 79, 80):
        lines[i] = lines[i].split(",")[0] + ","
    stream.write("table.csv", "\n".join(lines))
    assert stream("--out", "out.csv") == 0
    empty = [row for row in predictions() if row["role"] == "empty"]
    assert [row["target"] for row in empty] == [""] * 4
    assert (column(empty, "mean") - 1000).abs().max() < 60
    assert "4 rows have no y: predicted, not learnt" in stream.out
    assert [row["chunk"] for row in predictions()][19:22] == ["1", "1", "2"]  # 20 values make a chunk


def test_dates_are_days(stream: Command) -> None:
    days = [f"2024-{1 + i // 28:02}-{1 + i % 28:02}" for i in range(NUM_ROWS)]
    stream.write("table.csv", series(times=days))
    assert stream("--state", "state", "--out", "out.csv", "--plot", "picture.png") == 0
    assert "t (in days)" in stream.out and "2024-03-24" in stream.out
    run = StreamRun.load("state")
    assert run.end == 83.0 and run.axis.is_date
    assert predictions()[3]["time"] == "2024-01-04"


def test_chunks_by_a_column(stream: Command) -> None:
    lines = series().splitlines()
    groups = ["k", *("ab"[i // 10 % 2] for i in range(NUM_ROWS))]
    stream.write("table.csv", "\n".join(f"{line},{group}" for line, group in zip(lines, groups, strict=True)))
    assert stream("--chunk-by", "k", "--warmup", "25", "--out", "out.csv") == 0
    sizes = [[row["chunk"] for row in predictions()].count(str(i)) for i in range(1, 8)]
    assert sizes == [30, 10, 10, 10, 10, 10, 0]


def test_a_compressed_file(stream: Command) -> None:
    (stream.directory / "table.csv.gz").write_bytes(gzip.compress(series().encode()))
    assert stream("--out", "out.csv") == 0
    assert stream("--out", "same.csv", data="table.csv.gz") == 0
    assert Path("same.csv").read_bytes() == Path("out.csv").read_bytes()


def test_auto_features_hold_the_kernel_to_the_end(stream: Command) -> None:
    for growth in ("1.25", "none", "fixed"):
        assert stream("--features", "auto", "--state", growth, "--horizon-growth", growth) == 0
        run = StreamRun.load(growth)
        assert run.features.horizon >= run.end and run.describe().residual < 1e-3
        assert (run.features.horizon == run.end) == (growth != "1.25")


@pytest.mark.parametrize("kernel", sorted(stream_setup.KERNELS))
def test_kernels(stream: Command, kernel: str) -> None:
    assert stream("--kernel", kernel, "--out", "out.csv", chunk="80") == 0
    assert stream.out.splitlines()[1].startswith(f"{kernel} kernel: lengthscale ")


def test_a_memory_that_is_too_small_says_so_on_one_line(stream: Command) -> None:
    assert stream("--features", "4") == 0
    lines = stream.err.splitlines()
    assert lines and all(line.startswith("gpseq: warning: 4 features leave ") for line in lines)


def test_quiet(stream: Command) -> None:
    assert stream("--quiet", "--out", "out.csv") == 0
    assert stream.out == stream.err == "" and len(predictions()) == NUM_ROWS


def test_a_terminal_gets_a_progress_bar(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert stream() == 0
    assert f"{NUM_ROWS}/{NUM_ROWS}" in stream.err and "difference" in stream.out and "\r" not in stream.out


# Feeds


def test_a_feed_gives_the_result_of_a_file(stream: Command) -> None:
    assert stream("--out", "file.csv") == 0
    assert stream("--out", "feed.csv", feed=series()) == 0
    assert "standard input: y by t" in stream.out
    assert Path("feed.csv").read_bytes() == Path("file.csv").read_bytes()


def test_a_feed_is_learnt_as_it_comes(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is written and committed before the next line is asked for."""
    lines = series().encode().splitlines(keepends=True)

    def feed() -> Any:
        for number, line in enumerate(lines):
            if number > 21:
                assert len(predictions()) == (number - 2) // 20 * 20
            yield line

    monkeypatch.setattr(sys, "stdin", type("Feed", (), {"buffer": feed()}))
    assert stream("--out", "out.csv", data="-") == 0
    assert len(predictions()) == NUM_ROWS


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "new rows"])
def test_a_feed_is_resumed(stream: Command, replayed: bool) -> None:
    assert stream("--state", "whole", "--out", "whole.csv", feed=series()) == 0
    header, *lines = series().splitlines(keepends=True)
    assert stream("--state", "state", "--out", "out.csv", feed=header + "".join(lines[:40])) == 0
    assert stream("--state", "state", "--out", "out.csv", feed=header + "".join(lines if replayed else lines[40:])) == 0
    assert "state: 40 rows in 2 chunks were learnt before" in stream.out
    assert Path("state").read_bytes() == Path("whole").read_bytes()
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--features", "auto"],
            "--features auto must know how long the feed will be: give --horizon, or --features N",
        ),
        (["--horizon-growth", "fixed"], "--horizon-growth fixed must know how long the feed will be: give --horizon"),
    ],
)
def test_a_feed_without_an_end(stream: Command, options: list[str], message: str) -> None:
    assert stream.refused(*options, feed="not even read") == message


def test_a_feed_with_a_horizon(stream: Command) -> None:
    options = ["--features", "auto", "--horizon-growth", "fixed", "--horizon", "20"]
    assert stream(*options, "--state", "state", feed=series()) == 0
    assert StreamRun.load("state").features.horizon == 20
    stream.write("state", "")
    Path("state").unlink()
    assert stream(*options[:-1], "15", "--state", "state", feed=series()) == 2
    assert "fixed at 15" in stream.err and StreamRun.load("state").rows == 60  # what came before is kept


# Going on


def test_a_complete_run_makes_its_outputs_again(stream: Command) -> None:
    options = ["--state", "state", "--out", "out.csv", "--plot", "picture.png"]
    assert stream(*options) == 0
    report = stream.out.splitlines()[-6:]
    files = {name: Path(name).read_bytes() for name in ("state", "out.csv", "picture.png")}
    Path("picture.png").unlink()
    assert stream(*options) == 0
    assert "there are no new rows: the run is complete" in stream.out
    assert stream.out.splitlines()[-6:] == report
    assert {name: Path(name).read_bytes() for name in files} == files


def test_a_file_that_has_grown_is_learnt_to_its_end(stream: Command) -> None:
    assert stream("--state", "state", "--out", "out.csv") == 0
    stream.write("table.csv", series(num_rows=NUM_ROWS + 20, times=None))
    stream.write("table.csv", series() + "20,1000\n20.25,1001\n")
    assert stream("--state", "state", "--out", "out.csv") == 0
    assert StreamRun.load("state").rows == len(predictions()) == NUM_ROWS + 2


def test_what_a_killed_run_left_behind_its_state_is_cut_off(stream: Command) -> None:
    options = ["--state", "state", "--out", "out.csv"]
    assert stream(*options) == 0
    whole = Path("out.csv").read_bytes()
    Path("state").unlink()
    stream.write("table.csv", "".join(series().splitlines(keepends=True)[:41]))
    assert stream(*options) == 0
    with open("out.csv", "ab") as file:
        file.write(b"10.0,1003.1,3,lear")
    stream.write("table.csv", series())
    assert stream(*options) == 0
    assert Path("out.csv").read_bytes() == whole


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--kernel", "rq", "--kernel is rq, but state was begun with rbf"),
        ("--chunk", "21", "--chunk is 21, but state was begun with 20"),
        ("--features", "25", "--features is 25, but state was begun with 24"),
        ("--features", "auto", "--features is auto, but state was begun with 24"),
        ("--horizon", "30", "--horizon is 30.0, but state was begun with not given"),
        ("--horizon-growth", "none", "--horizon-growth is none, but state was begun with 1.25"),
        ("--warmup", "15", "--warmup is 15, but state was begun with not given"),
        ("--holdout", "0.1", "--holdout is 0.1, but state was begun with 0.2"),
        ("--seed", "1", "--seed is 1, but state was begun with 0"),
        ("--target", "t", "--target is t, but state was begun with y"),
        ("--time", "y", "--time is y, but state was begun with t"),
    ],
)
def test_other_options_are_refused(stream: Command, option: str, value: str, message: str) -> None:
    assert stream("--state", "state") == 0
    assert stream.refused("--state", "state", option, value) == message


def test_a_file_that_has_changed_is_refused(stream: Command) -> None:
    assert stream("--state", "state", "--out", "out.csv") == 0
    lines = series().splitlines(keepends=True)
    for change, message in (
        (["t,y\n", "0.0,1\n", *lines[2:]], "row 2 of table.csv is not the row that the run began with"),
        (
            [*lines[:30], "7.25,1\n", *lines[31:]],
            "the first 80 rows of table.csv are not those that were learnt before",
        ),
        (lines[:50], "table.csv ends after 49 rows, but 80 were learnt before"),
    ):
        stream.write("table.csv", "".join(change))
        assert stream.refused("--state", "state", "--out", "out.csv") == message
    feed = "".join([*lines[:30], "7.25,1\n", *lines[31:]])
    assert "the first 80 rows of standard input are not" in stream.refused(
        "--state", "state", "--out", "out.csv", feed=feed
    )


def test_predictions_that_are_gone_are_refused(stream: Command) -> None:
    assert stream("--state", "state", "--out", "out.csv") == 0
    size = Path("out.csv").stat().st_size
    assert stream.refused("--state", "state") == "the run was begun with --out and goes on in the same way"
    stream.write("out.csv", "short")
    message = f"--out out.csv has 5 bytes, but {size} were written before"
    assert stream.refused("--state", "state", "--out", "out.csv") == message
    Path("state").unlink()
    assert stream("--state", "state") == 0
    message = "the run was begun without --out and goes on in the same way"
    assert stream.refused("--state", "state", "--out", "out.csv") == message


# What it refuses


def test_a_state_that_is_none(stream: Command) -> None:
    assert stream("--state", "state") == 0
    whole = Path("state").read_bytes()
    for data, message in (
        (b"", "state is empty"),
        (b"t,y\n1,2\n", "state is not a file of gpseq"),
        (whole[: len(whole) // 2], "state is damaged or truncated"),
        (whole[:-5] + b"\x01" + whole[-4:], "state is damaged or truncated"),
    ):
        Path("state").write_bytes(data)
        assert stream.refused("--state", "state", "--out", "out.csv").startswith(message)
    storage.save("state", {"a": torch.ones(1)})
    assert "not the state of a stream" in stream.refused("--state", "state")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "table.csv is empty"),
        ("t,y\n", "table.csv has a header and no rows"),
        ("t,x\n1,2\n", "table.csv has no column 'y'; it has 't', 'x'"),
        (series() + "99,high\n", "table.csv, row 82, column 'y': 'high' is not a number"),
        (series() + "99,1,2\n", "table.csv, row 82: 3 cells, where the header has 2"),
        (series() + "99,inf\n", "table.csv, row 82, column 'y': 'inf' is not finite"),
        (series() + "never,1\n", "table.csv, row 82, column 't': 'never' is not a number or an ISO date"),
        (series(num_rows=9), "hyperparameters need 10 learnt rows at least; the first 9 rows with a value hold "),
        (series(values=[7] * NUM_ROWS), "column 'y' is constant over the 17 warm-up rows: try a larger --warmup"),
        (series(times=[7] * NUM_ROWS), "column 't' is constant over the 17 warm-up rows: try a larger --warmup"),
        (series(values=[""] * NUM_ROWS), "hyperparameters need 10 learnt rows at least; the first 0 rows"),
    ],
)
def test_tables_that_cannot_be_learnt(stream: Command, table: str, message: str) -> None:
    stream.write("table.csv", table)
    stream.write("out.csv", "precious")
    stream.write("picture.png", "precious")
    assert stream.refused("--state", "state", "--out", "out.csv", "--plot", "picture.png").startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk", "0"], "argument --chunk: expected a whole number from 1, got '0'"),
        (["--features", "many"], "argument --features: expected auto or a whole number from 1, got 'many'"),
        (["--holdout", "1"], "argument --holdout: expected a fraction from 0 up to 1, got '1'"),
        (["--horizon", "nan"], "argument --horizon: expected a positive length of time, got 'nan'"),
        (["--horizon-growth", "1"], "argument --horizon-growth: expected a factor above 1, none or fixed, got '1'"),
        (["--kernel", "cubic"], "argument --kernel: invalid choice: 'cubic'"),
        (["--chunk-by", "y", "--chunk", "3"], "argument --chunk: not allowed with argument --chunk-by"),
        (["--state", "table.csv"], "--state table.csv is the same file as DATA"),
        (["--out", "a", "--plot", "./a"], "--plot ./a is the same file as --out"),
        (["--out", "nowhere/out.csv"], "--out nowhere/out.csv: there is no directory "),
        (["--plot", "."], "--plot . is a directory"),
        (["--plot", "picture.bmp"], "--plot picture.bmp: expected a name that ends in .png, .pdf, .svg"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_options_that_make_no_sense(stream: Command, options: list[str], message: str) -> None:
    assert stream.refused(*options).startswith(message)


def test_a_missing_table(stream: Command) -> None:
    message = "absent.csv: there is no such file"
    assert stream.refused("--out", "out.csv", "--features", "auto", data="absent.csv") == message


def test_a_table_that_cannot_be_opened(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gpseq.datasets.tables._open", refuse)
    assert stream.refused("--out", "out.csv") == "table.csv: Permission denied"


def test_a_place_without_permission(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert stream.refused("--out", "out.csv") == "--out out.csv: no permission to write"


def test_a_kernel_that_needs_too_much(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_setup, "MAX_AUTO", 16)
    message = stream.refused("--kernel", "matern12", "--features", "auto", "--out", "out.csv")
    assert message.startswith("--features auto: 16 features leave ") and message.endswith("Or choose --features N")


def test_without_the_extra_one_line_says_what_to_install(stream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    assert stream.refused() == "gpseq stream needs tqdm: pip install 'gpseq[cli]'"


# How it ends


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_an_interrupted_run_goes_on(
    stream: Command, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], status: int
) -> None:
    options = ["--state", "state", "--out", "out.csv"]
    assert stream(*options) == 0
    whole = [Path(name).read_bytes() for name in ("state", "out.csv")]
    Path("state").unlink()

    def interrupted(save: Callable[..., None]) -> Callable[..., None]:
        def save_once(run: StreamRun, path: str) -> None:
            if run.chunks == 3:
                raise error
            save(run, path)

        return save_once

    with monkeypatch.context() as patch:
        patch.setattr(StreamRun, "save", interrupted(StreamRun.save))
        assert stream(*options) == status
    assert "Traceback" not in stream.err
    assert stream(*options) == 0
    assert [Path(name).read_bytes() for name in ("state", "out.csv")] == whole


def test_a_reader_that_goes_away(stream: Command) -> None:
    command = f"{sys.executable} -m gpseq stream table.csv --time t --target y --chunk 20 --features 24 | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == "table.csv: y by t\n" and done.stderr == ""


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, gpseq.cli as c; status = c.main(['stream', '--help']); sys.exit('torch' in sys.modules or status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "examples:\n  gpseq stream solar.csv --time year" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpseq {gpseq.__version__}\n"


def test_the_choices_of_kernels_are_those_that_there_are() -> None:
    assert set(cli.KERNELS) == set(stream_setup.KERNELS)
