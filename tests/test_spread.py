"""Spread beyond what test_predictive.py asks of it: each form against its dense matrix."""

import pytest
import torch
from linear_operator.operators import DiagLinearOperator, RootLinearOperator

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
