"""How far a long pass over files is: rate and time left, on a terminal as a bar, elsewhere as a line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

_LINE_SECONDS = 30.0


class Progress:
    """Bytes of the files read, as they lie on the disk."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._what, self._total = what, total
        self._bar = Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=total)
        self._begin: tuple[float, int] | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def update(self, done: int) -> None:
        """So many bytes are read now."""
        now = time.monotonic()
        self._begin = self._begin or (now, done)
        self._bar.update(self._task, completed=done)
        if self._bar.disable and now - self._printed > _LINE_SECONDS and done > self._begin[1]:
            self._printed = now
            rate = (done - self._begin[1]) / (now - self._begin[0])
            left = (self._total - done) / rate
            print(
                f"{self._what}: {done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {rate / 1e6:.2f} MB/s, "
                f"{left / 60:,.1f} minutes left",
                file=sys.stderr,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
