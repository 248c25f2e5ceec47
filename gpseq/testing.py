"""Common checks of modules, models and functions of them: what every part of the package passes, and what yours may.

In the manner of scikit-learn's estimator checks: :func:`check` runs them all, :func:`checks` names them one by one, to
parametrise a test.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

#: Errors with which bad input may be refused.
REFUSALS = (TypeError, ValueError)
#: Relative difference that float32 may make.
TOLERANCE = 1e-3


class CheckError(AssertionError):
    """An object does not keep one of the common promises; the message names it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """An object, and how it is called.

    Attributes:
        obj: a module, or anything that can be copied.
        args: example arguments; the first axis of their tensors counts elements of the batch where ``batched`` says so.
        kwargs: further ones.
        call: ``call(obj, *args, **kwargs)``; ``None`` calls the object itself.
        batched: whether elements of a batch do not see one another.
        empty: whether a batch, or a chunk, of none is an answer rather than an error.
        bad: arguments that are refused, each a tuple in the place of ``args``.
        random: whether calls draw by design, so that two of them differ.
        tolerance: relative difference that float32 may make.
    """

    obj: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Callable[..., Any] | None = None
    batched: bool = False
    empty: bool = False
    bad: Sequence[tuple[Any, ...]] = ()
    random: bool = False
    tolerance: float = TOLERANCE

    def fresh(self) -> Any:
        """A copy of the object, so that no check sees what another one has done."""
        return copy.deepcopy(self.obj)

    def output(self, obj: Any, args: tuple[Any, ...] | None = None, seed: int | None = 0, **more: Any) -> list[Tensor]:
        """All tensors of what a call gives.

        Args:
            obj: the object or a copy of it.
            args: in the place of the example's.
            seed: of torch's default generator; ``None`` leaves it alone.
            more: keyword arguments beside the example's.
        """
        args = self.args if args is None else args
        if seed is not None:
            torch.manual_seed(seed)
        call = self.call or (lambda thing, *a, **k: thing(*a, **k))
        return tensors(call(obj, *copy.deepcopy(args), **{**copy.deepcopy(dict(self.kwargs)), **more}))


def check(obj: Any, *args: Any, skip: Sequence[str] = (), **options: Any) -> tuple[str, ...]:
    """Run all common checks on an object; it is left as it was.

    - ``repr``: it can be printed.
    - ``deepcopy``: a copy answers alike, and shares no parameter or buffer.
    - ``pickle``: so does what comes back from a pickle.
    - ``state_dict``: another copy answers alike once it has loaded the state.
    - ``dtype``: float32 answers as float64 does, within a tolerance.
    - ``device``: so does a CUDA device, where there is one.
    - ``determinism``: two calls under one seed agree.
    - ``generator``: where calls take a ``generator``, it alone decides, and torch's default one is not touched.
    - ``gradients``: each parameter gets one that is finite.
    - ``batch``: elements of a batch are answered as they are alone.
    - ``empty``: a batch of none is answered by nothing, or refused by a ``ValueError``.
    - ``errors``: what is bad is refused by a ``TypeError`` or ``ValueError``, and leaves the object as it was.
    - ``inputs``: arguments are not changed.
    - ``warnings``: those that come are of this package, or of the module of the object's class.

    Args:
        obj: a module, or anything that can be copied and called.
        args: an example of its arguments.
        skip: names of checks that do not apply.
        options: ``kwargs``, ``call``, ``batched``, ``empty``, ``bad``, ``random`` and ``tolerance``; see
            :class:`Subject`.

    Returns:
        Names of the checks that were run.

    Raises:
        CheckError: a promise is not kept.
        TypeError: there is no such option.
        ValueError: ``skip`` names no check.

    Example:
        >>> check(nn.Linear(4, 3), torch.randn(5, 4), batched=True, empty=True)[:3]
        ('repr', 'deepcopy', 'pickle')
    """
    found = checks(obj, *args, skip=skip, **options)
    for _, run in found:
        run()
    return tuple(name for name, _ in found)


def checks(obj: Any, *args: Any, skip: Sequence[str] = (), **options: Any) -> list[tuple[str, Callable[[], None]]]:
    """The common checks that apply to an object, by name; see :func:`check`.

    Args:
        obj: as for :func:`check`.
        args: likewise.
        skip: likewise.
        options: likewise.

    Example:
        >>> [name for name, _ in checks(nn.Linear(2, 3), torch.randn(4, 2), batched=True)][-2:]
        ['inputs', 'warnings']
    """
    if unknown := set(skip) - set(_CHECKS):
        raise ValueError(f"skip: expected names of checks ({', '.join(_CHECKS)}), got {min(unknown)!r}.")
    subject = Subject(obj, args, **options)
    wanted = [name for name in _CHECKS if name not in skip and _APPLIES.get(name, _always)(subject)]
    return [(name, partial(_run, name, subject)) for name in wanted]


