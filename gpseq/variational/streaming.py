"""The strategy of a stream: q(u) is not learnt by gradients, it follows from the online state."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import CholLinearOperator, DiagLinearOperator, LinearOperator, TriangularLinearOperator
from torch import Tensor

from gpseq.features.base import InducingFeatures
from gpseq.linalg import gaussian_kl
from gpseq.precision import Float64Buffers
from gpseq.variational import online
from gpseq.variational.interdomain import InterdomainVariationalStrategy
from gpseq.variational.lazy import Float64Kernel
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import Prior

_FIELDS = tuple(field.name for field in fields(OnlineState))


class StreamingVariationalStrategy(InterdomainVariationalStrategy, Float64Buffers):
    """Owns the :class:`OnlineState` of a stream and predicts from it.

    The state lives in float64 buffers, is read and replaced as one value, and is the only thing that an update
    changes. Predictions differentiate through the inputs; the hyperparameters are constants of a prediction. When
    they have been changed since the last update, the state is carried over to the new values first.

    Args:
        model: a GP with ``covar_module`` and ``mean_module``.
        features: what u is.
        jitter: relative jitter, see :func:`gpseq.linalg.cholesky`.
        transfer: how information passes to another basis, see :func:`gpseq.variational.online.transfer`.
    """

    def __init__(
        self,
        model: gpytorch.Module,
        features: InducingFeatures,
        jitter: float | None = None,
        transfer: str = "vfe",
    ) -> None:
        gpytorch.Module.__init__(self)
        object.__setattr__(self, "model", model)
        self.features = features
        self._jitter_val = jitter
        self.transfer = transfer
        for name, tensor in online.initial_state(features, self.prior, jitter).detach().items():
            self.register_buffer(f"state_{name}", tensor)
        self._modules_of_basis = self._prior_modules()

    @property
    def prior(self) -> Prior:
        """The model's kernel and mean, constants as far as gradients are concerned."""
        return Prior(self.model.covar_module, self.model.mean_module, frozen=True)

    @property
    def state(self) -> OnlineState:
        """What the stream knows, as one frozen value."""
        buffers: dict[str, Any] = self._buffers  # by name, because attributes of modules are slow
        return OnlineState(*(buffers[f"state_{name}"] for name in _FIELDS))

    @state.setter
    def state(self, state: OnlineState) -> None:
        for name, tensor in state.items():
            self._buffers[f"state_{name}"] = tensor
        self._modules_of_basis = self._prior_modules()

    def _prior_modules(self) -> tuple[torch.nn.Module, ...]:
        return *self.model.covar_module.modules(), *self.model.mean_module.modules()

    def _modules_replaced(self) -> bool:
        now, then = self._prior_modules(), self._modules_of_basis
        return len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True))

    def current_state(self) -> OnlineState:
        """The state under the hyperparameters that the model has now."""
        state = self.state
        if not self._modules_replaced() and torch.equal(self.prior.hyperparameters(), state.hyperparameters):
            return state
        return self.carried_to(self.basis_of(self.features))

    def basis_of(self, features: InducingFeatures) -> OnlineState:
        """A state that has seen nothing, on the basis of other features under the current hyperparameters."""
        return online.initial_state(features, self.prior, self._jitter_val)

    def carried_to(self, basis: OnlineState) -> OnlineState:
        """The belief on another basis, see :meth:`basis_of`; nothing is replaced."""
        state = self.state
        if self._modules_replaced():
            # Another kernel may have parameters of the same values; NaN equals nothing.
            state = replace(state, hyperparameters=torch.full_like(state.hyperparameters, torch.nan))
        return online.transfer(state, basis, self.prior, self.transfer)

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

    def __call__(self, x: Tensor, prior: bool = False, diag: bool = True, **kwargs: Any) -> MultivariateNormal:
        """As the base class, with full covariances in training mode too: a stream has nothing to train."""
        return super().__call__(x, prior=prior, diag=False, **kwargs)

    def _conditional(
        self, x: Tensor, diagonal: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor | LinearOperator, Tensor, MultivariateNormal]:
        prior, state = self.prior, self.current_state()
        A = online.whiten(state, prior, x)
        kff = Float64Kernel(prior.kernel, frozen=True)(x.double())
        return prior.mean_at(x), kff, A, _distribution(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Loading copies into buffers, but a state is a value that others may hold: give it new ones. Their shapes are
        # those of what was saved, because the number of features may have grown since this model was built.
        for name in _FIELDS:
            saved, buffer = state_dict.get(f"{prefix}state_{name}"), getattr(self, f"state_{name}")
            self._buffers[f"state_{name}"] = (
                torch.empty(saved.shape, dtype=buffer.dtype, device=buffer.device)
                if isinstance(saved, Tensor)
                else buffer.clone()
            )
        gpytorch.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
        self._modules_of_basis = self._prior_modules()


def _distribution(state: OnlineState) -> MultivariateNormal:
    mean, scale_tril = online.posterior(state)
    return MultivariateNormal(mean, CholLinearOperator(TriangularLinearOperator(scale_tril)))
