r"""The step that is applied again and again: a small transformer that knows the time, and answers with a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_number
from gpseq.reconfiguration.masks import Masks

#: Spread at the start, for increments of unit size.
INITIAL_SPREAD = 0.08
#: Longest period of the features of time, which is counted in thousandths.
LONGEST_PERIOD = 10_000.0


class TransitionKernel(nn.Module):
    r"""One Gaussian transition for all depths, :math:`p(X' \mid X, t) = N(\mu(X, t), \operatorname{diag} s^2(X, t))`.

    .. math::
        z = \text{body}(X, t), \qquad \mu = z + r\, W_2 \operatorname{GELU}(W_1 \operatorname{LN} z), \qquad
        s = r\, (\operatorname{softplus}(W_s \operatorname{LN} z) + s_{\min}).

    The body is a stack of blocks of attention and a perceptron, whose norms have no parameters and are shifted, scaled
    and gated by the time. Gates and the last matrix of the mean start at zero, so the step starts as the identity. r is
    the size of the teacher's increment at that depth, a number for each of the teacher's steps, with lines in between
    and in proportion to the length of the step; it is 1 until :meth:`set_increments`.

    Args:
        dim: D, width of tokens.
        num_heads: H, of attention.
        depth: blocks in the body.
        mlp_ratio: width of the hidden units of the perceptrons, in parts of D.
        num_steps: L, transitions of the teacher.
        dropout: of attention and of both branches.
        causal: whether a token sees none after it, whatever the masks say.
        min_spread: the least s, relative to r.
        num_time_features: sines and cosines, one half of the time and one half of the length of the step.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: numbers that do not fit.

    Source:
        Peebles and Xie (2023), Scalable diffusion models with transformers, section 3.2, for blocks that the time
        gates.

    Example:
        >>> kernel = TransitionKernel(dim=8, num_heads=2, num_steps=3)
        >>> x = torch.randn(5, 4, 8)
        >>> mean, variance = kernel.conditional(x, t=1 / 3)
        >>> bool((mean == x).all()), variance.shape
        (True, torch.Size([5, 4, 8]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        num_steps: int = 1,
        dropout: float = 0.0,
        causal: bool = False,
        min_spread: float = 1e-3,
        num_time_features: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("num_heads", num_heads)
        check_count("depth", depth)
        check_count("num_steps", num_steps)
        check_number("mlp_ratio", mlp_ratio, above=0.0, expected="a positive number")
        check_number("min_spread", min_spread, above=0.0, expected="a positive number")
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}.")
        if check_count("num_time_features", num_time_features) % 4:
            raise ValueError(f"num_time_features: expected a multiple of 4, got {num_time_features}.")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.num_steps, self.causal = dim, num_heads, num_steps, causal
        self.min_spread = float(min_spread)
        self.num_time_features = num_time_features
        self.time = nn.Sequential(nn.Linear(num_time_features, dim, **made), nn.SiLU(), nn.Linear(dim, dim, **made))
        hidden = max(round(mlp_ratio * dim), 1)
        self.blocks = nn.ModuleList(GatedBlock(dim, num_heads, hidden, dropout, **made) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, **made)
        self.mean = nn.Sequential(nn.Linear(dim, dim, **made), nn.GELU(), nn.Linear(dim, dim, **made))
        self.spread = nn.Linear(dim, dim, **made)
        self.register_buffer("increments", torch.ones(num_steps, **made))
        self.increments: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew; the step is the identity again."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()
        for block in self.blocks:
            block.reset_parameters()  # type: ignore[operator]
        last = self.mean[2]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
            self.spread.weight.mul_(0.1)
            self.spread.bias.fill_(math.log(math.expm1(INITIAL_SPREAD)))

    def set_increments(self, sizes: Tensor) -> None:
        """Tell the kernel how large the teacher's increments are.

        Args:
            sizes: ``(L,)``, positive.

        Raises:
            ValueError: another shape, or numbers that are not positive.
        """
        if sizes.shape != self.increments.shape or not ((sizes > 0) & sizes.isfinite()).all():
            raise ValueError(f"sizes: expected {self.num_steps} positive numbers, got {sizes.tolist()}.")
        self.increments.copy_(sizes)

    @torch.no_grad()
    def start_from(self, blocks: Sequence[Mapping[str, Tensor]]) -> bool:
        """Start the first block of the body from the mean of other blocks, with gates at one.

        Args:
            blocks: of each its matrices, see :class:`~gpseq.reconfiguration.BlockKind`.

        Returns:
            Whether attention was taken over; perceptrons of another width are left as they were.
        """
        if not blocks or not all(blocks):
            return False
        return bool(self.blocks[0].start_from(blocks, float(self.increments.mean())))  # type: ignore[operator]

    def conditional(
        self,
        x: Tensor,
        t: Tensor | float,
        mask: Tensor | Masks | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the next state.

        Args:
            x: ``(B, T, D)``.
            t: where the step ends, in (0, 1]; a number, or ``(B,)``.
            mask: ``(B, T)`` or ``(T, T)`` or ``(B, H, T, T)``, bool with ``True`` for what is ignored, or floats that
                are added to scores, those not ``(B, T)``; or :class:`~gpseq.reconfiguration.Masks`, which alone can
                say which of the first two is meant where B is T.
            dt: length of the step; ``None`` is 1 / L.

        Returns:
            Both ``(B, T, D)``.

        Raises:
            ValueError: tokens of another shape, a time that is none, or a mask that does not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected tokens (B, T, {self.dim}), got shape {tuple(x.shape)}.")
        masks = self._masks(mask, x)
        code, size = self._code(x, t, dt)
        z = x
        for block in self.blocks:
            z = block(z, code, size, masks)
        normed = self.norm(z)
        mean = z + size * self.mean(normed)
        deviation = size * (functional.softplus(self.spread(normed)) + self.min_spread)
        return mean, deviation.square()

    def propagate_mean(
        self, state: Any, walk: Any, t: float, mask: Tensor | Masks | None = None, dt: float | None = None
    ) -> Any:
        """The map to the mean, for a propagation of moments.

        Args:
            state: of tokens ``(B, T, D)``.
            walk: of the network; see :mod:`gpseq.propagation`.
            t: where the step ends.
            mask: as for :meth:`conditional`.
            dt: length of the step; ``None`` is 1 / L.

        Returns:
            The state of the means.
        """
        masks = self._masks(mask, state.mean)
        code, size = self._code(state.mean, t, dt)
        for block in self.blocks:
            state = block.propagate(state, walk, code, size, masks)  # type: ignore[operator]
        return state.branch(lambda z: walk(self.mean, walk(self.norm, z)).scale(size.expand_as(z.mean)))

    def _masks(self, mask: Tensor | Masks | None, x: Tensor) -> dict[str, Tensor | None]:
        masks = Masks.of(mask, len(x))
        return replace(masks, causal=masks.causal or self.causal).for_attention(x, self.num_heads)

    def _code(self, x: Tensor, t: Tensor | float, dt: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """Of the time, ``(B or 1, 1, D)``, and r, ``(B or 1, 1, 1)``."""
        time = _column("t", t, x)
        length = _column("dt", 1 / self.num_steps if dt is None else dt, x)
        features = [self._features(part).expand(max(len(time), len(length)), 1, -1) for part in (time, length)]
        return self.time(torch.cat(features, -1)), self._size(time, length)

    def _features(self, time: Tensor) -> Tensor:
        """Sines and cosines of times ``(B, 1, 1)``."""
        number = self.num_time_features // 4
        exponents = torch.arange(number, device=time.device, dtype=time.dtype) / number
        angles = 1_000.0 * time * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
        return torch.cat([angles.cos(), angles.sin()], -1)

    def _size(self, time: Tensor, length: Tensor) -> Tensor:
        """r: the teacher's increment at the middle of a step, times its length in steps of the teacher's."""
        place = ((time - length / 2) * self.num_steps - 0.5).clamp(0, self.num_steps - 1)
        below = place.floor().long()
        above = (below + 1).clamp(max=self.num_steps - 1)
        part = place - below
        between = self.increments[below] * (1 - part) + self.increments[above] * part
        return between * length * self.num_steps

    def extra_repr(self) -> str:
        """What the kernel was made with."""
        return f"dim={self.dim}, num_heads={self.num_heads}, num_steps={self.num_steps}, causal={self.causal}"


class GatedBlock(nn.Module):
    r"""Attention and a perceptron beside residual paths, shifted, scaled and gated by a code of the time.

    .. math::
        x \leftarrow x + r g_1 \odot \operatorname{attention}((1 + a_1) \odot \operatorname{LN} x + b_1), \qquad
        x \leftarrow x + r g_2 \odot \operatorname{perceptron}((1 + a_2) \odot \operatorname{LN} x + b_2),

    with norms without parameters, and a, b, g linear in the code, zero at the start.

    Args:
        dim: D.
        num_heads: H.
        hidden: hidden units of the perceptron.
        dropout: of attention and behind both.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, **made)
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True, **made)
        self.up, self.down = nn.Linear(dim, hidden, **made), nn.Linear(hidden, dim, **made)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.code = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, **made))

    def reset_parameters(self) -> None:
        """Draw all parameters anew; the block is the identity again."""
        self.attention._reset_parameters()
        for layer in (self.up, self.down):
            layer.reset_parameters()
        last = self.code[1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, code: Tensor, size: Tensor, masks: dict[str, Tensor | None]) -> Tensor:
        """Tokens ``(B, T, D)`` after the block.

        Args:
            x: before it.
            code: of the time, ``(B, 1, D)``, or of size 1 in place of B.
            size: r, of the same.
            masks: of attention.
        """
        b1, a1, g1, b2, a2, g2 = self.code(code).chunk(6, -1)
        n = self.norm(x) * (1 + a1) + b1
        out = self.attention(n, n, n, **masks, need_weights=False)[0]
        x = x + size * g1 * self.dropout(out)
        n = self.norm(x) * (1 + a2) + b2
        return x + size * g2 * self.dropout(self.down(self.activation(self.up(n))))

    def propagate(self, state: Any, walk: Any, code: Tensor, size: Tensor, masks: dict[str, Tensor | None]) -> Any:
        """The block for a propagation of moments.

        Args:
            state: of tokens ``(B, T, D)``.
            walk: of the network.
            code: of the time.
            size: r.
            masks: of attention.
        """
        b1, a1, g1, b2, a2, g2 = (part.expand_as(state.mean) for part in self.code(code).chunk(6, -1))

        def attention(x: Any) -> Any:
            n = walk(self.norm, x).scale(1 + a1).shift(b1)
            return walk(self.attention, n, n, n, need_weights=False, **masks).scale(size * g1)

        def perceptron(x: Any) -> Any:
            n = walk(self.norm, x).scale(1 + a2).shift(b2)
            return walk(self.down, walk(self.activation, walk(self.up, n))).scale(size * g2)

        return state.branch(attention).branch(perceptron)

    def start_from(self, blocks: Sequence[Mapping[str, Tensor]], size: float) -> bool:
        """See :meth:`TransitionKernel.start_from`.

        Args:
            blocks: matrices of each.
            size: r, which gates undo.
        """
        attention = self.attention
        targets = {
            "in": attention.in_proj_weight,
            "in.bias": attention.in_proj_bias,
            "out": attention.out_proj.weight,
            "out.bias": attention.out_proj.bias,
            "up": self.up.weight,
            "up.bias": self.up.bias,
            "down": self.down.weight,
            "down.bias": self.down.bias,
        }
        taken = []
        for number, names in enumerate((("in", "in.bias", "out", "out.bias"), ("up", "up.bias", "down", "down.bias"))):
            given = {
                name: [block.get(name, torch.zeros_like(targets[name])) for block in blocks]
                for name in names
                if targets[name] is not None
            }
            fits = all(value.shape == targets[name].shape for name, values in given.items() for value in values)
            taken.append(fits)
            if fits:
                for name, values in given.items():
                    targets[name].copy_(torch.stack(values).mean(0))
                bias = self.code[1].bias
                assert isinstance(bias, Tensor)
                bias.chunk(6)[3 * number + 2].fill_(1 / size)
        return taken[0]


def _column(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A time or some, as ``(B or 1, 1, 1)``."""
    if not isinstance(value, Tensor):
        number = check_number(name, value, above=0.0, expected="a number in (0, 1]")
        if number > 1 + 1e-6:
            raise ValueError(f"{name}: expected a number in (0, 1], in parts of the whole path, got {value}.")
        return torch.full((1, 1, 1), number, dtype=x.dtype, device=x.device)
    given = value.to(x)
    if given.dim() > 1 or (given.dim() == 1 and len(given) not in (1, len(x))):
        raise ValueError(f"{name}: expected a number or shape ({len(x)},), got shape {tuple(given.shape)}.")
    return given.reshape(-1, 1, 1)
