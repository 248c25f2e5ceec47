"""Covariances of a trained model's Gaussian processes in closed form, from the tokens that it sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpseq.checks import check_count, check_number
from gpseq.nn.capture import (
    Forward,
    Layer,
    TokenSample,
    called,
    check_fittable,
    layers_with_keys,
    look_through,
    mean_depends_on_keys,
)
from gpseq.nn.inducing import project_keys
from gpseq.nn.placement import place
from gpseq.nn.surgery import is_replaced, replace_attention, unchanged_on_error
from gpseq.sgpa.basis import exponential_factor, scale_tokens
from gpseq.sgpa.inducing import inducing_features


def fit_covariance(
    model: nn.Module,
    loader: Iterable[Any],
    num_inducing: int = 64,
    weight: float = 1e4,
    noise: float = 0.1,
    num_batches: int = 25,
    max_tokens: int = 8192,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Teach the Gaussian processes of a trained model where its data are, in place; its mean is untouched.

    The whitened covariance of the inducing variables of every head becomes that of a Bayesian linear regression on the
    features of real tokens,

    .. math:: S = \Bigl( I + \frac{w}{n} \sum_{i=1}^n a_i a_i^\top \Bigr)^{-1}, \qquad a_i = L^{-1} k(z, q_i) / s,

    with the kernel's variance :math:`s^2` and :math:`L L^\top` its matrix at the inducing keys z. Nothing is trained,
    no label is needed, and one pass over some data is enough. A variance is small at tokens like those and returns to
    the prior's elsewhere; :func:`gpseq.nn.calibrate` then turns it into a temperature.

    A model without Gaussian processes gets them first, by :func:`gpseq.nn.replace_attention` in mode ``"residual"``
    with ``sampling="mean"``: called as before, it computes what it did before. Its inducing keys are k-means centres of
    real queries, length-scales the median distance of two, and the prior variance is such that noise on real tokens has
    ``noise`` times the standard deviation of the heads. Layers that are there already keep the way in which they draw,
    and only those whose mean does not depend on keys (mode ``"residual"`` with inducing values of zero) get new keys,
    length-scales and variances; of others nothing but the covariance is set. Where some attention has Gaussian
    processes already, no other gets one, and attention without inducing keys (:class:`~gpseq.nn.KEPAttention`,
    :class:`~gpseq.nn.RFFAttention`, plain attention beside Gaussian processes) has no variance here and counts nowhere.

    Parameters are made anew where attention is replaced: build the optimiser afterwards. Nothing is frozen, and
    variances are those of the weights of now: after further training, fit and calibrate again, or leave it to
    :class:`gpseq.nn.CovarianceRefit`. Padding is left out. Of the queries of cross-attention it is known where the
    self-attention before it, of the same decoder layer, has a Gaussian process too; elsewhere all of them count.

    Args:
        model: any module with attention that can be replaced, or was.
        loader: batches: tensors; tuples or lists, whose first element goes to the model; or mappings,
            ``model(**batch)``. The benchmarks use 2,000 examples.
        num_inducing: M, inducing keys a head, for attention that is replaced here; layers that have Gaussian processes
            already keep their number.
        weight: w, how many observations with unit noise the tokens are worth together. Results hardly change above
            1e3.
        noise: standard deviation of the noise on real tokens, relative to that of the heads. It matters for draws only:
            scores of variance are relative.
        num_batches: how many batches are used at most.
        max_tokens: how many tokens of a layer are used at most, drawn evenly from all that it sees.
        forward: called as ``forward(model, batch)`` in place of the above.
        generator: of the draws, on the CPU; ``None`` is torch's default generator.

    Returns:
        The model; where it is itself an attention without a Gaussian process, what replaces it.

    Raises:
        RuntimeError: a layer was not called.
        TypeError: a batch is of another kind.
        ValueError: there is no attention, no batch, a layer sees fewer distinct tokens than it has inducing keys or
            has a covariance of low rank, or a number is out of its range. The model is as it was.

    Source:
        Derived in the guide "A trained model's uncertainty"; the covariance is the Laplace approximation that Liu et
        al. (2020), Simple and principled uncertainty estimation with deterministic deep learning, use for the last
        layer of a network.

    Example:
        >>> from gpseq.nn import use_sampling
        >>> _ = torch.manual_seed(0)
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        >>> x = torch.randn(16, 5, 8)
        >>> before = model(x)
        >>> model = fit_covariance(model, [x], num_inducing=8)
        >>> bool(torch.allclose(model(x), before, atol=1e-5))
        True
        >>> layer = model.layers[0].self_attn
        >>> near, far = layer.posterior(x, x, x).variance, layer.posterior(9 * x, 9 * x, 9 * x).variance
        >>> bool(near.mean() < far.mean())
        True
    """
    check_count("num_inducing", num_inducing)
    check_count("num_batches", num_batches)
    weight = check_number("weight", weight, above=0.0, expected="a positive number")
    noise = check_number("noise", noise, above=0.0, expected="a positive number")
    sample = TokenSample(max_tokens, generator, heads=True)
    with unchanged_on_error(model):
        if not any(is_replaced(module) for module in model.modules()):
            model = replace_attention(model, mode="residual", num_inducing=num_inducing, sampling="mean")
        check_fittable(layers_with_keys(model))
        layers = look_through(model, loader, sample.add, num_batches, forward)
        with torch.no_grad():
            fitted = {name: _fit(name, layer, sample, weight, noise, generator) for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            _install(layer, fitted[name])
    return model


class _Fitted(NamedTuple):
    """What a fit gives for the heads of a layer."""

    location: Tensor  # (H, M, width)
    lengthscale: Tensor  # (H, D)
    variance: Tensor  # (H,)
    scale_tril: Tensor  # (H, M, M), whitened
    typical: Tensor  # (H,)


def _fit(
    name: str, layer: Layer, sample: TokenSample, weight: float, noise: float, generator: torch.Generator | None
) -> _Fitted:
    """The covariance of a layer, and where its keys may move, those and the kernel too."""
    inducing, queries = layer.inducing, sample.queries(name)
    location, lengthscale, variance = (
        inducing.location.detach().cpu(),
        inducing.log_lengthscale.detach().exp().cpu(),
        inducing.log_variance.detach().exp().cpu(),
    )
    is_free = not mean_depends_on_keys(layer)
    if is_free:
        location, scale = place(name, layer, sample.rows(name), queries, "kmeans", generator)
        location, lengthscale = location.to(inducing.location.dtype), scale.unsqueeze(-1).expand_as(lengthscale)
    features, prior = _features(layer, queries, location, lengthscale.to(queries.dtype))
    if not features.isfinite().all():
        raise ValueError(f"loader: expected finite tokens, {called(name)} sees others.")
    size = features.shape[-1]
    precision = torch.eye(size, dtype=features.dtype) + weight * (features.mT @ features) / features.shape[-2]
    if layer.covariance == "diagonal":
        scale_tril = torch.diag_embed(precision.diagonal(dim1=-2, dim2=-1).rsqrt())
    else:
        scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
    # Of the tokens: the prior's, less what the inducing variables explain, plus what is not known of those.
    known = features.square().sum(-1) - (features @ scale_tril).square().sum(-1)
    left = (prior - known).clamp_min(0.0).mean(-1)
    if is_free:
        signal = sample.heads(name).double().var(0, correction=0).mean(-1)
        # Heads that are constant have no scale of their own.
        signal = torch.where(signal > 0, signal, signal.mean().clamp_min(torch.finfo(queries.dtype).tiny))
        variance = noise**2 * signal / left
    return _Fitted(location, lengthscale, variance, scale_tril, variance * left)


def _features(layer: Layer, queries: Tensor, location: Tensor, lengthscale: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened features of tokens, ``(H, n, M)``, and their prior variances, ``(H, n)``, at a unit kernel variance."""
    weight, bias = layer.kernel_options().get("weight"), layer.kernel_options().get("bias")
    keys = project_keys(location, None if weight is None else weight.cpu(), None if bias is None else bias.cpu())
    query = queries.transpose(0, 1)
    unit = torch.ones(len(keys), dtype=query.dtype)
    features = inducing_features(query, keys.to(query.dtype), lengthscale, unit, layer.jitter).double()
    if layer.kernel == "exponential":
        factor = exponential_factor(scale_tokens(query, lengthscale)).double()
        return features * factor, factor.squeeze(-1).square()
    return features, torch.ones(features.shape[:-1], dtype=features.dtype)


def _install(layer: Layer, fitted: _Fitted) -> None:
    inducing = layer.inducing
    inducing.location.copy_(fitted.location)
    inducing.log_lengthscale.copy_(fitted.lengthscale.log())
    inducing.log_variance.copy_(fitted.variance.log())
    scale = fitted.scale_tril.unsqueeze(1)
    inducing.log_diagonal.copy_(scale.diagonal(dim1=-2, dim2=-1).log().expand_as(inducing.log_diagonal))
    if inducing.lower is not None:
        inducing.lower.copy_(scale.tril(-1).expand_as(inducing.lower))
    inducing.forget_fit()  # a temperature that was calibrated before was that of other variances
    inducing.typical_variance.copy_(fitted.typical)
