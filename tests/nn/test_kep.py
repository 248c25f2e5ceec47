"""KEPAttention: against the kernel's matrix and its singular value decomposition, and torch's Gaussians."""

import copy
import io
import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from gpseq.nn import use_generator
from gpseq.nn.kep import KEPAttention
from gpseq.prediction import predict
from gpseq.sgpa.eigen import EigenFeatures, eigen_features, eigen_kl, ksvd_objective, unit_tokens

B, T, E, H, S = 3, 7, 8, 2, 3
D = E // H
DOUBLE = {"dtype": torch.float64}


def layer_of(**options) -> KEPAttention:
    """A layer whose parameters are all away from where they start."""
    options = {"batch_first": True, "sampling": "mean", "rank": S, "dtype": torch.float64, **options}
    layer = KEPAttention(E, H, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return layer


def dense(layer: KEPAttention, x: torch.Tensor):
    """Mean ``(B, H, T, D)``, covariance ``(B, H, D, T, T)`` and the kernel over n, from the T x T kernel."""
    q, k, v = layer.project_query(x), layer.project_key(x), layer.project_value(x)
    cosine = torch.einsum("bhid,bhjd->bhij", q, k) / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :])
    matrix = cosine / x.shape[1]
    e, r = matrix @ (v @ layer.right_map), matrix.mT @ (v @ layer.left_map)
    inverse = torch.diag_embed((-layer.log_singular).exp())
    mean = (e + r) @ inverse @ layer.inducing_mean
    root = ((e + r) @ inverse).unsqueeze(2) @ layer.scale_tril
    return mean, root @ root.mT, matrix


def assemble(layer: KEPAttention, mean: torch.Tensor) -> torch.Tensor:
    return layer.out_proj(mean.transpose(1, 2).flatten(-2))


def assert_same(a, b, tol=1e-6):
    # The unit sphere is off by 1e-7 of a token's squared length.
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# What it computes


def test_moments_are_those_of_the_dense_kernel():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    mean, covariance, matrix = dense(layer, x)
    out, weights = layer(x, x, x, average_attn_weights=False)
    assert_same(out, assemble(layer, mean))
    assert_same(weights, matrix)
    assert_same(layer(x, x, x)[1], matrix.mean(1))
    heads = layer.heads(layer._tokens(x, x, x)[0], True)
    assert_same(heads.variance, covariance.diagonal(dim1=-2, dim2=-1))
    root = heads.features.unsqueeze(2) @ heads.root
    assert_same(root @ root.mT, covariance)
    center, spread = layer.conditional(x)
    assert_same(center, out)
    each = torch.diag_embed(heads.variance.permute(0, 3, 1, 2).flatten(-2))
    assert_same(spread.to_dense(), layer.out_proj.weight @ each @ layer.out_proj.weight.mT, 1e-10)


def test_the_covariance_is_a_valid_one_of_each_output_dimension():
    layer = layer_of()
    tril = layer.scale_tril
    assert tril.shape == (H, D, S, S) and torch.equal(tril, tril.tril())
    assert (torch.linalg.eigvalsh(tril @ tril.mT) > 1e-6).all()
    assert not torch.allclose(tril[:, 0], tril[:, 1])


def test_the_divergence_is_torchs_and_that_of_the_factor_in_use():
    layer = layer_of()
    singular = layer.log_singular.exp()
    total = torch.zeros(())
    for h in range(H):
        prior = MultivariateNormal(torch.zeros(S, **DOUBLE), torch.diag(singular[h].square()))
        for d in range(D):
            q_u = MultivariateNormal(layer.inducing_mean[h, :, d], scale_tril=layer.scale_tril[h, d])
            total = total + kl_divergence(q_u, prior)
    assert_same(layer.kl_divergence(), total, 1e-12)
    assert_same(layer.kl_divergence(50), total, 1e-12)
    assert_same(layer.kl_divergence(convention="global"), total, 1e-12)
    assert_same(layer.kl_divergence(50, "per_sequence"), 50 * total, 1e-12)
    x = torch.randn(B, T, E, **DOUBLE)
    layer(x, x, x)
    assert_same(layer.kl_divergence(convention="per_sequence"), B * total, 1e-12)
    assert_same(layer.kl_divergence(), total, 1e-12)


