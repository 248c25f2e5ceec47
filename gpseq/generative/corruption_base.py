"""What every corruption is, and how several become one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Channels, height and width of an image.
Shape = tuple[int, int, int]


class Corruption(ABC):
    """Something that makes images worse, the more the further a frame is from the image.

    One of your own defines ``__call__``. If it is linear, it also says so in ``is_linear`` and gives
    :meth:`kronecker`, and :meth:`covariance` if it adds Gaussian noise; then ``information_report`` is exact for it.
    """

    @property
    def is_linear(self) -> bool:
        """Whether it is a matrix times the image, plus Gaussian noise at most."""
        return False

    @abstractmethod
    def __call__(
        self, images: Tensor, distance: int, start: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images at one distance, taken to another.

        Args:
            images: ``(n, C, H, W)``, floating, at the distance ``start``.
            distance: i, not below ``start``.
            start: 0 for the image itself, i - 1 for one step of a chain.
            generator: of the draws, if there are any; ``None`` is torch's default.

        Returns:
            As ``images``; the same tensor where nothing is done.

        Raises:
            ValueError: the schedule does not reach so far, or does not fit the images.
        """

    def check(self, num_frames: int, image_shape: Shape) -> None:  # noqa: B027 (most fit all videos)
        """Refuse videos that the schedule does not fit.

        Args:
            num_frames: T.
            image_shape: C, H, W.

        Raises:
            ValueError: it does not fit.
        """

    def kronecker(self, image_shape: Shape, distance: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        r"""Matrices over channels, rows and columns, of which the whole matrix is the Kronecker product.

        .. math:: x \mapsto (G \otimes D_h \otimes D_w)\, x

        Args:
            image_shape: C, H, W.
            distance: i.
            start: of the step, 0 for the image itself.

        Returns:
            ``(C, C)``, ``(H, H)`` and ``(W, W)``, float64. Where the first is the identity, the other two are all that
            happens, in each channel alone.

        Raises:
            TypeError: the corruption is not linear.
            ValueError: the schedule does not reach so far.
        """
        raise TypeError(f"corruption: {type(self).__name__} is not linear and has no matrix.")

    def matrix(self, image_shape: Shape, distance: int, start: int = 0) -> Tensor:
        """The matrix of the flat image, ``(C H W, C H W)``, float64; arguments as of :meth:`kronecker`."""
        channels, rows, columns = self.kronecker(image_shape, distance, start)
        return torch.kron(torch.kron(channels, rows), columns)

    def covariance(self, image_shape: Shape, distance: int, start: int = 0) -> Tensor:
        """Covariance of the noise that it adds itself, ``(C H W, C H W)``, float64; zero for most."""
        size = math.prod(image_shape)
        return torch.zeros(size, size, dtype=torch.float64)


@dataclass(frozen=True)
class Compose(Corruption):
    """Several corruptions, one after the other, each by its own schedule.

    A step of a chain takes one step of each. Where they do not commute, as blur and blocks do not, i steps are not what
    leads straight to distance i.

    Args:
        parts: in the order in which they are applied.

    Raises:
        TypeError: a part is no corruption.
        ValueError: there are none.

    Example:
        >>> from gpseq.generative.corruptions import GaussianBlur, Grayscale
        >>> corruption = Compose([Grayscale(), GaussianBlur(1.0)])
        >>> corruption.is_linear, corruption(torch.rand(2, 3, 8, 8), distance=1).shape
        (True, torch.Size([2, 3, 8, 8]))
    """

    parts: Sequence[Corruption]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise ValueError("parts: expected at least one corruption, got none.")
        for part in self.parts:
            if not isinstance(part, Corruption):
                raise TypeError(f"parts: expected corruptions, got {type(part).__name__}.")

    @property
    def is_linear(self) -> bool:
        """Whether all parts are."""
        return all(part.is_linear for part in self.parts)

    def check(self, num_frames: int, image_shape: Shape) -> None:
        """Ask each part."""
        for part in self.parts:
            part.check(num_frames, image_shape)

    def __call__(
        self, images: Tensor, distance: int, start: int = 0, generator: torch.Generator | None = None
    ) -> Tensor:
        """One after the other."""
        for part in self.parts:
            images = part(images, distance, start, generator)
        return images

    def kronecker(self, image_shape: Shape, distance: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Products of the parts' matrices."""
        channels, rows, columns = self.parts[0].kronecker(image_shape, distance, start)
        for part in self.parts[1:]:
            of_part = part.kronecker(image_shape, distance, start)
            channels, rows, columns = of_part[0] @ channels, of_part[1] @ rows, of_part[2] @ columns
        return channels, rows, columns

    def covariance(self, image_shape: Shape, distance: int, start: int = 0) -> Tensor:
        """Noise of each part, as the parts after it leave it."""
        total = super().covariance(image_shape, distance, start)
        for part in self.parts:
            matrix = part.matrix(image_shape, distance, start)
            total = matrix @ total @ matrix.mT + part.covariance(image_shape, distance, start)
        return total
