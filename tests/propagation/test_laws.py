"""Every law of a matrix of weights against its covariance, written out entry by entry."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gpseq.propagation.laws import Dense, Diagonal, Kronecker, KroneckerLaplace, Law, LowRank

KINDS = ["diagonal", "kronecker", "laplace", "dense", "lowrank"]
sizes = st.integers(1, 4)


def covariance(size, generator):
    root = torch.randn(size, size + 1, generator=generator, dtype=torch.float64)
    return root @ root.mT


def make(kind, rows, columns, seed=0):
    """A law of ``(rows, columns)`` and its covariance ``(rows, columns, rows, columns)``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    if kind == "diagonal":
        entries = torch.rand(shape, generator=generator, dtype=torch.float64)
        return Diagonal(entries), torch.diag(entries.flatten()).view(*shape, *shape)
    if kind == "lowrank":
        entries = torch.rand(shape, generator=generator, dtype=torch.float64)
        vectors = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        outer = sum(torch.outer(v.flatten(), v.flatten()) for v in vectors)
        return LowRank(vectors, entries), (torch.diag(entries.flatten()) + outer).view(*shape, *shape)
    if kind == "dense":
        dense = covariance(rows * columns, generator).view(*shape, *shape)
        return Dense(dense), dense
    outputs, inputs = covariance(rows, generator), covariance(columns, generator)
    if kind == "kronecker":
        return Kronecker(outputs, inputs), torch.kron(outputs, inputs).view(*shape, *shape)
    precision = torch.tensor(0.7, dtype=torch.float64)
    (b, u), (a, v) = torch.linalg.eigh(outputs), torch.linalg.eigh(inputs)
    whole = torch.kron(outputs, inputs) + precision * torch.eye(rows * columns, dtype=torch.float64)
    return KroneckerLaplace(u, b, v, a, precision), torch.linalg.inv(whole).view(*shape, *shape)


