"""Perceptrons: linear ones are exact, others agree with many draws of their weights; dropout and reshaping."""

import itertools

import pytest
import torch
from torch import nn

from gpseq.propagation import from_columns, from_covariance, from_factors, from_variances, propagate
from gpseq.propagation.moments import FORMS, GaussianState
from tests.oracles_propagation import entries, enumerate_moments, monte_carlo, posterior, relative_variances
from tests.oracles_states import all_patterns, dense, keep, random_state, seeded, walk_of, weight_jacobian

X = torch.tensor([[0.7, -1.1]], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def reference(depth):
    """Up to three matrices whose entries are sines, and variances of any size."""
    matrices = [entries(2, 2, 1.7, 0.0), entries(3, 2, 1.02, 0.3), entries(2, 3, 2.21, 1.0)][:depth]
    network = nn.Sequential(*[nn.Linear(m.shape[1], m.shape[0], bias=False, dtype=torch.float64) for m in matrices])
    for layer, matrix in zip(network, matrices, strict=True):
        layer.weight.data.copy_(matrix)
    variances = {
        name: 0.3 * torch.rand(value.shape, generator=seeded(number), dtype=torch.float64)
        for number, (name, value) in enumerate(network.named_parameters())
    }
    return network.eval(), variances


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_linear_networks_are_exact(depth):
    network, variances = reference(depth)
    x = torch.cat([X, normal(2, 2)])
    mean, covariance = all_patterns(network, {name: value.sqrt() for name, value in variances.items()}, x)
    found = propagate(network, from_variances(variances), x, covariance="full")
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance.to_dense(), covariance, rtol=1e-12, atol=1e-12)


def test_the_reference():
    network, variances = reference(3)
    expected = torch.tensor([[-1.5947082728, -1.3968059625]], dtype=torch.float64)
    for form in FORMS:
        found = propagate(network, from_variances(variances), X, covariance=form)
        torch.testing.assert_close(found.mean, expected, rtol=0.0, atol=5e-11)


def test_biases_are_exact():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    variances = {name: normal(*value.shape, seed=3).square() for name, value in network.named_parameters()}
    mean, covariance = enumerate_moments(network, {name: value.sqrt() for name, value in variances.items()}, X)
    found = propagate(network, from_variances(variances), X, covariance="full")
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance.to_dense(), covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_marginals_are_exact_up_to_two_layers(depth):
    """From the third on features are correlated, which variances alone do not know."""
    network, variances = reference(depth)
    x = torch.cat([X, normal(2, 2)])
    full = propagate(network, from_variances(variances), x, covariance="full").variance
    diagonal = propagate(network, from_variances(variances), x, covariance="diag").variance
    blocks = propagate(network, from_variances(variances), x, covariance="blockdiag").variance
    torch.testing.assert_close(blocks, full, rtol=1e-12, atol=1e-12)
    if depth < 3:
        torch.testing.assert_close(diagonal, full, rtol=1e-12, atol=1e-12)
    else:
        assert ((diagonal / full).sqrt() - 1).abs().max() > 0.01


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_low_rank_becomes_full(depth):
    network, variances = reference(depth)
    full = propagate(network, from_variances(variances), X, covariance="full").covariance.to_dense()
    found = propagate(
        network, from_variances(variances), X, covariance="lowrank", num_tangents=20_000, generator=seeded()
    ).covariance.to_dense()
    if depth == 1:  # marginals are exact where noise comes in
        torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), full.diagonal(dim1=-2, dim2=-1))
    # what products of noise make between features is left out: second order
    tolerance = {1: 0.02, 2: 0.05, 3: 0.2}[depth]
    assert (found - full).norm() / full.norm() < tolerance


def perceptron(activation):
    """Nothing is left to torch's own seeds."""
    network = nn.Sequential(nn.Linear(4, 12), activation, nn.Linear(12, 12), activation, nn.Linear(12, 3)).double()
    for number, parameter in enumerate(network.parameters()):
        nn.init.normal_(
            parameter, std=(parameter[0].numel() if parameter.dim() > 1 else 4) ** -0.5, generator=seeded(number)
        )
    return network.eval()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.SiLU()])
def test_perceptrons_are_those_of_their_weights(activation):
    network, x = perceptron(activation), normal(6, 4)
    mean, covariance = monte_carlo(network, relative_variances(network, 0.3), x, 30_000, seeded(1))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    for form, each, all_ in (
        ("full", 0.03, 0.01),
        ("blockdiag", 0.03, 0.01),
        ("diag", 0.25, 0.05),
        ("lowrank", 0.25, 0.05),
    ):
        found = propagate(network, posterior(network, 0.3), x, covariance=form, num_tangents=256, generator=seeded(2))
        ratio = (found.variance / variance).sqrt()
        assert (ratio - 1).abs().max() < each, (form, ratio)
        assert abs(ratio.mean() - 1) < all_, (form, ratio.mean())
        # the mean needs the variance, which full has
        assert ((found.mean - mean).abs() / variance.sqrt()).max() < (0.03 if form in ("full", "blockdiag") else 0.1)


