"""Pseudo-videos: frames that grow clearer and end with the image itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_count, check_number
from gpseq.generative.corruption_base import Corruption, Shape
from gpseq.generative.draws import drawn

ORDERS = ("markov", "star", "average", "matched")
LAYOUTS = ("tchw", "cthw")

#: ``(later_frames, image, distance, generator) -> frame``
FrameRule = Callable[[tuple[Tensor, ...], Tensor, int, torch.Generator | None], Tensor]


def pseudo_video(
    images: Tensor,
    num_frames: int,
    corruption: Corruption | None,
    order: str | FrameRule = "star",
    noise: float = 0.1,
    generator: torch.Generator | None = None,
    layout: str = "tchw",
) -> Tensor:
    r"""Make a video of each image: T frames, more and more corrupted the earlier they are.

    The last frame :math:`x_T` is the image, bit for bit. With C the corruption, e fresh standard normal noise for each
    frame, :math:`\tau` its size and i = T - t the distance from the image,

    - ``"markov"``: :math:`x_t = C_{i-1 \to i}(x_{t+1}) + \tau e`, a first-order chain, as in diffusion.
    - ``"star"``: :math:`x_t = C_{0 \to i}(x_T) + \tau e`, each frame straight from the image.
    - ``"average"``: :math:`x_t = C_{i-1 \to i}(\bar x) + \tau e` with the mean :math:`\bar x` of all later frames.
    - ``"matched"``: the last frame of a chain of i steps of its own. Given the image, each frame is distributed as in
      the chain, but independent of the others.
    - a callable ``(later_frames, image, i, generator) -> frame``, which corrupts and adds noise itself.

    After Chen, Chen, Rastrelli and Li, from the idea: their numbers of frames, widths and noise are not known to us,
    and no replication is claimed. Blur alone is invertible: it takes noise, or a lossy step, to lose information.
    T equal copies of the image come from ``GaussianBlur(0.0)`` with ``noise=0``.

    Args:
        images: ``(n, C, H, W)``, floating, on any device; bytes are divided by 255 once, into the default dtype.
        num_frames: T. 1 gives the image as the only frame.
        corruption: C, with a schedule that fits T frames; may be ``None`` beside a callable.
        order: one of ``ORDERS``, or a callable. It gets the later frames :math:`x_{t+1}, \dots, x_T` as a tuple in
            this order, and must return a frame of their shape.
        noise: :math:`\tau`, the deviation of the noise in the unit of the images; not used by a callable.
        generator: of all draws, on any device; ``None`` is torch's default. Draws do not depend on the images' dtype.
        layout: ``"tchw"`` or ``"cthw"``: which axes follow the batch.

    Returns:
        ``(n, T, C, H, W)`` or ``(n, C, T, H, W)``, in the dtype of the images, x_1 first. It is not clamped.

    Raises:
        TypeError: an argument of another kind, images that are neither floating nor bytes.
        ValueError: another shape, pixels that are not finite, a schedule that does not fit, masks that leave nothing,
            or frames of different sizes.

    Source:
        Chen, Chen, Rastrelli and Li (2024), Your image is secretly the last frame of a pseudo video, arXiv 2410.20158.

    Example:
        >>> from gpseq.generative.corruptions import GaussianBlur
        >>> images = torch.rand(2, 3, 8, 8)
        >>> video = pseudo_video(images, 5, GaussianBlur(1.0), order="markov", noise=0.1)
        >>> video.shape, torch.equal(video[:, -1], images)
        (torch.Size([2, 5, 3, 8, 8]), True)
    """
    images = as_images("images", images)
    channels, height, width = images.shape[1:]
    check_recipe(num_frames, corruption, order, noise, layout, (channels, height, width))
    noise = float(noise)
    # Half precision would lose the small steps of a long chain.
    image = images.to(torch.promote_types(images.dtype, torch.float32))
    frames = [image]
    mean = image
    for i in range(1, num_frames):
        if callable(order):
            frame = _checked(order(tuple(reversed(frames)), image, i, generator), image, i)
        else:
            assert corruption is not None
            if order == "markov":
                frame = _step(frames[-1], i, i - 1, corruption, noise, generator)
            elif order == "star":
                frame = _step(image, i, 0, corruption, noise, generator)
            elif order == "average":
                frame = _step(mean, i, i - 1, corruption, noise, generator)
                mean = mean + (frame - mean) / (i + 1)
            else:
                # A chain for each frame alone costs T² / 2 steps, and is right for every corruption: no covariance of
                # the accumulated noise has to be known.
                frame = image
                for j in range(1, i + 1):
                    frame = _step(frame, j, j - 1, corruption, noise, generator)
        frames.append(frame)
    parts = [frame.to(images.dtype) for frame in reversed(frames[1:])]
    return torch.stack([*parts, images], dim=1 if layout == "tchw" else 2)


def as_images(name: str, images: Any) -> Tensor:
    """Images as floating numbers: bytes are divided by 255, into the default dtype; others stay as they are.

    Args:
        name: of the argument.
        images: ``(n, C, H, W)``.

    Returns:
        ``(n, C, H, W)``, floating.

    Raises:
        TypeError: they are neither floating nor bytes.
        ValueError: another shape, images of different sizes, or pixels that are not finite.

    Example:
        >>> as_images("images", torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        tensor([[[[0., 1.]]]])
    """
    if isinstance(images, list | tuple) and len({tuple(getattr(image, "shape", ())) for image in images}) > 1:
        shapes = sorted({tuple(getattr(image, "shape", ())) for image in images})
        raise ValueError(f"{name}: expected images of one size, got {', '.join(map(str, shapes))}.")
    if not isinstance(images, Tensor) or not (images.is_floating_point() or images.dtype == torch.uint8):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"{name}: expected a tensor of floating numbers, or of bytes, which are divided by 255; got {got}."
        )
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"{name}: expected shape (n, C, H, W), none of C, H, W zero, got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images.to(torch.get_default_dtype()) / 255
    if not images.isfinite().all():
        raise ValueError(f"{name}: expected finite pixels, got {int((~images.isfinite()).sum())} that are not.")
    return images


def check_recipe(
    num_frames: int,
    corruption: Corruption | None,
    order: str | FrameRule,
    noise: float,
    layout: str,
    image_shape: Shape,
) -> None:
    """Refuse what makes no video; arguments as of :func:`pseudo_video`.

    Args:
        num_frames: T.
        corruption: C.
        order: how frames hang together.
        noise: deviation.
        layout: of the axes.
        image_shape: C, H, W.

    Raises:
        TypeError: an argument of another kind.
        ValueError: another number, name or schedule.
    """
    check_count("num_frames", num_frames)
    if not callable(order) and order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, or a callable, got {order!r}.")
    if not isinstance(corruption, Corruption) and not (corruption is None and callable(order)):
        raise TypeError(f"corruption: expected a Corruption such as GaussianBlur, got {type(corruption).__name__}.")
    expected = "a finite number that is not negative"
    if check_number("noise", noise, expected=expected) < 0:
        raise ValueError(f"noise: expected {expected}, got {noise!r}.")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if corruption is not None:
        corruption.check(num_frames, image_shape)


def _step(
    frame: Tensor,
    distance: int,
    start: int,
    corruption: Corruption,
    noise: float,
    generator: torch.Generator | None,
) -> Tensor:
    """A frame corrupted and with fresh noise, checked for its size."""
    corrupted = _checked(corruption(frame, distance, start, generator), frame, distance)
    return corrupted + noise * drawn(torch.randn, corrupted, generator) if noise else corrupted


def _checked(frame: Any, image: Tensor, distance: int) -> Tensor:
    if not isinstance(frame, Tensor) or frame.shape != image.shape:
        got = f"shape {tuple(frame.shape)}" if isinstance(frame, Tensor) else type(frame).__name__
        raise ValueError(
            f"frames: expected all of one size, shape {tuple(image.shape)}, got {got} at distance {distance}."
        )
    return frame
