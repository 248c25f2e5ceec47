"""Draws have the posterior's mean and covariance."""

import pytest
import torch

from gpseq.sgpa import decoupled_posterior, joint_sample, marginal_sample, pathwise_noise
from tests.oracles_sgpa import problem

DRAWS = 10_000


def moments(draws):
    """Mean (H, T, D) and covariance (H, D, T, T) over the first dimension."""
    mean = draws.mean(0)
    centred = (draws - mean).permute(1, 3, 0, 2)
    return mean, centred.mT @ centred / len(draws)


def case(scale="per_dim", kernel="rbf", normalise=False, **options):
    p = problem(batch=(), tokens=4, scale=scale, **options)
    return p, decoupled_posterior(*p, kernel=kernel, normalise=normalise, output="full")


def standard_errors(post, draws=DRAWS):
    """Of a sample covariance: sqrt((c_ij^2 + c_ii c_jj) / n)."""
    c = post.covariance
    d = c.diagonal(dim1=-2, dim2=-1)
    return ((c.square() + d.unsqueeze(-1) * d.unsqueeze(-2)) / draws).sqrt()


def test_marginal_draws():
    _, post = case()
    draws = marginal_sample(post.mean.expand(DRAWS, *post.mean.shape), post.variance)
    mean, cov = moments(draws)
    assert ((mean - post.mean).abs() < 5 * (post.variance.mT / DRAWS).sqrt()).all()
    wanted = torch.diag_embed(post.variance)
    assert ((cov - wanted).abs() < 5 * standard_errors(post) + 1e-12).all()


def test_joint_draws():
    _, post = case()
    draws = joint_sample(post.mean.expand(DRAWS, *post.mean.shape), post.covariance)
    mean, cov = moments(draws)
    assert ((mean - post.mean).abs() < 5 * (post.variance.mT / DRAWS).sqrt()).all()
    assert ((cov - post.covariance).abs() < 5 * standard_errors(post) + 1e-9).all()


@pytest.mark.parametrize(
    ("scale", "kernel", "normalise"),
    [
        ("shared", "rbf", False),
        ("per_dim", "rbf", False),
        ("diagonal", "rbf", False),
        ("low_rank", "rbf", False),
        ("per_dim", "exponential", False),
        ("per_dim", "exponential", True),
    ],
)
def test_pathwise_draws(scale, kernel, normalise):
    """Functions of many sequences; frequencies are shared by a call, so several calls are averaged."""
    p, post = case(scale, kernel, normalise)
    calls, each, frequencies = 20, 200, 200
    draws = torch.cat(
        [
            pathwise_noise(
                p.query.expand(each, *p.query.shape),
                p.inducing_key,
                p.inducing_scale_tril,
                p.lengthscale,
                p.variance,
                num_dims=2,
                num_features=frequencies,
                factor=post.factor,
            )
            for _ in range(calls)
        ]
    )
    assert draws.shape == (calls * each, 2, 4, 2)
    mean, cov = moments(draws)
    assert (mean.abs() < 5 * (post.variance.mT / len(draws)).sqrt()).all()
    # What so many frequencies leave of their own error, relative to the prior variance under the factor.
    prior = p.variance[:, None, None] * (1.0 if post.factor is None else (post.factor * post.factor.mT))
    features = 5 * prior / (calls * frequencies) ** 0.5
    assert ((cov - post.covariance).abs() < 5 * standard_errors(post, len(draws)) + features.unsqueeze(1)).all()


@pytest.mark.parametrize("fully", [False, True])
def test_a_wide_q_far_from_the_prior(fully):
    """L_s -> 0: draws pass through the inducing variables' mean; far away they are the prior's."""
    p = problem(batch=(), heads=1, tokens=3, inducing=3)
    query = p.inducing_key if not fully else p.inducing_key + 100.0
    noise = pathwise_noise(
        query.expand(500, 1, 3, 2),
        p.inducing_key,
        1e-8 * p.inducing_scale_tril,
        p.lengthscale,
        p.variance,
        num_dims=2,
        num_features=400,
    )
    if fully:
        torch.testing.assert_close(noise.var(), p.variance[0], rtol=0.1, atol=0.0)
    else:
        assert noise.abs().max() < 1e-3


@pytest.mark.parametrize("what", ["marginal", "joint", "pathwise"])
def test_generators_reproduce_and_leave_the_default_alone(what, dtype):
    p = problem(batch=(2,), dtype=dtype)
    post = decoupled_posterior(*p, output="full")

    def draw(generator=None):
        if what == "marginal":
            return marginal_sample(post.mean, post.variance, generator)
        if what == "joint":
            return joint_sample(post.mean, post.covariance, generator)
        return pathwise_noise(p.query, *p[3:4], *p[5:], num_dims=2, generator=generator)

    before = torch.get_rng_state()
    one, two = (draw(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == dtype
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    three = draw()
    assert not torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(draw(), three) and not torch.equal(one, three)
    assert not torch.equal(one[0], one[1])  # sequences have noise of their own


def test_a_variance_of_nothing_has_a_gradient():
    variance = torch.zeros(1, 2, 3, requires_grad=True)
    marginal_sample(torch.zeros(1, 3, 2), variance).sum().backward()
    assert variance.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_joint_draws_of_a_sure_posterior_in_float32(size):
    """Where next to nothing of the prior variance is left, rounding of the covariance must not break the factor."""
    torch.manual_seed(1)
    p = problem(batch=(), heads=2, tokens=40, inducing=24, width=1, scale="shared")
    p = p._replace(inducing_scale_tril=size * torch.eye(24, dtype=torch.float64).expand(2, 1, 24, 24))
    short = p._replace(**{name: getattr(p, name).float() for name in p._fields})
    short = short._replace(key=short.query)
    post = decoupled_posterior(*short, output="full")
    draws = joint_sample(post.mean.expand(4000, *post.mean.shape), post.covariance)
    assert draws.isfinite().all()
    exact = decoupled_posterior(*p, output="full", jitter=1e-6)
    spread = draws.double().var(0).mT
    assert (spread <= 1.3 * exact.variance + 3e-5).all()


def test_draws_in_half_precision():
    p = problem(batch=(2,))
    tokens, value = p.key.bfloat16(), p.value.bfloat16()
    post = decoupled_posterior(tokens, tokens, value, *p[3:], output="full")
    assert marginal_sample(post.mean, post.variance).dtype == torch.bfloat16
    assert joint_sample(post.mean, post.covariance).isfinite().all()
    noise = pathwise_noise(tokens, p.inducing_key, p.inducing_scale_tril, p.lengthscale, p.variance, num_dims=2)
    assert noise.dtype == torch.float32 and noise.isfinite().all()
