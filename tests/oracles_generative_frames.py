"""Pseudo-videos the slow and obvious way: pixel by pixel, and the covariance of everything at once."""

import math

import numpy as np
import torch
from torch import Tensor


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur, ``(H, W)``: the image is mirrored beyond its border, and each pixel is a weighted sum."""
    if sigma == 0:
        return image
    reach = max(1, math.ceil(3 * sigma))
    weights = np.array([math.exp(-(j**2) / (2 * sigma**2)) for j in range(-reach, reach + 1)])
    weights /= weights.sum()
    padded = np.pad(image, reach, mode="symmetric")
    found = np.zeros_like(image)
    for a in range(image.shape[0]):
        for b in range(image.shape[1]):
            found[a, b] = weights @ padded[a : a + 2 * reach + 1, b : b + 2 * reach + 1] @ weights
    return found


def block_means(image: np.ndarray, side: int) -> np.ndarray:
    """Means of square blocks from the upper left, ``(H, W)``."""
    found = np.zeros_like(image)
    for a in range(0, image.shape[0], side):
        for b in range(0, image.shape[1], side):
            found[a : a + side, b : b + side] = image[a : a + side, b : b + side].mean()
    return found


def flat_matrix(function, shape: tuple[int, int, int]) -> Tensor:
    """The matrix of a linear function of images, column by column: what it makes of each single pixel."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return function(basis).flatten(1).mT


def blur_maps(sigma: float, shape: tuple[int, int, int]) -> Tensor:
    """The matrix of a blur of flat images, from :func:`blurred`."""
    return flat_matrix(
        lambda basis: torch.stack(
            [torch.stack([torch.from_numpy(blurred(plane.numpy(), sigma)) for plane in image]) for image in basis]
        ),
        shape,
    )


def joint_covariance(
    covariance: Tensor, order: str, steps: list[Tensor], direct: list[Tensor], noises: list[Tensor]
) -> Tensor:
    """Covariance of the image and all frames by their distance, ``(T d, T d)``.

    Every frame is a matrix times all independent sources: the image, and fresh noise for each frame.

    Args:
        covariance: of the image.
        order: a name.
        steps: of the distances 1 to T - 1, from the distance before.
        direct: of the same, from the image.
        noises: covariance of the fresh noise of each step; for the star, of what leads straight there.
    """
    size, count = len(covariance), len(steps)
    zero = torch.zeros(size, size, dtype=torch.float64)

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp_min(0).sqrt()

    # Columns: the image, then one block of sources for each frame; the matched star needs one for each step of each.
    blocks = 1 + count * (count + 1 if order == "matched" else 1)
    frames = [[root(covariance), *([zero] * (blocks - 1))]]

    def times(matrix: Tensor, frame: list[Tensor]) -> list[Tensor]:
        return [matrix @ block for block in frame]

    unused = 1
    for i in range(1, count + 1):
        if order == "matched":
            frame = frames[0]
            for j in range(1, i + 1):
                frame = times(steps[j - 1], frame)
                frame[unused] = root(noises[j - 1])
                unused += 1
        else:
            if order == "markov":
                frame = times(steps[i - 1], frames[-1])
            elif order == "star":
                frame = times(direct[i - 1], frames[0])
            else:
                mean = [sum(parts) / i for parts in zip(*frames, strict=True)]
                frame = times(steps[i - 1], mean)
            frame[unused] = root(noises[i - 1])
            unused += 1
        frames.append(frame)
    loadings = torch.cat([torch.cat(frame, 1) for frame in frames])
    return loadings @ loadings.mT


def by_log_determinants(joint: Tensor, size: int, frames: list[int]) -> float:
    """Information about the image in some frames, from log-determinants of marginal covariances."""
    rest = torch.cat([torch.arange(i * size, (i + 1) * size) for i in frames])
    both = torch.cat([torch.arange(size), rest])
    parts = [joint[index][:, index] for index in (torch.arange(size), rest, both)]
    image, other, together = (torch.linalg.slogdet(part).logabsdet.item() for part in parts)
    return 0.5 * (image + other - together)


def by_eigenvalues(joint: Tensor, size: int, frames: list[int]) -> tuple[float, float]:
    """The same from canonical correlations, and the mean variance that is left from the conditional covariance."""
    rest = torch.cat([torch.arange(i * size, (i + 1) * size) for i in frames])
    image, other, cross = joint[:size, :size], joint[rest][:, rest], joint[:size][:, rest]
    explained = cross @ torch.linalg.solve(other, cross.mT)
    squares = torch.linalg.eigvals(torch.linalg.solve(image, explained)).real
    return -0.5 * torch.log1p(-squares).sum().item(), (image - explained).diagonal().mean().item()
