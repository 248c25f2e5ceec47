"""What a forward hands on, as far as it is uncertain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gpseq.propagation.moments import GaussianState, new_number
from gpseq.propagation.tracing import CannotFollow


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the forward that is uncertain.

    Attributes:
        state: batch first.
        batch: where the forward has the batch; ``None``, nowhere: what is computed from parameters alone.
        number: its own.
    """

    state: GaussianState
    batch: int | None
    number: int = field(default_factory=new_number)

    @property
    def shape(self) -> tuple[int, ...]:
        """In the forward."""
        event = list(self.state.event)
        if self.batch is not None:
            event.insert(self.batch, len(self.state.mean))
        return tuple(event)

    @property
    def dim(self) -> int:
        """In the forward."""
        return len(self.shape)

    def axis(self, dim: int) -> int:
        """Which dimension of events, a negative one, is one of the forward.

        Args:
            dim: in the forward, which may be negative.

        Raises:
            CannotFollow: it is that of the batch.
        """
        dim = dim + self.dim if dim < 0 else dim
        if dim == self.batch:
            raise CannotFollow("{operation} goes over the batch")
        before = int(self.batch is not None and self.batch < dim)
        return dim - before - len(self.state.event)


@dataclass(frozen=True, eq=False)
class Weight:
    """An uncertain parameter that has not been used yet.

    Attributes:
        parameter: as the module has it.
        uses: how many operations get it.
        transposed: whether the forward has turned it.
    """

    parameter: Tensor
    uses: int = 1
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Several:
    """What a module returned, of which only the first is known.

    Attributes:
        first: its state.
        outputs: all of them at the mean.
        path: of the module.
    """

    first: Any
    outputs: Any
    path: str

    def take(self, found: Any) -> Any:
        """One of the outputs.

        Args:
            found: its value at the mean.
        """
        first = self.outputs
        while not isinstance(first, Tensor):
            first = first[0] if isinstance(first, tuple | list) else first.get("logits", next(iter(first.values())))
        if found is not first:
            raise CannotFollow(f"it uses more than the first output of {self.path}")
        return self.first


Operation = Callable[..., Any]
