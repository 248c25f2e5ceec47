"""The state that travels through a network: a mean and a covariance, in one of four forms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from types import MappingProxyType
from typing import Any

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    BlockDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
)
from torch import Tensor

#: Forms of a covariance, from the cheapest to the one that keeps everything.
FORMS = ("diag", "blockdiag", "lowrank", "full")


@dataclass(frozen=True)
class LinearMap:
    r"""A linear map J between events, which may be another one for each element of the batch.

    Attributes:
        push: :math:`J u` for many vectors at a time, ``(R, B, *event)`` to ``(R, B, *new_event)``.
        squared: :math:`\operatorname{diag}(J \operatorname{diag}(v) J^\top)`, ``(B, *event)`` to ``(B, *new_event)``.
        blocks: covariances of the features of each token, ``(B, *tokens, D, D)`` to the same of the new ones, with
            tokens that are independent; ``None`` where tokens keep to themselves: then ``push`` does it.
        mixes: whether tokens of the old event meet in one of the new.
    """

    push: Callable[[Tensor], Tensor]
    squared: Callable[[Tensor], Tensor]
    blocks: Callable[[Tensor], Tensor] | None = None
    mixes: bool = False


class Covariance(ABC):
    """A covariance of events of a batch, ``(B, *event)``; the last dimension of an event has the features."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Its diagonal, ``(B, *event)``."""

    @abstractmethod
    def apply(self, linear: LinearMap) -> Covariance:
        """That of :math:`J x`."""

    @abstractmethod
    def scale(self, gain: Tensor, remainder: Tensor | None = None) -> Covariance:
        r"""That of elementwise maps: :math:`\Gamma C \Gamma + \operatorname{diag}(\rho)`, both ``(B, *event)``."""

    @abstractmethod
    def move(self, function: Callable[[Tensor], Tensor]) -> Covariance:
        """That of entries that are chosen, put elsewhere or repeated.

        The function takes ``(B, *event)`` and does only that. It may not look at the size of the batch.
        """

    @abstractmethod
    def plus(self, other: Covariance) -> Covariance:
        """That of a sum; what is known of the dependence of the terms is used."""

    @abstractmethod
    def operator(self) -> LinearOperator:
        """As ``(B, E, E)``, over the flat event."""

    def fork(self) -> tuple[Covariance, int]:
        """This covariance, for a branch that meets where it came from again, and the branch's number."""
        return self, -1

    def join(self, branch: Covariance, number: int) -> Covariance:
        """That of the sum of this and what became of a branch of it."""
        return self.plus(branch)


@dataclass(frozen=True, eq=False)
class Diagonal(Covariance):
    """Marginal variances only: whatever meets is taken to be independent.

    Attributes:
        entries: ``(B, *event)``.
    """

    entries: Tensor

    @property
    def variance(self) -> Tensor:
        return self.entries

    def apply(self, linear: LinearMap) -> Diagonal:
        return Diagonal(linear.squared(self.entries))

    def scale(self, gain: Tensor, remainder: Tensor | None = None) -> Diagonal:
        return Diagonal(_scaled(self.entries, gain, remainder))

    def move(self, function: Callable[[Tensor], Tensor]) -> Diagonal:
        return Diagonal(function(self.entries))

    def plus(self, other: Covariance) -> Diagonal:
        return Diagonal(self.entries + other.variance)

    def operator(self) -> LinearOperator:
        return DiagLinearOperator(self.entries.flatten(1))


def _scaled(variance: Tensor, gain: Tensor, remainder: Tensor | None) -> Tensor:
    if remainder is None:
        return variance * gain.square()
    return torch.addcmul(remainder, variance, gain.square())


@dataclass(frozen=True, eq=False)
class Blocks(Covariance):
    """Covariances of the features of each token; tokens are taken to be independent.

    Attributes:
        entries: ``(B, *tokens, D, D)``.
    """

    entries: Tensor

    @property
    def variance(self) -> Tensor:
        return self.entries.diagonal(dim1=-2, dim2=-1)

    def apply(self, linear: LinearMap) -> Blocks:
        if linear.blocks is not None:
            return Blocks(linear.blocks(self.entries))
        if linear.mixes:
            raise ValueError("covariance: blocks of tokens cannot follow this map; take 'lowrank', 'full' or 'diag'.")
        half = linear.push(self.entries.movedim(-1, 0)).movedim(0, -1)  # (B, *tokens, D', D), of C J^T
        return Blocks(linear.push(half.mT.movedim(-1, 0)).movedim(0, -1))

    def scale(self, gain: Tensor, remainder: Tensor | None = None) -> Blocks:
        scaled = gain.unsqueeze(-1) * self.entries * gain.unsqueeze(-2)
        return Blocks(scaled if remainder is None else scaled + torch.diag_embed(remainder))

    def move(self, function: Callable[[Tensor], Tensor]) -> Blocks:
        raise ValueError(
            "covariance: blocks of tokens cannot follow entries that are put elsewhere; take 'lowrank', 'full' or "
            "'diag'."
        )

    def plus(self, other: Covariance) -> Blocks:
        if not isinstance(other, Blocks):
            raise TypeError(f"other: expected Blocks, got {type(other).__name__}.")
        return Blocks(self.entries + other.entries)

    def operator(self) -> LinearOperator:
        blocks = self.entries.flatten(1, -3) if self.entries.dim() > 3 else self.entries.unsqueeze(1)
        return BlockDiagLinearOperator(DenseLinearOperator(blocks))


