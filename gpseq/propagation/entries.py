r"""Noise of parameters that act entry by entry: gains, offsets, rows of tables, tokens that are learnt.

An entry that stands at several places of an event has one noise for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpseq.propagation.laws import Law
from gpseq.propagation.moments import Blocks, Covariance, Diagonal, Full, LowRank
from gpseq.propagation.noise import rescaled


@dataclass(frozen=True, eq=False)
class Entries:
    r"""Entries of a parameter, each alone, :math:`\theta_p`, or times an entry of a state, :math:`\theta_p a`.

    Attributes:
        places: p, which entry is at each place of the event, counted row by row: ``(B, *event)`` or ``(1, *event)``.
        factor: mean of a, ``(B, *event)``; ``None`` is one everywhere.
        covariance: of a, where the noise meets it; ``None`` is zero.
    """

    places: Tensor
    factor: Tensor | None = None
    covariance: Covariance | None = None


def entry_noise(
    form: str,
    laws: Sequence[tuple[Law, str]],
    weight: Entries | None = None,
    bias: Entries | None = None,
    columns: Tensor | None = None,
    num_exact: int = 0,
    rescale: bool = True,
    batch: int = 1,
) -> Covariance:
    r"""Covariance of the noise of an elementwise :math:`\gamma_p a + \beta_q`.

    .. math:: \operatorname{Cov}(\delta\gamma_p a_e, \delta\gamma_q a_f)
        = \operatorname{Cov}(\gamma_p, \gamma_q) (m_e m_f + C_{ef})

    Args:
        form: of the covariance.
        laws: of both parameters, each with what it is about: ``"weight"``, ``"bias"``, or ``"both"``, whose matrix has
            the bias as its last column.
        weight: entries of gamma.
        bias: entries of beta.
        columns: draws of the noise, ``(R, B, *event)`` or ``(R, 1, *event)``, which the form ``"lowrank"`` takes.
        num_exact: how many of the columns, the first, are no draws.
        rescale: whether the marginals of draws are made exact.
        batch: B.

    Returns:
        In that form.

    Example:
        >>> from gpseq.propagation.laws import Diagonal as Independent
        >>> places = torch.tensor([[0, 1, 0]])
        >>> noise = entry_noise("full", [(Independent(torch.tensor([[2.0], [3.0]])), "bias")], bias=Entries(places))
        >>> noise.operator().to_dense()
        tensor([[[2., 0., 2.],
                 [0., 3., 0.],
                 [2., 0., 2.]]])
    """
    terms = [(law, _terms(law, part, weight, bias)) for law, part in laws]
    if form in ("blockdiag", "full"):
        covariance = _total([_outer(law, parts, flat=form == "full") for law, parts in terms])
        covariance = covariance.expand(batch, *covariance.shape[1:])
        return Blocks(covariance) if form == "blockdiag" else Full(covariance, tuple(terms[0][1][0].places.shape[1:]))
    first, second = (_total(parts) for parts in zip(*(_marginal(law, parts) for law, parts in terms), strict=True))
    if form == "diag":
        return Diagonal((first + second).expand(batch, *first.shape[1:]))
    if columns is None:
        raise ValueError("columns: expected draws of the noise for the form 'lowrank', got none.")
    columns = rescaled(columns, first, num_exact) if rescale else columns
    event = columns.shape[2:]
    return LowRank(columns.expand(len(columns), batch, *event), second.expand(batch, *event))


def _terms(law: Law, part: str, weight: Entries | None, bias: Entries | None) -> list[Entries]:
    """What a law is about, with places in its own matrix."""
    if part == "both":
        assert weight is not None and bias is not None
        width = law.shape[1]
        rows, columns = weight.places // (width - 1), weight.places % (width - 1)
        return [replace(weight, places=rows * width + columns), replace(bias, places=(bias.places + 1) * width - 1)]
    term = weight if part == "weight" else bias
    assert term is not None
    return [term]


def _outer(law: Law, terms: Sequence[Entries], flat: bool) -> Tensor:
    """Covariance between all entries of the event, ``(B, N, N)``, or those of each token."""
    places = [term.places.flatten(1) if flat else term.places for term in terms]
    width = places[0].shape[-1]
    joint = law.between(places[0] if len(places) == 1 else torch.cat(torch.broadcast_tensors(*places), -1))
    factors = [None if t.factor is None else t.factor.flatten(1) if flat else t.factor for t in terms]
    parts = []
    for i, left in enumerate(factors):
        for j, right in enumerate(factors):
            part = joint[..., i * width : (i + 1) * width, j * width : (j + 1) * width]
            second = joint.new_ones(()) if left is None else left.unsqueeze(-1)
            second = second if right is None else second * right.unsqueeze(-2)
            covariance = terms[i].covariance
            if i == j and isinstance(covariance, Blocks | Full):
                second = second + covariance.entries
            parts.append(part * second)
    return _total(parts)


def _marginal(law: Law, terms: Sequence[Entries]) -> tuple[Tensor, Tensor]:
    """Variances of the event's entries that the factors' means leave, and those that their variances do."""
    if len(terms) == 1:
        (term,) = terms
        known = law.marginals().flatten()[term.places]
        first = known if term.factor is None else known * term.factor.square()
        return first, known.new_zeros(()) if term.covariance is None else known * term.covariance.variance
    places = torch.stack(torch.broadcast_tensors(*(term.places for term in terms)), -1)
    joint = law.between(places)
    factors = torch.stack(
        torch.broadcast_tensors(*(joint.new_ones(()) if t.factor is None else t.factor for t in terms)), -1
    )
    first = (joint * factors.unsqueeze(-1) * factors.unsqueeze(-2)).sum((-2, -1))
    second = [
        joint[..., i, i] * term.covariance.variance for i, term in enumerate(terms) if term.covariance is not None
    ]
    return first, _total(second) if second else first.new_zeros(())


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
