"""Batches of training, and what models return for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def run(model: nn.Module, x: Any) -> Any:
    """Call a model.

    Args:
        model: any module.
        x: its argument, or a mapping of arguments.
    """
    return model(**x) if isinstance(x, Mapping) else model(x)


def logits_of(output: Any) -> Tensor:
    """Logits in what a model returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"task_loss: expected a teacher that returns logits, got {type(output).__name__}; take task_loss=None."
    )


def batch_parts(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a batch."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return inputs, batch.get("labels")
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise ValueError(f"loader: expected inputs, or inputs and labels, got a batch of {len(batch)} parts.")
        return batch[0], batch[1] if len(batch) == 2 else None
    return batch, None
