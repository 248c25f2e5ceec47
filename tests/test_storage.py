"""Files of gpseq: every tensor comes back, every damage is noticed, and a killed writer leaves the old file."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq import storage
from gpseq.storage import StorageError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SHAPES = ((), (0,), (3,), (2, 0, 3), (2, 3), (1, 2, 3))
METADATA = {"rows": 17, "scale": 0.1 + 0.2, "columns": ["year", "größe"], "nothing": None, "nested": {"b": True}}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small file."""
    path = tmp_path_factory.mktemp("intact") / "state"
    storage.save(path, {"a": torch.arange(3.0), "b": torch.tensor(True)}, METADATA)
    return path.read_bytes()


def read(directory: Path, data: bytes) -> None:
    """Write bytes to a file as a stranger would, and load it."""
    path = directory / "state"
    path.write_bytes(data)
    storage.load(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (100 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    storage.save(tmp_path / "state", {"t": tensor})
    loaded = storage.load(tmp_path / "state")[0]["t"]
    assert loaded.dtype == dtype and loaded.shape == tensor.shape and torch.equal(loaded, tensor)
    loaded.zero_()  # what is loaded can be written to


def test_nan_infinity_and_signed_zero_keep_their_bits(tmp_path: Path) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324], dtype=torch.float64)
    storage.save(tmp_path / "state", {"t": tensor})
    assert torch.equal(storage.load(tmp_path / "state")[0]["t"].view(torch.int64), tensor.view(torch.int64))


def test_metadata_come_back(tmp_path: Path) -> None:
    storage.save(tmp_path / "state", {}, METADATA)
    assert storage.load(tmp_path / "state") == ({}, METADATA)


@given(st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False) | st.integers() | st.lists(st.booleans())))
def test_any_metadata_come_back(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "metadata"
    storage.save(path, {}, metadata)
    assert storage.load(path)[1] == metadata


def test_metadata_that_looks_like_the_digest_is_data(tmp_path: Path) -> None:
    tricky = {"a": {"checksum": "0" * 64}, "checksum": "0" * 64, "text": '"checksum": "' + "0" * 64 + '"'}
    storage.save(tmp_path / "state", {}, tricky)
    assert storage.load(tmp_path / "state")[1] == tricky


def test_strided_shared_and_differentiable_tensors_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": base.mT, "view": base[1:, ::2], "same": base, "expanded": torch.ones(1).expand(5)}
    tensors["graph"] = torch.ones(2, requires_grad=True) * 2
    storage.save(tmp_path / "state", tensors)
    loaded, _ = storage.load(tmp_path / "state")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach())


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(ord(name))) for name in "abcdefgh"}
    storage.save(tmp_path / "one", tensors, METADATA)
    storage.save(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_any_safetensors_reader_opens_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    storage.save(tmp_path / "state", {"a": torch.ones(2)}, METADATA)
    with safetensors.safe_open(tmp_path / "state", "pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.ones(2))
        assert json.loads(file.metadata()["gpseq"])["metadata"] == METADATA


def test_every_truncation_is_noticed(tmp_path: Path, intact: bytes) -> None:
    for length in range(len(intact)):
        with pytest.raises(StorageError, match="state"):
            read(tmp_path, intact[:length])


def test_every_appended_byte_is_noticed(tmp_path: Path, intact: bytes) -> None:
    for byte in range(256):
        with pytest.raises(StorageError, match="state"):
            read(tmp_path, intact + bytes([byte]))


def test_every_flipped_bit_is_noticed(tmp_path: Path, intact: bytes) -> None:
    for position in range(len(intact)):
        for bit in range(8):
            damaged = bytearray(intact)
            damaged[position] ^= 1 << bit
            with pytest.raises(StorageError, match="state"):
                read(tmp_path, bytes(damaged))


@given(st.data())
def test_any_other_damage_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, intact: bytes, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(intact) - 1))
    end = data.draw(st.integers(start, len(intact)))
    damaged = intact[:start] + data.draw(st.binary(max_size=40)) + intact[end:]
    if damaged != intact:
        with pytest.raises(StorageError, match="state"):
            read(tmp_path_factory.getbasetemp(), damaged)


@given(st.binary(max_size=200))
def test_foreign_files_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    with pytest.raises(StorageError, match="state"):
        read(tmp_path_factory.getbasetemp(), data)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    for metadata in (None, {}, {"gpseq": "7"}, {"gpseq": "{}"}, {"gpseq": '{"format": "other", "version": 1}'}):
        with pytest.raises(StorageError, match="not a file of gpseq"):
            read(tmp_path, safetensors_torch.save({"a": torch.ones(2)}, metadata))


