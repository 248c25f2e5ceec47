"""What the noise of a layer's weights adds to a state, in each form of a covariance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpseq.propagation.draws import Draws
from gpseq.propagation.laws import Law
from gpseq.propagation.moments import Blocks, Full, GaussianState, sum_of_squares


def augment(state: GaussianState, part: str) -> tuple[Tensor, Tensor | None]:
    """Mean and marginal variance of what a law multiplies: the input, a one, or the input with a one appended."""
    mean = state.mean
    one = mean.new_ones(*mean.shape[:-1], 1)
    if part == "bias":
        return one, None
    variance = None if state.covariance is None else state.covariance.variance
    if part == "weight":
        return mean, variance
    return torch.cat([mean, one], -1), None if variance is None else torch.cat([variance, 0 * one], -1)


def diagonal_noise(laws: Sequence[tuple[Law, str]], state: GaussianState, products: bool) -> Tensor:
    """Marginal variances, ``(B, *tokens, K)``."""
    total: Tensor | float = 0.0
    for law, part in laws:
        mean, variance = augment(state, part)
        total = total + law.variance(mean, variance if products else None)
    assert isinstance(total, Tensor)
    return total


def block_noise(laws: Sequence[tuple[Law, str]], state: GaussianState, products: bool) -> Tensor:
    """Covariances of each token, ``(B, *tokens, K, K)``."""
    total: Tensor | float = 0.0
    for law, part in laws:
        mean, variance = augment(state, part)
        covariance = None
        if variance is not None and products and isinstance(state.covariance, Blocks):
            covariance = state.covariance.entries
            if part == "both":
                covariance = torch.nn.functional.pad(covariance, (0, 1, 0, 1))
        total = total + law.blocks(mean, covariance)
    assert isinstance(total, Tensor)
    return total


def full_noise(laws: Sequence[tuple[Law, str]], state: GaussianState, products: bool) -> Tensor:
    """Covariance over tokens and features, ``(B, N, N)``, for N = T K."""
    total: Tensor | float = 0.0
    for law, part in laws:
        mean, variance = augment(state, part)
        width = mean.shape[-1]
        mean = mean.reshape(len(mean), -1, width)
        covariance = None
        if variance is not None and products and isinstance(state.covariance, Full):
            inner = state.mean.shape[-1]
            covariance = state.covariance.entries.unflatten(2, (-1, inner)).unflatten(1, (-1, inner))
            if part == "both":
                covariance = torch.nn.functional.pad(covariance, (0, 1, 0, 0, 0, 1))
        total = total + law.tokens(mean, covariance).flatten(3, 4).flatten(1, 2)
    assert isinstance(total, Tensor)
    return total


def column_noise(
    laws: Sequence[tuple[Law, str]],
    state: GaussianState,
    drawn: Sequence[tuple[Draws, str]],
    exact: Sequence[tuple[Tensor, str]],
    num_exact: int,
    rescale: bool,
    onto: Tensor | None = None,
) -> Tensor:
    r"""Columns from draws of the weights.

    The marginals of the noise are known, so that the columns that were drawn are scaled, entry by entry, to have them.

    Args:
        laws: of the layer, each with what it multiplies.
        state: of the input.
        drawn: draws of weight and bias.
        exact: their columns that are no draws, ``(R_0, K, D)``.
        num_exact: R_0, which stand before the draws in all layers.
        rescale: whether marginals are made exact.
        onto: columns to which these are added, ``(R, B, *tokens, K)``.

    Returns:
        ``(R, B, *tokens, K)``.
    """
    made = [draws.times(augment(state, part)[0]) for draws, part in drawn if part != "bias"]
    # The noise of a bias is the same for all tokens.
    alike = [draws.dense().squeeze(-1) for draws, part in drawn if part == "bias"]
    wide = [1] * (state.mean.dim() - 1)
    made += [one.view(len(one), *wide, -1).expand(-1, *state.mean.shape[:-1], -1) for one in alike]
    columns = made[0] if len(made) == 1 else sum(made[1:], made[0])
    own = sum(torch.einsum("rkd,...d->r...k", value, augment(state, part)[0]) for value, part in exact)
    if num_exact:
        own = own if isinstance(own, Tensor) else columns.new_zeros(num_exact, *columns.shape[1:])
        columns = torch.cat([own, columns])
    if not rescale:
        return columns if onto is None else onto + columns
    known = [law.variance(augment(state, part)[0]) for law, part in laws]
    return rescaled(columns, sum(known[1:], known[0]), num_exact, onto)


def second_order(laws: Sequence[tuple[Law, str]], state: GaussianState) -> Tensor | None:
    """Variances that the noise of the weights makes of the noise of the inputs, ``(B, *tokens, K)``, or ``None``."""
    total: Tensor | None = None
    for law, part in laws:
        mean, variance = augment(state, part)
        if variance is not None:
            one = law.variance(torch.zeros_like(mean), variance)
            total = one if total is None else total + one
    return total


def rescaled(columns: Tensor, known: Tensor, num_exact: int, onto: Tensor | None = None) -> Tensor:
    """Columns with the marginal variances that are known: those that were drawn are scaled entry by entry.

    Args:
        columns: ``(R, ...)``.
        known: variances, ``(...)``.
        num_exact: how many of the columns, the first, are no draws and stay as they are.
        onto: what they are added to, ``(R, ...)``.
    """
    own, drawn = columns[:num_exact], columns[num_exact:]
    found = sum_of_squares(drawn)
    left = (known - sum_of_squares(own)).clamp_min(0) if num_exact else known
    some = found > 0
    factor = torch.where(some, left / torch.where(some, found, 1.0), 1.0).sqrt()
    if onto is None:
        drawn = drawn * factor
        return torch.cat([own, drawn]) if num_exact else drawn
    drawn = torch.addcmul(onto[num_exact:], drawn, factor)
    return torch.cat([onto[:num_exact] + own, drawn]) if num_exact else drawn
