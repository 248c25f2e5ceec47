"""Elementwise functions of Gaussians: mean, variance and gain of g(h), h ~ N(m, v)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpseq.checks import check_count, check_floating
from gpseq.propagation.gelu import gelu_moments
from gpseq.propagation.piecewise import piecewise_linear_moments
from gpseq.propagation.quadrature import quadrature_moments, value_and_slope

_METHODS = ("moments", "tangent")


class Moments(NamedTuple):
    r"""Moments of g(h), elementwise, all of the shape of the input.

    The covariance of a vector of activations is :math:`\Gamma C \Gamma + \operatorname{diag}(\text{remainder})`, with
    Γ the diagonal matrix of gains and C the covariance of h.

    Attributes:
        mean: E g.
        gain: γ = E g'(h) = Cov(g(h), h) / v, the slope of the best line through g.
        remainder: the variance about that line, never negative, and not a difference of larger numbers.
        before: v.
    """

    mean: Tensor
    gain: Tensor
    remainder: Tensor
    before: Tensor

    @property
    def variance(self) -> Tensor:
        """Var g, which is ``gain**2 * v + remainder``."""
        return torch.addcmul(self.remainder, self.gain.square(), self.before)


@dataclass(frozen=True)
class Activation:
    """An elementwise function, and what is known of it.

    Attributes:
        name: what it is called.
        function: g, on tensors of any shape; must not write into its input.
        kinks: where it is not smooth, ascending; quadrature treats the pieces one by one.
        exact: mean, gain and remainder of g(h) as a function of m and v; without it they come by quadrature.

    Example:
        >>> wedge = Activation("wedge", torch.abs, kinks=(0.0,))
        >>> activation_moments(wedge, torch.zeros(1), torch.ones(1)).mean
        tensor([0.7979])
    """

    name: str
    function: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()
    exact: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)


def activation_moments(
    activation: str | Callable[[Tensor], Tensor],
    mean: Tensor,
    variance: Tensor,
    *,
    method: str = "moments",
    num_nodes: int | None = None,
) -> Moments:
    r"""Moments of an elementwise function of independent or jointly Gaussian inputs.

    .. math:: h \sim N(m, v): \quad E g(h), \quad \operatorname{Var} g(h) = \gamma^2 v + \text{remainder}, \quad
        \gamma = E g'(h) = \operatorname{Cov}(g(h), h) / v

    Closed forms for ReLU and its piecewise linear kin; closed up to one smooth integral for GELU; quadrature for
    everything else. Everything is differentiable in m and v. Where v = 0 the result is the tangent.

    Args:
        activation: a name (:data:`NAMES`), a module, a function of ``torch`` or ``torch.nn.functional``, an
            :class:`Activation`, or any elementwise function. A function that is not recognised has the moments of a
            smooth one: give it as an :class:`Activation` with its kinks if it has some.
        mean: m, any shape.
        variance: v, not negative (which is not checked), of a shape that broadcasts with that of m.
        method: ``"moments"``, or ``"tangent"`` for the function's linearisation at m: g(m), γ = g'(m), no remainder.
        num_nodes: nodes of the quadrature, see :func:`~gpseq.propagation.quadrature.quadrature_moments`.

    Returns:
        Mean, gain and remainder, and by them the variance, of the broadcast shape and the dtype of m; computed in
        float32 where that is a half precision.

    Raises:
        TypeError: an argument is of another type, or the dtypes differ.
        ValueError: there is no such name or method, or the shapes do not fit.

    Example:
        >>> activation_moments("relu", torch.tensor([0.5]), torch.tensor([0.25])).variance
        tensor([0.1878])
        >>> activation_moments(nn.GELU(), torch.tensor([0.5]), torch.tensor([0.25]), method="tangent").gain
        tensor([0.8675])
    """
    known = of_function(activation)
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}.")
    if num_nodes is not None:
        check_count("num_nodes", num_nodes, least=3)
    check_floating("mean", mean)
    check_floating("variance", variance)
    if variance.dtype != mean.dtype:
        raise TypeError(f"variance: expected the dtype of mean, {mean.dtype}, got {variance.dtype}.")
    try:
        mean, variance = torch.broadcast_tensors(mean, variance)
    except RuntimeError as error:
        raise ValueError(
            f"variance: expected a shape that broadcasts with that of mean, {tuple(mean.shape)}, got "
            f"{tuple(variance.shape)}."
        ) from error

    def rule(m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if method == "tangent":
            average, gain = value_and_slope(known.function, m)
            return average, gain, torch.zeros_like(average)
        if known.exact is not None:
            return known.exact(m, v)
        return quadrature_moments(known.function, m, v, known.kinks, num_nodes)

    dtype = mean.dtype
    if torch.finfo(dtype).bits < 32:
        mean, variance = mean.float(), variance.float()
    # A tangent is too short to gain from chunks; a function from elsewhere may depend on the shape of its input.
    chunked = method == "moments" and known.name in NAMES
    parts = _in_chunks(rule, mean, variance) if chunked else rule(mean, variance)
    return Moments(*(part.to(dtype) for part in (*parts, variance)))


def _in_chunks(
    rule: Callable[[Tensor, Tensor], tuple[Tensor, ...]], mean: Tensor, variance: Tensor
) -> tuple[Tensor, ...]:
    """An elementwise rule, on a CPU applied to pieces whose temporaries stay in the cache: several times as fast."""
    size = 32768 * torch.get_num_threads()  # torch gives each thread as much
    if mean.device.type != "cpu" or mean.numel() <= size:
        return rule(mean, variance)
    pieces = zip(mean.reshape(-1).split(size), variance.reshape(-1).split(size), strict=True)
    columns = zip(*(rule(m, v) for m, v in pieces), strict=True)
    return tuple(torch.cat(column).reshape(mean.shape) for column in columns)


def of_function(function: str | Callable[[Tensor], Tensor]) -> Activation:
    """The activation that a name, a function or a module stands for.

    Args:
        function: a name (:data:`NAMES`), a function of ``torch`` or ``torch.nn.functional``, such a function with
            keywords bound by ``functools.partial``, a module, or any other elementwise function.

    Returns:
        The activation; one without kinks or closed form for a function that is not recognised.

    Raises:
        TypeError: it is neither a string nor callable.
        ValueError: there is no activation of this name.

    Example:
        >>> of_function(torch.relu).name, of_function(partial(F.gelu, approximate="tanh")).name
        ('relu', 'gelu_tanh')
    """
    if isinstance(function, Activation):
        return function
    if isinstance(function, str):
        if function not in _NAMED:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, NAMES))}, got {function!r}.")
        return _NAMED[function]
    if isinstance(function, nn.Module):
        return of_module(function) or Activation(type(function).__name__, function)
    if not callable(function):
        raise TypeError(f"activation: expected a name or an elementwise function, got {type(function).__name__}.")
    bound = partial(function)  # of a partial function: its function, with its keywords
    module = None if bound.args else _MODULE_OF_FUNCTION.get(bound.func)
    known = of_module(module(**bound.keywords)) if module is not None else None
    return known or Activation(getattr(function, "__qualname__", type(function).__name__), function)


def of_module(module: nn.Module) -> Activation | None:
    """The activation that a module is, with the parameters that it has.

    Args:
        module: a module of ``torch.nn``, or an activation of Hugging Face's transformers or of timm, known by the name
            of its class. A subclass that overrides ``forward`` is something else.

    Returns:
        The activation, or ``None`` where the module is none that is known here: not elementwise, random, or foreign.

    Example:
        >>> of_module(nn.LeakyReLU(0.2)).name, of_module(nn.Softmax())
        ('leaky_relu', None)
    """
    kind = type(module)
    if kind.__module__.partition(".")[0] in _LIBRARIES and kind.__name__ in _FOREIGN:
        return _NAMED[_FOREIGN[kind.__name__]]
    for base in kind.__mro__:
        if base in _OF_TYPE:
            return _OF_TYPE[base](module) if kind.forward is base.forward else None
    return None


def _piecewise_linear(
    name: str,
    function: Callable[[Tensor], Tensor],
    kinks: tuple[float, ...],
    jumps: Sequence[float | Tensor],
    slope: float | Tensor = 0.0,
    offset: float = 0.0,
) -> Activation:
    exact = partial(piecewise_linear_moments, slope=slope, offset=offset, kinks=kinks, jumps=jumps)
    return Activation(name, function, kinks, exact)


def _leaky_relu(slope: float) -> Activation:
    return _piecewise_linear("leaky_relu", partial(F.leaky_relu, negative_slope=slope), (0.0,), [1 - slope], slope)


def _prelu(module: nn.PReLU) -> Activation | None:
    if module.num_parameters > 1:  # a slope for each channel, wherever those are
        return None
    return _piecewise_linear("prelu", module, (0.0,), [1 - module.weight], module.weight)


def _hardtanh(low: float, high: float) -> Activation:
    function = partial(F.hardtanh, min_val=low, max_val=high)
    return _piecewise_linear("hardtanh", function, (low, high), [1.0, -1.0], offset=low)


def _softshrink(width: float) -> Activation:
    function = partial(F.softshrink, lambd=width)
    return _piecewise_linear("softshrink", function, (-width, width), [-1.0, 1.0], slope=1.0, offset=width)


def _softplus(beta: float, threshold: float) -> Activation:
    # Beyond the threshold torch has the identity, which is a step of log(1 + exp(-threshold)) / beta.
    kinks = (threshold / beta,) if threshold < 15 else ()
    return Activation("softplus", partial(F.softplus, beta=beta, threshold=threshold), kinks)


def _elu(alpha: float) -> Activation:
    return Activation("elu", partial(F.elu, alpha=alpha), (0.0,))


def _celu(alpha: float) -> Activation:
    return Activation("celu", partial(F.celu, alpha=alpha), (0.0,))


def _identity_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return mean, torch.ones_like(mean), torch.zeros_like(mean)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))  # the second derivative of F.mish is NaN at large x


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_NAMED = {
    activation.name: activation
    for activation in (
        Activation("identity", lambda x: x, exact=_identity_moments),
        _piecewise_linear("relu", F.relu, (0.0,), [1.0]),
        _leaky_relu(0.01),
        _piecewise_linear("relu6", F.relu6, (0.0, 6.0), [1.0, -1.0]),
        _hardtanh(-1.0, 1.0),
        _piecewise_linear("hardsigmoid", F.hardsigmoid, (-3.0, 3.0), [1 / 6, -1 / 6]),
        _softshrink(0.5),
        Activation("gelu", F.gelu, exact=gelu_moments),
        Activation("gelu_tanh", partial(F.gelu, approximate="tanh")),
        Activation("quick_gelu", _quick_gelu),
        Activation("silu", F.silu),
        Activation("mish", _mish),
        Activation("tanh", torch.tanh),
        Activation("sigmoid", torch.sigmoid),
        Activation("logsigmoid", F.logsigmoid),
        Activation("tanhshrink", F.tanhshrink),
        _softplus(1.0, 20.0),
        _elu(1.0),
        _celu(1.0),
        Activation("selu", F.selu, (0.0,)),
        Activation("softsign", F.softsign, (0.0,)),
        Activation("hardswish", F.hardswish, (-3.0, 3.0)),
        Activation("relu_squared", _relu_squared, (0.0,)),
    )
}

#: The activations that can be asked for by name.
NAMES: tuple[str, ...] = (*_NAMED,)

_OF_TYPE: dict[type[nn.Module], Callable[[Any], Activation | None]] = {
    nn.Identity: lambda module: _NAMED["identity"],
    nn.ReLU: lambda module: _NAMED["relu"],
    nn.LeakyReLU: lambda module: _leaky_relu(module.negative_slope),
    nn.PReLU: _prelu,
    nn.ReLU6: lambda module: _NAMED["relu6"],
    nn.Hardtanh: lambda module: _hardtanh(module.min_val, module.max_val),
    nn.Hardsigmoid: lambda module: _NAMED["hardsigmoid"],
    nn.Softshrink: lambda module: _softshrink(module.lambd),
    nn.GELU: lambda module: _NAMED["gelu" if module.approximate == "none" else "gelu_tanh"],
    nn.SiLU: lambda module: _NAMED["silu"],
    nn.Mish: lambda module: _NAMED["mish"],
    nn.Tanh: lambda module: _NAMED["tanh"],
    nn.Sigmoid: lambda module: _NAMED["sigmoid"],
    nn.LogSigmoid: lambda module: _NAMED["logsigmoid"],
    nn.Tanhshrink: lambda module: _NAMED["tanhshrink"],
    nn.Softplus: lambda module: _softplus(module.beta, module.threshold),
    nn.ELU: lambda module: _elu(module.alpha),
    nn.CELU: lambda module: _celu(module.alpha),
    nn.SELU: lambda module: _NAMED["selu"],
    nn.Softsign: lambda module: _NAMED["softsign"],
    nn.Hardswish: lambda module: _NAMED["hardswish"],
}

# The keywords of a function are those of its module.
_MODULE_OF_FUNCTION: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    F.leaky_relu: nn.LeakyReLU,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.hardsigmoid: nn.Hardsigmoid,
    F.softshrink: nn.Softshrink,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    F.logsigmoid: nn.LogSigmoid,
    F.tanhshrink: nn.Tanhshrink,
    F.softplus: nn.Softplus,
    F.elu: nn.ELU,
    F.celu: nn.CELU,
    torch.celu: nn.CELU,
    F.selu: nn.SELU,
    torch.selu: nn.SELU,
    F.softsign: nn.Softsign,
    F.hardswish: nn.Hardswish,
}

# Classes of libraries that need not be there.
_LIBRARIES = {"transformers", "transformers_modules", "timm"}
_FOREIGN = {
    "AccurateGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "LinearActivation": "identity",
    "Mish": "mish",
    "MishActivation": "mish",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu_squared",
    "SiLUActivation": "silu",
    "Sigmoid": "sigmoid",
    "Swish": "silu",
    "Tanh": "tanh",
}
