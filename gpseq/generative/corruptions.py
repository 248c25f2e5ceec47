r"""What is done to an image to make the earlier frames of a pseudo-video: blur, noise, fewer pixels, holes, no colour.

A corruption knows a whole schedule. Frames are counted by their *distance* i from the image: 0 is the image, i = T - t
is frame t. ``corruption(images, i)`` takes the image straight to distance i, ``corruption(images, i, start=i - 1)``
takes the frame at distance i - 1 one step further.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_number
from gpseq.generative.corruption_base import Compose, Corruption, Shape
from gpseq.generative.draws import drawn
from gpseq.generative.schedules import check_length, level, ordered, schedule, whole_schedule

__all__ = [
    "Compose",
    "Corruption",
    "Downsample",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "Mask",
    "Shape",
    "block_mean_matrix",
    "blur_matrix",
]

#: Makes the matrix of a side from its size and one more number.
Maker = Callable[[int, Any], Tensor]


class SeparableCorruption(Corruption):
    """One matrix over rows and one over columns, the same in each channel."""

    @property
    def is_linear(self) -> bool:
        """True."""
        return True

    @abstractmethod
    def _rule(self, distance: int, start: int) -> tuple[Maker, Any] | None:
        """What makes the matrix of a side, and its argument beside the size; ``None`` where nothing is done."""

    def __call__(
        self, images: Tensor, distance: int, start: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Rows and columns, each by its matrix; draws nothing."""
        rule = self._rule(*ordered(distance, start))
        if rule is None:
            return images
        rows, columns = (_placed(*rule, size, images.dtype, images.device) for size in images.shape[-2:])
        return rows @ images @ columns.mT

    def kronecker(self, image_shape: Shape, distance: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The identity, and the matrices over rows and columns."""
        channels, *sides = image_shape
        rule = self._rule(*ordered(distance, start))
        rows, columns = (_eye(size) if rule is None else rule[0](size, rule[1]) for size in sides)
        return _eye(channels), rows, columns


@dataclass(frozen=True)
class GaussianBlur(SeparableCorruption):
    r"""Gaussian blur of growing width, :math:`x \mapsto D(\sigma_i)\, x\, D(\sigma_i)^\top` in each channel.

    Widths add in squares: the step from distance a to distance b has the width :math:`\sqrt{\sigma_b^2 - \sigma_a^2}`.
    See :func:`~gpseq.generative.blur_matrix` for D.

    Args:
        sigmas: :math:`\sigma_i` in pixels by the distance i from the image, one for each frame, not decreasing, with
            ``sigmas[0] = 0``; or one number s, the width of a step, so that :math:`\sigma_i = s \sqrt i`. 0 copies.

    Raises:
        ValueError: another schedule.

    Example:
        >>> image = torch.zeros(1, 1, 5, 5)
        >>> image[..., 2, 2] = 1.0
        >>> GaussianBlur(0.5)(image, distance=1)[0, 0, 2]
        tensor([0.0002, 0.0837, 0.6187, 0.0837, 0.0002])
        >>> GaussianBlur([0.0, 1.0, 2.0]).width(distance=2, start=1) ** 2
        3.0
    """

    sigmas: float | Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", schedule("sigmas", self.sigmas))

    def width(self, distance: int, start: int = 0) -> float:
        """Of the blur that leads from one distance to another, in pixels."""
        if isinstance(self.sigmas, float):
            return self.sigmas * math.sqrt(distance - start)
        end, begin = level("sigmas", self.sigmas, distance), self.sigmas[start]
        return math.sqrt((end - begin) * (end + begin))

    def check(self, num_frames: int, image_shape: Shape) -> None:
        """Refuse another number of frames."""
        check_length("sigmas", self.sigmas, num_frames)

    def _rule(self, distance: int, start: int) -> tuple[Maker, Any] | None:
        width = self.width(distance, start)
        return (blur_matrix, width) if width > 0 else None


@dataclass(frozen=True)
class Downsample(SeparableCorruption):
    """Means over square blocks of pixels; the size of the image is kept.

    Blocks start at the upper left; the last ones are smaller where the factor does not divide the size. A step takes
    the means of its own blocks again, and so of the noise in them.

    Args:
        factors: side of the blocks by the distance from the image, one for each frame, not decreasing, with
            ``factors[0] = 1``; or one number f, for blocks of side ``f ** i``.

    Raises:
        TypeError: a factor is no integer.
        ValueError: another schedule.

    Example:
        >>> Downsample([1, 2])(torch.arange(4.0).view(1, 1, 1, 4), distance=1)
        tensor([[[[0.5000, 0.5000, 2.5000, 2.5000]]]])
    """

    factors: int | Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", whole_schedule("factors", self.factors, first=1))

    def side(self, distance: int) -> int:
        """Of the blocks, in pixels."""
        return self.factors**distance if isinstance(self.factors, int) else level("factors", self.factors, distance)

    def check(self, num_frames: int, image_shape: Shape) -> None:
        """Refuse another number of frames."""
        check_length("factors", self.factors, num_frames)

    def _rule(self, distance: int, start: int) -> tuple[Maker, Any] | None:
        side = self.side(distance)
        return (block_mean_matrix, side) if side > 1 else None


@dataclass(frozen=True)
class GaussianNoise(Corruption):
    r"""Noise of a diffusion, :math:`x \mapsto \sqrt{1 - \beta_i}\, x + \sqrt{\beta_i}\, e` at step i.

    Straight from the image, :math:`\sqrt{\bar\alpha_i}\, x + \sqrt{1 - \bar\alpha_i}\, e` with
    :math:`\bar\alpha_i = \prod_{j \le i} (1 - \beta_j)`. The noise of the video comes on top, unless it is 0.

    Args:
        betas: :math:`\beta_i` of the step to distance i, one for each frame, from 0 to below 1, with ``betas[0] = 0``;
            or one number for all steps.

    Raises:
        ValueError: another schedule.

    Example:
        >>> GaussianNoise(0.1).kept(distance=2)
        0.81
        >>> GaussianNoise([0.0, 0.1])(torch.zeros(2, 1, 4, 4), distance=1).shape
        torch.Size([2, 1, 4, 4])
    """

    betas: float | Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", schedule("betas", self.betas, below=1.0, rising=False))

    @property
    def is_linear(self) -> bool:
        """True."""
        return True

    def kept(self, distance: int, start: int = 0) -> float:
        r""":math:`\bar\alpha_i / \bar\alpha_{\text{start}}`, the share of the variance that is the image's."""
        if isinstance(self.betas, float):
            return (1 - self.betas) ** (distance - start)
        level("betas", self.betas, distance)
        return math.prod(1 - beta for beta in self.betas[start + 1 : distance + 1])

    def check(self, num_frames: int, image_shape: Shape) -> None:
        """Refuse another number of frames."""
        check_length("betas", self.betas, num_frames)

    def __call__(
        self, images: Tensor, distance: int, start: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Shrink, and add noise."""
        kept = self.kept(*ordered(distance, start))
        if kept == 1:
            return images
        return math.sqrt(kept) * images + math.sqrt(1 - kept) * drawn(torch.randn, images, generator)

    def kronecker(self, image_shape: Shape, distance: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Identities, of which the first is scaled."""
        channels, height, width = image_shape
        return math.sqrt(self.kept(*ordered(distance, start))) * _eye(channels), _eye(height), _eye(width)

    def covariance(self, image_shape: Shape, distance: int, start: int = 0) -> Tensor:
        """What is not kept, on the diagonal."""
        return (1 - self.kept(*ordered(distance, start))) * _eye(math.prod(image_shape))


@dataclass(frozen=True)
class Mask(Corruption):
    r"""Pixels left out at random, in all channels at once.

    Each pixel is left out by itself, with probability :math:`r_i` straight from the image. Steps of a chain leave out
    :math:`1 - (1 - r_i) / (1 - r_{i-1})` of what is there, so that :math:`r_i` are gone after i of them. A mask that
    would leave out all pixels spares one. Not linear: the frames of all masks together are not Gaussian.

    Args:
        rates: :math:`r_i` by the distance i from the image, one for each frame, not decreasing, from 0 to below 1, with
            ``rates[0] = 0``; or one number r, the rate of a step, so that :math:`r_i = 1 - (1 - r)^i`.
        fill: the brightness of what is left out.

    Raises:
        ValueError: another schedule, or a fill that is not finite.

    Example:
        >>> Mask(0.5)(torch.ones(1, 3, 2, 3), distance=1, generator=torch.Generator().manual_seed(0))[0, 0]
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
    """

    rates: float | Sequence[float]
    fill: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", schedule("rates", self.rates, below=1.0))
        check_number("fill", self.fill)

    def rate(self, distance: int, start: int = 0) -> float:
        """The share of pixels that is left out on the way from one distance to another."""
        if isinstance(self.rates, float):
            return 1 - (1 - self.rates) ** (distance - start)
        return 1 - (1 - level("rates", self.rates, distance)) / (1 - self.rates[start])

    def check(self, num_frames: int, image_shape: Shape) -> None:
        """Refuse another number of frames, and masks that leave nothing: less than one pixel on average."""
        check_length("rates", self.rates, num_frames)
        pixels, rate = image_shape[-2] * image_shape[-1], self.rate(num_frames - 1)
        if (1 - rate) * pixels < 1 - 1e-9:
            raise ValueError(
                f"rates: expected masks that leave a pixel, got {self.rates}; {rate:.4g} of {pixels} pixels are left "
                f"out at distance {num_frames - 1}."
            )

    def __call__(
        self, images: Tensor, distance: int, start: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw a mask for each image, and apply it."""
        rate = self.rate(*ordered(distance, start))
        if rate == 0:
            return images
        draws = drawn(torch.rand, images.new_empty(len(images), 1, *images.shape[-2:]), generator)
        left = (draws >= rate) | (draws == draws.amax((-2, -1), keepdim=True))
        return torch.where(left, images, self.fill)


@dataclass(frozen=True)
class Grayscale(Corruption):
    """No colour: every channel becomes the weighted mean of all channels, at every distance but 0.

    Args:
        weights: relative weight of each channel, not negative; ``None`` are equal ones. The luma of television is
            ``(0.299, 0.587, 0.114)``.

    Raises:
        ValueError: weights that have no mean.

    Example:
        >>> Grayscale()(torch.tensor([0.0, 0.3, 0.9]).view(1, 3, 1, 1), distance=1).flatten()
        tensor([0.4000, 0.4000, 0.4000])
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        expected = "numbers that are not negative, some positive"
        weights = [check_number("weights", weight, above=-1e-300, expected=expected) for weight in self.weights]
        if not sum(weights) > 0:
            raise ValueError(f"weights: expected {expected}, got {self.weights!r}.")
        object.__setattr__(self, "weights", tuple(weight / sum(weights) for weight in weights))

    @property
    def is_linear(self) -> bool:
        """True."""
        return True

    def check(self, num_frames: int, image_shape: Shape) -> None:
        """Refuse another number of channels."""
        if self.weights is not None and len(self.weights) != image_shape[0]:
            raise ValueError(f"weights: expected one for each of {image_shape[0]} channels, got {len(self.weights)}.")

    def __call__(
        self, images: Tensor, distance: int, start: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Average over channels; draws nothing."""
        if ordered(distance, start)[0] == 0:
            return images
        if self.weights is None:
            return images.mean(-3, keepdim=True).expand_as(images)
        self.check(1, (images.shape[-3], 1, 1))
        # A sum of few terms, each with a number: no tensor has to travel to the device.
        grey = sum(weight * channel for weight, channel in zip(self.weights, images.unbind(-3), strict=True))
        return grey.unsqueeze(-3).expand_as(images)  # type: ignore[union-attr]

    def kronecker(self, image_shape: Shape, distance: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The weights in every row, and identities."""
        channels, height, width = image_shape
        self.check(1, image_shape)
        if ordered(distance, start)[0] == 0:
            return _eye(channels), _eye(height), _eye(width)
        weights = [1 / channels] * channels if self.weights is None else list(self.weights)
        return torch.tensor([weights] * channels, dtype=torch.float64), _eye(height), _eye(width)


def blur_matrix(size: int, sigma: float) -> Tensor:
    r"""Gaussian blur along one side, with half-sample reflection at the border.

    .. math:: D_{ab} = \sum_{j = -R}^{R} k_j\, [\,\text{pixel } a + j \text{ reflects to } b\,], \qquad
        k_j \propto \exp(-j^2 / 2 \sigma^2), \quad \sum_j k_j = 1, \quad R = \max(1, \lceil 3 \sigma \rceil)

    Args:
        size: n, pixels.
        sigma: width in pixels, not negative; 0 gives the identity.

    Returns:
        D, ``(n, n)``, float64; rows sum to 1.

    Example:
        >>> blur_matrix(3, 1.0).sum(-1)
        tensor([1., 1., 1.], dtype=torch.float64)
        >>> blur_matrix(3, 0.0).diagonal()
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    if sigma == 0:
        return _eye(size)
    reach = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma).square())
    # Reflection repeats the image and its mirror image, without end: a period of 2 n.
    places = (torch.arange(size)[:, None] + offsets) % (2 * size)
    places = torch.where(places < size, places, 2 * size - 1 - places)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(
        1, places, (weights / weights.sum()).expand(size, -1)
    )


def block_mean_matrix(size: int, side: int) -> Tensor:
    """Means over blocks of pixels along one side, each written into its whole block.

    Args:
        size: n, pixels.
        side: of a block; the last is shorter where it does not divide n.

    Returns:
        ``(n, n)``, float64; rows sum to 1.

    Example:
        >>> block_mean_matrix(3, 2)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    block = torch.arange(size) // min(side, size)
    same = (block[:, None] == block).double()
    return same / same.sum(-1, keepdim=True)


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


@lru_cache(maxsize=512)
def _placed(make: Maker, argument: Any, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix where the images are: computed and sent there once."""
    # Outside of inference mode, because whoever asks next may want gradients through it.
    with torch.inference_mode(False), torch.no_grad():
        return make(size, argument).to(device=device, dtype=dtype)
