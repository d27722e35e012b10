"""Files that are complete or not there: written aside, flushed to the disk and renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write a file or to make a directory at; it becomes ``path`` when the block ends without an error.

    Two processes may do this at once: the last one to end wins. A directory does not replace one that is there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    remove(aside)
    try:
        yield aside
        flush_tree(aside)
        aside.replace(path)
        flush(path.parent)
    except BaseException:
        remove(aside)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON with a newline at its end, aside and then renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a directory with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
