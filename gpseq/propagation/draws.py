"""Draws of a matrix of weights, and what they make of its inputs."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


class Draws(ABC):
    r"""Matrices :math:`\delta W_r`, ``(R, K, D)``, scaled so that :math:`\sum_r` of their squares is the variance."""

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """Products with inputs ``(..., D)``: ``(R, ..., K)``."""

    @abstractmethod
    def __len__(self) -> int:
        """R."""

    @abstractmethod
    def some(self, start: int, stop: int) -> Tensor:
        """Matrices from ``start`` to ``stop``, ``(n, K, D)``."""

    def dense(self) -> Tensor:
        """All of them, ``(R, K, D)``."""
        return self.some(0, len(self))

    @abstractmethod
    def transposed(self) -> Draws:
        """Of the transposed matrices."""

    def at(self, places: Tensor) -> Tensor:
        """Some entries, counted row by row: ``(R, *places)``."""
        return self.dense().flatten(1)[:, places]


@dataclass(frozen=True, eq=False)
class DenseDraws(Draws):
    """Draws that are stored.

    Attributes:
        entries: ``(R, K, D)``.
    """

    entries: Tensor

    def times(self, x: Tensor) -> Tensor:
        return torch.einsum("rkd,...d->r...k", self.entries, x)

    def __len__(self) -> int:
        return len(self.entries)

    def some(self, start: int, stop: int) -> Tensor:
        return self.entries[start:stop]

    def transposed(self) -> DenseDraws:
        return DenseDraws(self.entries.mT)


@dataclass(frozen=True, eq=False)
class PartedDraws(Draws):
    r"""One random matrix, each entry of which belongs to one of the R draws.

    .. math:: \delta W_r = Q_K (E \odot 1[p = r]) Q_D^\top, \qquad
        p_{ki} = (i + s_k) \bmod R

    The entries of E are deviations with random signs, and the shifts s are random, the same for blocks of outputs where
    there are more of them than draws. Sums of squares of what the draws make of an input have the right
    expectation, and scatter as with R draws of all entries, which would each have one part in R of every variance; but
    here all R products together cost no more than one, and no draw is stored.

    Attributes:
        core: E, ``(K, D)``.
        number: R.
        shifts: s of each block of outputs, min(K, R) numbers below R; blocks differ by one in size at most.
        outputs: Q_K, ``(K, K)``; ``None`` is the identity.
        inputs: Q_D, ``(D, D)``; likewise.
        turned: whether the draws are the transposes, ``(D, K)``.
    """

    core: Tensor
    number: int
    shifts: tuple[int, ...]
    outputs: Tensor | None = None
    inputs: Tensor | None = None
    turned: bool = False

    def __len__(self) -> int:
        return self.number

    def times(self, x: Tensor) -> Tensor:
        before, after = (self.outputs, self.inputs) if self.turned else (self.inputs, self.outputs)
        x = x if before is None else x @ before
        parts = _gathered(x.reshape(-1, x.shape[-1]), self._parts(before=True), self.number)
        made = parts @ self._core_of_parts  # what each part of the inputs gives
        drawn = torch.empty_like(made)
        for label, some in self._parts(before=False):  # outputs take parts in turns
            drawn[:label, :, some] = made[self.number - label :, :, some]
            drawn[label:, :, some] = made[: self.number - label, :, some]
        drawn = drawn.view(self.number, *x.shape[:-1], -1)
        return drawn if after is None else drawn @ after.mT

    def some(self, start: int, stop: int) -> Tensor:
        draws = torch.arange(start, stop, device=self.core.device, dtype=self._labels.dtype)
        drawn = self.core * (self._labels == draws.view(-1, 1, 1))
        drawn = drawn if self.inputs is None else drawn @ self.inputs.mT
        drawn = drawn if self.outputs is None else self.outputs @ drawn
        return drawn.mT if self.turned else drawn

    def at(self, places: Tensor) -> Tensor:
        if self.outputs is not None or self.inputs is not None:
            return super().at(places)
        width = self.core.shape[0 if self.turned else 1]
        rows, columns = places // width, places % width
        rows, columns = (columns, rows) if self.turned else (rows, columns)
        draws = torch.arange(self.number, device=places.device).view(-1, *[1] * places.dim())
        return self.core[rows, columns] * (self._draw_of(rows, columns) == draws)

    def transposed(self) -> PartedDraws:
        return self._transposed

    @cached_property
    def _transposed(self) -> PartedDraws:
        # One object for all parts of a batch: what it computes once it keeps, too.
        return replace(self, turned=not self.turned)

    @cached_property
    def _labels(self) -> Tensor:
        """Of all entries of the core, p."""
        rows, columns = (torch.arange(size, device=self.core.device) for size in self.core.shape)
        return self._draw_of(rows.unsqueeze(-1), columns).to(torch.int16 if self.number < 2**15 else torch.int64)

    def _draw_of(self, rows: Tensor, columns: Tensor) -> Tensor:
        """p, which draw an entry of the core belongs to."""
        shifts = torch.tensor(self.shifts, device=rows.device)
        return (columns + shifts[rows * len(shifts) // self.core.shape[0]]) % self.number

    def _parts(self, before: bool) -> list[tuple[int, slice]]:
        """Places of inputs, or of outputs, that have the same part in p, with that."""
        rows, columns = self.core.shape
        if self.turned != before:
            return [(label, slice(label, None, self.number)) for label in range(min(self.number, columns))]
        count = len(self.shifts)
        edges = [-(-block * rows // count) for block in range(count + 1)]
        return [(shift, slice(*ends)) for shift, ends in zip(self.shifts, itertools.pairwise(edges), strict=True)]

    @cached_property
    def _core_of_parts(self) -> Tensor:
        """The core, ``(R, n, K)``, for the inputs of each part."""
        core = self.core.mT if self.turned else self.core
        return _gathered(core, self._parts(before=True), self.number).mT.contiguous()


def parted_draws(
    deviation: Tensor,
    num_draws: int,
    generator: torch.Generator | None,
    outputs: Tensor | None = None,
    inputs: Tensor | None = None,
) -> PartedDraws:
    """Draws of a matrix whose entries are independent, in bases that may be others than its own.

    Args:
        deviation: of the entries, ``(K, D)``.
        num_draws: R.
        generator: of the draws; ``None`` is torch's default generator.
        outputs: the basis of the outputs, ``(K, K)``; ``None`` is the identity.
        inputs: that of the inputs, ``(D, D)``; likewise.
    """
    signs = torch.randint(2, deviation.shape, generator=generator, device=deviation.device).to(deviation) * 2 - 1
    if num_draws < len(deviation):
        shifts = torch.randperm(num_draws, generator=generator, device=deviation.device)
    else:
        shifts = torch.randint(num_draws, (len(deviation),), generator=generator, device=deviation.device)
    return PartedDraws(deviation * signs, num_draws, tuple(shifts.tolist()), outputs, inputs)


def _gathered(x: Tensor, parts: Sequence[tuple[int, slice]], number: int) -> Tensor:
    """Some columns of a matrix ``(n, D)`` for each part, ``(R, n, d)``, filled up with zeros."""
    labels: dict[int, int] = {}
    found = x.new_zeros(number, len(x), _longest(parts, x.shape[-1]))
    for label, some in parts:
        chosen, start = x[:, some], labels.get(label, 0)
        labels[label] = start + chosen.shape[-1]
        found[label, :, start : labels[label]] = chosen
    return found


def _longest(parts: Sequence[tuple[int, slice]], size: int) -> int:
    """Most places that one label has."""
    total: Counter[int] = Counter()
    for label, some in parts:
        total[label] += len(range(size)[some])
    return max(total.values())
