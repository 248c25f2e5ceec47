"""Corruptions: against sums written out, and worse from step to step on real images."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpseq import datasets
from gpseq.datasets.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    add_noise,
    blur,
    corrupt,
    reduce_contrast,
    rotate,
)

SHAPES = [(3, 6, 6), (2, 5, 8), (2, 3, 7, 4), (1, 1, 1), (2, 1, 1, 6)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def real() -> dict[str, Tensor]:
    return {name: datasets.load_images(name).x_test[::5] / 255 for name in ("mnist", "fashion_mnist")}


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 4), (0, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shape_and_dtype_are_kept(kind, shape, dtype):
    images = torch.rand(shape).to(dtype)
    before = images.clone()
    for severity in range(6):
        found = corrupt(images, kind, severity, seeded())
        assert found.shape == images.shape and found.dtype == dtype and found.device == images.device
        assert found.data_ptr() != images.data_ptr() or not found.numel()
        assert ((found >= 0) & (found <= 1)).all() and torch.equal(images, before)
        assert severity or torch.equal(found, images)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtypes_agree(kind, shape):
    """The draws are the same too."""
    images = torch.rand(shape, dtype=torch.float16).double()
    exact = corrupt(images, kind, 3, seeded())
    for dtype, accuracy in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        found = corrupt(images.to(dtype), kind, 3, seeded()).double()
        torch.testing.assert_close(found, exact, rtol=0, atol=accuracy)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_generators_make_it_repeatable(kind):
    images = torch.rand(40, 8, 8)
    first, again = corrupt(images, kind, 4, seeded(1)), corrupt(images, kind, 4, seeded(1))
    assert torch.equal(first, again)
    draws = kind in ("noise", "rotation")
    assert torch.equal(first, corrupt(images, kind, 4, seeded(2))) == (not draws)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    corrupt(images, kind, 4, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(corrupt(images, kind, 4), first)  # without a generator, torch's default is drawn from
    assert torch.equal(torch.get_rng_state(), state) == (not draws)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_real_images_are_worse_from_step_to_step(real, name, kind):
    """For each image, the distance from what it was grows."""
    images = real[name]
    distance = torch.stack([(corrupt(images, kind, s, seeded()) - images).flatten(1).norm(dim=1) for s in range(6)])
    steps = distance.diff(dim=0)
    assert (steps > 0).double().mean() > (0.95 if kind == "rotation" else 0.999)
    assert (distance.mean(1).diff() > 0.05 * distance[-1].mean()).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_classifier_gets_worse_from_step_to_step(kind):
    """Logistic regression on the shipped digits. A light blur helps it, by less than a point; the worst does not."""
    images = datasets.load_images("mnist")
    x, y = images.x_train[::4].flatten(1) / 255, images.y_train[::4]
    model = torch.nn.Linear(784, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y) + 1e-3 * model.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    test = images.x_test / 255
    accuracy = []
    for severity in range(6):
        predicted = model(corrupt(test, kind, severity, seeded()).flatten(1)).argmax(1)
        accuracy.append((predicted == images.y_test).double().mean().item())
    assert accuracy[0] > 0.8
    assert accuracy[0] - accuracy[5] > (0.02 if kind == "blur" else 0.1)
    assert all(b < a + 0.01 for a, b in itertools.pairwise(accuracy)), accuracy


def test_the_table_is_monotone():
    assert CORRUPTIONS == ("noise", "blur", "rotation", "contrast") == tuple(SEVERITIES)
    for kind, values in SEVERITIES.items():
        assert len(values) == 5
        assert list(values) == sorted(set(values), reverse=kind == "contrast")
        text = datasets.corrupt.__doc__
        shown = ", ".join(f"{value:g}".removeprefix("0") for value in values)
        assert shown in text, kind


# --- one after the other ----------------------------------------------------------------------------------------------


def test_noise_has_its_deviation(dtype):
    images = torch.full((200, 20, 20), 0.5, dtype=dtype)
    noise = add_noise(images, 0.05, seeded()) - images
    assert noise.std().item() == pytest.approx(0.05, rel=0.02) and abs(noise.mean().item()) < 5e-4
    two = [add_noise(images, d, seeded(3)) - images for d in (0.02, 0.06)]
    torch.testing.assert_close(3 * two[0], two[1], rtol=1e-3, atol=1e-5)
    assert torch.equal(add_noise(images, 0.0), images)


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.5])
def test_blur_is_a_weighted_mean(shape, deviation):
    images = torch.rand(shape, dtype=torch.float64)
    expected = torch.zeros_like(images)
    height, width = shape[-2:]
    for i in range(height):
        for j in range(width):
            total = 0.0
            for a in range(height):
                for b in range(width):
                    weight = math.exp(-((i - a) ** 2 + (j - b) ** 2) / (2 * deviation**2))
                    total += weight
                    expected[..., i, j] += weight * images[..., a, b]
            expected[..., i, j] /= total
    torch.testing.assert_close(blur(images, deviation), expected)


def test_blur_scales_with_the_image():
    small, large = torch.zeros(1, 14, 14), torch.zeros(1, 56, 56)
    small[:, 7, 7], large[:, 28:32, 28:32] = 1, 1
    one, other = corrupt(small, "blur", 5), corrupt(large, "blur", 5)
    shrunk = torch.nn.functional.avg_pool2d(other, 4)
    torch.testing.assert_close(one, shrunk, rtol=0, atol=0.04)


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 2, 6, 6), (2, 2, 4, 7)], ids=str)
def test_right_angles_move_pixels(shape, dtype):
    images = torch.rand(shape, dtype=dtype)
    torch.testing.assert_close(rotate(images, 0.0), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(images, 180.0), images.flip(-2, -1), rtol=0, atol=1e-5)
    if shape[-1] == shape[-2]:
        for turns in (1, 2, 3):
            found, expected = rotate(images, 90.0 * turns), images.rot90(turns, (-2, -1))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [17.0, -33.0, 70.0])
@pytest.mark.parametrize("size", [(6, 9), (8, 8), (9, 4)], ids=str)
def test_rotation_reads_the_pixel_that_comes_here(degrees, size):
    """Bilinear interpolation in pixels, which keeps lengths in images that are not square."""
    height, width = size
    image = torch.rand(1, height, width, dtype=torch.float64)
    expected = torch.zeros_like(image)
    angle = math.radians(degrees)
    for i in range(height):
        for j in range(width):
            # Rows run downwards, so against the clock is from +column to -row.
            right, up = j - (width - 1) / 2, (height - 1) / 2 - i
            from_right = math.cos(angle) * right + math.sin(angle) * up
            from_up = -math.sin(angle) * right + math.cos(angle) * up
            row, column = (height - 1) / 2 - from_up, from_right + (width - 1) / 2
            for a in (math.floor(row), math.floor(row) + 1):
                for b in (math.floor(column), math.floor(column) + 1):
                    if 0 <= a < height and 0 <= b < width:
                        expected[0, i, j] += (1 - abs(row - a)) * (1 - abs(column - b)) * image[0, a, b]
    torch.testing.assert_close(rotate(image, degrees), expected)


def test_each_image_has_an_angle():
    images = torch.rand(3, 1, 6, 6)
    angles = torch.tensor([0.0, 90.0, -20.0])
    each = torch.cat([rotate(image[None], angle.item()) for image, angle in zip(images, angles, strict=True)])
    torch.testing.assert_close(rotate(images, angles), each)
    turned = corrupt(torch.rand(1, 9, 9).expand(200, 9, 9), "rotation", 3, seeded())
    kinds = turned.flatten(1).unique(dim=0)
    assert len(kinds) == 2  # to the left and to the right
    share = (turned.flatten(1) == kinds[0]).all(1).double().mean()
    assert 0.35 < share < 0.65


@given(st.floats(0, 1), st.integers(0, 100))
def test_contrast_keeps_the_mean_of_each_channel(fraction, seed):
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=seeded(seed))
    found = reduce_contrast(images, fraction)
    torch.testing.assert_close(found.mean((-2, -1)), images.mean((-2, -1)))
    torch.testing.assert_close(found.std((-2, -1)), fraction * images.std((-2, -1)))
    for image in range(2):
        for channel in range(3):
            x = images[image, channel]
            torch.testing.assert_close(found[image, channel], fraction * x + (1 - fraction) * x.mean())


# --- what is refused --------------------------------------------------------------------------------------------------

IMAGES = torch.rand(2, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(IMAGES, "fog", 1), "kind: got 'fog', expected one of noise, blur, rotation, contrast"),
        (lambda: corrupt(IMAGES, "blur", 6), "severity: got 6, expected an integer from 0 to 5"),
        (lambda: corrupt(IMAGES, "blur", -1), "severity: got -1"),
        (lambda: corrupt(IMAGES, "blur", 1.5), "severity: got 1.5"),
        (lambda: corrupt(IMAGES, "blur", True), "severity: got True"),
        (lambda: corrupt(IMAGES[0], "blur", 1), r"images: got shape \(4, 4\), expected \(n, h, w\)"),
        (lambda: corrupt(IMAGES[None, None], "blur", 1), r"images: got shape \(1, 1, 2, 4, 4\)"),
        (lambda: corrupt(IMAGES[:, :0], "blur", 1), r"images: got shape \(2, 0, 4\)"),
        (lambda: corrupt(IMAGES * 255, "blur", 1), r"images: values run from .* to .*, expected 0 to 1"),
        (lambda: corrupt(-IMAGES, "blur", 0), "images: values run from"),
        (lambda: corrupt(IMAGES * math.nan, "noise", 1), "images: values run from nan to nan"),
        (lambda: add_noise(IMAGES, -0.1), "deviation: got -0.1"),
        (lambda: add_noise(IMAGES, math.inf), "deviation: got inf"),
        (lambda: blur(IMAGES, -0.1), "deviation: got -0.1"),
        (lambda: blur(IMAGES, math.nan), "deviation: got nan"),
        (lambda: reduce_contrast(IMAGES, 1.1), "fraction: got 1.1"),
        (lambda: rotate(IMAGES, torch.zeros(3)), r"degrees: got shape \(3,\), expected one number or \(2,\)"),
        (lambda: rotate(IMAGES, torch.zeros(2, 1)), r"degrees: got shape \(2, 1\)"),
        (lambda: rotate(IMAGES, math.inf), "degrees: expected finite numbers"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("images", [torch.zeros(2, 4, 4, dtype=torch.uint8), [[[0.0]]]])
def test_bytes_are_refused(images):
    with pytest.raises(TypeError, match=r"images: got .*, expected a floating tensor in"):
        corrupt(images, "noise", 1)