@given(seed=st.integers(0, 1000), rank=st.integers(1, 4))
def test_the_divergence_is_not_negative_and_zero_at_the_prior(seed, rank):
    g = torch.Generator().manual_seed(seed)
    singular = torch.rand(1, rank, generator=g, **DOUBLE) + 0.1
    tril = torch.randn(1, 2, rank, rank, generator=g, **DOUBLE).tril(-1)
    tril = tril + torch.diag_embed(torch.rand(1, 2, rank, generator=g, **DOUBLE) + 0.1)
    assert (eigen_kl(torch.randn(1, rank, 2, generator=g, **DOUBLE), tril, singular) >= 0).all()
    prior = torch.diag_embed(singular).unsqueeze(1).expand(1, 2, rank, rank)
    assert eigen_kl(torch.zeros(1, rank, 2, **DOUBLE), prior, singular).abs().max() < 1e-12


def svd_of(query: torch.Tensor, key: torch.Tensor, rank: int):
    """Singular values and features of the leading singular vectors, scaled to mean square 1."""
    n = len(query)
    u, singular, vh = torch.linalg.svd(query @ key.mT / n)
    left, right = u[:, :rank] * n**0.5, vh[:rank].mT * n**0.5
    features = eigen_features(query[None], key[None], left[None], right[None])
    return left, right, singular[None, :rank], features


def test_at_singular_vectors_the_features_are_their_projections_and_the_objective_is_stationary():
    query, key = unit_tokens(torch.randn(9, 4, **DOUBLE)), unit_tokens(torch.randn(9, 4, **DOUBLE))
    left, right, singular, features = svd_of(query, key, 3)
    assert_same(features.left[0], left * singular, 1e-12)
    assert_same(features.right[0], right * singular, 1e-12)
    weights = [w.detach().requires_grad_() for w in features[2:]]

    def objective(left_weight: torch.Tensor, right_weight: torch.Tensor) -> torch.Tensor:
        made = EigenFeatures(query @ left_weight, key @ right_weight, left_weight, right_weight)
        return ksvd_objective(made, singular).sum()

    value = objective(*weights)
    value.backward()
    assert abs(value) < 1e-12
    assert all(w.grad.abs().max() < 1e-12 for w in weights)
    # Elsewhere it is neither.
    off = [(w + 0.1 * torch.randn_like(w)).detach().requires_grad_() for w in weights]
    value = objective(*off)
    value.backward()
    assert abs(value) > 1e-4 and all(w.grad.abs().max() > 1e-3 for w in off)


def test_the_posterior_at_the_prior_is_the_symmetric_kernels_truncated_to_the_rank():
    # With u at its prior the two sides have covariance K K' and K' K, of which the leading eigenpairs are kept.
    query, key = unit_tokens(torch.randn(9, 4, **DOUBLE)), unit_tokens(torch.randn(9, 4, **DOUBLE))
    matrix = query @ key.mT / 9
    _, _, _, features = svd_of(query, key, 4)  # all there are
    assert_same(features.left[0] @ features.left[0].mT / 9, matrix @ matrix.mT, 1e-12)
    assert_same(features.right[0] @ features.right[0].mT / 9, matrix.mT @ matrix, 1e-12)
    errors = []
    for rank in range(1, 5):
        _, _, _, few = svd_of(query, key, rank)
        errors.append((few.left[0] @ few.left[0].mT / 9 - matrix @ matrix.mT).norm())
    assert all(later < earlier for earlier, later in pairwise(errors)) and errors[-1] < 1e-12


