"""Videos as tokens: patches, causality, one frame as the image model, its twin, training, and bad input."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.generative.quantiser import codebook_use
from gpseq.generative.video_vq import VideoVQ, from_patches, to_patches
from tests.oracles_generative_tokens import SHAPE, image_autoencoder, patches_by_hand, tiny_vq, videos


@given(st.tuples(*[st.integers(1, 3)] * 5), st.lists(st.integers(1, 3), max_size=2))
def test_patches(sizes, batch):
    channels, rows, columns, h, w = sizes
    shape = (channels, rows * h, columns * w)
    frames = torch.randn(*batch, *shape)
    patches = to_patches(frames, (h, w))
    assert patches.shape == (*batch, rows * columns, channels * h * w)
    assert from_patches(patches, (h, w), shape).equal(frames)
    first = (0,) * len(batch)
    assert patches[first].equal(patches_by_hand(frames[first], h, w))


@pytest.mark.parametrize("patch_size", [4, (2, 4)], ids=str)
@pytest.mark.parametrize(("frames", "temporal_patch"), [(1, 1), (1, 3), (4, 1), (4, 3), (5, 2)])
def test_shapes(dtype, frames, temporal_patch, patch_size):
    model = tiny_vq(dtype, num_frames=frames, temporal_patch=temporal_patch, patch_size=patch_size)
    video = videos(5, frames, dtype)
    loss = model(video)
    assert loss.dtype == dtype
    assert loss.isfinite()
    tokens = model.encode(video)
    assert tokens.shape == (5, *model.token_shape)
    assert tokens.dtype == torch.int64
    decoded = model.decode(tokens)
    assert decoded.shape == video.shape
    assert model.encode(decoded).shape == tokens.shape


@pytest.mark.parametrize("temporal_patch", [1, 2])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_later_frames_change_nothing_before_them(temporal_patch, mode):
    model = tiny_vq(num_frames=5, temporal_patch=temporal_patch)
    model.initialise_codebook(videos(9, 5))
    model.train(mode)
    video = videos(4, 5)
    tokens = model.encode(video)
    for time in range(1, model.token_shape[0]):
        frames = 1 + (time - 1) * temporal_patch  # those of earlier times
        other = torch.cat([video[:, :frames], videos(4, 5 - frames)], 1)
        changed = model.encode(other)
        assert changed[:, :time].equal(tokens[:, :time])
        assert not changed[:, time:].equal(tokens[:, time:])
        assert model.encode(video[:, :frames]).equal(tokens[:, :time])
        decoded = model.decode(tokens)
        torch.testing.assert_close(model.decode(changed)[:, :frames], decoded[:, :frames])
        torch.testing.assert_close(model.decode(tokens[:, :time]), decoded[:, :frames])


def test_earlier_frames_reach_later_ones():
    model = tiny_vq()
    video = videos().requires_grad_()
    model._encodings(video)[:, 3, 0].sum().backward()
    assert (video.grad.abs().amax((0, 2, 3, 4)) > 0).all()
    model.zero_grad()
    codes = torch.randn(2, *model.token_shape, 4, dtype=torch.float64, requires_grad=True)
    model._decoded(codes)[:, 3].sum().backward()
    assert (codes.grad.abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("temporal_depth", [0, 1, 2])
def test_one_frame_is_the_image_model(dtype, temporal_depth):
    model = tiny_vq(dtype, num_frames=1, temporal_depth=temporal_depth).eval()
    images = videos(6, 1, dtype)[:, 0]
    model.quantiser.initialise(model._encodings(images[:, None]))
    tokens, decoded = image_autoencoder(model, images)
    assert model.encode(images[:, None])[:, 0].equal(tokens)
    torch.testing.assert_close(model.decode(tokens[:, None])[:, 0], decoded)
    terms = model.terms(images[:, None])
    torch.testing.assert_close(terms.reconstruction, (decoded - images).square().mean())
    distance = (model._encodings(images[:, None])[:, 0] - model.quantiser.codes[tokens]).square().mean()
    torch.testing.assert_close(terms.loss, terms.reconstruction + 0.25 * distance)


def test_a_video_model_with_one_frame_is_the_image_model():
    video, image = tiny_vq().eval(), tiny_vq(num_frames=1).eval()
    state = video.state_dict()
    for name in ("encoder_places", "decoder_places"):
        state[name] = state[name][:1]
    image.load_state_dict(state)
    x = videos(6, 1)
    assert video.encode(x).equal(image.encode(x))
    torch.testing.assert_close(video.terms(x).loss, image.terms(x).loss)


def test_the_twin_has_the_same_tokens_and_layers():
    model = VideoVQ((1, 8, 8), num_frames=4, dim=64, num_codes=32, dtype=torch.float64)
    twin = model.image_twin()
    assert (twin.num_frames, twin.patch_size, twin.token_shape) == (1, (2, 2), (1, 16))
    assert math.prod(twin.token_shape) == math.prod(model.token_shape)

    def shapes(made):
        return {
            name: value.numel() for name, value in made.state_dict().items() if not name.startswith(("embed.", "head."))
        }

    assert shapes(twin) == shapes(model)
    counts = [sum(value.numel() for value in made.parameters()) for made in (model, twin)]
    assert 0 <= counts[0] - counts[1] < 0.01 * counts[0]
    assert twin.head.weight.dtype == torch.float64
    assert twin(torch.rand(4, 1, 1, 8, 8)).isfinite()


def test_twins_of_other_sizes():
    made = {"dim": 8, "num_heads": 2, "temporal_patch": 2}
    assert VideoVQ((3, 8, 16), num_frames=3, patch_size=(4, 8), **made).image_twin().patch_size == (4, 4)
    assert VideoVQ((1, 8, 8), num_frames=15, patch_size=4, **made).image_twin().patch_size in {(1, 2), (2, 1)}
    with pytest.raises(
        ValueError, match=r"patch_size: expected patches that can be cut into 3 equal ones, got \(4, 4\)"
    ):
        VideoVQ((1, 8, 8), num_frames=5, patch_size=4, **made).image_twin()


def test_gradients_reach_every_parameter():
    for codebook in ("ema", "gradient"):
        model = tiny_vq(codebook=codebook, num_frames=5, temporal_patch=2)
        model(videos(6, 5)).backward()
        for name, value in model.named_parameters():
            assert value.grad is not None and value.grad.ne(0).any(), name


def bars(number, generator):
    """8x8 images whose left and right half are bright or dark, and fainter frames before them."""
    halves = torch.randint(2, (number, 1, 1, 1, 2), generator=generator).float()
    image = (2 * halves - 1).repeat_interleave(4, -1).expand(-1, -1, -1, 8, -1)
    return torch.cat([0.5 * image, image], 1)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_training_on_small_images(codebook):
    sizes = {"dim": 16, "num_heads": 2, "spatial_depth": 1, "temporal_depth": 1, "num_codes": 8, "code_dim": 4}
    model = VideoVQ(SHAPE, 2, codebook=codebook, decay=0.8, **sizes)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = model(bars(16, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    terms = model.eval().terms(bars(64, generator))
    assert terms.reconstruction < 0.1  # .625 is the variance of a pixel
    assert 4 <= codebook_use(terms.tokens, 8).used


def test_generators_and_state():
    first = tiny_vq()
    second = copy.deepcopy(first)
    for made in (first, second):
        generator = torch.Generator().manual_seed(3)
        for number in range(3):
            made(torch.rand(6, 4, *SHAPE, generator=torch.Generator().manual_seed(number)), generator)
    assert first.quantiser.codes.equal(second.quantiser.codes)
    assert "quantiser.codes" in first.state_dict()
    third = tiny_vq()
    third.load_state_dict(first.state_dict())
    video = videos(6)
    assert third.encode(video).equal(first.encode(video))
    assert third.quantiser.is_initialised


def test_encoding_learns_nothing():
    model = tiny_vq()
    before = copy.deepcopy(model.state_dict())
    model.encode(videos(6))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_videos_are_cast():
    model = tiny_vq(torch.float32)
    video = videos(6)
    assert model(video).dtype == torch.float32
    assert model.encode(video).equal(model.encode(video.float()))


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (torch.rand(3, 4, 1, 8, 6), ValueError, r"video: expected shape \(B, 4, 1, 8, 8\)"),
        (torch.rand(3, 4, 2, 8, 8), ValueError, "video: expected shape"),
        (torch.rand(3, 5, 1, 8, 8), ValueError, "video: expected shape"),
        (torch.rand(3, 0, 1, 8, 8), ValueError, "video: expected shape"),
        (torch.rand(3, 1, 8, 8), ValueError, "video: expected shape"),
        (torch.rand(0, 4, 1, 8, 8), ValueError, "video: expected"),
        (torch.zeros(3, 4, 1, 8, 8, dtype=torch.uint8), TypeError, "video: expected a floating-point tensor"),
        ([torch.rand(1, 8, 8), torch.rand(1, 4, 4)], TypeError, "video"),
        (torch.full((3, 4, 1, 8, 8), math.nan), ValueError, "video: expected finite pixels"),
        (torch.full((3, 4, 1, 8, 8), math.inf), ValueError, "video: expected finite pixels"),
    ],
    ids=["width", "channels", "frames", "no frame", "image", "none", "bytes", "list", "nan", "inf"],
)
def test_bad_videos_change_nothing(video, error, message):
    model = tiny_vq()
    before = copy.deepcopy(model.state_dict())
    for call in (model, model.encode, model.initialise_codebook):
        with pytest.raises(error, match=message):
            call(video)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_frames_that_make_no_whole_time():
    model = tiny_vq(num_frames=5, temporal_patch=2)
    with pytest.raises(ValueError, match="video: expected shape"):
        model(videos(3, 4))
    with pytest.raises(ValueError, match="num_frames: expected 1 \\+ k temporal_patch frames, got 4"):
        tiny_vq(num_frames=4, temporal_patch=2)


def test_a_codebook_larger_than_the_data():
    model = tiny_vq(num_codes=100)
    with pytest.raises(ValueError, match="num_codes: the codebook of 100 codes is larger than the data"):
        model(videos(3))
    model.initialise_codebook(videos(10))
    assert model(videos(3)).isfinite()


def test_bad_tokens():
    model = tiny_vq()
    for bad, message in [
        (torch.full((2, 4, 4), 16), "tokens: expected integers from 0 to 15, got 16 to 16"),
        (torch.full((2, 4, 4), -1), "tokens: expected integers"),
        (torch.zeros(2, 4, 5, dtype=torch.int64), r"tokens: expected shape \(B, 4, 4\), got \(2, 4, 5\)"),
        (torch.zeros(2, 5, 4, dtype=torch.int64), "tokens: expected shape"),
        (torch.zeros(2, 16, dtype=torch.int64), "tokens: expected shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.decode(bad)
    with pytest.raises(TypeError, match="tokens: expected a tensor of integers"):
        model.decode(torch.zeros(2, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, r"patch_size: expected divisors of H, W = \(8, 8\), got \(3, 3\)"),
        ({"patch_size": (4, 4, 4)}, "patch_size: expected a number or"),
        ({"num_heads": 3}, "num_heads: expected a divisor of dim = 8"),
        ({"num_frames": 0}, "num_frames"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"spatial_depth": -1}, "spatial_depth"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_vq(**options)
