r"""Decoupled sparse-GP attention: the mean from all tokens, the covariance from a few inducing keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpseq.sgpa.arguments import check_choice, check_inducing, check_kernel, check_tokens
from gpseq.sgpa.basis import (
    InducingBasis,
    algebra_dtype,
    exponential_factor,
    inducing_basis,
    inducing_kl,
    inducing_spread,
    round_posterior,
    scale_tokens,
    without_autocast,
)
from gpseq.sgpa.causal import causal_linear_attention, mean_over_tokens, prefix_kl
from gpseq.sgpa.masks import RowMask, check_mask, mask_keys, query_weights, row_mask
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.sgpa.rbf import half_norms, rbf_product
from gpseq.sgpa.scales import Scale


def decoupled_posterior(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inducing_key: Tensor,
    inducing_value: Tensor,
    inducing_scale_tril: Scale,
    lengthscale: Tensor,
    variance: Tensor,
    kernel: str = "rbf",
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    form: str = "orthogonal",
    jitter: float | None = None,
    output: str = "diagonal",
    normalise: bool = False,
    value_scale: str | None = None,
    inducing_bias: tuple[Tensor, Tensor] | None = None,
) -> AttentionPosterior:
    r"""Posterior of attention whose mean uses every key and whose covariance uses ``M`` inducing keys.

    With :math:`C(x, y) = k(x, y) - k(x, g) K_{gg}^{-1} k(g, y)`, the prior's covariance given the inducing variables,
    and :math:`L L^\top = K_{gg}`, :math:`V = K_{qg} L^{-\top}`,

    .. math::
        m = C(q, a)\, v_a + K_{qg}\, v_g, \qquad \Sigma = K_{qq} + V (L_s L_s^\top - I) V^\top,

    .. math::
        \mathrm{KL}_g = \tfrac12 [ |L_s|_F^2 - M + v_g^\top K_{gg} v_g ] - \sum \log \operatorname{diag} L_s, \qquad
        \mathrm{KL}_a = \tfrac12\, v_a^\top C(a, a)\, v_a .

    This is an ordinary sparse variational GP on the union of the keys and the inducing keys, one for each head and
    output dimension. With ``form="cheng_boots"`` the inducing value is :math:`w` with
    :math:`v_g = w + K_{gg}^{-1} K_{ga} v_a`: the mean is :math:`K_{qa} v_a + K_{qg} w`, so that zero leaves plain
    kernel attention, and :math:`\mathrm{KL}_a = \tfrac12 v_a^\top K_{aa} v_a + w^\top K_{ga} v_a`, while
    :math:`\mathrm{KL}_g` has :math:`w` in the place of :math:`v_g`; only the sum of both is a divergence then.

    The middle term of the mean needs :math:`K_{gg}^{-1}`; without it the mean is another function and the divergence is
    not its own.

    Args:
        query: ``(*batch, H, Tq, dq)``.
        key: the sequence's own keys, ``(*batch, H, Tk, dq)``; in self-attention the same tensor as ``query``: that
            saves a product, and padded tokens and biases of ``attn_mask`` are then those of the queries too.
        value: :math:`v_a`, ``(*batch, H, Tk, D)``.
        inducing_key: ``(H, M, dq)``; ``M = 0`` is plain kernel attention.
        inducing_value: :math:`v_g` or :math:`w`, ``(H, M, D)``.
        inducing_scale_tril: whitened factor :math:`L_s`, ``(H, D, M, M)``, or ``(H, 1, M, M)`` shared by the
            dimensions; or a :class:`DiagonalScale` or :class:`LowRankScale`.
        lengthscale: ``(H, dq)``, in units of the projected tokens.
        variance: :math:`s^2`, ``(H,)``: multiplies the kernel.
        kernel: ``"rbf"``, :math:`s^2 \exp(-\tfrac12 |\tilde x - \tilde y|^2)`, or ``"exponential"``,
            :math:`s^2 \exp(\tilde x \cdot \tilde y)`, with :math:`\tilde x = x / \ell`. The second is the first between
            factors :math:`e^{|\tilde x|^2 / 2}`, and is computed so; the variance of a query is
            :math:`s^2 e^{|\tilde x|^2}`, which float32 can hold for :math:`|\tilde x|^2 < 88`.
        key_padding_mask: ``(*batch, Tk)``, boolean (True = ignore) or floating (added to the log kernel).
        attn_mask: broadcasts to ``(*batch, H, Tq, Tk)``, boolean (True = ignore) or floating (added to the log kernel;
            it must leave the kernel positive semi-definite to be a posterior). Each query is then a posterior with keys
            of its own, and the matrix of scores is formed. A bias holds for a pair of tokens whichever of them sees the
            other. Where ``key is not query`` it is between queries and keys alone: keys among themselves have none.
        is_causal: query t sees keys 1 to t; needs ``Tq == Tk``, and goes with no ``attn_mask``.
        form: ``"orthogonal"`` or ``"cheng_boots"``.
        jitter: relative to the mean diagonal of :math:`K_{gg}`; ``None`` fits the dtype of the queries.
        output: ``"diagonal"``, ``"full"`` (covariances between queries too) or ``"mean"``.
        normalise: divide the kernel by its mean over the keys, :math:`k'(x, y) = k(x, y) / (\bar Z(x) \bar Z(y))`, and
            take values as weights of softmax attention: with :math:`w = 0` the mean of the Cheng-Boots form *is*
            softmax attention with tied projections. ``variance`` then multiplies the variance and divides
            :math:`\mathrm{KL}_a`, and leaves the mean alone.
        value_scale: ``"length"`` divides the values of each query by the number of keys that it sees, so that mean and
            divergence do not grow with the length of the sequence; ``None`` takes them as they are. ``normalise`` has
            it built in.
        inducing_bias: what ``attn_mask`` is for keys, for inducing keys: added to the log kernel of ``(Tq, M)`` and
            ``(M, M)``. A positional bias such as ALiBi keeps its posterior only if the inducing keys take part.

    Returns:
        The marginals and the divergences, in the dtype of ``query`` (float32 for variances and divergences of shorter
        ones).

    Raises:
        TypeError: tokens are no floating-point tensors of one dtype, or a mask is neither boolean nor floating.
        ValueError: there is no token, shapes do not fit each other, or an option is unknown.

    Source:
        Chen and Li (2023), Calibrating Transformers via Sparse Gaussian Processes; the forms of the mean are those of
        Salimbeni et al. (2018) and Cheng and Boots (2017).

    Example:
        >>> x, g = torch.randn(2, 5, 3), torch.randn(2, 4, 3)  # two heads, five tokens, four inducing keys
        >>> post = decoupled_posterior(
        ...     x,
        ...     x,
        ...     torch.zeros(2, 5, 1),
        ...     g,
        ...     torch.zeros(2, 4, 1),
        ...     torch.eye(4).expand(2, 1, 4, 4),
        ...     torch.ones(2, 3),
        ...     torch.ones(2),
        ... )
        >>> post.mean.abs().max(), post.kl_global.sum()  # the prior
        (tensor(0.), tensor(0.))
    """
    check_choice("form", form, ("orthogonal", "cheng_boots"))
    check_choice("kernel", kernel, ("rbf", "exponential"))
    check_choice("value_scale", value_scale, ("length", None))
    check_choice("output", output, ("diagonal", "full", "mean"))
    check_tokens(query, key, value)
    check_kernel(query, lengthscale, variance)
    check_inducing(query, value, inducing_key, inducing_value, inducing_scale_tril)
    if is_causal and (query.shape[-2] != key.shape[-2] or attn_mask is not None):
        lengths = f"{query.shape[-2]} queries and {key.shape[-2]} keys"
        other = "" if attn_mask is None else " with an attn_mask"
        raise ValueError(f"is_causal: expected as many queries as keys and no attn_mask, got {lengths}{other}.")
    cross_bias, gram_bias = _check_bias(inducing_bias, query, key, inducing_key)
    rows = row_mask(attn_mask, (*query.shape[:-1], key.shape[-2]))
    dims = value.shape[-1]
    with without_autocast(query):
        tokens = _scaled_tokens(
            query, key, value, lengthscale, kernel, key_padding_mask, rows, is_causal, variance if normalise else None
        )
        basis = inducing_basis(inducing_key, lengthscale, variance, query, jitter, gram_bias, output)
        algebra = basis.key.dtype
        v_g = inducing_value.to(algebra)
        v_g = v_g * exponential_factor(basis.key) if kernel == "exponential" else v_g
        basis, (query_tokens, key_tokens) = basis.around(tokens.query, tokens.key)
        tokens = tokens._replace(query=query_tokens, key=key_tokens)
        shift = tokens.shift
        own = v_g if shift is None else v_g * (-shift).exp().to(algebra)
        inducing = _shared(tokens, basis, own, cross_bias)
        orthogonal = form == "orthogonal"
        total = _kernel_product(tokens, torch.cat([tokens.value, tokens.mass], -1) if normalise else tokens.value)
        amortised = basis.variance * total[..., :dims].to(algebra)
        if orthogonal:
            amortised = amortised - _explained_product(tokens, inducing)
        count = _seen(tokens).to(algebra) if normalise or value_scale == "length" else None
        # Every term of the mean is under the kernel before it is normalised, and one factor a query does the rest.
        mean = (amortised if count is None else amortised / count.clamp_min(1.0)) + inducing.cross @ own
        factor = None if tokens.factor is None else tokens.factor.to(algebra)
        if normalise and count is not None:
            factor = _normaliser(total[..., dims:].to(algebra), count, shift).reciprocal()
        mean = mean if factor is None else mean * factor
        kl_amortised, kl_prefix = _amortised_kl(tokens, inducing, amortised, count, orthogonal)
        if shift is not None and factor is not None:
            factor, square = factor * (-shift).exp(), (2.0 * shift).clamp_max(80.0).exp()
            kl_amortised = kl_amortised * square.squeeze(-1)
            kl_prefix = None if kl_prefix is None else kl_prefix * square
        spread, covariance = inducing_spread(
            basis, tokens.query, inducing.features, inducing_scale_tril, factor, output, tokens.own_bias
        )
        kl_global = inducing_kl(basis, v_g, inducing_scale_tril)
    post = AttentionPosterior(mean, spread, covariance, kl_global, kl_amortised, kl_prefix, factor)
    return round_posterior(post, query)


class _Tokens(NamedTuple):
    """A sequence under the unit RBF kernel: scaled, masked, with the factors that another kernel needs."""

    query: Tensor  # (*batch, H, Tq, dq), divided by the length-scale
    key: Tensor  # (*batch, H, Tk, dq)
    value: Tensor  # (*batch, H, Tk, D), zero where there is no key
    mass: Tensor  # (*batch, H, Tk, 1), what a value of one is under this kernel; no column unless it is normalised
    factor: Tensor | None  # (*batch, H, Tq, 1), what multiplies the function; None is 1
    shift: Tensor | None  # (*batch, H, 1, 1), logarithm of what values were divided by; None is 0
    keep: Tensor | None  # (*batch, 1, Tk), which keys there are; None is all
    rows: RowMask | None
    is_causal: bool

    @property
    def is_self(self) -> bool:
        """Whether the queries are the keys."""
        return self.key is self.query

    @property
    def own_bias(self) -> Tensor | None:
        """The bias of the tokens' own covariance, ``(*batch, H, T, T)``: that of the one that sees the other."""
        if self.rows is None or self.rows.bias is None or not self.is_self:
            return None
        return torch.where(self.rows.attend, self.rows.bias, self.rows.bias.mT)


