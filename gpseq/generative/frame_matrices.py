"""The frames of a pseudo-video as matrices and covariances, where the corruption is linear."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpseq.generative.corruption_base import Corruption, Shape


class LinearFrame(NamedTuple):
    """The frame at one distance: alone, given the image; and given the image and all nearer frames.

    Attributes:
        loading: A, ``(d, d)``.
        noise: N, ``(d, d)``.
        direct: W, what the image itself gives to it, ``(d, d)``.
        fresh: Q, ``(d, d)``.
    """

    loading: Tensor
    noise: Tensor
    direct: Tensor
    fresh: Tensor


def linear_frames(
    corruption: Corruption, order: str, num_frames: int, noise: float, image_shape: Shape, like: Tensor
) -> Iterator[LinearFrame]:
    """The frames of a linear corruption as matrices, from the nearest to the image to the farthest.

    Args:
        corruption: linear.
        order: a name.
        num_frames: T.
        noise: deviation.
        image_shape: C, H, W.
        like: dtype and place of the matrices.

    Yields:
        Of the distances 1 to T - 1.
    """
    eye = torch.eye(math.prod(image_shape)).to(like)
    # Of the frame before, or of the mean of all frames so far ("average").
    loading, accumulated = eye, torch.zeros_like(eye)
    for i in range(1, num_frames):
        start = 0 if order == "star" else i - 1
        step = corruption.matrix(image_shape, i, start).to(like)
        fresh = corruption.covariance(image_shape, i, start).to(like) + noise**2 * eye
        if order == "star":
            yield LinearFrame(step, fresh, step, fresh)
            continue
        alone, spread = step @ loading, step @ accumulated @ step.mT + fresh
        if order == "average":
            yield LinearFrame(alone, spread, step / i, fresh)
            # The mean of one frame more is a matrix times the mean, plus a share of the fresh noise.
            mix = (i * eye + step) / (i + 1)
            loading, accumulated = mix @ loading, mix @ accumulated @ mix.mT + fresh / (i + 1) ** 2
            continue
        if order == "matched":
            yield LinearFrame(alone, spread, alone, spread)
        else:
            yield LinearFrame(alone, spread, step if i == 1 else torch.zeros_like(step), fresh)
        loading, accumulated = alone, spread
