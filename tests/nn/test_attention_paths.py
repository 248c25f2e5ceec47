"""Two ways through `SGPAttention`, the hot one and the general one, give the same; and what numbers they can take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gpseq.nn import KEPAttention, RFFAttention, SGPAttention


def small(**options: object) -> SGPAttention:
    return SGPAttention(8, 2, 4, batch_first=True, **options)  # type: ignore[arg-type]


def call(layer: SGPAttention, x: Tensor, general: bool) -> Tensor:
    """Asking for the weights takes the general way."""
    return layer(x, x, x, need_weights=general)[0]


@pytest.mark.parametrize("covariance", ["shared", "per_dim"])
def test_both_ways_draw_and_cost_the_same(dtype: torch.dtype, covariance: str) -> None:
    layer, x = small(covariance=covariance, dtype=dtype), torch.randn(3, 5, 8, dtype=dtype)
    results = []
    for general in (False, True):
        torch.manual_seed(0)
        out = call(layer, x, general)
        loss = out.square().sum() + layer.kl_divergence(num_data=30)
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        results.append([out, loss, *gradients])
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("general", [False, True])
def test_the_divergence_is_that_of_the_call_and_not_of_what_came_after(general: bool) -> None:
    layer, x = small(), torch.randn(3, 5, 8)
    call(layer, x, general)
    before = layer.kl_divergence().item()
    with torch.no_grad():
        layer.inducing.log_diagonal.add_(1.0)
    assert layer.kl_divergence().item() == pytest.approx(before)
    call(layer, x, general)
    assert layer.kl_divergence().item() > before + 1.0


@pytest.mark.parametrize("general", [False, True])
def test_without_a_graph_the_part_that_all_share_is_made_anew(general: bool) -> None:
    layer, x = small(), torch.randn(3, 5, 8)
    with torch.no_grad():
        call(layer, x, general)
    (gradient,) = torch.autograd.grad(layer.kl_divergence(), layer.inducing.value, allow_unused=True)
    assert gradient is not None


@pytest.mark.parametrize("general", [False, True])
def test_other_parameters_for_one_call(general: bool) -> None:
    layer, x = small(), torch.randn(3, 5, 8)
    others = {name: (p.detach() + 0.3).requires_grad_() for name, p in layer.named_parameters()}
    moved = copy.deepcopy(layer)
    moved.load_state_dict({name: p.detach() for name, p in others.items()})
    torch.func.functional_call(layer, others, (x, x, x), {"need_weights": general})
    call(moved, x, True)
    divergence = layer.kl_divergence(num_data=10)
    torch.testing.assert_close(divergence, moved.kl_divergence(num_data=10), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(divergence, others["inducing.log_diagonal"])
    assert gradient.abs().sum() > 1


def test_batches_of_gradients() -> None:
    layer, x = small(dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for general in (False, True):
        torch.manual_seed(0)
        out = call(layer, x, general)
        weights = torch.arange(3 * out.numel(), dtype=torch.float64).reshape(3, *out.shape).sin()
        found.append(torch.autograd.grad(out, x, weights, is_grads_batched=True)[0])
    torch.testing.assert_close(*found)


def test_aliases_of_one_tensor_are_one_tensor() -> None:
    layer, x = small(sampling="mean"), torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5, [True] * 5])
    expected, _ = layer(x, x, x, padding, need_weights=False)
    found, _ = layer(x, x.view_as(x), x.view_as(x), padding, need_weights=False)
    torch.testing.assert_close(found, expected)
    assert not found[0, 3:].any()
    # A detached copy has the same numbers and another gradient.
    y = x.clone().requires_grad_()
    out, _ = layer(y, y.detach(), y.detach(), need_weights=False)
    whole, _ = layer(y, y, y, need_weights=False)
    gradients = [torch.autograd.grad(o.sum(), y)[0] for o in (out, whole)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


@pytest.mark.parametrize("sampling", ["marginal", "mean"])
def test_backward_hooks_change_nothing(sampling: str) -> None:
    layer, x = small(sampling=sampling), torch.randn(3, 5, 8, requires_grad=True)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5, [False] * 5])
    results = []
    for hooked in (False, True):
        if hooked:
            layer.register_full_backward_hook(lambda *_: None)
        torch.manual_seed(0)
        out, _ = layer(x, x, x, padding, need_weights=False)
        results.append((out, torch.autograd.grad(out.sum() + layer.kl_divergence(), x)[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("length", [6, 500])
@pytest.mark.parametrize("general", [False, True])
def test_a_common_offset_of_tokens_and_keys_costs_no_digits(length: int, general: bool) -> None:
    layer, x = small(sampling="mean"), 300.0 + torch.randn(2, length, 8)
    with torch.no_grad():
        layer.inducing.location.add_(300.0)
    if general and length > 100:
        return  # the matrix of weights is not what this is about
    exact = call(copy.deepcopy(layer).double(), x.double(), general)
    assert (call(layer, x, general) - exact).abs().max() < 1e-2 * exact.abs().max()


def test_tokens_out_of_reach_of_the_dtype_are_an_error() -> None:
    layer, x = small(), 1e4 * torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match=r"query: expected tokens within 916 length-scales .* Normalise the tokens"):
        call(layer, x, False)
    call(layer.double(), x.double(), False)


def test_large_scores_of_softmax_attention() -> None:
    layer, x = (
        SGPAttention(64, 4, 8, "exponential", "softmax_kernel", sampling="mean", batch_first=True),
        torch.randn(2, 20, 64),
    )
    with torch.no_grad():
        layer.query_weight.mul_(11.0)
    query = layer.project_query(x) / layer.inducing.log_lengthscale.exp().unsqueeze(-2)
    assert (query @ query.mT).max() > 88.0  # what float32 can exponentiate
    heads = (query @ query.mT).softmax(-1) @ layer.project_value(x)
    torch.testing.assert_close(
        call(layer, x, False), layer.out_proj(heads.transpose(1, 2).flatten(-2)), rtol=1e-4, atol=1e-6
    )
    assert layer.kl_divergence().isfinite()


def test_an_exponential_kernel_that_overflows_is_an_error() -> None:
    layer = small(kernel="exponential")
    with pytest.raises(ValueError, match="query: expected tokens whose exponential kernel fits"):
        call(layer, 100.0 * torch.randn(2, 5, 8), False)


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_whatever_stands_for_minus_infinity_removes_in_residual_mode(least: float) -> None:
    layer, x = small(mode="residual", sampling="mean"), torch.randn(2, 4, 8)
    mask = torch.rand(4, 4) > 0.5
    mask[1] = True  # a row that sees nothing
    floating = torch.zeros(4, 4).masked_fill(mask, least)
    expected, found = (layer(x, x, x, attn_mask=m, need_weights=False)[0] for m in (mask, floating))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("covariance", ["shared", "per_dim"])
def test_an_empty_batch(covariance: str) -> None:
    layer, x = small(covariance=covariance), torch.randn(0, 5, 8)
    assert call(layer, x, False).shape == call(layer, x, True).shape == (0, 5, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dynamic"), [(SGPAttention, None), (KEPAttention, True), (RFFAttention, True)])
def test_compiled_for_more_than_one_length(kind: type, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    options = {"rank": 3} if kind is KEPAttention else {}
    layer = kind(8, 2, batch_first=True, **options)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=dynamic)
    for length in (5, 7, 9):
        x = torch.randn(3, length, 8)
        assert compiled(x, x, x, need_weights=False)[0].shape == x.shape
