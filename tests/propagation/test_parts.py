"""Moments through a part of a network: against the whole, Monte Carlo over weights, and each kind of posterior."""

import copy

import pytest
import torch
from torch import nn

from gpseq.nn import SGPATransformerEncoderLayer
from gpseq.propagation import (
    PartMoments,
    WeightPosterior,
    fit_laplace,
    from_columns,
    from_covariance,
    from_factors,
    from_variances,
    linearised,
    propagate,
)
from gpseq.propagation.laws import Dense, Kronecker, LowRank
from gpseq.propagation.switches import exact_kernels
from tests.oracles_propagation import held, monte_carlo, posterior, relative_variances

FORMS = ["full", "lowrank", "blockdiag", "diag"]
WIDTH, LENGTH = 6, 3


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


class Step(nn.Module):
    """From after the attention of one block to after that of the next."""

    def __init__(self, previous, block, padding=None):
        super().__init__()
        self.previous, self.block, self.padding = previous, block, padding

    def forward(self, x):
        a, b = self.previous, self.block
        hidden = a.norm2(x) if a.norm_first else x
        u = x + a.dropout2(a.linear2(a.dropout(a.activation(a.linear1(hidden)))))
        u = u if a.norm_first else a.norm2(u)
        n = b.norm1(u) if b.norm_first else u
        attended = b.self_attn(
            n, n, n, attn_mask=None, key_padding_mask=self.padding, need_weights=False, is_causal=False
        )[0]
        u = u + b.dropout1(attended)
        return u if b.norm_first else b.norm1(u)


def encoder(norm_first=True, dtype=torch.float64):
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 12, 0.1, activation="gelu", batch_first=True, norm_first=norm_first, dtype=dtype
    )
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# The whole


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_a_part_that_is_the_model(form, dtype):
    model, x = encoder(dtype=dtype), torch.randn(3, LENGTH, WIDTH, dtype=dtype)
    weights = posterior(model, 0.1)

    def generator():
        return torch.Generator().manual_seed(0)

    want = propagate(model, weights, x, covariance=form, num_tangents=8, generator=generator())
    mean, variance = PartMoments(model, weights, form, num_tangents=8, generator=generator())(model, x)
    assert mean.shape == variance.shape == x.shape and mean.dtype == variance.dtype == dtype
    tight = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(mean, want.mean, **tight)
    torch.testing.assert_close(variance, want.variance, **tight)


@pytest.mark.parametrize("options", [{"preset": "streamlined"}, {"activations": "tangent", "layer_norm": "frozen"}])
def test_options_are_those_of_propagate(options):
    model, x = encoder(), torch.randn(2, LENGTH, WIDTH)
    weights = posterior(model, 0.1)
    mean, variance = PartMoments(model, weights, **options)(model, x)
    want = propagate(model, weights, x, covariance="diag", **options)
    torch.testing.assert_close(mean, want.mean)
    torch.testing.assert_close(variance, want.variance)


@pytest.mark.parametrize("form", FORMS)
def test_a_block_is_what_it_is_alone(form):
    model, x = encoder(), torch.randn(2, LENGTH, WIDTH)
    variances = relative_variances(model, 0.1)
    block = model.layers[1]
    own = from_variances(held(block, model, variances))
    options = {"covariance": form, "num_tangents": 8}
    want = propagate(block, own, x, **options, generator=torch.Generator().manual_seed(0))
    weights = from_variances(variances)
    mean, variance = PartMoments(model, weights, **options, generator=torch.Generator().manual_seed(0))(block, x)
    torch.testing.assert_close(mean, want.mean)
    torch.testing.assert_close(variance, want.variance)


