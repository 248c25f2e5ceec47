"""Springs: one merged quadratic against the sum of all, the online form by hand, and what is saved."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gpseq import storage
from gpseq.continual import EWC, EWCState, consolidate, fisher_diagonal, penalty


def make(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def moved(model: nn.Module, by: float = 1.0) -> nn.Module:
    """A copy elsewhere."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))
    return model


def some_fisher(model: nn.Module) -> dict[str, Tensor]:
    """Positive and, here and there, zero."""
    return {name: torch.rand_like(p) * (torch.rand_like(p) < 0.7) for name, p in model.named_parameters()}


def slow_penalty(past: list[tuple[nn.Module, dict[str, Tensor]]], model: nn.Module, strength: float) -> Tensor:
    """One quadratic a task, kept apart."""
    parameters = dict(model.named_parameters())
    total = 0.0
    for anchor, fisher in past:
        for name, p in anchor.named_parameters():
            total = total + (fisher[name] * (parameters[name] - p.detach()).square()).sum()
    return 0.5 * strength * total


@given(num_tasks=st.integers(1, 6), seed=st.integers(0, 1000), strength=st.floats(0, 100))
def test_separate_quadratics_are_merged_exactly(num_tasks, seed, strength):
    torch.manual_seed(seed)
    models = [make() for _ in range(num_tasks)]
    past = [(model, some_fisher(model)) for model in models]
    state = None
    for model, fisher in past:
        state = consolidate(state, model, fisher)
    assert state.num_tasks == num_tasks
    model = make()
    found, expected = penalty(state, model, strength), slow_penalty(past, model, strength)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_float32_does_not_cancel():
    """Far from zero and close to each other: sums of squares would lose all digits."""
    models = [make(torch.float32) for _ in range(3)]
    for model in models:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1e-2).add_(1000.0)
    past = [(model, {name: torch.ones_like(p) for name, p in model.named_parameters()}) for model in models]
    state = None
    for model, fisher in past:
        state = consolidate(state, model, fisher)
    there = copy.deepcopy(models[0]).double()
    exact = slow_penalty(
        [(copy.deepcopy(m).double(), {n: f.double() for n, f in fs.items()}) for m, fs in past], there, 1.0
    )
    torch.testing.assert_close(penalty(state, models[0], 1.0).double(), exact, rtol=0.05, atol=0.0)


def test_the_online_form_by_hand(dtype):
    models = [make(dtype) for _ in range(3)]
    fishers = [some_fisher(model) for model in models]
    state = None
    for model, fisher in zip(models, fishers, strict=True):
        state = consolidate(state, model, fisher, mode="online", decay=0.5)
    expected = {name: 0.25 * fishers[0][name] + 0.5 * fishers[1][name] + fishers[2][name] for name in fishers[0]}
    for name, p in models[-1].named_parameters():
        torch.testing.assert_close(state.fisher[name], expected[name])
        assert torch.equal(state.anchor[name], p.detach())
        assert state.fisher[name].dtype == dtype
    here = make(dtype)
    torch.testing.assert_close(penalty(state, here, 3.0), slow_penalty([(models[-1], expected)], here, 3.0))
    assert penalty(state, models[-1], 3.0) == 0


def test_a_state_is_a_value():
    model = make()
    fisher = some_fisher(model)
    first = consolidate(None, model, fisher)
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    fisher["0.weight"].fill_(7.0)
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    consolidate(first, model, fisher)
    consolidate(first, model, fisher, mode="online")
    for name, value in first.state_dict().items():
        assert torch.equal(value, kept[name])


def test_memory_does_not_grow():
    state = None
    sizes = set()
    for _ in range(4):
        model = make()
        state = consolidate(state, model, some_fisher(model))
        sizes.add(sum(value.numel() for value in state.state_dict().values()))
    assert sizes == {2 * sum(p.numel() for p in make().parameters()) + 2}


