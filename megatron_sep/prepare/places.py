"""Where text lies: a path, or an address of a file system that fsspec knows, as s3://bucket/text/*.jsonl."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import SepError, UserError

_READ = 1 << 20


class PlaceError(UserError):
    """An address that cannot be used."""


def is_address(text: str) -> bool:
    """Whether it names a place that is no path."""
    return "://" in text


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises PlaceError for a file system that is unknown, or whose library is missing.
    """
    with needs_extra("fsspec", "remote"):
        import fsspec
    with reached(address):
        system, path = fsspec.url_to_fs(address)
    return system, str(path).rstrip("/")


@contextmanager
def reached(address: str) -> Iterator[None]:
    """What a file system's library raises inside the block, of which each has its own, as PlaceError."""
    try:
        yield
    except SepError:
        raise
    except Exception as error:
        raise PlaceError(
            f"{address}: {type(error).__name__}: {error}; install what fsspec needs for it, give the credentials that "
            "it asks for, or give another place"
        ) from error


def find(address: str) -> list[Path]:
    """The files that an address names: a file, a folder (deep), or a glob; objects with the methods of a Path.

    Raises PlaceError for a file system that is unknown, does not answer, or whose library is missing.
    """
    with needs_extra("upath", "remote"):
        from upath import UPath
    system, path = file_system(address)
    with reached(address):
        names = system.find(path) if system.isdir(path) else system.glob(path)
        return [cast(Path, UPath(system.unstrip_protocol(name))) for name in sorted(names) if system.isfile(name)]


def open_bytes(path: Path) -> BinaryIO:
    """To read from the beginning; what is no path of this machine through a buffer, whose lines are read quickly."""
    if isinstance(path, Path):
        return path.open("rb", buffering=_READ)
    return io.BufferedReader(cast(io.RawIOBase, path.open("rb")), _READ)