# Steps


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_a_step_agrees_with_monte_carlo(norm_first):
    model, x = encoder(norm_first), torch.randn(1, LENGTH, WIDTH)
    step = Step(model.layers[0], model.layers[1]).eval()
    variances = relative_variances(model, 0.05)
    with torch.no_grad(), exact_kernels():
        generator = torch.Generator().manual_seed(1)
        mean, covariance = monte_carlo(step, held(step, model, variances), x, 12_000, generator)
        found, variance = PartMoments(model, from_variances(variances), "full")(step, x)
        low = PartMoments(model, from_variances(variances), "lowrank", num_tangents=4000)(step, x)[1]
        rough = PartMoments(model, from_variances(variances))(step, x)[1]
    true = covariance.diagonal(dim1=-2, dim2=-1).view_as(x).sqrt()
    assert abs((variance.sqrt() / true).mean() - 1) < 0.03
    assert (variance.sqrt() / true - 1).abs().max() < 0.05
    assert abs((low.sqrt() / true).mean() - 1) < 0.03
    assert ((found - mean.view_as(x)).abs() / true).max() < 0.25
    assert 0.7 < (rough.sqrt() / true).mean() < 1.3  # marginals forget what residual paths have in common


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_what_a_step_does_not_use_is_left_out(form, norm_first):
    model, x = encoder(norm_first), torch.randn(2, LENGTH, WIDTH)
    variances = relative_variances(model, 0.1)
    step = Step(model.layers[0], model.layers[1]).eval()
    idle = ("layers.0.self_attn", "layers.0.norm1", "layers.1.linear", "layers.1.norm2", "layers.2")
    used = {name: value for name, value in variances.items() if not name.startswith(idle)}
    options = {"covariance": form, "num_tangents": 8}
    want = propagate(
        step, from_variances(held(step, model, used)), x, **options, generator=torch.Generator().manual_seed(0)
    )
    moments = PartMoments(model, from_variances(variances), **options, generator=torch.Generator().manual_seed(0))
    mean, variance = moments(step, x)
    torch.testing.assert_close(mean, want.mean)
    torch.testing.assert_close(variance, want.variance)
    with pytest.raises(NotImplementedError, match="not at all"):
        propagate(step, from_variances(held(step, model, variances)), x, **options)


@pytest.mark.parametrize("form", FORMS)
def test_a_part_may_hold_masks_of_its_batch(form):
    model, x = encoder(), torch.randn(3, LENGTH, WIDTH)
    padding = torch.tensor([[False, False, False], [False, False, True], [False, True, True]])
    step = Step(model.layers[0], model.layers[1], padding).eval()
    moments = PartMoments(model, posterior(model, 0.1), form, num_tangents=500)
    moments.generator = torch.Generator().manual_seed(0)
    mean, variance = moments(step, x)
    for row in range(3):
        kept = ~padding[row]
        alone = Step(model.layers[0], model.layers[1]).eval()
        moments.generator = torch.Generator().manual_seed(0)
        one, spread = moments(alone, x[row : row + 1, kept])
        torch.testing.assert_close(mean[row, kept], one[0])
        torch.testing.assert_close(variance[row, kept], spread[0])


def test_chunks_of_a_part_that_holds_none():
    model, x = encoder(), torch.randn(5, LENGTH, WIDTH)
    weights, step = posterior(model, 0.1), Step(model.layers[1], model.layers[2]).eval()
    seen = []
    step.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    whole = PartMoments(model, weights)(step, x)
    assert set(seen) <= {1, 5}
    chunked = PartMoments(model, weights, chunk_size=2)(step, x)
    torch.testing.assert_close(whole, chunked)


def test_nothing_uncertain():
    model, x = encoder(), torch.randn(2, LENGTH, WIDTH)
    moments = PartMoments(model, posterior(model, 0.1, ["layers.2"]))
    step = Step(model.layers[0], model.layers[1]).eval()
    mean, variance = moments(step, x)
    torch.testing.assert_close(mean, step(x))
    assert variance.shape == x.shape and variance.eq(0).all()
    mean, variance = moments(nn.Identity(), x)
    assert mean.equal(x) and variance.eq(0).all()


