r"""Any module in the middle of a network, by its tangent at the mean: for those that have no rule.

The mean is the module's plain output; what is uncertain before it, and its own weights, enter by their Jacobians.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gpseq.propagation.call import rows_of
from gpseq.propagation.linearisation import (
    Tangents,
    Weights,
    main_output,
    pull_back,
    push_forward,
    weight_jacobians,
)
from gpseq.propagation.moments import Blocks, Diagonal, Full, GaussianState, LinearMap, LowRank
from gpseq.propagation.quadratic import covariance, variance
from gpseq.propagation.sizes import free_bytes
from gpseq.propagation.switches import forward_mode
from gpseq.propagation.walk import Walk

#: Entries that are pushed one by one, so that independent variances are carried exactly; or more where there are
#: many columns to be pushed anyway.
_PROBED, _PROBED_PER_DRAW = 256, 4


def linearise(module: nn.Module, state: GaussianState, walk: Walk, *args: Any, **inputs: Any) -> GaussianState:
    r"""The state after a module, by its tangent in the state and in its own weights.

    .. math:: h \approx f(m; \bar\theta) + J_a (a - m) + J_\theta (\theta - \bar\theta)

    In the form ``"lowrank"`` all columns go through together with the draws of the module's weights. Independent
    variances are carried exactly where the module has few inputs or outputs; elsewhere they become a part of the
    columns, by random signs, and have a sampling error like these. The other forms have the whole Jacobian.

    Args:
        module: any that ``torch.func`` can differentiate; elements of the batch may not see each other.
        state: before it.
        walk: of the network.
        args: further arguments of the module's call; the form ``"lowrank"`` takes states too.
        inputs: likewise.

    Returns:
        The state after it, of the first of several outputs.

    Raises:
        NotImplementedError: several uncertain states, in another form than ``"lowrank"``; tokens in the form
            ``"blockdiag"``; or no derivatives.
        RuntimeError: a Jacobian does not fit into memory.
    """
    with forward_mode(module):
        call = _Call.of(module, state, walk, args, inputs)
        mean = call.run(call.centres, call.means)
        if not call.states and not call.means:
            return GaussianState(mean)
        for parameter in call.parameters.values():
            walk.use(parameter)
        form = walk.options.form
        if form == "lowrank":
            return GaussianState(mean, _low_rank(call, mean))
        if len(call.states) > 1:
            raise NotImplementedError(
                f"model: {call.subject} has {len(call.states)} uncertain arguments, which only the form 'lowrank' can "
                f"linearise together, not {form!r}."
            )
        if form == "blockdiag" and (len(state.event) != 1 or mean.dim() != 2):
            raise NotImplementedError(
                f"model: {call.subject} has no rule, and whether it keeps tokens apart is not known: the form "
                "'blockdiag' cannot follow it; take 'lowrank', 'full' or 'diag'."
            )
        return _whole(call, mean)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a module as a function of what is uncertain.

    Attributes:
        module: that is called.
        walk: of the network.
        subject: what messages call it.
        arguments: all of them by position or name, with states among them.
        states: those of them that are uncertain, each once.
        parameters: of the module that are uncertain, by their names in it.
        means: of these.
        fixed: means that the posterior knows of all other parameters.
    """

    module: nn.Module
    walk: Walk
    subject: str
    arguments: Mapping[int | str, Any]
    states: tuple[GaussianState, ...]
    parameters: Mapping[str, Tensor]
    means: Weights
    fixed: Weights

    @classmethod
    def of(
        cls, module: nn.Module, state: GaussianState, walk: Walk, args: Sequence[Any], inputs: Mapping[str, Any]
    ) -> _Call:
        arguments: dict[Any, Any] = {walk.leading_argument(module): state, **dict(enumerate(args, start=1)), **inputs}
        states: list[GaussianState] = []
        for value in arguments.values():
            if isinstance(value, GaussianState) and not value.is_certain and all(value is not s for s in states):
                states.append(value)
        known, named = walk.posterior, dict(module.named_parameters())
        parameters = {name: value for name, value in named.items() if known.name(value) is not None}
        means = {name: known.mean(value) for name, value in parameters.items()}
        fixed = known.means(module)
        subject = f"{walk.path(module)}, a {type(module).__name__},"
        return cls(module, walk, subject, arguments, tuple(states), parameters, means, fixed)

    @property
    def centres(self) -> tuple[Tensor, ...]:
        """Means of the uncertain states."""
        return tuple(state.mean for state in self.states)

    def run(self, values: Sequence[Tensor], weights: Weights, row: int | None = None) -> Tensor:
        """The output, batch first.

        Args:
            values: of the uncertain states.
            weights: of the uncertain parameters.
            row: of the batch; ``None`` is all.
        """
        names = _names(self.module)
        given: dict[Any, Any] = {}
        for key, value in self.arguments.items():
            if isinstance(value, GaussianState):
                found = next((v for s, v in zip(self.states, values, strict=True) if s is value), value.mean)
                found = found if row is None else found[row : row + 1]
                given[key] = self._outside(found)
            elif row is not None:
                name = names[key] if isinstance(key, int) and key < len(names) else str(key)
                given[key] = rows_of(name, value, slice(row, row + 1), len(self._batch))
            else:
                given[key] = value
        args = tuple(given.pop(key) for key in sorted(key for key in given if isinstance(key, int)))
        made = functional_call(self.module, {**self.fixed, **weights}, args, given)
        output = main_output(made)
        return output.movedim(self.walk.batch_dim, 0) if output.dim() > 2 else output

    @property
    def _batch(self) -> Tensor:
        return next(value.mean for value in self.arguments.values() if isinstance(value, GaussianState))

    def _outside(self, value: Tensor) -> Tensor:
        """With the batch where the model has it."""
        return value.movedim(0, self.walk.batch_dim) if value.dim() > 2 else value

    def of_states(self, values: tuple[Tensor, ...]) -> Tensor:
        """The output as a function of the uncertain states."""
        return self.run(values, self.means)

    def of_all(self, values: tuple[tuple[Tensor, ...], Weights]) -> Tensor:
        """The output as a function of everything that is uncertain."""
        return self.run(*values)


