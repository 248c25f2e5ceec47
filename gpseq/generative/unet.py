"""A U-Net for videos in which space and time are mixed by turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_number
from gpseq.generative.video_checks import check_image_shape

#: Longest period of the features of the diffusion step, which is counted in thousandths.
LONGEST_PERIOD = 10_000.0
#: Sequences up to this length are attended by plain products: they come in huge batches, which fused kernels limit.
SHORT = 32


class SpaceTimeUNet(nn.Module):
    r"""Reads a noisy video and its diffusion step, and answers with an image of numbers for each frame.

    Convolutions are :math:`1 \times 3 \times 3`, so they see one frame; attention within a frame and attention along
    time at each site alternate with them. What the network knows of the diffusion step and of the index of each frame
    shifts and scales every block. Attention and the second convolution of each block start at zero, and so does the
    answer. With one frame it is an image network of the same architecture.

    Args:
        image_shape: ``(C, H, W)``.
        num_frames: T.
        channels: of each level, from the finest; each level has half the sides of the one before, rounded up.
        num_blocks: of each level, on the way down and on the way up.
        num_heads: of attention; divides all channels.
        attention_side: attention within a frame is at levels whose sides are at most this; at all the others only
            attention along time is.
        out_channels: of the answer; ``None`` is C.
        dropout: in the blocks.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: numbers of a wrong kind.
        ValueError: numbers that do not fit.

    Source:
        Ho et al. (2022), Video diffusion models, section 3, for the factorisation; Dhariwal and Nichol (2021),
        Diffusion models beat GANs on image synthesis, for blocks that the step scales.

    Example:
        >>> network = SpaceTimeUNet((1, 8, 8), num_frames=3, channels=(8, 16))
        >>> network(torch.randn(2, 3, 1, 8, 8), torch.tensor([0.1, 0.9])).shape
        torch.Size([2, 3, 1, 8, 8])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_frames: int,
        channels: Sequence[int] = (32, 64),
        num_blocks: int = 1,
        num_heads: int = 4,
        attention_side: int = 16,
        out_channels: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.image_shape, self.num_frames = check_image_shape(image_shape), check_count("num_frames", num_frames)
        widths = _check_channels(channels, num_heads, self.image_shape)
        check_count("num_blocks", num_blocks)
        check_count("attention_side", attention_side, least=0)
        if not 0 <= check_number("dropout", dropout, expected="a number from 0 to below 1") < 1:
            raise ValueError(f"dropout: expected a number from 0 to below 1, got {dropout!r}.")
        answers = self.image_shape[0] if out_channels is None else check_count("out_channels", out_channels)
        self.num_features, code = 2 * widths[0], 4 * widths[0]
        self.step = nn.Sequential(nn.Linear(self.num_features, code, **made), nn.SiLU(), nn.Linear(code, code, **made))
        self.frame = nn.Parameter(0.1 * torch.randn(num_frames, code, **made))
        self.enter = nn.Conv2d(self.image_shape[0], widths[0], 3, padding=1, **made)
        side = max(self.image_shape[1:])

        def block(inputs: int, outputs: int, level: int) -> SpaceTimeBlock:
            within = math.ceil(side / 2**level) <= attention_side
            return SpaceTimeBlock(inputs, outputs, code, num_heads, within, dropout, **made)

        self.down, self.shrink, skips, width = nn.ModuleList(), nn.ModuleList(), [], widths[0]
        for level, outputs in enumerate(widths):
            if level:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1, **made))
            self.down.append(nn.ModuleList(block(outputs if i else width, outputs, level) for i in range(num_blocks)))
            skips.append(outputs)
            width = outputs
        last = len(widths) - 1
        self.middle = nn.ModuleList(block(width, width, last) for _ in range(2))
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            outputs = widths[level]
            self.up.append(
                nn.ModuleList(block((outputs if i else width) + outputs, outputs, level) for i in range(num_blocks))
            )
            width = outputs
            if level:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1, **made))
        self.leave = nn.Sequential(_norm(width, **made), nn.SiLU(), nn.Conv2d(width, answers, 3, padding=1, **made))
        _zero(self.leave[-1])

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """The answer.

        Args:
            video: ``(B, T, C, H, W)``.
            time: the diffusion step as a part of all steps, ``(B,)``, from 0 to 1.

        Returns:
            ``(B, T, out_channels, H, W)``.
        """
        b, t = video.shape[:2]
        code = self.step(self._features(time.to(video.dtype))).unsqueeze(1) + self.frame
        code = code.flatten(0, 1)
        x, skips = self.enter(video.flatten(0, 1)), []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.shrink[level - 1](x)
            for part in blocks:  # type: ignore[attr-defined]
                x = part(x, code, t)
                skips.append(x)
        for part in self.middle:
            x = part(x, code, t)
        for level, blocks in enumerate(self.up):
            if level:
                x = self.grow[level - 1](functional.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
            for part in blocks:  # type: ignore[attr-defined]
                x = part(torch.cat([x, skips.pop()], 1), code, t)
        return self.leave(x).unflatten(0, (b, t))

    def _features(self, time: Tensor) -> Tensor:
        """Sines and cosines of times ``(B,)``."""
        number = self.num_features // 2
        exponents = torch.arange(number, device=time.device, dtype=time.dtype) / number
        angles = 1_000.0 * time.unsqueeze(-1) * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
        return torch.cat([angles.cos(), angles.sin()], -1)


class SpaceTimeBlock(nn.Module):
    """Two convolutions that a code shifts and scales, attention within the frame, and attention along time.

    Args:
        inputs: channels that come.
        outputs: channels that leave.
        code: length of the code.
        num_heads: of attention.
        within: whether there is attention within the frame.
        dropout: before the second convolution.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        code: int,
        num_heads: int,
        within: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Sequential(_norm(inputs, **made), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1, **made))
        self.norm = _norm(outputs, affine=False, **made)
        self.code = nn.Sequential(nn.SiLU(), nn.Linear(code, 2 * outputs, **made))
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1, **made))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, **made)
        self.space = Attention(outputs, num_heads, **made) if within else None
        self.time = Attention(outputs, num_heads, **made)
        _zero(self.second[-1])

    def forward(self, x: Tensor, code: Tensor, num_frames: int) -> Tensor:
        """What leaves, ``(B T, outputs, H, W)``.

        Args:
            x: ``(B T, inputs, H, W)``, the frames of a video side by side.
            code: of each frame, ``(B T, code)``.
            num_frames: T.
        """
        shift, scale = self.code(code)[..., None, None].chunk(2, 1)
        x = self.skip(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)
        n, channels, height, width = x.shape
        if self.space is not None:
            x = self.space(x.flatten(2).mT).mT.reshape(n, channels, height, width)
        sites = x.reshape(-1, num_frames, channels, height * width).permute(0, 3, 1, 2)  # (B, H W, T, channels)
        mixed = self.time(sites.flatten(0, 1)).unflatten(0, sites.shape[:2])
        return mixed.permute(0, 2, 3, 1).reshape(n, channels, height, width)


class Attention(nn.Module):
    """Attention among all tokens of a sequence beside a residual path, which starts as the identity.

    Args:
        dim: of tokens.
        num_heads: H, a divisor of it.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, **made)
        self.enter = nn.Linear(dim, 3 * dim, **made)
        self.leave = nn.Linear(dim, dim, **made)
        _zero(self.leave)

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens after it.

        Args:
            tokens: ``(n, length, dim)``.
        """
        parts = self.enter(self.norm(tokens)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (n, H, length, dim / H)
        if tokens.shape[1] <= SHORT:
            weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
            mixed = weights @ value
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        return tokens + self.leave(mixed.transpose(1, 2).flatten(-2))


def _norm(channels: int, affine: bool = True, **made: Any) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels, affine=affine, **made)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check_channels(channels: Any, num_heads: int, image_shape: tuple[int, int, int]) -> list[int]:
    check_count("num_heads", num_heads)
    if not isinstance(channels, Sequence) or not channels:
        raise TypeError(f"channels: expected a number for each level, got {channels!r}.")
    widths = [check_count("channels", width) for width in channels]
    if any(width % num_heads for width in widths):
        raise ValueError(f"channels: expected multiples of num_heads = {num_heads}, got {channels!r}.")
    if min(image_shape[1:]) < 2 ** (len(widths) - 1):
        raise ValueError(
            f"channels: expected at most {min(image_shape[1:]).bit_length()} levels for images of {image_shape[1]} x "
            f"{image_shape[2]}, got {len(widths)}."
        )
    return widths
