"""Which way things depend: four floors, read from the imports, those inside functions included.

Nothing imports upward. On the models' floor nobody imports a sibling; they meet by protocol.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from inspect import isfunction
from pathlib import Path

import pytest

import gpseq

ROOT = Path(gpseq.__file__).parent

# Rooms are built as they are needed; their places are known before.
MATHEMATICS = {"linalg", "hippo", "sgpa"}  # pure functions on tensors
FLOORS = [
    MATHEMATICS
    | {"kernels", "likelihoods", "predictive", "metrics", "plots", "storage", "training", "datasets"}
    | {"checks", "precision", "sampling", "logits", "spread", "prediction_checks"},
    {"features", "variational", "mlls"},
    {"models", "nn", "propagation", "reconfiguration", "generative", "continual", "distributed"},
    {"cli", "stream_run", "stream_setup", "prediction", "testing", "integrations"},
]
FLOOR = {unit: number for number, floor in enumerate(FLOORS, start=1) for unit in floor}
ORDER = ["features", "variational", "mlls"]  # on floor 2, each may import those before it
SIBLINGS = {("generative", "models"), ("reconfiguration", "nn")}  # the only ones on floor 3

# What may be imported when a module is imported: the declared dependencies, and numpy, which comes with them. All else
# is an extra, imported inside the function that needs it.
EAGER = {"torch", "gpytorch", "linear_operator", "numpy", "gpseq"} | set(sys.stdlib_module_names)
# A class that subclasses a host's needs the host when its module is imported, and its module needs nothing else.
HOSTS = {
    "gpseq.integrations.botorch": {"botorch"},
    "gpseq.integrations.botorch_defaults": {"botorch"},
    "gpseq.integrations.botorch_transforms": {"botorch"},
}


@dataclass(frozen=True)
class Import:
    """One import: ``module`` is absolute, ``names`` is what is taken out of it."""

    module: str
    names: tuple[str, ...]
    line: int
    lazy: bool  # inside a function, or for the type checker only


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module's source; ``package`` is what a relative one starts from."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, (), child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                yield Import(module, tuple(alias.name for alias in child.names), child.lineno, lazy)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(ast.Module(child.body, []), True)
                yield from walk(ast.Module(child.orelse, []), lazy)
            else:
                yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(source), False)


def units(found: Import) -> set[str]:
    """The rooms of gpseq that an import enters; none for a module from elsewhere."""
    if found.module == "gpseq":
        return set(found.names) - {"__version__"}
    return {found.module.split(".")[1]} if found.module.startswith("gpseq.") else set()


def objection(importer: str, imported: str) -> str | None:
    """Why ``importer`` may not import ``imported``, or None."""
    if importer == imported:
        return None
    for unit in (importer, imported):
        if unit not in FLOOR:
            return f"{unit} has no floor yet: give it one in {Path(__file__).name}"
    above, below = FLOOR[importer], FLOOR[imported]
    if imported == "integrations":
        return "nobody imports integrations"
    if below > above:
        return f"floor {above} imports upward from floor {below}"
    if importer in MATHEMATICS and imported != "linalg":
        return "pure functions import nothing of gpseq but linalg"
    if importer in ORDER and imported in ORDER and ORDER.index(imported) > ORDER.index(importer):
        return f"the order is {', '.join(ORDER)}"
    if above == below == 3 and (importer, imported) not in SIBLINGS:
        return "siblings meet by protocol"
    return None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of a module, one line each."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":  # the package's front doors
        return []
    found = []
    for item in imports(source, module if is_package else module.rpartition(".")[0]):
        where = f"{module}:{item.line}"
        for unit in sorted(units(item)):
            if reason := objection(parts[1], unit):
                found.append(f"{where} imports gpseq.{unit}: {reason}")
        library = item.module.split(".")[0]
        if not item.lazy and library not in EAGER | HOSTS.get(module, set()):
            found.append(f"{where} imports {library} at import time: import it inside the function that needs it")
        if parts[1] == "distributed" and units(item) == {"variational"} and item.module != "gpseq.variational.online":
            found.append(f"{where} imports {item.module}: distributed sees gpseq.variational.online only")
        private = [name for name in item.names if name.startswith("_")]
        if library == "gpytorch" and private and parts[1] not in {"variational", "mlls"}:
            found.append(f"{where} imports {private[0]}: GPyTorch's underscored bases belong to variational and mlls")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


@pytest.mark.parametrize(("module", "file"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_imports_follow_the_floors(module, file):
    assert violations(file.read_text(encoding="utf-8"), module, file.name == "__init__.py") == []


def test_the_ground_floor_has_no_cycle():
    """Floors 2 and 3 are ordered by rule; on floor 1 any direction will do, but only one."""
    graph: dict[str, set[str]] = {}
    for module, file in modules():
        unit = module.removeprefix("gpseq").lstrip(".").partition(".")[0]
        if FLOOR.get(unit) == 1:
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            entered = {u for item in imports(file.read_text(encoding="utf-8"), package) for u in units(item)}
            graph.setdefault(unit, set()).update(entered - {unit})
    while graph:
        leaves = {unit for unit, below in graph.items() if not below & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {unit: below for unit, below in graph.items() if unit not in leaves}


def test_no_module_bears_the_name_of_a_public_function():
    """A lazy import would hand out the module in the function's place."""
    for module, file in modules():
        if file.name == "__init__.py" and module != "gpseq":
            package = import_module(module)
            functions = {name for name in getattr(package, "__all__", ()) if isfunction(getattr(package, name))}
            assert not functions & {sibling.stem for sibling in file.parent.iterdir()}, module


