"""What attention layers with finitely many weights a head share: draws, moments, and which masks there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from torch import Tensor

from gpseq.nn.gaussian import GaussianAttention
from gpseq.nn.heads import heads_distribution
from gpseq.nn.projection import Tokens
from gpseq.sgpa.draws import marginal_sample, standard_normal
from gpseq.sgpa.masks import removes
from gpseq.sgpa.posterior import AttentionPosterior


class Heads(NamedTuple):
    """Posterior of the heads of a layer: functions ``f = mean + features @ root @ noise``.

    Attributes:
        mean: ``(B, H, Tq, D)``.
        variance: ``(B, H, D, Tq)``, or of size 1 in place of D; ``None`` if it was not asked for.
        features: ``(B, H, Tq, F)``.
        root: of the covariance of the weights, broadcasts to ``(B, H, D, F, F)``; ``None`` if queries do not share one.
        weights: ``(B, H, Tq, Tk)``, if the call asks for them.
        cost: what the divergence or loss of the call is made of, one row a sequence.
    """

    mean: Tensor
    variance: Tensor | None
    features: Tensor
    root: Tensor | None
    weights: Tensor | None
    cost: Tensor


class LinearTimeAttention(GaussianAttention):
    """Base of layers whose heads are linear in finitely many Gaussian weights.

    Subclasses implement :meth:`heads`.
    """

    SAMPLING = ("marginal", "joint", "mean")

    _transient = frozenset({"generator", "_cost"})
    _cost: Tensor | None = None

    def heads(self, tokens: Tokens, variance: bool) -> Heads:
        """Posterior of the heads.

        Args:
            tokens: of the call.
            variance: whether marginal variances are asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} must define heads().")

    def attend(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """From tokens to a draw of the heads; see the base class."""
        heads = self.heads(tokens, self.sampling == "marginal")
        if self.sampling == "joint":
            _check_shared(heads, "sampling: expected 'marginal' or 'mean'")
        self._cost = heads.cost
        if self.sampling == "mean":
            return heads.mean, heads.weights
        if self.sampling == "marginal":
            assert heads.variance is not None
            return marginal_sample(heads.mean, heads.variance, self.generator), heads.weights
        assert heads.root is not None
        shape = (*heads.mean.shape[:-2], heads.mean.shape[-1], heads.root.shape[-1], 1)
        noise = standard_normal(shape, self.generator, heads.root.dtype, heads.root.device)
        drawn = heads.features @ (heads.root @ noise).squeeze(-1).mT
        return (heads.mean + drawn).to(heads.mean.dtype), heads.weights

    def posterior(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> MultitaskMultivariateNormal:
        r"""Posterior of the heads, before the output projection; what the last call left behind stays.

        The covariance is of low rank. As much as a factorisation rounds is added to its diagonal.

        Args:
            query: as in :meth:`forward`.
            key: as in :meth:`forward`.
            value: as in :meth:`forward`.
            key_padding_mask: as in :meth:`forward`.
            attn_mask: as in :meth:`forward`.
            is_causal: as in :meth:`forward`, where queries share their weights.

        Returns:
            Event ``(Tq, D)``, batch ``(B, H)``, or ``(H,)`` for inputs without a batch. Dimensions are independent.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`; or the queries are not jointly Gaussian.
        """
        tokens, batched = self._tokens(query, key, value, key_padding_mask, False, attn_mask, is_causal)
        heads = self.heads(tokens, True)
        _check_shared(heads, "is_causal: expected False")
        assert heads.root is not None and heads.variance is not None
        none = heads.mean.new_zeros(())
        # A matrix of low rank has no Cholesky factor; the rounding of one that is T x T is the least that gives it one.
        rounding = 4 * heads.mean.shape[-2] * torch.finfo(heads.variance.dtype).eps
        variance = heads.variance + rounding * heads.variance.amax(-1, keepdim=True)
        post = AttentionPosterior(heads.mean, variance, None, none, none)
        return heads_distribution(post, heads.features.unsqueeze(-3) @ heads.root, batched)

    def marginals(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Mean and marginal variances of the heads; see the base class."""
        heads = self.heads(tokens, True)
        assert heads.variance is not None
        return heads.mean, heads.variance

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{super().extra_repr()}, sampling={self.sampling!r}"


def _check_shared(heads: Heads, expected: str) -> None:
    if heads.root is None:
        raise ValueError(
            f"{expected} where a causal mask gives every query weights of its own: there is no joint posterior."
        )


def only_causal(tokens: Tokens, reason: str) -> bool:
    """Whether the call is causal, where no mask on pairs of tokens but that one is possible.

    Args:
        tokens: of the call.
        reason: why not, for the message.

    Raises:
        ValueError: there is another mask, or one whose values cannot be looked at here.
    """
    mask = tokens.attn_mask
    if mask is None:
        return tokens.is_causal
    traced = torch.compiler.is_compiling() or mask.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(mask)
    if not traced:
        removed = removes(mask)
        if not removed.any() and (mask.dtype == torch.bool or not mask.any()):
            return False
        future = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
        plain = mask.dtype == torch.bool or not mask.masked_fill(removed, 0.0).any()
        if mask.shape[-2] == mask.shape[-1] and plain and bool((removed == future).all()):
            return True
    how = "; it is traced here, so say is_causal=True" if traced else ""
    raise ValueError(f"attn_mask: expected None or the causal mask: {reason}{how}. Got shape {tuple(mask.shape)}.")


def key_weights(tokens: Tokens, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Which keys there are, ``(B, 1, Tk)``, and how much a floating mask counts each, ``(B, 1, Tk, 1)``.

    Args:
        tokens: of the call.
        dtype: of the weights.

    Returns:
        ``None`` for either where it is all, or 1.
    """
    mask, removed = tokens.key_padding_mask, tokens.removed
    if mask is None or removed is None:
        return None, None
    keep = ~removed.unsqueeze(-2)
    if mask.dtype == torch.bool:
        return keep, None
    return keep, torch.where(removed, 0.0, mask).exp()[:, None, :, None].to(dtype)