def test_the_loss_is_that_of_the_objective_and_training_by_it_finds_singular_vectors():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    with pytest.raises(RuntimeError, match="ksvd_loss: expected a call"):
        layer.ksvd_loss()
    layer(x, x, x)
    q, k = unit_tokens(layer.project_query(x)), unit_tokens(layer.project_key(x))
    v, singular = layer.project_value(x), layer.log_singular.exp()
    total = torch.zeros(())
    for b in range(B):
        for h in range(H):
            w_e = sum(torch.outer(k[b, h, j], v[b, h, j] @ layer.right_map[h]) for j in range(T)) / T
            w_r = sum(torch.outer(q[b, h, i], v[b, h, i] @ layer.left_map[h]) for i in range(T)) / T
            energy = sum((q[b, h, i] @ w_e) ** 2 / singular[h] for i in range(T)).sum() / T
            energy = energy + sum((k[b, h, j] @ w_r) ** 2 / singular[h] for j in range(T)).sum() / T
            total = total + (0.5 * energy - torch.trace(w_e.mT @ w_r)) ** 2
    assert_same(layer.ksvd_loss(), total / B)
    expected = layer.ksvd_loss()
    layer(x, x, x, is_causal=True)
    assert_same(layer.ksvd_loss(), expected)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(50):
        layer(x, x, x, need_weights=False)
        loss = layer.ksvd_loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05 * expected


# Masks


def test_causal_is_each_prefix_by_itself():
    layer = layer_of()
    for length in (T, 150):  # in one piece and in chunks
        x = torch.randn(2, length, E, **DOUBLE)
        out, weights = layer(x, x, x, is_causal=True)
        heads = layer.heads(layer._tokens(x, x, x, is_causal=True)[0], True)
        for t in (1, 2, 5, length):
            y = x[:, :t]
            alone, alone_weights = layer(y, y, y)
            assert_same(out[:, t - 1], alone[:, -1], 1e-10)
            assert_same(weights[:, t - 1, :t], alone_weights[:, -1], 1e-10)
            assert (weights[:, t - 1, t:] == 0).all()
            variance = layer.heads(layer._tokens(y, y, y)[0], True).variance
            assert_same(heads.variance[..., t - 1], variance[..., -1], 1e-10)


def test_the_future_has_no_gradient():
    layer, x = layer_of(), torch.randn(1, 150, E, **DOUBLE, requires_grad=True)
    layer(x, x, x, is_causal=True)[0][:, 100].sum().backward()
    assert (x.grad[:, 101:] == 0).all() and (x.grad[:, :101] != 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padding_is_deletion_whatever_stands_there(causal, kind):
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    removed = torch.zeros(B, T, dtype=torch.bool)
    removed[0, 5:], removed[1, :2], removed[2, :] = True, True, True
    mask = removed if kind == "bool" else torch.zeros(B, T, **DOUBLE).masked_fill(removed, -torch.inf)
    x = x.masked_fill(removed.unsqueeze(-1), torch.nan).requires_grad_()
    out, weights = layer(x, x, x, key_padding_mask=mask, is_causal=causal)
    loss = layer.ksvd_loss()
    (out.sum() + loss + layer.kl_divergence()).backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    total = torch.zeros(())
    for b in range(2):
        keep = ~removed[b]
        y = x[b : b + 1, keep]
        alone, alone_weights = layer(y, y, y, is_causal=causal)
        assert_same(out[b, keep], alone[0], 1e-10)
        assert_same(weights[b][keep][:, keep], alone_weights[0], 1e-10)
        total = total + layer.ksvd_loss()
    assert (out[removed] == 0).all() and (weights.mT[removed] == 0).all()
    assert_same(loss, total / B, 1e-10)


def test_a_floating_mask_multiplies_the_kernels_columns():
    layer, x = layer_of(), torch.randn(1, T, E, **DOUBLE)
    bias = torch.randn(1, T, **DOUBLE)
    q, k, v = layer.project_query(x), layer.project_key(x), layer.project_value(x)
    matrix = unit_tokens(q) @ unit_tokens(k).mT * bias.exp()[:, None, None] / T
    both = matrix @ (v @ layer.right_map) + matrix.mT @ (v @ layer.left_map)
    mean = both @ torch.diag_embed((-layer.log_singular).exp()) @ layer.inducing_mean
    out, weights = layer(x, x, x, key_padding_mask=bias, average_attn_weights=False)
    assert_same(out, assemble(layer, mean), 1e-10)
    assert_same(weights, matrix, 1e-10)


def test_what_makes_no_sense_raises():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    with pytest.raises(ValueError, match="key: expected the same tensor as query: r lives at the keys"):
        layer(x, x.clone(), x)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert_same(layer(x, x, x, attn_mask=causal)[0], layer(x, x, x, is_causal=True)[0], 1e-12)
    with pytest.raises(ValueError, match="attn_mask: expected None or the causal mask: other ones need"):
        layer(x, x, x, attn_mask=causal.mT)
    with pytest.raises(ValueError, match="kdim: expected embed_dim = 8"):
        layer_of(kdim=6)
    with pytest.raises(ValueError, match="rank: expected at most the width of a head, 4"):
        layer_of(rank=5)
    with pytest.raises(ValueError, match="sampling: expected one of"):
        layer_of(sampling="pathwise")
    with pytest.raises(ValueError, match="add_bias_kv: expected False"):
        layer_of(add_bias_kv=True)
    with pytest.raises(ValueError, match="convention: expected one of"):
        layer.kl_divergence(convention="batch")
    with pytest.raises(RuntimeError, match="expected a call of the layer before"):
        layer_of().kl_divergence(convention="per_sequence")
    with pytest.raises(ValueError, match="num_data: expected at least 1"):
        layer.kl_divergence(0)


# The contract of a layer


def test_layouts_agree():
    layer, x = layer_of(vdim=5), torch.randn(B, T, E, **DOUBLE)
    v = torch.randn(B, T, 5, **DOUBLE)
    out, weights = layer(x, x, v)
    assert out.shape == (B, T, E) and weights.shape == (B, T, T)
    assert layer(x, x, v, need_weights=False)[1] is None
    one = x[0]
    assert_same(layer(one, one, v[0])[0], out[0], 1e-12)
    second = layer_of(batch_first=False, vdim=5)
    second.load_state_dict(layer.state_dict())
    y = x.transpose(0, 1)
    assert_same(second(y, y, v.transpose(0, 1))[0], out.transpose(0, 1), 1e-12)
    assert_same(second.conditional(y, value=v.transpose(0, 1))[0], out.transpose(0, 1), 1e-12)
    assert layer.conditional(one, value=v[0])[1].shape == (T, E, E)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 150])  # fewer tokens than the rank, and chunks
