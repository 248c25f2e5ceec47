"""The decoupled posterior against an ordinary SVGP on the union of keys and inducing keys, and its limit cases."""

import pytest
import torch

from gpseq.linalg import gaussian_kl
from gpseq.sgpa import decoupled_posterior, standard_posterior, whiten
from tests.oracles_sgpa import base_kernel, covariance, dense_posterior, make_scale, problem, row_posterior

KERNELS = ["rbf", "exponential"]
FORMS = ["orthogonal", "cheng_boots"]
SCALINGS = [{}, {"normalise": True}, {"value_scale": "length"}]
exact = {"rtol": 1e-8, "atol": 1e-9}


def total(post):
    return post.kl_global + post.kl_amortised


def grid(n, m, a, b, c):
    i, j = torch.arange(1, n + 1, dtype=torch.float64), torch.arange(1, m + 1, dtype=torch.float64)
    return c * torch.sin(a * i[:, None] * j + b * j)


def reference_problem():
    def heads(f):
        return torch.stack([f(0), f(1)])

    def factor(h, e):
        t = grid(3, 3, 0.37 + 0.05 * h + 0.07 * e, 0.4, 0.3)
        return t.tril(-1) + torch.diag((0.3 * t.diagonal()).exp())

    return (
        heads(lambda h: grid(4, 2, 0.7 + 0.1 * h, 0.2, 1.4)),
        heads(lambda h: grid(5, 2, 1.1 + 0.1 * h, 0.5, 1.2)),
        heads(lambda h: grid(5, 3, 0.6 + 0.1 * h, 0.1, 0.8)),
        heads(lambda h: grid(3, 2, 1.9 + 0.1 * h, 0.9, 1.5)),
        heads(lambda h: grid(3, 3, 0.8 + 0.1 * h, 0.3, 0.6)),
        heads(lambda h: torch.stack([factor(h, e) for e in range(3)])),
        torch.tensor([[0.9, 1.3], [1.1, 0.7]], dtype=torch.float64),
        torch.tensor([1.2, 0.8], dtype=torch.float64),
    )


def check_reference(device):
    post = decoupled_posterior(*(t.to(device) for t in reference_problem()), jitter=0.0)
    mean = [0.298028903317867, -0.027075901722776, 0.700374844924904]
    variance = [1.251033514135181, 1.326877751619744, 1.204480601167953, 1.575951657800654]
    tight = {"rtol": 0.0, "atol": 1e-10}
    torch.testing.assert_close(post.mean[0, 0].cpu(), torch.tensor(mean, dtype=torch.float64), **tight)
    torch.testing.assert_close(post.variance[0, 0].cpu(), torch.tensor(variance, dtype=torch.float64), **tight)
    assert abs(post.kl_global.sum().item() - 2.116845386870526) < 1e-10


def test_reference_values():
    check_reference("cpu")


@pytest.mark.cuda
def test_reference_values_on_a_gpu():
    check_reference("cuda")


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "normalise", "length"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries", [None, 3], ids=["self", "cross"])
def test_it_is_the_svgp_on_the_union_of_keys_and_inducing_keys(queries, kernel, form, scaling):
    p = problem(queries=queries)
    options = {"kernel": kernel, "form": form, **scaling}
    post = decoupled_posterior(*p, jitter=0.0, **options)
    mean, variance, divergence = dense_posterior(p, **options)
    torch.testing.assert_close(post.mean, mean, **exact)
    torch.testing.assert_close(post.variance, variance, **exact)
    torch.testing.assert_close(total(post), divergence[..., 0], **exact)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalise", [False, True])
