"""The diffusion of videos with networks that are known to be right, its terms by hand, training and bad input."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from gpseq.generative.diffusion import VideoDiffusion, variational_term
from gpseq.generative.noise_schedule import NoiseSchedule

SHAPE = (1, 8, 8)


def small(num_frames: int = 2, **options) -> VideoDiffusion:
    """A model of some thousand parameters."""
    return VideoDiffusion(
        **{"num_frames": num_frames, "image_shape": SHAPE, "num_steps": 20, "channels": (8,)} | options
    )


def videos(n: int, num_frames: int) -> Tensor:
    """A bright half, left or right, that gets brighter from frame to frame."""
    side = torch.randint(2, (n, 1, 1, 1, 1)).float()
    left = (torch.arange(8) < 4).float()
    brightness = torch.linspace(0.5, 1.0, num_frames).view(1, -1, 1, 1, 1) if num_frames > 1 else 1.0
    return (brightness * (side * left + (1 - side) * (1 - left))).expand(n, num_frames, 1, 8, 8).contiguous()


class Known:
    """A network that is right about Gaussian data of a mean and a variance, independent between pixels."""

    def __init__(self, mean: Tensor, variance: float, num_steps: int) -> None:
        self.mean, self.variance = mean, variance
        self.left, self.num_steps = NoiseSchedule.cosine(num_steps).alpha_bar, num_steps

    def __call__(self, video: Tensor, time: Tensor) -> Tensor:
        """The expected noise."""
        k = (time.double() * self.num_steps).round().long()
        left = self.left[k - 1].view(-1, 1, 1, 1, 1).to(video.dtype)
        away = video - left.sqrt() * self.mean
        return (1 - left).sqrt() * away / (left * self.variance + 1 - left)


@pytest.mark.parametrize("num_steps", [None, 1, 7])
def test_a_network_that_knows_the_only_video_draws_it(num_steps: int | None, dtype: torch.dtype) -> None:
    video = torch.rand(1, 3, *SHAPE, dtype=dtype)
    network = Known(2 * video - 1, 0.0, 40)
    model = VideoDiffusion(3, SHAPE, num_steps=40, network=network, clip=None, dtype=dtype)
    found = model.sample(2, last_only=False, num_steps=num_steps)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, video.expand(2, -1, -1, -1, -1), atol=1e-2 if dtype == torch.float32 else 1e-9, rtol=0
    )


def variance_of_draws(schedule: NoiseSchedule, variance: float) -> float:
    """Of the last step, where the network knows Gaussian data: each step scales what it has and adds noise."""
    left, before, beta = schedule.alpha_bar, schedule.previous_alpha_bar, schedule.beta
    found = 1.0
    for i in reversed(range(len(beta))):
        clean = left[i].sqrt() * variance / (left[i] * variance + 1 - left[i])
        slope = before[i].sqrt() * beta[i] * clean + (1 - beta[i]).sqrt() * (1 - before[i])
        found = (slope / (1 - left[i])) ** 2 * found + schedule.posterior_variance[i]
    return found.item()


@pytest.mark.parametrize("num_steps", [None, 10])
def test_a_network_that_knows_a_gaussian_draws_from_it(num_steps: int | None) -> None:
    mean, variance = torch.full((1, 2, *SHAPE), 0.3, dtype=torch.float64), 0.25
    model = VideoDiffusion(
        2, SHAPE, 40, pixel_range=(-1.0, 1.0), network=Known(mean, variance, 40), clip=None, dtype=torch.float64
    )
    schedule = model.schedule if num_steps is None else model.schedule.strided(num_steps)
    found = model.sample(100, last_only=False, num_steps=num_steps)
    assert found.mean().item() == pytest.approx(0.3, abs=0.02)
    assert found.var().item() == pytest.approx(variance_of_draws(schedule, variance), rel=0.06)


def test_long_chains_have_the_right_variance() -> None:
    """Short ones lose some: their steps have the smallest of the possible variances."""
    found = [variance_of_draws(NoiseSchedule.cosine(steps), 0.25) for steps in (40, 200, 1000)]
    assert found[0] < found[1] < found[2] and found[2] == pytest.approx(0.25, rel=0.01)


def test_clean_pixels_stay_within_their_bounds() -> None:
    """A network that is always wrong, with a bound for each frame."""
    model = VideoDiffusion(2, SHAPE, 20, network=lambda video, time: -5 * video, clip=[2.0, 1.0])
    found = model.sample(4, last_only=False)
    assert (found[:, 0].max() <= 1.5 + 1e-6) and (found[:, 1].max() <= 1 + 1e-6) and found[:, 0].max() > 1.4
    unbounded = VideoDiffusion(2, SHAPE, 20, network=lambda video, time: -5 * video, clip=None)
    assert unbounded.sample(4).abs().max() > 100


def test_the_simple_term_by_hand(dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    def network(video: Tensor, time: Tensor) -> Tensor:
        seen.extend((video, time))
        return 0.5 * video

    model = VideoDiffusion(2, SHAPE, 20, network=network, pixel_range=(0.0, 2.0), dtype=dtype)
    video, k = torch.rand(3, 2, *SHAPE, dtype=dtype), torch.tensor([1, 10, 20])
    terms = model.terms(video, torch.Generator().manual_seed(0), k)
    noise = torch.randn(3, 2, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(0))
    left = NoiseSchedule.cosine(20).alpha_bar[k - 1].to(dtype).view(-1, 1, 1, 1, 1)
    noisy = left.sqrt() * (video - 1) + (1 - left).sqrt() * noise
    torch.testing.assert_close(seen[0], noisy)
    torch.testing.assert_close(seen[1], k.to(dtype) / 20)
    torch.testing.assert_close(terms.simple, (noise - 0.5 * noisy).square().mean((1, 2, 3, 4)))
    assert terms.variational is None and terms.loss == terms.simple.mean() and terms.simple.dtype == dtype


def test_the_variational_term_by_torchs_distributions() -> None:
    schedule, k = NoiseSchedule.cosine(10), torch.arange(1, 11)
    clean, noisy, mean, log_variance = torch.randn(4, 10, 3, 2, dtype=torch.float64)
    found = variational_term(schedule, clean, noisy, mean, log_variance, k)
    model = Normal(mean, (0.5 * log_variance).exp())
    variance = schedule.posterior_variance.clamp(min=1e-9).view(-1, 1, 1).expand_as(mean)
    true = Normal(schedule.posterior_mean(clean, noisy, k), variance.sqrt())
    expected = kl_divergence(true, model).mean((1, 2))
    expected[0] = -model.log_prob(clean)[0].mean()
    torch.testing.assert_close(found, expected)


def test_a_learnt_variance_leaves_the_mean_alone() -> None:
    """The noise is learnt from the squared error only, the variance from the variational term only."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.noise, self.variance = (torch.nn.Parameter(torch.full((), 0.1)) for _ in range(2))

        def forward(self, video: Tensor, time: Tensor) -> Tensor:
            return torch.cat([self.noise * video, self.variance * torch.ones_like(video)], 2)

    network = Two()
    model = VideoDiffusion(2, SHAPE, 20, learn_variance=True, network=network)
    terms = model.terms(torch.rand(8, 2, *SHAPE), k=torch.arange(1, 9))
    simple = torch.autograd.grad(terms.simple.mean(), network.parameters(), retain_graph=True, allow_unused=True)
    variational = torch.autograd.grad(terms.variational.mean(), network.parameters(), allow_unused=True)
    assert simple[0] != 0 and simple[1] == 0 and variational[0] == 0 and variational[1] != 0
    torch.testing.assert_close(terms.loss, terms.simple.mean() + 0.001 * terms.variational.mean())


