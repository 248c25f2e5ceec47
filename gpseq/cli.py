"""The command ``gpseq``: learn a series from a CSV file or a feed, chunk by chunk, and keep the state in a file."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from gpseq import __version__

if TYPE_CHECKING:
    from gpseq.datasets.tables import Row
    from gpseq.stream_run import ChunkReport, Facts, StreamRun
    from gpseq.stream_setup import Options, Span

KERNELS = ("rbf", "matern12", "matern32", "matern52", "rq")
PICTURES = (".png", ".pdf", ".svg")

EPILOG = """\
examples:
  gpseq stream solar.csv --time year --target tsi --chunk 40 --plot solar.png
  gpseq stream load.csv --time stamp --target MW --chunk 1000 --state load.state --out predictions.csv
  tail -n +1 -f feed.csv | gpseq stream - --time t --target y --chunk 10 --warmup 200 --features 64 --state feed.state

Times are numbers, or dates like 2024-01-31 (ISO 8601 with dashes), which are counted in days. Rows whose target is
empty or NaN are not learnt, but predicted. A fraction of the rows (--holdout) is kept from learning, and a sample of
them, 1000 at most, shows how well the whole past is known. If 5000 rows were learnt or fewer, the exact Gaussian
process is computed for comparison.

With --state the run may be stopped at any moment, even by kill -9: the same command goes on after the last complete
chunk, with the result of an uninterrupted run. A file is always read from its start, and rows that were learnt are
recognised and skipped. A feed may be replayed from its start, too, or go on with new rows (below the same header);
its first row tells which.

