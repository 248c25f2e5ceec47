"""Where a model keeps its online state: float64 buffers that are read and replaced as one value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gpseq.linalg import row_major
from gpseq.precision import Float64Buffers


class Value(Protocol):
    """A frozen dataclass of tensors."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all fields, in the order of the constructor."""


State = TypeVar("State", bound=Value)


class Belief(Float64Buffers, Generic[State]):
    """Holds one :class:`OnlineState`, or another frozen dataclass of tensors.

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

    # Whether nobody else holds the tensors: only then may the owner write into them, because a state is a value.
    _exclusive = False

    def __init__(self, state: State) -> None:
        super().__init__()
        self._kind = type(state)
        self._fields = tuple(name for name, _ in state.items())
        for name, tensor in state.items():
            self.register_buffer(name, row_major(tensor.detach()))

    @property
    def state(self) -> State:
        """The present value."""
        self._exclusive = False
        buffers: dict[str, Any] = self._buffers  # by name, because attributes of modules are slow
        return self._kind(*(buffers[name] for name in self._fields))

    @state.setter
    def state(self, state: State) -> None:
        self._exclusive = False
        # In one step, because Ctrl-C may come between any two.
        self._buffers.update({name: row_major(tensor) for name, tensor in state.items()})

    @contextmanager
    def _looked_at(self) -> Iterator[None]:
        """Within, reading the state gives it to nobody; what was read must not be kept."""
        exclusive = self._exclusive
        try:
            yield
        finally:
            self._exclusive = exclusive

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._exclusive = False  # a state dict refers to the tensors themselves
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._exclusive = False
        # Loading copies into buffers, but a state is a value that others may hold: give it new ones.
        for name in self._fields:
            saved, buffer = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            self._buffers[name] = (
                torch.empty(saved.shape, dtype=buffer.dtype, device=buffer.device)
                if isinstance(saved, Tensor)
                else buffer.clone()
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
