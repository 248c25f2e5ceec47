r"""How uncertain a teacher's own transitions are.

A source answers, for one transition from one state, with mean and variance of the next: ``source(transition, x)``. A
transformer with softmax attention has no spread; without one a divergence is infinite. So a floor, in parts of the size
of the increments, is added to every source. It is fixed: a floor that is learnt together with the student grows until
nothing of the teacher is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.reconfiguration.path import Path, Transition, transitions, unfused

Source = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
#: Sources by name.
SPREADS = ("floor", "gp", "mc_dropout")


class MonteCarlo:
    """Mean and variance over draws of one transition, from the same state.

    Args:
        num_passes: how many.
        dropout: whether dropout is on meanwhile; what draws in eval mode, as Gaussian processes do, draws in any case.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> mean, variance = MonteCarlo(num_passes=4)(layer, torch.randn(5, 3, 8))
        >>> bool((variance > 0).any()), layer.training
        (True, False)
    """

    def __init__(self, num_passes: int = 8, dropout: bool = True) -> None:
        self.num_passes, self.dropout = check_count("num_passes", num_passes, least=2), dropout

    def __call__(self, transition: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, both like x."""
        with unfused(), _dropout(transition) if self.dropout else nullcontext():
            draws = torch.stack([transition(x) for _ in range(self.num_passes)])
        return draws.mean(0), draws.var(0)


