"""One factor for all deviations of a student, against a search by hand."""

import math

import pytest
import torch
from torch import nn

from gpseq.prediction import predict
from gpseq.reconfiguration import calibrate_spread, drawing
from gpseq.reconfiguration.rollout import find_rollout
from tests.oracles_reconfiguration import BATCH, CLASSES, LENGTH, PADDING, Classifier, Linear, linear_student, moved


def batches(number=2):
    torch.manual_seed(3)
    return [(torch.randn(6, LENGTH, 3, dtype=torch.float64), torch.randint(0, CLASSES, (6,))) for _ in range(number)]


def student():
    return linear_student(moved(Classifier(norm_first=True)), variance=0.5)


def by_hand(model, data, scale, seed):
    """What is minimised, for one factor."""
    rollout = find_rollout(model)
    rollout.spread_scale.fill_(scale)
    total = 0.0
    rollout.generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), drawing(model):
        for x, y in data:
            probs = torch.stack([model(x).softmax(-1) for _ in range(5)]).mean(0)
            total -= probs[torch.arange(6), y].log().sum().item()
    rollout.generator = None
    rollout.spread_scale.fill_(1.0)
    return total


def test_it_is_the_best_of_what_is_tried():
    model, data = student(), batches()
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(9)))
    coarse = {scale: by_hand(model, data, scale, seed) for scale in (0.125, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)}
    found = calibrate_spread(model, data, num_samples=5, generator=torch.Generator().manual_seed(9))
    assert found == pytest.approx(find_rollout(model).spread_scale.item())
    assert by_hand(model, data, found, seed) <= min(coarse.values()) + 1e-6
    assert 0.5 < found / min(coarse, key=lambda scale: coarse[scale]) < 2


def test_it_scales_what_students_draw_and_say():
    model, x = student(), batches()[0][0]
    before = predict(model, x, generator=torch.Generator().manual_seed(0))
    state, modes = torch.get_rng_state(), [part.training for part in model.modules()]
    scale = calibrate_spread(model, batches(), generator=torch.Generator().manual_seed(0))
    assert torch.get_rng_state().equal(state) and [part.training for part in model.modules()] == modes
    after = predict(model, x, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after.scores["spread"], before.scores["spread"] * scale, rtol=1e-6, atol=0)
    again = calibrate_spread(model, batches(), generator=torch.Generator().manual_seed(0))
    assert find_rollout(model).spread_scale.item() == pytest.approx(scale * again, rel=1e-6)
    other = student()
    other.load_state_dict(model.state_dict())
    assert find_rollout(other).spread_scale == find_rollout(model).spread_scale


def test_mappings_and_labels_that_are_left_out():
    model = moved(Classifier(norm_first=True, tokens=True))
    y = torch.randint(0, CLASSES, (BATCH, LENGTH)).masked_fill(PADDING, -100)
    x = torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
    other = x.clone()
    other[PADDING] = 30.0  # has no label, and is seen by nobody
    found = []
    for given in (x, other):
        torch.manual_seed(0)
        batch = {"x": given, "padding_mask": PADDING, "labels": y}
        found.append(calibrate_spread(linear_student(model), [batch], generator=torch.Generator().manual_seed(0)))
    assert found[0] == found[1] > 0


class Failing(Linear):
    def conditional(self, x, t=None, mask=None):
        raise FloatingPointError("at the start")


def test_bad_calls_change_nothing():
    model, data = student(), batches()
    for loader, got in (([], "none"), ([x for x, _ in data], "some without")):
        with pytest.raises(ValueError, match=f"loader: expected batches with labels, got {got}"):
            calibrate_spread(model, loader)
    with pytest.raises(TypeError, match="student: expected one that a Distiller made"):
        calibrate_spread(nn.Linear(2, 2), data)
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        calibrate_spread(model, data, num_samples=0)
    rollout = find_rollout(model)
    rollout.spread_scale.fill_(math.sqrt(2))
    rollout.kernel = Failing()
    with pytest.raises(FloatingPointError, match="at the start"):
        calibrate_spread(model, data)
    assert rollout.spread_scale.item() == pytest.approx(math.sqrt(2))
