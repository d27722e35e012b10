"""Files that are complete or not there: written aside, flushed to the disk and renamed."""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Errors of a disk that takes no more; those of `write` name no file."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write a file or to make a directory at; it becomes ``path`` when the block ends without an error.

    The folders above ``path`` are made. A file replaces a file, through a symbolic link the one that it points to; of
    two processes the last one to end wins. Nothing replaces a directory or a device, and a directory replaces nothing:
    FileExistsError, before the block where it can be seen there. Errors of the block name ``path`` for what lies aside.

    An error or an interrupt leaves nothing behind. A killed process leaves .NAME.HOST-PID.partial, which the next one
    of that machine to write ``path`` removes.
    """
    final = path.resolve() if path.is_symlink() else path
    aside = final.with_name(f"{_aside_of(final)}{os.getpid()}.partial")
    with _named(aside, path):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _refuse_to_replace(final, final.exists() and not final.is_file())
            _remove_leftovers(final)
            yield aside
            flush_tree(aside)
            _refuse_to_replace(final, aside.is_dir() and final.exists())
            aside.replace(final)
            flush(final.parent)
        finally:
            remove(aside)


@contextmanager
def _named(aside: Path, path: Path) -> Iterator[None]:
    """Make an error inside the block name the path that was asked for."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(aside), str(path), 1)
        elif error.filename is None and error.errno in NO_SPACE:
            error.filename = str(path)
        raise


def _aside_of(path: Path) -> str:
    """How the names begin that processes of this machine write ``path`` under."""
    return f".{path.name}.{os.uname().nodename}-"


def _refuse_to_replace(path: Path, wrong: bool) -> None:
    if wrong:
        raise FileExistsError(
            errno.EEXIST, "is there already" + ("" if path.is_file() else " and is no file"), str(path)
        )


def _remove_leftovers(path: Path) -> None:
    """What processes of this machine that are gone have left of ``path``."""
    start = _aside_of(path)
    for leftover in path.parent.glob(f"{glob.escape(start)}*.partial"):
        number = leftover.name.removeprefix(start).removesuffix(".partial")
        if number.isdecimal() and (int(number) == os.getpid() or not _is_alive(int(number))):
            remove(leftover)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON with a newline at its end, aside and then renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def parse_json(text: str) -> Any:
    """The value that JSON says. Raises ValueError, for brackets deeper than Python takes too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets in brackets, deeper than anything here needs") from error


def read_json(path: Path) -> Any:
    """The value in a file of JSON. Raises ValueError for what is none, OSError."""
    return parse_json(path.read_text(encoding="utf-8"))


def remove(path: Path) -> None:
    """Remove a file or a directory with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def flush_tree(path: Path) -> None:
    """Wait until a file, or a directory with all in it, is on the disk."""
    for below in path.rglob("*") if path.is_dir() else ():
        flush(below)
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of a directory's names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package; one that is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
