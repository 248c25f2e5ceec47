"""Decoupled sparse-GP attention as a GPyTorch strategy: many points for the mean, few for the covariance."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ApproximateGP
from gpytorch.variational._variational_distribution import _VariationalDistribution
from linear_operator import to_dense
from torch import Tensor

from gpseq.linalg import cholesky, gaussian_kl
from gpseq.variational.whitened_points import (
    WhitenedPointsStrategy,
    check_batches,
    check_coefficients,
    check_finite,
    check_mask,
    check_points,
    matvec,
    prior_blocks,
    without_masked,
)

#: How the mean is written, see :class:`DecoupledSGPAVariationalStrategy`.
FORMS = ("orthogonal", "cheng_boots")


class DecoupledSGPAVariationalStrategy(WhitenedPointsStrategy):
    r"""Decoupled sparse-GP attention: the mean has points of its own, for which no covariance is kept.

    With inducing points g (M of them), mean points a (N) with coefficients :math:`v_a`, :math:`L L^\top = K_{gg} +
    \epsilon I`, :math:`A = L^{-1} K_{gx}`, :math:`V_a = L^{-1} K_{ga} v_a`, the whitened variational distribution
    :math:`N(m, S)` and the prior conditional covariance :math:`C = k - k_{\cdot g} K_{gg}^{-1} k_{g \cdot}`,

    .. math::
        q(f(x)) = N\big(\mu(x) + C_{xa} v_a + A^\top m,\; K_{xx} - A^\top (I - S) A\big), \qquad
        \mathrm{KL} = \mathrm{KL}[N(m, S) \,\|\, N(0, I)] + \tfrac12 v_a^\top C_{aa} v_a .

    That is exactly an SVGP on the union of both sets of points, at :math:`O(M^3)` and products with N. In the form
    ``"cheng_boots"`` the mean is :math:`\mu(x) + K_{xa} v_a + A^\top m`, kernel attention for m = 0, and

    .. math::
        \mathrm{KL} = \mathrm{KL}[N(m, S) \,\|\, N(0, I)] + \tfrac12 v_a^\top K_{aa} v_a + m^\top V_a .

    For one set of mean points both are the same family; the orthogonal form is better conditioned.

    Mean points and their coefficients are parameters, or come with each call as ``mean_points=``,
    ``mean_coefficients=`` and ``mean_mask=`` (and may be the output of an encoder); all other keywords go to the
    model's ``forward``. Without either this is an ordinary SVGP. Coefficients of padded points are masked to exactly
    their removal.

    The prior is asked as ``model.forward(cat[inducing points, mean points, x])``, so custom forwards, deep kernels and
    any mean work, and u is f minus its mean. The algebra is in float64, the result has the dtype of the inputs, nothing
    is cached. As in GPyTorch, in training mode with ``diag=True`` only the diagonal of the covariance is meaningful.

    :meth:`kl_divergence` is that of the last call, which is remembered by its arguments, and forgotten by ``train()``,
    by the change to eval mode, by loading and by copying. The prior is asked again for it; where a ``forward`` draws at
    random or normalises over the batch it is that of another draw. Per-call points with a batch shape give one
    divergence for each of their posteriors, and nothing is summed. For several outputs wrap in
    ``gpseq.variational.IndependentMultitaskVariationalStrategy``; GPyTorch's own wrapper would leave out the mean
    points' part of the divergence.

    GPyTorch's ``OrthogonallyDecoupledVariationalStrategy`` (1.15) multiplies the coefficients by the covariance
    strategy's *posterior* covariance where the method has the prior conditional C. Its ``kl_divergence`` is then not
    the divergence of its own q, and its bound can exceed the log evidence; do not compare with it.

    Args:
        model: the GP, usually ``self``.
        inducing_points: points of the covariance, ``(*batch, M, d)``.
        variational_distribution: whitened q over M numbers, Gaussian or delta.
        mean_points: ``(*batch, N, d)``; ``None`` if they come with each call, or if there are none.
        mean_coefficients: ``(*batch, N)``, always a parameter; ``None`` starts from zeros.
        form: ``"orthogonal"`` or ``"cheng_boots"``.
        learn_inducing_locations: whether inducing points and mean points are parameters or buffers.
        jitter: relative jitter of the factorisation, see :func:`gpseq.linalg.cholesky`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no inducing points, sizes that differ, an unknown form, or a jitter that is none.

    Source:
        Chen and Li (2023), Calibrating Transformers via Sparse Gaussian Processes, section 3.2; Salimbeni et al.
        (2018), Orthogonally Decoupled Variational Gaussian Processes; Cheng and Boots (2017).

    Example:
        >>> import gpytorch
        >>> class Model(ApproximateGP):
        ...     def __init__(self, inducing_points, mean_points):
        ...         q = gpytorch.variational.CholeskyVariationalDistribution(len(inducing_points))
        ...         super().__init__(DecoupledSGPAVariationalStrategy(self, inducing_points, q, mean_points))
        ...         self.mean_module = gpytorch.means.ZeroMean()
        ...         self.covar_module = gpytorch.kernels.RBFKernel()
        ...
        ...     def forward(self, x):
        ...         return MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> model = Model(torch.linspace(0, 1, 3), torch.linspace(0, 1, 20))
        >>> model(torch.linspace(0, 1, 7)).mean.shape
        torch.Size([7])
        >>> model.variational_strategy.kl_amortised()
        tensor(0., grad_fn=<ToCopyBackward0>)
    """

    mean_points: Tensor | None
    mean_coefficients: Tensor | None

    def __init__(
        self,
        model: ApproximateGP,
        inducing_points: Tensor,
        variational_distribution: _VariationalDistribution,
        mean_points: Tensor | None = None,
        mean_coefficients: Tensor | None = None,
        form: str = "orthogonal",
        learn_inducing_locations: bool = True,
        jitter: float | None = None,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form: expected one of {FORMS}, got {form!r}.")
        super().__init__(model, inducing_points, variational_distribution, learn_inducing_locations, jitter)
        self.form = form
        if mean_points is None:
            if mean_coefficients is not None:
                raise ValueError("mean_points: expected the points of the given coefficients, got None.")
            self.register_parameter("mean_points", None)
            self.register_parameter("mean_coefficients", None)
            return
        points = check_finite("mean_points", check_points("mean_points", mean_points, self.inducing_points.shape[-1]))
        batch = variational_distribution.batch_shape
        if mean_coefficients is None:
            mean_coefficients = points.new_zeros(*batch, points.shape[-2])
        check_finite("mean_coefficients", check_coefficients("mean_coefficients", mean_coefficients, points.shape[-2]))
        check_batches(
            mean_points=points.shape[:-2],
            mean_coefficients=mean_coefficients.shape[:-1],
            inducing_points=self.inducing_points.shape[:-2],
            variational_distribution=batch,
        )
        self._keep("mean_points", points.detach().clone(), learn_inducing_locations)
        self._keep("mean_coefficients", mean_coefficients.detach().clone(), True)

    def __call__(
        self,
        x: Tensor,
        prior: bool = False,
        diag: bool = True,
        mean_points: Tensor | None = None,
        mean_coefficients: Tensor | None = None,
        mean_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MultivariateNormal:
        """Marginal of f at ``x`` under q (or under the prior).

        Args:
            x: inputs (queries), ``(*batch, n, d)``, or ``(n,)``.
            prior: return the model's prior instead.
            diag: in training mode, leave out the off-diagonal covariances.
            mean_points: those of this call, ``(*batch, N, d)``; ``None`` means the strategy's own.
            mean_coefficients: those of this call, ``(*batch, N)``; ``None`` means the strategy's own.
            mean_mask: True where a mean point is ignored, ``(*batch, N)``.
            kwargs: handed to the model's ``forward``.

        Returns:
            Distribution over ``(*batch, n)`` values, in the dtype of ``x``.

        Raises:
            TypeError: an argument of another kind.
            ValueError: shapes that do not fit, points without coefficients, or numbers that are not finite.
        """
        if prior:
            return self._prior(x, **kwargs)
        x = self._check_call(x)
        with torch.autocast(x.device.type, enabled=False):
            points, coefficients = self._mean_part(mean_points, mean_coefficients, mean_mask)
            if points is not None and coefficients is not None:
                check_batches(
                    mean_points=points.shape[:-2],
                    mean_coefficients=coefficients.shape[:-1],
                    x=x.shape[:-2],
                    inducing_points=self.inducing_points.shape[:-2],
                    variational_distribution=self._variational_distribution.batch_shape,
                )
            shift, scale_tril = self._moments()
            covariance = "diagonal" if diag and self.training else "lazy"
            blocks = prior_blocks(self.model, self.inducing_points, points, x, covariance, kwargs)
            factor, _ = cholesky(blocks.gram, self._jitter_val)
            A = torch.linalg.solve_triangular(factor, blocks.cross, upper=False)
            mean = blocks.mean
            if blocks.between is not None and points is not None and coefficients is not None:
                A_mean, A = A.tensor_split((points.shape[-2],), dim=-1)
                mean = mean + matvec(blocks.between, coefficients)
                if self.form == "orthogonal":
                    shift = shift - matvec(A_mean, coefficients)
            posterior = self._posterior(mean + matvec(A.mT, shift), blocks.covariance, A, scale_tril, x.dtype)
        given = any(argument is not None for argument in (mean_points, mean_coefficients, mean_mask))
        self._remember(
            given or (points is not None and bool(kwargs)),  # of the prior at the strategy's own points
            mean_points=mean_points,
            mean_coefficients=mean_coefficients,
            mean_mask=mean_mask,
            kwargs=kwargs,
        )
        return posterior

    def kl_divergence(self) -> Tensor:
        """KL divergence from q to the prior at the mean points of the last call, in nats.

        Returns:
            ``kl_global() + kl_amortised()``, ``(*batch)``: the batch shape of the variational distribution and of the
            mean points, one number a posterior; nothing is summed.

        Raises:
            RuntimeError: mean points come with each call, and there was none; or the last call brought some, and they
                are forgotten.
        """
        # Not only a sum: with points of its own a strategy knows its divergence before any call.
        amortised = self.kl_amortised()
        return self.kl_global() + amortised

    def kl_global(self) -> Tensor:
        """The part that no call changes, in nats: what the inducing points say.

        Returns:
            The divergence from N(m, S) to N(0, I), in the batch shape of the variational distribution.
        """
        with torch.autocast(self.inducing_points.device.type, enabled=False):
            mean, scale_tril = self._moments()
            if scale_tril is None:
                kl = 0.5 * (mean.square() + math.log(2 * math.pi)).sum(-1)
            else:
                kl = gaussian_kl(mean, scale_tril)
        return kl.to(self._variational_distribution.dtype)

    def kl_amortised(self) -> Tensor:
        """The part of the mean points of the last call, in nats, made anew from its arguments.

        Returns:
            ``(*batch)``, half the squared RKHS norm of the mean that the mean points add. In the form ``"cheng_boots"``
            that and the cross term, which can be negative: there only the sum of both parts is a divergence.

        Raises:
            RuntimeError: mean points come with each call, and there was none; or the last call brought some, and they
                are forgotten.
        """
        if self._last is None and self.mean_points is None:
            raise RuntimeError(
                "kl_divergence: mean points come with each call, and there was none since the last train(), change to "
                "eval mode, copy or load."
            )
        self._check_remembered()
        last = self._last or {"mean_points": None, "mean_coefficients": None, "mean_mask": None, "kwargs": {}}
        with torch.autocast(self.inducing_points.device.type, enabled=False):
            points, coefficients = self._mean_part(last["mean_points"], last["mean_coefficients"], last["mean_mask"])
            mean, _ = self._moments()
            if points is None or coefficients is None:
                kl = torch.zeros_like(mean[..., 0])
            else:
                blocks = prior_blocks(self.model, self.inducing_points, None, points, "dense", last["kwargs"])
                factor, _ = cholesky(blocks.gram, self._jitter_val)
                A = torch.linalg.solve_triangular(factor, blocks.cross, upper=False)
                V = matvec(A, coefficients)
                kl = 0.5 * (coefficients * matvec(to_dense(blocks.covariance), coefficients)).sum(-1)
                kl = kl + (mean * V if self.form == "cheng_boots" else -0.5 * V.square()).sum(-1)
        return kl.to(self._variational_distribution.dtype)

    def _mean_part(
        self, points: Tensor | None, coefficients: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mean points and their masked coefficients (float64) of a call, checked; both ``None`` if there are none."""
        columns = self.inducing_points.shape[-1]
        if points is not None:
            if coefficients is None:
                raise ValueError("mean_coefficients: expected those of the given mean_points, got None.")
            points = check_points("mean_points", points, columns)
        elif self.mean_points is None:
            for name, given in (("mean_coefficients", coefficients), ("mean_mask", mask)):
                if given is not None:
                    raise ValueError(f"mean_points: expected points for the given {name}, got None.")
            return None, None
        else:
            points = self.mean_points
        values = self.mean_coefficients if coefficients is None else coefficients
        values = check_coefficients("mean_coefficients", values, points.shape[-2])
        if mask is not None:
            check_mask("mean_mask", mask, points.shape[-2])
            check_batches(mean_mask=mask.shape[:-1], mean_points=points.shape[:-2], mean_coefficients=values.shape[:-1])
            points = without_masked(points, mask, self.inducing_points.reshape(-1, columns)[0])
            values = torch.where(mask, 0.0, values)
        return check_finite("mean_points", points), check_finite("mean_coefficients", values).double()
