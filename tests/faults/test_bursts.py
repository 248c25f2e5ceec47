"""Bursts of NaN and infinities, in tensors and in the feed of the command."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP
from gpseq.stream_run import StreamRun
from tests.faults.feeds import CHUNK, FILES, NUM_ROWS, Command, assert_alike, fleet, own_series, poisson, result, rows
from tests.oracles_streaming import assert_close, assert_identical, draw, snapshot, stream

NAN = math.nan

#: Where a burst hits, in a feed of three chunks of twelve rows.
BURSTS = {
    "a whole chunk": range(12, 24),
    "across chunks": range(8, 32),
    "the beginning": range(18),
    "the end": range(26, 36),
    "every other row": range(0, 36, 2),
}


SOME = ("across chunks", "the beginning")


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
    x, y = draw(36)
    x, y = x.sort().values, kind(y)
    lost = torch.zeros(36, dtype=torch.bool)
    lost[list(BURSTS[burst])] = True
    hit, spared = make(), make()
    for part in torch.arange(36).split(12):
        hit.update(x[part], y.masked_fill(lost, NAN)[part], missing="skip")
        spared.update(x[part][~lost[part]], y[part][~lost[part]])
    assert hit.num_observations == int((~lost).sum())
    assert hit.features.horizon == spared.features.horizon
    assert_close(hit.log_evidence, spared.log_evidence, 1e-8)
    assert_alike(hit, spared, 1e-8)


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
    pairs: list[tuple[Any, Any, Tensor, Tensor]] = [(stream(16, 4.0), stream(16, 4.0), *draw(36))]
    pairs.append((fleet(horizon_growth=1.25), fleet(horizon_growth=1.25), *own_series(n=36)))
    for hit, spared, x, y in pairs:
        for part in torch.arange(36).split(12):  # before the first chunk, in the middle, and at last
            good = x[..., part], y[..., part]
            before = snapshot(hit)
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
        assert_alike(model[s], alone, 1e-10)
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
