"""What a run is asked for while it trains: by signals, and by files that appear in its dir."""

import time
from contextlib import suppress
from pathlib import Path

from megatron_sep.parallel.flags import Flag
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.signals import Signals

_FILES = {Flag.SAVE: "save", Flag.STOP: "stop"}
_LOOK_SECONDS = 0.5
"""Between two looks for the files: a disk that is far away should not slow the steps down."""


class Requests:
    """`touch RUN/save` asks for a checkpoint, `touch RUN/stop`, SIGTERM and SIGUSR1 for one and the end of the run."""

    def __init__(self, run_dir: Path, topology: Topology, signals: Signals) -> None:
        self._files = {flag: run_dir / name for flag, name in _FILES.items()}
        self._topology, self._signals = topology, signals
        self._next_look = 0.0
        self._answered: frozenset[Flag] = frozenset()
        self._why = "asked to by another process"

    @property
    def why(self) -> str:
        """By what the run was asked to stop, as far as this process knows."""
        return self._why

    @property
    def can_finish(self) -> bool:
        """Is there a step to finish when a signal comes? Else the process ends at once."""
        return self._signals.can_finish

    @can_finish.setter
    def can_finish(self, yes: bool) -> None:
        self._signals.can_finish = yes

    def look(self) -> None:
        """Raise this process's flags for what it was asked for; the first process looks for the files."""
        if self._signals.stop is not None:
            self._ask(Flag.STOP, self._signals.stop.name)
        if self._topology.first and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            for flag, path in self._files.items():
                if path.exists():
                    self._ask(flag, str(path))

    def among(self, heard: frozenset[Flag]) -> frozenset[Flag]:
        """What is asked for, of what was heard of a step ago, without what was answered then."""
        asked, self._answered = heard & _FILES.keys() - self._answered, frozenset()
        return asked

    def answered(self, flag: Flag) -> None:
        """What was asked for is done: the file goes, and the same may be asked for again. Every rank calls it."""
        if self._topology.first:
            with suppress(OSError):
                self._files[flag].unlink()
        self._topology.flags.set(flag, False)
        if self._topology.process.size > 1:  # all will hear once more what is lowered now
            self._answered |= {flag}

    def _ask(self, flag: Flag, by: str) -> None:
        self._topology.flags.set(flag, True)
        if flag is Flag.STOP:
            self._why = by
