"""What is no table of probabilities is refused, by every score that takes one."""

import math
from inspect import isfunction

import pytest
import torch
from torch import Tensor

from gpseq import metrics

SCORES = (
    metrics.brier_score,
    metrics.top_label_ece,
    metrics.class_pooled_ece,
    metrics.class_averaged_ece,
    metrics.adaptive_ece,
    metrics.mce,
    metrics.reliability_bins,
)
GOOD, LABEL = torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([0, 1])

BAD = {
    "logits": (torch.tensor([[2.0, -1.0]]), LABEL[:1], ValueError, "no number below 0, got -1; take softmax of logits"),
    "sum": (torch.tensor([[2.0, 1.0]]), LABEL[:1], ValueError, "sum to 1 up to 0.001, got a sum of 3; take softmax"),
    "short sum": (0.99 * GOOD, LABEL, ValueError, "got a sum of 0.99"),
    "infinite": (torch.tensor([[math.inf, 0.0]]), LABEL[:1], ValueError, "got a sum of inf"),
    "nan": (GOOD.log().mul(0).log().sqrt() + GOOD, LABEL, ValueError, "probability: expected no NaN, got 4 among 4"),
    "no rows": (GOOD[:0], LABEL[:0], ValueError, r"n at least 1 and C at least 2 .*, got \(0, 2\)"),
    "one class": (torch.ones(3, 1), torch.zeros(3).long(), ValueError, r"stack 1 - p and p\), got \(3, 1\)"),
    "one number": (torch.tensor([0.5, 0.2]), LABEL, ValueError, r"stack 1 - p and p\), got \(2,\)"),
    "integers": (torch.eye(2).long(), LABEL, TypeError, "probability: expected a floating-point tensor, got torch.int"),
    "list": ([[0.5, 0.5]], LABEL[:1], TypeError, "probability: expected a floating-point tensor, got list"),
    "one hot": (
        GOOD,
        torch.eye(2).long(),
        ValueError,
        r"target: expected shape \(2,\), as probability .* got \(2, 2\)",
    ),
    "column": (GOOD, LABEL.unsqueeze(-1), ValueError, r"target: expected shape \(2,\), .* got \(2, 1\)"),
    "float labels": (
        GOOD,
        LABEL.float(),
        TypeError,
        "target: expected a tensor of integers or bool, got torch.float32",
    ),
    "list of labels": (GOOD, [0, 1], TypeError, "target: expected a tensor of integers or bool, got list"),
    "unknown class": (GOOD, LABEL + 1, ValueError, "target: expected classes from 0 to 1, got from 1 to 2"),
    "masked label": (GOOD, LABEL - 1, ValueError, "target: expected classes from 0 to 1, got from -1 to 0"),
}


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
@pytest.mark.parametrize(("probability", "target", "kind", "message"), BAD.values(), ids=BAD)
def test_a_bad_table_is_refused(score, probability, target, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        score(probability, target)


def test_rounding_and_any_integer_dtype_pass() -> None:
    probability = torch.randn(50, 1000).softmax(-1)
    target = torch.randint(100, (50,))
    for score in SCORES[:-1]:
        expected = score(probability, target)
        torch.testing.assert_close(score(probability.double(), target.int()).float(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(score(probability, target.to(torch.int8)), expected)
    assert metrics.brier_score(GOOD, LABEL.bool()) == metrics.brier_score(GOOD, LABEL)
    rough = torch.randn(50, 1000).softmax(-1).bfloat16()
    assert metrics.brier_score(rough, target).isfinite()


def every_score(of: Tensor) -> dict[str, Tensor]:
    """Each function that reads values, on tensors where ``of`` is."""
    p = torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.5, 0.5]]).to(of)
    label = torch.tensor([0, 1, 1], device=of.device)
    score = torch.tensor([0.1, 0.5, 0.3]).to(of)
    wrong, one = label == 0, torch.ones_like(score)
    found = {
        **{name: getattr(metrics, name)(p, label) for name in ("brier_score", "top_label_ece", "mce", "adaptive_ece")},
        **{name: getattr(metrics, name)(p, label) for name in ("class_pooled_ece", "class_averaged_ece")},
        "bins": metrics.reliability_bins(p, label).expected,
        "matthews_correlation": metrics.matthews_correlation(p.argmax(-1), label),
        "crps_gaussian": metrics.crps_gaussian(score, one, one),
        "crps_samples": metrics.crps_samples(p, one[:2]),
        "interval_coverage": metrics.interval_coverage(*metrics.gaussian_interval(score, one), one),
        "interval_width": metrics.interval_width(score, one),
        "pinball_loss": metrics.pinball_loss(score, one, level=0.3),
        "pinball_losses": metrics.pinball_loss(score, one, level=score),
        "aurc": metrics.aurc(score, wrong),
        "excess_aurc": metrics.excess_aurc(score, wrong),
        "risk_at_coverage": metrics.risk_at_coverage(score, wrong, 0.5),
        "coverage_at_risk": metrics.coverage_at_risk(score, wrong, 0.5),
        "risk_coverage_curve": metrics.risk_coverage_curve(score, wrong)[1],
        "accuracy_rejection_curve": metrics.accuracy_rejection_curve(score, ~wrong)[1],
        "ood_auroc": metrics.ood_auroc(score, score),
        "ood_aupr": metrics.ood_aupr(score, score),
        "ood_fpr": metrics.ood_fpr(score, score),
    }
    return found


