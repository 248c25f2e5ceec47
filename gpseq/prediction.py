"""One door to the prediction of every model: Gaussian processes, and networks whose layers draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood, MultitaskGaussianLikelihood
from gpytorch.models import GP
from gpytorch.models.deep_gps import DeepGP
from torch import Tensor, distributions, nn

from gpseq.checks import check_count
from gpseq.nn.generator import use_generator
from gpseq.predictive import Predictive

#: What :func:`predict` can do.
METHODS = ("sample", "moments")
#: Inputs that torch's layers give to pairs of positions, not to elements of the batch.
PAIR_MASKS = ("attn_mask", "mask", "src_mask", "tgt_mask", "memory_mask")


def predict(
    model: nn.Module,
    x: Tensor | Mapping[str, Any],
    method: str = "sample",
    num_samples: int = 10,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    likelihood: Likelihood | None = None,
    *,
    batch_dim: int = 0,
    shared: Sequence[str] = (),
    **inputs: Any,
) -> Predictive:
    r"""Predict with a model, whatever it is.

    ``"sample"`` draws. A Gaussian process draws functions, joint over the points. Any other module is called once on
    the batch repeated ``num_samples`` times, so that what depends on parameters alone is computed once; its layers draw
    anew for every copy. ``"moments"`` is one pass: a Gaussian process gives its posterior, and a module with
    ``conditional(x, **inputs) -> (mean, covariance)`` what that returns.

    The model is in eval mode meanwhile, and every submodule is in its own mode again at the end. Gradients flow unless
    the caller turned them off.

    Args:
        model: a GPyTorch model, or anything whose call gives a ``MultivariateNormal``; or a module that returns logits
            or values ``(B, ..., E)`` as a tensor, first in a tuple, as ``logits`` of a mapping or an object, or as a
            ``Normal`` or ``Categorical``.
        x: a tensor, or a mapping of arguments, ``model(**x)``.
        method: ``"sample"`` or ``"moments"``.
        num_samples: S, number of draws.
        generator: where they come from, for Gaussian processes and the layers of ``gpseq.nn``; ``None`` is torch's
            default generator. Other layers that draw use the default one in any case.
        batch_size: elements of the batch at a time, before they are repeated; ``None`` takes all at once. The draws
            are others then. Not for Gaussian processes, which are joint over the points.
        likelihood: a Gaussian one of GPyTorch, whose noise variances become the prediction's ``noise``.
        batch_dim: batch dimension of the inputs and the output; 1 for sequence-first models. Masks with torch's names
            (those that end in ``padding_mask``, and those below) have the batch first always.
        shared: names of inputs that all elements of the batch share.
        inputs: further arguments of the model. Tensors of size B along the batch dimension are repeated with x, all
            else is handed on as it is. Square matrices with torch's names of masks on pairs of positions
            (``attn_mask``, ``mask``, ``src_mask``, ``tgt_mask``, ``memory_mask``) are shared even where B is their
            size; of three dimensions, those masks are repeated in groups, one for each head.

    Returns:
        The prediction; a network's draws are ``(S, B, ..., E)``, where an output without a last dimension E, ``(B,)``,
        gets one of size 1. For a Gaussian process the n points are the event, see
        :meth:`~gpseq.predictive.Predictive.pointwise`.

    Raises:
        TypeError: the model, its output, x or the likelihood is of a kind that this cannot handle.
        ValueError: an unknown method, x without elements, or sizes that do not fit.

    Example:
        >>> predict(nn.Linear(3, 2), torch.zeros(5, 3))
        Predictive(samples=10, batch_shape=(5,), event_shape=(2,), dtype=float32, device=cpu)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}.")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    if isinstance(model, DeepGP):
        raise TypeError("model: expected one layer, or modules of gpseq.nn, got a DeepGP, whose call draws by itself.")
    check_count("num_samples", num_samples)
    check_count("batch_dim", batch_dim, least=0)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    _check_likelihood(likelihood)
    call = _Call.of(x, inputs, batch_dim, (shared,) if isinstance(shared, str) else tuple(shared))
    with _in_eval(model), use_generator(model, generator):
        if isinstance(model, GP):
            result = _from_process(call.run(model), batch_size, likelihood)
        elif method == "sample":
            result = _draw(model, call, num_samples, batch_size, likelihood)
        else:
            result = _conditional(model, call, batch_size, likelihood)
    if method == "moments" or result.samples is not None:
        return result
    return Predictive.from_samples(
        result.rsample(num_samples, generator), noise=result.noise, event_dim=result.event_dim
    )


