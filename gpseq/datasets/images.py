"""Small grey images of ten classes: handwritten digits, and articles of clothing."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpseq.datasets.bundled import path

FOLDER_VARIABLE = "GPSEQ_DATA"
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CLASSES = {"mnist": DIGITS, "fashion_mnist": CLOTHES}
SOURCES = {
    "mnist": "MNIST (LeCun, Cortes and Burges 1998)",
    "fashion_mnist": "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), Zalando SE",
}


@dataclass(frozen=True, eq=False)
class Images:
    """Grey images with labels, split into training and test.

    Attributes:
        x_train: ``(n, 28, 28)`` uint8, brightness from 0, the background, to 255.
        y_train: ``(n,)`` int64, the index of each image's class in ``classes``.
        x_test: ``(m, 28, 28)`` uint8, as ``x_train``.
        y_test: ``(m,)`` int64, as ``y_train``.
        classes: the name of each class.
        name: a title for a figure.
        source: who made it.
    """

    x_train: Tensor  # (n, 28, 28)
    y_train: Tensor  # (n,)
    x_test: Tensor  # (m, 28, 28)
    y_test: Tensor  # (m,)
    classes: tuple[str, ...]
    name: str
    source: str

    def __len__(self) -> int:
        return len(self.y_train)


def load_images(name: str = "mnist", full: bool = False) -> Images:
    """Handwritten digits (MNIST) or articles of clothing (Fashion-MNIST).

    What ships is a balanced part of each: the first 600 training and the first 200 test images of every class, in the
    order of the whole set. It is not a random part. Its last images belong to the rarer classes, so shuffle before you
    make batches; and the first test images of MNIST are harder than the rest (nearest class means, found from the
    shipped training images, get 75 % of the shipped test images right and 81 % of the whole test set).

    The whole set, usually 60,000 and 10,000 images, is read from ``mnist.npz`` or ``fashion_mnist.npz`` in the folder
    that the environment variable ``GPSEQ_DATA`` names, with the arrays ``x_train (n, 28, 28)``, ``y_train (n,)``,
    ``x_test (m, 28, 28)`` and ``y_test (m,)``, all uint8 (labels may be of any integer type). Nothing is downloaded.

    Args:
        name: ``"mnist"`` or ``"fashion_mnist"``.
        full: whether to read the whole set from the folder instead.

    Returns:
        6000 training and 2000 test images, or as many as the folder's file holds.

    Raises:
        ValueError: if there is no such set, or if the folder's file does not hold such arrays.
        FileNotFoundError: if ``full`` and the variable is not set, or the folder lacks the file.

    Source:
        LeCun, Cortes and Burges (1998), The MNIST database of handwritten digits; Xiao, Rasul and Vollgraf (2017),
        Fashion-MNIST.

    Example:
        >>> images = load_images("fashion_mnist")
        >>> images.x_train.shape, images.x_test.shape, images.classes[images.y_train[0]]
        (torch.Size([6000, 28, 28]), torch.Size([2000, 28, 28]), 'ankle boot')
    """
    if name not in CLASSES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(CLASSES)}")
    arrays = _read(_find(name) if full else path(f"{name}_subset.npz"), len(CLASSES[name]))
    return Images(
        x_train=torch.from_numpy(arrays["x_train"]),
        y_train=torch.from_numpy(arrays["y_train"].astype(np.int64)),
        x_test=torch.from_numpy(arrays["x_test"]),
        y_test=torch.from_numpy(arrays["y_test"].astype(np.int64)),
        classes=CLASSES[name],
        name={"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}[name],
        source=SOURCES[name],
    )


def _find(name: str) -> Path:
    folder = os.environ.get(FOLDER_VARIABLE)
    file = Path(folder or "", f"{name}.npz")
    if folder and file.is_file():
        return file
    where = f"there is no {file}" if folder else f"{FOLDER_VARIABLE} is not set"
    raise FileNotFoundError(
        f"full: {where}. The whole set is read from {name}.npz in the folder that the environment variable "
        f"{FOLDER_VARIABLE} names, with the uint8 arrays x_train (60000, 28, 28), y_train (60000,), "
        "x_test (10000, 28, 28), y_test (10000,). Make it with numpy.savez from the public IDX files: those of "
        "MNIST (LeCun, Cortes and Burges) or of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist)"
    )


def _read(file: Path, classes: int) -> dict[str, np.ndarray]:
    """The four arrays of a file, checked."""
    # Opened here, because numpy leaves a damaged file open, and because what the system refuses is no damage.
    with file.open("rb") as raw:
        try:
            with np.load(raw, allow_pickle=False) as archive:
                found = {key: archive[key] for key in ARRAYS if key in archive}
        except Exception as error:  # numpy, zipfile and zlib have a dozen types for damaged files
            raise ValueError(f"{file}: not a readable .npz file of plain arrays") from error
    # A member of the archive that is no array comes as bytes.
    arrays = {key: array for key, array in found.items() if isinstance(array, np.ndarray)}
    if len(arrays) < len(ARRAYS):
        raise ValueError(f"{file}: no array {', '.join(key for key in ARRAYS if key not in arrays)} in it")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (28, 28) or len(x) == 0:
            raise ValueError(f"{file}: x_{part} is {x.dtype} of shape {x.shape}, expected uint8 of shape (n, 28, 28)")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(
                f"{file}: y_{part} is {y.dtype} of shape {y.shape}, expected integers of shape ({len(x)},)"
            )
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"{file}: y_{part} runs from {y.min()} to {y.max()}, expected labels 0 to {classes - 1}")
    return arrays
