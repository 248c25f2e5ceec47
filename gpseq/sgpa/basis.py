"""Inducing keys under a kernel: their covariance, factored, and what tokens share with them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from gpseq.linalg import default_jitter
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.sgpa.rbf import half_norms, rbf_covariance
from gpseq.sgpa.scales import Scale, cast_scale, covariance_correction, scale_kl, variance_correction
from gpseq.sgpa.whitening import Whitening, whiten


class InducingBasis(NamedTuple):
    """Inducing keys of all heads under the RBF kernel.

    Attributes:
        key: divided by the length-scale, ``(H, M, dq)``, in the dtype of the algebra.
        variance: of the kernel, ``(H, 1, 1)``.
        log_variance: its logarithm.
        whitening: of :math:`K_{gg}`, formed and factored in float64, rounded to the dtype of the algebra.
    """

    key: Tensor
    variance: Tensor
    log_variance: Tensor
    whitening: Whitening

    def around(self, *tokens: Tensor) -> tuple[InducingBasis, tuple[Tensor, ...]]:
        """The keys, and scaled tokens ``(*batch, H, T, dq)``, around the mean of each head's keys.

        The RBF kernel does not see it, and distances far from the origin keep their digits. One tensor stays one.
        """
        if self.key.shape[-2] == 0:
            return self, tokens
        centre = self.key.detach().mean(-2, keepdim=True)
        moved = {id(t): t - centre.to(t.dtype) for t in {id(t): t for t in tokens}.values()}
        return self._replace(key=self.key - centre), tuple(moved[id(t)] for t in tokens)

    def covariance(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """:math:`K_{qg}` for scaled tokens ``(*batch, H, T, dq)``, ``(*batch, H, T, M)``; a bias is in the exponent."""
        return rbf_covariance(tokens.to(self.key.dtype), self.key, self.log_variance, bias)

    def prior(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """:math:`K_{qq}` for scaled tokens ``(*batch, H, T, dq)``, ``(*batch, H, T, T)``."""
        tokens = tokens.to(self.key.dtype)
        return rbf_covariance(tokens, tokens, self.log_variance, bias)

    def mean_cost(self, value: Tensor) -> Tensor:
        r""":math:`\tfrac12 v_g^\top K_{gg} v_g`, ``(H, D)``, for values ``(H, M, D)``."""
        return 0.5 * (value * (self.whitening.gram @ value)).sum(-2)


def algebra_dtype(tokens: Tensor) -> torch.dtype:
    """What inducing variables, variances and divergences are computed in: the tokens' dtype, at least float32."""
    return torch.promote_types(tokens.dtype, torch.float32)


def without_autocast(tokens: Tensor) -> AbstractContextManager[None]:
    """A context in which products keep the dtype that they are asked for, on the device of the tokens."""
    device = tokens.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def scale_tokens(tokens: Tensor, lengthscale: Tensor) -> Tensor:
    """Tokens ``(*batch, H, T, dq)`` divided by the length-scales ``(H, dq)``, rounded once, to their own dtype."""
    return (tokens * lengthscale.to(algebra_dtype(tokens)).reciprocal().unsqueeze(-2)).to(tokens.dtype)


def exponential_factor(tokens: Tensor) -> Tensor:
    r"""What makes the exponential kernel of the RBF one, :math:`e^{|\tilde x|^2 / 2}`, ``(*batch, T, 1)``.

    :math:`e^{x \cdot y} = e^{|x|^2/2} k_{rbf}(x, y)\, e^{|y|^2/2}`: values take the factor of their key, the function
    takes that of the query.

    Args:
        tokens: scaled, ``(*batch, T, dq)``.
    """
    return (-half_norms(tokens)).exp()


def inducing_basis(
    inducing_key: Tensor,
    lengthscale: Tensor,
    variance: Tensor,
    tokens: Tensor,
    jitter: float | None = None,
    bias: Tensor | None = None,
    output: str = "diagonal",
) -> InducingBasis:
    r"""Scale inducing keys and factor their covariance.

    Args:
        inducing_key: ``(H, M, dq)``.
        lengthscale: ``(H, dq)``.
        variance: ``(H,)``.
        tokens: what the dtype of the algebra follows.
        jitter: relative to the mean diagonal of :math:`K_{gg}`; ``None`` fits the dtype of the tokens.
        bias: added to the log kernel between inducing keys, broadcast to ``(H, M, M)``.
        output: what is asked for. Covariances between tokens, ``"full"``, are for factoring, and a difference of
            matrices in float32 has no factor where little of the prior is left: their algebra is in float64.
    """
    least = default_jitter(algebra_dtype(tokens))
    dtype = torch.float64 if output == "full" else algebra_dtype(tokens)
    key = scale_tokens(inducing_key.to(dtype), lengthscale)
    column = variance.to(dtype)[..., None, None]
    gram = rbf_covariance(key.double(), key.double(), column.double().log(), bias)
    whitening = whiten(gram, least if jitter is None else jitter)
    return InducingBasis(key, column, column.log(), Whitening(*(t.to(dtype) for t in whitening)))


def inducing_kl(basis: InducingBasis, value: Tensor, scale: Scale) -> Tensor:
    """What q(u) of the inducing keys pays, ``(H, D)``."""
    return scale_kl(cast_scale(scale, value.dtype)) + basis.mean_cost(value)


def inducing_spread(
    basis: InducingBasis,
    query: Tensor,
    features: Tensor,
    scale: Scale,
    factor: Tensor | None,
    output: str,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    r"""Marginal variances and, if asked for, covariances: :math:`K_{qq} + V (S - I) V^\top` between factors.

    Args:
        basis: of the inducing keys.
        query: scaled, ``(*batch, H, T, dq)``.
        features: V, ``(*batch, H, T, M)``.
        scale: whitened.
        factor: of the function at each query, ``(*batch, H, T, 1)``; ``None`` is 1.
        output: ``"diagonal"``, ``"full"`` or ``"mean"``.
        bias: added to the log kernel between queries, broadcast to ``(*batch, H, T, T)``.

    Returns:
        ``(*batch, H, D, T)`` and ``(*batch, H, D, T, T)``, or of size 1 in place of D; ``None`` where not asked for.
    """
    if output == "mean":
        return None, None
    scale = cast_scale(scale, features.dtype)
    if output == "full":
        covariance = basis.prior(query, bias).unsqueeze(-3) + covariance_correction(scale, features)
        covariance = covariance if factor is None else covariance * (factor * factor.mT).unsqueeze(-3)
        return covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0), covariance
    prior = basis.variance
    if bias is not None:
        prior = prior * bias.to(prior.dtype).diagonal(dim1=-2, dim2=-1).unsqueeze(-1).exp()
    variance = (prior + variance_correction(scale, features)).mT.clamp_min(0.0)
    return (variance if factor is None else variance * factor.mT.square()), None


def round_posterior(post: AttentionPosterior, query: Tensor) -> AttentionPosterior:
    """The mean in the dtype of the queries, all else in it or float32, whichever is longer."""
    dtype = algebra_dtype(query)

    def rounded(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(dtype)

    return AttentionPosterior(
        post.mean.to(query.dtype),
        rounded(post.variance),
        rounded(post.covariance),
        post.kl_global.to(dtype),
        post.kl_amortised.to(dtype),
        rounded(post.kl_prefix),
        rounded(post.factor),
    )
