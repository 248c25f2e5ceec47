"""Bad days: a disk that fills up, a clock that goes backwards, bursts of NaN, Ctrl-C at any line, files with a trap.

What is damaged byte by byte is in test_storage.py and test_training.py, what is killed in test_kills.py.
"""

import ast
import copy
import errno
import gc
import gzip
import io
import itertools
import math
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gpseq
from gpseq import cli, storage, stream_setup, training
from gpseq.datasets import load_blimp, load_images
from gpseq.features import HippoFeatures
from gpseq.models import SpaceTimeStreamingGP, StreamingEnsemble, StreamingFleet, StreamingGP
from gpseq.propagation.streamlined import Streamlined
from gpseq.reconfiguration import Distiller
from gpseq.storage import StorageError
from gpseq.stream_run import StreamRun
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_close, assert_identical, draw, gpytorch_kernel, snapshot, stream

NAN = math.nan
AT = torch.linspace(0, 10, 21, dtype=F64)


# The command, with a state on disk

NUM_ROWS, CHUNK = 60, 15
HEADER = "t,y\n"


def rows(times: Any = None) -> list[str]:
    """Lines of a wave with a little noise."""
    noise = torch.randn(NUM_ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    times = [i / 4 for i in range(NUM_ROWS)] if times is None else times
    return [f"{t},{50 * math.sin(t * 0.7) + noise[i]}\n" for i, t in enumerate(times)]


OPTIONS = ["--time", "t", "--target", "y", "--chunk", str(CHUNK), "--features", "20"]
FILES = ["--state", "state", "--out", "out.csv"]


class Command:
    """Runs ``gpseq stream`` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *options: str, feed: list[str] | None = None) -> int:
        data = "table.csv"
        if feed is not None:
            data, lines = "-", HEADER + "".join(feed)
            self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        status = cli.main(["stream", data, *OPTIONS, *options])
        self.out, self.err = self.capsys.readouterr()
        return status

    @property
    def committed(self) -> int:
        """Chunks that it has reported."""
        return sum(line[:5].strip().isdigit() for line in self.out.splitlines())

    def failed_with(self, message: str) -> None:
        """The one line of the error."""
        assert self.err == f"gpseq: error: {message}\n"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setattr(stream_setup, "LENGTHSCALE_STARTS", (0.1,))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text(HEADER + "".join(rows()))
    return Command(monkeypatch, capsys)


def result() -> list[bytes | None]:
    """State and predictions, as far as they are there."""
    return [Path(name).read_bytes() if Path(name).exists() else None for name in ("state", "out.csv")]


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> list[list[bytes | None]]:
    """State and predictions of an undisturbed run: before it, and after each of its chunks."""
    found: list[list[bytes | None]] = [[None, None]]
    save, directory = StreamRun.save, tmp_path_factory.mktemp("undisturbed")

    def noted(run: StreamRun, path: str) -> None:
        save(run, path)
        found.append(result())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_setup, "LENGTHSCALE_STARTS", (0.1,))
        patch.setattr(StreamRun, "save", noted)
        patch.chdir(directory)
        Path("table.csv").write_text(HEADER + "".join(rows()))
        assert cli.main(["stream", "table.csv", *OPTIONS, *FILES]) == 0
    assert len(found) == 1 + NUM_ROWS // CHUNK
    return found


def check_stopped(command: Command, commits: list[list[bytes | None]]) -> None:
    """The state is that of the last chunk that was reported, and nothing of its predictions is lost."""
    state, out = result()
    expected_state, expected_out = commits[command.committed]
    assert state == expected_state
    assert (out or b"").startswith(expected_out or b"")


def check_goes_on(command: Command, commits: list[list[bytes | None]]) -> None:
    assert command(*FILES) == 0
    assert result() == commits[-1]
    assert sorted(path.name for path in Path().iterdir()) == ["out.csv", "state", "table.csv"]


@contextmanager
def failing_from(patch: pytest.MonkeyPatch, name: str, number: int, code: int) -> Iterator[list[int]]:
    """From its n-th call on a file, 0 the first, ``os.fsync`` or ``os.replace`` fails; yields the count of calls."""
    real, calls = getattr(os, name), [0]

    def call(*args: Any) -> Any:
        if name == "fsync" and not stat.S_ISREG(os.fstat(args[0]).st_mode):
            return real(*args)
        calls[0] += 1
        if calls[0] > number:
            raise OSError(code, os.strerror(code))
        return real(*args)

    with patch.context() as inner:
        inner.setattr(os, name, call)
        yield calls


@pytest.mark.parametrize(("name", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_disk_that_fails_at_any_step_of_a_run(
    command: Command, commits: list[list[bytes | None]], name: str, code: int
) -> None:
    numbers = []
    for number in itertools.count():
        with failing_from(command.monkeypatch, name, number, code) as calls:
            if command(*FILES) == 0:
                break
        assert calls[0] == number + 1
        named = "state" if command.err.startswith("gpseq: error: state") else "out.csv"
        command.failed_with(f"{named}: {os.strerror(code)}")
        check_stopped(command, commits)
        numbers.append(command.committed)
        if number in (1, 4):
            check_goes_on(command, commits)
        for path in ("state", "out.csv"):
            Path(path).unlink(missing_ok=True)
    # Two steps a chunk, predictions and state; but predictions are replaced in the first one only.
    assert numbers == ([0, 0, 1, 1, 2, 2, 3, 3] if name == "fsync" else [0, 0, 1, 2, 3])


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("options", [FILES, FILES[2:]], ids=["state", "predictions"])
def test_a_file_that_the_system_lets_grow_no_more(
    command: Command, commits: list[list[bytes | None]], options: list[str], chunk: int
) -> None:
    """Real writes that end in the middle, by a limit on the size of files; the state is the larger one of the two."""
    import resource

    with_state = options is FILES
    limit = len(commits[chunk][0 if with_state else 1] or b"") - 7
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert command(*options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert command.committed == chunk - 1
    command.failed_with(f"{'state' if with_state else 'out.csv'}: File too large")
    if with_state:
        check_stopped(command, commits)
        check_goes_on(command, commits)
    else:
        assert command(*options) == 0 and result() == [None, commits[-1][1]]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("closed", ["state", "out.csv"])
def test_a_directory_that_becomes_read_only(
    command: Command, commits: list[list[bytes | None]], closed: str, code: int
) -> None:
    """Permissions do not bind root, so the refusal is made up."""
    real_open, real_unlink = open, os.unlink

    def is_closed(path: Any) -> bool:
        return closed in os.path.basename(path) and result()[0] == commits[2][0]

    def refuse(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode in ("wb", "r+b") and is_closed(path):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return real_open(path, mode, *args, **kwargs)

    def refuse_unlink(path: Any) -> None:
        """Such a file system refuses before it looks whether there is something."""
        if code == errno.EROFS and is_closed(path):
            raise OSError(code, os.strerror(code), os.fspath(path))
        real_unlink(path)

    with command.monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(os, "unlink", refuse_unlink)
        assert command(*FILES) == 2
        command.failed_with(f"{closed}: {os.strerror(code)}")
        assert command.committed == 2
        check_stopped(command, commits)
        assert command(*FILES) == 2  # and again
        assert command.committed == 0 and result()[0] == commits[2][0]
    check_goes_on(command, commits)


def test_a_state_with_a_true_checksum_that_is_no_run(command: Command) -> None:
    """Such as another version might write: refused in one line, whatever is missing or of another kind."""
    assert command("--state", "state") == 0
    tensors, metadata = storage.load("state")
    cases: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        ({name: t for name, t in tensors.items() if name != left_out}, metadata)
        for left_out in ("borders", "learnt.time", "model.variational_strategy.belief.G")
    ]
    cases += [(tensors, {k: v for k, v in metadata.items() if k != left_out}) for left_out in ("options", "rows")]
    cases += [(tensors, metadata | {"options": metadata["options"] | {"later": 1}}), (tensors, metadata | {"seen": 3})]
    cases += [(tensors, metadata | {"options": metadata["options"] | {"kernel": "later"}})]
    for case in cases:
        storage.save("state", *case)
        before = Path("state").read_bytes()
        assert command("--state", "state") == 2
        assert command.err.startswith("gpseq: error: state is a file of gpseq, but not the state of a stream")
        assert command.err.count("\n") == 1 and Path("state").read_bytes() == before


# Training with a full disk


def trained(checkpoint: Path | None, seen: list[bytes]) -> dict[str, Tensor]:
    """A network with dropout; what is on disk is noted at each step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.3), nn.Linear(6, 1))
    x = torch.randn(20, 3)
    loader = DataLoader(TensorDataset(x, x.sum(-1, keepdim=True)), 5, shuffle=True)

    def loss(model: nn.Module, batch: list[Tensor], step: int) -> Tensor:
        if checkpoint is not None:
            seen.append(checkpoint.read_bytes())
        return (model(batch[0]) - batch[1]).square().mean()

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    training.fit(model, loss, loader, optimizer=optimizer, epochs=EPOCHS, checkpoint=checkpoint, progress=False)
    return model.state_dict()


