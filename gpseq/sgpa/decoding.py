"""Causal attention one token at a time: a state that holds the past, and the step that extends it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpseq.sgpa.arguments import check_choice, check_inducing, check_kernel, check_tokens
from gpseq.sgpa.basis import (
    algebra_dtype,
    exponential_factor,
    inducing_basis,
    inducing_spread,
    scale_tokens,
    without_autocast,
)
from gpseq.sgpa.rbf import rbf_product
from gpseq.sgpa.scales import Scale


class DecodingState(NamedTuple):
    """What causal attention keeps of the tokens so far.

    Attributes:
        key: ``(*batch, H, T, dq)``, divided by the length-scale.
        value: ``(*batch, H, T, D)``.
        explained: running sum of whitened features times values, ``(*batch, H, M, D)``, at least float32.
    """

    key: Tensor
    value: Tensor
    explained: Tensor

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, num_inducing: int) -> DecodingState:
        """The state before the first token; ``key`` and ``value`` of any length give shapes, dtype and device."""
        explained = (*value.shape[:-2], num_inducing, value.shape[-1])
        return cls(key[..., :0, :], value[..., :0, :], value.new_zeros(explained, dtype=algebra_dtype(value)))


def decode(
    state: DecodingState,
    query: Tensor,
    value: Tensor,
    inducing_key: Tensor,
    inducing_value: Tensor,
    inducing_scale_tril: Scale,
    lengthscale: Tensor,
    variance: Tensor,
    kernel: str = "rbf",
    jitter: float | None = None,
    form: str = "orthogonal",
) -> tuple[Tensor, Tensor, DecodingState]:
    r"""Marginals of the next token given all before it.

    .. math:: m_t = \sum_{s \le t} k(q_t, k_s)\, v_s - V_t R_t + K_{tg} v_g, \qquad R_t = \sum_{s \le t} V_s^\top v_s

    The same as the last row of :func:`decoupled_posterior` with ``is_causal=True`` over the whole sequence. The form of
    Cheng and Boots has no :math:`R`.

    Args:
        state: of the tokens before.
        query: of the token, which is its key too, ``(*batch, H, 1, dq)``.
        value: of the token, ``(*batch, H, 1, D)``.
        inducing_key: ``(H, M, dq)``.
        inducing_value: ``(H, M, D)``.
        inducing_scale_tril: whitened, as for :func:`decoupled_posterior`.
        lengthscale: ``(H, dq)``.
        variance: ``(H,)``.
        kernel: ``"rbf"`` or ``"exponential"``.
        jitter: relative; ``None`` fits the dtype of the queries.
        form: ``"orthogonal"`` or ``"cheng_boots"``.

    Returns:
        Mean ``(*batch, H, 1, D)``, variance ``(*batch, H, D, 1)`` and the state with the token.

    Raises:
        TypeError: the token is no floating-point tensor.
        ValueError: shapes do not fit each other or the state, or an option is unknown.

    Example:
        >>> x, g, ones = torch.randn(2, 5, 3), torch.randn(2, 4, 3), torch.ones(2, 3)  # two heads, five tokens
        >>> parameters = g, torch.zeros(2, 4, 3), torch.eye(4).expand(2, 1, 4, 4), ones, ones[:, 0]
        >>> state = DecodingState.empty(x, x, num_inducing=4)
        >>> for t in range(5):
        ...     mean, variance, state = decode(state, x[:, t : t + 1], x[:, t : t + 1], *parameters)
        >>> state.key.shape, mean.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 1, 3]))
    """
    check_choice("kernel", kernel, ("rbf", "exponential"))
    check_choice("form", form, ("orthogonal", "cheng_boots"))
    check_tokens(query, query, value)
    check_kernel(query, lengthscale, variance)
    check_inducing(query, value, inducing_key, inducing_value, inducing_scale_tril)
    wanted = (*value.shape[:-2], inducing_key.shape[-2], value.shape[-1])
    if query.shape[-2] != 1 or state.explained.shape != wanted:
        got = f"{query.shape[-2]} tokens and a state of shape {tuple(state.explained.shape)}"
        raise ValueError(f"state: expected one token and a state of shape {wanted}, got {got}.")
    working = algebra_dtype(query)
    with without_autocast(query):
        q, v, v_g, factor = scale_tokens(query, lengthscale), value, inducing_value.to(working), None
        basis = inducing_basis(inducing_key, lengthscale, variance, query, jitter)
        if kernel == "exponential":
            factor = exponential_factor(q.to(working))
            v, v_g = v * factor.to(v.dtype), v_g * exponential_factor(basis.key)
        cross = basis.covariance(q)
        features = basis.whitening.features(cross)
        state = DecodingState(
            torch.cat([state.key, q], -2),
            torch.cat([state.value, v], -2),
            state.explained + features.mT @ v.to(working),
        )
        mean = basis.variance * rbf_product(q, state.key, state.value).to(working) + cross @ v_g
        mean = mean - features @ state.explained if form == "orthogonal" else mean
        mean = mean if factor is None else mean * factor
        spread, _ = inducing_spread(basis, q, features, inducing_scale_tril, factor, "diagonal")
    assert spread is not None
    return mean.to(query.dtype), spread, state
