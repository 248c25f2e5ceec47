"""What every test gets: one thread a worker, a fixed seed, a hypothesis profile."""

import os

# Before torch is imported, and inherited by the processes that tests start. Two workers of two threads each on two
# cores are slower than two workers of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# No deadlines: a first call pays for imports and caches, and shared machines stall.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


# Examples and benchmarks are not in the wheel, which the tests can be run against.
if not (Path(__file__).parents[1] / "benchmarks").is_dir():
    collect_ignore = ["test_benchmarks_vff.py", "test_uncertainty_texts.py", "test_uncertainty_benchmark.py"]
    collect_ignore_glob = ["generative/test_example_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """A fixed seed before each test, and the default dtype as it was after it."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both floating dtypes of inputs."""
    return request.param
