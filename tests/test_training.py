"""The training loop: against a loop written out, and a run that was stopped against one that was not."""

import builtins
import copy
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import signal
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from gpseq import training
from gpseq.datasets import load_images
from gpseq.storage import StorageError

X, Y = torch.randn(22, 3, generator=torch.Generator().manual_seed(1)), torch.arange(22.0)[:, None] % 3


@pytest.fixture(autouse=True)
def _interruptible():
    """Ctrl-C as in a terminal: a run in the background starts with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def make(seed: int = 0) -> nn.Module:
    """With dropout, which draws, and batch normalisation, which has buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))


def squared(model: nn.Module, batch: list[Tensor], step: int) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def score(model: nn.Module) -> float:
    """It draws, as sampled predictions do."""
    return ((model(X) - Y).square().mean() + 0.01 * torch.randn(())).item()


def shuffled(generator: torch.Generator | None = None) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)


BATCHES = [[X[i::4], Y[i::4]] for i in range(4)]


def same(one: object, other: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0.1, 1e6])
def test_it_is_the_loop_that_one_would_write(dtype, limit):
    model = make().to(dtype)
    other = copy.deepcopy(model)
    batches = [[x.to(dtype), y.to(dtype)] for x, y in BATCHES]

    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = training.fit(model, squared, batches, optimizer=optimizer, epochs=3, max_grad_norm=limit)

    torch.manual_seed(5)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        losses, norms = [], []
        for x, y in batches:
            optimizer.zero_grad()
            loss = (other(x) - y).square().mean()
            loss.backward()
            norm = torch.stack([p.grad.square().sum() for p in other.parameters()]).sum().sqrt()
            if limit is not None and norm > limit:
                for p in other.parameters():
                    p.grad *= limit / norm
            optimizer.step()
            losses.append(loss.item())
            norms.append(norm.item())
        found = history.epochs[epoch]
        assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-4)
        assert found.steps == 4 and found.learning_rate == 0.05 and found.score is None and found.seconds > 0
        assert (found.gradient_norm is None) == (limit is None)
        if limit is not None:
            assert found.gradient_norm == pytest.approx(sum(norms) / 4, rel=1e-4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert limit is not None or torch.equal(p, q)
    assert len(history) == 3 and not history.stopped_early
    assert history.best_epoch is None and history.best_score is None


def test_steps_are_counted_over_all_epochs():
    seen = []

    def loss(model, batch, step):
        seen.append((step, model.training, torch.is_grad_enabled()))
        return squared(model, batch, step)

    def validate(model):
        assert not model.training and not torch.is_grad_enabled()
        return 1.0

    model = make()
    training.fit(model, loss, BATCHES, optimizer=torch.optim.SGD(model.parameters(), 0.1), epochs=3, validate=validate)
    assert seen == [(step, True, True) for step in range(12)] and model.training


def test_a_history_can_be_written_as_json():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = training.fit(model, squared, BATCHES, optimizer=optimizer, epochs=2, validate=score)
    found = json.loads(json.dumps(history.as_dict()))
    assert found["best_epoch"] == history.best_epoch and found["best_score"] == history.best_score
    assert [epoch["loss"] for epoch in found["epochs"]] == [epoch.loss for epoch in history.epochs]


def test_it_learns_from_real_images():
    """A linear classifier on the shipped part of MNIST; nearest class means get 75 %."""
    images = load_images("mnist")
    x, y = images.x_train.flatten(1) / 255, images.y_train
    test = images.x_test.flatten(1) / 255

    def accuracy(model):
        return (model(test).argmax(1) == images.y_test).double().mean().item()

    model = nn.Linear(784, 10)
    loader = DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = training.fit(
        model,
        lambda model, batch, step: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        loader,
        optimizer=optimizer,
        epochs=5,
        validate=accuracy,
        mode="max",
        scheduler=training.warmup_cosine(optimizer, total_steps=300, warmup_steps=30),
        schedule="step",
    )
    assert history.best_score > 0.85
    assert accuracy(model) == history.best_score
    assert history.epochs[-1].loss < history.epochs[0].loss


# --- early stopping ---------------------------------------------------------------------------------------------------


def slow_stop(scores: list[float], patience: int | None, delta: float) -> tuple[int, int]:
    """Number of epochs that are run, and the best one, of scores that shall be small."""
    best, since, at = scores[0], 0, 0
    for number, value in enumerate(scores[1:], start=1):
        if patience is not None and since >= patience:
            return number, at
        if value < best - delta:
            best, since, at = value, 0, number
        else:
            since += 1
    return len(scores), at


@given(
    st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12),
    st.one_of(st.none(), st.integers(1, 4)),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from(["min", "max"]),
)
def test_patience_is_counted_from_the_best_epoch(scores, patience, delta, mode):
    weight = nn.Parameter(torch.zeros(()))
    model = nn.ParameterList([weight])
    sign = 1 if mode == "min" else -1
    history = training.fit(
        model,
        lambda model, batch, step: weight * 1.0,  # one step down an epoch: the weight counts epochs
        [0],
        optimizer=torch.optim.SGD([weight], lr=1.0),
        epochs=len(scores),
        validate=lambda model: sign * scores[-round(weight.item()) - 1],
        mode=mode,
        patience=patience,
        min_delta=delta,
    )
    ran, best = slow_stop(scores, patience, delta)
    assert (len(history), history.best_epoch) == (ran, best)
    assert history.stopped_early == (ran < len(scores))
    assert history.best_score == sign * scores[best]
    assert weight.item() == -(best + 1)


