"""The rule of convolutions: a matrix of weights for patches, shared by all positions.

States are ``(B, C, *positions)``. Letters: O entries of the kernel, G groups, D = C O / G inputs of one output, P
positions of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpseq.propagation.laws import Diagonal as Independent
from gpseq.propagation.laws import Law
from gpseq.propagation.moments import Covariance, Diagonal, Full, GaussianState, LinearMap, LowRank
from gpseq.propagation.noise import rescaled
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk


@dataclass(frozen=True)
class Convolution:
    """Which inputs an output of a convolution sees.

    Attributes:
        size: of the kernel.
        stride: of its steps.
        dilation: of its entries.
        groups: G.
        padding: as torch's functions have it.
        mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: str | tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, module: Any) -> Convolution:
        """That of a module."""
        return cls(
            module.kernel_size, module.stride, module.dilation, module.groups, module.padding, module.padding_mode
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of ``(N, C, *positions)``."""
        function = (F.conv1d, F.conv2d, F.conv3d)[len(self.size) - 1]
        if self.mode == "zeros" and not isinstance(self.padding, str):
            return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return function(self._padded(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> Tensor:
        pairs: list[int] = []
        for number in reversed(range(len(self.size))):  # torch counts from the last dimension
            if self.padding == "same":
                total = self.dilation[number] * (self.size[number] - 1)
                pairs += [total // 2, total - total // 2]
            else:
                one = 0 if isinstance(self.padding, str) else self.padding[number]
                pairs += [one, one]
        return F.pad(x, pairs, "constant" if self.mode == "zeros" else self.mode)

    def places(self, positions: Sequence[int], device: torch.device) -> Tensor:
        """Which position of the inputs each entry of the kernel sees, ``(P, O)``, one after the last for padding."""
        count = math.prod(positions)
        grid = torch.arange(1.0, count + 1, dtype=torch.float64, device=device).view(1, 1, *positions)
        grid = self._padded(grid)
        for number, (size, stride, dilation) in enumerate(zip(self.size, self.stride, self.dilation, strict=True)):
            grid = grid.unfold(2 + number, dilation * (size - 1) + 1, stride)[..., ::dilation]
        found = grid.reshape(-1, math.prod(self.size)).long() - 1
        return torch.where(found < 0, count, found)

    def patches(self, x: Tensor) -> Tensor:
        """What each output sees, ``(B, C, *positions)`` to ``(B, P, G, D)``."""
        places = self.places(x.shape[2:], x.device)
        seen = F.pad(x.flatten(2), (0, 1))[..., places]  # (B, C, P, O)
        return seen.unflatten(1, (self.groups, -1)).permute(0, 3, 1, 2, 4).flatten(3)

    def squared(self, variance: Tensor, weight: Tensor) -> Tensor:
        """Variances of the outputs for inputs that are independent, exact also where padding repeats an input."""
        found = self(variance, weight.square())
        if self.mode == "zeros":
            return found
        places = self.places(variance.shape[2:], variance.device)
        same = places.unsqueeze(-1) == places.unsqueeze(-2)  # (P, O, O)
        repeated = (same.sum((-2, -1)) > same.shape[-1]).nonzero().squeeze(-1)
        if not len(repeated):
            return found
        # An input that is seen twice comes with the square of the sum of its weights. Few patterns, all at the border.
        patterns, which = same[repeated].flatten(1).unique(dim=0, return_inverse=True)
        patches, flat = self.patches(variance), found.flatten(2)
        kernel = weight.flatten(2)
        for number, pattern in enumerate(patterns):
            here = repeated[which == number]
            merged = kernel * (kernel @ pattern.view(same.shape[1:]).to(kernel))
            merged = merged.unflatten(0, (self.groups, -1)).flatten(2)  # (G, K / G, D)
            flat = flat.index_copy(2, here, torch.einsum("bpgd,gkd->bgkp", patches[:, here], merged).flatten(1, 2))
        return flat.view_as(found)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolve(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Any stride, dilation, groups, padding and mode of it; the noise of weights is the same at all positions.

    Args:
        module: the convolution.
        state: ``(B, C, *positions)``.
        walk: of the network.

    Returns:
        ``(B, K, *positions)``.

    Raises:
        ValueError: the form is ``"blockdiag"``: features of a position are not the last dimension.
    """
    if walk.options.form == "blockdiag":
        raise ValueError(
            f"covariance: blocks of tokens cannot follow convolutions, got {walk.path(module)}; take 'lowrank', 'full' "
            "or 'diag'."
        )
    weight, convolution = walk.mean(module.weight), Convolution.of(module)
    assert weight is not None

    def push(columns: Tensor) -> Tensor:
        return convolution(columns.flatten(0, 1), weight).unflatten(0, columns.shape[:2])

    mean = convolution(state.mean, weight, walk.mean(module.bias))
    linear = LinearMap(push, lambda variance: convolution.squared(variance, weight), mixes=True)
    out = state.apply(mean, linear)
    laws = walk.laws(module.weight, module.bias, state.mean)
    if not laws:
        return out
    noise = {"diag": _diagonal, "lowrank": _columns, "full": _full}[walk.options.form]
    return out.plus(GaussianState(torch.zeros_like(mean), noise(module, convolution, laws, state, walk, mean)))


def _diagonal(
    module: Any,
    convolution: Convolution,
    laws: Sequence[tuple[Law, str]],
    state: GaussianState,
    walk: Walk,
    like: Tensor,
) -> Covariance:
    variance = state.variance if walk.options.products and state.covariance is not None else None
    return Diagonal(_marginal(convolution, module.weight, laws, state.mean, variance, like))


def _marginal(
    convolution: Convolution,
    weight: Tensor,
    laws: Sequence[tuple[Law, str]],
    mean: Tensor,
    variance: Tensor | None,
    like: Tensor,
    bias: bool = True,
) -> Tensor:
    """Marginal variances of the noise, ``(B, K, *positions)``, for inputs that are independent."""
    total = torch.zeros_like(like)
    for law, part in laws:
        if part == "bias":
            total = total + (law.marginals().view(-1, *[1] * (like.dim() - 2)) if bias else 0.0)
        elif part == "weight" and isinstance(law, Independent):
            second = mean.square() if variance is None else mean.square() + variance
            total = total + convolution(second, law.entries.view(weight.shape))
        else:
            rows = law.shape[0] // convolution.groups
            inputs, spread = convolution.patches(mean), None
            if part == "both":
                inputs = F.pad(inputs, (0, 1), value=float(bias))
            if variance is not None:
                spread = F.pad(convolution.patches(variance), (0, 1 if part == "both" else 0))
            noises = [
                law.rows(g * rows, (g + 1) * rows).variance(
                    inputs[:, :, g], None if spread is None else spread[:, :, g]
                )
                for g in range(convolution.groups)
            ]
            total = total + torch.cat(noises, -1).mT.view(like.shape)
    return total


def _columns(
    module: Any,
    convolution: Convolution,
    laws: Sequence[tuple[Law, str]],
    state: GaussianState,
    walk: Walk,
    like: Tensor,
) -> Covariance:
    mean, weight, posterior = state.mean, module.weight, walk.posterior
    columns: Tensor | float = 0.0
    if posterior.name(weight) is not None:
        drawn = walk.columns(weight).unflatten(1, (convolution.groups, -1, *weight.shape[1:]))
        number = len(drawn)
        made = convolution(mean, drawn.transpose(0, 1).flatten(0, 2))
        made = made.unflatten(1, (convolution.groups, number, -1))  # (B, G, R, K / G, *positions)
        columns = columns + made.movedim(2, 0).flatten(2, 3)
    if posterior.name(module.bias) is not None:
        drawn = walk.columns(module.bias)
        columns = columns + drawn.view(len(drawn), 1, -1, *[1] * (like.dim() - 2)).expand(-1, *like.shape)
    assert isinstance(columns, Tensor)
    if walk.options.rescale:
        known = _marginal(convolution, weight, laws, mean, None, like)
        columns = rescaled(columns, known, posterior.posterior.num_columns)
    if not walk.options.products or state.covariance is None:
        return LowRank(columns)
    return LowRank(columns, _marginal(convolution, weight, laws, torch.zeros_like(mean), state.variance, like, False))


def _full(
    module: Any,
    convolution: Convolution,
    laws: Sequence[tuple[Law, str]],
    state: GaussianState,
    walk: Walk,
    like: Tensor,
) -> Covariance:
    groups, outputs = convolution.groups, like.shape[1]
    patches = convolution.patches(state.mean)  # (B, P, G, D)
    batch, count = patches.shape[:2]
    covariance = state.covariance.entries if isinstance(state.covariance, Full) and walk.options.products else None
    seen = _seen(convolution, state).view(count, groups, -1)  # which entry of the event, (P, G, D)
    total = like.new_zeros(batch, outputs, count, outputs, count)
    for law, part in laws:
        if part == "bias":
            total = total + law.between(torch.arange(outputs, device=like.device))[:, None, :, None]
        elif part == "weight" and isinstance(law, Independent):
            spread = law.entries.view(groups, -1, law.shape[1])  # (G, K / G, D)
            tokens = patches.movedim(2, 1).unsqueeze(2)  # (B, G, 1, P, D)
            noise = (tokens * spread.unsqueeze(-2)) @ tokens.mT
            if covariance is not None:
                places = seen.movedim(0, 1)  # (G, P, D)
                both = F.pad(covariance, (0, 1, 0, 1))[:, places.unsqueeze(-2), places.unsqueeze(-3)]
                noise = noise + torch.einsum("bgpqd,gkd->bgkpq", both, spread)
            total = total + torch.diag_embed(noise.flatten(1, 2).movedim(1, -1)).permute(0, 3, 1, 4, 2)
        else:
            # Tokens are patches of a group; of what each law says of their outputs, those of the group are there.
            inputs, second = patches.flatten(1, 2), None
            if covariance is not None:
                places = seen.flatten()
                second = F.pad(covariance, (0, 1, 0, 1))[:, places][..., places]
                second = second.unflatten(2, (count * groups, -1)).unflatten(1, (count * groups, -1))
            if part == "both":
                inputs = F.pad(inputs, (0, 1), value=1.0)
                second = None if second is None else F.pad(second, (0, 1, 0, 0, 0, 1))
            noise = law.tokens(inputs, second).flatten(3, 4).flatten(1, 2)
            rows = torch.arange(outputs, device=like.device).unsqueeze(1)
            token = torch.arange(count, device=like.device) * groups + rows // (outputs // groups)
            index = (token * outputs + rows).flatten()
            total = total + noise[:, index][..., index].view(total.shape)
    return Full(total.flatten(3, 4).flatten(1, 2), tuple(like.shape[1:]))


def _seen(convolution: Convolution, state: GaussianState) -> Tensor:
    """Which entry of the event the patches have, ``(P, G, D)``, one after the last for padding."""
    channels, *positions = state.event
    count = math.prod(positions)
    places = convolution.places(positions, state.mean.device).unsqueeze(1)  # (P, 1, O)
    first = torch.arange(channels, device=places.device).view(1, -1, 1) * count
    return torch.where(places == count, channels * count, places + first).flatten(1)
