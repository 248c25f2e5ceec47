"""ExponentialKernel against its formula, and in the hands of GPyTorch."""

import io
from itertools import product

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

from gpseq.kernels import ExponentialKernel
from tests.oracles import close

F64 = torch.float64
BATCHES = [(), (3,), (3, 1)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def oracle(x: torch.Tensor, y: torch.Tensor, lengthscale: torch.Tensor) -> np.ndarray:
    """The formula in numpy, entry by entry, for one element of a batch."""
    a, b, scale = (v.detach().double().numpy() for v in (x, y, lengthscale))
    return np.array([[np.exp(np.sum(p / scale * (q / scale))) for q in b] for p in a])


@pytest.mark.parametrize(("kernel_batch", "x_batch", "ard"), list(product(BATCHES, BATCHES, (None, 2))), ids=str)
def test_is_its_formula(kernel_batch, x_batch, ard, dtype):
    kernel = ExponentialKernel(ard_num_dims=ard, batch_shape=torch.Size(kernel_batch)).to(dtype)
    kernel.lengthscale = 0.7 + draw(*kernel_batch, 1, ard or 1, seed=1).abs().to(dtype)
    x, y = draw(*x_batch, 4, 2, seed=2).to(dtype), draw(*x_batch, 3, 2, seed=3).to(dtype)
    batch = torch.broadcast_shapes(kernel_batch, x_batch)
    matrix, diagonal, lazy = kernel(x, y).to_dense(), kernel(x, diag=True), kernel(x)
    assert matrix.shape == (*batch, 4, 3) and diagonal.shape == (*batch, 4) and matrix.dtype == dtype
    tolerance = 1e-13 if dtype == F64 else 1e-5
    ls = kernel.lengthscale.expand(*batch, 1, ard or 1)
    for index in np.ndindex(*batch):
        a, b = x.expand(*batch, 4, 2)[index], y.expand(*batch, 3, 2)[index]
        close(matrix[index], oracle(a, b, ls[index][0]), tolerance)
        close(diagonal[index], oracle(a, a, ls[index][0]).diagonal(), tolerance)
    close(lazy.diagonal(dim1=-1, dim2=-2), diagonal, tolerance)
    close(lazy[..., 1:, :2].to_dense(), kernel(x).to_dense()[..., 1:, :2], tolerance)


def test_is_an_rbf_kernel_times_a_function_of_each_input():
    kernel, rbf, x = ExponentialKernel(ard_num_dims=2).double(), RBFKernel(ard_num_dims=2).double(), draw(6, 2)
    kernel.lengthscale = rbf.lengthscale = torch.tensor([[0.8, 1.7]], dtype=F64)
    weight = (0.5 * (x / kernel.lengthscale).square().sum(-1)).exp()
    close(kernel(x).to_dense(), weight[:, None] * rbf(x).to_dense() * weight, 1e-12)


def test_is_positive_definite_and_not_stationary():
    kernel, x = ExponentialKernel().double(), draw(8, 3)
    assert np.linalg.eigvalsh(kernel(x).to_dense().detach().numpy()).min() > 0
    assert kernel.is_stationary is False and ScaleKernel(kernel).is_stationary is False
    assert not torch.allclose(kernel(x, diag=True), kernel(x + 1.0, diag=True))


def test_the_softmax_scale_is_a_lengthscale():
    x, y = draw(5, 16), draw(7, 16, seed=1)
    kernel = ExponentialKernel().double()
    kernel.lengthscale = 16**0.25
    weights = kernel(x, y).to_dense()
    close(weights / weights.sum(-1, keepdim=True), torch.softmax(x @ y.mT / 4.0, -1), 1e-12)


def test_inside_other_kernels():
    x = draw(5, 3)
    kernel = ScaleKernel(ExponentialKernel(active_dims=(0, 2))).double()
    kernel.outputscale = torch.tensor(0.3, dtype=F64)
    inner = ExponentialKernel().double()(x[:, [0, 2]]).to_dense()
    close(kernel(x).to_dense(), 0.3 * inner, 1e-12)
    close(kernel(x, diag=True), 0.3 * inner.diagonal(), 1e-12)
    total = (ExponentialKernel().double() + RBFKernel().double())(x).to_dense()
    close(total, ExponentialKernel().double()(x).to_dense() + RBFKernel().double()(x).to_dense(), 1e-12)


def test_one_kernel_a_column():
    """`last_dim_is_batch`, asked of the forward as additive structure kernels do."""
    kernel, x, y = ExponentialKernel(ard_num_dims=3).double(), draw(2, 4, 3), draw(2, 5, 3, seed=1)
    kernel.lengthscale = torch.tensor([[0.5, 1.0, 2.0]], dtype=F64)
    got, diagonal = kernel.forward(x, y, last_dim_is_batch=True), kernel.forward(x, x, True, last_dim_is_batch=True)
    assert got.shape == (2, 3, 4, 5) and diagonal.shape == (2, 3, 4)
    for column, scale in enumerate((0.5, 1.0, 2.0)):
        a, b = x[..., column] / scale, y[..., column] / scale
        close(got[:, column], (a[:, :, None] * b[:, None, :]).exp(), 1e-12)
        close(diagonal[:, column], a.square().exp(), 1e-12)


def test_gradients():
    x, y = draw(4, 2).requires_grad_(), draw(3, 2, seed=1).requires_grad_()
    kernel = ExponentialKernel(ard_num_dims=2).double()

    def values(x: torch.Tensor, y: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kernel._parameters["raw_lengthscale"] = raw
        return kernel.forward(x, y), kernel.forward(x, x, diag=True)

    raw = torch.tensor([[0.3, 1.1]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(values, (x, y, raw))
    assert torch.autograd.gradgradcheck(values, (x, y, raw))


def test_an_exact_gp_learns_with_it(dtype):
    x = torch.linspace(-1, 1, 12, dtype=dtype)[:, None]
    y = (1.5 * x).exp().squeeze(-1)

    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood: gpytorch.likelihoods.Likelihood) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = ScaleKernel(ExponentialKernel())

        def forward(self, x: torch.Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(dtype)
    model = Model(likelihood).to(dtype)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -mll(model.train()(x), y)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] - 0.3
    assert (model.eval()(x + 1e-4).mean - y).abs().max() < 0.2


def test_state_and_bad_arguments():
    kernel = ExponentialKernel(ard_num_dims=2, batch_shape=torch.Size([3]))
    kernel.lengthscale = torch.rand(3, 1, 2) + 0.5
    buffer = io.BytesIO()
    torch.save(kernel.state_dict(), buffer)
    buffer.seek(0)
    other = ExponentialKernel(ard_num_dims=2, batch_shape=torch.Size([3]))
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other.lengthscale, kernel.lengthscale)
    close(kernel[1](torch.ones(2, 2)).to_dense(), kernel(torch.ones(2, 2)).to_dense()[1], 1e-6)
    with pytest.raises(RuntimeError, match="Expected the input to have 2 dimensionality"):
        kernel(torch.zeros(4, 3))


@pytest.mark.cuda
def test_on_a_gpu(dtype):
    kernel, x = ExponentialKernel(ard_num_dims=2).to(dtype), draw(6, 2).to(dtype)
    close(kernel.cuda()(x.cuda()).to_dense().cpu(), kernel.cpu()(x).to_dense(), 1e-5 if dtype != F64 else 1e-12)
