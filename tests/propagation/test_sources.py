"""Modules that are sources of variance by themselves, against the law of total variance and against their draws."""

import math

import pytest
import torch
from linear_operator import to_linear_operator
from torch import nn
from torch.func import functional_call, jacrev

from gpseq.nn import KEPAttention, RFFAttention, SGPATransformerEncoder, SGPATransformerEncoderLayer, SGPAttention
from gpseq.propagation import from_variances, propagate
from gpseq.propagation.moments import Blocks, GaussianState
from gpseq.propagation.rules import sources
from gpseq.propagation.walk import Options, Walk
from tests.oracles_propagation import posterior, relative_variances

WIDTH = 3
FORMS = ["full", "lowrank", "blockdiag", "diag"]


class Source(nn.Module):
    """A mean and a covariance at each input; the tokens of a sequence see each other."""

    def __init__(self, kind="variances", batch_first=True):
        super().__init__()
        self.kind, self.batch_first = kind, batch_first
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))

    def forward(self, x):
        return self.conditional(x)[0]

    def conditional(self, x, scale=None):
        x = x if self.batch_first else x.transpose(0, 1)
        mean = torch.tanh(x @ self.weight.mT) + x.mean(1, keepdim=True).square()
        mean = mean if scale is None else mean * scale[:, None, None]
        root = torch.stack([x + place for place in range(WIDTH)], -1) / 4  # (B, T, D, D)
        covariance = root @ root.mT
        if self.kind == "variances":
            covariance = covariance.diagonal(dim1=-2, dim2=-1)
        elif self.kind == "joint":
            flat = root.flatten(1, 2)
            return mean, to_linear_operator(flat @ flat.mT)
        if not self.batch_first:
            mean, covariance = mean.transpose(0, 1), covariance.transpose(0, 1)
        return mean, covariance if self.kind == "variances" else to_linear_operator(covariance)


def total_variance(source, x, covariance, **inputs):
    """Mean, own covariance and the tangent's part, dense over the flat event, element by element."""
    mean, spread = source.conditional(x, **inputs)
    spread = spread if source.kind == "variances" else spread.to_dense()
    found = []
    for row in range(len(x)):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        jacobian = jacrev(lambda z, own=own: source.conditional(z, **own)[0])(x[row : row + 1])
        jacobian = jacobian.reshape(mean[row].numel(), -1)
        if source.kind == "variances":
            noise = torch.diag(spread[row].flatten())
        elif source.kind == "blocks":
            noise = torch.block_diag(*spread[row])
        else:
            noise = spread[row]
        found.append(noise + jacobian @ covariance[row] @ jacobian.mT)
    return mean, torch.stack(found)


def walk_over(network, variances, form, num_draws=64, seed=0, **options):
    bound = from_variances(variances).bind(network)
    return Walk(network, bound, Options(form=form, **options), num_draws, torch.Generator().manual_seed(seed))


def layers(kind):
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), Source(kind))
    return network, {"0.weight": torch.full((WIDTH, WIDTH), 0.05, dtype=torch.float64)}


