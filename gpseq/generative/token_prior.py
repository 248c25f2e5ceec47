r"""Which tokens follow which: an autoregressive transformer over the tokens of videos."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_number
from gpseq.generative.quantiser import check_tokens


class TokenPrior(nn.Module):
    r"""Probabilities of tokens, each given all before it.

    .. math:: \log p(k) = \sum_{i=1}^{T' S} \log p(k_i \mid k_1, \dots, k_{i-1})

    Frames come one after the other, in their order, coarse to fine for pseudo-videos, and sites row by row inside each.
    A start token stands before the first. Before training all codes are equally likely.

    How tokens attend to those before is a module, a mixer: ``nn.MultiheadAttention``, or whatever is handed in that is
    called alike, such as a layer of sparse-GP attention.

    Args:
        num_codes: K.
        token_shape: ``(T', S)``.
        dim: width.
        num_heads: of attention.
        depth: blocks.
        mlp_ratio: hidden units of the perceptrons, in parts of ``dim``.
        dropout: of attention and behind both parts of a block.
        mixers: one for each block, called as ``mixer(query, key, value, attn_mask=future, is_causal=True,
            need_weights=False)[0]``, batch first, where the mask is ``True`` for keys to ignore; and, to draw, with one
            query, all keys up to it, and no mask. ``None`` is ``nn.MultiheadAttention``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        token_shape: ``(T', S)``.
        num_codes: K.

    Raises:
        ValueError: numbers that do not fit.
        TypeError: mixers that are no modules.

    Source:
        Vaswani et al. (2017), Attention is all you need, section 3, for the transformer; van den Oord, Vinyals and
        Kavukcuoglu (2017), Neural discrete representation learning, section 3.3, for a prior in a second stage.

    Example:
        >>> prior = TokenPrior(num_codes=8, token_shape=(3, 4), dim=16, num_heads=2, depth=1)
        >>> tokens = torch.randint(8, (5, 3, 4))
        >>> f"{prior(tokens).item():.4f} {math.log(8):.4f}"
        '2.0794 2.0794'
        >>> prior.sample(2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        num_codes: int,
        token_shape: Sequence[int],
        dim: int = 64,
        num_heads: int = 4,
        depth: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        mixers: Sequence[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_codes", num_codes), ("dim", dim), ("depth", depth)):
            check_count(name, value)
        if dim % check_count("num_heads", num_heads):
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}.")
        check_number("mlp_ratio", mlp_ratio, above=0.0, expected="a positive number")
        if not 0 <= check_number("dropout", dropout, expected="a number in [0, 1)") < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}.")
        if len(tuple(token_shape)) != 2:
            raise ValueError(f"token_shape: expected (T', S), got {token_shape!r}.")
        times, sites = (check_count("token_shape", size) for size in token_shape)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if mixers is None:
            options: dict[str, Any] = {"batch_first": True, **made}
            mixers = [nn.MultiheadAttention(dim, num_heads, dropout, **options) for _ in range(depth)]
        _check_mixers(mixers, depth)
        self.num_codes, self.dim, self.num_heads = num_codes, dim, num_heads
        self.token_shape = (times, sites)
        self.embed = nn.Embedding(num_codes + 1, dim, **made)  # the last one is the start
        self.places = nn.Parameter(0.02 * torch.randn(times * sites, dim, **made))
        hidden = max(round(mlp_ratio * dim), 1)
        self.blocks = nn.ModuleList(CausalBlock(dim, hidden, mixer, dropout, **made) for mixer in mixers)
        self.norm = nn.LayerNorm(dim, **made)
        self.head = nn.Linear(dim, num_codes, **made)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Cross-entropy, in nats per token.

        Args:
            tokens: ``(B, T', S)``, integers from 0 to K - 1.

        Returns:
            Scalar; log K if all codes are equally likely.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: another shape, no tokens, or some out of range.
        """
        tokens = self._check(tokens)
        if not len(tokens):
            raise ValueError(f"tokens: expected at least one video, got shape {tuple(tokens.shape)}.")
        return functional.cross_entropy(self._logits(tokens).flatten(0, 1), tokens.flatten())

    def logits(self, tokens: Tensor) -> Tensor:
        """Unnormalised log probabilities of each token given those before it.

        Args:
            tokens: ``(B, T', S)``.

        Returns:
            ``(B, T', S, K)``; those of a token do not depend on it, nor on any after it.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: another shape, or tokens out of range.
        """
        return self._logits(self._check(tokens)).unflatten(1, self.token_shape)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Log probabilities of whole videos of tokens, in nats.

        Args:
            tokens: ``(B, T', S)``.

        Returns:
            ``(B,)``.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: another shape, or tokens out of range.
        """
        tokens = self._check(tokens)
        terms = self._logits(tokens).log_softmax(-1).gather(-1, tokens.flatten(1).unsqueeze(-1))
        return terms.sum((1, 2))

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw tokens, one after the other; each costs one pass of one token, as keys and values are kept.

        Args:
            n: how many videos.
            temperature: logits are divided by it: below 1 likely tokens become more likely.
            generator: of the draws, which are uniform numbers in the order of the tokens; ``None`` is torch's default.

        Returns:
            ``(n, T', S)``, int64. Dropout is off meanwhile.

        Raises:
            TypeError: an n that is no integer.
            ValueError: numbers out of their range.
        """
        check_count("n", n)
        check_number("temperature", temperature, above=0.0, expected="a positive number")
        length, device = math.prod(self.token_shape), self.places.device
        source = generator.device if generator is not None else device
        uniform = torch.rand(length, n, dtype=torch.float64, generator=generator, device=source).to(device)
        tokens = torch.full((n, length + 1), self.num_codes, device=device)
        with _evaluating(self):
            memories = [_memory(block.mixer, n, self.places) for block in self.blocks]
            for place in range(length):
                x = (self.embed(tokens[:, place]) + self.places[place]).unsqueeze(1)
                for block, memory in zip(self.blocks, memories, strict=True):
                    x = block.step(x, memory, place)  # type: ignore[operator]
                logits = self.head(self.norm(x[:, 0])).double()
                # Differences first: at a low temperature the logits themselves could overflow.
                logits = (logits - logits.amax(-1, keepdim=True)) / temperature
                tokens[:, place + 1] = _draw(logits, uniform[place])
        return tokens[:, 1:].unflatten(1, self.token_shape)

    def _logits(self, tokens: Tensor) -> Tensor:
        """``(B, T' S, K)``."""
        start = tokens.new_full((len(tokens), 1), self.num_codes)
        x = self.embed(torch.cat([start, tokens.flatten(1)[:, :-1]], 1)) + self.places
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, future)
        return self.head(self.norm(x))

    def _check(self, tokens: Tensor) -> Tensor:
        tokens = check_tokens(tokens, self.num_codes)
        if tokens.dim() != 3 or tuple(tokens.shape[1:]) != self.token_shape:
            shape = ", ".join(map(str, self.token_shape))
            raise ValueError(f"tokens: expected shape (B, {shape}), got {tuple(tokens.shape)}.")
        return tokens

    def extra_repr(self) -> str:
        """What the prior was made with."""
        return f"{self.num_codes}, {self.token_shape}, dim={self.dim}, num_heads={self.num_heads}"


class CausalBlock(nn.Module):
    r"""A mixer and a perceptron, each beside a residual path and behind a norm.

    .. math::
        x \leftarrow x + \operatorname{mixer}(\operatorname{LN} x), \qquad
        x \leftarrow x + W_2 \operatorname{GELU}(W_1 \operatorname{LN} x)

    Args:
        dim: D.
        hidden: units of the perceptron.
        mixer: as for :class:`TokenPrior`.
        dropout: behind both.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        mixer: nn.Module,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixer_norm, self.norm = nn.LayerNorm(dim, **made), nn.LayerNorm(dim, **made)
        self.mixer = mixer
        self.perceptron = nn.Sequential(nn.Linear(dim, hidden, **made), nn.GELU(), nn.Linear(hidden, dim, **made))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, future: Tensor) -> Tensor:
        """All tokens at once.

        Args:
            x: ``(B, N, D)``.
            future: ``(N, N)``, ``True`` for keys behind the query.

        Returns:
            ``(B, N, D)``.
        """
        n = self.mixer_norm(x)
        return self._rest(x, self.mixer(n, n, n, attn_mask=future, is_causal=True, need_weights=False)[0])

    def step(self, x: Tensor, memory: Memory, place: int) -> Tensor:
        """The next token alone.

        Args:
            x: ``(B, 1, D)``.
            memory: of the tokens before, which takes in this one.
            place: how many there were.

        Returns:
            ``(B, 1, D)``, as the last of all tokens at once.
        """
        return self._rest(x, memory.attend(self.mixer_norm(x), place))

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        return x + self.dropout(self.perceptron(self.norm(x)))


class Memory(Protocol):
    """What a mixer has seen."""

    def attend(self, x: Tensor, place: int) -> Tensor:
        """Take in one token ``(B, 1, D)`` and mix it with those before; ``place`` is their number."""


class _Projected:
    """Keys and values of torch's attention."""

    def __init__(self, mixer: nn.MultiheadAttention, n: int, places: Tensor) -> None:
        self.mixer = mixer
        width = mixer.embed_dim // mixer.num_heads
        self.past = places.new_empty(2, n, mixer.num_heads, len(places), width)

    def attend(self, x: Tensor, place: int) -> Tensor:
        mixer = self.mixer
        projected = functional.linear(x, mixer.in_proj_weight, mixer.in_proj_bias)
        query, *new = projected.unflatten(-1, (3, mixer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.past[..., place : place + 1, :] = torch.stack(new)
        key, value = self.past[..., : place + 1, :]
        out = functional.scaled_dot_product_attention(query, key, value)
        return mixer.out_proj(out.transpose(1, 2).flatten(2))


class _Inputs:
    """Of any other mixer, what went in: it makes its keys anew at each step."""

    def __init__(self, mixer: nn.Module, n: int, places: Tensor) -> None:
        self.mixer = mixer
        self.past = places.new_empty(n, *places.shape)

    def attend(self, x: Tensor, place: int) -> Tensor:
        self.past[:, place] = x[:, 0]
        seen = self.past[:, : place + 1]
        return self.mixer(x, seen, seen, need_weights=False)[0]


def _memory(mixer: Any, n: int, places: Tensor) -> Memory:
    # No subclass: it may do something else with its projections.
    plain = type(mixer) is nn.MultiheadAttention and mixer._qkv_same_embed_dim
    kind = _Projected if plain and mixer.bias_k is None and not mixer.add_zero_attn else _Inputs
    return kind(mixer, n, places)


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token of each row of logits, by the inverse of the cumulative probabilities."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # Strictly above, so that a code without probability is never drawn; the last sum is 1 up to rounding only.
    place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(-1), right=True)
    return place.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _check_mixers(mixers: Sequence[nn.Module], depth: int) -> None:
    if isinstance(mixers, nn.Module) and not isinstance(mixers, nn.ModuleList):
        raise TypeError(f"mixers: expected a sequence, one module for each block, got one {type(mixers).__name__}.")
    if len(mixers) != depth:
        raise ValueError(f"mixers: expected one for each of {depth} blocks, got {len(mixers)}.")
    for mixer in mixers:
        if not isinstance(mixer, nn.Module):
            raise TypeError(f"mixers: expected modules, got {type(mixer).__name__}.")
        if not getattr(mixer, "batch_first", True):
            raise ValueError("mixers: expected batch_first=True.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards each part has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
