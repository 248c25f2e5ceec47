"""Two networks that answer a sequence with a function: a stack of sparse-GP attention, and ordinary attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from linear_operator.operators import DiagLinearOperator
from torch import Tensor, nn

from gpseq.nn import SGPAttention


class AttentionGP(nn.Module):
    """Kernel attention that works out the values, and one sparse-GP attention layer that is the model.

    Queries and keys of every layer are the times; what travels is the values. A layer of the stack makes
    ``h <- A h + K h B`` of them: a step of an iterative solver whose matrices and length-scales are learnt. It begins
    as ``h <- h - K h / 5``. The stack draws nothing: it is an inference network, free to choose any values, and pays
    no divergence. Only the last layer is a Gaussian process, with a kernel that is given and stays.

    Args:
        times: of the tokens, ``(T,)``.
        lengthscale: of the given kernel, whose variance is 1.
        num_layers: of the stack.
        width: numbers a token that travel through it.
        form: of the mean of the last layer.
    """

    def __init__(
        self, times: Tensor, lengthscale: float, num_layers: int = 8, width: int = 2, form: str = "cheng_boots"
    ) -> None:
        super().__init__()
        self.register_buffer("times", times)
        self.embed = nn.Linear(1, width, bias=False)
        self.mixes = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))
        # One head a number: each has a length-scale of its own. In the Cheng-Boots form with inducing values of zero
        # the mean is plain kernel attention.
        self.layers = nn.ModuleList(
            SGPAttention(
                width,
                width,
                num_inducing=1,
                sampling="mean",
                form="cheng_boots",
                value_scale=None,
                bias=False,
                batch_first=True,
            )
            for _ in range(num_layers)
        )
        self.last = known_layer(times, lengthscale, width, form=form)
        with torch.no_grad():
            for mix, layer in zip(self.mixes, self.layers, strict=True):
                nn.init.eye_(mix.weight)
                for weight in (layer.query_weight, layer.value_weight, layer.out_proj.weight):
                    nn.init.eye_(weight)
                layer.out_proj.weight.mul_(-0.2)
                layer.inducing.log_lengthscale.fill_(math.log(lengthscale))
                layer.inducing.log_variance.zero_()
        for layer in self.layers:
            for parameter in (layer.query_weight, *layer.inducing.parameters()):
                parameter.requires_grad_(parameter is layer.inducing.log_lengthscale)

    def values(self, y: Tensor, removed: Tensor | None = None) -> Tensor:
        """Hidden state of the tokens, ``(B, T, width)``, of observations ``(B, T)``."""
        h = self.embed(y.unsqueeze(-1))
        time = self.times[:, None].expand(*h.shape)
        for mix, layer in zip(self.mixes, self.layers, strict=True):
            h = mix(h) + layer(time, time, h, key_padding_mask=removed, need_weights=False)[0]
        return h

    def forward(self, y: Tensor) -> Tensor:
        """A draw of f at the times of the tokens, ``(B, T)``."""
        time = self.times[:, None].expand(len(y), -1, 1)
        return self.last(time, time, self.values(y), need_weights=False)[0].squeeze(-1)

    def conditional(self, y: Tensor, query: Tensor, removed: Tensor | None = None) -> tuple[Tensor, DiagLinearOperator]:
        """Mean and variance of f at any times ``(n,)``, each ``(B, n)``; what is removed is True in ``(B, T)``."""
        mean, covariance = self.last.conditional(
            query[:, None].expand(len(y), -1, 1),
            key=self.times[:, None].expand(len(y), -1, 1),
            value=self.values(y, removed),
            key_padding_mask=removed,
        )
        return mean.squeeze(-1), DiagLinearOperator(covariance.to_dense().squeeze((-2, -1)))


def known_layer(times: Tensor, lengthscale: float, width: int, **options: Any) -> SGPAttention:
    """A layer of one head and one dimension on times, with unit prior variance and projections that do nothing.

    In the Cheng-Boots form the mean needs no inducing values: ``K_qa v`` alone can be the exact posterior's, whatever
    the sequence. In the orthogonal form the mean at the inducing keys would be the same for all sequences.
    """
    options = {"form": "cheng_boots", "value_scale": None, "bias": False, "batch_first": True, **options}
    layer = SGPAttention(1, 1, num_inducing=len(times), vdim=width, dtype=times.dtype, **options)
    kernel = layer.inducing
    with torch.no_grad():
        layer.query_weight.fill_(1.0)
        layer.out_proj.weight.fill_(1.0)
        kernel.location.copy_(times[None, :, None])
        kernel.log_lengthscale.fill_(math.log(lengthscale))
        kernel.log_variance.zero_()
    for given in (layer.query_weight, layer.out_proj.weight, kernel.log_lengthscale, kernel.log_variance):
        given.requires_grad_(False)
    return layer


class SoftmaxNetwork(nn.Module):
    """A transformer on tokens (time, observation), asked at other times: mean and log variance of an observation.

    Args:
        times: of the tokens, ``(T,)``.
        width: of the tokens in the network.
    """

    def __init__(self, times: Tensor, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("times", times)
        self.register_buffer("frequencies", math.pi * torch.arange(1, 9) / 14)
        features = 2 * len(self.frequencies)
        self.embed = nn.Linear(1 + features, width)
        self.ask = nn.Linear(features, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))

    def conditional(self, y: Tensor, query: Tensor, removed: Tensor | None = None) -> tuple[Tensor, DiagLinearOperator]:
        """Mean and variance of observations at any times ``(n,)``, each ``(B, n)``."""
        tokens = torch.cat([y.unsqueeze(-1), self._waves(self.times).expand(len(y), -1, -1)], -1)
        h = self.encoder(self.embed(tokens), src_key_padding_mask=removed)
        asked = self.ask(self._waves(query)).expand(len(y), -1, -1)
        h = asked + self.last(asked, h, h, key_padding_mask=removed, need_weights=False)[0]
        mean, log_variance = self.head(h).unbind(-1)
        return mean, DiagLinearOperator(log_variance.clamp(-6.0, 4.0).exp())

    def _waves(self, time: Tensor) -> Tensor:
        angle = time.unsqueeze(-1) * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)
