"""The linearised network against dense algebra, the full form and its own draws; and modules without a rule."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from gpseq.propagation import fallback as fallback_module
from gpseq.propagation import from_columns, from_covariance, from_factors, from_variances, propagate
from gpseq.propagation.fallback import linearise
from gpseq.propagation.forward import as_predictive
from gpseq.propagation.laws import Dense, Diagonal, Kronecker, KroneckerLaplace, LowRank
from gpseq.propagation.linearisation import forward_mode, linearised
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.moments import LowRank as LowRankCovariance
from gpseq.propagation.posteriors import WeightPosterior
from gpseq.propagation.quadratic import gaussian_draws, times
from gpseq.propagation.walk import Options, Walk
from tests.oracles_propagation import posterior


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def spd(size, seed=0):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT / size + 0.1 * torch.eye(size)


def laws(rows, columns):
    """A law of each kind, and its covariance over the flat matrix."""
    one, other = spd(rows, 1), spd(columns, 2)
    values_b, vectors_b = torch.linalg.eigh(one)
    values_a, vectors_a = torch.linalg.eigh(other)
    size = rows * columns
    whole, own = spd(size, 3), torch.rand(rows, columns) + 0.1
    some = torch.randn(2, rows, columns)
    flat = some.flatten(1)
    return {
        "diagonal": (Diagonal(own), torch.diag(own.flatten())),
        "kronecker": (Kronecker(one, other), torch.kron(one, other)),
        "kronecker laplace": (
            KroneckerLaplace(vectors_b, values_b, vectors_a, values_a, torch.tensor(0.7)),
            torch.linalg.inv(torch.kron(one, other) + 0.7 * torch.eye(size)),
        ),
        "dense": (Dense(whole.view(rows, columns, rows, columns)), whole),
        "low rank": (LowRank(some, own), flat.mT @ flat + torch.diag(own.flatten())),
    }


KINDS = list(laws(2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_covariances_and_draws(kind):
    law, dense = laws(3, 4)[kind]
    matrices = torch.randn(2, 5, 3, 4)
    expected = (matrices.flatten(2) @ dense).unflatten(-1, (3, 4))
    torch.testing.assert_close(times(law, matrices), expected)
    drawn = gaussian_draws(law, 40_000, torch.Generator().manual_seed(0), matrices).flatten(1)
    scale = dense.diagonal().sqrt()
    error = (drawn.mT @ drawn / len(drawn) - dense) / scale.outer(scale)
    assert error.abs().max() < 0.03
    assert (drawn.mean(0) / scale).abs().max() < 0.03


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def dense_glm(network, names, sigma, x, **inputs):
    """J Sigma J^T with one flat vector of weights."""
    sizes = [network.get_parameter(name).numel() for name in names]

    def run(flat):
        parts = flat.split(sizes)
        weights = {name: part.view_as(network.get_parameter(name)) for name, part in zip(names, parts, strict=True)}
        return functional_call(network, weights, (x,), inputs).flatten(1)

    flat = torch.cat([network.get_parameter(name).detach().flatten() for name in names])
    jacobian = jacrev(run)(flat)
    return run(flat), jacobian @ sigma @ jacobian.mT


@pytest.mark.parametrize("kind", KINDS)
def test_exact_equals_dense_algebra_for_each_law(kind):
    network, x = small(), torch.randn(5, 3)
    first, one = laws(4, 3)[kind]
    second, other = laws(2, 1)[kind]
    weights = WeightPosterior({"0.weight": first, "2.bias": second})
    mean, covariance = dense_glm(network, ["0.weight", "2.bias"], torch.block_diag(one, other), x)
    found = linearised(network, weights, x, method="exact")
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance.to_dense(), covariance)


def test_exact_equals_dense_algebra_for_joint_laws():
    network, x = small(), torch.randn(5, 3)
    names = ["2.weight", "0.bias"]  # across layers
    sigma = spd(12)
    mean, covariance = dense_glm(network, names, sigma, x)
    found = linearised(network, from_covariance(names, sigma), x, method="exact")
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance.to_dense(), covariance)
    columns = {"2.weight": torch.randn(3, 2, 4), "0.bias": torch.randn(3, 4)}
    own = {"2.weight": torch.rand(2, 4), "0.bias": torch.rand(4)}
    flat = torch.cat([columns[name].flatten(1) for name in names], 1)
    sigma = flat.mT @ flat + torch.diag(torch.cat([own[name].flatten() for name in names]))
    _, covariance = dense_glm(network, names, sigma, x)
    found = linearised(network, from_columns(columns, own), x, method="exact")
    torch.testing.assert_close(found.covariance.to_dense(), covariance)
    # Columns alone are no draws: two of them are enough for an exact answer.
    _, covariance = dense_glm(network, names, flat.mT @ flat, x)
    found = linearised(network, from_columns(columns), x, 2)
    torch.testing.assert_close(found.covariance.to_dense(), covariance)


NETWORKS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)),
    "before": lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, norm_first=True),
    "after": lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_full_to_first_order_is_the_exact_tangent(make):
    network, x = make().eval(), torch.randn(2, 3, 4)
    weights = posterior(network, 0.1)
    walk = Walk(network, weights.bind(network), Options(form="full", activations="tangent", products=False))
    with torch.no_grad():
        found = as_predictive(walk(network, GaussianState(x)))
        expected = linearised(network, weights, x, method="exact")
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_draws_are_those_of_the_low_rank_form(make):
    network, x = make().eval(), torch.randn(2, 3, 4)
    weights = posterior(network, 0.1)
    options = Options(form="lowrank", activations="tangent", products=False, rescale=False)
    walk = Walk(network, weights.bind(network), options, 8, torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = as_predictive(walk(network, GaussianState(x)))
        expected = linearised(network, weights, x, 8, generator=torch.Generator().manual_seed(3))
        again = linearised(network, weights, x, 8, 1, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again.covariance.to_dense(), expected.covariance.to_dense())  # whatever the chunks are


def test_sampled_covariances_converge_at_the_rate_of_draws():
    network, x = NETWORKS["perceptron"]().eval(), torch.randn(4, 4)
    weights = posterior(network, 0.1)
    with torch.no_grad():
        exact = linearised(network, weights, x, method="exact").covariance.to_dense()
        errors = []
        for number in (32, 512):
            squares = [
                (
                    linearised(
                        network, weights, x, number, generator=torch.Generator().manual_seed(seed)
                    ).covariance.to_dense()
                    - exact
                )
                .square()
                .mean()
                for seed in range(16)
            ]
            errors.append(torch.stack(squares).mean().sqrt())
    assert 2.5 < errors[0] / errors[1] < 6.5  # four, for sixteen times as many
    assert errors[1] < 0.15 * exact.diagonal(dim1=-2, dim2=-1).mean()


def test_means_noise_and_dtypes(dtype):
    network = small().to(dtype)
    x = torch.randn(3, 3, dtype=dtype)
    variances = {"0.weight": torch.full((4, 3), 0.01, dtype=dtype)}
    means = {"0.weight": torch.randn(4, 3, dtype=dtype), "2.bias": torch.randn(2, dtype=dtype)}
    moved = copy.deepcopy(network)
    moved.load_state_dict({**network.state_dict(), **means})
    found = linearised(network, from_variances(variances, means), x, noise=0.5)
    expected = linearised(moved, from_variances(variances), x, method="exact")
    assert found.dtype == dtype and found.noise.shape == (3, 2) and found.notes["covariance"] == "linearised"
    torch.testing.assert_close(found.mean, expected.mean)
    assert (found.variance.sqrt() / expected.variance.sqrt() - 1).abs().max() < 0.25
    nothing = linearised(network, WeightPosterior(), x)
    assert torch.equal(nothing.variance, torch.zeros(3, 2, dtype=dtype))
    assert torch.equal(linearised(network, WeightPosterior(), x, method="exact").variance, nothing.variance)


def test_tokens_positions_outputs_and_batch_dim():
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0).eval()  # time first
    x, weights = torch.randn(3, 2, 4), posterior(layer, 0.1, ["linear2"])
    found = linearised(layer, weights, x, method="exact", batch_dim=1)
    assert found.mean.shape == (2, 3, 4)
    torch.testing.assert_close(found.mean, layer(x).transpose(0, 1))
    chosen = linearised(
        layer, weights, x, method="exact", batch_dim=1, positions=torch.tensor([2]), outputs=torch.tensor([1, 3])
    )
    torch.testing.assert_close(chosen.mean, found.mean[:, 2:][..., [1, 3]])
    flat = torch.tensor([9, 11])
    torch.testing.assert_close(chosen.covariance.to_dense(), found.covariance.to_dense()[:, flat][..., flat])


def test_gradients_flow():
    network, x = small(), torch.randn(2, 3, requires_grad=True)
    linearised(network, posterior(network, 0.1), x, 8).variance.sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


# Transformers of Hugging Face


def foreign(kind, attention):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"attn_implementation": attention}
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=8, num_labels=3, **common,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        inputs = {"input_ids": torch.randint(30, (2, 5)), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
        name = "bert.encoder.layer.0.output.dense.weight"
    elif kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=4,
            patch_size=2, num_channels=1, num_labels=3, **common,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
        inputs, name = {"pixel_values": torch.randn(2, 1, 4, 4)}, "classifier.weight"
    else:
        config = transformers.GPT2Config(
            vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **common
        )
        model = transformers.GPT2LMHeadModel(config)
        inputs, name = {"input_ids": torch.randint(9, (2, 5))}, "transformer.wte.weight"  # the head's, too
    return model.double().eval(), inputs, name


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_foreign_transformers_are_linearised(kind, attention):
    model, inputs, name = foreign(kind, attention)
    query = next(
        n for n, _ in model.named_parameters() if any(k in n for k in ("query.weight", "q_proj.weight", "c_attn.w"))
    )
    columns = {n: 0.1 * torch.randn(2, *model.get_parameter(n).shape) for n in (name, query)}
    weights = from_columns(columns)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library
        found = linearised(model, weights, inputs, 1)
        logits = model(**inputs).logits
        step = 1e-5
        moved = []
        for column in range(2):
            shifted = {n: model.get_parameter(n) + step * value[column] for n, value in columns.items()}
            moved.append((functional_call(model, shifted, (), inputs).logits - logits) / step)
    torch.testing.assert_close(found.mean, logits)
    root = torch.stack(moved).flatten(2)  # the columns are all there is: differences are enough
    expected = torch.einsum("rbi,rbj->bij", root, root)
    torch.testing.assert_close(
        found.covariance.to_dense(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )
    assert getattr(model.config, "use_cache", True) is True


# Switches, and what has no derivatives


def switches():
    cuda = torch.backends.cuda
    return (
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


class Config:
    use_cache = True


def test_switches_are_restored_after_an_error():
    network = small()
    network.config = Config()
    before = switches()
    with pytest.raises(RuntimeError, match="inside"), forward_mode(network):
        assert switches() == (False, False, False, True) and network.config.use_cache is False
        raise RuntimeError("inside")
    assert switches() == before and network.config.use_cache is True


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(-1)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return NoForwardMode.apply(self.linear(x))


def test_what_has_no_forward_mode_is_told():
    network, x = Custom().eval(), torch.randn(2, 3)
    before = switches()
    with pytest.raises(NotImplementedError, match="attn_implementation='eager'"):
        linearised(network, posterior(network, 0.1), x)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives of the model itself, a Custom"):
        propagate(network, posterior(network, 0.1), x, on_unknown="linearise", covariance="lowrank")
    assert switches() == before


class Looks(nn.Module):
    """Has control flow that vmap cannot follow, and jvp can."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        h = self.linear(x)
        return h * h if h.sum() > -1e9 else h