def test_the_last_parameters_stay_if_asked_for():
    scores = iter([1.0, 0.5, 2.0, 3.0])
    weight = nn.Parameter(torch.zeros(()))
    history = training.fit(
        nn.ParameterList([weight]),
        lambda model, batch, step: weight * 1.0,
        [0],
        optimizer=torch.optim.SGD([weight], lr=1.0),
        epochs=4,
        validate=lambda model: next(scores),
        restore_best=False,
    )
    assert history.best_epoch == 1 and weight.item() == -4


# --- stopped and resumed ----------------------------------------------------------------------------------------------

SCHEDULERS = {
    "none": (None, "epoch"),
    "steps": (lambda o: lr_scheduler.StepLR(o, 2, 0.5), "epoch"),
    "milestones": (lambda o: lr_scheduler.MultiStepLR(o, [1, 3]), "epoch"),
    "cosine": (lambda o: training.warmup_cosine(o, 25, 5), "step"),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40), "step"),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0), "epoch"),
    "sequence": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
        "epoch",
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


class Run:
    """All that ``fit`` works on, fresh, as a new process would make it."""

    def __init__(self, optimizer: str, scheduler: str, seed: int = 0, own_generator: bool = False) -> None:
        self.model = make(seed)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        build, self.schedule = SCHEDULERS[scheduler]
        self.scheduler = build(self.optimizer) if build else None
        self.loader = shuffled(torch.Generator().manual_seed(seed) if own_generator else None)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + 10)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002

    def fit(self, path=None, interrupt: int | None = None, epochs: int = 5, **changed) -> training.History:
        def loss(model, batch, step):
            if step == interrupt:
                signal.raise_signal(signal.SIGINT)
            noise = torch.randn((), generator=self.generator) + random.gauss(0, 1) + np.random.normal()  # noqa: NPY002
            self.average.update_parameters(model)
            return squared(model, batch, step) * (1 + 0.01 * noise)

        arguments = {"validate": score, "max_grad_norm": 1.0, "patience": 4, "restore_best": False} | changed
        return training.fit(
            self.model,
            loss,
            self.loader,
            optimizer=self.optimizer,
            epochs=epochs,
            scheduler=self.scheduler,
            schedule=self.schedule,
            checkpoint=path,
            also={"average": self.average},
            generators=[self.generator],
            **arguments,
        )

    @property
    def state(self) -> dict:
        found = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "next": [torch.rand(3), torch.rand(3, generator=self.generator), random.random(), np.random.rand()],  # noqa: NPY002
        }
        if self.scheduler is not None:
            found["scheduler"] = {
                k: v for k, v in self.scheduler.state_dict().items() if isinstance(v, int | float | list)
            }
            found["scheduler"].pop("_schedulers", None)
        return copy.deepcopy(found)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("own", [False, True], ids=["default generator", "own generator"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, optimizer, scheduler, own):
    """Interrupted twice, in an epoch and at the start of one; each time in a "process" with other seeds."""
    whole = Run(optimizer, scheduler, own_generator=own)
    expected = whole.fit(restore_best=False)
    state = whole.state

    path = tmp_path / "run.ckpt"
    for attempt, interrupt in enumerate([7, 15, None]):
        run = Run(optimizer, scheduler, seed=attempt, own_generator=own)
        if interrupt is None:
            history = run.fit(path)
        else:
            with pytest.raises(KeyboardInterrupt):
                run.fit(path, interrupt)
    assert history == expected
    assert same(run.state, state)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.lists(st.integers(0, 24), max_size=4), st.booleans())
