"""One door to the prediction of every model: Gaussian processes, and networks whose layers draw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood, MultitaskGaussianLikelihood
from gpytorch.models import GP
from gpytorch.models.deep_gps import DeepGP
from gpytorch.models.model_list import AbstractModelList
from linear_operator import LinearOperator
from linear_operator.operators import RootLinearOperator, SumLinearOperator
from torch import Tensor, nn

from gpseq.checks import check_count, stacklevel_outside
from gpseq.logits import network_output
from gpseq.nn.generator import undisturbed, use_generator
from gpseq.nn.projection import ProjectedAttention
from gpseq.nn.temperature import recording, temperature
from gpseq.predictive import Predictive
from gpseq.variational.whitened_points import WhitenedPointsStrategy

if TYPE_CHECKING:
    from gpseq.reconfiguration.rollout import Record

#: What :func:`predict` can do.
METHODS = ("sample", "moments", "variance_temperature")
#: Numbers in a state up to which a network of sources carries all of its covariance; beyond, columns, which are draws.
FULL_UP_TO = 128
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
    batch_dim: int | None = None,
    shared: Sequence[str] = (),
    batched: Sequence[str] = (),
    antithetic: bool = False,
    **inputs: Any,
) -> Predictive:
    r"""Predict with a model, whatever it is.

    ``"sample"`` draws. A Gaussian process draws functions, joint over the points. Any other module is called once on
    the batch repeated ``num_samples`` times, so that what depends on parameters alone is computed once; its layers draw
    anew for every copy. ``"moments"`` is one pass: a Gaussian process gives its posterior, and a module with
    ``conditional(x, **inputs) -> (mean, covariance)`` what that returns; a network with such modules inside, or with
    the chain of a :class:`gpseq.reconfiguration.Distiller`, gives its moments by :func:`gpseq.propagation.propagate`,
    which draws columns where states are large. ``"variance_temperature"`` is one pass without draws: logits are divided
    by a temperature that the variances of the layers ask for, see :func:`gpseq.nn.calibrate`.

    The model is in eval mode meanwhile, and every submodule is in its own mode again at the end. Gradients flow unless
    the caller turned them off. What the layers of ``gpseq.nn`` and the strategies of sparse-GP attention remember of
    the call before stays, and so does their divergence.

    Args:
        model: a GPyTorch model, a ``StreamingEnsemble`` (its members' draws by weight, or their mixture's moments), or
            anything whose call gives a ``MultivariateNormal``; or a module that returns logits or values
            ``(B, ..., E)`` as a tensor, first in a tuple, as ``logits`` of a mapping or an object, or as a ``Normal``
            or ``Categorical``.
        x: a tensor, or a mapping of arguments, ``model(**x)``.
        method: ``"sample"``, ``"moments"`` or ``"variance_temperature"``.
        num_samples: S, number of draws.
        generator: where they come from, for Gaussian processes and the layers of ``gpseq.nn``; ``None`` is torch's
            default generator. Other layers that draw use the default one in any case.
        batch_size: elements of the batch at a time, before they are repeated; ``None`` takes all at once. The draws
            are others then. Not for Gaussian processes, which are joint over the points.
        likelihood: a Gaussian one of GPyTorch, whose noise variances become the prediction's ``noise``.
        batch_dim: batch dimension of the inputs and the output; ``None`` is 0. It is 1 for models whose inputs are
            ``(T, B, E)``, which attention and recurrent layers take unless they are made with ``batch_first=True``:
            with 0 there, sequences would be joined into longer ones. A model that is such a layer is checked, and so
            is a ``Sequential`` that begins with one; where one lies deeper, ``None`` warns. Masks with torch's names
            (those that end in ``padding_mask``, and those below) have the batch first always.
        shared: names of inputs that all elements of the batch share.
        batched: names of inputs that are repeated with x, where the rules below say otherwise: a padding mask
            ``(B, T)`` with the name ``mask`` where B is T.
        antithetic: for ``"sample"`` of a student of :class:`gpseq.reconfiguration.Distiller`: whether half of the draws
            have the noise of the other half with the sign changed.
        inputs: further arguments of the model. Tensors of size B along the batch dimension are repeated with x, all
            else is handed on as it is. Square matrices with torch's names of masks on pairs of positions
            (``attn_mask``, ``mask``, ``src_mask``, ``tgt_mask``, ``memory_mask``) are shared even where B is their
            size; of three dimensions, those masks are repeated in groups, one for each head.

    Returns:
        The prediction. That by a temperature has the scores ``"temperature"``, ``"variance"`` (the mean over layers
        and heads, relative to the data that covariances were fitted to), both ``(B,)``, and ``"variance.NAME"`` for
        each layer, ``(B, H)``; for logits of tokens, ``(B, T, classes)``, tokens have their own. A network's draws are
        ``(S, B, ..., E)``, where an output without a last dimension E, ``(B,)``, gets one of size 1. For a Gaussian
        process the n points are the event, see
        :meth:`~gpseq.predictive.Predictive.pointwise`.

    Raises:
        RuntimeError: ``"variance_temperature"`` for a model without fitted covariances or calibrated temperature.
        TypeError: the model, its output, x or the likelihood is of a kind that this cannot handle.
        ValueError: an unknown method, x without elements, sizes that do not fit, or a ``batch_dim`` that is not that of
            the layer.

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
    if isinstance(model, AbstractModelList):
        raise TypeError(f"model: expected one model, got {type(model).__name__}; predict with each of its models.")
    check_count("num_samples", num_samples)
    axis = 0 if batch_dim is None else check_count("batch_dim", batch_dim, least=0)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    _check_likelihood(likelihood)
    # Imported here, because most models need no chain and no stream.
    from gpseq.models.ensemble import StreamingEnsemble
    from gpseq.reconfiguration.rollout import Rollout, drawing

    if antithetic and not (method == "sample" and any(isinstance(part, Rollout) for part in model.modules())):
        raise ValueError("antithetic: expected it with method 'sample' of a student of a Distiller, got another model.")
    call = _Call.of(x, inputs, axis, _names("shared", shared), _names("batched", batched))
    _check_layout(model, call, batch_dim)
    with undisturbed(model), _remembering(model), _in_eval(model), use_generator(model, generator):
        if isinstance(model, StreamingEnsemble):
            members = [_from_process(call.run(member), batch_size, likelihood) for member in model.members]
            result = _mixture(members, model.weights, num_samples if method == "sample" else None, generator)
        elif isinstance(model, GP):
            result = _from_process(call.run(model), batch_size, likelihood)
        elif method == "sample":
            copies = num_samples if antithetic else 0
            with drawing(model, copies):
                result = _draw(model, call, num_samples, batch_size, likelihood)
        elif method == "variance_temperature":
            result = _temper(model, call, batch_size, likelihood)
        else:
            result = _conditional(model, call, batch_size, likelihood, generator)
    if method != "sample" or result.samples is not None:
        return result
    return Predictive.from_samples(
        result.rsample(num_samples, generator), noise=result.noise, event_dim=result.event_dim
    )


