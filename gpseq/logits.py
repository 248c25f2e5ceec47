"""From logits to probabilities and entropies, in logarithms: pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributions


def log_softmax(logits: Tensor) -> Tensor:
    """Log probabilities of the classes; one logit is that of class 1 of two.

    Args:
        logits: ``(*batch, K)``; minus infinity forbids a class.

    Returns:
        ``(*batch, K)``, K being 2 where there is one logit; in float32 where the logits are in half precision.

    Raises:
        ValueError: some logits are NaN or plus infinity, or no class is possible.

    Example:
        >>> log_softmax(torch.tensor([0.0])).exp()
        tensor([0.5000, 0.5000])
    """
    wide = widened(logits)
    if wide.shape[-1] == 1:
        wide = torch.cat([torch.zeros_like(wide), wide], dim=-1)
    log_probs = wide.log_softmax(-1)
    rows = log_probs.sum(-1).isnan()  # cheaper than to look at every logit; NaN spreads
    if rows.any():
        raise ValueError(
            f"logits: expected numbers, and one above minus infinity for each element, got NaN, infinity or nothing "
            f"possible in {int(rows.sum())} of {rows.numel()} elements."
        )
    return log_probs


def log_mean_exp(log_probs: Tensor) -> Tensor:
    r"""Log of averaged probabilities, :math:`\log \tfrac1S \sum_s p_s`.

    Args:
        log_probs: ``(S, *shape)``.

    Returns:
        ``(*shape)``; minus infinity, with gradient 0, where every draw holds it for impossible.

    Example:
        >>> log_mean_exp(torch.tensor([[0.5, 0.0], [1.0, 0.0]]).log()).exp()
        tensor([0.7500, 0.0000])
    """
    never = log_probs.amax(0) == -math.inf
    average = log_probs.masked_fill(never, 0.0).logsumexp(0) - math.log(len(log_probs))
    return average.masked_fill(never, -math.inf)


def entropy(log_probs: Tensor) -> Tensor:
    r"""Entropy, :math:`-\sum_k p_k \log p_k`; what is impossible adds nothing.

    Args:
        log_probs: ``(*batch, K)``.

    Returns:
        ``(*batch)``, in nats.

    Example:
        >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log())
        tensor(0.6931)
    """
    finite = log_probs.masked_fill(log_probs == -math.inf, 0.0)
    return (log_probs.exp() * -finite).sum(-1)


def probit(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Logits that stand for a Gaussian over logits, each scaled by its own variance.

    .. math:: m / \sqrt{1 + \tfrac\pi8 v}

    Args:
        mean: m, ``(*batch, K)``.
        variance: v, ``(*batch, K)``.

    Returns:
        ``(*batch, K)``.

    Source:
        MacKay (1992), The evidence framework applied to classification networks.

    Example:
        >>> probit(torch.tensor([3.0]), torch.tensor([9.0]))
        tensor([1.4089])
    """
    return mean / (1 + math.pi / 8 * variance).sqrt()


