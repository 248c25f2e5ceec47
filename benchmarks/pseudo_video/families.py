"""Three families of models, each an image model and a video model with equal networks, and their contenders."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pseudo_video.settings import Size
from examples.generative.frames import (
    COPIES,
    FIRST,
    HVAES,
    IMAGE,
    MATCHED,
    SHAPE,
    STAR,
    UNTOLD,
    count,
    fit_hvae,
    reconstruction_error,
    train,
)
from gpseq.generative import SpaceTimeUNet, TokenPrior, VideoDiffusion, VideoTokenModel, VideoVQ, average_weights
from gpseq.generative.video_vq import from_patches, to_patches

FEW, MANY, ALONE = "image, few tokens", "image, as many tokens", "image"
#: What each contender of a family is shown; names of the HVAEs are those of the example.
ORDERS = {
    "hvae": {name: arm.order for name, arm in HVAES.items()},
    "vq": {FEW: IMAGE, MANY: IMAGE, COPIES: COPIES, FIRST: "markov", MATCHED: "matched", STAR: "star"},
    "diffusion": {ALONE: IMAGE, COPIES: COPIES, FIRST: "markov", MATCHED: "matched"},
}
#: The models of images alone that videos are compared with.
TWINS = {"hvae": [UNTOLD], "vq": [FEW, MANY], "diffusion": [ALONE]}
TITLES = {"hvae": "hierarchical VAE", "vq": "VQ autoencoder and token prior", "diffusion": "diffusion"}


@dataclass(frozen=True, eq=False)
class Fitted:
    """A contender after its training.

    Attributes:
        sample: ``(n, last_only, generator) -> images or videos``.
        parameters: that were trained, both stages together.
        tokens: of a video; ``None`` where there are none.
        frames: of a video.
        loss: at the end, averaged over the last tenth of the steps; of the last stage.
        seconds: of training.
        reconstruct: ``(images, generator) -> mean squared error of a pixel``; ``None`` where there is no such thing.
        bound: ``(images, draws, generator) -> nats an image``, a bound on the density of images alone.
    """

    sample: Callable[[int, bool, torch.Generator], Tensor]
    parameters: int
    tokens: int | None
    frames: int
    loss: float
    seconds: float
    reconstruct: Callable[[Tensor, torch.Generator], float] | None = None
    bound: Callable[[Tensor, int, torch.Generator], float] | None = None


def fit(family: str, name: str, size: Size, images: Tensor, seed: int) -> Fitted:
    """Train one contender on the device of the images.

    Args:
        family: of ``ORDERS``.
        name: of the contender.
        size: of everything.
        images: ``(n, 1, 28, 28)`` bytes.
        seed: of parameters and draws.
    """
    return {"hvae": _fit_hvae, "vq": _fit_vq, "diffusion": _fit_diffusion}[family](name, size, images, seed)


def _fit_hvae(name: str, size: Size, images: Tensor, seed: int) -> Fitted:
    begun = time.perf_counter()
    model, loss = fit_hvae(name, images, size.recipe, size.training["hvae"], seed, **size.hvae)
    seconds = time.perf_counter() - begun
    return Fitted(
        sample=lambda n, last_only, generator: model.sample(n, last_only, generator),
        parameters=count(model),
        tokens=None,
        frames=model.num_stages,
        loss=loss,
        seconds=seconds,
        reconstruct=lambda x, generator: reconstruction_error(model, x, generator),
        bound=lambda x, draws, generator: model.importance_bound(x, draws, generator).mean().item(),
    )


def _fit_vq(name: str, size: Size, images: Tensor, seed: int) -> Fitted:
    order, recipe = ORDERS["vq"][name], size.recipe
    generator = _seeded(images, seed)
    begun = time.perf_counter()
    frames = 1 if name == FEW else recipe.num_frames
    autoencoder = VideoVQ(SHAPE, frames, **size.vq, device=images.device)
    if name == MANY:
        autoencoder = autoencoder.image_twin()

    def video(batch: Tensor) -> Tensor:
        return recipe.video(batch, order, generator)

    def first_stage(batch: Tensor) -> Tensor:
        return autoencoder(batch, generator)

    autoencoder.initialise_codebook(video(images[:500]), generator)
    train(first_stage, autoencoder.parameters(), images, video, size.training["vq"], generator)
    prior = TokenPrior(autoencoder.num_codes, autoencoder.token_shape, **size.prior, device=images.device)
    model = VideoTokenModel(autoencoder.eval(), prior)
    loss = train(model, prior.parameters(), images, video, size.training["prior"], generator)
    seconds = time.perf_counter() - begun

    @torch.no_grad()
    def reconstruct(x: Tensor, source: torch.Generator) -> float:
        tokens = autoencoder.encode(recipe.video(x, order, source))
        return (autoencoder.decode(tokens)[:, -1] - x).square().mean().item()

    times, sites = autoencoder.token_shape
    return Fitted(
        sample=lambda n, last_only, source: model.eval().sample(n, last_only, source),
        parameters=count(autoencoder, prior),
        tokens=times * sites,
        frames=autoencoder.num_frames,
        loss=loss,
        seconds=seconds,
        reconstruct=reconstruct,
    )


def _fit_diffusion(name: str, size: Size, images: Tensor, seed: int) -> Fitted:
    order, recipe, options = ORDERS["diffusion"][name], size.recipe, dict(size.diffusion)
    generator = _seeded(images, seed)
    begun = time.perf_counter()
    frames = 1 if order == IMAGE else recipe.num_frames
    patch, steps = options.pop("patch"), options.pop("num_steps")
    model = VideoDiffusion(
        frames,
        SHAPE,
        steps,
        clip=[*([2.5] * (frames - 1)), 1.0],  # frames with noise leave the range of the image
        network=PatchUNet(frames, patch, **options, device=images.device),
        device=images.device,
    )
    average = average_weights(model, size.average)
    loss = train(
        lambda batch: model(batch, generator),
        model.parameters(),
        images,
        lambda batch: recipe.video(batch, order, generator),
        size.training["diffusion"],
        generator,
        lambda: average.update_parameters(model),
    )
    seconds = time.perf_counter() - begun
    drawn = average.module.eval()
    return Fitted(
        sample=lambda n, last_only, source: drawn.sample(n, last_only, source, size.diffusion_steps),
        parameters=count(model),
        tokens=None,
        frames=frames,
        loss=loss,
        seconds=seconds,
    )


class PatchUNet(nn.Module):
    """A :class:`SpaceTimeUNet` whose sites are patches of pixels; with patches of side 1 it is the U-Net itself.

    Args:
        num_frames: T.
        patch: side of the patches.
        **options: of the network.
    """

    def __init__(self, num_frames: int, patch: int, **options: Any) -> None:
        super().__init__()
        channels, height, width = SHAPE
        self.patch = (patch, patch)
        self.network = SpaceTimeUNet((channels * patch**2, height // patch, width // patch), num_frames, **options)

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """As the network.

        Args:
            video: ``(B, T, C, H, W)``.
            time: ``(B,)``.
        """
        shape = self.network.image_shape
        sites = to_patches(video, self.patch).mT.unflatten(-1, shape[1:])
        return from_patches(self.network(sites, time).flatten(-2).mT, self.patch, SHAPE)


def _seeded(images: Tensor, seed: int) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator(images.device).manual_seed(seed)
