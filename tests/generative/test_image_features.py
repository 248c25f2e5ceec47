"""Features of a small classifier: shapes, learning, and what is refused."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gpseq.generative import ImageFeatures
from gpseq.metrics import frechet


def stripes(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes with a bright row, or a bright column."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    images = torch.randint(60, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, 4] = 255
    images[labels == 1, :, :, 4] = 255
    return images, labels


def network(**options: object) -> ImageFeatures:
    torch.manual_seed(0)
    return ImageFeatures(2, (1, 8, 8), num_features=6, width=4, **options)  # type: ignore[arg-type]


def test_it_learns_and_reports() -> None:
    model, (images, labels) = network(), stripes(200)
    history = model.fit(images, labels, epochs=4, batch_size=20, learning_rate=1e-2)
    assert [epoch.steps for epoch in history.epochs] == [10] * 4 and not model.training
    test, truth = stripes(100, seed=1)
    assert (model.logits(test).argmax(-1) == truth).float().mean() > 0.95


def test_features_are_what_the_answer_is_made_of(dtype: torch.dtype) -> None:
    model, (images, _) = network(dtype=dtype), stripes(5)
    features = model(images)
    assert features.shape == (5, 6) and features.dtype == dtype
    torch.testing.assert_close(model.logits(images), functional.linear(features, model.head.weight, model.head.bias))


def test_bytes_are_divided_once() -> None:
    model, (images, labels) = network(), stripes(30)
    torch.testing.assert_close(model(images), model(images.float() / 255))
    torch.testing.assert_close(model(images), model(images.double() / 255))
    other = network()
    model.fit(images, labels, 1, 10, generator=torch.Generator().manual_seed(1))
    other.fit(images.float() / 255, labels.int(), 1, 10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(images), other(images))


def test_the_order_comes_from_the_generator() -> None:
    images, labels = stripes(30)
    found = []
    for seed in (0, 0, 1):
        model = network()
        state = torch.get_rng_state()
        model.fit(images, labels, 2, 7, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(state, torch.get_rng_state())
        found.append(model.head.weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_every_image_comes_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = network(), stripes(23)
    seen: list[Tensor] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda batch: (seen.append(batch), logits(batch))[1])
    model.fit(images, labels, epochs=2, batch_size=10)
    assert [len(batch) for batch in seen] == [10, 10, 3] * 2
    for epoch in (seen[:3], seen[3:]):
        assert sorted(map(str, torch.cat(epoch).flatten(1).tolist())) == sorted(map(str, images.flatten(1).tolist()))


def test_it_is_a_feature_function() -> None:
    model, (images, _) = network(), stripes(40)
    assert frechet(model, images, images) < 1e-6 < frechet(model, images, 255 - images)
    state = model.state_dict()
    other = ImageFeatures(2, (1, 8, 8), num_features=6, width=4)
    other.load_state_dict(state)
    assert torch.equal(model(images), other(images))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes: expected at least 2"),
        ({"num_classes": 2.0}, TypeError, "num_classes: expected an integer"),
        ({"image_shape": (8, 8)}, TypeError, "image_shape: expected three integers"),
        ({"image_shape": (1, 3, 8)}, ValueError, "image_shape: expected sides of at least 4"),
        ({"num_features": 0}, ValueError, "num_features: expected at least 1"),
        ({"width": 0}, ValueError, "width: expected at least 1"),
    ],
)
def test_bad_networks(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImageFeatures(**{"num_classes": 2, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(4, 8, 8)}, ValueError, "images: expected shape"),
        ({"images": torch.zeros(4, 1, 8, 9)}, ValueError, r"images: expected shape \(n, 1, 8, 8\)"),
        ({"images": torch.zeros(0, 1, 8, 8)}, ValueError, "images: expected shape .* n at least 1"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.int64)}, TypeError, "images: expected a tensor of floating"),
        ({"images": torch.full((4, 1, 8, 8), math.nan)}, ValueError, "images: expected finite pixels"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: expected a tensor of integers"),
        ({"labels": [0, 1, 0, 1]}, TypeError, "labels: expected a tensor of integers, got list"),
        ({"labels": torch.tensor([0, 1, 0])}, ValueError, r"labels: expected shape \(4,\)"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, ValueError, "labels: expected integers from 0 to 1, got 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, ValueError, "labels: expected integers from 0 to 1, got -1 to 1"),
        ({"epochs": 0}, ValueError, "epochs: expected at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: expected a positive number"),
    ],
)
def test_bad_training_changes_nothing(change: dict[str, object], error: type[Exception], message: str) -> None:
    model = network()
    before = model.head.weight.clone()
    given = {"images": torch.zeros(4, 1, 8, 8), "labels": torch.tensor([0, 1, 0, 1]), **change}
    with pytest.raises(error, match=message):
        model.fit(**given)  # type: ignore[arg-type]
    assert torch.equal(model.head.weight, before)
