"""Calibration errors against loops over bins, torchmetrics, and properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpseq import metrics

ECES = (metrics.top_label_ece, metrics.class_pooled_ece, metrics.class_averaged_ece, metrics.adaptive_ece, metrics.mce)


def pairs(probability: Tensor, target: Tensor, kind: str) -> list[tuple[float, bool]]:
    """Of one element of the batch."""
    rows = list(zip(probability.tolist(), target.tolist(), strict=True))
    if kind == "top_label":
        return [(max(row), row.index(max(row)) == label) for row, label in rows]
    return [(p, c == label) for row, label in rows for c, p in enumerate(row)]


def gaps(binned: list[list[tuple[float, bool]]]) -> tuple[float, float]:
    """Expected and maximum calibration error."""
    found = [
        (len(b), abs(sum(hit for _, hit in b) / len(b) - math.fsum(p for p, _ in b) / len(b))) for b in binned if b
    ]
    return sum(n * gap for n, gap in found) / sum(n for n, _ in found), max(gap for _, gap in found)


def equal_width(given: list[tuple[float, bool]], num_bins: int) -> tuple[float, float]:
    binned = [
        [(p, hit) for p, hit in given if k / num_bins < p <= (k + 1) / num_bins or (k == 0 and p == 0)]
        for k in range(num_bins)
    ]
    assert sum(map(len, binned)) == len(given)
    return gaps(binned)


def random_predictions(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Over-confident ones."""
    logits = torch.randn(*shape, dtype=dtype)
    target = torch.distributions.Categorical(logits=logits.float()).sample()
    return (3 * logits).softmax(-1), target


@pytest.mark.parametrize("num_bins", [1, 4, 15])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_errors_by_loops_over_bins(batch: tuple[int, ...], num_bins: int, dtype: torch.dtype) -> None:
    probability, target = random_predictions(*batch, 40, 5, dtype=dtype)
    rows = list(zip(probability.reshape(-1, 40, 5), target.reshape(-1, 40), strict=True))
    top = [equal_width(pairs(p, y, "top_label"), num_bins) for p, y in rows]
    pooled = [equal_width(pairs(p, y, "class_pooled"), num_bins)[0] for p, y in rows]
    each = [
        [
            equal_width([(a, label == c) for a, label in zip(p[:, c].tolist(), y.tolist(), strict=True)], num_bins)[0]
            for c in range(5)
        ]
        for p, y in rows
    ]
    for score, expected in (
        (metrics.top_label_ece, [e for e, _ in top]),
        (metrics.mce, [m for _, m in top]),
        (metrics.class_pooled_ece, pooled),
        (metrics.class_averaged_ece, [sum(row) / 5 for row in each]),
    ):
        found = score(probability, target, num_bins)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype).reshape(batch))


