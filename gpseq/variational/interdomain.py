"""Sparse variational GPs whose inducing variables are features, for ordinary GPyTorch models."""

from __future__ import annotations

from typing import Any

import gpytorch
import torch
from gpytorch.distributions import Delta, Distribution, MultivariateNormal
from gpytorch.models import ApproximateGP
from gpytorch.variational._variational_distribution import _VariationalDistribution
from gpytorch.variational._variational_strategy import _VariationalStrategy
from linear_operator import to_dense
from linear_operator.operators import (
    CholLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from gpseq.checks import check_floating, check_inputs, check_jitter
from gpseq.features.base import InducingFeatures, as_inputs, project
from gpseq.linalg import cholesky, gaussian_kl
from gpseq.precision import in_float64
from gpseq.variational.cast import CastLinearOperator
from gpseq.variational.lazy import promote


class InterdomainVariationalStrategy(_VariationalStrategy):
    r"""Whitened sparse variational inference with interdomain features.

    With :math:`u = W f(z)` (on f minus its mean), :math:`L L^\top = K_{uu} + \epsilon I`, :math:`A = L^{-1} K_{uf}` and
    :math:`q(v) = N(m, S)` for the whitened :math:`v = L^{-1} u`,

    .. math::
        q(f(x)) = N\big(\mu(x) + A^\top m,\; K_{ff} - A^\top (I - S) A\big), \qquad
        \mathrm{KL}[q(v) \,\|\, N(0, I)] .

    All covariances come from the model's own prior, ``model.forward(cat[z, x])``, so custom forwards, deep kernels and
    any mean work. The algebra is done in float64 and the result has the dtype of the inputs. Nothing is cached:
    hyperparameters changed in eval mode take effect at once, and ``backward`` may be called twice.

    Use it where the GPyTorch documentation uses ``VariationalStrategy``; ``VariationalELBO``, the independent
    multitask and LMC wrappers, and all variational distributions of GPyTorch with a Gaussian or delta q(u) work.
    As there, in training mode with ``diag=True`` only the diagonal of the covariance is meaningful.

    Args:
        model: the GP, usually ``self``.
        features: what u is, M features.
        variational_distribution: q(v), over M numbers.
        jitter: relative jitter of the factorisation, see :func:`gpseq.linalg.cholesky`.

    Raises:
        TypeError: ``features`` or ``variational_distribution`` is something else.
        ValueError: their sizes differ, or ``jitter`` is negative.

    Source:
        Lazaro-Gredilla and Figueiras-Vidal (2009), Inter-domain Gaussian processes; Hensman et al. (2015).

    Example:
        >>> import gpseq
        >>> class Model(ApproximateGP):
        ...     def __init__(self, features):
        ...         q = gpytorch.variational.CholeskyVariationalDistribution(features.num_features)
        ...         super().__init__(InterdomainVariationalStrategy(self, features, q))
        ...         self.mean_module = gpytorch.means.ConstantMean()
        ...         self.covar_module = gpytorch.kernels.RBFKernel()
        ...
        ...     def forward(self, x):
        ...         return MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> model = Model(gpseq.features.HippoFeatures(8, horizon=5.0))
        >>> model(torch.linspace(0, 5, 7)).mean.shape
        torch.Size([7])
    """

    # Set by object.__setattr__, so that the owner does not become a submodule.
    model: Any

    def __init__(
        self,
        model: ApproximateGP,
        features: InducingFeatures,
        variational_distribution: _VariationalDistribution,
        jitter: float | None = None,
    ) -> None:
        # The base's constructor wants inducing points, which features do not have.
        gpytorch.Module.__init__(self)
        if not isinstance(features, InducingFeatures):
            raise TypeError(f"features: expected InducingFeatures, got {type(features).__name__}.")
        if not isinstance(variational_distribution, _VariationalDistribution):
            got = type(variational_distribution).__name__
            raise TypeError(f"variational_distribution: expected a GPyTorch variational distribution, got {got}.")
        if variational_distribution.shape()[-1] != features.num_features:
            raise ValueError(
                f"variational_distribution: expected one over num_features={features.num_features} numbers, got "
                f"{variational_distribution.shape()[-1]}."
            )
        jitter = check_jitter(jitter)
        # The model owns this strategy; a registered child would make a cycle.
        object.__setattr__(self, "model", model)
        self.features = features
        self._jitter_val = jitter
        self._variational_distribution = variational_distribution
        self.register_buffer("variational_params_initialized", torch.tensor(0))
        # The buffer is what state_dict carries; reading it costs a device sync, so a Python flag stands beside it.
        self._initialized = False

    @property
    def jitter_val(self) -> float | None:
        """Relative jitter that was asked for; ``None`` means the default of the algebra's dtype."""
        return self._jitter_val

    @property
    def inducing_points(self) -> Tensor:
        """The nodes of the features, ``(*batch, Q, d)``: what GPyTorch's wrappers read dtype and device from."""
        return self.features.nodes()

    @property
    def prior_distribution(self) -> MultivariateNormal:
        """Prior of the whitened inducing vector, N(0, I), in the shape of the variational distribution."""
        q = self._variational_distribution
        zeros = torch.zeros(q.shape(), dtype=q.dtype, device=q.device)
        return MultivariateNormal(zeros, DiagLinearOperator(torch.ones_like(zeros)))

    @property
    def variational_distribution(self) -> Distribution:
        """q(v), made anew at each access."""
        # Some distributions multiply matrices to make q, which autocast would do in half precision.
        with torch.autocast(self.variational_params_initialized.device.type, enabled=False):
            return self._variational_distribution()

    def kl_divergence(self) -> Tensor:
        """KL divergence from q(v) to its prior, ``(*batch)``, in nats, by dense factors at every size.

        GPyTorch's own switches to stochastic estimates above 800 inducing variables.
        """
        self._initialize()
        q = self.variational_distribution
        if isinstance(q, Delta):
            return -torch.distributions.Normal(0.0, 1.0).log_prob(q.mean).sum(-1)
        return gaussian_kl(q.mean.double(), _scale_tril(q)).to(q.mean.dtype)

    def __call__(self, x: Tensor, prior: bool = False, diag: bool = True, **kwargs: Any) -> MultivariateNormal:
        """Marginal of f at ``x`` under q (or under the prior).

        Args:
            x: inputs, ``(*batch, n, d)``, or ``(n,)``.
            prior: return the model's prior instead.
            diag: in training mode, leave out the off-diagonal covariances.
            kwargs: handed to the model's ``forward``.

        Returns:
            Distribution over ``(*batch, n)`` values, in the dtype of ``x``.
        """
        if prior:
            return self.model.forward(as_inputs(check_floating("x", x)), **kwargs)
        x = check_inputs(x, self.inducing_points.shape[-1])
        diagonal = diag and self.training
        mean, covariance, A, q = self._conditional(x, diagonal, **kwargs)
        if not isinstance(q, (MultivariateNormal, Delta)):
            raise TypeError(f"variational distribution: expected a Gaussian or a delta, got {type(q).__name__}.")
        mean = mean + (A.mT @ q.mean.double().unsqueeze(-1)).squeeze(-1)
        if isinstance(q, Delta):
            middle = -A
        else:
            scale_tril = _scale_tril(q)
            middle = scale_tril @ (scale_tril.mT @ A) - A  # (S - I) A
        if diagonal:
            variance = (covariance + (A * middle).sum(-2)).expand(mean.shape)
            return MultivariateNormal(mean.to(x.dtype), DiagLinearOperator(variance.to(x.dtype)))
        # Lazy on purpose: a caller who asks for variances only never pays for n x n numbers.
        covariance = SumLinearOperator(covariance, MatmulLinearOperator(A.mT, middle))
        if covariance.batch_shape != mean.shape[:-1]:
            batch = torch.broadcast_shapes(covariance.batch_shape, mean.shape[:-1])
            covariance, mean = covariance.expand(*batch, *covariance.shape[-2:]), mean.expand(*batch, -1)
        if x.dtype != torch.float64:
            covariance = CastLinearOperator(covariance, dtype=x.dtype)
        return MultivariateNormal(mean.to(x.dtype), covariance)

    def _conditional(
        self, x: Tensor, diagonal: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor | LinearOperator, Tensor, Distribution]:
        """Prior mean, prior covariance (its diagonal, or lazy), whitened features A, and q(v); float64 all but q."""
        self._initialize()
        nodes = self.features.nodes()
        weights = self.features.weights()
        num_nodes = nodes.shape[-2]
        batch = torch.broadcast_shapes(nodes.shape[:-2], x.shape[:-2])
        inputs = torch.cat([nodes.expand(*batch, -1, -1), x.double().expand(*batch, -1, -1)], dim=-2)

        def blocks(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | LinearOperator]:
            prior = self.model.forward(inputs, **kwargs)
            joint = prior.lazy_covariance_matrix
            kff = joint[..., num_nodes:, num_nodes:]
            kff = kff.diagonal(dim1=-1, dim2=-2) if diagonal else promote(kff)
            # One rectangular block for both: a square one might be factored on the way, see `dense`.
            kzz, kzf = to_dense(joint[..., :num_nodes, :]).tensor_split((num_nodes,), dim=-1)
            return prior.mean[..., num_nodes:], kzz, kzf, kff

        mean, kzz, kzf, kff = in_float64(blocks, (self.model,), inputs)
        kuu = project(weights, kzz.double(), weights)
        factor, _ = cholesky(0.5 * (kuu + kuu.mT), self._jitter_val)
        A = torch.linalg.solve_triangular(factor, project(weights, kzf.double()), upper=False)
        return mean.double(), kff, A, self.variational_distribution

    def _initialize(self) -> None:
        if self._initialized:
            return
        if not self.variational_params_initialized.item():
            self._variational_distribution.initialize_variational_distribution(self.prior_distribution)
            self.variational_params_initialized.fill_(1)
        self._initialized = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._initialized = False


def _scale_tril(q: MultivariateNormal) -> Tensor:
    """Lower covariance factor of q in float64, without factoring where the factor is at hand."""
    covariance = q.lazy_covariance_matrix
    if isinstance(covariance, CholLinearOperator):
        return covariance.root.to_dense().double()
    if isinstance(covariance, DiagLinearOperator):
        return covariance.diagonal(dim1=-1, dim2=-2).double().sqrt().diag_embed()
    return cholesky(covariance.to_dense().double(), jitter=0.0)[0]
