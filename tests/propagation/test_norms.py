"""Norms: forms that are linear in the width are the dense Jacobian; noise of weights is shared by tokens."""

import math

import pytest
import torch
from torch import nn

from gpseq.propagation import from_columns, from_covariance, from_factors, from_variances, propagate
from gpseq.propagation.moments import FORMS, Full, GaussianState, LowRank
from gpseq.propagation.rules.norms import normalise
from tests.oracles_propagation import enumerate_moments
from tests.oracles_states import carried, dense, keep, random_state, seeded, walk_of, weight_jacobian


class LlamaRMSNorm(nn.Module):
    """As Hugging Face's transformers have it, one class a family."""

    def __init__(self, width, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon, self.offset = 1e-3, offset

    def forward(self, x):
        inverse = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (self.offset + self.weight) * (x * inverse)


class OddRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).square()


def norms(dtype=torch.float64):
    """Name: a norm with weights of its own, and the event it takes."""
    made = {
        "layer": (nn.LayerNorm(5, eps=1e-2), (3, 5)),
        "layer_plain": (nn.LayerNorm(5, elementwise_affine=False), (3, 5)),
        "layer_vector": (nn.LayerNorm(5), (5,)),
        "rms": (nn.RMSNorm(5, eps=1e-2), (3, 5)),
        "rms_default": (nn.RMSNorm(5), (3, 5)),
        "llama": (LlamaRMSNorm(5), (3, 5)),
        "gemma": (LlamaRMSNorm(5, offset=1.0), (3, 5)),
        "group_vector": (nn.GroupNorm(2, 6, eps=1e-2), (6,)),
        "instance": (nn.InstanceNorm1d(3, eps=1e-2, affine=True), (3, 4)),
        "batch": (nn.BatchNorm1d(5, eps=1e-2), (5,)),
        "batch_plain": (nn.BatchNorm1d(5, affine=False), (5,)),
    }
    mixing = {
        "layer_two": (nn.LayerNorm((3, 5), eps=1e-2), (3, 5)),
        "group": (nn.GroupNorm(2, 4, eps=1e-2), (4, 3)),
        "group_two": (nn.GroupNorm(3, 6), (6, 2, 2)),
        "instance_two": (nn.InstanceNorm2d(2, affine=True), (2, 2, 3)),
    }
    channels = {
        "batch_positions": (nn.BatchNorm1d(3), (3, 4)),
        "batch_two": (nn.BatchNorm2d(2), (2, 2, 3)),
        "batch_three": (nn.BatchNorm3d(2), (2, 1, 2, 2)),
        "instance_tracked": (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (3, 4)),
    }
    generator = torch.Generator().manual_seed(1)
    for module, _ in (*made.values(), *mixing.values(), *channels.values()):
        module.to(dtype).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, generator=generator)
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return made, mixing, channels


