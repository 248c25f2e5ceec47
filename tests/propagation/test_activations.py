"""Moments of activations against dense quadrature, at their limits, and the activations that are recognised."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gpseq.propagation.activations import NAMES, Activation, activation_moments, of_function, of_module
from gpseq.propagation.gelu import gelu_moments

SPREADS = [0.01, 0.25, 1.0, 4.0, 25.0]
CLOSED = ["gelu", "relu", "leaky_relu", "relu6", "hardtanh", "hardsigmoid", "softshrink", "identity"]


def oracle(function, mean, variance, kinks=()):
    """Mean, gain and remainder in float64, by thousands of Gauss-Legendre nodes in panels that end at the kinks."""
    locations, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))
    m, s = mean.double().unsqueeze(-1), variance.double().sqrt().unsqueeze(-1)
    bounds = [((torch.full_like(m, kink) - m) / s).clamp(-13, 13) for kink in kinks]
    bounds = [torch.full_like(m, -13), *bounds, torch.full_like(m, 13)]
    nodes, masses = [], []
    for left, right in pairwise(bounds):
        edges = left + (right - left) * torch.linspace(0, 1, 61, dtype=torch.float64)
        half = (edges[..., 1:] - edges[..., :-1]).unsqueeze(-1) / 2
        z = (edges[..., :-1].unsqueeze(-1) + half * (1 + locations)).flatten(-2)
        nodes.append(z)
        masses.append((half * weights).flatten(-2) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi))
    z, w = torch.cat(nodes, -1), torch.cat(masses, -1)
    rise = function(m + s * z) - function(m)
    centre = (w * rise).sum(-1, keepdim=True)
    gain = (w * rise * z).sum(-1, keepdim=True) / s
    remainder = (w * (rise - centre - gain * s * z).square()).sum(-1)
    return (function(m) + centre).squeeze(-1), gain.squeeze(-1), remainder


def grid(spread, dtype, reach=3.0):
    """Means over ``reach`` standard deviations of what a unit scale makes of the variance, with the variance."""
    mean = torch.linspace(-reach, reach, 25, dtype=dtype) * math.sqrt(1 + spread)
    return mean, torch.full_like(mean, spread)


def assert_agree(found, expected, variance, relative, remainder=None, floor=1e-7):
    """The variance relative to itself, the remainder too but for what is nothing beside the variance."""
    mean, gain, rest = expected
    v = variance.double()
    total = gain.square() * v + rest
    floor = floor * v  # far in a flat tail
    sd = (total + floor).sqrt()
    rounding = 4 * torch.finfo(found.mean.dtype).eps * (1 + mean.abs())
    assert ((found.mean.double() - mean).abs() <= relative * sd + rounding).all()
    assert ((found.gain.double() - gain).abs() * v.sqrt() <= relative * sd).all()
    assert ((found.variance.double() - total).abs() <= relative * (total + floor)).all()
    bound = (remainder or relative) * rest + 0.1 * relative * (total + floor)
    assert ((found.remainder.double() - rest).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_moments_equal_dense_quadrature(name, dtype):
    known = of_function(name)
    mean, variance = map(torch.cat, zip(*(grid(spread, dtype) for spread in SPREADS), strict=True))
    found = activation_moments(name, mean, variance)
    assert {part.dtype for part in found} == {dtype}
    tight, floor = (1e-9, 1e-12) if name in CLOSED else (1e-6, 1e-7)
    relative = tight if dtype == torch.float64 else 1e-4
    expected = oracle(known, mean, variance, known.kinks)
    assert_agree(found, expected, variance, relative, max(relative, 1e-3), floor)


def test_relu_reference_values():
    found = activation_moments("relu", *torch.tensor([[0.5], [0.25]], dtype=torch.float64))
    expected = torch.tensor([[0.5416577353], [0.1877719520], [0.8413447461]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([found.mean, found.variance, found.gain]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "reach", "relative"), [("relu", 8.0, 1e-4), ("gelu", 6.0, 2e-3)])
def test_far_below_zero_the_variance_is_small_and_not_rounding(name, reach, relative, dtype):
    mean, variance = grid(25.0, dtype, reach)
    found, known = activation_moments(name, mean, variance), of_function(name)
    _, gain, remainder = oracle(known, mean, variance, known.kinks)
    expected = gain.square() * variance.double() + remainder
    relative = relative if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(found.variance.double(), expected, rtol=relative, atol=0)
    assert expected.min() < 1e-9


def test_gelu_remainder_keeps_its_digits_where_it_is_small(dtype):
    mean, variance = grid(1e-6, dtype)
    _, _, remainder = oracle(F.gelu, mean.double(), variance)
    relative = 1e-5 if dtype == torch.float32 else 1e-6  # the oracle's own rounding
    torch.testing.assert_close(
        activation_moments("gelu", mean, variance).remainder.double(), remainder, rtol=relative, atol=1e-16
    )


def test_gelu_at_large_variance_is_a_relu(dtype):
    mean, variance = torch.linspace(-200, 200, 9, dtype=dtype), torch.full((9,), 1e4, dtype=dtype)
    gelu, relu = (activation_moments(name, mean, variance) for name in ("gelu", "relu"))
    torch.testing.assert_close(gelu.remainder, relu.remainder, rtol=2e-3, atol=0)
    torch.testing.assert_close(gelu.variance, relu.variance, rtol=2e-3, atol=0)


def test_any_callable_by_quadrature(dtype):
    """The sine, of which all moments are known."""
    mean = torch.linspace(-4, 4, 17, dtype=dtype)
    variance = torch.linspace(0.01, 9, 17, dtype=dtype)
    m, v = mean.double(), variance.double()
    expected_mean, gain = m.sin() * (-v / 2).exp(), m.cos() * (-v / 2).exp()
    expected_variance = (1 - (2 * m).cos() * (-2 * v).exp()) / 2 - expected_mean.square()
    found = activation_moments(torch.sin, mean, variance)
    expected = (expected_mean, gain, expected_variance - gain.square() * v)
    assert_agree(found, expected, variance, 1e-5 if dtype == torch.float32 else 1e-9)
    coarse = activation_moments(torch.sin, mean, variance / 9, num_nodes=17)
    torch.testing.assert_close(coarse.mean.double(), m.sin() * (-v / 18).exp(), rtol=0, atol=1e-6)


@given(
    name=st.sampled_from(NAMES),
    mean=st.floats(-1e4, 1e4, width=32),
    variance=st.one_of(st.just(0.0), st.floats(-30, 6).map(lambda e: 10**e)),
    double=st.booleans(),
)
def test_moments_are_finite_and_the_remainder_is_not_negative(name, mean, variance, double):
    dtype = torch.float64 if double else torch.float32
    m = torch.tensor([mean, mean / 1000, 0.0], dtype=dtype, requires_grad=True)
    v = torch.full((3,), variance, dtype=dtype, requires_grad=True)
    found = activation_moments(name, m, v, num_nodes=11)
    assert (found.remainder >= 0).all()
    torch.testing.assert_close(found.variance, found.gain.square() * v + found.remainder)
    for part in found:
        assert part.isfinite().all()
    gradients = torch.autograd.grad(sum(part.sum() for part in found), (m, v))
    for gradient in gradients:
        assert gradient.isfinite().all()


@given(
    name=st.sampled_from(["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "elu", "softplus", "hardtanh"]),
    mean=st.floats(-3, 3),
    variance=st.floats(1e-3, 9),
    scale=st.floats(0.2, 5),
)
def test_more_variance_in_means_more_variance_out(name, mean, variance, scale):
    """Of functions that rise everywhere, or nearly: and none of these has slope above 1, so it never grows."""
    m, v = torch.tensor([mean, mean], dtype=torch.float64), torch.tensor([variance, variance * (1 + scale)]).double()
    found = activation_moments(name, m, v).variance
    assert (found <= 1.3 * v).all()
    if name not in ("gelu", "silu"):
        assert found[1] >= found[0]


@pytest.mark.parametrize("name", NAMES)
def test_without_variance_there_is_the_tangent(name, dtype):
    kinks = of_function(name).kinks
    mean = torch.tensor([-2.3, -0.4, 0.0, 0.3, 1.7, *kinks], dtype=dtype, requires_grad=True)
    variance = torch.zeros_like(mean).requires_grad_()
    exact = activation_moments(name, mean, variance)
    tangent = activation_moments(name, mean, variance, method="tangent")
    torch.testing.assert_close(exact.mean, tangent.mean)
    torch.testing.assert_close(exact.mean, of_function(name)(mean))
    smooth = torch.tensor([value not in kinks for value in mean.tolist()])
    torch.testing.assert_close(exact.gain[smooth], tangent.gain[smooth])
    assert (exact.remainder == 0).all()
    assert (exact.variance == 0).all()
    slopes, changes = torch.autograd.grad(sum(part.sum() for part in exact), (mean, variance))
    assert slopes.isfinite().all()
    assert changes.isfinite().all()
    (slopes,) = torch.autograd.grad(activation_moments(name, mean, variance).mean.sum(), mean)
    torch.testing.assert_close(slopes[smooth], tangent.gain[smooth])


@pytest.mark.parametrize("name", NAMES)
def test_small_variances_lead_to_the_tangent(name, dtype):
    mean = torch.tensor([-2.3, -0.4, 0.3, 1.7], dtype=dtype)
    variance = 10.0 ** torch.arange(-14, -7, dtype=dtype).unsqueeze(-1)
    exact = activation_moments(name, mean, variance)
    tangent = activation_moments(name, mean, variance, method="tangent")
    bound = 1e-4 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(exact.mean, tangent.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(exact.gain, tangent.gain, rtol=0, atol=bound)
    # Values in float32 are known to 1e-7, so variances below 1e-14 are rounding.
    torch.testing.assert_close(
        exact.variance, tangent.variance, rtol=bound, atol=1e-13 if dtype == torch.float32 else 1e-15
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    kinks = of_function(name).kinks
    mean = torch.tensor([-2.1, 0.3, *kinks], dtype=torch.float64).repeat(2).requires_grad_()
    variance = torch.tensor([0.05, 3.0], dtype=torch.float64).repeat_interleave(len(mean) // 2).requires_grad_()
    # The gradient is that of the sum, however coarse.
    assert torch.autograd.gradcheck(partial(activation_moments, name, num_nodes=9), (mean, variance))


def test_the_gain_is_the_slope_of_the_mean_and_curvature_drives_it(dtype):
    mean = torch.linspace(-3, 3, 13, dtype=dtype, requires_grad=True)
    variance = torch.full_like(mean, 0.7).requires_grad_()
    for name in ("gelu", "relu", "tanh", "elu", "leaky_relu"):
        found = activation_moments(name, mean, variance)
        slope, by_variance = torch.autograd.grad(found.mean.sum(), (mean, variance), create_graph=True)
        torch.testing.assert_close(slope, found.gain, rtol=1e-5, atol=1e-5)
        (curvature,) = torch.autograd.grad(found.gain.sum(), mean)
        torch.testing.assert_close(by_variance, curvature / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gelu", "relu", "tanh"])
def test_shapes_and_chunks(name, dtype):
    size = 32768 * torch.get_num_threads() + 5
    mean, variance = torch.randn(size, dtype=dtype), torch.rand(size, dtype=dtype)
    chunked = activation_moments(name, mean, variance, num_nodes=9)
    for part, last in zip(chunked, activation_moments(name, mean[-9:], variance[-9:], num_nodes=9), strict=True):
        torch.testing.assert_close(part[-9:], last)
    mean, variance = torch.randn(2, 1, 5, dtype=dtype).mT, torch.rand(3, dtype=dtype)
    wide = activation_moments(name, mean, variance)
    assert {part.shape for part in wide} == {torch.Size([2, 5, 3])}
    torch.testing.assert_close(wide.variance[1, 2, 0], activation_moments(name, mean[1, 2, 0], variance[0]).variance)
    assert activation_moments(name, mean[:0], variance).gain.shape == (0, 5, 3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(half):
    mean, variance = torch.randn(7).to(half), torch.rand(7).to(half)
    for name in ("gelu", "relu", "tanh"):
        found = activation_moments(name, mean, variance)
        wide = activation_moments(name, mean.float(), variance.float())
        assert found.gain.dtype == half
        torch.testing.assert_close(found.remainder, wide.remainder.to(half))


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_looked_at(name):
    """On the meta device there are none: what runs there does not wait for an accelerator."""
    mean = torch.empty(3, device="meta")
    assert activation_moments(name, mean, mean, num_nodes=5).remainder.shape == (3,)


def test_inside_transforms():
    mean, variance = torch.randn(4, 3), torch.rand(4, 3)
    for name in ("gelu", "relu", "tanh", "elu"):
        expected = activation_moments(name, mean, variance)
        mapped = torch.func.vmap(lambda m, v, name=name: activation_moments(name, m, v))(mean, variance)
        torch.testing.assert_close(torch.stack(list(mapped)), torch.stack(list(expected)))
        with torch.inference_mode():
            torch.testing.assert_close(activation_moments(name, mean, variance).variance, expected.variance)


def test_tangent():
    mean, variance = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 3.0])
    found = activation_moments("relu", mean, variance, method="tangent")
    parts = (found.mean, found.variance, found.gain, found.remainder)
    assert [part.tolist() for part in parts] == [[0, 2], [0, 3], [0, 1], [0, 0]]


MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.3),
    "prelu": nn.PReLU(init=-0.4),
    "hardtanh": nn.Hardtanh(-0.5, 2.0),
    "hardsigmoid": nn.Hardsigmoid(),
    "softshrink": nn.Softshrink(0.7),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "logsigmoid": nn.LogSigmoid(),
    "tanhshrink": nn.Tanhshrink(),
    "softplus": nn.Softplus(beta=2.0, threshold=3.0),
    "elu": nn.ELU(0.5),
    "celu": nn.CELU(0.5),
    "selu": nn.SELU(),
    "softsign": nn.Softsign(),
    "hardswish": nn.Hardswish(inplace=True),
}


@pytest.mark.parametrize(("name", "module"), MODULES.items(), ids=MODULES)
def test_modules_of_torch(name, module):
    known = of_module(module)
    assert known.name == name
    x = torch.linspace(-7, 7, 57)
    torch.testing.assert_close(known(x), module(x.clone()))
    mean, variance = torch.linspace(-3, 3, 13), torch.full((13,), 2.0)
    expected = oracle(lambda h: known(h.float()).double(), mean, variance, known.kinks)
    found = activation_moments(module, mean, variance)
    assert_agree(found, [part.detach() for part in expected], variance, 1e-4, 2e-3)


def test_a_learned_slope_has_a_gradient():
    module = nn.PReLU()
    (gradient,) = torch.autograd.grad(
        activation_moments(module, torch.zeros(2), torch.ones(2)).gain.sum(), module.weight
    )
    torch.testing.assert_close(gradient, torch.tensor([1.0]))  # half the mass is below


class Shifted(nn.ReLU):
    def forward(self, input):
        return super().forward(input) + 1


class Quiet(nn.ReLU):
    pass


@pytest.mark.parametrize(
    "module", [nn.Softmax(-1), nn.Dropout(), nn.Linear(2, 2), nn.PReLU(3), nn.RReLU(), Shifted()], ids=str
)
def test_other_modules_are_not_recognised(module):
    assert of_module(module) is None


def test_a_subclass_that_keeps_forward_is_recognised():
    assert of_module(Quiet()).name == "relu"
    found = activation_moments(Shifted(), torch.zeros(1), torch.zeros(1))  # elementwise, so by quadrature
    assert found.mean == 1


def test_modules_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    expected = {
        "GELUActivation": "gelu",
        "NewGELUActivation": "gelu_tanh",
        "FastGELUActivation": "gelu_tanh",
        "AccurateGELUActivation": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "SiLUActivation": "silu",
        "MishActivation": "mish",
        "LinearActivation": "identity",
        "ReLUSquaredActivation": "relu_squared",
    }
    x = torch.linspace(-6, 6, 49)
    for kind, name in expected.items():
        module = getattr(activations, kind)()
        known = of_module(module)
        assert known.name == name, kind
        torch.testing.assert_close(known(x), module(x), rtol=1e-5, atol=1e-6)


def test_modules_of_libraries_that_are_absent():
    stub = type("QuickGELU", (nn.Module,), {"__module__": "timm.layers.activations"})
    assert of_module(stub()).name == "quick_gelu"
    namesake = type("QuickGELU", (nn.Module,), {"__module__": "somewhere"})
    assert of_module(namesake()) is None


FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.softplus: "softplus",
    F.elu: "elu",
    partial(F.gelu, approximate="tanh"): "gelu_tanh",
    partial(F.relu, inplace=True): "relu",
}


@pytest.mark.parametrize(("function", "name"), FUNCTIONS.items(), ids=range(len(FUNCTIONS)))
def test_functions(function, name):
    assert of_function(function).name == name
    torch.testing.assert_close(of_function(function)(torch.tensor([-0.7, 0.4])), function(torch.tensor([-0.7, 0.4])))


def test_functions_with_keywords_and_of_others():
    assert of_function(partial(F.leaky_relu, negative_slope=0.5))(torch.tensor(-2.0)) == -1
    assert of_function(nn.TransformerEncoderLayer(4, 1, activation="gelu").activation).name == "gelu"
    assert of_function("relu") is of_function(of_function("relu"))
    assert of_function(torch.sin)(torch.tensor(0.0)) == 0
    channels = nn.PReLU(3)  # sees its input's shape
    assert activation_moments(channels, torch.zeros(2, 3), torch.ones(2, 3)).gain.shape == (2, 3)


def test_kinks_that_are_declared():
    """|h| has the remainder of a ReLU four times, and no gain at 0."""
    wedge = Activation("wedge", torch.abs, kinks=(0.0,))
    found = activation_moments(wedge, torch.zeros(1).double(), torch.ones(1).double())
    torch.testing.assert_close(found.mean, torch.tensor([2 / math.pi]).sqrt().double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.variance, torch.tensor([1 - 2 / math.pi]).double(), rtol=1e-7, atol=0)


def test_a_jump_counts_in_the_gain():
    """Softplus of a low threshold has a step, which no derivative at nodes would see."""
    mean, variance = torch.zeros(1).double(), torch.ones(1).double()
    known = of_module(nn.Softplus(threshold=0.0))
    _, gain, _ = oracle(known, mean, variance, (0.0,))
    torch.testing.assert_close(activation_moments(known, mean, variance).gain, gain)


ONES = torch.ones(2, 3)
BAD = {
    "name": (ValueError, ("swosh", ONES, ONES), {}, r"activation: expected one of 'identity', .*got 'swosh'"),
    "no function": (TypeError, (3, ONES, ONES), {}, r"activation: expected a name or .*function, got int"),
    "method": (
        ValueError,
        ("relu", ONES, ONES),
        {"method": "exact"},
        r"method: expected one of 'moments', 'tangent', got",
    ),
    "integers": (
        TypeError,
        ("relu", ONES.long(), ONES),
        {},
        r"mean: expected a floating-point tensor, got torch.int64",
    ),
    "no tensor": (TypeError, ("relu", ONES, 1.0), {}, r"variance: expected a floating-point tensor, got float"),
    "dtypes": (
        TypeError,
        ("relu", ONES, ONES.double()),
        {},
        r"variance: expected the dtype of mean, .*float32, got .*64",
    ),
    "shapes": (ValueError, ("relu", ONES, torch.ones(2)), {}, r"variance: expected .* mean, \(2, 3\), got \(2,\)"),
    "nodes": (ValueError, ("tanh", ONES, ONES), {"num_nodes": 2}, r"num_nodes: expected at least 3, got 2"),
    "nodes type": (TypeError, ("tanh", ONES, ONES), {"num_nodes": 9.0}, r"num_nodes: expected an integer, got 9.0"),
    "not elementwise": (
        ValueError,
        (lambda x: x.sum(-1), ONES, ONES),
        {},
        r"activation: .*elementwise.*\(2,\).*\(2, 3\)",
    ),
}


@pytest.mark.parametrize(("error", "arguments", "options", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(error, arguments, options, message):
    with pytest.raises(error, match=message):
        activation_moments(*arguments, **options)


def test_the_series_of_gelu_is_its_integral(dtype):
    """Small variances take Mehler's series, large ones an integral; the two agree, gradients too."""
    mean = torch.linspace(-20, 20, 801, dtype=dtype)
    for largest in (1e-6, 0.01, 0.1, 0.5):
        variance = (torch.rand(801, generator=torch.Generator().manual_seed(0), dtype=dtype) * largest).requires_grad_()
        series = gelu_moments(mean, variance)[2]
        beside = torch.cat([variance, variance.new_tensor([0.6])])  # one large variance sends all to the integral
        integral = gelu_moments(torch.cat([mean, mean.new_zeros(1)]), beside)[2][:-1]
        size = integral.max().item()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(series, integral, rtol=10 * tolerance, atol=tolerance * size)
        slopes = [torch.autograd.grad(found.sum(), variance)[0] for found in (series, integral)]
        torch.testing.assert_close(*slopes, rtol=100 * tolerance, atol=100 * tolerance * slopes[1].abs().max().item())
