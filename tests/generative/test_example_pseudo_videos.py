"""The controlled comparison of pseudo-videos: what models are shown, who is judged by what, what is kept, and words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pseudo_video import families, run, verdicts
from benchmarks.pseudo_video.families import ORDERS, Fitted, PatchUNet
from benchmarks.pseudo_video.pictures import pack, unpack
from benchmarks.pseudo_video.settings import SIZES
from examples.generative.frames import COPIES, HVAES, IMAGE, Recipe, Training, judge, train
from gpseq.datasets import load_images
from gpseq.generative import ImageFeatures, SpaceTimeUNet

RECIPE = Recipe(num_frames=4, width=2.0, noise=0.1)


def some(n: int = 3) -> Tensor:
    return torch.randint(256, (n, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_what_models_are_shown() -> None:
    images = some()
    truth = images / 255
    assert torch.equal(RECIPE.video(images, IMAGE), truth.unsqueeze(1))
    assert torch.equal(RECIPE.video(images, COPIES), truth.unsqueeze(1).expand(-1, 4, -1, -1, -1))
    for order in ("markov", "matched", "star"):
        generator = torch.Generator().manual_seed(1)
        first, second = (RECIPE.video(images, order, generator) for _ in range(2))
        assert torch.equal(first[:, -1], truth) and first.shape == (3, 4, 1, 28, 28)
        assert all(not torch.equal(first[:, t], second[:, t]) for t in range(3)), "noise is fresh at each step"
    assert RECIPE.corruption.width(3) == pytest.approx(2.0)


def test_training_sees_fresh_batches_and_is_reproducible() -> None:
    seen: list[Tensor] = []
    values = []
    for _ in range(2):
        weight = torch.nn.Parameter(torch.zeros(()))
        generator = torch.Generator().manual_seed(0)

        def loss(video: Tensor, weight: torch.nn.Parameter = weight) -> Tensor:
            seen.append(video)
            return (video - weight).square().mean()

        def video(batch: Tensor, generator: torch.Generator = generator) -> Tensor:
            return RECIPE.video(batch, "star", generator)

        values.append(train(loss, [weight], some(50), video, Training(5, 8), generator))
        assert weight.item() != 0
    assert values[0] == values[1] and len(seen) == 10
    assert torch.equal(seen[3], seen[8]) and not torch.equal(seen[3], seen[4])
    with pytest.raises(FloatingPointError, match="loss"):
        train(lambda video: weight / 0, [weight], some(), lambda batch: batch, Training(1, 2), generator)


def test_judges_keep_sets_apart() -> None:
    data = load_images("mnist")
    torch.manual_seed(0)
    network = ImageFeatures(10, width=2)
    judging = judge(network, data, reference=100, samples=60, held=40)
    with torch.no_grad():
        held = network(judging.held)
    assert torch.cdist(held, judging.reference).min() > 0, "what is reconstructed is not in the reference"
    assert judging.ranked.shape == (60, 32) and judging.real.shape == (60, 32) and judging.held.shape == (40, 1, 28, 28)
    assert judging.floor(50) == judging._compare(judging.real[:50])
    with pytest.raises(ValueError, match="data: expected at least 2001 test"):
        judge(network, data, 2000, 10, 1)


def test_families_have_their_controls() -> None:
    assert ORDERS["hvae"] == {name: arm.order for name, arm in HVAES.items()}
    for family, orders in ORDERS.items():
        assert {COPIES, "first order", "matched star", *families.TWINS[family]} <= set(orders)
        assert set(verdicts.CONTROLS[family]) <= set(orders)
        assert all(orders[twin] == IMAGE for twin in families.TWINS[family])
    told = {arm.supervise for name, arm in HVAES.items() if arm.order != IMAGE}
    assert told == {1.0} and {arm.supervise for arm in HVAES.values() if arm.order == IMAGE} == {0.0}
    for size in SIZES.values():
        changed = size.changed(7, autocast=True)
        assert {one.steps for one in changed.training.values()} == {7} and changed.training["vq"].autocast
        assert size.changed() == size


def test_a_patched_network_sees_sites() -> None:
    torch.manual_seed(0)
    video, time = torch.randn(2, 3, 1, 28, 28), torch.tensor([0.1, 0.9])
    network = PatchUNet(3, 4, channels=(4,))
    torch.nn.init.normal_(network.network.leave[-1].weight)
    changed = video.clone()
    changed[:, :, :, 4:8, 8:12] += 1  # one site
    moved = (network(changed, time) != network(video, time)).any(0)
    assert moved[:, :, 4:8, 8:12].all()
    torch.manual_seed(0)
    plain = SpaceTimeUNet((1, 28, 28), 3, channels=(4,), attention_side=0)
    whole = PatchUNet(3, 1, channels=(4,), attention_side=0)
    whole.network.load_state_dict(plain.state_dict())
    assert torch.equal(whole(video, time), plain(video, time))


def test_pictures_survive_json() -> None:
    images = torch.linspace(-0.5, 1.5, 2 * 28 * 28).view(2, 1, 28, 28)
    found = unpack(pack(images))
    assert found.shape == (2, 28, 28)
    torch.testing.assert_close(found, images[:, 0].clamp(0, 1), atol=0.5 / 15 + 1e-6, rtol=0)


def test_differences_in_words() -> None:
    assert verdicts.difference([1.0], [2.0]).word == "one seed, no verdict"
    assert verdicts.difference([10.0, 10.1, 9.9], [20.0, 20.1, 19.9]).word == "better"
    assert verdicts.difference([20.0, 20.1, 19.9], [10.0, 10.1, 9.9]).word == "worse"
    assert verdicts.difference([10.0, 15.0, 5.0], [11.0, 16.0, 6.0]).word == "no clear difference"
    # Equal variances and numbers: Welch's freedom is 4.
    gap = verdicts.difference([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert gap.mean == pytest.approx(-3.0) and gap.half == pytest.approx(2.776 * (2 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("shift", "words"),
    [(50.0, "better in 0, worse in 3"), (-50.0, "better in 3, worse in 0"), (0.0, "better in 0, worse in 0")],
)
def test_the_outcome_is_counted(shift: float, words: str) -> None:
    runs = {
        name: [{"frechet": 100.0 + seed + (shift if name in verdicts.TOLD else 0.0)} for seed in range(3)]
        for name in ORDERS["hvae"]
    }
    text = verdicts.outcome({"mnist": {"families": {"hvae": runs}}})
    assert words in text and ("no gain" in text.lower()) == (shift >= 0)
    assert ("cost quality" in text) == (shift > 0)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[str, int]] = []

    def fit(family: str, name: str, size: Any, images: Tensor, seed: int) -> Fitted:
        fitted.append((name, seed))

        def sample(n: int, last_only: bool, generator: torch.Generator) -> Tensor:
            return torch.rand(n, *([] if last_only else [4]), 1, 28, 28, generator=generator)

        return Fitted(sample, 10, None, 4, 1.0, 0.1)

    torch.manual_seed(0)
    network = ImageFeatures(10, width=2)
    monkeypatch.setattr(families, "fit", fit)
    monkeypatch.setattr(run, "_features", lambda *_: (network, 0.0))
    monkeypatch.setattr(run, "_information", lambda *_: {})

    def start(steps: int | None = None) -> Any:
        return run.experiment(SIZES["smoke"].changed(steps), 2, ["mnist"], ["diffusion"], folder=tmp_path)

    stopped = start()
    for _ in range(5):
        next(stopped)
    stopped.close()
    *_, result = start()
    expected = [(name, seed) for seed in range(2) for name in ORDERS["diffusion"]]
    assert fitted == expected, "nothing is trained twice"
    found = result["datasets"]["mnist"]["families"]["diffusion"]
    assert all(len(runs) == 2 and "images" in runs[0] and "images" not in runs[1] for runs in found.values())
    *_, _ = start(steps=9)
    assert len(fitted) == 16, "other settings are other results"