@pytest.mark.parametrize(("num_frames", "learn_variance"), [(1, False), (2, True)])
def test_a_short_training_lowers_the_loss(num_frames: int, learn_variance: bool) -> None:
    model = small(num_frames, learn_variance=learn_variance)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    held_out, k = videos(40, num_frames), torch.arange(40) % 20 + 1
    before = model.terms(held_out, torch.Generator().manual_seed(0), k)
    assert before.simple.mean().item() == pytest.approx(1, abs=0.1)
    for _ in range(15):
        optimiser.zero_grad()
        model(videos(8, num_frames)).backward()
        optimiser.step()
    after = model.terms(held_out, torch.Generator().manual_seed(0), k)
    assert after.simple.mean() < 0.8 and after.loss < before.loss - 0.2
    samples = model.sample(4, num_steps=5)
    assert samples.shape == (4, *SHAPE) and samples.isfinite().all() and not samples.requires_grad


def test_the_image_model_is_the_video_model_with_one_frame() -> None:
    """All parameters have the same shape but for the code of frames."""
    sizes = [{name: value.shape for name, value in small(frames).state_dict().items()} for frames in (1, 4)]
    assert [name for name in sizes[0] if sizes[0][name] != sizes[1][name]] == ["network.frame"]
    assert sizes[0].keys() == sizes[1].keys()


