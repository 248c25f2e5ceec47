r"""The rule of modules that are sources of variance by themselves, such as attention as Gaussian processes.

Such a module has ``conditional(x, **inputs) -> (mean, covariance)``. With input :math:`N(\mu, C)` the law of total
variance, to first order in the input's noise, is

.. math:: m(\mu), \qquad S(\mu) + J_m C J_m^\top

where m and S are mean and covariance that it answers, and :math:`J_m` the Jacobian of m.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from linear_operator.operators import BlockInterleavedLinearOperator, LinearOperator
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpseq.linalg import covariance_root
from gpseq.propagation import quadratic
from gpseq.propagation.call import rows_of
from gpseq.propagation.moments import Blocks, Covariance, Diagonal, Full, GaussianState, LinearMap, LowRank
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk

#: Entries of an event up to which squares of a Jacobian that is not known in closed form are summed exactly.
EXACT_UP_TO = 1024
#: Random signs beyond that, which leave a relative error of 6 % in deviations.
NUM_SIGNS = 128
#: Vectors that go through a tangent at a time.
CHUNK = 64
#: Arguments of attention that ask for more than its output.
_ASKED = ("need_weights", "average_attn_weights")


class _Mean(nn.Module):
    """The mean of a module as its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[[Tensor], Any], x: Tensor) -> Any:
        return call(x)


@register(lambda module: callable(getattr(module, "conditional", None)))
def source(module: Any, state: GaussianState, walk: Walk, *others: Any, **inputs: Any) -> GaussianState:
    """A module with a mean and a covariance at each input.

    In the form ``"full"`` attention with ``posterior(query, key, value, ...)``, a distribution of its heads, keeps the
    covariance between tokens; ``"lowrank"`` has draws of it as columns, with exact marginals.

    Args:
        module: with ``conditional(x, **inputs)``, a mean ``(B, *event)`` and a covariance: variances in its shape,
            ``(B, *tokens, D, D)``, or ``(B, N, N)`` over the flat event.
        state: before it.
        walk: of the network.
        others: keys and values, which have to be the state itself.
        inputs: masks.

    Uncertain parameters of the module enter by their Jacobians in the mean.

    Raises:
        NotImplementedError: attention between two sequences.
        ValueError: a covariance of another shape.
    """
    call = _Call(module, walk, state, others, inputs)
    at = state.mean
    mean, spread = call(at)
    tangent = _tangent(module, walk, lambda x: call(x)[0], at)
    carried = state.apply(mean, tangent)
    noise = _noise(module, walk, call, at, mean, spread)
    uncertain = _own(module, walk, call, at, mean)
    found = noise if uncertain is None else noise.plus(uncertain)
    return GaussianState(mean, found if carried.covariance is None else carried.covariance.plus(found))


