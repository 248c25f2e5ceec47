"""Checks of shapes and options of attention."""

from __future__ import annotations

from torch import Tensor

from gpseq.sgpa.scales import DiagonalScale, LowRankScale, Scale


def check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    """That an option is one of those there are.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    """That queries, keys and values of a sequence fit each other.

    Raises:
        TypeError: one of them is no floating-point tensor, or of another dtype than the others.
        ValueError: there is no token, or shapes do not fit.
    """
    for name, tokens in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}.")
        if tokens.dtype != query.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {tokens.dtype}.")
        if tokens.dim() < 3:
            raise ValueError(f"{name}: expected shape (*batch, heads, tokens, width), got {tuple(tokens.shape)}.")
        if tokens.shape[-2] == 0:
            raise ValueError(f"{name}: expected at least one token, got shape {tuple(tokens.shape)}.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: expected the width of query, {query.shape[-1]}, got shape {tuple(key.shape)}.")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value: expected {tuple(key.shape[:-1])} and a width, as of key, got {tuple(value.shape)}.")
    if query.shape[:-2] != key.shape[:-2]:
        raise ValueError(f"query: expected leading dimensions {tuple(key.shape[:-2])}, got {tuple(query.shape[:-2])}.")


def check_kernel(query: Tensor, lengthscale: Tensor, variance: Tensor) -> None:
    """That a kernel has one length-scale for each column of a head and one variance a head.

    Raises:
        ValueError: it has not.
    """
    heads, width = query.shape[-3], query.shape[-1]
    if lengthscale.shape != (heads, width):
        raise ValueError(f"lengthscale: expected shape {(heads, width)}, got {tuple(lengthscale.shape)}.")
    if variance.shape != (heads,):
        raise ValueError(f"variance: expected shape {(heads,)}, got {tuple(variance.shape)}.")


def check_inducing(query: Tensor, value: Tensor, inducing_key: Tensor, inducing_value: Tensor, scale: Scale) -> None:
    """That inducing keys, their values and their covariance fit the tokens.

    Raises:
        ValueError: they do not.
    """
    heads, width, dims = query.shape[-3], query.shape[-1], value.shape[-1]
    if inducing_key.dim() != 3 or inducing_key.shape[0] != heads or inducing_key.shape[-1] != width:
        raise ValueError(f"inducing_key: expected shape ({heads}, M, {width}), got {tuple(inducing_key.shape)}.")
    size = inducing_key.shape[-2]
    if inducing_value.shape != (heads, size, dims):
        raise ValueError(f"inducing_value: expected shape {(heads, size, dims)}, got {tuple(inducing_value.shape)}.")
    check_scale("inducing_scale_tril", scale, heads, dims, size)


def check_scale(name: str, scale: Scale, heads: int, dims: int, size: int) -> None:
    """That the whitened covariance has the shape of ``heads`` heads, ``dims`` dimensions and ``size`` inducing keys.

    Raises:
        TypeError: it is no tensor, DiagonalScale or LowRankScale.
        ValueError: it has not.
    """
    wanted: tuple[int, ...]
    if isinstance(scale, Tensor):
        found, wanted = tuple(scale.shape), (size, size)
    elif isinstance(scale, DiagonalScale):
        found, wanted = tuple(scale.std.shape), (size,)
    elif not isinstance(scale, LowRankScale):
        raise TypeError(f"{name}: expected a tensor, DiagonalScale or LowRankScale, got {type(scale).__name__}.")
    else:
        found, wanted = tuple(scale.root.shape), (size, *scale.root.shape[-1:])
        if tuple(scale.std.shape) != found[:-1]:
            raise ValueError(f"{name}: expected std of shape {found[:-1]}, got {tuple(scale.std.shape)}.")
    if found not in ((heads, dims, *wanted), (heads, 1, *wanted)):
        expected = f"{(heads, dims, *wanted)} or {(heads, 1, *wanted)}"
        raise ValueError(f"{name}: expected shape {expected}, got {found}.")