class _Inducing(NamedTuple):
    """What inducing keys share with the tokens."""

    value: Tensor  # (H, M, D)
    basis: InducingBasis
    cross: Tensor  # K_qg, (*batch, H, Tq, M)
    features: Tensor  # K_qg L^-T
    key_cross: Tensor  # K_ag, (*batch, H, Tk, M)
    key_features: Tensor  # K_ag L^-T


def _scaled_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengthscale: Tensor,
    kernel: str,
    key_padding_mask: Tensor | None,
    rows: RowMask | None,
    is_causal: bool,
    amplitude: Tensor | None,
) -> _Tokens:
    """Scale and mask a sequence; ``amplitude`` is the variance ``(H,)`` of a kernel to be normalised, else None."""
    is_self, dims, shift = key is query, value.shape[-1], None
    if kernel == "exponential" and query.dtype == torch.float16:
        query, key, value = query.float(), key.float(), value.float()  # the factors do not fit
    if amplitude is not None:
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    # Masked first of all: what padding holds must not meet a parameter, or its gradient is NaN.
    key, value, keep = mask_keys(key, value, key_padding_mask)
    k = scale_tokens(key, lengthscale)
    q, factor = k if is_self else scale_tokens(query, lengthscale), None
    if kernel == "exponential":
        log_weight = -half_norms(k.to(algebra_dtype(k)))
        if amplitude is None:
            factor = log_weight.exp() if is_self else exponential_factor(q.to(log_weight.dtype))
        else:  # in a ratio of sums the largest weight may be 1, and large ones do not overflow
            shift = log_weight.detach().amax(-2, keepdim=True)
            log_weight = log_weight - shift
        value = value * log_weight.exp().to(value.dtype)
    value, mass = value[..., :dims], value[..., dims:]
    if amplitude is not None:
        value = value / amplitude[..., None, None].to(value.dtype)
    return _Tokens(q, k, value, mass, factor, shift, keep, rows, is_causal)


