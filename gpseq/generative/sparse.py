r"""A Gaussian-process prior over latent paths, and its sparse posterior given pseudo-observations.

An encoder says of each time and each of L channels what it saw there, :math:`N(\tilde y \mid f, \tilde v)`. With the
whitened features :math:`A = L_u^{-1} K_{uf}` of M inducing variables,

.. math::
    G = A \tilde V^{-1} A^\top, \quad r = A \tilde V^{-1} \tilde y, \quad
    q(v) = N\bigl((I + G)^{-1} r, (I + G)^{-1}\bigr).

Nothing here is a free variational parameter. The mathematics is that of :mod:`gpseq.variational.online`, batched over
channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.features.base import InducingFeatures
from gpseq.generative.draws import draw_normals
from gpseq.generative.evidence import check_evidence
from gpseq.linalg import covariance_root, gaussian_kl
from gpseq.variational import online
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import Prior


@dataclass(frozen=True, eq=False)
class SparsePosterior:
    r"""Latent paths given pseudo-observations, :math:`q(f) = \int p(f \mid u) q(u) du`.

    Attributes:
        mean: at the observed times, ``(*b, L, n)``.
        variance: likewise.
        kl: of q(u) from p(u), minus what an older posterior adds to the bound, ``(*b, L)``, in nats.
        moments: mean and lower factor of q(v), which everything else is computed from.
        state: the information that was gathered, as a value.
        prior: kernel of the paths.
    """

    mean: Tensor
    variance: Tensor
    kl: Tensor
    moments: tuple[Tensor, Tensor]
    state: OnlineState
    prior: Prior

    @property
    def log_evidence(self) -> Tensor:
        """The collapsed bound on the density of all pseudo-observations, ``(*b, L)``, in nats."""
        return online.log_evidence(self.state)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Marginals at any inputs.

        Args:
            x: ``(*b, m)`` or ``(*b, m, d)``.

        Returns:
            Mean and variance, ``(*b, L, m)``, in the dtype of the observed ones.
        """
        mean, variance = _marginals(self.state, self.moments, self.prior, channel_inputs(x, self.state.nodes.shape[-1]))
        return mean.to(self.mean), variance.to(self.mean)

    def rsample(
        self, x: Tensor, sample_shape: torch.Size | tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Joint draws of the paths.

        Args:
            x: as for :meth:`predict`.
            sample_shape: in front.
            generator: of the normal numbers; ``None`` is torch's default generator.

        Returns:
            ``(*sample_shape, *b, L, m)``.
        """
        x = channel_inputs(x, self.state.nodes.shape[-1])
        A = online.whiten(self.state, self.prior, x)
        mean, scale_tril = self.moments
        spread = scale_tril.mT @ A
        covariance = self.prior.covariance(x, x) - A.mT @ A + spread.mT @ spread
        return _draws((A.mT @ mean.unsqueeze(-1)).squeeze(-1), covariance, sample_shape, generator).to(self.mean)


class SparsePrior(nn.Module):
    """Latent paths under one batch of kernels, seen through inducing features.

    Args:
        features: of all channels; M of them.
        covar_module: a kernel with ``batch_shape`` ``(L,)``, or one for all channels.
        num_latents: L.

    Raises:
        ValueError: the kernel's batch shape is another.

    Example:
        >>> import gpytorch, gpseq
        >>> kernel = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))
        >>> prior = SparsePrior(gpseq.features.HippoFeatures(8, horizon=5.0), kernel, num_latents=2)
        >>> x = torch.linspace(0, 5, 20)
        >>> posterior = prior.posterior(x, torch.randn(2, 20), torch.ones(2, 20))
        >>> posterior.mean.shape, posterior.kl.shape
        (torch.Size([2, 20]), torch.Size([2]))
    """

    def __init__(self, features: InducingFeatures, covar_module: Kernel, num_latents: int) -> None:
        super().__init__()
        batch = tuple(covar_module.batch_shape)
        if batch not in ((), (num_latents,)):
            raise ValueError(f"covar_module: expected a batch shape of ({num_latents},) or (), got {batch}.")
        self.features, self.covar_module, self.num_latents = features, covar_module, num_latents

    def kernel_prior(self, frozen: bool = False) -> Prior:
        """The kernel as the mathematics of streams sees it.

        Args:
            frozen: keep gradients away from its hyperparameters.
        """
        return Prior(self.covar_module, frozen=frozen, embedding=self.features.embedding)

    def initial_state(self, frozen: bool = False) -> OnlineState:
        """No information, on the basis of the features as they are: one state for each channel, ``(L,)``."""
        state = online.initial_state(self.features, self.kernel_prior(frozen))
        shape = (self.num_latents,)
        M = state.num_features
        return replace(
            state,
            G=state.G.expand(*shape, M, M),
            r=state.r.expand(*shape, M),
            c=state.c.expand(shape),
            count=state.count.expand(shape),
            whitened_mean=state.whitened_mean.expand(*shape, M),
        )

    def following(self, x: Tensor) -> SparsePrior:
        """The same kernel with features that have come to some inputs; itself where nothing has to move.

        Args:
            x: ``(*b, n)`` or ``(*b, n, d)``.
        """
        inputs = channel_inputs(x, self.features.num_dims).flatten(0, -2)
        features = self.features.following(inputs.double().detach(), self.covar_module)
        return self if features is self.features else SparsePrior(features, self.covar_module, self.num_latents)

    def at(self, state: OnlineState) -> SparsePosterior:
        """Latent paths given what a state has gathered.

        Args:
            state: on the basis of these features; if the kernel has changed since, it is carried to the present one.
        """
        prior = self.kernel_prior()
        if not torch.equal(prior.hyperparameters().to(state.hyperparameters), state.hyperparameters):
            state = online.transfer(state, self.initial_state(), prior)
        empty = state.r.new_zeros(*state.r.shape[:-1], 0)
        moments = online.posterior(state)
        return SparsePosterior(empty, empty, gaussian_kl(*moments), moments, state, prior)

    def absorb(
        self,
        before: OnlineState,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        missing: Tensor | None = None,
        batch_size: int | None = None,
    ) -> OnlineState:
        """Carry a state to the basis of these features, and add pseudo-observations, window by window.

        Args:
            before: on any basis.
            x: ``(n,)`` or ``(n, d)``.
            mean: ``(L, n)``.
            variance: likewise.
            missing: ``(n,)``.
            batch_size: inputs at once; ``None`` is all.

        Raises:
            ValueError: as for :meth:`posterior`.
        """
        check_evidence(x, mean, variance, missing)
        prior = self.kernel_prior(frozen=True)
        state = self._carried(before, self.initial_state(frozen=True), prior)
        inputs = channel_inputs(x, self.features.num_dims)
        size = inputs.shape[-2] if batch_size is None else check_count("batch_size", batch_size)
        for start in range(0, inputs.shape[-2], size):
            window = slice(start, start + size)
            observed = None if missing is None else ~missing[window]
            state = online.update(
                state, prior, inputs[..., window, :], mean[..., window], variance[..., window], observed
            )
        return state

    @staticmethod
    def _carried(before: OnlineState, basis: OnlineState, prior: Prior) -> OnlineState:
        """On another basis; what has not moved is not carried, which would cost digits for nothing."""
        same = (
            before.factor.shape == basis.factor.shape
            and torch.equal(before.hyperparameters, basis.hyperparameters)
            and torch.equal(before.nodes, basis.nodes)
        )
        return (
            replace(basis, G=before.G, r=before.r, c=before.c, count=before.count)
            if same
            else online.transfer(before, basis, prior)
        )

    def posterior(
        self,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        missing: Tensor | None = None,
        scale: Tensor | float = 1.0,
        before: OnlineState | None = None,
    ) -> SparsePosterior:
        r"""Latent paths given pseudo-observations.

        Args:
            x: ``(*b, n)`` or ``(*b, n, d)``.
            mean: what was seen, ``(*b, L, n)``.
            variance: how surely, likewise.
            missing: ``(*b, n)``, ``True`` for what was not observed; ``mean`` and ``variance`` may be NaN there.
            scale: rho, how many times each observation counts, where these are a window of more.
            before: what is known from earlier tasks, on an older basis perhaps. Then ``kl`` is less by
                :math:`\mathrm E_q[\log q_a(a) - \log p_a(a)]`, so that the bound is that of streaming sparse
                processes.

        Raises:
            ValueError: shapes that do not fit, or what is not finite.
        """
        check_evidence(x, mean, variance, missing)
        prior = self.kernel_prior()
        start = self.initial_state()
        state = start if before is None else self._carried(before, start, prior)
        inputs = channel_inputs(x, self.features.num_dims)
        observed = None if missing is None else ~missing.unsqueeze(-2)
        after = online.update(state, prior, inputs, mean, variance.double() / scale, observed)
        moments = online.posterior(after)
        kl = gaussian_kl(*moments)
        if before is not None:
            kl = kl - _expected_factor(state, moments) + online.log_evidence(before)
        m, s2 = _marginals(after, moments, prior, inputs)
        return SparsePosterior(m.to(mean), s2.to(mean), kl, moments, after, prior)

    def rsample(
        self, x: Tensor, sample_shape: torch.Size | tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Joint draws from the prior itself, not from what the features see of it.

        Args:
            x: ``(*b, n)`` or ``(*b, n, d)``.
            sample_shape: in front.
            generator: of the normal numbers; ``None`` is torch's default generator.

        Returns:
            ``(*sample_shape, *b, L, n)``, in the dtype of x.
        """
        inputs = channel_inputs(x, self.features.num_dims).double()
        covariance = self.kernel_prior().covariance(inputs, inputs)
        shape = torch.broadcast_shapes(covariance.shape[:-2], (*inputs.shape[:-3], self.num_latents))
        covariance = covariance.expand(*shape, *covariance.shape[-2:])
        return _draws(covariance.new_zeros(covariance.shape[:-1]), covariance, sample_shape, generator).to(x.dtype)


