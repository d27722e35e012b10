"""What a table or figure of the paper is to us, and what comes of making it anew."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_sep.errors import UserError

Kind = Literal["exact", "small", "needs 8B"]
"""exact: arithmetic, done in seconds. small: the same experiment on models that are trained here. needs 8B: it is about
weights that nobody can train on the way."""


class ReproduceError(UserError):
    """An item that is not there, or cannot be made of what is there."""


@dataclass(frozen=True)
class Inputs:
    """Where an item may look."""

    runs: Path | None = None
    """Folder with dirs of runs in it or below it."""
    checkpoints: tuple[Path, ...] = ()
    """Checkpoints, dirs of runs, or Hugging Face directories."""
    text: Path | None = None
    """A file, or a folder of *.txt, to feed to models."""
    tokens: int = 20_000
    """Of the text."""
    streams: int = 1
    """Parts of the text that tables 4 to 8 read side by side."""
    out: Path | None = None
    """Folder of the reports, where what is measured is kept until an item is written; None keeps nothing."""

    def folder(self, item: str) -> Path:
        """The folder of runs. Raises ReproduceError where none was given."""
        if self.runs is None:
            raise ReproduceError(f"{item}: reads what runs left; pass --runs DIR, the runs that {TRAIN} makes")
        return self.runs


TRAIN = "scripts/reproduce_runs.sh TOKENIZER.json TEXT"
"""What makes the runs that items look for."""


@dataclass(frozen=True)
class Row:
    """A number of ours beside the paper's."""

    name: str
    ours: float | None
    paper: float | None = None
    why: str = ""
    """What the difference comes from."""

    @property
    def difference(self) -> float | None:
        """ours - paper, where there are both."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclass(frozen=True)
class Table:
    """Numbers of one unit."""

    title: str
    """With the unit."""
    rows: tuple[Row, ...]
    digits: int = 2
    """Behind the point."""


@dataclass(frozen=True)
class Result:
    """Of an item that was made."""

    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences that stand below the tables."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """matplotlib figures by the name of their file, without a suffix."""


Make = Callable[[Inputs], Result]
"""What makes an item. Raises ReproduceError where it lacks what it needs."""


@dataclass(frozen=True)
class Item:
    """A table or figure of the paper."""

    name: str
    """As in `megatron_sep reproduce NAME`."""
    title: str
    kind: Kind
    needs: str
    """What it is made of, or the command that a user with the weights runs."""
    make: Make | None = None
    """None: this program does not make it; ``needs`` says what does."""
    rest: str = ""
    """What the paper's item has beyond that."""
