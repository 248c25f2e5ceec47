"""Variational Fourier features and the intervals of the benchmarks, against slow and obvious routes."""

import itertools
import math

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood

# The benchmarks are part of a checkout and not of the wheel.
pytest.importorskip("benchmarks.vff", reason="the tests run outside a checkout")

from benchmarks.intervals import interval, paired
from benchmarks.vff import FourierFeatures, VariationalFourier
from examples.stream.methods import Exact

ORDERS = (0, 1, 2)
LENGTHSCALE, VARIANCE = 0.7, 1.7


def features(order: int, num_frequencies: int = 6, reserve: float = 1.0) -> FourierFeatures:
    return FourierFeatures(-reserve, 2.0 + reserve, num_frequencies, order, LENGTHSCALE, VARIANCE)


def kernel(order: int) -> ScaleKernel:
    made = ScaleKernel(MaternKernel(order + 0.5)).double()
    made.base_kernel.lengthscale, made.outputscale = LENGTHSCALE, VARIANCE
    return made


def published_inner_product(order: int, f, g, a: float, b: float) -> float:
    """The three published inner products, by quadrature; f and g return value and derivatives."""
    rate, s = math.sqrt(2 * order + 1) / LENGTHSCALE, VARIANCE
    x = torch.linspace(a, b, 20_001, dtype=torch.float64)
    (f0, f1, f2, f3), (g0, g1, g2, g3) = f(x), g(x)
    if order == 0:
        inside = (rate * f0 + f1) * (rate * g0 + g1) / (2 * rate * s)
        edge = f0 * g0 / s
    elif order == 1:
        left, right = (rate**2 * h0 + 2 * rate * h1 + h2 for h0, h1, h2 in ((f0, f1, f2), (g0, g1, g2)))
        inside = left * right / (4 * rate**3 * s)
        edge = f0 * g0 / s + f1 * g1 / (rate**2 * s)
    else:
        left, right = (
            rate**3 * h0 + 3 * rate**2 * h1 + 3 * rate * h2 + h3
            for h0, h1, h2, h3 in ((f0, f1, f2, f3), (g0, g1, g2, g3))
        )
        inside = 3 * left * right / (16 * rate**5 * s)
        edge = 9 / (8 * s) * f0 * g0 + 9 / (8 * rate**4 * s) * f2 * g2
        edge = edge + 3 / (rate**2 * s) * (f1 * g1 + f2 * g0 / 8 + f0 * g2 / 8)
    return (torch.trapezoid(inside, x) + edge[0]).item()


