"""What the stages hand to each other, by name: on a disk that all see, or in an object store (remote_work.py)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from megatron_sep.files import read_json, remove
from megatron_sep.prepare.ledger import Ledger
from megatron_sep.prepare.work_folder import locked, part_lock

COPIED = 1 << 24
"""Bytes that are copied at once."""
DECIDED = "drops"
"""The file of what is decided: a byte a record of all parts."""
STEPS, SHARED = "near", "shared"
"""Folders of the search for duplicates, in each one of every try: what its steps need, and what they are for."""


class Growing(Protocol):
    """What ``Ledger`` is, wherever it lies."""

    value: dict[str, Any]
    done: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def append(self, name: str, data: bytes) -> None:
        """Add to a file; it counts from the next commit on."""
        ...

    def commit(self, *, done: bool = False) -> None:
        """Make what was appended and ``value`` count."""
        ...

    def commit_sometimes(self) -> None:
        """Commit where the last time is long ago."""
        ...


class Work(Protocol):
    """Files by name, as part-00003/scan.digests, and the ledgers of parts that some of them grow in."""

    @property
    def name(self) -> str:
        """Of this work among those that may have left something in the same folder; empty: there are no others."""
        ...

    @property
    def is_shared_disk(self) -> bool:
        """Whether every process that works sees every path of every other."""
        ...

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        ...

    def get(self, name: str) -> Path:
        """Where it can be mapped on this machine."""
        ...

    def get_all(self, names: Iterable[str]) -> list[Path]:
        """``get`` of some."""
        ...

    def made(self, name: str) -> AbstractContextManager[Path]:
        """Where to write a file, whole or not at all; after the block it is there, with those beside it as NAME.npy."""
        ...

    def remove(self, name: str) -> None:
        """Remove a folder with all in it, if it is there."""
        ...

    def ledger(self, part: int, stage: str, files: tuple[str, ...], start: Mapping[str, Any]) -> Growing:
        """Of a stage of a part; its files are there by name when it is done."""
        ...

    def state(self, part: int, stage: str) -> dict[str, Any] | None:
        """``done`` and ``value`` of a ledger as committed; None where nothing was."""
        ...

    def pieces(self, name: str) -> Iterator[bytes]:
        """A file of a ledger from its beginning."""
        ...

    def path(self, name: str, /) -> Path | None:
        """The file itself, where it lies on this disk as one."""
        ...

    def joined(self, name: str, /) -> None:
        """Say that a file was joined with others and is needed here no more."""
        ...

    def part_locked(self, part: int, /) -> AbstractContextManager[None]:
        """Wait until nobody else works on a part, where two would harm each other."""
        ...


def part_name(part: int) -> str:
    """Of the folder of what a part has made."""
    return f"part-{part:05d}"


@dataclass(frozen=True)
class FolderWork:
    """A folder on a disk that all who work on it see."""

    folder: Path
    name: ClassVar[str] = ""
    is_shared_disk: ClassVar[bool] = True

    def has(self, name: str) -> bool:
        """As ``Work`` says."""
        return (self.folder / name).exists()

    def get(self, name: str) -> Path:
        """As ``Work`` says."""
        return self.folder / name

    def get_all(self, names: Iterable[str]) -> list[Path]:
        """As ``Work`` says."""
        return [self.folder / name for name in names]

    @contextmanager
    def made(self, name: str) -> Iterator[Path]:
        """The path itself."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path

    def remove(self, name: str) -> None:
        """As ``Work`` says."""
        remove(self.folder / name)

    def ledger(self, part: int, stage: str, files: tuple[str, ...], start: Mapping[str, Any]) -> Growing:
        """As ``Work`` says."""
        return Ledger(self.folder / part_name(part), stage, files, start)

    def state(self, part: int, stage: str) -> dict[str, Any] | None:
        """As ``Work`` says."""
        path = self.folder / part_name(part) / f"{stage}.json"
        found: dict[str, Any] | None = read_json(path) if path.exists() else None
        return found

    def pieces(self, name: str) -> Iterator[bytes]:
        """As ``Work`` says."""
        with (self.folder / name).open("rb") as file:
            while piece := file.read(COPIED):
                yield piece

    def path(self, name: str) -> Path | None:
        """As ``Work`` says."""
        return self.folder / name

    def joined(self, name: str) -> None:
        """Free its disk."""
        (self.folder / name).unlink()

    def part_locked(self, part: int) -> AbstractContextManager[None]:
        """As ``Work`` says."""
        return locked(part_lock(self.folder, part), wait=True)
