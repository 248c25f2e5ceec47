"""A GP that is updated online and keeps its memory of the past in a fixed number of numbers."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, Likelihood
from gpytorch.means import Mean, ZeroMean
from gpytorch.models import ApproximateGP
from torch import Tensor

from gpseq.checks import check_count, check_inputs, check_jitter, check_number
from gpseq.features import CapacityError, HippoFeatures, InducingFeatures
from gpseq.models.observations import Observations, check_observations
from gpseq.models.warmup import fit_hyperparameters
from gpseq.variational import OnlineState, StreamingVariationalStrategy, online

#: Mean residual prior variance above which a stream says that its memory is too small.
CAPACITY_WARNING = 0.01


#: A capacity warning does not search for more features than this: the search takes seconds there.
MOST_ADVISED = 1024

#: Beyond this the squares in an evidence overflow.
LARGEST_LOG_SCALE = 1e150


class CapacityWarning(UserWarning):
    """The memory cannot hold the prior on its horizon: all times are remembered worse."""


class StreamingGP(ApproximateGP):
    r"""A Gaussian process for streams: closed-form updates in bounded memory, no look back at old data.

    The posterior over M features of the whole past is carried from chunk to chunk; each :meth:`update` costs
    :math:`O(n M^2)` for n new observations and the size of the state never grows. When data pass the horizon the
    basis is stretched and the belief is carried over. A fixed M holds only so much: about M / 1.5 lengthscales of an
    RBF kernel, fewer of a rough one. When that is passed, *all* of the past blurs, and a :class:`CapacityWarning`
    names the number of features that would do.

    The hyperparameters do not move by themselves: learn them on a first window (:meth:`fit_hyperparameters`) or set
    them. Changed values take effect at once; the belief is then carried over to them.

    Args:
        features: what the memory consists of, usually ``HippoFeatures``; any inducing features work.
        covar_module: any GPyTorch kernel.
        likelihood: ``GaussianLikelihood``, or ``FixedNoiseGaussianLikelihood`` with noise given at each update.
        mean_module: any GPyTorch mean; ``None`` is zero.
        horizon_growth: when data pass the horizon, its length grows by this factor as often as needed; ``None``
            stretches it to the last time seen; ``"fixed"`` declares an end beyond which an update raises. Features
            without a horizon (``InducingPoints``) stay where they are, see :meth:`rebase`.
        transfer: ``"vfe"`` keeps old information as a likelihood, ``"adf"`` matches moments; see
            :func:`gpseq.variational.online.transfer`.
        learn: ``"never"``: updates leave the hyperparameters alone.
        max_features: let the memory grow to at most this many features: at a change of basis the order is raised
            until the mean residual variance is under ``tolerance``. ``None`` keeps it as it is.
        tolerance: admissible mean residual variance as a fraction of the prior variance, for ``max_features`` and for
            the advice in a capacity warning.
        jitter: relative jitter of factorisations, see :func:`gpseq.linalg.cholesky`.

    Raises:
        TypeError: an argument of the wrong kind, a likelihood that is not Gaussian.
        ValueError: a value out of range.

    Example:
        >>> import gpseq, gpytorch
        >>> model = StreamingGP(
        ...     gpseq.features.HippoFeatures(num_features=32, horizon=10.0),
        ...     gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()),
        ...     gpytorch.likelihoods.GaussianLikelihood(),
        ... )
        >>> for chunk in torch.linspace(0.0, 12.0, 60).split(20):
        ...     model = model.update(chunk, chunk.sin())
        >>> model.features.horizon, model.num_observations
        (12.5, 60)
        >>> model.likelihood(model(torch.tensor([3.0]))).variance.shape
        torch.Size([1])
    """

    def __init__(
        self,
        features: InducingFeatures,
        covar_module: Kernel,
        likelihood: Likelihood,
        mean_module: Mean | None = None,
        horizon_growth: float | str | None = 1.25,
        transfer: str = "vfe",
        learn: str = "never",
        max_features: int | None = None,
        tolerance: float = 1e-3,
        jitter: float | None = None,
    ) -> None:
        super().__init__(None)  # the strategy needs the kernel, which cannot be registered before this call
        for name, value, kind in (
            ("features", features, InducingFeatures),
            ("covar_module", covar_module, Kernel),
            ("likelihood", likelihood, (GaussianLikelihood, FixedNoiseGaussianLikelihood)),
            ("mean_module", mean_module, (Mean, type(None))),
        ):
            if not isinstance(value, kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                expected = " or ".join(k.__name__ for k in kinds)
                raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}.")
        if transfer not in online.TRANSFERS:
            raise ValueError(f"transfer: expected one of {online.TRANSFERS}, got {transfer!r}.")
        if learn != "never":
            raise ValueError(f"learn: expected 'never', got {learn!r}.")
        tolerance = check_number("tolerance", tolerance, above=0.0, expected="a positive fraction of the variance")
        if max_features is not None:
            if not isinstance(features, HippoFeatures):
                raise ValueError(f"max_features: only HippoFeatures can grow, got {type(features).__name__}.")
            check_count("max_features", max_features, least=features.num_features)
        jitter = check_jitter(jitter)
        self.covar_module = covar_module
        self.mean_module = ZeroMean() if mean_module is None else mean_module
        self.likelihood = likelihood
        self.horizon_growth = _check_growth(horizon_growth)
        self.learn, self.max_features, self.tolerance = learn, max_features, tolerance
        device = next((p.device for p in covar_module.parameters()), None)
        features = copy.deepcopy(features).to(device)  # this stream will move them
        with torch.inference_mode(False):
            self.variational_strategy = StreamingVariationalStrategy(self, features, jitter, transfer)
        self._capacity_warned_at = 0.0  # length of the horizon

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at ``x``."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    @property
    def features(self) -> InducingFeatures:
        """What the memory consists of now; its horizon moves with the stream."""
        return self.variational_strategy.features

    @property
    def state(self) -> OnlineState:
        """What the stream knows, as one frozen value."""
        return self.variational_strategy.state

    @property
    def num_observations(self) -> int:
        """Observations absorbed so far, by all models of the batch together."""
        state = self.state
        return int(state.count.expand(state.r.shape[:-1]).sum())

    def update(self, x: Tensor, y: Tensor, noise: Tensor | None = None, missing: str = "error") -> StreamingGP:
        """Absorb a chunk of observations, in place and in bounded memory.

        Times may be irregular, repeated, unsorted, or older than what was seen. An empty chunk changes nothing. An
        update that raises leaves the model exactly as it was.

        Args:
            x: inputs ``(n,)`` or ``(n, d)``; with a batch of kernels also ``(*batch, n, d)``. Time in the unit of the
                features' horizon.
            y: targets, ``(n,)``, or ``(*batch, n)``.
            noise: noise variance of each target, a scalar or broadcastable to ``y``. Replaces the noise of a
                ``GaussianLikelihood``; a ``FixedNoiseGaussianLikelihood`` needs it.
            missing: what a NaN in ``y`` means: ``"error"`` or ``"skip"``.

        Returns:
            The model itself.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes, devices or values do not fit, or times pass a horizon declared ``"fixed"``.
        """
        strategy = self.variational_strategy
        # A state made in inference mode could never take part in a graph again.
        with torch.inference_mode(False), torch.no_grad():
            state = strategy.current_state()
            data = check_observations(state, self.likelihood, x, y, noise, missing)
            data.check_fits(state.r.shape[:-1])
            if data.empty:
                return self
            features, basis, warned_at = self._features_for(data)
            if basis is not None:
                state = strategy.carried_to(basis)
            self._replace(features, self._absorb(state, data), warned_at)
        return self

    def rebase(self, features: InducingFeatures) -> StreamingGP:
        """Carry the belief over to other features of the same f, in place.

        Args:
            features: the new basis; the number of features may differ.

        Returns:
            The model itself.
        """
        if not isinstance(features, InducingFeatures):
            raise TypeError(f"features: expected InducingFeatures, got {type(features).__name__}.")
        with torch.inference_mode(False), torch.no_grad():
            features = copy.deepcopy(features).to(self.state.G.device)
            strategy = self.variational_strategy
            self._replace(features, strategy.carried_to(strategy.basis_of(features)))
        return self

    def condition_on_observations(
        self, x: Tensor, y: Tensor, noise: Tensor | None = None, missing: str = "error", extend_horizon: bool = False
    ) -> StreamingGP:
        """A new model of the same type that has also seen (x, y); this one is untouched.

        Differentiable in ``x`` and ``y``. Batches of targets give a batch of models (fantasies) that share what they
        can: with ``x`` of shape ``(*b, n, d)`` and ``y`` of shape ``(*f, *b, n)`` the information matrix has batch
        shape b and only the shift has ``(*f, *b)``.

        Args:
            x: inputs ``(n,)`` or ``(*b, n, d)``.
            y: targets ``(*f, *b, n)``.
            noise: as in :meth:`update`.
            missing: as in :meth:`update`.
            extend_horizon: stretch the basis where ``x`` passes it, as an update would; fantasies usually should not.

        Returns:
            The new model, with copies of all hyperparameters.

        Raises:
            TypeError: as :meth:`update`.
            ValueError: as :meth:`update`, or shapes that do not broadcast.
        """
        strategy = self.variational_strategy
        state = strategy.current_state()
        data = check_observations(state, self.likelihood, x, y, noise, missing)
        features, basis, warned_at = self.features, None, None
        if extend_horizon and not data.empty:
            features, basis, warned_at = self._features_for(data)
        if basis is not None:
            state = strategy.carried_to(basis)
        # The copy shares this model's state tensors (values are never changed in place), so a graph in them survives.
        new = copy.deepcopy(self, {id(tensor): tensor for _, tensor in self.state.items()})
        new._replace(copy.deepcopy(features), state if data.empty else self._absorb(state, data), warned_at)
        return new

    def get_fantasy_model(self, inputs: Tensor, targets: Tensor, **kwargs: Any) -> StreamingGP:
        """GPyTorch's name for :meth:`condition_on_observations`."""
        return self.condition_on_observations(inputs, targets, **kwargs)

    def fit_hyperparameters(self, x: Tensor, y: Tensor, **kwargs: Any) -> float:
        """Learn kernel, mean and noise on a warm-up window by exact marginal likelihood; then they stay.

        Args:
            x: inputs of the window, ``(n,)`` or ``(n, d)``; a few thousand at most.
            y: targets, ``(n,)``.
            kwargs: see :func:`gpseq.models.fit_hyperparameters`.

        Returns:
            The log marginal likelihood reached, in nats.
        """
        return fit_hyperparameters(x, y, self.covar_module, self.likelihood, self.mean_module, **kwargs)

    @property
    @torch.no_grad()
    def log_evidence(self) -> Tensor:
        """Running evidence bound of all updates, ``(*batch)``, in nats.

        It compares kernels at identical chunks and bases; it does not compare numbers of features or chunk sizes: see
        :func:`gpseq.variational.online.log_evidence`.
        """
        return online.log_evidence(self.state)

    @torch.no_grad()
    def residual_variance(self, x: Tensor | None = None) -> Tensor:
        """How much of the prior the memory cannot hold, as a fraction of the prior variance.

        Args:
            x: inputs ``(n,)`` or ``(*batch, n, d)``; ``None`` averages over the horizon.

        Returns:
            ``(*batch, n)``, or ``(*batch)`` without ``x``; float64 between 0 and 1.
        """
        strategy = self.variational_strategy
        if x is not None:
            x = check_inputs(x, self.state.nodes.shape[-1])
            return online.residual_variance(strategy.current_state(), strategy.prior, x)
        if not isinstance(self.features, HippoFeatures):
            raise ValueError(f"x: {type(self.features).__name__} have no horizon to average over; give inputs.")
        return online.residual_variance(strategy.current_state(), strategy.prior, self.features.probes()).mean(-1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The memory's polynomial picture of f, from the posterior mean of the features.

        Args:
            x: times or inputs inside the horizon, ``(n,)`` or ``(n, d)``.

        Returns:
            ``(*batch, n)``, float64.
        """
        if not isinstance(self.features, HippoFeatures):
            raise ValueError(
                f"features: only HippoFeatures have a polynomial picture, not {type(self.features).__name__}."
            )
        x = check_inputs(x, self.state.nodes.shape[-1])
        state = self.variational_strategy.current_state()
        coefficients = (state.factor @ online.posterior(state)[0].unsqueeze(-1)).squeeze(-1)
        return self.features.reconstruct(coefficients, x) + self.variational_strategy.prior.mean_at(x)

    def _absorb(self, state: OnlineState, data: Observations) -> OnlineState:
        state = online.update(state, self.variational_strategy.prior, data.x, data.y, data.noise, data.observed)
        if not (state.c.abs() < LARGEST_LOG_SCALE).all():
            raise ValueError("y: the targets are too large, or the noise too small, for float64.")
        return state

    def _replace(self, features: InducingFeatures, state: OnlineState, warned_at: float | None = None) -> None:
        """The one place where the stream moves on."""
        strategy = self.variational_strategy
        if features is not strategy.features:
            strategy.features = features
        strategy.state = state
        if warned_at is not None:
            self._capacity_warned_at = warned_at

    def get_extra_state(self) -> Tensor:
        """What is neither parameter nor state: the length of the horizon at the last capacity warning."""
        return torch.tensor(self._capacity_warned_at, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        self._capacity_warned_at = float(state)

    def _features_for(self, data: Observations) -> tuple[InducingFeatures, OnlineState | None, float | None]:
        """Features on a horizon that covers ``data``, their basis if they are new, and when a warning was given."""
        features = self.features
        if not isinstance(features, HippoFeatures):
            return features, None, None
        first, last = data.span(features.time_dim)
        if first < features.start:
            warnings.warn(
                f"x: times from {first:g} lie before the start of the memory, {features.start:g}; they are used, but "
                "the features do not cover them.",
                stacklevel=3,
            )
        if last <= features.horizon:
            return features, None, None
        if self.horizon_growth == "fixed":
            raise ValueError(f"x: times up to {last:g} pass the horizon, which is fixed at {features.horizon:g}.")
        features = features.with_horizon(_grown(features, last, self.horizon_growth))
        return self._with_capacity(features)

    def _with_capacity(self, features: HippoFeatures) -> tuple[HippoFeatures, OnlineState, float | None]:
        """Raise the order where that is allowed; warn, once a doubling, where the memory is too small."""
        basis, residual = self._basis_and_residual(features)
        if self.max_features is not None and residual > self.tolerance and features.num_features < self.max_features:
            needed = min(self._required(features, self.max_features), self.max_features)
            features = features.with_order(int(max(needed, features.num_features)))  # never lowered
            basis, residual = self._basis_and_residual(features)
        length = features.horizon - features.start
        if residual <= CAPACITY_WARNING or length < 2 * self._capacity_warned_at:
            return features, basis, None
        needed = self._required(features, MOST_ADVISED)
        named = f"{needed} features" if needed < math.inf else f"More than {MOST_ADVISED} features"
        warnings.warn(
            f"{features.num_features} features leave {residual:.1%} of the prior variance on the horizon "
            f"[{features.start:g}, {features.horizon:g}]: all of the past is remembered worse. {named} would keep it "
            f"under {self.tolerance:.1%}.",
            CapacityWarning,
            stacklevel=4,  # the caller of update
        )
        return features, basis, length

    def _basis_and_residual(self, features: HippoFeatures) -> tuple[OnlineState, float]:
        """The basis of features, and the largest mean residual prior variance in its batch."""
        strategy = self.variational_strategy
        basis = strategy.basis_of(features)
        return basis, online.residual_variance(basis, strategy.prior, features.probes()).mean(-1).max().item()

    def _required(self, features: HippoFeatures, most: int) -> float:
        try:
            return features.required_order(self.covar_module, self.tolerance, max_features=most)
        except CapacityError:
            return math.inf


def _check_growth(growth: float | str | None) -> float | str | None:
    if growth is None or growth == "fixed":
        return growth
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 1 < growth < math.inf:
        raise ValueError(f"horizon_growth: expected a factor above 1, None or 'fixed', got {growth!r}.")
    return float(growth)


def _grown(features: HippoFeatures, last: float, growth: float | str | None) -> float:
    """The first horizon of the geometric sequence that reaches ``last``, or ``last`` itself."""
    if not isinstance(growth, float):
        return last
    length = features.horizon - features.start
    # A time within rounding of a member of the sequence counts as that member.
    steps = math.ceil(math.log((last - features.start) / length) / math.log(growth) - 1e-11)
    return max(features.start + length * growth**steps, last)
