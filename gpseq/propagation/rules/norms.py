r"""Rules of norms: their Jacobian at the mean, in time that is linear in the width.

With :math:`\hat x` the normalised input and :math:`\gamma` the weight, every norm here over D entries has

.. math:: J = \operatorname{diag}(\gamma / \sigma) \bigl( I - c\, 1 1^\top / D - \hat x \hat x^\top / D \bigr)

where c is one for those that take the mean away, and zero for others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import check_number
from gpseq.propagation.moments import GaussianState, LinearMap
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk


def norm_map(normal: Tensor, inverse: Tensor, dims: Sequence[int], centred: bool, frozen: bool = False) -> LinearMap:
    """The tangent of a norm without weights.

    Args:
        normal: the normalised input, ``(B, *event)``.
        inverse: one by the deviation, broadcastable to it.
        dims: negative ones, over which the norm goes.
        centred: whether the mean is taken away.
        frozen: whether mean and deviation are constants.
    """
    dims = tuple(dims)
    size = math.prod(normal.shape[dim] for dim in dims)

    def push(columns: Tensor) -> Tensor:
        if frozen:
            return columns * inverse
        left = torch.addcmul(columns, (columns * normal).mean(dims, keepdim=True), normal, value=-1)
        if centred:
            left = left - columns.mean(dims, keepdim=True)
        return left * inverse

    def squared(variance: Tensor) -> Tensor:
        if frozen:
            return variance * inverse.square()

        def total(x: Tensor) -> Tensor:
            return x.sum(dims, keepdim=True) / size**2

        square = normal.square()
        shrunk = variance * (1 - 2 * (square + float(centred)) / size) + square * total(variance * square)
        if centred:
            shrunk = shrunk + total(variance) + 2 * normal * total(variance * normal)
        # Sums of squares, but for rounding where a single entry has all of the variance.
        return shrunk.clamp_min(0) * inverse.square()

    return LinearMap(push, squared, mixes=dims != (-1,) and not frozen)


def normalise(state: GaussianState, walk: Walk, dim: int = -1, eps: float = 1e-12) -> GaussianState:
    r"""Vectors of length one, :math:`\hat y = y / \lVert y \rVert`.

    .. math:: J = (I - \hat y \hat y^\top) / \lVert y \rVert

    What ``torch.nn.functional.normalize`` does: embeddings of sentences, keys and queries of some attention.

    Args:
        state: ``(B, *event)``.
        walk: of the network; ``layer_norm="frozen"`` takes the length for a constant.
        dim: of the vectors, negative or counted with the batch.
        eps: the least length that is divided by.

    Returns:
        The state of the same shape.

    Raises:
        ValueError: ``dim`` is that of the batch or none of the state's, or ``eps`` is negative.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> from gpseq.propagation.moments import Diagonal
        >>> from gpseq.propagation.walk import Options
        >>> walk = Walk(nn.Identity(), from_variances({}).bind(nn.Identity()), Options(form="diag"))
        >>> state = GaussianState(torch.tensor([[3.0, 4.0]]), Diagonal(torch.ones(1, 2)))
        >>> normalise(state, walk).variance  # nothing is left along (3, 4)
        tensor([[0.0256, 0.0144]])
    """
    check_number("eps", eps, above=-math.ulp(0.0), expected="a number that is not negative")
    dims = state.mean.dim()
    if not -dims < dim < dims or dim == 0:
        raise ValueError(f"dim: expected a dimension of an event of shape {state.event}, got {dim}.")
    dim = dim if dim < 0 else dim - dims
    length = torch.linalg.vector_norm(state.mean, dim=dim, keepdim=True)
    inverse = 1 / length.clamp_min(eps)
    unit = state.mean * inverse
    # Below eps the length is a constant. Elsewhere: a norm by the root mean square, of vectors of that length.
    normal = torch.where(length > eps, unit, 0.0) * math.sqrt(unit.shape[dim])
    frozen = walk.options.layer_norm == "frozen"
    return state.apply(unit, norm_map(normal, inverse, (dim,), centred=False, frozen=frozen))


def affine(
    state: GaussianState,
    walk: Walk,
    weight: Tensor | None,
    bias: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> GaussianState:
    """Weight and bias of a norm, see :meth:`gpseq.propagation.walk.Walk.affine`."""
    return walk.affine(state, weight, bias, shape)


def standardise(state: GaussianState, walk: Walk, dims: Sequence[int], eps: float, centred: bool) -> GaussianState:
    """A norm without weights, over some dimensions.

    Args:
        state: ``(B, *event)``.
        walk: of the network.
        dims: negative ones.
        eps: added to the mean square.
        centred: whether the mean is taken away.
    """
    dims = tuple(dims)
    mean = state.mean - state.mean.mean(dims, keepdim=True) if centred else state.mean
    inverse = (mean.square().mean(dims, keepdim=True) + eps).rsqrt()
    normal = mean * inverse
    frozen = walk.options.layer_norm == "frozen"
    return state.apply(normal, norm_map(normal, inverse, dims, centred, frozen))


@register(nn.LayerNorm)
def layer_norm(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Norm over the last dimensions."""
    dims = range(-len(module.normalized_shape), 0)
    return walk.affine(standardise(state, walk, dims, module.eps, centred=True), module.weight, module.bias)