@pytest.mark.parametrize("batch", [1, B])
def test_any_length_in_any_dtype(dtype, batch, length, causal):
    layer, x = layer_of(dtype=dtype, sampling="marginal"), torch.randn(batch, length, E, dtype=dtype)
    out, _ = layer(x, x, x, is_causal=causal)
    assert out.dtype == dtype and out.shape == x.shape and out.isfinite().all()
    layer.sampling = "mean"
    mean, loss = layer(x, x, x, is_causal=causal)[0], layer.ksvd_loss()
    double = copy.deepcopy(layer).double()
    y = x.double()
    tol = 1e-10 if dtype == torch.float64 else 1e-4
    assert_same(mean.double(), double(y, y, y, is_causal=causal)[0], tol)
    assert_same(loss.double(), double.ksvd_loss(), tol)


def test_tokens_of_zero_have_finite_gradients():
    layer = layer_of(dtype=torch.float32, bias=False, sampling="marginal")
    x = torch.zeros(1, 3, E, requires_grad=True)
    (layer(x, x, x)[0].sum() + layer.ksvd_loss()).backward()
    assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


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


@pytest.mark.parametrize("causal", [False, True])
def test_draws_have_the_moments_they_should(causal):
    layer, x = layer_of(sampling="marginal"), torch.randn(1, 4, E, **DOUBLE)
    center, covariance = layer.conditional(x, is_causal=causal)
    center, covariance = center.detach()[0], covariance.to_dense().detach()[0]
    many = x.expand(20_000, -1, -1)
    heads = layer.heads(layer._tokens(x, x, x, is_causal=causal)[0], True)
    root = (heads.features.unsqueeze(2) @ heads.root)[0].detach()  # (H, D, T, S)
    weight = layer.out_proj.weight.unflatten(1, (H, D)).detach()
    across = torch.einsum("hds,hds,ehd,ghd->eg", root[:, :, 0], root[:, :, 1], weight, weight)
    for sampling in ("marginal", "joint"):
        layer.sampling = sampling
        with torch.no_grad():
            draws = layer(many, many, many, need_weights=False, is_causal=causal)[0]
        size = covariance.abs().max()
        torch.testing.assert_close(draws.mean(0), center, rtol=0, atol=float(5 * (size / 20_000) ** 0.5))
        for t in range(4):
            torch.testing.assert_close(draws[:, t].mT.cov(), covariance[t], rtol=0.1, atol=float(0.05 * size))
        found = (draws[:, 0] - center[0]).mT @ (draws[:, 1] - center[1]) / len(draws)
        wanted = across if sampling == "joint" else 0 * across
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=float(0.05 * size))