@pytest.mark.parametrize("n", [40, 41, 7])
def test_adaptive_error_by_a_loop(n: int, dtype: torch.dtype) -> None:
    probability, target = random_predictions(3, n, 5, dtype=dtype)
    for p, y, found in zip(probability, target, metrics.adaptive_ece(probability, target, 9), strict=True):
        ordered = sorted(pairs(p, y, "top_label"))
        binned: list[list[tuple[float, bool]]] = [[] for _ in range(9)]
        for place, pair in enumerate(ordered):
            binned[next(k for k in range(9) if place < (k + 1) * n // 9)].append(pair)
        assert max(map(len, binned)) - min(map(len, binned)) <= 1
        assert found.item() == pytest.approx(gaps(binned)[0], rel=1e-5)


def test_errors_are_those_of_torchmetrics(dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    for classes in (2, 10):
        probability, target = random_predictions(500, classes, dtype=dtype)
        for score, norm in ((metrics.top_label_ece, "l1"), (metrics.mce, "max")):
            expected = theirs.multiclass_calibration_error(probability, target, classes, n_bins=15, norm=norm)
            torch.testing.assert_close(score(probability, target), expected.to(dtype), rtol=1e-5, atol=1e-6)
    probability, target = random_predictions(500, 2, dtype=dtype)
    # Of two classes, the pooled pairs come twice: once as they are, once with both sides turned round.
    bins = metrics.reliability_bins(probability, target, kind="class_pooled")
    torch.testing.assert_close(bins.count, bins.count.flip(-1))
    binary = theirs.binary_calibration_error(probability[:, 1].contiguous(), target, n_bins=15, norm="l1")
    torch.testing.assert_close(metrics.class_averaged_ece(probability, target), binary.to(dtype), rtol=1e-5, atol=1e-6)


def test_edges_belong_to_the_bin_below_in_either_precision(dtype: torch.dtype) -> None:
    """A probability of k / B is on the edge however k / B is rounded."""
    for num_bins in (5, 10, 15, 20):
        p = torch.tensor([k / num_bins for k in range(num_bins + 1)], dtype=torch.float64).to(dtype)
        probability, target = torch.stack([p, 1 - p], -1), torch.zeros(len(p), dtype=torch.long)
        count = metrics.reliability_bins(probability[:, :], target, num_bins, kind="class_pooled").count
        assert count.sum() == 2 * (num_bins + 1)
        one = torch.stack([p, torch.zeros_like(p)], -1)
        one[:, 1] = 1 - one[:, 0]
        alone = metrics.reliability_bins(one[-1:], target[-1:], num_bins)
        assert alone.count.tolist() == [0] * (num_bins - 1) + [1]
        for k in range(num_bins // 2 + 1, num_bins + 1):  # the larger of the two
            single = metrics.reliability_bins(probability[k : k + 1], target[:1], num_bins)
            assert single.count.argmax() == k - 1


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 6), st.integers(1, 20))
def test_errors_have_bounds_and_no_order(seed: int, n: int, classes: int, num_bins: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64).round()).softmax(-1)  # ties
    target = torch.randint(classes, (n,), generator=generator)
    mixed = torch.randperm(n, generator=generator)
    for score in ECES:
        found = score(probability, target, num_bins)
        assert 0 <= found <= 1
        torch.testing.assert_close(score(probability[mixed], target[mixed], num_bins), found)
        assert found <= metrics.mce(probability, target, num_bins) + 1e-12 or score is not metrics.top_label_ece
    by_class = metrics.class_averaged_ece(probability, target, num_bins)
    pooled = metrics.class_pooled_ece(probability, target, num_bins)
    assert pooled <= by_class + 1e-12
    classes_mixed = torch.randperm(classes, generator=generator)
    renamed = classes_mixed.argsort()[target]
    for score in (metrics.class_averaged_ece, metrics.class_pooled_ece):
        expected = score(probability, target, num_bins)
        torch.testing.assert_close(score(probability[:, classes_mixed], renamed, num_bins), expected)


def test_what_is_right_as_often_as_it_says_has_no_error() -> None:
    """Eight of ten at 0.8, six of ten at 0.6."""
    probability = torch.tensor([[0.8, 0.2]] * 10 + [[0.4, 0.6]] * 10, dtype=torch.float64)
    target = torch.tensor([0] * 8 + [1] * 2 + [1] * 6 + [0] * 4)
    for score in ECES:
        assert score(probability, target).item() == pytest.approx(0.0, abs=1e-12)
    assert metrics.top_label_ece(probability, 1 - target).item() == pytest.approx((0.6 + 0.2) / 2)
    assert metrics.mce(probability, 1 - target).item() == pytest.approx(0.6)


def test_the_pooled_error_of_many_classes_is_far_smaller() -> None:
    probability, target = random_predictions(2000, 50)
    top, pooled, averaged = (score(probability, target).item() for score in ECES[:3])
    assert 10 * pooled < top and pooled < averaged < top


def test_equal_confidences_are_shared_out_between_equal_bins() -> None:
    """One confidence throughout: every bin has the accuracy of the whole, whatever the order."""
    probability = torch.tensor([[0.7, 0.3]] * 12)
    target = torch.tensor([0] * 6 + [1] * 6)
    bins = metrics.reliability_bins(probability, target, 4, equal_mass=True)
    torch.testing.assert_close(bins.accuracy, torch.full((4,), 0.5, dtype=torch.float64))
    assert metrics.adaptive_ece(probability, target, 4).item() == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["top_label", "class_pooled"])
@pytest.mark.parametrize("equal_mass", [False, True])
def test_bins_hold_every_pair_and_give_the_errors(kind: str, equal_mass: bool, dtype: torch.dtype) -> None:
    probability, target = random_predictions(2, 30, 4, dtype=dtype)
    bins = metrics.reliability_bins(probability, target, 10, kind, equal_mass)
    number = 30 if kind == "top_label" else 120
    assert bins.count.sum(-1).tolist() == [number, number]
    assert {bins.edges.dtype, bins.count.dtype, bins.confidence.dtype, bins.accuracy.dtype} == {torch.float64}
    empty = bins.count == 0
    assert bins.confidence[empty].isnan().all() and bins.accuracy[empty].isnan().all() and (bins.gap[empty] == 0).all()
    low, high = bins.edges[..., :-1].expand_as(bins.count), bins.edges[..., 1:].expand_as(bins.count)
    assert (bins.confidence >= low - 1e-7)[~empty].all() and (bins.confidence <= high + 1e-7)[~empty].all()
    if equal_mass:
        assert (bins.count == number / 10).all()
    if kind == "top_label":
        score = metrics.adaptive_ece if equal_mass else metrics.top_label_ece
    else:
        score = metrics.class_pooled_ece
    if kind == "top_label" or not equal_mass:
        torch.testing.assert_close(bins.expected.to(dtype), score(probability, target, 10))
    assert (bins.maximum >= bins.expected).all()


def test_half_precision_is_counted_in_float32() -> None:
    probability, target = random_predictions(200, 10, dtype=torch.float32)
    counts = torch.distributions.Multinomial(64, probability).sample() / 64  # no rounding in either precision
    for score in ECES:
        assert score(counts.bfloat16(), target).dtype == torch.float32
        assert score(counts.bfloat16(), target) == score(counts, target)
        assert score(probability.bfloat16(), target).isfinite()  # rows sum to one as well as they can


def test_arguments_of_the_bins_are_checked() -> None:
    probability, target = random_predictions(6, 3)
    with pytest.raises(ValueError, match="kind: expected one of top_label, class_pooled, got 'classwise'"):
        metrics.reliability_bins(probability, target, kind="classwise")
    for score in (*ECES, metrics.reliability_bins):
        with pytest.raises(ValueError, match="num_bins: expected at least 1, got 0"):
            score(probability, target, 0)
        with pytest.raises(TypeError, match=r"num_bins: expected an integer, got 1\.5"):
            score(probability, target, 1.5)
