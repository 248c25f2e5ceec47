"""Rules of linear maps, and of functions that are layers."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpseq.propagation.attention import Heads, heads_map
from gpseq.propagation.following import Interpreter
from gpseq.propagation.moments import LinearMap
from gpseq.propagation.operations.arithmetic import add, multiply
from gpseq.propagation.operations.entries import join
from gpseq.propagation.operations.table import handles, known, positive
from gpseq.propagation.registry import find
from gpseq.propagation.tracing import CannotFollow
from gpseq.propagation.values import Several, Value, Weight

# Linear maps


@handles("mean", torch.mean)
def mean(run: Interpreter, value: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    """The average over some dimensions."""
    value = run.value(value)
    count = math.prod(value.shape[d] for d in _reduced(value, dim))
    return _sum(run, value, dim, keepdim, 1 / count)


@handles("sum", torch.sum)
def total(run: Interpreter, value: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    """The sum over some dimensions."""
    return _sum(run, run.value(value), dim, keepdim, 1.0)


def _reduced(value: Value, dim: Any) -> list[int]:
    dims = range(value.dim) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return [positive(value, d) for d in dims]


def _sum(run: Interpreter, value: Value, dim: Any, keepdim: bool, factor: float) -> Value:
    dims = _reduced(value, dim)
    axes = [value.axis(d) for d in dims]
    after = value.batch
    if after is not None and not keepdim:
        after = after - sum(d < after for d in dims)
    if not keepdim and len(axes) == len(value.state.event):
        raise CannotFollow("{operation} leaves a single number")
    tokens = -1 not in axes

    def blocks(x: Tensor) -> Tensor:
        return x.sum([axis - 1 for axis in axes], keepdim=keepdim) * factor**2

    return run.map(
        value,
        push=lambda x: x.sum(axes, keepdim=keepdim) * factor,
        squared=lambda v: v.sum(axes, keepdim=keepdim) * factor**2,
        batch=after,
        blocks=blocks if tokens else None,
        mixes=True,
    )


@handles(torch.matmul, operator.matmul, "matmul", "__matmul__", torch.bmm, "bmm", torch.mm, "mm")
def matmul(run: Interpreter, first: Any, second: Any) -> Value:
    r"""A product of matrices: of weights, certain ones, or both uncertain.

    Both uncertain, it is the tangent at their means: :math:`\mathrm d(A B) = \mathrm dA\, B + A\, \mathrm dB`.
    """
    first = first.first if isinstance(first, Several) else first
    second = second.first if isinstance(second, Several) else second
    if isinstance(second, Weight) and not isinstance(first, Weight):
        return linear(run, first, Weight(second.parameter, second.uses, not second.transposed))
    if isinstance(first, Value) and isinstance(second, Tensor) and second.dim() == 2:
        return linear(run, first, second.mT)
    items = [known(run, first), known(run, second)]
    if any(len(item.shape) < 2 for item in items):
        raise CannotFollow("{operation} has a rule for matrices only")
    shape, batch = run.common(items, [[*item.shape[:-2], 1, 1] for item in items])
    if batch is not None and batch >= len(shape) - 2:
        raise CannotFollow("{operation} goes over the batch")
    wide: list[Any] = []
    for number, item in enumerate(items):
        size = [*shape[:-2], *item.shape[-2:]]
        if isinstance(item, Value):
            wide.append(run.expand(item, size, batch, keep=[*wide, *items[number + 1 :]]))
        else:
            item = item.expand(size)
            wide.append(item.unsqueeze(0) if batch is None else item.movedim(batch, 0))
    left, right = (item.state.mean if isinstance(item, Value) else item for item in wide)
    if not isinstance(wide[0], Value):
        return _from_left(run, left, wide[1], batch)
    if not isinstance(wide[1], Value):
        return _from_right(run, wide[0], right, batch)
    with run.holding(wide[1]):
        one = _from_right(run, wide[0], right, batch)
    with run.holding(one):
        other = _from_left(run, left, wide[1], batch)
    # Each has the product of the means.
    return run.apply(run.add(one, other), lambda state: state.shift(-(left @ right)))


def _from_left(run: Interpreter, matrix: Tensor, value: Value, batch: int | None) -> Value:
    """Tokens that are mixed by a matrix that is certain."""
    return run.map(
        value,
        push=lambda x: matrix @ x,
        squared=lambda v: matrix.square() @ v,
        batch=batch,
        blocks=lambda x: torch.einsum("...st,...tij->...sij", matrix.square(), x),
        mixes=True,
    )


def _from_right(run: Interpreter, value: Value, matrix: Tensor, batch: int | None) -> Value:
    """Features that are mixed by one."""
    return run.map(
        value,
        push=lambda x: x @ matrix,
        squared=lambda v: v @ matrix.square(),
        batch=batch,
        blocks=lambda x: matrix.mT.unsqueeze(-3) @ x @ matrix.unsqueeze(-3),
        mixes=True,
    )


@handles(F.linear)
def linear(run: Interpreter, value: Any, weight: Any, bias: Any = None) -> Value:
    """A matrix of weights."""
    if isinstance(value, Tensor):
        value = run.before(value, nn.Identity())
    value = run.value(value)
    if value.batch == value.dim - 1:
        raise CannotFollow("{operation} goes over the batch")
    if isinstance(weight, Value | Several) or isinstance(bias, Value | Several):
        raise CannotFollow("{operation} multiplies uncertain numbers with each other")
    turned = isinstance(weight, Weight) and weight.transposed
    matrix = weight.parameter if isinstance(weight, Weight) else weight
    shift = bias.parameter if isinstance(bias, Weight) else bias
    return run.apply(value, lambda state: run.walk.linear(state, matrix, shift, transposed=turned))


@handles(torch.softmax, F.softmax, "softmax")
def softmax(run: Interpreter, value: Any, dim: int | None = None, dtype: Any = None, **unused: Any) -> Value:
    """Its tangent at the mean."""
    return _softmax(run, value, dim, dtype, log=False)


@handles(torch.log_softmax, F.log_softmax, "log_softmax")
def log_softmax(run: Interpreter, value: Any, dim: int | None = None, dtype: Any = None, **unused: Any) -> Value:
    """Its tangent at the mean."""
    return _softmax(run, value, dim, dtype, log=True)


def _softmax(run: Interpreter, value: Any, dim: int | None, dtype: Any, log: bool) -> Value:
    value = run.value(value)
    if dim is None or run.walk.options.scores == "frozen":
        raise CannotFollow("{operation} needs dim" if dim is None else "{operation} has no rule in this preset")
    axis = value.axis(dim)
    weights = value.state.mean.softmax(axis)
    gain = torch.ones_like(weights) if log else weights

    def push(x: Tensor) -> Tensor:
        return gain * (x - (weights * x).sum(axis, keepdim=True))

    def squared(v: Tensor) -> Tensor:
        spread = (1 - 2 * weights) * v + (weights.square() * v).sum(axis, keepdim=True)
        return gain.square() * spread.clamp_min(0)

    mean = value.state.mean.log_softmax(axis) if log else weights
    # In the precision of the numbers themselves, whatever the forward asks for.
    linear = LinearMap(push, squared, mixes=axis != -1)
    return run.apply(value, lambda state: state.apply(mean, linear))


# Functions that are modules


def _as_module(run: Interpreter, value: Any, module: nn.Module) -> Value:
    value = run.value(value)
    rule = find(module)
    if rule is None:
        raise CannotFollow("{operation} has no rule for uncertain numbers")
    return run.apply(value, lambda state: rule(module, state, run.walk))


def _register_module(function: Any, kind: type[nn.Module], *targets: Any) -> None:
    @handles(function, *targets)
    def rule(run: Interpreter, value: Any, *args: Any, **kwargs: Any) -> Value:
        kwargs.pop("inplace", None)
        if run.value(value).batch not in (0, None):
            raise CannotFollow("{operation} expects the batch first")
        return _as_module(run, value, kind(*args, **kwargs).eval())


_LAYERS: tuple[tuple[Any, type[nn.Module]], ...] = (
    (F.adaptive_avg_pool1d, nn.AdaptiveAvgPool1d),
    (F.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d),
    (F.adaptive_max_pool1d, nn.AdaptiveMaxPool1d),
    (F.adaptive_max_pool2d, nn.AdaptiveMaxPool2d),
    (F.avg_pool1d, nn.AvgPool1d),
    (F.avg_pool2d, nn.AvgPool2d),
    (F.max_pool1d, nn.MaxPool1d),
    (F.max_pool2d, nn.MaxPool2d),
    (F.pixel_shuffle, nn.PixelShuffle),
)
for _function, _kind in _LAYERS:
    _register_module(_function, _kind)


@handles(F.layer_norm, torch.layer_norm)
def layer_norm(
    run: Interpreter, value: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Norm over the last dimensions."""
    return _normed(run, value, nn.LayerNorm(normalized_shape, eps, elementwise_affine=False), weight, bias)


