"""What a network with Gaussian processes minimises."""

from __future__ import annotations

from torch import Tensor, nn

from gpseq.checks import check_count, check_floating, check_number
from gpseq.nn.divergence import kl_divergence


def variational_loss(
    model: nn.Module, loss: Tensor, num_data: int, beta: float = 1.0, convention: str | None = None
) -> Tensor:
    r"""A mean loss plus what the Gaussian processes of the model cost: the negative bound on the evidence, per item.

    .. math:: \text{loss} + \frac{\beta}{N}\, \mathrm{KL}

    Call it after the forward pass that the loss comes from, with a loss that is a mean of negative log likelihoods.

    Args:
        model: any module with layers of ``gpseq.nn``.
        loss: mean over the items of a batch, a scalar.
        num_data: N, number of items of the training set: what the mean is taken over, sequences for a label a
            sequence.
        beta: weight of the divergence; 1 is the bound, less is a tempered posterior or annealing, see
            :func:`gpseq.nn.linear_annealing`.
        convention: as in :func:`gpseq.nn.kl_divergence`.

    Returns:
        A scalar.

    Raises:
        TypeError: the loss is no floating-point tensor.
        ValueError: it is no scalar, beta is negative, or the model has no such layer.

    Example:
        >>> import torch
        >>> from gpseq.nn import SGPAttention
        >>> layer = SGPAttention(8, 2, num_inducing=4, mode="residual")
        >>> variational_loss(layer, torch.tensor(0.7), num_data=100).item()  # at the prior
        0.7
    """
    check_floating("loss", loss)
    if loss.dim():
        raise ValueError(f"loss: expected a scalar, the mean over a batch, got shape {tuple(loss.shape)}.")
    num_data = check_count("num_data", num_data)
    beta = check_number("beta", beta, above=-1.0, expected="a number of at least 0")
    if beta < 0:
        raise ValueError(f"beta: expected a number of at least 0, got {beta}.")
    cost = kl_divergence(model, num_data=num_data, convention=convention) / num_data
    return loss + beta * cost.to(loss)


def linear_annealing(step: int, num_steps: int, share: float = 0.5) -> float:
    r"""Weight of the divergence that grows from 0 to 1 over the first part of training.

    .. math:: \min\Bigl(1, \frac{\text{step}}{\text{share} \cdot \text{num\_steps}}\Bigr)

    Args:
        step: steps taken so far.
        num_steps: of the whole training.
        share: of the steps in which it grows, in (0, 1].

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> [linear_annealing(step, 100) for step in (0, 25, 50, 99)]
        [0.0, 0.5, 1.0, 1.0]
    """
    step, num_steps = check_count("step", step, least=0), check_count("num_steps", num_steps)
    share = check_number("share", share, above=0.0, expected="a number in (0, 1]")
    if share > 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}.")
    return min(1.0, step / (share * num_steps))
