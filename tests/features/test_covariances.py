"""kuu, kuf and cross against integrals taken by brute force, for every kind of kernel."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import scipy.integrate
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from hypothesis import given
from hypothesis import strategies as st
from linear_operator import LinearOperator, to_dense
from torch import Tensor, nn

from gpseq.features import HippoFeatures, InducingPoints
from tests import oracles
from tests.oracles import Line, close

F64 = torch.float64
BATCHES = [(), (3,), (3, 1)]
Batch = tuple[int, ...]


# The kernels of the matrix, each with what it is in numpy


class Brownian(Kernel):
    """min(a, b): not stationary."""

    has_lengthscale = False

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: object) -> Tensor:
        if diag:
            return torch.minimum(x1, x2)[..., 0]
        return torch.minimum(x1[..., :, None, 0], x2[..., None, :, 0])


class Deep(Kernel):
    """An RBF kernel behind a small network of ordinary layers."""

    has_lengthscale = False

    def __init__(self, columns: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(columns, 5), nn.Tanh(), nn.Linear(5, 2))
        self.base = RBFKernel()
        self.base.lengthscale = 0.3

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: object) -> Tensor:
        return self.base.forward(self.net(x1), self.net(x2), diag=diag, **params)


def spread(low: float, high: float, batch: Batch, *shape: int) -> Tensor:
    """Values between low and high that differ over the batch and over the rest of the shape."""
    size = (*batch, *shape)
    steps = torch.arange(math.prod(size), dtype=F64) * 0.618 % 1
    return (low + (high - low) * steps).reshape(size)


def scaled(kernel: Kernel, batch: Batch, low: float = 0.5, high: float = 2.0) -> ScaleKernel:
    outer = ScaleKernel(kernel, batch_shape=torch.Size(batch))
    outer.outputscale = spread(low, high, batch)
    return outer


def exactly(kernel: Kernel, **values: float) -> Kernel:
    """The kernel in float64 with these hyperparameters; a bare float would be rounded to float32 by its setter."""
    kernel = kernel.double()
    for name, value in values.items():
        setattr(kernel, name, torch.tensor(value, dtype=F64))
    return kernel


def with_lengthscale(kernel: Kernel, batch: Batch, low: float = 0.2, high: float = 0.6) -> Kernel:
    kernel.lengthscale = spread(low, high, batch, 1, kernel.ard_num_dims or 1)
    return kernel


def make_rbf(batch: Batch, **options: object) -> Kernel:
    return with_lengthscale(RBFKernel(batch_shape=torch.Size(batch), **options), batch)


def make_matern(nu: float) -> Callable[..., Kernel]:
    return lambda batch, **options: with_lengthscale(
        MaternKernel(nu, batch_shape=torch.Size(batch), **options), batch, 0.3, 0.7
    )


def make_periodic(batch: Batch, **options: object) -> Kernel:
    kernel = PeriodicKernel(batch_shape=torch.Size(batch), **options)
    kernel.period_length = spread(0.8, 1.4, batch, 1, 1)
    return with_lengthscale(kernel, batch, 0.6, 1.5)


def number(value: Tensor, index: tuple[int, ...]) -> np.ndarray | float:
    """One batch element of a hyperparameter, as a float or as one number for each column."""
    flat = value.detach()[index].reshape(-1).numpy()
    return flat if flat.size > 1 else float(flat[0])


def np_rbf(k: Kernel, i: tuple[int, ...]) -> oracles.Kernel:
    return oracles.rbf(number(k.lengthscale, i))


def np_matern(k: Kernel, i: tuple[int, ...]) -> oracles.Kernel:
    return oracles.matern(k.nu, number(k.lengthscale, i))


def np_periodic(k: Kernel, i: tuple[int, ...]) -> oracles.Kernel:
    return oracles.periodic(number(k.lengthscale, i), number(k.period_length, i))


def np_linear(k: Kernel, i: tuple[int, ...]) -> oracles.Kernel:
    return lambda a, b: number(k.variance, i) * (a * b).sum(-1)


def np_scale(k: ScaleKernel, i: tuple[int, ...], inner: Callable) -> oracles.Kernel:
    return oracles.multiply(lambda a, b: number(k.outputscale, i), inner(k.base_kernel, i))


def np_deep(k: Deep, i: tuple[int, ...]) -> oracles.Kernel:
    first, last = k.net[0], k.net[2]
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (first.weight, first.bias, last.weight, last.bias))
    inner = np_rbf(k.base, i)
    embed = lambda a: np.tanh(a @ w1.T + b1) @ w2.T + b2  # noqa: E731
    return lambda a, b: inner(embed(a), embed(b))


@dataclass(frozen=True)
class Case:
    """A kernel to build over a batch shape, what its elements are, and how exact the quadrature can be."""

    build: Callable[[Batch], Kernel]
    oracle: Callable[[Kernel, tuple[int, ...]], oracles.Kernel]
    tolerance: float = 1e-11
    num_nodes: int = 60


CASES = {
    "rbf": Case(make_rbf, np_rbf),
    "matern12": Case(make_matern(0.5), np_matern, 6e-5, 300),
    "matern32": Case(make_matern(1.5), np_matern, 1e-8, 300),
    "matern52": Case(make_matern(2.5), np_matern, 5e-12, 300),
    "periodic": Case(make_periodic, np_periodic),
    "scale": Case(lambda b: scaled(make_rbf(b), b), lambda k, i: np_scale(k, i, np_rbf)),
    "sum": Case(
        lambda b: make_rbf(b) + scaled(make_matern(2.5)(b), b),
        lambda k, i: oracles.add(np_rbf(k.kernels[0], i), np_scale(k.kernels[1], i, np_matern)),
        5e-12,
        300,
    ),
    "product": Case(
        lambda b: make_rbf(b) * make_periodic(b),
        lambda k, i: oracles.multiply(np_rbf(k.kernels[0], i), np_periodic(k.kernels[1], i)),
    ),
    "scaled product of sums": Case(
        lambda b: scaled((make_rbf(b) + make_periodic(b)) * make_rbf(b), b),
        lambda k, i: np_scale(
            k,
            i,
            lambda p, i: oracles.multiply(
                oracles.add(np_rbf(p.kernels[0].kernels[0], i), np_periodic(p.kernels[0].kernels[1], i)),
                np_rbf(p.kernels[1], i),
            ),
        ),
    ),
    "linear, not stationary": Case(
        lambda b: LinearKernel(batch_shape=torch.Size(b)) + make_rbf(b),
        lambda k, i: oracles.add(np_linear(k.kernels[0], i), np_rbf(k.kernels[1], i)),
    ),
    # In this order GPyTorch adds a root to a dense matrix, and factors that matrix on the way if both inputs are equal.
    "rbf and a trend": Case(
        lambda b: make_rbf(b) + LinearKernel(batch_shape=torch.Size(b)),
        lambda k, i: oracles.add(np_rbf(k.kernels[0], i), np_linear(k.kernels[1], i)),
    ),
    "brownian, not stationary": Case(lambda b: Brownian(), lambda k, i: oracles.brownian(), 2e-5, 300),
    "deep": Case(lambda b: Deep(), np_deep, 1e-10, 80),
}
UNBATCHED = {"brownian, not stationary", "deep"}
LINE = Line(order=6, start=0.2, horizon=1.7)
SECOND = Line(order=4, start=0.2, horizon=2.4)


def features_on(line: Line, num_nodes: int | None = None) -> HippoFeatures:
    other = torch.tensor(line.other, dtype=F64) if line.other else None
    return HippoFeatures(
        line.order, line.horizon, line.start, num_nodes=num_nodes, time_dim=line.time_dim, other_inputs=other
    )


def per_element(batch: Batch, function: Callable[[tuple[int, ...]], np.ndarray]) -> Tensor:
    """``function`` of every index of a batch, stacked."""
    if not batch:
        return torch.from_numpy(function(()))
    blocks = [torch.from_numpy(function(index)) for index in np.ndindex(*batch)]
    return torch.stack(blocks).reshape(*batch, *blocks[0].shape)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_covariances_are_the_integrals(name: str, batch: Batch, dtype: torch.dtype) -> None:
    if batch and name in UNBATCHED:
        batch = ()
    case = CASES[name]
    kernel = case.build(batch).to(dtype)
    exact = deepcopy(kernel).double()
    features, second = features_on(LINE, case.num_nodes), features_on(SECOND, case.num_nodes)
    x = torch.linspace(0.05, 2.6, 8)[:, None].to(dtype)  # before, inside and beyond the interval

    kuu, kuf, cross = features.kuu(kernel), features.kuf(kernel, x), features.cross(kernel, second)
    oracle = lambda i: case.oracle(exact, i)  # noqa: E731
    close(to_dense(kuu), per_element(batch, lambda i: oracles.legs_kuu(oracle(i), LINE)), case.tolerance)
    close(cross, per_element(batch, lambda i: oracles.legs_cross(oracle(i), LINE, SECOND)), case.tolerance)
    inputs = x.double().numpy()
    close(kuf, per_element(batch, lambda i: oracles.legs_kuf(oracle(i), LINE, inputs)), case.tolerance)
    assert kuu.dtype == kuf.dtype == cross.dtype == F64
    assert isinstance(kuu, LinearOperator)
    assert torch.equal(to_dense(kuu), to_dense(kuu).mT)
    close(features.cross(kernel, features), kuu.to_dense(), 1e-14)


@pytest.mark.parametrize(("kernel_batch", "x_batch"), list(product(BATCHES, BATCHES)), ids=str)
def test_batches_of_kernels_and_inputs_broadcast(kernel_batch: Batch, x_batch: Batch, dtype: torch.dtype) -> None:
    kernel = scaled(make_rbf(kernel_batch), kernel_batch).to(dtype)
    exact = deepcopy(kernel).double()
    features = features_on(LINE)
    x = spread(0.1, 2.0, x_batch, 4, 1).to(dtype)
    out = torch.broadcast_shapes(kernel_batch, x_batch)
    wide = x.double().expand(*out, 4, 1).numpy()
    lengthscale = exact.base_kernel.lengthscale.expand(*out, 1, 1).detach().numpy()
    scale = exact.outputscale.expand(out).detach().numpy()

    def expected(i: tuple[int, ...]) -> np.ndarray:
        return oracles.legs_kuf(oracles.rbf(lengthscale[i].item(), scale[i].item()), LINE, wide[i])

    close(features.kuf(kernel, x), per_element(out, expected), 1e-12)


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1])
def test_time_is_one_of_several_columns(time_dim: int, dtype: torch.dtype) -> None:
    other = (0.4, -1.1)
    line, second = Line(5, 1.5, 0.1, time_dim, other), Line(4, 2.0, 0.1, time_dim, (0.9, 0.2))
    features, later = features_on(line, 60), features_on(second, 60)
    place = time_dim % 3
    ard = with_lengthscale(RBFKernel(ard_num_dims=3), (), 0.5, 1.5)
    rough = with_lengthscale(RBFKernel(active_dims=place), ())
    # Periodic in time, RBF in the two other columns.
    rest = [column for column in range(3) if column != place]
    split = make_periodic((), active_dims=place) * with_lengthscale(RBFKernel(active_dims=rest), (), 0.8, 1.0)
    for kernel in (ard.to(dtype), (scaled(ard, ()) + rough).to(dtype), split.to(dtype)):
        exact = deepcopy(kernel).double()
        if kernel is split:
            oracle = oracles.multiply(
                lambda a, b, e=exact: np_periodic(e.kernels[0], ())(a[..., [place]], b[..., [place]]),
                lambda a, b, e=exact: np_rbf(e.kernels[1], ())(a[..., rest], b[..., rest]),
            )
        elif kernel is ard:
            oracle = np_rbf(exact, ())
        else:
            oracle = oracles.add(
                np_scale(exact.kernels[0], (), np_rbf),
                lambda a, b, e=exact: np_rbf(e.kernels[1], ())(a[..., [place]], b[..., [place]]),
            )
        x = torch.randn(5, 3).to(dtype)
        close(features.kuu(kernel).to_dense(), oracles.legs_kuu(oracle, line), 1e-11)
        close(features.kuf(kernel, x), oracles.legs_kuf(oracle, Line(5, 1.5, 0.1, place, other), x.numpy()), 1e-11)
        close(features.cross(kernel, later), oracles.legs_cross(oracle, line, second), 1e-11)
    assert torch.equal(features.nodes()[:, rest], torch.tensor(other, dtype=F64).expand(60, 2))


def test_points_among_features() -> None:
    kernel = scaled(make_rbf(()), ()).double()
    oracle = np_scale(kernel, (), np_rbf)
    points = torch.tensor([0.0, 0.7, 1.1, 3.0])
    inducing = InducingPoints(points)
    z = points.double()[:, None].numpy()
    close(inducing.kuu(kernel).to_dense(), oracles.gram(oracle, z, z), 1e-14)
    close(inducing.kuf(kernel, torch.linspace(0, 1, 5)), oracles.gram(oracle, z, np.linspace(0, 1, 5)[:, None]), 1e-7)
    close(features_on(LINE).cross(kernel, inducing), oracles.legs_kuf(oracle, LINE, z), 1e-12)
    close(inducing.cross(kernel, features_on(LINE)), oracles.legs_kuf(oracle, LINE, z).T, 1e-12)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_batches_of_points(batch: Batch, dtype: torch.dtype) -> None:
    kernel = make_rbf(()).double()
    points, x = spread(0, 2, batch, 5, 2).to(dtype), spread(1, 3, (), 4, 2).to(dtype)
    inducing = InducingPoints(points)
    expected = per_element(
        batch, lambda i: oracles.gram(np_rbf(kernel, ()), points[i].double().numpy(), x.double().numpy())
    )
    close(inducing.kuf(kernel, x), expected, 1e-13)
    assert inducing.kuu(kernel).shape == (*batch, 5, 5)
    assert inducing.cross(kernel, InducingPoints(x)).shape == (*batch, 5, 4)


# Reference values and errors that the specification states


def test_reference_values() -> None:
    kernel = stationary("rbf", 0.2)
    features = HippoFeatures(4, horizon=1.0)
    kuu = torch.tensor(
        [
            [0.421325665646880, 0, -0.0729872895760103, 0],
            [0, 0.274125617945720, 0, -0.0737193747529253],
            [-0.0729872895760103, 0, 0.159181736244597, 0],
            [0, -0.0737193747529253, 0, 0.0824326832376415],
        ],
        dtype=F64,
    )
    kuf = torch.tensor([0.467716868070901, -0.279361693821559, -0.143227871161927, 0.169837014739713], dtype=F64)
    torch.testing.assert_close(features.kuu(kernel).to_dense().detach(), kuu, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        features.kuf(kernel, torch.tensor([0.3], dtype=F64))[:, 0].detach(), kuf, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(("nu", "error", "rate"), [(0.5, 1e-5, 2), (1.5, 5e-10, 4), (2.5, 6e-14, 6)])
def test_error_at_a_kink(nu: float, error: float, rate: int) -> None:
    """The size of the error at 400 nodes is as stated, and doubling the nodes divides it by 2^rate."""
    kernel = exactly(MaternKernel(nu), lengthscale=0.2)
    expected = torch.from_numpy(oracles.legs_kuu(oracles.matern(nu, 0.2), Line(8, 1.0)))

    def miss(num_nodes: int) -> float:
        kuu = HippoFeatures(8, 1.0, num_nodes=num_nodes).kuu(kernel).to_dense().detach()
        return (kuu - expected).abs().max().item()

    assert 0.5 * error < miss(400) < 1.5 * error
    assert 0.7 * 2**rate < miss(60) / miss(120) < 1.4 * 2**rate


@pytest.mark.parametrize("order", [64, 256])
def test_default_nodes_suffice_where_the_order_does(order: int) -> None:
    """2 M + 20 nodes: an error of at most 2e-12 of the largest variance at M = 1.5 horizon / lengthscale."""
    kernel = stationary("rbf", 1.5 / order)
    features, fine = HippoFeatures(order, 1.0), HippoFeatures(order, 1.0, num_nodes=4 * order + 200)
    close(features.kuu(kernel).to_dense(), fine.kuu(kernel).to_dense(), 2e-12)


# Invariants

STATIONARY = {
    "rbf": lambda l: oracles.rbf(l),
    "matern32": lambda l: oracles.matern(1.5, l),
    "periodic": lambda l: oracles.periodic(1.0, 3 * l),
}


def stationary(name: str, lengthscale: float) -> Kernel:
    if name == "periodic":
        return exactly(PeriodicKernel(), period_length=3 * lengthscale, lengthscale=1.0)
    return exactly(RBFKernel() if name == "rbf" else MaternKernel(1.5), lengthscale=lengthscale)


@given(
    name=st.sampled_from(sorted(STATIONARY)),
    rho=st.floats(0.5, 30),
    factor=st.floats(1e-3, 1e4),
    shift=st.floats(-1e3, 1e3),
    order=st.integers(1, 24),
)
def test_scaling_reflection_and_parity(name: str, rho: float, factor: float, shift: float, order: int) -> None:
    unit = HippoFeatures(order, 1.0)
    kernel = stationary(name, 1 / rho)
    kuu = unit.kuu(kernel).to_dense()
    x = torch.linspace(-0.2, 1.3, 7, dtype=F64)
    kuf = unit.kuf(kernel, x)
    scale = kuf.abs().max()

    # Only the horizon in lengthscales counts.
    slow = stationary(name, factor / rho)
    # The ratio as it is: GPyTorch's softplus is off by 1e-9 of what was set, just above 20.
    scales = [k.period_length if name == "periodic" else k.lengthscale for k in (slow, kernel)]
    factor = (scales[0] / scales[1]).item()
    stretched = HippoFeatures(order, factor)
    close(stretched.kuu(slow).to_dense(), kuu, 1e-12)
    close(stretched.kuf(slow, factor * x), kuf, 1e-12)
    # Nothing depends on where time starts (but subtracting large times rounds).
    moved = HippoFeatures(order, shift + 1.0, shift)
    close(moved.kuu(kernel).to_dense(), kuu, 1e-12 * (1 + abs(shift) * rho))
    # Modes of unequal parity are uncorrelated, and mirrored times are mirrored.
    signs = (-1.0) ** torch.arange(order, dtype=F64)
    odd = torch.outer(signs, signs) < 0
    assert (kuu[odd].abs() <= 1e-12 * kuu.abs().max()).all()
    assert ((unit.kuf(kernel, 1 - x) - signs[:, None] * kuf).abs() <= 1e-12 * scale).all()


@pytest.mark.parametrize("name", ["rbf", "periodic"])
def test_first_entry_is_the_mean_of_the_lags(name: str) -> None:
    kernel, length = stationary(name, 0.4), 2.5
    k = STATIONARY[name](0.4)
    zero = np.zeros(1)
    integral, _ = scipy.integrate.quad(lambda r: (length - r) * k(np.array([r]), zero), 0, length, epsabs=1e-13)
    kuu = HippoFeatures(6, length, num_nodes=80).kuu(kernel)
    assert kuu[0, 0].item() == pytest.approx(2 / length**2 * integral, abs=1e-12)


def smallest(matrix: Tensor) -> Tensor:
    """The smallest eigenvalue relative to the largest."""
    eigenvalues = torch.linalg.eigvalsh(matrix.detach())
    return eigenvalues[..., 0] / eigenvalues[..., -1]


@given(
    name=st.sampled_from(sorted(CASES.keys() - {"rbf and a trend"})),
    order=st.integers(1, 30),
    start=st.floats(0.1, 3),
    length=st.floats(0.05, 40),
    growth=st.floats(1, 4),
    points=st.lists(st.floats(-0.5, 2.5), min_size=1, max_size=8),
)
def test_joint_covariances_are_positive(
    name: str, order: int, start: float, length: float, growth: float, points: list[float]
) -> None:
    """Whatever the quadrature misses, u is a linear functional of f: u, u' and f(x) have a joint Gaussian."""
    kernel = CASES[name].build(()).double()
    features = HippoFeatures(order, start + length, start)
    later = features.with_horizon(start + growth * length)
    x = (start + length * torch.tensor(points, dtype=F64)[:, None]).clamp_min(1e-3)  # Brownian motion starts at 0
    kff = to_dense(kernel(x))
    uu, ll, ul = features.kuu(kernel).to_dense(), later.kuu(kernel).to_dense(), features.cross(kernel, later)
    uf, lf = features.kuf(kernel, x), later.kuf(kernel, x)
    joint = torch.cat([torch.cat([uu, ul, uf], 1), torch.cat([ul.mT, ll, lf], 1), torch.cat([uf.mT, lf.mT, kff], 1)])
    assert smallest(joint) > -1e-13 * len(joint)
    # No negative conditional variance, through an eigendecomposition that drops what is zero.
    values, vectors = torch.linalg.eigh(uu)
    kept = values > 1e-9 * values[-1]
    half = (vectors[:, kept] / values[kept].sqrt()).mT @ uf
    assert (kff.diagonal() - half.square().sum(0) > -1e-9 * kff.diagonal().max()).all()


