"""The strategy of a stream: q(u) is not learnt by gradients, it follows from the online state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import (
    CholLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    TriangularLinearOperator,
)
from torch import Tensor

from gpseq.features.base import InducingFeatures
from gpseq.linalg import gaussian_kl
from gpseq.variational import online
from gpseq.variational.belief import Belief
from gpseq.variational.interdomain import InterdomainVariationalStrategy
from gpseq.variational.lazy import Float64Kernel
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import Prior


class StreamingVariationalStrategy(InterdomainVariationalStrategy):
    """Owns the :class:`OnlineState` of a stream and predicts from it.

    The state is read and replaced as one value, and is the only thing that an update changes. Predictions
    differentiate through the inputs; the hyperparameters are constants of a prediction. When they have been changed
    since the last update, the state is carried over to the new values first.

    Args:
        model: a GP with ``covar_module`` and ``mean_module``.
        features: what u is.
        jitter: relative jitter, see :func:`gpseq.linalg.cholesky`.
        transfer: how information passes to another basis, see :func:`gpseq.variational.online.transfer`; ``None``
            means ``"vfe"``, or ``"adf"`` for features that forget.
    """

    def __init__(
        self,
        model: gpytorch.Module,
        features: InducingFeatures,
        jitter: float | None = None,
        transfer: str | None = None,
    ) -> None:
        gpytorch.Module.__init__(self)
        object.__setattr__(self, "model", model)
        self.features = features
        self._jitter_val = jitter
        self.transfer = transfer
        self.belief = Belief(online.initial_state(features, self.prior, jitter))
        self._modules_of_basis = self._prior_modules()

    @property
    def prior(self) -> Prior:
        """The model's kernel and mean, constants as far as gradients are concerned."""
        return self.prior_of(self.features)

    def prior_of(self, features: InducingFeatures, frozen: bool = True) -> Prior:
        """The model's kernel and mean as these features see them."""
        return Prior(self.model.covar_module, self.model.mean_module, frozen, features.embedding)

    @property
    def state(self) -> OnlineState:
        """What the stream knows, as one frozen value."""
        return self.belief.state

    @state.setter
    def state(self, state: OnlineState) -> None:
        self.belief.state = state
        self._modules_of_basis = self._prior_modules()

    def _prior_modules(self) -> tuple[torch.nn.Module, ...]:
        return *self.model.covar_module.modules(), *self.model.mean_module.modules()

    def _modules_replaced(self) -> bool:
        now, then = self._prior_modules(), self._modules_of_basis
        return len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True))

    def current_state(self) -> OnlineState:
        """The state under the hyperparameters that the model has now."""
        state = self.state
        now = self.prior.hyperparameters()
        if self.features.embedding is not None:
            self._check_frozen(now, state.hyperparameters)
            return state
        if not self._modules_replaced() and torch.equal(now.to(state.hyperparameters.device), state.hyperparameters):
            return state
        return self.carried_to(self.basis_of(self.features))

    def _check_frozen(self, now: Tensor, then: Tensor) -> None:
        """Rounding by a cast is no change."""
        if self._modules_replaced() or now.shape != then.shape or not torch.allclose(now, then, rtol=1e-6, atol=1e-6):
            raise ValueError(
                "covar_module: kernel or mean have changed, but random features are frozen at the values that they "
                "were drawn with; the path that they have summarised cannot be seen through others."
            )

    def basis_of(self, features: InducingFeatures) -> OnlineState:
        """A state that has seen nothing, on the basis of other features under the current hyperparameters."""
        return online.initial_state(features, self.prior_of(features), self._jitter_val)

    def carried_to(self, basis: OnlineState) -> OnlineState:
        """The belief on another basis, see :meth:`basis_of`; nothing is replaced."""
        state = self.state
        if self._modules_replaced():
            # Another kernel may have parameters of the same values; NaN equals nothing.
            state = replace(state, hyperparameters=torch.full_like(state.hyperparameters, torch.nan))
        return online.transfer(state, basis, self.prior, self.method)

    @property
    def method(self) -> str:
        """How this stream carries its belief, as was asked for or as suits the features."""
        return self.transfer or ("adf" if self.features.forgets else "vfe")

    @property
    def prior_distribution(self) -> MultivariateNormal:
        """N(0, I) in the shape of the state."""
        zeros = torch.zeros_like(self.state.r)
        return MultivariateNormal(zeros, DiagLinearOperator(torch.ones_like(zeros)))

    @property
    def variational_distribution(self) -> MultivariateNormal:
        r"""q(v) = :math:`N(P^{-1} r, P^{-1})`, in float64."""
        return _distribution(self.current_state())

    def kl_divergence(self) -> Tensor:
        """KL divergence from q(v) to its prior, ``(*batch)``, in nats."""
        return gaussian_kl(*online.posterior(self.current_state()))

    def advance(self, features: InducingFeatures | None = None, transfer: str | None = None) -> None:
        """Not for a stream, which moves on by ``StreamingGP.update``."""
        raise TypeError("advance: a StreamingGP moves on by update and rebase; this is for models that are trained.")

    def __call__(self, x: Tensor, prior: bool = False, diag: bool = True, **kwargs: Any) -> MultivariateNormal:
        """As the base class, with full covariances in training mode too: a stream has nothing to train."""
        return super().__call__(x, prior=prior, diag=False, **kwargs)

    def _conditional(
        self, x: Tensor, diagonal: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor | LinearOperator, Tensor, MultivariateNormal]:
        prior, state = self.prior, self.current_state()
        A = online.whiten(state, prior, x)
        if prior.embedding is None:
            kff = Float64Kernel(prior.kernel, frozen=True)(x.double())
        else:
            kff = RootLinearOperator(prior.embedding(x))
        return prior.mean_at(x), kff, A, _distribution(state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        gpytorch.Module._load_from_state_dict(self, *args, **kwargs)
        self._modules_of_basis = self._prior_modules()


def _distribution(state: OnlineState) -> MultivariateNormal:
    mean, scale_tril = online.posterior(state)
    return MultivariateNormal(mean, CholLinearOperator(TriangularLinearOperator(scale_tril)))