def test_covariances_between_queries(kernel, normalise):
    p = problem(batch=(), queries=5, scale="per_dim")
    post = decoupled_posterior(*p, kernel=kernel, normalise=normalise, jitter=0.0, output="full")
    s = covariance(p.inducing_scale_tril)
    for h in range(2):
        for d in range(2):
            _, wanted, _ = row_posterior(
                p.query[h],
                p.key[h],
                p.value[h, :, d],
                p.inducing_key[h],
                p.inducing_value[h, :, d],
                s[h, d],
                p.lengthscale[h],
                p.variance[h],
                kernel=kernel,
                normalise=normalise,
            )
            torch.testing.assert_close(post.covariance[h, d], wanted, **exact)
    torch.testing.assert_close(post.variance, post.covariance.diagonal(dim1=-2, dim2=-1))
    diagonal = decoupled_posterior(*p, kernel=kernel, normalise=normalise, jitter=0.0)
    torch.testing.assert_close(post.variance, diagonal.variance)
    mean = decoupled_posterior(*p, kernel=kernel, normalise=normalise, jitter=0.0, output="mean")
    assert mean.variance is None and mean.covariance is None
    torch.testing.assert_close(mean.mean, post.mean)
    torch.testing.assert_close(total(mean), total(post))


def test_divergences_are_those_of_torch():
    """KL_g against torch's Gaussians in u-space, KL_a against Monte Carlo over the conditional's shift."""
    p = problem(batch=())
    post = decoupled_posterior(*p, jitter=0.0)
    k_gg = torch.stack(
        [base_kernel("rbf", g, g, p.lengthscale[h], p.variance[h]) for h, g in enumerate(p.inducing_key)]
    )
    tril = torch.linalg.cholesky(k_gg).unsqueeze(1)
    q = torch.distributions.MultivariateNormal((k_gg @ p.inducing_value).mT, scale_tril=tril @ p.inducing_scale_tril)
    prior = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), k_gg.unsqueeze(1))
    torch.testing.assert_close(post.kl_global, torch.distributions.kl_divergence(q, prior))
    # Monte Carlo of log q(u) - log p(u) over the union, one head and dimension.
    u = torch.cat([p.inducing_key[0], p.key[0]])
    k_uu = base_kernel("rbf", u, u, p.lengthscale[0], p.variance[0])
    s = covariance(p.inducing_scale_tril)[0, 0]
    joint_mean, joint_cov, _ = row_posterior(
        u, p.key[0], p.value[0, :, 0], p.inducing_key[0], p.inducing_value[0, :, 0], s, p.lengthscale[0], p.variance[0]
    )
    q = torch.distributions.MultivariateNormal(joint_mean, joint_cov + 1e-13 * torch.eye(7, dtype=torch.float64))
    draws = q.sample((40_000,))
    prior = torch.distributions.MultivariateNormal(torch.zeros(7, dtype=torch.float64), k_uu)
    log_ratio = q.log_prob(draws) - prior.log_prob(draws)
    error = log_ratio.std() / 200.0
    assert abs(log_ratio.mean() - total(post)[0, 0]) < 5 * error