@given(order=st.integers(1, 20), growth=st.floats(1.0, 5.0))
def test_stretching_transfers_without_gain(order: int, growth: float) -> None:
    """||L_b^-1 K_ba L_a^-T|| <= 1: what the new basis explains of the old one is at most all of it."""
    kernel = make_matern(1.5)(()).double()
    old = HippoFeatures(order, 3.0)
    new = old.with_horizon(3.0 * growth)
    la, lb = (torch.linalg.cholesky(f.kuu(kernel).to_dense()) for f in (old, new))
    transfer = torch.linalg.solve_triangular(lb, new.cross(kernel, old), upper=False)
    transfer = torch.linalg.solve_triangular(la, transfer.mT, upper=False).mT
    assert torch.linalg.matrix_norm(transfer, 2) <= 1 + 1e-10


@pytest.mark.parametrize("unit", [1e-10, 1e10])
def test_the_unit_of_f_does_not_matter(unit: float) -> None:
    """A series in microvolts and one in millions: no absolute number may come in, least of all jitter."""
    x = torch.linspace(0, 12, 50, dtype=F64)
    found = []
    for scale in (1.0, unit):
        rbf, linear = ScaleKernel(exactly(RBFKernel(), lengthscale=2.0)), LinearKernel()
        kernel = exactly(rbf, outputscale=scale) + exactly(linear, variance=0.1 * scale)
        features = HippoFeatures(20, 10.0)
        blocks = [features.kuu(kernel).to_dense(), features.kuf(kernel, x), features.cross(kernel, features)]
        found.append([block / scale for block in blocks] + [features.residual_curve(kernel)])
    for scaled, plain in zip(*reversed(found), strict=True):
        close(scaled, plain, 1e-10)