def test_control_flow_on_numbers_is_no_obstacle():
    network, x = Looks().eval(), torch.randn(2, 3)
    weights = posterior(network, 0.1)
    found = linearised(network, weights, x, 2000, generator=torch.Generator().manual_seed(0))
    names = ["linear.weight", "linear.bias"]
    sigma = torch.diag(torch.cat([weights.laws[name].entries.flatten() for name in names]))
    _, expected = dense_glm(network, names, sigma, x)
    torch.testing.assert_close(linearised(network, weights, x, method="exact").covariance.to_dense(), expected)
    assert (found.variance / expected.diagonal(dim1=-2, dim2=-1) - 1).abs().max() < 0.2


def test_bad_arguments():
    network, x = small(), torch.randn(2, 3)
    weights = posterior(network, 0.1)
    with pytest.raises(ValueError, match="method: expected one of sampled, differences, exact, got 'both'"):
        linearised(network, weights, x, method="both")
    with pytest.raises(ValueError, match="num_tangents"):
        linearised(network, weights, x, 0)
    with pytest.raises(ValueError, match="chunk_size"):
        linearised(network, weights, x, chunk_size=0)
    with pytest.raises(ValueError, match="finite"):
        linearised(network, weights, x * torch.nan)
    with pytest.raises(ValueError, match="eval"):
        linearised(nn.Sequential(small(), nn.Dropout(0.5)).train(), WeightPosterior(), x)
    with pytest.raises(ValueError, match=r"\(B, K\) or \(B, T, K\)"):
        linearised(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2, 1))).eval(), WeightPosterior(), x)


