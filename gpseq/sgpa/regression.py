r"""Gaussian process regression on random features: what tokens say by their values, in linear time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpseq.sgpa.causal import mean_over_tokens

#: Least length of a chunk of the causal form; it is the number of features where that is more.
_CHUNK = 64


class RegressionPosterior(NamedTuple):
    """Posterior of ``D`` functions a head that share one covariance.

    Attributes:
        mean: ``(*batch, H, Tq, D)``.
        variance: of the functions, without noise, ``(*batch, H, 1, Tq)``.
        root: of the covariance of the weights, ``(*batch, H, F, F)``; ``None`` where each query has one of its own.
        kl: of the posterior of the weights from their prior, ``(*batch, H, D)``, in nats. In the causal form the mean
            over the queries.
        kl_prefix: ``(*batch, H, D, T)``, that of each prefix; ``None`` unless causal.
    """

    mean: Tensor
    variance: Tensor
    root: Tensor | None
    kl: Tensor
    kl_prefix: Tensor | None = None


def wave_features(tokens: Tensor, frequency: Tensor, lengthscale: Tensor, variance: Tensor) -> Tensor:
    r"""Random features of the RBF kernel: a cosine and a sine for each frequency.

    .. math::
        \psi(x) = \sqrt{s^2 / R}\, [\cos \Omega \tilde x, \sin \Omega \tilde x], \qquad \tilde x = x / l

    The frequencies of an RBF kernel are standard normal. In pairs of sine and cosine :math:`|\psi(x)|^2 = s^2` exactly:
    the prior variance is right whatever R is, and no residual is left to add to it.

    Args:
        tokens: ``(*batch, H, T, dq)``.
        frequency: :math:`\Omega`, ``(H, R, dq)``.
        lengthscale: ``(H, dq)``.
        variance: :math:`s^2`, ``(H,)``.

    Returns:
        ``(*batch, H, T, 2 R)``.

    Source:
        Rahimi and Recht (2007), Random Features for Large-Scale Kernel Machines.

    Example:
        >>> psi = wave_features(torch.randn(1, 4, 3), torch.randn(1, 8, 3), torch.ones(1, 3), torch.full((1,), 2.0))
        >>> psi.square().sum(-1)
        tensor([[2., 2., 2., 2.]])
    """
    angle = tokens @ (frequency / lengthscale.unsqueeze(-2)).mT
    amplitude = (variance / frequency.shape[-2]).sqrt()[..., None, None]
    return amplitude * torch.cat([angle.cos(), angle.sin()], -1)


def feature_regression(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    noise: Tensor,
    keep: Tensor | None = None,
    is_causal: bool = False,
) -> RegressionPosterior:
    r"""Bayesian linear regression of values on features of their keys, asked at the queries.

    With :math:`w \sim N(0, I)` and :math:`v_j = w^\top \psi(k_j) + \epsilon_j`, :math:`\epsilon_j \sim N(0, \sigma^2)`,

    .. math::
        A = \Psi_k^\top \Psi_k + \sigma^2 I, \qquad
        m = \Psi_q A^{-1} \Psi_k^\top v, \qquad
        \operatorname{var} = \sigma^2 \operatorname{diag} \Psi_q A^{-1} \Psi_q^\top,

    .. math::
        \mathrm{KL}_d = \tfrac12 \bigl[ \sigma^2 \operatorname{tr} A^{-1} + |\mu_d|^2 - F
            + \log \det (A / \sigma^2) \bigr], \qquad \mu = A^{-1} \Psi_k^\top v .

    :math:`A / \sigma^2` is at least the identity; it is factored in float64. In the causal form row t is the
    posterior given keys 1 to t. Chunks start from the sums over those before, and inside a chunk the keys are
    taken in one by one through the factor of their own covariance given the past, so that there is one matrix
    ``(F, F)`` a chunk, not a token: time :math:`T F^2`, memory :math:`T F`.

    Args:
        query: :math:`\Psi_q`, ``(*batch, H, Tq, F)``.
        key: :math:`\Psi_k`, ``(*batch, H, Tk, F)``.
        value: ``(*batch, H, Tk, D)``.
        noise: :math:`\sigma^2`, a variance, broadcasts to ``(*batch, H)``.
        keep: which keys there are, ``(*batch, 1, Tk)``; ``None`` is all.
        is_causal: query t sees keys 1 to t.

    Returns:
        The posterior.

    Example:
        >>> psi = torch.ones(1, 3, 1, dtype=torch.float64)  # one feature: the mean of three values, shrunk
        >>> post = feature_regression(psi, psi, 4 * psi, torch.ones(1, dtype=torch.float64))
        >>> post.mean[0, 0], post.variance[0, 0, 0]
        (tensor([3.], dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    scale = noise.rsqrt()[..., None, None]
    if keep is not None:
        scale = scale * keep.unsqueeze(-1)
    key, value = key * scale, value * scale
    if is_causal:
        return _causal_regression(query, key, value, keep)
    size = key.shape[-1]
    tril, inverse = _factor((key.mT @ key).double())
    weight = inverse.mT @ (inverse @ (key.mT @ value).double())
    root = inverse.mT.to(query.dtype)
    kl = 0.5 * ((inverse.square().sum((-2, -1)) - size).unsqueeze(-1) + weight.square().sum(-2))
    kl = kl + tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    variance = (query @ root).square().sum(-1).unsqueeze(-2)
    return RegressionPosterior(query @ weight.to(query.dtype), variance, root, kl.to(query.dtype))


def _causal_regression(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> RegressionPosterior:
    """The causal form, for keys and values divided by the noise's standard deviation."""
    dtype, length, size = query.dtype, query.shape[-2], query.shape[-1]
    chunk = min(length, max(_CHUNK, size))
    missing = -length % chunk
    q, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(-2, (-1, chunk)) for t in (query, key, value))

    def before(sums: Tensor) -> Tensor:
        return F.pad(sums[..., :-1, :, :].double().cumsum(-3), (0, 0, 0, 0, 1, 0))

    # What the chunks before say of the weights: mean mu and covariance R R'.
    tril, inverse = _factor(before(k.mT @ k))
    mu64 = inverse.mT @ (inverse @ before(k.mT @ v))
    mu, root = mu64.to(dtype), inverse.mT.to(dtype)
    k_white, q_white = k @ root, q @ root
    # The values of the chunk, whitened one after the other by the lower factor of their covariance: row s of the
    # results is what key s adds, so that sums over s <= t are those of the prefix.
    tril_chunk, inverse_chunk = _factor((k_white @ k_white.mT).double())
    take_in = inverse_chunk.to(dtype)
    surprise = take_in @ (v - k @ mu)
    direction = take_in @ k_white
    gain = (q_white @ direction.mT).tril()
    mean = q @ mu + gain @ surprise
    variance = (q_white.square().sum(-1) - gain.square().sum(-1)).clamp_min(0.0)

    step = direction @ root.mT
    moved = step @ mu + (step @ step.mT).tril(-1) @ surprise
    length2 = mu64.square().sum(-2, keepdim=True).to(dtype) + (
        (2 * moved + step.square().sum(-1, keepdim=True) * surprise) * surprise
    ).cumsum(-2)
    trace = inverse.square().sum((-2, -1))[..., None, None].to(dtype) - step.square().sum(-1, keepdim=True).cumsum(-2)
    half_logdet = (
        tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        + tril_chunk.diagonal(dim1=-2, dim2=-1).log().cumsum(-1)
    ).to(dtype)
    kl = 0.5 * (trace - size + length2) + half_logdet.unsqueeze(-1)

    def whole(chunks: Tensor) -> Tensor:
        return chunks.flatten(-3, -2)[..., :length, :]

    kl_prefix = whole(kl).mT
    return RegressionPosterior(
        whole(mean), whole(variance.unsqueeze(-1)).mT, None, mean_over_tokens(kl_prefix, keep), kl_prefix
    )


def _factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor of ``I + gram`` and its inverse; nothing here can fail for a Gram matrix of finite numbers."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    tril = torch.linalg.cholesky_ex(eye + gram).L
    return tril, torch.linalg.solve_triangular(tril, eye.expand_as(tril), upper=False)
