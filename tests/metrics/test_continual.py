"""Scores of streams of tasks, by hand and by loops."""

import math

import pytest
import torch

from gpseq import metrics

NAN = math.nan
#: Accuracy of three tasks: the second gains what the first loses; the last row of the first two is below their best.
ACCURACY = torch.tensor([[0.9, 0.3, 0.2], [0.95, 0.8, 0.1], [0.6, 0.9, 0.7]], dtype=torch.float64)


def test_scores_of_a_stream_of_tasks_by_hand() -> None:
    torch.testing.assert_close(
        metrics.average_score(ACCURACY), torch.tensor([0.9, (0.95 + 0.8) / 2, (0.6 + 0.9 + 0.7) / 3]).double()
    )
    expected = torch.tensor([[NAN, NAN, NAN], [-0.05, NAN, NAN], [0.35, -0.1, NAN]], dtype=torch.float64)
    torch.testing.assert_close(metrics.forgetting(ACCURACY), expected, equal_nan=True)
    torch.testing.assert_close(
        metrics.average_forgetting(ACCURACY), torch.tensor([NAN, -0.05, 0.125]).double(), equal_nan=True
    )
    assert metrics.backward_transfer(ACCURACY).item() == pytest.approx((0.6 - 0.9 + 0.9 - 0.8) / 2)
    baseline = torch.tensor([0.0, 0.5, 0.5]).double()
    assert metrics.forward_transfer(ACCURACY, baseline).item() == pytest.approx((0.3 - 0.5 + 0.1 - 0.5) / 2)


def test_errors_are_accuracies_upside_down(dtype: torch.dtype) -> None:
    matrix = torch.rand(2, 4, 4, dtype=dtype)
    baseline = torch.rand(2, 4, dtype=dtype)
    for name, extra, mirrored in (
        ("forgetting", (), ()),
        ("average_forgetting", (), ()),
        ("backward_transfer", (), ()),
        ("forward_transfer", (baseline,), (1 - baseline,)),
    ):
        one = getattr(metrics, name)(matrix, *extra)
        other = getattr(metrics, name)(1 - matrix, *mirrored, higher_is_better=False)
        torch.testing.assert_close(one, other, equal_nan=True)
        for row, single in enumerate(matrix):  # batches are stacks
            own = getattr(metrics, name)(single, *(value[row] for value in extra))
            torch.testing.assert_close(one[row], own, equal_nan=True)


def test_forgetting_starts_where_a_task_is_learnt_and_ignores_the_future() -> None:
    """A lucky score before a task was learnt is nothing to forget."""
    lucky = ACCURACY.clone()
    lucky[0, 1] = 1.0
    torch.testing.assert_close(metrics.forgetting(lucky), metrics.forgetting(ACCURACY), equal_nan=True)
    blind = ACCURACY.tril().masked_fill(torch.ones(3, 3).triu(1).bool(), NAN)
    for score in (metrics.average_score, metrics.forgetting, metrics.average_forgetting, metrics.backward_transfer):
        torch.testing.assert_close(score(blind), score(ACCURACY), equal_nan=True)
    assert metrics.forward_transfer(blind, torch.zeros(3)).isnan()


def test_forgetting_by_a_loop(dtype: torch.dtype) -> None:
    matrix = torch.rand(6, 8, dtype=dtype)
    found = metrics.forgetting(matrix)
    for k in range(6):
        for j in range(8):
            if j < k:
                best = max(matrix[i, j].item() for i in range(j, k))
                assert found[k, j].item() == pytest.approx(best - matrix[k, j].item(), abs=1e-6)
            else:
                assert found[k, j].isnan()


def test_a_stream_under_way_is_judged_by_the_tasks_it_has_seen() -> None:
    torch.testing.assert_close(metrics.average_score(ACCURACY[:2]), metrics.average_score(ACCURACY)[:2])
    assert metrics.backward_transfer(ACCURACY[:2]).item() == pytest.approx(0.05)
    assert metrics.backward_transfer(ACCURACY[:1]).isnan()
    assert metrics.average_forgetting(ACCURACY[:1]).isnan().all()
    assert metrics.forward_transfer(ACCURACY[:1], torch.zeros(3)).isnan()


def test_a_task_that_was_never_scored_is_left_out_and_any_other_nan_tells() -> None:
    gap = ACCURACY.clone()
    gap[:, 1] = NAN
    torch.testing.assert_close(metrics.average_score(gap), torch.tensor([0.9, 0.95, 0.65]).double())
    assert metrics.average_forgetting(gap)[-1].item() == pytest.approx(0.35)
    assert metrics.backward_transfer(gap).item() == pytest.approx(-0.3)
    broken = ACCURACY.clone()
    broken[1, 0] = NAN
    assert metrics.average_score(broken).isnan().tolist() == [False, True, False]
    assert metrics.average_forgetting(broken)[1:].isnan().all()
    assert metrics.forgetting(broken)[2, 0].isnan() and not metrics.forgetting(broken)[2, 1].isnan()
    broken[2, 0] = NAN
    assert metrics.backward_transfer(broken).isnan()


@pytest.mark.parametrize("matrix", [torch.zeros(3), torch.zeros(3, 2), torch.zeros(0, 2), torch.zeros(2, 2).long()])
def test_a_matrix_of_another_shape_is_refused(matrix: torch.Tensor) -> None:
    for score in (metrics.average_score, metrics.forgetting, metrics.average_forgetting, metrics.backward_transfer):
        with pytest.raises(ValueError, match=r"matrix: expected floating-point scores of shape \(\*batch, S, T\)"):
            score(matrix)
    with pytest.raises(ValueError, match=r"baseline: expected 3 tasks, got shape \(2,\)"):
        metrics.forward_transfer(ACCURACY, torch.zeros(2))


def test_a_task_that_is_tested_and_breaks_down_at_once_is_not_left_out() -> None:
    """NaN in every row from its own on looks like a task without test rows; who knows better says so."""
    gap = ACCURACY.clone()
    gap[:, 1] = NAN
    baseline = torch.zeros(3).double()
    for name, arguments in (
        ("average_score", ()),
        ("average_forgetting", ()),
        ("backward_transfer", ()),
        ("forward_transfer", (baseline,)),
    ):
        score = getattr(metrics, name)
        without, every = torch.tensor([True, False, True]), torch.ones(3, dtype=torch.bool)
        inferred = score(gap, *arguments)
        torch.testing.assert_close(score(gap, *arguments, tested=without), inferred, equal_nan=True)
        told = torch.atleast_1d(score(gap, *arguments, tested=every))
        assert told[-1].isnan() and not torch.atleast_1d(inferred)[-1].isnan()
        torch.testing.assert_close(
            score(ACCURACY, *arguments, tested=every), score(ACCURACY, *arguments), equal_nan=True
        )
        batch = score(torch.stack([gap, ACCURACY]), *arguments, tested=every)
        torch.testing.assert_close(torch.atleast_1d(batch[0]), told, equal_nan=True)
    assert metrics.average_score(gap, tested=every).isnan().tolist() == [False, True, True]
    for wrong, got in (
        (every[:2], r"torch.bool of shape \(2,\)"),
        (torch.ones(3), "torch.float32"),
        ([True] * 3, "list"),
    ):
        with pytest.raises(ValueError, match=rf"tested: expected a bool tensor of shape \(3,\), got {got}"):
            metrics.average_score(ACCURACY, tested=wrong)


def test_a_matrix_is_a_tensor() -> None:
    with pytest.raises(TypeError, match="matrix: expected a tensor, got list"):
        metrics.average_score([[0.5]])
