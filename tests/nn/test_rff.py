"""RFFAttention: against dense Gaussian process regression, one head, one query and one prefix at a time."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from gpseq.nn import kl_divergence as model_divergence
from gpseq.nn import use_generator
from gpseq.nn.kep import KEPAttention
from gpseq.nn.rff import RFFAttention
from gpseq.prediction import predict
from gpseq.sgpa.regression import feature_regression, wave_features

B, T, E, H, R = 3, 7, 8, 2, 5
D = E // H
DOUBLE = {"dtype": torch.float64}


def layer_of(**options) -> RFFAttention:
    """A layer whose parameters are all away from where they start."""
    options = {"batch_first": True, "sampling": "mean", "num_frequencies": R, "dtype": torch.float64, **options}
    layer = RFFAttention(options.pop("embed_dim", E), options.pop("num_heads", H), **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return layer


def rows(layer: RFFAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, readings: list[list[int]]):
    """Mean ``(B, H, Tq, D)``, variance ``(B, H, Tq)`` and divergence ``(B, H, Tq)`` by regression in function space.

    Query t has the readings ``readings[t]``. The divergence is that of the weights, by torch.
    """
    q, k, v = layer.project_query(query), layer.project_key(key), layer.project_value(value)
    parameters = layer.frequency, layer.log_lengthscale.exp(), layer.log_variance.exp()
    q, k = wave_features(q, *parameters), wave_features(k, *parameters)
    mean, var, kl = torch.zeros_like(v[..., :1, :].expand(*q.shape[:-1], D)), q[..., 0] * 0, q[..., 0] * 0
    mean = mean.clone()
    for b in range(len(q)):
        for h in range(layer.num_heads):
            for t, seen in enumerate(readings):
                noise = layer.log_noise[h].exp() * (len(seen) if layer.noise_scale == "length" else 1)
                psi, y, x = k[b, h, seen], v[b, h, seen], q[b, h, t]
                gram = psi @ psi.mT + noise * torch.eye(len(seen), **DOUBLE)
                mean[b, h, t] = x @ psi.mT @ torch.linalg.solve(gram, y)
                var[b, h, t] = x @ x - x @ psi.mT @ torch.linalg.solve(gram, psi @ x)
                precision = psi.mT @ psi / noise + torch.eye(2 * layer.num_frequencies, **DOUBLE)
                mu = torch.linalg.solve(precision, psi.mT @ y / noise)
                prior = MultivariateNormal(torch.zeros_like(mu[:, 0]), torch.eye(len(mu), **DOUBLE))
                q_w = MultivariateNormal(mu.mT, precision_matrix=precision.expand(D, -1, -1))
                kl[b, h, t] = kl_divergence(q_w, prior).sum()
    return mean, var, kl


def assemble(layer: RFFAttention, mean: torch.Tensor) -> torch.Tensor:
    return layer.out_proj(mean.transpose(1, 2).flatten(-2))


def assert_same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# What it computes


@pytest.mark.parametrize("options", [{}, {"noise_scale": "length"}, {"learn_frequencies": True}])
def test_moments_and_divergence_are_those_of_dense_regression(options):
    layer, x = layer_of(**options), torch.randn(B, T, E, **DOUBLE)
    mean, var, kl = rows(layer, x, x, x, [list(range(T))] * T)
    out, weights = layer(x, x, x, average_attn_weights=False)
    assert_same(out, assemble(layer, mean))
    assert_same(layer.kl_divergence(), kl[..., 0].sum())
    heads = layer.heads(layer._tokens(x, x, x)[0], True)
    assert_same(heads.variance, var.unsqueeze(-2))
    root = heads.features @ heads.root.squeeze(-3)
    assert_same(root.square().sum(-1), var)
    assert_same(weights @ layer.project_value(x), mean)
    # In one pass, through the output's weights.
    center, covariance = layer.conditional(x)
    assert_same(center, out)
    spread = torch.diag_embed(var.unsqueeze(-1).expand(-1, -1, -1, D).transpose(1, 2).flatten(-2))
    assert_same(covariance.to_dense(), layer.out_proj.weight @ spread @ layer.out_proj.weight.mT)


def test_cross_attention_with_other_widths():
    layer = layer_of(kdim=6, vdim=3)
    query, key, value = torch.randn(B, 4, E, **DOUBLE), torch.randn(B, T, 6, **DOUBLE), torch.randn(B, T, 3, **DOUBLE)
    mean, _, kl = rows(layer, query, key, value, [list(range(T))] * 4)
    out, weights = layer(query, key, value)
    assert_same(out, assemble(layer, mean))
    assert weights.shape == (B, 4, T)
    assert_same(layer.kl_divergence(), kl[..., 0].sum())


def test_causal_is_each_prefix_by_itself():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    mean, var, kl = rows(layer, x, x, x, [list(range(t + 1)) for t in range(T)])
    out, weights = layer(x, x, x, is_causal=True, average_attn_weights=False)
    assert_same(out, assemble(layer, mean))
    assert_same(layer.kl_divergence(), kl.mean(-1).sum())
    assert_same(weights, weights.tril())
    heads = layer.heads(layer._tokens(x, x, x, is_causal=True)[0], True)
    assert_same(heads.variance.squeeze(-2), var)
    assert heads.root is None
    # The layer on the prefix.
    for t in range(1, T + 1):
        assert_same(out[:, t - 1], layer(x[:, :t], x[:, :t], x[:, :t])[0][:, -1])


@pytest.mark.parametrize("length", [64, 65, 200])
def test_the_causal_form_in_chunks_is_that_of_single_prefixes(length):
    q, k = torch.randn(2, length, 6, **DOUBLE), torch.randn(2, length, 6, **DOUBLE)
    v, noise = torch.randn(2, length, 3, **DOUBLE), torch.tensor([0.3, 2.0], **DOUBLE)
    post = feature_regression(q, k, v, noise, is_causal=True)
    for t in (0, 1, 62, 63, 64, length - 2, length - 1):
        if t < length:
            alone = feature_regression(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], noise)
            assert_same(post.mean[:, t], alone.mean[:, 0])
            assert_same(post.variance[..., t], alone.variance[..., 0])
            assert_same(post.kl_prefix[..., t], alone.kl)
    assert_same(post.kl, post.kl_prefix.mean(-1))


def test_the_future_has_no_gradient():
    q, k, v = (torch.randn(1, 150, w, **DOUBLE, requires_grad=True) for w in (4, 4, 2))
    post = feature_regression(q, k, v, torch.ones(1, **DOUBLE), is_causal=True)
    (post.mean[:, 100].sum() + post.variance[..., 100].sum() + post.kl_prefix[..., 100].sum()).backward()
    for tensor in (k, v):
        assert (tensor.grad[:, 101:] == 0).all() and (tensor.grad[:, :101] != 0).all()


def test_the_divergence_is_a_monte_carlo_estimate_of_itself():
    psi, v = torch.randn(1, 4, 3, **DOUBLE), torch.randn(1, 4, 1, **DOUBLE)
    post = feature_regression(psi, psi, v, torch.tensor([0.5], **DOUBLE))
    prior = MultivariateNormal(torch.zeros(3, **DOUBLE), torch.eye(3, **DOUBLE))
    mu = torch.linalg.solve(psi[0].mT @ psi[0] + 0.5 * torch.eye(3, **DOUBLE), psi[0].mT @ v[0, :, 0])
    q_w = MultivariateNormal(mu, post.root[0] @ post.root[0].mT)
    w = q_w.sample((20_000,))
    gap = q_w.log_prob(w) - prior.log_prob(w)
    assert abs(gap.mean() - post.kl[0, 0]) < 5 * gap.std() / math.sqrt(len(gap))


def test_many_frequencies_give_the_exact_process_and_the_error_falls():
    torch.manual_seed(3)
    x, y = torch.randn(2, 12, 3, **DOUBLE), torch.randn(2, 12, 2, **DOUBLE)
    scale, s2, noise = torch.full((2, 3), 1.5, **DOUBLE), torch.tensor([0.7, 1.4], **DOUBLE), 0.3
    gram = s2[:, None, None] * torch.exp(-0.5 * torch.cdist(x / 1.5, x / 1.5).square())
    inverse = torch.linalg.inv(gram + noise * torch.eye(12, **DOUBLE))
    mean, var = gram @ inverse @ y, (gram - gram @ inverse @ gram).diagonal(dim1=-2, dim2=-1)
    errors = []
    for count in (50, 500, 5000):
        error = torch.zeros(())
        for _ in range(3):
            psi = wave_features(x, torch.randn(2, count, 3, **DOUBLE), scale, s2)
            assert_same(psi.square().sum(-1), s2[:, None].expand(2, 12))
            post = feature_regression(psi, psi, y, torch.full((2,), noise, **DOUBLE)) if count < 5000 else None
            if post is None:  # as many weights need the dual form: the same numbers
                k = psi @ psi.mT
                solve = torch.linalg.inv(k + noise * torch.eye(12, **DOUBLE))
                found = k @ solve @ y, (k - k @ solve @ k).diagonal(dim1=-2, dim2=-1)
            else:
                found = post.mean, post.variance.squeeze(-2)
            error = error + (found[0] - mean).abs().mean() + (found[1] - var).abs().mean()
        errors.append(error / 3)
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1] and errors[2] < 0.03


@given(
    length=st.integers(1, 9),
    width=st.integers(1, 5),
    noise=st.floats(1e-3, 1e3),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_variance_is_between_zero_and_the_prior_and_the_divergence_is_none_too_small(
    length, width, noise, causal, seed
):
    g = torch.Generator().manual_seed(seed)
    psi, v = torch.randn(1, length, width, generator=g, **DOUBLE), torch.randn(1, length, 2, generator=g, **DOUBLE)
    post = feature_regression(psi, psi, v, torch.tensor([noise], **DOUBLE), is_causal=causal)
    assert (post.variance >= 0).all() and (post.variance.squeeze(-2) <= psi.square().sum(-1) * (1 + 1e-9)).all()
    assert (post.kl >= -1e-12).all()
    assert post.mean.isfinite().all()


# Masks


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padding_is_deletion_whatever_stands_there(causal, kind):
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    removed = torch.zeros(B, T, dtype=torch.bool)
    removed[0, 5:], removed[1, :2], removed[2, :] = True, True, True
    mask = removed if kind == "bool" else torch.zeros(B, T, **DOUBLE).masked_fill(removed, -torch.inf)
    x = x.masked_fill(removed.unsqueeze(-1), torch.nan).requires_grad_()
    out, weights = layer(x, x, x, key_padding_mask=mask, is_causal=causal)
    kl = layer.kl_divergence()
    (out.sum() + kl).backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    total = torch.zeros(())
    for b in range(2):
        keep = ~removed[b]
        y = x[b : b + 1, keep]
        alone, alone_weights = layer(y, y, y, is_causal=causal)
        assert_same(out[b, keep], alone[0])
        assert_same(weights[b][keep][:, keep], alone_weights[0])
        total = total + layer.kl_divergence()
    assert (out[removed] == 0).all() and (weights.mT[removed] == 0).all()
    assert_same(kl, total)  # without a key a sequence pays nothing


def test_a_floating_mask_counts_keys():
    layer, x = layer_of(), torch.randn(1, 3, E, **DOUBLE)
    counted = torch.tensor([[0.0, math.log(2.0), 0.0]], **DOUBLE)
    twice = x[:, [0, 1, 1, 2]]
    for options in ({}, {"is_causal": True}):
        out = layer(x, x, x, key_padding_mask=counted, **options)[0]
        kl = layer.kl_divergence()
        assert_same(out[:, 2], layer(twice, twice, twice, **options)[0][:, 3])
        if not options:
            assert_same(kl, layer.kl_divergence())


def test_only_the_causal_mask_on_pairs_by_any_name():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    expected = layer(x, x, x, is_causal=True)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(T).double()
    other = x.clone()
    for found in (
        layer(x, x, x, attn_mask=mask)[0],
        layer(x, x, x, attn_mask=mask, is_causal=True)[0],
        layer(x, x, x, attn_mask=mask.isinf().expand(B * H, T, T))[0],
        layer(x, other, other, is_causal=True)[0],
    ):
        assert_same(found, expected)
    assert_same(layer(x, x, x, attn_mask=torch.zeros(T, T, dtype=torch.bool))[0], layer(x, x, x)[0])
    for wrong in (mask.isinf().mT, mask.masked_fill(mask == 0, 0.1), torch.eye(T, dtype=torch.bool)):
        with pytest.raises(ValueError, match="attn_mask: expected None or the causal mask: a query with keys"):
            layer(x, x, x, attn_mask=wrong)


def test_what_makes_no_sense_raises():
    x = torch.randn(B, T, E, **DOUBLE)
    with pytest.raises(ValueError, match="noise_scale: expected None under a causal mask"):
        layer_of(noise_scale="length")(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="sampling: expected 'marginal' or 'mean' where a causal mask"):
        layer_of(sampling="joint")(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="sampling: expected one of"):
        layer_of(sampling="pathwise")
    with pytest.raises(ValueError, match="noise_scale: expected one of"):
        layer_of(noise_scale="tokens")
    with pytest.raises(ValueError, match="num_frequencies: expected at least 1"):
        layer_of(num_frequencies=0)
    with pytest.raises(ValueError, match="add_zero_attn: expected False"):
        layer_of(add_zero_attn=True)
    layer = layer_of()
    with pytest.raises(RuntimeError, match="expected a call of the layer before"):
        layer.kl_divergence()
    layer(x, x, x)
    with pytest.raises(ValueError, match="convention: expected one of"):
        layer.kl_divergence(convention="batch")


# The contract of a layer


def test_layouts_agree():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    out, weights = layer(x, x, x)
    assert out.shape == (B, T, E) and weights.shape == (B, T, T)
    assert layer(x, x, x, average_attn_weights=False)[1].shape == (B, H, T, T)
    assert layer(x, x, x, need_weights=False)[1] is None
    assert_same(layer(x[0], x[0], x[0])[0], out[0])
    second = layer_of(batch_first=False)
    second.load_state_dict(layer.state_dict())
    y = x.transpose(0, 1)
    assert_same(second(y, y, y)[0], out.transpose(0, 1))
    assert_same(second.conditional(y)[0], out.transpose(0, 1))
    assert layer.conditional(x[0])[1].shape == (T, E, E)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_any_length_in_any_dtype(dtype, length, causal):
    layer, x = layer_of(dtype=dtype, sampling="marginal"), torch.randn(B, length, E, dtype=dtype)
    out, _ = layer(x, x, x, is_causal=causal)
    assert out.dtype == dtype and out.isfinite().all()
    layer.sampling = "mean"
    mean, kl = layer(x, x, x, is_causal=causal)[0], layer.kl_divergence()
    double = copy.deepcopy(layer).double()
    y = x.double()
    tol = 1e-10 if dtype == torch.float64 else 1e-4
    assert_same(mean.double(), double(y, y, y, is_causal=causal)[0], tol)
    assert_same(kl.double(), double.kl_divergence(), tol)


def test_float32_stands_repeated_keys_and_little_noise():
    layer = layer_of(dtype=torch.float32, sampling="marginal")
    with torch.no_grad():
        layer.log_noise.fill_(math.log(1e-6))
    x = torch.randn(1, 1, E).expand(B, 300, E).clone().requires_grad_()
    for causal in (False, True):
        out, _ = layer(x, x, x, need_weights=False, is_causal=causal)
        (out.sum() + layer.kl_divergence()).backward()
        assert out.isfinite().all() and x.grad.isfinite().all()


def test_half_precision_and_autocast():
    x = torch.randn(B, T, E)
    layer = layer_of(dtype=torch.float32)
    expected = layer(x, x, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x, x, x)[0].float(), expected, rtol=0.1, atol=0.1)
    half = layer.bfloat16()
    y = x.bfloat16()
    out = half(y, y, y)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_the_posterior_is_a_distribution():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    mean, var, _ = rows(layer, x, x, x, [list(range(T))] * T)
    post = layer.posterior(x, x, x)
    assert post.batch_shape == (B, H) and post.event_shape == (T, D)
    assert_same(post.mean, mean)
    assert_same(post.variance, var.unsqueeze(-1).expand(B, H, T, D), 1e-8)
    heads = layer.heads(layer._tokens(x, x, x)[0], True)
    root = heads.features @ heads.root.squeeze(-3)
    each = post.covariance_matrix.unflatten(-1, (T, D)).unflatten(-3, (T, D))
    assert_same(each[..., 0, :, 0], root @ root.mT, 1e-8)
    assert (each[..., 0, :, 1] == 0).all()
    assert post.rsample().shape == (B, H, T, D) and post.log_prob(mean).isfinite().all()
    long = torch.randn(2, 300, E)
    single = copy.deepcopy(layer).float().posterior(long, long, long)
    assert single.rsample().isfinite().all() and single.log_prob(single.mean).isfinite().all()
    assert layer.posterior(x[0], x[0], x[0]).batch_shape == (H,)
    with pytest.raises(ValueError, match="is_causal: expected False where"):
        layer.posterior(x, x, x, is_causal=True)


def test_looking_leaves_the_last_divergence_as_it_was():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    layer(x, x, x)
    cost = layer.kl_divergence()
    y = x[:2]
    layer.conditional(y)
    layer.posterior(y, y, y)
    assert torch.equal(layer.kl_divergence(), cost)
    with pytest.raises(ValueError, match="num_samples: expected a number that divides"):
        layer.num_samples = 2
        layer.kl_divergence()
    with pytest.raises(ValueError, match="num_samples: expected at least 1"):
        layer.num_samples = 0
    layer.num_samples = 1
    nothing = x[:0]
    layer(nothing, nothing, nothing)
    assert layer.kl_divergence() == 0
    with pytest.raises(RuntimeError, match="expected a call of the layer before"):
        copy.deepcopy(layer).kl_divergence()


def test_draws_have_the_moments_they_should():
    layer, x = layer_of(sampling="marginal"), torch.randn(1, 4, E, **DOUBLE)
    center, covariance = (
        m.detach() if isinstance(m, torch.Tensor) else m.to_dense().detach() for m in layer.conditional(x)
    )
    many = x.expand(20_000, -1, -1)
    for sampling in ("marginal", "joint"):
        layer.sampling = sampling
        with torch.no_grad():
            draws = layer(many, many, many, need_weights=False)[0]
        torch.testing.assert_close(draws.mean(0), center[0], rtol=0, atol=0.05)
        for t in range(4):
            torch.testing.assert_close(draws[:, t].mT.cov(), covariance[0, t], rtol=0.1, atol=0.03)
        heads = layer.heads(layer._tokens(x, x, x)[0], True)
        root = (heads.features @ heads.root.squeeze(-3))[0]  # (H, T, F)
        weight = layer.out_proj.weight.unflatten(1, (H, D))
        across = torch.einsum("hf,hf,ehd,ghd->eg", root[:, 0], root[:, 1], weight, weight).detach()
        found = (draws[:, 0] - center[0, 0]).mT @ (draws[:, 1] - center[0, 1]) / len(draws)
        torch.testing.assert_close(found, across if sampling == "joint" else 0 * across, rtol=0.1, atol=0.03)


def test_draws_come_from_the_generator_in_train_and_eval():
    layer, x = layer_of(sampling="marginal"), torch.randn(B, T, E, **DOUBLE)
    for sampling in ("marginal", "joint"):
        layer.sampling = sampling
        for training in (True, False):
            layer.train(training)
            drawn = []
            for seed in (1, 1, 2):
                with use_generator(layer, torch.Generator().manual_seed(seed)):
                    drawn.append(layer(x, x, x)[0])
            assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_predict_averages_passes():
    model = nn.Sequential(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), nn.Linear(E, 3))
    model[0].self_attn = layer_of(sampling="marginal", dtype=torch.float32)
    p = predict(model, torch.randn(B, T, E), num_samples=5, generator=torch.Generator().manual_seed(0))
    assert p.samples.shape == (5, B, T, 3) and (p.samples.std(0) > 0).all()


def test_gradients_reach_all_parameters():
    layer, x = layer_of(sampling="marginal", learn_frequencies=True), torch.randn(B, T, E, **DOUBLE)
    out, _ = layer(x, x, x)
    (out.square().sum() + layer.kl_divergence(100)).backward()
    assert all(p.grad is not None and (p.grad != 0).any() and p.grad.isfinite().all() for p in layer.parameters())
    assert "frequency" in dict(layer.named_parameters())
    assert "frequency" in dict(layer_of().named_buffers())


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_right(causal):
    q, k, v = (torch.randn(1, 5, w, **DOUBLE, requires_grad=True) for w in (3, 3, 2))
    noise = torch.tensor([0.7], **DOUBLE, requires_grad=True)

    def outputs(*inputs):
        post = feature_regression(*inputs, is_causal=causal)
        return post.mean, post.variance, post.kl

    assert torch.autograd.gradcheck(outputs, (q, k, v, noise))


def test_conventions_of_the_divergence():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    layer(x, x, x)
    total = layer.kl_divergence()
    assert_same(layer.kl_divergence(30), total * 30 / B)
    assert_same(layer.kl_divergence(30, "per_sequence"), layer.kl_divergence(30, "global"))
    layer.num_samples = 2
    twice = torch.cat([x, x])
    layer(twice, twice, twice)
    assert_same(layer.kl_divergence(), total)


def test_a_model_of_siblings_knows_its_divergence():
    model = nn.ModuleList([layer_of(), KEPAttention(E, H, 3, batch_first=True, dtype=torch.float64)])
    x = torch.randn(B, T, E, **DOUBLE)
    for layer in model:
        layer(x, x, x)
    for options in ({}, {"num_data": 30}, {"num_data": 30, "convention": "per_sequence"}):
        assert_same(model_divergence(model, **options), sum(layer.kl_divergence(**options) for layer in model))


@pytest.mark.parametrize(
    ("width", "length", "noise_scale"),
    [(128, 16, None), (128, 64, None), (64, 100, None), (128, 1, "length"), (128, 64, "length"), (64, 1024, "length")],
)
def test_a_sequence_pays_less_than_a_nat_at_the_start(width, length, noise_scale):
    layer = RFFAttention(width, 4, batch_first=True, noise_scale=noise_scale)
    x = torch.randn(4, length, width)
    layer(x, x, x, need_weights=False)
    assert 0 < layer.kl_divergence(1) < 1


def test_saved_copied_and_pickled_after_a_call():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    out = layer(x, x, x)[0]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = layer_of()
    other.load_state_dict(torch.load(buffer))
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(again(x, x, x)[0], out)
        assert again.generator is None
    with use_generator(layer, torch.Generator()):
        copy.deepcopy(layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_torchs_encoder_and_decoder_call_it(training, grad, padded):
    calls = []
    x, memory = torch.randn(B, T, E), torch.randn(B, 4, E)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 5:] = True
    encoder = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    encoder.self_attn = layer_of(dtype=torch.float32)
    decoder = nn.TransformerDecoderLayer(E, H, 16, batch_first=True)
    decoder.self_attn, decoder.multihead_attn = (layer_of(dtype=torch.float32) for _ in range(2))
    stack = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
    for model in (encoder, decoder, stack):
        model.train(training)
        for module in model.modules():
            if isinstance(module, RFFAttention):
                module.register_forward_hook(lambda *_: calls.append(1))
    calls.clear()
    with torch.set_grad_enabled(grad):
        encoder(x, src_key_padding_mask=mask if padded else None)
        stack(x, src_key_padding_mask=mask if padded else None)
        causal = nn.Transformer.generate_square_subsequent_mask(T)
        stack(x, mask=causal)
        decoder(x, memory, tgt_mask=causal, tgt_key_padding_mask=torch.zeros(B, T).masked_fill(mask, -torch.inf))
    assert len(calls) == 1 + 2 + 2 + 2


def test_meta_device_and_functorch():
    assert RFFAttention(E, H, device="meta").frequency.is_meta
    grads = torch.func.grad(lambda t: layer_of()(t, t, t, need_weights=False)[0].sum())(torch.randn(T, E, **DOUBLE))
    assert grads.isfinite().all()


def test_dropout_drops_readings_in_training_only():
    layer, x = layer_of(dropout=0.5), torch.randn(B, T, E, **DOUBLE)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(causal):
    layer = layer_of(dtype=torch.float32, sampling="marginal", num_frequencies=16)
    sizes = []
    for length in (512, 2048):
        x = torch.randn(1, length, E, requires_grad=True)
        with Largest() as seen:
            layer(x, x, x, need_weights=False, is_causal=causal)[0].sum().backward()
        sizes.append(seen.elements)
    assert sizes[1] <= 4 * sizes[0] and sizes[1] <= 2048 * H * 2 * 64


def test_it_learns_a_regression_in_context():
    # Each sequence is a function of its own: tokens with a reading are to tell those without one. The first half of
    # the tokens show x and y, the second half x alone; only the kernel can tell which reading is near.
    torch.manual_seed(1)
    layer = RFFAttention(4, 1, num_frequencies=32, batch_first=True, sampling="mean", vdim=1, kdim=4)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.03)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x = 4 * torch.rand(size, 30, 1)
        y = torch.sin(2 * x + 6.3 * torch.rand(size, 1, 1))
        tokens = torch.cat([x, torch.zeros(size, 30, 3)], -1)
        return tokens[:, 20:], tokens[:, :20], y[:, :20], y[:, 20:]

    for _ in range(150):
        query, key, value, target = batch(16)
        loss = (layer(query, key, value, need_weights=False)[0][..., :1] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    query, key, value, target = batch(100)
    error = (layer(query, key, value, need_weights=False)[0][..., :1] - target).square().mean()
    assert error < 0.1 * target.var()


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu(causal):
    layer, x = layer_of(), torch.randn(B, 150, E, **DOUBLE)
    expected, weights = layer(x, x, x, is_causal=causal)
    kl = layer.kl_divergence()
    moved, y = layer.cuda(), x.cuda()
    found, found_weights = moved(y, y, y, is_causal=causal)
    assert_same(found.cpu(), expected, 1e-8)
    assert_same(found_weights.cpu(), weights, 1e-8)
    assert_same(moved.kl_divergence().cpu(), kl, 1e-8)
    mask = nn.Transformer.generate_square_subsequent_mask(150).cuda()
    assert_same(moved(y, y, y, attn_mask=mask)[0], moved(y, y, y, is_causal=True)[0], 1e-8)
    moved.sampling = "marginal"
    with use_generator(moved, torch.Generator("cuda").manual_seed(0)):
        assert moved(y, y, y, is_causal=causal)[0].isfinite().all()
