"""Any data set of images as one of pseudo-videos."""

from __future__ import annotations

from collections.abc import Sized
from operator import index as as_integer
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpseq.checks import check_count
from gpseq.generative.corruption_base import Corruption
from gpseq.generative.frames import FrameRule, as_images, check_recipe, pseudo_video
from gpseq.sampling import row_key


class PseudoVideo(Dataset):
    """A data set of images whose items are pseudo-videos; see ``pseudo_video``.

    The noise of an item depends on the seed, the epoch and the item's index alone: it is the same with any number of
    workers and in any order, fresh in each epoch after :meth:`set_epoch`, and the same again when a run is repeated.

    Args:
        dataset: with a length; items are images ``(C, H, W)``, floating or bytes, or tuples that begin with one.
        num_frames: T.
        corruption: with a schedule that fits T frames; may be ``None`` beside a callable order.
        order: ``"markov"``, ``"star"``, ``"average"``, ``"matched"`` or a callable.
        noise: deviation of the noise.
        seed: any integer.
        layout: ``"tchw"`` or ``"cthw"``.

    Raises:
        TypeError: an argument of another kind, or a data set without length or images.
        ValueError: as ``pseudo_video``. Arguments are checked here, against the first image; each image when it is
            asked for.

    Example:
        >>> from gpseq.generative.corruptions import GaussianBlur
        >>> images = torch.utils.data.TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10))
        >>> videos = PseudoVideo(images, num_frames=4, corruption=GaussianBlur(1.0), seed=0)
        >>> video, label = videos[3]
        >>> video.shape, label, torch.equal(video[-1], images[3][0])
        (torch.Size([4, 1, 8, 8]), tensor(3), True)
        >>> torch.equal(video, videos[3][0]), torch.equal(video, videos.set_epoch(1)[3][0])
        (True, False)
    """

    def __init__(
        self,
        dataset: Dataset,
        num_frames: int,
        corruption: Corruption | None,
        order: str | FrameRule = "star",
        noise: float = 0.1,
        seed: int = 0,
        layout: str = "tchw",
    ) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"dataset: expected one with a length and items, got {type(dataset).__name__}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an integer, got {seed!r}.")
        if not len(dataset):
            raise ValueError("dataset: expected at least one image, got none.")
        self.dataset = dataset
        channels, height, width = self._image(0)[0].shape[1:]
        self.image_shape = (channels, height, width)
        check_recipe(num_frames, corruption, order, noise, layout, self.image_shape)
        self.num_frames, self.corruption, self.order = num_frames, corruption, order
        self.noise, self.seed, self.layout = noise, seed, layout
        # Shared memory, so that workers that outlive an epoch see the next one too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Of the noise, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> PseudoVideo:
        """Fresh noise for all items; call it before the loader of an epoch is asked for its first batch.

        Args:
            epoch: from 0.

        Returns:
            The data set.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative.
        """
        self._epoch.fill_(check_count("epoch", epoch, least=0))
        return self

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """The video of an image, and what comes with it.

        Args:
            index: of the image; negative ones count from the end.

        Returns:
            ``(T, C, H, W)`` or ``(C, T, H, W)``; a tuple of it and the rest if the items of the data set are tuples.

        Raises:
            IndexError: there is no such image.
            TypeError: the item is no image.
            ValueError: it is of another size than the first, or not finite.
        """
        number = as_integer(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index: expected less than {len(self)}, got {number}.")
        number %= len(self)
        image, rest = self._image(number)
        if tuple(image.shape[1:]) != self.image_shape:
            raise ValueError(
                f"dataset: expected images of one size, {self.image_shape} as the first, got {tuple(image.shape[1:])} "
                f"at index {number}."
            )
        generator = torch.Generator().manual_seed(row_key(number, row_key(self.epoch, self.seed)))
        video = pseudo_video(
            image, self.num_frames, self.corruption, self.order, self.noise, generator, self.layout
        ).squeeze(0)
        return video if rest is None else (video, *rest)

    def _image(self, number: int) -> tuple[Tensor, tuple[Any, ...] | None]:
        """An image as a batch of one, and the rest of its item; ``None`` if there is none."""
        item = self.dataset[number]
        image, rest = (item[0], tuple(item[1:])) if isinstance(item, list | tuple) and item else (item, None)
        if not isinstance(image, Tensor):
            raise TypeError(
                f"dataset: expected items that are tensors (C, H, W), or tuples that begin with one, got "
                f"{type(image).__name__} at index {number}."
            )
        return as_images(f"dataset, index {number}", image.unsqueeze(0)), rest
