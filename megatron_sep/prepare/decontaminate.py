"""Which documents contain text of a test set: they share a run of words with it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from megatron_sep.files import written_aside
from megatron_sep.prepare.shingles import Hashes, plain_words, run_text, runs
from megatron_sep.prepare.text import BadRecordError, Limits, TextError, format_of, read_records, text_of


@dataclass(frozen=True)
class Contamination:
    """What a document shares with the test sets."""

    matches: int
    """Runs of it that stand in a test set."""
    words: str
    """The first of them."""
    test: str
    """File and line where that stands."""


class TestRuns:
    """Every run of words of the test sets, hashed and sorted: 12 bytes a run."""

    __test__ = False  # no test class, whatever pytest makes of the name
    FILES: ClassVar[tuple[str, ...]] = ("test_hashes.npy", "test_origin.npy", "test_places.json")
    """What ``save`` writes, the last one last."""

    def __init__(self, words: int, hashes: Hashes, origin: npt.NDArray[np.int32], places: Sequence[str]) -> None:
        self.words, self._hashes, self._origin, self._places = words, hashes, origin, places

    @classmethod
    def build(cls, paths: Sequence[Path], fields: Sequence[str], words: int, limits: Limits) -> "TestRuns":
        """Read the test sets. Raises TextError for what cannot be read, whatever the policy for the sources."""
        hashes: list[Hashes] = [np.empty(0, np.uint64)]
        origin: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
        places: list[str] = []
        for place, text in _test_texts(paths, fields, limits):
            found = runs(plain_words(text), words)
            hashes.append(found)
            origin.append(np.full(len(found), len(places), np.int32))
            places.append(place)
        unique, first = np.unique(np.concatenate(hashes), return_index=True)
        return cls(words, unique, np.concatenate(origin)[first], places)

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, text: str) -> Contamination | None:
        """What ``text`` shares with the test sets."""
        if not len(self):
            return None
        plain = plain_words(text)
        found = runs(plain, self.words)
        place = np.minimum(np.searchsorted(self._hashes, found), len(self) - 1)
        matches = np.flatnonzero(self._hashes[place] == found)
        if not matches.size:
            return None
        first = int(matches[0])
        test = self._places[int(self._origin[place[first]])]
        return Contamination(int(matches.size), run_text(plain, self.words, first), test)

    def save(self, folder: Path) -> None:
        """Write what ``load`` reads, for the workers to map."""
        np.save(folder / "test_hashes.npy", self._hashes, allow_pickle=False)
        np.save(folder / "test_origin.npy", self._origin, allow_pickle=False)
        with written_aside(folder / "test_places.json") as aside:
            aside.write_text(json.dumps([self.words, list(self._places)]))

    @classmethod
    def load(cls, folder: Path) -> "TestRuns":
        """What ``save`` wrote, mapped."""
        words, places = json.loads((folder / "test_places.json").read_text())
        hashes, origin = (np.load(folder / f"test_{name}.npy", mmap_mode="r") for name in ("hashes", "origin"))
        return cls(words, hashes, origin, places)


def report_line(place: str, found: Contamination) -> bytes:
    """One line of the report, JSON."""
    value: dict[str, Any] = {
        "document": place,
        "matches": found.matches,
        "words": found.words,
        "test": found.test,
    }
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _test_texts(paths: Sequence[Path], fields: Sequence[str], limits: Limits) -> Iterator[tuple[str, str]]:
    """Place and text of each field of each record of the test sets."""
    for path in paths:
        keys = list(fields) if format_of(path) in (".jsonl", ".json") else [fields[0]]
        for record in read_records(path, replace(limits, field=keys[0])):
            texts, faults = [], []
            for key in keys:
                try:
                    texts.append(text_of(record, replace(limits, field=key)))
                except BadRecordError as error:
                    faults.append(error)
            if not texts:
                raise TextError(
                    f"{path}, line {record.line}: {faults[0]}; decontaminate.fields names the keys of its text"
                )
            yield from ((f"{path}:{record.line}", text) for text in texts)
