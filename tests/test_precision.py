"""Modules that appear in float64 for the time of a call, and buffers that stay in float64."""

import threading
from collections.abc import Callable
from copy import deepcopy

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from linear_operator import to_dense
from torch import Tensor, nn

from gpseq.precision import Float64Buffers, in_float64
from tests.oracles import close

F64 = torch.float64
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def fingerprint(module: nn.Module) -> list[tuple[str, int, torch.dtype, Tensor]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, id(tensor), tensor.dtype, tensor.detach().clone()) for name, tensor in tensors]


def unchanged(module: nn.Module, before: list[tuple[str, int, torch.dtype, Tensor]]) -> bool:
    now = fingerprint(module)
    return len(now) == len(before) and all(
        a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(now, before, strict=True)
    )


@pytest.mark.parametrize("module_dtype", DTYPES, ids=str)
def test_values_are_those_of_the_promoted_module(module_dtype: torch.dtype) -> None:
    module = network(module_dtype)
    before = fingerprint(module)
    x = torch.randn(7, 2, dtype=F64)
    out = in_float64(lambda a: module(a), (module,), x)
    assert out.dtype == F64
    close(out, deepcopy(module).double()(x), 1e-15)
    assert unchanged(module, before)


def test_a_function_of_several_modules_and_arguments() -> None:
    left, right, kernel = network(), network(), ScaleKernel(RBFKernel())
    f = lambda a, b, c: (left(a) + c * right(b), to_dense(kernel(a, b)))  # noqa: E731
    a, b = torch.randn(4, 2, dtype=F64), torch.randn(4, 2, dtype=F64)
    sums, grams = in_float64(f, (left, right, kernel), a, b, 3.0)
    exact = [deepcopy(module).double() for module in (left, right, kernel)]
    close(sums, exact[0](a) + 3.0 * exact[1](b), 1e-15)
    close(grams, to_dense(exact[2](a, b)), 1e-15)


def test_gradients_reach_the_parameters_in_their_own_dtype() -> None:
    module = network()
    x = torch.randn(7, 2, dtype=F64).requires_grad_()
    in_float64(lambda a: module(a), (module,), x).square().sum().backward()
    exact, inputs = deepcopy(module).double(), x.detach().clone().requires_grad_()
    exact.zero_grad()
    exact(inputs).square().sum().backward()
    close(x.grad, inputs.grad, 1e-14)
    for ours, theirs in zip(module.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.dtype == torch.float32
        close(ours.grad, theirs.grad, 1e-6)


@pytest.mark.parametrize("module_dtype", [torch.float32, F64], ids=str)
def test_frozen_modules_get_no_gradients(module_dtype: torch.dtype) -> None:
    module = network(module_dtype)
    x = torch.randn(7, 2, dtype=F64).requires_grad_()
    out = in_float64(lambda a: module(a), (module,), x, frozen=True)
    assert out.requires_grad
    out.square().sum().backward()
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    inputs = x.detach().clone().requires_grad_()
    deepcopy(module).double()(inputs).square().sum().backward()
    close(x.grad, inputs.grad, 1e-13)
    # Inputs without gradients: nothing to differentiate.
    assert not in_float64(lambda a: module(a), (module,), x.detach(), frozen=True).requires_grad


def test_without_gradients_there_are_none(dtype: torch.dtype) -> None:
    module = network(dtype)
    f, x = lambda a: module(a), torch.randn(3, 2, dtype=F64)
    for frozen in (False, True):
        with torch.no_grad():
            assert not in_float64(f, (module,), x, frozen=frozen).requires_grad
        with torch.inference_mode():
            in_float64(f, (module,), x, frozen=frozen)
        in_float64(f, (module,), x).sum().backward()  # what ran before leaves no inference tensors behind


@pytest.mark.parametrize("frozen", [False, True])
def test_modules_are_unchanged_when_the_function_raises(frozen: bool) -> None:
    module = network()
    before = fingerprint(module)

    def fail(x: Tensor) -> Tensor:
        assert module(x).dtype == F64
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        in_float64(fail, (module,), torch.randn(3, 2, dtype=F64), frozen=frozen)
    assert unchanged(module, before)
    assert module(torch.randn(3, 2)).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_nested_calls() -> None:
    inner, outer = network(), network()
    again = lambda a: outer(a)  # noqa: E731
    f = lambda a: again(a) + in_float64(lambda b: inner(b), (inner,), a)  # noqa: E731
    x = torch.randn(3, 2, dtype=F64)
    close(in_float64(f, (outer,), x), deepcopy(outer).double()(x) + deepcopy(inner).double()(x), 1e-15)
    close(in_float64(lambda a: in_float64(again, (outer,), a), (outer,), x), deepcopy(outer).double()(x), 1e-15)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_module_may_be_the_function(frozen: bool) -> None:
    """It is reachable twice then, as function and as module, and is put back once."""
    module = gpytorch.means.LinearMean(2)
    module.weights.data.normal_()
    before = fingerprint(module)
    x = torch.randn(3, 2, dtype=F64)
    out = in_float64(module, (module,), x, frozen=frozen)
    assert unchanged(module, before)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in module.parameters())
    close(out, deepcopy(module).double()(x), 1e-15)


