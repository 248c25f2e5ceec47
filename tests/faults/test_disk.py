"""A disk that fills up, or that becomes read-only, in a run of the command and at a checkpoint.

What is damaged byte by byte is in tests/test_storage.py and tests/test_training.py.
"""

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gpseq import cli, storage, training
from gpseq.reconfiguration import Distiller
from gpseq.stream_run import StreamRun
from tests.faults.feeds import CHUNK, FILES, HEADER, NUM_ROWS, OPTIONS, Command, begin_quickly, result, rows

# A run of the command


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> list[list[bytes | None]]:
    """State and predictions of an undisturbed run: before it, and after each of its chunks."""
    found: list[list[bytes | None]] = [[None, None]]
    save, directory = StreamRun.save, tmp_path_factory.mktemp("undisturbed")

    def noted(run: StreamRun, path: str) -> None:
        save(run, path)
        found.append(result())

    with pytest.MonkeyPatch.context() as patch:
        begin_quickly(patch)
        patch.setattr(StreamRun, "save", noted)
        patch.chdir(directory)
        Path("table.csv").write_text(HEADER + "".join(rows()))
        assert cli.main(["stream", "table.csv", *OPTIONS, *FILES]) == 0
    assert len(found) == 1 + NUM_ROWS // CHUNK
    return found


def check_stopped(command: Command, commits: list[list[bytes | None]]) -> None:
    """The state is that of the last chunk that was reported, and nothing of its predictions is lost."""
    state, out = result()
    expected_state, expected_out = commits[command.committed]
    assert state == expected_state
    assert (out or b"").startswith(expected_out or b"")


def check_goes_on(command: Command, commits: list[list[bytes | None]]) -> None:
    assert command(*FILES) == 0
    assert result() == commits[-1]
    assert sorted(path.name for path in Path().iterdir()) == ["out.csv", "state", "table.csv"]


@contextmanager
def failing_from(patch: pytest.MonkeyPatch, name: str, number: int, code: int) -> Iterator[list[int]]:
    """From its n-th call on a file, 0 the first, ``os.fsync`` or ``os.replace`` fails; yields the count of calls."""
    real, calls = getattr(os, name), [0]

    def call(*args: Any) -> Any:
        if name == "fsync" and not stat.S_ISREG(os.fstat(args[0]).st_mode):
            return real(*args)
        calls[0] += 1
        if calls[0] > number:
            raise OSError(code, os.strerror(code))
        return real(*args)

    with patch.context() as inner:
        inner.setattr(os, name, call)
        yield calls