def _shared(tokens: _Tokens, basis: InducingBasis, value: Tensor, bias: Tensor | None) -> _Inducing:
    cross = key_cross = basis.covariance(tokens.query, bias)
    features = key_features = basis.whitening.features(cross)
    if not tokens.is_self:
        key_cross = basis.covariance(tokens.key)
        key_features = basis.whitening.features(key_cross)
    return _Inducing(value, basis, cross, features, key_cross, key_features)


def _kernel_product(tokens: _Tokens, value: Tensor) -> Tensor:
    """What the unit kernel makes of values, under the masks, ``(*batch, H, Tq, columns)``."""
    q, k, rows = tokens.query, tokens.key, tokens.rows
    if rows is None:
        return rbf_product(q, k, value, is_causal=tokens.is_causal)
    scores = torch.zeros((), dtype=q.dtype, device=q.device) if rows.bias is None else rows.bias.to(q.dtype)
    return rbf_product(q, k, value, bias=scores.masked_fill(~rows.attend, -torch.inf))


def _explained_product(tokens: _Tokens, inducing: _Inducing) -> Tensor:
    """The part of it that the inducing keys explain: K_qg K_gg^-1 K_ga v under the masks."""
    value = tokens.value.to(inducing.features.dtype)
    if tokens.is_causal:
        return causal_linear_attention(inducing.features, inducing.key_features, value)
    if tokens.rows is not None:
        return ((inducing.features @ inducing.key_features.mT) * tokens.rows.attend) @ value
    return inducing.features @ (inducing.key_features.mT @ value)


