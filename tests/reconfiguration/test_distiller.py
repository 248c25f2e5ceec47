"""The loss of a student, its training, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gpseq.reconfiguration import Distiller, TransitionKernel, capture
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


def teacher(dtype=torch.float64, **options):
    return moved(Classifier(**{"norm_first": True, **options}), dtype)


def inputs(batch=BATCH, dtype=torch.float64):
    return torch.randn(batch, LENGTH, 3, dtype=dtype)


def labels(batch=BATCH):
    return torch.randint(0, CLASSES, (batch,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- what the loss is -------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """One transition of a linear-Gaussian chain, which draws in eval mode as well."""

    def __init__(self, weight, bias, variance):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("variance", variance)

    def mean(self, x):
        return x @ self.weight.mT + self.bias

    def forward(self, x):
        mean = self.mean(x)
        return mean + self.variance.sqrt() * torch.randn_like(mean)

    def conditional(self, x, t=None):
        return self.mean(x), self.variance.expand_as(x)


class Student(nn.Module):
    """The same noise, and another map."""

    def __init__(self, chain, error):
        super().__init__()
        self.weight = nn.Parameter(chain.weight.detach() + error)
        self.register_buffer("bias", chain.bias.detach())
        self.register_buffer("variance", chain.variance)

    def conditional(self, x, t, mask=None):
        return x @ self.weight.mT + self.bias, self.variance.expand_as(x)


@pytest.mark.parametrize("source", ["callable", "conditional"])
def test_the_divergence_of_linear_gaussian_chains(source):
    """The sum over steps of E[(E X)' Q^-1 (E X)] / 2, with the teacher's own moments."""
    width, steps, number = 3, 4, 40_000
    weight = 0.6 * torch.randn(width, width, dtype=torch.float64)
    block = Chain(weight, torch.randn(width, dtype=torch.float64), torch.rand(width, dtype=torch.float64) + 0.2)
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(steps))).eval()
    error = 0.2 * torch.randn(width, width, dtype=torch.float64)
    spread = block if source == "conditional" else lambda step, x: step.block.conditional(x)
    made = Distiller(
        model,
        kernel=Student(block, error),
        points="block",
        spread=spread,
        forcing="teacher",
        task_loss=None,
        weights={"path": 1.0},
        floor=0.0,
        reduction="sum",
    )
    start = torch.randn(width, dtype=torch.float64)
    found = made.losses(start.expand(number, 1, width))
    mean, covariance, want = start, torch.zeros(width, width, dtype=torch.float64), []
    for _ in range(steps):
        second = covariance + torch.outer(mean, mean)
        want.append(0.5 * torch.trace(error @ second @ error.mT @ block.variance.reciprocal().diag()))
        mean, covariance = block.mean(mean), weight @ covariance @ weight.mT + block.variance.diag()
    want = torch.stack(want).detach()
    torch.testing.assert_close(found["layers"][0], want[0], rtol=1e-9, atol=0)  # the first state is certain
    torch.testing.assert_close(found["layers"], want, rtol=0.03, atol=0)
    torch.testing.assert_close(found["loss"], found["layers"].sum())
    # Exactly so on the path that was drawn.
    torch.manual_seed(5)
    states = capture(model, start.expand(7, 2, width), "block").states[:-1]
    torch.manual_seed(5)
    found = made.losses(start.expand(7, 2, width))["layers"]
    exact = [0.5 * ((x @ error.mT).square() / block.variance).sum(-1).mean() for x in states]
    torch.testing.assert_close(found, torch.stack(exact), rtol=1e-9, atol=1e-12)


def test_the_mean_is_over_features_and_layers_and_the_sum_is_not():
    model, x = teacher(), inputs()
    kernel = Linear(variance=0.2)
    options = {"kernel": kernel, "forcing": "teacher", "task_loss": None}
    mean = Distiller(model, **options).losses(x)
    total = Distiller(model, **options, reduction="sum").losses(x)
    torch.testing.assert_close(total["layers"], WIDTH * mean["layers"])
    torch.testing.assert_close(mean["path"], mean["layers"].mean())
    torch.testing.assert_close(total["path"], total["layers"].sum())
    torch.testing.assert_close(mean["loss"].detach(), 0.1 * mean["path"])  # the weight of forced losses


@pytest.mark.parametrize("loss", ["kl", "nll", "mse", "reverse_kl"])
def test_forced_and_rollout_are_equal_for_one_step(loss):
    model, x = teacher(depth=1), inputs()
    options = {"path_loss": loss, "task_loss": None, "weights": {"path": 1.0, "spread": 0.5}, "dropout": 0.0}
    made = {}
    for forcing in ("rollout", "teacher", 0.3, lambda step: 0.5):
        torch.manual_seed(0)
        made[str(forcing)] = Distiller(model, forcing=forcing, **options).loss(x)
    first, *others = made.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["torch post padded", "bert padded", "gpt2 padded"])
def test_a_perfect_student_has_no_squared_error(name):
    host = HOSTS[name](torch.float64)
    for first in (0, 1):
        path = capture(host.model, host.inputs, first_block=first)
        for forcing in ("rollout", "teacher", 0.5):
            made = Distiller(host.model, Replay(path), first_block=first, path_loss="mse", forcing=forcing)
            made.student, made.rollout = make_student(host.model, path.stack, Still(path))
            found = made.losses(host.inputs)
            assert found["path"] < 1e-20
            assert found["task"].abs() < 1e-12


class Still(Replay):
    """Without dropout, whatever is asked."""

    def train(self, mode=True):
        return super().train(False)


def test_mixes_and_schedules():
    model, x = teacher(), inputs()
    # Without spread the rollout's path is no draw, and losses can be compared.
    kernel, options = Linear(variance=1e-30), {"path_loss": "mse", "task_loss": None}
    parts = {f: Distiller(model, kernel, forcing=f, **options).losses(x)["layers"] for f in ("rollout", "teacher")}
    mixed = Distiller(model, kernel, forcing=0.25, **options).losses(x)["layers"]
    torch.testing.assert_close(mixed, 0.75 * parts["rollout"] + 0.25 * parts["teacher"])
    steps = []
    made = Distiller(model, kernel, forcing=lambda step: steps.append(step) or max(0.0, 1 - step / 10), **options)
    for step, want in ((None, 1.0), (5, 0.5), (20, 0.0)):
        found = made.losses(x, step=step)["layers"]
        torch.testing.assert_close(found, (1 - want) * parts["rollout"] + want * parts["teacher"])
    assert steps == [0, 5, 20]
    with pytest.raises(ValueError, match=r"forcing: expected a function with values from 0 to 1, got 2.0"):
        Distiller(model, kernel, forcing=lambda step: 2.0, **options).loss(x)


def test_squared_errors_are_relative_to_increments():
    model, x = teacher(), inputs()
    path = capture(model, x)
    options = {"kernel": Linear(), "path_loss": "mse", "forcing": "teacher", "task_loss": None}
    made = Distiller(model, **options)
    relative, plain = made.losses(x), Distiller(model, normalise=False, **options).losses(x)
    sizes = torch.stack([(b - a).square().mean() for a, b in zip(path.states[:-1], path.states[1:], strict=True)])
    torch.testing.assert_close(relative["layers"], plain["layers"] / sizes, rtol=1e-5, atol=0)
    errors = [(made.rollout.kernel(a) - b).square().mean() for a, b in zip(path.states, path.states[1:], strict=False)]
    torch.testing.assert_close(plain["layers"], torch.stack(errors).detach())


def test_weights():
    model, x, y = teacher(), inputs(), labels()
    made = Distiller(model, generator=seeded(), weights={"path": 0.7, "task": 2.0})
    found = made.losses(x, y)
    torch.testing.assert_close(found["loss"].detach(), 0.7 * found["path"] + 2.0 * found["task"])
    assert set(found) == {"loss", "path", "task", "layers", "spread"}
    assert found["layers"].shape == found["spread"].shape == (3,)
    only = Distiller(model, weights={"path": 0.0}).losses(x, y)
    torch.testing.assert_close(only["loss"].detach(), only["task"])
    no_task = Distiller(model, weights={"task": 0.0}).losses(x, y)
    assert "task" not in no_task
    spread = Distiller(model, path_loss="mse", weights={"mean": 0.0, "spread": 1.0}, task_loss=None)
    spread.loss(x).backward()
    assert spread.rollout.kernel.spread.weight.grad.ne(0).any()
    for weights in ({"path": 0, "task": 0}, {"path": 0}):
        with pytest.raises(ValueError, match="weights: expected a path or a task to learn from"):
            Distiller(model, weights=weights, task_loss=None if len(weights) == 1 else "auto")
    with pytest.raises(ValueError, match="weights: expected path, task, mean, spread, got other"):
        Distiller(model, weights={"other": 1.0})
    with pytest.raises(ValueError, match=r"weights\['path'\]: expected a number that is not negative, got -1"):
        Distiller(model, weights={"path": -1})


def test_tasks():
    model, x, y = teacher(), inputs(), labels()
    path = capture(model, x)

    def task(y=None, **options):
        return Distiller(model, Still(path), weights={"path": 0.0}, **options).losses(x, y)["task"]

    logits = model(x).detach()
    torch.testing.assert_close(task(y), nn.functional.cross_entropy(logits, y))
    torch.testing.assert_close(task(y, task_loss="ce"), nn.functional.cross_entropy(logits, y))
    assert task().abs() < 1e-12 and task(y, task_loss="kd").abs() < 1e-12
    assert task(y, task_loss=lambda logits, y: (logits.sum() - y.sum()).square()) > 0
    torch.testing.assert_close(task(task_loss=lambda logits, y: logits.square().mean()), logits.square().mean())
    with pytest.raises(ValueError, match="y: expected labels with task_loss='ce', got none"):
        task(task_loss="ce")
    for bad, got in ((y[:2], r"torch.int64 \(2,\)"), (y.double(), r"torch.float64 \(3,\)"), ([1, 2, 3], "list")):
        with pytest.raises(ValueError, match=rf"y: expected whole numbers of shape \(3,\), got {got}"):
            task(bad)


def test_the_temperature_of_distillation():
    model, x = teacher(), inputs()
    found = {}
    for tau in (1.0, 4.0):
        torch.manual_seed(0)
        made = Distiller(model, Linear(variance=1e-30), temperature=tau, weights={"path": 0.0})
        found[tau] = made.losses(x)["task"]
    p, q = model(x).detach() / 4, made.student(x).detach() / 4
    want = 16 * nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(found[4.0], want)
    assert found[1.0] != found[4.0]


def test_tokens_of_padding_have_no_task():
    for options in ({"batch_first": True}, {"batch_first": False}):
        model = teacher(tokens=True, **options)
        x = inputs()
        x = x if model.batch_first else x.transpose(0, 1)
        given = {"x": x, "padding_mask": PADDING}
        path = capture(model, given)
        made = Distiller(model, Linear(variance=1e-30), weights={"path": 0.0})
        y = torch.randint(0, CLASSES, x.shape[:2])
        seen = ~PADDING if model.batch_first else ~PADDING.mT
        logits = made.student(**given)[seen].detach()
        p = path.output[seen].detach()
        want = nn.functional.kl_div(logits.log_softmax(-1), p.softmax(-1), reduction="batchmean")
        torch.testing.assert_close(made.losses(given)["task"], want)
        torch.testing.assert_close(made.losses(given, y)["task"], nn.functional.cross_entropy(logits, y[seen]))


def test_language_models_shift_their_labels():
    host = HOSTS["gpt2 padded"](torch.float32)
    made = Distiller(host.model, Linear(variance=1e-30, dtype=torch.float32), weights={"path": 0.0})
    ids = host.inputs["input_ids"]
    y = ids.masked_fill(PADDING, -100)
    logits = made.student(**host.inputs).logits.detach()
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(made.losses(host.inputs, y)["task"], want)
    bert = HOSTS["bert padded"](torch.float32)
    made = Distiller(bert.model, Linear(variance=1e-30, dtype=torch.float32), weights={"path": 0.0})
    want = nn.functional.cross_entropy(made.student(**bert.inputs).logits.detach(), y := labels())
    torch.testing.assert_close(made.losses(bert.inputs, y)["task"], want)
    assert made.losses(bert.inputs)["task"] >= 0


def test_the_published_recipe():
    model, x, y = teacher(), inputs(), labels()
    found = Distiller(model, Linear(variance=1e-30), preset="director").losses(x, y)
    path = capture(model, x)
    made = Distiller(model, Linear(variance=1e-30), preset="director")
    kernel = made.rollout.kernel
    errors = [(kernel(a) - b).square().mean() for a, b in zip(path.states, path.states[1:], strict=False)]
    ce = nn.functional.cross_entropy(made.student(x), y)
    want = 0.8 * torch.stack(errors).mean() + 0.2 * ce
    assert made.options.weights == {"path": 1.0, "mean": 0.8, "spread": 0.0, "task": 0.2}
    torch.testing.assert_close(made.loss(x, y), want)

    def source(step, v):
        return (step(v), torch.full_like(v, 0.25))

    gp = Distiller(model, Linear(variance=1e-30), spread=source, preset="director", floor=0.0)
    errors = [(gp.rollout.kernel(a) - b).square().mean() for a, b in zip(path.states, path.states[1:], strict=False)]
    ce = nn.functional.cross_entropy(gp.student(x), y)
    torch.testing.assert_close(gp.loss(x, y), 0.4 * torch.stack(errors).mean() + 0.2 * 0.25 + 0.4 * ce)
    assert found["task"] > 0
    assert Distiller(model, preset="director", floor=0.0).loss(x, y).isfinite()  # no divergence is asked for
    with pytest.raises(ValueError, match="y: expected labels"):
        gp.loss(x)


def test_random_steps():
    model, x = teacher(depth=4), inputs()
    made = Distiller(model, steps="random", task_loss=None, generator=seeded())
    assert made.rollout.trained_steps == "random"
    lengths = set()
    for _ in range(40):
        found = made.losses(x)
        assert found["loss"].isfinite()
        lengths.add(len(found["layers"]))
    assert lengths == {1, 2, 3, 4}
    assert made.rollout.times() == (0, 0.25, 0.5, 0.75, 1)


def test_merged_steps_have_the_last_mean_and_the_sum_of_variances():
    model, x = teacher(depth=4), inputs()

    def source(step, v):
        return (step(v), torch.full_like(v, float(step.number)))

    made = Distiller(model, Known(), spread=source, floor=0.0, task_loss=None, steps="random", forcing="teacher")
    made._times = lambda: (0.0, 0.5, 1.0)
    path = capture(model, x)
    found = made.losses(x)["layers"]
    for number, (last, variance) in enumerate(((2, 1 + 2), (4, 3 + 4))):
        before, after = path.states[last - 2], path.states[last]
        want = 0.5 * (variance - 1 - math.log(variance) + (after - 0.9 * before).square().mean())
        torch.testing.assert_close(found[number], want)


class Known(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def conditional(self, x, t, mask=None, dt=None):
        return self.scale * x, torch.ones_like(x)


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch pre padded", "bert padded", "gpt2 padded", "timm"])
def test_the_teacher_is_never_changed(name):
    host = HOSTS[name](torch.float32)
    model = host.model
    model.register_buffer("count", torch.zeros(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    flags = [value.requires_grad for value in model.parameters()]
    children = [name for name, _ in model.named_modules()]
    made = Distiller(model, generator=seeded(), dropout=0.0, train_head=True)
    state = torch.get_rng_state()
    for part in made.student.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    made.loss(host.inputs).backward()
    assert name.startswith(("bert", "gpt2", "timm", "torch")) and torch.get_rng_state().shape == state.shape
    made.fit([host.inputs], epochs=2, progress=False)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert [value.requires_grad for value in model.parameters()] == flags
    assert [name for name, _ in model.named_modules()] == children
    assert all(value.grad is None for value in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not any(part.training for part in made.student.modules())


def test_the_random_state_is_untouched_beside_a_generator():
    model, x = teacher(), inputs()
    made = Distiller(model, generator=seeded(), steps="random", dropout=0.0)
    state = torch.get_rng_state()
    made.loss(x)
    assert torch.get_rng_state().equal(state)


def test_what_is_trained():
    model, x = teacher(torch.float32), inputs(dtype=torch.float32)
    frozen, free = Distiller(model), Distiller(model, train_head=True)
    before = copy.deepcopy(frozen.student.state_dict())
    frozen.fit([x, x], epochs=2, progress=False)
    changed = {name for name, value in frozen.student.state_dict().items() if not value.equal(before[name])}
    assert changed and all(".kernel." in name or name.endswith(".increments") for name in changed)
    before = copy.deepcopy(free.student.state_dict())
    free.fit([x, x], epochs=2, progress=False)
    changed = {name for name, value in free.student.state_dict().items() if not value.equal(before[name])}
    assert {"head.weight", "embed.weight"} <= changed
    assert any(".finish." in name for name in changed)


def test_dropout_is_on_where_something_is_trained():
    model, x = teacher(torch.float32), inputs(dtype=torch.float32)
    kernel = Modes()
    made = Distiller(model, kernel)
    made.loss(x)
    assert kernel.modes == [True] * 3
    assert not any(part.training for part in made.student.modules())
    made._validated([x], None, 0)
    assert kernel.modes == [True] * 3 + [False] * 3
    assert not made._validates


class Modes(Known):
    def __init__(self):
        super().__init__()
        self.modes = []

    def conditional(self, x, t, mask=None, dt=None):
        self.modes.append(self.training)
        return self.scale.to(x) * x, torch.ones_like(x)


def test_the_kernel_that_is_made():
    model = teacher(torch.float32)
    for points in ("attention", "block"):
        made = Distiller(model, points=points)
        kernel = made.rollout.kernel
        assert isinstance(kernel, TransitionKernel)
        assert (kernel.dim, kernel.num_heads, kernel.num_steps) == (WIDTH, 2, 3)
        assert next(kernel.parameters()).dtype == torch.float32
    wide = moved(Deep(), torch.float32)
    made = Distiller(wide, points="attention")
    assert {part.p for part in made.rollout.kernel.modules() if isinstance(part, nn.Dropout)} == {0.1}
    kept = sum(value.numel() for value in made.rollout.parameters())
    assert kept <= 0.6 * sum(value.numel() for value in wide.parameters())
    chosen = Distiller(wide, mlp_ratio=3.0, depth=2, min_spread=0.01, dropout=0.3).rollout.kernel
    assert len(chosen.blocks) == 2 and chosen.blocks[0].up.out_features == 96 and chosen.min_spread == 0.01
    assert chosen.blocks[0].dropout.p == 0.3
    assert Distiller(moved(Classifier(), torch.float64)).rollout.kernel.mean[0].weight.dtype == torch.float64
    with pytest.raises(ValueError, match="kernel: expected one for blocks of type Chain, whose width is not known"):
        Distiller(nn.Sequential(*(chain_block() for _ in range(2))).eval(), points="block")


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 7, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


def chain_block():
    return Chain(torch.eye(2), torch.zeros(2), torch.ones(2))


def test_a_start_from_the_replaced_blocks():
    model, x = teacher(torch.float32), inputs(dtype=torch.float32)
    made = Distiller(model, init="mean")
    block = made.rollout.kernel.blocks[0]
    mean = torch.stack([layer.self_attn.in_proj_weight for layer in model.encoder.layers]).mean(0)
    torch.testing.assert_close(block.attention.in_proj_weight.data, mean.data)
    made.loss(x)
    gate = block.code[1].bias.chunk(6)[2]
    torch.testing.assert_close(gate.data, (1 / made.rollout.increments.mean()).expand(WIDTH))
    with torch.no_grad():
        gate.fill_(7.0)
    made.calibrate(x)  # measured again, but nothing starts again
    assert made.rollout.kernel.blocks[0].code[1].bias.chunk(6)[2].eq(7).all()
    with pytest.raises(ValueError, match=r"init: expected blocks whose matrices are known and fit .* for 'mean'"):
        Distiller(Sequence(), points="block", init="mean")
    with pytest.raises(ValueError, match="init: expected 'auto' beside a kernel"):
        Distiller(model, kernel=Linear(), init="mean")


def test_starts_where_matrices_are_known_and_where_not():
    model, x = teacher(torch.float32), inputs(dtype=torch.float32)
    made = {init: Distiller(model, init=init) for init in ("auto", "mean", "zero")}
    weights = {init: one.rollout.kernel.blocks[0].attention.in_proj_weight for init, one in made.items()}
    assert weights["auto"].equal(weights["mean"]) and not weights["auto"].equal(weights["zero"])
    embedded = model.embed(x)
    assert made["zero"].rollout.kernel.conditional(embedded, 1.0)[0].equal(embedded)
    assert not made["auto"].rollout.kernel.conditional(embedded, 1.0)[0].equal(embedded)
    odd = torch.randn(BATCH, LENGTH, 8)
    unknown = Distiller(Sequence(), points="block", task_loss=None)
    unknown.loss(odd)
    assert unknown.rollout.kernel.conditional(odd, 1.0)[0].equal(odd)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Sequence(nn.Sequential):
    def __init__(self):
        super().__init__(*(Odd() for _ in range(3)))
        self.eval()


def test_any_stack_of_blocks():
    model, x = Sequence(), torch.randn(BATCH, LENGTH, 8)
    made = Distiller(model, points="block", task_loss=None)
    made.fit([x, x], epochs=1, progress=False)
    assert made.student(x).shape == x.shape
    assert len(made.student) == 1


# --- training ---------------------------------------------------------------------------------------------------------


def batches(number=4, dtype=torch.float32, with_labels=True):
    torch.manual_seed(7)
    found = [(inputs(6, dtype), labels(6)) for _ in range(number)]
    return found if with_labels else [x for x, _ in found]


def test_training_lowers_the_loss():
    model = teacher(torch.float32)
    made = Distiller(model, generator=seeded())
    history = made.fit(batches(), epochs=12, progress=False)
    assert len(history) == 12
    assert history.epochs[-1].loss < 0.8 * history.epochs[0].loss
    assert made.is_calibrated and not made.student.training


@pytest.mark.parametrize("kind", ["tensors", "pairs", "lists", "single", "mappings", "loader"])
def test_batches_of_every_kind(kind):
    model, pairs = teacher(torch.float32), batches(2)
    loader = {
        "tensors": [x for x, _ in pairs],
        "pairs": pairs,
        "lists": [list(pair) for pair in pairs],
        "single": [(x,) for x, _ in pairs],
        "mappings": [{"x": x, "labels": y} for x, y in pairs],
        "loader": DataLoader(TensorDataset(torch.cat([x for x, _ in pairs])), 6, shuffle=True),
    }[kind]
    seen = []
    made = Distiller(model)
    losses = made.losses
    made.losses = lambda x, y, step: seen.append(y) or losses(x, y, step)
    made.fit(loader, epochs=1, progress=False)
    assert all((y is not None) == (kind in ("pairs", "lists", "mappings")) for y in seen)
    with pytest.raises(ValueError, match="loader: expected inputs, or inputs and labels, got a batch of 3 parts"):
        made.fit([(1, 2, 3)], epochs=1, progress=False)


def test_fit_of_a_host_with_mappings():
    host = HOSTS["bert padded"](torch.float32)
    made = Distiller(host.model)
    batch = {**host.inputs, "labels": labels()}
    history = made.fit([batch], epochs=3, progress=False)
    assert len(history) == 3 and "labels" in batch


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": "random", "dropout": 0.2}, {"init": "zero"}, {"train_head": True}, {"generator": 3}],
    ids=["plain", "random steps", "zero", "head", "generator"],
)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path, options):
    def run(epochs, checkpoint=None, made=None):
        torch.manual_seed(1)
        order = seeded(2)
        loader = DataLoader(
            TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), 6, shuffle=True, generator=order
        )
        chosen = {**options, **({"generator": seeded(3)} if "generator" in options else {})}
        made = made or Distiller(model, **chosen)
        optimizer = torch.optim.AdamW([p for p in made.student.parameters() if p.requires_grad], lr=1e-2)
        made.fit(loader, epochs, optimizer=optimizer, checkpoint=checkpoint, progress=False)
        return made

    model = teacher(torch.float32)
    want = run(4).student.state_dict()
    file = tmp_path / "run"
    run(2, file)
    torch.rand(5)
    found = run(4, file).student.state_dict()
    assert all(value.equal(found[name]) for name, value in want.items())


class Stop(Exception):
    """Ends a run from outside."""


def test_a_run_that_stopped_in_its_first_epoch(tmp_path):
    """Sizes that were measured in it are measured again: the file is from before."""
    model, file = teacher(torch.float32), tmp_path / "run"

    def broken():
        yield batches()[0]
        raise Stop

    class Loader(list):
        broken = True

        def __iter__(self):
            return broken() if self.broken else super().__iter__()

    torch.manual_seed(4)
    made, loader = Distiller(model, init="mean", generator=seeded()), Loader(batches())
    with pytest.raises(Stop):
        made.fit(loader, 2, checkpoint=file, progress=False)
    loader.broken = False
    made.fit(loader, 2, checkpoint=file, progress=False)
    torch.manual_seed(4)
    want = Distiller(model, init="mean", generator=seeded())
    want.fit(batches(), 2, progress=False)
    found = made.student.state_dict()
    assert all(value.equal(found[name]) for name, value in want.student.state_dict().items())


def test_early_stopping_on_validation_batches():
    model = teacher(torch.float32)
    made = Distiller(model, generator=seeded())
    history = made.fit(batches(), 30, learning_rate=1e-12, validation=batches(2), patience=2, progress=False)
    assert len(history) < 30 and history.stopped_early
    assert all(epoch.score is not None for epoch in history.epochs)
    scores = iter([3.0, 1.0, 2.0])
    made, states = Distiller(model), []

    def validate(student):
        assert student is made.student and not student.training
        states.append(copy.deepcopy(student.state_dict()))
        return next(scores)

    history = made.fit(batches(), 3, validate=validate, progress=False)
    assert history.best_epoch == 1
    assert all(value.equal(states[1][name]) for name, value in made.student.state_dict().items())


def test_schedules_see_the_step_in_validation():
    steps = []
    made = Distiller(teacher(torch.float32), forcing=lambda step: steps.append(step) or 0.5)
    made.fit(batches(2), 2, validation=batches(1), progress=False)
    assert steps == [0, 1, 1, 2, 3, 3]


def test_bad_arguments_of_fit():
    made, loader = Distiller(teacher(torch.float32)), batches(2)
    cases = [
        (
            {"validation": loader, "validate": lambda s: 0.0},
            "validation: expected either batches or validate, got both",
        ),
        ({"patience": 1}, "patience: got 1 without validate"),
        ({"epochs": -1}, "epochs: got -1"),
        ({"loader": iter(loader), "optimizer": 1}, "loader: got an iterator"),
        ({"loader": (x for x in loader)}, "loader: expected one with a length, for the schedule"),
        ({"scheduler": 1}, "scheduler: expected one beside its optimizer, got one without"),
        ({"validation": []}, "validation: expected batches, got none"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0"),
        ({"warmup": -1.0}, "warmup"),
        ({"mode": "other"}, "mode: got 'other'"),
    ]
    for options, match in cases:
        if options.get("optimizer"):
            options["optimizer"] = torch.optim.SGD(made.rollout.kernel.parameters(), 0.1)
        with pytest.raises(ValueError, match=match):
            made.fit(**{"loader": loader, "epochs": 1, "progress": False, **options})
        assert not made.student.training and not made._validates
    made.fit(loader, 1, progress=False)
    made.fit(loader, 0, progress=False)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"path_loss": "l1"}, ValueError, "path_loss: expected one of kl, nll, mse, reverse_kl, got 'l1'"),
        ({"forcing": "other"}, ValueError, "forcing: expected 'rollout', 'teacher', a number from 0 to 1"),
        ({"forcing": 1.5}, ValueError, "forcing: expected .*got 1.5"),
        ({"forcing": math.nan}, ValueError, "forcing: expected a finite number, got nan"),
        ({"task_loss": "mse"}, ValueError, "task_loss: expected one of auto, ce, kd, None or a function, got 'mse'"),
        ({"steps": "some"}, ValueError, "steps: expected one of fixed, random, got 'some'"),
        ({"reduction": "none"}, ValueError, "reduction: expected one of mean, sum, got 'none'"),
        ({"init": "one"}, ValueError, "init: expected one of auto, zero, mean, got 'one'"),
        ({"preset": "other"}, ValueError, "preset: expected one of None, director, got 'other'"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"floor": -0.1}, ValueError, "floor: expected a number that is not negative, got -0.1"),
        (
            {"kernel": nn.Linear(2, 2)},
            TypeError,
            r"kernel: expected a module with conditional\(x, t, mask\), got Linear",
        ),
        ({"kernel": Linear(), "depth": 2}, TypeError, "kernel_options: expected none beside a kernel, got depth"),
        ({"odd": 2}, TypeError, "odd"),
        ({"first_block": 3}, ValueError, "first_block: expected fewer than the 3 blocks"),
        ({"points": "other"}, ValueError, "points: expected attention, block or names of modules, got 'other'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        Distiller(teacher(), **options)


def test_bad_teachers():
    with pytest.raises(ValueError, match="teacher: expected a model in eval mode, got the model itself in train mode"):
        Distiller(Classifier())
    with pytest.raises(ValueError, match="of a known kind"):
        Distiller(nn.Linear(2, 2).eval())
    with pytest.raises(TypeError, match="teacher: expected a torch module, got str"):
        Distiller("teacher")
    model = teacher()
    made = Distiller(model)
    model.train()
    with pytest.raises(ValueError, match="in train mode; call eval"):
        made.loss(inputs())
    model.eval()
    assert made.loss(inputs()).isfinite()


def test_bad_inputs_leave_it_usable():
    model = teacher()
    made = Distiller(model)
    x = inputs()
    with pytest.raises(ValueError, match=r"x: expected at least one token, got states \(0, 5, 8\)"):
        made.loss(x[:0])
    with pytest.raises(ValueError, match="teacher: expected increments that are finite and not zero"):
        made.loss(x * math.nan)
    with pytest.raises(ValueError, match=r"tokens \(B, T, D\) at the input of layers\.0, got \(5, 8\)"):
        Distiller(model.encoder, task_loss=None).loss(model.embed(x[0]))
    assert not made.is_calibrated
    assert made.loss(x).isfinite()
    with pytest.raises(FloatingPointError, match="loss"):
        made.fit([x * math.nan], epochs=1, progress=False)
    assert made.loss(x).isfinite() and not made.student.training


def test_outputs_without_logits():
    class Odd(Classifier):
        def forward(self, x):
            return {"other": super().forward(x)}

    model, x = moved(Odd(norm_first=True)), inputs()
    with pytest.raises(
        TypeError, match="task_loss: expected a teacher that returns logits, got dict; take task_loss=None"
    ):
        Distiller(model).loss(x)
    assert Distiller(model, task_loss=None).loss(x).isfinite()


def test_causal_masks_reach_the_kernel():
    model = teacher(tokens=True)
    made = Distiller(model)
    given = {"x": inputs(), "mask": FUTURE}
    made.loss(given).backward()
    assert all(value.grad.isfinite().all() for value in made.rollout.kernel.parameters() if value.grad is not None)