@dataclass(frozen=True)
class _Call:
    """The arguments of a model.

    Attributes:
        first: x, where it is a tensor.
        lead: name of the input that has the batch's size, ``None`` for x.
        named: all others.
        axes: for ``None`` (x) and each name that follows the batch: its batch dimension.
        size: B.
        batch_dim: of the output.
    """

    first: Tensor | None
    lead: str | None
    named: dict[str, Any]
    axes: dict[str | None, int]
    size: int
    batch_dim: int

    @classmethod
    def of(cls, x: Any, inputs: dict[str, Any], batch_dim: int, shared: set[str], batched: set[str]) -> _Call:
        """Find out which arguments follow the batch."""
        if isinstance(x, Tensor):
            first, named = x, dict(inputs)
            lead: tuple[str | None, Tensor] = (None, x)
        elif isinstance(x, Mapping):
            twice = sorted(set(x) & set(inputs))
            if twice:
                raise TypeError(f"inputs: expected each argument once, got {', '.join(twice)} in x as well.")
            first, named = None, {**x, **inputs}
            others = shared | (set(PAIR_MASKS) - batched)
            tensors = [(key, value) for key, value in x.items() if isinstance(value, Tensor) and key not in others]
            if not tensors:
                raise TypeError("x: expected a mapping with tensors that are not shared, got none.")
            lead = tensors[0]
        else:
            raise TypeError(f"x: expected a tensor or a mapping of tensors, got {type(x).__name__}.")
        for argument, names in (("shared", shared), ("batched", batched)):
            if unknown := sorted(names - set(named)):
                raise ValueError(
                    f"{argument}: expected names of inputs, got {', '.join(unknown)}, which {_there(named)}."
                )
        if both := sorted(shared & batched):
            raise ValueError(f"batched: expected names that are not in shared, got {', '.join(both)}.")
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
            place = _axis(key, batch_dim)
            if key in batched:
                if not isinstance(other, Tensor) or other.dim() <= place or other.shape[place] % size:
                    got = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
                    raise ValueError(
                        f"batched: expected {key} to be a tensor with {size} elements along dimension {place}, got "
                        f"{got}."
                    )
                axes[key] = place
            elif isinstance(other, Tensor) and key not in shared and _follows(key, other, size, batch_dim):
                axes[key] = place
        return cls(first, name, named, axes, size, batch_dim)

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
        return _Call(first, self.lead, named, self.axes, size, self.batch_dim)


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


