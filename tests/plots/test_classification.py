"""Pictures of probabilities hold what they were given."""

import numpy as np
import pytest
import torch

from gpseq import metrics, plots

matplotlib = pytest.importorskip("matplotlib")

LABEL = torch.tensor([0, 1, 1, 0, 1, 1])
PROBABILITY = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.75, 0.25], [0.6, 0.4], [0.05, 0.95]])


def axes() -> "matplotlib.axes.Axes":
    return plots.new_figure(4, 4).subplots()


def test_a_reliability_diagram_shows_the_bins_that_are_not_empty() -> None:
    bins = metrics.reliability_bins(PROBABILITY, LABEL, 5)
    ax = axes()
    plots.plot_reliability(ax, bins.confidence, bins.accuracy, bins.count, bins.edges, label="ours")
    diagonal, line = ax.lines
    assert (diagonal.get_label(), line.get_label()) == ("calibrated", "ours") and diagonal.is_dashed()
    seen = bins.count > 0
    np.testing.assert_array_equal(line.get_xdata(), bins.confidence[seen])
    np.testing.assert_array_equal(line.get_ydata(), bins.accuracy[seen])
    (points,) = ax.collections
    np.testing.assert_array_equal(points.get_offsets(), np.stack([bins.confidence[seen], bins.accuracy[seen]], 1))
    assert points.get_sizes().argmax() == bins.count[seen].argmax()
    assert [bar.get_x() for bar in ax.patches] == pytest.approx(bins.edges[:-1].tolist())
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx((0.3 * bins.count / 6).tolist())
    assert ax.get_xlim() == (0, 1) == ax.get_ylim()


def test_methods_share_a_diagonal_and_need_no_counts() -> None:
    ax = axes()
    plots.plot_reliability(ax, [0.5, np.nan, 0.9], [0.4, np.nan, 1.0], label="one")
    plots.plot_reliability(ax, [0.5, 0.8], [0.5, 0.7], label="two", color=plots.ORANGE)
    assert [line.get_label() for line in ax.lines] == ["calibrated", "one", "two"]
    assert ax.lines[1].get_xdata().tolist() == [0.5, 0.9] and not ax.patches


def test_bins_that_do_not_fit_are_named() -> None:
    ax = axes()
    with pytest.raises(
        ValueError, match=r"accuracy: expected shape \(B,\), as confidence has, got \(3,\) beside \(2,\)"
    ):
        plots.plot_reliability(ax, [0.5, 0.6], [0.5, 0.6, 0.7])
    with pytest.raises(ValueError, match=r"count: expected shape \(2,\), as confidence has, got \(1,\)"):
        plots.plot_reliability(ax, [0.5, 0.6], [0.5, 0.6], [3])
    with pytest.raises(ValueError, match=r"edges: expected shape \(3,\), got \(2,\)"):
        plots.plot_reliability(ax, [0.5, 0.6], [0.5, 0.6], [3, 4], edges=[0, 1])
    assert not ax.lines and not ax.patches


def test_risk_against_coverage_with_the_best_order_below() -> None:
    uncertainty, wrong = 1 - PROBABILITY.amax(-1), PROBABILITY.argmax(-1) != LABEL
    coverage, risk = metrics.risk_coverage_curve(uncertainty, wrong)
    best = metrics.risk_coverage_curve(wrong.float(), wrong)[1]
    ax = axes()
    plots.plot_risk_coverage(ax, coverage, risk, best, label="confidence")
    line, floor = ax.lines
    np.testing.assert_array_equal(line.get_xydata(), np.stack([coverage, risk], 1))
    np.testing.assert_array_equal(floor.get_ydata(), best)
    assert [handle.get_label() for handle in ax.get_legend_handles_labels()[0]] == ["confidence"]
    assert ax.get_xlim() == (0, 1) and ax.get_ylim()[0] == 0
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("coverage", "error on what is kept")
    with pytest.raises(ValueError, match=r"risk: expected shape \(n,\), as coverage has, got \(5,\) beside \(6,\)"):
        plots.plot_risk_coverage(ax, coverage, risk[:5])
    with pytest.raises(ValueError, match=r"best: expected shape \(n,\), as coverage has, got \(2,\) beside \(6,\)"):
        plots.plot_risk_coverage(axes(), coverage, risk, best[:2])


def test_losses_may_be_negative() -> None:
    ax = axes()
    plots.plot_risk_coverage(ax, [0.5, 1.0], [-2.0, 1.0], risk_label="nats")
    assert ax.get_ylim()[0] < -2 and ax.get_ylabel() == "nats"
