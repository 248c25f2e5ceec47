"""A GP over space and time that is updated online: separable, in bounded memory, with sensors that come and go."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, Likelihood
from gpytorch.means import Mean, ZeroMean
from gpytorch.models import GP
from linear_operator import to_linear_operator
from linear_operator.operators import KroneckerProductLinearOperator, SumLinearOperator
from torch import Tensor

from gpseq.checks import check_floating, check_growth, check_inputs, check_jitter, stacklevel_outside
from gpseq.features import InducingFeatures, InducingPoints
from gpseq.features.base import evaluate
from gpseq.models import capacity
from gpseq.models.grid_fit import fit_on_grid
from gpseq.models.observations import check_likelihood, is_gaussian
from gpseq.models.readings import check_places, check_readings, check_times
from gpseq.variational import Belief, OnlineState, Prior, kronecker, online
from gpseq.variational.cast import CastLinearOperator
from gpseq.variational.kronecker import KroneckerState, SeparableKernel, SpaceTimePrior
from gpseq.variational.kronecker_posterior import GridCovariance, KroneckerPosterior, log_evidence, posterior
from gpseq.variational.lazy import Float64Kernel


@dataclass(frozen=True)
class _Axis:
    """One factor of the prior, with what judges its memory."""

    kernel: Kernel
    jitter: float | None

    @property
    def prior(self) -> Prior:
        return Prior(self.kernel, frozen=True)

    def prior_of(self, features: InducingFeatures) -> Prior:
        return self.prior

    def basis_of(self, features: InducingFeatures) -> OnlineState:
        return online.initial_state(features, self.prior, self.jitter)


class SpaceTimeStreamingGP(GP):
    r"""A Gaussian process over time and space for streams of readings from fixed places.

    .. math:: f(t, s) \sim GP(\mu,\; k_t(t, t')\, k_s(s, s')), \qquad
        u_{mj} = \int f(t, z_j)\, g_m(t)\, dt

    The memory is a product: M_t features of time, which stretch as the stream goes on, for each of M_s inducing points
    in space. While the same sensors report with the same noise, all that was ever read is summarised by three small
    matrices, and an update costs little more than reading its data. Every other set of sensors that reports adds a
    term of its own, :math:`G = \sum_j \Gamma_j \otimes H_j`; from the second term on, predictions factor the whole
    :math:`M_t M_s \times M_t M_s` matrix. The information never takes more than twice that matrix and the sensors; the
    factor, which is kept from one prediction to the next, is a third.

    Time is column 0 of inputs, the coordinates of places follow. Only one of the two kernels needs an outputscale.

    Args:
        time_features: M_t features of one column, usually ``HippoFeatures``. Measures that forget are refused:
            forgetting couples time and space, and the product would be lost.
        space_features: M_s features of space; a tensor ``(M_s, d)`` means inducing points there.
        sensors: where readings come from, ``(S, d)``; more can be declared later.
        time_kernel: any kernel of one column.
        space_kernel: any kernel of d columns.
        likelihood: ``GaussianLikelihood``, or ``FixedNoiseGaussianLikelihood`` with noise given at each update.
        mean_module: of inputs ``(n, 1 + d)``; ``None`` is zero.
        horizon_growth: as in :class:`gpseq.models.StreamingGP`, but ``None`` by default: a product is stretched at
            little cost, and on a basis that ends at the data a memory that is too small does least harm.
        jitter: relative jitter of factorisations, see :func:`gpseq.linalg.cholesky`.

    Raises:
        TypeError: an argument of the wrong kind, or a likelihood that is not Gaussian.
        ValueError: shapes do not fit, or features that forget.

    Source:
        Derived in :mod:`gpseq.variational.kronecker`.

    Example:
        >>> import gpseq, gpytorch
        >>> stations = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> model = SpaceTimeStreamingGP(
        ...     gpseq.features.HippoFeatures(num_features=12, horizon=5.0),
        ...     stations,
        ...     stations,
        ...     gpytorch.kernels.RBFKernel(),
        ...     gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()),
        ...     gpytorch.likelihoods.GaussianLikelihood(),
        ... )
        >>> readings = torch.randn(10, 3)
        >>> readings[4, 1] = torch.nan
        >>> model = model.update(torch.linspace(0, 5, 10), readings, missing="skip")
        >>> model.num_observations, model.num_terms
        (29, 2)
        >>> mean, variance = model.marginals(torch.tensor([2.0, 3.0]), torch.tensor([[0.5, 0.5]]))
        >>> mean.shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        time_features: InducingFeatures,
        space_features: InducingFeatures | Tensor,
        sensors: Tensor,
        time_kernel: Kernel,
        space_kernel: Kernel,
        likelihood: Likelihood,
        mean_module: Mean | None = None,
        horizon_growth: float | str | None = None,
        jitter: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(space_features, Tensor):
            space_features = InducingPoints(space_features)
        for name, features in (("time_features", time_features), ("space_features", space_features)):
            if not isinstance(features, InducingFeatures):
                raise TypeError(f"{name}: expected InducingFeatures, got {type(features).__name__}.")
            if features.embedding is not None:
                raise ValueError(f"{name}: random features of a path have no axis of their own.")
            if batch := features.nodes().shape[:-2]:
                raise ValueError(f"{name}: expected features without batch dimensions, got a batch of {tuple(batch)}.")
        for name, kernel in (("time_kernel", time_kernel), ("space_kernel", space_kernel)):
            if not isinstance(kernel, Kernel):
                raise TypeError(f"{name}: expected Kernel, got {type(kernel).__name__}.")
            if kernel.batch_shape:
                raise ValueError(f"{name}: expected one kernel, got a batch of shape {tuple(kernel.batch_shape)}.")
        if mean_module is not None and not isinstance(mean_module, Mean):
            raise TypeError(f"mean_module: expected Mean or NoneType, got {type(mean_module).__name__}.")
        if not is_gaussian(check_likelihood(likelihood)):
            raise TypeError(f"likelihood: expected a Gaussian one, got {type(likelihood).__name__}.")
        if isinstance(likelihood, GaussianLikelihood) and likelihood.noise.numel() != 1:
            raise ValueError(f"likelihood: expected one noise, got shape {tuple(likelihood.noise.shape)}.")
        if time_features.num_dims != 1:
            raise ValueError(f"time_features: expected features of one column, got {time_features.num_dims}.")
        if time_features.forgets:
            raise ValueError(
                "time_features: features that forget couple time and space, and the product would be lost; expected "
                "measure 'legs' or points."
            )
        if space_features.forgets:
            raise ValueError(
                f"space_features: {type(space_features).__name__} follow a stream, and places stay; expected points. "
                "gpseq.features.selected.select_points chooses some."
            )
        check_floating("sensors", sensors)
        self.time_kernel, self.space_kernel = time_kernel, space_kernel
        self.mean_module = ZeroMean() if mean_module is None else mean_module
        self.likelihood = likelihood
        self.horizon_growth = check_growth(horizon_growth)
        self.jitter = check_jitter(jitter)
        device = next((p.device for p in time_kernel.parameters()), sensors.device)
        self._capacity_warned_at = 0.0
        with torch.inference_mode(False), torch.no_grad():
            self.time_features = copy.deepcopy(time_features).to(device)  # this stream will move them
            self.space_features = copy.deepcopy(space_features).to(device)
            if sensors.dim() == 2 and sensors.shape[-1] != space_features.num_dims:
                raise ValueError(
                    f"sensors: expected {space_features.num_dims} columns, as space_features have, got shape "
                    f"{tuple(sensors.shape)}."
                )
            places = check_places("sensors", sensors.to(device), space_features.num_dims, device)
            if not len(places):
                raise ValueError(f"sensors: expected at least one, got shape {tuple(sensors.shape)}.")
            if (shape := self._prior.mean_at(places.new_zeros(1, self.num_dims)).shape) != (1,):
                raise ValueError(f"mean_module: expected one mean, got values of shape {tuple(shape)} at one input.")
            time, space = (axis.basis_of(f) for axis, f in zip(self._axes, self._features, strict=True))
            first = kronecker.initial_state(time, space, self._prior, places)
            self.time_basis, self.space_basis = Belief(time), Belief(space)
            self.information = Belief(first.information)
        self._modules_of_basis = self._prior_modules()
        self._begun = False
        self._known_posterior: tuple[Tensor, KroneckerPosterior] | None = None
        self._known_state: tuple[Tensor, tuple[Any, ...], KroneckerState] | None = None

    @property
    def num_dims(self) -> int:
        """How many columns inputs have, that of time among them."""
        return 1 + self.space_features.num_dims

    # --- what is known ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> KroneckerState:
        """What the stream knows, as one frozen value."""
        return KroneckerState(self.time_basis.state, self.space_basis.state, self.information.state)

    @property
    def sensors(self) -> Tensor:
        """Where the declared sensors are, ``(S, d)``, float64."""
        return self.information.state.sensors

    @property
    def num_observations(self) -> int:
        """Readings absorbed so far."""
        return int(self.information.state.count)

    @property
    def num_terms(self) -> int:
        """J, the Kronecker terms of the information; what has been summed up in the dense rest is not among them."""
        return self.information.state.num_terms

    @property
    @torch.no_grad()
    def log_evidence(self) -> Tensor:
        """Running evidence bound of all updates, ``()``, in nats; see ``StreamingGP.log_evidence``."""
        state = self.state
        return log_evidence(state, self._posterior(state))

    @torch.no_grad()
    def residual_variance(self, x: Tensor | None = None) -> Tensor:
        """How much of the prior the memory cannot hold, as a fraction of the prior variance.

        Args:
            x: inputs ``(n, 1 + d)``; ``None`` averages over the horizon and the sensors.

        Returns:
            ``(n,)``, or ``()`` without ``x``; float64 between 0 and 1.
        """
        state = self._current_state()
        if x is None:
            times = self.time_features.probes()
            if times is None:
                raise ValueError(
                    f"x: {type(self.time_features).__name__} have no horizon to average over; give inputs."
                )
            explained = [
                1 - online.mean_residual_variance(basis, axis.prior, points)
                for basis, axis, points in zip(
                    (state.time, state.space), self._axes, (times, self.sensors), strict=True
                )
            ]
        else:
            x = self._points(x)
            explained = [
                1 - online.residual_variance(basis, axis.prior, points)
                for basis, axis, points in zip((state.time, state.space), self._axes, (x[:, :1], x[:, 1:]), strict=True)
            ]
        return 1 - explained[0] * explained[1]

    # --- what is learnt ---------------------------------------------------------------------------------------------

    def declare(self, sensors: Tensor) -> Tensor:
        """Declare more sensors, in place.

        Args:
            sensors: where they are, ``(S', d)``.

        Returns:
            Their indices, ``(S',)``, int64.
        """
        with torch.inference_mode(False), torch.no_grad():
            places = self._check_places("sensors", sensors)
            before = len(self.sensors)
            self._replace(kronecker.declare(self.state, places))
            return torch.arange(before, before + len(places), device=places.device)

    def update(
        self,
        times: Tensor,
        y: Tensor,
        sensors: Tensor | Sequence[int] | None = None,
        noise: Tensor | float | None = None,
        missing: str = "error",
    ) -> SpaceTimeStreamingGP:
        """Absorb rows of readings, in place and in bounded memory. An update that raises changes nothing.

        Args:
            times: ``(n,)``, in the unit of the horizon; in any order, and repeated if need be.
            y: readings, ``(n, s)``: one column for each declared sensor, or for each of ``sensors``.
            sensors: indices of the sensors that report, ``(s,)``, distinct; ``None`` means all that are declared.
            noise: noise variances, a scalar or broadcastable to ``y``. Replaces the noise of a
                ``GaussianLikelihood``; a ``FixedNoiseGaussianLikelihood`` needs it. Each row of other noise, like each
                other set of sensors, makes a term of its own.
            missing: what a NaN in ``y`` means: ``"error"`` or ``"skip"``.

        Returns:
            The model itself.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes, devices or values do not fit, a sensor was never declared, or times pass a horizon
                declared ``"fixed"``.
        """
        with torch.inference_mode(False), torch.no_grad():
            state = self._current_state()
            data = check_readings(self.sensors, self.likelihood, times, y, sensors, noise, missing)
            if not len(heard := data.heard):
                return self
            axis = self._axes[0]
            features = self.time_features.following(heard, axis.kernel, self.horizon_growth)
            warned_at = None
            # Judged at every change of features or hyperparameters, and before the first data.
            begins = state.information.r is not self.information.r or not self._has_begun()
            if begins:
                self._judge_space(state)
            if features.interval is not None and (begins or features is not self.time_features):
                features, basis, warned_at = capacity.judge(axis, features, None, 1e-3, self._capacity_warned_at)
                state = kronecker.transfer(state, basis, state.space, self._prior)
            elif features is not self.time_features:
                state = kronecker.transfer(state, axis.basis_of(features), state.space, self._prior)
            state = kronecker.update(state, self._prior, data.times, data.y, data.weights)
            if not kronecker.is_finite(state.information):
                raise ValueError("y: the readings are too large, or the noise too small, for float64.")
            self._replace(state, features, warned_at)
        return self

    def condition_on_observations(self, times: Tensor, y: Tensor, **kwargs: Any) -> SpaceTimeStreamingGP:
        """A new model of the same type that has also seen these readings; this one is untouched.

        Args:
            times: as in :meth:`update`.
            y: as in :meth:`update`.
            kwargs: as in :meth:`update`.

        Returns:
            The new model, with copies of all hyperparameters.
        """
        # Values are never changed in place, so the copy may hold the same ones until it moves on.
        memo: dict[int, Any] = {id(tensor): tensor for _, tensor in self.information.state.items()}
        memo |= {id(cache): None for cache in (self._known_posterior, self._known_state) if cache is not None}
        return copy.deepcopy(self, memo).update(times, y, **kwargs)

    def fit_hyperparameters(self, times: Tensor, y: Tensor, sensors: Tensor | None = None, **kwargs: Any) -> float:
        """Learn kernels, mean and noise on a warm-up window by exact marginal likelihood, in place.

        Rows with a missing reading are left out, and before them sensors that are silent for more than a tenth of the
        window. What the stream knows stays as it is.

        Args:
            times: ``(n,)``; a thousand or so at most.
            y: readings, ``(n, s)``, NaN where there is none.
            sensors: indices of the sensors, ``(s,)``; ``None`` means all. A thousand or so at most.
            kwargs: ``num_starts``, ``max_iterations`` and ``generator`` of the search.

        Returns:
            The log marginal likelihood reached, in nats.
        """
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            raise ValueError("likelihood: a FixedNoiseGaussianLikelihood has no noise to learn.")
        with torch.inference_mode(False):
            data = check_readings(self.sensors, self.likelihood, times, y, sensors, None, "skip")
            heard = data.weights > 0
            # A row without any reading says nothing of who is silent.
            regular = heard[heard.any(-1)].double().mean(0) >= 0.9
            complete = heard[:, regular].all(-1)
            if not complete.any() or not regular.any():
                raise ValueError(f"y: no complete row to learn from among {tuple(y.shape)} readings.")
            return fit_on_grid(
                data.times[complete],
                self.sensors[regular],
                data.y[complete][:, regular],
                self.time_kernel,
                self.space_kernel,
                self.likelihood,
                self.mean_module,
                **kwargs,
            )

    # --- what follows -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at ``x``, ``(n, 1 + d)``."""
        return MultivariateNormal(self.mean_module(x), SeparableKernel(self.time_kernel, self.space_kernel)(x))

    def __call__(self, x: Tensor, prior: bool = False) -> MultivariateNormal:
        """Posterior of f at any inputs.

        Args:
            x: ``(n, 1 + d)``, time first. For all pairs of times and places, :meth:`marginals` is far cheaper.
            prior: return the prior instead.

        Returns:
            Distribution over n values, in the dtype of ``x``.
        """
        inputs = self._points(x)
        if prior:
            return self.forward(inputs)
        inputs = inputs.double()
        state = self._current_state()
        belief, places = self._posterior(state), inputs[:, 1:]
        A_t, A_s = self._whitened(state, inputs[:, :1], places)
        mean = self._prior.mean_at(inputs) + belief.mean_at(A_t, A_s)
        before = Float64Kernel(SeparableKernel(self.time_kernel, self.space_kernel), frozen=True)(inputs)
        covariance = SumLinearOperator(before, belief.change_at(A_t, A_s))
        if x.dtype != torch.float64:
            covariance = CastLinearOperator(covariance, dtype=x.dtype)
        return MultivariateNormal(mean.to(x.dtype), covariance)

    def marginals(self, times: Tensor, locations: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means and variances of f on a grid of times and places.

        Args:
            times: ``(n,)``.
            locations: ``(s, d)``; ``None`` means the declared sensors.

        Returns:
            Two tensors ``(n, s)`` in the dtype of ``times``; add the noise for readings.
        """
        state, belief, t, s = self._on_grid(times, locations)
        A_t, A_s = self._whitened(state, t, s)
        mean = self._prior.mean_on(t, s) + belief.mean_on(A_t, A_s)
        variance = self._variance_on(belief, A_t, A_s, t, s)
        return mean.to(times.dtype), variance.to(times.dtype)

    def grid(self, times: Tensor, locations: Tensor | None = None) -> MultitaskMultivariateNormal:
        """Joint posterior of f on a grid, with a covariance that is a Kronecker product and what changed of it.

        Args:
            times: ``(n,)``.
            locations: ``(s, d)``; ``None`` means the declared sensors.

        Returns:
            Distribution over ``(n, s)`` values in float64, a task for each place.
        """
        state, belief, t, s = self._on_grid(times, locations)
        A_t, A_s = self._whitened(state, t, s)
        mean = self._prior.mean_on(t, s) + belief.mean_on(A_t, A_s)
        parts = (evaluate(axis.kernel, p, p, frozen=True) for axis, p in zip(self._axes, (t, s), strict=True))
        before = KroneckerProductLinearOperator(*(to_linear_operator(part) for part in parts))
        variance = self._variance_on(belief, A_t, A_s, t, s).reshape(-1)
        return MultitaskMultivariateNormal(
            mean, GridCovariance(before, belief.change_on(A_t, A_s), variance=variance), interleaved=True
        )

    def _variance_on(self, belief: KroneckerPosterior, A_t: Tensor, A_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        time, space = (axis.prior.variance(points) for axis, points in zip(self._axes, (t, s), strict=True))
        residual = time.outer(space) - A_t.square().sum(0).outer(A_s.square().sum(0))
        return (residual + belief.variance_on(A_t, A_s)).clamp_min(0.0)

    def _on_grid(
        self, times: Tensor, locations: Tensor | None
    ) -> tuple[KroneckerState, KroneckerPosterior, Tensor, Tensor]:
        t = check_times(times).double()
        s = self.sensors if locations is None else self._check_places("locations", locations)
        state = self._current_state()
        return state, self._posterior(state), t, s

    def _check_places(self, name: str, places: Tensor) -> Tensor:
        return check_places(name, places, self.space_features.num_dims, self.sensors.device)

    def _points(self, x: Tensor) -> Tensor:
        inputs = check_inputs(x, self.num_dims)
        if inputs.dim() != 2:
            raise ValueError(f"x: expected shape (n, {self.num_dims}), got {tuple(x.shape)}.")
        return inputs

    def _whitened(self, state: KroneckerState, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        prior = self._prior
        return online.whiten(state.time, prior.time, t), online.whiten(state.space, prior.space, s)

    def _posterior(self, state: KroneckerState) -> KroneckerPosterior:
        """q(v), computed once for a state: the shift of another state is another tensor."""
        if self._known_posterior is None or self._known_posterior[0] is not state.information.r:
            with torch.inference_mode(False), torch.no_grad():
                self._known_posterior = state.information.r, posterior(state)
        return self._known_posterior[1]

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _axes(self) -> tuple[_Axis, _Axis]:
        return _Axis(self.time_kernel, self.jitter), _Axis(self.space_kernel, self.jitter)

    @property
    def _features(self) -> tuple[InducingFeatures, InducingFeatures]:
        return self.time_features, self.space_features

    @property
    def _prior(self) -> SpaceTimePrior:
        time, space = self._axes
        return SpaceTimePrior(time.prior, space.prior, self.mean_module)

    def _prior_modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(m for p in (self.time_kernel, self.space_kernel, self.mean_module) for m in p.modules())

    def _current_state(self) -> KroneckerState:
        """The state under the hyperparameters that the model has now."""
        state, prior = self.state, self._prior
        modules = self._prior_modules()
        if not _all_equal(modules, self._modules_of_basis):
            # Another kernel may have parameters of the same values, or none at all; NaN equals nothing.
            time, space = (
                replace(basis, hyperparameters=basis.hyperparameters.new_full((1,), torch.nan))
                for basis in (state.time, state.space)
            )
            state = replace(state, time=time, space=space)
        over_time, over_space = self._axes
        now = over_time.prior.hyperparameters(), over_space.prior.hyperparameters(), prior.mean_parameters()
        then = state.time.hyperparameters, state.space.hyperparameters, state.information.mean_parameters
        same_time, same_space, same_mean = (_equal(a, b) for a, b in zip(now, then, strict=True))
        if same_time and same_space and same_mean:
            return state
        known = self._known_state
        if known is not None and known[0] is state.information.r and _all_equal((*now, *modules), known[1]):
            return known[2]
        with torch.inference_mode(False), torch.no_grad():
            carried = kronecker.transfer(
                state,
                state.time if same_time else over_time.basis_of(self.time_features),
                state.space if same_space else over_space.basis_of(self.space_features),
                prior,
            )
        self._known_state = state.information.r, (*now, *modules), carried
        return carried

    def _has_begun(self) -> bool:
        """Whether anything has been learnt; asked of the device until it has."""
        if not self._begun:
            self._begun = bool(self.information.count)
        return self._begun

    def _judge_space(self, state: KroneckerState) -> None:
        residual = online.mean_residual_variance(state.space, self._axes[1].prior, self.sensors).item()
        if residual > capacity.CAPACITY_WARNING:
            warnings.warn(
                f"{state.space.num_features} features of space leave {residual:.1%} of the prior variance at the "
                "sensors, which is then read into what they do hold. More features, or more noise, make up for it.",
                capacity.CapacityWarning,
                stacklevel=stacklevel_outside(),
            )

    def _replace(
        self, state: KroneckerState, features: InducingFeatures | None = None, warned_at: float | None = None
    ) -> None:
        """The one place where the stream moves on; Ctrl-C leaves it where it was."""
        beliefs: tuple[Belief[Any], ...] = (self.time_basis, self.space_basis, self.information)
        before = (
            self.time_features,
            [belief.state for belief in beliefs],
            self._modules_of_basis,
            self._capacity_warned_at,
        )
        try:
            if features is not None and features is not self.time_features:
                self.time_features = features
            for belief, value in zip(beliefs, (state.time, state.space, state.information), strict=True):
                belief.state = value
            self._modules_of_basis = self._prior_modules()
            if warned_at is not None:
                self._capacity_warned_at = warned_at
        except BaseException:
            self.time_features, values, self._modules_of_basis, self._capacity_warned_at = before
            for belief, value in zip(beliefs, values, strict=True):
                belief.state = value
            raise

    def get_extra_state(self) -> Tensor:
        """What is neither parameter nor state: the length of the horizon at the last capacity warning."""
        return torch.tensor(self._capacity_warned_at, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        self._capacity_warned_at = float(state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._modules_of_basis = self._prior_modules()
        self._begun = False
        self._known_posterior = self._known_state = None


def _all_equal(now: Sequence[Any], then: Sequence[Any]) -> bool:
    return len(now) == len(then) and all(_equal(a, b) for a, b in zip(now, then, strict=True))


def _equal(now: Any, then: Any) -> bool:
    """The same module, or the same values, on whatever device they are."""
    if isinstance(now, Tensor) and isinstance(then, Tensor):
        return torch.equal(now.to(then.device), then)
    return now is then
