"""CastLinearOperator: the numbers of its base, rounded once, whatever is done with it."""

from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from linear_operator import LinearOperator, to_dense
from linear_operator.operators import (
    AddedDiagLinearOperator,
    CholLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
    TriangularLinearOperator,
)
from torch import Tensor

from gpseq.variational.cast import CastLinearOperator
from tests.oracles import close

F32, F64 = torch.float32, torch.float64
BATCHES = [(), (3,), (3, 1)]
Batch = tuple[int, ...]


def square(batch: Batch, n: int = 5) -> Tensor:
    root = torch.randn(*batch, n, n, dtype=F64)
    return root @ root.mT + torch.eye(n, dtype=F64)


def kernel_block(batch: Batch) -> LinearOperator:
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.raw_outputscale.requires_grad_(False)
    return kernel(torch.linspace(0, 3, 5, dtype=F64)[:, None].expand(*batch, 5, 1))


# What a posterior's covariance is made of, and more.
BASES: dict[str, Callable[[Batch], LinearOperator]] = {
    "dense": lambda b: DenseLinearOperator(square(b)),
    "diagonal": lambda b: DiagLinearOperator(torch.rand(*b, 5, dtype=F64) + 0.1),
    "root": lambda b: RootLinearOperator(torch.randn(*b, 5, 7, dtype=F64)),
    "cholesky": lambda b: CholLinearOperator(TriangularLinearOperator(torch.linalg.cholesky(square(b)))),
    "product": lambda b: MatmulLinearOperator(square(b), torch.eye(5, dtype=F64).expand(*b, 5, 5)),
    "kernel": kernel_block,
    "posterior": lambda b: SumLinearOperator(
        kernel_block(b), MatmulLinearOperator((a := torch.randn(*b, 5, 3, dtype=F64)), 0.1 * a.mT)
    ),
}


def pair(name: str, batch: Batch, dtype: torch.dtype = F32) -> tuple[CastLinearOperator, Tensor]:
    base = BASES[name](batch)
    return CastLinearOperator(base, dtype=dtype), to_dense(base).detach().clone()


def assert_is(operator: Any, expected: Tensor, dtype: torch.dtype = F32, tolerance: float = 1e-6) -> None:
    assert operator.dtype == dtype
    assert operator.shape == expected.shape
    dense = to_dense(operator)
    assert dense.dtype == dtype
    close(dense, expected, tolerance)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_values_are_rounded_once(name: str, batch: Batch) -> None:
    for dtype in (F32, torch.float16, F64):
        cast, dense = pair(name, batch, dtype)
        assert cast.dtype == dtype and cast.shape == dense.shape and cast.batch_shape == batch
        assert torch.equal(cast.to_dense(), dense.to(dtype))
        diagonal = cast.diagonal(dim1=-1, dim2=-2)
        assert diagonal.dtype == dtype
        close(diagonal, dense.diagonal(dim1=-1, dim2=-2), {F32: 1e-7, F64: 1e-15}.get(dtype, 1e-3))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_products(name: str, batch: Batch) -> None:
    cast, dense = pair(name, batch)
    for right in (torch.randn(5), torch.randn(5, 2), torch.randn(*batch, 5, 2)):
        out = cast @ right
        assert out.dtype == F32
        close(out, dense @ right.double(), 1e-6)
    left = torch.randn(2, 5)
    close(left @ cast, left.double() @ dense, 1e-6)
    close(cast.mT @ torch.ones(5, 1), dense.mT @ torch.ones(5, 1, dtype=F64), 1e-6)
    close((cast @ cast).to_dense(), dense @ dense, 1e-6)
    # The sum is formed in float64: cancellation costs nothing.
    cancelling = CastLinearOperator(DenseLinearOperator(torch.tensor([[1.0, -1.0 + 1e-9]], dtype=F64)), dtype=F32)
    assert (cancelling @ torch.ones(2, 1)).item() == pytest.approx(1e-9, rel=1e-5)


INDICES: list[Any] = [
    (..., slice(1, 4), slice(1, 4)),
    (..., slice(None, None, 2), slice(None, None, 2)),
    (..., slice(0, 2), slice(None)),
    (..., slice(None), slice(2, 5)),
    (..., torch.tensor([4, 0, 2]), slice(None)),
    (..., slice(None), torch.tensor([1, 1])),
    (..., torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])),
    (..., 2, slice(None)),
    (..., slice(None), 3),
    (..., 1, 2),
]


