"""Orders of a chunk against brute force."""

import math
from typing import Any

import pytest
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import orderings

F64 = torch.float64


def brute_force(x: Tensor, kernel: Kernel, last: Tensor | None, farthest: bool) -> list[int]:
    """The rule, one pair of points at a time."""
    value = lambda a, b: kernel(a[None], b[None]).to_dense().item()  # noqa: E731
    here = torch.zeros(x.shape[-1], dtype=F64) if last is None else last
    left, order = list(range(len(x))), []
    while left:
        scores = [value(x[i], here) for i in left]
        best = left[scores.index(min(scores) if farthest else max(scores))]
        left.remove(best)
        order.append(best)
        here = x[best]
    return order


KERNELS = {
    "rbf": lambda: ScaleKernel(RBFKernel(ard_num_dims=2)),
    "matern": lambda: MaternKernel(1.5),
    "one column": lambda: RBFKernel(active_dims=1),
    "linear, not stationary": lambda: LinearKernel() + RBFKernel(),
}


@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("dense", [0, 100], ids=["by rows", "dense"])
@pytest.mark.parametrize("name", KERNELS)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000), goes_on=st.booleans())
def test_kernel_greedy_is_the_rule(name: str, dense: int, farthest: bool, n: int, seed: int, goes_on: bool) -> None:
    kernel = KERNELS[name]().double()
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=source, dtype=F64)
    last = torch.randn(2, generator=source, dtype=F64) if goes_on else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orderings, "_DENSE", dense)
        order = orderings.kernel_greedy(x, kernel, last, farthest)
    assert order.dtype == torch.int64
    assert order.tolist() == brute_force(x, kernel, last, farthest)


def test_kernel_greedy_visits_every_point_though_all_are_alike() -> None:
    x = torch.zeros(5, 2)
    assert orderings.kernel_greedy(x, RBFKernel()).tolist() == [0, 1, 2, 3, 4]
    assert orderings.kernel_greedy(x[:0], RBFKernel()).tolist() == []


def test_kernel_greedy_leaves_float32_kernels_as_they_are() -> None:
    kernel = RBFKernel()
    x = torch.randn(50, 3)
    assert torch.equal(orderings.kernel_greedy(x, kernel), orderings.kernel_greedy(x.double(), kernel.double()))
    assert not orderings.kernel_greedy(x, kernel).requires_grad


def test_kernel_greedy_walks_along_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randperm(1000).double()[:, None] / 1000
    expected = orderings.kernel_greedy(x, MaternKernel(0.5))
    monkeypatch.setattr(orderings, "_DENSE", 999)  # and by rows
    order = orderings.kernel_greedy(x, MaternKernel(0.5))
    assert torch.equal(x[order], x.sort(dim=0).values)
    assert torch.equal(order, expected)


def test_kernels_without_one_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel: .*batch shape, got \(3,\)"):
        orderings.kernel_greedy(torch.zeros(4, 1), RBFKernel(batch_shape=torch.Size([3])))
    kernel = RBFKernel()
    kernel.raw_lengthscale.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"kernel: .*NaN"):
        orderings.kernel_greedy(torch.ones(4, 1), kernel)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=20))
def test_oracle_is_a_stable_sort(rows: list[tuple[int, int]]) -> None:
    x = torch.tensor(rows, dtype=F64).reshape(-1, 2)
    for column in (0, 1, -1):
        assert orderings.oracle(x, column).tolist() == sorted(range(len(rows)), key=lambda i: rows[i][column])
    squares = [a * a + b * b for a, b in rows]
    by_norm = orderings.oracle(x, lambda x: x.square().sum(-1))
    assert by_norm.tolist() == sorted(range(len(rows)), key=lambda i: squares[i])


def test_bad_keys_are_named() -> None:
    x = torch.zeros(3, 2)
    for key in (2, -3):
        with pytest.raises(ValueError, match=f"key: expected one of 2 input columns, got {key}"):
            orderings.oracle(x, key)
    no_columns: list[Any] = [0.5, True, "time", None]
    for wrong in no_columns:
        with pytest.raises(TypeError, match="key: expected the number of a column"):
            orderings.oracle(x, wrong)
    with pytest.raises(ValueError, match=r"key: .* returns shape \(3,\), got \(3, 2\)"):
        orderings.oracle(x, lambda x: x)
    with pytest.raises(ValueError, match=r"key: .* returns shape \(3,\), got list"):
        orderings.oracle(x, lambda x: [0, 1, 2])  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"key: .*NaN"):
        orderings.oracle(x, lambda x: x[:, 0] / 0)


def test_random_is_uniform_and_follows_its_generator() -> None:
    source = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    assert torch.equal(orderings.random(20, source()), orderings.random(20, source()))
    before = torch.get_rng_state()
    orderings.random(20, source())
    assert torch.equal(before, torch.get_rng_state())
    orderings.random(20)
    assert not torch.equal(before, torch.get_rng_state())
    firsts = torch.stack([orderings.random(4) for _ in range(2000)])[:, 0].bincount()
    assert (firsts - 500).abs().max() < 100  # 5 standard deviations
    assert orderings.random(0).tolist() == []
