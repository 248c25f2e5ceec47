"""A student is its teacher with a chain in the place of some blocks: same call, same output, nothing shared."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gpseq.reconfiguration import Distiller, MonteCarlo, Rollout, capture, path_nll, with_steps
from gpseq.reconfiguration.rollout import find_rollout
from gpseq.reconfiguration.stack import find_stack
from gpseq.reconfiguration.student import make_student
from tests.oracles_reconfiguration import (
    BATCH,
    CLASSES,
    FUTURE,
    HOSTS,
    LENGTH,
    PADDING,
    WIDTH,
    Classifier,
    Linear,
    Replay,
    moved,
)


def students(host, points="attention", first_block=0, **options):
    """A student of a few steps of training: no number in it is one that it started with."""
    made = Distiller(host.model, points=points, first_block=first_block, **options)
    made.calibrate(host.inputs)
    with torch.no_grad():
        for parameter in made.rollout.kernel.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.student


@pytest.mark.parametrize("points", ["attention", "block"])
@pytest.mark.parametrize("name", list(HOSTS))
def test_the_teachers_own_transitions_give_its_logits(name, points):
    host = HOSTS[name](torch.float64)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which differs from the slow one by more than rounding
    try:
        with torch.no_grad():
            want = host.logits()
            for first in (0, 1, 2):
                path = capture(host.model, host.inputs, points, first)
                student, rollout = make_student(host.model, path.stack, Replay(path))
                assert rollout.num_steps == 3 - first
                for training in (False, True):
                    rollout.train(training)
                    rollout.kernel.eval()
                    if rollout.finish is not None:
                        rollout.finish.eval()
                    found = host.logits(student)
                    seen = slice(None)
                    if (found.dim() == 3 and "padded" in name) or "left" in name:
                        seen = ~path.padding
                    torch.testing.assert_close(found[seen], want[seen], rtol=0, atol=1e-12)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", list(HOSTS))
def test_a_student_takes_the_same_call(name):
    host = HOSTS[name](torch.float32)
    student = students(host)
    want = host.model(**host.inputs)
    with torch.no_grad():
        found = student(**host.inputs)
        assert type(found) is type(want)
        first, second = host.logits(student), host.logits(student)
        assert first.shape == host.logits().shape
        assert first.isfinite().all()
        assert first.equal(second)  # the noise-free path
        student.train()
        one, other = host.logits(student), host.logits(student)
        assert one.isfinite().all() and not one.equal(other)


@pytest.mark.parametrize("name", list(HOSTS))
def test_gradients_reach_the_kernel_alone(name):
    host = HOSTS[name](torch.float32)
    made = Distiller(host.model, task_loss="kd")
    made.loss(host.inputs).backward()
    reached = {key for key, value in made.student.named_parameters() if value.grad is not None}
    assert reached
    assert all(".kernel." in key for key in reached)
    assert all(value.requires_grad == (".kernel." in key) for key, value in made.student.named_parameters())
    assert all(value.grad is None and value.requires_grad for value in host.model.parameters())


@pytest.mark.parametrize("name", ["torch post padded", "torch time first", "bert padded", "gpt2 padded", "gpt2 left"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_padding_holds_changes_nothing(name, training):
    host = HOSTS[name](torch.float64)
    student = students(host, spread="floor").train(training)
    padding = capture(host.model, host.inputs).padding
    key = "x" if "x" in host.inputs else "input_ids"
    x = host.inputs[key].clone()
    where = padding.mT if name == "torch time first" else padding
    x[where] = 7 if key == "input_ids" else 50.0
    other = {**host.inputs, key: x}
    results = []
    for inputs in (host.inputs, other):
        torch.manual_seed(3)
        for part in student.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        found = student(**inputs)
        found = found if isinstance(found, torch.Tensor) else found.logits
        results.append(found[~padding] if found.dim() == 3 else found)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    nll = [path_nll(host.model, student, inputs) for inputs in (host.inputs, other)]
    assert nll[0].isfinite().all()
    torch.testing.assert_close(nll[0], nll[1], rtol=1e-9, atol=1e-9)
    for options in ({}, {"forcing": "teacher"}, {"spread": MonteCarlo(2, dropout=False), "path_loss": "nll"}):
        losses = []
        for inputs in (host.inputs, other):
            torch.manual_seed(0)
            made = Distiller(host.model, **options)
            losses.append(made.loss(inputs))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "gpt2 padded", "torch pre causal padded"])
def test_outputs_ignore_later_tokens(name):
    if name.startswith("torch"):
        model = moved(Classifier(norm_first=True, tokens=True))
        x = torch.randn(BATCH, LENGTH, 3, dtype=torch.float64)
        inputs, key = {"x": x, "mask": FUTURE}, "x"
    else:
        host = HOSTS[name](torch.float64)
        model, inputs, key = host.model, host.inputs, "input_ids"
    made = Distiller(model)
    made.calibrate(inputs)
    student = made.student
    with torch.no_grad():
        for parameter in made.rollout.kernel.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    later = inputs[key].clone()
    later[:, 3:] = 9
    found = [student(**{**inputs, key: value}) for value in (inputs[key], later)]
    found = [value if isinstance(value, torch.Tensor) else value.logits for value in found]
    torch.testing.assert_close(found[0][:, :3], found[1][:, :3], rtol=0, atol=1e-12)
    assert not torch.allclose(found[0][:, 3:], found[1][:, 3:])


def test_left_padding_is_finite_with_gradients():
    for name in ("gpt2 left", "gpt2 eager left"):
        host = HOSTS[name](torch.float32)
        made = Distiller(host.model)
        for _ in range(2):
            made.loss(host.inputs).backward()
        grads = [value.grad for value in made.rollout.kernel.parameters() if value.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)


def test_a_sequence_that_is_all_padding_hurts_no_other():
    host = HOSTS["torch pre padded"](torch.float64)
    student = students(host)
    padding = PADDING.clone()
    padding[2] = True
    rollout = find_rollout(student)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    found = rollout(x, src_key_padding_mask=padding)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:2], rollout(x[:2], src_key_padding_mask=padding[:2]), rtol=0, atol=1e-12)


def test_labels_go_to_the_host():
    for name in ("bert padded", "gpt2 padded"):
        host = HOSTS[name](torch.float32)
        student = students(host)
        labels = torch.randint(0, CLASSES, (BATCH,)) if name.startswith("bert") else host.inputs["input_ids"]
        found = student(**host.inputs, labels=labels)
        assert found.loss.isfinite()


def test_no_cache_is_kept():
    host = HOSTS["gpt2"](torch.float32)
    host.model.config.use_cache = True
    student = students(host)
    assert student(**host.inputs).past_key_values is None
    assert not student.config.use_cache and host.model.config.use_cache
    with pytest.raises(NotImplementedError, match="past_key_values: expected none"):
        student(**host.inputs, use_cache=True)
    assert student.generate(host.inputs["input_ids"], max_new_tokens=2, do_sample=False).shape == (BATCH, LENGTH + 2)


def test_what_blocks_cannot_take_is_refused():
    host = HOSTS["bert"](torch.float32)
    rollout = find_rollout(students(host))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with pytest.raises(NotImplementedError, match="encoder_hidden_states: expected none"):
        rollout(x, None, x)
    with pytest.raises(TypeError, match=r"unexpected|got an"):
        find_rollout(students(HOSTS["torch pre"](torch.float32)))(x, odd=1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("first_block", [0, 1])
def test_an_encoder_with_padding_in_both_modes(norm_first, first_block):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=norm_first)
    teacher = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=not norm_first).eval()
    made = Distiller(teacher, first_block=first_block, task_loss=None)
    made.calibrate(torch.randn(BATCH, LENGTH, WIDTH))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    for training in (False, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = made.student.train(training)(x, src_key_padding_mask=PADDING)
                assert found.shape == x.shape and found[~PADDING].isfinite().all()
    assert teacher.use_nested_tensor == (not norm_first)


def test_state_dict_round_trip():
    host = HOSTS["vit"](torch.float32)
    student = students(host)
    other = Distiller(host.model)
    assert not torch.equal(host.logits(other.student), host.logits(student))
    other.student.load_state_dict(student.state_dict())
    assert host.logits(other.student).equal(host.logits(student))
    assert other.is_calibrated


@pytest.mark.parametrize("name", ["torch post padded", "vit", "bert padded", "gpt2 padded", "timm"])
def test_students_can_be_saved_whole(name):
    host = HOSTS[name](torch.float32)
    student = students(host)
    want = host.logits(student)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(student)),
        copy.deepcopy(student),
    ):
        assert host.logits(other).equal(want)
        assert find_rollout(other).finish.kind is find_rollout(student).finish.kind


def test_nothing_is_shared_with_the_teacher():
    host = HOSTS["bert padded"](torch.float32)
    student = students(host, first_block=1)
    mine = {value.data_ptr() for value in host.model.state_dict().values()}
    assert not mine & {value.data_ptr() for value in student.state_dict().values()}
    replaced = ".".join(name for name, part in student.named_modules() if isinstance(part, Rollout))
    assert replaced == "bert.encoder.layer.1"
    assert len(student.bert.encoder.layer) == 2 and len(host.model.bert.encoder.layer) == 3
    head = dict(student.named_parameters())
    for name, value in host.model.named_parameters():
        if ".layer.1." not in name and ".layer.2." not in name:
            assert head[name].equal(value)
    kept = find_rollout(student).finish.block
    assert kept.output.dense.weight.equal(host.model.bert.encoder.layer[2].output.dense.weight)
    assert not hasattr(kept, "attention")


class Named(nn.Sequential):
    """A model whose container is itself, with names, and a layer that stands in it twice."""

    def __init__(self):
        layers = Classifier(norm_first=True).encoder.layers
        twice = nn.GELU()
        super().__init__()
        self.add_module("embed", nn.Linear(3, WIDTH))
        self.add_module("first", twice)
        for name, layer in zip(("one", "two", "three"), layers, strict=True):
            self.add_module(name, layer)
        self.add_module("second", twice)
        self.add_module("head", nn.Linear(WIDTH, CLASSES))


def test_names_in_a_sequential_stay():
    teacher = moved(Named())
    x = torch.randn(2, LENGTH, 3, dtype=torch.float64)
    stack = find_stack(teacher, first_block=1)
    assert stack.names == ("two", "three")
    path = capture(teacher, x, stack)
    student, _ = make_student(teacher, stack, Replay(path))
    assert list(student._modules) == ["embed", "first", "one", "two", "second", "head"]
    torch.testing.assert_close(student(x), teacher(x), rtol=0, atol=1e-12)
    assert list(teacher._modules) == ["embed", "first", "one", "two", "three", "second", "head"]
    made = Distiller(teacher, first_block=1)
    made.calibrate(x)
    assert path_nll(teacher, made.student, x).shape == (2, 2)
    assert find_stack(teacher, ("one", "two")).names == ("one", "two")


def test_path_nll_of_a_perfect_student():
    host = HOSTS["bert padded"](torch.float64)
    for points in ("attention", "block"):
        path = capture(host.model, host.inputs, points, 1)
        student, _ = make_student(host.model, path.stack, Replay(path, variance=0.04))
        found = path_nll(host.model, student, host.inputs)
        assert found.shape == (BATCH, 2)
        want = 0.5 * torch.log(torch.tensor(2 * torch.pi * 0.04, dtype=torch.float64))
        torch.testing.assert_close(found, want.expand_as(found))
        assert not found.requires_grad


def test_path_nll_is_larger_for_other_inputs():
    host = HOSTS["torch pre"](torch.float64)
    student = students(host)
    x = host.inputs["x"]
    found = path_nll(host.model, student, x)
    assert found.shape == (BATCH, 3)
    mode = student.train().training
    assert mode and path_nll(host.model, student, x).equal(found)  # no dropout, whatever the mode
    assert student.training
    with pytest.raises(TypeError, match="student: expected one that a Distiller made, got Classifier with 0 chains"):
        path_nll(host.model, host.model, x)
    with pytest.raises(ValueError, match="in train mode"):
        path_nll(copy.deepcopy(host.model).train(), student, x)


def test_with_steps():
    host = HOSTS["torch pre"](torch.float32)
    fixed = students(host)
    with pytest.raises(ValueError, match="trained with steps='random'"):
        with_steps(fixed, 1)
    assert find_rollout(with_steps(fixed, 1, force=True)).num_steps == 1
    student = students(host, steps="random")
    want = host.logits(student)
    for number in (1, 2, 3, 6):
        other = with_steps(student, number)
        found = host.logits(other)
        assert found.shape == want.shape and found.isfinite().all()
        assert found.equal(want) == (number == 3)
        assert find_rollout(other).times() == tuple(place / number for place in range(number + 1))
    assert find_rollout(student).num_steps == 3
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        with_steps(student, 0)
    with pytest.raises(TypeError, match="expected one that a Distiller made"):
        with_steps(host.model, 2)


def test_a_kernel_that_does_not_know_the_length_of_steps():
    host = HOSTS["torch pre"](torch.float64)
    student = Distiller(host.model, kernel=Linear()).student
    assert host.logits(with_steps(student, 3, force=True)).equal(host.logits(student))
    with pytest.raises(ValueError, match=r"num_steps: expected 3, as Linear.conditional takes no dt"):
        with_steps(student, 2, force=True)
    with pytest.raises(ValueError, match=r"steps: expected 'fixed', as Linear.conditional takes no dt"):
        Distiller(host.model, kernel=Linear(), steps="random")
