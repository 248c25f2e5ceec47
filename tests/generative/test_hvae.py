"""The hierarchical VAE against torch's distributions and sums over grids; control of its weights; bad input."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from gpseq.generative.hvae import HVAE, log_likelihood
from gpseq.generative.hvae_stage import residual_kl, residual_log_ratio
from tests import oracles_generative_hvae as oracle

SHAPE = (1, 8, 8)


def small(num_stages: int = 3, supervise: float | list[float] = 1.0, **options) -> HVAE:
    """A model of a few thousand parameters."""
    options = {"latent_dim": 3, "hidden": 16, "width": 4, "image_shape": SHAPE, **options}
    return HVAE(num_stages, supervise=supervise, **options)


def stirred(model: HVAE, size: float = 0.3) -> HVAE:
    """The same with heads that are not at zero any more."""
    with torch.no_grad():
        for stage in model.stages:
            for part in (stage.prior[-1], stage.posterior[-1]):
                part.weight.normal_(0, size)
                part.bias.normal_(0, size)
    return model


def blobs(n: int, num_frames: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Spots at random places that get sharper from frame to frame."""
    place = 2 + 4 * torch.rand(n, 1, 2, 1, 1, 1)
    width = torch.linspace(3.0, 1.2, num_frames).view(1, -1, 1, 1, 1) if num_frames > 1 else torch.tensor(1.2)
    grid = torch.stack(torch.meshgrid(torch.arange(shape[1]), torch.arange(shape[2]), indexing="ij"))
    distance = (grid.view(1, 1, 2, 1, *shape[1:]) - place).square().sum(2)
    return torch.exp(-0.5 * distance / width.square()).expand(-1, -1, shape[0], -1, -1).contiguous()


