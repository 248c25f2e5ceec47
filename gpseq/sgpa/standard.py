"""Standard sparse-GP attention: the sequence's own keys are the inducing inputs of mean and covariance alike."""

from __future__ import annotations

import torch
from torch import Tensor

from gpseq.linalg import default_jitter
from gpseq.sgpa.arguments import check_choice, check_kernel, check_tokens
from gpseq.sgpa.basis import algebra_dtype, exponential_factor, scale_tokens, without_autocast
from gpseq.sgpa.masks import check_broadcast, mask_keys
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.sgpa.rbf import rbf_covariance
from gpseq.sgpa.scales import covariance_correction, scale_kl
from gpseq.sgpa.whitening import whiten


def standard_posterior(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale_tril: Tensor,
    lengthscale: Tensor,
    variance: Tensor,
    kernel: str = "rbf",
    key_padding_mask: Tensor | None = None,
    jitter: float | None = None,
    output: str = "diagonal",
) -> AttentionPosterior:
    r"""Posterior of attention with the sequence's keys as inducing inputs.

    With :math:`L L^\top = K_{aa}` and :math:`V = K_{qa} L^{-\top}`,

    .. math::
        m = K_{qa}\, v_a, \qquad \Sigma = K_{qq} + V (L_s L_s^\top - I) V^\top, \qquad
        \mathrm{KL} = \tfrac12 [ |L_s|_F^2 + v_a^\top K_{aa} v_a - T ] - \sum \log \operatorname{diag} L_s .

    Time grows with :math:`T^3` and :math:`L_s` has the length of the sequence: a reference and an oracle. For layers
    take :func:`decoupled_posterior`.

    Args:
        query: ``(*batch, H, Tq, dq)``.
        key: ``(*batch, H, Tk, dq)``.
        value: ``(*batch, H, Tk, D)``.
        scale_tril: whitened factor :math:`L_s`, broadcasts to ``(*batch, H, D, Tk, Tk)``.
        lengthscale: ``(H, dq)``.
        variance: ``(H,)``.
        kernel: ``"rbf"`` or ``"exponential"``.
        key_padding_mask: ``(*batch, Tk)``, boolean (True = ignore) or floating. A key that is ignored is no
            inducing input.
        jitter: relative to the mean diagonal of :math:`K_{aa}`; ``None`` fits the dtype of the queries.
        output: ``"diagonal"``, ``"full"`` or ``"mean"``.

    Returns:
        The marginals. All of the divergence depends on the sequence and stands in ``kl_amortised``; ``kl_global`` is 0.

    Raises:
        TypeError: a mask is neither boolean nor floating.
        ValueError: shapes do not fit each other, or an option is unknown.

    Source:
        Chen and Li (2023), Calibrating Transformers via Sparse Gaussian Processes.

    Example:
        >>> x = torch.randn(2, 5, 3)  # two heads, five tokens
        >>> post = standard_posterior(x, x, torch.zeros(2, 5, 1), torch.eye(5), torch.ones(2, 3), torch.ones(2))
        >>> post.mean.abs().max(), post.variance.shape
        (tensor(0.), torch.Size([2, 1, 5]))
    """
    check_choice("kernel", kernel, ("rbf", "exponential"))
    check_choice("output", output, ("diagonal", "full", "mean"))
    check_tokens(query, key, value)
    check_kernel(query, lengthscale, variance)
    length, dims = key.shape[-2], value.shape[-1]
    wanted = (*key.shape[:-2], dims, length, length)
    check_broadcast("scale_tril", scale_tril, wanted)
    working = algebra_dtype(query)
    with without_autocast(query):
        kept, v, keep = mask_keys(key.double(), value.double(), key_padding_mask)
        k = scale_tokens(kept, lengthscale)
        q = k if key is query else scale_tokens(query.double(), lengthscale)
        factor = None
        if kernel == "exponential":
            v, factor = v * exponential_factor(k), exponential_factor(q)
        log_variance = variance.double().log()[..., None, None]
        gram, cross = rbf_covariance(k, k, log_variance), rbf_covariance(q, k, log_variance)
        tril = scale_tril.double().expand(wanted)
        if keep is not None:
            # A key that is not there becomes an independent variable that nothing depends on and nobody asks about.
            there = keep.unsqueeze(-1) & keep.unsqueeze(-2)
            eye = torch.eye(length, dtype=torch.float64, device=query.device)
            gram, cross = torch.where(there, gram, eye * variance.double()[..., None, None]), cross * keep.unsqueeze(-2)
            tril = torch.where(there.unsqueeze(-3), tril, eye)
        whitening = whiten(gram, default_jitter(working) if jitter is None else jitter)
        features = whitening.features(cross)
        mean = cross @ v
        kl = scale_kl(tril) + 0.5 * (v * (whitening.gram @ v)).sum(-2)
        spread, covariance = None, None
        if output != "mean":
            correction = covariance_correction(tril, features)
            if output == "full":
                covariance = rbf_covariance(q, q, log_variance).unsqueeze(-3) + correction
            spread = variance.double()[..., None, None] + correction.diagonal(dim1=-2, dim2=-1)
        if factor is not None:
            mean = mean * factor
            spread = None if spread is None else spread * factor.mT.square()
            covariance = None if covariance is None else covariance * (factor * factor.mT).unsqueeze(-3)
    return AttentionPosterior(
        mean.to(query.dtype),
        None if spread is None else spread.clamp_min(0.0).to(working),
        None if covariance is None else covariance.to(working),
        torch.zeros(key.shape[-3], dims, dtype=working, device=query.device),
        kl.to(working),
        None,
        None if factor is None else factor.to(working),
    )
