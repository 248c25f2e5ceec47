"""Inducing keys on real tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.nn.capture import Layer, TokenSample, called, look_through
from gpseq.sgpa.arguments import check_choice

METHODS = ("kmeans++", "random")


def init_inducing(
    model: nn.Module,
    loader: Iterable[Any],
    method: str = "kmeans++",
    num_batches: int = 4,
    max_tokens: int = 4096,
    lengthscale: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Put the inducing keys of every layer on tokens that the layer really sees, in place.

    Each head of each layer gets tokens of its own. Length-scales become the median distance of two projected tokens
    (for the exponential kernel, :math:`\sqrt2` times their median norm), except in mode ``"softmax_kernel"``, where
    they are the temperature of trained scores. Means of layers in mode ``"residual"`` stay as long as their ``value``
    is zero; in other layers, and in trained ones, the function changes: this belongs before training.

    The model runs in evaluation mode without draws meanwhile, and padding is left out. What layers remember of earlier
    calls, for their divergence, is forgotten, and so is what was found for other keys: after this, covariances have to
    be fitted and temperatures calibrated again (:func:`gpseq.nn.fit_covariance`, :func:`gpseq.nn.calibrate`).

    Args:
        model: any module with layers that have inducing keys.
        loader: batches: tensors; tuples or lists, whose first element goes to the model; or mappings,
            ``model(**batch)``.
        method: ``"kmeans++"``, tokens drawn with a probability that grows with the squared distance to those drawn
            before, or ``"random"``. Either are distinct.
        num_batches: how many batches are used at most.
        max_tokens: how many tokens of a layer are kept at most, drawn evenly from all that it sees.
        lengthscale: whether to set length-scales.
        forward: called as ``forward(model, batch)`` in place of the above.
        generator: of the draws, on the CPU; ``None`` is torch's default generator.

    Returns:
        The model.

    Raises:
        RuntimeError: a layer was not called.
        TypeError: a batch is of another kind.
        ValueError: there is no such layer or no batch, fewer distinct tokens than inducing keys, or an option does not
            fit. The model is as it was.

    Source:
        Arthur and Vassilvitskii (2007), k-means++, its seeding.

    Example:
        >>> from gpseq.nn import SGPAttention
        >>> layer = SGPAttention(8, 2, num_inducing=4, batch_first=True)
        >>> x = torch.randn(16, 5, 8)
        >>> _ = init_inducing(layer, [x], forward=lambda layer, x: layer(x, x, x))
        >>> bool((layer.inducing.location[0, 0] == x).all(-1).any())
        True
    """
    check_choice("method", method, METHODS)
    check_count("num_batches", num_batches)
    sample = TokenSample(max_tokens, generator)
    layers = look_through(model, loader, sample.add, num_batches, forward)
    placed = {
        name: place(name, layer, sample.rows(name), sample.queries(name), method, generator)
        for name, layer in layers.items()
    }
    with torch.no_grad():
        for name, layer in layers.items():
            location, scale = placed[name]
            layer.inducing.location.copy_(location)
            if lengthscale and getattr(layer, "mode", None) != "softmax_kernel":
                layer.inducing.log_lengthscale.copy_(scale.log().unsqueeze(-1))
            layer.inducing.forget_fit()
    return model


