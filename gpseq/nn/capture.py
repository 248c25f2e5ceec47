"""What the Gaussian processes of a model see when the model is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.nn.attention import SGPAttention
from gpseq.nn.projection import ProjectedAttention
from gpseq.nn.residual import ResidualGP
from gpseq.nn.sampling import use_sampling
from gpseq.sgpa.basis import exponential_factor, scale_tokens
from gpseq.sgpa.masks import removes
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.training import move

Layer = SGPAttention | ResidualGP
Forward = Callable[[nn.Module, Any], Any]

#: Names of cross-attention in decoders, and of the self-attention that the same tokens pass before.
TWINS = (
    ("multihead_attn", "self_attn"),
    ("encoder_attn", "self_attn"),
    ("cross_attn", "self_attn"),
    ("crossattention", "attention"),
    ("crossattention", "attn"),
    ("1.EncDecAttention", "0.SelfAttention"),
)


@dataclass(frozen=True)
class Seen:
    """What a layer saw in one call.

    Attributes:
        layer: that was called.
        rows: what its inducing keys are like: tokens of its input, ``(B, T, embed_dim)``, or projected ones,
            ``(B, T, H, D)``.
        query: the projected queries, ``(B, H, T, D)``.
        present: which queries are no padding, ``(B, T)``, as far as the layer can know.
        arguments: of the call.
        is_self: whether queries look at each other.
    """

    layer: Layer
    rows: Tensor
    query: Tensor
    present: Tensor
    arguments: Mapping[str, Any]
    is_self: bool

    @classmethod
    def of(cls, layer: Layer, arguments: Mapping[str, Any], elsewhere: Tensor | None = None) -> Seen:
        """Find the queries in the arguments of a call.

        Args:
            layer: with inducing keys.
            arguments: of its ``forward``, by name.
            elsewhere: for cross-attention, which masks keys only: which queries are no padding, ``(B, T)``, as
                self-attention of the same tokens knows; ``None``: nobody knows, and all count.
        """
        query = arguments["query"]
        if isinstance(layer, ResidualGP):
            is_self = layer.self_attention
            present = _present(arguments.get("mask") if is_self else None, query)
            present = present if is_self else _where_known(present, elsewhere)
            return cls(layer, query.transpose(1, 2), query, present, arguments, is_self)
        if query.is_nested:
            lengths = query._nested_tensor_size()[:, 0].to(query.device)
            query = query.to_padded_tensor(0.0)
            padding = torch.arange(query.shape[1], device=query.device) >= lengths.unsqueeze(-1)
            arguments = {"query": query, "key": query, "value": query, "key_padding_mask": padding}
        rows = query.unsqueeze(0) if query.dim() == 2 else query if layer.batch_first else query.transpose(0, 1)
        present = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        padding, is_self = arguments.get("key_padding_mask"), query is arguments["key"]
        if not is_self:
            present = _where_known(present, elsewhere)
        elif padding is not None:
            present = ~removes(padding).view(present.shape)
        rows = rows.masked_fill(~present.unsqueeze(-1), 0.0)
        projected = layer.project_query(rows)
        like_keys = projected.transpose(1, 2) if layer.inducing_space == "projected" else rows
        return cls(layer, like_keys, projected, present, arguments, is_self)

    def variance(self) -> Tensor:
        """Variance of the layer's process at each token, the mean over the dimensions of a head: ``(B, H, T)``.

        In mode ``"softmax_kernel"`` before the division by sums over the keys.
        """
        variance = self.layer.inducing.posterior(self.query, **self.layer.kernel_options()).variance
        assert variance is not None
        return variance.mean(-2)

    def prior_variance(self) -> Tensor:
        """Variance of the prior at each token, in place of :meth:`variance`: ``(B, H, T)``."""
        inducing = self.layer.inducing
        variance = inducing.log_variance.exp().unsqueeze(-1)
        if self.layer.kernel == "exponential":
            tokens = scale_tokens(self.query, inducing.log_lengthscale.exp())
            return variance * exponential_factor(tokens).squeeze(-1).square()
        return variance.expand(self.query.shape[:-1])

    def moments(self, output: str = "diagonal") -> AttentionPosterior:
        """Posterior of the heads: mean ``(B, H, T, D)`` and variance ``(B, H, D or 1, T)`` of what is drawn.

        Args:
            output: ``"diagonal"`` or ``"mean"``.
        """
        if isinstance(self.layer, ResidualGP):
            post = self.layer.posterior(self.query, output)
            return post._replace(mean=self.arguments["heads"] + post.mean)
        call = {name: value for name, value in self.arguments.items() if name != "average_attn_weights"}
        return self.layer.moments(self.layer._tokens(**{**call, "need_weights": False})[0], output)


def layers_with_keys(model: nn.Module) -> dict[str, Layer]:
    """The layers of a model that have inducing keys, by name.

    Args:
        model: any module.

    Returns:
        In the order of ``model.named_modules()``.

    Raises:
        ValueError: there is none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SGPAttention | ResidualGP)}
    if not layers:
        other = sorted({type(m).__name__ for m in model.modules() if isinstance(m, ProjectedAttention)})
        but = f", but {', '.join(other)}, which has none" if other else ""
        raise ValueError(f"model: expected layers with inducing keys, got a {type(model).__name__} with none{but}.")
    return layers


