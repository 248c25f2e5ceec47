"""Masks: padding is deletion, a row mask gives every query a posterior of its own, a bias needs the inducing keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.sgpa import decoupled_posterior, inducing_features, standard_posterior
from tests.oracles_sgpa import Problem, covariance, dense_posterior, problem, union_posterior

exact = {"rtol": 1e-8, "atol": 1e-9}
KERNELS = ["rbf", "exponential"]
FORMS = ["orthogonal", "cheng_boots"]
SCALINGS = [{}, {"normalise": True}, {"value_scale": "length"}]
IDS = ["plain", "normalise", "length"]


def total(post):
    return post.kl_global + post.kl_amortised


def cut(p: Problem, b: int, keep: torch.Tensor) -> Problem:
    """Sequence b alone, with the kept tokens only."""
    key = p.key[b][:, keep]
    query = key if p.query is p.key else p.query[b]
    return p._replace(query=query, key=key, value=p.value[b][:, keep])


PADDING = torch.tensor([[False, True, False, False, True], [False] * 5, [False, False, True, True, True]])


@pytest.mark.parametrize("scaling", SCALINGS, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries", [None, 4], ids=["self", "cross"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_deletion(queries, kernel, form, scaling, causal, dtype):
    """Whatever padding holds, in values and in gradients."""
    if causal and queries:
        return
    p = problem(batch=(3,), tokens=5, queries=queries, dtype=dtype)
    options = {"kernel": kernel, "form": form, "is_causal": causal, **scaling}
    p = Problem(*p[:3], *(t.clone().requires_grad_() for t in p[3:]))
    tolerance = exact if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    hidden = PADDING[:, None, :, None]
    for junk in (0.0, torch.nan, torch.inf):
        key = p.key.masked_fill(hidden, junk).requires_grad_()
        query = key if queries is None else p.query
        value = p.value.masked_fill(hidden, junk).requires_grad_()
        post = decoupled_posterior(query, key, value, *p[3:], key_padding_mask=PADDING, **options)
        objective, wanted_objective = [], []
        for b, keep in enumerate(~PADDING):
            alone = decoupled_posterior(*cut(p, b, keep), **options)
            seen = keep if queries is None else slice(None)
            rows = post.mean[b][:, seen], post.variance[b][..., seen], post.kl_amortised[b]
            wanted_rows = alone.mean, alone.variance, alone.kl_amortised
            torch.testing.assert_close(rows, wanted_rows, **tolerance)
            objective += [t.sum() for t in rows]
            wanted_objective += [t.sum() for t in wanted_rows]
        got = torch.autograd.grad(sum(objective), [key, value, *p[3:]])
        wanted = torch.autograd.grad(sum(wanted_objective), p[3:])
        assert (got[0][hidden.expand_as(key)] == 0).all() and (got[1][hidden.expand_as(value)] == 0).all()
        slack = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-2}
        torch.testing.assert_close(got[2:], wanted, **slack)


@pytest.mark.parametrize("queries", [None, 4], ids=["self", "cross"])
def test_padding_of_the_standard_posterior_is_deletion(queries):
    p = problem(batch=(3,), tokens=5, queries=queries)
    tril = torch.randn(3, 2, 2, 5, 5, dtype=torch.float64).tril(-1) * 0.3 + torch.eye(5, dtype=torch.float64)
    hidden = PADDING[:, None, :, None]
    key = p.key.masked_fill(hidden, torch.nan).requires_grad_()
    lengthscale = p.lengthscale.clone().requires_grad_()
    post = standard_posterior(
        key if queries is None else p.query,
        key,
        p.value.masked_fill(hidden, torch.nan),
        tril,
        lengthscale,
        p.variance,
        key_padding_mask=PADDING,
        jitter=0.0,
    )
    for b, keep in enumerate(~PADDING):
        c = cut(p, b, keep)
        alone = standard_posterior(*c[:3], tril[b][..., keep, :][..., keep], c.lengthscale, c.variance, jitter=0.0)
        seen = keep if queries is None else slice(None)
        torch.testing.assert_close(post.mean[b][:, seen], alone.mean, **exact)
        torch.testing.assert_close(post.variance[b][..., seen], alone.variance, **exact)
        torch.testing.assert_close(post.kl_amortised[b], alone.kl_amortised, **exact)
    for gradient in torch.autograd.grad(post.mean.sum() + post.kl_amortised.sum(), [key, lengthscale]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"normalise": True, "form": "cheng_boots"}], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("route", ["padding", "rows", "float rows"])
def test_all_keys_masked_leaves_what_the_inducing_keys_know(kernel, options, route):
    p = problem(tokens=3)
    key = p.key.clone().requires_grad_()
    if route == "padding":
        masks = {"key_padding_mask": torch.ones(2, 3, dtype=torch.bool)}
    elif options.get("is_causal"):
        return
    else:
        mask = torch.ones(3, 3, dtype=torch.bool)
        masks = {"attn_mask": mask if route == "rows" else torch.zeros(3, 3).masked_fill(mask, -torch.inf)}
    post = decoupled_posterior(key.clone(), key, *p[2:], kernel=kernel, **masks, **options)
    assert post.kl_amortised.abs().max() == 0
    wanted = dense_posterior(p, keep=torch.zeros(2, 3, dtype=torch.bool), kernel=kernel)
    if not (options.get("normalise") and kernel == "exponential"):  # there the mean over no keys has no scale
        torch.testing.assert_close(post.mean, wanted[0])
        torch.testing.assert_close(post.variance, wanted[1])
    (gradient,) = torch.autograd.grad(post.mean.sum() + post.variance.sum() + post.kl_amortised.sum(), [key])
    assert post.mean.isfinite().all() and post.variance.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("scaling", SCALINGS, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries", [None, 3], ids=["self", "cross"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_row_mask_gives_each_query_its_own_posterior(queries, kernel, form, scaling, padded):
    p = problem(tokens=4, queries=queries)
    rows = queries or 4
    attend = torch.rand(rows, 4) < 0.6
    attend[0] = False  # a query that sees nothing
    keep = torch.tensor([[True, True, False, True], [True] * 4]) if padded else None
    options = {"kernel": kernel, "form": form, **scaling}
    mean, variance, divergence = dense_posterior(p, attend, keep, **options)
    padding = None if keep is None else ~keep
    post = decoupled_posterior(*p, attn_mask=~attend, key_padding_mask=padding, jitter=0.0, **options)
    # Padded queries mean nothing, and the divergence is the mean over those that there are.
    counted = torch.ones(2, rows, dtype=torch.bool) if keep is None or queries else keep
    scaled = counted.clone()
    if scaling.get("normalise") and kernel == "exponential":
        scaled[:, 0] = False  # the mean over no keys has no scale
    for b in range(2):
        torch.testing.assert_close(post.mean[b][:, scaled[b]], mean[b][:, scaled[b]], **exact)
        torch.testing.assert_close(post.variance[b][..., scaled[b]], variance[b][..., scaled[b]], **exact)
        if not (scaling.get("normalise") and form == "orthogonal" and kernel == "exponential"):
            torch.testing.assert_close(total(post)[b], divergence[b][..., counted[b]].mean(-1), **exact)
    floating = torch.zeros(rows, 4).masked_fill(~attend, -torch.inf)
    also = decoupled_posterior(*p, attn_mask=floating, key_padding_mask=padding, jitter=0.0, **options)
    for one, other in zip(post, also, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("scaling", SCALINGS, ids=IDS)
def test_large_negative_numbers_remove_as_infinity_does(least, scaling):
    """The least number of a dtype is a common way to write a mask, and must not leave half a key."""
    p = problem(tokens=4)
    rows, padding = torch.rand(4, 4) < 0.4, torch.tensor([[False, True, False, False], [False] * 4])
    wanted = decoupled_posterior(*p, attn_mask=rows, key_padding_mask=padding, **scaling)
    found = decoupled_posterior(
        *p,
        attn_mask=torch.zeros(4, 4).masked_fill(rows, least),
        key_padding_mask=torch.zeros(2, 4).masked_fill(padding, least),
        **scaling,
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4), (4,), (4, 1), (2, 1, 1, 4), (1, 2, 4, 4), (2, 2, 4, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_broadcast(shape, padded):
    p = problem(tokens=4)
    mask = torch.rand(shape) < 0.3
    padding = torch.tensor([[False, True, False, False], [False] * 4]) if padded else None
    options = {"key_padding_mask": padding, "value_scale": "length", "form": "cheng_boots"}
    small = decoupled_posterior(*p, attn_mask=mask, **options)
    large = decoupled_posterior(*p, attn_mask=mask.expand(2, 2, 4, 4), **options)
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one, other)


@given(data=st.data())
def test_a_causal_row_mask_is_is_causal(data):
    tokens = data.draw(st.integers(1, 7))
    form = data.draw(st.sampled_from(FORMS))
    scaling = data.draw(st.sampled_from(SCALINGS))
    keep = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=2, max_size=2))
    )
    torch.manual_seed(tokens)
    p = problem(tokens=tokens)
    options = {"form": form, "key_padding_mask": ~keep, **scaling}
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    rows = decoupled_posterior(*p, attn_mask=future, **options)
    causal = decoupled_posterior(*p, is_causal=True, **options)
    torch.testing.assert_close(rows.mean, causal.mean)
    torch.testing.assert_close(rows.variance, causal.variance)
    torch.testing.assert_close(rows.kl_amortised, causal.kl_amortised)


def test_a_bias_of_the_keys_is_a_factor_of_their_values():
    p = problem(queries=3)
    bias = torch.randn(2, 4, dtype=torch.float64)
    bias[0, 1] = -torch.inf
    post = decoupled_posterior(*p, key_padding_mask=bias)
    same = decoupled_posterior(*p._replace(value=p.value * bias.exp()[:, None, :, None]))
    for one, other in zip(post, same, strict=True):
        torch.testing.assert_close(one, other)


def positional_prior(p, h, positions, k_position):
    """Prior over inducing keys and tokens: the content kernel times a kernel of positions."""
    u = torch.cat([p.inducing_key[h], p.key[0, h]]) / p.lengthscale[h]
    return p.variance[h] * (-0.5 * torch.cdist(u, u).square()).exp() * k_position(positions)


@pytest.mark.parametrize("cure", ["positions", "content"])
@pytest.mark.parametrize("output", ["diagonal", "full"])
def test_alibi_with_inducing_keys_that_take_part(cure, output):
    """Both cures are the dense SVGP under the product kernel, masked or not, and C(a, a) stays a covariance."""
    p = problem(batch=(1,), tokens=6)
    i, slope, alpha = torch.arange(6, dtype=torch.float64), 0.4, 0.3
    distance = (i[:, None] - i).abs()
    if cure == "positions":
        g = torch.tensor([0.5, 2.5, 7.0], dtype=torch.float64)
        positions = torch.cat([g, i])
        token_bias = -slope * distance
        biases = (-slope * (i[:, None] - g).abs(), -slope * (g[:, None] - g).abs())
        k_position = (-slope * (positions[:, None] - positions).abs()).exp()
    else:  # the inducing variables are those of the content's share of the function
        token_bias = (alpha + (1 - alpha) * (-slope * distance).exp()).log()
        level = torch.tensor(alpha, dtype=torch.float64).log()
        biases = (level.expand(6, 3), level.expand(3, 3))
        k_position = torch.full((9, 9), alpha, dtype=torch.float64)
        k_position[3:, 3:] = token_bias.exp()
    post = decoupled_posterior(*p, attn_mask=token_bias, inducing_bias=biases, jitter=0.0, output=output)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    causal = decoupled_posterior(
        *p, attn_mask=token_bias.masked_fill(future, -torch.inf), inducing_bias=biases, jitter=0.0, output=output
    )
    s = covariance(p.inducing_scale_tril)
    for h in range(2):
        prior = positional_prior(p, h, None, lambda _: k_position)
        assert torch.linalg.eigvalsh(prior).min() > -1e-12
        for d in range(2):
            v_a, v_g = p.value[0, h, :, d], p.inducing_value[h, :, d]
            mean, cov, kl = union_posterior(prior[3:, 3:], prior[3:], prior, v_a, v_g, s[h, d])
            torch.testing.assert_close(post.mean[0, h, :, d], mean, **exact)
            torch.testing.assert_close(post.variance[0, h, d], cov.diagonal(), **exact)
            torch.testing.assert_close(total(post)[0, h, d], kl, **exact)
            costs = []
            for t in range(6):
                n = 4 + t
                mean, cov, kl = union_posterior(
                    prior[n - 1 : n, n - 1 : n], prior[n - 1 : n, :n], prior[:n, :n], v_a[: t + 1], v_g, s[h, d]
                )
                torch.testing.assert_close(causal.mean[0, h, t, d], mean[0], **exact)
                torch.testing.assert_close(causal.variance[0, h, d, t], cov[0, 0], **exact)
                costs.append(kl)
            torch.testing.assert_close(total(causal)[0, h, d], torch.stack(costs).mean(), **exact)


def test_a_bias_with_a_diagonal_changes_the_prior_variance():
    """A positional kernel whose variance differs from token to token."""
    p = problem(batch=(1,), tokens=4)
    log_scale = torch.tensor([0.3, -0.2, 0.1, -0.5], dtype=torch.float64)
    bias, g_bias = log_scale[:, None] + log_scale, (log_scale[:, None].expand(4, 3), torch.zeros(3, 3).double())
    diagonal = decoupled_posterior(*p, attn_mask=bias, inducing_bias=g_bias)
    full = decoupled_posterior(*p, attn_mask=bias, inducing_bias=g_bias, output="full")
    torch.testing.assert_close(diagonal.variance, full.variance)
    plain = decoupled_posterior(*p)
    torch.testing.assert_close(diagonal.variance, plain.variance * (2 * log_scale).exp())


def test_without_the_inducing_keys_alibi_is_no_posterior():
    """Why ``inducing_bias`` exists: C(a, a) is then indefinite."""
    torch.manual_seed(3)
    p = problem(batch=(1,), tokens=6, heads=1)
    x = p.key[0, 0] / p.lengthscale[0]
    i = torch.arange(6, dtype=torch.float64)
    biased = p.variance[0] * (-0.5 * torch.cdist(x, x).square() - 2.0 * (i[:, None] - i).abs()).exp()
    features = inducing_features(p.key[0], p.key[0, :, :3], p.lengthscale, p.variance)[0]
    residual = biased - features @ features.mT
    values, vectors = torch.linalg.eigh(residual)
    assert values.min() < -1e-2
    p = p._replace(inducing_key=p.key[0, :, :3], value=vectors[:, :2][None, None].contiguous())
    post = decoupled_posterior(*p, attn_mask=-2.0 * (i[:, None] - i).abs())
    assert post.kl_amortised.min() < 0


def test_rotated_tokens_stay_a_posterior():
    """RoPE turns tokens; inducing keys stand at position zero."""
    p = problem(tokens=8, width=4)
    lengthscale = p.lengthscale[:, [0, 0, 1, 1]]  # equal within a pair
    angle = torch.arange(8, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    a, b = p.key[..., ::2], p.key[..., 1::2]
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)
    p = p._replace(query=turned, key=turned, lengthscale=lengthscale)
    for options in ({}, {"is_causal": True}, {"kernel": "exponential"}):
        mean, variance, divergence = dense_posterior(
            p,
            attend=torch.ones(8, 8).tril().bool() if "is_causal" in options else None,
            kernel=options.get("kernel", "rbf"),
        )
        post = decoupled_posterior(*p, jitter=0.0, **options)
        torch.testing.assert_close(post.mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(post.variance, variance, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(total(post), divergence.mean(-1), rtol=1e-6, atol=1e-6)
        assert (post.kl_amortised > 0).all()
