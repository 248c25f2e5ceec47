r"""A diffusion model of whole videos, of which pseudo-videos keep the last frame.

All frames of a video share one diffusion step k and are denoised together. With one frame it is the image model of the
same architecture. After Chen et al. (2024), Your image is secretly the last frame of a pseudo video; no published
number is claimed to be reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import check_count, check_number
from gpseq.generative.draws import draw_normals
from gpseq.generative.noise_schedule import NoiseSchedule
from gpseq.generative.unet import SpaceTimeUNet
from gpseq.generative.video_checks import check_image_shape, check_video

#: Weight of the variational term beside the squared error, which it must not disturb.
VARIATIONAL_WEIGHT = 0.001


@dataclass(frozen=True, eq=False)
class DiffusionTerms:
    """What the loss is made of, for each video.

    Attributes:
        k: the diffusion step that was drawn, ``(B,)``.
        simple: mean squared error of the noise, ``(B,)``; 1 for a network that answers 0.
        variational: K times the divergence of the drawn step, an estimate of the variational bound in nats a pixel,
            ``(B,)``; ``None`` where the variance is not learnt.
    """

    k: Tensor
    simple: Tensor
    variational: Tensor | None

    @property
    def loss(self) -> Tensor:
        """What is trained, averaged over the videos."""
        loss = self.simple.mean()
        return loss if self.variational is None else loss + VARIATIONAL_WEIGHT * self.variational.mean()


def variational_term(
    schedule: NoiseSchedule, clean: Tensor, noisy: Tensor, mean: Tensor, log_variance: Tensor, k: Tensor
) -> Tensor:
    r"""Divergence of one reverse step from the truth, in nats a number.

    .. math:: \operatorname{KL}(q(v_{k-1} \mid v_k, v) \,\|\, N(m, s^2)) \text{ for } k > 1, \qquad
        -\log N(v \mid m, s^2) \text{ for } k = 1.

    The last one is a density of numbers, not a probability of 256 grey values.

    Args:
        schedule: of the noise.
        clean: v, ``(B, ...)``.
        noisy: :math:`v_k`, ``(B, ...)``.
        mean: m of the model, ``(B, ...)``.
        log_variance: :math:`\log s^2` of the model, ``(B, ...)``.
        k: ``(B,)``.

    Returns:
        ``(B,)``, averaged over the numbers of each element.

    Source:
        Nichol and Dhariwal (2021), Improved denoising diffusion probabilistic models, section 3.1.
    """
    first = (k == 1).view(-1, *[1] * (clean.dim() - 1))
    true_log_variance = schedule.log_variance(torch.zeros_like(clean), k)
    ratio = true_log_variance - log_variance
    distance = (schedule.posterior_mean(clean, noisy, k) - mean).square() * torch.exp(-log_variance)
    divergence = 0.5 * (torch.expm1(ratio) - ratio + distance)
    surprise = 0.5 * (math.log(2 * math.pi) + log_variance + (clean - mean).square() * torch.exp(-log_variance))
    return torch.where(first, surprise, divergence).flatten(1).mean(1)


class VideoDiffusion(nn.Module):
    r"""A denoising diffusion model of videos with a cosine schedule, and a learnt variance on request.

    .. math::
        \text{loss} = \operatorname{E} |\epsilon - \hat\epsilon(v_k, k)|^2 / n + 0.001 \, L_{\text{vlb}}, \qquad
        v_k = \sqrt{\bar\alpha_k}\, v + \sqrt{1 - \bar\alpha_k}\, \epsilon, \quad v = (x_1, \dots, x_T),

    n the numbers of a video; the second term is there with a learnt variance only, with its mean detached. The variance
    lies between its two bounds on a logarithmic scale, where a share in (0, 1) of the network's answer puts it.

    Args:
        num_frames: T; 1 for images alone.
        image_shape: ``(C, H, W)``.
        num_steps: K, diffusion steps of training, at least 2.
        learn_variance: whether the network answers with variances too.
        pixel_range: lowest and highest brightness, which the network sees as -1 and 1. Frames with noise may exceed it.
        clip: bound on clean pixels that the network predicts while sampling, where -1 and 1 are the ends of
            ``pixel_range``; one number for all frames, or T, or ``None`` for no bound. The cosine schedule amplifies
            the first errors some thirtyfold without one. Frames with much noise want a wide bound.
        network: ``(video (B, T, C, H, W), k / K (B,)) -> (B, T, C, H, W)``, or 2 C channels where the variance is
            learnt, those of the noise first; ``None`` makes a :class:`SpaceTimeUNet`.
        device: of the parameters.
        dtype: of the parameters.
        **network_options: of that network.

    Raises:
        TypeError: numbers of a wrong kind, or options beside a network.
        ValueError: numbers that do not fit.

    Source:
        Ho, Jain and Abbeel (2020), Denoising diffusion probabilistic models, equation 14; Nichol and Dhariwal (2021),
        Improved denoising diffusion probabilistic models, section 3; Ho et al. (2022), Video diffusion models.

    Example:
        >>> model = VideoDiffusion(num_frames=3, image_shape=(1, 8, 8), num_steps=50, channels=(8, 16))
        >>> loss = model(torch.rand(4, 3, 1, 8, 8))
        >>> loss.backward()
        >>> model.sample(2, num_steps=5).shape, model.sample(2, last_only=False, num_steps=5).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 3, 1, 8, 8]))
    """

    def __init__(
        self,
        num_frames: int,
        image_shape: tuple[int, int, int],
        num_steps: int = 1000,
        learn_variance: bool = False,
        pixel_range: tuple[float, float] = (0.0, 1.0),
        clip: float | Sequence[float] | None = 1.5,
        network: Callable[[Tensor, Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **network_options: Any,
    ) -> None:
        super().__init__()
        if network is not None and network_options:
            raise TypeError(f"network: expected none beside its options {', '.join(network_options)}.")
        self.num_frames = check_count("num_frames", num_frames)
        self.image_shape = check_image_shape(image_shape)
        self.num_steps, self.learn_variance = num_steps, bool(learn_variance)
        self.low, self.high = _check_range(pixel_range)
        bounds = _check_clip(clip, num_frames)
        beta = NoiseSchedule.cosine(num_steps).beta
        if network is None:
            outputs = self.image_shape[0] * (2 if learn_variance else 1)
            network = SpaceTimeUNet(
                self.image_shape, num_frames, out_channels=outputs, device=device, dtype=dtype, **network_options
            )
        self.network = network
        # In the state, so that parameters of a model with another number of steps are refused.
        self.register_buffer("beta", beta.to(device))
        self.beta: Tensor
        self.register_buffer(
            "clip", torch.tensor(bounds, device=device, dtype=dtype).view(-1, 1, 1, 1), persistent=False
        )
        self.clip: Tensor

    @property
    def schedule(self) -> NoiseSchedule:
        """Of the noise."""
        return NoiseSchedule.of(self.beta)

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss at one random diffusion step of each video.

        Args:
            video: ``(B, T, C, H, W)``, the image last.
            generator: of the draws, on any device; ``None`` is torch's default generator.

        Returns:
            A number with a graph.

        Raises:
            TypeError: no floating-point tensor, or a list of frames.
            ValueError: another shape, or pixels that are infinite or NaN.
        """
        return self.terms(video, generator).loss

    def terms(
        self, video: Tensor, generator: torch.Generator | None = None, k: Tensor | int | None = None
    ) -> DiffusionTerms:
        """What the loss is made of.

        Args:
            video: as for :meth:`forward`.
            generator: of the draws.
            k: the diffusion steps, from 1 to K, ``(B,)`` or one number; ``None`` draws them.

        Returns:
            The terms.

        Raises:
            ValueError: besides what :meth:`forward` refuses, a step out of range.
        """
        given = check_video(video, self.num_frames, self.image_shape)
        steps = self._draw_steps(len(given), generator) if k is None else self._check_steps(k, len(given))
        clean = 2 * (given.to(self.clip) - self.low) / (self.high - self.low) - 1
        noise = draw_normals(clean.shape, clean, generator)
        schedule = self.schedule
        noisy = schedule.diffuse(clean, noise, steps)
        predicted, share = self._ask(noisy, steps)
        simple = (noise - predicted).square().flatten(1).mean(1)
        if share is None:
            return DiffusionTerms(steps, simple, None)
        mean = schedule.posterior_mean(schedule.clean(noisy, predicted.detach(), steps), noisy, steps)
        term = variational_term(schedule, clean, noisy, mean, schedule.log_variance(share, steps), steps)
        return DiffusionTerms(steps, simple, self.num_steps * term)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        last_only: bool = True,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """New videos, all frames of which are denoised together, or their last frames.

        Draw in evaluation mode, and from averaged weights where there are some, see :func:`average_weights`.

        Args:
            n: how many.
            last_only: whether to keep the last frame only.
            generator: of the draws, on any device; ``None`` is torch's default generator.
            num_steps: diffusion steps, evenly spaced among those of training; ``None`` is all of them.

        Returns:
            ``(n, C, H, W)``, or ``(n, T, C, H, W)``, in the unit of ``pixel_range``; the noise that remains may leave
            it.

        Raises:
            TypeError: a number is no integer.
            ValueError: a number is out of range.
        """
        check_count("n", n)
        full = self.schedule
        schedule = full if num_steps is None else full.strided(num_steps)
        noisy = draw_normals((n, self.num_frames, *self.image_shape), self.clip, generator)
        for place in range(len(schedule.beta), 0, -1):
            k = torch.full((n,), place, device=noisy.device)
            predicted, share = self._ask(noisy, schedule.steps[k - 1])
            clean = schedule.clean(noisy, predicted, k).clamp(-self.clip, self.clip)
            noisy = schedule.posterior_mean(clean, noisy, k)
            if place > 1:
                log_variance = schedule.log_variance(torch.zeros_like(noisy) if share is None else share, k)
                noisy = noisy + torch.exp(0.5 * log_variance) * draw_normals(noisy.shape, noisy, generator)
        video = self.low + (self.high - self.low) * (noisy + 1) / 2
        return video[:, -1] if last_only else video

    def extra_repr(self) -> str:
        """What the model was made with."""
        return (
            f"num_frames={self.num_frames}, image_shape={self.image_shape}, num_steps={self.num_steps}, "
            f"learn_variance={self.learn_variance}"
        )

    def _ask(self, noisy: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """The noise and, where the variance is learnt, its share; k are steps of training."""
        answer = self.network(noisy, (k / self.num_steps).to(noisy.dtype))
        channels = self.image_shape[0]
        expected = (*noisy.shape[:2], channels * (2 if self.learn_variance else 1), *noisy.shape[3:])
        if answer.shape != expected:
            raise ValueError(f"network: expected an answer of shape {expected}, got {tuple(answer.shape)}.")
        if not self.learn_variance:
            return answer, None
        return answer[:, :, :channels], answer[:, :, channels:].sigmoid()

    def _draw_steps(self, n: int, generator: torch.Generator | None) -> Tensor:
        device = self.beta.device if generator is None else generator.device
        return torch.randint(1, self.num_steps + 1, (n,), generator=generator, device=device).to(self.beta.device)

    def _check_steps(self, k: Any, n: int) -> Tensor:
        steps = torch.as_tensor(k, device=self.beta.device)
        if (
            steps.is_floating_point()
            or steps.shape not in ((), (n,))
            or not bool(((steps >= 1) & (steps <= self.num_steps)).all())
        ):
            raise ValueError(f"k: expected integers from 1 to {self.num_steps}, one or ({n},), got {k!r}.")
        return steps.expand(n)


def _check_range(pixel_range: Any) -> tuple[float, float]:
    if not isinstance(pixel_range, Sequence) or len(pixel_range) != 2:
        raise TypeError(f"pixel_range: expected two numbers, got {pixel_range!r}.")
    low = check_number("pixel_range", pixel_range[0])
    return low, check_number("pixel_range", pixel_range[1], low, f"a highest brightness above {low:g}")


def _check_clip(clip: Any, num_frames: int) -> list[float]:
    values = list(clip) if isinstance(clip, Sequence) else [clip] * num_frames
    if len(values) != num_frames:
        raise ValueError(f"clip: expected one number, {num_frames} or None, got {len(values)}.")
    return [math.inf if v is None else check_number("clip", v, 0.0, "a positive number or None") for v in values]