# Slicing a Cholesky operator is deprecated upstream, and a sliced diagonal makes torch remark on sparse tensors, once.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", [name for name in BASES if name != "cholesky"])
def test_slices(name: str, batch: Batch) -> None:
    cast, dense = pair(name, batch)
    indices = [*INDICES, *([(1,), (slice(0, 2),), (0, ..., slice(1, 3), slice(1, 3))] if batch else [])]
    for index in indices:
        part = cast[index]
        assert part.dtype == F32
        assert part.shape == dense[index].shape
        close(to_dense(part), dense[index], 1e-6)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_shapes(name: str, batch: Batch) -> None:
    cast, dense = pair(name, batch)
    assert_is(cast.mT, dense.mT)
    assert_is(cast.transpose(-1, -2), dense.mT)
    assert_is(cast.expand(4, *batch, 5, 5), dense.expand(4, *batch, 5, 5))
    assert_is(cast.unsqueeze(0), dense.unsqueeze(0))
    assert_is(cast.repeat(2, *[1] * len(batch), 1, 1), dense.repeat(2, *[1] * len(batch), 1, 1))
    if batch:
        close(to_dense(cast.sum(0)), dense.sum(0), 1e-6)
        assert cast.sum(0).dtype == F32
        assert_is(cast.unsqueeze(-3), dense.unsqueeze(-3))
    if len(batch) == 2:
        assert_is(cast.permute(1, 0, 2, 3), dense.permute(1, 0, 2, 3))
        assert_is(cast.squeeze(1), dense.squeeze(1))


@pytest.mark.parametrize("name", BASES)
def test_arithmetic(name: str) -> None:
    cast, dense = pair(name, (3,))
    eye = torch.eye(5, dtype=F64)
    assert_is(cast + DiagLinearOperator(torch.ones(5)), dense + eye)
    assert_is(cast.add_jitter(0.5), dense + 0.5 * eye)
    assert_is(cast.add_diagonal(torch.tensor(2.0)), dense + 2 * eye)
    assert isinstance(cast + DiagLinearOperator(torch.ones(5)), (AddedDiagLinearOperator, SumLinearOperator))
    assert_is(cast * 3.0, 3 * dense)
    assert_is(cast / 2.0, dense / 2)
    assert_is(cast * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), dense * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
    assert_is(cast + cast, 2 * dense)
    assert_is(cast + torch.ones(5, 5), dense + 1)
    close(cast.sum(), dense.sum(), 1e-5)
    close(cast.sum(-1), dense.sum(-1), 1e-5)


@pytest.mark.parametrize("name", ["dense", "diagonal", "cholesky", "product", "posterior"])
def test_factors_and_solves(name: str) -> None:
    cast, dense = pair(name, (3,))
    cast, dense = cast.add_jitter(1.0), dense + torch.eye(5)
    right = torch.randn(5, 2)
    factor = cast.cholesky()
    assert factor.dtype == F32
    close(to_dense(factor) @ to_dense(factor).mT, dense, 1e-5)
    root = cast.root_decomposition().to_dense()
    close(root, dense, 1e-5)
    close(cast.solve(right), torch.linalg.solve(dense, right.double()), 1e-4)
    close(cast.logdet(), dense.logdet(), 1e-4)
    quadratic, logdet = cast.inv_quad_logdet(right.expand(3, 5, 2), logdet=True)
    close(quadratic, (right.double().mT @ torch.linalg.solve(dense, right.double())).diagonal(0, 1, 2).sum(-1), 1e-4)
    close(logdet, dense.logdet(), 1e-4)


@pytest.mark.parametrize("how", ["to", "type", "method"])
@pytest.mark.parametrize("target", [F32, F64, torch.float16])
def test_it_can_be_cast_again(target: torch.dtype, how: str) -> None:
    cast, dense = pair("posterior", (3,))
    if how == "method":
        other = {F32: cast.float, F64: cast.double, torch.float16: cast.half}[target]()
    else:
        other = getattr(cast, how)(target)
    assert_is(other, dense, target, {F32: 1e-7, F64: 1e-15}.get(target, 1e-3))
    assert cast.dtype == F32


