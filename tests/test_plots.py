"""Pictures hold the data that they were given, under the right names."""

import sys
import xml.etree.ElementTree
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from gpseq import plots

matplotlib = pytest.importorskip("matplotlib")

TIME = np.linspace(0, 10, 30)
TARGET = np.sin(TIME)
HELD = np.arange(30) % 5 == 0
GRID = np.linspace(0, 10, 200)


def axes() -> "matplotlib.axes.Axes":
    return plots.new_figure().subplots()


def lines(ax: "matplotlib.axes.Axes") -> dict[str, np.ndarray]:
    """Label of each line -> its points, (n, 2)."""
    return {str(line.get_label()): line.get_xydata() for line in ax.lines}


def test_learnt_and_held_out_rows_are_told_apart() -> None:
    ax = axes()
    plots.plot_data(ax, torch.from_numpy(TIME), torch.from_numpy(TARGET), torch.from_numpy(HELD))
    drawn = lines(ax)
    np.testing.assert_array_equal(drawn["learnt"], np.stack([TIME, TARGET], 1)[~HELD])
    np.testing.assert_array_equal(drawn["held out"], np.stack([TIME, TARGET], 1)[HELD])
    assert ax.lines[0].get_markerfacecolor() != ax.lines[1].get_markerfacecolor()


@pytest.mark.parametrize(("held", "labels"), [(None, ["learnt"]), (np.ones(30, bool), ["held out"])])
def test_what_is_not_there_is_not_in_the_legend(held: np.ndarray | None, labels: list[str]) -> None:
    ax = axes()
    plots.plot_data(ax, TIME, TARGET, held)
    assert list(lines(ax)) == labels


def test_the_band_is_95_per_cent_wide() -> None:
    ax = axes()
    plots.plot_posterior(ax, GRID, np.cos(GRID), np.full(200, 0.5), label="method")
    np.testing.assert_array_equal(lines(ax)["method"], np.stack([GRID, np.cos(GRID)], 1))
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    at_zero = corners[corners[:, 0] == 0.0][:, 1]
    assert at_zero.min() == pytest.approx(1 - 0.98) and at_zero.max() == pytest.approx(1 + 0.98)


def test_a_band_need_not_be_symmetric() -> None:
    ax = axes()
    lower, upper = torch.zeros(200), torch.from_numpy(np.exp(GRID))
    plots.plot_band(ax, GRID, np.ones(200), lower, upper, label="median")
    np.testing.assert_array_equal(lines(ax)["median"], np.stack([GRID, np.ones(200)], 1))
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    at_end = corners[corners[:, 0] == 10.0][:, 1]
    assert at_end.min() == 0.0 and at_end.max() == pytest.approx(np.exp(10.0))


def test_a_decision_is_drawn_where_the_probability_is_one_half() -> None:
    ax = axes()
    columns, rows = torch.linspace(-1, 1, 21), torch.linspace(0, 3, 7)
    x, label = torch.tensor([[-0.5, 1.0], [0.5, 1.0], [0.7, 2.0]]), torch.tensor([0.0, 1.0, 1.0])
    probability = (0.5 + 0.4 * columns + 0.04).expand(7, 21)  # rises to the right, one half at -0.1
    plots.plot_decision(ax, x, label, (columns, rows), probability)
    drawn = lines(ax)
    np.testing.assert_array_equal(drawn["class 0"], x[:1].numpy())
    np.testing.assert_array_equal(drawn["class 1"], x[1:].numpy())
    mesh, border = ax.collections
    assert mesh.get_clim() == (0, 1)
    vertices = border.get_paths()[0].vertices
    np.testing.assert_allclose(vertices[:, 0], -0.1, atol=1e-6)
    assert (vertices[:, 1].min(), vertices[:, 1].max()) == (0, 3)


def test_the_exact_gp_is_dashed_with_its_limits() -> None:
    ax = axes()
    plots.plot_exact(ax, GRID, np.sin(GRID), np.ones(200))
    assert all(line.is_dashed() for line in ax.lines) and len(ax.lines) == 3
    np.testing.assert_allclose(ax.lines[2].get_ydata() - ax.lines[1].get_ydata(), 2 * 1.96)
    assert [line.get_label()[0] == "_" for line in ax.lines] == [False, True, True]  # one entry in the legend


