"""Files that are either whole or absent: atomic writing, the cache folder, locks between processes; and counted random-access reading."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Where converted models and reusable results are kept: $LLMCORE_CACHE, else $XDG_CACHE_HOME/llmcore, else ~/.cache/llmcore."""
    if chosen := os.environ.get("LLMCORE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "llmcore"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`, on failure removed.

    Readers see the old file or the whole new one, never a part. The temporary file lies in the same folder, because a rename is atomic
    only within one file system.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`, on failure removed.

    An existing `path` is kept (the work is dropped) unless `replace`, in which case the old folder is moved aside first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists() and replace:
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.rename(path, aside / path.name)
            os.rename(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
        elif not path.exists():
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON to `path` atomically; the value is encoded before anything on disk is touched."""
    write_bytes(path, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write torch tensors to one safetensors file atomically (contiguous, not shared; `metadata` values are strings)."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(dict(tensors), str(temporary), metadata=dict(metadata) if metadata else None)


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, timeout: float = 600.0) -> Iterator[None]:
    """Hold the lock file `<path>.lock` against other processes of this machine; TimeoutError after `timeout` seconds."""
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=timeout):
            yield
    except Timeout as error:
        raise TimeoutError(f"{path}.lock is held by another process for more than {timeout:.0f} s; "
                           "remove the file if no such process runs") from error


class CheckpointError(ValueError):
    """A checkpoint file that cannot be trusted or understood; the message names the file and the field."""


class CountedFile:
    """A regular file read at given offsets, every byte counted. Safe to use from several threads at once.

    Positioned reads rather than a memory map: a file that shrinks under the reader gives an error that names it (a map gives SIGBUS and
    kills the process), what is read does not stay in the resident set, and the count is what really left the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        # O_NONBLOCK: opening a pipe that someone left in a model folder must not hang; it is refused just below.
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{self.path}: not a regular file")
        self.size = status.st_size
        self.bytes_read = 0
        self._lock = threading.Lock()

    def read_into(self, buffer: memoryview, offset: int, field: str) -> None:
        """Fill `buffer` (bytes) from `offset`; CheckpointError naming the file and `field` when the file ends before."""
        done, total = 0, len(buffer)
        while done < total:
            count = os.preadv(self._fd, [buffer[done:done + _REQUEST_BYTES]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: {field}: truncated, the file ends {total - done} bytes early")
            done += count
            with self._lock:
                self.bytes_read += count

    def read(self, count: int, offset: int, field: str) -> bytearray:
        """`count` bytes from `offset`; refused before anything is allocated when the file is shorter."""
        if count > self.size - offset:
            raise CheckpointError(f"{self.path}: {field}: needs {count} bytes at offset {offset}, the file has {self.size}")
        data = bytearray(count)
        self.read_into(memoryview(data), offset, field)
        return data

    def announce(self, offset: int, count: int) -> None:
        """Tell the system that this range is about to be read, so that it fetches ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    def close(self, _close: Callable[[int], None] = os.close) -> None:
        """Close the file; closing twice is harmless."""
        # The default is bound here: a reader left open is closed at exit, when the module's names are gone.
        if self._fd >= 0:
            _close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


_REQUEST_BYTES = 8 << 20


def short(value: Any, limit: int = 120) -> str:
    """repr for a message, cut: names and numbers in a hostile file can be megabytes long."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number beyond 2**256"
    if isinstance(value, list):
        value = value[:16]
        if any(isinstance(item, int) and item.bit_length() > 256 for item in value):
            return "a list with a number beyond 2**256"
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= limit + 8 else text[:limit] + "..."


def _umask() -> int:
    """The process umask; mkstemp ignores it, and a cache shared by a group must not end up private."""
    current = os.umask(0)
    os.umask(current)
    return current