@dataclass(frozen=True, eq=False)
class LowRank(Covariance):
    r""":math:`C = U U^\top + \operatorname{diag}(d)`, where a column of U is one direction in the whole network.

    Columns that stand for one draw of all weights stay aligned, so that sums of states have the right covariance
    whatever the terms have in common, and tokens share the noise of the weights that they share.

    Attributes:
        columns: U, ``(R, B, *event)``.
        entries: d, ``(B, *event)``; ``None`` is zero.
    """

    columns: Tensor
    entries: Tensor | None = None

    @cached_property
    def variance(self) -> Tensor:
        found = sum_of_squares(self.columns)
        return found if self.entries is None else found + self.entries

    @property
    def rest(self) -> Tensor:
        """d, also where that is zero."""
        return torch.zeros_like(self.columns[0]) if self.entries is None else self.entries

    def _with(self, columns: Tensor, function: Callable[[Tensor], Tensor]) -> LowRank:
        return LowRank(columns, None if self.entries is None else function(self.entries))

    def apply(self, linear: LinearMap) -> LowRank:
        return self._with(linear.push(self.columns), linear.squared)

    def scale(self, gain: Tensor, remainder: Tensor | None = None) -> LowRank:
        columns = self.columns * gain
        if self.entries is None:
            return LowRank(columns, None if remainder is None else remainder.expand_as(columns[0]))
        return LowRank(columns, _scaled(self.entries, gain, remainder))

    def move(self, function: Callable[[Tensor], Tensor]) -> LowRank:
        return self._with(torch.stack([function(column) for column in self.columns]), function)

    def plus(self, other: Covariance) -> LowRank:
        if not isinstance(other, LowRank):
            raise TypeError(f"other: expected LowRank, got {type(other).__name__}.")
        both = [each.entries for each in (self, other) if each.entries is not None]
        return LowRank(self.columns + other.columns, sum(both[1:], both[0]) if both else None)

    def operator(self) -> LinearOperator:
        root = RootLinearOperator(self.columns.flatten(2).permute(1, 2, 0))
        return AddedDiagLinearOperator(root, DiagLinearOperator(self.rest.flatten(1)))


def sum_of_squares(columns: Tensor) -> Tensor:
    """Of many tensors of one shape, ``(R, ...)``, without a tensor of their squares."""
    total = torch.zeros_like(columns[0]) if len(columns) == 0 else columns[0].square()
    for column in columns[1:]:
        total = torch.addcmul(total, column, column)
    return total


_NUMBERS = count()


def new_number() -> int:
    """A number that no branch and no value of a forward has yet."""
    return next(_NUMBERS)


@dataclass(frozen=True, eq=False)
class Full(Covariance):
    r"""Everything.

    Attributes:
        entries: ``(B, N, N)``, over the flat event.
        event: its shape.
        crosses: for each branch that is open, by its number, the covariance of where it began with this,
            ``(B, N_0, N)``.
    """

    entries: Tensor
    event: tuple[int, ...]
    crosses: Mapping[int, Tensor] = field(default_factory=lambda: MappingProxyType({}))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "crosses": dict(self.crosses)}  # a proxy of a mapping cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, crosses=MappingProxyType(state["crosses"]))

    @property
    def variance(self) -> Tensor:
        return self.entries.diagonal(dim1=-2, dim2=-1).unflatten(-1, self.event)

    def _rows(self, linear: LinearMap, matrix: Tensor) -> Tensor:
        r"""``(B, K, N)`` to :math:`(J M^\top)^\top`, ``(B, K, *new_event)``."""
        return linear.push(matrix.unflatten(-1, self.event).movedim(1, 0)).movedim(0, 1)

    def apply(self, linear: LinearMap) -> Full:
        half = self._rows(linear, self.entries)
        event = tuple(half.shape[2:])
        both = self._rows(linear, half.flatten(2).mT).flatten(2)
        crosses = {number: self._rows(linear, cross).flatten(2) for number, cross in self.crosses.items()}
        return Full(both, event, MappingProxyType(crosses))

    def scale(self, gain: Tensor, remainder: Tensor | None = None) -> Full:
        flat = gain.expand(len(self.entries), *self.event).flatten(1)
        scaled = flat.unsqueeze(-1) * self.entries * flat.unsqueeze(-2)
        if remainder is not None:
            scaled = scaled + torch.diag_embed(remainder.expand(len(scaled), *self.event).flatten(1))
        crosses = {number: cross * flat.unsqueeze(-2) for number, cross in self.crosses.items()}
        return Full(scaled, self.event, MappingProxyType(crosses))

    def move(self, function: Callable[[Tensor], Tensor]) -> Full:
        places = torch.arange(math.prod(self.event), device=self.entries.device).view(1, *self.event)
        chosen = function(places)[0]
        index = chosen.flatten()
        crosses = {number: cross[..., index] for number, cross in self.crosses.items()}
        return Full(self.entries[:, index][..., index], tuple(chosen.shape), MappingProxyType(crosses))

    def plus(self, other: Covariance) -> Full:
        if not isinstance(other, Full):
            raise TypeError(f"other: expected Full, got {type(other).__name__}.")
        return Full(self.entries + other.entries, self.event, sum_crosses(self.crosses, other.crosses))

    def with_noise(self, noise: Tensor) -> Full:
        """With an independent covariance ``(B, N, N)`` added."""
        return replace(self, entries=self.entries + noise)

    def operator(self) -> LinearOperator:
        return DenseLinearOperator(self.entries)

    def fork(self) -> tuple[Full, int]:
        number = new_number()
        return replace(self, crosses=MappingProxyType({**self.crosses, number: self.entries})), number

    def join(self, branch: Covariance, number: int) -> Full:
        if not isinstance(branch, Full):
            raise TypeError(f"branch: expected Full, got {type(branch).__name__}.")
        if number not in branch.crosses:
            raise NotImplementedError(
                "covariance: a rule inside a branch made a new covariance, which does not know where the branch began; "
                "use apply, scale or move of the state, or take covariance='lowrank'."
            )
        cross = branch.crosses[number]
        others = {key: value for key, value in branch.crosses.items() if key != number}
        entries = self.entries + branch.entries + cross + cross.mT
        return Full(entries, self.event, sum_crosses(self.crosses, others))