class _Call:
    """One call of a module's moments, batch first, at the posterior's mean of its parameters."""

    def __init__(
        self, module: Any, walk: Walk, state: GaussianState, others: tuple[Any, ...], inputs: Mapping[str, Any]
    ) -> None:
        named = dict(inputs)
        others = (*others, named.pop("key", None), named.pop("value", None))
        if any(other is not None and other is not state for other in others):
            raise NotImplementedError(
                f"model: attention between two sequences, {walk.path(module)}, has no rule; take "
                "on_unknown='linearise' for the layer that it is in."
            )
        self.inputs = {name: value for name, value in named.items() if value is not None and name not in _ASKED}
        self.module, self.is_time_first = module, getattr(module, "batch_first", None) is False
        self.parameters = dict(module.named_parameters())
        means = {name: walk.posterior.mean(value) for name, value in self.parameters.items()}
        self.means = {name: value for name, value in means.items() if value is not self.parameters[name]}

    def __call__(self, x: Tensor) -> tuple[Tensor, Any]:
        """Mean and covariance."""
        return self.at(x, self.means)

    def at(self, x: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """The same with other parameters."""
        x = x.transpose(0, 1) if self.is_time_first else x
        mean, spread = self._run(lambda x: self.module.conditional(x, **self.inputs), x, parameters)
        if self.is_time_first:
            mean, spread = mean.transpose(0, 1), _batch_first(spread)
        return mean, spread

    def of_row(self, row: int, batch: int) -> _Call:
        """The call for one element of the batch."""
        one = copy(self)
        rows = slice(row, row + 1)
        one.inputs = {name: rows_of(name, value, rows, batch) for name, value in self.inputs.items()}
        return one

    def heads(self, x: Tensor) -> Tensor | None:
        """Covariances of the heads' tokens, ``(B, H, D, T, T)`` or of size 1 in place of D, where there are such."""
        posterior = getattr(self.module, "posterior", None)
        if not callable(posterior) or not isinstance(getattr(self.module, "out_proj", None), nn.Linear):
            return None
        known = inspect.signature(posterior).parameters
        if not {"query", "key", "value"} <= known.keys():
            return None
        options: dict[str, Any] = {**self.inputs, "full": True} if "full" in known else self.inputs
        x = x.transpose(0, 1) if self.is_time_first else x
        try:
            found = self._run(lambda x: posterior(x, x, x, **options), x, self.means)
        except ValueError:  # a layer without a joint law of its tokens, which draws each by itself
            return None
        operator = found.lazy_covariance_matrix
        if not isinstance(operator, BlockInterleavedLinearOperator):
            return None
        covariance = operator.base_linear_op.to_dense()
        # Dimensions that share one come as views of it.
        return covariance[:, :, :1] if covariance.stride(2) == 0 else covariance

    def _run(self, function: Callable[[Tensor], Any], x: Tensor, parameters: Mapping[str, Tensor]) -> Any:
        if not parameters:
            return function(x)
        values = {f"module.{name}": value for name, value in parameters.items()}
        return functional_call(_Mean(self.module), values, (function, x))


def _batch_first(spread: Any) -> Any:
    """A covariance with its two leading dimensions exchanged."""
    if isinstance(spread, LinearOperator):
        batch = list(range(spread.dim()))
        batch[:2] = [1, 0]
        return spread.permute(*batch)
    return spread.transpose(0, 1)


def _tangent(module: nn.Module, walk: Walk, function: Callable[[Tensor], Tensor], at: Tensor) -> LinearMap:
    """The Jacobian of a function, by derivatives of it.

    Vectors go through the transposed of the transposed: so the covariance, which comes with the mean, is computed once,
    and its tangent not at all.
    """
    kept: list[tuple[Callable[..., Any], Tensor]] = []

    def push(columns: Tensor) -> Tensor:
        if not kept:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has first derivatives only
                mean, pull = vjp(function, at)[:2]
            kept.append((pull, torch.zeros_like(mean)))
        pull, zero = kept[0]
        forward = vjp(lambda w: pull(w)[0], zero)[1]
        return vmap(lambda u: forward(u)[0], chunk_size=CHUNK)(columns)

    def units(event: torch.Size) -> Tensor:
        size = math.prod(event)
        if size <= EXACT_UP_TO:
            return torch.eye(size, dtype=at.dtype, device=at.device).view(size, *event)
        return walk.normals(module, (NUM_SIGNS, *event), at).sign() * NUM_SIGNS**-0.5

    def squared(variance: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for part in units(variance.shape[1:]).split(CHUNK):
            total = total + push(part.unsqueeze(1) * variance.sqrt()).square().sum(0)
        assert isinstance(total, Tensor)
        return total

    def blocks(entries: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(entries)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        total: Tensor | float = 0.0
        for part in units(entries.shape[1:-1]).split(CHUNK):
            out = push(torch.einsum("b...ij,r...j->rb...i", root, part))
            total = total + torch.einsum("rb...i,rb...j->b...ij", out, out)
        assert isinstance(total, Tensor)
        return total

    return LinearMap(push, squared, blocks, mixes=True)


def _noise(module: Any, walk: Walk, call: _Call, at: Tensor, mean: Tensor, spread: Any) -> Covariance:
    """The module's own covariance, in the form of the walk."""
    form = walk.options.form
    width = mean.shape[-1]
    if isinstance(spread, Tensor) and spread.shape == mean.shape:
        return walk.diagonal(spread)
    if tuple(spread.shape) == (*mean.shape, width):
        variance = _diagonal(spread)
        if form == "diag":
            return Diagonal(variance)
        if form == "blockdiag":
            return Blocks(_dense(spread))
        heads = call.heads(at) if mean.dim() == 3 else None
        if heads is None:
            return _from_blocks(module, walk, spread, variance)
        return _from_heads(module, walk, heads, call, variance)
    size = math.prod(mean.shape[1:])
    if tuple(spread.shape) != (len(mean), size, size):
        raise ValueError(
            f"conditional: expected {walk.path(module)} to answer with a covariance of shape {tuple(mean.shape)}, "
            f"{(*mean.shape, width)} or {(len(mean), size, size)}, got {tuple(spread.shape)}."
        )
    event = tuple(mean.shape[1:])
    if form == "full":
        return Full(_dense(spread), event)
    variance = _diagonal(spread).unflatten(-1, event)
    if form == "diag":
        return Diagonal(variance)
    if form == "blockdiag":
        return _token_blocks(_dense(spread), mean)
    drawn = walk.normals(module, (walk.num_draws, size), mean)
    columns = torch.einsum("bnk,rk->rbn", covariance_root(_dense(spread), jitter=0.0), drawn).unflatten(-1, event)
    return _as_columns(walk, columns, variance)


def _from_blocks(module: nn.Module, walk: Walk, spread: Any, variance: Tensor) -> Covariance:
    """Tokens that are independent of each other."""
    entries = _dense(spread)
    if walk.options.form == "full":
        flat = entries.reshape(len(entries), -1, *entries.shape[-2:])  # (B, T, D, D)
        joint = torch.diag_embed(flat.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2)  # (B, T, D, T, D)
        return Full(joint.flatten(3).flatten(1, 2), tuple(variance.shape[1:]))
    drawn = walk.normals(module, (walk.num_draws, *variance.shape[1:]), variance)
    columns = torch.einsum("b...ij,r...j->rb...i", covariance_root(entries, jitter=0.0), drawn)
    return _as_columns(walk, columns, variance)


def _from_heads(module: Any, walk: Walk, heads: Tensor, call: _Call, variance: Tensor) -> Covariance:
    """Heads whose tokens covary, behind the output projection; padding, whose variance is zero, has none."""
    weight = call.means.get("out_proj.weight", module.out_proj.weight)
    number = heads.shape[1]
    matrix = weight.unflatten(-1, (number, -1))  # (E, H, D)
    kept = (variance > 0).any(-1).to(variance)  # (B, T)
    if walk.options.form == "full":
        heads = (heads * kept[:, None, None, :, None] * kept[:, None, None, None, :]).to(weight)
        if heads.shape[2] == 1:
            outer = torch.einsum("khd,lhd->hkl", matrix, matrix)
            joint = torch.einsum("bhts,hkl->btksl", heads.squeeze(2), outer)
        else:
            outer = torch.einsum("khd,lhd->hdkl", matrix, matrix)
            joint = torch.einsum("bhdts,hdkl->btksl", heads, outer)
        return Full(joint.flatten(3).flatten(1, 2), tuple(variance.shape[1:]))
    shape = (walk.num_draws, number, matrix.shape[-1], heads.shape[-1])
    drawn = walk.normals(module, shape, variance)
    root = covariance_root(heads, jitter=0.0).to(weight).expand(-1, -1, shape[2], -1, -1)
    noise = torch.einsum("bhdts,rhds->rbthd", root, drawn)
    columns = noise.flatten(-2) @ weight.mT * kept.unsqueeze(-1)
    return _as_columns(walk, columns, variance)


def _as_columns(walk: Walk, drawn: Tensor, variance: Tensor) -> LowRank:
    """Draws as columns, with exact marginals; they are independent of all weights, and of columns that are exact."""
    columns = drawn * len(drawn) ** -0.5
    if walk.options.rescale:
        found = columns.square().sum(0)
        some = found > 0
        columns = columns * torch.where(some, variance / torch.where(some, found, 1.0), 1.0).sqrt()
    number = walk.posterior.posterior.num_columns
    if number:
        columns = torch.cat([columns.new_zeros(number, *columns.shape[1:]), columns])
    return LowRank(columns)


def _own(module: nn.Module, walk: Walk, call: _Call, at: Tensor, mean: Tensor) -> Covariance | None:
    """What uncertain parameters of the module add to its mean, to first order."""
    names = {name: found for name, value in call.parameters.items() if (found := walk.posterior.name(value))}
    if not names:
        return None
    walk.use(*(call.parameters[name] for name in names))
    values = {name: walk.posterior.mean(call.parameters[name]).detach() for name in names}
    rest = {name: value for name, value in call.means.items() if name not in values}
    with sdpa_kernel(SDPBackend.MATH):
        if walk.options.form != "lowrank":
            return _own_rows(walk, call, at, mean, names, values, rest)
        drawn = {name: walk.columns(call.parameters[name]).unflatten(-1, values[name].shape) for name in names}

        def along(change: dict[str, Tensor]) -> Tensor:
            found: Tensor = jvp(lambda some: call.at(at, {**rest, **some})[0], (values,), (change,))[1]
            return found

        columns = vmap(along, chunk_size=CHUNK)(drawn)
    return LowRank(columns)


def _own_rows(
    walk: Walk,
    call: _Call,
    at: Tensor,
    mean: Tensor,
    names: Mapping[str, str],
    values: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
) -> Covariance:
    """The same by the Jacobian of each element of the batch."""
    from gpseq.propagation.linearisation import weight_jacobians

    form, found = walk.options.form, []
    for row in range(len(mean)):
        one = call.of_row(row, len(mean))

        def run(some: Mapping[str, Tensor], one: _Call = one, row: int = row) -> Tensor:
            return one.at(at[row : row + 1], {**rest, **some})[0][0]

        jacobians = weight_jacobians(run, dict(values), mean[row], walk.path(call.module))
        named = {names[name]: jacobian for name, jacobian in jacobians.items()}
        found.append((quadratic.variance if form == "diag" else quadratic.covariance)(walk.posterior, named))
    noise = torch.stack(found)
    if form == "diag":
        return Diagonal(noise.view_as(mean))
    return _token_blocks(noise, mean) if form == "blockdiag" else Full(noise, tuple(mean.shape[1:]))


def _token_blocks(joint: Tensor, mean: Tensor) -> Blocks:
    """Those of a covariance over the flat event, ``(B, N, N)``."""
    width = mean.shape[-1]
    dense = joint.unflatten(2, (-1, width)).unflatten(1, (-1, width))
    return Blocks(dense.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(*mean.shape, width))


def _dense(spread: Any) -> Tensor:
    dense: Tensor = spread.to_dense() if isinstance(spread, LinearOperator) else spread
    return dense


def _diagonal(spread: Any) -> Tensor:
    diagonal: Tensor = spread.diagonal(dim1=-2, dim2=-1)
    return diagonal
