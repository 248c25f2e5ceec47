"""Which pixels of the space-time U-Net see which, and its shapes."""

import pytest
import torch
from torch import Tensor, nn

from gpseq.generative import unet
from gpseq.generative.unet import Attention, SpaceTimeUNet


def stirred(network: nn.Module) -> nn.Module:
    """The same with parameters that are not at zero any more."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def changes(network: nn.Module, where: tuple[int, ...]) -> Tensor:
    """Which numbers of the answer move with one number of the video, over batch, frames and pixels."""
    video, time = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.2, 0.9], dtype=torch.float64)
    other = video.clone()
    other[where] += 1.0
    with torch.no_grad():
        moved = (network(video, time) - network(other, time)).abs() > 1e-12
    return moved.any(2)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 10), (2, 28, 28)], ids=str)
@pytest.mark.parametrize("num_frames", [1, 3])
def test_shapes(shape: tuple[int, int, int], num_frames: int, dtype: torch.dtype) -> None:
    network = SpaceTimeUNet(shape, num_frames, channels=(4, 8, 8), num_blocks=2, out_channels=5, dtype=dtype)
    answer = network(torch.randn(2, num_frames, *shape, dtype=dtype), torch.rand(2, dtype=dtype))
    assert answer.shape == (2, num_frames, 5, *shape[1:]) and answer.dtype == dtype and not answer.any()


def test_attention_along_time_is_the_only_way_from_frame_to_frame() -> None:
    network = stirred(SpaceTimeUNet((1, 8, 8), 3, channels=(8, 16), dtype=torch.float64))
    seen = changes(network, (0, 1, 0, 4, 4))
    assert seen[0].all() and not seen[1].any()
    for part in network.modules():
        if isinstance(part, unet.SpaceTimeBlock):
            for parameter in part.time.leave.parameters():
                nn.init.zeros_(parameter)
    seen = changes(network, (0, 1, 0, 4, 4))
    assert seen[0, 1].all() and not seen[0, [0, 2]].any()


def test_without_attention_within_frames_time_stays_at_its_site() -> None:
    """One level of two convolutions: three of 3 x 3 pixels with the first and the last one."""
    network = stirred(SpaceTimeUNet((1, 8, 8), 3, channels=(8,), attention_side=0, dtype=torch.float64))
    for part in network.modules():  # norms see a whole frame
        if isinstance(part, nn.GroupNorm):
            part.forward = lambda x: x
    seen = changes(network, (0, 1, 0, 0, 0))[0]
    assert seen[:, 0, 0].all() and seen[0, 2, 2]


def test_the_step_and_the_frame_count() -> None:
    network = stirred(SpaceTimeUNet((1, 8, 8), 3, channels=(8, 16)))
    video = torch.randn(1, 1, 1, 8, 8).expand(2, 3, -1, -1, -1)  # all frames are equal
    answer = network(video, torch.tensor([0.3, 0.6]))
    assert not torch.allclose(answer[0], answer[1], atol=1e-3)
    assert not torch.allclose(answer[:, 0], answer[:, 1], atol=1e-3)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_attention_by_loops(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long sequences take different ways to the same numbers."""
    layer = stirred(Attention(6, 2, dtype=torch.float64))
    tokens = torch.randn(3, length, 6, dtype=torch.float64)
    query, key, value = layer.enter(layer.norm(tokens)).chunk(3, -1)
    mixed = torch.zeros_like(tokens)
    for head in (slice(0, 3), slice(3, 6)):
        weights = torch.softmax(query[..., head] @ key[..., head].mT / 3**0.5, -1)
        mixed[..., head] = weights @ value[..., head]
    expected = tokens + layer.leave(mixed)
    torch.testing.assert_close(layer(tokens), expected)
    monkeypatch.setattr(unet, "SHORT", 0)
    torch.testing.assert_close(layer(tokens), expected)


def test_every_parameter_learns_and_memory_formats_do_not_matter() -> None:
    network = stirred(SpaceTimeUNet((1, 8, 8), 2, channels=(8, 16), num_blocks=2))
    video, time = torch.randn(2, 2, 1, 8, 8), torch.rand(2)
    answer = network(video, time)
    answer.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(video, time), answer, atol=1e-4, rtol=1e-3)


BAD = {
    "shape": ({"image_shape": (8, 8)}, TypeError, "image_shape"),
    "frames": ({"num_frames": 0}, ValueError, "num_frames: expected at least 1"),
    "heads": ({"channels": (8, 10)}, ValueError, "channels: expected multiples of num_heads = 4"),
    "levels": ({"channels": (8,) * 5}, ValueError, "channels: expected at most 4 levels for images of 8 x 8, got 5"),
    "number": ({"channels": 8}, TypeError, "channels: expected a number for each level"),
    "blocks": ({"num_blocks": 0}, ValueError, "num_blocks"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout: expected a number from 0"),
    "side": ({"attention_side": -1}, ValueError, "attention_side"),
    "answer": ({"out_channels": 0}, ValueError, "out_channels"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        SpaceTimeUNet(**{"image_shape": (1, 8, 8), "num_frames": 2, **options})
