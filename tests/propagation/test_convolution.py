"""Convolutions equal the matrices that they are; pools and padding are linear, and exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpseq.propagation import from_columns, from_covariance, from_factors, from_variances, propagate
from gpseq.propagation.laws import KroneckerLaplace
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.posteriors import WeightPosterior
from gpseq.propagation.rules.convolution import Convolution
from tests.oracles_propagation import enumerate_moments, monte_carlo, posterior, relative_variances
from tests.oracles_states import carried, dense, jacobian, keep, random_state, seeded, walk_of, weight_jacobian

FORMS = ["diag", "lowrank", "full"]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    "one_by_one": (lambda: nn.Conv1d(2, 3, 1, bias=False), (2, 3)),
    "stride": (lambda: nn.Conv1d(2, 2, 3, stride=2, padding=1), (2, 6)),
    "dilation": (lambda: nn.Conv1d(1, 2, 2, dilation=3, padding=2), (1, 5)),
    "same": (lambda: nn.Conv1d(2, 2, 4, padding="same"), (2, 5)),
    "valid": (lambda: nn.Conv1d(2, 2, 3, padding="valid"), (2, 5)),
    "groups": (lambda: nn.Conv1d(4, 6, 2, groups=2, padding=1), (4, 3)),
    "depthwise": (lambda: nn.Conv1d(3, 3, 2, groups=3, bias=False), (3, 3)),
    "circular": (lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4)),
    "wide_circular": (lambda: nn.Conv1d(1, 2, 5, padding=2, padding_mode="circular"), (1, 3)),
    "reflect": (lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 3)),
    "replicate": (lambda: nn.Conv1d(2, 2, 4, padding="same", padding_mode="replicate"), (2, 4)),
    "two": (lambda: nn.Conv2d(2, 2, (2, 3), stride=(1, 2), padding=(1, 0)), (2, 2, 4)),
    "two_groups": (lambda: nn.Conv2d(2, 4, 2, groups=2, dilation=(1, 2)), (2, 2, 3)),
    "two_reflect": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 3, 3)),
    "two_same": (lambda: nn.Conv2d(1, 2, (2, 3), padding="same", padding_mode="circular", groups=1), (1, 3, 2)),
    "three": (lambda: nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 0)), (1, 2, 2, 3)),
}


def convolution(name):
    made, event = CONVOLUTIONS[name]
    module = made().double()
    for number, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, generator=seeded(number))
    return module, event


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def laws(module):
    """Name: a posterior of weight and bias, and its covariance over both."""
    parameters = dict(module.named_parameters())
    names, sizes = list(parameters), [value.numel() for value in parameters.values()]
    shapes = [(value.shape[0], value.numel() // value.shape[0]) for value in parameters.values()]
    variances = {name: normal(*value.shape, seed=3).square() for name, value in parameters.items()}
    roots = [(normal(rows, rows, seed=4), normal(columns, columns, seed=5)) for rows, columns in shapes]
    factors = {name: (left @ left.mT, right @ right.mT) for name, (left, right) in zip(names, roots, strict=True)}
    columns = {name: normal(2, *value.shape, seed=6) for name, value in parameters.items()}
    root = normal(sum(sizes), sum(sizes), seed=7)
    flat = torch.cat([columns[name].flatten(1) for name in names], 1)
    own = torch.cat([variances[name].flatten() for name in names])
    bases = [tuple(torch.linalg.qr(normal(size, size, seed=8)).Q for size in shape) for shape in shapes]
    laplace = {
        name: KroneckerLaplace(
            left, left.diagonal().square(), right, right.diagonal().square(), torch.tensor(0.8).double()
        )
        for name, (left, right) in zip(names, bases, strict=True)
    }
    inverses = [
        torch.linalg.inv(
            torch.kron(
                law.output_vectors * law.output_values @ law.output_vectors.mT,
                law.input_vectors * law.input_values @ law.input_vectors.mT,
            )
            + 0.8 * torch.eye(size, dtype=torch.float64)
        )
        for law, size in zip(laplace.values(), sizes, strict=True)
    ]
    return {
        "variances": (from_variances(variances), own.diag()),
        "factors": (from_factors(factors), torch.block_diag(*[torch.kron(*factors[name]) for name in names])),
        "columns": (from_columns(columns, variances), flat.mT @ flat + own.diag()),
        "covariance": (from_covariance(names, root @ root.mT), root @ root.mT),
        "laplace": (WeightPosterior(laplace), torch.block_diag(*inverses)),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_states_go_through_the_matrix_that_a_convolution_is(name, form):
    module, event = convolution(name)
    state = random_state(form, 2, event, seeded())
    found = walk_of(module, form)(module, state)
    torch.testing.assert_close(found.mean, module(state.mean))
    torch.testing.assert_close(dense(found), carried(state, module, form))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_are_what_a_convolution_sees(name):
    module, event = convolution(name)
    x = normal(2, *event)
    shape = Convolution.of(module)
    kernel = module.weight.flatten(1).unflatten(0, (shape.groups, -1))
    found = torch.einsum("bpgd,gkd->bgkp", shape.patches(x), kernel).flatten(1, 2)
    expected = shape(x, module.weight)
    torch.testing.assert_close(found, expected.flatten(2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("law", ["variances", "factors", "columns", "covariance", "laplace"])
@pytest.mark.parametrize("name", ["plain", "groups", "depthwise", "reflect", "two", "two_groups", "one_by_one"])
def test_noise_of_weights_is_the_same_at_all_positions(name, law, form):
    """For certain inputs, exactly that of the Jacobian in the weights."""
    module, event = convolution(name)
    weights, covariance = laws(module)[law]
    x = normal(2, *event)
    found = walk_of(module, form, weights)(module, GaussianState(x))
    torch.testing.assert_close(found.mean, module(x))
    jacobians = weight_jacobian(module, weights.names, x)
    expected = jacobians @ covariance @ jacobians.mT
    torch.testing.assert_close(found.variance.flatten(1), expected.diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=1e-6)
    if form != "lowrank":
        torch.testing.assert_close(dense(found), keep(form, expected, None), rtol=1e-6, atol=1e-6)


def second_moment_noise(module, covariance, mean, inputs):
    """Covariance of the noise of all weights for uncertain inputs, from the Jacobian's linear dependence on them."""
    names = [name for name, _ in module.named_parameters()]
    zero = weight_jacobian(module, names, torch.zeros_like(mean))[0]
    units = torch.eye(mean[0].numel(), dtype=mean.dtype).view(-1, *mean.shape[1:])
    slopes = weight_jacobian(module, names, units) - zero  # (N, E, n)
    first = weight_jacobian(module, names, mean)
    return first @ covariance @ first.mT + torch.einsum("bij,ian,nm,jcm->bac", inputs, slopes, covariance, slopes)


