"""A streaming GP as a BoTorch model: conditioned, fantasised and updated in bounded memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from gpytorch.means import ConstantMean, Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.models import GP
from linear_operator import to_linear_operator
from torch import Tensor, nn

from gpseq.checks import check_count, check_floating
from gpseq.features import InducingFeatures
from gpseq.models import StreamingGP
from gpseq.models.observations import is_gaussian
from gpseq.variational import OnlineState, online

try:
    from botorch import settings
    from botorch.acquisition.objective import PosteriorTransform
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.gpytorch import GPyTorchModel
    from botorch.models.model import FantasizeMixin
    from botorch.models.transforms.input import InputTransform
    from botorch.models.transforms.outcome import OutcomeTransform
    from botorch.models.utils.gpytorch_modules import (
        MIN_INFERRED_NOISE_LEVEL,
        get_gaussian_likelihood_with_lognormal_prior,
    )
    from botorch.posteriors.gpytorch import GPyTorchPosterior
    from botorch.posteriors.posterior import Posterior
except ImportError as error:
    raise ImportError("gpseq.integrations.botorch needs BoTorch: pip install 'gpseq[botorch]'.") from error

from gpseq.integrations.botorch_defaults import check_in_unit_cube, default_features, default_kernel
from gpseq.integrations.botorch_transforms import FixedStandardize, check_transforms

__all__ = ["FixedStandardize", "StreamingSingleTaskGP"]

#: Posterior covariances of more numbers stay lazy.
LARGEST_DENSE = 10_000_000

_THE_ONE_OUTPUT = ([0], [-1])

_WINDOW = ("_window_X", "_window_Y", "_window_Yvar")


class StreamingSingleTaskGP(GPyTorchModel, FantasizeMixin, GP):
    r"""A single-output BoTorch model around a :class:`~gpseq.models.StreamingGP`.

    What it has learnt is M features and their information, however many observations there were. :meth:`update` learns
    in place; :meth:`condition_on_observations` gives a new model in one closed-form step, batched and differentiable,
    and thereby ``fantasize`` and the acquisition functions that look ahead. Only the window of observations that
    hyperparameters are fitted to is kept, at most ``warmup_size``.

    A single model owns its hyperparameters. A batch of fantasies shares them with the model that it is of, and is
    therefore neither fitted nor loaded into.

    Features and kernel live in the units that come out of ``input_transform``, the likelihood and its noise in those
    of ``outcome_transform``. Both transforms must be fixed: one that learns, or that depends on the batch, would change
    the units of a belief that cannot be recomputed, because its data are gone.

    Args:
        train_X: inputs, ``(n, d)``; n may be 0, unless ``time_dim`` is given without ``features``: then the first time
            is where the memory begins.
        train_Y: targets, ``(n, 1)``. ``ModelListGP`` makes several of these models one of several outputs.
        train_Yvar: known noise variances, ``(n, 1)``, in the square of the unit of ``train_Y``. Then each update needs
            its own; ``None`` infers one variance.
        likelihood: ``None`` is BoTorch's default, Gaussian with a log-normal prior on the noise.
        covar_module: ``None`` is a scaled RBF kernel with BoTorch's dimension-scaled prior on the lengthscales; with
            ``time_dim``, the product of one of time and one of the other columns. It has an output scale, because a
            stream cannot be standardised as it goes.
        mean_module: ``None`` is a constant.
        features: what is remembered. ``None`` is ``InducingPoints`` at 100 points of the unit cube
            (:func:`gpseq.features.spread_points`); with ``time_dim``, a memory of time at each of 16 points of the
            other columns' unit cube (:func:`gpseq.features.space_time_features`). Data elsewhere than in that cube are
            then refused, because nothing would be remembered of them. Fantasies see only what the features
            resolve: features must cover where candidates may lie, which points selected from the data
            (``SelectedPoints``) do not.
        time_dim: the column of time, or ``None`` where there is none.
        window: with ``time_dim`` and without ``features``: how far back the memory reaches; ``None`` keeps all.
        outcome_transform: fixed, as :class:`FixedStandardize`.
        input_transform: fixed, as ``Normalize`` with bounds.
        warmup_size: how many observations are kept for fitting, the latest; 0 keeps none.
        horizon_growth: of the stream.
        transfer: of the stream.
        max_features: of the stream.
        tolerance: of the stream.
        jitter: of the stream.

    Raises:
        TypeError: something of the wrong kind.
        ValueError: shapes or values that do not fit; transforms that learn; data beyond the default features.

    Example:
        >>> from botorch.fit import fit_gpytorch_mll
        >>> from gpytorch.mlls import ExactMarginalLogLikelihood
        >>> _ = torch.manual_seed(0)
        >>> X = torch.rand(20, 2, dtype=torch.float64)
        >>> model = StreamingSingleTaskGP(X, X.sin().sum(-1, keepdim=True))
        >>> mll = fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        >>> model = model.update(X[:3] / 2, (X[:3] / 2).sin().sum(-1, keepdim=True))
        >>> fantasies = model.condition_on_observations(X[:2], torch.zeros(8, 2, 1, dtype=torch.float64))
        >>> fantasies.posterior(X[:4]).mean.shape
        torch.Size([8, 4, 1])
    """

    _first_features: InducingFeatures
    _window_X: Tensor
    _window_Y: Tensor
    _window_Yvar: Tensor | None
    _mean_noise: Tensor | None
    _unit_columns: Tensor

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        train_Yvar: Tensor | None = None,
        *,
        likelihood: Likelihood | None = None,
        covar_module: Kernel | None = None,
        mean_module: Mean | None = None,
        features: InducingFeatures | None = None,
        time_dim: int | None = None,
        window: float | None = None,
        outcome_transform: OutcomeTransform | None = None,
        input_transform: InputTransform | None = None,
        warmup_size: int = 512,
        horizon_growth: float | str | None = 1.25,
        transfer: str | None = None,
        max_features: int | None = None,
        tolerance: float = 1e-3,
        jitter: float | None = None,
    ) -> None:
        _check_data(train_X, train_Y, train_Yvar)
        if train_X.dim() != 2:
            raise ValueError(f"train_X: expected shape (n, d), got {tuple(train_X.shape)}.")
        check_transforms(input_transform, outcome_transform)
        self._validate_tensor_args(train_X, train_Y, train_Yvar)
        known_noise = train_Yvar is not None
        if known_noise and likelihood is not None and not isinstance(likelihood, FixedNoiseGaussianLikelihood):
            got = type(likelihood).__name__
            raise ValueError(f"likelihood: expected None or FixedNoiseGaussianLikelihood with train_Yvar, got {got}.")
        if likelihood is None:
            if known_noise:
                likelihood = FixedNoiseGaussianLikelihood(train_X.new_full((1,), MIN_INFERRED_NOISE_LEVEL))
            else:
                likelihood = get_gaussian_likelihood_with_lognormal_prior().to(train_X)
        x = _preprocess(input_transform, train_X)
        num_dims = x.shape[-1]
        if time_dim is not None:
            if isinstance(time_dim, bool) or not isinstance(time_dim, int) or not -num_dims <= time_dim < num_dims:
                raise ValueError(f"time_dim: expected a column of {num_dims} input columns, got {time_dim!r}.")
            time_dim %= num_dims
        elif window is not None:
            raise ValueError("window: only a time column has one; give time_dim.")
        unit_columns = torch.zeros(num_dims, dtype=torch.bool, device=x.device)
        if features is None:
            unit_columns = torch.tensor([column != time_dim for column in range(num_dims)], device=x.device)
            features = default_features(x, time_dim, window)
        elif window is not None:
            raise ValueError("window: features that are given have their own; expected None.")
        covar_module = default_kernel(num_dims, time_dim).to(x) if covar_module is None else covar_module
        mean_module = ConstantMean().to(x) if mean_module is None else mean_module
        options: dict[str, Any] = {"horizon_growth": horizon_growth, "transfer": transfer, "jitter": jitter}
        options |= {"max_features": max_features, "tolerance": tolerance}
        stream = StreamingGP(features, covar_module, likelihood, mean_module, **options)
        self._begin(stream, input_transform, outcome_transform, warmup_size, train_X, unit_columns)
        check_in_unit_cube("train_X", x, unit_columns)
        self.to(train_X)
        self.update(train_X, train_Y, train_Yvar)

    def _begin(
        self,
        stream: StreamingGP,
        input_transform: InputTransform | None,
        outcome_transform: OutcomeTransform | None,
        warmup_size: int,
        like: Tensor,
        unit_columns: Tensor,
    ) -> None:
        gpytorch.Module.__init__(self)
        if not is_gaussian(stream.likelihood):
            got = type(stream.likelihood).__name__
            raise TypeError(f"likelihood: expected GaussianLikelihood or FixedNoiseGaussianLikelihood, got {got}.")
        self.model = stream
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        self.warmup_size = check_count("warmup_size", warmup_size, least=0)
        columns = stream.features.num_dims if input_transform is None else like.shape[-1]
        self.register_buffer("_window_X", like.new_empty(0, columns))
        self.register_buffer("_window_Y", like.new_empty(0, 1))
        self.register_buffer("_window_Yvar", like.new_empty(0, 1) if self._known_noise else None)
        # The likelihood does not save its noise.
        noise = stream.likelihood.noise.detach().mean().reshape(1) if self._known_noise else None
        self.register_buffer("_mean_noise", noise)
        # Columns of which the features, if they are the default ones, remember the unit interval only.
        self.register_buffer("_unit_columns", unit_columns)
        # See _features_to_begin_with.
        self._first_features = copy.deepcopy(stream.features)
        self._followed = (stream.features,)
        #: G and the factor that belongs to it: of the last prediction, for the next one.
        self._factor: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_stream(
        cls,
        stream: StreamingGP,
        *,
        outcome_transform: OutcomeTransform | None = None,
        input_transform: InputTransform | None = None,
        warmup_size: int = 512,
    ) -> StreamingSingleTaskGP:
        """A model around a stream, which goes on living in it.

        Args:
            stream: with a Gaussian likelihood and without batch shape; it may have seen data.
            outcome_transform: as of the class.
            input_transform: as of the class.
            warmup_size: as of the class.

        Returns:
            The model; ``model.model`` is ``stream``.
        """
        if not isinstance(stream, StreamingGP):
            raise TypeError(f"stream: expected StreamingGP, got {type(stream).__name__}.")
        if stream.state.r.dim() > 1:
            got = tuple(stream.state.r.shape[:-1])
            raise ValueError(f"stream: expected a single stream, got one of batch shape {got}.")
        check_transforms(input_transform, outcome_transform)
        model = cls.__new__(cls)
        dtype = next((p.dtype for p in stream.covar_module.parameters()), torch.float64)
        like = torch.empty(0, stream.features.num_dims, dtype=dtype, device=stream.state.r.device)
        anywhere = torch.zeros(stream.features.num_dims, dtype=torch.bool, device=like.device)
        model._begin(stream, input_transform, outcome_transform, warmup_size, like, anywhere)
        return model

    @property
    def likelihood(self) -> Likelihood:
        """Of the stream."""
        return self.model.likelihood

    @property
    def covar_module(self) -> Kernel:
        """Of the stream."""
        return self.model.covar_module

    @property
    def mean_module(self) -> Mean:
        """Of the stream."""
        return self.model.mean_module

    @property
    def features(self) -> InducingFeatures:
        """What the memory consists of now."""
        return self.model.features

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of models, as it broadcasts with test inputs; fantasies have one."""
        state = self.model.state
        return torch.broadcast_shapes(state.r.shape[:-1], state.G.shape[:-2])

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """The window for fitting and not all that was seen, ``(w, d)``, before the input transform."""
        return (self._window_X,)

    @property
    def train_targets(self) -> Tensor:
        """Targets of the window, ``(w,)``, after the outcome transform."""
        return self._window_Y.squeeze(-1)

    @property
    def _known_noise(self) -> bool:
        return isinstance(self.model.likelihood, FixedNoiseGaussianLikelihood)

    def update(self, X: Tensor, Y: Tensor, Yvar: Tensor | None = None) -> StreamingSingleTaskGP:
        """Absorb observations, in place and in bounded memory. When it raises, nothing has changed.

        Args:
            X: inputs, ``(n, d)``.
            Y: targets, ``(n, 1)``.
            Yvar: noise variances, ``(n, 1)``; needed where the noise is known, not allowed where it is inferred.

        Returns:
            The model itself.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes or values that do not fit, NaN among them.
        """
        _check_data(X, Y, Yvar)
        self._check_columns(X)
        if (Yvar is not None) is not self._known_noise:
            expected = "variances, as at construction" if self._known_noise else "None, because the noise is inferred"
            raise ValueError(f"Yvar: expected {expected}, got {None if Yvar is None else tuple(Yvar.shape)}.")
        with torch.no_grad():
            self._features_to_begin_with()
            x = _preprocess(getattr(self, "input_transform", None), X)
            check_in_unit_cube("X", x, self._unit_columns)
            y, noise = self._outcomes(Y, Yvar, X)
            if not y.isfinite().all():
                after = " after the outcome transform" if Y.isfinite().all() else ""
                raise ValueError(f"Y: expected finite targets{after}, got NaN or infinity in shape {tuple(Y.shape)}.")
            seen = self.model.num_observations
            self.model.update(x, y.squeeze(-1), None if noise is None else noise.squeeze(-1))
            self._followed = (self.features,)
            if X.dim() == 2 and not self.batch_shape:
                self._remember(X, y, noise)
            if noise is not None and self._mean_noise is not None and noise.numel():
                total = self._mean_noise * seen + noise.sum()
                self._set_mean_noise((total / (seen + noise.numel())).to(self._mean_noise))
        return self

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> StreamingSingleTaskGP:
        """A new model of the same type that has also seen (X, Y), in one closed-form step; this one is untouched.

        No data are kept. Differentiable in ``X`` and ``Y``. A single new model has copies of the hyperparameters and
        goes its own way; a batch of models shares them with this one, so that only the information is new. Batches of
        targets share what they can: with X of shape ``(16, n, d)`` and Y ``(64, 16, n, 1)`` there are 16 information
        matrices for 1,024 models. The memory of time does not move on; what lies beyond its end is seen as far as the
        kernel correlates.

        Args:
            X: inputs, ``(*b, n, d)``.
            Y: targets, ``(*f, *b, n, 1)``.
            noise: noise variances, broadcastable to ``Y``, in BoTorch's convention: *after* the outcome transform.
                ``None`` is the inferred noise.
            kwargs: of ``StreamingGP.condition_on_observations``.

        Returns:
            The new model, of batch shape ``(*f, *b)``, broadcast with that of this model.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes that do not broadcast, values that are not finite.
        """
        _check_data(X, Y, noise, conditioning=True)
        self._check_columns(X)
        x = _preprocess(getattr(self, "input_transform", None), X)
        y, _ = self._outcomes(Y, None, X)
        return self.get_fantasy_model(x, y.squeeze(-1), None if noise is None else noise.squeeze(-1), **kwargs)

    def get_fantasy_model(
        self, inputs: Tensor, targets: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> StreamingSingleTaskGP:
        """GPyTorch's form of :meth:`condition_on_observations`: after both transforms, targets without output column.

        Args:
            inputs: ``(*b, n, d)``.
            targets: ``(*f, *b, n)``.
            noise: noise variances, broadcastable to ``targets``.
            kwargs: of ``StreamingGP.condition_on_observations``.

        Returns:
            The new model.
        """
        # What is shared must not be changed through the new model: a batch can be neither fitted nor loaded into.
        share = targets.dim() > 1 or inputs.dim() > 2 or len(self.batch_shape) > 0
        stream = self.model.condition_on_observations(inputs, targets, noise, share=share, **kwargs)
        if targets.shape[-1] == 0:  # nothing to learn, and yet a batch of models
            state = stream.state
            batch = torch.broadcast_shapes(targets.shape[:-1], inputs.shape[:-2], state.r.shape[:-1])
            stream._replace(stream.features, replace(state, r=state.r.expand(*batch, -1), c=state.c.expand(batch)))
        kept: list[Any] = [buffer for buffer in self._buffers.values() if buffer is not None]
        if share:
            stream.learn = "never"
            if self._known_noise:  # no hyperparameter, but the mean noise of what *this* model has seen
                stream.likelihood = copy.deepcopy(stream.likelihood)
            kept += [module for name, part in self.named_children() if name != "model" for module in part.modules()]
        memo = {id(value): value for value in kept}
        # Features that this model has followed to where they are, the new one has.
        return copy.deepcopy(self, memo | {id(self.model): stream, id(self.features): stream.features})

    def posterior(  # type: ignore[override]
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Joint posterior over q points for each batch.

        Args:
            X: ``(*b, q, d)``; its batch broadcasts with :attr:`batch_shape`.
            output_indices: ``None`` or the one output, ``[0]`` or ``[-1]``.
            observation_noise: add noise: the inferred one, or the mean of the known ones; or variances ``(*b, q, 1)``
                or ``(*b, 1, 1)``, after the outcome transform.
            posterior_transform: applied last.

        Returns:
            A ``GPyTorchPosterior``, unless a transform makes something else of it.

        Raises:
            TypeError: ``X`` is not a floating-point tensor.
            ValueError: shapes that do not fit, or another output.
        """
        if output_indices is not None and list(output_indices) not in _THE_ONE_OUTPUT:
            raise ValueError(f"output_indices: expected None or [0], this model has one output; got {output_indices}.")
        check_floating("X", X)
        if X.dim() < 2:
            raise ValueError(f"X: expected shape (*b, q, d), got {tuple(X.shape)}.")
        self._check_columns(X)
        try:
            torch.broadcast_shapes(X.shape[:-2], self.batch_shape)
        except RuntimeError:
            got, expected = tuple(X.shape), tuple(self.batch_shape)
            raise ValueError(f"X: shape {got} does not broadcast with models of batch shape {expected}.") from None
        self.eval()
        x = self.transform_inputs(X)
        f = self._predict(x)
        if observation_noise is not False:
            f = self._noisy(f, observation_noise)
        posterior: Posterior = GPyTorchPosterior(distribution=f)
        if hasattr(self, "outcome_transform"):
            posterior = self.outcome_transform.untransform_posterior(posterior, X=X)
        if posterior_transform is not None:
            return posterior_transform(posterior=posterior, X=X)
        return posterior

    def forward(self, X: Tensor) -> MultivariateNormal:
        """The prior at ``X`` in training mode, which a marginal likelihood asks for; otherwise f given the past.

        Args:
            X: ``(*b, n, d)``, before the input transform in training mode and after it otherwise, as in BoTorch.
        """
        if self.training:
            return self.model.forward(self.transform_inputs(X))
        return self.model(X)

    def subset_output(self, idcs: list[int]) -> StreamingSingleTaskGP:
        """A copy, if the one output is asked for."""
        if list(idcs) not in _THE_ONE_OUTPUT:
            raise NotImplementedError(f"idcs: this model has one output; expected [0], got {idcs}.")
        return copy.deepcopy(self)

    def custom_fit(
        self,
        mll: ExactMarginalLogLikelihood,
        closure: Any = None,
        closure_kwargs: dict[str, Any] | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ExactMarginalLogLikelihood:
        """What ``fit_gpytorch_mll`` calls: hyperparameters by exact marginal likelihood of the window.

        BoTorch's own optimiser, with its priors and retries, fits a ``SingleTaskGP`` on the window that has this
        model's kernel, mean and likelihood. Then the belief passes to the new values: learnt anew from the window while
        that still holds all that was seen, otherwise carried over.

        Args:
            mll: ``ExactMarginalLogLikelihood(model.likelihood, model)``.
            closure: not supported.
            closure_kwargs: not supported.
            optimizer_kwargs: of ``fit_gpytorch_mll``.
            kwargs: of ``fit_gpytorch_mll``.

        Returns:
            ``mll``, in evaluation mode.

        Raises:
            TypeError: another objective.
            ValueError: the window is empty, or this is a batch of fantasies.
        """
        if not isinstance(mll, ExactMarginalLogLikelihood):
            raise TypeError(f"mll: expected ExactMarginalLogLikelihood, got {type(mll).__name__}.")
        if closure is not None or closure_kwargs is not None:
            raise ValueError("closure: the window decides what is fitted; expected None.")
        if self.batch_shape:
            raise ValueError(f"mll: a batch of models {tuple(self.batch_shape)} is not fitted; fit the model it is of.")
        if len(self._window_X) == 0:
            raise ValueError(f"mll: no observations in a window of {self.warmup_size} to fit hyperparameters to.")
        x, y, noise = self._window()
        with settings.validate_input_scaling(False):
            window = SingleTaskGP(
                x,
                y,
                noise,
                likelihood=None if self._known_noise else self.likelihood,
                covar_module=self.covar_module,
                mean_module=self.mean_module,
                outcome_transform=None,
            )
        exact = ExactMarginalLogLikelihood(window.likelihood, window)
        with torch.enable_grad():
            fit_gpytorch_mll(exact, optimizer_kwargs=optimizer_kwargs, **kwargs)
        self._follow_hyperparameters()
        return mll.eval()

    @torch.no_grad()
    def _follow_hyperparameters(self) -> None:
        stream, strategy = self.model, self.model.variational_strategy
        if len(self._window_X) < stream.num_observations:
            stream._replace(stream.features, strategy.current_state())
            return
        before = stream._snapshot()
        features = copy.deepcopy(self._features_to_begin_with())
        try:
            stream._replace(features, strategy.basis_of(features), 0.0)
            stream._begun = False
            x, y, noise = self._window()
            stream.update(x, y.squeeze(-1), None if noise is None else noise.squeeze(-1))
        except BaseException:
            stream._restore(before)
            raise
        self._followed = (stream.features,)

    def _features_to_begin_with(self) -> InducingFeatures:
        """Where a belief is built anew: before all data that were followed, and after what it was rebased on."""
        if self._followed[0] is not self.features:
            self._first_features = copy.deepcopy(self.features)
            self._followed = (self.features,)
            self._buffers["_unit_columns"] = torch.zeros_like(self._unit_columns)
        return self._first_features

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, keep_transforms: bool = False, assign: bool = False
    ) -> Any:
        """Load a state, of whatever size its features and its window have.

        Args:
            state_dict: what ``state_dict()`` gave.
            strict: as in torch.
            keep_transforms: of no effect: there are no training data whose units could change.
            assign: as in torch.

        Raises:
            ValueError: this is a batch of fantasies, whose hyperparameters are those of another model.
        """
        return nn.Module.load_state_dict(self, state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.batch_shape:
            got = tuple(self.batch_shape)
            raise ValueError(f"state_dict: a batch of models {got} is not loaded into; load the model it is of.")
        self._followed = (self.features,)
        for name in (*_WINDOW, "_mean_noise", "_unit_columns"):
            saved, buffer = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if isinstance(saved, Tensor) and buffer is not None:
                # New ones, because models that were conditioned share the old ones.
                self._buffers[name] = buffer.new_empty(saved.shape)
        gpytorch.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
        if self._mean_noise is not None:
            self._set_mean_noise(self._mean_noise)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._features_to_begin_with()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own, which the factor would not be found by.
        return self.__dict__ | {"_factor": None}

    def _set_transformed_inputs(self) -> None:
        """Nothing: no training inputs are predicted from."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing, as above."""

    def _check_columns(self, X: Tensor) -> None:
        if X.shape[-1] != self._window_X.shape[-1]:
            raise ValueError(f"X: expected {self._window_X.shape[-1]} input columns, got shape {tuple(X.shape)}.")

    def _outcomes(self, Y: Tensor, Yvar: Tensor | None, X: Tensor) -> tuple[Tensor, Tensor | None]:
        if not hasattr(self, "outcome_transform"):
            return Y, Yvar
        # Even log(Y) must not turn a bad target into silence.
        y, noise = self.outcome_transform(Y, Yvar, X)
        return y, noise

    def _remember(self, X: Tensor, y: Tensor, noise: Tensor | None) -> None:
        for name, new in zip(_WINDOW, (X, y, noise), strict=True):
            if new is not None:
                joint = torch.cat([getattr(self, name), new.detach().to(getattr(self, name))])
                self._buffers[name] = joint[max(len(joint) - self.warmup_size, 0) :].clone()

    def _window(self) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            x = _preprocess(getattr(self, "input_transform", None), self._window_X)
        return x, self._window_Y, self._window_Yvar

    def _set_mean_noise(self, noise: Tensor) -> None:
        self._buffers["_mean_noise"] = noise
        self.likelihood.noise_covar.noise = noise

    def _predict(self, x: Tensor) -> MultivariateNormal:
        """As ``self.model(x)``, with a dense covariance, which is made once for all fantasies that share it."""
        strategy, size = self.model.variational_strategy, x.shape[-2]
        batch = torch.broadcast_shapes(x.shape[:-2], self.batch_shape)
        prior = strategy.prior
        if batch.numel() * size**2 > LARGEST_DENSE or prior.embedding is not None:
            return self.model(x)
        state = strategy.current_state()
        A = online.whiten(state, prior, x)
        scale_tril = self._scale_tril(state)
        spread = scale_tril.mT @ A
        mean = prior.mean_at(x) + (state.r.unsqueeze(-2) @ (scale_tril @ spread)).squeeze(-2)
        covariance = prior.covariance(x.double(), x.double()) + spread.mT @ spread - A.mT @ A
        mean, covariance = mean.expand(*batch, size), covariance.expand(*batch, size, size)
        return MultivariateNormal(mean.to(x.dtype), to_linear_operator(covariance.to(x.dtype)))

    def _scale_tril(self, state: OnlineState) -> Tensor:
        """Factor of the posterior covariance of the features, which changes when the model learns and not before."""
        if self._factor is not None and self._factor[0] is state.G:
            return self._factor[1]
        # Fantasies differ in r only: their common factor is not repeated for each of them.
        common = replace(state, r=torch.zeros_like(state.G[..., 0]))
        if state.G.requires_grad:
            return online.posterior(common)[1]
        with torch.inference_mode(False), torch.no_grad():
            self._factor = state.G, online.posterior(common)[1]
        return self._factor[1]

    def _noisy(self, f: MultivariateNormal, noise: bool | Tensor) -> MultivariateNormal:
        if isinstance(noise, Tensor):
            if noise.dim() < 2 or noise.shape[-1] != 1:
                raise ValueError(f"observation_noise: expected shape (*b, q, 1), got {tuple(noise.shape)}.")
            variance = noise.squeeze(-1)
        else:
            variance = self.likelihood.noise
        try:
            variance = variance.to(f.mean).expand(torch.broadcast_shapes(variance.shape, f.mean.shape))
        except RuntimeError:
            got, expected = tuple(variance.shape), tuple(f.mean.shape)
            raise ValueError(f"observation_noise: {got} does not broadcast with {expected}.") from None
        covariance = f.lazy_covariance_matrix.add_diagonal(variance)
        return MultivariateNormal(f.mean.expand(variance.shape), covariance)


def _check_data(X: Tensor, Y: Tensor, Yvar: Tensor | None, conditioning: bool = False) -> None:
    noise = "noise" if conditioning else "Yvar"
    for name, value in (("X", X), ("Y", Y)) if Yvar is None else (("X", X), ("Y", Y), (noise, Yvar)):
        check_floating(name, value)
        if value.dim() < 2:
            raise ValueError(f"{name}: expected at least two dimensions, got shape {tuple(value.shape)}.")
    if Y.shape[-1] != 1:
        raise ValueError(f"Y: expected one output column (ModelListGP for more), got shape {tuple(Y.shape)}.")
    if Y.shape[-2] != X.shape[-2]:
        raise ValueError(f"Y: expected {X.shape[-2]} rows for X of shape {tuple(X.shape)}, got {tuple(Y.shape)}.")
    if Yvar is not None and (Yvar.shape[-1] != 1 if conditioning else Yvar.shape != Y.shape):
        raise ValueError(f"{noise}: expected variances for Y of shape {tuple(Y.shape)}, got {tuple(Yvar.shape)}.")


def _preprocess(transform: InputTransform | None, X: Tensor) -> Tensor:
    return X if transform is None else transform.preprocess_transform(X)
