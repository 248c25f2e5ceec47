"""The strategy of a stream: q(u) is not learnt by gradients, it follows from the online state."""

from __future__ import annotations

from dataclasses import fields
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

    @property
    def prior(self) -> Prior:
        """The model's kernel and mean, constants as far as gradients are concerned."""
        return Prior(self.model.covar_module, self.model.mean_module, frozen=True)

    @property
    def state(self) -> OnlineState:
        """What the stream knows, as one frozen value."""
        return OnlineState(**{name: getattr(self, f"state_{name}") for name in _FIELDS})

    @state.setter
    def state(self, state: OnlineState) -> None:
        for name, tensor in state.items():
            self._buffers[f"state_{name}"] = tensor

    def current_state(self) -> OnlineState:
        """The state under the hyperparameters that the model has now."""
        state = self.state
        if torch.equal(self.prior.hyperparameters(), state.hyperparameters):
            return state
        return self.carried_to(self.features)

    def carried_to(self, features: InducingFeatures) -> OnlineState:
        """The belief on the basis of other features, under the current hyperparameters; nothing is replaced."""
        basis = online.initial_state(features, self.prior, self._jitter_val)
        return online.transfer(self.state, basis, self.prior, self.transfer)

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
        return prior.mean_at(x), self.model.covar_module(x.double()), A, _distribution(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The number of features may have grown since the model was built; the saved shapes decide.
        for name in _FIELDS:
            saved, buffer = state_dict.get(f"{prefix}state_{name}"), self._buffers[f"state_{name}"]
            if isinstance(saved, Tensor) and buffer is not None and saved.shape != buffer.shape:
                self._buffers[f"state_{name}"] = buffer.new_empty(saved.shape)
        gpytorch.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


def _distribution(state: OnlineState) -> MultivariateNormal:
    mean, scale_tril = online.posterior(state)
    return MultivariateNormal(mean, CholLinearOperator(TriangularLinearOperator(scale_tril)))
