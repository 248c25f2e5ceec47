"""How much a reconstruction weighs, found while training: a constraint on the error instead of a fixed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpseq.checks import check_number

#: The multiplier stays between these.
SMALLEST, LARGEST = 1e-6, 1e8


class Geco(nn.Module):
    r"""The divergence under a constraint on the error, :math:`\operatorname{KL} + \lambda (e - \kappa^2)`.

    .. math::
        c \leftarrow \alpha c + (1 - \alpha) (e - \kappa^2), \qquad \lambda \leftarrow \lambda \exp(\eta c)

    at each step of training: lambda grows until the mean squared error e meets kappa squared, and falls below it. The
    noise of Gaussian observations is in neither term, so it is not learnt: begin with the tolerance,
    ``GPPriorVAE(..., noise=tolerance)``.

    Args:
        tolerance: kappa squared, the mean squared error of an entry that is good enough.
        average: alpha.
        rate: eta.
        start: lambda at first.

    Source:
        Rezende and Viola (2018), Taming VAEs.

    Example:
        >>> geco = Geco(tolerance=0.02)
        >>> loss = geco(torch.tensor(10.0), torch.tensor(0.1), training=True)
        >>> geco.multiplier > 1
        tensor(True)
    """

    def __init__(self, tolerance: float, average: float = 0.99, rate: float = 1.0, start: float = 1.0) -> None:
        super().__init__()
        self.tolerance = check_number("tolerance", tolerance, above=0.0, expected="a positive number")
        self.average = check_number("average", average, above=-1e-300, expected="a number in [0, 1)")
        if self.average >= 1:
            raise ValueError(f"average: expected a number in [0, 1), got {average!r}.")
        self.rate = check_number("rate", rate, above=0.0, expected="a positive number")
        start = check_number("start", start, above=0.0, expected="a positive number")
        self.register_buffer("multiplier", torch.tensor(start))
        self.register_buffer("constraint", torch.tensor(float("nan")))
        self.multiplier: Tensor
        self.constraint: Tensor

    def forward(self, kl: Tensor, error: Tensor, training: bool) -> Tensor:
        """The loss, and a step of the multiplier where the model trains.

        Args:
            kl: divergence, in nats.
            error: mean squared error.
            training: whether the multiplier moves.
        """
        gap = error - self.tolerance
        if training:
            with torch.no_grad():
                now = gap.to(self.constraint)
                moved = self.average * self.constraint + (1 - self.average) * now
                self.constraint.copy_(torch.where(self.constraint.isnan(), now, moved))
                self.multiplier.mul_((self.rate * self.constraint).exp()).clamp_(SMALLEST, LARGEST)
        return kl + self.multiplier.to(gap) * gap
