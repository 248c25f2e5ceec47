"""Risk on what is kept, against averages over all orders of ties, and by loops."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq import metrics

#: Small whole numbers, so that there are ties.
CASES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=6)
LONG = st.lists(st.tuples(st.integers(-20, 20), st.floats(0, 5)), min_size=1, max_size=40)


def tensors(case: list[tuple[int, float]], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    uncertainty, loss = torch.tensor(case, dtype=torch.float64).T
    return uncertainty.to(dtype), loss


def risks_of_all_orders(case: list[tuple[int, float]]) -> list[float]:
    """Risk at each coverage, averaged over all the orders that the uncertainties leave open."""
    orders = [
        [loss for _, loss in order]
        for order in itertools.permutations(case)
        if all(a[0] <= b[0] for a, b in itertools.pairwise(order))
    ]
    n = len(case)
    return [sum(sum(order[: k + 1]) / (k + 1) for order in orders) / len(orders) for k in range(n)]


@given(CASES)
def test_ties_are_averaged_over_all_their_orders(case: list[tuple[int, float]]) -> None:
    uncertainty, loss = tensors(case)
    expected = risks_of_all_orders(case)
    n = len(case)
    coverage, risk = metrics.risk_coverage_curve(uncertainty, loss)
    torch.testing.assert_close(coverage, torch.arange(1, n + 1).double() / n)
    torch.testing.assert_close(risk, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    assert metrics.aurc(uncertainty, loss).item() == pytest.approx(sum(expected) / n)
    best = min(
        sum(sum(order[: k + 1]) / (k + 1) for k in range(n)) / n
        for order in itertools.permutations([one for _, one in case])
    )
    assert metrics.excess_aurc(uncertainty, loss).item() == pytest.approx(sum(expected) / n - best, abs=1e-12)
    for bound in (0.0, 0.25, 0.5, 1.0, 3.0):
        kept = max([k + 1 for k in range(n) if expected[k] <= bound + 1e-9], default=0)
        assert metrics.coverage_at_risk(uncertainty, loss, bound).item() == pytest.approx(kept / n)
    for k in range(n):
        found = metrics.risk_at_coverage(uncertainty, loss, (k + 1) / n).item()
        assert found == pytest.approx(expected[k])


@given(LONG, st.randoms(use_true_random=False))
def test_scores_have_bounds_and_no_order(case: list[tuple[int, float]], chance: random.Random) -> None:
    uncertainty, loss = tensors(case)
    mixed = list(case)
    chance.shuffle(mixed)
    for score in (metrics.aurc, metrics.excess_aurc, lambda u, l: metrics.risk_coverage_curve(u, l)[1]):
        found = score(uncertainty, loss)
        torch.testing.assert_close(score(*tensors(mixed)), found, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(score((uncertainty / 7).exp(), loss), found)  # only the order counts
    area, excess = metrics.aurc(uncertainty, loss), metrics.excess_aurc(uncertainty, loss)
    assert loss.min() - 1e-9 <= area <= loss.max() + 1e-9 and 0 <= excess <= area + 1e-9
    assert metrics.excess_aurc(loss, loss) == 0
    worst = metrics.aurc(-loss, loss)
    assert area <= worst + 1e-9
    assert metrics.risk_at_coverage(uncertainty, loss, 1.0).item() == pytest.approx(loss.mean().item())


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batches_are_stacks(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    uncertainty = torch.randn(*batch, 50, dtype=dtype).mul(5).round()
    wrong = torch.rand(*batch, 50) < 0.3
    flat = list(zip(uncertainty.reshape(-1, 50), wrong.reshape(-1, 50), strict=True))
    for score in (
        metrics.aurc,
        metrics.excess_aurc,
        lambda u, l: metrics.risk_at_coverage(u, l, 0.8),
        lambda u, l: metrics.coverage_at_risk(u, l, 0.25),
        lambda u, l: metrics.risk_coverage_curve(u, l)[1],
        lambda u, l: metrics.accuracy_rejection_curve(u, ~l)[1],
    ):
        found = score(uncertainty, wrong)
        assert found.dtype == dtype
        own = torch.stack([score(u, l) for u, l in flat])
        torch.testing.assert_close(found.reshape(own.shape), own)
        for kind in (wrong.long(), wrong.to(dtype)):
            if score is not metrics.aurc:
                continue
            torch.testing.assert_close(score(uncertainty, kind), found)


def test_the_area_without_ties_is_the_plain_sum(dtype: torch.dtype) -> None:
    uncertainty, loss = torch.randn(200, dtype=dtype), torch.rand(200, dtype=dtype)
    ordered = loss[uncertainty.argsort()].double()
    expected = (ordered.cumsum(-1) / torch.arange(1, 201)).mean()
    torch.testing.assert_close(metrics.aurc(uncertainty, loss), expected.to(dtype))


def test_the_best_order_comes_near_the_integral_of_the_paper() -> None:
    """r + (1 - r) log(1 - r) for n to infinity."""
    wrong = torch.arange(20000) < 3000
    area = metrics.aurc(wrong.double(), wrong).item()
    assert area == pytest.approx(0.15 + 0.85 * math.log(0.85), abs=1e-4)


def test_rejecting_is_keeping_turned_round(dtype: torch.dtype) -> None:
    uncertainty, correct = torch.randn(30, dtype=dtype), torch.rand(30) < 0.6
    rejected, accuracy = metrics.accuracy_rejection_curve(uncertainty, correct)
    coverage, risk = metrics.risk_coverage_curve(uncertainty, ~correct)
    torch.testing.assert_close(rejected, 1 - coverage.flip(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(accuracy, 1 - risk.flip(-1))
    assert rejected[0] == 0 and accuracy[0].item() == pytest.approx(correct.double().mean().item())


def test_fractions_that_binary_cannot_hold_are_met() -> None:
    uncertainty = torch.arange(100.0)
    loss = uncertainty + 1
    for percent in range(1, 101):  # 0.07 * 100 is a little more than 7
        assert metrics.risk_at_coverage(uncertainty, loss, percent / 100).item() == (percent + 1) / 2
    for wrong in range(1, 101):
        mistakes = torch.arange(100) >= 100 - wrong
        assert metrics.coverage_at_risk(uncertainty, mistakes, wrong / 100) == 1
        assert metrics.coverage_at_risk(torch.zeros(100), mistakes, wrong / 100) == 1
    assert metrics.risk_at_coverage(uncertainty, loss, 1e-9) == 1  # at least one element is kept


def test_infinite_uncertainties_have_an_order_and_a_coverage_can_be_nought() -> None:
    uncertainty = torch.tensor([math.inf, -math.inf, 0.0, math.inf])
    loss = torch.tensor([3.0, 1.0, 2.0, 5.0])
    torch.testing.assert_close(metrics.risk_coverage_curve(uncertainty, loss)[1], torch.tensor([1, 1.5, 7 / 3, 2.75]))
    assert metrics.coverage_at_risk(uncertainty, loss, 0.5) == 0


def test_bad_arguments_are_named() -> None:
    uncertainty, wrong = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, True, True])
    for score in (
        metrics.risk_coverage_curve,
        metrics.aurc,
        metrics.excess_aurc,
        metrics.accuracy_rejection_curve,
        lambda u, l: metrics.risk_at_coverage(u, l, 0.5),
        lambda u, l: metrics.coverage_at_risk(u, l, 0.5),
    ):
        with pytest.raises(ValueError, match="uncertainty: expected no NaN, got 1 among 3"):
            score(torch.tensor([0.1, math.nan, 0.3]), wrong)
        with pytest.raises(ValueError, match="expected finite numbers, got 1 of 3 that are infinite or NaN"):
            score(uncertainty, torch.tensor([0.1, math.inf, 0.3]))
        with pytest.raises(
            ValueError, match=r"uncertainty: expected shape \(\*batch, n\) with n at least 1, got \(0,\)"
        ):
            score(uncertainty[:0], wrong[:0])
        with pytest.raises(ValueError, match=r": expected shape \(3,\), as uncertainty has, got \(3, 1\)"):
            score(uncertainty, wrong.unsqueeze(-1))
        with pytest.raises(TypeError, match=r"uncertainty: expected a floating-point tensor, got torch\.int64"):
            score(uncertainty.long(), wrong)
        with pytest.raises(TypeError, match="expected a tensor, got list"):
            score(uncertainty, [0, 1, 1])
    for coverage in (0.0, 1.1, -0.5, math.nan, "all", True):
        with pytest.raises(ValueError, match="coverage: expected a fraction above 0 and at most 1, got"):
            metrics.risk_at_coverage(uncertainty, wrong, coverage)
    with pytest.raises(ValueError, match="risk: expected a finite number, got nan"):
        metrics.coverage_at_risk(uncertainty, wrong, math.nan)
    with pytest.raises(ValueError, match="correct: expected"):
        metrics.accuracy_rejection_curve(uncertainty, wrong[:2])
