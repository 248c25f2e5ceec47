"""Pseudo-videos: they end with the image, and each order is what its rule says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq import datasets
from gpseq.generative.corruptions import (
    Compose,
    Corruption,
    Downsample,
    GaussianBlur,
    GaussianNoise,
    Grayscale,
    Mask,
)
from gpseq.generative.frames import LAYOUTS, ORDERS, as_images, pseudo_video


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def halved(later, image, distance, generator):
    """An order of the user's own: half the frame after it, plus noise."""
    return 0.5 * later[0] + torch.randn(image.shape, generator=generator).to(image)


CORRUPTIONS = {
    "blur": GaussianBlur(0.8),
    "blur, listed": GaussianBlur([0.0, 0.5, 1.5, 2.0]),
    "noise": GaussianNoise(0.2),
    "downsample": Downsample(2),
    "mask": Mask(0.2),
    "gray": Grayscale(),
    "composed": Compose([GaussianBlur(0.5), Downsample([1, 2, 2, 3]), Mask(0.2), Grayscale(), GaussianNoise(0.1)]),
}
CHOICES = {**{order: order for order in ORDERS}, "callable": halved}
corruptions = pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=list(CORRUPTIONS))
orders = pytest.mark.parametrize("order", CHOICES.values(), ids=list(CHOICES))


@corruptions
@orders
@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (1, 1, 3, 5), (0, 1, 4, 4)], ids=str)
def test_the_last_frame_is_the_image_bit_for_bit(corruption, order, shape, dtype):
    images = torch.rand(shape, dtype=dtype) - 0.5
    before = images.clone()
    found = {layout: pseudo_video(images, 4, corruption, order, 0.1, seeded(), layout) for layout in LAYOUTS}
    n, c, h, w = shape
    assert found["tchw"].shape == (n, 4, c, h, w) and found["cthw"].shape == (n, c, 4, h, w)
    assert torch.equal(found["tchw"].transpose(1, 2), found["cthw"])
    assert torch.equal(found["tchw"][:, -1], images) and torch.equal(images, before)
    assert all(video.dtype == dtype and video.isfinite().all() for video in found.values())
    assert n == 0 or not torch.equal(found["tchw"][:, 0], images)
    short = GaussianBlur(1.0) if order is halved else GaussianBlur([0.0])
    assert torch.equal(pseudo_video(images, 1, short, order), images.unsqueeze(1))


@given(
    num_frames=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    noise=st.sampled_from([0.0, 0.5]),
    width=st.floats(0, 4),
    bits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4),
)
def test_the_last_frame_is_the_image_for_all_pixels(num_frames, order, noise, width, bits):
    images = torch.tensor(bits).view(1, 1, 2, 2)
    video = pseudo_video(images, num_frames, GaussianBlur(width), order, noise)
    assert torch.equal(video[:, -1].view(torch.int32), images.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_more(dtype):
    images = torch.rand(2, 1, 8, 8).to(dtype)
    found = pseudo_video(images, 6, GaussianBlur(0.5), "markov", 0.1, seeded())
    expected = pseudo_video(images.float(), 6, GaussianBlur(0.5), "markov", 0.1, seeded())
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype)) and torch.equal(found[:, -1], images)


@orders
def test_draws_do_not_depend_on_the_dtype(order):
    images = torch.rand(2, 3, 6, 6)
    corruption = Compose([GaussianBlur(0.5), GaussianNoise(0.1), Mask(0.2)])
    single = pseudo_video(images, 4, corruption, order, 0.1, seeded())
    double = pseudo_video(images.double(), 4, corruption, order, 0.1, seeded())
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)
    assert torch.equal(single, pseudo_video(images, 4, corruption, order, 0.1, seeded()))
    assert not torch.equal(single, pseudo_video(images, 4, corruption, order, 0.1, seeded(1)))