def _names(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []


def _together(mean: Tensor, values: Sequence[Tensor], weights: Weights) -> int:
    """How many tangents go through at a time."""
    size = 12 * (mean.numel() + sum(value.numel() for value in values)) + 3 * sum(w.numel() for w in weights.values())
    return max(min(free_bytes(mean.device) // (4 * size * mean.element_size()), 64), 1)


def _low_rank(call: _Call, mean: Tensor) -> LowRank:
    walk, centres = call.walk, call.centres
    num_exact = walk.posterior.posterior.num_columns
    total = num_exact + walk.num_draws
    known = {name: walk.draws(value) for name, value in call.parameters.items()}
    drawn = {name: draws for name, (draws, _) in known.items()}
    exact = {name: columns for name, (_, columns) in known.items() if columns is not None}
    tangents = Tangents(drawn, exact, num_exact, call.parameters, walk.num_draws)
    covariances = [state.covariance for state in call.states]
    assert all(isinstance(found, LowRank) for found in covariances)
    states = [found for found in covariances if isinstance(found, LowRank)]
    together = _together(mean, centres, call.means)
    entries = torch.zeros_like(mean)
    # What is independent: exactly, or as a part of the columns that are draws.
    pushed = []
    for number, (value, found) in enumerate(zip(centres, states, strict=True)):
        of_one = _one_of(call, number)
        active = (found.rest.flatten(1) > 0).any(0).nonzero().squeeze(-1)
        columns = found.columns
        if min(len(active), mean[0].numel()) <= max(_PROBED, _PROBED_PER_DRAW * walk.num_draws):
            entries = entries + _squared(of_one, value, found.rest, active, mean, together, call.subject)
        else:
            signs = walk.normals(call.module, (walk.num_draws, *value.shape[1:]), value).sign()
            made = signs.unsqueeze(1) * (found.rest / walk.num_draws).sqrt()
            columns = torch.cat([columns[:num_exact], columns[num_exact:] + made])
        pushed.append(columns)
    parts = []
    for start in range(0, total, together):
        stop = min(start + together, total)
        directions = (tuple(columns[start:stop] for columns in pushed), tangents.rows(start, stop))
        parts.append(push_forward(call.of_all, (centres, call.means), directions, call.subject))
    return LowRank(torch.cat(parts), entries)


def _one_of(call: _Call, number: int) -> Callable[[Tensor], Tensor]:
    """The output as a function of one of the uncertain states."""

    def run(value: Tensor) -> Tensor:
        values = list(call.centres)
        values[number] = value
        return call.run(values, call.means)

    return run


def _squared(
    function: Callable[[Tensor], Tensor],
    value: Tensor,
    entries: Tensor,
    active: Tensor,
    mean: Tensor,
    together: int,
    subject: str,
) -> Tensor:
    """Variances of the output for independent ones of the input, through its Jacobian, some rows or columns at a time.

    Args:
        function: of the input.
        value: its mean, ``(B, *event)``.
        entries: variances, the same.
        active: which of the event's entries have any.
        mean: of the output.
        together: rows or columns at a time.
        subject: what messages call the function.
    """
    total = torch.zeros_like(mean)
    if len(active) <= mean[0].numel():
        deviations = entries.sqrt().flatten(1)
        for some in active.split(together):
            ones = torch.zeros(len(some), deviations.shape[1]).to(value)
            ones[torch.arange(len(some)), some] = 1.0
            directions = (ones.unsqueeze(1) * deviations).view(-1, *value.shape)
            total = total + push_forward(function, value, directions, subject).square().sum(0)
        return total
    rows = []
    for jacobian in _rows(function, value, mean, together, subject):
        rows.append((jacobian.square() * entries.flatten(1)).sum(-1))
    return torch.cat(rows).mT.view_as(mean)


def _rows(function: Callable[[Tensor], Tensor], value: Tensor, mean: Tensor, together: int, subject: str) -> Any:
    """Rows of the Jacobian, ``(r, B, N)`` at a time: one backward pass is for all elements of the batch."""
    basis = torch.eye(mean[0].numel(), dtype=mean.dtype, device=mean.device)
    for some in basis.split(together):
        cotangents = some.view(-1, 1, *mean.shape[1:]).expand(-1, *mean.shape)
        yield pull_back(function, value, cotangents, subject).flatten(2)


def _jacobian(function: Callable[[Tensor], Tensor], value: Tensor, mean: Tensor, subject: str) -> Tensor:
    """``(B, E, N)``, by its columns or its rows."""
    inputs, outputs = value[0].numel(), mean[0].numel()
    needed, memory = 3 * len(mean) * inputs * outputs * mean.element_size(), free_bytes(mean.device)
    if needed > memory:
        raise RuntimeError(
            f"covariance: expected a Jacobian of {subject} that fits into memory, got an estimate of "
            f"{needed / 2**30:.1f} GiB with {memory / 2**30:.1f} GiB free; take 'lowrank' or a smaller chunk_size."
        )
    together = _together(mean, [value], {})
    if outputs < inputs:
        return torch.cat(list(_rows(function, value, mean, together, subject))).movedim(0, 1)
    basis = torch.eye(inputs, dtype=value.dtype, device=value.device)
    parts = []
    for some in basis.split(together):
        directions = some.view(-1, 1, *value.shape[1:]).expand(-1, *value.shape)
        parts.append(push_forward(function, value, directions, subject).flatten(2))
    return torch.cat(parts).permute(1, 2, 0)


def _whole(call: _Call, mean: Tensor) -> GaussianState:
    """With the Jacobian itself: all forms but ``"lowrank"``, for one uncertain state at the most."""
    form = call.walk.options.form
    out = GaussianState(mean)
    if call.states:
        (state,) = call.states
        jacobian = _jacobian(_one_of(call, 0), state.mean, mean, call.subject)

        def push(columns: Tensor) -> Tensor:
            return torch.einsum("ben,rbn->rbe", jacobian, columns.flatten(2)).unflatten(-1, mean.shape[1:])

        def squared(entries: Tensor) -> Tensor:
            return torch.einsum("ben,bn->be", jacobian.square(), entries.flatten(1)).view_as(mean)

        out = state.apply(mean, LinearMap(push, squared))
    if not call.means:
        return out
    spread = variance if form == "diag" else covariance
    found = []
    for row in range(len(mean)):
        centres = call.centres

        def run(weights: Weights, row: int = row, centres: tuple[Tensor, ...] = centres) -> Tensor:
            return call.run(centres, weights, row)[0]

        jacobians = weight_jacobians(run, call.means, mean[row], call.subject)
        names = {name: call.walk.posterior.name(value) for name, value in call.parameters.items()}
        found.append(spread(call.walk.posterior, {str(names[name]): j for name, j in jacobians.items()}))
    noise = torch.stack(found)
    if form == "diag":
        own: Diagonal | Blocks | Full = Diagonal(noise.view_as(mean))
    elif form == "blockdiag":
        own = Blocks(noise)
    else:
        own = Full(noise, tuple(mean.shape[1:]))
    return GaussianState(mean, own if out.covariance is None else out.covariance.plus(own))
