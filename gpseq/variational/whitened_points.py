"""What the strategies of sparse-GP attention share: points with a whitened q, asked of the model's own prior."""

from __future__ import annotations

from typing import Any, NamedTuple

import gpytorch
import torch
from gpytorch.distributions import Delta, Distribution, MultivariateNormal
from gpytorch.models import ApproximateGP
from gpytorch.variational._variational_distribution import _VariationalDistribution
from gpytorch.variational._variational_strategy import _VariationalStrategy
from linear_operator import LinearOperator, to_dense
from linear_operator.operators import DiagLinearOperator, MatmulLinearOperator, SumLinearOperator
from torch import Tensor

from gpseq.checks import check_floating, check_jitter
from gpseq.features.base import as_inputs
from gpseq.precision import in_float64
from gpseq.variational.cast import CastLinearOperator
from gpseq.variational.interdomain import _scale_tril
from gpseq.variational.lazy import promote


class Blocks(NamedTuple):
    """Parts of one joint prior over inducing points g, mean points a and inputs x, in float64.

    Attributes:
        gram: ``(*batch, M, M)``, between inducing points.
        cross: ``(*batch, M, N + n)``, of inducing points with mean points and inputs.
        between: ``(*batch, n, N)``, of inputs with mean points; ``None`` without mean points.
        mean: ``(*batch, n)``, prior mean at the inputs.
        covariance: of the inputs, lazy; or dense, ``(*batch, n, n)``; or its diagonal, ``(*batch, n)``.
    """

    gram: Tensor
    cross: Tensor
    between: Tensor | None
    mean: Tensor
    covariance: Tensor | LinearOperator


def prior_blocks(
    model: Any, points: Tensor, mean_points: Tensor | None, x: Tensor, covariance: str, kwargs: dict[str, Any]
) -> Blocks:
    """Ask a model's own prior once at inducing points, mean points and inputs.

    Args:
        model: asked as ``model.forward(inputs, **kwargs)``.
        points: ``(*batch, M, d)``.
        mean_points: ``(*batch, N, d)``, or ``None``.
        x: ``(*batch, n, d)``.
        covariance: which form that of the inputs has: ``"lazy"``, ``"dense"`` or ``"diagonal"``.
        kwargs: handed to ``forward``.

    Returns:
        The blocks; those of inducing points are dense.
    """
    groups = [points, x] if mean_points is None else [points, mean_points, x]
    batch = torch.broadcast_shapes(*(group.shape[:-2] for group in groups))
    inputs = torch.cat([group.double().expand(*batch, -1, -1) for group in groups], dim=-2)
    start, end = points.shape[-2], inputs.shape[-2] - x.shape[-2]

    def blocks(inputs: Tensor) -> Blocks:
        prior = model.forward(inputs, **kwargs)
        joint = prior.lazy_covariance_matrix
        # Rectangular on purpose, here and below: a square block may be factored on the way, see `features.base.dense`.
        own = to_dense(joint[..., end:, :])[..., end:].double() if covariance == "dense" else joint[..., end:, end:]
        if covariance == "diagonal":
            own = own.diagonal(dim1=-1, dim2=-2).double()
        elif covariance == "lazy":
            own = promote(own)
        gram, cross = to_dense(joint[..., :start, :]).tensor_split((start,), dim=-1)
        between = None
        if mean_points is not None:
            extra = 1 if mean_points.shape[-2] != x.shape[-2] + 1 else 2
            between = to_dense(joint[..., start:end, end - extra :])[..., extra:].mT.double()
        return Blocks(gram.double(), cross.double(), between, prior.mean[..., end:].double(), own)

    result = in_float64(blocks, (model,), inputs)
    return result._replace(gram=0.5 * (result.gram + result.gram.mT))