@dataclass(frozen=True)
class _Call:
    """The arguments of a model.

    Attributes:
        first: x, where it is a tensor.
        named: all others.
        axes: for ``None`` (x) and each name that follows the batch: its batch dimension.
        size: B.
        batch_dim: of the output.
    """

    first: Tensor | None
    named: dict[str, Any]
    axes: dict[str | None, int]
    size: int
    batch_dim: int

    @classmethod
    def of(cls, x: Any, inputs: dict[str, Any], batch_dim: int, shared: tuple[str, ...]) -> _Call:
        """Find out which arguments follow the batch."""
        if isinstance(x, Tensor):
            first, named = x, dict(inputs)
            lead: tuple[str | None, Tensor] = (None, x)
        elif isinstance(x, Mapping):
            twice = sorted(set(x) & set(inputs))
            if twice:
                raise TypeError(f"inputs: expected each argument once, got {', '.join(twice)} in x as well.")
            first, named = None, {**x, **inputs}
            others = {*shared, *PAIR_MASKS}
            tensors = [(key, value) for key, value in x.items() if isinstance(value, Tensor) and key not in others]
            if not tensors:
                raise TypeError("x: expected a mapping with tensors that are not shared, got none.")
            lead = tensors[0]
        else:
            raise TypeError(f"x: expected a tensor or a mapping of tensors, got {type(x).__name__}.")
        unknown = sorted(set(shared) - set(named))
        if unknown:
            raise ValueError(f"shared: expected names of inputs, got {', '.join(unknown)}, which {_there(named)}.")
        name, value = lead
        axis = _axis(name, batch_dim)
        if value.dim() <= axis or value.numel() == 0 or value.shape[axis] == 0:
            where = "x" if name is None else f"x[{name!r}]"
            raise ValueError(
                f"{where}: expected at least one element along dimension {axis}, got shape {tuple(value.shape)}."
            )
        size = value.shape[axis]
        axes: dict[str | None, int] = {name: axis}
        for key, other in named.items():
            if isinstance(other, Tensor) and key not in shared and _follows(key, other, size, batch_dim):
                axes[key] = _axis(key, batch_dim)
        return cls(first, named, axes, size, batch_dim)

    def run(self, function: Callable[..., Any]) -> Any:
        """Call a function with the arguments."""
        return function(**self.named) if self.first is None else function(self.first, **self.named)

    def repeated(self, times: int) -> _Call:
        """The batch several times over, copies behind one another."""
        return self._changed(lambda t, axis: torch.cat([t] * times, dim=axis), self.size * times)

    def pieces(self, batch_size: int | None) -> Iterator[_Call]:
        """The batch in pieces."""
        if batch_size is None or batch_size >= self.size:
            yield self
            return
        for start in range(0, self.size, batch_size):
            length = min(batch_size, self.size - start)

            def cut(t: Tensor, axis: int, start: int = start, length: int = length) -> Tensor:
                group = t.shape[axis] // self.size
                return t.narrow(axis, start * group, length * group)

            yield self._changed(cut, length)

    def _changed(self, function: Callable[[Tensor, int], Tensor], size: int) -> _Call:
        made: dict[tuple[int, int], Tensor] = {}

        def change(value: Tensor, axis: int) -> Tensor:  # what was one tensor stays one: query, key and value
            key = (id(value), axis)
            if key not in made:
                made[key] = function(value, axis)
            return made[key]

        first = None if self.first is None else change(self.first, self.axes[None])
        named = {k: change(v, self.axes[k]) if k in self.axes else v for k, v in self.named.items()}
        return _Call(first, named, self.axes, size, self.batch_dim)


def _axis(name: str | None, batch_dim: int) -> int:
    """Batch dimension of an argument; torch's masks have it first even where sequences come first."""
    return 0 if name is not None and (name.endswith("padding_mask") or name in PAIR_MASKS) else batch_dim


def _follows(name: str, value: Tensor, size: int, batch_dim: int) -> bool:
    """Whether an input has a part for each element of the batch."""
    axis = _axis(name, batch_dim)
    if name in PAIR_MASKS:
        if value.dim() == 3:
            return value.shape[0] % size == 0
        if value.dim() == 2 and value.shape[0] == value.shape[1]:
            return False
    return value.dim() > axis and value.shape[axis] == size


def _there(named: Mapping[str, Any]) -> str:
    return f"are not among {', '.join(sorted(named))}" if named else "are not there: there are no inputs"


def _draw(
    model: nn.Module, call: _Call, num_samples: int, batch_size: int | None, likelihood: Likelihood | None
) -> Predictive:
    """Draws of a network, or the posterior where the module turns out to be a Gaussian process."""
    results = []
    for piece in call.pieces(batch_size):
        output = piece.repeated(num_samples).run(model)
        if isinstance(output, MultivariateNormal):  # joint over points: copies of them would be the same draw
            return _from_process(call.run(model), batch_size, likelihood)
        values, noise = _values(output)
        samples, axis = _split(values, num_samples, piece)
        if noise is not None:
            if likelihood is not None:
                raise TypeError("likelihood: expected none beside a model that returns a Normal, got one.")
            noise = _split(noise, num_samples, piece)[0]
        elif likelihood is not None:
            noise = _noise(likelihood, samples)
        results.append(Predictive.from_samples(samples, noise=noise))
    return Predictive.cat(results, axis) if len(results) > 1 else results[0]