@pytest.mark.parametrize("kind", ["variances", "blocks", "joint"])
def test_law_of_total_variance(kind):
    network, variances = layers(kind)
    x, scale = torch.randn(2, 4, WIDTH, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    for form in FORMS:
        walk = walk_over(network, variances, form, num_draws=2000)
        before = walk(network[0], GaussianState(x))
        after = walk(network[1], before, scale=scale)
        dense = before.covariance.operator().to_dense()
        mean, want = total_variance(network[1], before.mean, dense, scale=scale)
        torch.testing.assert_close(after.mean, mean)
        marginals = want.diagonal(dim1=-2, dim2=-1).view_as(mean)
        found = after.covariance.operator().to_dense()
        if form == "full":
            torch.testing.assert_close(found, want)
        elif form == "lowrank":
            size = marginals.flatten(1).sqrt()
            assert ((found - want).abs() / (size.unsqueeze(-1) * size.unsqueeze(-2))).max() < 0.12
        else:
            torch.testing.assert_close(after.variance, marginals)
        if form == "blockdiag":
            assert isinstance(after.covariance, Blocks)
            tokens = want.unflatten(2, (4, WIDTH)).unflatten(1, (4, WIDTH)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
            torch.testing.assert_close(after.covariance.entries, tokens)


@pytest.mark.parametrize("kind", ["variances", "blocks", "joint"])
@pytest.mark.parametrize("form", FORMS)
def test_a_certain_input_leaves_what_the_module_says(kind, form):
    network = nn.Sequential(Source(kind))
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    state = walk_over(network, {}, form)(network, GaussianState(x))
    mean, want = total_variance(network[0], x, torch.zeros(2, 12, 12, dtype=torch.float64))
    torch.testing.assert_close(state.mean, mean)
    torch.testing.assert_close(state.variance, want.diagonal(dim1=-2, dim2=-1).view_as(mean))
    found = propagate(network, from_variances({}), x, covariance=form)
    torch.testing.assert_close(found.variance, state.variance)


@pytest.mark.parametrize("form", FORMS)
def test_its_own_weights_enter_by_their_jacobian(form):
    source = Source()
    variances = {"weight": torch.rand(WIDTH, WIDTH, dtype=torch.float64) / 10}
    other = {"weight": torch.randn(WIDTH, WIDTH, dtype=torch.float64)}
    x, scale = torch.randn(2, 4, WIDTH, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    bound = from_variances(variances, other).bind(source)
    walk = Walk(source, bound, Options(form=form), 2000, torch.Generator().manual_seed(0))
    before = source.weight.detach().clone()
    state = walk(source, GaussianState(x), scale=scale)
    assert not walk.unused()
    assert source.weight.equal(before)

    def outputs(weight):
        mean = torch.tanh(x @ weight.mT) + x.mean(1, keepdim=True).square()
        return mean * scale[:, None, None]

    jacobian = jacrev(outputs)(other["weight"])
    torch.testing.assert_close(state.mean, outputs(other["weight"]))
    noise = torch.einsum("btkij,ij,bslij->btksl", jacobian, variances["weight"], jacobian).flatten(3).flatten(1, 2)
    own = source.conditional(x)[1]
    want = noise + torch.diag_embed(own.flatten(1))
    marginals = want.diagonal(dim1=-2, dim2=-1).view_as(state.mean)
    if form == "full":
        torch.testing.assert_close(state.covariance.operator().to_dense(), want)
    torch.testing.assert_close(state.variance, marginals, rtol=0.1 if form == "lowrank" else 1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["diag", "blockdiag", "lowrank"])
def test_wide_events_are_squared_by_random_signs(form, monkeypatch):
    network, variances = layers("blocks")
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)

    def run():
        walk = walk_over(network, variances, form, num_draws=4000)
        before = walk(network[0], GaussianState(x))
        return walk(network[1], before.scale(torch.ones_like(x), before.mean, torch.full_like(x, 0.3)))

    exact = run()
    monkeypatch.setattr(sources, "EXACT_UP_TO", 0)
    monkeypatch.setattr(sources, "NUM_SIGNS", 4000)
    drawn = run()
    assert not drawn.variance.equal(exact.variance)
    torch.testing.assert_close(drawn.variance, exact.variance, rtol=0.1, atol=0)


def test_modules_that_have_the_time_first():
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    for kind in ("variances", "blocks"):
        first, other = Source(kind), Source(kind, batch_first=False)
        other.load_state_dict(first.state_dict())
        for form in FORMS:
            one, two = (walk_over(module, {}, form)(module, GaussianState(x)) for module in (first, other))
            torch.testing.assert_close(one.mean, two.mean)
            torch.testing.assert_close(one.variance, two.variance)


def test_bad_input():
    class Odd(Source):
        def conditional(self, x, scale=None):
            return x, torch.zeros(2, 2, dtype=x.dtype)

    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    odd = Odd()
    with pytest.raises(
        ValueError, match=r"conditional: expected .* of shape \(2, 4, 3\), \(2, 4, 3, 3\) or \(2, 12, 12\)"
    ):
        walk_over(odd, {}, "full")(odd, GaussianState(x))
    layer = attention()
    state = GaussianState(torch.randn(2, 5, 8, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="attention between two sequences"):
        walk_over(layer, {}, "full")(layer, state, GaussianState(state.mean), state)


# Attention as Gaussian processes


def attention(kind=SGPAttention, batch_first=True, **options):
    options = {"num_inducing": 4, **options} if kind is SGPAttention else options
    layer = kind(8, 2, batch_first=batch_first, dtype=torch.float64, **options).eval()
    if kind is SGPAttention:
        with torch.no_grad():
            learnt(layer.inducing, -2.0)
    return layer


def learnt(inducing, log_variance):
    """Inducing variables that know something, so that variances differ between tokens."""
    inducing.value.normal_(std=0.5)
    inducing.log_diagonal.uniform_(-2.0, -1.0)
    inducing.log_variance.fill_(log_variance)


KINDS = {
    "rbf": lambda: attention(),
    "per_dim": lambda: attention(covariance="per_dim"),
    "exponential": lambda: attention(kernel="exponential"),
    "residual": lambda: attention(mode="residual"),
    "softmax": lambda: attention(kernel="exponential", mode="softmax_kernel"),
    "kep": lambda: attention(KEPAttention, rank=4),
    "rff": lambda: attention(RFFAttention),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_heads_covary_between_tokens(name):
    layer = KINDS[name]()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    state = walk_over(layer, {}, "full")(layer, GaussianState(x))
    heads = layer.posterior(x, x, x, **({"full": True} if isinstance(layer, SGPAttention) else {}))
    covariance = heads.covariance_matrix.unflatten(-1, (5, 4)).unflatten(-3, (5, 4))  # (B, H, T, D, T, D)
    weight = layer.out_proj.weight.unflatten(-1, (2, 4))
    want = torch.einsum("khi,bhtisj,lhj->btksl", weight, covariance, weight).flatten(3).flatten(1, 2)
    # A posterior of low rank has its rounding on the diagonal.
    torch.testing.assert_close(state.covariance.entries, want, rtol=1e-6, atol=1e-12)
    mean, marginal = layer.conditional(x)
    torch.testing.assert_close(state.mean, mean)
    torch.testing.assert_close(state.variance, marginal.to_dense().diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=1e-12)
    drawn = walk_over(layer, {}, "lowrank", num_draws=2000)(layer, GaussianState(x))
    torch.testing.assert_close(drawn.variance, state.variance, rtol=1e-6, atol=1e-12)
    size = state.variance.flatten(1).sqrt()
    error = drawn.covariance.operator().to_dense() - state.covariance.entries
    assert (error.abs() / (size.unsqueeze(-1) * size.unsqueeze(-2))).max() < 0.12


def test_attention_without_a_joint_law_has_independent_tokens():
    layer = attention(RFFAttention)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    walk = walk_over(layer, {}, "full")
    try:
        layer.posterior(x, x, x, is_causal=True)
    except ValueError:
        state = walk(layer, GaussianState(x), is_causal=True)
        blocks = layer.conditional(x, is_causal=True)[1].to_dense()
        torch.testing.assert_close(state.covariance.entries[0], torch.block_diag(*blocks[0]))


@pytest.mark.parametrize("form", FORMS)
def test_masks(form):
    layer = attention()
    network = nn.Sequential(layer)
    state = GaussianState(torch.randn(2, 5, 8, dtype=torch.float64))
    padding = torch.tensor([[False, False, False, True, True], [False] * 5])
    one = walk_over(layer, {}, form)(layer, state, state, state, key_padding_mask=padding, need_weights=False)
    other = GaussianState(state.mean.masked_fill(padding.unsqueeze(-1), 7.0))
    two = walk_over(layer, {}, form)(layer, other, key_padding_mask=padding)
    for found, again in ((one.mean, two.mean), (one.variance, two.variance)):
        torch.testing.assert_close(found, again)
        assert found[padding].eq(0).all()
        assert found[~padding].ne(0).all()
    later = state.mean.clone()
    later[:, 3:] += 1.0
    causal = [walk_over(network, {}, form)(layer, GaussianState(x), is_causal=True) for x in (state.mean, later)]
    for name in ("mean", "variance"):
        one, two = (getattr(result, name) for result in causal)
        torch.testing.assert_close(one[:, :3], two[:, :3])
        assert not one[:, 3:].equal(two[:, 3:])


def encoder(variance, norm_first=True, **options):
    layer = SGPATransformerEncoderLayer(
        8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=norm_first, num_inducing=5, dtype=torch.float64, **options
    )
    network = SGPATransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        for part in network.layers:
            learnt(part.self_attn.inducing, math.log(variance))
    return network


@pytest.mark.slow
@pytest.mark.parametrize("variance", [0.02, 0.15])
@pytest.mark.parametrize("norm_first", [True, False])
def test_two_layers_agree_with_draws_of_the_model(variance, norm_first):
    network = encoder(variance, norm_first, sampling="joint")
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        drawn = torch.cat([network(x.expand(1000, -1, -1)) for _ in range(4)])
    found = propagate(network, from_variances({}), x, covariance="full")
    ratio = found.variance[0].sqrt() / drawn.std(0)
    assert abs(ratio.mean() - 1) < 0.025
    # Norms behind large noise are not linear.
    least, most = (0.94, 1.06) if norm_first or variance < 0.1 else (0.85, 1.1)
    assert least < ratio.min()
    assert ratio.max() < most
    average = torch.eye(8, dtype=torch.float64).repeat(1, 6) / 6
    pooled = (average @ found.covariance.to_dense()[0] @ average.mT).diagonal().sqrt()
    assert abs((pooled / drawn.mean(1).std(0)).mean() - 1) < 0.04
    assert ((found.mean[0] - drawn.mean(0)) / drawn.std(0)).abs().mean() < 0.15
    low = propagate(network, from_variances({}), x, covariance="lowrank", num_tangents=2000)
    assert abs((low.variance / found.variance).sqrt().mean() - 1) < 0.02
    # Tokens that are taken to be independent lose what pools have in common.
    alone = propagate(network, from_variances({}), x, covariance="diag").covariance.to_dense()[0]
    assert ((average @ alone @ average.mT).diagonal().sqrt() / drawn.mean(1).std(0)).mean() < 0.8


@pytest.mark.parametrize("form", FORMS)
def test_predictions_do_not_depend_on_chunks_and_repeat(form):
    network = encoder(0.1)
    variances = posterior(network, 0.05, ["linear1"])
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    options = {"covariance": form, "num_tangents": 8}
    results = [
        propagate(network, variances, x, chunk_size=size, generator=torch.Generator().manual_seed(2), **options)
        for size in (3, 2, 1)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result.mean, results[0].mean)
        torch.testing.assert_close(result.variance, results[0].variance)
    assert results[0].variance.gt(0).all()


def test_its_weights_and_its_noise_together():
    """The variance of a linear read-out, against draws of weights around the mean plus the layer's own."""
    layer = attention(sampling="mean")
    with torch.no_grad():
        layer.inducing.log_variance.fill_(-6.0)
    names = ["value_weight", "query_weight", "out_proj.weight"]
    variances = relative_variances(layer, 0.05, names)
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    state = walk_over(layer, variances, "full")(layer, GaussianState(x))
    own = walk_over(layer, {}, "full")(layer, GaussianState(x))
    means = dict(layer.named_parameters())
    drawn = []
    with torch.no_grad():
        for _ in range(400):
            weights = {name: means[name] + v.sqrt() * torch.randn_like(v) for name, v in variances.items()}
            drawn.append(functional_call(layer, weights, (x, x, x))[0])
    want = torch.stack(drawn).var(0) + own.variance
    assert abs((state.variance / want).sqrt().mean() - 1) < 0.02


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form):
    network = encoder(0.1)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    here = propagate(network, from_variances({}), x, covariance=form, num_tangents=2000)
    there = propagate(network.cuda(), from_variances({}), x.cuda(), covariance=form, num_tangents=2000)
    assert there.variance.is_cuda
    tolerance = 0.3 if form == "lowrank" else 1e-6
    torch.testing.assert_close(there.variance.cpu(), here.variance, rtol=tolerance, atol=1e-9)
