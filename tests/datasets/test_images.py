"""Images: what ships, and what is accepted from a folder of one's own."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpseq import datasets

NAMES = ["mnist", "fashion_mnist"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPSEQ_DATA", str(tmp_path))
    return tmp_path


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    """A made-up set of 20 and 10 images, parts of it changed."""
    made = {
        "x_train": np.arange(20 * 784, dtype=np.uint64).astype(np.uint8).reshape(20, 28, 28),
        "y_train": (np.arange(20) % 10).astype(np.uint8),
        "x_test": np.full((10, 28, 28), 7, dtype=np.uint8),
        "y_test": np.arange(10, dtype=np.uint8)[::-1],
    }
    return made | changed


def save(file: Path, **changed: np.ndarray) -> None:
    np.savez_compressed(file, **arrays(**changed))


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_part_is_balanced(name):
    images = datasets.load_images(name)
    assert isinstance(images, datasets.Images) and len(images) == 6000
    assert images.x_train.shape == (6000, 28, 28) and images.x_test.shape == (2000, 28, 28)
    assert images.x_train.dtype == images.x_test.dtype == torch.uint8
    assert images.y_train.dtype == images.y_test.dtype == torch.int64
    assert images.y_train.bincount().tolist() == [600] * 10 and images.y_test.bincount().tolist() == [200] * 10
    assert len(images.classes) == len(set(images.classes)) == 10
    assert images.source and images.name.lower().replace("-", "_") == name


@pytest.mark.parametrize(
    ("name", "train", "test", "means"),
    [
        ("mnist", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], (0.1326, 0.1222)),
        ("fashion_mnist", [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], [9, 2, 1, 1, 6, 1, 4, 6, 5, 7], (0.2869, 0.2853)),
    ],
)
def test_order_and_brightness(name, train, test, means):
    """The first labels are the well-known ones of the whole set; brightness is within 10 % of its 0.131 and 0.286."""
    images = datasets.load_images(name)
    assert images.y_train[:10].tolist() == train and images.y_test[:10].tolist() == test
    for part, mean in zip((images.x_train, images.x_test), means, strict=True):
        assert part.double().mean().item() / 255 == pytest.approx(mean, abs=1e-4)
        assert part.min() == 0 and part.max() == 255


@pytest.mark.parametrize(("name", "accuracy"), [("mnist", 0.7525), ("fashion_mnist", 0.6725)])
def test_labels_belong_to_their_images(name, accuracy):
    """The nearest class mean gets as many right as was measured on the whole sets' same images: 0.77 and 0.67."""
    images = datasets.load_images(name)
    x, y = images.x_train.flatten(1).double(), images.y_train
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    predicted = torch.cdist(images.x_test.flatten(1).double(), means).argmin(1)
    assert (predicted == images.y_test).double().mean().item() == pytest.approx(accuracy, abs=0.002)


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_in_both_parts(name):
    images = datasets.load_images(name)
    train, test = ({bytes(image) for image in part.flatten(1).numpy()} for part in (images.x_train, images.x_test))
    assert len(train) >= 5990 and not train & test


def test_names_of_classes():
    assert datasets.load_images().classes == tuple("0123456789")
    clothes = datasets.load_images("fashion_mnist").classes
    assert (clothes[0], clothes[9]) == ("T-shirt/top", "ankle boot")


@pytest.mark.parametrize("full", [False, True])
def test_an_unknown_name_is_refused(full):
    with pytest.raises(ValueError, match="name: got 'cifar', expected one of mnist, fashion_mnist"):
        datasets.load_images("cifar", full)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [np.uint8, np.int32, np.int64])
def test_the_whole_set_comes_from_the_folder(folder, name, labels):
    made = arrays(y_train=(np.arange(20) % 10).astype(labels), extra=np.zeros(3))
    np.savez(folder / f"{name}.npz", **made)
    images = datasets.load_images(name, full=True)
    for key in ("x_train", "y_train", "x_test", "y_test"):
        assert np.array_equal(getattr(images, key).numpy(), made[key])
    assert images.x_train.dtype == torch.uint8 and images.y_train.dtype == images.y_test.dtype == torch.int64
    assert len(images) == 20 and images.classes == datasets.load_images(name).classes
    assert len(datasets.load_images(name)) == 6000  # what ships is not touched by the folder


