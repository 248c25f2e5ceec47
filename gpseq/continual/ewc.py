r"""Elastic weight consolidation: parameters that mattered to past tasks are held by springs.

After each task a quadratic is added to the loss of the next ones, with the curvature of the diagonal Fisher
information,

.. math:: \tfrac{\lambda}{2} \sum_k \sum_p F_{kp} (\theta_p - \theta^*_{kp})^2 .

A sum of quadratics in one parameter is a quadratic again, so one anchor, one curvature and one constant hold any number
of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from gpseq.checks import check_number
from gpseq.continual.fisher import Family, check_model, check_options, fisher_diagonal

MODES = ("separate", "online")


@dataclass(frozen=True, eq=False)
class EWCState:
    r"""What is kept of all past tasks: two tensors for each parameter, whatever the number of tasks.

    Attributes:
        anchor: name of a parameter -> where its spring is at rest.
        fisher: name of a parameter -> its curvature, not negative.
        offset: 0-d float64, the sum over tasks and parameters of :math:`F (a - \theta^*)^2` at the anchor.
        num_tasks: how many have been consolidated.
    """

    anchor: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    offset: Tensor
    num_tasks: int

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors by name, for ``torch.save`` or :func:`gpseq.storage.save`."""
        tensors = {f"anchor.{name}": value.clone() for name, value in self.anchor.items()}
        tensors |= {f"fisher.{name}": value.clone() for name, value in self.fisher.items()}
        return tensors | {"offset": self.offset.clone(), "num_tasks": torch.tensor(self.num_tasks)}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> EWCState:
        """The state that :meth:`state_dict` wrote.

        Raises:
            TypeError: they are no tensors by name.
            ValueError: something is missing or of another shape, an anchor is not finite, a curvature or the offset is
                negative or not finite, or no task has been consolidated.
        """
        if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise TypeError("tensors: expected tensors by name, as state_dict() gives them, got something else.")
        parts: dict[str, dict[str, Tensor]] = {"anchor": {}, "fisher": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind in parts and name:
                parts[kind][name] = value.detach().clone()
            elif key not in ("offset", "num_tasks"):
                raise ValueError(f"tensors: expected anchor.*, fisher.*, offset and num_tasks, got {key!r}.")
        if missing := {"offset", "num_tasks"} - set(tensors):
            raise ValueError(f"tensors: expected {sorted(missing)[0]!r}, got none.")
        if not parts["anchor"]:
            raise ValueError("tensors: expected anchor.* of at least one parameter, got none.")
        _check_like("tensors", parts["fisher"], parts["anchor"])
        for name, value in parts["anchor"].items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"anchor: expected finite numbers for {name!r}, got NaN or infinity.")
        _check_fisher(parts["fisher"])
        for name in ("offset", "num_tasks"):
            if tensors[name].dim() != 0:
                raise ValueError(f"{name}: expected a 0-d tensor, got shape {tuple(tensors[name].shape)}.")
        offset = tensors["offset"].detach().double().clone()
        _check_not_negative("offset", offset)
        num_tasks = tensors["num_tasks"].item()
        if num_tasks != num_tasks // 1 or num_tasks < 1:
            raise ValueError(f"num_tasks: expected a whole number, at least 1, got {num_tasks:g}.")
        return cls(parts["anchor"], parts["fisher"], offset, int(num_tasks))


