"""One training loop for any torch model: progress, early stopping, checkpoint and exact resume.

The loop knows nothing of the model but its parameters: what a step minimises is a function of the model and a batch.
After each epoch all that the next one depends on is written to one file, atomically. So a run that was stopped, by
Ctrl-C or by the power, goes on from its last whole epoch, and on a CPU ends with the bits of a run that was not.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gpseq.storage import StorageError, replace_file

#: Name and version written into every checkpoint. A reader refuses versions that it does not know.
FORMAT, VERSION = "gpseq-training", 1

_ODD_STATE = "a state_dict holds more than tensors, numbers, text and nests of these"
_log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What can be written into a checkpoint: a module, an optimiser, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """All of its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go back to that state."""


@dataclass(frozen=True)
class Epoch:
    """What happened in one epoch. Two are equal if all but their times are.

    Attributes:
        loss: mean of the loss over the steps.
        score: what ``validate`` returned; ``None`` without one.
        learning_rate: of the first group of parameters, in the last step.
        gradient_norm: mean over the steps of the norm before clipping; ``None`` where nothing is clipped.
        steps: number of steps.
        seconds: how long it took, validation included.
    """

    loss: float
    score: float | None
    learning_rate: float
    gradient_norm: float | None
    steps: int
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class History:
    """What happened in a run, from its first epoch on, whether or not it was interrupted.

    Attributes:
        epochs: one entry for each.
        best_epoch: the one with the best score, counted from 0; ``None`` without ``validate``.
        stopped_early: whether patience ended it.
    """

    epochs: tuple[Epoch, ...]
    best_epoch: int | None
    stopped_early: bool

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def best_score(self) -> float | None:
        """The score of ``best_epoch``."""
        return None if self.best_epoch is None else self.epochs[self.best_epoch].score

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and numbers, for a JSON file."""
        return {**asdict(self), "epochs": [asdict(epoch) for epoch in self.epochs], "best_score": self.best_score}


