"""Sparse variational GPs whose inducing variables are features, for ordinary GPyTorch models."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
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
    RootLinearOperator,
    SumLinearOperator,
    TriangularLinearOperator,
)
from torch import Tensor

from gpseq.checks import check_floating, check_inputs, check_jitter
from gpseq.features.base import InducingFeatures, as_inputs, project
from gpseq.linalg import cholesky, gaussian_kl, moments_to_natural
from gpseq.precision import in_float64
from gpseq.variational import online, sites
from gpseq.variational.belief import Belief
from gpseq.variational.cast import CastLinearOperator
from gpseq.variational.lazy import promote
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import ModelPrior


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
    past: Belief | None

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
        # What earlier chunks taught, once there is such a thing: see `advance`.
        self.register_module("past", None)
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
        r"""KL divergence from q(v) to its prior, ``(*batch)``, in nats, by dense factors at every size.

        GPyTorch's own switches to stochastic estimates above 800 inducing variables. After :meth:`advance` the old
        posterior stands in as a likelihood of the old features a, and the old prior is taken out,

        .. math::
            \mathrm{KL}[q(b) \,\|\, p(b)] + \mathrm{KL}[\tilde q(a) \,\|\, q_{old}(a)]
            - \mathrm{KL}[\tilde q(a) \,\|\, p_{old}(a)], \qquad \tilde q(a) = \int p(a \mid b)\, q(b)\, db ,

        which can be negative. ``VariationalELBO`` with the size of the chunk as ``num_data`` is then the online bound
        of the chunk, for any likelihood.
        """
        self._initialize()
        q = self.variational_distribution
        if isinstance(q, Delta):
            return -torch.distributions.Normal(0.0, 1.0).log_prob(q.mean).sum(-1)
        mean, scale_tril = q.mean.double(), _scale_tril(q)
        if self.past is None:
            return gaussian_kl(mean, scale_tril).to(q.mean.dtype)
        prior = ModelPrior(self.model, embedding=self.features.embedding)
        basis = online.initial_state(self.features, prior, self._jitter_val)
        past = online.transfer(self.past.state, basis, prior)
        return -sites.past_bound(past, mean, scale_tril).to(q.mean.dtype)

    def advance(self, features: InducingFeatures | None = None, transfer: str | None = None) -> None:
        """Close a chunk: what q(v) says now becomes the past, and the data behind it are not needed any more.

        From then on :meth:`kl_divergence` carries the past, under whatever hyperparameters the model moves to, and q
        goes on from there: on other features it starts as the marginal of the old posterior on them. Features that
        move with the data (``with_horizon``, ``following``) are handed in here; their number cannot change, because
        optimisers hold on to the parameters of q.

        Args:
            features: what u is for the next chunk; ``None`` keeps the present ones.
            transfer: how the past meets other features: ``"vfe"`` keeps it as a likelihood of the old ones, ``"adf"``
                as one of the new ones by matching moments. ``None`` means ``"vfe"``, or ``"adf"`` for features that
                forget by design.

        Raises:
            TypeError: ``features`` is something else, or q is a point mass, which leaves nothing to remember.
            ValueError: features of another number or of other inputs, or an unknown transfer.

        Source:
            Bui, Nguyen and Turner (2017), Streaming sparse Gaussian process approximations.
        """
        if transfer is not None and transfer not in online.TRANSFERS:
            raise ValueError(f"transfer: expected one of {online.TRANSFERS} or None, got {transfer!r}.")
        if features is not None:
            self._check_next(features)
        with torch.inference_mode(False), torch.no_grad():
            self._initialize()
            q = self.variational_distribution
            if not isinstance(q, MultivariateNormal):
                raise TypeError(f"variational distribution: expected a Gaussian, got {type(q).__name__}.")
            prior = ModelPrior(self.model, embedding=self.features.embedding)
            basis = online.initial_state(self.features, prior, self._jitter_val)
            mean, scale_tril = q.mean.double(), _scale_tril(q)
            past = _past(basis, mean, scale_tril)
            if features is not None:
                features = copy.deepcopy(features).to(mean.device)
                basis = online.initial_state(features, prior, self._jitter_val)
                B = prior.between(basis.whitened_weights, basis.nodes, past.whitened_weights, past.nodes)
                mean, scale_tril = online.marginal(mean, scale_tril, B)
                if (transfer or ("adf" if features.forgets else "vfe")) == "adf":
                    past = _past(basis, mean, scale_tril)
                self._set_q(mean, scale_tril)
                self.features = features
            self.past = Belief(past)

    def _check_next(self, features: InducingFeatures) -> None:
        if not isinstance(features, InducingFeatures):
            raise TypeError(f"features: expected InducingFeatures, got {type(features).__name__}.")
        if features.num_features != self.features.num_features:
            raise ValueError(
                f"features: expected {self.features.num_features}, as before, got {features.num_features}; StreamingGP "
                "can change their number."
            )
        if features.num_dims != self.features.num_dims:
            raise ValueError(f"features: expected {self.features.num_dims} input columns, got {features.num_dims}.")
        self.features.check_embedding(features)
        now, then = features.nodes().shape[:-2], self.features.nodes().shape[:-2]
        if now != then:
            raise ValueError(f"features: expected nodes of batch shape {tuple(then)}, got {tuple(now)}.")

    def _set_q(self, mean: Tensor, scale_tril: Tensor) -> None:
        q = self._variational_distribution
        root = TriangularLinearOperator(scale_tril.to(q.dtype))
        noise, q.mean_init_std = q.mean_init_std, 0.0
        try:
            # Some distributions start from standard deviations, which GPyTorch would round up.
            with gpytorch.settings.min_variance(0.0, 0.0, 0.0):
                q.initialize_variational_distribution(MultivariateNormal(mean.to(q.dtype), CholLinearOperator(root)))
        finally:
            q.mean_init_std = noise

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
        x = check_inputs(x, self.features.num_dims)
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
        weights = self.features.weights()
        embedding = self.features.embedding
        if embedding is not None:
            kernel = getattr(self.model, "covar_module", None)
            if kernel is not None and not embedding.belongs_to(kernel):
                raise ValueError(
                    "covar_module: expected the kernel that the random features were drawn for, with the values that "
                    "it had then; they are frozen with it."
                )
            mean = in_float64(lambda a: self.model.forward(a, **kwargs).mean, (self.model,), x.double())
            features = embedding(x)
            kff = features.square().sum(-1) if diagonal else RootLinearOperator(features)
            factor, _ = cholesky(to_dense(weights @ weights.mT), self._jitter_val)
            A = torch.linalg.solve_triangular(factor, weights @ features.mT, upper=False)
            return mean.double(), kff, A, self.variational_distribution
        nodes = self.features.nodes()
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if not any(key.startswith(f"{prefix}past.") for key in state_dict):
            self.past = None
        elif self.past is None:
            # What is loaded brings its own shapes; any state will do.
            blank = torch.zeros(1, dtype=torch.float64, device=self.variational_params_initialized.device)
            self.past = Belief(OnlineState(*(blank.clone() for _ in fields(OnlineState))))
            self.past.count = blank.long()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._initialized = False


def _past(basis: OnlineState, mean: Tensor, scale_tril: Tensor) -> OnlineState:
    """q(v) = N(mean, S) on a basis as a factor over the prior, with an evidence of zero: the bound starts anew."""
    r, precision = moments_to_natural(mean, scale_tril)
    G = precision - torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    state = replace(basis, G=G, r=r, c=torch.zeros_like(r[..., 0]), nodes=basis.nodes.clone())
    return replace(state, c=-online.log_evidence(state)).detach()


def _scale_tril(q: MultivariateNormal) -> Tensor:
    """Lower covariance factor of q in float64, without factoring where the factor is at hand."""
    covariance = q.lazy_covariance_matrix
    if isinstance(covariance, CholLinearOperator):
        return covariance.root.to_dense().double()
    if isinstance(covariance, DiagLinearOperator):
        return covariance.diagonal(dim1=-1, dim2=-2).double().sqrt().diag_embed()
    return cholesky(covariance.to_dense().double(), jitter=0.0)[0]
