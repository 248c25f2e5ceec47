"""Causal attention: every token has the posterior of the prefix that ends with it, whole or one token at a time."""

import pytest
import torch

from gpseq.sgpa import DecodingState, causal_linear_attention, decode, decoupled_posterior, prefix_kl
from tests.oracles_sgpa import problem

KERNELS = ["rbf", "exponential"]
FORMS = ["orthogonal", "cheng_boots"]
SCALINGS = [{}, {"normalise": True}, {"value_scale": "length"}]
IDS = ["plain", "normalise", "length"]


def prefixes(p, **options):
    """The plain function on every prefix: mean and variance of its last token, and its divergence."""
    found = [
        decoupled_posterior(key, key, p.value[..., :t, :], *p[3:], jitter=0.0, **options)
        for t in range(1, p.key.shape[-2] + 1)
        for key in [p.key[..., :t, :]]
    ]
    mean = torch.stack([post.mean[..., -1, :] for post in found], -2)
    return mean, torch.stack([post.variance[..., -1] for post in found], -1), torch.stack([f[4] for f in found], -1)


@pytest.mark.parametrize("scaling", SCALINGS, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, ()), (5, (2,)), (140, ())])
def test_every_token_has_the_posterior_of_its_prefix(kernel, form, scaling, tokens, batch):
    p = problem(batch=batch, tokens=tokens, heads=1 if tokens > 100 else 2)
    options = {"kernel": kernel, "form": form, **scaling}
    post = decoupled_posterior(*p, is_causal=True, jitter=0.0, **options)
    mean, variance, divergence = prefixes(p, **options)
    torch.testing.assert_close(post.mean, mean)
    torch.testing.assert_close(post.variance, variance)
    torch.testing.assert_close(post.kl_prefix, divergence, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(post.kl_amortised, divergence.mean(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [9, 200])
def test_the_future_has_no_gradient(kernel, tokens):
    """Not even one of rounding, on the explicit route or the fused one."""
    p, t = problem(batch=(), tokens=tokens), tokens // 2 + 3
    key, value = p.key.clone().requires_grad_(), p.value.clone().requires_grad_()
    post = decoupled_posterior(key, key, value, *p[3:], kernel=kernel, is_causal=True)
    until = post.mean[..., t, :].sum() + post.variance[..., t].sum() + post.kl_prefix[..., t].sum()
    for gradient in torch.autograd.grad(until, [key, value]):
        assert (gradient[..., t + 1 :, :] == 0).all()
        assert (gradient[..., : t + 1, :] != 0).any(-1).all()


def test_the_future_changes_no_bit():
    p = problem(batch=(), tokens=200, dtype=torch.float32)
    key, value = p.key.clone(), p.value.clone()
    key[:, 100:] += 1.0
    value[:, 100:] *= 3.0
    before = decoupled_posterior(*p, is_causal=True)
    after = decoupled_posterior(key, key, value, *p[3:], is_causal=True)
    assert torch.equal(before.mean[:, :100], after.mean[:, :100])
    assert torch.equal(before.variance[..., :100], after.variance[..., :100])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 192, 300])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_linear_attention_is_the_masked_product(length, batch, dtype):
    q, k = (torch.randn(*batch, length, 4, dtype=dtype) for _ in range(2))
    v = torch.randn(*batch, length, 3, dtype=dtype)
    torch.testing.assert_close(causal_linear_attention(q, k, v), (q @ k.mT).tril() @ v, rtol=1e-4, atol=1e-4)


def test_prefix_divergences_are_quadratic_forms():
    root, v = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    c = root @ root.mT
    found = prefix_kl(v, c.tril() @ v, c.diagonal())
    for t in range(6):
        part = v[: t + 1]
        torch.testing.assert_close(found[:, t], 0.5 * (part * (c[: t + 1, : t + 1] @ part)).sum(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("scale", ["shared", "low_rank"])
def test_one_token_at_a_time(kernel, form, batch, scale, dtype):
    p = problem(batch=batch, tokens=7, scale=scale, dtype=dtype)
    post = decoupled_posterior(*p, kernel=kernel, form=form, is_causal=True)
    state = DecodingState.empty(p.key, p.value, num_inducing=3)
    for t in range(7):
        here = slice(t, t + 1)
        mean, variance, state = decode(
            state, p.key[..., here, :], p.value[..., here, :], *p[3:], kernel=kernel, form=form
        )
        torch.testing.assert_close(mean, post.mean[..., here, :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(variance, post.variance[..., here], rtol=1e-4, atol=1e-4)
    assert state.key.shape[-2] == 7 and state.explained.shape == (*batch, 2, 3, 2)
    assert mean.dtype == dtype


def test_decoding_in_half_precision_remembers_in_float32():
    p = problem(batch=(), tokens=64)
    short = p._replace(**{name: getattr(p, name).bfloat16() for name in ("query", "key", "value")})
    state = DecodingState.empty(short.key, short.value, num_inducing=3)
    assert state.explained.dtype == torch.float32
    for t in range(64):
        here = slice(t, t + 1)
        mean, _, state = decode(state, short.key[..., here, :], short.value[..., here, :], *p[3:])
    assert mean.dtype == torch.bfloat16
    wanted = decoupled_posterior(*p, is_causal=True).mean[..., -1:, :]
    torch.testing.assert_close(mean.double(), wanted, rtol=0.05, atol=0.15)


def test_decoding_says_what_does_not_fit():
    p = problem(batch=(), tokens=4)
    state = DecodingState.empty(p.key, p.value, num_inducing=3)
    with pytest.raises(ValueError, match=r"state: expected one token and .* got 2 tokens"):
        decode(state, p.key[:, :2], p.value[:, :2], *p[3:])
    other = DecodingState.empty(p.key, p.value, num_inducing=5)
    with pytest.raises(ValueError, match=r"state of shape \(2, 3, 2\), got 1 tokens and a state of shape \(2, 5, 2\)"):
        decode(other, p.key[:, :1], p.value[:, :1], *p[3:])
    with pytest.raises(ValueError, match="form: expected one of 'orthogonal', 'cheng_boots', got 'x'"):
        decode(state, p.key[:, :1], p.value[:, :1], *p[3:], form="x")
    assert state.key.shape[-2] == 0