def _conditional(model: nn.Module, call: _Call, batch_size: int | None, likelihood: Likelihood | None) -> Predictive:
    """The Gaussian of a module that offers one."""
    if not callable(getattr(model, "conditional", None)):
        output = call.run(model)
        if isinstance(output, MultivariateNormal):
            return _from_process(output, batch_size, likelihood)
        raise TypeError(
            "model: method 'moments' takes a GPyTorch model, or a module with conditional(x) -> (mean, covariance), "
            f"got {type(model).__name__}; method 'sample' takes any."
        )
    results = []
    for piece in call.pieces(batch_size):
        mean, covariance = piece.run(model.conditional)  # type: ignore[arg-type]
        # A tensor of the shape of the mean has the variances only.
        is_variance = isinstance(covariance, Tensor) and covariance.shape == mean.shape
        noise = None if likelihood is None else _noise(likelihood, mean)
        moments = {"variance" if is_variance else "covariance": covariance}
        results.append(Predictive.from_moments(mean, noise=noise, **moments))
        axis = _output_axis(mean, piece.size, piece.batch_dim)
    return Predictive.cat(results, axis) if len(results) > 1 else results[0]


def _from_process(output: Any, batch_size: int | None, likelihood: Likelihood | None) -> Predictive:
    if not isinstance(output, MultivariateNormal):
        raise TypeError(
            f"model: expected one whose call gives a MultivariateNormal in eval mode, got {type(output).__name__}."
        )
    if batch_size is not None:
        raise ValueError(
            f"batch_size: a Gaussian process predicts all points jointly, got {batch_size}; call predict for parts."
        )
    noise = None if likelihood is None else _noise(likelihood, output.mean)
    return Predictive.from_distribution(output, noise=noise)


def _values(output: Any) -> tuple[Tensor, Tensor | None]:
    """Logits or values in what a network returned, and their noise variances if it says so."""
    if isinstance(output, distributions.Independent):
        return _values(output.base_dist)
    if isinstance(output, distributions.Normal):
        return output.mean, output.variance
    if isinstance(output, distributions.Categorical | distributions.OneHotCategorical):
        return output.logits, None
    if not isinstance(output, Tensor | distributions.Distribution):
        if isinstance(output, Mapping) and "logits" in output:
            output = output["logits"]
        elif hasattr(output, "logits"):
            output = output.logits
        elif isinstance(output, tuple) and output:
            output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = f"a tensor in {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            "model: expected an output that is a floating-point tensor, a tuple that begins with one, a mapping or an "
            f"object with logits, a Normal or a Categorical, got {got}."
        )
    return output, None


def _output_axis(value: Tensor, size: int, batch_dim: int) -> int:
    """Where an output ``(..., E)`` has the batch: at its place, or first where the sequence is gone."""
    for axis in dict.fromkeys((batch_dim, 0)):
        if axis < value.dim() - 1 and value.shape[axis] == size:
            return axis
    raise ValueError(
        f"model: expected an output with the {size} elements of the batch along dimension {batch_dim} or 0, and the "
        f"event last, got shape {tuple(value.shape)}; does one of the inputs belong into shared, or out of it?"
    )


def _split(value: Tensor, num_samples: int, piece: _Call) -> tuple[Tensor, int]:
    """``(..., S B, ..., E)`` as ``(S, ..., B, ..., E)``, and the place of the batch dimension behind S."""
    value = value.unsqueeze(-1) if value.dim() == 1 else value
    axis = _output_axis(value, num_samples * piece.size, piece.batch_dim)
    return value.unflatten(axis, (num_samples, piece.size)).movedim(axis, 0), axis


def _check_likelihood(likelihood: Any) -> None:
    if likelihood is None:
        return
    from gpseq.models.observations import is_gaussian

    multitask = isinstance(likelihood, MultitaskGaussianLikelihood)
    if not (isinstance(likelihood, Likelihood) and (is_gaussian(likelihood) or multitask)):
        raise TypeError(
            f"likelihood: expected a Gaussian one, got {type(likelihood).__name__}; for others draw f and hand the "
            "draws to the likelihood."
        )
    if multitask and likelihood.rank > 0:
        raise TypeError("likelihood: expected noise that is independent between tasks, got a rank above 0.")


def _noise(likelihood: Likelihood, values: Tensor) -> Tensor:
    """Noise variances at function values, in their shape."""
    # GPyTorch warns, and takes the noise of other points for none.
    if isinstance(likelihood, FixedNoiseGaussianLikelihood) and likelihood.noise.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"likelihood: expected noise for {values.shape[-1]} points, got fixed noise for "
            f"{likelihood.noise.shape[-1]}; Predictive.from_distribution(model(x), noise=) takes any."
        )
    return likelihood(values).variance.expand(values.shape)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, and then every module in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        if any(modes.values()):
            model.eval()
        yield
    finally:
        # GPyTorch's models drop what they cached for predictions when they are told to train.
        for module, training in modes.items():
            if training and type(module).train is not nn.Module.train:
                module.train()
        for module, training in modes.items():
            module.training = training
