"""One forward pass that carries mean and covariance through a network with uncertain weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import gpseq.propagation.rules  # noqa: F401, registers them
from gpseq.checks import check_count
from gpseq.prediction_checks import check_generator
from gpseq.predictive import Predictive
from gpseq.propagation.moments import FORMS, GaussianState
from gpseq.propagation.posteriors import BoundPosterior, WeightPosterior
from gpseq.propagation.walk import Options, Walk

#: Arguments that a state begins with, before any other tensor.
LEADS = ("input_ids", "inputs_embeds", "pixel_values", "x")
#: Arguments that go with no element of the batch.
_PLACES = ("positions", "outputs", "logits_to_keep")
#: Entries of a state, tokens times features, up to which ``"auto"`` keeps all covariances.
FULL_UP_TO = 4096
#: The published rules: marginal variances, tangents, and whatever is shared taken to be independent.
STREAMLINED = Options(
    form="diag", activations="tangent", layer_norm="frozen", scores="frozen", values="independent", rescale=False
)


@dataclass(frozen=True)
class Plan:
    """How a propagation will be done.

    Attributes:
        form: of the covariance.
        largest: entries of the largest state, tokens times features.
        bytes_per_element: an estimate of the memory that one element of the batch takes at the most.
        chunk_size: elements of the batch at a time.
    """

    form: str
    largest: int
    bytes_per_element: int
    chunk_size: int


def propagate(
    model: nn.Module,
    posterior: WeightPosterior,
    x: Tensor | Mapping[str, Any],
    covariance: str = "auto",
    activations: str = "moments",
    layer_norm: str = "jacobian",
    on_unknown: str = "raise",
    num_tangents: int = 64,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
    *,
    preset: str | None = None,
    dropout: str = "off",
    noise: Tensor | float | None = None,
    batch_dim: int = 0,
    **inputs: Any,
) -> Predictive:
    r"""Mean and covariance of a network's outputs in one pass, for any Gaussian posterior of its weights.

    Args:
        model: in eval mode; modules with rules, see the table in the guide.
        posterior: of its weights.
        x: a tensor, or a mapping of arguments, ``model(**x)``.
        covariance: what travels. ``"full"`` is all of it, and exact but for what is not linear; ``"lowrank"``,
            ``num_tangents`` columns plus a diagonal; ``"blockdiag"``, that of the features of each token; ``"diag"``,
            marginals. ``"auto"`` is ``"full"`` up to 4,096 numbers a state, where memory allows it, and ``"lowrank"``
            beyond; the prediction's ``notes["covariance"]`` says which.
        activations: ``"moments"``, exact for Gaussian inputs, or ``"tangent"``.
        layer_norm: ``"jacobian"``, or ``"frozen"``: mean and deviation of a token are constants.
        on_unknown: ``"raise"`` or ``"linearise"``, for modules that have no rule and whose forward cannot be followed.
        num_tangents: R, columns that are drawn for ``"lowrank"``.
        chunk_size: elements of the batch at a time; ``None`` finds out from the memory.
        generator: of the draws; ``None`` is torch's default generator.
        preset: ``"streamlined"`` for the published rules; all options above but ``on_unknown`` are theirs then.
        dropout: ``"off"``, or ``"variance"``: dropout layers are a source of variance.
        noise: noise variances of observations, for regression, broadcastable to the outputs.
        batch_dim: of x; the prediction has the batch first in any case.
        inputs: further arguments of the model, such as masks.

    Returns:
        The prediction: outputs ``(B, K)`` with their covariance, or ``(B, T, K)``, whose event is ``(T, K)``.

    Raises:
        NotImplementedError: a module has no rule.
        RuntimeError: an uncertain parameter was not used, or the memory is too small.
        TypeError: x is in a dtype that the model does not take, or in half precision.
        ValueError: a posterior that does not fit the model, a model in train mode, inputs that are not finite, or an
            unknown option.

    Source:
        Li, Klasson, Solin and Trapp (2025), Streamlining prediction in Bayesian deep learning, for the idea and the
        preset; rules for shared weights, residual paths, norms and attention scores are derived in the guide.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> posterior = from_variances({"2.weight": torch.full((2, 8), 0.1)})
        >>> propagate(model, posterior, torch.randn(5, 3))
        Predictive(Gaussian, batch_shape=(5,), event_shape=(2,), dtype=float32, device=cpu)
    """
    settings = Settings(
        covariance, activations, layer_norm, on_unknown, num_tangents, chunk_size, preset, dropout, noise, batch_dim
    )
    return planned(model, posterior, Call.of(x, inputs, batch_dim), settings, generator)[0]


def plan(
    model: nn.Module,
    posterior: WeightPosterior,
    x: Tensor | Mapping[str, Any],
    covariance: str = "auto",
    num_tangents: int = 64,
    chunk_size: int | None = None,
    *,
    preset: str | None = None,
    batch_dim: int = 0,
    **inputs: Any,
) -> Plan:
    """How :func:`propagate` would go about it, with the same arguments: which form, how much memory, which chunks.

    Runs the model once, as it is, on a single element of the batch.

    Args:
        model: as for :func:`propagate`, and so are all others.
        posterior: of its weights.
        x: inputs.
        covariance: a form, or ``"auto"``.
        num_tangents: columns that would be drawn.
        chunk_size: elements of the batch at a time; ``None`` finds out from the memory.
        preset: ``"streamlined"`` for the published rules.
        batch_dim: of x.
        inputs: further arguments of the model.

    Returns:
        The plan.

    Raises:
        RuntimeError: the memory is too small; the message states the estimate.
        TypeError: as for :func:`propagate`.
        ValueError: likewise.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> posterior = from_variances({"2.weight": torch.full((2, 8), 0.1)})
        >>> plan(model, posterior, torch.randn(5, 3), chunk_size=2)
        Plan(form='full', largest=8, bytes_per_element=3072, chunk_size=2)
    """
    settings = Settings(
        covariance, num_tangents=num_tangents, chunk_size=chunk_size, preset=preset, batch_dim=batch_dim
    )
    bound = posterior.bind(model)
    call = Call.of(x, inputs, batch_dim)
    check_model(model, call)
    return _plan(model, bound, call, settings)


@dataclass(frozen=True, eq=False)
class Settings:
    """The options of :func:`propagate`, checked; see there."""

    covariance: str = "auto"
    activations: str = "moments"
    layer_norm: str = "jacobian"
    on_unknown: str = "raise"
    num_tangents: int = 64
    chunk_size: int | None = None
    preset: str | None = None
    dropout: str = "off"
    noise: Tensor | float | None = None
    batch_dim: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("covariance", ("auto", *FORMS)),
            ("activations", ("moments", "tangent")),
            ("layer_norm", ("jacobian", "frozen")),
            ("on_unknown", ("raise", "linearise")),
            ("dropout", ("off", "variance")),
            ("preset", (None, "streamlined")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}.")
        check_count("num_tangents", self.num_tangents)
        check_count("batch_dim", self.batch_dim, least=0)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)

    @property
    def options(self) -> Options:
        """Of the walk; the form may be ``"auto"``."""
        if self.preset is not None:
            return replace(STREAMLINED, on_unknown=self.on_unknown)
        return Options(
            form=self.covariance,
            activations=self.activations,
            layer_norm=self.layer_norm,
            on_unknown=self.on_unknown,
            dropout=self.dropout,
        )


def planned(
    model: nn.Module, posterior: WeightPosterior, call: Call, settings: Settings, generator: torch.Generator | None
) -> tuple[Predictive, Plan]:
    """What :func:`propagate` does, and how it was done.

    Args:
        model: as for :func:`propagate`.
        posterior: of its weights.
        call: arguments of the model.
        settings: options.
        generator: of the draws.
    """
    check_generator(generator)
    bound = posterior.bind(model)
    check_model(model, call)
    chosen = _plan(model, bound, call, settings)
    # One set of draws for all chunks: the prediction does not depend on their size.
    options = replace(settings.options, form=chosen.form)
    walk = Walk(model, bound, options, settings.num_tangents, generator, call.lead, call.batch_dim)
    results = []
    with exact_kernels():
        for part in call.chunks(chosen.chunk_size):
            state = walk.restarted()(model, GaussianState(part.first), **part.named)
            results.append(as_predictive(state))
            unused = walk.unused()
            if unused:
                raise RuntimeError(
                    f"posterior: {', '.join(unused)} is uncertain, and no rule has asked for it: its variance would be "
                    "lost. Is it used by a functional call, or not at all?"
                )
    found = results[0] if len(results) == 1 else Predictive.cat(results)
    if settings.noise is not None:  # of the whole batch, whatever the chunks were
        found = Predictive.from_moments(found.mean, found.covariance, noise=settings.noise, event_dim=found.event_dim)
    return found.noted(covariance=chosen.form), chosen


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a model, the batch first.

    Attributes:
        first: the input that a state begins with, ``(B, ...)``.
        lead: its name, ``None`` if it stands first.
        named: all others.
        batch_dim: where the model has the batch.
    """

    first: Tensor
    lead: str | None
    named: dict[str, Any]
    batch_dim: int = 0

    @classmethod
    def of(cls, x: Tensor | Mapping[str, Any], inputs: Mapping[str, Any], batch_dim: int = 0) -> Call:
        """Check what came."""
        if isinstance(x, Tensor):
            first, lead, named = x, None, dict(inputs)
        elif isinstance(x, Mapping):
            named = {**x, **inputs}
            tensors = [name for name, value in x.items() if isinstance(value, Tensor)]
            if not tensors:
                raise TypeError("x: expected a tensor or a mapping with tensors, got none.")
            lead = next((name for name in LEADS if name in tensors), tensors[0])
            first = named.pop(lead)
        else:
            raise TypeError(f"x: expected a tensor or a mapping of tensors, got {type(x).__name__}.")
        if first.dim() <= batch_dim or first.numel() == 0:
            raise ValueError(f"x: expected at least one element along dimension {batch_dim}, got {tuple(first.shape)}.")
        if first.is_complex():
            raise TypeError(f"x: expected float32 or float64, got {first.dtype}.")
        if first.is_floating_point():
            if first.dim() < 2:
                raise ValueError(f"x: expected a batch of inputs, (B, ...), got shape {tuple(first.shape)}.")
            if first.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"x: expected float32 or float64, got {first.dtype}.")
            if not first.isfinite().all():
                raise ValueError(f"x: expected finite numbers, got {int((~first.isfinite()).sum())} that are not.")
        return cls(first.movedim(batch_dim, 0), lead, named, batch_dim)

    def chunks(self, size: int) -> Iterator[Call]:
        """Parts of the batch; inputs that have as many elements along their first dimension go along."""
        batch = len(self.first)
        if size >= batch:
            yield self
            return
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            named = {name: _part(name, value, rows, batch) for name, value in self.named.items()}
            yield replace(self, first=self.first[rows], named=named)