def _names(argument: str, names: Any) -> set[str]:
    """Names of inputs, one or several."""
    several = (names,) if isinstance(names, str) else names
    if not isinstance(several, Collection) or not all(isinstance(name, str) for name in several):
        raise TypeError(f"{argument}: expected names of inputs, got {names!r}.")
    return set(several)


def _batch_first(module: nn.Module) -> bool | None:
    """Whether a layer takes ``(B, T, E)`` or ``(T, B, E)``; ``None`` for a module that says nothing about it."""
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder | nn.Sequential):
        inside = module if isinstance(module, nn.Sequential) else module.layers
        return _batch_first(inside[0]) if len(inside) else None
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return _batch_first(module.self_attn)
    if isinstance(module, nn.MultiheadAttention | nn.Transformer | nn.RNNBase | ProjectedAttention):
        return bool(module.batch_first)
    return None


def _check_layout(model: nn.Module, call: _Call, batch_dim: int | None) -> None:
    """Whether the batch is where layers on sequences have it: repeating along another dimension joins sequences."""
    batch_first = _batch_first(model)
    if batch_first is not None:
        expected = 0 if batch_first else 1
        if call.batch_dim != expected:
            shape = "(B, T, E)" if batch_first else "(T, B, E)"
            raise ValueError(
                f"batch_dim: expected {expected}, as the model takes {shape} (batch_first={batch_first}), got "
                f"{call.batch_dim}."
            )
        lead = call.first if call.lead is None else call.named[call.lead]
        if lead is not None and lead.dim() == 2 and lead.is_floating_point():
            where = "x" if call.lead is None else f"x[{call.lead!r}]"
            raise ValueError(
                f"{where}: expected a batch of sequences, as the model would take {tuple(lead.shape)} for one sequence "
                f"without a batch; give x.unsqueeze({expected})."
            )
    elif batch_dim is None and any(_batch_first(module) is False for module in model.modules()):
        warnings.warn(
            f"model: {type(model).__name__} has layers inside that take sequences first (batch_first=False), and "
            "batch_dim is not given; say batch_dim=1 if the model's inputs are (T, B, ...), or batch_dim=0 if they are "
            "(B, T, ...).",
            UserWarning,
            stacklevel=stacklevel_outside(),
        )


def _draw(
    model: nn.Module, call: _Call, num_samples: int, batch_size: int | None, likelihood: Likelihood | None
) -> Predictive:
    """Draws of a network, or the posterior where the module turns out to be a Gaussian process."""
    from gpseq.reconfiguration.rollout import recording_steps

    results = []
    for piece in call.pieces(batch_size):
        with recording_steps(model, states=False) as records:
            output = piece.repeated(num_samples).run(model)
        if isinstance(output, MultivariateNormal):  # joint over points: copies of them would be the same draw
            return _from_process(call.run(model), batch_size, likelihood)
        values, noise = network_output(output)
        samples, axis = _split(values, num_samples, piece)
        if noise is not None:
            if likelihood is not None:
                raise TypeError("likelihood: expected none beside a model that returns a Normal, got one.")
            noise = _split(noise, num_samples, piece)[0]
        elif likelihood is not None:
            noise = _noise(likelihood, samples)
        scores = _spreads(records[0], samples, num_samples, axis) if len(records) == 1 else None
        results.append(Predictive.from_samples(samples, noise=noise, scores=scores))
    return Predictive.cat(results, axis) if len(results) > 1 else results[0]


