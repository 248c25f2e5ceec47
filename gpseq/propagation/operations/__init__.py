"""Rules for the operations of a forward: functions of torch and methods of tensors, on values that are uncertain."""

from gpseq.propagation.operations import arithmetic, entries, layers
from gpseq.propagation.operations.table import OPERATIONS

__all__ = ["OPERATIONS", "arithmetic", "entries", "layers"]