# Modules without a rule in the middle of a network


class Odd(nn.Module):
    """Nothing here has a rule: sums along the features, of products with a softmax."""

    def __init__(self, width, out):
        super().__init__()
        self.linear, self.weight = nn.Linear(width, out), nn.Parameter(torch.randn(out))

    def forward(self, x, shift=None):
        y = self.linear(x)
        y = torch.cumsum(y * y.softmax(-1), -1) * self.weight
        return y if shift is None else (y + shift, x)


def middle():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Odd(5, 4), nn.Linear(4, 2)).eval()


def walked(network, weights, x, form, num_draws=64, tangent=True, seed=0):
    options = Options(form=form, on_unknown="linearise")
    if tangent:
        options = Options(form=form, on_unknown="linearise", activations="tangent", products=False, rescale=False)
    walk = Walk(network, weights.bind(network), options, num_draws, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = as_predictive(walk(network, GaussianState(x)))
    assert walk.unused() == ()
    return found


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=["features", "tokens"])
def test_a_network_with_an_unknown_layer_is_the_exact_tangent(shape):
    network, x = middle(), torch.randn(shape)
    weights = posterior(network, 0.1)
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact")
        drawn = linearised(network, weights, x, 16, generator=torch.Generator().manual_seed(0))
    full = walked(network, weights, x, "full")
    torch.testing.assert_close(full.mean, expected.mean)
    torch.testing.assert_close(full.covariance.to_dense(), expected.covariance.to_dense(), rtol=1e-10, atol=1e-14)
    columns = walked(network, weights, x, "lowrank", 16)
    torch.testing.assert_close(columns.covariance.to_dense(), drawn.covariance.to_dense(), rtol=1e-9, atol=1e-13)
    diagonal = walked(network, weights, x, "diag")
    assert (diagonal.variance.sqrt() / expected.variance.sqrt() - 1).abs().max() < 0.3


