"""Uncertainty of weights through a network in one pass: mean and covariance instead of many draws."""

from gpseq.propagation.calibration import Calibration, LayerCalibration, calibrate, calibrate_layers
from gpseq.propagation.checking import Comparison, check, sample
from gpseq.propagation.contributions import Contributions, layer_contributions
from gpseq.propagation.curvature import Curvature, optimise_prior_precision
from gpseq.propagation.forward import Plan, plan, propagate
from gpseq.propagation.laplace import fit_curvature, fit_laplace
from gpseq.propagation.linearisation import linearised
from gpseq.propagation.makers import from_columns, from_covariance, from_factors, from_variances
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.parts import PartMoments
from gpseq.propagation.posteriors import WeightPosterior
from gpseq.propagation.registry import register
from gpseq.propagation.streamlined import Streamlined, streamline

__all__ = [
    "Calibration",
    "Comparison",
    "Contributions",
    "Curvature",
    "GaussianState",
    "LayerCalibration",
    "PartMoments",
    "Plan",
    "Streamlined",
    "WeightPosterior",
    "calibrate",
    "calibrate_layers",
    "check",
    "fit_curvature",
    "fit_laplace",
    "from_columns",
    "from_covariance",
    "from_factors",
    "from_variances",
    "layer_contributions",
    "linearised",
    "optimise_prior_precision",
    "plan",
    "propagate",
    "register",
    "sample",
    "streamline",
]
