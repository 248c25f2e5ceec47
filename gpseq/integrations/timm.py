"""Gaussian processes inside the vision transformers of timm.

Importing this module teaches :func:`gpseq.nn.replace_attention` timm's ``Attention``; :class:`GPAttention` is what its
models take as ``attn_layer``. Nothing of timm is imported: the classes meet by their contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.nn.residual import ResidualGP
from gpseq.nn.surgery import Host, register_host, swap

#: Parts of timm's attention; the same names here, so that its checkpoints load.
PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")


class GPAttention(nn.Module):
    """timm's attention plus a Gaussian process, for ``VisionTransformer(attn_layer=GPAttention)``.

    Softmax attention with the parts of timm's own, under the same names, is the mean; ``gp`` is a
    :class:`~gpseq.nn.residual.ResidualGP` on the queries. With ``functools.partial`` options of the GP are chosen.

    Args:
        dim: width of the tokens.
        num_heads: H.
        attn_head_dim: D; ``None`` is ``dim // num_heads``.
        dim_out: width of the output; ``None`` is ``dim``.
        qkv_bias: of queries, keys and values.
        qk_norm: whether queries and keys are normed.
        scale_norm: whether the heads are, before the output map.
        proj_bias: of the output map.
        attn_drop: dropout of attention weights.
        proj_drop: of the output.
        norm_layer: class of the norms, needed where there are any.
        device: of the parameters.
        dtype: of the parameters.
        num_inducing: M, inducing keys a head.
        options: further arguments of :class:`~gpseq.nn.residual.ResidualGP`.

    Shape:
        ``(B, T, dim)`` to ``(B, T, dim_out)``.

    Example:
        >>> layer = GPAttention(8, num_heads=2, num_inducing=4)
        >>> layer(torch.randn(3, 5, 8)).shape, layer.gp.kl_divergence().item()
        (torch.Size([3, 5, 8]), 0.0)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., torch.nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_inducing: int = 16,
        **options: Any,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}.")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer: expected a class where queries, keys or heads are normed, got None.")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, attn_head_dim or dim // num_heads
        width = num_heads * self.head_dim

        def norm(wanted: bool, size: int) -> nn.Module:
            return norm_layer(size, **place) if wanted and norm_layer is not None else nn.Identity()

        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias, **place)
        self.q_norm, self.k_norm = norm(qk_norm, self.head_dim), norm(qk_norm, self.head_dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(scale_norm, width)
        self.proj = nn.Linear(width, dim_out or dim, bias=proj_bias, **place)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gp = ResidualGP(num_heads, self.head_dim, num_inducing, **place, **options)

    @classmethod
    def from_attention(cls, attention: nn.Module, **options: Any) -> GPAttention:
        """With the parts of an attention of timm, which both share then.

        Args:
            attention: of timm.
            options: of :class:`~gpseq.nn.residual.ResidualGP`.
        """
        old: Any = attention
        weight = old.qkv.weight
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.num_heads = int(old.num_heads)
        new.head_dim = weight.shape[0] // (3 * new.num_heads)
        for name in PARTS:
            new.add_module(name, getattr(old, name, None) or nn.Identity())
        new.gp = ResidualGP(new.num_heads, new.head_dim, device=weight.device, dtype=weight.dtype, **options)
        new.training = attention.training
        new.gp.train(attention.training)
        return new

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention of tokens to each other.

        Args:
            x: ``(B, T, dim)``.
            attn_mask: as timm has it, boolean (True = attend) or added to the scores; broadcasts to ``(B, H, T, T)``.
            is_causal: token t sees 1 to t; then ``attn_mask`` is not used.

        Returns:
            ``(B, T, dim_out)``.
        """
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        drop = self.attn_drop.p if self.training and isinstance(self.attn_drop, nn.Dropout) else 0.0
        mask = None if is_causal else attn_mask
        heads = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=drop, is_causal=is_causal)
        heads = self.gp(query, heads, mask)
        return self.proj_drop(self.proj(self.norm(heads.transpose(1, 2).flatten(-2))))


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is timm's ordinary attention, and not a relative with another contract."""
    kind = type(module)
    return kind.__name__ == "Attention" and kind.__module__.split(".")[0] == "timm" and hasattr(module, "qkv")


def _prepare(
    model: nn.Module, found: Mapping[str, nn.Module], options: Mapping[str, Any]
) -> Callable[[nn.Module], nn.Module]:
    if options["mode"] != "residual":
        raise ValueError(
            "mode: expected 'residual' for attention of timm, whose queries and keys have maps of their own, got "
            f"{options['mode']!r}."
        )
    own = {name: value for name, value in options.items() if name != "mode"}
    made = {module: GPAttention.from_attention(module, **own) for module in found.values()}
    return lambda model: swap(model, made)


register_host(Host("timm", _is_attention, _prepare))