def distilled(checkpoint: Path | None, seen: list[bytes]) -> dict[str, Tensor]:
    """A student on its own path, with draws."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    teacher = nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 2)).eval().requires_grad_(False)
    x = torch.randn(8, 3, 4)

    class Loader(list):
        def __iter__(self) -> Iterator[Any]:
            if checkpoint is not None:
                seen.append(checkpoint.read_bytes())
            return super().__iter__()

    distiller = Distiller(teacher)
    distiller.fit(Loader([[x, x.mean((1, 2)).gt(0).long()]]), EPOCHS, checkpoint=checkpoint, progress=False)
    return distiller.student.state_dict()


EPOCHS = 3


@pytest.mark.parametrize(("job", "name"), [(trained, "fsync"), (trained, "replace"), (distilled, "fsync")])
def test_a_full_disk_at_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Callable[..., dict[str, Tensor]], name: str
) -> None:
    """The old one is intact, and goes on to the result of an undisturbed run."""
    expected = job(None, [])
    for number in range(EPOCHS + 1):  # one before the first epoch
        path, seen = tmp_path / f"{number}.ckpt", []
        with failing_from(monkeypatch, name, number, errno.ENOSPC):
            with pytest.raises(OSError, match=rf"No space left on device: '.*{number}\.ckpt'"):
                job(path, seen)
        assert (path.read_bytes() if number else None) == (seen[-1] if seen else None)
        assert len(set(seen)) == number
        found = job(path, [])
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{number}.ckpt" for number in range(EPOCHS + 1)]


# A clock that goes backwards

BACKWARDS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "every row": lambda x: list(x.argsort(descending=True).split(1)),
    "every chunk": lambda x: list(x.argsort().split(9))[::-1],
    "back and forth": lambda x: [x.argsort()[part] for part in torch.arange(len(x)).reshape(4, -1)[[2, 0, 3, 1]]],
    "rows sent twice": lambda x: [*x.argsort().split(9), *x.argsort()[-18:].split(9)],
}


@pytest.mark.parametrize("order", BACKWARDS)
def test_on_one_basis_the_clock_does_not_matter(order: str) -> None:
    x, y = draw(36)
    parts = BACKWARDS[order](x)
    model = stream(16, horizon_growth="fixed")
    for part in parts:
        model.update(x[part], y[part])
    everything = torch.cat(parts)
    whole = stream(16, horizon_growth="fixed").update(x[everything], y[everything])
    assert model.num_observations == len(everything) and model.features.horizon == 10
    assert_close(model(AT).mean, whole(AT).mean, 1e-10)
    assert_close(model(AT).covariance_matrix, whole(AT).covariance_matrix, 1e-10)


@pytest.mark.parametrize("growth", [1.25, None])
def test_a_clock_that_is_set_back_again_and_again(growth: float | None) -> None:
    """Each chunk goes on beyond the last one and begins before it: the horizon only grows, nothing is lost."""
    model, xs, ys, horizons = stream(44, 1.0, horizon_growth=growth), [], [], []
    for i in range(6):
        x, y = draw(10, 1.5 * i + 2, max(0.0, 1.5 * i - 3), seed=i)
        x[-1], y[-1] = x[0], y[0]  # and a time that repeats
        model.update(x, y)
        xs.append(x)
        ys.append(y)
        horizons.append(model.features.horizon)
    assert horizons == sorted(horizons) and horizons[-1] >= torch.cat(xs).max()
    x, y = torch.cat(xs), torch.cat(ys)
    at = torch.linspace(0, 9, 15, dtype=F64)
    expected = oracle.exact_gp(oracle.rbf(), oracle.zero, x, y, torch.full_like(x, 0.1), at)
    oracle.assert_posterior(model, expected, at, 1e-5)


@pytest.mark.parametrize(("measure", "window"), [("legt", 4.0), ("fout", 4.0)])
def test_a_clock_that_falls_out_of_the_window(measure: str, window: float) -> None:
    """A sender that is back at 1970: its values say nothing about the last window, however wild.

    (A memory that fades, "lagt", has no such end: high orders see many time constants back.)
    """
    model = stream(HippoFeatures(16, 1.0, measure=measure, window=window), lengthscale=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gpseq.models.CapacityWarning)
        for i in range(8):
            model.update(*draw(16, 5.0 * i + 5, 5.0 * i, seed=i))
        at = torch.linspace(37, 41, 9, dtype=F64)
        before, horizon = model(at), model.features.horizon
        mean, covariance = before.mean, before.covariance_matrix
        model.update(torch.full((50,), 0.5, dtype=F64), torch.full((50,), 1e3, dtype=F64))
    assert model.features.horizon == horizon and model.num_observations == 8 * 16 + 50
    assert_close(model(at).mean, mean, 1e-6)
    assert_close(model(at).covariance_matrix, covariance, 1e-6)


def fleet(num: int = 3, **options: Any) -> StreamingFleet:
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor(0.1, dtype=F64)
    options = {"horizon_growth": "fixed"} | options
    return StreamingFleet(num, HippoFeatures(16, 10.0), gpytorch_kernel(), likelihood, **options).eval()


def own_series(num: int = 3, n: int = 24) -> tuple[Tensor, Tensor]:
    pairs = [draw(n, seed=s) for s in range(num)]
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def test_streams_of_a_fleet_with_clocks_that_go_their_own_ways() -> None:
    """One forwards, one backwards, one in any order; and rows that come twice."""
    x, y = own_series()
    order = torch.stack([x[0].argsort(), x[1].argsort(descending=True), torch.arange(24)])
    x, y = x.gather(1, order), y.gather(1, order)
    model = fleet()
    for part in (*torch.arange(24).split(8), torch.arange(20, 24)):
        model.update(x[:, part], y[:, part])
    again = torch.cat([torch.arange(24), torch.arange(20, 24)])
    assert model.counts.tolist() == [28] * 3
    for s in range(3):
        alone = stream(16, horizon_growth="fixed").update(x[s, again].sort().values, y[s, again[x[s, again].argsort()]])
        assert_close(model[s](AT).mean, alone(AT).mean, 1e-10)
        assert_close(model[s](AT).covariance_matrix, alone(AT).covariance_matrix, 1e-10)


def test_a_feed_whose_clock_goes_backwards_and_repeats(command: Command) -> None:
    """It ends where the exact GP ends, and goes on from any chunk with the same bytes."""
    # Each block of 15 rows begins 8 rows before the end of the last one, and for a while time stands still.
    times = [(7 * (i // CHUNK) + i % CHUNK) / 4 for i in range(NUM_ROWS)]
    times[40:44] = [times[40]] * 4
    feed = rows(times)
    feed[20] = feed[19]  # and one row is sent twice
    feed[30:45] = feed[44:29:-1]
    assert command(*FILES, feed=feed) == 0
    whole = result()
    scores = StreamRun.load("state").compare()
    assert scores["stream"] == pytest.approx(scores["exact GP"], abs=1e-3)
    for name in ("state", "out.csv"):
        Path(name).unlink()
    for stop in (15, 30, 45, 60):
        assert command(*FILES, feed=feed[:stop]) == 0
        assert StreamRun.load("state").rows == stop
    assert result() == whole


def test_a_feed_that_falls_behind_its_beginning(command: Command) -> None:
    feed = rows()
    feed[35] = "-3.5,12.0\n"
    assert command(*FILES, feed=feed) == 0
    assert command.err.startswith("gpseq: warning: x: times from -3.5 lie before the start of the memory, 0;")
    assert command.err.count("\n") == 1
    assert StreamRun.load("state").rows == NUM_ROWS


def test_a_clock_that_leaps_beyond_all_numbers(command: Command) -> None:
    """A time that no kernel can measure is an error in one line, and the chunks before it are kept."""
    feed = rows()
    assert command(*FILES, feed=feed[:30]) == 0
    before = result()
    for leap in ("1e300", "1e308"):
        assert command(*FILES, feed=[*feed[:35], f"{leap},1.0\n", *feed[36:]]) == 2
        assert command.err.startswith("gpseq: error: ") and command.err.count("\n") == 1
        assert result()[0] == before[0]
    assert command(*FILES, feed=feed) == 0


# Bursts of NaN and infinities

#: Where a burst hits, in a feed of five chunks of twelve rows.
BURSTS = {
    "a whole chunk": range(12, 24),
    "across chunks": range(8, 40),
    "the beginning": range(18),
    "the end": range(50, 60),
    "every other row": range(0, 60, 2),
}


SOME = ("across chunks", "the beginning")


def poisson() -> StreamingGP:
    return StreamingGP(HippoFeatures(14, 4.0), gpytorch_kernel(), gpseq.likelihoods.PoissonLikelihood().double()).eval()


#: What learns from the burst, and the numbers that it is told.
LEARNERS: dict[str, tuple[Callable[[], StreamingGP], Callable[[Tensor], Tensor]]] = {
    "stretching": (lambda: stream(16, 4.0), lambda y: y),
    "growing": (lambda: stream(10, 4.0, max_features=40), lambda y: y),
    "window": (lambda: stream(HippoFeatures(16, 4.0, measure="legt", window=4.0)), lambda y: y),
    "counts": (poisson, lambda y: y.abs().round()),
}


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
@pytest.mark.parametrize(
    ("learner", "burst"),
    [pair for pair in itertools.product(LEARNERS, BURSTS) if pair[0] != "counts" or pair[1] in SOME],  # these are slow
)
def test_nothing_is_learnt_from_a_burst(learner: str, burst: str) -> None:
    """Not even where the horizon is: the result is that of a feed without these rows."""
    make, kind = LEARNERS[learner]
    x, y = draw(60)
    x, y = x.sort().values, kind(y)
    lost = torch.zeros(60, dtype=torch.bool)
    lost[list(BURSTS[burst])] = True
    hit, spared = make(), make()
    for part in torch.arange(60).split(12):
        hit.update(x[part], y.masked_fill(lost, NAN)[part], missing="skip")
        spared.update(x[part][~lost[part]], y[part][~lost[part]])
    assert hit.num_observations == int((~lost).sum())
    assert hit.features.horizon == spared.features.horizon
    assert_close(hit.log_evidence, spared.log_evidence, 1e-8)
    assert_close(hit(AT).mean, spared(AT).mean, 1e-8)
    assert_close(hit(AT).covariance_matrix, spared(AT).covariance_matrix, 1e-8)


#: Chunks that are refused, made from good ones: what becomes of x and y.
REFUSED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "NaN in x": lambda x, y: (x.index_fill(-1, torch.arange(2, 7), NAN), y),
    "NaN in both": lambda x, y: (x.index_fill(-1, torch.arange(2, 7), NAN), y.index_fill(-1, torch.arange(3, 7), NAN)),
    "infinity in x": lambda x, y: (x.index_fill(-1, torch.tensor(4), -math.inf), y),
    "infinity in y": lambda x, y: (x, y.index_fill(-1, torch.arange(2, 7), math.inf)),
    "NaN and infinity in y": lambda x, y: (x, torch.where(torch.arange(12) % 2 == 0, NAN, -math.inf).expand_as(y)),
    "overflow": lambda x, y: (x, 1e200 * y),
}


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
@pytest.mark.parametrize("fault", REFUSED)
def test_a_feed_goes_on_behind_what_is_refused(fault: str) -> None:
    """Bit for bit as if the bad chunk had never come, for a stream and for a fleet."""
    pairs: list[tuple[Any, Any, Tensor, Tensor]] = [(stream(16, 4.0), stream(16, 4.0), *draw(60))]
    pairs.append((fleet(horizon_growth=1.25), fleet(horizon_growth=1.25), *own_series(n=60)))
    for hit, spared, x, y in pairs:
        for number, part in enumerate(torch.arange(60).split(12)):
            good = x[..., part], y[..., part]
            before = snapshot(hit)
            if number in (0, 2, 4):  # before the first chunk, in the middle, and at last
                bad_x, bad_y = REFUSED[fault](10 + good[0], good[1])  # it would have stretched the horizon
                with pytest.raises(ValueError, match=r"^[xy]: "):
                    hit.update(bad_x, bad_y, missing="skip")
                assert_identical(hit, before)
            hit.update(*good)
            spared.update(*good)
        assert_identical(hit, snapshot(spared))


def test_bursts_in_some_streams_of_a_fleet() -> None:
    """Their clocks may be dead, too; each stream is what it would be without these rows."""
    x, y = own_series(n=36)
    lost = torch.zeros(3, 36, dtype=torch.bool)
    lost[0, 5:30], lost[1, 12:24] = True, True
    model = fleet()
    for part in torch.arange(36).split(12):
        model.update(x.masked_fill(lost, NAN)[:, part], y.masked_fill(lost, NAN)[:, part])
    assert model.counts.tolist() == [11, 24, 36]
    for s in range(3):
        alone = stream(16, horizon_growth="fixed")
        for part in torch.arange(36).split(12):
            alone.update(x[s, part][~lost[s, part]], y[s, part][~lost[s, part]])
        assert_close(model[s](AT).mean, alone(AT).mean, 1e-10)
        assert_close(model[s](AT).covariance_matrix, alone(AT).covariance_matrix, 1e-10)
        assert_close(model.log_evidence[s], alone.log_evidence, 1e-10)


@pytest.mark.parametrize("cell", ["", "nan", "NaN"], ids=["empty", "nan", "NaN"])
def test_bursts_without_values_in_a_feed(command: Command, cell: str) -> None:
    """The model is bit for bit that of the feed without these rows, which are predicted all the same."""
    feed, burst = rows(), [*range(20, 42), 50, 59]
    hit = [f"{line.split(',')[0]},{cell}\n" if i in burst else line for i, line in enumerate(feed)]
    assert command(*FILES, "--holdout", "0", feed=hit) == 0
    run = StreamRun.load("state")
    assert (run.rows, run.empty_rows, run.model.num_observations) == (NUM_ROWS, len(burst), NUM_ROWS - len(burst))
    lines = [line.split(",") for line in Path("out.csv").read_text().splitlines()[1:]]
    assert [i for i, line in enumerate(lines) if line[3] == "empty"] == burst
    assert all(math.isfinite(float(lines[i][6])) and float(lines[i][7]) > 0 for i in burst)
    for name in ("state", "out.csv"):
        Path(name).unlink()
    spared = [line for i, line in enumerate(feed) if i not in burst]
    assert command(*FILES, "--holdout", "0", feed=spared) == 0
    assert_identical(run.model, snapshot(StreamRun.load("state").model))


@pytest.mark.parametrize(("cell", "column"), [("inf", "y"), ("nan", "t")])
def test_bursts_of_words_in_a_feed(command: Command, cell: str, column: str) -> None:
    """They are no numbers: the command says which cell, keeps what it has learnt, and goes on with a clean feed."""
    feed = rows()
    assert command(*FILES, feed=feed) == 0
    whole = result()
    for name in ("state", "out.csv"):
        Path(name).unlink()
    hit = [
        (f"{line.split(',')[0]},{cell}\n" if column == "y" else f"{cell},{line.split(',')[1]}") if i >= 37 else line
        for i, line in enumerate(feed)
    ]
    assert command(*FILES, feed=hit) == 2
    command.failed_with(f"standard input, row 39, column '{column}': '{cell}' is not finite")
    assert StreamRun.load("state").rows == 30 == CHUNK * command.committed
    assert command(*FILES, feed=feed) == 0
    assert result() == whole


# Ctrl-C


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_while_a_feed_grows(command: Command) -> None:
    """In a real process, which waits for the next row; the same command goes on with the same bytes."""
    feed = rows()
    assert command(*FILES, feed=feed) == 0
    whole = result()
    for name in ("state", "out.csv"):
        Path(name).unlink()

    # One start of the fit, as in this process.
    code = "import sys; from gpseq import cli, stream_setup as s; s.LENGTHSCALE_STARTS = (0.1,); sys.exit(cli.main())"
    path = os.pathsep.join([str(Path(gpseq.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    # A process that was started in the background has the signal ignored, and so would have what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "stream", "-", *OPTIONS, *FILES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdin and process.stdout
    process.stdin.write(HEADER + "".join(feed[:38]))  # two chunks, and part of a third
    process.stdin.flush()
    shown = ""
    while not shown.startswith("    2 "):  # it has committed the second
        shown = process.stdout.readline()
        assert shown, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "\ngpseq: interrupted\n"
    assert StreamRun.load("state").rows == 2 * CHUNK
    assert command(*FILES, feed=feed[30:]) == 0  # the feed sends what was not committed once more
    assert result() == whole


def interrupted_at(call: Callable[[], Any], number: int | None) -> list[str]:
    """Call something and interrupt it before a line of it.

    Lines are those of gpseq, and all that run while a model is replaced. Returns of each line that ran whether it is of
    "gpseq", of gpseq while a model was replaced, "own", or of others meanwhile, "foreign".
    """
    found: list[str] = []
    replacing = [0]
    own = str(Path(gpseq.__file__).parent)

    def tracer(frame: Any, event: str, argument: Any) -> Any:
        inside = frame.f_code.co_filename.startswith(own)
        if not inside and not replacing[0]:
            return None
        enters = inside and frame.f_code.co_name in ("_replace", "_put_back")
        replacing[0] += enters

        def lines(frame: Any, event: str, argument: Any) -> Any:
            if event == "return":
                replacing[0] -= enters
            if event == "line":
                found.append(("own" if inside else "foreign") if replacing[0] else "gpseq")
                if len(found) - 1 == number:
                    raise KeyboardInterrupt
            return lines

        return lines

    before, grad, collects = sys.gettrace(), torch.is_grad_enabled(), gc.isenabled()
    gc.disable()  # it would run lines of its own at any moment
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
        # An interruption between the last line of a with block and its end skips the end.
        torch.set_grad_enabled(grad)
    return found


def spread(lines: list[str], kind: str, most: int) -> list[int]:
    """Numbers of lines of a kind, evenly spaced, the last one included."""
    numbers = [number for number, line in enumerate(lines) if line == kind][::-1]
    return numbers[:: -(-len(numbers) // most)]


def ready(kind: str) -> tuple[Any, Callable[[Any], Any]]:
    """A model that has learnt something, and an update that changes as much as can change at once."""
    x, y = draw(12, 4.0)
    more = draw(6, 9.0, 3.0, seed=1)
    if kind == "stretching":
        return stream(12, 4.0).update(x, y), lambda model: model.update(*more)
    if kind == "learning":
        return stream(12, 4.0, learn="basis_change").update(x, y), lambda model: model.update(*more)
    if kind == "counts":
        return poisson().update(x, y.abs().round()), lambda model: model.update(more[0], more[1].abs().round())
    if kind == "rebase":
        return stream(12, 4.0).update(x, y), lambda model: model.rebase(HippoFeatures(9, 6.0))
    if kind == "ensemble":
        members = [stream(12, 4.0, lengthscale=scale) for scale in (0.8, 1.3)]
        return StreamingEnsemble(members).update(x, y), lambda model: model.update(*more)
    if kind == "fleet":
        return fleet(horizon_growth=1.25).update(x, y.expand(3, -1)), lambda model: model.update(
            more[0], more[1].expand(3, -1)
        )
    if kind == "some of a fleet":
        model = fleet().update(x, y.expand(3, -1))
        model.update(x[:2], y[:2].expand(1, -1), streams=[1])  # from now on the state is the fleet's own
        return model, lambda model: model.update(more[0], more[1].expand(2, -1), streams=[2, 0])
    assert kind == "space and time"
    places = torch.rand(4, 2, dtype=F64)
    kernels = gpytorch.kernels.RBFKernel().double(), gpytorch.kernels.RBFKernel().double()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = SpaceTimeStreamingGP(HippoFeatures(10, 4.0), places[:3], places, *kernels, likelihood)
    model.update(x, y[:, None].expand(-1, 4))
    return model, lambda model: model.update(more[0], more[1][:, None].expand(-1, 4))


#: How many lines of each sort are tried: more where an update is quick.
KINDS = {
    "stretching": 8,
    "learning": 2,
    "counts": 3,
    "rebase": 20,
    "ensemble": 6,
    "fleet": 8,
    "some of a fleet": 15,
    "space and time": 6,
}


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_any_line_of_an_update(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the old one or the new one, whole; and the old one learns the same as if nothing had happened."""
    monkeypatch.setattr("gpseq.models.learning.STEPS", 1)
    model, update = ready(kind)
    update(copy.deepcopy(model))  # so that what is cached is cached

    def fresh() -> Any:
        new = copy.deepcopy(model)
        if kind == "some of a fleet":
            new.variational_strategy.belief._exclusive = True
        return new

    before, whole = snapshot(model), fresh()
    lines = interrupted_at(partial(update, whole), None)
    after = snapshot(whole)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert lines.count("own") > 4
    chosen = [number for at in ("own", "foreign", "gpseq") for number in spread(lines, at, KINDS[kind])]
    ends = {"old": 0, "new": 0}
    for number in chosen:
        hit = fresh()
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(partial(update, hit), number)
        now = snapshot(hit)
        same = now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
        ends["old" if same else "new"] += 1
        if not same:
            assert_identical(hit, after)
        elif ends["old"] % 10 == 2:
            update(hit)
            assert_identical(hit, after)
    assert ends["old"] > ends["new"]


