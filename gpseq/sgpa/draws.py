"""Draws from the posterior of attention: a token at a time, jointly, and jointly at linear cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpseq.linalg import default_jitter
from gpseq.sgpa.basis import algebra_dtype, inducing_basis, scale_tokens, without_autocast
from gpseq.sgpa.scales import Scale, cast_scale, scale_root
from gpseq.sgpa.whitening import whiten


def standard_normal(
    shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Independent draws from N(0, 1).

    Args:
        shape: of the draws.
        generator: where they come from; ``None`` is torch's default generator.
        dtype: of the draws.
        device: of the draws.
    """
    if generator is None:  # not handed on: with the keyword, shapes that a compiler keeps open are refused
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def deviations(variance: Tensor) -> Tensor:
    """Square roots of variances, with a derivative where rounding has left none."""
    return variance.clamp_min(torch.finfo(variance.dtype).eps ** 2).sqrt()


def marginal_sample(mean: Tensor, variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw :math:`m + \sigma \epsilon` with noise that is independent over tokens and dimensions.

    Cheap, and each token has the right distribution, but a draw is not a function: what is averaged over tokens later
    has too little variance. :func:`joint_sample` and :func:`pathwise_noise` draw functions.

    Args:
        mean: ``(*batch, H, T, D)``.
        variance: ``(*batch, H, D, T)``, or of size 1 in place of D.
        generator: of the draws; ``None`` is torch's default generator.

    Returns:
        ``(*batch, H, T, D)``.

    Example:
        >>> marginal_sample(torch.ones(1, 2, 3), torch.zeros(1, 3, 2)).round(decimals=3).unique()
        tensor([1.])
    """
    deviation = deviations(variance).mT
    noise = standard_normal(mean.shape, generator, deviation.dtype, mean.device)
    return (mean + deviation * noise).to(mean.dtype)


def joint_sample(
    mean: Tensor, covariance: Tensor, generator: torch.Generator | None = None, jitter: float | None = None
) -> Tensor:
    r"""Draw :math:`m + \operatorname{chol}(\Sigma)\, \epsilon`: all tokens jointly, at a cost of :math:`T^3`.

    Args:
        mean: ``(*batch, H, T, D)``.
        covariance: ``(*batch, H, D, T, T)``, or of size 1 in place of D.
        generator: of the draws; ``None`` is torch's default generator.
        jitter: relative to the mean diagonal of the covariance; ``None`` fits its dtype.

    Returns:
        ``(*batch, H, T, D)``.
    """
    jitter = default_jitter(covariance.dtype) if jitter is None else jitter
    tril = whiten(covariance.double(), jitter).tril.to(covariance.dtype)
    noise = standard_normal(mean.mT.shape, generator, tril.dtype, mean.device)
    return (mean + (tril @ noise.unsqueeze(-1)).squeeze(-1).mT).to(mean.dtype)


def pathwise_noise(
    query: Tensor,
    inducing_key: Tensor,
    inducing_scale_tril: Scale,
    lengthscale: Tensor,
    variance: Tensor,
    num_dims: int,
    num_features: int = 256,
    factor: Tensor | None = None,
    jitter: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw what is added to the mean of attention, jointly over the tokens at a cost that is linear in their number.

    .. math:: h(x) + V(x) \bigl( L_s \epsilon - L^{-1} h(g) \bigr), \qquad h \sim GP(0, k)

    where h is a draw from the prior by random Fourier features: with h exact the covariance is the posterior's, with R
    features the error falls as :math:`R^{-1/2}`. Every sequence has functions of its own; frequencies are shared.

    Args:
        query: ``(*batch, H, T, dq)``.
        inducing_key: ``(H, M, dq)``.
        inducing_scale_tril: whitened, as for :func:`decoupled_posterior`.
        lengthscale: ``(H, dq)``.
        variance: ``(H,)``.
        num_dims: D, functions a head.
        num_features: R, frequencies; each gives a sine and a cosine.
        factor: of the posterior, for kernels that have one.
        jitter: relative; ``None`` fits the dtype of the queries.
        generator: of the draws; ``None`` is torch's default generator.

    Returns:
        ``(*batch, H, T, D)``, of mean zero.

    Source:
        Wilson et al. (2020), Efficiently Sampling Functions from Gaussian Process Posteriors.

    Example:
        >>> x, g = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
        >>> pathwise_noise(x, g, torch.eye(4).expand(2, 1, 4, 4), torch.ones(2, 3), torch.ones(2), num_dims=6).shape
        torch.Size([2, 5, 6])
    """
    working = algebra_dtype(query)

    def normal(*shape: int) -> Tensor:
        return standard_normal(shape, generator, working, query.device)

    lead, heads, width = query.shape[:-3], query.shape[-3], query.shape[-1]
    with without_autocast(query):
        q = scale_tokens(query, lengthscale).to(working)
        basis = inducing_basis(inducing_key, lengthscale, variance, query, jitter)
        frequency = normal(heads, num_features, width)
        weight = normal(*lead, heads, 2 * num_features, num_dims)

        def prior(tokens: Tensor) -> Tensor:
            angle = tokens @ frequency.mT
            waves = torch.cat([angle.cos(), angle.sin()], -1)
            return (basis.variance / num_features).sqrt() * (waves @ weight)

        root = scale_root(cast_scale(inducing_scale_tril, working))
        explained = (root @ normal(*lead, heads, num_dims, root.shape[-1], 1)).squeeze(-1).mT
        centred, (around,) = basis.around(q)  # not for the waves, whose phase would move
        features = basis.whitening.features(centred.covariance(around))
        drawn = prior(q) + features @ (explained - basis.whitening.inverse @ prior(basis.key))
    return drawn if factor is None else drawn * factor