def test_a_state_is_saved_and_read_again(dtype, tmp_path):
    state = None
    for model in (make(dtype), make(dtype)):
        state = consolidate(state, model, some_fisher(model))
    here = make(dtype)
    storage.save(tmp_path / "ewc.safetensors", state.state_dict())
    tensors, _ = storage.load(tmp_path / "ewc.safetensors")
    again = EWCState.from_state_dict(tensors)
    assert again.num_tasks == 2
    assert torch.equal(penalty(again, here, 2.0), penalty(state, here, 2.0))
    after = [consolidate(s, here, some_fisher_of_ones(here)).state_dict() for s in (state, again)]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def some_fisher_of_ones(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


def test_parameters_that_were_frozen():
    model = make()
    model[0].requires_grad_(False)
    state = consolidate(None, model, fisher_diagonal(model, [torch.randn(5, 3).double()]))
    assert list(state.anchor) == ["2.weight", "2.bias"]
    assert penalty(state, moved(model)) > 0
    model[2].requires_grad_(False)  # frozen since: it still counts
    assert penalty(state, model) == 0


def test_a_shared_parameter_is_held_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    state = consolidate(None, model, {"0.weight": torch.ones(3, 3)})
    with torch.no_grad():
        first.weight.add_(1.0)
    assert penalty(state, model, 2.0).item() == pytest.approx(9.0)


def test_a_strong_spring_remembers_a_regression_and_none_forgets_it():
    """The second task determines only the sum of two weights, the first one of them: EWC finds both, as all data do."""
    w = torch.tensor([[1.0, -2.0]]).double()
    x1, x2 = torch.zeros(50, 2).double(), torch.randn(50, 1).double().expand(50, 2)
    x1[:, 0] = torch.randn(50)
    errors = {strength: _regressions(w, (x1, x2), strength) for strength in (0.0, 100.0)}
    assert max(errors[100.0]) < 1e-6 < 1e-2 < errors[0.0][0]


def _regressions(w: Tensor, tasks: tuple[Tensor, ...], strength: float) -> list[float]:
    """Mean squared errors on all tasks after the last."""
    model = nn.Linear(2, 1, bias=False).double()
    ewc = EWC(model, strength, family="gaussian", num_samples=None)

    def error(x: Tensor) -> Tensor:
        return (model(x) - x @ w.T).square().mean()

    for x in tasks:
        optimiser = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure(x: Tensor = x, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = error(x) + ewc.penalty()
            loss.backward()
            return loss

        optimiser.step(closure)
        ewc.consolidate([x])
    return [error(x).item() for x in tasks]


def test_the_module_does_what_the_functions_do():
    model, x = make(), torch.randn(6, 3).double()
    ewc = EWC(model, 5.0, mode="online", decay=0.9, num_samples=None)
    assert ewc.penalty() == 0 and ewc.penalty().dtype == torch.float64 and ewc.state_dict() == {}
    state = None
    for _ in range(2):
        ewc.consolidate([x])
        state = consolidate(state, model, fisher_diagonal(model, [x], num_samples=None), "online", 0.9)
        with torch.no_grad():
            model[0].weight.add_(0.1)
    assert torch.equal(ewc.penalty(), penalty(state, model, 5.0))
    assert ewc.penalty() > 0
    other = EWC(model, 5.0, mode="online")
    other.load_state_dict(ewc.state_dict())
    assert torch.equal(other.penalty(), ewc.penalty()) and other.state.num_tasks == 2
    other.load_state_dict({})
    assert other.state is None
    with pytest.raises(ValueError, match="batches"):
        ewc.consolidate([])
    assert ewc.state.num_tasks == 2


def test_what_does_not_belong_together_is_named():
    model = make()
    fisher = some_fisher(model)
    state = consolidate(None, model, fisher)
    larger = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    renamed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    deeper = nn.Sequential(*make(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model: expected shape \(2, 4\) for '2.weight', got \(5, 4\)"):
        penalty(state, larger)
    with pytest.raises(ValueError, match=r"model: expected parameter '2.weight', got none of that name"):
        penalty(state, renamed)
    with pytest.raises(ValueError, match=r"model: expected the parameters .*, got '3.weight' too"):
        penalty(state, deeper)
    with pytest.raises(ValueError, match=r"fisher: expected shape \(5, 4\) for '2.weight'"):
        consolidate(state, larger, fisher)
    with pytest.raises(ValueError, match=r"state: expected shape \(5, 4\) for '2.weight'"):
        consolidate(state, larger, some_fisher(larger))
    for value, message in ((torch.nan, "finite numbers for '0.bias'"), (-1.0, "nothing negative for '0.bias', got -1")):
        bad = fisher | {"0.bias": torch.full((4,), value)}
        with pytest.raises(ValueError, match=f"fisher: expected {message}"):
            consolidate(state, model, bad)
    with pytest.raises(ValueError, match="model: expected at least one parameter that requires gradients"):
        consolidate(None, make().requires_grad_(False), fisher)
    with pytest.raises(ValueError, match=r"model: expected parameters, got none"):
        penalty(state, nn.Tanh())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "merged"}, "mode: expected one of"),
        ({"mode": "online", "decay": 1.5}, r"decay: expected a number in \(0, 1\], got 1.5"),
        ({"mode": "online", "decay": 0.0}, r"decay: expected a number in \(0, 1\]"),
        ({"decay": 0.5}, "decay: expected 1 with mode='separate', got 0.5"),
    ],
)
def test_modes_and_decays_are_checked(options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        consolidate(None, model, some_fisher(model), **options)
    with pytest.raises(ValueError, match=message):
        EWC(model, 1.0, **options)
    with pytest.raises(ValueError, match="strength: expected a number, not negative"):
        EWC(model, -1.0)


def test_a_file_of_something_else_is_refused():
    model = make()
    tensors = consolidate(None, model, some_fisher(model)).state_dict()
    with pytest.raises(ValueError, match="tensors: expected 'offset', got none"):
        EWCState.from_state_dict({k: v for k, v in tensors.items() if k != "offset"})
    with pytest.raises(ValueError, match=r"tensors: expected parameter '0.bias'"):
        EWCState.from_state_dict({k: v for k, v in tensors.items() if k != "fisher.0.bias"})
    with pytest.raises(ValueError, match=r"tensors: expected anchor.*, got 'weight'"):
        EWCState.from_state_dict(tensors | {"weight": torch.ones(1)})
    with pytest.raises(ValueError, match="fisher: expected finite"):
        EWCState.from_state_dict(tensors | {"fisher.0.bias": torch.full((4,), torch.nan)})
    with pytest.raises(ValueError, match=r"model: expected parameter '0.weight'"):
        EWC(nn.Linear(3, 2), 1.0).load_state_dict(tensors)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"family": "poisson"}, ValueError, "family: expected one of .* got 'poisson'"),
        ({"family": 3}, TypeError, "family: expected a name"),
        ({"family": lambda output, target: output}, ValueError, "family: expected one with sample, or empirical=True"),
        ({"reduction": "max"}, ValueError, "reduction: expected 'mean' or 'sum', got 'max'"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size: expected an integer"),
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1"),
        ({"generator": 0}, TypeError, "generator: expected a torch.Generator or None, got 0"),
        ({"mode": "merged"}, ValueError, "mode: expected one of"),
        ({"strength": "strong"}, ValueError, "strength: expected a number, not negative, got 'strong'"),
        ({"strength": -0.5}, ValueError, "strength: expected a number, not negative, got -0.5"),
        ({"model": [make()]}, TypeError, "model: expected a torch.nn.Module, got list"),
    ],
)
def test_what_would_fail_after_a_task_fails_before_it(options, error, message):
    with pytest.raises(error, match=message):
        EWC(**({"model": make(), "strength": 1.0} | options))


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"anchor.0.bias": torch.full((4,), torch.inf)}, ValueError, "anchor: expected finite numbers for '0.bias'"),
        ({"fisher.0.bias": torch.full((4,), -1.0)}, ValueError, "fisher: expected nothing negative for '0.bias'"),
        ({"fisher.0.bias": torch.full((4,), torch.inf)}, ValueError, "fisher: expected finite numbers for '0.bias'"),
        ({"offset": torch.tensor(torch.nan)}, ValueError, "offset: expected a number, not negative, got"),
        ({"offset": torch.tensor(-1.0)}, ValueError, "offset: expected a number, not negative, got"),
        ({"offset": torch.zeros(1)}, ValueError, r"offset: expected a 0-d tensor, got shape \(1,\)"),
        ({"num_tasks": torch.tensor(0)}, ValueError, "num_tasks: expected a whole number, at least 1, got 0"),
        ({"num_tasks": torch.tensor(1.5)}, ValueError, "num_tasks: expected a whole number, at least 1, got 1.5"),
        ({"num_tasks": torch.tensor(torch.nan)}, ValueError, "num_tasks: expected a whole number"),
        ({"num_tasks": torch.tensor([1, 2])}, ValueError, r"num_tasks: expected a 0-d tensor, got shape \(2,\)"),
        ({"num_tasks": 2}, TypeError, "tensors: expected tensors by name"),
    ],
)
def test_a_state_that_is_none_is_refused_and_the_old_one_kept(entries, error, message):
    model = make()
    ewc = EWC(model, 1.0)
    ewc.consolidate([torch.randn(5, 3).double()])
    before = ewc.state
    with pytest.raises(error, match=message):
        ewc.load_state_dict(ewc.state_dict() | entries)
    assert ewc.state is before
    with pytest.raises(TypeError, match="tensors: expected tensors by name"):
        ewc.load_state_dict(None)
    with pytest.raises(ValueError, match="tensors: expected anchor"):
        ewc.load_state_dict({"offset": torch.tensor(0.0), "num_tasks": torch.tensor(1)})
    assert ewc.state is before


