"""A GP that is updated online and keeps its memory of the past in a fixed number of numbers."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean, ZeroMean
from gpytorch.models import ApproximateGP
from torch import Tensor

from gpseq.checks import check_count, check_growth, check_inputs, check_jitter, check_number, stacklevel_outside
from gpseq.features import HippoFeatures, InducingFeatures
from gpseq.models import capacity, learning
from gpseq.models.observations import (
    Observations,
    check_likelihood,
    check_observations,
    expectation_of,
    is_gaussian,
    longest_step,
)
from gpseq.models.warmup import fit_hyperparameters
from gpseq.variational import OnlineState, StreamingVariationalStrategy, online, sites
from gpseq.variational.shards import Shards
from gpseq.variational.sites import Convergence

LEARN = ("never", "warmup", "basis_change")

#: Beyond this the squares in an evidence overflow.
LARGEST_LOG_SCALE = 1e150


class ConvergenceWarning(UserWarning):
    """An update with a likelihood that is not Gaussian stopped before it had converged."""


class StreamingGP(ApproximateGP):
    r"""A Gaussian process for streams: closed-form updates in bounded memory, no look back at old data.

    The posterior over M features of the whole past is carried from chunk to chunk; each :meth:`update` costs
    :math:`O(n M^2)` for n new observations and the size of the state never grows. When data pass the horizon the
    basis is stretched and the belief is carried over. A fixed M holds only so much: about M / 1.5 lengthscales of an
    RBF kernel, fewer of a rough one. When that is passed, *all* of the past blurs, and a :class:`CapacityWarning`
    names the number of features that would do.

    The hyperparameters do not move by themselves unless ``learn`` says so: learn them on a first window
    (:meth:`fit_hyperparameters`) or set them. Changed values take effect at once; the belief is then carried over to
    them.

    Several outputs: a kernel with a batch shape makes a batch of independent streams that share their inputs. Outputs
    that share latent functions (LMC) are a kernel over (time, output), with one part of ``CompositeFeatures`` for each.

    Args:
        features: what the memory consists of, usually ``HippoFeatures``; any inducing features work.
        covar_module: any GPyTorch kernel.
        likelihood: any of one output with ``expected_log_prob``: Gaussian ones are updated in closed form
            (``FixedNoiseGaussianLikelihood`` with noise given at each update), others by sites, see
            :mod:`gpseq.variational.sites`.
        mean_module: any GPyTorch mean; ``None`` is zero.
        horizon_growth: when data pass the horizon, its length grows by this factor as often as needed; ``None``
            stretches it to the last time seen; ``"fixed"`` declares an end beyond which an update raises. Features
            without a horizon (``InducingPoints``) stay where they are, see :meth:`rebase`.
        transfer: how the belief is carried to another basis: ``"vfe"`` keeps old information as a likelihood,
            ``"adf"`` matches moments, see :func:`gpseq.variational.online.transfer`. ``None`` means ``"vfe"``, except
            for features that give up detail by design (windows, pyramids, re-selected points), where it would force
            what is lost on what remains.
        learn: when hyperparameters are learnt: ``"never"``; ``"warmup"``, on the first chunk, as
            :meth:`fit_hyperparameters` does; ``"basis_change"``, by a few small steps on the online bound whenever the
            basis changes, from the values that the modules have, see :func:`gpseq.models.learning.learn_from`.
        max_features: let the memory grow to at most this many features: at a change of basis the order is raised
            until the mean residual variance is under ``tolerance``. ``None`` keeps it as it is.
        tolerance: admissible mean residual variance as a fraction of the prior variance, for ``max_features`` and for
            the advice in a capacity warning.
        jitter: relative jitter of factorisations, see :func:`gpseq.linalg.cholesky`.

    Raises:
        TypeError: an argument of the wrong kind, a likelihood of several outputs.
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
        transfer: str | None = None,
        learn: str = "never",
        max_features: int | None = None,
        tolerance: float = 1e-3,
        jitter: float | None = None,
    ) -> None:
        super().__init__(None)  # the strategy needs the kernel, which cannot be registered before this call
        for name, value, kind in (
            ("features", features, InducingFeatures),
            ("covar_module", covar_module, Kernel),
            ("mean_module", mean_module, (Mean, type(None))),
        ):
            if not isinstance(value, kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                expected = " or ".join(k.__name__ for k in kinds)
                raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}.")
        if transfer is not None and transfer not in online.TRANSFERS:
            raise ValueError(f"transfer: expected one of {online.TRANSFERS} or None, got {transfer!r}.")
        likelihood = check_likelihood(likelihood)
        if learn not in LEARN:
            raise ValueError(f"learn: expected one of {LEARN}, got {learn!r}.")
        device = next((p.device for p in covar_module.parameters()), None)
        features = copy.deepcopy(features).to(device)  # this stream will move them
        if features.embedding is not None:
            if learn != "never":
                raise ValueError(
                    f"learn: random features are frozen with their kernel; expected 'never', got {learn!r}."
                )
            if not features.embedding.belongs_to(covar_module):
                raise ValueError("covar_module: expected the kernel that the random features were drawn for.")
        tolerance = check_number("tolerance", tolerance, above=0.0, expected="a positive fraction of the variance")
        if max_features is not None:
            if not isinstance(features, HippoFeatures):
                raise ValueError(f"max_features: only HippoFeatures can grow, got {type(features).__name__}.")
            check_count("max_features", max_features, least=features.num_features)
        jitter = check_jitter(jitter)
        self.covar_module = covar_module
        self.mean_module = ZeroMean() if mean_module is None else mean_module
        self.likelihood = likelihood
        self.horizon_growth = check_growth(horizon_growth)
        self.learn, self.max_features, self.tolerance = learn, max_features, tolerance
        with torch.inference_mode(False):
            self.variational_strategy = StreamingVariationalStrategy(self, features, jitter, transfer)
        self._capacity_warned_at = 0.0  # length of the horizon
        self._begun = False
        #: How the last update by sites went; ``None`` before it, and where updates have a closed form.
        self.convergence: Convergence | None = None

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

    def update(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None = None,
        missing: str = "error",
        steps: int | None = None,
        step_size: float | None = None,
        *,
        shards: Shards | None = None,
    ) -> StreamingGP:
        """Absorb a chunk of observations, in place and in bounded memory.

        Times may be irregular, repeated, unsorted, or older than what was seen. An empty chunk changes nothing. An
        update that raises leaves the model exactly as it was.

        Args:
            x: inputs ``(n,)`` or ``(n, d)``; with a batch of kernels also ``(*batch, n, d)``. Time in the unit of the
                features' horizon.
            y: targets, ``(n,)``, or ``(*batch, n)``.
            noise: noise variance of each target, a scalar or broadcastable to ``y``. Replaces the noise of a
                ``GaussianLikelihood``; a ``FixedNoiseGaussianLikelihood`` needs it; others have none.
            missing: what a NaN in ``y`` means: ``"error"`` or ``"skip"``.
            steps: at most so many natural-gradient steps; ``None`` goes on until convergence and warns where it is
                not reached. Of no effect for Gaussian likelihoods. :attr:`convergence` tells how it went.
            step_size: the longest of these steps, in (0, 1]; ``None`` means 1 for log-concave likelihoods and 0.5
                otherwise. Steps that lower the bound are halved in any case.
            shards: other processes, each with the same model and a part of the chunk, perhaps an empty one; see
                :class:`gpseq.distributed.ProcessShards`. All end with the posterior of the whole chunk.

        Returns:
            The model itself.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes, devices or values do not fit, counts or labels are none, or times pass a horizon
                declared ``"fixed"``. With shards, if that is so in any process.
            RuntimeError: another process did not take part.
        """
        _check_steps(steps, step_size)
        strategy = self.variational_strategy
        # A state made in inference mode could never take part in a graph again.
        with torch.inference_mode(False), torch.no_grad():
            if shards is not None:
                self._update_in_parts(x, y, noise, missing, steps, step_size, shards)
                return self
            state = strategy.current_state()
            data = self._check(state, x, y, noise, missing)
            data.check_fits(state.r.shape[:-1])
            if data.empty:
                return self
            before = [(p, p.detach().clone()) for p in self._learnable()]
            try:
                features, basis, warned_at = self._prepare(data, moved=state.G is not strategy.state.G)
                if before:  # the noise may have been learnt
                    data = self._check(state, x, y, noise, missing)
                if basis is not None:
                    state = strategy.carried_to(basis)
                elif before:  # hyperparameters may just have moved
                    state = strategy.current_state()
                state, convergence = self._absorb(state, data, steps, step_size)
                self._replace(features, state, warned_at, convergence)
            except BaseException:
                for parameter, value in before:
                    parameter.copy_(value)
                raise
        return self

    def _update_in_parts(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None,
        missing: str,
        steps: int | None,
        step_size: float | None,
        shards: Shards,
    ) -> None:
        """As :meth:`update`, together with others; what one of them refuses is refused by all."""
        strategy = self.variational_strategy
        state = strategy.current_state()
        data, problem, signature = None, None, (0, 0)
        try:
            if self.learn != "never":
                raise ValueError(
                    f"shards: hyperparameters are not learnt from parts; expected 'never', got {self.learn!r}."
                )
            data = self._check(state, x, y, noise, missing)
            data.check_fits(state.r.shape[:-1])
            batches = torch.broadcast_shapes(state.G.shape[:-2], data.x.shape[:-2]), data.y.shape[:-1]
            signature = (math.prod(batches[0]), math.prod(batches[1]))
        except (TypeError, ValueError) as error:
            problem = error
        # Equal books are no proof of equal states, but unequal ones are of others.
        shards.agree(problem, (*signature, state.num_features, int(state.count.sum())))
        assert data is not None
        inputs = shards.gather(data.inputs)
        if not len(inputs):
            return
        features = self.features.following(inputs, self.covar_module, self.horizon_growth)
        features, basis, warned_at = self._judged(features, moved=state.G is not strategy.state.G)
        if basis is not None:
            state = strategy.carried_to(basis)
        state, convergence = self._absorb(state, data, steps, step_size, shards)
        self._replace(features, state, warned_at, convergence)

    def _learnable(self) -> list[torch.nn.Parameter]:
        if self.learn == "never":
            return []
        modules = (self.covar_module, self.mean_module, self.likelihood)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def _check(self, state: OnlineState, x: Tensor, y: Tensor, noise: Tensor | None, missing: str) -> Observations:
        return check_observations(state, self.features.num_dims, self.likelihood, x, y, noise, missing)

    def rebase(self, features: InducingFeatures) -> StreamingGP:
        """Carry the belief over to other features of the same f, in place.

        Args:
            features: the new basis; the number of features may differ.

        Returns:
            The model itself.
        """
        if not isinstance(features, InducingFeatures):
            raise TypeError(f"features: expected InducingFeatures, got {type(features).__name__}.")
        self.features.check_embedding(features)
        with torch.inference_mode(False), torch.no_grad():
            features = copy.deepcopy(features).to(self.state.G.device)
            strategy = self.variational_strategy
            self._replace(features, strategy.carried_to(strategy.basis_of(features)))
        return self

    def condition_on_observations(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None = None,
        missing: str = "error",
        extend_horizon: bool = False,
        steps: int | None = None,
        step_size: float | None = None,
        share: bool = False,
    ) -> StreamingGP:
        """A new model of the same type that has also seen (x, y); this one is untouched.

        Differentiable in ``x`` and ``y`` with a Gaussian likelihood; otherwise in ``x``, the sites held. Batches of
        targets give a batch of models (fantasies) that share what they can: with ``x`` of shape ``(*b, n, d)`` and
        ``y`` of shape ``(*f, *b, n)`` the information matrix of a Gaussian update has batch shape b and only the shift
        has ``(*f, *b)``.

        Args:
            x: inputs ``(n,)`` or ``(*b, n, d)``.
            y: targets ``(*f, *b, n)``.
            noise: as in :meth:`update`.
            missing: as in :meth:`update`.
            extend_horizon: move the features where ``x`` passes them, as an update would; fantasies usually should not.
            steps: as in :meth:`update`.
            step_size: as in :meth:`update`.
            share: give the new model these hyperparameter modules instead of copies.

        Returns:
            The new model, with copies of all hyperparameters unless they are shared. Nothing is learnt.

        Raises:
            TypeError: as :meth:`update`.
            ValueError: as :meth:`update`, or shapes that do not broadcast.
        """
        _check_steps(steps, step_size)
        strategy = self.variational_strategy
        state = strategy.current_state()
        data = self._check(state, x, y, noise, missing)
        features, basis, warned_at = self.features, None, None
        # Features that have no data yet and choose their place by them are nowhere.
        nowhere = self.features.interval is None and not self._has_begun()
        if (extend_horizon or nowhere) and not data.empty:
            features, basis, warned_at = self._features_for(data)
        if basis is not None:
            state = strategy.carried_to(basis)
        convergence = self.convergence
        if not data.empty:
            state, convergence = self._absorb(state, data, steps, step_size)
        # The copy shares this model's state tensors (values are never changed in place), so a graph in them survives.
        kept: list[Any] = [tensor for _, tensor in self.state.items()]
        if share:
            kept += [m for part in (self.covar_module, self.mean_module, self.likelihood) for m in part.modules()]
        new = copy.deepcopy(self, {id(value): value for value in kept})
        new._replace(copy.deepcopy(features), state, warned_at, convergence)
        return new

    def get_fantasy_model(self, inputs: Tensor, targets: Tensor, **kwargs: Any) -> StreamingGP:
        """GPyTorch's name for :meth:`condition_on_observations`."""
        return self.condition_on_observations(inputs, targets, **kwargs)

    def fit_hyperparameters(self, x: Tensor, y: Tensor, noise: Tensor | None = None, **kwargs: Any) -> float:
        """Learn kernel, mean and likelihood on a warm-up window.

        With a Gaussian likelihood by exact marginal likelihood, see :func:`gpseq.models.fit_hyperparameters`. With any
        other by the bound of the sparse model that this stream begins as; a fit from the values that the modules have.
        What the stream knows stays as it is.

        Args:
            x: inputs of the window, ``(n,)`` or ``(n, d)``; a few thousand at most.
            y: targets, ``(n,)``.
            noise: as in :meth:`update`.
            kwargs: of :func:`gpseq.models.fit_hyperparameters`; of another likelihood ``steps`` and ``rate``.

        Returns:
            The log marginal likelihood reached, or by how much the bound rose, in nats.
        """
        if self.features.embedding is not None:
            raise ValueError("features: random features are frozen with their kernel; fit it before they are drawn.")
        if is_gaussian(self.likelihood) and not self.covar_module.batch_shape:
            return fit_hyperparameters(
                x, y, self.covar_module, self.likelihood, self.mean_module, noise=noise, **kwargs
            )
        with torch.inference_mode(False), torch.no_grad():
            data = self._check(self.state, x, y, noise, "error")
            if data.empty:
                raise ValueError(f"y: expected at least one target, got shape {tuple(y.shape)}.")
            if unknown := set(kwargs) - {"steps", "rate"}:
                raise TypeError(f"{min(unknown)}: a fit by the bound takes steps and rate only.")
            return self._warm_up_by_bound(data, **kwargs)

    def _warm_up_by_bound(
        self, data: Observations, steps: int = learning.WARMUP_STEPS, rate: float = learning.WARMUP_RATE
    ) -> float:
        check_count("steps", steps)
        check_number("rate", rate, above=0.0, expected="a positive learning rate")
        features = self.features.following(data.inputs, self.covar_module, self.horizon_growth)
        start = self.variational_strategy.basis_of(features)  # nothing seen yet
        return self._learn(data, start, features, steps, rate, None)

    def _learn(
        self,
        data: Observations,
        state: OnlineState,
        features: InducingFeatures,
        steps: int,
        rate: float,
        drift: float | None,
    ) -> float:
        jitter = self.variational_strategy.jitter_val
        modules = (self.covar_module, self.mean_module, self.likelihood)
        return learning.learn_from(data, state, features, *modules, jitter, steps, rate, drift)

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
            x = check_inputs(x, self.features.num_dims)
            return online.residual_variance(strategy.current_state(), strategy.prior, x)
        probes = self.features.probes()
        if probes is None:
            raise ValueError(f"x: {type(self.features).__name__} have no horizon to average over; give inputs.")
        return online.mean_residual_variance(strategy.current_state(), strategy.prior, probes)

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
        x = check_inputs(x, self.features.num_dims)
        state = self.variational_strategy.current_state()
        coefficients = (state.factor @ online.posterior(state)[0].unsqueeze(-1)).squeeze(-1)
        return self.features.reconstruct(coefficients, x) + self.variational_strategy.prior.mean_at(x)

    def _absorb(
        self,
        state: OnlineState,
        data: Observations,
        steps: int | None,
        step_size: float | None,
        shards: Shards | None = None,
    ) -> tuple[OnlineState, Convergence | None]:
        prior, convergence = self.variational_strategy.prior, None
        if data.noise is not None:
            state = online.update(state, prior, data.x, data.y, data.noise, data.observed, shards)
        else:
            longest = step_size or longest_step(self.likelihood)
            expectation = expectation_of(self.likelihood, data, frozen=True)
            state, convergence = sites.update(
                state, prior, data.x, expectation, data.count, steps, min(0.5, longest), longest, shards
            )
            _report(convergence, asked_for_few=steps is not None)
        if not (state.c.abs() < LARGEST_LOG_SCALE).all():
            raise ValueError("y: the targets are too large, or the noise too small, for float64.")
        return state, convergence

    def _snapshot(self) -> tuple[Any, ...]:
        return self.features, self.state, self._capacity_warned_at, self.convergence

    def _restore(self, snapshot: tuple[Any, ...]) -> None:
        self._replace(*snapshot)

    def _replace(
        self,
        features: InducingFeatures,
        state: OnlineState,
        warned_at: float | None = None,
        convergence: Convergence | None = None,
    ) -> None:
        """The one place where the stream moves on; Ctrl-C leaves it where it was."""
        strategy = self.variational_strategy
        before, modules = self._snapshot(), strategy._modules_of_basis
        try:
            if features is not strategy.features:
                strategy.features = features
            strategy.state = state
            self.convergence = convergence
            if warned_at is not None:
                self._capacity_warned_at = warned_at
        except BaseException:
            strategy.features, strategy.state, self._capacity_warned_at, self.convergence = before
            strategy._modules_of_basis = modules
            raise

    def get_extra_state(self) -> Tensor:
        """What is neither parameter nor state: the length of the horizon at the last capacity warning."""
        return torch.tensor(self._capacity_warned_at, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        self._capacity_warned_at = float(state)
        self._begun = False
        self.convergence = None

    def _prepare(self, data: Observations, moved: bool) -> tuple[InducingFeatures, OnlineState | None, float | None]:
        """As :meth:`_features_for`, after whatever learning this chunk calls for."""
        if self.learn == "never":
            return self._features_for(data, moved)
        if self.learn == "warmup":
            if not self._has_begun():
                self._warm_up(data)
            return self._features_for(data, moved)
        features = self.features.following(data.inputs, self.covar_module, self.horizon_growth)
        if self._has_begun() and features is not self.features:
            strategy = self.variational_strategy
            state = strategy.current_state()
            if strategy.method == "adf":
                # What is lost on the way must not count against the hyperparameters: carry first, learn there.
                state = strategy.carried_to(strategy.basis_of(features))
            self._learn(data, state, features, learning.STEPS, learning.RATE, learning.DRIFT)
        return self._judged(features, moved)

    def _warm_up(self, data: Observations) -> None:
        num_hyperparameters = sum(parameter.numel() for parameter in self._learnable())
        if (count := data.inputs.shape[0]) < 2 * num_hyperparameters:
            warnings.warn(
                f"y: {count} observations in the first chunk are few for {num_hyperparameters} hyperparameters, which "
                "learn='warmup' takes from there and keeps.",
                stacklevel=stacklevel_outside(),
            )
        if not is_gaussian(self.likelihood) or self.covar_module.batch_shape:
            self._warm_up_by_bound(data)  # the exact fit knows no batches
            return
        noise = None if data.given_noise is None or data.noise is None else data.of_inputs(data.noise)
        modules = (self.covar_module, self.likelihood, self.mean_module)
        fit_hyperparameters(data.inputs, data.of_inputs(data.y), *modules, noise=noise)

    def _has_begun(self) -> bool:
        """Whether anything has been learnt; asked of the device until it has."""
        if not self._begun:
            self._begun = bool(self.state.count.any())
        return self._begun

    def _features_for(
        self, data: Observations, moved: bool = False
    ) -> tuple[InducingFeatures, OnlineState | None, float | None]:
        """Features that cover ``data``, their basis if they are new, and when a warning was given."""
        features = self.features.following(data.inputs, self.covar_module, self.horizon_growth)
        return self._judged(features, moved)

    def _judged(
        self, features: InducingFeatures, moved: bool
    ) -> tuple[InducingFeatures, OnlineState | None, float | None]:
        if features is self.features and ((self._has_begun() and not moved) or features.interval is None):
            return features, None, None
        if features.interval is None:
            return features, self.variational_strategy.basis_of(features), None
        # Judged at every change of features or hyperparameters, and before the first data.
        strategy = self.variational_strategy
        return capacity.judge(strategy, features, self.max_features, self.tolerance, self._capacity_warned_at)


def _report(convergence: Convergence, asked_for_few: bool) -> None:
    """Warn of an update that stopped early, unless that was asked for and it has learnt something."""
    movement = convergence.movement.max().item()
    if convergence.all_converged or (asked_for_few and math.isfinite(movement)):
        return
    what = f"the marginals of f still move by {movement:.1e} a step" if math.isfinite(movement) else "none was accepted"
    warnings.warn(
        f"y: the update has not converged after {convergence.steps} steps; {what}.",
        ConvergenceWarning,
        stacklevel=stacklevel_outside(),
    )


def _check_steps(steps: int | None, step_size: float | None) -> None:
    if steps is not None:
        check_count("steps", steps)
    if step_size is not None and not check_number("step_size", step_size, 0.0, "a number in (0, 1]") <= 1:
        raise ValueError(f"step_size: expected a number in (0, 1], got {step_size!r}.")