@pytest.mark.parametrize("causal", [False, True])
def test_the_posterior_is_a_distribution(causal):
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    post = layer.posterior(x, x, x, is_causal=causal)
    assert post.batch_shape == (B, H) and post.event_shape == (T, D)
    heads = layer.heads(layer._tokens(x, x, x, is_causal=causal)[0], True)
    root = heads.features.unsqueeze(2) @ heads.root
    assert_same(post.mean, heads.mean, 1e-12)
    assert_same(post.variance, heads.variance.mT, 1e-8)
    each = post.covariance_matrix.unflatten(-1, (T, D)).unflatten(-3, (T, D))
    for d in range(D):
        assert_same(each[..., d, :, d], (root @ root.mT)[:, :, d], 1e-8)
    assert post.rsample().shape == (B, H, T, D)
    long = torch.randn(2, 300, E)
    single = layer.float().posterior(long, long, long, is_causal=causal)
    assert single.rsample().isfinite().all() and single.log_prob(single.mean).isfinite().all()


def test_looking_leaves_the_last_loss_as_it_was():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    layer(x, x, x)
    loss, y = layer.ksvd_loss(), x[:2]
    layer.conditional(y)
    layer.posterior(y, y, y)
    assert torch.equal(layer.ksvd_loss(), loss)
    nothing = x[:0]
    layer(nothing, nothing, nothing)
    assert layer.ksvd_loss() == 0
    with pytest.raises(RuntimeError, match="expected a call of the layer before"):
        copy.deepcopy(layer).ksvd_loss()


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


def test_predict_averages_passes():
    model = nn.Sequential(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), nn.Linear(E, 3))
    model[0].self_attn = layer_of(sampling="joint", dtype=torch.float32)
    p = predict(model, torch.randn(B, T, E), num_samples=5, generator=torch.Generator().manual_seed(0))
    assert p.samples.shape == (5, B, T, 3) and (p.samples.std(0) > 0).all()


def test_gradients_reach_all_parameters():
    layer, x = layer_of(sampling="marginal"), torch.randn(B, T, E, **DOUBLE)
    out, _ = layer(x, x, x)
    (out.square().sum() + layer.kl_divergence(100) + layer.ksvd_loss()).backward()
    assert all(p.grad is not None and (p.grad != 0).any() and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_right(causal):
    q, k, e, r = (torch.randn(1, 5, w, **DOUBLE, requires_grad=True) for w in (3, 3, 2, 2))
    singular = torch.rand(1, 2, **DOUBLE).add(0.5).requires_grad_()

    def outputs(query, key, left, right, values):
        features = eigen_features(unit_tokens(query), unit_tokens(key), left, right, is_causal=causal)
        return features.left, features.right, ksvd_objective(features, values)

    assert torch.autograd.gradcheck(outputs, (q, k, e, r, singular))


@pytest.mark.parametrize(("width", "heads", "rank"), [(128, 4, 10), (64, 8, 5), (8, 2, 4)])
def test_it_pays_about_half_a_nat_at_the_start(width, heads, rank):
    costs = [KEPAttention(width, heads, rank).kl_divergence().item() for _ in range(20)]
    assert abs(sum(costs) / 20 - 0.5) < 0.2
    layer, x = KEPAttention(width, heads, rank, batch_first=True), torch.randn(4, 64, width)
    deviation = layer.heads(layer._tokens(x, x, x)[0], True).variance.sqrt().mean()
    assert 0.01 < deviation < 0.5


def test_saved_copied_and_pickled_after_a_call():
    layer, x = layer_of(), torch.randn(B, T, E, **DOUBLE)
    out = layer(x, x, x)[0]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = layer_of()
    other.load_state_dict(torch.load(buffer))
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x, x, x)[0], out)
        assert again.generator is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_torchs_encoder_calls_it(training, grad, padded):
    calls = []
    x = torch.randn(B, T, E)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 5:] = True
    encoder = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    encoder.self_attn = layer_of(dtype=torch.float32)
    stack = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
    for model in (encoder, stack):
        model.train(training)
        for module in model.modules():
            if isinstance(module, KEPAttention):
                module.register_forward_hook(lambda *_: calls.append(1))
    calls.clear()
    with torch.set_grad_enabled(grad):
        encoder(x, src_key_padding_mask=mask if padded else None)
        stack(x, src_key_padding_mask=mask if padded else None)
        stack(x, mask=nn.Transformer.generate_square_subsequent_mask(T))
    assert len(calls) == 1 + 2 + 2
    # Where a decoder attends to another sequence, it says so.
    decoder = nn.TransformerDecoderLayer(E, H, 16, batch_first=True)
    decoder.multihead_attn = layer_of(dtype=torch.float32)
    with pytest.raises(ValueError, match="do cross-attention"):
        decoder(x, torch.randn(B, 4, E))


