"""Faults inside a verb's process: put in place before the verb runs, they strike at the n-th call of a function."""

import importlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

Strike = Callable[[], None]


@dataclass(frozen=True)
class Point:
    """A moment in a verb: just before or after a function is called."""

    where: str
    """`module:name`, or `module:Class.name`."""
    after: bool = False


def at(point: Point, nth: int, strike: Strike) -> Strike:
    """What puts ``strike`` at the ``nth`` call of a function, from 1, in whatever process or thread makes it."""

    def put() -> None:
        owner, name = _owner(point.where)
        original, left = getattr(owner, name), [nth]

        @wraps(original)
        def struck(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not point.after:
                strike()
            value = original(*arguments, **more)
            if left[0] == 0 and point.after:
                strike()
            return value

        setattr(owner, name, struck)

    return put


def around(where: str, change: Callable[..., Any]) -> Strike:
    """What makes every call of a function ``change(original, *its arguments)``."""

    def put() -> None:
        owner, name = _owner(where)
        original = getattr(owner, name)

        @wraps(original)
        def changed(*arguments: Any, **more: Any) -> Any:
            return change(original, *arguments, **more)

        setattr(owner, name, changed)

    return put


def kill(wait: float = 0.0) -> Strike:
    """SIGKILL for the verb, ``wait`` seconds later, whichever of its processes comes to the point."""

    def strike() -> None:
        verb = os.getpgrp()  # a verb leads a session of its own
        if wait == 0:
            os.kill(verb, signal.SIGKILL)
            time.sleep(60)
        elif os.fork() == 0:
            time.sleep(wait)
            os.kill(verb, signal.SIGKILL)
            os._exit(0)

    return strike


def _owner(where: str) -> tuple[Any, str]:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name