def test_it_may_be_stopped_anywhere(tmp_path, interrupts, best):
    path = tmp_path / "run.ckpt"
    path.unlink(missing_ok=True)
    whole = Run("adamw", "cosine")
    expected = whole.fit(restore_best=best)
    state = whole.state
    for seed, interrupt in enumerate([*sorted(interrupts), None]):
        run = Run("adamw", "cosine", seed=seed)
        try:
            history = run.fit(path, interrupt, restore_best=best)
        except KeyboardInterrupt:
            continue
    assert history == expected and same(run.state, state)


@pytest.mark.parametrize("call", range(1, 10))
def test_a_process_that_is_killed_leaves_a_checkpoint(tmp_path, call, monkeypatch):
    """Killed just before its n-th call that makes something durable: a flush or a rename."""
    whole = Run("adamw", "cosine")
    expected = whole.fit()
    path = tmp_path / "run.ckpt"
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs fails the test, and does not hold it up
        try:
            calls = iter(range(1, 1000))

            def counted(function):
                def durable(*arguments):
                    if next(calls) == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments)

                return durable

            os.fsync, os.replace = counted(os.fsync), counted(os.replace)
            Run("adamw", "cosine").fit(path)
        finally:
            os._exit(1)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    # Each save is a flush, a rename, and a flush of the folder; the first is of the start.
    assert path.exists() == (call > 2)
    again = Run("adamw", "cosine", seed=0 if call <= 2 else 3)
    assert again.fit(path) == expected
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_a_finished_run_is_not_run_again(tmp_path):
    path = tmp_path / "run.ckpt"
    first = Run("sgd", "none")
    expected = first.fit(path, restore_best=True)
    second = Run("sgd", "none", seed=4)
    assert second.fit(path, interrupt=0, restore_best=True) == expected
    assert same(second.model.state_dict(), first.model.state_dict())


def test_a_finished_run_can_be_prolonged(tmp_path):
    """From where it was, not from its best epoch, with which the model was left."""
    path = tmp_path / "run.ckpt"
    whole = Run("adamw", "steps")
    expected = whole.fit(epochs=6, restore_best=True)
    Run("adamw", "steps").fit(path, epochs=3, restore_best=True)
    again = Run("adamw", "steps", seed=2)
    assert again.fit(path, epochs=6, restore_best=True) == expected
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_more_patience_prolongs_a_run_that_gave_up(tmp_path):
    def run(patience, path):
        model = make()
        scores = iter([1.0, 2.0, 3.0, 0.5, 4.0, 5.0])
        return training.fit(
            model,
            squared,
            BATCHES,
            optimizer=torch.optim.SGD(model.parameters(), 0.01),
            epochs=6,
            validate=lambda model: next(scores),
            patience=patience,
            checkpoint=path,
        )

    history = run(1, tmp_path / "a")
    assert len(history) == 2 and history.stopped_early
    history = run(3, tmp_path / "a")  # the scores start again: 1, 2, then 1, 2
    assert [epoch.score for epoch in history.epochs] == [1.0, 2.0, 1.0, 2.0] and history.best_epoch == 0


def test_a_fresh_start_replaces_the_file(tmp_path):
    path = tmp_path / "run.ckpt"
    Run("sgd", "none").fit(path)
    run = Run("sgd", "none", seed=3)
    history = run.fit(path, resume=False)
    assert history == Run("sgd", "none", seed=3).fit()
    assert Run("sgd", "none").fit(path) == history


