"""Work in an object store, for machines without a shared disk: each fetches what it maps to a disk of its own.

A name stands for the same bytes as long as the work lasts, so what was fetched never grows old, whoever made it and how
often. What a step of the search for duplicates has fetched is removed from a machine when the next one fetches there.
"""

import fcntl
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4
from zlib import crc32

from megatron_sep.files import read_json, remove
from megatron_sep.prepare.objects import Objects
from megatron_sep.prepare.pieces import PieceLedger, committed
from megatron_sep.prepare.work import DECIDED, SHARED, STEPS, Growing, part_name

_AT_ONCE = 16
_LOCKS = 256
_GROWN = re.compile(r"(part-\d+/(?:scan|encode))\.(?!json$)(\w+)")
"""A file of a ledger: its stem and its name there."""


@dataclass(frozen=True)
class RemoteWork:
    """``Work`` as it travels to processes of any machine."""

    objects: Objects
    name: str
    scratch: Path | None
    is_shared_disk: ClassVar[bool] = False

    @property
    def here(self) -> Path:
        """Where files lie on this machine, which all of its processes share."""
        return (self.scratch or Path(tempfile.gettempdir())) / f"megatron_sep-{self.name}"

    def has(self, name: str) -> bool:
        """As ``Work`` says."""
        return self.objects.has(name)

    def get(self, name: str) -> Path:
        """As ``Work`` says; of a machine's processes one fetches it and the others wait. Raises RunFailure."""
        path, grown = self.here / name, _GROWN.fullmatch(name)
        if path.exists():
            return path
        pieces = self._pieces(grown) if grown else []
        with self._fetching(name):
            if not path.exists():
                self._clear_before(name)
                with self._aside() as folder:
                    aside = folder / path.name
                    if grown:
                        with aside.open("wb") as file:
                            file.writelines(map(self._piece, pieces))
                    else:
                        self.objects.fetch(name, aside)
                    _rename(aside, path)
        return path

    def get_all(self, names: Iterable[str]) -> list[Path]:
        """As ``Work`` says, some at once."""
        wanted = list(names)
        missing = [name for name in wanted if not (self.here / name).exists()]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(self.get, missing))
        return [self.here / name for name in wanted]

    @contextmanager
    def made(self, name: str) -> Iterator[Path]:
        """As ``Work`` says; the file itself is put after those beside it, and all stay here too."""
        folder = name.rpartition("/")[0]
        with self._aside() as aside:
            path = aside / Path(name).name
            yield path
            if name == DECIDED:
                self._clear_before(name)
            for file in sorted(aside.iterdir(), key=lambda file: file == path):
                self.objects.put(file, f"{folder}/{file.name}".lstrip("/"))
                _rename(file, self.here / folder / file.name)

    def remove(self, name: str) -> None:
        """As ``Work`` says, in the store and on this machine."""
        self.objects.remove(name)
        _remove_shared(self.here / name)

    def ledger(self, part: int, stage: str, files: tuple[str, ...], start: Mapping[str, Any]) -> Growing:
        """As ``Work`` says."""
        return PieceLedger(self.objects, f"{part_name(part)}/{stage}", files, start)

    def state(self, part: int, stage: str) -> dict[str, Any] | None:
        """As ``Work`` says."""
        return committed(self.objects, f"{part_name(part)}/{stage}")

    def pieces(self, name: str) -> Iterator[bytes]:
        """As ``Work`` says."""
        grown = _GROWN.fullmatch(name)
        assert grown is not None, name
        return map(self._piece, self._pieces(grown))

    def path(self, _: str) -> Path | None:
        """None: it lies in pieces."""
        return None

    def joined(self, _: str) -> None:
        """It stays until the shard has its receipt, so that another machine can go on."""

    def part_locked(self, _: int) -> AbstractContextManager[None]:
        """No lock: two do no harm to each other."""
        return nullcontext()

    def clear(self) -> None:
        """Remove what lies on this machine."""
        _remove_shared(self.here)

    def _pieces(self, grown: re.Match[str]) -> list[str]:
        stem, file = grown.groups()
        found: list[str] = read_json(self.get(f"{stem}.json"))["pieces"][file]
        return found

    def _piece(self, name: str) -> bytes:
        data = self.objects.read(name)
        if data is None:
            raise self.objects.gone(name)
        return data

    def _clear_before(self, name: str) -> None:
        """Remove what only steps before the one that ``name`` belongs to have fetched."""
        step = Path(name).parts[:-1]
        if step[:1] == (STEPS,):
            for depth in range(1, len(step)):
                for other in self.here.joinpath(*step[:depth]).glob("*"):
                    if other.name != step[depth]:
                        _remove_shared(other)
        elif name == DECIDED:
            for other in (self.here / STEPS, self.here / SHARED, *self.here.glob("part-*/scan.[!j]*")):
                _remove_shared(other)

    @contextmanager
    def _aside(self) -> Iterator[Path]:
        """A folder of this process alone."""
        folder = self.here / "aside" / uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            remove(folder)

    @contextmanager
    def _fetching(self, name: str) -> Iterator[None]:
        path = self.here / "locks" / f"{crc32(name.encode()) % _LOCKS:03d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _remove_shared(path: Path) -> None:
    """Remove what other processes may be removing too."""
    with suppress(OSError):
        remove(path)


def _rename(aside: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.replace(path)
