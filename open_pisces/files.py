"""Files that are whole or not there: checksums, replacing a file or a folder, one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from open_pisces.errors import PiscesError

WEIGHTS = Path(__file__).parent / "weights" / "tiny"
"""The model folder inside the package."""


class LockHeldError(PiscesError):
    """Another process holds a lock.

    Attributes:
        holder: that process and its machine, as it wrote into the lock's file.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.holder = holder
        super().__init__(f"{path}: held by {holder}: wait until it has ended")


def sha256_of(content: bytes | Path) -> str:
    """SHA-256 of bytes, or of the file at a path (read in pieces), as 64 hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk (`fsync`): they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden name beside ``path`` to write to; it replaces ``path`` when the block ends without an error.

    A reader finds the old file or the new one. After an error the old file is untouched and the hidden one is gone;
    after a kill the hidden one stays. The hidden name ends like ``path``, so that libraries see its format.
    """
    hidden = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield hidden
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file with `whole_file`; text as UTF-8."""
    with whole_file(path) as hidden:
        hidden.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path, work: Path | None = None) -> Iterator[Path]:
    """An empty folder to fill; it replaces ``path`` as a whole when the block ends without an error, else it goes.

    Args:
        path: where it belongs; a folder that is there is replaced.
        work: the folder to fill, in the same parent; by default a hidden one of this process. What is in it goes first.
    """
    work = work or path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir(parents=True)
    try:
        yield work
        replace_folder(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def replace_folder(fresh: Path, path: Path) -> None:
    """Put the folder ``fresh`` in the place of ``path`` by renames: a reader finds the old or the new, never a mixture.

    If ``fresh`` cannot be renamed, the old folder is put back. A kill between the two renames leaves the old one as
    ``.NAME.PID.old`` beside it.
    """
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        fresh.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive `flock` on the file at ``path``, which is made if needed and stays.

    The kernel releases the lock when the process ends, however that happens. The holder writes its number and machine
    into the file.

    Raises:
        LockHeldError: if another process has it and ``wait`` is false.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockHeldError(path, file.read().strip() or "another process") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