def test_generators_of_samplers_are_found(tmp_path):
    def run(interrupt, path, seed):
        model = make()
        data = TensorDataset(X, Y)
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
        loader = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 5, False))

        def loss(model, batch, step):
            if step == interrupt:
                raise KeyboardInterrupt
            return squared(model, batch, step)

        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        training.fit(model, loss, loader, optimizer=optimizer, epochs=3, checkpoint=path)
        return model.state_dict()

    expected = run(None, None, 0)
    with pytest.raises(KeyboardInterrupt):
        run(7, tmp_path / "a", 0)
    assert same(run(None, tmp_path / "a", 99), expected)


def test_an_interruption_is_reported_and_passed_on(tmp_path, caplog):
    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        Run("sgd", "none").fit(path, interrupt=8)
    assert f"epoch 2/5: interrupted; {path} has what was done before" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        Run("sgd", "none").fit(None, interrupt=8)
    assert "nothing was kept" in caplog.text


# --- checkpoints that do not fit --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("written") / "run.ckpt"
    Run("adamw", "steps").fit(path, epochs=2)
    return path.read_bytes()


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_checkpoint_is_refused(tmp_path, written, cut):
    path = tmp_path / "run.ckpt"
    run, untouched = Run("adamw", "steps", seed=1), Run("adamw", "steps", seed=1)
    for at in [*range(100), *range(100, len(written), 211), *range(len(written) - 100, len(written))]:
        damaged = bytearray(written)
        if cut:
            del damaged[at:]
        else:
            damaged[at] ^= 1 + at % 255
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"run\.ckpt"):
            run.fit(path, epochs=2)
        assert path.read_bytes() == damaged
    states = []
    for one in (run, untouched):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        states.append(one.state)
    assert same(*states)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\n\n"])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"run.ckpt is not a checkpoint of gpseq, or its first line is damaged"):
        Run("sgd", "none").fit(path)
    torch.save(make().state_dict(), path)
    with pytest.raises(StorageError, match=r"run.ckpt is not a checkpoint of gpseq, or its first line is damaged"):
        Run("sgd", "none").fit(path)


def test_a_newer_version_is_refused(tmp_path, written):
    (tmp_path / "run.ckpt").write_bytes(written.replace(b"gpseq-training 1 ", b"gpseq-training 2 ", 1))
    with pytest.raises(StorageError, match="has version 2 of the format; this gpseq reads version 1"):
        Run("adamw", "steps").fit(tmp_path / "run.ckpt")


def test_reading_runs_no_code(tmp_path, written):
    """A checkpoint with a true checksum and a pickle that would call something."""

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trap"),))

    file = io.BytesIO()
    torch.save({"epochs": Trap()}, file)
    body = file.getvalue()
    (tmp_path / "run.ckpt").write_bytes(f"gpseq-training 1 {hashlib.sha256(body).hexdigest()}\n".encode() + body)
    with pytest.raises(StorageError, match="holds what cannot be read back"):
        Run("adamw", "steps").fit(tmp_path / "run.ckpt")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        ("sgd", "steps", r"it holds .*optimizer \(AdamW\).*; this run has .*optimizer \(SGD\)"),
        ("adamw", "milestones", r"scheduler \(StepLR\).*; this run has .*scheduler \(MultiStepLR\)"),
        ("adamw", "none", r"scheduler \(StepLR\), average; this run has model, optimizer \(AdamW\), average"),
    ],
)
def test_the_checkpoint_of_another_recipe_is_refused(tmp_path, written, optimizer, scheduler, message):
    path = tmp_path / "run.ckpt"
    path.write_bytes(written)
    with pytest.raises(StorageError, match=message):
        Run(optimizer, scheduler).fit(path)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1)), nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 1))]
)
def test_the_checkpoint_of_another_model_changes_nothing(tmp_path, model):
    """Also where the first layers would fit."""

    def fit(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.5)
        return training.fit(model, squared, BATCHES, optimizer=optimizer, epochs=1, checkpoint=tmp_path / "a")

    fit(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1, bias=False)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StorageError, match=r"belongs to another (model|optimizer)"):
        fit(model)
    assert same(model.state_dict(), before)


