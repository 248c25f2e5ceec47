"""Fashion-MNIST, its corruptions, and digits that are no clothes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.uncertainty.networks import VisionTransformer
from benchmarks.uncertainty.tasks import Part, Task
from gpseq import datasets
from gpseq.datasets.corruptions import CORRUPTIONS, corrupt


def fashion(smoke: bool = False) -> Task:
    """15,000 training images drawn from the whole set, 2,000 for validation, 5,000 of the test images.

    Shifted: four corruptions at five severities of 250 test images. Out of distribution: 1,000 test digits. A smoke
    test takes small parts of the shipped subset.

    Raises:
        FileNotFoundError: the folder that ``GPSEQ_DATA`` names is not set or lacks the whole sets.
    """
    sizes = (300, 50, 60, 15, 30) if smoke else (15_000, 2_000, 5_000, 250, 1_000)
    clothes, digits = (datasets.load_images(name, full=not smoke) for name in ("fashion_mnist", "mnist"))
    rows = torch.randperm(len(clothes), generator=torch.Generator().manual_seed(0))
    train, val = rows[: sizes[0]], rows[sizes[0] : sizes[0] + sizes[1]]
    order = torch.randperm(len(clothes.y_test), generator=torch.Generator().manual_seed(1))[: sizes[2]]
    test = Part(_scaled(clothes.x_test[order]), clothes.y_test[order])
    some, labels = test.inputs[: sizes[3]], test.labels[: sizes[3]]
    shifted = {
        f"{kind} {severity}": Part(corrupt(some, kind, severity, torch.Generator().manual_seed(2)), labels)
        for kind in CORRUPTIONS
        for severity in ((1, 5) if smoke else range(1, 6))
    }
    outside = torch.randperm(len(digits.y_test), generator=torch.Generator().manual_seed(3))[: sizes[4]]
    return Task(
        name="fashion-smoke" if smoke else "fashion",
        train=Part(_scaled(clothes.x_train[train]), clothes.y_train[train]),
        val=Part(_scaled(clothes.x_train[val]), clothes.y_train[val]),
        test=test,
        shifted=shifted,
        ood={"MNIST": Part(_scaled(digits.x_test[outside]))},
        make=lambda attention: VisionTransformer(10, attention),
        epochs=1 if smoke else 12,
    )


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 255