def probit_pairs(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""Logits that stand for a Gaussian over logits, by the variances of their differences.

    .. math:: -\log \sum_j \exp\left(-\frac{m_k - m_j}{\sqrt{1 + \tfrac\pi8 s_{kj}^2}}\right), \qquad
        s_{kj}^2 = C_{kk} + C_{jj} - 2 C_{kj}

    Args:
        mean: m, ``(*batch, K)``.
        covariance: C, ``(*batch, K, K)``.

    Returns:
        ``(*batch, K)``; the same as the mean, up to a constant, where all noise is shared. A class whose mean is minus
        infinity is forbidden: it has minus infinity, and the others are what they are without it.

    Example:
        >>> probit_pairs(torch.tensor([3.0, 0.0]), 9 * torch.ones(2, 2)).softmax(-1), torch.tensor(3.0).sigmoid()
        (tensor([0.9526, 0.0474]), tensor(0.9526))
    """
    centre, wide = widened(mean), widened(covariance)
    variance = wide.diagonal(dim1=-1, dim2=-2)
    spread = (variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * wide).clamp_min(0)
    forbidden = centre == -math.inf
    known = centre.masked_fill(forbidden, 0.0)
    gap = (known.unsqueeze(-1) - known.unsqueeze(-2)) / (1 + math.pi / 8 * spread).sqrt()
    odds = (-gap).masked_fill(forbidden.unsqueeze(-2), -math.inf)
    return (-odds.logsumexp(-1)).masked_fill(forbidden, -math.inf)


def laplace_bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""Logarithms of the parameters of a Dirichlet that stands for a Gaussian over logits.

    A shift of all logits changes no probability, so the Gaussian is projected onto logits that sum to zero,
    :math:`\mu = P m` and :math:`v = \operatorname{diag}(P C P)` with :math:`P = I - 1 1^\top / K`. Where the mean of v
    is :math:`c \sqrt{K / 2}` with c above one, both are scaled down, :math:`\mu / \sqrt c` and :math:`v / c`. Then

    .. math:: \alpha_k = \frac1{v_k} \Bigl( 1 - \frac2K + \frac{e^{\mu_k}}{K^2} \sum_l e^{-\mu_l} \Bigr)

    which is exact for :math:`\mu = P \log \alpha` and :math:`C = P \operatorname{diag}(1 / \alpha) P`, the Laplace
    approximation of a Dirichlet in the logits. A Gaussian that is not of this kind has one mean and variance too many
    for each class: with more than two classes the mean of the Dirichlet does not tend to softmax(m) as the variance
    vanishes, and it is much too flat for many classes.

    Args:
        mean: m, ``(*batch, K)``.
        covariance: C, ``(*batch, K, K)``.

    Returns:
        :math:`\log \alpha`, ``(*batch, K)``, whose softmax is the mean of the Dirichlet; the mean itself, up to a
        constant, where all noise is shared, for which there is no Dirichlet. A class whose mean is minus infinity is
        forbidden, and the others are what they are without it.

    Source:
        Hobbhahn, Kristiadi and Hennig (2022), Fast predictive uncertainty for classification with Bayesian deep
        networks. There the Gaussian is conditioned on a sum of zero, which lets shared noise move the means, and it is
        scaled for small variances as well, which makes it sharper the smaller they are.

    Example:
        >>> alpha = torch.tensor([4.0, 2.0, 1.0])
        >>> laplace_bridge(alpha.log(), torch.diag(1 / alpha)).exp()
        tensor([4.0000, 2.0000, 1.0000])
    """
    centre, wide = widened(mean), widened(covariance)
    forbidden = centre == -math.inf
    allowed = (~forbidden).to(wide.dtype)
    number = allowed.sum(-1, keepdim=True).clamp_min(1)

    def average(value: Tensor) -> Tensor:
        return (value * allowed).sum(-1, keepdim=True) / number

    known = centre.masked_fill(forbidden, 0.0)
    known = known - average(known)
    variance = wide.diagonal(dim1=-1, dim2=-2)
    shared = (wide * allowed.unsqueeze(-2)).sum(-1) / number
    own = (variance - 2 * shared + average(shared)).clamp_min(0)
    rounding = 8 * torch.finfo(wide.dtype).eps
    certain = average(own) <= rounding * average(variance.abs())
    own = torch.where(certain, 1.0, own)
    own = torch.maximum(own, rounding * average(own).detach())
    scale = (average(own) / (number / 2).sqrt()).clamp_min(1)
    point, own = known / scale.sqrt(), own / scale
    others = (-point).masked_fill(forbidden, -math.inf).logsumexp(-1, keepdim=True)
    flat = (1 - 2 / number).clamp_min(0).log()
    log_alpha = torch.logaddexp(flat, point + others - 2 * number.log()) - own.log()
    return torch.where(certain, known, log_alpha).masked_fill(forbidden, -math.inf)


def widened(value: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def network_output(output: Any) -> tuple[Tensor, Tensor | None]:
    """Logits or values in what a network returned, and their noise variances if it says so.

    Args:
        output: a tensor, a tuple that begins with one, a mapping or an object with ``logits``, a ``Normal`` or a
            ``Categorical``.

    Returns:
        A floating-point tensor, and variances or ``None``.

    Raises:
        TypeError: it is none of these.

    Example:
        >>> network_output({"logits": torch.zeros(2)})
        (tensor([0., 0.]), None)
    """
    if isinstance(output, distributions.Independent):
        return network_output(output.base_dist)
    if isinstance(output, distributions.Normal):
        return output.mean, output.variance
    if isinstance(output, distributions.Categorical | distributions.OneHotCategorical):
        return output.logits, None
    if not isinstance(output, Tensor | distributions.Distribution):
        if isinstance(output, Mapping) and "logits" in output:
            output = output["logits"]
        elif hasattr(output, "logits"):
            output = output.logits
        elif isinstance(output, tuple) and output:
            output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = f"a tensor in {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            "model: expected an output that is a floating-point tensor, a tuple that begins with one, a mapping or an "
            f"object with logits, a Normal or a Categorical, got {got}."
        )
    return output, None


def class_logits(output: Any) -> Tensor:
    """Logits of at least two classes in what a network returned; one logit is that of class 1 of two.

    Args:
        output: as for :func:`network_output`.

    Returns:
        ``(*batch, K)``, K at least 2.

    Raises:
        TypeError: it holds no logits: a ``Normal``, or a loss first.

    Example:
        >>> class_logits(torch.tensor([3.0, -1.0]))
        tensor([[ 0.,  3.],
                [ 0., -1.]])
    """
    values, noise = network_output(output)
    if noise is not None:
        raise TypeError("model: expected logits, got a Normal.")
    if values.dim() == 0:
        raise TypeError("model: expected logits, got a number; does its output begin with a loss?")
    values = values.unsqueeze(-1) if values.dim() == 1 else values
    return torch.cat([torch.zeros_like(values), values], -1) if values.shape[-1] == 1 else values
