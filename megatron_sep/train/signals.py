"""The signals that ask a process to end, heard even while it waits inside a library."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from megatron_sep.errors import InterruptedRunError, StoppedError

_STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_SAME_SECONDS = 1.0
"""A scheduler and a launcher often pass on the same signal; what follows within this time is one with the first."""


class Signals:
    """What has been received since the process began to listen."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        """The first signal that asked to stop."""
        self.can_finish = False
        """Is there a step to finish and to save? Before that, a signal ends the process at once."""
        self._times: dict[bool, float] = {}

    def received(self, number: int) -> None:
        """Called by the thread that listens, whatever the main thread does."""
        stopping = number in _STOPPING
        if not stopping and number != signal.SIGINT:
            return
        first = self._times.setdefault(stopping, time.monotonic())
        again = time.monotonic() - first > _SAME_SECONDS
        if stopping and self.stop is None:
            self.stop = signal.Signals(number)
        if again or (stopping and not self.can_finish):
            self._end(number, StoppedError.exit_code if stopping else InterruptedRunError.exit_code)

    def _end(self, number: int, code: int) -> None:
        what = "ended at once; what is saved stays as it is, and the same command goes on from there"
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: {what}\n".encode())
        os._exit(code)


@contextmanager
def heard_signals() -> Iterator[Signals]:
    """Within it SIGTERM and SIGUSR1 are noted, and a second one ends the process at once, as a second SIGINT does.

    Only in the main thread. Processes that are forked within it do not listen.
    """
    signals = Signals()
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, _noted) for number in _STOPPING}
    for number in _STOPPING:
        signal.siginterrupt(number, False)
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(read, signals), name="signals", daemon=True)
    listener.start()
    _listening.append(write)
    try:
        yield signals
    finally:
        _listening.remove(write)
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        listener.join()
        os.close(read)


def _listen(read: int, signals: Signals) -> None:
    while number := os.read(read, 1):
        signals.received(number[0])


def _noted(_: int, __: FrameType | None) -> None:
    """The thread is told by the interpreter itself, as soon as the signal arrives."""


_listening: list[int] = []


def _deaf_child() -> None:
    """A forked process would tell its parent's thread of signals of its own."""
    if _listening:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in _STOPPING:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_deaf_child)
