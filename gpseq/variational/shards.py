"""What an update asks of others where it has only a part of a chunk: sums of what each part adds."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Shards(Protocol):
    """The other parts of a chunk, which other processes hold, and which learn at the same time.

    All calls are collective: every process makes the same ones in the same order, also with an empty part.
    :class:`gpseq.distributed.ProcessShards` is one.
    """

    def agree(self, problem: Exception | None, signature: tuple[int, ...]) -> None:
        """Raise in all processes if one of them has a problem, or if what they bring does not fit together.

        Args:
            problem: of this one; it is raised here.
            signature: numbers that have to be the same in all of them, as many in each.
        """

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all parts, in the order of the processes.

        Args:
            x: ``(n, d)``; n may differ.

        Returns:
            ``(N, d)``, the same in all processes.
        """

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Sums over all processes, in one exchange.

        Args:
            values: float64, of the same shapes in all of them.

        Returns:
            Likewise; the same bits in all of them.
        """

    def largest(self, value: Tensor) -> Tensor:
        """Element by element the largest of all processes.

        Args:
            value: float64, of the same shape in all of them.
        """
