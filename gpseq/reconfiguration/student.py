"""A student: a copy of its teacher in which the container of the replaced blocks holds a chain in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.nn.capture import evaluating
from gpseq.reconfiguration.objectives import negative_log_density
from gpseq.reconfiguration.path import capture
from gpseq.reconfiguration.rollout import Rollout, find_rollout, knows_length, over_tokens
from gpseq.reconfiguration.stack import Stack, children_of, find_stack


def make_student(teacher: nn.Module, stack: Stack, kernel: nn.Module) -> tuple[nn.Module, Rollout]:
    """A copy of a teacher with a chain in the place of some blocks; all else of it stays.

    Args:
        teacher: any module; it is not changed.
        stack: the blocks.
        kernel: of the chain; it is taken as it is.

    Returns:
        The student, in eval mode, and its chain.
    """
    rollout = Rollout(stack, kernel)
    like = next(stack.blocks[0].parameters(), None)
    if like is not None:
        rollout.to(like.device)
    student = _without(teacher, stack)
    container: Any = student.get_submodule(stack.container)
    children = children_of(container)
    numbered = all(name.isdigit() for name in children)
    container._modules.clear()
    for number, (name, child) in enumerate(children.items()):  # names that are numbers are places, too
        container.add_module(str(number) if numbered else name, rollout if number == stack.start else child)
    for part in student.modules():
        if isinstance(part, nn.TransformerEncoder):  # decided by layers that are others now
            part.use_nested_tensor = False
        for name in ("config", "generation_config"):
            config: Any = getattr(part, name, None)
            if hasattr(config, "use_cache"):  # there are no keys and values to keep
                config.use_cache = False
    return student.eval(), rollout


def _without(teacher: nn.Module, stack: Stack) -> nn.Module:
    """A copy with one empty place where the blocks were: they need not be copied."""
    container = teacher.get_submodule(stack.container)
    before = dict(container._modules)
    names = list(children_of(container))
    replaced = set(names[stack.start : stack.start + len(stack)])
    try:
        container._modules.clear()
        for name in names:
            if name not in replaced:
                container._modules[name] = before[name]
            elif name == names[stack.start]:
                container._modules[name] = nn.Identity()
        return copy.deepcopy(teacher)
    finally:
        container._modules.clear()
        container._modules.update(before)


def with_steps(student: nn.Module, num_steps: int, force: bool = False) -> nn.Module:
    """The same student with another number of steps from its first state to its last.

    Args:
        student: that was trained with ``steps="random"``.
        num_steps: how many.
        force: whether to do it with another student too, whose kernel knows steps of one length only.

    Returns:
        A copy.

    Raises:
        TypeError: it is no student.
        ValueError: it was not trained for that.

    Example:
        >>> from gpseq.reconfiguration import Distiller
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> teacher = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
        >>> student = Distiller(teacher, steps="random").student
        >>> with_steps(student, 2).layers[0].num_steps
        2
    """
    check_count("num_steps", num_steps)
    rollout = find_rollout(student)
    if num_steps != len(rollout.increments) and not knows_length(rollout.kernel):
        raise ValueError(
            f"num_steps: expected {len(rollout.increments)}, as {type(rollout.kernel).__name__}.conditional takes no "
            f"dt, the length of a step, got {num_steps}."
        )
    if rollout.trained_steps != "random" and not force:
        raise ValueError(
            "student: expected one that was trained with steps='random', whose kernel knows the length of a step, got "
            "one with steps of one length; force=True takes it all the same."
        )
    changed = copy.deepcopy(student)
    find_rollout(changed).num_steps = num_steps
    return changed


@torch.no_grad()
def path_nll(teacher: nn.Module, student: nn.Module, x: Tensor | Mapping[str, Any], **inputs: Any) -> Tensor:
    r"""How surprising a teacher's path is to its student: a score of inputs from elsewhere, larger for the less likely.

    .. math:: -\frac1D \sum_i \log N\bigl(X_{l, i} \mid \mu_i(X_{l-1}, t_l), s_i^2(X_{l-1}, t_l)\bigr),

    for each transition, averaged over the tokens that are seen.

    Args:
        teacher: whose states are judged, in eval mode.
        student: whose transitions judge them.
        x: inputs of both, ``model(x, **inputs)``, or a mapping.
        inputs: further ones.

    Returns:
        ``(B, L)``, in nats for a feature of a token; its mean over L is the score.

    Raises:
        TypeError: the student has no chain.
        ValueError: the teacher trains, or is not of the student's make.
    """
    rollout = find_rollout(student)
    name = next(name for name, part in student.named_modules() if part is rollout)
    container = name.rpartition(".")[0]
    stack = find_stack(teacher, [f"{container}.{key}" if container else key for key in rollout.replaced])
    path = capture(teacher, x, replace(stack, kind=rollout.kind if rollout.finish is not None else None), **inputs)
    scores = []
    with evaluating(rollout):
        for step, (before, after) in enumerate(pairwise(path.states), start=1):
            mean, variance = rollout.step(before, step / len(path), path.masks)
            scores.append(over_tokens(negative_log_density(after, mean, variance).mean(-1), path.padding))
    return torch.stack(scores, -1)
