"""The verbs of the command line in forked processes: as `python -m megatron_sep` runs them, with the imports done."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from support.forked import NOTHING, become


@dataclass(frozen=True)
class Ended:
    """How a verb ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    text: str
    """Standard output and standard error, as they came."""
    seconds: float

    @property
    def message(self) -> str:
        """What a failure ends with, from "error: " on; empty where there is none, or a traceback."""
        begins = f"\n{self.text}".find("\nerror: ")
        return self.text[begins:] if begins >= 0 and "Traceback" not in self.text else ""


class Verb:
    """A verb that runs in a process of its own, in a session of its own."""

    def __init__(
        self, log: Path, *words: object, before: Callable[[], None] | None = None, env: Mapping[str, str] = NOTHING
    ) -> None:
        """``before`` is called in the new process before the verb: the place for a fault."""
        self._log, self._began = log, time.monotonic()
        log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            _become([str(word) for word in words], log, before, env)

    def send(self, number: int) -> None:
        """A signal to this process alone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def running(self) -> bool:
        """Is it still there?"""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def text(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = 240) -> Ended:
        """Wait for its end; what it started ends with it. Raises TimeoutError, with its last words."""
        limit = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > limit:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"runs for {seconds:.0f} s: {self.text()[-300:]}")
            time.sleep(0.005)
        took = time.monotonic() - self._began
        status = os.waitpid(self.pid, 0)[1]
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return Ended(os.waitstatus_to_exitcode(status), self.text(), took)


def call(log: Path, *words: object, before: Callable[[], None] | None = None) -> Ended:
    """Run a verb to its end."""
    return Verb(log, *words, before=before).wait()


def _become(words: list[str], log: Path, before: Callable[[], None] | None, env: Mapping[str, str]) -> None:
    """Turn this forked process into a verb; does not return."""

    def act() -> None:
        from megatron_sep.cli import main

        if before is not None:
            before()
        sys.argv = ["megatron_sep", *words]
        main()

    become(act, log, log, env)
