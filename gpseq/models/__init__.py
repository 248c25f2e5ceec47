"""Whole GPs."""

from gpseq.models.streaming_gp import CapacityWarning, StreamingGP
from gpseq.models.warmup import fit_hyperparameters

__all__ = ["CapacityWarning", "StreamingGP", "fit_hyperparameters"]
