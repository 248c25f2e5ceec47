"""examples/generative/field.py: what is held out stays out, and memory and drift are told apart."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gpytorch
import pytest
import torch

import gpseq

SCRIPT = Path(__file__).parents[2] / "examples" / "generative" / "field.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the tests run outside a checkout")


@pytest.fixture(scope="module")
def field() -> ModuleType:
    spec = importlib.util.spec_from_file_location("field_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and annotations look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(field: ModuleType) -> object:
    """Tasks of half a day."""
    return field.load(0, 12)


@pytest.fixture(scope="module")
def stream(field: ModuleType, whole: object) -> object:
    """The same with few pixels."""
    tasks = [replace(task, y=task.y[:, ::100], truth=task.truth[:, ::100]) for task in whole.tasks]
    return field.Stream(tuple(tasks), whole.mean[::100], whole.scale, (1, 17))


def small(field: ModuleType, **changes: object) -> object:
    return field.Setting(**{"num_features": 6, "steps": 2, "latents": 2, "width": 4, "draws": 4, **changes})


def test_hours_that_are_held_out_are_not_there_to_be_learnt(field, whole):
    for number, task in enumerate(whole.tasks):
        assert (int(task.test.sum()), int(task.val.sum())) == (2, 1)
        assert not (task.test & task.val).any()
        assert torch.equal(task.y.isnan().all(-1), task.missing)
        assert torch.equal(task.y[~task.missing], task.truth[~task.missing])
        assert task.truth.isfinite().all()
        assert task.x[0].item() == pytest.approx(12 * number / 24)
    # Only the first task, and only what is learnt of it, says what the unit is.
    first = whole.tasks[0]
    seen = first.y[~first.missing]
    torch.testing.assert_close(seen.mean(0), torch.zeros(seen.shape[1]), atol=1e-4, rtol=0)
    assert seen.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)
    held = [field.hold_out(186, torch.Generator().manual_seed(seed))[1] for seed in (0, 0, 1)]
    assert torch.equal(held[0], held[1]) and not torch.equal(held[0], held[2])
    assert int(held[0].sum()) == 37


def test_moved_points_begin_in_proportion_to_the_tasks(field):
    old, new = torch.arange(12.0) / 100, torch.arange(20.0) + 10
    generator = torch.Generator().manual_seed(0)
    points = field.mixed_points(old, new, 12, 2, generator).flatten()
    assert len(points) == 12 and len(points.unique()) == 12
    assert int((points >= 10).sum()) == 4
    assert len(field.mixed_points(None, new, 12, 0, generator)) == 12
    assert len(field.mixed_points(None, new[:5], 12, 0, generator)) == 5


def test_mean_kernel_is_the_mean_of_the_channels(field):
    kernel = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([3]))
    kernel.lengthscale = torch.tensor([0.2, 0.5, 2.0]).view(3, 1, 1)
    x = torch.linspace(0, 3, 7).unsqueeze(-1)
    expected = kernel(x).to_dense().mean(0)
    torch.testing.assert_close(field.mean_kernel(kernel)(x).to_dense(), expected)


@pytest.mark.parametrize("kind", ["HiPPO", "re-selected points", "moved points"])
def test_memory_is_asked_with_the_networks_of_then(field, stream, kind):
    setting = small(field)
    first, seconds = field.begun(stream, kind, setting)
    free = field.follow(stream, first.treated(field.FREE, 1.0, stream.tasks[0]), seconds)
    frozen = field.follow(stream, first.treated(field.FROZEN, 1.0, stream.tasks[0]), seconds)
    assert free.now["rmse"][0] == frozen.now["rmse"][0]  # the first task is common
    assert frozen.now == frozen.memory  # networks that stay do not drift
    assert len(set(frozen.noise)) == 1 and len(set(free.noise)) == 4
    for name in field.SCORES:
        assert [row[-1] for row in free.now[name]] == [row[-1] for row in free.memory[name]]
        assert all(math.isfinite(value) for row in free.memory[name] for value in row)
    assert free.now["rmse"][-1][0] != free.memory["rmse"][-1][0]


def test_points_of_old_tasks_stay_while_new_ones_move(field, stream):
    learner, _ = field.begun(stream, field.MOVED, small(field))
    before = learner.vae.state.nodes.clone()
    state = learner.vae.state
    features = learner._placed(stream.tasks[1])
    with torch.no_grad():
        features.points.add_(1.0)
    assert torch.equal(state.nodes, before)


def test_springs_hold_and_kernels_stay(field, stream):
    setting = small(field, steps=3)
    first, _ = field.begun(stream, field.HIPPO, setting)
    start = [p.detach().clone() for p in first.vae.decoder.parameters()]
    lengthscale = first.vae.prior.covar_module.lengthscale.detach().clone()
    moved = {}
    for name, strength in ((field.FREE, 0.0), (field.HELD, 1e9)):
        learner = first.treated(name, strength, stream.tasks[0])
        learner.learn(stream.tasks[1])
        weight = learner.vae.decoder[2].weight
        moved[name] = (weight - start[2]).abs().mean().item()
        assert torch.equal(learner.vae.prior.covar_module.lengthscale, lengthscale)
    assert moved[field.HELD] < moved[field.FREE]
    assert torch.equal(first.vae.decoder[2].weight, start[2])  # what was copied stays


def test_lines_between_hours_are_exact_for_lines(field):
    n = 10
    x = torch.arange(n, dtype=torch.float64) / 24
    truth = x.float().unsqueeze(-1) * torch.tensor([1.0, -2.0])
    test = torch.zeros(n, dtype=torch.bool)
    test[[3, 4, 7]] = True
    none = torch.zeros(n, dtype=torch.bool)
    task = field.Task(x, truth.masked_fill(test.unsqueeze(-1), math.nan), truth, none, test)
    stream = field.Stream((task,), torch.zeros(2), 1.0, (1, 2))
    assert field.references(stream)["lines between kept hours"][0] < 1e-6


def test_scores_are_of_single_pixels(field):
    torch.manual_seed(0)
    prediction = gpseq.Predictive.from_samples(torch.zeros(4, 50, 40), noise=4.0)
    told = field.score(prediction, 2 * torch.randn(50, 40))
    assert told["rmse"] == pytest.approx(2, rel=0.1)
    assert told["coverage"] == pytest.approx(0.95, abs=0.02)
    assert told["nlpd"] == pytest.approx(0.5 * math.log(2 * math.pi * 4) + 0.5, rel=0.05)
