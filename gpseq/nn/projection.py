"""What all attention layers share: projections, masks, the layout of batches, and torch's contract."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.checks import check_count, check_floating, check_number
from gpseq.nn.generator import Draws
from gpseq.sgpa.masks import check_mask, removes


class Tokens(NamedTuple):
    """One call of a layer, batch first, checked, with padding set to zero.

    Attributes:
        query: ``(B, Tq, embed_dim)``.
        key: ``(B, Tk, kdim)``; the same tensor as ``query`` in self-attention.
        value: ``(B, Tk, vdim)``; the same tensor as ``key`` where they are the same input.
        key_padding_mask: ``(B, Tk)``, boolean or floating, or ``None``.
        attn_mask: broadcasts to ``(B, H, Tq, Tk)``, boolean or floating, or ``None``.
        is_causal: query t sees keys 1 to t; then there is no ``attn_mask``, and ``Tq == Tk``.
        need_weights: whether the matrix that multiplies the values is asked for.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool
    need_weights: bool

    @property
    def is_self(self) -> bool:
        """Whether the queries are the keys."""
        return self.query is self.key

    @property
    def removed(self) -> Tensor | None:
        """Which keys are padding, ``(B, Tk)``."""
        mask = self.key_padding_mask
        return None if mask is None else removes(mask)