def called(name: str) -> str:
    """A layer's name for messages, where that of the model itself is empty."""
    return name or "the model itself"


def mean_depends_on_keys(layer: Layer) -> bool:
    """Whether a layer's mean changes with its inducing keys and kernel: any but mode ``"residual"`` with zero values.

    Args:
        layer: with inducing keys.
    """
    return getattr(layer, "mode", "residual") != "residual" or bool(layer.inducing.value.detach().any())


def check_fittable(layers: Mapping[str, Layer]) -> None:
    """Refuse covariances that have no closed form.

    Args:
        layers: by name.

    Raises:
        ValueError: one is of low rank.
    """
    for name, layer in layers.items():
        if layer.covariance == "low_rank":
            raise ValueError(
                f"model: expected a covariance that is shared, per_dim or diagonal, {called(name)} has 'low_rank'."
            )


@contextmanager
def watching(layers: Mapping[str, Layer], see: Callable[[str, Seen], None]) -> Iterator[None]:
    """Look at every call of some layers, before it happens.

    Compiled models run as they are written meanwhile: what was compiled before does not know that somebody looks.

    Args:
        layers: by name.
        see: is given the name of a layer, and what it sees. Which queries of cross-attention are padding is known where
            a layer of these is self-attention of the same tokens, by the names of ``nn.TransformerDecoderLayer`` and of
            the decoders of transformers.
    """
    lenders: dict[str, str] = {name: twin for name in layers for twin in _twins(name) if twin in layers}
    known: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = signature(layer.forward).bind(*args, **kwargs).arguments
            seen = Seen.of(layer, arguments, known.get(lenders.get(name, "")))
            if seen.is_self and name in lenders.values():
                known[name] = seen.present
            see(name, seen)

        return look

    hooks = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with _uncompiled():
            yield
    finally:
        for handle in hooks:
            handle.remove()


def look_through(
    model: nn.Module,
    loader: Iterable[Any],
    see: Callable[[str, Seen], None],
    num_batches: int | None = None,
    forward: Forward | None = None,
) -> dict[str, Layer]:
    """Let a model see some data, in evaluation mode and without draws, and look at its layers with inducing keys.

    Afterwards all is as it was, but no layer remembers an earlier call.

    Args:
        model: any module with such layers.
        loader: batches, see :func:`call`.
        see: is given the name of a layer, and what it sees.
        num_batches: how many batches are used at most; ``None``: all.
        forward: called as ``forward(model, batch)``.

    Returns:
        The layers, by name.

    Raises:
        RuntimeError: a layer was not called.
        TypeError: a batch is of a kind that :func:`call` cannot handle.
        ValueError: there is no such layer or no batch.
    """
    layers = layers_with_keys(model)
    reached: set[str] = set()

    def note(name: str, seen: Seen) -> None:
        reached.add(name)
        see(name, seen)

    batches = 0
    with quiet(model), torch.no_grad(), watching(layers, note):
        for batch in islice(loader, num_batches):
            call(model, batch, forward)
            batches += 1
    if not batches:
        raise ValueError("loader: expected at least one batch, got none.")
    silent = [called(name) for name in layers if name not in reached]
    if silent:
        raise RuntimeError(f"model: expected every layer to be called, {', '.join(silent)} was not.")
    return layers


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Call a model with a batch, on the model's device.

    Args:
        model: any module.
        batch: a tensor; a tuple or list, whose first element goes to the model; or a mapping, ``model(**batch)``.
        forward: called as ``forward(model, batch)`` in place of that.

    Returns:
        What the model returns.

    Raises:
        TypeError: the batch is of another kind.
    """
    first = next(model.parameters(), None)
    batch = batch if first is None else move(batch, first.device)
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence) and len(batch):
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(f"loader: expected tensors, sequences or mappings, got {type(batch).__name__}; see forward.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own mode.

    Args:
        model: any module.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without draws; afterwards all is as before, but no layer remembers a call.

    Args:
        model: any module with layers that have inducing keys.
    """
    try:
        with evaluating(model), use_sampling(model, "mean"):
            yield
    finally:
        for layer in model.modules():
            if isinstance(layer, SGPAttention | ResidualGP):
                for name in (layer._transient - {"generator"}) & set(vars(layer)):
                    delattr(layer, name)  # divergences of other inducing keys, from now on


