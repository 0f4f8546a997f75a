"""Files: whole or not there after kills, full disks and errors; odd names; one holder of a lock."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from open_pisces.files import (
    LockHeldError,
    locked,
    replace_folder,
    sha256_of,
    sync,
    whole_file,
    whole_folder,
    write_whole,
)

ODD = ["plain.txt", "with space", "naïve 猫.png", "-rf", "a\nb", "*?[x]", "'\"$(x)", ".hidden", "x" * 200]

HEAD = "import os, resource, signal, sys\nfrom pathlib import Path\nfrom open_pisces.files import *\n"


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program that ends as its code says."""
    command = [sys.executable, "-c", HEAD + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sha256_of_bytes_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_of(path) == sha256_of(path.read_bytes()) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none")


@pytest.mark.parametrize("name", ODD)
def test_files_of_any_name_are_written_and_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_whole(path, "old")
    write_whole(path, "naïve 猫")
    assert path.read_bytes() == "naïve 猫".encode()
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and names(tmp_path) == [name]


@pytest.mark.parametrize("name", ODD)
def test_folders_of_any_name_are_written_and_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / "deep" / name
    for content in ("old", "new"):
        with whole_folder(path) as work:
            assert not list(work.iterdir())
            (work / content).write_text(content)
    assert names(path) == ["new"] and names(path.parent) == [name]


def test_the_hidden_name_ends_like_the_files_so_that_libraries_see_the_format(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.tar.png") as hidden:
        assert hidden.parent == tmp_path and hidden.name.startswith(".") and hidden.name.endswith("a.tar.png")
        hidden.write_text("x")
    assert names(tmp_path) == ["a.tar.png"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as hidden:
        hidden.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half a pair: \ud800")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass  # nothing was written
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole_folder(path) as work:
        (work / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as work:
        (work / "half").touch()
        raise KeyboardInterrupt
    assert names(path) == ["old"] and names(tmp_path) == ["a"]


def test_a_file_in_the_way_of_a_file_is_replaced_and_a_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["kept"]


def test_a_folder_that_cannot_be_renamed_brings_the_old_one_back(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "none", path)
    assert names(path) == ["old"] and names(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_old_file_and_the_old_folder(tmp_path: Path) -> None:
    """A limit on the size of files fails a write in its middle, as a full disk does."""
    write_whole(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as work:
        (work / "old").touch()
    done = python(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        root, failed = Path(sys.argv[1]), 0
        try:
            write_whole(root / "file", "x" * 5000)
        except OSError:
            failed += 1
        try:
            with whole_folder(root / "folder") as work:
                (work / "new").write_text("x" * 5000)
        except OSError:
            failed += 1
        print(failed)
        """,
        tmp_path,
    )
    assert done.stdout.strip() == "2", done.stderr
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path / "folder") == ["old"]
    assert names(tmp_path) == ["file", "folder"]


def test_a_kill_leaves_the_old_file_and_the_old_folder(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as work:
        (work / "old").touch()
    done = python(
        """
        root = Path(sys.argv[1])
        with whole_file(root / "file") as hidden, whole_folder(root / "folder", root / "folder.new") as work:
            hidden.write_text("half")
            (work / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert done.returncode == -9
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path / "folder") == ["old"]
    with whole_folder(tmp_path / "folder", tmp_path / "folder.new") as work:
        assert not list(work.iterdir())  # what the killed process left is gone
        (work / "new").touch()
    assert names(tmp_path / "folder") == ["new"] and not (tmp_path / "folder.new").exists()


def test_sync_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    sync(tmp_path / "a")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")


def test_a_lock_has_one_holder_who_is_named_and_falls_with_the_process(tmp_path: Path) -> None:
    lock = tmp_path / "odd ' name.lock"
    try_it = """
        try:
            with locked(Path(sys.argv[1]), wait=False):
                print("mine")
                sys.stdout.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        except LockHeldError as error:
            print(error.holder)
        """
    with locked(lock):
        assert (
            python(try_it, lock).stdout.strip() == lock.read_text() and f"process {os.getpid()} on" in lock.read_text()
        )
        with pytest.raises(LockHeldError, match=f"held by process {os.getpid()} on"), locked(lock, wait=False):
            pass  # flock belongs to the opened file: a second one of this process waits too
    assert python(try_it, lock).stdout.strip() == "mine"
    with locked(lock, wait=False):  # the killed process holds it no more
        assert lock.read_text().startswith(f"process {os.getpid()} on")


def test_waiting_takes_turns(tmp_path: Path) -> None:
    code = HEAD + textwrap.dedent("""
        print("at the door", flush=True)
        with locked(Path(sys.argv[1]) / "lock"):
            print((Path(sys.argv[1]) / "done").exists(), flush=True)
        """)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        with locked(tmp_path / "lock"):
            assert other.stdout.readline() == "at the door\n"
            time.sleep(0.2)  # time to come in, if it could
            (tmp_path / "done").touch()
        assert other.stdout.readline() == "True\n"
