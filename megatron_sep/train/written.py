"""What a run has written beside its checkpoints, read line by line; torch-free."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sep.files import parse_json

HISTORY = "history.jsonl"
"""What befell it, an event a line."""
METRICS = "metrics.jsonl"
"""Its numbers, of a step or a validation a line."""
SETTINGS = "config.yaml"
"""Every setting that it was started with last, resolved."""


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's history, in order; one that a kill cut off is left out."""
    path = run_dir / HISTORY
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "event" in value:
            found.append(value)
    return found


def consumed_before(run_dir: Path, step: int, batch: int) -> int:
    """Sequences that a run had read before a step of ``batch``: rollbacks and other batches have moved them on."""
    goes_on = [line for line in read_history(run_dir) if line["event"] in ("start", "resume", "rollback")]
    at, consumed = next(((line["step"], line["consumed"]) for line in reversed(goes_on) if line["step"] < step), (0, 0))
    return int(consumed) + (step - 1 - int(at)) * batch


def read_jsonl(path: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; one that is none, as a kill leaves the last one, is left out."""
    return metrics_lines(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")


def metrics_lines(text: str) -> list[dict[str, float]]:
    """The same of a part of such a file."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            values = parse_json(line)
            if isinstance(values, dict) and "step" in values and all(map(_is_number, values.values())):
                found.append(values)
    return found


def _is_number(value: Any) -> bool:
    """One that a float can be; a damaged line may have a thousand digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)