MADE, MIXING, CHANNELS = norms()
ALL = {**MADE, **MIXING, **CHANNELS}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_norms_are_their_jacobian(name, form):
    module, event = ALL[name]
    state = random_state(form, 2, event, seeded())
    walk = walk_of(module, form)
    if form == "blockdiag" and name in MIXING:
        with pytest.raises(ValueError, match="covariance: blocks of tokens"):
            walk(module, state)
        return
    found = walk(module, state)
    torch.testing.assert_close(found.mean, module(state.mean), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(found), carried(state, module, form, event[-1]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["layer", "rms", "llama", "group", "instance"])
def test_frozen_norms_are_constant_factors(name):
    module, event = ALL[name]
    state = random_state("full", 2, event, seeded())
    found = walk_of(module, "full", layer_norm="frozen")(module, state)
    # one factor an entry: the Jacobian is diagonal, and tells the deviation from the module's output
    gain = (found.variance / state.variance).sqrt()
    expected = gain.flatten(1).unsqueeze(-1) * dense(state).abs() * gain.flatten(1).unsqueeze(-2)
    torch.testing.assert_close(found.mean, module(state.mean))
    torch.testing.assert_close(dense(found).abs(), expected)


def test_a_common_shift_is_nothing_to_a_layer_norm():
    module = nn.LayerNorm(6).double()
    mean = torch.randn(2, 6, generator=seeded(), dtype=torch.float64)
    shift = GaussianState(mean, Full(torch.ones(2, 6, 6, dtype=torch.float64), (6,)))
    assert dense(walk_of(module, "full")(module, shift)).abs().max() < 1e-15
    columns = LowRank(torch.ones(1, 2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))
    assert walk_of(module, "lowrank")(module, GaussianState(mean, columns)).variance.abs().max() < 1e-15
    # which the published rule keeps
    assert walk_of(module, "full", layer_norm="frozen")(module, shift).variance.min() > 0.1


def test_eps_is_the_modules_own():
    mean = 0.01 * torch.randn(1, 6, generator=seeded(), dtype=torch.float64)
    state = GaussianState(mean, Full(torch.eye(6, dtype=torch.float64).unsqueeze(0), (6,)))
    for kind in (nn.LayerNorm, nn.RMSNorm):
        for eps in (1e-12, 1e-5, 1.0):
            module = kind(6, eps=eps).double()
            found = walk_of(module, "full")(module, state)
            torch.testing.assert_close(dense(found), carried(state, module, "full"))
    module = nn.RMSNorm(6).double()  # none of its own: that of the dtype
    torch.testing.assert_close(dense(walk_of(module, "full")(module, state)), carried(state, module, "full"))


def test_one_certain_entry_less_than_all_leaves_no_negative_variance(dtype):
    module = nn.LayerNorm(2).to(dtype)
    state = random_state("diag", 50, (2,), seeded(), dtype)
    state = GaussianState(state.mean * 1e3, state.covariance.scale(torch.tensor([1e3, 0.0], dtype=dtype)))
    assert (walk_of(module, "diag")(module, state).variance >= 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dim", "length"), [(-1, 1.0), (2, 1.0), (-2, 1.0), (-1, 1e-15)])
def test_vectors_of_length_one(dim, length, form):
    state = random_state(form, 2, (3, 4), seeded())
    state = GaussianState(state.mean * length, state.covariance)
    walk = walk_of(nn.Identity(), form)
    if form == "blockdiag" and dim == -2:
        with pytest.raises(ValueError, match="covariance: blocks of tokens"):
            normalise(state, walk, dim)
        return

    def plain(x):
        return nn.functional.normalize(x, dim=dim)

    found = normalise(state, walk, dim)
    torch.testing.assert_close(found.mean, plain(state.mean))
    scale = max(dense(found).abs().max().item(), 1.0)
    torch.testing.assert_close(dense(found) / scale, carried(state, plain, form, 4) / scale)


def test_vectors_of_no_state():
    state, walk = random_state("diag", 2, (3,), seeded()), walk_of(nn.Identity(), "diag")
    for dim in (0, 2, -2, 5):
        with pytest.raises(ValueError, match="dim: expected a dimension of an event"):
            normalise(state, walk, dim)
    with pytest.raises(ValueError, match="eps: expected a number that is not negative"):
        normalise(state, walk, eps=-1.0)


def laws(module, seed=0):
    """Name: a posterior of weight and bias, and its covariance over both."""
    generator = seeded(seed)
    names = [name for name, _ in module.named_parameters()]
    sizes = [parameter.numel() for parameter in module.parameters()]
    total = sum(sizes)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    variances = {name: normal(size).square() for name, size in zip(names, sizes, strict=True)}
    shaped = {name: value.view_as(module.get_parameter(name)) for name, value in variances.items()}
    roots = [normal(size, size) for size in sizes]
    factors = {
        name: (root @ root.mT, torch.ones(1, 1, dtype=torch.float64)) for name, root in zip(names, roots, strict=True)
    }
    columns = {name: normal(2, size) for name, size in zip(names, sizes, strict=True)}
    root = normal(total, total)
    flat = torch.cat([columns[name] for name in names], 1)
    one = normal(sizes[0], sizes[0])
    return {
        "variances": (from_variances(shaped), torch.cat(list(variances.values())).diag()),
        "factors": (from_factors(factors), torch.block_diag(*[root @ root.mT for root in roots])),
        "columns": (from_columns({n: c.view(2, *module.get_parameter(n).shape) for n, c in columns.items()}), flat),
        "covariance": (from_covariance(names, root @ root.mT), root @ root.mT),
        "weight": (from_covariance(names[:1], one @ one.mT), torch.block_diag(one @ one.mT, torch.zeros(1, 1))),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["layer", "rms", "llama", "gemma", "group", "batch_two", "batch", "instance_two"])
@pytest.mark.parametrize("law", ["variances", "factors", "covariance"])
def test_noise_of_weights_is_shared_by_what_they_scale(law, name, form):
    module, event = ALL[name]
    posterior, covariance = laws(module)[law]
    x = torch.randn(2, *event, generator=seeded(5), dtype=torch.float64)
    found = walk_of(module, form, posterior)(module, GaussianState(x))
    torch.testing.assert_close(found.mean, module(x).detach())
    jacobians = weight_jacobian(module, posterior.names, x)
    expected = jacobians @ covariance @ jacobians.mT
    if form == "lowrank":  # draws, whose marginals are made exact
        torch.testing.assert_close(found.variance.flatten(1), expected.diagonal(dim1=-2, dim2=-1))
        return
    torch.testing.assert_close(dense(found), keep(form, expected, event[-1]))


def test_columns_of_a_joint_law_are_exact_in_a_low_rank():
    module, event = ALL["layer"]
    posterior, columns = laws(module)["columns"]
    x = torch.randn(2, *event, generator=seeded(5), dtype=torch.float64)
    found = walk_of(module, "lowrank", posterior)(module, GaussianState(x))
    moved = weight_jacobian(module, posterior.names, x) @ columns.mT
    torch.testing.assert_close(dense(found), moved @ moved.mT)


def test_a_dense_law_of_one_weight():
    module, event = ALL["rms"]
    posterior, covariance = laws(module)["weight"]
    x = torch.randn(2, *event, generator=seeded(5), dtype=torch.float64)
    jacobians = weight_jacobian(module, ["weight"], x)
    expected = jacobians @ covariance[:5, :5] @ jacobians.mT
    for form in ("diag", "blockdiag", "full"):
        found = walk_of(module, form, posterior)(module, GaussianState(x))
        torch.testing.assert_close(dense(found), keep(form, expected, 5))


def test_draws_of_weights_have_their_covariance():
    module, event = ALL["layer"]
    posterior, covariance = laws(module)["factors"]
    x = torch.randn(2, *event, generator=seeded(5), dtype=torch.float64)
    jacobians = weight_jacobian(module, posterior.names, x)
    expected = jacobians @ covariance @ jacobians.mT
    found = dense(walk_of(module, "lowrank", posterior, num_draws=20_000)(module, GaussianState(x)))
    assert (found - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_an_uncertain_gain_meets_an_uncertain_state(form):
    """Products of independent factors have (mean mean + C) times the gain's covariance, and nothing else."""
    module, event = ALL["layer"]
    variances = {"weight": torch.rand(5, generator=seeded(2), dtype=torch.float64)}
    state = random_state(form, 2, event, seeded(3), rank=8)
    walk = walk_of(module, form, from_variances(variances))
    found = walk.affine(state, module.weight)
    gain = module.weight.detach().expand(3, 5).flatten()
    spread = keep("full", (variances["weight"].diag()).repeat(3, 3), None)
    mean, before = state.mean.flatten(1), dense(state)
    if form == "lowrank":
        noise = found.covariance.columns - state.covariance.columns * gain.view(event)
        torch.testing.assert_close(noise.square().sum(0).flatten(1), spread.diagonal() * mean.square())
        second = spread.diagonal() * state.variance.flatten(1)
        expected = gain.square() * state.covariance.entries.flatten(1) + second
        torch.testing.assert_close(found.covariance.entries.flatten(1), expected)
        return
    noise = spread * (mean.unsqueeze(-1) * mean.unsqueeze(-2) + before)
    expected = gain.unsqueeze(-1) * before * gain.unsqueeze(-2) + keep(form, noise, 5)
    torch.testing.assert_close(dense(found), expected)
    only = walk_of(module, form, from_variances(variances), products=False).affine(state, module.weight)
    first = gain.unsqueeze(-1) * before * gain.unsqueeze(-2) + keep(
        form, spread * mean.unsqueeze(-1) * mean.unsqueeze(-2), 5
    )
    torch.testing.assert_close(dense(only), first)


def test_a_batch_norm_between_matrices_is_exact():
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)).double().eval()
    network[1].running_mean.copy_(torch.tensor([0.3, -0.2]))
    network[1].running_var.copy_(torch.tensor([0.7, 1.9]))
    variances = {
        name: torch.rand(parameter.shape, generator=seeded(1), dtype=torch.float64)
        for name, parameter in network.named_parameters()
    }
    x = torch.tensor([[0.7, -1.1], [0.2, 0.4]], dtype=torch.float64)
    mean, covariance = enumerate_moments(network, {name: value.sqrt() for name, value in variances.items()}, x)
    found = propagate(network, from_variances(variances), x, covariance="full")
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance.to_dense(), covariance, rtol=1e-12, atol=1e-12)


