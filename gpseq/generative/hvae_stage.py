"""One stage of a hierarchical VAE: a latent with a prior, a posterior relative to it, and a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.generative.image_nets import ImageDecoder

#: Logarithms of scales are bent to stay within this on both sides.
LARGEST_LOG_SCALE = 6.0


@dataclass(frozen=True, eq=False)
class Draw:
    """A draw from one stage; L is the length of a latent.

    Attributes:
        latent: z, ``(B, L)``.
        noise: the standard normal that it was made of, ``(B, L)``.
        shift: of the posterior, in standard deviations of the prior, ``(B, L)``; 0 for a draw from the prior.
        log_scale: log ratio of the posterior's standard deviation to the prior's, ``(B, L)``.
    """

    latent: Tensor
    noise: Tensor
    shift: Tensor
    log_scale: Tensor


def residual_kl(shift: Tensor, log_scale: Tensor) -> Tensor:
    r"""KL divergence of a diagonal Gaussian from another, in units of the other.

    .. math:: \operatorname{KL}(N(m + s a, s^2 b^2) \,\|\, N(m, s^2)) = \sum_l \tfrac12 (a_l^2 + b_l^2 - 1) - \log b_l

    Args:
        shift: a, ``(*batch, L)``.
        log_scale: log b, ``(*batch, L)``.

    Returns:
        ``(*batch)``, at least 0.

    Source:
        Vahdat and Kautz (2020), NVAE: a deep hierarchical variational autoencoder, equation 2.

    Example:
        >>> residual_kl(torch.tensor([1.0, 0.0]), torch.zeros(2))
        tensor(0.5000)
    """
    return (0.5 * (shift.square() + torch.expm1(2 * log_scale)) - log_scale).sum(-1)


def residual_log_ratio(shift: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
    r"""How much likelier a draw of the posterior is under the prior, :math:`\log p(z) - \log q(z)`.

    With :math:`z = m + s (a + b \epsilon)` the scale s of the prior cancels.

    Args:
        shift: a, ``(*batch, L)``.
        log_scale: log b, ``(*batch, L)``.
        noise: :math:`\epsilon`, ``(*batch, L)``.

    Returns:
        ``(*batch)``; minus its mean is the KL divergence.

    Example:
        >>> residual_log_ratio(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0]))
        tensor(-0.5000)
    """
    standardised = shift + log_scale.exp() * noise
    return (0.5 * (noise.square() - standardised.square()) + log_scale).sum(-1)


class Stage(nn.Module):
    """One latent: its prior, its posterior, how it changes the state of the path, and its decoder.

    Args:
        image_shape: ``(C, H, W)``.
        latent_dim: L.
        hidden: length of the state.
        width: channels of the decoder.
        is_last: whether no stage follows; then the state is not changed any more.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        hidden: int,
        width: int,
        is_last: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.prior = _perceptron(hidden, hidden, 2 * latent_dim, **made)
        self.posterior = _perceptron(2 * hidden, hidden, 2 * latent_dim, **made)
        self.step = None if is_last else _perceptron(hidden + latent_dim, hidden, hidden, **made)
        self.decoder = ImageDecoder(latent_dim, image_shape, width, **made)
        for part in (self.prior, self.posterior):  # the prior starts standard normal, and the posterior as the prior
            last = part[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def draw(self, state: Tensor, encoding: Tensor | None, noise: Tensor) -> Draw:
        """A latent from the posterior, or from the prior.

        Args:
            state: of the path so far, ``(B, hidden)``.
            encoding: of the image, ``(B, hidden)``; ``None`` for the prior.
            noise: standard normal, ``(B, L)``.
        """
        mean, log_prior_scale = _moments(self.prior(state))
        if encoding is None:
            shift, log_scale = torch.zeros_like(mean), torch.zeros_like(mean)
        else:
            shift, log_scale = _moments(self.posterior(torch.cat([state, encoding], -1)))
        latent = mean + log_prior_scale.exp() * (shift + log_scale.exp() * noise)
        return Draw(latent, noise, shift, log_scale)

    def advance(self, state: Tensor, latent: Tensor) -> Tensor:
        """The state of the path after a latent.

        Args:
            state: before it, ``(B, hidden)``.
            latent: ``(B, L)``.
        """
        return state if self.step is None else state + self.step(torch.cat([state, latent], -1))


def _perceptron(inputs: int, hidden: int, outputs: int, **made: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden, **made), nn.SiLU(), nn.Linear(hidden, outputs, **made))


def _moments(raw: Tensor) -> tuple[Tensor, Tensor]:
    """A mean, and the logarithm of a scale that neither vanishes nor explodes."""
    mean, log_scale = raw.chunk(2, -1)
    return mean, LARGEST_LOG_SCALE * torch.tanh(log_scale / LARGEST_LOG_SCALE)