PREDICTIONS has a line for each row: forecast_mean and forecast_std were computed before its chunk was learnt, mean
and std after it. The standard deviations are those of observations, noise included. A file of that name is replaced
when the first chunk has been learnt, or appended to if the run goes on from a state.
"""


class CommandError(Exception):
    """A command cannot be carried out; the message is for the person at the terminal."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpseq: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``gpseq``.

    Args:
        argv: the arguments; ``None`` takes those of the process.

    Returns:
        The exit status: 0, 2 after an error, 130 after an interrupt, 141 if nobody reads the output any more.

    Example:
        >>> main(["--version"])
        gpseq 0.1.0
        0
    """
    try:
        args = _parser().parse_args(argv)
        _stream(args)
        sys.stdout.flush()
    except SystemExit as end:  # argparse's way to say that it has printed what there is to say
        return int(end.code or 0)
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\ngpseq: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else _one_line(error)
        print(f"gpseq: error: {reason}", file=sys.stderr)
        return 2
    except (CommandError, ValueError, ImportError) as error:
        print(f"gpseq: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpseq", description="Gaussian-process sequences.")
    parser.add_argument("--version", action="version", version=f"gpseq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    stream = commands.add_parser(
        "stream",
        help="learn a series chunk by chunk, in bounded memory",
        description="Learn a series chunk by chunk, in bounded memory, and end where the exact Gaussian process ends.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    data = stream.add_argument_group("the series")
    data.add_argument("data", metavar="DATA", help="a CSV file with a header, perhaps .gz; - reads standard input")
    data.add_argument("--time", metavar="COL", required=True, help="column of times")
    data.add_argument("--target", metavar="COL", required=True, help="column of values")
    cut = data.add_mutually_exclusive_group()
    cut.add_argument("--chunk", metavar="ROWS", type=_count, default=100, help="rows learnt together (100)")
    cut.add_argument("--chunk-by", metavar="COL", help="column whose every new value begins a chunk")
    data.add_argument("--holdout", metavar="FRACTION", type=_fraction, default=0.2, help="rows not learnt (0.2)")
    data.add_argument("--seed", metavar="N", type=int, default=0, help="of the choice of these rows (0)")

    model = stream.add_argument_group("the model")
    model.add_argument("--kernel", choices=KERNELS, default="rbf", help="(rbf)")
    model.add_argument(
        "--warmup",
        metavar="ROWS",
        type=_count,
        help="fit the hyperparameters on so many rows; the first chunk holds at least as many (the first chunk, "
        "500 at most)",
    )
    model.add_argument(
        "--features",
        metavar="N",
        type=_features,
        default="auto",
        help="size of the memory; auto takes what the kernel needs for the file's span or the horizon (auto)",
    )
    model.add_argument(
        "--horizon",
        metavar="H",
        type=_length,
        help="where the memory's basis ends at first, counted from the first row, in the unit of the time column or "
        "in days (the last row of the first chunk)",
    )
    model.add_argument(
        "--horizon-growth",
        metavar="G",
        type=_growth,
        default=1.25,
        help="when rows pass it, stretch the basis by this factor; none: just to the rows; fixed: never (1.25)",
    )

    output = stream.add_argument_group("files and output")
    output.add_argument("--state", metavar="FILE", help="keep the state here after each chunk, and go on from it")
    output.add_argument("--out", metavar="PREDICTIONS", help="write predictions here, as CSV")
    output.add_argument("--plot", metavar="PICTURE", help="draw the result: .png, .pdf or .svg")
    output.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    return parser


def _typed(expected: str, parse: Callable[[str], Any], accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse whose errors say what was expected."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = parse(text)
            if accept(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return convert


_count = _typed("a whole number from 1", int, lambda n: n >= 1)
_fraction = _typed("a fraction from 0 up to 1", float, lambda f: 0 <= f < 1)
_length = _typed("a positive length of time", float, lambda h: 0 < h < math.inf)
_features = _typed(
    "auto or a whole number from 1", lambda t: None if t == "auto" else int(t), lambda n: n is None or n >= 1
)
_growth = _typed(
    "a factor above 1, none or fixed",
    lambda t: {"none": None, "fixed": "fixed"}[t] if t in ("none", "fixed") else float(t),
    lambda g: g in (None, "fixed") or 1 < g < math.inf,
)


# The command


def _stream(args: argparse.Namespace) -> None:
    _check_extra()
    _check_paths(args)
    # Here and not above, so that --help does not wait for torch.
    from gpseq.datasets.tables import read_rows
    from gpseq.plots import save_figure
    from gpseq.stream_run import StreamRun, split
    from gpseq.stream_setup import check_feed

    options = _options(args)
    is_file = os.path.isfile(args.data)
    name = "standard input" if args.data == "-" else args.data
    run = StreamRun.load(args.state) if args.state and os.path.exists(args.state) else None
    if run is not None:
        run.check_options(options, args.state)
        _check_predictions(args.out, run.out_bytes)
    elif not is_file:
        check_feed(options)

    read = partial(
        read_rows,
        time=options.time,
        target=options.target,
        group=options.chunk_by,
        axis=run.axis if run else None,
        name=name,
    )
    span = _survey(read(args.data)) if is_file else None
    with contextlib.closing(_Say(args.quiet, span.rows if span else None)) as say, _warnings_on_one_line(say):
        rows = read(sys.stdin.buffer if args.data == "-" else args.data)
        learnt_before = 0
        if run is not None:
            rows = run.skip_learnt(rows, name, is_file)
            learnt_before = run.chunks
            say(f"{args.state}: {run.rows} rows in {run.chunks} chunks were learnt before")
            say.advance(run.rows)
        for chunk in split(rows, options, is_first=run is None):
            if run is None:
                run = StreamRun.begin(options, chunk, span)
                _say_model(say, run, name)
            report = run.learn(chunk)
            if args.out:
                run.out_bytes = _append(args.out, report.predictions, run.out_bytes)
            if args.state:
                run.save(args.state)
            _say_chunk(say, report, with_header=run.chunks == learnt_before + 1)
            say.advance(len(chunk))
        assert run is not None  # a table without rows is an error
        if run.chunks == learnt_before:
            say("there are no new rows: the run is complete")
        _say_result(say, run)
        if args.plot:
            save_figure(run.figure(os.path.basename(name)), args.plot)


def _options(args: argparse.Namespace) -> Options:
    from gpseq.stream_setup import Options

    return Options(**{field.name: getattr(args, field.name) for field in fields(Options)})


def _survey(rows: Iterator[Row]) -> Span:
    """Read a whole file once: whatever is wrong with it is found before anything is learnt or written."""
    from gpseq.stream_setup import Span

    count, start, end = 0, math.inf, -math.inf
    for row in rows:
        count, start, end = count + 1, min(start, row.time), max(end, row.time)
    return Span(count, start, end)


def _check_extra() -> None:
    missing = [name for name in ("safetensors", "tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"gpseq stream needs {', '.join(missing)}: pip install 'gpseq[cli]'")


def _check_paths(args: argparse.Namespace) -> None:
    """Find out now what would otherwise go wrong when there is something to lose."""
    if args.data != "-" and not os.path.exists(args.data):
        raise CommandError(f"{args.data}: there is no such file")
    taken = {} if args.data == "-" else {os.path.realpath(args.data): "DATA"}
    for option, path in (("--state", args.state), ("--out", args.out), ("--plot", args.plot)):
        if path is None:
            continue
        real = os.path.realpath(path)
        directory = os.path.dirname(real)
        if real in taken:
            raise CommandError(f"{option} {path} is the same file as {taken[real]}")
        if os.path.isdir(real):
            raise CommandError(f"{option} {path} is a directory")
        if not os.path.isdir(directory):
            raise CommandError(f"{option} {path}: there is no directory {directory}")
        if not os.access(directory, os.W_OK) or (os.path.exists(real) and not os.access(real, os.W_OK)):
            raise CommandError(f"{option} {path}: no permission to write")
        taken[real] = option
    if args.plot is not None and not args.plot.lower().endswith(PICTURES):
        raise CommandError(f"--plot {args.plot}: expected a name that ends in {', '.join(PICTURES)}")


def _check_predictions(path: str | None, out_bytes: int | None) -> None:
    """A run that goes on also goes on with its file of predictions, or without one."""
    if (path is None) != (out_bytes is None):
        raise CommandError(
            f"the run was begun {'with' if path is None else 'without'} --out and goes on in the same way"
        )
    if path is not None and out_bytes is not None:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size < out_bytes:
            raise CommandError(f"--out {path} has {size} bytes, but {out_bytes} were written before")


def _append(path: str, lines: str, offset: int | None) -> int:
    """Write predictions at an offset, cut off what a killed run left behind it, and return the new offset.

    Without an offset the file is begun: atomically, in place of one that is there.
    """
    from gpseq.storage import replace_file
    from gpseq.stream_run import PREDICTIONS_HEADER

    if offset is None:
        data = (PREDICTIONS_HEADER + lines).encode()
        replace_file(path, data)
        return len(data)
    try:
        with open(path, "r+b") as file:
            file.truncate(offset)
            file.seek(offset)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:  # which knows the file only if it could not be opened
        raise type(error)(error.errno, error.strerror, path) from error


# What is printed


class _Say:
    """Lines on standard output and, where standard error is a terminal, a progress bar below them."""

    def __init__(self, quiet: bool, total: int | None) -> None:
        self.quiet = quiet
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=" rows", file=sys.stderr, leave=False)

    def __call__(self, line: str = "") -> None:
        if not self.quiet:
            self._write(line, sys.stdout)

    def warn(self, message: str) -> None:
        self._write(f"gpseq: warning: {message}", sys.stderr)

    def advance(self, rows: int) -> None:
        if self.bar is not None:
            self.bar.update(rows)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _write(self, line: str, file: Any) -> None:
        with self.bar.external_write_mode(file) if self.bar is not None else contextlib.nullcontext():
            print(line, file=file, flush=True)


@contextlib.contextmanager
def _warnings_on_one_line(say: _Say) -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        say.warn(_one_line(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _say_model(say: _Say, run: StreamRun, name: str) -> None:
    facts = run.describe()
    say(f"{name}: {run.options.target} by {run.options.time}{' (in days)' if run.axis.is_date else ''}")
    say(
        f"{run.options.kernel} kernel: lengthscale {facts.lengthscale:.4g}, standard deviation {facts.signal:.4g}, "
        f"noise {facts.noise:.4g}"
    )
    say(_memory(facts))


def _memory(facts: Facts) -> str:
    lost = f"{100 * facts.residual:.2g} % of the prior variance"
    return f"memory: {facts.num_features} features hold all but {lost} up to {facts.horizon:.6g}"


def _say_chunk(say: _Say, report: ChunkReport, with_header: bool) -> None:
    wide = max(10, len(report.until))
    if with_header:
        say()
        say(f"{'':{27 + wide}}{'before it is learnt':>23}{'the past, held out':>25}")
        scores = f"{'RMSE':>13}{'NLPD':>10}{'RMSE':>15}{'NLPD':>10}"
        say(f"{'chunk':>5}  {'rows':>17}  {'until':>{wide}} {scores}{'update':>11}")
    rows = f"{report.first_row}-{report.last_row}"
    values = [*report.new, *report.past]
    cells = [_cell(value, width) for value, width in zip(values, (13, 10, 15, 10), strict=True)]
    say(f"{report.number:>5}  {rows:>17}  {report.until:>{wide}} {''.join(cells)}{1e3 * report.seconds:>8.1f} ms")


def _cell(value: float, width: int) -> str:
    return f"{'-' if math.isnan(value) else format(value, '.4f'):>{width}}"


def _say_result(say: _Say, run: StreamRun) -> None:
    facts = run.describe()
    say()
    scores = run.compare()
    if run.held_out.seen:
        say(f"{len(run.held_out.time)} held-out rows{'RMSE':>16}{'NLPD':>12}")
        for method, (error, density) in scores.items():
            say(f"  {method:<20}{error:>12.6g}{density:>12.5f}")
        if "exact GP" in scores:
            difference = [a - b for a, b in zip(scores["stream"], scores["exact GP"], strict=True)]
            say(f"  {'difference':<20}{difference[0]:>+12.1e}{difference[1]:>+12.1e}")
        else:
            say(f"  no exact GP: more than {run.learnt.capacity} rows were learnt")
    say(f"{_memory(facts)}; the data end at {run.end:.6g}")
    if run.empty_rows:
        say(f"{run.empty_rows} rows have no {run.options.target}: predicted, not learnt")
