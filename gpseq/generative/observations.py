"""What a decoder's output says about the data: independent Gaussians, or independent coins."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_number
from gpseq.generative.draws import draw_normals, drawn

LIKELIHOODS = ("gaussian", "bernoulli")


class GaussianObservations(nn.Module):
    r"""Independent Gaussians around the decoder's output, :math:`p(y \mid f) = N(\text{decoder}(f), \sigma^2 I)`.

    Args:
        noise: sigma squared at the start; one number for all entries, trained.

    Example:
        >>> GaussianObservations(0.01).log_prob(torch.zeros(2), torch.zeros(2))
        tensor([1.3836, 1.3836], grad_fn=...)
    """

    def __init__(self, noise: float = 0.01) -> None:
        super().__init__()
        check_number("noise", noise, above=0.0, expected="a positive number")
        self.log_noise = nn.Parameter(torch.tensor(math.log(noise)))

    @property
    def noise(self) -> Tensor:
        """Variance of the noise."""
        return self.log_noise.exp()

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """Log densities, entry by entry, in nats.

        Args:
            output: of the decoder.
            y: data, of the same shape.
        """
        return -0.5 * (math.log(2 * math.pi) + self.log_noise + (y - output).square() / self.noise)

    def mean(self, output: Tensor) -> Tensor:
        """Expected data.

        Args:
            output: of the decoder.
        """
        return output

    def draw(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Data.

        Args:
            output: of the decoder.
            generator: of the draws.
        """
        return output + self.noise.sqrt() * draw_normals(output.shape, output, generator)


class BernoulliObservations(nn.Module):
    """Independent coins whose logits are the decoder's output, for binary images and grey levels from 0 to 1.

    Example:
        >>> BernoulliObservations().log_prob(torch.zeros(2), torch.ones(2))
        tensor([-0.6931, -0.6931])
    """

    #: There is none beside the coin's own.
    noise: Tensor | None = None

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """Log probabilities, entry by entry, in nats; of grey levels the expected one.

        Args:
            output: logits.
            y: data from 0 to 1, of the same shape.
        """
        return -functional.binary_cross_entropy_with_logits(output, y, reduction="none")

    def mean(self, output: Tensor) -> Tensor:
        """Probabilities.

        Args:
            output: logits.
        """
        return output.sigmoid()

    def draw(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Data, 0 or 1.

        Args:
            output: logits.
            generator: of the draws.
        """
        return (drawn(torch.rand, output, generator) < output.sigmoid()).to(output)
