"""Detection of inputs from outside, against loops over pairs and thresholds, scikit-learn and torchmetrics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpseq import metrics

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=25)
ALL = (
    metrics.ood_auroc,
    metrics.ood_aupr,
    lambda a, b: metrics.ood_aupr(a, b, positive="in"),
    metrics.ood_fpr,
    lambda a, b: metrics.ood_fpr(a, b, positive="out"),
)


def by_loops(inside: list[float], outside: list[float]) -> list[float]:
    """AUROC, AUPR-out, AUPR-in, FPR95 with positives inside and outside."""
    pairs = [(a, b) for a in inside for b in outside]
    found = [sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)]
    sides = (outside, inside), ([-s for s in inside], [-s for s in outside])
    for positive, negative in sides:
        area, recall = 0.0, 0.0
        for threshold in sorted(set(positive + negative), reverse=True):
            true, false = (sum(s >= threshold for s in side) for side in (positive, negative))
            area += (true / len(positive) - recall) * true / (true + false)
            recall = true / len(positive)
        found.append(area)
    for positive, negative in sides[::-1]:
        for threshold in sorted(set(positive), reverse=True):
            if 100 * sum(s >= threshold for s in positive) >= 95 * len(positive):
                found.append(sum(s >= threshold for s in negative) / len(negative))
                break
    return found


@given(SCORES, SCORES)
def test_scores_with_ties_by_loops(inside: list[int], outside: list[int]) -> None:
    scores = torch.tensor(inside).double(), torch.tensor(outside).double()
    for score, expected in zip(ALL, by_loops(inside, outside), strict=True):
        assert score(*scores).item() == pytest.approx(expected, abs=1e-12)
        assert 0 <= score(*scores) <= 1


@given(SCORES, SCORES)
def test_only_the_order_counts(inside: list[int], outside: list[int]) -> None:
    first, second = torch.tensor(inside).double(), torch.tensor(outside).double()
    area = metrics.ood_auroc(first, second)
    for bent in (torch.exp, lambda s: 3 * s - 7, torch.atan, lambda s: s**3):
        for score in ALL:
            assert score(bent(first), bent(second)) == score(first, second)
    for score in ALL:
        assert score(first.flip(-1), second.flip(-1)) == score(first, second)
    assert metrics.ood_auroc(second, first).item() == pytest.approx(1 - area.item())
    assert metrics.ood_auroc(-second, -first) == area  # whichever kind is called positive


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_scores_are_those_of_scikit_learn(rounded: bool, dtype: torch.dtype) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    inside, outside = torch.randn(300, dtype=dtype), torch.randn(200, dtype=dtype) + 1
    if rounded:
        inside, outside = inside.mul(3).round(), outside.mul(3).round()
    score = torch.cat([inside, outside]).numpy()
    label = torch.cat([torch.zeros(300), torch.ones(200)]).numpy()
    false, true, _ = sklearn.roc_curve(label, score, drop_intermediate=False)
    false_in, true_in, _ = sklearn.roc_curve(1 - label, -score, drop_intermediate=False)
    expected = [
        sklearn.roc_auc_score(label, score),
        sklearn.average_precision_score(label, score),
        sklearn.average_precision_score(1 - label, -score),
        false_in[true_in >= 0.95].min(),
        false[true >= 0.95].min(),
    ]
    for function, value in zip(ALL, expected, strict=True):
        assert function(inside, outside).dtype == dtype
        assert function(inside, outside).item() == pytest.approx(value, rel=1e-6)


def test_scores_are_those_of_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    inside, outside = torch.rand(300), torch.rand(200).sqrt()
    score, label = torch.cat([inside, outside]), torch.cat([torch.zeros(300), torch.ones(200)]).long()
    torch.testing.assert_close(metrics.ood_auroc(inside, outside), theirs.binary_auroc(score, label))
    torch.testing.assert_close(metrics.ood_aupr(inside, outside), theirs.binary_average_precision(score, label))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batches_are_stacks(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    inside = torch.randn(*batch, 20, dtype=dtype).mul(2).round()
    outside = torch.randn(*batch, 31, dtype=dtype).mul(2).round() + 1
    rows = list(zip(inside.reshape(-1, 20), outside.reshape(-1, 31), strict=True))
    for score in ALL:
        expected = torch.stack([score(a, b) for a, b in rows]).reshape(batch)
        torch.testing.assert_close(score(inside, outside), expected)


@pytest.mark.parametrize("tpr", [0.01, 0.07, 0.5, 0.8, 1.0])
def test_the_true_positive_rate_is_reached_and_no_stricter_threshold_does(tpr: float) -> None:
    inside, outside = torch.arange(100.0), torch.arange(100.0) + 0.5
    needed = round(100 * tpr)
    assert metrics.ood_fpr(inside, outside, tpr).item() == pytest.approx((needed - 1) / 100)
    assert metrics.ood_fpr(inside, outside, tpr, positive="out").item() == pytest.approx((needed - 1) / 100)


def test_a_perfect_score_and_a_constant_one() -> None:
    low, high, same = torch.zeros(5), torch.full((3,), math.inf), torch.zeros(3)
    assert [score(low, high).item() for score in ALL] == [1, 1, 1, 0, 0]
    assert metrics.ood_auroc(low, same) == 0.5
    assert metrics.ood_aupr(low, same) == 3 / 8 and metrics.ood_aupr(low, same, positive="in") == 5 / 8
    assert metrics.ood_fpr(low, same) == 1 == metrics.ood_fpr(low, same, positive="out")


def test_mixed_and_half_precision() -> None:
    inside, outside = torch.randn(50), torch.randn(40) + 1
    expected = metrics.ood_auroc(inside, outside)
    found = metrics.ood_auroc(inside, outside.double())
    assert found.dtype == torch.float64 and found.item() == pytest.approx(expected.item())
    rough = metrics.ood_auroc(inside.bfloat16(), outside.bfloat16())
    assert rough.dtype == torch.float32
    assert rough == metrics.ood_auroc(inside.bfloat16().float(), outside.bfloat16().float())


def test_counts_are_exact_where_float32_would_not_be() -> None:
    """The area is a ratio of whole numbers, here larger than float32 can hold."""
    inside, outside = torch.randn(6000), torch.randn(5001).add(0.3)
    above = sum(int((outside > a).sum()) for a in inside.split(1))
    assert metrics.ood_auroc(inside.double(), outside.double()).item() == above / (6000 * 5001)


BAD: dict[str, tuple[object, object, type[Exception], str]] = {
    "one kind only": (
        torch.ones(3),
        torch.ones(0),
        ValueError,
        r"scores_out: expected shape .* n at least 1, got \(0,\)",
    ),
    "the other only": (
        torch.ones(0),
        torch.ones(3),
        ValueError,
        r"scores_in: expected shape .* n at least 1, got \(0,\)",
    ),
    "nan": (torch.ones(3), torch.tensor([math.nan]), ValueError, "scores_out: expected no NaN, got 1 among 1 numbers"),
    "labels": (
        torch.ones(3).long(),
        torch.ones(3),
        TypeError,
        "scores_in: expected a floating-point tensor, got torch.int",
    ),
    "numbers": (torch.ones(3), 0.5, TypeError, "scores_out: expected a floating-point tensor, got float"),
    "scalar": (torch.ones(3), torch.tensor(0.5), ValueError, r"scores_out: expected shape \(\*batch, n\) .*, got \(\)"),
    "batch": (torch.ones(2, 3), torch.ones(3), ValueError, r"batch dimensions \(2,\), as scores_in has, got \(\)"),
}


@pytest.mark.parametrize(("inside", "outside", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_scores_are_named(inside: Tensor, outside: Tensor, kind: type[Exception], message: str) -> None:
    for score in ALL:
        with pytest.raises(kind, match=message):
            score(inside, outside)


def test_bad_options_are_named() -> None:
    for score in (metrics.ood_aupr, metrics.ood_fpr):
        with pytest.raises(ValueError, match="positive: expected 'in' or 'out', got 'ood'"):
            score(torch.ones(2), torch.ones(2), positive="ood")
    for tpr in (0.0, 95, math.nan, None):
        with pytest.raises(ValueError, match="tpr: expected a rate above 0 and at most 1, got"):
            metrics.ood_fpr(torch.ones(2), torch.ones(2), tpr)