def test_one_hidden_layer_has_exact_marginals():
    """Its units are independent, as weights of a mean field are."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = normal(5, 4)
    found = {
        form: propagate(network, posterior(network, 0.5), x, covariance=form) for form in ("diag", "blockdiag", "full")
    }
    for one in found.values():
        torch.testing.assert_close(one.mean, found["full"].mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.variance, found["full"].variance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_no_uncertainty_is_the_plain_network(form):
    network, x = perceptron(nn.GELU()), normal(6, 4)
    nothing = from_variances({name: torch.zeros_like(value) for name, value in network.named_parameters()})
    found = propagate(network, nothing, x, covariance=form, activations="tangent")
    torch.testing.assert_close(found.mean, network(x), rtol=1e-14, atol=1e-14)
    assert (found.variance == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("law", ["variances", "factors", "covariance", "columns"])
def test_tokens_share_the_noise_of_their_weights(law, form):
    """For certain tokens, exactly that of the Jacobian in the weights."""
    module, x = nn.Linear(3, 2).double(), normal(2, 4, 3)
    left, right, bias, root = normal(2, 2, seed=1), normal(3, 3, seed=2), normal(2, 2, seed=3), normal(8, 8, seed=4)
    columns = {"weight": normal(2, 2, 3, seed=5), "bias": normal(2, 2, seed=6)}
    variances = {"weight": normal(2, 3, seed=7).square(), "bias": normal(2, seed=8).square()}
    flat = torch.cat([value.flatten(1) for value in columns.values()], 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    weights, covariance = {
        "variances": (from_variances(variances), torch.cat([value.flatten() for value in variances.values()]).diag()),
        "factors": (
            from_factors({"weight": (left @ left.mT, right @ right.mT), "bias": (bias @ bias.mT, one)}),
            torch.block_diag(torch.kron(left @ left.mT, right @ right.mT), bias @ bias.mT),
        ),
        "covariance": (from_covariance(["weight", "bias"], root @ root.mT), root @ root.mT),
        "columns": (from_columns(columns), flat.mT @ flat),
    }[law]
    found = walk_of(module, form, weights)(module, GaussianState(x))
    jacobians = weight_jacobian(module, ["weight", "bias"], x)
    expected = jacobians @ covariance @ jacobians.mT
    torch.testing.assert_close(found.variance.flatten(1), expected.diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=1e-6)
    if form != "lowrank" or law == "columns":
        torch.testing.assert_close(dense(found), keep(form, expected, 2), rtol=1e-6, atol=1e-6)


def test_means_of_a_posterior_are_taken():
    module, x = nn.Linear(3, 2).double(), normal(2, 3)
    before = module.weight.detach().clone()
    mean = normal(2, 3, seed=1)
    for form in FORMS:
        weights = from_variances({"weight": torch.ones(2, 3, dtype=torch.float64)}, {"weight": mean})
        found = propagate(module, weights, x, covariance=form)
        torch.testing.assert_close(found.mean, x @ mean.mT + module.bias)
    assert torch.equal(module.weight, before)


# Dropout


def dropout_moments(network, deviations, x, rate):
    """All patterns of weights and of the masks of a first layer of dropout."""
    width = x.shape[1]
    mean, second = 0.0, 0.0
    for pattern in itertools.product((0.0, 1.0), repeat=width):
        mask = torch.tensor(pattern, dtype=x.dtype)
        probability = (1 - rate) ** mask.sum() * rate ** (width - mask.sum())
        one, covariance = all_patterns(network, deviations, x * mask / (1 - rate))
        mean = mean + probability * one
        second = second + probability * (covariance + one.unsqueeze(-1) * one.unsqueeze(-2))
    return mean, second - mean.unsqueeze(-1) * mean.unsqueeze(-2)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_a_source_of_variance_if_asked(form):
    network = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2)).double().eval()
    variances = {name: normal(*value.shape, seed=2).square() for name, value in network.named_parameters()}
    x = normal(2, 3)
    mean, covariance = dropout_moments(network[1], {n[2:]: v.sqrt() for n, v in variances.items()}, x, 0.3)
    found = propagate(network, from_variances(variances), x, covariance=form, dropout="variance", num_tangents=20_000)
    torch.testing.assert_close(found.mean, mean)
    close = {"rtol": 0.05, "atol": 0.0} if form == "lowrank" else {}  # the noise of a source is drawn there
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=-2, dim2=-1), **close)
    if form in ("blockdiag", "full"):
        torch.testing.assert_close(found.covariance.to_dense(), covariance, rtol=1e-12, atol=1e-12)
    # alone, too
    _, masks = dropout_moments(network[1], {"bias": torch.zeros(2, dtype=torch.float64)}, x, 0.3)
    alone = propagate(network, from_variances({}), x, covariance=form, dropout="variance", num_tangents=20_000)
    torch.testing.assert_close(alone.variance, masks.diagonal(dim1=-2, dim2=-1), **close)
    assert propagate(network, from_variances({}), x, covariance=form).variance.abs().max() == 0


def test_dropout_of_what_is_uncertain():
    state = random_state("full", 2, (3,), seeded())
    module = nn.Dropout(0.2).eval()
    found = walk_of(module, "full", dropout="variance")(module, state)
    off = dense(state) - torch.diag_embed(state.variance)
    expected = off + torch.diag_embed((state.variance + state.mean.square() * 0.2) / 0.8)
    torch.testing.assert_close(dense(found), expected)
    torch.testing.assert_close(found.mean, state.mean)
    assert walk_of(module, "full")(module, state) is state


@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
def test_dropout_in_eval_is_nothing(kind):
    module, state = kind(0.4).eval(), random_state("diag", 2, (3,), seeded())
    assert walk_of(module, "diag")(module, state) is state
    if kind is not nn.Dropout:
        with pytest.raises(
            NotImplementedError, match=r"dropout: 'variance' is known for nn.Dropout only, got the model"
        ):
            walk_of(module, "diag", dropout="variance")(module, state)
    gone = kind(0.0).eval()
    assert walk_of(gone, "diag", dropout="variance")(gone, state) is state


# Shapes


@pytest.mark.parametrize("form", ["diag", "lowrank", "full"])
@pytest.mark.parametrize(
    "module", [nn.Flatten(), nn.Flatten(2), nn.Flatten(-2), nn.Unflatten(1, (1, 2)), nn.Unflatten(-1, (3, 1))]
)
def test_reshaping(module, form):
    state = random_state(form, 2, (2, 3), seeded())
    found = walk_of(module, form)(module, state)
    torch.testing.assert_close(found.mean, module(state.mean))
    torch.testing.assert_close(found.variance, module(state.variance))
    torch.testing.assert_close(dense(found), dense(state))


def test_blocks_cannot_be_reshaped():
    state = random_state("blockdiag", 2, (2, 4), seeded())
    for module in (nn.Flatten(), nn.Unflatten(-1, (2, 2))):
        with pytest.raises(
            ValueError, match="covariance: blocks of tokens cannot follow entries that are put elsewhere"
        ):
            walk_of(module, "blockdiag")(module, state)
    vector = random_state("blockdiag", 2, (4,), seeded())
    assert walk_of(nn.Flatten(), "blockdiag")(nn.Flatten(), vector) is vector  # nothing to do


def test_the_batch_is_kept():
    for start in (0, -2):
        module = nn.Flatten(start)
        with pytest.raises(ValueError, match="expected the model itself to keep the batch, start_dim=1, got"):
            walk_of(module, "diag")(module, random_state("diag", 2, (3,), seeded()))


@pytest.mark.parametrize("form", ["diag", "lowrank", "full"])
def test_flat_tokens_remember_what_they_share(form):
    """A matrix for each token, flattened, and a matrix for all: exact where the form knows tokens' covariance."""
    network = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    variances = {name: normal(*value.shape, seed=2).square() for name, value in network.named_parameters()}
    x = normal(2, 2, 2)
    mean, covariance = all_patterns(network, {name: value.sqrt() for name, value in variances.items()}, x)
    found = propagate(network, from_variances(variances), x, covariance=form, num_tangents=20_000, generator=seeded())
    torch.testing.assert_close(found.mean, mean)
    if form == "full":
        torch.testing.assert_close(found.covariance.to_dense(), covariance, rtol=1e-12, atol=1e-12)
    if form == "lowrank":
        assert ((found.variance / covariance.diagonal(dim1=-2, dim2=-1)).sqrt() - 1).abs().max() < 0.02


