"""Checks of videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gpseq.checks import check_count, check_floating


def check_image_shape(value: Any) -> tuple[int, int, int]:
    """Channels, height and width.

    Args:
        value: what came.

    Returns:
        ``(C, H, W)``.

    Raises:
        TypeError: they are no three integers.
        ValueError: one is below 1.

    Example:
        >>> check_image_shape([1, 28, 28])
        (1, 28, 28)
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise TypeError(f"image_shape: expected three integers (C, H, W), got {value!r}.")
    channels, height, width = (check_count("image_shape", size) for size in value)
    return channels, height, width


def check_video(video: Any, num_frames: int, image_shape: tuple[int, int, int]) -> Tensor:
    """A batch of videos that a model was made for.

    Args:
        video: what came.
        num_frames: T.
        image_shape: ``(C, H, W)``.

    Returns:
        The videos, ``(B, T, C, H, W)``.

    Raises:
        TypeError: they are no floating-point tensor, or a list of frames.
        ValueError: another shape, no video at all, or pixels that are infinite or NaN.
    """
    return _check("video", video, (num_frames, *image_shape))


def check_images(images: Any, image_shape: tuple[int, int, int]) -> Tensor:
    """A batch of images that a model was made for.

    Args:
        images: what came.
        image_shape: ``(C, H, W)``.

    Returns:
        The images, ``(B, C, H, W)``.

    Raises:
        TypeError: they are no floating-point tensor.
        ValueError: another shape, no image at all, or pixels that are infinite or NaN.
    """
    return _check("images", images, image_shape)


def _check(name: str, value: Any, sizes: tuple[int, ...]) -> Tensor:
    shape = ", ".join(map(str, sizes))
    if isinstance(value, list | tuple):
        found = sorted({tuple(getattr(part, "shape", ())) for part in value})
        raise TypeError(
            f"{name}: expected a tensor (B, {shape}), got a {type(value).__name__} of parts of shape "
            f"{' and '.join(map(str, found))}; make them the same and stack them."
        )
    given = check_floating(name, value)
    if given.shape[1:] != sizes or len(given) == 0:
        raise ValueError(f"{name}: expected shape (B, {shape}) with B at least 1, got {tuple(given.shape)}.")
    wrong = ~given.isfinite()
    if bool(wrong.any()):  # the one look at the device
        raise ValueError(
            f"{name}: expected finite pixels, got {int(wrong.sum())} of {given.numel()} that are infinite or NaN."
        )
    return given
