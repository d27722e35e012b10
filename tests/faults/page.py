"""The table of docs/reliability.md, written from the result that lies beside it."""

import json
from pathlib import Path
from typing import Any

_BEGIN, _END = "<!-- the table begins: scripts/faults.sh writes it -->", "<!-- the table ends -->"


class PageError(Exception):
    """A page that has no place for the table."""


def update(page: Path, record: dict[str, Any]) -> str:
    """Put a run of all faults into the page, with its result in JSON beside it; what was done, in words.

    The table of a full run is not replaced by that of a smaller one. Raises PageError.
    """
    result = page.with_suffix(".json")
    if not record["full"] and result.is_file() and json.loads(result.read_text())["full"]:
        return f"{page}: keeps the table of a full run"
    before, begin, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise PageError(f"{page}: has no lines {_BEGIN!r} and {_END!r}")
    page.write_text(f"{before}{_BEGIN}\n\n{table(record)}\n\n{_END}{after}", encoding="utf-8")
    result.write_text(json.dumps(record, indent=1) + "\n")
    return f"wrote {page} and {result}"


def table(record: dict[str, Any]) -> str:
    """Markdown of a result: a row a fault, and what the run was."""
    rows = record["rows"]
    trials, survived, wrong = (sum(row[name] for row in rows) for name in ("trials", "survived", "wrong"))
    head = ["| | fault | how it is injected | expected | trials | survived | wrong | detect | recover |"]
    head.append("|---|---|---|---|---:|---:|---:|---:|---:|")
    cells = ("name", "what", "how", "expected", "trials", "survived", "wrong")
    body = [
        f"| {' | '.join(str(row[name]) for name in cells)} | {_seconds(row['detect'])} | {_seconds(row['recover'])} |"
        for row in rows
    ]
    kind = "--full" if record["full"] else "without --full"
    run = (
        f"{record['date']}, `./scripts/faults.sh` {kind}, {record['machine']}: {trials} trials, {survived} survived, "
        f"{wrong} wrong; {record['seconds']} s, {record['processor_seconds']} s of processors."
    )
    return "\n".join([*head, *body, "", run])


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
