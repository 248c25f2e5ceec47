"""Features: what the inducing variables u are."""

from gpseq.features.base import InducingFeatures
from gpseq.features.hippo import CapacityError, HippoFeatures
from gpseq.features.points import InducingPoints

__all__ = ["CapacityError", "HippoFeatures", "InducingFeatures", "InducingPoints"]
