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


def update_rows(page: Path, record: dict[str, Any]) -> str:
    """Put a full run of some faults in the place of their rows, and say under the table when and where it was.

    Raises PageError where no full run of all stands there.
    """
    result = page.with_suffix(".json")
    whole = json.loads(result.read_text()) if result.is_file() else {}
    if not record["full"] or not whole.get("full"):
        raise PageError(f"{page}: rows are replaced in the table of a full run, by those of another; pass --full")
    again = {row["name"]: row for row in record["rows"]}
    earlier = [
        {**run, "faults": [name for name in run["faults"] if name not in again]} for run in whole.get("again", [])
    ]
    about = {key: record[key] for key in ("date", "machine", "seconds", "processor_seconds")}
    rows = [again.get(row["name"], row) for row in whole["rows"]]
    runs = [run for run in earlier if run["faults"]] + [{"faults": list(again), **about}]
    return update(page, {**whole, "rows": rows, "again": runs})


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
    whole = (
        f"{record['date']}, `./scripts/faults.sh` {kind}, {record['machine']}: {trials} trials, {survived} survived, "
        f"{wrong} wrong; {record['seconds']} s, {record['processor_seconds']} s of processors."
    )
    again = [
        f"\n{', '.join(run['faults'])} again on {run['date']}, `./scripts/faults.sh` --full --only "
        f"{','.join(run['faults'])}, {run['machine']}; {run['seconds']} s, {run['processor_seconds']} s of processors."
        for run in record.get("again", ())
    ]
    return "\n".join([*head, *body, "", whole, *again])


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