@dataclass(frozen=True)
class _Run:
    """Where a run stands between two epochs, apart from what the objects hold themselves."""

    epochs: tuple[Epoch, ...] = ()
    best: dict[str, Any] | None = None  # state of the model in its best epoch

    @property
    def steps(self) -> int:
        return sum(epoch.steps for epoch in self.epochs)


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any, int], Tensor],
    loader: Iterable[Any],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    validate: Callable[[nn.Module], float] | None = None,
    mode: Literal["min", "max"] = "min",
    patience: int | None = None,
    min_delta: float = 0.0,
    restore_best: bool = True,
    max_grad_norm: float | None = None,
    scheduler: Any = None,
    schedule: Literal["epoch", "step"] = "epoch",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    also: Mapping[str, Stateful] | None = None,
    generators: Iterable[torch.Generator] = (),
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model, in place.

    Each step is ``loss(model, batch, step).backward()``, clipping, ``optimizer.step()``. After each epoch comes
    ``validate(model)``, in evaluation mode and without gradients; then the checkpoint is written.

    **Resuming.** If the file ``checkpoint`` exists, the run goes on from the epoch after the last whole one, with the
    model, the optimiser, the scheduler, ``also``, the history and all random states as they were: torch's default
    generators, that of the loader and its samplers, ``generators``, and those of ``random`` and ``numpy.random``. Call
    ``fit`` with the same arguments as before; ``epochs`` and ``patience`` may grow, which prolongs a run. The file is
    first written before the first epoch. What was done of an interrupted epoch is done again. Not restored are buffers
    that ``state_dict`` leaves out, and whatever ``loss`` and ``validate`` keep to themselves.

    **Stopping.** Ctrl-C is passed on to the caller; the checkpoint is there. A loss or gradient norm that is not finite
    raises before the step is taken.

    Args:
        model: what is trained. It is left in training mode; call ``model.eval()`` to predict.
        loss: takes the model, a batch and the number of the step, from 0, over all epochs (to anneal with), and
            returns a scalar.
        loader: batches, again at each epoch: a ``DataLoader`` or a list, not an iterator.
        optimizer: over the parameters that are to move.
        epochs: of the whole run, those before an interruption included.
        validate: takes the model and returns a score on validation data.
        mode: whether the best score is the smallest or the largest.
        patience: stop when this many epochs in a row were no better than the best before them; ``None``: never.
        min_delta: by how much a score has to be better than the best to count as better.
        restore_best: whether the model ends with the parameters of the best epoch, if there is ``validate``. The
            checkpoint keeps those of the last one too.
        max_grad_norm: the gradients of all parameters of ``optimizer`` together are shortened to this norm.
        scheduler: a learning-rate scheduler of torch on ``optimizer``, such as :func:`warmup_cosine` makes.
        schedule: when it steps, after each ``"epoch"`` or each ``"step"``. ``ReduceLROnPlateau`` is given the score.
        checkpoint: a file, which is replaced after each epoch; its folder must exist. ``None``: no file.
        resume: whether to go on from ``checkpoint`` if it exists, rather than to start afresh and replace it.
        also: more objects with state for the checkpoint, by name: a likelihood, an average of the parameters.
        generators: more generators that ``loss``, ``validate`` or the data draw from; always in the same order.
        device: where the tensors of each batch are moved to; ``None``: nowhere.
        progress: ``True`` for a progress bar (tqdm), ``False`` for none; ``None``: a bar if the standard error is a
            terminal and tqdm is installed. Without a bar each epoch is a line of the log ``gpseq.training`` (level
            INFO).

    Returns:
        What happened.

    Raises:
        ValueError: if an argument is not as it should be, the loader gives no batch, or the loss is not a scalar.
        FloatingPointError: if a loss, a gradient norm or a score is not a number, or infinite (a score may be).
        StorageError: if the checkpoint is damaged, or belongs to another run; model and file are as they were.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> torch.manual_seed(0)
        <torch...Generator object at ...>
        >>> x = torch.linspace(-1, 1, 32)[:, None]
        >>> batches = [(x[i::4], 2 * x[i::4]) for i in range(4)]
        >>> model = nn.Linear(1, 1)
        >>> history = fit(
        ...     model,
        ...     lambda model, batch, step: (model(batch[0]) - batch[1]).square().mean(),
        ...     batches,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
        ...     epochs=20,
        ... )
        >>> len(history), round(model.weight.item(), 3)
        (20, 2.0)
    """
    _check(loader, epochs, validate, mode, patience, min_delta, max_grad_norm, scheduler, schedule)
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if scheduler is not None:
        stateful["scheduler"] = scheduler
    for name, thing in (also or {}).items():
        if name in ("model", "optimizer", "scheduler"):
            raise ValueError(f"also: got the name {name!r}, which is taken")
        stateful[name] = thing
    drawn = _generators(loader, generators)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)

    run = _Run()
    if checkpoint is not None:
        if resume and Path(checkpoint).exists():
            run = _load(checkpoint, stateful, drawn)
            _log.info("%s: going on after epoch %d", os.fspath(checkpoint), len(run.epochs))
        else:
            _check_readable(checkpoint, _save(checkpoint, run, stateful, drawn))

    after_step = scheduler.step if scheduler is not None and schedule == "step" else lambda: None
    model.train()
    while len(run.epochs) < epochs and not _exhausted(run.epochs, mode, patience, min_delta):
        number, start = len(run.epochs), time.perf_counter()
        title = f"epoch {number + 1}/{epochs}"
        try:
            with _bar(loader, title, progress) as (batches, show):
                mean, norm, steps, rate = _train(
                    model, loss, batches, optimizer, run.steps, max_grad_norm, after_step, device, show
                )
            score = None if validate is None else _validated(model, validate, number)
            if scheduler is not None and schedule == "epoch":
                scheduler.step(*([score] if plateau else []))
            epoch = Epoch(mean, score, rate, norm, steps, time.perf_counter() - start)
            run = _Run((*run.epochs, epoch), run.best)
            if _best(run.epochs, mode, min_delta) == number:
                run = _Run(run.epochs, _copy(model.state_dict()))
            if checkpoint is not None:
                _save(checkpoint, run, stateful, drawn)
        except KeyboardInterrupt:
            where = "nothing was kept" if checkpoint is None else f"{os.fspath(checkpoint)} has what was done before"
            _log.warning("%s: interrupted; %s", title, where)
            raise
        _report(epoch, title, bar=_shows(progress))

    if restore_best and run.best is not None:
        model.load_state_dict(run.best)
    stopped = len(run.epochs) < epochs
    return History(run.epochs, _best(run.epochs, mode, min_delta), stopped)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    r"""A learning rate that rises in a line and falls along half a cosine.

    .. math::
        \frac{t + 1}{w + 1} \;(t < w), \qquad
        \text{floor} + \frac{1 - \text{floor}}{2} \Bigl(1 + \cos \pi \frac{t - w}{T - w}\Bigr) \;(w \le t \le T),

    as a factor on the learning rate of each group; afterwards it stays at the floor. Use it with
    ``fit(..., schedule="step")``.

    Args:
        optimizer: whose learning rates are scaled.
        total_steps: T, of the whole run: epochs times batches.
        warmup_steps: w, how many of them it takes to rise.
        floor: the factor at the end, from 0 to 1.

    Returns:
        A scheduler.

    Raises:
        ValueError: if ``warmup_steps`` is not from 0 to below ``total_steps``, or ``floor`` not from 0 to 1.

    Source:
        Loshchilov and Hutter (2017), SGDR: stochastic gradient descent with warm restarts, equation 5, without
        restarts.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = warmup_cosine(optimizer, total_steps=4, warmup_steps=1)
        >>> [round(scheduler.lr_lambdas[0](step), 2) for step in range(6)]
        [0.5, 1.0, 0.75, 0.25, 0.0, 0.0]
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps: got {warmup_steps} of {total_steps}, expected at least 0 and fewer than all")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: got {floor}, expected a number from 0 to 1")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        part = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def move(batch: Any, device: torch.device | str) -> Any:
    """The tensors of a batch on a device.

    Args:
        batch: tensors in any nest of tuples, named tuples, lists and mappings; other things are left as they are.
        device: where to.

    Returns:
        The same nest; mappings become dicts.

    Example:
        >>> move({"ids": torch.zeros(2), "names": ["a", "b"]}, "cpu")
        {'ids': tensor([0., 0.]), 'names': ['a', 'b']}
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move(value, device) for value in batch)
    return batch


# --- one epoch --------------------------------------------------------------------------------------------------------


def _train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any, int], Tensor],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    first_step: int,
    max_grad_norm: float | None,
    after_step: Callable[[], Any],
    device: torch.device | str | None,
    show: Callable[[float], None],
) -> tuple[float, float | None, int, float]:
    """One pass over the batches: mean loss, mean gradient norm, steps, and the last learning rate."""
    losses: list[float] = []
    norms: list[float] = []
    rate = math.nan
    for step, batch in enumerate(batches, start=first_step):
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, batch if device is None else move(batch, device), step)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: got {got}, expected a tensor of one number")
        losses.append(_finite(value.item(), "loss", step))
        value.backward()
        if max_grad_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            norms.append(_finite(norm.item(), "gradient norm", step))
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after_step()
        show(losses[-1])
    if not losses:
        raise ValueError("loader: gave no batch")
    # fsum: rounded once, whatever the number of steps.
    return math.fsum(losses) / len(losses), math.fsum(norms) / len(norms) if norms else None, len(losses), rate


def _finite(value: float, what: str, step: int) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"{what}: got {value} in step {step}, expected a finite number")
    return value


def _validated(model: nn.Module, validate: Callable[[nn.Module], float], number: int) -> float:
    model.eval()
    try:
        with torch.no_grad():
            score = float(validate(model))
    finally:
        model.train()
    if math.isnan(score):
        raise FloatingPointError(f"validate: got nan after epoch {number + 1}, expected a number")
    return score


# --- which epoch is best, and whether to stop -------------------------------------------------------------------------


def _best(epochs: tuple[Epoch, ...], mode: str, min_delta: float) -> int | None:
    """The last epoch whose score was better, by ``min_delta``, than the best before it."""
    best, found = math.inf, None
    for number, epoch in enumerate(epochs):
        if epoch.score is None:
            continue
        score = epoch.score if mode == "min" else -epoch.score
        if found is None or score < best - min_delta:
            best, found = score, number
    return found


def _exhausted(epochs: tuple[Epoch, ...], mode: str, patience: int | None, min_delta: float) -> bool:
    best = _best(epochs, mode, min_delta)
    return patience is not None and best is not None and len(epochs) - 1 - best >= patience


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _save(path: str | os.PathLike[str], run: _Run, stateful: dict[str, Any], drawn: list[torch.Generator]) -> bytes:
    content = {
        "epochs": [asdict(epoch) for epoch in run.epochs],
        "best": run.best,
        "kinds": _kinds(stateful),
        "state": {name: thing.state_dict() for name, thing in stateful.items()},
        "random": _random_states(drawn),
    }
    file = io.BytesIO()
    try:
        torch.save(content, file)
    except Exception as error:  # pickle has several types
        raise ValueError(f"checkpoint: {_ODD_STATE}") from error
    # torch looks at no checksum when it reads, so the file begins with one, on a line of its own.
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    data = f"{FORMAT} {VERSION} {digest}\n".encode() + file.getvalue()
    replace_file(path, data)
    return data


def _check_readable(path: str | os.PathLike[str], data: bytes) -> None:
    """Find out before the first epoch, not after the last, that a state cannot be read back."""
    try:
        _decode(path, data)
    except StorageError as error:
        raise ValueError(f"checkpoint: {_ODD_STATE}") from error


def _load(path: str | os.PathLike[str], stateful: dict[str, Any], drawn: list[torch.Generator]) -> _Run:
    """Read a checkpoint and restore everything from it, or nothing."""
    content = _decode(path, Path(path).read_bytes())
    there, here = content["kinds"], _kinds(stateful)
    if there != here:
        raise StorageError(f"{path} belongs to another run: it holds {_listed(there)}; this run has {_listed(here)}")
    if len(content["random"]["generators"]) != len(drawn):
        count = len(content["random"]["generators"])
        raise StorageError(f"{path} holds the states of {count} generators; this run has {len(drawn)}")
    # A module copies what fits before it complains of the rest.
    before = {name: copy.deepcopy(thing.state_dict()) for name, thing in stateful.items()}
    for name, thing in stateful.items():
        try:
            thing.load_state_dict(content["state"][name])
        except Exception as error:
            for other, state in before.items():
                stateful[other].load_state_dict(state)
            raise StorageError(f"{path} belongs to another {name}: {error}") from error
    _set_random_states(content["random"], drawn)
    return _Run(tuple(Epoch(**epoch) for epoch in content["epochs"]), content["best"])


def _decode(path: str | os.PathLike[str], data: bytes) -> dict[str, Any]:
    header, _, body = data.partition(b"\n")
    name, _, rest = header.partition(b" ")
    version, _, digest = rest.partition(b" ")
    if name != FORMAT.encode():
        raise StorageError(f"{path} is not a checkpoint of gpseq, or its first line is damaged")
    if version != str(VERSION).encode():
        found = version.decode(errors="replace")
        raise StorageError(f"{path} has version {found} of the format; this gpseq reads version {VERSION}")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise StorageError(f"{path} is damaged or truncated: its checksum does not match its contents")
    try:
        # Tensors, numbers and text only: reading a file runs no code of its writer.
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and torch have several types
        raise StorageError(f"{path} holds what cannot be read back") from error


def _kinds(stateful: dict[str, Any]) -> dict[str, str]:
    """What is restored; of optimisers and schedulers the type too, because they accept each other's states."""
    named = ("optimizer", "scheduler")
    return {name: type(thing).__name__ if name in named else "" for name, thing in stateful.items()}


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" if kind else name for name, kind in kinds.items())


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


