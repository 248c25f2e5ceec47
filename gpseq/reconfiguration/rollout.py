"""The chain of a student: one kernel, applied from the first state to the last, in the place of a teacher's blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from gpseq.nn.generator import Draws
from gpseq.reconfiguration.blocks import BlockKind, find_kind
from gpseq.reconfiguration.calls import CACHES, Call, is_causal, masks_by_name
from gpseq.reconfiguration.masks import Masks
from gpseq.reconfiguration.stack import Stack


@dataclass
class Record:
    """What happened in the calls of a rollout: for each, its steps.

    Attributes:
        states: of each step the state that it started from, ``(B, T, D)``; behind them the last one.
        means: of each step.
        variances: of each step.
        spreads: of each step the mean deviation over the features of a token, ``(B, T)``.
        padding: ``(B, T)``, tokens that nobody sees.
    """

    states: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    spreads: list[Tensor] = field(default_factory=list)
    padding: Tensor | None = None

    def token_spread(self) -> Tensor:
        """Mean deviation of each step over the features of a token, ``(B, T, L)``."""
        return torch.stack(self.spreads, -1)

    def add(self, x: Tensor, mean: Tensor, variance: Tensor, states: bool = True) -> None:
        """Note a step.

        Args:
            x: where it started.
            mean: of where it goes.
            variance: likewise.
            states: whether to keep these, or the spread alone.
        """
        self.spreads.append(variance.sqrt().mean(-1))
        if states:
            self.states.append(x)
            self.means.append(mean)
            self.variances.append(variance)

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Mean over the tokens that are seen.

        Args:
            values: ``(B, T, L)``, or of the first B elements.

        Returns:
            ``(B, L)``.
        """
        return over_tokens(values, None if self.padding is None else self.padding[: len(values)])

    def spread(self) -> Tensor:
        """Mean deviation of each step over features and tokens that are seen, ``(B, L)``."""
        return self.mean_over_tokens(self.token_spread())


