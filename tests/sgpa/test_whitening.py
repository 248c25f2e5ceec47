"""Factoring without branches: jitter relative, escalated where it has to be, and the same in every factor."""

import pytest
import torch

from gpseq.linalg import MAX_JITTER
from gpseq.sgpa import decoupled_posterior, whiten
from tests.oracles_sgpa import problem


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_factors(batch, dtype):
    root = torch.randn(*batch, 5, 5, dtype=dtype)
    gram = root @ root.mT + torch.eye(5, dtype=dtype)
    found = whiten(gram)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.tril @ found.tril.mT, found.gram, **tolerance)
    torch.testing.assert_close(found.inverse @ found.tril, torch.eye(5, dtype=dtype).expand_as(root), **tolerance)
    tokens = torch.randn(*batch, 7, 5, dtype=dtype)
    wanted = torch.linalg.solve_triangular(found.tril, tokens.mT, upper=False).mT
    torch.testing.assert_close(found.features(tokens), wanted, **tolerance)


def test_jitter_is_relative_to_the_scale():
    gram = torch.eye(3, dtype=torch.float64)
    for scale in (1e-12, 1.0, 1e12):
        torch.testing.assert_close(whiten(scale * gram, 1e-3).gram, scale * (1 + 1e-3) * gram)
    torch.testing.assert_close(whiten(gram, 0.0).gram, gram, rtol=0, atol=0)


def test_each_matrix_gets_the_least_jitter_that_works():
    """A sound, a singular, and a slightly indefinite one, in one batch."""
    sound = torch.eye(4, dtype=torch.float64)
    singular = torch.ones(4, 4, dtype=torch.float64) - 1e-9 * torch.eye(4, dtype=torch.float64)
    indefinite = torch.ones(4, 4, dtype=torch.float64) - 5e-5 * torch.eye(4, dtype=torch.float64)
    found = whiten(torch.stack([sound, singular, indefinite]), 1e-10)
    added = (found.gram - torch.stack([sound, singular, indefinite])).diagonal(dim1=-2, dim2=-1).mean(-1)
    assert added[0] == pytest.approx(1e-10, rel=1e-3)
    assert added[1] == pytest.approx(1e-7, rel=1e-3)
    assert added[2] == pytest.approx(MAX_JITTER, rel=1e-3)
    assert found.tril.isfinite().all()


@pytest.mark.parametrize("bad", ["nan", "hopeless"])
def test_what_cannot_be_factored_is_nan_in_its_own_place(bad):
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1] = torch.nan if bad == "nan" else -gram[1]
    found = whiten(gram)
    assert found.tril[0].isfinite().all() and found.inverse[0].isfinite().all()
    assert found.tril[1].isnan().any() and found.inverse[1].isnan().any()


@pytest.mark.parametrize("asked", [None, 0.0])
def test_gradients_pass_an_escalation(asked):
    g = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    gram = (-0.5 * (g.unsqueeze(0) - g.unsqueeze(1)).square().sum(-1)).exp()
    found = whiten(gram, asked)
    found.inverse.square().sum().backward()
    assert g.grad.isfinite().all()


def test_no_inducing_variables():
    found = whiten(torch.zeros(2, 0, 0))
    assert found.features(torch.zeros(2, 5, 0)).shape == (2, 5, 0)


@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 1e-1])
def test_clustered_inducing_keys_in_float32(kernel, spread):
    """Sixteen keys on top of each other: finite values and gradients, close to float64 with the same jitter."""
    p = problem(batch=(), tokens=10, inducing=16, scale="shared")
    p = p._replace(inducing_key=p.inducing_key[:, :1] + spread * p.inducing_key, inducing_value=0.1 * p.inducing_value)
    short = p._replace(**{name: getattr(p, name).float().requires_grad_() for name in p._fields})
    short = short._replace(key=short.query)
    post = decoupled_posterior(*short, kernel=kernel)
    exact = decoupled_posterior(*p, kernel=kernel, jitter=1e-6)
    for name in ("mean", "variance", "kl_global", "kl_amortised"):
        torch.testing.assert_close(getattr(post, name).double(), getattr(exact, name), rtol=2e-2, atol=2e-2, msg=name)
    (post.mean.sum() + post.variance.sum() + post.kl_global.sum() + post.kl_amortised.sum()).backward()
    for leaf in (short.query, *short[2:]):
        assert leaf.grad.isfinite().all()


def test_inducing_keys_that_are_not_finite_spoil_their_head_only():
    p = problem(batch=())
    key = p.inducing_key.clone()
    key[1, 0] = torch.nan
    post, sound = decoupled_posterior(*p._replace(inducing_key=key)), decoupled_posterior(*p)
    torch.testing.assert_close(post.mean[0], sound.mean[0])
    assert post.mean[1].isnan().any()
