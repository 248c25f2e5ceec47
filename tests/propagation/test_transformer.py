"""Torch's transformer encoders: plain passes, masks, what tokens share, and Monte Carlo over weights."""

import pytest
import torch
from torch import nn

from gpseq.propagation import from_variances, propagate
from gpseq.propagation.attention import EXACT
from gpseq.propagation.forward import STREAMLINED, exact_kernels
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.walk import Options, Walk
from tests.oracles_propagation import monte_carlo, posterior, relative_variances

WIDTH, HEADS, BATCH, TOKENS = 8, 2, 3, 5
FORMS = ["full", "lowrank", "blockdiag", "diag"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def encoder(depth=2, norm_first=True, batch_first=True, activation="gelu", dtype=torch.float64, norm=False):
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 12, 0.1, activation, batch_first=batch_first, norm_first=norm_first, dtype=dtype
    )
    last = nn.LayerNorm(WIDTH, dtype=dtype) if norm else None
    network = nn.TransformerEncoder(layer, depth, norm=last, enable_nested_tensor=False).eval()
    with torch.no_grad():  # copies of one layer, which torch leaves alike, and biases that it leaves at zero
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def masks(dtype):
    """By names: arguments of the encoder, and which tokens count."""
    padding = torch.tensor([[False] * 5, [False, False, False, True, True], [False, False, False, False, True]])
    causal = torch.ones(TOKENS, TOKENS).triu(1).bool()
    number = torch.randn(TOKENS, TOKENS, dtype=dtype)
    return {
        "none": ({}, ~torch.zeros_like(padding)),
        "padding": ({"src_key_padding_mask": padding}, ~padding),
        "causal": ({"mask": causal, "is_causal": True}, ~torch.zeros_like(padding)),
        "boolean": ({"mask": causal.mT & ~torch.eye(TOKENS).bool()}, ~torch.zeros_like(padding)),
        "float": ({"mask": number.masked_fill(causal, -torch.inf)}, ~torch.zeros_like(padding)),
        "both": ({"mask": causal, "src_key_padding_mask": padding}, ~padding),
        "heads": ({"mask": causal.expand(BATCH * HEADS, -1, -1)}, ~torch.zeros_like(padding)),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype, name", [(torch.float64, n) for n in masks(torch.float64)] + [(torch.float32, "both")])
def test_without_uncertainty_the_mean_is_the_plain_pass(form, norm_first, name, dtype):
    network = encoder(norm_first=norm_first, dtype=dtype, activation="relu" if norm_first else "gelu", norm=norm_first)
    inputs, counts = masks(dtype)[name]
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)
    zero = posterior(network, 0.0)
    found = propagate(network, zero, x, covariance=form, activations="tangent", num_tangents=4, **inputs)
    torch.testing.assert_close(found.mean[counts], network(x, **inputs)[counts], rtol=0, atol=TOLERANCE[dtype])
    assert found.variance[counts].abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_batch_may_be_second(form):
    first, second = encoder(), encoder(batch_first=False)
    second.load_state_dict(first.state_dict())
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    inputs, _ = masks(torch.float64)["padding"]
    for names in (None, ["layers.1"]):
        options = {"covariance": form, "num_tangents": 8, **inputs}
        seeds = [torch.Generator().manual_seed(0) for _ in range(3)]
        one = propagate(first, posterior(first, 0.05, names), x, generator=seeds[0], **options)
        two = propagate(
            second, posterior(second, 0.05, names), x.transpose(0, 1), batch_dim=1, generator=seeds[1], **options
        )
        parts = propagate(first, posterior(first, 0.05, names), x, generator=seeds[2], chunk_size=2, **options)
        for other in (two, parts):
            torch.testing.assert_close(other.mean, one.mean)
            torch.testing.assert_close(other.variance, one.variance)
        assert one.variance.gt(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_padding_does_not_matter_elsewhere(form, norm_first):
    network = encoder(norm_first=norm_first)
    inputs, counts = masks(torch.float64)["padding"]
    weights = posterior(network, 0.1)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    other = torch.where(counts.unsqueeze(-1), x, 5 * torch.randn_like(x))
    results = [
        propagate(network, weights, given, covariance=form, generator=torch.Generator().manual_seed(0), **inputs)
        for given in (x, other)
    ]
    alone = propagate(
        network, weights, x[1:2, :3], covariance=form, generator=torch.Generator().manual_seed(0)
    )  # and no padding gives the same
    for name in ("mean", "variance"):
        one, two = (getattr(result, name) for result in results)
        torch.testing.assert_close(one[counts], two[counts])
        torch.testing.assert_close(getattr(alone, name)[0], one[1, :3])


@pytest.mark.parametrize("form", FORMS)
def test_causal_passes_ignore_what_comes_later(form):
    network = encoder()
    inputs, _ = masks(torch.float64)["causal"]
    weights = posterior(network, 0.1)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    later = x.clone()
    later[:, 3:] = torch.randn_like(later[:, 3:])
    one, two = (
        propagate(network, weights, given, covariance=form, generator=torch.Generator().manual_seed(0), **inputs)
        for given in (x, later)
    )
    for name in ("mean", "variance"):
        torch.testing.assert_close(getattr(one, name)[:, :3], getattr(two, name)[:, :3])
        assert getattr(one, name)[:, 3:].ne(getattr(two, name)[:, 3:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_keys_are_zeros(form):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64).eval()
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    mask[2] = True
    bound = posterior(attention, 0.1, ["in_proj"]).bind(attention)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    walk = Walk(attention, bound, Options(form=form), 16)
    state = walk(attention, GaussianState(x), attn_mask=mask)
    assert state.mean.isfinite().all()
    torch.testing.assert_close(state.mean[:, 2], attention.out_proj.bias.expand(BATCH, -1))
    assert state.variance.isfinite().all()
    assert state.variance[:, 2].abs().max() < 1e-12
    assert state.variance[:, 1].gt(0).all()
    want = attention(x, x, x, attn_mask=mask, need_weights=False)[0]
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(state.mean[:, rest], want[:, rest])
    network = encoder()
    found = propagate(network, posterior(network, 0.1), x, covariance=form, num_tangents=8, mask=mask)
    assert found.mean.isfinite().all()
    assert found.variance.isfinite().all()


def of_part(network, part, variance=0.01):
    """Variances of the weights of queries (0), keys (1) or values (2) of the first layer."""
    weight = network.layers[0].self_attn.in_proj_weight
    entries = torch.zeros_like(weight)
    entries[part * WIDTH : (part + 1) * WIDTH] = variance
    return from_variances({"layers.0.self_attn.in_proj_weight": entries})


@pytest.mark.parametrize("form", FORMS)
def test_the_noise_of_value_weights_does_not_average_out_over_alike_tokens(form):
    network = encoder(depth=1)
    token = torch.randn(1, 1, WIDTH, dtype=torch.float64)
    options = {"covariance": form, "num_tangents": 4000}
    found = [
        propagate(network, of_part(network, 2), token.expand(-1, length, -1), **options).variance[:, 0]
        for length in (1, 9)
    ]
    exact = form != "lowrank"
    torch.testing.assert_close(found[1], found[0], rtol=1e-9 if exact else 0.1, atol=1e-12)
    published = [
        propagate(network, of_part(network, 2), token.expand(-1, length, -1), preset="streamlined").variance[:, 0]
        for length in (1, 9)
    ]
    assert published[1].sum() < 0.2 * published[0].sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [0, 1])
def test_uncertain_scores_are_seen_in_every_form(form, part):
    network = encoder(depth=1)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    found = propagate(network, of_part(network, part), x, covariance=form, num_tangents=16)
    assert found.variance.gt(1e-9).all()
    assert propagate(network, of_part(network, part), x, preset="streamlined").variance.abs().max() == 0
    assert STREAMLINED.scores == "frozen"


class Heads(nn.Module):
    """Self-attention without an output projection to speak of."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64).eval()
        with torch.no_grad():
            self.attention.out_proj.weight.copy_(torch.eye(WIDTH))

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_marginals_of_heads_are_right_in_every_form(part):
    network = Heads()
    entries = torch.zeros_like(network.attention.in_proj_weight)
    entries[part * WIDTH : (part + 1) * WIDTH] = 1e-3
    variances = {"attention.in_proj_weight": entries}
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    with exact_kernels():
        _, covariance = monte_carlo(network, variances, x, 5_000, torch.Generator().manual_seed(0))
    want = covariance.diagonal(dim1=-2, dim2=-1).view(1, TOKENS, WIDTH)
    for form in FORMS:
        walk = Walk(network, from_variances(variances).bind(network), Options(form=form), 2000)
        ratio = (walk(network.attention, GaussianState(x)).variance / want).sqrt()
        assert (ratio - 1).abs().max() < (0.12 if form == "lowrank" else 0.06)
        assert abs(ratio.mean() - 1) < 0.03


def ratios(network, x, ratio, names=None, num_samples=6_000):
    """Deviations over those of Monte Carlo, of the first token and of the tokens' mean, and the bias of means."""
    variances = relative_variances(network, ratio, names)
    with exact_kernels():
        mean, covariance = monte_carlo(network, variances, x, num_samples, torch.Generator().manual_seed(1))
    average = torch.eye(WIDTH, dtype=torch.float64).repeat(1, x.shape[1]) / x.shape[1]
    true = covariance.diagonal(dim1=-2, dim2=-1).sqrt()[0]
    pooled = (average @ covariance[0] @ average.mT).diagonal().sqrt()
    found = {}
    for name, options in (("full", {"covariance": "full"}), ("published", {"preset": "streamlined"})):
        result = propagate(network, from_variances(variances), x, **options)
        mine = result.covariance.to_dense()[0]
        own = (average @ mine @ average.mT).diagonal().sqrt()
        bias = ((result.mean.flatten(1) - mean)[0] / true).abs().mean()
        found[name] = ((mine.diagonal().sqrt() / true)[:WIDTH], own / pooled, bias)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("names", [None, ["self_attn.in_proj_weight"], ["linear"]], ids=["all", "attention", "mlp"])
def test_two_blocks_agree_with_monte_carlo(norm_first, names):
    network = encoder(norm_first=norm_first)
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    found = ratios(network, x, 0.05, names)
    first, pooled, bias = found["full"]
    assert abs(first.mean() - 1) < 0.02
    assert abs(pooled.mean() - 1) < 0.02
    assert bias < 0.06


@pytest.mark.slow
def test_alike_tokens_agree_with_monte_carlo_where_the_published_rules_do_not():
    network = encoder()
    x = torch.randn(1, 1, WIDTH, dtype=torch.float64) + 0.1 * torch.randn(1, 9, WIDTH, dtype=torch.float64)
    found = ratios(network, x, 0.05)
    assert abs(found["full"][1].mean() - 1) < 0.02
    assert abs(found["full"][0].mean() - 1) < 0.02
    assert found["published"][1].mean() < 0.75


@pytest.mark.slow
def test_low_rank_approaches_full():
    network = encoder()
    weights = posterior(network, 0.1)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    full = propagate(network, weights, x, covariance="full").covariance.to_dense()
    errors = []
    for number in (32, 2048):
        generator = torch.Generator().manual_seed(0)
        low = propagate(network, weights, x, covariance="lowrank", num_tangents=number, generator=generator)
        errors.append((low.covariance.to_dense() - full).norm() / full.norm())
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.15


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form):
    network = encoder(dtype=torch.float64)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    inputs, counts = masks(torch.float64)["both"]
    weights = relative_variances(network, 0.1)
    here = propagate(network, from_variances(weights), x, covariance=form, num_tangents=2000, **inputs)
    there = propagate(
        network.cuda(),
        from_variances({name: value.cuda() for name, value in weights.items()}),
        x.cuda(),
        covariance=form,
        num_tangents=2000,
        **{name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()},
    )
    assert there.mean.is_cuda
    assert there.variance.is_cuda
    if form != "lowrank":  # whose draws differ
        torch.testing.assert_close(there.mean.cpu()[counts], here.mean[counts])
    tolerance = 0.3 if form == "lowrank" else 1e-6
    torch.testing.assert_close(there.variance.cpu()[counts], here.variance[counts], rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_without_a_batch(form):
    network = encoder()
    with pytest.raises(ValueError, match=r"sequences \(B, T, D\) in layers.0, got a mean of shape \(5, 8\)"):
        propagate(network, posterior(network, 0.1), torch.randn(TOKENS, WIDTH, dtype=torch.float64), covariance=form)


@pytest.mark.parametrize("form", ["diag", "full"])
def test_dropout_of_attention_is_a_source_of_variance(form):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True).double().eval()
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(8))
    layer = Attend(attention).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        found = propagate(layer, from_variances({}), x, covariance=form, dropout="variance").variance
        layer.train()
        drawn = torch.stack([layer(x) for _ in range(4000)]).var(0)
    torch.testing.assert_close(found, drawn, rtol=0.15, atol=0.02 * drawn.max().item())


