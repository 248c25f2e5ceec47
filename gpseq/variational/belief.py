"""Where a strategy keeps its online state: float64 buffers that are read and replaced as one value."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gpseq.precision import Float64Buffers
from gpseq.variational.online import OnlineState

_FIELDS = tuple(field.name for field in fields(OnlineState))


class Belief(Float64Buffers):
    """Holds one :class:`OnlineState`.

    Its buffers follow ``.to(device)``, stay float64, and are part of the state dict; a state of another size loads
    as it was saved, because the number of features may have grown since the model was built.

    Args:
        state: what is believed first.

    Example:
        >>> import gpytorch, gpseq
        >>> from gpseq.variational import Prior, online
        >>> prior = Prior(gpytorch.kernels.RBFKernel())
        >>> belief = Belief(online.initial_state(gpseq.features.HippoFeatures(4, horizon=1.0), prior))
        >>> belief.state.num_features, sorted(belief.state_dict())[0]
        (4, 'G')
    """

    def __init__(self, state: OnlineState) -> None:
        super().__init__()
        for name, tensor in state.detach().items():
            self.register_buffer(name, tensor)

    @property
    def state(self) -> OnlineState:
        """The present value."""
        buffers: dict[str, Any] = self._buffers  # by name, because attributes of modules are slow
        return OnlineState(*(buffers[name] for name in _FIELDS))

    @state.setter
    def state(self, state: OnlineState) -> None:
        for name, tensor in state.items():
            self._buffers[name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Loading copies into buffers, but a state is a value that others may hold: give it new ones.
        for name in _FIELDS:
            saved, buffer = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            self._buffers[name] = (
                torch.empty(saved.shape, dtype=buffer.dtype, device=buffer.device)
                if isinstance(saved, Tensor)
                else buffer.clone()
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