def _part(name: str, value: Any, rows: slice, batch: int) -> Any:
    """The rows of an input that has some for each element of the batch; any other input as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0 or name in _PLACES:
        return value
    each = 1
    if name in ("attn_mask", "mask", "src_mask"):  # torch's masks on pairs of positions: one for all, or one a head
        if value.dim() == 2:
            return value
        each = max(len(value) // batch, 1) if value.dim() == 3 else 1
    return value[rows.start * each : rows.stop * each] if len(value) == each * batch else value


def check_model(model: nn.Module, call: Call) -> None:
    """That a model can be propagated through.

    Args:
        model: any.
        call: its arguments.

    Raises:
        TypeError: weights in half precision, or an input in another dtype than the weights.
        ValueError: it is in train mode, and dropout or norms of batches would act.
    """
    check_mode(model)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    unknown = dtypes - {torch.float32, torch.float64}
    if unknown:
        raise TypeError(f"model: expected weights in float32 or float64, got {', '.join(map(str, unknown))}.")
    if call.first.is_floating_point() and dtypes and call.first.dtype not in dtypes:
        raise TypeError(f"x: expected the dtype of the weights, {dtypes.pop()}, got {call.first.dtype}.")


def check_mode(model: nn.Module) -> None:
    """That no dropout and no norm of batches is in train mode.

    Args:
        model: any.

    Raises:
        ValueError: one is.
    """
    for name, module in model.named_modules():
        acts = isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm)
        if acts and module.training and getattr(module, "p", 1.0):
            raise ValueError(f"model: expected it in eval mode, but {name or 'it'} ({type(module).__name__}) trains.")


def _plan(model: nn.Module, bound: BoundPosterior, call: Call, settings: Settings) -> Plan:
    """Find the largest state of one element, and from it form and size of chunks."""
    one = next(call.chunks(1))
    with exact_kernels():
        largest = max(_widths(model, one), default=1)
    itemsize = one.first.element_size() if one.first.is_floating_point() else 4
    columns = settings.num_tangents + bound.posterior.num_columns
    # Queries, keys and values stand side by side: three times a state, and nine times its covariance.
    numbers = {
        "diag": 12 * largest,
        "blockdiag": 4 * largest * _features(model),
        "lowrank": 6 * largest * (columns + 1),
        "full": 12 * largest**2,
    }
    memory = _memory(one.first.device)
    form = settings.options.form
    if form == "auto":
        form = "full" if largest <= FULL_UP_TO and numbers["full"] * itemsize <= memory else "lowrank"
    size = numbers[form] * itemsize
    chunk_size = settings.chunk_size
    if chunk_size is None:
        chunk_size = max(min(len(call.first), memory // (2 * max(size, 1)), 1024), 1)
    together = min(chunk_size, len(call.first))
    if size * together > memory:
        raise RuntimeError(
            f"covariance: expected states that fit into memory, got an estimate of {size / 2**30:.1f} GiB an element "
            f"for {form!r}, {together} at a time, with {memory / 2**30:.1f} GiB free; take a smaller chunk_size, "
            "'lowrank' with fewer num_tangents, or 'diag'."
        )
    return Plan(form, largest, size, chunk_size)


def _features(model: nn.Module) -> int:
    return max((p.shape[0] for p in model.parameters() if p.dim() > 1), default=1)


def _widths(model: nn.Module, call: Call) -> list[int]:
    """Entries of the outputs of all modules, for one element; of what is chosen from the last ones, only that."""
    shapes: list[torch.Size] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, Tensor):
            shapes.append(output.shape)

    named = {name: value for name, value in call.named.items() if name not in ("positions", "outputs")}
    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            first = call.first.movedim(0, call.batch_dim)
            model(*(() if call.lead else (first,)), **({call.lead: first} if call.lead else {}), **named)
    except RuntimeError as error:
        if call.first.is_floating_point():
            raise
        raise TypeError(
            f"x: expected a dtype that the model takes, such as float32, got {call.first.dtype}."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    last = shapes[-1] if shapes else None
    positions, outputs = (call.named.get(name) for name in ("positions", "outputs"))
    found = []
    for shape in shapes:
        size = shape.numel()
        if shape == last and len(shape) > 1:
            size = size if positions is None else size // shape[-2] * len(positions)
            size = size if outputs is None else size // shape[-1] * len(outputs)
        found.append(size)
    return found


def _memory(device: torch.device) -> int:
    """Bytes that are free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:  # what caches of files take is free as well
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system says
        return 8 * 2**30


def as_predictive(state: GaussianState, noise: Tensor | float | None = None) -> Predictive:
    """A state as a prediction.

    Args:
        state: with events ``(K,)`` or ``(T, K)``.
        noise: of observations.
    """
    event_dim = len(state.event)
    if event_dim not in (1, 2):
        raise ValueError(f"model: expected outputs (B, K) or (B, T, K), got {tuple(state.mean.shape)}.")
    if state.covariance is None:
        variance = torch.zeros_like(state.mean)
        return Predictive.from_moments(state.mean, variance=variance, noise=noise, event_dim=event_dim)
    return Predictive.from_moments(state.mean, state.covariance.operator(), noise=noise, event_dim=event_dim)


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Without torch's fused encoder layers, which hide what is inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