def test_a_stream_shows_everything() -> None:
    ax = axes()
    plots.plot_stream(
        ax,
        TIME,
        TARGET,
        GRID,
        np.sin(GRID),
        np.ones(200),
        held_out=HELD,
        borders=[2.0, 5.0],
        exact_mean=np.sin(GRID),
        label="64 features",
        time_label="time (s)",
        target_label="level (m)",
    )
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["learnt", "held out", "64 features, 95 % band", "exact GP"]
    assert [line.get_xdata()[0] for line in ax.lines[:2]] == [2.0, 5.0]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xlim()) == ("time (s)", "level (m)", (0.0, 10.0))


def test_dates_have_short_labels() -> None:
    ax = axes()
    days = [datetime(2024, 1, 1) + timedelta(days=i) for i in range(30)]
    plots.plot_stream(ax, days, TARGET, days, TARGET, np.ones(30), borders=days[10:11])
    ax.figure.canvas.draw()
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert labels and max(map(len, labels)) <= 6


def test_past_errors_share_a_scale() -> None:
    first, second = np.full((3, 3), np.nan), np.full((3, 3), np.nan)
    first[np.tril_indices(3)], second[np.tril_indices(3)] = 0.1, [0.5, 1, 2, 3, 4, 5]
    pair = plots.new_figure().subplots(1, 2)
    plots.plot_past_errors(pair, {"ours": first, "theirs": torch.from_numpy(second)}, "RMSE (m)")
    assert [ax.get_title(loc="left") for ax in pair] == ["ours", "theirs"]
    meshes = [ax.collections[0] for ax in pair]
    assert {mesh.get_clim() for mesh in meshes} == {(0.1, 5.0)}
    # A row is a past chunk: the second row of cells is chunk 2, known after chunks 2 and 3.
    drawn = np.ma.filled(meshes[1].get_array().reshape(3, 3), np.nan)
    np.testing.assert_array_equal(drawn[1], [np.nan, 2, 4])
    assert pair[0].figure.axes[-1].get_ylabel() == "RMSE (m)"


def test_past_errors_of_one_method_on_one_axes() -> None:
    ax = axes()
    plots.plot_past_errors(ax, {"": np.array([[0.3]])})
    assert ax.get_xlabel() == "chunks learnt" and ax.get_ylabel() == "past chunk"
    ax = axes()
    plots.plot_past_errors(ax, {"": np.array([[0.3]])}, unit="task")
    assert ax.get_xlabel() == "tasks learnt" and ax.get_ylabel() == "past task"


@pytest.mark.parametrize("matrix", [np.full((2, 2), np.nan), np.zeros((2, 2))], ids=["nothing held out", "no error"])
def test_past_errors_without_a_number_to_show(matrix: np.ndarray) -> None:
    ax = axes()
    plots.plot_past_errors(ax, {"": matrix})
    ax.figure.canvas.draw()


def test_past_errors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="axes: one for each of 2 methods, got 1"):
        plots.plot_past_errors(axes(), {"a": np.ones((1, 1)), "b": np.ones((1, 1))})
    with pytest.raises(ValueError, match=r"errors\['a'\] must have shape \(S, S\), got \(1, 2\)"):
        plots.plot_past_errors(axes(), {"a": np.ones((1, 2))})


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_are_saved_by_the_name_of_the_file(tmp_path: Path, suffix: str, magic: bytes) -> None:
    figure = plots.new_figure(2, 2)
    figure.subplots().plot([1, 2])
    plots.save_figure(figure, tmp_path / f"picture.{suffix}")
    data = (tmp_path / f"picture.{suffix}").read_bytes()
    assert data.startswith(magic)
    if suffix == "svg":
        xml.etree.ElementTree.fromstring(data)


def test_a_format_that_does_not_exist_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.xyz"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="xyz"):
        plots.save_figure(plots.new_figure(), path)
    assert path.read_bytes() == b"old"


def test_global_state_is_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    plots.plot_stream(axes(), TIME, TARGET, GRID, np.sin(GRID), np.ones(200))
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gpseq\[cli\]'"):
        plots.new_figure()