@pytest.mark.parametrize("form", ["diag", "full"])
@pytest.mark.parametrize("law", ["variances", "factors", "columns", "covariance", "laplace"])
@pytest.mark.parametrize("name", ["plain", "groups", "depthwise", "two_groups", "same"])
def test_uncertain_inputs_meet_uncertain_weights(name, law, form):
    module, event = convolution(name)
    weights, covariance = laws(module)[law]
    state = random_state(form, 2, event, seeded())
    found = walk_of(module, form, weights)(module, state)
    jacobians = jacobian(module, state.mean)
    expected = jacobians @ dense(state) @ jacobians.mT + second_moment_noise(
        module, covariance, state.mean, dense(state)
    )
    torch.testing.assert_close(dense(found), keep(form, expected, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["circular", "reflect", "replicate", "two_reflect"])
def test_padding_that_repeats_is_exact_for_independent_weights(name):
    module, event = convolution(name)
    weights, covariance = laws(module)["variances"]
    for form in ("diag", "full"):
        state = random_state(form, 2, event, seeded())
        found = walk_of(module, form, weights)(module, state)
        jacobians = jacobian(module, state.mean)
        noise = second_moment_noise(module, covariance, state.mean, dense(state))
        expected = jacobians @ dense(state) @ jacobians.mT + noise
        torch.testing.assert_close(dense(found), keep(form, expected, None))


@pytest.mark.parametrize("law", ["variances", "factors"])
@pytest.mark.parametrize("name", ["plain", "groups"])
def test_products_in_a_low_rank_are_independent_variances(name, law):
    module, event = convolution(name)
    weights, covariance = laws(module)[law]
    state = random_state("lowrank", 2, event, seeded(), rank=8)
    one = walk_of(module, "lowrank", weights)(module, state)
    other = walk_of(module, "lowrank", weights, products=False)(module, state)
    torch.testing.assert_close(one.covariance.columns, other.covariance.columns)
    second = second_moment_noise(
        module, covariance, torch.zeros_like(state.mean), torch.diag_embed(state.variance.flatten(1))
    )
    bias = second_moment_noise(
        module,
        covariance,
        torch.zeros_like(state.mean),
        torch.zeros_like(second[:, :1, :1]).expand(2, state.mean[0].numel(), state.mean[0].numel()),
    )
    expected = (second - bias).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close((one.covariance.entries - other.covariance.entries).flatten(1), expected)


@pytest.mark.parametrize("name", ["plain", "groups", "two"])
def test_draws_of_kernels_have_their_covariance(name):
    module, event = convolution(name)
    x = normal(2, *event)
    for law in ("variances", "covariance"):
        weights, covariance = laws(module)[law]
        found = walk_of(module, "lowrank", weights, num_draws=20_000)(module, GaussianState(x))
        jacobians = weight_jacobian(module, weights.names, x)
        expected = jacobians @ covariance @ jacobians.mT
        assert (dense(found) - expected).norm() / expected.norm() < 0.03


def test_columns_are_exact_in_a_low_rank():
    module, event = convolution("groups")
    columns = {name: normal(2, *value.shape, seed=6) for name, value in module.named_parameters()}
    x = normal(2, *event)
    found = walk_of(module, "lowrank", from_columns(columns))(module, GaussianState(x))
    flat = torch.cat([value.flatten(1) for value in columns.values()], 1)
    moved = weight_jacobian(module, list(columns), x) @ flat.mT
    torch.testing.assert_close(dense(found), moved @ moved.mT)


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_as_wide_as_its_input_is_a_matrix(form):
    """One position: what nn.Linear does with the flat input."""
    module = nn.Conv2d(2, 3, (2, 3)).double()
    matrix = nn.Linear(12, 3).double()
    matrix.weight.data.copy_(module.weight.flatten(1))
    matrix.bias.data.copy_(module.bias)
    root, out = normal(12, 12), normal(3, 3, seed=1)
    factors = {"weight": (out @ out.mT, root @ root.mT), "bias": (out @ out.mT, torch.ones(1, 1).double())}
    for weights in (from_factors(factors), from_variances({"bias": torch.ones(3).double()})):
        state = random_state(form, 2, (2, 2, 3), seeded(), rank=8)
        found = walk_of(module, form, weights)(module, state)
        expected = walk_of(matrix, form, weights)(matrix, state.move(lambda x: x.flatten(1)))
        torch.testing.assert_close(found.mean.flatten(1), expected.mean)
        torch.testing.assert_close(dense(found), dense(expected))


def test_two_convolutions_are_exact():
    """Kernels between linear maps: all weight patterns, one after the other."""
    network = nn.Sequential(
        nn.Conv1d(1, 2, 2, padding=1, bias=False),
        nn.AvgPool1d(2),
        nn.Conv1d(2, 1, 2, padding=1, bias=False),
        nn.Flatten(),
    ).double()
    for number, parameter in enumerate(network.parameters()):
        nn.init.normal_(parameter, generator=seeded(number))
    variances = {name: normal(*value.shape, seed=5).square() for name, value in network.named_parameters()}
    x = normal(2, 1, 3)
    mean, covariance = enumerate_moments(network, {name: value.sqrt() for name, value in variances.items()}, x)
    found = propagate(network, from_variances(variances), x, covariance="full")
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance.to_dense(), covariance, rtol=1e-12, atol=1e-12)


