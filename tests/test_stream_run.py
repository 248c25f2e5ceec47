"""A run without its command: chunks, what is skipped, the exact GP, and a state that is complete."""

import math
from collections.abc import Iterator
from pathlib import Path

import gpytorch
import pytest
import torch
from torch import Tensor

from gpseq.datasets import load_solar
from gpseq.datasets.tables import Row
from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP
from gpseq.sampling import is_held_out, row_key
from gpseq.stream_run import StreamRun, split
from gpseq.stream_setup import (
    Options,
    RunError,
    Span,
    auto_features,
    exact_posterior,
    fit,
    new_model,
    new_modules,
    padded,
)

OPTIONS = Options("t", "y", chunk=20, features=40)


def table(num_rows: int = 100, empty: tuple[int, ...] = (), step: float = 0.25) -> list[Row]:
    """A noisy wave."""
    noise = torch.randn(num_rows, generator=torch.Generator().manual_seed(2)).tolist()
    rows = []
    for i in range(num_rows):
        value = 3 + math.sin(i / 4) + 0.1 * noise[i]
        text = "" if i in empty else repr(value)
        rows.append(Row(i + 2, step * i, None if i in empty else value, repr(step * i), text, "ab"[i // 10 % 2]))
    return rows


def learn(rows: list[Row], options: Options = OPTIONS, span: Span | None = None) -> StreamRun:
    """A run to the end of the rows."""
    run = None
    for chunk in split(rows, options, is_first=True):
        run = run or StreamRun.begin(options, chunk, span)
        run.learn(chunk)
    assert run is not None
    return run


def sizes(rows: list[Row], options: Options, is_first: bool = True) -> list[int]:
    return [len(chunk) for chunk in split(rows, options, is_first)]


def test_chunks_of_so_many_rows() -> None:
    assert sizes(table(50), Options("t", "y", chunk=20)) == [20, 20, 10]
    assert sizes(table(40), Options("t", "y", chunk=20)) == [20, 20]
    assert sizes(table(50), Options("t", "y", chunk=5, warmup=32)) == [32, 5, 5, 5, 3]
    assert sizes(table(50), Options("t", "y", chunk=20, warmup=8)) == [20, 20, 10]
    assert sizes(table(10), Options("t", "y", chunk=5, warmup=32), is_first=False) == [5, 5]
    assert sizes([], OPTIONS) == []


def test_rows_without_a_value_do_not_count() -> None:
    assert sizes(table(50, empty=(3, 4, 20, 49)), Options("t", "y", chunk=20)) == [23, 20, 7]
    assert sizes(table(10, empty=tuple(range(10))), Options("t", "y", chunk=5)) == [10]


def test_chunks_by_a_column() -> None:
    options = Options("t", "y", chunk_by="g")
    assert sizes(table(35), options) == [10, 10, 10, 5]
    assert sizes(table(35, empty=tuple(range(10, 20))), options) == [10, 10, 10, 5]
    assert sizes(table(50), Options("t", "y", chunk_by="g", warmup=12)) == [20, 10, 10, 10]


def test_no_row_is_lost_and_none_comes_twice() -> None:
    rows = table(97, empty=(5, 50))
    for options in (OPTIONS, Options("t", "y", chunk=1), Options("t", "y", chunk_by="g", warmup=33)):
        assert [row for chunk in split(rows, options, is_first=True) for row in chunk] == rows


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Between any two chunks, for every rule by which the horizon grows."""
    for growth in (1.25, None):
        options = Options("t", "y", chunk=15, features=30, horizon_growth=growth)
        whole, interrupted = None, None
        for chunk in split(table(empty=(7, 40)), options, is_first=True):
            whole = whole or StreamRun.begin(options, chunk, None)
            interrupted = interrupted or StreamRun.begin(options, chunk, None)
            assert whole.learn(chunk).predictions == interrupted.learn(chunk).predictions
            whole.save(str(tmp_path / "whole"))
            interrupted.save(str(tmp_path / "state"))
            assert (tmp_path / "whole").read_bytes() == (tmp_path / "state").read_bytes()
            interrupted = StreamRun.load(str(tmp_path / "state"))
        assert whole is not None and whole.compare() == interrupted.compare()


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
def test_the_state_does_not_grow_with_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_EXACT", "MAX_HELD_OUT", "MAX_FOLLOWED"):
        monkeypatch.setattr(f"gpseq.stream_run.{name}", 10)
    lengths = []
    for num_rows in (400, 1600):
        run = learn(table(num_rows, step=0.01), Options("t", "y", chunk=20, features=8))
        run.save(str(tmp_path / "state"))
        lengths.append((tmp_path / "state").stat().st_size)
    assert abs(lengths[1] - lengths[0]) < 100


def test_with_room_enough_a_run_ends_where_the_exact_gp_ends() -> None:
    scores = learn(table()).compare()
    assert scores["stream"] == pytest.approx(scores["exact GP"], abs=1e-4)


def test_the_exact_posterior_is_that_of_gpytorch() -> None:
    kernel, likelihood = new_modules("matern52")
    kernel.outputscale, likelihood.noise = 1.7, 0.05
    x, at = torch.linspace(0, 5, 30).double(), torch.linspace(-1, 6, 11).double()

    class Exact(gpytorch.models.ExactGP):
        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(gpytorch.means.ZeroMean()(x), kernel(x))

    oracle = Exact(x, x.sin(), likelihood).double().eval()
    with torch.no_grad(), gpytorch.settings.fast_pred_var(False):
        expected = likelihood(oracle(at))
        model = new_model(HippoFeatures(8, 5.0), kernel, likelihood, None)
        mean, variance = exact_posterior(model, x, x.sin(), at)
        torch.testing.assert_close(mean, expected.mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(variance, expected.variance, atol=1e-6, rtol=1e-6)


def test_past_errors_are_those_of_each_chunk() -> None:
    run = learn(table(60))
    errors = run.past_errors
    assert errors.shape == (3, 3) and torch.equal(errors.isnan(), torch.ones(3, 3).triu(1).bool())
    mean = run.predict(run.held_out.time)[0]
    for chunk in range(3):
        mine = run.held_out.chunk == chunk
        expected = (mean - run.held_out.target)[mine].square().mean().sqrt()
        torch.testing.assert_close(errors[-1, chunk], expected)
    assert run.borders.tolist() == [0.0, 5.0, 10.0]


def test_above_a_limit_chunks_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpseq.stream_run.MAX_FOLLOWED", 2)
    run = learn(table(60))
    assert run.past_errors.shape == (2, 2)
    assert len(run.figure("title").axes) == 1


def test_the_figure_holds_the_run() -> None:
    pytest.importorskip("matplotlib")
    run = learn(table(60))
    top, bottom, _ = run.figure("a title").axes
    assert top.get_title(loc="left") == "a title" and (top.get_xlabel(), top.get_ylabel()) == ("t", "y")
    lines = {line.get_label(): line for line in top.lines}
    assert len(lines["learnt"].get_xdata()) == len(run.learnt.time)
    assert list(lines["held out"].get_xdata()) == run.held_out.time.tolist()
    assert lines["40 features, 95 % band"].get_xdata()[-1] == run.end
    assert lines["exact GP"].get_ydata()[0] == pytest.approx(lines["40 features, 95 % band"].get_ydata()[0], abs=1e-3)
    assert bottom.get_xlabel() == "chunks learnt"


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
@pytest.mark.parametrize("growth", [1.25, 2.0, None])
def test_padded_is_as_far_as_the_model_gets(growth: float | None) -> None:
    kernel, likelihood = new_modules("rbf")
    model = StreamingGP(HippoFeatures(8, 4.0, start=-1.0), kernel, likelihood, horizon_growth=growth).double()
    for end in (5.0, 11.0, 60.0):
        at = torch.tensor([end], dtype=torch.float64)
        model.update(at, at.cos())
        assert end <= model.features.horizon <= padded(-1.0, end, growth)


def test_the_fit_finds_the_lengthscale_in_any_unit() -> None:
    x = torch.linspace(0, 20, 60).double()
    y = x.sin() + 0.05 * torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    small, _ = fit("rbf", x / 1e6, y)
    large, _ = fit("rbf", x * 1e6, y)
    ratio = large.base_kernel.lengthscale / small.base_kernel.lengthscale
    assert ratio.item() == pytest.approx(1e12, rel=1e-3)
    assert 0.5e6 < large.base_kernel.lengthscale.item() < 5e6


def test_the_fit_finds_the_best_of_several_optima() -> None:
    """On the first solar rows the marginal likelihood has three; the value of the best was found by a dense search."""
    solar = load_solar()
    kept = torch.tensor([not is_held_out(row_key(i, seed=0), 0.2) for i in range(40)])
    y = solar.target[:40][kept]
    kernel, likelihood = fit("rbf", solar.time[:40][kept], (y - y.mean()) / y.std())
    assert kernel.base_kernel.lengthscale.item() == pytest.approx(2.305, abs=1e-2)
    assert likelihood.noise.item() == pytest.approx(0.0263, abs=1e-3)


def test_auto_holds_the_prior_and_the_noise_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _ = new_modules("rbf")
    kernel.base_kernel.lengthscale = 0.5
    of_prior = HippoFeatures.required(kernel, 10.0)
    of_noise = HippoFeatures.required(kernel, 10.0, noise=1e-3)
    assert auto_features(kernel, 10.0, 0.0, 10.0) == of_prior < of_noise == auto_features(kernel, 1e-3, 0.0, 10.0)
    monkeypatch.setattr("gpseq.stream_setup.MAX_AUTO", of_prior + 1)
    assert auto_features(kernel, 1e-3, 0.0, 10.0) == of_prior + 1
    monkeypatch.setattr("gpseq.stream_setup.MAX_AUTO", of_prior - 1)
    with pytest.raises(RunError, match=r"--features auto: .* Or choose --features N"):
        auto_features(kernel, 1e-3, 0.0, 10.0)


def test_unsorted_files_begin_with_their_earliest_row() -> None:
    rows = table(60)
    rows = [*rows[30:], *rows[:30]]
    rows = [row._replace(time=row.time - 7.5) for row in rows]
    run = learn(rows, span=Span(60, -7.5, 7.25))
    assert run.features.start == -7.5 and run.end == 7.25
    scores = run.compare()
    assert scores["stream"] == pytest.approx(scores["exact GP"], abs=1e-4)


def test_rows_that_were_learnt_are_skipped() -> None:
    rows = table(60)
    run = learn(rows[:40])

    def skip(rows: list[Row], is_file: bool = False) -> list[Row]:
        source: Iterator[Row] = iter(rows)
        return list(run.skip_learnt(source, "it", is_file))

    assert skip(rows) == skip(rows, is_file=True) == rows[40:]
    assert skip(rows[:40]) == []
    assert skip(rows[40:]) == rows[40:]
    with pytest.raises(RunError, match="row 42 of it is not the row that the run began with"):
        skip(rows[40:], is_file=True)
    with pytest.raises(RunError, match="it ends after 39 rows, but 40 were learnt before"):
        skip(rows[:39])
    changed = rows[20]._replace(target_text="0")
    with pytest.raises(RunError, match="the first 40 rows of it are not those that were learnt before"):
        skip([*rows[:20], changed, *rows[21:]])
