"""The arguments of a model, checked, and cut along the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

#: Arguments that a state begins with, before any other tensor.
LEADS = ("input_ids", "inputs_embeds", "pixel_values", "x")
#: Arguments that choose from the outputs, which rules know and models need not.
CHOICES = ("positions", "outputs")
#: Arguments that go with no element of the batch.
_PLACES = (*CHOICES, "logits_to_keep")
#: What modules call the probability with which they drop something in train mode.
_RATES = ("dropout", "dropout_p", "dropout_prob", "drop_prob", "attention_dropout")
#: Dtypes that moments are carried in.
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a model, the batch first.

    Attributes:
        first: the input that a state begins with, ``(B, ...)``.
        lead: its name, ``None`` if it stands first.
        named: all others.
        batch_dim: where the model has the batch.
        whole: whether the batch stays in one piece, for a model that holds masks of just this one.
    """

    first: Tensor
    lead: str | None
    named: dict[str, Any]
    batch_dim: int = 0
    whole: bool = False

    @classmethod
    def of(cls, x: Tensor | Mapping[str, Any], inputs: Mapping[str, Any], batch_dim: int = 0) -> Call:
        """Check what came.

        Args:
            x: a tensor, or a mapping of arguments.
            inputs: further arguments.
            batch_dim: of x.

        Raises:
            TypeError: x is something else, or in a dtype that moments are not carried in.
            ValueError: it has no element, no batch, or numbers that are not finite.
        """
        if isinstance(x, Tensor):
            first, lead, named = x, None, dict(inputs)
        elif isinstance(x, Mapping):
            named = {**x, **inputs}
            tensors = [name for name, value in x.items() if isinstance(value, Tensor)]
            if not tensors:
                raise TypeError("x: expected a tensor or a mapping with tensors, got none.")
            lead = next((name for name in LEADS if name in tensors), tensors[0])
            first = named.pop(lead)
        else:
            raise TypeError(f"x: expected a tensor or a mapping of tensors, got {type(x).__name__}.")
        if first.dim() <= batch_dim or first.numel() == 0:
            raise ValueError(f"x: expected at least one element along dimension {batch_dim}, got {tuple(first.shape)}.")
        if first.is_floating_point() or first.is_complex():
            if first.dtype not in _DTYPES:
                raise TypeError(f"x: expected float32 or float64, got {first.dtype}.")
            if first.dim() < 2:
                raise ValueError(f"x: expected a batch of inputs, (B, ...), got shape {tuple(first.shape)}.")
            if not first.isfinite().all():
                raise ValueError(f"x: expected finite numbers, got {int((~first.isfinite()).sum())} that are not.")
        return cls(first.movedim(batch_dim, 0), lead, named, batch_dim)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the states that follow."""
        return self.first.element_size() if self.first.is_floating_point() else 4

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the model itself is called with, by position and by name: all but what chooses from its outputs."""
        first = self.first.movedim(0, self.batch_dim)
        named = {name: value for name, value in self.named.items() if name not in CHOICES}
        return ((first,), named) if self.lead is None else ((), {self.lead: first, **named})

    def chunks(self, size: int) -> Iterator[Call]:
        """Parts of the batch; inputs that have as many elements along their first dimension go along.

        Args:
            size: of each part, the last may be smaller.
        """
        batch = len(self.first)
        if size >= batch or self.whole:
            yield self
            return
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            named = {name: rows_of(name, value, rows, batch) for name, value in self.named.items()}
            yield replace(self, first=self.first[rows], named=named)


def rows_of(name: str, value: Any, rows: slice, batch: int) -> Any:
    """The rows of an argument that has some for each element of the batch; any other argument as it is.

    Args:
        name: of the argument.
        value: what it is.
        rows: of the batch, with both ends.
        batch: how many elements there are.
    """
    if not isinstance(value, Tensor) or value.dim() == 0 or name in _PLACES:
        return value
    each = 1
    if name in ("attn_mask", "mask", "src_mask"):  # torch's masks on pairs of positions: one for all, or one a head
        if value.dim() == 2 and (value.is_floating_point() or value.dtype == torch.bool or len(value) != batch):
            return value  # integers are those of transformers, one row for each element
        each = max(len(value) // batch, 1) if value.dim() == 3 else 1
    return value[rows.start * each : rows.stop * each] if len(value) == each * batch else value


def check_model(model: nn.Module, call: Call) -> None:
    """That a model can be propagated through.

    Args:
        model: any.
        call: its arguments.

    Raises:
        TypeError: weights in half precision, or an input in another dtype than the weights.
        ValueError: it is in train mode, and dropout or norms of batches would act.
    """
    check_mode(model)
    dtypes = check_dtypes(model)
    if call.first.is_floating_point() and dtypes and call.first.dtype not in dtypes:
        expected = " or ".join(sorted(map(str, dtypes)))
        raise TypeError(f"x: expected the dtype of the weights, {expected}, got {call.first.dtype}.")


def check_dtypes(model: nn.Module) -> set[torch.dtype]:
    """That weights are in dtypes that moments are carried in.

    Args:
        model: any.

    Returns:
        Those that there are.

    Raises:
        TypeError: there is another one.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    unknown = sorted(map(str, dtypes - {*_DTYPES}))
    if unknown:
        raise TypeError(f"model: expected weights in float32 or float64, got {', '.join(unknown)}.")
    return dtypes


def check_mode(model: nn.Module) -> None:
    """That nothing is in train mode which drops numbers or looks at statistics of the batch.

    Args:
        model: any.

    Raises:
        ValueError: something is.
    """
    for name, module in model.named_modules():
        if module.training and _trains(module):
            raise ValueError(
                f"model: expected it in eval mode, but {name or 'it'} ({type(module).__name__}) trains; call "
                "model.eval()."
            )


def _trains(module: nn.Module) -> bool:
    """Whether a module does something else in train mode, as far as one can see from outside."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
    rates = (getattr(module, name, None) for name in _RATES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
