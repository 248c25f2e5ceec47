r"""The hot path of a layer: decoupled self-attention under the RBF kernel with derivatives written out.

What :func:`gpseq.sgpa.decoupled_posterior` does in small operations, and automatic differentiation in many more, is
done here in a few large ones: for short sequences their number is what costs. There are two functions, one of the
parameters alone and one of the tokens. They are for float32 or float64 without autocast, the orthogonal form and masks
of padding; tests hold them to the plain functions.

Tensors of tokens have the head in front, ``(H, B, T, ...)``: products with inducing keys are then ``H`` large ones,
those between tokens ``H B`` small ones, and neither moves memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, bmm

from gpseq.linalg import default_jitter
from gpseq.sgpa.quadratic import quadratic_form, quadratic_gradients
from gpseq.sgpa.rbf import as_queries, half_norms, rbf_product
from gpseq.sgpa.whitening import Whitening, whiten

# Up to this length the matrix of scores is formed: on a CPU that is faster than the fused kernel, and memory is no
# concern; on other devices it is not.
_EXPLICIT_LENGTH = {"cpu": 384}


class Prepared(NamedTuple):
    r"""What the tokens need of the parameters.

    Attributes:
        weight: of the queries and keys, divided by the length-scales, ``(H dq, width)``.
        shift: bias of the queries and keys, ``(H dq,)``: minus the mean of each head's inducing keys. The kernel does
            not see it, and distances of tokens far from the origin keep their digits.
        key: inducing keys in two more columns, with the log variance, ``(H, M, dq + 2)``.
        inverse: :math:`L^{-1}`, ``(H, M, M)``.
        value: whitened mean of the inducing variables, :math:`L^\top v_g`, ``(H, M, D)``.
        excess: :math:`S - I`, ``(H, D, M, M)``, or ``(H, 1, M, M)`` shared by the dimensions.
    """

    weight: Tensor
    shift: Tensor
    key: Tensor
    inverse: Tensor
    value: Tensor
    excess: Tensor


def prepare(
    weight: Tensor,
    location: Tensor,
    value: Tensor,
    log_lengthscale: Tensor,
    log_variance: Tensor,
    lower: Tensor,
    log_diagonal: Tensor,
    jitter: float | None = None,
) -> Prepared:
    """The part that depends on parameters alone.

    Args:
        weight: of queries and keys, ``(H dq, width)``.
        location: of inducing keys, ``(H, M, width)``.
        value: :math:`v_g`, ``(H, M, D)``.
        log_lengthscale: ``(H, dq)``.
        log_variance: ``(H,)``.
        lower: below the diagonal of the whitened factor, ``(H, D, M, M)`` or ``(H, 1, M, M)``.
        log_diagonal: of its diagonal, ``(H, D, M)`` or ``(H, 1, M)``.
        jitter: relative; ``None`` fits the dtype.
    """
    jitter = default_jitter(weight.dtype) if jitter is None else jitter
    arguments = (weight, location, value, log_lengthscale, log_variance, lower, log_diagonal, jitter)
    return Prepared(*_Prepare.apply(*arguments))


def prepare_plainly(
    weight: Tensor,
    location: Tensor,
    value: Tensor,
    log_lengthscale: Tensor,
    log_variance: Tensor,
    lower: Tensor,
    log_diagonal: Tensor,
    jitter: float,
) -> Prepared:
    """:func:`prepare` by automatic differentiation: for second derivatives, and for tests."""
    heads, size = location.shape[:2]
    scaled = weight * (-log_lengthscale).exp().flatten().unsqueeze(-1)
    tokens = location @ scaled.view(heads, -1, location.shape[-1]).mT
    shift = -tokens.detach().mean(-2, keepdim=True)
    tokens = tokens + shift
    log_variance = log_variance[..., None, None]
    key = _keys(tokens, log_variance)
    tokens64 = tokens.double()
    whitening = whiten((as_queries(tokens64) @ _keys(tokens64, log_variance.double()).mT).exp(), jitter)
    tril = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
    excess = tril @ tril.mT - torch.eye(size, dtype=tril.dtype, device=tril.device)
    whitened = whitening.tril.mT.to(value.dtype) @ value
    return Prepared(scaled, shift.flatten(), key, whitening.inverse.to(weight.dtype), whitened, excess)


class _Prepare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        weight, location, value, log_lengthscale, log_variance, lower, log_diagonal, jitter = arguments
        heads = location.shape[0]
        scaled = weight * (-log_lengthscale).exp().view(-1, 1)
        tokens = bmm(location, scaled.view(heads, -1, location.shape[-1]).mT)
        shift = tokens.mean(-2, keepdim=True).neg_()
        tokens += shift  # a constant: nothing depends on it, and so does no derivative
        log_variance = log_variance[:, None, None]
        norms = torch.add(log_variance, (tokens * tokens).sum(-1, keepdim=True), alpha=-0.5)
        key = torch.cat([tokens, norms, torch.ones_like(norms)], -1)
        # With the norms of the keys, rounded as they are: tokens see the same inducing keys as these see each other.
        tokens64, norms64 = tokens.double(), norms.double()
        gram = (norms64 + (norms64 - log_variance).mT).baddbmm_(tokens64, tokens64.mT).exp_()
        whitening = _whiten(gram, log_variance, jitter)
        whitened = bmm(whitening.tril.to(value.dtype).mT, value)
        tril = lower.tril(-1)
        tril.diagonal(dim1=-2, dim2=-1).add_(log_diagonal.exp())
        excess = (tril @ tril.mT) if lower.shape[1] > 1 else bmm(tril.squeeze(1), tril.squeeze(1).mT).unsqueeze(1)
        excess.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        inverse = whitening.inverse.to(weight.dtype)
        ctx.save_for_backward(*arguments[:-1], scaled, tokens, whitened, tril, *whitening)
        ctx.jitter = jitter
        ctx.set_materialize_grads(False)
        shift = shift.flatten()
        ctx.mark_non_differentiable(shift)
        return scaled, shift, key, inverse, whitened, excess

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if _plain(grads):
            return (*_again(prepare_plainly, (*saved[:7], ctx.jitter), grads), None)
        _, location, value, log_lengthscale, *_ = saved[:7]
        scaled, tokens, whitened, tril, gram, factor, inverse64 = saved[7:]
        g_scaled, _, g_key, g_inverse, g_whitened, g_excess = grads
        heads, width = location.shape[0], tokens.shape[-1]
        g_tokens, g_log_variance, g_gram, g_value = None, None, None, None
        if g_inverse is not None:
            g_gram = bmm(g_inverse.double(), inverse64.mT).neg_()
        if g_whitened is not None:
            outer = bmm(whitened, g_whitened.mT)
            g_gram = outer.double() if g_gram is None else g_gram.add_(outer)
            g_value = bmm(factor.to(value.dtype), g_whitened)
        if g_gram is not None:
            # Through the Cholesky factor: half of the lower part, between inverses.
            g_gram.tril_().diagonal(dim1=-2, dim2=-1).mul_(0.5)
            g_gram = bmm(inverse64.mT, bmm(g_gram, inverse64)).mul_(gram).to(tokens.dtype)
            g_gram = g_gram + g_gram.mT  # for both tokens of a pair
            total = g_gram.sum(-1, keepdim=True)
            g_log_variance = 0.5 * total.sum((-2, -1))
            g_tokens = torch.addcmul(bmm(g_gram, tokens), total, tokens, value=-1.0)
        if g_key is not None:
            g_norms = g_key[..., width : width + 1]
            direct, weight_sum = torch.addcmul(g_key[..., :width], g_norms, tokens, value=-1.0), g_norms.sum((-2, -1))
            g_tokens = direct if g_tokens is None else g_tokens.add_(direct)
            g_log_variance = weight_sum if g_log_variance is None else g_log_variance.add_(weight_sum)
        g_tokens = torch.zeros_like(tokens) if g_tokens is None else g_tokens
        rows = scaled.view(heads, -1, location.shape[-1])
        g_rows = bmm(g_tokens.mT, location)
        if g_scaled is not None:
            g_rows += g_scaled.view(heads, -1, location.shape[-1])
        g_lower, g_log_diagonal = None, None
        if g_excess is not None:
            g_tril = (g_excess + g_excess.mT) @ tril
            g_lower = g_tril.tril(-1)
            g_log_diagonal = g_tril.diagonal(dim1=-2, dim2=-1) * tril.diagonal(dim1=-2, dim2=-1)
        return (
            g_rows.flatten(0, 1) * (-log_lengthscale).exp().view(-1, 1),
            bmm(g_tokens, rows),
            g_value,
            (g_rows * rows).sum(-1).neg_(),
            g_log_variance,
            g_lower,
            g_log_diagonal,
            None,
        )


def attend(
    query: Tensor,
    value: Tensor,
    prepared: Prepared,
    log_variance: Tensor,
    share: Tensor | float,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r"""A draw of self-attention, and what it costs.

    Args:
        query: scaled, ``(B, H, T, dq)``.
        value: zero at padding, ``(B, H, T, D)``.
        prepared: of the parameters.
        log_variance: ``(H,)``.
        share: what values are multiplied by, one over the number of keys; ``(B, 1, 1)`` or a number.
        noise: standard normal, ``(B, H, T, D)``; ``None`` gives the mean.

    Returns:
        Heads ``(B, H, T, D)``, and the amortised divergence of each sequence, over its heads and dimensions, ``(B,)``.
    """
    query, value = query.transpose(0, 1), value.transpose(0, 1)
    log_variance = log_variance[:, None, None]
    product = None
    if query.shape[-2] > _EXPLICIT_LENGTH.get(query.device.type, 0):
        # The variance goes with the values: the kernel is the unit one there.
        weight = log_variance.unsqueeze(-1).exp() * share
        product = rbf_product(query, query, value * weight, fused=True)
    noise = None if noise is None else noise.transpose(0, 1)
    heads, cost = _Attend.apply(query, value, *prepared[2:], log_variance, share, noise, product)
    return heads.transpose(0, 1), cost


def attend_plainly(
    query: Tensor,
    value: Tensor,
    key: Tensor,
    inverse: Tensor,
    whitened: Tensor,
    excess: Tensor,
    log_variance: Tensor,
    share: Tensor | float,
    noise: Tensor | None,
    product: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The tokens' part by automatic differentiation, heads in front: for second derivatives, and for tests."""
    value = value * share
    queries = as_queries(query)
    if product is None:
        product = (queries @ _keys(query, log_variance.unsqueeze(-1)).mT).exp() @ value
    features = (queries @ key.unsqueeze(1).mT).exp() @ inverse.unsqueeze(1).mT
    own = features.mT @ value
    mean = product + features @ (whitened.unsqueeze(1) - own)
    cost = 0.5 * ((value * mean).sum((0, 2, 3)) - (own * whitened.unsqueeze(1)).sum((0, 2, 3)))
    if noise is None:
        return mean, cost
    spread = torch.einsum("hbtm,hdmn,hbtn->hbtd", features, excess, features)
    variance = log_variance.exp().unsqueeze(-1) + spread
    return mean + variance.clamp_min(torch.finfo(variance.dtype).eps ** 2).sqrt() * noise, cost


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        query, value, key, inverse, whitened, excess, log_variance, share, noise, product = arguments
        heads, batch, length, width = query.shape
        size, dims = whitened.shape[-2:]
        many, rows = heads * batch, batch * length
        norms = (query * query).sum(-1, keepdim=True).mul_(-0.5)
        check_reach(norms)
        queries = torch.cat([query, torch.ones_like(norms), norms], -1).view(many, length, width + 2)
        v = torch.mul(value, share, out=value.new_empty(heads, batch, length, dims)).view(many, length, dims)
        covariance = bmm(queries.view(heads, rows, width + 2), key.mT).clamp_max_(log_variance).exp_()
        features = bmm(covariance, inverse.mT)
        by_sequence = features.view(many, length, size)
        own = bmm(by_sequence.mT, v).view(heads, batch, size, dims)
        rest = (whitened.unsqueeze(1) - own).view(many, size, dims)
        mean, kernel = bmm(by_sequence, rest), None
        if product is None:
            # Transposed in memory: a product of two tensors in their own order is twice as fast for short sequences.
            weighted = (norms + log_variance.unsqueeze(-1)).mT
            keys = torch.cat([query.mT, weighted, torch.ones_like(weighted)], -2).view(many, width + 2, length)
            # No distance is negative, whatever rounding says.
            scores = bmm(queries, keys).view(heads, batch * length * length)
            kernel = scores.clamp_max_(log_variance.view(heads, 1)).exp_()
            kernel = kernel.view(many, length, length)
            mean.baddbmm_(kernel, v)
        else:
            mean.view_as(product).add_(product)
        cost = bmm(v.view(many, 1, length * dims), mean.view(many, length * dims, 1)).view(heads, batch, 1)
        cost.baddbmm_(own.view(heads, batch, size * dims), whitened.view(heads, size * dims, 1), beta=0.5, alpha=-0.5)
        drawn, deviation = mean.view(heads, batch, length, dims), None
        if noise is not None:
            variance = quadratic_form(features, excess)
            floor = torch.finfo(variance.dtype).eps ** 2
            variance.add_(log_variance.exp())
            # Looking is free on a CPU only; elsewhere the gradient is masked in any case.
            ctx.at_floor = variance.device.type != "cpu" or (bool(variance.numel()) and variance.amin().item() < floor)
            deviation = variance.clamp_min_(floor).sqrt_()
            # In the layout that the output projection reads.
            columns = deviation.view(heads, batch, length, excess.shape[1])
            drawn = torch.addcmul(drawn, columns, noise, out=_as_output(drawn))
        ctx.save_for_backward(
            *(a if isinstance(a, Tensor) else None for a in arguments),
            queries, covariance, features, own, rest, kernel, mean, deviation, v)  # fmt: skip
        ctx.share = share
        ctx.set_materialize_grads(False)
        return drawn, cost.view(heads, batch).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if _plain(grads):
            arguments = [*saved[:10]]
            arguments[7] = ctx.share
            return tuple(_again(attend_plainly, tuple(arguments), grads))
        query, value, key, inverse, whitened, excess, log_variance, _, noise, product = saved[:10]
        queries, covariance, features, own, rest, kernel, mean, deviation, v = saved[10:]
        g_drawn, g_cost = grads
        heads, batch, length, width = query.shape
        size, dims = whitened.shape[-2:]
        many, rows = heads * batch, batch * length
        by_sequence = features.view(many, length, size)
        g_excess, g_features, g_log_variance = None, None, None
        g_mean = torch.zeros_like(mean) if g_drawn is None else g_drawn.reshape(many, length, dims)
        if noise is not None and g_drawn is not None:
            g_variance = (g_mean.view(heads, batch, length, dims) * noise).reshape(heads, rows, dims)
            if excess.shape[1] == 1:
                g_variance = g_variance.sum(-1, keepdim=True)
            g_variance = g_variance.mul_(0.5).div_(deviation)
            if ctx.at_floor:  # where rounding left no variance the floor stands, and has no derivative
                g_variance.masked_fill_(deviation <= torch.finfo(deviation.dtype).eps, 0.0)
            g_log_variance = g_variance.sum((-2, -1))[:, None, None] * log_variance.exp()
            g_features, g_excess = quadratic_gradients(features, excess, g_variance)
        # The cost is half of values times mean less their own part, and its derivative joins that of the mean.
        if g_cost is not None:
            half = (0.5 * g_cost).repeat(heads).view(many, 1, 1)
            g_mean = torch.addcmul(g_mean, half, v)
        g_rest = bmm(by_sequence.mT, g_mean)
        g_own = g_rest.neg()
        g_whitened = g_rest.view(heads, batch, size, dims).sum(1)
        if g_cost is not None:
            weight = half.view(heads, batch, 1, 1)
            g_own = g_own - (weight * whitened.unsqueeze(1)).reshape(many, size, dims)
            g_whitened = g_whitened - (weight * own).sum(1)
        direct = bmm(g_mean, rest.mT).baddbmm_(v, g_own.mT).view(heads, rows, size)
        g_features = direct if g_features is None else g_features.add_(direct)
        g_v = bmm(by_sequence, g_own)
        g_query = None
        if kernel is not None:
            g_v.baddbmm_(kernel.mT, g_mean)
            scores = bmm(g_mean, v.mT.contiguous()).mul_(kernel)
            # Both tokens of a score, as the tokens are both queries and keys.
            g_query = bmm(scores, queries[..., : width + 1]).baddbmm_(scores.mT, queries[..., : width + 1])
            own_variance = g_query[..., width].reshape(heads, -1).sum(-1).mul(0.5)[:, None, None]
            g_log_variance = own_variance if g_log_variance is None else g_log_variance + own_variance
        if g_cost is not None:
            g_v.addcmul_(half, mean)
        g_inverse = bmm(g_features.mT, covariance)
        g_scores = bmm(g_features, inverse).mul_(covariance)
        g_key = bmm(g_scores.mT, queries.view(heads, rows, width + 2))
        through = bmm(g_scores, key).view(many, length, width + 2)
        slope, pull = through[..., width + 1 :], through[..., :width]
        if g_query is not None:
            slope, pull = slope.add_(g_query[..., width:]), pull.add_(g_query[..., :width])
        g_query = _as_output(query)
        torch.addcmul(
            pull.view_as(query),
            queries.view(*query.shape[:-1], width + 2)[..., :width],
            slope.view(*query.shape[:-1], 1),
            value=-1.0,
            out=g_query,
        )
        g_value = None
        if ctx.needs_input_grad[1]:
            g_value = torch.mul(g_v.view_as(value), ctx.share, out=_as_output(value))
        g_product = None if product is None else g_mean.view(heads, batch, length, dims)
        return g_query, g_value, g_key, g_inverse, g_whitened, g_excess, g_log_variance, None, None, g_product


