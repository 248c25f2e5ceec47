"""The RBF kernel explicitly and inside fused attention: the same values and gradients, in linear memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpseq.sgpa import decoupled_posterior, rbf_covariance, rbf_product
from tests.oracles_sgpa import base_kernel, problem

MASKS = ["none", "causal", "bias", "all masked", "biased causal"]


def inputs(masked, batch=(2, 3), queries=7, keys=7, dtype=torch.float64, device="cpu"):
    q = torch.randn(*batch, queries, 4, dtype=torch.float64)
    k = torch.randn(*batch, keys, 4, dtype=torch.float64)
    v = torch.randn(*batch, keys, 3, dtype=torch.float64)
    bias = torch.randn(queries, keys, dtype=torch.float64)
    hidden = torch.rand(queries, keys) < 0.4
    hidden[0] = True
    if masked == "all masked":
        hidden[:] = True
    bias = bias.masked_fill(hidden, -torch.inf) if masked in ("bias", "all masked") else None
    return *(t.to(device=device, dtype=dtype) for t in (q, k, v)), None if bias is None else bias.to(device, dtype)


def check_fused(masked, batch, dtype, device, tolerance):
    options = {"is_causal": masked == "causal"}
    keys = 7 if masked == "causal" else 5
    q, k, v, bias = inputs(masked, batch, 7, keys, dtype, device)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    found = [rbf_product(q, k, v, bias=bias, fused=fused, **options) for fused in (False, True)]
    # The formula by itself, in float64.
    x, y, z = (t.detach().double().cpu() for t in (q, k, v))
    kernel = (-0.5 * (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)).exp()
    kernel = kernel.tril() if masked == "causal" else kernel
    kernel = kernel if bias is None else kernel * bias.double().cpu().exp()
    for out in found:
        assert out.dtype == dtype
        torch.testing.assert_close(out.detach().double().cpu(), kernel @ z, **tolerance)
    weight = torch.randn(found[0].shape, dtype=dtype, device=device)
    gradients = [torch.autograd.grad((out * weight).sum(), [q, k, v]) for out in found]
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all() and other.isfinite().all()
        torch.testing.assert_close(one, other, **{name: 3 * t for name, t in tolerance.items()})


TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 6e-2},
    torch.float16: {"rtol": 4e-3, "atol": 8e-3},
}


@pytest.mark.parametrize("masked", ["none", "causal", "bias", "all masked"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3)])
def test_fused_is_explicit(masked, dtype, batch):
    check_fused(masked, batch, dtype, "cpu", TOLERANCES[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("masked", ["none", "causal", "bias", "all masked"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_fused_is_explicit_on_a_gpu(masked, dtype, batch):
    check_fused(masked, batch, dtype, "cuda", TOLERANCES[dtype])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_accurate_far_from_the_origin(fused, dtype):
    """The kernel depends on distances only: norms of 100 must not drown them."""
    tokens = (8.0 + torch.randn(1, 1, 40, 4)).to(dtype)
    value = torch.rand(1, 1, 40, 3).to(dtype)
    exact = tokens.double()
    kernel = (-0.5 * torch.cdist(exact, exact).square()).exp()
    found = rbf_product(tokens, tokens, value, fused=fused).double()
    torch.testing.assert_close(found, kernel @ value.double(), rtol=4e-2, atol=4e-2)


def test_the_covariance_is_its_formula():
    p = problem(batch=(), queries=5)
    scaled = [t / p.lengthscale.unsqueeze(-2) for t in (p.query, p.key)]
    bias = torch.randn(5, 4)
    found = rbf_covariance(*scaled, p.variance[:, None, None].log(), bias)
    for h in range(2):
        wanted = base_kernel("rbf", p.query[h], p.key[h], p.lengthscale[h], p.variance[h]) * bias.exp()
        torch.testing.assert_close(found[h], wanted, rtol=1e-6, atol=1e-7)


class Largest(TorchDispatchMode):
    """The most elements that one tensor has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"normalise": True, "form": "cheng_boots"}], ids=str)
@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
def test_memory_is_linear_in_the_length(kernel, options):
    """No tensor of the forward or the backward pass has T x T elements."""
    tokens = 2048
    p = problem(batch=(1,), tokens=tokens, heads=1, scale="shared", dtype=torch.float32)
    key, value = p.key.clone().requires_grad_(), p.value.clone().requires_grad_()
    with Largest() as largest:
        post = decoupled_posterior(key, key, value, *p[3:], kernel=kernel, **options)
        (post.mean.sum() + post.variance.sum() + post.kl_amortised.sum()).backward()
    assert 0 < largest.elements <= tokens * 64
    assert key.grad.isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_on_a_gpu_is_linear_in_the_length(dtype):
    used = []
    for tokens in (4096, 8192):
        p = problem(batch=(1,), tokens=tokens, heads=2, width=16, dims=16, scale="shared", dtype=dtype, device="cuda")
        key = p.key.requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        post = decoupled_posterior(key, key, *p[2:])
        (post.mean.sum() + post.variance.sum() + post.kl_amortised.sum()).backward()
        used.append(torch.cuda.max_memory_allocated() - before)
    assert used[1] < 2.5 * used[0]
    assert used[1] < 8192 * 8192 * 2


@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
@pytest.mark.parametrize("queries", [None, 5], ids=["self", "cross"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "key_padding_mask": torch.tensor([[False, True, False, False, True], [False] * 5])},
        {"normalise": True, "is_causal": True},
        {"attn_mask": torch.tensor([[True, False, True, False, True]] * 2 + [[True] * 5] + [[False] * 5] * 2)},
        {"value_scale": "length", "key_padding_mask": torch.tensor([[0.0, -torch.inf, 1.0, 0.0, -1.0], [0.0] * 5])},
    ],
    ids=str,
)
def test_posteriors_by_the_fused_route_are_those_by_the_explicit_one(kernel, queries, options, monkeypatch):
    """Length decides on the route; here both are taken at one length."""
    p = problem(tokens=5, queries=queries)
    found = []
    for entries in (0, 10_000):
        monkeypatch.setattr("gpseq.sgpa.rbf._EXPLICIT_ENTRIES", entries)
        leaves = [t.clone().requires_grad_() for t in p]
        key = leaves[0] if queries is None else leaves[1]
        post = decoupled_posterior(leaves[0], key, *leaves[2:], kernel=kernel, **options)
        loss = post.mean.square().sum() + post.variance.sum() + post.kl_amortised.sum() + post.kl_global.sum()
        gradients = torch.autograd.grad(loss, [leaves[0], *leaves[2:]])
        found.append((post.mean, post.variance, post.kl_amortised, *gradients))
    torch.testing.assert_close(found[0], found[1])
