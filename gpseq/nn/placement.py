"""Inducing keys on real tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.nn.attention import SGPAttention
from gpseq.nn.residual import ResidualGP
from gpseq.sgpa.arguments import check_choice
from gpseq.sgpa.masks import removes

METHODS = ("kmeans++", "random")
Layer = SGPAttention | ResidualGP


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
    calls, for their divergence, is forgotten.

    Args:
        model: any module with layers that have inducing keys.
        loader: batches: tensors; tuples or lists, whose first element goes to the model; or mappings,
            ``model(**batch)``.
        method: ``"kmeans++"``, tokens drawn with a probability that grows with the squared distance to those drawn
            before, or ``"random"``. Either are distinct.
        num_batches: how many batches are used at most.
        max_tokens: how many tokens of a layer are kept at most, the same number of each batch.
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
        >>> layer = SGPAttention(8, 2, num_inducing=4, batch_first=True)
        >>> x = torch.randn(16, 5, 8)
        >>> _ = init_inducing(layer, [x], forward=lambda layer, x: layer(x, x, x))
        >>> bool((layer.inducing.location[0, 0] == x).all(-1).any())
        True
    """
    check_choice("method", method, METHODS)
    per_batch = -(-check_count("max_tokens", max_tokens) // check_count("num_batches", num_batches))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SGPAttention | ResidualGP)}
    if not layers:
        raise ValueError(f"model: expected layers with inducing keys, got a {type(model).__name__} with none.")
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def recorder(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = _tokens(layer, signature(layer.forward).bind(*args, **kwargs).arguments)
            kept = torch.randperm(len(tokens), generator=generator)[:per_batch]
            seen[name].append(tokens[kept.to(tokens.device)].cpu())

        return record

    empty = True
    with _quiet(model, layers.values()), torch.no_grad():
        hooks = [layer.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()]
        try:
            for batch in islice(loader, num_batches):
                empty = False
                _call(model, batch, forward)
        finally:
            for hook in hooks:
                hook.remove()
    if empty:
        raise ValueError("loader: expected at least one batch, got none.")
    silent = [name or "the model itself" for name, tokens in seen.items() if not tokens]
    if silent:
        raise RuntimeError(f"model: expected every layer to be called, {', '.join(silent)} was not.")
    placed = {name: _place(name, layer, torch.cat(seen[name]), method, generator) for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            location, scale = placed[name]
            layer.inducing.location.copy_(location)
            if lengthscale and getattr(layer, "mode", None) != "softmax_kernel":
                layer.inducing.log_lengthscale.copy_(scale.log().unsqueeze(-1))
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


def _place(
    name: str, layer: Layer, tokens: Tensor, method: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Inducing keys ``(H, M, width)`` and length-scales ``(H,)`` of a layer from its tokens ``(n, [H,] width)``."""
    heads, count = layer.inducing.location.shape[:2]
    projected = tokens
    if tokens.dim() == 2:
        assert isinstance(layer, SGPAttention)
        weight, bias = layer.query_weight, layer.query_bias
        projected = F.linear(tokens.to(weight), weight, bias).detach().cpu().unflatten(-1, (heads, -1))
    keys, scales = [], []
    for head in range(heads):
        mine, source = projected[:, head], tokens if tokens.dim() == 2 else tokens[:, head]
        try:
            if method == "kmeans++":
                chosen = spread_tokens(mine, count, generator)
            else:
                distinct = _first_of_each(mine)
                if len(distinct) < count:
                    raise ValueError(f"points: expected at least {count} distinct ones, got {len(distinct)}.")
                chosen = distinct[torch.randperm(len(distinct), generator=generator)[:count]]
            scales.append(_scale(mine, layer.kernel, generator))
        except ValueError as error:
            raise ValueError(f"loader: tokens of {name or 'the model'}: {error}") from error
        keys.append(source[chosen])
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


def _tokens(layer: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """The tokens that inducing keys are like, without padding: ``(n, embed_dim)`` or projected ``(n, H, D)``."""
    if isinstance(layer, ResidualGP):
        query, mask = call["query"], call.get("mask")
        rows = query.transpose(1, 2)
        return rows[_present(mask, query)]
    assert isinstance(layer, SGPAttention)
    inputs = [call[name] for name in ("query", "key")]
    if inputs[0].is_nested:
        rows = torch.cat(list(inputs[0].unbind())).unsqueeze(0)
        present = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    else:
        rows = inputs[0] if inputs[0].dim() == 3 else inputs[0].unsqueeze(0)
        rows = rows if layer.batch_first or inputs[0].dim() == 2 else rows.transpose(0, 1)
        present = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        padding = call.get("key_padding_mask")
        if padding is not None and rows.shape[1] == padding.shape[-1] and inputs[0] is inputs[1]:
            present = ~removes(padding).view(present.shape)
    if layer.inducing_space == "projected":
        return layer.project_query(rows).transpose(1, 2)[present]
    return rows[present]


def _present(mask: Any, query: Tensor) -> Tensor:
    """Which queries are no padding, ``(B, T)``: in self-attention padding is what nobody looks at."""
    size, length = query.shape[0], query.shape[2]
    present = torch.ones(size, length, dtype=torch.bool, device=query.device)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
        return present
    seen = mask if mask.dtype == torch.bool else mask > 0.5 * torch.finfo(mask.dtype).min
    return present & seen.any(-2).any(1).expand(size, length)


def _call(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    first = next(model.parameters(), None)
    batch = batch if first is None else _move(batch, first.device)
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Sequence) and len(batch):
        model(batch[0])
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        raise TypeError(f"loader: expected tensors, sequences or mappings, got {type(batch).__name__}; see forward.")


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _move(value, device) for name, value in batch.items()}
    return [_move(value, device) for value in batch] if isinstance(batch, tuple | list) else batch


@contextmanager
def _quiet(model: nn.Module, layers: Iterable[Layer]) -> Iterator[None]:
    """Evaluation mode without draws; afterwards all is as before, but no layer remembers a call."""
    layers = list(layers)
    modes = {module: module.training for module in model.modules()}
    draws = {layer: layer.sampling for layer in layers}
    try:
        model.eval()
        for layer in layers:
            layer.sampling = "mean"
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for layer in layers:
            layer.sampling = draws[layer]
            for name in (layer._transient - {"generator"}) & set(vars(layer)):
                delattr(layer, name)  # divergences of other inducing keys, from now on