def channel_inputs(x: Tensor, num_dims: int) -> Tensor:
    """Inputs with an axis for channels.

    Args:
        x: ``(*b, n)`` for one column, or ``(*b, n, d)``.
        num_dims: d.

    Returns:
        ``(*b, 1, n, d)``.

    Raises:
        ValueError: another number of columns.
    """
    if num_dims == 1 and (x.dim() < 2 or x.shape[-1] != 1):
        x = x.unsqueeze(-1)
    if x.dim() < 2 or x.shape[-1] != num_dims:
        raise ValueError(f"x: expected {num_dims} columns, got shape {tuple(x.shape)}.")
    return x.unsqueeze(-3)


def _marginals(
    state: OnlineState, moments: tuple[Tensor, Tensor], prior: Prior, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    A = online.whiten(state, prior, inputs)
    mean, scale_tril = moments
    residual = (prior.variance(inputs) - A.square().sum(-2)).clamp_min(0.0)
    return (A * mean.unsqueeze(-1)).sum(-2), residual + (scale_tril.mT @ A).square().sum(-2)


def _expected_factor(factor: OnlineState, moments: tuple[Tensor, Tensor]) -> Tensor:
    """Expected log of the likelihood factor of earlier tasks, under the posterior that has seen this one too."""
    mean, scale_tril = moments
    roots = torch.cat([scale_tril, mean.unsqueeze(-1)], -1)  # second moment of v as a sum of squares
    return factor.c + (factor.r * mean).sum(-1) - 0.5 * (roots * (factor.G @ roots)).sum((-2, -1))


def _draws(
    mean: Tensor, covariance: Tensor, sample_shape: torch.Size | tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    root = covariance_root(covariance)
    shape = (*sample_shape, *mean.shape)
    return mean + (root @ draw_normals(shape, mean, generator).unsqueeze(-1)).squeeze(-1)