def tensors(value: Any) -> list[Tensor]:
    """All floating tensors inside of an answer, in order: of distributions mean and variance, of objects their fields.

    Args:
        value: a tensor, a distribution, a mapping, a sequence, or a dataclass.
    """
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Distribution):
        return [value.mean, value.variance]
    if isinstance(value, Mapping):
        return [found for part in value.values() for found in tensors(part)]
    if isinstance(value, list | tuple):
        return [found for part in value for found in tensors(part)]
    if hasattr(value, "mean") and hasattr(value, "variance") and isinstance(value.mean, Tensor):
        return [value.mean, value.variance]
    if dataclasses.is_dataclass(value):
        return [found for field in dataclasses.fields(value) for found in tensors(getattr(value, field.name))]
    return []


# --- the checks -------------------------------------------------------------------------------------------------------


def _repr(subject: Subject) -> None:
    if not repr(subject.obj):
        raise CheckError("expected something to print, got an empty string")


def _deepcopy(subject: Subject) -> None:
    original = subject.fresh()
    twin = copy.deepcopy(original)
    shared = _storages(original) & _storages(twin)
    if shared:
        raise CheckError(f"expected a copy with tensors of its own, got {len(shared)} that are shared")
    _same(subject.output(original), subject.output(twin), "a copy answers otherwise")


def _pickle(subject: Subject) -> None:
    try:
        data = pickle.dumps(subject.fresh())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckError(f"expected something that can be pickled, got {error}") from error
    back = pickle.loads(data)
    _same(subject.output(subject.fresh()), subject.output(back), "what came back from a pickle answers otherwise")


def _state_dict(subject: Subject) -> None:
    state, other = subject.fresh().state_dict(), subject.fresh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9).add_(0.01)
    other.load_state_dict(state)
    _same(subject.output(subject.fresh()), subject.output(other), "a copy that has loaded the state answers otherwise")


def _dtype(subject: Subject) -> None:
    low = subject.output(subject.fresh().float(), _moved(subject.args, torch.float32))
    high = subject.output(subject.fresh().double(), _moved(subject.args, torch.float64))
    _close(low, high, subject.tolerance, "float32 and float64 answer otherwise")


def _device(subject: Subject) -> None:
    here = subject.output(subject.fresh())
    there = subject.output(subject.fresh().cuda(), _moved(subject.args, torch.device("cuda")))
    if any(not value.is_cuda for value in there):
        raise CheckError("expected answers on the device of the object, got some on the CPU")
    if not subject.random:
        _close([value.cpu() for value in there], here, subject.tolerance, "the device answers otherwise")


def _determinism(subject: Subject) -> None:
    _same(subject.output(subject.fresh()), subject.output(subject.fresh()), "two calls under one seed differ")


def _generator(subject: Subject) -> None:
    def drawn(seed: int) -> list[Tensor]:
        return subject.output(subject.fresh(), seed=None, generator=torch.Generator().manual_seed(seed))

    state = torch.random.get_rng_state()
    first = drawn(1)
    if not torch.equal(state, torch.random.get_rng_state()):
        raise CheckError("expected torch's default generator to stay as it was, as a generator was given")
    torch.rand(1)
    _same(first, drawn(1), "two calls with equal generators differ")
    if subject.random and all(torch.equal(a, b) for a, b in zip(first, drawn(2), strict=True)):
        raise CheckError("expected other draws from another generator, got the same")


def _gradients(subject: Subject) -> None:
    obj = subject.fresh()
    parameters = [(name, value) for name, value in obj.named_parameters() if value.requires_grad]
    if not parameters:
        return
    with torch.enable_grad():
        values = [value for value in subject.output(obj) if value.requires_grad]
        if not values:
            raise CheckError("expected an answer that gradients flow through, got none")
        weights = [torch.linspace(0.5, 1.5, value.numel()).to(value).reshape(value.shape) for value in values]
        sum((value * weight).sum() for value, weight in zip(values, weights, strict=True)).backward()  # type: ignore
    for name, value in parameters:
        if value.grad is None:
            raise CheckError(f"expected a gradient of every parameter, got none of {name}")
        if not value.grad.isfinite().all():
            raise CheckError(f"expected finite gradients, got others of {name}")


def _batch(subject: Subject) -> None:
    size = len(next(value for value in subject.args if isinstance(value, Tensor)))
    whole = subject.output(subject.fresh())
    for number in range(size):
        part = tuple(value[number : number + 1] if isinstance(value, Tensor) else value for value in subject.args)
        alone = subject.output(subject.fresh(), part)
        for one, all_of_them in zip(alone, whole, strict=True):
            if all_of_them.dim() and len(all_of_them) == size:
                _close(
                    [one[:1]], [all_of_them[number : number + 1]], 1e-4, f"element {number} is answered otherwise alone"
                )


def _empty(subject: Subject) -> None:
    obj, before = subject.fresh(), subject.fresh()
    nothing = tuple(value[:0] if isinstance(value, Tensor) else value for value in subject.args)
    try:
        values = subject.output(obj, nothing)
    except ValueError:
        if subject.empty:
            raise
        _same(subject.output(before), subject.output(obj), "an empty input that is refused leaves another object")
        return
    if any(not value.isfinite().all() for value in values):
        raise CheckError("expected finite answers to an empty input, got others")