def test_another_number_of_generators_is_refused(tmp_path, written):
    path = tmp_path / "run.ckpt"
    path.write_bytes(written)
    with pytest.raises(StorageError, match="holds the states of 1 generators; this run has 2"):
        Run("adamw", "steps", own_generator=True).fit(path)


class Unreadable:
    """It can be written, but is nothing that a reader should trust."""


@pytest.mark.parametrize("content", [Unreadable(), lambda: None], ids=["foreign object", "function"])
def test_a_state_that_cannot_be_read_back_is_found_out_at_once(tmp_path, content):
    class Odd:
        def state_dict(self):
            return {"object": content}

        def load_state_dict(self, state):
            raise AssertionError

    model = make()
    with pytest.raises(ValueError, match="checkpoint: a state_dict holds more than tensors, numbers, text and nests"):
        training.fit(
            model,
            lambda *a: pytest.fail("a step was taken"),
            BATCHES,
            optimizer=torch.optim.SGD(model.parameters(), 0.01),
            epochs=1,
            checkpoint=tmp_path / "a",
            also={"odd": Odd()},
        )


def test_a_folder_that_is_not_there_is_found_out_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Run("sgd", "none").fit(tmp_path / "nowhere" / "run.ckpt", interrupt=0)


# --- what is refused --------------------------------------------------------------------------------------------------


def plain(loss=squared, loader=BATCHES, epochs=2, **changed) -> training.History:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    if callable(build := changed.pop("build", None)):
        changed["scheduler"] = build(optimizer)
    return training.fit(model, loss, loader, optimizer=optimizer, epochs=epochs, **changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loader": iter(BATCHES)}, r"loader: got an iterator \(list_iterator\)"),
        ({"loader": []}, "loader: gave no batch"),
        ({"epochs": -1}, "epochs: got -1"),
        ({"mode": "best"}, "mode: got 'best', expected 'min' or 'max'"),
        ({"schedule": "batch"}, "schedule: got 'batch'"),
        ({"patience": 3}, "patience: got 3 without validate"),
        ({"patience": 0, "validate": score}, "patience: got 0"),
        ({"min_delta": -1.0}, "min_delta: got -1.0"),
        ({"min_delta": math.nan}, "min_delta: got nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0"),
        ({"build": lr_scheduler.ReduceLROnPlateau}, "scheduler: ReduceLROnPlateau needs validate"),
        ({"also": {"model": nn.Linear(1, 1)}}, "also: got the name 'model', which is taken"),
        ({"loss": lambda model, batch, step: model(batch[0])}, r"loss: got shape \(6, 1\), expected a tensor of one"),
        ({"loss": lambda model, batch, step: 1.0}, "loss: got float"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plain(**arguments)


def test_no_epochs_are_no_change():
    assert plain(epochs=0) == training.History((), None, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_before_the_step(tmp_path, bad):
    run, states = Run("sgd", "none"), []

    def loss(model, batch, step):
        states.append(copy.deepcopy(dict(model.named_parameters())))
        return squared(model, batch, step) * (bad if step == 6 else 1)

    with pytest.raises(FloatingPointError, match=f"loss: got {bad} in step 6"):
        training.fit(run.model, loss, run.loader, optimizer=run.optimizer, epochs=3, checkpoint=tmp_path / "run.ckpt")
    assert same(dict(run.model.named_parameters()), states[6])
    written = (tmp_path / "run.ckpt").read_bytes().partition(b"\n")[2]
    assert len(torch.load(io.BytesIO(written), weights_only=True)["epochs"]) == 1


def test_a_gradient_that_is_not_finite_raises_before_the_step():
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(FloatingPointError, match="gradient norm: got inf in step 0"):
        training.fit(
            nn.ParameterList([weight]),
            lambda model, batch, step: weight.sqrt(),
            [0],
            optimizer=torch.optim.SGD([weight], 0.1),
            epochs=1,
            max_grad_norm=1.0,
        )
    assert weight.item() == 0


def test_a_score_may_be_infinite_but_not_nan():
    assert plain(validate=lambda model: math.inf).best_epoch == 0
    with pytest.raises(FloatingPointError, match="validate: got nan after epoch 1"):
        plain(validate=lambda model: math.nan)


def test_a_failing_validation_leaves_training_mode():
    model = make()
    with pytest.raises(ZeroDivisionError):
        training.fit(
            model,
            squared,
            BATCHES,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            epochs=1,
            validate=lambda m: 1 / 0,
        )
    assert model.training


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_learning_rates_are_those_of_the_schedule():
    rates = [epoch.learning_rate for epoch in plain(epochs=4, build=lambda o: lr_scheduler.StepLR(o, 1, 0.5)).epochs]
    assert rates == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    history = plain(epochs=3, schedule="step", build=lambda o: training.warmup_cosine(o, 12, 2))
    expected = [0.01 * (1 + math.cos(math.pi * (last - 2) / 10)) / 2 for last in (3, 7, 11)]
    assert [epoch.learning_rate for epoch in history.epochs] == pytest.approx(expected)


@given(st.integers(1, 60), st.integers(0, 59), st.floats(0, 1))
def test_warmup_rises_and_the_cosine_falls(total, warmup, floor):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    if warmup >= total:
        with pytest.raises(ValueError, match="warmup_steps"):
            training.warmup_cosine(optimizer, total, warmup, floor)
        return
    factor = training.warmup_cosine(optimizer, total, warmup, floor).lr_lambdas[0]
    values = [factor(step) for step in range(total + 5)]
    assert optimizer.param_groups[0]["lr"] == 2.0 * values[0] and 0 <= min(values)
    assert all(a < b for a, b in itertools.pairwise(values[: warmup + 1]))
    assert values[warmup] == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[warmup:]))
    assert values[total:] == pytest.approx([floor] * 5)


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_a_floor_beyond_the_range_is_refused(floor):
    with pytest.raises(ValueError, match="floor: got"):
        training.warmup_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), 10, floor=floor)


