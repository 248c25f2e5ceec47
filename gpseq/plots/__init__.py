"""Pictures. Every function draws on axes that it is given; nothing touches pyplot or global settings.

matplotlib is imported when a picture is drawn: it comes with ``pip install 'gpseq[cli]'``.
"""

from gpseq.plots.attention import plot_attention_weights, plot_inducing, plot_kernel_sum
from gpseq.plots.classification import plot_decision, plot_reliability, plot_risk_coverage
from gpseq.plots.depth import plot_depth_spread
from gpseq.plots.deviations import plot_deviations
from gpseq.plots.streams import plot_band, plot_borders, plot_data, plot_exact, plot_posterior, plot_stream
from gpseq.plots.style import (
    BAND,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    VERMILION,
    date_axis,
    legend_above,
    new_figure,
    save_figure,
    style_axes,
)
from gpseq.plots.tasks import plot_past_errors, plot_task_scores

__all__ = [
    "BAND",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PINK",
    "VERMILION",
    "date_axis",
    "legend_above",
    "new_figure",
    "plot_attention_weights",
    "plot_band",
    "plot_borders",
    "plot_data",
    "plot_decision",
    "plot_depth_spread",
    "plot_deviations",
    "plot_exact",
    "plot_inducing",
    "plot_kernel_sum",
    "plot_past_errors",
    "plot_posterior",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_stream",
    "plot_task_scores",
    "save_figure",
    "style_axes",
]
