"""Where text lies: a path, or an address of a file system that fsspec knows, as s3://bucket/text/*.jsonl."""

import io
from pathlib import Path
from typing import BinaryIO, cast

from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import UserError

_READ = 1 << 20


class PlaceError(UserError):
    """An address that cannot be used."""


def is_address(text: str) -> bool:
    """Whether it names a place that is no path."""
    return "://" in text


def find(address: str) -> list[Path]:
    """The files that an address names: a file, a folder (deep), or a glob; objects with the methods of a Path.

    Raises PlaceError for a file system that is unknown, or whose library is missing.
    """
    with needs_extra("fsspec", "remote"), needs_extra("upath", "remote"):
        import fsspec
        from upath import UPath
    try:
        system, path = fsspec.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise PlaceError(f"{address}: {error}; install what fsspec needs for it, or give a path") from error
    names = system.find(path) if system.isdir(path) else system.glob(path)
    return [cast(Path, UPath(system.unstrip_protocol(name))) for name in sorted(names) if system.isfile(name)]


def open_bytes(path: Path) -> BinaryIO:
    """To read from the beginning; what is no path of this machine through a buffer, whose lines are read quickly."""
    if isinstance(path, Path):
        return path.open("rb", buffering=_READ)
    return io.BufferedReader(cast(io.RawIOBase, path.open("rb")), _READ)