class ProjectedAttention(Draws):
    """Base of attention layers with the constructor and forward contract of ``nn.MultiheadAttention``.

    It is no subclass of it, because in evaluation mode ``nn.TransformerEncoderLayer`` reads the weights of one off the
    module and computes softmax attention without calling it. The attributes that the stock layers ask for are here, and
    say that there is no such short cut.

    Subclasses implement :meth:`attend`, from tokens to heads.

    Attributes:
        embed_dim: width of the tokens, and of all heads together.
        num_heads: H.
        head_dim: D, ``embed_dim // num_heads``.
        batch_first: whether the batch is the first dimension or the second.
        dropout: share of keys whose value is dropped in training.
    """

    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        tied: bool,
        dropout: float,
        bias: bool,
        add_bias_kv: bool,
        add_zero_attn: bool,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_count("embed_dim", embed_dim)
        self.num_heads = check_count("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}.")
        if add_bias_kv or add_zero_attn:
            name = "add_bias_kv" if add_bias_kv else "add_zero_attn"
            raise ValueError(f"{name}: expected False: a key without a token is what inducing keys are.")
        if not 0 <= check_number("dropout", dropout, above=-1.0, expected="a number in [0, 1)") < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}.")
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else check_count("kdim", kdim)
        self.vdim = embed_dim if vdim is None else check_count("vdim", vdim)
        self.batch_first = bool(batch_first)
        self.dropout = float(dropout)
        self.tied = tied

        def weight(columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(embed_dim, columns, device=device, dtype=dtype))

        def row(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype)) if wanted else None

        self.query_weight = weight(embed_dim)
        # Where one kernel compares queries with keys, both go through one map, unless keys come from another space.
        self.key_weight = None if tied and self.kdim == embed_dim else weight(self.kdim)
        self.value_weight = weight(self.vdim)
        self.query_bias, self.key_bias = row(bias and not tied), row(bias and not tied)
        self.value_bias = row(bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    @property
    def in_proj_weight(self) -> nn.Parameter:
        """A weight for ``nn.TransformerEncoder``, which asks whether it is trained; nothing is computed from it."""
        return self.query_weight

    def reset_projections(self, value_gain: float = 1.0, query_gain: float = 1.0) -> None:
        """Draw the projections anew, as torch does for its attention; biases are zero.

        Args:
            value_gain: what the values' weights are multiplied by.
            query_gain: what those of queries and keys are.
        """
        for weight in (self.query_weight, self.key_weight, self.value_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        with torch.no_grad():
            self.value_weight.mul_(value_gain)
            self.query_weight.mul_(query_gain)
            if self.key_weight is not None:
                self.key_weight.mul_(query_gain)
        self.out_proj.reset_parameters()
        for bias in (self.query_bias, self.key_bias, self.value_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def attend(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """From tokens to heads.

        Args:
            tokens: of the call.

        Returns:
            Heads ``(B, H, Tq, D)``, and the matrix that multiplies the values, ``(B, H, Tq, Tk)``, if asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend().")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with the contract of ``nn.MultiheadAttention``.

        Args:
            query: ``(Tq, B, embed_dim)``, ``(B, Tq, embed_dim)`` with ``batch_first``, or ``(Tq, embed_dim)``.
            key: likewise with ``Tk`` and ``kdim``. In self-attention hand over one and the same tensor: it is then
                projected once, and padding is that of the queries too.
            value: likewise with ``Tk`` and ``vdim``.
            key_padding_mask: ``(B, Tk)``, or ``(Tk,)`` without a batch; boolean (True = ignore) or floating (added to
                the log kernel). What stands in padding does not matter; in self-attention its output is zero.
            need_weights: whether to return the matrix that multiplies the values; that takes memory of ``Tq Tk``.
            attn_mask: ``(Tq, Tk)`` or ``(B * num_heads, Tq, Tk)``, boolean (True = ignore) or floating.
            average_attn_weights: average the weights over heads.
            is_causal: query t sees keys 1 to t. As in torch it says what a given ``attn_mask`` is; unlike there it may
                come without one.

        Returns:
            The output in the layout of ``query``, and the weights, ``(B, Tq, Tk)`` or ``(B, num_heads, Tq, Tk)``, or
            ``None``.

        Raises:
            TypeError: an input is no floating-point tensor or not of the layer's dtype, or a mask is neither boolean
                nor floating.
            ValueError: a shape does not fit, a sequence is empty, or (on the CPU) an input is not finite.
        """
        if isinstance(query, Tensor) and query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        tokens, batched = self._tokens(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        heads, weights = self.attend(tokens)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        if weights is not None and not batched:
            weights = weights.squeeze(0)
        return self._output(heads, tokens, batched), weights

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, None]:
        """What ``nn.TransformerEncoder`` hands over in place of a padding mask: as many lengths as sequences."""
        if not (query is key is value and self.batch_first) or need_weights or query.layout != torch.strided:
            raise ValueError(
                "query: expected a padded tensor; nested ones (of strided layout) are taken in self-attention with "
                "batch_first=True and need_weights=False."
            )
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError("query: expected a padded tensor with a mask, got a nested one.")
        padded = query.to_padded_tensor(0.0)
        lengths = query._nested_tensor_size()[:, 0].to(padded.device)
        removed = torch.arange(padded.shape[1], device=padded.device) >= lengths.unsqueeze(-1)
        out, _ = self.forward(padded, padded, padded, removed, need_weights=False, is_causal=is_causal)
        return torch._nested_tensor_from_mask(out, ~removed, mask_check=False), None

    def project_query(self, tokens: Tensor) -> Tensor:
        """Queries of all heads, ``(B, H, T, D)`` of tokens ``(B, T, embed_dim)``."""
        return self.split(F.linear(tokens, self.query_weight, self.query_bias))

    def project_key(self, tokens: Tensor) -> Tensor:
        """Keys of all heads, ``(B, H, T, D)`` of tokens ``(B, T, kdim)``."""
        weight = self.query_weight if self.key_weight is None else self.key_weight
        return self.split(F.linear(tokens, weight, self.key_bias))

    def project_value(self, tokens: Tensor) -> Tensor:
        """Values of all heads, ``(B, H, T, D)`` of tokens ``(B, T, vdim)``; some are dropped in training."""
        value = self.split(F.linear(tokens, self.value_weight, self.value_bias))
        if not (self.training and self.dropout):
            return value
        # Whole keys are dropped: that is a posterior too, which dropping entries of a covariance is not.
        shape, generator = value[..., :1].shape, self.generator
        if generator is None:  # see `standard_normal`
            drawn = torch.rand(shape, dtype=torch.float32, device=value.device)
        else:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device=value.device)
        return value * (drawn >= self.dropout).to(value.dtype) / (1.0 - self.dropout)

    def split(self, tokens: Tensor) -> Tensor:
        """``(B, T, H D)`` as ``(B, H, T, D)``."""
        return tokens.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _tokens(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tokens, bool]:
        """The call, checked and batch first, and whether it came with a batch."""
        is_self, same_value = is_same(query, key), is_same(value, key)
        for name, tokens, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            dtype = check_floating(name, tokens).dtype
            if dtype != self.query_weight.dtype and not _autocasts(tokens):
                raise TypeError(f"{name}: expected the dtype of the layer, {self.query_weight.dtype}, got {dtype}.")
            if tokens.dim() not in (2, 3) or tokens.shape[-1] != width:
                raise ValueError(
                    f"{name}: expected shape (tokens, {width}) or, with a batch, three dimensions of which the last is "
                    f"{width}, got {tuple(tokens.shape)}."
                )
            if tokens.dim() != query.dim():
                raise ValueError(f"{name}: expected {query.dim()} dimensions as query has, got {tuple(tokens.shape)}.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if isinstance(key_padding_mask, Tensor):
                if key_padding_mask.dim() != 1:
                    got = tuple(key_padding_mask.shape)
                    raise ValueError(f"key_padding_mask: expected one dimension for inputs without a batch, got {got}.")
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        if key.shape[0] != batch:
            raise ValueError(f"key: expected a batch of {batch} as query has, got {key.shape[0]}.")
        if value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"value: expected batch and tokens {tuple(key.shape[:2])} of key, got {tuple(value.shape[:2])}."
            )
        for name, length in (("query", queries), ("key", keys)):
            if length == 0:
                raise ValueError(f"{name}: expected at least one token, got none.")
        removed = None
        if key_padding_mask is not None:
            check_mask("key_padding_mask", key_padding_mask, (batch, keys))
            if key_padding_mask.shape != (batch, keys):
                raise ValueError(
                    f"key_padding_mask: expected shape {(batch, keys)}, got {tuple(key_padding_mask.shape)}."
                )
            _check_log_weight("key_padding_mask", key_padding_mask)
            removed = removes(key_padding_mask)
            # Zeroed before anything is computed, so that NaN in padding reaches neither outputs nor gradients.
            removed = removed.unsqueeze(-1)
            key = key.masked_fill(removed, 0.0)
        query = key if is_self else query
        value = key if same_value else (value if removed is None else value.masked_fill(removed, 0.0))
        for name, tokens in (("query", query), ("key", key), ("value", value)):
            if not ((name == "key" and is_self) or (name == "value" and same_value)):
                _check_finite(name, tokens)
        attn_mask = self._attn_mask(attn_mask, batch, queries, keys)
        is_causal, attn_mask = self._causal(is_causal, attn_mask, query, key)
        return Tokens(query, key, value, key_padding_mask, attn_mask, is_causal, need_weights), batched

    def _output(self, heads: Tensor, tokens: Tokens, batched: bool) -> Tensor:
        """The output of heads ``(B, H, Tq, D)`` in the layout of the call, zero at padding."""
        out = self.out_proj(heads.transpose(-3, -2).flatten(-2).to(self.out_proj.weight.dtype))
        if tokens.is_self and tokens.removed is not None:
            out = out.masked_fill(tokens.removed.unsqueeze(-1), 0.0)
        return self._layout(out, batched)

    def _layout(self, rows: Tensor, batched: bool) -> Tensor:
        """Rows ``(B, Tq, ...)`` in the layout of the call."""
        if not batched:
            return rows.squeeze(0)
        return rows if self.batch_first else rows.transpose(0, 1)

    def _attn_mask(self, mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor | None:
        if mask is None:
            return None
        flat, single = (batch * self.num_heads, queries, keys), (queries, keys)
        if isinstance(mask, Tensor) and mask.shape not in (flat, single):
            raise ValueError(f"attn_mask: expected shape {single} or {flat}, got {tuple(mask.shape)}.")
        check_mask("attn_mask", mask, flat)
        _check_log_weight("attn_mask", mask)
        return mask if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads))

    def _causal(
        self, is_causal: bool, attn_mask: Tensor | None, query: Tensor, key: Tensor
    ) -> tuple[bool, Tensor | None]:
        if not is_causal:
            return False, attn_mask
        if query is key:
            return True, None  # the hint says what a given mask is
        if attn_mask is not None:
            return False, attn_mask
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"is_causal: expected as many queries as keys without an attn_mask, got {query.shape[1]} and "
                f"{key.shape[1]}."
            )
        length = query.shape[1]
        return False, torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)

    def extra_repr(self) -> str:
        """Widths and layout, as they stand in the printed model."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"

    def __getstate__(self) -> dict[str, Any]:
        # What the last call left behind holds a graph, and a generator is no part of a layer.
        return {name: value for name, value in super().__getstate__().items() if name not in self._transient}


def is_same(one: Any, other: Any) -> bool:
    """Whether two arguments are one tensor.

    Backward hooks and reentrant checkpointing hand over an alias for each argument, with the same numbers in the same
    place.
    """
    if one is other or not (
        isinstance(one, Tensor) and may_look(one) and isinstance(other, Tensor) and may_look(other)
    ):
        return one is other
    return (
        one.data_ptr() == other.data_ptr()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        and one.requires_grad == other.requires_grad
    )


def may_look(tokens: Tensor) -> bool:
    """Whether a branch on values is free: not where it waits for a device, is traced, or is under ``torch.func``."""
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if type(tokens) not in (Tensor, nn.Parameter):  # fake, distributed, or whatever else only looks like one
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tokens)


def _autocasts(tokens: Tensor) -> bool:
    return tokens.device.type != "meta" and torch.is_autocast_enabled(tokens.device.type)


def _check_finite(name: str, tokens: Tensor) -> None:
    # A sum is finite unless an entry is not, or it overflows; only then every entry is looked at.
    if may_look(tokens) and not tokens.detach().sum().isfinite() and not tokens.detach().isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in shape {tuple(tokens.shape)}.")


def _check_log_weight(name: str, mask: Tensor) -> None:
    # The maximum is NaN where an entry is.
    if mask.is_floating_point() and mask.numel() and may_look(mask) and not mask.detach().amax() < torch.inf:
        raise ValueError(f"{name}: expected finite numbers or -inf, got NaN or inf in shape {tuple(mask.shape)}.")
