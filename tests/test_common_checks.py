"""Every public module keeps the common promises, and the checks notice those that are broken."""

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpseq
from gpseq.testing import CheckError, check, checks, tensors
from tests.common_cases import CASES, PARTS

NAMES = [
    "repr",
    "deepcopy",
    "pickle",
    "state_dict",
    "dtype",
    "device",
    "determinism",
    "generator",
    "gradients",
    "batch",
    "empty",
    "errors",
    "inputs",
    "warnings",
]


@pytest.mark.parametrize("name", CASES)
def test_common_promises(name: str) -> None:
    torch.manual_seed(0)
    obj, args, options = CASES[name]()
    assert len(check(obj, *args, **options)) >= 7


def public_modules() -> set[str]:
    found = set()
    for unit in gpseq.__all__:
        part = getattr(gpseq, unit)
        if inspect.ismodule(part):
            for name in getattr(part, "__all__", dir(part)):
                value = getattr(part, name)
                if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("gpseq"):
                    found.add(name)
    return found


def test_no_public_module_is_left_out() -> None:
    named = {name.partition(",")[0] for name in CASES} | set(PARTS)
    assert not public_modules() - named
    assert not set(PARTS) - public_modules()


# --- what the checks notice -------------------------------------------------------------------------------------------


class Good(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if x.shape[-1] != 2:
            raise ValueError(f"x: expected two columns, got shape {tuple(x.shape)}.")
        return x * self.weight + 0.0 * torch.rand(x.shape, generator=generator).to(x)


X = torch.ones(3, 2)


def test_a_good_module_passes_them_all() -> None:
    passed = check(Good(), X, batched=True, empty=True, bad=[(torch.ones(3, 5),)])
    assert set(passed) == set(NAMES) - ({"device"} if not torch.cuda.is_available() else set())


class Unprintable(Good):
    def __repr__(self) -> str:
        return ""


class Shared(Good):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        return self


class Unpicklable(Good):
    def __getstate__(self) -> dict:
        state = super().__getstate__()
        return {**state, "_parameters": {name: value + 1 for name, value in state["_parameters"].items()}}

    def __deepcopy__(self, memo: dict) -> nn.Module:
        return Unpicklable()


class Forgetful(Good):
    def state_dict(self, *args: object, **kwargs: object) -> dict:
        return {}

    def load_state_dict(self, *args: object, **kwargs: object) -> None:
        pass


class Coarse(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(x, generator) * (1.0 if x.dtype == torch.float64 else 1.1)


class Moody(Good):
    calls = 0

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        Moody.calls += 1
        return super().forward(x, generator) * Moody.calls


class Careless(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(x) + torch.rand(1).to(x)


class Idle(Good):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))


class Gossiping(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(x, generator) + x.sum()


class Empty(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(x, generator).mean(0)


class Lenient(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().forward(x[..., :2], generator)


class Broken(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            if x.shape[-1] != 2:
                self.weight.add_(1.0)
        return super().forward(x, generator)


class Writing(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x.add_(1.0)
        return super().forward(x, generator)


class Noisy(Good):
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        warnings.warn_explicit("somebody else", UserWarning, "/elsewhere/module.py", 1)
        return super().forward(x, generator)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Unprintable, "repr"),
        (Shared, "deepcopy"),
        (Unpicklable, "pickle"),
        (Forgetful, "state_dict"),
        (Coarse, "dtype"),
        (Moody, "determinism"),
        (Careless, "generator"),
        (Idle, "gradients"),
        (Gossiping, "batch"),
        (Empty, "empty"),
        (Lenient, "errors"),
        (Broken, "errors"),
        (Writing, "inputs"),
        (Noisy, "warnings"),
    ],
)
def test_a_broken_promise_is_noticed(make: Callable[[], nn.Module], name: str) -> None:
    found = dict(checks(make(), X, batched=True, empty=True, bad=[(torch.ones(3, 5),)]))
    with pytest.raises(CheckError, match=f"{make.__name__}, {name}: "):
        found[name]()


def test_random_states_stay() -> None:
    state = torch.random.get_rng_state()
    check(Good(), X, batched=True)
    assert torch.equal(state, torch.random.get_rng_state())


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="skip: expected names of checks"):
        check(Good(), X, skip=["colour"])
    with pytest.raises(TypeError, match="colour"):
        check(Good(), X, colour="red")


def test_tensors_of_answers() -> None:
    normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    assert [len(tensors(value)) for value in (X, {"a": [X, X.long()]}, normal, 3)] == [1, 1, 2, 0]