def _seen(tokens: _Tokens) -> Tensor:
    """How many keys each query sees, ``(*batch, H, Tq, 1)`` or what broadcasts to it."""
    keep = tokens.keep
    if keep is None:
        keep = torch.ones(1, tokens.key.shape[-2], dtype=torch.bool, device=tokens.key.device)
    if tokens.rows is not None:
        return (tokens.rows.attend & keep.unsqueeze(-2)).sum(-1, keepdim=True)
    return keep.cumsum(-1).unsqueeze(-1) if tokens.is_causal else keep.sum(-1)[..., None, None]


def _normaliser(total: Tensor, count: Tensor, shift: Tensor | None) -> Tensor:
    """The mean of the kernel over the keys that each query sees; 1 where it sees none. Both divided by e^shift."""
    tiny, one = torch.finfo(total.dtype).tiny, torch.ones((), dtype=total.dtype, device=total.device)
    none = one if shift is None else (-shift).exp().to(total.dtype)
    return torch.where(count > 0, total / count.clamp_min(1.0), none).clamp_min(tiny)


def _amortised_kl(
    tokens: _Tokens, inducing: _Inducing, mean: Tensor, count: Tensor | None, orthogonal: bool
) -> tuple[Tensor, Tensor | None]:
    """What the sequence's keys pay, and under a causal mask what every prefix pays.

    ``mean`` is the amortised part of the mean at the queries. Where a query sees ``count`` keys, each value counts that
    many times less.
    """
    value = tokens.value.to(mean.dtype)
    less = None if count is None else count.clamp_min(1.0).reciprocal()
    if tokens.rows is not None:
        return _row_kl(tokens, inducing, value, less, orthogonal), None
    if not tokens.is_self:  # the divergence asks for the mean at the keys
        tokens = tokens._replace(query=tokens.key)
        inducing = inducing._replace(cross=inducing.key_cross, features=inducing.key_features)
        mean = inducing.basis.variance * _kernel_product(tokens, tokens.value).to(mean.dtype)
        mean = mean - _explained_product(tokens, inducing) if orthogonal else mean
    if tokens.is_causal:
        explained = inducing.key_features.square().sum(-1) if orthogonal else 0.0
        prefix = prefix_kl(value, mean, inducing.basis.variance.squeeze(-1) - explained)
        prefix = prefix if less is None else prefix * less.mT.square()
        if not orthogonal:
            crossed = (value * (inducing.key_cross @ inducing.value)).cumsum(-2).mT
            prefix = prefix + (crossed if less is None else crossed * less.mT)
        return mean_over_tokens(prefix, tokens.keep), prefix
    kl = 0.5 * (value * mean).sum(-2)
    kl = kl if less is None else kl * less.squeeze(-2).square()
    if not orthogonal:
        crossed = ((inducing.key_cross.mT @ value) * inducing.value).sum(-2)
        kl = kl + (crossed if less is None else crossed * less.squeeze(-2))
    return kl, None


