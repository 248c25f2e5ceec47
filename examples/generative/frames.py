"""Pseudo-videos of small images: frames, a loop of training, hierarchical autoencoders with controls, and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq import metrics
from gpseq.datasets import Images
from gpseq.generative import HVAE, GaussianBlur, ImageFeatures, InformationReport, information_report, pseudo_video
from gpseq.training import warmup_cosine

SHAPE = (1, 28, 28)
#: What a model is shown beside the orders of ``pseudo_video``: the image alone, or copies of it in the place of frames.
IMAGE, COPIES = "image", "copies"
ONE_LATENT, UNTOLD, FIRST, STAR, MATCHED = "VAE, one latent", "no supervision", "first order", "star", "matched star"

# --- frames -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How frames are made; the same for all models.

    Attributes:
        num_frames: T.
        width: of the blur of the first frame, in pixels.
        noise: deviation of the fresh noise of each frame, where brightness runs from 0 to 1.
    """

    num_frames: int = 4
    width: float = 4.0
    noise: float = 0.15

    @property
    def corruption(self) -> GaussianBlur:
        """Blur whose widths add up to the width of the first frame."""
        return GaussianBlur(self.width / math.sqrt(self.num_frames - 1))

    def video(self, images: Tensor, order: str, generator: torch.Generator | None = None) -> Tensor:
        """What a model is shown of images.

        Args:
            images: ``(n, 1, 28, 28)``, bytes or floating.
            order: of ``pseudo_video``, or ``"image"`` or ``"copies"``.
            generator: of the noise.

        Returns:
            ``(n, T, 1, 28, 28)``, or T = 1 for the image alone.
        """
        if order == IMAGE:
            return pseudo_video(images, 1, self.corruption)
        if order == COPIES:
            return pseudo_video(images, self.num_frames, GaussianBlur(0.0), noise=0.0)
        return pseudo_video(images, self.num_frames, self.corruption, order, self.noise, generator)

    def information(self, images: Tensor) -> list[InformationReport]:
        """What frames say of a Gaussian image with the covariance of these, for each order; exact."""
        orders = ("markov", "matched", "star", "average")
        return [
            information_report(self.corruption, order, self.num_frames, self.noise, images=images, method="exact")
            for order in orders
        ]


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Steps of the optimiser; the same for all models that are compared."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    autocast: bool = False