@register(nn.RMSNorm)
def rms_norm(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Norm by the root mean square over the last dimensions."""
    dims = range(-len(module.normalized_shape), 0)
    eps = torch.finfo(state.mean.dtype).eps if module.eps is None else module.eps
    return walk.affine(standardise(state, walk, dims, eps, centred=False), module.weight)


def _is_foreign_rms_norm(module: nn.Module) -> bool:
    """Norms of Hugging Face's transformers, one class a model family, and of timm."""
    name = type(module).__name__
    if not (name.lower().endswith("rmsnorm") or name == "T5LayerNorm"):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and _eps(module) is not None


def _eps(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", None)
    found = getattr(module, "eps", None) if found is None else found
    return found if isinstance(found, float) else None


@register(_is_foreign_rms_norm)
def foreign_rms_norm(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """The same of other libraries, known by name; some families have the weight as what is added to one."""
    eps = _eps(module)
    assert eps is not None
    out = standardise(state, walk, (-1,), eps, centred=False)
    # The name does not say what the weight does, but the module's own output does.
    plain, weight = module(state.mean), module.weight
    tolerance = 16 * torch.finfo(state.mean.dtype).eps * (1 + plain.abs().max())
    if weight.shape == state.mean.shape[-1:] and plain.shape == state.mean.shape:
        if (plain - out.mean * weight).abs().max() <= tolerance:
            return walk.affine(out, weight)
        if (plain - out.mean * (1 + weight)).abs().max() <= tolerance:
            return walk.affine(out, weight, offset=1.0)
    return walk.unknown(module, state)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Running statistics, which are constants: an affine map of each channel."""
    if module.running_mean is None or module.running_var is None:
        raise NotImplementedError(
            f"model: expected running statistics in {walk.path(module)}, got a {type(module).__name__} that uses those "
            "of the batch also in eval mode."
        )
    shape = _channels(state)
    inverse = (module.running_var + module.eps).rsqrt().reshape(shape)
    shifted = state.shift(-module.running_mean.reshape(shape))
    return walk.affine(shifted.scale(inverse.expand_as(state.mean)), module.weight, module.bias, shape)


@register(nn.GroupNorm)
def group_norm(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Norm over the positions of a group of channels."""
    groups = module.num_groups
    grouped = state.mean.reshape(len(state.mean), groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt()
    inner = norm_map(centred * inverse, inverse, (-1,), centred=True, frozen=walk.options.layer_norm == "frozen")
    outer = LinearMap(
        push=lambda u: inner.push(u.reshape(*u.shape[:2], groups, -1)).reshape(u.shape),
        squared=lambda v: inner.squared(v.reshape(len(v), groups, -1)).reshape(v.shape),
        mixes=len(state.event) > 1,
    )
    out = state.apply((centred * inverse).reshape(state.mean.shape), outer)
    return walk.affine(out, module.weight, module.bias, _channels(state))


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Norm over the positions of each channel, or running statistics where they are tracked."""
    if module.track_running_stats and not module.training:
        return batch_norm(module, state, walk)
    dims = range(1 - len(state.event), 0)
    out = standardise(state, walk, dims, module.eps, centred=True)
    return walk.affine(out, module.weight, module.bias, _channels(state))


def _channels(state: GaussianState) -> tuple[int, ...]:
    """The shape in which a number for each channel broadcasts with events ``(C, *positions)``."""
    return (-1, *[1] * (len(state.event) - 1))
