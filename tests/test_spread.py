"""Spread beyond what test_predictive.py asks of it: each form against its dense matrix."""

import pytest
import torch
from linear_operator import settings
from linear_operator.operators import DiagLinearOperator, RootLinearOperator, SumLinearOperator
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning

from gpseq.spread import Spread

N, T, R = 3, 2, 2
E = N * T


def spreads(batch: tuple[int, ...]) -> dict[str, Spread]:
    diagonal = torch.rand(*batch, E, dtype=torch.float64) + 0.5
    root = torch.randn(*batch, E, R, dtype=torch.float64)
    lazy = RootLinearOperator(root).add_diagonal(diagonal) @ DiagLinearOperator(torch.ones_like(diagonal))
    return {
        "diagonal": Spread(diagonal),
        "root": Spread(root=root),
        "both": Spread(diagonal, root),
        "dense": Spread(matrix=root @ root.mT + torch.diag_embed(diagonal)),
        "lazy": Spread(matrix=lazy),
    }


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
@pytest.mark.parametrize("form", list(spreads(())))
def test_every_operation_is_that_of_the_dense_matrix(form, batch):
    spread = spreads(batch)[form]
    dense = spread.dense
    torch.testing.assert_close(spread.operator.to_dense(), dense)
    torch.testing.assert_close(spread.variance, dense.diagonal(dim1=-1, dim2=-2))
    order = torch.randperm(E)
    torch.testing.assert_close(spread.permuted(order).dense, dense[..., order, :][..., order])
    for interleaved in (True, False):
        blocks = spread.blocks(N, T, interleaved).dense
        for i in range(N):
            place = [i * T + a if interleaved else a * N + i for a in range(T)]
            torch.testing.assert_close(blocks[..., i, :, :], dense[..., place, :][..., place])
    wide = spread.expand(torch.Size([3, *batch]))
    torch.testing.assert_close(wide.dense, dense.expand(3, *dense.shape))
    # The columns that colour() makes of unit vectors are a root.
    root = spread.colour(torch.eye(spread.width, dtype=torch.float64).view(spread.width, *[1] * len(batch), -1))
    root = root.movedim(0, -1)
    torch.testing.assert_close(root @ root.mT, dense, rtol=1e-7, atol=1e-7)
    noise = torch.rand(*batch, E, dtype=torch.float64) + 0.1
    e = torch.randn(*batch, E, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(e), dense + torch.diag_embed(noise))
    torch.testing.assert_close(spread.log_density(e, noise), normal.log_prob(e))


def test_a_root_with_a_partly_zero_diagonal_takes_the_dense_way():
    diagonal, root = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([[1.0], [1.0], [0.5]])
    spread, e = Spread(diagonal, root), torch.tensor([0.3, -0.2, 1.0])
    normal = torch.distributions.MultivariateNormal(torch.zeros(3), spread.dense)
    torch.testing.assert_close(spread.log_density(e), normal.log_prob(e))


@pytest.mark.parametrize("graph", [False, True])
def test_rounding_on_the_scale_of_the_prior_is_mended(graph):
    """A posterior is a difference of large numbers: its rounding may be as large as itself."""
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    values = torch.tensor([-5e-6, -1e-6, 0.0, 1e-6, 5e-5, 1e-4], dtype=torch.float64)
    matrix = ((basis * values) @ basis.mT).float().requires_grad_(graph)
    nearest = (basis * values.clamp_min(0)) @ basis.mT
    with pytest.warns(NumericalWarning, match="negative eigenvalues down to -5e-06, by rounding in torch.float32"):
        root = Spread(matrix=matrix).colour(torch.eye(6)).T
    assert (root @ root.T - nearest).abs().max() < 1e-8
    assert root.requires_grad == graph
    if graph:
        root.square().sum().backward()
        assert matrix.grad.isfinite().all() and matrix.grad.abs().sum() > 0
    for values in ([0.0, -0.1], [1.0, -2e-3], [1e4, -11.0]):  # no rounding, absolute or relative
        with pytest.raises(NotPSDError, match="clearly negative"):
            Spread(matrix=torch.tensor(values).diag().requires_grad_(graph)).colour(torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_rank_matrices_in_half_precision_are_drawn(dtype):
    for _ in range(10):
        root = torch.randn(8, 3)
        matrix = (root @ root.T).to(dtype)
        made = Spread(matrix=matrix).colour(torch.eye(8).to(dtype)).double().T
        assert (made @ made.T - matrix.double()).abs().max() < 0.05 * matrix.abs().max()
    with pytest.raises(NotPSDError, match="clearly negative"):
        Spread(matrix=torch.tensor([[1.0, 0.0], [0.0, -0.1]], dtype=dtype)).colour(torch.eye(2).to(dtype))


def test_a_covariance_of_zeros_among_others_keeps_the_gradient():
    matrix = torch.stack([torch.zeros(2, 2), torch.eye(2)]).requires_grad_()
    made = Spread(matrix=matrix).colour(torch.ones(1, 1, 2))
    assert (made[0, 0] == 0).all() and torch.allclose(made[0, 1], torch.ones(2))
    made.sum().backward()
    assert (matrix.grad[0] == 0).all() and matrix.grad[1].abs().sum() > 0


def test_a_variance_is_not_negative():
    rounded = torch.tensor([1.0, -1e-5, 0.0])
    assert torch.equal(Spread(matrix=torch.diag(rounded)).variance, rounded.clamp_min(0))
    assert torch.equal(Spread.of(DiagLinearOperator(rounded)).diagonal, rounded.clamp_min(0))
    bad = torch.tensor([1.0, -0.1])
    with pytest.raises(NotPSDError, match=r"variances that are not negative, got -0\.1"):
        _ = Spread(matrix=torch.diag(bad)).variance
    for values, message in ((bad, "not negative, got -0.1"), (bad * torch.nan, "got NaN")):
        with pytest.raises(ValueError, match=f"covariance: expected .*{message}"):
            Spread.of(DiagLinearOperator(values))
    # A negative diagonal beside a root: the whole is a covariance all the same.
    root = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    whole = Spread.of(SumLinearOperator(RootLinearOperator(root), DiagLinearOperator(bad - 0.2)))
    torch.testing.assert_close(whole.dense, torch.diag(torch.tensor([1.8, 3.7])))
    torch.testing.assert_close(whole.colour(torch.eye(2)).square().sum(-2), torch.tensor([1.8, 3.7]), rtol=1e-5, atol=0)
    assert Spread(torch.tensor([torch.nan, 1.0])).colour(torch.ones(1, 2)).isnan().tolist() == [[True, False]]


def test_what_counts_as_rounding_is_no_setting_of_the_process():
    matrix = torch.tensor([1.0, -2e-3]).diag()
    with settings.cholesky_max_tries(9), settings.cholesky_jitter(float_value=1.0):
        with pytest.raises(NotPSDError, match="clearly negative"):
            Spread(matrix=matrix).colour(torch.eye(2))
