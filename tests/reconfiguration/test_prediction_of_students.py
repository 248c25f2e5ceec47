"""Predictions with students: draws, moments and scores."""

import pytest
import torch
from torch import nn

from gpseq import prediction
from gpseq.prediction import predict
from gpseq.reconfiguration import Distiller
from tests.oracles_reconfiguration import (
    BATCH,
    CLASSES,
    HOSTS,
    LENGTH,
    PADDING,
    WIDTH,
    Classifier,
    linear_student,
    moved,
)


def student_of(host, **options):
    made = Distiller(host.model, **options)
    made.calibrate(host.inputs)
    with torch.no_grad():
        for parameter in made.rollout.kernel.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.student


def inputs(batch=BATCH):
    return torch.randn(batch, LENGTH, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", list(HOSTS))
def test_draws_and_scores_of_every_host(name):
    host = HOSTS[name](torch.float64)
    student = student_of(host)
    given = {"batch_dim": 1} if name == "torch time first" else {}
    with torch.no_grad():
        found = predict(student, host.inputs, num_samples=6, generator=torch.Generator().manual_seed(1), **given)
        again = predict(student, host.inputs, num_samples=6, generator=torch.Generator().manual_seed(1), **given)
    logits = host.logits(student)
    assert found.samples.shape == (6, *logits.shape)
    assert found.samples.equal(again.samples)
    assert found.samples.isfinite().all() and found.samples.std(0).gt(0).any()
    assert found.probs().sum(-1).allclose(torch.ones(logits.shape[:-1], dtype=logits.dtype))
    lead = logits.shape[:-1]
    assert found.scores["spread"].shape == lead
    assert found.scores["spread.depth"].shape == (*lead, 3)
    torch.testing.assert_close(found.scores["spread.depth"].mean(-1), found.scores["spread"])
    assert found.scores["spread"].gt(0).all()
    assert (found.entropy() >= found.mutual_information() - 1e-12).all()
    assert not student.training


def test_probabilities_are_averaged_and_not_logits():
    model = moved(Classifier(norm_first=True))
    found = predict(linear_student(model, variance=2.0), inputs(), num_samples=20)
    torch.testing.assert_close(found.probs(), found.samples.softmax(-1).mean(0))
    assert not torch.allclose(found.probs(), found.samples.mean(0).softmax(-1), atol=1e-3)


def test_more_draws_are_never_worse_on_average():
    """Jensen: of the mean of probabilities, against the mean of their logarithms."""
    model = moved(Classifier(norm_first=True))
    for seed in range(4):
        torch.manual_seed(seed)
        student, y = linear_student(model, variance=1.0), torch.randint(0, CLASSES, (BATCH,))
        found = predict(student, inputs(), num_samples=8)
        single = nn.functional.cross_entropy(found.samples.flatten(0, 1), y.repeat(8))
        averaged = nn.functional.nll_loss(found.probs().log(), y)
        assert averaged <= single + 1e-12


class Flat(nn.Module):
    """A teacher whose head is linear, so that a student with a linear kernel is linear altogether."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Step() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(x)


@pytest.mark.parametrize("number", [2, 4, 10])
def test_opposite_draws_have_the_exact_mean_of_a_linear_chain(number):
    student = linear_student(moved(Flat()))
    x = inputs()
    with torch.no_grad():
        want = student(x)
        found = predict(student, x, num_samples=number, antithetic=True)
        assert (found.samples - want).abs().min() > 0
        torch.testing.assert_close(found.mean, want, rtol=0, atol=1e-12)
        odd = predict(student, x, num_samples=number + 1, antithetic=True)
        torch.testing.assert_close(odd.samples[:number].mean(0), want, rtol=0, atol=1e-12)
        assert odd.samples.shape[0] == number + 1
        assert not torch.allclose(predict(student, x, num_samples=number).mean, want, rtol=0, atol=1e-6)
        pieces = predict(student, x, num_samples=number, antithetic=True, batch_size=2)
        torch.testing.assert_close(pieces.mean, want, rtol=0, atol=1e-12)
        assert predict(student, x, num_samples=1, antithetic=True).samples.shape[0] == 1


def test_opposite_draws_are_for_students():
    model = moved(Classifier())
    with pytest.raises(ValueError, match="antithetic: expected it with method 'sample' of a student of a Distiller"):
        predict(model, inputs(), antithetic=True)
    with pytest.raises(ValueError, match="antithetic"):
        predict(linear_student(model), inputs(), method="moments", antithetic=True)


@pytest.mark.parametrize("covariance", ["full", "auto"])
def test_moments_of_a_linear_gaussian_chain(covariance):
    """m <- A m + b, C <- A C A' + Q, exactly, and then through the head."""
    from gpseq.propagation import from_variances, propagate

    model = moved(Flat())
    student = linear_student(model, variance=0.3)
    kernel = student.blocks[0].kernel
    x = inputs()
    with torch.no_grad():
        if covariance == "full":
            found = propagate(student, from_variances({}), x, covariance="full")
        else:
            found = predict(student, x, method="moments")
        mean, within = model.embed(x), torch.zeros(WIDTH, WIDTH, dtype=x.dtype)
        for _ in range(3):
            mean = mean @ kernel.weight.mT + kernel.bias
            within = kernel.weight @ within @ kernel.weight.mT + kernel.variance.diag()
        head = model.head
        want = head.weight @ (within / LENGTH) @ head.weight.mT  # the mean of tokens that are independent
        torch.testing.assert_close(found.mean, head(mean.mean(1)), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.covariance.to_dense(), want.expand(BATCH, -1, -1), rtol=0, atol=1e-12)
        draws = predict(student, x[:1], num_samples=20_000)
        error = (draws.mean - found.mean[:1]) / (want.diagonal() / 20_000).sqrt()
        assert error.abs().max() < 4.5
        torch.testing.assert_close(draws.variance[0], want.diagonal(), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["torch pre padded", "torch post padded", "vit", "bert padded", "gpt2", "timm"])
def test_moments_agree_with_draws(name):
    host = HOSTS[name](torch.float64)
    student = student_of(host)
    with torch.no_grad():
        for part in student.modules():
            if hasattr(part, "min_spread"):
                part.spread.bias.fill_(-4.0)  # a small spread, where the rest is close to linear
                part.spread.weight.zero_()
        found = predict(student, host.inputs, method="moments")
        draws = predict(student, host.inputs, num_samples=2000)
    assert found.mean.shape == draws.mean.shape
    seen = ~PADDING if found.mean.dim() == 3 and "padded" in name else slice(None)
    ratio = (found.variance[seen] / draws.variance[seen]).log().abs().mean()
    assert ratio < 0.25
    error = (found.mean - draws.mean)[seen].abs() / draws.variance[seen].sqrt()
    assert error.mean() < 0.25


def test_moments_in_pieces():
    host = HOSTS["torch pre padded"](torch.float64)
    student = student_of(host)
    with torch.no_grad():
        whole = predict(student, host.inputs, method="moments")
        pieces = predict(student, host.inputs, method="moments", batch_size=2)
    torch.testing.assert_close(whole.mean, pieces.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.variance, pieces.variance, rtol=1e-9, atol=0)


def test_batches_in_pieces():
    host = HOSTS["bert padded"](torch.float64)
    student = student_of(host)
    with torch.no_grad():
        found = predict(student, host.inputs, num_samples=3, batch_size=2)
        with torch.random.fork_rng():
            assert found.samples.shape == (3, BATCH, CLASSES)
    assert found.scores["spread.depth"].shape == (BATCH, 3)


def test_the_spread_of_a_known_kernel():
    model = moved(Classifier(norm_first=True, tokens=True))
    student = linear_student(model)
    x = inputs()
    want = student.encoder.layers[0].kernel.variance.sqrt().mean()
    found = predict(student, {"x": x, "padding_mask": PADDING}, num_samples=4)
    assert found.scores["spread.depth"].shape == (BATCH, LENGTH, 3)
    torch.testing.assert_close(found.scores["spread"], want.expand(BATCH, LENGTH))
    one = moved(Classifier(norm_first=True))
    found = predict(linear_student(one), {"x": x, "padding_mask": PADDING}, num_samples=4)
    assert found.scores["spread.depth"].shape == (BATCH, 3)


def test_scores_leave_padding_out():
    host = HOSTS["torch pre padded"](torch.float64)
    student = student_of(host)
    x = host.inputs["x"].clone()
    x[PADDING] = 40.0
    found = [
        predict(student, {**host.inputs, "x": value}, generator=torch.Generator().manual_seed(0))
        for value in (host.inputs["x"], x)
    ]
    for read in (lambda p: p.scores["spread.depth"], lambda p: p.entropy(), lambda p: p.mutual_information()):
        torch.testing.assert_close(read(found[0]), read(found[1]), rtol=0, atol=1e-12)


def test_random_states_and_modes_are_left_alone():
    host = HOSTS["torch pre"](torch.float64)
    student = student_of(host).train()
    state = torch.get_rng_state()
    predict(student, host.inputs, generator=torch.Generator().manual_seed(0))
    assert torch.get_rng_state().equal(state)
    assert all(part.training for part in student.modules())
    rollout = next(part for part in student.modules() if hasattr(part, "trained_steps"))
    assert rollout._copies == 0 and rollout._draws is None and rollout._record is None


def test_only_spreads_are_kept(monkeypatch):
    """States of all draws would take more memory than the prediction."""
    host = HOSTS["torch pre"](torch.float64)
    kept = []
    monkeypatch.setattr(prediction, "_spreads", lambda record, *_: kept.append(record))
    assert predict(student_of(host), host.inputs, num_samples=2).scores == {}
    assert [len(record.spreads) for record in kept] == [3]
    assert kept[0].states == kept[0].means == kept[0].variances == []


@pytest.mark.parametrize("name", ["gpt2 left", "gpt2 eager left"])
def test_left_padding_gives_numbers(name):
    host = HOSTS[name](torch.float64)
    with torch.no_grad():
        found = predict(student_of(host), host.inputs, num_samples=3)
    assert found.probs().isfinite().all() and found.scores["spread.depth"].isfinite().all()