class Finish(nn.Module):
    """The second half of a block, which belongs to the head: what the path leaves of it.

    Args:
        block: a copy of it is taken, without the modules of the first half.
        kind: of the block.

    Shape:
        As the block's tokens.
    """

    def __init__(self, block: nn.Module, kind: BlockKind) -> None:
        super().__init__()
        # Not of the block's class: whoever looks for such blocks expects them to be whole.
        self.block, self.kind = nn.Module(), kind
        for name in kind.tail(block):
            part = getattr(block, name, None)
            if isinstance(part, nn.Module):
                self.block.add_module(name, copy.deepcopy(part))
            elif part is not None:
                setattr(self.block, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Behind the perceptron and its residual path."""
        return self.kind.finish(self.block, x)


class Rollout(Draws):
    r"""A chain of Gaussian transitions in the place of blocks, with their call.

    .. math:: X_l = \mu(X_{l - 1}, t_l) + s(X_{l - 1}, t_l) \odot \epsilon_l, \qquad t_l = l / L.

    In train mode it draws once; in eval mode it follows the means, unless :func:`drawing` says otherwise.

    Args:
        stack: the blocks that it replaces.
        kernel: with ``conditional(x, t, mask=None)``, and ``dt`` where the number of steps is to change.

    Attributes:
        num_steps: steps from the first state to the last.
        replaced: names of the replaced blocks in their container.
        trained_steps: ``"fixed"``, or ``"random"`` where the kernel has been trained on steps of many lengths.
        increments: size of the teacher's increments, ``(L,)``; 0 until it is known.
        spread_scale: factor of all deviations, 1 until :func:`~gpseq.reconfiguration.calibrate_spread` fits it.
    """

    def __init__(self, stack: Stack, kernel: nn.Module) -> None:
        super().__init__()
        block = stack.blocks[0]
        kind = stack.kind or find_kind(block)
        self.kernel = kernel
        self.finish = None if stack.kind is None else Finish(stack.blocks[-1], stack.kind)
        self.kind, self.batch_dim = kind, stack.batch_dim
        self.class_of_blocks = type(block)  # whose forward names the arguments
        self.is_causal = is_causal(block)
        self.replaced = stack.keys
        self.num_steps = len(stack)
        self.trained_steps = "fixed"
        self.register_buffer("increments", torch.zeros(len(stack)))
        self.increments: Tensor
        self.register_buffer("spread_scale", torch.ones(()))
        self.spread_scale: Tensor
        if kind is not None and kind.name == "torch":  # nn.TransformerEncoder asks its first layer
            heads = stack.blocks[0].self_attn.num_heads  # type: ignore[union-attr]
            self.self_attn = SimpleNamespace(batch_first=self.batch_dim == 0, num_heads=heads)
        # Set for a while by the functions below.
        self._copies = 0
        self._draws: bool | None = None
        self._record: list[Record] | None = None
        self._keeps_states = True
        self._times: tuple[float, ...] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the blocks would return for tokens.

        Args:
            args: as for a block: first come tokens, in the layout of the blocks.
            kwargs: as for a block.

        Raises:
            NotImplementedError: a cache of keys and values is to be filled, which there is none for.
        """
        x, call = Call.split(self, args, kwargs)
        x = x if self.batch_dim == 0 else x.transpose(0, 1)
        x = self.roll(x, self.masks(call.args, call.kwargs))
        x = x if self.batch_dim == 0 else x.transpose(0, 1)
        return x if self.finish is None else self.finish(x)

    def masks(self, args: Sequence[Any] = (), kwargs: Any = None) -> Masks:
        """What a block's arguments say about masks.

        Args:
            args: positional, without the tokens.
            kwargs: by name.
        """
        call = Call(tuple(args), kwargs)
        if held := [name for name in CACHES if name in call.named(self)]:
            raise NotImplementedError(
                f"{held[0]}: expected none, as a student keeps no keys and values, got a cache; call it with "
                "use_cache=False."
            )
        if self.kind is None:
            return masks_by_name(self, call)
        return self.kind.masks(self, call)

    def roll(self, x: Tensor, masks: Masks) -> Tensor:
        """The last state of the chain.

        Args:
            x: the first one, ``(B, T, D)``.
            masks: of attention.
        """
        draws = self.training if self._draws is None else self._draws
        record = None if self._record is None else Record(padding=_expanded(masks.padding(), x))
        for begin, t in pairwise(self.times()):
            mean, variance = self.step(x, t, masks, t - begin)
            if record is not None:
                record.add(x, mean, variance, self._keeps_states)
            x = mean + variance.sqrt() * self._noise(mean) if draws else mean
        if record is not None and self._record is not None:
            if self._keeps_states:
                record.states.append(x)
            self._record.append(record)
        return x

    def times(self) -> tuple[float, ...]:
        """Where steps begin and end, from 0 to 1."""
        if self._times is not None:
            return self._times
        return tuple(number / self.num_steps for number in range(self.num_steps + 1))

    def step(self, x: Tensor, t: float, masks: Masks, dt: float | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of a step.

        Args:
            x: ``(B, T, D)``.
            t: where it ends.
            masks: of attention.
            dt: its length; a kernel that does not know it has steps of one length.

        Raises:
            ValueError: what the kernel answers has another shape.
        """
        return self.answer(self.kernel.conditional, x, t, masks, dt)  # type: ignore[arg-type]

    def answer(
        self, conditional: Callable[..., Any], x: Tensor, t: float, masks: Masks, dt: float | None
    ) -> tuple[Tensor, Tensor]:
        """The same from the ``conditional`` of a kernel."""
        standard = dt is None or abs(dt * len(self.increments) - 1) < 1e-6
        extra = {} if standard else {"dt": dt}
        mean, spread = conditional(x, t, mask=masks, **extra)
        variance = spread.diagonal(dim1=-2, dim2=-1) if isinstance(spread, LinearOperator) else spread
        for name, value in (("mean", mean), ("variance", variance)):
            if value.shape != x.shape:
                raise ValueError(
                    f"kernel: expected a {name} like its input {tuple(x.shape)}, got {tuple(value.shape)}; is it made "
                    "for the width of the teacher?"
                )
        return mean, variance * self.spread_scale.square()

    def propagate_moments(self, state: Any, walk: Any, *args: Any, **inputs: Any) -> Any:
        """The chain for a propagation: each step adds its variance to that pushed through its mean.

        Args:
            state: ``(B, T, D)``.
            walk: of the network; see :mod:`gpseq.propagation`.
            args: as for a block.
            inputs: likewise.
        """
        masks = self.masks(args, inputs)
        for begin, t in pairwise(self.times()):
            _, variance = self.step(state.mean, t, masks, t - begin)
            if callable(getattr(self.kernel, "propagate_mean", None)):
                state = self.kernel.propagate_mean(state, walk, t, masks, t - begin)  # type: ignore[operator]
            else:
                state = walk(_Mean(self, t, masks, t - begin), state)
            state = walk.independent(state, variance)
        return state if self.finish is None else walk(self.finish, state)

    def _noise(self, like: Tensor) -> Tensor:
        """Standard normal draws; of copies behind one another the second half mirrors the first."""
        copies = self._copies
        if copies < 2:
            return _normal(like.shape, like, self.generator)
        size = len(like) // copies
        half = _normal((copies // 2 * size, *like.shape[1:]), like, self.generator)
        odd = _normal((copies % 2 * size, *like.shape[1:]), like, self.generator)
        return torch.cat([half, -half, odd])

    def extra_repr(self) -> str:
        """How many steps there are."""
        return f"num_steps={self.num_steps}"


class _Mean(nn.Module):
    """The mean of a step as a forward that a propagation can follow."""

    def __init__(self, rollout: Rollout, t: float, masks: Masks, dt: float) -> None:
        super().__init__()
        kernel = rollout.kernel
        self.kernel = copy.copy(kernel)
        # To a propagation the kernel would be a source of variance, and its conditional may call the kernel itself.
        self.kernel.conditional = None  # type: ignore[assignment]
        own = vars(kernel).get("conditional")
        self._conditional = partial(type(kernel).conditional, self.kernel) if own is None else own  # type: ignore
        self._answer, self._given = rollout.answer, (t, masks, dt)

    def forward(self, x: Tensor) -> Tensor:
        return self._answer(self._conditional, x, *self._given)[0]


@contextmanager
def drawing(model: nn.Module, copies: int = 0, draws: bool | None = True) -> Iterator[None]:
    """Let the rollouts of a model draw, or not, whatever their mode.

    Args:
        model: any module.
        copies: S, of the batch behind one another, whose noise comes in pairs of opposite signs; 0: all independent.
        draws: whether they do; ``None`` is as their mode says.
    """
    rollouts = [part for part in model.modules() if isinstance(part, Rollout)]
    before = [(part._copies, part._draws) for part in rollouts]
    try:
        for part in rollouts:
            part._copies, part._draws = copies, draws
        yield
    finally:
        for part, (number, drew) in zip(rollouts, before, strict=True):
            part._copies, part._draws = number, drew


@contextmanager
def recording_steps(
    model: nn.Module, times: Sequence[float] | None = None, states: bool = True
) -> Iterator[list[Record]]:
    """Note the steps of the rollouts of a model.

    Args:
        model: that is called meanwhile.
        times: where steps begin and end; ``None``: as the rollouts say.
        states: whether to keep states, means and variances, or spreads alone, which need little memory.
    """
    rollouts = [part for part in model.modules() if isinstance(part, Rollout)]
    before = [(part._record, part._times, part._keeps_states) for part in rollouts]
    found: list[Record] = []
    try:
        for part in rollouts:
            part._record, part._keeps_states = found, states
            part._times = part._times if times is None else tuple(times)
        yield found
    finally:
        for part, (record, steps, kept) in zip(rollouts, before, strict=True):
            part._record, part._times, part._keeps_states = record, steps, kept


def find_rollout(model: nn.Module) -> Rollout:
    """The rollout of a student.

    Args:
        model: a student.

    Raises:
        TypeError: it has none, or several.
    """
    found = [part for part in model.modules() if isinstance(part, Rollout)]
    if len(found) != 1:
        raise TypeError(
            f"student: expected one that a Distiller made, got {type(model).__name__} with {len(found)} chains."
        )
    return found[0]


def knows_length(kernel: Any) -> bool:
    """Whether a kernel takes the length of a step.

    Args:
        kernel: with ``conditional``.
    """
    parameters = inspect.signature(kernel.conditional).parameters
    return "dt" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def over_tokens(values: Tensor, padding: Tensor | None) -> Tensor:
    """Mean over the tokens that are seen; 0 where there is none.

    Args:
        values: ``(B, T, ...)``.
        padding: ``(B, T)``, ``True`` for what is left out; ``None``: nothing is.

    Returns:
        ``(B, ...)``.
    """
    if padding is None:
        return values.mean(1)
    hidden = padding.reshape(*padding.shape, *[1] * (values.dim() - 2))
    return torch.where(hidden, 0.0, values).sum(1) / (~hidden).sum(1).clamp(min=1)


def _expanded(padding: Tensor | None, x: Tensor) -> Tensor | None:
    return None if padding is None else padding.expand(x.shape[:2])


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)
