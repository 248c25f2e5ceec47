"""Scores of generated sets against closed forms, exact small cases and double loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpseq import metrics


def identity(x: Tensor) -> Tensor:
    """The elements themselves as features."""
    return x


def random_covariance(*batch: int, size: int, rank: int | None = None) -> Tensor:
    """Positive semi-definite of a rank, float64."""
    root = torch.randn(*batch, size, rank or size, dtype=torch.float64)
    return root @ root.mT


def rotation(size: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def by_loops(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Precision and recall."""

    def covered(points: Tensor, centres: Tensor) -> float:
        radius = []
        for i, centre in enumerate(centres):
            radius.append(sorted((centre - other).norm().item() for j, other in enumerate(centres) if j != i)[k - 1])
        hits = [
            any((point - centre).norm().item() <= r for centre, r in zip(centres, radius, strict=True))
            for point in points
        ]
        return sum(hits) / len(hits)

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_covariances_that_commute_have_a_closed_form(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """With common axes it is the distance of the means and of the standard deviations along them."""
    mean, other = torch.randn(2, *batch, 5, dtype=torch.float64)
    first, second = torch.rand(2, *batch, 5, dtype=torch.float64) + 0.1
    turn = rotation(5)
    covariances = [turn @ torch.diag_embed(s.square()) @ turn.mT for s in (first, second)]
    expected = (mean - other).square().sum(-1) + (first - second).square().sum(-1)
    found = metrics.frechet_distance(
        mean.to(dtype), covariances[0].to(dtype), other.to(dtype), covariances[1].to(dtype)
    )
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rank", [2, 6])
def test_it_is_the_trace_formula_and_symmetric(rank: int) -> None:
    """Against the eigenvalues of C1 C2, which are those of the symmetric product; rank 2 leaves four of them at 0."""
    mean, other = torch.randn(2, 6, dtype=torch.float64)
    first, second = random_covariance(size=6, rank=rank), random_covariance(size=6)
    values = torch.linalg.eigvals(first @ second).real.clamp(min=0)
    expected = (mean - other).square().sum() + first.trace() + second.trace() - 2 * values.sqrt().sum()
    found = metrics.frechet_distance(mean, first, other, second)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # the roots of zeros limit the oracle
    torch.testing.assert_close(metrics.frechet_distance(other, second, mean, first), found, atol=1e-11, rtol=0)


def test_in_one_dimension() -> None:
    one = torch.tensor([[4.0]]), torch.tensor([[9.0]])
    assert metrics.frechet_distance(torch.zeros(1), one[0], torch.full((1,), 2.0), one[1]).item() == pytest.approx(5.0)


@pytest.mark.parametrize("number", [20, 200])
def test_a_set_is_at_distance_zero_from_itself(number: int) -> None:
    """Also where there are fewer elements than features, and covariances are singular."""
    x = torch.randn(number, 64, dtype=torch.float64)
    assert 0 <= metrics.frechet(identity, x, x) < 1e-11
    assert 0 <= metrics.frechet(identity, x, x[torch.randperm(number)]) < 1e-11


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 1000))
def test_distance_of_sets(number: int, size: int, seed: int) -> None:
    """Not negative, symmetric, blind to a rotation, and squared under a change of unit."""
    torch.manual_seed(seed)
    real, fake = torch.randn(number, size, dtype=torch.float64), 2 * torch.randn(7, size, dtype=torch.float64) + 1
    found = metrics.frechet(identity, real, fake)
    assert found >= 0
    for other in (
        metrics.frechet(identity, fake, real),
        metrics.frechet(lambda x: x @ rotation_of_seed(size, seed), real, fake),
        metrics.frechet(lambda x: 10 * x, real, fake) / 100,
        metrics.frechet(identity, real, fake, batch_size=3),
    ):
        torch.testing.assert_close(other, found, atol=1e-6, rtol=1e-9)