def test_modules_without_parameters_are_the_same_in_any_form(dtype):
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), nn.Identity())).to(dtype)
    for form in FORMS:
        state = random_state(form, 2, (3,), seeded(), dtype)
        found, plain = walk_of(network, form)(network, state), walk_of(nn.ReLU(), form)(nn.ReLU(), state)
        torch.testing.assert_close(dense(found), dense(plain))
        assert found.mean.dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_dtypes_agree(form):
    double, x = perceptron(nn.Tanh()), normal(3, 4)
    single = perceptron(nn.Tanh()).float()
    high = propagate(double, posterior(double, 0.2), x, covariance=form, generator=seeded())
    low = propagate(single, posterior(single, 0.2), x.float(), covariance=form, generator=seeded())
    assert low.mean.dtype == low.variance.dtype == torch.float32
    torch.testing.assert_close(low.mean.double(), high.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low.variance.double(), high.variance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_variances_and_weights(form):
    network, x = perceptron(nn.GELU()), normal(3, 4).requires_grad_()
    variance = torch.full((12, 4), 0.1, dtype=torch.float64, requires_grad=True)
    found = propagate(network, from_variances({"0.weight": variance}), x, covariance=form, generator=seeded())
    found.variance.sum().backward()
    for value in (x, variance, network[0].weight, network[2].weight, network[4].weight):
        assert value.grad.isfinite().all() and value.grad.abs().sum() > 0