def _spreads(record: Record, samples: Tensor, num_samples: int, axis: int) -> dict[str, Tensor] | None:
    """Deviations along a chain, averaged over draws: of each element, or of each token where those have outputs."""
    depth = record.token_spread().unflatten(0, (num_samples, -1)).mean(0)  # (B, T, L)
    if samples.dim() == 3:
        depth = record.mean_over_tokens(depth)
    elif samples.dim() == 4 and samples.shape[2 - axis] == depth.shape[1]:
        depth = depth.transpose(0, axis)
    else:
        return None
    return {"spread": depth.mean(-1), "spread.depth": depth}


def _temper(model: nn.Module, call: _Call, batch_size: int | None, likelihood: Likelihood | None) -> Predictive:
    """Logits over the temperature that the variances of the layers ask for."""
    if likelihood is not None:
        raise TypeError("likelihood: expected none beside a temperature, which is for logits, got one.")
    results = []
    for piece in call.pieces(batch_size):
        with recording(model) as record:
            output = piece.run(model)
        logits, noise = network_output(output)
        if noise is not None:
            raise TypeError("model: expected logits for method 'variance_temperature', got a Normal.")
        logits = logits.unsqueeze(-1) if logits.dim() == 1 else logits
        axis = _output_axis(logits, piece.size, piece.batch_dim)
        if logits.dim() > 3:
            raise ValueError(
                f"model: expected logits (B, classes) or (B, T, classes) for method 'variance_temperature', got "
                f"{tuple(logits.shape)}."
            )
        scores = record.scores(per_token=logits.dim() == 3)
        tau = temperature(model, scores)
        if tau.movedim(0, axis).shape != logits.shape[:-1]:
            raise ValueError(
                f"model: expected logits for each of the {tau.shape[-1]} tokens that its layers see, got "
                f"{tuple(logits.shape)}."
            )
        # In an encoder-decoder, tokens of the encoder are not those of the logits.
        scores = {name: score for name, score in scores.items() if score.shape[:-1] == tau.shape}
        named = {f"variance.{name}": score for name, score in scores.items()}
        named |= {"variance": torch.stack([s.mean(-1) for s in scores.values()]).mean(0), "temperature": tau}
        named = {name: score.movedim(0, axis) for name, score in named.items()}
        tempered = (logits / named["temperature"].unsqueeze(-1)).to(logits.dtype)
        results.append(Predictive.from_samples(tempered.unsqueeze(0), scores=named))
    return Predictive.cat(results, axis) if len(results) > 1 else results[0]


def _conditional(
    model: nn.Module,
    call: _Call,
    batch_size: int | None,
    likelihood: Likelihood | None,
    generator: torch.Generator | None,
) -> Predictive:
    """The Gaussian of a module that offers one."""
    if not isinstance(model, GP) and not callable(getattr(model, "conditional", None)) and _has_sources(model):
        return _propagated(model, call, batch_size, likelihood, generator)
    if not callable(getattr(model, "conditional", None)):
        output = call.run(model)
        if isinstance(output, MultivariateNormal):
            return _from_process(output, batch_size, likelihood)
        raise TypeError(
            "model: method 'moments' takes a GPyTorch model, or a module with conditional(x) -> (mean, covariance) or "
            f"with such modules inside, got {type(model).__name__}; method 'sample' takes any."
        )
    results = []
    for piece in call.pieces(batch_size):
        mean, covariance = _moments(piece.run(model.conditional))  # type: ignore[arg-type]
        noise = None if likelihood is None else _noise(likelihood, mean)
        results.append(Predictive.from_moments(mean, covariance, noise=noise))
        axis = _output_axis(mean, piece.size, piece.batch_dim)
    return Predictive.cat(results, axis) if len(results) > 1 else results[0]