def _keys(tokens: Tensor, log_weight: Tensor) -> Tensor:
    """Tokens with the two columns of a key, and a weight in its score."""
    norms = half_norms(tokens)
    return torch.cat([tokens, norms + log_weight, torch.ones_like(norms)], -1)


def _as_output(tokens: Tensor) -> Tensor:
    """Room for tokens ``(H, B, T, D)``, laid out as ``(B, T, H, D)`` as projections have it."""
    heads, batch, length, dims = tokens.shape
    return tokens.new_empty(batch, length, heads, dims).permute(2, 0, 1, 3)


def _whiten(gram: Tensor, log_variance: Tensor, jitter: float) -> Whitening:
    """:func:`whiten`, in fewer steps where looking at the outcome is free and the first attempt succeeds."""
    if gram.device.type != "cpu":
        return whiten(gram, jitter)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    jittered = torch.addcmul(gram, log_variance.exp().to(gram.dtype), eye, value=jitter)  # the mean diagonal is s2
    factor, info = torch.linalg.cholesky_ex(jittered)
    if info.any():
        return whiten(gram, jitter)
    return Whitening(jittered, factor, torch.linalg.solve_triangular(factor, eye, upper=False))


def check_reach(norms: Tensor) -> None:
    """That squared distances keep their digits; looked at where that is free.

    Args:
        norms: of tokens around the inducing keys, minus half their squared distance.

    Raises:
        ValueError: a token is too far away for the dtype.
    """
    if norms.device.type != "cpu" or not norms.numel():
        return
    farthest, reach = -2.0 * norms.amin().item(), 0.1 / torch.finfo(norms.dtype).eps
    if farthest > reach:
        raise ValueError(
            f"query: expected tokens within {reach**0.5:.0f} length-scales of the inducing keys, beyond which "
            f"{norms.dtype} loses the distances between them, got one at {farthest**0.5:.0f}. Normalise the tokens."
        )


def _plain(grads: tuple[Tensor | None, ...]) -> bool:
    """Whether gradients need plain operations: there will be a second derivative, or they come in batches."""
    functorch = torch._C._functorch
    return torch.is_grad_enabled() or any(
        g is not None and (functorch.is_functorch_wrapped_tensor(g) or functorch.is_legacy_batchedtensor(g))
        for g in grads
    )


def _again(function: Any, arguments: tuple[Any, ...], grads: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradients with a graph of their own, through the plain function."""
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    with torch.enable_grad():
        results = function(*arguments)
    outputs = [(o, g) for o, g in zip(results, grads, strict=True) if g is not None and o.requires_grad]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in outputs],
            wanted,
            [g for _, g in outputs],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in arguments]