class TestLimits:
    """The limit cases of the method."""

    def test_the_prior(self):
        p = problem()
        prior = make_scale("shared", 2, 2, 3) * 0 + torch.eye(3, dtype=torch.float64)
        p = p._replace(value=0 * p.value, inducing_value=0 * p.inducing_value, inducing_scale_tril=prior)
        post = decoupled_posterior(*p, jitter=0.0)
        assert post.mean.abs().max() < 1e-14
        torch.testing.assert_close(post.variance, p.variance[:, None, None].expand_as(post.variance))
        assert total(post).abs().max() < 1e-13

    def test_keys_that_are_inducing_keys_drop_out(self):
        """Then it is the standard posterior on the inducing keys."""
        p = problem(batch=(), queries=5, tokens=3)
        p = p._replace(key=p.inducing_key)
        post = decoupled_posterior(*p, jitter=0.0)
        assert post.kl_amortised.abs().max() < 1e-12
        without = decoupled_posterior(*p._replace(value=0 * p.value), jitter=0.0)
        torch.testing.assert_close(post.mean, without.mean)
        standard = standard_posterior(
            p.query, p.inducing_key, p.inducing_value, p.inducing_scale_tril, p.lengthscale, p.variance, jitter=0.0
        )
        torch.testing.assert_close(post.mean, standard.mean)
        torch.testing.assert_close(post.variance, standard.variance)
        torch.testing.assert_close(post.kl_global, standard.kl_amortised)

    def test_at_the_inducing_keys(self):
        p = problem(batch=(), queries=3)
        p = p._replace(query=p.inducing_key, inducing_scale_tril=1e-9 * p.inducing_scale_tril)
        post = decoupled_posterior(*p, jitter=0.0)
        assert post.variance.max() < 1e-12
        k_gg = torch.stack([base_kernel("rbf", g, g, p.lengthscale[h], p.variance[h]) for h, g in enumerate(p.query)])
        torch.testing.assert_close(post.mean, k_gg @ p.inducing_value)

    @pytest.mark.parametrize("scale", ["shared", "per_dim", "diagonal", "low_rank"])
    @pytest.mark.parametrize("form", FORMS)
    def test_no_inducing_keys_is_plain_kernel_attention(self, form, scale):
        p = problem(batch=(), inducing=0, scale=scale)
        post = decoupled_posterior(*p, form=form, jitter=0.0)
        k = torch.stack([base_kernel("rbf", x, x, p.lengthscale[h], p.variance[h]) for h, x in enumerate(p.key)])
        torch.testing.assert_close(post.mean, k @ p.value)
        torch.testing.assert_close(post.variance, p.variance[:, None, None].expand_as(post.variance))
        torch.testing.assert_close(post.kl_amortised, 0.5 * (p.value * (k @ p.value)).sum(-2))
        assert post.kl_global.abs().max() == 0

    def test_exact_regression(self):
        """Keys = inputs, v_a = (K + noise)^-1 y: the exact GP mean; with the optimal S, Titsias <= ELBO <= evidence."""
        p, noise = problem(batch=(), heads=1, tokens=7, dims=1, inducing=3, scale="shared"), 0.1
        x, g, s2 = p.key[0], p.inducing_key[0], p.variance[0]
        y = torch.sin(x.sum(-1))
        eye = torch.eye(7, dtype=torch.float64)
        k = base_kernel("rbf", x, x, p.lengthscale[0], s2)
        k_gx, k_gg = base_kernel("rbf", g, x, p.lengthscale[0], s2), base_kernel("rbf", g, g, p.lengthscale[0], s2)
        v_a = torch.linalg.solve(k + noise * eye, y)
        v_g = torch.linalg.solve(k_gg, k_gx @ v_a)
        features = torch.linalg.solve_triangular(torch.linalg.cholesky(k_gg), k_gx, upper=False)
        best = torch.linalg.cholesky(
            torch.linalg.inv(torch.eye(3, dtype=torch.float64) + features @ features.mT / noise)
        )
        p = p._replace(
            value=v_a[None, :, None], inducing_value=v_g[None, :, None], inducing_scale_tril=best[None, None]
        )
        post = decoupled_posterior(*p, jitter=0.0)
        torch.testing.assert_close(post.mean[0, :, 0], k @ v_a)
        fit = torch.distributions.Normal(post.mean[0, :, 0], noise**0.5).log_prob(y).sum()
        elbo = fit - 0.5 * post.variance.sum() / noise - total(post).sum()
        zero = torch.zeros(7, dtype=torch.float64)
        evidence = torch.distributions.MultivariateNormal(zero, k + noise * eye).log_prob(y)
        nystrom = features.mT @ features
        titsias = torch.distributions.MultivariateNormal(zero, nystrom + noise * eye).log_prob(y)
        titsias = titsias - 0.5 * (k - nystrom).diagonal().sum() / noise
        assert titsias <= elbo + 1e-10 and elbo <= evidence + 1e-10

    def test_the_forms_are_one_family_for_one_sequence(self):
        p = problem(batch=())
        boots = decoupled_posterior(*p, form="cheng_boots", jitter=0.0)
        moved = []
        for h, g in enumerate(p.inducing_key):
            k_gg = base_kernel("rbf", g, g, p.lengthscale[h], p.variance[h])
            k_ga = base_kernel("rbf", g, p.key[h], p.lengthscale[h], p.variance[h])
            moved.append(p.inducing_value[h] + torch.linalg.solve(k_gg, k_ga @ p.value[h]))
        same = decoupled_posterior(*p._replace(inducing_value=torch.stack(moved)), jitter=0.0)
        torch.testing.assert_close(boots.mean, same.mean)
        torch.testing.assert_close(boots.variance, same.variance)
        torch.testing.assert_close(total(boots), total(same))

    def test_zero_in_the_form_of_cheng_and_boots_is_kernel_attention(self):
        p = problem(queries=3)
        p = p._replace(inducing_value=0 * p.inducing_value)
        post = decoupled_posterior(*p, form="cheng_boots")
        wanted = torch.stack(
            [base_kernel("rbf", p.query[:, h], p.key[:, h], p.lengthscale[h], p.variance[h]) for h in range(2)], 1
        )
        torch.testing.assert_close(post.mean, wanted @ p.value)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("masked", ["none", "padding", "biased padding", "causal", "rows"])
