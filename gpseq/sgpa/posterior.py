"""What attention answers with: the marginals of its Gaussian processes and what they cost."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionPosterior(NamedTuple):
    """Posterior of ``D`` Gaussian processes a head at the queries, independent of each other.

    Attributes:
        mean: ``(*batch, H, Tq, D)``.
        variance: marginal variances, ``(*batch, H, D, Tq)``; of size 1 in place of D where the dimensions share one.
            ``None`` if only the mean was asked for.
        covariance: ``(*batch, H, D, Tq, Tq)``, or ``(*batch, H, 1, Tq, Tq)`` where they share one; ``None`` unless
            ``output="full"``.
        kl_global: ``(H, D)``, what q(u) of the inducing keys pays, in nats; the same for every sequence.
        kl_amortised: ``(*batch, H, D)``, what the sequence's own keys pay. Under a causal or row mask, the mean over
            the queries, each of which has a posterior of its own.
        kl_prefix: ``(*batch, H, D, T)``, the amortised part of every prefix; ``None`` unless causal.
        factor: what the function of the unit-scale RBF kernel is multiplied by at each query, ``(*batch, H, Tq, 1)``;
            ``None`` is 1. Exponential and normalised kernels have one; :func:`pathwise_noise` takes it.
    """

    mean: Tensor
    variance: Tensor | None
    covariance: Tensor | None
    kl_global: Tensor
    kl_amortised: Tensor
    kl_prefix: Tensor | None = None
    factor: Tensor | None = None
