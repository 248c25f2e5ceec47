"""Many independent streams as one batch: one state, one call to update them all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor

from gpseq.checks import check_count
from gpseq.features import InducingFeatures
from gpseq.features.base import as_inputs
from gpseq.models.fleet_inputs import arranged, check_places, check_streams
from gpseq.models.observations import Observations, is_gaussian
from gpseq.models.streaming_gp import LARGEST_LOG_SCALE, StreamingGP, _check_steps
from gpseq.precision import floating_tensors
from gpseq.variational import Belief, OnlineState
from gpseq.variational.independent import OWN, rows, update_each
from gpseq.variational.shards import Shards
from gpseq.variational.sites import Convergence


class StreamingFleet(StreamingGP):
    r"""S independent streams as one batch: what they know is one state, and one call updates them all.

    Stream s is what a :class:`StreamingGP` would be that had seen the observations of s alone, but for one thing: all
    streams share one basis, so that the horizon moves for all of them when one passes it. Give streams with clocks
    of their own local times, such as the time since each began.

    Hyperparameters are shared by all where the kernel has no batch shape; then the state is
    :math:`S (M^2 + M + 2)` numbers and one basis. With a kernel of batch shape ``(S,)`` each stream has its own, and a
    basis of its own for them. Mean and likelihood may have that batch shape in either case.

    Args:
        num_streams: S.
        features: what each memory consists of; nodes without batch shape.
        covar_module: any GPyTorch kernel, of batch shape ``()`` or ``(S,)``.
        likelihood: as in :class:`StreamingGP`, shared or of batch shape ``(S,)``.
        mean_module: any GPyTorch mean; ``None`` is zero.
        horizon_growth: as in :class:`StreamingGP`.
        transfer: likewise.
        learn: likewise; shared hyperparameters are learnt from all streams together, by the sum of their bounds.
        max_features: likewise.
        tolerance: likewise.
        jitter: likewise.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value out of range, or another batch shape.

    Example:
        >>> import gpseq, gpytorch
        >>> fleet = StreamingFleet(
        ...     3,
        ...     gpseq.features.HippoFeatures(num_features=16, horizon=5.0),
        ...     gpytorch.kernels.RBFKernel(),
        ...     gpytorch.likelihoods.GaussianLikelihood(),
        ... )
        >>> nothing = float("nan")
        >>> fleet = fleet.update(
        ...     torch.tensor([1.0, 2.0]), torch.tensor([[0.1, 0.2], [nothing, 0.4], [nothing, nothing]])
        ... )
        >>> fleet = fleet.update(torch.tensor([[2.5]]), torch.tensor([[0.7]]), streams=torch.tensor([2]))
        >>> fleet.counts.tolist(), fleet(torch.tensor([1.5])).mean.shape
        ([2, 1, 1], torch.Size([3, 1]))
        >>> fleet[1].num_observations
        1
    """

    def __init__(
        self,
        num_streams: int,
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
        check_count("num_streams", num_streams)
        super().__init__(
            features,
            covar_module,
            likelihood,
            mean_module,
            horizon_growth=horizon_growth,
            transfer=transfer,
            learn=learn,
            max_features=max_features,
            tolerance=tolerance,
            jitter=jitter,
        )
        state = self.state
        if state.nodes.dim() != 2:
            raise ValueError(f"features: expected nodes of shape (Q, d), got {tuple(state.nodes.shape)}.")
        for name, shape in (
            ("covar_module", state.factor.shape[:-2]),
            ("mean_module", self.mean_module(state.nodes[:1]).shape[:-1]),
        ):
            if shape not in ((), (num_streams,)):
                raise ValueError(f"{name}: expected batch shape () or ({num_streams},), got {tuple(shape)}.")
        own = {
            "G": state.G.new_zeros(num_streams, *state.G.shape[-2:]),
            "r": state.r.new_zeros(num_streams, state.r.shape[-1]),
            "c": state.c.new_zeros(num_streams),
            "count": state.count.new_zeros(num_streams),
        }
        with torch.inference_mode(False):
            self.variational_strategy.state = replace(state, **own)

    @property
    def num_streams(self) -> int:
        """S."""
        return self._now.r.shape[-2]

    def __len__(self) -> int:
        return self.num_streams

    @property
    def _now(self) -> OnlineState:
        """The state, to be looked at and not to be kept or given away."""
        with self.variational_strategy.belief._looked_at():
            return self.state

    @property
    def counts(self) -> Tensor:
        """Observations absorbed by each stream, ``(S,)``, int64."""
        return self._now.count.clone()

    def update(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None = None,
        missing: str = "skip",
        steps: int | None = None,
        step_size: float | None = None,
        streams: Tensor | Sequence[int] | None = None,
        *,
        shards: Shards | None = None,
    ) -> StreamingFleet:
        """Absorb new observations of all streams, or of some, in place.

        What a stream without observations knows stays bit for bit as it was, unless the basis changes, because others
        move the horizon or hyperparameters were set: then it is carried over with the rest. An update that raises
        leaves the fleet as it was.

        Args:
            x: inputs ``(n,)`` or ``(n, d)`` that all streams share, or own inputs ``(S, n, d)``; in one dimension own
                times ``(S, n)``, of the shape of ``y``, too. Where a target is missing the input does not matter and
                may be NaN.
            y: targets ``(S, n)``; NaN where there is none.
            noise: noise variances, a scalar or broadcastable to ``y``.
            missing: what a NaN in ``y`` means: ``"skip"`` or ``"error"``.
            steps: as in :meth:`StreamingGP.update`.
            step_size: likewise.
            streams: indices ``(k,)`` of different streams; then ``x`` and ``y`` are about these, in that order, with k
                in the place of S. At a cost of O(k) where the streams share their hyperparameters, and of a copy of
                the state, O(S), where that was read, replaced or saved since the last such update.
            shards: none: processes share a fleet by its streams, not by parts of a chunk.

        Returns:
            The fleet itself.

        Raises:
            TypeError: something is not a floating-point tensor, or ``streams`` are not integers.
            ValueError: as :meth:`StreamingGP.update`, or streams that do not exist or are named twice.
        """
        _check_steps(steps, step_size)
        if shards is not None:
            raise ValueError(f"shards: expected None, as fleets are split by streams, got {type(shards).__name__}.")
        self._check_no_fantasies("update")
        with torch.inference_mode(False), torch.no_grad():
            index = None if streams is None else self._check_streams(streams)
            num = self.num_streams if index is None else len(index)
            x, y = self._arranged(x, y, num, missing)
            if index is None:
                super().update(x, y, noise, missing, steps, step_size)
            elif self.learn == "never" and self._hyperparameters_are_shared():
                self._update_some(index, x, y, noise, missing, steps, step_size)
            else:
                self._update_spread(index, x, y, noise, missing, steps, step_size)
        return self

    def _update_some(
        self,
        index: Tensor,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None,
        missing: str,
        steps: int | None,
        step_size: float | None,
    ) -> None:
        """Gather, update and put back; nothing is done to the other streams."""
        strategy = self.variational_strategy
        in_place = strategy.belief._exclusive
        state = strategy.current_state()
        data = self._check(replace(state, r=state.r[index]), x, y, noise, missing)
        data.check_fits(index.shape)
        if data.empty:
            return
        features, basis, warned_at = self._prepare(data, moved=state.G is not strategy.state.G)
        if basis is not None:
            state = strategy.carried_to(basis)
        then = rows(state, index)
        part, convergence = self._absorb(then, data, steps, step_size)
        # A copy of all streams takes longer than the update of a few: it is made once, and belongs to the fleet until
        # somebody reads the state.
        in_place = in_place and state.G is strategy.belief.G
        try:
            self._replace(features, _put_back(state, part, index, in_place), warned_at, convergence)
        except BaseException:  # Ctrl-C
            if in_place:
                _put_back(state, then, index, in_place)
            raise
        strategy.belief._exclusive = True

    def _update_spread(
        self,
        index: Tensor,
        x: Tensor,
        y: Tensor,
        noise: Tensor | float | None,
        missing: str,
        steps: int | None,
        step_size: float | None,
    ) -> None:
        """An update of some streams as one of all, where hyperparameters of their own are not to be told apart."""
        k, n = y.shape
        if missing == "error" and bool(y.isnan().any()):
            raise ValueError(
                f"y: expected finite targets, got NaN or infinity in a tensor of shape {tuple(y.shape)} "
                "(missing='skip' passes over NaN)."
            )
        if not y.numel():
            return
        spread_y = y.new_full((self.num_streams, n), torch.nan)
        spread_y[index] = y
        if x.dim() > 2:
            spread_x = x[:1, :1].expand(self.num_streams, n, -1).clone()  # any admissible input will do
            spread_x[index] = x
            x = spread_x
        if isinstance(noise, Tensor) and noise.dim() > 1:
            if len(noise) not in (1, k) or noise.dim() > 2 or noise.shape[-1] not in (1, n):
                raise ValueError(
                    f"noise: expected a scalar or variances for y of shape ({k}, {n}), got shape {tuple(noise.shape)}."
                )
            spread_noise = noise.new_ones(self.num_streams, n)
            spread_noise[index] = noise.expand(k, n)
            noise = spread_noise
        super().update(x, spread_y, cast(Any, noise), "skip", steps, step_size)

    def condition_on_observations(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None = None,
        missing: str = "skip",
        *args: Any,
        **kwargs: Any,
    ) -> StreamingFleet:
        """A new fleet that has also seen (x, y); this one is untouched.

        As :meth:`StreamingGP.condition_on_observations`, with inputs as in :meth:`update`. Targets of shape
        ``(*f, S, n)`` give fleets of batch shape ``(*f, S)``, which predict and take part in nothing else.

        Args:
            x: inputs ``(n,)``, ``(n, d)`` or ``(S, n, d)``; in one dimension also ``(S, n)`` with ``y`` of that shape.
            y: targets ``(*f, S, n)``.
            noise: as in :meth:`update`.
            missing: as in :meth:`update`.
            args: as in :meth:`StreamingGP.condition_on_observations`.
            kwargs: likewise.

        Returns:
            The new fleet.
        """
        self._check_no_fantasies("condition_on_observations")
        x, y = self._arranged(x, y, self.num_streams, missing, batches=True)
        new = super().condition_on_observations(x, y, noise, missing, *args, **kwargs)
        assert isinstance(new, StreamingFleet)
        return new

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> MultivariateNormal:
        """Posterior of f of all streams, see :meth:`predict`."""
        x = check_places(x, self.features.num_dims, tuple(self._now.r.shape[:-1]))
        with self.variational_strategy.belief._looked_at():
            return super().__call__(x, *args, **kwargs)

    def predict(self, x: Tensor, streams: Tensor | Sequence[int] | None = None) -> MultivariateNormal:
        """Posterior of f of all streams, as by calling the fleet, or of some of them.

        Args:
            x: inputs ``(n,)`` or ``(n, d)`` that all share, or own ones, ``(S, n, d)``; with ``streams`` ``(k, n, d)``.
            streams: indices ``(k,)``, each at most once.

        Returns:
            Distribution over ``(S, n)`` or ``(k, n)`` values.

        Raises:
            TypeError: ``x`` is not a floating-point tensor, or ``streams`` are not integers.
            ValueError: shapes that do not fit, or streams that do not exist or are named twice.
        """
        if streams is None:
            return self(x)
        self._check_no_fantasies("predict")
        index = self._check_streams(streams)
        x = check_places(x, self.features.num_dims, tuple(index.shape))
        if not self._kernel_and_mean_are_shared():
            return self[index](x)
        strategy = self.variational_strategy
        view = copy.copy(strategy)
        view._modules = dict(strategy._modules)
        with strategy.belief._looked_at():
            view.belief = Belief(rows(strategy.current_state(), index))
        # As if called: GPyTorch's models add the column.
        return view(as_inputs(x))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Any:
        """One stream as a :class:`StreamingGP`, or several as a fleet: independent copies, hyperparameters included.

        Args:
            index: a number, which may be negative; a slice; or indices ``(k,)``.

        Returns:
            What has the same posterior, and goes its own way from there.

        Raises:
            IndexError: there is no such stream.
        """
        self._check_no_fantasies("index")
        num = self.num_streams
        if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
            index = int(index)
        which: Tensor | int
        if isinstance(index, int) and not isinstance(index, bool):
            if not -num <= index < num:
                raise IndexError(f"index: expected a stream from {-num} to {num - 1}, got {index}.")
            which = index % num
        else:
            positions = list(range(num))[index] if isinstance(index, slice) else index
            which = self._check_streams(positions, "index")
            if not len(which):
                raise IndexError("index: expected at least one stream, got none.")
        with torch.inference_mode(False), torch.no_grad():
            return self._taken(which)

    def _taken(self, which: Tensor | int) -> StreamingGP:
        strategy = self.variational_strategy
        state = rows(strategy.current_state(), which)
        modules = copy.deepcopy(torch.nn.ModuleList([self.covar_module, self.mean_module, self.likelihood]))
        num = self.num_streams
        for part in modules[0].modules():
            if isinstance(part, Kernel) and part._batch_shape == (num,):
                _take(part, which, num)
        if self.mean_module(state.nodes[:1]).dim() > 1:
            for part in modules[1].modules():
                _take(part, which, num)
        if not self._likelihood_is_shared():
            for part in modules[2].modules():
                _take(part, which, num)
        kernel, mean, likelihood = cast(tuple[Kernel, Mean, Likelihood], tuple(modules))
        options: dict[str, Any] = {
            "horizon_growth": self.horizon_growth,
            "transfer": strategy.transfer,
            "learn": self.learn,
            "max_features": self.max_features,
            "tolerance": self.tolerance,
            "jitter": strategy.jitter_val,
        }
        one: StreamingGP
        if isinstance(which, int):
            one = StreamingGP(self.features, kernel, likelihood, mean, **options)
        else:
            one = StreamingFleet(len(which), self.features, kernel, likelihood, mean, **options)
        if not torch.allclose(one.variational_strategy.state.factor, state.factor):
            raise TypeError(f"covar_module: {type(kernel).__name__} does not say which of its values are whose.")
        own = {name: tensor.detach().clone() for name, tensor in state.items()}
        own["hyperparameters"] = one.variational_strategy.prior.hyperparameters().to(own["G"].device)
        one._replace(one.features, OnlineState(**own), self._capacity_warned_at)
        return one.train(self.training)

    def fit_hyperparameters(self, x: Tensor, y: Tensor, noise: Tensor | None = None, **kwargs: Any) -> float:
        """Learn kernel, mean and likelihood on a warm-up window of all streams, by the sum of their bounds.

        Args:
            x: inputs as in :meth:`update`.
            y: targets ``(S, n)``; NaN where there is none.
            noise: as in :meth:`update`.
            kwargs: ``steps`` and ``rate``.

        Returns:
            By how much the sum of the bounds rose, in nats.
        """
        if self.features.embedding is not None:
            raise ValueError("features: random features are frozen with their kernel; fit it before they are drawn.")
        if unknown := set(kwargs) - {"steps", "rate"}:
            raise TypeError(f"{min(unknown)}: a fit by the bound takes steps and rate only.")
        with torch.inference_mode(False), torch.no_grad():
            x, y = self._arranged(x, y, self.num_streams, "skip")
            data = self._check(self._now, x, y, noise, "skip")
            if data.empty:
                raise ValueError(f"y: expected at least one target, got none in shape {tuple(y.shape)}.")
            return self._warm_up_by_bound(data, **kwargs)

    def _warm_up(self, data: Observations) -> None:
        self._warm_up_by_bound(data)  # the exact fit would take all streams for one

    def _absorb(
        self,
        state: OnlineState,
        data: Observations,
        steps: int | None,
        step_size: float | None,
        shards: Shards | None = None,
    ) -> tuple[OnlineState, Convergence | None]:
        batch = state.r.shape[:-1]
        if len(batch) != 1 or data.y.shape[:-1] != batch:  # fantasies
            return super()._absorb(state, data, steps, step_size)
        if data.noise is not None:
            new = update_each(state, self.variational_strategy.prior, data.x, data.y, data.noise, data.observed)
            if not (new.c.abs() < LARGEST_LOG_SCALE).all():
                raise ValueError("y: the targets are too large, or the noise too small, for float64.")
            return new, None
        if data.observed is None or bool((active := data.observed.any(-1)).all()):
            return super()._absorb(state, data, steps, step_size)
        # A search over idle streams would cost as much as over others, and move the last digits of their evidence.
        if self._hyperparameters_are_shared():
            index = active.nonzero().squeeze(-1)
            x = data.x[index] if data.x.dim() > 2 else data.x
            some = replace(data, x=x, y=data.y[index], observed=data.observed[index])
            part, convergence = super()._absorb(rows(state, index), some, steps, step_size)
            return _put_back(state, part, index), convergence
        new, convergence = super()._absorb(state, data, steps, step_size)
        own = {}
        for name in OWN:
            now, then = getattr(new, name), getattr(state, name)
            own[name] = torch.where(active.reshape(-1, *[1] * (now.dim() - 1)), now, then)
        return replace(new, **own), convergence

    def _arranged(self, x: Tensor, y: Tensor, num: int, missing: str, batches: bool = False) -> tuple[Tensor, Tensor]:
        counts = not is_gaussian(self.likelihood)
        return arranged(x, y, num, self.features.num_dims, missing, batches, integers=counts)

    def _check_streams(self, streams: Any, name: str = "streams") -> Tensor:
        return check_streams(streams, self.num_streams, self._now.r.device, name)

    def _check_no_fantasies(self, what: str) -> None:
        if (shape := self._now.r.shape[:-1]) != shape[-1:]:
            raise ValueError(f"{what}: a batch of fleets, of shape {tuple(shape)}, can only predict.")

    def _kernel_and_mean_are_shared(self) -> bool:
        state = self._now
        return state.factor.dim() == 2 and state.whitened_mean.dim() == 1

    def _likelihood_is_shared(self) -> bool:
        # One that has several numbers for another reason is handled as if they were of several streams, which is right
        # in any case and not as fast.
        return all(tensor.numel() <= 1 for tensor in floating_tensors(self.likelihood))

    def _hyperparameters_are_shared(self) -> bool:
        return self._kernel_and_mean_are_shared() and self._likelihood_is_shared()


def _put_back(state: OnlineState, part: OnlineState, index: Tensor, in_place: bool = False) -> OnlineState:
    """The state of all streams with what some of them, ``(k,)``, know now."""
    copy_into = Tensor.index_copy_ if in_place else Tensor.index_copy
    return replace(state, **{name: copy_into(getattr(state, name), 0, index, getattr(part, name)) for name in OWN})


def _take(module: torch.nn.Module, which: Tensor | int, num: int) -> None:
    """Keep what belongs to some streams of the parameters and buffers of one module, in place."""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None and tensor.is_floating_point() and tensor.shape[:1] == (num,):
                if name in module._parameters:
                    tensor.data = tensor.data[which].clone()
                else:
                    module._buffers[name] = tensor[which].clone()
    if getattr(module, "batch_shape", None) == (num,):
        setattr(module, "batch_shape", torch.Size() if isinstance(which, int) else which.shape)  # noqa: B010