def test_every_public_name_of_the_package_can_be_imported():
    assert set(gpseq.__all__) <= set(dir(gpseq))
    for name in gpseq.__all__:
        getattr(gpseq, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        gpseq.nonsense  # noqa: B018


BAD = {
    "upward": ("gpseq.features.hippo", "from gpseq.models import StreamingGP", "floor 2 imports upward from floor 3"),
    "upward, inside a function": ("gpseq.storage", "def f():\n    import gpseq.cli", "floor 1 imports upward"),
    "upward, relative": ("gpseq.features.base", "from ..variational import online", "the order is features"),
    "upward, by the front door": ("gpseq.linalg", "from gpseq import nn", "floor 1 imports upward"),
    "for the type checker": (
        "gpseq.variational.online",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gpseq.mlls import StreamingELBO",
        "the order is features",
    ),
    "sibling": ("gpseq.nn.attention", "from gpseq.models import StreamingGP", "siblings meet by protocol"),
    "sibling, the wrong way": ("gpseq.models.streaming_gp", "import gpseq.generative", "siblings meet by protocol"),
    "eager host of another": ("gpseq.integrations.timm", "import botorch", "imports botorch at import time"),
    "eager extra in a host's module": ("gpseq.integrations.botorch", "import tqdm", "imports tqdm at import time"),
    "impure mathematics": ("gpseq.hippo", "from gpseq import storage", "pure functions import nothing"),
    "integrations": ("gpseq.cli", "import gpseq.integrations.botorch", "nobody imports integrations"),
    "unknown room": ("gpseq.features.base", "from gpseq.utils import helper", "utils has no floor yet"),
    "eager extra": ("gpseq.plots", "import matplotlib.pyplot as plt", "imports matplotlib at import time"),
    "eager extra in a try": ("gpseq.cli", "try:\n    from tqdm import tqdm\nexcept ImportError:\n    pass", "tqdm"),
    "distributed looks too far": ("gpseq.distributed", "from gpseq.variational import interdomain", "online only"),
    "private base": ("gpseq.models.m", "from gpytorch.variational import _VariationalStrategy", "underscored bases"),
}

GOOD = {
    "downward": ("gpseq.cli", "from gpseq.models import StreamingGP"),
    "order": ("gpseq.variational.interdomain", "from gpseq.features import InducingFeatures"),
    "own room, relative": ("gpseq.features.hippo", "from .base import InducingFeatures"),
    "declared siblings": ("gpseq.generative.gp_vae", "from gpseq.models import StreamingGP"),
    "linalg": ("gpseq.sgpa", "from gpseq.linalg import cholesky"),
    "a host": ("gpseq.integrations.botorch", "from botorch.models import SingleTaskGP"),
    "lazy extra": ("gpseq.plots", "def draw():\n    import matplotlib.pyplot as plt"),
    "extra for the type checker": ("gpseq.plots", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
    "distributed": ("gpseq.distributed", "from gpseq.variational.online import OnlineState"),
    "private base where it belongs": (
        "gpseq.variational.interdomain",
        "from gpytorch.variational._variational_strategy import _VariationalStrategy",
    ),
}


@pytest.mark.parametrize(("module", "source", "reason"), BAD.values(), ids=BAD)
def test_a_bad_import_is_caught(module, source, reason):
    assert any(reason in line for line in violations(source, module))


@pytest.mark.parametrize(("module", "source"), GOOD.values(), ids=GOOD)
def test_a_good_import_passes(module, source):
    assert violations(source, module) == []
