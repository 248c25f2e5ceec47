"""Whole GPs."""

from gpseq.models.capacity import CapacityWarning
from gpseq.models.ensemble import StreamingEnsemble
from gpseq.models.fleet import StreamingFleet
from gpseq.models.fleet_store import FleetStore
from gpseq.models.space_time import SpaceTimeStreamingGP
from gpseq.models.streaming_gp import ConvergenceWarning, StreamingGP
from gpseq.models.warmup import fit_hyperparameters

__all__ = [
    "CapacityWarning",
    "ConvergenceWarning",
    "FleetStore",
    "SpaceTimeStreamingGP",
    "StreamingEnsemble",
    "StreamingFleet",
    "StreamingGP",
    "fit_hyperparameters",
]