@pytest.mark.parametrize(("name", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_disk_that_fails_at_any_step_of_a_run(
    command: Command, commits: list[list[bytes | None]], name: str, code: int
) -> None:
    numbers = []
    for number in itertools.count():
        with failing_from(command.monkeypatch, name, number, code) as calls:
            if command(*FILES) == 0:
                break
        assert calls[0] == number + 1
        named = "state" if command.err.startswith("gpseq: error: state") else "out.csv"
        command.failed_with(f"{named}: {os.strerror(code)}")
        check_stopped(command, commits)
        numbers.append(command.committed)
        if number in (1, 4):
            check_goes_on(command, commits)
        for path in ("state", "out.csv"):
            Path(path).unlink(missing_ok=True)
    # Two steps a chunk, predictions and state; but predictions are replaced in the first one only.
    assert numbers == ([0, 0, 1, 1, 2, 2, 3, 3] if name == "fsync" else [0, 0, 1, 2, 3])


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("options", [FILES, FILES[2:]], ids=["state", "predictions"])
def test_a_file_that_the_system_lets_grow_no_more(
    command: Command, commits: list[list[bytes | None]], options: list[str], chunk: int
) -> None:
    """Real writes that end in the middle, by a limit on the size of files; the state is the larger one of the two."""
    import resource

    with_state = options is FILES
    limit = len(commits[chunk][0 if with_state else 1] or b"") - 7
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert command(*options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert command.committed == chunk - 1
    command.failed_with(f"{'state' if with_state else 'out.csv'}: File too large")
    if with_state:
        check_stopped(command, commits)
        check_goes_on(command, commits)
    else:
        assert command(*options) == 0 and result() == [None, commits[-1][1]]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("closed", ["state", "out.csv"])
def test_a_directory_that_becomes_read_only(
    command: Command, commits: list[list[bytes | None]], closed: str, code: int
) -> None:
    """Permissions do not bind root, so the refusal is made up."""
    real_open, real_unlink = open, os.unlink

    def is_closed(path: Any) -> bool:
        return closed in os.path.basename(path) and result()[0] == commits[2][0]

    def refuse(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode in ("wb", "r+b") and is_closed(path):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return real_open(path, mode, *args, **kwargs)

    def refuse_unlink(path: Any) -> None:
        """Such a file system refuses before it looks whether there is something."""
        if code == errno.EROFS and is_closed(path):
            raise OSError(code, os.strerror(code), os.fspath(path))
        real_unlink(path)

    with command.monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        patch.setattr(os, "unlink", refuse_unlink)
        assert command(*FILES) == 2
        command.failed_with(f"{closed}: {os.strerror(code)}")
        assert command.committed == 2
        check_stopped(command, commits)
        assert command(*FILES) == 2  # and again
        assert command.committed == 0 and result()[0] == commits[2][0]
    check_goes_on(command, commits)


def test_a_state_with_a_true_checksum_that_is_no_run(command: Command) -> None:
    """Such as another version might write: refused in one line, whatever is missing or of another kind."""
    assert command("--state", "state") == 0
    tensors, metadata = storage.load("state")
    cases: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        ({name: t for name, t in tensors.items() if name != left_out}, metadata)
        for left_out in ("borders", "learnt.time", "model.variational_strategy.belief.G")
    ]
    cases += [(tensors, {k: v for k, v in metadata.items() if k != left_out}) for left_out in ("options", "rows")]
    cases += [(tensors, metadata | {"options": metadata["options"] | {"later": 1}}), (tensors, metadata | {"seen": 3})]
    cases += [(tensors, metadata | {"options": metadata["options"] | {"kernel": "later"}})]
    for case in cases:
        storage.save("state", *case)
        before = Path("state").read_bytes()
        assert command("--state", "state") == 2
        assert command.err.startswith("gpseq: error: state is a file of gpseq, but not the state of a stream")
        assert command.err.count("\n") == 1 and Path("state").read_bytes() == before


# Training with a full disk


def trained(checkpoint: Path | None, seen: list[bytes]) -> dict[str, Tensor]:
    """A network with dropout; what is on disk is noted at each step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.3), nn.Linear(6, 1))
    x = torch.randn(20, 3)
    loader = DataLoader(TensorDataset(x, x.sum(-1, keepdim=True)), 5, shuffle=True)

    def loss(model: nn.Module, batch: list[Tensor], step: int) -> Tensor:
        if checkpoint is not None:
            seen.append(checkpoint.read_bytes())
        return (model(batch[0]) - batch[1]).square().mean()

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    training.fit(model, loss, loader, optimizer=optimizer, epochs=EPOCHS, checkpoint=checkpoint, progress=False)
    return model.state_dict()


def distilled(checkpoint: Path | None, seen: list[bytes]) -> dict[str, Tensor]:
    """A student on its own path, with draws."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    teacher = nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 2)).eval().requires_grad_(False)
    x = torch.randn(8, 3, 4)

    class Loader(list):
        def __iter__(self) -> Iterator[Any]:
            if checkpoint is not None:
                seen.append(checkpoint.read_bytes())
            return super().__iter__()

    distiller = Distiller(teacher)
    distiller.fit(Loader([[x, x.mean((1, 2)).gt(0).long()]]), EPOCHS, checkpoint=checkpoint, progress=False)
    return distiller.student.state_dict()


EPOCHS = 2


@pytest.mark.parametrize(("job", "name"), [(trained, "fsync"), (trained, "replace"), (distilled, "fsync")])
def test_a_full_disk_at_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Callable[..., dict[str, Tensor]], name: str
) -> None:
    """The old one is intact, and goes on to the result of an undisturbed run."""
    expected = job(None, [])
    for number in range(EPOCHS + 1):  # one before the first epoch
        path, seen = tmp_path / f"{number}.ckpt", []
        with failing_from(monkeypatch, name, number, errno.ENOSPC):
            with pytest.raises(OSError, match=rf"No space left on device: '.*{number}\.ckpt'"):
                job(path, seen)
        assert (path.read_bytes() if number else None) == (seen[-1] if seen else None)
        assert len(set(seen)) == number
        found = job(path, [])
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{number}.ckpt" for number in range(EPOCHS + 1)]
