"""A fault, a trial of it, and what a trial finds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from faults.world import World


class WrongError(Exception):
    """What must never be: a run that went on as another one would, or damage that was taken for good."""


@dataclass(frozen=True)
class Times:
    """Of one trial, in seconds; None where there is nothing to detect or to recover from."""

    detect: float | None = None
    """From the start of the command that meets the fault to its message."""
    recover: float | None = None
    """From the restart to the first step of training after it."""


@dataclass(frozen=True)
class Trial:
    """One injection of a fault: its number decides everything about it."""

    fault: str
    number: int
    folder: Path
    """Empty, and of this trial alone."""
    world: World

    @cached_property
    def random(self) -> Random:
        """Seeded by the fault and the number."""
        return Random(f"{self.fault}-{self.number}")


@dataclass(frozen=True)
class Fault:
    """A class of faults: how one is injected, how often, and what is expected of it.

    ``run`` returns where what is expected came to pass, raises WrongError for what must never be, and anything else
    where the fault was not survived.
    """

    name: str
    """Its number in the table."""
    what: str
    how: str
    expected: str
    fast: int
    full: int
    run: Callable[[Trial], Times]


def expect(holds: bool, otherwise: object) -> None:
    """Raise AssertionError with what was found where something that is expected does not hold."""
    if not holds:
        raise AssertionError(str(otherwise))