@handles(F.rms_norm, torch.rms_norm)
def rms_norm(run: Interpreter, value: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """Norm by the root mean square over the last dimensions."""
    return _normed(run, value, nn.RMSNorm(normalized_shape, eps, elementwise_affine=False), weight, None)


def _normed(run: Interpreter, value: Any, module: Any, weight: Any, bias: Any) -> Any:
    value = run.value(value)
    if value.batch is not None and value.batch >= value.dim - len(module.normalized_shape):
        raise CannotFollow("{operation} goes over the batch")
    out: Any = _as_module(run, value, module)
    out = out if weight is None else multiply(run, out, weight)
    return out if bias is None else add(run, out, bias)


@handles(F.normalize)
def normalize(run: Interpreter, value: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Value:
    """Length one over the last dimension."""
    value = run.value(value)
    if p != 2 or positive(value, dim) != value.dim - 1:
        raise CannotFollow("{operation} has a rule for the Euclidean norm over the last dimension only")
    width = value.shape[-1]
    out = _normed(run, value, nn.RMSNorm(width, eps=eps**2 / width, elementwise_affine=False), None, None)
    return multiply(run, out, width**-0.5)


@handles(F.scaled_dot_product_attention)
def attention(
    run: Interpreter,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Softmax attention of one sequence with itself."""
    parts = [known(run, part) for part in (query, key, value)]
    if run.walk.options.form not in ("full", "lowrank"):
        raise CannotFollow("{operation} has a rule in the forms 'full' and 'lowrank' only")
    if dropout_p or enable_gqa or any(len(part.shape) != 4 for part in parts):
        raise CannotFollow("{operation} has a rule for queries, keys and values (B, H, T, D) without dropout")
    if len({part.shape[:3] for part in parts}) > 1 or any(isinstance(p, Value) and p.batch != 0 for p in parts):
        raise CannotFollow("{operation} has a rule for one sequence with itself")
    if isinstance(attn_mask, Value | Weight | Several):
        raise CannotFollow("{operation} has a mask that is uncertain")
    states = [part.state.mean if isinstance(part, Value) else part for part in parts]
    length = states[0].shape[2]
    mask = attn_mask
    if is_causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=states[0].device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=states[0].dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    heads = Heads.of(states[0], states[1], states[2], mask, scale)
    widths = [part.shape[3] for part in parts]
    if len(set(widths)) > 1:
        raise CannotFollow("{operation} has a rule for values as wide as keys")
    laid: list[Any] = []
    for number, part in enumerate(parts):
        if isinstance(part, Value):
            keep = [*laid, *parts[number + 1 :]]
            laid.append(run.move(part, lambda x: x.transpose(1, 2).flatten(2), 0, keep))
        else:
            laid.append(part.transpose(1, 2).flatten(2))
    packed = join(run, laid, -1)
    frozen = run.walk.options.scores == "frozen"
    out = run.apply(
        packed,
        lambda state: state.apply(heads.output.transpose(1, 2).flatten(2), heads_map(heads, frozen=frozen)),
    )
    number = heads.query.shape[1]
    return run.move(out, lambda x: x.unflatten(-1, (number, -1)).transpose(1, 2), 0)


@handles(F.dropout, torch.dropout)
def dropout(run: Interpreter, value: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    """Nothing in eval mode, or a source of variance."""
    if training:
        raise CannotFollow("{operation} draws: give it training=self.training, with the model in eval mode")
    return _as_module(run, value, nn.Dropout(p).eval())
