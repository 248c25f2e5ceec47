"""Deviations are drawn where they are, on axes that are alike."""

import numpy as np
import pytest
import torch

from gpseq import plots

pytest.importorskip("matplotlib")


def test_methods_share_one_diagonal_and_limits_that_hold_all_points():
    ax = plots.new_figure().subplots()
    true = torch.tensor([[0.1, 0.2], [0.4, 0.8]])
    plots.plot_deviations(ax, true, true / 2, label="half")
    plots.plot_deviations(ax, true, 3 * true, label="three times", color=plots.VERMILION)
    drawn = {str(line.get_label()): line for line in ax.lines}
    assert list(drawn) == ["equal", "half", "three times"]
    np.testing.assert_allclose(drawn["half"].get_xydata(), np.stack([true.ravel(), true.ravel() / 2], 1))
    assert ax.get_xlim() == ax.get_ylim()
    low, high = ax.get_xlim()
    assert low < 0.05 and high > 2.4
    assert ax.get_xscale() == ax.get_yscale() == "log"


@pytest.mark.parametrize(
    ("reference", "found", "message"),
    [
        pytest.param([1.0, 2.0], [1.0], r"found: expected shape \(2,\)", id="shapes"),
        pytest.param([1.0, 0.0], [1.0, 1.0], "reference: expected positive", id="zero"),
        pytest.param([1.0], [-1.0], "found: expected positive", id="negative"),
        pytest.param([float("nan")], [1.0], "reference: expected positive", id="nan"),
        pytest.param([], [], "reference: expected at least one", id="none"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_drawn(reference, found, message):
    ax = plots.new_figure().subplots()
    with pytest.raises(ValueError, match=message):
        plots.plot_deviations(ax, reference, found)
    assert not ax.lines
