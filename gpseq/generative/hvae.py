r"""A hierarchical VAE whose stages may be told what they should look like.

Latents :math:`z_1 \to \dots \to z_T`, each a vector, have a decoder each. The last one makes the image. The others make
the frames of a pseudo-video that ends with it, as far as their weights say; with weights of 0 the same network is an
ordinary hierarchical VAE. After Chen et al. (2024), Your image is secretly the last frame of a pseudo video; no
published number is claimed to be reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_number
from gpseq.generative.draws import draw_normals
from gpseq.generative.hvae_stage import Draw, Stage, residual_kl, residual_log_ratio
from gpseq.generative.image_nets import ImageEncoder
from gpseq.generative.video_checks import check_image_shape, check_images, check_video

LIKELIHOODS = ("gaussian", "bernoulli")
#: Least standard deviation of a Gaussian decoder: a constant pixel would otherwise have an unbounded density.
LEAST_NOISE = 0.01
#: Standard deviation of Gaussian decoders at the start.
FIRST_NOISE = 0.3


@dataclass(frozen=True, eq=False)
class HVAETerms:
    """What the bound is made of, for each video, in nats and not divided by anything.

    Attributes:
        log_likelihood: one draw of ``log p(x_t | z_t)``, ``(B, T)``.
        kl: of each stage, given the draws before it, ``(B, T)``.
        weights: of the stages, ``(T,)``, the last 1.
    """

    log_likelihood: Tensor
    kl: Tensor
    weights: Tensor

    @property
    def loss(self) -> Tensor:
        """Minus the weighted bound, averaged over the videos; what is trained."""
        return (self.kl - self.weights * self.log_likelihood).sum(-1).mean()

    @property
    def elbo(self) -> Tensor:
        """A bound on ``log p(x_T)`` alone, ``(B,)``: the same quantity whatever the weights."""
        return self.log_likelihood[:, -1] - self.kl.sum(-1)

    @property
    def video_elbo(self) -> Tensor:
        """A bound on ``log p(x_1, ..., x_T)``, ``(B,)``."""
        return (self.log_likelihood - self.kl).sum(-1)


def log_likelihood(kind: str, output: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    r"""Log density or probability of images under what a decoder says.

    Args:
        kind: ``"gaussian"``, :math:`\sum \log N(x \mid o, s^2)`, or ``"bernoulli"``, where o are logits. Grey pixels
            from 0 to 1 are accepted there; then it is a cross-entropy, and no log probability of the image.
        output: o, ``(*batch, C, H, W)``.
        target: x, ``(*batch, C, H, W)``.
        noise: s, broadcasts with ``(*batch, C, H, W)``; a Bernoulli decoder has none.

    Returns:
        ``(*batch)``, sums over pixels.

    Example:
        >>> log_likelihood("bernoulli", torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.ones(()))
        tensor(-2.7726)
    """
    if kind == "bernoulli":
        found = -functional.binary_cross_entropy_with_logits(output, target, reduction="none")
    else:
        found = -0.5 * ((target - output) / noise).square() - noise.log() - 0.5 * math.log(2 * math.pi)
    return found.sum((-3, -2, -1))


class HVAE(nn.Module):
    r"""A hierarchical VAE with a decoder a stage, for pseudo-videos or for images alone.

    .. math::
        \text{loss} = -\sum_{t=1}^T w_t \operatorname{E} \log p(x_t \mid z_t)
        + \sum_{t=1}^T \operatorname{KL}(q(z_t \mid z_{<t}, x_T) \,\|\, p(z_t \mid z_{<t})), \qquad w_T = 1.

    Only the last frame is encoded, and each frame is decoded from its own latent. All conditionals are diagonal
    Gaussians, that of :math:`z_1` with learnt moments; a posterior is a shift and a rescaling of the prior. With
    weights of 0 it is the plain hierarchical VAE: same network, same way to generate, other targets. Then decoders of
    the stages before the last have gradients of 0, and videos may have one frame.

    Args:
        num_stages: T, frames of the videos; 1 is a VAE with one latent.
        image_shape: ``(C, H, W)``, sides of at least 4; the networks are meant for 8 x 8 to 32 x 32.
        supervise: w, one number for all stages before the last, or ``T - 1`` numbers, not negative.
        latent_dim: length of each latent.
        hidden: length of the state that carries all latents so far, and of the encoding.
        width: channels of the convolutions.
        likelihood: of pixels, ``"gaussian"`` or ``"bernoulli"``; one for all frames, or T. Bernoulli pixels lie in
            [0, 1], so that frames with noise want ``"gaussian"``.
        noise: standard deviation of Gaussian decoders; ``None`` learns one for each stage, at least 0.01.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: numbers of a wrong kind.
        ValueError: numbers that do not fit.

    Source:
        Chen et al. (2024), Your image is secretly the last frame of a pseudo video, for the idea; Vahdat and Kautz
        (2020), NVAE: a deep hierarchical variational autoencoder, for posteriors relative to the prior.

    Example:
        >>> model = HVAE(num_stages=3, image_shape=(1, 8, 8), supervise=0.5)
        >>> loss = model(torch.rand(4, 3, 1, 8, 8))
        >>> loss.backward()
        >>> model.sample(2).shape, model.sample(2, last_only=False).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 3, 1, 8, 8]))
    """

    def __init__(
        self,
        num_stages: int,
        image_shape: tuple[int, int, int],
        supervise: float | Sequence[float] = 1.0,
        latent_dim: int = 16,
        hidden: int = 128,
        width: int = 32,
        likelihood: str | Sequence[str] = "gaussian",
        noise: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, value in (("latent_dim", latent_dim), ("hidden", hidden), ("width", width)):
            check_count(name, value)
        self.num_stages = check_count("num_stages", num_stages)
        self.image_shape = check_image_shape(image_shape)
        self.latent_dim, self.hidden = latent_dim, hidden
        self.supervise = _weights(supervise, num_stages)
        self.likelihood = _likelihoods(likelihood, num_stages)
        first = FIRST_NOISE if noise is None else check_number("noise", noise, LEAST_NOISE, f"more than {LEAST_NOISE}")
        self.encoder = ImageEncoder(self.image_shape, hidden, width, **made)
        self.start = nn.Parameter(torch.zeros(hidden, **made))
        self.stages = nn.ModuleList(
            Stage(self.image_shape, latent_dim, hidden, width, t == num_stages, **made)
            for t in range(1, num_stages + 1)
        )
        learns_noise = noise is None and "gaussian" in self.likelihood
        raw = math.log(math.expm1(first - LEAST_NOISE))
        self.raw_noise = nn.Parameter(torch.full((num_stages,), raw, **made), requires_grad=learns_noise)
        # An argument and no state: parameters that were trained with other weights can be loaded.
        self.register_buffer("weights", torch.tensor([*self.supervise, 1.0], **made), persistent=False)
        self.weights: Tensor

    @property
    def noise(self) -> Tensor:
        """Standard deviations of Gaussian decoders, ``(T,)``."""
        return LEAST_NOISE + functional.softplus(self.raw_noise)

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss, in nats a video.

        Args:
            video: ``(B, T, C, H, W)``, the image last; where all weights are 0, ``(B, 1, C, H, W)`` too.
            generator: of the draws, on any device; ``None`` is torch's default generator.

        Returns:
            A number with a graph.

        Raises:
            TypeError: no floating-point tensor, or a list of frames.
            ValueError: another shape, pixels that are infinite or NaN, or outside [0, 1] for a Bernoulli decoder.
        """
        return self.terms(video, generator).loss

    def terms(self, video: Tensor, generator: torch.Generator | None = None) -> HVAETerms:
        """What the loss is made of, and the true bounds.

        Args:
            video: as for :meth:`forward`.
            generator: of the draws.

        Returns:
            The terms.
        """
        frames = self._check(video)
        draws = list(self._descend(len(frames), self.encoder(frames[:, -1]), generator))
        likelihoods = [self._log_likelihood(t, draw.latent, frames[:, t]) for t, draw in enumerate(draws)]
        divergences = [residual_kl(draw.shift, draw.log_scale) for draw in draws]
        return HVAETerms(torch.stack(likelihoods, -1), torch.stack(divergences, -1), self.weights)

    @torch.no_grad()
    def sample(self, n: int, last_only: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """New videos, or their last frames: means of the decoders, without the noise of single pixels.

        Args:
            n: how many.
            last_only: whether to keep the last frame only.
            generator: of the draws, on any device; ``None`` is torch's default generator.

        Returns:
            ``(n, C, H, W)``, or ``(n, T, C, H, W)``.
        """
        draws = self._descend(check_count("n", n), None, generator)
        return self._decode([draw.latent for draw in draws], last_only)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, last_only: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Images, or the videos that end with them, from one draw of the posterior.

        Args:
            images: ``(B, C, H, W)``.
            last_only: whether to keep the last frame only.
            generator: of the draws.

        Returns:
            ``(B, C, H, W)``, or ``(B, T, C, H, W)``.
        """
        x = self._check_images(images)
        draws = self._descend(len(x), self.encoder(x), generator)
        return self._decode([draw.latent for draw in draws], last_only)

    @torch.no_grad()
    def importance_bound(
        self, images: Tensor, num_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""A bound on the log density of images alone, :math:`\log \tfrac1S \sum_s p(x_T, z^s) / q(z^s \mid x_T)`.

        It lies below :math:`\log p(x_T)` in expectation, rises with S, and is the ELBO in expectation for S = 1.

        Args:
            images: ``(B, C, H, W)``.
            num_samples: S; memory does not grow with it.
            generator: of the draws.

        Returns:
            ``(B,)``, in nats.

        Source:
            Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, equation 8.

        Example:
            >>> model = HVAE(num_stages=2, image_shape=(1, 8, 8))
            >>> model.importance_bound(torch.rand(3, 1, 8, 8), num_samples=5).shape
            torch.Size([3])
        """
        check_count("num_samples", num_samples)
        x = self._check_images(images)
        encoding = self.encoder(x)
        total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        for _ in range(num_samples):
            draws = list(self._descend(len(x), encoding, generator))
            weight = self._log_likelihood(self.num_stages - 1, draws[-1].latent, x)
            for draw in draws:
                weight = weight + residual_log_ratio(draw.shift, draw.log_scale, draw.noise)
            total = torch.logaddexp(total, weight.double())
        return (total - math.log(num_samples)).to(x.dtype)

    def extra_repr(self) -> str:
        """What the model was made with."""
        return f"num_stages={self.num_stages}, image_shape={self.image_shape}, supervise={self.supervise}"

    def _descend(self, n: int, encoding: Tensor | None, generator: torch.Generator | None) -> Iterator[Draw]:
        """Draws of all stages, each given those before it."""
        state = self.start.expand(n, -1)
        for part in self.stages:
            stage = cast(Stage, part)
            draw = stage.draw(state, encoding, draw_normals((n, self.latent_dim), self.start, generator))
            yield draw
            state = stage.advance(state, draw.latent)

    def _log_likelihood(self, t: int, latent: Tensor, target: Tensor) -> Tensor:
        output = cast(Stage, self.stages[t]).decoder(latent)
        return log_likelihood(self.likelihood[t], output, target, self.noise[t])

    def _decode(self, latents: list[Tensor], last_only: bool) -> Tensor:
        def frame(t: int) -> Tensor:
            output: Tensor = cast(Stage, self.stages[t]).decoder(latents[t])
            return output.sigmoid() if self.likelihood[t] == "bernoulli" else output

        if last_only:
            return frame(self.num_stages - 1)
        return torch.stack([frame(t) for t in range(self.num_stages)], 1)

    def _check(self, video: Any) -> Tensor:
        alone = not any(self.supervise) and isinstance(video, Tensor) and video.dim() == 5 and video.shape[1] == 1
        frames = check_video(video, 1 if alone else self.num_stages, self.image_shape)
        frames = frames.expand(-1, self.num_stages, -1, -1, -1)
        for t, kind in enumerate(self.likelihood):
            if kind == "bernoulli" and (*self.supervise, 1.0)[t] > 0:
                _check_unit("video", frames[:, t])
        return frames.to(self.start.dtype)

    def _check_images(self, images: Any) -> Tensor:
        x = check_images(images, self.image_shape)
        if self.likelihood[-1] == "bernoulli":
            _check_unit("images", x)
        return x.to(self.start.dtype)


def _weights(supervise: Any, num_stages: int) -> tuple[float, ...]:
    values = list(supervise) if isinstance(supervise, Sequence) else [supervise] * (num_stages - 1)
    if len(values) != num_stages - 1:
        raise ValueError(
            f"supervise: expected a number or {num_stages - 1} numbers, one for each stage before the last, whose "
            f"weight is 1, got {len(values)}."
        )
    weights = tuple(check_number("supervise", value) for value in values)
    if any(weight < 0 for weight in weights):
        raise ValueError(f"supervise: expected no number below 0, got {supervise!r}.")
    return weights


def _likelihoods(likelihood: Any, num_stages: int) -> tuple[str, ...]:
    kinds = (likelihood,) * num_stages if isinstance(likelihood, str) else tuple(likelihood)
    if len(kinds) != num_stages or not set(kinds) <= set(LIKELIHOODS):
        raise ValueError(
            f"likelihood: expected one of {', '.join(LIKELIHOODS)}, or {num_stages} of them, got {likelihood!r}."
        )
    return kinds


def _check_unit(name: str, pixels: Tensor) -> None:
    low, high = pixels.aminmax()
    if bool((low < 0) | (high > 1)):
        raise ValueError(
            f"{name}: expected pixels from 0 to 1 for a Bernoulli decoder, got {float(low):.4g} to {float(high):.4g}."
        )