@pytest.mark.parametrize("variable", [None, "", "folder"])
def test_a_missing_file_is_explained(tmp_path, monkeypatch, variable):
    if variable is None:
        monkeypatch.delenv("GPSEQ_DATA", raising=False)
    else:
        monkeypatch.setenv("GPSEQ_DATA", variable and str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if variable != "folder":
        save(tmp_path / "fashion_mnist.npz")  # an empty variable does not mean the working directory
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load_images("fashion_mnist", full=True)
    message = str(caught.value)
    start = f"there is no {tmp_path / 'fashion_mnist.npz'}" if variable == "folder" else "GPSEQ_DATA is not set"
    assert message.startswith(f"full: {start}")
    for word in ("fashion_mnist.npz", "GPSEQ_DATA", "x_train (60000, 28, 28)", "y_test (10000,)", "MNIST", "zalando"):
        assert word in message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": np.zeros((20, 28, 28))}, r"x_train is float64 of shape \(20, 28, 28\), expected uint8"),
        ({"x_train": np.zeros((20, 784), np.uint8)}, r"x_train is uint8 of shape \(20, 784\), expected uint8 of shape"),
        ({"x_test": np.zeros((10, 28, 32), np.uint8)}, r"x_test is uint8 of shape \(10, 28, 32\)"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, int)}, r"x_test .* \(0, 28, 28\)"),
        ({"y_train": np.zeros(19, int)}, r"y_train is int64 of shape \(19,\), expected integers of shape \(20,\)"),
        ({"y_train": np.zeros((20, 10), int)}, r"y_train is int64 of shape \(20, 10\)"),
        ({"y_test": np.zeros(10)}, r"y_test is float64 of shape \(10,\)"),
        ({"y_test": np.arange(1, 11)}, "y_test runs from 1 to 10, expected labels 0 to 9"),
        ({"y_train": np.full(20, -1)}, "y_train runs from -1 to -1, expected labels 0 to 9"),
        ({"y_train": np.array(["1"] * 20)}, "y_train is <U1"),
    ],
)
def test_arrays_of_another_kind_are_refused(folder, changed, message):
    save(folder / "mnist.npz", **changed)
    with pytest.raises(ValueError, match=rf"mnist.npz: {message}"):
        datasets.load_images("mnist", full=True)


def test_missing_arrays_are_named(folder):
    made = arrays()
    np.savez(folder / "mnist.npz", x_train=made["x_train"], y_test=made["y_test"])
    with zipfile.ZipFile(folder / "mnist.npz", "a") as archive:
        archive.writestr("y_train", "no array")
    with pytest.raises(ValueError, match=r"mnist.npz: no array y_train, x_test in it"):
        datasets.load_images("mnist", full=True)


def test_pickles_are_never_read(folder):
    save(folder / "mnist.npz", y_train=np.array([object()] * 20))
    with pytest.raises(ValueError, match=r"mnist.npz: not a readable .npz file of plain arrays"):
        datasets.load_images("mnist", full=True)


def test_a_single_array_is_no_set(folder):
    with (folder / "mnist.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"mnist.npz: not a readable .npz file of plain arrays"):
        datasets.load_images("mnist", full=True)


WHOLE = io.BytesIO()
np.savez_compressed(WHOLE, **arrays())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(WHOLE.getvalue()) - 1), st.integers(1, 255), st.booleans())
def test_a_damaged_file_is_refused_or_read_whole(folder, at, change, cut):
    data = bytearray(WHOLE.getvalue())
    if cut:
        del data[at:]
    else:
        data[at] ^= change
    (folder / "mnist.npz").write_bytes(data)
    try:
        images = datasets.load_images("mnist", full=True)
    except ValueError as caught:
        assert "mnist.npz" in str(caught)
    else:  # the change hit a field that does not matter, such as a date
        assert not cut and np.array_equal(images.x_train.numpy(), arrays()["x_train"])


def test_loaders_hand_out_fresh_tensors():
    datasets.load_images().x_train.zero_()
    assert datasets.load_images().x_train.max() == 255