def matvec(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``matrix @ v`` for each vector, where a matrix that serves all vectors of the last batch dimension is not copied.

    Args:
        matrix: ``(*batch, n, m)``.
        vectors: ``(*batch, m)``; the batch shapes broadcast.

    Returns:
        ``(*batch, n)``.
    """
    if vectors.dim() == 1:
        return matrix @ vectors
    if matrix.dim() > 2 and matrix.shape[-3] != 1:
        return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)
    return ((matrix.squeeze(-3) if matrix.dim() > 2 else matrix) @ vectors.mT).mT


def check_finite(name: str, values: Tensor) -> Tensor:
    """Values without NaN or infinity.

    Raises:
        ValueError: there are some.
    """
    if not values.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in shape {tuple(values.shape)}.")
    return values


def check_points(name: str, points: Any, columns: int | None = None) -> Tensor:
    """Points with a column axis, at least one.

    Args:
        name: of the argument.
        points: what came; ``(*batch, n, d)``, or ``(n,)`` for one column.
        columns: d; ``None`` takes any.

    Returns:
        ``(*batch, n, d)``.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: no points, or another number of columns.
    """
    rows = check_floating(name, points)
    rows = rows.unsqueeze(-1) if rows.dim() == 1 else rows
    if rows.dim() < 2 or rows.shape[-2] == 0 or rows.shape[-1] != (columns or rows.shape[-1]):
        expected = "(*batch, n, d)" if columns is None else f"(*batch, n, {columns})"
        raise ValueError(f"{name}: expected at least one point, {expected}, got shape {tuple(points.shape)}.")
    return rows


def check_coefficients(name: str, values: Any, size: int) -> Tensor:
    """One number a point.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another number of them.
    """
    check_floating(name, values)
    if values.dim() == 0 or values.shape[-1] != size:
        raise ValueError(f"{name}: expected (*batch, {size}), one a point, got shape {tuple(values.shape)}.")
    return values


def check_mask(name: str, mask: Any, size: int) -> Tensor:
    """A boolean mask over points, True where a point is ignored.

    Raises:
        TypeError: no boolean tensor.
        ValueError: of another size.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a boolean tensor, True = ignore, got {got}.")
    if mask.dim() == 0 or mask.shape[-1] != size:
        raise ValueError(f"{name}: expected (*batch, {size}), one a point, got shape {tuple(mask.shape)}.")
    return mask


def check_batches(**shapes: torch.Size) -> None:
    """Batch shapes that broadcast.

    Raises:
        ValueError: they do not; the message names all.
    """
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"{next(iter(shapes))}: expected batch shapes that broadcast, got {listed}.") from None


def without_masked(points: Tensor, mask: Tensor, legal: Tensor) -> Tensor:
    """Points with a legal one in place of those that a mask takes out: padding may hold anything, NaN included.

    Args:
        points: ``(*batch, n, d)``.
        mask: ``(*batch, n)``. Where it has a batch shape that the points lack, they serve unmasked rows too and stay.
        legal: ``(d,)``.

    Returns:
        ``(*batch, n, d)``.
    """
    if torch.broadcast_shapes(mask.shape, points.shape[:-1]) != points.shape[:-1]:
        return points
    return torch.where(mask.unsqueeze(-1), legal.detach().to(points.dtype), points)


