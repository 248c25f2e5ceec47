"""Labelled batches, and the logits that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpseq.logits import class_logits
from gpseq.nn.capture import Forward, call

#: Labels that do not count, as in torch's cross-entropy.
IGNORED = -100
Labels = Callable[[Any], Tensor]


class Labelled(NamedTuple):
    """Logits and labels of a batch, batch first.

    Attributes:
        logits: ``(B, K)``, or ``(B, T, K)`` of tokens.
        labels: ``(B,)`` or ``(B, T)``.
        counts: which labels count, likewise.
    """

    logits: Tensor
    labels: Tensor
    counts: Tensor


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        TypeError: it is a tensor, whose rows are no batches, or nothing to iterate over.
        ValueError: there is none.
    """
    if isinstance(loader, Tensor | Mapping) or not isinstance(loader, Iterable):
        raise TypeError(f"loader: expected batches, got {type(loader).__name__}; a list of one batch is a loader.")
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise ValueError("loader: expected at least one batch, got none.")


def run(
    model: nn.Module,
    batch: Any,
    forward: Forward | None,
    labels: Labels | None,
    batch_dim: int,
    shift: bool,
) -> Labelled:
    """Call a model with a batch.

    Args:
        model: that returns logits.
        batch: ``(x, labels)``, or a mapping with ``"labels"``.
        forward: called as ``forward(model, batch)`` in place of ``model(x)`` or ``model(**batch)``.
        labels: from a batch to its labels, in place of the above.
        batch_dim: batch dimension of the logits and labels of tokens.
        shift: whether labels are the tokens themselves, and logits are for the next one.

    Raises:
        TypeError: there are no labels or no logits.
        ValueError: their shapes do not fit, a label is out of range, or labels are the tokens and ``shift`` is not set.
    """
    z = class_logits(call(model, batch, forward))
    y = (_labels(batch) if labels is None else labels(batch)).to(z.device)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"loader: expected integer labels, got {y.dtype}.")
    if z.dim() not in (2, 3) or y.shape != z.shape[:-1]:
        raise ValueError(f"loader: expected labels for logits of shape {tuple(z.shape)}, got {tuple(y.shape)}.")
    if z.dim() == 3:
        z, y = z.transpose(0, batch_dim), y.transpose(0, batch_dim)
    counts = y != IGNORED
    wrong = counts & ((y < 0) | (y >= z.shape[-1]))
    if wrong.any():
        raise ValueError(f"loader: expected labels from 0 to {z.shape[-1] - 1}, got {int(y[wrong][0])}.")
    if shift:
        if z.dim() != 3:
            raise ValueError(f"shift: expected logits of tokens (B, T, classes), got shape {tuple(z.shape)}.")
        # The last token has no successor here; its logits stay, so that they go with the layers' tokens.
        y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], IGNORED)], 1)
        counts = y != IGNORED
    elif isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), Tensor) and ids.shape == y.shape:
        if counts.any() and bool((ids.to(y.device) == y)[counts].all()):
            raise ValueError("labels: expected shift=True where labels are the tokens themselves, got shift=False.")
    return Labelled(z, y, counts)


def _labels(batch: Any) -> Tensor:
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif isinstance(batch, Sequence) and len(batch) == 2:
        found = batch[1]
    if not isinstance(found, Tensor):
        got = f"{len(batch)} elements" if isinstance(batch, tuple | list) else type(batch).__name__
        if isinstance(batch, Mapping):
            got = f"a mapping with {', '.join(map(str, batch))}"
        raise TypeError(
            f"loader: expected batches (x, labels), or mappings with 'labels', got {got}; for others give labels, a "
            "function of the batch."
        )
    return found