def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the functions look the check up: doctests may have imported a module of that name once more."""
    scores = [getattr(metrics, name) for name in metrics.__all__ if isfunction(getattr(metrics, name))]
    spaces = [score.__globals__ for score in scores]
    helpers = [value for space in spaces for value in space.values() if isfunction(value)]
    for space in (*spaces, *(helper.__globals__ for helper in helpers)):
        if "refuse" in space:
            monkeypatch.setitem(space, "refuse", lambda *problems: None)


def test_nothing_but_the_checks_reads_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values raise where one is read; on a device that would be a wait for it."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        like = torch.empty(())
        with pytest.raises(DataDependentOutputException):
            every_score(like)
        no_checks(monkeypatch)
        found = every_score(like)
    assert len(found) == 23 and all(value.dtype in (torch.float32, torch.float64) for value in found.values())


@pytest.mark.cuda
def test_results_on_a_device_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    expected = every_score(torch.empty((), dtype=dtype))
    found = every_score(torch.empty((), dtype=dtype, device="cuda"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value)


def test_results_have_the_dtype_of_the_scores(dtype: torch.dtype) -> None:
    for name, value in every_score(torch.empty((), dtype=dtype)).items():
        expected = torch.float64 if name in ("matthews_correlation", "bins") else dtype
        assert value.dtype == expected, name


def test_memory_may_lie_anyhow() -> None:
    """Torch's searches warn of tensors that they must copy, once a program unless told otherwise."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        probability = torch.randn(4, 2, 30).softmax(0).permute(1, 2, 0)
        target = torch.randint(4, (30, 2)).T
        for score in SCORES[:-1]:
            torch.testing.assert_close(score(probability, target), score(probability.contiguous(), target.contiguous()))
        uncertainty = probability[..., 0]
        for pair in (
            (metrics.matthews_correlation, probability.argmax(-1), target),
            (metrics.aurc, uncertainty, target == 0),
            (metrics.ood_auroc, uncertainty, probability[..., 1]),
            (metrics.ood_aupr, uncertainty, probability[..., 1]),
            (metrics.ood_fpr, uncertainty, probability[..., 1]),
        ):
            score, first, second = pair
            torch.testing.assert_close(score(first, second), score(first.contiguous(), second.contiguous()))
    finally:
        torch.set_warn_always(before)


def test_tensors_on_two_devices_are_named() -> None:
    here, there = torch.ones(3), torch.ones(3, device="meta")
    for name, score in (
        ("target", lambda: metrics.brier_score(GOOD, LABEL.to("meta"))),
        ("loss", lambda: metrics.aurc(here, there)),
        ("scores_out", lambda: metrics.ood_auroc(here, there)),
        ("target", lambda: metrics.pinball_loss(here, there, 0.5)),
        ("upper", lambda: metrics.interval_width(here, there)),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected it on cpu, where \w.* is, got meta"):
            score()
