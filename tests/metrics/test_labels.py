"""Scores of labels against torch's own distributions and scikit-learn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq import metrics


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_classification_scores_are_those_of_torch_distributions(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(*batch, 7, 4, dtype=dtype)
    target = torch.randint(4, (*batch, 7))
    expected = -torch.distributions.Categorical(logits=logits).log_prob(target).mean(-1)
    torch.testing.assert_close(metrics.categorical_nlpd(logits.softmax(-1), target), expected)
    probability, label = torch.rand(*batch, 7, dtype=dtype), torch.randint(2, (*batch, 7))
    expected = -torch.distributions.Bernoulli(probability).log_prob(label.to(dtype)).mean(-1)
    for kind in (label, label.to(dtype), label.bool()):
        torch.testing.assert_close(metrics.bernoulli_nlpd(probability, kind), expected)
    predicted = logits.argmax(-1)
    right = [
        [a == b for a, b in zip(*rows, strict=True)]
        for rows in zip(predicted.reshape(-1, 7), target.reshape(-1, 7), strict=True)
    ]
    expected = torch.tensor(right).double().mean(-1).reshape(batch)
    torch.testing.assert_close(metrics.accuracy(predicted, target), expected)


def test_certainty_is_rewarded_and_punished_without_limit() -> None:
    sure, label = torch.tensor([0.0, 1.0]), torch.tensor([0, 1])
    assert metrics.bernoulli_nlpd(sure, label) == 0
    assert metrics.bernoulli_nlpd(sure, 1 - label) == math.inf
    assert metrics.categorical_nlpd(torch.eye(2), label) == 0
    assert metrics.categorical_nlpd(torch.eye(2), 1 - label) == math.inf
    for empty in (metrics.accuracy(label[:0], label[:0]), metrics.bernoulli_nlpd(sure[:0], label[:0])):
        assert empty.isnan()


def test_labels_of_another_shape_are_not_broadcast() -> None:
    label = torch.tensor([0, 1, 1])
    for predicted in (label.unsqueeze(-1), label[:1], label[0]):
        with pytest.raises(ValueError, match=r"target: expected shape .*, as predicted has, got \(3,\)"):
            metrics.accuracy(predicted, label)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_brier_score_by_a_loop(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    probability, target = torch.randn(*batch, 7, 4, dtype=dtype).softmax(-1), torch.randint(4, (*batch, 7))
    rows = zip(probability.reshape(-1, 4).tolist(), target.flatten().tolist(), strict=True)
    single = [sum((p - (c == label)) ** 2 for c, p in enumerate(row)) for row, label in rows]
    expected = torch.tensor(single, dtype=dtype).reshape(*batch, 7).mean(-1)
    torch.testing.assert_close(metrics.brier_score(probability, target), expected)


def test_brier_score_is_that_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    probability, target = torch.randn(100, 5, dtype=torch.float64).softmax(-1), torch.randint(5, (100,))
    expected = sklearn.brier_score_loss(target.numpy(), probability.numpy(), labels=range(5), scale_by_half=False)
    assert metrics.brier_score(probability, target).item() == pytest.approx(expected)


def test_brier_score_goes_from_nought_to_two_and_two_classes_count_double() -> None:
    label = torch.tensor([0, 1])
    assert metrics.brier_score(torch.eye(2), label) == 0
    assert metrics.brier_score(torch.eye(2), 1 - label) == 2
    p = torch.rand(20, dtype=torch.float64)
    target = torch.rand(20) > 0.5
    pair = torch.stack([1 - p, p], -1)
    torch.testing.assert_close(metrics.brier_score(pair, target), 2 * (p - target.double()).square().mean())


@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(-2, 3)), min_size=1, max_size=30))
def test_matthews_correlation_from_the_table_of_counts(pairs: list[tuple[int, int]]) -> None:
    predicted, target = torch.tensor(pairs).T
    found = metrics.matthews_correlation(predicted, target).item()
    n = len(pairs)
    right = sum(a == b for a, b in pairs)
    of_one = [sum(a == c for a, _ in pairs) for c in range(-2, 4)]
    of_other = [sum(b == c for _, b in pairs) for c in range(-2, 4)]
    covariance = n * right - sum(a * b for a, b in zip(of_one, of_other, strict=True))
    scale = math.sqrt((n * n - sum(a * a for a in of_one)) * (n * n - sum(b * b for b in of_other)))
    assert found == pytest.approx(covariance / scale if scale else 0.0)
    assert -1 - 1e-12 <= found <= 1 + 1e-12


@pytest.mark.parametrize("classes", [2, 5])
def test_matthews_correlation_is_that_of_scikit_learn_and_torchmetrics(classes: int) -> None:
    predicted, target = torch.randint(classes, (2, 3, 60))
    predicted = torch.where(torch.rand(3, 60) < 0.5, target, predicted)
    found = metrics.matthews_correlation(predicted, target)
    sklearn = pytest.importorskip("sklearn.metrics")
    for row in range(3):
        expected = sklearn.matthews_corrcoef(target[row].numpy(), predicted[row].numpy())
        assert found[row].item() == pytest.approx(expected)
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    for row in range(3):
        expected = theirs.multiclass_matthews_corrcoef(predicted[row], target[row], classes).item()
        assert found[row].item() == pytest.approx(expected, abs=1e-6)


def test_matthews_correlation_takes_labels_of_any_dtype() -> None:
    predicted, target = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 1])
    expected = metrics.matthews_correlation(predicted, target)
    for one in (predicted, predicted.bool(), predicted.double(), predicted.to(torch.int8)):
        for other in (target, target.bool(), target.float()):
            assert metrics.matthews_correlation(one, other) == expected
    assert metrics.matthews_correlation(target, target) == 1 and metrics.matthews_correlation(1 - target, target) == -1
    assert metrics.matthews_correlation(torch.ones(5), target) == 0 == metrics.matthews_correlation(target, target > 2)


def test_labels_that_cannot_be_correlated_are_refused() -> None:
    label = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"target: expected shape \(3,\), as predicted has, got \(3, 1\)"):
        metrics.matthews_correlation(label, label.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"predicted: expected shape \(\*batch, n\) with n at least 1, got \(0,\)"):
        metrics.matthews_correlation(label[:0], label[:0])
    with pytest.raises(ValueError, match="target: expected no NaN, got 1 among 3 numbers"):
        metrics.matthews_correlation(label, torch.tensor([0, 1, math.nan]))
    with pytest.raises(TypeError, match="predicted: expected a tensor, got list"):
        metrics.matthews_correlation([0, 1, 1], label)
    with pytest.raises(TypeError, match="target: expected a tensor, got list"):
        metrics.matthews_correlation(label, [0, 1, 1])