# Gradients


def test_gradients_reach_hyperparameters_and_inputs(dtype: torch.dtype) -> None:
    kernel = scaled(make_rbf(()), ()).to(dtype)
    features = HippoFeatures(4, 1.5)
    x = torch.linspace(0, 2, 5).to(dtype).requires_grad_()
    (features.kuf(kernel, x).square().sum() + features.kuu(kernel).to_dense().square().sum()).backward()
    reference = deepcopy(kernel).double().requires_grad_()
    raw = [p.detach().clone().requires_grad_() for p in reference.parameters()]
    names = [name for name, _ in reference.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        k = dict(zip(names, values[:-1], strict=True))
        lengthscale = nn.functional.softplus(k["base_kernel.raw_lengthscale"])
        scale = nn.functional.softplus(k["raw_outputscale"])
        rbf = lambda a, b: scale * torch.exp(-0.5 * ((a[:, None] - b) / lengthscale) ** 2)  # noqa: E731
        nodes, weights = features.nodes()[:, 0], features.weights()
        kuu = weights @ rbf(nodes, nodes) @ weights.mT
        return (weights @ rbf(nodes, values[-1])).square().sum() + kuu.square().sum()

    inputs = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(loss(*raw, inputs), [*raw, inputs])
    for parameter, gradient in zip([*kernel.parameters(), x], expected, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == dtype
        close(parameter.grad, gradient.reshape(parameter.shape), 1e-12 if dtype == F64 else 1e-6)
    if dtype == F64:
        assert torch.autograd.gradcheck(lambda a: features.kuf(kernel, a), (inputs,))


def test_learned_points_get_gradients() -> None:
    inducing = InducingPoints(torch.linspace(0, 1, 4), learn=True)
    kernel = make_rbf(())
    inducing.kuf(kernel, torch.linspace(0, 1, 3)).sum().backward()
    assert inducing.points.grad is not None and inducing.points.grad.abs().max() > 0


# What is refused


def test_inputs_with_other_columns_are_refused() -> None:
    features = HippoFeatures(3, 1.0, time_dim=1, other_inputs=torch.zeros(1))
    for kernel in (RBFKernel(), RBFKernel(ard_num_dims=2), ScaleKernel(MaternKernel())):
        for x in (torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 3)):
            with pytest.raises((ValueError, RuntimeError)):
                features.kuf(kernel, x)