def consolidate(
    state: EWCState | None,
    model: Module,
    fisher: Mapping[str, Tensor],
    mode: str = "separate",
    decay: float = 1.0,
) -> EWCState:
    r"""The state after one more task.

    With curvature F and anchor a so far, and :math:`F_k, \theta^*_k` of the new task, ``"separate"`` adds one
    quadratic for each task,

    .. math:: F' = F + F_k, \quad a' = \frac{F a + F_k \theta^*_k}{F'}, \quad
              \mathrm{offset}' = \mathrm{offset} + \sum_p \frac{F F_k}{F'} (a - \theta^*_k)^2,

    which is their sum exactly. ``"online"`` keeps one quadratic around the latest parameters,
    :math:`F' = \gamma F + F_k, \; a' = \theta^*_k`: the new parameters have been held by the old springs already. The
    penalty has the accumulated F' as its curvature, where that of the paper has :math:`\gamma F'`; its constant gamma
    is part of the strength here.

    A parameter that has been frozen since an earlier task has nothing to do with the new one, :math:`F_k = 0`: its
    curvature stays, times gamma in the online form.

    Args:
        state: so far; ``None`` before the first task. It is left as it is.
        model: as it was learnt; its trainable parameters are read.
        fisher: curvature of the trainable ones, by name, usually of :func:`fisher_diagonal`. Nothing negative.
        mode: ``"separate"`` or ``"online"``.
        decay: gamma in (0, 1], by which the old curvature is multiplied; only for ``"online"``.

    Returns:
        A new state, in the dtype and on the device of the parameters.

    Raises:
        ValueError: names or shapes differ among model, state and Fisher, a Fisher is negative or not finite, or a value
            out of range.

    Source:
        Kirkpatrick et al. (2017) for one quadratic a task; Schwarz et al. (2018), Progress and compress, section 3.2,
        for the online form.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> state = consolidate(None, model, {"weight": torch.ones(1, 1)})
        >>> state.num_tasks, penalty(state, model).item()
        (1, 0.0)
    """
    gamma = _check_mode(mode, decay)
    check_model(model)
    learnt = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not learnt:
        raise ValueError("model: expected at least one parameter that requires gradients, got none.")
    _check_like("fisher", fisher, learnt)
    _check_fisher(fisher)
    held = learnt if state is None else state.anchor
    now = {name: p.detach() for name, p in model.named_parameters() if name in learnt or name in held}
    new = {n: fisher[n].detach().to(p, copy=True) if n in learnt else torch.zeros_like(p) for n, p in now.items()}
    here = {name: p.clone() for name, p in now.items()}
    zero = torch.zeros((), dtype=torch.float64)
    if state is None:
        return EWCState(here, new, zero, 1)
    _check_like("state", state.anchor, now)
    old = {name: gamma * state.fisher[name].to(p) for name, p in now.items()}
    total = {name: old[name] + new[name] for name in now}
    if mode == "online":
        return EWCState(here, total, zero, state.num_tasks + 1)
    anchor, offset = {}, state.offset.clone()
    for name, p in now.items():
        # Differences of anchors, not of their squares, which would cancel in float32.
        share = torch.where(total[name] > 0, new[name] / total[name], 1.0)
        before = state.anchor[name].to(p)
        anchor[name] = torch.lerp(before, p, share)
        offset = offset + (old[name] * share * (p - before).square()).sum().to(offset)
    return EWCState(anchor, total, offset, state.num_tasks + 1)


def penalty(state: EWCState | None, model: Module, strength: float = 1.0) -> Tensor:
    r"""What the past tasks add to a loss, :math:`\tfrac{\lambda}{2} (\sum_p F_p (\theta_p - a_p)^2 + \mathrm{offset})`.

    Args:
        state: of the past tasks; ``None`` before the first is consolidated, and gives zero.
        model: whose parameters are held. Those that have been frozen since still count.
        strength: lambda, not negative; in the unit of the loss if ``fisher`` was a sum over examples, and otherwise
            times the number of examples.

    Returns:
        0-d, in the dtype of the parameters; differentiable in them.

    Raises:
        ValueError: the trainable parameters have other names or shapes than those in the state.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> state = consolidate(None, model, {"weight": torch.full((1, 1), 3.0)})
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(2.0)
        >>> penalty(state, model, strength=10.0).item()
        60.0
    """
    scale = _check_not_negative("strength", strength)
    check_model(model)
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("model: expected parameters, got none.")
    if state is None:
        return torch.zeros_like(next(iter(parameters.values())).detach().flatten()[:1]).sum()
    _check_like("model", {n: p for n, p in parameters.items() if p.requires_grad or n in state.anchor}, state.anchor)
    total: Tensor | None = None
    for name, anchor in state.anchor.items():
        p = parameters[name]
        term = (state.fisher[name].to(p) * (p - anchor.to(p)).square()).sum()
        total = term if total is None else total + term.to(total)
    assert total is not None
    return 0.5 * scale * (total + state.offset.to(total))