@pytest.mark.parametrize("order", ORDERS)
def test_kuu_is_the_published_inner_product(order: int) -> None:
    made = features(order, 2)

    def wave(w: float, shift: float):
        return lambda x: [w**i * torch.cos(w * (x - made.a) + shift + i * math.pi / 2) for i in range(4)]

    w = made.frequencies.tolist()
    waves = [wave(0.0, 0.0), *(wave(f, 0.0) for f in w), *(wave(f, -math.pi / 2) for f in w)]
    expected = [[published_inner_product(order, f, g, made.a, made.b) for g in waves] for f in waves]
    torch.testing.assert_close(made.kuu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_features_reproduce(order: int) -> None:
    """<k(x, .), phi_m> = phi_m(x): the covariance with f is the feature itself."""
    made, x0 = features(order, 3), 0.9
    base, rate = kernel(order), made.rate

    def section(x: torch.Tensor):
        # Value and derivatives of k(., x0), piecewise smooth: by autograd through the formula.
        x = x.clone().requires_grad_()
        r = rate * (x - x0).abs()
        polynomial = {0: 1.0, 1: 1 + r, 2: 1 + r + r**2 / 3}[order]
        rows = [VARIANCE * polynomial * torch.exp(-r)]
        torch.testing.assert_close(
            rows[0][::4000].detach(), base(x.detach()[::4000], torch.tensor([[x0]])).to_dense()[:, 0]
        )
        for _ in range(3):
            rows.append(torch.autograd.grad(rows[-1].sum(), x, create_graph=True)[0])
        return [row.detach() for row in rows]

    for m, w in enumerate(made.frequencies.tolist(), start=1):

        def wave(x: torch.Tensor, w: float = w):
            return [w**i * torch.cos(w * (x - made.a) + i * math.pi / 2) for i in range(4)]

        value = published_inner_product(order, section, wave, made.a, made.b)
        assert value == pytest.approx(made.values(torch.tensor([x0]))[m, 0].item(), abs=2e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_nystrom_covariance_rises_to_the_kernel(order: int) -> None:
    """Far from the ends, where what is not periodic in f is not felt."""
    x = torch.linspace(0.0, 2.0, 60, dtype=torch.float64)
    exact = kernel(order)(x).to_dense().detach()
    previous, errors = None, []
    for num_frequencies in (5, 20, 80, 320):  # each contains the last
        made = features(order, num_frequencies, reserve=5.0)
        factor = torch.linalg.cholesky(made.kuu())
        A = torch.linalg.solve_triangular(factor, made.values(x), upper=False)
        approximate = A.mT @ A
        assert torch.linalg.eigvalsh(exact - approximate).min() > -1e-9
        if previous is not None:
            assert torch.linalg.eigvalsh(approximate - previous).min() > -1e-9
        previous = approximate
        errors.append((exact - approximate).abs().max().item())
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < {0: 0.05, 1: 2e-4, 2: 1e-5}[order]


@pytest.mark.parametrize("order", ORDERS)
def test_kuu_is_positive_definite(order: int) -> None:
    for num_frequencies in (1, 10, 100):
        kuu = features(order, num_frequencies).kuu()
        torch.testing.assert_close(kuu, kuu.mT, rtol=0, atol=0)
        assert torch.linalg.eigvalsh(kuu / kuu.diagonal().sqrt().outer(kuu.diagonal().sqrt())).min() > 0


def test_stream_is_the_batch_and_near_the_exact_gp() -> None:
    x = torch.rand(200, dtype=torch.float64) * 4
    y = torch.sin(3 * x) + 0.1 * torch.randn(200, dtype=torch.float64)
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.01
    make = lambda: VariationalFourier(161, 0.0, 4.0, kernel(2), likelihood, margin=1.0)  # noqa: E731
    stream, batch, exact = make(), make(), Exact(kernel(2), likelihood)
    for part in torch.arange(200).split(50):
        stream.update(x[part], y[part])
    batch.update(x, y)
    exact.update(x, y)
    z = torch.linspace(0, 4, 50, dtype=torch.float64)
    for a, b, c in zip(stream.predict(z), batch.predict(z), exact.predict(z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a, c, rtol=2e-3, atol=2e-3)


def test_refuses_what_lies_beyond_the_interval_and_other_kernels() -> None:
    with pytest.raises(ValueError, match=r"x: expected times in \[-1, 3\], got 0 to 4"):
        features(1).values(torch.tensor([0.0, 4.0]))
    with pytest.raises(TypeError, match="expected a scaled MaternKernel, got RBFKernel"):
        VariationalFourier(11, 0.0, 1.0, ScaleKernel(RBFKernel()), GaussianLikelihood())


def test_interval_is_students() -> None:
    # t with 4 degrees of freedom: 2.776
    made = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert made.mean == 3.0 and made.half == pytest.approx(2.7764451 * math.sqrt(2.5) / math.sqrt(5))
    assert paired([2.0, 3.0, 4.1], [1.0, 2.0, 3.0]).verdict == "worse"
    assert paired([1.0, 2.0, 3.0], [2.0, 3.0, 4.1]).verdict == "better"
    assert paired([1.0, 2.0, 3.0], [2.0, 1.0, 3.5]).verdict == "level"
    assert interval([1.0]).verdict == "not decided" and str(interval([])) == "–"