def spread_tokens(points: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Indices of distinct points that lie far from each other: the seeding of k-means++.

    Args:
        points: ``(n, D)``.
        count: how many.
        generator: of the draws; ``None`` is torch's default generator.

    Returns:
        Indices ``(count,)``.

    Raises:
        ValueError: there are fewer distinct points.

    Example:
        >>> points = torch.tensor([[0.0], [0.0], [5.0]])
        >>> points[spread_tokens(points, 2)].sort(0).values
        tensor([[0.],
                [5.]])
    """
    points = points.double()
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = points.new_full((len(points),), torch.inf)
    while len(chosen) < count:
        nearest = nearest.minimum((points - points[chosen[-1]]).square().sum(-1))
        if not nearest.max() > 0:
            raise ValueError(f"points: expected at least {count} distinct ones, got {len(chosen)}.")
        chosen.append(int(torch.multinomial(nearest / nearest.max(), 1, generator=generator)))
    return torch.tensor(chosen)


def centres(points: Tensor, count: int, generator: torch.Generator | None = None, steps: int = 10) -> Tensor:
    r"""Which points belong together: k-means by Lloyd's iteration, from the seeding of :func:`spread_tokens`.

    Args:
        points: ``(n, D)``.
        count: M, how many clusters.
        generator: of the seeding; ``None`` is torch's default generator.
        steps: of the iteration.

    Returns:
        Weights ``(M, n)`` of the points in the centres: ``weights @ points`` are those, and so are the centres of
        whatever the points are linear in.

    Raises:
        ValueError: there are fewer distinct points.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [8.0], [9.0]])
        >>> (centres(points, 2) @ points).sort(0).values
        tensor([[0.5000],
                [8.5000]])
    """
    weights = F.one_hot(spread_tokens(points, count, generator), len(points)).to(points.dtype)
    for _ in range(steps):
        nearest = torch.cdist(points, weights @ points).argmin(-1)
        members = F.one_hot(nearest, count).mT.to(points.dtype)
        sizes = members.sum(-1, keepdim=True)
        # Of centres that coincide all but one lose their points; they stay where they are.
        weights = torch.where(sizes > 0, members / sizes.clamp_min(1.0), weights)
    return weights


def place(
    name: str,
    layer: Layer,
    rows: Tensor,
    queries: Tensor,
    method: str,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Inducing keys and length-scales of a layer from its tokens.

    Args:
        name: of the layer, for messages.
        layer: for its kernel, and for M.
        rows: what its keys are like, ``(n, embed_dim)`` or ``(n, H, D)``.
        queries: the same tokens projected, ``(n, H, D)``.
        method: one of ``METHODS``, or ``"kmeans"``, whose keys are means of tokens.
        generator: of the draws.

    Returns:
        ``(H, M, embed_dim)`` or ``(H, M, D)``, and ``(H,)``.

    Raises:
        ValueError: there are too few distinct tokens.
    """
    heads, count = layer.inducing.location.shape[:2]
    keys, scales = [], []
    for head in range(heads):
        mine, source = queries[:, head], rows if rows.dim() == 2 else rows[:, head]
        try:
            if method == "kmeans":
                keys.append(centres(mine, count, generator).to(source.dtype) @ source)
            elif method == "kmeans++":
                keys.append(source[spread_tokens(mine, count, generator)])
            else:
                distinct = _first_of_each(mine)
                if len(distinct) < count:
                    raise ValueError(f"points: expected at least {count} distinct ones, got {len(distinct)}.")
                keys.append(source[distinct[torch.randperm(len(distinct), generator=generator)[:count]]])
            scales.append(_scale(mine, layer.kernel, generator))
        except ValueError as error:
            raise ValueError(f"loader: tokens of {called(name)}: {error}") from error
    return torch.stack(keys), torch.stack(scales)


def _scale(points: Tensor, kernel: str, generator: torch.Generator | None) -> Tensor:
    """Length-scale of a head from its projected tokens."""
    points = points[torch.randperm(len(points), generator=generator)[:512]].double()
    if kernel == "exponential":
        size = 2**0.5 * points.norm(dim=-1).median()
    else:
        distances = F.pdist(points)
        size = distances[distances > 0].median() if (distances > 0).any() else distances.new_zeros(())
    if not 0 < size < torch.inf:
        raise ValueError("points: expected distinct ones with finite distances.")
    return size


def _first_of_each(points: Tensor) -> Tensor:
    """Index of one point of each kind."""
    kind = torch.unique(points, dim=0, return_inverse=True)[1]
    first = torch.full((int(kind.max()) + 1,), len(points)).scatter_reduce(0, kind, torch.arange(len(points)), "amin")
    return first