def _row_kl(tokens: _Tokens, inducing: _Inducing, value: Tensor, less: Tensor | None, orthogonal: bool) -> Tensor:
    """Mean over the queries of what each pays for the keys that it sees: v' (C * W) v / 2 with W from the mask."""
    rows = tokens.rows
    assert rows is not None
    covariance = inducing.basis.prior(tokens.key, tokens.own_bias)
    if orthogonal:
        covariance = covariance - inducing.key_features @ inducing.key_features.mT
    weight = query_weights(rows, tokens.keep if tokens.is_self else None, value.dtype)
    pairs = weight if less is None else weight * less.square()
    together = rows.attend.to(value.dtype).mT @ (rows.attend * pairs)
    kl = 0.5 * (value * ((covariance * together) @ value)).sum(-2)
    if orthogonal:
        return kl
    seen = (rows.attend * (weight if less is None else weight * less)).sum(-2).unsqueeze(-1)
    return kl + ((inducing.key_cross.mT @ (seen * value)) * inducing.value).sum(-2)


def _check_bias(
    bias: tuple[Tensor, Tensor] | None, query: Tensor, key: Tensor, inducing_key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The biases between queries and inducing keys and among inducing keys, or None twice."""
    if bias is None:
        return None, None
    if key is not query:
        raise ValueError("inducing_bias: expected query and key to be the same tensor, got two.")
    cross, gram = bias
    size = inducing_key.shape[-2]
    check_mask("inducing_bias[0]", cross, (*query.shape[:-1], size))
    check_mask("inducing_bias[1]", gram, (query.shape[-3], size, size))
    if not (cross.is_floating_point() and gram.is_floating_point()):
        raise TypeError("inducing_bias: expected two floating-point tensors, got a boolean one.")
    return cross, gram
