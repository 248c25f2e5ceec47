r"""Attention by the singular vectors of an asymmetric kernel, in time that is linear in the number of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpseq.sgpa.causal import causal_linear_attention
from gpseq.sgpa.scales import scale_kl


class EigenFeatures(NamedTuple):
    """Projections of tokens on the singular vectors of their kernel, and the primal weights that make them.

    Attributes:
        left: e, ``(*batch, H, T, s)``.
        right: r, ``(*batch, H, T, s)``.
        left_weight: :math:`W_e` of all tokens, ``(*batch, H, p, s)``.
        right_weight: :math:`W_r` of all tokens, ``(*batch, H, p, s)``.
    """

    left: Tensor
    right: Tensor
    left_weight: Tensor
    right_weight: Tensor


def unit_tokens(tokens: Tensor) -> Tensor:
    r"""Tokens on the unit sphere, :math:`x / \sqrt{|x|^2 + \epsilon}`, with a bounded gradient at zero.

    Args:
        tokens: ``(*batch, T, p)``.

    Example:
        >>> unit_tokens(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # The same epsilon in every dtype: at most 3000 of gradient, and 1e-7 off for tokens of unit length.
    return tokens * (tokens.square().sum(-1, keepdim=True) + 1.2e-7).rsqrt()


def eigen_features(
    query: Tensor,
    key: Tensor,
    left_dual: Tensor,
    right_dual: Tensor,
    keep: Tensor | None = None,
    is_causal: bool = False,
) -> EigenFeatures:
    r"""Projections of tokens on the singular vectors of the kernel :math:`\kappa(x, y) = \phi_q(x)^\top \phi_k(y)`.

    With :math:`h_r`, :math:`h_e` the dual variables (right and left singular vectors at a solution) of the n tokens,

    .. math::
        e = \phi_q W_e, \quad W_e = \tfrac1n \sum_j \phi_k(x_j)\, h_{r,j}^\top, \qquad
        r = \phi_k W_r, \quad W_r = \tfrac1n \sum_i \phi_q(x_i)\, h_{e,i}^\top,

    so that :math:`e = \tfrac1n K h_r` and :math:`r = \tfrac1n K^\top h_e` without the matrix K.

    Args:
        query: :math:`\phi_q` of the tokens, ``(*batch, H, T, p)``.
        key: :math:`\phi_k` of the tokens, ``(*batch, H, T, p)``.
        left_dual: :math:`h_e`, ``(*batch, H, T, s)``.
        right_dual: :math:`h_r`, ``(*batch, H, T, s)``.
        keep: which tokens there are, ``(*batch, 1, T)``; ``None`` is all. The others get zero.
        is_causal: row t is that of the tokens 1 to t by themselves; the weights are those of all tokens still.

    Returns:
        The features.

    Example:
        >>> x, h = torch.randn(2, 5, 3), torch.randn(2, 5, 4)  # two heads, five tokens, rank four
        >>> torch.allclose(eigen_features(x, x, h, h).left, x @ x.mT @ h / 5, atol=1e-5)
        True
    """
    if keep is not None:
        there = keep.unsqueeze(-1).to(query.dtype)
        query, key = query * there, key * there
        count = keep.to(query.dtype).sum(-1)[..., None, None].clamp_min(1.0)
    else:
        count = torch.full((), float(query.shape[-2]), dtype=query.dtype, device=query.device)
    left_weight, right_weight = key.mT @ right_dual / count, query.mT @ left_dual / count
    if not is_causal:
        return EigenFeatures(query @ left_weight, key @ right_weight, left_weight, right_weight)
    ones = torch.ones(query.shape[-2], dtype=query.dtype, device=query.device) if keep is None else keep.to(query.dtype)
    seen = ones.cumsum(-1).clamp_min(1.0).unsqueeze(-1)
    left = causal_linear_attention(query, key, right_dual) / seen
    right = causal_linear_attention(key, query, left_dual) / seen
    return EigenFeatures(left, right, left_weight, right_weight)


def ksvd_objective(features: EigenFeatures, singular: Tensor, keep: Tensor | None = None) -> Tensor:
    r"""Primal objective of the kernel singular value decomposition; stationary points are singular vectors.

    .. math::
        J = \tfrac{1}{2n} \sum_i e_i^\top \Lambda^{-1} e_i + \tfrac{1}{2n} \sum_j r_j^\top \Lambda^{-1} r_j
            - \operatorname{tr} W_e^\top W_r

    At a stationary point :math:`W_r = \tfrac1n \sum_i \phi_q(x_i) e_i^\top \Lambda^{-1}` and likewise :math:`W_e`,
    hence :math:`\tfrac1n K h_r = h_e \Lambda` and :math:`\tfrac1n K^\top h_e = h_r \Lambda` with
    :math:`h_e = e \Lambda^{-1}`, :math:`h_r = r \Lambda^{-1}`, and there J is zero. The converse does not hold: J is
    zero elsewhere too, at zero features for one.

    Args:
        features: of all tokens, not causal ones.
        singular: :math:`\Lambda`, positive, ``(H, s)``.
        keep: as for :func:`eigen_features`.

    Returns:
        ``(*batch, H)``.

    Source:
        Suykens (2016), SVD revisited: A new variational principle, compatible feature maps and nonlinear extensions.
    """
    count = features.left.shape[-2] if keep is None else keep.to(singular.dtype).sum(-1).clamp_min(1.0)
    energy = (features.left.square() + features.right.square()).sum(-2) / singular
    return 0.5 * energy.sum(-1) / count - (features.left_weight * features.right_weight).sum((-2, -1))


def eigen_kl(mean: Tensor, scale_tril: Tensor, singular: Tensor) -> Tensor:
    r"""Divergence of :math:`q(u_d) = N(m_d, L_d L_d^\top)` from the prior :math:`N(0, \Lambda^2)` of the eigenpairs.

    .. math::
        \tfrac12 \bigl[ |\Lambda^{-1} L_d|_F^2 + |\Lambda^{-1} m_d|^2 - s \bigr] - \sum_m \log (L_{d,mm} / \lambda_m)

    Args:
        mean: ``(H, s, D)``.
        scale_tril: lower, positive diagonal, ``(H, D, s, s)``.
        singular: :math:`\Lambda`, ``(H, s)``.

    Returns:
        ``(H, D)``, in nats.

    Example:
        >>> eigen_kl(torch.zeros(1, 2, 3), 2 * torch.eye(2).expand(1, 3, 2, 2), torch.full((1, 2), 2.0))
        tensor([[0., 0., 0.]])
    """
    whitened = scale_tril / singular[:, None, :, None]
    return scale_kl(whitened) + 0.5 * (mean / singular.unsqueeze(-1)).square().sum(-2)