class Attend(nn.Module):
    """Self-attention, as a module of one argument."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def propagate_moments(self, state, walk):
        return walk(self.attention, state)


@pytest.mark.parametrize("part", ["all weights", "queries and keys"])
def test_many_tokens_are_sketched_to_a_few_per_cent(part, monkeypatch):
    """The marginal form of a whole network, with random directions for queries and keys, and without."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    scores = torch.zeros(96, 32, dtype=torch.float64)
    scores[:64] = 1e-3
    alone = from_variances({"layers.0.self_attn.in_proj_weight": scores})
    weights, mean, single = (posterior(network, 0.05), 0.01, 0.02) if part == "all weights" else (alone, 0.03, 0.15)
    x = torch.randn(2, EXACT + 8, 32, dtype=torch.float64)
    with torch.no_grad():
        found = propagate(network, weights, x, covariance="diag")
        monkeypatch.setattr("gpseq.propagation.attention.EXACT", 10**6)
        exact = propagate(network, weights, x, covariance="diag")
    ratio = (found.variance / exact.variance).sqrt()
    assert not torch.equal(found.variance, exact.variance)
    assert abs(ratio.mean() - 1) < mean
    assert (ratio - 1).square().mean().sqrt() < single
    assert ((found.mean - exact.mean).abs() / exact.variance.sqrt()).max() < 0.05
