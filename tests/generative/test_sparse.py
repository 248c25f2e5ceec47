"""Sparse posteriors of latent paths, against unwhitened moments, dense processes and streams."""

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from linear_operator import to_dense

import gpseq
from gpseq.features import HippoFeatures, InducingPoints
from gpseq.generative.sparse import SparsePrior
from gpseq.variational import online
from tests import oracles_generative_vae as oracle

L = 2


def kernel(matern: bool = False):
    base = MaternKernel(1.5, batch_shape=torch.Size([L])) if matern else RBFKernel(batch_shape=torch.Size([L]))
    base.lengthscale = torch.tensor([0.8, 1.3]).view(L, 1, 1)
    made = ScaleKernel(base, batch_shape=torch.Size([L]))
    made.outputscale = torch.tensor([1.0, 0.6])
    return made.double()


def data(n: int = 25, last: float = 5.0, seed: int = 0, batch: tuple[int, ...] = (), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = last * torch.rand(*batch, n, generator=generator, dtype=torch.float64).sort(-1).values
    mean = torch.randn(*batch, L, n, generator=generator, dtype=torch.float64)
    variance = 0.05 + torch.rand(*batch, L, n, generator=generator, dtype=torch.float64)
    return x, mean.to(dtype), variance.to(dtype)


def blocks(features, k, x, channel: int):
    kuu = to_dense(features.kuu(k))[channel]
    return kuu, features.kuf(k, x)[channel], k(x.unsqueeze(-1), diag=True)[channel]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_moments_and_divergence_are_those_of_the_unwhitened_form(scale):
    k, features = kernel(), HippoFeatures(6, horizon=5.0)
    x, mean, variance = data()
    p = SparsePrior(features, k, L).posterior(x, mean, variance, scale=scale)
    for channel in range(L):
        kuu, kuf, kff = blocks(features, k, x, channel)
        m, S = oracle.sparse_posterior(kuu, kuf, mean[channel], variance[channel], scale)
        expected = oracle.marginals(kuu, kuf, kff, m, S)
        torch.testing.assert_close(p.mean[channel], expected[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(p.variance[channel], expected[1], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(p.kl[channel], oracle.divergence(m, S, kuu), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_published_bound_is_the_plain_one(scale):
    prior = SparsePrior(HippoFeatures(6, horizon=5.0), kernel(), L)
    x, mean, variance = data(seed=1)
    p = prior.posterior(x, mean, variance, scale=scale)
    recon = torch.tensor(-17.0, dtype=torch.float64)
    published = oracle.published_bound(recon, mean, variance, p.mean, p.variance, p.kl.sum(), scale)
    torch.testing.assert_close(recon - p.kl.sum(), published, rtol=1e-10, atol=1e-10)


def test_with_the_evidence_as_data_the_bound_is_the_collapsed_one():
    k, features = kernel(), HippoFeatures(8, horizon=5.0)
    x, mean, variance = data(seed=2)
    p = SparsePrior(features, k, L).posterior(x, mean, variance)
    for channel in range(L):
        likelihood = oracle.expected_log_density(mean[channel], variance[channel], p.mean[channel], p.variance[channel])
        torch.testing.assert_close(likelihood - p.kl[channel], p.log_evidence[channel], rtol=1e-8, atol=1e-8)
        kuu, kuf, kff = blocks(features, k, x, channel)
        Q = kuf.T @ torch.linalg.solve(kuu, kuf)
        marginal = torch.distributions.MultivariateNormal(torch.zeros(25).double(), Q + variance[channel].diag())
        collapsed = marginal.log_prob(mean[channel]) - 0.5 * ((kff - Q.diagonal()) / variance[channel]).sum()
        torch.testing.assert_close(p.log_evidence[channel], collapsed, rtol=1e-6, atol=1e-6)


def test_with_a_point_at_each_time_it_is_the_dense_process():
    k = kernel(matern=True)
    x, mean, variance = data(n=15, seed=3)
    new = torch.linspace(-1, 7, 9, dtype=torch.float64)
    p = SparsePrior(InducingPoints(x.unsqueeze(-1)), k, L).posterior(x, mean, variance)
    found = p.predict(new)
    covariance = to_dense(k(x.unsqueeze(-1), x.unsqueeze(-1)))
    cross, alone = to_dense(k(x.unsqueeze(-1), new.unsqueeze(-1))), k(new.unsqueeze(-1), diag=True)
    for channel in range(L):
        expected = oracle.dense_posterior(
            covariance[channel], cross[channel], alone[channel], mean[channel], variance[channel]
        )
        torch.testing.assert_close(found[0][channel], expected[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[1][channel], expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_series_are_independent(batch, dtype):
    prior = SparsePrior(HippoFeatures(6, horizon=5.0), kernel(), L)
    x, mean, variance = data(batch=batch, dtype=dtype)
    p = prior.posterior(x, mean, variance)
    assert p.mean.shape == (*batch, L, 25) and p.kl.shape == (*batch, L) and p.mean.dtype == dtype
    assert p.predict(x[..., :4])[1].shape == (*batch, L, 4)
    assert p.rsample(x[..., :4], (5,)).shape == (5, *batch, L, 4)
    first = (0,) * len(batch)
    one = prior.posterior(x[first], mean[first], variance[first])
    torch.testing.assert_close(p.mean[first], one.mean)
    torch.testing.assert_close(p.kl[first], one.kl)


def test_nothing_seen_is_the_prior():
    k = kernel()
    prior = SparsePrior(HippoFeatures(6, horizon=5.0), k, L)
    x, mean, variance = data()
    p = prior.posterior(x, mean * torch.nan, variance, missing=torch.ones(25, dtype=torch.bool))
    torch.testing.assert_close(p.kl, torch.zeros(L).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(p.mean, torch.zeros(L, 25).double())
    torch.testing.assert_close(p.variance, k(x.unsqueeze(-1), diag=True), rtol=1e-6, atol=1e-6)


def test_missing_is_left_out():
    prior = SparsePrior(HippoFeatures(6, horizon=5.0), kernel(), L)
    x, mean, variance = data()
    missing = torch.arange(25) % 3 == 0
    mean[:, missing] = torch.nan
    p = prior.posterior(x, mean, variance, missing)
    other = prior.posterior(x[~missing], mean[:, ~missing], variance[:, ~missing])
    torch.testing.assert_close(p.kl, other.kl)
    torch.testing.assert_close(p.mean[:, ~missing], other.mean)
    torch.testing.assert_close(p.log_evidence, other.log_evidence)


def test_draws_have_the_moments_of_the_paths():
    prior = SparsePrior(HippoFeatures(6, horizon=5.0), kernel(), L)
    p = prior.posterior(*data())
    new = torch.tensor([0.5, 2.0, 2.1], dtype=torch.float64)
    draws = p.rsample(new, (40_000,), torch.Generator().manual_seed(0))
    mean, variance = p.predict(new)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(draws.var(0), variance, atol=0.02, rtol=0.05)
    assert torch.corrcoef(draws[:, 0, 1:].T)[0, 1] > 0.9  # neighbours move together
    drawn = prior.rsample(new, (40_000,), torch.Generator().manual_seed(0))
    expected = to_dense(kernel()(new.unsqueeze(-1), new.unsqueeze(-1)))
    found = torch.stack([torch.cov(drawn[:, channel].T) for channel in range(L)])
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_two_updates_on_one_basis_are_one():
    prior = SparsePrior(HippoFeatures(10, horizon=5.0), kernel(), L)
    x, mean, variance = data(n=40)
    whole = prior.absorb(prior.initial_state(), x, mean, variance)
    parts = prior.absorb(prior.initial_state(), x[:15], mean[:, :15], variance[:, :15])
    parts = prior.absorb(parts, x[15:], mean[:, 15:], variance[:, 15:])
    torch.testing.assert_close(parts.G, whole.G, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(parts.r, whole.r, rtol=1e-12, atol=1e-10)
    assert parts.count.tolist() == [40, 40]
    in_windows = prior.absorb(prior.initial_state(), x, mean, variance, batch_size=7)
    torch.testing.assert_close(in_windows.G, whole.G, rtol=1e-12, atol=1e-10)


def test_a_horizon_that_moves_keeps_what_was_seen():
    k = kernel()
    x, mean, variance = data(n=40, last=6.0)
    first = SparsePrior(HippoFeatures(24, horizon=3.0), k, L)
    early = x < 3
    state = first.absorb(first.initial_state(), x[early], mean[:, early], variance[:, early])
    second = first.following(x)
    assert second is not first and second.features.horizon >= x.max()
    p = second.posterior(x[~early], mean[:, ~early], variance[:, ~early], before=state)
    whole = second.posterior(x, mean, variance)
    new = torch.linspace(0, 6, 30, dtype=torch.float64)
    for found, expected in zip(p.predict(new), whole.predict(new), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_the_bound_of_a_stream_has_the_two_divergences():
    """KL(q(b) || p(b)) less E[log q_a(a) - log p_a(a)], a seen through b, with everything written out."""
    old, new = HippoFeatures(5, horizon=3.0), HippoFeatures(6, horizon=6.0)
    before, after = kernel(), kernel()
    after.base_kernel.lengthscale = 1.4 * after.base_kernel.lengthscale
    x, mean, variance = data(n=12, last=3.0)
    first = SparsePrior(old, before, L)
    state = first.absorb(first.initial_state(), x, mean, variance)
    x, mean, variance = data(n=10, last=6.0, seed=4)
    p = SparsePrior(new, after, L).posterior(x, mean, variance, before=state)
    m_v, root = online.posterior(p.state)
    m_w, old_root = online.posterior(state)
    for channel in range(L):
        kbb, kaa = to_dense(new.kuu(after))[channel], to_dense(old.kuu(after))[channel]
        kba = new.cross(after, old)[channel]
        L_b, L_a = p.state.factor[channel], state.factor[channel]
        m_b, S_b = L_b @ m_v[channel], L_b @ root[channel] @ root[channel].T @ L_b.T
        m_a, S_a = L_a @ m_w[channel], L_a @ old_root[channel] @ old_root[channel].T @ L_a.T
        W = torch.linalg.solve(kbb, kba).T
        mean_a, covariance_a = W @ m_b, kaa - W @ kba + W @ S_b @ W.T
        term = oracle.old_factor(m_a, S_a, mean_a, covariance_a, L_a @ L_a.T)
        expected = oracle.divergence(m_b, S_b, kbb) - term
        torch.testing.assert_close(p.kl[channel], expected, rtol=1e-5, atol=1e-5)


def test_information_stays_positive_along_many_updates():
    prior = SparsePrior(HippoFeatures(12, horizon=1.0), kernel(), L)
    state = prior.initial_state()
    for number in range(100):
        x, mean, variance = data(n=5, last=1.0, seed=number)
        x = x + 0.1 * number
        prior = prior.following(x)
        state = prior.absorb(state, x, mean, variance)
        assert state.G.shape == (L, 12, 12)
    assert torch.linalg.eigvalsh(state.G).min() > -1e-9 * state.G.abs().max()
    variance = prior.at(state).predict(torch.linspace(-1, 12, 1000, dtype=torch.float64))[1]
    assert (variance >= 0).all()


def test_what_is_known_is_carried_to_another_kernel():
    k = kernel()
    prior = SparsePrior(HippoFeatures(16, horizon=5.0), k, L)
    x, mean, variance = data()
    state = prior.absorb(prior.initial_state(), x, mean, variance)
    there = prior.at(state).predict(x)
    torch.testing.assert_close(there[0], prior.posterior(x, mean, variance).mean)
    k.base_kernel.lengthscale = 1.05 * k.base_kernel.lengthscale
    moved = prior.at(state).predict(x)
    assert 0 < (moved[0] - there[0]).abs().max() < 0.3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"variance": a["variance"][:, :5]}, "mean: expected the shape"),
        (lambda a: a | {"x": a["x"][:7]}, "x: expected 25 times"),
        (lambda a: a | {"x": a["x"] * torch.nan}, "x: expected finite times"),
        (lambda a: a | {"mean": a["mean"] * torch.inf}, "mean: expected finite"),
        (lambda a: a | {"variance": -a["variance"]}, "variance: expected positive"),
        (lambda a: a | {"missing": torch.ones(4, dtype=torch.bool)}, "missing: expected 25 times"),
    ],
)
def test_bad_evidence_is_refused(change, message):
    x, mean, variance = data()
    with pytest.raises(ValueError, match=message):
        SparsePrior(HippoFeatures(6, horizon=5.0), kernel(), L).posterior(
            **change({"x": x, "mean": mean, "variance": variance})
        )


def test_a_kernel_of_another_batch_is_refused():
    with pytest.raises(ValueError, match=r"covar_module: expected a batch shape of \(3,\) or \(\), got \(2,\)"):
        SparsePrior(HippoFeatures(6, horizon=5.0), kernel(), 3)
    one = gpytorch.kernels.RBFKernel()
    p = SparsePrior(gpseq.features.HippoFeatures(6, horizon=5.0), one, 3)
    assert p.initial_state().G.shape == (3, 6, 6)
