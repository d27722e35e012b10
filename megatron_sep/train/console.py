"""The console of a run: a status line below the other on a pipe or in a file, one live line on a terminal."""

import atexit
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sep.train.figures import count, duration

Values = Mapping[str, float]
_BAR = 24
"""Characters."""
_REFRESH_SECONDS = 0.1
"""At least between two pictures of the live line."""


def make_console(kind: str, start: int, steps: int) -> "Console | LiveConsole":
    """For a run of so many steps that begins after ``start``. ``kind``: "lines", or "auto": live on a terminal."""
    can_go_back = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return LiveConsole(start, steps) if kind == "auto" and can_go_back else Console(steps)


class Console:
    """``step 120/1430  loss 3.214  lr 6.0e-04  |g| 0.91  118k tok/s  visible 18.3%  eta 2h11m``"""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def log(self, step: int, values: Values) -> None:
        print("  ".join([f"step {step}/{self.steps}", *figures(values)]), flush=True)

    def close(self) -> None:
        pass


class LiveConsole:
    """One line that changes: how far the run is, and the newest numbers of training.

    Validations and saves stand above it, and whatever else is printed while it is there.
    """

    def __init__(self, start: int, steps: int, file: Any = None) -> None:
        """``file``: a terminal; None: standard output."""
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.table import Column

        class Visible(Terminal):
            """Leaves the cursor as it is: a process that is killed could not bring it back."""

            def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
                return False

        self.steps, self._drawn = steps, 0.0
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(_BAR),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=Visible(file=file, highlight=False, markup=False),
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, figures="")
        self._progress.start()
        atexit.register(self.close)

    def stepped(self, step: int) -> None:
        """Between two lines of numbers the bar goes on."""
        now = time.monotonic()
        self._progress.update(self._task, completed=step, refresh=now - self._drawn >= _REFRESH_SECONDS)
        if now - self._drawn >= _REFRESH_SECONDS:
            self._drawn = now

    def rewind(self, step: int) -> None:
        """The run went back to that step."""
        self._progress.update(self._task, completed=step, refresh=True)

    def log(self, step: int, values: Values) -> None:
        if "train/loss" in values:
            self._progress.update(self._task, completed=step, figures="  ".join(figures(values)), refresh=True)
        elif values:
            self._progress.console.print("  ".join([f"step {step}/{self.steps}", *figures(values)]), soft_wrap=True)

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()
        atexit.unregister(self.close)


def figures(values: Values) -> list[str]:
    """What the console shows of a step, in its order."""
    return [form(values[name]) for name, form in _SHOWN.items() if name in values]


_SHOWN: dict[str, Callable[[float], str]] = {
    "train/loss": lambda v: f"loss {v:.3f}",
    "valid/loss": lambda v: f"validation loss {v:.3f}",
    "valid/perplexity": lambda v: f"perplexity {v:.2f}",
    "train/lr": lambda v: f"lr {v:.1e}",
    "train/grad_norm": lambda v: f"|g| {v:.2f}",
    "speed/tokens_per_second": lambda v: f"{count(v)} tok/s",
    "speed/mfu": lambda v: f"{100 * v:.1f}% mfu",
    "memory/peak_gib": lambda v: f"{v:.1f} GiB",
    "attention/visible": lambda v: f"visible {100 * v:.1f}%",
    "speed/seconds_left": lambda v: f"eta {duration(v)}",
    "attention/mass/sep/separators": lambda v: f"separators get {v:.1%} of the attention in Sep layers",
    "attention/mass/full/separators": lambda v: f"separators get {v:.1%} in full layers",
    "time/validation": lambda v: f"validated in {v:.1f}s",
    "time/save": lambda v: f"stood {v:.1f}s to save",
    "time/save_whole": lambda v: f"saved in {v:.1f}s",
}
"""What the console shows of a step, in this order."""
