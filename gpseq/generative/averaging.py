"""Exponential averages of weights, from which generative models draw better samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gpseq.checks import check_number


@dataclass(frozen=True)
class RisingDecay:
    r"""One step of an average that forgets fast at first, :math:`\bar w \leftarrow d \bar w + (1 - d) w`.

    .. math:: d = \min(\text{decay}, \; (1 + n) / (10 + n)) \text{ after n updates.}

    Attributes:
        decay: in the end.
    """

    decay: float

    def __call__(self, average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        """The average after one more update.

        Args:
            average: before it.
            current: the weights now.
            count: n; a tensor stays on its device.
        """
        n = torch.as_tensor(count, device=average.device).to(average.dtype)
        kept = ((1 + n) / (10 + n)).clamp(max=self.decay)
        return torch.lerp(average, current, 1 - kept)


def average_weights(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """A copy of a model that follows it as an exponential average of its weights.

    It is torch's ``AveragedModel``: call ``update_parameters(model)`` after each step of the optimiser, and draw from
    ``.module``. A short training would hardly leave the initial weights behind with a fixed decay, so the decay rises
    to its value. Buffers are copied.

    Args:
        model: what is trained.
        decay: of the average, from 0 to below 1; about ``1 / (1 - decay)`` steps are averaged.

    Returns:
        The average, which has a ``state_dict`` of its own.

    Raises:
        ValueError: a decay out of range.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = average_weights(model, decay=0.99)
        >>> for value in (0.0, 11.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update_parameters(model)
        >>> average.module.weight.item()
        9.0
    """
    expected = "a number from 0 to below 1"
    if not 0 <= check_number("decay", decay, expected=expected) < 1:
        raise ValueError(f"decay: expected {expected}, got {decay!r}.")
    return AveragedModel(model, avg_fn=RisingDecay(float(decay)))