def sum_crosses(crosses: Mapping[int, Tensor], others: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
    """The covariances with open branches of a sum, from those of its two terms."""
    found = dict(crosses)
    for number, cross in others.items():
        found[number] = found[number] + cross if number in found else cross
    return MappingProxyType(found)


@dataclass(frozen=True, eq=False)
class GaussianState:
    """Mean and covariance of what travels, for each element of a batch.

    Attributes:
        mean: ``(B, *event)``, with features last, but for the maps of convolutions, ``(B, C, *positions)``.
        covariance: of the event; ``None`` as long as nothing was uncertain.
    """

    mean: Tensor
    covariance: Covariance | None = None

    @property
    def is_certain(self) -> bool:
        """Whether nothing was uncertain so far."""
        return self.covariance is None

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of an event."""
        return tuple(self.mean.shape[1:])

    @property
    def variance(self) -> Tensor:
        """Marginal variances, ``(B, *event)``."""
        return torch.zeros_like(self.mean) if self.covariance is None else self.covariance.variance

    def apply(self, mean: Tensor, linear: LinearMap) -> GaussianState:
        """The state of a map whose linear part is known, and whose mean is.

        Args:
            mean: the new one, ``(B, *new_event)``.
            linear: the linear part, at the old mean.
        """
        return GaussianState(mean, None if self.covariance is None else self.covariance.apply(linear))

    def scale(self, gain: Tensor, mean: Tensor | None = None, remainder: Tensor | None = None) -> GaussianState:
        r"""The state of an elementwise map.

        Args:
            gain: ``(B, *event)`` or what broadcasts to it.
            mean: the new one; ``None`` is the old one times the gain.
            remainder: variances that are added.
        """
        mean = self.mean * gain if mean is None else mean
        return GaussianState(mean, None if self.covariance is None else self.covariance.scale(gain, remainder))

    def shift(self, offset: Tensor | float) -> GaussianState:
        """The state with a constant added."""
        return replace(self, mean=self.mean + offset)

    def move(self, function: Callable[[Tensor], Tensor]) -> GaussianState:
        """The state of entries that are chosen, put elsewhere or repeated.

        Args:
            function: takes ``(B, *event)`` for any size of the batch, and does only that.
        """
        return GaussianState(function(self.mean), None if self.covariance is None else self.covariance.move(function))

    def branch(self, function: Callable[[GaussianState], GaussianState]) -> GaussianState:
        """Sum of the state and what a function makes of it, x + f(x), with the covariance of the two.

        Args:
            function: f, from state to state.
        """
        if self.covariance is None:
            return self.plus(function(self))
        started, number = self.covariance.fork()
        found = function(replace(self, covariance=started))
        if found.covariance is None:
            return replace(self, mean=self.mean + found.mean)
        return GaussianState(self.mean + found.mean, self.covariance.join(found.covariance, number))

    def plus(self, other: GaussianState) -> GaussianState:
        """The sum of two states, independent but for the columns that they share."""
        mean = self.mean + other.mean
        if self.covariance is None or other.covariance is None:
            return GaussianState(mean, self.covariance if other.covariance is None else other.covariance)
        return GaussianState(mean, self.covariance.plus(other.covariance))

    def __getitem__(self, rows: Any) -> GaussianState:
        raise TypeError("a state has no items; move(lambda x: x[:, rows]) chooses from the events.")