def test_meta_device_and_functorch():
    assert KEPAttention(E, H, 3, device="meta").lower.is_meta
    layer = layer_of()
    grads = torch.func.grad(lambda t: layer(t, t, t, need_weights=False)[0].sum())(torch.randn(T, E, **DOUBLE))
    assert grads.isfinite().all()


def test_dropout_drops_tokens_in_training_only():
    layer, x = layer_of(dropout=0.5), torch.randn(B, T, E, **DOUBLE)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_it_learns_which_token_of_a_sequence_is_marked():
    # The answer of every token is the content of the one marked token: nothing without attention can know it.
    torch.manual_seed(1)
    layer = KEPAttention(8, 2, rank=4, batch_first=True, sampling="joint")
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([torch.randn(size, 6, 2), torch.zeros(size, 6, 5), torch.ones(size, 6, 1)], -1)
        marked = torch.randint(6, (size,))
        x[torch.arange(size), marked, 2] = 3.0
        return x, x[torch.arange(size), marked, :2].unsqueeze(1).expand(-1, 6, -1)

    for _ in range(300):
        x, target = batch(64)
        out, _ = layer(x, x, x, need_weights=False)
        loss = (out[..., :2] - target).square().mean() + layer.kl_divergence() / 1e5
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    layer.sampling = "mean"
    x, target = batch(500)
    assert (layer(x, x, x, need_weights=False)[0][..., :2] - target).square().mean() < 0.3 * target.var()


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu(causal):
    layer, x = layer_of(), torch.randn(B, 150, E, **DOUBLE)
    expected, weights = layer(x, x, x, is_causal=causal)
    loss = layer.ksvd_loss()
    moved, y = layer.cuda(), x.cuda()
    found, found_weights = moved(y, y, y, is_causal=causal)
    assert_same(found.cpu(), expected, 1e-9)
    assert_same(found_weights.cpu(), weights, 1e-9)
    assert_same(moved.ksvd_loss().cpu(), loss, 1e-9)
    for sampling in ("marginal", "joint"):
        moved.sampling = sampling
        with use_generator(moved, torch.Generator("cuda").manual_seed(0)):
            assert moved(y, y, y, is_causal=causal)[0].isfinite().all()


def test_memory_and_time_are_linear_in_the_length():
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel()) if isinstance(tensor, torch.Tensor) else largest
            return out

    layer = layer_of(dtype=torch.float32, sampling="marginal")
    for causal, row in ((False, 32), (True, 64)):
        x, largest = torch.randn(1, 2048, E, requires_grad=True), 0
        with Largest():
            layer(x, x, x, need_weights=False, is_causal=causal)[0].sum().backward()
        assert largest <= 2048 * H * row


def test_the_feature_map_is_the_unit_sphere():
    x = torch.randn(5, 3, **DOUBLE)
    assert_same(unit_tokens(x).norm(dim=-1), torch.ones(5, **DOUBLE))
    assert math.isfinite(torch.func.grad(lambda t: unit_tokens(t).sum())(torch.zeros(3)).abs().max())
