"""Each extra alone is enough for what needs it, and nothing but the dependencies is needed to import the package."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What the extras install, by the names under which it is imported.
PACKAGES = {
    "botorch": {"botorch"},
    "transformers": {"transformers", "safetensors", "tqdm"},
    "metrics": {"torchmetrics"},
    "cli": {"safetensors", "tqdm", "matplotlib"},
    "examples": {"safetensors", "tqdm", "matplotlib", "dask", "distributed"},
}
OTHERS = {"laplace", "timm", "pandas", "sklearn", "pytest", "hypothesis", "ray", "torchvision"}

#: One child an extra, so that imports of torch and GPyTorch are paid for once.
SCRIPT = """
import importlib.abc, json, os, pkgutil, sys, traceback

class Blocked(importlib.abc.MetaPathFinder):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

packages, others = json.loads(sys.argv[1])
sys.path.insert(0, sys.argv[2])
everything = set().union(*packages.values(), others)
blocked = Blocked(everything)
sys.meta_path.insert(0, blocked)
import gpytorch
answers = {}
for extra in ["", *packages]:
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        blocked.names = everything - set(packages.get(extra, []))
        failed = {}
        import gpseq
        names = [module.name for module in pkgutil.walk_packages(gpseq.__path__, "gpseq.")]
        for name in names:
            if name == "gpseq.__main__":
                continue
            try:
                importlib.import_module(name)
            except ImportError as error:
                failed[name] = str(error)
        with os.fdopen(write, "w") as pipe:
            json.dump([len(names), failed], pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answers[extra] = json.load(pipe)
    os.wait()
print(json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_extra_alone_imports_cleanly() -> None:
    listed = json.dumps([{name: sorted(found) for name, found in PACKAGES.items()}, sorted(OTHERS)])
    root = str(ROOT) if (ROOT / "gpseq").exists() else "."
    done = subprocess.run([sys.executable, "-c", SCRIPT, listed, root], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for extra, (number, failed) in json.loads(done.stdout).items():
        assert number > 200
        hosts = {name for name, message in failed.items() if "'botorch'" in message or "gpseq[botorch]" in message}
        assert set(failed) == hosts, (extra, failed)
        assert all(name.startswith("gpseq.integrations.botorch") for name in hosts), (extra, hosts)
        assert bool(hosts) == (extra != "botorch"), (extra, hosts)


def test_the_extras_are_those_of_the_project() -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the tests run outside a checkout")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == set(PACKAGES) | {"test", "docs", "dev"}
