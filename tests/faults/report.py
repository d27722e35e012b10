"""What a run of the faults found, as JSON and as the table of docs/reliability.md."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean, median

from faults.case import Fault
from faults.server import Result, processor_seconds


@dataclass(frozen=True)
class Row:
    """One class of faults."""

    name: str
    what: str
    how: str
    expected: str
    trials: int
    survived: int
    wrong: int
    detect: float | None
    """Median of the trials, in seconds."""
    recover: float | None
    processor: float
    """Mean of the trials, in seconds."""


@dataclass(frozen=True)
class Record:
    """One run of all or some of them."""

    date: str
    full: bool
    machine: str
    rows: list[Row]
    seconds: float
    processor_seconds: float
    """Of all processes together."""
    import_seconds: float
    """Spent once before the first trial; times to detect and recover do not hold them."""


def record(
    faults: Sequence[Fault], results: Sequence[Result], full: bool, import_seconds: float, seconds: float
) -> Record:
    """Put the trials together, one row a fault."""
    rows = [_row(fault, [result for result in results if result.fault == fault.name]) for fault in faults]
    machine = f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[1]:.0f}, Python {platform.python_version()}"
    return Record(
        f"{datetime.now(UTC):%Y-%m-%d}",
        full,
        machine,
        rows,
        round(seconds),
        round(processor_seconds()),
        round(import_seconds),
    )


def _row(fault: Fault, results: Sequence[Result]) -> Row:
    detect = [result.detect for result in results if result.detect is not None]
    recover = [result.recover for result in results if result.recover is not None]
    return Row(
        fault.name,
        fault.what,
        fault.how,
        fault.expected,
        len(results),
        sum(result.survived for result in results),
        sum(result.wrong for result in results),
        round(median(detect), 2) if detect else None,
        round(median(recover), 2) if recover else None,
        round(mean(result.processor for result in results), 1) if results else 0.0,
    )


def said(found: Record) -> str:
    """A line a fault, and the sums."""
    rows = [
        f"{row.name:4} {row.what:45} {row.survived:4} of {row.trials:4} survived, {row.wrong} wrong, detected "
        f"{_seconds(row.detect)}, recovered {_seconds(row.recover)}, {row.processor} s of processors a trial"
        for row in found.rows
    ]
    trials, survived, wrong = (
        sum(getattr(row, name) for row in found.rows) for name in ("trials", "survived", "wrong")
    )
    return "\n".join(
        [
            *rows,
            f"{survived} of {trials} trials survived, {wrong} wrong; {found.seconds} s, {found.processor_seconds} s of "
            f"processors, {found.import_seconds} s of imports; {found.machine}",
        ]
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
