"""Weights of torch's attention in layers of this package."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpseq.nn import SGPAttention
from gpseq.nn.conversion import ConversionWarning, convert_attention, symmetric_projection
from tests.layers import trained_attention


def tied(dtype=torch.float64, query_bias=False, **options):
    """Attention whose queries and keys go through one map."""
    layer = trained_attention(dtype, **options)
    with torch.no_grad():
        layer.in_proj_weight[8:16] = layer.in_proj_weight[:8]
        if layer.in_proj_bias is not None and not query_bias:
            layer.in_proj_bias[:8] = 0.0
    return layer


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_one_map_is_the_best_of_its_rank(heads, width, columns, seed):
    draws = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(heads, width, columns, generator=draws, dtype=torch.float64) for _ in range(2))
    one, lost = symmetric_projection(q, k)
    assert one.shape == q.shape
    scores = q.mT @ k
    values, vectors = torch.linalg.eigh(0.5 * (scores + scores.mT))
    values = values.clamp_min(0.0)
    values[..., : max(columns - width, 0)] = 0.0  # the greatest stay
    want = vectors @ torch.diag_embed(values) @ vectors.mT
    torch.testing.assert_close(one.mT @ one, want, rtol=1e-7, atol=1e-7)
    norm = torch.linalg.matrix_norm(scores)
    torch.testing.assert_close(lost, torch.linalg.matrix_norm(scores - want) / norm, rtol=1e-6, atol=1e-6)
    assert (lost <= 1.0 + 1e-9).all()


def test_tied_scores_stay_and_no_scores_are_no_loss(dtype):
    w = torch.randn(2, 3, 8, dtype=dtype)
    one, lost = symmetric_projection(w, w)
    assert one.dtype == dtype
    torch.testing.assert_close(one.mT @ one, w.mT @ w)
    assert (lost < 1e-6).all()
    one, lost = symmetric_projection(torch.zeros_like(w), w)
    assert not one.any()
    assert not lost.any()


def test_softmax_kernel_is_softmax_attention_where_weights_are_tied(dtype):
    trained = tied(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = convert_attention(trained, "softmax_kernel", kernel="exponential", sampling="mean", num_inducing=3)
    x = torch.randn(3, 5, 8, dtype=dtype)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    future = torch.ones(5, 5).triu(1).bool()
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": future}):
        want, got = trained(x, x, x, **masks)[0], layer(x, x, x, **masks)[0]
        kept = ~padding if "key_padding_mask" in masks else torch.ones(3, 5).bool()
        torch.testing.assert_close(got[kept], want[kept], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-10)


def test_another_width_of_keys_needs_no_symmetry():
    trained = trained_attention(kdim=6, vdim=7)
    with torch.no_grad():
        trained.in_proj_bias[:8] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = convert_attention(trained, "softmax_kernel", kernel="exponential", sampling="mean")
    inputs = [torch.randn(3, 5, width, dtype=torch.float64) for width in (8, 6, 7)]
    torch.testing.assert_close(layer(*inputs)[0], trained(*inputs)[0], rtol=0, atol=1e-10)


def test_the_published_mode():
    trained = tied(bias=False)
    layer = convert_attention(trained, "sgpa", num_inducing=3)
    assert layer.tied
    assert layer.value_weight.equal(trained.in_proj_weight[16:])
    torch.testing.assert_close(layer.inducing.log_lengthscale.exp(), torch.full((2, 4), 4**0.25, dtype=torch.float64))
    mine, theirs = layer.query_weight.unflatten(0, (2, 4)), trained.in_proj_weight[:8].unflatten(0, (2, 4))
    torch.testing.assert_close(mine.mT @ mine, theirs.mT @ theirs)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    layer(x, x, x)
    assert layer.kl_divergence().isfinite()


def test_what_is_lost_is_said():
    trained = trained_attention(bias=False)
    _, lost = symmetric_projection(*(w.unflatten(0, (2, 4)) for w in trained.in_proj_weight.detach().chunk(3)[:2]))
    with pytest.warns(ConversionWarning, match=f"Frobenius norm {lost.mean():.0%} is discarded"):
        convert_attention(trained, "sgpa")
    with pytest.warns(ConversionWarning, match="0% is discarded .* the bias of the queries is dropped too"):
        convert_attention(tied(query_bias=True), "softmax_kernel")
    frozen = tied(bias=False).requires_grad_(False)
    assert not convert_attention(frozen, "sgpa").query_weight.requires_grad


def test_the_trained_one_stays_and_shares_its_output_map():
    trained = trained_attention()
    before = {name: p.clone() for name, p in trained.state_dict().items()}
    layer = convert_attention(trained)
    assert layer.out_proj is trained.out_proj
    with torch.no_grad():
        layer.query_weight.add_(1.0)
        layer.query_bias.add_(1.0)
    assert all(p.equal(before[name]) for name, p in trained.state_dict().items())
    assert math.isclose(layer.inducing.log_variance[0].item(), math.log(1e-4))


def test_only_torchs_own_attention():
    for other in (nn.Linear(8, 8), SGPAttention(8, 2)):
        kind = type(other).__name__
        with pytest.raises(TypeError, match=f"attention: expected nn.MultiheadAttention itself, got {kind}"):
            convert_attention(other)