def test_unknown_layers_are_carried_in_every_form_with_moments():
    network, x = middle(), torch.randn(3, 4)
    weights = posterior(network, 0.05)
    reference = walked(network, weights, x, "full", tangent=False)
    for form, allowed in (("lowrank", 0.12), ("diag", 0.3), ("blockdiag", 0.02)):
        found = walked(network, weights, x, form, 1000, tangent=False)
        torch.testing.assert_close(found.mean, reference.mean, rtol=1e-3, atol=1e-3)
        assert (found.variance.sqrt() / reference.variance.sqrt() - 1).abs().max() < allowed, form


def test_tokens_in_blocks_are_an_error():
    network, x = middle(), torch.randn(2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"2, a Odd.*'blockdiag'"):
        walked(network, posterior(network, 0.1), x, "blockdiag")


def low_rank_state(shape, columns=3):
    return GaussianState(torch.randn(shape), LowRankCovariance(torch.randn(columns, *shape), torch.rand(shape)))


def bare_walk(module, form="lowrank", num_draws=3, seed=0):
    bound = WeightPosterior().bind(module)
    return Walk(module, bound, Options(form=form), num_draws, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("inner", "outer"), [(4, 6), (6, 4)], ids=["by columns", "by rows"])
def test_independent_variances_go_through_exactly(inner, outer):
    module = Odd(inner, outer)
    state = low_rank_state((2, inner))
    with torch.no_grad():
        found = linearise(module, state, bare_walk(module))
    jacobian = torch.stack([jacrev(module)(row) for row in state.mean])
    covariance = state.covariance
    torch.testing.assert_close(found.covariance.entries, (jacobian.square() @ covariance.entries.unsqueeze(-1))[..., 0])
    torch.testing.assert_close(found.covariance.columns, torch.einsum("bij,rbj->rbi", jacobian, covariance.columns))


