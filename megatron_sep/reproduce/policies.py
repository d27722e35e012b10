"""Tables 9, 15 and 17: baselines at an equal measured share of the keys, as tools/compare_policies.py measures them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sep.files import parse_json
from megatron_sep.reproduce.item import Inputs, Make, ReproduceError, Result, Row, Table
from megatron_sep.reproduce.runs import check_weights
from megatron_sep.weights.identity import WEIGHTS

MEASURE = "python tools/compare_policies.py CHECKPOINT --books DIR --out DIR/policies.json"
"""What makes the files."""
FULL, SEP = "full", "SepLLM, n="
_TASK = "perplexity of books here, accuracy of a task there"


@dataclass(frozen=True)
class Measured:
    """One policy on one checkpoint."""

    name: str
    share: float
    """Of the keys, as measured."""
    perplexity: float
    above_full: float
    """Loss above that of everything kept, nats per token."""


def read(folder: Path) -> dict[str, tuple[Measured, ...]]:
    """By checkpoint, from every policies.json in the folder or below it. Raises ReproduceError.

    One that lies in the dir of its own run is held against the weights of that run.
    """
    found: dict[str, tuple[Measured, ...]] = {}
    for path in sorted(folder.rglob("policies.json")):
        try:
            entries = parse_json(path.read_text(encoding="utf-8"))
            found |= {str(entry["checkpoint"]): tuple(_measured(entry)) for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ReproduceError(f"{path}: is no file of tools/compare_policies.py: {error!r}") from error
        for entry in entries:
            if path.parent.name in Path(str(entry["checkpoint"])).parts:
                check_weights(path, entry.get(WEIGHTS), MEASURE)
    if not found:
        raise ReproduceError(f"--runs {folder}: no policies.json in it or below it; `{MEASURE}` makes one")
    return found


def _measured(entry: dict[str, Any]) -> list[Measured]:
    rows = {name: row for name, row in entry.items() if isinstance(row, dict)}
    return [Measured(name, row["share"], row["perplexity"], row["above_full"]) for name, row in rows.items()]


def compared(*wanted: str, arithmetic: Make | None = None) -> Make:
    """Makes a table of the policies whose names begin with these, beside SepLLM and full attention.

    ``arithmetic``: what the item has without a run; alone where no folder is given.
    """

    def make(inputs: Inputs) -> Result:
        exact = Result() if arithmetic is None else arithmetic(inputs)
        if arithmetic is not None and inputs.runs is None:
            return exact
        tables = tuple(
            table
            for checkpoint, measured in read(inputs.folder("its policies")).items()
            for table in _tables(checkpoint, [m for m in measured if m.name.startswith((FULL, SEP, *wanted))])
        )
        return replace(exact, tables=(*exact.tables, *tables), notes=(*exact.notes, f"Measured by `{MEASURE}`."))

    return make


def _tables(checkpoint: str, measured: list[Measured]) -> tuple[Table, ...]:
    shares = tuple(Row(m.name, 100 * m.share, None, "equal by search") for m in measured if m.name != FULL)
    above = tuple(Row(m.name, m.above_full, None, _TASK) for m in measured if m.name != FULL)
    return (
        Table(f"{checkpoint}: share of the keys that is kept (%)", shares),
        Table(f"{checkpoint}: loss above full attention (nats per token)", above, 4),
    )
