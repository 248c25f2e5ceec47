"""Data sets of pseudo-videos: the same for any number of workers, fresh in each epoch."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gpseq.generative.corruptions import Compose, GaussianBlur, Mask
from gpseq.generative.frames import ORDERS, pseudo_video
from gpseq.generative.pseudo_video_dataset import PseudoVideo

IMAGES = torch.rand(9, 2, 5, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9)
RECIPE = Compose([GaussianBlur(0.7), Mask(0.2)])


class Listed(Dataset):
    """A data set of what is in a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def videos(**options) -> PseudoVideo:
    """Of labelled images."""
    return PseudoVideo(TensorDataset(IMAGES, LABELS), **{"num_frames": 4, "corruption": RECIPE} | options)


def loaded(dataset, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """All batches of one epoch."""
    batches = list(DataLoader(dataset, batch_size=4, **options))
    return torch.cat([video for video, _ in batches]), torch.cat([label for _, label in batches])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", ["tchw", "cthw"])
def test_items_are_videos_that_end_with_the_image(order, layout, dtype):
    dataset = PseudoVideo(TensorDataset(IMAGES.to(dtype)), 4, RECIPE, order, layout=layout)
    assert len(dataset) == 9
    for i in range(9):
        (video,) = dataset[i]
        assert video.shape == ((4, 2, 5, 5) if layout == "tchw" else (2, 4, 5, 5)) and video.dtype == dtype
        frames = video if layout == "tchw" else video.transpose(0, 1)
        assert torch.equal(frames[-1], IMAGES[i].to(dtype))
        assert torch.equal(dataset[i][0], video)


def test_workers_make_the_same_videos():
    dataset = videos(seed=3).set_epoch(5)
    alone, labels = loaded(dataset)
    together, same = loaded(dataset, num_workers=2)
    assert torch.equal(alone, together) and torch.equal(labels, same) and torch.equal(labels, LABELS)


def test_workers_that_outlive_an_epoch_see_the_next():
    dataset = videos()
    loader = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    first = torch.cat([video for video, _ in loader])
    dataset.set_epoch(1)
    second = torch.cat([video for video, _ in loader])
    assert torch.equal(second, loaded(dataset)[0]) and not torch.equal(first, second)


def test_noise_depends_on_seed_epoch_and_index_alone():
    dataset = videos()
    first = loaded(dataset)[0]
    torch.manual_seed(123)
    assert dataset.epoch == 0 and torch.equal(first, loaded(videos())[0])
    backwards = torch.stack([dataset[i][0] for i in reversed(range(9))]).flip(0)
    assert torch.equal(first, backwards)
    assert torch.equal(dataset[-1][0], first[8]) and torch.equal(dataset[torch.tensor(3)][0], first[3])
    others = [loaded(videos(seed=1))[0], loaded(videos(seed=-1))[0], loaded(dataset.set_epoch(1))[0]]
    for other in others:
        assert torch.equal(other[:, -1], first[:, -1])
        # Each video of each of them is another one.
        assert all(not torch.equal(a[:-1], b[:-1]) for a, b in zip(other, first, strict=True))
    assert torch.equal(loaded(dataset.set_epoch(0))[0], first)


def test_noise_of_one_image_differs_from_that_of_the_next():
    same = PseudoVideo(Listed([torch.zeros(1, 3, 3)] * 3), 3, GaussianBlur(1.0))
    assert not torch.equal(same[0], same[1]) and not torch.equal(same[1], same[2])


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    videos()[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_comes_with_an_image_passes_through():
    items = [(image, label, "name") for image, label in zip(IMAGES, LABELS, strict=True)]
    video, label, name = PseudoVideo(Listed(items), 3, RECIPE)[2]
    assert video.shape == (3, 2, 5, 5) and label == 2 and name == "name"
    alone = PseudoVideo(Listed(list(IMAGES)), 3, RECIPE)[2]
    assert torch.equal(alone, video)
    assert len(list(PseudoVideo(Listed(list(IMAGES)), 3, RECIPE))) == 9


def test_bytes_are_scaled_once():
    image = torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8)
    video = PseudoVideo(Listed([image]), 2, GaussianBlur(0.0), noise=0.0)[0]
    expected = image.to(torch.float32) / 255
    assert torch.equal(video[0], expected) and torch.equal(video[1], expected)


def test_one_frame_is_the_image():
    video, _ = videos(num_frames=1)[0]
    assert torch.equal(video, IMAGES[:1])


def test_it_equals_the_function():
    """A callable order lends its generator, from which the function makes the same video."""
    states = []

    def order(later, image, distance, generator):
        states.append(generator.get_state())
        return later[0] + torch.randn(image.shape, generator=generator)

    video = PseudoVideo(Listed(list(IMAGES)), 3, None, order)[4]
    generator = torch.Generator()
    generator.set_state(states[0])
    assert torch.equal(video, pseudo_video(IMAGES[4:5], 3, None, order, generator=generator)[0])


def test_it_can_be_pickled():
    dataset = videos(seed=2).set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.epoch == 3 and torch.equal(copy[1][0], dataset[1][0])


class Endless(Dataset):
    """Items without a number of them."""

    def __getitem__(self, index):
        return IMAGES[0]


MIXED = PseudoVideo(Listed([torch.rand(1, 4, 4), torch.rand(1, 4, 5), torch.full((1, 4, 4), torch.nan)]), 3, RECIPE)
BAD = {
    "no length": (lambda: PseudoVideo(Endless(), 3, RECIPE), TypeError, "dataset: expected one with a length"),
    "no images": (lambda: PseudoVideo(Listed([]), 3, RECIPE), ValueError, "dataset: expected at least one image"),
    "words": (lambda: PseudoVideo(Listed(["a"]), 3, RECIPE), TypeError, "dataset: .* got str at index 0"),
    "flat images": (lambda: PseudoVideo(Listed([torch.rand(4)]), 3, RECIPE), ValueError, "dataset, index 0: expected"),
    "a seed of 0.5": (lambda: videos(seed=0.5), TypeError, "seed: expected an integer"),
    "another order": (lambda: videos(order="moon"), ValueError, "order: expected one of"),
    "another schedule": (lambda: videos(corruption=GaussianBlur([0.0])), ValueError, "sigmas: .* 4 frames, got 1"),
    "masks that leave nothing": (lambda: videos(corruption=Mask(0.9)), ValueError, "masks that leave a pixel"),
    "a negative epoch": (lambda: videos().set_epoch(-1), ValueError, "epoch: expected at least 0"),
    "half an epoch": (lambda: videos().set_epoch(0.5), TypeError, "epoch: expected an integer"),
    "beyond the end": (lambda: videos()[9], IndexError, "index: expected less than 9, got 9"),
    "another size": (lambda: MIXED[1], ValueError, r"images of one size, \(1, 4, 4\) as the first, got \(1, 4, 5\) at"),
    "NaN": (lambda: MIXED[2], ValueError, "dataset, index 2: expected finite pixels, got 16"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