class EWC:
    """A network, what it must not forget, and how strongly.

    :func:`fisher_diagonal`, :func:`consolidate` and :func:`penalty` with their settings, and the current state. It is
    no module and owns no parameter: it can be handed to whatever trains the network.

    Args:
        model: the network.
        strength: lambda of :func:`penalty`.
        mode: ``"separate"`` or ``"online"``, see :func:`consolidate`.
        decay: gamma of the online form.
        family: what the outputs mean, see :func:`fisher_diagonal`.
        empirical: as there.
        num_samples: as there.
        generator: as there.
        reduction: as there.
        chunk_size: as there.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value out of range.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> ewc = EWC(model, strength=100.0)
        >>> ewc = ewc.consolidate([torch.ones(5, 2)])  # task 1 has been learnt
        >>> loss = model(torch.ones(4, 2)).square().mean() + ewc.penalty()  # task 2 is being learnt
        >>> ewc.state.num_tasks
        1
    """

    def __init__(
        self,
        model: Module,
        strength: float,
        mode: str = "separate",
        decay: float = 1.0,
        family: str | Family | Callable[[Tensor, Tensor], Tensor] = "categorical",
        empirical: bool = False,
        num_samples: int | None = 1,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
        chunk_size: int = 64,
    ) -> None:
        self.model = model
        self.strength = strength
        self.mode, self.decay = mode, decay
        self.fisher_options: dict[str, Any] = {
            "family": family,
            "empirical": empirical,
            "num_samples": num_samples,
            "generator": generator,
            "reduction": reduction,
            "chunk_size": chunk_size,
        }
        #: What is kept of the past, one frozen value; ``None`` before the first task is consolidated.
        self.state: EWCState | None = None
        _check_mode(mode, decay)
        check_options(**self.fisher_options)
        penalty(None, model, strength)  # checks

    def penalty(self) -> Tensor:
        """What is to be added to the loss, 0-d; zero before the first task is consolidated."""
        return penalty(self.state, self.model, self.strength)

    def consolidate(self, batches: Iterable[Any]) -> EWC:
        """Remember the task that has just been learnt.

        Args:
            batches: its data, a list or loader of ``x`` or ``(x, y)``, see :func:`fisher_diagonal`.

        Returns:
            The object itself.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`fisher_diagonal` and :func:`consolidate`; the old state is
                kept.
        """
        fisher = fisher_diagonal(self.model, batches, **self.fisher_options)
        self.state = consolidate(self.state, self.model, fisher, self.mode, self.decay)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors by name, none before the first task is consolidated."""
        return {} if self.state is None else self.state.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises:
            TypeError: it is no mapping of tensors; the old state is kept.
            ValueError: it does not belong to this network, or is none; the old state is kept.
        """
        state = None if isinstance(tensors, Mapping) and not tensors else EWCState.from_state_dict(tensors)
        penalty(state, self.model, self.strength)  # checks names and shapes
        self.state = state


def _check_not_negative(name: str, value: Any) -> float:
    number = check_number(name, value, above=-math.inf, expected="a number, not negative")
    if number < 0:
        raise ValueError(f"{name}: expected a number, not negative, got {value!r}.")
    return number


def _check_mode(mode: str, decay: float) -> float:
    """Gamma, if it suits the mode."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}.")
    gamma = check_number("decay", decay, above=0.0, expected="a number in (0, 1]")
    if gamma > 1 or (mode == "separate" and gamma != 1):
        expected = "1 with mode='separate'" if mode == "separate" else "a number in (0, 1]"
        raise ValueError(f"decay: expected {expected}, got {decay!r}.")
    return gamma


def _check_like(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same parameters, by names and shapes."""
    if missing := [key for key in expected if key not in found]:
        raise ValueError(f"{name}: expected parameter {missing[0]!r}, got none of that name.")
    if extra := [key for key in found if key not in expected]:
        raise ValueError(f"{name}: expected the parameters {', '.join(expected)}, got {extra[0]!r} too.")
    for key, value in expected.items():
        if found[key].shape != value.shape:
            raise ValueError(f"{name}: expected shape {tuple(value.shape)} for {key!r}, got {tuple(found[key].shape)}.")


def _check_fisher(fisher: Mapping[str, Tensor]) -> None:
    for key, value in fisher.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"fisher: expected finite numbers for {key!r}, got NaN or infinity.")
        if bool((value < 0).any()):
            raise ValueError(f"fisher: expected nothing negative for {key!r}, got {value.min().item():g}.")
