"""The driver, by learners whose every score is known."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from gpseq import metrics
from gpseq.continual import Evaluation, ScoreMatrix, Task, evaluate, tasks_by_class, tasks_by_key, tasks_by_time

X = torch.arange(12.0, dtype=torch.float64)


class Recorder:
    """Learns the number of the last task; its score on task j after task k is 10 k + j."""

    def __init__(self) -> None:
        self.learnt: list[str] = []

    def learn(self, task: Task) -> None:
        self.learnt.append(task.name)

    def score(self, task: Task) -> dict[str, float]:
        return {"accuracy": 10.0 * len(self.learnt) + int(task.name[-1]), "rmse": torch.tensor(1.0)}


def test_every_past_task_is_scored_after_every_task():
    learner = Recorder()
    found = evaluate(tasks_by_key(X, X, 3, held_out=0.5), learner.learn, learner.score)
    nan = math.nan
    expected = torch.tensor([[11, nan, nan], [21, 22, nan], [31, 32, 33]], dtype=torch.float64)
    torch.testing.assert_close(found.scores["accuracy"].values, expected, equal_nan=True)
    assert found.names == ("task 1", "task 2", "task 3") == tuple(learner.learnt)
    assert found.scores["accuracy"].higher_is_better and not found.scores["rmse"].higher_is_better
    assert found.scores["rmse"].average.tolist() == [1, 1, 1]
    assert found.seconds.shape == (3,) and (found.seconds >= 0).all()


def test_future_tasks_on_request():
    learner = Recorder()
    found = evaluate(tasks_by_key(X, X, 2, held_out=0.5), learner.learn, learner.score, future=True)
    assert found.scores["accuracy"].values.tolist() == [[11, 12], [21, 22]]
    assert found.scores["accuracy"].forward_transfer(torch.tensor([0.0, 2.0])) == 10


def test_only_learning_is_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("gpseq.continual.scores.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def spend(seconds: float) -> dict[str, float]:
        now[0] += seconds
        return {"loss": 0.0}

    found = evaluate(tasks_by_key(X, X, 2, held_out=0.5), lambda task: spend(0.25), lambda task: spend(7.0))
    assert found.seconds.tolist() == [0.25, 0.25]


def test_tasks_may_come_from_a_generator_and_be_of_no_end_that_is_known():
    learner = Recorder()
    stream = tasks_by_key(X, X, 3, held_out=0.5)
    alive = []

    def coming():
        for task in stream:
            alive.append(len(learner.learnt))  # nothing is asked for before the last task has been learnt
            yield task

    found = evaluate(coming(), learner.learn, learner.score)
    assert alive == [0, 1, 2]
    assert found.scores["accuracy"].values.shape == (3, 3)


def test_tasks_without_rows_are_neither_learnt_nor_scored():
    t = torch.tensor([0.0, 0.2, 2.5, 2.6], dtype=torch.float64)
    tasks = tasks_by_time(t, t, t, edges=[0.0, 1.0, 2.0, 3.0], held_out=0.5, empty="keep")
    learnt = []
    found = evaluate(tasks, lambda task: learnt.append(task.name), lambda task: {"nlpd": len(learnt)})
    assert learnt == ["0 to 1", "2 to 3"]
    values = found.scores["nlpd"].values
    assert values[:, 0].tolist() == [1, 1, 2] and values[:, 1].isnan().all() and values[2, 2] == 2
    assert found.seconds[1] == 0
    torch.testing.assert_close(found.scores["nlpd"].average, torch.tensor([1.0, 1.0, 2.0]).double())


def test_a_learner_that_remembers_one_class_only():
    """By hand: it always answers the class it saw last, so each of two classes a task is right half the time."""
    label = torch.tensor([0, 1] * 5 + [2, 3] * 5)
    tasks = tasks_by_class(label.double(), label, ((0, 1), (2, 3)), test=(label.double(), label))
    last = []
    found = evaluate(
        tasks,
        learn=lambda task: last.append(task.y[-1]),
        score=lambda task: {"accuracy": metrics.accuracy(last[-1].expand(len(task.y_test)), task.y_test)},
    )
    matrix = found.scores["accuracy"]
    torch.testing.assert_close(
        matrix.values, torch.tensor([[0.5, math.nan], [0.0, 0.5]], dtype=torch.float64), equal_nan=True
    )
    assert matrix.average.tolist() == [0.5, 0.25]
    assert matrix.backward_transfer == -0.5 and matrix.average_forgetting[-1] == 0.5
    assert matrix.forgetting[1, 0] == 0.5


def test_an_evaluation_passes_through_json():
    learner = Recorder()
    found = evaluate(tasks_by_key(X, X, 3, held_out=0.5), learner.learn, learner.score)
    again = Evaluation.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again.names == found.names and torch.equal(again.seconds, found.seconds)
    for name, matrix in found.scores.items():
        torch.testing.assert_close(again.scores[name].values, matrix.values, rtol=0, atol=0, equal_nan=True)
        assert again.scores[name].higher_is_better == matrix.higher_is_better


def test_bad_scores_are_named():
    tasks = tasks_by_key(X, X, 2, held_out=0.5)
    with pytest.raises(ValueError, match="tasks: expected at least one task, got none"):
        evaluate([], print, lambda task: {"nlpd": 0.0})
    with pytest.raises(ValueError, match="tasks: expected at least one task with test rows"):
        evaluate(tasks_by_key(X, X, 2), lambda task: None, lambda task: {"nlpd": 0.0})
    with pytest.raises(ValueError, match="higher_is_better: expected a direction for score 'kappa'"):
        evaluate(tasks, lambda task: None, lambda task: {"kappa": 0.0})
    found = evaluate(tasks, lambda task: None, lambda task: {"kappa": 0.0}, higher_is_better={"kappa": True})
    assert found.scores["kappa"].higher_is_better
    names = iter(["nlpd", "rmse", "nlpd"])
    with pytest.raises(ValueError, match=r"score: expected the scores \('nlpd',\), got \('rmse',\) for task 'task 1'"):
        evaluate(tasks, lambda task: None, lambda task: {next(names): 0.0})
    with pytest.raises(ValueError, match=r"matrix: expected .* got torch.float32 of shape \(3, 2\)"):
        ScoreMatrix(torch.zeros(3, 2))


def test_a_method_that_breaks_down_on_the_last_task_does_not_look_better_for_it():
    """Its scores are NaN from its own row on, but it has test rows."""
    tasks = tasks_by_key(X, X, 3, held_out=0.5)
    found = evaluate(tasks, lambda task: None, lambda task: {"rmse": math.nan if task.name == "task 2" else 1.0})
    matrix = found.scores["rmse"]
    assert matrix.tested.tolist() == [True] * 3
    assert matrix.average.isnan().tolist() == [False, True, True]
    assert math.isnan(matrix.backward_transfer) and matrix.average_forgetting[-1].isnan()
    again = Evaluation.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))).scores["rmse"]
    assert again.tested.tolist() == [True] * 3 and again.average.isnan().tolist() == [False, True, True]
    ahead = evaluate(tasks, lambda task: None, lambda task: {"rmse": math.nan}, future=True).scores["rmse"]
    assert math.isnan(ahead.forward_transfer(torch.zeros(3)))


def test_a_document_without_the_mask_is_read_and_infers_it():
    matrix = ScoreMatrix(torch.tensor([[0.5, math.nan], [0.25, math.nan]], dtype=torch.float64))
    document = Evaluation(("a", "b"), {"accuracy": matrix}, torch.zeros(2)).to_dict()
    assert document["scores"]["accuracy"].pop("tested") is None
    again = Evaluation.from_dict(document).scores["accuracy"]
    assert again.tested is None and again.average.tolist() == [0.5, 0.25]


def test_infinite_scores_pass_through_json():
    scores = iter([1.0, math.inf, -math.inf])
    found = evaluate(tasks_by_key(X, X, 2, held_out=0.5), lambda task: None, lambda task: {"nlpd": next(scores)})
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["scores"]["nlpd"]["values"] == [[1.0, None], ["inf", "-inf"]]
    torch.testing.assert_close(
        Evaluation.from_dict(document).scores["nlpd"].values, found.scores["nlpd"].values, equal_nan=True
    )


def test_scores_of_the_wrong_kind_are_named():
    tasks = tasks_by_key(X, X, 2, held_out=0.5)
    with pytest.raises(TypeError, match=r"score: expected numbers by name, .* got float for task 'task 1'"):
        evaluate(tasks, lambda task: None, lambda task: 0.5)
    with pytest.raises(TypeError, match=r"score: expected one number for 'rmse', got tensor\(\[0., 0.\]\)"):
        evaluate(tasks, lambda task: None, lambda task: {"rmse": torch.zeros(2)})
    learnt = []
    with pytest.raises(TypeError, match="higher_is_better: expected a mapping from names to bools, got True"):
        evaluate(tasks, learnt.append, lambda task: {"kappa": 0.5}, higher_is_better=True)
    assert not learnt
    with pytest.raises(TypeError, match="matrix: expected a tensor, got list"):
        ScoreMatrix([[0.5]])
    with pytest.raises(
        ValueError, match=r"tested: expected a bool tensor of shape \(2,\), got torch.bool of shape \(1,\)"
    ):
        ScoreMatrix(torch.zeros(2, 2), tested=torch.ones(1, dtype=torch.bool))
