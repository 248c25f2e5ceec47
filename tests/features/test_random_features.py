"""Random Fourier features against the kernels that they stand for."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from torch import Tensor

from gpseq.features.random_features import RandomFeatures

F64 = torch.float64


def with_values(kernel: Kernel, low: float = 0.5) -> Kernel:
    columns = kernel.ard_num_dims or 1
    kernel.lengthscale = low + 0.4 * torch.arange(columns)
    return kernel


def scaled(kernel: Kernel, outputscale: float, **options: object) -> ScaleKernel:
    outer = ScaleKernel(kernel, **options)
    outer.outputscale = outputscale
    return outer


KERNELS: dict[str, Callable[[], Kernel]] = {
    "rbf": lambda: with_values(RBFKernel()),
    "rbf, ard": lambda: with_values(RBFKernel(ard_num_dims=3)),
    "rbf, two columns": lambda: with_values(RBFKernel(ard_num_dims=2, active_dims=[2, 0])),
    "matern 1/2": lambda: with_values(MaternKernel(0.5)),
    "matern 3/2, ard": lambda: with_values(MaternKernel(1.5, ard_num_dims=3)),
    "matern 5/2": lambda: with_values(MaternKernel(2.5)),
    "scaled": lambda: scaled(with_values(MaternKernel(1.5)), 2.5),
    "scaled, one column inside": lambda: scaled(with_values(RBFKernel(active_dims=1)), 0.3),
    "scaled, one column outside": lambda: scaled(with_values(RBFKernel()), 0.3, active_dims=[1]),
    "scaled twice": lambda: scaled(scaled(with_values(RBFKernel(active_dims=[0, 2])), 0.5), 3.0),
}


def variance(kernel: Kernel) -> float:
    return kernel(torch.zeros(1, 3)).to_dense().item()


def inputs(n: int = 12) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(5), dtype=F64)


@pytest.mark.parametrize("name", KERNELS)
def test_they_converge_to_the_kernel_as_the_root_of_their_number(name: str, dtype: torch.dtype) -> None:
    kernel = KERNELS[name]().to(dtype)
    x = inputs()
    exact = deepcopy(kernel).double()(x).to_dense()
    scale = variance(kernel)
    errors = []
    for number in (200, 3200, 51200):
        draws = [RandomFeatures(kernel, 3, number) for _ in range(3)]
        difference = torch.stack([psi(x) @ psi(x).mT - exact for psi in draws]) / scale
        # An entry is a mean of cosines, whose variance is at most 1.
        assert difference.abs().max() < 5 / number**0.5
        errors.append(difference.square().mean().sqrt().item())
    # Sixteen times as many, a quarter of the error.
    assert 2.5 < errors[0] / errors[1] < 6.5
    assert 2.5 < errors[1] / errors[2] < 6.5


@pytest.mark.parametrize("name", KERNELS)
def test_the_variance_is_exact(name: str, dtype: torch.dtype) -> None:
    kernel = KERNELS[name]().to(dtype)
    psi = RandomFeatures(kernel, 3, num_frequencies=7)
    values = psi(inputs().to(dtype) * 100)
    assert values.shape == (12, 14) and values.dtype == F64
    expected = torch.full((12,), variance(deepcopy(kernel).double()), dtype=F64)
    torch.testing.assert_close(values.square().sum(-1), expected, rtol=1e-13, atol=0)


def test_a_matern_frequency_has_one_heavy_tail_for_all_columns() -> None:
    # In several dimensions a product of Student-t would be another kernel; norms of large ones tell them apart.
    psi = RandomFeatures(with_values(MaternKernel(0.5), 1.0), 2, 20000)
    norms = psi.frequencies.norm(dim=-1)
    # The norm of a bivariate Cauchy is larger than r with probability (1 + r^2)^-1/2.
    for r in (0.5, 1.0, 5.0, 50.0):
        expected = (1 + r * r) ** -0.5
        assert abs((norms > r).double().mean().item() - expected) < 5 * (expected / 20000) ** 0.5


def test_columns_that_the_kernel_does_not_see_change_nothing() -> None:
    psi = RandomFeatures(with_values(RBFKernel(active_dims=[2, 0])), 3, 10)
    x = inputs()
    other = x.clone()
    other[:, 1] += 3
    assert torch.equal(psi(x), psi(other))
    assert not torch.equal(psi(x), psi(other.flip(-1)))


def test_batches_and_gradients_go_through() -> None:
    psi = RandomFeatures(with_values(MaternKernel(2.5)), 2, 5)
    x = torch.randn(4, 1, 3, 2)
    values = psi(x)
    assert values.shape == (4, 1, 3, 10)
    torch.testing.assert_close(values[2, 0], psi(x[2, 0]), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(psi, (torch.randn(3, 2, dtype=F64, requires_grad=True),))
    line = RandomFeatures(RBFKernel(), 1, 5)
    assert torch.equal(line(torch.arange(3.0)), line(torch.arange(3.0)[:, None]))
    assert not list(psi.parameters())
    assert not values.requires_grad


def test_they_are_frozen() -> None:
    kernel = scaled(with_values(RBFKernel()), 2.0)
    psi = RandomFeatures(kernel, 2, 5)
    x = torch.randn(3, 2)
    before = psi(x)
    kernel.outputscale, kernel.base_kernel.lengthscale = 1.0, 3.0
    assert torch.equal(psi(x), before)


def test_a_generator_is_followed_and_the_default_one_is_left_alone() -> None:
    kernel = with_values(MaternKernel(1.5))
    source = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    before = torch.get_rng_state()
    one, two = (RandomFeatures(kernel, 2, 9, source()) for _ in range(2))
    assert one.same_as(two) and torch.equal(one.frequencies, two.frequencies)
    assert torch.equal(before, torch.get_rng_state())
    three = RandomFeatures(kernel, 2, 9)
    assert not one.same_as(three)
    assert not torch.equal(before, torch.get_rng_state())
    assert not one.same_as(RandomFeatures(scaled(kernel, 2.0), 2, 9, source()))


def test_casts_leave_them_alone() -> None:
    psi = RandomFeatures(scaled(RBFKernel(), 0.7), 2, 4)
    before = {name: value.clone() for name, value in psi.state_dict().items()}
    for cast in (psi.float(), psi.half(), psi.to(torch.float32), deepcopy(psi)):
        for name, value in cast.state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_a_saved_state_decides_their_number() -> None:
    saved = RandomFeatures(scaled(RBFKernel(), 0.7), 2, 9)
    fresh = RandomFeatures(RBFKernel(), 2, 4)
    fresh.load_state_dict(saved.state_dict())
    assert fresh.same_as(saved)
    assert fresh.num_outputs == 18
    fresh.frequencies.zero_()
    assert not saved.frequencies.eq(0).any()


class Mine(RBFKernel):
    """May compute anything."""


@pytest.mark.parametrize(
    "kernel",
    [
        PeriodicKernel(),
        LinearKernel(),
        RBFKernel() + RBFKernel(),
        RBFKernel() * RBFKernel(),
        Mine(),
        ScaleKernel(PeriodicKernel()),
        RBFKernel(batch_shape=torch.Size([2])),
        ScaleKernel(RBFKernel(), batch_shape=torch.Size([2])),
        ScaleKernel(MaternKernel(1.5, batch_shape=torch.Size([1]))),
        torch.nn.Linear(2, 2),
        None,
    ],
    ids=lambda kernel: type(kernel).__name__,
)
def test_other_kernels_are_refused(kernel: Kernel) -> None:
    with pytest.raises(TypeError, match="kernel: expected RBFKernel or MaternKernel"):
        RandomFeatures(kernel, 2)


def test_bad_arguments_are_named() -> None:
    for kernel in (RBFKernel(ard_num_dims=3), RBFKernel(active_dims=2), RBFKernel(ard_num_dims=2, active_dims=0)):
        with pytest.raises(ValueError, match="kernel: expected one for 2 input columns"):
            RandomFeatures(kernel, 2)
    for name in ("num_dims", "num_frequencies"):
        good: dict[str, Any] = {"num_dims": 2, "num_frequencies": 5}
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            RandomFeatures(RBFKernel(), **(good | {name: 0}))
        with pytest.raises(TypeError, match=f"{name}: expected an integer, got 1.5"):
            RandomFeatures(RBFKernel(), **(good | {name: 1.5}))
    psi = RandomFeatures(RBFKernel(), 2, 5)
    with pytest.raises(ValueError, match="x: expected 2 input columns"):
        psi(torch.zeros(3, 3))
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        psi(torch.zeros(3, 2, dtype=torch.int64))


def test_it_says_what_it_is() -> None:
    assert repr(RandomFeatures(RBFKernel(), 2, 5)) == "RandomFeatures(num_dims=2, num_frequencies=5)"
