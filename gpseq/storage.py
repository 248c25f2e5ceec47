"""Files that survive: tensors and metadata in one safetensors file, replaced atomically and checked when read.

A file is an ordinary safetensors file, which any safetensors reader opens. Its header carries one metadata entry,
``"gpseq"``: a JSON object with the name and version of the format, the user's metadata, and the SHA-256 of the whole
file (computed with zeros where the digest stands). So a reader notices any change of any byte.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Name and version written into every file. A reader refuses versions that it does not know.
FORMAT, VERSION = "gpseq-tensors", 1

# One metadata entry only: safetensors writes several in random order, and files would not be reproducible.
_ENTRY = "gpseq"
_BLANK = "0" * 64  # stands for the digest while the digest is computed


class StorageError(ValueError):
    """A file is not what gpseq wrote: foreign, truncated, damaged, or of a newer version."""


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and metadata to ``path``, atomically.

    Whoever opens ``path`` finds the old file or the new one, complete, whatever happens to the writer or the machine
    (see :func:`replace_file`). Equal contents give equal bytes.

    Args:
        path: the file; it is replaced if it exists.
        tensors: any number of dense tensors of any shape, 0-d and empty ones included; they are written from the CPU
            and without autograd history.
        metadata: what JSON holds: strings, numbers, booleans, ``None``, lists and dicts with string keys. Floats keep
            every bit.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written. The old one is intact.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "state.safetensors"
        >>> save(path, {"mean": torch.tensor([1.0, 2.0])}, {"rows": 2})
        >>> load(path)
        ({'mean': tensor([1., 2.])}, {'rows': 2})
    """
    replace_file(path, encode(tensors, metadata))


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> bytes:
    """The bytes that :func:`save` writes.

    Args:
        tensors: as for :func:`save`.
        metadata: likewise.

    Returns:
        Contents of a file.

    Raises:
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    # A copy each: safetensors refuses tensors that are strided or share memory.
    dense = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()}
    header = {"checksum": _BLANK, "format": FORMAT, "version": VERSION, "metadata": dict(metadata or {})}
    blank = safetensors.torch.save(dense, {_ENTRY: json.dumps(header, sort_keys=True)})
    digest = hashlib.sha256(blank).hexdigest()
    return blank.replace(_field(_BLANK), _field(digest), 1)


def load(
    path: str | os.PathLike[str], *, mapped: bool = False, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Args:
        path: the file.
        mapped: leave the tensors in the file, mapped into memory: what is not touched is not read again, and takes none
            of the process's own memory. To write into them does not change the file.
        verify: compute the checksum, for which the whole file is read once. Without it only the header is looked at;
            for files that this process has verified before.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        StorageError: the file is foreign, truncated, damaged or of a newer version; the message names the file.
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
    """
    safetensors = _safetensors()
    if mapped:
        return _mapped(safetensors, path, verify)
    data = Path(path).read_bytes()
    header = _verified(path, data, verify)
    # From here on the bytes are those that save wrote. Tensors are copied out of the file's buffer, in which they are
    # aligned to eight bytes only: vectorised sums can depend on alignment, and a resumed run must not.
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    return tensors, header["metadata"]


def _mapped(
    safetensors: ModuleType, path: str | os.PathLike[str], verify: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    while True:
        if not os.path.getsize(path):
            raise StorageError(f"{path} is empty, not a file of gpseq.")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _verified(path, data, verify)
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                # It is opened a second time, and may have been replaced meanwhile: header and tensors are of one file.
                if json.loads(opened.metadata()[_ENTRY]) == header:
                    return {name: opened.get_tensor(name) for name in opened.keys()}, header["metadata"]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path} is damaged or truncated: {error}") from error


def _verified(path: str | os.PathLike[str], data: bytes | mmap.mmap, verify: bool) -> dict[str, Any]:
    """The header of a file, whose checksum is right."""
    header = _header(path, data)
    digest = str(header.get("checksum"))
    if verify and _digest(data, _field(digest)) != digest:
        raise StorageError(f"{path} is damaged or truncated: its checksum does not match its contents.")
    return header