def test_copies_and_representation() -> None:
    cast, dense = pair("posterior", (3,))
    assert_is(cast.clone(), dense)
    assert_is(cast.detach(), dense)
    assert_is(cast.evaluate_kernel(), dense)
    assert_is(cast.representation_tree()(*cast.representation()), dense)
    base = DenseLinearOperator(square(()).requires_grad_())
    assert CastLinearOperator(base, dtype=F32).requires_grad
    assert not CastLinearOperator(base, dtype=F32).detach().requires_grad


# Gradients: what comes back is what the dense float32 matrix would send back.


@pytest.mark.parametrize("use", ["dense", "diagonal", "matmul", "slice", "log_prob", "rsample", "solve"])
def test_gradients(use: str) -> None:
    x, y, noise = torch.linspace(0, 2, 4, dtype=F64)[:, None], torch.randn(4), torch.randn(3, 4)
    kernel = ScaleKernel(RBFKernel()).double()
    factor = torch.randn(4, 2, dtype=F64).requires_grad_()

    def covariance() -> LinearOperator:
        return SumLinearOperator(kernel(x), MatmulLinearOperator(factor, 0.3 * factor.mT))

    def value(operator: Any) -> Tensor:
        dtype = operator.dtype
        if use == "dense":
            return to_dense(operator).square().sum()
        if use == "diagonal":
            return operator.diagonal(dim1=-1, dim2=-2).square().sum()
        if use == "matmul":
            return (operator @ y.to(dtype)).square().sum()
        if use == "slice":
            return to_dense(operator[..., 1:3, :2]).square().sum()
        operator = operator.add_jitter(0.1)
        if use == "solve":
            return operator.solve(y.to(dtype)[:, None]).square().sum()
        posterior = MultivariateNormal(torch.zeros(4, dtype=dtype), operator)
        if use == "log_prob":
            return posterior.log_prob(y.to(dtype))
        return posterior.rsample(torch.Size([3]), base_samples=noise.to(dtype)).pow(3).sum()

    gradients = []
    for make in (covariance, lambda: CastLinearOperator(covariance(), dtype=F32)):
        factor.grad = None
        kernel.zero_grad()
        out = value(make())
        out.backward()
        gradients.append([out.detach(), factor.grad, *(p.grad for p in kernel.parameters())])
    assert gradients[0][1].abs().max() > 0
    for mine, other in zip(gradients[1], gradients[0], strict=True):
        if other is None:  # a variance does not depend on a lengthscale
            assert use == "diagonal" and mine is None
        else:
            close(mine, other, 2e-4)


def test_a_posterior_in_float32() -> None:
    """The whole way that a user goes: noise, log density, samples, slices."""
    cast, dense = pair("posterior", ())
    posterior = MultivariateNormal(torch.zeros(5), cast)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    noisy = likelihood(posterior)
    assert noisy.mean.dtype == noisy.variance.dtype == noisy.covariance_matrix.dtype == F32
    y = torch.randn(5)
    expected = torch.distributions.MultivariateNormal(
        torch.zeros(5, dtype=F64), dense + likelihood.noise.double() * torch.eye(5)
    )
    close(noisy.log_prob(y), expected.log_prob(y.double()), 1e-5)
    assert noisy.rsample(torch.Size([4])).dtype == F32
    close(noisy[1:4].covariance_matrix, expected.covariance_matrix[1:4, 1:4], 1e-6)
    samples = noisy.rsample(torch.Size([40_000]))
    close(samples.mT.cov(), expected.covariance_matrix, 0.03)


def test_small_variances_survive() -> None:
    """1 - (1 - 1e-10) is 1e-10 in float64, and stays so when it is shown in float32."""
    base = SumLinearOperator(
        DiagLinearOperator(torch.ones(3, dtype=F64)), DiagLinearOperator(torch.full((3,), 1e-10 - 1, dtype=F64))
    )
    cast = CastLinearOperator(base, dtype=F32)
    torch.testing.assert_close(cast.diagonal(dim1=-1, dim2=-2), torch.full((3,), 1e-10), rtol=1e-5, atol=0)
    torch.testing.assert_close(cast.to_dense().diagonal(), torch.full((3,), 1e-10), rtol=1e-5, atol=0)