# Files with a trap


class Trap:
    """What leaves a mark if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickled(trap: Trap) -> bytes:
    return pickle.dumps({"model": trap})


def saved(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"epochs": trap}, file)
    return file.getvalue()


def saved_as_of_old(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"epochs": trap}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def of_numpy(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    return file.getvalue()


def archive(trap: Trap) -> bytes:
    file = io.BytesIO()
    array = np.array([trap], dtype=object)
    np.savez(file, x_train=array, y_train=array, x_test=array, y_test=array)
    return file.getvalue()


TRAPS = (pickled, saved, saved_as_of_old, of_numpy, archive)


def read_as_checkpoint(path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training.fit(model, lambda *a: pytest.fail("a step was taken"), [0], optimizer=optimizer, epochs=1, checkpoint=path)


def read_as_images(path: Path) -> None:
    path.rename(path.with_name("mnist.npz"))
    load_images("mnist", full=True)


def read_as_table_of_pairs(path: Path) -> None:
    path.with_name("blimp.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    load_blimp(full=True)


def read_as_lines_of_pairs(path: Path) -> None:
    path.with_name("blimp").mkdir()
    path.rename(path.with_name("blimp") / "pairs.jsonl")
    load_blimp(full=True)


#: Every place that reads a file of the user's.
READERS: dict[str, Callable[[Path], Any]] = {
    "storage.load": storage.load,
    "StreamRun.load": lambda path: StreamRun.load(str(path)),
    "Streamlined.load": lambda path: Streamlined.load(path, nn.Linear(2, 2)),
    "training.fit": read_as_checkpoint,
    "load_images": read_as_images,
    "load_blimp, table": read_as_table_of_pairs,
    "load_blimp, lines": read_as_lines_of_pairs,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_traps_would_snap(tmp_path: Path, trap: Callable[[Trap], bytes]) -> None:
    """They are as dangerous as they should be, to a reader that trusts them."""
    data, mark = io.BytesIO(trap(Trap(tmp_path / "mark"))), tmp_path / "mark"
    if trap is pickled:
        pickle.load(data)
    elif trap in (of_numpy, archive):
        found = np.load(data, allow_pickle=True)
        if trap is archive:
            found["x_train"]
    else:
        torch.load(data, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("reader", READERS)
def test_reading_never_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, trap: Callable[[Trap], bytes]
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "given"
    path.write_bytes(trap(Trap(mark)))
    monkeypatch.setenv("GPSEQ_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"given|mnist\.npz|blimp|pairs\.jsonl") as caught:
        READERS[reader](path)
    if not reader.startswith("load_"):
        assert type(caught.value) is StorageError
    assert not mark.exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_the_command_never_runs_code(command: Command, tmp_path: Path, trap: Callable[[Trap], bytes]) -> None:
    mark = tmp_path / "mark"
    Path("state").write_bytes(data := trap(Trap(mark)))
    assert command(*FILES) == 2
    assert command.err.startswith("gpseq: error: state is ") and command.err.count("\n") == 1
    assert Path("state").read_bytes() == data and not Path("out.csv").exists()
    Path("state").unlink()
    Path("table.csv").write_bytes(data)
    assert command(*FILES) == 2
    assert command.err.startswith("gpseq: error: table.csv") and command.err.count("\n") == 1
    assert not mark.exists()


@pytest.mark.slow
def test_transformers_never_run_code(tmp_path: Path) -> None:
    """Of a folder that holds a pickle instead of safetensors."""
    transformers = pytest.importorskip("transformers")
    from gpseq.integrations import huggingface

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=8, max_position_embeddings=8, **sizes)
    model = gpseq.nn.replace_attention(transformers.BertModel(config).eval(), mode="residual", num_inducing=2)
    model.save_pretrained(tmp_path)
    assert isinstance(huggingface.load_pretrained(tmp_path), transformers.BertModel)
    (tmp_path / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    for trap in (pickled, saved, saved_as_of_old):
        (tmp_path / "pytorch_model.bin").write_bytes(trap(Trap(mark)))
        with pytest.raises(Exception, match=r"(?i)weights_only|weights only"):
            huggingface.load_pretrained(tmp_path)
        assert not mark.exists()


def test_nothing_in_the_package_reads_pickles() -> None:
    """Whoever adds a reader has to say weights_only=True, and to add it to the readers above."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
    needs = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
    never = {"eval", "exec", "__import__", "compile", "numpy.load", "torch.hub.load", "torch.jit.load"}
    suspicious = re.compile(  # a quick look first
        r"\bload\(|(?<![\w.])(eval|exec|compile|__import__)\(|PackageImporter|weights_only|trust_remote_code|"
        rf"\b({'|'.join(forbidden)})\b"
    )
    found, root = dict.fromkeys(needs, 0), Path(gpseq.__file__).parent
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if not suspicious.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            place = f"{file.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if file.name != "testing.py":  # which asks whether an object survives a pickle of its own
                assert not forbidden & {name.partition(".")[0] for name in names}, place
            if not isinstance(node, ast.Call):
                continue
            options = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            assert not options.get("trust_remote_code") and options.get("weights_only", True), place
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in {called.rpartition(".")[2] for called in never | set(needs)}:
                continue
            called = ast.unparse(node.func)
            assert called not in never, place
            if called in needs:
                option, value = needs[called]
                assert str(options.get(option)) == value, place
                found[called] += 1
    assert all(found.values()), "the search finds what it looks for"