@given(st.integers(0, 1000), st.integers(1, 4))
def test_divergence_and_ratio_in_units_of_the_prior(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    mean, log_prior, shift, log_scale, noise = torch.randn(5, 3, size, dtype=torch.float64)
    prior = Normal(mean, log_prior.exp())
    posterior = Normal(mean + log_prior.exp() * shift, (log_prior + log_scale).exp())
    draw = posterior.mean + posterior.stddev * noise
    torch.testing.assert_close(residual_kl(shift, log_scale), kl_divergence(posterior, prior).sum(-1))
    expected = (prior.log_prob(draw) - posterior.log_prob(draw)).sum(-1)
    torch.testing.assert_close(residual_log_ratio(shift, log_scale, noise), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_log_likelihood_of_pixels(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    output, target = torch.randn(2, *batch, 2, 4, 5, dtype=dtype)
    noise = torch.tensor(0.7, dtype=dtype)
    expected = Normal(output, noise).log_prob(target).sum((-3, -2, -1))
    torch.testing.assert_close(log_likelihood("gaussian", output, target, noise), expected)
    binary = (target > 0).to(dtype)
    expected = Bernoulli(logits=output).log_prob(binary).sum((-3, -2, -1))
    torch.testing.assert_close(log_likelihood("bernoulli", output, binary, noise), expected)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", ["gaussian", "gaussian", "bernoulli"]], ids=str)
def test_the_loss_is_the_formula(likelihood: str | list[str], dtype: torch.dtype) -> None:
    weights = [0.25, 2.0]
    model = stirred(small(3, weights, likelihood=likelihood, dtype=dtype))
    video = blobs(4, 3).round().to(dtype)
    encoding = model.encoder(video[:, -1])
    latents = [draw.latent for draw in model._descend(4, encoding, torch.Generator().manual_seed(3))]
    likelihoods, divergences = oracle.terms(model, video, latents)
    found = model.terms(video, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.log_likelihood, likelihoods, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.kl, divergences, atol=1e-4, rtol=1e-4)
    expected = -(likelihoods * torch.tensor([*weights, 1.0], dtype=dtype)).sum(-1) + divergences.sum(-1)
    torch.testing.assert_close(found.loss, expected.mean(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(model(video, torch.Generator().manual_seed(3)), found.loss)
    torch.testing.assert_close(found.elbo, likelihoods[:, -1] - divergences.sum(-1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.video_elbo, (likelihoods - divergences).sum(-1), atol=1e-3, rtol=1e-4)
    assert found.loss.dtype == dtype and (found.kl >= 0).all()


def test_without_supervision_the_other_decoders_learn_nothing() -> None:
    """And the image alone is enough, with the same loss and gradients."""
    model, video = stirred(small(3, 0.0)), blobs(4, 3)
    model(video, torch.Generator().manual_seed(0)).backward()
    for stage in model.stages[:-1]:
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in stage.decoder.parameters())
        assert all(parameter.grad.any() for parameter in stage.step.parameters())
    assert model.raw_noise.grad.tolist()[:2] == [0, 0] and model.raw_noise.grad[2] != 0
    assert all(parameter.grad.any() for parameter in model.stages[-1].decoder.parameters())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(video[:, -1:], torch.Generator().manual_seed(0)).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_weights_change_targets_and_nothing_else() -> None:
    """Same parameters, same way to generate, same bound on the image."""
    plain, supervised = small(3, 0.0), small(3, [0.5, 2.0])
    supervised.load_state_dict(plain.state_dict())
    assert supervised.weights.tolist() == [0.5, 2.0, 1.0] and plain.weights.tolist() == [0, 0, 1]
    samples = [m.sample(3, last_only=False, generator=torch.Generator().manual_seed(1)) for m in (plain, supervised)]
    assert torch.equal(*samples)
    video = blobs(4, 3)
    terms = [m.terms(video, torch.Generator().manual_seed(1)) for m in (plain, supervised)]
    assert torch.equal(terms[0].elbo, terms[1].elbo) and terms[0].loss != terms[1].loss


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_importance_bound_rises_from_the_elbo_to_the_evidence(num_stages: int) -> None:
    model = stirred(small(num_stages, latent_dim=1, width=2, noise=1.0, dtype=torch.float64))
    with torch.no_grad():
        model.stages[-1].decoder.layers[-1].weight.mul_(20)  # or the latent would not matter
    images = blobs(2, 1)[:, 0].double()
    exact = oracle.evidence(model, images)
    elbo = model.terms(images.repeat(400, 1, 1, 1).unsqueeze(1).expand(-1, num_stages, -1, -1, -1)).elbo
    one = model.importance_bound(images.repeat(400, 1, 1, 1), num_samples=1)
    error = ((elbo.var() + one.var()) / 400).sqrt()
    torch.testing.assert_close(one.view(400, 2).mean(0), elbo.view(400, 2).mean(0), atol=4 * error.item(), rtol=0)
    bounds = [draws.view(-1, 2).mean(0) for draws in (elbo, one)]
    for repeats, number in ((400, 4), (20, 200)):
        bounds.append(model.importance_bound(images.repeat(repeats, 1, 1, 1), number).view(repeats, 2).mean(0))
    assert (bounds[1] < bounds[2]).all() and (bounds[2] < bounds[3]).all() and (bounds[0] < exact - 0.5).all()
    torch.testing.assert_close(bounds[3], exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (2, 28, 28)], ids=str)
def test_shapes_and_reproducible_draws(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    model = stirred(small(2, image_shape=shape, dtype=dtype))

    def sample(seed: int, last_only: bool = True) -> Tensor:
        return model.sample(3, last_only, generator=torch.Generator().manual_seed(seed))

    video = sample(0, last_only=False)
    assert video.shape == (3, 2, *shape) and video.dtype == dtype and not video.requires_grad
    torch.testing.assert_close(sample(0), video[:, -1])
    assert not torch.equal(sample(1), sample(0))
    images = torch.rand(3, *shape, dtype=dtype)
    assert model.reconstruct(images).shape == images.shape
    assert model.reconstruct(images, last_only=False).shape == video.shape


def test_bernoulli_samples_are_probabilities() -> None:
    found = small(2, likelihood="bernoulli").sample(5, last_only=False)
    assert (found > 0).all() and (found < 1).all()


def test_generators_do_not_touch_the_default_one() -> None:
    model, video, generator = small(), blobs(2, 3), torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    model.sample(2, generator=generator)
    model.importance_bound(video[:, -1], 2, generator)
    model(video, generator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_short_training_lowers_the_loss(num_stages: int) -> None:
    model = small(num_stages, 0.5, hidden=32, width=4)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    held_out = blobs(128, num_stages)
    before = model.terms(held_out)
    for _ in range(40):
        optimiser.zero_grad()
        model(blobs(16, num_stages)).backward()
        optimiser.step()
    after = model.terms(held_out)
    assert after.loss < before.loss - 10 and after.elbo.mean() > before.elbo.mean() + 10
    error = (model.reconstruct(held_out[:, -1]) - held_out[:, -1]).square().mean()
    assert error < 0.8 * held_out[:, -1].var()


def test_a_state_dict_is_complete() -> None:
    model = stirred(small(2, noise=0.2))
    other = small(2)
    other.load_state_dict(model.state_dict())
    video = blobs(3, 2)
    assert torch.equal(*(m(video, torch.Generator().manual_seed(0)) for m in (model, other)))
    twin = copy.deepcopy(model).double()
    assert twin(video.double()).dtype == torch.float64 and twin.weights.dtype == torch.float64


def test_noise_is_learnt_or_given() -> None:
    assert small(2).raw_noise.requires_grad
    assert not small(2, likelihood="bernoulli").raw_noise.requires_grad
    fixed = small(2, noise=0.05)
    assert fixed.noise.tolist() == pytest.approx([0.05, 0.05]) and not fixed.raw_noise.requires_grad


VIDEO = torch.rand(2, 3, *SHAPE)
BAD_VIDEOS = {
    "list": ([torch.rand(1, 8, 8), torch.rand(1, 9, 8)], TypeError, r"list of parts of shape \(1, 8, 8\) and \(1, 9"),
    "bytes": ((255 * VIDEO).byte(), TypeError, "video: expected a floating-point tensor, got torch.uint8"),
    "frames": (VIDEO[:, :2], ValueError, r"video: expected shape \(B, 3, 1, 8, 8\)"),
    "one frame": (VIDEO[:, -1:], ValueError, r"video: expected shape \(B, 3, 1, 8, 8\)"),
    "size": (torch.rand(2, 3, 1, 8, 9), ValueError, r"got \(2, 3, 1, 8, 9\)"),
    "images": (VIDEO[:, 0], ValueError, r"got \(2, 1, 8, 8\)"),
    "nothing": (VIDEO[:0], ValueError, "B at least 1"),
    "NaN": (torch.where(VIDEO > 0.5, math.nan, VIDEO), ValueError, "video: expected finite pixels"),
    "infinite": (VIDEO / 0, ValueError, "384 of 384"),
}


@pytest.mark.parametrize(("video", "error", "message"), BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_bad_videos(video, error, message) -> None:
    with pytest.raises(error, match=message):
        small()(video)


BAD_ARGUMENTS = {
    "stages": ({"num_stages": 0}, ValueError, "num_stages: expected at least 1"),
    "shape": ({"image_shape": (8, 8)}, TypeError, "image_shape: expected three integers"),
    "tiny": ({"image_shape": (1, 3, 8)}, ValueError, "image_shape: expected sides of at least 4"),
    "weights": ({"supervise": [1.0, 1.0, 1.0]}, ValueError, "supervise: expected a number or 2 numbers.*got 3"),
    "negative": ({"supervise": [1.0, -1.0]}, ValueError, "supervise: expected no number below 0"),
    "no weight": ({"supervise": math.nan}, ValueError, "supervise: expected a finite number"),
    "likelihood": ({"likelihood": "poisson"}, ValueError, "likelihood: expected one of gaussian, bernoulli"),
    "likelihoods": ({"likelihood": ["gaussian"]}, ValueError, "likelihood: .*or 3 of them"),
    "noise": ({"noise": 0.001}, ValueError, "noise: expected more than 0.01"),
    "latent": ({"latent_dim": 0}, ValueError, "latent_dim: expected at least 1"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        small(**{"num_stages": 3, **options})


def test_bad_images_and_counts() -> None:
    model = small(2, likelihood=["gaussian", "bernoulli"])
    with pytest.raises(ValueError, match=r"for a Bernoulli decoder, got 1\.5 to 1\.5"):
        model(torch.rand(2, 2, *SHAPE).index_fill(1, torch.tensor(1), 1.5))
    model(2 * torch.rand(2, 2, *SHAPE).index_fill(1, torch.tensor(1), 0.5))  # the first frame is Gaussian
    with pytest.raises(ValueError, match="images: expected pixels from 0 to 1"):
        model.importance_bound(-torch.rand(2, *SHAPE))
    with pytest.raises(ValueError, match="images: expected finite pixels"):
        model.reconstruct(torch.full((2, *SHAPE), math.nan))
    with pytest.raises(ValueError, match="n: expected at least 1"):
        model.sample(0)
    with pytest.raises(ValueError, match="num_samples"):
        model.importance_bound(torch.rand(2, *SHAPE), num_samples=0)


@pytest.mark.cuda
def test_on_cuda_with_a_generator_of_the_cpu() -> None:
    model = small(2, device="cuda")
    generator = torch.Generator().manual_seed(0)
    assert model(torch.rand(2, 2, *SHAPE, device="cuda"), generator).device.type == "cuda"
    assert model.sample(2, generator=generator).device.type == "cuda"
    assert model.importance_bound(torch.rand(2, *SHAPE, device="cuda"), 2, generator).isfinite().all()
