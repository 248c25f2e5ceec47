"""A clock that goes backwards, stands still, repeats itself or leaps."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gpseq
from gpseq.features import HippoFeatures
from gpseq.stream_run import StreamRun
from tests import oracles_streaming as oracle
from tests.faults.feeds import CHUNK, FILES, NUM_ROWS, Command, assert_alike, fleet, own_series, result, rows
from tests.oracles_streaming import F64, assert_close, draw, stream

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
    assert_alike(model, whole, 1e-10)


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
    after = model(at)
    assert_close(after.mean, mean, 1e-6)
    assert_close(after.covariance_matrix, covariance, 1e-6)


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
        assert_alike(model[s], alone, 1e-10)


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