class GaussianAttention:
    r"""The variance that attention by Gaussian processes has, in closed form.

    With norms before attention the next state is :math:`u + a`, so its moments are those of a, shifted. With norms
    behind it the covariance of a token goes through the Jacobian of the norm.

    .. math::
        \operatorname{Cov}[\operatorname{LN}(h)] \approx J C J^\top, \qquad
        J_{ij} = \frac{\gamma_i}{\rho} \Bigl(\delta_{ij} - \frac1D - \frac{z_i z_j}{D}\Bigr), \qquad
        z = \frac{h - \bar h}{\rho}.

    For :class:`gpseq.nn.SGPATransformerEncoderLayer`, and torch's layers after :func:`gpseq.nn.replace_attention`;
    for attention of other hosts, :class:`MonteCarlo` with ``dropout=False`` draws.

    Raises:
        TypeError: the transition has no such attention.
    """

    def __call__(self, transition: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, both like x."""
        block: Any = getattr(transition, "block", None)
        attention: Any = getattr(block, "self_attn", None)
        if not isinstance(transition, Transition) or not callable(getattr(attention, "conditional", None)):
            raise TypeError(
                "spread: 'gp' expects layers of torch's kind with attention that has conditional(), such as "
                f"gpseq.nn.SGPAttention, cut at points='attention', got {type(block or transition).__name__}; "
                "MonteCarlo(dropout=False) takes any that draw."
            )
        if transition.kind is None:
            raise TypeError("spread: 'gp' expects points='attention', where a step ends with attention.")
        named = transition.call.named(block)
        u = transition.before(x)
        n = block.norm1(u) if block.norm_first else u
        given = n if attention.batch_first else n.transpose(0, 1)
        mean, covariance = attention.conditional(
            given,
            key_padding_mask=named.get("src_key_padding_mask"),
            attn_mask=named.get("src_mask"),
            is_causal=bool(named.get("is_causal", False)),
        )
        root = covariance.root.to_dense()
        if not attention.batch_first:
            mean, root = mean.transpose(0, 1), root.transpose(0, 1)
        if block.norm_first:
            return u + mean, root.square().sum(-1)
        return block.norm1(u + mean), _through_norm(block.norm1, u + mean, root)


class Ensemble:
    """Mean and variance over the same transition of several networks.

    They have to share a hidden space, as draws of weights around one solution do: of networks that were trained by
    themselves the third feature is another thing in each.

    Args:
        members: models like the teacher, in eval mode.

    Raises:
        ValueError: fewer than two; or, when it is asked, one that is not like the teacher or that trains.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = tuple(members)
        if len(self.members) < 2:
            raise ValueError(f"members: expected at least two models, got {len(self.members)}.")

    def __call__(self, transition: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, both like x."""
        if not isinstance(transition, Transition):
            raise TypeError(f"transition: expected a Transition of the teacher, got {type(transition).__name__}.")
        draws = torch.stack([self._twin(member, transition)(x) for member in self.members])
        return draws.mean(0), draws.var(0)

    def _twin(self, member: nn.Module, transition: Transition) -> Transition:
        stack = transition.stack
        modules = dict(member.named_modules())
        for name, block in zip(stack.names, stack.blocks, strict=True):
            if name not in modules:
                raise ValueError(f"members: expected models like the teacher, got one without {name}.")
            if _shapes(modules[name]) != _shapes(block):
                raise ValueError(f"members: expected models like the teacher, got one with another {name}.")
            if any(part.training for part in modules[name].modules()):
                raise ValueError(f"members: expected models in eval mode, got one with {name} in train mode.")
        twin = replace(stack, blocks=tuple(modules[name] for name in stack.names))
        return Transition(twin, transition.number, transition.call)


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    """What is alike for blocks that do the same to tokens of one width."""
    return type(block), tuple((name, tuple(value.shape)) for name, value in block.named_parameters())


def as_source(spread: Any) -> Source | None:
    """A source of the teacher's spread, ``None`` for the floor alone.

    Args:
        spread: ``"floor"``, ``"gp"``, ``"mc_dropout"``, a callable ``(transition, x) -> (mean, variance)``, or an
            object with ``conditional(x, t) -> (mean, covariance)``, whose second entry is variances like the mean or a
            LinearOperator.

    Raises:
        TypeError: something else.
        ValueError: an unknown name.
    """
    if isinstance(spread, str):
        if spread not in SPREADS:
            raise ValueError(f"spread: expected one of {', '.join(SPREADS)} or a source, got {spread!r}.")
        return {"floor": None, "gp": GaussianAttention(), "mc_dropout": MonteCarlo()}[spread]
    if callable(getattr(spread, "conditional", None)):
        return _Conditional(spread)
    if callable(spread):
        return spread
    raise TypeError(
        f"spread: expected one of {', '.join(SPREADS)}, a callable (transition, x) -> (mean, variance), or an object "
        f"with conditional(x, t), got {type(spread).__name__}."
    )


class _Conditional:
    """The moments of an object that knows the time."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __call__(self, transition: Transition, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.source.conditional(x, transition.number / len(transition.stack))
        return mean, spread.diagonal(dim1=-2, dim2=-1) if isinstance(spread, LinearOperator) else spread


def teacher_moments(path: Path, source: Source | None, floor: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Means and variances of the teacher's transitions along a path.

    Args:
        path: that was captured.
        source: of the spread; ``None``: transitions are certain, and the means are the states.
        floor: deviations that are added in quadrature, ``(L,)``.

    Returns:
        L tensors ``(B, T, D)`` each.

    Raises:
        ValueError: a source answers in another shape, or with a variance that is negative.
    """
    means: list[Tensor] = []
    variances: list[Tensor] = []
    if source is None:
        means = list(path.states[1:])
        variances = [least.square().to(state.dtype).expand_as(state) for least, state in zip(floor, means, strict=True)]
        return tuple(means), tuple(variances)
    for least, step, x in zip(floor, transitions(path), path.states[:-1], strict=True):
        mean, variance = source(step, x)
        for name, value in (("mean", mean), ("variance", variance)):
            if not isinstance(value, Tensor) or value.shape != x.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"spread: expected a {name} of shape {tuple(x.shape)} from the source, got {got}.")
        if not (variance >= 0).all():
            raise ValueError("spread: expected variances that are not negative from the source, got some that are.")
        means.append(mean)
        variances.append(variance + least.square().to(x.dtype))
    return tuple(means), tuple(variances)


def _through_norm(norm: nn.LayerNorm, h: Tensor, root: Tensor) -> Tensor:
    """Variances of a layer norm of h with the covariance R R^T of each token, ``(..., D, n)``, by its Jacobian."""
    centred = h - h.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    z = (centred / scale).unsqueeze(-1)
    moved = root - root.mean(-2, keepdim=True) - z * (z * root).mean(-2, keepdim=True)
    gain = 1.0 / scale if norm.weight is None else norm.weight / scale
    return moved.square().sum(-1) * gain.square()


@contextmanager
def _dropout(module: nn.Module) -> Iterator[None]:
    """Dropout on, and all else in its mode; attention has a rate of its own and asks for its own mode."""
    parts = [part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd) or _drops(part)]
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training


def _drops(module: nn.Module) -> bool:
    """Whether a module has a rate of dropout, as a number or as a layer that it may ask for it."""
    named = {**vars(module), **module._modules}
    return any("drop" in name and isinstance(value, float | nn.Module) for name, value in named.items())
