"""The part of a posterior that inducing keys alone carry: a correction with known uncertainty to any other function."""

from __future__ import annotations

import torch
from torch import Tensor

from gpseq.sgpa.arguments import check_choice, check_inducing, check_kernel, check_tokens
from gpseq.sgpa.basis import (
    exponential_factor,
    inducing_basis,
    inducing_kl,
    inducing_spread,
    round_posterior,
    scale_tokens,
    without_autocast,
)
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.sgpa.scales import Scale


def inducing_posterior(
    query: Tensor,
    inducing_key: Tensor,
    inducing_value: Tensor,
    inducing_scale_tril: Scale,
    lengthscale: Tensor,
    variance: Tensor,
    kernel: str = "rbf",
    jitter: float | None = None,
    output: str = "diagonal",
) -> AttentionPosterior:
    r"""Posterior of a sparse GP on the queries with inducing keys only.

    .. math:: m = K_{qg}\, v_g, \qquad \Sigma = K_{qq} + V (L_s L_s^\top - I) V^\top

    :func:`decoupled_posterior` without keys of the sequence. Added to attention that was trained before, it leaves the
    mean untouched where :math:`v_g = 0`, under any mask, and its variance grows to the prior's away from the inducing
    keys.

    Args:
        query: ``(*batch, H, T, dq)``.
        inducing_key: ``(H, M, dq)``.
        inducing_value: :math:`v_g`, ``(H, M, D)``.
        inducing_scale_tril: whitened, as for :func:`decoupled_posterior`.
        lengthscale: ``(H, dq)``.
        variance: ``(H,)``.
        kernel: ``"rbf"`` or ``"exponential"``.
        jitter: relative to the mean diagonal of :math:`K_{gg}`; ``None`` fits the dtype of the queries.
        output: ``"diagonal"``, ``"full"`` or ``"mean"``.

    Returns:
        The marginals; ``kl_amortised`` is 0.

    Raises:
        ValueError: shapes do not fit each other, or an option is unknown.

    Example:
        >>> x, g = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
        >>> post = inducing_posterior(
        ...     x, g, torch.zeros(2, 4, 6), torch.eye(4).expand(2, 1, 4, 4), torch.ones(2, 3), torch.ones(2)
        ... )
        >>> post.mean.shape, post.variance.shape
        (torch.Size([2, 5, 6]), torch.Size([2, 1, 5]))
    """
    check_choice("kernel", kernel, ("rbf", "exponential"))
    check_choice("output", output, ("diagonal", "full", "mean"))
    check_tokens(query, query, query)
    check_kernel(query, lengthscale, variance)
    check_inducing(query, inducing_value, inducing_key, inducing_value, inducing_scale_tril)
    shape = query.shape
    if output != "full":
        # Tokens know nothing of each other here: one long sequence a head, so that keys are not copied for the batch.
        query = query.movedim(-3, 0).flatten(1, -2)
    with without_autocast(query):
        basis = inducing_basis(inducing_key, lengthscale, variance, query, jitter, output=output)
        dtype = basis.key.dtype
        q, v_g, factor = scale_tokens(query, lengthscale).to(dtype), inducing_value.to(dtype), None
        if kernel == "exponential":
            factor, v_g = exponential_factor(q), v_g * exponential_factor(basis.key)
        basis, (q,) = basis.around(q)
        cross = basis.covariance(q)
        mean = cross @ v_g
        mean = mean if factor is None else mean * factor
        features = basis.whitening.features(cross)
        spread, covariance = inducing_spread(basis, q, features, inducing_scale_tril, factor, output)
        kl = inducing_kl(basis, v_g, inducing_scale_tril)
    if output != "full":
        tokens = (*shape[:-3], shape[-2])
        mean = mean.unflatten(1, tokens).movedim(0, -3)
        spread = None if spread is None else spread.unflatten(-1, tokens).movedim((0, 1), (-3, -2))
        factor = None if factor is None else factor.unflatten(1, tokens).movedim(0, -3)
    free = torch.zeros(*shape[:-2], kl.shape[-1], dtype=dtype, device=query.device)
    return round_posterior(AttentionPosterior(mean, spread, covariance, kl, free, None, factor), query)


def inducing_features(
    query: Tensor, inducing_key: Tensor, lengthscale: Tensor, variance: Tensor, jitter: float | None = None
) -> Tensor:
    r"""Whitened features of tokens under the RBF kernel, :math:`V = K_{qg} L^{-\top}`.

    What the inducing variables explain of the covariance is :math:`V S V^\top`; for kernels that have a factor, V times
    that of the posterior takes the place of V.

    Args:
        query: ``(*batch, H, T, dq)``.
        inducing_key: ``(H, M, dq)``.
        lengthscale: ``(H, dq)``.
        variance: ``(H,)``.
        jitter: relative to the mean diagonal of :math:`K_{gg}`; ``None`` fits the dtype of the queries.

    Returns:
        ``(*batch, H, T, M)``, at least in float32.

    Example:
        >>> g = torch.tensor([[[0.0], [9.0]]])  # one head, two inducing keys far from each other
        >>> inducing_features(g, g, torch.ones(1, 1), torch.ones(1)).round(decimals=3)
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    with without_autocast(query):
        basis = inducing_basis(inducing_key, lengthscale, variance, query, jitter)
        basis, (q,) = basis.around(scale_tokens(query, lengthscale))
        return basis.whitening.features(basis.covariance(q))
