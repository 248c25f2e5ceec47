"""Tokens of a sequence that are chosen, averaged, or put one after the other: linear maps, exact in every form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpseq.propagation.moments import GaussianState, LinearMap


def select_token(state: GaussianState, index: int | Tensor) -> GaussianState:
    """One token of each sequence: a class token, or the last one that is no padding.

    Args:
        state: ``(B, T, D)``.
        index: of the token; or ``(B,)``, one for each sequence.

    Returns:
        ``(B, D)``.

    Raises:
        ValueError: the state has no tokens, or the index is not one for each.

    Example:
        >>> select_token(GaussianState(torch.arange(6.0).view(1, 3, 2)), -1).mean
        tensor([[4., 5.]])
    """
    _check_tokens(state)
    if isinstance(index, int):
        index = torch.full((len(state.mean),), index, device=state.mean.device)
    if index.shape != state.mean.shape[:1]:
        raise ValueError(f"index: expected one for each of {len(state.mean)} sequences, got {tuple(index.shape)}.")
    rows = torch.arange(len(state.mean), device=state.mean.device)

    def choose(x: Tensor) -> Tensor:
        return x[..., rows, index, :]

    return state.apply(choose(state.mean), LinearMap(choose, choose, lambda c: c[rows, index], mixes=True))


def mean_tokens(state: GaussianState, mask: Tensor | None = None) -> GaussianState:
    r"""The mean of the tokens that count, with the covariance :math:`T^{-2} \sum_{ts} C_{ts}`.

    Args:
        state: ``(B, T, D)``.
        mask: ``(B, T)``, true or one for tokens that count, as Hugging Face has it; ``None`` is all.

    Returns:
        ``(B, D)``; zeros where no token counts.

    Raises:
        ValueError: the state has no tokens, or the mask another shape.

    Example:
        >>> mean_tokens(GaussianState(torch.tensor([[[1.0], [3.0], [9.0]]])), torch.tensor([[1, 1, 0]])).mean
        tensor([[2.]])
    """
    _check_tokens(state)
    counts = state.mean.new_ones(state.mean.shape[:2]) if mask is None else mask.to(state.mean)
    if counts.shape != state.mean.shape[:2]:
        raise ValueError(f"mask: expected shape {tuple(state.mean.shape[:2])}, got {tuple(counts.shape)}.")
    weights = counts / counts.sum(-1, keepdim=True).clamp_min(1)

    def weighed(x: Tensor) -> Tensor:
        return torch.einsum("bt,...btd->...bd", weights, x)

    return state.apply(
        weighed(state.mean),
        LinearMap(
            push=weighed,
            squared=lambda v: torch.einsum("bt,btd->bd", weights.square(), v),
            blocks=lambda c: torch.einsum("bt,btij->bij", weights.square(), c),
            mixes=True,
        ),
    )


def concatenate(states: Sequence[GaussianState], dim: int = -2) -> GaussianState:
    """Tokens, or features, of several states one after the other, such as a class token before those of an image.

    Args:
        states: ``(B, *event)``, which differ along one dimension only; independent but for the columns of a low rank.
        dim: negative; -2 puts tokens one after the other, and -1 features.

    Returns:
        The state of all of them.

    Raises:
        ValueError: there is no state, or a dimension that is not negative or no part of the event.

    Example:
        >>> tokens, token = GaussianState(torch.zeros(1, 2, 3)), GaussianState(torch.ones(1, 1, 3))
        >>> concatenate([token, tokens]).mean.shape
        torch.Size([1, 3, 3])
    """
    if not states:
        raise ValueError("states: expected at least one, got none.")
    if not -len(states[0].event) <= dim < 0:
        raise ValueError(f"dim: expected a negative one of an event of shape {states[0].event}, got {dim}.")
    sizes = [state.mean.shape[dim] for state in states]
    total: GaussianState | None = None
    for number, state in enumerate(states):
        place = _Place(dim, sum(sizes[:number]), sum(sizes[number + 1 :]))
        wide = state.apply(place(state.mean), LinearMap(place, place, None if dim == -1 else place.blocks, dim != -1))
        total = wide if total is None else total.plus(wide)
    assert total is not None
    return total


class _Place:
    """Zeros before and after along a dimension."""

    def __init__(self, dim: int, before: int, after: int) -> None:
        self._padding = [0, 0] * (-dim - 1) + [before, after]

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, self._padding)

    def blocks(self, x: Tensor) -> Tensor:
        """The same of covariances of tokens, which have one more dimension."""
        return nn.functional.pad(x, [0, 0, *self._padding])


def _check_tokens(state: GaussianState) -> None:
    if len(state.event) != 2:
        raise ValueError(f"state: expected tokens, (B, T, D), got a mean of shape {tuple(state.mean.shape)}.")
