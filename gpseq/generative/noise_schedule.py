r"""How much noise each diffusion step leaves, and the algebra of Gaussians that follows from it.

The diffusion step k = 1, ..., K is neither the index t of a frame nor the noise of a pseudo-video: all frames of a
video share one k. With :math:`\epsilon` standard normal,

.. math:: v_k = \sqrt{\bar\alpha_k}\, v + \sqrt{1 - \bar\alpha_k}\, \epsilon, \qquad
    \bar\alpha_k = \prod_{j \le k} (1 - \beta_j).

Source:
    Ho, Jain and Abbeel (2020), Denoising diffusion probabilistic models; Nichol and Dhariwal (2021), Improved denoising
    diffusion probabilistic models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpseq.checks import check_count

#: Shift of the cosine, so that the first steps are not too small.
OFFSET = 0.008
#: Largest share of the variance that one step replaces.
LARGEST_BETA = 0.999


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    r"""Noise of K diffusion steps; all tables in float64, entry 0 for k = 1.

    Steps k that methods take are integers from 1 to K of shape ``(B,)``, on the device of the tables, one for each
    element of the first dimension of what is diffused.

    Attributes:
        beta: share of the variance that step k replaces, ``(K,)``, in (0, 1).
        steps: the step of the full schedule that each one stands for, ``(K,)``, int64.

    Example:
        >>> schedule = NoiseSchedule.cosine(100)
        >>> video, noise, k = torch.rand(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4), torch.tensor([1, 50])
        >>> noisy = schedule.diffuse(video, noise, k)
        >>> bool((schedule.clean(noisy, noise, k) - video).abs().max() < 1e-5)
        True
    """

    beta: Tensor
    steps: Tensor

    @classmethod
    def cosine(cls, num_steps: int, offset: float = OFFSET) -> NoiseSchedule:
        r"""The schedule :math:`\bar\alpha_k = f(k) / f(0)`, :math:`f(k) = \cos^2(\tfrac\pi2 (k/K + s) / (1 + s))`.

        Args:
            num_steps: K, at least 2.
            offset: s, positive.

        Returns:
            The schedule, with each beta at most 0.999.

        Raises:
            TypeError: K is no integer.
            ValueError: K is below 2.

        Source:
            Nichol and Dhariwal (2021), Improved denoising diffusion probabilistic models, equation 17.
        """
        check_count("num_steps", num_steps, least=2)
        part = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        curve = torch.cos(0.5 * math.pi * (part + offset) / (1 + offset)).square()
        return cls.of((1 - curve[1:] / curve[:-1]).clamp(max=LARGEST_BETA))

    @classmethod
    def of(cls, beta: Tensor) -> NoiseSchedule:
        """The schedule of shares.

        Args:
            beta: ``(K,)``.
        """
        return cls(beta.double(), torch.arange(1, len(beta) + 1, device=beta.device))

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Share of the variance that is left after step k, ``(K,)``, decreasing."""
        return (1 - self.beta).cumprod(0)

    @cached_property
    def previous_alpha_bar(self) -> Tensor:
        """The same before step k, ``(K,)``; 1 for the first one."""
        return torch.cat([torch.ones_like(self.beta[:1]), self.alpha_bar[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        r"""Of :math:`v_{k-1}` given :math:`v_k` and v, :math:`\tilde\beta_k`, ``(K,)``; at most beta, and 0 first."""
        return (1 - self.previous_alpha_bar) / (1 - self.alpha_bar) * self.beta

    def strided(self, num_steps: int) -> NoiseSchedule:
        """Fewer and longer steps, evenly spaced, which end at the same noise.

        Args:
            num_steps: from 1 to K.

        Returns:
            The schedule.

        Raises:
            TypeError: it is no integer.
            ValueError: it is out of range.

        Source:
            Nichol and Dhariwal (2021), Improved denoising diffusion probabilistic models, section 4.

        Example:
            >>> NoiseSchedule.cosine(100).strided(4).steps
            tensor([ 25,  50,  75, 100])
        """
        total = len(self.beta)
        if check_count("num_steps", num_steps) > total:
            raise ValueError(f"num_steps: expected at most {total}, the steps of training, got {num_steps}.")
        kept = torch.arange(1, num_steps + 1, device=self.beta.device) * total // num_steps - 1
        left = self.alpha_bar[kept]
        before = torch.cat([torch.ones_like(left[:1]), left[:-1]])
        return NoiseSchedule(1 - left / before, self.steps[kept])

    def diffuse(self, clean: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """Noisy videos after k steps.

        Args:
            clean: v, ``(B, ...)``.
            noise: standard normal, of the same shape.
            k: ``(B,)``.
        """
        left = self.alpha_bar
        return _at(left.sqrt(), k, clean) * clean + _at((1 - left).sqrt(), k, clean) * noise

    def clean(self, noisy: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """The video that noise was added to: :meth:`diffuse` turned round.

        Args:
            noisy: ``(B, ...)``.
            noise: what was added, or what a network thinks.
            k: ``(B,)``.
        """
        left = self.alpha_bar
        return _at(left.rsqrt(), k, noisy) * noisy - _at(((1 - left) / left).sqrt(), k, noisy) * noise

    def posterior_mean(self, clean: Tensor, noisy: Tensor, k: Tensor) -> Tensor:
        r"""Mean of :math:`v_{k-1}` given :math:`v_k` and v.

        Args:
            clean: v, ``(B, ...)``.
            noisy: :math:`v_k`, ``(B, ...)``.
            k: ``(B,)``.
        """
        left, before = self.alpha_bar, self.previous_alpha_bar
        of_clean = before.sqrt() * self.beta / (1 - left)
        of_noisy = (1 - self.beta).sqrt() * (1 - before) / (1 - left)
        return _at(of_clean, k, clean) * clean + _at(of_noisy, k, noisy) * noisy

    def log_variance(self, share: Tensor, k: Tensor) -> Tensor:
        r"""Log variance between the two that are optimal for data of no and of unit variance.

        .. math:: s \log \beta_k + (1 - s) \log \tilde\beta_k,

        where the first of the :math:`\tilde\beta`, 0, is replaced by the second.

        Args:
            share: s, from 0 to 1, ``(B, ...)``.
            k: ``(B,)``.

        Source:
            Nichol and Dhariwal (2021), Improved denoising diffusion probabilistic models, equation 15.
        """
        low = self.posterior_variance
        low = torch.cat([low[1:2] if len(low) > 1 else self.beta, low[1:]])
        return share * _at(self.beta.log(), k, share) + (1 - share) * _at(low.log(), k, share)


def _at(table: Tensor, k: Tensor, like: Tensor) -> Tensor:
    """Entries for steps ``(B,)``, to be multiplied with ``(B, ...)``."""
    return table[k - 1].to(like.dtype).view(-1, *[1] * (like.dim() - 1))