def _errors(subject: Subject) -> None:
    for number, args in enumerate(subject.bad):
        obj = subject.fresh()
        state = {name: value.clone() for name, value in _named(obj)}
        try:
            subject.output(obj, args)
        except REFUSALS as error:
            if not str(error).strip():
                raise CheckError(f"expected a message with the refusal of bad[{number}], got none") from error
        else:
            raise CheckError(f"expected a TypeError or ValueError for bad[{number}], got an answer")
        after = dict(_named(obj))
        changed = [name for name, value in state.items() if name not in after or not _equal(value, after[name])]
        if changed or len(after) != len(state):
            raise CheckError(f"expected the object to stay as it was after bad[{number}], got another {changed[:3]}")
        _same(subject.output(subject.fresh()), subject.output(obj), f"after bad[{number}] the object answers otherwise")


def _inputs(subject: Subject) -> None:
    args = copy.deepcopy(subject.args)
    kept = copy.deepcopy(args)
    torch.manual_seed(0)
    call = subject.call or (lambda thing, *a, **k: thing(*a, **k))
    call(subject.fresh(), *args, **subject.kwargs)
    for one, other in zip(args, kept, strict=True):
        if isinstance(one, Tensor) and not _equal(one, other):
            raise CheckError("expected arguments to stay as they were, got another tensor")


def _warnings(subject: Subject) -> None:
    ours = {str(Path(__file__).parent.resolve())}
    module = sys.modules.get(type(subject.obj).__module__)
    if module is not None and getattr(module, "__file__", None):
        ours.add(str(Path(str(module.__file__)).resolve()))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        subject.output(subject.fresh())
    for one in seen:
        named = one.category.__module__.startswith("gpseq")
        if not named and not any(str(Path(one.filename).resolve()).startswith(place) for place in ours):
            raise CheckError(f"expected no warnings of others, got {one.category.__name__}: {one.message}")


_CHECKS: dict[str, Callable[[Subject], None]] = {
    "repr": _repr,
    "deepcopy": _deepcopy,
    "pickle": _pickle,
    "state_dict": _state_dict,
    "dtype": _dtype,
    "device": _device,
    "determinism": _determinism,
    "generator": _generator,
    "gradients": _gradients,
    "batch": _batch,
    "empty": _empty,
    "errors": _errors,
    "inputs": _inputs,
    "warnings": _warnings,
}


def _always(subject: Subject) -> bool:
    return True


def _takes_generator(subject: Subject) -> bool:
    function = subject.call or getattr(subject.obj, "forward", subject.obj)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "generator" in parameters


def _is_module(subject: Subject) -> bool:
    return isinstance(subject.obj, nn.Module)


_APPLIES: dict[str, Callable[[Subject], bool]] = {
    "state_dict": _is_module,
    "dtype": lambda subject: _is_module(subject) and not subject.random,
    "device": lambda subject: _is_module(subject) and torch.cuda.is_available(),
    "generator": _takes_generator,
    "gradients": _is_module,
    "batch": lambda subject: subject.batched and not subject.random,
    "errors": lambda subject: len(subject.bad) > 0,
}


def _run(name: str, subject: Subject) -> None:
    try:
        with _random_state():
            _CHECKS[name](subject)
    except CheckError as error:
        raise CheckError(f"{type(subject.obj).__name__}, {name}: {error}.") from error


@contextmanager
def _random_state() -> Iterator[None]:
    """The default generator of the CPU is as it was afterwards."""
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def _named(obj: Any) -> list[tuple[str, Tensor]]:
    if not isinstance(obj, nn.Module):
        return []
    return [*obj.named_parameters(), *obj.named_buffers()]


def _storages(obj: Any) -> set[int]:
    return {value.untyped_storage().data_ptr() for _, value in _named(obj) if value.numel()}


def _moved(args: tuple[Any, ...], to: torch.dtype | torch.device) -> tuple[Any, ...]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or (isinstance(to, torch.dtype) and not value.is_floating_point()):
            return value
        return value.to(to)

    return tuple(move(value) for value in args)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _same(one: list[Tensor], other: list[Tensor], what: str) -> None:
    if len(one) != len(other) or any(not _equal(a, b) for a, b in zip(one, other, strict=True)):
        raise CheckError(what)


def _close(one: list[Tensor], other: list[Tensor], tolerance: float, what: str) -> None:
    for a, b in zip(one, other, strict=True):
        a, b = a.detach().double(), b.detach().double()
        scale = b.abs().max().clamp_min(1e-6) if b.numel() else torch.tensor(1.0)
        if a.shape != b.shape:
            raise CheckError(f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
        difference = ((a - b).abs() / scale).max().item() if a.numel() else 0.0
        if not difference <= tolerance:
            raise CheckError(f"{what}, by {difference:.1e} of the largest, where {tolerance:.0e} is allowed")
