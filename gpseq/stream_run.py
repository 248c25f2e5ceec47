"""A run of ``gpseq stream``: a series learnt chunk by chunk, in bounded memory, resumable after every chunk.

Nothing here prints, reads tables or parses arguments; :mod:`gpseq.cli` does. Targets are standardised inside the model,
with the mean and standard deviation of the warm-up rows; everything that leaves this module is in original units.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpseq import plots, storage
from gpseq.datasets.tables import Row, TimeAxis
from gpseq.features import HippoFeatures
from gpseq.metrics import nlpd, rmse
from gpseq.models import StreamingGP
from gpseq.sampling import Sample, is_held_out, row_key
from gpseq.stream_setup import (
    MAX_WARMUP,
    MIN_WARMUP,
    Options,
    RunError,
    Span,
    exact_posterior,
    fit,
    make_features,
    new_model,
    new_modules,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Held-out rows on which the whole past is scored, at most.
MAX_HELD_OUT = 1000
#: Learnt rows for which the exact GP is computed, at most.
MAX_EXACT = 5000
#: Chunks whose errors are followed one by one for the picture, at most.
MAX_FOLLOWED = 100
#: Times at which the picture shows the posterior.
GRID = 1000
#: First line of a file of predictions.
PREDICTIONS_HEADER = "time,target,chunk,role,forecast_mean,forecast_std,mean,std\n"

# What a state file holds beside the model and the options.
_KIND = "stream run 1"
_NUMBERS = ("mean", "std", "rows", "empty_rows", "chunks", "end", "first_digest", "digest", "out_bytes")
_TENSORS = ("borders", "past_errors")
_SAMPLES = ("held_out", "learnt")
_COLUMNS = ("key", "time", "target", "chunk")


@dataclass(frozen=True)
class ChunkReport:
    """What learning one chunk showed.

    Attributes:
        number: of the chunk, from 1.
        first_row: of the chunk, from 1, the header not counted.
        last_row: of the chunk.
        until: time of the last row, as it stands in the file.
        new: RMSE and NLPD of the chunk's rows, predicted before any of them was learnt; NaN for the first chunk.
        past: RMSE and NLPD of held-out rows of the whole past, after the chunk was learnt.
        seconds: that the update took.
        predictions: a line for each row, for the file of predictions.
    """

    number: int
    first_row: int
    last_row: int
    until: str
    new: tuple[float, float]
    past: tuple[float, float]
    seconds: float
    predictions: str


@dataclass(frozen=True)
class Facts:
    """A model in numbers that a person can read.

    Attributes:
        lengthscale: of the kernel, in the unit of the times.
        signal: standard deviation of the function, in the unit of the target.
        noise: standard deviation of the noise, in the unit of the target.
        num_features: size of the memory.
        horizon: where its basis ends now, since the first row.
        residual: fraction of the prior variance that the memory cannot hold, averaged over the horizon.
    """

    lengthscale: float
    signal: float
    noise: float
    num_features: int
    horizon: float
    residual: float


class StreamRun:
    """A run between two chunks.

    Make one with :meth:`begin` or :meth:`load`; :meth:`learn` takes it forward by a chunk, :meth:`save` writes it
    down. What a loaded run does from there on is, bit for bit, what it would have done without the interruption.

    Attributes:
        options: what decides the result.
        axis: the scale of the times.
        model: the GP, over standardised targets.
        mean: of the warm-up targets.
        std: of the warm-up targets.
        rows: rows dealt with, those without a value included.
        empty_rows: of them, those without a value.
        chunks: number of chunks learnt.
        end: last time seen, since the first row.
        held_out: sample of the rows that were not learnt.
        learnt: sample of those that were.
        out_bytes: length of the file of predictions, or ``None`` if there is none.
    """

    def __init__(self, options: Options, axis: TimeAxis, model: StreamingGP) -> None:
        self.options, self.axis, self.model = options, axis, model
        self.mean, self.std = 0.0, 1.0
        self.rows = self.empty_rows = self.chunks = 0
        self.end = -math.inf
        self.held_out, self.learnt = Sample.empty(MAX_HELD_OUT), Sample.empty(MAX_EXACT)
        self.out_bytes: int | None = None
        # Of the rows: of the first one, and of all so far.
        self.first_digest = self.digest = ""
        # Of the first MAX_FOLLOWED chunks: when they begin, and the RMSE on chunk c after chunk s in [s, c].
        self.borders = torch.zeros(0, dtype=torch.float64)
        self.past_errors = torch.zeros(0, 0, dtype=torch.float64)

    @classmethod
    def begin(cls, options: Options, rows: list[Row], span: Span | None) -> StreamRun:
        """Fit the hyperparameters on the first rows of the first chunk, and size the memory.

        Args:
            options: what decides the result.
            rows: the first chunk.
            span: of the file, if it is one; ``None`` for a feed.

        Returns:
            A run that has learnt nothing yet.

        Raises:
            RunError: the rows do not suffice, or no memory does.
        """
        observed = [(number, row) for number, row in enumerate(rows) if row.target is not None]
        observed = observed[: options.warmup or MAX_WARMUP]
        warmup = [row for number, row in observed if not is_held_out(row_key(number, options.seed), options.holdout)]
        x, y = _times(warmup), _targets(warmup)
        if len(x) < MIN_WARMUP:
            raise RunError(
                f"hyperparameters need {MIN_WARMUP} learnt rows at least; the first {len(observed)} rows with a value "
                f"hold {len(x)}: try a larger --warmup"
            )
        for column, values in ((options.time, x), (options.target, y)):
            if values.min() == values.max():
                raise RunError(f"column {column!r} is constant over the {len(x)} warm-up rows: try a larger --warmup")

        mean, std = y.mean().item(), y.std().item()
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise RunError(f"column {options.target!r} is too large, or varies too little, for float64 arithmetic")
        kernel, likelihood = fit(options.kernel, x, (y - mean) / std)
        features = make_features(options, kernel, likelihood.noise.item(), [row.time for row in rows], span)
        model = new_model(features, kernel, likelihood, options.horizon_growth)
        run = cls(options, TimeAxis(rows[0].time_text), model)
        run.mean, run.std = mean, std
        run.first_digest = _chain("", rows[0])
        return run

    @property
    def features(self) -> HippoFeatures:
        """The memory's basis as it is now."""
        assert isinstance(self.model.features, HippoFeatures)
        return self.model.features

    # Learning and predicting

    def learn(self, rows: list[Row]) -> ChunkReport:
        """Predict a chunk, learn it, and look at the past.

        Args:
            rows: the chunk; rows without a value are predicted, too.

        Returns:
            What it showed.

        Raises:
            RunError: float64 cannot hold what the rows ask for.
        """
        try:
            return self._learn(rows)
        except RuntimeError as error:  # of linear algebra
            raise RunError(f"the rows up to {rows[-1].time_text} cannot be learnt: {error}") from error

    def _learn(self, rows: list[Row]) -> ChunkReport:
        x, y = _times(rows), _targets(rows)
        observed = ~y.isnan()
        keys = [row_key(self.rows + i, self.options.seed) for i in range(len(rows))]
        held = torch.tensor([is_held_out(key, self.options.holdout) for key in keys]) & observed
        train = observed & ~held

        forecast = self.predict(x) if self.chunks else torch.full((2, len(x)), math.nan, dtype=torch.float64)
        begun = time.perf_counter()
        self.model.update(x[train], (y[train] - self.mean) / self.std)
        seconds = time.perf_counter() - begun
        after = self.predict(x)

        key = torch.tensor(keys)
        self.held_out = self.held_out.add(key[held], x[held], y[held], self.chunks)
        self.learnt = self.learnt.add(key[train], x[train], y[train], self.chunks)
        past = self.predict(self.held_out.time)
        if self.chunks < MAX_FOLLOWED:
            self._follow(x[0], past[0])
        roles = ["held out" if h else "learnt" if o else "empty" for h, o in zip(held, observed, strict=True)]
        report = ChunkReport(
            number=self.chunks + 1,
            first_row=self.rows + 1,
            last_row=self.rows + len(rows),
            until=rows[-1].time_text,
            new=_scores(forecast[:, observed], y[observed]),
            past=_scores(past, self.held_out.target),
            seconds=seconds,
            predictions=_prediction_lines(rows, self.chunks + 1, roles, forecast, after),
        )
        self.chunks += 1
        self.rows += len(rows)
        self.empty_rows += roles.count("empty")
        self.end = max(self.end, x.max().item())
        for row in rows:
            self.digest = _chain(self.digest, row)
        return report

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Mean and variance of observations.

        Args:
            x: ``(n,)`` times since the first row.

        Returns:
            ``(2, n)`` in original units; the variance contains the noise.
        """
        if not len(x):
            return torch.zeros(2, 0, dtype=torch.float64)
        posterior = self.model.likelihood(self.model(x))
        return torch.stack([self.mean + self.std * posterior.mean, self.std**2 * posterior.variance])

    def predict_exact(self, x: Tensor) -> Tensor | None:
        """The same from the exact GP on all learnt rows, with the same hyperparameters.

        Args:
            x: ``(n,)`` times since the first row.

        Returns:
            ``(2, n)``, or ``None`` if more than ``MAX_EXACT`` rows were learnt.
        """
        if not self.learnt.is_complete:
            return None
        mean, variance = exact_posterior(self.model, self.learnt.time, (self.learnt.target - self.mean) / self.std, x)
        return torch.stack([self.mean + self.std * mean, self.std**2 * variance])

    def _follow(self, border: Tensor, past_mean: Tensor) -> None:
        """Note when a chunk begins and what it did to the error on each chunk before it."""
        squared = (past_mean - self.held_out.target).square()
        total = torch.zeros(self.chunks + 1, dtype=torch.float64).index_add(0, self.held_out.chunk, squared)
        count = self.held_out.chunk.bincount(minlength=self.chunks + 1)
        grown = torch.full((self.chunks + 1, self.chunks + 1), math.nan, dtype=torch.float64)
        grown[:-1, :-1], grown[-1] = self.past_errors, (total / count).sqrt()
        self.past_errors = grown
        self.borders = torch.cat([self.borders, border.reshape(1)])

    # Looking back

    def compare(self) -> dict[str, tuple[float, float]]:
        """RMSE and NLPD on the held-out rows: of the stream and, where it can be computed, of the exact GP."""
        result = {"stream": _scores(self.predict(self.held_out.time), self.held_out.target)}
        exact = self.predict_exact(self.held_out.time)
        if exact is not None:
            result["exact GP"] = _scores(exact, self.held_out.target)
        return result

    def describe(self) -> Facts:
        """The model in numbers."""
        kernel = self.model.covar_module
        return Facts(
            lengthscale=kernel.base_kernel.lengthscale.item(),
            signal=self.std * kernel.outputscale.sqrt().item(),
            noise=self.std * self.model.likelihood.noise.sqrt().item(),
            num_features=self.features.num_features,
            horizon=self.features.horizon,
            residual=self.model.residual_variance().item(),
        )

    def figure(self, title: str) -> Figure:
        """A picture of the run: data and posterior, the exact GP beneath, and below them the error on each past chunk.

        Args:
            title: of the picture.
        """
        followed = self.chunks <= MAX_FOLLOWED and not self.past_errors.isnan().all()
        figure = plots.new_figure(height=6.5 if followed else 4.0)
        ratios = [3, 2] if followed else [3]
        axes = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
        grid = torch.linspace(self.features.start, self.end, GRID, dtype=torch.float64)
        mean, variance = self.predict(grid)
        exact = self.predict_exact(grid)
        learnt, held_out = self.learnt, self.held_out
        plots.plot_stream(
            axes[0],
            self._as_in_file(torch.cat([learnt.time, held_out.time])),
            torch.cat([learnt.target, held_out.target]),
            self._as_in_file(grid),
            mean,
            variance.sqrt(),
            held_out=torch.arange(len(learnt.time) + len(held_out.time)) >= len(learnt.time),
            borders=self._as_in_file(self.borders[1:]) if self.chunks <= MAX_FOLLOWED else (),
            exact_mean=None if exact is None else exact[0],
            label=f"{self.features.num_features} features",
            time_label=self.options.time,
            target_label=self.options.target,
        )
        axes[0].set_title(title, loc="left", fontsize=10)
        if followed:
            plots.plot_past_errors(axes[1], {"": self.past_errors}, "RMSE, held-out rows")
        return figure

    def _as_in_file(self, times: Tensor) -> list[Any]:
        """Times as they stand in the file: numbers, or dates."""
        return [self.axis.value(time) for time in times.tolist()]

    # Stopping and going on

    def save(self, path: str) -> None:
        """Write the run down, atomically."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {name: getattr(self, name) for name in _TENSORS}
        for name in _SAMPLES:
            tensors |= {f"{name}.{column}": getattr(getattr(self, name), column) for column in _COLUMNS}
        metadata = {name: getattr(self, name) for name in _NUMBERS} | {
            "kind": _KIND,
            "options": asdict(self.options),
            "origin": self.axis.origin,
            "num_features": self.features.num_features,
            "seen": {name: getattr(self, name).seen for name in _SAMPLES},
        }
        storage.save(path, tensors, metadata)

    @classmethod
    def load(cls, path: str) -> StreamRun:
        """Read what :meth:`save` wrote.

        Raises:
            StorageError: the file is something else, or damaged.
        """
        tensors, metadata = storage.load(path)
        problem = f"{path} is a file of gpseq, but not the state of a stream that it can go on with."
        if metadata.get("kind") != _KIND:
            raise storage.StorageError(problem)
        try:
            return cls._restored(tensors, metadata)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # of another version
            raise storage.StorageError(problem) from error

    @classmethod
    def _restored(cls, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> StreamRun:
        options = Options(**metadata["options"])
        features = HippoFeatures(metadata["num_features"], horizon=1.0)  # the interval comes with the model's state
        model = new_model(features, *new_modules(options.kernel), options.horizon_growth)
        prefix = "model."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        run = cls(options, TimeAxis(metadata["origin"]), model)
        for name in _NUMBERS:
            setattr(run, name, metadata[name])
        for name in _TENSORS:
            setattr(run, name, tensors[name])
        for name in _SAMPLES:
            columns = (tensors[f"{name}.{column}"] for column in _COLUMNS)
            setattr(run, name, Sample(getattr(run, name).capacity, metadata["seen"][name], *columns))
        return run

    def check_options(self, options: Options, path: str) -> None:
        """Refuse to go on with other options than those with which the run began.

        Args:
            options: of now.
            path: of the state, for the message.

        Raises:
            RunError: names the first option that differs.
        """
        for field in fields(Options):
            now, then = getattr(options, field.name), getattr(self.options, field.name)
            if now != then:
                option = "--" + field.name.replace("_", "-")
                words = {None: {"features": "auto", "horizon_growth": "none"}.get(field.name, "not given")}
                raise RunError(f"{option} is {words.get(now, now)}, but {path} was begun with {words.get(then, then)}")

    def skip_learnt(self, rows: Iterator[Row], name: str, is_file: bool) -> Iterator[Row]:
        """Find the first row that is new.

        A feed is replayed from its first row or goes on with new ones; which of the two, the content of its first row
        tells. A file is always read from its first row.

        Args:
            rows: of the file or feed, from its beginning.
            name: what to call it.
            is_file: whether it must begin with the rows that were learnt.

        Returns:
            The rows that were not learnt yet.

        Raises:
            RunError: it does not begin with the rows that were learnt.
        """
        first = next(rows)
        digest = _chain("", first)
        if digest != self.first_digest:
            if is_file:
                raise RunError(f"row {first.line} of {name} is not the row that the run began with")
            return _prepend(first, rows)
        for count in range(1, self.rows):
            row = next(rows, None)
            if row is None:
                raise RunError(f"{name} ends after {count} rows, but {self.rows} were learnt before")
            digest = _chain(digest, row)
        if digest != self.digest:
            raise RunError(f"the first {self.rows} rows of {name} are not those that were learnt before")
        return rows


def split(rows: Iterable[Row], options: Options, is_first: bool) -> Iterator[list[Row]]:
    """Cut a series into chunks.

    Rows without a value do not count, but belong to a chunk. The last chunk may be short.

    Args:
        rows: the series.
        options: ``chunk`` or ``chunk_by``; the first chunk holds at least ``warmup`` rows.
        is_first: whether the series is at its beginning.

    Yields:
        The chunks.

    Example:
        >>> rows = [Row(line, float(line), 0.0, "", "", None) for line in range(2, 7)]
        >>> [len(chunk) for chunk in split(rows, Options("t", "y", chunk=2), is_first=True)]
        [2, 2, 1]
    """
    chunk: list[Row] = []
    size, at_least = 0, (options.warmup or 0) if is_first else 0
    for row in rows:
        full = size >= options.chunk if options.chunk_by is None else chunk and row.group != chunk[-1].group
        if full and size >= at_least:
            yield chunk
            chunk, size, at_least = [], 0, 0
        chunk.append(row)
        size += row.target is not None
    if chunk:
        yield chunk


def _chain(digest: str, row: Row) -> str:
    """Digest of the rows so far and one more: of what stands in their cells, and of nothing else in the file."""
    cells = "\0".join([digest, row.time_text, row.target_text, row.group or ""])
    return hashlib.sha256(cells.encode()).hexdigest()


def _prepend(first: Row, rows: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rows


def _times(rows: list[Row]) -> Tensor:
    return torch.tensor([row.time for row in rows], dtype=torch.float64)


def _targets(rows: list[Row]) -> Tensor:
    """Targets, NaN where there is none."""
    return torch.tensor([math.nan if row.target is None else row.target for row in rows], dtype=torch.float64)


def _scores(prediction: Tensor, target: Tensor) -> tuple[float, float]:
    """RMSE and NLPD of means and variances ``(2, n)``."""
    mean, variance = prediction
    return rmse(mean, target).item(), nlpd(mean, variance, target).item()


def _prediction_lines(rows: list[Row], chunk: int, roles: list[str], forecast: Tensor, after: Tensor) -> str:
    """A line for each row: its cells as they were read, and what was predicted before and after it was learnt."""
    numbers = torch.stack([forecast[0], forecast[1].sqrt(), after[0], after[1].sqrt()], dim=1).tolist()
    lines = []
    for row, role, values in zip(rows, roles, numbers, strict=True):
        cells = [row.time_text, row.target_text, str(chunk), role, *("" if math.isnan(v) else repr(v) for v in values)]
        lines.append(",".join(cells) + "\n")
    return "".join(lines)
