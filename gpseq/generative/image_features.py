"""Features of small images for scores of what was generated: what a classifier says just before its answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_number
from gpseq.generative.frames import as_images
from gpseq.generative.image_nets import ImageEncoder
from gpseq.generative.video_checks import check_image_shape
from gpseq.training import History, warmup_cosine
from gpseq.training import fit as train


class ImageFeatures(nn.Module):
    """A small convolutional classifier, whose last hidden layer is a feature function of ``gpseq.metrics.frechet``.

    Distances in the features of different networks cannot be compared, nor is any of them an FID. So train one network
    on real images, and judge every model of them by it.

    Args:
        num_classes: of the labels, at least 2.
        image_shape: ``(C, H, W)``, sides of at least 4.
        num_features: d, length of the last hidden layer.
        width: channels of the first convolution.
        device: of the parameters.
        dtype: of the parameters; images are cast to it.

    Raises:
        TypeError: numbers of a wrong kind.
        ValueError: numbers out of their range.

    Shape:
        ``(n, C, H, W)`` to ``(n, d)``: floating pixels from 0 to 1, or bytes, which are divided by 255.

    Example:
        >>> from gpseq.datasets import load_images
        >>> from gpseq.metrics import frechet
        >>> digits = load_images("mnist")
        >>> network = ImageFeatures(num_classes=10, width=4)
        >>> history = network.fit(digits.x_train[:256].unsqueeze(1), digits.y_train[:256], epochs=1)
        >>> real, other = digits.x_test[:200].unsqueeze(1), digits.x_test[200:400].unsqueeze(1)
        >>> network(real).shape, bool(frechet(network, real, other) > frechet(network, real, real))
        (torch.Size([200, 32]), True)
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_features: int = 32,
        width: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = check_count("num_classes", num_classes, least=2)
        self.image_shape = check_image_shape(image_shape)
        for name, value in (("num_features", num_features), ("width", width)):
            check_count(name, value)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder = ImageEncoder(self.image_shape, num_features, width, **made)
        self.head = nn.Linear(num_features, num_classes, **made)

    def forward(self, images: Tensor) -> Tensor:
        """The features.

        Args:
            images: ``(n, C, H, W)``, on any device.

        Returns:
            ``(n, d)``, on the device of the network.

        Raises:
            TypeError: images that are neither floating nor bytes.
            ValueError: another shape, or pixels that are not finite.
        """
        return functional.silu(self.encoder(self._check(images).to(self.head.weight)))

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalised log probabilities of the classes.

        Args:
            images: as for a call.

        Returns:
            ``(n, num_classes)``.

        Raises:
            TypeError: images that are neither floating nor bytes.
            ValueError: another shape, or pixels that are not finite.
        """
        return self.head(self(images))

    def fit(
        self,
        images: Tensor,
        labels: Tensor,
        epochs: int = 3,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        generator: torch.Generator | None = None,
        progress: bool | None = False,
    ) -> History:
        """Learn to tell the classes apart, by cross-entropy and AdamW with a rate that rises and falls; in place.

        Args:
            images: as for a call, all that there are.
            labels: ``(n,)``, integers from 0 to ``num_classes - 1``.
            epochs: passes over the images.
            batch_size: images in a step.
            learning_rate: the highest.
            generator: of the order of the images, on any device; ``None`` is torch's default generator.
            progress: whether to show it, see ``gpseq.training.fit``.

        Returns:
            What happened in each epoch. The network is in evaluation mode.

        Raises:
            TypeError: images, labels or numbers of a wrong kind.
            ValueError: another shape, another number of labels than of images, labels or numbers out of their range.
        """
        given = self._check(images)
        _check_labels(labels, len(given), self.num_classes)
        check_count("epochs", epochs)
        check_count("batch_size", batch_size)
        rate = check_number("learning_rate", learning_rate, above=0.0, expected="a positive number")
        # Of what came, so that bytes stay bytes until their batch is due.
        batches = _Batches(images, labels, batch_size, generator)
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate)
        total = epochs * len(batches)
        history = train(
            self,
            lambda model, batch, step: functional.cross_entropy(self.logits(batch[0]), batch[1]),
            batches,
            optimizer=optimizer,
            epochs=epochs,
            scheduler=warmup_cosine(optimizer, total, total // 10),
            schedule="step",
            max_grad_norm=1.0,
            device=self.head.weight.device,
            progress=progress,
        )
        self.eval()
        return history

    def extra_repr(self) -> str:
        """What the network was made with."""
        return f"num_classes={self.num_classes}, image_shape={self.image_shape}"

    def _check(self, images: Any) -> Tensor:
        found = as_images("images", images)
        if tuple(found.shape[1:]) != self.image_shape or not len(found):
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images: expected shape (n, {shape}) with n at least 1, got {tuple(found.shape)}.")
        return found


@dataclass(frozen=True, eq=False)
class _Batches:
    """Images and labels in a new order each time, whole batches at once."""

    images: Tensor
    labels: Tensor
    batch_size: int
    generator: torch.Generator | None

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        place = None if self.generator is None else self.generator.device
        order = torch.randperm(len(self.labels), generator=self.generator, device=place)
        for chosen in order.split(self.batch_size):
            yield self.images[chosen.to(self.images.device)], self.labels[chosen.to(self.labels.device)].long()


def _check_labels(labels: Any, number: int, num_classes: int) -> None:
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype is torch.bool
    ):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integers, got {got}.")
    if labels.shape != (number,):
        raise ValueError(f"labels: expected shape ({number},), one for each image, got {tuple(labels.shape)}.")
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels: expected integers from 0 to {num_classes - 1}, got {low} to {high}.")