@pytest.mark.parametrize(("mode", "decay"), [("separate", 1.0), ("online", 0.5)])
def test_a_parameter_that_is_frozen_later_is_carried_on(mode, decay):
    """As one that no later task asks anything of."""
    model, x = make(), torch.randn(5, 3).double()
    ewc = EWC(model, 2.0, mode=mode, decay=decay, num_samples=None)
    first = ewc.consolidate([x]).state
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[2].weight.add_(0.3)
    second = ewc.consolidate([x]).state
    assert list(second.anchor) == list(first.anchor) and second.num_tasks == 2
    for name in ("0.weight", "0.bias"):
        assert torch.equal(second.anchor[name], first.anchor[name])
        assert torch.equal(second.fisher[name], decay * first.fisher[name])
    model.requires_grad_(True)
    fisher = fisher_diagonal(model, [x], num_samples=None)
    fisher |= {name: torch.zeros_like(value) for name, value in fisher.items() if name.startswith("0.")}
    expected = consolidate(first, model, fisher, mode, decay)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in second.state_dict().items())
    ewc.consolidate([x])  # and it may thaw again
    assert ewc.state.num_tasks == 3 and (ewc.state.fisher["0.bias"] > second.fisher["0.bias"] * decay).any()
    assert ewc.penalty().isfinite()
