"""Standard sparse-GP attention as a GPyTorch strategy: the keys of a sequence are the inducing points."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
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


class SGPAVariationalStrategy(WhitenedPointsStrategy):
    r"""Standard sparse-GP attention: the keys of a sequence are the inducing points, its values the mean.

    With keys a, values v, :math:`L L^\top = K_{aa} + \epsilon I`, :math:`A = L^{-1} K_{ax}` and the whitened covariance
    :math:`S` of the variational distribution,

    .. math::
        q(f(x)) = N\big(\mu(x) + K_{xa} v,\; K_{xx} - A^\top (I - S) A\big), \qquad
        \mathrm{KL} = \tfrac12 \big(\operatorname{tr} S + v^\top K_{aa} v - T - \log |S|\big) .

    This is GPyTorch's ``VariationalStrategy`` at the keys with the whitened mean :math:`L^\top v`, and its
    ``UnwhitenedVariationalStrategy`` with the mean :math:`K_{aa} v` and the covariance :math:`L S L^\top`. S has one
    row a key and costs :math:`O(T^3)`, so the number of keys is that of the inducing points; shorter sequences are
    padded and masked. It is the reference for :class:`DecoupledSGPAVariationalStrategy`, which scales.

    A call may bring ``key=``, ``value=`` and ``key_padding_mask=``; all other keywords go to the model's ``forward``.
    Without a key the inducing points are the keys. Without a value the mean is the variational distribution's own
    (whitened) one and this is an ordinary SVGP; with one, that mean is not used and gets no gradient.

    The prior is asked as ``model.forward(cat[key, x])``, so custom forwards, deep kernels and any mean work, and u is f
    minus its mean at the keys. The algebra is in float64, the result has the dtype of the inputs, nothing is cached.
    :meth:`kl_divergence` is that of the last call, which is remembered by its arguments, and forgotten by ``train()``,
    by the change to eval mode, by loading and by copying, whereupon it raises if the call brought a value or a mask;
    the prior is asked again for it, so a ``forward`` that draws at random gives another draw. GPyTorch's multitask
    wrapper would leave the value out of it; take ``gpseq.variational.IndependentMultitaskVariationalStrategy``.
    As in GPyTorch, in training mode with ``diag=True`` only the diagonal of the covariance is meaningful.

    Args:
        model: the GP, usually ``self``.
        inducing_points: keys for calls that bring none, ``(*batch, T, d)``.
        variational_distribution: whitened q over T numbers.
        learn_inducing_locations: whether the inducing points are a parameter.
        jitter: relative jitter of the factorisation, see :func:`gpseq.linalg.cholesky`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no inducing points, sizes that differ, or a jitter that is none.

    Source:
        Chen and Li (2023), Calibrating Transformers via Sparse Gaussian Processes, section 3.1.

    Example:
        >>> import gpytorch
        >>> class Model(gpytorch.models.ApproximateGP):
        ...     def __init__(self, keys):
        ...         q = gpytorch.variational.CholeskyVariationalDistribution(len(keys))
        ...         super().__init__(SGPAVariationalStrategy(self, keys, q))
        ...         self.mean_module = gpytorch.means.ZeroMean()
        ...         self.covar_module = gpytorch.kernels.RBFKernel()
        ...
        ...     def forward(self, x):
        ...         return MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> model, tokens = Model(torch.zeros(4, 2)), torch.randn(4, 2)
        >>> model(tokens, key=tokens, value=torch.randn(4)).mean.shape
        torch.Size([4])
    """

    def __call__(
        self,
        x: Tensor,
        prior: bool = False,
        diag: bool = True,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MultivariateNormal:
        """Marginal of f at ``x`` under q (or under the prior).

        Args:
            x: inputs (queries), ``(*batch, n, d)``, or ``(n,)``.
            prior: return the model's prior instead.
            diag: in training mode, leave out the off-diagonal covariances.
            key: the inducing points of this call, ``(*batch, T, d)``.
            value: coefficients of the mean, ``(*batch, T)``.
            key_padding_mask: True where a key is ignored, ``(*batch, T)``.
            kwargs: handed to the model's ``forward``.

        Returns:
            Distribution over ``(*batch, n)`` values, in the dtype of ``x``.

        Raises:
            TypeError: an argument of another kind.
            ValueError: shapes that do not fit, a key without a value, or numbers that are not finite.
        """
        if prior:
            return self._prior(x, **kwargs)
        x = self._check_call(x)
        with torch.autocast(x.device.type, enabled=False):
            keys, values, mask = self._keys(key, value, key_padding_mask)
            check_batches(
                x=x.shape[:-2],
                key=keys.shape[:-2],
                value=torch.Size() if values is None else values.shape[:-1],
                key_padding_mask=torch.Size() if mask is None else mask.shape[:-1],
                variational_distribution=self._variational_distribution.batch_shape,
            )
            blocks = prior_blocks(self.model, keys, None, x, "diagonal" if diag and self.training else "lazy", kwargs)
            cross = blocks.cross if mask is None else torch.where(mask.unsqueeze(-1), 0.0, blocks.cross)
            factor = self._factor(blocks.gram, mask)
            A = torch.linalg.solve_triangular(factor, cross, upper=False)
            mean, scale_tril = self._whitened(factor, values, mask)
            posterior = self._posterior(blocks.mean + matvec(A.mT, mean), blocks.covariance, A, scale_tril, x.dtype)
        brought = value is not None or key_padding_mask is not None
        self._remember(brought, key=key, value=value, key_padding_mask=key_padding_mask, kwargs=kwargs)
        return posterior

    def kl_divergence(self) -> Tensor:
        """KL divergence from q to the prior, in nats, for the keys and values of the last call.

        Returns:
            ``(*batch)``, the batch shape of the variational distribution and of what the call brought: one number a
            posterior, nothing is summed. Before any call, that of the variational distribution.

        Raises:
            RuntimeError: the last call brought a value or a mask, and it is forgotten.
        """
        self._check_remembered()
        last = self._last or {"key": None, "value": None, "key_padding_mask": None, "kwargs": {}}
        dtype = self._variational_distribution.dtype
        with torch.autocast(self.inducing_points.device.type, enabled=False):
            keys, values, mask = self._keys(last["key"], last["value"], last["key_padding_mask"])
            factor = None
            if values is not None:
                blocks = prior_blocks(self.model, keys, None, keys[..., -1:, :], "diagonal", last["kwargs"])
                factor = self._factor(blocks.gram, mask)
            mean, scale_tril = self._whitened(factor, values, mask)
            if scale_tril is not None:
                return gaussian_kl(mean, scale_tril).to(dtype)
            log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(mean)
            return -(log_prob if mask is None else torch.where(mask, 0.0, log_prob)).sum(-1).to(dtype)

    def _keys(
        self, key: Tensor | None, value: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Keys, coefficients and mask of a call, checked; what is masked is replaced."""
        size, columns = self.inducing_points.shape[-2:]
        keys = self.inducing_points
        if key is not None:
            if value is None:
                raise ValueError("value: expected coefficients for the given key, got None.")
            keys = check_points("key", key, columns)
            if keys.shape[-2] != size:
                raise ValueError(
                    f"key: expected {size}, as there are inducing points (pad and mask a shorter sequence), got shape "
                    f"{tuple(key.shape)}."
                )
        if mask is not None:
            check_mask("key_padding_mask", mask, size)
            keys = without_masked(keys, mask, self.inducing_points.reshape(-1, columns)[0])
        check_finite("key", keys)
        if value is not None:
            value = check_coefficients("value", value, size)
            value = check_finite("value", value if mask is None else torch.where(mask, 0.0, value)).double()
        return keys, value, mask

    def _factor(self, gram: Tensor, mask: Tensor | None) -> Tensor:
        """L; masked keys are independent of all, with a variance that leaves the mean diagonal, hence the jitter."""
        if mask is not None:
            valid = ~mask
            diagonal = gram.diagonal(dim1=-1, dim2=-2)
            level = (diagonal * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)
            level = torch.where(valid.any(-1, keepdim=True), level, 1.0)
            gram = gram * (valid.unsqueeze(-1) & valid.unsqueeze(-2)) + torch.diag_embed(level * mask)
        return cholesky(gram, self._jitter_val)[0]

    def _whitened(
        self, factor: Tensor | None, values: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Whitened mean and lower covariance factor; masked keys keep their prior."""
        mean, scale_tril = self._moments()
        if factor is not None and values is not None:
            mean = matvec(factor.mT, values)
        if mask is not None:
            mean = torch.where(mask, 0.0, mean)
            if scale_tril is not None:
                valid = ~mask
                scale_tril = scale_tril * (valid.unsqueeze(-1) & valid.unsqueeze(-2)) + torch.diag_embed(mask.double())
        return mean, scale_tril
