"""Posteriors of attention heads as distributions."""

from __future__ import annotations

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.operators import (
    DiagLinearOperator,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
)
from torch import Tensor

from gpseq.sgpa.posterior import AttentionPosterior


def heads_distribution(post: AttentionPosterior, root: Tensor | None, batched: bool) -> MultitaskMultivariateNormal:
    r"""Distribution of the heads at all tokens; dimensions are independent.

    Args:
        post: with covariances, or with variances and a root.
        root: of what the inducing variables explain, R with :math:`R R^\top = V S V^\top`, ``(B, H, D, T, R)`` or of
            size 1 in place of D. A diagonal is added that makes the marginal variances those of ``post``. ``None``
            takes the covariances.
        batched: whether the batch, then of size 1, stays.

    Returns:
        Event ``(T, D)``, batch ``(B, H)`` or ``(H,)``.
    """
    mean, spread = post.mean.mT, post.covariance if root is None else post.variance
    assert spread is not None
    if not batched:  # before the operator is made: a part of it would be of another kind
        mean, spread, root = mean.squeeze(0), spread.squeeze(0), None if root is None else root.squeeze(0)
    batch = mean.shape[:-1]  # with D
    if root is None:
        covariance = to_linear_operator(spread.expand(*batch, -1, -1))  # whose Cholesky takes jitter
    else:
        rest, limits = spread - root.square().sum(-1), torch.finfo(spread.dtype)
        # As much as rounding leaves, and no less: the inverse of the diagonal is asked for.
        rest = rest.maximum(limits.eps * spread.clamp_min(limits.tiny))
        covariance = LowRankRootAddedDiagLinearOperator(
            LowRankRootLinearOperator(root.expand(*batch, -1, -1)), DiagLinearOperator(rest.expand(*batch, -1))
        )
    marginals = MultivariateNormal(mean.to(spread.dtype), covariance)
    return MultitaskMultivariateNormal.from_batch_mvn(marginals, task_dim=-1)
