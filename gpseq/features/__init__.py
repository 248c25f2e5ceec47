"""What inducing variables are: linear functionals of f, as nodes and weights."""

from gpseq.features.base import InducingFeatures
from gpseq.features.composite import CompositeFeatures, PyramidFeatures
from gpseq.features.hippo import CapacityError, HippoFeatures
from gpseq.features.path import PathFeatures
from gpseq.features.points import InducingPoints, spread_points
from gpseq.features.products import space_time_features
from gpseq.features.selected import SelectedPoints

__all__ = [
    "CapacityError",
    "CompositeFeatures",
    "HippoFeatures",
    "InducingFeatures",
    "InducingPoints",
    "PathFeatures",
    "PyramidFeatures",
    "SelectedPoints",
    "space_time_features",
    "spread_points",
]
