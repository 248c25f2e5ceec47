r"""Videos as tokens: a transformer inside each frame, one along time that never looks ahead, and a codebook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_number
from gpseq.generative.quantiser import VectorQuantiser, check_tokens
from gpseq.generative.video_checks import check_image_shape, check_video


@dataclass(frozen=True)
class VideoVQTerms:
    """What the loss is made of.

    Attributes:
        loss: scalar, the sum of the two below.
        reconstruction: scalar, mean squared error of a pixel.
        quantisation: scalar, loss of the quantiser, with its beta.
        video: ``(B, T, C, H, W)``, as decoded.
        tokens: ``(B, T', S)``.
    """

    loss: Tensor
    reconstruction: Tensor
    quantisation: Tensor
    video: Tensor
    tokens: Tensor


def to_patches(frames: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut frames into patches, row by row.

    Args:
        frames: ``(*batch, C, H, W)``.
        patch_size: ``(h, w)``, divisors of H and W.

    Returns:
        ``(*batch, S, C h w)`` with S = H W / (h w).

    Example:
        >>> to_patches(torch.arange(8.0).view(1, 2, 4), (2, 2))
        tensor([[0., 1., 4., 5.],
                [2., 3., 6., 7.]])
    """
    *batch, channels, height, width = frames.shape
    h, w = patch_size
    parts = frames.reshape(*batch, channels, height // h, h, width // w, w)
    return parts.transpose(-3, -2).movedim(-5, -3).flatten(-3).flatten(-3, -2)


def from_patches(patches: Tensor, patch_size: tuple[int, int], image_shape: tuple[int, int, int]) -> Tensor:
    """Put patches together again; the inverse of :func:`to_patches`.

    Args:
        patches: ``(*batch, S, C h w)``.
        patch_size: ``(h, w)``.
        image_shape: ``(C, H, W)``.

    Returns:
        ``(*batch, C, H, W)``.

    Example:
        >>> frames = torch.randn(3, 2, 4, 6)
        >>> from_patches(to_patches(frames, (2, 3)), (2, 3), (2, 4, 6)).equal(frames)
        True
    """
    channels, height, width = image_shape
    h, w = patch_size
    parts = patches.reshape(*patches.shape[:-2], height // h, width // w, channels, h, w)
    return parts.movedim(-3, -5).transpose(-3, -2).reshape(*patches.shape[:-2], channels, height, width)


class VideoVQ(nn.Module):
    r"""An autoencoder of videos with discrete tokens; of images, if there is one frame.

    .. math:: \text{loss} = |x - \hat x|^2 + \beta\, |z - \operatorname{sg}(e)|^2,

    squares as means over pixels and over encodings. The encoder maps patches to vectors, lets those of one frame attend
    to each other, then those of one site to themselves and to earlier times; the quantiser picks a code for each; the
    decoder is the mirror image: time first, then space. Both are causal: frames after t change neither a token nor a
    decoded pixel up to t. So a video may also be shorter than those that the model was made for.

    The first frame stands alone. Later ones may be taken ``temporal_patch`` at a time, so that T frames make
    T' = 1 + (T - 1) / temporal_patch times with S tokens each.

    Args:
        image_shape: ``(C, H, W)`` of each frame.
        num_frames: T, at most.
        patch_size: a number or ``(h, w)``, divisors of H and W.
        temporal_patch: how many later frames make one time.
        dim: width of the transformers.
        num_heads: of their attention.
        spatial_depth: layers inside frames, of the encoder and again of the decoder.
        temporal_depth: layers along time, likewise.
        mlp_ratio: hidden units of the perceptrons, in parts of ``dim``.
        num_codes: K.
        code_dim: width of the codes.
        codebook: ``"ema"`` or ``"gradient"``, see :class:`VectorQuantiser`.
        decay: of its averages.
        beta: weight of the term that draws encodings to codes.
        revive_below: when a code is dead, see :class:`VectorQuantiser`.
        device: of the parameters.
        dtype: of the parameters; videos are cast to it.

    Attributes:
        quantiser: the :class:`VectorQuantiser`; its codebook starts at the first batch in training mode.
        token_shape: ``(T', S)``.
        num_codes: K.

    Shape:
        Videos ``(B, T, C, H, W)``, values about [-1, 1] or [0, 1]; tokens ``(B, T', S)``, int64, sites row by row.

    Raises:
        ValueError: numbers that do not fit.

    Source:
        van den Oord, Vinyals and Kavukcuoglu (2017), Neural discrete representation learning, for quantisation;
        Villegas et al. (2023), Phenaki, section 2.1, for attention factorised in space and causal time. Here without
        perceptual and adversarial terms.

    Example:
        >>> model = VideoVQ((1, 8, 8), num_frames=3, dim=16, num_heads=2, num_codes=8)
        >>> video = torch.rand(4, 3, 1, 8, 8)
        >>> loss = model(video)
        >>> tokens = model.encode(video)
        >>> tokens.shape, model.decode(tokens).shape
        (torch.Size([4, 3, 4]), torch.Size([4, 3, 1, 8, 8]))
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_frames: int = 1,
        patch_size: int | Sequence[int] = 4,
        temporal_patch: int = 1,
        dim: int = 64,
        num_heads: int = 4,
        spatial_depth: int = 2,
        temporal_depth: int = 2,
        mlp_ratio: float = 4.0,
        num_codes: int = 64,
        code_dim: int = 16,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.98,
        beta: float = 0.25,
        revive_below: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_frames", num_frames), ("temporal_patch", temporal_patch), ("dim", dim)):
            check_count(name, value)
        for name, value in (("spatial_depth", spatial_depth), ("temporal_depth", temporal_depth)):
            check_count(name, value, least=0)
        check_number("mlp_ratio", mlp_ratio, above=0.0, expected="a positive number")
        if dim % check_count("num_heads", num_heads):
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}.")
        if (num_frames - 1) % temporal_patch:
            raise ValueError(
                f"num_frames: expected 1 + k temporal_patch frames, got {num_frames} and temporal_patch = "
                f"{temporal_patch}."
            )
        self.image_shape = check_image_shape(image_shape)
        self.patch_size = _patch_size(patch_size, self.image_shape)
        self.num_frames, self.temporal_patch, self.num_codes = num_frames, temporal_patch, num_codes
        self._options: dict[str, Any] = {
            "dim": dim,
            "num_heads": num_heads,
            "spatial_depth": spatial_depth,
            "temporal_depth": temporal_depth,
            "mlp_ratio": mlp_ratio,
            "num_codes": num_codes,
            "code_dim": code_dim,
            "codebook": codebook,
            "decay": decay,
            "beta": beta,
            "revive_below": revive_below,
        }
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        channels, height, width = self.image_shape
        pixels = channels * math.prod(self.patch_size)
        sites = height * width // math.prod(self.patch_size)
        self.token_shape = (1 + (num_frames - 1) // temporal_patch, sites)
        together = temporal_patch > 1 and num_frames > 1  # otherwise all frames share one map of patches

        def layers(depth: int) -> nn.ModuleList:
            hidden = max(round(mlp_ratio * dim), 1)
            options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True, **made}
            return nn.ModuleList(
                nn.TransformerEncoderLayer(dim, num_heads, hidden, 0.0, **options) for _ in range(depth)
            )

        def places() -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(*self.token_shape, dim, **made))

        self.embed = nn.Linear(pixels, dim, **made)
        self.embed_later = nn.Linear(temporal_patch * pixels, dim, **made) if together else None
        self.encoder_places, self.decoder_places = places(), places()
        self.encoder_space, self.encoder_time = layers(spatial_depth), layers(temporal_depth)
        self.encoder_head = nn.Sequential(nn.LayerNorm(dim, **made), nn.Linear(dim, code_dim, **made))
        self.quantiser = VectorQuantiser(num_codes, code_dim, codebook, decay, beta, revive_below, **made)
        self.decoder_stem = nn.Linear(code_dim, dim, **made)
        self.decoder_time, self.decoder_space = layers(temporal_depth), layers(spatial_depth)
        self.decoder_norm = nn.LayerNorm(dim, **made)
        self.head = nn.Linear(dim, pixels, **made)
        self.head_later = nn.Linear(dim, temporal_patch * pixels, **made) if together else None

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss of a batch; in training mode the codebook learns.

        Args:
            video: ``(B, T, C, H, W)``.
            generator: of the encodings at which codes start, or start anew; ``None`` is torch's default.

        Returns:
            Scalar.

        Raises:
            TypeError: pixels that are not floating.
            ValueError: another shape, no video, pixels that are not finite, or a first batch with fewer encodings
                than codes. Nothing has changed then.
        """
        return self.terms(video, generator).loss

    def terms(self, video: Tensor, generator: torch.Generator | None = None) -> VideoVQTerms:
        """The loss with its parts; arguments, errors and the codebook's learning as in a call.

        Args:
            video: ``(B, T, C, H, W)``.
            generator: as in a call.

        Returns:
            The parts, what was decoded, and the tokens.
        """
        video = self._check_video(video)
        quantised = self.quantiser(self._encodings(video), generator)
        decoded = self._decoded(quantised.codes)
        reconstruction = functional.mse_loss(decoded, video)
        return VideoVQTerms(reconstruction + quantised.loss, reconstruction, quantised.loss, decoded, quantised.tokens)

    @torch.no_grad()
    def initialise_codebook(self, video: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the codes at the encodings of these videos, for when training batches are too small for that.

        Args:
            video: ``(B, T, C, H, W)``.
            generator: of the choice of encodings; ``None`` is torch's default.

        Raises:
            TypeError: pixels that are not floating.
            ValueError: another shape, pixels that are not finite, or fewer encodings than codes.
        """
        self.quantiser.initialise(self._encodings(self._check_video(video)), generator)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Tokens of videos; nothing is learned.

        Args:
            video: ``(B, T, C, H, W)``.

        Returns:
            ``(B, T', S)``, int64, from 0 to K - 1.

        Raises:
            TypeError: pixels that are not floating.
            ValueError: another shape, no video, or pixels that are not finite.
        """
        return self.quantiser.tokens(self._encodings(self._check_video(video)))

    def decode(self, tokens: Tensor) -> Tensor:
        """Videos of tokens.

        Args:
            tokens: ``(B, T', S)``, integers from 0 to K - 1; fewer times than the model was made for will do.

        Returns:
            ``(B, T, C, H, W)``; values are not cut off.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: another shape, or tokens out of range.
        """
        times, sites = self.token_shape
        check_tokens(tokens, self.num_codes)
        if tokens.dim() != 3 or tokens.shape[2] != sites or not 1 <= tokens.shape[1] <= times:
            raise ValueError(f"tokens: expected shape (B, {times}, {sites}), got {tuple(tokens.shape)}.")
        return self._decoded(self.quantiser.lookup(tokens))

    def image_twin(self) -> VideoVQ:
        """A new model of single images with as many tokens, by smaller patches; all else is equal.

        Its parameters are drawn anew, and are as many but for the two maps between patches and vectors, which are
        smaller as the patches are. It is what a model of pseudo-videos has to be compared with.

        Raises:
            ValueError: patches that cannot be cut into T' equal ones.

        Example:
            >>> video = VideoVQ((1, 8, 8), num_frames=4, patch_size=4)
            >>> image = video.image_twin()
            >>> image.patch_size, video.token_shape, image.token_shape
            ((2, 2), (4, 4), (1, 16))
        """
        (h, w), times = self.patch_size, self.token_shape[0]
        cuts = [(a, times // a) for a in range(1, times + 1) if not times % a and not h % a and not w % (times // a)]
        if not cuts:
            raise ValueError(f"patch_size: expected patches that can be cut into {times} equal ones, got {(h, w)}.")
        a, b = min(cuts, key=lambda cut: abs(math.log(h * cut[1] / (w * cut[0]))))
        made: dict[str, Any] = {"device": self.head.weight.device, "dtype": self.head.weight.dtype}
        return VideoVQ(self.image_shape, 1, (h // a, w // b), **self._options, **made)

    def _encodings(self, video: Tensor) -> Tensor:
        """``(B, T', S, code_dim)``."""
        x = self.embed(to_patches(video if self.embed_later is None else video[:, :1], self.patch_size))
        if self.embed_later is not None and video.shape[1] > 1:
            # The frames of one time go as further channels.
            later = video[:, 1:].unflatten(1, (-1, self.temporal_patch)).flatten(2, 3)
            x = torch.cat([x, self.embed_later(to_patches(later, self.patch_size))], 1)
        x = _in_space(self.encoder_space, x + self.encoder_places[: x.shape[1]])
        return self.encoder_head(_in_time(self.encoder_time, x))

    def _decoded(self, codes: Tensor) -> Tensor:
        """``(B, T, C, H, W)``."""
        x = self.decoder_stem(codes)
        x = _in_time(self.decoder_time, x + self.decoder_places[: x.shape[1]])
        x = self.decoder_norm(_in_space(self.decoder_space, x))
        if self.head_later is None:
            return from_patches(self.head(x), self.patch_size, self.image_shape)
        first = from_patches(self.head(x[:, :1]), self.patch_size, self.image_shape)
        channels, height, width = self.image_shape
        shape = (self.temporal_patch * channels, height, width)
        later = from_patches(self.head_later(x[:, 1:]), self.patch_size, shape)
        later = later.unflatten(2, (self.temporal_patch, channels)).flatten(1, 2)
        return torch.cat([first, later], 1)

    def _check_video(self, video: Tensor) -> Tensor:
        frames = video.shape[1] if isinstance(video, Tensor) and video.dim() == 5 else 0
        fits = 1 <= frames <= self.num_frames and not (frames - 1) % self.temporal_patch
        video = check_video(video, frames if fits else self.num_frames, self.image_shape)
        return video.to(self.head.weight.dtype)

    def extra_repr(self) -> str:
        """What the model was made with."""
        return (
            f"{self.image_shape}, num_frames={self.num_frames}, patch_size={self.patch_size}, tokens={self.token_shape}"
        )


def _in_space(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Attention inside each frame; ``(B, T', S, D)``."""
    batch = x.shape[:2]
    x = x.flatten(0, 1)
    for layer in layers:
        x = layer(x)
    return x.unflatten(0, batch)


def _in_time(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Attention of each site to itself now and before; ``(B, T', S, D)``."""
    if not layers:
        return x
    x = x.transpose(1, 2)
    batch, times = x.shape[:2], x.shape[2]
    future = torch.ones(times, times, dtype=torch.bool, device=x.device).triu(1)
    x = x.flatten(0, 1)
    for layer in layers:
        x = layer(x, src_mask=future, is_causal=True)
    return x.unflatten(0, batch).transpose(1, 2)


def _patch_size(size: int | Sequence[int], image_shape: tuple[int, int, int]) -> tuple[int, int]:
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2:
        raise ValueError(f"patch_size: expected a number or (h, w), got {size!r}.")
    h, w = (check_count("patch_size", part) for part in sizes)
    if image_shape[1] % h or image_shape[2] % w:
        raise ValueError(f"patch_size: expected divisors of H, W = {image_shape[1:]}, got {(h, w)}.")
    return h, w
