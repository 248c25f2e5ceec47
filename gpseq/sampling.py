"""Which rows of a stream are held out, and a uniform sample of rows in bounded memory.

Both depend on the numbers of the rows and a seed alone. So a run that was interrupted goes on with the same choice, and
nothing has to be known in advance about the length of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_OFFSET = 1 << 63  # keys are signed, because torch has int64


def row_key(number: int, seed: int) -> int:
    """A pseudo-random key for a row, by splitmix64: different for all rows under one seed.

    Args:
        number: of the row, from 0.
        seed: any integer.

    Returns:
        An integer that fits int64.

    Source:
        Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators.

    Example:
        >>> row_key(0, seed=0), row_key(1, seed=0)
        (7070836379803831727, -1263085514660420108)
    """
    return _mix((_mix(seed & _MASK) + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK) - _OFFSET


def is_held_out(key: int, fraction: float) -> bool:
    """Whether the row with this key is held out.

    Args:
        key: from :func:`row_key`.
        fraction: of the rows that are, from 0 to 1.
    """
    return key + _OFFSET < fraction * 2.0**64


@dataclass(frozen=True)
class Sample:
    """Of all rows that were offered, those with the smallest keys: a uniform sample in bounded memory.

    Attributes:
        capacity: rows at most.
        seen: rows offered so far.
        key: ``(n,)`` int64, from :func:`row_key`.
        time: ``(n,)`` float64.
        target: ``(n,)`` float64.
        chunk: ``(n,)`` int64, the chunk that each row belongs to.

    Example:
        >>> sample = Sample.empty(capacity=2)
        >>> sample = sample.add(torch.tensor([5, -3, 4]), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3), chunk=0)
        >>> sample.time, sample.is_complete
        (tensor([1., 2.], dtype=torch.float64), False)
    """

    capacity: int
    seen: int
    key: Tensor
    time: Tensor
    target: Tensor
    chunk: Tensor

    @classmethod
    def empty(cls, capacity: int) -> Sample:
        """A sample of no rows."""
        integers, numbers = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        return cls(capacity, 0, integers, numbers, numbers, integers)

    @property
    def is_complete(self) -> bool:
        """Whether it holds every row that was offered."""
        return self.seen <= self.capacity

    def add(self, key: Tensor, time: Tensor, target: Tensor, chunk: int) -> Sample:
        """The sample after more rows.

        Args:
            key: ``(n,)``.
            time: ``(n,)``.
            target: ``(n,)``.
            chunk: the chunk of all of them.

        Returns:
            A new sample, in the order in which the rows came.
        """
        keys = torch.cat([self.key, key])
        kept = keys.argsort()[: self.capacity].sort().values
        return Sample(
            self.capacity,
            self.seen + len(key),
            keys[kept],
            torch.cat([self.time, time.double()])[kept],
            torch.cat([self.target, target.double()])[kept],
            torch.cat([self.chunk, torch.full_like(key, chunk)])[kept],
        )


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
