"""Factoring the covariance of inducing variables without a branch on its values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpseq.linalg import MAX_JITTER, default_jitter


class Whitening(NamedTuple):
    r"""A covariance of inducing variables and its factors, all three with the same jitter.

    Attributes:
        gram: :math:`K_{gg} + \epsilon I`, ``(*batch, M, M)``. Every formula uses this one, so that the bound stays one:
            the inducing variables are then slightly noisy, and the posterior is theirs.
        tril: its lower Cholesky factor :math:`L`, ``(*batch, M, M)``.
        inverse: :math:`L^{-1}`, ``(*batch, M, M)``. With it all that is left to do for tokens are matrix products.
    """

    gram: Tensor
    tril: Tensor
    inverse: Tensor

    def features(self, covariance: Tensor) -> Tensor:
        r"""Whitened features of tokens, :math:`K_{qg} L^{-\top}`, one row a token.

        Args:
            covariance: :math:`K_{qg}`, ``(*batch, T, M)``.

        Returns:
            ``(*batch, T, M)``.
        """
        return covariance @ self.inverse.mT.to(covariance.dtype)


def whiten(gram: Tensor, jitter: float | None = None) -> Whitening:
    r"""Factor the covariance of inducing variables, with jitter relative to its mean diagonal.

    .. math:: L L^\top = K_{gg} + \epsilon I, \qquad \epsilon = \text{jitter} \cdot \tfrac1M \operatorname{tr} K_{gg}

    Nothing here looks at a value on the host: where the factorisation fails, a larger jitter (half-way to
    ``linalg.MAX_JITTER`` in decades, then that) is chosen on the device, so the function compiles into one graph and
    never waits. A matrix that cannot be factored at all gives NaN instead of an exception;
    :func:`gpseq.linalg.cholesky` is the one that raises.

    Args:
        gram: symmetric positive semi-definite, ``(*batch, M, M)``, in float32 or float64.
        jitter: relative jitter; ``None`` means 1e-10 in float64 and 1e-6 in float32.

    Returns:
        The matrix with its jitter, its lower factor, and the inverse of the factor.

    Example:
        >>> whiten(torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64), jitter=0.0).tril
        tensor([[2.0000, 0.0000],
                [1.0000, 1.4142]], dtype=torch.float64)
    """
    size = gram.shape[-1]
    if size == 0:
        return Whitening(gram, gram, gram)
    least = default_jitter(gram.dtype)
    asked = least if jitter is None else jitter
    middle = (max(asked, least) * MAX_JITTER) ** 0.5
    scale = gram.diagonal(dim1=-1, dim2=-2).mean(-1)
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    # The choice is made without a gradient, and the factorisation repeated: the derivative of a failed one is NaN.
    with torch.no_grad():
        relative = torch.full_like(scale, asked)
        for larger in (middle, MAX_JITTER):
            info = torch.linalg.cholesky_ex(gram + (relative * scale)[..., None, None] * eye).info
            relative = torch.where(info > 0, larger, relative)
    jittered = gram + (relative * scale)[..., None, None] * eye
    factor, info = torch.linalg.cholesky_ex(jittered)
    factor = torch.where((info > 0)[..., None, None], torch.nan, factor)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return Whitening(jittered, factor, inverse)
