"""Sums in the order of a key that may have ties."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def cumulative_sum(key: Tensor, values: Tensor) -> Tensor:
    r"""Sums of the values of the k elements with the smallest keys, :math:`k = 0, \dots, n`.

    Elements with the same key have no order. The sum up to the middle of such a group is the expected one over all its
    orders: that before the group, and of the group's sum the fraction that k has reached. So the result does not depend
    on the order in which elements come.

    Args:
        key: ``(*batch, n)``.
        values: ``(*batch, n)``.

    Returns:
        ``(*batch, n + 1)``, float64.

    Example:
        >>> cumulative_sum(torch.tensor([2.0, 1.0, 2.0]), torch.tensor([1.0, 5.0, 0.0]))
        tensor([0.0000, 5.0000, 5.5000, 6.0000], dtype=torch.float64)
    """
    ordered, order = key.sort(-1)
    total = pad(values.double().gather(-1, order).cumsum(-1), (1, 0))
    ordered = ordered.contiguous()
    first, last = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
    before, after = total.gather(-1, first), total.gather(-1, last)
    reached = torch.arange(1, key.shape[-1] + 1, device=key.device) - first
    return pad(before + (after - before) * reached / (last - first), (1, 0))
