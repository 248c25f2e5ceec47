"""Attention layers for tests: small, in float64, with parameters that are not those they start with."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.nn import SGPAttention

MODES = ("sgpa", "residual", "softmax_kernel")
KERNELS = ("rbf", "exponential")
COVARIANCES = ("shared", "per_dim", "diagonal", "low_rank")
SAMPLING = ("marginal", "joint", "pathwise", "mean")
EVERY_MEAN = [
    {"mode": mode, "kernel": kernel, "form": form}
    for mode, kernel, form in product(MODES, KERNELS, ("orthogonal", "cheng_boots"))
    if mode != "residual" or form == "orthogonal"
]
for _options in EVERY_MEAN:
    if _options["mode"] == "residual":
        _options["form"] = None


def name_of(options: dict[str, Any]) -> str:
    """Options as the name of a test."""
    return "-".join(str(value) for value in options.values() if value is not None)


def small(dtype: torch.dtype = torch.float64, moved: bool = True, **options: Any) -> SGPAttention:
    """A layer of 8 columns, 2 heads and 3 inducing keys, in a generic position."""
    layer = SGPAttention(8, 2, **{"num_inducing": 3, "batch_first": True, "dtype": dtype, **options})
    return move(layer) if moved else layer


def move(layer: SGPAttention) -> SGPAttention:
    """Away from the prior, so that every term of the posterior counts."""
    with torch.no_grad():
        layer.value_weight.normal_(std=0.3)
        layer.inducing.value.normal_()
        layer.inducing.log_diagonal.normal_(std=0.3)
        layer.inducing.log_lengthscale.add_(0.2 * torch.randn_like(layer.inducing.log_lengthscale))
        layer.inducing.log_variance.fill_(-0.5)
        for entries in (layer.inducing.lower, layer.inducing.root, layer.value_bias, layer.query_bias, layer.key_bias):
            if entries is not None:
                entries.normal_(std=0.3)
    return layer


def mean_of(layer: SGPAttention, *inputs: Tensor, **masks: Any) -> Tensor:
    """What the layer puts out without a draw."""
    before, layer.sampling = layer.sampling, "mean"
    out, _ = layer(*inputs, **{"need_weights": False, **masks})
    layer.sampling = before
    return out


def trained_attention(dtype: torch.dtype = torch.float64, **options: Any) -> nn.MultiheadAttention:
    """Stock attention of the same size, with biases that are not zero."""
    torch_layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype, **options)
    with torch.no_grad():
        for bias in (torch_layer.in_proj_bias, torch_layer.out_proj.bias):
            if bias is not None:
                bias.normal_(std=0.3)
    return torch_layer


def take_weights(layer: SGPAttention, trained: nn.MultiheadAttention) -> SGPAttention:
    """Give a layer in mode ``"residual"`` the weights of stock attention."""
    if trained.in_proj_weight is None:
        weights = (trained.q_proj_weight, trained.k_proj_weight, trained.v_proj_weight)
    else:
        weights = trained.in_proj_weight.chunk(3)
    with torch.no_grad():
        for mine, theirs in zip((layer.query_weight, layer.key_weight, layer.value_weight), weights, strict=True):
            mine.copy_(theirs)
        if trained.in_proj_bias is not None:
            for mine, theirs in zip(
                (layer.query_bias, layer.key_bias, layer.value_bias), trained.in_proj_bias.chunk(3), strict=True
            ):
                mine.copy_(theirs)
        layer.out_proj.load_state_dict(trained.out_proj.state_dict())
    return layer
