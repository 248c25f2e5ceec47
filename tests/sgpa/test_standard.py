"""The standard posterior is a stock SVGP whose inducing points are the sequence's keys."""

import gpytorch
import pytest
import torch

from gpseq.sgpa import standard_posterior
from tests.oracles_sgpa import base_kernel, gaussian_divergence, problem


class Kernel(gpytorch.kernels.Kernel):
    """One head's kernel by its formula, for GPyTorch."""

    has_lengthscale = False

    def __init__(self, name, lengthscale, variance):
        super().__init__()
        self.name, self.length, self.scale = name, lengthscale, variance

    def forward(self, x1, x2, diag=False, **params):
        k = base_kernel(self.name, x1, x2, self.length, self.scale)
        return k.diagonal(dim1=-2, dim2=-1) if diag else k


class Stock(gpytorch.models.ApproximateGP):
    def __init__(self, strategy, points, kernel, mean, covariance):
        q = gpytorch.variational.CholeskyVariationalDistribution(len(points))
        super().__init__(strategy(self, points, q, learn_inducing_locations=False, jitter_val=0.0))
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel
        self.double()
        q.variational_mean.data.copy_(mean)
        q.chol_variational_covar.data.copy_(torch.linalg.cholesky(covariance))
        self.variational_strategy.variational_params_initialized.fill_(1)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def case(queries=4):
    p = problem(batch=(2,), queries=queries, tokens=5)
    tril = 0.3 * torch.randn(2, 2, 2, 5, 5, dtype=torch.float64).tril(-1)
    return p, tril + torch.diag_embed(0.5 + torch.rand(2, 2, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
@pytest.mark.parametrize("queries", [4, None])
def test_it_is_the_dense_posterior(kernel, queries):
    p, tril = case(queries)
    options = {"kernel": kernel, "jitter": 0.0, "output": "full"}
    post = standard_posterior(*p[:3], tril, *p[6:], **options)
    for b in range(2):
        for h in range(2):
            x, a = p.query[b, h], p.key[b, h]
            k_aa, k_xa, k_xx = (
                base_kernel(kernel, one, other, p.lengthscale[h], p.variance[h])
                for one, other in ((a, a), (x, a), (x, x))
            )
            root = torch.linalg.cholesky(k_aa)
            weights = torch.linalg.solve(k_aa, k_xa.mT).mT
            for d in range(2):
                s = root @ tril[b, h, d] @ tril[b, h, d].mT @ root.mT
                mean = k_aa @ p.value[b, h, :, d]
                tolerance = {"rtol": 1e-7, "atol": 1e-8}
                torch.testing.assert_close(post.mean[b, h, :, d], weights @ mean, **tolerance)
                wanted = k_xx + weights @ (s - k_aa) @ weights.mT
                torch.testing.assert_close(post.covariance[b, h, d], wanted, **tolerance)
                torch.testing.assert_close(post.variance[b, h, d], wanted.diagonal(), **tolerance)
                torch.testing.assert_close(post.kl_amortised[b, h, d], gaussian_divergence(mean, s, k_aa), **tolerance)
    assert post.kl_global.shape == (2, 2) and post.kl_global.abs().max() == 0
    diagonal = standard_posterior(*p[:3], tril, *p[6:], kernel=kernel, jitter=0.0)
    torch.testing.assert_close(diagonal.variance, post.variance)
    assert diagonal.covariance is None
    only = standard_posterior(*p[:3], tril, *p[6:], kernel=kernel, jitter=0.0, output="mean")
    assert only.variance is None and torch.equal(only.mean, post.mean)


@pytest.mark.parametrize("kernel", ["rbf", "exponential"])
@pytest.mark.parametrize("whitened", [True, False])
def test_it_is_the_stock_strategy(kernel, whitened):
    p, tril = case()
    post = standard_posterior(*p[:3], tril, *p[6:], kernel=kernel, jitter=0.0)
    b, h, d = 1, 0, 1
    points, s = p.key[b, h], tril[b, h, d] @ tril[b, h, d].mT
    k_aa = base_kernel(kernel, points, points, p.lengthscale[h], p.variance[h])
    root, mean = torch.linalg.cholesky(k_aa), k_aa @ p.value[b, h, :, d]
    if whitened:
        strategy = gpytorch.variational.VariationalStrategy
        mean = torch.linalg.solve_triangular(root, mean.unsqueeze(-1), upper=False).squeeze(-1)
    else:
        strategy, s = gpytorch.variational.UnwhitenedVariationalStrategy, root @ s @ root.mT
    module = Kernel(kernel, p.lengthscale[h], p.variance[h])
    with gpytorch.settings.variational_cholesky_jitter(double_value=0.0):
        model = Stock(strategy, points, module, mean, s)
        model.train()
        out = model(p.query[b, h])
        divergence = model.variational_strategy.kl_divergence()
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(post.mean[b, h, :, d], out.mean, **tolerance)
    torch.testing.assert_close(post.variance[b, h, d], out.variance, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(post.kl_amortised[b, h, d], divergence, **tolerance)


def test_dtypes(dtype):
    p = problem(batch=(), tokens=3, dtype=dtype)
    post = standard_posterior(*p[:3], torch.eye(3), *p[6:], output="full")
    assert post.mean.dtype == post.variance.dtype == post.covariance.dtype == post.kl_amortised.dtype == dtype
    short = standard_posterior(*(t.bfloat16() for t in p[:3]), torch.eye(3), *p[6:])
    assert short.mean.dtype == torch.bfloat16 and short.variance.dtype == torch.float32


def test_what_does_not_fit_is_named():
    p = problem(batch=(), tokens=3)
    wanted = r"scale_tril: expected a shape that broadcasts to \(2, 2, 3, 3\), got \(4, 4\)"
    with pytest.raises(ValueError, match=wanted):
        standard_posterior(*p[:3], torch.eye(4), *p[6:])
    with pytest.raises(ValueError, match="kernel: expected one of"):
        standard_posterior(*p[:3], torch.eye(3), *p[6:], kernel="laplace")
