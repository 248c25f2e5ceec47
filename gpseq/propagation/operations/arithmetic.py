"""Rules of sums, products and elementwise functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpseq.propagation.activations import Activation
from gpseq.propagation.following import Interpreter
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.operations.entries import join
from gpseq.propagation.operations.table import elementwise, handles, known
from gpseq.propagation.products import gated, product
from gpseq.propagation.tracing import CannotFollow
from gpseq.propagation.values import Several, Value, Weight

# Sums and products


@handles(operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__")
def add(run: Interpreter, first: Any, second: Any, alpha: float = 1) -> Value:
    """A sum; of states, with the covariance between them."""
    if alpha != 1:
        second = multiply(run, second, alpha)
    shape, batch = run.common(first_second := [known(run, first), known(run, second)])
    values = [item for item in first_second if isinstance(item, Value)]
    if len(values) == 1:
        (value,) = values
        (other,) = [item for item in first_second if not isinstance(item, Value)]
        value = run.expand(value, shape, batch)
        offset = run.constant(other, shape, batch, value.state.mean)
        return run.apply(value, lambda state: state.shift(offset))
    left = run.expand(values[0], shape, batch, keep=[values[1]])
    right = left if values[1] is values[0] else run.expand(values[1], shape, batch, keep=[left])
    return run.add(left, right)


@handles(operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "__sub__")
def subtract(run: Interpreter, first: Any, second: Any, alpha: float = 1) -> Value:
    """A difference."""
    return add(run, first, second, alpha=-alpha)


@handles("__rsub__", torch.rsub)
def subtract_from(run: Interpreter, first: Any, second: Any) -> Value:
    """A difference, the other way round."""
    return add(run, second, first, alpha=-1)


@handles(operator.neg, torch.neg, "neg", "__neg__")
def negate(run: Interpreter, value: Any) -> Value:
    """The same with the other sign."""
    return multiply(run, value, -1.0)


@handles(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "__mul__", "__rmul__")
def multiply(run: Interpreter, first: Any, second: Any) -> Any:
    """A product, with a constant, a parameter or another state."""
    if not isinstance(first, Value | Weight | Several) and not isinstance(second, Value | Weight | Several):
        return first * second
    for one, other in ((first, second), (second, first)):
        # The noise of a parameter that is used once is independent of all else.
        if isinstance(one, Weight) and not one.transposed and one.uses == 1 and isinstance(other, Value | Several):
            scaled = _by_parameter(run, run.value(other), one.parameter)
            if scaled is not None:
                return scaled
    items = [known(run, first), known(run, second)]
    shape, batch = run.common(items)
    values = [item for item in items if isinstance(item, Value)]
    if len(values) == 1:
        (value,) = values
        (other,) = [item for item in items if not isinstance(item, Value)]
        value = run.expand(value, shape, batch)
        gain = run.constant(other, shape, batch, value.state.mean).to(value.state.mean.dtype)
        return run.apply(value, lambda state: state.scale(gain.expand_as(state.mean)))
    if values[0] is values[1]:
        return elementwise(run, values[0], torch.square)
    left = run.expand(values[0], shape, batch, keep=[values[1]])
    right = run.expand(values[1], shape, batch, keep=[left])
    if run.walk.options.form == "full":
        both = join(run, [left, right], -1 if batch != len(shape) - 1 else -2)
        dim = left.axis(-1 if batch != len(shape) - 1 else -2)
        return run.apply(both, lambda state: gated(state, run.walk, None, dim=dim))
    tangent = run.walk.options.activations == "tangent"
    return Value(product(left.state, right.state, tangent), batch)


def _by_parameter(run: Interpreter, value: Value, parameter: Tensor) -> Value | None:
    """A state times a parameter that broadcasts to it: the two are independent."""
    shape, batch = run.common([value, Value(GaussianState(parameter.detach().unsqueeze(0)), None)])
    sizes = list(parameter.shape)
    if batch is not None and len(sizes) >= len(shape) - batch:
        if sizes.pop(batch - len(shape)) != 1:
            return None
    expanded = run.expand(value, shape, batch)
    return run.apply(expanded, lambda state: run.walk.affine(state, parameter, shape=sizes))


@handles(operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_", "__truediv__")
def divide(run: Interpreter, first: Any, second: Any) -> Value:
    """By a constant."""
    if isinstance(second, Value | Weight | Several):
        raise CannotFollow("{operation} divides by uncertain numbers")
    return multiply(run, first, 1 / second)


@handles(operator.pow, torch.pow, "pow", "__pow__")
def power(run: Interpreter, value: Any, exponent: Any) -> Value:
    """A whole power."""
    if not isinstance(exponent, int | float) or exponent != int(exponent) or not 1 <= exponent <= 8:
        raise CannotFollow("{operation} has another exponent than a small whole number")
    return elementwise(run, value, partial(torch.pow, exponent=int(exponent)))


@handles(torch.where, "where")
def where(run: Interpreter, first: Any, second: Any, third: Any) -> Value:
    """A choice that is certain."""
    condition, yes, no = (second, first, third) if isinstance(first, Value | Weight) else (first, second, third)
    if not isinstance(condition, Tensor):
        raise CannotFollow("{operation} chooses by uncertain numbers")
    parts: list[Any] = []
    for choice, other in ((condition, yes), (~condition, no)):
        if isinstance(other, Value | Weight | Several):
            with run.holding(*parts):
                parts.append(multiply(run, other, choice))
        else:  # not a product: infinity is left out, too
            parts.append(torch.where(choice, other, torch.zeros((), device=condition.device)))
    return add(run, *parts)


@handles("masked_fill", "masked_fill_", torch.masked_fill)
def masked_fill(run: Interpreter, value: Any, mask: Any, fill: Any) -> Value:
    """A number instead of some entries."""
    return where(run, mask, fill, value)


# Elementwise functions


def _register_elementwise(function: Callable[..., Tensor], names: Sequence[str], *targets: Any) -> None:
    """A rule for an elementwise function whose further arguments have these names."""

    @handles(function, *targets)
    def rule(run: Interpreter, value: Any, *args: Any, **kwargs: Any) -> Value:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop("inplace", None)
        return elementwise(run, value, partial(function, **given) if given else function)


for _function, _names, _targets in (
    (F.relu, ("inplace",), (torch.relu, torch.relu_, F.relu_, "relu", "relu_")),
    (F.relu6, ("inplace",), ()),
    (F.leaky_relu, ("negative_slope", "inplace"), ()),
    (F.gelu, ("approximate",), ()),
    (F.silu, ("inplace",), ()),
    (F.mish, ("inplace",), ()),
    (torch.tanh, (), (F.tanh, "tanh", "tanh_")),
    (torch.sigmoid, (), (F.sigmoid, "sigmoid", "sigmoid_")),
    (F.logsigmoid, (), ()),
    (F.tanhshrink, (), ()),
    (F.softplus, ("beta", "threshold"), ()),
    (F.elu, ("alpha", "inplace"), ()),
    (F.celu, ("alpha", "inplace"), (torch.celu,)),
    (F.selu, ("inplace",), (torch.selu,)),
    (F.softsign, (), ()),
    (F.hardswish, ("inplace",), ()),
    (F.hardsigmoid, ("inplace",), ()),
    (F.hardtanh, ("min_val", "max_val", "inplace"), ()),
    (torch.exp, (), ("exp",)),
    (torch.sin, (), ("sin",)),
    (torch.cos, (), ("cos",)),
    (torch.erf, (), ("erf",)),
    (torch.square, (), ("square",)),
):
    _register_elementwise(_function, _names, *_targets)


@handles(torch.abs, operator.abs, "abs")
def absolute(run: Interpreter, value: Any) -> Value:
    """Without the sign."""
    return elementwise(run, value, Activation("abs", torch.abs, (0.0,)))


# What leaves the numbers alone


@handles("contiguous", "clone", torch.clone, "detach", torch.detach, "requires_grad_")
def same(run: Interpreter, value: Any, *args: Any, **kwargs: Any) -> Value:
    """The value as it is."""
    return run.value(value)


@handles("to", "float", "double", "type_as", "type", "cpu", "cuda")
def cast(run: Interpreter, value: Any, *args: Any, **kwargs: Any) -> Value:
    """The value as it is, in its dtype."""
    if run.node.meta["value"].dtype != run.value(value).state.mean.dtype:
        raise CannotFollow("{operation} changes the dtype of uncertain numbers")
    return run.value(value)