class WhitenedPointsStrategy(_VariationalStrategy):
    """What the strategies of sparse-GP attention share: inducing points, a whitened q, float64 algebra, no caches.

    Args:
        model: the GP, usually ``self``.
        inducing_points: ``(*batch, M, d)``.
        variational_distribution: q(v), over M numbers.
        learn_inducing_locations: whether the inducing points are a parameter or a buffer.
        jitter: relative jitter of the factorisation, see :func:`gpseq.linalg.cholesky`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no inducing points, sizes that differ, or a jitter that is none.
    """

    # Set by object.__setattr__, so that the owner does not become a submodule.
    model: Any
    inducing_points: Tensor

    def __init__(
        self,
        model: ApproximateGP,
        inducing_points: Tensor,
        variational_distribution: _VariationalDistribution,
        learn_inducing_locations: bool = True,
        jitter: float | None = None,
    ) -> None:
        # The base's constructor would take any tensor; the arguments are checked before anything is set.
        points = check_finite("inducing_points", check_points("inducing_points", inducing_points)).detach().clone()
        if not isinstance(variational_distribution, _VariationalDistribution):
            got = type(variational_distribution).__name__
            raise TypeError(f"variational_distribution: expected a GPyTorch variational distribution, got {got}.")
        if variational_distribution.shape()[-1] != points.shape[-2]:
            raise ValueError(
                f"variational_distribution: expected one over {points.shape[-2]} numbers, as there are inducing points,"
                f" got {variational_distribution.shape()[-1]}."
            )
        if not isinstance(learn_inducing_locations, bool):
            raise TypeError(f"learn_inducing_locations: expected True or False, got {learn_inducing_locations!r}.")
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model: expected a GPyTorch model, got {type(model).__name__}.")
        jitter = check_jitter(jitter)
        gpytorch.Module.__init__(self)
        object.__setattr__(self, "model", model)
        self._keep("inducing_points", points, learn_inducing_locations)
        self._jitter_val = jitter
        self._variational_distribution = variational_distribution
        self.register_buffer("variational_params_initialized", torch.tensor(0))
        # The buffer is what state_dict carries; reading it costs a device sync, so a Python flag stands beside it.
        self._initialized = False
        # Arguments of the last call, not what was computed from them: a divergence is made anew when it is asked for.
        self._last: dict[str, Any] | None = None
        # Outlives what was remembered: a divergence without those arguments would be another one.
        self._brought = False

    def _keep(self, name: str, value: Tensor, learn: bool) -> None:
        if learn:
            self.register_parameter(name, torch.nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def jitter_val(self) -> float | None:
        """Relative jitter that was asked for; ``None`` means the default of float64."""
        return self._jitter_val

    @property
    def prior_distribution(self) -> MultivariateNormal:
        """Prior of the whitened inducing vector, N(0, I), in the shape of the variational distribution."""
        q = self._variational_distribution
        zeros = torch.zeros(q.shape(), dtype=q.dtype, device=q.device)
        return MultivariateNormal(zeros, DiagLinearOperator(torch.ones_like(zeros)))

    @property
    def variational_distribution(self) -> Distribution:
        """The whitened q, made anew at each access."""
        with torch.autocast(self.variational_params_initialized.device.type, enabled=False):
            return self._variational_distribution()

    def _moments(self) -> tuple[Tensor, Tensor | None]:
        """Mean and lower covariance factor of the whitened q, float64; no factor for a point mass."""
        self._initialize()
        q = self.variational_distribution
        if isinstance(q, Delta):
            return q.mean.double(), None
        if not isinstance(q, MultivariateNormal):
            raise TypeError(f"variational_distribution: expected a Gaussian or a delta, got {type(q).__name__}.")
        return q.mean.double(), _scale_tril(q)

    def _check_call(self, x: Any) -> Tensor:
        columns = self.inducing_points.shape[-1]
        x = check_finite("x", check_points("x", x, columns))
        batch = self._variational_distribution.batch_shape
        check_batches(x=x.shape[:-2], inducing_points=self.inducing_points.shape[:-2], variational_distribution=batch)
        return x

    def _prior(self, x: Any, **kwargs: Any) -> MultivariateNormal:
        return self.model.forward(as_inputs(check_floating("x", x)), **kwargs)

    def _posterior(
        self,
        mean: Tensor,
        covariance: Tensor | LinearOperator,
        A: Tensor,
        scale_tril: Tensor | None,
        dtype: torch.dtype,
    ) -> MultivariateNormal:
        """N(mean, covariance - A' (I - S) A) in the dtype of the inputs; a tensor is taken for a diagonal."""
        middle = -A if scale_tril is None else scale_tril @ (scale_tril.mT @ A) - A
        if isinstance(covariance, Tensor):
            variance = covariance + (A * middle).sum(-2)
            mean, variance = torch.broadcast_tensors(mean, variance)
            return MultivariateNormal(mean.to(dtype), DiagLinearOperator(variance.to(dtype)))
        # Lazy on purpose: a caller who asks for variances only never pays for n x n numbers.
        covariance = SumLinearOperator(covariance, MatmulLinearOperator(A.mT, middle))
        if covariance.batch_shape != mean.shape[:-1]:
            batch = torch.broadcast_shapes(covariance.batch_shape, mean.shape[:-1])
            covariance, mean = covariance.expand(*batch, *covariance.shape[-2:]), mean.expand(*batch, -1)
        if dtype != torch.float64:
            covariance = CastLinearOperator(covariance, dtype=dtype)
        return MultivariateNormal(mean.to(dtype), covariance)

    def _initialize(self) -> None:
        if self._initialized:
            return
        if not self.variational_params_initialized.item():
            self._variational_distribution.initialize_variational_distribution(self.prior_distribution)
            self.variational_params_initialized.fill_(1)
        self._initialized = True

    def _remember(self, brought: bool, **arguments: Any) -> None:
        """Keep the arguments of a call.

        Args:
            brought: whether the divergence depends on them.
            arguments: what they are.
        """
        self._last, self._brought = arguments, brought

    def _check_remembered(self) -> None:
        """Refuse a divergence that hangs on arguments that are forgotten.

        Raises:
            RuntimeError: the last call brought some, and they are forgotten.
        """
        if self._last is None and self._brought:
            raise RuntimeError(
                "kl_divergence: the last call brought arguments of its own, and they are forgotten since a train(), a "
                "change to eval mode, a copy or a load; call the model again first."
            )

    def _clear_cache(self) -> None:
        super()._clear_cache()
        self._last = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # What GPyTorch's whitened strategy writes beside the parameters: that they are whitened, as they are here.
        if bool(state_dict.get(f"{prefix}updated_strategy", False)):
            del state_dict[f"{prefix}updated_strategy"]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._initialized = False
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        # Arguments of a call may hang on a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "_last": None}
