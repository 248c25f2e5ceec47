"""The rule of tables: rows that are looked up by certain ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpseq.propagation.moments import GaussianState
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk


@register(nn.Embedding)
def embedding(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Rows of a table; equal ids are one row, and share its noise.

    The row of ``padding_idx`` is a row like all others: it is as certain as the posterior says.

    Args:
        module: the table.
        state: ids, ``(B, *tokens)``, which are certain.
        walk: of the network.

    Returns:
        ``(B, *tokens, D)``.
    """
    ids = state.mean
    if ids.is_floating_point() or not state.is_certain:
        raise TypeError(f"x: expected ids for {walk.path(module)}, which are integers, got {ids.dtype}.")
    if module.max_norm is not None:
        raise NotImplementedError(
            f"model: expected a table that stays as it is, got max_norm={module.max_norm} of {walk.path(module)}, "
            "which changes rows when they are looked up."
        )
    width = module.embedding_dim
    places = ids.unsqueeze(-1) * width + torch.arange(width, device=ids.device)
    return walk.entries(module.weight, places)
