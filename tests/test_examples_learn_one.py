"""examples/stream/learn_one.py: rows one by one are the same rows in a chunk, and beat the last value."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gpytorch
import pytest
import torch

from gpseq.features import HippoFeatures
from gpseq.models import StreamingGP

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "stream" / "learn_one.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the tests run outside a checkout")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("learn_one_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and annotations look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kernel() -> gpytorch.kernels.Kernel:
    return gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())


def test_rows_one_by_one_are_a_chunk(example: ModuleType) -> None:
    regressor = example.OnlineRegressor(kernel(), window=8.0, ahead=20.0, num_features=24, warm_up=12)
    assert regressor.predict_one_with_std({"time": 0.0}) == (0.0, math.inf)
    times = torch.linspace(0.0, 8.0, 40, dtype=torch.float64)
    targets = 5 + 3 * times.sin()
    for t, y in zip(times[:12].tolist(), targets[:12].tolist(), strict=True):
        assert regressor.model is None
        assert regressor.learn_one({"time": t}, y) is regressor
    assert regressor.model is not None and not regressor._buffer
    for t, y in zip(times[12:].tolist(), targets[12:].tolist(), strict=True):
        regressor.learn_one({"time": t}, y)
    centre, scale = targets[:12].mean(), targets[:12].std()
    model = StreamingGP(
        HippoFeatures(24, times[11].item() + 20.0, measure="legt", window=8.0), regressor.kernel, regressor.likelihood
    ).eval()
    model.update(times, (targets - centre) / scale)
    with torch.no_grad():
        expected = model.likelihood(model(torch.tensor([3.3], dtype=torch.float64)))
    mean, std = regressor.predict_one_with_std({"time": 3.3})
    assert mean == pytest.approx((centre + scale * expected.mean).item(), rel=1e-8)
    assert std == pytest.approx((scale * expected.stddev).item(), rel=1e-8)
    assert regressor.predict_one({"time": 3.3}) == mean


def test_the_memory_is_moved_ahead_and_the_state_does_not_grow(example: ModuleType) -> None:
    regressor = example.OnlineRegressor(kernel(), window=8.0, ahead=1.0, num_features=24, warm_up=20)
    horizons, sizes = set(), set()
    for i in range(80):
        regressor.learn_one({"time": 0.25 * i}, math.sin(0.25 * i))
        if regressor.model is not None:
            horizons.add(regressor.model.features.horizon)
            sizes.add(sum(tensor.numel() for _, tensor in regressor.model.state.items()))
    assert 10 < len(horizons) < 20 and len(sizes) == 1
    assert regressor.predict_one({"time": 20.0}) == pytest.approx(math.sin(20.0), abs=0.02)


def test_the_running_error(example: ModuleType) -> None:
    assert example.running_rmse([3.0, 4.0, 0.0], 2) == pytest.approx([3.0, math.sqrt(12.5), math.sqrt(8.0)])
    last = example.LastValue()
    assert last.predict_one({}) == 0.0
    assert last.learn_one({}, 2.5).predict_one({}) == 2.5


@pytest.mark.slow
def test_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.stream.learn_one", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "learn_one.png").stat().st_size > 10_000
    rmse = {}
    for line in done.stdout.splitlines():
        name, found, rest = line.partition(": RMSE ")
        if found:
            rmse[name.strip()] = float(rest.split()[0])
    assert set(rmse) == {"streaming GP", "last value"}
    assert rmse["streaming GP"] < 0.9 * rmse["last value"]
