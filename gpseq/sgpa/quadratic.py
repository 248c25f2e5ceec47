r"""Quadratic forms of whitened features, :math:`V_t^\top E_d V_t` for every token and output dimension, and gradients.

Where each of ``D`` dimensions has a matrix of its own, the obvious way makes ``D M`` numbers a token. Here the products
of all features of a token are made once, and one matrix product with all matrices does the rest, in blocks of tokens
that stay in a processor's cache. (Making each product once, not twice, saves arithmetic and costs more in moving it.)
"""

from __future__ import annotations

import torch
from torch import Tensor, bmm

# Tokens of all sequences that are treated at a time, in the same memory: new memory costs more than its use.
_BLOCK = 512


def quadratic_form(features: Tensor, matrix: Tensor) -> Tensor:
    """Values of the form.

    Args:
        features: V, ``(H, rows, M)``.
        matrix: symmetric, ``(H, D, M, M)``.

    Returns:
        ``(H, rows, D)``.
    """
    if matrix.shape[1] == 1:
        return (bmm(features, matrix.squeeze(1)) * features).sum(-1, keepdim=True)
    flat, room = matrix.flatten(-2).mT, _room(features)
    return _joined([bmm(_products(block, room), flat) for block in _blocks(features)])


def quadratic_gradients(features: Tensor, matrix: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the form.

    Args:
        features: V, ``(H, rows, M)``.
        matrix: symmetric, ``(H, D, M, M)``.
        grad: of the values, ``(H, rows, D)``.

    Returns:
        Gradients by the features and by the matrix.
    """
    size = features.shape[-1]
    if matrix.shape[1] == 1:
        weighted = features * grad
        return bmm(weighted, matrix.squeeze(1)).mul_(2.0), bmm(features.mT, weighted).unsqueeze(1)
    flat, room = matrix.flatten(-2), _room(features)
    g_features, g_matrix = [], torch.zeros_like(flat)
    for block, g_block in zip(_blocks(features), _blocks(grad), strict=True):
        g_matrix.baddbmm_(g_block.mT, _products(block, room))
        weighted = bmm(g_block, flat, out=room[: block.shape[0] * block.shape[1] * size**2].view(*block.shape[:2], -1))
        g_features.append(bmm(weighted.view(-1, size, size), block.reshape(-1, size, 1)).view(block.shape))
    return _joined(g_features).mul_(2.0), g_matrix.view_as(matrix)


def _room(features: Tensor) -> Tensor:
    """Memory for the products of a block."""
    heads, _, size = features.shape
    return features.new_empty(heads * _blocks(features)[0].shape[1] * size**2)


def _products(features: Tensor, room: Tensor) -> Tensor:
    """Of every two features of a token, ``(H, rows, M * M)``, in the memory given."""
    heads, rows, size = features.shape
    products = room[: heads * rows * size**2].view(heads, rows, size, size)
    return torch.mul(features.unsqueeze(-1), features.unsqueeze(-2), out=products).flatten(-2)


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    # On other devices a block would be a launch and nothing else.
    return rows.split(_BLOCK, dim=1) if rows.device.type == "cpu" else (rows,)


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