# --- batches and progress ---------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["x", "y"])


def test_batches_are_moved_whatever_their_form():
    made = training.move({"a": [torch.zeros(2), "text"], "b": Pair(torch.ones(1), None), "c": (torch.ones(3),)}, "meta")
    assert made["a"][0].device.type == made["b"].x.device.type == made["c"][0].device.type == "meta"
    assert made["a"][1] == "text" and made["b"].y is None and isinstance(made["b"], Pair)
    seen = []

    def loss(model, batch, step):
        seen.append([part.device.type for part in batch])
        return next(model.parameters()).sum()

    plain(loss=loss, device="meta", epochs=1)
    assert seen == [["meta", "meta"]] * 4


def test_no_bar_unless_there_is_a_terminal(capsys, caplog):
    caplog.set_level(logging.INFO, "gpseq.training")
    plain(validate=score)
    assert capsys.readouterr() == ("", "")
    assert "epoch 1/2: loss " in caplog.text and "epoch 2/2: loss " in caplog.text and ", score " in caplog.text


def test_a_bar_on_a_terminal(capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "gpseq.training")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    history = plain()
    out, err = capsys.readouterr()
    assert out == "" and "epoch 1/2:   0%" in err and f"epoch 2/2: loss {history.epochs[1].loss:.4g}" in err
    assert not caplog.records
    plain(progress=False)
    assert capsys.readouterr() == ("", "")


def test_without_tqdm_there_is_a_log(capsys, caplog, monkeypatch):
    real_find, real_import = importlib.util.find_spec, builtins.__import__

    def import_without(name, *arguments, **named):
        if name == "tqdm":
            raise ImportError(name)
        return real_import(name, *arguments, **named)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else real_find(name))
    monkeypatch.setattr(builtins, "__import__", import_without)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    caplog.set_level(logging.INFO, "gpseq.training")
    plain()
    assert capsys.readouterr() == ("", "") and "epoch 2/2: loss " in caplog.text
    with pytest.raises(ImportError, match="progress: a bar needs the package tqdm"):
        plain(progress=True)


def test_a_bar_changes_no_bit(capsys):
    def run(progress):
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        history = training.fit(model, squared, shuffled(), optimizer=optimizer, epochs=2, progress=progress)
        return history, model.state_dict()

    (one, first), (other, second) = run(True), run(False)
    assert one == other and same(first, second)
