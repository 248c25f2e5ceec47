"""The wheel holds the package, its types marker and its data, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gpseq

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the checkout and no stale build folder gets in."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the tests run outside a checkout")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("gpseq", "tests", "examples", "benchmarks", "docs"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", "dist", "."],
        cwd=copy,
        check=True,
    )
    (built,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_all_of_the_package(wheel):
    names = set(wheel.namelist())
    package = ROOT / "gpseq"
    expected = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file.relative_to(ROOT).as_posix() for file in expected} <= names
    assert {"gpseq/py.typed", "gpseq/datasets/data/solar_lean2004.csv", "gpseq/datasets/data/LICENSES.md"} <= names


def test_the_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {"gpseq", f"gpseq-{gpseq.__version__}.dist-info"}


def test_the_metadata_names_the_licence_the_script_and_what_is_needed(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Dist: torch>=2.4" in metadata
    assert "Requires-Dist: gpytorch<2,>=1.15.2" in metadata
    assert "gpseq = gpseq.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
