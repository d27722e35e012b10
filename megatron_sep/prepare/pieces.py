"""A ledger in an object store: what is appended becomes files that never change, which a state lists.

A state counts when it is written, whole; the files that it lists were there before it and are nobody else's, since
each opening of a ledger names its own. Two processes at the same part, of which one was taken for dead, therefore write
states either of which is right, and what they list has the same bytes.
"""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from megatron_sep.prepare.objects import Objects

_SECONDS = 60.0
_BYTES = 1 << 25
"""Appended, from which on a commit is due; they wait in memory until then."""


class PieceLedger:
    """What ``Ledger`` is. A kill costs the work since the last commit, a minute of it at most, and nothing else."""

    def __init__(self, objects: Objects, stem: str, files: tuple[str, ...], start: Mapping[str, Any]) -> None:
        """``stem`` is the folder and the stage, as part-00003/scan."""
        self._objects, self._stem, self._files, self._start = objects, stem, files, dict(start)

    def __enter__(self) -> Self:
        state = committed(self._objects, self._stem) or {}
        self.value: dict[str, Any] = state.get("value", self._start)
        self.done: bool = state.get("done", False)
        self._pieces: dict[str, list[str]] = state.get("pieces", {name: [] for name in self._files})
        self._waiting = {name: bytearray() for name in self._files}
        self._opened, self._count, self._last = uuid4().hex[:12], 0, time.monotonic()
        return self

    def append(self, name: str, data: bytes) -> None:
        """Add to a file; it counts from the next ``commit`` on."""
        self._waiting[name] += data

    def commit(self, *, done: bool = False) -> None:
        """Make what was appended and ``value`` count, in the store."""
        for name, data in self._waiting.items():
            if data:
                piece = f"{self._stem}.{name}.{self._opened}-{self._count}"
                self._objects.write(piece, bytes(data))
                self._pieces[name].append(piece)
                data.clear()
        self._count += 1
        state = {"done": done, "value": self.value, "pieces": self._pieces}
        self._objects.write_json(f"{self._stem}{'' if done else '.begun'}.json", state)
        self.done, self._last = done, time.monotonic()

    def commit_sometimes(self) -> None:
        """Commit where the last time is a minute ago, or much waits."""
        if time.monotonic() - self._last > _SECONDS or sum(map(len, self._waiting.values())) > _BYTES:
            self.commit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def committed(objects: Objects, stem: str) -> dict[str, Any] | None:
    """A ledger's state; that it is done has a name of its own, which one that is not done never takes back."""
    return objects.read_json(f"{stem}.json") or objects.read_json(f"{stem}.begun.json")
