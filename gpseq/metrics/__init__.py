"""How good a prediction is: pure functions on tensors.

The last dimension of what is scored counts the n predictions, dimensions before it are a batch, and there is one result
for each of its elements. Floating-point arguments may be float32 or float64; sums are accumulated in float64, and
results have the dtype of the argument, at least float32. :func:`rmse`, :func:`nlpd`, :func:`accuracy` and the two
``_nlpd`` of labels look at shapes at most, and give NaN for nothing to score and for NaN. All the others refuse empty
input and NaN; beyond that check of their arguments nothing is read back from the device. Scores of what was generated,
such as :func:`frechet`, compare two sets whose elements are counted by the first dimension.
"""

from gpseq.metrics.calibration import (
    ReliabilityBins,
    adaptive_ece,
    class_averaged_ece,
    class_pooled_ece,
    mce,
    reliability_bins,
    top_label_ece,
)
from gpseq.metrics.continual import (
    average_forgetting,
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
)
from gpseq.metrics.detection import ood_aupr, ood_auroc, ood_fpr
from gpseq.metrics.generation import frechet, frechet_distance, precision_recall
from gpseq.metrics.intervals import gaussian_interval, interval_coverage, interval_width, pinball_loss
from gpseq.metrics.labels import accuracy, bernoulli_nlpd, brier_score, categorical_nlpd, matthews_correlation
from gpseq.metrics.regression import crps_gaussian, crps_samples, nlpd, rmse
from gpseq.metrics.selection import (
    accuracy_rejection_curve,
    aurc,
    coverage_at_risk,
    excess_aurc,
    risk_at_coverage,
    risk_coverage_curve,
)

__all__ = [
    "ReliabilityBins",
    "accuracy",
    "accuracy_rejection_curve",
    "adaptive_ece",
    "aurc",
    "average_forgetting",
    "average_score",
    "backward_transfer",
    "bernoulli_nlpd",
    "brier_score",
    "categorical_nlpd",
    "class_averaged_ece",
    "class_pooled_ece",
    "coverage_at_risk",
    "crps_gaussian",
    "crps_samples",
    "excess_aurc",
    "forgetting",
    "forward_transfer",
    "frechet",
    "frechet_distance",
    "gaussian_interval",
    "interval_coverage",
    "interval_width",
    "matthews_correlation",
    "mce",
    "nlpd",
    "ood_aupr",
    "ood_auroc",
    "ood_fpr",
    "pinball_loss",
    "precision_recall",
    "reliability_bins",
    "risk_at_coverage",
    "risk_coverage_curve",
    "rmse",
    "top_label_ece",
]
