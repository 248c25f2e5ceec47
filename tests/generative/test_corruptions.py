"""Corruptions: against sums over pixels, their matrices against what they do, and schedules that are none."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.generative.corruptions import (
    Compose,
    Corruption,
    Downsample,
    GaussianBlur,
    GaussianNoise,
    Grayscale,
    Mask,
    block_mean_matrix,
    blur_matrix,
)
from gpseq.generative.draws import drawn
from tests.oracles_generative_frames import block_means, blurred, flat_matrix

SHAPES = [(2, 1, 8, 8), (3, 3, 5, 7), (1, 2, 1, 6), (2, 3, 1, 1), (0, 1, 4, 4)]
LINEAR = {
    "blur": GaussianBlur(0.8),
    "blur, listed": GaussianBlur([0.0, 0.5, 1.3, 1.3]),
    "downsample": Downsample(2),
    "downsample, listed": Downsample([1, 2, 3, 6]),
    "noise": GaussianNoise(0.2),
    "noise, listed": GaussianNoise([0.0, 0.1, 0.4, 0.2]),
    "gray": Grayscale(),
    "composed": Compose([Downsample(2), GaussianBlur(0.7), Grayscale()]),
    "with noise": Compose([GaussianNoise(0.1), GaussianBlur(0.7), GaussianNoise(0.3)]),
}
ALL = LINEAR | {"mask": Mask(0.3), "composed mask": Compose([GaussianBlur(0.5), Mask([0.0, 0.2, 0.4, 0.5])])}
each = pytest.mark.parametrize("corruption", ALL.values(), ids=list(ALL))
linear = pytest.mark.parametrize("corruption", LINEAR.values(), ids=list(LINEAR))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


@given(size=st.integers(1, 12), sigma=st.floats(0, 20) | st.floats(0, 1e-3) | st.just(1e-200))
def test_rows_of_a_blur_sum_to_one(size, sigma):
    matrix = blur_matrix(size, sigma)
    assert matrix.dtype == torch.float64 and (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-14)
    # Reflection takes and gives alike: the mean brightness of a picture stays.
    torch.testing.assert_close(matrix.sum(0), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_no_blur_is_the_identity(size):
    assert torch.equal(blur_matrix(size, 0.0), torch.eye(size, dtype=torch.float64))
    assert torch.equal(block_mean_matrix(size, 1), torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blur_is_a_sum_over_mirrored_pixels(shape, sigma, dtype):
    images = torch.rand(shape, dtype=dtype)
    found = GaussianBlur(sigma)(images, 1)
    expected = np.array([[blurred(plane, sigma) for plane in image] for image in images.double().numpy()])
    assert found.dtype == dtype and found.shape == shape
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).view(shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("side", [2, 3, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_downsampling_is_means_of_blocks_and_keeps_the_size(shape, side, dtype):
    images = torch.rand(shape, dtype=dtype)
    found = Downsample([1, side])(images, 1)
    expected = np.array([[block_means(plane, side) for plane in image] for image in images.double().numpy()])
    assert found.dtype == dtype and found.shape == shape
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).view(shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("corruption", [GaussianBlur(1.5), Downsample(3), Grayscale(), Mask(0.4, fill=0.7)], ids=repr)
def test_constant_images_stay(corruption, dtype):
    images = torch.full((2, 3, 8, 8), 0.7, dtype=dtype)
    torch.testing.assert_close(corruption(images, 2), images)


def test_widths_of_blurs_add_in_squares():
    blur = GaussianBlur(1.5)
    assert blur.width(4) == 3.0 and blur.width(4, start=3) == 1.5
    listed = GaussianBlur([0, 3, 5])
    assert listed.width(2, start=1) == 4.0 and listed.sigmas == (0.0, 3.0, 5.0)
    # Wide enough that neither the cut of the kernel nor its sampling shows: steps lead where the schedule says.
    image = torch.zeros(1, 1, 1, 101, dtype=torch.float64)
    image[..., 50] = 1.0
    chain = image
    for i in range(1, 5):
        chain = blur(chain, i, start=i - 1)
    position = torch.arange(101.0) - 50
    assert abs((chain * position**2).sum().sqrt().item() - 3.0) < 0.03
    assert (chain - blur(image, 4)).abs().max() < 1e-3


def test_levels_of_steps_multiply_to_those_from_the_image():
    noise, mask = GaussianNoise([0.0, 0.1, 0.4, 0.2]), Mask([0.0, 0.2, 0.5, 0.9])
    assert math.isclose(noise.kept(3), 0.9 * 0.6 * 0.8) and math.isclose(noise.kept(3, 1), 0.6 * 0.8)
    assert noise.kept(2, 2) == 1.0 and GaussianNoise(0.5).kept(3, 1) == 0.25
    left = [1 - mask.rate(i, i - 1) for i in range(1, 4)]
    assert math.isclose(math.prod(left), 0.1) and math.isclose(Mask(0.5).rate(2), 0.75)


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_dtype_and_the_input_are_kept(corruption, shape, dtype):
    images = torch.rand(shape, dtype=dtype)
    before = images.clone()
    for distance, start in ((0, 0), (1, 0), (3, 0), (3, 2), (2, 2)):
        found = corruption(images, distance, start, seeded())
        assert found.shape == shape and found.dtype == dtype
        assert torch.equal(found, corruption(images, distance, start, seeded()))
    assert torch.equal(images, before)
    assert torch.equal(corruption(images, 0, generator=seeded()), images)


@linear
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 5), (2, 1, 6)], ids=str)
def test_the_matrix_does_what_the_corruption_does(corruption, shape):
    assert corruption.is_linear
    size = math.prod(shape)
    for distance, start in ((0, 0), (1, 0), (3, 0), (3, 2)):
        zero = torch.zeros(size, *shape, dtype=torch.float64)

        def apply(images, distance=distance, start=start, zero=zero):
            # Its own noise is the same in both, and drops out.
            first, second = corruption(images, distance, start, seeded()), corruption(zero, distance, start, seeded())
            return first - second

        matrix = corruption.matrix(shape, distance, start)
        torch.testing.assert_close(matrix, flat_matrix(apply, shape), rtol=0, atol=1e-12)
        channels, rows, columns = corruption.kronecker(shape, distance, start)
        assert channels.shape == (shape[0],) * 2 and rows.shape == (shape[1],) * 2 and columns.shape == (shape[2],) * 2


@pytest.mark.parametrize("name", ["noise", "noise, listed", "with noise", "blur"])
def test_the_covariance_is_that_of_its_draws(name):
    corruption, shape = LINEAR[name], (1, 2, 3)
    draws = corruption(torch.zeros(50_000, *shape, dtype=torch.float64), 3, 1, seeded()).flatten(1)
    torch.testing.assert_close(torch.cov(draws.mT), corruption.covariance(shape, 3, 1), rtol=0, atol=0.02)


def test_noise_keeps_the_variance_of_standard_images():
    images = torch.randn(4, 1, 100, 100, generator=seeded())
    assert abs(GaussianNoise(0.3)(images, 5, generator=seeded(1)).var().item() - 1) < 0.03


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masks_leave_out_their_rate_in_all_channels(rate, dtype):
    images = torch.rand(8, 3, 50, 50, dtype=dtype) + 1
    found = Mask([0.0, rate], fill=-2.0)(images, 1, generator=seeded())
    gone = found == -2
    assert (gone.all(1) == gone.any(1)).all() and torch.equal(found[~gone], images[~gone])
    assert abs(gone.double().mean().item() - rate) < 0.02
    assert not torch.equal(gone[0], gone[1])


def test_a_mask_spares_one_pixel():
    found = Mask([0.0, 0.75])(torch.ones(500, 2, 2, 2), 1, generator=seeded())
    assert (found[:, 0].sum((-2, -1)) >= 1).all()


def test_gray_has_equal_channels(dtype):
    images = torch.rand(2, 3, 4, 4, dtype=dtype)
    for gray in (Grayscale(), Grayscale((0.299, 0.587, 0.114)), Grayscale([2, 0, 0])):
        found = gray(images, 1)
        assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])
    torch.testing.assert_close(found[:, 0], images[:, 0])
    assert Grayscale([1, 3]).weights == (0.25, 0.75)


def test_composition_applies_one_after_the_other():
    images = torch.rand(2, 3, 6, 6)
    composed = Compose([GaussianNoise(0.1), Mask(0.3), Grayscale()])
    generator = seeded()
    expected = images
    for part in composed.parts:
        expected = part(expected, 2, 1, generator)
    assert torch.equal(composed(images, 2, 1, seeded()), expected)
    assert not composed.is_linear and Compose([Grayscale()]).is_linear
    with pytest.raises(TypeError, match="Mask is not linear"):
        composed.matrix((3, 6, 6), 1)


@each
def test_corruptions_are_values(corruption):
    assert pickle.loads(pickle.dumps(corruption)) == corruption == copy.deepcopy(corruption)
    assert type(corruption).__name__ in repr(corruption) and isinstance(hash(corruption), int)


def test_gradients_pass_also_after_inference_mode():
    """Matrices are kept from call to call; those made in inference mode must serve outside."""
    corruption = Compose([GaussianBlur(0.123), Downsample(2), Grayscale()])
    images = torch.rand(1, 3, 6, 6)
    with torch.inference_mode():
        expected = corruption(images, 1)
    images.requires_grad_()
    found = corruption(images, 1)
    found.square().sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone())
    assert images.grad is not None and images.grad.isfinite().all()


def test_draws_are_the_same_for_every_dtype(dtype):
    like = torch.zeros(3, 4, dtype=dtype)
    expected = torch.randn(3, 4, generator=seeded()).to(dtype)
    assert torch.equal(drawn(torch.randn, like, seeded()), expected)


def test_one_of_your_own_needs_only_a_call():
    class Darker(Corruption):
        def __call__(self, images, distance, start=0, generator=None):
            return images * 0.5 ** (distance - start)

    darker = Darker()
    darker.check(5, (1, 2, 2))
    assert not darker.is_linear and torch.equal(darker(torch.ones(1, 1, 2, 2), 2), torch.full((1, 1, 2, 2), 0.25))
    with pytest.raises(TypeError, match="Darker is not linear"):
        darker.kronecker((1, 2, 2), 1)


BAD = {
    "a negative width": (lambda: GaussianBlur(-1.0), ValueError, "sigmas: expected finite numbers from 0"),
    "a width of NaN": (lambda: GaussianBlur([0.0, math.nan]), ValueError, "sigmas: expected finite"),
    "a first blur": (lambda: GaussianBlur([0.5, 1.0]), ValueError, "sigmas: expected 0 at distance 0"),
    "less and less blur": (lambda: GaussianBlur([0.0, 2.0, 1.0]), ValueError, "do not decrease"),
    "no widths": (lambda: GaussianBlur([]), ValueError, "sigmas: expected 0 at distance 0"),
    "a word": (lambda: GaussianBlur("wide"), ValueError, "sigmas: expected finite"),
    "all noise": (lambda: GaussianNoise(1.0), ValueError, "betas: expected finite numbers from 0 to below 1"),
    "a first noise": (lambda: GaussianNoise([0.1, 0.1]), ValueError, "betas: expected 0 at distance 0"),
    "half a block": (lambda: Downsample(1.5), TypeError, "factors: expected an integer"),
    "half a block in a list": (lambda: Downsample([1, 1.5]), TypeError, "factors: expected an integer"),
    "no block": (lambda: Downsample(0), ValueError, "factors: expected at least 1"),
    "a first block": (lambda: Downsample([2, 2]), ValueError, "factors: expected 1 at distance 0"),
    "smaller blocks": (lambda: Downsample([1, 4, 2]), ValueError, "do not decrease"),
    "a full mask": (lambda: Mask(1.0), ValueError, "rates: expected finite numbers from 0 to below 1"),
    "an infinite fill": (lambda: Mask(0.5, fill=math.inf), ValueError, "fill: expected a finite number"),
    "a negative weight": (lambda: Grayscale([1.0, -1.0]), ValueError, "weights: expected numbers that are not"),
    "no weight": (lambda: Grayscale([0.0, 0.0]), ValueError, "weights: expected"),
    "no parts": (lambda: Compose([]), ValueError, "parts: expected at least one"),
    "a function as a part": (lambda: Compose([torch.relu]), TypeError, "parts: expected corruptions"),
    "beyond the schedule": (
        lambda: GaussianBlur([0.0, 1.0])(torch.zeros(1, 1, 2, 2), 2),
        ValueError,
        "sigmas: expected a number for distance 2, got 2",
    ),
    "backwards": (lambda: GaussianBlur(1.0)(torch.zeros(1, 1, 2, 2), 1, start=2), ValueError, "distance: expected"),
    "half a distance": (lambda: GaussianBlur(1.0)(torch.zeros(1, 1, 2, 2), 0.5), TypeError, "distance: expected"),
    "another length": (lambda: GaussianBlur([0.0, 1.0]).check(3, (1, 2, 2)), ValueError, "sigmas: .* 3 frames, got 2"),
    "another length inside": (
        lambda: Compose([Grayscale(), Mask([0.0, 0.1])]).check(3, (1, 9, 9)),
        ValueError,
        "rates: .* 3 frames, got 2",
    ),
    "masks that leave nothing": (
        lambda: Mask([0.0, 0.5, 0.99]).check(3, (1, 8, 8)),
        ValueError,
        "rates: expected masks that leave a pixel, .* 0.99 of 64 pixels",
    ),
    "steps that leave nothing": (lambda: Mask(0.9).check(3, (1, 8, 8)), ValueError, "masks that leave a pixel"),
    "other channels": (lambda: Grayscale([1, 1]).check(3, (3, 2, 2)), ValueError, "weights: .* 3 channels, got 2"),
    "other channels in a call": (
        lambda: Grayscale([1, 1])(torch.zeros(1, 3, 2, 2), 1),
        ValueError,
        "weights: .* 3 channels, got 2",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_schedules_come_in_any_sequence(kind):
    assert GaussianBlur(kind([0.0, 0.5, 1.0])) == GaussianBlur([0.0, 0.5, 1.0])
    assert Downsample(kind([1, 2, 4])) == Downsample([1, 2, 4])
    assert GaussianBlur(kind([2.0])[0]) == GaussianBlur(2.0)


def test_masks_that_just_leave_a_pixel_pass():
    Mask([0.0, 63 / 64]).check(2, (1, 8, 8))


@pytest.mark.cuda
@each
def test_the_gpu_does_the_same(corruption):
    images = torch.rand(3, 3, 6, 6)
    found = corruption(images.cuda(), 3, 1, seeded())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), corruption(images, 3, 1, seeded()), rtol=0, atol=1e-5)
