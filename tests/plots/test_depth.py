"""The spread along the depth is drawn as it is, for one prediction and for several."""

import numpy as np
import pytest
import torch

from gpseq import plots
from gpseq.predictive import Predictive

pytest.importorskip("matplotlib")


def prediction(spread: torch.Tensor) -> Predictive:
    return Predictive.from_samples(torch.zeros(2, len(spread), 3), scores={"spread.depth": spread})


def test_lines_are_medians_and_bands_lie_between_quantiles():
    ax = plots.new_figure().subplots()
    known, strange = torch.rand(50, 4), 1 + torch.rand(30, 4)
    plots.plot_depth_spread(ax, [prediction(known), strange], labels=["known", "strange"], quantiles=(0.25, 0.75))
    lines = {str(line.get_label()): line for line in ax.lines}
    assert list(lines) == ["known", "strange"]
    assert lines["known"].get_color() != lines["strange"].get_color()
    for (line, band), spread in zip(zip(lines.values(), ax.collections, strict=True), (known, strange), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
        np.testing.assert_allclose(line.get_ydata(), np.median(spread, 0), rtol=1e-6)
        heights = band.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose(heights.max(), np.quantile(spread, 0.75, axis=0).max(), rtol=1e-6)
        np.testing.assert_allclose(heights.min(), np.quantile(spread, 0.25, axis=0).min(), rtol=1e-6)
    assert ax.get_ylim()[0] == 0


@pytest.mark.parametrize("given", ["prediction", "tensor", "list"])
def test_one_prediction_needs_no_list_and_no_label(given):
    ax = plots.new_figure().subplots()
    spread = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], requires_grad=True)
    one = {"prediction": prediction(spread), "tensor": spread, "list": spread.tolist()}[given]
    plots.plot_depth_spread(ax, one)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[2.0, 3.0, 4.0]]
    assert ax.get_legend_handles_labels()[1] == []


def test_tokens_count_one_by_one_and_sizes_divide():
    ax = plots.new_figure().subplots()
    plots.plot_depth_spread(ax, prediction(torch.tensor([[[2.0, 8.0]], [[4.0, 4.0]]])), sizes=torch.tensor([1.0, 2.0]))
    assert ax.lines[0].get_ydata().tolist() == [3.0, 3.0]
    assert "relative" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        pytest.param([], {}, "predictions: expected at least one", id="none"),
        pytest.param(
            Predictive.from_samples(torch.zeros(2, 3, 4)), {}, r"predictions: .*'spread.depth'.*none", id="no score"
        ),
        pytest.param(torch.ones(3), {}, r"predictions: expected spreads \(B, L\)", id="one dimension"),
        pytest.param(torch.ones(0, 3), {}, r"predictions: expected spreads \(B, L\)", id="empty"),
        pytest.param(torch.ones(2, 3), {"labels": ["a", "b"]}, "labels: expected 1", id="labels"),
        pytest.param(torch.ones(2, 3), {"labels": "a"}, "labels: expected 1", id="label that is no list"),
        pytest.param(torch.ones(2, 3), {"colors": []}, "colors: expected 1", id="colours"),
        pytest.param(torch.ones(2, 3), {"quantiles": (0.9, 0.1)}, "quantiles: expected", id="quantiles"),
        pytest.param(torch.ones(2, 3), {"quantiles": (0.1, float("nan"))}, "quantiles: expected", id="nan"),
        pytest.param(torch.ones(2, 3), {"sizes": [1.0, 2.0]}, "sizes: expected 3", id="sizes"),
        pytest.param(torch.ones(2, 3), {"sizes": [1.0, 0.0, 1.0]}, "sizes: expected 3", id="zero"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_drawn(given, options, message):
    ax = plots.new_figure().subplots()
    with pytest.raises(ValueError, match=message):
        plots.plot_depth_spread(ax, given, **options)
    assert not ax.lines and not ax.collections