# --- random states ----------------------------------------------------------------------------------------------------


def _generators(loader: Any, more: Iterable[torch.Generator]) -> list[torch.Generator]:
    """The generators of a loader and its samplers, then those that were given; each once."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    places = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    unique: list[torch.Generator] = []
    for generator in (*found, *more):
        if isinstance(generator, torch.Generator) and not any(generator is other for other in unique):
            unique.append(generator)
    return unique


def _random_states(drawn: list[torch.Generator]) -> dict[str, Any]:
    _, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  the state that foreign code draws from
    version, words_python, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": [generator.get_state() for generator in drawn],
        "numpy": [torch.from_numpy(np.asarray(words).astype(np.int64)), *rest],
        "python": [version, list(words_python), gauss],
    }


def _set_random_states(states: dict[str, Any], drawn: list[torch.Generator]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    for generator, state in zip(drawn, states["generators"], strict=True):
        generator.set_state(state)
    words, *rest = states["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words_python, gauss = states["python"]
    random.setstate((version, tuple(words_python), gauss))


# --- progress ---------------------------------------------------------------------------------------------------------


def _shows(progress: bool | None) -> bool:
    """Whether there is a bar."""
    if progress is None:
        import importlib.util

        return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    return progress


@contextmanager
def _bar(
    loader: Iterable[Any], title: str, progress: bool | None
) -> Iterator[tuple[Iterable[Any], Callable[[float], None]]]:
    """The batches, and a function that shows the loss of one."""
    if not _shows(progress):
        yield loader, lambda value: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: a bar needs the package tqdm: pip install 'gpseq[cli]'") from error
    with tqdm(loader, desc=title, unit=" batches", file=sys.stderr, leave=False) as bar:
        yield bar, lambda value: bar.set_postfix(loss=f"{value:.4g}", refresh=False)


def _report(epoch: Epoch, title: str, bar: bool) -> None:
    score = "" if epoch.score is None else f", score {epoch.score:.4g}"
    line = f"{title}: loss {epoch.loss:.4g}{score}, {epoch.seconds:.1f} s"
    if bar:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        _log.info("%s", line)


# --- arguments --------------------------------------------------------------------------------------------------------


def _check(
    loader: Any,
    epochs: int,
    validate: Any,
    mode: str,
    patience: int | None,
    min_delta: float,
    max_grad_norm: float | None,
    scheduler: Any,
    schedule: str,
) -> None:
    if isinstance(loader, Iterator):
        raise ValueError(
            f"loader: got an iterator ({type(loader).__name__}), which is empty after one epoch; expected something "
            "that can be iterated again, such as a DataLoader or a list"
        )
    if epochs < 0:
        raise ValueError(f"epochs: got {epochs}, expected a number that is not negative")
    if mode not in ("min", "max"):
        raise ValueError(f"mode: got {mode!r}, expected 'min' or 'max'")
    if schedule not in ("epoch", "step"):
        raise ValueError(f"schedule: got {schedule!r}, expected 'epoch' or 'step'")
    if patience is not None and validate is None:
        raise ValueError(f"patience: got {patience} without validate, expected both or neither")
    if patience is not None and patience < 1:
        raise ValueError(f"patience: got {patience}, expected at least 1")
    if not min_delta >= 0:
        raise ValueError(f"min_delta: got {min_delta}, expected a number that is not negative")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: got {max_grad_norm}, expected a positive number")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and (validate is None or schedule == "step"):
        raise ValueError("scheduler: ReduceLROnPlateau needs validate and schedule='epoch'")