def rotation_of_seed(size: int, seed: int) -> Tensor:
    """The same for every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def test_draws_of_known_gaussians_come_near_their_distance() -> None:
    mean = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    root = torch.linalg.cholesky(random_covariance(size=3))
    real = torch.randn(200_000, 3, dtype=torch.float64)
    fake = torch.randn(200_000, 3, dtype=torch.float64) @ root.mT + mean
    eye = torch.eye(3, dtype=torch.float64)
    exact = metrics.frechet_distance(torch.zeros_like(mean), eye, mean, root @ root.mT)
    assert metrics.frechet(identity, real, fake).item() == pytest.approx(exact.item(), rel=0.02)


def test_features_are_computed_in_batches_without_a_graph() -> None:
    layer, sizes = torch.nn.Linear(4, 2), []

    def features(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return layer(x.flatten(1))

    found = metrics.frechet(features, torch.randn(5, 1, 2, 2), torch.randn(4, 1, 2, 2), batch_size=2)
    assert sizes == [2, 2, 1, 2, 2] and not found.requires_grad and found.dtype == torch.float32


@given(st.integers(1, 3), st.integers(0, 1000))
def test_precision_and_recall_by_loops(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real = torch.randint(0, 6, (9, 2), generator=generator).double()  # with ties and duplicates
    fake = torch.randint(0, 9, (7, 2), generator=generator).double()
    found = metrics.precision_recall(real, fake, k)
    assert [x.item() for x in found] == pytest.approx(by_loops(real, fake, k))
    turned = metrics.precision_recall(fake, real, k)
    assert (turned[1], turned[0]) == found


def test_precision_and_recall_in_many_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    import gpseq.metrics.generation as module

    real, fake = torch.randn(23, 3, dtype=dtype), torch.randn(17, 3, dtype=dtype) + 0.5
    whole = metrics.precision_recall(real, fake)
    monkeypatch.setattr(module, "ROWS", 5)
    assert metrics.precision_recall(real, fake) == whole
    assert whole[0].dtype == dtype


def test_precision_and_recall_of_the_extremes() -> None:
    real = torch.randn(30, 2)
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 1000) == (0, 0)
    same = real[:1].expand(30, 2)
    precision, recall = metrics.precision_recall(real, same)
    assert precision == 1 and recall.item() == pytest.approx(1 / 30)


EYE, ZERO = torch.eye(2), torch.zeros(2)
BAD = {
    "no tensor": (lambda: metrics.frechet(identity, [1.0], torch.zeros(3, 2)), TypeError, "real: expected a tensor"),
    "one element": (lambda: metrics.frechet(identity, torch.zeros(3, 2), torch.zeros(1, 2)), ValueError, "fake: .*2"),
    "integers": (lambda: metrics.frechet(identity, torch.ones(3, 2).int(), EYE), TypeError, r"feature_fn\(real\)"),
    "images": (lambda: metrics.frechet(identity, torch.ones(3, 2, 2), EYE), ValueError, r"feature_fn\(real\): .*3, d"),
    "widths": (lambda: metrics.frechet(identity, torch.ones(3, 2), torch.ones(3, 4)), ValueError, "as many features"),
    "NaN": (lambda: metrics.frechet(identity, torch.full((3, 2), math.nan), EYE), ValueError, "6 of 6"),
    "batch": (lambda: metrics.frechet(identity, EYE, EYE, batch_size=0), ValueError, "batch_size"),
    "shape": (lambda: metrics.frechet_distance(ZERO, torch.eye(3), ZERO, EYE), ValueError, "covariance: .*2, 2"),
    "sizes": (lambda: metrics.frechet_distance(ZERO, EYE, torch.zeros(3), EYE), ValueError, "other_mean: .*2 features"),
    "asymmetric": (
        lambda: metrics.frechet_distance(ZERO, EYE, ZERO, torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        ValueError,
        "other_covariance: expected a symmetric",
    ),
    "infinite": (lambda: metrics.frechet_distance(ZERO / 0, EYE, ZERO, EYE), ValueError, "mean: expected finite"),
    "few": (lambda: metrics.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), ValueError, "real.*at least 4"),
    "k": (lambda: metrics.precision_recall(EYE, EYE, k=0), ValueError, "k: expected at least 1"),
    "columns": (lambda: metrics.precision_recall(EYE, torch.eye(3), k=1), ValueError, r"fake_features: .*\(m, 2\)"),
    "not finite": (lambda: metrics.precision_recall(EYE, EYE / 0, k=1), ValueError, "fake_features: expected finite"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_nothing_but_the_checks_reads_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of all scores; on a device that would be a wait for it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setitem(metrics.frechet.__globals__, "refuse", lambda *problems: None)
    with FakeTensorMode():
        real, fake = torch.empty(9, 3), torch.empty(7, 3)
        found = metrics.frechet(identity, real, fake), *metrics.precision_recall(real, fake)
    assert all(value.shape == () and value.dtype == torch.float32 for value in found)


@pytest.mark.cuda
def test_results_on_a_device_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    real, fake = torch.randn(40, 5, dtype=dtype), torch.randn(30, 5, dtype=dtype) + 0.5
    expected = metrics.frechet(identity, real, fake), *metrics.precision_recall(real, fake)
    found = metrics.frechet(identity, real.cuda(), fake.cuda()), *metrics.precision_recall(real.cuda(), fake.cuda())
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.cpu(), other)