def inputs(batch, tokens, size, seed=1):
    """Means ``(B, T, D)`` and a covariance ``(B, T, D, T, D)`` of what a matrix multiplies."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(batch, tokens, size, generator=generator, dtype=torch.float64)
    blocks = [covariance(tokens * size, generator) for _ in range(batch)]
    return mean, torch.stack(blocks).view(batch, tokens, size, tokens, size)


def noise(dense, mean, spread):
    r"""The definition, :math:`\sum_{ij} \operatorname{Cov}(W_{ki}, W_{lj}) \mathrm E[a_{ti} a_{sj}]`."""
    second = torch.einsum("bti,bsj->btisj", mean, mean)
    return torch.einsum("kilj,btisj->btksl", dense, second if spread is None else second + spread)


def check(law, dense, seed=1):
    """All that a law says of noise against the definition."""
    rows, columns = dense.shape[:2]
    assert law.shape == (rows, columns)
    torch.testing.assert_close(law.marginals(), dense.flatten(2).flatten(0, 1).diagonal().view(rows, columns))
    mean, spread = inputs(2, 3, columns, seed)
    blocks = torch.stack([spread[:, t, :, t] for t in range(3)], 1)
    independent = torch.diag_embed(blocks.diagonal(dim1=-2, dim2=-1))
    for own in (None, spread):
        expected = noise(dense, mean, own)
        torch.testing.assert_close(law.tokens(mean, own), expected)
        each = torch.stack([expected[:, t, :, t] for t in range(3)], 1)
        torch.testing.assert_close(law.blocks(mean, None if own is None else blocks), each)
        if own is not None:
            alone = torch.zeros_like(spread)
            for t in range(3):
                alone[:, t, :, t] = independent[:, t]
            expected = noise(dense, mean, alone)
            each = torch.stack([expected[:, t, :, t] for t in range(3)], 1)
        variance = None if own is None else blocks.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(law.variance(mean, variance), each.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("kind", KINDS)
@given(rows=sizes, columns=sizes, seed=st.integers(0, 99))
def test_noise_is_that_of_the_dense_covariance(kind, rows, columns, seed):
    check(*make(kind, rows, columns, seed))


@pytest.mark.parametrize("kind", KINDS)
@given(rows=sizes, columns=sizes, data=st.data())
def test_rows_and_the_transpose(kind, rows, columns, data):
    law, dense = make(kind, rows, columns)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part = dense[start:stop, :, start:stop]
    check(law.rows(start, stop), part)
    check(law.transposed(), dense.permute(1, 0, 3, 2))
    check(law.rows(start, stop).transposed(), part.permute(1, 0, 3, 2))
    check(law.transposed().transposed().rows(start, stop), part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.3, torch.tensor(4.0, dtype=torch.float64)])
def test_scaled(kind, factor):
    law, dense = make(kind, 3, 2)
    check(law.scaled(factor), dense * factor)


@pytest.mark.parametrize("kind", KINDS)
def test_covariances_of_single_entries(kind):
    law, dense = make(kind, 3, 4)
    places = torch.tensor([[0, 5, 5], [11, 2, 7]])
    flat = dense.reshape(12, 12)
    expected = torch.stack([flat[row][:, row] for row in places])
    torch.testing.assert_close(law.between(places), expected)


@given(rows=sizes, columns=sizes, seed=st.integers(0, 99))
def test_the_eigenbases_are_the_inverse(rows, columns, seed):
    law, dense = make("laplace", rows, columns, seed)
    # W -> W a for a = e_j reads the columns of the matrix, and all of its covariance.
    found = law.tokens(torch.eye(columns, dtype=torch.float64).unsqueeze(0))[0].permute(1, 0, 3, 2)
    assert (found - dense).abs().max() < 1e-12 * dense.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_draws(kind):
    law, dense = make(kind, 2, 3)
    like = torch.zeros((), dtype=torch.float64)
    drawn = law.draw(20_000, torch.Generator().manual_seed(0), like)
    entries = drawn.dense()
    assert entries.shape == (20_000, 2, 3)
    flat = entries.flatten(1)
    scale = dense.reshape(6, 6).diagonal().sqrt()
    error = (flat.mT @ flat - dense.reshape(6, 6)) / torch.outer(scale, scale)
    assert error.abs().max() < 0.05
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(drawn.times(x), torch.einsum("rkd,btd->rbtk", entries, x))
    torch.testing.assert_close(drawn.transposed().dense(), entries.mT)
    y = torch.randn(7, 2, dtype=torch.float64)
    torch.testing.assert_close(drawn.transposed().times(y), torch.einsum("rkd,nk->rnd", entries, y))
    places = torch.tensor([[0, 5], [3, 3]])
    torch.testing.assert_close(drawn.at(places), flat[:, places])


@pytest.mark.parametrize("kind", KINDS)
def test_draws_repeat_with_their_seed(kind):
    law, _ = make(kind, 2, 3)
    like = torch.zeros((), dtype=torch.float32)
    first, second = (law.draw(4, torch.Generator().manual_seed(3), like).dense() for _ in range(2))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "laplace"])
def test_draws_of_rows_and_of_the_transpose(kind):
    law, dense = make(kind, 3, 2)
    like = torch.zeros((), dtype=torch.float64)
    part = law.rows(1, 3).transposed().draw(20_000, torch.Generator().manual_seed(0), like).dense().flatten(1)
    expected = dense[1:, :, 1:].permute(1, 0, 3, 2).reshape(4, 4)
    torch.testing.assert_close(part.mT @ part, expected, atol=0.05 * expected.diagonal().max().item(), rtol=0)


def test_independent_draws_have_the_variances_exactly():
    law, _ = make("diagonal", 3, 4)
    drawn = law.draw(5, torch.Generator().manual_seed(0), law.entries)
    torch.testing.assert_close(drawn.dense().square().sum(0), law.entries)


@pytest.mark.parametrize("kind", KINDS)
def test_singular_covariances(kind):
    """Nothing is uncertain, or one direction is: no NaN."""
    like = torch.zeros((), dtype=torch.float64)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    one = torch.ones(2, 2, dtype=torch.float64)
    made = {
        "diagonal": [Diagonal(zero)],
        "lowrank": [LowRank(zero.unsqueeze(0), zero), LowRank(one.unsqueeze(0), zero)],
        "dense": [Dense(torch.zeros(2, 2, 2, 2, dtype=torch.float64)), Dense(torch.ones(2, 2, 2, 2).double())],
        "kronecker": [Kronecker(zero, one), Kronecker(one, one)],
        "laplace": [KroneckerLaplace(torch.eye(2).double(), zero[0], torch.eye(2).double(), zero[0], like + 2)],
    }[kind]
    for law in made:
        drawn = law.draw(6, torch.Generator().manual_seed(0), like).dense()
        assert drawn.isfinite().all()
        assert law.marginals().isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_device(kind, dtype):
    law, _ = make(kind, 2, 3)
    moved = law.to(torch.zeros((), dtype=dtype))
    assert moved.variance(torch.ones(3, dtype=dtype)).dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(moved.marginals().double(), law.marginals(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "columns", "number"), [(6, 8, 4), (5, 7, 3), (3, 2, 8), (1, 9, 4), (9, 1, 4), (4, 5, 60)]
)
def test_all_products_of_draws_are_those_of_the_matrices(rows, columns, number, dtype):
    torch.manual_seed(rows)
    law = Diagonal(torch.rand(rows, columns, dtype=dtype))
    drawn = law.draw(number, None, law.entries)
    for draws, width in ((drawn, columns), (drawn.transposed(), rows)):
        matrices = draws.dense()
        assert matrices.shape[0] == len(draws) == number
        x = torch.randn(2, 3, width, dtype=dtype)
        torch.testing.assert_close(draws.times(x), torch.einsum("rkd,btd->rbtk", matrices, x))
        places = torch.randint(rows * columns, (4, 5))
        torch.testing.assert_close(draws.at(places), matrices.flatten(1)[:, places])
        torch.testing.assert_close(draws.some(1, 3), matrices[1:3])
    # Each entry is in one of the draws, with all of its deviation.
    torch.testing.assert_close(drawn.dense().square().sum(0), law.entries)
    assert (drawn.dense() != 0).sum(0).eq(1).all()


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "laplace"])
def test_draws_are_transposed_once(kind):
    """What the parts of a batch share, they share for weights that are stored with the inputs first, too."""
    law, dense = make(kind, 3, 2)
    drawn = law.draw(4, torch.Generator().manual_seed(0), dense)
    assert drawn.transposed() is drawn.transposed()
    torch.testing.assert_close(drawn.transposed().transposed().dense(), drawn.dense())


@pytest.mark.parametrize("name", ["marginals", "between"])
def test_a_law_knows_its_entries(name):
    known = {each: None for each in Law.__abstractmethods__ if each != name}
    with pytest.raises(TypeError, match=name):
        type("Unknown", (Law,), known)()


def test_draws_scatter_as_much_as_draws_of_all_entries_would():
    torch.manual_seed(0)
    law, x, along = Diagonal(torch.rand(32, 48).double()), torch.randn(5, 48).double(), torch.randn(32).double()
    exact = torch.einsum("k,ti,ki,si->ts", along**2, x, law.entries, x)
    made = torch.stack([law.draw(8, None, x).times(x) @ along for _ in range(600)])  # (S, R, T)
    found = made.mT @ made
    torch.testing.assert_close(found.mean(0).diagonal(), exact.diagonal(), rtol=0.08, atol=0)
    scatter = (found.std(0) / exact).diagonal()
    torch.testing.assert_close(scatter, torch.full_like(scatter, 0.5), rtol=0.2, atol=0)  # the root of 2 / R