def test_draws_are_reproducible_and_leave_the_default_generator_alone() -> None:
    model, video = small(learn_variance=True, num_steps=4), videos(3, 2)
    before = torch.get_rng_state()
    first, second = (model.sample(2, last_only=False, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(model.sample(2, generator=torch.Generator().manual_seed(1)), first[:, -1])
    assert torch.equal(*(model(video, torch.Generator().manual_seed(1)) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.sample(2), model.sample(2))


def test_a_state_dict_is_complete_and_knows_the_steps() -> None:
    model, other = small(num_steps=4), small(num_steps=4)
    with torch.no_grad():
        model.network.leave[-1].bias.add_(0.5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(*(m.sample(2, generator=torch.Generator().manual_seed(0)) for m in (model, other)))
    with pytest.raises(RuntimeError, match="beta"):
        small(num_steps=5).load_state_dict(model.state_dict())
    twin = copy.deepcopy(model).double()
    assert twin(videos(2, 2)).dtype == torch.float64 and model.beta.dtype == torch.float64
    assert model.float()(videos(2, 2).double()).dtype == torch.float32


VIDEO = torch.rand(2, 2, *SHAPE)
BAD_VIDEOS = {
    "list": ([torch.rand(1, 8, 8), torch.rand(1, 4, 4)], TypeError, "list of parts of shape"),
    "integers": (VIDEO.int(), TypeError, "video: expected a floating-point tensor"),
    "one frame": (VIDEO[:, :1], ValueError, r"video: expected shape \(B, 2, 1, 8, 8\)"),
    "size": (VIDEO[..., :7], ValueError, r"got \(2, 2, 1, 8, 7\)"),
    "nothing": (VIDEO[:0], ValueError, "B at least 1"),
    "NaN": (VIDEO.clone().index_fill(1, torch.tensor(0), math.nan), ValueError, "128 of 256"),
}


@pytest.mark.parametrize(("video", "error", "message"), BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_bad_videos(video, error, message) -> None:
    with pytest.raises(error, match=message):
        small()(video)


BAD_ARGUMENTS = {
    "frames": ({"num_frames": 0}, ValueError, "num_frames"),
    "steps": ({"num_steps": 1}, ValueError, "num_steps: expected at least 2"),
    "range": ({"pixel_range": (1.0, 0.0)}, ValueError, "pixel_range: expected a highest brightness above 1"),
    "one end": ({"pixel_range": 1.0}, TypeError, "pixel_range: expected two numbers"),
    "clip": ({"clip": 0.0}, ValueError, "clip: expected a positive number"),
    "clips": ({"clip": [1.0]}, ValueError, "clip: expected one number, 2 or None, got 1"),
    "both": ({"network": torch.nn.Identity()}, TypeError, "network: expected none beside its options channels"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        small(**options)


def test_bad_steps_counts_and_answers() -> None:
    model = small()
    for k in (0, 21, torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="k: expected integers from 1 to 20"):
            model.terms(VIDEO, k=k)
    with pytest.raises(ValueError, match="n: expected at least 1"):
        model.sample(0)
    for number in (0, 21):
        with pytest.raises(ValueError, match="num_steps"):
            model.sample(1, num_steps=number)
    wrong = VideoDiffusion(2, SHAPE, 20, learn_variance=True, network=lambda video, time: video)
    with pytest.raises(
        ValueError, match=r"network: expected an answer of shape \(2, 2, 2, 8, 8\), got \(2, 2, 1, 8, 8\)"
    ):
        wrong(VIDEO)


@pytest.mark.cuda
def test_on_cuda_with_a_generator_of_the_cpu() -> None:
    model, generator = small(learn_variance=True, device="cuda"), torch.Generator().manual_seed(0)
    assert model(VIDEO.cuda(), generator).device.type == "cuda"
    assert model.sample(2, generator=generator, num_steps=3).device.type == "cuda"