def test_task_scores_show_every_number_that_there_is() -> None:
    scores = np.array([[0.9, np.nan], [0.25, 1.0]])
    pair = list(plots.new_figure().subplots(1, 2))
    plots.plot_task_scores(pair, {"ours": scores, "theirs": torch.from_numpy(scores)}, ["a", "b"])
    for ax in pair:
        shown = {(text.get_position(), text.get_text()) for text in ax.texts}
        assert shown == {((1, 1), "90"), ((2, 1), "25"), ((2, 2), "100")}
    assert pair[0].get_title(loc="left") == "ours: 62 % at the end"
    assert [label.get_text() for label in pair[0].get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="axes: one for each of 1 methods, got 2"):
        plots.plot_task_scores(pair, {"ours": scores}, ["a", "b"])
    with pytest.raises(ValueError, match=r"scores\['ours'\] must have shape \(3, 3\), got \(2, 2\)"):
        plots.plot_task_scores(pair[0], {"ours": scores}, ["a", "b", "c"])


def test_inducing_keys_stand_at_the_lower_edge_whatever_the_range() -> None:
    ax = axes()
    ax.set_ylim(-7, 3)
    plots.plot_inducing(ax, torch.tensor([1.0, 4.0]), label="keys")
    assert ax.get_ylim() == (-7, 3)
    (line,) = ax.lines
    assert line.get_label() == "keys" and line.get_xdata().tolist() == [1.0, 4.0]
    pixels = line.get_transform().transform(line.get_xydata())
    heights = ax.transAxes.inverted().transform(pixels)[:, 1]
    np.testing.assert_allclose(heights, 0.02)


def test_the_parts_of_a_kernel_sum_are_drawn_and_add_up() -> None:
    ax = axes()
    parts = torch.from_numpy(np.stack([np.sin(GRID), np.cos(GRID), GRID], 1))
    plots.plot_kernel_sum(ax, GRID, parts, label="attention")
    *tokens, total = ax.lines
    np.testing.assert_array_equal(np.stack([line.get_ydata() for line in tokens], 1), parts)
    np.testing.assert_allclose(total.get_ydata(), np.sin(GRID) + np.cos(GRID) + GRID)
    assert [handle.get_label() for handle in ax.get_legend_handles_labels()[0]] == ["tokens", "attention"]
    with pytest.raises(ValueError, match=r"parts: expected shape \(200, T\), a row for each query, got \(3, 200\)"):
        plots.plot_kernel_sum(ax, GRID, parts.T)


def test_attention_weights_have_a_sign_and_their_queries() -> None:
    ax = axes()
    plots.plot_attention_weights(ax, torch.tensor([[0.5, 0.0], [-2.0, 1.0], [0.0, 0.25]]), [0.0, 1.0, 3.0])
    (mesh,) = ax.collections
    np.testing.assert_array_equal(np.reshape(mesh.get_array(), (3, 2)), [[0.5, 0.0], [-2.0, 1.0], [0.0, 0.25]])
    assert mesh.get_clim() == (-2.0, 2.0)  # white is zero
    np.testing.assert_allclose(mesh.cmap(mesh.norm(0.0))[:3], 1.0, atol=0.01)
    assert ax.get_ylim()[1] == 4.0  # the cell of the last query ends half a step behind it
    bar = next(other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel() == "weight of the value" and bar.get_ylim() == (-2.0, 1.0)
    with pytest.raises(ValueError, match=r"query: expected shape \(3,\), one for each row of weights, got \(2,\)"):
        plots.plot_attention_weights(ax, np.ones((3, 2)), [0.0, 1.0])
    with pytest.raises(ValueError, match=r"weights: expected shape \(n, T\), got \(2, 3, 3\)"):
        plots.plot_attention_weights(ax, np.ones((2, 3, 3)))


def test_weights_that_are_all_zero_can_be_drawn() -> None:
    figure = plots.new_figure(2, 2)
    ax = figure.subplots()
    plots.plot_attention_weights(ax, np.zeros((2, 2)))
    figure.canvas.draw()
    assert ax.collections[0].norm(0.0) == 0.5