class TokenSample:
    """A sample of the tokens that layers see, every one with the same chance, on the CPU.

    Each token gets a random number, and those with the smallest are kept; of a layer that sees no more than
    ``max_tokens`` all are, in their order.

    Args:
        max_tokens: of a layer.
        generator: of the draws, on the CPU.
        heads: whether to keep the means of the heads as well.

    Source:
        Vitter (1985), Random sampling with a reservoir; here with random numbers as keys.
    """

    def __init__(self, max_tokens: int, generator: torch.Generator | None = None, heads: bool = False) -> None:
        self._max_tokens = check_count("max_tokens", max_tokens)
        self._generator, self._wants_heads = generator, heads
        self._parts: dict[str, tuple[Tensor, ...]] = {}  # of each layer: random numbers, rows, queries, heads

    def add(self, name: str, seen: Seen) -> None:
        """Keep some of the tokens of a call, for :func:`look_through`."""
        tokens = seen.present.nonzero()
        numbers = torch.rand(len(tokens), generator=self._generator, dtype=torch.float64)
        held = self._parts.get(name)
        every = numbers if held is None else torch.cat([held[0], numbers])
        size = min(len(every), self._max_tokens)
        chosen = every.topk(size, largest=False).indices.sort().values
        old = len(every) - len(numbers)
        stay, come = chosen[chosen < old], chosen[chosen >= old] - old
        if held is not None and not len(come):
            return
        batch, token = tokens[come.to(tokens.device)].unbind(-1)
        found = [seen.rows[batch, token], seen.query[batch, :, token]]
        if self._wants_heads:
            found.append(seen.moments("mean").mean[batch, :, token])
        new = (numbers[come], *(part.cpu() for part in found))
        if held is not None:
            new = tuple(torch.cat([one[stay], two]) for one, two in zip(held, new, strict=True))
        self._parts[name] = new

    def rows(self, name: str) -> Tensor:
        """What inducing keys of a layer are like: ``(n, embed_dim)``, or projected tokens ``(n, H, D)``."""
        return self._parts[name][1]

    def queries(self, name: str) -> Tensor:
        """Projected queries, ``(n, H, D)``."""
        return self._parts[name][2]

    def heads(self, name: str) -> Tensor:
        """Means of the heads, ``(n, H, D)``, if they were kept."""
        return self._parts[name][3]


def mean_over_tokens(values: Tensor, present: Tensor) -> Tensor:
    """Means over the tokens that are no padding: ``(B, H)`` of ``(B, H, T)``; 0 where there is none."""
    weight = present.unsqueeze(1).to(values.dtype)
    return (values * weight).sum(-1) / weight.sum(-1).clamp_min(1.0)


def _twins(name: str) -> Iterator[str]:
    """Names that the self-attention before a cross-attention of this name may have."""
    for cross, own in TWINS:
        if f".{cross}." in f".{name}.":
            yield f".{name}.".replace(f".{cross}.", f".{own}.").strip(".")


def _where_known(present: Tensor, elsewhere: Tensor | None) -> Tensor:
    return present if elsewhere is None or elsewhere.shape != present.shape else elsewhere.to(present.device)


def _uncompiled() -> Any:
    """What lets compiled models run as they are written, where one can have been compiled."""
    # Asking for it imports the compiler, which takes seconds; torch has it since 2.6.
    set_stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _present(mask: Any, query: Tensor) -> Tensor:
    """Which queries are no padding, ``(B, T)``: in self-attention padding is what nobody looks at."""
    size, length = query.shape[0], query.shape[2]
    present = torch.ones(size, length, dtype=torch.bool, device=query.device)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
        return present
    seen = mask if mask.dtype == torch.bool else mask > 0.5 * torch.finfo(mask.dtype).min
    return present & seen.any(-2).any(1).expand(size, length)