def test_norms_of_statistics_that_are_not_there():
    for module in (nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3, track_running_stats=False).eval()):
        state = random_state("diag", 2, (3,), seeded(), torch.float32)
        with pytest.raises(NotImplementedError, match="running statistics in the model itself, got a BatchNorm1d"):
            walk_of(module, "diag")(module, state)
    with pytest.raises(ValueError, match=r"model: expected it in eval mode, but 0 \(BatchNorm1d\) trains"):
        propagate(nn.Sequential(nn.BatchNorm1d(3)), from_variances({}), torch.ones(2, 3))


def test_what_is_only_called_a_norm_is_unknown():
    module = OddRMSNorm(5).double()
    with pytest.raises(NotImplementedError, match="no rule for the model itself, a OddRMSNorm"):
        walk_of(module, "diag")(module, random_state("diag", 2, (3, 5), seeded()))


@pytest.mark.parametrize("name", [name for name in ALL if name != "rms_default"])  # whose eps is that of the dtype
def test_dtypes_agree(name):
    double, event = ALL[name]
    made = norms(torch.float32)
    single, _ = {**made[0], **made[1], **made[2]}[name]
    single.load_state_dict({key: value.clone() for key, value in double.state_dict().items()})
    state = random_state("full", 2, event, seeded())
    low = GaussianState(state.mean.float(), Full(state.covariance.entries.float(), event))
    high, found = walk_of(double, "full")(double, state), walk_of(single, "full")(single, low)
    assert found.mean.dtype == found.variance.dtype == torch.float32
    torch.testing.assert_close(found.mean.double(), high.mean, rtol=1e-4, atol=1e-5)
    scale = dense(high).abs().max()
    assert (dense(found).double() - dense(high)).abs().max() < 1e-5 * scale


def test_gradients_reach_what_comes_before():
    module, event = ALL["layer"]
    state = random_state("diag", 2, event, seeded())
    mean = state.mean.requires_grad_()
    walk_of(module, "diag")(module, GaussianState(mean, state.covariance)).variance.sum().backward()
    assert mean.grad.isfinite().all() and mean.grad.abs().sum() > 0 and math.isfinite(mean.grad.norm())