class Replacement:
    """Several files that are replaced together, or none: as :func:`replace_file`, once for all.

    All new contents are on the disk before the first file is renamed; where one cannot be written, all files stay as
    they were. A machine that fails between the renames leaves some files new and others old, each of them complete.

    One writer of a file at a time, see :func:`locked`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Replacement() as files:
        ...     files.write(folder / "a", b"1")
        ...     files.write(folder / "b", b"2")
        >>> (folder / "b").read_bytes()
        b'2'
    """

    def __init__(self) -> None:
        # What is renamed to what, and the name that the caller used; nothing can be written outside of a with block.
        self._parts: dict[Path, tuple[Path, str]] | None = None

    def __enter__(self) -> Replacement:
        self._parts = {}
        return self

    def write(self, path: str | os.PathLike[str], data: bytes) -> None:
        """New contents of a file, flushed to the disk beside it.

        Args:
            path: the file; a symbolic link is followed.
            data: its new contents.

        Raises:
            RuntimeError: there is no ``with`` block around the call.
            OSError: the directory does not exist or cannot be written to, or the disk is full.
        """
        if self._parts is None:
            raise RuntimeError("Replacement: files are written within a with block, which replaces them at its end.")
        target = Path(os.path.realpath(path))
        part = target.with_name(f".{target.name}.part")
        self._parts[part] = target, os.fspath(path)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from error

    def save(
        self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """As :func:`gpseq.storage.save`, together with the other files.

        Args:
            path: the file.
            tensors: its tensors.
            metadata: what JSON holds.
        """
        self.write(path, encode(tensors, metadata))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        parts, self._parts = self._parts or {}, None
        try:
            if kind is None:
                for part, (target, path) in parts.items():
                    try:
                        os.replace(part, target)
                    except OSError as error:
                        raise type(error)(error.errno, error.strerror, path) from error
                for directory in {target.parent for target, _ in parts.values()}:
                    _flush_directory(directory)
        finally:
            for part in parts:
                with suppress(OSError):  # a read-only file system refuses that, too, and is what to speak of
                    part.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the contents of ``path`` by ``data``, atomically and durably.

    The bytes go to a temporary file in the same directory, ``.NAME.part``, which is flushed to the disk and then
    renamed. A writer that is killed leaves the old file as it was, and at most that one temporary file, which the
    next writer overwrites. One writer at a time.

    Args:
        path: the file; a symbolic link is followed.
        data: its new contents.

    Raises:
        OSError: the directory does not exist or cannot be written to, or the disk is full.
    """
    with Replacement() as files:
        files.write(path, data)


#: Threads of this process, a lock a file: the system's locks are between processes.
_THREADS: dict[str, threading.Lock] = {}


@contextmanager
def locked(path: str | os.PathLike[str], places: Iterable[int]) -> Iterator[None]:
    """Keep other threads and processes from the same places while something is read, changed and replaced.

    Whoever comes later waits. A process that dies gives its places free. Where the system has no POSIX locks (Windows),
    only threads of this process wait.

    Args:
        path: a file for nothing but this, which is made, and stays empty.
        places: numbers from 0, such as those of files.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp()) / "lock", [3, 1]):
        ...     pass
    """
    name = os.path.realpath(path)
    with _THREADS.setdefault(name, threading.Lock()):
        if fcntl is None:
            yield
            return
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            for place in sorted(set(places)):  # always in this order, so that nobody waits in a circle
                fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, place)
            yield
        finally:
            os.close(descriptor)  # which gives all places free


def _digest(data: bytes | mmap.mmap, field: bytes) -> str:
    """SHA-256 of a file, with zeros where its own digest stands."""
    digest = hashlib.sha256()
    start = data.find(field)
    with memoryview(data) as view:
        if start >= 0:
            digest.update(view[:start])
            digest.update(_field(_BLANK))
        digest.update(view[start + len(field) if start >= 0 else 0 :])
    return digest.hexdigest()


def _safetensors() -> ModuleType:
    """Import safetensors when a file is read or written, and not before: it comes with an extra."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files of gpseq need the package safetensors: pip install 'gpseq[cli]'") from error
    return safetensors


def _flush_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut, where the system lets a directory be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _field(digest: str) -> bytes:
    """The digest as it stands in the header: JSON inside a JSON string, hence the backslashes.

    Keys are sorted and "checksum" is the first, so nothing in the user's metadata can stand before it.
    """
    return f'\\"checksum\\": \\"{digest}\\"'.encode()


def _header(path: str | os.PathLike[str], data: bytes | mmap.mmap) -> dict[str, Any]:
    """The ``"gpseq"`` entry of a safetensors header: eight bytes of length, then JSON."""
    if not data:
        raise StorageError(f"{path} is empty, not a file of gpseq.")
    length = int.from_bytes(data[:8], "little")
    if len(data) >= 8 and data[8:9] == b"{" and length > len(data) - 8:
        raise StorageError(f"{path} is truncated: {len(data)} bytes do not hold its header of {length} bytes.")
    try:
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_ENTRY])
        name, version = header["format"], header["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = None
    if name != FORMAT:
        raise StorageError(f"{path} is not a file of gpseq, or its header is damaged.")
    if version != VERSION:
        raise StorageError(f"{path} has version {version} of the format; this gpseq reads version {VERSION}.")
    return header