def test_many_independent_variances_become_a_part_of_the_columns(monkeypatch):
    monkeypatch.setattr(fallback_module, "_PROBED", 0)
    monkeypatch.setattr(fallback_module, "_PROBED_PER_DRAW", 0)
    module = Odd(6, 30)
    state = GaussianState(torch.randn(1, 6), LowRankCovariance(torch.zeros(4000, 1, 6), torch.rand(1, 6)))
    jacobian = jacrev(module)(state.mean[0])
    expected = jacobian @ torch.diag(state.covariance.entries[0]) @ jacobian.mT
    with torch.no_grad():
        found = linearise(module, state, bare_walk(module, num_draws=4000)).covariance
    assert torch.equal(found.entries, torch.zeros_like(found.entries))
    total, scale = found.columns[:, 0].mT @ found.columns[:, 0], expected.diagonal().sqrt()
    assert ((total - expected) / scale.outer(scale)).abs().max() < 0.1  # unbiased, correlations included


def test_further_arguments_may_be_uncertain_in_a_low_rank_only():
    module = nn.Bilinear(3, 4, 2)
    one, other = low_rank_state((2, 3)), low_rank_state((2, 4))
    with torch.no_grad():
        found = linearise(module, one, bare_walk(module), other)
        plain = linearise(module, one, bare_walk(module), other.mean)
    first = torch.einsum("kij,bj->bki", module.weight, other.mean)
    second = torch.einsum("kij,bi->bkj", module.weight, one.mean)
    expected = torch.einsum("bki,rbi->rbk", first, one.covariance.columns)
    torch.testing.assert_close(plain.covariance.columns, expected)
    expected = expected + torch.einsum("bkj,rbj->rbk", second, other.covariance.columns)
    torch.testing.assert_close(found.covariance.columns, expected)
    entries = (first.square() @ one.covariance.entries.unsqueeze(-1))[..., 0]
    entries = entries + (second.square() @ other.covariance.entries.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(found.covariance.entries, entries)
    torch.testing.assert_close(found.mean, module(one.mean, other.mean))
    walk = bare_walk(module, "diag")
    with pytest.raises(NotImplementedError, match=r"2 uncertain arguments.*'lowrank'"):
        linearise(module, walk.independent(GaussianState(one.mean), torch.ones(2, 3)), walk,
                  walk.independent(GaussianState(other.mean), torch.ones(2, 4)))  # fmt: skip


def test_arguments_go_along_with_their_rows():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd = nn.Linear(4, 5), Odd(5, 4)

        def forward(self, x, shift):
            return self.odd(self.first(x), shift)[0]

    network, x, shift = Outer().eval(), torch.randn(3, 4), torch.randn(3, 4)
    weights = posterior(network, 0.1)
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact", shift=shift)
        found = propagate(network, weights, x, on_unknown="linearise", activations="tangent", shift=shift)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense())


def test_the_whole_model_may_be_linearised_from_a_mapping():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd(4, 3)

        def forward(self, *, keep, x):
            return {"logits": torch.cumsum(self.odd(x) * keep, -1)}

    network, x = Pair().eval(), {"keep": torch.rand(3, 1), "x": torch.randn(3, 4)}
    weights = posterior(network, 0.1)
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact")
        for form in ("full", "diag"):
            found = propagate(network, weights, x, on_unknown="linearise", covariance=form)
            torch.testing.assert_close(found.mean, expected.mean)
            torch.testing.assert_close(found.variance, expected.variance)


def test_kronecker_and_joint_laws_of_an_unknown_module():
    module = nn.Sequential(Odd(4, 3)).eval()
    x = torch.randn(2, 4)
    factors = from_factors({"0.linear.weight": (spd(3, 1), spd(4, 2)), "0.linear.bias": (spd(3, 3), torch.ones(1, 1))})
    joint = from_covariance(["0.linear.weight", "0.weight"], spd(15) / 50)
    for weights in (factors.scaled(0.01), joint):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it goes across layers, which an unknown module keeps
            expected = linearised(module, weights, x, method="exact")
            found = propagate(module, weights, x, on_unknown="linearise", covariance="full")
        torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense())


def test_the_model_is_left_as_it_was():
    network, x = middle(), torch.randn(2, 4)
    network[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    grads, was = [p.requires_grad for p in network.parameters()], switches()
    linearised(network, posterior(network, 0.1), x, 4)
    linearised(network, posterior(network, 0.1), x, method="exact")
    for form in ("full", "lowrank", "diag", "blockdiag"):
        propagate(network, posterior(network, 0.1), x, on_unknown="linearise", covariance=form)
    assert [p.requires_grad for p in network.parameters()] == grads and switches() == was
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert all(not module._forward_hooks and not module.training for module in network.modules())
