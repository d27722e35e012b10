"""How far a long measurement is, and how long it still takes: a line now and then."""

import sys
import time


class Progress:
    """Says on standard error how much of ``total`` is done, at most every ``seconds``; what was kept is not timed."""

    def __init__(self, what: str, total: int, seconds: float = 10.0) -> None:
        self._what, self._total, self._seconds = what, total, seconds
        self._begun: tuple[float, int] | None = None
        self._told = time.monotonic()

    def update(self, done: int, *, kept: bool = False) -> None:
        """So much is done now; ``kept``: it was done already by an evaluation that was killed."""
        now = time.monotonic()
        if kept or self._begun is None:
            self._begun = (now, done)
        if now - self._told < self._seconds or done == self._begun[1]:
            return
        self._told = now
        rate = (done - self._begun[1]) / (now - self._begun[0])
        minutes = (self._total - done) / rate / 60
        line = f"{self._what}: {done:,} of {self._total:,}, {rate:,.1f} a second, {minutes:,.1f} minutes left"
        print(line, file=sys.stderr, flush=True)
