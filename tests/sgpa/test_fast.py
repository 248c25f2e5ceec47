"""The hot path: derivatives written out against automatic differentiation of the plain functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpseq.sgpa import decoupled_posterior, fast
from gpseq.sgpa.fast import Prepared, attend, attend_plainly, prepare, prepare_plainly
from gpseq.sgpa.quadratic import quadratic_form, quadratic_gradients


def parameters(heads: int, size: int, width: int, dims: int, own: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weight of an input of width 6, location, value, log length-scale, log variance, lower, log diagonal."""
    shapes = [(heads * width, 6), (heads, size, 6), (heads, size, dims), (heads, width), (heads,)]
    shapes += [(heads, own, size, size), (heads, own, size)]
    return tuple((0.5 * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes)


def heads_of(x: Tensor, prepared: Prepared, heads: int) -> Tensor:
    return (x @ prepared.weight.mT + prepared.shift).unflatten(-1, (heads, -1)).transpose(-3, -2)


def close(left: Any, right: Any, tolerance: float) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@given(
    size=st.integers(1, 6),
    width=st.integers(1, 4),
    dims=st.integers(1, 4),
    own=st.booleans(),
    length=st.integers(1, 9),
    noisy=st.booleans(),
    fused=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_plain_functions(
    size: int, width: int, dims: int, own: bool, length: int, noisy: bool, fused: bool, padded: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    heads, batch, dtype = 2, 3, torch.float64
    arguments = parameters(heads, size, width, dims, dims if own else 1, dtype)
    x, value = torch.randn(batch, length, 6, dtype=dtype), torch.randn(batch, heads, length, dims, dtype=dtype)
    inputs = [*arguments, x.requires_grad_(), value.requires_grad_()]
    share = torch.rand(batch, 1, 1, dtype=dtype) if padded else 0.3
    noise = torch.randn(batch, heads, length, dims, dtype=dtype) if noisy else None
    weight, cost_weight = torch.randn_like(value), torch.randn(batch, dtype=dtype)

    def ours() -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast, "_EXPLICIT_LENGTH", {"cpu": 0 if fused else 1000})
            prepared = prepare(*arguments, jitter=1e-6)
            return attend(heads_of(x, prepared, heads), value, prepared, arguments[4], share, noise)

    def plain() -> tuple[Tensor, Tensor]:
        prepared = prepare_plainly(*arguments, 1e-6)
        query = heads_of(x, prepared, heads).transpose(0, 1)
        front = None if noise is None else noise.transpose(0, 1)
        column = arguments[4][:, None, None]
        drawn, cost = attend_plainly(query, value.transpose(0, 1), *prepared[2:], column, share, front, None)
        return drawn.transpose(0, 1), cost

    found, expected = ours(), plain()
    close(found, expected, 1e-9)
    gradients = [
        torch.autograd.grad((out * weight).sum() + (cost * cost_weight).sum(), inputs, allow_unused=True)
        for out, cost in (found, expected)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        mine, theirs = (torch.zeros(()) if g is None else g for g in (mine, theirs))
        torch.testing.assert_close(mine.expand_as(theirs).to(dtype), theirs.to(dtype), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_dim"])
def test_it_is_the_decoupled_posterior(dtype: torch.dtype, own: bool) -> None:
    heads, size, width, dims, batch, length = 2, 5, 3, 4, 3, 7
    arguments = parameters(heads, size, width, dims, dims if own else 1, dtype)
    weight, location, v_g, log_lengthscale, log_variance, lower, log_diagonal = arguments
    x, value = torch.randn(batch, length, 6, dtype=dtype), torch.randn(batch, heads, length, dims, dtype=dtype)
    query = (x @ weight.mT).unflatten(-1, (heads, -1)).transpose(-3, -2)
    key = location @ weight.unflatten(0, (heads, -1)).mT
    tril = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
    post = decoupled_posterior(
        query, query, value, key, v_g, tril, log_lengthscale.exp(), log_variance.exp(), value_scale="length"
    )
    noise = torch.randn_like(value)
    prepared = prepare(*arguments)
    drawn, cost = attend(heads_of(x, prepared, heads), value, prepared, log_variance, 1 / length, noise)
    assert post.variance is not None
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    close(drawn, post.mean + post.variance.mT.sqrt() * noise, tolerance)
    close(cost, post.kl_amortised.sum((-2, -1)), tolerance)
    excess = prepared.excess.diagonal(dim1=-2, dim2=-1)
    cost_of_all = 0.5 * excess.sum((1, 2)) - log_diagonal.sum((1, 2))
    cost_of_all = cost_of_all * (dims // prepared.excess.shape[1]) + 0.5 * prepared.value.square().sum((1, 2))
    close(cost_of_all, post.kl_global.expand(heads, dims).sum(-1), tolerance)


def test_second_derivatives_are_those_of_the_plain_functions() -> None:
    heads, batch, length, dims = 2, 2, 4, 3
    arguments = parameters(heads, 3, 2, dims, dims, torch.float64)
    x = torch.randn(batch, length, 6, dtype=torch.float64, requires_grad=True)
    value = torch.randn(batch, heads, length, dims, dtype=torch.float64, requires_grad=True)
    noise = torch.randn_like(value)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *own, tokens, v = inputs
        prepared = prepare(*own, jitter=1e-6)
        return attend(heads_of(tokens, prepared, heads), v, prepared, own[4], 0.25, noise)

    assert torch.autograd.gradcheck(function, (*arguments, x, value))
    assert torch.autograd.gradgradcheck(function, (*arguments, x, value))


def test_keys_in_one_place_take_more_jitter_as_in_the_plain_function() -> None:
    arguments = [p.detach() for p in parameters(2, 4, 3, 2, 1, torch.float32)]
    arguments[1] = arguments[1][:, :1].expand(-1, 4, -1).contiguous()
    found, expected = prepare(*arguments, jitter=0.0), prepare_plainly(*arguments, 0.0)
    assert found.inverse.isfinite().all()
    close(found.inverse, expected.inverse, 1e-4)


def test_no_gradient_is_asked_for_what_needs_none() -> None:
    arguments = parameters(1, 3, 2, 2, 1, torch.float64)
    frozen = [p.detach() for p in arguments]
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    value = torch.randn(2, 1, 5, 2, dtype=torch.float64, requires_grad=True)
    prepared = prepare(*frozen)
    drawn, _ = attend(heads_of(x, prepared, 1), value, prepared, frozen[4], 1.0, None)
    drawn.sum().backward()
    assert value.grad is not None and value.grad.isfinite().all()


@given(size=st.integers(1, 9), dims=st.integers(1, 4), rows=st.integers(1, 600), seed=st.integers(0, 1000))
def test_quadratic_forms_and_their_gradients(size: int, dims: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    features = torch.randn(2, rows, size, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(2, dims, size, size, dtype=torch.float64)
    matrix = (matrix + matrix.mT).requires_grad_()
    grad = torch.randn(2, rows, dims, dtype=torch.float64)
    expected = torch.einsum("hrm,hdmn,hrn->hrd", features, matrix, features)
    close(quadratic_form(features.detach(), matrix.detach()), expected, 1e-10)
    g_features, g_matrix = torch.autograd.grad(expected, (features, matrix), grad)
    mine = quadratic_gradients(features.detach(), matrix.detach(), grad)
    close(mine[0], g_features, 1e-9)
    # One of many gradients by a symmetric matrix: the symmetric part is what they share.
    close(mine[1] + mine[1].mT, g_matrix + g_matrix.mT, 1e-9)


@pytest.mark.cuda
@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_dim"])
def test_on_a_gpu_as_on_a_cpu_without_waiting(own: bool) -> None:
    arguments = parameters(2, 5, 3, 4, 4 if own else 1, torch.float32)
    x, value, noise = torch.randn(3, 70, 6), torch.randn(3, 2, 70, 4), torch.randn(3, 2, 70, 4)
    results = []
    for device in ("cpu", "cuda"):
        moved = [p.detach().to(device).requires_grad_() for p in arguments]
        tokens, v, eps = x.to(device), value.to(device), noise.to(device)
        if device == "cuda":
            attend(heads_of(tokens, prepare(*moved), 2), v, prepare(*moved), moved[4], 1 / 70, eps)[0].sum().backward()
            for p in moved:
                p.grad = None
            torch.cuda.set_sync_debug_mode("error")
        try:
            prepared = prepare(*moved)
            drawn, cost = attend(heads_of(tokens, prepared, 2), v, prepared, moved[4], 1 / 70, eps)
            (drawn.sum() + cost.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([drawn.cpu(), cost.cpu(), *(p.grad.cpu() for p in moved if p.grad is not None)])
    for left, right in zip(*results, strict=True):
        close(left, right, 1e-3)
