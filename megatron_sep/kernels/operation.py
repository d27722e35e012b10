"""An operation, its implementations, and which of them takes a call."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from megatron_sep.errors import UserError
from megatron_sep.kernels.call import Call


class BackendError(UserError):
    """An implementation was asked for by name and is unknown or cannot take the call, or none can."""


def never(_call: Call) -> bool:
    """For ``automatic``: nobody has measured it yet, or it is there to be compared with."""
    return False


def always(_call: Call) -> bool:
    """For ``automatic``: on every device."""
    return True


def on_cuda(call: Call) -> bool:
    """For ``automatic``: on CUDA alone."""
    return call.device == "cuda"


def biased_on_cuda(call: Call) -> bool:
    """For ``automatic``: on CUDA, for scores that fall with the distance; others have faster rows."""
    return call.device == "cuda" and call.biased


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation: a row of the table."""

    name: str
    target: str
    """``module:attribute``, imported when it is first chosen."""
    why_not: Callable[[Call], str | None]
    """Why it cannot take a call, in words; None if it can."""
    automatic: Callable[[Call], bool]
    """May ``auto`` take it, where nothing stands in the way?"""
    tests: str
    """The file that holds it to its reference, from the root of the repository."""
    benchmark: str
    """The program that times it, from the root of the repository."""
    reference: str = "reference"
    """The row of the same operation that says what is right."""

    def load(self) -> Any:
        """What ``target`` names."""
        module, attribute = self.target.split(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Operation:
    """An operation and its implementations, the fastest first."""

    name: str
    implementations: tuple[Implementation, ...]

    def resolve(self, call: Call, backend: str = "auto") -> Any:
        """What computes such calls, imported. Raises BackendError."""
        return self.choose(call, backend).load()

    def automatic(self, call: Call) -> Implementation | None:
        """The first row that takes such calls unasked, or None."""
        return next((row for row in self.implementations if row.automatic(call) and row.why_not(call) is None), None)

    def choose(self, call: Call, backend: str = "auto") -> Implementation:
        """The row of that name; with "auto" the first that can take the call, printed once. Raises BackendError."""
        first = self.automatic(call)
        if backend == "auto":
            if first is None:
                reasons = (f"{row.name}: {row.why_not(call) or 'only by name'}" for row in self.implementations)
                raise BackendError(f"{self.name}: nothing takes {call} by itself: {'; '.join(reasons)}")
            _announce(f"{self.name}: {first.name} on {call.device}")
            return first
        named = {row.name: row for row in self.implementations}
        if backend not in named:
            raise BackendError(f"{self.name}: backend {backend!r} is unknown; choose auto, {', '.join(named)}")
        reason = named[backend].why_not(call)
        if reason is not None:
            way_out = "" if first is None else f"; or choose auto, which takes {first.name!r}"
            raise BackendError(f"{self.name}: backend {backend!r} cannot run here: {reason}{way_out}")
        return named[backend]

    def with_rows(self, *rows: Implementation) -> "Operation":
        """The same operation with further implementations, which come last."""
        return replace(self, implementations=self.implementations + rows)


@contextmanager
def announced_afterwards() -> Iterator[None]:
    """What is announced meanwhile is printed at the end, of several the last: texts that grow have no such lines."""
    text = object()
    _growing.add(text)
    try:
        yield
    finally:
        _growing.discard(text)
        while _held and not _growing:
            print(_held.pop(0), file=sys.stderr)


def _announce(line: str) -> None:
    if line in _announced or os.environ.get("RANK", "0") != "0":
        return
    _announced.add(line)
    if _growing:
        _held.append(line)
    else:
        print(line, file=sys.stderr)


_announced: set[str] = set()
_held: list[str] = []
_growing: set[object] = set()
"""Texts that are being shown."""
