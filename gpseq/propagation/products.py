r"""Products of what travels: gates.

For Gaussian a and b with the covariance c,

.. math:: \mathrm E\,ab = m_a m_b + c, \qquad
    \operatorname{Var} ab = m_a^2 v_b + m_b^2 v_a + 2 m_a m_b c + v_a v_b + c^2,

and between two products

.. math:: m_{bi} m_{bj} C^{aa}_{ij} + m_{ai} m_{aj} C^{bb}_{ij} + m_{bi} m_{aj} C^{ab}_{ij} + m_{ai} m_{bj} C^{ab}_{ji}
    + C^{aa}_{ij} C^{bb}_{ij} + C^{ab}_{ij} C^{ab}_{ji}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from gpseq.propagation.activations import activation_moments
from gpseq.propagation.moments import Blocks, Covariance, Diagonal, Full, GaussianState, LowRank
from gpseq.propagation.walk import Walk


def product(first: GaussianState, second: GaussianState, tangent: bool = False) -> GaussianState:
    """The elementwise product of two states.

    Marginal forms take the two to be independent. The form ``"lowrank"`` knows what they share by their columns.

    Args:
        first: ``(B, *event)``.
        second: likewise.
        tangent: without what is of second order in the covariances.

    Returns:
        ``(B, *event)``, exact mean and covariance of a product of Gaussians, but for what the form does not know.

    Raises:
        NotImplementedError: both are uncertain in the form ``"full"``: two states do not say what is between them.

    Example:
        >>> from gpseq.propagation.moments import Diagonal
        >>> a = GaussianState(torch.tensor([[2.0]]), Diagonal(torch.tensor([[0.5]])))
        >>> b = GaussianState(torch.tensor([[3.0]]), Diagonal(torch.tensor([[0.1]])))
        >>> product(a, b).variance
        tensor([[4.9500]])
    """
    mean = first.mean * second.mean
    for one, other in ((first, second), (second, first)):
        if one.covariance is None:
            return other.scale(one.mean.expand_as(mean), mean)
    a, b = first.covariance, second.covariance
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return _lowrank(first.mean, second.mean, a, b, tangent)
    if isinstance(a, Diagonal) and isinstance(b, Diagonal):
        variance = second.mean.square() * a.entries + first.mean.square() * b.entries
        return GaussianState(mean, Diagonal(variance if tangent else variance + a.entries * b.entries))
    if isinstance(a, Blocks) and isinstance(b, Blocks):
        return GaussianState(mean, Blocks(_dense(first.mean, second.mean, a.entries, None, b.entries, tangent)))
    raise NotImplementedError(
        "covariance: the product of two states in the form 'full' needs what is between them; expected the halves of "
        "one state, see gpseq.propagation.products.gated."
    )


def gated(
    state: GaussianState,
    walk: Walk,
    function: str | Callable[[Tensor], Tensor] | None = "sigmoid",
    gate: int = 1,
    dim: int = -1,
) -> GaussianState:
    r"""The product of the halves of a state, one of which goes through a function: :math:`a\, g(b)`.

    The covariance of the halves is known in all forms but the marginal one. A gate and a value that come from matrices
    of their own are one state by ``walk.linears(state, [(value.weight, value.bias), (gate.weight, gate.bias)])``.

    Args:
        state: ``(B, *event)``.
        walk: of the network; with ``activations="tangent"`` the product is of first order, too.
        function: the name of an activation, or any elementwise function; ``None`` is the identity.
        gate: which half goes through it, 0 or 1.
        dim: that is halved, negative or counted with the batch.

    Returns:
        ``(B, *event)`` with half as many along that dimension.

    Raises:
        ValueError: the dimension is that of the batch, or cannot be halved, or there is no such half.
    """
    dims = state.mean.dim()
    if not -dims < dim < dims or dim == 0 or state.mean.shape[dim] % 2:
        raise ValueError(f"dim: expected an even dimension of an event of shape {state.event}, got {dim}.")
    if gate not in (0, 1):
        raise ValueError(f"gate: expected 0 or 1, got {gate!r}.")
    dim = dim if dim < 0 else dim - dims
    method = walk.options.activations
    if function is not None:
        means, variances = state.mean.chunk(2, dim), state.variance.chunk(2, dim)
        found = activation_moments(function, means[gate], variances[gate], method=method)

        def beside(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat([one, other] if gate == 0 else [other, one], dim)

        value = means[1 - gate]
        state = state.scale(
            beside(found.gain, torch.ones_like(value)),
            beside(found.mean, value),
            beside(found.remainder, torch.zeros_like(value)),
        )
    return _halves(state, dim, tangent=method == "tangent")


def _halves(state: GaussianState, dim: int, tangent: bool) -> GaussianState:
    """The product of the halves of a state along a dimension, a negative one."""
    first, second = state.mean.chunk(2, dim)
    covariance = state.covariance
    if isinstance(covariance, Full):
        return _full(state.mean, covariance, dim, tangent)
    if isinstance(covariance, Blocks) and dim == -1:
        (aa, ab), (_, bb) = (rows.chunk(2, -1) for rows in covariance.entries.chunk(2, -2))
        return GaussianState(*_exact(first, second, aa, ab, bb, tangent, Blocks))
    parts: tuple[Covariance | None, Covariance | None] = (None, None)
    if isinstance(covariance, Diagonal):
        one, other = covariance.entries.chunk(2, dim)
        parts = Diagonal(one), Diagonal(other)
    elif isinstance(covariance, Blocks):
        one, other = covariance.entries.chunk(2, dim - 1)
        parts = Blocks(one), Blocks(other)
    elif isinstance(covariance, LowRank):
        columns, entries = covariance.columns.chunk(2, dim), covariance.rest.chunk(2, dim)
        parts = LowRank(columns[0], entries[0]), LowRank(columns[1], entries[1])
    return product(GaussianState(first, parts[0]), GaussianState(second, parts[1]), tangent)


def _exact(
    first: Tensor,
    second: Tensor,
    aa: Tensor,
    ab: Tensor,
    bb: Tensor,
    tangent: bool,
    kind: Callable[[Tensor], Covariance],
) -> tuple[Tensor, Covariance]:
    mean = first * second
    mean = mean if tangent else mean + ab.diagonal(dim1=-2, dim2=-1)
    return mean, kind(_dense(first, second, aa, ab, bb, tangent))


def _dense(first: Tensor, second: Tensor, aa: Tensor, ab: Tensor | None, bb: Tensor, tangent: bool) -> Tensor:
    """Covariance of products, ``(..., D, D)``, from means ``(..., D)`` and covariances."""
    rows, columns = first.unsqueeze(-1), first.unsqueeze(-2)
    other_rows, other_columns = second.unsqueeze(-1), second.unsqueeze(-2)
    total = other_rows * aa * other_columns + rows * bb * columns
    if not tangent:
        total = total + aa * bb
    if ab is None:
        return total
    mixed = other_rows * ab * columns
    total = total + mixed + mixed.mT
    return total if tangent else total + ab * ab.mT


def _full(mean: Tensor, covariance: Full, dim: int, tangent: bool) -> GaussianState:
    places = torch.arange(math.prod(covariance.event), device=mean.device).view(covariance.event)
    chosen = places.chunk(2, dim)
    one, other = (index.flatten() for index in chosen)
    first, second = mean.flatten(1)[:, one], mean.flatten(1)[:, other]
    event = tuple(chosen[0].shape)
    entries = covariance.entries
    aa, ab, bb = entries[:, one][..., one], entries[:, one][..., other], entries[:, other][..., other]
    # Where a branch began is Gaussian with both: nothing of second order is between it and their product.
    crosses = {
        number: cross[..., one] * second.unsqueeze(-2) + cross[..., other] * first.unsqueeze(-2)
        for number, cross in covariance.crosses.items()
    }
    known = MappingProxyType(crosses)
    found, total = _exact(first, second, aa, ab, bb, tangent, lambda entries: Full(entries, event, known))
    return GaussianState(found.unflatten(1, event), total)


def _lowrank(first: Tensor, second: Tensor, a: LowRank, b: LowRank, tangent: bool) -> GaussianState:
    columns = second * a.columns + first * b.columns
    entries = second.square() * a.rest + first.square() * b.rest
    if tangent:
        return GaussianState(first * second, LowRank(columns, entries))
    shared = (a.columns * b.columns).sum(0)
    return GaussianState(first * second + shared, LowRank(columns, entries + a.variance * b.variance + shared.square()))
