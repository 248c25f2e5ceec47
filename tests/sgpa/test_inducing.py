"""What inducing keys carry alone, and the matrix that multiplies the values."""

import pytest
import torch

from gpseq.sgpa import attention_weights, decoupled_posterior, inducing_features, inducing_posterior
from gpseq.sgpa.scales import covariance_correction
from tests.oracles_sgpa import base_kernel, problem


@pytest.mark.parametrize("scale", ["shared", "per_dim", "diagonal", "low_rank"])
@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_it_is_the_decoupled_posterior_without_values(scale, kernel, batch, dtype):
    p = problem(batch=batch, scale=scale, dtype=dtype)
    wanted = decoupled_posterior(*p._replace(value=0 * p.value), kernel=kernel, output="full")
    found = inducing_posterior(p.query, *p[3:], kernel=kernel, output="full")
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    diagonal = inducing_posterior(p.query, *p[3:], kernel=kernel)
    torch.testing.assert_close(diagonal.variance, found.variance)
    assert diagonal.covariance is None
    assert inducing_posterior(p.query, *p[3:], kernel=kernel, output="mean").variance is None


@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
def test_features_make_the_covariance(kernel):
    p = problem(batch=(2,))
    post = inducing_posterior(p.query, *p[3:], kernel=kernel, output="full")
    features = inducing_features(p.query, p.inducing_key, p.lengthscale, p.variance)
    features = features if post.factor is None else features * post.factor
    for h in range(2):
        prior = base_kernel(kernel, p.query[:, h], p.query[:, h], p.lengthscale[h], p.variance[h])
        correction = covariance_correction(p.inducing_scale_tril, features)
        torch.testing.assert_close(post.covariance[:, h], prior.unsqueeze(1) + correction[:, h])


@pytest.mark.parametrize("queries", [None, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "cheng_boots", "kernel": "exponential"},
        {"normalise": True, "form": "cheng_boots"},
        {"value_scale": "length"},
        {"key_padding_mask": torch.tensor([[False, True, False, False], [False] * 4])},
        {"attn_mask": torch.tensor([0.0, -torch.inf, 0.5, 0.0])},
    ],
    ids=str,
)
def test_weights_multiply_the_values(options, queries):
    p = problem(batch=(2,), tokens=4, queries=queries)
    weights = attention_weights(p.query, p.key, p.inducing_key, p.lengthscale, p.variance, **options)
    post = decoupled_posterior(*p._replace(inducing_value=0 * p.inducing_value), **options)
    torch.testing.assert_close(weights @ p.value, post.mean)
    if options.get("normalise"):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_causal_weights_are_triangular():
    p = problem(batch=(2,))
    weights = attention_weights(p.query, p.key, p.inducing_key, p.lengthscale, p.variance, is_causal=True)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    assert (weights[..., ~seen] == 0).all() and (weights[..., seen] != 0).all()
