"""Work that goes on where it was killed: files that only grow, and a state that says how much of them counts."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_sep.files import write_json

_SECONDS = 2.0


class Ledger:
    """Append-only files of one stage with its position and counts.

    ``commit`` makes everything appended so far count; what was appended after the last commit is cut off when the
    ledger is opened again. A kill at any point therefore costs the work since the last commit and nothing else.
    """

    def __init__(self, folder: Path, stage: str, files: tuple[str, ...], start: Mapping[str, Any]) -> None:
        self._state_path = folder / f"{stage}.json"
        self._paths = {name: folder / f"{stage}.{name}" for name in files}
        self._start = dict(start)

    def __enter__(self) -> Self:
        self._state_path.parent.mkdir(exist_ok=True)
        state = json.loads(self._state_path.read_text()) if self._state_path.exists() else {}
        self.value: dict[str, Any] = state.get("value", self._start)
        self.done: bool = state.get("done", False)
        sizes = state.get("sizes", dict.fromkeys(self._paths, 0))
        for path in self._paths.values():
            path.touch()
        self._files = {name: path.open("r+b") for name, path in self._paths.items()}
        for name, file in self._files.items():
            file.truncate(sizes[name])
            file.seek(sizes[name])
        self._last = time.monotonic()
        return self

    def path(self, name: str) -> Path:
        """The file that ``append`` writes to."""
        return self._paths[name]

    def append(self, name: str, data: bytes) -> None:
        """Add to a file; it counts from the next ``commit`` on."""
        self._files[name].write(data)

    def commit(self, *, done: bool = False) -> None:
        """Make what was appended and ``value`` count, on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        write_json(self._state_path, {"done": done, "sizes": sizes, "value": self.value})
        self.done, self._last = done, time.monotonic()

    def commit_sometimes(self) -> None:
        """Commit where the last time is two seconds ago."""
        if time.monotonic() - self._last > _SECONDS:
            self.commit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
