r"""What is known of the inducing variables: forms of the whitened covariance :math:`S` of :math:`q(u)`.

A full factor is a tensor ``(H, D, M, M)``, or ``(H, 1, M, M)`` where the ``D`` output dimensions of a head share one.
The two cheaper forms are named tuples. The functions below take all three, and say what each form adds to the prior's
covariance: with whitened features :math:`V` (one row a token) that is :math:`V (S - I) V^\top`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class DiagonalScale(NamedTuple):
    """``S = diag(std^2)``.

    Attributes:
        std: standard deviations, positive, ``(H, D, M)`` or ``(H, 1, M)``.
    """

    std: Tensor


class LowRankScale(NamedTuple):
    r"""``S = diag(std^2) + U U'``.

    Attributes:
        std: positive, ``(H, D, M)`` or ``(H, 1, M)``.
        root: U, ``(H, D, M, R)`` or ``(H, 1, M, R)``.
    """

    std: Tensor
    root: Tensor


#: A lower triangular factor of S, or one of the cheaper forms.
Scale: TypeAlias = Tensor | DiagonalScale | LowRankScale


def cast_scale(scale: Scale, dtype: torch.dtype) -> Scale:
    """The same covariance in another dtype."""
    if isinstance(scale, Tensor):
        return scale.to(dtype)
    if isinstance(scale, DiagonalScale):
        return DiagonalScale(scale.std.to(dtype))
    return LowRankScale(scale.std.to(dtype), scale.root.to(dtype))


def num_dims(scale: Scale) -> int:
    """Output dimensions that have a covariance of their own: D, or 1 where they share one."""
    return scale.shape[-3] if isinstance(scale, Tensor) else scale.std.shape[-2]


def variance_correction(scale: Scale, features: Tensor) -> Tensor:
    r"""Diagonal of :math:`V (S - I) V^\top`: what :math:`q(u)` adds to the prior variance of each token.

    Args:
        scale: of ``H`` heads, whitened.
        features: V, ``(*batch, H, T, M)``.

    Returns:
        ``(*batch, H, T, D)``, or ``(*batch, H, T, 1)`` where the dimensions share one covariance.

    Example:
        >>> V = torch.ones(1, 2, 3)  # one head, two tokens, three inducing keys
        >>> variance_correction(0.5 * torch.eye(3).expand(1, 1, 3, 3), V)
        tensor([[[-2.2500],
                 [-2.2500]]])
    """
    if isinstance(scale, DiagonalScale):
        return features.square() @ (scale.std.square() - 1).mT
    if isinstance(scale, LowRankScale):
        explained = features.square() @ (scale.std.square() - 1).mT
        dims, size, rank = scale.root.shape[-3:]
        # All dimensions in one product: (T, M) @ (M, D R).
        roots = scale.root.movedim(-3, -2).reshape(*scale.root.shape[:-3], size, dims * rank)
        return explained + (features @ roots).unflatten(-1, (dims, rank)).square().sum(-1)
    if scale.shape[-3] == 1:
        return ((features @ scale.squeeze(-3)).square().sum(-1) - features.square().sum(-1)).unsqueeze(-1)
    excess = scale @ scale.mT - torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
    # M^2 products of features a token, made once for all dimensions; dimension by dimension they would be D M.
    return (features.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2) @ excess.flatten(-2).mT


def covariance_correction(scale: Scale, features: Tensor) -> Tensor:
    r""":math:`V (S - I) V^\top` itself.

    Args:
        scale: of ``H`` heads, whitened.
        features: V, ``(*batch, H, T, M)``.

    Returns:
        ``(*batch, H, D, T, T)``, or ``(*batch, H, 1, T, T)``.
    """
    root = features.unsqueeze(-3) @ scale_root(scale)
    return root @ root.mT - (features @ features.mT).unsqueeze(-3)


def scale_root(scale: Scale) -> Tensor:
    """A root R of the whitened covariance, ``R R' = S``.

    Args:
        scale: of ``H`` heads.

    Returns:
        ``(H, D, M, M)``, or ``(H, D, M, M + R)`` for the low-rank form; ``D`` may be 1.
    """
    if isinstance(scale, DiagonalScale):
        return torch.diag_embed(scale.std)
    if isinstance(scale, LowRankScale):
        return torch.cat([torch.diag_embed(scale.std), scale.root], -1)
    return scale


def scale_kl(scale: Scale) -> Tensor:
    r"""The part of the divergence from the prior that the covariance pays for.

    .. math:: \tfrac12 [\operatorname{tr} S - M - \log \det S]

    Args:
        scale: of ``H`` heads, whitened.

    Returns:
        ``(H, D)``, or ``(H, 1)`` where the dimensions share one covariance; in nats.

    Example:
        >>> scale_kl(DiagonalScale(torch.ones(2, 3, 4))).abs().max()
        tensor(0.)
    """
    if isinstance(scale, Tensor):
        log_diagonal = scale.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        return 0.5 * (scale.square().sum((-2, -1)) - scale.shape[-1]) - log_diagonal
    kl = 0.5 * (scale.std.square().sum(-1) - scale.std.shape[-1]) - scale.std.log().sum(-1)
    if isinstance(scale, DiagonalScale):
        return kl
    root = scale.root / scale.std.unsqueeze(-1)
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    # det(diag(a^2) + U U') = det(diag(a^2)) det(I + U' diag(a^-2) U)
    tril = torch.linalg.cholesky_ex(eye + root.mT @ root).L
    return kl + 0.5 * scale.root.square().sum((-2, -1)) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