def test_normalised_it_is_softmax_attention(kernel, masked):
    """With w = 0, whatever the inducing keys and the variance are."""
    p = problem(tokens=5)
    p = p._replace(inducing_value=0 * p.inducing_value)
    options, ignore = {}, torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    padding = torch.tensor([[False, False, True, False, True], [False] * 5])
    if masked == "padding":
        options, ignore = {"key_padding_mask": padding}, ignore.masked_fill(padding[:, None, None], -torch.inf)
    elif masked == "biased padding":
        bias = torch.randn(2, 5, dtype=torch.float64).masked_fill(padding, -torch.inf)
        options, ignore = {"key_padding_mask": bias}, ignore + bias[:, None, None]
    elif masked != "none":
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        options = {"is_causal": True} if masked == "causal" else {"attn_mask": future}
        ignore = ignore.masked_fill(future, -torch.inf)
    post = decoupled_posterior(*p, kernel=kernel, form="cheng_boots", normalise=True, **options)
    x = p.key / p.lengthscale.unsqueeze(-2)
    scores = x @ x.mT if kernel == "exponential" else -0.5 * torch.cdist(x, x).square()
    wanted = (scores + ignore).softmax(-1) @ p.value
    if "padding" in masked:  # padded queries mean nothing
        post, wanted = post._replace(mean=post.mean[0, :, [0, 1, 3]]), wanted[0, :, [0, 1, 3]]
    torch.testing.assert_close(post.mean, wanted)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_shapes_and_batches(batch, tokens, dtype):
    """A batch is its sequences, one by one; one token and fewer tokens than inducing keys are sequences too."""
    p = problem(batch=batch, tokens=tokens, dtype=dtype, dims=4, scale="shared")
    post = decoupled_posterior(*p, output="full", is_causal=True)
    assert post.mean.shape == (*batch, 2, tokens, 4) and post.mean.dtype == dtype
    assert post.variance.shape == (*batch, 2, 1, tokens)
    assert post.covariance.shape == (*batch, 2, 1, tokens, tokens)
    assert post.kl_global.shape == (2, 4)
    assert post.kl_amortised.shape == (*batch, 2, 4)
    assert post.kl_prefix.shape == (*batch, 2, 4, tokens)
    if batch:
        alone = decoupled_posterior(*(t[-1] for t in p[:3]), *p[3:], output="full")
        # query and key are different tensors here
        together = decoupled_posterior(p.key.clone(), *p[1:], output="full")
        torch.testing.assert_close(together.mean[-1], alone.mean)
        torch.testing.assert_close(together.covariance[-1], alone.covariance)
        torch.testing.assert_close(together.kl_amortised[-1], alone.kl_amortised, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_self_attention_is_cross_attention_of_equal_tensors(kernel):
    """Which route is taken, and whether torch.func hides that two tensors are one, changes no number."""
    p = problem(tokens=5)
    padding = torch.tensor([[False] * 4 + [True], [False] * 5])
    rows = torch.rand(5, 5) < 0.4
    for options in (
        {},
        {"is_causal": True},
        {"is_causal": True, "key_padding_mask": padding},
        {"key_padding_mask": padding},
        {"attn_mask": rows},
        {"normalise": True, "form": "cheng_boots"},
        {"normalise": True, "form": "cheng_boots", "is_causal": True},
        {"value_scale": "length", "form": "cheng_boots", "is_causal": True},
    ):
        one = decoupled_posterior(*p, kernel=kernel, **options)
        two = decoupled_posterior(p.query.clone(), *p[1:], kernel=kernel, **options)
        keep = slice(None, 4) if "key_padding_mask" in options else slice(None)  # padded queries mean nothing
        torch.testing.assert_close(one.mean[..., keep, :], two.mean[..., keep, :])
        torch.testing.assert_close(one.variance[..., keep], two.variance[..., keep])
        torch.testing.assert_close(one.kl_amortised, two.kl_amortised)


@pytest.mark.parametrize("kernel", KERNELS)
def test_order_of_the_tokens_does_not_matter(kernel):
    p, order = problem(tokens=6), torch.randperm(6)
    key = p.key[..., order, :]
    post = decoupled_posterior(*p, kernel=kernel, output="full")
    mixed = decoupled_posterior(key, key, p.value[..., order, :], *p[3:], kernel=kernel, output="full")
    torch.testing.assert_close(mixed.mean, post.mean[..., order, :])
    torch.testing.assert_close(mixed.covariance, post.covariance[..., order, :][..., order])
    torch.testing.assert_close(mixed.kl_amortised, post.kl_amortised)


@pytest.mark.parametrize("scale", ["shared", "per_dim", "diagonal", "low_rank"])
def test_variances_are_between_nothing_and_the_prior_where_q_is_narrower(scale, dtype):
    for seed in range(5):
        torch.manual_seed(seed)
        p = problem(tokens=12, inducing=8, scale=scale, dtype=dtype)
        root = make_scale(scale, 2, 2, 8, dtype)
        largest = torch.linalg.matrix_norm(covariance(root), ord=2).max().sqrt()
        small = type(root)(*(t / largest for t in root)) if isinstance(root, tuple) else root / largest
        post = decoupled_posterior(*p._replace(inducing_scale_tril=small), output="full")
        assert (post.variance >= 0).all()
        assert (post.variance <= p.variance[:, None, None] * (1 + 1e-5)).all()
        assert (post.kl_global > 0).all() and (post.kl_amortised > -1e-5).all()
        assert torch.linalg.eigvalsh(post.covariance.double()).min() > -1e-5


def test_without_inducing_values_the_divergence_of_q_is_gaussian_kl():
    p = problem(batch=())
    p = p._replace(inducing_value=0 * p.inducing_value)
    zero = torch.zeros(2, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(decoupled_posterior(*p).kl_global, gaussian_kl(zero, p.inducing_scale_tril))


def test_jitter_is_in_every_term():
    """With jitter it is the exact posterior of slightly noisy inducing variables: the bound stays one."""
    p = problem(batch=(), heads=1, dims=1)
    post = decoupled_posterior(*p, jitter=1e-2)
    g, x, length, s2 = p.inducing_key[0], p.key[0], p.lengthscale[0], p.variance[0]
    k_gg = whiten(base_kernel("rbf", g, g, length, s2), 1e-2).gram
    k_ag, k_aa = base_kernel("rbf", x, g, length, s2), base_kernel("rbf", x, x, length, s2)
    residual = k_aa - k_ag @ torch.linalg.solve(k_gg, k_ag.mT)
    v_a, v_g = p.value[0, :, 0], p.inducing_value[0, :, 0]
    torch.testing.assert_close(post.mean[0, :, 0], residual @ v_a + k_ag @ v_g)
    torch.testing.assert_close(post.kl_amortised[0, 0], 0.5 * v_a @ residual @ v_a)
    q_cost = gaussian_kl(torch.zeros(3, dtype=torch.float64), p.inducing_scale_tril[0, 0])
    torch.testing.assert_close(post.kl_global[0, 0], q_cost + 0.5 * v_g @ k_gg @ v_g)


@pytest.mark.parametrize("batch", [(0,), (0, 2), (2, 0, 1)])
@pytest.mark.parametrize("tokens", [4, 200])
def test_no_sequence_at_all(batch, tokens):
    post = decoupled_posterior(*problem(batch=batch, tokens=tokens), is_causal=True)
    assert post.mean.shape == (*batch, 2, tokens, 2) and post.kl_amortised.shape == (*batch, 2, 2)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"output": "full", "kernel": "exponential"}], ids=str)
def test_shapes_without_data(options):
    """On the meta device, for those who size a model before they build it."""
    p = problem()
    there = p._replace(**{name: getattr(p, name).to("meta") for name in p._fields})
    there = there._replace(key=there.query)
    found, wanted = decoupled_posterior(*there, **options), decoupled_posterior(*p, **options)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and one.dtype == other.dtype)
