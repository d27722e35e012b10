"""How far a long pass over files is: rate and time left, on a terminal as a bar, elsewhere as a line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

_LINE_SECONDS = 30.0


class Progress:
    """Bytes of the files read, as they lie on the disk, and documents; or steps of another ``unit``."""

    def __init__(self, what: str, total: int, unit: str = "MB") -> None:
        from rich import progress
        from rich.console import Console

        console, text = Console(stderr=True), progress.TextColumn
        columns = (text("{task.description}"), progress.BarColumn(), text("{task.fields[state]}"))
        self._what, self._total, self._unit = what, total, unit
        self._scale = 1e6 if unit == "MB" else 1
        self._bar = progress.Progress(
            *columns, progress.TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task(what, total=total, state="")
        self._begin: tuple[float, int] | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def update(self, done: int, documents: int | None = None) -> None:
        """So many bytes, or steps, and documents are done now."""
        now = time.monotonic()
        self._begin = self._begin or (now, done)
        rate = (done - self._begin[1]) / max(now - self._begin[0], 1e-9)
        state = f"{done / self._scale:,.1f} of {self._total / self._scale:,.1f} {self._unit}"
        state += f", {rate / self._scale:.2f} {self._unit}/s"
        state += "" if documents is None else f", {documents:,} documents"
        self._bar.update(self._task, completed=done, state=state)
        if self._bar.disable and now - self._printed > _LINE_SECONDS and rate:
            self._printed = now
            left = (self._total - done) / rate
            print(f"{self._what}: {state}, {left / 60:,.1f} minutes left", file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
