"""gpseq.distributed: several processes end with the posterior of one that has all the data."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpseq.distributed import ProcessShards, average_gradients
from tests import distributed_worker as worker

pytestmark = pytest.mark.slow


def torchrun(size: int, job: str, out: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, "-m", "tests.distributed_worker", job, str(out)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_are_the_whole(size: int, tmp_path: Path) -> None:
    torchrun(size, "update", tmp_path)
    found = [torch.load(tmp_path / f"update-{rank}.pt") for rank in range(size)]
    for kind in worker.KINDS:
        expected = dict(worker.learn(kind, None).state.items())
        for name, value in expected.items():
            first = found[0]["states"][kind][name]
            finite = value.double()[value.double().isfinite()]
            scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
            near = torch.isclose(first.double(), value.double(), rtol=0, atol=1e-10 * scale)
            assert near.all(), (kind, name)
            assert all(torch.equal(first, other["states"][kind][name]) for other in found), (kind, name)
    for rank, one in enumerate(found):
        assert one["unchanged"]
        assert ("expected finite targets" if rank == 0 else "process 0 of") in one["errors"][0]
        if size > 1:
            assert "the same in all processes" in one["errors"][1]
        weight, number = one["gradients"]
        assert torch.equal(weight, torch.full((3,), (size + 1) / 2)) and number.item() == pytest.approx(4 / size)
    worker.fleet(tmp_path / "alone")
    files = {file.name: file.read_bytes() for file in (tmp_path / "fleet").glob("*.safetensors")}
    assert len(files) == 6
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "alone").glob("*.safetensors")}


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    torchrun(2, "training", tmp_path)
    found = [torch.load(tmp_path / f"training-{rank}.pt") for rank in range(2)]
    for kind in worker.LOSSES:
        # Parts in turn, each with its own draws; without draws that is the whole batch at once.
        expected = [worker.gradients(kind, 2, None)]
        if kind == "attention, mean":
            expected.append(worker.gradients(kind, 1, None))
        for one in expected:
            assert one.keys() == found[0][kind].keys() == found[1][kind].keys()
            for name, value in one.items():
                scale = max(1.0, value.abs().max().item())
                assert (found[0][kind][name] - value).abs().max() < 1e-6 * scale, (kind, name)
                assert torch.equal(found[0][kind][name], found[1][kind][name]), (kind, name)


def test_a_process_that_dies(tmp_path: Path) -> None:
    torchrun(3, "death", tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"death-{rank}.pt")
        assert "has died or hangs" in found["message"] and found["unchanged"]


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        ProcessShards()
    with pytest.raises(RuntimeError, match="init_process_group first"):
        average_gradients([])