def network():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="replicate"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    for number, parameter in enumerate(model.parameters()):
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
        nn.init.normal_(parameter, std=scale, generator=seeded(number))
    model[1].running_var.fill_(0.7)
    return model.double().eval()


def test_a_convolutional_network_is_that_of_its_weights():
    model, x = network(), normal(2, 1, 7, 7)
    mean, covariance = monte_carlo(model, relative_variances(model, 0.1), x, 20_000, seeded(1))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    for form, tolerance in (("full", 0.04), ("lowrank", 0.15)):
        found = propagate(model, posterior(model, 0.1), x, covariance=form, num_tangents=256, generator=seeded(2))
        ratio = (found.variance / variance).sqrt()
        assert ((found.mean - mean).abs() / variance.sqrt()).max() < 0.06
        assert (ratio - 1).abs().max() < tolerance, (form, ratio)


def test_no_uncertainty_is_the_plain_network():
    model, x = network(), normal(2, 1, 7, 7)
    nothing = from_variances({name: torch.zeros_like(value) for name, value in model.named_parameters()})
    for form in FORMS:
        found = propagate(model, nothing, x, covariance=form, activations="tangent")
        torch.testing.assert_close(found.mean, model(x), rtol=1e-12, atol=1e-12)
        assert (found.variance == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_chunks_and_dtypes_agree(form):
    model, x = network(), normal(3, 1, 7, 7)
    whole = propagate(model, posterior(model, 0.1), x, covariance=form, generator=seeded())
    parts = propagate(model, posterior(model, 0.1), x, covariance=form, generator=seeded(), chunk_size=2)
    torch.testing.assert_close(whole.covariance.to_dense(), parts.covariance.to_dense())
    single = network().float()
    low = propagate(single, posterior(single, 0.1), x.float(), covariance=form, generator=seeded())
    assert low.mean.dtype == low.variance.dtype == torch.float32
    torch.testing.assert_close(low.mean.double(), whole.mean, rtol=1e-4, atol=1e-4)
    if form != "lowrank":
        torch.testing.assert_close(low.variance.double(), whole.variance, rtol=1e-3, atol=1e-5)


def test_blocks_do_not_follow_convolutions():
    module, event = convolution("plain")
    weights, _ = laws(module)["variances"]
    with pytest.raises(
        ValueError, match="covariance: blocks of tokens cannot follow convolutions, got the model itself"
    ):
        walk_of(module, "blockdiag", weights)(module, GaussianState(normal(2, *event)))
    # but a certain one runs as it is
    assert walk_of(module, "blockdiag")(module, GaussianState(normal(2, *event))).is_certain


LINEAR = {
    "average": (nn.AvgPool1d(2), (2, 5)),
    "average_padded": (nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True), (2, 6)),
    "average_two": (nn.AvgPool2d((2, 3), stride=1, padding=(1, 0), count_include_pad=False), (2, 3, 4)),
    "average_divisor": (nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    "adaptive": (nn.AdaptiveAvgPool1d(3), (2, 7)),
    "adaptive_two": (nn.AdaptiveAvgPool2d((2, None)), (2, 3, 4)),
    "adaptive_one": (nn.AdaptiveAvgPool2d(1), (2, 3, 3)),
    "maximum": (nn.MaxPool1d(2, ceil_mode=True), (2, 5)),
    "maximum_two": (nn.MaxPool2d(3, stride=2, padding=1), (2, 4, 3)),
    "maximum_dilated": (nn.MaxPool2d(2, stride=1, dilation=2), (1, 4, 4)),
    "adaptive_maximum": (nn.AdaptiveMaxPool1d(2), (2, 5)),
    "adaptive_maximum_two": (nn.AdaptiveMaxPool2d((2, 1)), (2, 3, 4)),
    "zeros": (nn.ZeroPad2d((1, 0, 2, 1)), (2, 2, 2)),
    "constant": (nn.ConstantPad1d((1, 2), 3.5), (2, 3)),
    "reflection": (nn.ReflectionPad1d(1), (2, 3)),
    "replication": (nn.ReplicationPad2d(1), (1, 2, 2)),
    "circular": (nn.CircularPad1d((1, 0)), (2, 3)),
    "nearest": (nn.Upsample(scale_factor=2), (2, 2, 2)),
    "nearest_size": (nn.Upsample(size=5), (2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LINEAR)
def test_pools_and_padding_are_their_jacobian(name, form, dtype):
    module, event = LINEAR[name]
    state = random_state(form, 2, event, seeded(), dtype)
    found = walk_of(module, form)(module, state)
    assert found.mean.dtype == dense(found).dtype == dtype
    torch.testing.assert_close(found.mean, module(state.mean))
    torch.testing.assert_close(dense(found), carried(state, module, form))


def test_maxima_are_taken_where_each_element_has_them():
    state = GaussianState(
        torch.tensor([[[1.0, 5.0]], [[7.0, 2.0]]]), random_state("diag", 2, (1, 2), seeded(), torch.float32).covariance
    )
    found = walk_of(nn.MaxPool1d(2), "diag")(nn.MaxPool1d(2), state)
    assert found.mean.flatten().tolist() == [5.0, 7.0]
    assert found.variance.flatten().tolist() == [state.variance[0, 0, 1].item(), state.variance[1, 0, 0].item()]


def test_what_has_no_rule():
    module = nn.Upsample(scale_factor=2, mode="bilinear")
    with pytest.raises(NotImplementedError, match="no rule for the model itself, a Upsample"):
        walk_of(module, "diag")(module, random_state("diag", 2, (1, 2, 2), seeded(), torch.float32))
    for pool in (nn.AvgPool1d(2), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(2), nn.ZeroPad1d(1)):
        with pytest.raises(ValueError, match="covariance: blocks of tokens cannot follow this map"):
            walk_of(pool, "blockdiag")(pool, random_state("blockdiag", 2, (2, 4), seeded()))


@given(
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    groups=st.sampled_from([1, 2]),
    length=st.integers(5, 7),
)
def test_any_convolution_is_its_jacobian(size, stride, dilation, padding, mode, groups, length):
    module = nn.Conv1d(
        2, 2, size, stride=stride, dilation=dilation, padding=padding, padding_mode=mode, groups=groups
    ).double()
    state = random_state("diag", 1, (2, length), seeded())
    found = walk_of(module, "diag")(module, state)
    torch.testing.assert_close(dense(found), carried(state, module, "diag"))
    assert found.variance.isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form):
    model, x = network(), normal(2, 1, 7, 7)
    expected = propagate(model, posterior(model, 0.1), x, covariance=form, generator=seeded())
    there = network().to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    found = propagate(there, posterior(there, 0.1), x.to("cuda"), covariance=form, generator=generator)
    assert found.mean.device.type == "cuda"
    torch.testing.assert_close(found.mean.cpu(), expected.mean, rtol=1e-6, atol=0.1 if form == "lowrank" else 1e-8)
    if form != "lowrank":  # whose draws are the device's own
        torch.testing.assert_close(found.variance.cpu(), expected.variance, rtol=1e-6, atol=1e-8)
