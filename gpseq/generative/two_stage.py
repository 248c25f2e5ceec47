"""Videos and images drawn in two stages: tokens from their prior, pixels from tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpseq.generative.token_prior import TokenPrior
from gpseq.generative.video_vq import VideoVQ


class VideoTokenModel(nn.Module):
    """Both stages together: an autoencoder that is trained already, and a prior of its tokens.

    Args:
        autoencoder: a :class:`VideoVQ`; its parameters get no gradient here.
        prior: a :class:`TokenPrior` with as many codes and tokens of the same shape.

    Raises:
        ValueError: the two do not fit.

    Example:
        >>> autoencoder = VideoVQ((1, 8, 8), num_frames=2, dim=16, num_heads=2, num_codes=8)
        >>> prior = TokenPrior(autoencoder.num_codes, autoencoder.token_shape, dim=16, num_heads=2, depth=1)
        >>> model = VideoTokenModel(autoencoder, prior)
        >>> model(torch.rand(3, 2, 1, 8, 8)).backward()
        >>> model.sample(5).shape, model.sample(5, last_only=False).shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5, 2, 1, 8, 8]))
    """

    def __init__(self, autoencoder: VideoVQ, prior: TokenPrior) -> None:
        super().__init__()
        here = (autoencoder.num_codes, autoencoder.token_shape)
        if (prior.num_codes, prior.token_shape) != here:
            raise ValueError(
                f"prior: expected {here[0]} codes and tokens of shape {here[1]}, as the autoencoder has, got "
                f"{prior.num_codes} and {prior.token_shape}."
            )
        self.autoencoder, self.prior = autoencoder, prior

    def forward(self, video: Tensor) -> Tensor:
        """Cross-entropy of the tokens of videos, in nats per token.

        Args:
            video: ``(B, T, C, H, W)``, all T frames.

        Returns:
            Scalar; its gradient is that of the prior alone.

        Raises:
            TypeError: pixels that are not floating.
            ValueError: another shape, or pixels that are not finite.
        """
        return self.prior(self.autoencoder.encode(video))

    @torch.no_grad()
    def sample(
        self, n: int, last_only: bool = True, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Draw videos, and keep their last frames.

        Args:
            n: how many.
            last_only: whether to keep the last frame alone, which for pseudo-videos is the image.
            generator: of the draws; ``None`` is torch's default.
            temperature: of the prior, see :meth:`TokenPrior.sample`.

        Returns:
            ``(n, C, H, W)``, or ``(n, T, C, H, W)``; values are not cut off.

        Raises:
            TypeError: an n that is no integer.
            ValueError: numbers out of their range.
        """
        video = self.autoencoder.decode(self.prior.sample(n, temperature, generator))
        return video[:, -1] if last_only else video
