"""Forms of the whitened covariance agree with the matrices that they stand for, and with each other."""

import pytest
import torch

from gpseq.sgpa import DiagonalScale, LowRankScale, decoupled_posterior
from gpseq.sgpa.scales import covariance_correction, num_dims, scale_kl, scale_root, variance_correction
from tests.oracles_sgpa import covariance, gaussian_divergence, make_scale, problem

KINDS = ["shared", "per_dim", "diagonal", "low_rank"]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_its_matrix(kind, size):
    scale = make_scale(kind, heads=2, dims=3, size=size)
    s, v = covariance(scale), torch.randn(4, 2, 5, size, dtype=torch.float64)
    difference = s - torch.eye(size, dtype=torch.float64)
    wanted = v.unsqueeze(-3) @ difference @ v.mT.unsqueeze(-3)
    torch.testing.assert_close(covariance_correction(scale, v), wanted)
    torch.testing.assert_close(variance_correction(scale, v), wanted.diagonal(dim1=-2, dim2=-1).mT)
    root = scale_root(scale)
    torch.testing.assert_close(root @ root.mT, s)
    assert num_dims(scale) == (1 if kind == "shared" else 3)
    if size:
        zero, eye = torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
        for h in range(2):
            for d in range(num_dims(scale)):
                torch.testing.assert_close(scale_kl(scale)[h, d], gaussian_divergence(zero, s[h, d], eye))
    else:
        assert scale_kl(scale).abs().max() == 0


def test_forms_agree_where_they_coincide():
    p = problem(tokens=5, scale="shared")
    shared = decoupled_posterior(*p, output="full")
    repeated = p.inducing_scale_tril.expand(2, 2, 3, 3)
    per_dim = decoupled_posterior(*p._replace(inducing_scale_tril=repeated), output="full")
    torch.testing.assert_close(shared.variance.expand_as(per_dim.variance), per_dim.variance)
    torch.testing.assert_close(shared.covariance.expand_as(per_dim.covariance), per_dim.covariance)
    torch.testing.assert_close(shared.kl_global, per_dim.kl_global)
    std = 0.5 + torch.rand(2, 2, 3, dtype=torch.float64)
    same = torch.diag_embed(std), DiagonalScale(std), LowRankScale(std, torch.zeros(2, 2, 3, 2, dtype=torch.float64))
    found = [decoupled_posterior(*p._replace(inducing_scale_tril=scale), output="full") for scale in same]
    for other in found[1:]:
        torch.testing.assert_close(other.variance, found[0].variance)
        torch.testing.assert_close(other.covariance, found[0].covariance)
        torch.testing.assert_close(other.kl_global, found[0].kl_global)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_may_be_shorter_than_the_algebra(kind, short):
    """Parameters in the dtype of a model, tokens in that of autocast: nothing has to match by hand."""
    p = problem(scale=kind)

    def to(t, dtype):
        return type(t)(*(part.to(dtype) for part in t)) if isinstance(t, tuple) else t.to(dtype)

    tokens = p.key.to(short)
    rounded = [to(t, short) for t in p[2:]]
    post = decoupled_posterior(tokens, tokens, *rounded)
    assert post.mean.dtype == short and post.variance.dtype == torch.float32
    assert post.kl_global.dtype == post.kl_amortised.dtype == torch.float32
    wide = [to(t, torch.float64) for t in rounded]
    exact = decoupled_posterior(tokens.double(), tokens.double(), *wide, jitter=1e-6)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if short == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(post.variance.double(), exact.variance, **tolerance)
    torch.testing.assert_close(post.kl_global.double(), exact.kl_global, **tolerance)
    torch.testing.assert_close(post.mean.double(), exact.mean, **tolerance)
