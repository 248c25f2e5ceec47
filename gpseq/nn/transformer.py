"""Torch's transformer encoder with sparse-GP attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpseq.nn.attention import SGPAttention


class SGPATransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` whose ``self_attn`` is an :class:`~gpseq.nn.SGPAttention`.

    The first arguments are those of torch's layer, in its order.

    Args:
        d_model: width of the tokens.
        nhead: H.
        dim_feedforward: width of the feed-forward part.
        dropout: of its hidden units and of both branches, and share of keys whose value is dropped.
        activation: of the feed-forward part.
        layer_norm_eps: of the norms.
        batch_first: whether the batch is the first dimension or the second.
        norm_first: whether the norms come before their branches.
        bias: of all linear maps and norms.
        device: of the parameters.
        dtype: of the parameters.
        num_inducing: M, inducing keys a head.
        options: further arguments of :class:`~gpseq.nn.SGPAttention`.

    Shape:
        As ``nn.TransformerEncoderLayer``.

    Example:
        >>> layer = SGPATransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True, num_inducing=4)
        >>> layer(torch.randn(3, 5, 8)).shape, bool(layer.kl_divergence() < 3.0)
        (torch.Size([3, 5, 8]), True)
    """

    self_attn: SGPAttention  # type: ignore[assignment]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_inducing: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self.self_attn = SGPAttention(
            d_model,
            nhead,
            num_inducing,
            **{"dropout": dropout, "bias": bias, **options},
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for child in self.children():
            if isinstance(child, SGPAttention | nn.Linear | nn.LayerNorm):
                child.reset_parameters()

    def kl_divergence(self, num_data: int | None = None, convention: str | None = None) -> Tensor:
        """Of the attention, see :meth:`gpseq.nn.SGPAttention.kl_divergence`."""
        return self.self_attn.kl_divergence(num_data, convention)


class SGPATransformerEncoder(nn.TransformerEncoder):
    """A stack of layers with sparse-GP attention, each with parameters of its own.

    ``nn.TransformerEncoder`` copies one layer with its parameters, so that all inducing keys start at the same places.
    Here the layer is a template: its copies have its options, and are drawn anew. For layers that are trained already,
    and should be copied as they are, there is torch's encoder.

    Args:
        encoder_layer: the template; it is not part of the stack.
        num_layers: how many copies.
        norm: after the last one, or ``None``.
        mask_check: as in ``nn.TransformerEncoder``.

    Shape:
        As ``nn.TransformerEncoder``. Nested tensors are off.

    Raises:
        TypeError: the template is another layer.

    Example:
        >>> layer = SGPATransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True, num_inducing=4)
        >>> encoder = SGPATransformerEncoder(layer, num_layers=2)
        >>> encoder(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        encoder_layer: SGPATransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        mask_check: bool = True,
    ) -> None:
        if not isinstance(encoder_layer, SGPATransformerEncoderLayer):
            raise TypeError(
                f"encoder_layer: expected an SGPATransformerEncoderLayer, got {type(encoder_layer).__name__}."
            )
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, those of each layer by themselves."""
        for layer in self.layers:
            assert isinstance(layer, SGPATransformerEncoderLayer)
            layer.reset_parameters()