def test_a_newer_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "VERSION", 2)
    storage.save(tmp_path / "state", {})
    monkeypatch.undo()
    with pytest.raises(StorageError, match=r"version 2 .* reads version 1"):
        storage.load(tmp_path / "state")


def test_messages_tell_the_cases_apart(tmp_path: Path, intact: bytes) -> None:
    for data, message in (
        (b"", "is empty"),
        (intact[:40], "truncated"),
        (intact[:-1], "checksum"),
        (b"a,b\n1,2\n", "not"),
    ):
        with pytest.raises(StorageError, match=message):
            read(tmp_path, data)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_writer_that_is_interrupted_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "state"
    storage.save(path, {"a": torch.ones(1)})
    before = path.read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.save(path, {"a": torch.zeros(1000)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_what_a_killed_writer_left_behind_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "state"
    (tmp_path / ".state.part").write_bytes(bytes(10_000))
    storage.save(path, {"a": torch.zeros(1)})
    assert torch.equal(storage.load(path)[0]["a"], torch.zeros(1))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    folder = lambda: {p.name: p.read_bytes() for p in tmp_path.iterdir()}  # noqa: E731
    before = folder()

    with pytest.raises(ZeroDivisionError), storage.Replacement() as files:
        files.write(tmp_path / "a", b"new")
        raise ZeroDivisionError
    assert folder() == before

    flush, flushed = os.fsync, []

    def full(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 3:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*c'"), storage.Replacement() as files:
        for name in names:
            files.write(tmp_path / name, b"new")
    assert folder() == before
    monkeypatch.undo()

    with storage.Replacement() as files:
        for name in names:
            files.write(tmp_path / name, name.encode())
        assert {name: folder()[name] for name in names} == before, "a file was replaced before all were written"
    assert folder() == {name: name.encode() for name in names}


def test_a_replacement_is_a_with_block_and_can_be_used_again(tmp_path: Path) -> None:
    files = storage.Replacement()
    with pytest.raises(RuntimeError, match="within a with block"):
        files.write(tmp_path / "a", b"1")
    for data in (b"1", b"2"):
        with files:
            files.write(tmp_path / "a", data)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": data}


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_who_holds_a_place_is_waited_for(tmp_path: Path) -> None:
    order: list[str] = []

    def second(places: list[int]) -> None:
        with storage.locked(tmp_path / "lock", places):
            order.append(f"second {places}")

    with storage.locked(tmp_path / "lock", [1, 2, 2]):
        thread = threading.Thread(target=second, args=([2, 0],))
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second [2, 0]"]

    # Another process, which says when it has the place, and dies with it.
    script = (
        "import sys, time; from gpseq.storage import locked\n"
        "with locked(sys.argv[1], [3]):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        second([4])  # another place
        thread = threading.Thread(target=second, args=([3],))
        thread.start()
        time.sleep(0.05)
        order.append("killed")
        process.kill()
        thread.join()
    assert order[2:] == ["second [4]", "killed", "second [3]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool])
def test_mapped_tensors_are_those_that_were_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "state"
    tensors = {"matrix": torch.randn(40, 30).to(dtype), "number": torch.ones((), dtype=dtype), "none": torch.ones(0)}
    storage.save(path, tensors, {"rows": 40})
    before = path.read_bytes()
    mapped, metadata = storage.load(path, mapped=True)
    assert metadata == {"rows": 40}
    assert sorted(mapped) == sorted(tensors)
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)
    mapped["matrix"].zero_()  # a private page
    assert path.read_bytes() == before
    storage.save(path, {"matrix": torch.zeros(1)})  # what was mapped outlives the file's name
    assert torch.equal(mapped["number"], tensors["number"])


def test_damage_is_noticed_in_mapped_files_too(tmp_path: Path, intact: bytes) -> None:
    path = tmp_path / "state"
    for place in (3, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 16]) + intact[place + 1 :])
        with pytest.raises(StorageError):
            storage.load(path, mapped=True)
    for cut in (0, 5, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:cut])
        for verify in (True, False):
            with pytest.raises(StorageError):
                storage.load(path, mapped=True, verify=verify)


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    storage.save(path, {"a": torch.ones(1)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*state'"):
        storage.save(path, {"a": torch.zeros(1)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.state'"):
        storage.save(tmp_path / "nowhere" / "state", {})
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.load(tmp_path / "absent")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="state"):
            storage.save(tmp_path / "state", {})
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_a_file_obeys_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        storage.save(tmp_path / "state", {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    storage.save(tmp_path / "link", {"a": torch.ones(1)})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").is_file()


def test_without_safetensors_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: storage.save(tmp_path / "state", {}), lambda: storage.load(tmp_path / "state")):
        with pytest.raises(ImportError, match=r"pip install 'gpseq\[cli\]'"):
            call()
    assert not (tmp_path / "state").exists()