def _has_sources(model: nn.Module) -> bool:
    """Whether parts of a network know their own moments."""
    return any(
        callable(getattr(part, name, None)) for part in model.modules() for name in ("conditional", "propagate_moments")
    )


def _propagated(
    model: nn.Module,
    call: _Call,
    batch_size: int | None,
    likelihood: Likelihood | None,
    generator: torch.Generator | None,
) -> Predictive:
    """Moments of a network whose layers are sources of variance, and whose weights are certain."""
    # Here, because most models need no rules.
    from gpseq.propagation import from_variances, plan, propagate

    x = call.named if call.first is None else call.first
    named: dict[str, Any] = {"batch_dim": call.batch_dim, **({} if call.first is None else call.named)}
    nothing = from_variances({})
    size = plan(model, nothing, x, "lowrank", chunk_size=batch_size, **named).largest
    form = "full" if size <= FULL_UP_TO else "lowrank"
    found = propagate(model, nothing, x, form, chunk_size=batch_size, generator=generator, **named)
    if likelihood is None:
        return found
    return Predictive.from_moments(found.mean, found.covariance, noise=_noise(likelihood, found.mean))


def _moments(given: Any) -> tuple[Tensor, Tensor | LinearOperator]:
    """What ``conditional`` returned, checked."""
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"conditional: expected it to return (mean, covariance), got {type(given).__name__}.")
    mean, covariance = given
    if not isinstance(mean, Tensor) or not mean.is_floating_point() or mean.dim() == 0:
        got = f"{mean.dtype} of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
        raise TypeError(f"conditional: expected a mean that is a floating-point tensor (..., E), got {got}.")
    if not isinstance(covariance, Tensor | LinearOperator):
        raise TypeError(f"conditional: expected a covariance (..., E, E), got {type(covariance).__name__}.")
    if covariance.dim() < 2 or covariance.shape[-2:] != (mean.shape[-1], mean.shape[-1]):
        raise ValueError(
            f"conditional: expected a covariance (..., {mean.shape[-1]}, {mean.shape[-1]}) beside a mean of shape "
            f"{tuple(mean.shape)}, got {tuple(covariance.shape)}; variances come as a DiagLinearOperator."
        )
    return mean, covariance


def _mixture(
    members: list[Predictive], weights: Tensor, num_samples: int | None, generator: torch.Generator | None
) -> Predictive:
    """A mixture of Gaussians: draws from members that are drawn by weight, or its first two moments."""
    weights = weights.to(members[0].dtype)
    noises = [member.noise for member in members if member.noise is not None]
    if num_samples is not None:
        chosen = torch.multinomial(weights.detach(), num_samples, replacement=True, generator=generator)
        samples = members[0].mean.new_empty(num_samples, *members[0].mean.shape)
        for number in chosen.unique().tolist():
            which = (chosen == number).nonzero().squeeze(-1)
            samples = samples.index_copy(0, which, members[number].rsample(len(which), generator))
        noise = torch.stack(noises)[chosen] if noises else None
        return Predictive.from_samples(samples, noise=noise)
    means = torch.stack([member.mean for member in members])
    mean = torch.einsum("e,e...->...", weights, means)
    root = ((means - mean) * weights.sqrt().view(-1, *[1] * mean.dim())).movedim(0, -1)
    within = [member.covariance * weight for member, weight in zip(members, weights, strict=True)]
    covariance = SumLinearOperator(*within, RootLinearOperator(root))  # by name: `+` would evaluate some of them
    return Predictive.from_moments(mean, covariance, noise=noises[0] if noises else None)


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
def _remembering(model: nn.Module) -> Iterator[None]:
    """Strategies that know the divergence of their last call know that of the call before, as layers do."""
    before = [
        (module, module._last, module._brought)
        for module in model.modules()
        if isinstance(module, WhitenedPointsStrategy)
    ]
    try:
        yield
    finally:
        for strategy, last, brought in before:
            strategy._last, strategy._brought = last, brought


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
