"""Whether a memory of time holds what the kernel asks for, and what follows where it does not."""

from __future__ import annotations

import warnings
from typing import Protocol

from gpytorch.kernels import Kernel

from gpseq.checks import stacklevel_outside
from gpseq.features import CapacityError, HippoFeatures, InducingFeatures
from gpseq.variational import OnlineState, Prior, online

#: Mean residual prior variance above which a stream says that its memory is too small.
CAPACITY_WARNING = 0.01

#: A capacity warning does not search for more features than this: the search takes seconds there.
MOST_ADVISED = 512


class CapacityWarning(UserWarning):
    """The memory cannot hold the prior on its horizon: all times are remembered worse."""


class Memory(Protocol):
    """What can be judged: :class:`gpseq.variational.StreamingVariationalStrategy`, or one axis of a product."""

    @property
    def prior(self) -> Prior:
        """The kernel."""

    def prior_of(self, features: InducingFeatures) -> Prior:
        """The kernel as these features see it."""

    def basis_of(self, features: InducingFeatures) -> OnlineState:
        """A state that has seen nothing, on the basis of these features."""


def judge(
    strategy: Memory,
    features: InducingFeatures,
    max_features: int | None,
    tolerance: float,
    warned_at: float,
) -> tuple[InducingFeatures, OnlineState, float | None]:
    """Judge features that a stream is about to move to; raise their order where that is allowed.

    Args:
        strategy: of the stream, or what else has a basis.
        features: with an interval.
        max_features: how far the order of ``HippoFeatures`` may be raised; ``None`` leaves it. It is never lowered.
        tolerance: admissible mean residual variance, as a fraction of the prior variance.
        warned_at: length of the interval at the last warning; the next one waits until it has doubled.

    Returns:
        The features to move to, a state on their basis that has seen nothing, and the length of the interval if a
        :class:`CapacityWarning` was given.
    """
    basis, residual = _residual(strategy, features)
    kernel = strategy.prior.kernel
    if max_features is not None and residual > tolerance and isinstance(features, HippoFeatures):
        needed = _required(features, kernel, tolerance, max_features) or max_features
        if needed > features.num_features:
            features = features.with_order(needed)
            basis, residual = _residual(strategy, features)
    assert features.interval is not None
    start, horizon = features.interval
    length = horizon - start
    if residual <= CAPACITY_WARNING or length < 2 * warned_at:
        return features, basis, None
    named = "More features"
    if isinstance(features, HippoFeatures):
        named = f"{_required(features, kernel, tolerance, MOST_ADVISED) or f'More than {MOST_ADVISED}'} features"
    warnings.warn(
        f"{features.num_features} features leave {residual:.1%} of the prior variance on the horizon "
        f"[{start:g}, {horizon:g}]: all of the past is remembered worse. {named} would keep it under {tolerance:.1%}.",
        CapacityWarning,
        stacklevel=stacklevel_outside(),
    )
    return features, basis, length


def _residual(strategy: Memory, features: InducingFeatures) -> tuple[OnlineState, float]:
    """The basis of features, and the largest mean residual prior variance in its batch."""
    basis, probes = strategy.basis_of(features), features.probes()
    assert probes is not None
    return basis, online.mean_residual_variance(basis, strategy.prior_of(features), probes).max().item()


def _required(features: HippoFeatures, kernel: Kernel, tolerance: float, most: int) -> int | None:
    try:
        return features.required_order(kernel, tolerance, max_features=most)
    except CapacityError:
        return None
