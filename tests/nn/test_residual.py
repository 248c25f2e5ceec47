"""The GP that is added to somebody else's attention: the same as mode "residual" of SGPAttention."""

import copy
import pickle
from itertools import product

import pytest
import torch

from gpseq.nn import SGPAttention, kl_divergence, use_generator
from gpseq.nn.residual import ResidualGP
from gpseq.nn.softmax import softmax_attention
from tests.layers import COVARIANCES, KERNELS, SAMPLING, move, small


def pair(dtype=torch.float64, **options) -> tuple[ResidualGP, SGPAttention]:
    """One GP, as a part by itself and in a layer."""
    layer = move(small(dtype, mode="residual", inducing_space="projected", **options))
    gp = ResidualGP(2, 4, 3, dtype=dtype, **options)
    gp.inducing.load_state_dict(layer.inducing.state_dict())
    return gp, layer


@pytest.mark.parametrize(
    "options", [dict(zip(("kernel", "covariance"), o, strict=True)) for o in product(KERNELS, COVARIANCES)], ids=str
)
def test_it_is_what_mode_residual_adds(options, dtype):
    gp, layer = pair(dtype, **options)
    x = torch.randn(3, 5, 8, dtype=dtype)
    tokens, _ = layer._tokens(x, x, x)
    query = layer.project_query(x)
    attention, _ = softmax_attention(query, layer.project_key(x), layer.project_value(x), tokens)
    for sampling in SAMPLING:
        gp.sampling = layer.sampling = sampling
        with use_generator(gp, torch.Generator().manual_seed(2)):
            got = gp(query, attention)
        with use_generator(layer, torch.Generator().manual_seed(2)):
            want, _ = layer.attend(tokens)
        torch.testing.assert_close(got, want)
        assert got.dtype == dtype
    for num_data, convention in product((None, 10), (None, "global", "per_sequence")):
        torch.testing.assert_close(gp.kl_divergence(num_data, convention), layer.kl_divergence(num_data, convention))


def test_it_starts_as_nothing():
    query, heads = torch.randn(2, 3, 2, 5, 4)
    for kernel, covariance in product(KERNELS, ("shared", "per_dim", "diagonal")):
        gp = ResidualGP(2, 4, 3, kernel, covariance, sampling="mean")
        assert gp(query, heads).equal(heads)
        assert gp.kl_divergence() == 0
        gp.sampling = "marginal"
        noise = gp(query, heads) - heads
        assert 0.001 < noise.std() < 0.1


def test_variance_grows_away_from_the_keys():
    gp, _ = pair()
    gp.inducing.log_diagonal.data.fill_(-3.0)
    gp.inducing.lower.data.zero_()
    near, far = gp.inducing.location.detach().unsqueeze(0), torch.full((1, 2, 3, 4), 50.0, dtype=torch.float64)
    prior = gp.inducing.log_variance.exp()[None, :, None, None]
    assert (gp.posterior(near).variance < 0.1 * prior).all()
    torch.testing.assert_close(gp.posterior(far).variance, prior.expand(1, 2, 1, 3))


def test_gradients_reach_everything():
    gp, _ = pair()
    query, heads = torch.randn(2, 3, 2, 5, 4, dtype=torch.float64)
    loss = gp(query.requires_grad_(), heads).square().sum() + gp.kl_divergence()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.ne(0).any() for p in gp.parameters())
    assert query.grad.ne(0).any()


def test_it_is_counted_once_and_needs_a_call_for_the_size_of_a_batch():
    gp, _ = pair()
    assert kl_divergence(torch.nn.ModuleList([gp, gp])).equal(gp.kl_divergence())
    with pytest.raises(RuntimeError, match="kl_divergence: expected a call of the layer before, or num_data"):
        gp.kl_divergence(convention="per_sequence")
    torch.testing.assert_close(gp.kl_divergence(7, "per_sequence"), 7 * gp.kl_divergence())
    query, heads = torch.randn(2, 6, 2, 5, 4, dtype=torch.float64)
    gp(query, heads)
    torch.testing.assert_close(gp.kl_divergence(convention="per_sequence"), 6 * gp.kl_divergence())
    gp.num_samples = 3
    torch.testing.assert_close(gp.kl_divergence(convention="per_sequence"), 2 * gp.kl_divergence())


def test_copies_and_settings():
    gp, _ = pair(covariance="low_rank")
    gp.generator = torch.Generator()
    query, heads = torch.randn(2, 3, 2, 5, 4, dtype=torch.float64)
    gp(query, heads)
    for again in (copy.deepcopy(gp), pickle.loads(pickle.dumps(gp))):
        assert again.generator is None
        again.sampling = "mean"
        assert again.kl_divergence().equal(gp.kl_divergence())
    other = ResidualGP(2, 4, dtype=torch.float64, **gp.settings())
    other.load_state_dict(gp.state_dict())
    assert other.settings() == gp.settings()
    assert "num_inducing=3" in repr(gp)


def test_autocast_keeps_the_mean():
    gp = ResidualGP(2, 4, 3)
    query, heads = torch.randn(2, 3, 2, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = gp(query, heads)
    assert out.dtype == torch.bfloat16
    gp.sampling = "mean"
    assert gp(query, heads).equal(heads)


def test_bad_input():
    gp = ResidualGP(2, 4, 3)
    with pytest.raises(ValueError, match=r"query: expected shape \(batch, 2, tokens, 4\), got \(3, 4, 5, 2\)"):
        gp(torch.zeros(3, 4, 5, 2), torch.zeros(3, 4, 5, 2))
    with pytest.raises(ValueError, match=r"heads: expected the shape of query, \(3, 2, 5, 4\), got \(3, 5, 2, 4\)"):
        gp(torch.zeros(3, 2, 5, 4), torch.zeros(3, 5, 2, 4))
    for name, value in (("kernel", "matern"), ("covariance", "full"), ("sampling", "twice")):
        with pytest.raises(ValueError, match=f"{name}: expected one of"):
            ResidualGP(2, 4, **{name: value})
    with pytest.raises(ValueError, match="convention: expected one of"):
        gp.kl_divergence(convention="local")
