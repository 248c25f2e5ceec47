"""Small convolutional networks between images and vectors, for images of 8 x 8 to 32 x 32 pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: The side of the least image: below it, halving twice leaves nothing to look at.
LEAST_SIDE = 4


class ImageEncoder(nn.Module):
    """An image to a vector: three convolutions, two of which halve the sides, and a linear map.

    Args:
        image_shape: ``(C, H, W)``, sides of at least 4.
        num_outputs: length of the vector.
        width: channels of the first convolution; the others have twice as many.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an image that is too small.

    Shape:
        ``(B, C, H, W)`` to ``(B, num_outputs)``.

    Example:
        >>> ImageEncoder((1, 8, 8), 16)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_outputs: int,
        width: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = image_shape[0]
        _, _, (height, low) = _sides(image_shape)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, **made),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, **made),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, **made),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * height * low, num_outputs, **made),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The vectors.

        Args:
            images: ``(B, C, H, W)``.
        """
        return self.layers(images)


class ImageDecoder(nn.Module):
    """A vector to an image: the mirror of :class:`ImageEncoder`.

    Args:
        num_inputs: length of the vector.
        image_shape: ``(C, H, W)``, sides of at least 4.
        width: channels of the last hidden convolution; those before have twice as many.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an image that is too small.

    Shape:
        ``(B, num_inputs)`` to ``(B, C, H, W)``.

    Example:
        >>> ImageDecoder(16, (1, 7, 9))(torch.zeros(2, 16)).shape
        torch.Size([2, 1, 7, 9])
    """

    def __init__(
        self,
        num_inputs: int,
        image_shape: tuple[int, int, int],
        width: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        full, half, quarter = _sides(image_shape)
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, 2 * width * quarter[0] * quarter[1], **made),
            nn.Unflatten(1, (2 * width, *quarter)),
            nn.SiLU(),
            nn.Upsample(half),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, **made),
            nn.SiLU(),
            nn.Upsample(full),
            nn.Conv2d(2 * width, width, 3, padding=1, **made),
            nn.SiLU(),
            nn.Conv2d(width, image_shape[0], 3, padding=1, **made),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """The images.

        Args:
            codes: ``(B, num_inputs)``.
        """
        return self.layers(codes)


def _sides(image_shape: tuple[int, int, int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Height and width: all, halved, and halved twice, rounded up as strided convolutions do."""
    height, width = image_shape[1:]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"image_shape: expected sides of at least {LEAST_SIDE}, got {height} x {width}.")
    half = (height + 1) // 2, (width + 1) // 2
    return (height, width), half, ((half[0] + 1) // 2, (half[1] + 1) // 2)
