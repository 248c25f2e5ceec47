r"""Gaussian laws of a matrix of weights W, ``(K, D)``, and what they do to :math:`h = W a` for a random a.

Each law knows the covariance of the noise :math:`(W - \mathrm E W)\, a`, which all tokens of a sequence share, as a
function of the second moments of a.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpseq.linalg import covariance_root
from gpseq.propagation.draws import DenseDraws, Draws, parted_draws


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

    @abstractmethod
    def marginals(self) -> Tensor:
        """Variances of all entries, ``(K, D)``."""

    @abstractmethod
    def between(self, places: Tensor) -> Tensor:
        """Covariances of some entries, which may be chosen more than once.

        Args:
            places: of the entries, counted row by row, ``(..., n)``.

        Returns:
            ``(..., n, n)``.
        """

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
        return parted_draws(self.entries.to(like).sqrt(), num_draws, generator)

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
        return parted_draws(ones, num_draws, generator, covariance_root(factor.outputs), covariance_root(factor.inputs))

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
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the covariance, which are variances in the eigenbases, ``(K, D)``."""
        return 1 / (self.output_values.unsqueeze(-1) * self.input_values + self.precision)

    def variance(self, mean: Tensor, variance: Tensor | None = None) -> Tensor:
        second = (mean @ self.input_vectors).square()
        if variance is not None:
            second = second + variance @ self.input_vectors.square()
        return second @ self.eigenvalues.mT @ self.output_vectors.square().mT

    def blocks(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        second = (mean @ self.input_vectors).square()
        if covariance is not None:
            second = second + ((covariance @ self.input_vectors) * self.input_vectors).sum(-2)
        return (self.output_vectors * (second @ self.eigenvalues.mT).unsqueeze(-2)) @ self.output_vectors.mT

    def tokens(self, mean: Tensor, covariance: Tensor | None = None) -> Tensor:
        turned = mean @ self.input_vectors
        second = turned.unsqueeze(2) * turned.unsqueeze(1)
        if covariance is not None:
            second = second + torch.einsum("btisj,iq,jq->btsq", covariance, self.input_vectors, self.input_vectors)
        spread = second @ self.eigenvalues.mT
        return torch.einsum("btsq,kq,lq->btksl", spread, self.output_vectors, self.output_vectors)

    def marginals(self) -> Tensor:
        return self.output_vectors.square() @ self.eigenvalues @ self.input_vectors.square().mT

    def between(self, places: Tensor) -> Tensor:
        rows, columns = places // len(self.input_values), places % len(self.input_values)
        both = self.output_vectors[rows].unsqueeze(-1) * self.input_vectors[columns].unsqueeze(-2)
        root = (both * self.eigenvalues.sqrt()).flatten(-2)
        return root @ root.mT

    def draw(self, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Draws:
        law = self.to(like)
        return parted_draws(law.eigenvalues.sqrt(), num_draws, generator, law.output_vectors, law.input_vectors)

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
        root = covariance_root(self.entries.to(like).reshape(size, size))
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
