r"""Gaussian laws of a matrix of weights W, ``(K, D)``, and what they do to :math:`h = W a` for a random a.

Each law knows the covariance of the noise :math:`(W - \mathrm E W)\, a`, which all tokens of a sequence share, as a
function of the second moments of a.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gpseq.linalg import default_jitter


class Law(ABC):
    """A Gaussian law of a matrix, without its mean."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """K outputs, D inputs."""

    @abstractmethod
    def variance(self, mean: Tensor, variance: Tensor | None = None) -> Tensor:
        r"""Marginal variances of the noise, for inputs whose entries are independent.

        Args:
            mean: of the inputs, ``(..., D)``.
            variance: of the inputs, the same; ``None`` if they are certain.

        Returns:
            ``(..., K)``.
        """

    @abstractmethod
    def blocks(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        """Covariance of the noise of each token, ``(..., K, K)``.

        Args:
            mean: of the inputs, ``(..., D)``.
            covariance: of the inputs, ``(..., D, D)``.
        """

    @abstractmethod
    def tokens(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        """Covariance of the noise of all tokens, ``(B, T, K, T, K)``.

        Args:
            mean: of the inputs, ``(B, T, D)``.
            covariance: of the inputs, ``(B, T, D, T, D)``.
        """

    def marginals(self) -> Tensor:
        """Variances of all entries, ``(K, D)``."""
        raise NotImplementedError(
            f"posterior: {type(self).__name__} does not know the variances of single entries; take a law that does."
        )

    def between(self, places: Tensor) -> Tensor:
        """Covariances of some entries, which may be chosen more than once.

        Args:
            places: of the entries, counted row by row, ``(..., n)``.

        Returns:
            ``(..., n, n)``.
        """
        raise NotImplementedError(
            f"posterior: {type(self).__name__} does not know the covariances of single entries; take covariance="
            "'lowrank' or 'diag'."
        )

    @abstractmethod
    def draw(self, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Draws:
        """Matrices with this covariance.

        Args:
            num_draws: R.
            generator: of the draws; ``None`` is torch's default generator.
            like: gives their dtype and device.
        """

    @abstractmethod
    def rows(self, start: int, stop: int) -> Law:
        """The law of some rows, for outputs from ``start`` to ``stop``."""

    @abstractmethod
    def transposed(self) -> Law:
        """The law of the transposed matrix."""

    @abstractmethod
    def to(self, like: Tensor) -> Law:
        """In the dtype and on the device of a tensor."""

    @abstractmethod
    def scaled(self, factor: Tensor | float) -> Law:
        """With a covariance that is so many times as large."""


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
        rows, columns = (torch.arange(size, device=self.core.device) for size in self.core.shape)
        draws = torch.arange(start, stop, device=self.core.device)
        drawn = self.core * (self._draw_of(rows.unsqueeze(-1), columns) == draws.view(-1, 1, 1))
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
        return replace(self, turned=not self.turned)

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
        core = self.core if self.turned else self.core.mT
        return _gathered(core.mT, self._parts(before=True), self.number).mT.contiguous()


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


def _parted(
    deviation: Tensor,
    num_draws: int,
    generator: torch.Generator | None,
    outputs: Tensor | None = None,
    inputs: Tensor | None = None,
) -> PartedDraws:
    signs = torch.randint(2, deviation.shape, generator=generator, device=deviation.device).to(deviation) * 2 - 1
    if num_draws < len(deviation):
        shifts = torch.randperm(num_draws, generator=generator, device=deviation.device)
    else:
        shifts = torch.randint(num_draws, (len(deviation),), generator=generator, device=deviation.device)
    return PartedDraws(deviation * signs, num_draws, tuple(shifts.tolist()), outputs, inputs)


@dataclass(frozen=True, eq=False)
class Diagonal(Law):
    """Independent entries.

    Attributes:
        entries: variances, ``(K, D)``.
    """

    entries: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.entries.shape[0], self.entries.shape[1]

    def variance(self, mean: Tensor, variance: Tensor | None = None) -> Tensor:
        second = mean.square() if variance is None else mean.square() + variance
        return second @ self.entries.mT

    def blocks(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        variance = None if covariance is None else covariance.diagonal(dim1=-2, dim2=-1)
        return torch.diag_embed(self.variance(mean, variance))

    def tokens(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        second = mean.unsqueeze(2) * mean.unsqueeze(1)  # (B, T, T, D)
        if covariance is not None:
            second = second + covariance.diagonal(dim1=2, dim2=4)
        return torch.diag_embed(second @ self.entries.mT).transpose(2, 3)

    def marginals(self) -> Tensor:
        return self.entries

    def between(self, places: Tensor) -> Tensor:
        same = places.unsqueeze(-1) == places.unsqueeze(-2)
        return torch.where(same, self.entries.flatten()[places].unsqueeze(-1), 0.0)

    def draw(self, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Draws:
        return _parted(self.entries.to(like).sqrt(), num_draws, generator)

    def rows(self, start: int, stop: int) -> Diagonal:
        return Diagonal(self.entries[start:stop])

    def transposed(self) -> Diagonal:
        return Diagonal(self.entries.mT)

    def to(self, like: Tensor) -> Diagonal:
        return Diagonal(self.entries.to(like))

    def scaled(self, factor: Tensor | float) -> Diagonal:
        return Diagonal(self.entries * factor)


@dataclass(frozen=True, eq=False)
class Kronecker(Law):
    r""":math:`\operatorname{Cov}(W_{ki}, W_{lj}) = B_{kl} A_{ij}`.

    Attributes:
        outputs: B, ``(K, K)``.
        inputs: A, ``(D, D)``.
    """

    outputs: Tensor
    inputs: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.outputs), len(self.inputs)

    def variance(self, mean: Tensor, variance: Tensor | None = None) -> Tensor:
        size = ((mean @ self.inputs) * mean).sum(-1, keepdim=True)
        if variance is not None:
            size = size + variance @ self.inputs.diagonal().unsqueeze(-1)
        return size * self.outputs.diagonal()

    def blocks(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        size = ((mean @ self.inputs) * mean).sum(-1)
        if covariance is not None:
            size = size + (covariance * self.inputs).sum((-2, -1))
        return size[..., None, None] * self.outputs

    def tokens(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        size = mean @ self.inputs @ mean.mT
        if covariance is not None:
            size = size + torch.einsum("btisj,ij->bts", covariance, self.inputs)
        return torch.einsum("bts,kl->btksl", size, self.outputs)

    def marginals(self) -> Tensor:
        return self.outputs.diagonal().unsqueeze(-1) * self.inputs.diagonal()

    def between(self, places: Tensor) -> Tensor:
        rows, columns = places // len(self.inputs), places % len(self.inputs)
        return (
            self.outputs[rows.unsqueeze(-1), rows.unsqueeze(-2)]
            * self.inputs[columns.unsqueeze(-1), columns.unsqueeze(-2)]
        )

    def draw(self, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Draws:
        factor = self.to(like)
        ones = like.new_ones(self.shape)
        return _parted(ones, num_draws, generator, _root(factor.outputs), _root(factor.inputs))

    def rows(self, start: int, stop: int) -> Kronecker:
        return Kronecker(self.outputs[start:stop, start:stop], self.inputs)

    def transposed(self) -> Kronecker:
        return Kronecker(self.inputs, self.outputs)

    def to(self, like: Tensor) -> Kronecker:
        return Kronecker(self.outputs.to(like), self.inputs.to(like))

    def scaled(self, factor: Tensor | float) -> Kronecker:
        return Kronecker(self.outputs * factor, self.inputs)


@dataclass(frozen=True, eq=False)
class KroneckerLaplace(Law):
    r""":math:`(B \otimes A + \lambda I)^{-1}` from the eigendecompositions of the factors of the likelihood's part.

    Exact: no damping of the factors. With :math:`e = \operatorname{diag}(U_A^\top \mathrm E[a a^\top] U_A)` the noise
    has the covariance

    .. math:: U_B \operatorname{diag}_k \Bigl( \sum_j \frac{e_j}{\lambda_{Bk} \lambda_{Aj} + \lambda} \Bigr) U_B^\top

    Attributes:
        output_vectors: U_B, ``(K, K)``; some rows of it for some outputs.
        output_values: eigenvalues of B, ``(K,)``.
        input_vectors: U_A, ``(D, D)``; likewise, of the transpose.
        input_values: eigenvalues of A, ``(D,)``.
        precision: lambda, of the prior, ``()``.
    """

    output_vectors: Tensor
    output_values: Tensor
    input_vectors: Tensor
    input_values: Tensor
    precision: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.output_vectors), len(self.input_vectors)

    @property
    def _entries(self) -> Tensor:
        """Variances in the eigenbases, ``(K, D)``."""
        return 1 / (self.output_values.unsqueeze(-1) * self.input_values + self.precision)

    def variance(self, mean: Tensor, variance: Tensor | None = None) -> Tensor:
        second = (mean @ self.input_vectors).square()
        if variance is not None:
            second = second + variance @ self.input_vectors.square()
        return second @ self._entries.mT @ self.output_vectors.square().mT

    def blocks(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        second = (mean @ self.input_vectors).square()
        if covariance is not None:
            second = second + ((covariance @ self.input_vectors) * self.input_vectors).sum(-2)
        return (self.output_vectors * (second @ self._entries.mT).unsqueeze(-2)) @ self.output_vectors.mT

    def tokens(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        turned = mean @ self.input_vectors
        second = turned.unsqueeze(2) * turned.unsqueeze(1)
        if covariance is not None:
            second = second + torch.einsum("btisj,iq,jq->btsq", covariance, self.input_vectors, self.input_vectors)
        spread = second @ self._entries.mT
        return torch.einsum("btsq,kq,lq->btksl", spread, self.output_vectors, self.output_vectors)

    def marginals(self) -> Tensor:
        return self.output_vectors.square() @ self._entries @ self.input_vectors.square().mT

    def between(self, places: Tensor) -> Tensor:
        rows, columns = places // len(self.input_values), places % len(self.input_values)
        both = self.output_vectors[rows].unsqueeze(-1) * self.input_vectors[columns].unsqueeze(-2)
        root = (both * self._entries.sqrt()).flatten(-2)
        return root @ root.mT

    def draw(self, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Draws:
        law = self.to(like)
        return _parted(law._entries.sqrt(), num_draws, generator, law.output_vectors, law.input_vectors)

    def rows(self, start: int, stop: int) -> KroneckerLaplace:
        return replace(self, output_vectors=self.output_vectors[start:stop])

    def transposed(self) -> KroneckerLaplace:
        return KroneckerLaplace(
            self.input_vectors, self.input_values, self.output_vectors, self.output_values, self.precision
        )

    def to(self, like: Tensor) -> KroneckerLaplace:
        return KroneckerLaplace(
            self.output_vectors.to(like),
            self.output_values.to(like),
            self.input_vectors.to(like),
            self.input_values.to(like),
            self.precision.to(like),
        )

    def scaled(self, factor: Tensor | float) -> KroneckerLaplace:
        return KroneckerLaplace(
            self.output_vectors,
            self.output_values / factor,
            self.input_vectors,
            self.input_values,
            self.precision / factor,
        )


@dataclass(frozen=True, eq=False)
class Dense(Law):
    """Any covariance of all entries.

    Attributes:
        entries: ``(K, D, K, D)``.
    """

    entries: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.entries.shape[0], self.entries.shape[1]

    def variance(self, mean: Tensor, variance: Tensor | None = None) -> Tensor:
        own = self.entries.diagonal(dim1=0, dim2=2)  # (D, D, K)
        found = torch.einsum("...i,...j,ijk->...k", mean, mean, own)
        return found if variance is None else found + variance @ own.diagonal(dim1=0, dim2=1).mT

    def blocks(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        second = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        second = second if covariance is None else second + covariance
        return torch.einsum("...ij,kilj->...kl", second, self.entries)

    def tokens(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        second = torch.einsum("bti,bsj->btisj", mean, mean)
        second = second if covariance is None else second + covariance
        return torch.einsum("btisj,kilj->btksl", second, self.entries)

    def marginals(self) -> Tensor:
        return self.entries.flatten(2).flatten(0, 1).diagonal().view(self.shape)

    def between(self, places: Tensor) -> Tensor:
        return self.entries.flatten(2).flatten(0, 1)[places.unsqueeze(-1), places.unsqueeze(-2)]

    def draw(self, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Draws:
        size = self.shape[0] * self.shape[1]
        root = _root(self.entries.to(like).reshape(size, size))
        noise = torch.randn(num_draws, size, generator=generator, dtype=like.dtype, device=like.device)
        return DenseDraws((noise @ root.mT).unflatten(-1, self.shape) * num_draws**-0.5)

    def rows(self, start: int, stop: int) -> Dense:
        return Dense(self.entries[start:stop, :, start:stop])

    def transposed(self) -> Dense:
        return Dense(self.entries.permute(1, 0, 3, 2))

    def to(self, like: Tensor) -> Dense:
        return Dense(self.entries.to(like))

    def scaled(self, factor: Tensor | float) -> Dense:
        return Dense(self.entries * factor)


@dataclass(frozen=True, eq=False)
class LowRank(Law):
    r""":math:`\operatorname{diag}(s) + \sum_r c_r c_r^\top`.

    Attributes:
        columns: ``(R, K, D)``.
        entries: s, ``(K, D)``.
    """

    columns: Tensor
    entries: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.entries.shape[0], self.entries.shape[1]

    def variance(self, mean: Tensor, variance: Tensor | None = None) -> Tensor:
        found = Diagonal(self.entries).variance(mean, variance)
        found = found + torch.einsum("rki,...i->r...k", self.columns, mean).square().sum(0)
        return found if variance is None else found + variance @ self.columns.square().sum(0).mT

    def blocks(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        found = Diagonal(self.entries).blocks(mean, covariance)
        made = torch.einsum("rki,...i->...kr", self.columns, mean)
        found = found + made @ made.mT
        if covariance is not None:
            found = found + torch.einsum("...ij,rki,rlj->...kl", covariance, self.columns, self.columns)
        return found

    def tokens(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        found = Diagonal(self.entries).tokens(mean, covariance)
        made = torch.einsum("rki,bti->btkr", self.columns, mean)
        found = found + torch.einsum("btkr,bslr->btksl", made, made)
        if covariance is not None:
            found = found + torch.einsum("btisj,rki,rlj->btksl", covariance, self.columns, self.columns)
        return found

    def marginals(self) -> Tensor:
        return self.entries + self.columns.square().sum(0)

    def between(self, places: Tensor) -> Tensor:
        columns = self.columns.flatten(1)[:, places].movedim(0, -1)
        return Diagonal(self.entries).between(places) + columns @ columns.mT

    def draw(self, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Draws:
        drawn = Diagonal(self.entries).draw(num_draws, generator, like).dense()
        noise = torch.randn(num_draws, len(self.columns), generator=generator, dtype=like.dtype, device=like.device)
        return DenseDraws(drawn + torch.einsum("nr,rkd->nkd", noise, self.columns.to(like)) * num_draws**-0.5)

    def rows(self, start: int, stop: int) -> LowRank:
        return LowRank(self.columns[:, start:stop], self.entries[start:stop])

    def transposed(self) -> LowRank:
        return LowRank(self.columns.mT, self.entries.mT)

    def to(self, like: Tensor) -> LowRank:
        return LowRank(self.columns.to(like), self.entries.to(like))

    def scaled(self, factor: Tensor | float) -> LowRank:
        return LowRank(self.columns * factor**0.5, self.entries * factor)


def _root(covariance: Tensor) -> Tensor:
    """A square root of a covariance, which may be singular."""
    double = covariance.double()
    size = double.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(
        double + default_jitter(torch.float64) * size * torch.eye(len(double)).to(double)
    )
    return (vectors * values.clamp_min(0).sqrt()).to(covariance.dtype)