def test_a_module_may_have_two_names() -> None:
    base = RBFKernel()
    both = nn.ModuleDict({"base": base, "outer": ScaleKernel(base), "twice": base + base})
    before = fingerprint(both)
    x = torch.randn(4, 2, dtype=F64)
    out = in_float64(lambda a: to_dense(both["outer"](a)) + to_dense(both["twice"](a)), (both,), x)
    assert unchanged(both, before)
    out.sum().backward()
    assert base.raw_lengthscale.grad is not None
    exact = deepcopy(both).double()
    close(out, to_dense(exact["outer"](x)) + to_dense(exact["twice"](x)), 1e-15)


def test_modules_may_overlap() -> None:
    module = network()
    before = fingerprint(module)
    x = torch.randn(3, 2, dtype=F64)
    out = in_float64(lambda a: module(a), (module, module[0]), x)
    assert unchanged(module, before)
    close(out, deepcopy(module).double()(x), 1e-15)


def test_parameters_may_be_tied() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    before = fingerprint(module)
    x = torch.randn(4, 3, dtype=F64)
    in_float64(lambda a: module(a), (module,), x).square().sum().backward()
    assert unchanged(module, before) and module[1].weight is module[0].weight
    exact = deepcopy(module).double()
    exact.zero_grad()
    exact(x).square().sum().backward()
    close(module[0].weight.grad, exact[0].weight.grad, 1e-6)


def test_buffers_and_constraints_are_promoted_too() -> None:
    kernel = RBFKernel(lengthscale_constraint=gpytorch.constraints.Interval(0.1, 3.0))
    kernel.lengthscale = 0.7
    x = torch.linspace(0, 1, 4, dtype=F64)[:, None]
    gram = in_float64(lambda x: to_dense(kernel(x)), (kernel,), x)
    close(gram, to_dense(deepcopy(kernel).double()(x)), 1e-15)
    assert {b.dtype for b in kernel.buffers()} == {torch.float32}


def test_integers_are_left_alone() -> None:
    module = nn.Module()
    module.register_buffer("count", torch.tensor([3]))
    module.register_buffer("scale", torch.tensor([0.5]))
    out = in_float64(lambda x: (module.count, x * module.scale), (module,), torch.ones(1, dtype=F64))
    assert out[0].dtype == torch.int64 and out[1].dtype == F64


def test_autocast_is_off_inside() -> None:
    module = network()
    x = torch.randn(64, 2, dtype=F64)
    expected = in_float64(lambda a: module(a), (module,), x)
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return module(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_float64(watched, (module,), x), expected)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_float64_modules_are_called_as_they_are() -> None:
    module = network(F64)
    seen: list[nn.Parameter] = []
    in_float64(lambda x: seen.append(module[0].weight) or module(x), (module,), torch.randn(3, 2, dtype=F64))
    assert seen[0] is module[0].weight


def test_state_that_a_module_keeps_is_kept() -> None:
    """Batch normalisation counts what it sees, in float32 as in float64."""
    x = torch.randn(50, 2, dtype=F64) + 3
    running = []
    for dtype in (torch.float32, F64):
        module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).to(dtype)
        in_float64(lambda a, m=module: m(a), (module,), x)
        assert module[0].num_batches_tracked == 1
        running.append(module[0].running_mean)
    assert running[0].dtype == torch.float32
    close(running[0], running[1], 1e-6)


# Float64Buffers


class State(Float64Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("exact", torch.tensor([1 / 3], dtype=F64))
        self.register_buffer("short", torch.tensor([1 / 3]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("nothing", None)
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float32),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.to(torch.zeros(1)),
        lambda m: m.float(),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.type(torch.float32),
        lambda m: m.double(),
        lambda m: deepcopy(m).half(),
        lambda m: nn.Sequential(m).half()[0],
    ],
)
def test_float64_buffers_are_never_rounded(cast: Callable[[State], State]) -> None:
    state = cast(State())
    assert state.exact.dtype == F64 and state.exact.item() == 1 / 3
    assert state.nothing is None
    assert "exact" in state.state_dict()


def test_other_tensors_follow_the_cast() -> None:
    state = State().half()
    assert state.short.dtype == state.weight.dtype == torch.float16
    assert State().to("meta").exact.device.type == "meta"
    assert State().half().to("meta").exact.dtype == F64


def test_float64_buffers_load() -> None:
    state, other = State(), State().half()
    state.exact.fill_(2 / 7)
    other.load_state_dict(state.state_dict())
    assert other.exact.item() == 2 / 7


def test_threads_leave_the_parameters_alone() -> None:
    """Stand-ins of one thread must not be taken for the originals by another."""
    layer = nn.Linear(3, 3)
    before = dict(layer.named_parameters())
    x = torch.ones(2, 3, dtype=F64)
    expected = in_float64(layer, (layer,), x)
    wrong: list[Tensor] = []

    def work() -> None:
        for _ in range(200):
            result = in_float64(layer, (layer,), x)
            if not torch.equal(result, expected):
                wrong.append(result)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(now is before[name] for name, now in layer.named_parameters())
