"""What the Gaussian processes of a network cost: divergences from their priors, in nats."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpseq.nn.generator import Draws


def kl_divergence(model: nn.Module, num_data: int | None = None, convention: str | None = None) -> Tensor:
    r"""Sum of the divergences of all layers of a model, of what their last calls saw.

    A loss to minimise, for N training sequences, is ``cross_entropy + kl_divergence(model, num_data=N) / N`` with the
    mean cross-entropy of a batch.

    Each layer counts once, however often it stands in the model; one that is called more than once in a pass knows its
    last call only.

    Args:
        model: any module; the layers of ``gpseq.nn`` inside are found at any depth.
        num_data: N, number of training sequences; ``None`` takes the batch for all the data.
        convention: ``"global"``, ``"per_sequence"``, or ``None``, what is right for each layer; see
            :meth:`SGPAttention.kl_divergence`.

    Returns:
        A scalar.

    Raises:
        RuntimeError: a layer was not called yet.
        ValueError: there is no such layer, or the convention is unknown or not defined for one of them.

    Example:
        >>> from gpseq.nn import SGPAttention
        >>> layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True)
        >>> layer.self_attn = SGPAttention(8, 2, num_inducing=4, batch_first=True)
        >>> out = layer(torch.randn(3, 5, 8))
        >>> kl_divergence(layer).equal(layer.self_attn.kl_divergence())
        True
    """
    layers = [m for m in model.modules() if isinstance(m, Draws) and callable(getattr(m, "kl_divergence", None))]
    if not layers:
        raise ValueError(
            f"model: expected a layer of gpseq.nn with a divergence, got a {type(model).__name__} with none."
        )
    costs = [layer.kl_divergence(num_data=num_data, convention=convention) for layer in layers]  # type: ignore[operator]
    return torch.stack([cost.to(costs[0]) for cost in costs]).sum()


def divergence_of_data(
    kl_global: Tensor, kl_amortised: Tensor, num_samples: int, num_data: int | None, per_sequence: bool
) -> Tensor:
    r"""Divergence of a data set, estimated from the sequences of one call.

    .. math::
        \mathrm{KL}_g + \tfrac{N}{B} \sum_b \mathrm{KL}_{a,b} \qquad\text{or}\qquad
        N \bigl( \mathrm{KL}_g + \tfrac1B \sum_b \mathrm{KL}_{a,b} \bigr)

    Args:
        kl_global: of what all sequences share, a scalar.
        kl_amortised: of each sequence, ``(S B,)``.
        num_samples: S, how many times each sequence stands in the batch.
        num_data: N; ``None`` is B.
        per_sequence: whether every sequence pays for what they share: the second form.

    Returns:
        A scalar.

    Raises:
        ValueError: the batch is no multiple of S.

    Example:
        >>> shared, own = torch.tensor(2.0), torch.tensor([0.5, 1.5])
        >>> divergence_of_data(shared, own, 1, 10, False), divergence_of_data(shared, own, 1, 10, True)
        (tensor(12.), tensor(30.))
    """
    size = len(kl_amortised)
    if size % num_samples:
        raise ValueError(f"num_samples: expected a number that divides the batch of {size}, got {num_samples}.")
    count = size // num_samples if num_data is None else num_data
    mean = kl_amortised.mean() if size else kl_amortised.sum()
    return count * (kl_global + mean) if per_sequence else kl_global + count * mean