def train(
    loss: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    images: Tensor,
    video: Callable[[Tensor], Tensor],
    training: Training,
    generator: torch.Generator,
    after_step: Callable[[], Any] = lambda: None,
) -> float:
    """Minimise a loss of videos that are made anew, with fresh noise, at each step.

    Nothing in the loop waits for the device.

    Args:
        loss: of a batch of videos.
        parameters: what is trained.
        images: ``(n, 1, 28, 28)``, all of them, on the device.
        video: makes videos of a batch.
        training: how long.
        generator: of the choice of images, on their device.
        after_step: called after each step.

    Returns:
        The loss, averaged over the last tenth of the steps.

    Raises:
        FloatingPointError: that is not finite.
    """
    trained = [value for value in parameters if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0, fused=images.is_cuda)
    scheduler = warmup_cosine(optimizer, training.steps, training.steps // 20)
    counted = max(training.steps // 10, 1)
    total = torch.zeros((), device=images.device)
    for step in range(training.steps):
        chosen = torch.randint(len(images), (training.batch_size,), generator=generator, device=images.device)
        batch = video(images[chosen])
        with torch.autocast(images.device.type, torch.bfloat16, enabled=training.autocast):
            value = loss(batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        after_step()
        if step >= training.steps - counted:
            total += value.detach().float()
    mean = total.item() / counted
    if not math.isfinite(mean):
        raise FloatingPointError(f"loss: got {mean} at the end, expected a finite number")
    return mean


def count(*models: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(value.numel() for model in models for value in model.parameters() if value.requires_grad)


@dataclass(frozen=True)
class Arm:
    """A contender: what it is shown, and for an HVAE how much the stages are told."""

    order: str
    supervise: float = 1.0


#: Hierarchical autoencoders; all but the first have the same network, and make images in the same way.
HVAES = {
    ONE_LATENT: Arm(IMAGE, 0.0),
    UNTOLD: Arm(IMAGE, 0.0),
    COPIES: Arm(COPIES),
    FIRST: Arm("markov"),
    MATCHED: Arm("matched"),
    STAR: Arm("star"),
}


def fit_hvae(
    name: str,
    images: Tensor,
    recipe: Recipe,
    training: Training,
    seed: int,
    **options: Any,
) -> tuple[HVAE, float]:
    """One contender, trained.

    Args:
        name: of the contender, a key of ``HVAES``.
        images: ``(n, 1, 28, 28)``.
        recipe: of the frames.
        training: how long.
        seed: of the parameters and of all draws.
        **options: of the ``HVAE``.

    Returns:
        The model, and its loss at the end, in nats a video.
    """
    arm, device = HVAES[name], images.device
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    stages = 1 if name == ONE_LATENT else recipe.num_frames
    model = HVAE(stages, SHAPE, arm.supervise, device=device, **options)
    pixels = math.prod(SHAPE)  # nats a pixel: the scale at which gradients are clipped
    value = train(
        lambda video: model(video, generator) / pixels,
        model.parameters(),
        images,
        lambda batch: recipe.video(batch, arm.order, generator),
        training,
        generator,
    )
    return model.eval(), pixels * value


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judge:
    """One classifier, one reference set, for all contenders.

    Attributes:
        network: trained on the real training images.
        accuracy: of it, on all test images.
        reference: features of test images, ``(n, d)``.
        ranked: of the first of them, for precision and recall, which cost a distance a pair.
        real: features of training images, for the floor.
        held: other test images, ``(m, 1, 28, 28)``, for reconstruction.
    """

    network: ImageFeatures
    accuracy: float
    reference: Tensor
    ranked: Tensor
    real: Tensor
    held: Tensor

    def scores(self, images: Tensor) -> dict[str, float]:
        """Fréchet distance, precision and recall of what was generated."""
        return self._compare(features(self.network, images.clamp(0, 1)))

    def floor(self, n: int) -> dict[str, float]:
        """The same of n real training images."""
        return self._compare(self.real[:n])

    def _compare(self, found: Tensor) -> dict[str, float]:
        distance = metrics.frechet(lambda x: x, self.reference, found)
        precision, recall = metrics.precision_recall(self.ranked, found)
        return {"frechet": distance.item(), "precision": precision.item(), "recall": recall.item()}


def judge(network: ImageFeatures, data: Images, reference: int, samples: int, held: int) -> Judge:
    """Make the sets that all contenders are judged by.

    Args:
        network: a trained one.
        data: real images.
        reference: how many test images are the reference.
        samples: how many images of a contender are judged, at most.
        held: how many other test images are reconstructed.

    Raises:
        ValueError: there are fewer images.
    """
    if reference + held > len(data.x_test) or samples > len(data.x_train):
        raise ValueError(
            f"data: expected at least {reference + held} test and {samples} training images, got {len(data.x_test)} "
            f"and {len(data.x_train)}."
        )
    device = network.head.weight.device
    order = torch.randperm(len(data.x_test), generator=torch.Generator().manual_seed(0))
    chosen = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))[:samples]
    found = features(network, data.x_test[order].unsqueeze(1))
    with torch.no_grad():
        answers = network.head(found).argmax(-1).cpu()
    return Judge(
        network=network,
        accuracy=metrics.accuracy(answers, data.y_test[order]).item(),
        reference=found[:reference],
        ranked=found[: min(samples, reference)],
        real=features(network, data.x_train[chosen].unsqueeze(1)),
        held=(data.x_test[order[reference : reference + held]].unsqueeze(1) / 255).to(device),
    )


@torch.no_grad()
def features(network: ImageFeatures, images: Tensor) -> Tensor:
    """Batch by batch, on the network's device."""
    return torch.cat([network(part.to(network.head.weight.device)) for part in images.split(1000)])


def fit_features(data: Images, epochs: int, device: torch.device | str = "cpu") -> ImageFeatures:
    """The classifier of a data set; its seed is always 0."""
    torch.manual_seed(0)
    network = ImageFeatures(len(data.classes), SHAPE, device=device)
    network.fit(data.x_train.unsqueeze(1), data.y_train, epochs, generator=torch.Generator().manual_seed(0))
    return network


def reconstruction_error(model: HVAE, images: Tensor, generator: torch.Generator) -> float:
    """Mean squared error of a pixel."""
    return (model.reconstruct(images, generator=generator) - images).square().mean().item()
