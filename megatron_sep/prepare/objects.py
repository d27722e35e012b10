"""Files in an object store, which are there whole or not at all, whoever is killed while one is written."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sep.errors import RunFailure
from megatron_sep.files import NO_SPACE, parse_json
from megatron_sep.prepare.places import file_system, reached


@dataclass(frozen=True)
class Objects:
    """A folder at an address; it travels to other processes. What cannot be reached is a PlaceError."""

    address: str

    def below(self, name: str) -> "Objects":
        """A folder in it."""
        return Objects(f"{self.address}/{name}")

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        with self._at(name) as (system, path):
            return bool(system.exists(path))

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        with self._at(name) as (system, path), suppress(FileNotFoundError):
            return bytes(system.cat_file(path))
        return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What ``write_json`` wrote. Raises RunFailure for anything else."""
        data = self.read(name)
        try:
            found: dict[str, Any] | None = None if data is None else parse_json(data.decode())
        except ValueError as error:
            raise RunFailure(
                f"{self.address}/{name}: is no file of `prepare`: {error}; remove {self.address} to start anew"
            ) from error
        return found

    def write(self, name: str, data: bytes) -> None:
        """Make a file, in the place of any of its name."""
        with self._at(name) as (system, path):
            system.pipe_file(path, data)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Make a file of JSON, in the place of any of its name."""
        self.write(name, _json(value))

    def create_json(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Make a file unless one is there, which the store decides; returns what is there then."""
        with self._at(name) as (system, path), suppress(FileExistsError):
            system.pipe_file(path, _json(value), mode="create")
        return self.read_json(name) or {}

    def put(self, file: Path, name: str) -> None:
        """Copy a file of this machine, in the place of any of its name."""
        with self._at(name) as (system, path):
            system.put_file(str(file), path)

    def fetch(self, name: str, file: Path) -> None:
        """Copy to a path of this machine. Raises RunFailure where nothing is there, or no room is here."""
        with self._at(name) as (system, path):
            try:
                system.get_file(path, str(file))
            except FileNotFoundError as error:
                raise self.gone(name) from error
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                raise RunFailure(
                    f"{file.parent}: {error.strerror}; free space there, or give another folder as work.scratch"
                ) from error

    def gone(self, name: str) -> RunFailure:
        """The error of a file that was there."""
        return RunFailure(
            f"{self.address}/{name}: is gone; somebody removed it, or another run of the same preparation took "
            "this one for dead and finished it; run again to see"
        )

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it, if it is there."""
        with self._at(name) as (system, path), suppress(FileNotFoundError):
            system.rm(path.rstrip("/"), recursive=True)

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file system, which remembers nothing of what was there, and the path in it."""
        place = f"{self.address}/{name}".rstrip("/")
        system, path = file_system(place)
        with reached(place):
            system.invalidate_cache()
            yield system, path


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode()