def test_the_model_is_left_as_it_was():
    model, x = encoder().requires_grad_(False), torch.randn(2, LENGTH, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    step = Step(model.layers[0], model.layers[1]).eval()
    _, variance = PartMoments(model, posterior(model, 0.1))(step, x)
    with torch.inference_mode():
        other = PartMoments(model, posterior(model, 0.1))(step, x.clone())[1]
    torch.testing.assert_close(variance, other)
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_copies_of_all_of_it():
    model, x = encoder(), torch.randn(2, LENGTH, WIDTH)
    moments = PartMoments(model, posterior(model, 0.1))
    want = moments(model.layers[1], x)
    twin = copy.deepcopy(moments)
    torch.testing.assert_close(twin(twin.model.layers[1], x), want)
    with pytest.raises(ValueError, match="is it a copy"):
        twin(model.layers[1], x)


# Posteriors


class Middle(nn.Module):
    """One weight with its bias, and the weight behind it."""

    def __init__(self, model):
        super().__init__()
        self.first, self.second = model[2], model[4]

    def forward(self, x):
        return nn.functional.linear(torch.tanh(self.first(x)), self.second.weight)


NEW = {"2.weight": "first.weight", "2.bias": "first.bias", "4.weight": "second.weight"}


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()


def spd(size):
    root = torch.randn(size, size)
    return 0.02 * (root @ root.mT / size + torch.eye(size))


def kinds(model):
    """A posterior of each kind, over parameters that the part has and those that it has not."""
    parameters = dict(model.named_parameters())
    order = ["4.weight", "0.weight", "2.bias", "2.weight", "4.bias"]
    size = sum(parameters[name].numel() for name in order)
    columns = {name: 0.1 * torch.randn(5, *parameters[name].shape) for name in order}
    variances = {name: 0.01 * torch.rand(parameters[name].shape) for name in order}
    factors = {
        name: (spd(len(p)), spd(p.numel() // len(p)) if p.dim() > 1 else torch.ones(1, 1))
        for name, p in parameters.items()
    }
    data = [torch.randn(20, 3)]
    dense = spd(12)
    low = LowRank(0.1 * torch.randn(2, 3, 4), 0.01 * torch.rand(3, 4))
    return {
        "variances": from_variances(variances, means={name: p.detach() + 0.5 for name, p in parameters.items()}),
        "kronecker": from_factors(factors),
        "dense law": WeightPosterior({"2.weight": Dense(dense.view(3, 4, 3, 4)), "0.bias": Kronecker(spd(4), spd(1))}),
        "low-rank law": WeightPosterior({"2.weight": low}),
        "covariance": from_covariance(order, spd(size)),
        "columns": from_columns(columns),
        "columns and variances": from_columns(columns, variances),
        "several": from_covariance(["2.bias", "0.bias"], spd(7)) | from_columns({"4.weight": columns["4.weight"]}),
        "laplace, diagonal": fit_laplace(model, data, "regression"),
        "laplace, kronecker": fit_laplace(model, data, "regression", structure="kron"),
    }


def dense_covariance(bound, names):
    """Of all entries of some parameters, one after the other, from what a posterior says of each pair."""
    total = torch.zeros(0, 0)
    places, start = {}, 0
    for name in names:
        places[name] = slice(start, start := start + bound.parameters[name].numel())
    total = torch.zeros(start, start)
    for name, law in bound.posterior.laws.items():
        if name in places:
            total[places[name], places[name]] = law.between(torch.arange(law.shape[0] * law.shape[1])).detach()
    for joint in bound.posterior.joints:
        index = bound.places(joint)
        covariance = joint.covariance
        if covariance is None:
            covariance = joint.columns.mT @ joint.columns
            covariance = covariance if joint.variances is None else covariance + joint.variances.diag()
        for one in set(joint.names) & set(names):
            for other in set(joint.names) & set(names):
                total[places[one], places[other]] = covariance[index[one].flatten()][:, index[other].flatten()]
    return total


KINDS = [
    "variances",
    "kronecker",
    "dense law",
    "low-rank law",
    "covariance",
    "columns",
    "columns and variances",
    "several",
    "laplace, diagonal",
    "laplace, kronecker",
]


@pytest.mark.parametrize("kind", KINDS)
def test_restriction_is_the_marginal(kind):
    model = network()
    part = Middle(model)
    bound = kinds(model)[kind].bind(model)
    found = bound.restricted(NEW)
    assert set(found.names) == {NEW[name] for name in bound.posterior.names if name in NEW}
    assert set(found.means) == {NEW[name] for name in bound.posterior.means if name in NEW}
    again = found.bind(part)
    covariance = dense_covariance(again, list(NEW.values()))
    torch.testing.assert_close(covariance, dense_covariance(bound, list(NEW)))
    assert covariance.abs().max() > 0
    for old, new in NEW.items():
        torch.testing.assert_close(again.mean(part.get_parameter(new)), bound.mean(model.get_parameter(old)))


@pytest.mark.filterwarnings("ignore:posterior. covariances between layers are left out")
@pytest.mark.parametrize("form", ["full", "diag"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_goes_through(kind, form):
    model, x = network(), torch.randn(2, 4)
    part, weights = Middle(model), kinds(model)[kind]
    options = {"activations": "tangent"}
    mean, variance = PartMoments(model, weights, form, **options)(part, x)
    want = propagate(part, weights.bind(model).restricted(NEW), x, covariance=form, **options)
    torch.testing.assert_close(mean, want.mean)
    torch.testing.assert_close(variance, want.variance)
    assert variance.gt(0).all()


def test_a_joint_law_across_layers_keeps_what_it_says_of_the_part():
    model, x = network(), torch.randn(2, 4)
    part, weights = Middle(model), kinds(model)["columns"].scaled(1e-6)  # where the tangent is all there is
    with torch.no_grad():
        _, variance = PartMoments(model, weights, "lowrank", activations="tangent")(part, x)
        jacobians = torch.func.jacrev(lambda given: torch.func.functional_call(part, given, (x,)))(
            {name: value.detach() for name, value in part.named_parameters() if name in NEW.values()}
        )
    flat = torch.cat([jacobians[name].flatten(2) for name in NEW.values()], -1)
    covariance = dense_covariance(weights.bind(model), list(NEW))
    torch.testing.assert_close(variance, torch.einsum("bki,ij,bkj->bk", flat, covariance, flat), rtol=1e-4, atol=0)


def test_a_wrapped_model_and_part():
    model, x = encoder(), torch.randn(2, LENGTH, WIDTH)
    variances = relative_variances(model, 0.1)
    want = PartMoments(model, from_variances(variances))(model.layers[1], x)
    named = from_variances({f"module.{name}": value for name, value in variances.items()})
    found = PartMoments(nn.DataParallel(model), named)(nn.DataParallel(model.layers[1]), x)
    torch.testing.assert_close(found, want)


# Sources of variance without uncertain weights


class Noisy(nn.Module):
    """Adds a variance of its own."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x

    def propagate_moments(self, state, walk):
        return walk.independent(state, self.scale.square().expand_as(state.mean))


class Perceptron(nn.Module):
    """With such a module in the middle of a forward of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.noise, self.down = nn.Linear(3, 6), Noisy(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.down(self.noise(self.up(x)) + 1.0)


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("kind", ["layers", "followed"])
def test_an_empty_posterior_and_a_source(kind, form, dtype):
    model = Perceptron().to(dtype).eval()
    network = model if kind == "followed" else nn.Sequential(model.up, model.noise, model.down).eval()
    x = torch.randn(4, 3, dtype=dtype)
    with torch.no_grad():
        want = (model.noise.scale.square() * model.down.weight.square()).sum(-1).expand(4, 2)
        draws = {"num_tangents": 20_000} if form == "lowrank" else {}  # the noise of a source is drawn there
        close = {"rtol": 0.05, "atol": 0.0} if draws else {}
        found = propagate(network, from_variances({}), x, covariance=form, **draws)
        torch.testing.assert_close(found.variance, want, **close)
        torch.testing.assert_close(found.mean, network(x))
        mean, variance = PartMoments(network, from_variances({}), form, **draws)(network, x)
    torch.testing.assert_close(mean, found.mean)
    torch.testing.assert_close(variance, want, **close)


@pytest.mark.parametrize("form", ["full", "lowrank"])
def test_what_layers_make_of_the_noise_of_a_source_covaries(form):
    """Two layers that mix it: with the noise on a diagonal alone, the second would take entries as independent."""
    first, last = nn.Linear(6, 6).double(), nn.Linear(6, 2).double()
    noise = Noisy(6).double()
    with torch.no_grad():
        first.weight.add_(1.0)
        network = nn.Sequential(noise, first, last).eval()
        found = propagate(network, from_variances({}), torch.randn(3, 6).double(), covariance=form, num_tangents=20_000)
        root = last.weight @ first.weight * noise.scale
    torch.testing.assert_close(found.covariance.to_dense()[0], root @ root.mT, rtol=0.06, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_posterior_and_attention_as_a_gaussian_process(form):
    layer = SGPATransformerEncoderLayer(WIDTH, 2, dim_feedforward=8, num_inducing=3, batch_first=True).eval()
    x = torch.randn(2, LENGTH, WIDTH)
    found = propagate(layer, from_variances({}), x, covariance=form)
    assert found.variance.gt(0).all() and found.variance.shape == x.shape
    moments = PartMoments(nn.ModuleList([layer]), from_variances({}), form)
    torch.testing.assert_close(moments(layer, x)[1], found.variance, rtol=0.5 if form == "lowrank" else 1e-6, atol=1e-9)


# Mistakes


def test_what_cannot_be():
    model, x = encoder(), torch.randn(2, LENGTH, WIDTH)
    weights = posterior(model, 0.1)
    with pytest.raises(TypeError, match=r"options: expected some of .*, got noise"):
        PartMoments(model, weights, noise=1.0)
    with pytest.raises(ValueError, match="covariance: expected one of"):
        PartMoments(model, weights, "everything")
    with pytest.raises(TypeError, match="generator: expected"):
        PartMoments(model, weights, generator=3)
    with pytest.raises(ValueError, match="posterior: expected names of parameters"):
        PartMoments(model.layers[0], weights)
    moments = PartMoments(model, weights)
    assert repr(moments) == "PartMoments(TransformerEncoder, 36 uncertain, covariance='diag')"
    with pytest.raises(TypeError, match=r"part: expected a torch.nn.Module, got function"):
        moments(lambda x: x, x)
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        moments(model.layers[0], torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got dict"):
        moments(model.layers[0], {"x": x})
    with pytest.raises(TypeError, match="x: expected the dtype of the weights"):
        moments(model.layers[0], x.float())
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        moments(model.layers[0], x / 0)
    with pytest.raises(ValueError, match="is it a copy"):
        moments(copy.deepcopy(model.layers[0]), x)
    model.layers[0].train()
    with pytest.raises(ValueError, match="in eval mode"):
        moments(model.layers[0], x)


# Several uncertain tensors for one module


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x, residual, scale=1.0):
        return self.norm(scale * self.weight(x) + residual)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.joined = nn.Linear(4, 4), Joined()

    def forward(self, x):
        x = self.first(x)
        return x + self.joined(torch.tanh(x), residual=x, scale=0.5)


def test_modules_with_several_uncertain_arguments_are_exact_in_the_full_form():
    model, x = Outer().eval(), torch.randn(2, 3, 4)
    weights = posterior(model, 0.1).scaled(1e-6)
    with torch.no_grad():
        found = propagate(model, weights, x, covariance="full", activations="tangent")
        want = linearised(model, weights, x, method="exact")
        torch.testing.assert_close(found.mean, model(x))
    torch.testing.assert_close(found.covariance.to_dense(), want.covariance.to_dense(), rtol=1e-5, atol=0)