def test_without_generator_the_default_one_is_used_and_advanced():
    images = torch.rand(1, 1, 3, 3)
    first, second = (pseudo_video(images, 3, GaussianBlur(1.0)) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    third = pseudo_video(images, 3, GaussianBlur(1.0))
    torch.manual_seed(5)
    assert torch.equal(third, pseudo_video(images, 3, GaussianBlur(1.0)))


def test_each_order_follows_its_rule():
    """Drawn step by step, with the same draws."""
    x, tau, blur = torch.rand(3, 2, 5, 5, dtype=torch.float64), 0.3, GaussianBlur([0.0, 0.5, 1.0, 2.0])

    def noise(generator):
        return tau * torch.randn(x.shape, generator=generator).double()

    g = seeded()
    chain = [x]
    for i in range(1, 4):
        chain.append(blur(chain[-1], i, i - 1) + noise(g))
    g = seeded()
    star = [x, *[blur(x, i) + noise(g) for i in range(1, 4)]]
    g = seeded()
    average = [x]
    for i in range(1, 4):
        average.append(blur(torch.stack(average).mean(0), i, i - 1) + noise(g))
    g = seeded()
    matched = [x]
    for i in range(1, 4):
        frame = x
        for j in range(1, i + 1):
            frame = blur(frame, j, j - 1) + noise(g)
        matched.append(frame)
    for order, frames in zip(ORDERS, (chain, star, average, matched), strict=True):
        found = pseudo_video(x, 4, blur, order, tau, seeded())
        torch.testing.assert_close(found, torch.stack(frames[::-1], 1), rtol=0, atol=1e-12)


def test_a_callable_sees_the_later_frames_in_order():
    images, seen = torch.rand(2, 1, 3, 3), []

    def order(later, image, distance, generator):
        assert len(later) == distance and torch.equal(later[-1], image) and torch.equal(image, images)
        seen.append((distance, later[0].mean().item() / image.mean().item(), generator))
        return 0.5 * later[0]

    generator = seeded()
    video = pseudo_video(images, 4, None, order, generator=generator)
    assert [(i, round(ratio, 5), g) for i, ratio, g in seen] == [
        (1, 1.0, generator),
        (2, 0.5, generator),
        (3, 0.25, generator),
    ]
    torch.testing.assert_close(video[:, 0], images / 8)


def test_no_blur_and_no_noise_give_copies():
    images = torch.rand(2, 1, 3, 3)
    for order in ORDERS:
        video = pseudo_video(images, 4, GaussianBlur(0.0), order, noise=0.0)
        assert all(torch.equal(frame, images) for frame in video.unbind(1))


def test_diffusion_frames_keep_unit_variance():
    images = torch.randn(2, 1, 100, 100, generator=seeded())
    for order in ("markov", "star", "matched"):
        video = pseudo_video(images, 6, GaussianNoise(0.3), order, noise=0.0, generator=seeded(1))
        assert (video.var((0, 2, 3, 4)) - 1).abs().max() < 0.05


@pytest.mark.parametrize("corruption", [GaussianBlur(0.8), Mask(0.3)], ids=["linear", "mask"])
def test_matched_frames_are_distributed_as_the_chains_but_independent(corruption):
    image = torch.rand(1, 1, 2, 2, dtype=torch.float64, generator=seeded())
    images = image.expand(20_000, -1, -1, -1)
    chain, matched = (
        pseudo_video(images, 4, corruption, order, 0.3, seeded(1))[:, :-1].flatten(2) for order in ("markov", "matched")
    )
    torch.testing.assert_close(matched.mean(0), chain.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(matched.var(0), chain.var(0), rtol=0, atol=0.03)
    across = [torch.corrcoef(torch.stack([video[:, 0, 0], video[:, 1, 0]]))[0, 1].item() for video in (chain, matched)]
    assert across[0] > 0.3 and abs(across[1]) < 0.03


def test_bytes_are_scaled_once(dtype):
    torch.set_default_dtype(dtype)
    images = torch.from_numpy(datasets.load_images().x_test[:4].numpy()).unsqueeze(1)
    video = pseudo_video(images, 3, GaussianBlur(1.0), "markov", 0.0)
    assert video.dtype == dtype and torch.equal(video[:, -1], images.to(dtype) / 255)
    assert video.min() >= 0 and 0.9 < video[:, -1].max() <= 1
    assert torch.equal(as_images("images", images), video[:, -1])


def test_gradients_reach_the_images():
    images = torch.rand(2, 1, 4, 4, requires_grad=True)
    pseudo_video(images, 3, GaussianBlur(1.0), "average").square().sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and (images.grad != 0).any()


class Smaller(Corruption):
    """Really makes images smaller, which frames may not be."""

    def __call__(self, images, distance, start=0, generator=None):
        """Half of the pixels."""
        return images[..., ::2, ::2]


IMAGES = torch.rand(2, 3, 4, 4)
BLUR = GaussianBlur(1.0)


def spoilt(value: float) -> torch.Tensor:
    """Images with one bad pixel."""
    images = IMAGES.clone()
    images[1, 2, 3, 0] = value
    return images


BAD = {
    "an image alone": (lambda: pseudo_video(IMAGES[0], 3, BLUR), ValueError, r"images: expected shape \(n, C, H, W\)"),
    "no pixels": (lambda: pseudo_video(torch.rand(2, 1, 0, 4), 3, BLUR), ValueError, "none of C, H, W zero"),
    "a list": (lambda: pseudo_video([IMAGES[0]], 3, BLUR), TypeError, "images: expected a tensor .* got list"),
    "images of two sizes": (
        lambda: pseudo_video([torch.rand(1, 4, 4), torch.rand(1, 5, 4)], 3, BLUR),
        ValueError,
        r"images: expected images of one size, got \(1, 4, 4\), \(1, 5, 4\)",
    ),
    "long integers": (lambda: pseudo_video(torch.ones(1, 1, 2, 2).long(), 3, BLUR), TypeError, "or of bytes.*int64"),
    "NaN": (lambda: pseudo_video(spoilt(math.nan), 3, BLUR), ValueError, "images: expected finite pixels, got 1 that"),
    "infinity": (lambda: pseudo_video(spoilt(-math.inf), 3, BLUR), ValueError, "images: expected finite pixels"),
    "no frames": (lambda: pseudo_video(IMAGES, 0, BLUR), ValueError, "num_frames: expected at least 1"),
    "half a frame": (lambda: pseudo_video(IMAGES, 2.5, BLUR), TypeError, "num_frames: expected an integer"),
    "a function": (lambda: pseudo_video(IMAGES, 3, torch.relu), TypeError, "corruption: expected a Corruption"),
    "no corruption": (lambda: pseudo_video(IMAGES, 3, None), TypeError, "corruption: expected a Corruption"),
    "another order": (lambda: pseudo_video(IMAGES, 3, BLUR, "moon"), ValueError, "order: expected one of markov, star"),
    "negative noise": (
        lambda: pseudo_video(IMAGES, 3, BLUR, noise=-0.1),
        ValueError,
        "noise: expected a finite number",
    ),
    "infinite noise": (lambda: pseudo_video(IMAGES, 3, BLUR, noise=math.inf), ValueError, "noise: expected a finite"),
    "another layout": (
        lambda: pseudo_video(IMAGES, 3, BLUR, layout="thwc"),
        ValueError,
        "layout: expected one of tchw",
    ),
    "a schedule of another length": (
        lambda: pseudo_video(IMAGES, 4, GaussianBlur([0.0, 1.0, 2.0])),
        ValueError,
        "sigmas: expected one number for each of 4 frames, got 3",
    ),
    "masks that leave nothing": (
        lambda: pseudo_video(IMAGES, 3, Mask([0.0, 0.5, 0.99])),
        ValueError,
        "rates: expected masks that leave a pixel",
    ),
    "smaller frames": (
        lambda: pseudo_video(IMAGES, 3, Smaller()),
        ValueError,
        r"frames: expected all of one size, shape \(2, 3, 4, 4\), got shape \(2, 3, 2, 2\) at distance 1",
    ),
    "smaller frames of a callable": (
        lambda: pseudo_video(IMAGES, 3, None, lambda later, image, i, g: image[..., :i, :]),
        ValueError,
        "frames: expected all of one size",
    ),
    "no frames of a callable": (
        lambda: pseudo_video(IMAGES, 3, None, lambda later, image, i, g: None),
        ValueError,
        "frames: .* got NoneType at distance 1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_error_draws_nothing():
    generator = seeded()
    state = generator.get_state()
    with pytest.raises(ValueError, match="finite pixels"):
        pseudo_video(spoilt(math.nan), 3, BLUR, generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.cuda
@orders
def test_the_gpu_makes_the_same_videos(order):
    images, corruption = torch.rand(2, 3, 6, 6), Compose([GaussianBlur(0.5), Mask(0.2), GaussianNoise(0.1)])
    found = pseudo_video(images.cuda(), 4, corruption, order, 0.1, seeded())
    assert found.is_cuda and torch.equal(found[:, -1].cpu(), images)
    torch.testing.assert_close(
        found.cpu(), pseudo_video(images, 4, corruption, order, 0.1, seeded()), rtol=0, atol=1e-5
    )
