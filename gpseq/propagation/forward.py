"""One forward pass that carries mean and covariance through a network with uncertain weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import gpseq.propagation.rules  # noqa: F401, registers them
from gpseq.checks import check_count
from gpseq.prediction_checks import check_generator, check_noise
from gpseq.predictive import Predictive
from gpseq.propagation.call import Call, check_model
from gpseq.propagation.moments import FORMS, GaussianState
from gpseq.propagation.posteriors import BoundPosterior, WeightPosterior, bind
from gpseq.propagation.sizes import free_bytes, largest_state, noticing_hooks
from gpseq.propagation.switches import as_found, exact_kernels
from gpseq.propagation.walk import Options, Walk

#: Entries of a state, tokens times features, up to which ``"auto"`` keeps all covariances.
FULL_UP_TO = 1024
#: Numbers that are worked on together on a CPU.
CACHED = 2**24
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
            marginals. ``"auto"`` is ``"full"`` up to 1,024 numbers a state, where memory allows it, and ``"lowrank"``
            beyond; the prediction's ``notes["covariance"]`` says which.
        activations: ``"moments"``, exact for Gaussian inputs, or ``"tangent"``.
        layer_norm: ``"jacobian"``, or ``"frozen"``: mean and deviation of a token are constants.
        on_unknown: ``"raise"`` or ``"linearise"``, for modules that have no rule and whose forward cannot be followed.
        num_tangents: R, columns that are drawn for ``"lowrank"``.
        chunk_size: elements of the batch at a time; ``None`` takes what half of the free memory holds, 1,024 at the
            most, and on a CPU no more than about 16 million numbers, for the sake of its caches.
        generator: of the draws; ``None`` is torch's default generator.
        preset: ``"streamlined"`` for the published rules; all options above but ``on_unknown`` are theirs then.
        dropout: ``"off"``, or ``"variance"``: ``nn.Dropout`` and dropout of attention are sources of variance.
        noise: noise variances of observations, for regression, broadcastable to the outputs.
        batch_dim: of x; the prediction has the batch first in any case.
        inputs: further arguments of the model, such as masks.

    Returns:
        The prediction of outputs ``(B, K)`` with their covariance, or ``(B, T, K)``, whose event is ``(T, K)``.

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
        chunk_size: elements of the batch at a time; ``None`` takes what half of the free memory holds, 1,024 at the
            most, and on a CPU no more than about 16 million numbers, for the sake of its caches.
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
    model, bound = bind(posterior, model)
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
        check_noise(self.noise, torch.zeros(getattr(self.noise, "shape", ())))

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
    model, bound = bind(posterior, model)
    check_model(model, call)
    chosen = _plan(model, bound, call, settings)
    # One set of draws for all chunks: the prediction does not depend on their size.
    options = replace(settings.options, form=chosen.form)
    walk = Walk(model, bound, options, settings.num_tangents, generator, call.lead, call.batch_dim)
    results = []
    with exact_kernels(), as_found(model):
        for part in call.chunks(chosen.chunk_size):
            state = walk.restarted()(model, GaussianState(part.first), **part.named)
            results.append(as_predictive(state))
            unused = walk.unused()
            if unused:
                raise RuntimeError(
                    f"posterior: {', '.join(unused)} is uncertain, and no rule has asked for it: its variance would be "
                    "lost. Is it used by a functional call, through a parametrization, or not at all? "
                    "gpseq.propagation.linearised needs no rules."
                )
    found = results[0] if len(results) == 1 else Predictive.cat(results)
    if settings.noise is not None:  # of the whole batch, whatever the chunks were
        found = Predictive.from_moments(found.mean, found.covariance, noise=settings.noise, event_dim=found.event_dim)
    return found.noted(covariance=chosen.form), chosen


def _plan(model: nn.Module, bound: BoundPosterior, call: Call, settings: Settings) -> Plan:
    """Find the largest state of one element, and from it form and size of chunks."""
    with noticing_hooks(model) as hooked:
        largest = largest_state(model, call)
    if hooked:
        raise NotImplementedError(
            f"model: hooks of {', '.join(name or 'the model itself' for name in hooked)} change what these get or "
            "return, which rules do not see; remove the hooks, or take gpseq.propagation.linearised, which runs the "
            "model as it is."
        )
    columns = settings.num_tangents + bound.posterior.num_columns
    # Queries, keys and values stand side by side: three times a state, and nine times its covariance.
    numbers = {
        "diag": 12 * largest,
        "blockdiag": 4 * largest * _features(model),
        "lowrank": 6 * largest * (columns + 1),
        "full": 12 * largest**2,
    }
    memory = free_bytes(call.first.device)
    form = settings.options.form
    if form == "auto":
        form = "full" if largest <= FULL_UP_TO and numbers["full"] * call.itemsize <= memory else "lowrank"
    size = numbers[form] * call.itemsize
    chunk_size = len(call.first) if call.whole else settings.chunk_size
    if chunk_size is None:
        room = memory // 2
        if call.first.device.type == "cpu":  # small parts stay in a processor's caches
            room = min(room, CACHED * call.itemsize)
        chunk_size = max(min(len(call.first), room // max(size, 1), 1024), 1)
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


def as_predictive(state: GaussianState) -> Predictive:
    """A state as a prediction.

    Args:
        state: with events ``(K,)`` or ``(T, K)``.

    Raises:
        ValueError: it has other events.
    """
    event_dim = len(state.event)
    if event_dim not in (1, 2):
        raise ValueError(f"model: expected outputs (B, K) or (B, T, K), got {tuple(state.mean.shape)}.")
    if state.covariance is None:
        variance = torch.zeros_like(state.mean)
        return Predictive.from_moments(state.mean, variance=variance, event_dim=event_dim)
    return Predictive.from_moments(state.mean, state.covariance.operator(), event_dim=event_dim)
